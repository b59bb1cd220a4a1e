"""Our client against a ttRPC server that we did not write: containerd's, in Go.

A private containerd with hardly a plugin serves the events service on its ttRPC socket, which is
what the shim's publisher talks to.
"""

import os
import shutil
import subprocess
import time

import gevent
import pytest
from gevent.socket import AF_UNIX, socket
from ttrpc.raw import RawPeer

from katashim import errors
from katashim.ttrpc import frame, proto, status
from katashim.ttrpc.client import Client

pytestmark = pytest.mark.skipif(not shutil.which("containerd"), reason="containerd is not installed")

START_TIMEOUT_S = 20
EVENTS = "containerd.services.events.ttrpc.v1.Events"
Forward = proto.get("containerd.services.events.ttrpc.v1.ForwardRequest")

CONFIG = """
version = 2
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{dir}/c.sock"
[ttrpc]
  address = "{dir}/t.sock"
"""


@pytest.fixture(scope="module")
def containerd(tmp_path_factory):
    """The path of its ttRPC socket."""
    directory = str(tmp_path_factory.mktemp("containerd"))
    with open(f"{directory}/config.toml", "w") as config:
        config.write(CONFIG.format(dir=directory))
    with open(f"{directory}/log", "wb") as log:
        process = subprocess.Popen(["containerd", "-c", f"{directory}/config.toml"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + START_TIMEOUT_S
        while not os.path.exists(f"{directory}/t.sock"):
            with open(f"{directory}/log") as log:
                assert process.poll() is None and time.monotonic() < end, log.read()[-2000:]
            gevent.sleep(0.02)
        yield f"{directory}/t.sock"
    finally:
        process.terminate()
        process.wait(timeout=START_TIMEOUT_S)


def dial(path):
    sock = socket(AF_UNIX)
    sock.connect(path)
    return sock


@pytest.fixture
def client(containerd):
    client = Client(dial(containerd), "containerd")
    yield client
    client.close()


def envelope(**changes):
    exit_event = proto.get("containerd.events.TaskExit")(container_id="c", id="c", exit_status=7)
    return proto.build(Forward, envelope={
        "timestamp": proto.timestamp(time.time_ns()), "namespace": "default", "topic": "/tasks/exit",
        "event": proto.pack_any(exit_event), **changes})


def forward(client, request):
    return client.call(EVENTS, "Forward", request, timeout_s=5,
                       metadata={"containerd-namespace-ttrpc": "default"})


def test_an_event_is_taken(client):
    assert forward(client, envelope()) == proto.get("google.protobuf.Empty")()


@pytest.mark.parametrize("changes", [{"topic": "tasks/exit"}, {"timestamp": None}, {"namespace": "no/such"}])
def test_a_bad_event_is_refused_with_its_code(client, changes):
    with pytest.raises(errors.InvalidArgument):
        forward(client, envelope(**changes))
    forward(client, envelope())


def test_many_at_once_keep_their_ids_in_order(client):
    """Go's server refuses an id that does not grow."""
    calls = [gevent.spawn(forward, client, envelope()) for _ in range(200)]
    gevent.joinall(calls, timeout=20, raise_error=True)
    assert all(call.successful() for call in calls)


@pytest.mark.parametrize(("service", "method", "words"), [
    ("no.Such", "State", "service no.Such"), (EVENTS, "NoSuch", "method NoSuch")])
def test_what_it_does_not_serve(containerd, service, method, words):
    peer = RawPeer(dial(containerd))
    peer.request(1, service, method)
    _, code, text, _ = peer.recv_status()
    assert code == errors.UNIMPLEMENTED and words in text
    peer.close()


def test_rules_that_we_share(containerd):
    """Each of these is what our own server answers too (test_server.py). Used ids are not here: the Go
    server refuses them only since it streams, which is later than containerd 1.6."""
    peer = RawPeer(dial(containerd))
    length = frame.MAX_MESSAGE + 1
    peer.sock.sendall(length.to_bytes(4, "big") + frame.encode(1, frame.REQUEST)[4:] + bytes(length))
    _, code, text, _ = peer.recv_status()
    assert (code, text) == (errors.RESOURCE_EXHAUSTED, frame.oversize_text(length))
    for stream_id, expected in ((2, errors.INVALID_ARGUMENT), (3, errors.OK)):
        peer.request(stream_id, EVENTS, "Forward", envelope())
        assert peer.recv_status()[:2] == (stream_id, expected)
    peer.send(5, frame.REQUEST, b"\xff\xff")
    assert peer.recv_status()[:2] == (5, errors.INVALID_ARGUMENT)
    peer.send(7, frame.REQUEST, status.encode_request(EVENTS, "Forward", b"\xff\xff"))
    assert peer.recv_status()[0] == 7
    peer.close()
