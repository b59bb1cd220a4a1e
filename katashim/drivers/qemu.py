"""QEMU: one process, one monitor, one guest.

The driver behind ``[hypervisor.qemu]``. Decisions are made in qemu_plan, arguments in qemu_cmdline and
qemu_devices; qemu_process has the process, qemu_hotplug what is plugged into the running guest. Here
they are put together, and it is known which device is where.

Implements katashim.drivers.base.Hypervisor; made by katashim.runtime.sandbox.
"""

import contextlib
import logging

from katashim.drivers import base, qemu_cmdline, qemu_devices
from katashim.drivers.qemu_hotplug import Hotplug, nic_fd_names, tap_backend
from katashim.drivers.qemu_plan import make_plan
from katashim.drivers.qemu_process import QemuProcess
from katashim.drivers.vsock import open_vsock
from katashim.errors import (
    AlreadyExists,
    ConnectionClosed,
    FailedPrecondition,
    HypervisorError,
    KatashimError,
)

log = logging.getLogger(__name__)

AGENT_PORT = 1024
_COMMAND_S = 10.0

_COLD = frozenset({base.BLOCK_DEVICE, base.BLOCK_DISCARD, base.NET_DEVICE, base.FS_SHARING, base.PAUSE})
_HOT = frozenset({base.BLOCK_HOTPLUG, base.BLOCK_UNPLUG, base.NET_HOTPLUG, base.NET_UNPLUG,
                  base.CPU_HOTPLUG, base.MEMORY_HOTPLUG})


class _Attached:
    """A disk or card of this VM, and QEMU's names for it."""

    def __init__(self, number, device, place, *, scsi=False, index=0):
        kind = "disk" if isinstance(device, base.Disk) else "nic"
        self.scsi = scsi
        self.asked_for = device             # as the caller gave it
        self.device = device                # with its guest address
        self.place, self.index = place, index
        self.backend_id = f"{kind}{number}"             # block node or netdev
        self.device_id = f"{kind}{number}-device"
        self.arguments = None               # of the command line, when it is present at boot
        self.settled = False                # whether QEMU is known to have it
        self.busy = False                   # being plugged or unplugged


