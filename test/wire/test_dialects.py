"""What Go's and Rust's ttRPC put on the wire where they differ, byte for byte, and what we make of it.

The bytes are written down here from the protocol (docs/ttrpc.md), not made by our own encoder.
"""

import gevent
import pytest
from gevent.socket import AF_UNIX, socket
from ttrpc.raw import RawPeer, pair

from katashim import errors
from katashim.ttrpc import frame, proto
from katashim.ttrpc.client import Client
from katashim.ttrpc.server import Server

TIMEOUT_S = 5
HEALTH = "grpc.Health"
Check = proto.get("grpc.CheckRequest")
Answer = proto.get("grpc.HealthCheckResponse")

RESPONSE_HEADER = b"\x00\x00\x00\x01\x02\x00"       # stream 1, response, no flags


def response(body):
    return len(body).to_bytes(4, "big") + RESPONSE_HEADER + body


# Answers, as our client reads them.

@pytest.fixture
def far_end():
    """``(call(): the outcome of Health.Check in a greenlet, the server's end)``"""
    ours, theirs = pair()
    client = Client(ours, "the agent")
    yield (lambda: gevent.spawn(client.call, HEALTH, "Check", Check(), timeout_s=TIMEOUT_S)), theirs
    client.close()
    theirs.close()


@pytest.mark.parametrize(("who", "body"), [
    ("Go: no status", b"\x12\x02\x08\x01"),
    ("Rust: an empty status", b"\x0a\x00\x12\x02\x08\x01"),
    ("a status that says OK", b"\x0a\x06\x08\x00\x12\x02ok\x12\x02\x08\x01"),
    ("fields of the future", b"\x12\x02\x08\x01\x7a\x03new")])
def test_success(far_end, who, body):
    call, peer = far_end
    outcome = call()
    assert peer.recv().payload == b"\x0a\x0bgrpc.Health\x12\x05Check\x20\x80\xe4\x97\xd0\x12"
    peer.sock.sendall(response(body))
    assert outcome.get(timeout=TIMEOUT_S).status == Answer.SERVING


@pytest.mark.parametrize(("who", "body"), [("Go", b""), ("Rust", b"\x0a\x00")])
def test_success_with_an_empty_message(far_end, who, body):
    call, peer = far_end
    outcome = call()
    peer.sock.sendall(response(body))
    assert outcome.get(timeout=TIMEOUT_S) == Answer()


@pytest.mark.parametrize(("who", "body", "code", "words"), [
    ("Go, unknown service", b"\x0a\x0d\x08\x0c\x12\x09service X", errors.UNIMPLEMENTED, "service X"),
    ("Rust, unknown service", b"\x0a\x1c\x08\x03\x12\x18X service does not exist", errors.INVALID_ARGUMENT,
     "X service does not exist"),
    ("Rust, not overridden", b"\x0a\x1b\x08\x05\x12\x17/a.B/C is not supported", errors.NOT_FOUND,
     "/a.B/C is not supported"),
    ("Rust, with a payload beside the error", b"\x0a\x04\x08\x0d\x12\x00\x12\x00", errors.INTERNAL,
     "no reason given"),
    ("a code of the future", b"\x0a\x05\x08\x2a\x12\x01?", 42, "?")])
def test_errors(far_end, who, body, code, words):
    call, peer = far_end
    outcome = call()
    peer.sock.sendall(response(body))
    with pytest.raises(errors.KatashimError) as raised:
        outcome.get(timeout=TIMEOUT_S)
    assert raised.value.code == code and words in raised.value.message


def test_an_answer_in_dribs_and_drabs(far_end):
    call, peer = far_end
    outcome = call()
    for byte in response(b"\x12\x02\x08\x01"):
        peer.sock.sendall(bytes([byte]))
        gevent.idle()
    assert outcome.get(timeout=TIMEOUT_S).status == Answer.SERVING


# Requests, as our server reads them.

class Health:
    def Check(self, request, context):
        self.metadata = context.metadata
        return Answer(status=Answer.SERVING)


@pytest.fixture
def health():
    return Health()


@pytest.fixture
def near_end(tmp_path, health):
    """A client's end of a connection to our server."""
    listener = socket(AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    server = Server(listener, {HEALTH: health})
    server.start()
    sock = socket(AF_UNIX)
    sock.connect(str(tmp_path / "s"))
    peer = RawPeer(sock)
    yield peer
    peer.close()
    server.stop()


REQUEST = b"\x0a\x0bgrpc.Health\x12\x05Check"


@pytest.mark.parametrize(("who", "flags", "body"), [
    ("Go: no payload, its deadline, metadata", 0,
     REQUEST + b"\x20\x80\xe4\x97\xd0\x12" + b"\x2a\x14\x0a\x0btraceparent\x12\x0500-ab"),
    ("Rust: an empty payload, no deadline", 0, REQUEST + b"\x1a\x00"),
    ("a client that calls every request closed", 1, REQUEST),
    ("fields of the future", 0, REQUEST + b"\x7a\x03new")])
def test_requests(near_end, health, who, flags, body):
    near_end.sock.sendall(len(body).to_bytes(4, "big") + b"\x00\x00\x00\x01\x01" + bytes([flags]) + body)
    item = near_end.recv()
    assert item == frame.Frame(1, frame.RESPONSE, 0, b"\x12\x02\x08\x01")
    assert health.metadata == ({"traceparent": ["00-ab"]} if "Go" in who else {})


def test_requests_of_rust_out_of_order(near_end):
    """ttrpc-rust takes the id and queues the frame in two steps, so two tasks can cross."""
    head = len(REQUEST).to_bytes(4, "big")
    third, first = (head + bytes((0, 0, 0, stream_id, 1, 0)) + REQUEST for stream_id in (3, 1))
    near_end.sock.sendall(third + first)
    assert {near_end.recv().stream_id, near_end.recv().stream_id} == {1, 3}
