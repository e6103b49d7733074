"""What every log promises, whichever backend it is: the protocol's spec, run over both."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest

from streaming.log import (
    Log,
    LogError,
    OffsetOutOfRange,
    Reader,
    RecordBatch,
    TopicReplaced,
    UnknownTopic,
    open_log,
    partition_of,
)
from streaming.sqlite_log import SqliteLog
from tests.small_shop import delete_topic

Row = tuple[int, int, bytes | None]  # partition, offset, value


def send(log: Log, topic: str, *records: tuple[bytes, bytes | None], timestamp_ms: int | None = None) -> None:
    with closing(log.producer()) as producer:
        for key, value in records:
            producer.send(topic, key, value, timestamp_ms)


def numbered(count: int, start: int = 0) -> list[tuple[bytes, bytes]]:
    return [(b"user%d" % (i % 10), b"%d" % i) for i in range(start, start + count)]


def rows(batch: RecordBatch) -> list[Row]:
    return [(int(batch.partition[i]), int(batch.offset[i]), batch.value(i)) for i in range(len(batch))]


def drain(reader: Reader, count: int, timeout_s: float = 20.0, max_records: int = 1000) -> list[Row]:
    """Exactly `count` records: fails if they do not come, or more do."""
    found: list[Row] = []
    deadline = time.monotonic() + timeout_s
    while len(found) < count and time.monotonic() < deadline:
        found += rows(reader.poll(max_records, 0.2))
    assert len(found) == count
    assert rows(reader.poll(max_records, 0.1)) == []
    return found


@contextmanager
def reading(log: Log, topic: str, offsets: Mapping[int, int], **options: Any) -> Iterator[Reader]:
    with closing(log.reader(topic, offsets, **options)) as reader:
        yield reader


def test_what_was_sent_is_read_in_order_with_consecutive_offsets(log: Log, topic: str) -> None:
    log.create_topic(topic, 1)
    send(log, topic, (b"k", b"first"), (b"k", b"second"), (b"k", b"third"))
    with reading(log, topic, {0: 0}) as reader:
        assert drain(reader, 3) == [(0, 0, b"first"), (0, 1, b"second"), (0, 2, b"third")]


def test_a_key_decides_the_partition_as_javas_producer_does(log: Log, topic: str) -> None:
    log.create_topic(topic, 5)
    keys = [b"user-%d" % i for i in range(50)] + ["Grüße".encode(), b""]
    send(log, topic, *((key, key) for key in keys))
    with reading(log, topic, dict.fromkeys(range(5), 0)) as reader:
        found = {value: partition for partition, _, value in drain(reader, len(keys))}
    assert found == {key: partition_of(key, 5) for key in keys}
    assert len(set(found.values())) == 5


def test_each_partition_of_a_batch_is_in_offset_order(log: Log, topic: str) -> None:
    log.create_topic(topic, 3)
    send(log, topic, *numbered(500))
    seen = {0: -1, 1: -1, 2: -1}
    with reading(log, topic, {0: 0, 1: 0, 2: 0}) as reader:
        for partition, offset, _ in drain(reader, 500, max_records=37):
            assert offset == seen[partition] + 1
            seen[partition] = offset


def test_a_batch_never_holds_more_than_was_asked_for(log: Log, topic: str) -> None:
    log.create_topic(topic, 3)
    send(log, topic, *numbered(100))
    with reading(log, topic, {0: 0, 1: 0, 2: 0}) as reader:
        sizes = []
        while sum(sizes) < 100:
            sizes.append(len(reader.poll(7, 5.0)))
    assert max(sizes) <= 7


def test_keys_tombstones_empty_values_and_time_stamps_come_as_they_were_sent(log: Log, topic: str) -> None:
    log.create_topic(topic, 1)
    now_ms = int(time.time() * 1000) - 60_000  # neither expired nor, for Kafka, too far ahead
    with closing(log.producer()) as producer:
        producer.send(topic, b"a", b"\x00\xff", now_ms)
        producer.send(topic, b"b", None, now_ms + 1)
        producer.send(topic, b"c", b"", now_ms + 2)
    found: list[tuple[bytes | None, bytes | None, bool, int]] = []
    with reading(log, topic, {0: 0}, keys=True) as reader:
        while len(found) < 3:
            batch = reader.poll(10, 5.0)
            assert batch.keys is not None
            columns = (batch.keys, map(batch.value, range(len(batch))), batch.null, batch.timestamp_ms)
            found += zip(*columns, strict=True)
    assert found == [
        (b"a", b"\x00\xff", False, now_ms),
        (b"b", None, True, now_ms + 1),
        (b"c", b"", False, now_ms + 2),
    ]


def test_keys_are_left_out_unless_asked_for(log: Log, topic: str) -> None:
    log.create_topic(topic, 1)
    send(log, topic, (b"a", b"1"))
    with reading(log, topic, {0: 0}) as reader:
        assert reader.poll(10, 5.0).keys is None


def test_an_empty_batch_comes_when_nothing_does_and_not_before_the_timeout(log: Log, topic: str) -> None:
    log.create_topic(topic, 2)
    with reading(log, topic, {0: 0, 1: 0}) as reader:
        started = time.monotonic()
        batch = reader.poll(10, 0.3)
        assert len(batch) == 0
        assert batch.bounds.tolist() == [0]
        assert 0.25 < time.monotonic() - started < 3


def test_a_waiting_reader_sees_a_record_soon_after_it_was_sent(log: Log, topic: str) -> None:
    log.create_topic(topic, 1)
    send(log, topic, (b"a", b"warm"))
    with reading(log, topic, {0: 0}) as reader, closing(log.producer()) as producer:
        drain(reader, 1)
        waits = []
        for _ in range(10):
            started = time.monotonic()
            producer.send(topic, b"a", b"now")
            assert len(reader.poll(10, 10.0)) == 1
            waits.append(time.monotonic() - started)
    assert sorted(waits)[5] < 0.1


def test_positions_are_what_comes_next(log: Log, topic: str) -> None:
    log.create_topic(topic, 2)
    send(log, topic, *numbered(40))
    with reading(log, topic, {0: 0, 1: 0}) as reader:
        batch = reader.poll(15, 5.0)
        expected = {0: 0, 1: 0} | {p: o + 1 for p, o, _ in rows(batch)}
        assert reader.position() == expected
    with reading(log, topic, expected) as reader:
        assert len(drain(reader, 40 - len(batch))) == 40 - len(batch)


def test_seek_goes_back_and_forth_and_forgets_what_was_fetched(log: Log, topic: str) -> None:
    log.create_topic(topic, 1)
    send(log, topic, *((b"k", b"%d" % i) for i in range(100)))
    with reading(log, topic, {0: 0}) as reader:
        assert len(reader.poll(10, 5.0)) == 10
        reader.seek({0: 97})
        assert [value for _, _, value in drain(reader, 3)] == [b"97", b"98", b"99"]
        reader.seek({0: 50})
        assert reader.position() == {0: 50}
        assert drain(reader, 50)[0] == (0, 50, b"50")


def test_seeking_one_partition_leaves_the_other_where_it_was(log: Log, topic: str) -> None:
    log.create_topic(topic, 2)
    send(log, topic, *numbered(60))
    with reading(log, topic, {0: 0, 1: 0}) as reader:
        before = drain(reader, 60)
        reader.seek({1: 0})
        again = drain(reader, sum(partition == 1 for partition, _, _ in before))
    assert again == [row for row in before if row[0] == 1]


def test_a_paused_partition_gives_nothing_and_loses_nothing(log: Log, topic: str) -> None:
    log.create_topic(topic, 2)
    send(log, topic, *numbered(60))
    with reading(log, topic, {0: 0, 1: 0}) as reader:
        found = rows(reader.poll(5, 5.0))
        reader.pause([1])
        after = [row for _ in range(5) for row in rows(reader.poll(1000, 0.2))]
        assert {partition for partition, _, _ in after} <= {0}
        reader.resume([1])
        found += after + drain(reader, 60 - len(found) - len(after))
    assert len(set(found)) == 60


def test_a_pause_outlasts_a_seek(log: Log, topic: str) -> None:
    log.create_topic(topic, 2)
    send(log, topic, *numbered(60))
    with reading(log, topic, {0: 0, 1: 0}) as reader:
        reader.pause([1])
        reader.seek({0: 0})
        found = [row for _ in range(5) for row in rows(reader.poll(1000, 0.2))]
        assert {partition for partition, _, _ in found} == {0}


def test_assign_keeps_the_position_of_partitions_that_stay(log: Log, topic: str) -> None:
    log.create_topic(topic, 3)
    send(log, topic, *numbered(60))
    with reading(log, topic, {0: 0, 1: 0}) as reader:
        first = []
        while len({partition for partition, _, _ in first}) < 2:
            first += rows(reader.poll(5, 5.0))
        reader.assign({1: 0, 2: 0})
        assert set(reader.position()) == {1, 2}
        size = {p: b.high for p, b in log.bounds(topic).items()}
        read_of_1 = sum(partition == 1 for partition, _, _ in first)
        rest = drain(reader, size[1] - read_of_1 + size[2])
    assert [offset for partition, offset, _ in rest if partition == 1] == list(range(read_of_1, size[1]))


def test_bounds_tell_what_is_there(log: Log, topic: str) -> None:
    log.create_topic(topic, 2)
    assert log.bounds(topic) == {0: (0, 0), 1: (0, 0)}
    send(log, topic, (b"a", b"1"), (b"a", b"2"))
    assert log.bounds(topic)[partition_of(b"a", 2)] == (0, 2)


def test_creating_a_topic_again_changes_nothing(log: Log, topic: str) -> None:
    assert log.partitions(topic) == 0
    assert log.create_topic(topic, 3)
    assert not log.create_topic(topic, 3)
    assert not log.create_topic(topic, 2)
    assert log.partitions(topic) == 3


def test_a_topic_grows_and_its_new_partitions_are_written_and_read(log: Log, topic: str) -> None:
    log.create_topic(topic, 1)
    send(log, topic, *numbered(20))
    assert log.create_topic(topic, 4)
    assert log.partitions(topic) == 4
    send(log, topic, *numbered(40, start=20))
    with reading(log, topic, {0: 0}) as reader:
        reader.assign(dict.fromkeys(range(4), 0))
        found = drain(reader, 60)
    assert sorted(int(value or b"") for _, _, value in found) == list(range(60))
    assert {partition for partition, _, _ in found} == {0, 1, 2, 3}


def test_a_topic_that_is_not_there_is_said_so(log: Log, topic: str) -> None:
    with pytest.raises(UnknownTopic, match=topic):
        log.bounds(topic)
    with closing(log.producer()) as producer, pytest.raises(UnknownTopic, match=topic):
        producer.send(topic, b"k", b"v")
    with reading(log, topic, {0: 0}) as reader, pytest.raises(UnknownTopic, match=topic):
        _poll_until_something_happens(reader)
    assert log.partitions(topic) == 0  # asking did not create it


def test_an_offset_that_is_not_there_yet_is_never_silent(log: Log, topic: str) -> None:
    log.create_topic(topic, 1)
    send(log, topic, (b"a", b"1"))
    with reading(log, topic, {0: 1000}) as reader:
        for _ in range(2):  # and it stays an error until somebody seeks
            with pytest.raises(OffsetOutOfRange, match="1000"):
                _poll_until_something_happens(reader)
        reader.seek({0: 0})
        assert drain(reader, 1) == [(0, 0, b"1")]


def test_every_topic_has_an_identity_of_its_own(log: Log, topic: str, open_here: Callable[[], Log]) -> None:
    log.create_topic(topic, 1)
    log.create_topic(f"{topic}-other", 1)
    known = log.identity(topic)
    assert known == open_here().identity(topic) != log.identity(f"{topic}-other")
    log.create_topic(topic, 3)
    assert log.identity(topic) == known != ""
    delete_topic(log, topic)
    with pytest.raises(UnknownTopic, match=topic):
        log.identity(topic)
    log.create_topic(topic, 3)
    assert log.identity(topic) not in ("", known)


def test_a_reader_gives_nothing_of_a_topic_made_anew_however_long_it_is(log: Log, topic: str) -> None:
    log.create_topic(topic, 1)
    send(log, topic, *numbered(20))
    with reading(log, topic, {0: 0}) as reader:
        drain(reader, 20)
        delete_topic(log, topic)
        log.create_topic(topic, 1)
        send(log, topic, *numbered(60))
        for _ in range(2):  # and it stays an error
            with suppress(UnknownTopic), pytest.raises(TopicReplaced, match="made anew"):
                _poll_until_something_happens(reader)  # it may first be found gone
        with pytest.raises(TopicReplaced, match="made anew"):
            _poll_until_something_happens(reader)


def test_a_reader_that_knows_the_identity_gives_nothing_of_another_topic(log: Log, topic: str) -> None:
    log.create_topic(topic, 1)
    known = log.identity(topic)
    send(log, topic, *numbered(20))
    with reading(log, topic, {0: 10}, identity=known) as reader:
        drain(reader, 10)
    delete_topic(log, topic)
    log.create_topic(topic, 1)
    send(log, topic, *numbered(60))
    with (
        reading(log, topic, {0: 20}, identity=known) as reader,
        pytest.raises(TopicReplaced, match=re.escape(known)),
    ):
        _poll_until_something_happens(reader)


def test_retention_takes_old_records_and_offsets_go_on(log: Log, topic: str) -> None:
    log.create_topic(topic, 1, retention_ms=1000)
    send(log, topic, *numbered(3), timestamp_ms=1_500_000_000_000)
    deadline = time.monotonic() + 30
    while log.bounds(topic)[0].low < 3 and time.monotonic() < deadline:
        if isinstance(log, SqliteLog):
            log.expire(topic)
        time.sleep(0.1)
    assert log.bounds(topic)[0] == (3, 3)
    send(log, topic, (b"a", b"new"))
    with reading(log, topic, {0: 3}) as reader:
        assert drain(reader, 1) == [(0, 3, b"new")]
    with reading(log, topic, {0: 1}) as reader, pytest.raises(OffsetOutOfRange, match=f"{topic}/0"):
        _poll_until_something_happens(reader)


def test_a_record_that_is_too_large_is_refused_and_the_rest_goes_on(log: Log, topic: str) -> None:
    log.create_topic(topic, 1)
    with closing(log.producer()) as producer:
        with pytest.raises(LogError, match="bytes"):
            producer.send(topic, b"a", bytes(5_000_000))
        producer.send(topic, b"a", b"small")
        assert producer.flush() == 0
        assert producer.failed == 0
    with reading(log, topic, {0: 0}) as reader:
        assert drain(reader, 1) == [(0, 0, b"small")]


def test_flush_returns_when_everything_can_be_read(
    log: Log, topic: str, open_here: Callable[[], Log]
) -> None:
    log.create_topic(topic, 4)
    with closing(log.producer()) as producer:
        for key, value in numbered(1000):
            producer.send(topic, key, value)
        assert producer.flush() == 0
        assert sum(b.high for b in open_here().bounds(topic).values()) == 1000


def test_progress_is_published_per_group(log: Log, topic: str, open_here: Callable[[], Log]) -> None:
    log.create_topic(topic, 2)
    send(log, topic, *numbered(20))
    group = f"group-of-{topic}"
    assert log.committed(group, topic) == {}
    log.commit(group, topic, {0: 3})
    log.commit(group, topic, {0: 4, 1: 2})
    assert open_here().committed(group, topic) == {0: 4, 1: 2}
    assert log.committed(group + "-other", topic) == {}


def test_closing_twice_does_no_harm(log: Log, topic: str) -> None:
    log.create_topic(topic, 1)
    reader, producer = log.reader(topic, {0: 0}), log.producer()
    for thing in (reader, producer, log):
        thing.close()
        thing.close()


_WRITER = """
import sys
from streaming.log import open_log
url, topic, name, count = sys.argv[1:]
producer = open_log(url).producer()
for i in range(int(count)):
    producer.send(topic, f"{name}-{i % 7}".encode(), f"{name}:{i}".encode())
