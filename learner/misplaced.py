"""Users whose records lie in another partition than their user_id's: one is named, so that its producer can be found.

Such a user's deeds never meet their decisions. The decoder marks each of their records by hashing the user_id, which
costs nothing to speak of; keys are not read. A key that is not the user and still hashes to the right partition does
no harm, and is not noticed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from streaming.columns import Columns
from streaming.log import Log, LogError, RecordBatch, partition_of
from streaming.schemas import Codec

EVERY_S: Final = 60.0  # between two lines
_SHOWN: Final = 100  # characters of an id
_READ_S: Final = 5.0

logger = logging.getLogger(__name__)


class Misplaced:
    """Says now and then which user that was, in which partition, at which offset, under which key.

    The record is read again, with its key, in a thread of its own. clock: monotonic seconds.
    """

    def __init__(
        self, log: Log, topic: str, codec: Codec, partitions: Callable[[], int], clock: Callable[[], float]
    ) -> None:
        self._log, self._topic, self._codec = log, topic, codec
        self._partitions, self._clock = partitions, clock
        self._count = 0  # since the last line
        self._due = clock()
        self._naming: threading.Thread | None = None

    def look(self, batch: RecordBatch, columns: Columns) -> None:
        """Note those of a batch."""
        rows = np.flatnonzero(columns.misplaced)
        self._count += len(rows)
        if len(rows) and self._clock() >= self._due:
            self._due = self._clock() + EVERY_S
            row, count, self._count = int(rows[0]), self._count, 0
            example = int(batch.partition[row]), int(batch.offset[row]), count
            self._naming = threading.Thread(target=self._name, args=example, name="misplaced", daemon=True)
            self._naming.start()

    def close(self) -> None:
        """Wait for a line that is being written."""
        if self._naming is not None:
            self._naming.join(2 * _READ_S)

    def _name(self, partition: int, offset: int, count: int) -> None:
        where = f"{self._topic}/{partition} offset {offset}"
        try:
            key, user = self._read(partition, offset)
        except LogError as error:
            logger.warning("%s is of a user who belongs in another partition (%s)", where, error)
            return
        home = partition_of(user.encode(), self._partitions())
        why = (
            "its key is the user_id, so its producer hashes keys in another way: partitioner=murmur2_random"
            if key == user.encode()
            else f"its key is {_short(key)}, and should be the user_id"
        )
        logger.warning(
            "%s is of user %s, who belongs in partition %d: %s (%d such records since the last such line)",
            *(where, _short(user), home, why, count),
        )

    def _read(self, partition: int, offset: int) -> tuple[bytes | None, str]:
        """The record's key and user. Raises: LogError."""
        reader = self._log.reader(self._topic, {partition: offset}, keys=True)
        try:
            batch = reader.poll(1, _READ_S)
        finally:
            reader.close()
        if not len(batch) or batch.keys is None:
            raise LogError("it could not be read again")
        _, record = self._codec.decode(batch.value(0) or b"")
        return batch.keys[0], str(record["user_id"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
