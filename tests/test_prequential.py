"""Ranks are right, are made before anything is learnt, and say what rules without learning would have said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.agent import Agent
from learner.agent_settings import AgentSettings
from learner.co_views import CoViews
from learner.entries import StateTensors
from learner.prequential import METHODS, Prequential, half_width, lots
from learner.replay import Replay
from streaming.interning import Vocabulary
from streaming.join_settings import JoinSettings
from streaming.joiner import Joiner
from streaming.transitions import Joined
from tests.rows import Row, columns, decision, event, logged
from tests.test_co_views import PlainCoViews

HISTORY = 8
# no features but the ids: nothing to draw them towards
SETTINGS = AgentSettings(
    dim=8,
    hidden=8,
    history_length=HISTORY,
    vector_dim=1,
    batch_size=64,
    n_step=1,
    weight_decay=1e-4,
    forget=0.02,
)
ITEMS = 30
LOT = lots(ITEMS + 1).tolist()  # what ties go by


def vocabulary(items: int = ITEMS) -> Vocabulary:
    known = Vocabulary()
    known.intern_all([f"item {i}" for i in range(1, items + 1)])
    return known


def agent(items: int = ITEMS) -> Agent:
    made = Agent(SETTINGS, seed=1)
    made.grow(items)
    return made


def joined(rows: Sequence[Row]) -> Joined:
    joiner = Joiner(JoinSettings(history_length=HISTORY), partitions=[0])
    return joiner.push(columns(logged(rows)))


def views(*items: int, user: str = "ann") -> list[Row]:
    """One view a minute; the last one's step stays open."""
    return [event("view_item", item, at=60.0 * i, user=user) for i, item in enumerate(items)]


def ranks(prequential: Prequential, method: str) -> list[int]:
    return prequential.ranked().rank[:, list(METHODS).index(method)].tolist()


def watched(rows: Sequence[Row], **options: Any) -> Prequential:
    prequential = Prequential(vocabulary(), **options)
    prequential.observe(joined(rows), agent())
    return prequential


def test_recent_items_come_newest_first_and_once_each() -> None:
    #                              history of each, newest first: -, 5, 7 5, 5 7 5
    prequential = watched(views(5, 7, 5, 7, 9))
    assert ranks(prequential, "recent")[2:] == [2, 2]


def test_the_rest_follow_by_popularity_and_then_by_lot() -> None:
    prequential = Prequential(vocabulary())
    prequential.observe(joined(views(9, 9, 9, 4, 4, 1, user="bob")), agent())  # 9 three times, 4 twice
    prequential.observe(joined(views(4, 9, 3, 1)), agent())
    others = sorted((set(range(1, ITEMS + 1)) - {9, 4}), key=lambda i: LOT[i])
    #                    no history: 9 4 | 4, then 9 | 9 4, then 3 among the others
    assert ranks(prequential, "recent")[-3:] == [2, 2, 3 + others.index(3)]
    #                    9 4 ... all along: the block is counted when it is over
    assert ranks(prequential, "popularity")[-3:] == [2, 1, 3 + others.index(3)]


def test_the_order_in_which_items_are_told_of_says_nothing_of_what_comes_next() -> None:
    """A catalog that was made of a log is in the order in which its items will be gone to."""
    items = 600
    network = agent(items)
    network.items.category[1:] = 1
    prequential = Prequential(vocabulary(items))
    for first in range(1, items, 20):
        prequential.observe(joined(views(*range(first, first + 20))), network)
    for method in ("popularity", "alike", "recent"):
        beyond = (
            np.array(ranks(prequential, method)) - prequential.ranked().number
        )  # of those not gone to yet
        assert np.mean(beyond <= 20) < 0.3, method
    assert len(set(lots(10**6).tolist())) == 10**6


