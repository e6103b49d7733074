"""The log on Kafka. This module and `streaming.rdkafka` alone know confluent_kafka.

Readers assign partitions by hand and start where they are told: no group, no rebalance, no stored positions.
Positions are computed from the messages handed out, never taken from librdkafka. Producers are idempotent and
place keys by murmur2, as Java's do, so that a shop's own producer and ours put one user into one partition.
`read_committed`: records of aborted transactions are never seen, and leave holes among the offsets.

Every librdkafka setting may be overridden by the caller.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeVar

import numpy as np
from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic  # type: ignore[attr-defined]

from streaming.log import (
    Bounds,
    LogError,
    LogFull,
    LogUnavailable,
    OffsetOutOfRange,
    RecordBatch,
    UnknownTopic,
)
from streaming.rdkafka import ArrayConsumer, Trouble

T = TypeVar("T")

_ANY: Final = {
    "bootstrap.servers": "",
    "client.id": "bellwether",
    "topic.metadata.refresh.interval.ms": "30000",
}
_PRODUCER: Final = {
    "enable.idempotence": "true",
    "acks": "all",
    "partitioner": "murmur2_random",
    "compression.type": "lz4",
    "linger.ms": "5",
    "queue.buffering.max.messages": "500000",
    "queue.buffering.max.kbytes": "262144",
    "delivery.report.only.error": True,
}
_CONSUMER: Final = {
    "group.id": "bellwether-readers",  # librdkafka asks for one; it is never joined and nothing is committed to it
    "enable.auto.commit": "false",
    "enable.auto.offset.store": "false",
    "auto.offset.reset": "error",
    "isolation.level": "read_committed",
    # its marks move our position over holes at the end of a partition, which no message tells of
    "enable.partition.eof": "true",
    "allow.auto.create.topics": "false",
    "queued.max.messages.kbytes": "32768",
    "fetch.wait.max.ms": "200",
    # a partition whose queue was full is not asked again for so long: a whole second by default, a third of the speed
    "fetch.queue.backoff.ms": "5",
    "reconnect.backoff.max.ms": "2000",
}
_REQUEST_S: Final = 10.0
_STALL_S: Final = 30.0
_STRANGE_S: Final = 2.0  # even an empty partition is heard of sooner, if there is one

_UNAVAILABLE: Final = {
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._TIMED_OUT,
    KafkaError._TIMED_OUT_QUEUE,
    KafkaError._MSG_TIMED_OUT,
    KafkaError._RESOLVE,
    KafkaError._WAIT_COORD,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.REPLICA_NOT_AVAILABLE,
    KafkaError.NETWORK_EXCEPTION,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError.NOT_CONTROLLER,
    KafkaError.NOT_ENOUGH_REPLICAS,
    KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
    KafkaError.OFFSET_NOT_AVAILABLE,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.KAFKA_STORAGE_ERROR,
    KafkaError.UNKNOWN,  # "unknown server error": it may go well the next time, as the Java client assumes too
}
_NO_TOPIC: Final = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
}
_OUT_OF_RANGE: Final = {KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE}

logger = logging.getLogger(__name__)


class KafkaLog:
    """A Log on the cluster at `servers` (host:port, comma-separated). Threads may share one.

    options: librdkafka settings; they win over ours. Raises: LogError for a setting that librdkafka refuses.
    """

    def __init__(self, url: str, servers: str, options: Mapping[str, str]) -> None:
        if not servers:
            raise LogError(f"{url!r} names no server; use kafka://host:9092")
        self.url = url
        self._options = dict(options)
        self._settings = {**_ANY, "bootstrap.servers": servers}
        self._admin = self._client(AdminClient, {})
        # For what is asked again and again: an admin request that waits for a broker may abort the process
        # (librdkafka 2.16, "rd_kafka_enq_once_del_source_return"), a consumer's may not.
        self._asking = self._client(Consumer, _CONSUMER)
        self._groups: dict[str, _Group] = {}
        self._lock = threading.Lock()

    def create_topic(
        self, topic: str, partitions: int, *, compacted: bool = False, retention_ms: int | None = None
    ) -> bool:
        config = {"cleanup.policy": "compact"} if compacted else {}
        if retention_ms is not None:
            config["retention.ms"] = str(retention_ms)
            config |= {"cleanup.policy": "compact,delete"} if compacted else {}
        have = self.partitions(topic)
        if have >= partitions:
            return False
        with contextlib.suppress(_Exists):
            if have:
                self._wait(self._admin.create_partitions([NewPartitions(topic, partitions)]))
            else:
                # replication factor -1: the broker's default
                new = NewTopic(topic, num_partitions=partitions, replication_factor=-1, config=config)
                self._wait(self._admin.create_topics([new]))
        self._await_leaders(topic, partitions)
        return True

    def partitions(self, topic: str, timeout_s: float = _REQUEST_S) -> int:
        try:
            found = self._asking.list_topics(topic, timeout=timeout_s).topics[topic]
        except KafkaException as error:
            raise _translated(error.args[0], topic) from error
        if found.error is not None and found.error.code() in _NO_TOPIC:
            return 0
        if found.error is not None and not found.partitions:
            raise _translated(found.error, topic)
        return len(found.partitions)

    def bounds(self, topic: str) -> dict[int, Bounds]:
        count = self.partitions(topic)
        if not count:
            raise _unknown(topic)
        return {partition: self.partition_bounds(topic, partition) for partition in range(count)}

    def partition_bounds(self, topic: str, partition: int, timeout_s: float = _REQUEST_S) -> Bounds:
        """What one partition holds now. Raises: LogUnavailable when nobody answers in time; LogError."""
        try:
            place = TopicPartition(topic, partition)
            found = self._asking.get_watermark_offsets(place, timeout=timeout_s, cached=False)
        except KafkaException as error:
            raise _translated(error.args[0], topic) from error
        if found is None:
            raise LogUnavailable(f"no broker told within {timeout_s:g} s where {topic} begins and ends")
        low, high = found
        return Bounds(low, max(low, high))

    def reader(self, topic: str, offsets: Mapping[int, int], *, keys: bool = False) -> KafkaReader:
        errors = _ClientErrors()
        consumer = self._client(ArrayConsumer, {**_CONSUMER, "error_cb": errors})
        return KafkaReader(consumer, errors, self, topic, offsets, keys)

    def producer(self) -> KafkaProducer:
        return KafkaProducer(
            lambda failed: self._client(Producer, {**_PRODUCER, "on_delivery": failed}), self
        )

    def commit(self, group: str, topic: str, offsets: Mapping[int, int]) -> None:
        places = [TopicPartition(topic, partition, offset) for partition, offset in offsets.items()]
        self._group(group).commit(topic, places)

    def committed(self, group: str, topic: str) -> dict[int, int]:
        places = [TopicPartition(topic, partition) for partition in range(self.partitions(topic))]
        return self._group(group).committed(topic, places) if places else {}

    def close(self) -> None:
        with self._lock:
            groups, self._groups = list(self._groups.values()), {}
        for group in groups:
            group.close()

    def _group(self, name: str) -> _Group:
        with self._lock:
            if name not in self._groups:
                self._groups[name] = _Group(
                    lambda told: self._client(Consumer, {**_CONSUMER, "group.id": name, "on_commit": told})
                )
            return self._groups[name]

    def _client(self, make: Callable[..., T], settings: Mapping[str, Any]) -> T:
        try:
            return make({**self._settings, **settings, **self._options}, logger=logger)
        except (KafkaException, TypeError, ValueError) as error:
            reason = error.args[0].str() if isinstance(error, KafkaException) else error
            raise LogError(f"Kafka client refuses its settings: {reason}") from error

    def _await_leaders(self, topic: str, partitions: int, timeout_s: float = 30.0) -> None:
        """A topic that was just made cannot be used at once."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(UnknownTopic, LogUnavailable):
                if len(self.bounds(topic)) >= partitions:
                    return
            if time.monotonic() > deadline:
                raise LogUnavailable(f"topic {topic!r} was created but has no leaders after {timeout_s} s")
            time.sleep(0.05)

    def _wait(self, futures: Mapping[Any, Future[Any]]) -> Any:
        """The result of a request about one thing."""
        (future,) = futures.values()
        return _result(future)