producer.close()
"""


def test_several_processes_write_while_several_read(log: Log, log_url: str, topic: str) -> None:
    log.create_topic(topic, 4)
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, log_url, topic, name, "3000"])
        for name in ("a", "b", "c")
    ]
    with reading(log, topic, {0: 0, 1: 0}) as one, reading(log, topic, {2: 0, 3: 0}) as other:
        found: list[Row] = []
        deadline = time.monotonic() + 60
        while len(found) < 9000 and time.monotonic() < deadline:
            found += rows(one.poll(500, 0.05)) + rows(other.poll(500, 0.05))
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len({(partition, offset) for partition, offset, _ in found}) == 9000
    for name in (b"a", b"b", b"c"):  # each key's records in the order in which they were sent
        for remainder in range(7):
            mine = [
                int(value.split(b":")[1]) for _, _, value in found if value and value.startswith(name + b":")
            ]
            assert [i for i in mine if i % 7 == remainder] == list(range(remainder, 3000, 7))


_DOOMED = """
import sys
from streaming.log import open_log
url, topic = sys.argv[1:]
producer = open_log(url).producer()
for i in range(10**9):
    producer.send(topic, b"k", b"%d" % i)
    if i % 500 == 499:
        assert producer.flush() == 0
        print(i + 1, flush=True)
