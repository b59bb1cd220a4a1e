import pytest
from hypothesis import given
from hypothesis import strategies as st

from katashim.agent import oci
from katashim.errors import InvalidArgument

# A specification that uses everything that the wire has a place for.
SPEC = {
    "ociVersion": "1.1.0",
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1000, "gid": 100, "additionalGids": [4, 24], "username": "u"},
        "args": ["sh", "-c", "exit 7"],
        "env": ["PATH=/bin", "E=\u00e4"],
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["KILL"], "inheritable": [],
                         "permitted": ["CAP_FUTURE"], "ambient": ["CAP_SYS_ADMIN"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2**64 - 1, "soft": 1024}],
        "noNewPrivileges": True,
        "apparmorProfile": "p",
        "oomScoreAdj": -500,
        "selinuxLabel": "l",
    },
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "h",
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}],
    "hooks": {name: [{"path": "/h", "args": ["h"], "env": ["A=b"], "timeout": 3}] for name in (
        "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")},
    "annotations": {"a.b/c": "d"},
    "linux": {
        "uidMappings": [{"hostID": 1000, "containerID": 0, "size": 10}],
        "gidMappings": [{"hostID": 2000, "containerID": 0, "size": 10}],
        "sysctl": {"net.core.somaxconn": "256"},
        "resources": {
            "devices": [{"allow": False, "access": "rwm"},
                        {"allow": True, "type": "c", "major": 1, "minor": 0, "access": "r"}],
            "memory": {"limit": 1 << 30, "reservation": 1, "swap": -1, "kernel": 2, "kernelTCP": 3,
                       "swappiness": 60, "disableOOMKiller": True},
            "cpu": {"shares": 1024, "quota": -1, "period": 100000, "realtimeRuntime": 1, "realtimePeriod": 2,
                    "cpus": "0-1", "mems": "0"},
            "pids": {"limit": 0},
            "blockIO": {"weight": 10, "leafWeight": 11,
                        "weightDevice": [{"major": 8, "minor": 0, "weight": 12, "leafWeight": 13}],
                        **{f"throttle{kind}Device": [{"major": 8, "minor": 1, "rate": 14}] for kind in (
                            "ReadBps", "WriteBps", "ReadIOPS", "WriteIOPS")}},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 2 << 20}],
            "network": {"classID": 5, "priorities": [{"name": "eth0", "priority": 6}]},
        },
        "cgroupsPath": "/k8s/pod",
        "namespaces": [{"type": "pid"}, {"type": "mnt"}, {"type": "net", "path": "/run/netns/x"},
                       {"type": "future"}],
        "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 1,
                     "gid": 2}],
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"],
                    "flags": ["SECCOMP_FILTER_FLAG_LOG"],
                    "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "errnoRet": 0,
                                  "args": [{"index": 0, "value": 2**64 - 1, "valueTwo": 1,
                                            "op": "SCMP_CMP_EQ"}]},
                                 {"names": ["write"], "action": "SCMP_ACT_FUTURE"}]},
        "rootfsPropagation": "rprivate",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "mountLabel": "m",
        "intelRdt": {"l3CacheSchema": "L3:0=f"},
    },
}


def set_fields(message):
    """``{dotted field name}`` of all that is set, at any depth; lists by their first element."""
    found = set()
    for field, value in message.ListFields():
        found.add(field.name)
        if hasattr(value, "add"):
            value = value[0]
        if hasattr(value, "ListFields"):
            found |= {f"{field.name}.{name}" for name in set_fields(value)}
    return found


def all_fields(descriptor):
    found = set()
    for field in descriptor.fields:
        found.add(field.name)
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            found |= {f"{field.name}.{name}" for name in all_fields(field.message_type)}
    return found


def test_every_field_of_the_wire_is_reached():
    lost = []
    message = oci.to_proto(SPEC, lost)
    unset = all_fields(message.DESCRIPTOR) - set_fields(message)
    assert lost == []
    assert unset == {
        "Solaris", "Solaris.dummy", "Windows", "Windows.dummy",
        # Set to zero or not at all in the first of their list, see the next test.
        "Linux.UIDMappings.ContainerID", "Linux.GIDMappings.ContainerID", "Linux.Namespaces.Path",
        "Linux.Resources.Devices.Allow", "Linux.Resources.Devices.Type", "Linux.Resources.Pids.Limit",
        "Linux.Resources.BlockIO.WeightDevice.Minor", "Linux.Seccomp.Syscalls.Args.Index",
        "Process.Capabilities.Inheritable"}


def test_values():
    spec = oci.to_proto(SPEC)
    process = spec.Process
    assert (process.User.UID, process.User.GID, list(process.User.AdditionalGids)) == (1000, 100, [4, 24])
    assert list(process.Args) == ["sh", "-c", "exit 7"] and process.Env[1] == "E=\u00e4"
    assert process.Rlimits[0].Hard == 2**64 - 1 and process.OOMScoreAdj == -500
    assert (process.ConsoleSize.Height, process.ConsoleSize.Width) == (24, 80)
    assert spec.Annotations["a.b/c"] == "d" and spec.Linux.Sysctl["net.core.somaxconn"] == "256"
    assert spec.Hooks.CreateRuntime[0].Timeout == 3
    resources = spec.Linux.Resources
    assert (resources.Memory.Swap, resources.CPU.Quota) == (-1, -1)
    assert resources.BlockIO.ThrottleWriteIOPSDevice[0].Rate == 14
    assert spec.Linux.Seccomp.Syscalls[0].Args[0].Value == 2**64 - 1


