"""The daemon that start leaves behind, and in the foreground: real processes, real ttRPC, no VM."""

import json
import os
import select
import signal
import socket
import subprocess
import sys

import pytest

from katashim import child
from katashim.errors import NotFound
from katashim.shim import endpoint
from katashim.ttrpc import proto
from katashim.ttrpc.client import Client

from .conftest import PROGRAM, ROOT, flags_for

SERVICES = ("containerd.task.v2.Task", "containerd.task.v3.Task")
TASK = SERVICES[0]


@pytest.fixture
def connect():
    made = []

    def connect(address):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.removeprefix("unix://"))
        made.append(Client(sock, "the shim"))
        return made[-1]
    yield connect
    for client in made:
        client.close()


def call(client, method, service=TASK, **fields):
    return client.call(service, method, proto.service(service)[method].request(**fields), timeout_s=20)


def wait_exit(pid):
    """Until the process `pid`, which is not our child, has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], 20)[0], f"process {pid} does not end"
    finally:
        os.close(pidfd)


def read_log(path):
    """The records in a FIFO or a file, without waiting for more."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return [json.loads(line) for line in os.read(fd, 1 << 20).splitlines()]
    finally:
        os.close(fd)


@pytest.fixture
def log_reader():
    """Holds a bundle's log FIFO open as containerd does; what is in it stays until it is read."""
    opened = []

    def hold(bundle):
        opened.append(os.open(os.path.join(bundle, "log"), os.O_RDWR | os.O_NONBLOCK))
    yield hold
    for fd in opened:
        os.close(fd)


# -- serving --------------------------------------------------------------------------------------
@pytest.mark.parametrize("service", SERVICES)
def test_it_serves_both_versions_of_the_task_api(shims, connect, service):
    client = connect(shims.start("c1", shims.bundle("c1")).stdout.decode())
    with pytest.raises(NotFound):
        call(client, "State", service, id="c1")


def test_shutdown_answers_and_leaves_nothing(shims, connect, log_reader):
    bundle = shims.bundle("c1")
    log_reader(bundle)
    client = connect(shims.start("c1", bundle).stdout.decode())
    call(client, "Shutdown", id="c1", now=True)
    wait_exit(shims.daemon_pid(bundle))
    assert shims.sockets() == []
    records = read_log(os.path.join(bundle, "log"))
    assert records[0]["msg"].startswith("serving unix://") and records[-1]["msg"] == "finished"
    assert {record["sandbox"] for record in records} == {"c1"}
    assert {record["level"] for record in records} == {"info"}


def test_a_second_start_finds_the_first(shims):
    bundle = shims.bundle("c1")
    first = shims.start("c1", bundle)
    pid = shims.daemon_pid(bundle)
    second = shims.start("c1", bundle)
    assert (second.stdout, second.stderr, second.returncode) == (first.stdout, b"", 0)
    assert shims.daemon_pid(bundle) == pid


def test_of_starts_at_once_one_daemon_is_left(shims, connect):
    bundle = shims.bundle("c1")
    environment = {"KATASHIM_SOCKET_DIR": shims.socket_dir}
    running = [subprocess.Popen([PROGRAM, *flags_for("c1"), "start"], cwd=bundle, env=environment,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) for _ in range(4)]
    answers = {each.communicate(timeout=30)[0].decode() for each in running}
    shims.run(bundle, "-v")                 # has the daemon taken note of
    client = connect(answers.pop())
    assert not answers
    call(client, "Shutdown", id="c1", now=True)
    wait_exit(shims.daemon_pid(bundle))
    assert shims.sockets() == []


def test_after_a_sigkill_start_begins_anew(shims, connect):
    bundle = shims.bundle("c1")
    first = shims.start("c1", bundle)
    old = shims.daemon_pid(bundle)
    assert child.kill_identity(old, child.start_time(old))
    second = shims.start("c1", bundle)
    assert second.stdout == first.stdout and shims.daemon_pid(bundle) != old
    with pytest.raises(NotFound):
        call(connect(second.stdout.decode()), "State", id="c1")


def test_sigterm_does_nothing_and_sigint_ends_it_in_good_order(shims, connect):
    bundle = shims.bundle("c1")
    client = connect(shims.start("c1", bundle).stdout.decode())
    with pytest.raises(NotFound):
        call(client, "State", id="c1")      # it has its handlers now
    pid = shims.daemon_pid(bundle)
    os.kill(pid, signal.SIGTERM)
    with pytest.raises(NotFound):
        call(client, "State", id="c1")
    os.kill(pid, signal.SIGINT)
    wait_exit(pid)
    assert shims.sockets() == []


