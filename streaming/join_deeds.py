"""Deeds and what caused them: decisions, events, attribution, waiting, users. Pieces of the joiner's loop."""

from __future__ import annotations

from typing import Final

import numpy as np

from streaming.columns import Columns
from streaming.interning import map_get, map_put, map_remove
from streaming.jit import part
from streaming.join_clock import drop_timer, ends_sessions, hasten_timer, next_timer_s, wait_due_s
from streaming.join_settings import COUNTERS, SAMPLE, STEPS_PER_USER, WAITS_PER_USER
from streaming.join_steps import (
    ADD,
    PURCHASE,
    REFUND,
    REMOVE,
    SEARCHES_CUT_SHORT,
    STEPS_CLOSED_EARLY,
    add_reward,
    close_both,
    close_organic,
    count,
    emit,
    fill_slot,
    first_kept,
    free_row,
    keep,
    next_kept,
    row_from_decision,
    row_from_user,
    see,
    slot_of,
    take_back,
)
from streaming.join_tables import NEVER, NONE, Tables

EVENTS: Final = COUNTERS.index("events")
DECISIONS: Final = COUNTERS.index("decisions")
BY_ID: Final = COUNTERS.index("attributed_by_id")
BY_ITEM: Final = COUNTERS.index("attributed_by_item")
OVERTAKEN: Final = COUNTERS.index("overtaken")
WAITS_EXPIRED: Final = COUNTERS.index("waits_expired")
WAITS_REFUSED: Final = COUNTERS.index("waits_refused")
UNATTRIBUTED: Final = COUNTERS.index("unattributed")
ORGANIC_STEPS: Final = COUNTERS.index("organic_steps")
REWARDS_MOVED: Final = COUNTERS.index("rewards_moved")
SESSIONS_ENDED: Final = COUNTERS.index("sessions_ended")
USERS_EXPIRED: Final = COUNTERS.index("users_expired")
USERS_EVICTED: Final = COUNTERS.index("users_evicted")


# --- users -----------------------------------------------------------------------------------------------


@part
def end_session(t: Tables, user: int) -> None:
    """Inactivity: nothing follows what is open."""
    t.counters[SESSIONS_ENDED] += 1
    close_both(t, user, NONE)


@part
def forget_user(t: Tables, user: int) -> None:
    """Complete what is open, drop what waits, free the slot."""
    c, u = t.clock[0], t.users[user]
    close_both(t, user, NONE)
    while u.waits > 0:
        left = t.waits[u.first_wait & (len(t.waits) - 1)].left
        t.counters[WAITS_EXPIRED] += left
        t.counters[UNATTRIBUTED] += left
        row = end_wait(t, u.first_wait)
        if row != NONE:
            free_row(t, row)
    map_remove(t.user_slots, u.hash)
    drop_timer(t, user)
    u.next_free = c.users_free
    c.users_free = user


@part
def evict_stalest(t: Tables) -> None:
    """Of SAMPLE users next to each other, the one longest untouched goes."""
    c = t.clock[0]
    stalest = c.cursor
    for i in range(1, SAMPLE):
        user = (c.cursor + i) % t.rules.max_users
        if t.users[user].touched_ms < t.users[stalest].touched_ms:
            stalest = user
    c.cursor = (c.cursor + SAMPLE) % t.rules.max_users
    t.counters[USERS_EVICTED] += 1
    u = t.users[stalest]
    t.counters[STEPS_CLOSED_EARLY] += 1 if u.open_decision != NONE else 0
    t.counters[STEPS_CLOSED_EARLY] += 1 if u.open_organic != NONE else 0
    forget_user(t, stalest)


@part
def new_user(t: Tables, hash: np.uint64, active_ms: int) -> int:
    """A slot for a user not met before (or forgotten). Room must be there."""
    c = t.clock[0]
    if c.users_free == NONE and c.users_end >= t.rules.max_users:
        evict_stalest(t)
    user = c.users_free
    if user != NONE:
        c.users_free = t.users[user].next_free
    else:
        user = c.users_end
        c.users_end += 1
    u = t.users[user]
    u.hash = hash
    u.last_ms = u.touched_ms = active_ms
    u.newest_step = u.open_decision = u.open_organic = u.first_wait = u.last_wait = NONE
    u.newest_organic_ms = -NEVER
    u.waits = u.seen = u.seen_at = 0
    u.timer = NONE
    map_put(t.user_slots, hash, user)
    return user


