"""What items answer to: looks at themselves, and at what users go to around the same time.

Who looks at one thing may choose another that stands in for it, or goes with it, and how well each does so has to be
found out pair by pair. So learner.stacking adds to the log-odds of choosing a

    Σ_j answer_{j a} √share(s, j)        answer_{j a} ~ N(0, τ²)

over the READ newest distinct items j of the history that have a near them: the NEAR - 1 items that were gone to most
often around the same time, over the root of how often either is gone to at all (as the cosine of Sarwar et al. 2001 is
for co-visits), and j itself.

Here they are read; learner.answer_fit learns them.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.co_views import again
from learner.recall import NEAR, newest_entries, newest_places, pulled_at
from streaming.jit import jit

READ: Final = 16  # newest distinct items of a history that count

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class Table(NamedTuple):
    """Pairs, by the item looked at; row 0 is of no item."""

    source: Ints  # [R] vocabulary ids, ascending from 0
    near: Ints  # [R, NEAR] vocabulary ids, 0: none
    answer: Floats  # [R, NEAR]


class Pulls(NamedTuple):
    """What histories add to which rows of the keys, for B states; no gradients."""

    row: Tensor  # [B, E] int64, some maybe more than once; 0, the unknown item, where there is nothing
    pull: Tensor  # [B, E]

    def rows(self, which: Tensor | slice) -> Pulls:
        """Of these states."""
        return Pulls(self.row[which], self.pull[which])

    def at(self, ids: Tensor) -> Tensor:
        """Of these rows, [B, K]; 0 for the unknown item. ids: [B, K]."""
        return pulled_at(self.row, self.pull, ids)


def no_pairs() -> Table:
    """What is known before there is anything to learn from."""
    return Table(np.zeros(1, np.int32), np.zeros((1, NEAR), np.int32), np.zeros((1, NEAR), np.float32))


def compile_answers() -> None:
    """Have the loops compiled."""
    source, near, answer = (torch.from_numpy(column) for column in no_pairs())
    pulls_of(source, near, answer, torch.ones(1, 1, dtype=torch.int64))


def check_pairs(table: Table, items: int) -> None:
    """Raises: ValueError when this is none, over vocabulary ids below `items`."""
    source, near, answer = table
    shape = (len(source), NEAR)
    ascending = source[:1].tolist() == [0] and bool((np.diff(source) > 0).all())
    if not (ascending and near.shape == answer.shape == shape and ((near >= 0) & (near < items)).all()):
        raise ValueError(
            f"what items answer to: {len(source)} sources, {near.shape} near, {answer.shape} answers"
        )


def pulls_of(source: Tensor, near: Tensor, answer: Tensor, item: Tensor, ids: Tensor | None = None) -> Pulls:
    """What histories add where. source, near, answer: see `Table`; item: [B, H] vocabulary ids, newest first, 0 unknown
    or padding; ids: [N] ascending, what the rows of the keys are; None: row i is vocabulary id i. What is not among the
    rows is pulled by nothing."""
    if item.device.type == "cpu":
        row = torch.zeros(len(item), READ * NEAR, dtype=torch.int64)
        pull = torch.zeros(row.shape)
        look, root = _looks(item.numpy())
        pairs = source.numpy(), near.numpy(), answer.numpy()
        _spread(*pairs, look, root, row.numpy(), pull.numpy())
    else:
        row, pull = pulls_by_tensors(source, near, answer, item)
    if ids is not None:
        at = torch.searchsorted(ids, row).clamp(max=len(ids) - 1)
        there = ids[at] == row
        row, pull = at * there, pull * there
    return Pulls(row, pull)


def pulls_by_tensors(source: Tensor, near: Tensor, answer: Tensor, item: Tensor) -> Pulls:
    """The same, of vocabulary ids."""
    newest, often = newest_entries(item)
    which = newest_places(newest, READ)
    looked = (item * newest).gather(1, which)
    real = (item > 0).sum(dim=1, keepdim=True).clamp(min=1)
    root = (often.gather(1, which).exp() / real).sqrt() * (looked > 0)
    at = torch.searchsorted(source, looked.to(source.dtype)).clamp(max=len(source) - 1)
    at = torch.where(source[at] == looked, at, 0)
    row = near[at].flatten(1).long()
    return Pulls(row, (answer[at] * root.unsqueeze(2)).flatten(1) * (row > 0))


def looks_of(history: npt.NDArray[np.integer]) -> tuple[Ints, npt.NDArray[np.float16]]:
    """The READ newest distinct items of histories [T, H], 0 where there are no more, and √share of each, [T, READ]."""
    look, root = _looks(history)
    return look, root.astype(np.float16)


def _looks(history: npt.NDArray[np.integer]) -> tuple[Ints, Floats]:
    """The same, in full."""
    look, root = np.zeros((len(history), READ), np.int32), np.zeros((len(history), READ), np.float32)
    _look(history.astype(np.int32), look, root)
    return look, root


@jit
def row_of(source: Ints, item: np.int64) -> int:
    """Where the item stands, 0 where it does not."""
    low, high = 0, len(source)
    while low < high:
        middle = (low + high) // 2
        if source[middle] < item:
            low = middle + 1
        else:
            high = middle
    return low if low < len(source) and source[low] == item else 0


@jit
def _spread(
    source: Ints,
    near: Ints,
    answer: Floats,
    look: Ints,
    root: Floats,
    row: npt.NDArray[np.int64],
    pull: Floats,
) -> None:
    width = near.shape[1]
    for b in range(len(look)):
        for e in range(look.shape[1]):
            if look[b, e] == 0:
                break
            at = row_of(source, look[b, e])
            for m in range(width):
                if near[at, m] > 0:  # row 0 has none
                    row[b, e * width + m] = near[at, m]
                    pull[b, e * width + m] = answer[at, m] * root[b, e]


@jit
def _look(history: Ints, look: Ints, root: Floats) -> None:
    for t in range(len(history)):
        real = n = 0
        for one in history[t]:
            real += one > 0
        for h in range(history.shape[1]):
            if history[t, h] == 0 or again(history[t], h):
                continue
            same = 0
            for other in history[t]:
                same += other == history[t, h]
            look[t, n], root[t, n] = history[t, h], np.sqrt(np.float32(same) / np.float32(real))
            n += 1
            if n == look.shape[1]:
                break
