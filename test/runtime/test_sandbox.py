"""katashim.runtime.sandbox: what may happen to a VM, and that its end is complete and bounded."""

import json
import os
import signal
import time

import gevent
import pytest
from fake_pod import Daemon, Place, packed

from katashim import child, errors, green, state, undo
from katashim.drivers import fake
from katashim.resources.releases import RELEASES
from katashim.runtime import sandbox as sandboxes

WAIT_S = 10


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """The limits for those who do not answer are for busy machines; tests need not wait so long."""
    monkeypatch.setattr(sandboxes, "_GOODBYE_S", 0.3)
    monkeypatch.setattr(sandboxes, "_END_S", 0.2)
    monkeypatch.setattr(fake, "_QUIT_S", 0.3)


def crowd(pod):
    """A pod's container, a member with a running exec, one that has ended, one that was never started.

    Returns greenlets that wait for the processes that run.
    """
    pod.start(pod.id, "sleep", "1000", io=pod.streams(stdin=True).read())
    pod.start("member", "sleep", "1000")
    pod.exec("member", "e1", "sleep", "1000")
    pod.add_exec("member", "unstarted", "true")
    pod.start("ended", "sh", "-c", "exit 3")
    assert pod.wait("ended") == 3
    pod.create("created", "sleep", "1000")
    return [pod.spawn("Wait", id=pod.id), pod.spawn("Wait", id="member"),
            pod.spawn("Wait", id="member", exec_id="e1"), pod.spawn("Wait", id="created")]


def all_is_over(pod, waiting, timeout_s=5):
    """Assert that the sandbox is down within `timeout_s`, and each process's end was told once, with 137."""
    gevent.joinall(waiting, timeout=timeout_s, raise_error=True)
    assert [each.value.exit_status for each in waiting] == [137] * len(waiting)
    assert pod.sandbox.life.reached("stopped").wait(timeout_s)
    pod.nothing_is_left()
    assert pod.sandbox.undo is None
    pod.flush()
    assert pod.events.of(pod.id) == ["create", "start", "exit"]
    assert sorted(pod.events.of("member")) == [
        "create", "exec-added e1", "exec-added unstarted", "exec-started e1", "exit", "exit e1", "start"]
    assert pod.events.of("ended") == ["create", "start", "exit"]
    assert pod.events.of("created") == ["create", "exit"]
    assert {message.exit_status for topic, message in pod.events.seen
            if topic == "/tasks/exit" and message.container_id != "ended"} == {137}


# -- the VM ends ----------------------------------------------------------------------------------
def test_the_vmms_death_ends_everything(pods):
    pod = pods()
    waiting = crowd(pod)
    os.kill(pod.vmm_pid(), signal.SIGKILL)
    all_is_over(pod, waiting)
    assert "fake killed by SIGKILL" in str(pod.sandbox.life.cause)


def test_what_containerd_does_after_the_vmms_death(pods):
    pod = pods()
    crowd(pod)
    vmm = pod.vmm_pid()
    os.kill(vmm, signal.SIGKILL)
    assert pod.wait(pod.id) == 137
    for container_id in ("member", pod.id, "ended", "created"):
        assert pod.status(container_id) == "stopped"
        pod.call("Kill", id=container_id, signal=9, all=True)
        answer = pod.call("Delete", id=container_id)
        assert (answer.pid, answer.exit_status) == (vmm, 3 if container_id == "ended" else 137)
        with pytest.raises(errors.NotFound):
            pod.status(container_id)
    with pytest.raises(errors.FailedPrecondition, match="is stopp.*: the VM .* is gone: fake killed by SIGKILL"):
        pod.create("late", "true")
    pod.shut_down()
    assert pod.shim.finished.is_set()


@pytest.mark.parametrize("method, call", [
    ("StartContainer", lambda pod: pod.call("Start", id="idle")),
    ("CreateContainer", lambda pod: pod.create("another", "true")),
    ("ExecProcess", lambda pod: pod.exec(pod.id, "e1", "true")),
    ("SignalProcess", lambda pod: pod.call("Kill", id=pod.id, signal=1)),
    ("UpdateContainer", lambda pod: pod.call("Update", id=pod.id, resources=packed({}))),
    ("StatsContainer", lambda pod: pod.call("Stats", id=pod.id)),
    ("PauseContainer", lambda pod: pod.call("Pause", id=pod.id))])
