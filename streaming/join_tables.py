"""All that the joiner keeps of one partition: plain numpy tables, which numba's loops read and write.

`steps`, their `slots` and `waits` are rings: an entry's sequence number never changes, it lies at (number mod
capacity), and capacities are powers of two. `users` and `rows` (states of open steps) are slabs with a free list.
Nothing here grows by itself: the loop checks `room` before each thing it does and stops, naming the table that is
short; Python then calls `grown` and lets it go on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streaming.arena import Empty, copied
from streaming.interning import HashMap, map_new, map_put, map_reserve
from streaming.jit import jit
from streaming.join_settings import COUNTERS, JoinSettings, to_ms
from streaming.rewards import ACTION_NAMES, CODES, EVENT_NAMES, HISTORY_NAMES
from streaming.transitions import Amendments, States, Transitions

Array = npt.NDArray[Any]
Fields = dict[str, Any]  # arrays by field, for `_replace`

NONE: Final = -1  # no such user, row or sequence number
NEVER: Final = 2**62

# What is short: the loop's answer when it stops
DONE, USERS, ROWS, STEPS, SLOTS, WAITS, IDS, OUT_STATES, OUT_TRANSITIONS, OUT_AMENDMENTS = range(10)

CLOCK: Final = np.dtype(
    [
        (name, np.int64)
        for name in (
            "partition",
            "started",  # 0 until the first record or `advance`
            "high_ms",
            "watermark_ms",
            "target_ms",  # what the watermark moves to, once all that is due before it is done
            "stage",  # how far the current record got (see joiner); survives a stop for want of room
            "settled",
            "ahead_count",  # a run of future-stamped records: how many, their oldest time, of two users?
            "ahead_ms",
            "ahead_mixed",
            "behind_count",  # the same for records that dispute the clock, with their newest time
            "behind_ms",
            "behind_mixed",
            "jumped",  # lately maybe, from here to there: BY_MANY, or by one user's LEAD
            "jumped_from_ms",
            "jumped_to_ms",
            "trial",  # records that bear out a jump that the log's time stamps told so far; 0: there is none
            "refuted",  # how many such jumps were not borne out
            "doubt",  # records until the log's time stamps are believed again
            "others_ms",  # newest time that a record of others says than of the user who leads
            "epoch",  # number of the dedup window,
            "dedup_ms",  # and how long they are
            "newer",  # which of ids_a, ids_b is the newer generation
            "users_end",  # slots ever used
            "users_free",  # head of the free list
            "cursor",  # where the next search for a stale user starts
            "rows_end",
            "rows_free",
            "rows_used",
            "steps_head",
            "steps_tail",
            "slots_head",
            "slots_tail",
            "waits_head",
            "waits_tail",
            "waits_live",
            "timers",  # entries of the heap
            "push",  # number of this push: tells rows already given out in it
            "need",  # how many more entries the table that is short must take
        )
    ]
    + [("ahead_user", np.uint64), ("behind_user", np.uint64), ("lead_user", np.uint64)]
)
USER: Final = np.dtype(
    [
        ("hash", np.uint64),
        ("last_ms", np.int64),
        ("touched_ms", np.int64),
        ("newest_step", np.int64),  # sequence numbers; NONE, or below the ring's head: there is none
        ("open_decision", np.int64),
        ("open_organic", np.int64),
        ("newest_organic_ms", np.int64),
        ("first_wait", np.int64),
        ("last_wait", np.int64),
        ("waits", np.int32),
        ("decision_row", np.int32),
        ("organic_row", np.int32),
        ("timer", np.int32),  # where in the heap; NONE: the slot is free
        ("next_free", np.int32),
        ("seen", np.int32),  # entries in the history
        ("seen_at", np.int32),  # where the next one goes
    ],
    align=True,
)
ROW: Final = np.dtype(
    [
        ("offset", np.int64),
        ("timestamp_ms", np.int64),
        ("out_push", np.int64),  # in which push it was given out last, and as which row of the States
        ("out_row", np.int64),
        ("next_free", np.int32),
    ],
    align=True,
)
STEP: Final = np.dtype(
    [
        ("offset", np.int64),
        ("timestamp_ms", np.int64),
        ("kept_from_ms", np.int64),
        ("before", np.int64),  # the same user's step before it
        ("first_slot", np.int64),
        ("id", np.uint64),
        ("policy_version", np.int64),
        ("user", np.int32),
        ("slots", np.int32),
        ("organic", np.uint8),
        ("open", np.uint8),
    ],
    align=True,
)
SLOT: Final = np.dtype(
    [
        ("reward", np.float64),
        ("item", np.int32),
        ("propensity", np.float32),
        ("purchases", np.int32),
        ("carts", np.int32),
    ],
    align=True,
)
WAIT: Final = np.dtype(  # one item of an event that waits; items of one event follow each other
    [
        ("offset", np.int64),
        ("timestamp_ms", np.int64),
        ("due_s", np.int64),
        ("next", np.int64),  # of the same user
        ("recommendation", np.uint64),  # 0: waits for a purchase to take back
        ("reward", np.float64),
        ("user", np.int32),
        ("item", np.int32),
        ("row", np.int32),  # the state at the event; NONE but for an event's first item
        ("left", np.int32),  # items of the event from here on
        ("name", np.uint8),
        ("live", np.uint8),
    ],
    align=True,
)
TIMER: Final = np.dtype([("due_s", np.int64), ("user", np.int64)])
DEED: Final = np.dtype([("reward", np.float64), ("item", np.int64)])
TRANSITION: Final = np.dtype(
    [
        ("offset", np.int64),
        ("policy_version", np.int64),
        ("partition", np.int32),
        ("state", np.int32),
        ("next_state", np.int32),
        ("action", np.int32),
        ("reward", np.float32),
        ("discount", np.float32),
        ("propensity", np.float32),
        ("slot", np.int16),
        ("organic", np.bool_),
    ],
    align=True,
)
AMENDMENT: Final = np.dtype(
    [("offset", np.int64), ("partition", np.int32), ("reward", np.float32), ("slot", np.int16)], align=True
)
STATE: Final = np.dtype(
    [("offset", np.int64), ("timestamp_ms", np.int64), ("partition", np.int32)], align=True
)


class Rules(NamedTuple):
    """The settings as the loop reads them; durations in ms."""

    gap_ms: int
    window_ms: int
    wait_ms: int
    late_ms: int
    delay_ms: int
    jump_ms: int
    ttl_ms: int
    dedup_ms: int
    chained: bool  # horizon "user"
    gamma: float
    max_users: int
    max_steps: int
    max_slots: int
    max_waits: int
    max_ids: int
    weight: Array  # [names] by event-name code
    value_weight: Array  # [names]
    moves: Array  # [names] bool: ACTION_NAMES
    remembered: Array  # [names] bool: HISTORY_NAMES


class Out(NamedTuple):
    """Where a push's results pile up; shared by all partitions."""

    counts: Array  # [4] states, transitions, amendments, late rows so far
    states: Array  # STATE
    item: Array  # [S, H]
    name: Array
    age_s: Array
    value: Array
    transitions: Array  # TRANSITION
    amendments: Array  # AMENDMENT
    late: Array  # int64 rows of the Columns
    deeds: Array  # DEED, scratch


