"""Off-policy estimators: against their definitions, and against the exact value where all slates can be enumerated."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.estimators import (
    ALWAYS,
    SLATE_MODELS,
    PropensityError,
    added,
    clipped,
    dm,
    dr,
    effective_rewards,
    effective_sample_size,
    ips,
    logged,
    mean_ratio,
    no_sums,
    ratios,
    rounds,
    sndr,
    snips,
    sums,
    switch_dr,
    switched,
    total,
    without_each,
)
from learner.intervals import interval, jackknife, student_t
from learner.slate_chances import judge

SEEDS = st.integers(0, 2**32 - 1)


def some(seed, decisions=30, slots=1, slate="cascade", taus=(ALWAYS,), clip=ALWAYS, groups=1):
    """Made-up decisions, and their sums by group."""
    rng = np.random.default_rng(seed)
    shape = (decisions, slots)
    shown = np.cumprod(rng.random(shape) < 0.9, axis=1).astype(bool)
    shown[:, 0] = True
    propensity, chance = rng.uniform(0.05, 1.0, shape), rng.random(shape)
    reward, q_shown, q_target = rng.normal(size=(3, *shape))
    made = rounds(slate, ratios(chance, propensity, shown), shown, reward, q_shown, q_target)
    return made, sums(made, rng.integers(groups, size=decisions), groups, clip, taus)


# --- one slot: the definitions -------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_with_one_slot_they_are_the_textbooks(seed):
    made, s = some(seed, taus=(ALWAYS, 1.5))
    w, r, q, v = (x[:, 0] for x in (made.ratio, made.reward, made.q_shown, made.q_target))
    n = len(w)
    assert np.allclose(ips(s), (w * r).sum() / n, atol=1e-12)
    assert np.allclose(snips(s), (w * r).sum() / w.sum(), atol=1e-12)
    assert np.allclose(dm(s), v.mean(), atol=1e-12)
    assert np.allclose(dr(s), (v + w * (r - q)).mean(), atol=1e-12)
    assert np.allclose(sndr(s), v.mean() + (w * (r - q)).sum() / w.sum(), atol=1e-12)
    assert np.allclose(switch_dr(1)(s), (v + w * (w <= 1.5) * (r - q)).mean(), atol=1e-12)
    assert np.allclose(effective_sample_size(s), w.sum() ** 2 / (w**2).sum())
    assert np.allclose(effective_rewards(s), (w * r).sum() ** 2 / ((w * r) ** 2).sum())
    assert np.allclose(mean_ratio(s), w.mean())
    assert np.allclose(logged(s), r.mean())


@pytest.mark.parametrize("slate", SLATE_MODELS)
def test_a_policy_judged_by_its_own_log_earned_what_it_earned(slate):
    made, _ = some(3, slots=3)
    own = rounds(slate, made.shown.astype(float), made.shown, made.reward)
    s = sums(own, np.zeros(30, np.int64), 1)
    assert [round(float(f(s)[0]), 12) for f in (ips, snips, dr, sndr)] == [round(float(logged(s)[0]), 12)] * 4
    assert effective_sample_size(s)[0].tolist() == made.shown.sum(axis=0).tolist()


@pytest.mark.parametrize("slate", SLATE_MODELS)
def test_switch_dr_lies_between_dm_and_dr(slate):
    _, s = some(5, slots=3, slate=slate, taus=(-1.0, ALWAYS))
    assert switch_dr(0)(s) == pytest.approx(dm(s))
    assert switch_dr(1)(s) == pytest.approx(dr(s))


def test_in_a_cascade_all_slots_after_a_heavy_weight_are_the_models():
    ratio = np.array([[1.0, 50.0, 0.01]])
    made = rounds("cascade", ratio, np.ones((1, 3), bool), np.ones((1, 3)))
    found = switched(made, 10.0)
    assert made.weight.tolist() == [[1.0, 50.0, 0.5]]
    assert found.weight.tolist() == [[1.0, 0.0, 0.0]]
    assert found.before.tolist() == [[1.0, 1.0, 0.0]]  # the model's word on slot 1 covers slot 2


def test_slate_models_differ_in_what_a_slots_weight_is():
    ratio, shown = np.array([[2.0, 3.0, 5.0], [7.0, 0.0, 0.0]]), np.array([[1, 1, 1], [1, 0, 0]]) > 0
    weights = {slate: rounds(slate, ratio, shown, ratio).weight.tolist() for slate in SLATE_MODELS}
    assert weights == {
        "slotwise": [[2.0, 3.0, 5.0], [7.0, 0.0, 0.0]],
        "cascade": [[2.0, 6.0, 30.0], [7.0, 0.0, 0.0]],
        "standard": [[30.0, 30.0, 30.0], [7.0, 0.0, 0.0]],
    }


def test_weights_are_clipped_for_all_but_switch_dr():
    made, s = some(7, slots=2, clip=1.2, taus=(ALWAYS,))
    assert (made.weight > 1.2).any()
    _, by_hand = some(7, slots=2)
    assert ips(s) == pytest.approx((np.minimum(made.weight, 1.2) * made.reward).sum() / 30)
    assert switch_dr(0)(s) == pytest.approx(dr(by_hand))
    assert clipped(made, 1.2).before.max() == 1.2


def test_rewards_of_one_slate_count_as_one():
    shown = np.ones((4, 2), bool)
    reward = np.array([[3.0, 1.0], [0.0, 0.0], [2.0, 2.0], [0.0, 4.0]])
    made = rounds("cascade", shown.astype(float), shown, reward)
    assert effective_rewards(sums(made, np.zeros(4, np.int64), 1)).tolist() == [3.0]


def test_without_weight_snips_says_nothing_and_sndr_believes_the_model():
    made = rounds(
        "cascade", np.zeros((4, 1)), np.ones((4, 1), bool), np.ones((4, 1)), q_target=np.full((4, 1), 3.0)
    )
    s = sums(made, np.zeros(4, np.int64), 1)
    assert np.isnan(snips(s))
    assert (ips(s), sndr(s), dm(s)) == (0.0, 3.0, 3.0)


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.1, np.nan])
def test_a_propensity_that_is_none_is_named(bad):
    p = np.array([[0.5, 0.5], [0.5, bad]])
    with pytest.raises(PropensityError, match=r"decision 1, slot 1: propensity is .*0 < p <= 1"):
        ratios(np.ones((2, 2)), p, np.ones((2, 2), bool))
    assert ratios(np.ones((2, 2)), p, np.array([[1, 1], [1, 0]]) > 0).tolist() == [[2.0, 2.0], [2.0, 0.0]]


@pytest.mark.parametrize("bad", [-0.1, 1.1, np.nan])
def test_a_chance_that_is_none_is_named(bad):
    with pytest.raises(PropensityError, match="decision 0, slot 0: chance under the target"):
        ratios(np.array([[bad]]), np.ones((1, 1)), np.ones((1, 1), bool))


# --- slates: unbiased, by enumeration ------------------------------------------------------------------------


def world(seed, slots=2, items=4):
    """Every slate of a small world with its probability, and what an ε-greedy target earns in it.

    What a slot earns depends on its own item and on the one before it: so also the cascade model is put to the test.
    """
    rng = np.random.default_rng(seed)
    mu = rng.dirichlet(np.ones(items))
    scores, epsilon = rng.normal(size=items), rng.choice([0.0, 0.3, 1.0])
    earns = rng.normal(size=(slots, items, items + 1))  # slot, item, item before (the last: none)
    value, effect = rng.normal(size=items), rng.normal(size=slots)  # a model that knows nothing of that
    slates = np.array(list(permutations(range(items), slots)))
    probability, propensity, chance = np.ones(len(slates)), np.zeros(slates.shape), np.zeros(slates.shape)
    reward = np.zeros(slates.shape)
    for t, slate in enumerate(slates.tolist()):
        for k, item in enumerate(slate):
            left = [i for i in range(items) if i not in slate[:k]]
            propensity[t, k] = mu[item] / mu[left].sum()
            best = max(left, key=lambda i: scores[i])
            chance[t, k] = epsilon / len(left) + (1 - epsilon) * (item == best)
            reward[t, k] = earns[k, item, slate[k - 1] if k else items]
        probability[t] = propensity[t].prod()
    uniform = np.broadcast_to(1.0 / (items - np.arange(slots)), slates.shape)
    wide = np.broadcast_to(scores, (len(slates), items)), np.ones((len(slates), items), bool)
    judged = judge(*wide, np.broadcast_to(value, wide[0].shape), effect, slates, uniform, epsilon)
    return probability, propensity, chance, reward, judged


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_in_expectation_over_all_slates_they_are_the_targets_value(seed):
    from learner.evaluation import as_rounds

    probability, propensity, chance, reward, judged = world(seed)
    assert np.allclose(judged.chance, chance)
    truth = float((chance.prod(axis=1) * reward.sum(axis=1)).sum())
    shown = np.ones(chance.shape, bool)
    for slate in ("cascade", "standard"):
        made = as_rounds(slate, judged, propensity, shown, reward)
        each = sums(made, np.arange(len(shown)), len(shown))  # a group for each slate
        assert float(probability @ each.weighted.sum(axis=1)) == pytest.approx(truth, abs=1e-9)
        both = (each.residual + each.model).sum(axis=1)
        assert float(probability @ both) == pytest.approx(truth, abs=1e-9)
        assert probability @ each.weight == pytest.approx([1.0, 1.0])


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_slotwise_they_are_the_value_of_one_slot_after_slots_as_logged(seed):
    from learner.evaluation import as_rounds

    probability, propensity, chance, reward, judged = world(seed)
    made = as_rounds("slotwise", judged, propensity, np.ones(chance.shape, bool), reward)
    each = sums(made, np.arange(len(reward)), len(reward))
    before = np.ones(chance.shape)
    before[:, 1] = propensity[:, 0]  # slot 0 as logged ...
    # ... then slot 1 by the target; of slot 0 alone, what follows does not matter
    once = propensity[:, 1] * chance[:, 0] * reward[:, 0] + before[:, 1] * chance[:, 1] * reward[:, 1]
    assert float(probability @ each.weighted.sum(axis=1)) == pytest.approx(once.sum(), abs=1e-9)
    both = (each.residual + each.model).sum(axis=1)
    assert float(probability @ both) == pytest.approx(once.sum(), abs=1e-9)


def test_the_direct_method_is_the_models_word_on_the_targets_slates():
    from learner.evaluation import as_rounds

    _, propensity, chance, _, judged = world(11)
    words = judged.own.sum(axis=1)  # the model's, of each slate
    for slate in ("cascade", "standard"):
        made = as_rounds(slate, judged, propensity, np.ones(chance.shape, bool), np.zeros(chance.shape))
        found = sums(made, np.arange(len(words)), len(words)).direct
        assert found == pytest.approx(np.full(len(words), (chance.prod(axis=1) * words).sum()))


# --- sums and intervals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("slate", SLATE_MODELS)
def test_sums_of_parts_add_up_to_those_of_all(slate):
    made, whole = some(13, decisions=40, slots=3, slate=slate, taus=(2.0, ALWAYS))
    parts = no_sums(1, 3, 2)
    for start in range(0, 40, 7):
        rows = slice(start, start + 7)
        part = made._replace(**{n: getattr(made, n)[rows] for n in made._fields if n != "slate"})
        zeros = np.zeros(len(part.reward), np.int64)
        parts = added(parts, sums(part, zeros, 1, ALWAYS, (2.0, ALWAYS)))
    for a, b in zip(parts, whole, strict=True):
        assert a == pytest.approx(b)


def test_without_each_group_is_what_the_others_alone_give():
    made, by_group = some(17, decisions=50, slots=2, groups=4)
    groups = np.random.default_rng(17)
    for _ in range(6):  # the draws that `some` made before it
        groups.random(made.reward.shape)
    others = without_each(by_group)
    for g in range(4):
        rest = total(type(by_group)(*(np.delete(column, g, axis=0) for column in by_group)))
        for a, b in zip(others, rest, strict=True):
            assert a[g] == pytest.approx(b[0])


def test_a_group_that_holds_all_the_weight_leaves_none_behind():
    ratio = np.array([[0.1 + 0.2], [0.0], [0.0]])
    made = rounds("cascade", ratio, np.ones((3, 1), bool), np.ones((3, 1)))
    others = without_each(sums(made, np.arange(3), 5))
    assert others.weight[:, 0].tolist() == [0.0, 0.1 + 0.2, 0.1 + 0.2]  # groups 3 and 4 have no decision


def of_rewards(rewards):
    """The interval of their mean, each from a user of its own."""
    n = len(rewards)
    reward, shown = np.array(rewards, float)[:, None], np.ones((n, 1), bool)
    made = rounds("cascade", shown.astype(float), shown, reward)
    return interval(sums(made, np.arange(n), n + 5), logged)  # five groups have no decision


def test_of_values_without_skew_the_interval_is_students():
    r = np.arange(12.0)
    found = of_rewards(r)
    half = 2.20099 * r.std(ddof=1) / 12**0.5
    assert found == pytest.approx((5.5, 5.5 - half, 5.5 + half), rel=1e-4)


def test_of_skewed_values_it_reaches_further_to_where_they_are_rare():
    found = of_rewards([0.0] * 60 + [10.0] * 4)
    assert found.high - found.value > 1.5 * (found.value - found.low)


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda rng: rng.normal(size=100), 0.0),
        (lambda rng: rng.exponential(size=40), 1.0),
        (lambda rng: 25 * (rng.random(150) < 0.08) * rng.exponential(size=150), 2.0),
    ],
    ids=["normal", "exponential", "few heavy ones"],
)
def test_intervals_hold_the_mean_95_times_in_100(draw, mean):
    """1,000 samples each. Were it 95 %, 92.5 % to 97.5 % would be missed once in 4,000 times; Student's own interval is
    at 95, 92.5 and 87 %."""
    rng = np.random.default_rng(0)
    intervals = [of_rewards(draw(rng)) for _ in range(1000)]
    assert 925 <= sum(i.low <= mean <= i.high for i in intervals) <= 975
    assert min(sum(i.high < mean for i in intervals), sum(i.low > mean for i in intervals)) >= 5


def test_values_that_are_all_alike_leave_no_doubt():
    assert of_rewards([3.0] * 9) == (3.0, 3.0, 3.0)


def test_of_a_ratio_its_width_is_near_the_linearised_one():
    made, s = some(23, decisions=4000, groups=100)
    w, r = made.ratio[:, 0], made.reward[:, 0]
    linear = (w * (r - (w * r).sum() / w.sum())).std() / w.mean() / 4000**0.5
    sd, skewness = jackknife(snips(without_each(s)))
    assert sd == pytest.approx(linear, rel=0.2)
    assert abs(skewness) < 0.2


def test_one_group_alone_has_no_interval():
    _, s = some(29)
    found = interval(s, ips)
    assert np.isfinite(found.value)
    assert np.isnan(found.low)
    assert np.isnan(found.half)
    assert np.isnan(student_t(0))
