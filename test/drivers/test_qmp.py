"""QMP: against a scripted peer that sends any bytes, and against a real QEMU without a guest."""

import array
import contextlib
import json
import os
import subprocess

import gevent
import pytest
from gevent import socket
from gevent.event import Event

from katashim.drivers import qmp as qmp_module
from katashim.drivers.qmp import Qmp, dial, listen
from katashim.errors import (
    ConnectionClosed,
    DeadlineExceeded,
    HypervisorError,
    InvalidArgument,
    QmpError,
    Unavailable,
)

LONG = 10
GREETING = b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}\r\n'
QEMU = "/usr/bin/qemu-system-x86_64"


class Peer:
    """The QEMU end of one connection, scripted."""

    def __init__(self, sock):
        self.sock = sock
        self.lines = sock.makefile("rb")

    def negotiate(self):
        self.send(GREETING)
        self.reply({})

    def command(self):
        """The next command as a dict."""
        return json.loads(self.lines.readline())

    def reply(self, value):
        command = self.command()
        self.say({"return": value, "id": command["id"]})
        return command

    def say(self, message):
        self.send(json.dumps(message).encode() + b"\r\n")

    def send(self, data):
        self.sock.sendall(data)

    def hang_up(self):
        self.lines.close()
        self.sock.close()


@pytest.fixture
def scripted():
    """``scripted(script, ...)`` -> Qmp whose n-th connection is served by the n-th script(peer)."""
    cleanup = []

    def make(*scripts):
        queue = list(scripts)

        def connect():
            ours, theirs = socket.socketpair()
            peer = Peer(theirs)
            cleanup.append(gevent.spawn(queue.pop(0), peer))
            peers.append(peer)
            return ours

        peers = []
        qmp = Qmp("QEMU of sandbox x", connect)
        made.append((qmp, peers))
        return qmp

    made = []
    yield make
    for qmp, peers in made:
        qmp.close("the test is over")
        for peer in peers:
            peer.hang_up()
    gevent.killall(cleanup, timeout=LONG)


def negotiated(rest):
    def script(peer):
        peer.negotiate()
        rest(peer)
    return script


# -- scripted -------------------------------------------------------------------------------------
def test_a_command_carries_its_arguments_and_an_id(scripted):
    seen = []
    qmp = scripted(negotiated(lambda peer: seen.append(peer.reply({"status": "running"}))))
    assert qmp.execute("device_add", driver="x", **{"core-id": 1}) == {"status": "running"}
    assert seen[0]["execute"] == "device_add"
    assert seen[0]["arguments"] == {"driver": "x", "core-id": 1}
    assert seen[0]["id"] is not None


def test_a_refusal_is_a_qmp_error_and_the_connection_goes_on(scripted):
    def script(peer):
        command = peer.command()
        peer.say({"id": command["id"], "error": {"class": "DeviceNotFound", "desc": "Device 'x' not found"}})
        peer.reply("still here")

    qmp = scripted(negotiated(script))
    with pytest.raises(QmpError) as caught:
        qmp.execute("device_del", id="x")
    assert (caught.value.cls, caught.value.desc) == ("DeviceNotFound", "Device 'x' not found")
    assert caught.value.sent["arguments"] == {"id": "x"}
    assert qmp.execute("next") == "still here"


def test_replies_and_events_may_be_split_and_joined_at_any_byte(scripted):
    def script(peer):
        command = peer.command()
        text = b'{"event": "STOP"}\r\n' + json.dumps({"return": 7, "id": command["id"]}).encode() \
            + b'\r\n{"event": "RESUME", "timestamp": {"seconds": 5, "microseconds": 500000}}\r\n'
        for at in range(len(text)):
            peer.send(text[at:at + 1])
            gevent.sleep(0)

    qmp = scripted(negotiated(script))
    with qmp.subscribe() as events:
        assert qmp.execute("x") == 7
        assert events.wait(LONG).name == "STOP"
        assert events.wait(LONG) == ("RESUME", {}, 5.5)


