"""Columns → transitions: joins what users did to what was put before them, in event time, by partition.

`streaming/plain_joiner.py` is the spec, in plain Python; this does the same on columns, in one compiled loop over
per-user state. The pieces: `join_tables` (all state, as numpy tables), `join_clock` (watermark, dedup, timers),
`join_steps` (steps, from opening to transitions), `join_deeds` (attribution). What a push gives does not
depend on how the records were cut into pushes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from streaming.arena import Empty
from streaming.columns import Columns, Kind, Reason
from streaming.interning import combine
from streaming.jit import jit, part
from streaming.join_clock import (
    DUE,
    SCREEN,
    TAKE,
    advance,
    follow,
    is_known,
    is_late,
    newer_ids,
    remember,
)
from streaming.join_deeds import do_due, due_s, take_decision, take_event
from streaming.join_settings import (
    COUNTERS,
    FIRST_MS,
    JUMP,
    LAST_MS,
    STEPS_PER_USER,
    WAITS_PER_USER,
    JoinSettings,
)
from streaming.join_tables import (
    DONE,
    IDS,
    NEVER,
    NONE,
    OUT_AMENDMENTS,
    OUT_STATES,
    OUT_TRANSITIONS,
    ROWS,
    SLOTS,
    STEPS,
    USERS,
    WAITS,
    Tables,
    amendments_of,
    frozen,
    grown,
    load,
    new_out,
    new_tables,
    pieces,
    states_of,
    transitions_of,
    whole,
)
from streaming.pinned import pin
from streaming.transitions import Joined, Rejects

__all__ = ["Clock", "JoinSettings", "Joiner", "JoinerError"]

EVENT: Final = int(Kind.EVENT)
DECISION: Final = int(Kind.DECISION)
BAD_ROWS: Final = COUNTERS.index("bad")
LATE_ROWS: Final = COUNTERS.index("late")
DUPLICATES: Final = COUNTERS.index("duplicates")
MISPLACED: Final = COUNTERS.index("misplaced")

MOST_SLOTS: Final = 1000  # of a slate, or items of an event
# Most that one record, or one thing due, can do; the loop stops for more room before it might run out.
MOST_STEPS: Final = WAITS_PER_USER + 6
MOST_TRANSITIONS: Final = (MOST_STEPS + 8) * (MOST_SLOTS + 8)


class JoinerError(Exception):
    """The joiner was asked about a partition that it does not have, or given a state that does not fit."""


# --- the loop --------------------------------------------------------------------------------------------


@part
def room(t: Tables, slots: int, lines: int) -> int:
    """Which table is too short for a decision of so many slots, or an event of so many items; DONE: none."""
    c, out = t.clock[0], t.out
    c.need = MOST_STEPS
    if c.users_free == NONE and c.users_end >= len(t.users) and len(t.users) < t.rules.max_users:
        return USERS
    if len(t.rows) - c.rows_used < 4:
        return ROWS
    if len(t.steps) - (c.steps_tail - c.steps_head) < c.need:
        return STEPS
    if len(t.waits) - (c.waits_tail - c.waits_head) < c.need:
        return WAITS
    c.need = slots + lines + MOST_STEPS
    if len(t.slots) - (c.slots_tail - c.slots_head) < c.need:
        return SLOTS
    c.need = 1
    if 2 * (newer_ids(t).size[0] + 1) > len(newer_ids(t).keys):
        return IDS
    c.need = 2 * (slots + lines + 4 * MOST_STEPS) + 2 * over(t, c.steps_tail - c.steps_head)
    if len(out.states) - out.counts[0] < c.need:
        return OUT_STATES
    c.need = slots + lines + MOST_TRANSITIONS + over(t, c.slots_tail - c.slots_head)
    if len(out.transitions) - out.counts[1] < c.need:
        return OUT_TRANSITIONS
    c.need = 2 * (STEPS_PER_USER * slots + lines + WAITS_PER_USER + 1)
    if len(out.amendments) - out.counts[2] < c.need:
        return OUT_AMENDMENTS
    return DONE


@part
def over(t: Tables, kept: int) -> int:
    """All that is kept, where that is more than may be since a restart with lower bounds: it goes at once."""
    c, rules = t.clock[0], t.rules
    fits = c.steps_tail - c.steps_head <= rules.max_steps and c.slots_tail - c.slots_head <= rules.max_slots
    return 0 if fits else kept


@part
def all_due(t: Tables) -> int:
    """Do what is due up to the clock's target, in order of time, then let the watermark be there."""
    c = t.clock[0]
    while True:
        second = due_s(t)
        if second == NEVER:
            c.watermark_ms = max(c.watermark_ms, c.target_ms)
            return DONE
        short = room(t, 0, WAITS_PER_USER)
        if short != DONE:
            return short
        do_due(t, second)


