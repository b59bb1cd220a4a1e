import logging
import time

import gevent
import pytest
from gevent.event import Event
from gevent.socket import AF_UNIX, socket

from katashim import errors, green
from katashim.ttrpc import frame, proto, status
from katashim.ttrpc import server as server_module
from katashim.ttrpc.server import Server

from .raw import TIMEOUT_S, RawPeer

TASK = "containerd.task.v2.Task"
STREAMS = "test.Streams"
Text = proto.get("grpc.CheckRequest")       # any message with one string will do
State = proto.get("containerd.task.v2.StateRequest")
StateResponse = proto.get("containerd.task.v2.StateResponse")


class Task:
    """A handler for a service of unary methods."""

    def __init__(self):
        self.entered = Event()
        self.release = Event()
        self.raised = None
        self.contexts = []

    def State(self, request, context):
        self.contexts.append(context)
        return StateResponse(id=request.id, pid=42)

    def Wait(self, request, context):
        """Waits until released, and remembers how it was interrupted."""
        self.entered.set()
        try:
            self.release.wait()
        except Exception as exc:
            self.raised = exc
            raise
        return proto.get("containerd.task.v2.WaitResponse")(exit_status=7)

    def Start(self, request, context):
        raise errors.NotFound("container c1 does not exist").attach("console", "last words")

    def Delete(self, request, context):
        raise ValueError("a bug")

    def Kill(self, request, context):
        return None

    def Pids(self, request, context):
        return StateResponse()              # the wrong message

    def Stats(self, request, context):
        response = proto.get("containerd.task.v2.StatsResponse")()
        response.stats.value = bytes(frame.MAX_MESSAGE)
        return response

    def Pause(self, request, context):
        raise gevent.Timeout(1)             # leaks out of somebody's `with`


class Streams:
    """A handler for the three kinds of streaming methods."""

    def __init__(self):
        self.closed = Event()
        self.release = Event()
        self.raised = None

    def Download(self, request, context):
        try:
            for index in range(int(request.service)):
                yield Text(service=str(index))
        finally:
            self.closed.set()

    def Endless(self, request, context):
        try:
            while True:
                yield Text(service="x" * 10000)
        except BaseException as exc:
            self.raised = exc
            raise
        finally:
            self.closed.set()

    def FailLate(self, request, context):
        yield Text(service="first")
        raise errors.FailedPrecondition("no more")

    def Upload(self, request, context):
        assert request is None
        return Text(service=",".join(message.service for message in context.stream))

    def Slow(self, request, context):
        try:
            self.release.wait()
        finally:
            self.closed.set()

    def Echo(self, request, context):
        for message in context.stream:
            yield Text(service=message.service.upper())


@pytest.fixture(autouse=True)
def streaming_service(monkeypatch):
    """None of the protocols that we have messages for streams, so the methods are made here."""
    kinds = {"Download": (False, True), "Endless": (False, True), "FailLate": (False, True),
             "Upload": (True, False), "Slow": (True, False), "Echo": (True, True)}
    methods = {name: proto.Method(name, Text, Text, *kind) for name, kind in kinds.items()}
    monkeypatch.setitem(proto._services, STREAMS, methods)


class Rig:
    def __init__(self, path, **options):
        listener = socket(AF_UNIX)
        listener.bind(path)
        listener.listen()
        self.path = path
        self.calls, self.called = [], Event()
        self.task, self.streams = Task(), Streams()
        self.server = Server(listener, {TASK: self.task, STREAMS: self.streams}, name="tester",
                             on_call=self.on_call, **options)
        self.server.start()
        self.peers = []

    def on_call(self, *call):
        self.calls.append(call)
        self.called.set()

    def connect(self):
        sock = socket(AF_UNIX)
        sock.connect(self.path)
        self.peers.append(RawPeer(sock))
        return self.peers[-1]

    def stop(self):
        self.server.stop()
        for peer in self.peers:
            peer.close()


@pytest.fixture
def rig(tmp_path):
    rig = Rig(str(tmp_path / "s"))
    yield rig
    rig.stop()


@pytest.fixture
def peer(rig):
    return rig.connect()


def assert_alive(peer, stream_id):
    """The connection still serves."""
    peer.request(stream_id, TASK, "State", State(id="alive"))
    answered, code, _, payload = peer.recv_status()
    assert (answered, code) == (stream_id, errors.OK)
    assert StateResponse.FromString(payload).id == "alive"