def test_events_arrive_with_no_command_in_flight(scripted):
    go = Event()

    def script(peer):
        go.wait()
        peer.say({"event": "DEVICE_DELETED", "data": {"path": "/machine/peripheral/a/virtio-backend"}})
        peer.say({"event": "DEVICE_DELETED", "data": {"device": "b"}})
        peer.say({"event": "DEVICE_DELETED", "data": {"device": "a", "path": "/machine/peripheral/a"}})

    qmp = scripted(negotiated(script))
    qmp.open(LONG)
    with qmp.subscribe("DEVICE_DELETED", match={"device": "a"}) as events:
        go.set()
        assert events.wait(LONG).data["path"] == "/machine/peripheral/a"


def test_wait_event_names_what_it_waited_for(scripted):
    qmp = scripted(negotiated(lambda peer: None))
    qmp.open(LONG)
    with pytest.raises(DeadlineExceeded, match=r"DEVICE_DELETED \{'device': 'a'\} from QEMU of sandbox x"):
        qmp.wait_event("DEVICE_DELETED", {"device": "a"}, 0.01)


def test_waiting_for_an_event_ends_when_the_channel_is_closed(scripted):
    qmp = scripted(negotiated(lambda peer: None))
    qmp.open(LONG)
    waiting = gevent.spawn(qmp.wait_event, "NEVER", None, LONG)
    gevent.sleep(0)
    qmp.close("QEMU died")
    waiting.join(LONG)
    assert isinstance(waiting.exception, ConnectionClosed)


def test_the_late_reply_of_a_timed_out_command_is_never_read(scripted):
    def slow(peer):
        peer.command()          # and no answer

    qmp = scripted(negotiated(slow), negotiated(lambda peer: peer.reply("fresh")))
    with pytest.raises(DeadlineExceeded, match="QEMU of sandbox x to answer 'blockdev-add'"):
        qmp.execute("blockdev-add", timeout_s=0.05)
    assert qmp.execute("next") == "fresh"


def test_a_killed_caller_does_not_disturb_the_next(scripted):
    arrived = Event()

    def slow(peer):
        peer.command()
        arrived.set()

    qmp = scripted(negotiated(slow), negotiated(lambda peer: peer.reply("fresh")))
    victim = gevent.spawn(qmp.execute, "query-pci")
    assert arrived.wait(LONG)
    victim.kill(timeout=LONG)
    assert qmp.execute("next") == "fresh"


@pytest.mark.parametrize(("data", "says"), [
    (b"HTTP/1.1 400 Bad Request\r\n", "what is not a JSON object: b'HTTP/1.1 400"),
    (b"[" * 100000 + b"\n", "what is not a JSON object"),
    (b"\xff\xfe\n", "what is not a JSON object"),
    (b"[1]\n", "what is not a JSON object"),
    (b'{"hello": 1}\n', "what is not QMP"),
    (b'{"return": {}, "id": 99}\n', "answered what nobody asked"),
], ids=["http", "deep", "not-utf8", "list", "no-member", "surplus"])
def test_what_is_not_qmp_is_a_clear_error(scripted, data, says):
    def script(peer):
        peer.command()
        peer.send(data)

    qmp = scripted(negotiated(script), negotiated(lambda peer: peer.reply("fresh")))
    with pytest.raises(HypervisorError, match=says):
        qmp.execute("x", timeout_s=LONG)
    assert qmp.execute("next") == "fresh"


def test_a_greeting_that_is_not_qmps(scripted):
    qmp = scripted(lambda peer: peer.say({"return": {}}))
    with pytest.raises(HypervisorError, match="that is not QMP"):
        qmp.open(LONG)


def test_an_endless_line_is_refused(scripted, monkeypatch):
    monkeypatch.setattr(qmp_module, "LINE_MAX", 100_000)

    def script(peer):
        peer.command()
        with contextlib.suppress(OSError):
            while True:
                peer.send(b" " * 10_000)

    qmp = scripted(negotiated(script))
    with pytest.raises(HypervisorError, match="a line of more than 100000 bytes"):
        qmp.execute("x", timeout_s=LONG)


def test_qemu_hanging_up_may_have_executed_the_command(scripted):
    def script(peer):
        peer.command()
        peer.hang_up()

    qmp = scripted(negotiated(script))
    with pytest.raises(ConnectionClosed, match="QEMU of sandbox x hung up") as caught:
        qmp.execute("x", timeout_s=LONG)
    assert caught.value.maybe_executed


