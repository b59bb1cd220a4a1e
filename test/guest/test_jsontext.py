"""The agent's JSON writer against Python's reader."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katashim.guest.agent import jsontext

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12)


@given(values)
@settings(max_examples=150, deadline=None)
def test_what_is_written_reads_back(value):
    assert json.loads(jsontext.dumps(value)) == value


def test_what_json_does_not_have_is_refused():
    with pytest.raises(TypeError, match="bytes"):
        jsontext.dumps({"a": b"x"})
