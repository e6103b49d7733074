"""What could not be used is kept as it came, and never stops the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from streaming.columns import Reason
from streaming.dead_letters import AGAIN, CUT_BYTES, DeadLetters
from streaming.log import (
    Log,
    LogError,
    LogFull,
    LogUnavailable,
    Producer,
    RecordBatch,
    UnknownTopic,
    open_log,
)
from streaming.schemas import DEAD_LETTER, Codec
from streaming.sqlite_log import MAX_RECORD_BYTES

CODEC = Codec()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = open_log(f"sqlite:///{tmp_path}/log.db")
    for topic in ("events.dlq", "events.late"):
        log.create_topic(topic, 2)
    yield log
    log.close()


def batch(values: Sequence[bytes | None], keys: Sequence[bytes | None] | None = None) -> RecordBatch:
    """Records of partition 3 at offsets 100, 101, ..."""
    data = b"".join(value or b"" for value in values)
    return RecordBatch(
        partition=np.full(len(values), 3, np.int32),
        offset=np.arange(100, 100 + len(values), dtype=np.int64),
        timestamp_ms=np.full(len(values), 1_700_000_000_000, np.int64),
        data=np.frombuffer(data, np.uint8),
        bounds=np.cumsum([0, *(len(value or b"") for value in values)]).astype(np.int64),
        null=np.array([value is None for value in values]),
        keys=keys,
    )


def write(log: Log, records: RecordBatch, reasons: Sequence[Reason]) -> None:
    producer = log.producer()
    letters = DeadLetters(producer, CODEC, "events")
    letters.write(records, np.arange(len(records), dtype=np.int64), np.array(reasons, np.uint8))
    letters.flush()
    producer.close()


def letters_of(log: Log, topic: str) -> list[dict[str, object]]:
    """The letters, with the log's own key of each as `log_key`."""
    reader = log.reader(topic, dict.fromkeys(log.bounds(topic), 0), keys=True)
    found = reader.poll(1000, 1.0)
    reader.close()
    assert found.keys is not None
    letters = []
    for i in range(len(found)):
        name, letter = CODEC.decode(found.value(i) or b"")
        assert name == DEAD_LETTER
        letters.append(letter | {"log_key": found.keys[i]})
    return sorted(letters, key=lambda letter: letter["offset"])


def test_a_letter_tells_where_its_record_was_and_has_its_bytes(log: Log) -> None:
    write(log, batch([b"\xc3\x01ab"], [b"ann"]), [Reason.BAD_FRAME])
    assert letters_of(log, "events.dlq") == [
        {
            "reason": "BAD_FRAME", "topic": "events", "partition": 3, "offset": 100,
            "timestamp": 1_700_000_000_000, "key": b"ann", "value": b"\xc3\x01ab", "log_key": b"ann",
        }
    ]  # fmt: skip


def test_late_records_have_a_topic_of_their_own(log: Log) -> None:
    write(log, batch([b"a", b"b", b"c"]), [Reason.LATE, Reason.TRUNCATED, Reason.LATE])
    assert [letter["value"] for letter in letters_of(log, "events.late")] == [b"a", b"c"]
    assert [letter["value"] for letter in letters_of(log, "events.dlq")] == [b"b"]


def test_a_record_without_a_key_is_keyed_by_its_place(log: Log) -> None:
    write(log, batch([b"a", b"b"], [b"ann", None]), [Reason.TRUNCATED] * 2)
    write(log, batch([b"a"]), [Reason.TRUNCATED])
    assert sorted(str(letter["log_key"]) for letter in letters_of(log, "events.dlq")) == [
        "b'3-100'",
        "b'3-101'",
        "b'ann'",
    ]


def test_a_tombstone_stays_one(log: Log) -> None:
    write(log, batch([None, b""]), [Reason.EMPTY] * 2)
    assert [letter["value"] for letter in letters_of(log, "events.dlq")] == [None, b""]


