"""The log on Kafka. It, its reader, what it makes of errors, and `streaming.rdkafka` alone know confluent_kafka.

Readers assign partitions by hand and start where they are told: no group, no rebalance, no stored positions.
Producers are idempotent and place keys by murmur2, as Java's do, so that a shop's own producer and ours put one
user into one partition. `read_committed`: records of aborted transactions are never seen, and leave holes among
the offsets.

Every librdkafka setting may be overridden by the caller.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeVar

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

from streaming.kafka_errors import NO_TOPIC, ClientLines, Exists, Losses, Refusals, translated
from streaming.kafka_reader import NO_ID, KafkaReader, TopicIds
from streaming.kafka_settings import Mask
from streaming.log import (
    Bounds,
    LogError,
    LogFull,
    LogUnavailable,
    RecordTooLarge,
    UnknownTopic,
    no_topic,
)
from streaming.rdkafka import ArrayConsumer, ClientLog

T = TypeVar("T")

_ANY: Final = {
    "bootstrap.servers": "",
    "client.id": "bellwether",
    "topic.metadata.refresh.interval.ms": "30000",
    "reconnect.backoff.ms": "500",  # a learner turned away logs in 10 times a second; 15 by the default, 100
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
        self._lines = ClientLines(Mask(self._options))
        self._refusals = Refusals(servers, self._options)
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
        with contextlib.suppress(Exists):
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
        if found.error is not None and found.error.code() in NO_TOPIC:
            return 0
        if found.error is not None and not found.partitions:
            raise translated(found.error, topic)
        return len(found.partitions)

    def bounds(self, topic: str) -> dict[int, Bounds]:
        count = self.partitions(topic)
        if not count:
            raise no_topic(topic)
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
            raise no_topic(topic)
        try:
            found = self._wait(self._admin.describe_topics(TopicCollection([topic])))
        except LogUnavailable:
            raise
        except LogError as error:
            logger.info("the id of topic %s cannot be told: %s", topic, error)
            return ""
        return "" if str(found.topic_id) == NO_ID else str(found.topic_id)

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
                found = translated(error.args[0], topic)
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
        errors = Refusals(self._settings["bootstrap.servers"], self._options)
        ids = TopicIds(self._lines, topic, identity)
        debug = ",".join(filter(None, (self._options.get("debug"), "metadata")))
        consumer = self._client(ArrayConsumer, {**_CONSUMER, "error_cb": errors}, {"debug": debug}, ids)
        return KafkaReader(consumer, errors, ids, self, topic, offsets, keys)

    def producer(self) -> KafkaProducer:
        errors = Refusals(self._settings["bootstrap.servers"], self._options)
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
                raise translated(error.args[0], topic) from error
            while not self._told:
                if time.monotonic() > deadline:
                    raise LogUnavailable(f"offsets of {topic!r} were not committed within {_REQUEST_S:g} s")
                message = self._consumer.poll(0.05)
                said = None if message is None else message.error()
                if said is not None and said.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                    self._refused = True
                    raise translated(said, topic)  # this commit will never be answered
            if (refused := self._told[0]) is not None:
                raise translated(refused, topic)

    def committed(self, topic: str, places: Sequence[TopicPartition]) -> dict[int, int]:
        """Raises: LogUnavailable, LogError."""
        try:
            found = self._consumer.committed(list(places), timeout=_REQUEST_S)
        except KafkaException as error:
            raise translated(error.args[0], topic) from error
        return {place.partition: place.offset for place in found if place.offset >= 0}

    def close(self) -> None:
        """Let go."""
        if self._refused:  # librdkafka waits for a minute for the answer to a commit
            threading.Thread(target=self._consumer.close, daemon=True).start()
        else:
            self._consumer.close()


class KafkaProducer:
    """Hands records to librdkafka, whose own threads send them; one of ours collects what was refused.

    A record that cannot be delivered within `delivery.timeout.ms` (5 minutes) has failed. Where librdkafka's client
    cannot go on (a fatal error: brokers and it are no longer of one mind on what was sent), another takes its place:
    what was on its way has failed, too.
    """

    def __init__(self, make: Callable[[Callable[..., None]], Producer], log: KafkaLog) -> None:
        self._make = make
        self._producer = make(self._refused)
        self._renewing = threading.Lock()
        self._log = log
        self._topics: set[str] = set()
        self._counting = threading.Lock()  # whichever thread polls the client is told what failed
        self._failed = self._failed_told = 0
        self._refusals = 0  # since `flush` told; the others failed because nobody answered
        self._losses = Losses(time.monotonic)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="kafka-producer", daemon=True)
        self._thread.start()

    def send(self, topic: str, key: bytes, value: bytes | None, timestamp_ms: int | None = None) -> None:
        if self._closed.is_set():
            raise LogError("this producer is closed")
        if topic not in self._topics:
            # librdkafka would let the broker create it, with one partition
            if not self._log.partitions(topic):
                raise no_topic(topic)
            self._topics.add(topic)
        producer = self._producer
        try:
            producer.produce(topic, value, key, timestamp=timestamp_ms or 0)
        except BufferError:
            raise LogFull(
                f"{len(producer):,} records wait to be sent to {self._log.url}; flush or wait"
            ) from None
        except KafkaException as error:
            if _is_fatal(error):
                self._renew(producer, error)
                raise LogUnavailable("the Kafka client was made anew; try again") from error
            if error.args[0].code() == KafkaError.MSG_SIZE_TOO_LARGE:
                size = len(key) + len(value or b"")
                raise RecordTooLarge(
                    f"record of {size:,} bytes for {topic!r} is over message.max.bytes"
                ) from error
            raise translated(error.args[0], topic) from error

    def flush(self, timeout_s: float = 30.0) -> int:
        producer = self._producer
        try:
            left = int(producer.flush(timeout_s))
        except KafkaException as error:
            if not _is_fatal(error):
                raise translated(error.args[0]) from error
            self._renew(producer, error)
            left = int(self._producer.flush(timeout_s))
        with self._counting:
            failed, refusals = self._failed, self._refusals
            lost = failed - self._failed_told
            self._failed_told, self._refusals = failed, 0
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
            self._losses.tell(at_last=True)
        if left:
            raise LogError(f"{left} records were not written to {self._log.url} within {timeout_s} s")

    def _serve(self) -> None:
        while not self._closed.is_set():
            producer = self._producer
            try:
                producer.poll(0.1)
            except KafkaException as error:
                if not _is_fatal(error):
                    raise
                self._renew(producer, error)
            self._losses.tell()

    def _renew(self, producer: Producer, error: KafkaException) -> None:
        """Another client in place of this one, which cannot go on; what it still had has failed."""
        with self._renewing:
            if self._producer is not producer:
                return  # another thread was first
            logger.error("the Kafka client cannot go on and is made anew: %s", error.args[0].str())
            producer.purge()
            deadline = time.monotonic() + _REQUEST_S
            while len(producer) and time.monotonic() < deadline:
                with contextlib.suppress(KafkaException):
                    producer.poll(0.1)  # it tells what has failed
            self._producer = self._make(self._refused)

    def _refused(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            with self._counting:
                self._failed += 1
                self._refusals += not isinstance(translated(error), LogUnavailable)
            self._losses.note(message.topic() or "", error.str())


def _is_fatal(error: KafkaException) -> bool:
    return bool(error.args[0].fatal() or error.args[0].code() == KafkaError._FATAL)


def _result(future: Future[Any]) -> Any:
    try:
        return future.result(timeout=6 * _REQUEST_S)
    except KafkaException as error:
        raise translated(error.args[0]) from error
    except TimeoutError as error:
        raise LogUnavailable("Kafka did not answer; retry") from error
