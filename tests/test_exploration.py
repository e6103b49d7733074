"""Slates that explore: every propensity against an enumeration of all slates there are, and against how often each
comes up."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.exploration import DRAWS, Exploration, Scores, epsilon_greedy_slate, explore

ALL = np.ones(5, np.bool_)


def chances(q, eligible, k, epsilon):
    """{slate: [probability of each slot, given those before]} by the definition."""
    out = {}
    items = [int(i) for i in np.flatnonzero(eligible)]
    for slate in permutations(items, min(k, len(items))):
        slots = []
        for n, item in enumerate(slate):
            left = [i for i in items if i not in slate[:n]]
            best = min(left, key=lambda i: (-q[i], i))
            slots.append(epsilon / len(left) + (1 - epsilon) * (item == best))
        out[slate] = slots
    return out


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-2, 2), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_propensities_are_those_of_the_definition(q, mask, k, epsilon, seed):
    scores, eligible = np.array(q, np.float32), np.array(mask[: len(q)])
    slate = epsilon_greedy_slate(scores, eligible, k, epsilon, np.random.default_rng(seed))
    expected = chances(scores, eligible, k, epsilon)
    assert slate.propensity.tolist() == pytest.approx(expected[tuple(slate.ids.tolist())])
    assert sum(np.prod(slots) for slots in expected.values()) == pytest.approx(1.0)


def test_slates_come_up_as_often_as_their_propensities_say():
    q, k, epsilon, draws = np.array([0.0, 2.0, 1.0, 2.0, -1.0], np.float32), 2, 0.4, 20_000
    rng = np.random.default_rng(0)
    seen = Counter(tuple(epsilon_greedy_slate(q, ALL, k, epsilon, rng).ids.tolist()) for _ in range(draws))
    for slate, slots in chances(q, ALL, k, epsilon).items():
        p = float(np.prod(slots))
        # five standard deviations, 20 slates: fails by chance less than once in 80,000 seeds; this seed is fixed
        assert abs(seen[slate] - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5


def test_without_exploration_the_best_come_in_order_and_ties_go_to_the_lower_id():
    q = np.array([1.0, 3.0, 3.0, 2.0, 0.0], np.float32)
    slate = epsilon_greedy_slate(q, ALL, 3, 0.0, np.random.default_rng(0))
    assert slate.ids.tolist() == [1, 2, 3]
    assert slate.propensity.tolist() == [1.0, 1.0, 1.0]
    assert not slate.explored.any()


def test_no_item_comes_twice_and_none_that_is_not_eligible():
    eligible = np.array([True, False, True, True, False])
    rng = np.random.default_rng(0)
    for _ in range(200):
        slate = epsilon_greedy_slate(np.zeros(5, np.float32), eligible, 5, 0.7, rng)
        assert sorted(slate.ids.tolist()) == [0, 2, 3]


def test_nothing_eligible_gives_an_empty_slate():
    slate = epsilon_greedy_slate(np.zeros(5, np.float32), ~ALL, 3, 0.5, np.random.default_rng(0))
    assert slate.ids.tolist() == slate.propensity.tolist() == []


def test_a_slot_that_was_drawn_is_marked_even_where_it_drew_the_best():
    slate = epsilon_greedy_slate(np.array([1.0]), np.ones(1, np.bool_), 1, 1.0, np.random.default_rng(0))
    assert slate.ids.tolist() == [0]
    assert slate.explored.tolist() == [True]
    assert slate.propensity.tolist() == [1.0]


def test_a_few_eligible_among_very_many_are_found():
    eligible = np.zeros(100_000, np.bool_)
    eligible[[7, 70_000]] = True
    slate = epsilon_greedy_slate(np.zeros(100_000, np.float32), eligible, 2, 1.0, np.random.default_rng(0))
    assert sorted(slate.ids.tolist()) == [7, 70_000]
    assert slate.propensity.tolist() == [0.5, 1.0]


# --- other than the best


def of_boltzmann(q, temperature):
    """π(a | left) by the definition. q: {item: of those eligible}."""
    unit = temperature * (max(q.values()) - sum(q.values()) / len(q)) if q else 0.0

    def chance(item, left):
        if unit <= 0:
            return 1 / len(left)
        return 1 / sum(np.exp((q[i] - q[item]) / unit) for i in left)

    return chance


def of_ensemble(drawn):
    """π(a | left) by the definition, given the draws."""

    def chance(item, left):
        return float(np.mean([min(left, key=lambda i, q=q: (-q[i], i)) == item for q in drawn]))

    return chance


def by_definition(policy, items, k, epsilon):
    """{slate: [probability of each slot, given those before]}, of slates that can come up."""
    out = {}
    for slate in permutations(items, min(k, len(items))):
        slots = []
        for n, item in enumerate(slate):
            left = [i for i in items if i not in slate[:n]]
            slots.append(epsilon / len(left) + (1 - epsilon) * policy(item, left))
        if all(slots):
            out[slate] = slots
    return out


RULES = {
    "boltzmann": (Exploration("boltzmann", temperature=0.5), lambda q, drawn: of_boltzmann(q, 0.5)),
    "thompson": (Exploration("thompson"), lambda q, drawn: of_ensemble(drawn)),
}


@pytest.mark.parametrize("kind", RULES)
@settings(max_examples=200, deadline=None)
@given(
    q=st.lists(st.integers(-2, 2), min_size=1, max_size=5),
    mask=st.lists(st.booleans(), min_size=5, max_size=5),
    k=st.integers(1, 6),
    epsilon=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_propensities_of_other_explorations_are_those_of_the_definition(kind, q, mask, k, epsilon, seed):
    rng = np.random.default_rng(seed)
    scores, eligible = np.array(q, np.float32), np.array(mask[: len(q)])
    drawn = (scores + rng.normal(0, 1.5, (DRAWS, len(q)))).astype(np.float32)
    exploration, definition = RULES[kind]
    slate = explore(exploration, Scores(scores, drawn), eligible, k, epsilon, rng)
    items = [int(i) for i in np.flatnonzero(eligible)]
    expected = by_definition(definition({i: q[i] for i in items}, drawn), items, k, epsilon)
    assert slate.propensity.tolist() == pytest.approx(expected[tuple(slate.ids.tolist())])
    assert sum(np.prod(slots) for slots in expected.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_other_explorations_come_up_as_often_as_their_propensities_say(kind, epsilon):
    q, k, draws = np.array([0.0, 2.0, 1.0, 2.0, -1.0], np.float32), 2, 20_000
    rng = np.random.default_rng(1)
    drawn = (q + rng.normal(0, 2.0, (DRAWS, 5))).astype(np.float32)
    exploration, definition = RULES[kind]
    seen = Counter(
        tuple(explore(exploration, Scores(q, drawn), ALL, k, epsilon, rng).ids.tolist()) for _ in range(draws)
    )
    expected = by_definition(definition(dict(enumerate(q.tolist())), drawn), range(5), k, epsilon)
    assert set(seen) <= set(expected)
    for slate, slots in expected.items():
        p = float(np.prod(slots))
        assert abs(seen[slate] - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5


def test_boltzmann_knows_neither_currency_nor_what_all_items_share():
    q = np.random.default_rng(2).normal(size=50).astype(np.float32)
    everything = np.ones(50, np.bool_)

    def slate(scores):
        return explore(
            Exploration("boltzmann"), Scores(scores), everything, 10, 0.1, np.random.default_rng(3)
        )

    here, there = slate(q), slate(1024 * q)
    assert here.ids.tolist() == there.ids.tolist()
    assert here.propensity.tolist() == there.propensity.tolist()
    assert slate(q + 16).ids.tolist() == here.ids.tolist()


def test_boltzmann_at_a_low_temperature_is_greedy_and_its_chances_stay_numbers():
    q = np.array([0.0, 1000.0, 999.0, 1.0, -5000.0], np.float32)
    slate = explore(Exploration("boltzmann", 1e-6), Scores(q), ALL, 5, 0.0, np.random.default_rng(0))
    assert slate.ids.tolist() == [1, 2, 3, 0, 4]
    assert (
        slate.propensity.tolist() == [1.0] * 5
    )  # that of the last of all but one vanishes beside the first's


def test_what_to_call_an_exploration():
    assert [str(Exploration()), str(Exploration("boltzmann")), str(Exploration("thompson", scale=2.0))] == [
        "",
        "boltzmann temperature=0.1",
        "thompson scale=2",
    ]
    with pytest.raises(ValueError, match=r"temperature must be within 0\.000001\.\.1000000, not 0"):
        Exploration("boltzmann", 0.0)
