"""The compiled joiner against its reference, on random streams: duplicates, disorder, late, missing, restarts."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streaming.columns import Kind
from streaming.joiner import Joiner, JoinSettings
from streaming.plain_joiner import Output, PlainJoiner
from streaming.rewards import RewardTable
from tests.joins import DEEP, float32, output, same
from tests.rows import Line, Row, Seen, bad, columns, ms

NAMES = (
    "select_item", "view_item", "add_to_cart", "remove_from_cart", "purchase", "refund", "add_to_wishlist", "search",
    "our_own_name",
)  # fmt: skip
VALUED = RewardTable.parse(
    "view_item=0,select_item=1,add_to_cart=0.5,remove_from_cart=-0.5,purchase=3+0.25*value,refund=-3+-0.25*value"
)


def join_settings(pick: random.Random) -> JoinSettings:
    """Small bounds, so that short streams meet them all."""
    return JoinSettings(
        rewards=pick.choice([RewardTable(), VALUED]),
        gamma=0.5,
        horizon=pick.choice(["session", "session", "user"]),
        session_gap_s=100,
        attribution_window_s=pick.choice([60, 300, 2000]),
        overtake_wait_s=pick.choice([0, 30, 200]),
        dedup_window_s=pick.choice([50, 1000]),
        late_after_s=pick.choice([0, 40, 400, 4000]),
        watermark_delay_s=pick.choice([0, 5]),
        max_jump_s=pick.choice([50, 600, 3600]),
        history_length=pick.choice([1, 3]),
        user_ttl_s=pick.choice([100, 700]),
        max_users=pick.choice([8, 100]),
        max_steps=pick.choice([128, 1000]),
        max_waits=pick.choice([0, 2, 100]),
        max_ids=pick.choice([3, 1000]),
    )


class Stream:
    """Random records in log order; what is likely is drawn anew for each stream."""

    def __init__(self, pick: random.Random, partitions: int) -> None:
        self.pick, self.partitions = pick, partitions
        self.at = dict.fromkeys(range(partitions), 0.0)
        self.ends = dict.fromkeys(range(partitions), 0)
        self.sent: list[Row] = []
        self.made: list[Row] = []  # decisions, some of which are still to come
        self.held: list[Row] = []
        self.users = [f"user{i}" for i in range(pick.choice([1, 2, 4, 12, 30]))]
        self.ids = pick.choice([3, 1000, 10**6])
        self.items = pick.choice([2, 6])
        self.pace_s = pick.choice([0.5, 5, 40])
        self.jitter_s = pick.choice([0, 10, 60])
        self.events = pick.choice([0.3, 0.7, 0.95])  # share of events among records
        self.faithful = pick.choice(
            [0.0, 0.5, 0.9]
        )  # share of events that name a decision, and an item in it
        self.overtaking = pick.choice([0.0, 0.2])  # share of decisions that come later than made
        self.oddities = pick.choice([0.0, 0.03, 0.3])
        self.stamps = pick.choice(
            ["none", "logs", "producers", "either"]
        )  # what the log says of when a record came

    def row(self) -> Row:
        """The next record, at its place."""
        pick = self.pick
        if self.held and pick.random() < 0.3:
            row = self.held.pop(pick.randrange(len(self.held)))
        else:
            partition = pick.randrange(self.partitions)
            row = self.odd(partition) if pick.random() < self.oddities else self.plain(partition)
            if row.kind == Kind.DECISION:
                self.made.append(row)
                if pick.random() < self.overtaking:
                    self.held.append(row)
                    return self.row()
        offset = self.ends[row.partition] + (pick.randrange(3) if pick.random() < 0.1 else 0)
        row = replace(row, offset=offset, logged_ms=self.logged_ms(row))
        self.ends[row.partition] = row.offset + 1
        self.sent.append(row)
        return row

    def logged_ms(self, row: Row) -> int:
        """By the log's clock, which is right, or by the producer's, which is as wrong as the record's time."""
        by_log = ms(self.at[row.partition])
        stamps = {"none": 0, "logs": by_log, "producers": row.timestamp_ms}
        return stamps[self.pick.choice(list(stamps)) if self.stamps == "either" else self.stamps]

    def odd(self, partition: int) -> Row:
        """A duplicate, garbage, a wild clock, for one record or for all from now on, or a pause."""
        pick = self.pick
        match pick.randrange(5):
            case 4:
                self.at[partition] += pick.choice([-5000, -700, 700, 5000])
                return self.plain(partition)
            case 0 if self.sent:  # perhaps in another partition
                return replace(pick.choice(self.sent[-40:]), partition=partition)
            case 1:
                return bad(partition)
            case 2:
                return self.plain(partition, pick.choice([-3000, -500, 300, 900, 5000, 10**6]))
        self.at[partition] += pick.choice([99, 100, 101, 300, 700])
        return self.plain(partition)

    def plain(self, partition: int, off_s: float = 0) -> Row:
        """An event or a decision, at about the partition's time."""
        pick = self.pick
        self.at[partition] += round(pick.expovariate(1) * self.pace_s, 3)
        at = self.at[partition] - pick.random() * self.jitter_s + off_s
        row = Row(
            Kind.EVENT, f"e{pick.randrange(10**6)}", pick.choice(self.users), ms(at), partition=partition,
            misplaced=pick.random() < 0.05,
        )  # fmt: skip
        if pick.random() >= self.events:
            return self.decided(row)
        row = replace(
            row,
            name=pick.choice(NAMES),
            lines=self.lines(pick.choice([0, 1, 1, 2, 4])),
            value=pick.choice([float("nan"), 8.0]),
        )
        if self.made and pick.random() < self.faithful:
            cause = pick.choice(self.made[-8:])
            lines = tuple(replace(line, item=pick.choice(cause.lines).item) for line in row.lines)
            named = cause.id if pick.random() < 0.7 else ""
            return replace(row, user=cause.user, partition=cause.partition, lines=lines, recommendation=named)
        return replace(row, recommendation=self.recommendation() if pick.random() < 0.3 else "")

    def decided(self, row: Row) -> Row:
        pick = self.pick
        slate = pick.sample(range(self.items + 1), pick.randint(1, self.items))
        history = tuple(
            Seen(
                pick.randrange(self.items + 1),
                pick.choice(NAMES),
                row.timestamp_ms - pick.randrange(-5, 99),
                0.5,
            )
            for _ in range(pick.randrange(5))
        )
        return replace(
            row, kind=Kind.DECISION, id=self.recommendation(), lines=tuple(Line(i, propensity=0.25) for i in slate),
            history=history, policy_version=pick.randrange(9),
        )  # fmt: skip

    def lines(self, count: int) -> tuple[Line, ...]:
        pick = self.pick
        return tuple(
            Line(
                pick.randrange(self.items + 1), pick.choice([0, 1, 3]), pick.choice([float("nan"), 2.0, 10.0])
            )
            for _ in range(count)
        )

    def recommendation(self) -> str:
        return f"r{self.pick.randrange(self.ids)}"


