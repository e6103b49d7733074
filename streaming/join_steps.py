"""Steps: opened, kept in a ring, credited with rewards, completed into transitions. Pieces of the joiner's loop."""

from __future__ import annotations

from typing import Final

import numpy as np

from streaming.columns import Columns
from streaming.jit import part
from streaming.join_settings import COUNTERS, STEPS_PER_USER
from streaming.join_tables import NONE, Tables
from streaming.rewards import CODES

PURCHASE: Final = CODES["purchase"]
REFUND: Final = CODES["refund"]
ADD: Final = CODES["add_to_cart"]
REMOVE: Final = CODES["remove_from_cart"]

STEPS_EVICTED: Final = COUNTERS.index("steps_evicted")
STEPS_CLOSED_EARLY: Final = COUNTERS.index("steps_closed_early")
TRANSITIONS: Final = COUNTERS.index("transitions")
AMENDMENTS: Final = COUNTERS.index("amendments")
SEARCHES_CUT_SHORT: Final = COUNTERS.index("searches_cut_short")


# --- states ----------------------------------------------------------------------------------------------


@part
def new_row(t: Tables, offset: int, timestamp_ms: int) -> int:
    """An empty state. Room must be there."""
    c = t.clock[0]
    row = c.rows_free
    if row != NONE:
        c.rows_free = t.rows[row].next_free
    else:
        row = c.rows_end
        c.rows_end += 1
    c.rows_used += 1
    r = t.rows[row]
    r.offset = offset
    r.timestamp_ms = timestamp_ms
    r.out_push = 0
    t.row_item[row, :] = 0
    t.row_name[row, :] = 0
    t.row_age_s[row, :] = 0
    t.row_value[row, :] = 0
    return row


@part
def free_row(t: Tables, row: int) -> None:
    """Give a state back."""
    c = t.clock[0]
    t.rows[row].next_free = c.rows_free
    c.rows_free = row
    c.rows_used -= 1


@part
def age_s(timestamp_ms: int, then_ms: int) -> float:
    """Seconds from then to now, never negative."""
    return max(0, timestamp_ms - then_ms) / 1000.0


@part
def row_from_decision(t: Tables, columns: Columns, i: int) -> int:
    """The state that decision i was made in: its own history, newest first."""
    row = new_row(t, columns.offset[i], columns.timestamp_ms[i])
    end = columns.history_bounds[i + 1]
    for j in range(min(t.row_item.shape[1], end - columns.history_bounds[i])):
        k = end - 1 - j
        t.row_item[row, j] = columns.history_item[k]
        t.row_name[row, j] = columns.history_name[k]
        t.row_age_s[row, j] = age_s(columns.timestamp_ms[i], columns.history_timestamp_ms[k])
        t.row_value[row, j] = columns.history_value[k]
    return row


@part
def row_from_user(t: Tables, user: int, offset: int, timestamp_ms: int) -> int:
    """The state that a user is in: what we saw of them, newest first."""
    row = new_row(t, offset, timestamp_ms)
    length = t.row_item.shape[1]
    at = t.users[user].seen_at
    for j in range(t.users[user].seen):
        at = at - 1 if at > 0 else length - 1
        t.row_item[row, j] = t.seen_item[user, at]
        t.row_name[row, j] = t.seen_name[user, at]
        t.row_age_s[row, j] = age_s(timestamp_ms, t.seen_ms[user, at])
        t.row_value[row, j] = t.seen_value[user, at]
    return row


@part
def see(t: Tables, user: int, item: int, name: int, timestamp_ms: int, value: float) -> None:
    """One more entry in a user's history; the oldest makes room."""
    u = t.users[user]
    length = t.seen_item.shape[1]
    at = u.seen_at
    t.seen_item[user, at] = item
    t.seen_name[user, at] = name
    t.seen_ms[user, at] = timestamp_ms
    t.seen_value[user, at] = value
    u.seen_at = at + 1 if at + 1 < length else 0
    u.seen = min(u.seen + 1, length)


@part
def put_state(t: Tables, row: int) -> int:
    """Give a state out, once in a push; returns its row in the States."""
    c, r, out = t.clock[0], t.rows[row], t.out
    if r.out_push == c.push:
        return int(r.out_row)
    at = out.counts[0]
    out.counts[0] += 1
    s = out.states[at]
    s.partition = c.partition
    s.offset = r.offset
    s.timestamp_ms = r.timestamp_ms
    for j in range(t.row_item.shape[1]):
        out.item[at, j] = t.row_item[row, j]
        out.name[at, j] = t.row_name[row, j]
        out.age_s[at, j] = t.row_age_s[row, j]
        out.value[at, j] = t.row_value[row, j]
    r.out_push = c.push
    r.out_row = at
    return at


