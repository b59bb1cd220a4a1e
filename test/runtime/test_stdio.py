"""katashim.runtime.stdio with real FIFOs, files and logging programs; the clients are native threads."""

import os
import stat
import sys
import threading
import time

import gevent
import pytest
from gevent.event import Event
from gevent.queue import Queue

from katashim import green
from katashim.errors import Cancelled, DeadlineExceeded, InvalidArgument, KatashimError, NotFound
from katashim.runtime import stdio as stdio_module
from katashim.runtime.stdio import copy_in, copy_out, open_stdio

LONG_S = 10         # no test waits that long unless it fails


@pytest.fixture
def fifo(tmp_path):
    def make(name):
        path = str(tmp_path / name)
        os.mkfifo(path)
        return path
    return make


@pytest.fixture
def opened():
    """open_stdio with defaults; closes everything and finds leaked descriptors."""
    before = set(os.listdir("/proc/self/fd"))
    made = []

    def make(stdin="", stdout="", stderr="", terminal=False, **options):
        options = {"container_id": "c1", "namespace": "k8s.io", **options}
        made.append(open_stdio(stdin, stdout, stderr, terminal, **options))
        return made[-1]
    yield make
    for each in made:
        each.close()
    gevent.sleep(0)                     # descriptors somebody waited for are closed by the loop
    left = set(os.listdir("/proc/self/fd")) - before
    assert not {fd for fd in left if os.path.exists(f"/proc/self/fd/{fd}") and _is_stream(fd)}


def _is_stream(fd):
    mode = os.stat(f"/proc/self/fd/{fd}").st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


class Reader:
    """A client that reads a FIFO in a native thread, as containerd's copying goroutine does."""

    def __init__(self, path, size=None):
        self.data = b""
        self._path, self._size = path, size
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        with open(self._path, "rb", buffering=0) as pipe:
            while self._size is None or len(self.data) < self._size:
                chunk = pipe.read(65536 if self._size is None else self._size - len(self.data))
                if not chunk:
                    return
                self.data += chunk

    def result(self):
        """What it has read when the file ended (or `size` bytes were there)."""
        green.in_thread(self._thread.join, LONG_S, what="the client to read to the end", timeout_s=LONG_S)
        assert not self._thread.is_alive(), f"no end of file after {len(self.data)} bytes"
        return self.data


def until(condition, what):
    """Let the others run until `condition()` holds."""
    with green.deadline(LONG_S, what):
        while not condition():
            gevent.sleep(0)


# -- FIFOs ----------------------------------------------------------------------------------------
def test_output_reaches_its_readers_and_ends_with_an_end_of_file(fifo, opened):
    out, err = fifo("out"), fifo("err")
    stdio = opened(stdout=out, stderr=err)
    readers = Reader(out), Reader(err)
    stdio.stdout.write(b"hello\n")
    stdio.stderr.write(b"oops\n")
    stdio.stdout.end()
    stdio.stderr.end()
    assert [reader.result() for reader in readers] == [b"hello\n", b"oops\n"]


def test_opening_never_waits_for_the_other_side(fifo, opened):
    started = time.monotonic()
    opened(fifo("in"), fifo("out"), fifo("err"))
    assert time.monotonic() - started < 1


def test_a_reader_that_comes_after_the_last_write_still_gets_it(fifo, opened):
    out = fifo("out")
    stdio = opened(stdout=out)
    stdio.stdout.write(b"all of it")
    stdio.stdout.end()
    assert Reader(out).result() == b"all of it"


def test_a_late_reader_still_finds_the_end_after_several_looks(fifo, opened, monkeypatch):
    monkeypatch.setattr(stdio_module, "_LATE_READER_S", 0.001)
    out = fifo("out")
    stdio = opened(stdout=out)
    stdio.stdout.end()
    looks = []
    seen = stdio.stdout._has_reader
    monkeypatch.setattr(stdio.stdout, "_has_reader", lambda: looks.append(1) or seen())
    until(lambda: len(looks) >= 3, "three looks for a reader")
    assert Reader(out).result() == b""


def test_after_the_end_nothing_can_be_written(fifo, opened):
    out = fifo("out")
    stdio = opened(stdout=out)
    reader = Reader(out)
    stdio.stdout.end()
    reader.result()
    with pytest.raises(Cancelled):
        stdio.stdout.write(b"more")


