import gevent
import pytest
from gevent.event import Event

from katashim import errors
from katashim.ttrpc import frame, proto, status
from katashim.ttrpc.client import Client

from .raw import TIMEOUT_S, pair

TASK = "containerd.task.v2.Task"
STREAMS = "test.Streams"
Text = proto.get("grpc.CheckRequest")
State = proto.get("containerd.task.v2.StateRequest")
StateResponse = proto.get("containerd.task.v2.StateResponse")


@pytest.fixture(autouse=True)
def streaming_service(monkeypatch):
    kinds = {"Download": (False, True), "Upload": (True, False), "Echo": (True, True)}
    methods = {name: proto.Method(name, Text, Text, *kind) for name, kind in kinds.items()}
    monkeypatch.setitem(proto._services, STREAMS, methods)


class Rig:
    def __init__(self, **options):
        sock, self.peer = pair()
        self.calls = []
        self.client = Client(sock, "the server", on_call=lambda *call: self.calls.append(call), **options)

    def state(self, id="c", **options):
        """State, called in a greenlet."""
        return gevent.spawn(self.client.call, TASK, "State", State(id=id), **options)

    def received(self):
        """The next request that the server sees: ``(frame, Request)``."""
        item = self.peer.recv()
        assert item.type == frame.REQUEST
        return item, proto.decode(status.Request, item.payload)

    def answer(self, stream_id, id="c"):
        self.peer.send(stream_id, frame.RESPONSE,
                       status.encode_response(StateResponse(id=id).SerializeToString()))


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.client.close()
    rig.peer.close()


def get(greenlet):
    return greenlet.get(timeout=TIMEOUT_S)


def error_of(greenlet, cls):
    with pytest.raises(cls) as raised:
        get(greenlet)
    return raised.value


# Unary calls.

def test_a_call_on_the_wire(rig):
    call = rig.state("c1", timeout_s=2.5, metadata={"Key": ["a", "b"]})
    item, request = rig.received()
    assert (item.stream_id, item.flags) == (1, 0)
    assert (request.service, request.method, request.timeout_nano) == (TASK, "State", 2_500_000_000)
    assert status.metadata_of(request) == {"key": ["a", "b"]}
    assert State.FromString(request.payload).id == "c1"
    rig.answer(1, "c1")
    assert get(call) == StateResponse(id="c1")
    assert rig.calls[0][:2] == (TASK, "State") and rig.calls[0][3] == errors.OK


def test_without_a_limit_there_is_no_timeout(rig):
    call = rig.state()
    assert rig.received()[1].timeout_nano == 0
    rig.answer(1)
    get(call)


def test_answers_in_any_order(rig):
    calls = [rig.state(str(index)) for index in range(20)]
    ids = [rig.received()[0].stream_id for _ in calls]
    assert ids == list(range(1, 40, 2))
    for index in reversed(range(20)):
        rig.answer(ids[index], str(index))
    assert [get(call).id for call in calls] == [str(index) for index in range(20)]


def test_ids_grow_on_the_wire_even_when_writing_is_stuck(rig):
    """What the Rust client gets wrong: two greenlets must not swap their frames."""
    calls = [rig.state("x" * 100_000) for _ in range(50)]
    gevent.idle()
    assert [rig.received()[0].stream_id for _ in calls] == list(range(1, 100, 2))
    gevent.killall(calls)


def test_an_error_status(rig):
    call = rig.state()
    rig.received()
    rig.peer.send(1, frame.RESPONSE, status.encode_error(errors.NOT_FOUND, "no container c"))
    assert error_of(call, errors.NotFound).message == f"{TASK}/State: no container c"
    assert rig.calls[0][3] == errors.NOT_FOUND


def test_the_caller_may_make_the_errors(rig):
    rig.client._error_of = lambda code, label, text: errors.AgentError(code, label, text)
    call = rig.state()
    rig.received()
    rig.peer.send(1, frame.RESPONSE, status.encode_error(errors.UNKNOWN, "Others(..)"))
    assert error_of(call, errors.AgentError).code == errors.UNKNOWN


def test_a_deadline_names_the_call_and_late_answers_are_dropped(rig):
    error = error_of(rig.state(timeout_s=0.01), errors.DeadlineExceeded)
    assert f"the answer to {TASK}/State" in error.message
    assert rig.calls[0][3] == errors.DEADLINE_EXCEEDED
    rig.received()
    rig.answer(1, "late")
    call = rig.state("next")
    assert rig.received()[0].stream_id == 3
    rig.answer(3, "next")
    assert get(call).id == "next"


def test_a_caller_that_is_killed_leaves_nothing_behind(rig):
    call = rig.state()
    rig.received()
    call.kill(timeout=TIMEOUT_S)
    assert not rig.client._streams
    assert rig.calls[0][3] == errors.CANCELLED


def test_an_oversize_request_is_not_sent(rig):
    error = error_of(rig.state("x" * frame.MAX_MESSAGE), errors.ResourceExhausted)
    assert "exceed maximum message size" in error.message
    assert not rig.client._streams
    call = rig.state()
    item, _ = rig.received()
    rig.answer(item.stream_id)
    get(call)


