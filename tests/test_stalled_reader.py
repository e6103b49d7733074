"""The watchdog: where the log has records and none come, the reader begins to fetch anew, and loses none."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from streaming.kafka_log import KafkaReader, _Lines, _Refusals, _TopicIds
from streaming.kafka_settings import Mask

HIGH = 100


class Message:
    def __init__(self, offset):
        self.offset, self.partition = lambda: offset, lambda: 0
        self.value, self.key, self.error = lambda: b"%d" % offset, lambda: b"k", lambda: None
        self.timestamp = lambda: (1, 0)


class StallingConsumer:
    """Gives HIGH records of partition 0, and nothing after the first 40 until it is assigned once more."""

    def __init__(self, clock):
        self._clock, self.assigned, self._next = clock, 0, 0

    def assign(self, places):
        self.assigned += 1
        self._next = places[0].offset

    def pause(self, places):
        pass

    resume = pause

    def consume(self, count, timeout_s):
        end = min(self._next + count, 40 if self.assigned == 1 else HIGH)
        found = [Message(offset) for offset in range(self._next, end)]
        self._next = end
        return found

    def poll(self, timeout_s):
        self._clock.now_s += timeout_s

    def get_watermark_offsets(self, place, cached):
        assert cached  # no broker is asked for it
        return 0, HIGH

    def list_topics(self, topic, timeout):
        return SimpleNamespace(topics={topic: SimpleNamespace(error=None, partitions={0: None})})


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def reader_of(consumer, clock):
    ids = _TopicIds(_Lines(Mask({})), "events", "")
    return KafkaReader(consumer, _Refusals("here", {}), ids, "events", {0: 0}, False, clock)


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
