"""Pacing: gradient updates per new transition, held in a band, whichever of the two is the faster side.

    low <= updates / (transitions - min_replay) <= high

While few choices have been learnt from, the transitions count for more (`Band.worth`): there is all to learn then, and
little to learn it from. How much more depends on the choices made, not on the transitions: where one slot in a hundred
is chosen, to go over them oftener learns their luck.

Above the band training waits for data; below it partitions wait for training. Nothing here ever blocks: each
loop asks before it goes on, and keeps polling its log meanwhile. At least one of the two may always go on.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

EXTRA: Final = 100_000  # transitions that all choices together are worth, times young - 1
CHOICES: Final = 40_000  # transitions of steps with a choice that are worth half of it


class _Limits(NamedTuple):
    """What holds now; replaced whole, so that other threads see one setting or the other."""

    low: float
    high: float
    transitions: int  # counting starts here,
    updates: int  # and here


class Band:
    """May we train? May we read on? `transitions`, or what they are worth, and `updates` are totals since the learner
    was new.

    low, high: updates per transition, 0 <= low <= high, high > 0. min_replay: transitions before the first update.
    young: times as many as later that the first transitions give, about, where every second step has a choice; >= 1.
    """

    def __init__(self, low: float, high: float, min_replay: int, young: float = 1.0) -> None:
        if min_replay < 1:
            raise ValueError(f"min_replay must be >= 1 transitions, not {min_replay}")
        if not 1.0 <= young < math.inf:
            raise ValueError(f"young must be >= 1 times as many updates, not {young}")
        self.min_replay, self._young = min_replay, young
        self._limits = _Limits(*_checked(low, high), min_replay, 0)

    @property
    def low(self) -> float:
        """Below this many updates per transition reading waits."""
        return self._limits.low

    @property
    def high(self) -> float:
        """Above this many updates per transition training waits."""
        return self._limits.high

    @property
    def settings(self) -> list[float]:
        """All that it was made with, or adjusted to."""
        return [self.low, self.high, self.min_replay, self._young]

    def worth(self, transitions: int, chosen: int) -> int:
        """What so many transitions are worth, for all that asks for `transitions` here. chosen: those that replay holds
        of steps in which something was chosen from a slate.

        >>> Band(low=0.0, high=0.01, min_replay=100, young=3.0).worth(transitions=100_000, chosen=40_000)
        200000
        """
        if transitions <= self.min_replay:
            return transitions
        return transitions + round((self._young - 1.0) * EXTRA * chosen / (chosen + CHOICES))

    def adjust(self, low: float, high: float, transitions: int, updates: int) -> None:
        """Change the band while running. It counts from now on: nothing is owed for what was before."""
        self._limits = _Limits(*_checked(low, high), max(transitions, self.min_replay), updates)

    def may_update(self, transitions: int, updates: int) -> bool:
        """Whether one more update stays within the band."""
        return self.updates_left(transitions, updates) > 0

    def may_ingest(self, transitions: int, updates: int) -> bool:
        """Whether to read on; False only while training is behind and is free to catch up."""
        limits = self._limits
        behind = updates - limits.updates < limits.low * (transitions - limits.transitions)
        return not (behind and self.may_update(transitions, updates))

    def updates_left(self, transitions: int, updates: int) -> int:
        """How many updates may be made before the next transition comes.

        >>> Band(low=0.5, high=2.0, min_replay=100).updates_left(transitions=110, updates=5)
        15
        """
        limits = self._limits
        allowed = math.floor(limits.high * (transitions - limits.transitions) + 1e-9)
        return max(0, allowed - (updates - limits.updates))

    def ratio(self, transitions: int, updates: int) -> float:
        """Updates per transition since counting started; NaN before."""
        limits = self._limits
        counted = transitions - limits.transitions
        return (updates - limits.updates) / counted if counted > 0 else math.nan

    def reason(self, transitions: int, updates: int) -> str:
        """Which side waits or is far behind, why, and which flag changes that; empty where all goes on as it should.

        >>> Band(low=0.0, high=0.01, min_replay=100).reason(transitions=50_100, updates=200)
        'training is 300 updates behind: 0.004 updates per transition, --updates-high allows 0.01'
        """
        if transitions < self.min_replay:
            return f"training waits for {self.min_replay - transitions} more transitions (--min-replay)"
        ratio = self.ratio(transitions, updates)
        at = "" if math.isnan(ratio) else f": {ratio:.3g} updates per transition"
        if not self.may_update(transitions, updates):
            return f"training waits for new transitions{at}, the band ends at {self.high:g}"
        if not self.may_ingest(transitions, updates):
            return f"reading waits for training{at}, the band begins at {self.low:g}"
        limits, left = self._limits, self.updates_left(transitions, updates)
        if left > updates - limits.updates:  # fewer than half of those that data allow
            return f"training is {left:,} updates behind{at}, --updates-high allows {limits.high:g}"
        return ""

    def state(self) -> dict[str, int]:
        """Where counting started, for a checkpoint."""
        return {"transitions": self._limits.transitions, "updates": self._limits.updates}

    def restore(self, state: dict[str, int], transitions: int, updates: int) -> None:
        """Go on counting from a checkpoint taken at these totals with the same band.

        A band that was changed by flags since should `adjust` instead.
        """
        if not (state["transitions"] >= 0 and 0 <= state["updates"] <= updates):
            raise ValueError(
                f"pacing state {state} does not fit {transitions} transitions, {updates} updates"
            )
        self._limits = self._limits._replace(transitions=state["transitions"], updates=state["updates"])


def _checked(low: float, high: float) -> tuple[float, float]:
    if not (0.0 <= low <= high < math.inf and high > 0.0):
        raise ValueError(
            f"updates per transition must satisfy 0 <= low <= high, high > 0; not low {low}, high {high}"
        )
    return low, high
