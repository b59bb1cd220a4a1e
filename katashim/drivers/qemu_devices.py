"""QEMU's devices as plain dicts, and the places where they go.

The same dict plugs a device at boot (``-device`` with JSON, QEMU >= 6.2) and while the guest runs
(QMP's ``device_add``); likewise ``-blockdev`` and ``blockdev-add``. Nothing here talks to QEMU.

Two transports: PCI (q35, or microvm with ``pcie=on``), and virtio-mmio, which has no hotplug.
Used by katashim.drivers.qemu_cmdline and katashim.drivers.qemu.
"""

import os
import stat

from katashim.errors import ConfigError, InvalidArgument, NotFound, ResourceExhausted

ROOT_BUS = "pcie.0"
SERIAL_MAX = 20                     # VIRTIO_BLK_ID_BYTES
SCSI_LUNS = 256                     # disks to a SCSI target, as Kata counts them

_FIRST_SLOT, _LAST_ROOT_SLOT, _LAST_BRIDGE_SLOT = 1, 0x1E, 30
_MMIO_TRANSPORTS = 24               # of QEMU's microvm with its second IO-APIC


class Slots:
    """The free places of a machine: slots of the root bus and of its bridges, or mmio transports.

    Devices present at boot sit on the root bus, in ascending slots, so that the guest's kernel finds
    them in this order; plugged ones sit behind the bridges.

    :param pci: False for virtio-mmio. :param bridges: how many PCI bridges there are.
    """

    def __init__(self, pci, bridges=0):
        self.pci = pci
        self.bridges = []           # (id, slot on the root bus)
        self._free = {ROOT_BUS: list(range(_FIRST_SLOT, _LAST_ROOT_SLOT + 1))} if pci else {}
        self._transports = 0
        for number in range(bridges if pci else 0):
            self.bridges.append((f"pci-bridge-{number}", self._take(ROOT_BUS)))
            self._free[f"pci-bridge-{number}"] = list(range(_FIRST_SLOT, _LAST_BRIDGE_SLOT + 1))

    def at_boot(self):
        """A place for a device present at boot: what its dict needs, ``{"bus", "addr"}`` or nothing."""
        if self.pci:
            return {"bus": ROOT_BUS, "addr": f"{self._take(ROOT_BUS):#x}"}
        if self._transports == _MMIO_TRANSPORTS:
            raise ResourceExhausted(f"a microvm has places for {_MMIO_TRANSPORTS} devices, all are taken")
        self._transports += 1
        return {}

    def hotplug(self):
        """A place behind a bridge for a device to be plugged in now. :raises ResourceExhausted: all taken."""
        for bridge, _ in self.bridges:
            if self._free[bridge]:
                return {"bus": bridge, "addr": f"{self._take(bridge):#x}"}
        raise ResourceExhausted(
            f"all slots of the VM's {len(self.bridges)} PCI bridge(s) are taken; default_bridges sets "
            "their number")

    def release(self, place):
        """Give a place back."""
        if place:
            self._free[place["bus"]].append(int(place["addr"], 16))
            self._free[place["bus"]].sort()

    def pci_path(self, place):
        """The guest address of a PCI place as the Kata agent writes it: "02/05", or "05" on the root bus."""
        slot = int(place["addr"], 16)
        for bridge, bridge_slot in self.bridges:
            if place["bus"] == bridge:
                return f"{bridge_slot:02x}/{slot:02x}"
        return f"{slot:02x}"

    def _take(self, bus):
        if not self._free[bus]:
            raise ResourceExhausted(f"all slots of the VM's PCI bus {bus} are taken")
        return self._free[bus].pop(0)


