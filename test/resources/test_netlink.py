import errno
import os
import socket
import struct
import subprocess
import sys
import threading

import gevent
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pod_netns import Namespace, Pod

from katashim import errors
from katashim.resources import netlink, netns
from katashim.resources.netlink import Malformed, NetlinkError, Rtnetlink, codec, records, tc


@pytest.fixture
def pod():
    with Pod() as pod:
        yield pod


@pytest.fixture
def kernel(pod):
    with Rtnetlink(pod.path) as kernel:
        yield kernel


# -- the codec ----------------------------------------------------------------------------------------

ATTRIBUTES = st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=8)


@given(ATTRIBUTES, st.binary(max_size=3))
def test_attributes_come_back_as_they_were(pairs, rest):
    data = b"".join(codec.attribute(kind, payload) for kind, payload in pairs)
    assert codec.attributes(data) == pairs
    assert codec.attributes(b"head" + data + rest, 4) == pairs
    (kind, inner), = codec.attributes(codec.nested(7, data))
    assert kind == 7 and codec.attributes(inner) == pairs


@given(st.binary(max_size=200))
@example(struct.pack("=HH", 3, 1))
@example(struct.pack("=HH", 9, 1) + b"abcd")
def test_attributes_of_any_bytes_are_inside_of_them_or_malformed(data):
    try:
        found = codec.attributes(data)
    except Malformed:
        return
    assert all(payload in data for _, payload in found)
    # Nothing but padding and a rest too short for a header is left out.
    assert sum(4 + len(payload) + -len(payload) % 4 for _, payload in found) + 3 >= len(data)


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF),
                          st.binary(max_size=20).map(lambda data: data + bytes(-len(data) % 4))), max_size=5))
def test_messages_come_back_as_they_were(rows):
    assert codec.messages(b"".join(codec.message(*row) for row in rows)) == rows


@given(st.binary(max_size=120))
def test_messages_of_any_bytes_are_malformed_or_readable(data):
    try:
        found = codec.messages(data)
    except Malformed:
        return
    for reply in found:
        try:
            codec.acknowledgement(reply)
        except Malformed:
            pass


@pytest.mark.parametrize("decode, head", [
    (records.link, records.IFINFO), (records.address, records.IFADDR), (records.route, records.RTMSG),
    (records.neighbour, records.NDMSG), (tc.qdisc, struct.Struct("20s")), (tc.redirects, struct.Struct("20s"))])
def test_records_of_bad_messages_are_malformed(decode, head):
    # Attribute numbers are small, so that a fair share of them means something to the decoder.
    bodies = st.lists(st.tuples(st.integers(0, 30), st.binary(max_size=24)), max_size=6).map(
        lambda pairs: b"".join(codec.attribute(*pair) for pair in pairs))

    @given(st.sampled_from([0, socket.AF_INET, socket.AF_INET6, 255]), st.binary(min_size=30, max_size=30),
           st.one_of(bodies, st.binary(max_size=60)))
    def check(family, fixed, body):
        try:
            decode((bytes([family]) + fixed)[:head.size] + body)
        except Malformed:
            pass

    check()
    with pytest.raises(Malformed):
        decode(bytes(head.size - 1))


def test_a_gateway_of_another_family_and_a_bad_one():
    def via(payload):
        head = records.RTMSG.pack(socket.AF_INET, 0, 0, 0, 254, 3, 0, 1, 0)
        return records.route(head + codec.attribute(18, payload))
    assert via(struct.pack("=H", socket.AF_INET6) + socket.inet_pton(socket.AF_INET6, "fe80::1")).gateway == "fe80::1"
    assert via(struct.pack("=H", 28) + b"mpls").gateway == ""
    for bad in (b"", b"\2", struct.pack("=H", socket.AF_INET) + b"abc"):
        with pytest.raises(Malformed):
            via(bad)


# -- a scripted kernel --------------------------------------------------------------------------------

LINK = records.IFINFO.pack(0, 1, 7, 0, 0) + codec.text(records.IFLA_IFNAME, "eth7")
DONE = struct.pack("=i", 0)


class Script:
    """The other end of a connection: replies are laid ready before the request that they answer."""

    def __enter__(self):
        ours, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection = Rtnetlink(sock=ours, timeout_s=0.05)
        return self

    def __exit__(self, *error):
        self.connection.close()
        self._far.close()

    def reply(self, *messages):
        self._far.send(b"".join(codec.message(*message) for message in messages))