def test_the_vmms_death_in_the_middle_of_a_call(pods, method, call):
    pod = pods()
    pod.start(pod.id, "sleep", "1000")
    pod.create("idle", "true")
    pod.order(fault=f"{method}=die")
    with pytest.raises(errors.KatashimError) as caught:
        call(pod)
    assert caught.value.code in (errors.UNAVAILABLE, errors.NOT_FOUND, errors.FAILED_PRECONDITION)
    assert pod.wait(pod.id) == 137
    assert pod.sandbox.life.reached("stopped").wait(5)
    pod.nothing_is_left()
    pod.flush()
    for container_id in (pod.id, "idle"):
        assert pod.events.of(container_id).count("exit") == 1
    assert pod.events.of("another") == []
    assert not {"exec-started e1", "exit e1"} & set(pod.events.of(pod.id))


def test_killing_what_dies_with_its_vm_is_no_error(pods):
    pod = pods()
    pod.start(pod.id, "sleep", "1000")
    pod.order(fault="SignalProcess=die")
    pod.call("Kill", id=pod.id, signal=9, all=True)
    assert pod.wait(pod.id) == 137


def test_a_delete_while_the_vmm_dies_answers(pods):
    pod = pods()
    pod.start(pod.id, "sleep", "1000")
    pod.start("member", "true")
    pod.wait("member")
    pod.order(fault="RemoveContainer=die")
    assert pod.call("Delete", id="member").exit_status == 0
    pod.flush()
    assert pod.events.of("member") == ["create", "start", "exit", "delete"]


# -- the agent is lost ----------------------------------------------------------------------------
def test_an_agent_that_hangs_up_ends_everything(pods):
    pod = pods()
    waiting = crowd(pod)
    vmm, started = pod.vmm_pid(), child.start_time(pod.vmm_pid())
    pod.order(hangup=True)
    all_is_over(pod, waiting)
    assert "has hung up" in str(pod.sandbox.life.cause)
    assert not child.is_alive(vmm, started)


def test_an_agent_that_is_ill_three_times_in_a_row_is_lost(pods, monkeypatch):
    monkeypatch.setattr(sandboxes, "_HEALTH_S", 0.05)
    pod = pods()
    waiting = crowd(pod)
    pod.order(fault="Check=refuse:13")
    all_is_over(pod, waiting)
    assert "Check is refused" in str(pod.sandbox.life.cause)


def test_one_late_answer_is_no_death(pods, monkeypatch, caplog):
    monkeypatch.setattr(sandboxes, "_HEALTH_S", 0.05)
    pod = pods()
    pod.start(pod.id, "sleep", "1000")
    pod.order(fault="Check=refuse:13")
    with green.deadline(WAIT_S, "two failed health checks"):
        while "health check 2 of 3" not in caplog.text:
            gevent.sleep(0.005)
        pod.order(fault="Check=")
        before = pod.order(ask="calls").count("Check")
        while pod.order(ask="calls").count("Check") < before + 3:
            gevent.sleep(0.01)
    assert pod.status(pod.id) == "running" and pod.sandbox.life.state == "ready"


def test_an_agent_without_oom_events_is_told_and_good_enough(pods, caplog):
    pod = pods("GetOOMEvent=refuse:12")
    pod.start(pod.id, "true")
    assert pod.wait(pod.id) == 0
    assert "reports no out-of-memory events" in caplog.text


# -- it is ended ----------------------------------------------------------------------------------
def test_a_shutdown_ends_everything(pods):
    pod = pods()
    waiting = crowd(pod)
    pod.shut_down()
    all_is_over(pod, waiting, timeout_s=1)
    assert pod.shim.finished.is_set()


def test_ten_shutdowns_at_once_are_one(pods):
    pod = pods()
    waiting = crowd(pod)
    shutdowns = [pod.spawn("Shutdown", id=pod.id, now=True) for _ in range(10)]
    gevent.joinall(shutdowns, timeout=5, raise_error=True)
    assert all(each.ready() for each in shutdowns)
    all_is_over(pod, waiting)
    pod.shut_down()


def test_the_sandboxs_own_container_ends_it_without_now_too(pods):
    pod = pods()
    pod.start(pod.id, "true")
    pod.wait(pod.id)
    pod.call("Delete", id=pod.id)
    pod.call("Shutdown", id=pod.id)
    assert pod.shim.finished.is_set()
    pod.nothing_is_left()


