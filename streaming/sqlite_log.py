"""The log in one SQLite file: durable, several processes, nothing to install.

Tables: `topics`, each with an id of its own; `parts`, one row per partition with its first and next offset (an
offset is never given twice, whatever retention deletes); `records`, keyed by (part, offset); `commits`. The
file is in WAL mode, so readers and the writer of the moment do not wait for each other; writers of several
processes take turns. It must lie on a local disk: WAL needs shared memory.

A committed record survives the death of any process. `sqlite:///log.db?synchronous=full` makes it survive power
loss as well, for an fsync per commit; without, the last ones may go, and their offsets are given again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streaming.log import (
    Bounds,
    LogError,
    LogFull,
    LogUnavailable,
    OffsetOutOfRange,
    RecordBatch,
    RecordTooLarge,
    TopicReplaced,
    UnknownTopic,
    no_topic,
    partition_of,
    replaced,
)

Clock = Callable[[], float]  # seconds since 1970

MAX_RECORD_BYTES: Final = 1_000_000  # key + value; Kafka's default too, so that a shop can move there
MAX_POLL_BYTES: Final = 32 << 20  # of one batch, or a little more: as many records may be large ones
MAX_QUEUED_BYTES: Final = 64 << 20
MAX_QUEUED_RECORDS: Final = 500_000
TOMBSTONES_KEPT_MS: Final = 24 * 3600 * 1000  # long enough for every reader to have seen them

_APPLICATION_ID: Final = 0x42454C4C
_FORMAT: Final = 1  # user_version
_PAGE_BYTES: Final = 8192  # a decision with its history fits into a leaf
_BUSY_TIMEOUT_S: Final = 10.0
_LINGER_S: Final = 0.004  # the wait that makes one commit out of many sends
_BATCH_RECORDS: Final = 10_000  # one commit; bounds how long other writers wait
_SOME_ROWS: Final = 32
_POLL_S: Final = 0.004
_UPKEEP_S: Final = 1.0
_WAL_BYTES: Final = 64 << 20
_GIVE_UP_S: Final = 60.0  # a record that cannot be written for so long has failed

_TABLES = """
CREATE TABLE topics (
    topic TEXT PRIMARY KEY, compacted INTEGER NOT NULL, retention_ms INTEGER, id TEXT
) WITHOUT ROWID;
CREATE TABLE parts (
    part INTEGER PRIMARY KEY, topic TEXT NOT NULL, partition INTEGER NOT NULL,
    low INTEGER NOT NULL DEFAULT 0, next INTEGER NOT NULL DEFAULT 0,
    compacted_to INTEGER NOT NULL DEFAULT 0, kept INTEGER NOT NULL DEFAULT 0,
    UNIQUE (topic, partition)
);
CREATE TABLE records (
    part INTEGER NOT NULL, offset INTEGER NOT NULL, timestamp_ms INTEGER NOT NULL, key BLOB NOT NULL, value BLOB,
    PRIMARY KEY (part, offset)
) WITHOUT ROWID;
CREATE TABLE commits (
    consumer TEXT, topic TEXT, partition INTEGER, offset INTEGER NOT NULL, PRIMARY KEY (consumer, topic, partition)
) WITHOUT ROWID;
"""

logger = logging.getLogger(__name__)


class SqliteLog:
    """A Log in the file at `path` (created, with its folders, if need be). Threads may share one.

    Raises: LogError when the file is none of ours, damaged, or of a newer format.
    """

    def __init__(self, url: str, path: str, clock: Clock = time.time) -> None:
        self.url = url
        self._file = _File.parse(path)
        self._clock = clock
        self._lock = threading.Lock()
        self._db = self._file.open()

    def create_topic(
        self, topic: str, partitions: int, *, compacted: bool = False, retention_ms: int | None = None
    ) -> bool:
        if partitions < 1:
            raise LogError(f"topic {topic!r} needs at least 1 partition, not {partitions}")
        with self._using() as db, _transaction(db):
            new_topic = (topic, compacted, retention_ms, uuid.uuid4().hex)
            db.execute("INSERT OR IGNORE INTO topics VALUES (?, ?, ?, ?)", new_topic)
            have = _partitions(db, topic)
            new = [(topic, partition) for partition in range(have, partitions)]
            db.executemany("INSERT INTO parts (topic, partition) VALUES (?, ?)", new)
        return bool(new)

    def partitions(self, topic: str) -> int:
        with self._using() as db:
            return _partitions(db, topic)

    def bounds(self, topic: str) -> dict[int, Bounds]:
        with self._using() as db:
            rows = db.execute("SELECT partition, low, next FROM parts WHERE topic = ?", (topic,)).fetchall()
        if not rows:
            raise no_topic(topic)
        return {partition: Bounds(low, high) for partition, low, high in rows}

    def identity(self, topic: str) -> str:
        with self._using() as db:
            return _id_of(db, topic)

    def reader(
        self, topic: str, offsets: Mapping[int, int], *, keys: bool = False, identity: str = ""
    ) -> SqliteReader:
        return SqliteReader(self._file, topic, offsets, keys, identity)

    def producer(self) -> SqliteProducer:
        return SqliteProducer(self._file, self._clock)

    def commit(self, group: str, topic: str, offsets: Mapping[int, int]) -> None:
        rows = [(group, topic, partition, offset) for partition, offset in offsets.items()]
        with self._using() as db, _transaction(db):
            db.executemany("INSERT OR REPLACE INTO commits VALUES (?, ?, ?, ?)", rows)

    def committed(self, group: str, topic: str) -> dict[int, int]:
        query = "SELECT partition, offset FROM commits WHERE consumer = ? AND topic = ?"
        with self._using() as db:
            return dict(db.execute(query, (group, topic)).fetchall())

    def compact(self, topic: str) -> int:
        """Keep only the newest record of each key now; returns how many records went.

        Producers do it now and then for compacted topics. Tombstones stay for a day.
        """
        now_ms = int(self._clock() * 1000)
        with self._using() as db, _transaction(db):
            return sum(_compact(db, part, now_ms) for part in _parts(db, topic).values())

    def expire(self, topic: str) -> int:
        """Delete the records that are older than the topic's retention now; returns how many went.

        Producers do it now and then. As in Kafka, a record goes only when all before it in its partition go.
        """
        with self._using() as db, _transaction(db):
            return _expire(db, topic, int(self._clock() * 1000))

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _translated(self._file.path):
            yield self._db


class _Queued(NamedTuple):
    topic: str
    key: bytes
    value: bytes | None
    timestamp_ms: int


class SqliteProducer:
    """Queues records; a thread of its own writes all that is queued in one commit, every few milliseconds."""

    def __init__(self, file: _File, clock: Clock) -> None:
        self._file, self._clock = file, clock
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # something to write, or closing
        self._written = threading.Condition(self._lock)  # a batch is done with
        self._queue: list[_Queued] = []
        self._queued = self._queued_bytes = 0  # with what is being written
        self._failed = self._failed_told = 0
        self._refusals = 0  # since `flush` told; the others failed because the disk was busy or full
        self._closing = threading.Event()
        self._topics: set[str] = set()
        self._partition: dict[tuple[bytes, int], int] = {}  # murmur2 in Python is slow, and users come again
        self._lookup = file.open()
        self._thread = threading.Thread(target=self._run, name="sqlite-producer", daemon=True)
        self._thread.start()

    def send(self, topic: str, key: bytes, value: bytes | None, timestamp_ms: int | None = None) -> None:
        size = len(key) + len(value or b"")
        if size > MAX_RECORD_BYTES:
            raise RecordTooLarge(
                f"record of {size:,} bytes for {topic!r}; the log takes {MAX_RECORD_BYTES:,} at most"
            )
        with self._lock:
            if self._closing.is_set():
                raise LogError("this producer is closed")
            self._check_topic(topic)
            if self._queued >= MAX_QUEUED_RECORDS or self._queued_bytes + size > MAX_QUEUED_BYTES:
                raise LogFull(
                    f"{self._queued:,} records wait to be written to {self._file.path}; flush or wait"
                )
            stamp = int(self._clock() * 1000) if timestamp_ms is None else timestamp_ms
            self._queue.append(_Queued(topic, key, value, stamp))
            self._queued += 1
            self._queued_bytes += size
            if len(self._queue) == 1:
                self._work.notify()

    def flush(self, timeout_s: float = 30.0) -> int:
        with self._lock:
            self._written.wait_for(lambda: self._queued == 0, timeout_s)
            lost, self._failed_told = self._failed - self._failed_told, self._failed
            refusals, self._refusals = self._refusals, 0
            if lost:
                raise (LogError if refusals else LogUnavailable)(
                    f"{lost} records could not be written to {self._file.path}; see the log"
                )
            return self._queued

    @property
    def failed(self) -> int:
        return self._failed

    def close(self, timeout_s: float = 30.0) -> None:
        if self._closing.is_set():
            return
        try:
            left = self.flush(timeout_s)
        finally:
            self._closing.set()
            with self._lock:
                self._work.notify()
            self._thread.join(_BUSY_TIMEOUT_S + 1)
            self._lookup.close()
        if left:
            raise LogError(f"{left} records were not written to {self._file.path} within {timeout_s} s")

    def _check_topic(self, topic: str) -> None:
        if topic not in self._topics:
            with _translated(self._file.path):
                if not _partitions(self._lookup, topic):
                    raise no_topic(topic)
            self._topics.add(topic)

    def _run(self) -> None:
        db = self._file.open()
        upkeep = _Upkeep(self._clock, self._file)
        try:
            while True:
                with self._lock:
                    self._work.wait_for(lambda: self._queue or self._closing.is_set())
                    if not self._queue:
                        return
                self._closing.wait(_LINGER_S)
                with self._lock:
                    batch, self._queue = self._queue, []
                for start in range(0, len(batch), _BATCH_RECORDS):
                    self._write(db, batch[start : start + _BATCH_RECORDS])
                upkeep.maybe(db, {record.topic for record in batch})
        finally:
            db.close()

    def _write(self, db: sqlite3.Connection, batch: list[_Queued]) -> None:
        """Append, whatever it takes; what cannot be written for long is counted as failed."""
        gone, passing = 0, False
        started = time.monotonic()
        while True:
            try:
                gone, passing = self._append(db, batch), False
                break
            except sqlite3.Error as error:
                passing = isinstance(error, sqlite3.OperationalError)  # busy, disk full, I/O
                if not passing or self._closing.is_set() or time.monotonic() - started > _GIVE_UP_S:
                    logger.error("%d records lost: %s: %s", len(batch), self._file.path, error)
                    gone = len(batch)
                    break
                logger.warning("cannot write to %s, will retry: %s", self._file.path, error)
                self._closing.wait(0.5)
        with self._lock:
            self._failed += gone
            self._refusals += 0 if passing else gone
            self._queued -= len(batch)
            self._queued_bytes -= sum(len(record.key) + len(record.value or b"") for record in batch)
            self._written.notify_all()

    def _append(self, db: sqlite3.Connection, batch: list[_Queued]) -> int:
        """One transaction; returns how many records had no topic any more."""
        rows, gone = [], 0
        with _transaction(db):
            # read inside the transaction: another process may just have added partitions
            parts = {topic: _parts(db, topic) for topic in {record.topic for record in batch}}
            nexts = {}
            for part in {part for by_partition in parts.values() for part in by_partition.values()}:
                (nexts[part],) = db.execute("SELECT next FROM parts WHERE part = ?", (part,)).fetchone()
            for record in batch:
                by_partition = parts[record.topic]
                if not by_partition:
                    gone += 1
                    continue
                part = by_partition[self._partition_of(record.key, len(by_partition))]
                rows.append((part, nexts[part], record.timestamp_ms, record.key, record.value))
                nexts[part] += 1
            rows.sort(key=lambda row: row[:2])  # pages are then written one after the other
            db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?)", rows)
            db.executemany("UPDATE parts SET next = ?2 WHERE part = ?1", nexts.items())
        if gone:
            logger.error("%d records lost: their topics are gone", gone)
        return gone

    def _partition_of(self, key: bytes, partitions: int) -> int:
        known = self._partition.get((key, partitions))
        if known is None:
            if len(self._partition) >= 100_000:
                self._partition.clear()
            known = self._partition[key, partitions] = partition_of(key, partitions)
        return known


class SqliteReader:
    """Reads partitions of one topic; looks for news every few milliseconds."""

    def __init__(
        self, file: _File, topic: str, offsets: Mapping[int, int], keys: bool, identity: str
    ) -> None:
        self._file, self._topic, self._keys, self._identity = file, topic, keys, identity
        self._next = dict(offsets)
        self._paused: set[int] = set()
        self._turn = 0  # which partition is asked first
        self._db: sqlite3.Connection | None = file.open()
        self._inode = file.inode()
        self._part: dict[int, int] = {}  # partition → part
        self._seen: int | None = None  # data_version when nothing was there to read

    def poll(self, max_records: int, timeout_s: float) -> RecordBatch:
        if self._db is None:
            raise LogError("this reader is closed")
        if self._file.inode() != self._inode:
            raise TopicReplaced(f"{self._file.path} was moved, deleted or replaced while it was being read")
        deadline = time.monotonic() + timeout_s
        with _translated(self._file.path):
            while True:
                (version,) = self._db.execute("PRAGMA data_version").fetchone()
                if version != self._seen:
                    rows = self._fetch(self._db, max_records)
                    if rows:
                        return self._batch(rows)
                    self._seen = version
                left = deadline - time.monotonic()
                if left <= 0:
                    return self._batch([])
                time.sleep(min(_POLL_S, left))

    def position(self) -> dict[int, int]:
        return dict(self._next)

    def seek(self, offsets: Mapping[int, int]) -> None:
        if strangers := offsets.keys() - self._next.keys():
            raise LogError(
                f"cannot seek in partitions {sorted(strangers)}, which this reader is not assigned"
            )
        self._next.update(offsets)
        self._seen = None

    def assign(self, offsets: Mapping[int, int]) -> None:
        self._next = {partition: self._next.get(partition, offset) for partition, offset in offsets.items()}
        self._paused &= self._next.keys()
        self._seen = None

    def pause(self, partitions: Iterable[int]) -> None:
        self._paused |= set(partitions) & self._next.keys()

    def resume(self, partitions: Iterable[int]) -> None:
        self._paused -= set(partitions)
        self._seen = None

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _fetch(self, db: sqlite3.Connection, max_records: int) -> list[tuple[int, list[_Row]]]:
        """Rows by partition: at first an equal share each, then what is left to whoever has more."""
        active = [p for p in sorted(self._next) if p not in self._paused]
        if not active:
            return []
        self._turn = (self._turn + 1) % len(active)
        order = active[self._turn :] + active[: self._turn]
        found: dict[int, list[_Row]] = {partition: [] for partition in order}
        left, room, next_offset = max_records, MAX_POLL_BYTES, dict(self._next)
        # one snapshot, so that retention cannot take records between the check and the reading
        db.execute("BEGIN")
        try:
            high = self._check(db, active)
            for share in (-(-max_records // len(active)), max_records):
                for partition in order:
                    limit = min(left, share - len(found[partition]))
                    if limit > 0 and room > 0 and next_offset[partition] < high[partition]:
                        at = (self._part[partition], next_offset[partition], limit)
                        rows, room = _within(room, db.execute(_SELECT[self._keys], at))
                        # fewer than asked for: from there to high there are only holes, left by compaction
                        whole = len(rows) < limit and room > 0
                        next_offset[partition] = high[partition] if whole else rows[-1][0] + 1
                        found[partition] += rows
                        left -= len(rows)
        finally:
            if db.in_transaction:  # an I/O error has ended it
                db.execute("COMMIT")
        self._next = next_offset
        return [(partition, rows) for partition, rows in found.items() if rows]

    def _check(self, db: sqlite3.Connection, active: list[int]) -> dict[int, int]:
        """Each partition's high, after making sure that our positions are within its bounds."""
        query = "SELECT partition, part, low, next FROM parts WHERE topic = ?"
        rows = {partition: rest for partition, *rest in db.execute(query, (self._topic,))}
        if not rows:
            raise no_topic(self._topic)
        found = _id_of(db, self._topic)
        self._identity = self._identity or found
        if found != self._identity:
            raise replaced(self._topic, self._identity, found)
        high = {}
        for partition in active:
            if partition not in rows:
                raise UnknownTopic(f"{self._topic!r} has {len(rows)} partitions, no partition {partition}")
            self._part[partition], low, high[partition] = rows[partition]
            if not low <= self._next[partition] <= high[partition]:
                raise OffsetOutOfRange(
                    f"{self._topic}/{partition} holds offsets {low} to {high[partition]}, "
                    f"not {self._next[partition]}; seek to where to go on"
                )
        return high

    def _batch(self, found: list[tuple[int, list[_Row]]]) -> RecordBatch:
        rows = [row for _, part in found for row in part]
        values = [row[2] for row in rows]
        bounds = np.zeros(len(rows) + 1, np.int64)
        sizes: Iterator[int] = (0 if value is None else len(value) for value in values)
        np.cumsum(np.fromiter(sizes, np.int64, len(rows)), out=bounds[1:])
        counts = [len(part) for _, part in found]
        return RecordBatch(
            partition=np.repeat(np.array([partition for partition, _ in found], np.int32), counts),
            offset=_column(rows, 0),
            timestamp_ms=_column(rows, 1),
            data=np.frombuffer(b"".join(value for value in values if value), np.uint8),
            bounds=bounds,
            null=np.fromiter((value is None for value in values), np.bool_, len(rows)),
            keys=[row[3] for row in rows] if self._keys else None,
        )


