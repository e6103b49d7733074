"""It learns: from its own recommendations, in the simulated shop, within minutes."""

import pytest

from benchmarks.learning import LoopSettings, changed, learn, spend_until
from learner.agent import AgentSettings
from simulator.figures import same_visits
from simulator.shop import HOUR_MS, ShopSettings


def test_after_15_000_decisions_it_earns_far_more_than_best_sellers_do():
    settings, seed = ShopSettings(), 5
    learnt = learn(settings, seed, [15_000], AgentSettings(), LoopSettings())
    end_ms = learnt.edges[-1]
    others = {name: spend_until(settings, seed, name, end_ms) for name in ("random", "popularity")}
    # the same visits for all, those of the last two hours that are over
    visits = same_visits({**others, "learned": learnt.visits}, end_ms - 3 * HOUR_MS, end_ms - HOUR_MS)
    earned = {name: v.reward.mean() for name, v in visits.items()}
    assert len(visits["learned"].visit) > 300
    assert earned["learned"] > 1.5 * earned["popularity"] > 1.5 * earned["random"], earned


def test_settings_are_changed_by_name():
    agent = changed(AgentSettings(), ["double=false", "n_step=5", "gamma=0.5", "beta=0.1"])
    assert (agent.double, agent.n_step, agent.gamma) == (False, 5, 0.5)
    assert changed(AgentSettings(), ["double=True"]).double
    assert changed(LoopSettings(), ["beta=0.1", "double=false"]) == LoopSettings(beta=0.1)
    with pytest.raises(ValueError, match="'no': must be true or false"):
        changed(AgentSettings(), ["double=no"])
