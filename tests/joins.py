"""What a joiner gives, as people read it: lists of the reference's records, and rewards by identity."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from streaming.joiner import Joiner, JoinSettings
from streaming.plain_joiner import Output, State, Transition
from streaming.transitions import Joined, States
from tests.rows import Row, columns

DEEP = int(os.environ.get("DEEP", "1"))  # times as many random examples

Identity = tuple[int, int, int]  # partition, offset, slot


def states(given: States) -> list[State]:
    """The rows without their padding; fails where something follows padding."""
    unpacked = []
    for i in range(len(given.offset)):
        there = (given.item[i] != 0) | (given.name[i] != 0)
        length = int(there.sum())
        assert there[:length].all()
        assert not given.age_s[i, length:].any()
        assert not given.value[i, length:].any()
        rows = zip(given.item[i], given.name[i], given.age_s[i], given.value[i], strict=True)
        entries = tuple((int(a), int(b), float(c), float(d)) for a, b, c, d in list(rows)[:length])
        unpacked.append(State(int(given.offset[i]), int(given.timestamp_ms[i]), entries))
    return unpacked


def output(joined: Joined, rows: Sequence[Row] = ()) -> Output:
    """The same as the reference's output; rows: what was pushed."""
    t, a = joined.transitions, joined.amendments
    known = states(joined.states)
    transitions = [
        Transition(
            int(t.partition[i]), int(t.offset[i]), int(t.slot[i]), known[t.state[i]],
            known[t.next_state[i]] if t.next_state[i] >= 0 else None, int(t.action[i]), float(t.reward[i]),
            float(t.discount[i]), float(t.propensity[i]), bool(t.organic[i]), int(t.policy_version[i]),
        )
        for i in range(len(t.offset))
    ]  # fmt: skip
    amendments = [
        (int(p), int(o), int(s), float(r))
        for p, o, s, r in zip(a.partition, a.offset, a.slot, a.reward, strict=True)
    ]
    return Output(transitions, amendments, [(rows[i].partition, rows[i].offset) for i in joined.late.row])


@dataclass
class Learner:
    """Takes what a joiner gives as replay would: a transition once, amendments in place."""

    settings: JoinSettings = field(default_factory=JoinSettings)
    partitions: Iterable[int] = (0,)
    transitions: dict[Identity, Transition] = field(default_factory=dict)
    rewards: dict[Identity, float] = field(default_factory=dict)
    late: list[tuple[int, int]] = field(default_factory=list)
    amended: int = 0
    ends: dict[int, int] = field(default_factory=dict)  # next offset of each partition

    def __post_init__(self) -> None:
        self.joiner = Joiner(self.settings, self.partitions)

    def push(self, *rows: Row) -> Learner:
        """Log these records next, all in one push."""
        placed = []
        for row in rows:
            placed.append(replace(row, offset=self.ends.get(row.partition, 0)))
            self.ends[row.partition] = placed[-1].offset + 1
        return self.take(output(self.joiner.push(columns(placed)), placed))

    def advance(self, watermark_ms: int, partition: int = 0) -> Learner:
        """Let event time pass without a record."""
        return self.take(output(self.joiner.advance(partition, watermark_ms)))

    def take(self, given: Output) -> Learner:
        """Apply transitions first, then amendments."""
        for transition in given.transitions:
            identity = transition[:3]
            assert identity not in self.transitions, f"{identity} came twice"
            self.transitions[identity] = transition
            self.rewards[identity] = transition.reward
        for *identity, reward in given.amendments:
            assert reward != 0
            self.rewards[tuple(identity)] += reward
            self.amended += 1
        self.late += given.late
        return self

    def restarted(self, *lacks: str) -> Learner:
        """Die, and go on from a checkpoint in a new process. lacks: what it does not know of the clock."""
        fresh = Joiner(self.settings)
        for partition in self.joiner.partitions:
            state = self.joiner.state(partition)
            for name in lacks:
                del state[f"clock.{name}"]
            fresh.restore(partition, state)
        self.joiner = fresh
        return self

    def count(self, name: str) -> int:
        """One of the joiner's counters."""
        return self.joiner.counters()[name]

    def reward(self, offset: int, slot: int = 0, partition: int = 0) -> float:
        """Earned so far by a transition that is out, to 5 digits."""
        return round(self.rewards[partition, offset, slot], 5)

    def reward_of(self, offset: int, partition: int = 0) -> list[float]:
        """Earned by each slot of a step that is out, first slot first."""
        slots = sorted(s for p, o, s in self.rewards if (p, o) == (partition, offset))
        assert slots == list(range(len(slots)))
        return [self.reward(offset, slot, partition) for slot in slots]

    def discount(self, offset: int, partition: int = 0) -> float:
        """Of a step that is out."""
        return round(self.transitions[partition, offset, 0].discount, 5)

    def next_offset(self, offset: int, partition: int = 0) -> int | None:
        """The step that follows a step that is out; None: the session ended."""
        following = self.transitions[partition, offset, 0].next_state
        return None if following is None else following.offset

    def offsets(self, partition: int = 0) -> list[int]:
        """Steps that are out, by the record that opened them."""
        return sorted({o for p, o, _ in self.transitions if p == partition})

    def organic(self, partition: int = 0) -> list[int]:
        """Those of them that are organic."""
        return sorted({t.offset for t in self.transitions.values() if t.organic and t.partition == partition})


def same(a: Sequence[object], b: Sequence[object]) -> bool:
    """Equality where NaN equals itself."""
    return repr(a) == repr(b)


def float32(x: float) -> float:
    """Rounded as the columns round."""
    return float(np.float32(x))
