"""katashim.shim.bootstrap: stdin of start, and the three forms of its answer."""

import json
import os
import threading
import time

import pytest

from katashim.shim import bootstrap
from katashim.shim.flags import parse
from katashim.ttrpc import proto

Params = proto.get("containerd.runtime.bootstrap.v1.BootstrapParams")
Result = proto.get("containerd.runtime.bootstrap.v1.BootstrapResult")
Any = proto.get("google.protobuf.Any")
ADDRESS = "unix:///run/containerd/s/" + "0" * 64


def params(**fields):
    fields = {"instance_id": "c1", "namespace": "k8s.io", "containerd_version": "v2.3.0", **fields}
    return Params(**fields).SerializeToString()


def flags(*words):
    return parse(["-id", "c1", "-namespace", "k8s.io", *words])


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:
            pass


def test_stdin_is_read_to_its_end(pipe):
    reader, writer = pipe

    def write():
        os.write(writer, b"one ")
        os.write(writer, b"two")
        os.close(writer)
    thread = threading.Thread(target=write)
    thread.start()
    assert bootstrap.read_stdin(5, reader) == b"one two"
    thread.join()


def test_a_silent_stdin_is_given_up_after_the_bound(pipe):
    started = time.monotonic()
    assert bootstrap.read_stdin(0.05, pipe[0]) == b""
    assert 0.04 < time.monotonic() - started < 2


def test_half_a_message_is_none(pipe):
    os.write(pipe[1], params())
    assert bootstrap.read_stdin(0.05, pipe[0]) == b""


def test_dev_null_and_a_closed_stdin_are_empty():
    with open("/dev/null", "rb") as null:
        assert bootstrap.read_stdin(5, null.fileno()) == b""
    assert bootstrap.read_stdin(5, 9999) == b""


def test_a_terminal_is_not_read():
    master, slave = os.openpty()
    try:
        started = time.monotonic()
        assert bootstrap.read_stdin(5, slave) == b""
        assert time.monotonic() - started < 1
    finally:
        os.close(master)
        os.close(slave)


def test_all_parameters_are_read():
    found = bootstrap.decode(params(
        log_level="LOG_LEVEL_DEBUG", containerd_ttrpc_address="/t", containerd_grpc_address="/g",
        containerd_binary="/b", socket_dir="/run/s"), flags())
    assert (found.instance_id, found.namespace, found.containerd_version) == ("c1", "k8s.io", "v2.3.0")
    assert (found.ttrpc_address, found.grpc_address, found.binary) == ("/t", "/g", "/b")
    assert found.socket_dir == "/run/s" and found.debug


@pytest.mark.parametrize("level, debug", [("LOG_LEVEL_INFO", False), ("LOG_LEVEL_TRACE", True),
                                          ("LOG_LEVEL_ERROR", False)])
def test_levels_below_info_are_debug(level, debug):
    assert bootstrap.decode(params(log_level=level), flags()).debug is debug


def test_parameters_complete_the_command_line_but_do_not_overrule_it():
    line = parse(["-id", "c1", "-address", "/mine"])
    found = bootstrap.decode(params(containerd_grpc_address="/theirs", containerd_binary="/b"), line)
    bootstrap.complete(line, found)
    assert (line.id, line.namespace, line.address, line.publish_binary) == ("c1", "k8s.io", "/mine", "/b")


@pytest.mark.parametrize("data", [
    b"", b"\xff\xff", b"not protobuf at all",
    params(instance_id="another"), params(namespace="another"), params(instance_id=""),
    Any(type_url="runtimeoptions.v1.Options", value=b"\x12\x04/a/b").SerializeToString(),
    Any(type_url="c1", value=b"\xff").SerializeToString(),
])
def test_other_bytes_are_no_parameters(data):
    assert bootstrap.decode(data, flags()) is None


@pytest.mark.parametrize("version", ["v2.3.0", "2.3.1", "v2.4.0-beta.0", "v3.0.0", "2.3-rc.1", "v2.3+dirty"])
def test_containerd_since_2_3_gets_a_protobuf_result(version):
    found = bootstrap.decode(params(containerd_version=version), flags())
    result = Result.FromString(bootstrap.answer(ADDRESS, found, "2"))
    assert (result.version, result.address, result.protocol) == (3, ADDRESS, "ttrpc")


@pytest.mark.parametrize("version", ["v2.2.9", "1.7.28", "", "unknown", "v2", "v.3", "2.x"])
def test_other_versions_get_the_plain_address(version):
    found = bootstrap.decode(params(containerd_version=version), flags())
    assert bootstrap.answer(ADDRESS, found, "2") == ADDRESS.encode()


@pytest.mark.parametrize("maximum, form", [("", "plain"), ("2", "plain"), ("x", "plain"), ("3", "json"),
                                           ("4", "json")])
def test_json_is_for_those_who_ask_for_version_3(maximum, form):
    answer = bootstrap.answer(ADDRESS, None, maximum)
    if form == "plain":
        assert answer == ADDRESS.encode()
    else:
        assert json.loads(answer) == {"version": 3, "address": ADDRESS, "protocol": "ttrpc"}
