"""katashim.runtime.process: how a process's end is learned of, whatever goes wrong on the way."""

import pytest
from fake_pod import InProcess, Place


@pytest.fixture(scope="module")
def pod():
    place = Place()
    pod = InProcess(place)
    try:
        pod.start(pod.id, "sleep", "1000")
        yield pod
    finally:
        pod.close()
        place.remove()


@pytest.fixture
def faults(pod):
    """``faults("WaitProcess=refuse:13")`` for the time of a test."""
    given = []

    def give(fault):
        given.append(fault.partition("=")[0])
        pod.order(fault=fault)
    def take():
        for method in given:
            pod.order(fault=f"{method}=")
        given.clear()
    give.over = take
    yield give
    take()
    if "c1" in pod.sandbox.containers:
        pod.remove("c1")
    pod.close_streams()
    pod.flush()
    pod.events.seen.clear()


def test_a_status_that_the_agent_does_not_know_is_255(pod, faults, caplog):
    faults("WaitProcess=refuse:5")
    pod.start("c1", "true")
    assert pod.wait("c1") == 255
    assert "the end of c1 is not known" in caplog.text


@pytest.mark.parametrize("script, status", [("exit 0", 0), ("exit 255", 255), ("kill -9 $$", 137),
                                            ("kill -15 $$", 143), ("kill -6 $$", 134)])
def test_statuses(pod, faults, script, status):
    pod.start("c1", "sh", "-c", script)
    assert pod.wait("c1") == status


def test_the_end_waits_for_the_answer_to_the_start(pod, faults):
    """The process has ended, its output too, WaitProcess has answered: but the start has not."""
    faults("StartContainer=latch")
    pod.create("c1", "true")
    before = pod.calls("WaitProcess")
    starting = pod.spawn("Start", id="c1")
    pod.await_call("WaitProcess", after=before)
    assert not starting.ready() and pod.status("c1") == "created"
    assert not pod.sandbox.containers["c1"].init.exited.is_set()
    faults.over()
    starting.get(timeout=5)
    assert pod.wait("c1") == 0


def test_a_start_that_fails_lets_the_end_be_told(pod, faults):
    pod.create("c1", "true")
    faults("StartContainer=refuse:13")
    with pytest.raises(Exception, match="refused StartContainer"):
        pod.call("Start", id="c1")
    assert pod.status("c1") == "created"
    pod.call("Kill", id="c1", signal=9)
    assert pod.wait("c1") == 137


def test_output_that_cannot_be_read_ends(pod, faults):
    faults("ReadStdout=refuse:13")
    io = pod.streams().read()
    pod.start("c1", "sh", "-c", "echo lost; echo kept >&2; exit 4", io=io)
    assert pod.wait("c1") == 4
    assert io.output() == b"" and io.output("stderr") == b"kept\n"


def test_a_grandchild_that_holds_the_output_open_does_not_hold_up_the_end(pod, faults):
    io = pod.streams().read()
    pod.start("c1", "sh", "-c", "sleep 1000 & echo done", io=io)
    assert pod.wait("c1") == 0
    assert io.output() == b"done\n"


def test_stdin_for_a_program_that_has_closed_it(pod, faults):
    io = pod.streams(stdin=True).read()
    pod.start("c1", "sh", "-c", "exec 0<&-; echo up; sleep 0.1; exit 6", io=io)
    io.await_text(b"up")
    io.open_stdin()
    io.write(b"to nobody\n")
    assert pod.wait("c1") == 6


def test_an_end_is_told_once(pod, faults):
    pod.start("c1", "true")
    pod.wait("c1")
    process = pod.sandbox.containers["c1"].init
    at = process.exited_at_ns
    process.end(99)
    assert (process.exit_status, process.exited_at_ns) == (0, at)
    pod.flush()
    assert pod.events.of("c1").count("exit") == 1


def test_names(pod, faults):
    pod.start("c1", "sleep", "1000")
    pod.add_exec("c1", "e1", "true")
    container = pod.sandbox.containers["c1"]
    assert (container.init.name, container.execs["e1"].name) == ("c1", "c1/e1")
    assert container.execs["e1"].ids == {"container_id": "c1", "exec_id": "e1"}
    assert container.init.ids == {"container_id": "c1", "exec_id": "c1"}
    assert repr(container.init) == "<process c1, running>" and "1 execs" in repr(container)
