"""A second process in a running container."""

import pytest
from harness.terminal import PRINT_SIZE
from live_pods import FOREVER

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def running(pod):
    """The id of a container that runs; here the pod's own."""
    return pod.name


def execute(daemon, container, exec_id, *command, options=(), **how):
    return daemon.ctr("task", "exec", *options, "--exec-id", exec_id, container, *command, **how)


def test_its_output_and_exit_status_are_its_own(daemon, running, name):
    result = execute(daemon, running, name("e"), "sh", "-c", "echo out; echo err >&2; exit 3", code=3)
    assert (result.out, result.err) == ("out\n", "err\n")


def test_it_sees_the_containers_processes_and_root(daemon, running, name):
    result = execute(daemon, running, name("e"), "sh", "-c", "tr '\\0' ' ' </proc/1/cmdline; cat /etc/hostname")
    assert result.out == f"{' '.join(FOREVER)} busybox\n"


def test_options_of_the_process_reach_the_guest(daemon, running, name):
    result = execute(daemon, running, name("e"), "sh", "-c", "pwd; id -u; id -g",
                     options=["--cwd", "/tmp", "--user", "65534:65534"])
    assert result.out.split() == ["/tmp", "65534", "65534"]


def test_a_missing_command_fails_at_once_with_the_guests_words(daemon, running, name):
    result = execute(daemon, running, name("e"), "/no/such/program", check=False)
    assert result.code == 1 and result.seconds < 5
    assert "/no/such/program" in result.err


def test_an_exec_that_failed_does_not_disturb_the_next(daemon, running, name):
    exec_id = name("e")
    execute(daemon, running, exec_id, "/no/such/program", check=False)
    assert execute(daemon, running, exec_id, "echo", "fine").out == "fine\n"


def test_several_at_once_keep_their_streams_apart(daemon, running, name):
    execs = [daemon.start_ctr("task", "exec", "--exec-id", name("e"), running, "sh", "-c",
                              f"for i in 1 2 3; do echo {number}; done; exit {number}") for number in range(8)]
    for number, one in enumerate(execs):
        result = one.wait()
        assert (result.code, result.out) == (number, f"{number}\n" * 3), result


def test_a_terminal_has_the_size_of_the_window_and_follows_it(daemon, running, name):
    script = (f"tty; {PRINT_SIZE}; until stty size | grep -qx '44 122'; do sleep 0.05; done;"
              "echo resized; read word; echo got $word; exit 4")
    with daemon.terminal("task", "exec", "-t", "--exec-id", name("e"), running, "sh", "-c", script,
                         rows=31, columns=101) as terminal:
        assert terminal.read_until(b"\n").startswith(b"/dev/pts/")
        terminal.read_until(b"31 101")
        terminal.resize(44, 122)
        terminal.read_until(b"resized")
        terminal.send(b"word\n")
        terminal.read_until(b"got word")
        assert terminal.wait()[0] == 4


def test_it_ends_with_its_container(daemon, pod, name):
    member = name()
    pod.run(member, *FOREVER, options=["-d"])
    lasting = daemon.start_ctr("task", "exec", "--exec-id", name("e"), member, "sh", "-c",
                               "echo ready; exec sleep 1000")
    lasting.read_line()
    daemon.ctr("task", "kill", "-s", "SIGKILL", member)
    assert lasting.wait(20).code == 137
