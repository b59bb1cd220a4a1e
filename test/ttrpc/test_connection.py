import socket

import gevent
import pytest
from gevent.event import Event

from katashim.errors import ConnectionClosed, DeadlineExceeded, ResourceExhausted
from katashim.ttrpc import connection, frame
from katashim.ttrpc.connection import Connection

from .raw import TIMEOUT_S, pair


class Owner:
    """Whoever has the connection: keeps what it is told."""

    def __init__(self, write_timeout_s=60, on_frame=None):
        self.items = []
        self.got = Event()
        self.lost = []
        sock, self.peer = pair()
        self.connection = Connection(sock, "the peer", on_frame or self.on_frame, self.lost.append,
                                     write_timeout_s)
        self.connection.start()

    def on_frame(self, item):
        self.items.append(item)
        self.got.set()

    def wait_closed(self):
        assert self.connection.closed.wait(TIMEOUT_S)
        return self.lost[0].message


@pytest.fixture
def owner():
    owner = Owner()
    yield owner
    owner.connection.close()
    owner.peer.close()


def fill(owner, chunk=1 << 16):
    """Send until the kernel takes no more; returns how many frames were sent."""
    count = 0
    while not owner.connection._queue:
        owner.connection.send(1, frame.DATA, bytes(chunk))
        count += 1
    return count


def test_frames_go_both_ways(owner):
    owner.peer.send(1, frame.REQUEST, b"in")
    assert owner.got.wait(TIMEOUT_S)
    assert owner.items == [frame.Frame(1, frame.REQUEST, 0, b"in")]
    owner.connection.send(1, frame.RESPONSE, b"out")
    assert owner.peer.recv() == frame.Frame(1, frame.RESPONSE, 0, b"out")


def test_a_socket_of_any_kind_will_do():
    for ours, theirs in (socket.socketpair(), gevent.socket.socketpair()):
        lost = []
        made = Connection(ours, "the peer", lambda item: None, lost.append)
        made.send(1, frame.DATA, b"x")
        assert ours.fileno() == -1          # taken over
        theirs.settimeout(TIMEOUT_S)
        assert theirs.recv(100) == frame.encode(1, frame.DATA, b"x")
        made.close()
        assert theirs.recv(100) == b""
        theirs.close()


def test_writes_stay_in_order_while_the_peer_is_slow(owner):
    count = fill(owner)
    for index in range(200):
        owner.connection.send(3, frame.DATA, str(index).encode() * 1000)
    received = [owner.peer.recv() for _ in range(count + 200)]
    assert [item.stream_id for item in received] == [1] * count + [3] * 200
    assert [item.payload for item in received[count:]] == [str(index).encode() * 1000 for index in range(200)]
    owner.connection.flush(TIMEOUT_S)
    assert owner.connection.sent_bytes == owner.connection._queued_bytes


def test_reading_goes_on_while_writing_is_stuck(owner):
    fill(owner)
    owner.peer.send(5, frame.REQUEST, b"do you hear me?")
    assert owner.got.wait(TIMEOUT_S)
    assert owner.items[0].payload == b"do you hear me?"


def test_the_offset_tells_what_may_have_arrived(owner):
    first = owner.connection.send(1, frame.REQUEST, b"small")
    assert owner.connection.sent_bytes == first == frame.HEADER_SIZE + 5
    fill(owner)
    stuck = owner.connection.send(3, frame.REQUEST, b"behind the rest")
    assert owner.connection.sent_bytes < stuck


def test_wait_writable_waits_for_a_slow_peer(owner):
    owner.connection.wait_writable(0)
    while owner.connection._queued_bytes - owner.connection.sent_bytes <= 1 << 20:
        owner.connection.send(1, frame.DATA, bytes(1 << 16))
    with pytest.raises(DeadlineExceeded, match="the peer to read what it was sent"):
        owner.connection.wait_writable(0.01)
    waiter = gevent.spawn(owner.connection.wait_writable, TIMEOUT_S)
    while not waiter.ready():
        owner.peer.recv()
    waiter.get()


