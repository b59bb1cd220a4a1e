"""katashim.child: processes that are known by pid and start time."""

import os
import signal
import subprocess
import sys
import time

import gevent
import gevent.socket
import pytest

from katashim import child
from katashim.errors import DeadlineExceeded, HypervisorError

WAIT_S = 10


@pytest.fixture
def spawn():
    """Starts programs and ends them."""
    made = []

    def spawn(*argv, name="a program", **options):
        made.append(child.spawn(list(argv), name=name, **options))
        return made[-1]
    yield spawn
    for each in made:
        each.stop()


@pytest.fixture
def plain():
    """A process that katashim.child does not know."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def output_of(spawn, script, **options):
    """What a shell's script prints."""
    reader, writer = os.pipe()
    try:
        process = spawn("sh", "-c", script, stdout=writer, **options)
    finally:
        os.close(writer)
    assert process.wait(WAIT_S) == 0
    with os.fdopen(reader) as file:
        return file.read()


# -- the end of a child ---------------------------------------------------------------------------
@pytest.mark.parametrize("script, code, words", [
    ("exit 0", 0, "exited with status 0"), ("exit 7", 7, "exited with status 7"),
    ("kill -9 $$", -9, "killed by SIGKILL"), ("kill -15 $$", -15, "killed by SIGTERM")])
def test_its_end_is_seen(spawn, script, code, words):
    process = spawn("sh", "-c", script)
    assert process.wait(WAIT_S) == process.returncode == code
    assert process.ending() == words and process.exited.is_set()
    assert process.pid not in child.living()
    assert not child.is_alive(process.pid, process.start_time)


def test_waiting_has_a_limit_and_lets_others_run(spawn):
    process, ran = spawn("sleep", "1000"), []
    gevent.spawn(ran.append, 1)
    assert process.wait(0.02) is None and ran == [1]
    assert process.ending() == "still running" and process.pid in child.living()
    assert repr(process) == f"<a program, pid {process.pid}, running>"


def test_many_wait_for_it(spawn):
    process = spawn("sleep", "1000")
    waiting = [gevent.spawn(process.wait, WAIT_S) for _ in range(5)]
    gevent.idle()
    process.kill()
    assert [each.get() for each in waiting] == [-9] * 5
    process.kill()
    process.stop()


def test_stopping_is_kind_first(spawn):
    reader, writer = os.pipe()
    polite = spawn("sh", "-c", "trap 'exit 5' TERM; echo; while :; do sleep 0.01; done", stdout=writer)
    os.close(writer)
    gevent.socket.wait_read(reader, timeout=WAIT_S)
    os.close(reader)
    polite.stop(grace_s=5)
    assert polite.returncode == 5


def test_stopping_is_certain(spawn):
    reader, writer = os.pipe()
    deaf = spawn("sh", "-c", "trap '' TERM; echo; while :; do sleep 0.01; done", stdout=writer)
    os.close(writer)
    gevent.socket.wait_read(reader, timeout=WAIT_S)
    os.close(reader)
    deaf.stop(grace_s=0.05)
    assert deaf.returncode == -9


def test_a_stopped_process_is_killed_too(spawn):
    process = spawn("sleep", "1000")
    process.kill(signal.SIGSTOP)
    process.stop()
    assert process.returncode == -9