_Row = tuple[int, int, bytes | None, bytes | None]  # offset, timestamp_ms, value, key
_SELECT = {
    keys: f"SELECT offset, timestamp_ms, value{', key' if keys else ''} FROM records "
    "WHERE part = ? AND offset >= ? ORDER BY offset LIMIT ?"
    for keys in (False, True)
}


def _within(room: int, found: sqlite3.Cursor) -> tuple[list[_Row], int]:
    """The rows up to about so many bytes of values, and what is left of the room."""
    rows: list[_Row] = []
    while room > 0 and (some := found.fetchmany(_SOME_ROWS)):
        rows += some
        room -= sum(len(row[2] or b"") for row in some)
    return rows, room


def _column(rows: list[_Row], i: int) -> npt.NDArray[np.int64]:
    return np.fromiter((row[i] for row in rows), np.int64, len(rows))


class _Upkeep:
    """What writers do besides: retention, compaction, and keeping the WAL short."""

    def __init__(self, clock: Clock, file: _File) -> None:
        self._clock, self._file = clock, file
        self._last = float("-inf")

    def maybe(self, db: sqlite3.Connection, topics: set[str]) -> None:
        """Once a second at most, for the topics just written to."""
        if 0 <= self._clock() - self._last < _UPKEEP_S:
            return
        self._last = self._clock()
        try:
            for topic in topics:
                self._topic(db, topic)
            wal = Path(self._file.path + "-wal")
            if wal.exists() and wal.stat().st_size > 2 * _WAL_BYTES:
                # readers in quick succession can keep automatic checkpoints from ever starting over
                db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        except sqlite3.Error as error:
            logger.warning("upkeep of %s put off: %s", self._file.path, error)

    def _topic(self, db: sqlite3.Connection, topic: str) -> None:
        now_ms = int(self._clock() * 1000)
        row = db.execute("SELECT compacted, retention_ms FROM topics WHERE topic = ?", (topic,)).fetchone()
        compacted, retention_ms = row or (0, None)
        if retention_ms is not None:
            with _transaction(db):
                _expire(db, topic, now_ms)
        if compacted:
            query = "SELECT part FROM parts WHERE topic = ? AND next - compacted_to > kept + 10000"
            for (part,) in db.execute(query, (topic,)).fetchall():
                with _transaction(db):
                    _compact(db, part, now_ms)