def test_flush_has_a_deadline(owner):
    fill(owner)
    with pytest.raises(DeadlineExceeded):
        owner.connection.flush(0.01)


def test_a_peer_that_never_reads_is_given_up():
    owner = Owner(write_timeout_s=0.05)
    fill(owner)
    assert owner.wait_closed() == \
        "the connection to the peer is gone: the other side has read nothing for 0.05 s"
    owner.peer.close()


def test_a_peer_that_reads_slowly_is_not_given_up():
    owner = Owner(write_timeout_s=0.2)
    count = fill(owner, 1 << 20)
    for _ in range(count):      # takes longer than the timeout, but there is progress
        gevent.wait([owner.connection.closed], timeout=0.1)
        owner.peer.recv()
    assert not owner.connection.closed.is_set()
    owner.connection.close()
    owner.peer.close()


def test_too_much_for_a_peer_that_does_not_read_ends_it(owner, monkeypatch):
    monkeypatch.setattr(connection, "_QUEUE_HARD_BYTES", 1 << 20)
    fill(owner)
    for _ in range(20):
        if owner.connection.closed.is_set():
            break
        owner.connection.send(1, frame.DATA, bytes(1 << 16))
    assert "the other side does not read: " in owner.wait_closed()


def test_oversize_is_refused_before_anything_is_sent(owner):
    with pytest.raises(ResourceExhausted, match="to the peer: message length 4194305 exceed"):
        owner.connection.send(1, frame.REQUEST, bytes(frame.MAX_MESSAGE + 1))
    owner.connection.send(1, frame.REQUEST, b"fine")
    assert owner.peer.recv().payload == b"fine"


def test_the_end_of_the_other_side(owner):
    owner.peer.close()
    assert owner.wait_closed() == "the connection to the peer is gone: the other side closed it"
    assert type(owner.lost[0]) is ConnectionClosed and len(owner.lost) == 1
    with pytest.raises(ConnectionClosed, match="closed it") as raised:
        owner.connection.send(1, frame.REQUEST, b"x")
    assert raised.value.maybe_executed is False
    with pytest.raises(ConnectionClosed):
        owner.connection.wait_writable()


def test_the_end_in_the_middle_of_a_frame(owner):
    owner.peer.sock.sendall(frame.encode(1, frame.REQUEST, b"cut off")[:-3])
    owner.peer.close()
    assert owner.wait_closed().endswith("the other side closed it in the middle of a frame")


def test_what_the_peer_said_before_it_broke_is_still_read(owner):
    """Our write fails with EPIPE while the answer to an earlier request lies in the kernel."""
    owner.peer.send(1, frame.RESPONSE, b"the answer")
    owner.peer.close()
    with pytest.raises(ConnectionClosed):
        while True:             # the first write notices
            owner.connection.send(3, frame.REQUEST, b"x")
    owner.wait_closed()
    assert [item.payload for item in owner.items] == [b"the answer"]


def test_closing_twice_tells_once(owner):
    owner.connection.close()
    owner.connection.close()
    assert [error.message for error in owner.lost] == \
        ["the connection to the peer is gone: it was closed from this side"]
    assert owner.peer.at_end()


def test_no_frame_comes_after_the_owner_closed_the_connection():
    seen = []

    def close_at_first(item):
        seen.append(item)
        owner.connection.close()

    owner = Owner(on_frame=close_at_first)
    owner.peer.sock.sendall(frame.encode(1, frame.REQUEST) * 3)
    owner.wait_closed()
    assert len(seen) == 1
    owner.peer.close()


def test_a_bug_in_the_owner_ends_the_connection(caplog):
    owner = Owner(on_frame=lambda item: 1 // 0)
    owner.peer.send(1, frame.REQUEST)
    assert "ZeroDivisionError" in owner.wait_closed()
    assert "a frame could not be handled" in caplog.text and "1 // 0" in caplog.text
    owner.peer.close()
