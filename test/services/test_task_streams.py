"""The Task service's streams and terminals, on the fake VMM."""

import os

import gevent
from fake_pod import Streams, crc, refused

from katashim import errors


# -- streams --------------------------------------------------------------------------------------
def test_all_output_is_there_before_the_exit_is_told(pod, cid):
    """8 MiB in one burst; at the moment that Wait answers, nothing more may be missing."""
    io = pod.streams().read()
    pod.start(cid, "sh", "-c", "seq 1 1200000; exit 5", io=io)
    assert pod.wait(cid) == 5
    wanted = b"".join(b"%d\n" % number for number in range(1, 1200001))
    gevent.idle()
    assert len(wanted) > 8 << 20 and crc(io.output()) == crc(wanted)


def test_stdin_comes_back_whole(pod, cid):
    io = pod.streams(stdin=True).read()
    pod.start(cid, "cat", io=io)
    io.open_stdin()
    data = os.urandom(1 << 20) * 4
    io.write(data)
    io.close_stdin()
    pod.call("CloseIO", id=cid, stdin=True)
    assert pod.wait(cid) == 0
    assert crc(io.output()) == crc(data)


def test_stdin_stays_open_until_close_io(pod, cid):
    io = pod.streams(stdin=True).read()
    pod.start(cid, "sh", "-c", "cat; echo end", io=io)
    for text in (b"one\n", b"two\n"):       # a client that comes and goes
        io.open_stdin()
        io.write(text)
        io.await_text(text)
        io.close_stdin()
    pod.call("CloseIO", id=cid, stdin=True)
    pod.call("CloseIO", id=cid, stdin=True)
    assert pod.wait(cid) == 0 and io.output() == b"one\ntwo\nend\n"


def test_without_stdin_a_program_reads_the_end_at_once(pod, cid):
    io = pod.streams().read()
    pod.start(cid, "cat", io=io)
    assert pod.wait(cid) == 0


def test_an_exit_does_not_wait_for_a_client_that_has_gone(pod, cid):
    """It detached in the middle of the output; a kill must end it all the same."""
    io = pod.streams()
    pod.start(cid, "sh", "-c", "seq 1 100000; sleep 1000", io=io)
    io.detach()
    pod.call("Kill", id=cid, signal=9)
    assert pod.wait(cid) == 137


def test_a_client_may_come_back(pod, cid):
    io = pod.streams().read()
    pod.start(cid, "sh", "-c", "echo one; while ! test -e $0; do sleep 0.01; done; echo two",
              f"{pod.place.directory}/{cid}-go", io=io)
    io.await_text(b"one")
    io.detach()
    again = Streams.attached_to(io).read()
    open(f"{pod.place.directory}/{cid}-go", "w").close()
    assert pod.wait(cid) == 0
    assert again.output() == b"two\n"
    again.detach()


def test_a_file_takes_output_too(pod, cid, tmp_path):
    io = pod.streams()
    io.stdout, io.stderr = f"file://{tmp_path}/out.log", ""
    pod.start(cid, "sh", "-c", "echo out; echo err >&2", io=io)
    assert pod.wait(cid) == 0
    assert (tmp_path / "out.log").read_text() == "out\n"


# -- terminals ------------------------------------------------------------------------------------
def test_a_terminal_has_a_size_and_one_output(pod, cid):
    io = pod.streams(stdin=True, terminal=True).read()
    pod.create(cid, "sh", "-c", "test -t 0 && test -t 1 && stty size; echo err >&2", io=io, terminal=True)
    pod.call("ResizePty", id=cid, width=120, height=40)
    pod.call("Start", id=cid)
    assert pod.wait(cid) == 0
    assert io.output() == b"40 120\r\nerr\r\n"
    assert pod.call("State", id=cid).terminal


def test_the_size_asked_for_before_an_exec_starts_is_there(pod, running):
    io = pod.streams(stdin=True, terminal=True).read()
    pod.add_exec(running, "e1", "sh", "-c", "sleep 0.1; stty size", io=io, terminal=True)
    pod.call("ResizePty", id=running, exec_id="e1", width=33, height=22)
    pod.call("Start", id=running, exec_id="e1")
    assert pod.wait(running, "e1") == 0
    assert io.output() == b"22 33\r\n"


def test_without_a_terminal_there_is_no_size(pod, running):
    refused(pod, errors.FAILED_PRECONDITION, "ResizePty", "has no terminal", id=running, width=1, height=1)


def test_resizing_what_has_ended_is_not_found(pod, cid):
    pod.start(cid, "true", io=pod.streams(terminal=True).read(), terminal=True)
    pod.wait(cid)
    refused(pod, errors.NOT_FOUND, "ResizePty", id=cid, width=1, height=1)
