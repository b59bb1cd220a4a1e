"""katashim-ctl: the frame. Finds the command, lets its module add arguments, runs it, tells errors.

A command is a module with two functions, imported only when it is asked for:

    add_arguments(parser)       its options, and its own subcommands if it has any
    main(args) -> exit status   0 done, 1 failed or found something wrong

What a command prints goes through katashim.ctl.output, which knows ``--json`` and colours. Errors are
one line on stderr; with ``--json`` an object with "error" on stdout as well.
"""

import argparse
import importlib
import os
import signal
import sys
from typing import NamedTuple

from katashim.ctl import output
from katashim.errors import KatashimError

PROGRAM = "katashim-ctl"


class Command(NamedTuple):
    """A command of the tool.

    :ivar help: its line in the list of commands.
    :ivar module: where `add_arguments` and `main` are.
    :ivar examples: (command line, what it does) for its --help.
    """

    name: str
    help: str
    module: str
    examples: tuple = ()


COMMANDS = (
    Command("config", "show, check and explain the configuration", "katashim.ctl.config_command", (
        ("config show", "what is set, and where"),
        ("config check --config /etc/kata-containers/configuration.toml", "is this file usable here?"),
        ("config explain default_memory", "what a setting means and why it has its value"),
    )),
    Command("check", "can this host run katashim, and how well?", "katashim.ctl.check_command", (
        ("check", "every requirement with its state"),
        ("check --json", "the same for a program"),
    )),
    Command("guest", "build guest images, and show what they are made of", "katashim.guest.cli", (
        ("guest build", "make the kernel and image that the default configuration names"),
        ("guest show", "what the guest that is there was made of"),
    )),
    Command("version", "print the versions of katashim and what it runs on", "katashim.ctl.version_command", (
        ("version --json", "for a bug report"),
    )),
)


def build_parser(names=None):
    """The argument parser.

    :param names: the commands whose own arguments are wanted; their modules are imported. None: all of
        them, as for completions.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="See and manage katashim, the containerd shim that runs pods in VMs.",
        epilog=_examples([example for command in COMMANDS for example in command.examples[:1]])
        + "\n\nexit status:\n  0  done, all is well\n  1  failed, or something is wrong\n  2  wrong usage",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    output.add_json(parser)
    parser.set_defaults(json=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        described = commands.add_parser(
            command.name, help=command.help, description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=_examples(command.examples), formatter_class=argparse.RawDescriptionHelpFormatter,
            conflict_handler="resolve")
        output.add_json(described)
        if names is None or command.name in names:
            importlib.import_module(command.module).add_arguments(described)
    return parser


def main(argv=None):
    """Run the tool.

    :param argv: the arguments without the program's name; the process's by default.
    :returns: the exit status.
    """
    argv = sys.argv[1:] if argv is None else argv
    by_name = {command.name: command for command in COMMANDS}
    asked = [word for word in argv if word in by_name][:1]
    args = build_parser(names=asked).parse_args(argv)
    try:
        status = importlib.import_module(by_name[args.command].module).main(args)
        sys.stdout.flush()              # so that a closed pipe shows here and not at exit
        return status or 0
    except KatashimError as exc:
        return output.failure(args, exc)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:             # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _examples(examples):
    width = max((len(line) for line, _ in examples), default=0)
    return "examples:\n" + "\n".join(f"  {PROGRAM} {line:{width}}  {what}" for line, what in examples)


if __name__ == "__main__":
    sys.exit(main())
