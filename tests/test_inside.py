"""What the agent knows of the simulated shop, held against the truth."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.inside import of_turn
from benchmarks.learning import SLOTS, Loop, LoopSettings
from learner.agent_settings import AgentSettings
from simulator.policies import HistoryOracle, PlanningOracle, Random
from simulator.shop import Shop, ShopSettings

SHOP = ShopSettings(items=60, shoppers=200)


@pytest.fixture(scope="module")
def looked():
    """Figures of a few turns, of a loop that has served a few hundred pages, and of the same with other histories."""
    shop = Shop(SHOP, 1)
    planner = PlanningOracle(Shop(SHOP, 1), SLOTS, decisions=1000)
    loop = Loop(shop, AgentSettings(), LoopSettings(min_replay=300), seed=1)
    served = 0
    while served < 600:
        served += len(loop.turn()[0].shopper)
    figures = []
    for _ in range(8):
        turn = shop.next_turn()
        at_random = Random(3).recommend(shop, turn, SLOTS)
        both = [of_turn(shop, planner, loop, turn, at_random)]
        past = turn.history
        other = turn._replace(history=past._replace(item=past.item[::-1].copy()))
        both.append(of_turn(shop, planner, loop, other, at_random))
        figures.append(both)
        shop.show(turn, HistoryOracle(planner).recommend(shop, turn, SLOTS))
    return figures


def test_who_knows_all_has_most_and_who_knows_no_one_no_more_than_the_best_slate_for_all(looked):
    mean = {name: np.mean([turn[0][name] for turn in looked]) for name in looked[0][0]}
    assert mean["true_p_true_gain"] > mean["best_for_all"] > mean["at_random"]
    assert mean["true_p_true_gain"] > mean["learnt_p_learnt_gain"]
    assert mean["best_for_all"] > mean["unknown"] - 0.02  # what is out of stock differs from turn to turn
    assert mean["best_for_all"] > mean["best_sellers"]  # here: three slates at random


def test_of_unknown_users_nothing_is_read(looked):
    assert all(one["unknown"] == other["unknown"] for one, other in looked)
    assert any(one["learnt_p_learnt_gain"] != other["learnt_p_learnt_gain"] for one, other in looked)
