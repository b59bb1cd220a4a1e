"""Containers through the agent's RPCs, with the real crun, on this machine."""

import json
import os
import threading

import pytest
from agent_pods import Pod
from host_agent import HostAgent
from plain_client import PlainClient, Refused

from katashim.ttrpc import proto


def refusal(code, text):
    return pytest.raises(Refused, match=f"^{code}: .*{text}")


def test_a_container_runs_and_its_status_comes_back(pod):
    cid = pod.run("sh", "-c", "echo out; echo err >&2; exit 7")
    assert pod.read(cid) == b"out\n"
    assert pod.read(cid, stream="Stderr") == b"err\n"
    assert pod.wait(cid) == 7


def test_nothing_runs_before_the_start(pod, client):
    cid = pod.create("sh", "-c", "echo started")
    reader = []
    thread = threading.Thread(target=lambda: reader.append(pod.read(cid)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    client.call("StartContainer", container_id=cid)
    thread.join(10)
    assert reader == [b"started\n"]


def test_a_missing_program_is_refused_at_creation_and_nothing_stays(pod, client, host_agent):
    with refusal(13, "`/bin/nope` not found"):
        pod.create("/bin/nope")
    cid = pod.run("true")       # the agent goes on
    assert pod.wait(cid) == 0


def test_the_same_id_again_is_refused(pod, client, busybox_root):
    from agent_pods import spec
    cid = pod.run("sleep", "100")
    with refusal(13, "exists already"):
        client.call("CreateContainer", container_id=cid, OCI=spec(busybox_root, "true"))
    assert pod.output(cid, "echo", "alive") == "alive\n"


@pytest.mark.parametrize("cid", ["", "x", "../x", "a/b", "-abc", "a b"])
def test_ids_are_checked(client, busybox_root, cid):
    from agent_pods import spec
    with refusal(13, "Invalid container ID"):
        client.call("CreateContainer", container_id=cid, OCI=spec(busybox_root, "true"))


def test_a_container_without_a_spec_is_refused(client):
    with refusal(13, "EINVAL"):
        client.call("CreateContainer", container_id="no-spec")


def test_an_impossible_mount_is_refused_with_cruns_words(pod):
    with refusal(13, "no-such-file"):
        pod.create("true", mounts=[{"destination": "/x", "type": "bind", "source": "/no-such-file",
                                    "options": ["bind"]}])


def test_a_root_that_is_not_there_is_refused(pod):
    with refusal(13, "/no-such-root"):
        pod.create("true", root="/no-such-root")


def test_sigkill_is_137_and_sigterm_of_a_deaf_init_too(pod, client):
    for signal in (9, 15):
        cid = pod.run("sleep", "100")
        client.call("SignalProcess", container_id=cid, signal=signal)
        assert pod.wait(cid) == 137


def test_sigterm_reaches_an_init_that_listens(pod, client):
    cid = pod.run("sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")
    assert client.call("ReadStdout", container_id=cid, len=100).data == b"ready\n"
    client.call("SignalProcess", container_id=cid, signal=15)
    assert pod.wait(cid) == 9


def test_a_signal_to_one_that_has_ended_is_no_error(pod, client):
    cid = pod.run("true")
    assert pod.read(cid) == b""
    client.call("SignalProcess", container_id=cid, exec_id=cid, signal=9)
    assert pod.wait(cid) == 0


def test_sigkill_of_the_init_takes_all_processes_along(pod, client):
    cid = pod.run("sh", "-c", "sleep 1000 & sleep 1000")
    exec_id = pod.execute(cid, "sleep", "1000")
    client.call("SignalProcess", container_id=cid, signal=9)
    assert pod.wait(cid) == 137
    assert pod.wait(cid, exec_id) == 137


def test_both_names_of_the_init(pod, client):
    cid = pod.run("sh", "-c", "exit 3")
    assert client.call("WaitProcess", container_id=cid, exec_id=cid).status == 3


def test_all_who_wait_hear_of_the_end_and_nobody_after_them(pod, client):
    cid = pod.run("sh", "-c", "read x; exit 5")
    waiting = proto.get("grpc.WaitProcessRequest")(container_id=cid).SerializeToString()
    with client.connect() as connection:
        for stream_id in (1, 3, 5):
            client.send(connection, stream_id, "WaitProcess", waiting)
        for _ in range(10):         # so that the three are waiting for sure
            client.call("ListInterfaces")
        client.call("CloseStdin", container_id=cid)
        answers = dict(client.receive(connection) for _ in range(3))
    assert answers == dict.fromkeys((1, 3, 5), b"\x08\x05")
    with refusal(5, "InitProcessNotFound"):
        pod.wait(cid)


def test_unknown_ids(pod, client):
    cid = pod.run("sleep", "100")
    for method, code, text in (
            ("WaitProcess", 3, "InvalidContainerId"), ("SignalProcess", 3, "InvalidContainerId"),
            ("ReadStdout", 3, "InvalidContainerId"), ("CloseStdin", 3, "InvalidContainerId"),
            ("TtyWinResize", 3, "InvalidContainerId"), ("WriteStdin", 13, "Invalid container id"),
            ("StartContainer", 13, "Invalid container id"), ("RemoveContainer", 13, "Invalid container id"),
            ("ExecProcess", 13, "Invalid container id"), ("StatsContainer", 3, '"invalid container id"'),
            ("UpdateContainer", 3, '"invalid container id"'), ("PauseContainer", 3, '"invalid container id"'),
            ("ResumeContainer", 3, '"invalid container id"')):
        with refusal(code, text):
            client.call(method, container_id="unknown")
    for method, code, text in (
            ("WaitProcess", 5, "InvalidExecId"), ("SignalProcess", 5, "InvalidExecId"),
            ("ReadStdout", 5, "InvalidExecId"),
            ("WriteStdin", 13, "Process not found: invalid exec id")):
        with refusal(code, text):
            client.call(method, container_id=cid, exec_id="unknown")


def test_starting_one_that_has_died_is_an_error_not_a_hang(pod, client):
    cid = pod.create("true")
    client.call("SignalProcess", container_id=cid, signal=9)
    assert pod.read(cid) == b""
    with refusal(13, "does not wait to be started"):
        client.call("StartContainer", container_id=cid)


def test_removal_leaves_nothing(pod, client, host_agent):
    cid = pod.run("sleep", "1000")
    places = [f"{host_agent.root}{path}/{cid}" for path in
              ("/run/kata-containers", "/run/crun", "/sys/fs/cgroup/katashim-test")]
    assert all(os.path.isdir(place) for place in places)
    pod.remove(cid)
    assert not any(os.path.exists(place) for place in places)
    assert not any(cid in path for path in host_agent.mount_points())
    with refusal(13, "Invalid container id"):
        client.call("RemoveContainer", container_id=cid)


def test_removal_with_a_time_limit(pod, client):
    cid = pod.run("sleep", "1000")
    client.call("RemoveContainer", container_id=cid, timeout=10)
    with refusal(13, "Invalid container id"):
        client.call("RemoveContainer", container_id=cid, timeout=10)


def test_pause_and_resume(pod, client):
    cid = pod.run("sh", "-c", "while :; do read x; echo $x; done")
    client.call("PauseContainer", container_id=cid)
    with refusal(13, "paused"):
        client.call("PauseContainer", container_id=cid)
    client.call("WriteStdin", container_id=cid, data=b"hello\n")
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.call("ReadStdout", container_id=cid,
                                                                        len=9).data))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    client.call("ResumeContainer", container_id=cid)
    thread.join(10)
    assert answers == [b"hello\n"]
    with refusal(13, "not paused"):
        client.call("ResumeContainer", container_id=cid)


