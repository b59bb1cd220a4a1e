import copy
from types import SimpleNamespace

import pytest

from katashim import oci
from katashim.resources import specmut

SPEC = {
    "ociVersion": "1.0.2",
    "process": {"args": ["sh"], "cwd": "/", "selinuxLabel": "u:r:t", "apparmorProfile": "cri"},
    "root": {"path": "rootfs", "readonly": True},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
    "hooks": {"prestart": [{"path": "/a"}], "startContainer": [{"path": "/b"}], "poststop": [{"path": "/c"}]},
    "annotations": {"x": "y", "io.katacontainers.config.hypervisor.cc_init_data": "H4sI"},
    "linux": {
        "cgroupsPath": "/k8s/c1",
        "mountLabel": "u:r:m",
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
        "namespaces": [{"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "ipc", "path": "/proc/7/ns/ipc"},
                       {"type": "network", "path": "/run/netns/a"}, {"type": "time"}, {"type": "mount"},
                       {"type": "cgroup"}, {"type": "uts", "path": "/proc/7/ns/uts"}],
        "resources": {
            "devices": [{"allow": False, "access": "rwm"}], "pids": {"limit": 9}, "blockIO": {"weight": 5},
            "network": {"classID": 1}, "hugepageLimits": [{"pageSize": "1GB", "limit": 0}],
            "cpu": {"shares": 2, "cpus": "0-3", "mems": "1"}, "memory": {"limit": 1 << 20}, "unified": {"a": "b"}},
        "devices": [{"path": "/dev/vfio/7", "type": "c"}, {"path": "/dev/fuse", "type": "c"},
                    {"path": "/dev/sdz", "type": "b"}],
    },
}
SETTINGS = {"disable_guest_seccomp": False, "vfio_mode": "guest-kernel"}


def amend(spec=SPEC, *, guest_selinux=False, mounts=(), **settings):
    return specmut.amend(spec, container_type=oci.POD_CONTAINER, bundle="/b", mounts=mounts, guest_rootfs="/guest",
                         runtime_config=SimpleNamespace(**{**SETTINGS, **settings}), guest_selinux=guest_selinux)


def test_the_callers_spec_stays_as_it_is():
    before = copy.deepcopy(SPEC)
    amended = amend()
    amended["linux"]["resources"]["memory"]["limit"] = 1
    amended["process"]["args"].append("x")
    assert before == SPEC


@pytest.mark.parametrize("part, expected", [
    (("root",), {"path": "/guest", "readonly": True}),
    (("hooks",), {"startContainer": [{"path": "/b"}]}),
    (("annotations",), {"x": "y", "io.katacontainers.pkg.oci.container_type": "pod_container",
                        "io.katacontainers.pkg.oci.bundle_path": "/b"}),
    (("linux", "namespaces"), [{"type": "ipc"}, {"type": "mount"}, {"type": "cgroup"}, {"type": "uts"}]),
    (("linux", "resources"), {"cpu": {"shares": 2}, "memory": {"limit": 1 << 20}, "unified": {"a": "b"}}),
    (("linux", "devices"), [{"path": "/dev/fuse", "type": "c"}, {"path": "/dev/sdz", "type": "b"}]),
    (("linux", "cgroupsPath"), "/k8s/c1"),
    (("linux", "seccomp"), {"defaultAction": "SCMP_ACT_ERRNO"}),
    (("process",), {"args": ["sh"], "cwd": "/", "apparmorProfile": "cri"}),
    (("ociVersion",), "1.0.2"),
])
def test_each_part_of_the_spec(part, expected):
    value = amend()
    for key in part:
        value = value[key]
    assert value == expected


def test_switches():
    assert "seccomp" not in amend(disable_guest_seccomp=True)["linux"]
    assert amend(vfio_mode="vfio")["linux"]["devices"] == SPEC["linux"]["devices"]
    labelled = amend(guest_selinux=True)
    assert labelled["process"]["selinuxLabel"] == "u:r:t" and labelled["linux"]["mountLabel"] == "u:r:m"
    assert "mountLabel" not in amend()["linux"]
    mounts = [{"destination": "/x", "type": "bind", "source": "/y", "options": ["rbind"]}]
    assert amend(mounts=mounts)["mounts"] == mounts


def test_annotations_of_the_caller_are_not_overridden():
    spec = {**SPEC, "annotations": {specmut.BUNDLE_ANNOTATION: "/theirs", specmut.TYPE_ANNOTATION: "pod_sandbox"}}
    assert amend(spec)["annotations"] == spec["annotations"]


@pytest.mark.parametrize("linux", [{}, {"namespaces": None, "resources": None, "devices": None},
                                   {"resources": {}, "namespaces": []}, {"resources": {"cpu": None}}])
def test_a_sparse_spec(linux):
    sparse = {"process": {"args": ["sh"]}, "root": {}, "linux": linux}
    amended = amend(sparse)
    assert amended["linux"]["namespaces"] == [] and amended["root"] == {"path": "/guest"}
    assert not (amended["linux"].get("resources") or {}).get("cpu")
    assert "hooks" not in amended


@pytest.mark.parametrize("namespaces, shared", [
    ([], False), ([{"type": "pid"}], False), ([{"type": "pid", "path": ""}], False),
    ([{"type": "pid", "path": "/proc/7/ns/pid"}], True), ([{"type": "ipc", "path": "/x"}], False)])
def test_a_pid_namespace_by_path_is_the_pods(namespaces, shared):
    assert specmut.sandbox_pidns({"linux": {"namespaces": namespaces}}) is shared


def test_resources_of_an_update():
    assert specmut.guest_resources(None) == {}
    assert specmut.guest_resources({"cpu": {"cpus": "1"}, "pids": {"limit": 3}}) == {"cpu": {}}
