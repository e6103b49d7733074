"""Batches cut by offset: what is in them is a property of the log, whenever and however it was read."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.chunks import Chunker, concatenate, empty_batch, rows, split
from streaming.log import LogUnavailable, Reader, RecordBatch, open_log
from tests.joins import DEEP

Records = dict[int, list[int]]  # offsets that each partition holds
Content = list[tuple[int, int, bytes | None]]


def value(partition: int, offset: int) -> bytes | None:
    """A record's bytes, of a length of their own; some are tombstones."""
    return None if offset % 7 == 3 else b"%d:%d;" % (partition, offset) * (offset % 3 + 1)


def batch(records: Iterable[tuple[int, int]], *, keys: bool = False) -> RecordBatch:
    """These (partition, offset)s."""
    placed = list(records)
    values = [value(*place) for place in placed]
    return RecordBatch(
        partition=np.array([p for p, _ in placed], np.int32),
        offset=np.array([o for _, o in placed], np.int64),
        timestamp_ms=np.array([1000 + o for _, o in placed], np.int64),
        data=np.frombuffer(b"".join(v or b"" for v in values), np.uint8),
        bounds=np.cumsum([0, *(len(v or b"") for v in values)]),
        null=np.array([v is None for v in values], np.bool_),
        keys=[b"k%d" % o for _, o in placed] if keys else None,
    )


def content(given_batch: RecordBatch) -> Content:
    """Its records, checked against what they were."""
    places = zip(given_batch.partition.tolist(), given_batch.offset.tolist(), strict=True)
    found = [(p, o, given_batch.value(i)) for i, (p, o) in enumerate(places)]
    assert found == [(p, o, value(p, o)) for p, o, _ in found]
    assert given_batch.timestamp_ms.tolist() == [1000 + o for _, o, _ in found]
    return found


