"""The way into the learner: each record once, each letter at least once; a registry that is down parks a partition."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from learner.intake import Intake
from learner.misplaced import Misplaced
from streaming.chunks import Chunker
from streaming.dead_letters import DeadLetters
from streaming.log import LogError, LogUnavailable, partition_of
from streaming.schemas import Codec, Registry
from tests.intakes import Way
from tests.registry import FakeRegistry
from tests.wire import GOOD, NOON, an_event, array, line, text, varint

FRAMED = b"\0\0\0\0\1"  # Confluent's, of the registry's first schema


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'log.db'}"


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        running.add(Codec().reader_schemas()["bellwether.Event"])
        yield running


def user_of(partition: int, count: int = 2) -> str:
    """One whom the log puts there."""
    return next(u for u in map(str, range(1000)) if partition_of(u.encode(), count) == partition)


def views(user: str, items: str, start: int = 0, frame: bytes = GOOD[:10]) -> list[tuple[str, bytes]]:
    """(user, event) for each of the items, a second apart."""
    return [
        (user, an_event(
            frame, event_id=text(f"{user}-{item}"), user_id=text(user), name=text("view_item"),
            timestamp=varint(NOON + 1000 * (start + i)), items=array(line(item)), recommendation_id=varint(0),
        ))
        for i, item in enumerate(items)
    ]  # fmt: skip


def impatient(registry: FakeRegistry) -> Codec:
    """Asks once, and again at once."""
    return Codec(registry=Registry(registry.url, attempts=1, backoff_s=0))


# --- a registry that is down


def test_a_registry_that_is_down_parks_the_partition_and_the_others_go_on(
    url: str, registry: FakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = user_of(0), user_of(1)
    registry.failures = [503] * 1000
    with Way(url, impatient(registry), partitions=2) as way:
        mixed = [
            *views(here, "ab"),
            *views(here, "c", 2, FRAMED),
            *views(here, "d", 3),
            *views(there, "wxyz"),
        ]
        way.send(mixed).take()
        assert way.intake.parked == [0]
        assert way.intake.position() == {0: 0, 1: 4}
        assert way.count("events") == 4
        way.send([*views(here, "e", 4), *views(there, "v", 4)]).take()
        way.intake.retry()
        assert way.intake.position() == {0: 0, 1: 5}
        assert [r.message for r in caplog.records if "partition 0 waits from offset 0 on" in r.message]

        registry.failures = []
        way.intake.retry()
        way.take().rest()
        assert way.intake.parked == []
        assert way.intake.position() == {0: 5, 1: 5}
        assert [item for item, *_ in way.learnt(0)] == list("abcde")
        assert [item for item, *_ in way.learnt(1)] == list("wxyzv")
        assert way.dead() == []
        assert way.count("duplicates") == 0


@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize("mine", [0, 1])  # whichever partition a batch begins with
def test_a_schema_that_was_told_is_read_by_though_another_could_not_be_asked_for(
    url: str, registry: FakeRegistry, mine: int, garbage: bool
) -> None:
    newer = json.loads(json.dumps(Codec().reader_schemas()["bellwether.Event"]))
    newer["fields"].append({"name": "shop", "type": "string", "default": ""})
    number = 77 if garbage else registry.add(newer)
    frame = b"\0" + number.to_bytes(4, "big")
    here, there = user_of(mine), user_of(1 - mine)
    registry.away = {number}
    with Way(url, impatient(registry), partitions=2) as way:
        other = [(user, value + b"\0") for user, value in views(there, "x", frame=frame)]
        way.send([*views(here, "a", frame=FRAMED), *other]).take()
        assert way.intake.position() == {mine: 1, 1 - mine: 0}
        way.send(views(here, "b", 1, FRAMED)).take()
        registry.away = set()
        way.intake.retry()
        way.send(views(here, "c", 2, FRAMED)).take().rest()
        assert [item for item, *_ in way.learnt(mine)] == list("abc")
        assert len(way.dead()) == garbage


def test_a_registry_that_goes_down_later_is_missed_by_new_schemas_only(
    url: str, registry: FakeRegistry
) -> None:
    newer = json.loads(json.dumps(Codec().reader_schemas()["bellwether.Event"]))
    newer["fields"].append({"name": "shop", "type": "string", "default": ""})
    frame = b"\0" + registry.add(newer).to_bytes(4, "big")
    here, there = user_of(0), user_of(1)
    with Way(url, impatient(registry), partitions=2) as way:
        way.send([*views(here, "a", frame=FRAMED), *views(there, "x", frame=FRAMED)]).take()
        registry.failures = [503] * 1000
        changed = [(user, value + b"\0") for user, value in views(there, "y", 1, frame)]
        way.send([*views(here, "b", 1, FRAMED), *changed, *views(there, "z", 2, FRAMED)]).take()
        assert way.intake.parked == [1]
        assert way.intake.position() == {0: 2, 1: 1}
        registry.failures = []
        way.intake.retry()
        way.take().rest()
        assert [item for item, *_ in way.learnt()] == list("abxyz")
        assert way.dead() == []


def test_a_learner_that_stops_while_a_partition_is_parked_takes_it_up_from_there(
    url: str, registry: FakeRegistry
) -> None:
    here, there = user_of(0), user_of(1)
    registry.failures = [503] * 1000
    with Way(url, impatient(registry), partitions=2) as way:
        way.send([*views(here, "a", frame=FRAMED), *views(here, "b", 1), *views(there, "xy")]).take()
        memory = way.memory()
    registry.failures = []
    with Way(url, impatient(registry), partitions=2, memory=memory) as way:
        way.take().rest()
        assert [item for item, *_ in way.learnt()] == list("abxy")
        assert (way.count("events"), way.count("duplicates")) == (4, 0)


def test_where_batches_are_cut_by_offset_all_wait_since_the_order_of_the_turns_is_what_counts(
    url: str, registry: FakeRegistry
) -> None:
    here, there = user_of(0), user_of(1)
    registry.failures = [503] * 1000
    with Way(url, impatient(registry), partitions=2) as way:
        way.send([*views(here, "ab", frame=FRAMED), *views(there, "xy")])
        source = Chunker(way.reader, 2, {0: 2, 1: 2})
        intake = Intake(way.learner, source, way.letters, lambda *_: None)
        for _ in range(5):
            intake.read(0.01)
        assert intake.parked == [0]
        assert not intake.whole  # nothing may be saved: whose turn is next is not known any more
        assert way.count("events") == 0
        registry.failures = []
        intake.retry()
        intake.read(1.0)
        assert intake.whole
        assert way.learner.vocabulary.item_ids() == list("abxy")


def test_a_registry_that_stays_down_is_asked_less_and_less_often() -> None:
    now, asked = 0.0, 0

    class Down(Registry):
        def _once(self, *_: Any) -> Any:
            nonlocal asked
            asked += 1
            raise OSError("no route to host")

    registry = Down("http://127.0.0.1:9", attempts=1, clock=lambda: now)
    while now < 300:
        with pytest.raises(LogUnavailable):
            registry.schema(1)
        now += 0.5
    assert 15 < asked < 30


# --- letters that cannot be written


class Flaky:
    """A producer whose log is away for some calls of `send`, and which loses what it queued for some flushes."""

    def __init__(
        self, producer: Any, away: int = 0, losing: int = 0, error: type[Exception] = LogUnavailable
    ) -> None:
        self._producer, self.away, self.losing, self._error = producer, away, losing, error
        self._queued: list[Any] = []
        self.failed = 0

    def send(self, *record: Any) -> None:
        if self.away:
            self.away -= 1
            raise LogUnavailable("no broker answers")
        self._queued.append(record)

    def flush(self, timeout_s: float = 30.0) -> int:
        if self.losing and self._queued:
            self.losing -= 1
            self._queued.clear()
            raise self._error("1 records could not be written")
        for record in self._queued:
            self._producer.send(*record)
        self._queued.clear()
        return int(self._producer.flush(timeout_s))

    def close(self, timeout_s: float = 30.0) -> None:
        self.flush(timeout_s)


def test_a_batch_whose_letter_cannot_be_written_now_is_not_taken_twice(url: str) -> None:
    with Way(url) as way:
        flaky = Flaky(way.letter_producer, away=2)
        way.letters = DeadLetters(flaky, way.codec, "events")
        way.intake = Intake(way.learner, way.intake._source, way.letters, lambda *_: None)
        way.send([*views("ann", "ab"), ("ann", b"junk"), *views("ann", "c", 2)])
        for _ in range(2):
            with pytest.raises(LogUnavailable):
                way.intake.read(1.0)
            assert not way.intake.whole  # so no checkpoint can count the bad row as read
        way.intake.read(0.0)
        way.letters.flush()
        assert way.intake.whole
        assert (way.count("events"), way.count("duplicates"), way.count("bad")) == (3, 0, 1)
        assert [letter.offset for letter in way.dead()] == [2]


@pytest.mark.parametrize("error", [LogUnavailable, LogError])
def test_a_letter_that_the_log_lost_after_it_was_queued_is_written_again(
    url: str, error: type[LogError]
) -> None:
    with Way(url) as way:
        flaky = Flaky(way.letter_producer, losing=1, error=error)
        way.letters = DeadLetters(flaky, way.codec, "events")
        way.intake = Intake(way.learner, way.intake._source, way.letters, lambda *_: None)
        way.send([("ann", b"junk"), ("ann", None), ("ann", b"more")])
        way.intake.read(1.0)
        if error is LogUnavailable:
            with pytest.raises(LogUnavailable):
                way.letters.flush()
        way.letters.flush()
        assert [(letter.offset, letter.value) for letter in way.dead()] == [
            (0, b"junk"),
            (1, None),
            (2, b"more"),
        ]


# --- users in the wrong partition


def named(way: Way, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said of them, once all is taken in."""
    misplaced = Misplaced(way.log, "events", way.codec, lambda: 2, lambda: 0.0)
    with caplog.at_level(logging.WARNING):
        for batch, taken in way.batches:
            misplaced.look(batch, taken.columns)
            misplaced.close()
    return [record.message for record in caplog.records if record.name == "learner.misplaced"]


