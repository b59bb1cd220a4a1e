"""Where in a configuration file each setting stands: the line numbers that ConfigObj and tomllib drop.

Both functions read the text once, line by line, and understand only as much of the format as is
needed to tell a key from the inside of a string or an array. They run on files that the real parsers
have accepted already.
"""

import re

_CONF_HEADER = re.compile(r"\s*(\[+)\s*(.*?)\s*\]+\s*(?:#.*)?$")
_CONF_ENTRY = re.compile(r"""\s*("[^"]*"|'[^']*'|[^'"=#\[\s][^=]*?)\s*=\s*(.*)$""")

_TOML_NAME = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_TOML_DOTTED = rf"{_TOML_NAME}(?:\s*\.\s*{_TOML_NAME})*"
_TOML_HEADER = re.compile(rf"\s*(\[\[?)\s*({_TOML_DOTTED})\s*\]")
_TOML_ENTRY = re.compile(rf"\s*({_TOML_DOTTED})\s*=")
_TOML_PART = re.compile(_TOML_NAME)
_TOML_TOKEN = re.compile(r'''"""|\'\'\'|"(?:[^"\\]|\\.)*"|'[^']*'|#.*|[\[\]{}]''')


def conf_lines(text):
    """Line numbers of a ``.conf`` file (ConfigObj's format).

    :returns: {("hypervisor", "qemu", "kernel"): 12, ("hypervisor", "qemu"): 3, ...}, counted from 1.
    """
    found, section, closing = {}, [], None
    for number, line in enumerate(text.split("\n"), 1):
        if closing:                                     # inside a triple-quoted value
            closing = None if closing in line else closing
            continue
        header = _CONF_HEADER.match(line)
        if header:
            section = section[:len(header[1]) - 1] + [_bare(header[2])]
            found.setdefault(tuple(section), number)
            continue
        entry = _CONF_ENTRY.match(line)
        if entry:
            found.setdefault((*section, _bare(entry[1])), number)
            quotes = entry[2][:3]
            if quotes in ('"""', "'''") and quotes not in entry[2][3:]:
                closing = quotes
    return found


def toml_lines(text):
    """Line numbers of a TOML file: as :func:`conf_lines`. A key of an array of tables gives its first."""
    found, section = {}, ()
    inside = _Inside()
    for number, line in enumerate(text.split("\n"), 1):
        start = 0
        if not inside.something():
            header = _TOML_HEADER.match(line)
            if header:
                section = _parts(header[2])
                found.setdefault(section, number)
                continue
            entry = _TOML_ENTRY.match(line)
            if not entry:
                continue
            found.setdefault(section + _parts(entry[1]), number)
            start = entry.end()
        inside.read(line, start)
    return found


class _Inside:
    """Whether a TOML value that began on an earlier line still goes on."""

    def __init__(self):
        self.depth = 0              # of [ and {
        self.closing = None         # the quotes that end a multi-line string

    def something(self):
        return self.depth > 0 or self.closing is not None

    def read(self, line, position):
        """Go on through a line from `position`."""
        while True:
            if self.closing:
                end = line.find(self.closing, position)
                if end < 0:
                    return
                position, self.closing = end + 3, None
            token = _TOML_TOKEN.search(line, position)
            if not token:
                return
            position = token.end()
            if token[0] in ('"""', "'''"):
                self.closing = token[0]
            elif token[0] in "[{":
                self.depth += 1
            elif token[0] in "]}":
                self.depth -= 1


def _parts(dotted):
    return tuple(_bare(part) for part in _TOML_PART.findall(dotted))


def _bare(name):
    return name[1:-1] if len(name) > 1 and name[0] in "\"'" and name[-1] == name[0] else name
