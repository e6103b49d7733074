"""What share each entry of a history has of each of the encoder's channels.

    weight[b, h, c] = by_kind[kind of entry h, c] · by_place[h, c]              0 of padding
    share[b, h, c]  = weight[b, h, c] / (½ + Σ_h weight[b, h, c])               ½: short histories say less

On the CPU these are compiled loops with the gradient worked out by hand; elsewhere tensors say the same.
"""

from __future__ import annotations

from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from learner.entries import AGES
from streaming.jit import jit

LEAST: Final = 0.5  # what is added to a channel's total

Floats = npt.NDArray[np.float32]


def shares(kinds: Tensor, by_kind: Tensor, by_place: Tensor) -> Tensor:
    """[B, H, C]. kinds: [B, H] of learner.entries; by_kind: [KINDS, C] and by_place: [H, C], positive float32."""
    if kinds.device.type == "cpu":
        return cast(Tensor, _Shares.apply(kinds, by_kind, by_place))
    return shares_by_tensors(kinds, by_kind, by_place)


def shares_by_tensors(kinds: Tensor, by_kind: Tensor, by_place: Tensor) -> Tensor:
    """The same."""
    weight = functional.embedding(kinds, by_kind) * by_place * (kinds >= AGES).unsqueeze(2)
    return weight / (weight.sum(dim=1, keepdim=True) + LEAST)


def compile_shares() -> None:
    """Have the loops compiled."""
    by_kind, by_place = torch.ones(2 * AGES, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    with torch.enable_grad():
        shares(torch.full((1, 1), AGES), by_kind, by_place).sum().backward()  # type: ignore[no-untyped-call]


class _Shares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kinds: Tensor, by_kind: Tensor, by_place: Tensor) -> Tensor:
        share = torch.empty(*kinds.shape, by_kind.shape[1])
        total = torch.full((len(kinds), by_kind.shape[1]), LEAST)
        _share(AGES, *(x.detach().numpy() for x in (kinds, by_kind, by_place, share, total)))
        ctx.save_for_backward(kinds, by_kind, by_place, share, total)
        return share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        kinds, by_kind, by_place, share, total = ctx.saved_tensors
        of_kind, of_place = torch.zeros_like(by_kind), torch.zeros_like(by_place)
        saved = (gradient, kinds, by_kind, by_place, share, total, of_kind, of_place)
        _share_back(AGES, *(x.detach().numpy() for x in saved))
        return None, of_kind, of_place


@jit
def _share(
    first: int,
    kinds: npt.NDArray[np.int64],
    by_kind: Floats,
    by_place: Floats,
    share: Floats,
    total: Floats,
) -> None:
    """Fill in share, and add to total. first: kind that is no padding."""
    batch, length, channels = share.shape
    for b in range(batch):
        for h in range(length):
            kind = kinds[b, h]
            for c in range(channels):
                weight = by_kind[kind, c] * by_place[h, c] if kind >= first else np.float32(0)
                share[b, h, c] = weight
                total[b, c] += weight
        for h in range(length):
            for c in range(channels):
                share[b, h, c] /= total[b, c]


@jit
def _share_back(
    first: int,
    gradient: Floats,
    kinds: npt.NDArray[np.int64],
    by_kind: Floats,
    by_place: Floats,
    share: Floats,
    total: Floats,
    of_kind: Floats,
    of_place: Floats,
) -> None:
    """Add to the gradients of by_kind and by_place: d share_i / d weight_j = ([i = j] - share_i) / total."""
    batch, length, channels = share.shape
    pulled = np.empty(channels, np.float32)
    for b in range(batch):
        for c in range(channels):
            pulled[c] = 0
        for h in range(length):
            for c in range(channels):
                pulled[c] += gradient[b, h, c] * share[b, h, c]
        for h in range(length):
            kind = kinds[b, h]
            if kind >= first:
                for c in range(channels):
                    of_weight = (gradient[b, h, c] - pulled[c]) / total[b, c]
                    of_kind[kind, c] += of_weight * by_place[h, c]
                    of_place[h, c] += of_weight * by_kind[kind, c]
