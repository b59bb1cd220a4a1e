"""The Task service over its wire, on the fake VMM: what each RPC does, answers and refuses.

One pod serves most of these tests (`pod`); each makes containers of its own in it.
"""

import os

import gevent
import pytest
from fake_pod import TASK, packed, refused

from katashim import errors, host
from katashim.ttrpc import proto


# -- Create ---------------------------------------------------------------------------------------
def test_create_answers_the_vmms_pid_and_runs_nothing(pod, cid, tmp_path):
    answer = pod.create(cid, "touch", str(tmp_path / "ran"))
    assert answer.pid == pod.vmm_pid()
    assert pod.status(cid) == "created" and not os.path.exists(tmp_path / "ran")
    pod.flush()
    assert pod.events.of(cid) == ["create"]


def test_the_create_event_tells_all_that_create_was_told(pod, cid):
    io = pod.streams(stdin=True)
    pod.create(cid, "true", io=io)
    pod.flush()
    event, = pod.events.messages("/tasks/create", cid)
    assert (event.io.stdin, event.io.stdout, event.io.stderr) == (io.stdin, io.stdout, io.stderr)
    assert event.bundle.endswith(f"bundle-{cid}") and event.pid == pod.vmm_pid()
    assert [mount.source for mount in event.rootfs] == [pod.place.image]


def test_an_id_serves_once(pod, cid):
    pod.create(cid, "true")
    with pytest.raises(errors.AlreadyExists, match=cid):
        pod.create(cid, "true")
    assert pod.status(cid) == "created"


@pytest.mark.parametrize("identifier", ["", "../x", "a/b", ".hidden", "x" * 129, "a b", "ü"])
def test_an_id_that_is_no_name_is_refused(pod, identifier):
    refused(pod, errors.INVALID_ARGUMENT, "Create", "is not valid", id=identifier, bundle="/tmp")


def test_a_bundle_without_config_is_not_found(pod, tmp_path):
    refused(pod, errors.NOT_FOUND, "Create", "no OCI spec", id="x1", bundle=str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"process": {"args": []}, "root": {}, "linux": {}}',
                                  '{"process": {"args": "x"}, "root": {}, "linux": {}}', "[" * 100_000, "\x00"])
