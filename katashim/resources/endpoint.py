"""One link of the pod's network namespace, joined to a tap in front of the guest's network card.

The model is Kata's ``tcfilter``: an ingress qdisc on both, and a filter on each that redirects every
packet out of the other. The guest's card gets the link's MAC address and later its IP addresses, so to
the world outside nothing has changed; the namespace's own stack sees no packet of that link any more.

    bridge -- veth == eth0 [ingress -> tap0_kata]  [ingress -> eth0] tap0_kata == virtio-net in the guest

Called by katashim.resources.network, which knows the namespace and chooses the links.
"""

import errno
import os

from katashim.drivers.base import Nic
from katashim.errors import FailedPrecondition, Unsupported
from katashim.green import in_thread
from katashim.resources import netlink

# Kinds of links that carry Ethernet frames of an address of their own; "" is a device with a driver,
# such as a subfunction of a network card.
_JOINED_KINDS = ("", "veth", "macvlan", "ipvlan", "vlan")
_VHOST_NET = "/dev/vhost-net"
_ARPHRD_ETHER = 1


def check_joinable(link, bus_info):
    """Check that a link can be joined to a tap.

    :param link: :class:`~katashim.resources.netlink.Link`.
    :param bus_info: where its device sits, of :meth:`Rtnetlink.bus_info`. A PCI address
        ("0000:3b:00.0") means a whole physical card, which Kata passes through instead.
    :raises Unsupported: names the link and its kind.
    """
    if link.kind not in _JOINED_KINDS or link.type != _ARPHRD_ETHER:
        kind = link.kind or f"hardware type {link.type}"
        raise Unsupported(f"the pod's network link {link.name} is of the kind {kind}, which cannot be "
                          "joined to a VM; veth, macvlan, ipvlan and vlan links can")
    if len(bus_info.split(":")) == 3:
        raise Unsupported(f"the pod's network link {link.name} is a physical network card ({bus_info}); "
                          "passing one through to the VM is not supported yet")


class Endpoint:
    """A link and its tap.

    :param netns: path of the namespace. :param inode: its inode number, for the journal: what `delete`
        finds at that path later may be a stranger's.
    :param link: the :class:`~katashim.resources.netlink.Link`; it must have no ingress qdisc.
    :param index: number of the endpoint, in the tap's name and the card's id.
    :param queues: queue pairs of the card.
    :param with_vhost: whether to open /dev/vhost-net, where there is one.

    :ivar nic: the :class:`~katashim.drivers.base.Nic` for the driver, None until :meth:`attach`.
    """

    def __init__(self, netns, inode, link, index, *, queues=1, with_vhost=True):
        self.link, self.nic = link, None
        self.tap_name = tap_name(index)
        self._netns, self._inode, self._index = netns, inode, index
        self._queues, self._with_vhost = queues, with_vhost
        self._fds, self._vhost_fds = [], []

    def attach(self, undo):
        """Make the tap and the redirects; returns :attr:`nic`. The caller unwinds `undo` on an error.

        The tap's own ingress qdisc needs no entry on the stack: it goes with the tap.

        :raises NetlinkError, FailedPrecondition, AlreadyExists: what the kernel refused.
        """
        # Descriptors are closed last, when the link is gone: to close the last one of a living tap
        # keeps the caller waiting for the kernel for 10 ms and more.
        undo.call(f"descriptors of {self.tap_name}", self._close)
        undo.push("link", netns=self._netns, name=self.tap_name, inode=self._inode)
        undo.push("ingress", netns=self._netns, dev=self.link.name, inode=self._inode)
        in_thread(self._join, what=f"joining {self.link.name} of {self._netns} to {self.tap_name}")
        self.nic = Nic(f"net{self._index}", self.tap_name, self.link.mac, tuple(self._fds),
                       tuple(self._vhost_fds), self.link.mtu)
        return self.nic

    def _join(self):
        self._fds.extend(netlink.open_tap(self._netns, self.tap_name, self._queues))
        if self._with_vhost:
            open_vhost_net(self._queues, self._vhost_fds)
        with netlink.Rtnetlink(self._netns, self._inode) as kernel:
            kernel.silence_ipv6(self.tap_name)
            kernel.set_link(self.tap_name, mtu=self.link.mtu)
            kernel.set_link(self.tap_name, up=True)
            tap = kernel.link(self.tap_name)
            for link, other in ((self.link, tap), (tap, self.link)):
                kernel.add_ingress(link)
                kernel.redirect(link, other)

    def _close(self):
        netlink.close_all(self._fds)
        netlink.close_all(self._vhost_fds)


def tap_name(index):
    """Kata's name for the tap of the endpoint `index`."""
    return f"tap{index}_kata"


def open_vhost_net(count, fds):
    """Open the kernel's packet mover `count` times, appending to `fds`; nothing where it does not exist.

    :raises FailedPrecondition: it exists and cannot be opened; says why and which setting avoids it.
    """
    try:
        for _ in range(count):
            fds.append(os.open(_VHOST_NET, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        # A device node without its module is as good as none.
        if exc.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            netlink.close_all(fds)
            return
        raise FailedPrecondition(
            f"cannot open {_VHOST_NET}: {exc.strerror}; disable_vhost_net = true does without it") from exc
