import os
import subprocess
import sys

import pytest

from katashim.agent.types import FSGroup, IPAddress, Route, Storage
from katashim.errors import InvalidArgument
from katashim.ttrpc import proto
from katashim.ttrpc.proto import compile as proto_compile


def test_the_committed_descriptors_are_those_of_the_proto_files():
    pytest.importorskip("grpc_tools")
    with open(proto_compile.BLOB, "rb") as blob:
        assert blob.read() == proto_compile.compile_protos(), "run `make proto`"


def test_services_have_the_methods_of_the_protocol():
    assert len(proto.service("grpc.AgentService")) == 42
    assert set(proto.service("grpc.Health")) == {"Check", "Version"}
    assert len(proto.service("containerd.task.v2.Task")) == 17
    assert len(proto.service("containerd.runtime.sandbox.v1.Sandbox")) == 9
    assert proto.service("containerd.services.events.ttrpc.v1.Events")["Forward"] == proto.Method(
        "Forward", proto.get("containerd.services.events.ttrpc.v1.ForwardRequest"),
        proto.get("google.protobuf.Empty"), False, False)


def numbers(cls):
    return [(field.name, field.number, field.type) for field in cls.DESCRIPTOR.fields]


def test_task_v3_is_task_v2_under_another_name():
    v2, v3 = proto.service("containerd.task.v2.Task"), proto.service("containerd.task.v3.Task")
    assert list(v2) == list(v3)
    for method in v2:
        assert numbers(v2[method].request) == numbers(v3[method].request)
        assert numbers(v2[method].response) == numbers(v3[method].response)
    assert v3["State"].request.DESCRIPTOR.full_name == "containerd.task.v3.StateRequest"


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError):
        proto.get("grpc.NoSuchThing")
    with pytest.raises(KeyError):
        proto.service("grpc.NoSuchService")


@pytest.mark.parametrize(("name", "fields", "wire"), [
    # Numbers that are easily got wrong, as bytes.
    ("grpc.ReseedRandomDevRequest", {"data": b"x"}, b"\x12\x01x"),
    ("grpc.FSGroup", {"group_id": 5}, b"\x10\x05"),
    ("grpc.CreateContainerRequest", {"OCI": {}}, b"\x32\x00"),
    ("grpc.MemHotplugByProbeRequest", {"memHotplugProbeAddr": [1, 2]}, b"\x0a\x02\x01\x02"),
    ("io.containerd.cgroups.v2.Metrics", {"memory": {"anon": 1}}, b"\x22\x02\x08\x01"),
    ("containerd.task.v2.StateResponse", {"exec_id": "e"}, b"\x5a\x01e"),
    ("containerd.events.TaskExit", {"exit_status": 7}, b"\x20\x07"),
    ("runtimeoptions.v1.Options", {"config_path": "/c"}, b"\x12\x02/c"),
])
def test_field_numbers(name, fields, wire):
    assert proto.build(proto.get(name), **fields).SerializeToString() == wire


def test_build_takes_dicts_records_lists_and_none():
    message = proto.build(
        proto.get("grpc.CreateContainerRequest"), container_id="c", exec_id=None, OCI=None,
        string_user={"uid": "1", "additionalGids": ("2", "3")},
        storages=(Storage("blk", "/dev/vda", "ext4", options=("ro",), fs_group=FSGroup(3)),
                  proto.get("grpc.Storage")(driver="local")))
    assert message.container_id == "c" and not message.exec_id and not message.HasField("OCI")
    assert list(message.string_user.additionalGids) == ["2", "3"]
    assert message.storages[0].fs_group.group_id == 3 and list(message.storages[0].options) == ["ro"]
    assert not message.storages[1].HasField("fs_group") and message.storages[1].driver == "local"


def test_build_reaches_into_nested_records_and_maps():
    neighbor = {"toIPAddress": IPAddress(1, "fe80::1", "64"), "lladdr": "aa:bb"}
    assert proto.build(proto.get("types.ARPNeighbor"), **neighbor).toIPAddress.family == 1
    routes = proto.build(proto.get("grpc.UpdateRoutesRequest"),
                         routes={"Routes": [Route(gateway="10.0.0.1")]})
    assert routes.routes.Routes[0].gateway == "10.0.0.1"
    stats = proto.build(proto.get("grpc.CgroupStats"), hugetlb_stats={"2MB": {"usage": 3}},
                        memory_stats={"stats": {"rss": 4}})
    assert stats.hugetlb_stats["2MB"].usage == 3 and stats.memory_stats.stats["rss"] == 4


def test_a_record_of_defaults_is_present():
    assert proto.build(proto.get("grpc.ExecProcessRequest"), process={}).HasField("process")
    assert proto.build(proto.get("grpc.MemAgentMemcgConfig"), disabled=False).HasField("disabled")


def test_build_refuses_what_the_message_does_not_have():
    with pytest.raises(ValueError, match="grpc.StartContainerRequest has no field 'nonsense'"):
        proto.build(proto.get("grpc.StartContainerRequest"), nonsense=1)
    with pytest.raises(TypeError, match="cannot be made of 3"):
        proto.build(proto.get("grpc.CreateContainerRequest"), OCI=3)


def test_any_carries_the_bare_name():
    exit_event = proto.get("containerd.events.TaskExit")(container_id="c", exit_status=7)
    packed = proto.pack_any(exit_event)
    assert packed.type_url == "containerd.events.TaskExit"
    assert proto.unpack_any(packed) == exit_event
    packed.type_url = "type.googleapis.com/containerd.events.TaskExit"
    assert proto.unpack_any(packed) == exit_event


def test_any_of_an_unknown_type_or_with_a_bad_body():
    any_class = proto.get("google.protobuf.Any")
    with pytest.raises(InvalidArgument, match="unknown type 'my.Thing'"):
        proto.unpack_any(any_class(type_url="my.Thing"))
    with pytest.raises(InvalidArgument, match=r"no containerd\.events\.TaskExit"):
        proto.unpack_any(any_class(type_url="containerd.events.TaskExit", value=b"\xff"))


def test_timestamps_keep_every_nanosecond():
    stamp = proto.timestamp(1_700_000_000_123_456_789)
    assert (stamp.seconds, stamp.nanos) == (1_700_000_000, 123_456_789)
    assert proto.time_ns(stamp) == 1_700_000_000_123_456_789
    assert proto.timestamp(-1).nanos == 999_999_999


BUILD_IN_A_PROCESS = """
from katashim.agent.types import Storage
from katashim.ttrpc import proto
request = proto.build(proto.get("grpc.CreateContainerRequest"), storages=[Storage("blk", "s", "e")], OCI={})
stats = proto.build(proto.get("grpc.CgroupStats"), hugetlb_stats={"2MB": {"usage": 3}})
print(request.SerializeToString().hex(), stats.SerializeToString().hex())
"""


def test_the_pure_python_protobuf_will_do():
    """build() looks into protobuf's containers, so it is tried with another implementation of them."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    outputs = [subprocess.run(
        [sys.executable, "-c", BUILD_IN_A_PROCESS], check=True, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": kind, "PYTHONPATH": root}).stdout
        for kind in ("python", "upb")]
    assert outputs[0] == outputs[1] and len(outputs[0].split()) == 2
