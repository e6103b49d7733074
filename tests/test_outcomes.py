"""What decisions earned in the end: the very rewards that a learner has in replay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from learner.outcomes import Outcomes
from learner.reward_model import DRAWN, RIDGE, RewardModel
from streaming.columns import Columns, Kind
from streaming.join_settings import JoinSettings
from tests.rows import columns, decision, event, logged
from tests.test_audit import AGENT, JOIN, PARTITIONS, new_learner, records
from tests.test_audit import shop as shop  # a fixture

DAY_S = 86_400


def outcomes(*rows, join: JoinSettings | None = None) -> tuple[Outcomes, Columns]:
    """Of these records, all in one push."""
    batch = columns(logged(rows))
    made = Outcomes(join or JoinSettings(), {0: 0})
    made.take(batch)
    made.end()
    return made, batch


def earned(*rows, slots=2, **more):
    """Of each decision among these records, what its slots earned."""
    made, batch = outcomes(*rows, **more)
    which = np.flatnonzero(batch.kind == Kind.DECISION)
    return made.rewards(batch, which, slots).tolist()


def test_rewards_are_those_that_the_learner_has_in_replay(shop):
    learner = new_learner()
    learner.assign(dict.fromkeys(PARTITIONS, 0))
    batch = records(shop)
    taken = learner.take(batch)
    made = Outcomes(replace(JOIN, gamma=AGENT.gamma), dict.fromkeys(PARTITIONS, 0))
    made.take(taken.columns)
    made.end()
    rows = np.flatnonzero(taken.columns.kind == Kind.DECISION)
    assert made.counts(taken.columns, rows).all()
    found = made.rewards(taken.columns, rows, 4)
    place = {
        (int(taken.columns.partition[row]), int(taken.columns.offset[row])): i for i, row in enumerate(rows)
    }
    held = learner.replay.contents()
    decided = np.flatnonzero(~held.organic)
    pairs = [
        (found[place[int(held.partition[i]), int(held.offset[i])], held.slot[i]], held.reward[i])
        for i in decided.tolist()
    ]
    assert len(pairs) > 1000
    assert np.allclose(*zip(*pairs, strict=True), atol=1e-5)
    assert sum(mine for mine, _ in pairs) > 50


def test_a_purchase_after_other_decisions_still_counts_and_a_refund_takes_it_back():
    shown = decision("r1", 1, 2, at=0)
    later = decision("r2", 3, 4, at=60)
    click = event("select_item", 2, at=5, recommendation="r1")
    bought = event("purchase", 2, at=DAY_S - 60, recommendation="r1")
    assert earned(shown, click, later, bought) == [[0.0, 11.0], [0.0, 0.0]]
    back = event("refund", 2, at=DAY_S - 30, recommendation="r1")
    assert earned(shown, click, later, bought, back) == [[0.0, 1.0], [0.0, 0.0]]


def test_what_is_still_open_at_the_end_counts_as_it_stands():
    assert earned(decision("r1", 1, at=0), event("select_item", 1, at=5, recommendation="r1")) == [[1.0, 0.0]]


def test_a_decision_counts_once_and_a_late_one_not_at_all():
    made, batch = outcomes(
        decision("r1", 1, at=10_000),
        decision("r1", 1, at=10_000),
        decision("r2", 2, at=0),
        decision("r3", 3, at=10_000),
        join=JoinSettings(late_after_s=600),
    )
    assert made.counts(batch, np.arange(4)).tolist() == [True, False, False, True]


def test_a_decision_younger_than_the_window_may_yet_earn_more():
    join = JoinSettings(attribution_window_s=600)
    made, batch = outcomes(decision("r1", 1, at=0), decision("r2", 1, at=900), join=join)
    assert made.unsettled(batch, np.arange(2)).tolist() == [False, True]


def test_rewards_that_come_in_any_number_of_pushes_add_up(monkeypatch):
    monkeypatch.setattr("learner.outcomes._WAITING", 3)
    rows = [decision(f"r{n}", 1, 2, at=n) for n in range(30)]
    rows += [event("add_to_cart", 2, at=100 + n, recommendation=f"r{n % 30}") for n in range(90)]
    placed = logged(rows)
    made = Outcomes(JoinSettings(), {0: 0})
    for start in range(0, len(placed), 7):
        made.take(columns(placed[start : start + 7]))
    made.end()
    batch = columns(placed)
    assert made.rewards(batch, np.arange(30), 2).tolist() == [[0.0, 6.0]] * 30


def test_a_log_whose_beginning_is_gone_costs_no_room_for_it():
    rows = [replace(row, offset=10**12 + i) for i, row in enumerate([decision("r1", 1, at=0)])]
    made = Outcomes(JoinSettings(), {0: 10**12})
    made.take(columns(rows))
    made.end()
    assert made.counts(columns(rows), np.arange(1)).tolist() == [True]
    assert made.counts(columns([replace(rows[0], offset=3)]), np.arange(1)).tolist() == [False]


# --- the reward model ----------------------------------------------------------------------------------------


def test_the_model_is_the_ridge_regression_on_all_that_it_was_shown():
    rng = np.random.default_rng(0)
    model, rows, earned_by = RewardModel(2), [], []
    for _ in range(5):
        shown = rng.random((20, 2)) < 0.8
        features, reward = rng.normal(size=(20, 2, 3)), rng.normal(size=(20, 2))
        model.learn(shown, rng.integers(1, 9, (20, 2)), features, reward)
        for t, k in np.argwhere(shown):
            rows.append([k == 0, k == 1, *features[t, k]])
            earned_by.append(reward[t, k])
    x, y = np.array(rows, float), np.array(earned_by)
    wanted = np.linalg.solve(x.T @ x + RIDGE * np.eye(5), x.T @ y)
    found = model.model(8)
    assert [*found.effect, *found.coefficient] == pytest.approx(wanted)


def test_an_items_rate_is_drawn_towards_that_of_all():
    model = RewardModel(1)
    items = np.array([[1]] * 150 + [[2]] * 50)
    model.learn(np.ones((200, 1), bool), items, np.zeros((200, 1, 3)), (items == 1).astype(float))
    mean, rate = 0.75, model.model(3).rate
    assert rate[1] == pytest.approx((150 + DRAWN * mean) / (150 + DRAWN))
    assert rate[2] == pytest.approx(DRAWN * mean / (50 + DRAWN))
    assert rate[[0, 3]].tolist() == [mean, mean]  # nothing known


def test_before_it_has_seen_anything_it_expects_nothing():
    found = RewardModel(2).model(4)
    assert not np.concatenate(found).any()
