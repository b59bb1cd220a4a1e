import json
import os

import pytest

from katashim import oci
from katashim.errors import InvalidArgument, NotFound

SPEC = {
    "process": {"args": ["sh"]}, "root": {"path": "rootfs"},
    "linux": {"namespaces": [{"type": "network", "path": "/run/netns/a"}, {"type": "mount"}]},
}


@pytest.mark.parametrize("annotations, kind, sandbox", [
    (None, "single_container", "c1"),
    ({}, "single_container", "c1"),
    ({"io.kubernetes.cri.container-type": "sandbox"}, "pod_sandbox", "c1"),
    ({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s1"}, "pod_container", "s1"),
    ({"io.kubernetes.cri-o.ContainerType": "sandbox"}, "pod_sandbox", "c1"),
    ({"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "s2"},
     "pod_container", "s2"),
    ({"io.kubernetes.docker.type": "podsandbox"}, "pod_sandbox", "c1"),
    ({"io.kubernetes.docker.type": "container", "io.kubernetes.sandbox.id": "s3"}, "pod_container", "s3"),
    ({"io.kubernetes.cri.container-type": "strange", "io.kubernetes.docker.type": "container",
      "io.kubernetes.sandbox.id": "s4"}, "pod_container", "s4"),
    ({"io.kubernetes.cri.container-type": "single_container", "io.kubernetes.cri.sandbox-id": "s1"},
     "single_container", "c1"),
])
def test_the_marks_of_container_managers(annotations, kind, sandbox):
    spec = {"annotations": annotations}
    assert oci.container_type(spec) == kind
    assert oci.sandbox_id(spec, "c1") == sandbox


def test_a_member_of_no_pod_is_an_error():
    with pytest.raises(InvalidArgument, match="io.kubernetes.cri.sandbox-id"):
        oci.sandbox_id({"annotations": {"io.kubernetes.cri.container-type": "container"}}, "c1")


@pytest.mark.parametrize("text, message", [
    ("", "is not JSON"), ("{", "is not JSON"), ("[]", "is not a JSON object"), ("[" * 5000, "is n"),
    ("{}", "has no 'process'"), ('{"process": [], "root": {}, "linux": {}}', "'process' is not of the kind"),
    ('{"process": {"args": ["a"]}, "linux": {}}', "has no 'root'"),
    ('{"process": {"args": ["a"]}, "root": {}}', "has no 'linux'"),
    ('{"process": {"args": []}, "root": {}, "linux": {}}', "names no program"),
    ('{"process": {"args": [1]}, "root": {}, "linux": {}}', "names no program"),
    ('{"process": {"args": ["a"]}, "root": {}, "linux": {}, "mounts": [{}]}', r"mounts\[0\] has no destination"),
    ('{"process": {"args": ["a"]}, "root": {}, "linux": {}, "mounts": {}}', "'mounts' is not of the kind"),
    ('{"process": {"args": ["a"]}, "root": {}, "linux": {"namespaces": [{}]}}', r"no 'linux.namespaces\[0\].type'"),
    ("\udcff\udcfe", "is not JSON"),
])
def test_a_config_json_that_is_none(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidArgument, match=f"config.json:? .*{message}"):
        oci.load_spec(str(tmp_path))


def test_load_spec(tmp_path):
    with pytest.raises(NotFound, match="no OCI spec at"):
        oci.load_spec(str(tmp_path))
    with pytest.raises(NotFound):
        oci.load_spec(str(tmp_path / "no-bundle"))
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InvalidArgument, match="cannot read .*config.json: Is a directory"):
        oci.load_spec(str(tmp_path))
    os.rmdir(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(SPEC))
    assert oci.load_spec(str(tmp_path)) == SPEC
    assert oci.namespace_path(SPEC, "network") == "/run/netns/a"
    assert oci.namespace_path(SPEC, "mount") == "" and oci.namespace_path(SPEC, "user") is None