@part
def active_user(t: Tables, hash: np.uint64, timestamp_ms: int) -> int:
    """The user, who has just been active; a gap before that ends the session."""
    c = t.clock[0]
    active_ms = min(timestamp_ms, c.high_ms)
    user = map_get(t.user_slots, hash)
    if user == NONE:
        user = new_user(t, hash, active_ms)
    elif active_ms - t.users[user].last_ms > t.rules.gap_ms and ends_sessions(t, user):
        end_session(t, user)
    u = t.users[user]
    u.last_ms = max(u.last_ms, active_ms)
    u.touched_ms = max(u.touched_ms, max(active_ms, c.watermark_ms))
    return user


# --- waiting ---------------------------------------------------------------------------------------------


@part
def wait(
    t: Tables,
    user: int,
    deeds: int,
    name: int,
    offset: int,
    timestamp_ms: int,
    recommendation: np.uint64,
    row: int,
) -> None:
    """Let the first `deeds` scratch deeds wait together, with the state they happened in."""
    c, u, mask = t.clock[0], t.users[user], len(t.waits) - 1
    for j in range(deeds):
        sequence = c.waits_tail
        w = t.waits[sequence & mask]
        w.offset = offset
        w.timestamp_ms = timestamp_ms
        w.due_s = wait_due_s(t)
        w.next = NONE
        w.recommendation = recommendation
        w.reward = t.out.deeds[j].reward
        w.user = user
        w.item = t.out.deeds[j].item
        w.row = row if j == 0 else NONE
        w.left = deeds - j
        w.name = name
        w.live = 1
        if u.waits == 0:
            u.first_wait = sequence
        else:
            t.waits[u.last_wait & mask].next = sequence
        u.last_wait = sequence
        u.waits += 1
        c.waits_tail += 1
        c.waits_live += 1


@part
def may_wait(t: Tables, user: int, deeds: int) -> bool:
    """Whether there is room to wait; counted if not."""
    if t.users[user].waits + deeds <= WAITS_PER_USER and t.clock[0].waits_live + deeds <= t.rules.max_waits:
        return True
    t.counters[WAITS_REFUSED] += deeds
    return False


@part
def end_wait(t: Tables, sequence: int) -> int:
    """Take what waits together from `sequence` on out, into the scratch deeds; returns its state's row, or NONE."""
    mask = len(t.waits) - 1
    first = t.waits[sequence & mask]
    deeds = int(first.left)
    u = t.users[first.user]
    after = NONE
    for j in range(deeds):
        w = t.waits[(sequence + j) & mask]
        w.live = 0
        t.out.deeds[j].item = w.item
        t.out.deeds[j].reward = w.reward
        after = w.next
    if u.first_wait == sequence:
        before = NONE
        u.first_wait = after
    else:
        before = u.first_wait
        while t.waits[before & mask].next != sequence:
            before = t.waits[before & mask].next
        t.waits[before & mask].next = after
    if after == NONE:
        u.last_wait = before
    u.waits -= deeds
    t.clock[0].waits_live -= deeds
    return int(first.row)


@part
def first_waiting(t: Tables) -> int:
    """What has waited longest, or NONE; steps over what has met its decision."""
    c, mask = t.clock[0], len(t.waits) - 1
    while c.waits_head < c.waits_tail and t.waits[c.waits_head & mask].live == 0:
        c.waits_head += 1
    return c.waits_head if c.waits_head < c.waits_tail else NONE


# --- attribution -----------------------------------------------------------------------------------------


@part
def credit(t: Tables, user: int, sequence: int, k: int, item: int, name: int, reward: float) -> None:
    """Give a deed's reward to a slot. A purchase may be what a refund waits for."""
    add_reward(t, sequence, k, reward)
    if name in (PURCHASE, ADD):
        count(t, sequence, k, name)
        if t.users[user].waits > 0:
            retry_take_backs(t, user, item, REFUND if name == PURCHASE else REMOVE)


@part
def retry_take_backs(t: Tables, user: int, item: int, name: int) -> None:
    """The first refund that waits for a purchase of this item may find it now."""
    mask = len(t.waits) - 1
    sequence = t.users[user].first_wait
    while sequence != NONE:
        w = t.waits[sequence & mask]
        if w.recommendation == 0 and w.item == item and w.name == name:
            if take_back(t, user, item, name, w.reward, w.timestamp_ms):
                unlink_take_back(t, sequence)
                t.counters[OVERTAKEN] += 1
                t.counters[BY_ITEM] += 1
            return
        sequence = w.next


@part
def unlink_take_back(t: Tables, sequence: int) -> None:
    """End a lone wait, leaving the scratch deeds, which are in use, as they are."""
    item, reward = t.out.deeds[0].item, t.out.deeds[0].reward
    end_wait(t, sequence)
    t.out.deeds[0].item = item
    t.out.deeds[0].reward = reward


