"""What the kernel tells about links, addresses, routes and neighbours, as plain records.

Decoders of RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE and RTM_NEWNEIGH (rtnetlink(7), linux/if_link.h,
linux/if_addr.h, linux/rtnetlink.h, linux/neighbour.h). Names of fields are the kernel's.
"""

import socket
import struct
from typing import NamedTuple

from katashim.resources.netlink import codec

IFF_UP, IFF_LOOPBACK, IFF_NOARP = 0x1, 0x8, 0x80
RTPROT_KERNEL = 2
RT_TABLE_MAIN = 254
RTN_UNICAST = 1
RTNH_F_ONLINK = 4
RTM_F_CLONED = 0x200
NUD_PERMANENT = 0x80

IFINFO = struct.Struct("=BxHiII")           # family, ARPHRD type, index, flags, mask of flags to change
IFADDR = struct.Struct("=BBBBI")            # family, prefix length, flags, scope, link index
RTMSG = struct.Struct("=BBBBBBBBI")         # family, dst len, src len, tos, table, proto, scope, type, flags
NDMSG = struct.Struct("=BxxxiHBB")          # family, link index, state, flags, type
_U16 = struct.Struct("=H")
_RTNEXTHOP = struct.Struct("=HBBi")         # length, flags, weight - 1, link index

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER = 1, 3, 4, 5, 10
IFLA_LINKINFO, IFLA_AF_SPEC, IFLA_NET_NS_FD = 18, 26, 28
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY = 1, 2, 4, 5, 6
_RTA_PREFSRC, _RTA_METRICS, _RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA = 7, 8, 9, 15, 18
_RTAX_MTU = 2
_NDA_DST, _NDA_LLADDR = 1, 2

_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Link(NamedTuple):
    """A network interface."""

    index: int
    name: str
    kind: str = ""          # "veth", "macvlan", "tun", ...; "" for a device with a driver of its own
    mac: str = ""           # "02:00:00:00:00:01"
    mtu: int = 0
    flags: int = 0          # IFF_*
    type: int = 1           # ARPHRD_*; 1 is Ethernet
    parent: int = 0         # index of the link below (of a macvlan) or across (of a veth), 0 = none
    master: int = 0         # index of the bridge or bond it belongs to, 0 = none

    @property
    def is_up(self):
        return bool(self.flags & IFF_UP)

    @property
    def is_loopback(self):
        return bool(self.flags & IFF_LOOPBACK)


class Address(NamedTuple):
    """An IP address on a link."""

    index: int              # of the link
    family: int             # socket.AF_INET or AF_INET6
    address: str            # our own, without the prefix length
    prefix: int
    peer: str = ""          # the other end's, where it differs (point to point)
    scope: int = 0          # 0 everywhere, 253 on the link, 254 in the host
    flags: int = 0          # IFA_F_*

    @property
    def is_loopback(self):
        return self.address.startswith("127.") if self.family == socket.AF_INET else self.address == "::1"


class Route(NamedTuple):
    """A route. Of several next hops the first one is told, and `hops` says how many there are."""

    family: int
    dst: str = ""           # "10.0.0.0/8", "" for the default route
    gateway: str = ""
    source: str = ""        # preferred source address of packets
    src: str = ""           # "10.0.0.0/8": the route is for packets from there only
    index: int = 0          # of the outgoing link, 0 = none
    scope: int = 0
    metric: int = 0
    mtu: int = 0            # 0 = the link's
    protocol: int = 0       # RTPROT_*: who made it
    type: int = RTN_UNICAST
    table: int = RT_TABLE_MAIN
    flags: int = 0          # RTNH_F_* | RTM_F_*
    hops: int = 1


class Neighbour(NamedTuple):
    """An entry of the ARP or neighbour discovery table."""

    index: int              # of the link
    family: int
    address: str
    mac: str = ""
    state: int = 0          # NUD_*
    flags: int = 0          # NTF_*


def link(payload):
    """An RTM_NEWLINK message as a :class:`Link`. :raises codec.Malformed: it is none."""
    _, hardware, index, flags, _ = codec.unpack(IFINFO, payload, "a link message")
    values = dict(codec.attributes(payload, IFINFO.size))
    info = dict(codec.attributes(values.get(IFLA_LINKINFO, b"")))
    return Link(index, codec.as_text(values.get(IFLA_IFNAME, b"")),
                codec.as_text(info.get(IFLA_INFO_KIND, b"")), _mac(values.get(IFLA_ADDRESS, b"")),
                _number(values, IFLA_MTU), flags, hardware, _number(values, IFLA_LINK),
                _number(values, IFLA_MASTER))


