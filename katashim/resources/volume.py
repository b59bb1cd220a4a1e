"""A container's volumes: the mounts of its OCI spec, turned into what the agent can mount in the guest.

Each mount is shown to :data:`_KINDS`, a table of (predicate, handler), and the first that knows it
decides; the order is Kata's (runtime-rs, ``volume/mod.rs``). A handler returns the OCI mount for the
spec that goes to the agent, and the storages that the agent sets up before. A further kind of volume
(direct volumes, huge pages, watched ConfigMaps, block emptyDirs) is one more row.

What cannot work in a guest (a socket of the host, a writable directory with no shared filesystem) is
refused with the reason, never dropped or replaced by something like it.

Called by katashim.runtime.container.
"""

import logging
import os
import stat
from typing import NamedTuple

from katashim import green
from katashim.agent.types import Storage
from katashim.errors import InvalidArgument, NotFound, Unsupported
from katashim.resources import block, copyfs, guest_paths, mounts

log = logging.getLogger(__name__)

_EMPTY_DIR = "/kubernetes.io~empty-dir/"
_BIND = frozenset(("bind", "rbind"))
_FOLLOWS_HOST = frozenset(("slave", "rslave", "shared", "rshared"))


class Volumes(NamedTuple):
    """What a container's mounts became.

    :ivar mounts: list of OCI mount dicts, in the spec's order. :ivar storages: list of Storage.
    """

    mounts: list
    storages: list


class _Request(NamedTuple):
    """One mount of the spec, looked at."""

    mount: dict
    type: str
    source: str
    destination: str
    options: tuple
    mode: int               # st_mode of a bind's source, 0 when it is no bind
    gid: int                # of a bind's source

    @property
    def is_bind(self):
        return self.type == "bind"

    @property
    def readonly(self):
        return "ro" in self.options or "rro" in self.options

    def bound_from(self, guest_path):
        """The OCI mount that binds `guest_path` to the destination, with the spec's own options."""
        options = list(self.options)
        if not _BIND & set(options):
            options.append("bind")
        return {"destination": self.destination, "type": "bind", "source": guest_path, "options": options}


class _Means(NamedTuple):
    """With what the volumes of a container are made."""

    cid: str
    sandbox_id: str
    sharefs: object
    vm: object
    agent: object
    undo: object


def prepare(cid, spec_mounts, *, sandbox_id, sharefs, vm, agent, undo):
    """Bring the sources of a container's mounts within the guest's reach.

    :param spec_mounts: the OCI spec's ``mounts``, a list of dicts.
    :param sharefs: katashim.resources.sharefs.ShareFs, or None where the guest shares no filesystem.
    :param vm: katashim.drivers.base.Hypervisor, for disks.
    :param agent: katashim.agent.Agent, for copies; used only without `sharefs`.
    :param undo: the container's stack.
    :returns: :class:`Volumes`.
    :raises NotFound: a source does not exist. :raises Unsupported: a mount cannot be had in a guest.
    """
    means = _Means(cid, sandbox_id, sharefs, vm, agent, undo)
    result = Volumes([], [])
    for mount in spec_mounts:
        request = _look_at(mount)
        handler = next(handler for is_kind, handler in _KINDS if is_kind(request, means))
        oci_mount, storages = handler(request, means)
        result.mounts.append(oci_mount)
        result.storages.extend(storages)
    return result


def _look_at(mount):
    destination = mount["destination"]
    if mount.get("uidMappings") or mount.get("gidMappings"):
        raise Unsupported(f"the mount at {destination} has id mappings, which cannot be had in a guest")
    options = tuple(mount.get("options") or ())
    kind, source = mount.get("type") or "", mount.get("source") or ""
    if _BIND & set(options):
        kind = "bind"
    if kind != "bind":
        return _Request(mount, kind, source, destination, options, 0, 0)
    if not source.startswith("/"):
        raise InvalidArgument(f"the bind mount at {destination} has no absolute source: {source!r}")
    try:
        info = green.in_thread(os.stat, source, what=f"looking at {source}")
    except OSError as exc:
        raise NotFound(f"the source {source} of the mount at {destination}: {exc.strerror}") from exc
    return _Request(mount, kind, source, destination, options, info.st_mode, info.st_gid)


# -- kinds: predicates ------------------------------------------------------------------------------
def _is_memory_empty_dir(request, means):
    """A Kubernetes emptyDir of medium Memory: kubelet has mounted a tmpfs at the source."""
    return _is_empty_dir(request) and _fstype_at(request.source) == "tmpfs"


def _is_empty_dir(request):
    return request.is_bind and _EMPTY_DIR in request.source


def _fstype_at(path):
    """The type of the filesystem mounted at exactly `path`, "" when nothing is."""
    here = [entry for entry in mounts.table() if entry.target == os.path.realpath(path)]
    return here[-1].fstype if here else ""


def _is_shm(request, means):
    return request.destination.rstrip("/") == "/dev/shm"


def _is_disk_node(request, means):
    return request.is_bind and stat.S_ISBLK(request.mode)