def error(number, words=None, flags=0):
    echoed = codec.message(16, 0, 1, b"request!")
    body = struct.pack("=i", -number) + (echoed[:16] if flags & codec.NLM_F_CAPPED else echoed)
    return body + (codec.text(1, words) if words else b"")


def test_an_interrupted_dump_is_read_again():
    with Script() as script:
        script.reply((16, codec.NLM_F_MULTI, 1, LINK), (16, codec.NLM_F_MULTI | codec.NLM_F_DUMP_INTR, 1, LINK))
        script.reply((codec.NLMSG_DONE, codec.NLM_F_MULTI, 1, DONE))
        script.reply((16, codec.NLM_F_MULTI, 2, LINK), (codec.NLMSG_DONE, codec.NLM_F_MULTI, 2, DONE))
        assert [link.name for link in script.connection.links()] == ["eth7"]


def test_a_dump_that_never_comes_to_rest_is_given_up():
    with Script() as script:
        for sequence in range(1, 41):
            script.reply((codec.NLMSG_DONE, codec.NLM_F_DUMP_INTR, sequence, DONE))
        with pytest.raises(errors.Unavailable, match="listing links"):
            script.connection.links()


@pytest.mark.parametrize("kind", [codec.NLMSG_DONE, codec.NLMSG_ERROR])
def test_a_refused_dump_is_an_error(kind):
    with Script() as script:
        body = struct.pack("=i", -errno.EPERM) if kind == codec.NLMSG_DONE else error(errno.EPERM)
        script.reply((kind, 0, 1, body))
        with pytest.raises(NetlinkError, match="listing routes in .*: Operation not permitted") as caught:
            script.connection.routes()
        assert (caught.value.errno, caught.value.code) == (errno.EPERM, errors.PERMISSION_DENIED)


@pytest.mark.parametrize("flags", [0, codec.NLM_F_CAPPED])
def test_the_kernels_words_are_in_the_error(flags):
    with Script() as script:
        flags |= codec.NLM_F_ACK_TLVS
        script.reply((codec.NLMSG_ERROR, flags, 1, error(errno.EINVAL, "mtu is too odd", flags)))
        with pytest.raises(NetlinkError, match="setting mtu 7 on the link eth7 .*Invalid argument: mtu is too odd"):
            script.connection.set_link("eth7", mtu=7)


def test_a_late_reply_to_a_request_given_up_is_dropped():
    with Script() as script:
        with pytest.raises(errors.DeadlineExceeded, match="deleting the link eth7 .*no answer from the kernel"):
            script.connection.delete_link("eth7")
        script.reply((codec.NLMSG_ERROR, 0, 1, error(errno.EBUSY)))
        script.reply((codec.NLMSG_ERROR, 0, 2, error(0)))
        script.connection.delete_link("eth7")


def test_an_answer_that_was_cut_off_is_malformed():
    with Script() as script:
        script.reply((16, 0, 1, bytes(70000)))
        with pytest.raises(Malformed, match="over 65536 bytes"):
            script.connection.links()


def test_a_closed_connection_is_an_error_with_a_name():
    with Script() as script:
        script.connection.close()
        with pytest.raises(errors.Internal, match="listing links"):
            script.connection.links()


# -- the real kernel ----------------------------------------------------------------------------------

def test_links_are_told_as_they_are(pod, kernel):
    pod.ip("link set eth0 mtu 1234")
    pod.ip("link add br0 type bridge")
    pod.add_veth("eth1", "out1")
    pod.ip("link set eth1 master br0")
    links = {link.name: link for link in kernel.links()}
    assert set(links) == {"lo", "eth0", "br0", "eth1"}
    assert links["lo"].is_loopback and links["lo"].is_up and links["lo"].kind == ""
    assert links["eth0"] == kernel.link("eth0") and links["eth0"].kind == "veth" and links["eth0"].mtu == 1234
    assert links["eth0"].mac in pod.ip("link show eth0") and not links["eth0"].is_loopback
    assert links["eth1"].master == links["br0"].index and links["br0"].kind == "bridge" and not links["br0"].is_up
    assert links["eth0"].type == 1 and links["lo"].type == 772
    with Rtnetlink(pod.outside.path) as outside:
        assert links["eth0"].parent == outside.link("out0").index
    assert kernel.link("nothing") is None


