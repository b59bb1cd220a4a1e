"""rtnetlink for the guest's one network namespace: links, addresses, routes, neighbours.

The host's katashim.resources.netlink knows more, but loads modules that cost the guest 150 ms; this is what
the agent's RPCs need. Implements rtnetlink(7). Called by network.py.
"""

import os
import struct
from _socket import SOCK_CLOEXEC, SOCK_RAW, socket

_AF_NETLINK, _ROUTE = 16, 0
AF_INET, AF_INET6, AF_UNSPEC = 2, 10, 0
NEWLINK, GETLINK, NEWADDR, GETADDR, NEWROUTE, GETROUTE, NEWNEIGH = 16, 18, 20, 22, 24, 26, 28
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP, REPLACE, _CREATE = 0x01, 0x04, 0x300, 0x100, 0x400
IFF_UP, IFF_NOARP = 0x1, 0x80
TABLE_MAIN, PROTOCOL_BOOT, UNICAST, SCOPE_LINK = 254, 3, 1, 253

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")            # family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")          # family, prefix length, flags, scope, index
_ROUTE_HEADER = struct.Struct("=BBBBBBBBI")     # family, dst len, src len, tos, table, ...
_NEIGHBOUR = struct.Struct("=BxxxiHBB")     # family, index, state, flags, type
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU = 1, 3, 4
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_METRICS, _RTAX_MTU = 1, 4, 5, 7, 8, 2
_NDA_DST, _NDA_LLADDR = 1, 2
_TIMEOUT_S = 5


class Link:
    """A network interface. :ivar addresses: list of ``(family, address bytes, prefix length)``."""

    def __init__(self, index, name, mac, mtu, flags, kind):
        self.index, self.name, self.mac, self.mtu, self.flags, self.kind = index, name, mac, mtu, flags, kind
        self.addresses = []


class Route:
    """A row of the main table: bytes for addresses, b"" for none."""

    def __init__(self, family, destination, prefix, gateway, index, source, scope, flags, mtu):
        self.family, self.destination, self.prefix, self.gateway = family, destination, prefix, gateway
        self.index, self.source, self.scope, self.flags, self.mtu = index, source, scope, flags, mtu


