"""The agent's ttRPC server, byte by byte, and the services that every host probes first."""

import struct
import threading
import time

import pytest
from plain_client import PlainClient, Refused

from katashim.ttrpc import proto

_HEADER = struct.Struct(">IIBB")
MAX = 4 << 20


@pytest.fixture
def connection(client):
    with client.connect() as connected:
        yield connected


def raw_answer(connection):
    """``(stream id, type, flags, payload)`` of the next frame."""
    def read(size):
        data = b""
        while len(data) < size:
            piece = connection.recv(size - len(data))
            assert piece, "the agent closed the connection"
            data += piece
        return data
    length, stream_id, kind, flags = _HEADER.unpack(read(_HEADER.size))
    return stream_id, kind, flags, read(length)


def refused(client, connection, code, text):
    with pytest.raises(Refused, match=f"^{code}: {text}"):
        client.receive(connection)


def test_health_and_version(host_agent):
    health = PlainClient(host_agent.socket, service="grpc.Health")
    assert health.call("Check").status == 1
    version = health.call("Version")
    assert (version.grpc_version, version.agent_version) == ("0.0.1", "4.1.0")


def test_a_good_answer_has_an_empty_status(client, connection):
    client.send(connection, 5, "OnlineCPUMem", b"\x18\x01")      # cpu_only
    assert raw_answer(connection) == (5, 2, 0, b"\x0a\x00")


def test_unknown_names(client, connection):
    other = PlainClient(client._address)
    other._service = "grpc.Nonsense"
    other.send(connection, 1, "Check", b"")
    refused(client, connection, 3, "grpc.Nonsense service does not exist")
    client.send(connection, 3, "Nonsense", b"")
    refused(client, connection, 12, "Nonsense method")
    client.send(connection, 5, "SetPolicy", b"")
    refused(client, connection, 5, "/grpc.AgentService/SetPolicy is not supported")


def test_stream_ids_are_odd(client, connection):
    client.send(connection, 2, "ListRoutes", b"")
    refused(client, connection, 3, "stream id must be odd")
    client.send(connection, 3, "ListRoutes", b"")
    assert client.receive(connection)[0] == 3


def test_payloads_that_are_none(client, connection):
    client.send(connection, 1, "StartContainer", b"\x0a\xff")
    refused(client, connection, 2, "ttrpc err: .*StartContainerRequest")
    connection.sendall(_HEADER.pack(2, 3, 1, 0) + b"\x0a\xff")
    refused(client, connection, 3, ".*Request")


def test_too_long_a_request_is_drained_and_answered(client, connection):
    connection.sendall(_HEADER.pack(MAX + 1, 1, 1, 0))
    connection.sendall(bytes(MAX + 1))
    refused(client, connection, 3, f"message length {MAX + 1} exceed maximum message size of {MAX}")
    client.send(connection, 3, "ListRoutes", b"")
    assert client.receive(connection)[0] == 3


def test_the_longest_request_passes(client, pod):
    cid = pod.run("cat")
    room = MAX - 200
    assert client.call("WriteStdin", container_id=cid, data=bytes(60_000)).len == 60_000
    reader = threading.Thread(target=lambda: client.call("WriteStdin", container_id=cid, data=bytes(room)))
    reader.start()
    left = room + 60_000
    while left:
        left -= len(client.call("ReadStdout", container_id=cid, len=1 << 20).data)
    reader.join(10)
    assert not reader.is_alive()


def test_data_and_unknown_frames(client, connection):
    connection.sendall(_HEADER.pack(3, 1, 3, 0) + b"abc")
    refused(client, connection, 3, "Stream is no longer active")
    connection.sendall(_HEADER.pack(3, 1, 99, 0) + b"abc")
    client.send(connection, 3, "ListRoutes", b"")
    assert client.receive(connection)[0] == 3


def test_a_request_in_small_pieces(client, connection):
    request = proto.get("ttrpc.Request")(service="grpc.AgentService", method="ListRoutes").SerializeToString()
    for byte in _HEADER.pack(len(request), 7, 1, 0) + request:
        connection.sendall(bytes([byte]))
    assert client.receive(connection)[0] == 7


def test_answers_come_in_any_order(client, connection, pod):
    cid = pod.run("sleep", "1000")
    wait = proto.get("grpc.WaitProcessRequest")(container_id=cid).SerializeToString()
    client.send(connection, 1, "WaitProcess", wait)
    client.send(connection, 3, "ListRoutes", b"")
    assert client.receive(connection)[0] == 3
    client.call("SignalProcess", container_id=cid, signal=9)
    assert client.receive(connection)[0] == 1


def test_a_deadline_is_kept(client, pod):
    cid = pod.run("sleep", "1000")
    start = time.monotonic()
    with pytest.raises(Refused, match="^4: timeout"):
        client.call("WaitProcess", container_id=cid, timeout_nano=50_000_000)
    assert time.monotonic() - start < 5
    assert pod.output(cid, "echo", "alive") == "alive\n"


def test_a_host_that_goes_away_in_mid_request(client, pod):
    for data in (b"\x00", _HEADER.pack(100, 1, 1, 0), _HEADER.pack(100, 1, 1, 0) + b"half"):
        with client.connect() as connected:
            connected.sendall(data)
    cid = pod.run("sh", "-c", "read x; echo $x; exit 3")
    with client.connect() as connected:
        client.send(connected, 1, "WaitProcess",
                    proto.get("grpc.WaitProcessRequest")(container_id=cid).SerializeToString())
    for _ in range(10):         # so that the agent has seen the end of the connection
        client.call("ListInterfaces")
    client.call("WriteStdin", container_id=cid, data=b"x\n")
    assert pod.read(cid) == b"x\n"
    assert pod.wait(cid) == 3       # the status went to nobody yet


def test_a_status_that_came_too_late_can_be_asked_for_again(client, pod):
    cid = pod.run("sh", "-c", "read x; exit 3")
    with pytest.raises(Refused, match="^4: timeout"):
        client.call("WaitProcess", container_id=cid, timeout_nano=1_000_000)
    client.call("CloseStdin", container_id=cid)
    assert pod.wait(cid) == 3


def test_fifty_connections(client):
    connections = [client.connect() for _ in range(50)]
    try:
        for number, connected in enumerate(connections):
            client.send(connected, 2 * number + 1, "ListInterfaces", b"")
        assert [client.receive(connected)[0] for connected in connections] == [2 * number + 1
                                                                               for number in range(50)]
    finally:
        for connected in connections:
            connected.close()
