"""What an item would earn in a slot: a model that the direct method believes, and doubly robust estimators lean on.

    q(x, a, slot k) = effect_k + c_rate rate(a) + c_advantage advantage(x, a) + c_seen seen(x, a)

rate: what the item earned per showing so far, drawn towards the mean of all. advantage: Q(x, a) of the weights that are
judged, less its mean over what could be shown. seen: the item is in the user's history. By ridge regression, whose sums
are kept up to date as decisions come.

Each decision is judged by what was learnt from those before it alone, never from its own outcome: so the doubly robust
estimators stay unbiased, however bad the model is (Luedtke & van der Laan 2016), and one reading does.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

FEATURES: Final = ("rate", "advantage", "seen")
DRAWN: Final = 50.0  # showings that the mean of all items counts for, beside an item's own
RIDGE: Final = 1.0


class Model(NamedTuple):
    """The model as it stands."""

    effect: Floats  # [K] of the slot
    coefficient: Floats  # [3] of FEATURES
    rate: Floats  # [N] by vocabulary id; entry 0: of an item of which nothing is known


class RewardModel:
    """Learns from decisions as they come."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        size = slots + len(FEATURES)
        self._gram, self._moment = np.zeros((size, size)), np.zeros(size)
        self._showings, self._earned = np.zeros(1), np.zeros(1)

    def model(self, items: int) -> Model:
        """As learnt so far. items: the largest vocabulary id."""
        ridge = self._gram + RIDGE * np.eye(len(self._gram))
        solved = np.linalg.solve(ridge, self._moment).astype(np.float64)  # [K + 3]
        return Model(solved[: self._slots], solved[self._slots :], self._rates(items))

    def _rates(self, items: int) -> Floats:
        more = items + 1 - len(self._showings)
        if more > 0:
            self._showings = np.append(self._showings, np.zeros(more))
            self._earned = np.append(self._earned, np.zeros(more))
        mean = self._earned.sum() / max(1.0, self._showings.sum())
        rates: Floats = (self._earned + DRAWN * mean) / (self._showings + DRAWN)
        rates[0] = mean
        return rates

    def learn(
        self,
        shown: npt.NDArray[np.bool_],
        items: npt.NDArray[np.integer],
        features: Floats,
        reward: Floats,
    ) -> None:
        """Learn from T decisions. shown, items (vocabulary ids), reward: [T, K]; features: [T, K, 3], as they were when
        the decisions were judged."""
        t, k = np.nonzero(shown)
        f, r, n = features[t, k], reward[t, k], self._slots
        by_slot = np.zeros((n, f.shape[1]))
        np.add.at(by_slot, k, f)
        self._gram[:n, :n] += np.diag(np.bincount(k, minlength=n))
        self._gram[:n, n:] += by_slot
        self._gram[n:, :n] += by_slot.T
        self._gram[n:, n:] += f.T @ f
        self._moment[:n] += np.bincount(k, r, n)
        self._moment[n:] += f.T @ r
        self._rates(int(items.max(initial=0)))
        np.add.at(self._showings, items[t, k], 1.0)
        np.add.at(self._earned, items[t, k], r)
