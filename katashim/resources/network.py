"""The pod's network: from the links of its network namespace to network cards of the guest.

:func:`check_netns` finds the namespace that the OCI spec names. :class:`Network` joins each of its
addressed links to a tap (katashim.resources.endpoint), and tells the agent the addresses, routes and
neighbours that the CNI plugins have put there. Behaviour as in Kata's runtime (internetworking models
``tcfilter`` and ``none``).

Called by katashim.runtime.sandbox. Whatever asks the kernel runs in a native thread (green.in_thread):
the RTNL lock is the whole machine's, and somebody else may hold it for long.
"""

import logging
import os
import re
import stat
from typing import NamedTuple

from katashim.agent.types import ARPNeighbor, GuestNetwork, Interface, IPAddress, Route
from katashim.errors import AlreadyExists, ConfigError, FailedPrecondition, NotFound, Unsupported
from katashim.green import in_thread
from katashim.resources import netlink
from katashim.resources import netns as namespaces
from katashim.resources.endpoint import Endpoint, check_joinable, tap_name

log = logging.getLogger(__name__)

_NO_PROCESS = "/proc/0/ns/net"      # what Docker writes where the namespace has no process yet
_DOCKER_NETNS_DIRS = ("/var/run/docker/netns", "/run/docker/netns")
_DOCKER_ID = re.compile(r"[0-9a-f]{64}")
_RTNH_F_ONLINK = 4                  # the only flag of a route that the kernel accepts back
_AF_INET6 = 10


class _Scan(NamedTuple):
    """What a namespace holds: addressed links, and everything that stands on them."""

    links: list
    names: set                      # of all links, addressed or not
    addresses: list
    routes: list
    neighbours: list


