"""Choosing and starting a sandbox's vsock backend; the backends themselves are real processes."""

import errno
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
from types import SimpleNamespace

import gevent
import pytest
from vsock_guest import Guest
from vsock_process import MAIN, exactly

from katashim import child
from katashim.agent import dial
from katashim.drivers import vsock
from katashim.errors import ConfigError, HypervisorError, InvalidArgument, Unavailable
from katashim.undo import Undo, read, replay

needs_no_kernel_vsock = pytest.mark.skipif(os.path.exists(vsock.DEVICE), reason="the host has vhost-vsock")


def _unlink(path):
    if os.path.lexists(path):
        os.unlink(path)


def _rmdir(path):
    if os.path.isdir(path):
        os.rmdir(path)


def _end(pid, start_time, name):
    if pid:
        child.kill_identity(pid, start_time)


RELEASES = {"file": _unlink, "dir": _rmdir, "process": _end}


def config(backend, path=""):
    return SimpleNamespace(vsock_backend=backend, vsock_backend_path=path)


@pytest.fixture
def undo(tmp_path):
    stack = Undo(str(tmp_path / "journal"), RELEASES)
    yield stack
    assert stack.unwind() == []
    stack.close()


@pytest.fixture
def run_dir():
    """With a short name, as /run/kata/<id> has."""
    path = f"/run/katashim-test-{os.getpid()}"
    os.mkdir(path)
    yield path
    os.rmdir(path)


def program(tmp_path, text):
    """An executable named like vhost-device-vsock."""
    path = tmp_path / "bin" / "vhost-device-vsock"
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def serves_a_guest(backend):
    """A guest boots on the backend's vhost-user socket and the host dials its port 1024."""
    done = []

    def guest_side():
        guest = Guest(backend.chardev_path, backend.cid)
        guest.boot()
        key = guest.accept()
        guest.write(key, b"from the guest")
        done.append(guest.read(key, 13))
        guest.close()

    thread = threading.Thread(target=guest_side)
    thread.start()
    with dial.connect(backend.address(1024), 10) as sock:
        sock.settimeout(10)
        assert exactly(sock, 14) == b"from the guest"
        sock.sendall(b"from the host")
        thread.join(10)
    return done == [b"from the host"]


def test_the_builtin_backend(run_dir, undo):
    backend = vsock.open_vsock("s1", run_dir, config("builtin"), undo)
    assert (backend.kind, backend.backend, backend.cid) == ("vhost-user", "builtin", 3)
    assert backend.address(1024) == f"hvsock://{run_dir}/kata.hvsock:1024"
    assert backend.listen_path(10240) == f"{run_dir}/kata.hvsock_10240"
    assert stat.S_IMODE(os.stat(backend.chardev_path).st_mode) == 0o600
    assert len(backend.pids()) == 1
    assert serves_a_guest(backend)
    backend.stop()
    backend.stop()
    assert backend.exited.is_set() and backend.pids() == []
    assert os.listdir(run_dir) == []


def test_the_unwinding_of_the_stack_ends_it(run_dir, undo):
    backend = vsock.open_vsock("s1", run_dir, config("builtin"), undo)
    pid = backend.pids()[0]
    fds = len(os.listdir("/proc/self/fd"))
    assert undo.unwind() == []
    assert child.start_time(pid) is None
    assert os.listdir(run_dir) == []
    assert len(os.listdir("/proc/self/fd")) < fds


def test_the_journal_of_a_dead_shim_ends_it(run_dir, tmp_path, undo):
    backend = vsock.open_vsock("s1", run_dir, config("builtin"), undo)
    kinds = [kind for _, kind, _ in read(str(tmp_path / "journal"))[1]]
    assert kinds == ["file", "file", "process"]
    assert replay(str(tmp_path / "journal"), RELEASES) == []
    assert backend.exited.wait(5)
    assert os.listdir(run_dir) == []


