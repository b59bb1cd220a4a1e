import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from pod_netns import Guest, Namespace, Pod, stack

from katashim import config, undo
from katashim.agent.types import ARPNeighbor, Interface, IPAddress, Route
from katashim.errors import AlreadyExists, ConfigError, FailedPrecondition, Unsupported
from katashim.resources import netlink, netns, network
from katashim.resources.endpoint import check_joinable, open_vhost_net
from katashim.resources.releases import RELEASES


def runtime(model="tcfilter", disable_new_netns=False):
    return SimpleNamespace(internetworking_model=model, disable_new_netns=disable_new_netns)


def hypervisor(queues=1, disable_vhost_net=False):
    return SimpleNamespace(network_queues=queues, disable_vhost_net=disable_vhost_net)


def make(pod, stack, **options):
    return network.Network(pod.path, runtime(options.pop("model", "tcfilter")), hypervisor(**options), stack)


@pytest.fixture
def pod():
    with Pod() as pod:
        yield pod


# -- joining ------------------------------------------------------------------------------------------

def test_host_and_guest_reach_each_other_and_nothing_stays(pod):
    pod.ip("link set eth0 mtu 1400")
    before = pod.picture()
    pod_network = make(pod, stack())
    nic, = pod_network.attach()
    assert (nic.id, nic.tap_name, nic.mtu, len(nic.fds)) == ("net0", "tap0_kata", 1400, 1)
    eth0, tap = pod.link("eth0"), pod.link("tap0_kata")
    assert nic.mac == eth0.mac != tap.mac
    assert tap.mtu == 1400 and tap.is_up and tap.kind == "tun"
    assert pod.redirects("eth0") == [tap.index] and pod.redirects("tap0_kata") == [eth0.index]
    assert not any(os.get_inheritable(fd) for fd in nic.fds)

    with Guest(nic, "10.88.0.2"):
        assert " 0% packet loss" in pod.outside.run("ping -n -c 3 -i 0.01 -W 2 10.88.0.2")
    assert Guest(nic, "10.88.0.2").ping("10.88.0.1") == b"from the guest"
    assert "Sent 0 bytes" not in pod.run("tc -s filter show dev eth0 ingress")

    assert pod_network.detach() == [] and pod.picture() == before
    assert pod_network.detach() == []


def test_the_default_configuration_joins(pod):
    settings = config.load(env={})
    pod_network = network.Network(pod.path, settings.runtime, settings.hypervisor, stack())
    assert len(pod_network.attach()) == 1
    pod_network.detach()


def test_the_tap_is_silent_until_the_guest_speaks(pod):
    pod_network = make(pod, stack())
    pod_network.attach()
    addresses = json.loads(pod.ip("-j addr show dev tap0_kata"))[0]["addr_info"]
    assert addresses == []
    pod_network.detach()


def test_queues_become_descriptors_of_one_tap(pod):
    pod_network = make(pod, stack(), queues=3)
    nic, = pod_network.attach()
    assert len(set(nic.fds)) == 3
    details = json.loads(pod.ip("-j -d link show tap0_kata"))[0]["linkinfo"]["info_data"]
    assert details["multi_queue"] and details["vnet_hdr"] and not details["pi"] and not details["persist"]
    pod_network.detach()


def test_a_macvlan_is_joined(pod):
    with Namespace("host") as host:
        pod.ip(f"link set eth0 netns {host.name}")
        host.ip("link set eth0 up")
        host.ip(f"link add link eth0 name net1 netns {pod.name} type macvlan mode bridge")
        pod.ip("addr add 10.88.0.7/24 dev net1")
        pod.ip("link set net1 up")
        pod_network = make(pod, stack())
        nic, = pod_network.attach()
        assert nic.mac == pod.link("net1").mac
        with Guest(nic, "10.88.0.7"):
            assert " 0% packet loss" in pod.outside.run("ping -n -c 1 -W 2 10.88.0.7")
        assert pod_network.detach() == []


def test_links_without_address_are_left_alone(pod):
    pod.add_veth("eth1", "out1")
    pod.ip("link add br0 type bridge")
    # Down, so that the kernel gives them no IPv6 address.
    pod.ip("link set eth1 down")
    pod_network = make(pod, stack())
    nic, = pod_network.attach()
    assert nic.mac == pod.link("eth0").mac
    pod_network.detach()


