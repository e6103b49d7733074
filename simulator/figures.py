"""Means with their intervals, over shoppers or over seeds, and policies compared on the same visits."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from learner.intervals import student_t
from simulator.shop import Visits


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


class Figures(NamedTuple):
    """What a practitioner asks first about a policy."""

    ctr: float  # clicks per item shown
    reward_per_visit: float
    ci95: tuple[float, float]  # of reward_per_visit, over shoppers
    pages_per_visit: float
    purchases_per_visit: float


class Comparison(NamedTuple):
    """Four policies on the same visits."""

    policies: dict[str, Figures]
    visits: int
    shoppers: int
    gain: Interval  # learned - popularity, reward per visit
    gap_closed: Interval  # (learned - random) / (oracle - random)


def ratio_interval(
    numerator: npt.NDArray[np.floating], denominator: npt.NDArray[np.floating], who: npt.NDArray[np.integer]
) -> Interval:
    """sum(numerator) / sum(denominator) and its 95 % interval (Student's t), with `who`, the shoppers, as the units:
    one shopper's visits are alike, so they do not count as independent. The ratio is linearised (delta method). Of
    nothing it is nan; of a single shopper it has no interval (nan).

    >>> ratio_interval(np.array([1.0, 3.0, 2.0, 2.0]), np.ones(4), np.array([0, 0, 1, 1]))  # shoppers alike
    Interval(mean=2.0, low=2.0, high=2.0)
    >>> ratio_interval(np.array([1.0, 3.0]), np.ones(2), np.array([7, 7]))
    Interval(mean=2.0, low=nan, high=nan)
    """
    _, unit = np.unique(who, return_inverse=True)
    above, below = np.bincount(unit, numerator), np.bincount(unit, denominator)
    units, total = len(below), float(below.sum())
    if not total:
        return Interval(math.nan, math.nan, math.nan)
    ratio = float(above.sum()) / total
    if units < 2:
        return Interval(ratio, math.nan, math.nan)
    spread = float(np.sqrt(((above - ratio * below) ** 2).sum() * units / (units - 1)))
    half = student_t(units - 1) * spread / abs(total)
    return Interval(ratio, ratio - half, ratio + half)


def mean_interval(visits: Visits) -> Interval:
    """Mean reward of a visit, over shoppers."""
    return ratio_interval(visits.reward, np.ones(len(visits.reward)), visits.shopper)


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean over seeds (Student's t); the interval of a single one is nan.

    >>> over_seeds([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.484..., high=4.484...)
    """
    n, mean = len(values), float(np.mean(values))
    half = student_t(n - 1) * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else math.nan
    return Interval(mean, mean - half, mean + half)


def same_visits(accounts: Mapping[str, Visits], from_ms: float, to_ms: float) -> dict[str, Visits]:
    """Of each policy's account the visits that began within [from_ms, to_ms) and are over under every policy, in the
    same order. When a visit begins, and for what, does not depend on what was shown before, so they pair up.

    Leave the last hour out of to_ms: of visits that began then, only the short ones are over.
    """
    number = {name: v.shopper.astype(np.int64) << 32 | v.visit for name, v in accounts.items()}
    within = [number[name][(from_ms <= v.start_ms) & (v.start_ms < to_ms)] for name, v in accounts.items()]
    common = functools.reduce(np.intersect1d, within)
    return {name: _picked(v, np.searchsorted(number[name], common)) for name, v in accounts.items()}


def _picked(visits: Visits, rows: npt.NDArray[np.generic]) -> Visits:
    return Visits(*(column[rows] for column in visits))


def figures(visits: Visits) -> Figures:
    """One policy's figures on these visits."""
    reward, low, high = mean_interval(visits)
    return Figures(
        ctr=float(visits.clicks.sum() / max(1, visits.impressions.sum())),
        reward_per_visit=reward,
        ci95=(low, high),
        pages_per_visit=float(visits.decisions.sum() / max(1, len(visits.visit))),
        purchases_per_visit=float(visits.purchases.sum() / max(1, len(visits.visit))),
    )


def compare(paired: Mapping[str, Visits]) -> Comparison:
    """Figures of random, popularity, learned and oracle, and how they differ; paired: from `same_visits`.

    Both differences are taken visit by visit before any interval is made: most of the luck is common to all four.
    """
    random, popularity, learned, oracle = (
        paired[name].reward for name in ("random", "popularity", "learned", "oracle")
    )
    who = paired["learned"].shopper
    return Comparison(
        policies={name: figures(visits) for name, visits in paired.items()},
        visits=len(who),
        shoppers=len(np.unique(who)),
        gain=ratio_interval(learned - popularity, np.ones(len(who)), who),
        gap_closed=ratio_interval(learned - random, oracle - random, who),
    )


def without_nan(value: Any) -> Any:
    """The same with null, None, for NaN, which JSON lacks.

    >>> without_nan({"ci95": (math.nan, 2.0)})
    {'ci95': [None, 2.0]}
    """
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