# -- how it starts --------------------------------------------------------------------------------
def test_a_program_that_cannot_be_executed(tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    for path, why in ((tmp_path / "none", "No such file"), (script, "Permission denied")):
        with pytest.raises(HypervisorError, match=f"cannot start QEMU .*{path}.*: {why}"):
            child.spawn([str(path)], name="QEMU")


def test_it_has_a_session_of_its_own_and_null_streams(spawn):
    process = spawn("sleep", "1000")
    assert os.getsid(process.pid) == process.pid
    assert {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}


def test_it_inherits_the_descriptors_that_are_named_and_no_other(spawn, tmp_path):
    with open(tmp_path / "given", "w") as given, open(tmp_path / "kept", "w") as kept:
        os.set_inheritable(kept.fileno(), True)
        process = spawn("sleep", "1000", pass_fds=[given.fileno()])
        fds = {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")}
    assert fds == {"/dev/null", str(tmp_path / "given")}


def test_its_environment_and_directory(spawn, tmp_path):
    text = output_of(spawn, "echo $X $PWD $HOME", env={"X": "y"}, cwd=str(tmp_path))
    assert text == f"y {tmp_path}\n"


def test_it_starts_in_a_network_namespace_and_we_stay_in_ours(spawn, tmp_path):
    holder = spawn("unshare", "--net", "sleep", "1000")
    path, mine = f"/proc/{holder.pid}/ns/net", os.readlink("/proc/thread-self/ns/net")
    with gevent.Timeout(WAIT_S):
        while os.readlink(path) == mine:
            gevent.sleep(0.005)
    theirs = os.readlink(path)
    assert output_of(spawn, "readlink /proc/self/ns/net", netns=path) == theirs + "\n"
    assert os.readlink("/proc/thread-self/ns/net") == mine


@pytest.mark.parametrize("path, why", [("/there/is/none", "No such file"), ("/etc/passwd", "Invalid argument")])
def test_a_namespace_that_is_none(path, why):
    mine = os.readlink("/proc/thread-self/ns/net")
    with pytest.raises(HypervisorError, match=why):
        child.spawn(["true"], name="a program", netns=path)
    assert os.readlink("/proc/thread-self/ns/net") == mine


# -- identity -------------------------------------------------------------------------------------
def test_the_start_time_is_the_kernels(plain):
    with open(f"/proc/{plain.pid}/stat") as file:
        assert child.start_time(plain.pid) == int(file.read().rpartition(")")[2].split()[19])
    assert child.is_alive(plain.pid, child.start_time(plain.pid))


def test_a_name_with_brackets_and_spaces_is_read_right(tmp_path):
    path = tmp_path / ") R 1 (x"
    os.symlink("/bin/sleep", path)
    process = subprocess.Popen([path, "1000"])
    try:
        assert child.start_time(process.pid) > 1000
    finally:
        process.kill()
        process.wait()


def test_of_nobody_there_is_no_start_time(plain):
    plain.kill()
    with gevent.Timeout(WAIT_S):
        while child.start_time(plain.pid) is not None:      # a zombie is nobody
            gevent.sleep(0.005)
    plain.wait()
    assert child.start_time(plain.pid) is None
    assert not child.is_alive(plain.pid, 7)


def test_only_the_one_that_is_meant_is_killed(plain):
    started = child.start_time(plain.pid)
    assert not child.kill_identity(plain.pid, started + 1)
    assert plain.poll() is None
    assert child.kill_identity(plain.pid, started)
    assert plain.wait(WAIT_S) == -9
    assert not child.kill_identity(plain.pid, started)


@pytest.mark.parametrize("pid, started", [(0, 7), (-1, 7), (0, None), (1 << 22, 7), (1, None)])
def test_what_was_never_started_is_not_killed(pid, started):
    assert child.kill_identity(pid, started) is False


def test_one_that_does_not_go_is_told(plain):
    with pytest.raises(DeadlineExceeded, match=f"process {plain.pid} still exists 0.02 s after signal 18"):
        child.kill_identity(plain.pid, child.start_time(plain.pid), signal.SIGCONT, wait_s=0.02)


def test_waiting_for_a_strangers_end(plain):
    started = child.start_time(plain.pid)
    assert not child.wait_gone(plain.pid, started, 0.03)
    plain.kill()
    assert child.wait_gone(plain.pid, started, WAIT_S)


def test_identity_works_without_gevent():
    script = ("import sys, subprocess; from katashim import child;"
              "p = subprocess.Popen(['sleep', '1000']);"
              "print(child.kill_identity(p.pid, child.start_time(p.pid)), 'gevent' in sys.modules); p.wait()")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "True False\n"


def test_a_process_lives_until_its_last_thread_has_ended():
    """Its first one may be a zombie before: descriptors and memory are there still."""
    code = ("import ctypes, sys, threading\n"
            "threading.Thread(target=sys.stdin.read).start()\n"
            "ctypes.CDLL(None).pthread_exit(None)\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        end = time.monotonic() + 5
        while state_of(process.pid) != "Z":
            assert time.monotonic() < end
            time.sleep(0.01)
        assert child.start_time(process.pid) is not None
    finally:
        process.kill()
        process.stdin.close()
        process.wait()
    assert child.start_time(process.pid) is None


def state_of(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]
