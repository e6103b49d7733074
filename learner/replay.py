"""The replay buffer: what was seen, amended in place, sampled with n-step returns worked out at sampling.

Steps are kept apart from their transitions: the K slots of a step share one state, and a step knows which one
followed it. Sampling walks that chain, so a reward that arrives a day late is in every n-step return that it
belongs to from then on. A step lives as long as a transition that is kept can reach it; then its slot is used
again. So memory is bounded by `capacity` and no sample ever lacks a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from learner.checkpoint import KEEP, Arrays, Keep
from learner.sum_tree import Tree, tree_fill, tree_find_all, tree_new, tree_repair, tree_set
from streaming.arena import Empty, copied
from streaming.copying import copy_row
from streaming.jit import jit
from streaming.pinned import pin
from streaming.transitions import Amendments, Joined, States, Transitions

SEGMENT: Final = 8192  # rows of a checkpoint part: what one change makes the next checkpoint write again
MOST_ODDS: Final = 1000.0  # of chosen rows: where there is one, it is not all that is drawn
PRIORITY_SEGMENTS: Final = 8  # priorities change everywhere all the time: fewer parts, so many times as large
MAX_PARTITION: Final = 1 << 15
MAX_OFFSET: Final = 1 << 48
SIBLINGS: Final = 16  # slots of a sampled transition's step that come with it, itself included
RESERVED_STEPS: Final = 1 << 22
PRIORITY_FLOOR: Final = 1e-3  # added to |TD error|, so that nothing becomes unreachable

# Places in Store.cursor.
_HEAD, _TAIL, _USED, _FREE, _DUPLICATES, _AMENDED, _MISSED = range(7)
# Rows of Store.stamps.
_HISTORY, _CHAIN, _ROWS, _REWARDS, _PRIORITIES = range(5)


class ReplayError(Exception):
    """The buffer cannot do what was asked; the message says what and what to do about it."""


class Histories(NamedTuple):
    """B states: the history before a step, newest entry first, padded at the end with item 0 and name 0.

    Numbers are those of `streaming.transitions.States`. A next state behind a discount of 0 is all padding.
    """

    item: npt.NDArray[np.int32]  # [B, H] vocabulary ids; 0: padding, or an unknown item where name is set
    name: npt.NDArray[np.uint8]  # [B, H] event-name codes; 0: padding
    age_s: npt.NDArray[np.float32]  # [B, H] seconds before the step
    value: npt.NDArray[np.float32]  # [B, H] price x quantity, 0 where unknown


class Batch(NamedTuple):
    """B sampled transitions, ready for one update: target = reward + discount * V(next_state)."""

    state: Histories
    next_state: Histories  # where `reward` stops counting; padding where discount is 0
    action: npt.NDArray[np.int32]  # [B] vocabulary id of the item in the slot
    # [B] n-step: the slot's own + gamma * all that the next step earned + ...
    reward: npt.NDArray[np.float32]
    slot_reward: npt.NDArray[np.float32]  # [B] the slot's own reward alone (what n = 1 gives)
    step_reward: npt.NDArray[np.float32]  # [B] what all slots of its step earned
    discount: npt.NDArray[np.float32]  # [B] gamma**m after m <= n steps; 0 where the session ended among them
    weight: npt.NDArray[np.float32]  # [B] importance-sampling weight, at most 1; all 1 when uniform
    slot: npt.NDArray[np.int16]  # [B] place of `action` in the slate, from 0
    slots: npt.NDArray[np.int32]  # [B] transitions that the step gave: the slate's length
    organic: npt.NDArray[np.bool_]  # [B] the user went to `action` unaided
    propensity: npt.NDArray[np.float32]  # [B] of the behaviour policy; NaN for organic steps
    policy_version: npt.NDArray[np.int64]  # [B] that made the decision; -1 for organic steps
    timestamp_ms: npt.NDArray[np.int64]  # [B] event time of `state`
    next_timestamp_ms: npt.NDArray[np.int64]  # [B] event time of `next_state`; 0 where discount is 0
    # [B] sequence numbers, for `Replay.update_priorities`; never used twice
    index: npt.NDArray[np.int64]  # type: ignore[assignment]
    # the whole step: `action` first, then the slots after it, then those before; action 0 where there is none (or
    # it is no longer kept), the first SIBLINGS of them
    slate: npt.NDArray[np.int32]  # [B, SIBLINGS] vocabulary ids
    slate_slot: npt.NDArray[np.int16]  # [B, SIBLINGS] place in the slate, from 0
    slate_reward: npt.NDArray[np.float32]  # [B, SIBLINGS] each slot's own reward


class Contents(NamedTuple):
    """All T transitions kept, in the order in which they came, each with its reward as amended until now."""

    partition: npt.NDArray[np.int64]  # [T] \
    offset: npt.NDArray[np.int64]  # [T]  > identity
    slot: npt.NDArray[np.int16]  # [T]   /
    action: npt.NDArray[np.int32]  # [T]
    reward: npt.NDArray[np.float64]  # [T]
    discount: npt.NDArray[np.float32]  # [T] to the next step; 0 where the session ended
    next_offset: npt.NDArray[np.int64]  # [T] of the step that followed, in the same partition; -1: none
    organic: npt.NDArray[np.bool_]  # [T]
    policy_version: npt.NDArray[np.int64]  # [T] -1 for organic steps


def empty_batch(batch_size: int, history_length: int) -> Batch:
    """A batch to be sampled into, again and again."""

    def histories() -> Histories:
        shape = (batch_size, history_length)
        return Histories(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.uint8),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
        )

    dtypes = (np.int32, *[np.float32] * 5, np.int16, np.int32, np.bool_, np.float32, *[np.int64] * 4)
    columns: list[npt.NDArray[Any]] = [np.zeros(batch_size, dtype) for dtype in dtypes]
    slates = [np.zeros((batch_size, SIBLINGS), dtype) for dtype in (np.int32, np.int16, np.float32)]
    return Batch(histories(), histories(), *columns, *slates)


# What is read together lies together: a random step or transition costs one miss of the cache, not one a field.
_STEP: Final = np.dtype(
    [
        ("key", np.int64),  # partition << 48 | offset; -1: a slot that is free again
        ("total", np.float64),  # reward of all its slots, also of those no longer kept
        ("first", np.int64),  # sequence number of its first transition
        ("next", np.int32),  # slot of the step that followed; -1: none
        ("discount", np.float32),  # to the next step; 0 where the session ended
        ("slots", np.int32),  # how many transitions it gave; 0: not complete yet
        ("refs", np.int32),  # transitions kept + steps that this one followed (derived)
        ("timestamp_ms", np.int64),
        ("policy_version", np.int64),
        ("last_slot", np.int16),  # the highest slot it gave
        ("organic", np.bool_),
    ],
    align=True,
)
_ROW: Final = np.dtype(
    [
        ("reward", np.float64),  # the slot's own
        ("step", np.int32),  # slot of its step
        ("action", np.int32),
        ("propensity", np.float32),
        ("slot", np.int16),
    ],
    align=True,
)


class _Histories(NamedTuple):
    """The states of S steps."""

    item: npt.NDArray[np.int32]  # [S, H]
    name: npt.NDArray[np.uint8]  # [S, H]
    age_s: npt.NDArray[np.float32]  # [S, H]
    value: npt.NDArray[np.float32]  # [S, H]


class _Store(NamedTuple):
    """All of it, in one value that numba functions take."""

    steps: npt.NDArray[Any]  # [S] of _STEP, S slots for steps, in no order
    history: _Histories
    rows: npt.NDArray[Any]  # [T] of _ROW: a ring, sequence number n in row n % T
    table: npt.NDArray[np.int32]  # [power of two >= 2 S] key -> slot, linear probing; -1: free
    free: npt.NDArray[np.int32]  # [S] stack of freed slots, cursor[_FREE] of them
    cursor: npt.NDArray[np.int64]  # [7]
    stamps: npt.NDArray[np.int64]  # [5, segments] the clock at the last change; 0: never
    sizes: npt.NDArray[np.int64]  # [5] rows of a segment
    tree: Tree  # what each row is drawn in proportion to: priority**alpha, times `_odds`; empty where uniform
    top: npt.NDArray[np.float64]  # [1] the largest priority**alpha ever
    chosen: npt.NDArray[np.float64]  # [2] share wanted of chosen rows in a batch; how many are kept


_CHAIN_FIELDS: Final = (
    *("key", "next", "discount", "total", "first", "slots", "last_slot", "organic", "policy_version"),
)
_ROW_FIELDS: Final = ("step", "slot", "action", "propensity")


# --- key -> step -----------------------------------------------------------------------------------------


@jit
def _key(partition: int, offset: int) -> int:
    return int((np.int64(partition) << 48) | np.int64(offset))


@jit
def _home(key: int, mask: int) -> int:
    h = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return int(h >> np.uint64(32)) & mask


@jit
def _place(store: _Store, key: int) -> int:
    """Where the index holds this key, or the free place where it belongs."""
    mask = len(store.table) - 1
    at = _home(key, mask)
    while store.table[at] >= 0 and store.steps[store.table[at]].key != key:
        at = (at + 1) & mask
    return at


@jit
def _forget(store: _Store, key: int) -> None:
    """Take the key out of the table; what probed past it moves up, so that no tombstones pile up."""
    mask = len(store.table) - 1
    hole = _place(store, key)
    at = (hole + 1) & mask
    while store.table[at] >= 0:
        home = _home(store.steps[store.table[at]].key, mask)
        if ((at - home) & mask) >= ((at - hole) & mask):
            store.table[hole] = store.table[at]
            hole = at
        at = (at + 1) & mask
    store.table[hole] = -1


@jit
def _index_all(store: _Store) -> None:
    """Fill an empty table with every step there is."""
    for slot in range(store.cursor[_USED]):
        if store.steps[slot].key >= 0:
            store.table[_place(store, store.steps[slot].key)] = slot


# --- insert ----------------------------------------------------------------------------------------------


@jit
def _stamp(store: _Store, group: int, row: int, clock: int) -> None:
    store.stamps[group, row // store.sizes[group]] = clock


@jit
def _resolve(store: _Store, states: States, row: int, clock: int) -> int:
    """The slot of the step whose state is this row; a new one if it is not kept."""
    key = _key(states.partition[row], states.offset[row])
    at = _place(store, key)
    if store.table[at] >= 0:
        return int(store.table[at])
    if store.cursor[_FREE] > 0:
        store.cursor[_FREE] -= 1
        slot = int(store.free[store.cursor[_FREE]])
    else:
        slot = int(store.cursor[_USED])
        store.cursor[_USED] += 1
    store.table[at] = slot
    steps = store.steps
    steps[slot].key = key
    steps[slot].next = -1
    steps[slot].discount = 0.0
    steps[slot].total = 0.0
    steps[slot].first = 0
    steps[slot].slots = 0
    steps[slot].refs = 0
    steps[slot].timestamp_ms = states.timestamp_ms[row]
    history = store.history
    copy_row(states.item, row, history.item, slot)
    copy_row(states.name, row, history.name, slot)
    copy_row(states.age_s, row, history.age_s, slot)
    copy_row(states.value, row, history.value, slot)
    _stamp(store, _HISTORY, slot, clock)
    _stamp(store, _CHAIN, slot, clock)
    return slot


@jit
def _release(store: _Store, slot: int, clock: int) -> None:
    """One reference less; a step that nothing kept can reach goes, and lets go of the one after it."""
    while slot >= 0:
        store.steps[slot].refs -= 1
        if store.steps[slot].refs > 0:
            return
        _forget(store, store.steps[slot].key)
        store.steps[slot].key = -1
        _stamp(store, _CHAIN, slot, clock)
        store.free[store.cursor[_FREE]] = slot
        store.cursor[_FREE] += 1
        slot = int(store.steps[slot].next)


@jit
def _complete(store: _Store, states: States, transitions: Transitions, t: int, known: int, clock: int) -> int:
    """Open row t's step for its transitions: what followed it, and with which discount. Returns its slot.

    known: its slot where a step before it led there; negative where it is new.
    """
    steps = store.steps
    step = known if known >= 0 else _resolve(store, states, transitions.state[t], clock)
    steps[step].refs += 1  # held until its rows are in: making room for them must not take it
    steps[step].first = store.cursor[_HEAD]
    steps[step].discount = transitions.discount[t]
    steps[step].organic = transitions.organic[t]
    steps[step].policy_version = transitions.policy_version[t]
    if transitions.next_state[t] >= 0:
        following = _resolve(store, states, transitions.next_state[t], clock)
        steps[step].next = following
        steps[following].refs += 1
    _stamp(store, _CHAIN, step, clock)
    return step


@jit
def _is_chosen(store: _Store, step: int) -> bool:
    """Something was chosen from this step's slate."""
    return bool(store.steps[step].total != 0.0 and not store.steps[step].organic)


