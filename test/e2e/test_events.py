"""What containerd is told: each event exactly once, and in the guaranteed order."""

import json
import queue
import subprocess
import threading
import time
from typing import NamedTuple

import pytest
from live_pods import FOREVER

pytestmark = pytest.mark.vm

_WAIT_S = 30
_QUIET_S = 0.5          # for an event that must not come


class Event(NamedTuple):
    topic: str
    fields: dict

    def of(self, container):
        return self.fields.get("container_id") == container


class Listener:
    """``ctr events`` in the background, for the time of a ``with`` block."""

    def __init__(self, daemon):
        self._daemon = daemon
        self._lines = queue.SimpleQueue()
        self.seen = []

    def __enter__(self):
        self._process = subprocess.Popen(self._daemon.ctr_argv("events"), env=self._daemon.env, text=True,
                                         stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._await_subscription()
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait(10)
        self._reader.join()
        self._process.stdout.close()

    def _read(self):
        for line in self._process.stdout:
            self._lines.put(line)

    def _await_subscription(self):
        """Make events of no consequence until one is seen."""
        end = time.monotonic() + _WAIT_S
        while self._lines.empty():
            assert time.monotonic() < end, "ctr events shows nothing"
            self._daemon.ctr("namespace", "label", "default", "listening=yes")

    def until(self, topic, container):
        """All events of `container` so far, read until `topic`; [(topic without /tasks/, fields)]."""
        end = time.monotonic() + _WAIT_S
        while not any(event.topic == topic and event.of(container) for event in self.seen):
            self._take(end - time.monotonic())
        return self.of(container)

    def settle(self, container):
        """All events of `container`, once none has come for a while."""
        try:
            while True:
                self._take(_QUIET_S)
        except queue.Empty:
            return self.of(container)

    def of(self, container):
        return [event for event in self.seen if event.of(container)]

    def _take(self, timeout_s):
        line = self._lines.get(timeout=max(0, timeout_s))
        topic, text = line.split(" ", 6)[5:]            # behind four words of time, and the namespace
        if topic.startswith("/tasks/"):
            self.seen.append(Event(topic.removeprefix("/tasks/"), json.loads(text)))


@pytest.fixture
def events(daemon):
    with Listener(daemon) as listener:
        yield listener


def topics(found):
    return [event.topic for event in found]


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
