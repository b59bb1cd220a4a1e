"""A container in a VM of its own: what `ctr run` promises."""

import os

import pytest
from live_pods import FOREVER, pid_of, shim_pid, state, wait_for

pytestmark = pytest.mark.vm


def test_it_runs_on_the_guests_kernel_and_its_exit_status_is_seen(daemon, name):
    result = daemon.run(name(), "sh", "-c", "uname -r; echo oops >&2; exit 7", options=["--rm"], code=7)
    assert result.out.strip() and result.out.strip() != os.uname().release
    assert result.err == "oops\n"


def test_the_sandbox_stands_in_its_state_file_while_it_lives(daemon, name):
    container = name()
    daemon.run(container, *FOREVER, options=["-d"])
    described = state(container)
    assert (described["id"], described["state"]) == (container, "ready")
    assert described["shim_pid"] == shim_pid(container)
    wait_for(lambda: state(container)["containers"][0]["status"] == "running", "the state file to say running")
    phases = {phase["phase"] for phase in described["timeline"]}
    assert {"spawn", "kernel", "agent", "network", "create"} <= phases
    pid, status = daemon.tasks()[container]
    assert (pid, status) == (pid_of(container, "QEMU"), "RUNNING")
    assert os.stat(f"/run/kata/{container}").st_mode & 0o777 == 0o700
    daemon.ctr("task", "rm", "-f", container)
    assert state(container) is None


def test_five_at_once(daemon, name):
    running = [daemon.start_run(name(), "sh", "-c", f"echo {number}; exit {number}", options=["--rm"])
               for number in range(1, 6)]
    for number, one in enumerate(running, 1):
        result = one.wait(120)
        assert (result.code, result.out) == (number, f"{number}\n"), result


def test_an_id_can_be_used_again(daemon, name):
    container = name()
    for word in ("first", "second"):
        assert daemon.run(container, "echo", word, options=["--rm"]).out == f"{word}\n"


def test_a_program_that_is_missing_is_an_error_and_nothing_stays(daemon, name):
    result = daemon.run(name(), "/no/such/program", options=["--rm"], check=False)
    assert result.code == 1
    assert "/no/such/program" in result.err
