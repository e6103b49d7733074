"""What vectors say of how well items do: it finds what is there, in whatever units, and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner import stacking
from learner.agent import Agent
from learner.agent_settings import AgentSettings
from learner.answer_fit import FEW
from learner.feature_levels import FIRST_WIDTH, MOST_SAID, WIDTHS, FeatureFit
from learner.stacking import Stack, StackFit

SLOPES = np.array([0.8, 0.0, -0.3, 0.0, 0.0, 0.0])


def slots(seed, count, slopes=SLOPES, base=-1.5):
    """Vectors [T, D], log-odds without them, and what was chosen where these slopes are the truth."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(0.5, 1.0, (count, len(slopes))).astype(np.float32)
    beside = rng.normal(base, 0.5, count)
    log_odds = beside + (vectors - 0.5) @ slopes
    return vectors, beside, rng.random(count) < 1 / (1 + np.exp(-log_odds))


def settled(fit, told, rounds=30):
    """What it says of the slots then."""
    for _ in range(rounds):
        fit.settle(*told)
    return fit.of(told[0])


def test_before_anything_came_they_say_nothing():
    fit = FeatureFit(3)
    assert not fit.of(np.ones((2, 3), np.float32)).any()
    assert not fit.served.any()


def test_it_finds_what_is_there_and_forgets_what_tells_nothing():
    fit = FeatureFit(len(SLOPES))
    settled(fit, slots(1, 40_000))
    assert fit.served[:-1] == pytest.approx(SLOPES, abs=0.05)
    assert np.abs(fit.served[:-1][SLOPES == 0]).max() < 0.04  # three standard errors
    assert fit.width[SLOPES == 0].max() < FIRST_WIDTH < fit.width[SLOPES != 0].min()


def test_few_slots_say_little():
    apart = []
    for seed in range(20):
        fit = FeatureFit(30)
        vectors, beside, chosen = slots(seed, 512, np.zeros(30), base=-3.0)
        apart.append(settled(fit, (vectors, beside, chosen), rounds=1).std())
    assert np.mean(apart) < 0.25, "thirty features of which none tells anything, and some thirty choices"


def test_it_rests_where_the_posterior_has_no_slope():
    fit = FeatureFit(len(SLOPES))
    vectors, beside, chosen = slots(2, 3000)
    said = settled(fit, (vectors, beside, chosen), rounds=200)
    x = (vectors - vectors.mean(axis=0, dtype=np.float64)) / vectors.std(axis=0, dtype=np.float64)
    p = 1 / (1 + np.exp(-(beside + said)))
    hessian = (x.T * (p * (1 - p))) @ x + np.diag(1 / fit.width)
    step = np.linalg.solve(hessian, x.T @ (chosen - p) - fit.slope / fit.width)
    assert np.abs(step).max() < 2e-3
    # and each width where the evidence has none: MacKay's fixed point, or as narrow as widths become
    held = fit.width > 2 * WIDTHS[0]
    assert held.any()
    moved = np.clip(fit.slope**2 + np.diag(np.linalg.inv(hessian)), *WIDTHS)
    assert fit.width[held] == pytest.approx(moved[held], rel=0.05)


def test_units_do_not_matter_nor_does_what_never_varies():
    vectors, beside, chosen = slots(3, 5000)
    fit, other = FeatureFit(len(SLOPES)), FeatureFit(len(SLOPES) + 1)
    restated = np.hstack((vectors * 0.25 - 2.0, np.full((len(vectors), 1), 3.0, np.float32)))
    said = settled(fit, (vectors, beside, chosen), 5)
    again = settled(other, (restated.astype(np.float32), beside, chosen), 5)
    np.testing.assert_allclose(again, said, atol=1e-3)
    assert other.slope[-1] == 0.0


