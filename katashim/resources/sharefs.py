"""The filesystem that host and guest share: directories, a virtiofsd, and the binds inside.

Layout on the host, Kata's:

    /run/kata-containers/shared/sandboxes/<sandbox id>/rw/passthrough/<name>    binds are made here
    /run/kata-containers/shared/sandboxes/<sandbox id>/ro/passthrough/<name>    and appear here

``ro`` is a read-only slave of ``rw`` and the directory that virtiofsd exports, so the guest can write
into the binds that are writable but never change the tree that holds them. In the guest all of it is
below /run/kata-containers/shared/containers/.

Called by katashim.runtime.sandbox (start, device, storage, stop), rootfs and volume (binds).
"""

import os
import stat

from gevent.lock import BoundedSemaphore

from katashim import green, state
from katashim.agent.types import Storage
from katashim.drivers import base
from katashim.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unsupported
from katashim.resources import guest_paths, mounts, virtiofsd

SHARED_ROOT = os.environ.get("KATASHIM_SHARED_ROOT", "/run/kata-containers/shared/sandboxes")
TAG = "kataShared"          # stock agents look for this tag

_NAME_BYTES = 200           # of a source's last name in a bind's name; a file name has 255 at most


class ShareFs:
    """The share of one sandbox.

    :param sandbox_id: checked by its caller (katashim.state.check_id).
    :param hypervisor_config: shared_fs, the ``virtio_fs_*`` keys and disable_guest_selinux are read.
    :param undo: the sandbox's stack; everything here hangs on it.
    """

    def __init__(self, sandbox_id, hypervisor_config, undo):
        if hypervisor_config.shared_fs != "virtio-fs":
            raise Unsupported(f"shared_fs = {hypervisor_config.shared_fs}: katashim shares files by "
                              "virtio-fs, or not at all (none)")
        self._config = hypervisor_config
        self._parent_undo = undo
        self._undo = None
        self._base = os.path.join(SHARED_ROOT, state.check_id(sandbox_id, "sandbox id"))
        self.socket_path = os.path.join(state.run_dir(sandbox_id), "virtiofsd.sock")
        self._daemon = None
        self._volumes = {}                  # (source, recursive, slave, readonly) -> _Volume
        self._uses = {}                     # first part of a name -> how often it was used
        self._lock = BoundedSemaphore(1)    # guards _volumes while one of them is mounted or unmounted

    # -- life -------------------------------------------------------------------------------------
    def start(self):
        """Make the directories and start virtiofsd; it serves when this returns.

        :raises AlreadyExists: there is a share of this id. :raises NotFound: no virtiofsd.
        :raises HypervisorError: virtiofsd would not start; with its words.
        """
        program = virtiofsd.find(self._config.virtio_fs_daemon)
        with self._parent_undo.scope():
            self._undo = self._parent_undo.child("the shared filesystem")
            self._make_tree()
            settings = virtiofsd.Settings(
                shared_dir=self._path("ro"), cache=self._config.virtio_fs_cache,
                xattr=not self._config.disable_guest_selinux,
                extra_args=tuple(self._config.virtio_fs_extra_args))
            self._daemon = virtiofsd.start(program, self.socket_path, settings, self._undo)

    def _make_tree(self):
        os.makedirs(SHARED_ROOT, exist_ok=True)
        if os.path.lexists(self._base):
            raise AlreadyExists(f"{self._base} exists: a sandbox of this id runs, or was not cleaned up")
        self._undo.push("tree", path=self._base)
        os.mkdir(self._base, 0o700)
        rw, ro = self._path("rw"), self._path("ro")
        os.mkdir(rw)
        os.mkdir(ro)
        green.in_thread(self._join_views, rw, ro, what=f"mounting the shared tree {self._base}")
        os.mkdir(self._path("rw", "passthrough"))

    def _join_views(self, rw, ro):
        self._undo.push("mount", target=rw)
        mounts.bind(rw, rw)
        mounts.set_propagation(rw, mounts.MS_SHARED)    # a peer group of its own, whatever / is
        self._undo.push("mount", target=ro)
        mounts.bind(rw, ro, readonly=True, slave=True)

    def stop(self):
        """End virtiofsd and take everything away. For an end in good order; the undo stack does the same.

        :returns: ``[(entry, exception)]`` of what could not be released, as ``Undo.unwind``.
        """
        if self._undo is None:
            return []
        undo, self._undo = self._undo, None
        return undo.finish()

    # -- facts ------------------------------------------------------------------------------------
    @property
    def exited(self):
        """Event: virtiofsd has ended (also when the VMM closed the connection). None before `start`."""
        return self._daemon and self._daemon.exited

    def failure(self):
        """An error that tells how virtiofsd ended, to raise."""
        return self._daemon.failure()

    def pids(self):
        """Host pids of virtiofsd, for the sandbox's cgroup."""
        return self._daemon.pids() if self._daemon else []

    def device(self):
        """The device to give to the hypervisor, a katashim.drivers.base.ShareFs.

        :raises HypervisorError: virtiofsd has ended already.
        """
        if self._daemon.exited.is_set():
            raise self.failure()
        return base.ShareFs(tag=TAG, socket_path=self.socket_path,
                            queue_size=self._config.virtio_fs_queue_size)

    def storage(self):
        """What the agent mounts at CreateSandbox."""
        return Storage(driver="virtio-fs", source=TAG, fstype="virtiofs", options=("nodev",),
                       mount_point=guest_paths.SHARED)

    def _path(self, view, *names):
        return os.path.join(self._base, view, *names)

    # -- what is in it ----------------------------------------------------------------------------
    def make_dir(self, name, undo):
        """Make the directory `name` ("<container id>/rootfs"), a mount point for something the guest mounts
        itself; returns its guest path."""
        return self._make_dir(self._fresh(name), undo)

    def _make_dir(self, name, undo):
        path = self._host_path(name)
        if not os.path.isdir(os.path.dirname(path)):
            undo.push("dir", path=os.path.dirname(path))
            os.mkdir(os.path.dirname(path))
        undo.push("dir", path=path)
        os.mkdir(path)
        return guest_paths.PASSTHROUGH + name

    def bind(self, source, name, readonly, undo, *, recursive=False, slave=False):
        """Show a file or directory of the host to the guest.

        :param source: absolute path on the host.
        :param name: "<container id>/rootfs" for a directory, or one name, "sandbox-1a2b3c4d-hosts".
        :param readonly: for the guest; holds in every view from the first moment.
        :param undo: gets the mount and its mount point.
        :param recursive/slave: see katashim.resources.mounts.bind.
        :returns: its path in the guest.
        :raises NotFound: no such source. :raises AlreadyExists: the name is taken.
        """
        path = self._host_path(name)
        if os.path.lexists(path):
            raise AlreadyExists(f"{path} exists: {name} is shared already")
        name = self._fresh(name)
        path = self._host_path(name)
        try:
            mode = green.in_thread(os.stat, source, what=f"looking at {source}").st_mode
        except OSError as exc:
            raise NotFound(f"cannot share {source}: {exc.strerror}") from exc
        if stat.S_ISDIR(mode):
            guest_path = self._make_dir(name, undo)
        else:
            guest_path = self._make_file(name, undo)
        undo.push("mount", target=path)
        green.in_thread(lambda: mounts.bind(source, path, readonly=readonly, recursive=recursive, slave=slave),
                        what=f"binding {source} to {path}")
        return guest_path

    def _make_file(self, name, undo):
        path = self._host_path(name)
        undo.push("file", path=path)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return guest_paths.PASSTHROUGH + name

    def _fresh(self, name):
        """`name`, or another like it when it was used before: the guest remembers for a while (1 s with
        virtio_fs_cache = auto) what a name meant, and would see the old container's files."""
        top, slash, rest = name.partition("/")
        self._uses[top] = uses = self._uses.get(top, 0) + 1
        return name if uses == 1 else f"{top}~{uses}{slash}{rest}"    # no id has a ~

    def _host_path(self, name):
        if self._undo is None:
            raise FailedPrecondition("the shared filesystem is not started")
        parts = name.split("/")
        if not 1 <= len(parts) <= 2 or any(part in ("", ".", "..") for part in parts):
            raise InvalidArgument(f"{name!r} is no name for something shared")
        return self._path("rw", "passthrough", *parts)

    # -- volumes, which containers of a pod have in common ----------------------------------------
    def share(self, source, readonly, undo, *, recursive=False, slave=False):
        """Show `source` to the guest once, for all containers of the sandbox that ask for it.

        They must see the same files by the same path in the guest, or its page cache and file locks
        would not be common. A writable bind serves readers too (the agent mounts it read-only for
        them); a reader that came before the first writer keeps a bind of its own that the guest
        cannot write through.

        :param undo: the container's stack; the bind goes when the last container that uses it goes.
        :returns: its path in the guest. :raises NotFound: no such source.
        """
        key = green.in_thread(os.path.realpath, source, what=f"looking at {source}"), recursive, slave
        with self._lock:
            volume = self._volumes.get((*key, False)) or self._volumes.get((*key, readonly))
            if volume is None:
                volume = self._add_volume(key, readonly)
            user = object()
            volume.users.add(user)
            undo.call(f"share of {source}", self._leave, volume, user)
            return volume.guest_path

    def _add_volume(self, key, readonly):
        source, recursive, slave = key
        basename = os.fsencode(os.path.basename(source))[-_NAME_BYTES:]
        name = f"sandbox-{os.urandom(4).hex()}-{os.fsdecode(basename) or 'root'}"
        with self._undo.scope():
            undo = self._undo.child(f"share {name}")
            guest_path = self.bind(source, name, readonly, undo, recursive=recursive, slave=slave)
        volume = self._volumes[(*key, readonly)] = _Volume((*key, readonly), guest_path, undo)
        return volume

    def _leave(self, volume, user):
        with self._lock:
            volume.users.discard(user)
            if volume.users or self._undo is None:
                return
            self._volumes.pop(volume.key, None)
            for _, error in volume.undo.finish():
                raise error


class _Volume:
    """One source, bound once. It stays while somebody uses it."""

    def __init__(self, key, guest_path, undo):
        self.key, self.guest_path, self.undo = key, guest_path, undo
        self.users = set()
