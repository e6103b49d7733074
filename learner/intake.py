"""Records on their way into the learner: each once, its letter if it is a bad one, and in its turn if it must wait.

A record whose schema the registry cannot be asked for now is parked, and what follows it in its partition with it;
the other partitions go on. Letters that could not be written wait for their log, and all reading with them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np

from learner.learner import Learner, Taken
from streaming.chunks import concatenate, split
from streaming.dead_letters import DeadLetters
from streaming.log import Reader, RecordBatch
from streaming.schemas import RegistryUnavailable
from streaming.transitions import Rejects

logger = logging.getLogger(__name__)


class Source(Protocol):
    """Where batches come from: `Arrivals`, or a `streaming.chunks.Chunker` where they are cut by offset."""

    turn: int  # whose chunk is next, where batches are cut by offset; goes into the checkpoint

    def next(self, timeout_s: float) -> RecordBatch | None:
        """The next batch; None or an empty one when none came in time."""

    def position(self) -> dict[int, int]:
        """Next offset to be given out, for each partition."""


class Arrivals:
    """Batches as they come."""

    def __init__(self, reader: Reader, most: int) -> None:
        self._reader, self._most = reader, most
        self.turn = 0

    def next(self, timeout_s: float) -> RecordBatch:
        """Up to `most` records, waiting at most so long for the first."""
        return self._reader.poll(self._most, timeout_s)

    def position(self) -> dict[int, int]:
        """See Source."""
        return self._reader.position()

    def seek(self, offsets: Mapping[int, int]) -> None:
        """Go on from these offsets in these partitions."""
        self._reader.seek(offsets)

    def add(self, offsets: Mapping[int, int]) -> None:
        """Give out these partitions too, from these offsets on."""
        self._reader.assign({**self._reader.position(), **offsets})

    def pause(self, partitions: Iterable[int]) -> None:
        """Give out nothing of these until `resume`."""
        self._reader.pause(partitions)

    def resume(self, partitions: Iterable[int]) -> None:
        """Undo `pause`."""
        self._reader.resume(partitions)


class Intake:
    """Takes what a source gives into a learner. One thread's.

    taken: told of each batch once it is in.
    """

    def __init__(
        self,
        learner: Learner,
        source: Source,
        letters: DeadLetters,
        taken: Callable[[RecordBatch, Taken], None],
    ) -> None:
        self._learner, self._source, self._letters, self._tell = learner, source, letters, taken
        self._parked: dict[int, RecordBatch] = {}
        self._unwritten: deque[tuple[RecordBatch, Rejects]] = deque()  # rows that have no letter yet

    @property
    def parked(self) -> list[int]:
        """Partitions that wait for the registry."""
        return sorted(self._parked)

    @property
    def whole(self) -> bool:
        """Whether `position` tells all: a source that cuts by offset has moved on to the next turn already."""
        return not self._unwritten and (not self._parked or isinstance(self._source, Arrivals))

    def position(self) -> dict[int, int]:
        """Next offset to be taken, for each partition."""
        waiting = {partition: int(batch.offset[0]) for partition, batch in self._parked.items()}
        return {**self._source.position(), **waiting}

    def read(self, timeout_s: float) -> None:
        """One batch, if there is one within the timeout.

        Raises: LogUnavailable, try again; UnknownTopic, OffsetOutOfRange and LogError, for good.
        """
        self._write_letters()
        if not self.whole:  # chunks are taken in order of the turns, or not at all
            time.sleep(timeout_s)
            return
        batch = self._source.next(timeout_s)
        if batch is not None and len(batch):
            self._take_or_park(batch)
            self._write_letters()

    def retry(self) -> None:
        """Take what is parked, where the registry answers by now. Raises: as `read`."""
        for partition, batch in sorted(self._parked.items()):
            try:
                self._take(batch)
            except RegistryUnavailable:
                continue
            del self._parked[partition]
            if isinstance(self._source, Arrivals):
                self._source.resume([partition])
            logger.info("partition %d goes on: the registry answers", partition)
            self._write_letters()

    def _take_or_park(self, batch: RecordBatch) -> None:
        try:
            return self._take(batch)
        except RegistryUnavailable as error:
            logger.debug("%s", error)
        for partition, part in _by_partition(batch):
            try:
                self._take(part)
            except RegistryUnavailable as error:
                self._park(partition, part, error)

    def _take(self, batch: RecordBatch) -> None:
        """All of the batch or, where the registry cannot be asked, nothing of it."""
        taken = self._learner.take(batch)
        for rejects in (taken.bad, taken.joined.late):
            if len(rejects.row):
                self._unwritten.append((batch, rejects))
        self._tell(batch, taken)

    def _park(self, partition: int, batch: RecordBatch, error: RegistryUnavailable) -> None:
        self._parked[partition] = batch
        if isinstance(self._source, Arrivals):
            self._source.pause([partition])
        logger.warning("partition %d waits from offset %d on: %s", partition, batch.offset[0], error)

    def _write_letters(self) -> None:
        """What was taken must not be taken again, so a letter that fails is tried again by itself."""
        while self._unwritten:
            batch, rejects = self._unwritten[0]
            self._letters.write(batch, rejects.row, rejects.reason)
            self._unwritten.popleft()


def _by_partition(batch: RecordBatch) -> list[tuple[int, RecordBatch]]:
    """Each partition's records, in order."""
    runs: dict[int, list[RecordBatch]] = {int(partition): [] for partition in np.unique(batch.partition)}
    for partition, run in split(batch):
        runs[partition].append(run)
    return [(partition, concatenate(parts)) for partition, parts in runs.items()]
