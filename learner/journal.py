"""What, beside the records themselves, decides what becomes of them: kept in checkpoints, so that it can be audited.

Six things: where reading of a partition began, the settings under which it was joined from then on, for how many
items there was room, when it was idle and event time was let pass in it, which offsets were gone when their turn came
and were stepped over on purpose, and which records were of a schema that nobody knew then, though it may have been
made known since. With these and the log, `learner audit` can tell the whole story again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, Final, NamedTuple

import numpy as np

from streaming.join_settings import JoinSettings, to_ms
from streaming.rewards import Reward, RewardTable

MOST_TIMES: Final = (
    1 << 16
)  # times kept of a partition: 32 bytes each, and each is a silence of --idle-s to --max-jump-s
NOT_QUIET: Final = -1
MOST_UNKNOWN: Final = 4096  # frames of no known schema that are remembered, and times when they became known
MOST_GAPS: Final = 100  # newest gaps of a partition that are kept; all are counted


class Gap(NamedTuple):
    """Offsets start <= o < end, which retention took before they were read (or `--on-gap latest` left out)."""

    start: int
    end: int


class Room(NamedTuple):
    """From this offset of a partition on, items of higher ids had none: they were unknown."""

    offset: int
    items: int


class Unknown(NamedTuple):
    """Records with this frame at offsets start <= o < end of a partition were of no schema that was known then."""

    frame: bytes
    partition: int
    start: int
    end: int  # -1: to this day


class Told(NamedTuple):
    """What was told to a partition's join, after the records before `offset` and before that one."""

    offset: int
    watermark_ms: int | None  # event time has passed up to here,
    settings: JoinSettings | None  # or: these hold from now on


class _Time(NamedTuple):
    number: int  # in the order in which things were told
    offset: int
    watermark_ms: int
    since_ms: int = NOT_QUIET  # how far event time had come before, where it only went on


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
        self.rooms: dict[int, list[Room]] = {}  # partition → how many items there could be, the newest last
        self._unknown: deque[Unknown] = deque()  # those that are over, oldest first
        self._unknown_yet: dict[tuple[bytes, int], int] = {}  # (frame, partition) → first offset
        self._settings: list[JoinSettings] = []
        self._times: dict[int, deque[_Time]] = {}
        self._changes: dict[int, list[_Change]] = {}
        self._number = 0

    def begin(self, positions: Mapping[int, int], settings: JoinSettings, items: int) -> None:
        """These partitions are read on from here, for the first time or again, under these settings.

        items: that there may be from here on.
        """
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
            rooms = self.rooms.setdefault(partition, [])
            if not rooms or rooms[-1].items != items:
                rooms.append(Room(offset, items))

    def let_pass(self, partition: int, offset: int, watermark_ms: int, since_ms: int | None = None) -> None:
        """Event time passed up to watermark_ms in this partition, after the records before `offset`.

        since_ms: how far it had come before, if it only went on (see joiner.Clock); None: if more came of it.
        """
        times = self._times[partition]
        since_ms = NOT_QUIET if since_ms is None else since_ms
        if since_ms != NOT_QUIET and self._goes_on(partition, offset, watermark_ms):
            before = times.pop()
            watermark_ms, since_ms = max(watermark_ms, before.watermark_ms), before.since_ms
        if len(times) >= self._most_times:
            self.whole_from[partition] = times.popleft().offset
        times.append(_Time(self._next(), offset, watermark_ms, since_ms))

    def _goes_on(self, partition: int, offset: int, watermark_ms: int) -> bool:
        """Whether the newest word on a partition's time is not needed before this one, up to which time only went on:
        neither record nor settings came in between, and from before it to here is no jump."""
        times, changes = self._times[partition], self._changes[partition]
        if not times or times[-1].since_ms == NOT_QUIET:
            return False
        jump_ms = to_ms(self._settings[-1].max_jump_s)
        after = times[-1].offset == offset and times[-1].number > changes[-1].number
        return after and watermark_ms - times[-1].since_ms <= jump_ms

    def step_over(self, partition: int, start: int, end: int) -> None:
        """Reading goes on at `end`, without the offsets from `start` on, which came next."""
        self.stepped_over[partition] = self.stepped_over.get(partition, 0) + end - start
        if self.began.get(partition) == start:  # nothing was read yet: it just begins later
            self.began[partition] = self.whole_from[partition] = end
        gaps = self.gaps.setdefault(partition, [])
        gaps.append(Gap(start, end))
        del gaps[:-MOST_GAPS]

    @property
    def lacks_schemas(self) -> bool:
        """Whether there are frames that were unknown when they were met last."""
        return bool(self._unknown_yet)

    def unread(self, frame: bytes, partition: int, offset: int) -> None:
        """A record with this frame was of no known schema; those that follow are not either, until `read`."""
        if (frame, partition) not in self._unknown_yet:
            if len(self._unknown_yet) >= MOST_UNKNOWN:  # garbage that looks like frames
                del self._unknown_yet[next(iter(self._unknown_yet))]
            self._unknown_yet[frame, partition] = offset

    def read(self, partition: int, offset: int, knows: Callable[[bytes], bool]) -> None:
        """From this offset on, frames that are known are read."""
        for frame, where in [key for key in self._unknown_yet if key[1] == partition]:
            if knows(frame):
                start = self._unknown_yet.pop((frame, where))
                self._unknown.append(Unknown(frame, partition, start, offset))
        while len(self._unknown) > MOST_UNKNOWN:
            self._unknown.popleft()

    def unknown(self, partition: int) -> list[Unknown]:
        """What could not be read of a partition, and since or until when, though it may be readable by now."""
        still = [Unknown(frame, p, start, -1) for (frame, p), start in self._unknown_yet.items()]
        return [each for each in (*self._unknown, *still) if each.partition == partition]

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
            "rooms": {str(p): _table(rooms, 2) for p, rooms in self.rooms.items()},
            "unknown": [[each.frame.hex(), *each[1:]] for p in self.began for each in self.unknown(p)],
            "settings": [asdict(settings) for settings in self._settings],
            "times": {str(p): _table(times, 4) for p, times in self._times.items()},
            "changes": {str(p): _table(changes) for p, changes in self._changes.items()},
            "number": self._number,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was taken from."""
        self.began = {int(p): offset for p, offset in state["began"].items()}
        self.whole_from = {int(p): offset for p, offset in state["whole_from"].items()}
        # checkpoints of before have none of these
        self.gaps = {int(p): [Gap(*row) for row in t.tolist()] for p, t in state.get("gaps", {}).items()}
        self.stepped_over = {int(p): count for p, count in state.get("stepped_over", {}).items()}
        self.rooms = {int(p): [Room(*row) for row in t.tolist()] for p, t in state.get("rooms", {}).items()}
        unknown = [Unknown(bytes.fromhex(frame), *where) for frame, *where in state.get("unknown", [])]
        self._unknown = deque(each for each in unknown if each.end >= 0)
        self._unknown_yet = {(each.frame, each.partition): each.start for each in unknown if each.end < 0}
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
