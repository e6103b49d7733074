"""What users went to around the same time: a streaming item-to-item table, of bounded size.

Item-kNN over co-visits is the rule to beat for next items (Ludewig & Jannach 2018): it knows after one step what a
network wants hundreds for. Each step of a user to an item counts it as a neighbour of the few items that the user was
at before, the more the more recent those are, and less so the other way round:

    score(s, a) = Σ_h 1 / (h + 1) · count(item_h, a) / (Σ_b count(item_h, b) + PRIOR)  +  own(h) where a is item h

over the distinct items of the history, newest first (h = 0, 1, ...).

Most items have few neighbours that anybody went to, but their neighbours have some. So `walks` also tells where one
comes to in two steps, by the neighbours' first ones (a random walk on the graph of items: P3, Cooper et al. 2014):

    walk(a, b) = P(a, b) + HOP · Σ_c P(a, c) P(c, b)        P(a, b) = count(a, b) / (Σ_b count(a, b) + PRIOR)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from streaming.jit import jit

NEIGHBOURS: Final = 64  # kept of an item; the rarest makes room
WINDOW: Final = 5  # items before a step that are its neighbours
BACKWARDS: Final = np.float32(0.7)  # weight of the neighbour that came before
# of a count: beyond that the least that is added would be rounded, and at 2^24 be nothing. Then an item's counts and
# total are halved, so that what it leads to stays as likely; what was so long ago also fades
MOST: Final = np.float32(1 << 18)
PRIOR: Final = np.float32(5.0)  # counts below which an item's neighbours say little
HOP: Final = np.float32(3.0)  # weight of two steps: on them lies most of what is yet to be seen
BRANCHES: Final = 16  # neighbours of a neighbour looked at, the most counted
WALKED: Final = 32  # places kept that a walk leads to
OWN: Final = (np.float32(0.3), np.float32(0.05))  # own(h) = OWN[0] / (h + 1) + OWN[1]

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class CoViews:
    """The table. Vocabulary ids are rows; row 0 is the unknown item, of which nothing is kept."""

    def __init__(self) -> None:
        self._id = np.zeros((1, NEIGHBOURS), np.int32)  # [N, M] 0: free
        self._count = np.zeros((1, NEIGHBOURS), np.float32)  # [N, M]
        self._total = np.zeros(1)  # [N] of all that were counted

    def grow(self, rows: int) -> None:
        """Make room for ids below `rows`, by doubling."""
        if rows > len(self._total):
            more = max(rows, 2 * len(self._total)) - len(self._total)
            self._id = np.pad(self._id, ((0, more), (0, 0)))
            self._count = np.pad(self._count, ((0, more), (0, 0)))
            self._total = np.pad(self._total, (0, more))

    def observe(self, history: Ints, item: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Steps to items [B], each from a history [B, H], newest first, 0 unknown or padding. There is room. Returns
        the items whose neighbours are others now, or count otherwise, ascending."""
        changed = np.zeros(len(self._total), np.bool_)
        _observe(self._id, self._count, self._total, history, item.astype(np.int32), changed)
        return np.flatnonzero(changed)

    def scores(self, history: Ints, items: int) -> Floats:
        """[B, items] of vocabulary ids 0..items - 1, of which there is room."""
        out = np.zeros((len(history), items), np.float32)
        _score(
            self._id,
            self._count,
            (self._total + PRIOR).astype(np.float32),
            history.astype(np.int64),
            history,
            out,
        )
        return out

    def walk_scores(self, history: Ints, items: int) -> Floats:
        """The same by walk(item_h, a) in place of P(item_h, a): [B, items]."""
        out = np.zeros((len(history), items), np.float32)
        met, rows = np.unique(history, return_inverse=True)
        to, weight = self.walks(met)
        _score(to, weight, np.ones(len(met), np.float32), rows.reshape(history.shape), history, out)
        return out

    def walks(self, items: npt.NDArray[np.integer]) -> tuple[Ints, Floats]:
        """Where walks from these items [R], of which there is room, lead most: vocabulary ids, 0 where there are no
        more, and walk(a, b), falling, [R, WALKED] each."""
        to = np.zeros((len(items), WALKED), np.int32)
        weight = np.zeros((len(items), WALKED), np.float32)
        _walk(self._id, self._count, self._total, items.astype(np.int32), to, weight)
        return to, weight

    def nearest(self, items: npt.NDArray[np.integer], places: int) -> Ints:
        """Each of these items [R], of which there is room, and the neighbours that were gone to most often around the
        same time, over the root of how often either is gone to at all, [R, places] vocabulary ids; 0: no more."""
        near = np.zeros((len(items), places), np.int32)
        _find_nearest(self._id, self._count, self._total, items.astype(np.int32), near)
        return near

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything. Copies."""
        return {name: getattr(self, f"_{name}").copy() for name in _STATE}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go back to what `state` gave."""
        for name in _STATE:
            setattr(self, f"_{name}", state[name].copy())


_STATE: Final = ("id", "count", "total")


