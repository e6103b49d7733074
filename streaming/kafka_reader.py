"""Reading Kafka: partitions assigned by hand, positions computed from the records handed out.

librdkafka goes on at the old offset where a topic was deleted and made anew; it says so only in its debug log, which
every reader of ours therefore listens to.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

import numpy as np
from confluent_kafka import KafkaError

from streaming.kafka_errors import NO_TOPIC, UNAVAILABLE, ClientLines, Refusals, translated
from streaming.log import (
    Bounds,
    LogError,
    LogUnavailable,
    OffsetOutOfRange,
    RecordBatch,
    no_topic,
    replaced,
)
from streaming.rdkafka import ArrayConsumer, Trouble

_STALL_S: Final = 30.0
_STRANGE_S: Final = 2.0  # even an empty partition is heard of sooner, if there is one
NO_ID: Final = "A" * 22
_CHANGED_ID: Final = re.compile(r"Topic (\S+) changed id from (\S+) to (\S+)")
_OUT_OF_RANGE: Final = {KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE}

logger = logging.getLogger(__name__)


class Broker(Protocol):
    """Whom a reader asks about silent partitions."""

    def partitions(self, topic: str, timeout_s: float) -> int:
        """How many partitions the topic has; 0 when there is no such topic."""

    def partition_bounds(self, topic: str, partition: int, timeout_s: float) -> Bounds:
        """What one partition holds now."""


class TopicIds:
    """A reader's log: what librdkafka says goes on to ours, but for its news on the ids that topics have.

    These lines come before any record of the topic with the new id does, in the same queue.
    """

    def __init__(self, lines: ClientLines, topic: str, known: str) -> None:
        self._lines, self._topic, self.known = lines, topic, known  # empty: not heard yet
        self.error: LogError | None = None
        self._chatty = logger.isEnabledFor(logging.DEBUG)

    def log(self, level: int, text: str, *arguments: Any) -> None:
        """Called by confluent_kafka, within `poll` and `consume`."""
        if level > logging.DEBUG or self._chatty:
            self._lines.log(level, text, *arguments)
        if found := _CHANGED_ID.search(str(arguments[-1])):
            topic, _, now = found.groups()
            if topic == self._topic and now != NO_ID:
                self.known = self.known or now
                if now != self.known and self.error is None:
                    self.error = replaced(topic, self.known, now)


class KafkaReader:
    """Reads partitions of one topic. Survives restarts of the brokers: LogUnavailable until one answers again."""

    def __init__(
        self,
        consumer: ArrayConsumer,
        errors: Refusals,
        ids: TopicIds,
        log: Broker,
        topic: str,
        offsets: Mapping[int, int],
        keys: bool,
    ) -> None:
        self._consumer, self._errors, self._ids, self._log = consumer, errors, ids, log
        self._topic, self._keys = topic, keys
        self._next = dict(offsets)
        self._paused: set[int] = set()
        self._broken: dict[int, LogError] = {}  # raised until somebody seeks, or it passes: see `_hear`
        self._heard: dict[int, float] = {}  # when a partition last gave something, or was started
        self._silent: set[int] = set()  # gave nothing since it was started
        self._gave = False  # records, since an error was raised
        self.stall_s = _STALL_S  # a partition that is silent for longer is looked into
        self._closed = False
        self._start()

    def poll(self, max_records: int, timeout_s: float) -> RecordBatch:
        if self._closed:
            raise LogError("this reader is closed")
        if self._broken and self._gave:  # in between: the others might give something each time
            self._gave = False
            raise next(iter(self._broken.values()))
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            records, troubles = self._consumer.take(max_records, max(left_s, 0.0), keys=self._keys)
            if self._ids.error is not None:
                raise self._ids.error
            self._advance(records)
            for trouble in troubles:
                self._note(trouble)
            if len(records.offset):
                self._errors.clear()
                self._gave = True
                if len(records.offset) + len(troubles) < max_records:  # else there may be more of all at hand
                    self._look_for_stalls(_asking_s(deadline))
                return records
            if self._broken:
                raise next(iter(self._broken.values()))
            if not troubles:
                self._look_after(_asking_s(deadline))
            if time.monotonic() >= deadline:
                return records

    def position(self) -> dict[int, int]:
        return dict(self._next)

    def seek(self, offsets: Mapping[int, int]) -> None:
        if strangers := offsets.keys() - self._next.keys():
            raise LogError(
                f"cannot seek in partitions {sorted(strangers)}, which this reader is not assigned"
            )
        self._next.update(offsets)
        for partition in offsets:
            self._broken.pop(partition, None)
        self._start()

    def assign(self, offsets: Mapping[int, int]) -> None:
        self._next = {partition: self._next.get(partition, offset) for partition, offset in offsets.items()}
        self._paused &= self._next.keys()
        self._broken = {
            partition: error for partition, error in self._broken.items() if partition in self._next
        }
        self._start()

    def pause(self, partitions: Iterable[int]) -> None:
        new = set(partitions) & self._next.keys() - self._paused
        self._paused |= new
        self._consumer.pause(self._topic, new)

    def resume(self, partitions: Iterable[int]) -> None:
        again = set(partitions) & self._paused
        self._paused -= again
        self._consumer.resume(self._topic, again)
        self._heard |= dict.fromkeys(again, time.monotonic())

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._consumer.close()

    def _start(self) -> None:
        """(Re)start fetching at our positions; what librdkafka has fetched is forgotten.

        One way for every move: its own `seek` refuses partitions that are not being fetched just now.
        """
        self._consumer.assign(self._topic, self._next)
        self._consumer.resume(self._topic, self._next.keys() - self._paused)
        self._consumer.pause(self._topic, self._paused)
        self._heard = dict.fromkeys(self._next, time.monotonic())
        self._silent = set(self._next)

    def _advance(self, records: RecordBatch) -> None:
        for partition in np.unique(records.partition).tolist():
            last = int(records.offset[records.partition == partition][-1])
            self._next[partition] = max(self._next[partition], last + 1)
            self._hear(partition)

    def _note(self, trouble: Trouble) -> None:
        """Where a partition ends, our position follows; errors are kept for later."""
        if trouble.error.code() != KafkaError._PARTITION_EOF:
            self._keep(trouble.error, trouble.partition)
        elif trouble.partition in self._next:
            # after the records before it, which are in this batch or were in an earlier one
            self._next[trouble.partition] = max(self._next[trouble.partition], trouble.offset)
            self._hear(trouble.partition)

    def _keep(self, error: KafkaError, partition: int) -> None:
        code = error.code()
        if partition in self._next and code in _OUT_OF_RANGE:
            self._broken[partition] = OffsetOutOfRange(
                f"{self._topic}/{partition} does not hold offset {self._next[partition]}; seek to where to go on"
            )
        elif partition in self._next and code in NO_TOPIC:
            self._broken[partition] = no_topic(self._topic, partition)
        elif code == KafkaError.GROUP_AUTHORIZATION_FAILED:
            logger.debug("%s: %s", self._topic, error.str())  # of a group that readers have by name only
        elif code in UNAVAILABLE or error.retriable():
            logger.info("%s: %s", self._topic, error.str())
        else:
            self._broken[partition] = translated(error, self._topic)

    def _hear(self, partition: int) -> None:
        self._heard[partition] = time.monotonic()
        self._silent.discard(partition)
        if not isinstance(self._broken.get(partition), OffsetOutOfRange):  # what is gone does not come back
            self._broken.pop(partition, None)

    def _check(self, timeout_s: float) -> None:
        """A reader must not seem idle where there is no broker, no topic or no partition."""
        try:
            there = range(self._log.partitions(self._topic, timeout_s))
        except LogUnavailable as error:
            raise self._errors.error(str(error)) from error
        self._errors.clear()
        for partition in self._next.keys() - there:
            self._broken[partition] = no_topic(self._topic, partition)

    def _look_after(self, timeout_s: float) -> None:
        """Find out why partitions are silent; nothing came just now."""
        silence = self._silence()
        if self._errors.down is not None or any(silence.get(p, 0) > _STRANGE_S for p in self._silent):
            self._check(timeout_s)
            self._silent.clear()
        self._look_for_stalls(timeout_s)

    def _look_for_stalls(self, timeout_s: float) -> None:
        """Look into the partition that has been silent longest, if that is long; nothing of it is at hand."""
        silence = self._silence()
        if silence and max(silence.values()) > self.stall_s:
            self._look_into(max(silence, key=silence.__getitem__), timeout_s)

    def _silence(self) -> dict[int, float]:
        """For how long nothing came of each partition that is read, s."""
        now = time.monotonic()
        return {p: now - self._heard[p] for p in self._next if p not in self._paused}

    def _look_into(self, partition: int, timeout_s: float) -> None:
        """Ask the broker what a silent partition holds: librdkafka has been seen to stall, and where a partition ends
        it knows from the last fetch only."""
        self._heard[partition] = time.monotonic()
        try:
            high = self._log.partition_bounds(self._topic, partition, timeout_s).high
        except LogError as error:
            logger.info("%s/%d is silent: %s", self._topic, partition, error)
            return
        if high > self._next[partition]:
            where, there = f"{self._topic}/{partition}", self._next[partition]
            logger.warning("%s: nothing since %d though it ends at %d; fetching anew", where, there, high)
            self._start()


def _asking_s(deadline: float) -> float:
    """How long a broker may take to answer within a poll that ends then."""
    return max(0.1, min(1.0, deadline - time.monotonic()))
