"""A partition's clock: how far event time has come, and the heap of what is due when. Pieces of the joiner's loop."""

from __future__ import annotations

from typing import Final

import numpy as np

from streaming.interning import HashMap, map_add, map_clear, map_get
from streaming.jit import part
from streaming.join_settings import BORNE_OUT, COUNTERS, FIRST_DOUBT, JUMP, MOST_DOUBLINGS
from streaming.join_tables import NEVER, NONE, Tables

FUTURE_STAMPED: Final = COUNTERS.index("future_stamped")
CLOCK_JUMPS: Final = COUNTERS.index("clock_jumps")
CLOCK_RESETS: Final = COUNTERS.index("clock_resets")
CLOCK_GAPS: Final = COUNTERS.index("clock_gaps")
DEDUP_CUT_SHORT: Final = COUNTERS.index("dedup_cut_short")
SCREEN, DUE, TAKE = range(3)  # what a record goes through; the loop may stop, and go on, between them
BY_MANY: Final = 1  # the clock jumped by a run of records of several users, or was advanced from outside
LEAD: Final = 2  # one user alone took it further than others bear out


# --- the watermark ---------------------------------------------------------------------------------------


@part
def set_high(t: Tables, high_ms: int) -> None:
    """Time has come so far; `target_ms` waits for what is due before it. A new dedup window may begin."""
    c = t.clock[0]
    c.started = 1
    c.high_ms = high_ms
    c.target_ms = max(c.watermark_ms, high_ms - t.rules.delay_ms)
    c.stage = DUE
    epoch = high_ms // t.rules.dedup_ms
    if epoch > c.epoch and not jumped_lately(t):  # else it may be put back, and copies of before come yet
        swap_ids(t)
        c.epoch = epoch


@part
def is_late(t: Tables, user: np.uint64, timestamp_ms: int) -> bool:
    """Whether the record is behind the limit. A run that disputes the clock puts it back instead; where it jumped on
    the word of the log's time stamps, the first record does."""
    c = t.clock[0]
    if refutes(t, user, timestamp_ms):
        t.counters[CLOCK_RESETS] += 1
        c.doubt = FIRST_DOUBT << min(c.refuted, MOST_DOUBLINGS)
        c.refuted += 1
        reset(t, max(timestamp_ms, c.jumped_from_ms))
        return False
    late = bool(c.started and timestamp_ms < c.watermark_ms - t.rules.late_ms)
    if not disputes(t, timestamp_ms):
        return late
    c.trial = min(c.trial, JUMP)
    if c.behind_count == 0:
        c.behind_user = user
        c.behind_mixed = 0
        c.behind_ms = timestamp_ms
    c.behind_count += 1
    c.behind_ms = max(c.behind_ms, timestamp_ms)
    if user != c.behind_user:
        c.behind_mixed = 1
    if c.behind_count < JUMP or c.behind_mixed == 0:
        return late
    t.counters[CLOCK_RESETS] += 1
    reset(t, c.behind_ms)
    return False


@part
def disputes(t: Tables, timestamp_ms: int) -> bool:
    """Whether the record is so old that the clock, if it is right about it, must be far ahead, and may be: it is the
    partition's first, or has jumped not long ago and the record was on time before."""
    c = t.clock[0]
    late_ms, jump_ms = t.rules.late_ms, t.rules.jump_ms
    if c.started == 0 or timestamp_ms >= c.high_ms - jump_ms:
        return False
    if c.settled < JUMP and timestamp_ms < c.high_ms - jump_ms - late_ms:
        return True
    return jumped_lately(t) and timestamp_ms >= c.jumped_from_ms - late_ms


