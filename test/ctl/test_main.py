import importlib
import json
import subprocess
import sys

import pytest

from katashim.ctl.main import COMMANDS, build_parser, main


def run(*argv, **more):
    return subprocess.run([sys.executable, "-m", "katashim.ctl.main", *argv], capture_output=True, text=True,
                          timeout=30, check=False, **more)


def test_help_lists_every_command_with_examples(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0 and "exit status:" in out
    for command in COMMANDS:
        assert command.help in out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_has_help_with_its_examples(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command.name, "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0 and "--json" in out
    assert all(line in out for line, _ in command.examples)


def test_the_examples_parse():
    """Every command line that --help shows is one that the parser accepts."""
    parser = build_parser()
    for command in COMMANDS:
        for line, _ in command.examples:
            assert parser.parse_args(line.split()).command == command.name


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_keeps_the_frames_protocol(command):
    module = importlib.import_module(command.module)
    assert callable(module.add_arguments) and callable(module.main)


@pytest.mark.parametrize("argv", [
    [], ["nonsense"], ["config"], ["config", "explain"], ["version", "--wrong"]])
def test_wrong_usage_is_exit_status_2(argv, capsys):
    with pytest.raises(SystemExit) as done:
        main(argv)
    assert done.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--json", "version"], ["version", "--json"]])
def test_json_may_stand_anywhere(argv, capsys):
    assert main(argv) == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"katashim", "python", "gevent"}


def test_version_for_people(capsys):
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("katashim")


def test_an_error_is_one_line_on_stderr(capsys):
    assert main(["config", "show", "--config", "/no/such.toml"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err == "katashim-ctl: the configuration file /no/such.toml does not exist\n"


def test_an_error_with_json(capsys):
    assert main(["config", "show", "--config", "/no/such.toml", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "the configuration file /no/such.toml does not exist", "code": 5}
    assert err.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error():
    tool = subprocess.Popen([sys.executable, "-m", "katashim.ctl.main", "config", "show", "--all"],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    tool.stdout.close()
    _, err = tool.communicate(timeout=30)
    assert (tool.returncode, err) == (128 + 13, "")


def test_no_colour_in_a_pipe():
    done = run("config", "show")
    assert done.returncode == 0 and "\033[" not in done.stdout


def test_the_tool_loads_only_the_commands_own_module():
    program = ("import sys; from katashim.ctl.main import main; main(['version']); print([name for name in "
               "sys.modules if name.startswith(('gevent', 'katashim.guest', 'configobj'))])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          timeout=30)
    assert done.stdout.splitlines()[-1] == "[]"
