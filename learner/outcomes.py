"""What each decision of a log earned in the end: the learner's own join, run to the log's end and kept in little room.

A purchase may follow its decision by a day, and an estimate needs the reward when it meets the decision. So a log is
read twice, and this is the first reading. It keeps a bit for each record, and 16 bytes for each slot that earned
something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from streaming.columns import Columns
from streaming.jit import jit
from streaming.join_settings import LAST_MS, JoinSettings
from streaming.joiner import Joiner
from streaming.transitions import Joined

_SLOT_BITS: Final = 10  # of a key: offset << 10 | slot; a slate has at most 1000 slots
_WAITING: Final = 1 << 16  # rewards that are sorted in together, at least

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Answer = TypeVar("Answer", Mask, Floats)


class Outcomes:
    """Takes each partition's records in order; then tells what decisions earned."""

    def __init__(self, settings: JoinSettings, starts: Mapping[int, int]) -> None:
        """settings: the learner's. starts: the first offset of each partition."""
        self._window_ms = round(settings.attribution_window_s * 1000)
        # what the state of a step was does not matter here
        self._joiner = Joiner(replace(settings, history_length=1), starts)
        self._decided = {p: _Marks(start) for p, start in starts.items()}
        self._rewards = {p: _Rewards() for p in starts}
        self._end_ms = dict.fromkeys(starts, 0)

    def take(self, columns: Columns) -> None:
        """These records next."""
        self._note(self._joiner.push(columns))

    def end(self) -> None:
        """That was all; what is still open ends here."""
        for partition in self._joiner.partitions:
            self._end_ms[partition] = self._joiner.watermark_ms(partition) or 0
            self._note(self._joiner.advance(partition, LAST_MS))
            self._rewards[partition].sort_in()

    def counters(self) -> dict[str, int]:
        """The joiner's."""
        return self._joiner.counters()

    def counts(self, columns: Columns, rows: Ints) -> Mask:
        """[R] whether each of these decisions counts: it is neither late nor resent."""
        nothing = np.zeros(len(rows), np.bool_)
        return _by_partition(columns, rows, nothing, lambda p, offset: self._decided[p].has(offset))

    def rewards(self, columns: Columns, rows: Ints, slots: int) -> Floats:
        """[R, slots] what each slot of these decisions earned."""
        nothing = np.zeros((len(rows), slots))
        return _by_partition(columns, rows, nothing, lambda p, offset: self._rewards[p].of(offset, slots))

    def unsettled(self, columns: Columns, rows: Ints) -> Mask:
        """[R] whether more may yet come: the decision is younger than the attribution window."""
        ends = np.zeros(max(self._end_ms, default=0) + 1, np.int64)
        ends[list(self._end_ms)] = list(self._end_ms.values())
        return columns.timestamp_ms[rows] + self._window_ms > ends[columns.partition[rows]]

    def _note(self, joined: Joined) -> None:
        t, a = joined.transitions, joined.amendments
        for p in np.unique(np.concatenate((t.partition, a.partition))).tolist():
            mine = (t.partition == p) & ~t.organic
            self._decided[p].add(t.offset[mine])
            mine &= t.reward != 0
            self._rewards[p].add(t.offset[mine], t.slot[mine], t.reward[mine])
            rows = np.flatnonzero(a.partition == p)
            rows = rows[self._decided[p].has(a.offset[rows])]  # others amend organic steps
            self._rewards[p].add(a.offset[rows], a.slot[rows], a.reward[rows])


def _by_partition(
    columns: Columns, rows: Ints, answers: Answer, ask: Callable[[int, Ints], Answer]
) -> Answer:
    partition, offset = columns.partition[rows], columns.offset[rows]
    for p in np.unique(partition).tolist():
        mine = partition == p
        answers[mine] = ask(p, offset[mine])
    return answers


class _Marks:
    """A set of offsets, in one bit for each."""

    def __init__(self, start: int) -> None:
        """start: no offset is below."""
        self._start, self._bits = start, np.zeros(1024, np.uint8)

    def add(self, offsets: Ints) -> None:
        most = (int(offsets.max(initial=self._start)) - self._start) // 8
        if most >= len(self._bits):
            self._bits = np.append(self._bits, np.zeros(most + 1, np.uint8))
        _mark(self._bits, offsets - self._start)

    def has(self, offsets: Ints) -> Mask:
        at = offsets - self._start
        inside = (at >= 0) & (at < 8 * len(self._bits))
        at = np.where(inside, at, 0)
        return inside & ((self._bits[at >> 3] >> (at & 7)) & 1).astype(np.bool_)


@jit
def _mark(bits: npt.NDArray[np.uint8], at: Ints) -> None:
    for i in at:
        bits[i >> 3] |= np.uint8(1) << np.uint8(i & 7)


class _Rewards:
    """Rewards by (offset, slot), added up; of those that are none nothing is kept."""

    def __init__(self) -> None:
        self._keys, self._values = np.zeros(0, np.int64), np.zeros(0)
        self._waiting: list[tuple[Ints, Floats]] = []
        self._count = 0

    def add(self, offset: Ints, slot: npt.NDArray[np.integer], reward: npt.NDArray[np.floating]) -> None:
        self._waiting.append((offset << _SLOT_BITS | slot, reward.astype(np.float64)))
        self._count += len(offset)
        if self._count > max(_WAITING, len(self._keys) // 2):
            self.sort_in()

    def sort_in(self) -> None:
        keys = np.concatenate([self._keys, *(k for k, _ in self._waiting)])
        values = np.concatenate([self._values, *(v for _, v in self._waiting)])
        self._keys, which = np.unique(keys, return_inverse=True)
        self._values = np.zeros(len(self._keys))
        np.add.at(self._values, which, values)
        self._waiting, self._count = [], 0

    def of(self, offset: Ints, slots: int) -> Floats:
        """[R, slots]; after `sort_in`."""
        wanted = (offset[:, None] << _SLOT_BITS) + np.arange(slots)
        if not len(self._keys):
            return np.zeros(wanted.shape)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, self._values[at], 0.0)