def test_servers_say_what_the_fit_says():
    vectors, beside, chosen = slots(4, 5000)
    vectors[::5] = 0.0  # nothing describes these
    vectors[1, 0] = 1e6  # an odd record
    fit = FeatureFit(len(SLOPES))
    said = settled(fit, (vectors, beside, chosen), 5)
    assert not said[::5].any()
    assert (said != 0).sum() == np.count_nonzero(vectors.any(axis=1))
    assert abs(said[1]) <= MOST_SAID
    stack = Stack(3, len(SLOPES))
    level = torch.linspace(-1, 1, len(vectors))
    assert torch.equal(stack.levels(level, torch.from_numpy(vectors)), level), "before anything is known"
    stack.slope.copy_(torch.from_numpy(fit.served))
    levels = stack.levels(level, torch.from_numpy(vectors))
    np.testing.assert_allclose(levels - level, said, atol=1e-4)


@pytest.mark.parametrize(("carry", "told"), [(1, False), (FEW - 1, False), (FEW + 1, True)])
def test_a_tag_that_few_slots_carry_says_nothing_however_lucky(carry, told):
    vectors, beside, chosen = slots(8, 4096, base=-3.0)
    tag = np.zeros((len(vectors), 1), np.float32)
    tag[:carry] = 1.0
    chosen[:carry] = True
    fit = FeatureFit(len(SLOPES) + 1)
    settled(fit, (np.hstack((vectors, tag)), beside, chosen), 6)
    assert (fit.slope[-1] != 0) == told


def test_no_vector_says_much_however_unlike_the_others():
    vectors, beside, chosen = slots(9, 4096)
    vectors[:, 1] = 0.5 + 1e-5 * np.random.default_rng(0).normal(size=len(vectors))
    chosen |= vectors[:, 1] > 0.500015
    fit = FeatureFit(len(SLOPES))
    settled(fit, (vectors, beside, chosen))
    assert fit.slope[1] > 0.05
    assert (
        np.abs(fit.of(np.array([[0.0, 0.0, 1.0, 0, 0, 0], [0.5, 9.0, 0, 0, 0, 0]], np.float32))).max()
        == MOST_SAID
    )


def test_log_odds_that_are_there_already_are_not_said_again():
    vectors, beside, chosen = slots(5, 20_000)
    fit = FeatureFit(len(SLOPES))
    said = settled(fit, (vectors, beside + (vectors - 0.5) @ SLOPES, chosen))
    assert said.std() < 0.05


def noted(fit, columns, parts):
    for part in parts:
        fit.note(*(column[part] for column in columns))


def told_of(vectors, z, chosen):
    """Columns for `StackFit.note` of items that come once each, from id 1 on; and a fit that knows their vectors."""
    count = len(vectors)
    nothing = np.zeros(count, np.float32)
    columns = (
        np.arange(1, count + 1, dtype=np.int32),
        z.astype(np.float32),
        nothing,
        chosen,
        np.zeros((count, 1), np.int32),
    )
    every = np.vstack((np.zeros((1, vectors.shape[1]), np.float32), vectors))
    return columns, StackFit(Stack(count + 1, vectors.shape[1]), vectors=lambda item: every[item])


def test_choice_is_set_right_by_it_beside_what_was_foretold():
    rng = np.random.default_rng(6)
    vectors = rng.normal(0.5, 1.0, (20_000, len(SLOPES))).astype(np.float32)
    z = rng.normal(-1.5, 0.5, len(vectors)) + 0.7 * (vectors[:, 0] - 0.5)  # which knows a part of it
    chosen = rng.random(len(z)) < 1 / (1 + np.exp(-z - (vectors - 0.5) @ SLOPES))
    columns, fit = told_of(vectors, z, chosen)
    noted(fit, columns, np.array_split(np.arange(len(z)), 40))
    assert fit.stack.slope[:-1].numpy() == pytest.approx(SLOPES, abs=0.15)
    assert not fit.stack.level.any(), "an item that came once has no level of its own"
    c, scale, _ = fit.stack.weights.tolist()
    assert (c, scale) == pytest.approx((0.0, 1.0), abs=0.15)


