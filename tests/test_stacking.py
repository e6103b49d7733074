"""Choice set right by what came of what was foretold: the mode is the mode, and it finds what is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner import stacking
from learner.agent import Agent
from learner.agent_settings import AgentSettings
from learner.answers import looks_of
from learner.entries import going_back
from learner.feature_levels import MOST_IN_VECTOR
from learner.networks import score_at
from learner.recall import NEAR
from learner.stacking import NEWEST, PRIOR_MEAN, PRIOR_PRECISION, WIDTHS, Stack, StackFit
from streaming.transitions import Amendments, Joined, Rejects, States, Transitions
from tests.test_agent import ITEMS, batch, new_agent, trained
from tests.test_agent import SETTINGS as PLAIN

SETTINGS = replace(PLAIN, stack=True)  # the default


def slots(seed, count, items, weights=(-1.0, 0.4, 1.5), width=0.0):
    """(item, z, √share, chosen) of a world in which these weights and levels of this variance are the truth; levels."""
    rng = np.random.default_rng(seed)
    level = rng.normal(0.0, width**0.5, items)
    level[0] = 0.0
    item = rng.integers(1, items, count).astype(np.int32)
    z = rng.normal(-1.0, 1.0, count).astype(np.float32)
    back = (rng.random(count) * (rng.random(count) < 0.3)).astype(np.float32)
    log_odds = weights[0] + weights[1] * z + weights[2] * back + level[item]
    nowhere = np.zeros((count, 1), np.int32)
    return (item, z, back, rng.random(count) < 1 / (1 + np.exp(-log_odds)), nowhere), level


def fitted(told, items, parts=1):
    fit = StackFit(Stack(items))
    for part in zip(*(np.array_split(column, parts) for column in told), strict=True):
        fit.note(*part)
    fit.fit()
    return fit


def test_before_anything_was_noted_choice_is_as_foretold():
    stack = Stack(3)
    assert stack.weights.tolist() == [0.0, 1.0, 0.0]
    assert not stack.level.any()


@pytest.mark.parametrize("width", [0.0, 0.03])
def test_it_finds_what_is_there(width):
    told, level = slots(1, 60_000, 50, width=width)
    fit = fitted(told, 50, parts=40)
    c, scale, own = fit.stack.weights.tolist()
    assert (c, scale, own) == pytest.approx((-1.0, 0.4, 1.5), abs=0.1)
    learnt = fit.stack.level.numpy()
    if width:
        assert np.corrcoef(learnt[1:], level[1:])[0, 1] > 0.9
        assert WIDTHS[fit.width] == pytest.approx(width, rel=0.1)
        assert np.abs(learnt - level).max() < 4 * fit.variance(50).sqrt().max()
    else:
        assert WIDTHS[fit.width] < 0.01
        assert np.abs(learnt).max() < 0.1
    assert learnt[0] == 0.0


def test_the_mode_is_where_the_posterior_has_no_slope_and_is_highest():
    (item, z, back, chosen, _), _ = slots(2, 3000, 20, width=0.5)
    _, of = np.unique(item, return_inverse=True)
    middle = float(z.mean())
    features = np.stack((np.ones(len(z)), z - middle, back), axis=1).astype(np.float64)
    found = stacking._mode(features, middle, of, chosen, 0.1, PRIOR_MEAN, np.zeros(19))

    def posterior(weights, level):
        log_odds = middle + features @ weights + level[of]
        likelihood = np.where(chosen, log_odds, 0.0).sum() - np.log1p(np.exp(log_odds)).sum()
        return likelihood - 0.5 * (PRIOR_PRECISION @ (weights - PRIOR_MEAN) ** 2 + level @ level / 0.1)

    best = posterior(found.weights, found.level)
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = 0.001 * rng.normal(size=3), 0.001 * rng.normal(size=19)
        up, down = (posterior(found.weights + x * a, found.level + x * b) for x in (1, -1))
        assert max(up, down) < best
        assert abs(up - down) < 1e-2 * (best - min(up, down))  # third order
    # the evidence is that of the whole Hessian, brute force
    p = 1 / (1 + np.exp(-(middle + features @ found.weights + found.level[of])))
    every = np.hstack((features, np.eye(19)[of]))
    hessian = (every.T * (p * (1 - p))) @ every + np.diag([*PRIOR_PRECISION, *[10.0] * 19])
    volume = 0.5 * (np.linalg.slogdet(hessian)[1] + 19 * np.log(0.1))
    assert found.evidence == pytest.approx(best - volume, abs=0.01)


def test_between_fits_levels_follow_each_slot():
    told, _ = slots(3, 2000, 10, width=0.0)
    fit = fitted(told, 10)
    before = fit.stack.level.clone()
    lucky = np.full(20, 4, np.int32)
    unseen = np.zeros((20, 1), np.int32)
    fit.note(lucky, np.full(20, -1.0, np.float32), np.zeros(20, np.float32), np.ones(20, np.bool_), unseen)
    assert fit.fitted == 2000
    assert fit.stack.level[4] > before[4]
    rest = [i for i in range(10) if i != 4]
    assert torch.equal(fit.stack.level[rest], before[rest])


def test_only_the_newest_count():
    old, _ = slots(4, NEWEST, 10, weights=(2.0, 0.0, 0.0))
    new, _ = slots(5, NEWEST, 10)
    both = tuple(np.concatenate(columns) for columns in zip(old, new, strict=True))
    one, other = fitted(both, 10), fitted(new, 10)
    assert one.stack.weights.tolist() == pytest.approx(other.stack.weights.tolist(), abs=0.02)


def test_restored_it_goes_on_as_if_it_had_never_stopped():
    told, _ = slots(6, 6000, 30, width=0.1)
    parts = list(zip(*(np.array_split(column, 20) for column in told), strict=True))
    first = StackFit(Stack(31))
    for part in parts[:11]:
        first.note(*part)
    again = StackFit(Stack(64))
    again.restore(first.state(31))
    for part in parts[11:]:
        first.note(*part)
        again.note(*part)
    for name, value in first.state(31).items():
        np.testing.assert_array_equal(value, again.state(31)[name], err_msg=name)
    assert torch.equal(first.variance(31), again.variance(31))


def test_going_back_is_the_root_of_the_items_share_of_the_history():
    item = torch.tensor([[3, 5, 3, 0, 3], [0, 0, 0, 0, 0], [7, 0, 0, 0, 0]])
    back = going_back(item)
    assert not back[item == 0].any()
    for row, history in zip(back.tolist(), item.tolist(), strict=True):
        real = [i for i in history if i]
        for i in set(real):
            share = real.count(i) / len(real)
            assert sum(x for x, at in zip(row, history, strict=True) if at == i) == pytest.approx(share**0.5)


def joined(told, organic=()):
    """A batch's states, and a transition for each slot of its slates."""
    states = len(told.action)
    at = np.repeat(np.arange(states, dtype=np.int32), 3)
    slot = np.tile(np.arange(3, dtype=np.int16), states)
    zeros = np.zeros(len(at), np.int64)
    return Joined(
        States(np.zeros(states, np.int32), np.arange(states), np.zeros(states, np.int64), *told.state),
        Transitions(
            *(zeros.astype(np.int32), zeros, slot, at, at, told.slate[at, slot], told.slate_reward[at, slot]),
            np.full(len(at), 0.9, np.float32),
            np.full(len(at), 0.1, np.float32),
            np.isin(at, organic),
            zeros,
        ),
        Amendments(*(np.zeros(0, kind) for kind in (np.int32, np.int64, np.int16, np.float32))),
        Rejects(np.zeros(0, np.int64), np.zeros(0, np.uint8)),
    )


