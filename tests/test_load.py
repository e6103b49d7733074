"""The load of the fault benchmark says what became of it: one that broke off, or hardly came, is no clean account."""

from __future__ import annotations

import time

import pytest

from benchmarks.load import Load
from streaming.log import LogError, LogFull


class Pen:
    """A log and its producer in one: after ten records it refuses so often, and each record takes so long."""

    def __init__(self, error: Exception | None = None, refusals: int = 0, pause_s: float = 0.0) -> None:
        self.error, self.refusals, self.pause_s = error, refusals, pause_s
        self.taken = self.refused = 0

    def partitions(self, topic: str) -> int:
        return 1

    def producer(self) -> Pen:
        return self

    def send(self, topic: str, key: bytes, value: bytes) -> None:
        time.sleep(self.pause_s)
        if self.error is not None and self.taken == 10 and self.refused < self.refusals:
            self.refused += 1
            raise self.error
        self.taken += 1

    def flush(self, timeout_s: float) -> int:
        return 0

    def close(self) -> None:
        pass


def loaded(pen: Pen, rate: float) -> Load:
    """A load that has sent what it could."""
    load = Load(pen, "events", rate, seed=1)
    load.start()
    while load.is_alive() and pen.taken < 20 and pen.refused < 5:
        time.sleep(0.01)
    return load


def test_a_load_that_did_its_work_ends_quietly():
    pen = Pen()
    load = loaded(pen, rate=40.0)
    load.finish()
    sent = load.sent
    assert len(sent.events) + len(sent.decisions) + sent.duplicates + sent.bad == pen.taken >= 20


def test_a_load_that_broke_off_says_so_when_it_is_finished():
    load = loaded(Pen(LogError("too large"), refusals=1), rate=40.0)
    with pytest.raises(LogError, match=r"broke off after .* steps: too large"):
        load.finish()


def test_a_load_whose_log_takes_no_more_says_so_when_it_is_finished():
    load = loaded(Pen(LogFull("the queue is full"), refusals=100), rate=40.0)
    with pytest.raises(LogError, match=r"broke off after .* steps: the queue is full"):
        load.finish()


def test_a_queue_that_is_full_for_a_while_is_waited_for():
    pen = Pen(LogFull("the queue is full"), refusals=2)
    loaded(pen, rate=40.0).finish()
    assert pen.taken >= 20


def test_a_load_that_hardly_came_is_none():
    load = loaded(Pen(pause_s=0.02), rate=1000.0)
    with pytest.raises(LogError, match=r"steps in \d+ s are no load of 1000/s"):
        load.finish()


def test_a_load_that_is_abandoned_says_nothing():
    load = loaded(Pen(LogError("too large"), refusals=1), rate=40.0)
    load.abandon()
    assert not load.is_alive()
