"""The snippets of defaults/ parse, and say what the programs that read them need."""

import json
import os
import re
import tomllib

import pytest

import katashim

DEFAULTS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(katashim.__file__))), "defaults")
RUNTIME_TYPE = "io.containerd.katashim.v2"


def read(name):
    with open(f"{DEFAULTS}/{name}", encoding="utf-8") as file:
        return file.read()


def uncommented(text):
    """The text with the settings below its "# Optional" switched on."""
    required, _, optional = text.partition("# Optional")
    return required + "".join(line[1:] + "\n" for line in optional.splitlines()[1:])


@pytest.mark.parametrize(("name", "version", "plugin"), [
    ("containerd-1.x.toml", 2, "io.containerd.grpc.v1.cri"),
    ("containerd-2.x.toml", 3, "io.containerd.cri.v1.runtime"),
    ("k3s-config.toml.tmpl", None, "io.containerd.grpc.v1.cri"),
    ("k3s-config-v3.toml.tmpl", None, "io.containerd.cri.v1.runtime"),
])
def test_containerd(name, version, plugin):
    text = read(name)
    if name.startswith("k3s"):
        first, text = text.split("\n", 1)
        assert first == '{{ template "base" . }}', "k3s's own configuration comes first"
    config = tomllib.loads(text)
    runtime = config["plugins"][plugin]["containerd"]["runtimes"]["katashim"]
    assert config.get("version") == version
    assert runtime["runtime_type"] == RUNTIME_TYPE and runtime["privileged_without_host_devices"] is True
    assert runtime["pod_annotations"] == runtime["container_annotations"] == ["io.katacontainers.*"]


@pytest.mark.parametrize("name", ["containerd-1.x.toml", "containerd-2.x.toml"])
def test_the_optional_part_of_containerd(name):
    config = tomllib.loads(uncommented(read(name)))
    runtime = next(iter(config["plugins"].values()))["containerd"]["runtimes"]["katashim"]
    assert runtime["options"] == {"TypeUrl": "runtimeoptions.v1.Options",
                                  "ConfigPath": "/etc/kata-containers/katashim/configuration.conf"}


def test_crio():
    runtime = tomllib.loads(read("crio.conf"))["crio"]["runtime"]["runtimes"]["katashim"]
    assert runtime["runtime_type"] == "vm"
    assert os.path.basename(runtime["runtime_path"]) == "containerd-shim-katashim-v2"


def test_docker():
    assert json.loads(read("docker-daemon.json")) == {"runtimes": {"katashim": {"runtimeType": RUNTIME_TYPE}}}


def test_runtime_class():
    assert nested(read("runtimeclass.yaml")) == {
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "katashim"},
        "handler": "katashim", "overhead": {"podFixed": {"memory": "320Mi", "cpu": "250m"}}}


def nested(text):
    """The part of YAML that the RuntimeClass uses: mappings by indentation, scalars plain or quoted."""
    root = {}
    levels = [(-1, root)]
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        entry = re.fullmatch(r"( *)([A-Za-z]+):(?: +(\"[^\"]*\"|[^\s#\"]+))?", line)
        assert entry, f"not a mapping: {line}"
        depth = len(entry[1])
        while levels[-1][0] >= depth:
            levels.pop()
        value = {} if entry[3] is None else entry[3].strip('"')
        levels[-1][1][entry[2]] = value
        if entry[3] is None:
            levels.append((depth, value))
    return root


def test_the_readme_names_every_file():
    text = read("README.md")
    assert all(f"`{name}`" in text for name in os.listdir(DEFAULTS) if name != "README.md")
