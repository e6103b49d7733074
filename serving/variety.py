"""What was shown lately: how many of the items, and how unequally. Where a few take it all, the rest stays unknown."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Final

import numpy as np

LAST: Final = 10_000  # slots looked back on


class Variety:
    """The last slots given. Any thread may add or look."""

    def __init__(self, last: int = LAST) -> None:
        self._shown: deque[str] = deque(maxlen=last)

    def saw(self, item_ids: Sequence[str]) -> None:
        """A slate was given."""
        self._shown.extend(item_ids)

    def coverage(self, on_offer: int) -> float:
        """Share of the items on offer, or of as many as there were slots, that were shown; NaN before any was."""
        shown = self._shown.copy()
        return len(set(shown)) / max(1, min(on_offer, len(shown))) if shown else np.nan

    def gini(self, on_offer: int) -> float:
        """Gini coefficient of the slots over the items on offer, 0 (all alike) to 1; NaN before any was shown."""
        shown = self._shown.copy()
        counts = np.sort(np.fromiter(Counter(shown).values(), np.float64))
        n = max(on_offer, len(counts))
        if not len(counts):
            return np.nan
        place = np.arange(
            n - len(counts) + 1, n + 1
        )  # ascending; those never shown come first and add nothing
        return float((2 * place - n - 1) @ counts / (n * counts.sum()))