@part
def id_of(columns: Columns, i: int) -> np.uint64:
    """What makes record i a duplicate of another: its kind, id and user."""
    return combine(combine(columns.id[i], columns.user[i]), np.uint64(columns.kind[i]))


@part
def is_welcome(t: Tables, columns: Columns, i: int) -> bool:
    """Whether record i counts; what does not is counted by cause."""
    if columns.kind[i] != EVENT and columns.kind[i] != DECISION:
        t.counters[BAD_ROWS] += 1
        return False
    if is_late(t, columns.user[i], columns.timestamp_ms[i]):
        t.counters[LATE_ROWS] += 1
        t.out.late[t.out.counts[3]] = i
        t.out.counts[3] += 1
        return False
    if is_known(t, id_of(columns, i)):
        t.counters[DUPLICATES] += 1
        return False
    if columns.misplaced[i]:
        t.counters[MISPLACED] += 1
    return True


@part
def take(t: Tables, columns: Columns, i: int) -> None:
    """Record i does what it does."""
    remember(t, id_of(columns, i))
    if columns.kind[i] == DECISION:
        take_decision(t, columns, i)
    else:
        take_event(t, columns, i)


@jit
def _run(
    tables: Tables, records: Columns, rows: npt.NDArray[np.int64], begin: int, watermark_ms: int
) -> tuple[int, int]:
    """Take the records rows[begin:], then advance (watermark_ms NONE: do not).

    Returns how far it came and which table is too short to go on, or DONE.
    """
    t, columns = pin(tables), pin(records)
    c = t.clock[0]
    for at in range(begin, len(rows)):
        i = rows[at]
        if c.stage == SCREEN:
            if not is_welcome(t, columns, i):
                continue
            c.stage = TAKE  # unless the clock moves
            follow(t, columns.user[i], columns.timestamp_ms[i], columns.logged_ms[i])
        if c.stage == DUE:
            short = all_due(t)
            if short != DONE:
                return at, short
            c.stage = TAKE
        lines = columns.item_bounds[i + 1] - columns.item_bounds[i]
        decided = columns.kind[i] == DECISION
        short = room(t, lines if decided else 0, 0 if decided else lines)
        if short != DONE:
            return at, short
        take(t, columns, i)
        c.stage = SCREEN
    if watermark_ms != NONE:
        if c.stage == SCREEN:
            advance(t, watermark_ms)
        if c.stage == DUE:
            short = all_due(t)
            if short != DONE:
                return len(rows), short
            c.stage = SCREEN
    return len(rows), DONE


# --- the joiner ------------------------------------------------------------------------------------------


class Clock(NamedTuple):
    """A partition's clock. Where `Joiner.advance` changes nothing of it but `through_ms`, event time just went on: two
    such words, one after the other, are the same as the second alone, as long as that is no jump."""

    through_ms: int  # event time that counts as complete
    window: tuple[int, ...]  # of ids that were seen
    jumped: tuple[int, ...]  # from where to where, and what could make it jump
    lately: bool  # so that it may be put back


