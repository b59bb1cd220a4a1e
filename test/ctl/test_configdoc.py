import os

import pytest

import katashim
from katashim.config import load
from katashim.config.table import SECTIONS, keys
from katashim.ctl import configdoc

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(katashim.__file__)))


@pytest.mark.parametrize("path", configdoc.generated(ROOT))
def test_generated_files_are_current(path):
    """If this fails: python -m katashim.ctl.configdoc, and commit what it wrote."""
    with open(path, encoding="utf-8") as file:
        assert file.read() == configdoc.generated(ROOT)[path]


def test_the_document_has_every_setting():
    tables = configdoc.tables()
    assert all(f"| `{key.name}` |" in tables for key in keys())


def test_the_conf_file_shows_what_works_with_the_driver():
    text = configdoc.conf("qemu").partition("\n[agent]")[0]
    for key in SECTIONS["hypervisor"].values():
        shown = f"\n{key.name} = " in text or f"\n#{key.name} = " in text
        if not key.done or not key.used_by("qemu"):
            assert not shown, key.name
        elif not key.name.startswith("valid_"):
            assert shown, key.name


def test_the_conf_file_with_all_its_comments_made_settings_is_valid(tmp_path):
    """Each `#name = default` is a line that may be used as it stands."""
    text = "\n".join(line[1:] if line[:1] == "#" and " = " in line and line[1:2].isalpha() else line
                     for line in configdoc.conf("qemu").split("\n"))
    path = tmp_path / "all.conf"
    path.write_text(text)
    changed, plain = load(str(path), env={}), load(env={})
    assert changed.hypervisor == plain.hypervisor and changed.agent == plain.agent
    assert changed.runtime == plain.runtime


@pytest.mark.parametrize(("value", "text"), [
    ("plain", "plain"), ("", '""'), ("a, b", '"a, b"'), ("a # b", '"a # b"'), ('say "x"', "'say \"x\"'"),
    (" x ", '" x "')])
def test_quoting(value, text):
    assert configdoc.value_text(SECTIONS["hypervisor"]["kernel_params"], value) == text
