"""95 % intervals for anything that is computed from sums: the jackknife over groups of users, with Student's t.

Users are the units, for one user's decisions are alike and do not count as independent. They are dealt out to G groups
by their hash, so that memory does not grow with them; with fewer users than groups each is a group of its own, nearly.
Leaving out one group at a time gives G estimates, and their spread the variance (Kott 2001, the delete-a-group
jackknife):

    u_g = mean of all v_(g) - v_(g)          v_(g): the estimate without group g
    var = (G - 1) / G  sum u_g^2             A = sum u_g^3 / (sum u_g^2)^1.5

Importance weights are skewed, so that a symmetric interval is too short on its upper side. A, the skewness of the
estimate, corrects that (Hall 1992): with T = (v - truth) / sd, T + A T^2 / 3 + A^2 T^3 / 27 + A / 6 is nearly Student's
t with G - 1 degrees of freedom, and is easily inverted.

Why not the bootstrap: it says the same here for a thousand times the work, and two runs of it differ. Why not the
textbook's variance of a mean: self-normalised estimates are ratios.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from learner.estimators import Estimator, Sums, total, without_each

# Student's t, two-sided 95 %, by degrees of freedom
_T: Final = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_Z: Final = 1.959963984540054


class Interval(NamedTuple):
    """An estimate and its 95 % interval; NaN where there is none, the interval also where there are no two groups."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half its width."""
        return (self.high - self.low) / 2


def interval(by_group: Sums, estimate: Estimator) -> Interval:
    """By the jackknife over the groups that have a decision."""
    value = float(estimate(total(by_group))[0])
    groups = int(np.count_nonzero(by_group.decisions))
    if groups < 2:
        return Interval(value, float("nan"), float("nan"))
    sd, skewness = jackknife(estimate(without_each(by_group)))
    t = student_t(groups - 1)
    return Interval(value, value - sd * _unskewed(t, skewness), value - sd * _unskewed(-t, skewness))


def jackknife(without: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Standard deviation and skewness of an estimate. without: [G], what it is without each group, G > 1.

    >>> x = np.array([1.0, 2.0, 6.0])
    >>> sd, _ = jackknife((x.sum() - x) / 2)  # of the mean
    >>> bool(np.isclose(sd, np.std(x, ddof=1) / 3**0.5))
    True
    """
    u = without.mean() - without
    square = float((u**2).sum())
    sd = float(np.sqrt((len(u) - 1) / len(u) * square))
    return sd, float((u**3).sum() / square**1.5) if square > 0 else 0.0


def _unskewed(t: float, skewness: float) -> float:
    """The T that Hall's transformation turns into t."""
    if abs(skewness) < 1e-6:
        return t
    return 3.0 / skewness * (float(np.cbrt(1.0 + skewness * (t - skewness / 6.0))) - 1.0)


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile (Cornish-Fisher expansion above 9 degrees, good to 1e-3); NaN below 1.

    >>> [round(student_t(n), 3) for n in (1, 10, 30, 1000)]
    [12.706, 2.228, 2.042, 1.962]
    """
    if freedom < len(_T):
        return _T[max(0, freedom)]
    z, n = _Z, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / n ** (i + 1) for i, term in enumerate(terms))