def test_an_oversize_answer_fails_its_call_only(rig):
    calls = [rig.state(), rig.state("other")]
    rig.received()
    length = frame.MAX_MESSAGE + 1
    header = length.to_bytes(4, "big") + frame.encode(1, frame.RESPONSE)[4:]
    rig.peer.sock.sendall(header + bytes(length))
    assert "the server answered: message length" in error_of(calls[0], errors.ResourceExhausted).message
    rig.answer(3, "other")
    assert get(calls[1]).id == "other"


@pytest.mark.parametrize(("type", "payload", "words"), [
    (frame.RESPONSE, b"\xff\xff", "garbage"),
    (frame.RESPONSE, status.encode_response(b"\xff\xff"), "garbage"),
    (frame.DATA, b"", "a frame of type 3")])
def test_an_answer_that_makes_no_sense(rig, type, payload, words):
    call = rig.state()
    rig.received()
    rig.peer.send(1, type, payload)
    assert words in error_of(call, errors.Internal).message
    assert not rig.client.closed.is_set()


def test_an_unknown_method_is_the_callers_mistake(rig):
    with pytest.raises(KeyError):
        rig.client.call(TASK, "NoSuch", State())


def test_frames_for_nobody_are_dropped(rig):
    for type in (0, frame.REQUEST, frame.RESPONSE, frame.DATA, 9):
        rig.peer.send(77, type, b"?")
    call = rig.state()
    rig.received()
    rig.answer(1)
    get(call)


# The end.

def test_the_end_fails_every_call_that_waits(rig):
    calls = [rig.state() for _ in range(10)]
    for _ in calls:
        rig.received()
    rig.peer.close()
    for call in calls:
        error = error_of(call, errors.ConnectionClosed)
        assert error.maybe_executed
        assert error.message == \
            f"{TASK}/State: the connection to the server is gone: the other side closed it"
    assert rig.client.closed.is_set()
    assert not error_of(rig.state(), errors.ConnectionClosed).maybe_executed


def test_a_request_that_never_left_was_not_executed(rig):
    calls = [rig.state("x" * 1_000_000) for _ in range(3)]
    gevent.idle()
    rig.client.close()
    assert not any(error_of(call, errors.ConnectionClosed).maybe_executed for call in calls)


def test_an_answer_in_the_last_bytes_counts(rig):
    calls = [rig.state(), rig.state()]
    rig.received()
    rig.received()
    rig.answer(3)
    rig.peer.close()
    get(calls[1])
    error_of(calls[0], errors.ConnectionClosed)


def test_closing_from_this_side(rig):
    call = rig.state()
    rig.received()
    rig.client.close()
    assert "closed from this side" in error_of(call, errors.ConnectionClosed).message
    assert rig.peer.at_end()


def test_a_callback_may_close_the_client(rig):
    """The one who gets an answer runs in the middle of the reading of frames."""
    def caller():
        rig.client.call(TASK, "State", State())
        rig.client.close()

    calls = [gevent.spawn(caller), rig.state()]
    rig.received()
    rig.received()
    both = b"".join(frame.encode(id, frame.RESPONSE, status.encode_response(b"")) for id in (1, 3))
    rig.peer.sock.sendall(both)
    get(calls[0])
    error_of(calls[1], errors.ConnectionClosed)


def test_when_the_ids_are_used_up_the_connection_ends(rig):
    rig.client._next_id = 0xFFFFFFFF
    call = rig.state()
    assert rig.received()[0].stream_id == 0xFFFFFFFF
    rig.answer(0xFFFFFFFF)
    get(call)
    assert "stream ids are used up" in error_of(rig.state(), errors.ConnectionClosed).message


# Streams.

def text(string):
    return Text(service=string).SerializeToString()


def test_a_server_stream(rig):
    stream = rig.client.stream(STREAMS, "Download", Text(service="3"), metadata={"k": "v"})
    item, request = rig.received()
    assert (item.stream_id, item.flags) == (1, frame.REMOTE_CLOSED)
    assert Text.FromString(request.payload).service == "3" and status.metadata_of(request) == {"k": ["v"]}
    for string in ("a", ""):
        rig.peer.send(1, frame.DATA, text(string))
    rig.peer.send(1, frame.DATA, b"", frame.NO_DATA)
    rig.peer.send(1, frame.DATA, b"", frame.REMOTE_CLOSED | frame.NO_DATA)
    assert [message.service for message in stream] == ["a", ""]
    assert stream.recv() is None
    assert not rig.client._streams
    with pytest.raises(errors.FailedPrecondition):
        stream.send(Text())


@pytest.mark.parametrize(("type", "payload", "flags", "messages"), [
    (frame.DATA, text("last"), frame.REMOTE_CLOSED, ["last"]),             # Go may do this
    (frame.DATA, b"", frame.REMOTE_CLOSED, []),                            # Rust without NO_DATA
    (frame.RESPONSE, b"", 0, []),
    (frame.RESPONSE, b"\x0a\x00", 0, []),                                  # Rust's empty status
    (frame.RESPONSE, status.encode_response(text("last")), 0, ["last"])])
