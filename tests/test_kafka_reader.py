"""A reader of many partitions, one of which is in trouble while the others go on giving."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from confluent_kafka import KafkaError

from streaming.chunks import batch_of, empty_batch
from streaming.kafka_errors import ClientLines, Refusals
from streaming.kafka_reader import KafkaReader, TopicIds
from streaming.kafka_settings import Mask
from streaming.log import Bounds, LogError, RecordBatch
from streaming.rdkafka import Trouble

BUSY, OTHER = 0, 1


class Consumer:
    """Partition 0 has so many records each time that it is asked; of partition 1 it tells what it is told to."""

    def __init__(self, at_once: int = 1) -> None:
        self.troubles: list[Trouble] = []
        self.assigned: list[dict[int, int]] = []
        self._at_once, self._next = at_once, 0

    def take(self, most: int, timeout_s: float, *, keys: bool = False) -> tuple[RecordBatch, list[Trouble]]:
        count = min(self._at_once, most)
        batch = batch_of([b"x"] * count, self._next) if count else empty_batch()
        self._next += count
        troubles, self.troubles = self.troubles, []
        return batch, troubles

    def assign(self, topic: str, offsets: Mapping[int, int]) -> None:
        self.assigned.append(dict(offsets))

    def pause(self, topic: str, partitions: Any) -> None: ...

    def resume(self, topic: str, partitions: Any) -> None: ...

    def close(self) -> None: ...


class Broker:
    """Each partition ends at 1000."""

    def partitions(self, topic: str, timeout_s: float) -> int:
        return 2

    def partition_bounds(self, topic: str, partition: int, timeout_s: float) -> Bounds:
        return Bounds(0, 1000)


def reader_of(consumer: Consumer) -> KafkaReader:
    ids = TopicIds(ClientLines(Mask({})), "events", "")
    errors = Refusals("host:9092", {})
    return KafkaReader(consumer, errors, ids, Broker(), "events", {BUSY: 0, OTHER: 7}, False)  # type: ignore[arg-type]


def polls(reader: KafkaReader, count: int) -> Iterator[int | str]:
    """How many records each gives, or what it raises."""
    for _ in range(count):
        try:
            yield len(reader.poll(100, 0.0))
        except LogError as error:
            yield str(error)


def test_an_offset_that_is_gone_is_told_though_other_partitions_always_give_something() -> None:
    consumer = Consumer()
    reader = reader_of(consumer)
    consumer.troubles = [Trouble(KafkaError(KafkaError._AUTO_OFFSET_RESET), OTHER, 7)]
    gone = "events/1 does not hold offset 7; seek to where to go on"
    assert list(polls(reader, 5)) == [1, gone, 1, gone, 1]  # until somebody does
    reader.seek({OTHER: 9})
    assert list(polls(reader, 3)) == [1, 1, 1]
    assert consumer.assigned[-1] == {BUSY: 3, OTHER: 9}


def test_what_kept_a_partition_back_is_told_once_where_it_passes_by_itself() -> None:
    """As a right to read that was taken away and is given back: nobody seeks for it."""
    consumer = Consumer()
    reader = reader_of(consumer)
    consumer.troubles = [Trouble(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED), BUSY, 0)]
    first, turned_away, *later = polls(reader, 5)
    assert str(turned_away).startswith("Kafka keeps our user from topic 'events'")
    assert [first, *later] == [1, 1, 1, 1]
    assert len(consumer.assigned) == 1


@pytest.mark.parametrize(("at_once", "found_out"), [(1, True), (100, False)])
def test_a_stall_is_found_out_though_other_partitions_always_give_something(
    caplog: pytest.LogCaptureFixture, at_once: int, found_out: bool
) -> None:
    """Where a poll takes all that it may, what is missed may be the next to come."""
    consumer = Consumer(at_once)
    reader = reader_of(consumer)
    reader.stall_s = 0.05
    end = time.monotonic() + 0.2
    with caplog.at_level(logging.WARNING):
        while time.monotonic() < end:
            reader.poll(100, 0.0)
            time.sleep(0.01)
    assert ("events/1: nothing since 7 though it ends at 1000; fetching anew" in caplog.text) == found_out
    assert (len(consumer.assigned) > 1) == found_out
    assert {assigned[OTHER] for assigned in consumer.assigned} == {7}