def test_ranks_equal_a_count_by_hand_on_random_streams() -> None:
    rng = np.random.default_rng(3)
    rows = [event("view_item", int(rng.zipf(1.6) % ITEMS) + 1, at=30.0 * i, user=f"user {rng.integers(6)}")
            for i in range(400)]  # fmt: skip
    network, made = agent(), joined(rows)
    with torch.no_grad():  # heads that disagree, and no ties
        for parameter in network.online.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
        network.items.seen[1:] = True
    prequential = Prequential(vocabulary())
    prequential.observe(made, network)
    visits: Counter[int] = Counter()
    together, table = PlainCoViews(), CoViews()  # walks: see test_co_views
    table.grow(ITEMS + 1)
    expected = []
    transitions, states = made.transitions, made.states
    for t in range(len(transitions.action)):
        row, target = transitions.state[t], int(transitions.action[t])
        if t and t % 256 == 0:
            visits.update(transitions.action[t - 256 : t].tolist())
            for past in range(t - 256, t):
                together.observe(states.item[transitions.state[past]].tolist(), transitions.action[past])
            rows = transitions.state[t - 256 : t]
            table.observe(states.item[rows], transitions.action[t - 256 : t])
        history = [i for i in dict.fromkeys(states.item[row].tolist()) if i]
        state = StateTensors(*(torch.from_numpy(column[row : row + 1].astype(kind)) for column, kind in
                               ((states.item, np.int64), (states.name, np.int64),
                                (states.age_s, np.float32), (states.value, np.float32))))  # fmt: skip
        with torch.no_grad():
            keys = network.online.keys(network.items)
            queries = network.online.queries(state, keys)
            q = network.online.q_all(queries, keys)[0].tolist()
            organic = (queries.organic.vector @ keys.organic.T)[0]
            for weight, item in zip(queries.organic.copy[0], queries.organic.item[0], strict=True):
                organic[item] += weight
        popular = sorted(range(1, ITEMS + 1), key=lambda i: (-visits[i], LOT[i]))
        next_item = sorted(range(1, ITEMS + 1), key=lambda i: -float(organic[i]))
        near = together.scores(states.item[row].tolist(), ITEMS + 1)
        walks = table.walk_scores(states.item[row : row + 1], ITEMS + 1)[0]
        often = 1e-6 / max(1, *visits.values(), 1) * np.array([visits[i] for i in range(ITEMS + 1)])
        near, walks = near + often.astype(np.float32), walks + often.astype(np.float32)
        orders = {
            "co_views": sorted(range(1, ITEMS + 1), key=lambda i: (-near[i], LOT[i])),
            "walks": sorted(range(1, ITEMS + 1), key=lambda i: (-walks[i], LOT[i])),
            "popularity": popular,
            "recent": history + [i for i in popular if i not in history],
            "alike": history[:8] + [i for i in popular if i not in history[:8]],  # no catalog
            "learned_q": sorted(range(1, ITEMS + 1), key=lambda i: -q[i]),
            "learned_next_item": next_item,
            "recent_then_learned": history + [i for i in next_item if i not in history],
        }
        expected.append([orders[method].index(target) + 1 for method in METHODS])
    assert len(expected) > 300
    assert prequential.ranked().rank.tolist() == expected


def test_watching_changes_nothing_in_the_agent() -> None:
    network = agent()
    before = network.state()
    Prequential(vocabulary()).observe(joined(views(1, 2, 3, 4)), network)
    after = network.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_shown_items_count_where_they_earned_something() -> None:
    rows = [
        decision("r1", 11, 12, 13, at=0.0, history=[(4, "view_item", -60.0)]),
        event("select_item", 12, at=5.0, recommendation="r1"),
        decision("r2", 14, 15, at=20.0, history=[(12, "select_item", 5.0), (4, "view_item", -60.0)]),
        decision("r3", 16, at=40.0),
    ]
    prequential = watched(rows)
    assert prequential.report()["steps"] == 1
    others = sorted((set(range(1, ITEMS + 1)) - {4}), key=lambda i: LOT[i])
    assert ranks(prequential, "recent") == [2 + others.index(12)]  # 4 first
    assert prequential.ranked().repeat.tolist() == [False]


def test_too_many_steps_are_thinned_evenly_and_the_share_is_told() -> None:
    prequential = Prequential(vocabulary(), most=10)
    for _ in range(5):
        prequential.observe(joined(views(*range(1, 22))), agent())
    report = prequential.report()
    assert (report["steps"], report["sampled"]) == (100, 1 / 16)
    assert prequential.ranked().number.tolist() == [0, 16, 32, 48, 64, 80, 96]


def test_a_report_tells_kinds_of_steps_apart(tmp_path: Path) -> None:
    rows = [
        *views(1, 2, 1),
        event("add_to_cart", 1, at=130.0),
        event("view_item", 3, at=140.0),
        event("purchase", 3, at=150.0),
        event("view_item", 1, at=160.0),
        event("view_item", 2, at=170.0),
    ]
    prequential = watched(rows)
    prequential.write(tmp_path / "new" / "report.json")
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    counts = {
        name: report[name]["steps"]
        for name in ("all", "with_history", "met", "first_time", "repeat", "carts_or_more", "purchases")
    }
    assert counts == {
        "all": 5,
        "with_history": 4,
        "met": 2,
        "first_time": 3,
        "repeat": 2,
        "carts_or_more": 2,
        "purchases": 1,
    }
    assert [third["steps"] for third in report["thirds"]] == [2, 2, 1]
    assert report["repeat"]["recent"] == {
        "hit_rate_at_20": 1.0,
        "ci95": None,  # it is one visit's
        "mrr_at_20": pytest.approx((1 / 2 + 1 / 2) / 2),  # 2 1 | 3 1 2
        "mrr_ci95": None,
    }