def test_a_paused_container_can_be_removed(pod, client):
    cid = pod.run("sleep", "1000")
    client.call("PauseContainer", container_id=cid)
    pod.remove(cid)


def test_containers_of_a_pod_share_ipc_and_host_name(pod):
    one = pod.run("sleep", "1000")
    other = pod.run("sleep", "1000")
    for kind in ("ipc", "uts"):
        links = {pod.output(cid, "busybox", "readlink", f"/proc/1/ns/{kind}") for cid in (one, other)}
        assert len(links) == 1
    assert pod.output(one, "hostname") == "pod\n"


def test_pid_namespaces_are_own_or_shared(pod):
    first = pod.run("sleep", "1000")
    own = pod.run("sleep", "2000")
    assert pod.output(own, "sh", "-c", "cat /proc/1/cmdline").startswith("sleep\x002000")
    assert first != own


def test_the_shared_memory_of_the_pod(pod):
    shm = {"destination": "/dev/shm", "type": "bind", "source": "/run/kata-containers/sandbox/shm",
           "options": ["rbind"]}
    one, other = pod.run("sleep", "1000", mounts=[shm]), pod.run("sleep", "1000", mounts=[shm])
    pod.output(one, "sh", "-c", "echo shared > /dev/shm/f")
    assert pod.output(other, "cat", "/dev/shm/f") == "shared\n"


def test_stats_of_a_container(pod, client):
    cid = pod.run("sleep", "1000")
    stats = client.call("StatsContainer", container_id=cid).cgroup_stats
    assert stats.cpu_stats.cpu_usage.total_usage > 0
    assert stats.cpu_stats.cpu_usage.total_usage >= stats.cpu_stats.cpu_usage.usage_in_usermode


