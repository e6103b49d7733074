"""Quiet partitions: up to which event time they count as complete, by a clock that nobody can set."""

from __future__ import annotations

import numpy as np
import pytest

from streaming.idle import AWAY_S, LIVE_MS, IdleClock
from streaming.log import RecordBatch
from tests.rows import START_MS, columns, event, logged

TIMEOUT_S = 60.0
DELAY_MS = 5000  # the joiner's watermark stays so far behind


def clock_that_heard(partition: int, now_s: float, behind_ms: int = 100) -> IdleClock:
    """Of one event at START_MS, which came behind_ms after it happened."""
    rows = logged([event("view_item", 1, at=0, partition=partition)])
    batch = RecordBatch(
        partition=np.array([partition], np.int32),
        offset=np.zeros(1, np.int64),
        timestamp_ms=np.array([START_MS + behind_ms]),
        data=np.zeros(0, np.uint8),
        bounds=np.zeros(2, np.int64),
        null=np.zeros(1, np.bool_),
        keys=None,
    )
    clock = IdleClock(TIMEOUT_S)
    clock.heard(batch, columns(rows), now_s)
    return clock


def test_a_live_partition_that_is_idle_goes_on_as_fast_as_our_clock():
    clock, watermark = clock_that_heard(0, 1000.0), {0: START_MS - DELAY_MS}
    assert clock.due(watermark, {}, 1059.0) == {}
    assert clock.due(watermark, {}, 1090.0) == {0: START_MS - DELAY_MS + 30_000}
    watermark = {0: START_MS - DELAY_MS + 30_000}
    assert clock.due(watermark, {}, 1090.0) == {}
    assert clock.due(watermark, {}, 1100.0) == {0: START_MS - DELAY_MS + 40_000}


def test_what_is_there_to_be_read_makes_no_partition_idle():
    assert clock_that_heard(0, 1000.0).due({0: START_MS}, {0: 1}, 5000.0) == {}


@pytest.mark.parametrize("behind_ms", [LIVE_MS + 1, -LIVE_MS - 1])
def test_replayed_or_simulated_time_stands_still(behind_ms):
    assert clock_that_heard(0, 1000.0, behind_ms).due({0: START_MS}, {}, 5000.0) == {}


def test_an_idle_partition_follows_the_slowest_of_those_that_are_not():
    clock = clock_that_heard(0, 1000.0)
    clock.due({1: None, 2: None}, {}, 1070.0)
    watermarks = {0: START_MS, 1: START_MS + 7000, 2: START_MS + 9000}
    assert clock.due(watermarks, {}, 1080.0) == {0: START_MS + 7000}


def test_nor_does_it_follow_one_whose_clock_may_be_wrong():
    clock = clock_that_heard(0, 1000.0)
    watermarks = {0: START_MS, 1: START_MS + 7000, 2: START_MS + 9000}
    clock.due({1: None, 2: None}, {}, 1070.0)
    assert clock.due(watermarks, {}, 1080.0, doubted=[1]) == {0: START_MS + 9000}
    assert clock.due(watermarks, {}, 1080.0, doubted=[1, 2]) == {0: START_MS + 20_000}  # as if it were alone


def test_a_log_that_was_away_was_not_silent_meanwhile():
    clock, watermark = clock_that_heard(0, 1000.0), {0: START_MS}
    assert clock.due(watermark, {}, 1050.0) == {}
    assert clock.due(watermark, {}, 1050.0) == {}  # it has not answered since
    assert clock.due(watermark, {}, 5000.0) == {}
    assert clock.due(watermark, {}, 5059.0) == {}
    assert clock.due(watermark, {}, 5070.0) == {0: START_MS + 10_000}
    assert clock.due({0: START_MS + 10_000}, {}, 9000.0) == {}
    assert clock.due({0: START_MS + 10_000}, {}, 9060.0) == {}
    assert clock.due({0: START_MS + 10_000}, {}, 9061.0) == {0: START_MS + 11_000}


def test_short_silences_of_the_log_itself_count_where_idle_is_soon():
    clock = clock_that_heard(0, 1000.0)
    hasty = IdleClock(1.0, clock.live)
    watermark = {0: START_MS}
    assert hasty.due(watermark, {}, 1000.0) == {}
    assert hasty.due(watermark, {}, 1000.0 + AWAY_S) == {0: START_MS + round(1000 * (AWAY_S - 1))}


@pytest.mark.parametrize("behind_ms", [100, LIVE_MS + 1])
def test_a_live_shop_is_one_after_a_restart_too(behind_ms):
    before = clock_that_heard(3, 1000.0, behind_ms)
    after = IdleClock(TIMEOUT_S, before.live)
    assert after.live == before.live == ([3] if behind_ms < LIVE_MS else [])
    assert after.due({3: START_MS}, {}, 7000.0) == {}
    due = after.due({3: START_MS}, {}, 7060.0), after.due({3: START_MS}, {}, 7100.0)
    assert due == ({}, {3: START_MS + 40_000} if behind_ms < LIVE_MS else {})


def test_nothing_passes_where_nothing_was_ever_read():
    assert IdleClock(TIMEOUT_S).due({0: None}, {}, 1e6) == {}