def test_links_are_changed(pod, kernel):
    kernel.set_link("eth0", up=False, mtu=1300)
    kernel.set_link("eth0", mac="02:00:00:00:00:77")
    link = kernel.link("eth0")
    assert (link.mtu, link.mac, link.is_up) == (1300, "02:00:00:00:00:77", False)
    kernel.add_link("mac0", "macvlan", parent=link.index, mac="02:00:00:00:00:78")
    assert kernel.link("mac0").parent == link.index and kernel.link("mac0").mac == "02:00:00:00:00:78"
    with pytest.raises(ValueError, match="not a MAC"):
        kernel.set_link("eth0", mac="02:00")


def test_a_thousand_addresses_fit(pod, kernel):
    """More than one datagram of the kernel's holds."""
    commands = "".join(f"addr add 10.{index // 250}.7.{index % 250}/32 dev lo\n" for index in range(1000))
    subprocess.run(["ip", "-n", pod.name, "-batch", "-"], input=commands, text=True, check=True)
    lo = kernel.link("lo").index
    assert len([address for address in kernel.addresses() if address.index == lo and address.prefix == 32]) == 1000


def test_a_table_under_change_is_read_whole(kernel, pod):
    """The kernel marks some of these dumps as interrupted; each that is returned must be complete."""
    commands = "".join(f"addr add 10.{index // 250}.7.{index % 250}/32 dev lo\n" for index in range(1000))
    subprocess.run(["ip", "-n", pod.name, "-batch", "-"], input=commands, text=True, check=True)
    changes = [f"addr {verb} 192.0.2.1/32 dev eth0" for verb in ("add", "del")] * 20
    writer = threading.Thread(target=lambda: [pod.ip(change) for change in changes])
    writer.start()
    try:
        readings = 0
        while writer.is_alive():
            found = {entry.address for entry in kernel.addresses() if ".7." in entry.address}
            assert len(found) == 1000
            readings += 1
        assert readings > 0
    finally:
        writer.join()


def test_addresses_are_told_as_they_are(pod, kernel):
    pod.ip("addr add 10.1.2.3 peer 10.1.2.4/32 dev eth0")
    pod.ip("addr add fd01::5/64 dev eth0 nodad")
    eth0 = kernel.link("eth0").index
    found = {(entry.index, entry.address): entry for entry in kernel.addresses()}
    ptp = found[eth0, "10.1.2.3"]
    assert (ptp.prefix, ptp.peer, ptp.family) == (32, "10.1.2.4", socket.AF_INET)
    six = found[eth0, "fd01::5"]
    assert (six.prefix, six.peer, six.family, six.is_loopback) == (64, "", socket.AF_INET6, False)
    assert found[1, "127.0.0.1"].is_loopback and found[1, "::1"].is_loopback


def test_routes_are_told_as_they_are(pod, kernel):
    for command in ("route add 10.1.0.0/16 via 10.88.0.1 dev eth0 mtu 1350 metric 42 src 10.88.0.2 proto static",
                    "route add 10.2.0.0/16 via 192.0.2.9 dev eth0 onlink table 1000",
                    "route add unreachable 10.3.0.0/16",
                    "route add 10.4.0.0/16 via inet6 fe80::9 dev eth0",
                    "route add 10.5.0.0/16 nexthop via 10.88.0.5 dev eth0 nexthop via 10.88.0.6 dev eth0"):
        pod.ip(command)
    eth0 = kernel.link("eth0").index
    found = {route.dst: route for route in kernel.routes()}
    assert found["10.1.0.0/16"] == netlink.Route(
        socket.AF_INET, "10.1.0.0/16", "10.88.0.1", "10.88.0.2", "", eth0, 0, 42, 1350, 4)
    assert (found["10.2.0.0/16"].table, found["10.2.0.0/16"].flags & 4) == (1000, 4)
    assert (found["10.3.0.0/16"].type, found["10.3.0.0/16"].index) == (7, 0)
    assert found["10.4.0.0/16"].gateway == "fe80::9"
    hops = found["10.5.0.0/16"]
    assert (hops.hops, hops.gateway, hops.index) == (2, "10.88.0.5", eth0)
    assert found["10.88.0.0/24"].protocol == netlink.RTPROT_KERNEL and found["10.88.0.0/24"].scope == 253


