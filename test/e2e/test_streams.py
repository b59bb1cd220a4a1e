"""stdin, stdout and stderr between the client and a process in the guest: no byte lost, no byte late."""

import hashlib
import json
import os
import random
import zlib

import pytest
from harness.terminal import PRINT_SIZE
from live_pods import api_of

pytestmark = pytest.mark.vm

MIB = 1 << 20


def noise(size):
    """`size` bytes that do not compress, the same each time."""
    return random.Random(size).randbytes(size)


def crc(data):
    return f"{zlib.crc32(data):08x}"


# ctr's Result has text; bytes take this way round.
def run_bytes(running, data=None, timeout_s=120):
    out, err = running.process.communicate(data, timeout=timeout_s)
    assert running.process.returncode == 0, err
    return out


def test_eight_mib_before_the_exit_all_arrive(daemon, pod, name):
    """The exit is reported after the last byte, however slowly the client reads."""
    running = pod.start_run(name(), "sh", "-c", "head -c 8388608 /dev/urandom >/dev/shm/f;"
                            "md5sum </dev/shm/f >&2; exec cat /dev/shm/f", options=["--rm"])
    out, err = running.process.communicate(timeout=120)
    assert running.process.returncode == 0, err
    assert len(out) == 8 * MIB
    assert hashlib.md5(out).hexdigest() == err.split()[0].decode()


def test_twenty_mib_go_in_and_come_back(daemon, pod, name):
    data = noise(20 * MIB)
    running = pod.start_run(name(), "cat", options=["--rm"], stdin=True)
    assert crc(run_bytes(running, data)) == crc(data)


def test_the_end_of_stdin_ends_cat(daemon, pod, name):
    """ctr tells of an end of input only once the task exists, hence the wait for its first word."""
    running = pod.start_run(name(), "sh", "-c", "echo ready; exec cat", options=["--rm"], stdin=True)
    assert running.read_line() == "ready\n"
    result = running.wait(20, stdin=b"some words\n")
    assert (result.code, result.out) == (0, "some words\n")


def test_stdin_of_an_exec_ends_too(daemon, pod, name):
    result = daemon.ctr("task", "exec", "--exec-id", name("e"), pod.name, "wc", "-c", stdin=noise(100000))
    assert result.out.strip() == "100000"


def test_a_program_without_stdin_sees_its_end(daemon, pod, name):
    member = name()
    pod.run(member, "sh", "-c", "cat; exit 4", options=["-d", "--null-io"])
    daemon.wait_status(member, "STOPPED", 20)
    with api_of(daemon, member) as api:
        assert api.call("Wait", id=member).exit_status == 4


def test_a_terminal_has_the_windows_size_and_takes_lines(daemon, pod, name):
    with pod.terminal(name(), "sh", "-c", f"{PRINT_SIZE}; read word; echo got $word; exit 6",
                      rows=33, columns=99) as terminal:
        terminal.read_until(b"33 99")
        terminal.send(b"a line\n")
        terminal.read_until(b"got a line")
        assert terminal.wait()[0] == 6


def test_detached_and_attached_again(daemon, pod, name):
    """What is said while nobody listens waits in the pipe for the one who attaches."""
    member = name()
    pod.run(member, "sh", "-c", "echo early; read x; echo got $x; exit 9", options=["-d"])
    attached = daemon.start_ctr("task", "attach", member, stdin=True)
    assert attached.read_line() == "early\n"
    attached.process.stdin.write(b"this\n")
    attached.process.stdin.flush()
    assert attached.read_line() == "got this\n"
    assert attached.wait(20).code == 9


def test_a_detached_container_ends_though_nobody_reads_its_output(daemon, pod, name):
    member = name()
    pod.run(member, "sh", "-c", "echo words; exit 3", options=["-d"])
    daemon.wait_status(member, "STOPPED", 20)
    with api_of(daemon, member) as api:
        assert api.call("Wait", id=member).exit_status == 3


def test_a_killed_container_ends_though_its_output_is_stuck(daemon, pod, name):
    """It has written more than the pipes hold, and its client is gone for good."""
    member = name()
    pod.run(member, "cat", "/dev/zero", options=["-d"])
    daemon.wait_status(member, "RUNNING")
    daemon.ctr("task", "kill", "-s", "SIGKILL", member)
    daemon.wait_status(member, "STOPPED", 20)


def test_output_goes_to_a_file(daemon, pod, name, tmp_path):
    path = tmp_path / "new" / "out.log"
    pod.run(name(), "sh", "-c", "echo out; echo err >&2", options=["--rm", "--log-uri", f"file://{path}"])
    assert sorted(path.read_text().splitlines()) == ["err", "out"]


def test_output_goes_to_a_logging_program(daemon, pod, name, tmp_path):
    program, log = tmp_path / "logger", tmp_path / "log"
    program.write_text(f"""#!/bin/sh
{{ echo "$CONTAINER_ID $CONTAINER_NAMESPACE $*"; }} >{log}
exec 5>&-
cat <&3 >>{log}
cat <&4 >>{log}
""")
    program.chmod(0o755)
    member = name()
    pod.run(member, "sh", "-c", "echo out; echo err >&2",
            options=["--rm", "--log-uri", f"binary://{program}?key=value"])
    assert log.read_text().splitlines() == [f"{member} default key value", "out", "err"]


def test_a_logging_program_that_cannot_start_is_an_error(daemon, pod, name):
    result = pod.run(name(), "true", options=["--rm", "--log-uri", "binary:///no/such/logger"], check=False)
    assert result.code == 1
    assert "/no/such/logger" in result.err


def test_close_io_ends_stdin_once_no_client_holds_it(daemon, pod, name, tmp_path):
    """With the shim's own API, for ctr keeps its end open until it ends itself."""
    fifo = str(tmp_path / "stdin")
    os.mkfifo(fifo)
    exec_id = name("e")
    with api_of(daemon, pod.name) as api:
        spec = {"args": ["sh", "-c", "cat >/dev/shm/got; exit 8"], "cwd": "/", "env": ["PATH=/bin"],
                "user": {"uid": 0, "gid": 0}}
        api.call("Exec", id=pod.name, exec_id=exec_id, stdin=fifo,
                 spec={"type_url": "types.containerd.io/opencontainers/runtime-spec/1/Process",
                       "value": json.dumps(spec).encode()})
        api.call("Start", id=pod.name, exec_id=exec_id)
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, b"words")
        os.close(writer)
        assert api.call("State", id=pod.name, exec_id=exec_id).status == 2
        api.call("CloseIO", id=pod.name, exec_id=exec_id, stdin=True)
        assert api.call("Wait", id=pod.name, exec_id=exec_id).exit_status == 8
        api.call("Delete", id=pod.name, exec_id=exec_id)
    got = daemon.ctr("task", "exec", "--exec-id", name("e"), pod.name, "cat", "/dev/shm/got").out
    assert got == "words"
    daemon.ctr("task", "exec", "--exec-id", name("e"), pod.name, "rm", "/dev/shm/got")