def test_what_was_foretold_long_ago_does_not_count(monkeypatch):
    monkeypatch.setattr(stacking, "NEWEST", 16_384)  # slots; the ring begins anew twice
    monkeypatch.setattr(stacking, "LATELY", (2048, 8))
    before, now = slots(10, 38_000, -SLOPES), slots(11, 2100)
    columns, fit = told_of(*(np.concatenate(pair) for pair in zip(before, now, strict=True)))
    noted(fit, columns, np.array_split(np.arange(40_100), 40))
    fit.fit()
    assert fit.stack.slope[0] > 0.5
    assert fit.stack.slope[2] < -0.1


def test_between_fits_levels_follow_beside_what_vectors_say():
    vectors, z, chosen = slots(12, 4096)
    columns, fit = told_of(vectors, z, chosen)
    noted(fit, columns, [np.arange(4096)])
    c, scale, _ = fit.stack.weights.tolist()
    best = int(fit.features.of(vectors).argmax())
    said = float(fit.features.of(vectors[best : best + 1])[0])
    assert said > 0.5
    fit.note(*(column[best : best + 1] for column in columns[:3]), np.array([True]), columns[4][:1])
    assert fit.fitted == 4096
    p = 1 / (1 + np.exp(-(c + scale * z[best] + said)))
    expected = (1 - p) / (p * (1 - p) + 1 / stacking.WIDTHS[fit.width])
    assert float(fit.stack.level[best + 1]) == pytest.approx(expected, rel=1e-3)


def test_answers_are_learnt_beside_what_vectors_say(monkeypatch):
    vectors, z, chosen = slots(13, 4096)
    columns, fit = told_of(vectors, z, chosen)
    settle, seen = fit.answers.settle, []

    def watched(entered, log_odds, came):
        seen.append(log_odds)
        return settle(entered, log_odds, came)

    monkeypatch.setattr(fit.answers, "settle", watched)
    noted(fit, columns, [np.arange(4096)])
    c, scale, _ = fit.stack.weights.tolist()
    np.testing.assert_allclose(seen[-1], c + scale * z + fit.features.of(vectors), atol=1e-4)


def test_an_agent_knows_what_describes_the_slots():
    agent = Agent(AgentSettings(dim=4, hidden=4, history_length=4, vector_dim=3))
    agent.grow(700)
    ids = np.arange(1, 701)
    assert not agent._vectors_of(ids).any()
    vectors, z, chosen = slots(14, 700, np.array([2.0, 0.0, 0.0]))
    agent.items.vector[1:] = torch.from_numpy(vectors)
    agent._describe()
    np.testing.assert_array_equal(agent._vectors_of(ids[::-1].copy()), vectors[::-1])
    columns, _ = told_of(vectors, z, chosen)
    noted(agent._stack, columns, [np.arange(700)])
    assert agent.target.stack.slope[0] > 0.3
    again = Agent(agent.settings)
    again.restore(agent.state())
    assert torch.equal(again.online.stack.slope, agent.online.stack.slope)
    assert torch.equal(again.online.keys(again.items).level, agent.online.keys(agent.items).level)


def test_restored_it_goes_on_as_if_it_had_never_stopped():
    columns, first = told_of(*slots(7, 20_000))
    again = StackFit(Stack(20_001, len(SLOPES)), vectors=first._vectors)
    parts = np.array_split(np.arange(20_000), 40)
    noted(first, columns, parts[:23])
    again.restore(first.state(20_001))
    assert first.stack.slope.any()
    assert torch.equal(first.stack.slope, again.stack.slope)
    for fit in (first, again):
        noted(fit, columns, parts[23:])
    for name, value in first.state(20_001).items():
        np.testing.assert_array_equal(value, again.state(20_001)[name], err_msg=name)
    with pytest.raises(ValueError, match="settings differ"):
        StackFit(Stack(20_001, 3)).restore(first.state(20_001))