# Unary calls.

def test_a_call_and_its_answer(rig, peer):
    peer.request(1, TASK, "State", State(id="c1"), metadata={"containerd-namespace-ttrpc": "k8s.io"})
    item = peer.recv()
    assert (item.stream_id, item.type, item.flags) == (1, frame.RESPONSE, 0)
    response = proto.decode(status.Response, item.payload)
    assert not response.HasField("status")
    assert StateResponse.FromString(response.payload) == StateResponse(id="c1", pid=42)
    [context] = rig.task.contexts
    assert (context.service, context.method) == (TASK, "State")
    assert context.metadata == {"containerd-namespace-ttrpc": ["k8s.io"]}
    assert context.deadline is None and context.time_left() is None and context.stream is None
    [(service, method, seconds, code)] = rig.calls
    assert (service, method, code) == (TASK, "State", errors.OK) and 0 <= seconds < TIMEOUT_S


def test_none_is_an_empty_response(peer):
    peer.request(1, TASK, "Kill")
    assert peer.recv_status() == (1, errors.OK, "", b"")


def test_calls_run_side_by_side_and_are_answered_out_of_order(rig, peer):
    peer.request(1, TASK, "Wait")
    assert rig.task.entered.wait(TIMEOUT_S)
    assert_alive(peer, 3)
    rig.task.release.set()
    assert peer.recv_status()[:2] == (1, errors.OK)


def test_an_error_has_its_code_and_its_evidence(rig, peer, caplog):
    peer.request(1, TASK, "Start")
    stream_id, code, text, _ = peer.recv_status()
    assert (stream_id, code) == (1, errors.NOT_FOUND)
    assert text == "container c1 does not exist\n--- console:\nlast words"
    assert rig.calls[0][3] == errors.NOT_FOUND
    assert not caplog.records


@pytest.mark.parametrize(("method", "words"), [
    ("Delete", "ValueError: a bug"),
    ("Pids", "Pids returned a containerd.task.v2.StateResponse, not a containerd.task.v2.PidsResponse"),
    ("Pause", "Timeout")])
def test_a_bug_in_a_handler_is_logged_and_answered(peer, caplog, method, words):
    peer.request(1, TASK, method)
    _, code, text, _ = peer.recv_status()
    assert code == errors.INTERNAL and words in text
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info and record.getMessage() == f"{TASK}/{method} failed"
    assert_alive(peer, 3)


def test_messages_of_another_version_of_a_service_are_as_good():
    v3 = proto.service("containerd.task.v3.Task")
    assert server_module._serialize(v3["State"], StateResponse(id="x")) == \
        StateResponse(id="x").SerializeToString()


# What is wrong with a request.

@pytest.mark.parametrize(("service", "method", "text"), [
    ("no.Such", "State", "service no.Such"), (TASK, "NoSuch", "method NoSuch"),
    (TASK, "Checkpoint", "method Checkpoint")])      # declared, but the handler does not have it
def test_unknown_services_and_methods(peer, service, method, text):
    peer.request(1, service, method)
    assert peer.recv_status()[:3] == (1, errors.UNIMPLEMENTED, text)
    assert_alive(peer, 3)


def test_even_stream_ids_are_refused(peer):
    for stream_id in (0, 2):
        peer.request(stream_id, TASK, "State")
        assert peer.recv_status()[:3] == \
            (stream_id, errors.INVALID_ARGUMENT, "stream id must be odd for client initiated streams")
    assert_alive(peer, 1)


def test_a_stream_id_serves_once(peer):
    assert_alive(peer, 5)
    peer.request(5, TASK, "State")
    assert peer.recv_status()[:3] == \
        (5, errors.INVALID_ARGUMENT, "stream id cannot be re-used and must increment")
    assert_alive(peer, 7)


def test_ids_that_swapped_places_are_served_once(peer):
    """As the Rust client may send them."""
    assert_alive(peer, 3)
    assert_alive(peer, 1)
    peer.request(1, TASK, "State")
    assert peer.recv_status()[1] == errors.INVALID_ARGUMENT
    assert_alive(peer, 0xFFFFFFFF)
    peer.request(5, TASK, "State")          # too long ago to have been underway
    assert peer.recv_status()[1] == errors.INVALID_ARGUMENT


def test_a_client_that_jumps_about_does_not_fill_our_memory(rig, peer):
    for stream_id in range(1, 1 << 20, 10001):
        assert_alive(peer, stream_id | 1)
    [session] = rig.server._sessions
    assert len(session._skipped_ids) <= 2 * server_module._LATE_IDS


