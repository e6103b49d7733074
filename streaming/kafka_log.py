"""The log on Kafka. This module and `streaming.rdkafka` alone know confluent_kafka.

Readers assign partitions by hand and start where they are told: no group, no rebalance, no stored positions.
Positions are computed from the messages handed out, never taken from librdkafka. Producers are idempotent and
place keys by murmur2, as Java's do, so that a shop's own producer and ours put one user into one partition.
librdkafka goes on at the old offset where a topic was deleted and made anew; it says so only in its debug log,
which every reader of ours therefore listens to. `read_committed`: records of aborted transactions are never
seen, and leave holes among the offsets.

Every librdkafka setting may be overridden by the caller.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
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
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic  # type: ignore[attr-defined]

from streaming.kafka_settings import Mask
from streaming.log import (
    Bounds,
    LogError,
    LogFull,
    LogRefused,
    LogUnavailable,
    NotAllowed,
    OffsetOutOfRange,
    RecordBatch,
    UnknownTopic,
    replaced,
)
from streaming.rdkafka import ArrayConsumer, ClientLog, Trouble

T = TypeVar("T")

_ANY: Final = {
    "bootstrap.servers": "",
    "client.id": "bellwether",
    "topic.metadata.refresh.interval.ms": "30000",
    "reconnect.backoff.ms": "250",  # 100 by default: whoever is turned away would come ten times a second at first
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
_FIRST_S: Final = 1.0  # of it: then we look whether we were turned away
_STALL_S: Final = 30.0
_QUIET_S: Final = 30.0  # between two lines of librdkafka's that say the same
_STRANGE_S: Final = 2.0  # even an empty partition is heard of sooner, if there is one

_UNAVAILABLE: Final = {
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._DESTROY_BROKER,  # one that the others no longer name
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
_NOT_ALLOWED: Final = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "topic {topic!r} (READ to read it, WRITE to write, CREATE to make it)",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "the consumer group that shows how far {topic!r} was read (READ)",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "the cluster (CREATE, where topics are missing)",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "its transactions",
}
_NO_ID: Final = "A" * 22
_CHANGED_ID: Final = re.compile(r"Topic (\S+) changed id from (\S+) to (\S+)")
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
        if "@" in servers:
            raise LogError(
                "a kafka:// URL names servers only; user and password belong into --kafka-config FILE"
            )
        self._options = dict(options)
        self._settings = {**_ANY, "bootstrap.servers": servers}
        self._lines = _Lines(Mask(self._options))
        self._refusals = _Refusals(servers, self._options)
        self._admin = self._client(AdminClient, {})
        # For what is asked again and again: an admin request that waits for a broker may abort the process
        # (librdkafka 2.16, "rd_kafka_enq_once_del_source_return"), a consumer's may not.
        self._asking = self._client(Consumer, {**_CONSUMER, "error_cb": self._refusals})
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
        found = self._ask(lambda s: self._asking.list_topics(topic, timeout=s), topic, timeout_s).topics[
            topic
        ]
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
        place = TopicPartition(topic, partition)
        found = self._ask(
            lambda s: self._asking.get_watermark_offsets(place, timeout=s, cached=False), topic, timeout_s
        )
        if found is None:
            raise LogUnavailable(f"no broker told within {timeout_s:g} s where {topic} begins and ends")
        low, high = found
        return Bounds(low, max(low, high))

    def identity(self, topic: str) -> str:
        if not self.partitions(topic):  # and a broker has just answered: no admin request has to wait
            raise _unknown(topic)
        try:
            found = self._wait(self._admin.describe_topics(TopicCollection([topic])))
        except LogUnavailable:
            raise
        except LogError as error:
            logger.info("the id of topic %s cannot be told: %s", topic, error)
            return ""
        return "" if str(found.topic_id) == _NO_ID else str(found.topic_id)

    def _ask(self, request: Callable[[float], T], topic: str, timeout_s: float = _REQUEST_S) -> T:
        """What a broker answers to a request that may take so many seconds. A refusal is heard after the first."""
        for is_last in (False, True):
            try:
                answer = request(max(timeout_s - _FIRST_S, 0.1) if is_last else min(timeout_s, _FIRST_S))
                self._refusals.clear()
                return answer
            except KafkaException as error:
                self._asking.poll(0)  # only so do errors reach their callback
                if self._refusals.why is not None:
                    raise self._refusals.error() from error
                found = _translated(error.args[0], topic)
                if not isinstance(found, LogUnavailable):
                    raise found from error
                if is_last or timeout_s <= _FIRST_S:
                    where = f"Kafka at {self._settings['bootstrap.servers']} cannot be reached"
                    hint = "check the address, and security.protocol"
                    raise LogUnavailable(f"{where} ({error.args[0].str()}): {hint}") from error
        raise AssertionError("unreachable")

    def reader(
        self, topic: str, offsets: Mapping[int, int], *, keys: bool = False, identity: str = ""
    ) -> KafkaReader:
        errors = _Refusals(self._settings["bootstrap.servers"], self._options)
        ids = _TopicIds(self._lines, topic, identity)
        debug = ",".join(filter(None, (self._options.get("debug"), "metadata")))
        consumer = self._client(ArrayConsumer, {**_CONSUMER, "error_cb": errors}, {"debug": debug}, ids)
        return KafkaReader(consumer, errors, ids, self, topic, offsets, keys)

    def producer(self) -> KafkaProducer:
        errors = _Refusals(self._settings["bootstrap.servers"], self._options)
        callbacks = {
            "error_cb": errors
        }  # without one, a fatal error is raised within whatever is being called
        return KafkaProducer(
            lambda failed: self._client(Producer, {**_PRODUCER, **callbacks, "on_delivery": failed}), self
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

    def _client(
        self,
        make: Callable[..., T],
        settings: Mapping[str, Any],
        always: Mapping[str, Any] | None = None,
        lines: ClientLog | None = None,
    ) -> T:
        """A client of librdkafka. always: wins even over what the caller chose. lines: hears its log."""
        try:
            return make(
                {**self._settings, **settings, **self._options, **(always or {})}, logger=lines or self._lines
            )
        except (KafkaException, TypeError, ValueError) as error:
            reason = error.args[0].str() if isinstance(error, KafkaException) else str(error)
            # from None: the original may tell a secret
            raise LogError(f"Kafka client refuses its settings: {self._lines.mask(reason)}") from None

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
        self._refused = False
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
                message = self._consumer.poll(0.05)
                said = None if message is None else message.error()
                if said is not None and said.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                    self._refused = True
                    raise _translated(said, topic)  # this commit will never be answered
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
        if self._refused:  # librdkafka waits for a minute for the answer to a commit
            threading.Thread(target=self._consumer.close, daemon=True).start()
        else:
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


class _Lines:
    """librdkafka's log: its lines go to ours, without secrets, and not again and again.

    It has one for each attempt to connect, several in a second. What `_Refusals` tells is left out.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self._said: dict[str, float] = {}  # when, by the line without its numbers

    def log(self, level: int, text: str, *arguments: Any) -> None:
        """Called by confluent_kafka, within `poll` and `consume`."""
        said, now = self.mask(text % arguments), time.monotonic()
        kind = re.sub(r"\d+", "", said)
        told = any(word in said for word in ("SASL authentication error", "SSL handshake failed"))
        if told or now - self._said.get(kind, -math.inf) < _QUIET_S:
            level = logging.DEBUG
        else:
            self._said = {known: at for known, at in self._said.items() if now - at < _QUIET_S} | {kind: now}
        logger.log(level, "%s", said)


