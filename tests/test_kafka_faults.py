"""A broker that answers with errors, moves, or goes: nothing is lost or doubled, and what may pass is tried again."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError, Producer

from streaming.kafka_errors import Losses
from streaming.kafka_log import KafkaLog, KafkaProducer
from streaming.kafka_reader import KafkaReader
from streaming.log import Bounds, Log, LogError, LogUnavailable, NotAllowed, open_log
from tests.kafka_broker import KafkaBroker
from tests.mock_kafka import FETCH, LIST_OFFSETS, METADATA, PRODUCE, MockKafka

PARTITIONS = 3
COUNT = 300

PASSING = {  # what a client may be told for a while
    "leaders move": (
        *("NOT_LEADER_FOR_PARTITION", "LEADER_NOT_AVAILABLE", "REPLICA_NOT_AVAILABLE"),
        *("UNKNOWN_LEADER_EPOCH", "FENCED_LEADER_EPOCH", "OFFSET_NOT_AVAILABLE"),
    ),
    "brokers fail": (
        *("BROKER_NOT_AVAILABLE", "KAFKA_STORAGE_ERROR", "REQUEST_TIMED_OUT", "NETWORK_EXCEPTION"),
        *("UNKNOWN", "_TRANSPORT"),
    ),
}
REFUSED = ("NOT_LEADER_FOR_PARTITION", "LEADER_NOT_AVAILABLE", "NOT_ENOUGH_REPLICAS", "REQUEST_TIMED_OUT")


def codes(names: tuple[str, ...]) -> list[int]:
    return [getattr(KafkaError, name) for name in names]


@pytest.fixture
def cluster() -> Iterator[MockKafka]:
    with MockKafka() as cluster:
        yield cluster


@pytest.fixture
def mock_log(cluster: MockKafka, topic: str) -> Iterator[Log]:
    cluster.create_topic(topic, PARTITIONS)
    with closing(open_log(cluster.url)) as log:
        yield log


def send(log: Log, topic: str, start: int) -> None:
    """COUNT records from this number on."""
    with closing(log.producer()) as producer:
        for number in range(start, start + COUNT):
            producer.send(topic, b"user%d" % (number % 10), b"%d" % number)


def read(log: Log, topic: str, wanted: int, reader: KafkaReader, found: list[int]) -> list[int]:
    """So many numbers, through whatever passes; and then no more."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (len(found) < wanted or time.monotonic() < deadline - 19):
        try:
            batch = reader.poll(100, 0.1)
        except LogUnavailable:
            continue
        found += [int(batch.value(i) or b"") for i in range(len(batch))]
        if len(found) >= wanted and not len(batch):
            break
    return found


def bounds(log: Log, topic: str) -> dict[int, Bounds]:
    """Asked again while the log says that it may help."""
    while True:
        try:
            return log.bounds(topic)
        except LogUnavailable:
            time.sleep(0.1)


@pytest.mark.parametrize("errors", PASSING.values(), ids=PASSING)
def test_a_fetch_that_fails_is_tried_again_and_costs_no_record(cluster, mock_log, topic, errors):
    send(mock_log, topic, 0)
    with closing(mock_log.reader(topic, dict.fromkeys(range(PARTITIONS), 0))) as reader:
        found = read(mock_log, topic, 10, reader, [])
        cluster.fail(FETCH, *codes(errors) * 2)
        send(mock_log, topic, COUNT)
        assert sorted(read(mock_log, topic, 2 * COUNT, reader, found)) == list(range(2 * COUNT))


@pytest.mark.parametrize("errors", PASSING.values(), ids=PASSING)
def test_asking_where_the_log_ends_may_fail_and_a_reader_that_starts_then_gets_all(
    cluster, mock_log, topic, errors
):
    send(mock_log, topic, 0)
    cluster.fail(LIST_OFFSETS, *codes(errors))
    cluster.fail(METADATA, *codes(errors))
    assert sum(bound.high for bound in bounds(mock_log, topic).values()) == COUNT
    cluster.fail(LIST_OFFSETS, *codes(errors))
    with closing(mock_log.reader(topic, dict.fromkeys(range(PARTITIONS), 0))) as reader:
        assert sorted(read(mock_log, topic, COUNT, reader, [])) == list(range(COUNT))


