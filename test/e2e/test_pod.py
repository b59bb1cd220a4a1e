"""Pods: one shim and one VM for all containers that a CRI runtime groups by its annotations."""

import pytest
from live_pods import FOREVER, Pod, api_of, pid_of, shim_pid, wait_for

from katashim import child

pytestmark = pytest.mark.vm


def boot_id(daemon, container, exec_id):
    return daemon.ctr("task", "exec", "--exec-id", exec_id, container,
                      "cat", "/proc/sys/kernel/random/boot_id").out


def test_one_shim_and_one_vm_serve_all(daemon, pod, name):
    members = [name() for _ in range(2)]
    for member in members:
        pod.run(member, *FOREVER, options=["-d"])
    assert len({boot_id(daemon, container, name("e")) for container in (pod.name, *members)}) == 1
    assert {pid for pid, _ in daemon.tasks().values()} == {pid_of(pod.name, "QEMU")}
    with api_of(daemon, pod.name) as one, api_of(daemon, members[0]) as other:
        answers = {one.call("Connect", id=pod.name).shim_pid, other.call("Connect", id=members[0]).shim_pid}
    assert answers == {shim_pid(pod.name)}


def test_members_share_ipc_and_hostname_but_not_processes(daemon, pod, name):
    def look(container):
        script = "readlink /proc/self/ns/ipc /proc/self/ns/uts /proc/self/ns/net; hostname"
        return daemon.ctr("task", "exec", "--exec-id", name("e"), container, "sh", "-c", script).out
    member = name()
    pod.run(member, *FOREVER, options=["-d"])
    assert look(member) == look(pod.name)
    seen = daemon.ctr("task", "exec", "--exec-id", name("e"), member, "ps", "-o", "args").out
    assert seen.count(FOREVER[0]) == 1


def test_the_pod_outlives_its_members(daemon, pod, name):
    for round_ in range(2):
        assert pod.run(name(), "echo", f"round {round_}", options=["--rm"]).out == f"round {round_}\n"
    assert daemon.tasks()[pod.name][1] == "RUNNING"


def test_the_members_outlive_the_sandboxs_first_process(daemon, name):
    """A pause container that dies takes nobody with it until it is deleted; another member may come."""
    with Pod(daemon, name("pod")) as pod:
        member = name()
        pod.run(member, *FOREVER, options=["-d"])
        daemon.ctr("task", "kill", "-s", "SIGKILL", pod.name)
        daemon.wait_status(pod.name, "STOPPED", 20)
        assert daemon.ctr("task", "exec", "--exec-id", name("e"), member, "echo", "alive").out == "alive\n"
        assert pod.run(name(), "echo", "another", options=["--rm"]).out == "another\n"
        daemon.ctr("task", "rm", "-f", member)
        daemon.ctr("container", "rm", member)


def test_two_members_at_once(daemon, pod, name):
    running = [pod.start_run(name(), "echo", str(number), options=["--rm"]) for number in range(4)]
    for number, one in enumerate(running):
        assert one.wait(60).out == f"{number}\n"


def test_deleting_the_sandbox_ends_vm_and_shim(daemon, name):
    with Pod(daemon, name("pod")) as pod:
        member = name()
        pod.run(member, *FOREVER, options=["-d"])
        shim, vmm = shim_pid(pod.name), pid_of(pod.name, "QEMU")
        for container in (member, pod.name):
            daemon.ctr("task", "rm", "-f", container)
        daemon.ctr("container", "rm", member)
        assert child.start_time(vmm) is None
        wait_for(lambda: child.start_time(shim) is None, "the end of the shim")


def test_a_member_of_a_pod_that_is_not_there_is_refused(daemon, name):
    marks = ["--annotation", "io.kubernetes.cri.container-type=container",
             "--annotation", f"io.kubernetes.cri.sandbox-id={name('nobody')}"]
    result = daemon.run(name(), "true", options=["--rm", *marks], check=False)
    assert result.code == 1
    assert "no running shim" in result.err