def test_an_undecodable_envelope(peer):
    peer.send(1, frame.REQUEST, b"\xff\xff\xff")
    stream_id, code, text, _ = peer.recv_status()
    assert (stream_id, code) == (1, errors.INVALID_ARGUMENT) and "ttrpc.Request" in text
    assert_alive(peer, 3)


def test_an_undecodable_payload(peer):
    peer.send(1, frame.REQUEST, status.encode_request(TASK, "State", b"\xff\xff"))
    _, code, text, _ = peer.recv_status()
    assert code == errors.INTERNAL and text.startswith("error unmarshalling payload: ")
    assert_alive(peer, 3)


def test_an_oversize_request_is_read_away_and_refused(peer):
    length = frame.MAX_MESSAGE + 1
    peer.sock.sendall(length.to_bytes(4, "big") + frame.encode(1, frame.REQUEST)[4:] + bytes(length))
    assert peer.recv_status()[:3] == \
        (1, errors.RESOURCE_EXHAUSTED, f"message length {length} exceed maximum message size of 4194304")
    assert_alive(peer, 3)


def test_the_largest_request_is_served(peer):
    def request(length):
        return status.encode_request(TASK, "Kill", State(id="x" * length).SerializeToString())

    overhead = len(request(4_000_000)) - 4_000_000
    whole = request(frame.MAX_MESSAGE - overhead)
    assert len(whole) == frame.MAX_MESSAGE
    peer.send(1, frame.REQUEST, whole)
    assert peer.recv_status()[1] == errors.OK


def test_an_oversize_response_becomes_an_error(peer):
    peer.request(1, TASK, "Stats")
    _, code, text, _ = peer.recv_status()
    assert code == errors.RESOURCE_EXHAUSTED and "exceed maximum message size" in text
    assert_alive(peer, 3)


@pytest.mark.parametrize("type", [0, frame.RESPONSE, 4, 255])
def test_other_frames_are_ignored(peer, type):
    peer.send(1, type, b"whatever")
    assert_alive(peer, 1)


# Deadlines and clients that leave.

def test_the_deadline_of_the_client_reaches_the_handler(rig, peer):
    peer.request(1, TASK, "State", timeout_s=50)
    peer.recv()
    [context] = rig.task.contexts
    assert 45 < context.deadline - time.monotonic() < 50
    assert 45 < context.time_left() < 50


def test_a_deadline_that_passes_is_answered_and_stops_the_handler(rig, peer):
    peer.request(1, TASK, "Wait", timeout_s=0.02)
    _, code, text, _ = peer.recv_status()
    assert code == errors.DEADLINE_EXCEEDED and f"{TASK}/Wait" in text
    assert_alive(peer, 3)
    assert type(rig.task.raised) is errors.DeadlineExceeded
    assert rig.calls[0][1:4:2] == ("Wait", errors.DEADLINE_EXCEEDED)


def test_a_deadline_that_had_passed_runs_nothing(rig, peer):
    request = status.Request(service=TASK, method="State", timeout_nano=-5)
    peer.send(1, frame.REQUEST, request.SerializeToString())
    assert peer.recv_status()[1] == errors.DEADLINE_EXCEEDED
    assert_alive(peer, 3)
    assert len(rig.task.contexts) == 1


def test_a_client_that_leaves_takes_its_handlers_along(rig, peer):
    other = rig.connect()
    peer.request(1, TASK, "Wait", timeout_s=60)
    assert rig.task.entered.wait(TIMEOUT_S)
    peer.close()
    assert rig.called.wait(TIMEOUT_S)
    assert type(rig.task.raised) is errors.Cancelled
    assert "Wait is cancelled: the connection to tester is gone" in rig.task.raised.message
    assert rig.calls[0][3] == errors.CANCELLED
    assert_alive(other, 1)


def test_peer_closed_is_set_for_those_who_look(rig, peer):
    assert_alive(peer, 1)
    [context] = rig.task.contexts
    assert not context.peer_closed.is_set()
    peer.close()
    assert context.peer_closed.wait(TIMEOUT_S)


# Streams.

