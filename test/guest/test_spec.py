"""The host's spec in both dialects, and what the guest makes of it."""

import pytest

from katashim.guest import tables, wire
from katashim.guest.agent import spec
from katashim.guest.agent.rpcerror import RpcError

CODEC = wire.Codec(tables.load()[0])


class Pod:
    """What amend asks the sandbox for."""

    def __init__(self, **paths):
        self._paths = paths

    def namespace_path(self, kind):
        return self._paths.get(kind, "")


def make(name, **fields):
    return CODEC.type(f"grpc.{name}")(**fields)


def message(namespaces=("mount", "ipc", "uts"), process=None, **linux):
    return make("Spec", Version="1.2.0", Root=make("Root", Path="/shared/root", Readonly=True),
                Hostname="pod",
                Process=make("Process", Args=["sh"], **(process or {})),
                Linux=make("Linux", Namespaces=[make("LinuxNamespace", Type=kind) for kind in namespaces],
                           **linux))


def amended(oci, pid_namespace="", unified=True, pod=None):
    spec.amend(oci, cid="c1", rootfs="/run/r", sandbox=pod or Pod(ipc="/ns/ipc", uts="/ns/uts"),
               pid_namespace=pid_namespace, unified_cgroups=unified)
    return oci


def kinds(oci):
    return {namespace["type"]: namespace.get("path", "") for namespace in oci["linux"]["namespaces"]}


@pytest.mark.parametrize("namespaces", [("mnt", "net", "ipc", "uts"), ("mount", "network", "ipc", "uts")])
def test_both_dialects_of_namespaces(namespaces):
    assert kinds(amended(spec.to_oci(message(namespaces)))) == {
        "mount": "", "ipc": "/ns/ipc", "uts": "/ns/uts", "pid": "", "cgroup": ""}


@pytest.mark.parametrize("name", ["CHOWN", "CAP_CHOWN", '"CAP_CHOWN"', "cap_chown"])
def test_both_dialects_of_capabilities(name):
    sets = make("LinuxCapabilities", Bounding=[name], Effective=[name])
    capabilities = spec.process(make("Process", Args=["x"], Capabilities=sets))["capabilities"]
    assert capabilities == {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "inheritable": [],
                            "permitted": [], "ambient": []}


def test_a_shared_pid_namespace_is_joined():
    assert kinds(amended(spec.to_oci(message()), pid_namespace="/proc/7/ns/pid"))["pid"] == "/proc/7/ns/pid"


def test_cgroup_version_1_gets_no_cgroup_namespace():
    assert "cgroup" not in kinds(amended(spec.to_oci(message()), unified=False))


def test_a_pod_that_was_not_set_up_gives_own_namespaces():
    assert kinds(amended(spec.to_oci(message()), pod=Pod()))["ipc"] == ""


def test_no_namespaces_at_all_is_refused_as_upstream_does():
    with pytest.raises(RpcError, match="cannot find the pid ns"):
        amended(spec.to_oci(message(namespaces=())))


@pytest.mark.parametrize("part", ["Process", "Root", "Linux"])
def test_a_spec_that_lacks_a_part_is_refused(part):
    whole = message()
    del whole.__dict__[part]
    with pytest.raises(RpcError, match="lacks"):
        spec.to_oci(whole)


@pytest.mark.parametrize(("given", "path"), [
    ("", "/c1"), ("/kubepods/burstable/pod1/c1", "/kubepods/burstable/pod1/c1"), ("a:b:c", "/a/b/c"),
    ("kubepods-pod1.slice:cri-containerd:c1", "/kubepods-pod1.slice/cri-containerd/c1"), ("/../../x", "/x")])
def test_cgroup_paths(given, path):
    assert spec.cgroups_path(given, "c1") == path


def test_root_version_and_path_are_the_guests():
    oci = amended(spec.to_oci(message()))
    assert oci["root"] == {"path": "/run/r", "readonly": True}
    assert oci["ociVersion"] == "1.0.2"


def test_limits_of_zero_and_below_are_no_limits():
    resources = spec.resources(make(
        "LinuxResources", Memory=make("LinuxMemory", Limit=1 << 20, Swap=-1),
        Pids=make("LinuxPids", Limit=-1),
        CPU=make("LinuxCPU", Shares=2, Quota=-1, Cpus="0-1")))
    assert resources == {"memory": {"limit": 1 << 20}, "cpu": {"shares": 2, "cpus": "0-1"}}


def test_pids_limits_are_kept():
    assert spec.resources(make("LinuxResources", Pids=make("LinuxPids", Limit=9)))["pids"] == {"limit": 9}


def test_device_rules_for_all_devices_have_no_numbers():
    rules = spec.resources(make("LinuxResources", Devices=[
        make("LinuxDeviceCgroup", Type="a", Access="rwm"),
        make("LinuxDeviceCgroup", Allow=True, Type="c", Major=1, Minor=3, Access="rw"),
        make("LinuxDeviceCgroup", Allow=True, Type="c", Major=5, Minor=-1, Access="m")]))["devices"]
    assert rules == [{"allow": False, "type": "a", "access": "rwm"},
                     {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"},
                     {"allow": True, "type": "c", "major": 5, "access": "m"}]


def test_only_start_container_hooks_are_kept():
    hook = make("Hook", Path="/bin/h", Args=["h"], Timeout=3)
    whole = message()
    whole.Hooks = make("Hooks", Prestart=[hook], StartContainer=[hook], Poststop=[hook])
    assert spec.to_oci(whole)["hooks"] == {"startContainer": [{"path": "/bin/h", "args": ["h"], "env": [],
                                                               "timeout": 3}]}


def test_seccomp_passes():
    filters = make("LinuxSeccomp", DefaultAction="SCMP_ACT_ERRNO", Architectures=["SCMP_ARCH_X86_64"],
                   Syscalls=[
        make("LinuxSyscall", Names=["read"], Action="SCMP_ACT_ALLOW"),
        make("LinuxSyscall", Names=["open"], Action="SCMP_ACT_ERRNO", errnoret=0)])
    assert spec.to_oci(message(Seccomp=filters))["linux"]["seccomp"]["syscalls"] == [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["open"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0}]


def test_sysctls_of_no_namespace_are_refused():
    with pytest.raises(RpcError, match="vm.swappiness"):
        amended(spec.to_oci(message(Sysctl={"vm.swappiness": "1"})))


def test_ipc_sysctls_are_left_to_crun():
    oci = amended(spec.to_oci(message(Sysctl={"kernel.shmmax": "9", "fs.mqueue.msg_max": "5"})))
    assert oci["linux"]["sysctl"] == {"kernel.shmmax": "9", "fs.mqueue.msg_max": "5"}