@part
def attribute_by_id(
    t: Tables, user: int, sequence: int, item: int, name: int, reward: float, timestamp_ms: int
) -> bool:
    """Credit the deed to this decision, if its slate holds the item and the window is not over."""
    if timestamp_ms - t.steps[sequence & (len(t.steps) - 1)].timestamp_ms > t.rules.window_ms:
        return False
    k = slot_of(t, sequence, item)
    if k == NONE:
        return False
    t.counters[BY_ID] += 1
    credit(t, user, sequence, k, item, name, reward)
    return True


@part
def attribute_by_item(t: Tables, user: int, item: int, name: int, reward: float, timestamp_ms: int) -> bool:
    """Credit the deed to the newest step that showed the item; a move is explained by decisions only."""
    if item == 0:
        return False
    sequence = first_kept(t, user)
    for _ in range(STEPS_PER_USER):
        if sequence == NONE:
            return False
        step = t.steps[sequence & (len(t.steps) - 1)]
        after_ms = timestamp_ms - step.timestamp_ms
        if 0 <= after_ms <= t.rules.window_ms and not (step.organic and t.rules.moves[name]):
            k = slot_of(t, sequence, item)
            if k != NONE:
                credit(t, user, sequence, k, item, name, reward)
                return True
        sequence = next_kept(t, sequence)
    t.counters[SEARCHES_CUT_SHORT] += 1 if sequence != NONE else 0
    return False


@part
def fall_through(
    t: Tables, user: int, deeds: int, name: int, offset: int, timestamp_ms: int, row: int
) -> None:
    """Attribute the scratch deeds by item; what no step explains may be an organic step of its own.

    row: the state in which they happened, where they waited since; NONE: they happen now.
    """
    rest = 0
    for j in range(deeds):
        item, reward = int(t.out.deeds[j].item), t.out.deeds[j].reward
        if attribute_by_item(t, user, item, name, reward, timestamp_ms):
            t.counters[BY_ITEM] += 1
        elif item != 0 and (t.rules.moves[name] or reward > 0.0):
            t.out.deeds[rest].item = item
            t.out.deeds[rest].reward = reward
            rest += 1
        else:
            t.counters[UNATTRIBUTED] += 1
    if rest > 0:
        open_organic(t, user, rest, name, offset, timestamp_ms, row)
    elif row != NONE:
        free_row(t, row)


@part
def later_open_row(t: Tables, user: int, offset: int) -> int:
    """The state of the oldest step that the user has open and that came after `offset`, or NONE."""
    u = t.users[user]
    found, found_offset = NONE, NEVER
    if u.open_organic != NONE and t.rows[u.organic_row].offset > offset:
        found, found_offset = u.organic_row, t.rows[u.organic_row].offset
    if u.open_decision != NONE and offset < t.rows[u.decision_row].offset < found_offset:
        found = u.decision_row
    return int(found)


@part
def open_organic(
    t: Tables, user: int, deeds: int, name: int, offset: int, timestamp_ms: int, row: int
) -> None:
    """The user went somewhere unaided. Completes the open organic step, and leaves an open decision open.

    If it waited, and something later is open, it slips in before that instead.
    """
    t.counters[ORGANIC_STEPS] += 1
    u = t.users[user]
    waited = row != NONE
    if not waited:
        row = row_from_user(t, user, offset, timestamp_ms)
    if not (waited and later_open_row(t, user, offset) != NONE):
        close_organic(t, user, row)
    distinct = 0
    for j in range(deeds):
        distinct += 1 if slot_before(t, j) == NONE else 0
    sequence = keep(t, user, offset, timestamp_ms, np.uint64(0), -1, distinct)
    u.newest_organic_ms = max(u.newest_organic_ms, timestamp_ms)
    k = 0
    for j in range(deeds):
        if slot_before(t, j) == NONE:
            fill_slot(t, sequence, k, t.out.deeds[j].item, np.nan)
            k += 1
    later = later_open_row(t, user, offset) if waited else NONE
    if later == NONE:
        u.open_organic = sequence
        u.organic_row = row
        u.touched_ms = max(u.touched_ms, t.clock[0].watermark_ms)
    for j in range(deeds):
        item = int(t.out.deeds[j].item)
        credit(t, user, sequence, slot_of(t, sequence, item), item, name, t.out.deeds[j].reward)
    if later != NONE:
        emit(t, sequence, row, later)
        free_row(t, row)


@part
def slot_before(t: Tables, deed: int) -> int:
    """The first scratch deed before this one with the same item, or NONE."""
    for j in range(deed):
        if t.out.deeds[j].item == t.out.deeds[deed].item:
            return j
    return NONE


