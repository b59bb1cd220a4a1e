import gevent
import pytest

from katashim.errors import DeadlineExceeded, Internal, ResourceExhausted
from katashim.ttrpc.stream import Inbox


def test_messages_come_out_in_order_then_the_end():
    inbox = Inbox("a message")
    assert inbox.put(b"one") and inbox.put(b"")
    inbox.end()
    assert [inbox.take(), inbox.take(), inbox.take(), inbox.take()] == [b"one", b"", None, None]


def test_a_waiting_reader_is_woken():
    inbox = Inbox("a message")
    reader = gevent.spawn(inbox.take, 5)
    gevent.idle()
    inbox.put(b"x")
    assert reader.get(timeout=5) == b"x"
    reader = gevent.spawn(inbox.take, 5)
    gevent.idle()
    inbox.end()
    assert reader.get(timeout=5) is None


def test_an_error_comes_after_what_was_there():
    inbox = Inbox("a message")
    inbox.put(b"last words")
    inbox.fail(Internal("it broke"))
    assert inbox.take() == b"last words"
    with pytest.raises(Internal, match="it broke"):
        inbox.take()


def test_a_failure_after_the_end_changes_nothing():
    inbox = Inbox("a message")
    inbox.end()
    inbox.fail(Internal("too late"))
    assert inbox.take() is None


def test_a_slow_reader_fails_its_own_stream_only():
    inbox = Inbox("a message of s.S/M", limit_bytes=1000)
    assert inbox.put(bytes(800))
    assert not inbox.put(bytes(800))
    assert inbox.ended
    assert len(inbox.take()) == 800
    with pytest.raises(ResourceExhausted, match=r"a message of s\.S/M: its reader was too slow, 1 messages"):
        inbox.take()


def test_empty_messages_count_too():
    inbox = Inbox("a message", limit_bytes=6400)
    assert [inbox.put(b"") for _ in range(101)] == [True] * 100 + [False]


def test_taking_makes_room():
    inbox = Inbox("a message", limit_bytes=1000)
    for _ in range(100):
        assert inbox.put(bytes(800))
        assert len(inbox.take()) == 800


def test_a_deadline_names_what_was_awaited():
    with pytest.raises(DeadlineExceeded, match=r"a message of s\.S/M"):
        Inbox("a message of s.S/M").take(0.01)