class _Group:
    """Offsets of a consumer group that nobody joins; for lag graphs."""

    def __init__(self, make: Callable[[Callable[..., None]], Consumer]) -> None:
        self._told: list[KafkaError | None] = []
        self._lock = threading.Lock()  # one commit at a time, so that an answer is that to ours
        self._consumer = make(self._hear)

    def _hear(self, error: KafkaError | None, places: Sequence[TopicPartition]) -> None:
        refused = (place.error for place in places if place.error is not None)
        self._told.append(error or next(refused, None))

    def commit(self, topic: str, places: Sequence[TopicPartition]) -> None:
        """Raises: LogUnavailable when nobody answers in time; LogError."""
        with self._lock:
            self._told.clear()
            deadline = time.monotonic() + _REQUEST_S
            try:
                # not synchronously: that has no timeout
                self._consumer.commit(offsets=list(places), asynchronous=True)
            except KafkaException as error:
                raise _translated(error.args[0], topic) from error
            while not self._told:
                if time.monotonic() > deadline:
                    raise LogUnavailable(f"offsets of {topic!r} were not committed within {_REQUEST_S:g} s")
                self._consumer.poll(0.05)
            if (refused := self._told[0]) is not None:
                raise _translated(refused, topic)

    def committed(self, topic: str, places: Sequence[TopicPartition]) -> dict[int, int]:
        """Raises: LogUnavailable, LogError."""
        try:
            found = self._consumer.committed(list(places), timeout=_REQUEST_S)
        except KafkaException as error:
            raise _translated(error.args[0], topic) from error
        return {place.partition: place.offset for place in found if place.offset >= 0}

    def close(self) -> None:
        """Let go."""
        self._consumer.close()


