"""katashim.timeline: the phases of a start."""

import time

import pytest

from katashim.timeline import Timeline, process_age_ms


def test_phases_are_told_in_the_order_of_their_begin():
    timeline = Timeline()
    with timeline.phase("outer"):
        with timeline.phase("inner"):
            pass
        timeline.add("early", -5.0, 10.0)
    assert [(row["phase"], row["ms"] is None) for row in timeline.records()] == [
        ("early", False), ("outer", False), ("inner", False)]
    assert timeline.records()[0] == {"phase": "early", "start_ms": -5.0, "ms": 15.0}


def test_a_phase_that_runs_or_failed_is_told_too():
    timeline = Timeline()
    with pytest.raises(ValueError), timeline.phase("failing"):
        raise ValueError
    phase = timeline.phase("running")
    phase.__enter__()
    assert [row["ms"] is None for row in timeline.records()] == [False, True]
    assert "running    not ended" in timeline.text() and "failing" in timeline.text()


def test_times_count_from_the_zero_that_was_given():
    timeline = Timeline(zero_ms=1000)
    assert 1000 <= timeline.now_ms() < 1500
    with timeline.phase("x"):
        pass
    assert timeline.records()[0]["start_ms"] >= 1000 and timeline.records()[0]["ms"] < 500


def test_a_process_knows_its_age_to_the_tick():
    first = process_age_ms()
    assert 0 < first < 24 * 3600 * 1000
    time.sleep(0.02)
    assert 10 <= process_age_ms() - first < 1000
