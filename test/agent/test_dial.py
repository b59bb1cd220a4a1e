"""Dialling the guest's agent: the address schemes, patience, and what is said when it runs out."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from katashim.agent import dial
from katashim.errors import DeadlineExceeded, InvalidArgument, Unavailable


class Peer:
    """A listening unix socket; each connection is given to the next of the `scripts`."""

    def __init__(self, path, *scripts, backlog=8):
        self.path, self.scripts, self.accepted = path, scripts, 0
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(backlog)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self):
        for script in self.scripts:
            sock, _ = self.listener.accept()
            self.accepted += 1
            with sock:
                sock.settimeout(10)
                script(sock)

    def close(self):
        self.listener.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


def line_of(sock):
    line = b""
    while not line.endswith(b"\n"):
        line += sock.recv(1)
    return line


def until_closed(sock):
    with contextlib.suppress(ConnectionResetError):
        sock.recv(1)


def refuse(sock):
    line_of(sock)


def silence(sock):
    line_of(sock)
    until_closed(sock)


def close_at_once(sock):
    pass


def answer(text, line=None):
    def script(sock):
        got = line_of(sock)
        assert line is None or got == line
        sock.sendall(text)
        until_closed(sock)
    return script


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "hybrid.sock")


@contextlib.contextmanager
def peer(path, *scripts):
    running = Peer(path, *scripts)
    try:
        yield running
    finally:
        running.close()


def test_the_handshake_reads_no_byte_too_many(path):
    with (peer(path, answer(b"OK 1073741824\nfirst bytes", b"CONNECT 1024\n")),
          dial.connect(f"hvsock://{path}:1024", 5) as sock):
        assert sock.gettimeout() is None
        assert sock.recv(100) == b"first bytes"


def test_it_tries_again_while_the_guest_does_not_listen(path):
    with (peer(path, refuse, close_at_once, refuse, answer(b"OK 5\n")) as running,
          dial.connect(f"hvsock://{path}:1024", 5)):
        assert running.accepted == 4


def test_it_waits_for_a_socket_that_is_not_there_yet(path):
    timer = threading.Timer(0.05, lambda: started.append(Peer(path, answer(b"OK 5\n"))))
    started = []
    timer.start()
    with dial.connect(f"hvsock://{path}:1024", 5):
        pass
    timer.join()
    started[0].close()


def test_an_answer_that_is_not_ok(path):
    with peer(path, answer(b"NO\n"), answer(b"x" * 100), answer(b"OK 1\n")):
        dial.connect(f"hvsock://{path}:1024", 5).close()


def test_the_deadline_names_the_address_and_the_last_cause(path):
    with pytest.raises(DeadlineExceeded) as failed:
        dial.connect(f"hvsock://{path}:1024", 0.05)
    assert f"hvsock://{path}:1024" in str(failed.value)
    assert "No such file" in str(failed.value)
    assert isinstance(failed.value.__cause__, FileNotFoundError)


def test_a_peer_that_never_answers_is_bounded(path):
    with peer(path, silence):
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="no answer"):
            dial.connect(f"hvsock://{path}:1024", 0.2)
        assert time.monotonic() - began < 5


def test_a_lost_request_is_sent_again(path, monkeypatch):
    monkeypatch.setattr(dial, "_FIRST_TRY_S", 0.05)
    with peer(path, silence, answer(b"OK 1\n")) as running:
        dial.connect(f"hvsock://{path}:1024", 5).close()
        assert running.accepted == 2


def test_the_death_of_the_vm_ends_the_waiting(path):
    answers = iter([True, True, False])
    with pytest.raises(Unavailable, match="is gone"):
        dial.connect(f"hvsock://{path}:1024", 60, alive=lambda: next(answers))


@pytest.mark.parametrize("scheme", ["unix", "remote"])
def test_plain_unix_sockets(path, scheme):
    def greet(sock):
        sock.sendall(b"hello")

    with peer(path, greet), dial.connect(f"{scheme}://{path}", 5) as sock:
        assert sock.recv(5) == b"hello"


def test_no_fd_is_left_of_failed_tries(path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DeadlineExceeded):
        dial.connect(f"unix://{path}", 0.05)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("url", "expected"), [
    ("vsock://3:1024", ("vsock", 3, 1024)),
    ("hvsock:///run/kata/x/kata.hvsock:1026", ("hvsock", "/run/kata/x/kata.hvsock", 1026)),
    ("hvsock:///with:colon:7", ("hvsock", "/with:colon", 7)),
    ("unix:///run/agent.sock", ("unix", "/run/agent.sock", None)),
    ("remote:///run/agent.sock", ("unix", "/run/agent.sock", None))])
def test_urls(url, expected):
    assert dial.parse(url) == expected


@pytest.mark.parametrize("url", [
    "", "vsock", "vsock://", "vsock://3", "vsock://x:1", "vsock://-1:1", "vsock://3:4294967296",
    "vsock://٣:1", "hvsock://relative:1", "hvsock:///path", "hvsock:///path:", "unix://relative",
    "tcp://host:1", "unix:///" + "x" * 107])
def test_bad_urls_are_named(url):
    with pytest.raises(InvalidArgument, match=re.escape(repr(url))):
        dial.connect(url, 1)


def test_the_kernels_vsock():
    """Without a guest: a host that has the family refuses the connection, one that has not says so."""
    with pytest.raises((DeadlineExceeded, Unavailable)) as failed:
        dial.connect("vsock://4000000000:1024", 0.1)
    assert "vsock://4000000000:1024" in str(failed.value)


def test_it_is_cooperative_under_gevent(path):
    """With the daemon's patching other greenlets run while a dial waits."""
    code = f"""
from katashim import green
green.patch()
import gevent, socket
from katashim.agent import dial
ticks = []
def tick():
    while True:
        ticks.append(1)
        gevent.sleep(0.001)
def guest():
    gevent.sleep(0.05)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind({path!r})
    listener.listen()
    for reply in (b"", b"OK 9\\n+"):
        sock, _ = listener.accept()
        sock.recv(100)
        gevent.sleep(0.05)
        sock.sendall(reply)
        sock.close()
gevent.spawn(tick)
gevent.spawn(guest)
sock = dial.connect("hvsock://" + {path!r} + ":1024", 5)
assert sock.recv(1) == b"+"
assert len(ticks) > 20, len(ticks)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
