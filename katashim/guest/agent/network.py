"""The pod's network, as the host describes it: interfaces, routes, neighbours. Called by pod RPCs.

All changes are idempotent, for hosts repeat them. An interface is known by its MAC address, which is that
of the pod's interface on the host.
"""

import os
from _socket import inet_ntop, inet_pton

from katashim.guest.agent import devices, uevents
from katashim.guest.agent.netlink import (
    AF_INET,
    AF_INET6,
    IFF_NOARP,
    IFF_UP,
    SCOPE_LINK,
    Netlink,
    Route,
)
from katashim.guest.agent.rpcerror import INTERNAL, INVALID_ARGUMENT, RpcError

_FAMILIES = (AF_INET, AF_INET6)         # by the number that messages have for them
_PERMANENT = 0x80
_DRIVER_WAIT_S = 1.0        # for an interface whose driver is being loaded as the guest starts
_ANY = {AF_INET: "0.0.0.0", AF_INET6: "::1"}    # how upstream writes the destination of a default route


def update_interface(request, timeout_s):
    """Make an interface be what ``types.Interface`` says. Addresses it has besides stay.

    :param timeout_s: how long to wait for a device that is named by its PCI path.
    :raises RpcError: there is no such interface, or an address is none.
    """
    mac = _mac_bytes(request.hwAddr)
    addresses = [_address(item) for item in request.IPAddresses]
    name_by_path = devices.network_by_pci(request.devicePath, timeout_s) if request.devicePath else ""
    with Netlink() as kernel:
        link = _find(kernel, mac, name_by_path or request.name, bool(name_by_path))
        kernel.set_link(link.index, 0, IFF_UP)
        if link.mac != mac:
            kernel.set_link(link.index, mac=mac)
        for family, address, prefix in addresses:
            if family == AF_INET or _has_ipv6(link.name):
                kernel.add_address(link.index, family, address, prefix)
        if request.name and request.name != link.name:
            _make_room(kernel, request.name)
        arp = IFF_NOARP if request.raw_flags & IFF_NOARP else 0
        kernel.set_link(link.index, IFF_UP | arp, IFF_UP | IFF_NOARP,
                        name=request.name if request.name != link.name else "", mtu=request.mtu)


def interfaces():
    """All interfaces: tuples of name, MAC (text), MTU, and a list of ``(family, address, prefix length)``;
    families are numbered as in messages."""
    with Netlink() as kernel:
        return [(link.name, _mac_text(link.mac), link.mtu,
                 [(_FAMILIES.index(family), inet_ntop(family, address), prefix)
                  for family, address, prefix in link.addresses if family in _FAMILIES])
                  for link in kernel.links()]


def update_routes(requests):
    """Add or replace routes (``types.Route``), those without a gateway first. Others stay.

    :raises RpcError: an interface that is not there, or something that is no address.
    """
    with Netlink() as kernel:
        indexes = {link.name: link.index for link in kernel.links()}
        for request in sorted(requests, key=lambda item: bool(item.gateway)):
            if request.device not in indexes:
                raise RpcError(INTERNAL, f"no network interface {request.device!r} for the route to "
                                         f"{request.dest or 'everywhere'}")
            try:
                kernel.add_route(_route(request, indexes[request.device]))
            except FileExistsError:
                pass


def routes():
    """The main table as dicts of the fields of ``types.Route``."""
    with Netlink() as kernel:
        names = {link.index: link.name for link in kernel.links()}
        return [_describe(route, names) for route in kernel.routes() if route.destination or route.gateway]


def add_neighbours(requests):
    """Enter neighbours (``types.ARPNeighbor``) into the table, permanently unless they say otherwise."""
    with Netlink() as kernel:
        indexes = {link.name: link.index for link in kernel.links()}
        for request in requests:
            if request.toIPAddress is None or request.device not in indexes:
                raise RpcError(INVALID_ARGUMENT,
                               f"a neighbour lacks its address or an interface: {request!r}")
            family, address, _ = _address(request.toIPAddress)
            kernel.add_neighbour(indexes[request.device], family, address, _mac_bytes(request.lladdr),
                                 request.state or _PERMANENT, request.flags)