class ScriptedReader:
    """A reader whose records arrive as the script says: (partition, how many) for each poll."""

    def __init__(
        self, records: Records, start: Mapping[int, int], script: Iterable[list[tuple[int, int]]]
    ) -> None:
        self._left = {p: [o for o in offsets if o >= start[p]] for p, offsets in records.items()}
        self._position = dict(start)
        self._script = iter(script)
        self.marks: dict[
            int, int
        ] = {}  # offsets at the end that hold no records, as a transaction's end does
        self.paused: set[int] = set()
        self.down = False

    def poll(self, max_records: int, timeout_s: float) -> RecordBatch:
        if self.down:
            raise LogUnavailable("down")
        found: list[tuple[int, int]] = []
        for partition, count in next(self._script, [(p, max_records) for p in self._left]):
            if partition in self.paused:
                continue
            left = self._left[partition]
            count = min(count, len(left), max_records - len(found))
            found += [(partition, offset) for offset in left[:count]]
            del left[:count]
            if count:
                self._position[partition] = found[-1][1] + 1
            if not left:
                self._position[partition] += self.marks.pop(partition, 0)
        return batch(found)

    def position(self) -> dict[int, int]:
        return dict(self._position)

    def pause(self, partitions: Iterable[int]) -> None:
        self.paused |= set(partitions)

    def resume(self, partitions: Iterable[int]) -> None:
        self.paused -= set(partitions)

    def seek(self, offsets: Mapping[int, int]) -> None:
        raise NotImplementedError

    def assign(self, offsets: Mapping[int, int]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def chunked(records: Records, size: int, until: Mapping[int, int], script: Iterable[list[tuple[int, int]]] = (),
            start: Mapping[int, int] | None = None, turn: int = 0) -> list[Content]:  # fmt: skip
    """All chunks up to `until`, in the order in which they are given out."""
    chunker = Chunker(ScriptedReader(records, start or dict.fromkeys(records, 0), script), size, until, turn)
    found = []
    for _ in range(10_000):
        if chunker.finished:
            assert chunker.next(0) is None
            return found
        chunk = chunker.next(0)
        if chunk is not None:
            found.append(content(chunk))
    raise AssertionError("the chunks have no end")


def ends(records: Records) -> dict[int, int]:
    return {p: offsets[-1] + 1 if offsets else 0 for p, offsets in records.items()}


def test_a_chunk_holds_the_offsets_between_two_multiples_of_its_size():
    got = chunked({0: list(range(7))}, 3, {0: 7})
    assert [[offset for _, offset, _ in chunk] for chunk in got] == [[0, 1, 2], [3, 4, 5], [6]]


def test_partitions_take_turns():
    got = chunked({0: list(range(4)), 1: list(range(4)), 2: list(range(2))}, 2, {0: 4, 1: 4, 2: 2})
    assert [chunk[0][:2] for chunk in got] == [(0, 0), (1, 0), (2, 0), (0, 2), (1, 2)]


def test_a_hole_makes_a_chunk_smaller_and_moves_no_border():
    got = chunked({0: [0, 2, 3, 11, 12]}, 3, {0: 13})
    assert [[offset for _, offset, _ in chunk] for chunk in got] == [[0, 2], [3], [], [11], [12]]


def test_a_hole_at_the_end_of_the_log_is_passed_too():
    reader = ScriptedReader({0: [0, 1]}, {0: 0}, [])
    reader.marks = {0: 1}
    chunker = Chunker(reader, 3, {0: 3})
    chunk = chunker.next(0)
    assert chunk is not None
    assert [offset for _, offset, _ in content(chunk)] == [0, 1]
    assert chunker.finished


def test_the_first_chunk_starts_where_the_log_or_the_checkpoint_does():
    got = chunked({0: list(range(4, 9))}, 3, {0: 9}, start={0: 4})
    assert [[offset for _, offset, _ in chunk] for chunk in got] == [[4, 5], [6, 7, 8]]


def test_nothing_beyond_until_is_given_out():
    got = chunked({0: list(range(9)), 1: list(range(9))}, 3, {0: 4})
    assert [[offset for _, offset, _ in chunk] for chunk in got] == [[0, 1, 2], [3]]


def test_a_chunk_that_is_not_full_is_waited_for_and_the_others_with_it():
    reader = ScriptedReader({0: [0, 1, 2], 1: [0, 1, 2]}, {0: 0, 1: 0}, [[(1, 3)], [(0, 2)], [], [(0, 1)]])
    chunker = Chunker(reader, 3, None)
    assert [chunker.next(0) for _ in range(3)] == [None, None, None]
    assert chunker.position() == {0: 0, 1: 0}
    first, second = chunker.next(0), chunker.next(0)
    assert first is not None
    assert second is not None
    assert (content(first)[0][0], content(second)[0][0]) == (0, 1)
    assert chunker.position() == {0: 3, 1: 3}


def test_without_an_end_it_never_finishes():
    chunker = Chunker(ScriptedReader({0: [0, 1]}, {0: 0}, []), 3, None)
    assert chunker.next(0) is None
    assert not chunker.finished


def test_a_reader_of_no_partitions_gives_nothing():
    chunker = Chunker(ScriptedReader({}, {}, []), 3, {})
    assert chunker.next(0) is None
    assert chunker.finished


def test_a_partition_that_runs_ahead_is_paused_until_it_is_needed():
    records = {0: list(range(300)), 1: list(range(300))}
    reader = ScriptedReader(records, {0: 0, 1: 0}, [[(1, 2)]] * 200)
    chunker = Chunker(reader, 2, None)
    for _ in range(100):
        chunker.next(0)
    assert reader.position()[1] == 2 * 65  # just over the bound of 64 chunks
    got = [chunk for _ in range(600) if (chunk := chunker.next(0)) is not None]
    assert sum(len(chunk) for chunk in got) == 600


def test_a_log_that_is_away_for_a_while_leaves_nothing_paused():
    reader = ScriptedReader({0: list(range(300)), 1: list(range(300))}, {0: 0, 1: 0}, [[(1, 2)]] * 66)
    chunker = Chunker(reader, 2, None)
    for _ in range(66):
        chunker.next(0)
    reader.down = True
    with pytest.raises(LogUnavailable):
        chunker.next(0)
    assert reader.paused == set()
    reader.down = False
    assert sum(len(chunk) for _ in range(700) if (chunk := chunker.next(0)) is not None) == 600


logs = st.dictionaries(
    st.integers(0, 3),
    st.lists(st.integers(0, 40), max_size=25, unique=True).map(sorted),
    min_size=1,
    max_size=3,
)


@given(logs, st.integers(1, 12), st.integers(0, 2**32), st.data())
@settings(max_examples=150 * DEEP, deadline=None)
def test_the_chunks_are_the_same_whatever_the_arrival_and_the_restarts(records, size, seed, data):
    until = ends(records)
    pick = random.Random(seed)

    def script():
        while True:
            yield [(pick.choice(list(records)), pick.randrange(5)) for _ in range(pick.randrange(4))]

    whole = chunked(records, size, until)
    assert chunked(records, size, until, script()) == whole
    expected = [
        (p, o, value(p, o)) for p in sorted(records) for o in records[p]
    ]  # nothing lost, nothing twice, and each chunk within its borders
    assert sorted((row for chunk in whole for row in chunk), key=lambda row: row[:2]) == expected
    assert all(len({(p, o // size) for p, o, _ in chunk}) <= 1 for chunk in whole)

    stop = data.draw(st.integers(0, len(whole)))
    before = Chunker(ScriptedReader(records, dict.fromkeys(records, 0), script()), size, until)
    got: list[Content] = []
    while len(got) < stop:
        chunk = before.next(0)
        got += [] if chunk is None else [content(chunk)]
    assert got + chunked(records, size, until, script(), before.position(), before.turn) == whole


def test_chunks_of_a_real_log_are_the_same_whoever_reads_it(tmp_path: Path):
    with closing(open_log(f"sqlite:///{tmp_path / 'log.db'}")) as log:
        log.create_topic("events", 3)
        with closing(log.producer()) as producer:
            for n in range(500):
                producer.send("events", b"user%d" % (n % 11), b"%d" % n)
        until = {p: bounds.high for p, bounds in log.bounds("events").items()}

        def read(most: int) -> list[tuple[set[int], list[int]]]:
            found = []
            with closing(log.reader("events", dict.fromkeys(until, 0))) as reader:
                chunker = Chunker(Sipping(reader, most), 16, until)
                while not chunker.finished:
                    chunk = chunker.next(0.0)
                    if chunk is not None:
                        found.append((set(chunk.partition.tolist()), chunk.offset.tolist()))
            return found

        whole = read(16)
        assert whole[:3] == [({p}, list(range(16))) for p in range(3)]
        assert sum(len(offsets) for _, offsets in whole) == 500
        assert read(1) == read(5) == whole


class Sipping:
    """A reader that never takes more than so many records at once."""

    def __init__(self, reader: Reader, most: int) -> None:
        self._reader, self._most = reader, most

    def poll(self, max_records: int, timeout_s: float) -> RecordBatch:
        return self._reader.poll(min(max_records, self._most), timeout_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


# --- cutting and joining batches ---------------------------------------------------------------------------

places = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50)), max_size=12)


@given(places, st.data())
def test_rows_are_the_batchs_own(where, data):
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(where))] * 2)))
    part = rows(batch(where, keys=True), start, stop)
    assert content(part) == content(batch(where))[start:stop]
    assert part.keys == [b"k%d" % o for _, o in where[start:stop]]
    assert len(part.data) == part.bounds[-1]


@given(st.lists(places, min_size=1, max_size=4))
def test_what_is_concatenated_follows_in_order(parts):
    joined = concatenate([batch(part, keys=True) for part in parts])
    assert content(joined) == [row for part in parts for row in content(batch(part))]
    assert joined.keys == [b"k%d" % o for part in parts for _, o in part]


@given(places)
def test_a_split_batch_is_runs_of_one_partition_each(where):
    parts = list(split(batch(where)))
    assert [row for _, part in parts for row in content(part)] == content(batch(where))
    assert all({p for p, _, _ in content(part)} == {partition} for partition, part in parts)


def test_keys_are_kept_only_where_all_parts_have_them():
    assert concatenate([batch([(0, 1)], keys=True), batch([(0, 2)])]).keys is None


def test_an_empty_batch_is_one():
    assert content(empty_batch()) == []
    assert content(concatenate([empty_batch(), batch([(0, 1)])])) == content(batch([(0, 1)]))