class Network:
    """The network of one sandbox.

    :param netns_path: the pod's namespace, of :func:`check_netns`; None = the VM has no network.
    :param runtime_config: `internetworking_model` is read.
    :param hypervisor_config: `network_queues` and `disable_vhost_net` are read.
    :param undo: the sandbox's stack.
    """

    def __init__(self, netns_path, runtime_config, hypervisor_config, undo):
        self._netns = netns_path
        self._model = runtime_config.internetworking_model
        self._queues = hypervisor_config.network_queues
        self._with_vhost = not hypervisor_config.disable_vhost_net
        self._undo = undo.child("the network")
        self._inode = None
        self._endpoints = []
        self._scan = None

    @property
    def nics(self):
        """The network cards, list of :class:`~katashim.drivers.base.Nic`."""
        return [endpoint.nic for endpoint in self._endpoints]

    def attach(self):
        """Join every link that has an IP address other than the loopback's.

        :returns: the new cards, list of :class:`~katashim.drivers.base.Nic`; empty for the model
            ``none`` and for a namespace without addresses.
        :raises Unsupported: the model, or a link of a kind that cannot be joined; names it.
        :raises FailedPrecondition: the namespace is the host's, or somebody else filters on a link.
        :raises NetlinkError: the kernel refused a step. Nothing is left behind.
        """
        if self._model not in ("tcfilter", "none"):
            raise Unsupported(f"internetworking_model = {self._model!r} is not supported; "
                              "use tcfilter, or none for a VM without network")
        if self._netns is None or self._model == "none":
            return []
        if self._inode is None:
            self._inode = _pod_netns_inode(self._netns)
        return self._join_new_links()

    def rescan(self):
        """Join the links that came after :meth:`attach`, as Docker and nerdctl put them there late.

        :returns: the new cards only, to be plugged. Raises what `attach` raises.
        """
        return self.attach()

    def guest_network(self, guest_addresses):
        """What the agent must set up.

        :param guest_addresses: ``{nic.id: address}``, the PCI path of each card in the guest ("02/00"),
            or "" where the agent must find it by its MAC address.
        :returns: :class:`~katashim.agent.types.GuestNetwork`.
        """
        if self._scan is None:
            return GuestNetwork()
        names = {endpoint.link.index: endpoint.link.name for endpoint in self._endpoints}
        interfaces = [_interface(endpoint.link, self._scan.addresses, guest_addresses.get(endpoint.nic.id, ""))
                      for endpoint in self._endpoints]
        routes = [_guest_route(route, names[route.index])
                  for route in self._scan.routes if route.index in names]
        neighbours = [_guest_neighbour(entry, names[entry.index])
                      for entry in self._scan.neighbours if entry.index in names]
        return GuestNetwork(tuple(interfaces), tuple(routes), tuple(neighbours))

    def detach(self):
        """Take the taps and redirects away; again does nothing.

        :returns: ``[(entry, error)]`` of what could not be removed, as :meth:`Undo.unwind`.
        """
        self._endpoints = []
        self._scan = None
        return self._undo.unwind()

    def _join_new_links(self):
        scan = in_thread(self._look, what=f"looking into the network namespace {self._netns}")
        known = {endpoint.link.index for endpoint in self._endpoints}
        added = []
        with self._undo.scope():
            for link in scan.links:
                if link.index not in known:
                    added.append(self._join(link, scan, len(self._endpoints) + len(added)))
        self._endpoints += added
        self._scan = scan
        return [endpoint.nic for endpoint in added]

    def _join(self, link, scan, index):
        if tap_name(index) in scan.names:
            raise AlreadyExists(f"{self._netns} has a link {tap_name(index)} already: another sandbox uses "
                                "this network namespace, or died without its `delete`")
        endpoint = Endpoint(self._netns, self._inode, link, index, queues=self._queues,
                            with_vhost=self._with_vhost)
        endpoint.attach(self._undo)
        return endpoint

    def _look(self):
        """Read the namespace, in a native thread; checks the links that are not joined yet."""
        joined = {endpoint.link.index for endpoint in self._endpoints}
        taps = {endpoint.tap_name for endpoint in self._endpoints}
        with netlink.Rtnetlink(self._netns, self._inode) as kernel:
            addresses = [address for address in kernel.addresses() if not address.is_loopback]
            all_links = kernel.links()
            addressed = {address.index for address in addresses}
            links = [link for link in all_links
                     if link.index in addressed and not link.is_loopback and link.name not in taps]
            for link in links:
                if link.index not in joined:
                    _check(kernel, link)
            return _Scan(links, {link.name for link in all_links}, addresses,
                         [route for route in kernel.routes() if _is_for_guest(route)],
                         [entry for entry in kernel.neighbours() if entry.state == netlink.NUD_PERMANENT])


def _check(kernel, link):
    check_joinable(link, kernel.bus_info(link.name))
    for qdisc in kernel.qdiscs(link.index):
        if qdisc.is_ingress:
            raise FailedPrecondition(
                f"the pod's network link {link.name} has a qdisc {qdisc.kind} already, from another "
                "sandbox or a CNI plugin; the model tcfilter needs that place")


def _pod_netns_inode(path):
    """The inode number of a pod's namespace, which must not be the host's: its links would be hijacked."""
    try:
        if namespaces.is_own(path):
            raise FailedPrecondition(f"the pod's network namespace {path} is the host's; a VM cannot share it")
        return namespaces.identity(path)[1]
    except NotFound as exc:
        raise FailedPrecondition(f"the pod's network namespace is gone: {exc}") from exc


# -- what the agent is told -------------------------------------------------------------------------

def _is_for_guest(route):
    """Routes that the kernel makes by itself come back with the addresses; others than plain ones of the
    main table mean nothing in the guest."""
    return (route.protocol != netlink.RTPROT_KERNEL and route.table == netlink.RT_TABLE_MAIN
            and route.type == netlink.RTN_UNICAST and not route.flags & netlink.RTM_F_CLONED)


def _interface(link, addresses, guest_address):
    own = tuple(IPAddress(_ip_family(address.family), address.address, str(address.prefix))
                for address in addresses if address.index == link.index)
    return Interface(link.name, link.name, own, link.mtu, link.mac, guest_address, link.kind,
                     link.flags & netlink.IFF_NOARP)


