"""Random numbers by name: a draw is a pure function of its keys, so two policies meet the same shoppers.

Common random numbers need more than a common seed: with one stream of numbers, the first shopper who leaves
earlier under one policy would shift the luck of everybody after. Here each draw is hashed out of what it is
for (seed, shopper, visit, page, item, purpose), whatever else was drawn before it.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]


def _mix(h: Any, part: Any) -> Any:
    """splitmix64's finaliser over (hash so far ^ the next part)."""
    h = h ^ part
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (h ^ (h >> np.uint64(31))) + np.uint64(0x9E3779B97F4A7C15)


_mixed: Any = numba.vectorize(["uint64(uint64, uint64)"], cache=True)(_mix)  # type: ignore[no-untyped-call]


def keys(*parts: int | npt.NDArray[np.generic]) -> Keys:
    """One 64-bit key for each combination of parts (broadcast): splitmix64's finaliser over a running hash."""
    h: Keys = np.full(1, 0x9E3779B97F4A7C15, dtype=np.uint64)
    for part in parts:
        h = _mixed(h, np.asarray(part).astype(np.uint64))
    return h


def uniform(*parts: int | npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Uniform in (0, 1), one for each combination of parts.

    >>> float(uniform(7, 3)[0]) == float(uniform(7, np.arange(5))[3])
    True
    """
    return ((keys(*parts) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