def of_partition(given: Output, partition: int) -> tuple[list[Any], list[Any], list[Any]]:
    """One partition's output in order, rounded as columns are; amendments that meet in one place stay apart."""
    return (
        [t._replace(reward=float32(t.reward)) for t in given.transitions if t.partition == partition],
        [(p, o, s, float32(r)) for p, o, s, r in given.amendments if p == partition],
        [late for late in given.late if late[0] == partition],
    )


def compare(seed: int, length: int, partitions: int) -> None:
    """One random stream, pushed in random pieces with restarts and advances in between."""
    pick = random.Random(seed)
    chosen = join_settings(pick)
    stream = Stream(pick, partitions)
    joiner, reference = Joiner(chosen, range(partitions)), PlainJoiner(chosen, range(partitions))
    got = Output()

    def take(given: Output) -> None:
        got.transitions += given.transitions
        got.amendments += given.amendments
        got.late += given.late

    while length > 0:
        rows = [stream.row() for _ in range(min(length, pick.choice([1, 1, 3, 20, 200])))]
        length -= len(rows)
        reference.push(rows)
        take(output(joiner.push(columns(rows)), rows))
        if pick.random() < 0.1:
            partition = pick.randrange(partitions)
            until = ms(stream.at[partition] + pick.choice([-50, 0, 7, 101, 800]))
            reference.advance(partition, until)
            take(output(joiner.advance(partition, until)))
        if pick.random() < 0.1:
            fresh = Joiner(chosen)
            for partition in pick.sample(range(partitions), partitions):
                fresh.restore(partition, joiner.state(partition))
            joiner = fresh
        for partition in range(partitions):
            expected, seen = of_partition(reference.out, partition), of_partition(got, partition)
            for mine, theirs in zip(seen, expected, strict=True):
                assert same(mine, theirs)
            theirs_ms = reference.partitions[partition].watermark_ms
            assert joiner.watermark_ms(partition) in (theirs_ms, None)
        assert joiner.counters() == reference.counters()
        assert joiner.users() == sum(len(p.users) for p in reference.partitions.values())
        for output_ in (got, reference.out):
            output_.transitions, output_.amendments, output_.late = [], [], []


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 3))
@settings(max_examples=300 * DEEP, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_short_streams_give_what_the_reference_gives(seed, length, partitions):
    compare(seed, length, partitions)


@pytest.mark.parametrize("seed", range(40 * DEEP))
def test_long_streams_give_what_the_reference_gives(seed):
    compare(1000 + seed, 1500, 1 + seed % 3)