@part
def refutes(t: Tables, user: np.uint64, timestamp_ms: int) -> bool:
    """Whether the record, of another user than who took the clock there, is still of before a jump that the log's time
    stamps told, and that few records bear out."""
    c = t.clock[0]
    return bool(
        c.jumped
        and 0 < c.trial < JUMP
        and user != c.lead_user
        and timestamp_ms < c.high_ms - t.rules.jump_ms
        and timestamp_ms >= c.jumped_from_ms - t.rules.late_ms
    )


@part
def jumped_lately(t: Tables) -> bool:
    """Whether less event time has passed since the clock jumped than may be between records that are on time."""
    c = t.clock[0]
    return bool(c.jumped and c.high_ms < c.jumped_to_ms + t.rules.jump_ms + t.rules.late_ms)


@part
def reset(t: Tables, high_ms: int) -> None:
    """The only time that a watermark moves back; whatever was stamped in the false time becomes present."""
    c = t.clock[0]
    c.ahead_count = 0
    c.behind_count = 0
    c.jumped = 0
    c.trial = 0
    c.high_ms = high_ms
    c.watermark_ms = high_ms - t.rules.delay_ms
    c.target_ms = c.watermark_ms
    # where the next window has begun already it does not begin again: what was put aside for it would be forgotten
    epoch = high_ms // t.rules.dedup_ms
    c.epoch = min(max(c.epoch, epoch), epoch + 1)
    c.others_ms = high_ms
    for sequence in range(c.steps_head, c.steps_tail):
        step = t.steps[sequence & (len(t.steps) - 1)]
        step.kept_from_ms = min(step.kept_from_ms, c.watermark_ms)
    due_s = wait_due_s(t)
    for sequence in range(c.waits_head, c.waits_tail):
        wait = t.waits[sequence & (len(t.waits) - 1)]
        wait.due_s = min(wait.due_s, due_s)
    for user in range(c.users_end):
        u = t.users[user]
        if u.timer != NONE:
            u.last_ms = min(u.last_ms, high_ms)
            u.touched_ms = min(u.touched_ms, high_ms)
            set_timer(t, user, user_due_s(t, user))


@part
def follow(t: Tables, user: np.uint64, timestamp_ms: int, logged_ms: int) -> None:
    """Move the clock to the record's time, unless that is incredibly far ahead. logged_ms: see Columns."""
    c = t.clock[0]
    doubt = c.doubt
    c.doubt = max(0, doubt - 1)
    if c.started == 0:
        c.settled = 1
        c.lead_user = user
        c.others_ms = timestamp_ms
        set_high(t, timestamp_ms)
    elif (
        timestamp_ms > c.high_ms + t.rules.jump_ms
        and doubt == 0
        and timestamp_ms <= logged_ms + t.rules.jump_ms
    ):
        # by the log's own time it has come so far: nothing came meanwhile
        t.counters[CLOCK_GAPS] += 1
        jump(t, timestamp_ms)
        c.trial = 1
        c.ahead_count = 0
        c.lead_user = user
        c.others_ms = timestamp_ms
        set_high(t, timestamp_ms)
    elif timestamp_ms > c.high_ms + t.rules.jump_ms:
        t.counters[FUTURE_STAMPED] += 1
        if c.ahead_count == 0:
            c.ahead_user = user
            c.ahead_mixed = 0
            c.ahead_ms = timestamp_ms
        c.ahead_count += 1
        c.ahead_ms = min(c.ahead_ms, timestamp_ms)
        if user != c.ahead_user:
            c.ahead_mixed = 1
        if c.ahead_count >= JUMP and c.ahead_mixed:
            t.counters[CLOCK_JUMPS] += 1
            c.ahead_count = 0
            jump(t, c.ahead_ms)
            c.lead_user = user
            c.others_ms = c.ahead_ms
            set_high(t, c.ahead_ms)
    else:
        c.ahead_count = 0
        leads = user == c.lead_user
        if not disputes(t, timestamp_ms):
            if not (leads and c.jumped == LEAD):  # who took the clock there is no witness for it
                c.behind_count = 0
            c.settled = min(c.settled + 1, JUMP)
            if c.trial > 0:
                bear_out(t, leads)
        if leads:
            take_ahead(t, timestamp_ms)
        else:
            hear_another(t, user, timestamp_ms)
        if timestamp_ms > c.high_ms:
            set_high(t, timestamp_ms)


