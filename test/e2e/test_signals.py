"""Signals, pause and resume, figures, limits."""

import json
from typing import NamedTuple

import pytest
from live_pods import FOREVER, api_of, wait_for

from katashim.ttrpc import proto

pytestmark = pytest.mark.vm

OBEDIENT = "trap 'exit 143' TERM; echo ready; while :; do sleep 0.1; done"


@pytest.mark.parametrize(("signal", "code"), [("SIGKILL", 137), ("SIGTERM", 143)])
def test_a_killed_container_ends_with_its_signals_status(daemon, pod, name, signal, code):
    member = name()
    running = pod.start_run(member, "sh", "-c", OBEDIENT, options=["--rm"])
    running.read_line()
    daemon.ctr("task", "kill", "-s", signal, member)
    result = running.wait(20)
    assert result.code == code, result


def test_a_signal_reaches_the_program(daemon, pod, name):
    member = name()
    running = pod.start_run(member, "sh", "-c", "trap 'echo heard; exit 5' USR1; echo ready;"
                            "while :; do sleep 0.1; done", options=["--rm"])
    running.read_line()
    daemon.ctr("task", "kill", "-s", "SIGUSR1", member)
    result = running.wait(20)
    assert (result.code, result.out) == (5, "heard\n")


def test_an_exec_can_be_killed_alone(daemon, pod, name):
    exec_id = name("e")
    running = daemon.start_ctr("task", "exec", "--exec-id", exec_id, pod.name, "sh", "-c",
                               "echo ready; exec sleep 1000")
    running.read_line()
    daemon.ctr("task", "kill", "-s", "SIGKILL", "--exec-id", exec_id, pod.name)
    assert running.wait(20).code == 137
    assert daemon.tasks()[pod.name][1] == "RUNNING"


def test_killing_a_stopped_one_is_no_error(daemon, pod, name):
    member = name()
    pod.run(member, "true", options=["-d"])
    daemon.wait_status(member, "STOPPED")
    with api_of(daemon, member) as api:
        for signal in (15, 9, 9):
            api.call("Kill", id=member, signal=signal)


def test_a_paused_container_stands_still_until_it_is_resumed(daemon, pod, name):
    member = name()
    running = pod.start_run(member, "sh", "-c", "echo ready; while :; do echo .; sleep 0.05; done")
    running.read_line()
    daemon.ctr("task", "pause", member)
    assert daemon.tasks()[member][1] == "PAUSED"
    with api_of(daemon, member) as api:
        first = figures(api, member).cpu
        assert figures(api, member).cpu == first
        daemon.ctr("task", "resume", member)
        assert daemon.tasks()[member][1] == "RUNNING"
        wait_for(lambda: figures(api, member).cpu > first, "the container to run again")
    daemon.ctr("task", "kill", "-s", "SIGKILL", member)
    assert running.wait(20).code == 137


class Figures(NamedTuple):
    """What Stats says, the same of both cgroup versions."""

    cpu: int
    memory_bytes: int
    memory_limit: int
    pids: int


def figures(api, container):
    stats = api.call("Stats", id=container).stats
    kind = stats.type_url.rpartition("/")[2]
    said = proto.decode(proto.get(kind), stats.value)
    if kind.endswith("v1.Metrics"):
        return Figures(said.cpu.usage.total, said.memory.usage.usage, said.memory.usage.limit,
                       said.pids.current)
    return Figures(said.cpu.usage_usec, said.memory.usage, said.memory.usage_limit, said.pids.current)


def test_a_paused_container_can_be_killed(daemon, pod, name):
    member = name()
    pod.run(member, *FOREVER, options=["-d"])
    daemon.ctr("task", "pause", member)
    daemon.ctr("task", "kill", "-s", "SIGKILL", member)
    daemon.wait_status(member, "STOPPED", 20)


def test_metrics_are_the_containers(daemon, pod, name):
    member = name()
    pod.run(member, "sh", "-c", "head -c 8000000 /dev/urandom >/dev/shm/x; exec sleep 1000",
            options=["-d", "--memory-limit", str(96 << 20)])
    assert json.loads(daemon.ctr("task", "metrics", "--format", "json", member).out)["memory"]
    with api_of(daemon, member) as api:
        wait_for(lambda: figures(api, member).memory_bytes >= 8000000, "8 MB to be accounted for")
        found = figures(api, member)
    assert found.memory_limit == 96 << 20
    assert found.pids >= 1 and found.cpu > 0


def test_limits_can_be_changed(daemon, pod, name):
    member = name()
    pod.run(member, *FOREVER, options=["-d"])
    limits = {"memory": {"limit": 64 << 20}}
    with api_of(daemon, member) as api:
        api.call("Update", id=member, resources={"type_url": "types.containerd.io/opencontainers/runtime-spec/1/"
                                                 "LinuxResources", "value": json.dumps(limits).encode()})
        assert figures(api, member).memory_limit == 64 << 20