class KafkaProducer:
    """Hands records to librdkafka, whose own threads send them; one of ours collects what was refused.

    A record that cannot be delivered within `delivery.timeout.ms` (5 minutes) has failed.
    """

    def __init__(self, make: Callable[[Callable[..., None]], Producer], log: KafkaLog) -> None:
        self._producer = make(self._refused)
        self._log = log
        self._topics: set[str] = set()
        self._failed = self._failed_told = 0
        self._refusals = 0  # since `flush` told; the others failed because nobody answered
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="kafka-producer", daemon=True)
        self._thread.start()

    def send(self, topic: str, key: bytes, value: bytes | None, timestamp_ms: int | None = None) -> None:
        if self._closed.is_set():
            raise LogError("this producer is closed")
        if topic not in self._topics:
            # librdkafka would let the broker create it, with one partition
            if not self._log.partitions(topic):
                raise _unknown(topic)
            self._topics.add(topic)
        try:
            self._producer.produce(topic, value, key, timestamp=timestamp_ms or 0)
        except BufferError:
            raise LogFull(
                f"{len(self._producer):,} records wait to be sent to {self._log.url}; flush or wait"
            ) from None
        except KafkaException as error:
            if error.args[0].code() == KafkaError.MSG_SIZE_TOO_LARGE:
                size = len(key) + len(value or b"")
                raise LogError(f"record of {size:,} bytes for {topic!r} is over message.max.bytes") from error
            raise _translated(error.args[0], topic) from error

    def flush(self, timeout_s: float = 30.0) -> int:
        left = int(self._producer.flush(timeout_s))
        lost, self._failed_told = self._failed - self._failed_told, self._failed
        refusals, self._refusals = self._refusals, 0
        if lost:
            raise (LogError if refusals else LogUnavailable)(
                f"{lost} records could not be written to {self._log.url}; see the log"
            )
        return left

    @property
    def failed(self) -> int:
        return self._failed

    def close(self, timeout_s: float = 30.0) -> None:
        if self._closed.is_set():
            return
        try:
            left = self.flush(timeout_s)
        finally:
            self._closed.set()
            self._thread.join()
        if left:
            raise LogError(f"{left} records were not written to {self._log.url} within {timeout_s} s")

    def _serve(self) -> None:
        while not self._closed.is_set():
            self._producer.poll(0.1)

    def _refused(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._failed += 1
            self._refusals += not isinstance(_translated(error), LogUnavailable)
            logger.error("a record for %s was lost: %s", message.topic(), error.str())


class _ClientErrors:
    """librdkafka's errors that belong to no message; what matters to a reader is that nobody can be reached."""

    def __init__(self) -> None:
        self.down: str | None = None

    def __call__(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN or error.fatal():
            self.down = error.str()
        else:
            logger.debug("%s", error.str())


class KafkaReader:
    """Reads partitions of one topic. Survives restarts of the brokers: LogUnavailable until one answers again."""

    def __init__(
        self,
        consumer: ArrayConsumer,
        errors: _ClientErrors,
        log: KafkaLog,
        topic: str,
        offsets: Mapping[int, int],
        keys: bool,
    ) -> None:
        self._consumer, self._errors, self._log = consumer, errors, log
        self._topic, self._keys = topic, keys
        self._next = dict(offsets)
        self._paused: set[int] = set()
        self._broken: dict[int, LogError] = {}  # raised until somebody seeks
        self._heard: dict[int, float] = {}  # when a partition last gave something, or was started
        self._silent: set[int] = set()  # gave nothing since it was started
        self.stall_s = _STALL_S  # a partition that is silent for longer is looked into
        self._closed = False
        self._start()

    def poll(self, max_records: int, timeout_s: float) -> RecordBatch:
        if self._closed:
            raise LogError("this reader is closed")
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            records, troubles = self._consumer.take(max_records, max(left_s, 0.0), keys=self._keys)
            self._advance(records)
            for trouble in troubles:
                self._note(trouble)
            if len(records.offset):
                self._errors.down = None
                return records
            if self._broken:
                raise next(iter(self._broken.values()))
            if not troubles:
                self._look_after(max(0.1, min(1.0, deadline - time.monotonic())))
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
        elif partition in self._next and code in _NO_TOPIC:
            self._broken[partition] = UnknownTopic(
                f"there is no {self._topic!r} partition {partition}; create it with `streaming topics`"
            )
        elif code in _UNAVAILABLE or error.retriable():
            logger.info("%s: %s", self._topic, error.str())
        else:
            self._broken[partition] = _translated(error, self._topic)

    def _hear(self, partition: int) -> None:
        self._heard[partition] = time.monotonic()
        self._silent.discard(partition)

    def _check(self, timeout_s: float) -> None:
        """A reader must not seem idle where there is no broker, no topic or no partition."""
        there = range(self._log.partitions(self._topic, timeout_s))
        self._errors.down = None
        for partition in self._next.keys() - there:
            self._broken[partition] = UnknownTopic(
                f"there is no {self._topic!r} partition {partition}; create it with `streaming topics`"
            )

    def _look_after(self, timeout_s: float) -> None:
        """Find out why partitions are silent; nothing came just now."""
        now = time.monotonic()
        silence = {p: now - self._heard[p] for p in self._next if p not in self._paused}
        if self._errors.down is not None or any(silence.get(p, 0) > _STRANGE_S for p in self._silent):
            self._check(timeout_s)
            self._silent.clear()
        if silence and max(silence.values()) > self.stall_s:
            self._look_into(max(silence, key=silence.__getitem__), timeout_s)

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


class _Exists(LogError):
    """Another process created it first."""


def _result(future: Future[Any]) -> Any:
    try:
        return future.result(timeout=6 * _REQUEST_S)
    except KafkaException as error:
        raise _translated(error.args[0]) from error
    except TimeoutError as error:
        raise LogUnavailable("Kafka did not answer; retry") from error


def _translated(error: KafkaError, topic: str | None = None) -> LogError:
    """librdkafka's error as one of ours."""
    code = error.code()
    if code in _NO_TOPIC:
        return _unknown(topic) if topic else UnknownTopic(f"{error.str()}; create it with `streaming topics`")
    if code == KafkaError.TOPIC_ALREADY_EXISTS:
        return _Exists(error.str())
    return (LogUnavailable if code in _UNAVAILABLE or error.retriable() else LogError)(
        f"Kafka: {error.str()}"
    )


def _unknown(topic: str) -> UnknownTopic:
    return UnknownTopic(f"there is no topic {topic!r}; create it with `streaming topics`")