class Tables(NamedTuple):
    """One partition."""

    clock: Array  # CLOCK [1]
    counters: Array  # int64 [COUNTERS]
    users: Array  # USER
    seen_ms: Array  # [users, H] histories, as rings
    seen_value: Array
    seen_item: Array
    seen_name: Array
    user_slots: HashMap
    timers: Array  # TIMER, a heap; as long as users
    rows: Array  # ROW
    row_item: Array  # [rows, H] states of open steps, newest entry first
    row_name: Array
    row_age_s: Array
    row_value: Array
    steps: Array  # STEP ring
    slots: Array  # SLOT ring
    waits: Array  # WAIT ring
    ids_a: HashMap
    ids_b: HashMap
    out: Out
    rules: Rules


RINGS: Final = ("steps", "slots", "waits")
SEGMENTS: Final = {"steps": 1 << 13, "slots": 1 << 16}  # entries of a piece in a checkpoint
SEEN: Final = ("seen_ms", "seen_value", "seen_item", "seen_name")
ROW_COLUMNS: Final = ("row_item", "row_name", "row_age_s", "row_value")


def rules_of(settings: JoinSettings) -> Rules:
    """The settings for the loop."""
    weight, value_weight = settings.rewards.columns()
    moves = np.zeros(len(EVENT_NAMES), np.bool_)
    moves[[CODES[name] for name in ACTION_NAMES]] = True
    remembered = np.zeros(len(EVENT_NAMES), np.bool_)
    remembered[[CODES[name] for name in HISTORY_NAMES]] = True
    return Rules(
        to_ms(settings.session_gap_s),
        to_ms(settings.attribution_window_s),
        to_ms(settings.overtake_wait_s),
        to_ms(settings.late_after_s),
        to_ms(settings.watermark_delay_s),
        to_ms(settings.max_jump_s),
        to_ms(settings.user_ttl_s),
        to_ms(settings.dedup_window_s),
        settings.horizon == "user",
        float(settings.gamma),
        settings.max_users,
        settings.max_steps,
        settings.max_slots,
        settings.max_waits,
        settings.max_ids,
        weight,
        value_weight,
        moves,
        remembered,
    )


