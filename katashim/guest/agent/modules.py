"""Kernel modules for the devices that are there. Nothing else loads them: the guest has no udev.

Drivers of virtio devices are inserted directly, in the order that the image builder wrote down
(``virtio.order``: lines of a virtio device id and module files). Everything else goes through
/sbin/modprobe, which the kernel itself calls too, for filesystems for example.
Called by boot.py, main.py, uevents.py, sandbox.py.
"""

import os

from katashim.guest.agent import linux, log

# Ids of linux/virtio_ids.h.
VIRTIO_CONSOLE, VIRTIO_VSOCK = 3, 19
_BUS = "/sys/bus/virtio/devices"

_order = None


def directory():
    """Where this kernel's modules are."""
    return f"/lib/modules/{os.uname().release}"


def load_virtio(device_id):
    """Insert the driver of virtio devices of the kind `device_id`; none where it is built in or unknown."""
    for name in _virtio_order().pop(device_id, ()):
        try:
            linux.load_module(f"{directory()}/{name}")
        except OSError as exc:
            log.warning("modules", f"{name}: {exc}")


def load_present():
    """Insert the drivers of all virtio devices that the guest has now."""
    if not os.path.isdir(_BUS):
        return
    for device in sorted(os.listdir(_BUS)):
        with open(f"{_BUS}/{device}/device") as file:
            load_virtio(int(file.read(), 16))


def load_alias(alias):
    """Load what a device's MODALIAS asks for; returns whether modprobe knew something."""
    if alias.startswith("virtio:d"):
        load_virtio(int(alias[8:16], 16))
        return True
    from katashim.guest.agent import programs
    return programs.run(["/sbin/modprobe", "-q", "-b", alias], timeout_s=20).status == 0


def _virtio_order():
    global _order
    if _order is None:
        try:
            with open(f"{directory()}/virtio.order") as file:
                rows = [line.split() for line in file]
        except FileNotFoundError:
            rows = []       # all built in
        _order = {int(row[0]): row[1:] for row in rows}
    return _order