# --- completing ------------------------------------------------------------------------------------------


@part
def emit(t: Tables, sequence: int, row: int, next_row: int) -> None:
    """One transition for each slot of a step; next_row NONE: the session ended there."""
    c, out = t.clock[0], t.out
    step = t.steps[sequence & (len(t.steps) - 1)]
    step.open = 0
    state = put_state(t, row)
    next_state = NONE if next_row == NONE else put_state(t, next_row)
    for k in range(step.slots):
        slot = t.slots[(step.first_slot + k) & (len(t.slots) - 1)]
        o = out.transitions[out.counts[1]]
        out.counts[1] += 1
        o.partition = c.partition
        o.offset = step.offset
        o.slot = k
        o.state = state
        o.next_state = next_state
        o.action = slot.item
        o.reward = slot.reward
        o.discount = 0.0 if next_row == NONE else t.rules.gamma
        o.propensity = slot.propensity
        o.organic = step.organic != 0
        o.policy_version = step.policy_version
    t.counters[TRANSITIONS] += step.slots


@part
def close_decision(t: Tables, user: int, next_row: int) -> None:
    """Complete the user's open decision, if there is one."""
    u = t.users[user]
    if u.open_decision != NONE:
        emit(t, u.open_decision, u.decision_row, next_row)
        free_row(t, u.decision_row)
        u.open_decision = NONE


@part
def close_organic(t: Tables, user: int, next_row: int) -> None:
    """Complete the user's open organic step, if there is one."""
    u = t.users[user]
    if u.open_organic != NONE:
        emit(t, u.open_organic, u.organic_row, next_row)
        free_row(t, u.organic_row)
        u.open_organic = NONE


@part
def close_both(t: Tables, user: int, next_row: int) -> None:
    """Complete all that the user has open."""
    close_decision(t, user, next_row)
    close_organic(t, user, next_row)


# --- the ring --------------------------------------------------------------------------------------------


@part
def is_kept(t: Tables, sequence: int) -> bool:
    """Whether the watermark has moved by no more than the window since the step was opened."""
    kept_from_ms = t.steps[sequence & (len(t.steps) - 1)].kept_from_ms
    return bool(t.clock[0].watermark_ms - kept_from_ms <= t.rules.window_ms)


@part
def first_kept(t: Tables, user: int) -> int:
    """The user's newest kept step, or NONE."""
    sequence = t.users[user].newest_step
    return sequence if sequence >= t.clock[0].steps_head and is_kept(t, sequence) else NONE


@part
def next_kept(t: Tables, sequence: int) -> int:
    """The kept step before this one of the same user, or NONE. Steps are opened, so also forgotten, in order."""
    before = t.steps[sequence & (len(t.steps) - 1)].before
    return before if before >= t.clock[0].steps_head and is_kept(t, before) else NONE


@part
def slot_of(t: Tables, sequence: int, item: int) -> int:
    """Which of the step's slots holds the item, or NONE; item 0 is nowhere."""
    step = t.steps[sequence & (len(t.steps) - 1)]
    if item != 0:
        for k in range(step.slots):
            if t.slots[(step.first_slot + k) & (len(t.slots) - 1)].item == item:
                return k
    return NONE


@part
def drop_oldest(t: Tables) -> None:
    """Take the oldest step off the ring; its entries stay readable until the next one is written."""
    c = t.clock[0]
    c.slots_head += t.steps[c.steps_head & (len(t.steps) - 1)].slots
    c.steps_head += 1


@part
def forget_steps(t: Tables) -> None:
    """Drop what is beyond the window. What is still open moves to the ring's other end, and explains nothing more."""
    c = t.clock[0]
    smask, kmask = len(t.slots) - 1, len(t.steps) - 1
    for _ in range(c.steps_tail - c.steps_head):
        sequence = c.steps_head
        if is_kept(t, sequence):
            return
        old = t.steps[sequence & kmask]
        drop_oldest(t)
        if old.open == 0:
            continue
        first = c.slots_tail
        for k in range(old.slots):  # ascending: the two places may overlap
            copy_slot(t, (old.first_slot + k) & smask, (first + k) & smask)
        u = t.users[old.user]
        if old.organic:
            u.open_organic = c.steps_tail
        else:
            u.open_decision = c.steps_tail
        t.steps[c.steps_tail & kmask] = old
        new = t.steps[c.steps_tail & kmask]
        new.first_slot = first
        new.kept_from_ms = c.watermark_ms
        c.slots_tail += new.slots
        c.steps_tail += 1


