"""The log: partitioned, keyed, ordered records, behind one small protocol with two backends.

`kafka://host:port[,host:port]` is the product; `sqlite:///path.db` is the embedded default. Code above
this module knows the protocol only; `open_log` is the one place that chooses. `tests/test_log_contract.py`
is the protocol's spec, run over both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class LogError(Exception):
    """The log cannot do what was asked; the message says what and what to do about it."""


class LogUnavailable(LogError):
    """The log cannot be reached now; a retry may help."""


class LogRefused(LogUnavailable):
    """The log turns us away (password, certificate): somebody must look at it, here or there; a retry may help then."""


class NotAllowed(LogError):
    """The log knows us, and does not let us do this: a right is missing."""


class LogFull(LogError):
    """The producer's queue is full: nothing was queued; flush or wait, then send again."""


class RecordTooLarge(LogError):
    """One record is more than the log ever takes; nothing was queued."""


class UnknownTopic(LogError):
    """The topic does not exist; create it with `streaming topics`."""


class OffsetOutOfRange(LogError):
    """A reader's position is no longer (or not yet) in the log: retention took it, or the topic was recreated."""


class TopicReplaced(LogError):
    """The topic was deleted and made anew: its offsets mean other records than those that we know them by."""


class Bounds(NamedTuple):
    """What a partition holds: offsets `low <= o < high`; holes between them are legal."""

    low: int  # first offset still there
    high: int  # offset that the next visible record will get, or more


class RecordBatch(NamedTuple):
    """N records as columns, each partition's in offset order. Values lie end to end in one buffer."""

    partition: npt.NDArray[np.int32]  # [N]
    offset: npt.NDArray[np.int64]  # [N]
    timestamp_ms: npt.NDArray[np.int64]  # [N] when the log took it in (broker's or producer's clock)
    data: npt.NDArray[np.uint8]  # [bytes] all values; record i is data[bounds[i]:bounds[i + 1]]
    bounds: npt.NDArray[np.int64]  # [N + 1]
    null: npt.NDArray[np.bool_]  # [N] a tombstone, which has no bytes either
    keys: Sequence[bytes | None] | None  # [N], or None where the reader was opened without keys

    def value(self, i: int) -> bytes | None:
        """Record i's bytes as they came; None for a tombstone."""
        return None if self.null[i] else self.data[self.bounds[i] : self.bounds[i + 1]].tobytes()

    def __len__(self) -> int:  # rows, not fields
        return len(self.offset)


class Producer(Protocol):
    """Writes records; several threads may share one."""

    def send(self, topic: str, key: bytes, value: bytes | None, timestamp_ms: int | None = None) -> None:
        """Queue one record for the partition murmur2(key) names; returns at once.

        timestamp_ms: the log's own time stamp; None: now.
        Raises: LogFull when the queue is full (nothing was queued); UnknownTopic; RecordTooLarge. A record that fails
        after it was queued is counted in `failed` and logged, and the next `flush` raises.
        """

    def flush(self, timeout_s: float = 30.0) -> int:
        """Wait until everything queued is durable; returns how many records still are not.

        Raises, once, for what failed since the last call: LogUnavailable when all of it failed because the log could
        not be reached for long, else LogError.
        """

    @property
    def failed(self) -> int:
        """Records that were queued and then refused for good."""

    def close(self, timeout_s: float = 30.0) -> None:
        """Flush, then let go. Raises LogError, naming the count, if records could not be written."""


class Reader(Protocol):
    """Reads assigned partitions from given offsets; owned by one thread. No group, no rebalance: the
    caller's checkpoint says where to start, and `Log.commit` only reports progress."""

    def poll(self, max_records: int, timeout_s: float) -> RecordBatch:
        """Up to max_records, waiting at most timeout_s for the first; an empty batch when none came.

        Aborted transactions are never seen.
        Raises: OffsetOutOfRange, LogUnavailable (retry), UnknownTopic; TopicReplaced, for ever: open a new reader.
        """

    def position(self) -> dict[int, int]:
        """Next offset to be returned, for each assigned partition."""

    def seek(self, offsets: Mapping[int, int]) -> None:
        """Move the given partitions; what was fetched and not yet returned is forgotten."""

    def assign(self, offsets: Mapping[int, int]) -> None:
        """Read exactly these partitions from these offsets; partitions kept keep their position."""

    def pause(self, partitions: Iterable[int]) -> None:
        """Return nothing more of these until `resume`; nothing is lost."""

    def resume(self, partitions: Iterable[int]) -> None:
        """Undo `pause`."""

    def close(self) -> None:
        """Let go; harmless twice."""


