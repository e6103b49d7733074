"""Batches cut by offset and not by arrival, so that what is learnt does not depend on when it was read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from streaming.log import Reader, RecordBatch


def rows(batch: RecordBatch, start: int, stop: int) -> RecordBatch:
    """Rows start..stop of a batch, as views."""
    first, last = batch.bounds[start], batch.bounds[stop]
    return RecordBatch(
        partition=batch.partition[start:stop],
        offset=batch.offset[start:stop],
        timestamp_ms=batch.timestamp_ms[start:stop],
        data=batch.data[first:last],
        bounds=batch.bounds[start : stop + 1] - first,
        null=batch.null[start:stop],
        keys=None if batch.keys is None else batch.keys[start:stop],
    )


def concatenate(batches: list[RecordBatch]) -> RecordBatch:
    """Several batches end to end; at least one."""
    if len(batches) == 1:
        return batches[0]
    sizes = np.cumsum([0, *(b.bounds[-1] for b in batches)])
    bounds = [b.bounds[:-1] + at for b, at in zip(batches, sizes, strict=False)]
    keyed = all(b.keys is not None for b in batches)
    return RecordBatch(
        partition=np.concatenate([b.partition for b in batches]),
        offset=np.concatenate([b.offset for b in batches]),
        timestamp_ms=np.concatenate([b.timestamp_ms for b in batches]),
        data=np.concatenate([b.data for b in batches]),
        bounds=np.concatenate([*bounds, sizes[-1:]]).astype(np.int64),
        null=np.concatenate([b.null for b in batches]),
        keys=[key for b in batches for key in b.keys or ()] if keyed else None,
    )


def split(batch: RecordBatch) -> Iterator[tuple[int, RecordBatch]]:
    """Runs of rows of one partition, in order."""
    cuts = np.flatnonzero(np.diff(batch.partition)) + 1
    edges = [0, *cuts.tolist(), len(batch.offset)]
    for start, stop in pairwise(edges):
        if stop > start:
            yield int(batch.partition[start]), rows(batch, start, stop)


class Chunker:
    """Takes partitions in turn, a whole chunk of `size` offsets from each.

    Chunk k of a partition holds offsets k*size <= o < (k+1)*size: where it begins and ends is a property of the
    log, not of the reader. `until` cuts the last chunk of each partition short; without it, a partition whose
    chunk is not full is waited for, and the others with it.
    """

    def __init__(self, reader: Reader, size: int, until: Mapping[int, int] | None, turn: int = 0) -> None:
        self._reader = reader
        self._size = size
        self._until = until
        self._partitions = sorted(reader.position())
        self._held: dict[int, deque[RecordBatch]] = {p: deque() for p in self._partitions}
        self._read = dict(reader.position())  # next offset that is not yet held
        self._taken = dict(self._read)  # next offset to give out
        self.turn = turn % max(1, len(self._partitions))  # whose chunk is next; goes into the checkpoint

    def position(self) -> dict[int, int]:
        """Next offset to be given out, for each partition."""
        return dict(self._taken)

    @property
    def finished(self) -> bool:
        """Everything before `until` was given out."""
        until = self._until
        return until is not None and all(self._taken[p] >= until.get(p, 0) for p in self._partitions)

    def next(self, timeout_s: float) -> RecordBatch | None:
        """The next chunk, or None when the partition whose turn it is has not filled it in time."""
        for _ in self._partitions:
            partition = self._partitions[self.turn]
            end = self._end(partition)
            if self._taken[partition] < end:
                break
            self._advance()
        else:
            return None
        if self._read[partition] < end:
            self._fill(timeout_s)
        if self._read[partition] < end:
            return None
        chunk = self._take(partition, end)
        self._taken[partition] = end
        self._advance()
        return chunk

    def _end(self, partition: int) -> int:
        end = (self._taken[partition] // self._size + 1) * self._size
        return end if self._until is None else min(end, self._until.get(partition, 0))

    def _advance(self) -> None:
        self.turn = (self.turn + 1) % len(self._partitions)

    def _fill(self, timeout_s: float) -> None:
        # A partition that runs ahead is paused: what is held stays bounded.
        ahead = [p for p in self._partitions if self._read[p] - self._taken[p] > 64 * self._size]
        self._reader.pause(ahead)
        try:
            batch = self._reader.poll(self._size, timeout_s)
        finally:  # the log may be away for a while
            self._reader.resume(ahead)
        for partition, part in split(batch):
            self._held[partition].append(part)
        # The position, not the last row: offsets have holes.
        self._read.update(self._reader.position())

    def _take(self, partition: int, end: int) -> RecordBatch:
        held = self._held[partition]
        parts = []
        while held:
            part = held.popleft()
            inside = int(np.searchsorted(part.offset, end))
            if inside:
                parts.append(rows(part, 0, inside))
            if inside < len(part.offset):
                held.appendleft(rows(part, inside, len(part.offset)))
                break
        return concatenate(parts) if parts else empty_batch()


def batch_of(
    values: Sequence[bytes],
    first: int = 0,
    keys: Sequence[bytes | None] | None = None,
    logged_ms: int = 0,
) -> RecordBatch:
    """These records, of partition 0 from offset `first` on, taken in at that time; 0: nothing says when."""
    n = len(values)
    return RecordBatch(
        partition=np.zeros(n, np.int32),
        offset=np.arange(first, first + n),
        timestamp_ms=np.full(n, logged_ms, np.int64),
        data=np.frombuffer(b"".join(values), np.uint8),
        bounds=np.cumsum([0, *map(len, values)]),
        null=np.zeros(n, np.bool_),
        keys=keys,
    )


def empty_batch() -> RecordBatch:
    """No records."""
    return batch_of([])
