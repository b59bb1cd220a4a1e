"""katashim.shim.pod: which sandbox a container belongs to."""

import json

import pytest

from katashim.errors import InvalidArgument
from katashim.shim import pod

CRI, CRIO, DOCKER = "io.kubernetes.cri.", "io.kubernetes.cri-o.", "io.kubernetes."


@pytest.fixture
def bundle(tmp_path):
    def make(text):
        (tmp_path / "config.json").write_text(text)
        return str(tmp_path)
    return make


@pytest.mark.parametrize("marks", [
    {},
    {CRI + "container-type": "sandbox", CRI + "sandbox-id": "other"},
    {CRIO + "ContainerType": "sandbox"},
    {DOCKER + "docker.type": "podsandbox"},
    {DOCKER + "docker.type": "pod_sandbox"},
    {CRI + "container-type": "single_container", CRI + "sandbox-id": "other"},
    {CRI + "container-type": "something new"},
    {CRI + "sandbox-id": "other"},
])
def test_a_sandbox_or_a_single_container_is_its_own(marks):
    assert pod.sandbox_of("c1", marks) == "c1"


@pytest.mark.parametrize("marks", [
    {CRI + "container-type": "container", CRI + "sandbox-id": "s1"},
    {CRIO + "ContainerType": "container", CRIO + "SandboxID": "s1"},
    {DOCKER + "docker.type": "container", DOCKER + "sandbox.id": "s1"},
    {CRI + "container-type": "pod_container", CRI + "sandbox-id": "s1"},
    # CRI-O's keys first, whatever else stands there.
    {CRIO + "ContainerType": "container", CRIO + "SandboxID": "s1", CRI + "container-type": "sandbox",
     CRI + "sandbox-id": "other"},
    # A value that nobody knows does not hide a later key.
    {CRIO + "ContainerType": "weird", CRI + "container-type": "container", CRI + "sandbox-id": "s1"},
])
def test_a_pods_container_belongs_to_its_sandbox(marks):
    assert pod.sandbox_of("c1", marks) == "s1"


def test_a_pods_container_without_a_sandbox_is_an_error():
    with pytest.raises(InvalidArgument, match="none of .*sandbox-id.* names the sandbox"):
        pod.sandbox_of("c1", {CRI + "container-type": "container"})


@pytest.mark.parametrize("sandbox_id", ["../../etc", "a/b", "x", "x" * 100])
def test_a_sandbox_id_that_could_leave_its_directory_is_an_error(sandbox_id):
    with pytest.raises(InvalidArgument, match="sandbox id"):
        pod.sandbox_of("c1", {CRI + "container-type": "container", CRI + "sandbox-id": sandbox_id})


def test_annotations_are_read_as_json_reads_them(bundle):
    marks = {"a": "\u00e4\n\"\\", "b": "", "c" * 1000: "x" * 100_000}
    spec = {"ociVersion": "1.0.2", "annotations": marks, "linux": {"x": [1, 2.5, None, True, {"y": -1e9}]}}
    assert pod.annotations(bundle("\n " + json.dumps(spec, indent=3) + "\n")) == marks


@pytest.mark.parametrize("text", ['{"ociVersion": "1"}', '{"annotations": null}', '{"annotations": {}}'])
def test_a_spec_without_annotations(bundle, text):
    assert pod.annotations(bundle(text)) == {}


def test_a_bundle_without_a_spec_is_one_of_the_sandbox_api(tmp_path):
    assert pod.annotations(str(tmp_path)) == {}


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"x"', "{} trailing", '{"annotations": []}', "{'a': 1}",
                                  '{"a": 1', "[" * 200_000])
def test_a_broken_spec_is_an_error_that_names_the_file(bundle, text):
    with pytest.raises(InvalidArgument, match="config.json"):
        pod.annotations(bundle(text))


def test_a_spec_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InvalidArgument, match="config.json"):
        pod.annotations(str(tmp_path))


def test_a_spec_that_is_a_directory_is_an_error(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InvalidArgument, match="config.json"):
        pod.annotations(str(tmp_path))