class _Refusals:
    """A client's errors that belong to no message: nobody can be reached, or we are turned away.

    One answer to a request, or to a fetch, takes both back: see `clear`.
    """

    def __init__(self, servers: str, options: Mapping[str, str]) -> None:
        self._servers, self._options, self._mask = servers, options, Mask(options)
        self.down: str | None = None  # why nobody can be reached
        self.why: str | None = None  # we are turned away

    def __call__(self, error: KafkaError) -> None:
        code = error.code()
        if code in (KafkaError._AUTHENTICATION, KafkaError._SSL):
            self.down = self.why = self._reason(code, error.str())
        elif code == KafkaError._ALL_BROKERS_DOWN or error.fatal():
            self.down = self.down or error.str()
        else:
            logger.debug("%s", self._mask(error.str()))

    def clear(self) -> None:
        """A broker has answered."""
        self.down = self.why = None

    def error(self, why: str = "no broker answers") -> LogUnavailable:
        """What to raise where nobody could be asked."""
        return LogUnavailable(why) if self.why is None else LogRefused(self.why)

    def _reason(self, code: int, said: str) -> str:
        said = self._mask(
            re.sub(r" \(after \d+ms.*", "", said.rpartition("://")[2].partition(": ")[2] or said)
        )
        if code == KafkaError._AUTHENTICATION:
            user, mechanism = self._options.get("sasl.username"), self._options.get("sasl.mechanism", "SASL")
            return (
                f"Kafka at {self._servers} does not let user {user!r} in: check sasl.username, sasl.password and "
                f"sasl.mechanism ({mechanism}) and that the user is there ({said})"
            )
        return (
            f"there is no TLS with Kafka at {self._servers}: check ssl.ca.location and whether certificates, the "
            f"broker's and ours, have expired ({said})"
        )