def test_a_slow_reader_makes_the_writer_wait_and_loses_nothing(fifo, opened):
    out = fifo("out")
    stdio = opened(stdout=out)
    data = os.urandom(1 << 20)
    writer = gevent.spawn(stdio.stdout.write, data)
    gevent.sleep(0)
    assert not writer.dead                      # a pipe holds 64 KiB
    reader = Reader(out)
    writer.get(timeout=LONG_S)
    stdio.stdout.end()
    assert reader.result() == data


def test_a_client_can_detach_and_another_attach_without_a_byte_lost(fifo, opened):
    out = fifo("out")
    stdio = opened(stdout=out)
    first = Reader(out, size=5)
    stdio.stdout.write(b"first")
    assert first.result() == b"first"           # and has closed the FIFO
    data = os.urandom(200_000)
    writer = gevent.spawn(stdio.stdout.write, data)
    gevent.sleep(0)
    second = Reader(out)
    writer.get(timeout=LONG_S)
    stdio.stdout.end()
    assert second.result() == data


def test_output_that_waits_for_an_absent_client_can_be_told_from_one_that_waits_for_a_slow_one(fifo, opened):
    out = fifo("out")
    stdio = opened(stdout=out)
    stdio.stdout.write(b"some room is left")
    assert not stdio.unread()
    data = os.urandom(1 << 20)
    writer = gevent.spawn(stdio.stdout.write, data)
    gevent.sleep(0)
    assert stdio.unread()
    slow = os.open(out, os.O_RDONLY)
    assert not stdio.unread()
    os.close(slow)
    assert stdio.unread()
    reader = Reader(out)
    writer.get(timeout=LONG_S)
    stdio.stdout.end()
    assert reader.result() == b"some room is left" + data


def test_close_wakes_a_writer_whose_reader_is_away(fifo, opened):
    stdio = opened(stdout=fifo("out"))
    writer = gevent.spawn(stdio.stdout.write, bytes(1 << 20))
    gevent.sleep(0)
    stdio.close()
    with pytest.raises(Cancelled):
        writer.get(timeout=LONG_S)
    with pytest.raises(Cancelled):
        stdio.stdout.write(b"more")


def test_a_waiting_writer_does_not_block_the_others(fifo, opened):
    stdio = opened(stdout=fifo("out"))
    writer = gevent.spawn(stdio.stdout.write, bytes(1 << 20))
    ran = Event()
    gevent.spawn(ran.set)
    assert ran.wait(LONG_S) and not writer.dead


def test_with_a_terminal_stderr_is_not_opened(fifo, opened, tmp_path):
    stdio = opened(stdout=fifo("out"), stderr=str(tmp_path / "missing"), terminal=True)
    stdio.stderr.write(b"nowhere")


def test_what_containerd_did_not_ask_for_is_dropped(opened):
    stdio = opened()
    stdio.stdout.write(b"x" * 1_000_000)
    assert not stdio.has_stdin
    assert stdio.read_stdin() == b""


def test_a_device_may_stand_in_for_a_fifo(opened):
    stdio = opened("/dev/null", "/dev/null", "fifo:///dev/null")
    stdio.stdout.write(b"x" * 1_000_000)
    assert stdio.read_stdin() == b""


@pytest.mark.parametrize("streams, kind", [
    ({"stdout": "/nowhere/at/all"}, NotFound),
    ({"stdin": "/nowhere/at/all"}, NotFound),
    ({"stdout": "ttrpc+unix:///run/x"}, InvalidArgument),
    ({"stdin": "file:///tmp/x"}, InvalidArgument),
    ({"stdout": "file://relative"}, InvalidArgument),
    ({"stdout": "/proc"}, KatashimError),
])
def test_a_stream_that_cannot_be_opened_is_an_error_that_names_it(opened, streams, kind):
    with pytest.raises(kind, match=next(iter(streams.values())).rpartition("//")[2][:8]):
        opened(**streams)


def test_a_failed_open_closes_what_was_opened_before(fifo, opened):
    with pytest.raises(NotFound):
        opened(fifo("in"), fifo("out"), "/nowhere")


# -- stdin ----------------------------------------------------------------------------------------
def write_fifo(path, data):
    """A client: opens, writes, closes; in a native thread."""
    def work():
        with open(path, "wb", buffering=0) as pipe:
            pipe.write(data)
    green.in_thread(work, what="the client to write stdin", timeout_s=LONG_S)


