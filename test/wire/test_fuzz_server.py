"""A server that gets nonsense: it never fails, and serves the next client."""

import logging

import gevent
import pytest
from gevent.socket import AF_UNIX, socket
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from katashim.ttrpc import frame, proto, status
from katashim.ttrpc.client import Client
from katashim.ttrpc.server import Server

TIMEOUT_S = 5
STREAMS = "test.Streams"
Text = proto.get("grpc.CheckRequest")


class Streams:
    def Unary(self, request, context):
        return Text(service=request.service)

    def Download(self, request, context):
        yield from [Text(), Text(service="x")]

    def Upload(self, request, context):
        return Text(service=str(len(list(context.stream))))

    def Echo(self, request, context):
        yield from context.stream


KINDS = {"Unary": (False, False), "Download": (False, True), "Upload": (True, False), "Echo": (True, True)}

requests = st.builds(
    lambda service, method, payload, nano: status.Request(
        service=service, method=method, payload=payload, timeout_nano=nano).SerializeToString(),
    st.sampled_from([STREAMS, "no.Such"]), st.sampled_from([*KINDS, "NoSuch"]),
    st.one_of(st.just(Text(service="m").SerializeToString()), st.binary(max_size=20)),
    st.sampled_from([0, 0, 1, -1, 10**9, 2**63 - 1]))
payloads = st.one_of(requests, st.just(b""), st.just(b"\x0a\x01m"), st.binary(max_size=30))
frames = st.builds(frame.encode, st.integers(0, 9), st.integers(0, 4), payloads, st.integers(0, 7))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    proto._services[STREAMS] = {name: proto.Method(name, Text, Text, *kind) for name, kind in KINDS.items()}
    path = str(tmp_path_factory.mktemp("fuzz") / "s")
    listener = socket(AF_UNIX)
    listener.bind(path)
    listener.listen()
    server = Server(listener, {STREAMS: Streams()})
    server.start()
    yield path
    server.stop()
    del proto._services[STREAMS]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(frames, frames, frames, st.binary(max_size=40)), max_size=12))
def test_nonsense_hurts_nobody_else(path, caplog, pieces):
    caplog.set_level(logging.WARNING)
    bystander = connect(path)
    sock = socket(AF_UNIX)
    sock.connect(path)
    with gevent.Timeout(TIMEOUT_S):
        sock.sendall(b"".join(pieces))
        gevent.idle()
        assert bystander.call(STREAMS, "Unary", Text(service="hello")).service == "hello"
        sock.close()
        another = connect(path, bystander)
        assert another.call(STREAMS, "Unary", Text(service="again")).service == "again"
        another.close()
    assert not caplog.records


def connect(path, old=None):
    if old is not None:
        old.close()
    sock = socket(AF_UNIX)
    sock.connect(path)
    return Client(sock, "the server")
