"""The progress line: what the learner does now, for whoever watches a terminal or reads its log."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TextIO

LINE_S = 10.0  # between two lines where there is no terminal


class Totals(NamedTuple):
    """Where the learner stands."""

    now_s: float  # monotonic
    records: int  # read since this process began
    transitions: int
    updates: int
    lag: int  # records in the log that were not read
    loss: float  # of the last update; NaN before the first
    mean_q: float  # likewise
    version: int  # of the weights published last; 0: none yet
    stepped_over: int  # offsets that were gone before they were read, since the learner was new
    waiting: str  # why one side stands still, empty where none does
    late: int = 0  # records that came too late to be used, since this process began
    unreadable: int = 0  # records that could not be read, likewise


def describe(before: Totals, now: Totals) -> str:
    """One line on what happened between two looks.

    >>> a = Totals(0.0, 0, 0, 0, 900, math.nan, math.nan, 0, 0, "")
    >>> describe(a, Totals(2.0, 6000, 1500, 30, 12, 0.25, 1.5, 3, 0, ""))
    '3,000 events/s · lag 12 · 1,500 transitions · 15.0 updates/s · loss 0.25 · mean Q 1.5 · version 3'
    >>> describe(a, Totals(1.0, 600, 0, 0, 0, math.nan, math.nan, 3, 0, "", late=598, unreadable=2))
    '600 events/s · lag 0 · 0 transitions · 0.0 updates/s · version 3 · 598 came too late · 2 could not be read'
    """
    seconds = max(now.now_s - before.now_s, 1e-9)
    parts = [
        f"{(now.records - before.records) / seconds:,.0f} events/s",
        f"lag {now.lag:,}",
        f"{now.transitions:,} transitions",
        f"{(now.updates - before.updates) / seconds:.1f} updates/s",
    ]
    if not math.isnan(now.loss):
        parts += [f"loss {now.loss:.3g}", f"mean Q {now.mean_q:.3g}"]
    parts.append(f"version {now.version}" if now.version else "nothing published yet")
    if now.stepped_over:
        parts.append(f"{now.stepped_over:,} offsets were gone")
    if now.late:
        parts.append(f"{now.late:,} came too late")
    if now.unreadable:
        parts.append(f"{now.unreadable:,} could not be read")
    if now.waiting:
        parts.append(now.waiting)
    return " · ".join(parts)


class ProgressLine:
    """Shows `describe` once a second on a terminal, in place, and each 10 s as a line elsewhere."""

    def __init__(self, out: TextIO, totals: Callable[[], Totals]) -> None:
        self._out = out
        self._totals = totals
        self._terminal = out.isatty()
        self._before = totals()

    def tell(self, now_s: float) -> None:
        """Say how things stand if it is time to."""
        if now_s - self._before.now_s >= (1.0 if self._terminal else LINE_S):
            self._say("\r\x1b[K" if self._terminal else "", "" if self._terminal else "\n")

    def end(self) -> None:
        """The last line."""
        self._say("\r\x1b[K" if self._terminal else "", "\n")

    def _say(self, start: str, end: str) -> None:
        now = self._totals()
        print(start + describe(self._before, now), end=end, file=self._out, flush=True)
        self._before = now
