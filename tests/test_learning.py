"""It learns: from its own recommendations, in the simulated shop, within minutes."""

import argparse

import numpy as np
import pytest

from benchmarks.learning import (
    UNTOLD,
    Loop,
    LoopSettings,
    changed,
    check_changes,
    learn,
    spend_until,
    told,
)
from learner.agent_settings import AgentSettings
from learner.policy import Policy
from learner.replay import Histories
from simulator.figures import same_visits
from simulator.shop import HOUR_MS, Shop, ShopSettings


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


def of_two_users():
    return Histories(
        np.array([[7, 8, 7, 8, 9, 0], [5, 0, 0, 0, 0, 0]], np.int32),
        np.array([[12, 4, 3, 4, 3, 0], [4, 0, 0, 0, 0, 0]], np.uint8),
        np.array([[1, 2, 3, 4, 5, 0], [6, 0, 0, 0, 0, 0]], np.float32),
        np.array([[9, 0, 1, 0, 2, 0], [3, 0, 0, 0, 0, 0]], np.float32),
    )


def test_what_histories_leave_out_is_nowhere_in_them_and_all_else_is():
    whole = of_two_users()
    assert told(whole, "") is whole
    deeds, ages, repeats = (told(whole, untold) for untold in UNTOLD[1:])
    assert deeds.name.tolist() == [[4, 4, 4, 4, 4, 0], [4, 0, 0, 0, 0, 0]]
    assert not deeds.value.any()
    assert not ages.age_s.any()
    for same, name in ((deeds, "item"), (deeds, "age_s"), (ages, "item"), (ages, "name"), (ages, "value")):
        assert getattr(same, name) is getattr(whole, name)
    assert repeats.item.tolist() == [[7, 8, 9, 0, 0, 0], [5, 0, 0, 0, 0, 0]]
    assert repeats.name.tolist() == [[12, 4, 3, 0, 0, 0], [4, 0, 0, 0, 0, 0]]
    assert repeats.age_s.tolist() == [[1, 2, 5, 0, 0, 0], [6, 0, 0, 0, 0, 0]]
    assert repeats.value.tolist() == [[9, 0, 2, 0, 0, 0], [3, 0, 0, 0, 0, 0]]
    assert [column.dtype for column in repeats] == [column.dtype for column in whole]


@pytest.mark.parametrize("untold", UNTOLD[1:])
def test_neither_what_is_learnt_from_nor_what_is_answered_tells_what_is_left_out(untold, monkeypatch):
    loop = Loop(
        Shop(ShopSettings(items=40, shoppers=100), 1), AgentSettings(), LoopSettings(untold=untold), seed=1
    )
    seen, answered = [], []
    insert, recommend = loop._replay.insert, Policy.recommend
    monkeypatch.setattr(loop._replay, "insert", lambda joined: (seen.append(joined.states), insert(joined)))

    def watched(policy, states, *more):
        answered.append(Histories(*(column.copy() for column in states)))
        return recommend(policy, states, *more)

    monkeypatch.setattr(Policy, "recommend", watched)
    while sum(len(states.item) for states in answered) < 1000:
        loop.turn()
    learnt = [Histories(*(getattr(states, name) for name in Histories._fields)) for states in seen]
    for histories in (*learnt, *answered):
        again = told(histories, untold)
        assert all((a == b).all() for a, b in zip(histories, again, strict=True))
    assert any(histories.item.any() for histories in learnt)
    assert any(histories.item.any() for histories in answered)


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
        ("untold=names", "--set untold=names: untold=names: must be one of deeds, ages, repeats"),
    ],
)
def test_a_change_that_cannot_be_made_is_an_error_of_the_command_line(change, said, capsys):
    with pytest.raises(SystemExit):
        check_changes(argparse.ArgumentParser(), ["n_step=5", change], AgentSettings(), LoopSettings())
    assert said in capsys.readouterr().err
