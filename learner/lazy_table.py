"""Adam, decay and target network of a table by id, worked out for just the rows that an update reads.

A dense optimiser moves every row at every update, those without a gradient too: the mean of past gradients goes on,
decay draws to zero, the target follows. In a catalog of a million items that is all of the work. Nothing reads these
rows meanwhile, so what k updates without a gradient do is done at once when a row is next read, in closed form. With
r = β1 / √β2, m and v the moments, c1 and c2 their bias corrections (Kingma & Ba 2015, algorithm 1):

    w ← w - α · m / c1 / (√(v / c2) + ε) · (r + r² + ... + r^k),   m ← β1^k m,   v ← β2^k v

Two things are approximate, both of the first ~20 updates after a gradient: v in the denominator is taken as it was at
the first of them, and the target follows as if the way had been gone at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

BETAS: Final = (0.9, 0.999)
_RATIO: Final = BETAS[0] / BETAS[1] ** 0.5
_EARLY: Final = 256  # updates until c1 is 1, and c2 hardly changes while a mean dies away

_CHUNK: Final = 4096  # rows of which all that is worked out stays in a processor's cache


@dataclass(frozen=True)
class Rule:
    """How a row moves. tau: 0, the target is synced by others."""

    learning_rate: float
    eps: float
    decay: float  # share of a described row that each update takes away
    tau: float


class Rows(NamedTuple):
    """M rows of a table, each as it stood after update `at`."""

    online: Tensor  # [M, D]
    target: Tensor  # [M, D]
    mean: Tensor  # [M, D] of gradients: Adam's first moment
    square: Tensor  # [M, D] of their squares: its second
    at: Tensor  # [M] int64

    def take(self, ids: Tensor | slice) -> Rows:
        """These rows; copies where `ids` is a tensor."""
        return Rows(*(column[ids] for column in self))

    def put(self, ids: Tensor | slice, rows: Rows) -> None:
        """Set these rows. ids: no two the same."""
        for column, values in zip(self, rows, strict=True):
            column[ids] = values


@torch.no_grad()
def caught_up(rows: Rows, described: Tensor, updates: int, rule: Rule) -> Rows:
    """The rows as they stand after so many updates, of which none since `at` gave them a gradient.

    described: [M] bool, decay.
    """
    missed = (updates - rows.at).float()
    beta1, beta2 = BETAS
    glide = rule.learning_rate * _way(rows.at, missed)
    second = 1 - beta2 ** (rows.at + 1).float()
    root = (rows.square / _column(second, rows)).sqrt_().add_(rule.eps)
    online = rows.online - _column(glide, rows) * rows.mean / root
    online *= _column((1 - rule.decay * described.float()) ** missed, rows)
    kept = _column(_unfollowed(rows.at.float(), updates, rule.tau), rows)
    return Rows(
        online,
        online + kept * (rows.target - online),
        rows.mean * _column(beta1**missed, rows),
        rows.square * _column(beta2**missed, rows),
        torch.full_like(rows.at, updates),
    )


@torch.no_grad()
def catch_up(table: Rows, described: Tensor, updates: int, rule: Rule) -> None:
    """Leave no row of a whole table behind."""
    for cut in _cuts(table):
        table.put(cut, caught_up(table.take(cut), described[cut], updates, rule))


@torch.no_grad()
def networks_now(table: Rows, described: Tensor, updates: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """Online and target rows of a whole table, caught up; the table stays as it is."""
    online, target = torch.empty_like(table.online), torch.empty_like(table.target)
    for cut in _cuts(table):
        now = caught_up(table.take(cut), described[cut], updates, rule)
        online[cut], target[cut] = now.online, now.target
    return online, target


def _cuts(table: Rows) -> Iterator[slice]:
    size = _CHUNK if table.at.device.type == "cpu" else max(1, len(table.at))
    return (slice(start, start + size) for start in range(0, len(table.at), size))


@torch.no_grad()
def stepped(rows: Rows, gradient: Tensor, described: Tensor, share: float, rule: Rule) -> Rows:
    """The rows, all of them caught up, after one more update with this gradient [M, D]; share: see `follow_share`."""
    beta1, beta2 = BETAS
    update = rows.at + 1
    mean = rows.mean.lerp(gradient, 1 - beta1)
    square = (rows.square * beta2).addcmul_(gradient, gradient, value=1 - beta2)
    first, second = (1 - beta ** update.float() for beta in BETAS)
    root = (square / _column(second, rows)).sqrt_().add_(rule.eps)
    online = rows.online - _column(rule.learning_rate / first, rows) * mean / root
    online *= _column(1 - rule.decay * described.float(), rows)
    return Rows(online, rows.target.lerp(online, share), mean, square, update)


def follow_share(updates: int, tau: float) -> float:
    """How far the target goes towards the online network at an update: at first it is the plain mean of all so far, so
    that the network's beginnings do not linger; then Lillicrap et al. 2016's τ. 0 where τ is."""
    return max(tau, 1.0 / updates) if tau > 0 else 0.0


def _unfollowed(at: Tensor, updates: int, tau: float) -> Tensor:
    """Product of 1 - follow_share over the updates since `at`, [M]."""
    if tau == 0:
        return torch.ones_like(at)
    even = int(1 / tau)  # up to here it is a plain mean
    mean = at.clamp(max=even) / max(min(updates, even), 1)
    return mean * (1 - tau) ** (max(updates, even) - at.clamp(min=even))


def _way(at: Tensor, missed: Tensor) -> Tensor:
    """How far the mean's gliding on carries a row, in units of α · m / (√(v / c2) + ε) at its first step, [M]."""
    late = _RATIO * (1 - _RATIO**missed) / (1 - _RATIO)
    if not bool((at < _EARLY).any()):
        return late
    steps = torch.arange(2 * _EARLY + 1, dtype=torch.float64, device=at.device)
    first, second = (1 - beta**steps for beta in BETAS)
    terms = _RATIO**steps * (second.sqrt() / first).nan_to_num(0.0)
    sums = terms.cumsum(0)
    begin = at.clamp(max=_EARLY)
    end = (begin + missed.long()).clamp(max=2 * _EARLY)
    early = (sums[end] - sums[begin]) / _RATIO ** begin.double() / second[begin + 1].sqrt()
    return torch.where(at < _EARLY, early.float(), late)


def _column(values: Tensor, rows: Rows) -> Tensor:
    return values.to(rows.online.dtype).unsqueeze(1)