# -- the process ----------------------------------------------------------------------------------
def test_it_holds_nothing_of_the_process_that_started_it(shims, connect):
    bundle = shims.bundle("c1")
    client = connect(shims.start("c1", bundle).stdout.decode())
    with pytest.raises(NotFound):
        call(client, "State", id="c1")
    pid = shims.daemon_pid(bundle)
    proc = f"/proc/{pid}"
    assert [os.readlink(f"{proc}/fd/{fd}") for fd in (0, 1, 2)] == ["/dev/null"] * 3
    assert os.readlink(f"{proc}/cwd") == "/"
    assert os.getsid(pid) == pid
    assert os.readlink(f"{proc}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    with open(f"{proc}/comm") as file:
        assert file.read() == "containerd-shim\n"
    with open(f"{proc}/cmdline", "rb") as file:
        assert b"containerd-shim-katashim-v2" in file.read()


# -- its log --------------------------------------------------------------------------------------
def test_it_logs_to_a_file_too_and_more_with_debug(shims, connect, tmp_path):
    bundle, path = shims.bundle("c1"), tmp_path / "shim.log"
    done = shims.run(bundle, *flags_for("c1"), "-debug", "start", environment={"KATASHIM_LOG": str(path)})
    call(connect(done.stdout.decode()), "Shutdown", id="c1", now=True)
    wait_exit(shims.daemon_pid(bundle))
    assert "finished" in [record["msg"] for record in read_log(path)]


def test_a_log_that_cannot_be_written_is_no_reason_to_run_no_pods(shims, connect, log_reader):
    bundle = shims.bundle("c1")
    log_reader(bundle)
    done = shims.start("c1", bundle, environment={"KATASHIM_LOG": "/no/such/directory/log"})
    with pytest.raises(NotFound):
        call(connect(done.stdout.decode()), "State", id="c1")
    assert "/no/such/directory/log" in read_log(os.path.join(bundle, "log"))[0]["msg"]


def test_what_ends_the_daemon_before_it_serves_is_in_the_bundles_log(shims, socket_dir, log_reader):
    os.chmod(socket_dir, 0o777)             # for the unprivileged user
    bundle = shims.bundle(os.path.join(socket_dir, "c1"))
    os.chmod(bundle, 0o777)
    os.chmod(os.path.join(bundle, "log"), 0o666)
    log_reader(bundle)
    done = subprocess.run([PROGRAM, *flags_for("c1"), "start"], cwd=bundle, stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=30, check=True, user=65534, group=65534,
                          env={"KATASHIM_SOCKET_DIR": os.path.join(socket_dir, "c1")})
    address = done.stdout.decode().removeprefix("unix://")
    wait_exit(shims.daemon_pid(bundle))
    fd = os.open(os.path.join(bundle, "log"), os.O_RDONLY | os.O_NONBLOCK)
    text = os.read(fd, 65536).decode()
    os.close(fd)
    assert text.startswith("the shim of c1 failed:") and "mount namespace" in text
    assert not os.path.exists(address) and not endpoint.accepts(address)


def test_what_gevents_hub_prints_is_logged():
    script = ("import sys; sys.path.insert(0, sys.argv[1])\n"
              "from katashim import green; green.patch()\n"
              "import gevent, logging\nfrom katashim import log\n"
              "log.setup([log.open_stderr()])\n"
              "sys.stderr = log.LineStream(logging.getLogger('katashim.x'))\n"
              "gevent.spawn(lambda: 1 / 0).join()\n")
    done = subprocess.run([sys.executable, "-c", script, ROOT], capture_output=True, timeout=30, check=True)
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert any("ZeroDivisionError" in record["msg"] for record in records)


# -- in the foreground ----------------------------------------------------------------------------
def test_without_a_verb_it_runs_in_the_foreground(shims, connect, tmp_path):
    bundle = shims.bundle("c1")
    path = endpoint.socket_path(shims.socket_dir, "/run/c.sock", "k8s.io", "c1")
    running = subprocess.Popen([PROGRAM, *flags_for("c1")], cwd=bundle, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={"KATASHIM_SOCKET_DIR": shims.socket_dir})
    try:
        first = json.loads(running.stderr.readline())
        assert first["msg"] == f"serving unix://{path}"
        again = shims.run(bundle, *flags_for("c1"))
        assert again.returncode == 1 and b"already serves sandbox c1" in again.stderr
        call(connect(path), "Shutdown", id="c1", now=True)
        out, errors = running.communicate(timeout=20)
    finally:
        running.kill()
        running.communicate()
    assert (running.returncode, out) == (0, b"")
    assert json.loads(errors.splitlines()[-1])["msg"] == "finished"
    assert shims.sockets() == []
