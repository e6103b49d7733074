"""The consumer that gives arrays gives what confluent-kafka's own gives, and holds on to nothing."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from streaming.log import open_log
from streaming.rdkafka import ArrayConsumer
from tests.kafka_broker import KafkaBroker

pytestmark = pytest.mark.kafka
SETTINGS = {"group.id": "arrays", "enable.auto.commit": "false", "enable.auto.offset.store": "false"}
Record = tuple[int, int, int, bytes | None, bytes | None]


@pytest.fixture
def topic(kafka: KafkaBroker) -> str:
    name = f"arrays-{time.monotonic_ns()}"
    open_log(kafka.url).create_topic(name, 2)
    return name


def consumer(
    kafka: KafkaBroker, heard: Callable[[KafkaError], None] = lambda error: None, **settings: Any
) -> ArrayConsumer:
    given = {"bootstrap.servers": kafka.bootstrap, **SETTINGS, **settings, "error_cb": heard}
    return ArrayConsumer(given, logger=logging.getLogger("test"))


def fill(kafka: KafkaBroker, topic: str, records: int, value: bytes | None = None) -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "compression.type": "lz4"})
    now_ms = int(time.time() * 1000)  # older ones would be taken by retention
    values = [None, b"", b"short", b"x" * 5000, bytes(range(256))]
    for n in range(records):
        key = [None, b"", b"anna", f"user-{n}".encode()][n % 4]
        while True:
            try:
                producer.produce(topic, value or values[n % 5], key, n % 2, timestamp=now_ms + 37 * n)
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(30) == 0


def by_confluent(kafka: KafkaBroker, topic: str, records: int) -> list[Record]:
    reader = Consumer({"bootstrap.servers": kafka.bootstrap, **SETTINGS})
    reader.assign([TopicPartition(topic, p, 0) for p in range(2)])
    found: list[Record] = []
    while len(found) < records:
        for m in reader.consume(records, 0.5):
            found.append((m.partition(), m.offset(), m.timestamp()[1], m.key(), m.value()))  # type: ignore[arg-type]
    reader.close()
    return sorted(found, key=lambda record: record[:2])


def by_arrays(reader: ArrayConsumer, topic: str, records: int, most: int) -> list[Record]:
    reader.assign(topic, {0: 0, 1: 0})
    found: list[Record] = []
    while len(found) < records:
        batch, troubles = reader.take(most, 5.0, keys=True)
        assert not troubles
        assert batch.keys is not None
        for i in range(len(batch)):
            place = int(batch.partition[i]), int(batch.offset[i]), int(batch.timestamp_ms[i])
            found.append((*place, batch.keys[i], batch.value(i)))
    return sorted(found, key=lambda record: record[:2])


@pytest.mark.parametrize("most", [1, 7, 10_000])
def test_records_are_what_confluent_kafka_reads(kafka: KafkaBroker, topic: str, most: int) -> None:
    fill(kafka, topic, 500)
    reader = consumer(kafka)
    assert by_arrays(reader, topic, 500, most) == by_confluent(kafka, topic, 500)
    reader.close()


def test_the_end_of_a_partition_comes_behind_its_records(kafka: KafkaBroker, topic: str) -> None:
    fill(kafka, topic, 20)
    reader = consumer(kafka, **{"enable.partition.eof": "true"})
    reader.assign(topic, {0: 0})
    batch, troubles = reader.take(100, 5.0)
    rows = len(batch)
    while not troubles:
        batch, troubles = reader.take(100, 5.0)
        rows += len(batch)
    assert rows == 10
    assert [(t.error.code(), t.partition, t.offset) for t in troubles] == [(KafkaError._PARTITION_EOF, 0, 10)]
    reader.close()


def test_what_was_read_is_given_back(kafka: KafkaBroker, topic: str) -> None:
    fill(kafka, topic, 20_000, b"y" * 1000)
    reader = consumer(kafka)

    def read_all() -> int:
        reader.assign(topic, {0: 0, 1: 0})
        left = 20_000
        while left:
            left -= len(reader.take(5000, 5.0)[0])
        return resident()

    after = [read_all() for _ in range(12)]
    assert after[-1] - after[3] < 50e6  # eight times 20 MB were read since
    reader.close()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_consumer_that_nobody_holds_is_closed(kafka: KafkaBroker) -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    readers = [consumer(kafka) for _ in range(3)]
    assert threads() > before
    readers.clear()
    gc.collect()
    assert threads() <= before


def test_a_closed_consumer_says_so_and_may_be_closed_again(kafka: KafkaBroker, topic: str) -> None:
    reader = consumer(kafka)
    reader.assign(topic, {0: 0})
    reader.close()
    reader.close()
    for ask in (
        lambda: reader.take(1, 0.0),
        lambda: reader.pause(topic, [0]),
        lambda: reader.assign(topic, {}),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            ask()


def test_errors_of_the_client_are_heard(kafka: KafkaBroker) -> None:
    heard: list[KafkaError] = []
    reader = consumer(kafka, heard.append, **{"bootstrap.servers": "127.0.0.1:1"})
    reader.assign("nowhere", {0: 0})
    deadline = time.monotonic() + 10
    while not any(e.code() == KafkaError._ALL_BROKERS_DOWN for e in heard) and time.monotonic() < deadline:
        assert len(reader.take(10, 0.1)[0]) == 0
    assert KafkaError._ALL_BROKERS_DOWN in [error.code() for error in heard]
    reader.close()


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"no.such.setting": "1"}, "no.such.setting"),
        ({"fetch.wait.max.ms": "soon"}, "fetch.wait.max.ms"),
        ({"security.protocol": "ssl", "ssl.ca.location": "/nowhere.pem"}, "ssl.ca.location"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(
    kafka: KafkaBroker, setting: dict[str, str], why: str
) -> None:
    with pytest.raises(KafkaException, match=why):
        consumer(kafka, **setting)
