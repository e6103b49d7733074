"""The joiner's spec: plain Python, one record at a time. `streaming/joiner.py`, the fast one, must do just this.

Two uses: tests compare the fast one with it on random streams, and `learner audit` joins a log with it once more,
so that what the audit says does not rest on the code that it checks.

Order within a partition is log order. Event time decides gaps, windows and lateness; the wall clock is never
asked. Nothing depends on how records are cut into batches. What the design left open is settled here:

- A step is *kept* while the watermark has moved by no more than the attribution window since it was opened;
  of a user's kept steps, the newest 256 (by log order) are searched. "Newest" is always by log order.
- A deed that carries a recommendation_id may be stamped before its decision (clocks of two machines); a deed that
  is attributed by item may not. Neither may be further behind than the window.
- view_item and select_item are *moves*: only a decision explains them, else they open an organic step. All other
  deeds are explained by the newest step that showed the item, organic or not.
- Refunds and remove_from_cart go where the purchase (the add_to_cart) was counted, and wait for it if need be.
- Item 0 (not in the vocabulary) enters histories, but nothing is ever attributed to it.
- An event that waited in vain and then opens an organic step does so with the state of its arrival; if the user has
  taken later steps by then, it slips in before the oldest of those still open.
- A session ends when the watermark passes (last activity + gap), where an activity that came behind the watermark
  counts as of the watermark: a visit that is uploaded hours later is still one visit.
- A future-stamped record counts as activity of the present.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from streaming.columns import Kind, Reason
from streaming.join_settings import (
    BORNE_OUT,
    COUNTERS,
    FIRST_DOUBT,
    FIRST_MS,
    JUMP,
    LAST_MS,
    MOST_DOUBLINGS,
    SAMPLE,
    STEPS_PER_USER,
    WAITS_PER_USER,
    JoinSettings,
    to_ms,
)
from streaming.rewards import ACTION_NAMES, CODES, HISTORY_NAMES, OTHER

TAKES_BACK: Final = {"refund": "purchase", "remove_from_cart": "add_to_cart"}

NEVER: Final = 2**62

Id: TypeAlias = str | int  # text, or its 64-bit hash; empty or 0 where there is none


# --- records ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One item of an event, or one slot of a slate."""

    item: int  # vocabulary id
    quantity: int = 1
    price: float = math.nan
    propensity: float = math.nan