class Log(Protocol):
    """One Kafka cluster, or one SQLite file."""

    url: str

    def create_topic(
        self, topic: str, partitions: int, *, compacted: bool = False, retention_ms: int | None = None
    ) -> bool:
        """Make sure that the topic is there with at least so many partitions; True if it was created or grown.

        compacted: the newest record of each key is kept, older ones may go. retention_ms: records older than
        this may go; None: the backend's default (Kafka: the broker's; SQLite: for ever).
        """

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has; 0 when there is no such topic."""

    def bounds(self, topic: str) -> dict[int, Bounds]:
        """What each partition holds now. Raises UnknownTopic."""

    def identity(self, topic: str) -> str:
        """An id that the topic got when it was made, and that no other topic has; empty where none can be told.

        Raises: UnknownTopic, LogUnavailable.
        """

    def reader(
        self, topic: str, offsets: Mapping[int, int], *, keys: bool = False, identity: str = ""
    ) -> Reader:
        """A reader of exactly these partitions from these offsets. keys: also return each record's key.

        identity: the topic's; nothing is read of another one by its name. Empty: of that which it meets first.
        """

    def producer(self) -> Producer:
        """A new producer."""

    def commit(self, group: str, topic: str, offsets: Mapping[int, int]) -> None:
        """Publish progress for lag graphs (next offset to read); never read back by us."""

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """What was published by `commit`; partitions never committed are left out."""

    def close(self) -> None:
        """Let go; harmless twice."""


def no_topic(topic: str, partition: int | None = None) -> UnknownTopic:
    """The error where there is no such topic, or no such partition of it."""
    what = f"topic {topic!r}" if partition is None else f"partition {partition} of topic {topic!r}"
    return UnknownTopic(f"there is no {what}; create it with `streaming topics`")


def replaced(topic: str, known: str, found: str) -> TopicReplaced:
    """The error of a topic that is not the one that it was."""
    return TopicReplaced(
        f"topic {topic!r} was deleted and made anew, or this is another log: its id was {known}, now it is {found}, "
        "and offsets of the one mean nothing in the other"
    )


def murmur2(key: bytes) -> int:
    """Kafka's 32-bit murmur2 of `key`, as the Java client computes it, already masked to be positive.

    >>> murmur2(b"21") == (-973932308 & 0x7FFFFFFF)
    True
    """
    mask = 0xFFFFFFFF
    m = 0x5BD1E995
    h = (0x9747B28C ^ len(key)) & mask
    whole = len(key) & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(key[i : i + 4], "little") * m & mask
        k = (k ^ (k >> 24)) * m & mask
        h = (h * m & mask) ^ k
    if whole < len(key):
        h = (h ^ int.from_bytes(key[whole:], "little")) * m & mask
    h = (h ^ (h >> 13)) * m & mask
    return (h ^ (h >> 15)) & 0x7FFFFFFF


def partition_of(key: bytes, partitions: int) -> int:
    """The partition that every producer of ours, and Java's default one, writes this key to."""
    return murmur2(key) % partitions


def open_log(url: str, kafka_options: Mapping[str, str] | None = None) -> Log:
    """The log behind a URL: `kafka://host:9092` or `sqlite:///path.db` (relative) or `sqlite:////abs/path.db`.

    kafka_options: librdkafka settings, passed untouched.
    Raises: LogError for a scheme that is neither.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "kafka":
        from streaming.kafka_log import KafkaLog

        return KafkaLog(url, rest, dict(kafka_options or {}))
    if scheme == "sqlite":
        from streaming.sqlite_log import SqliteLog

        return SqliteLog(url, rest[1:])
    raise LogError(f"{url!r} is no log; use kafka://host:9092 or sqlite:///path.db")