@dataclass(frozen=True)
class _File:
    """The database file and how it is opened."""

    path: str
    synchronous: str = "normal"

    @classmethod
    def parse(cls, path: str) -> _File:
        bare, _, query = path.partition("?")
        options = dict(urllib.parse.parse_qsl(query))
        synchronous = options.pop("synchronous", "normal").lower()
        if not bare:
            raise LogError("sqlite:// names no file; use sqlite:///path.db, or sqlite:////absolute/path.db")
        if options or synchronous not in ("normal", "full"):
            raise LogError(
                f"{query!r} is no option of a SQLite log; it has synchronous=normal and synchronous=full"
            )
        return cls(bare, synchronous)

    def open(self) -> sqlite3.Connection:
        """A connection, after making sure that the file is a log of ours."""
        with _translated(self.path):
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(
                self.path,
                timeout=_BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=64,
            )
            try:
                self._prepare(db)
            except BaseException:
                db.close()
                raise
        return db

    def inode(self) -> int:
        """Which file bears the name; 0: none."""
        try:
            return os.stat(self.path).st_ino
        except FileNotFoundError:
            return 0

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN")  # one snapshot: another process may be creating the tables
        identity = _identity(db)
        db.execute("COMMIT")
        if identity == _EMPTY:
            self._create(db)
        elif identity.application_id != _APPLICATION_ID:
            raise LogError(f"{self.path} is another program's SQLite file; name another file")
        elif identity.format != _FORMAT:
            raise LogError(
                f"{self.path} has format {identity.format}, this version knows {_FORMAT}; use the version that wrote it"
            )
        elif "id" not in [column[1] for column in db.execute("PRAGMA table_info(topics)")]:
            _give_ids(db)
        db.execute(f"PRAGMA synchronous = {self.synchronous}")
        db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        db.execute("PRAGMA cache_size = -16000")

    def _create(self, db: sqlite3.Connection) -> None:
        db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        self._switch_to_wal(db)
        with _transaction(db):
            if _identity(db) != _EMPTY:
                return  # another process was faster
            for statement in filter(str.strip, _TABLES.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {_FORMAT}")

    def _switch_to_wal(self, db: sqlite3.Connection) -> None:
        deadline = time.monotonic() + _BUSY_TIMEOUT_S
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL").fetchall()
                return
            except sqlite3.OperationalError as error:
                # the busy timeout does not apply here: several processes may be at it
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


class _Identity(NamedTuple):
    application_id: int
    format: int
    tables: int


_EMPTY = _Identity(0, 0, 0)


def _identity(db: sqlite3.Connection) -> _Identity:
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return _Identity(application_id, version, tables)


def _partitions(db: sqlite3.Connection, topic: str) -> int:
    (count,) = db.execute("SELECT count(*) FROM parts WHERE topic = ?", (topic,)).fetchone()
    return int(count)


def _id_of(db: sqlite3.Connection, topic: str) -> str:
    row = db.execute("SELECT id FROM topics WHERE topic = ?", (topic,)).fetchone()
    if row is None:
        raise no_topic(topic)
    return str(row[0])


def _give_ids(db: sqlite3.Connection) -> None:
    """To the topics of a file that was made before topics had any."""
    with _transaction(db):
        if "id" not in [column[1] for column in db.execute("PRAGMA table_info(topics)")]:
            db.execute("ALTER TABLE topics ADD COLUMN id TEXT")
            db.execute("UPDATE topics SET id = lower(hex(randomblob(16)))")


def _parts(db: sqlite3.Connection, topic: str) -> dict[int, int]:
    """partition → part"""
    return dict(db.execute("SELECT partition, part FROM parts WHERE topic = ?", (topic,)).fetchall())


def _expire(db: sqlite3.Connection, topic: str, now_ms: int) -> int:
    row = db.execute("SELECT retention_ms FROM topics WHERE topic = ?", (topic,)).fetchone()
    if row is None or row[0] is None:
        return 0
    gone = 0
    for part, high in db.execute("SELECT part, next FROM parts WHERE topic = ?", (topic,)).fetchall():
        query = "SELECT offset FROM records WHERE part = ? AND timestamp_ms >= ? ORDER BY offset LIMIT 1"
        low = (db.execute(query, (part, now_ms - row[0])).fetchone() or (high,))[0]
        gone += db.execute("DELETE FROM records WHERE part = ? AND offset < ?", (part, low)).rowcount
        db.execute("UPDATE parts SET low = max(low, ?) WHERE part = ?", (low, part))
    return gone


def _compact(db: sqlite3.Connection, part: int, now_ms: int) -> int:
    newest = "SELECT max(offset) FROM records WHERE part = :part GROUP BY key"
    gone = db.execute(
        f"DELETE FROM records WHERE part = :part AND offset NOT IN ({newest})", {"part": part}
    ).rowcount
    stale = (part, now_ms - TOMBSTONES_KEPT_MS)
    gone += db.execute(
        "DELETE FROM records WHERE part = ? AND value IS NULL AND timestamp_ms < ?", stale
    ).rowcount
    kept = "(SELECT count(*) FROM records WHERE part = :part)"
    db.execute(f"UPDATE parts SET compacted_to = next, kept = {kept} WHERE part = :part", {"part": part})
    return gone


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if db.in_transaction:  # some errors have ended it
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.OperationalError as error:
        retry = any(word in str(error) for word in ("locked", "busy", "full", "I/O"))
        raise (LogUnavailable if retry else LogError)(f"{path}: {error}") from error
    except (sqlite3.ProgrammingError, OSError) as error:
        raise LogError(f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise LogError(
            f"{path} is damaged or no log of ours ({error}); move it away or name another file"
        ) from error
