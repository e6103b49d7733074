"""What librdkafka says, as errors and lines of ours: errors by what can be done about them, its log without secrets."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from confluent_kafka import KafkaError

from streaming.kafka_settings import Mask
from streaming.log import LogError, LogRefused, LogUnavailable, NotAllowed, UnknownTopic, no_topic

_QUIET_S: Final = 30.0  # between two lines of librdkafka's that say the same
_LOSSES_S: Final = 10.0  # between two lines about records that were lost

UNAVAILABLE: Final = {
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
NO_TOPIC: Final = {
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

logger = logging.getLogger(__name__)


class Exists(LogError):
    """Another process created the topic first."""


def translated(error: KafkaError, topic: str | None = None) -> LogError:
    """librdkafka's error as one of ours."""
    code = error.code()
    if code in NO_TOPIC:
        return no_topic(topic) if topic else UnknownTopic(f"{error.str()}; create it with `streaming topics`")
    if code == KafkaError.TOPIC_ALREADY_EXISTS:
        return Exists(error.str())
    if code in _NOT_ALLOWED:
        what = _NOT_ALLOWED[code].format(topic=topic or "?")
        return NotAllowed(f"Kafka keeps our user from {what}: check its rights (ACLs)")
    return (LogUnavailable if code in UNAVAILABLE or error.retriable() else LogError)(f"Kafka: {error.str()}")


class ClientLines:
    """librdkafka's log: its lines go to ours, without secrets, and not again and again.

    It has one for each attempt to connect, several in a second. What `Refusals` tells is left out.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self._said: dict[str, float] = {}  # when, by the line without its numbers

    def log(self, level: int, text: str, *arguments: Any) -> None:
        """Called by confluent_kafka, within `poll` and `consume`."""
        said, now = self.mask(text % arguments), time.monotonic()
        kind = re.sub(r"\d+", "", said)
        told = any(
            word in said
            for word in ("SASL authentication error", "SSL handshake failed", "in state SSL_HANDSHAKE")
        )
        if told or now - self._said.get(kind, -math.inf) < _QUIET_S:
            level = logging.DEBUG
        else:
            self._said = {known: at for known, at in self._said.items() if now - at < _QUIET_S} | {kind: now}
        logger.log(level, "%s", said)


class Losses:
    """Records that could not be delivered: a line now and then says how many, and why the newest was lost."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: monotonic seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._count = 0  # since the last line
        self._newest = ("", "")
        self._due_s = -math.inf

    def note(self, topic: str, why: str) -> None:
        """One more."""
        with self._lock:
            self._count += 1
            self._newest = topic, why

    def tell(self, *, at_last: bool = False) -> None:
        """Say what there is to say, if the last line is long enough ago. at_last: in any case."""
        with self._lock:
            now = self._clock()
            if not self._count or (now < self._due_s and not at_last):
                return
            count, newest = self._count, self._newest
            self._count, self._due_s = 0, now + _LOSSES_S
        logger.error("%d records were lost, the newest for %s: %s", count, *newest)


class Refusals:
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