def test_stdin_arrives_and_stays_open_when_the_client_detaches(fifo, opened):
    path = fifo("in")
    stdio = opened(stdin=path)
    write_fifo(path, b"one")
    assert stdio.read_stdin() == b"one"
    reader = gevent.spawn(stdio.read_stdin)
    gevent.sleep(0)
    assert not reader.dead                      # no end of file, though nobody has it open now
    write_fifo(path, b"two")
    assert reader.get(timeout=LONG_S) == b"two"


def test_close_stdin_ends_it_after_what_was_written(fifo, opened):
    path = fifo("in")
    stdio = opened(stdin=path)
    write_fifo(path, b"last words")
    stdio.close_stdin()
    assert stdio.read_stdin() == b"last words"
    assert stdio.read_stdin() == b""


def test_close_stdin_wakes_a_waiting_reader(fifo, opened):
    stdio = opened(stdin=fifo("in"))
    reader = gevent.spawn(stdio.read_stdin)
    gevent.sleep(0)
    stdio.close_stdin()
    assert reader.get(timeout=LONG_S) == b""


def test_close_wakes_a_waiting_reader_with_an_error_that_is_no_end_of_file(fifo, opened):
    stdio = opened(stdin=fifo("in"))
    reader = gevent.spawn(stdio.read_stdin)
    gevent.sleep(0)
    stdio.close()
    with pytest.raises(Cancelled):
        reader.get(timeout=LONG_S)


# -- copying --------------------------------------------------------------------------------------
class Guest:
    """A stream of the guest: what is put into it can be read; b"" ends it."""

    def __init__(self, *chunks):
        self.chunks = Queue()
        for chunk in chunks:
            self.chunks.put(chunk)

    def read(self):
        return self.chunks.get(timeout=LONG_S)


def test_copy_out_copies_to_the_end_and_closes_the_stream(fifo, opened):
    out = fifo("out")
    stdio = opened(stdout=out)
    reader = Reader(out)
    chunks = [os.urandom(size) for size in (1, 65536, 4096, 300_000)]
    assert copy_out(Guest(*chunks, b"").read, stdio.stdout, "stdout") == sum(map(len, chunks))
    assert reader.result() == b"".join(chunks)


def test_copy_out_closes_the_stream_when_the_guest_is_lost(fifo, opened):
    out = fifo("out")
    stdio = opened(stdout=out)
    reader = Reader(out)
    replies = iter([b"before"])

    def read():
        for data in replies:
            return data
        raise KatashimError("the VM died")
    with pytest.raises(KatashimError, match="the VM died"):
        copy_out(read, stdio.stdout, "stdout")
    assert reader.result() == b"before"


def test_copy_out_goes_on_reading_when_the_sink_fails(opened, caplog):
    stdio = opened(stdout="file:///dev/full")
    guest = Guest(b"a" * 10, b"b" * 20, b"")
    assert copy_out(guest.read, stdio.stdout, "stdout of c1") == 0
    assert guest.chunks.empty()
    assert "stdout of c1 cannot be written" in caplog.text and "30 bytes are lost" in caplog.text


def test_copy_out_ends_when_the_stream_is_closed_under_it(fifo, opened):
    stdio = opened(stdout=fifo("out"))
    guest = Guest(bytes(1 << 20))
    copier = gevent.spawn(copy_out, guest.read, stdio.stdout, "stdout")
    until(guest.chunks.empty, "the copier to begin")
    stdio.close()
    assert copier.get(timeout=LONG_S) == 0


def test_copy_in_hands_everything_over_and_then_ends_the_guests_stdin(fifo, opened):
    path = fifo("in")
    stdio = opened(stdin=path)
    data, got, ended = os.urandom(500_000), [], Event()
    copier = gevent.spawn(copy_in, stdio, got.append, ended.set)
    write_fifo(path, data)
    stdio.close_stdin()
    assert ended.wait(LONG_S)
    copier.get(timeout=LONG_S)
    assert b"".join(got) == data


def test_copy_in_does_not_end_the_guests_stdin_when_the_shim_closes(fifo, opened):
    stdio = opened(stdin=fifo("in"))
    ended = Event()
    copier = gevent.spawn(copy_in, stdio, None, ended.set)
    gevent.sleep(0)
    stdio.close()
    copier.get(timeout=LONG_S)
    assert not ended.is_set()