@part
def copy_slot(t: Tables, source: int, target: int) -> None:
    """Plain copy within the ring."""
    a, b = t.slots[source], t.slots[target]
    b.reward = a.reward
    b.item = a.item
    b.propensity = a.propensity
    b.purchases = a.purchases
    b.carts = a.carts


@part
def evict_steps(t: Tables, slots: int) -> None:
    """Make room below the bounds for a step of so many slots; what was open ends there."""
    c = t.clock[0]
    while c.steps_tail > c.steps_head and (
        c.steps_tail - c.steps_head >= t.rules.max_steps
        or c.slots_tail - c.slots_head + slots > t.rules.max_slots
    ):
        old = t.steps[c.steps_head & (len(t.steps) - 1)]
        t.counters[STEPS_EVICTED] += 1
        if old.open:
            t.counters[STEPS_CLOSED_EARLY] += 1
            if old.organic:
                close_organic(t, old.user, NONE)
            else:
                close_decision(t, old.user, NONE)
        drop_oldest(t)


@part
def keep(
    t: Tables, user: int, offset: int, timestamp_ms: int, id: np.uint64, policy_version: int, slots: int
) -> int:
    """Remember a new, open step (id 0: organic); returns its sequence number. The caller fills its slots."""
    forget_steps(t)
    evict_steps(t, slots)
    c, u = t.clock[0], t.users[user]
    sequence = c.steps_tail
    step = t.steps[sequence & (len(t.steps) - 1)]
    step.offset = offset
    step.timestamp_ms = timestamp_ms
    step.kept_from_ms = c.watermark_ms
    step.before = u.newest_step
    step.first_slot = c.slots_tail
    step.id = id
    step.policy_version = policy_version
    step.user = user
    step.slots = slots
    step.organic = 1 if id == 0 else 0
    step.open = 1
    u.newest_step = sequence
    c.steps_tail += 1
    c.slots_tail += slots
    return sequence


@part
def fill_slot(t: Tables, sequence: int, k: int, item: int, propensity: float) -> None:
    """What slot k of a new step holds."""
    step = t.steps[sequence & (len(t.steps) - 1)]
    slot = t.slots[(step.first_slot + k) & (len(t.slots) - 1)]
    slot.item = item
    slot.propensity = propensity
    slot.reward = 0.0
    slot.purchases = 0
    slot.carts = 0


# --- rewards ---------------------------------------------------------------------------------------------


@part
def add_reward(t: Tables, sequence: int, k: int, reward: float) -> None:
    """In place; and as an amendment where the transition is out already."""
    step = t.steps[sequence & (len(t.steps) - 1)]
    t.slots[(step.first_slot + k) & (len(t.slots) - 1)].reward += reward
    if step.open == 0 and reward != 0.0:
        a = t.out.amendments[t.out.counts[2]]
        t.out.counts[2] += 1
        a.partition = t.clock[0].partition
        a.offset = step.offset
        a.slot = k
        a.reward = reward
        t.counters[AMENDMENTS] += 1


@part
def count(t: Tables, sequence: int, k: int, name: int) -> None:
    """Purchases and cart entries of a slot: one more, or one taken back."""
    step = t.steps[sequence & (len(t.steps) - 1)]
    slot = t.slots[(step.first_slot + k) & (len(t.slots) - 1)]
    if name == PURCHASE:
        slot.purchases += 1
    elif name == REFUND:
        slot.purchases -= 1
    elif name == ADD:
        slot.carts += 1
    elif name == REMOVE:
        slot.carts -= 1


@part
def take_back(t: Tables, user: int, item: int, name: int, reward: float, timestamp_ms: int) -> bool:
    """Credit a refund (remove_from_cart) to the newest slot with a purchase (add_to_cart) left to take back."""
    if item == 0:
        return False
    sequence = first_kept(t, user)
    for _ in range(STEPS_PER_USER):
        if sequence == NONE:
            return False
        step = t.steps[sequence & (len(t.steps) - 1)]
        if timestamp_ms - step.timestamp_ms <= t.rules.window_ms:
            k = slot_of(t, sequence, item)
            if k != NONE:
                slot = t.slots[(step.first_slot + k) & (len(t.slots) - 1)]
                if (slot.purchases if name == REFUND else slot.carts) > 0:
                    add_reward(t, sequence, k, reward)
                    count(t, sequence, k, name)
                    return True
        sequence = next_kept(t, sequence)
    t.counters[SEARCHES_CUT_SHORT] += 1 if sequence != NONE else 0
    return False