def test_a_write_that_fails_is_tried_again_and_neither_lost_nor_doubled(cluster, mock_log, topic):
    send(mock_log, topic, 0)
    cluster.fail(PRODUCE, *codes(REFUSED) * 2)
    send(mock_log, topic, COUNT)
    with closing(mock_log.reader(topic, dict.fromkeys(range(PARTITIONS), 0))) as reader:
        assert sorted(read(mock_log, topic, 2 * COUNT, reader, [])) == list(range(2 * COUNT))


def test_of_many_records_that_are_lost_one_line_tells(cluster, mock_log, topic, caplog):
    with closing(open_log(cluster.url, {"delivery.timeout.ms": "5000"})) as log:
        producer = log.producer()
        producer.send(topic, b"user", b"0")
        producer.flush()
        for broker in (1, 2, 3):
            cluster.down(broker)
        for number in range(COUNT):
            producer.send(topic, b"user%d" % (number % 10), b"%d" % number)
        with pytest.raises(LogUnavailable, match=f"{COUNT} records could not be written"):
            producer.close()
    lines = [r.getMessage() for r in caplog.records if "lost" in r.getMessage()]
    assert 1 <= len(lines) <= 2  # the second when it is closed
    assert sum(int(line.split()[0]) for line in lines) == COUNT
    assert f"the newest for {topic}: Local: Message timed out" in lines[-1]


def test_records_that_are_lost_are_counted_until_the_next_line_is_due(caplog):
    now = 100.0
    losses = Losses(lambda: now)

    def lose(count, why, at_last=False):
        caplog.clear()
        for _ in range(count):
            losses.note("events", why)
        losses.tell(at_last=at_last)
        return caplog.messages

    assert lose(0, "") == []
    assert lose(3, "slow") == ["3 records were lost, the newest for events: slow"]
    now += 9
    assert lose(500_000, "down") == []
    now += 1
    assert lose(1, "away") == ["500001 records were lost, the newest for events: away"]
    assert lose(2, "closed", at_last=True) == ["2 records were lost, the newest for events: closed"]
    now += 10
    assert lose(0, "") == []


class Idle:
    """A client that has nothing to send."""

    def poll(self, timeout_s: float) -> int:
        time.sleep(0.01)
        return 0

    def flush(self, timeout_s: float) -> int:
        return 0


def test_a_record_that_is_lost_while_flush_counts_is_told_by_the_next() -> None:
    log = SimpleNamespace(url="kafka://shop")
    producer = KafkaProducer(lambda failed: Idle(), log)  # type: ignore[arg-type, return-value]

    class Counted(int):
        """Another thread counts one more as soon as this is looked at."""

        def __sub__(self, told: int) -> int:
            producer._failed = 1
            return int(self) - told

    producer._failed = Counted()
    assert producer.flush() == 0
    with pytest.raises(LogUnavailable, match="1 records could not be written"):
        producer.close()


def test_an_error_that_will_not_pass_is_raised(cluster, mock_log, topic):
    send(mock_log, topic, 0)
    with closing(mock_log.reader(topic, dict.fromkeys(range(PARTITIONS), 0))) as reader:
        cluster.fail(FETCH, *[KafkaError.TOPIC_AUTHORIZATION_FAILED] * 4)
        with pytest.raises(NotAllowed, match="check its rights"):
            read(mock_log, topic, COUNT, reader, [])


def test_what_a_consumer_refuses_is_an_error_of_the_log(mock_log, topic):
    with pytest.raises(LogError, match="Invalid argument"):
        mock_log.reader(topic, {0: -77})
    with closing(mock_log.reader(topic, {0: 0})) as reader, pytest.raises(LogError, match="Invalid argument"):
        reader.seek({0: -77})