"""


def test_what_was_flushed_survives_the_writers_kill_9(log: Log, log_url: str, topic: str) -> None:
    log.create_topic(topic, 1)
    with subprocess.Popen([sys.executable, "-c", _DOOMED, log_url, topic], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline()) for _ in range(4)][-1]
        writer.kill()
    time.sleep(0.2)
    high = log.bounds(topic)[0].high
    assert high >= acknowledged
    send(log, topic, (b"k", b"after"))
    with reading(log, topic, {0: 0}) as reader:
        found = drain(reader, high + 1)
    assert [value for _, _, value in found] == [b"%d" % i for i in range(high)] + [b"after"]


def test_urls_that_name_no_log_are_refused() -> None:
    with pytest.raises(LogError, match="sqlite:///path"):
        open_log("redis://here")


def _poll_until_something_happens(reader: Reader) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert len(reader.poll(10, 0.5)) == 0


def test_large_records_come_in_batches_that_fit_into_memory(log: Log, topic: str) -> None:
    log.create_topic(topic, 2)
    producer = log.producer()
    for i in range(120):
        producer.send(topic, f"{i}".encode(), bytes(900_000))
        producer.flush()
    producer.close()
    reader, sizes, count = log.reader(topic, {0: 0, 1: 0}), [], 0
    while count < 120:
        batch = reader.poll(10_000, 5.0)
        count += len(batch)
        sizes.append(len(batch.data))
    assert count == 120
    assert max(sizes) < 100_000_000
    assert reader.position() == {p: bounds.high for p, bounds in log.bounds(topic).items()}
    reader.close()
