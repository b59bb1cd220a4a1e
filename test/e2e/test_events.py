"""What containerd is told: each event exactly once, and in the guaranteed order."""

import pytest
from event_listener import Listener, topics
from live_pods import FOREVER

pytestmark = pytest.mark.vm

@pytest.fixture
def events(daemon):
    with Listener(daemon) as listener:
        yield listener


def test_a_containers_life_in_order_and_once(daemon, pod, events, name):
    member = name()
    pod.run(member, "sh", "-c", "exit 5", options=["--rm"], code=5)
    events.until("delete", member)
    found = events.settle(member)
    assert topics(found) == ["create", "start", "exit", "delete"]
    create, start, exit_, delete = (event.fields for event in found)
    assert create["bundle"].endswith(member) and create["pid"] == start["pid"] == exit_["pid"] > 0
    assert (exit_["id"], exit_["exit_status"], delete["exit_status"]) == (member, 5, 5)
    assert exit_["exited_at"] == delete["exited_at"]


def test_an_execs_life_in_order_and_once(daemon, pod, events, name):
    exec_id = name("e")
    daemon.ctr("task", "exec", "--exec-id", exec_id, pod.name, "sh", "-c", "exit 6", code=6)
    events.until("exit", pod.name)
    found = [event for event in events.settle(pod.name) if exec_id in event.fields.values()]
    assert topics(found) == ["exec-added", "exec-started", "exit"]
    assert (found[2].fields["id"], found[2].fields["exit_status"]) == (exec_id, 6)


def test_the_start_of_an_instant_process_comes_before_its_exit(daemon, pod, events, name):
    members = [name() for _ in range(5)]
    running = [pod.start_run(member, "true", options=["--rm"]) for member in members]
    for one in running:
        assert one.wait(60).code == 0
    for member in members:
        assert topics(events.until("delete", member)) == ["create", "start", "exit", "delete"]


def test_pause_and_resume_are_told(daemon, pod, events, name):
    member = name()
    pod.run(member, *FOREVER, options=["-d"])
    daemon.ctr("task", "pause", member)
    daemon.ctr("task", "resume", member)
    daemon.ctr("task", "rm", "-f", member)
    events.until("delete", member)
    assert topics(events.settle(member)) == ["create", "start", "paused", "resumed", "exit", "delete"]


def test_running_out_of_memory_is_told_and_ends_with_137(daemon, pod, events, name):
    member = name()
    result = pod.run(member, "dd", "if=/dev/zero", "of=/dev/null", "bs=100M",
                     options=["--rm", "--memory-limit", str(32 << 20)], code=137)
    assert result.seconds < 20
    events.until("delete", member)
    found = topics(events.settle(member))
    assert found.count("oom") == 1
    assert [topic for topic in found if topic != "oom"] == ["create", "start", "exit", "delete"]
