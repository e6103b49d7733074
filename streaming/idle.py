"""Quiet partitions: up to which event time they count as complete, so that visits end where nothing more comes.

A partition is idle when nothing came for a while though all of it was read. It then follows the slowest of those
that are not. Where all are idle, in one whose newest record was about as old as its event, a live shop's, event time
passes as fast as ours; simulated or replayed time has nothing to do with it, and stands still. Only a monotonic clock
is asked how long: a wall clock that is set wrong, and right again, must end nobody's visit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from streaming.columns import Columns, Kind
from streaming.log import RecordBatch

LIVE_MS: Final = 3_600_000  # between an event and its arrival, in a live shop


@dataclass
class _Partition:
    heard_s: float
    live: bool = False
    from_ms: int | None = None  # the watermark at the first look after that


class IdleClock:
    """Tells what to give to `Joiner.advance`. timeout_s: silence by the wall clock that makes a partition idle."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._partitions: dict[int, _Partition] = {}

    def heard(self, batch: RecordBatch, columns: Columns, now_s: float) -> None:
        """These records came just now. now_s: monotonic seconds."""
        for partition in np.unique(batch.partition).tolist():
            rows = np.flatnonzero((batch.partition == partition) & (columns.kind != Kind.BAD))
            state = self._partitions.setdefault(partition, _Partition(now_s))
            state.heard_s, state.from_ms = now_s, None
            if len(rows):
                behind_ms = int(batch.timestamp_ms[rows[-1]]) - int(columns.timestamp_ms[rows[-1]])
                state.live = abs(behind_ms) <= LIVE_MS

    def due(
        self, watermark_ms: Mapping[int, int | None], lag: Mapping[int, int], now_s: float
    ) -> dict[int, int]:
        """Event times that idle partitions may be advanced to.

        watermark_ms: of every partition read; None: nothing came yet. lag: records that are there and not read.
        """
        idle = {
            p for p in watermark_ms if lag.get(p, 0) == 0 and self._silence_s(p, now_s) >= self._timeout_s
        }
        busy = [at for p, at in watermark_ms.items() if p not in idle and at is not None]
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
                to = state.from_ms + round((now_s - state.heard_s - self._timeout_s) * 1000)
            else:
                continue
            if to > at:
                due[partition] = to
        return due

    def _silence_s(self, partition: int, now_s: float) -> float:
        state = self._partitions.setdefault(partition, _Partition(now_s))
        return now_s - state.heard_s