def test_it_dies_with_the_shim(run_dir):
    """A SIGKILLed shim leaves nothing behind even before `delete` runs."""
    code = f"""
import os, signal, types
from katashim.drivers import vsock
from katashim.undo import Undo
releases = dict.fromkeys(("file", "dir", "process"))
backend = vsock.open_vsock("s", {run_dir!r}, types.SimpleNamespace(
    vsock_backend="builtin", vsock_backend_path=""), Undo(None, releases))
print(backend.pids()[0], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    shim = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False, timeout=20)
    pid = int(shim.stdout)
    started = child.start_time(pid)
    assert started is None or child.wait_gone(pid, started, 10)
    assert os.listdir(run_dir) == []


def test_a_program_with_the_flags_of_vhost_device_vsock(tmp_path, run_dir, undo):
    path = program(tmp_path, f'exec {sys.executable} -IS {MAIN} "$@"\n')
    backend = vsock.open_vsock("s1", run_dir, config("vhost-device-vsock", path), undo)
    assert (backend.kind, backend.backend) == ("vhost-user", "vhost-device-vsock")
    assert serves_a_guest(backend)


def test_a_program_that_ends_at_once(tmp_path, run_dir, undo):
    path = program(tmp_path, 'echo "no such option" >&2; exit 3\n')
    with pytest.raises(HypervisorError, match="exited with status 3: no such option"):
        vsock.open_vsock("s1", run_dir, config("vhost-device-vsock", path), undo)


def test_a_program_that_cannot_be_executed(tmp_path, run_dir, undo):
    path = program(tmp_path, "")
    with open(path, "w") as file:
        file.write("#!/nowhere/sh\n")
    with pytest.raises(HypervisorError, match="cannot start"):
        vsock.open_vsock("s1", run_dir, config("vhost-device-vsock", path), undo)


def test_a_long_run_dir_gets_sockets_in_a_short_one(tmp_path, undo):
    long_dir = tmp_path / ("x" * 90)
    long_dir.mkdir()
    backend = vsock.open_vsock("s1", str(long_dir), config("builtin"), undo)
    place = os.path.dirname(backend.chardev_path)
    assert place.startswith("/run/kata-vsock-")
    assert len(backend.listen_path(4294967295)) <= 107
    assert serves_a_guest(backend)
    assert undo.unwind() == []
    assert not os.path.exists(place)


def test_a_socket_that_cannot_be_bound_is_named(tmp_path, undo):
    with pytest.raises(HypervisorError, match="cannot listen at /nowhere/vhost-vsock.sock: No such file"):
        vsock.open_vsock("s1", "/nowhere", config("builtin"), undo)


@needs_no_kernel_vsock
def test_auto_takes_the_first_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert vsock.choose("auto") == ("builtin", "")
    path = program(tmp_path, "")
    assert vsock.choose("auto", path) == ("vhost-device-vsock", path)
    monkeypatch.setenv("PATH", os.path.dirname(path))
    assert vsock.choose("auto") == ("vhost-device-vsock", path)
    assert vsock.choose("builtin") == ("builtin", "")


def test_what_is_configured_and_missing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(vsock, "DEVICE", "/nowhere/vhost-vsock")
    with pytest.raises(ConfigError, match=r"vsock_backend = kernel: cannot open /nowhere/vhost-vsock: No such"):
        vsock.choose("kernel")
    with pytest.raises(ConfigError, match=r"there is no program vhost-device-vsock in PATH"):
        vsock.choose("vhost-device-vsock")
    with pytest.raises(ConfigError, match=r"there is no program /opt/vdv"):
        vsock.choose("auto", "/opt/vdv")


def test_a_context_id_is_tried_until_the_kernel_agrees():
    asked = []

    def kernel(fd, request, argument):
        asked.append((fd, request, struct.unpack("=Q", argument)[0]))
        if len(asked) < 4:
            raise OSError(errno.EADDRINUSE, "in use")

    cid = vsock.claim_cid(7, kernel)
    assert len(asked) == 4 and asked[-1] == (7, 0x4008AF60, cid)
    assert all(3 <= tried < 0xffffffff for _, _, tried in asked)


def test_no_context_id_to_be_had():
    def refuses(number):
        def kernel(fd, request, argument):
            raise OSError(number, os.strerror(number))
        return kernel

    with pytest.raises(Unavailable, match="all in use"):
        vsock.claim_cid(7, refuses(errno.EADDRINUSE))
    with pytest.raises(Unavailable, match="No such device"):
        vsock.claim_cid(7, refuses(errno.ENODEV))


@pytest.mark.skipif(not os.path.exists(vsock.DEVICE), reason="the host has no vhost-vsock")
def test_the_kernels(run_dir, undo):
    backend = vsock.open_vsock("s1", run_dir, config("kernel"), undo)
    assert backend.kind == "kernel" and backend.vhost_fd >= 0 and backend.pids() == []
    assert backend.address(1024) == f"vsock://{backend.cid}:1024"
    with pytest.raises(InvalidArgument):
        backend.listen_path(1)
    backend.stop()
    assert backend.vhost_fd == -1


def test_the_death_of_the_backend_is_an_event(run_dir, undo):
    backend = vsock.open_vsock("s1", run_dir, config("builtin"), undo)
    guest = socket.socket(socket.AF_UNIX)
    guest.connect(backend.chardev_path)
    waiting = gevent.spawn(backend.exited.wait, 10)
    gevent.sleep(0)
    assert not backend.exited.is_set()
    child.kill_identity(backend.pids()[0], child.start_time(backend.pids()[0]))
    assert waiting.get(timeout=10)
    guest.close()
