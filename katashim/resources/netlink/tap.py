"""Tap devices: the host's end of a guest's network card (Documentation/networking/tuntap.rst).

A tap opened here is *not* persistent: it lives as long as one of its descriptors is open anywhere, so
it cannot outlive the shim and the VMM, not even when both are killed. Called by
katashim.resources.endpoint. Plain.
"""

import errno
import fcntl
import os
import struct

from katashim.errors import AlreadyExists, FailedPrecondition
from katashim.resources import netns as namespaces

_DEVICE = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
_IFREQ = struct.Struct("16sH22x")
_NAME_BYTES = 15


def open_tap(netns, name, queues=1):
    """Make the tap `name` in a network namespace.

    Frames come without packet information and with a virtio-net header (10 bytes until the VMM sets
    another size), so that offloads pass between guest and host.

    :param netns: path of the namespace, or None for the present one.
    :param name: at most 15 characters; must be free.
    :param queues: how many queue pairs, each of which gets a descriptor.
    :returns: list of descriptors, close-on-exec, in blocking mode.
    :raises AlreadyExists: another process has a tap of that name open.
    :raises FailedPrecondition: the kernel has no tap driver, or refuses; says why.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    request = _IFREQ.pack(name.encode()[:_NAME_BYTES], flags)
    fds = []
    try:
        # A tap belongs to the namespace in which its descriptor was opened.
        with namespaces.entered(netns):
            for _ in range(queues):
                fds.append(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
        for fd in fds:
            fcntl.ioctl(fd, _TUNSETIFF, request)
    except OSError as exc:
        close_all(fds)
        if exc.errno == errno.EBUSY:
            raise AlreadyExists(f"the tap {name} is in use already") from exc
        if exc.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise FailedPrecondition(f"this host has no {_DEVICE}: load its driver (modprobe tun)") from exc
        raise FailedPrecondition(f"cannot make the tap {name}: {exc.strerror}") from exc
    return fds


def close_all(fds):
    """Close descriptors and empty the list, so that doing it again does nothing."""
    while fds:
        os.close(fds.pop())
