"""The band of updates per transition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.pacing import Band

bounds = st.tuples(st.floats(0, 10), st.floats(0.001, 10)).map(lambda pair: (min(pair), max(pair)))


def test_training_starts_once_the_replay_holds_enough():
    band = Band(0.5, 2.0, min_replay=100)
    assert not band.may_update(100, 0)
    assert band.may_update(101, 0)
    assert band.may_ingest(50, 0)
    assert band.reason(40, 0) == "training waits for 60 more transitions (--min-replay)"


def test_training_waits_at_the_upper_end_and_reading_at_the_lower():
    band = Band(0.5, 2.0, min_replay=100)
    assert band.updates_left(110, 19) == 1
    assert not band.may_update(110, 20)
    assert band.may_ingest(110, 20)
    assert "training waits" in band.reason(110, 20)
    assert not band.may_ingest(110, 4)
    assert band.may_ingest(110, 5)
    assert "reading waits" in band.reason(110, 4)
    assert band.reason(110, 10) == ""


def test_training_is_behind_where_fewer_than_half_of_the_updates_were_made():
    band = Band(0.0, 1.0, min_replay=100)
    assert band.reason(200, 50) == ""
    assert band.reason(200, 49).startswith("training is 51 updates behind")
    band.adjust(0.0, 1.0, transitions=200, updates=49)  # nothing is owed for what was before
    assert band.reason(300, 99) == ""
    assert band.reason(300, 98).startswith("training is 51 updates behind")


@given(bounds, st.integers(1, 1000), st.integers(0, 10**6), st.integers(0, 10**6))
def test_one_side_at_least_may_always_go_on(band, min_replay, transitions, updates):
    paced = Band(*band, min_replay)
    assert paced.may_update(transitions, updates) or paced.may_ingest(transitions, updates)


@given(bounds, st.integers(1, 50), st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_a_loop_that_asks_stays_in_the_band_up_to_one_poll(limits, min_replay, polls):
    low, high = limits
    band, transitions, updates = Band(low, high, min_replay), 0, 0
    for size in polls:
        while not band.may_ingest(transitions, updates):
            assert band.may_update(transitions, updates)
            updates += 1
        transitions += size
        counted = transitions - min_replay
        assert updates <= max(0.0, high * counted) + 1e-6
        # behind by what came with this poll, and by the update that the upper end did not allow yet
        assert updates >= min(low * (counted - size), math.floor(high * max(counted - size, 0))) - 1e-6


def test_choices_are_worth_more_transitions_the_fewer_there_are_and_nothing_before_the_first_update():
    band = Band(0.0, 0.01, min_replay=1000, young=3.0)
    assert [band.worth(1000, 500), band.worth(1001, 0)] == [1000, 1001]
    assert band.worth(10_000, 400) == 10_000 + 1980
    assert band.worth(10**7, 10**9) == pytest.approx(10**7 + 200_000, abs=10)
    assert Band(0.0, 0.01, min_replay=1000).worth(10_000, 400) == 10_000
    assert band.settings == [0.0, 0.01, 1000, 3.0]
    with pytest.raises(ValueError, match=r"young must be >= 1 times as many updates, not 0\.5"):
        Band(0.0, 1.0, min_replay=1, young=0.5)


def test_after_a_change_of_the_band_nothing_is_owed_for_what_was_before():
    band = Band(0.01, 0.02, min_replay=100)
    assert band.may_ingest(1_000_100, 10_000)
    band.adjust(1.0, 2.0, transitions=1_000_100, updates=10_000)
    assert band.may_ingest(1_000_100, 10_000)
    assert band.updates_left(1_000_110, 10_000) == 20
    assert (band.low, band.high) == (1.0, 2.0)


def test_a_restored_band_counts_on_from_where_it_was():
    band = Band(1.0, 2.0, min_replay=10)
    band.adjust(1.0, 2.0, transitions=500, updates=70)
    again = Band(1.0, 2.0, min_replay=10)
    again.restore(band.state(), transitions=520, updates=80)
    assert again.updates_left(520, 80) == band.updates_left(520, 80) == 30
    with pytest.raises(ValueError, match="does not fit"):
        again.restore({"transitions": 5, "updates": 90}, transitions=520, updates=80)


@pytest.mark.parametrize("limits", [(2.0, 1.0), (-1.0, 1.0), (0.0, 0.0), (0.0, math.inf), (math.nan, 1.0)])
def test_a_band_that_makes_no_sense_is_refused(limits):
    with pytest.raises(ValueError, match="0 <= low <= high"):
        Band(*limits, min_replay=1)


def test_min_replay_must_be_positive():
    with pytest.raises(ValueError, match="min_replay must be >= 1"):
        Band(1.0, 1.0, min_replay=0)
