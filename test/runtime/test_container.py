"""katashim.runtime.container: its verbs take turns, and what fails is taken back."""

import gevent
import pytest
from fake_pod import InProcess, Place, packed

from katashim import errors


@pytest.fixture(scope="module")
def pod():
    place = Place(agent_timeout_s=1)
    pod = InProcess(place)
    try:
        pod.start(pod.id, "sleep", "1000")
        yield pod
    finally:
        pod.close()
        place.remove()


@pytest.fixture
def faults(pod):
    """``faults("CreateContainer=refuse:13")`` for the time of a test."""
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


@pytest.mark.parametrize("fault, code", [("CreateContainer=refuse:13", errors.INTERNAL),
                                         ("CreateContainer=refuse:7", errors.PERMISSION_DENIED),
                                         ("CreateContainer=hang", errors.DEADLINE_EXCEEDED),
                                         ("CreateContainer=mute", errors.DEADLINE_EXCEEDED)])
def test_a_create_that_fails_leaves_nothing_here_and_there(pod, faults, fault, code):
    """Also when the guest did it and its answer was lost: then the guest is told to remove it."""
    entries = pod.sandbox.undo.entries()
    faults(fault)
    with pytest.raises(errors.KatashimError) as caught:
        pod.create("c1", "sleep", "1000", io=pod.streams(stdin=True))
    assert caught.value.code == code and "--- phases:" in str(caught.value)
    faults.over()
    assert pod.sandbox.undo.entries() == entries
    assert "c1" not in pod.order(ask="containers") and "c1" not in pod.sandbox.containers
    pod.flush()
    assert pod.events.of("c1") == []
    pod.start("c1", "true")
    assert pod.wait("c1") == 0


@pytest.mark.parametrize("method, verb, fields, status", [
    ("PauseContainer", "Pause", {}, "running"), ("UpdateContainer", "Update", {"resources": packed({})}, "running"),
    ("StatsContainer", "Stats", {}, "running"), ("SignalProcess", "Kill", {"signal": 1}, "running")])
def test_a_verb_that_the_agent_refuses_changes_nothing(pod, faults, method, verb, fields, status):
    pod.start("c1", "sleep", "1000")
    faults(f"{method}=refuse:13")
    with pytest.raises(errors.Internal, match=f"refused {method}"):
        pod.call(verb, id="c1", **fields)
    assert pod.status("c1") == status
    pod.flush()
    assert pod.events.of("c1") == ["create", "start"]


def test_a_signal_that_the_agent_cannot_deliver_any_more(pod, faults):
    pod.start("c1", "sleep", "1000")
    faults("SignalProcess=refuse:5")
    pod.call("Kill", id="c1", signal=15)
    with pytest.raises(errors.NotFound, match="has ended already"):
        pod.call("Kill", id="c1", signal=10)


def test_an_exec_that_the_agent_refuses_can_be_deleted_and_asked_for_again(pod, faults):
    pod.start("c1", "sleep", "1000")
    faults("ExecProcess=refuse:13")
    with pytest.raises(errors.Internal, match="refused ExecProcess"):
        pod.exec("c1", "e1", "true", io=pod.streams(stdin=True))
    faults.over()
    pod.call("Delete", id="c1", exec_id="e1")
    pod.exec("c1", "e1", "true")
    assert pod.wait("c1", "e1") == 0


def test_verbs_take_turns(pod, faults):
    """A Pause that comes while the container starts waits for the start."""
    faults("StartContainer=late:0.1")
    pod.create("c1", "sleep", "1000")
    starting, pausing = pod.spawn("Start", id="c1"), pod.spawn("Pause", id="c1")
    gevent.joinall([starting, pausing], timeout=5, raise_error=True)
    assert pod.status("c1") == "paused"
    pod.flush()
    assert pod.events.of("c1") == ["create", "start", "paused"]
    pod.call("Resume", id="c1")


