import io

import pytest

from katashim.ctl.output import columns, paint


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_columns():
    assert columns([("a", "bbb", "c"), ("aaa", "b", "")]) == "a    bbb  c\naaa  b"


@pytest.mark.parametrize(("stream", "no_colour", "painted"), [
    (Terminal(), "", "\033[31mx\033[0m"), (Terminal(), "1", "x"), (io.StringIO(), "", "x")])
def test_colour_only_on_a_terminal(stream, no_colour, painted, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_colour)
    assert paint("x", "red", stream) == painted
