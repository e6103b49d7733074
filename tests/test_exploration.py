"""ε-greedy slates: what they hold, and with which probability."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.exploration import epsilon_greedy_slate

Q = st.lists(st.sampled_from([-1e30, -1.5, 0.0, 0.5, 2.0, 7.25]), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(Q, st.data(), st.integers(0, 45), st.sampled_from([np.float32, np.float64]))
def test_without_exploration_the_best_eligible_items_stand_in_order_and_ties_by_id(
    values: list[float], data: st.DataObject, k: int, dtype: type[np.floating]
) -> None:
    q = np.array(values, dtype)
    eligible = np.array(data.draw(st.lists(st.booleans(), min_size=len(q), max_size=len(q))))
    slate = epsilon_greedy_slate(q, eligible, k, 0.0, np.random.default_rng(0))
    ranked = sorted((i for i in range(len(q)) if eligible[i]), key=lambda i: (-q[i], i))
    assert slate.ids.tolist() == ranked[:k]
    assert slate.propensity.tolist() == [1.0] * len(slate.ids)
    assert not slate.explored.any()


def test_propensities_over_all_slates_add_up_to_one() -> None:
    q, eligible = np.array([0.5, 3.0, 9.9, 1.0, 2.0]), np.array([True, True, False, True, True])
    seen: dict[tuple[int, ...], float] = {}
    rng = np.random.default_rng(1)
    while len(seen) < len(list(permutations(range(4), 3))):
        slate = epsilon_greedy_slate(q, eligible, 3, 0.5, rng)
        seen[tuple(slate.ids.tolist())] = float(np.prod(slate.propensity))
    assert sum(seen.values()) == pytest.approx(1.0)
    assert seen[1, 4, 3] == pytest.approx((0.5 / 4 + 0.5) * (0.5 / 3 + 0.5) * (0.5 / 2 + 0.5))
    assert seen[0, 1, 3] == pytest.approx((0.5 / 4) * (0.5 / 3 + 0.5) * (0.5 / 2))


def test_slates_come_as_often_as_their_propensities_say() -> None:
    q, eligible, n = np.array([1.0, 2.0, 3.0]), np.ones(3, np.bool_), 20_000
    rng = np.random.default_rng(2)
    counts: dict[tuple[int, ...], int] = {}
    said: dict[tuple[int, ...], float] = {}
    for _ in range(n):
        slate = epsilon_greedy_slate(q, eligible, 2, 0.3, rng)
        ids = tuple(slate.ids.tolist())
        counts[ids] = counts.get(ids, 0) + 1
        said[ids] = float(np.prod(slate.propensity))
    assert len(said) == 6
    for ids, p in said.items():  # six standard deviations: by chance once in 10 ** 8 runs
        assert abs(counts[ids] - n * p) < 6 * (n * p * (1 - p)) ** 0.5


def test_a_slate_is_as_long_as_there_are_eligible_items() -> None:
    q, eligible = np.arange(5.0), np.array([True, False, True, False, False])
    slate = epsilon_greedy_slate(q, eligible, 4, 1.0, np.random.default_rng(0))
    assert sorted(slate.ids.tolist()) == [0, 2]
    assert slate.propensity.tolist() == [0.5, 1.0]
    assert len(epsilon_greedy_slate(q, ~np.ones(5, np.bool_), 4, 0.5, np.random.default_rng(0)).ids) == 0