def test_a_config_that_is_none_is_an_invalid_argument(pod, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refused(pod, errors.INVALID_ARGUMENT, "Create", "config.json", id="x1", bundle=str(tmp_path))


def test_a_bundle_by_a_relative_path_is_refused(pod):
    refused(pod, errors.INVALID_ARGUMENT, "Create", "not an absolute path", id="x1", bundle="bundle")


def test_a_checkpoint_cannot_be_restored(pod):
    refused(pod, errors.UNIMPLEMENTED, "Create", "checkpoint", id="x1", bundle="/tmp", checkpoint="/c")


def test_a_missing_program_fails_the_create_with_the_guests_words_and_leaves_nothing(pod, cid):
    entries = pod.sandbox.undo.entries()
    with pytest.raises(errors.KatashimError, match="the file there-is-none was not found"):
        pod.create(cid, "there-is-none", io=pod.streams(stdin=True))
    refused(pod, errors.NOT_FOUND, "State", cid, id=cid)
    assert pod.sandbox.undo.entries() == entries and cid not in pod.order(ask="containers")
    pod.start(cid, "true")                  # the id is free again
    assert pod.wait(cid) == 0
    pod.flush()
    assert pod.events.of(cid)[0] == "create" and pod.events.of(cid).count("create") == 1


def test_a_rootfs_that_is_not_there_leaves_nothing(pod, cid):
    entries = pod.sandbox.undo.entries()
    with pytest.raises(errors.NotFound, match="/there/is/none"):
        pod.create(cid, "true", rootfs=[{"type": "ext4", "source": "/there/is/none", "options": ["ro"]}])
    assert pod.sandbox.undo.entries() == entries
    refused(pod, errors.NOT_FOUND, "State", id=cid)


def test_a_fifo_that_is_not_there_is_not_found(pod, cid):
    io = pod.streams()
    io.stdout += "-gone"
    with pytest.raises(errors.NotFound, match="there is no FIFO"):
        pod.create(cid, "true", io=io)
    assert cid not in pod.sandbox.containers


# -- Start and its end ----------------------------------------------------------------------------
def test_a_container_runs_and_its_exit_is_told(pod, cid):
    io = pod.streams().read()
    assert pod.start(cid, "sh", "-c", "echo out; echo err >&2; exit 7", io=io).pid == pod.vmm_pid()
    answer = pod.call("Wait", id=cid)
    assert answer.exit_status == 7 and answer.exited_at.seconds > 1_700_000_000
    assert (io.output(), io.output("stderr")) == (b"out\n", b"err\n")
    state = pod.call("State", id=cid)
    assert (state.status, state.exit_status, state.exited_at) == (3, 7, answer.exited_at)
    deleted = pod.call("Delete", id=cid)
    assert (deleted.exit_status, deleted.exited_at, deleted.pid) == (7, answer.exited_at, pod.vmm_pid())
    pod.flush()
    assert pod.events.of(cid) == ["create", "start", "exit", "delete"]
    event, = pod.events.messages("/tasks/exit", cid)
    assert (event.id, event.exit_status, event.exited_at) == (cid, 7, answer.exited_at)


def test_a_container_starts_once(pod, cid):
    pod.start(cid, "sleep", "100")
    refused(pod, errors.FAILED_PRECONDITION, "Start", "is running", id=cid)
    pod.call("Kill", id=cid, signal=9)
    pod.wait(cid)
    refused(pod, errors.FAILED_PRECONDITION, "Start", "is stopped", id=cid)
    pod.flush()
    assert pod.events.of(cid) == ["create", "start", "exit"]


def test_start_comes_before_exit_for_an_instant_process(pod, cid):
    """The agent delays the answer to StartContainer until long after the process has ended."""
    pod.order(fault="StartContainer=late:0.1")
    pod.create(cid, "true")
    starting = pod.spawn("Start", id=cid)
    waiting = pod.spawn("Wait", id=cid)
    gevent.joinall([starting, waiting], raise_error=True)
    pod.order(fault="StartContainer=")
    pod.flush()
    assert pod.events.of(cid) == ["create", "start", "exit"]
    assert pod.status(cid) == "stopped"


def test_many_instant_containers_have_their_events_in_order(pod):
    names = [f"i{number}" for number in range(25)]

    def live(name):
        pod.start(name, "true")
        assert pod.wait(name) == 0
        pod.call("Delete", id=name)
    gevent.joinall([gevent.spawn(live, name) for name in names], raise_error=True)
    pod.flush()
    assert {tuple(pod.events.of(name)) for name in names} == {("create", "start", "exit", "delete")}


@pytest.mark.parametrize("method", ["Start", "Delete", "State", "Wait", "Pids", "Stats", "Pause", "Resume",
                                    "CloseIO", "Connect"])
def test_an_unknown_container_is_not_found(pod, method):
    refused(pod, errors.NOT_FOUND, method, "no container 'nobody'", id="nobody")


@pytest.mark.parametrize("method, more", [
    ("Kill", {"signal": 9}), ("ResizePty", {}), ("Exec", {"exec_id": "e", "spec": packed({"args": ["true"]})}),
    ("Update", {"resources": packed({})})])
def test_an_unknown_container_is_not_found_by_these_either(pod, method, more):
    refused(pod, errors.NOT_FOUND, method, "no container 'nobody'", id="nobody", **more)


@pytest.mark.parametrize("method", ["Start", "Delete", "State", "Wait", "CloseIO", "ResizePty"])
def test_an_unknown_exec_is_not_found(pod, method):
    refused(pod, errors.NOT_FOUND, method, "has no exec 'nobody'", id=pod.id, exec_id="nobody")


def test_a_container_is_its_own_first_process(pod, cid):
    pod.start(cid, "sleep", "100")
    state = pod.call("State", id=cid, exec_id=cid)
    assert (state.id, state.exec_id, state.status) == (cid, "", 2)


def test_checkpoint_is_unimplemented(pod):
    refused(pod, errors.UNIMPLEMENTED, "Checkpoint", id=pod.id, path="/tmp/x")


# -- Delete ---------------------------------------------------------------------------------------
def test_what_runs_cannot_be_deleted(pod, cid):
    pod.start(cid, "sleep", "100")
    refused(pod, errors.FAILED_PRECONDITION, "Delete", "is running", id=cid)
    assert pod.status(cid) == "running"


def test_one_that_was_never_started_can_be_deleted(pod, cid):
    pod.create(cid, "sleep", "100")
    assert pod.call("Delete", id=cid).exit_status == 137
    refused(pod, errors.NOT_FOUND, "Delete", id=cid)
    pod.flush()
    assert pod.events.of(cid) == ["create", "exit", "delete"]
    assert cid not in pod.order(ask="containers")


def test_a_second_delete_is_not_found_also_at_the_same_time(pod, cid):
    pod.start(cid, "true")
    pod.wait(cid)
    deletes = [pod.spawn("Delete", id=cid) for _ in range(5)]
    gevent.joinall(deletes)
    assert sorted(type(each.exception).__name__ for each in deletes) == ["NoneType"] + ["NotFound"] * 4
    pod.flush()
    assert pod.events.of(cid).count("delete") == 1


def test_fifty_states_during_a_delete_answer_at_once(pod, cid):
    pod.start(cid, "true")
    pod.wait(cid)
    pod.order(fault="RemoveContainer=hold")
    before = pod.calls("RemoveContainer")
    deleting = pod.spawn("Delete", id=cid)
    pod.await_call("RemoveContainer", after=before)
    states = [pod.spawn("State", id=cid) for _ in range(50)]
    gevent.joinall(states, timeout=10, raise_error=True)
    assert {each.value.status for each in states} == {3} and not deleting.ready()
    pod.order(fault="RemoveContainer=")
    deleting.get(timeout=10)


def test_a_container_that_the_agent_does_not_remove_is_deleted_all_the_same(pod, cid):
    pod.start(cid, "true")
    pod.wait(cid)
    pod.order(fault="RemoveContainer=refuse:13")
    pod.call("Delete", id=cid)
    pod.order(fault="RemoveContainer=")
    refused(pod, errors.NOT_FOUND, "State", id=cid)


def test_the_sandbox_outlives_its_last_member(pod, cid):
    for _ in range(3):
        pod.start(cid, "true")
        pod.wait(cid)
        pod.call("Delete", id=cid)
    pod.start(cid, "true")


def test_nothing_stays_of_a_container(pod, cid):
    entries, wanted = pod.sandbox.undo.entries(), sorted(pod.order(ask="containers"))
    pod.start(cid, "sleep", "100", io=pod.streams(stdin=True).read())
    assert len(pod.sandbox.undo.entries()) > len(entries)
    pod.remove(cid)
    assert pod.sandbox.undo.entries() == entries and pod.order(ask="containers") == wanted


# -- Kill -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("signal, status", [(9, 137), (15, 143), (2, 130)])
def test_a_signal_ends_a_process_that_minds_it(pod, cid, signal, status):
    io = pod.streams().read()
    pod.start(cid, "sh", "-c", f"trap 'exit {status}' TERM INT; echo up; while :; do sleep 0.01; done", io=io)
    io.await_text(b"up")
    pod.call("Kill", id=cid, signal=signal)
    assert pod.wait(cid) == status


def test_kill_of_all_reaches_the_grandchildren(pod, cid, tmp_path):
    io = pod.streams().read()
    pod.start(cid, "sh", "-c", "sleep 1000 & echo $!; wait", io=io)
    io.await_text(b"\n")
    pod.call("Kill", id=cid, signal=9, all=True)
    assert pod.wait(cid) == 137
    assert io.output().endswith(b"\n")          # which needs the grandchild's end, too


@pytest.mark.parametrize("signal", [9, 15])
def test_killing_what_has_ended_is_no_error(pod, cid, signal):
    pod.start(cid, "true")
    pod.wait(cid)
    pod.call("Kill", id=cid, signal=signal)
    pod.call("Kill", id=cid, signal=signal, all=True)


def test_another_signal_for_what_has_ended_is_not_found(pod, cid):
    pod.start(cid, "true")
    pod.wait(cid)
    refused(pod, errors.NOT_FOUND, "Kill", "has ended already", id=cid, signal=10)


@pytest.mark.parametrize("signal", [0, 65, 4_000_000_000])
def test_there_are_64_signals(pod, signal):
    refused(pod, errors.INVALID_ARGUMENT, "Kill", "no signal", id=pod.id, signal=signal)


def test_one_that_is_created_can_be_killed(pod, cid):
    pod.create(cid, "sleep", "100")
    pod.call("Kill", id=cid, signal=9)
    assert pod.wait(cid) == 137
    assert pod.status(cid) == "stopped"
    refused(pod, errors.FAILED_PRECONDITION, "Start", "stopped", id=cid)
    pod.flush()
    assert pod.events.of(cid) == ["create", "exit"]


# -- Exec -----------------------------------------------------------------------------------------
def test_an_exec_lives_its_own_life(pod, running):
    io = pod.streams().read()
    pod.add_exec(running, "e1", "sh", "-c", "echo hi; exit 3", io=io)
    assert pod.status(running, "e1") == "created"
    waiting = pod.spawn("Wait", id=running, exec_id="e1")       # before the start: containerd does
    assert pod.call("Start", id=running, exec_id="e1").pid == pod.vmm_pid()
    assert waiting.get().exit_status == 3
    assert io.output() == b"hi\n"
    state = pod.call("State", id=running, exec_id="e1")
    assert (state.id, state.exec_id, state.status, state.exit_status, state.stdout) == (
        running, "e1", 3, 3, io.stdout)
    assert pod.call("Delete", id=running, exec_id="e1").exit_status == 3
    refused(pod, errors.NOT_FOUND, "State", id=running, exec_id="e1")
    assert pod.status(running) == "running"
    pod.flush()
    assert pod.events.of(running) == ["create", "start", "exec-added e1", "exec-started e1", "exit e1"]


def test_exec_started_comes_before_the_exit_of_an_instant_exec(pod, running):
    pod.order(fault="ExecProcess=late:0.1")
    pod.exec(running, "e1", "true")
    pod.order(fault="ExecProcess=")
    assert pod.wait(running, "e1") == 0
    pod.flush()
    assert pod.events.of(running)[2:] == ["exec-added e1", "exec-started e1", "exit e1"]


def test_an_exec_of_a_missing_command_fails_at_once_with_the_guests_words(pod, running):
    pod.add_exec(running, "e1", "there-is-none", io=pod.streams(stdin=True))
    refused(pod, errors.INTERNAL, "Start", "the file there-is-none was not found", id=running, exec_id="e1")
    assert pod.status(running) == "running"
    pod.call("Delete", id=running, exec_id="e1")
    pod.flush()
    assert "exec-started e1" not in pod.events.of(running) and "exit e1" not in pod.events.of(running)
    pod.exec(running, "e1", "true")         # the name is free again
    assert pod.wait(running, "e1") == 0


def test_those_who_wait_for_an_exec_that_never_started_are_answered(pod, running):
    """containerd's client waits before it starts, and deletes what failed to start."""
    pod.add_exec(running, "e1", "there-is-none")
    waiting = pod.spawn("Wait", id=running, exec_id="e1")
    refused(pod, errors.INTERNAL, "Start", id=running, exec_id="e1")
    pod.call("Delete", id=running, exec_id="e1")
    waiting.join(5)
    assert waiting.ready()


def test_an_execs_name_serves_once(pod, running):
    pod.add_exec(running, "e1", "true")
    with pytest.raises(errors.AlreadyExists):
        pod.add_exec(running, "e1", "true")
    with pytest.raises(errors.AlreadyExists):
        pod.add_exec(running, running, "true")


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b'"x"', b"{}", b'{"args": []}', b"\xff\xfe"])
def test_an_exec_of_nothing_is_an_invalid_argument(pod, running, value):
    refused(pod, errors.INVALID_ARGUMENT, "Exec", id=running, exec_id="e1", spec={"value": value})