def test_leaders_that_move_about_cost_no_record(cluster, mock_log, topic):
    send(mock_log, topic, 0)
    found: list[int] = []
    with closing(mock_log.reader(topic, dict.fromkeys(range(PARTITIONS), 0))) as reader:
        for turn in range(1, 4):
            for partition in range(PARTITIONS):
                cluster.lead(topic, partition, 1 + (partition + turn) % 3)
            send(mock_log, topic, turn * COUNT)
            read(mock_log, topic, (turn + 1) * COUNT, reader, found)
    assert sorted(found) == list(range(4 * COUNT))


def stall(reader: KafkaReader, topic: str) -> None:
    """As if librdkafka fetched no more, and told nobody."""
    reader._consumer.pause(topic, reader.position())


def test_a_consumer_that_stalls_is_found_out_and_fetches_anew(mock_log: KafkaLog, topic, caplog):
    send(mock_log, topic, 0)
    with closing(mock_log.reader(topic, dict.fromkeys(range(PARTITIONS), 0))) as reader:
        reader.stall_s = 0.5
        found = read(mock_log, topic, COUNT, reader, [])
        stall(reader, topic)
        send(mock_log, topic, COUNT)
        with caplog.at_level(logging.WARNING):
            assert sorted(read(mock_log, topic, 2 * COUNT, reader, found)) == list(range(2 * COUNT))
    assert "fetching anew" in caplog.text


@pytest.mark.kafka
def test_aborted_records_are_never_seen_and_the_hole_they_leave_is_no_stall(
    kafka: KafkaBroker, topic, caplog
):
    with closing(open_log(kafka.url)) as log:
        log.create_topic(topic, 1)
        shop = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": topic, "log_level": 0})
        shop.init_transactions(30)
        for number, end in enumerate((shop.commit_transaction, shop.abort_transaction)):
            shop.begin_transaction()
            shop.produce(topic, b"%d" % number, b"user")
            shop.flush(30)
            end(30)
        with closing(log.reader(topic, {0: 0})) as reader, caplog.at_level(logging.WARNING):
            reader.stall_s = 0.3
            assert read(log, topic, 1, reader, []) == [0]
            deadline = time.monotonic() + 1.5
            while time.monotonic() < deadline:
                assert len(reader.poll(10, 0.1)) == 0
            assert reader.position() == {0: log.bounds(topic)[0].high} == {0: 4}
    assert "fetching anew" not in caplog.text


def test_a_producer_that_cannot_go_on_is_made_anew_and_what_was_on_its_way_is_told(
    cluster: MockKafka, mock_log: Log, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    producer = mock_log.producer()
    producer.send(topic, b"k", b"1")
    assert producer.flush(10) == 0
    cluster.fail(PRODUCE, KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER)  # which librdkafka does not survive
    producer.send(topic, b"k", b"on its way")
    number, end = 2, time.monotonic() + 20
    while number < 7 and time.monotonic() < end:
        time.sleep(0.1)
        with suppress(LogUnavailable):
            producer.send(topic, b"k", b"%d" % number)
            number += 1
    with pytest.raises(LogError, match="1 records could not be written"):
        producer.flush(10)
    assert producer.failed == 1
    producer.send(topic, b"k", b"7")
    producer.close(10)
    ends = {p: bounds.high for p, bounds in mock_log.bounds(topic).items()}
    assert sum(ends.values()) == 7
    with closing(mock_log.reader(topic, dict.fromkeys(ends, 0))) as reader:
        found: list[bytes | None] = []
        while len(found) < 7 and time.monotonic() < end:
            batch = reader.poll(100, 1.0)
            found += [batch.value(i) for i in range(len(batch))]
    assert found == [b"%d" % n for n in range(1, 8)]
    assert "the Kafka client cannot go on and is made anew" in caplog.text
