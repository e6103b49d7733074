"""What entries of histories say: the compiled loop against tensors, and both against what is meant."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner import entries
from learner.entries import AGE_BOUNDS_S, AGES, COUNTS, NAMES, PLACES, StateTensors, entries_of, place_buckets

ENTRY = st.tuples(
    st.integers(0, 5),
    st.integers(0, NAMES - 1),
    st.sampled_from([0.0, *AGE_BOUNDS_S, 14.99, 1e7]),
    st.sampled_from([0.0, 2.5, -3.0, 1e6, 1e30]),
)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(ENTRY, min_size=n, max_size=n), min_size=1)))
def test_the_loop_says_what_tensors_say(histories: list[list[tuple[int, int, float, float]]]) -> None:
    columns = np.array(histories).transpose(2, 0, 1)
    item, name = (torch.from_numpy(column.astype(np.int64)) for column in columns[:2])
    age_s, value = (torch.from_numpy(column.astype(np.float32)) for column in columns[2:])
    state = StateTensors(item * (name > 0), name, age_s, value)
    found = entries_of(state)
    assert torch.equal(found.kinds, entries.kinds_of(state))
    torch.testing.assert_close(found.counts, entries._counts(state, found.kinds))
    torch.testing.assert_close(found.back, entries.going_back(state.item))


def test_views_of_larger_tables_are_read_alike() -> None:
    wide = torch.arange(24).reshape(4, 6) % NAMES
    state = StateTensors(wide[:, ::2], wide[:, ::2], wide[:, ::2] * 20.0, wide[:, ::2] * 1.0)
    whole = StateTensors(*(column.clone() for column in state))
    for one, other in zip(entries_of(state), entries_of(whole), strict=True):
        assert torch.equal(one, other)


def test_what_was_done_is_counted_by_event_type_now_and_earlier() -> None:
    view, cart = 1, 2
    state = StateTensors(
        torch.tensor([[4, 4, 7, 0]]),
        torch.tensor([[view, view, cart, 0]]),
        torch.tensor([[10.0, 1000.0, 90000.0, 0.0]]),
        torch.tensor([[3.0, 0.0, 5.0, 0.0]]),
    )
    found = entries_of(state)
    assert found.kinds[0].tolist() == [view * AGES, view * AGES + 3, cart * AGES + 6, 0]
    expected = np.zeros(COUNTS, np.float32)
    expected[view], expected[NAMES + cart] = math.log1p(2), math.log1p(1)
    expected[2 * NAMES :] = [math.log1p(x) / 10 for x in (10, 1000, 8)] + [0, 0]
    np.testing.assert_allclose(found.counts[0], expected, rtol=1e-6)
    each = [(2 / 3) ** 0.5 / 2] * 2 + [(1 / 3) ** 0.5, 0.0]
    assert found.back[0].tolist() == pytest.approx(each)


def test_places_are_told_apart_the_nearer_the_finer() -> None:
    assert place_buckets(20).tolist() == [0, 1, 2, 3, 3, *[4] * 4, *[5] * 8, *[6] * 3]


def test_places_that_a_policy_asked_for_first_can_be_learnt_with():
    with torch.inference_mode():
        places = place_buckets(29)
    assert places.tolist() == [0, 1, 2, 3, 3, 4, 4, 4, 4, *([5] * 8), *([6] * 12)]
    weight = torch.zeros(PLACES, requires_grad=True)
    weight[place_buckets(29)].sum().backward()
    assert weight.grad.tolist() == [1, 1, 1, 2, 4, 8, 12]
