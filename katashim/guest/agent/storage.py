"""Storages: what the host asks the agent to mount before a container, or the pod, can use it.

A storage is known by its mount point and counted: a second request for the same one finds it mounted, and
the last release unmounts it. One handler for each driver of upstream's agent; what they do with
options is in docs/guest.md. Called by sandbox.py.
"""

import os
import threading

from katashim.guest.agent import devices, layers, log, mounts
from katashim.guest.agent.container import BASE_DIR
from katashim.guest.agent.rpcerror import INTERNAL, INVALID_ARGUMENT, RpcError

PREMOUNTED = "kataShared"
_OVERLAY_RW = "io.katacontainers.fs-opt.overlay-rw"
_MAKE_DIRECTORY = "io.katacontainers.volume.overlayfs.create_directory="
_GROUP_ID = "fsgid="
_ON_ROOT_MISMATCH = 1
_MAKE_EXT4 = ("/sbin/mkfs.ext4", "-F", "-O", "^has_journal", "-m", "0", "-i", "163840", "-I", "128")
_HUGE_PAGES = "/sys/kernel/mm/hugepages"


class Storages:
    """All storages of the pod.

    :param hotplug_timeout_s: how long to wait for a device.
    """

    def __init__(self, hotplug_timeout_s):
        self._timeout_s = hotplug_timeout_s
        self._lock = threading.Lock()       # guards _counts
        self._counts = {}       # mount point -> [users, what releases it or None, whether it is kept]

    def add(self, requests, cid):
        """Set up `requests` (``grpc.Storage``) for the container `cid`, "" for the pod.

        :returns: the mount points that :meth:`release` is to be called with.
        :raises RpcError, OSError: one cannot be; those before it are released again.
        """
        taken = []
        try:
            group = [request for request in requests if layers.belongs(request)]
            for request in requests:
                if request in group:
                    if request is group[0]:
                        taken.append(self._take(layers.mount_point(group), group[0],
                                                lambda: self._mount_layers(group, cid)))
                    continue
                taken.append(self._take(request.mount_point, request,
                                        lambda request=request: self._make(request, cid)))
        except BaseException:
            self.release(taken)
            raise
        return taken

    def release(self, mount_points):
        """Give up one use of each; errors are logged, the rest is still done."""
        for mount_point in reversed(mount_points):
            with self._lock:
                state = self._counts.get(mount_point)
                if state is None:
                    continue
                state[0] -= 1
                if state[0] > 0 or state[2]:
                    continue
                del self._counts[mount_point]
            try:
                if state[1] is not None:
                    state[1](mount_point)
            except OSError as exc:
                log.warning("storage", f"releasing {mount_point}: {exc}")

    def _take(self, mount_point, request, make):
        with self._lock:
            state = self._counts.get(mount_point)
            if state is not None:
                state[0] += 1
                return mount_point
        release = make()
        with self._lock:
            self._counts[mount_point] = [1, release, request.shared]
        return mount_point

    def _mount_layers(self, group, cid):
        places = layers.mount(group, cid, self._timeout_s)
        return lambda mount_point: [_unmount(place) for place in (mount_point, *places)]

    def _make(self, request, cid):
        """Set one up; returns what releases it, called with its mount point, or None when it stays."""
        handler = _HANDLERS.get(request.driver)
        if handler is None:
            raise RpcError(INTERNAL, f"Failed to find the storage handler {request.driver}")
        return handler(request, cid, self._timeout_s)


def mount_common(request, source, options=None):
    """Mount a storage and give it its group. :param source: as the guest has it."""
    if source == PREMOUNTED and mounts.type_at(request.mount_point):
        log.info("storage", f"{PREMOUNTED} is mounted on {request.mount_point} already")
        return
    words = list(request.options) if options is None else options
    mounts.mount(source, request.mount_point, request.fstype, words)
    if request.fs_group is not None:
        try:
            _set_group(request.mount_point, request.fs_group, "ro" in words)
        except OSError:
            mounts.unmount(request.mount_point)
            raise


def _block(request, cid, timeout_s):
    device = devices.locate(request.driver, request.source, timeout_s)
    given = dict(option.partition("=")[::2] for option in request.driver_options)
    if given.get("encryption_key"):
        raise RpcError(INTERNAL,
                       "encrypted storage needs the confidential data hub, which this guest does not have")
    if "create_filesystem" in given:
        _make_filesystem(device, request.fstype)
    mount_common(request, device)
    return _unmount


def _virtio_fs(request, cid, timeout_s):
    mount_common(request, request.source)
    return _unmount


