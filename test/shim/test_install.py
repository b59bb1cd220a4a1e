"""katashim.shim.install, and the programs in bin/ and as installed."""

import os
import subprocess
import sys

import pytest

from katashim.shim import install

from .conftest import ROOT


def test_an_installed_program_runs_with_the_interpreter_and_the_package_it_was_given(tmp_path):
    for path in install.install(str(tmp_path), sys.executable, ROOT):
        assert os.stat(path).st_mode & 0o777 == 0o755
        with open(path) as file:
            assert "@" not in file.read().split("exec")[0].replace('"$@"', "").split("python=")[1].split("\n")[0]
    shim = subprocess.run([tmp_path / "containerd-shim-katashim-v2", "-v"], capture_output=True, check=True)
    assert shim.stdout.decode().rstrip().endswith(f"{sys.executable})")
    ctl = subprocess.run([tmp_path / "katashim-ctl", "version"], capture_output=True, check=False, text=True)
    assert ctl.returncode == 0 and "katashim" in ctl.stdout, ctl.stderr


def test_a_copy_in_use_is_replaced_not_overwritten(tmp_path):
    path = install.install(str(tmp_path), "/usr/bin/python3", "/opt/a")[0]
    with open(path) as old:
        install.install(str(tmp_path), "/usr/bin/python3", "/opt/b")
        assert "/opt/a" in old.read()
    with open(path) as new:
        assert "/opt/b" in new.read()


@pytest.mark.parametrize("python, root", [("/opt/it's", "/opt"), ("/opt", '/opt/"x"')])
def test_paths_that_cannot_be_written_into_a_program_are_refused(python, root):
    with pytest.raises(ValueError, match="quotes"):
        install.program_text("katashim-ctl", python, root)


def test_the_command_line(tmp_path, capsys):
    install.main(["--destdir", str(tmp_path), "--prefix", "/opt/k", "--root", str(tmp_path / "elsewhere")])
    printed = capsys.readouterr().out.split()
    assert printed == [f"{tmp_path}/opt/k/bin/{name}" for name in install.PROGRAMS]
    with open(printed[0]) as file:
        assert f'root = "{tmp_path}/elsewhere"' in file.read()


@pytest.mark.parametrize("name", install.PROGRAMS)
def test_to_python_the_part_for_sh_is_a_string(name):
    with open(os.path.join(ROOT, "bin", name)) as file:
        compile(file.read(), name, "exec")
