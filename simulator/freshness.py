"""Freshness, measured from outside: seconds from an event in the log to answers by weights that learnt from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Freshness(NamedTuple):
    """What the probes found, in seconds; nan where there were none."""

    p50: float
    p99: float
    longest: float
    probes: int
    unseen: int  # not learnt from when the measurement ended; they count as waited for until then


class FreshnessProbe:
    """Remembers now and then where the log ends, and looks until the served weights have read as far.

        probe.mark({0: 120, 1: 90}, now_s)   # the log's ends, at this time
        probe.look({0: 125, 1: 90}, now_s)   # where the served weights had read to

    >>> probe = FreshnessProbe()
    >>> probe.mark({0: 10}, now_s=1.0)
    >>> probe.look({0: 9}, now_s=1.5)
    >>> probe.look({0: 10}, now_s=2.0)
    >>> probe.found(now_s=2.0).p50
    1.0
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[dict[int, int], float]] = deque()
        self._taken_s: list[float] = []

    @property
    def waiting(self) -> int:
        """Marks that the weights have not passed yet."""
        return len(self._waiting)

    def mark(self, ends: Mapping[int, int], now_s: float) -> None:
        """The log's ends now: what is before them must be learnt from."""
        self._waiting.append((dict(ends), now_s))

    def look(self, positions: Mapping[int, int], now_s: float) -> None:
        """Where the served weights had read to; a partition that is not named: nowhere."""
        while self._waiting and all(positions.get(p, 0) >= end for p, end in self._waiting[0][0].items()):
            self._taken_s.append(now_s - self._waiting.popleft()[1])

    def found(self, now_s: float) -> Freshness:
        """Percentiles so far; marks not passed yet count with the time that they have waited."""
        taken = [*self._taken_s, *(now_s - began for _, began in self._waiting)]
        if not taken:
            return Freshness(float("nan"), float("nan"), float("nan"), 0, 0)
        p50, p99, longest = (float(x) for x in np.percentile(taken, [50, 99, 100]))
        return Freshness(p50, p99, longest, len(taken), len(self._waiting))
