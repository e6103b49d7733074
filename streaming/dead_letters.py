"""What could not be used, kept as it came: `TOPIC.dlq`, and `TOPIC.late` for what came too late.

`streaming tail` shows the letters, `streaming redrive` puts back those that can be used by now.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from streaming.columns import Reason
from streaming.log import LogError, LogFull, LogUnavailable, Producer, RecordBatch, UnknownTopic
from streaming.schemas import DEAD_LETTER, Codec

CUT_BYTES: Final = 65_536  # what is kept of a value that does not fit into a letter

logger = logging.getLogger(__name__)


def dlq_topic(topic: str) -> str:
    """Where records of `topic` go that cannot be read."""
    return f"{topic}.dlq"


def late_topic(topic: str) -> str:
    """Where records of `topic` go that came too late."""
    return f"{topic}.late"


class DeadLetters:
    """Writes dead letters for records of one topic.

    A letter is its record and a little more, so it may be larger than the log takes: then the value's first
    CUT_BYTES go into it, and its reason says how long the value was.
    """

    def __init__(self, producer: Producer, codec: Codec, topic: str) -> None:
        self._producer, self._codec, self._topic = producer, codec, topic

    def write(self, batch: RecordBatch, rows: npt.NDArray[np.int64], reasons: npt.NDArray[np.uint8]) -> None:
        """Queue letters for these rows of the batch, for the streaming.columns.Reason of each.

        Waits while the producer's queue is full. Raises: UnknownTopic where the topics of dead letters are
        missing; LogError when the log takes not even a cut letter.
        """
        for row, reason in zip(rows.tolist(), reasons.tolist(), strict=True):
            self._write(batch, row, Reason(reason))

    def flush(self, timeout_s: float = 30.0) -> None:
        """Wait until all letters are durable. Raises: LogError when they are not."""
        if left := self._producer.flush(timeout_s):
            raise LogUnavailable(
                f"{left} dead letters of {self._topic} were not written within {timeout_s} s"
            )

    def _write(self, batch: RecordBatch, row: int, reason: Reason) -> None:
        topic = late_topic(self._topic) if reason == Reason.LATE else dlq_topic(self._topic)
        refused: LogError | None = None
        for letter in self._letters(batch, row, reason):
            key = letter["key"] or f"{letter['partition']}-{letter['offset']}".encode()
            try:
                return self._send(topic, key, self._codec.encode(DEAD_LETTER, letter))
            except (UnknownTopic, LogUnavailable):
                raise
            except LogError as error:  # too large
                refused = error
                logger.warning("a dead letter of %s is cut short: %s", self._topic, error)
        assert refused is not None
        raise refused

    def _letters(self, batch: RecordBatch, row: int, reason: Reason) -> Iterator[dict[str, Any]]:
        """The letter, and shorter ones to fall back to."""
        value = batch.value(row)
        letter = {
            "reason": reason.name,
            "topic": self._topic,
            "partition": int(batch.partition[row]),
            "offset": int(batch.offset[row]),
            "timestamp": int(batch.timestamp_ms[row]),
            "key": batch.keys[row] if batch.keys is not None else None,
            "value": value,
        }
        yield letter
        if value is not None:
            letter |= {"value": value[:CUT_BYTES], "reason": f"{reason.name}, cut from {len(value)} bytes"}
            yield letter
        yield letter | {"key": None}  # a key of such a size is no user's

    def _send(self, topic: str, key: bytes, value: bytes) -> None:
        while True:
            try:
                return self._producer.send(topic, key, value)
            except LogFull:
                self._producer.flush(1.0)