def test_a_key_that_is_not_the_user_is_counted_and_named(url: str, caplog: pytest.LogCaptureFixture) -> None:
    here, session = user_of(0), user_of(1)
    with Way(url, partitions=2) as way:
        way.send([(session, value) for _, value in views(here, "abc")]).take()
        assert way.count("misplaced") == 3
        (said,) = named(way, caplog)
    assert said.startswith(f"events/1 offset 0 is of user {here!r}, who belongs in partition 0")
    assert f"its key is {session.encode()!r}, and should be the user_id" in said


def test_users_whom_another_partitioner_placed_are_counted_and_named(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = user_of(0)
    with Way(url, partitions=2) as way:
        monkeypatch.setattr("streaming.sqlite_log.partition_of", lambda key, count: 1)  # as CRC32 might
        way.send([*views(here, "ab"), *views(user_of(1), "c")]).take()
        assert way.count("misplaced") == 2
        (said,) = named(way, caplog)
    assert f"of user {here!r}, who belongs in partition 0: its key is the user_id" in said
    assert "partitioner=murmur2_random" in said


def test_of_many_misplaced_users_one_is_named_each_minute(url: str, caplog: pytest.LogCaptureFixture) -> None:
    here, session = user_of(0), user_of(1)
    with Way(url, partitions=2, most=1) as way:
        way.send([(session, value) for _, value in views(here, "abcdef")]).take()
        said = named(way, caplog)
    assert len(way.batches) == 6
    assert len(said) == 1
