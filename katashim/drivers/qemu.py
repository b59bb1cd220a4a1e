"""QEMU: one process, one monitor, one guest.

The driver behind ``[hypervisor.qemu]``. Decisions are made in qemu_plan, arguments in qemu_cmdline and
qemu_devices, plugging in qemu_hotplug; here is the life of the process. QEMU inherits everything by
descriptor: its monitor's listening socket (so that connecting never comes too early), the console,
taps, vhost files. Its end is seen by pidfd and fails everything that waits for it.

Implements katashim.drivers.base.Hypervisor; made by katashim.runtime.sandbox.
"""

import contextlib
import logging
import os
import re
import socket
from typing import NamedTuple

from gevent.event import Event

from katashim import child, green
from katashim.drivers import base, qemu_cmdline, qemu_devices, qmp
from katashim.drivers.console import Tail
from katashim.drivers.qemu_hotplug import Hotplug, nic_fd_names, tap_backend
from katashim.drivers.qemu_plan import make_plan
from katashim.drivers.vsock import open_vsock
from katashim.errors import (
    AlreadyExists,
    ConnectionClosed,
    DeadlineExceeded,
    FailedPrecondition,
    HypervisorError,
    KatashimError,
)

log = logging.getLogger(__name__)

AGENT_PORT = 1024
_AGENT_MARK = re.compile(rb"kata-agent|katashim agent")     # in the first line that the agent prints
_STDERR_BYTES = 16 * 1024
_QUIT_S = 2.0                       # for QEMU to end by itself when asked to; then it is killed
_COMMAND_S = 10.0
_LAST_EVENT_S = 0.2

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


class _Descriptors(NamedTuple):
    """What QEMU inherits and what of it stays ours."""

    listener: object
    console: int
    console_theirs: int
    stderr: int
    stderr_theirs: int


