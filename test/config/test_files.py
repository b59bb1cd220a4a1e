import os

import pytest

from katashim.config import InvalidConfig, files
from katashim.errors import ConfigError, NotFound


def test_search_order(disk):
    last = files.find_base(None, {})
    assert last == os.path.realpath(files.packaged("qemu.conf"))
    toml = disk.write("etc/configuration.toml", "")
    assert files.find_base(None, {}) == toml
    conf = disk.write("etc/configuration.conf", "")
    assert files.find_base(None, {}) == conf
    named = disk.write("options.toml", "")
    assert files.find_base(named, {}) == named
    from_env = disk.write("env.toml", "")
    assert files.find_base(named, {"KATA_CONF_FILE": from_env}) == from_env


def test_the_shipped_search_path():
    assert [path for path in files.SEARCH_PATH if path.startswith("/etc/")] == [
        "/etc/kata-containers/katashim/configuration.conf",
        "/etc/kata-containers/katashim/configuration.toml",
        "/etc/kata-containers/runtime-rs/configuration.toml",
        "/etc/kata-containers/configuration.toml"]


def test_named_files_must_exist_and_be_absolute(disk):
    with pytest.raises(NotFound, match="/no/such.toml does not exist"):
        files.find_base("/no/such.toml", {})
    with pytest.raises(NotFound, match="/no/such.toml, which KATA_CONF_FILE names, does not exist"):
        files.find_base(None, {"KATA_CONF_FILE": "/no/such.toml"})
    with pytest.raises(ConfigError, match="must be an absolute path"):
        files.find_base("such.toml", {})


def test_the_environments_file_must_be_roots(disk):
    path = disk.write("env.toml", "")
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        files.find_base(None, {"KATA_CONF_FILE": path})
    os.chown(path, 0, -1)
    os.chmod(path, 0o666)
    with pytest.raises(ConfigError, match="others than its owner can write"):
        files.find_base(None, {"KATA_CONF_FILE": path})


def test_drop_ins_are_beside_the_canonical_file(disk):
    real = disk.write("real/base.toml", "")
    for name in ("20-b.toml", "10-a.conf", "README.md", ".hidden.toml", "30.toml~"):
        disk.write(f"real/config.d/{name}", "")
    os.symlink(real, f"{disk.directory}/link.toml")
    base = files.find_base(f"{disk.directory}/link.toml", {})
    taken, passed_over = files.drop_ins(base)
    assert [os.path.basename(path) for path in taken] == ["10-a.conf", "20-b.toml"]
    assert len(passed_over) == 3 and any("README.md is not read" in text for text in passed_over)


def test_no_drop_ins(disk):
    assert files.drop_ins(disk.write("base.toml", "")) == ([], [])


def test_drop_ins_of_the_packaged_defaults_are_in_etc(disk):
    drop_in = disk.write("etc/config.d/a.conf", "")
    assert files.drop_ins(files.find_base(None, {})) == ([drop_in], [])


def test_where(disk):
    file = files.read(disk.write("a.toml", "[hypervisor.qemu]\nkernel = '/k'\nx = {y = 1}\n"))
    assert file.where("hypervisor", "qemu", "kernel") == f"{file.path}:2"
    assert file.where("hypervisor", "qemu", "x", "y") == f"{file.path}:3"
    assert file.where("agent", "kata") == file.path


@pytest.mark.parametrize(("name", "text", "problem"), [
    ("a.toml", "[runtime]\nname = \n", ":2: Invalid value"),
    ("a.toml", "[runtime]\nname = 'a'\nname = 'b'\n", ":3: Cannot overwrite a value"),
    ("a.conf", "[runtime]\n\nnonsense\n", ":3: Invalid line"),
    ("a.conf", "[runtime]\nname = a\nname = b\n", ":3: Duplicate keyword name: name = b"),
    ("a.conf", "[runtime]\n[[[deep]]]\n", ":2: Section too nested"),
])
def test_syntax_errors_name_the_line(disk, name, text, problem):
    path = disk.write(name, text)
    with pytest.raises(InvalidConfig) as caught:
        files.read(path)
    assert caught.value.problems[0].startswith(path + problem)


def test_all_syntax_errors_of_a_conf_are_told(disk):
    with pytest.raises(InvalidConfig) as caught:
        files.read(disk.write("a.conf", "one\n[runtime]\ntwo\n"))
    assert [problem.split(":")[1] for problem in caught.value.problems] == ["1", "3"]


def test_unreadable_files(disk):
    with pytest.raises(ConfigError, match=r"must end in .conf or .toml"):
        files.read(disk.write("a.yaml", ""))
    path = disk.write("a.toml", "")
    with open(path, "wb") as file:
        file.write(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read the configuration file"):
        files.read(path)
    with pytest.raises(ConfigError, match="cannot read the configuration file"):
        files.read(disk.directory + "/absent.toml")