def test_a_letter_larger_than_the_log_takes_is_cut_and_says_so(log: Log) -> None:
    value = bytes(MAX_RECORD_BYTES - 10)  # a record that the log took, with its key of 3 bytes
    write(log, batch([value, b"next"], [b"ann", b"bob"]), [Reason.BAD_UTF8] * 2)
    cut, whole = letters_of(log, "events.dlq")
    assert cut["reason"] == f"BAD_UTF8, cut from {len(value)} bytes"
    assert (cut["value"], cut["key"]) == (bytes(CUT_BYTES), b"ann")
    assert (whole["reason"], whole["value"]) == ("BAD_UTF8", b"next")


def test_a_key_that_fills_a_record_costs_the_letter_its_key_only(log: Log) -> None:
    write(log, batch([b"ab", None], [bytes(MAX_RECORD_BYTES - 10)] * 2), [Reason.BAD_FRAME] * 2)
    first, second = letters_of(log, "events.dlq")
    assert (first["value"], first["key"], first["log_key"]) == (b"ab", None, b"3-100")
    assert (second["value"], second["key"], second["log_key"]) == (None, None, b"3-101")


def test_missing_topics_are_named(tmp_path: Path) -> None:
    log = open_log(f"sqlite:///{tmp_path}/empty.db")
    with pytest.raises(UnknownTopic, match=r"'events\.dlq'"):
        write(log, batch([b"a"]), [Reason.TRUNCATED])
    log.close()


class Scripted:
    """A producer that is full for a while, and never gets `stuck` records away."""

    def __init__(self, full: int = 0, stuck: int = 0) -> None:
        self.full, self.stuck = full, stuck
        self.sent: list[bytes] = []

    def send(self, topic: str, key: bytes, value: bytes | None, timestamp_ms: int | None = None) -> None:
        if self.full:
            raise LogFull("full")
        self.sent.append(key)

    def flush(self, timeout_s: float = 30.0) -> int:
        self.full = max(0, self.full - 1)
        return self.stuck

    failed = 0
    close: Callable[..., None] = staticmethod(lambda timeout_s=30.0: None)


def test_a_full_queue_is_waited_for() -> None:
    producer = Scripted(full=3)
    as_producer: Producer = producer
    letters = DeadLetters(as_producer, CODEC, "events")
    letters.write(batch([b"a"], [b"ann"]), np.array([0]), np.array([Reason.TRUNCATED], np.uint8))
    assert producer.sent == [b"ann"]


def test_letters_that_are_not_durable_in_time_are_an_error() -> None:
    with pytest.raises(LogError, match="2 dead letters of events"):
        DeadLetters(Scripted(stuck=2), CODEC, "events").flush(0.1)


class Refusing:
    """A producer whose log loses all that is sent until `back`, and never takes one key."""

    def __init__(self, refused: bytes) -> None:
        self.refused, self.back = refused, False
        self.queued: list[tuple[bytes, bytes | None]] = []
        self.written: list[tuple[bytes, bytes | None]] = []
        self.flushes = self.failed = 0

    def send(self, topic: str, key: bytes, value: bytes | None, timestamp_ms: int | None = None) -> None:
        self.queued.append((key, value))

    def flush(self, timeout_s: float = 30.0) -> int:
        self.flushes += 1
        queued, self.queued = self.queued, []
        taken = [(key, value) for key, value in queued if self.back and key != self.refused]
        self.written += taken
        if len(taken) < len(queued):
            raise (LogError if self.back else LogUnavailable)("records could not be written")
        return 0

    close: Callable[..., None] = staticmethod(lambda timeout_s=30.0: None)


def test_many_letters_are_written_again_together_and_one_that_is_refused_is_found() -> None:
    count, refused = 5_000, b"user-3210"
    producer = Refusing(refused)
    as_producer: Producer = producer
    letters = DeadLetters(as_producer, CODEC, "events")
    keys = [f"user-{n}".encode() for n in range(count)]
    letters.write(
        batch([b"junk"] * count, keys), np.arange(count), np.full(count, Reason.TRUNCATED, np.uint8)
    )
    with pytest.raises(LogUnavailable):
        letters.flush()
    producer.back, producer.flushes = True, 0
    letters.flush()
    cut = b"3-3310"  # by its place: it cost that letter its key
    assert {key for key, _ in producer.written} == {*keys, cut} - {refused}
    assert len(producer.written) < count + 2 * AGAIN  # at least once, and not many twice
    assert producer.flushes < count / 50  # each takes a round trip, or more
