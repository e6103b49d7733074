"""It learns: from its own recommendations, in the simulated shop, within minutes."""

import argparse

import pytest

from benchmarks.learning import LoopSettings, changed, check_changes, learn, spend_until
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("double=no", "--set double=no: 'no': must be true or false"),
        ("gamma=2", "--set gamma=2: gamma=2.0: must be in 0.0..0.999999"),
        ("n_step=many", "--set n_step=many: invalid literal for int"),
        ("nothing=1", "--set nothing=1: must be NAME=VALUE, NAME one of alpha, batch_size"),
        ("gamma", "--set gamma: must be NAME=VALUE"),
    ],
)
def test_a_change_that_cannot_be_made_is_an_error_of_the_command_line(change, said, capsys):
    with pytest.raises(SystemExit):
        check_changes(argparse.ArgumentParser(), ["n_step=5", change], AgentSettings(), LoopSettings())
    assert said in capsys.readouterr().err