@part
def bear_out(t: Tables, leads: bool) -> None:
    """A record on time after a jump that the log's time stamps told: one alone refutes it only until so many have come,
    of others than who leads among them; and once far more have, it is beyond doubt."""
    c = t.clock[0]
    if c.trial != JUMP - 1 or not leads:
        c.trial += 1
    if c.trial >= BORNE_OUT:
        c.trial = 0
        c.jumped = 0


@part
def take_ahead(t: Tables, timestamp_ms: int) -> None:
    """Who took the clock as far as it is takes it on: further than others bear out, it has jumped."""
    c = t.clock[0]
    if timestamp_ms <= max(c.high_ms, c.others_ms + t.rules.jump_ms):
        return
    lately = jumped_lately(t)
    if lately and c.jumped == BY_MANY:
        return
    if not lately:
        c.jumped_from_ms = c.others_ms
    c.jumped = LEAD
    c.jumped_to_ms = timestamp_ms


@part
def hear_another(t: Tables, user: np.uint64, timestamp_ms: int) -> None:
    """A record on time of another user: it says how far time has come, too."""
    c = t.clock[0]
    if c.jumped == LEAD and timestamp_ms >= c.high_ms - t.rules.jump_ms:
        c.jumped = 0  # it bears the leader out
    if timestamp_ms > c.high_ms:
        c.lead_user = user
        c.others_ms = c.high_ms
    else:
        c.others_ms = max(c.others_ms, timestamp_ms)


@part
def jump(t: Tables, high_ms: int) -> None:
    """The clock is about to jump to there; it may be put back to where it is."""
    c = t.clock[0]
    if not jumped_lately(t):
        c.jumped_from_ms = c.high_ms
    c.jumped = BY_MANY
    c.jumped_to_ms = high_ms


@part
def advance(t: Tables, watermark_ms: int) -> None:
    """Somebody else knows that time has passed here; never moves back."""
    c = t.clock[0]
    high_ms = watermark_ms + t.rules.delay_ms
    if c.started and high_ms <= c.high_ms:
        return
    if c.ahead_count > 0 and c.ahead_ms <= high_ms + t.rules.jump_ms:
        high_ms = max(high_ms, c.ahead_ms)
        c.ahead_count = 0
    if c.started and high_ms > c.high_ms + t.rules.jump_ms:
        jump(t, high_ms)  # who says so may be wrong
    set_high(t, high_ms)
    c.others_ms = high_ms


# --- ids seen --------------------------------------------------------------------------------------------


@part
def newer_ids(t: Tables) -> HashMap:
    """The generation that ids go into."""
    return t.ids_b if t.clock[0].newer else t.ids_a


@part
def older_ids(t: Tables) -> HashMap:
    """The generation before."""
    return t.ids_a if t.clock[0].newer else t.ids_b


@part
def swap_ids(t: Tables) -> None:
    """A new generation: the older one is forgotten."""
    map_clear(older_ids(t))
    t.clock[0].newer = 1 - t.clock[0].newer


@part
def is_known(t: Tables, id: np.uint64) -> bool:
    """Whether the id is in either generation."""
    return bool(map_get(newer_ids(t), id) != NONE or map_get(older_ids(t), id) != NONE)


@part
def remember(t: Tables, id: np.uint64) -> None:
    """Put an id into the newer generation; room must be there."""
    if newer_ids(t).size[0] >= t.rules.max_ids:
        t.counters[DEDUP_CUT_SHORT] += 1
        swap_ids(t)
    map_add(newer_ids(t), id, 0)


# --- timers ----------------------------------------------------------------------------------------------