def test_a_kill_does_not_wait_its_turn(pod, faults):
    pod.start("c1", "sleep", "1000")
    faults("UpdateContainer=hold")
    before = pod.calls("UpdateContainer")
    updating = pod.spawn("Update", id="c1", resources=packed({}))
    pod.await_call("UpdateContainer", after=before)
    pod.call("Kill", id="c1", signal=9)
    assert pod.wait("c1") == 137
    assert not updating.ready()
    faults.over()
    updating.get(timeout=5)


def test_a_container_that_dies_while_it_is_paused_or_resumed(pod, faults):
    pod.start("c1", "sleep", "1000")
    faults("PauseContainer=latch")
    before = pod.calls("PauseContainer")
    pausing = pod.spawn("Pause", id="c1")
    pod.await_call("PauseContainer", after=before)
    pod.call("Kill", id="c1", signal=9)
    assert pod.wait("c1") == 137
    faults.over()
    pausing.join(5)
    assert isinstance(pausing.exception, errors.FailedPrecondition)
    assert pod.status("c1") == "stopped"
    pod.flush()
    assert pod.events.of("c1") == ["create", "start", "exit"]


def test_deleting_an_exec_that_was_never_started(pod, faults):
    pod.start("c1", "sleep", "1000")
    pod.add_exec("c1", "e1", "true")
    pod.call("Delete", id="c1", exec_id="e1")
    pod.flush()
    assert pod.events.of("c1") == ["create", "start", "exec-added e1"]
    with pytest.raises(errors.NotFound):
        pod.call("Start", id="c1", exec_id="e1")


def test_an_exec_that_runs_when_its_container_is_deleted_has_its_exit_told_before(pod, faults):
    pod.start("c1", "sleep", "1000")
    io = pod.streams().read()
    pod.exec("c1", "e1", "sh", "-c", "echo last words; sleep 1000", io=io)
    io.await_text(b"words")
    waiting = pod.spawn("Wait", id="c1", exec_id="e1")
    pod.call("Kill", id="c1", exec_id="c1", signal=9)       # the first process alone
    pod.wait("c1")
    pod.call("Delete", id="c1")
    assert waiting.get(timeout=5).exit_status == 137
    assert io.output() == b"last words\n"
    pod.flush()
    assert pod.events.of("c1")[-3:] == ["exit", "exit e1", "delete"]


def test_an_exec_whose_container_is_deleted_while_it_starts(pod, faults):
    pod.start("c1", "sleep", "1000")
    faults("ExecProcess=latch")
    pod.add_exec("c1", "e1", "sleep", "1000")
    before = pod.calls("ExecProcess")
    starting = pod.spawn("Start", id="c1", exec_id="e1")
    pod.await_call("ExecProcess", after=before)
    pod.remove("c1")
    faults.over()
    starting.join(5)
    assert isinstance(starting.exception, errors.FailedPrecondition)
    pod.flush()
    assert "exec-started e1" not in pod.events.of("c1")


def test_the_size_of_a_terminal_that_has_gone_is_no_reason_to_fail(pod, faults):
    pod.start("c1", "sleep", "1000")
    faults("TtyWinResize=refuse:5")
    pod.add_exec("c1", "e1", "true", io=pod.streams(terminal=True).read(), terminal=True)
    pod.call("ResizePty", id="c1", exec_id="e1", width=80, height=25)
    pod.call("Start", id="c1", exec_id="e1")
    assert pod.wait("c1", "e1") == 0


def test_a_snapshot_is_plain_data(pod, faults):
    pod.start("c1", "sleep", "1000")
    pod.add_exec("c1", "e1", "true")
    record = pod.sandbox.containers["c1"].snapshot()
    assert record == {"id": "c1", "bundle": pod.place.bundle("c1", {}), "status": "running", "exit_status": 0,
                      "oom_killed": False, "execs": {"e1": "created"}}
    pod.order(oom="c1")
    pod.events.wait("c1", "oom")
    assert pod.sandbox.containers["c1"].snapshot()["oom_killed"]