def test_late_links_are_found_by_a_rescan(pod):
    pod_network = make(pod, stack())
    first, = pod_network.attach()
    assert pod_network.rescan() == []
    pod.add_veth("eth1", "out1")
    pod.ip("addr add 10.89.0.2/24 dev eth1")
    second, = pod_network.rescan()
    assert (second.id, second.tap_name) == ("net1", "tap1_kata")
    assert pod_network.nics == [first, second]
    interfaces = pod_network.guest_network({"net1": "02/01"}).interfaces
    assert [(each.device, each.devicePath) for each in interfaces] == [("eth0", ""), ("eth1", "02/01")]
    pod_network.detach()


def test_the_model_none_has_no_cards(pod):
    before = pod.picture()
    pod_network = make(pod, stack(), model="none")
    assert pod_network.attach() == [] and pod_network.guest_network({}) == ((), (), ())
    assert pod.picture() == before


def test_a_vm_without_namespace_has_no_cards():
    assert network.Network(None, runtime(), hypervisor(), stack()).attach() == []


@pytest.mark.parametrize("model", ["macvtap", "l3forwarding"])
def test_other_models_are_refused_by_name(pod, model):
    with pytest.raises(Unsupported, match=f"internetworking_model = '{model}'"):
        make(pod, stack(), model=model).attach()


@pytest.mark.skipif(os.path.exists("/dev/vhost-net"), reason="this host has vhost-net")
def test_without_vhost_net_there_are_no_descriptors_for_it(pod):
    pod_network = make(pod, stack())
    assert pod_network.attach()[0].vhost_fds == ()
    pod_network.detach()


@pytest.mark.skipif(not os.path.exists("/dev/vhost-net"), reason="this host has no vhost-net")
def test_vhost_net_is_opened_for_each_queue():
    fds = []
    open_vhost_net(2, fds)
    assert len(fds) == 2
    netlink.close_all(fds)


# -- refusing -----------------------------------------------------------------------------------------

def test_a_link_that_cannot_be_joined_is_named(pod):
    pod.ip("link add br0 type bridge")
    pod.ip("addr add 10.90.0.1/24 dev br0")
    before, undo_stack = pod.picture(), stack()
    with pytest.raises(Unsupported, match="link br0 is of the kind bridge"):
        make(pod, undo_stack).attach()
    assert pod.picture() == before and undo_stack.entries() == []


@pytest.mark.parametrize("kind, bus_info, hardware", [
    ("", "0000:3b:00.0", 1), ("bond", "", 1), ("", "", 772), ("ipip", "", 768), ("tun", "tap", 1)])
def test_kinds_that_cannot_be_joined(kind, bus_info, hardware):
    with pytest.raises(Unsupported, match="wlan7"):
        check_joinable(netlink.Link(5, "wlan7", kind, type=hardware), bus_info)


@pytest.mark.parametrize("kind, bus_info", [("veth", ""), ("macvlan", ""), ("ipvlan", ""), ("vlan", ""),
                                            ("", "mlx5_core.sf.4"), ("", "")])
def test_kinds_that_can_be_joined(kind, bus_info):
    check_joinable(netlink.Link(5, "eth7", kind), bus_info)


@pytest.mark.parametrize("kind", ["ingress", "clsact"])
def test_a_qdisc_of_somebody_else_stays(pod, kind):
    pod.run(f"tc qdisc add dev eth0 {kind}")
    before, undo_stack = pod.picture(), stack()
    with pytest.raises(FailedPrecondition, match=f"link eth0 has a qdisc {kind}"):
        make(pod, undo_stack).attach()
    undo_stack.unwind()
    assert pod.picture() == before


def test_what_was_joined_before_a_failure_is_taken_apart(pod):
    pod.add_veth("eth1", "out1")
    pod.ip("addr add 10.89.0.2/24 dev eth1")
    pod.ip("link add tap1_kata type bridge")
    before, undo_stack = pod.picture(), stack()
    pod_network = make(pod, undo_stack)
    with pytest.raises(AlreadyExists, match="tap1_kata"):
        pod_network.attach()
    assert pod.picture() == before and undo_stack.entries() == [] and pod_network.nics == []
    pod.ip("link del tap1_kata")
    assert len(pod_network.attach()) == 2
    pod_network.detach()


def test_the_namespace_of_the_host_is_never_touched():
    with pytest.raises(FailedPrecondition, match="is the host's"):
        network.Network("/proc/self/ns/net", runtime(), hypervisor(), stack()).attach()
    with pytest.raises(FailedPrecondition, match="gone"):
        network.Network("/run/netns/there-is-none", runtime(), hypervisor(), stack()).attach()


# -- after a crash ------------------------------------------------------------------------------------

