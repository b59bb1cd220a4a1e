"""katashim.runtime.shim: one sandbox, however many ask for it, and the shim's own end."""

import gevent
import pytest
from fake_pod import member_of

from katashim import errors


def test_before_the_first_create_there_is_nothing(pods):
    pod = pods()
    for method in ("State", "Start", "Delete", "Wait", "Pids", "Stats", "Connect", "Pause"):
        with pytest.raises(errors.NotFound, match="this shim has no sandbox"):
            pod.call(method, id=pod.id)
    with pytest.raises(errors.NotFound):
        pod.call("Kill", id=pod.id, signal=9)


def test_a_shutdown_without_a_sandbox_finishes(pods):
    pod = pods()
    pod.call("Shutdown", id="whoever")
    assert pod.shim.finished.is_set()


def test_of_two_first_creates_at_once_one_has_the_sandbox(pods):
    pod = pods()
    creation = pod.creation(pod.id, "true")
    both = [pod.spawn("Create", **creation) for _ in range(2)]
    gevent.joinall(both, timeout=10)
    assert sorted(type(each.exception).__name__ for each in both) == ["AlreadyExists", "NoneType"]
    pod.call("Start", id=pod.id)
    assert pod.wait(pod.id) == 0
    assert pod.order(ask="calls").count("CreateSandbox") == 1


def test_members_may_be_created_while_the_sandbox_boots(pods):
    pod = pods("CreateSandbox=hold")
    names = [pod.id, "m1", "m2", "m3"]
    first = pod.spawn("Create", **pod.creation(pod.id, "true"))
    pod.await_call("CreateSandbox")
    others = [pod.spawn("Create", **pod.creation(name, "true")) for name in names[1:]]
    pod.order(fault="CreateSandbox=")
    gevent.joinall([first, *others], timeout=10, raise_error=True)
    assert pod.order(ask="containers") == sorted(names)


def test_a_member_cannot_be_the_first(pods):
    pod = pods()
    with pytest.raises(errors.FailedPrecondition, match=f"belongs to the sandbox {pod.id}.*|has not been created"):
        pod.create("member", "true", annotations=member_of("another"))
    assert pod.sandbox is None


def test_a_member_of_nobody_is_an_invalid_argument(pods):
    pod = pods()
    with pytest.raises(errors.InvalidArgument, match="none of the annotations"):
        pod.create("member", "true", annotations={"io.kubernetes.cri.container-type": "container"})


def test_states_during_the_boot_answer_at_once(pods):
    pod = pods("CreateSandbox=hold")
    creating = pod.spawn("Create", **pod.creation(pod.id, "true"))
    pod.await_call("CreateSandbox")
    asked = [pod.spawn("State", id=pod.id) for _ in range(50)]
    gevent.joinall(asked, timeout=10)
    assert all(isinstance(each.exception, errors.NotFound) for each in asked) and not creating.ready()
    pod.order(fault="CreateSandbox=")
    creating.get(timeout=10)


def test_the_shim_is_empty_before_and_after(pods):
    pod = pods()
    assert pod.shim.is_empty()
    pod.start(pod.id, "true")
    assert not pod.shim.is_empty()
    pod.wait(pod.id)
    pod.call("Delete", id=pod.id)
    assert pod.shim.is_empty()
