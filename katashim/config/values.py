"""One setting's value: from the text or TOML value in a file to the value in force, or why not.

The types and ranges are those of the key table; `defaults/configspec` states the same for ConfigObj
(test/config/test_configspec.py holds the two against each other). They are judged here and not by
ConfigObj's validator because both file formats and the annotations go through the same door, because
a problem is told with its file and line, and because that validator imports half the standard
library (6 ms and `inspect`, in a daemon that counts both).
"""

import re

from katashim.config import keys as kinds

TRUE = ("true", "on", "yes", "1")
FALSE = ("false", "off", "no", "0")


def convert(key, raw):
    """The value of a setting from what stands in a TOML file.

    :param key: the Key.
    :param raw: a str, bool, int, float, list or dict as tomllib gives it.
    :raises ValueError: with the rest of a sentence that begins with the setting's name.
    """
    if key.type == kinds.BOOL:
        _demand(isinstance(raw, bool), raw, "true or false")
        return raw
    if key.type in (kinds.INT, kinds.FLOAT):
        return _number(key, raw)
    if key.type in kinds.LISTS:
        _demand(isinstance(raw, (list, tuple)), raw, "a list of strings")
        return _list(key, raw)
    if key.type == kinds.TABLES:
        _demand(isinstance(raw, list) and all(isinstance(row, dict) for row in raw), raw,
                "a list of tables")
        return _rows(key, raw)
    _demand(isinstance(raw, str), raw, "a string")
    return _string(key, raw)


def convert_text(key, raw):
    """The value of a setting from text: a ``.conf`` file or an annotation.

    :param raw: a str, a list of str where a comma divided the text, or a dict for a section.
    :raises ValueError: see :func:`convert`.
    """
    if key.type in kinds.LISTS:
        if isinstance(raw, str):
            raw = [raw] if raw else []
        return _list(key, raw)
    if key.type == kinds.TABLES:
        _demand(isinstance(raw, dict) and all(isinstance(row, dict) for row in raw.values()), raw,
                "sections, one for each row")
        return _rows(key, [{**({"name": name} if "name" in key.columns else {}), **row}
                           for name, row in raw.items()])
    _demand(not isinstance(raw, list), raw, f"{_article(key.type)}: put a value with commas in quotes")
    _demand(isinstance(raw, str), raw, _article(key.type))
    if key.type == kinds.BOOL:
        _demand(raw.lower() in TRUE + FALSE, raw, "true or false")
        return raw.lower() in TRUE
    if key.type in (kinds.INT, kinds.FLOAT):
        try:
            parsed = int(raw) if key.type == kinds.INT else float(raw)
        except ValueError:
            raise ValueError(f"is {_shown(raw)}, wants {_article(key.type)}") from None
        return _number(key, parsed)
    return _string(key, raw)


def _number(key, raw):
    wanted = (int,) if key.type == kinds.INT else (int, float)
    _demand(isinstance(raw, wanted) and not isinstance(raw, bool), raw, _article(key.type))
    value = raw if key.type == kinds.INT else float(raw)
    if key.type == kinds.FLOAT and not abs(value) < float("inf"):
        raise ValueError(f"is {raw}, wants a number")
    if key.low is not None and value < key.low or key.high is not None and value > key.high:
        raise ValueError(f"is {raw}, must be {range_text(key)}")
    return value


def _string(key, raw):
    if key.type == kinds.CHOICE:
        value = key.synonyms.get(raw, raw)
        if value not in key.choices and value != key.default:
            raise ValueError(f"is {_shown(raw)}, must be one of {', '.join(key.choices)}")
        return value
    if "\0" in raw:
        raise ValueError("contains a NUL character")
    if key.type == kinds.PATH and raw and not raw.startswith("/"):
        raise ValueError(f"is {_shown(raw)}, must be an absolute path")
    return raw


def _list(key, raw):
    for item in raw:
        _demand(isinstance(item, str), raw, "a list of strings")
        if key.type == kinds.GLOBS and not item.startswith("/"):
            raise ValueError(f"has {_shown(item)}, each must be an absolute path pattern")
        if key.type == kinds.REGEXES:
            _compile(item)
    return tuple(raw)


def _compile(pattern):
    try:
        re.compile(pattern)
    except re.error as exc:
        raise ValueError(f"has {_shown(pattern)}, which is not a regular expression: {exc}") from exc


def _rows(key, raw):
    from katashim.config.records import ROW_TYPES
    row_type, rows = ROW_TYPES[key.full_name], []
    for row in raw:
        unknown = sorted(set(row) - set(key.columns))
        if unknown:
            raise ValueError(f"has a row with the unknown key {unknown[0]}")
        wrong = [name for name, value in row.items() if not isinstance(value, str)]
        if wrong:
            raise ValueError(f"has a row whose {wrong[0]} is not a string")
        rows.append(row_type(**row))
    return tuple(rows)


def _demand(fits, raw, wanted):
    if not fits:
        raise ValueError(f"is {_shown(raw)}, wants {wanted}")


def _shown(raw):
    """The value as its writer would recognise it."""
    if isinstance(raw, bool):
        return "true" if raw else "false"
    if isinstance(raw, str):
        return f'"{raw}"'
    if isinstance(raw, (list, tuple)):
        return "a list"
    if isinstance(raw, dict):
        return "a table"
    return str(raw)


def _article(kind):
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def range_text(key):
    """``"1 to 65536"``, ``"at least 1"``, or "" for a setting without a range."""
    if key.low is None and key.high is None:
        return ""
    if key.high is None:
        return f"at least {key.low}"
    return f"{key.low} to {key.high}"
