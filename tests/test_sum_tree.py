"""The sum tree against plain arrays."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.sum_tree import tree_fill, tree_find, tree_find_all, tree_new, tree_repair, tree_set

values = st.floats(0.0, 1e6, allow_subnormal=False) | st.just(0.0)
writes = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 13), values)
    | st.tuples(st.integers(0, 12), st.none(), values)
)


def test_mass_falls_on_values_in_proportion():
    tree = tree_new(4)
    for i, value in enumerate([1.0, 0.0, 2.0, 1.0]):
        tree_set(tree, i, value)
    assert tree[1] == 4.0
    assert [tree_find(tree, mass) for mass in (0.0, 0.99, 1.0, 2.99, 3.0, 3.99)] == [0, 0, 2, 2, 3, 3]


def test_a_value_of_zero_is_never_found_even_where_rounding_carries_the_mass_too_far():
    tree = tree_new(8)
    tree_set(tree, 2, 0.1)
    tree_set(tree, 4, 0.2)
    assert tree_find(tree, 1e9) == 4
    assert tree_find(tree, tree[1]) == 4
    assert tree_find(tree, -1e-9) == 2


@settings(deadline=None)  # the first call compiles
@given(writes)
def test_a_tree_kept_up_to_date_equals_one_rebuilt_bit_for_bit(changes):
    tree, expected = tree_new(13), np.zeros(13)
    for start, end, value in changes:
        if end is None:
            tree_set(tree, start, value)
            expected[start] = value
        else:
            tree_fill(tree, start, end, value)
            expected[start:end] = value
    rebuilt = tree_new(13)
    half = len(rebuilt) // 2
    rebuilt[half : half + 13] = expected
    tree_repair(rebuilt, 0, half)
    np.testing.assert_array_equal(tree, rebuilt)
    np.testing.assert_allclose(tree[1], expected.sum())


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20).filter(any), st.data())
def test_find_agrees_with_a_running_sum(weights, data):
    tree = tree_new(len(weights))
    for i, weight in enumerate(weights):
        tree_set(tree, i, float(weight))
    mass = data.draw(st.integers(0, sum(weights) - 1))
    assert tree_find(tree, mass + 0.5) == np.searchsorted(np.cumsum(weights), mass, side="right")


@settings(deadline=None)  # the first call compiles
@given(st.lists(values, min_size=1, max_size=20), st.lists(st.floats(-0.1, 1.1), max_size=8))
def test_many_are_found_as_each_alone_is(weights, shares):
    tree = tree_new(len(weights))
    for i, weight in enumerate(weights):
        tree_set(tree, i, weight)
    mass = np.array(shares) * tree[1]
    assert tree_find_all(tree, mass).tolist() == [tree_find(tree, m) for m in mass]