class Qemu(base.Hypervisor):
    """See :class:`katashim.drivers.base.Hypervisor` and the module's text.

    :param run_dir: the sandbox's own directory, which exists; sockets are made in it.
    :param hypervisor_config: the ``hypervisor`` record of a katashim.config.Config.
    :param undo: katashim.undo.Undo, gets the process and the sockets.
    :param netns: path of the network namespace for QEMU, or None for ours.
    :param timeline: katashim.timeline.Timeline; gets the phase "spawn" (from the launch to a working
        monitor).
    :ivar plan: the katashim.drivers.qemu_plan.Plan, after ``prepare``.
    :ivar console: the guest console's katashim.drivers.console.Tail, after ``start``.
    """

    name = "qemu"
    capabilities = _COLD | _HOT             # on q35; on a microvm `prepare` takes away plugging

    def __init__(self, sandbox_id, run_dir, hypervisor_config, undo, *, netns=None, timeline=None):
        self.sandbox_id, self.run_dir = sandbox_id, run_dir
        self.plan = self.console = None
        self._settings, self._undo = hypervisor_config, undo
        self._netns, self._timeline = netns, timeline
        self._vsock = self._slots = self._child = self._qmp = self._hotplug = self._stderr = None
        self._entries = []                  # on the undo stack, released by stop()
        self._cold = []                     # lists of arguments: the devices present at boot, in order
        self._pass_fds = []
        self._attached = {}                 # (record type, its id): _Attached
        self._numbers = 0
        self._virtio_disks = 0              # at boot, which decides on their names in the guest
        self._vm_exit = None
        self._exited = Event()
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
            self._spawn()
            try:
                self._qmp.open(timeout_s)
                self._version = _version_text(self._qmp.execute("query-version", timeout_s=timeout_s))
            except KatashimError as exc:
                self._abandon_start(exc)
                raise
        self._hotplug = Hotplug(self._qmp, self.plan)
        log.info("QEMU %s runs as pid %d: %s with %s (%s)", self._version, self._child.pid,
                 self.plan.machine, self.plan.accel, self.plan.accel_why)

    def stop(self, timeout_s=10):
        self._stopped = True
        if self._child is not None:
            watch = green.Stopwatch(timeout_s)
            if self._child.returncode is None:
                self._ask_to_quit(min(_QUIT_S, timeout_s / 2))
            self._qmp.close("the VM is being stopped")
            self._child.kill()
            if self._child.wait(watch.left(least=1.0)) is None:
                raise DeadlineExceeded(f"QEMU (pid {self._child.pid}) still exists {timeout_s:g} s after "
                                       "it was told to stop, and killed")
            self._exited.wait(_COMMAND_S)
            self.console.close()
            self._stderr.close()
        while self._entries:
            self._entries.pop().release()
        if self._vsock is not None:
            self._vsock.stop()

    def wait(self, timeout_s=None):
        self._exited.wait(timeout_s)
        return self._vm_exit

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
        if self._child is None:
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
        vmm = [self._child.pid] if self._child is not None and self._child.returncode is None else []
        return vmm + (self._vsock.pids() if self._vsock is not None else [])

    def vcpu_threads(self):
        if self._hotplug is None or self._exited.is_set():
            return {}
        return {cpu["cpu-index"]: cpu["thread-id"] for cpu in self._execute("query-cpus-fast")}

    def console_tail(self):
        return self.console.text() if self.console is not None else ""

    def describe(self):
        facts = {"name": self.name, "version": self._version, "qmp": self._qmp_path()}
        if self._child is not None:
            facts.update(pid=self._child.pid, start_time=self._child.start_time)
        if self.plan is not None:
            facts.update(machine=self.plan.machine, accel=self.plan.accel, accel_why=self.plan.accel_why)
        if self._vsock is not None:
            facts.update(vsock=self._vsock.backend, agent=self.agent_address())
        return facts

    def queue(self):
        """Who uses the monitor and who waits for it: a katashim.drivers.channel.Queue, or None."""
        return self._qmp.channel.queue() if self._qmp is not None else None

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
        if self._child is not None:
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
        if self._child is None:
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
        if self._child is None:
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
        if self._child is None:
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
        if self._child is not None:
            self._check_state(running=True)
            if not self.plan.hotplug:
                raise self.unsupported(f"plugging devices on the machine type {self.plan.machine}")
        scsi = isinstance(device, base.Disk) and self._is_scsi(device)
        place = {} if scsi else self._slots.at_boot() if self._child is None else self._slots.hotplug()
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
                if not self._qmp.channel.closed:    # closed for good: QEMU has ended, the device with it
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

    # -- the process ------------------------------------------------------------------------------
    def _spawn(self):
        path = self._qmp_path()
        self._entries.append(self._undo.push("file", path=path))
        fds = self._open_descriptors(path)
        try:
            argv = qemu_cmdline.command_line(
                self.plan, self.sandbox_id, qmp_fd=fds.listener.fileno(), console_fd=fds.console_theirs,
                devices=[argument for arguments in self._cold for argument in arguments])
            log.debug("starting %s", argv)
            entry = self._undo.push("process", pid=0, start_time=0, name="QEMU")
            try:
                self._child = child.spawn(
                    argv, name="QEMU", cwd="/", netns=self._netns, stderr=fds.stderr_theirs,
                    pass_fds=[fds.listener.fileno(), fds.console_theirs, *self._pass_fds])
            except BaseException:
                entry.forget()
                os.close(fds.console)
                os.close(fds.stderr)
                raise
            entry.update(pid=self._child.pid, start_time=self._child.start_time)
        finally:
            fds.listener.close()
            os.close(fds.console_theirs)
            os.close(fds.stderr_theirs)
        self.console = Tail(f"console of sandbox {self.sandbox_id}", fds.console, mark=_AGENT_MARK,
                            log_lines=self.plan.debug)
        self._stderr = Tail("stderr of QEMU", fds.stderr, size=_STDERR_BYTES, log_lines=True)
        self._qmp = qmp.Qmp(f"QEMU of sandbox {self.sandbox_id}", lambda: qmp.dial(path))
        green.spawn(f"watch over QEMU {self._child.pid}", self._watch, entry)

    def _open_descriptors(self, path):
        with contextlib.ExitStack() as opened:
            try:
                listener = opened.enter_context(qmp.listen(path))
                ours, theirs = map(opened.enter_context, socket.socketpair())
                stderr, stderr_theirs = os.pipe()
            except OSError as exc:
                raise HypervisorError(f"cannot make pipes for QEMU: {exc.strerror}") from exc
            opened.pop_all()
        return _Descriptors(listener, ours.detach(), theirs.detach(), stderr, stderr_theirs)

    def _qmp_path(self):
        return f"{self.run_dir}/qmp.sock"

    def _watch(self, entry):
        """Wait for the end of QEMU, whatever its cause, and tell everybody."""
        with self._qmp.subscribe("SHUTDOWN") as events:
            self._child.exited.wait()
            reason = self._last_event(events)
        self._stderr.wait_end(1.0)
        status = self._child.returncode
        ending = f"{self._child.ending()} after {reason}" if reason else self._child.ending()
        words = ": ".join(word for word in (ending, self._stderr.last_line()) if word)
        self._vm_exit = base.VmExit(status if status >= 0 else 128 - status, words)
        entry.forget()
        self._qmp.close(f"QEMU {self._child.ending()}")
        self._exited.set()
        log.info("QEMU (pid %d) %s", self._child.pid, words)

    def _last_event(self, events):
        """QEMU's own reason for its end, which it tells just before."""
        if self._child.returncode != 0:
            return ""
        try:
            event = events.wait(_LAST_EVENT_S)
        except KatashimError:
            return ""
        return event.data["reason"]

    def _abandon_start(self, exc):
        """Kill what a failed start left and attach the evidence.

        :raises HypervisorError: QEMU had ended by itself; its own words say more than `exc`.
        """
        # A QEMU that hangs up is about to exit; one that is merely late is not.
        ended_by_itself = self._child.wait(0 if isinstance(exc, DeadlineExceeded) else 1.0) is not None
        self._qmp.close("the start failed")
        self._child.kill()
        self._exited.wait(_COMMAND_S)
        error = exc
        if ended_by_itself:
            error = HypervisorError(f"QEMU ended while it was starting: {self._vm_exit.reason}")
        error.attach("QEMU's stderr", self._stderr.text())
        error.attach("the guest's console", self.console_tail())
        if error is not exc:
            raise error from exc

    def _ask_to_quit(self, timeout_s):
        watch = green.Stopwatch(timeout_s)
        try:
            self._qmp.execute("quit", timeout_s=timeout_s)
        except KatashimError as exc:
            log.info("QEMU (pid %d) does not take `quit`, so it is killed: %s", self._child.pid, exc)
            return
        self._child.wait(watch.left())

    def _execute(self, command):
        self._check_state(running=True)
        return self._qmp.execute(command, timeout_s=_COMMAND_S)

    def _has_ended(self):
        return self._stopped or self._exited.is_set()

    def _check_state(self, running):
        """:raises FailedPrecondition: the VM is not in the state that a verb needs."""
        if self._has_ended():
            raise FailedPrecondition(f"the VM of sandbox {self.sandbox_id} has ended")
        if running and self._hotplug is None:
            raise FailedPrecondition(f"the VM of sandbox {self.sandbox_id} does not run yet")
        if not running and (self.plan is None or self._child is not None):
            raise FailedPrecondition(f"the VM of sandbox {self.sandbox_id} is not prepared, or was started")


def _version_text(reply):
    version = reply["qemu"]
    return f"{version['major']}.{version['minor']}.{version['micro']}"
