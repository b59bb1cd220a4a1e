"""The tail of a console: what is kept, what is timed, and a writer that never stops."""

import logging
import os
import re
import threading
import time

import gevent
import pytest

from katashim.drivers.console import KEPT_BYTES, Tail

LONG = 10


@pytest.fixture
def pipe():
    """``(write end, make(**options) -> Tail)``."""
    reading, writing = os.pipe()
    tails = []

    def make(**options):
        tails.append(Tail("console of sandbox x", reading, **options))
        return tails[-1]

    yield writing, make
    for tail in tails:
        tail.close()
    try:
        os.close(writing)
    except OSError:
        pass                    # the test closed it


def test_text_has_what_was_just_written(pipe):
    writing, make = pipe
    tail = make()
    assert tail.text() == "" and tail.first_at is None
    os.write(writing, b"Linux version 6.1\r\n")
    assert tail.text() == "Linux version 6.1\n"
    os.write(writing, b"Kernel panic\r\n\r\n")
    assert tail.last_line() == "Kernel panic"


def test_the_reader_collects_by_itself_and_notices_the_end(pipe):
    writing, make = pipe
    tail = make()
    os.write(writing, b"one")
    os.close(writing)
    assert tail.wait_end(LONG)
    assert tail.text() == "one"


def test_the_end_seen_by_text_first_still_ends_the_reader(pipe):
    writing, make = pipe
    tail = make()
    gevent.sleep(0)             # the reader waits
    os.write(writing, b"one")
    os.close(writing)
    assert tail.text() == "one" and tail.ended
    tail._reader.join(LONG)
    assert tail._reader.dead and tail._fd is None


def test_only_the_last_bytes_are_kept(pipe):
    writing, make = pipe
    tail = make(size=1000)
    for number in range(500):
        os.write(writing, b"%09d\n" % number)
        tail.text()
    lines = tail.text().splitlines()
    assert len(lines) == 100 and lines[-1] == "000000499"
    assert sum(map(len, tail._pieces)) < 2000


def test_the_mark_and_the_first_output_are_timed(pipe):
    writing, make = pipe
    tail = make(mark=re.compile(rb"agent st[a-z]*s"))
    before = time.monotonic()
    os.write(writing, b"booting\nage")
    tail.text()
    os.write(writing, b"nt st")
    tail.text()
    assert before <= tail.first_at <= time.monotonic() and tail.mark_at is None
    os.write(writing, b"arts\n")
    tail.text()
    assert tail.first_at <= tail.mark_at <= time.monotonic()
    first, mark = tail.first_at, tail.mark_at
    os.write(writing, b"agent starts\n")
    tail.text()
    assert (tail.first_at, tail.mark_at) == (first, mark)


def test_terminal_sequences_and_bad_utf8_become_clean_text(pipe):
    writing, make = pipe
    tail = make()
    os.write(writing, b"\x1bc\x1b[?7l\x1b[2J\x1b]0;title\x07SeaBIOS\t1\x00\r\n\xff\xc3\xa9\n")
    assert tail.text() == "SeaBIOS\t1\n�é\n"


def test_lines_go_to_the_debug_log_when_asked(pipe, caplog):
    writing, make = pipe
    with caplog.at_level(logging.DEBUG, logger="katashim.drivers.console"):
        tail = make(log_lines=True)
        os.write(writing, b"one\r\ntwo\r\nthr")
        tail.text()
        os.write(writing, b"ee\r\n")
        tail.text()
    assert [record.getMessage() for record in caplog.records] == [
        f"console of sandbox x: {word}" for word in ("one", "two", "three")]


def test_a_flooding_guest_costs_little_and_never_blocks_the_hub(pipe):
    writing, make = pipe
    tail = make()
    stop = threading.Event()

    def flood():                # a native thread: no gevent patching in the tests
        line = b"flood " * 10_000
        try:
            while not stop.is_set():
                os.write(writing, line)
        except BrokenPipeError:
            pass

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        begun, used = time.monotonic(), time.thread_time()
        longest, turns = 0.0, 0
        while time.monotonic() - begun < 0.4:
            before = time.monotonic()
            gevent.sleep(0.001)
            longest, turns = max(longest, time.monotonic() - before), turns + 1
        assert turns > 20, "other greenlets starved"
        assert longest < 0.2
        assert time.thread_time() - used < 0.3
        assert len(tail.text()) <= KEPT_BYTES and tail.text().endswith(("flood ", "flood", "floo", "flo", "fl", "f"))
        assert sum(map(len, tail._pieces)) < 3 * KEPT_BYTES
    finally:
        stop.set()
        tail.close()
        thread.join(LONG)
    assert not thread.is_alive()


def test_close_keeps_the_text_and_may_be_repeated(pipe):
    writing, make = pipe
    tail = make()
    os.write(writing, b"last words")
    tail.text()
    tail.close()
    tail.close()
    assert tail.text() == "last words" and tail.ended
