"""The pod's network through the agent's RPCs: in its own network namespace, on veth pairs made by the
test."""

import subprocess

import pytest
from plain_client import Refused

from katashim.ttrpc import proto


class Net:
    """The agent's network namespace, changed and read by iproute2."""

    def __init__(self, agent):
        self._enter = ["nsenter", f"--net={agent.namespace('net')}"]

    def ip(self, *words):
        return subprocess.run([*self._enter, "ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def net(host_agent):
    """With a veth pair: `a0` of a known MAC address, and `b0`."""
    made = Net(host_agent)
    made.ip("link", "set", "lo", "up")
    made.ip("link", "add", "a0", "address", "02:00:00:00:00:0a", "type", "veth", "peer", "name", "b0")
    made.ip("link", "set", "b0", "up")
    yield made
    made.ip("link", "del", "b0")


def interface(name="a0", mac="02:00:00:00:00:0a", addresses=(("10.9.0.2", "24"),), **fields):
    return {"device": name, "name": name, "hwAddr": mac, "mtu": 1500,
            "IPAddresses": [{"family": int(":" in address), "address": address, "mask": mask}
                            for address, mask in addresses], **fields}


def test_an_interface_gets_its_name_addresses_and_mtu(client, net):
    wanted = interface("eth0", addresses=(("10.9.0.2", "24"), ("fd00::2", "64")), mtu=1400)
    answer = client.call("UpdateInterface", interface=wanted)
    assert (answer.name, answer.hwAddr, answer.mtu) == ("eth0", "02:00:00:00:00:0a", 1400)
    text = net.ip("addr", "show", "eth0")
    assert "10.9.0.2/24" in text
    assert "fd00::2/64" in text
    assert "mtu 1400" in text
    assert ",UP" in text


def test_the_same_again_changes_nothing(client, net):
    for _ in range(3):
        client.call("UpdateInterface", interface=interface("eth0"))
    assert net.ip("addr", "show", "eth0").count("10.9.0.2/24") == 1


def test_addresses_that_were_there_stay(client, net):
    client.call("UpdateInterface", interface=interface())
    client.call("UpdateInterface", interface=interface(addresses=(("10.9.0.3", "24"),)))
    text = net.ip("addr", "show", "a0")
    assert "10.9.0.2/24" in text
    assert "10.9.0.3/24" in text


def test_a_name_that_another_interface_has_is_taken_over(client, net):
    client.call("UpdateInterface", interface=interface("b0"))
    assert "02:00:00:00:00:0a" in net.ip("link", "show", "b0")
    assert "b0_temp" in net.ip("link")
    net.ip("link", "set", "b0", "down")
    net.ip("link", "set", "b0", "name", "a0")
    net.ip("link", "set", "b0_temp", "down")
    net.ip("link", "set", "b0_temp", "name", "b0")


def test_an_interface_without_arp(client, net):
    client.call("UpdateInterface", interface=interface(raw_flags=0x80))
    assert "NOARP" in net.ip("link", "show", "a0")


def test_an_interface_of_another_mac_is_found_by_name_and_gets_it(client, net):
    client.call("UpdateInterface", interface=interface(mac="02:00:00:00:00:0b"))
    assert "02:00:00:00:00:0b" in net.ip("link", "show", "a0")


@pytest.mark.parametrize(("wanted", "words"), [
    (interface("nope", "02:00:00:00:00:ff"), r"Link not found \(Address: 02:00:00:00:00:ff\)"),
    (interface(mac="nonsense"), "is no MAC address"),
    (interface(addresses=(("300.1.1.1", "24"),)), "is no IP address"),
    (interface(devicePath="1f/1f"), "Timeout after 1s waiting for the network device at PCI path 1f/1f"),
    (interface(devicePath="../x"), "is no PCI path")])
def test_impossible_interfaces(client, net, wanted, words):
    with pytest.raises(Refused, match=words):
        client.call("UpdateInterface", interface=wanted)


def test_routes_are_added_whatever_their_order(client, net):
    client.call("UpdateInterface", interface=interface())
    answer = client.call("UpdateRoutes", routes={"Routes": [
        {"dest": "", "gateway": "10.9.1.1", "device": "a0"},
        {"dest": "10.9.1.1/32", "device": "a0", "scope": 253, "source": "10.9.0.2"},
        {"dest": "10.77.0.0/16", "gateway": "10.9.0.1", "device": "a0", "mtu": 1300}]})
    text = " ".join(net.ip("route").split())
    assert "default via 10.9.1.1 dev a0" in text
    assert "10.9.1.1 dev a0 scope link src 10.9.0.2" in text
    assert "10.77.0.0/16 via 10.9.0.1 dev a0 mtu 1300" in text
    routes = {(route.dest, route.gateway) for route in answer.Routes}
    assert {("0.0.0.0", "10.9.1.1"), ("10.9.1.1", ""), ("10.77.0.0/16", "10.9.0.1")} <= routes
    # The kernel adds a link's IPv6 routes when it likes.
    listed = [route for route in client.call("ListRoutes").Routes if route.family == 0]
    assert [route for route in answer.Routes if route.family == 0] == listed


def test_routes_for_ipv6(client, net):
    client.call("UpdateInterface", interface=interface(addresses=(("fd00::2", "64"),)))
    client.call("UpdateRoutes", routes={"Routes": [
        {"dest": "", "gateway": "fd00::1", "device": "a0", "family": 1},
        {"dest": "fd77::/64", "gateway": "fd00::1", "device": "a0", "family": 1}]})
    text = net.ip("-6", "route")
    assert "default via fd00::1 dev a0" in text
    assert "fd77::/64 via fd00::1 dev a0" in text


def test_a_route_by_an_interface_that_is_not_there(client, net):
    with pytest.raises(Refused, match="'nope'"):
        client.call("UpdateRoutes", routes={"Routes": [{"dest": "10.0.0.0/8", "device": "nope"}]})


def test_neighbours(client, net):
    client.call("UpdateInterface", interface=interface())
    for mac in ("02:00:00:00:00:01", "02:00:00:00:00:02"):
        client.call("AddARPNeighbors", neighbors={"ARPNeighbors": [
            {"toIPAddress": {"address": "10.9.0.1"}, "device": "a0", "lladdr": mac}]})
    assert net.ip("neigh").split("\n")[0].strip() == "10.9.0.1 dev a0 lladdr 02:00:00:00:00:02 PERMANENT"


def test_interfaces_are_listed(client, net):
    client.call("UpdateInterface", interface=interface())
    found = {item.name: item for item in client.call("ListInterfaces").Interfaces}
    assert {"lo", "a0", "b0"} <= set(found)
    assert (found["a0"].hwAddr, found["a0"].mtu) == ("02:00:00:00:00:0a", 1500)
    assert ("10.9.0.2", "24") in {(item.address, item.mask) for item in found["a0"].IPAddresses}
    assert found["a0"].IPAddresses[0] == proto.build(
        proto.get("types.IPAddress"), family=0, address="10.9.0.2", mask="24")


def test_requests_without_content(client):
    for method in ("UpdateInterface", "UpdateRoutes", "AddARPNeighbors"):
        with pytest.raises(Refused, match="^3: .*empty"):
            client.call(method)
