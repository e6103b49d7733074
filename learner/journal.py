"""What, beside the records themselves, decides what becomes of them: kept in checkpoints, so that it can be audited.

Four things: where reading of a partition began, the settings under which it was joined from then on, when it was
idle and event time was let pass in it, and which offsets were gone when their turn came and were stepped over on
purpose. With these and the log, `learner audit` can tell the whole story again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Final, NamedTuple

import numpy as np

from streaming.join_settings import JoinSettings
from streaming.rewards import Reward, RewardTable

MOST_TIMES: Final = (
    1 << 16
)  # times kept of a partition: 24 bytes each, and each is a silence of --idle-s or more
MOST_GAPS: Final = 100  # newest gaps of a partition that are kept; all are counted


class Gap(NamedTuple):
    """Offsets start <= o < end, which retention took before they were read (or `--on-gap latest` left out)."""

    start: int
    end: int


class Told(NamedTuple):
    """What was told to a partition's join, after the records before `offset` and before that one."""

    offset: int
    watermark_ms: int | None  # event time has passed up to here,
    settings: JoinSettings | None  # or: these hold from now on


class _Time(NamedTuple):
    number: int  # in the order in which things were told
    offset: int
    watermark_ms: int


class _Change(NamedTuple):
    number: int
    offset: int
    settings: int  # place in Journal.settings


class Journal:
    """One learner's; see the module.

    most_times: of a partition; beyond that they are forgotten, oldest first: see `whole_from`.
    """

    def __init__(self, most_times: int = MOST_TIMES) -> None:
        self._most_times = most_times
        self.began: dict[int, int] = {}  # partition → first offset read
        self.whole_from: dict[int, int] = {}  # partition → offset from which on the times are all there
        self.gaps: dict[int, list[Gap]] = {}  # partition → stepped over, the newest last
        self.stepped_over: dict[int, int] = {}  # partition → offsets in all gaps there ever were
        self._settings: list[JoinSettings] = []
        self._times: dict[int, deque[_Time]] = {}
        self._changes: dict[int, list[_Change]] = {}
        self._number = 0

    def begin(self, positions: Mapping[int, int], settings: JoinSettings) -> None:
        """These partitions are read on from here, for the first time or again, under these settings."""
        if not self._settings or self._settings[-1] != settings:
            self._settings.append(settings)
        current = len(self._settings) - 1
        for partition, offset in positions.items():
            self.began.setdefault(partition, offset)
            self.whole_from.setdefault(partition, offset)
            self._times.setdefault(partition, deque())
            changes = self._changes.setdefault(partition, [])
            if not changes or changes[-1].settings != current:
                changes.append(_Change(self._next(), offset, current))

    def let_pass(self, partition: int, offset: int, watermark_ms: int) -> None:
        """Event time passed up to watermark_ms in this partition, after the records before `offset`."""
        times = self._times[partition]
        if times and times[-1].offset == offset and times[-1].number > self._changes[partition][-1].number:
            times.pop()  # with no record in between, the last word is as good as all of them
        if len(times) >= self._most_times:
            self.whole_from[partition] = times.popleft().offset
        times.append(_Time(self._next(), offset, watermark_ms))

    def step_over(self, partition: int, start: int, end: int) -> None:
        """Reading goes on at `end`, without the offsets from `start` on, which came next."""
        self.stepped_over[partition] = self.stepped_over.get(partition, 0) + end - start
        if self.began.get(partition) == start:  # nothing was read yet: it just begins later
            self.began[partition] = self.whole_from[partition] = end
        gaps = self.gaps.setdefault(partition, [])
        gaps.append(Gap(start, end))
        del gaps[:-MOST_GAPS]

    def told(self, partition: int) -> list[Told]:
        """All that is known to have been told to the partition, in order."""
        entries: list[_Time | _Change] = [*self._times[partition], *self._changes[partition]]
        return [
            Told(entry.offset, entry.watermark_ms, None)
            if isinstance(entry, _Time)
            else Told(entry.offset, None, self._settings[entry.settings])
            for entry in sorted(entries, key=lambda entry: entry.number)
        ]

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {
            "began": {str(p): offset for p, offset in self.began.items()},
            "whole_from": {str(p): offset for p, offset in self.whole_from.items()},
            "gaps": {str(p): _table(gaps, 2) for p, gaps in self.gaps.items()},
            "stepped_over": {str(p): count for p, count in self.stepped_over.items()},
            "settings": [asdict(settings) for settings in self._settings],
            "times": {str(p): _table(times) for p, times in self._times.items()},
            "changes": {str(p): _table(changes) for p, changes in self._changes.items()},
            "number": self._number,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was taken from."""
        self.began = {int(p): offset for p, offset in state["began"].items()}
        self.whole_from = {int(p): offset for p, offset in state["whole_from"].items()}
        # checkpoints of before have neither
        self.gaps = {int(p): [Gap(*row) for row in t.tolist()] for p, t in state.get("gaps", {}).items()}
        self.stepped_over = {int(p): count for p, count in state.get("stepped_over", {}).items()}
        self._settings = [_settings_of(fields) for fields in state["settings"]]
        self._times = {
            int(p): deque(_Time(*row) for row in table.tolist()) for p, table in state["times"].items()
        }
        self._changes = {
            int(p): [_Change(*row) for row in table.tolist()] for p, table in state["changes"].items()
        }
        self._number = state["number"]

    def _next(self) -> int:
        self._number += 1
        return self._number


def _table(entries: Iterable[tuple[int, ...]], width: int = 3) -> Any:
    return np.array(list(entries), np.int64).reshape(-1, width)


def _settings_of(fields: Mapping[str, Any]) -> JoinSettings:
    table = {name: Reward(**entry) for name, entry in fields["rewards"]["rewards"].items()}
    return JoinSettings(**{**fields, "rewards": RewardTable(table)})
