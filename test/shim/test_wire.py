"""katashim.shim.wire against the real protobuf library."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katashim.errors import InvalidArgument
from katashim.shim import wire
from katashim.ttrpc import proto

Params = proto.get("containerd.runtime.bootstrap.v1.BootstrapParams")
Delete = proto.get("containerd.task.v2.DeleteResponse")


@given(st.text(), st.integers(-8, 12), st.binary())
def test_reads_what_protobuf_writes(text, level, body):
    message = Params(instance_id=text, log_level=level, socket_dir="/x")
    message.extensions.add().value.value = body
    fields = wire.read_fields(message.SerializeToString())
    assert [value for number, value in fields if number == 1] == ([text.encode()] if text else [])
    assert [value for number, value in fields if number == 3] == ([level % (1 << 64)] if level else [])
    assert dict(fields)[9] == b"/x"


@given(st.integers(0, 2**32 - 1), st.integers(1, 2**62))
def test_writes_what_protobuf_reads(status, time_ns):
    data = wire.integer(2, status) + wire.timestamp(3, time_ns)
    message = Delete.FromString(data)
    assert message.exit_status == status
    assert proto.time_ns(message.exited_at) == time_ns
    assert message.HasField("exited_at")


def test_fixed_width_fields_are_passed_over():
    data = b"\x09" + bytes(8) + b"\x15" + bytes(4) + b"\x1a\x02hi"
    assert wire.read_fields(data) == [(1, bytes(8)), (2, bytes(4)), (3, b"hi")]


@given(st.binary(max_size=64))
def test_any_bytes_are_fields_or_an_error(data):
    try:
        wire.read_fields(data)
    except InvalidArgument:
        pass


@pytest.mark.parametrize("data", [b"\x0a", b"\x0a\x05hi", b"\x08", b"\x08" + b"\xff" * 11, b"\x02\x00",
                                  b"\x0b", b"\x0d\x00", b"unix:///run/containerd/s/0123"])
def test_broken_messages_are_refused(data):
    with pytest.raises(InvalidArgument):
        wire.read_fields(data)
