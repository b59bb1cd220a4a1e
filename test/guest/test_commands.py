"""Programs of the builder: their failures say what they were for, and what they said."""

import pytest

from katashim.errors import DeadlineExceeded, FailedPrecondition, Internal
from katashim.guest import commands


def test_missing_programs_are_named_with_their_packages():
    with pytest.raises(FailedPrecondition, match=r"no-such-tool.*apt-get install no-such-package"):
        commands.require({"sh": "dash", "no-such-tool": "no-such-package"})
    commands.require({"sh": "dash"})


def test_output_and_input():
    assert commands.run(["cat"], what="copying", stdin=b"x") == b"x"


def test_a_failure_carries_the_last_words():
    with pytest.raises(Internal, match="copying failed: sh ended with 3") as caught:
        commands.run(["sh", "-c", "echo why; exit 3"], what="copying")
    assert "why" in caught.value.full_text()


def test_a_program_that_does_not_end():
    with pytest.raises(DeadlineExceeded, match=r"waited 0.05 s for copying"):
        commands.run(["sleep", "100"], what="copying", timeout_s=0.05)


def test_a_long_program_is_logged_line_by_line(tmp_path):
    lines = []
    commands.run_logged(["sh", "-c", "echo a; echo b >&2"], tmp_path / "log", what="talking",
                        on_line=lines.append)
    assert lines == ["a", "b"]
    assert (tmp_path / "log").read_text() == "a\nb\n"
    with pytest.raises(Internal, match="talking failed"):
        commands.run_logged(["sh", "-c", "echo no; exit 1"], tmp_path / "log", what="talking")


def test_a_long_program_that_says_nothing_more_is_ended(tmp_path):
    with pytest.raises(DeadlineExceeded, match=r"waited 0.1 s for sleeping"):
        commands.run_logged(["sleep", "100"], tmp_path / "log", what="sleeping", timeout_s=0.1)