@pytest.mark.parametrize("exact_items", [AgentSettings.exact_items, 1])
def test_what_is_noted_is_what_the_served_network_says_before_it_learns_of_it(exact_items):
    agent = trained(
        range(6), new_agent(replace(SETTINGS, exact_items=exact_items, candidates=50, target_tau=0.1))
    )
    told = batch(77)
    agent.foretell(joined(told, organic=[0, 5]))
    with torch.no_grad():
        agent._catch_up()
        keys = agent.target.keys(agent.items)
        queries = agent.target.queries(agent._state(told.state), keys)
        ids = torch.from_numpy(told.slate[:, :3].astype(np.int64))
        z = score_at(queries.choice, keys.choice, keys.category, ids) + agent.target.position_of(
            torch.arange(3)
        )
    shown = np.setdiff1d(np.arange(16), [0, 5])
    noted = agent._stack.state(ITEMS + 1)
    np.testing.assert_array_equal(noted["item"], told.slate[shown, :3].flatten())
    np.testing.assert_allclose(noted["z"], z[shown].flatten().numpy(), atol=1e-5)
    np.testing.assert_array_equal(noted["chosen"], told.slate_reward[shown, :3].flatten() != 0)
    np.testing.assert_array_equal(noted["look"], np.repeat(looks_of(told.state.item[shown])[0], 3, axis=0))
    assert noted["look"].any()
    for b, k in np.ndindex(len(shown), 3):
        history = told.state.item[shown[b]]
        share = (history == told.slate[shown[b], k]).sum() / max(1, (history > 0).sum())
        assert noted["back"][3 * b + k] == pytest.approx(share**0.5, abs=1e-6)