def _overlay(request, cid, timeout_s):
    options = [word for word in request.options if word != _OVERLAY_RW]
    if _OVERLAY_RW in request.options:
        if not cid:
            raise RpcError(INVALID_ARGUMENT, "No container id in rw overlay")
        for name in ("upper", "work"):
            path = f"{BASE_DIR}/{cid}/{name}"
            os.makedirs(path, exist_ok=True)
            options.append(f"{name}dir={path}")
    for option in request.driver_options:
        if option.startswith(_MAKE_DIRECTORY):
            os.makedirs(option[len(_MAKE_DIRECTORY):], exist_ok=True)
    mount_common(request, request.source, options=options)
    return _unmount


def _ephemeral(request, cid, timeout_s):
    """A tmpfs or hugetlbfs. It stays: another container of the pod may come to use it."""
    words = [word for word in request.options if not word.startswith(_GROUP_ID)]
    if request.fstype == "hugetlbfs":
        _allocate_huge_pages(words)
    mount_common(request, request.source, options=words)
    _set_group_id(request)


def _local(request, cid, timeout_s):
    """A directory on the guest's own memory."""
    os.makedirs(request.mount_point, exist_ok=True)
    for word in request.options:
        if word.startswith("mode="):
            os.chmod(request.mount_point, _octal(word[len("mode="):], word))
    _set_group_id(request)


def _watchable(request, cid, timeout_s):
    from katashim.guest.agent import watch
    watch.add(request.source, request.mount_point)
    return watch.remove


_HANDLERS = {"blk": _block, "mmioblk": _block, "scsi": _block, "nvdimm": _block, "virtio-fs": _virtio_fs,
             "overlayfs": _overlay, "ephemeral": _ephemeral, "local": _local, "watchable-bind": _watchable}
DRIVERS = tuple(sorted([*_HANDLERS, layers.DRIVER]))


def _unmount(mount_point):
    mounts.unmount(mount_point)
    try:
        os.rmdir(mount_point)
    except OSError as exc:      # the host's read-only share, or a file that was bound: it stays
        log.debug("storage", f"{mount_point} stays: {exc}")


def _make_filesystem(device, fstype):
    if fstype != "ext4":
        raise RpcError(INTERNAL, f"cannot create a {fstype} filesystem on {device}, only ext4")
    from katashim.guest.agent import programs
    done = programs.run([*_MAKE_EXT4, device], timeout_s=120)
    if done.status != 0:
        raise RpcError(INTERNAL, f"mkfs.ext4 of {device}: {done.text()}")


def _allocate_huge_pages(words):
    """Have the kernel set enough pages aside. :param words: with ``pagesize=`` and ``size=`` in bytes."""
    given = dict(word.partition("=")[::2] for word in words)
    page, size = (_number(given.get(name, ""), name) for name in ("pagesize", "size"))
    path = f"{_HUGE_PAGES}/hugepages-{page // 1024}kB/nr_hugepages"
    count = size // page
    with open(path, "w") as file:
        file.write(str(count))
    with open(path) as file:
        if int(file.read()) != count:
            raise RpcError(INTERNAL, f"the guest has no {count} huge pages of {page} bytes")


def _set_group_id(request):
    """``fsgid=N``: the mount point belongs to that group, and so does what is made in it."""
    for word in request.options:
        if word.startswith(_GROUP_ID):
            os.chown(request.mount_point, -1, _number(word[len(_GROUP_ID):], word))
            os.chmod(request.mount_point, os.stat(request.mount_point).st_mode & 0o7777 | 0o2000)


def _set_group(path, group, readonly):
    """Kubernetes' fsGroup: all files belong to the group and are readable by it, directories pass it on."""
    facts = os.stat(path)
    wanted = (0o440 if readonly else 0o660) | 0o110 | 0o2000
    if (group.group_change_policy == _ON_ROOT_MISMATCH and facts.st_gid == group.group_id
            and facts.st_mode & wanted == wanted):
        return
    for base, _, names in os.walk(path, topdown=False):
        for name in names:
            _regroup(os.path.join(base, name), group.group_id, wanted & 0o660)
        _regroup(base, group.group_id, wanted)


def _regroup(path, group_id, bits):
    if not os.path.islink(path):
        os.chown(path, -1, group_id)
        os.chmod(path, os.stat(path).st_mode & 0o7777 | bits)


def _number(text, word):
    if not text.isdigit() or int(text) == 0 and word != "fsgid=0":
        raise RpcError(INVALID_ARGUMENT, f"{word!r}: {text!r} is not a number that makes sense")
    return int(text)


def _octal(text, word):
    try:
        return int(text, 8)
    except ValueError as exc:
        raise RpcError(INVALID_ARGUMENT, f"{word!r} is no mode") from exc
