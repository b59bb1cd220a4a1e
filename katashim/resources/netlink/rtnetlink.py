"""What katashim asks of the kernel's network configuration, one method for each wish.

:class:`Rtnetlink` is a connection to one network namespace; :func:`delete_link` and
:func:`delete_ingress` are the releases behind the undo kinds ``link`` and ``ingress``, which succeed
when there is nothing to release. Called by katashim.resources.endpoint and network. Plain.
"""

import array
import errno
import fcntl
import socket
import struct

from katashim.errors import NotFound
from katashim.resources.netlink import codec, records, tc
from katashim.resources.netlink.connection import Connection, NetlinkError

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 17, 18, 19
_RTM_GETADDR, _RTM_GETROUTE, _RTM_GETNEIGH = 22, 26, 30
_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_GETQDISC = 36, 37, 38
_RTM_NEWTFILTER, _RTM_GETTFILTER = 44, 46

_VETH_INFO_PEER = 1
_IFLA_INET6_ADDR_GEN_MODE, _ADDR_GEN_NONE = 8, 1
_NEW = codec.NLM_F_CREATE | codec.NLM_F_EXCL

_SIOCETHTOOL, _ETHTOOL_GDRVINFO = 0x8946, 3
_IFREQ_POINTER = struct.Struct("16sP16x")
_DRVINFO = struct.Struct("=I32s32s32s32s32s12sIIIII")


