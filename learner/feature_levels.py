"""How well items do with all, by what describes them: a Bayesian logistic regression on their dense vectors.

    level(a) = level_a + Σ_j θ_j (x_aj - x̄_j)        θ_j ~ N(0, τ_j² / s_j²)

x_a is the item's vector, x̄ and s are mean and deviation of those of the slots that θ is fitted to; without a vector
there is level_a alone. A network comes to what a feature says of an item's chances by small steps, through a tower that
has to say everything else, too; and an item that comes once has no level of its own. Each feature has a width, which
goes where the evidence is (automatic relevance determination: MacKay 1994),

    τ_j² ← θ_j² + Var θ_j        in units of s_j

a step each time that it is fitted: features that tell nothing are forgotten, and one that tells much is let go as far
as it does. A tag that fewer than `FEW` slots carry is left alone, as items and pairs are, since any luck explains it;
and no vector says more than `MOST_SAID`, however unlike those of the slots it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from learner.answer_fit import FEW

FIRST_WIDTH: Final = 0.01  # τ² before anything is known, log-odds squared
WIDTHS: Final = (1e-6, 10.0)  # that it stays within
MOST_IN_VECTOR: Final = 10.0  # of a number in an item's vector: what is further from zero counts as this
MOST_SAID: Final = 3.0  # of an item, log-odds
_STEPS: Final = 2  # of Newton, each time: the next goes on from there
_ALIKE: Final = 1e-6  # standard deviation of what never varies
_FURTHEST: Final = 1.0  # that any θ moves in one, log-odds

Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]


class FeatureFit:
    """Learns θ."""

    def __init__(self, size: int) -> None:
        """size: of the vectors."""
        self.slope = np.zeros(size)  # θ, in log-odds for each s
        self.width = np.full(size, FIRST_WIDTH)  # τ²
        self.mean, self.scale = np.zeros(size), np.ones(size)  # x̄, s

    @property
    def served(self) -> npt.NDArray[np.float32]:
        """[size + 1] what to multiply (x, 1) with."""
        slope = self.slope / self.scale
        return np.append(slope, -slope @ self.mean).astype(np.float32)

    def of(self, vectors: Vectors) -> Floats:
        """What θ says of items of these vectors, [T]; 0 of one without."""
        if not self.slope.any():
            return np.zeros(len(vectors))
        served = self.served
        said = np.clip(clipped(vectors) @ served[:-1] + served[-1], -MOST_SAID, MOST_SAID)
        return np.where(vectors.any(axis=1), said, 0.0).astype(np.float64)

    def settle(self, vectors: Vectors, log_odds: Floats, chosen: npt.NDArray[np.bool_]) -> None:
        """Fit θ to what came of T slots, from where it stands, and the widths to it. log_odds: [T] without θ's part."""
        described = vectors.any(axis=1)
        if not described.any():
            return
        x = clipped(vectors[described])
        mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
        raw = self.slope / self.scale
        self.mean, self.scale = mean, np.where(scale > _ALIKE, scale, 1.0)
        x = ((x - self.mean) / self.scale).astype(np.float32)
        fourth = np.square(np.square(x)).sum(axis=0, dtype=np.float64)
        # of a tag that k slots carry the fourth powers come to T² / k
        varies = np.flatnonzero((scale > _ALIKE) & (len(x) ** 2 >= FEW * fourth))
        self.slope = np.zeros_like(raw)
        self.slope[varies] = raw[varies] * self.scale[varies]
        x = x[:, varies]
        beside, came = log_odds[described], chosen[described]
        theta, prior = self.slope[varies], 1.0 / self.width[varies]
        for _ in range(_STEPS):
            p = 1.0 / (1.0 + np.exp(-(beside + x @ theta.astype(np.float32))))
            told = (p * (1.0 - p)).astype(np.float32)
            curvature = (x.T @ (x * told[:, None])).astype(np.float64) + np.diag(prior)
            pull = (came - p).astype(np.float32) @ x - prior * theta
            theta = theta + np.clip(np.linalg.solve(curvature, pull), -_FURTHEST, _FURTHEST)
        self.slope[varies] = theta
        self.width[varies] = np.clip(theta**2 + np.diag(np.linalg.inv(curvature)), *WIDTHS)

    def state(self) -> dict[str, Floats]:
        """Everything, exactly. Copies."""
        return {f"features.{name}": getattr(self, name).copy() for name in _STATE}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go back to what `state` gave.

        Raises: ValueError when it is of another size.
        """
        for name in _STATE:
            value = state[f"features.{name}"]
            if value.shape != self.slope.shape:
                raise ValueError(
                    f"{name} is {value.shape}, this agent's is {self.slope.shape}: settings differ"
                )
            setattr(self, name, value.copy())


def clipped(vectors: Vectors) -> Vectors:
    """As they count."""
    return np.clip(vectors, -MOST_IN_VECTOR, MOST_IN_VECTOR)


_STATE: Final = ("slope", "width", "mean", "scale")