def _guest_route(route, device):
    if route.hops > 1:
        log.warning("the route to %s has %d next hops; the guest gets only the first, %s",
                    route.dst or "everywhere", route.hops, route.gateway or device)
    return Route(route.dst, route.gateway, device, route.source or route.src, route.scope,
                 _ip_family(route.family), route.flags & _RTNH_F_ONLINK, route.mtu)


def _guest_neighbour(entry, device):
    address = IPAddress(_ip_family(entry.family), entry.address, "")
    return ARPNeighbor(address, device, entry.mac, entry.state, entry.flags)


def _ip_family(family):
    return 1 if family == _AF_INET6 else 0


# -- which namespace --------------------------------------------------------------------------------

def check_netns(spec, sandbox_id, runtime_config, undo):
    """Find the pod's network namespace, or make one where the spec leaves that to the runtime.

    - a ``network`` namespace with a path: that one;
    - Docker's placeholder ``/proc/0/ns/net``, or none at all, with a ``libnetwork-setkey`` hook: the one
      that Docker keeps under its own directory;
    - a ``network`` namespace without a path (or with the placeholder): a new one under /run/netns, to be
      filled later (see :meth:`Network.rescan`); it goes on `undo`;
    - none in the spec, which means the host's: refused, unless `disable_new_netns` asks for a VM in the
      host's namespace, without a network card.

    :param spec: the OCI spec, a dict. :param sandbox_id: for the name of a new namespace.
    :param runtime_config: `disable_new_netns` and `internetworking_model` are read.
    :returns: a path, or None for a VM in the host's namespace.
    :raises FailedPrecondition: host network, or the path is no network namespace.
    :raises ConfigError: `disable_new_netns` without the model ``none``.
    """
    if runtime_config.disable_new_netns:
        if runtime_config.internetworking_model != "none":
            raise ConfigError("disable_new_netns needs internetworking_model = \"none\": in the host's "
                              "network namespace there is nothing to join the VM to")
        return None
    entries = [entry for entry in (spec.get("linux") or {}).get("namespaces") or ()
               if entry.get("type") == "network"]
    path = entries[0].get("path") if entries else None
    if path and path != _NO_PROCESS:
        return _checked(path)
    if not entries or path == _NO_PROCESS:
        path = _docker_netns(spec)
        if path:
            return _checked(path)
    if not entries:
        raise FailedPrecondition("the pod wants the host's network (its spec has no network namespace), "
                                 "which a VM cannot give it; use another runtime for such pods")
    return _new_netns(sandbox_id, undo)


def _checked(path):
    try:
        with namespaces.entered(path):
            pass
        own = namespaces.is_own(path)
    except NotFound as exc:
        raise FailedPrecondition(f"the pod's network namespace cannot be used: {exc}") from exc
    if own:
        raise FailedPrecondition(f"the pod wants the host's network ({path} is the host's namespace), "
                                 "which a VM cannot give it; use another runtime for such pods")
    return path


def _docker_netns(spec):
    """The namespace that Docker's hook would hand over: its argument after ``libnetwork-setkey``."""
    hooks = spec.get("hooks") or {}
    for hook in (hooks.get("prestart") or []) + (hooks.get("createRuntime") or []):
        args = hook.get("args") or []
        if "libnetwork-setkey" not in args:
            continue
        for arg in args[args.index("libnetwork-setkey") + 1:]:
            if _DOCKER_ID.fullmatch(arg):
                return next(filter(_is_plain_file, (f"{base}/{arg}" for base in _DOCKER_NETNS_DIRS)), None)
    return None


def _is_plain_file(path):
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _new_netns(sandbox_id, undo):
    path = f"{namespaces.NETNS_DIR}/katashim-{sandbox_id}"
    entry = undo.push("netns", path=path)
    try:
        in_thread(namespaces.create, path, what=f"making the network namespace {path}")
    except FailedPrecondition:
        entry.release()
        raise
    return path