def test_an_update_that_asks_for_nothing(pod, client):
    cid = pod.run("sleep", "1000")
    client.call("UpdateContainer", container_id=cid)


def test_a_read_only_root(pod, client, busybox_root):
    from agent_pods import spec
    readonly = spec(busybox_root, "sh", "-c", "touch /x", cgroup="/katashim-test/readonly")
    readonly["Root"]["Readonly"] = True
    client.call("CreateContainer", container_id="readonly", OCI=readonly)
    try:
        client.call("StartContainer", container_id="readonly")
        assert b"Read-only" in pod.read("readonly", stream="Stderr")
    finally:
        client.call("RemoveContainer", container_id="readonly")


def test_what_is_not_supported_is_refused_not_passed_over(pod, client, busybox_root):
    from agent_pods import spec
    with refusal(12, "shared_mounts"):
        client.call("CreateContainer", container_id="no-shared", OCI=spec(busybox_root, "true"),
                    shared_mounts=[{"name": "x"}])
    with refusal(12, "passed descriptors"):
        client.call("CreateContainer", container_id="no-ports", OCI=spec(busybox_root, "true"), stdout_port=7)


def test_hooks_of_the_guest(host_agent, client, pod, tmp_path):
    log = tmp_path / "log"
    for kind in ("prestart", "poststart", "poststop"):
        (tmp_path / kind).mkdir()
        hook = tmp_path / kind / "10-hook"
        hook.write_text(f"#!/bin/sh\necho {kind} $(cat) >> {log}\n")
        hook.chmod(0o755)
        (tmp_path / kind / "notes.txt").write_text("no hook")
    agent = HostAgent(str(tmp_path))
    try:
        agent.wait_ready(PlainClient(agent.socket, service="grpc.Health"))
        own = Pod(PlainClient(agent.socket), pod.root)
        own.client.call("CreateSandbox", sandbox_id="the-pod", guest_hook_path=str(tmp_path))
        cid = own.create("true", cgroup=f"/katashim-test/hooks-{os.getpid()}")
        kind, _, state = log.read_text().partition(" ")
        assert (kind, json.loads(state)["id"], json.loads(state)["status"]) == ("prestart", cid, "created")
        own.client.call("StartContainer", container_id=cid)
        assert own.wait(cid) == 0
        own.remove(cid)
        kinds = [line.split()[0] for line in log.read_text().splitlines()]
        assert kinds == ["prestart", "poststart", "poststop"]
        (tmp_path / "prestart" / "20-refuse").symlink_to("/bin/false")
        own.client.call("CreateSandbox", sandbox_id="again", guest_hook_path=str(tmp_path))
        with refusal(13, "prestart hook .*20-refuse ended with 1"):
            own.create("true", cgroup=f"/katashim-test/hooks-{os.getpid()}")
    finally:
        agent.stop()


def test_a_sandbox_that_is_set_up_again_starts_anew(tmp_path):
    place = "/run/kata-containers/sandbox/shm"
    shm = {"driver": "ephemeral", "source": "shm", "fstype": "tmpfs", "mount_point": place}
    agent = HostAgent(str(tmp_path))
    try:
        agent.wait_ready(PlainClient(agent.socket, service="grpc.Health"))
        client = PlainClient(agent.socket)
        for _ in range(2):
            client.call("CreateSandbox", sandbox_id="the-pod", hostname="pod", storages=[shm])
            assert agent.mount_points().count(place) == 1
            assert agent.mount_points().count("/run/sandbox-ns/uts") == 1
    finally:
        agent.stop()


def test_destroying_the_sandbox_ends_the_agent_and_its_waits(tmp_path, busybox_root):
    agent = HostAgent(str(tmp_path))
    try:
        agent.wait_ready(PlainClient(agent.socket, service="grpc.Health"))
        own = Pod(PlainClient(agent.socket), busybox_root)
        own.client.call("CreateSandbox", sandbox_id="the-pod")
        cid = own.run("sleep", "1000")
        with own.client.connect() as connection:
            own.client.send(connection, 1, "GetOOMEvent", b"")
            own.client.send(connection, 3, "WaitProcess",
                            proto.get("grpc.WaitProcessRequest")(container_id=cid).SerializeToString())
            for _ in range(5):
                own.client.call("ListInterfaces")
            own.client.call("DestroySandbox")
            ends = {}
            for _ in range(2):
                try:
                    ends.update([own.client.receive(connection)])
                except Refused as exc:
                    ends["oom"] = exc.code
        assert ends["oom"] == 13
        assert ends[3] == b"\x08\x89\x01"         # 137
        assert agent.wait_end() == 0
    finally:
        agent.stop()
