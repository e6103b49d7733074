"""The server's own view of the log: a thread follows `events` and `catalog`, requests ask what they came to.

Nothing here is durable or exact: a restarted server reads the log's tail again. What learning needs to be exact
about, the decision records carry.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from learner.policy import Entry, described_in
from serving import metrics
from serving.described import Described
from serving.user_state import LEAST_HALF_LIFE, UserState
from streaming.catalog import Catalog, Renewal
from streaming.chunks import batch_of
from streaming.columns import Kind
from streaming.decoder import Decoder
from streaming.interning import Vocabulary, hash_string
from streaming.log import Log, LogError, OffsetOutOfRange, Reader, RecordBatch, TopicReplaced, UnknownTopic
from streaming.rewards import EVENT_NAMES, RewardTable
from streaming.schemas import Codec, SchemaError

logger = logging.getLogger(__name__)

_POLL_RECORDS: Final = 4096
_REST_S: Final = 0.05  # between two looks at a log that was read to its end
_LOOK_S: Final = 5.0  # for partitions added since
_LOOK_FOR_TOPIC_S: Final = 0.5
_RETRY_S: Final = 1.0
_HEED_S: Final = 0.2  # that whoever waits for it takes to stop
_COMPLAIN_S: Final = 30.0
# a Kafka partition that ends in a transaction marker never lets a reader's position reach its end
_QUIET_S: Final = 2.0


@dataclass(frozen=True)
class ViewConfig:
    """The server's own view of the log."""

    topic: str = field(default="events", metadata={"help": "topic with events and decisions"})
    catalog_topic: str = field(default="catalog", metadata={"help": "topic with the items"})
    backlog: int = field(
        default=1_000_000,
        metadata={"help": "newest records of each partition read at the start; records, >= 0"},
    )
    warm_up_s: float = field(
        default=30.0,
        metadata={"help": "longest wait for that reading before calls are answered; seconds, >= 0"},
    )
    max_users: int = field(
        default=200_000,
        metadata={"help": "users remembered, the least recently active go first; users, 1..100 million"},
    )
    history_length: int = field(
        default=32, metadata={"help": "newest entries remembered of each user; entries, 1..1000"}
    )
    max_described: int = field(
        default=100_000,
        metadata={
            "help": "items remembered that requests described, for histories that name them before the weights "
            "do; items, 0..100 million"
        },
    )
    max_items: int = field(
        default=10_000_000,
        metadata={
            "help": "items known, for good: what comes later is the unknown item in histories; items, 1..1073741824"
        },
    )
    bought_window_s: float = field(
        default=30 * 86400.0,
        metadata={"help": "an item bought is not recommended again for so long; seconds, >= 0 (0: at once)"},
    )
    popularity_half_life: float = field(
        default=100_000.0,
        metadata={"help": "popularity of an item halves with so many events; events, >= 0.01"},
    )

    def __post_init__(self) -> None:
        bounds = {
            "backlog": (0, 2**62),
            "warm_up_s": (0, 86400),
            "max_users": (1, 100_000_000),
            "history_length": (1, 1000),
            "max_described": (0, 100_000_000),
            "max_items": (1, 1 << 30),
            "bought_window_s": (0, 100 * 365 * 86400),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be within {low}..{high}, not {getattr(self, name)}")
        if not self.popularity_half_life >= LEAST_HALF_LIFE:
            raise ValueError(
                f"popularity_half_life must be >= {LEAST_HALF_LIFE}, not {self.popularity_half_life}"
            )


class View:
    """What the log says about users and items. One thread absorbs; any thread asks."""

    BOUGHT_LENGTH: Final = 16  # purchases remembered of each user

    def __init__(self, config: ViewConfig, codec: Codec) -> None:
        self.vocabulary: Final = Vocabulary(config.max_items)
        self.users: Final = UserState(
            config.max_users,
            config.history_length,
            self.BOUGHT_LENGTH,
            config.popularity_half_life,
            RewardTable(),
        )
        self.described: Final = Described(config.max_described)
        self._codec = codec
        self._catalog = Catalog(codec, self.vocabulary)
        self._decoder = Decoder(codec, self.vocabulary, None)
        self._bought_window_ms = int(config.bought_window_s * 1000)
        self._item_ids: list[str] = [""]  # by vocabulary id; grows in place, never changes
        self._catalog_lock = threading.Lock()

    def absorb(self, batch: RecordBatch) -> int:
        """Take in records of `events`; returns how many of them could not be read."""
        columns = self._decoder.decode(batch)
        self._name_items()  # first: whoever asks for these users must be able to name what they met
        self.users.absorb(columns, len(self.vocabulary))
        for row in np.flatnonzero(columns.candidates & (columns.kind == Kind.DECISION)).tolist():
            self._note_described(batch.value(row) or b"")
        return int(np.count_nonzero(columns.kind == Kind.BAD))

    def absorb_catalog(self, batch: RecordBatch) -> int:
        """Take in records of `catalog`; returns how many of them could not be read."""
        records, rejects = self._catalog.read(batch)  # which takes long, and nobody has to wait for
        with self._catalog_lock:
            self._catalog.put(records)
        self._name_items()
        return len(rejects.row)

    def begin_catalog(self) -> None:
        """The catalog's topic was made anew: see `Catalog.begin_anew`."""
        with self._catalog_lock:
            self._catalog.begin_anew()

    def end_catalog(self) -> None:
        """The new one was read: see `Catalog.end_anew`."""
        with self._catalog_lock:
            self._catalog.end_anew()

    def history(self, user_id: str) -> list[Entry]:
        """The user's newest entries, oldest first; those that it cannot name, or had no room for, are left out."""
        history = self.users.history(hash_string(user_id))
        names = self._item_ids
        columns = (column.tolist() for column in history)
        return [Entry(names[i], EVENT_NAMES[n], t, v) for i, n, t, v in zip(*columns, strict=True) if i]

    def bought(self, user_id: str, now_ms: int) -> list[str]:
        """Items that the user bought within the window before `now_ms` and did not return."""
        if not self._bought_window_ms:
            return []
        items = self.users.bought(hash_string(user_id), now_ms - self._bought_window_ms)
        return [self._item_ids[i] for i in items.tolist()]

    def bought_in(self, history: Sequence[Entry], now_ms: int) -> set[str]:
        """As `bought`, of a history that the request brought along."""
        bought: dict[str, int] = {}
        since_ms = now_ms - self._bought_window_ms
        for entry in history:
            if entry.name == "purchase" and since_ms <= entry.timestamp_ms:
                bought[entry.item_id] = bought.get(entry.item_id, 0) + 1
            elif entry.name == "refund":  # of a purchase before it, not of one to come
                bought[entry.item_id] = max(0, bought.get(entry.item_id, 0) - 1)
        return {item_id for item_id, pieces in bought.items() if pieces > 0 and self._bought_window_ms}

    def items(self) -> list[str]:
        """Item ids by vocabulary id, [items + 1]; the first is empty. Grows only; do not change it."""
        return self._item_ids

    def availability(self, items: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """What the catalog says of items 0 .. `items`, each [items + 1]: known to it; out of stock or gone."""
        known, off = np.zeros(items + 1, np.bool_), np.zeros(items + 1, np.bool_)
        with self._catalog_lock:
            catalog, have = self._catalog, min(items + 1, len(self._catalog.known))
            known[:have] = catalog.known[:have] | catalog.gone[:have]
            off[:have] = catalog.gone[:have] | (catalog.known[:have] & ~catalog.in_stock[:have])
        return known, off

    @property
    def catalog_version(self) -> int:
        """Changes whenever `availability` may."""
        return self._catalog.version

    def _note_described(self, record: bytes) -> None:
        """Features that a decision's candidates were shown with."""
        try:
            _, decision = self._codec.decode(record)
        except SchemaError:  # a field that is of no use here is damaged
            return
        self.described.note(described_in(decision))

    def _name_items(self) -> None:
        # strings once per item, not once per request
        if len(self.vocabulary) >= len(self._item_ids):
            self._item_ids.extend(self.vocabulary.item_ids(len(self._item_ids)))


def compile_view(config: ViewConfig) -> None:
    """Have everything compiled that absorbing and asking needs, by a view that is thrown away.

    It takes seconds where the cache is empty, in which nothing else in the process makes headway.
    """
    item, timestamp = {"item_id": "i", "price": 1.0}, 946_684_800_000
    event = {"event_id": "e", "name": "purchase", "user_id": "u", "timestamp": timestamp, "items": [item]}
    slot = {"item_id": "i", "propensity": 1.0}
    decision = {"recommendation_id": "r", "user_id": "u", "timestamp": timestamp, "slate": [slot]}
    codec = Codec()
    view = View(replace(config, max_users=1), codec)
    view.absorb(batch_of([codec.encode_event(event), codec.encode_decision(decision)]))
    view.history("u")
    view.bought("u", timestamp)


class Follower:
    """Reads the log into a View, in a thread of its own, for ever: an unreachable log is retried."""

    def __init__(self, log: Log, view: View, config: ViewConfig, clock: Callable[[], float]) -> None:
        self._log = log
        self._view = view
        self._clock = clock
        self._tails = [
            # first: an item out of stock must not be recommended because its events were read before
            _Tail(
                log,
                config.catalog_topic,
                None,  # compacted: all of it is the catalog
                view.absorb_catalog,
                Renewal(view.begin_catalog, view.end_catalog),
            ),
            _Tail(log, config.topic, config.backlog, view.absorb),
        ]
        self._stop = threading.Event()
        self._caught_up = threading.Event()
        self._busy_s = clock()
        self._said: dict[str, float] = {}  # troubles complained of lately, and when
        self._thread = threading.Thread(target=self._run, name="view", daemon=True)

    def start(self, warm_up_s: float, stop: threading.Event | None = None) -> bool:
        """Begin; returns once everything that was in the log is absorbed (True), after warm_up_s, or soon after `stop`
        came (False)."""
        self._thread.start()
        ends = time.monotonic() + warm_up_s
        while not (stop is not None and stop.is_set()):
            left_s = ends - time.monotonic()
            if self._caught_up.wait(max(0.0, min(left_s, _HEED_S))):
                return True
            if left_s <= 0:
                break
        return False

    def stop(self, timeout_s: float | None = None) -> None:
        """End the thread, or leave it behind after that time, where the log does not answer; harmless twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if not self._thread.is_alive():
            for tail in self._tails:
                tail.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._turn()

    def _turn(self) -> None:
        now = self._clock()
        came = [self._records_of(tail, now) for tail in self._tails]
        read = sum(count or 0 for count in came)
        if read:
            self._busy_s = self._clock()
        metrics.USERS.set(self._view.users.known)
        metrics.USERS_FORGOTTEN.set(self._view.users.forgotten)
        metrics.ITEMS_REFUSED.set(self._view.vocabulary.refused)
        if None in came:
            self._stop.wait(_RETRY_S)
            self._busy_s = self._clock()
            return
        if not self._caught_up.is_set() and self._has_read_the_log():
            self._caught_up.set()
        if read < _POLL_RECORDS:
            # record by record, as they come, the reading would cost more than the answers do
            self._stop.wait(_REST_S)

    def _records_of(self, tail: _Tail, now: float) -> int | None:
        """How many of them were absorbed; None where it is in trouble, which holds up no other."""
        try:
            if tail.look(now):
                self._busy_s = self._clock()
            return tail.poll()
        except OffsetOutOfRange as error:
            return self._skip_gap(tail, error)
        except LogError as error:
            self._unavailable(error)
        except Exception as error:  # whatever a driver or a record may raise: this thread must go on
            metrics.VIEW_FAILURES.labels("fault").inc()
            self._complain(repr(error), error)
            tail.give_up()
        return None

    def _unavailable(self, error: LogError) -> None:
        metrics.VIEW_FAILURES.labels("unavailable").inc()
        self._complain(str(error))

    def _complain(self, trouble: str, fault: Exception | None = None) -> None:
        """Once, and now and then while it lasts: it is tried every second. fault: one that nobody foresaw."""
        now = self._clock()
        lately = {said: when for said, when in self._said.items() if now - when < _COMPLAIN_S}
        if trouble not in lately:
            logger.warning("own view: %s; retrying", trouble, exc_info=fault)
        self._said = {trouble: now} | lately

    def _has_read_the_log(self) -> bool:
        """Whether all that was there at the start is absorbed, or what is left does not come, as where a registry is
        away. A reader that is slow to begin is waited for."""
        if all(tail.caught_up() for tail in self._tails):
            return True
        return self._clock() - self._busy_s >= _QUIET_S and all(tail.has_begun() for tail in self._tails)

    def _skip_gap(self, tail: _Tail, error: OffsetOutOfRange) -> int | None:
        try:
            skipped = tail.skip_gap()
        except LogError as unavailable:  # just now: the next poll says so again
            self._unavailable(unavailable)
            return None
        if not skipped:
            self._unavailable(error)  # the log does hold it, so it is asked again
            return None
        metrics.VIEW_FAILURES.labels("gap").inc()
        logger.warning("own view: %s; going on at what the log still holds", error)
        return 0


class _Tail:
    """One topic, all its partitions, from the newest `backlog` records on (None: from the beginning)."""

    def __init__(
        self,
        log: Log,
        topic: str,
        backlog: int | None,
        absorb: Callable[[RecordBatch], int],
        renewal: Renewal | None = None,
    ) -> None:
        self._log = log
        self._topic = topic
        self._backlog = backlog
        self._absorb, self._renewal = absorb, renewal
        self._reader: Reader | None = None
        self._parked: RecordBatch | None = None  # read, not absorbed yet
        self._start: dict[int, int] = {}  # where reading of each partition began,
        self._goal: dict[int, int] = {}  # and where it ended then
        self._looked_s = float("-inf")

    def look(self, now_s: float) -> bool:
        """Now and then: open the topic when it is there, take up partitions added since, measure the lag. True: it was
        opened."""
        if now_s - self._looked_s < (_LOOK_S if self._reader else _LOOK_FOR_TOPIC_S):
            return False
        self._looked_s = now_s
        try:
            bounds = self._log.bounds(self._topic)
        except UnknownTopic:
            return False
        if self._reader is None:
            self._start = {p: self._first(b.low, b.high) for p, b in bounds.items()}
            self._goal = {p: b.high for p, b in bounds.items()}
            self._reader = self._log.reader(self._topic, self._start, keys=self._backlog is None)
            return True
        position = self._reader.position()
        if bounds.keys() - position.keys():
            self._reader.assign({p: position.get(p, b.low) for p, b in bounds.items()})
        if self._backlog is not None:
            metrics.VIEW_LAG.set(sum(max(0, b.high - position.get(p, b.low)) for p, b in bounds.items()))
        if self._renewal is not None and self._parked is None:
            self._renewal.look(bounds, position, now_s)
        return False

    def poll(self) -> int:
        """Absorb what is there; returns the number of records."""
        if self._reader is None:
            return 0
        try:
            batch = self._parked or self._reader.poll(_POLL_RECORDS, 0.0)
        except (TopicReplaced, UnknownTopic):
            self.close()  # read like one not met before, once it is there again
            if self._renewal is not None:
                self._renewal.begin()
            raise
        if len(batch):
            self._parked = batch  # a registry that cannot be asked now loses nothing
            metrics.VIEW_BAD_RECORDS.labels(self._topic).inc(self._absorb(batch))
            self._parked = None
            metrics.VIEW_RECORDS.labels(self._topic).inc(len(batch))
        return len(batch)

    def give_up(self) -> None:
        """Pass over what was read and could not be absorbed: it must not hold up what comes after it."""
        self._parked = None

    def caught_up(self) -> bool:
        """Whether everything that was there at the start has been absorbed; True where there is no such topic."""
        if self._reader is None:
            return True
        if self._parked:
            return False
        position = self._reader.position()
        return all(position.get(p, 0) >= high for p, high in self._goal.items())

    def has_begun(self) -> bool:
        """Whether every partition that held something at the start has given some of it, or is held up."""
        if self._reader is None or self._parked:
            return True
        position = self._reader.position()
        begun = (
            self._start[p] == high or position.get(p, high) > self._start[p] for p, high in self._goal.items()
        )
        return all(begun)

    def skip_gap(self) -> bool:
        """Move every partition whose position retention has overtaken to what is still there, and ask for all anew.
        True: there was one."""
        if self._reader is None:
            return False
        position, bounds = self._reader.position(), self._log.bounds(self._topic)
        within = {p: b.low <= position[p] <= b.high for p, b in bounds.items() if p in position}
        self._reader.seek({p: position[p] if inside else bounds[p].low for p, inside in within.items()})
        return not all(within.values())

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _first(self, low: int, high: int) -> int:
        return low if self._backlog is None else max(low, high - self._backlog)
