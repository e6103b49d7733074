"""Quiet partitions: up to which event time they count as complete, so that visits end where nothing more comes.

A partition is idle when nothing came for a while though all of it was read. It then follows the slowest of those
that are not, of whose clocks there is no doubt. Where there are none, in one whose newest record was about as old as
its event, a live shop's, event time passes as fast as ours; simulated or replayed time has nothing to do with it, and
stands still. Only a monotonic clock is asked how long: a wall clock that is set wrong, and right again, must end
nobody's visit. And only a log that answers is silent: what it got while it was away, or we were, may come yet, so that
all silence begins anew after that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from streaming.columns import Columns, Kind
from streaming.log import RecordBatch

AWAY_S: Final = 15.0  # without an answer of the log, at least: then it was away
LIVE_MS: Final = 3_600_000  # between an event and its arrival, in a live shop


@dataclass
class _Partition:
    heard_s: float
    live: bool
    from_ms: int | None = None  # the watermark at the first look after that


class IdleClock:
    """Tells what to give to `Joiner.advance`."""

    def __init__(self, timeout_s: float, live: Iterable[int] = ()) -> None:
        """timeout_s: silence that makes a partition idle. live: partitions that were a live shop's when last heard."""
        self._timeout_s, self._were_live = timeout_s, frozenset(live)
        self._partitions: dict[int, _Partition] = {}
        self._asked_s: float | None = None

    def heard(self, batch: RecordBatch, columns: Columns, now_s: float) -> None:
        """These records came just now. now_s: monotonic seconds."""
        for partition in np.unique(batch.partition).tolist():
            rows = np.flatnonzero((batch.partition == partition) & (columns.kind != Kind.BAD))
            state = self._of(partition, now_s)
            state.heard_s, state.from_ms = now_s, None
            if len(rows):
                behind_ms = int(batch.timestamp_ms[rows[-1]]) - int(columns.timestamp_ms[rows[-1]])
                state.live = abs(behind_ms) <= LIVE_MS

    def due(
        self,
        watermark_ms: Mapping[int, int | None],
        lag: Mapping[int, int],
        asked_s: float,
        doubted: Collection[int] = (),
    ) -> dict[int, int]:
        """Event times that idle partitions may be advanced to.

        watermark_ms: of every partition read; None: nothing came yet. lag: records that are there and not read.
        asked_s: monotonic seconds at which the log was asked for the latter; of what came since it says nothing.
        doubted: partitions whose clocks may yet be put back; whoever followed one could be far in the future for good.
        """
        if self._asked_s is not None and asked_s - self._asked_s > max(AWAY_S, self._timeout_s):
            for each in self._partitions.values():
                each.heard_s, each.from_ms = asked_s, None
        self._asked_s = asked_s
        idle = {
            p for p in watermark_ms if lag.get(p, 0) == 0 and self._silence_s(p, asked_s) >= self._timeout_s
        }
        busy = [at for p, at in watermark_ms.items() if at is not None and p not in idle and p not in doubted]
        target = min(busy) if busy else None
        due = {}
        for partition in idle:
            at, state = watermark_ms[partition], self._partitions.get(partition)
            if at is None or state is None:
                continue  # nothing is open there
            state.from_ms = at if state.from_ms is None else state.from_ms
            if target is not None:
                to = target
            elif state.live:
                to = state.from_ms + round((asked_s - state.heard_s - self._timeout_s) * 1000)
            else:
                continue
            if to > at:
                due[partition] = to
        return due

    @property
    def live(self) -> list[int]:
        """Partitions that were a live shop's when last heard, ascending."""
        heard = {partition for partition, state in self._partitions.items() if state.live}
        return sorted(heard | (self._were_live - self._partitions.keys()))

    def _silence_s(self, partition: int, now_s: float) -> float:
        return now_s - self._of(partition, now_s).heard_s

    def _of(self, partition: int, now_s: float) -> _Partition:
        """What is known of it; from now on, where nothing was."""
        return self._partitions.setdefault(partition, _Partition(now_s, partition in self._were_live))
