"""How new items are shown: what is counted, and what an agent is told of them."""

import json
import math

import numpy as np
import pytest

from benchmarks import cold_start, record
from benchmarks.cold_start import FirstImpressions, NamesOnly, pooled, table
from benchmarks.learning import Loop, LoopSettings
from learner.agent_settings import AgentSettings
from simulator.figures import over_seeds
from simulator.shop import CLICK, Shop, ShopSettings


def test_of_each_new_item_only_the_first_impressions_count(monkeypatch):
    monkeypatch.setattr(cold_start, "FIRST", 2)
    release_ms = np.array([0, 50, 60, 200])
    seen = FirstImpressions(release_ms, after_ms=10)
    seen.add(np.array([[0, 1], [1, -1]]), np.array([[True, False], [True, False]]))
    seen.add(np.array([[1, 2]]), np.array([[True, False]]))  # item 1 for the third time
    assert seen.figures(100, release_ms) == {
        "new_items": 2.0,  # item 3 is not out yet
        "new_full": 1.0,
        "new_shown": 3.0,
        "new_clicked": 1.0,
        "others_shown": 1.0,
        "others_clicked": 1.0,
        "shown_100_times": 0.5,
        "impressions": 1.5,
        "ctr_new": pytest.approx(1 / 3),
        "ctr_others": 1.0,
    }


def test_what_was_never_shown_has_no_rate_and_says_so(tmp_path):
    figures = FirstImpressions(np.array([0, 50]), after_ms=10).figures(100, np.array([0, 50]))
    assert math.isnan(figures["ctr_new"])
    assert math.isnan(figures["ctr_others"])
    assert figures["impressions"] == 0.0
    assert list(table([{"popularity": figures}]))[2] == "| popularity | - | - | 0 % | 0 |"
    record.append(tmp_path / "found", "cold_start", [], {"seeds": [figures]})
    (written,) = json.loads((tmp_path / "found").read_text(), parse_constant=pytest.fail)["seeds"]
    assert (written["ctr_new"], written["impressions"]) == (None, 0.0)


def test_rates_are_of_the_impressions_of_all_shops_together():
    shops = [counted(clicked=5, shown=100), counted(clicked=0, shown=0), counted(clicked=45, shown=300)]
    mean, low, high = pooled(shops, "ctr_new")
    assert mean == pytest.approx(50 / 400)
    assert low < mean < high
    assert "| features | 12.50 ± " in list(table([{"features": shop} for shop in shops]))[2]
    assert pooled(shops[:2], "ctr_new").mean == pytest.approx(5 / 100)


def test_with_as_many_impressions_in_each_shop_the_interval_is_that_of_their_rates():
    shops = [counted(clicked, shown=10) for clicked in (1, 2, 3)]
    assert pooled(shops, "ctr_new") == pytest.approx(over_seeds([0.1, 0.2, 0.3]))


def counted(clicked: int, shown: int) -> dict[str, float]:
    """Of a shop's two new items; the others do as well."""
    return {
        "new_items": 2.0,
        "new_full": 0.0,
        "new_shown": shown,
        "new_clicked": clicked,
        "others_shown": shown,
        "others_clicked": clicked,
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