def test_an_agent_that_does_not_say_goodbye(pods):
    pod = pods("DestroySandbox=hang")
    waiting = crowd(pod)
    pod.shut_down()
    all_is_over(pod, waiting)


def test_an_agent_that_refuses_to_say_goodbye(pods):
    pod = pods("DestroySandbox=refuse:13")
    waiting = crowd(pod)
    pod.shut_down()
    all_is_over(pod, waiting)


def test_a_vmm_that_hears_nothing_is_killed(pods):
    pod = pods()
    waiting = crowd(pod)
    vmm, started = pod.vmm_pid(), child.start_time(pod.vmm_pid())
    os.kill(vmm, signal.SIGSTOP)
    pod.shut_down()
    all_is_over(pod, waiting)
    assert not child.is_alive(vmm, started)


def test_states_during_a_teardown_answer_at_once(pods, monkeypatch):
    monkeypatch.setattr(sandboxes, "_GOODBYE_S", 1)
    pod = pods("DestroySandbox=hang")
    crowd(pod)
    stopping = pod.spawn("Shutdown", id=pod.id, now=True)
    pod.await_call("DestroySandbox")
    states = [pod.spawn("State", id=pod.id) for _ in range(50)]
    gevent.joinall(states, timeout=10, raise_error=True)
    assert not stopping.ready()
    with pytest.raises(errors.FailedPrecondition, match="is stopping"):
        pod.create("late", "true")
    stopping.get(timeout=5)


def test_what_cannot_be_released_stays_for_delete(pods, caplog):
    pod = pods()
    pod.start(pod.id, "true")
    entry = pod.sandbox.undo.push("dir", path=pod.place.directory)      # not empty
    pod.shut_down()
    assert "left for `delete`" in caplog.text
    journal = os.path.join(pod.place.run_dir, "journal")
    assert [(kind, args) for _, kind, args in undo.read(journal)[1]] == [
        ("dir", {"path": pod.place.directory})]
    assert entry.kind == "dir" and not os.path.exists(os.path.join(pod.place.run_dir, "fake.control"))


# -- one sandbox of an id -------------------------------------------------------------------------
def test_what_a_dead_shim_left_is_taken_over(pods, tmp_path):
    pod = pods()
    os.mkdir(pod.place.run_dir)
    (tmp_path / "left").mkdir()
    left = undo.Undo(os.path.join(pod.place.run_dir, "journal"), RELEASES,
                     header={"pid": 1 << 22, "start_time": 7})
    left.push("dir", path=str(tmp_path / "left"))
    left.close()
    pod.start(pod.id, "true")
    assert pod.wait(pod.id) == 0 and not (tmp_path / "left").exists()


def test_a_sandbox_of_a_living_shim_is_left_alone(pods):
    pod = pods()
    os.mkdir(pod.place.run_dir)
    mine = {"pid": os.getpid(), "start_time": child.start_time(os.getpid())}
    undo.Undo(os.path.join(pod.place.run_dir, "journal"), RELEASES, header=mine).close()
    with pytest.raises(errors.AlreadyExists, match=f"the shim {os.getpid()} owns it"):
        pod.create(pod.id, "true")
    assert os.listdir(pod.place.run_dir) == ["journal"]


def test_a_directory_that_cannot_be_made(pods):
    pod = pods()
    os.rmdir(pod.place.run_root)
    with open(pod.place.run_root, "w"):
        pass
    with pytest.raises(errors.KatashimError, match="Not a directory"):
        pod.create(pod.id, "true")
    os.unlink(pod.place.run_root)
    os.mkdir(pod.place.run_root)
    assert pod.sandbox is None


# -- the shim is killed ---------------------------------------------------------------------------
def killed(pod, traces):
    """Kill the shim, call its delete as containerd does, and assert that nothing is left of `traces`."""
    pod.kill()
    answer = pod.verb("delete")
    assert answer.startswith(b"\x10\x89\x01")           # exit_status = 137
    pod.nothing_is_left()
    assert not [trace for trace in traces if child.is_alive(*trace)]


def identity(pid):
    return pid, child.start_time(pid)


