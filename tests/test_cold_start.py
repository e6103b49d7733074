"""How new items are shown: what is counted, and what an agent is told of them."""

import numpy as np
import pytest

from benchmarks import cold_start
from benchmarks.cold_start import FirstImpressions, NamesOnly
from benchmarks.learning import Loop, LoopSettings
from learner.agent import AgentSettings
from simulator.shop import CLICK, Shop, ShopSettings


def test_of_each_new_item_only_the_first_impressions_count(monkeypatch):
    monkeypatch.setattr(cold_start, "FIRST", 2)
    release_ms = np.array([0, 50, 60, 200])
    seen = FirstImpressions(release_ms, after_ms=10)
    seen.add(np.array([[0, 1], [1, -1]]), np.array([[True, False], [True, False]]))
    seen.add(np.array([[1, 2]]), np.array([[True, False]]))  # item 1 for the third time
    assert seen.figures(100, release_ms) == {
        "new_items": 2.0,  # item 3 is not out yet
        "shown_100_times": 0.5,
        "impressions": 1.5,
        "ctr_new": pytest.approx(1 / 3),
        "ctr_others": 1.0,
    }


@pytest.mark.parametrize(("kind", "told"), [(Loop, True), (NamesOnly, False)])
def test_an_agent_is_told_what_the_catalog_says_or_names_alone(kind, told):
    loop = kind(Shop(ShopSettings(items=40, new_items=0.5), 1), AgentSettings(), LoopSettings(), seed=1)
    loop.turn()
    items = loop.agent.items
    assert (bool(items.category.any()), bool(items.vector.any()), bool((items.price >= 0).any())) == (
        told,
    ) * 3


def test_the_slates_counted_are_those_that_were_shown():
    shop = Shop(ShopSettings(items=40), 1)
    loop = Loop(shop, AgentSettings(), LoopSettings(), seed=1)
    turn, outcome = loop.turn()
    assert loop.slates.shape == outcome.clicked.shape == (len(turn.shopper), 6)
    clicks = outcome.events.item[outcome.events.name == CLICK]
    assert sorted(loop.slates[outcome.clicked].tolist()) == sorted(clicks.tolist())