def test_items_of_the_newest_ones_category_come_after_the_users_own_and_its_brand_first() -> None:
    network = agent()
    network.items.category[[3, 4, 5, 6, 7]] = 1
    network.items.brand[[3, 7]] = 1
    network.items.brand[9] = 1  # of another category
    prequential = Prequential(vocabulary())
    targets = {"ann": 7, "bob": 6, "cid": 4, "dan": 9}
    first = joined(
        [event("view_item", 6, at=float(n), user=f"user{n}") for n in range(40)]
        + [event("search", at=3000.0)]
    )
    prequential.observe(first, network)  # 6 is popular
    rows = [event("view_item", 3, at=float(n), user=user) for n, user in enumerate(targets)]
    rows += [
        event("view_item", item, at=60.0 + n, user=user) for n, (user, item) in enumerate(targets.items())
    ]
    rows.append(event("search", at=3000.0))  # the visits are over
    prequential.observe(joined(rows), network)
    found = prequential.ranked().rows(prequential.ranked().known)
    place = found.rank[:, list(METHODS).index("alike")]
    # 3 itself, 7 of its brand, then 6, which is popular, 4 and 5 by lot, and so all others
    others = sorted((set(range(1, ITEMS + 1)) - {3, 4, 5, 6, 7}), key=lambda i: LOT[i])
    assert place.tolist() == [2, 3, 4 + (LOT[5] < LOT[4]), 6 + others.index(9)]


def test_steps_of_one_visit_are_one_witness() -> None:
    rows = [row for n in range(12) for row in views(*range(1, 5), user=f"user{n}")]
    rows.sort(key=lambda row: row.timestamp_ms)
    prequential = watched([*rows, *[event("search", at=3_000.0, user=f"user{n}") for n in range(12)]])
    ranked = prequential.ranked()
    assert np.bincount(ranked.visit).tolist() == [4] * 12
    together = prequential.report()["all"]
    assert together["visits"] == 12
    hit = (ranked.rank[:, list(METHODS).index("recent")] <= 20).astype(float)
    wide, narrow = (
        half_width(np.repeat([0.0, 1.0], 24), np.repeat(np.arange(12), 4)),
        half_width(np.repeat([0.0, 1.0], 24), np.arange(48)),
    )
    assert wide == half_width(np.repeat([0.0, 1.0], 6), np.arange(12)) > 2 * narrow
    assert together["recent"]["ci95"] == half_width(hit, ranked.visit)


@pytest.mark.parametrize("visits", [2, 3, 10])
def test_few_visits_have_an_interval_that_holds_the_truth_as_often_as_many(visits: int) -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        drawn = rng.normal(0.0, 1.0, visits)
        held += abs(drawn.mean()) <= (half_width(drawn, np.arange(visits)) or 0.0)
    assert 930 <= held <= 970  # 95 % of 1,000, give or take three sigma


def test_places_beyond_the_top_are_misses() -> None:
    order = sorted(range(1, ITEMS + 1), key=lambda i: LOT[i])
    figures = watched(views(order[24], order[1], 1)).report()["all"]["popularity"]  # places 25 and 2
    assert (figures["hit_rate_at_20"], figures["mrr_at_20"]) == (0.5, 0.25)


def test_nothing_seen_gives_an_empty_report() -> None:
    prequential = watched([])
    assert prequential.report()["all"] == {"steps": 0, "visits": 0}


def ring_of_items(seed: int) -> dict[str, float]:
    """MRR@20 by method in the last third of walks along a ring: each next item is new to its user, none is popular."""
    rng = np.random.default_rng(seed)
    replay, network = Replay(10_000, HISTORY), agent()
    joiner = Joiner(JoinSettings(history_length=HISTORY), partitions=[0])
    prequential = Prequential(vocabulary())
    rows: list[Row] = []
    for visit in range(150):
        first = int(rng.integers(ITEMS))
        rows += [
            event("view_item", (first + step) % ITEMS + 1, at=3600.0 * visit + 20 * step, user=f"{visit}")
            for step in range(8)
        ]
    rows = logged(rows)
    for start in range(0, len(rows), 40):
        made = joiner.push(columns(rows[start : start + 40]))
        prequential.observe(made, network)
        replay.insert(made)
        if len(replay) >= 64:
            for _ in range(10):
                network.update(replay.sample(64, rng))
    third = prequential.report()["thirds"][2]
    return {method: third[method]["mrr_at_20"] for method in METHODS}


def test_a_learner_foretells_what_no_rule_can() -> None:
    """Seeds 0 to 9: the network .68 to .81, the rules at most .14."""
    mrr = ring_of_items(seed=0)
    assert mrr["learned_next_item"] > 0.5
    assert max(mrr["recent"], mrr["popularity"]) < 0.3