class _TopicIds:
    """A reader's log: what librdkafka says goes on to ours, but for its news on the ids that topics have.

    These lines come before any record of the topic with the new id does, in the same queue.
    """

    def __init__(self, lines: _Lines, topic: str, known: str) -> None:
        self._lines, self._topic, self.known = lines, topic, known  # empty: not heard yet
        self.error: LogError | None = None
        self._chatty = logger.isEnabledFor(logging.DEBUG)

    def log(self, level: int, text: str, *arguments: Any) -> None:
        """Called by confluent_kafka, within `poll` and `consume`."""
        if level > logging.DEBUG or self._chatty:
            self._lines.log(level, text, *arguments)
        if found := _CHANGED_ID.search(str(arguments[-1])):
            topic, _, now = found.groups()
            if topic == self._topic and now != _NO_ID:
                self.known = self.known or now
                if now != self.known and self.error is None:
                    self.error = replaced(topic, self.known, now)


class KafkaReader:
    """Reads partitions of one topic. Survives restarts of the brokers: LogUnavailable until one answers again."""

    def __init__(
        self,
        consumer: ArrayConsumer,
        errors: _Refusals,
        ids: _TopicIds,
        log: KafkaLog,
        topic: str,
        offsets: Mapping[int, int],
        keys: bool,
    ) -> None:
        self._consumer, self._errors, self._ids, self._log = consumer, errors, ids, log
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
            if self._ids.error is not None:
                raise self._ids.error
            self._advance(records)
            for trouble in troubles:
                self._note(trouble)
            if len(records.offset):
                self._errors.clear()
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
        elif code == KafkaError.GROUP_AUTHORIZATION_FAILED:
            logger.debug("%s: %s", self._topic, error.str())  # of a group that readers have by name only
        elif code in _UNAVAILABLE or error.retriable():
            logger.info("%s: %s", self._topic, error.str())
        else:
            self._broken[partition] = _translated(error, self._topic)

    def _hear(self, partition: int) -> None:
        self._heard[partition] = time.monotonic()
        self._silent.discard(partition)

    def _check(self, timeout_s: float) -> None:
        """A reader must not seem idle where there is no broker, no topic or no partition."""
        try:
            there = range(self._log.partitions(self._topic, timeout_s))
        except LogUnavailable as error:
            raise self._errors.error(str(error)) from error
        self._errors.clear()
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
    if code in _NOT_ALLOWED:
        what = _NOT_ALLOWED[code].format(topic=topic or "?")
        return NotAllowed(f"Kafka keeps our user from {what}: check its rights (ACLs)")
    return (LogUnavailable if code in _UNAVAILABLE or error.retriable() else LogError)(
        f"Kafka: {error.str()}"
    )


def _unknown(topic: str) -> UnknownTopic:
    return UnknownTopic(f"there is no topic {topic!r}; create it with `streaming topics`")
