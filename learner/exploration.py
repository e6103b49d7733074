"""Exploration whose propensities are exact: off-policy estimates stand on them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from streaming.jit import jit


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

    q: [N], no NaN; eligible: [N]; equal q: the lower id is better. Fewer than k slots come back when fewer items are
    eligible.
    """
    left = int(np.count_nonzero(eligible))
    k = min(k, left)
    explored = rng.random(k) < epsilon
    ids, propensity = np.empty(k, np.int64), np.empty(k)
    best = iter(best_ids(q, eligible, k).tolist())
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


@jit
def best_ids(q: npt.NDArray[np.floating], eligible: npt.NDArray[np.bool_], k: int) -> npt.NDArray[np.int64]:
    """[k] the eligible items of highest q, best first. Whatever was taken before, the best left is among them.

    k: at most as many as are eligible. One pass with a heap of the k best so far, the worst of them at its root.
    """
    heap = np.empty(k, np.int64)
    size = 0
    for i in range(len(q)):
        if not eligible[i]:
            continue
        if size < k:
            heap[size] = i
            size += 1
            if size == k:
                for root in range(k // 2 - 1, -1, -1):
                    _sink(q, heap, root, k)
        elif k and q[i] > q[heap[0]]:  # an equal one has the higher id, and so is worse
            heap[0] = i
            _sink(q, heap, 0, k)
    for end in range(k - 1, 0, -1):
        heap[0], heap[end] = heap[end], heap[0]
        _sink(q, heap, 0, end)
    return heap


@jit
def _sink(q: npt.NDArray[np.floating], heap: npt.NDArray[np.int64], at: int, size: int) -> None:
    """Move the entry at `at` down until no child of it is worse."""
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and _worse(q, heap[child + 1], heap[child]):
            child += 1
        if not _worse(q, heap[child], heap[at]):
            return
        heap[at], heap[child] = heap[child], heap[at]
        at = child


@jit
def _worse(q: npt.NDArray[np.floating], a: int, b: int) -> bool:
    return q[a] < q[b] or (q[a] == q[b] and a > b)


def _draw(eligible: npt.NDArray[np.bool_], taken: set[int], left: int, rng: np.random.Generator) -> int:
    """One of the `left` eligible items that are not taken, uniformly."""
    for _ in range(64):  # rejection is quick unless nearly nothing is eligible
        i = int(rng.integers(len(eligible)))
        if eligible[i] and i not in taken:
            return i
    rest = [i for i in np.flatnonzero(eligible) if i not in taken]
    return int(rest[rng.integers(left)])