@jit
def _odds(store: _Store, step: int) -> float:
    """How many times as often as others this step's rows should be drawn now."""
    share, chosen = store.chosen
    others = store.cursor[_HEAD] - store.cursor[_TAIL] - chosen
    if share == 0.0 or not _is_chosen(store, step):
        return 1.0
    return max(1.0, min(share / (1.0 - share) * others / max(chosen, 1.0), MOST_ODDS))


@jit
def _append(store: _Store, transitions: Transitions, t: int, step: int, clock: int) -> None:
    """Row t enters the ring; the oldest transition makes room."""
    rows, steps, cursor = store.rows, store.steps, store.cursor
    capacity = len(rows)
    if cursor[_HEAD] - cursor[_TAIL] == capacity:
        oldest = int(rows[cursor[_TAIL] % capacity].step)
        store.chosen[1] -= 1 if _is_chosen(store, oldest) else 0
        cursor[_TAIL] += 1
        _release(store, oldest, clock)
    at = cursor[_HEAD] % capacity
    cursor[_HEAD] += 1
    rows[at].step = step
    rows[at].slot = transitions.slot[t]
    rows[at].action = transitions.action[t]
    rows[at].propensity = transitions.propensity[t]
    rows[at].reward = transitions.reward[t]
    steps[step].slots += 1
    steps[step].last_slot = transitions.slot[t]
    steps[step].refs += 1
    _stamp(store, _ROWS, at, clock)
    _stamp(store, _REWARDS, at, clock)