def test_a_server_stream(rig, peer):
    peer.request(1, STREAMS, "Download", Text(service="3"), frame.REMOTE_CLOSED)
    received = [peer.recv() for _ in range(4)]
    assert [(item.stream_id, item.type) for item in received] == [(1, frame.DATA)] * 4
    assert [Text.FromString(item.payload).service for item in received[:3]] == ["0", "1", "2"]
    assert received[3].flags == frame.REMOTE_CLOSED | frame.NO_DATA and not received[3].payload
    assert rig.streams.closed.is_set()
    assert_alive(peer, 3)


def test_a_server_stream_whose_request_is_empty(peer):
    """containerd/ttrpc#126: it must reach the handler all the same."""
    peer.request(1, STREAMS, "FailLate", None, frame.REMOTE_CLOSED)
    assert Text.FromString(peer.recv().payload).service == "first"
    assert peer.recv_status()[:3] == (1, errors.FAILED_PRECONDITION, "no more")


def test_a_client_stream(peer):
    peer.request(1, STREAMS, "Upload", None, frame.REMOTE_OPEN)
    for text in ("a", "", "b"):             # an empty message without NO_DATA is a message
        peer.send(1, frame.DATA, Text(service=text).SerializeToString())
    peer.send(1, frame.DATA, b"", frame.NO_DATA)        # and this is none
    peer.send(1, frame.DATA, b"", frame.REMOTE_CLOSED | frame.NO_DATA)
    _, code, _, payload = peer.recv_status()
    assert code == errors.OK and Text.FromString(payload).service == "a,,b"


@pytest.mark.parametrize(("flags", "message", "answer"), [
    (frame.REMOTE_CLOSED, None, ""),                        # nothing at all
    (frame.REMOTE_CLOSED, Text(service="only"), "only"),
    (0, Text(service="only"), "only"),                      # called as if it were unary
    (frame.REMOTE_CLOSED | frame.NO_DATA, None, "")])
def test_a_client_stream_that_is_whole_at_once(peer, flags, message, answer):
    peer.request(1, STREAMS, "Upload", message, flags)
    _, code, _, payload = peer.recv_status()
    assert code == errors.OK and Text.FromString(payload).service == answer


@pytest.mark.parametrize("opening", [frame.REMOTE_OPEN, frame.REMOTE_OPEN | frame.NO_DATA])      # Go, Rust
def test_both_stream(peer, opening):
    peer.request(1, STREAMS, "Echo", None, opening)
    for text in ("a", "b"):
        peer.send(1, frame.DATA, Text(service=text).SerializeToString())
        assert Text.FromString(peer.recv().payload).service == text.upper()
    peer.send(1, frame.DATA, b"", frame.REMOTE_CLOSED | frame.NO_DATA)
    assert peer.recv().flags == frame.REMOTE_CLOSED | frame.NO_DATA


def test_data_for_a_stream_that_is_not_there(peer):
    for stream_id in (1, 2):
        peer.send(stream_id, frame.DATA, b"x")
        assert peer.recv_status()[:3] == (stream_id, errors.INVALID_ARGUMENT, "stream id is no longer active")
    assert_alive(peer, 1)
    peer.send(1, frame.DATA, b"x")          # a unary call that is over
    assert peer.recv_status()[:2] == (1, errors.INVALID_ARGUMENT)


def test_data_on_a_unary_call_ends_it(rig, peer):
    peer.request(1, TASK, "Wait")
    assert rig.task.entered.wait(TIMEOUT_S)
    peer.send(1, frame.DATA, b"x")
    assert peer.recv_status()[:2] == (1, errors.INVALID_ARGUMENT)
    assert_alive(peer, 3)
    assert rig.task.raised is not None


def test_data_in_the_closing_frame_is_refused(rig, peer):
    peer.request(1, STREAMS, "Slow", None, frame.REMOTE_OPEN)
    peer.send(1, frame.DATA, b"x", frame.REMOTE_CLOSED)
    assert peer.recv_status()[:3] == \
        (1, errors.INVALID_ARGUMENT, "a data frame that closes must not carry data")
    assert rig.streams.closed.wait(TIMEOUT_S)


def test_data_after_the_close_is_refused(rig, peer):
    peer.request(1, STREAMS, "Slow", None, frame.REMOTE_OPEN)
    peer.send(1, frame.DATA, b"", frame.REMOTE_CLOSED | frame.NO_DATA)
    peer.send(1, frame.DATA, b"x")
    assert peer.recv_status()[:2] == (1, errors.INVALID_ARGUMENT)
    assert rig.streams.closed.wait(TIMEOUT_S)


