"""What vectors say of how well items do: it finds what is there, in whatever units, and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.feature_levels import FIRST_WIDTH, MOST_IN_VECTOR, WIDTHS, FeatureFit
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
    for _ in range(rounds):
        said = fit.settle(*told)
    return said


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


def test_what_it_says_of_slots_is_what_it_says_of_items():
    vectors, beside, chosen = slots(4, 5000)
    vectors[::5] = 0.0  # nothing describes these
    vectors[1, 0] = 1e6  # an odd record
    fit = FeatureFit(len(SLOPES))
    said = settled(fit, (vectors, beside, chosen), 5)
    np.testing.assert_allclose(fit.of(vectors), said, atol=1e-4)
    assert not said[::5].any()
    assert said.any()
    stack = Stack(3, len(SLOPES))
    stack.slope.copy_(torch.from_numpy(fit.served))
    level = torch.linspace(-1, 1, len(vectors))
    levels = stack.levels(level, torch.from_numpy(vectors))
    np.testing.assert_allclose(levels - level, said, atol=1e-4)
    assert abs(said[1]) < MOST_IN_VECTOR * np.abs(fit.served).sum() + 1


def test_log_odds_that_are_there_already_are_not_said_again():
    vectors, beside, chosen = slots(5, 20_000)
    fit = FeatureFit(len(SLOPES))
    said = settled(fit, (vectors, beside + (vectors - 0.5) @ SLOPES, chosen))
    assert said.std() < 0.05


@pytest.fixture
def shown():
    """Slots for `StackFit.note`, and the vectors of their items, of which each comes once."""
    vectors, beside, chosen = slots(6, 20_000)
    count = len(vectors)
    columns = (
        np.arange(1, count + 1, dtype=np.int32),
        beside.astype(np.float32),
        np.zeros(count, np.float32),
        chosen,
        np.zeros((count, 1), np.int32),
    )
    every = np.vstack((np.zeros((1, vectors.shape[1]), np.float32), vectors))
    return columns, every


def noted(fit, columns, parts):
    for part in parts:
        fit.note(*(column[part] for column in columns))


def test_choice_is_set_right_by_it(shown):
    columns, every = shown
    fit = StackFit(Stack(len(every), every.shape[1]), vectors=lambda item: every[item])
    noted(fit, columns, np.array_split(np.arange(len(columns[0])), 40))
    assert fit.stack.slope[:-1].numpy() == pytest.approx(SLOPES, abs=0.1)
    assert not fit.stack.level.any(), "an item that came once has no level of its own"
    c, scale, _ = fit.stack.weights.tolist()
    assert (c, scale) == pytest.approx((0.0, 1.0), abs=0.15)


def test_restored_it_goes_on_as_if_it_had_never_stopped(shown):
    columns, every = shown
    parts = np.array_split(np.arange(len(columns[0])), 40)
    first, again = (
        StackFit(Stack(len(every), every.shape[1]), vectors=lambda item: every[item]) for _ in range(2)
    )
    noted(first, columns, parts[:23])
    again.restore(first.state(len(every)))
    assert torch.equal(first.stack.slope, again.stack.slope)
    for fit in (first, again):
        noted(fit, columns, parts[23:])
    for name, value in first.state(len(every)).items():
        np.testing.assert_array_equal(value, again.state(len(every))[name], err_msg=name)
    with pytest.raises(ValueError, match="settings differ"):
        StackFit(Stack(len(every), 3)).restore(first.state(len(every)))