# -- files ----------------------------------------------------------------------------------------
def test_a_file_is_made_with_its_directories_and_appended_to(opened, tmp_path):
    path = tmp_path / "logs" / "deep" / "my log"
    for text in (b"one\n", b"two\n"):
        stdio = opened(stdout=f"file://{tmp_path}/logs/deep/my%20log")
        stdio.stdout.write(text)
        stdio.close()
    assert path.read_bytes() == b"one\ntwo\n"
    assert path.stat().st_mode & 0o777 == 0o640


# -- logging programs -----------------------------------------------------------------------------
@pytest.fixture
def program(tmp_path):
    """Makes an executable out of Python lines; returns its path."""
    def make(*lines):
        path = tmp_path / "logger"
        path.write_text(f"#!{sys.executable} -IS\nimport os, sys\n" + "\n".join(lines) + "\n")
        path.chmod(0o755)
        return str(path)
    return make


def test_a_logging_program_gets_both_streams_its_arguments_and_its_environment(opened, program, tmp_path):
    path = program(
        f"out = open('{tmp_path}/seen', 'wb')",
        "os.write(5, b'x'); os.close(5)",
        "env = {key: os.environ[key] for key in os.environ if key != 'LC_CTYPE'}",
        "out.write(repr((sys.argv[1:], env)).encode() + b'\\n')",
        "out.write(open(3, 'rb').read() + b'|' + open(4, 'rb').read())",
        "out.close()")
    uri = f"binary://{path}?id=a%20b&flag=&id=again"
    stdio = opened(stdout=uri, stderr=uri)
    stdio.stdout.write(b"output")
    stdio.stderr.write(b"errors")
    stdio.close()
    head, streams = (tmp_path / "seen").read_bytes().split(b"\n")
    assert streams == b"output|errors"
    assert eval(head) == (["id", "a b", "flag", ""],
                          {"CONTAINER_ID": "c1", "CONTAINER_NAMESPACE": "k8s.io"})


def test_a_program_that_closes_the_readiness_pipe_is_ready(opened, program):
    stdio = opened(stdout=f"binary://{program('os.close(5)', 'open(3).read()')}")
    stdio.stdout.write(b"x")


def test_a_program_that_fails_at_once_is_an_error(opened, program):
    with pytest.raises(InvalidArgument, match="exited with status 3"):
        opened(stdout=f"binary://{program('sys.exit(3)')}")


def test_a_program_that_cannot_be_executed_is_an_error(opened):
    with pytest.raises(InvalidArgument, match="/no/such/logger"):
        opened(stdout="binary:///no/such/logger")


def test_a_program_that_is_never_ready_is_ended_in_bounded_time(opened, program, monkeypatch):
    monkeypatch.setattr("katashim.runtime.binary_logger._READY_S", 0.1)
    with pytest.raises(DeadlineExceeded, match="logging program"):
        opened(stdout=f"binary://{program('open(4).read()')}")


def test_a_program_that_does_not_end_is_made_to(opened, program):
    path = program("import signal, time", "signal.signal(15, signal.SIG_IGN)", "os.close(5)",
                   "signal.pause()")
    stdio = opened(stdout=f"binary://{path}", logger_stop_s=0.05)
    child = stdio._logger._child
    stdio.close()
    assert child.returncode == -9


def test_output_for_a_program_that_died_is_dropped_not_waited_for(opened, program, caplog):
    stdio = opened(stdout=f"binary://{program('os.close(5)', 'os.read(3, 1)')}")
    stdio.stdout.write(b"x")
    assert stdio._logger._child.wait(LONG_S) == 0
    assert copy_out(Guest(bytes(200_000), b"").read, stdio.stdout, "stdout of c1") == 0
    assert "200000 bytes are lost" in caplog.text


def test_stderr_alone_may_go_to_a_program(fifo, opened, program, tmp_path):
    path = program(f"out = open('{tmp_path}/seen', 'wb')", "os.close(5)", "out.write(open(4, 'rb').read())")
    stdio = opened(stdout=fifo("out"), stderr=f"binary://{path}")
    stdio.stderr.write(b"errors")
    stdio.close()
    assert (tmp_path / "seen").read_bytes() == b"errors"


def test_split_uri():
    assert stdio_module.split_uri("/run/fifo") == ("fifo", "/run/fifo")
    assert stdio_module.split_uri("fifo:///run/a%20b") == ("fifo", "/run/a b")