@part
def wait_due_s(t: Tables) -> int:
    """The whole second at which an event that starts to wait now has waited long enough."""
    return int((t.clock[0].watermark_ms + t.rules.wait_ms) // 1000 + 1)


@part
def ends_sessions(t: Tables, user: int) -> bool:
    """Whether inactivity ends something of this user."""
    u = t.users[user]
    return bool(not t.rules.chained and (u.open_decision != NONE or u.open_organic != NONE))


@part
def user_due_s(t: Tables, user: int) -> int:
    """The whole second at which the user's session ends or, if nothing is open, the user is forgotten."""
    idle_ms = t.rules.gap_ms if ends_sessions(t, user) else t.rules.ttl_ms
    return int((t.users[user].touched_ms + idle_ms) // 1000 + 1)


@part
def place(t: Tables, at: int, due_s: int, user: int) -> None:
    """Write a heap entry, and tell the user where it is."""
    t.timers[at].due_s = due_s
    t.timers[at].user = user
    t.users[user].timer = at


@part
def is_before(due_s: int, user: int, other_s: int, other: int) -> bool:
    """The heap's order."""
    return due_s < other_s or (due_s == other_s and user < other)


@part
def sift_up(t: Tables, at: int, due_s: int, user: int) -> None:
    """Put an entry at `at`, or above it."""
    while at > 0:
        parent = (at - 1) // 2
        p = t.timers[parent]
        if not is_before(due_s, user, p.due_s, p.user):
            break
        place(t, at, p.due_s, p.user)
        at = parent
    place(t, at, due_s, user)


@part
def sift_down(t: Tables, at: int, due_s: int, user: int) -> None:
    """Put an entry at `at`, or below it."""
    end = t.clock[0].timers
    while True:
        child = 2 * at + 1
        if child >= end:
            break
        if child + 1 < end:
            a, b = t.timers[child], t.timers[child + 1]
            if is_before(b.due_s, b.user, a.due_s, a.user):
                child += 1
        least = t.timers[child]
        if not is_before(least.due_s, least.user, due_s, user):
            break
        place(t, at, least.due_s, least.user)
        at = child
    place(t, at, due_s, user)


@part
def set_timer(t: Tables, user: int, due_s: int) -> None:
    """Every user has one timer; this moves it, or makes it."""
    at = t.users[user].timer
    if at == NONE:
        t.clock[0].timers += 1
        sift_up(t, t.clock[0].timers - 1, due_s, user)
    elif due_s < t.timers[at].due_s:
        sift_up(t, at, due_s, user)
    else:
        sift_down(t, at, due_s, user)


@part
def hasten_timer(t: Tables, user: int) -> None:
    """The user's timer may have become due earlier. That it is due later is noticed when it rings."""
    due_s = user_due_s(t, user)
    at = t.users[user].timer
    if at == NONE or due_s < t.timers[at].due_s:
        set_timer(t, user, due_s)


@part
def drop_timer(t: Tables, user: int) -> None:
    """Take the user's timer away."""
    c = t.clock[0]
    at = t.users[user].timer
    c.timers -= 1
    t.users[user].timer = NONE
    if at == c.timers:
        return
    last_s, last = t.timers[c.timers].due_s, t.timers[c.timers].user
    if is_before(last_s, last, t.timers[at].due_s, t.timers[at].user):
        sift_up(t, at, last_s, last)
    else:
        sift_down(t, at, last_s, last)


@part
def next_timer_s(t: Tables, until_s: int) -> int:
    """When the first user is due, NEVER if nobody is until then; the user is at the heap's top."""
    c = t.clock[0]
    while c.timers > 0 and t.timers[0].due_s <= until_s:
        user = t.timers[0].user
        due_s = user_due_s(t, user)
        if due_s <= t.timers[0].due_s:
            return int(t.timers[0].due_s)
        set_timer(t, user, due_s)
    return NEVER
