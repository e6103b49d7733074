"""What could not be used, kept as it came: `TOPIC.dlq`, and `TOPIC.late` for what came too late.

`streaming tail` shows the letters, `streaming redrive` puts back those that can be used by now.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streaming.columns import Reason
from streaming.log import LogError, LogFull, LogUnavailable, Producer, RecordBatch, UnknownTopic
from streaming.schemas import DEAD_LETTER, Codec

CUT_BYTES: Final = 65_536  # what is kept of a value that does not fit into a letter
HELD_BYTES: Final = 32 << 20  # of letters that are not known to be durable
AGAIN: Final = 256  # letters at once that are written again

logger = logging.getLogger(__name__)


def dlq_topic(topic: str) -> str:
    """Where records of `topic` go that cannot be read."""
    return f"{topic}.dlq"


def late_topic(topic: str) -> str:
    """Where records of `topic` go that came too late."""
    return f"{topic}.late"


class DeadLetters:
    """Writes dead letters for records of one topic, each at least once.

    A letter is its record and a little more, so it may be larger than the log takes: then the value's first
    CUT_BYTES go into it, and its reason says how long the value was. Letters are held until `flush` has seen them
    durable: one that the log lost or refused after it was queued is written again.
    """

    def __init__(self, producer: Producer, codec: Codec, topic: str) -> None:
        self._producer, self._codec, self._topic = producer, codec, topic
        self._held: deque[_Letter] = deque()  # queued, not known to be durable
        self._held_bytes = 0
        self._doubtful = False  # some of those held were lost; which, nobody tells

    def write(self, batch: RecordBatch, rows: npt.NDArray[np.int64], reasons: npt.NDArray[np.uint8]) -> None:
        """Queue letters for these rows of the batch, for the streaming.columns.Reason of each.

        Waits while the producer's queue is full. Raises: LogUnavailable (write the same again); UnknownTopic where
        the topics of dead letters are missing; LogError when the log takes not even a cut letter.
        """
        for row, reason in zip(rows.tolist(), reasons.tolist(), strict=True):
            letter = self._letter(batch, row, Reason(reason))
            self._queue(letter, self._send)
            self._held.append(letter)
            self._held_bytes += letter.size
            if self._held_bytes > HELD_BYTES:
                self.flush()

    def flush(self, timeout_s: float = 30.0) -> None:
        """Wait until all letters are durable. Raises: LogUnavailable when they are not, they stay held; LogError."""
        if not self._doubtful:
            try:
                self._await(timeout_s)
                self._held.clear()
            except LogUnavailable:
                raise
            except LogError as error:
                logger.warning("%s", error)
                self._doubtful = True
        if self._doubtful:
            self._write_again(timeout_s)
        self._held_bytes = 0

    def _write_again(self, timeout_s: float) -> None:
        """All that are held, some at once; where one is refused, fewer, until it is alone, and is cut short."""
        logger.warning("writing the last %d dead letters of %s again", len(self._held), self._topic)
        with contextlib.suppress(LogError):  # of what is queued from before
            self._producer.flush(timeout_s)
        count, suspect = AGAIN, 0  # letters at once; and those among which one was refused
        while self._held:
            letters = list(islice(self._held, count))
            if len(letters) == 1:
                self._queue(letters[0], lambda t, k, v: self._send_and_await(t, k, v, timeout_s))
            elif not self._all_durable(letters, timeout_s):
                count, suspect = len(letters) // 2, len(letters)
                continue
            for _ in letters:
                self._held.popleft()
            suspect -= len(letters)
            if suspect <= 0:
                count = AGAIN
        self._doubtful = False

    def _all_durable(self, letters: Sequence[_Letter], timeout_s: float) -> bool:
        """Send them and wait; False: the log refused one. Raises: LogUnavailable."""
        self._doubtful = False  # `_send` says so again, where it finds out
        try:
            for letter in letters:
                self._queue(letter, self._send)
            self._await(timeout_s)
            return not self._doubtful
        except (UnknownTopic, LogUnavailable):
            raise
        except LogError as error:
            logger.warning("%s", error)
            return False
        finally:
            self._doubtful = True  # until none is held

    def _letter(self, batch: RecordBatch, row: int, reason: Reason) -> _Letter:
        return _Letter(
            late_topic(self._topic) if reason == Reason.LATE else dlq_topic(self._topic),
            reason.name,
            int(batch.partition[row]),
            int(batch.offset[row]),
            int(batch.timestamp_ms[row]),
            batch.keys[row] if batch.keys is not None else None,
            batch.value(row),
        )

    def _queue(self, letter: _Letter, send: Callable[[str, bytes, bytes], None]) -> None:
        """Send the letter, or the longest form of it that the log takes."""
        refused: LogError | None = None
        for form in letter.forms():
            record = form._asdict() | {"topic": self._topic}
            try:
                return send(letter.topic, form.log_key(), self._codec.encode(DEAD_LETTER, record))
            except (UnknownTopic, LogUnavailable):
                raise
            except LogError as error:  # too large
                refused = error
                logger.warning("a dead letter of %s is cut short: %s", self._topic, error)
        assert refused is not None
        raise refused

    def _send(self, topic: str, key: bytes, value: bytes) -> None:
        while True:
            try:
                return self._producer.send(topic, key, value)
            except LogFull:
                try:
                    self._producer.flush(1.0)
                except LogError:
                    self._doubtful = True  # `flush` will write them again

    def _send_and_await(self, topic: str, key: bytes, value: bytes, timeout_s: float) -> None:
        self._send(topic, key, value)
        self._await(timeout_s)

    def _await(self, timeout_s: float) -> None:
        try:
            left = self._producer.flush(timeout_s)
        except LogUnavailable:  # lost for want of a log, not refused: they must be written again
            self._doubtful = True
            raise
        if left:
            raise LogUnavailable(
                f"{left} dead letters of {self._topic} were not written within {timeout_s} s"
            )


class _Letter(NamedTuple):
    """A dead letter, and the topic that it goes to."""

    topic: str
    reason: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        return len(self.key or b"") + len(self.value or b"") + 200

    def forms(self) -> Iterator[_Letter]:
        """The letter, and shorter ones to fall back to."""
        yield self
        short = self
        if self.value is not None:
            reason = f"{self.reason}, cut from {len(self.value)} bytes"
            short = self._replace(value=self.value[:CUT_BYTES], reason=reason)
            yield short
        yield short._replace(key=None)  # a key of such a size is no user's

    def log_key(self) -> bytes:
        """What the log is to file it under."""
        return self.key or f"{self.partition}-{self.offset}".encode()