def _find(kernel, mac, name, known_by_path):
    """The link with `mac`, else the one called `name`."""
    def look():
        links = kernel.links()
        if known_by_path:
            return next((link for link in links if link.name == name), None)
        return next((link for link in links if link.mac == mac), None)

    found = look()
    if found is None:
        try:
            found = uevents.wait_for(look, _DRIVER_WAIT_S, "a network interface")
        except RpcError as exc:
            found = next((link for link in kernel.links() if name and link.name == name), None)
            if found is None:
                raise RpcError(INTERNAL, f"Link not found (Address: {_mac_text(mac)})") from exc
    return found


def _make_room(kernel, name):
    """Rename another link that has `name` already."""
    for link in kernel.links():
        if link.name == name:
            kernel.set_link(link.index, 0, IFF_UP)
            kernel.set_link(link.index, name=f"{name[:10]}_temp")


def _has_ipv6(name):
    try:
        with open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6") as file:
            return file.read().strip() == "0"
    except FileNotFoundError:
        return os.path.isdir("/proc/sys/net/ipv6")


def _route(request, index):
    family = _FAMILIES[request.family] if request.family in (0, 1) else AF_INET
    for text in (request.dest, request.gateway, request.source):
        if ":" in text:
            family = AF_INET6       # runtime-rs leaves the family at its default here and there
    destination, prefix = _network(request.dest, family)
    gateway, _ = _network(request.gateway, family)
    source, _ = _network(request.source, family)
    if prefix == 0:
        destination = b""
    scope = request.scope
    if not gateway and scope == 0 and family == AF_INET:
        scope = SCOPE_LINK
    return Route(family, destination, prefix, gateway, index, source, scope, request.flags, request.mtu)


def _describe(route, names):
    width = 128 if route.family == AF_INET6 else 32
    destination = inet_ntop(route.family, route.destination) if route.destination else _ANY[route.family]
    if route.destination and route.prefix != width:
        destination = f"{destination}/{route.prefix}"
    return {"dest": destination, "gateway": _text(route.family, route.gateway),
            "device": names.get(route.index, ""), "source": _text(route.family, route.source),
            "scope": route.scope, "family": _FAMILIES.index(route.family), "flags": route.flags,
            "mtu": route.mtu}


def _text(family, address):
    return inet_ntop(family, address) if address else ""


def _address(message):
    """``(family, bytes, prefix length)`` of a ``types.IPAddress``."""
    family = AF_INET6 if message.family == 1 or ":" in message.address else AF_INET
    address, _ = _network(message.address, family)
    if not address or not message.mask.isdigit() and message.mask:
        raise RpcError(INVALID_ARGUMENT,
                       f"{message.address!r}/{message.mask!r} is no address with a prefix length")
    return family, address, int(message.mask) if message.mask else len(address) * 8


def _network(text, family):
    """``(address bytes, prefix length)`` of ``ADDRESS`` or ``ADDRESS/PREFIX``; (b"", 0) of ""."""
    if not text:
        return b"", 0
    address, slash, prefix = text.partition("/")
    try:
        packed = inet_pton(family, address)
    except OSError as exc:
        raise RpcError(INVALID_ARGUMENT, f"{text!r} is no IP address of its family") from exc
    if slash and not prefix.isdigit():
        raise RpcError(INVALID_ARGUMENT, f"{text!r} is no network")
    return packed, int(prefix) if slash else len(packed) * 8


def _mac_bytes(text):
    try:
        mac = bytes.fromhex(text.replace(":", ""))
    except ValueError as exc:
        raise RpcError(INVALID_ARGUMENT, f"{text!r} is no MAC address") from exc
    return mac


def _mac_text(mac):
    return ":".join(f"{byte:02x}" for byte in mac)
