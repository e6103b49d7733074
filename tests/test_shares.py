"""Shares of channels: the compiled loops, and their gradient, against tensors."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.entries import AGES, KINDS
from learner.shares import shares, shares_by_tensors


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 7), st.integers(1, 5), st.integers(0, 9))
def test_the_loops_and_their_gradient_are_those_of_tensors(
    batch: int, length: int, channels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, KINDS, (batch, length), generator=generator)
    kinds[torch.rand(batch, length, generator=generator) < 0.3] = 0
    pull = torch.randn(batch, length, channels, generator=generator)
    found: list[list[Tensor]] = []
    for function in (shares, shares_by_tensors):
        generator.manual_seed(seed + 100)
        by_kind = torch.rand(KINDS, channels, generator=generator).requires_grad_()
        by_place = torch.rand(length, channels, generator=generator).requires_grad_()
        share = function(kinds, by_kind, by_place)
        (share * pull).sum().backward()  # type: ignore[no-untyped-call]
        found.append([share.detach(), by_kind.grad, by_place.grad])  # type: ignore[list-item]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_padding_has_no_share_and_short_histories_less() -> None:
    ones = torch.ones(KINDS, 2), torch.ones(3, 2)
    share = shares(torch.tensor([[AGES, 0, 0], [AGES, AGES, AGES + 1]]), *ones)
    torch.testing.assert_close(share[0], torch.tensor([[1 / 1.5] * 2, [0.0] * 2, [0.0] * 2]))
    torch.testing.assert_close(share[1], torch.full((3, 2), 1 / 3.5))


def test_a_gradient_of_another_layout_is_read_alike() -> None:
    kinds, by_place = torch.tensor([[AGES, 2 * AGES]]), torch.ones(2, 2)
    pull = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])
    grads = []
    for layout in (pull, pull.transpose(1, 2).contiguous().transpose(1, 2)):
        by_kind = torch.ones(KINDS, 2, requires_grad=True)
        shares(kinds, by_kind, by_place).backward(layout)  # type: ignore[no-untyped-call]
        grads.append(by_kind.grad)
    assert torch.equal(*grads)  # type: ignore[arg-type]
    assert grads[0] is not None
    assert grads[0][AGES].abs().sum() > 0