@pytest.mark.parametrize("exec_id", ["", "../e", "a/b"])
def test_an_execs_id_that_is_no_name_is_refused(pod, running, exec_id):
    refused(pod, errors.INVALID_ARGUMENT, "Exec", id=running, exec_id=exec_id, spec=packed({"args": ["true"]}))


def test_an_exec_starts_once(pod, running):
    pod.exec(running, "e1", "sleep", "100")
    refused(pod, errors.FAILED_PRECONDITION, "Start", "started already", id=running, exec_id="e1")
    pod.call("Kill", id=running, exec_id="e1", signal=9)
    assert pod.wait(running, "e1") == 137
    refused(pod, errors.FAILED_PRECONDITION, "Start", "started already", id=running, exec_id="e1")


def test_what_runs_cannot_be_forgotten(pod, running):
    pod.exec(running, "e1", "sleep", "100")
    refused(pod, errors.FAILED_PRECONDITION, "Delete", "runs", id=running, exec_id="e1")
    pod.call("Kill", id=running, exec_id="e1", signal=9)
    pod.wait(running, "e1")
    pod.call("Delete", id=running, exec_id="e1")
    assert pod.status(running) == "running"


def test_an_exec_needs_a_container_that_runs(pod, cid):
    pod.create(cid, "true")
    pod.add_exec(cid, "e1", "true")
    refused(pod, errors.FAILED_PRECONDITION, "Start", "nothing can be executed", id=cid, exec_id="e1")
    pod.call("Start", id=cid)
    pod.wait(cid)
    with pytest.raises(errors.FailedPrecondition, match="is stopped"):
        pod.add_exec(cid, "e2", "true")
    refused(pod, errors.FAILED_PRECONDITION, "Start", "is stopped", id=cid, exec_id="e1")