def test_neighbours_are_told_as_they_are(pod, kernel):
    pod.ip("neigh add 10.88.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent")
    pod.ip("-6 neigh add fd01::9 lladdr 02:00:00:00:00:09 dev eth0 router nud permanent")
    eth0 = kernel.link("eth0").index
    permanent = {entry for entry in kernel.neighbours() if entry.state == netlink.NUD_PERMANENT}
    assert permanent == {
        netlink.Neighbour(eth0, socket.AF_INET, "10.88.0.9", "02:00:00:00:00:09", 0x80, 0),
        netlink.Neighbour(eth0, socket.AF_INET6, "fd01::9", "02:00:00:00:00:09", 0x80, 0x80)}


def test_redirects_are_what_tc_shows(pod, kernel):
    fds = netlink.open_tap(pod.path, "tap9")
    eth0, tap = kernel.link("eth0"), kernel.link("tap9")
    for link, other in ((eth0, tap), (tap, eth0)):
        kernel.add_ingress(link)
        kernel.redirect(link, other)
        shown = pod.run(f"tc filter show dev {link.name} ingress")
        assert "protocol all" in shown and "match 00000000/00000000 at 0" in shown
        assert f"mirred (Egress Redirect to device {other.name}) stolen" in shown
        redirect, = kernel.redirects(link)
        assert redirect == tc.Redirect(link.index, other.index, tc.ETH_P_ALL, redirect.packets)
    with pytest.raises(NetlinkError, match="adding the ingress qdisc of eth0 .*File exists") as caught:
        kernel.add_ingress(eth0)
    assert caught.value.code == errors.ALREADY_EXISTS
    kernel.delete_ingress(eth0)
    assert [qdisc.kind for qdisc in kernel.qdiscs(eth0.index)] == ["noqueue"]
    netlink.close_all(fds)
    assert kernel.link("tap9") is None and fds == []


def test_filters_of_other_kinds_are_passed_over(pod, kernel):
    pod.run("tc qdisc add dev eth0 ingress")
    pod.run("tc filter add dev eth0 parent ffff: protocol ip u32 match u32 0 0 flowid 1:1")
    pod.run("tc filter add dev eth0 parent ffff: protocol ip u32 match u32 0 0 action mirred egress mirror dev lo")
    assert kernel.redirects(kernel.link("eth0")) == []


def test_where_a_device_sits(kernel):
    assert kernel.bus_info("eth0") == "" and kernel.bus_info("lo") == ""
    with pytest.raises(errors.NotFound, match="nothing"):
        kernel.bus_info("nothing")


@pytest.mark.parametrize("act, code", [
    (lambda kernel: kernel.set_link("nothing", up=True), errors.NOT_FOUND),
    (lambda kernel: kernel.delete_link("nothing"), errors.NOT_FOUND),
    (lambda kernel: kernel.add_veth("eth0", "peer"), errors.ALREADY_EXISTS),
    (lambda kernel: kernel.add_link("odd", "no-such-kind"), errors.UNIMPLEMENTED)])
def test_errors_have_codes_that_containerd_reads(kernel, act, code):
    with pytest.raises(NetlinkError) as caught:
        act(kernel)
    assert caught.value.code == code and kernel.where in str(caught.value)


def test_two_processes_cannot_have_one_tap(pod):
    fds = netlink.open_tap(pod.path, "tap9")
    with pytest.raises(errors.AlreadyExists, match="tap9"):
        netlink.open_tap(pod.path, "tap9")
    netlink.close_all(fds)


def test_a_tap_that_cannot_be_made_leaves_no_descriptor(pod):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(errors.FailedPrecondition, match="bad/name"):
        netlink.open_tap(pod.path, "bad/name")
    assert len(os.listdir("/proc/self/fd")) == before


# -- releases -----------------------------------------------------------------------------------------

def test_releases_succeed_when_there_is_nothing(pod, kernel):
    for _ in range(2):
        netlink.delete_ingress(pod.path, "eth0")
        netlink.delete_link(pod.path, "eth0")
        assert kernel.link("eth0") is None
    netlink.delete_link("/run/netns/there-is-none", "eth0")
    netlink.delete_ingress("/proc/0/ns/net", "eth0")
    netlink.delete_link("/etc/passwd", "eth0")