def test_after_a_sigkill_of_the_shim_its_delete_ends_the_vm(daemons, tmp_path):
    pod = daemons()
    io = pod.streams().read()
    pod.start(pod.id, "sh", "-c", "touch $0; exec sleep 1000", str(tmp_path / "runs"), io=io)
    with green.deadline(WAIT_S, "the container"):
        while not (tmp_path / "runs").exists():
            gevent.sleep(0.01)
    killed(pod, [identity(pod.vmm_pid())])
    assert io.output() == b""           # which ends when the process that held it has ended


@pytest.mark.parametrize("fault, call", [
    ("CreateSandbox=hang", lambda pod: pod.creation(pod.id, "true")),
    ("StartContainer=hang", None), ("RemoveContainer=hang", None)])
def test_a_sigkill_of_the_shim_at_any_moment(daemons, fault, call):
    pod = daemons(fault)
    method = fault.partition("=")[0]
    if call:
        calls = pod.spawn("Create", **call(pod))
    else:
        pod.create(pod.id, "true")
        name = {"StartContainer": "Start", "RemoveContainer": "Delete"}[method]
        calls = pod.spawn(name, id=pod.id)
    pod.await_call(method)
    _, _, vmm = next(entry for entry in undo.read(os.path.join(pod.place.run_dir, "journal"))[1]
                     if entry[1] == "process")
    killed(pod, [(vmm["pid"], vmm["start_time"])])
    calls.join(5)
    assert isinstance(calls.exception, errors.ConnectionClosed)


def test_the_journal_has_the_vmm_and_its_files_and_nothing_of_what_is_gone(pods):
    pod = pods()
    pod.start(pod.id, "true")
    pod.wait(pod.id)
    journal = os.path.join(pod.place.run_dir, "journal")
    before = undo.read(journal)[1]
    assert {"pid": pod.vmm_pid(), "start_time": child.start_time(pod.vmm_pid()), "name": "the fake VMM"} in [
        args for _, kind, args in before if kind == "process"]
    for _ in range(3):
        pod.start("member", "true")
        pod.wait("member")
        pod.call("Delete", id="member")
    assert undo.read(journal)[1] == before


# -- the real daemon ------------------------------------------------------------------------------
def test_a_life_with_the_real_daemon_is_no_reason_to_warn(daemons):
    pod = daemons()
    io = pod.streams(stdin=True).read()
    pod.start(pod.id, "sh", "-c", "seq 1 200000; cat", io=io)
    io.open_stdin()
    for number in range(5):
        pod.start(f"c{number}", "true")
        assert pod.wait(f"c{number}") == 0
        pod.call("Delete", id=f"c{number}")
    io.write(b"the end\n")
    io.close_stdin()
    pod.call("CloseIO", id=pod.id, stdin=True)
    assert pod.wait(pod.id) == 0
    assert io.output().endswith(b"199999\n200000\nthe end\n")
    pod.shut_down()
    assert pod.await_exit()
    pod.nothing_is_left()
    log = pod.log()
    records = [json.loads(line) for line in log.splitlines()
               if "warn" not in line.lower()]       # gevent misses psutil
    assert {record["level"] for record in records} <= {"info", "debug"}, log
    assert pod.events.of(pod.id) == ["create", "start", "exit"]


def test_two_daemons_do_not_mix_their_pods(daemons):
    first, second = daemons(), daemons()
    for pod in (first, second):
        pod.start(pod.id, "sleep", "1000")
    os.kill(first.vmm_pid(), signal.SIGKILL)
    assert first.wait(first.id) == 137
    assert second.status(second.id) == "running"


def test_a_vmm_that_dies_under_the_real_daemon(daemons):
    pod = daemons()
    pod.start(pod.id, "sleep", "1000")
    waiting = pod.spawn("Wait", id=pod.id)
    began = time.monotonic()
    os.kill(pod.vmm_pid(), signal.SIGKILL)
    assert waiting.get(timeout=5).exit_status == 137
    assert time.monotonic() - began < 3
    pod.events.wait(pod.id, "exit")
    pod.call("Delete", id=pod.id)
    pod.shut_down()
    assert pod.await_exit()
    pod.nothing_is_left()


def test_the_place_of_a_sandbox_is_its_own():
    assert Daemon and state.run_dir("a-1").endswith("/a-1")
    first, second = Place(), Place()
    try:
        assert first.run_dir != second.run_dir
    finally:
        first.remove()
        second.remove()