def test_ways_to_end_a_server_stream(rig, type, payload, flags, messages):
    stream = rig.client.stream(STREAMS, "Download", Text())
    rig.received()
    rig.peer.send(1, type, payload, flags)
    assert [message.service for message in stream] == messages


def test_a_client_stream(rig):
    stream = rig.client.stream(STREAMS, "Upload")
    item, request = rig.received()
    assert item.flags == frame.REMOTE_OPEN and not request.payload
    stream.send(Text(service="a"))
    stream.send(Text())
    stream.close_send()
    stream.close_send()
    assert rig.peer.recv() == frame.Frame(1, frame.DATA, 0, text("a"))
    assert rig.peer.recv() == frame.Frame(1, frame.DATA, 0, b"")
    assert rig.peer.recv() == frame.Frame(1, frame.DATA, frame.REMOTE_CLOSED | frame.NO_DATA, b"")
    with pytest.raises(errors.FailedPrecondition, match="this side of the stream is closed"):
        stream.send(Text())
    rig.peer.send(1, frame.RESPONSE, b"")       # an empty response is the one answer
    assert stream.recv(TIMEOUT_S) == Text()
    assert stream.recv() is None


def test_both_stream(rig):
    with rig.client.stream(STREAMS, "Echo") as stream:
        rig.received()
        for string in ("a", "b"):
            stream.send(Text(service=string))
            rig.peer.send(1, frame.DATA, rig.peer.recv().payload)
            assert stream.recv(TIMEOUT_S).service == string
    assert rig.peer.recv().flags == frame.REMOTE_CLOSED | frame.NO_DATA       # leaving says goodbye
    rig.peer.send(1, frame.DATA, text("late"))
    assert stream.recv() is None


def test_a_stream_ended_by_an_error(rig):
    stream = rig.client.stream(STREAMS, "Echo")
    rig.received()
    rig.peer.send(1, frame.DATA, text("first"))
    rig.peer.send(1, frame.RESPONSE, status.encode_error(errors.FAILED_PRECONDITION, "no more"))
    assert stream.recv(TIMEOUT_S).service == "first"
    with pytest.raises(errors.FailedPrecondition, match="test.Streams/Echo: no more"):
        stream.recv(TIMEOUT_S)
    with pytest.raises(errors.FailedPrecondition, match="recv tells why"):
        stream.send(Text())


def test_a_stream_and_the_end_of_the_connection(rig):
    stream = rig.client.stream(STREAMS, "Echo")
    rig.received()
    reader = gevent.spawn(stream.recv)
    gevent.idle()
    rig.peer.close()
    error = error_of(reader, errors.ConnectionClosed)
    assert error.maybe_executed and error.message.startswith("test.Streams/Echo: ")
    stream.close()
    with pytest.raises(errors.ConnectionClosed):
        rig.client.stream(STREAMS, "Echo")


def test_the_deadline_of_a_stream(rig):
    stream = rig.client.stream(STREAMS, "Echo", timeout_s=0.02)
    _, request = rig.received()
    assert request.timeout_nano == 20_000_000
    with pytest.raises(errors.DeadlineExceeded, match="a message of test.Streams/Echo"):
        stream.recv()
    with pytest.raises(errors.DeadlineExceeded):
        stream.recv(60)


def test_the_deadline_of_one_message(rig):
    stream = rig.client.stream(STREAMS, "Echo")
    with pytest.raises(errors.DeadlineExceeded):
        stream.recv(0.01)
    rig.received()
    rig.peer.send(1, frame.DATA, text("later"))
    assert stream.recv(TIMEOUT_S).service == "later"


def test_a_stream_read_too_slowly_fails_alone(rig):
    stream = rig.client.stream(STREAMS, "Download", Text())
    rig.received()
    for _ in range(2):
        rig.peer.send(1, frame.DATA, bytes(frame.MAX_MESSAGE))
    call = rig.state()
    item, _ = rig.received()
    rig.answer(item.stream_id)
    get(call)
    stream._inbox.take()
    with pytest.raises(errors.ResourceExhausted, match="its reader was too slow"):
        stream.recv()


def test_sending_waits_for_a_server_that_does_not_read(rig):
    stream = rig.client.stream(STREAMS, "Upload")
    done = Event()

    def sender():
        for _ in range(40):
            stream.send(Text(service="x" * 100_000))
        stream.close_send()
        done.set()

    sending = gevent.spawn(sender)
    gevent.idle()
    assert not done.is_set()
    rig.received()
    for _ in range(40):
        assert len(rig.peer.recv().payload) > 100_000
    get(sending)


def test_an_oversize_message_is_not_sent(rig):
    stream = rig.client.stream(STREAMS, "Upload")
    rig.received()
    with pytest.raises(errors.ResourceExhausted):
        stream.send(Text(service="x" * frame.MAX_MESSAGE))
    stream.send(Text(service="fits"))
    assert rig.peer.recv().payload == text("fits")