def test_releases_leave_a_clsact_alone(pod, kernel):
    pod.run("tc qdisc add dev eth0 clsact")
    netlink.delete_ingress(pod.path, "eth0")
    assert "clsact" in [qdisc.kind for qdisc in kernel.qdiscs(kernel.link("eth0").index)]


def test_releases_check_whose_namespace_it_is(pod, kernel):
    kernel.add_ingress(kernel.link("eth0"))
    _, inode = netns.identity(pod.path)
    netlink.delete_ingress(pod.path, "eth0", inode=inode + 1)
    netlink.delete_link(pod.path, "eth0", inode=inode + 1)
    assert [qdisc for qdisc in kernel.qdiscs(kernel.link("eth0").index) if qdisc.is_ingress]
    netlink.delete_link(pod.path, "eth0", inode=inode)
    assert kernel.link("eth0") is None


def test_a_refused_release_is_an_error(pod):
    with pytest.raises(NetlinkError, match="deleting the link lo"):
        netlink.delete_link(pod.path, "lo")


def test_releases_need_neither_gevent_nor_protobuf():
    """`delete` is a fresh interpreter that must be quick."""
    program = """
import sys
from katashim.resources import releases, cgroup
assert not [name for name in sys.modules if name.partition('.')[0] in ('gevent', 'google', 'asyncio')]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30,
                   env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


# -- namespaces ---------------------------------------------------------------------------------------

def own():
    return os.readlink("/proc/thread-self/ns/net")


def test_a_thread_is_inside_for_the_block_only():
    with Namespace("inside") as inside:
        home = own()
        with netns.entered(inside.path):
            assert own() != home and os.stat("/proc/thread-self/ns/net").st_ino == netns.identity(inside.path)[1]
        assert own() == home
        with pytest.raises(KeyError), netns.entered(inside.path):
            raise KeyError
        assert own() == home
        with netns.entered(None):
            assert own() == home
        with pytest.raises(errors.NotFound, match="not the network namespace 1 any more"), \
                netns.entered(inside.path, inode=1):
            pass
        assert own() == home


def test_entering_leaks_no_descriptor():
    with Namespace("inside") as inside:
        before = len(os.listdir("/proc/self/fd"))
        with netns.entered(inside.path):
            pass
        for bad in ("/etc/passwd", "/run/netns/there-is-none"):
            with pytest.raises(errors.NotFound, match=bad), netns.entered(bad):
                pass
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_connection_outlives_the_name_of_its_namespace():
    with Namespace("gone") as gone:
        kernel = Rtnetlink(gone.path)
    assert not os.path.exists(gone.path)
    with kernel:
        assert [link.name for link in kernel.links()] == ["lo"]


def test_a_namespace_is_made_and_removed_by_name():
    path = f"/run/netns/katashim-test-made-{os.getpid()}"
    try:
        home = own()
        netns.create(path)
        assert own() == home and not netns.is_own(path) and netns.is_own("/proc/self/ns/net")
        with pytest.raises(errors.FailedPrecondition, match="exists"):
            netns.create(path)
    finally:
        netns.remove(path)
    netns.remove(path)
    with pytest.raises(errors.NotFound):
        netns.identity(path)


def test_it_works_in_a_patched_process(pod):
    """In the daemon, from a greenlet and from a native thread, without a hub in that thread."""
    done = subprocess.run([sys.executable, "-c", f"""
from katashim import green
green.patch()
from katashim.resources.netlink import Rtnetlink
def names():
    with Rtnetlink({pod.path!r}) as kernel:
        return [link.name for link in kernel.links()]
from gevent._hub_local import get_hub_if_exists
assert green.in_thread(lambda: (names(), get_hub_if_exists()), what="x") == (["lo", "eth0"], None)
assert names() == ["lo", "eth0"]
"""], check=False, timeout=30, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr


def test_reading_never_switches_greenlets(pod):
    """Each greenlet must find its own answer although they share the hub."""
    def read():
        with Rtnetlink(pod.path) as kernel:
            return [link.name for link in kernel.links()]
    jobs = [gevent.spawn(read) for _ in range(20)]
    assert gevent.joinall(jobs, timeout=5) and all(job.value == ["lo", "eth0"] for job in jobs)
