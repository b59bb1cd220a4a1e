"""Plugging and unplugging while a QEMU guest runs: disks, network cards, vCPUs, memory.

Every step can be repeated: a command whose reply was lost may have taken effect, so a refused one is
checked against what QEMU really has before it counts as failed, and a plug that is tried again finds
its own earlier half. A refusal rolls back what came before it. Unplugging is done when the guest has
let go, which QEMU tells by an event.

Talks QMP (docs/interop/qemu-qmp-ref of QEMU). Used by katashim.drivers.qemu alone.
"""

import logging

from gevent.lock import RLock

from katashim import green
from katashim.drivers import qemu_cmdline, qemu_devices
from katashim.errors import DeadlineExceeded, HypervisorError, InvalidArgument, QmpError

log = logging.getLogger(__name__)

PLUG_S = 20             # for all commands of one plug; QEMU may have to open a file on a slow disk
UNPLUG_S = 10           # for the guest to let go, as Kata has it
_POLL_S = 1.0           # an event can be lost with a broken connection, so look now and then
_DIMM_SUFFIX = "-memory"


class Hotplug:
    """See the module's text.

    :param qmp: the running VM's katashim.drivers.qmp.Qmp.
    :param plan: its katashim.drivers.qemu_plan.Plan.
    :ivar memory_block_mb: the guest's memory block size; memory comes in multiples of it. The agent
        reports it (GetGuestDetails); 128 MiB is x86's usual one.
    """

    def __init__(self, qmp, plan):
        self.memory_block_mb = 128
        self._qmp, self._plan = qmp, plan
        self._asked = set()             # device ids whose unplugging was requested
        self._resizing = RLock()        # one resize at a time: each reads the present size first

    # -- disks and cards --------------------------------------------------------------------------
    def add_disk(self, node, device):
        """Plug a disk. :param node: ``blockdev-add``'s arguments. :param device: ``device_add``'s."""
        with self._qmp.hold(f"plugging {device['id']}", PLUG_S):
            self._do_or_find("blockdev-add", node, lambda: self._has_node(node))
            try:
                self._do_or_find("device_add", device, lambda: self.has_device(device["id"]))
            except QmpError:
                self._undo("blockdev-del", {"node-name": node["node-name"]})
                raise

    def remove_disk(self, node_name, device_id, timeout_s=UNPLUG_S):
        """Unplug a disk, wait for the guest, close the file."""
        self.unplug(device_id, timeout_s)
        try:
            self._qmp.execute("blockdev-del", **{"node-name": node_name})
        except QmpError:
            if self._has_node({"node-name": node_name}):
                raise

    def add_nic(self, netdev, device, fds, vhost_fds):
        """Plug a network card.

        :param netdev: ``netdev_add``'s arguments, with the names below in ``fds`` and ``vhostfds``.
        :param fds: ``{name: fd}`` of the tap's queues. :param vhost_fds: likewise of vhost-net.
        """
        with self._qmp.hold(f"plugging {device['id']}", PLUG_S):
            self._undo("netdev_del", {"id": netdev["id"]})      # of an attempt whose replies were lost
            given = []
            try:
                for name, fd in {**fds, **vhost_fds}.items():
                    self._qmp.execute("getfd", send_fds=[fd], fdname=name)
                    given.append(name)
                self._qmp.execute("netdev_add", **netdev)
            except QmpError:
                for name in given:
                    self._undo("closefd", {"fdname": name})
                raise
            try:
                self._qmp.execute("device_add", **device)
            except QmpError:
                self._undo("netdev_del", {"id": netdev["id"]})
                raise

    def remove_nic(self, netdev_id, device_id, timeout_s=UNPLUG_S):
        """Unplug a network card, wait for the guest, close its tap."""
        self.unplug(device_id, timeout_s)
        self._undo("netdev_del", {"id": netdev_id})

    def unplug(self, device_id, timeout_s):
        """Ask the guest to let go of a device and wait until it has. One that is gone is no error.

        :raises DeadlineExceeded: the guest holds on to it; it may be tried again.
        :raises HypervisorError: the guest refuses.
        """
        path = f"/machine/peripheral/{device_id}"
        watch = green.Stopwatch(timeout_s)
        # Also the events of its parts: a vCPU's own end is told by its local APIC only.
        with self._qmp.subscribe(
                "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR",
                match=lambda data: (data["path"] + "/").startswith(path + "/")) as events:
            if not self._ask_for(device_id):
                return
            while True:
                event = self._next_event(events, min(_POLL_S, watch.left()))
                if not self.has_device(device_id):
                    self._asked.discard(device_id)
                    return
                if event is not None and event.name == "DEVICE_UNPLUG_GUEST_ERROR":
                    raise HypervisorError(f"the guest refuses to let go of {device_id}")
                if not watch.left():
                    raise DeadlineExceeded(f"the guest has not let go of {device_id} in {timeout_s:g} s")

    def has_device(self, device_id):
        """Whether QEMU has a device of this id."""
        return any(entry["name"] == device_id
                   for entry in self._qmp.execute("qom-list", path="/machine/peripheral"))

    def _ask_for(self, device_id):
        """Request the unplugging; False when there is no such device."""
        try:
            self._qmp.execute("device_del", id=device_id)
        except QmpError:
            if not self.has_device(device_id):
                self._asked.discard(device_id)
                return False
            # QEMU refuses a second request while the guest thinks about the first.
            if device_id not in self._asked:
                raise
        self._asked.add(device_id)
        return True

    @staticmethod
    def _next_event(events, timeout_s):
        try:
            return events.wait(timeout_s)
        except DeadlineExceeded:
            return None

    # -- vCPUs ------------------------------------------------------------------------------------
    def resize_vcpus(self, count):
        """Plug or unplug vCPUs until there are `count`; those present at boot stay. Returns how many.

        Under TCG none is ever unplugged: QEMU (7.2, at least) corrupts its heap when one is and the next
        is plugged, and dies. There a guest keeps its vCPUs.
        """
        if count < 1:
            raise InvalidArgument(f"a VM cannot have {count} vCPUs")
        with self._alone("vCPUs"):
            count = min(count, self._plan.max_vcpus)
            cpus = sorted(self._qmp.execute("query-hotpluggable-cpus"),
                          key=lambda cpu: cpu["props"]["socket-id"])
            present = [cpu for cpu in cpus if "qom-path" in cpu]
            for cpu in [cpu for cpu in cpus if "qom-path" not in cpu][:max(0, count - len(present))]:
                self._qmp.execute("device_add", driver=cpu["type"], id=_vcpu_id(cpu), **cpu["props"])
            if self._plan.accel != "tcg":
                for cpu in present[count:][::-1]:
                    if cpu["qom-path"].endswith("/" + _vcpu_id(cpu)):       # not of those present at boot
                        self.unplug(_vcpu_id(cpu), UNPLUG_S)
            return sum("qom-path" in cpu for cpu in self._qmp.execute("query-hotpluggable-cpus"))

    # -- memory -----------------------------------------------------------------------------------
    def resize_memory(self, size_mb):
        """Plug one DIMM so that the guest has at least `size_mb`; it never shrinks. Returns MiB in force.

        What the guest gets is a multiple of its memory block: QEMU takes other DIMMs too, but the
        guest never brings them online.

        :raises InvalidArgument: more than the maximum that the VM was started with.
        """
        plan = self._plan
        if size_mb > plan.max_memory_mb:
            raise InvalidArgument(f"{size_mb} MiB are more than the VM's maximum, {plan.max_memory_mb} MiB")
        with self._alone("memory"):
            dimms = self._qmp.execute("query-memory-devices")
            present = plan.memory_mb + sum(dimm["data"]["size"] for dimm in dimms) // (1 << 20)
            block = self.memory_block_mb
            room = (plan.max_memory_mb - present) // block * block
            grow = min(-(-(size_mb - present) // block) * block, room)
            if grow <= 0:
                return present
            self._add_dimm(f"dimm{len(dimms)}", grow)
            return present + grow

    def _add_dimm(self, dimm_id, size_mb):
        backend = qemu_cmdline.memory_backend(self._plan, dimm_id + _DIMM_SUFFIX, size_mb)
        with self._qmp.hold(f"plugging {size_mb} MiB", PLUG_S):
            self._undo("object-del", {"id": backend["id"]})     # of an attempt whose replies were lost
            self._qmp.execute("object-add", **backend)
            try:
                self._qmp.execute("device_add", driver="pc-dimm", id=dimm_id, memdev=backend["id"])
            except QmpError:
                self._undo("object-del", {"id": backend["id"]})
                raise

    def _alone(self, what):
        return _Alone(self._resizing, f"another resize of the VM's {what} to end")

    # -- steps that may be repeated ---------------------------------------------------------------
    def _do_or_find(self, command, arguments, is_there):
        """Run a command; a refusal is fine when its effect is there already."""
        try:
            self._qmp.execute(command, **arguments)
        except QmpError:
            if not is_there():
                raise
            log.info("%s of %s had taken effect before", command, arguments.get("id") or arguments["node-name"])

    def _has_node(self, node):
        for entry in self._qmp.execute("query-named-block-nodes", flat=True):
            if entry.get("node-name") == node["node-name"]:
                return node.get("filename", entry["file"]) == entry["file"]
        return False

    def _undo(self, command, arguments):
        """Take back a step that may or may not have happened."""
        try:
            self._qmp.execute(command, **arguments)
        except QmpError as exc:
            log.debug("nothing to take back: %s", exc)


class _Alone:
    """An RLock with a deadline."""

    def __init__(self, lock, what):
        self._lock, self._what = lock, what

    def __enter__(self):
        with green.deadline(PLUG_S + UNPLUG_S, self._what):
            self._lock.acquire()

    def __exit__(self, *error):
        self._lock.release()


def _vcpu_id(cpu):
    return f"vcpu{cpu['props']['socket-id']}"


def nic_fd_names(netdev_id, nic):
    """``({name: fd}, {name: vhost fd})`` under which a card's descriptors are handed to QEMU."""
    return ({f"{netdev_id}-queue{number}": fd for number, fd in enumerate(nic.fds)},
            {f"{netdev_id}-vhost{number}": fd for number, fd in enumerate(nic.vhost_fds)})


def tap_backend(netdev_id, names):
    """``netdev_add``'s arguments for descriptors handed over under `names`; they are joined by colons."""
    fds, vhost_fds = names
    return qemu_devices.tap_backend(netdev_id, fds, vhost_fds)
