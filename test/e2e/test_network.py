"""The pod's network: a namespace with a veth made by the test, as a CNI plugin leaves it."""

import json
import subprocess

import pytest
from harness import leaks
from live_pods import Pod
from pod_netns import Namespace
from pod_netns import Pod as PodNetwork

pytestmark = pytest.mark.vm

OUTSIDE, INSIDE = "10.88.0.1", "10.88.0.2"
MTU = 1400


@pytest.fixture(scope="module")
def network():
    """A namespace joined to a world outside by eth0, with a route and an MTU of its own."""
    with PodNetwork() as network:
        network.ip(f"link set eth0 mtu {MTU}")
        network.outside.ip(f"link set out0 mtu {MTU}")
        network.ip(f"route add default via {OUTSIDE}")
        network.ip("route add 192.0.2.0/24 via 10.88.0.7")
        network.ip("-6 addr add fd00:88::2/64 dev eth0 nodad")
        network.outside.ip("-6 addr add fd00:88::1/64 dev out0 nodad")
        yield network


@pytest.fixture(scope="module")
def networked(daemon, network, name):
    """A pod in that namespace, for all tests; its end must leave the namespace as it was."""
    before = network.picture()
    with Pod(daemon, name("pod"), options=["--with-ns", f"network:{network.path}"]) as pod:
        assert network.picture() != before
        yield pod
    assert network.picture() == before


@pytest.fixture
def inside(daemon, networked, name):
    """``inside("ip addr")``: what a command in the pod prints."""
    def run(command, code=0):
        return daemon.ctr("task", "exec", "--exec-id", name("e"), networked.name, "sh", "-c", command,
                          code=code).out
    return run


def test_the_card_has_the_names_the_namespace_gave(inside, network):
    said = inside("ip addr show dev eth0")
    link = network.link("eth0")
    assert f"mtu {MTU}" in said and f"{INSIDE}/24" in said and "fd00:88::2/64" in said
    mac = json.loads(network.ip("-j link show eth0"))[0]["address"]
    assert mac in said and link.mtu == MTU


def test_routes_are_those_of_the_namespace(inside):
    routes = inside("ip route").splitlines()
    assert any(route.startswith(f"default via {OUTSIDE} dev eth0") for route in routes), routes
    assert any(route.startswith("192.0.2.0/24 via 10.88.0.7 dev eth0") for route in routes), routes


def test_the_host_reaches_the_container(inside, network):
    network.outside.run(f"ping -c 2 -W 5 {INSIDE}")


def fetched(url):
    """A command that gets a URL into /tmp/got, from a server that may need a moment."""
    return f"for i in $(seq 50); do wget -q -O /tmp/got {url} && exit 0; sleep 0.1; done; exit 1"


def test_the_host_reaches_a_server_in_the_container(inside, networked, network, name):
    networked.run(name(), "sh", "-c", "mkdir /www; echo from the guest >/www/x; exec httpd -f -p 8080 -h /www",
                  options=["-d"])
    inside(fetched("http://127.0.0.1:8080/x"))
    assert network.outside.run(f"busybox wget -q -O - http://{INSIDE}:8080/x") == "from the guest\n"


def test_the_container_reaches_a_server_on_the_host(inside, network, tmp_path):
    """With more than fits into any buffer on the way."""
    content = "0123456789abcdef" * 65536
    (tmp_path / "x").write_text(content)
    server = subprocess.Popen(["ip", "netns", "exec", network.outside.name, "busybox", "httpd", "-f", "-p",
                               f"{OUTSIDE}:8081", "-h", tmp_path])
    try:
        inside(fetched(f"http://{OUTSIDE}:8081/x"))
        assert inside("wc -c </tmp/got").strip() == str(len(content))
    finally:
        server.kill()
        server.wait(10)


def test_packets_of_the_full_size_pass(inside):
    inside(f"ping -c 1 -W 5 -s {MTU - 28} {OUTSIDE}")


def test_ipv6_works_too(inside, network):
    network.outside.run("ping -6 -c 1 -W 5 fd00:88::2")


def test_a_member_has_the_pods_network(networked, name):
    said = networked.run(name(), "ip", "addr", "show", "dev", "eth0", options=["--rm"]).out
    assert f"{INSIDE}/24" in said


def test_the_hosts_network_is_refused(daemon, name):
    result = daemon.run(name(), "true", options=["--rm", "--net-host"], check=False)
    assert result.code == 1
    assert "host's network" in result.err


def test_a_namespace_that_is_not_there_is_named(daemon, name):
    result = daemon.run(name(), "true", options=["--rm", "--with-ns", "network:/run/netns/no-such"], check=False)
    assert result.code == 1
    assert "/run/netns/no-such" in result.err


def test_an_empty_namespace_is_no_error_and_is_left_alone(daemon, name):
    with Namespace("empty") as empty:
        before = leaks.snapshot(scope=("kata",), netns=[empty.path])
        said = daemon.run(name(), "ip", "-o", "link", options=["--rm", "--with-ns", f"network:{empty.path}"]).out
        assert "lo" in said and "eth0" not in said
        assert not [thing for thing in leaks.wait_clean(before, 5) if empty.path in thing]


