"""What a shop would try first, beside ours: rules and small bandits over the same events.

The two bandits see what the learner sees, and as soon: each slate with its outcome once the next page opens, warm-up
included. A slate of one is all that they know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.gym_bridge.storefront import Deed, Page

EPSILON: Final = 0.02  # of the bandit that does not sample
PRIOR_CTR: Final = 0.01


class SimpleAgent:
    """Counts looks, and tells its kind when a slate's outcome is known."""

    def __init__(self, item_ids: Sequence[str], seed: int) -> None:
        self.rng = np.random.default_rng([seed, 41])
        self.items = len(item_ids)
        self.looks = np.zeros(self.items)  # of this user, by item
        self.all_looks = np.zeros(self.items)
        self.last = -1  # item looked at last by this user; -1: none
        self._item_ids = list(item_ids)
        self._row = {item_id: row for row, item_id in enumerate(item_ids)}
        self._user_id = ""
        self._open: int | None = None  # shown, outcome not known

    def choose(self) -> int:
        """What to show now."""
        raise NotImplementedError

    def saw(self, item: int, clicked: bool) -> None:
        """What came of showing this, to the user as it was then."""

    def did(self, user_id: str, deeds: Sequence[Deed], times_ms: Sequence[int]) -> None:
        """See Recommender."""
        self._close(any(deed.from_slate for deed in deeds))
        self._meet(user_id)
        for deed in deeds:
            if not deed.from_slate:
                self.last = self._row[deed.item_id]
                self.looks[self.last] += 1
                self.all_looks[self.last] += 1

    def recommend(self, user_id: str, page: Page, now_ms: int) -> list[str]:
        """See Recommender."""
        self._close(False)
        self._meet(user_id)
        self._open = self.choose()
        return [self._item_ids[self._open]]

    def shown(self, user_id: str, page: Page, slate: Sequence[str], propensity: float, now_ms: int) -> None:
        """See Recommender."""
        self._close(False)
        self._meet(user_id)
        self._open = self._row[slate[0]]

    def _close(self, clicked: bool) -> None:
        if self._open is not None:
            self.saw(self._open, clicked)
            self._open = None

    def _meet(self, user_id: str) -> None:
        if user_id != self._user_id:
            self._user_id, self.last = user_id, -1
            self.looks[:] = 0


class Popularity(SimpleAgent):
    """What all users look at most."""

    def choose(self) -> int:
        return int(self.all_looks.argmax())


class LastViewed(SimpleAgent):
    """What the user looked at last."""

    def choose(self) -> int:
        return self.last if self.last >= 0 else int(self.all_looks.argmax())


class MostViewed(SimpleAgent):
    """What the user looked at most; of several, what all look at most."""

    def choose(self) -> int:
        most = self.looks == self.looks.max()
        return int(np.where(most, self.all_looks, -1.0).argmax())


class Thompson(SimpleAgent):
    """Thompson sampling over items, clicks of each ~ Bernoulli with a Beta prior; knows no users."""

    def __init__(self, item_ids: Sequence[str], seed: int) -> None:
        super().__init__(item_ids, seed)
        self._clicks = np.ones(self.items)
        self._misses = np.full(self.items, 1.0 / PRIOR_CTR - 1.0)

    def choose(self) -> int:
        return int(self.rng.beta(self._clicks, self._misses).argmax())

    def saw(self, item: int, clicked: bool) -> None:
        (self._clicks if clicked else self._misses)[item] += 1


class Logistic(SimpleAgent):
    """On-line logistic regression for each item, epsilon-greedy (Li et al. 2010's disjoint model with a logistic link).

        log-odds of a click on a = w_a . x + u x_a,   x = [1, the user's looks by item, of length 1]

    Gaussian prior on w, a diagonal Laplace posterior followed on line (Chapelle & Li 2011, algorithm 3, one Newton step
    for each outcome); u, the worth of one's own looks, is shared by all.
    """

    PRECISION = 64.0  # of the prior on w, and on w's first, an item's worth to all: chosen on seeds 4 to 7
    OF_BIAS = 16.0

    def __init__(self, item_ids: Sequence[str], seed: int) -> None:
        super().__init__(item_ids, seed)
        shape = (self.items, self.items + 1)
        self._mean = np.zeros(shape)
        self._mean[:, 0] = np.log(PRIOR_CTR / (1 - PRIOR_CTR))
        self._precision = np.full(shape, self.PRECISION)
        self._precision[:, 0] = self.OF_BIAS
        self._shared_mean, self._shared_precision = 0.0, 1.0

    def choose(self) -> int:
        if self.rng.random() < EPSILON:
            return int(self.rng.integers(self.items))
        x = self._context()
        return int((self._mean[:, 0] + self._mean[:, 1:] @ x + self._shared_mean * x).argmax())

    def saw(self, item: int, clicked: bool) -> None:
        x = self._context()
        features = np.concatenate(([1.0], x))
        mean, precision = self._mean[item], self._precision[item]
        chance = 1.0 / (1.0 + np.exp(-(mean @ features + self._shared_mean * x[item])))
        curvature = chance * (1.0 - chance)
        precision += curvature * features**2
        self._shared_precision += curvature * x[item] ** 2
        error = float(clicked) - chance
        mean += error * features / precision
        self._shared_mean += error * x[item] / self._shared_precision

    def _context(self) -> npt.NDArray[np.float64]:
        length = np.sqrt(self.looks @ self.looks)
        return self.looks / length if length else self.looks


SIMPLE: Final[Mapping[str, Callable[[Sequence[str], int], SimpleAgent]]] = {
    "popularity": Popularity,
    "last viewed": LastViewed,
    "most viewed": MostViewed,
    "logistic": Logistic,
    "thompson": Thompson,
}
