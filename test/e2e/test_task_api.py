"""The Task API as containerd's documentation has it, at moments that ctr does not reach."""

import time

import gevent
import pytest
from direct_shim import exec_request, make_root, spec
from live_pods import FOREVER, wait_for

from katashim import errors

pytestmark = pytest.mark.vm

CREATED, RUNNING, STOPPED = 1, 2, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(str(tmp_path_factory.mktemp("root") / "fs"))


@pytest.fixture(scope="module")
def shim(shims, root):
    """A shim whose container runs, for all tests that leave it running."""
    with shims("api", spec(*FOREVER, root=root)) as shim:
        shim.create()
        shim.api.call("Start", id=shim.name)
        yield shim


@pytest.fixture
def api(shim):
    return shim.api


def code_of(api, method, **fields):
    """The gRPC code that a call is refused with, and its words."""
    with pytest.raises(errors.KatashimError) as raised:
        api.call(method, **fields)
    return raised.value.code, str(raised.value)


def status_of(api, container):
    try:
        return api.call("State", id=container).status
    except errors.NotFound:
        return "absent"


def test_what_does_not_exist_is_not_found(shim, api):
    for method, fields in [("State", {}), ("Start", {}), ("Delete", {}), ("Kill", {"signal": 15}), ("Wait", {}),
                           ("Pids", {}), ("Pause", {}), ("Resume", {}), ("Stats", {}), ("CloseIO", {}),
                           ("ResizePty", {"width": 80, "height": 24}), ("Connect", {}), ("Update", {}),
                           ("Exec", exec_request("true"))]:
        assert code_of(api, method, id="nobody", **fields)[0] == errors.NOT_FOUND, method
    for method, fields in [("State", {}), ("Start", {}), ("Delete", {}), ("Kill", {"signal": 15}), ("Wait", {}),
                           ("CloseIO", {}), ("ResizePty", {"width": 80, "height": 24})]:
        code, words = code_of(api, method, id=shim.name, exec_id="nobody", **fields)
        assert code == errors.NOT_FOUND and "nobody" in words, method


def test_a_checkpoint_is_unimplemented(shim, api):
    assert code_of(api, "Checkpoint", id=shim.name)[0] == errors.UNIMPLEMENTED


def test_a_running_container_cannot_be_started_or_deleted(shim, api):
    for method in ("Start", "Delete"):
        code, words = code_of(api, method, id=shim.name)
        assert code == errors.FAILED_PRECONDITION and "running" in words
    assert api.call("State", id=shim.name).status == RUNNING


def test_a_container_that_runs_cannot_be_resumed(shim, api):
    assert code_of(api, "Resume", id=shim.name)[0] == errors.FAILED_PRECONDITION


def test_the_size_of_no_terminal_is_refused(shim, api):
    assert code_of(api, "ResizePty", id=shim.name, width=80, height=24)[0] == errors.FAILED_PRECONDITION


@pytest.mark.parametrize("signal", [0, 65, 4000000000])
def test_a_signal_that_there_is_not_is_refused(shim, api, signal):
    assert code_of(api, "Kill", id=shim.name, signal=signal)[0] == errors.INVALID_ARGUMENT


def test_connect_tells_the_pids(shim, api):
    answer = api.call("Connect", id=shim.name)
    assert answer.shim_pid == shim.pid
    assert [process.pid for process in api.call("Pids", id=shim.name).processes] == [answer.task_pid]


def test_an_exec_id_serves_once_until_it_is_deleted(shim, api):
    request = {"id": shim.name, "exec_id": "twice", **exec_request("sh", "-c", "exit 5")}
    for _ in range(2):
        api.call("Exec", **request)
        assert code_of(api, "Exec", **request)[0] == errors.ALREADY_EXISTS
        assert api.call("State", id=shim.name, exec_id="twice").status == CREATED
        waiting = api.begin("Wait", id=shim.name, exec_id="twice")
        api.call("Start", id=shim.name, exec_id="twice")
        assert waiting.get(timeout=20).exit_status == 5
        assert code_of(api, "Start", id=shim.name, exec_id="twice")[0] == errors.FAILED_PRECONDITION
        state = api.call("State", id=shim.name, exec_id="twice")
        assert (state.status, state.exit_status, state.exec_id) == (STOPPED, 5, "twice")
        deleted = api.call("Delete", id=shim.name, exec_id="twice")
        assert (deleted.exit_status, deleted.exited_at) == (5, state.exited_at)


