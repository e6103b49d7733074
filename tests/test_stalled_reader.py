"""The watchdog: where the log has records and none come, the reader begins to fetch anew, and loses none."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from streaming.kafka_log import KafkaReader, _Lines, _Refusals, _TopicIds
from streaming.kafka_settings import Mask
from streaming.log import RecordBatch

HIGH = 100


class StallingConsumer:
    """Gives HIGH records of partition 0, and nothing after the first 40 until it is assigned once more."""

    def __init__(self, clock):
        self._clock, self.assigned, self._next = clock, 0, 0

    def assign(self, topic, offsets):
        self.assigned += 1
        self._next = offsets[0]

    def pause(self, topic, partitions):
        pass

    resume = pause

    def take(self, most, timeout_s, *, keys):
        end = min(self._next + most, 40 if self.assigned == 1 else HIGH)
        offset = np.arange(self._next, max(self._next, end))
        self._next = max(self._next, end)
        if not len(offset):
            self._clock.now_s += timeout_s
        n = len(offset)
        nothing = np.zeros(n + 1, np.int64)
        return RecordBatch(
            np.zeros(n, np.int32), offset, offset, np.zeros(0, np.uint8), nothing, np.ones(n, np.bool_), None
        ), []

    def high(self, topic, partition):
        return HIGH


class OneBroker:
    def partitions(self, topic, timeout_s):
        return 1


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def reader_of(consumer, clock):
    ids = _TopicIds(_Lines(Mask({})), "events", "")
    return KafkaReader(consumer, _Refusals("here", {}), ids, OneBroker(), "events", {0: 0}, False, clock)


def test_records_that_are_there_and_do_not_come_are_fetched_anew_and_that_is_said(clock, caplog):
    caplog.set_level(logging.WARNING)
    consumer = StallingConsumer(clock)
    reader, found = reader_of(consumer, clock), []
    began_s = clock.now_s
    while clock.now_s < began_s + 60 and len(found) < HIGH:
        found += reader.poll(25, 0.5).offset.tolist()
    assert found == list(range(HIGH))
    assert consumer.assigned == 2
    assert 30 < clock.now_s - began_s < 35
    assert caplog.messages == ["events/0: nothing since 40 though high is 100; fetching anew"]


def test_a_partition_that_was_read_to_its_end_is_left_alone_however_long_it_is_silent(clock, caplog):
    caplog.set_level(logging.WARNING)
    consumer = StallingConsumer(clock)
    consumer.assigned = 1  # the reader's is the second: it does not stall
    reader, found = reader_of(consumer, clock), []
    for _ in range(400):
        found += reader.poll(1000, 0.5).offset.tolist()
    assert found == list(range(HIGH))
    assert consumer.assigned == 2
    assert caplog.messages == []


def test_a_paused_partition_is_not_taken_for_a_stalled_one(clock):
    consumer = StallingConsumer(clock)
    reader = reader_of(consumer, clock)
    assert len(reader.poll(40, 0.5)) == 40
    reader.pause([0])
    for _ in range(200):
        reader.poll(25, 0.5)
    assert consumer.assigned == 1