def test_an_exec_that_was_not_started_has_nothing_to_signal(pod, running):
    pod.add_exec(running, "e1", "true")
    refused(pod, errors.FAILED_PRECONDITION, "Kill", "has not been started", id=running, exec_id="e1", signal=9)


def test_the_execs_of_a_container_end_with_it(pod, running):
    pod.exec(running, "e1", "sleep", "1000")
    waiting = pod.spawn("Wait", id=running, exec_id="e1")
    pod.call("Kill", id=running, signal=9, all=True)
    assert waiting.get(timeout=10).exit_status == 137
    assert pod.wait(running) == 137
    pod.call("Delete", id=running, exec_id="e1")
    pod.call("Delete", id=running)
    pod.flush()
    assert sorted(pod.events.of(running)[-3:]) == ["delete", "exit", "exit e1"]


def test_twenty_execs_at_once(pod, running):
    def live(number):
        io = pod.streams().read()
        pod.exec(running, f"e{number}", "sh", "-c", f"echo {number}; exit {number}", io=io)
        assert pod.wait(running, f"e{number}") == number
        assert io.output() == f"{number}\n".encode()
        pod.call("Delete", id=running, exec_id=f"e{number}")
    gevent.joinall([gevent.spawn(live, number) for number in range(20)], raise_error=True)
    pod.flush()
    for number in range(20):
        mine = [name for name in pod.events.of(running) if name.endswith(f" e{number}")]
        assert mine == [f"exec-added e{number}", f"exec-started e{number}", f"exit e{number}"]


