"""What katashim-ctl prints: text for people, JSON for programs, colour only on a terminal."""

import argparse
import json
import os
import sys

_COLOURS = {"red": 31, "green": 32, "yellow": 33, "bold": 1, "dim": 2}


def add_json(parser):
    """The option that every command has; it may stand before or after any subcommand."""
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS,
                        help="print JSON instead of text")


def emit(args, data, text):
    """Print the result of a command.

    :param data: plain data for ``--json``.
    :param text: for people.
    """
    print(json.dumps(data, indent=2) if args.json else text)


def failure(args, error):
    """Tell a KatashimError in one line on stderr; returns the exit status 1."""
    lines = error.message.splitlines()
    more = f" (and {len(lines) - 1} more lines, see --json)" if len(lines) > 1 else ""
    print(f"katashim-ctl: {paint(lines[0], 'red', sys.stderr)}{more}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": error.message, "code": error.code}, indent=2))
    return 1


def paint(text, colour, stream=None):
    """`text` in a colour when `stream` (stdout by default) is a terminal and NO_COLOR is not set."""
    stream = stream or sys.stdout
    if not stream.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{_COLOURS[colour]}m{text}\033[0m"


def columns(rows):
    """Rows of cells as lines with aligned columns; the last cell is not padded."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([cell.ljust(width) for cell, width in zip(row, widths, strict=True)][:-1]
                               + [row[-1]]).rstrip() for row in rows)
