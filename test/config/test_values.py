import pytest

from katashim.config import keys as kinds
from katashim.config.keys import Key
from katashim.config.table import SECTIONS
from katashim.config.values import convert, convert_text, range_text


def make(kind, **more):
    more.setdefault("default", "")
    return Key(section="runtime", group="g", name="it", type=kind, meaning="m.", **more)


INT = make(kinds.INT, low=1, high=9)
FLOAT = make(kinds.FLOAT, low=0)
CHOICE = make(kinds.CHOICE, default="a", choices=("a", "b"), synonyms={"": "a", "bee": "b"})
TABLES = SECTIONS["runtime"]["shared_mounts"]


@pytest.mark.parametrize(("key", "raw", "value"), [
    (make(kinds.BOOL), True, True),
    (INT, 9, 9),
    (FLOAT, 2, 2.0),
    (FLOAT, 0.5, 0.5),
    (make(kinds.TEXT), "a, b # c", "a, b # c"),
    (make(kinds.PATH), "", ""),
    (make(kinds.PATH), "/a", "/a"),
    (CHOICE, "b", "b"),
    (CHOICE, "bee", "b"),
    (CHOICE, "", "a"),
    (make(kinds.LIST), ["a", "b"], ("a", "b")),
    (make(kinds.LIST), [], ()),
    (make(kinds.GLOBS), ["/opt/*/bin/qemu"], ("/opt/*/bin/qemu",)),
    (make(kinds.REGEXES), ["default_.*"], ("default_.*",)),
])
def test_toml_values(key, raw, value):
    assert convert(key, raw) == value
    assert type(convert(key, raw)) is type(value)


@pytest.mark.parametrize(("key", "raw", "why"), [
    (make(kinds.BOOL), "true", 'is "true", wants true or false'),
    (make(kinds.BOOL), 1, "is 1, wants true or false"),
    (INT, True, "is true, wants an integer"),
    (INT, "5", 'is "5", wants an integer'),
    (INT, 1.5, "is 1.5, wants an integer"),
    (INT, 0, "is 0, must be 1 to 9"),
    (INT, 10, "is 10, must be 1 to 9"),
    (FLOAT, -1, "is -1, must be at least 0"),
    (FLOAT, float("nan"), "is nan, wants a number"),
    (FLOAT, float("inf"), "is inf, wants a number"),
    (make(kinds.TEXT), 5, "is 5, wants a string"),
    (make(kinds.TEXT), "a\0b", "contains a NUL character"),
    (make(kinds.PATH), "a/b", 'is "a/b", must be an absolute path'),
    (CHOICE, "c", 'is "c", must be one of a, b'),
    (make(kinds.LIST), "a", 'is "a", wants a list of strings'),
    (make(kinds.LIST), ["a", 5], "is a list, wants a list of strings"),
    (make(kinds.GLOBS), ["qemu*"], 'has "qemu*", each must be an absolute path pattern'),
    (make(kinds.REGEXES), ["a("], 'has "a(", which is not a regular expression'),
    (TABLES, {"name": "x"}, "is a table, wants a list of tables"),
    (TABLES, [{"nme": "x"}], "has a row with the unknown key nme"),
    (TABLES, [{"name": 5}], "has a row whose name is not a string"),
])
def test_wrong_toml_values(key, raw, why):
    with pytest.raises(ValueError) as caught:
        convert(key, raw)
    assert why in str(caught.value)


@pytest.mark.parametrize(("key", "raw", "value"), [
    *((make(kinds.BOOL), text, True) for text in ("true", "True", "on", "yes", "1")),
    *((make(kinds.BOOL), text, False) for text in ("false", "FALSE", "off", "no", "0")),
    (INT, "9", 9),
    (FLOAT, "2", 2.0),
    (FLOAT, "0.5", 0.5),
    (CHOICE, "bee", "b"),
    (make(kinds.LIST), "a", ("a",)),
    (make(kinds.LIST), "", ()),
    (make(kinds.LIST), ["a", "b"], ("a", "b")),
])
def test_text_values(key, raw, value):
    assert convert_text(key, raw) == value


@pytest.mark.parametrize(("key", "raw", "why"), [
    (make(kinds.BOOL), "maybe", 'is "maybe", wants true or false'),
    (INT, "many", 'is "many", wants an integer'),
    (INT, "0x5", 'is "0x5", wants an integer'),
    (INT, "10", "is 10, must be 1 to 9"),
    (FLOAT, "nan", "is nan, wants a number"),
    (make(kinds.TEXT), ["a", "b"], "wants a string: put a value with commas in quotes"),
    (make(kinds.TEXT), {"a": "b"}, "is a table, wants a string"),
    (TABLES, "x", "wants sections, one for each row"),
])
def test_wrong_text_values(key, raw, why):
    with pytest.raises(ValueError) as caught:
        convert_text(key, raw)
    assert why in str(caught.value)


def test_rows_of_tables():
    row, = convert(TABLES, [{"name": "n", "src_ctr": "a"}])
    assert (row.name, row.src_ctr, row.dst_ctr) == ("n", "a", "")
    assert convert_text(TABLES, {"n": {"src_ctr": "a"}}) == (row,)      # the section's name is the row's


def test_range_text():
    assert range_text(make(kinds.INT, low=1, high=5)) == "1 to 5"
    assert range_text(make(kinds.INT, low=1)) == "at least 1"
    assert range_text(make(kinds.INT)) == ""