def address(payload):
    """An RTM_NEWADDR message as an :class:`Address`, None for a family other than IP.

    :raises codec.Malformed: it is none.
    """
    family, prefix, flags, scope, index = codec.unpack(IFADDR, payload, "an address message")
    if family not in _FAMILIES:
        return None
    values = dict(codec.attributes(payload, IFADDR.size))
    far = _ip(family, values.get(_IFA_ADDRESS, b""))
    own = _ip(family, values.get(_IFA_LOCAL, b"")) or far
    return Address(index, family, own, prefix, far if far != own else "", scope,
                   _number(values, _IFA_FLAGS) or flags)


def route(payload):
    """An RTM_NEWROUTE message as a :class:`Route`, None for a family other than IP.

    :raises codec.Malformed: it is none.
    """
    family, dst_len, src_len, _, table, protocol, scope, kind, flags = codec.unpack(
        RTMSG, payload, "a route message")
    if family not in _FAMILIES:
        return None
    values = dict(codec.attributes(payload, RTMSG.size))
    index, gateway, hops = _number(values, _RTA_OIF), _gateway(family, values), 1
    if _RTA_MULTIPATH in values:
        (index, gateway, hop_flags), hops = _first_hop(family, values[_RTA_MULTIPATH])
        flags |= hop_flags
    metrics = dict(codec.attributes(values.get(_RTA_METRICS, b"")))
    return Route(family, _prefix(family, values.get(_RTA_DST, b""), dst_len), gateway,
                 _ip(family, values.get(_RTA_PREFSRC, b"")),
                 _prefix(family, values.get(_RTA_SRC, b""), src_len), index, scope,
                 _number(values, _RTA_PRIORITY), _number(metrics, _RTAX_MTU), protocol, kind,
                 _number(values, _RTA_TABLE) or table, flags, hops)


def neighbour(payload):
    """An RTM_NEWNEIGH message as a :class:`Neighbour`, None for a family other than IP.

    :raises codec.Malformed: it is none.
    """
    family, index, state, flags, _ = codec.unpack(NDMSG, payload, "a neighbour message")
    if family not in _FAMILIES:
        return None
    values = dict(codec.attributes(payload, NDMSG.size))
    return Neighbour(index, family, _ip(family, values.get(_NDA_DST, b"")),
                     _mac(values.get(_NDA_LLADDR, b"")), state, flags)


def mac_bytes(mac):
    """"02:00:00:00:00:01" as six bytes. :raises ValueError: it is no MAC address."""
    raw = bytes.fromhex(mac.replace(":", ""))
    if len(raw) != 6:
        raise ValueError(f"{mac!r} is not a MAC address")
    return raw


def _mac(raw):
    return ":".join(f"{byte:02x}" for byte in raw)


def _ip(family, raw):
    if not raw:
        return ""
    if len(raw) != (4 if family == socket.AF_INET else 16):
        raise codec.Malformed(f"an address of {len(raw)} bytes for family {family}")
    return socket.inet_ntop(family, raw)


def _prefix(family, raw, length):
    """CIDR text; "" for the default route, which has no destination attribute."""
    return f"{_ip(family, raw)}/{length}" if raw else ""


def _number(values, kind):
    return codec.as_u32(values[kind]) if kind in values else 0


def _gateway(family, values):
    """The next hop's address; RTA_VIA is that of another family (IPv4 through an IPv6 router)."""
    if _RTA_VIA in values:
        via = values[_RTA_VIA]
        if len(via) < _U16.size:
            raise codec.Malformed(f"a next hop of another family in {len(via)} bytes")
        other, = _U16.unpack_from(via)
        return _ip(other, via[2:]) if other in _FAMILIES else ""
    return _ip(family, values.get(_RTA_GATEWAY, b""))


def _first_hop(family, data):
    """``((link index, gateway, flags), number of hops)`` of an RTA_MULTIPATH attribute."""
    first, hops, position = None, 0, 0
    while len(data) - position >= _RTNEXTHOP.size:
        length, flags, _, index = _RTNEXTHOP.unpack_from(data, position)
        if length < _RTNEXTHOP.size or position + length > len(data):
            raise codec.Malformed(f"a next hop of {length} bytes with {len(data) - position} left")
        if first is None:
            values = dict(codec.attributes(data[position + _RTNEXTHOP.size:position + length]))
            first = (index, _gateway(family, values), flags)
        hops += 1
        position += length + (-length % 4)
    if first is None:
        raise codec.Malformed("a route through several hops without a hop")
    return first, hops