# -- Pause, Resume, Update, Stats -----------------------------------------------------------------
def test_pause_and_resume(pod, running):
    pod.call("Pause", id=running)
    assert pod.status(running) == "paused"
    refused(pod, errors.FAILED_PRECONDITION, "Pause", "is paused", id=running)
    refused(pod, errors.FAILED_PRECONDITION, "Delete", "is paused", id=running)
    pod.add_exec(running, "e1", "true")
    refused(pod, errors.FAILED_PRECONDITION, "Start", "is paused", id=running, exec_id="e1")
    pod.call("Resume", id=running)
    assert pod.status(running) == "running"
    refused(pod, errors.FAILED_PRECONDITION, "Resume", "is running", id=running)
    pod.flush()
    assert pod.events.of(running)[2:] == ["paused", "exec-added e1", "resumed"]


def test_what_is_not_running_cannot_be_paused(pod, cid):
    pod.create(cid, "true")
    refused(pod, errors.FAILED_PRECONDITION, "Pause", "is created", id=cid)
    refused(pod, errors.FAILED_PRECONDITION, "Resume", "is created", id=cid)


def test_a_paused_container_can_be_killed(pod, running):
    pod.call("Pause", id=running)
    pod.call("Kill", id=running, signal=9)
    assert pod.wait(running) == 137
    assert pod.status(running) == "stopped"


