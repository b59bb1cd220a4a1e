"""Disks for the guest, from block devices and image files of the host.

No loop devices: the VMM opens an image file itself. A disk is attached through the hypervisor's
``add_device`` and comes back with the address by which the agent finds it.

Called by katashim.resources.rootfs and volume, and by katashim.runtime.container for ``linux.devices``.
"""

import fcntl
import itertools
import os
import stat
import struct

from katashim import green
from katashim.agent.types import Device, Storage
from katashim.drivers.base import Disk
from katashim.errors import InvalidArgument, NotFound

_BLKROGET = 0x125E
_PROBE_BYTES = 4096

# (offset, magic bytes, filesystem), from the on-disk formats of the kernel.
_MAGIC = (
    (0, b"XFSB", "xfs"),
    (0, b"hsqs", "squashfs"),
    (1024, bytes.fromhex("e2e1f5e0"), "erofs"),
    (1080, b"\x53\xef", "ext4"),        # ext2 and ext3 too: the guest has ext4's driver for all three
)

# Words that speak to mount(8) or to containerd, or that the VM makes needless.
_HOST_OPTIONS = frozenset(("bind", "rbind", "loop", "defaults"))

_numbers = itertools.count(1)           # one process is one sandbox, so these are unique in it


def is_block_device(path):
    """Whether `path` is, or leads to, a block device node of the host."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def is_readonly(path):
    """Whether a block device or image file cannot be written.

    :raises NotFound: there is none at `path`. :raises InvalidArgument: it is something else.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return not os.access(path, os.W_OK)
        if stat.S_ISBLK(mode):
            return _device_is_readonly(path)
    except OSError as exc:
        raise NotFound(f"cannot use {path} as a disk: {exc.strerror}") from exc
    raise InvalidArgument(f"cannot use {path} as a disk: neither a block device nor a file")


def _device_is_readonly(path):
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, struct.pack("i", 0)))[0] != 0
    finally:
        os.close(fd)


def filesystem_of(path):
    """The filesystem on a device or image: "ext4", "xfs", "erofs", "squashfs"; "" when it is none of these."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        head = os.pread(fd, _PROBE_BYTES, 0)
    finally:
        os.close(fd)
    for offset, magic, name in _MAGIC:
        if head[offset:offset + len(magic)] == magic:
            return name
    return ""


def attach(vm, path, readonly, undo, *, discard=False):
    """Give the guest a disk.

    :param vm: katashim.drivers.base.Hypervisor.
    :param path: a block device or a raw image file.
    :param readonly: forced on where `path` cannot be written. :raises NotFound: there is nothing at `path`.
    :param undo: gets the unplugging.
    :returns: the Disk with its guest address.
    """
    readonly = green.in_thread(is_readonly, path, what=f"looking at {path}") or readonly
    disk = Disk(id=f"disk-{next(_numbers)}", path=path, readonly=readonly, discard=discard)
    undo.call(f"{disk.id} ({path})", vm.remove_device, disk)
    return vm.add_device(disk)


def storage(disk, fstype, options, mount_point):
    """What the agent needs to mount an attached disk.

    :param options: mount options as the host has them; words that mean nothing in the guest are left
        out, ``ro`` is added for a disk that cannot be written.
    """
    kept = guest_options(options)
    if disk.readonly:
        kept = [word for word in kept if word not in ("ro", "rw")] + ["ro"]
    if fstype == "xfs" and "nouuid" not in kept:
        kept.append("nouuid")           # a snapshot has the UUID of its origin, which may be mounted too
    return Storage(driver=disk.agent_type, source=disk.guest_address, fstype=fstype, options=tuple(kept),
                   mount_point=mount_point)


def guest_options(options):
    """Mount options without the words that speak to the host's tools."""
    return [word for word in options if word not in _HOST_OPTIONS and not word.startswith(("X-", "x-"))]


# -- linux.devices ----------------------------------------------------------------------------------
def devices(spec, vm, undo):
    """Attach the block devices of an OCI spec's ``linux.devices``.

    :returns: what the agent needs to put them at their places, a tuple of katashim.agent.types.Device.
    :raises NotFound: the host has no such device.
    """
    found = []
    for entry in spec["linux"].get("devices") or ():
        if entry.get("type") != "b":
            continue
        path = _host_node(entry)
        disk = attach(vm, path, not _may_write(spec, entry), undo)
        by_name = disk.guest_address.startswith("/dev/")
        found.append(Device(id="" if by_name else disk.guest_address, type=disk.agent_type,
                            vm_path=disk.guest_address if by_name else "", container_path=entry["path"]))
    return tuple(found)


def _host_node(entry):
    """A node of the host with the entry's numbers; its path in the container may be any."""
    major, minor = entry.get("major", 0), entry.get("minor", 0)
    try:
        with open(f"/sys/dev/block/{major}:{minor}/uevent") as uevent:
            properties = dict(line.rstrip("\n").split("=", 1) for line in uevent if "=" in line)
    except FileNotFoundError:
        raise NotFound(f"the host has no block device {major}:{minor} (for {entry['path']})") from None
    return "/dev/" + properties["DEVNAME"]


def _may_write(spec, entry):
    """Whether the device cgroup's rule for exactly this device, where there is one, allows writing."""
    rules = (spec["linux"].get("resources") or {}).get("devices") or ()
    for rule in rules:
        if rule.get("allow") and (rule.get("major"), rule.get("minor")) == (
                entry.get("major"), entry.get("minor")):
            return "w" in rule.get("access", "rwm")
    return True
