import json

import configobj
import pytest

from katashim.config import files
from katashim.ctl.main import main

TOML = """[hypervisor.qemu]
path = "{here}/qemu"
kernel = "{here}/kernel"
image = "{here}/image"
default_memory = 512
enable_annotations = ["default_memory"]
[agent.kata]
dial_timeout = 5
[runtime]
"""


@pytest.fixture
def toml(tmp_path, monkeypatch):
    """A valid file whose guest exists. Nothing of the host's /etc is looked at."""
    monkeypatch.setattr(files, "SEARCH_PATH", ())
    monkeypatch.setattr(files, "OUR_DIRECTORY", f"{tmp_path}/etc")
    for name in ("qemu", "kernel", "image"):
        (tmp_path / name).touch()
    path = tmp_path / "a.toml"
    path.write_text(TOML.format(here=tmp_path))
    return path


@pytest.fixture
def ctl(capsys):
    """Runs the tool: (exit status, stdout, stderr)."""
    def run(*argv):
        status = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return status, out, err
    return run


# -- show -----------------------------------------------------------------------------------------
def test_show_is_a_conf_file_with_sources(ctl, toml):
    status, out, _ = ctl("config", "show", "--config", toml)
    assert status == 0 and "default_memory = 512" in out and f"# {toml}:5" in out
    parsed = configobj.ConfigObj(out.split("\n"), interpolation=False)
    assert parsed["hypervisor"]["qemu"]["default_memory"] == "512"
    assert "default_vcpus" not in parsed["hypervisor"]["qemu"], "it is at its default"


def test_show_all(ctl, toml):
    _, out, _ = ctl("config", "show", "--all", "--config", toml)
    parsed = configobj.ConfigObj(out.split("\n"), interpolation=False)
    assert parsed["hypervisor"]["qemu"]["default_vcpus"] == "1"
    assert parsed["agent"]["kata"]["mem_agent"]["memcg_period_secs"] == "600"


def test_what_show_prints_can_be_loaded_again(ctl, toml, tmp_path):
    _, out, _ = ctl("config", "show", "--all", "--config", toml)
    again = tmp_path / "again.conf"
    again.write_text(out)
    first = json.loads(ctl("config", "show", "--json", "--config", toml)[1])
    second = json.loads(ctl("config", "show", "--json", "--config", again)[1])
    assert [first[part] for part in ("hypervisor", "agent", "runtime")] == [
        second[part] for part in ("hypervisor", "agent", "runtime")]


def test_lists_of_tables_survive_too(ctl, toml, tmp_path):
    toml.write_text(toml.read_text() + """
shared_mounts = [{name = "n", src_ctr = "a", src_path = "/s", dst_ctr = "b", dst_path = "/d"}]
[[hypervisor.qemu.guest_extension_images]]
name = "coco"
path = "/c"
verity_params = "a=1,b=2"
""")
    again = tmp_path / "again.conf"
    again.write_text(ctl("config", "show", "--config", toml)[1])
    data = json.loads(ctl("config", "show", "--json", "--config", again)[1])
    assert data["hypervisor"]["guest_extension_images"] == [
        {"name": "coco", "path": "/c", "verity_params": "a=1,b=2"}]
    assert data["runtime"]["shared_mounts"][0]["dst_path"] == "/d"


def test_show_json(ctl, toml):
    status, out, _ = ctl("config", "show", "--json", "--config", toml)
    data = json.loads(out)
    assert status == 0 and data["hypervisor"]["default_memory"] == 512 and data["path"] == str(toml)
    assert data["sources"]["hypervisor.default_memory"] == {"value": 512, "where": f"{toml}:5"}
    assert data["agent"]["mem_agent"]["mem_agent_enable"] is False


@pytest.mark.parametrize("name", [
    "hypervisor.default_memory", "io.katacontainers.config.hypervisor.default_memory"])
def test_show_with_an_annotation(ctl, toml, name):
    _, out, _ = ctl("config", "show", "--json", "--config", toml, "--annotation", f"{name}=1 GiB")
    assert json.loads(out)["hypervisor"]["default_memory"] == 1024


def test_a_malformed_annotation(ctl, toml):
    status, _, err = ctl("config", "show", "--config", toml, "--annotation", "x")
    assert status == 1 and "--annotation wants NAME=VALUE, not x" in err


