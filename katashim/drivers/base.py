"""What every hypervisor driver is: about 17 verbs, the device records, and a set of capabilities.

A driver owns one VMM process and the one channel to it. Callers never see VMM ids, QMP or REST:
they hand in device records (frozen), and get them back enriched with the guest address that the
agent needs. A device or verb that a driver does not have raises
:class:`katashim.errors.Unsupported` and names itself; there are no silent no-ops.

Called by katashim.runtime.sandbox; implemented by drivers/qemu.py and its siblings.
"""

import abc
from typing import NamedTuple

# What a driver can do (its `capabilities` is a frozenset of these). The README's table of drivers
# is made from them.
BLOCK_DEVICE = "block-device"            # disks at boot
BLOCK_HOTPLUG = "block-hotplug"          # disks added while the guest runs
BLOCK_UNPLUG = "block-unplug"
BLOCK_DISCARD = "block-discard"
NET_DEVICE = "net-device"
NET_HOTPLUG = "net-hotplug"
NET_UNPLUG = "net-unplug"
FS_SHARING = "fs-sharing"                # a host directory in the guest by virtio-fs
HYBRID_VSOCK = "hybrid-vsock"            # the agent is behind a unix socket with a CONNECT handshake
CPU_HOTPLUG = "cpu-hotplug"
MEMORY_HOTPLUG = "memory-hotplug"
MEMORY_SHRINK = "memory-shrink"
PAUSE = "pause"
SNAPSHOT = "snapshot"
VFIO = "vfio"
CONFIDENTIAL = "confidential"


class Vsock(NamedTuple):
    """The socket family between host and guest. The driver picks the backend; see drivers/vsock.py."""

    cid: int = 3
    socket_path: str = ""       # the hybrid vsock's unix socket on the host, "" for the kernel's vsock


class Disk(NamedTuple):
    """A disk for the guest: a regular file or block device of the host."""

    id: str                     # unique in the sandbox, [A-Za-z0-9-]
    path: str                   # on the host
    readonly: bool = False
    serial: str = ""            # at most 20 characters, what the guest sees under /dev/disk/by-id
    discard: bool = False
    driver: str = ""            # "virtio-blk", "virtio-scsi", "virtio-pmem"; "" = the configured one
    # filled in by the driver when it has attached it:
    agent_type: str = ""        # the agent's storage driver: "blk", "mmioblk", "scsi", "nvdimm"
    guest_address: str = ""     # what goes into Storage.source: "02/05" (PCI), "/dev/vdb", "0:1" (SCSI)


class Nic(NamedTuple):
    """A network card for the guest, in front of a tap whose queues are open fds of this process."""

    id: str
    tap_name: str
    mac: str                    # "02:00:00:00:00:01"
    fds: tuple = ()             # one tap fd per queue pair, opened in the sandbox's netns
    vhost_fds: tuple = ()       # as many as fds, or none
    mtu: int = 1500
    queue_size: int = 256
    # filled in by the driver:
    guest_address: str = ""     # PCI path, "" where the bus has none


class ShareFs(NamedTuple):
    """A virtio-fs device served by a vhost-user daemon that listens already."""

    tag: str                    # "kataShared"
    socket_path: str
    queue_size: int = 1024


class VfioDevice(NamedTuple):
    """A PCI device of the host, given to the guest whole."""

    id: str
    bdf: str                    # "0000:3b:00.0"
    guest_address: str = ""


class VhostUserDevice(NamedTuple):
    """A block or network device served by a vhost-user process (SPDK, DPDK)."""

    id: str
    kind: str                   # "blk" or "net"
    socket_path: str
    mac: str = ""
    guest_address: str = ""


class VmExit(NamedTuple):
    """How the VMM ended. Exactly one of the two is set for a real exit."""

    status: int                 # exit status 0..255, or 128 + signal
    reason: str                 # "exited with status 1: <last line of stderr>", "killed by signal 9", ...


class Hypervisor(abc.ABC):
    """One virtual machine.

    Life: ``prepare`` -> ``add_device`` (cold) ... -> ``start`` -> ``add_device`` (hot) ... -> ``stop``.
    Every verb may be called from any greenlet; a driver orders them on its channel. ``stop`` works
    in every state and any number of times, and never waits behind a stuck exchange.

    :ivar name: "qemu", "clh", ...: Kata's name for it in ``[hypervisor.NAME]``.
    :ivar capabilities: frozenset of the constants above.
    """

    name = ""
    capabilities = frozenset()

    # -- lifecycle --------------------------------------------------------------------------------
    @abc.abstractmethod
    def prepare(self):
        """Check binaries, kernel and image, make directories; start nothing that cannot be undone.

        :raises ConfigError: a setting cannot work here; names the setting.
        """

    @abc.abstractmethod
    def start(self, timeout_s):
        """Launch the VMM and let the guest run. Returns when the VMM runs, not when the agent answers.

        :raises HypervisorError: the VMM refused or died; carries its last words and the console.
        :raises DeadlineExceeded: the VMM's API did not come up in time.
        """

    @abc.abstractmethod
    def stop(self, timeout_s):
        """End the VM and reap the VMM: ask on the channel for part of the time, then SIGKILL."""

    @abc.abstractmethod
    def wait(self, timeout_s=None):
        """Block until the VMM has exited; returns a :class:`VmExit`, or None when time ran out."""

    @abc.abstractmethod
    def pause(self):
        """Stop all vCPUs."""

    @abc.abstractmethod
    def resume(self):
        """Let the vCPUs run again."""

    def save(self, path):
        """Write a snapshot of the paused VM below the directory `path`."""
        raise self.unsupported("saving the VM")

    # -- devices and size -------------------------------------------------------------------------
    @abc.abstractmethod
    def add_device(self, device):
        """Add a device: kept for boot before ``start``, plugged in after it.

        :returns: the record enriched with its guest address (see each record).
        :raises Unsupported: this driver has no such device, or cannot plug it while running.
        """

    @abc.abstractmethod
    def remove_device(self, device):
        """Unplug a device and wait until the guest has let go of it. Removing an unknown one is no error."""

    def resize_vcpus(self, count):
        """Set the number of vCPUs (clamped to the configured maximum); returns the number in force."""
        raise self.unsupported("changing the number of vCPUs of a running VM")

    def resize_memory(self, size_mb):
        """Set the guest's memory in MiB (rounded up to the guest's block); returns the size in force."""
        raise self.unsupported("changing the memory of a running VM")

    def set_memory_block_mb(self, size_mb):
        """Take note of the guest's memory block size in MiB, as its agent reports it.

        For drivers that plug memory: what they plug is a multiple of it.
        """

    # -- facts ------------------------------------------------------------------------------------
    @abc.abstractmethod
    def agent_address(self):
        """Where the guest's agent will answer: ``vsock://CID:1024`` or ``hvsock:///path:1024``."""

    @abc.abstractmethod
    def pids(self):
        """Host pids of the VMM and of its helpers, the VMM first. Empty before start."""

    @abc.abstractmethod
    def vcpu_threads(self):
        """``{vCPU index: host thread id}``, empty when the VM does not run."""

    @abc.abstractmethod
    def console_tail(self):
        """The last 64 KiB at most of what the guest printed, as text. Never blocks."""

    @abc.abstractmethod
    def describe(self):
        """Plain data for state.json: name, pid, start time, version, sockets. Never blocks."""

    def unsupported(self, what):
        """An Unsupported error in this driver's name, to raise."""
        from katashim.errors import Unsupported
        return Unsupported(f"the {self.name} driver does not support {what}")