class Netlink:
    """A socket to the kernel, to be used as a context manager, by one thread."""

    def __enter__(self):
        self._socket = socket(_AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, _ROUTE)
        self._socket.settimeout(_TIMEOUT_S)
        self._sequence = 0
        return self

    def __exit__(self, *error):
        self._socket.close()
        return False

    # -- reading ----------------------------------------------------------------------------------
    def links(self):
        """All interfaces with their addresses, a list of :class:`Link`."""
        found = {}
        for payload in self._dump(GETLINK, _LINK.pack(AF_UNSPEC, 0, 0, 0, 0)):
            _, kind, index, flags, _ = _LINK.unpack_from(payload)
            facts = dict(_attributes(payload[_LINK.size:]))
            found[index] = Link(index, _text(facts.get(_IFLA_IFNAME, b"")), facts.get(_IFLA_ADDRESS, b""),
                                _number(facts.get(_IFLA_MTU, b"")), flags, kind)
        for payload in self._dump(GETADDR, _ADDRESS.pack(AF_UNSPEC, 0, 0, 0, 0)):
            family, prefix, _, _, index = _ADDRESS.unpack_from(payload)
            facts = dict(_attributes(payload[_ADDRESS.size:]))
            address = facts.get(_IFA_LOCAL) or facts.get(_IFA_ADDRESS)
            if index in found and address:
                found[index].addresses.append((family, address, prefix))
        return list(found.values())

    def routes(self):
        """The main table of both families, a list of :class:`Route`; without those to this host itself."""
        found = []
        for payload in self._dump(GETROUTE, _ROUTE_HEADER.pack(AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0, 0)):
            family, prefix, _, _, table, _, scope, kind, flags = _ROUTE_HEADER.unpack_from(payload)
            if table != TABLE_MAIN or kind != UNICAST:
                continue
            facts = dict(_attributes(payload[_ROUTE_HEADER.size:]))
            metrics = dict(_attributes(facts.get(_RTA_METRICS, b"")))
            found.append(Route(family, facts.get(_RTA_DST, b""), prefix, facts.get(_RTA_GATEWAY, b""),
                               _number(facts.get(_RTA_OIF, b"")), facts.get(_RTA_PREFSRC, b""), scope, flags,
                               _number(metrics.get(_RTAX_MTU, b""))))
        return found

    # -- changing ---------------------------------------------------------------------------------
    def set_link(self, index, flags=0, change=0, name="", mac=b"", mtu=0):
        """Change an interface. :param change: which of the IFF_* in `flags` to take over."""
        attributes = b""
        if name:
            attributes += _attribute(_IFLA_IFNAME, name.encode() + b"\0")
        if mac:
            attributes += _attribute(_IFLA_ADDRESS, mac)
        if mtu:
            attributes += _attribute(_IFLA_MTU, struct.pack("=I", mtu))
        self._request(NEWLINK, 0, _LINK.pack(AF_UNSPEC, 0, index, flags, change) + attributes)

    def add_address(self, index, family, address, prefix):
        """Give an interface an address; the same one again is no error."""
        self._request(NEWADDR, REPLACE | _CREATE, _ADDRESS.pack(family, prefix, 0, 0, index)
                      + _attribute(_IFA_LOCAL, address) + _attribute(_IFA_ADDRESS, address))

    def add_route(self, route):
        """Add or replace a :class:`Route`."""
        attributes = b"".join(_attribute(kind, value) for kind, value in (
            (_RTA_DST, route.destination), (_RTA_GATEWAY, route.gateway), (_RTA_PREFSRC, route.source))
            if value)
        attributes += _attribute(_RTA_OIF, struct.pack("=I", route.index))
        if route.mtu:
            attributes += _attribute(_RTA_METRICS, _attribute(_RTAX_MTU, struct.pack("=I", route.mtu)))
        header = _ROUTE_HEADER.pack(route.family, route.prefix, 0, 0, TABLE_MAIN, PROTOCOL_BOOT, route.scope,
                                    UNICAST, route.flags)
        self._request(NEWROUTE, REPLACE | _CREATE, header + attributes)

    def add_neighbour(self, index, family, address, mac, state, flags):
        """Add or replace an entry of the neighbour table."""
        self._request(NEWNEIGH, REPLACE | _CREATE, _NEIGHBOUR.pack(family, index, state, flags, UNICAST)
                      + _attribute(_NDA_DST, address) + _attribute(_NDA_LLADDR, mac))

    # -- the wire ---------------------------------------------------------------------------------
    def _request(self, kind, flags, payload):
        for _ in self._exchange(kind, flags | _ACK, payload):
            pass

    def _dump(self, kind, payload):
        return list(self._exchange(kind, _DUMP, payload))

    def _exchange(self, kind, flags, payload):
        """Send a message and yield the payloads that come before its acknowledgement.

        :raises OSError: the kernel refuses.
        """
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(payload), kind, flags | _REQUEST, self._sequence, 0)
        self._socket.send(header + payload)
        while True:
            data = self._socket.recv(1 << 16)
            position = 0
            while position + _HEADER.size <= len(data):
                length, kind, _, sequence, _ = _HEADER.unpack_from(data, position)
                body = data[position + _HEADER.size:position + length]
                position += length + -length % 4
                if sequence != self._sequence:
                    continue
                if kind in (_ERROR, _DONE):
                    code = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                yield body


def _attribute(kind, value):
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data):
    position = 0
    while position + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, data[position + _ATTRIBUTE.size:position + length]
        position += length + -length % 4


def _text(value):
    return value.rstrip(b"\0").decode(errors="replace")


def _number(value):
    return int.from_bytes(value, "little") if value else 0
