"""Processes that are started in a running container, in both ways: by the agent itself, and by crun where
the container has a seccomp filter."""

import threading

import pytest
from agent_pods import process
from plain_client import Refused

FILTER = {"DefaultAction": "SCMP_ACT_ALLOW", "Architectures": ["SCMP_ARCH_X86_64"]}


@pytest.fixture(params=["agent", "crun"])
def cid(request, pod):
    """A container that sleeps."""
    return pod.run("sleep", "1000", linux={"Seccomp": FILTER} if request.param == "crun" else {})


def test_output_and_status(pod, cid):
    exec_id = pod.execute(cid, "sh", "-c", "echo out; echo err >&2; exit 9")
    assert pod.read(cid, exec_id) == b"out\n"
    assert pod.read(cid, exec_id, "Stderr") == b"err\n"
    assert pod.wait(cid, exec_id) == 9
    with pytest.raises(Refused, match="^5: InvalidExecId"):
        pod.wait(cid, exec_id)


def test_a_missing_program_is_refused_at_once(pod, cid):
    for name in ("/bin/nope", "nope"):
        with pytest.raises(Refused,
                           match=f"^13: executable file `{name}` not found in \\$PATH: No such file"):
            pod.execute(cid, name)


def test_a_program_that_cannot_be_executed(pod, cid):
    with pytest.raises(Refused, match="^13: .*(Permission denied|not executable)"):
        pod.execute(cid, "/etc/passwd")


def test_a_directory_that_is_not_there(pod, cid):
    with pytest.raises(Refused, match="^13: .*/no-such-dir"):
        pod.execute(cid, "true", Cwd="/no-such-dir")


def test_an_id_that_is_in_use(pod, client, cid):
    pod.execute(cid, "sleep", "1000", exec_id="twice")
    with pytest.raises(Refused, match="^13: exec_id 'twice' already exists"):
        pod.execute(cid, "true", exec_id="twice")


def test_a_container_that_has_ended(pod, client, cid):
    client.call("SignalProcess", container_id=cid, signal=9)
    pod.wait(cid)
    with pytest.raises(Refused, match="^13: .*does not run"):
        pod.execute(cid, "true")


def test_no_program_at_all(pod, client, cid):
    with pytest.raises(Refused, match="^13: "):
        client.call("ExecProcess", container_id=cid, exec_id="none", process=process())
    with pytest.raises(Refused, match="^13: .*ExecProcessRequest"):
        client.call("ExecProcess", container_id=cid, exec_id="none")


def test_user_and_groups(pod, cid):
    user = {"UID": 1000, "GID": 1001, "AdditionalGids": [5, 7]}
    assert pod.output(cid, "id", User=user).split() == ["uid=1000(user)", "gid=1001", "groups=5,7"]


def test_home_comes_from_passwd_unless_it_is_given(pod, cid):
    user = {"UID": 1000, "GID": 1000}
    assert pod.output(cid, "sh", "-c", "echo $HOME", User=user) == "/tmp\n"
    assert pod.output(cid, "sh", "-c", "echo $HOME", User={"UID": 77}) == "/\n"
    assert pod.output(cid, "sh", "-c", "echo $HOME", User=user, Env=["PATH=/bin", "HOME=/x"]) == "/x\n"


def test_environment_and_directory(pod, cid):
    text = pod.output(cid, "sh", "-c", "echo $A-$PWD", Env=["PATH=/bin", "A=b=c"], Cwd="/tmp")
    assert text == "b=c-/tmp\n"


def _status(pod, cid, *names, **fields):
    lines = dict(line.split(":\t") for line in pod.output(cid, "cat", "/proc/self/status",
                                                          **fields).splitlines())
    return [lines[name] for name in names]


def test_capabilities_of_root(pod, cid):
    sets = {"Bounding": ["CAP_CHOWN", "KILL"], "Effective": ["CHOWN"], "Permitted": ["CAP_CHOWN", "CAP_KILL"]}
    assert _status(pod, cid, "CapBnd", "CapPrm", Capabilities=sets) == ["0000000000000021",
                                                                        "0000000000000021"]


