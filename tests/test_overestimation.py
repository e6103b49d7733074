"""Returns are those of the visits, of slots that were shown and whose visits are over; nothing is learnt meanwhile."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import overestimation
from benchmarks.learning import LoopSettings
from learner.agent_settings import AgentSettings
from learner.replay import Replay
from simulator.shop import Shop, ShopSettings
from streaming.columns import Kind
from streaming.join_settings import JoinSettings
from streaming.joiner import Joiner
from streaming.rewards import RewardTable
from tests.rows import columns, decision, event, logged

GAMMA = 0.9
CLICK = RewardTable.parse("select_item=1.5")
RETURNS = {3: 1.5 + GAMMA * 1.5, 4: GAMMA * 1.5, 5: 0.0, 6: 1.5}
HOUR = 3600.0


def visits(users: int, at: float):
    """Two slates each, one click on either; an unaided view before, of an item that must not be counted."""
    rows = []
    for k in range(users):
        user, start = f"user {k}", at + 200.0 * k
        rows += [
            event("view_item", 8, at=start, user=user),
            decision(f"first {at} {k}", 3, 4, at=start + 20, user=user),
            event("select_item", 3, at=start + 30, user=user, recommendation=f"first {at} {k}"),
            decision(f"second {at} {k}", 5, 6, at=start + 60, user=user),
            event("select_item", 6, at=start + 70, user=user, recommendation=f"second {at} {k}"),
        ]
    return rows


def test_a_perfect_q_is_found_to_be_perfect(monkeypatch):
    joiner = Joiner(JoinSettings(rewards=CLICK, gamma=GAMMA, history_length=4), partitions=[0])
    watch = Replay(1000, 4, prioritised=False)
    watch.insert(joiner.push(columns(logged(visits(50, 0.0)))))
    # over for good once a stranger comes much later, whose own visit is not: its slates have no return yet
    stranger = [decision(f"last {k}", 9, 9, at=30 * HOUR + 60 * k, user="stranger") for k in range(3)]
    late = columns(logged(stranger))
    late.offset[:] += 250  # the same log
    watch.insert(joiner.push(late))
    shown = watch.inserted
    monkeypatch.setattr(
        overestimation,
        "q_of",
        lambda _, batch: np.array([RETURNS.get(int(a), math.nan) for a in batch.action]),
    )
    loop = SimpleNamespace(agent=SimpleNamespace(settings=SimpleNamespace(gamma=GAMMA)))
    found = overestimation.compare(loop, watch, shown, np.random.default_rng(0))
    assert found["slots"] > 50
    assert found["ratio"] == pytest.approx(1.0)
    assert found["slope"] == pytest.approx(1.0)
    assert found["mean_return"] == pytest.approx(np.mean(list(RETURNS.values())), rel=0.2)
    none = overestimation.compare(loop, watch, shown // 2, np.random.default_rng(0))
    assert 0 < none["slots"] < found["slots"]  # of the first half of the rows alone


def small(monkeypatch, **mind):
    """Looks are at a small shop."""
    settings = ShopSettings(items=100, shoppers=100, mind=replace(ShopSettings().mind, **mind))
    monkeypatch.setattr(overestimation, "ShopSettings", lambda: settings)


class Told(overestimation.Watched):
    """What each slot will earn, by the shop's own word."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.earns = {}

    def turn(self):
        turn, outcome = super().turn()
        decisions = self.columns.offset[self.columns.kind == Kind.DECISION].tolist()
        self.earns |= dict(zip(decisions, outcome.reward, strict=True))
        return turn, outcome


def test_returns_hold_the_purchases_and_refunds_that_come_hours_later(monkeypatch):
    small(monkeypatch, base=-1.0, cart=2.0, buy=2.0, refund=0.0, refund_bait=0.0)
    monkeypatch.setattr(overestimation, "Watched", Told)
    seen = []

    def compare(loop, watch, shown, _):
        there = watch.contents()
        rows = np.flatnonzero(~there.organic[:shown])
        told = [loop.earns[there.offset[row]][there.slot[row]] for row in rows]
        seen.append((there.reward[rows], np.array(told)))
        return {}

    monkeypatch.setattr(overestimation, "compare", compare)
    overestimation.look(1, [50], 250, [])
    ((kept, told),) = seen
    assert len(kept) > 500
    assert (told > 5).sum() > 20  # bought
    # views count a little, too, also those that shoppers made unaided, of which the shop does not tell
    assert (kept > told - 1e-3).all()
    assert (kept < told + 1.5).all()


def test_a_loop_goes_on_as_if_nobody_had_looked_and_what_looks_learns_nothing(monkeypatch):
    small(monkeypatch)
    updates = []

    def compare(loop, watch, shown, _):
        updates.append(loop.agent.updates)
        assert watch.inserted > shown > 0
        return {}

    monkeypatch.setattr(overestimation, "compare", compare)
    monkeypatch.setattr(overestimation, "CAUSE_MS", 0)
    overestimation.look(1, [250, 350], 50, [])
    overestimation.look(1, [350], 50, [])
    assert 0 < updates[0] < updates[1] == updates[2]


def test_q_is_that_of_the_network_that_serves():
    agent = AgentSettings()
    loop = overestimation.Watched(Shop(ShopSettings(items=100, shoppers=300), 1), agent, LoopSettings(), 1)
    loop.serve(600)
    loop.watch = Replay(1 << 16, agent.entries, prioritised=False)
    loop.serve(300)
    with torch.no_grad():
        loop.agent.target.position.fill_(
            -50.0
        )  # whoever looks further down than the first place chooses nothing
    batch = loop.watch.sample(200, np.random.default_rng(0), n_step=overestimation.LONGEST, gamma=agent.gamma)
    policy, first = loop.policy(), batch.slot == 0
    served = policy.q(batch.state)[np.arange(200), batch.action]
    found = overestimation.q_of(loop, batch)
    assert 10 < first.sum() < 100
    assert found[first] == pytest.approx(served[first], abs=1e-4)
    assert (found[~first] < served[~first] - 1e-3).all()