def test_config_option_beats_the_environment(ctl, toml, tmp_path, monkeypatch):
    monkeypatch.setenv("KATA_CONF_FILE", "/no/such.toml")
    assert ctl("config", "show", "--config", toml)[0] == 0
    status, _, err = ctl("config", "show")
    assert status == 1 and "KATA_CONF_FILE" in err


# -- check ----------------------------------------------------------------------------------------
def test_check_of_a_good_file(ctl, toml):
    status, out, _ = ctl("config", "check", "--config", toml)
    assert (status, out) == (0, f"qemu driver, from {toml}\nthe configuration is valid\n")
    data = json.loads(ctl("config", "check", "--json", "--config", toml)[1])
    assert data == {"valid": True, "problems": [], "warnings": [], "files": [str(toml)]}


def test_check_names_every_problem(ctl, toml):
    toml.write_text(toml.read_text() + "foo = 1\nlog_level = 3\n")
    status, out, _ = ctl("config", "check", "--config", toml)
    assert status == 1 and out.splitlines() == [
        f"problem: {toml}:10: [runtime] has no setting foo",
        f'problem: {toml}:11: runtime.log_level is 3, wants a string']
    data = json.loads(ctl("config", "check", "--json", "--config", toml)[1])
    assert data["valid"] is False and len(data["problems"]) == 2


def test_check_looks_for_the_files(ctl, toml, tmp_path):
    (tmp_path / "kernel").unlink()
    status, out, _ = ctl("config", "check", "--config", toml)
    assert status == 1
    assert f"problem: {toml}:3: hypervisor.kernel names {tmp_path}/kernel, which does not exist" in out


def test_check_tells_warnings_and_passes(ctl, toml):
    toml.write_text(toml.read_text().replace("[agent", "enable_numa = true\n[agent"))
    status, out, _ = ctl("config", "check", "--config", toml)
    assert status == 0 and "warning: katashim does not implement these settings yet" in out


# -- explain --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [
    "default_memory", "hypervisor.default_memory", "hypervisor.qemu.default_memory",
    "io.katacontainers.config.hypervisor.default_memory"])
def test_explain_by_any_name(ctl, toml, name):
    status, out, _ = ctl("config", "explain", name, "--config", toml)
    assert status == 0 and out.startswith("hypervisor.default_memory\n") and f"{toml}:5" in out


def test_explain_what_was_replaced(ctl, toml):
    _, out, _ = ctl("config", "explain", "default_memory", "--json", "--config", toml,
                    "--annotation", "hypervisor.default_memory=1024")
    entry, = json.loads(out)["settings"]
    assert entry["value"] == 1024 and entry["where"].startswith("annotation ")
    assert entry["replaced"] == [{"value": 512, "where": f"{toml}:5"}]
    assert entry["default"] == 128 and entry["implemented"]
    assert entry["annotation"].endswith(".default_memory")


def test_explain_an_old_name(ctl, toml):
    _, out, _ = ctl("config", "explain", "dial_timeout", "--config", toml)
    assert out.startswith("agent.reconnect_timeout_ms") and "formerly" in out and "(as dial_timeout" in out


def test_explain_a_name_of_several_sections(ctl, toml):
    _, out, _ = ctl("config", "explain", "enable_debug", "--json", "--config", toml)
    assert [entry["name"] for entry in json.loads(out)["settings"]] == [
        "hypervisor.enable_debug", "agent.enable_debug", "runtime.enable_debug"]


def test_explain_nested(ctl, toml):
    status, out, _ = ctl("config", "explain", "agent.kata.mem_agent.memcg_swap", "--config", toml)
    assert status == 0 and out.startswith("agent.mem_agent.memcg_swap")


def test_explain_an_unknown_name(ctl, toml):
    status, out, err = ctl("config", "explain", "default_memroy", "--config", toml)
    assert (status, out) == (1, "")
    assert err == "katashim-ctl: there is no setting default_memroy; did you mean default_memory?\n"


def test_explain_with_a_broken_file_still_explains(ctl, toml):
    toml.write_text(toml.read_text() + "foo = 1\n")
    status, out, _ = ctl("config", "explain", "accel", "--config", toml)
    assert status == 1 and "one of auto, kvm, tcg" in out
    assert "No value:" in out and "has no setting foo" in out