CRASH = """
import os, signal, sys
from types import SimpleNamespace
from pod_netns import stack
from katashim.resources.network import Network
network = Network(sys.argv[1], SimpleNamespace(internetworking_model="tcfilter"),
                  SimpleNamespace(network_queues=1, disable_vhost_net=True), stack(sys.argv[2]))
assert len(network.attach()) == 1
os.kill(os.getpid(), signal.SIGKILL)
"""


def crash(pod, journal):
    """A shim that joins the pod's links and is killed."""
    done = subprocess.run([sys.executable, "-c", CRASH, pod.path, str(journal)], check=False, timeout=30,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == -9


def test_replay_after_a_killed_shim_leaves_nothing(pod, tmp_path):
    before = pod.picture()
    crash(pod, tmp_path / "journal")
    assert pod.link("tap0_kata") is None, "a tap must not outlive its last descriptor"
    assert pod.picture() != before
    for _ in range(2):
        assert undo.replay(str(tmp_path / "journal"), RELEASES) == []
        assert pod.picture() == before


def test_replay_leaves_a_stranger_at_the_same_path_alone(pod, tmp_path):
    journal = tmp_path / "journal"
    crash(pod, journal)
    _, entries = undo.read(journal)
    with Pod() as other:
        other.run("tc qdisc add dev eth0 ingress")
        before = other.picture()
        for _, kind, args in entries:
            RELEASES[kind](**{**args, "netns": other.path})
        assert other.picture() == before
    assert {args["inode"] for _, _, args in entries} == {netns.identity(pod.path)[1]}


def test_replay_when_the_namespace_is_gone(tmp_path):
    with Pod() as pod:
        crash(pod, tmp_path / "journal")
    assert undo.replay(str(tmp_path / "journal"), RELEASES) == []


# -- what the agent is told ---------------------------------------------------------------------------

def test_guest_network_has_addresses_routes_and_neighbours(pod):
    for command in ("link set eth0 down", "link set eth0 address 02:11:22:33:44:55", "link set eth0 mtu 1450",
                    "link set eth0 up", "addr add 10.88.0.9/32 dev eth0", "addr add fd88::2/64 dev eth0 nodad",
                    "route add default via 10.88.0.1 dev eth0 mtu 1300",
                    "route add 169.254.1.1 dev eth0 scope link src 10.88.0.9",
                    "route add 10.99.0.0/16 via 192.0.2.77 dev eth0 onlink metric 50",
                    "route add 10.98.0.0/16 dev eth0 table 77", "route add blackhole 10.97.0.0/16",
                    "-6 route add default via fd88::1 dev eth0",
                    "neigh add 10.88.0.1 lladdr 02:aa:bb:cc:dd:01 dev eth0 nud permanent",
                    "neigh add 10.88.0.3 lladdr 02:aa:bb:cc:dd:03 dev eth0 nud stale",
                    "-6 neigh add fd88::1 lladdr 02:aa:bb:cc:dd:01 dev eth0 nud permanent",
                    "neigh add 127.0.0.9 lladdr 02:aa:bb:cc:dd:09 dev lo nud permanent"):
        pod.ip(command)
    pod_network = make(pod, stack())
    nic, = pod_network.attach()
    guest = pod_network.guest_network({nic.id: "02/00"})
    pod_network.detach()

    interface, = guest.interfaces
    own = {(each.family, each.address, each.mask) for each in interface.IPAddresses if each.mask != "64"
           or each.address.startswith("fd88")}
    assert own == {(0, "10.88.0.2", "24"), (0, "10.88.0.9", "32"), (1, "fd88::2", "64")}
    assert interface._replace(IPAddresses=()) == Interface(
        "eth0", "eth0", (), 1450, "02:11:22:33:44:55", "02/00", "veth", 0)
    assert set(guest.routes) == {
        Route("", "10.88.0.1", "eth0", "", 0, 0, 0, 1300),
        Route("169.254.1.1/32", "", "eth0", "10.88.0.9", 253, 0, 0, 0),
        Route("10.99.0.0/16", "192.0.2.77", "eth0", "", 0, 0, 4, 0),
        Route("", "fd88::1", "eth0", "", 0, 1, 0, 0)}
    assert set(guest.neighbors) == {
        ARPNeighbor(IPAddress(0, "10.88.0.1", ""), "eth0", "02:aa:bb:cc:dd:01", 0x80, 0),
        ARPNeighbor(IPAddress(1, "fd88::1", ""), "eth0", "02:aa:bb:cc:dd:01", 0x80, 0)}


def test_a_link_without_arp_stays_without_in_the_guest(pod):
    pod.ip("link set eth0 arp off")
    pod_network = make(pod, stack())
    pod_network.attach()
    assert pod_network.guest_network({}).interfaces[0].raw_flags == netlink.IFF_NOARP
    pod_network.detach()


def test_the_first_of_several_hops_is_told(pod, caplog):
    pod.ip("route add 10.95.0.0/16 nexthop via 10.88.0.11 nexthop via 10.88.0.12")
    pod_network = make(pod, stack())
    pod_network.attach()
    assert pod_network.guest_network({}).routes == (Route("10.95.0.0/16", "10.88.0.11", "eth0"),)
    assert "2 next hops" in caplog.text
    pod_network.detach()


# -- which namespace ----------------------------------------------------------------------------------

def spec_with(**entry):
    return {"linux": {"namespaces": [{"type": "pid"}, {"type": "network", **entry}]}}


def test_a_path_in_the_spec_is_taken(pod):
    undo_stack = stack()
    assert network.check_netns(spec_with(path=pod.path), "s1", runtime(), undo_stack) == pod.path
    assert undo_stack.entries() == []


@pytest.mark.parametrize("spec", [spec_with(), spec_with(path=""), spec_with(path="/proc/0/ns/net")])
def test_a_namespace_is_made_where_the_spec_names_none(spec):
    undo_stack, name = stack(), f"test-{os.getpid()}"
    path = network.check_netns(spec, name, runtime(), undo_stack)
    try:
        assert path == f"/run/netns/katashim-{name}" and not netns.is_own(path)
        assert network.Network(path, runtime(), hypervisor(), undo_stack).attach() == []
    finally:
        assert undo_stack.unwind() == []
    assert not os.path.exists(path)


@pytest.mark.parametrize("spec", [
    {}, {"linux": None}, {"linux": {"namespaces": [{"type": "pid"}]}}, spec_with(path="/proc/self/ns/net"),
    {"linux": {"namespaces": []}, "hooks": {"prestart": [{"args": ["libnetwork-setkey", "short"]}]}}])
def test_the_network_of_the_host_is_refused(spec):
    with pytest.raises(FailedPrecondition, match="wants the host's network"):
        network.check_netns(spec, "s1", runtime(), stack())


@pytest.mark.parametrize("path", ["/run/netns/there-is-none", "/etc/passwd", "/proc/self/ns/pid", "/proc/0/ns/x"])
def test_a_path_that_is_no_namespace_is_refused(path):
    with pytest.raises(FailedPrecondition, match=path):
        network.check_netns(spec_with(path=path), "s1", runtime(), stack())


def test_a_vm_in_the_hosts_namespace_has_no_card():
    assert network.check_netns({}, "s1", runtime("none", disable_new_netns=True), stack()) is None
    with pytest.raises(ConfigError, match="disable_new_netns"):
        network.check_netns({}, "s1", runtime(disable_new_netns=True), stack())


def test_dockers_namespace_is_found_by_its_hook(tmp_path, monkeypatch):
    docker_id = "0123456789abcdef" * 4
    hook = {"path": "/proc/1/exe", "args": ["libnetwork-setkey", "-exec-root=/var/run/docker", docker_id, "1234"]}
    monkeypatch.setattr(network, "_DOCKER_NETNS_DIRS", ("/run/netns/none", str(tmp_path)))
    with Namespace("docker") as docker:
        (tmp_path / docker_id).symlink_to(docker.path)
        spec = {**spec_with(path="/proc/0/ns/net"), "hooks": {"prestart": [hook]}}
        undo_stack = stack()
        # A link may lead anywhere: not followed, and so a new namespace is made.
        assert "katashim-" in network.check_netns(spec, f"d{os.getpid()}", runtime(), undo_stack)
        undo_stack.unwind()
        path = str(tmp_path / docker_id)
        os.unlink(path)
        open(path, "w").close()
        subprocess.run(["mount", "--bind", docker.path, path], check=True)
        try:
            for other in ({**spec, "hooks": {"createRuntime": [hook]}}, {"hooks": {"prestart": [hook]}}):
                assert network.check_netns(other, "s1", runtime(), stack()) == path
        finally:
            subprocess.run(["umount", path], check=True)


def test_a_namespace_that_cannot_be_made_leaves_no_entry(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(netns, "NETNS_DIR", str(tmp_path / "file"))
    undo_stack = stack()
    with pytest.raises(FailedPrecondition, match="cannot make the network namespace"):
        network.check_netns(spec_with(), "s1", runtime(), undo_stack)
    assert undo_stack.entries() == []
