"""Watchable bind mounts: configuration files that are copied from the shared filesystem as they change.

A container's inotify does not hear of changes that the host makes below a virtio-fs. So small trees
(Kubernetes' secrets and config maps) are copied into a tmpfs, every two seconds, and that is what the
container sees. Trees of more than 16 files or 1 MiB are bound instead, as upstream does. Called by
storage.py.
"""

import os
import shutil
import threading
import time

from katashim.guest.agent import linux, log, mounts

_PERIOD_S = 2.0
_MAX_FILES, _MAX_BYTES = 16, 1 << 20

_lock = threading.Lock()        # guards _watched and _started
_watched = {}                   # mount point -> _Tree
_started = False


def add(source, mount_point):
    """Make the tree `source` readable at `mount_point`, and keep it up to date."""
    global _started
    tree = _Tree(source, mount_point)
    with _lock:
        _watched[mount_point] = tree
        if not _started:
            _started = True
            threading.Thread(target=_run, name="watch", daemon=True).start()


def remove(mount_point):
    """Stop following what is at `mount_point`, and unmount it."""
    _forget(mount_point)
    mounts.unmount(mount_point)


def _forget(mount_point):
    with _lock:
        _watched.pop(mount_point, None)


def _run():
    while True:
        time.sleep(_PERIOD_S)
        with _lock:
            trees = list(_watched.items())
        for mount_point, tree in trees:
            try:
                if not tree.update():
                    _forget(mount_point)
            except OSError as exc:
                log.warning("watch", f"{mount_point}: {exc}")


class _Tree:
    """A source tree and its copy, mounted."""

    def __init__(self, source, mount_point):
        self._source, self._mount_point = source, mount_point
        self._seen = {}         # path below the source -> (mtime, size, inode)
        self._bound = _is_too_large(source)
        if self._bound:
            mounts.mount(source, mount_point, "bind", ["bind"])
            return
        mounts.make_target("", mount_point)
        linux.mount("tmpfs", mount_point, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755")
        self.update()

    def update(self):
        """Copy what has changed, delete what is gone; False when the tree has outgrown watching."""
        if self._bound or _is_too_large(self._source):
            if not self._bound:
                self._bound = True
                mounts.unmount(self._mount_point)
                mounts.mount(self._source, self._mount_point, "bind", ["bind"])
            return False
        present = {}
        for base, directories, names in os.walk(self._source):
            inside = os.path.relpath(base, self._source)
            for name in (*directories, *names):
                path = os.path.normpath(os.path.join(inside, name))
                facts = os.lstat(os.path.join(base, name))
                present[path] = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
        for path in sorted(self._seen.keys() - present.keys(), reverse=True):
            _delete(os.path.join(self._mount_point, path))
        for path in sorted(present):
            if self._seen.get(path) != present[path]:
                self._copy(path)
        self._seen = present
        return True

    def _copy(self, path):
        source, target = os.path.join(self._source, path), os.path.join(self._mount_point, path)
        if os.path.islink(source):
            # Kubernetes swaps ..data this way: the new link replaces the old one at once.
            os.symlink(os.readlink(source), f"{target}.new")
            os.rename(f"{target}.new", target)
        elif os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
            shutil.copystat(source, target)
        else:
            shutil.copy2(source, f"{target}.new")
            os.rename(f"{target}.new", target)


def _is_too_large(source):
    files = size = 0
    for base, _, names in os.walk(source):
        for name in names:
            files += 1
            size += os.lstat(os.path.join(base, name)).st_size
    return files > _MAX_FILES or size > _MAX_BYTES


def _delete(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