@jit
def _sum(values: npt.NDArray[np.float32], start: int, end: int) -> float:
    total = 0.0
    for i in range(start, end):
        total += values[i]
    return total


@jit
def _insert(unpinned: _Store, new_states: States, new: Transitions, clock: int) -> None:
    """Add every run of rows that share a step, unless that step is complete already."""
    store, states, transitions = pin(unpinned), pin(new_states), pin(new)
    total = len(transitions.offset)
    capacity = len(store.rows)
    before = store.cursor[_HEAD]
    t = 0
    while t < total:
        end = t + 1
        while (
            end < total
            and transitions.offset[end] == transitions.offset[t]
            and transitions.partition[end] == transitions.partition[t]
        ):
            end += 1
        known = int(store.table[_place(store, _key(transitions.partition[t], transitions.offset[t]))])
        if known >= 0 and store.steps[known].slots > 0:
            store.cursor[_DUPLICATES] += end - t
        else:
            step = _complete(store, states, transitions, t, known, clock)
            steps = store.steps
            steps[step].total += _sum(transitions.reward, t, end)
            if _is_chosen(store, step):
                store.chosen[1] += end - t
            for row in range(t, end):
                _append(store, transitions, row, step, clock)
            _release(store, step, clock)
        t = end
    if len(store.tree) > 0:
        _prioritise_range(store, max(before, store.cursor[_HEAD] - capacity), store.cursor[_HEAD], clock)


@jit
def _prioritise_range(store: _Store, start: int, end: int, clock: int) -> None:
    """Sequence numbers start..end, at most a ring's length of them, get the highest priority, times `_odds`."""
    if start == end:
        return
    capacity = len(store.rows)
    low, high = start % capacity, (end - 1) % capacity + 1
    if low < high:
        _prioritise_rows(store, low, high, clock)
    else:
        _prioritise_rows(store, low, capacity, clock)
        _prioritise_rows(store, 0, high, clock)