# --- decisions -------------------------------------------------------------------------------------------


@part
def take_decision(t: Tables, columns: Columns, i: int) -> None:
    """Opens a step, which completes the user's open ones; then takes what had overtaken it."""
    t.counters[DECISIONS] += 1
    timestamp_ms = columns.timestamp_ms[i]
    user = active_user(t, columns.user[i], timestamp_ms)
    row = row_from_decision(t, columns, i)
    close_both(t, user, row)
    start = columns.item_bounds[i]
    slots = columns.item_bounds[i + 1] - start
    sequence = keep(t, user, columns.offset[i], timestamp_ms, columns.id[i], columns.policy_version[i], slots)
    for k in range(slots):
        fill_slot(t, sequence, k, columns.item[start + k], columns.propensity[start + k])
    u = t.users[user]
    u.open_decision = sequence
    u.decision_row = row
    if u.waits > 0:
        meet_waits(t, user, sequence, columns.id[i])
    if u.newest_organic_ms >= timestamp_ms:
        take_over_organic(t, user, sequence, timestamp_ms)
    hasten_timer(t, user)


@part
def meet_waits(t: Tables, user: int, decision: int, id: np.uint64) -> None:
    """Events that waited for this decision get their slot, or fall through."""
    while True:
        sequence = t.users[user].first_wait
        while sequence != NONE and t.waits[sequence & (len(t.waits) - 1)].recommendation != id:
            sequence = t.waits[sequence & (len(t.waits) - 1)].next
        if sequence == NONE:
            return
        w = t.waits[sequence & (len(t.waits) - 1)]
        deeds, name, offset, timestamp_ms = int(w.left), int(w.name), int(w.offset), int(w.timestamp_ms)
        row = end_wait(t, sequence)
        t.counters[OVERTAKEN] += deeds
        rest = attribute_all_by_id(t, user, decision, deeds, name, timestamp_ms)
        fall_through(t, user, rest, name, offset, timestamp_ms, row)


@part
def attribute_all_by_id(t: Tables, user: int, decision: int, deeds: int, name: int, timestamp_ms: int) -> int:
    """Credit the scratch deeds to this decision; returns how many are left, now the first ones."""
    rest = 0
    for j in range(deeds):
        item, reward = int(t.out.deeds[j].item), t.out.deeds[j].reward
        if not attribute_by_id(t, user, decision, item, name, reward, timestamp_ms):
            t.out.deeds[rest].item = item
            t.out.deeds[rest].reward = reward
            rest += 1
    return rest


@part
def take_over_organic(t: Tables, user: int, decision: int, timestamp_ms: int) -> None:
    """Organic steps that this late decision explains give their reward to it; they stay, with what is left."""
    mask = len(t.slots) - 1
    sequence = first_kept(t, user)
    for _ in range(STEPS_PER_USER):
        if sequence == NONE:
            return
        step = t.steps[sequence & (len(t.steps) - 1)]
        if step.organic and 0 <= step.timestamp_ms - timestamp_ms <= t.rules.wait_ms:
            for k in range(step.slots):
                theirs = t.slots[(step.first_slot + k) & mask]
                mine = slot_of(t, decision, theirs.item)
                if mine == NONE or (theirs.reward == 0.0 and theirs.purchases == 0 and theirs.carts == 0):
                    continue
                t.counters[REWARDS_MOVED] += 1
                reward = theirs.reward
                add_reward(t, sequence, k, -reward)
                add_reward(t, decision, mine, reward)
                own = t.slots[(t.steps[decision & (len(t.steps) - 1)].first_slot + mine) & mask]
                own.purchases += theirs.purchases
                own.carts += theirs.carts
                theirs.purchases = 0
                theirs.carts = 0
        sequence = next_kept(t, sequence)


# --- events ----------------------------------------------------------------------------------------------


@part
def value_of(columns: Columns, i: int, j: int) -> float:
    """What item j of event i is worth: price x quantity, or its share of the event's value, or 0."""
    if not np.isnan(columns.price[j]):
        return columns.price[j] * columns.quantity[j]
    if not np.isnan(columns.value[i]):
        return columns.value[i] / (columns.item_bounds[i + 1] - columns.item_bounds[i])
    return 0.0


