"""Exploration whose propensities are exact: off-policy estimates stand on them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Slate(NamedTuple):
    """K slots, best first."""

    ids: npt.NDArray[np.int64]  # [K]
    propensity: npt.NDArray[np.float64]  # [K] of this item in this slot, given the slots before it
    explored: npt.NDArray[np.bool_]  # [K] drawn uniformly (the greedy item may come up in such a draw)


def epsilon_greedy_slate(
    q: npt.NDArray[np.floating],
    eligible: npt.NDArray[np.bool_],
    k: int,
    epsilon: float,
    rng: np.random.Generator,
) -> Slate:
    """Fill up to k slots one by one: with probability ε uniformly from the eligible items left, else by highest q.

        P(a in slot | slots before) = ε / |left| + (1 - ε) [a is the best left]

    q: [N]; eligible: [N]; equal q: the lower id is better. Fewer than k slots come back when fewer items are eligible.
    """
    left = int(np.count_nonzero(eligible))
    k = min(k, left)
    explored = rng.random(k) < epsilon
    ids, propensity = np.empty(k, np.int64), np.empty(k)
    best = iter(_best(q, eligible, k))
    taken: set[int] = set()
    greedy = next(best, -1)
    for slot in range(k):
        while greedy in taken:
            greedy = next(best)
        ids[slot] = _draw(eligible, taken, left, rng) if explored[slot] else greedy
        propensity[slot] = epsilon / left + (1.0 - epsilon) * (ids[slot] == greedy)
        taken.add(int(ids[slot]))
        left -= 1
    return Slate(ids, propensity, explored)


def _best(q: npt.NDArray[np.floating], eligible: npt.NDArray[np.bool_], k: int) -> list[int]:
    """The k eligible items of highest q, best first. Whatever was taken before, the best left is among them."""
    score = np.where(eligible, q, -np.inf)
    if 0 < k < len(score):
        threshold = np.partition(score, len(score) - k)[len(score) - k]
        among = np.flatnonzero(score >= threshold)
    else:
        among = np.arange(len(score))
    among = among[eligible[among]]
    order = np.argsort(-score[among], kind="stable")
    return [int(i) for i in among[order][:k]]


def _draw(eligible: npt.NDArray[np.bool_], taken: set[int], left: int, rng: np.random.Generator) -> int:
    """One of the `left` eligible items that are not taken, uniformly."""
    for _ in range(64):  # rejection is quick unless nearly nothing is eligible
        i = int(rng.integers(len(eligible)))
        if eligible[i] and i not in taken:
            return i
    rest = [i for i in np.flatnonzero(eligible) if i not in taken]
    return int(rest[rng.integers(left)])