def vd_name(index):
    """The kernel's name of its `index`-th virtio disk: 0 vda, 25 vdz, 26 vdaa, 701 vdzz."""
    letters, index = "", index + 1
    while index:
        index, letter = divmod(index - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return "vd" + letters


def virtio(kind, pci):
    """The name of a virtio device on its transport: ``virtio-blk-pci``, ``virtio-blk-device``."""
    return f"{kind}-pci" if pci else f"{kind}-device"


# -- disks ----------------------------------------------------------------------------------------
def check_disk(disk):
    """Find out before anything is done that a disk cannot be used.

    :raises NotFound, InvalidArgument: its file does not exist or is no disk; its serial is too long.
    """
    _host_driver(disk.path)
    if len(disk.serial) > SERIAL_MAX:
        raise InvalidArgument(f"the serial of disk {disk.id}, {disk.serial!r}, is longer than {SERIAL_MAX}")


def block_node(name, path, *, readonly, discard=False, aio="threads", cache=None):
    """The ``-blockdev`` of a raw file or block device of the host.

    :param cache: ``{"direct": bool, "no-flush": bool}`` or None for QEMU's defaults.
    :raises NotFound, InvalidArgument: `path` does not exist, or is neither file nor block device.
    """
    node = {"driver": _host_driver(path), "node-name": name, "filename": path, "aio": aio,
            "read-only": readonly, "discard": "unmap" if discard else "ignore"}
    if cache is not None:
        node["cache"] = cache
    return node


def _host_driver(path):
    try:
        mode = os.stat(path).st_mode
    except OSError as exc:
        raise NotFound(f"the disk {path} cannot be used: {exc.strerror}") from exc
    if stat.S_ISBLK(mode):
        return "host_device"
    if stat.S_ISREG(mode):
        return "file"
    raise InvalidArgument(f"the disk {path} is neither a regular file nor a block device")


def blk_device(device_id, node, disk, pci, place, *, queues=1, queue_size=128, iothread="",
               sector_sizes=(0, 0)):
    """A virtio-blk disk over the block node `node`.

    :param disk: a katashim.drivers.base.Disk. :param place: from :class:`Slots`.
    :param queue_size: a power of two. :param iothread: id of an iothread object or "".
    :param sector_sizes: (logical, physical) in bytes, 0 leaves it to QEMU.
    """
    device = {"driver": virtio("virtio-blk", pci), "id": device_id, "drive": node, **place,
              "serial": disk.serial, "num-queues": queues, "queue-size": queue_size,
              "config-wce": False, "discard": disk.discard, "share-rw": not disk.readonly}
    if iothread:
        device["iothread"] = iothread
    for name, size in zip(("logical_block_size", "physical_block_size"), sector_sizes, strict=True):
        if size:
            device[name] = size
    return device


def scsi_disk(device_id, node, disk, index):
    """A disk on the SCSI controller ``scsi0``; the agent finds it at ``"TARGET:LUN"``."""
    return {"driver": "scsi-hd", "id": device_id, "drive": node, "bus": "scsi0.0", "channel": 0,
            "scsi-id": index // SCSI_LUNS, "lun": index % SCSI_LUNS, "serial": disk.serial,
            "share-rw": not disk.readonly}


def scsi_address(index):
    """The guest address of the `index`-th SCSI disk."""
    return f"{index // SCSI_LUNS}:{index % SCSI_LUNS}"


# -- network --------------------------------------------------------------------------------------
def tap_backend(netdev_id, fds, vhost_fds):
    """The ``-netdev`` of a tap.

    :param fds: one per queue pair: numbers on the command line, names of ``getfd`` over QMP.
    :param vhost_fds: as many, or none for packets moved by QEMU itself.
    """
    netdev = {"type": "tap", "id": netdev_id, "fds": ":".join(map(str, fds))}
    if vhost_fds:
        netdev.update({"vhost": True, "vhostfds": ":".join(map(str, vhost_fds))})
    return netdev


def net_device(device_id, netdev_id, nic, pci, place):
    """A virtio network card. :param nic: a katashim.drivers.base.Nic."""
    device = {"driver": virtio("virtio-net", pci), "id": device_id, "netdev": netdev_id, **place,
              "mac": nic.mac}
    if nic.queue_size != 256:               # QEMU's default; the other direction cannot be changed on taps
        device["rx_queue_size"] = nic.queue_size
    if pci:
        device["romfile"] = ""              # nobody boots from the network
    if len(nic.fds) > 1:
        device["mq"] = True
        if pci:
            device["vectors"] = 2 * len(nic.fds) + 2
    return device


# -- the rest -------------------------------------------------------------------------------------
def fs_device(chardev, share, pci, place):
    """virtio-fs behind a vhost-user socket. :param share: a katashim.drivers.base.ShareFs."""
    if share.queue_size & (share.queue_size - 1) or not 0 < share.queue_size <= 1024:
        raise ConfigError(f"virtio_fs_queue_size = {share.queue_size} is not a power of two up to 1024")
    return {"driver": virtio("vhost-user-fs", pci), "id": "fs-" + chardev, "chardev": chardev, **place,
            "tag": share.tag, "queue-size": share.queue_size}


def vsock_device(backend, pci, place):
    """The guest's vsock, by the kernel or behind a vhost-user socket (chardev ``vsock``).

    :param backend: a katashim.drivers.vsock.VsockBackend.
    """
    if backend.kind == "kernel":
        return {"driver": virtio("vhost-vsock", pci), "id": "vsock0", **place,
                "guest-cid": backend.cid, "vhostfd": str(backend.vhost_fd)}
    return {"driver": virtio("vhost-user-vsock", pci), "id": "vsock0", **place, "chardev": "vsock"}


def bridge_device(number, bridge_id, slot):
    """A PCI bridge for hotplug, by ACPI (``shpc=off``): what Debian's cloud kernel and Kata's can do."""
    return {"driver": "pci-bridge", "id": bridge_id, "bus": ROOT_BUS, "addr": f"{slot:#x}",
            "chassis_nr": number + 1, "shpc": False, "io-reserve": 4096, "mem-reserve": 1 << 20,
            "pref64-reserve": 1 << 20}