def test_update_reaches_the_guest(pod, running):
    pod.call("Update", id=running, resources=packed({"memory": {"limit": 123 << 20}, "cpu": {"shares": 77}}))
    said = pod.order(ask="resources", id=running)
    assert f"Limit: {123 << 20}" in said and "Shares: 77" in said


@pytest.mark.parametrize("value", [b"", b"{", b"[1]"])
def test_an_update_of_nothing_is_an_invalid_argument(pod, running, value):
    refused(pod, errors.INVALID_ARGUMENT, "Update", "is not", id=running, resources={"value": value})


@pytest.mark.parametrize("resources", [{"memory": {"limit": "much"}}, {"cpu": {"cpus": "0-nine"}}, {"cpu": 7},
                                       {"unknown": 1, "memory": []}])
def test_limits_that_are_none_are_an_invalid_argument(pod, running, resources):
    refused(pod, errors.INVALID_ARGUMENT, "Update", id=running, resources=packed(resources))
    pod.call("Update", id=running, resources=packed({"memory": {"limit": 1 << 30}}))    # and nothing stuck


def test_stats_are_containerds_metrics(pod, running):
    metrics = proto.unpack_any(pod.call("Stats", id=running).stats)
    version = "v2" if host.cgroup_mode() == "v2" else "v1"
    assert metrics.DESCRIPTOR.full_name == f"io.containerd.cgroups.{version}.Metrics"
    assert metrics.pids.current == 1
    assert (metrics.memory.usage if version == "v2" else metrics.memory.usage.usage) == 4096


def test_what_has_ended_has_no_stats_and_no_limits(pod, cid):
    pod.start(cid, "true")
    pod.wait(cid)
    refused(pod, errors.FAILED_PRECONDITION, "Stats", "is stopped", id=cid)
    refused(pod, errors.FAILED_PRECONDITION, "Update", "is stopped", id=cid, resources=packed({}))


# -- looking --------------------------------------------------------------------------------------
def test_pids_and_connect(pod, running):
    assert [process.pid for process in pod.call("Pids", id=running).processes] == [pod.vmm_pid()]
    answer = pod.call("Connect", id=running)
    assert (answer.shim_pid, answer.task_pid) == (os.getpid(), pod.vmm_pid()) and answer.version


def test_state_tells_what_create_was_told(pod, cid):
    io = pod.streams(stdin=True)
    pod.create(cid, "true", io=io)
    state = pod.call("State", id=cid)
    assert (state.id, state.pid, state.status, state.exec_id, state.terminal) == (
        cid, pod.vmm_pid(), 1, "", False)
    assert (state.stdin, state.stdout, state.stderr) == (io.stdin, io.stdout, io.stderr)
    assert not state.HasField("exited_at") and state.bundle.endswith(f"bundle-{cid}")


def test_many_wait_for_one_end(pod, running):
    waiting = [pod.spawn("Wait", id=running) for _ in range(50)]
    pod.call("Kill", id=running, signal=9)
    assert {each.get(timeout=10).exit_status for each in waiting} == {137}
    assert pod.wait(running) == 137


def test_an_out_of_memory_event_names_the_container(pod, running):
    pod.order(oom=running)
    assert pod.events.wait(running, "oom") == ["create", "start", "oom"]
    pod.call("Kill", id=running, signal=9)
    assert pod.wait(running) == 137
    pod.order(oom="nobody")                 # it has been removed meanwhile
    pod.order(oom=running)
    pod.events.wait(running, "oom", count=2)


def test_every_rpc_of_the_service_is_there(pod):
    from katashim.services.task import TaskService
    assert not [method for method in proto.service(TASK) if not hasattr(TaskService, method)]


def test_shutdown_of_a_member_does_nothing(pod, running):
    pod.call("Shutdown", id=running)
    pod.call("Shutdown", id="nobody")
    assert pod.status(running) == "running" and not pod.shim.finished.is_set()