def new_out(history_length: int) -> Out:
    """Empty results, with room for a usual push."""
    shape = (4096, history_length)
    return Out(
        np.zeros(4, np.int64),
        np.zeros(shape[0], STATE),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.uint8),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
        np.zeros(1 << 18, TRANSITION),
        np.zeros(1 << 14, AMENDMENT),
        np.zeros(1 << 12, np.int64),
        np.zeros(1 << 11, DEED),
    )


def new_tables(settings: JoinSettings, out: Out) -> Tables:
    """A partition that nothing is known of."""
    users, rows = 16, 16
    clock = np.zeros(1, CLOCK)
    clock["watermark_ms"] = clock["target_ms"] = -NEVER
    clock["users_free"] = clock["rows_free"] = NONE
    clock["dedup_ms"] = rules_of(settings).dedup_ms
    length = settings.history_length
    return Tables(
        clock,
        np.zeros(len(COUNTERS), np.int64),
        np.zeros(users, USER),
        np.zeros((users, length), np.int64),
        np.zeros((users, length), np.float32),
        np.zeros((users, length), np.int32),
        np.zeros((users, length), np.uint8),
        map_new(users),
        np.zeros(users, TIMER),
        np.zeros(rows, ROW),
        np.zeros((rows, length), np.int32),
        np.zeros((rows, length), np.uint8),
        np.zeros((rows, length), np.float32),
        np.zeros((rows, length), np.float32),
        np.zeros(128, STEP),
        np.zeros(256, SLOT),
        np.zeros(16, WAIT),
        map_new(64),
        map_new(64),
        out,
        rules_of(settings),
    )


# --- growing ---------------------------------------------------------------------------------------------


def grown(t: Tables, short: int) -> Tables:
    """The same tables, with room for `need` more entries in the one that is short."""
    need = int(t.clock["need"][0])
    if short == USERS:
        size = min(2 * len(t.users), t.rules.max_users)
        t = t._replace(user_slots=map_reserve(t.user_slots, size - t.user_slots.size[0]))
        return t._replace(**_longer(t, ("users", *SEEN, "timers"), size))
    if short == ROWS:
        return t._replace(**_longer(t, ("rows", *ROW_COLUMNS), 2 * len(t.rows)))
    if short in (STEPS, SLOTS, WAITS):
        field = {STEPS: "steps", SLOTS: "slots", WAITS: "waits"}[short]
        head, tail = (int(t.clock[f"{field}_{end}"][0]) for end in ("head", "tail"))
        longer: Fields = {field: ring(unrolled(getattr(t, field), head, tail), head, need)}
        return t._replace(**longer)
    if short == IDS:
        if t.clock["newer"][0]:
            return t._replace(ids_b=map_reserve(t.ids_b, need))
        return t._replace(ids_a=map_reserve(t.ids_a, need))
    return t._replace(out=_grown_out(t.out, short, need))


def _grown_out(out: Out, short: int, need: int) -> Out:
    if short == OUT_STATES:
        fields = ("states", "item", "name", "age_s", "value")
        return out._replace(**_longer(out, fields, 2 * len(out.states) + need))
    field = "transitions" if short == OUT_TRANSITIONS else "amendments"
    return out._replace(**_longer(out, (field,), 2 * len(getattr(out, field)) + need))


def _longer(tables: Tables | Out, fields: tuple[str, ...], size: int) -> Fields:
    return {field: _extended(getattr(tables, field), size) for field in fields}


