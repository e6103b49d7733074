"""Of the last slots given: how many items they held, and how unequally."""

import math

import numpy as np
import pytest

from serving.variety import Variety


def shown(*item_ids, last=100):
    variety = Variety(last)
    for item_id in item_ids:
        variety.saw([item_id])
    return variety


def plain_gini(counts):
    """Half the mean difference between two items, over the mean."""
    counts = np.array(counts, float)
    return np.abs(counts[:, None] - counts[None, :]).mean() / (2 * counts.mean())


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [4, 0, 0, 0], [3, 2, 1, 0], [7, 1, 1, 1], [0, 0, 0, 5, 5]])
def test_gini_is_half_the_mean_difference_over_the_mean(counts):
    variety = shown(*(f"item-{i}" for i, count in enumerate(counts) for _ in range(count)))
    assert variety.gini(len(counts)) == pytest.approx(plain_gini(counts))
    assert variety.coverage(len(counts)) == pytest.approx(
        np.count_nonzero(counts) / min(len(counts), sum(counts))
    )


def test_before_anything_was_shown_nothing_is_said():
    assert math.isnan(Variety().coverage(10))
    assert math.isnan(Variety().gini(10))


def test_only_the_last_slots_count():
    variety = shown("a", "b", "c", "c", "c", last=3)
    assert variety.coverage(4) == pytest.approx(1 / 3)
    assert variety.gini(4) == pytest.approx(0.75)


def test_items_that_went_off_offer_since_do_not_break_it():
    assert shown("a", "b", "c").gini(1) == pytest.approx(0.0)
