"""JSON out of plain values. Python's json module takes 70 ms to load in an emulated guest; this is what we
need of it. Called by crun.py and log.py."""

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def dumps(value):
    """`value` (None, bool, int, float, str, list, tuple, dict with str keys) as JSON text.

    :raises TypeError: anything else.
    """
    parts = []
    _write(value, parts)
    return "".join(parts)


def _write(value, parts):
    if value is None or value is True or value is False:
        parts.append({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, str):
        parts.append(_quote(value))
    elif isinstance(value, (int, float)):
        parts.append(repr(value))
    elif isinstance(value, dict):
        _join("{", "}", value.items(), parts, _write_pair)
    elif isinstance(value, (list, tuple)):
        _join("[", "]", value, parts, _write)
    else:
        raise TypeError(f"JSON has no {type(value).__name__}")


def _write_pair(pair, parts):
    parts.append(_quote(pair[0]))
    parts.append(":")
    _write(pair[1], parts)


def _join(start, end, items, parts, write):
    separator = start
    for item in items:
        parts.append(separator)
        write(item, parts)
        separator = ","
    parts.append(start + end if separator is start else end)


def _quote(text):
    if text.isalnum() and text.isascii():
        return f'"{text}"'
    return '"' + "".join(_ESCAPES.get(char) or (char if " " <= char and not "\ud800" <= char <= "\udfff"
                                                else f"\\u{ord(char):04x}") for char in text) + '"'