class Joiner:
    """Owns the join state of its partitions, which never touch one another. Used by one thread at a time.

    Raises: JoinerError for a partition that was not assigned.
    """

    def __init__(self, settings: JoinSettings | None = None, partitions: Iterable[int] = ()) -> None:
        self.settings = settings or JoinSettings()
        self._out = new_out(self.settings.history_length)
        self._nowhere = self._out  # what resting partitions refer to, so that grown buffers are not held
        self._tables: dict[int, Tables] = {}
        self._pushes = 0
        self.assign(partitions)

    @property
    def partitions(self) -> list[int]:
        """What is assigned, in order."""
        return sorted(self._tables)

    def assign(self, partitions: Iterable[int]) -> None:
        """Take these partitions too, knowing nothing of them; those already held keep what they know."""
        for partition in partitions:
            if partition not in self._tables:
                tables = new_tables(self.settings, self._nowhere)
                tables.clock["partition"] = partition
                self._tables[partition] = tables

    def drop(self, partition: int) -> None:
        """Forget a partition: its open steps give no transitions here."""
        self._of(partition)
        del self._tables[partition]

    def push(self, columns: Columns) -> Joined:
        """What these records give. Each partition's must come in offset order, none left out or repeated.

        Bad rows are skipped: they are the caller's to dead-letter.
        """
        columns = _behaved(columns)
        self._start(len(columns.kind))
        for partition, rows in _by_partition(columns.partition):
            self._drive(partition, columns, rows, NONE)
        return self._joined()

    def advance(self, partition: int, watermark_ms: int) -> Joined:
        """What follows if all of the partition's records before watermark_ms (event time) have come: for idle ones.

        Never moves back; watermarks outside 2000..2100 are cut to it.
        """
        self._start(0)
        if watermark_ms >= FIRST_MS:
            self._drive(partition, _NO_COLUMNS, _NO_ROWS, min(int(watermark_ms), LAST_MS))
        return self._joined()

    def watermark_ms(self, partition: int) -> int | None:
        """Event time up to which the partition counts as complete; None before its first record."""
        clock = self._of(partition).clock
        return int(clock["watermark_ms"][0]) if clock["started"][0] else None

    def clock(self, partition: int) -> Clock:
        """How a partition's clock stands."""
        tables = self._of(partition)
        c, delay_ms = tables.clock[0], tables.rules.delay_ms
        jumped = tuple(int(c[name]) for name in JUMPED)
        window = (int(c["started"]), int(c["epoch"]), int(c["newer"]))
        return Clock(int(c["high_ms"]) - delay_ms, window, jumped, _jumped_lately(tables))

    def may_be_put_back(self, partition: int) -> bool:
        """Whether the partition's clock, as far as it is, is not yet beyond doubt: see join_clock.disputes."""
        tables = self._of(partition)
        return _jumped_lately(tables) or bool(tables.clock["settled"][0] < JUMP)

    def counters(self) -> dict[str, int]:
        """What was counted in the partitions held, since each began (restarts included); see COUNTERS."""
        totals = np.zeros(len(COUNTERS), np.int64)
        for tables in self._tables.values():
            totals += tables.counters
        return dict(zip(COUNTERS, totals.tolist(), strict=True))

    def newest_ms(self) -> int:
        """How far event time has come by the clock that is furthest, of those that cannot be put back any more; by the
        one that is least far, where there are none of these. 0 before the first record.
        """
        high_ms = {p: int(t.clock["high_ms"][0]) for p, t in self._tables.items() if t.clock["started"][0]}
        sure = [at for partition, at in high_ms.items() if not self.may_be_put_back(partition)]
        return max(sure) if sure else min(high_ms.values(), default=0)

    def users(self) -> int:
        """Users remembered."""
        return sum(int(tables.user_slots.size[0]) for tables in self._tables.values())

    def nbytes(self) -> int:
        """Memory held by all tables."""
        fields = [field for tables in self._tables.values() for field in tables[:-2]] + [self._out]
        return sum(a.nbytes for field in fields for a in (field if isinstance(field, tuple) else (field,)))

    def state(self, partition: int) -> dict[str, npt.NDArray[Any]]:
        """All that is known of a partition, as copies."""
        return whole({name: piece() for name, piece in self.pieces(partition).items()})

    def pieces(
        self, partition: int, empty: Empty = np.empty
    ) -> dict[str, Callable[[], dict[str, npt.NDArray[Any]]]]:
        """The same for a checkpoint: named pieces, of a copy made now, to be worked out in any thread, at any time.

        empty: gives the room for the copy.
        """
        return pieces(frozen(self._of(partition), empty))

    def restore(self, partition: int, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take the partition, knowing just what `state` was taken from; goes on as if nothing had happened.

        Raises: JoinerError if it was made under settings that do not fit (history_length, max_users).
        """
        try:
            tables = load(state, self.settings, self._nowhere)
        except (ValueError, KeyError) as error:
            raise JoinerError(f"partition {partition}: {error}") from error
        tables.clock["partition"] = partition
        self._tables[partition] = tables

    def _of(self, partition: int) -> Tables:
        tables = self._tables.get(partition)
        if tables is None:
            raise JoinerError(
                f"partition {partition} is not assigned, only {self.partitions}; assign it first"
            )
        return tables

    def _start(self, rows: int) -> None:
        self._pushes += 1
        self._out.counts[:] = 0
        if len(self._out.late) < rows:
            self._out = self._out._replace(late=np.zeros(rows, np.int64))

    def _drive(
        self, partition: int, columns: Columns, rows: npt.NDArray[np.int64], watermark_ms: int
    ) -> None:
        """Let the loop run, giving it room whenever it asks."""
        tables = self._of(partition)._replace(out=self._out)
        tables.clock["push"] = self._pushes
        at, short = _run(tables, columns, rows, 0, watermark_ms)
        while short != DONE:
            tables = grown(tables, short)
            at, short = _run(tables, columns, rows, at, watermark_ms)
        self._out = tables.out
        self._tables[partition] = tables._replace(out=self._nowhere)

    def _joined(self) -> Joined:
        late = self._out.late[: int(self._out.counts[3])].copy()
        rejects = Rejects(late, np.full(len(late), Reason.LATE, np.uint8))
        return Joined(states_of(self._out), transitions_of(self._out), amendments_of(self._out), rejects)


_DTYPES: Final = tuple(
    np.dtype(get_args(get_args(hint)[1])[0]) for hint in get_type_hints(Columns, include_extras=True).values()
)
JUMPED: Final = ("jumped", "jumped_from_ms", "jumped_to_ms", "ahead_count", "trial", "refuted", "doubt")
_NO_ROWS: Final = np.zeros(0, np.int64)
_NO_COLUMNS: Final = Columns(*(np.zeros(0, dtype) for dtype in _DTYPES))


def _behaved(columns: Columns) -> Columns:
    """The columns as the loop was compiled for: writable, contiguous, of the declared types."""
    arrays: tuple[npt.NDArray[Any], ...] = tuple(columns)
    return Columns(
        *(
            a if a.flags.carray and a.dtype == dtype else np.array(a, dtype)
            for a, dtype in zip(arrays, _DTYPES, strict=True)
        )
    )


def _jumped_lately(tables: Tables) -> bool:
    """join_clock.jumped_lately, for who has arrays in place of the loop's records."""
    c, rules = tables.clock, tables.rules
    return bool(c["jumped"][0] and c["high_ms"][0] < c["jumped_to_ms"][0] + rules.jump_ms + rules.late_ms)


def _by_partition(partition: npt.NDArray[np.int32]) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """Each partition with its rows, in order."""
    if len(partition) == 0:
        return []
    if (partition == partition[0]).all():
        return [(int(partition[0]), np.arange(len(partition)))]
    order = np.argsort(partition, kind="stable")
    cuts = np.flatnonzero(np.diff(partition[order])) + 1
    return [(int(partition[rows[0]]), rows) for rows in np.split(order, cuts)]