def test_oversize_data_fails_its_stream_only(rig, peer):
    peer.request(1, STREAMS, "Slow", None, frame.REMOTE_OPEN)
    length = frame.MAX_MESSAGE + 1
    peer.sock.sendall(length.to_bytes(4, "big") + frame.encode(1, frame.DATA)[4:] + bytes(length))
    assert peer.recv_status()[:2] == (1, errors.RESOURCE_EXHAUSTED)
    assert rig.streams.closed.wait(TIMEOUT_S)
    assert_alive(peer, 3)


def test_a_handler_that_reads_too_slowly_fails_alone(rig, peer):
    peer.request(1, STREAMS, "Slow", None, frame.REMOTE_OPEN)
    for _ in range(2):
        peer.send(1, frame.DATA, bytes(frame.MAX_MESSAGE))
    assert peer.recv_status()[:3] == (1, errors.RESOURCE_EXHAUSTED, "stream buffer full")
    assert rig.streams.closed.wait(TIMEOUT_S)
    assert_alive(peer, 3)


def test_a_stream_to_a_client_that_leaves_is_stopped(rig, peer):
    peer.request(1, STREAMS, "Endless", None, frame.REMOTE_CLOSED)
    peer.recv()
    peer.close()
    assert rig.streams.closed.wait(TIMEOUT_S)


def test_a_stream_waits_for_a_client_that_does_not_read(rig, peer):
    peer.request(1, STREAMS, "Endless", None, frame.REMOTE_CLOSED)
    peer.request(3, TASK, "State", State(id="x"))
    seen = set()
    while seen != {1, 3}:       # the other call is answered although the stream has no end
        seen.add(peer.recv().stream_id)
    [session] = rig.server._sessions
    gevent.idle()
    assert session._connection._queued_bytes - session._connection.sent_bytes < 2 << 20


def test_the_deadline_of_a_stream(rig, peer):
    peer.request(1, STREAMS, "Endless", None, frame.REMOTE_CLOSED, timeout_s=0.05)
    item = peer.recv()
    while item.type == frame.DATA:
        item = peer.recv()
    assert proto.decode(status.Response, item.payload).status.code == errors.DEADLINE_EXCEEDED
    assert rig.streams.closed.wait(TIMEOUT_S)
    assert_alive(peer, 3)


# Clients come and go.

def test_a_client_that_never_reads_is_given_up(tmp_path):
    rig = Rig(str(tmp_path / "s"), write_timeout_s=0.05)
    peer = rig.connect()
    peer.request(1, STREAMS, "Endless", None, frame.REMOTE_CLOSED)
    assert rig.streams.closed.wait(TIMEOUT_S)
    rig.stop()


def test_a_client_that_leaves_is_forgotten(rig, peer):
    assert_alive(peer, 1)
    [session] = rig.server._sessions
    peer.close()
    assert session._connection.closed.wait(TIMEOUT_S)
    assert not rig.server._sessions


def test_stop_gives_running_calls_their_time(rig, peer):
    peer.request(1, TASK, "Wait")
    assert rig.task.entered.wait(TIMEOUT_S)
    stopping = gevent.spawn(rig.server.stop, TIMEOUT_S)
    gevent.idle()
    with pytest.raises(OSError):
        rig.connect()
    rig.task.release.set()
    assert peer.recv_status()[:2] == (1, errors.OK)
    stopping.get(timeout=TIMEOUT_S)
    assert peer.at_end()


def test_stop_hangs_up_when_the_time_is_over(rig, peer, caplog):
    peer.request(1, TASK, "Wait")
    assert rig.task.entered.wait(TIMEOUT_S)
    rig.server.stop(0.01)
    assert peer.at_end()
    assert "stopping while calls of tester still run: Wait" in caplog.text
    assert rig.called.wait(TIMEOUT_S)
    assert type(rig.task.raised) is errors.Cancelled


def test_handlers_run_on_recycled_greenlets(tmp_path):
    pool = green.WorkerPool("test")
    rig = Rig(str(tmp_path / "s"), workers=pool)
    seen = set()
    rig.task.State = lambda request, context: seen.add(id(gevent.getcurrent()))
    rig.server._routes[TASK]["State"] = (proto.service(TASK)["State"], rig.task.State)
    peer = rig.connect()
    for index in range(20):
        peer.request(2 * index + 1, TASK, "State")
        peer.recv()
    assert len(seen) == 1
    rig.stop()