@jit
def _observe(
    ids: Ints,
    count: Floats,
    total: npt.NDArray[np.float64],
    history: Ints,
    item: Ints,
    changed: npt.NDArray[np.bool_],
) -> None:
    for b in range(len(item)):
        if item[b] == 0:
            continue
        place = 0
        for h in range(history.shape[1]):
            before = history[b, h]
            if before == 0 or again(history[b], h):
                continue
            if before != item[b]:
                weight = np.float32(1) / np.float32(place + 1)
                _add(ids[before], count[before], item[b], weight)
                _add(ids[item[b]], count[item[b]], before, BACKWARDS * weight)
                total[before] += weight
                total[item[b]] += BACKWARDS * weight
                _halve(count[before], total, before)
                _halve(count[item[b]], total, item[b])
                changed[before] = changed[item[b]] = True
            place += 1
            if place == WINDOW:
                break


@jit
def again(history: Ints, h: int) -> bool:
    """Whether a newer entry is of the same item."""
    for newer in range(h):  # noqa: SIM110 (compiled)
        if history[newer] == history[h]:
            return True
    return False


@jit
def _add(ids: Ints, count: Floats, item: np.int32, weight: np.float32) -> None:
    """Count a neighbour among those of an item, the most counted first, of equals the latest. Where there is no place
    left, the last pays for it, and is gone when it has nothing left (Misra & Gries 1982, of one counter at a time).
    """
    m = 0
    while m < len(ids) and ids[m] != item and ids[m] != 0:
        m += 1
    if m == len(ids):
        m -= 1
        if count[m] > weight:
            count[m] -= weight
            return
        count[m] = 0
    weight += count[m]
    while m > 0 and count[m - 1] <= weight:
        ids[m], count[m] = ids[m - 1], count[m - 1]
        m -= 1
    ids[m], count[m] = item, weight


@jit
def _halve(count: Floats, total: npt.NDArray[np.float64], item: np.int32) -> None:
    """Make room for more, where an item's counts have none: the first is the largest."""
    if count[0] > MOST:
        count *= np.float32(0.5)
        total[item] *= 0.5


@jit
def _score(
    to: Ints, weight: Floats, size: Floats, rows: npt.NDArray[np.int64], history: Ints, out: Floats
) -> None:
    """Add up what the histories' items [B, H] lead to. rows: [B, H] that they are of to and weight [R, M], and of size
    [R], in which weights count."""
    for b in range(len(history)):
        place = 0
        for h in range(history.shape[1]):
            if history[b, h] == 0 or again(history[b], h):
                continue
            row = rows[b, h]
            near = np.float32(1) / np.float32(place + 1)
            each = near / size[row]
            for m in range(to.shape[1]):
                if to[row, m] == 0:
                    break
                if to[row, m] < out.shape[1]:
                    out[b, to[row, m]] += each * weight[row, m]
            out[b, history[b, h]] += OWN[0] * near + OWN[1]
            place += 1


@jit
def _walk(
    ids: Ints, count: Floats, total: npt.NDArray[np.float64], items: Ints, to: Ints, weight: Floats
) -> None:
    sums = np.zeros(len(total), np.float32)
    met = np.empty(ids.shape[1] * (ids.shape[1] + 1), np.int32)
    for r in range(len(items)):
        start = items[r]
        n = 0
        for m in range(ids.shape[1]):
            first = ids[start, m]
            if first == 0:
                break
            chance = count[start, m] / (total[start] + PRIOR)
            n = _meet(sums, met, n, first, chance)
            chance *= HOP / (total[first] + PRIOR)
            for k in range(min(BRANCHES, ids.shape[1])):
                second = ids[first, k]
                if second == 0:
                    break
                if second != start:
                    n = _meet(sums, met, n, second, chance * count[first, k])
        for m in range(n):
            _place(to[r], weight[r], met[m], sums[met[m]])
            sums[met[m]] = 0


@jit
def _find_nearest(ids: Ints, count: Floats, total: npt.NDArray[np.float64], items: Ints, near: Ints) -> None:
    cosine = np.empty(near.shape[1] - 1, np.float32)
    for r in range(len(items)):
        cosine[:] = 0
        near[r, 0] = items[r]
        for m in range(ids.shape[1]):
            other = ids[items[r], m]
            if other == 0:
                break
            # the item's own total is the same for all
            _place(near[r, 1:], cosine, other, np.float32(count[items[r], m] / np.sqrt(total[other] + PRIOR)))


@jit
def _meet(sums: Floats, met: Ints, n: int, item: np.int32, chance: np.float32) -> int:
    """Add to the item's sum; how many have been met by now."""
    if sums[item] == 0:
        met[n] = item
        n += 1
    sums[item] += chance
    return n


@jit
def _place(to: Ints, weight: Floats, item: np.int32, sum_: np.float32) -> None:
    """Put an item where it belongs among the heaviest, if it does; of equals the first met comes first."""
    m = len(weight) - 1
    if sum_ <= weight[m]:
        return
    while m > 0 and weight[m - 1] < sum_:
        to[m], weight[m] = to[m - 1], weight[m - 1]
        m -= 1
    to[m], weight[m] = item, sum_