def test_descriptors_travel_with_the_first_byte(scripted):
    got = []

    def script(peer):
        data, ancillary, _, _ = peer.sock.recvmsg(1, 1024)
        fds = array.array("i", ancillary[0][2])
        command = json.loads(data + peer.lines.readline())
        got.append((command, [os.fstat(fd).st_ino for fd in fds]))
        for fd in fds:
            os.close(fd)
        peer.say({"return": {}, "id": command["id"]})

    qmp = scripted(negotiated(script))
    with open("/dev/null") as one, open("/dev/zero") as two:
        qmp.execute("getfd", send_fds=(one.fileno(), two.fileno()), fdname="tap", timeout_s=LONG)
        assert got[0][0]["arguments"] == {"fdname": "tap"}
        assert got[0][1] == [os.fstat(one.fileno()).st_ino, os.fstat(two.fileno()).st_ino]


def test_a_large_command_is_sent_whole(scripted):
    seen = []
    qmp = scripted(negotiated(lambda peer: seen.append(peer.reply({}))))
    qmp.execute("x", text="a" * 3_000_000, timeout_s=LONG)
    assert len(seen[0]["arguments"]["text"]) == 3_000_000


def test_a_socket_path_that_is_too_long(tmp_path):
    with pytest.raises(InvalidArgument, match="more than 107 bytes"):
        listen(f"{tmp_path}/{'x' * 108}")


def test_dialling_a_path_where_nobody_listens(tmp_path):
    with pytest.raises(Unavailable, match="cannot connect to QEMU's monitor"):
        dial(f"{tmp_path}/none")
    (tmp_path / "file").write_text("not a socket")
    with pytest.raises(Unavailable, match="Connection refused"):
        dial(f"{tmp_path}/file")


# -- the real QEMU, without a guest ---------------------------------------------------------------
@pytest.fixture
def real(tmp_path):
    path = f"{tmp_path}/qmp.sock"
    listener = listen(path)
    argv = [QEMU, "-M", "none", "-nodefaults", "-no-user-config", "-nographic", "-S",
            "-chardev", f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off",
            "-mon", "chardev=qmp,mode=control"]
    process = subprocess.Popen(argv, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL)
    listener.close()
    qmp = Qmp("QEMU", lambda: dial(path))
    yield qmp
    qmp.close("the test is over")
    process.kill()
    process.wait()


def test_real_qemu_answers_refuses_and_sends_events(real):
    assert real.execute("query-version")["qemu"]["major"] >= 6
    with pytest.raises(QmpError) as caught:
        real.execute("no-such-command")
    assert caught.value.cls == "CommandNotFound"
    with real.subscribe("RESUME", "STOP") as events:
        real.execute("cont")
        real.execute("stop")
        assert [events.wait(LONG).name, events.wait(LONG).name] == ["RESUME", "STOP"]


def test_real_qemu_takes_descriptors(real):
    with open("/dev/null") as null:
        real.execute("getfd", send_fds=[null.fileno()], fdname="null")
        real.execute("closefd", fdname="null")
        added = real.execute("add-fd", send_fds=[null.fileno()], opaque="katashim:null")
    sets = real.execute("query-fdsets")
    assert [entry["fdset-id"] for entry in sets] == [added["fdset-id"]]
    assert sets[0]["fds"][0]["opaque"] == "katashim:null"


def test_real_qemu_accepts_a_second_connection_after_a_poisoned_one(real):
    real.execute("query-version")
    with pytest.raises(DeadlineExceeded):
        real.channel.exchange("never ends", lambda connection: Event().wait(), 0.01)
    assert real.execute("query-status")["running"] is False


def test_real_qemu_ends_by_quit(real):
    with real.subscribe("SHUTDOWN") as events:
        real.execute("quit")
        assert events.wait(LONG).data["reason"] == "host-qmp-quit"
    with pytest.raises((ConnectionClosed, Unavailable)):
        while True:             # until the death is noticed, replies may still come
            real.execute("query-status", timeout_s=LONG)