def test_an_exec_that_runs_cannot_be_deleted(shim, api):
    api.call("Exec", id=shim.name, exec_id="busy", **exec_request("sleep", "1000"))
    api.call("Start", id=shim.name, exec_id="busy")
    assert code_of(api, "Delete", id=shim.name, exec_id="busy")[0] == errors.FAILED_PRECONDITION
    api.call("Kill", id=shim.name, exec_id="busy", signal=9)
    assert api.call("Wait", id=shim.name, exec_id="busy").exit_status == 137
    api.call("Delete", id=shim.name, exec_id="busy")


def test_an_exec_that_was_never_started_can_be_deleted(shim, api):
    api.call("Exec", id=shim.name, exec_id="idle", **exec_request("true"))
    assert code_of(api, "Kill", id=shim.name, exec_id="idle", signal=9)[0] == errors.FAILED_PRECONDITION
    api.call("Delete", id=shim.name, exec_id="idle")
    assert code_of(api, "State", id=shim.name, exec_id="idle")[0] == errors.NOT_FOUND


@pytest.mark.parametrize("process", [b"{", b"[]", b'{"cwd": "/"}'])
def test_an_exec_that_is_no_process_is_refused(shim, api, process):
    code, _ = code_of(api, "Exec", id=shim.name, exec_id="bad", spec={"type_url": "x", "value": process})
    assert code == errors.INVALID_ARGUMENT
    assert code_of(api, "State", id=shim.name, exec_id="bad")[0] == errors.NOT_FOUND


def test_a_container_id_serves_once(shim):
    with pytest.raises(errors.AlreadyExists):
        shim.create()


def test_a_container_of_another_sandbox_is_refused_by_an_empty_shim(shims, root):
    marks = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "other"}
    with shims("alone", spec("true", root=root)) as shim:
        bundle = shim.write_bundle(shim.bundle + "-member", spec("true", root=root, annotations=marks))
        with pytest.raises(errors.FailedPrecondition, match="other"):
            shim.create("member", bundle=bundle)


def test_a_second_start_finds_the_shim_that_serves(shim):
    assert shim.verb("start").stdout.decode().startswith("unix:///")
    with open(f"{shim.bundle}/shim.pid") as file:
        assert int(file.read()) == shim.pid


def test_delete_leaves_a_living_shim_alone(shim, api):
    shim.verb("delete")
    assert api.call("State", id=shim.name).status == RUNNING


def test_a_whole_life_with_questions_all_the_time(shims, root):
    """State answers at once during bring-up and during delete; ten Shutdowns are one."""
    with shims("life", spec("sh", "-c", "exit 6", root=root)) as shim:
        api = shim.api
        creating = api.begin("Create", id=shim.name, bundle=shim.bundle)
        seen = set()
        while not creating.ready():
            begun = time.monotonic()
            seen.add(status_of(api, shim.name))
            assert time.monotonic() - begun < 0.5
            gevent.sleep(0.1)
        assert "absent" in seen and seen <= {"absent", CREATED}
        assert creating.get().pid > 0
        waiting = api.begin("Wait", id=shim.name)
        assert api.call("State", id=shim.name).status == CREATED
        api.call("Start", id=shim.name)
        assert waiting.get(timeout=20).exit_status == 6
        deleting = api.begin("Delete", id=shim.name)
        asked = [api.begin("State", id=shim.name) for _ in range(50)]
        gevent.joinall(asked, timeout=0.5)
        assert all(one.ready() for one in asked)
        assert all(one.successful() or isinstance(one.exception, errors.NotFound) for one in asked)
        assert deleting.get(timeout=20).exit_status == 6
        assert code_of(api, "Delete", id=shim.name)[0] == errors.NOT_FOUND
        shutdowns = [api.begin("Shutdown", id=shim.name) for _ in range(10)]
        gevent.joinall(shutdowns, timeout=20)
        assert all(one.ready() for one in shutdowns)
        assert [one.exception for one in shutdowns] == [None] * 10
        wait_for(shim.gone, "the end of the shim")


def test_a_shutdown_in_the_middle_of_a_boot_ends_it(shims, root):
    with shims("early", spec(*FOREVER, root=root)) as shim:
        creating = shim.api.begin("Create", id=shim.name, bundle=shim.bundle)
        gevent.sleep(0.5)
        shim.api.call("Shutdown", id=shim.name, now=True)
        wait_for(shim.gone, "the end of the shim")
        with pytest.raises(errors.Unavailable):
            creating.get(timeout=5)


def test_a_created_container_can_be_deleted_without_a_start(shims, root):
    with shims("unstarted", spec(*FOREVER, root=root)) as shim:
        shim.create()
        deleted = shim.api.call("Delete", id=shim.name)
        assert deleted.exit_status == 137