class Qemu(base.Hypervisor):
    """See :class:`katashim.drivers.base.Hypervisor` and the module's text.

    :param run_dir: the sandbox's own directory, which exists; sockets are made in it.
    :param hypervisor_config: the ``hypervisor`` record of a katashim.config.Config.
    :param undo: katashim.undo.Undo, gets the process and the sockets.
    :param netns: path of the network namespace for QEMU, or None for ours.
    :param timeline: katashim.timeline.Timeline; gets the phase "spawn" (from the launch to a working
        monitor).
    :ivar plan: the katashim.drivers.qemu_plan.Plan, after ``prepare``.
    """

    name = "qemu"
    capabilities = _COLD | _HOT             # on q35; on a microvm `prepare` takes away plugging

    def __init__(self, sandbox_id, run_dir, hypervisor_config, undo, *, netns=None, timeline=None):
        self.sandbox_id, self.run_dir = sandbox_id, run_dir
        self.plan = None
        self._settings, self._undo = hypervisor_config, undo
        self._netns, self._timeline = netns, timeline
        self._vsock = self._slots = self._process = self._hotplug = None
        self._cold = []                     # lists of arguments: the devices present at boot, in order
        self._pass_fds = []
        self._attached = {}                 # (record type, its id): _Attached
        self._numbers = 0
        self._virtio_disks = 0              # at boot, which decides on their names in the guest
        self._stopped = False
        self._version = ""

    # -- lifecycle --------------------------------------------------------------------------------
    def prepare(self):
        self.plan = make_plan(self._settings)
        if not self.plan.hotplug:
            self.capabilities = _COLD
        self._slots = qemu_devices.Slots(self.plan.pci, self.plan.bridges)
        self._cold.append(qemu_cmdline.system_devices(self.plan, self._slots))
        self._vsock = open_vsock(self.sandbox_id, self.run_dir, self._settings, self._undo)
        self._add_vsock()
        if self.plan.image:
            self._add_image()

    def start(self, timeout_s):
        self._check_state(running=False)
        phase = self._timeline.phase("spawn") if self._timeline else contextlib.nullcontext()
        with phase:
            self._process = QemuProcess(
                self.plan, self.sandbox_id, self._qmp_path(), [word for words in self._cold for word in words],
                pass_fds=self._pass_fds, undo=self._undo, netns=self._netns)
            if self._stopped:                   # meanwhile: the launch may have waited for a file
                self._process.stop(_COMMAND_S)
                self._check_state(running=True)
            qmp = self._process.qmp
            try:
                qmp.open(timeout_s)
                self._version = _version_text(qmp.execute("query-version", timeout_s=timeout_s))
            except KatashimError as exc:
                self._process.abandon(exc)
                raise
        self._hotplug = Hotplug(qmp, self.plan)
        log.info("QEMU %s runs as pid %d: %s with %s (%s)", self._version, self._process.child.pid,
                 self.plan.machine, self.plan.accel, self.plan.accel_why)

    def stop(self, timeout_s=10):
        self._stopped = True
        if self._process is not None:
            self._process.stop(timeout_s)
        if self._vsock is not None:
            self._vsock.stop()

    def wait(self, timeout_s=None):
        if self._process is None:
            return None
        self._process.exited.wait(timeout_s)
        return self._process.vm_exit

    def pause(self):
        self._execute("stop")

    def resume(self):
        self._execute("cont")

    # -- devices ----------------------------------------------------------------------------------
    def add_device(self, device):
        adders = {base.Disk: self._add_disk, base.Nic: self._add_nic, base.ShareFs: self._add_share}
        adder = adders.get(type(device))
        if adder is None:
            raise self.unsupported(f"devices of the kind {type(device).__name__}")
        if self._slots is None or self._stopped:
            raise FailedPrecondition(f"the VM of sandbox {self.sandbox_id} is not prepared, or stopped")
        return adder(device)

    def remove_device(self, device):
        if not isinstance(device, (base.Disk, base.Nic)):
            raise self.unsupported(f"removing devices of the kind {type(device).__name__}")
        attached = self._attached.get((type(device), device.id))
        if attached is None:
            return
        if self._process is None:
            self._withdraw(attached)
        elif not self._has_ended():             # else it is gone with the VM
            self._unplug(attached)
        self._forget(attached)

    def resize_vcpus(self, count):
        self._check_state(running=True)
        if not self.plan.hotplug:
            raise self.unsupported(f"changing the number of vCPUs on the machine type {self.plan.machine}")
        return self._hotplug.resize_vcpus(count)

    def resize_memory(self, size_mb):
        self._check_state(running=True)
        if not self.plan.hotplug:
            raise self.unsupported(f"changing the memory on the machine type {self.plan.machine}")
        return self._hotplug.resize_memory(size_mb)

    def set_memory_block_mb(self, size_mb):
        """The guest's memory block size in MiB, as its agent reports it; plugged memory is a multiple."""
        self._check_state(running=True)
        self._hotplug.memory_block_mb = size_mb

    # -- facts ------------------------------------------------------------------------------------
    def agent_address(self):
        return self._vsock.address(AGENT_PORT)

    def pids(self):
        vmm = self._process.child if self._process is not None else None
        running = [vmm.pid] if vmm is not None and vmm.returncode is None else []
        return running + (self._vsock.pids() if self._vsock is not None else [])

    def vcpu_threads(self):
        if self._hotplug is None or self._has_ended():
            return {}
        return {cpu["cpu-index"]: cpu["thread-id"] for cpu in self._execute("query-cpus-fast")}

    def console_tail(self):
        return self.console.text() if self.console is not None else ""

    @property
    def console(self):
        """The guest console's katashim.drivers.console.Tail, None before ``start``."""
        return self._process.console if self._process is not None else None

    def describe(self):
        facts = {"name": self.name, "version": self._version, "qmp": self._qmp_path()}
        if self._process is not None:
            facts.update(pid=self._process.child.pid, start_time=self._process.child.start_time)
        if self.plan is not None:
            facts.update(machine=self.plan.machine, accel=self.plan.accel, accel_why=self.plan.accel_why)
        if self._vsock is not None:
            facts.update(vsock=self._vsock.backend, agent=self.agent_address())
        return facts

    def queue(self):
        """Who uses the monitor and who waits for it: a katashim.drivers.channel.Queue, or None."""
        return self._process.qmp.channel.queue() if self._process is not None else None

    # -- devices at boot and later ----------------------------------------------------------------
    def _add_vsock(self):
        if self._vsock.kind == "vhost-user":
            self.plan = self.plan._replace(shared_memory=True)
            self._cold.append(qemu_cmdline.chardev_socket("vsock", self._vsock.chardev_path))
        else:
            self._pass_fds.append(self._vsock.vhost_fd)
        self._cold.append(qemu_cmdline.device(
            qemu_devices.vsock_device(self._vsock, self.plan.pci, self._slots.at_boot())))

    def _add_image(self):
        """The guest's root image: the first disk, so that it is /dev/vda; always virtio-blk."""
        disk = base.Disk("image", self.plan.image, readonly=True)
        node = qemu_devices.block_node("image", disk.path, readonly=True)
        device = qemu_devices.blk_device("image-device", "image", disk, self.plan.pci, self._slots.at_boot())
        self._cold.append(qemu_cmdline.blockdev(node) + qemu_cmdline.device(device))
        self._virtio_disks += 1

    def _add_share(self, share):
        if self._process is not None:
            raise self.unsupported("adding a shared directory to a running VM")
        self.plan = self.plan._replace(shared_memory=True)
        chardev = f"share{self._next_number()}"
        device = qemu_devices.fs_device(chardev, share, self.plan.pci, self._slots.at_boot())
        self._cold.append(qemu_cmdline.chardev_socket(chardev, share.socket_path) + qemu_cmdline.device(device))
        return share

    def _add_disk(self, disk):
        qemu_devices.check_disk(disk)           # before it takes a place and a name
        attached = self._attachment(disk)
        if attached.settled:
            return attached.device
        node = qemu_devices.block_node(
            attached.backend_id, disk.path, readonly=disk.readonly, discard=disk.discard,
            aio=self.plan.disk_aio, cache=self.plan.disk_cache)
        device = self._disk_device(attached, disk)
        if self._process is None:
            self._keep_for_boot(attached, qemu_cmdline.blockdev(node) + qemu_cmdline.device(device))
        else:
            self._plug(attached, lambda: self._hotplug.add_disk(node, device))
        attached.settled = True
        return attached.device

    def _disk_device(self, attached, disk):
        """The disk's ``-device``; fills in its guest address."""
        if attached.scsi:
            attached.device = disk._replace(
                agent_type="scsi", guest_address=qemu_devices.scsi_address(attached.index))
            return qemu_devices.scsi_disk(attached.device_id, attached.backend_id, disk, attached.index)
        plan = self.plan
        if self._process is None:
            # By name: the agent learns PCI paths from uevents, and misses those from before its start.
            address = f"/dev/{qemu_devices.vd_name(attached.index)}"
        else:
            address = self._slots.pci_path(attached.place)
        attached.device = disk._replace(
            agent_type="blk" if plan.pci else "mmioblk", guest_address=address)
        iothread = f"iothread{attached.index % plan.iothreads}" if plan.iothreads else ""
        return qemu_devices.blk_device(
            attached.device_id, attached.backend_id, disk, plan.pci, attached.place,
            queues=plan.disk_queues, queue_size=plan.disk_queue_size, iothread=iothread,
            sector_sizes=plan.sector_sizes)

    def _is_scsi(self, disk):
        if disk.driver not in ("", "virtio-blk", "virtio-scsi"):
            raise self.unsupported(f"disks of the kind {disk.driver}")
        if disk.driver == "virtio-scsi" and not self.plan.scsi:
            raise self.unsupported("a virtio-scsi disk without block_device_driver = virtio-scsi")
        return self.plan.scsi and disk.driver != "virtio-blk"

    def _add_nic(self, nic):
        attached = self._attachment(nic)
        if attached.settled:
            return attached.device
        if self._slots.pci:
            attached.device = nic._replace(guest_address=self._slots.pci_path(attached.place))
        device = qemu_devices.net_device(
            attached.device_id, attached.backend_id, nic, self.plan.pci, attached.place)
        if self._process is None:
            netdev = qemu_devices.tap_backend(attached.backend_id, nic.fds, nic.vhost_fds)
            self._keep_for_boot(attached, qemu_cmdline.netdev(netdev) + qemu_cmdline.device(device))
            self._pass_fds += [*nic.fds, *nic.vhost_fds]
        else:
            names = nic_fd_names(attached.backend_id, nic)
            netdev = tap_backend(attached.backend_id, names)
            self._plug(attached, lambda: self._hotplug.add_nic(netdev, device, *names))
        attached.settled = True
        return attached.device

    def _keep_for_boot(self, attached, arguments):
        attached.arguments = arguments
        self._cold.append(arguments)

    def _attachment(self, device):
        """The _Attached of a device: of an earlier attempt to add the same, or a new one with a place."""
        key = type(device), device.id
        attached = self._attached.get(key)
        if attached is not None:
            if attached.asked_for != device and attached.device != device:
                raise AlreadyExists(f"sandbox {self.sandbox_id} has another {type(device).__name__} "
                                    f"called {device.id}")
            return attached
        if self._process is not None:
            self._check_state(running=True)
            if not self.plan.hotplug:
                raise self.unsupported(f"plugging devices on the machine type {self.plan.machine}")
        scsi = isinstance(device, base.Disk) and self._is_scsi(device)
        place = {} if scsi else self._slots.at_boot() if self._process is None else self._slots.hotplug()
        attached = _Attached(self._next_number(), device, place, scsi=scsi,
                             index=self._disk_index(device, scsi))
        self._attached[key] = attached
        return attached

    def _disk_index(self, device, scsi):
        """SCSI: the lowest address that is free. virtio-blk: the order at boot."""
        if scsi:
            taken = {other.index for other in self._attached.values() if other.scsi}
            return next(index for index in range(len(taken) + 1) if index not in taken)
        if isinstance(device, base.Disk):
            self._virtio_disks += 1
            return self._virtio_disks - 1
        return 0

    def _plug(self, attached, steps):
        """Plug while running. What QEMU refuses is forgotten; what is in doubt may be tried again."""
        with self._busy(attached):
            try:
                steps()
            except HypervisorError:
                self._forget(attached)
                raise

    def _unplug(self, attached):
        if not self.plan.hotplug:
            raise self.unsupported(f"unplugging on the machine type {self.plan.machine}")
        remove = (self._hotplug.remove_disk if isinstance(attached.device, base.Disk)
                  else self._hotplug.remove_nic)
        with self._busy(attached):
            try:
                remove(attached.backend_id, attached.device_id)
            except ConnectionClosed:
                if not self._process.qmp.channel.closed:    # closed for good: QEMU has ended, the device with it
                    raise

    def _withdraw(self, attached):
        """Take back a device before the start."""
        if isinstance(attached.device, base.Disk) and not attached.scsi:
            if attached.index != self._virtio_disks - 1:
                raise FailedPrecondition(f"without {attached.device.id} the disks after it would be called "
                                         "by other names than were told")
            self._virtio_disks -= 1
        self._cold = [arguments for arguments in self._cold if arguments is not attached.arguments]
        if isinstance(attached.device, base.Nic):
            for fd in (*attached.device.fds, *attached.device.vhost_fds):
                self._pass_fds.remove(fd)

    def _forget(self, attached):
        del self._attached[type(attached.asked_for), attached.asked_for.id]
        self._slots.release(attached.place)

    @contextlib.contextmanager
    def _busy(self, attached):
        if attached.busy:
            raise FailedPrecondition(f"{attached.asked_for.id} is being plugged or unplugged already")
        attached.busy = True
        try:
            yield
        finally:
            attached.busy = False

    def _next_number(self):
        self._numbers += 1
        return self._numbers - 1

    # -- state ------------------------------------------------------------------------------------
    def _qmp_path(self):
        return f"{self.run_dir}/qmp.sock"

    def _execute(self, command):
        self._check_state(running=True)
        return self._process.qmp.execute(command, timeout_s=_COMMAND_S)

    def _has_ended(self):
        return self._stopped or (self._process is not None and self._process.exited.is_set())

    def _check_state(self, running):
        """:raises FailedPrecondition: the VM is not in the state that a verb needs."""
        if self._has_ended():
            raise FailedPrecondition(f"the VM of sandbox {self.sandbox_id} has ended")
        if running and self._hotplug is None:
            raise FailedPrecondition(f"the VM of sandbox {self.sandbox_id} does not run yet")
        if not running and (self.plan is None or self._process is not None):
            raise FailedPrecondition(f"the VM of sandbox {self.sandbox_id} is not prepared, or was started")


def _version_text(reply):
    version = reply["qemu"]
    return f"{version['major']}.{version['minor']}.{version['micro']}"
