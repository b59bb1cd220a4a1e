"""A hypervisor of which only the disks matter: it gives PCI addresses as QEMU does, and keeps the books."""

from katashim.drivers import base


class DiskVm(base.Hypervisor):
    """:ivar disks: {id: Disk}, those plugged in now. :ivar seen: every Disk that ever was, in order."""

    name = "disks-only"

    def __init__(self, capabilities=(base.BLOCK_DEVICE, base.BLOCK_HOTPLUG)):
        self.capabilities = frozenset(capabilities)
        self.disks, self.seen = {}, []

    def add_device(self, device):
        if not isinstance(device, base.Disk) or not self.capabilities:
            raise self.unsupported(type(device).__name__)
        assert device.id not in self.disks, "an id given twice"
        attached = device._replace(agent_type="blk", guest_address=f"02/{len(self.seen) + 1:02x}")
        self.disks[device.id] = attached
        self.seen.append(attached)
        return attached

    def remove_device(self, device):
        self.disks.pop(device.id, None)

    def _no(self, *args):
        raise self.unsupported("anything but disks")

    prepare = start = stop = wait = pause = resume = agent_address = pids = vcpu_threads = _no
    console_tail = describe = _no