def test_what_is_noted_is_of_the_network_that_is_served_even_as_choices_come_to_say_more_than_recall():
    agent, told = trained(range(6), new_agent(SETTINGS)), joined(batch(77))
    agent.foretell(joined(batch(78), organic=range(16)))
    agent.foretell(told)
    agent._choices = 10**6
    agent.foretell(told)
    noted = agent._stack.state(ITEMS + 1)["z"]
    half = len(noted) // 2
    assert float(agent.target.trust) > 0.05
    np.testing.assert_allclose(noted[half:], noted[:half], atol=1e-5)


def test_a_network_that_has_not_learnt_foretells_nothing_and_one_that_is_told_not_to_neither():
    fresh, told = new_agent(SETTINGS), joined(batch(1))
    fresh.foretell(told)
    without = trained(range(3), new_agent(replace(SETTINGS, stack=False)))
    without.foretell(told)
    assert fresh._stack.slots == without._stack.slots == 0


def test_q_counts_the_chance_that_was_set_right():
    agent = trained(range(4), new_agent(SETTINGS))
    fit, (*told, _) = agent._stack, slots(8, 5000, ITEMS + 1, width=0.3)[0]
    fit._nearest = lambda source: (source[:, None] + np.arange(NEAR, dtype=np.int32)) % (ITEMS + 1)
    fit.note(*told, np.random.default_rng(10).integers(0, ITEMS + 1, (5000, 8)))
    slope = agent.online.stack.slope.copy_(0.1 * torch.randn(len(agent.online.stack.slope)))
    vector = agent.items.vector
    vector[::2] = torch.randn(vector[::2].shape)
    assert vector.abs().max() < MOST_IN_VECTOR
    described = torch.where((vector != 0).any(dim=1), vector @ slope[:-1] + slope[-1], 0.0)
    with torch.no_grad():
        keys = agent.online.keys(agent.items)
        state = agent._state(batch(9).state)
        queries = agent.online.queries(state, keys)
        answers = torch.zeros(16, ITEMS + 1)
        for row, near in zip(fit.stack.source[1:], fit.stack.near[1:], strict=True):
            share = ((state.item == row).sum(dim=1) / (state.item > 0).sum(dim=1).clamp(min=1)).sqrt()
            answers[:, near.long()] += share.unsqueeze(1) * fit.stack.answer[fit.stack.source == row]
        assert float(answers[:, 1:].std()) > 0.01
        ids = torch.arange(1, ITEMS + 1).expand(16, -1)
        z, reward, continuation = agent.online.parts_at(queries, keys, ids)
        c, scale, own = agent.online.stack.weights
        share = (queries.back.unsqueeze(1) * (queries.choice.item.unsqueeze(1) == ids.unsqueeze(2))).sum(
            dim=2
        )
        beside = own * share + agent.online.stack.level[ids] + described[ids] + answers[:, 1:]
        p = torch.sigmoid(c + scale * z + beside)
        q = agent.online.value(queries) + p * (reward + agent.settings.gamma * continuation)
        torch.testing.assert_close(agent.online.q_at(queries, keys, ids), q)
        torch.testing.assert_close(agent.online.q_all(queries, keys)[:, 1:], q)
        agent.online.position[3] = 0.7
        place = torch.full_like(ids, 3)
        p = torch.sigmoid(c + scale * (z + 0.7) + beside)
        torch.testing.assert_close(agent.online.chance_at(queries, keys, ids, place), p)
    assert abs(float(scale) - 0.4) < 0.2


def test_an_agent_restored_foretells_as_if_it_had_never_stopped():
    first = trained(range(4), new_agent(SETTINGS))
    first.foretell(joined(batch(50)))
    again = Agent(SETTINGS, seed=99)
    again.restore(first.state())
    for agent in (first, again):
        agent.foretell(joined(batch(51)))
        agent.update(batch(4))
    one, other = first.state(), again.state()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