@dataclass(frozen=True, slots=True)
class Seen:
    """One entry of a decision's history."""

    item: int
    name: str
    timestamp_ms: int
    value: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a log."""

    kind: Kind
    id: Id
    user: Id
    timestamp_ms: int
    name: str = ""
    recommendation: Id = ""
    value: float = math.nan
    lines: tuple[Line, ...] = ()
    history: tuple[Seen, ...] = ()  # a decision's, oldest first
    policy_version: int = 0
    misplaced: bool = False
    partition: int = 0
    offset: int = -1
    reason: Reason = Reason.OK
    logged_ms: int = 0  # see Columns


# --- what is known, and what comes of it -----------------------------------------------------------------


class Entry(NamedTuple):
    """One thing in a history."""

    item: int
    name: int
    timestamp_ms: int
    value: float


class State(NamedTuple):
    """The history before a step, newest first; rows are (item, name, age_s, value)."""

    offset: int
    timestamp_ms: int
    rows: tuple[tuple[int, int, float, float], ...]


class Transition(NamedTuple):
    """One slot of a completed step."""

    partition: int
    offset: int
    slot: int
    state: State
    next_state: State | None
    action: int
    reward: float
    discount: float
    propensity: float
    organic: bool
    policy_version: int


class Credit(NamedTuple):
    """A reward that a slot was given."""

    event: int  # offset of the event that earned it
    offset: int  # of the record that opened the step
    slot: int
    reward: float
    amended: bool  # the transition was out already


@dataclass
class Output:
    """What records and watermarks gave, in order."""

    transitions: list[Transition] = field(default_factory=list)
    # partition, offset, slot, reward
    amendments: list[tuple[int, int, int, float]] = field(default_factory=list)
    late: list[tuple[int, int]] = field(default_factory=list)  # partition, offset
    credits: list[Credit] | None = None  # which event earned what; None: nobody asks


@dataclass(slots=True)
class Slot:
    """A place in a step, and what it has earned."""

    item: int
    propensity: float
    reward: float = 0.0
    counts: dict[str, int] = field(default_factory=lambda: {"purchase": 0, "add_to_cart": 0})


@dataclass(eq=False, slots=True)
class Step:
    """A moment at which something was put before a user, or at which the user went somewhere unaided."""

    user: User
    id: Id  # recommendation_id; empty for organic steps
    timestamp_ms: int
    policy_version: int
    slots: list[Slot]
    state: State
    kept_from_ms: int  # the watermark when it was opened
    open: bool = True

    @property
    def organic(self) -> bool:
        """No decision opened it."""
        return not self.id

    @property
    def offset(self) -> int:
        """Of the record that opened it."""
        return self.state.offset

    def slot_of(self, item: int) -> int | None:
        """Where the item stood; None: nowhere."""
        return next((k for k, slot in enumerate(self.slots) if slot.item == item), None)


class Deed(NamedTuple):
    """One item of an event."""

    item: int
    name: str
    reward: float
    event: int  # its offset


@dataclass(eq=False, slots=True)
class Wait:
    """Deeds of one event that wait: for their decision, or (a single refund) for its purchase."""

    user: User
    offset: int
    timestamp_ms: int
    recommendation: Id  # empty: waits for its purchase
    deeds: list[Deed]
    state: State
    due_s: int


@dataclass(eq=False, slots=True)
class User:
    """All that is known of a user."""

    id: Id
    slot: int
    last_ms: int  # newest activity, for gaps
    touched_ms: int  # newest activity, or the watermark when it came, for timers
    history: deque[Entry]
    steps: list[Step] = field(default_factory=list)  # oldest first; those that were forgotten are gone
    open_decision: Step | None = None
    open_organic: Step | None = None
    waiting: list[Wait] = field(default_factory=list)
    timer_s: int = NEVER  # its valid entry among the partition's timers


@dataclass
class Run:
    """Records in a row that disagree with the clock."""

    count: int = 0
    extreme_ms: int = 0
    users: set[Id] = field(default_factory=set)

    def add(self, user: Id, timestamp_ms: int, pick: Callable[[int, int], int]) -> bool:
        """Note one; True if the run is long enough to be believed."""
        self.extreme_ms = pick(self.extreme_ms, timestamp_ms) if self.count else timestamp_ms
        self.count += 1
        self.users.add(user)
        return self.count >= JUMP and len(self.users) >= 2

    def clear(self) -> None:
        """The clock was right: the run is over."""
        self.count = 0
        self.users = set()


# --- the join --------------------------------------------------------------------------------------------


class PlainPartition:
    """All that is known of one partition."""

    def __init__(self, partition: int, settings: JoinSettings, out: Output) -> None:
        self.partition, self.out = partition, out
        self._set(settings)
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.high_ms: int | None = None
        self.watermark_ms = -(2**62)
        self.settled = 0  # on-time records so far, up to JUMP: until then the first clock may be undone
        self.ahead, self.behind = Run(), Run()
        self.jumped: tuple[int, int] | None = None  # from and to: it did, lately maybe
        self.trial = 0  # records that bear out a jump that the log's time stamps told; 0: there is none
        self.refuted = 0  # how many such jumps were not borne out
        self.doubt = 0  # records until the log's time stamps are believed again
        self.by_lead = False  # the jump was one user's, who took the clock further than others bear out
        self.lead_user: Id | None = None  # who took the clock as far as it is
        self.others_ms = 0  # newest time that a record of others says
        self.epoch = 0
        self.ids: set[tuple[int, Id, Id]] = set()
        self.older_ids: set[tuple[int, Id, Id]] = set()
        self.users: dict[Id, User] = {}
        self.timers: list[tuple[int, int]] = []  # a heap of (whole second, slot of a user)
        self.slots: list[User | None] = []
        self.free: list[int] = []
        self.cursor = 0
        self.steps: deque[Step] = deque()  # in the order they were opened
        self.slots_kept = 0  # of all of them
        self.waits: OrderedDict[Wait, None] = OrderedDict()  # in the order they came
        self.deeds_waiting = 0  # of all of them

    def adopt(self, settings: JoinSettings) -> None:
        """These settings hold from the next record on."""
        before_ms = self.dedup_ms
        self._set(settings)
        if self.high_ms is not None and self.dedup_ms != before_ms:
            # windows begin at other times now, and no id may be forgotten for it
            self.ids, self.older_ids = self.ids | self.older_ids, set()
            self.epoch = self.high_ms // self.dedup_ms
        for user in self.users.values():
            self.hasten_timer(user)

    def _set(self, settings: JoinSettings) -> None:
        self.settings = settings
        self.gap_ms = to_ms(settings.session_gap_s)
        self.window_ms = to_ms(settings.attribution_window_s)
        self.wait_ms = to_ms(settings.overtake_wait_s)
        self.late_ms = to_ms(settings.late_after_s)
        self.delay_ms = to_ms(settings.watermark_delay_s)
        self.jump_ms = to_ms(settings.max_jump_s)
        self.ttl_ms = to_ms(settings.user_ttl_s)
        self.dedup_ms = to_ms(settings.dedup_window_s)

    # --- one record ---------------------------------------------------------------------------------------

    def take(self, row: Row) -> None:
        """One record, in log order."""
        if row.kind == Kind.BAD:
            self.counters["bad"] += 1
            return
        if self.is_late(row):
            self.counters["late"] += 1
            self.out.late.append((row.partition, row.offset))
            return
        key = (int(row.kind), row.id, row.user)
        if key in self.ids or key in self.older_ids:
            self.counters["duplicates"] += 1
            return
        self.counters["misplaced"] += row.misplaced
        self.follow_clock(row)
        self.remember_id(key)
        if row.kind == Kind.DECISION:
            self.counters["decisions"] += 1
            self.take_decision(row)
        else:
            self.counters["events"] += 1
            self.take_event(row)

    def remember_id(self, key: tuple[int, Id, Id]) -> None:
        """Two generations: the older one is dropped when the newer one's window is over, or when it is full."""
        if len(self.ids) >= self.settings.max_ids:
            self.counters["dedup_cut_short"] += 1
            self.older_ids, self.ids = self.ids, set()
        self.ids.add(key)

    # --- the clock ----------------------------------------------------------------------------------------

    def is_late(self, row: Row) -> bool:
        """Whether the record is behind the limit. A run that disputes the clock puts it back instead; where it jumped
        on the word of the log's time stamps, the first record does."""
        if self.refutes(row):
            assert self.jumped is not None
            self.counters["clock_resets"] += 1
            self.doubt = FIRST_DOUBT << min(self.refuted, MOST_DOUBLINGS)
            self.refuted += 1
            self.reset_clock(max(row.timestamp_ms, self.jumped[0]))
            return False
        disputes = self.disputes(row)
        if disputes:
            self.trial = min(self.trial, JUMP)
        if not (disputes and self.behind.add(row.user, row.timestamp_ms, max)):
            return self.high_ms is not None and row.timestamp_ms < self.watermark_ms - self.late_ms
        self.counters["clock_resets"] += 1
        self.reset_clock(self.behind.extreme_ms)
        return False

    def disputes(self, row: Row) -> bool:
        """Whether the record is so old that the clock must be far ahead, if it is right about it, and may be: it is the
        partition's first, or has jumped not long ago and the record was on time before."""
        if self.high_ms is None or row.timestamp_ms >= self.high_ms - self.jump_ms:
            return False
        if self.settled < JUMP and row.timestamp_ms < self.high_ms - self.jump_ms - self.late_ms:
            return True
        from_ms = self.jumped_lately()
        return from_ms is not None and row.timestamp_ms >= from_ms - self.late_ms

    def refutes(self, row: Row) -> bool:
        """Whether the record, of another user than who took the clock there, is still of before a jump that the log's
        time stamps told, and that few records bear out."""
        if (
            not 0 < self.trial < JUMP
            or self.high_ms is None
            or self.jumped is None
            or row.user == self.lead_user
        ):
            return False
        return self.jumped[0] - self.late_ms <= row.timestamp_ms < self.high_ms - self.jump_ms

    def jumped_lately(self) -> int | None:
        """From where the clock jumped, if less event time has passed since than may be between records that are on
        time."""
        if self.jumped is None or self.high_ms is None:
            return None
        from_ms, to_ms = self.jumped
        return from_ms if self.high_ms < to_ms + self.jump_ms + self.late_ms else None

    def reset_clock(self, high_ms: int) -> None:
        """The only time that a watermark moves back; whatever was stamped in the false time becomes present."""
        self.ahead.clear()
        self.behind.clear()
        self.jumped, self.trial = None, 0
        self.high_ms, self.watermark_ms = high_ms, high_ms - self.delay_ms
        epoch = high_ms // self.dedup_ms
        self.epoch = min(max(self.epoch, epoch), epoch + 1)  # a window that has begun does not begin again
        self.others_ms = high_ms
        for step in self.steps:
            step.kept_from_ms = min(step.kept_from_ms, self.watermark_ms)
        for user in self.users.values():
            user.last_ms = min(user.last_ms, high_ms)
            user.touched_ms = min(user.touched_ms, high_ms)
            self.hasten_timer(user)
        for wait in self.waits:
            wait.due_s = min(wait.due_s, self.wait_due_s())

    def follow_clock(self, row: Row) -> None:
        """Move the clock to the record's time, unless that is incredibly far ahead, by the log's own time as well."""
        trusts = self.doubt == 0 and row.timestamp_ms <= row.logged_ms + self.jump_ms
        self.doubt = max(0, self.doubt - 1)
        if self.high_ms is None:
            self.settled = 1
            self.lead_user, self.others_ms = row.user, row.timestamp_ms
            self.set_high(row.timestamp_ms)
        elif row.timestamp_ms > self.high_ms + self.jump_ms and trusts:
            self.counters["clock_gaps"] += 1
            self.jump(row.timestamp_ms)
            self.trial = 1
            self.ahead.clear()
            self.lead_user, self.others_ms = row.user, row.timestamp_ms
            self.set_high(row.timestamp_ms)
        elif row.timestamp_ms > self.high_ms + self.jump_ms:
            self.counters["future_stamped"] += 1
            if self.ahead.add(row.user, row.timestamp_ms, min):
                self.counters["clock_jumps"] += 1
                self.jump(self.ahead.extreme_ms)
                self.lead_user, self.others_ms = row.user, self.ahead.extreme_ms
                self.set_high(self.ahead.extreme_ms)
                self.ahead.clear()
        else:
            self.ahead.clear()
            leads = row.user == self.lead_user
            if not self.disputes(row):
                if not (leads and self.jumped and self.by_lead):  # who took it there is no witness for it
                    self.behind.clear()
                self.settled = min(self.settled + 1, JUMP)
                if self.trial and (self.trial != JUMP - 1 or not leads):
                    self.trial += 1
                if self.trial >= BORNE_OUT:
                    self.jumped, self.trial = None, 0
            if leads:
                self.take_ahead(row.timestamp_ms)
            else:
                self.hear_another(row)
            if row.timestamp_ms > self.high_ms:
                self.set_high(row.timestamp_ms)

    def take_ahead(self, timestamp_ms: int) -> None:
        """Who took the clock as far as it is takes it on: further than others bear out, it has jumped."""
        assert self.high_ms is not None
        if timestamp_ms <= max(self.high_ms, self.others_ms + self.jump_ms):
            return
        from_ms = self.jumped_lately()
        if from_ms is None or self.by_lead:
            self.jumped = (self.others_ms if from_ms is None else from_ms, timestamp_ms)
            self.by_lead = True

    def hear_another(self, row: Row) -> None:
        """A record on time of another user: it says how far time has come, too."""
        assert self.high_ms is not None
        if self.by_lead and row.timestamp_ms >= self.high_ms - self.jump_ms:
            self.jumped, self.by_lead = None, False  # it bears the leader out
        if row.timestamp_ms > self.high_ms:
            self.lead_user, self.others_ms = row.user, self.high_ms
        else:
            self.others_ms = max(self.others_ms, row.timestamp_ms)

    def jump(self, high_ms: int) -> None:
        """The clock is about to jump to there; it may be put back to where it is."""
        assert self.high_ms is not None
        from_ms = self.jumped_lately()
        self.jumped = (self.high_ms if from_ms is None else from_ms, high_ms)
        self.by_lead = False

    def advance(self, watermark_ms: int) -> None:
        """Somebody else knows that time has passed here; never moves back.

        A run of future-stamped records that is no longer far ahead counts at once.
        """
        high_ms = min(watermark_ms, LAST_MS) + self.delay_ms
        if watermark_ms < FIRST_MS:
            return
        if self.high_ms is not None and high_ms <= self.high_ms:
            return
        if self.ahead.count and self.ahead.extreme_ms <= high_ms + self.jump_ms:
            high_ms = max(high_ms, self.ahead.extreme_ms)
            self.ahead.clear()
        if self.high_ms is not None and high_ms > self.high_ms + self.jump_ms:
            self.jump(high_ms)  # who says so may be wrong
        self.set_high(high_ms)
        self.others_ms = high_ms

    def set_high(self, high_ms: int) -> None:
        """Do what is due up to the new watermark in order of time: first waits, then users, by whole seconds."""
        self.high_ms = high_ms
        epoch = high_ms // self.dedup_ms
        if epoch > self.epoch and self.jumped_lately() is None:  # else it may be put back
            self.older_ids, self.ids = self.ids, set()
            self.epoch = epoch
        target_ms = max(self.watermark_ms, high_ms - self.delay_ms)
        while True:
            first = next(iter(self.waits), None)
            due_s = NEVER if first is None else first.due_s
            user_s, user = self.next_timer()
            if min(due_s, user_s) > target_ms // 1000:
                break
            self.watermark_ms = max(self.watermark_ms, min(due_s, user_s) * 1000)
            if first is not None and due_s <= user_s:
                self.expire_wait(first)
            elif user is not None:
                self.user_is_due(user)
        self.watermark_ms = target_ms

    def next_timer(self) -> tuple[int, User | None]:
        """(whole second, user) of who is due first; of several, the one in the lowest slot."""
        while self.timers:
            due_s, slot = self.timers[0]
            user = self.slots[slot]
            if user is None or user.timer_s != due_s:
                heapq.heappop(self.timers)  # forgotten, or hastened since
                continue
            user.timer_s = self.user_due_s(user)
            if user.timer_s == due_s:
                return due_s, user
            heapq.heapreplace(self.timers, (user.timer_s, slot))
        return NEVER, None

    def hasten_timer(self, user: User) -> None:
        """The user may have become due earlier. That one is due later is noticed when the time comes."""
        due_s = self.user_due_s(user)
        if due_s < user.timer_s:
            user.timer_s = due_s
            heapq.heappush(self.timers, (due_s, user.slot))

    def user_due_s(self, user: User) -> int:
        """The whole second at which the user's session ends or, if nothing is open, the user is forgotten."""
        idle_ms = self.gap_ms if self.ends_sessions(user) else self.ttl_ms
        return (user.touched_ms + idle_ms) // 1000 + 1

    def wait_due_s(self) -> int:
        """The whole second at which an event that starts to wait now has waited long enough."""
        return (self.watermark_ms + self.wait_ms) // 1000 + 1

    def ends_sessions(self, user: User) -> bool:
        """Whether inactivity ends something of this user."""
        opened = user.open_decision is not None or user.open_organic is not None
        return opened and self.settings.horizon == "session"

    def user_is_due(self, user: User) -> None:
        """The user was inactive for so long that something ends."""
        if self.ends_sessions(user):
            self.end_session(user)
        else:
            self.counters["users_expired"] += 1
            self.forget_user(user)

    # --- users --------------------------------------------------------------------------------------------

    def user(self, row: Row) -> User:
        """The record's user, who has just been active; a gap before that ends the session."""
        assert self.high_ms is not None
        active_ms = min(row.timestamp_ms, self.high_ms)
        user = self.users.get(row.user)
        if user is None:
            user = self.new_user(row.user, active_ms)
        elif active_ms - user.last_ms > self.gap_ms and self.ends_sessions(user):
            self.end_session(user)
        user.last_ms = max(user.last_ms, active_ms)
        user.touched_ms = max(user.touched_ms, active_ms, self.watermark_ms)
        return user

    def new_user(self, id: Id, active_ms: int) -> User:
        """Somebody who was not known; the stalest makes room if there are too many."""
        if not self.free and len(self.slots) >= self.settings.max_users:
            self.evict_stalest()
        if self.free:
            slot = self.free.pop()
        else:
            slot = len(self.slots)
            self.slots.append(None)
        user = User(id, slot, active_ms, active_ms, deque(maxlen=self.settings.history_length))
        self.users[id] = self.slots[slot] = user
        self.hasten_timer(user)
        return user

    def evict_stalest(self) -> None:
        """Of SAMPLE slots next to each other, the one longest untouched goes."""
        sampled = [self.slots[(self.cursor + i) % self.settings.max_users] for i in range(SAMPLE)]
        self.cursor = (self.cursor + SAMPLE) % self.settings.max_users
        user = min((user for user in sampled if user is not None), key=lambda user: user.touched_ms)
        self.counters["users_evicted"] += 1
        self.counters["steps_closed_early"] += (user.open_decision is not None) + (
            user.open_organic is not None
        )
        self.forget_user(user)

    def forget_user(self, user: User) -> None:
        """What is open ends, what waits waited in vain."""
        self.complete_open(user, None)
        for wait in user.waiting:
            self.drop_wait(wait)
            self.counters["waits_expired"] += len(wait.deeds)
            self.counters["unattributed"] += len(wait.deeds)
        del self.users[user.id]
        self.slots[user.slot] = None
        self.free.append(user.slot)
        user.steps = []

    def end_session(self, user: User) -> None:
        """The visit is over: nothing follows what is open."""
        self.counters["sessions_ended"] += 1
        self.complete_open(user, None)

    # --- steps --------------------------------------------------------------------------------------------

    def complete_open(self, user: User, next_state: State | None) -> None:
        """Complete what the user has open: the decision first, then the organic step."""
        self.complete(user.open_decision, next_state)
        self.complete(user.open_organic, next_state)

    def complete(self, step: Step | None, next_state: State | None) -> None:
        """One transition for each slot; with no next state the session has ended there."""
        if step is None:
            return
        discount = 0.0 if next_state is None else self.settings.gamma
        for k, slot in enumerate(step.slots):
            self.counters["transitions"] += 1
            self.out.transitions.append(
                Transition(
                    self.partition, step.offset, k, step.state, next_state, slot.item, slot.reward, discount,
                    slot.propensity, step.organic, step.policy_version,
                )
            )  # fmt: skip
        step.open = False
        if step.user.open_decision is step:
            step.user.open_decision = None
        if step.user.open_organic is step:
            step.user.open_organic = None

    def keep(self, step: Step) -> None:
        """Remember a new step. Steps beyond the window are forgotten first; then the oldest, if room is short."""
        settings = self.settings
        for _ in range(len(self.steps)):
            if self.is_kept(self.steps[0]):
                break
            oldest = self.steps.popleft()
            self.unlink(oldest)
            if oldest.open:  # (horizon "user") it stays until it is completed, but explains nothing any more
                oldest.kept_from_ms = self.watermark_ms
                self.steps.append(oldest)
                self.slots_kept += len(oldest.slots)
        while self.steps and (
            len(self.steps) >= settings.max_steps or self.slots_kept + len(step.slots) > settings.max_slots
        ):
            oldest = self.steps.popleft()
            self.counters["steps_evicted"] += 1
            if oldest.open:
                self.counters["steps_closed_early"] += 1
                self.complete(oldest, None)
            self.unlink(oldest)
        self.steps.append(step)
        self.slots_kept += len(step.slots)
        step.user.steps.append(step)

    def unlink(self, step: Step) -> None:
        """It is no longer among `steps`: its user forgets it, too."""
        self.slots_kept -= len(step.slots)
        if step in step.user.steps:
            step.user.steps.remove(step)

    def is_kept(self, step: Step) -> bool:
        """Whether deeds may still be attributed to it."""
        return self.watermark_ms - step.kept_from_ms <= self.window_ms

    def kept_steps(self, user: User) -> Iterator[Step]:
        """Newest first."""
        return islice((s for s in reversed(user.steps) if self.is_kept(s)), STEPS_PER_USER)

    def causes(self, user: User) -> Iterator[Step]:
        """The same, for a deed; counted where that ends in vain and there are more."""
        yield from self.kept_steps(user)
        self.counters["searches_cut_short"] += sum(map(self.is_kept, user.steps)) > STEPS_PER_USER

    def credit(self, step: Step, k: int, deed: Deed) -> None:
        """Give a deed's reward to a slot: in place, and as an amendment where the transition is out already."""
        slot = step.slots[k]
        self.add_reward(step, k, deed.reward, deed.event)
        if deed.name in slot.counts:
            slot.counts[deed.name] += 1
            self.retry_take_backs(step.user, deed)
        if deed.name in TAKES_BACK:
            slot.counts[TAKES_BACK[deed.name]] -= 1

    def add_reward(self, step: Step, k: int, reward: float, event: int) -> None:
        """Whatever comes after the transition is out amends it. event: the offset of what earned it."""
        step.slots[k].reward += reward
        if self.out.credits is not None and reward != 0:
            self.out.credits.append(Credit(event, step.offset, k, reward, not step.open))
        if not step.open and reward != 0:
            self.counters["amendments"] += 1
            self.out.amendments.append((self.partition, step.offset, k, reward))

    # --- decisions ----------------------------------------------------------------------------------------

    def take_decision(self, row: Row) -> None:
        """Opens a step, which completes the user's open ones; then takes what had overtaken it."""
        user = self.user(row)
        newest = list(reversed(row.history))[: self.settings.history_length]
        entries = [Entry(s.item, CODES.get(s.name, OTHER), s.timestamp_ms, s.value) for s in newest]
        state = self.state_of(entries, row)
        self.complete_open(user, state)
        slots = [Slot(line.item, line.propensity) for line in row.lines]
        step = Step(user, row.id, row.timestamp_ms, row.policy_version, slots, state, self.watermark_ms)
        self.keep(step)
        user.open_decision = step
        self.hasten_timer(user)
        self.meet_waits(user, step)
        self.take_over_organic(user, step)

    def state_of(self, newest_first: Iterable[Entry], row: Row) -> State:
        """The history before this record, as the network sees it."""
        rows = tuple(
            (e.item, e.name, float(np.float32(max(0, row.timestamp_ms - e.timestamp_ms) / 1000)),
             float(np.float32(e.value)))
            for e in newest_first
        )  # fmt: skip
        return State(row.offset, row.timestamp_ms, rows)

    def meet_waits(self, user: User, step: Step) -> None:
        """Events that waited for this decision get their slot, or fall through."""
        for wait in [w for w in user.waiting if w.recommendation == step.id]:
            self.end_wait(wait)
            self.counters["overtaken"] += len(wait.deeds)
            rest = [d for d in wait.deeds if not self.attribute_by_id(step, d, wait.timestamp_ms)]
            self.fall_through(user, rest, wait.timestamp_ms, wait.state, waited=True)

    def take_over_organic(self, user: User, step: Step) -> None:
        """Organic steps that this late decision explains give their reward to it; they stay, with what is left."""
        for other in self.kept_steps(user):
            ahead_ms = other.timestamp_ms - step.timestamp_ms
            if not (other.organic and 0 <= ahead_ms <= self.wait_ms):
                continue
            for k, slot in enumerate(other.slots):
                mine = step.slot_of(slot.item)
                if mine is None or (slot.reward == 0 and not any(slot.counts.values())):
                    continue
                self.counters["rewards_moved"] += 1
                reward = slot.reward
                self.add_reward(other, k, -reward, other.offset)
                self.add_reward(step, mine, reward, other.offset)
                for name, count in slot.counts.items():
                    step.slots[mine].counts[name] += count
                    slot.counts[name] = 0

    # --- events -------------------------------------------------------------------------------------------

    def take_event(self, row: Row) -> None:
        """Its deeds find their causes, then it enters the history."""
        user = self.user(row)
        state = self.state_of(reversed(user.history), row)
        deeds = [self.deed(row, line) for line in row.lines]
        forward = [d for d in deeds if d.name not in TAKES_BACK and self.matters(d)]
        self.attribute(user, row, forward, state)
        for deed in deeds:
            if deed.name in TAKES_BACK:
                self.take_back(user, row, deed, state)
        if row.name in HISTORY_NAMES:
            for line in row.lines:
                user.history.append(Entry(line.item, CODES[row.name], row.timestamp_ms, value_of(row, line)))

    def deed(self, row: Row, line: Line) -> Deed:
        """What was done to this item, and what that earns."""
        reward = self.settings.rewards.reward(row.name, value_of(row, line))
        return Deed(line.item, row.name, reward, row.offset)

    def matters(self, deed: Deed) -> bool:
        """Whether there is anything to attribute."""
        return deed.reward != 0 or deed.name in ACTION_NAMES or deed.name in TAKES_BACK.values()

    def attribute(self, user: User, row: Row, deeds: list[Deed], state: State) -> None:
        """By recommendation_id, else by item, else as an organic step; or wait for the decision named."""
        if not deeds:
            return
        if row.recommendation:
            cause = next((s for s in self.causes(user) if s.id == row.recommendation), None)
            if cause is None and self.wait(user, row, deeds, state, row.recommendation):
                return
            if cause is not None:
                deeds = [d for d in deeds if not self.attribute_by_id(cause, d, row.timestamp_ms)]
        self.fall_through(user, deeds, row.timestamp_ms, state, waited=False)

    def attribute_by_id(self, step: Step, deed: Deed, timestamp_ms: int) -> bool:
        """Credit the slot of this step that showed the item, if there is one and it is not too late."""
        k = step.slot_of(deed.item) if deed.item else None
        if k is None or timestamp_ms - step.timestamp_ms > self.window_ms:
            return False
        self.counters["attributed_by_id"] += 1
        self.credit(step, k, deed)
        return True

    def fall_through(
        self, user: User, deeds: list[Deed], timestamp_ms: int, state: State, *, waited: bool
    ) -> None:
        """Attribute each deed by its item; what no step explains may be an organic step of its own."""
        unexplained = []
        for deed in deeds:
            if self.attribute_by_item(user, deed, timestamp_ms):
                self.counters["attributed_by_item"] += 1
            elif deed.item and (deed.name in ACTION_NAMES or deed.reward > 0):
                unexplained.append(deed)
            else:
                self.counters["unattributed"] += 1
        if unexplained:
            self.open_organic(user, unexplained, timestamp_ms, state, waited=waited)

    def attribute_by_item(self, user: User, deed: Deed, timestamp_ms: int) -> bool:
        """Credit the newest slot that explains it."""
        for step in self.causes(user) if deed.item else ():
            k = step.slot_of(deed.item)
            if k is None or not 0 <= timestamp_ms - step.timestamp_ms <= self.window_ms:
                continue
            if step.organic and deed.name in ACTION_NAMES:
                continue  # going there again is a new move
            self.credit(step, k, deed)
            return True
        return False

    def open_organic(
        self, user: User, deeds: list[Deed], timestamp_ms: int, state: State, *, waited: bool
    ) -> None:
        """The user went somewhere unaided. Completes the open organic step, and leaves an open decision open."""
        self.counters["organic_steps"] += 1
        slots = [Slot(item, float("nan")) for item in dict.fromkeys(d.item for d in deeds)]
        step = Step(user, "", timestamp_ms, -1, slots, state, self.watermark_ms)
        if not (waited and self.later_open(user, step)):
            self.complete(user.open_organic, state)
        self.keep(step)
        later = self.later_open(user, step) if waited else []
        if not later:
            user.open_organic = step
            user.touched_ms = max(user.touched_ms, self.watermark_ms)
            self.hasten_timer(user)
        for deed in deeds:
            k = step.slot_of(deed.item)
            assert k is not None
            self.credit(step, k, deed)
        if later:
            self.complete(step, later[0].state)

    def later_open(self, user: User, step: Step) -> list[Step]:
        """What the user has open that came after the step's event, in log order."""
        opened = [
            s for s in (user.open_organic, user.open_decision) if s is not None and s.offset > step.offset
        ]
        return sorted(opened, key=lambda s: s.offset)

    # --- taking back --------------------------------------------------------------------------------------

    def take_back(self, user: User, row: Row, deed: Deed, state: State) -> None:
        """A refund goes to the newest slot with a purchase to take back; else it waits for one."""
        if self.find_taken(user, deed, row.timestamp_ms):
            self.counters["attributed_by_item"] += 1
        elif not deed.item or not self.wait(user, row, [deed], state, ""):
            self.counters["unattributed"] += 1

    def find_taken(self, user: User, deed: Deed, timestamp_ms: int) -> bool:
        """Credit the newest slot that has a purchase (or an add_to_cart) to take back."""
        for step in self.causes(user) if deed.item else ():
            k = step.slot_of(deed.item)
            if k is None or timestamp_ms - step.timestamp_ms > self.window_ms:
                continue
            if step.slots[k].counts[TAKES_BACK[deed.name]] > 0:
                self.credit(step, k, deed)
                return True
        return False

    def retry_take_backs(self, user: User, done: Deed) -> None:
        """A purchase was counted: the first refund that waits for one like it may find it now."""
        for wait in user.waiting:
            deed = wait.deeds[0]
            if not wait.recommendation and deed.item == done.item and TAKES_BACK[deed.name] == done.name:
                if self.find_taken(user, deed, wait.timestamp_ms):
                    self.end_wait(wait)
                    self.counters["overtaken"] += 1
                    self.counters["attributed_by_item"] += 1
                return

    # --- waiting ------------------------------------------------------------------------------------------

    def wait(self, user: User, row: Row, deeds: list[Deed], state: State, recommendation: Id) -> bool:
        """Let these deeds wait together; False if too many wait already."""
        mine = sum(len(w.deeds) for w in user.waiting)
        everyone = self.deeds_waiting
        if mine + len(deeds) > WAITS_PER_USER or everyone + len(deeds) > self.settings.max_waits:
            self.counters["waits_refused"] += len(deeds)
            return False
        wait = Wait(user, row.offset, row.timestamp_ms, recommendation, deeds, state, self.wait_due_s())
        self.waits[wait] = None
        self.deeds_waiting += len(deeds)
        user.waiting.append(wait)
        return True

    def drop_wait(self, wait: Wait) -> None:
        """The partition waits no longer."""
        del self.waits[wait]
        self.deeds_waiting -= len(wait.deeds)

    def end_wait(self, wait: Wait) -> None:
        """Neither does the user."""
        self.drop_wait(wait)
        wait.user.waiting.remove(wait)

    def expire_wait(self, wait: Wait) -> None:
        """It waited in vain: its deeds go on without their decision, a refund goes nowhere."""
        self.end_wait(wait)
        self.counters["waits_expired"] += len(wait.deeds)
        if wait.recommendation:
            self.fall_through(wait.user, wait.deeds, wait.timestamp_ms, wait.state, waited=True)
        else:
            self.counters["unattributed"] += len(wait.deeds)


def value_of(row: Row, line: Line) -> float:
    """price x quantity; the item's share of the event's value where it has no price; 0 where neither is known."""
    if line.price == line.price:
        return line.price * line.quantity
    return row.value / len(row.lines) if row.value == row.value else 0.0


class PlainJoiner:
    """Many partitions; their states never touch."""

    def __init__(self, settings: JoinSettings, partitions: Iterable[int]) -> None:
        self.out = Output()
        self.partitions: Mapping[int, PlainPartition] = {
            p: PlainPartition(p, settings, self.out) for p in partitions
        }

    def push(self, rows: Iterable[Row]) -> None:
        """Records, each partition's in log order; see `out` for what they gave."""
        for row in rows:
            self.partitions[row.partition].take(row)

    def advance(self, partition: int, watermark_ms: int) -> None:
        """See PlainPartition."""
        self.partitions[partition].advance(watermark_ms)

    def counters(self) -> dict[str, int]:
        """See COUNTERS."""
        return {name: sum(p.counters[name] for p in self.partitions.values()) for name in COUNTERS}