def test_capabilities_of_a_user_are_ambient_or_lost(pod, cid):
    user = {"UID": 1000, "GID": 1000}
    every = {name: ["CAP_NET_RAW"] for name in ("Bounding", "Effective", "Permitted", "Inheritable")}
    assert _status(pod, cid, "CapEff", User=user, Capabilities=every) == ["0000000000000000"]
    every["Ambient"] = ["CAP_NET_RAW"]
    assert _status(pod, cid, "CapEff", User=user, Capabilities=every) == ["0000000000002000"]


def test_absent_capabilities_are_the_containers(pod, client, cid):
    wanted = _status(pod, cid, "CapBnd")
    message = process("cat", "/proc/self/status")
    del message["Capabilities"]
    client.call("ExecProcess", container_id=cid, exec_id="absent", process=message)
    assert f"CapBnd:\t{wanted[0]}" in pod.read(cid, "absent").decode()


def test_limits_and_privileges(pod, cid):
    limits = [{"Type": "RLIMIT_NOFILE", "Soft": 100, "Hard": 200},
              {"Type": "CORE", "Soft": 0, "Hard": 2**64 - 1}]
    assert _status(pod, cid, "NoNewPrivs", NoNewPrivileges=True) == ["1"]
    assert _status(pod, cid, "NoNewPrivs") == ["0"]
    lines = pod.output(cid, "cat", "/proc/self/limits", Rlimits=limits).splitlines()
    assert next(line.split()[3:5] for line in lines if line.startswith("Max open files")) == ["100", "200"]
    assert next(line.split()[4:6] for line in lines if line.startswith("Max core file")) == ["0", "unlimited"]


def test_the_oom_score(pod, cid):
    assert pod.output(cid, "cat", "/proc/self/oom_score_adj", OOMScoreAdj=321) == "321\n"


def test_signals_are_as_a_program_expects_them(pod, cid):
    blocked, ignored = (int(text, 16) for text in _status(pod, cid, "SigBlk", "SigIgn"))
    assert blocked == 0
    # glibc's own 32 and 33 are ignored after its posix_spawn, which starts crun
    assert ignored & ~(3 << 31) == 0


def test_it_is_in_the_containers_cgroup_and_namespaces(pod, cid):
    init = pod.output(cid, "cat", "/proc/1/cgroup")
    assert pod.output(cid, "cat", "/proc/self/cgroup") == init
    for kind in ("mnt", "pid", "ipc", "uts", "net", "cgroup"):
        assert len(set(pod.output(cid, "sh", "-c", f"busybox readlink /proc/1/ns/{kind}; "
                                                   f"busybox readlink /proc/self/ns/{kind}").split())) == 1


def test_no_descriptor_of_the_agent_is_left_open(pod, cid):
    assert pod.output(cid, "sh", "-c",
                      "cd /proc/self/fd; for fd in *; do test $fd -gt 2 && busybox readlink $fd; done; "
                                       "true") in ("", "/proc/1/fd\n")


def test_a_terminal(pod, client, cid):
    exec_id = pod.execute(cid, "sh", "-c", "tty; stty size; read x; echo got $x; id -u; exit 3",
                          Terminal=True,
                          ConsoleSize={"Height": 50, "Width": 60}, User={"UID": 1000, "GID": 1000})
    client.call("WriteStdin", container_id=cid, exec_id=exec_id, data=b"it\n")
    text = b""
    with pytest.raises(Refused, match="os error 5"):
        while True:
            text += client.call("ReadStdout", container_id=cid, exec_id=exec_id, len=100).data
    assert sorted(text.split()) == sorted(b"/dev/pts/0 50 60 it got it 1000".split())
    assert pod.wait(cid, exec_id) == 3


def test_a_failing_terminal_process_leaves_nothing_open(pod, cid):
    for _ in range(3):
        with pytest.raises(Refused, match="not found"):
            pod.execute(cid, "/bin/nope", Terminal=True)


def test_many_at_once(pod, cid):
    results, errors = [], []

    def one(number):
        try:
            results.append(pod.output(cid, "echo", str(number)))
        except (Refused, OSError, AssertionError) as exc:
            errors.append(exc)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert sorted(results) == sorted(f"{number}\n" for number in range(20))


def test_killing_one_leaves_the_container(pod, client, cid):
    exec_id = pod.execute(cid, "sleep", "1000")
    client.call("SignalProcess", container_id=cid, exec_id=exec_id, signal=9)
    assert pod.wait(cid, exec_id) == 137
    assert pod.output(cid, "echo", "alive") == "alive\n"
