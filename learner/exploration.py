"""Exploration whose propensities are exact: off-policy estimates stand on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from streaming.jit import jit

EPSILON: Final = 0.05  # share of slots drawn uniformly where nobody says


class Slate(NamedTuple):
    """K slots, best first."""

    ids: npt.NDArray[np.int64]  # [K]
    propensity: npt.NDArray[np.float64]  # [K] of this item in this slot, given the slots before it
    explored: npt.NDArray[np.bool_]  # [K] drawn uniformly (the greedy item may come up in such a draw)


Kind = Literal["greedy", "boltzmann", "thompson"]


@dataclass(frozen=True)
class Exploration:
    """What fills the slots that are not drawn uniformly.

    greedy: always the best (ε-greedy). boltzmann: by chance, the likelier the higher Q. thompson: the best by one draw
    from what is believed of how each item answers (learner.response), so that an item is tried as often as it may be
    the best.
    """

    kind: Kind = "greedy"
    temperature: float = 0.1  # boltzmann; see `_Boltzmann`
    scale: float = 0.5  # thompson; of the standard deviation of what is believed

    def __post_init__(self) -> None:
        for name in ("temperature", "scale"):
            if not 1e-6 <= getattr(self, name) <= 1e6:
                raise ValueError(f"{name} must be within 0.000001..1000000, not {getattr(self, name)}")

    def __str__(self) -> str:
        """For records of what was shown; empty for what they say of themselves."""
        number = {"boltzmann": f" temperature={self.temperature:g}", "thompson": f" scale={self.scale:g}"}
        return "" if self.kind == "greedy" else self.kind + number[self.kind]


GREEDY: Final = Exploration()
KINDS: Final = get_args(Kind)
DRAWS: Final = 16  # from what is believed, for one answer


class Scores(NamedTuple):
    """What a policy says of N items for one user."""

    q: npt.NDArray[np.float32]  # [N]
    drawn: npt.NDArray[np.float32] | None = None  # [DRAWS, N] for thompson: as Q may be


def explore(
    exploration: Exploration,
    scores: Scores,
    eligible: npt.NDArray[np.bool_],
    k: int,
    epsilon: float,
    rng: np.random.Generator,
) -> Slate:
    """Fill up to k slots one by one: with probability ε uniformly from the eligible items left, else as `exploration`
    says.

        P(a in slot | slots before) = ε / |left| + (1 - ε) π(a | left)

    These are exact, for thompson too: what is drawn from is one of DRAWS, and π is the share of these in which a is the
    best left, given these. Fewer than k slots come back when fewer items are eligible. eligible: [N]; no NaN in scores.
    """
    left = int(np.count_nonzero(eligible))
    k = min(k, left)
    explored = rng.random(k) < epsilon
    rule: _Rule
    if exploration.kind == "boltzmann":
        rule = _Boltzmann(scores.q, eligible, k, exploration.temperature, rng)
    elif exploration.kind == "thompson" and scores.drawn is not None:
        rule = _Ensemble(scores.drawn, eligible, k, rng)
    else:
        rule = _Best(scores.q, eligible, k)
    ids, propensity = np.empty(k, np.int64), np.empty(k)
    taken: set[int] = set()
    for slot in range(k):
        own = rule.next(taken)
        item = _draw(eligible, taken, left, rng) if explored[slot] else own
        ids[slot], propensity[slot] = item, epsilon / left + (1.0 - epsilon) * rule.chance(item)
        taken.add(item)
        left -= 1
    return Slate(ids, propensity, explored)


def epsilon_greedy_slate(
    q: npt.NDArray[np.floating],
    eligible: npt.NDArray[np.bool_],
    k: int,
    epsilon: float,
    rng: np.random.Generator,
) -> Slate:
    """`explore` with the best: P(a in slot | slots before) = ε / |left| + (1 - ε) [a is the best left].

    q: [N], no NaN; eligible: [N]; equal q: the lower id is better.
    """
    return explore(GREEDY, Scores(q), eligible, k, epsilon, rng)


class _Rule(Protocol):
    """Fills slots from the items left. `taken` only ever grows."""

    def next(self, taken: set[int]) -> int:
        """Its choice for the next slot."""

    def chance(self, item: int) -> float:
        """Probability with which `next`, as called last, would have chosen this item."""


class _Best:
    """The highest first."""

    def __init__(self, q: npt.NDArray[np.floating], eligible: npt.NDArray[np.bool_], k: int) -> None:
        self._best = iter(best_ids(q, eligible, k).tolist())
        self._item = next(self._best, -1)

    def next(self, taken: set[int]) -> int:
        """See _Rule."""
        while self._item in taken:
            self._item = next(self._best)
        return self._item

    def chance(self, item: int) -> float:
        """See _Rule."""
        return float(item == self._item)


class _Boltzmann:
    """π(a | left) ~ exp(Q(a) / T), T being `temperature` times how far the best is above the mean of all: in units of
    the scores themselves, so that neither a currency nor a value that all items share matters.

    Drawn by Gumbel's trick: the highest of x + noise first, which is drawing without replacement (Kool et al. 2019).
    """

    def __init__(
        self,
        q: npt.NDArray[np.floating],
        eligible: npt.NDArray[np.bool_],
        k: int,
        temperature: float,
        rng: np.random.Generator,
    ) -> None:
        values = np.where(eligible, q, 0.0).astype(np.float64)
        n = max(1, int(np.count_nonzero(eligible)))
        top = float(values[eligible].max(initial=-np.inf))
        unit = temperature * (top - values.sum() / n)
        self._x = np.full(len(values), -np.inf)  # log of π, but for a constant
        self._x[eligible] = (values[eligible] - top) / unit if unit > 0 else 0.0
        noisy = self._x + rng.gumbel(size=len(values))
        self._order = _Best(noisy, eligible, k)
        self._gone: set[int] = set()
        self._total = 1.0

    def next(self, taken: set[int]) -> int:
        """See _Rule."""
        for item in taken - self._gone:
            self._x[item] = -np.inf
        self._gone |= taken
        self._x -= self._x.max()  # of those left: the sum must not vanish
        self._total = float(np.exp(self._x).sum())
        return self._order.next(taken)

    def chance(self, item: int) -> float:
        """See _Rule."""
        return float(np.exp(self._x[item])) / self._total


class _Ensemble:
    """The best of one of M rankings, each as likely."""

    def __init__(
        self,
        drawn: npt.NDArray[np.floating],
        eligible: npt.NDArray[np.bool_],
        k: int,
        rng: np.random.Generator,
    ) -> None:
        self._rankings = [_Best(q, eligible, k) for q in drawn]
        self._rng = rng
        self._heads: list[int] = []

    def next(self, taken: set[int]) -> int:
        """See _Rule."""
        self._heads = [ranking.next(taken) for ranking in self._rankings]
        return self._heads[int(self._rng.integers(len(self._heads)))]

    def chance(self, item: int) -> float:
        """See _Rule."""
        return self._heads.count(item) / len(self._heads)


def compile_exploration() -> None:
    """Have the loops compiled: for Q (float32), and for popularity and what Boltzmann draws (float64)."""
    for scores in (np.zeros(2, np.float32), np.zeros(2)):
        best_ids(scores, np.ones(2, np.bool_), 1)


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