class Rtnetlink(Connection):
    """A namespace's network configuration; see :class:`~.connection.Connection` for the arguments.

    Every method raises :class:`~.connection.NetlinkError` when the kernel refuses, and its text names
    the operation and the object.
    """

    # -- tables -------------------------------------------------------------------------------------

    def links(self):
        """All links, by index: list of :class:`~.records.Link`."""
        payload = records.IFINFO.pack(0, 0, 0, 0, 0)
        return [records.link(entry) for entry in self.dump("listing links", _RTM_GETLINK, payload)]

    def link(self, name):
        """The link called `name`, or None."""
        payload = records.IFINFO.pack(0, 0, 0, 0, 0) + codec.text(records.IFLA_IFNAME, name)
        try:
            reply, = self.request(f"looking up the link {name}", _RTM_GETLINK, payload)
        except NetlinkError as exc:
            if exc.errno == errno.ENODEV:
                return None
            raise
        return records.link(reply)

    def addresses(self):
        """All IP addresses: list of :class:`~.records.Address`."""
        payload = records.IFADDR.pack(0, 0, 0, 0, 0)
        found = map(records.address, self.dump("listing addresses", _RTM_GETADDR, payload))
        return [address for address in found if address is not None]

    def routes(self):
        """All IP routes of all tables: list of :class:`~.records.Route`."""
        payload = records.RTMSG.pack(0, 0, 0, 0, 0, 0, 0, 0, 0)
        found = map(records.route, self.dump("listing routes", _RTM_GETROUTE, payload))
        return [route for route in found if route is not None]

    def neighbours(self):
        """All entries of the ARP and neighbour discovery tables: list of :class:`~.records.Neighbour`."""
        payload = records.NDMSG.pack(0, 0, 0, 0, 0)
        found = map(records.neighbour, self.dump("listing neighbours", _RTM_GETNEIGH, payload))
        return [neighbour for neighbour in found if neighbour is not None]

    def bus_info(self, name):
        """Where a link's device sits, in its driver's words ("0000:3b:00.0", "virtio0"), "" = nowhere.

        By the ethtool request GDRVINFO. :raises NotFound: there is no such link.
        """
        answer = array.array("B", _DRVINFO.pack(_ETHTOOL_GDRVINFO, *[b""] * 6, *[0] * 5))
        request = _IFREQ_POINTER.pack(name.encode(), answer.buffer_info()[0])
        try:
            fcntl.ioctl(self.fileno(), _SIOCETHTOOL, request)
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP:
                return ""
            if exc.errno == errno.ENODEV:
                raise NotFound(f"there is no link {name} in {self.where}") from exc
            raise
        return codec.as_text(_DRVINFO.unpack(answer)[4])

    # -- links --------------------------------------------------------------------------------------

    def add_link(self, name, kind, *, parent=0, data=b"", mac=""):
        """Make a link.

        :param kind: "macvlan", "bridge", ... :param parent: index of the link it sits on, 0 = none.
        :param data: attributes of that kind, bytes. :param mac: "" = the kernel makes one up.
        """
        payload = records.IFINFO.pack(0, 0, 0, 0, 0) + codec.text(records.IFLA_IFNAME, name)
        if parent:
            payload += codec.u32(records.IFLA_LINK, parent)
        if mac:
            payload += codec.attribute(records.IFLA_ADDRESS, records.mac_bytes(mac))
        payload += codec.nested(
            records.IFLA_LINKINFO, codec.text(records.IFLA_INFO_KIND, kind),
            *([codec.nested(records.IFLA_INFO_DATA, data)] if data else []))
        self.request(f"adding the {kind} link {name}", _RTM_NEWLINK, payload, _NEW)

    def add_veth(self, name, peer, peer_netns_fd=None):
        """Make the pair `name` (here) and `peer` (here, or in the namespace open as `peer_netns_fd`)."""
        other = records.IFINFO.pack(0, 0, 0, 0, 0) + codec.text(records.IFLA_IFNAME, peer)
        if peer_netns_fd is not None:
            other += codec.u32(records.IFLA_NET_NS_FD, peer_netns_fd)
        self.add_link(name, "veth", data=codec.attribute(_VETH_INFO_PEER, other))

    def delete_link(self, name):
        """Delete the link `name`."""
        payload = records.IFINFO.pack(0, 0, 0, 0, 0) + codec.text(records.IFLA_IFNAME, name)
        self.request(f"deleting the link {name}", _RTM_DELLINK, payload)

    def set_link(self, name, *, up=None, mtu=None, mac=None):
        """Change a link: up or down, its MTU in bytes, its MAC. None leaves as it is."""
        flags, mask = (0, 0) if up is None else (records.IFF_UP if up else 0, records.IFF_UP)
        payload = records.IFINFO.pack(0, 0, 0, flags, mask) + codec.text(records.IFLA_IFNAME, name)
        if mtu is not None:
            payload += codec.u32(records.IFLA_MTU, mtu)
        if mac is not None:
            payload += codec.attribute(records.IFLA_ADDRESS, records.mac_bytes(mac))
        wishes = (("up" if up else "down", up), (f"mtu {mtu}", mtu), (f"mac {mac}", mac))
        asked = ", ".join(wish for wish, value in wishes if value is not None)
        self.request(f"setting {asked} on the link {name}", _RTM_SETLINK, payload)

    def silence_ipv6(self, name):
        """Keep the kernel from giving the link `name` an IPv6 address of its own when it comes up, and
        from soliciting routers and neighbours through it. Nothing to do where there is no IPv6."""
        mode = codec.attribute(_IFLA_INET6_ADDR_GEN_MODE, bytes([_ADDR_GEN_NONE]))
        payload = (records.IFINFO.pack(0, 0, 0, 0, 0) + codec.text(records.IFLA_IFNAME, name)
                   + codec.nested(records.IFLA_AF_SPEC, codec.nested(socket.AF_INET6, mode)))
        try:
            self.request(f"silencing IPv6 on the link {name}", _RTM_SETLINK, payload)
        except NetlinkError as exc:
            if exc.errno not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                raise

    # -- traffic control ----------------------------------------------------------------------------

    def qdiscs(self, index=None):
        """The qdiscs of the link `index`, or of all links: list of :class:`~.tc.Qdisc`."""
        found = map(tc.qdisc, self.dump("listing qdiscs", _RTM_GETQDISC, tc.all_qdiscs()))
        return [qdisc for qdisc in found if index in (None, qdisc.index)]

    def add_ingress(self, link):
        """Add the ingress qdisc to a :class:`~.records.Link`; it must have none, nor a clsact."""
        self.request(f"adding the ingress qdisc of {link.name}", _RTM_NEWQDISC, tc.ingress(link.index), _NEW)

    def delete_ingress(self, link):
        """Delete the ingress qdisc of a link and all of its filters."""
        self.request(f"deleting the ingress qdisc of {link.name}", _RTM_DELQDISC, tc.ingress(link.index))

    def redirect(self, link, target):
        """Send all that comes in at one link out of another (both :class:`~.records.Link`)."""
        self.request(f"redirecting {link.name} to {target.name}", _RTM_NEWTFILTER,
                     tc.redirect_all(link.index, target.index), _NEW)

    def redirects(self, link):
        """The redirects on a link's ingress: list of :class:`~.tc.Redirect`."""
        entries = self.dump(f"listing filters of {link.name}", _RTM_GETTFILTER, tc.ingress_filters(link.index))
        return [redirect for entry in entries for redirect in tc.redirects(entry)]


def delete_link(netns, name, inode=None):
    """Delete a link for good; no error when the link, or its namespace, is gone.

    :param netns: path of the namespace. :param inode: the inode number that it must have; with another
        one it is a stranger's that took over the path, and is left alone. None trusts the path.
    :raises NetlinkError: the kernel refused.
    """
    _release(netns, inode, (errno.ENODEV,), lambda kernel: kernel.delete_link(name))


def delete_ingress(netns, dev, inode=None):
    """Delete the ingress qdisc of the link `dev`; no error when there is none.

    A clsact qdisc, which sits in the same place, is not ours and stays. See :func:`delete_link`.
    """
    def delete(kernel):
        link = kernel.link(dev)
        if link is not None:
            kernel.delete_ingress(link)
    # EINVAL is what the kernel says when a qdisc of another kind, or none any more, sits there.
    _release(netns, inode, (errno.ENODEV, errno.ENOENT, errno.EINVAL), delete)


def _release(netns, inode, gone, action):
    try:
        kernel = Rtnetlink(netns, inode)
    except NotFound:
        return
    with kernel:
        try:
            action(kernel)
        except NetlinkError as exc:
            if exc.errno not in gone:
                raise