@jit
def _prioritise_rows(store: _Store, low: int, high: int, clock: int) -> None:
    tree_fill(store.tree, low, high, store.top[0])
    if store.chosen[0] > 0.0:
        for at in range(low, high):
            odds = _odds(store, store.rows[at].step)
            if odds != 1.0:
                tree_set(store.tree, at, store.top[0] * odds)
    size = store.sizes[_PRIORITIES]
    for segment in range(low // size, (high - 1) // size + 1):
        store.stamps[_PRIORITIES, segment] = clock


@jit
def _find_row(store: _Store, step: int, slot: int) -> int:
    """Sequence number of a step's slot; -1 where it is no longer kept; -2 where the step never had it."""
    steps, rows = store.steps, store.rows
    capacity = len(rows)
    first, end = steps[step].first, steps[step].first + steps[step].slots
    kept = max(first, store.cursor[_TAIL])
    for n in range(kept, end):
        if rows[n % capacity].slot == slot:
            return n
    gone = kept > first and slot <= steps[step].last_slot
    return -1 if gone and (kept >= end or slot < rows[kept % capacity].slot) else -2


@jit
def _amend(unpinned: _Store, new: Amendments, clock: int) -> None:
    """Add each reward to its slot and to its step's total, and make the transition worth sampling again."""
    store, amendments = pin(unpinned), pin(new)
    capacity = len(store.rows)
    for a in range(len(amendments.offset)):
        step = store.table[_place(store, _key(amendments.partition[a], amendments.offset[a]))]
        n = -2
        if step >= 0 and store.steps[step].slots > 0:
            n = _find_row(store, step, amendments.slot[a])
        if n == -2:
            store.cursor[_MISSED] += 1
            continue
        before = _is_chosen(store, step)
        store.steps[step].total += amendments.reward[a]
        if _is_chosen(store, step) != before:
            _choose(store, step, not before, clock)
        store.cursor[_AMENDED] += 1
        _stamp(store, _CHAIN, step, clock)
        if n >= 0:
            at = n % capacity
            store.rows[at].reward += amendments.reward[a]
            _stamp(store, _REWARDS, at, clock)
            if len(store.tree) > 0:
                tree_set(store.tree, at, store.top[0] * _odds(store, step))
                _stamp(store, _PRIORITIES, at, clock)


@jit
def _choose(store: _Store, step: int, is_now: bool, clock: int) -> None:
    """Something was chosen from this step's slate after all, or not any more: all its rows are drawn accordingly."""
    capacity = len(store.rows)
    first, end = store.steps[step].first, store.steps[step].first + store.steps[step].slots
    kept = max(first, store.cursor[_TAIL])
    store.chosen[1] += (end - kept) * (1 if is_now else -1)
    if len(store.tree) > 0 and store.chosen[0] > 0.0:
        for n in range(kept, end):
            tree_set(store.tree, n % capacity, store.top[0] * _odds(store, step))
            _stamp(store, _PRIORITIES, n % capacity, clock)


@jit
def _check(states: States, transitions: Transitions, amendments: Amendments) -> tuple[int, int]:
    """(0, row) of a good batch, else what is wrong and where; nothing is changed before this was asked."""
    for m in range(len(states.offset)):
        if not (0 <= states.partition[m] < MAX_PARTITION and 0 <= states.offset[m] < MAX_OFFSET):
            return 1, m
    for t in range(len(transitions.offset)):
        state, following = transitions.state[t], transitions.next_state[t]
        if not (0 <= state < len(states.offset) and following < len(states.offset)):
            return 2, t
        same = states.partition[state] == transitions.partition[t]
        if not (same and states.offset[state] == transitions.offset[t]):
            return 3, t
        if not (np.isfinite(transitions.reward[t]) and 0.0 <= transitions.discount[t] <= 1.0):
            return 4, t
        if transitions.discount[t] > 0 and following < 0:
            return 5, t
        again = t > 0 and transitions.offset[t] == transitions.offset[t - 1]
        again = again and transitions.partition[t] == transitions.partition[t - 1]
        if again and transitions.slot[t] <= transitions.slot[t - 1]:
            return 6, t
    for a in range(len(amendments.offset)):
        if not np.isfinite(amendments.reward[a]):
            return 7, a
    return 0, 0


_WRONG: Final = {
    1: f"states row {{}}: partition must be in 0..{MAX_PARTITION - 1} and offset in 0..{MAX_OFFSET - 1}",
    2: "transition {}: state or next_state is no row of the states that came along",
    3: "transition {}: its state row is that of another step",
    4: "transition {}: reward must be finite and discount in [0, 1]",
    5: "transition {}: a discount above 0 needs a next_state",
    6: "transition {}: the slots of a step must ascend",
    7: "amendment {}: reward must be finite",
}


# --- sample ----------------------------------------------------------------------------------------------


@jit
def _draw(unpinned: _Store, uniform: npt.NDArray[np.float64], beta: float, batch: Batch) -> None:
    """Choose rows into out.index and their importance weights into out.weight.

    Prioritised: stratified, row i with P(i) = value(i) / total (Schaul et al. 2016, eq. 1, appendix B.2.1), weight
    (N P(i))**-beta, divided by the largest in the batch (section 3.4). Else each row alike, weight 1.
    """
    store, out = pin(unpinned), pin(batch)
    size, capacity = len(out.action), len(store.rows)
    head, tail = store.cursor[_HEAD], store.cursor[_TAIL]
    kept = head - tail
    if len(store.tree) == 0:
        for b in range(size):
            out.index[b] = tail + min(int(uniform[b] * kept), kept - 1)
            out.weight[b] = 1.0
        return
    mass = np.empty(size)
    for b in range(size):
        mass[b] = (b + uniform[b]) / size * store.tree[1]
    place = tree_find_all(store.tree, mass)
    values = store.tree[len(store.tree) // 2 :]
    smallest = np.inf
    for b in range(size):
        smallest = min(smallest, values[place[b]])
    start = head % capacity  # where the next row goes: the oldest of a full ring
    for b in range(size):
        age = start - place[b] if place[b] < start else start - place[b] + capacity
        out.index[b] = head - age
        out.weight[b] = (smallest / values[place[b]]) ** beta


@jit
def _gather(unpinned: _Store, n_step: int, unaided: int, gamma: float, batch: Batch) -> None:
    """Fill the batch for out.index: walk each step's chain for its n-step return.

    reward = r_slot + d_0 R_1 + d_0 d_1 R_2 + ..., R_k the total of the k-th step after it, up to n_step terms. It
    stops where a discount is 0 or the next step is not complete, and bootstraps from the last state there is. Where
    that is of a step taken unaided, it goes on to the next one that is not, so many terms further at most.
    gamma: taken for every discount above 0; negative: discounts as they were inserted.

    One kind of thing at a time for all of the batch: so the processor waits for many rows of memory at once.
    """
    store, out = pin(unpinned), pin(batch)
    size, capacity, rows = len(out.action), len(store.rows), store.rows
    here = np.empty(size, np.int64)
    for b in range(size):
        here[b] = rows[out.index[b] % capacity].step
    there = _walk(store, here, n_step, unaided, gamma, out)
    for b in range(size):
        _copy_row(store, here[b], out, b)
        _copy_slate(store, here[b], out, b)
    _copy_states(store.history, here, out.state)
    _copy_states(store.history, there, out.next_state)


@jit
def _copy_states(history: _Histories, step: npt.NDArray[np.int64], out: Histories) -> None:
    """out[b] = the history of step[b]; padding where that is -1."""
    for b in range(len(step)):
        if step[b] >= 0:
            copy_row(history.item, step[b], out.item, b)
            copy_row(history.name, step[b], out.name, b)
            copy_row(history.age_s, step[b], out.age_s, b)
            copy_row(history.value, step[b], out.value, b)
        else:
            out.item[b] = 0
            out.name[b] = 0
            out.age_s[b] = 0.0
            out.value[b] = 0.0


@jit
def _walk(
    store: _Store, here: npt.NDArray[np.int64], n_step: int, unaided: int, gamma: float, out: Batch
) -> npt.NDArray[np.int64]:
    """Returns and discounts from these steps on; gives the steps to bootstrap from, -1 where there is none."""
    steps, size = store.steps, len(here)
    last, going = here.copy(), np.ones(size, np.bool_)
    reward, discount = np.empty(size), np.ones(size)
    for n in range(n_step + unaided):
        some = False
        for b in range(size):
            if n >= n_step and going[b]:
                going[b] = steps[last[b]].organic
            if n == 0:
                reward[b] = store.rows[out.index[b] % len(store.rows)].reward
            elif going[b]:
                going[b] = steps[last[b]].slots > 0
                if going[b]:
                    reward[b] += discount[b] * steps[last[b]].total
            if going[b]:
                scale = float(steps[last[b]].discount)
                discount[b] *= gamma if gamma >= 0.0 and scale > 0.0 else scale
                going[b] = discount[b] > 0.0
                last[b] = steps[last[b]].next if going[b] else -1
            some |= going[b]
        if not some:
            break
    for b in range(size):
        out.reward[b] = reward[b]
        out.discount[b] = discount[b]
        out.next_timestamp_ms[b] = steps[last[b]].timestamp_ms if last[b] >= 0 else 0
    return last


@jit
def _copy_row(store: _Store, step: int, out: Batch, b: int) -> None:
    """What row b's transition and step say of themselves."""
    row, of = store.rows[out.index[b] % len(store.rows)], store.steps[step]
    out.action[b] = row.action
    out.slot_reward[b] = row.reward
    out.step_reward[b] = of.total
    out.slot[b] = row.slot
    out.slots[b] = of.slots
    out.organic[b] = of.organic
    out.propensity[b] = row.propensity
    out.policy_version[b] = of.policy_version
    out.timestamp_ms[b] = of.timestamp_ms


@jit
def _copy_slate(store: _Store, step: int, out: Batch, b: int) -> None:
    """The slots of row b's step that are kept, from the row's own on, round and round."""
    rows, capacity = store.rows, len(store.rows)
    first = max(store.steps[step].first, store.cursor[_TAIL])
    count = store.steps[step].first + store.steps[step].slots - first
    at = out.index[b] % capacity
    turn = first + count - out.index[b]  # slots to the end of the step, where it goes on with the first
    width = out.slate.shape[1]
    for k in range(min(count, width)):
        if k == turn:
            at = first % capacity
        out.slate[b, k] = rows[at].action
        out.slate_slot[b, k] = rows[at].slot
        out.slate_reward[b, k] = rows[at].reward
        at = at + 1 if at + 1 < capacity else 0
    for k in range(min(count, width), width):
        out.slate[b, k] = 0
        out.slate_slot[b, k] = 0
        out.slate_reward[b, k] = 0.0


@jit
def _reprioritise(
    unpinned: _Store, index: npt.NDArray[np.int64], value: npt.NDArray[np.float64], clock: int
) -> int:
    """Set priorities of the sequence numbers that are still kept; returns how many were."""
    store = pin(unpinned)
    capacity = len(store.rows)
    done = 0
    for b in range(len(index)):
        if store.cursor[_TAIL] <= index[b] < store.cursor[_HEAD]:
            store.top[0] = max(store.top[0], value[b])
            odds = _odds(store, store.rows[index[b] % capacity].step)
            tree_set(store.tree, index[b] % capacity, value[b] * odds)
            _stamp(store, _PRIORITIES, index[b] % capacity, clock)
            done += 1
    return done


# --- the buffer ------------------------------------------------------------------------------------------


class Replay:
    """The newest `capacity` transitions. One thread at a time: threads that share it share a lock.

    capacity: transitions kept, in 2..2**30; the oldest goes first.
    history_length: entries of a state, H.
    prioritised: draw in proportion to (|TD error| + PRIORITY_FLOOR)**alpha, else uniformly.
    alpha: in [0, 1]; 0 is uniform.
    chosen_share: rows of steps in which something was chosen from a slate are drawn that much oftener that they are
        this share of a batch, where they would be less; in [0, 1), where prioritised. Choices are few, and nearly all
        the noise of a gradient is in which of them a batch holds: weights undo it (beta 1), the noise goes.
    segment: rows that a checkpoint writes again when one of them has changed.
    reserve: steps that there is room for from the start, if the capacity asks for them; room that nothing has touched
        costs no memory, and moving to more of it holds up the stream for seconds.
    """

    def __init__(
        self,
        capacity: int,
        history_length: int,
        *,
        prioritised: bool = True,
        alpha: float = 0.6,
        chosen_share: float = 0.0,
        segment: int = SEGMENT,
        reserve: int = RESERVED_STEPS,
    ) -> None:
        if not 2 <= capacity <= 1 << 30:
            raise ReplayError(f"capacity must be in 2..2**30 transitions, not {capacity}")
        if not 1 <= history_length <= 1024:
            raise ReplayError(f"history_length must be in 1..1024, not {history_length}")
        if not 0.0 <= alpha <= 1.0:
            raise ReplayError(f"alpha must be in [0, 1], not {alpha}")
        if not 0.0 <= chosen_share < 1.0:
            raise ReplayError(f"chosen_share must be in [0, 1), not {chosen_share}")
        if segment < 1:
            raise ReplayError(f"segment must be >= 1 rows, not {segment}")
        self.capacity = capacity
        self.history_length = history_length
        self.prioritised = prioritised
        self.alpha = alpha
        self.chosen_share = chosen_share if prioritised else 0.0
        self._segment = segment
        self._reserve = reserve
        self._clock = 1
        self._store = self._with_room(0)

    def __len__(self) -> int:
        """Transitions kept."""
        return int(self._store.cursor[_HEAD] - self._store.cursor[_TAIL])

    @property
    def inserted(self) -> int:
        """Transitions ever added, duplicates not counted."""
        return int(self._store.cursor[_HEAD])

    @property
    def chosen(self) -> int:
        """Transitions kept of steps in which something was chosen from a slate."""
        return int(self._store.chosen[1])

    @property
    def missed(self) -> int:
        """Amendments, ever, that came after their step was let go: nothing is learnt from them."""
        return int(self._store.cursor[_MISSED])

    def counters(self) -> dict[str, int]:
        """Counts since the buffer was new, which survive a restore; and what it holds now."""
        cursor = self._store.cursor
        return {
            "inserted": self.inserted,
            "kept": len(self),
            "steps": int(cursor[_USED] - cursor[_FREE]),
            "duplicates": int(cursor[_DUPLICATES]),
            "amended": int(cursor[_AMENDED]),
            "missed": self.missed,
        }

    @property
    def nbytes(self) -> int:
        """Bytes in use; more are allotted, which the operating system provides when they are touched."""
        store = self._store
        steps: list[npt.NDArray[Any]] = [store.steps, *store.history, store.free]
        rows = min(self.inserted, self.capacity) * (store.rows.itemsize + store.tree.itemsize)
        used = sum(array.nbytes for array in steps) // len(store.free) * int(store.cursor[_USED])
        return used + rows + store.table.nbytes + store.stamps.nbytes

    def insert(self, joined: Joined) -> int:
        """Add the transitions, then the amendments; returns how many transitions were new.

        A step's transitions come as adjacent rows with ascending slots, all at once. A step that is complete
        already is counted as duplicates and left as it is. An amendment raises its transition to the highest
        priority; one for a step no longer kept is counted as missed.
        Raises: ReplayError, naming the row, on arrays that contradict each other; then nothing was changed.
        """
        states, transitions, amendments = _typed(joined)
        if states.item.shape[1] != self.history_length:
            raise ReplayError(
                f"states of {states.item.shape[1]} entries for a replay of {self.history_length}; "
                "give both the same history_length"
            )
        wrong, row = _check(states, transitions, amendments)
        if wrong:
            raise ReplayError(_WRONG[wrong].format(row))
        self._make_room(len(states.offset))
        before = self.inserted
        _insert(self._store, states, transitions, self._clock)
        _amend(self._store, amendments, self._clock)
        return self.inserted - before

    def sample(
        self,
        batch_size: int,
        rng: np.random.Generator,
        beta: float = 0.4,
        n_step: int = 1,
        gamma: float | None = None,
        out: Batch | None = None,
        unaided: int = 0,
    ) -> Batch:
        """Draw transitions with replacement, each with its n-step return as of now.

        beta: how far importance weights undo the priorities, in [0, 1]. gamma: replaces every discount above 0,
        in [0, 1]; None: as inserted. out: arrays to fill (see `empty_batch`); the same ones are returned.
        unaided: a return that would end at a step taken unaided goes on so many steps at most, to the next one that is
        not: there nothing was shown, and no slate may be credited to it.
        Raises: ReplayError when fewer than batch_size transitions are kept.
        """
        if len(self) < batch_size or batch_size < 1:
            raise ReplayError(
                f"asked for {batch_size} transitions, have {len(self)}; wait for more events or lower --min-replay"
            )
        if n_step < 1 or (gamma is not None and not 0.0 <= gamma <= 1.0):
            raise ReplayError(f"n_step must be >= 1 and gamma in [0, 1], not {n_step} and {gamma}")
        batch = empty_batch(batch_size, self.history_length) if out is None else out
        if batch.state.item.shape != (batch_size, self.history_length):
            raise ReplayError(
                f"out holds {batch.state.item.shape}, asked for {(batch_size, self.history_length)}"
            )
        _draw(self._store, rng.random(batch_size), beta, batch)
        _gather(self._store, n_step, unaided, -1.0 if gamma is None else gamma, batch)
        return batch

    def update_priorities(self, index: npt.NDArray[np.int64], td_error: npt.NDArray[Any]) -> int:
        """Make a batch's rows worth their |TD error|, of either sign; returns how many are still kept.

        Rows gone since are passed over; without priorities nothing is done.
        Raises: ReplayError on NaN or Inf.
        """
        size = np.abs(np.asarray(td_error, np.float64))
        if not np.isfinite(size).all():
            raise ReplayError("TD errors must be finite, and one is not: the training has diverged")
        if not self.prioritised:
            return 0
        value = (size + PRIORITY_FLOOR) ** self.alpha
        return _reprioritise(self._store, np.asarray(index, np.int64), value, self._clock)

    def contents(self) -> Contents:
        """What is kept, for audits and tests."""
        steps, rows, cursor = self._store.steps, self._store.rows, self._store.cursor
        at = np.arange(cursor[_TAIL], cursor[_HEAD]) % self.capacity
        row, step = rows[at], steps[rows[at]["step"]]
        following = step["next"]
        return Contents(
            partition=step["key"] >> 48,
            offset=step["key"] & (MAX_OFFSET - 1),
            slot=row["slot"],
            action=row["action"],
            reward=row["reward"],
            discount=step["discount"],
            next_offset=np.where(following < 0, -1, steps[following]["key"] & (MAX_OFFSET - 1)),
            organic=step["organic"],
            policy_version=step["policy_version"],
        )

    # --- checkpoints

    def snapshot(self, since: int = 0, empty: Empty = np.empty) -> tuple[int, dict[str, Arrays | Keep]]:
        """(token, parts): a copy of all that changed since the snapshot which gave that token; 0: of everything.

        empty: gives the room for the copy. A part that did not change is KEEP. Take it under the lock, write it
        outside; once it is safe, its token is the next `since`. If writing failed, go on with the token before.
        """
        token, store = self._clock, self._store
        self._clock += 1
        parts: dict[str, Arrays | Keep] = {"replay/state": self._state_part()}
        for name, group, arrays in _groups(store):
            size = int(store.sizes[group])
            for segment in np.flatnonzero(store.stamps[group]):
                cut = slice(int(segment) * size, (int(segment) + 1) * size)
                changed = store.stamps[group, segment] > since
                parts[f"replay/{name}-{segment:06d}"] = (
                    {field: copied(array[cut], empty) for field, array in arrays.items()} if changed else KEEP
                )
        return token, parts

    def restore(self, parts: Mapping[str, Arrays]) -> int:
        """Become what was snapshot; other parts in the mapping are left alone. Returns the token for `snapshot`.

        Another capacity keeps the newest transitions that fit; another alpha starts with equal priorities; another
        chosen_share counts for each row from when it is next drawn or amended.
        Raises: ReplayError when the histories have another length.
        """
        saved = parts["replay/state"]
        if int(saved["history_length"]) != self.history_length:
            raise ReplayError(
                f"the checkpoint's states have {int(saved['history_length'])} entries, not {self.history_length}; "
                f"start with --history-length {int(saved['history_length'])}, or with an empty --data-dir"
            )
        used = int(saved["cursor"][_USED])
        self._store = self._with_room(used)
        store, alpha = self._store, float(saved["alpha"])
        store.cursor[:] = saved["cursor"]
        store.cursor[_FREE] = 0
        store.cursor[_TAIL] = max(store.cursor[_TAIL], store.cursor[_HEAD] - self.capacity)
        store.top[0] = float(saved["top"]) if alpha == self.alpha else 1.0
        self._load_segments(parts, int(saved["capacity"]), int(saved["segment"]))
        if self.prioritised and alpha != self.alpha:
            kept = np.arange(store.cursor[_TAIL], store.cursor[_HEAD]) % self.capacity
            store.tree[len(store.tree) // 2 + kept] = store.top[0]
        tree_repair(store.tree, 0, len(store.tree) // 2)
        _derive(store)
        layout = (int(saved["capacity"]), int(saved["segment"]), alpha if self.prioritised else self.alpha)
        store.stamps[store.stamps > 0] = 1
        self._clock = 2
        return 1 if layout == (self.capacity, self._segment, self.alpha) else 0

    def _state_part(self) -> Arrays:
        return {
            "cursor": self._store.cursor.copy(),
            "top": np.array(self._store.top[0]),
            "capacity": np.array(self.capacity),
            "segment": np.array(self._segment),
            "history_length": np.array(self.history_length),
            "alpha": np.array(self.alpha if self.prioritised else -1.0),
        }

    def _make_room(self, steps: int) -> None:
        """Grow by doubling until so many more steps fit; live steps never exceed 2 * capacity."""
        store = self._store
        size = len(store.free)
        if size - store.cursor[_USED] + store.cursor[_FREE] < steps:
            need = int(store.cursor[_USED]) + steps
            self._store = self._with_room(need, store)

    def _with_room(self, steps: int, old: _Store | None = None) -> _Store:
        room = max(steps, min(2 * self.capacity, self._reserve))
        return _new_store(
            self.capacity,
            self.history_length,
            room,
            self.prioritised,
            self.chosen_share,
            self._segment,
            old,
        )

    def _load_segments(self, parts: Mapping[str, Arrays], capacity: int, segment: int) -> None:
        """Put what was saved, in segments of a ring of this capacity, where it belongs in ours."""
        store = self._store
        for name, group, arrays in _groups(store):
            for part in _segments(parts, name):
                if group == _PRIORITIES and float(parts["replay/state"]["alpha"]) != self.alpha:
                    continue
                columns = parts[part]
                start = int(part.rpartition("-")[2]) * segment * int(store.sizes[group] // self._segment)
                rows = start + np.arange(len(next(iter(columns.values()))))
                if group in (_HISTORY, _CHAIN):
                    source = np.flatnonzero(rows < len(store.free))
                    rows = rows[source]
                else:
                    rows, source = _moved(rows, store.cursor, capacity, self.capacity)
                for field, array in arrays.items():
                    array[rows] = columns[field][source]
                store.stamps[group, np.unique(rows // store.sizes[group])] = 1
        if self.prioritised:
            touched = -(-min(self.inserted, self.capacity) // int(store.sizes[_PRIORITIES]))
            store.stamps[_PRIORITIES, :touched] = 1


def _new_store(
    capacity: int,
    history_length: int,
    steps: int,
    prioritised: bool,
    chosen_share: float,
    segment: int,
    old: _Store | None = None,
) -> _Store:
    """An empty store with room for so many steps; or the old one, moved into that room."""
    size = segment << max(-(-steps // segment) - 1, 0).bit_length()
    shape = (size, history_length)
    store = _Store(
        steps=np.zeros(size, _STEP),
        history=_Histories(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.uint8),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
        ),
        rows=np.zeros(capacity, _ROW) if old is None else old.rows,
        table=np.full(2 * size, -1, np.int32),
        free=np.zeros(size, np.int32),
        cursor=np.zeros(7, np.int64) if old is None else old.cursor,
        stamps=np.zeros((5, max(size // segment, -(-capacity // segment))), np.int64),
        sizes=np.array([segment, segment, segment, segment, PRIORITY_SEGMENTS * segment]),
        tree=(tree_new(capacity) if prioritised else np.zeros(0)) if old is None else old.tree,
        top=np.ones(1) if old is None else old.top,
        chosen=np.array([chosen_share, 0.0]) if old is None else old.chosen,
    )
    if old is not None:
        used = int(old.cursor[_USED])
        store.steps[:used] = old.steps[:used]
        histories: list[npt.NDArray[Any]] = list(store.history)
        sources: list[npt.NDArray[Any]] = list(old.history)
        for target, source in zip(histories, sources, strict=True):
            target[:used] = source[:used]
        store.free[: len(old.free)] = old.free
        store.stamps[:, : old.stamps.shape[1]] = old.stamps
        _index_all(store)
    return store


def _groups(store: _Store) -> list[tuple[str, int, dict[str, npt.NDArray[Any]]]]:
    """(name, row of stamps and sizes, arrays) of all that a checkpoint holds."""
    steps, rows = store.steps, store.rows
    groups: list[tuple[str, int, dict[str, npt.NDArray[Any]]]] = [
        ("history", _HISTORY, {"timestamp_ms": steps["timestamp_ms"], **store.history._asdict()}),
        ("chain", _CHAIN, {field: steps[field] for field in _CHAIN_FIELDS}),
        ("rows", _ROWS, {field: rows[field] for field in _ROW_FIELDS}),
        ("rewards", _REWARDS, {"reward": rows["reward"]}),
    ]
    if len(store.tree):
        half = len(store.tree) // 2
        groups.append(("priorities", _PRIORITIES, {"value": store.tree[half : half + len(rows)]}))
    return groups


def _segments(parts: Mapping[str, Arrays], name: str) -> list[str]:
    return sorted(part for part in parts if part.startswith(f"replay/{name}-"))


def _moved(
    rows: npt.NDArray[np.int64], cursor: npt.NDArray[np.int64], capacity: int, new_capacity: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where rows of a ring of `capacity` lie in one of `new_capacity`, and which of them are still kept."""
    last = cursor[_HEAD] - 1
    sequence = last - (last - rows) % capacity
    kept = np.flatnonzero(sequence >= cursor[_TAIL])
    return sequence[kept] % new_capacity, kept


@jit
def _derive(unpinned: _Store) -> None:
    """Rebuild what follows from the rest: references, the table, free slots."""
    store = pin(unpinned)
    steps, cursor = store.steps, store.cursor
    capacity = len(store.rows)
    store.chosen[1] = 0.0
    for n in range(cursor[_TAIL], cursor[_HEAD]):
        steps[store.rows[n % capacity].step].refs += 1
        store.chosen[1] += 1.0 if _is_chosen(store, store.rows[n % capacity].step) else 0.0
    for slot in range(cursor[_USED]):
        if steps[slot].key >= 0 and steps[slot].next >= 0:
            steps[steps[slot].next].refs += 1
    _index_all(store)
    for slot in range(cursor[_USED] - 1, -1, -1):
        if steps[slot].key < 0:
            store.free[cursor[_FREE]] = slot
            cursor[_FREE] += 1
    for slot in range(cursor[_USED]):  # a smaller capacity leaves steps that nothing reaches
        if steps[slot].key >= 0 and steps[slot].refs == 0:
            steps[slot].refs = 1
            _release(store, slot, 1)


def _typed(joined: Joined) -> tuple[States, Transitions, Amendments]:
    """The joined arrays in exactly the types that the compiled loops were made for."""
    i2, i4, i8, f4 = np.int16, np.int32, np.int64, np.float32

    def columns(arrays: tuple[Any, ...], dtypes: tuple[Any, ...]) -> list[npt.NDArray[Any]]:
        pairs = zip(arrays, dtypes, strict=True)
        return [np.require(array, dtype, ["C", "W"]) for array, dtype in pairs]

    states = States(*columns(joined.states, (i4, i8, i8, i4, np.uint8, f4, f4)))
    dtypes = (i4, i8, i2, i4, i4, i4, f4, f4, f4, np.bool_, i8)
    transitions = Transitions(*columns(joined.transitions, dtypes))
    return states, transitions, Amendments(*columns(joined.amendments, (i4, i8, i2, f4)))
