"""The chances of an ε-greedy slate, each against an enumeration of all slates there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.evaluation import fewer
from learner.exploration import epsilon_greedy_slate
from learner.slate_chances import chance_table, judge, shown_chances


def chances(left, scores, epsilon):
    """{item: probability to be shown next} by the definition."""
    best = min(left, key=lambda i: (-scores[i], i))
    return {i: epsilon / len(left) + (1 - epsilon) * (i == best) for i in left}


def onward(items, scores, epsilon, slots, earns, slate=()):
    """Expected sum of earns(slot, item) over the slots that the slate lacks."""
    k, left = len(slate), [i for i in items if i not in slate]
    if k == slots:
        return 0.0
    return sum(
        p * (earns(k, i) + onward(items, scores, epsilon, slots, earns, (*slate, i)))
        for i, p in chances(left, scores, epsilon).items()
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([0.0, 0.1, 0.6, 1.0]))
def test_each_item_is_shown_as_often_as_the_enumeration_says(items, slots, epsilon):
    slots = min(slots, items)
    found = shown_chances(items, slots, epsilon)
    scores = -np.arange(items)
    wanted = [onward(range(items), scores, epsilon, slots, lambda k, i, r=r: i == r) for r in range(items)]
    assert found[:slots] == pytest.approx(wanted[:slots], abs=1e-12)
    if items > slots:
        assert found[slots] == pytest.approx(wanted[slots], abs=1e-12)
    assert found[:slots].sum() + (items - slots) * found[slots] * (items > slots) == pytest.approx(slots)


def test_in_a_large_catalog_they_are_what_is_drawn():
    rng, count = np.random.default_rng(1), np.zeros(300)
    scores = -np.arange(300.0)
    for _ in range(20_000):
        count[epsilon_greedy_slate(scores, np.ones(300, np.bool_), 5, 0.5, rng).ids] += 1
    found = shown_chances(300, 5, 0.5)
    sd = np.sqrt(found * (1 - found) / 20_000)
    assert (np.abs(count[:5] / 20_000 - found[:5]) < 5 * sd[:5]).all()
    assert abs(count[5:].mean() / 20_000 - found[5]) < 5 * sd[5] / 295**0.5


def test_a_table_holds_what_is_left_at_each_slot():
    table = chance_table(6, 3, 4, 0.3)
    assert table.shape == (4, 5)
    for k in range(3):
        wanted = shown_chances(6 - k, 3 - k, 0.3)
        assert table[k, : 3 - k].tolist() == wanted[:-1].tolist()
        assert table[k, -1] == wanted[-1]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_a_logged_slate_is_judged_as_the_enumeration_does(m, slots, epsilon, mask, known, seed):
    rng = np.random.default_rng(seed)
    could = [i for i in range(m) if mask[i]] or [0]  # be shown; and by the target:
    items = [i for i in could if known[i]] if rng.random() < 0.5 else could
    slots = min(slots, len(could))
    slate = rng.permutation(could)[:slots].tolist()
    scores, value, effect = rng.integers(-2, 3, m), rng.normal(size=m), rng.normal(size=5)
    eligible = np.isin(np.arange(m), items)[None]
    padded = np.full((1, 5), -1)
    padded[0, :slots] = slate
    all_of_them = np.isin(np.arange(m), could)[None]
    uniform = np.pad(1.0 / (len(could) - np.arange(slots)), (0, 5 - slots))[None]
    uniform = uniform * fewer(all_of_them, eligible, padded)
    found = judge(scores[None].astype(float), eligible, value[None], effect, padded, uniform, epsilon)

    def earns(k, i):
        return effect[k] + value[i]

    fills = min(slots, len(items))
    for k, item in enumerate(slate):
        before = slate[:k]
        left = [i for i in items if i not in before]
        chance = chances(left, scores, epsilon) if left else {}
        assert found.chance[0, k] == pytest.approx(chance.get(item, 0.0))
        assert found.own[0, k] == pytest.approx(earns(k, item))
        assert found.here[0, k] == pytest.approx(sum(p * earns(k, i) for i, p in chance.items()))
        possible = set(before) <= set(items)
        wanted = onward(items, scores, epsilon, fills, earns, tuple(before)) if possible and left else 0.0
        assert found.onward[0, k] == pytest.approx(wanted)
    assert not any(column[0, slots:].any() for column in found)