@part
def take_event(t: Tables, columns: Columns, i: int) -> None:
    """Attributes what the user did, then puts it into the user's history."""
    t.counters[EVENTS] += 1
    name = int(columns.name[i])
    timestamp_ms = columns.timestamp_ms[i]
    user = active_user(t, columns.user[i], timestamp_ms)
    start, end = columns.item_bounds[i], columns.item_bounds[i + 1]
    rules = t.rules
    if name in (REFUND, REMOVE):
        for j in range(start, end):
            reward = rules.weight[name] + rules.value_weight[name] * value_of(columns, i, j)
            take_back_or_wait(t, user, columns.item[j], name, reward, columns.offset[i], timestamp_ms)
    else:
        deeds = 0
        for j in range(start, end):
            reward = rules.weight[name] + rules.value_weight[name] * value_of(columns, i, j)
            if reward != 0.0 or rules.moves[name] or name in (PURCHASE, ADD):
                t.out.deeds[deeds].item = columns.item[j]
                t.out.deeds[deeds].reward = reward
                deeds += 1
        if deeds > 0:
            attribute(t, columns, i, user, deeds, name)
    if rules.remembered[name]:
        for j in range(max(start, end - t.seen_item.shape[1]), end):
            see(t, user, columns.item[j], name, timestamp_ms, value_of(columns, i, j))
    hasten_timer(t, user)


@part
def take_back_or_wait(
    t: Tables, user: int, item: int, name: int, reward: float, offset: int, timestamp_ms: int
) -> None:
    """A refund goes to the newest slot with a purchase to take back; else it waits for one."""
    if take_back(t, user, item, name, reward, timestamp_ms):
        t.counters[BY_ITEM] += 1
    elif item != 0 and may_wait(t, user, 1):
        t.out.deeds[0].item = item
        t.out.deeds[0].reward = reward
        wait(t, user, 1, name, offset, timestamp_ms, np.uint64(0), NONE)
    else:
        t.counters[UNATTRIBUTED] += 1


@part
def attribute(t: Tables, columns: Columns, i: int, user: int, deeds: int, name: int) -> None:
    """By recommendation_id if there is one, waiting for its decision if need be; then by item."""
    id = columns.recommendation[i]
    offset, timestamp_ms = columns.offset[i], columns.timestamp_ms[i]
    if id != 0:
        decision = find_decision(t, user, id)
        if decision != NONE:
            deeds = attribute_all_by_id(t, user, decision, deeds, name, timestamp_ms)
        elif may_wait(t, user, deeds):
            row = row_from_user(t, user, offset, timestamp_ms)
            wait(t, user, deeds, name, offset, timestamp_ms, id, row)
            return
    fall_through(t, user, deeds, name, offset, timestamp_ms, NONE)


@part
def find_decision(t: Tables, user: int, id: np.uint64) -> int:
    """The user's kept decision of this id, or NONE."""
    sequence = first_kept(t, user)
    for _ in range(STEPS_PER_USER):
        if sequence == NONE or t.steps[sequence & (len(t.steps) - 1)].id == id:
            return sequence
        sequence = next_kept(t, sequence)
    t.counters[SEARCHES_CUT_SHORT] += 1 if sequence != NONE else 0
    return NONE


# --- what is due -----------------------------------------------------------------------------------------


@part
def due_s(t: Tables) -> int:
    """The whole second of the first thing due before the clock's target, or NEVER."""
    until_s = t.clock[0].target_ms // 1000
    first = first_waiting(t)
    wait_s = t.waits[first & (len(t.waits) - 1)].due_s if first != NONE else NEVER
    soonest = min(wait_s, next_timer_s(t, until_s))
    return soonest if soonest <= until_s else NEVER


@part
def do_due(t: Tables, second: int) -> None:
    """Do the first thing that is due at this second: waits before users."""
    c = t.clock[0]
    c.watermark_ms = max(c.watermark_ms, second * 1000)
    first = first_waiting(t)
    if first != NONE and t.waits[first & (len(t.waits) - 1)].due_s <= second:
        expire_wait(t, first)
        return
    user = t.timers[0].user
    if ends_sessions(t, user):
        end_session(t, user)
    else:
        t.counters[USERS_EXPIRED] += 1
        forget_user(t, user)


@part
def expire_wait(t: Tables, sequence: int) -> None:
    """It waited in vain: attribute by item, if it is no refund."""
    w = t.waits[sequence & (len(t.waits) - 1)]
    user, deeds, name = int(w.user), int(w.left), int(w.name)
    offset, timestamp_ms = int(w.offset), int(w.timestamp_ms)
    t.counters[WAITS_EXPIRED] += deeds
    row = end_wait(t, sequence)
    if row == NONE:
        t.counters[UNATTRIBUTED] += deeds
        return
    fall_through(t, user, deeds, name, offset, timestamp_ms, row)
    hasten_timer(t, user)
