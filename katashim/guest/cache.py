"""Layers of the guest image that are kept between builds, each in a directory named by its inputs.

    /var/cache/katashim/guest/
        packages-<key>/     Debian's packages, unpacked, and the kernel's package
        base-<key>/         the root without the agent
        kernel-<key>/       vmlinux and modules, extracted or built
        locks/              one file for each layer, held while it is made

A layer is made in a directory beside its place and renamed, so one that exists is whole. The key is
the hash of everything the layer was made from: a layer never changes, it is only replaced by
another key, and :meth:`Cache.prune` drops those that no build has used for a while.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time

from katashim.errors import DeadlineExceeded

DEFAULT_DIR = "/var/cache/katashim/guest"
KEEP_DAYS = 30
_LOCKS, _MAKING = "locks", ".making"


def key_of(*inputs):
    """A short stable name for what `inputs` (JSON values) say."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path):
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lock:
    """A file that one build holds at a time, to be used as a context manager.

    :param wait_s: how long to wait for another. :param what: what it stands for, for the error.
    :raises DeadlineExceeded: another build holds it for longer.
    """

    def __init__(self, path, wait_s, what):
        self._path, self._wait_s, self._what = path, wait_s, what

    def __enter__(self):
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        end = time.monotonic() + self._wait_s
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self
            except BlockingIOError as exc:
                if time.monotonic() > end:
                    os.close(self._fd)
                    raise DeadlineExceeded(
                        f"waited {self._wait_s} s for another guest build that makes {self._what}") from exc
                time.sleep(0.2)

    def __exit__(self, *error):
        os.close(self._fd)
        return False


class Cache:
    """The directory of layers.

    :param root: path of the cache; made when missing.
    :param wait_s: how long to wait for another build that makes the same layer.
    """

    def __init__(self, root=DEFAULT_DIR, wait_s=1800):
        self.root = root
        self._wait_s = wait_s
        os.makedirs(os.path.join(root, _LOCKS), exist_ok=True)

    def layer(self, name, key, make):
        """The directory of the layer `name` with `key`; `make(directory)` fills it when it is not there."""
        path = os.path.join(self.root, f"{name}-{key}")
        with Lock(os.path.join(self.root, _LOCKS, f"{name}-{key}"), self._wait_s, f"the layer {name}-{key}"):
            if not os.path.isdir(path):
                making = f"{path}{_MAKING}"
                if os.path.isdir(making):
                    shutil.rmtree(making)
                os.mkdir(making)
                try:
                    make(making)
                except BaseException:
                    shutil.rmtree(making)
                    raise
                os.rename(making, path)
            os.utime(path)
        return path

    def drop(self, name):
        """Forget all layers called `name`, so that the next build makes it anew."""
        for entry in self._layers():
            if entry.rpartition("-")[0] == name and not entry.endswith(_MAKING):
                shutil.rmtree(os.path.join(self.root, entry))

    def prune(self, keep_days=KEEP_DAYS):
        """Delete layers that were not used, or were left half made, for `keep_days`."""
        oldest = time.time() - keep_days * 86400
        for entry in self._layers():
            path = os.path.join(self.root, entry)
            if os.stat(path).st_mtime < oldest:
                shutil.rmtree(path)

    def _layers(self):
        return [entry for entry in sorted(os.listdir(self.root))
                if entry != _LOCKS and os.path.isdir(os.path.join(self.root, entry))]