def test_strings_have_the_forms_of_the_go_runtime():
    spec = oci.to_proto(SPEC)
    assert [(ns.Type, ns.Path) for ns in spec.Linux.Namespaces] == [
        ("pid", ""), ("mount", ""), ("network", "/run/netns/x"), ("future", "")]
    capabilities = spec.Process.Capabilities
    assert list(capabilities.Effective) == ["CAP_KILL"] and list(capabilities.Bounding) == ["CAP_CHOWN"]


def test_unknown_words_go_through():
    spec = oci.to_proto(SPEC)
    assert list(spec.Process.Capabilities.Permitted) == ["CAP_FUTURE"]
    assert spec.Linux.Seccomp.Syscalls[1].Action == "SCMP_ACT_FUTURE"


def test_zero_and_absent():
    syscalls = oci.to_proto(SPEC).Linux.Seccomp.Syscalls
    assert syscalls[0].HasField("errnoret") and not syscalls[1].HasField("errnoret")
    empty = oci.resources_to_proto({})
    assert not any(empty.HasField(name) for name in ("Memory", "CPU", "Pids", "BlockIO", "Network"))
    assert oci.resources_to_proto({"pids": {"limit": 0}}).HasField("Pids")
    assert oci.resources_to_proto({"memory": {}}).HasField("Memory")
    assert not oci.resources_to_proto({"memory": None}).HasField("Memory")


def test_a_device_rule_without_numbers_means_every_device():
    rules = oci.to_proto(SPEC).Linux.Resources.Devices
    assert [(rule.Major, rule.Minor) for rule in rules] == [(-1, -1), (1, 0)]
    [rule] = oci.resources_to_proto({"devices": [{"allow": True, "major": None}]}).Devices
    assert (rule.Major, rule.Minor) == (-1, -1)


def test_what_the_wire_cannot_carry_is_named():
    lost = []
    oci.to_proto({"process": {"user": {"umask": 18}, "ioPriority": {}},
                  "mounts": [{"destination": "/a"}, {"destination": "/b", "uidMappings": []}],
                  "linux": {"personality": {},
                            "resources": {"unified": {}, "cpu": {"burst": 1, "idle": None}}}}, lost)
    assert lost == ["process.user.umask", "process.ioPriority", "mounts[1].uidMappings", "linux.personality",
                    "linux.resources.unified", "linux.resources.cpu.burst"]


@pytest.mark.parametrize(("spec", "text"), [
    ([], "the specification should be an object, not []"),
    ({"process": {"user": {"uid": -1}}}, "process.user.uid is -1, which is out of range"),
    ({"process": {"user": {"additionalGids": [1, 1 << 32]}}},
     "process.user.additionalGids[1] is 4294967296, which is out of range"),
    ({"process": {"rlimits": [{}, {"hard": 1 << 64}]}},
     "process.rlimits[1].hard is 18446744073709551616, which is out of range"),
    ({"process": {"user": {"uid": 1.5}}}, "process.user.uid should be a number, not 1.5"),
    ({"process": {"user": {"uid": True}}}, "process.user.uid should be a number, not True"),
    ({"process": {"terminal": 1}}, "process.terminal should be true or false, not 1"),
    ({"process": {"args": "sh"}}, "process.args should be a list, not 'sh'"),
    ({"process": {"args": ["sh", 3]}}, "process.args[1] should be a string, not 3"),
    ({"process": {"env": ["A=\ud800"]}}, "process.env[0] is not valid Unicode: 'A=\\ud800'"),
    ({"process": {"capabilities": {"bounding": [None]}}},
     "process.capabilities.bounding[0] should be a string, not None"),
    ({"process": []}, "process should be an object, not []"),
    ({"mounts": {}}, "mounts should be a list, not {}"),
    ({"mounts": ["x"]}, "mounts[0] should be an object, not 'x'"),
    ({"annotations": {"a": 1}}, "annotations.a should be a string, not 1"),
    ({"annotations": ["a"]}, "annotations should be an object, not ['a']"),
    ({"annotations": {"\ud800": "a"}}, "annotations is not valid Unicode: '\\ud800'"),
    ({"linux": {"resources": {"memory": {"limit": 1 << 63}}}},
     "linux.resources.memory.limit is 9223372036854775808, which is out of range"),
    ({"hostname": 3}, "hostname should be a string, not 3")])
def test_bad_values_name_their_path(spec, text):
    with pytest.raises(InvalidArgument) as raised:
        oci.to_proto(spec)
    assert raised.value.message == text


def test_parts_begin_their_paths_at_themselves():
    with pytest.raises(InvalidArgument, match=r"^user\.uid is -1"):
        oci.process_to_proto({"user": {"uid": -1}})
    with pytest.raises(InvalidArgument, match=r"^cpu\.shares is -1"):
        oci.resources_to_proto({"cpu": {"shares": -1}})


def test_the_tables_fit_the_messages():
    """A field that is misspelt in a table would only be found by the one who uses it."""
    assert oci.process_to_proto(SPEC["process"]) == oci.to_proto(SPEC).Process
    assert oci.resources_to_proto(SPEC["linux"]["resources"]) == oci.to_proto(SPEC).Linux.Resources


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2**65, 2**65) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["process", "linux", "user", "uid", "args", "resources", "devices", "memory", "limit",
                         "major", "namespaces", "type", "mounts", "annotations", "hooks", "prestart"]),
        inner, max_size=4),
    max_leaves=20)


@given(json_values)
def test_any_json_is_converted_or_refused(value):
    try:
        oci.to_proto(value).SerializeToString()
    except InvalidArgument:
        pass