def _is_disk_filesystem(request, means):
    """A mount of a filesystem type whose source is a block device of the host."""
    return not request.is_bind and request.source.startswith("/") and block.is_block_device(request.source)


def _is_the_guests_own(request, means):
    """Paths that mean the kernel one runs on: its /proc and /sys, its /dev, its character devices."""
    return request.is_bind and (
        _is_below(request.source, "/proc") or _is_below(request.source, "/sys")
        or request.destination.rstrip("/") == "/dev" or stat.S_ISCHR(request.mode))


def _is_below(path, top):
    path = os.path.normpath(path)
    return path == top or path.startswith(top + "/")


def _is_host_endpoint(request, means):
    return request.is_bind and (stat.S_ISSOCK(request.mode) or stat.S_ISFIFO(request.mode))


def _is_shareable(request, means):
    return request.is_bind and means.sharefs is not None


def _is_disk_empty_dir(request, means):
    return _is_empty_dir(request)


def _is_copyable(request, means):
    return request.is_bind


def _is_anything(request, means):
    return True


# -- kinds: handlers ----------------------------------------------------------------------------------
def _ephemeral(request, means):
    """A tmpfs in the guest, common to the pod. (Agents take the gid from it and discard other options.)"""
    path = guest_paths.EPHEMERAL + os.path.basename(os.path.normpath(request.source))
    options = (f"fsgid={request.gid}",) if request.gid else ()
    return request.bound_from(path), [
        Storage(driver="ephemeral", source="tmpfs", fstype="tmpfs", options=options, mount_point=path)]


def _shm(request, means):
    """The sandbox's shared memory, which CreateSandbox sets up."""
    return {"destination": request.destination, "type": "bind", "source": guest_paths.SHM,
            "options": ["rbind"]}, ()


def _disk_node(request, means):
    """A block device: its filesystem where it has one, the node itself below /dev or where it has none."""
    disk = block.attach(means.vm, request.source, request.readonly, means.undo)
    fstype = green.in_thread(block.filesystem_of, request.source, what=f"reading {request.source}")
    place = f"{guest_paths.STORAGE}{means.cid}-{disk.id}"
    if not fstype or _is_below(request.destination, "/dev"):
        storage = Storage(driver=disk.agent_type, source=disk.guest_address, fstype="bind", options=("bind",),
                          mount_point=place)
    else:
        storage = block.storage(disk, fstype, ("ro",) if request.readonly else (), place)
    return request.bound_from(place), [storage]


def _disk_filesystem(request, means):
    disk = block.attach(means.vm, request.source, request.readonly, means.undo)
    place = f"{guest_paths.STORAGE}{means.cid}-{disk.id}"
    bound = {"destination": request.destination, "type": "bind", "source": place,
             "options": ["rbind", "ro"] if request.readonly else ["rbind"]}
    return bound, [block.storage(disk, request.type, request.options, place)]


def _refuse_endpoint(request, means):
    kind = "socket" if stat.S_ISSOCK(request.mode) else "FIFO"
    raise Unsupported(f"{request.source} is a {kind} of the host: a guest cannot reach its other end, so it "
                      f"cannot be mounted at {request.destination}")


def _share(request, means):
    path = means.sharefs.share(request.source, request.readonly, means.undo,
                               recursive="rbind" in request.options,
                               slave=bool(_FOLLOWS_HOST & set(request.options)))
    return request.bound_from(path), ()


def _local(request, means):
    """An emptyDir on the root filesystem that the guest has for the sandbox's own container."""
    name = os.path.basename(os.path.normpath(request.source))
    path = f"{guest_paths.rootfs(means.sandbox_id)}/local/{name}"
    options = ("mode=0777", f"fsgid={request.gid}") if request.gid else ("mode=0777",)
    return request.bound_from(path), [
        Storage(driver="local", source="local", fstype="local", options=options, mount_point=path)]


def _copy(request, means):
    if stat.S_ISDIR(request.mode) and not request.readonly:
        raise Unsupported(f"{request.source} is to be writable at {request.destination}, but the guest shares "
                          "no filesystem with the host and what it writes would be lost: set shared_fs = "
                          "virtio-fs, or mount it read-only")
    if not request.readonly:
        log.info("%s is copied into the guest: what container %s writes to %s stays there",
                 request.source, means.cid, request.destination)
    name = f"{means.cid}-{os.urandom(8).hex()}-{os.path.basename(os.path.normpath(request.destination))}"
    return request.bound_from(copyfs.copy_in(means.agent, request.source, name)), ()


def _unchanged(request, means):
    """proc, sysfs, tmpfs, devpts, mqueue, cgroup, ...: the guest mounts its own."""
    return dict(request.mount), ()


_KINDS = (
    (_is_memory_empty_dir, _ephemeral),
    (_is_shm, _shm),
    (_is_disk_node, _disk_node),
    (_is_disk_filesystem, _disk_filesystem),
    (_is_the_guests_own, _unchanged),
    (_is_host_endpoint, _refuse_endpoint),
    (_is_shareable, _share),
    (_is_disk_empty_dir, _local),
    (_is_copyable, _copy),
    (_is_anything, _unchanged),
)