def _extended(array: Array, size: int) -> Array:
    longer = np.zeros((size, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer


def unrolled(array: Array, head: int, tail: int, empty: Empty = np.empty) -> Array:
    """A copy of a ring's entries head..tail, in order."""
    start = head & (len(array) - 1)
    first = array[start : start + tail - head]
    copy = empty((tail - head,), array.dtype)
    copy[: len(first)], copy[len(first) :] = first, array[: tail - head - len(first)]
    return copy


def ring(entries: Array, head: int, need: int) -> Array:
    """A ring of these entries, the first of which has the number `head`, with room for `need` more."""
    capacity = 16
    while capacity < len(entries) + need:
        capacity *= 2
    array = np.zeros(capacity, entries.dtype)
    start = head & (capacity - 1)
    before_the_end = min(len(entries), capacity - start)
    array[start : start + before_the_end] = entries[:before_the_end]
    array[: len(entries) - before_the_end] = entries[before_the_end:]
    return array


# --- checkpoints -----------------------------------------------------------------------------------------


def frozen(t: Tables, empty: Empty = np.empty) -> Tables:
    """Copies of all that is known, rings from their heads on. Quick, since the stream waits for it: see `pieces`.

    empty: gives the room for them.
    """
    clock = t.clock.copy()
    clock["push"] = clock["need"] = 0
    ends = {name: int(clock[name][0]) for name in CLOCK.names or ()}
    copies: Fields = {
        **{
            field: copied(getattr(t, field)[: ends[f"{end}_end"]], empty)
            for end, fields in (("users", ("users", *SEEN)), ("rows", ("rows", *ROW_COLUMNS)))
            for field in fields
        },
        **{
            field: unrolled(getattr(t, field), ends[f"{field}_head"], ends[f"{field}_tail"], empty)
            for field in RINGS
        },
        **{field: HashMap(*(copied(a, empty) for a in getattr(t, field))) for field in ("ids_a", "ids_b")},
    }
    timers = copied(t.timers[: ends["timers"]], empty)
    return t._replace(clock=clock, counters=t.counters.copy(), timers=timers, **copies)


def pieces(t: Tables) -> dict[str, Callable[[], dict[str, Array]]]:
    """All that is known, by name, to be worked out in any thread, of frozen tables; equal for equal knowledge.

    Steps and their slots come in segments by sequence number: those of which nobody does anything any more stay the
    same from one checkpoint to the next.
    """
    named = {"": lambda: _dump(t)}
    for field, size in SEGMENTS.items():
        head, tail = (int(t.clock[f"{field}_{end}"][0]) for end in ("head", "tail"))
        for segment in range(head // size, -(-tail // size)):
            start = max(segment * size - head, 0)
            entries = getattr(t, field)[start : (segment + 1) * size - head]
            named[f"/{field}-{segment:08d}"] = partial(_fields, field, entries)
    return named


def whole(parts: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """What `pieces` gave, worked out, as one state for `load`."""
    state = dict(parts.get("", {}))
    for field in SEGMENTS:
        found = [parts[name] for name in sorted(parts) if name.startswith(f"/{field}-")]
        for name in found[0] if found else ():
            state[name] = np.concatenate([part[name] for part in found])
    return state


def _dump(t: Tables) -> dict[str, Array]:
    """What is not in segments (of which there are none where a ring is empty)."""
    state = {f"clock.{name}": t.clock[name].copy() for name in CLOCK.names or ()}
    state["counters"] = t.counters
    state |= _fields("users", t.users) | _fields("timers", t.timers) | _fields("waits", t.waits)
    state |= _fields("rows", t.rows, leave={"out_push", "out_row"})
    for field in SEGMENTS:
        state |= _fields(field, getattr(t, field)[:0])
    for field in (*SEEN, *ROW_COLUMNS):
        state[field] = getattr(t, field)
    for field in ("ids_a", "ids_b"):
        ids: HashMap = getattr(t, field)
        state[field] = np.sort(ids.keys[ids.values != NONE])
    return state


def _fields(table: str, entries: Array, leave: Collection[str] = ()) -> dict[str, Array]:
    names = entries.dtype.names or ()
    return {f"{table}.{name}": entries[name].copy() for name in names if name not in leave}


def load(state: Mapping[str, Array], settings: JoinSettings, out: Out) -> Tables:
    """The tables that `pieces` were of. Raises ValueError where settings or arrays contradict it."""
    length = state["seen_item"].shape[1]
    if length != settings.history_length:
        raise ValueError(
            f"the state has histories of {length} entries, history_length is {settings.history_length}; set it back"
        )
    users = len(state["users.hash"])
    if users > settings.max_users:
        raise ValueError(f"the state has {users} users, max_users is {settings.max_users}; raise it")
    t = new_tables(settings, out)
    for name in CLOCK.names or ():
        t.clock[name] = state.get(f"clock.{name}", 0)  # some were added since
    t.counters[: len(state["counters"])] = state["counters"]  # counters may have been added since
    t = t._replace(
        users=_load_fields(state, "users", USER, users, t.users),
        timers=_extended(_load_fields(state, "timers", TIMER, 0, t.timers), max(users, len(t.users))),
        rows=_load_fields(state, "rows", ROW, 0, t.rows),
        user_slots=map_new(max(users, len(t.users))),
        ids_a=_id_set(state["ids_a"]),
        ids_b=_id_set(state["ids_b"]),
    )
    t = _in_windows(t)
    for slot in np.flatnonzero(t.users["timer"][:users] != NONE):
        map_put(t.user_slots, t.users["hash"][slot], int(slot))
    longer: Fields = {}
    for field in SEEN:
        longer[field] = _extended(state[field], len(t.users))
    for field in ROW_COLUMNS:
        longer[field] = _extended(state[field], len(t.rows))
    for field in RINGS:
        entries = np.zeros(len(state[f"{field}.{getattr(t, field).dtype.names[0]}"]), getattr(t, field).dtype)
        for name in entries.dtype.names or ():
            entries[name] = state[f"{field}.{name}"]
        longer[field] = ring(entries, int(t.clock[f"{field}_head"][0]), 0)
    t = t._replace(**longer)
    _hasten(t)
    return t


def _in_windows(t: Tables) -> Tables:
    """Where dedup windows have another length than they had, they begin at other times, and no id may be forgotten for
    it: all are of the newest."""
    dedup_ms, c = t.rules.dedup_ms, t.clock
    epoch = c["high_ms"][0] // dedup_ms
    had_ms = c["dedup_ms"][0] or (dedup_ms if c["epoch"][0] == epoch else 0)  # checkpoints did not always say
    c["dedup_ms"] = dedup_ms
    if had_ms == dedup_ms or not c["started"][0]:
        return t
    c["epoch"] = epoch
    both = _id_set(np.concatenate([ids.keys[ids.values != NONE] for ids in (t.ids_a, t.ids_b)]))
    none = map_new(64)
    return t._replace(ids_a=none, ids_b=both) if c["newer"][0] else t._replace(ids_a=both, ids_b=none)


def _hasten(t: Tables) -> None:
    """Let users be due when they are by the settings as they are now, where that is earlier than by those before."""
    timers = t.timers[: t.clock["timers"][0]]
    who = timers["user"]
    visits = (t.users["open_decision"][who] != NONE) | (t.users["open_organic"][who] != NONE)
    idle_ms = np.where(visits & (not t.rules.chained), t.rules.gap_ms, t.rules.ttl_ms)
    due_s = (t.users["touched_ms"][who] + idle_ms) // 1000 + 1
    if (due_s >= timers["due_s"]).all():
        return
    timers["due_s"] = np.minimum(due_s, timers["due_s"])
    timers[:] = timers[np.lexsort((timers["user"], timers["due_s"]))]  # what is sorted is a heap
    t.users["timer"][timers["user"]] = np.arange(len(timers))


def _load_fields(
    state: Mapping[str, Array], table: str, dtype: np.dtype[Any], size: int, fresh: Array
) -> Array:
    names = [name for name in dtype.names or () if f"{table}.{name}" in state]
    used = len(state[f"{table}.{names[0]}"])
    array = np.zeros(max(used, size, len(fresh)), dtype)
    for name in names:
        array[name][:used] = state[f"{table}.{name}"]
    return array


def _id_set(keys: Array) -> HashMap:
    ids = map_new(max(64, len(keys)))
    _put_all(ids, keys)
    return ids


@jit
def _put_all(ids: HashMap, keys: Array) -> None:
    for i in range(len(keys)):
        map_put(ids, keys[i], 0)


# --- results ---------------------------------------------------------------------------------------------


def states_of(out: Out) -> States:
    """Copies of the states that have piled up."""
    n = int(out.counts[0])
    meta = out.states[:n]
    return States(
        meta["partition"].copy(),
        meta["offset"].copy(),
        meta["timestamp_ms"].copy(),
        out.item[:n].copy(),
        out.name[:n].copy(),
        out.age_s[:n].copy(),
        out.value[:n].copy(),
    )


def transitions_of(out: Out) -> Transitions:
    """Copies of the transitions that have piled up."""
    entries = out.transitions[: int(out.counts[1])]
    return Transitions(**{name: entries[name].copy() for name in Transitions._fields})


def amendments_of(out: Out) -> Amendments:
    """Copies of the amendments that have piled up."""
    entries = out.amendments[: int(out.counts[2])]
    return Amendments(**{name: entries[name].copy() for name in Amendments._fields})
