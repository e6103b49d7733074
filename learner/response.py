"""How items answer to being shown, beyond what interest in them tells: a Bayesian last layer under choice.

Users click on one slot in a hundred, so that most of what a network can fit there is noise. What interest tells (the
organic head) is a good first guess; how each item departs from it is learnt here, as far as the data bear it out:

    response(s, a) = b_a + w_a · φ̄(s) + (μ + M'φ̄(s)) · ψ̄(a) + pulls(s, a)      φ̄, ψ̄: φ(s), ψ(a), centred, of unit size

b_a and w_a are the item's own; μ and M are shared, what its features (and so its like) make of it; pulls are what the
history's entries of the item itself, and of its category, add by event type and age. All have Gaussian
priors around zero; those of w and M follow the covariance C of organic keys, since an item that departs from interest
in itself follows, more likely than not, interest in others. So nothing departs from interest before the log says so,
and everything may once it does.

The mode of the posterior is tracked by stochastic Newton steps, with one precision for each item and group in place of
a matrix: an optimiser with one step size for all would let every item walk as far as its luck. Where a batch visits a
share q of replay, and F is the Fisher information of what all of replay says of a number,

    b_a ← b_a + k [Σ_batch (y - p) - q b_a / σ_b²] / (F_a + 1/σ_b²)         and so w, μ, M and the pulls

which rests where the posterior has its mode, Σ_replay (y - p) = b / σ²: a Laplace approximation, on line (Spiegelhalter
& Lauritzen 1990), over a shared representation (NeuralLinear: Riquelme et al. 2018). Items that a batch does not visit
only fade: that is worked out when they are next read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS: Final = (0.01, 0.05, 0.002, 0.002)  # σ² of b, w, μ and M: log-odds squared
PULL_WIDTH: Final = 1e-4  # σ² of what one entry of a history adds
# k: steps go so far that replay, passed over but once or twice, is done justice to; noise grows with it, which drawing
# choices oftener (learner.replay) has made small
PACE: Final = 3.0
# of a size that vectors are read in, usually 1 to 3: where all that was shown so far is alike, what is not is not
# thousands off
SMALLEST: Final = 0.25
_RIDGE: Final = 1e-3


def _pace(q: float) -> float:
    """k, for a batch that visits so much of replay: no step goes further than what all of replay asks for."""
    return min(PACE, 1 / q)


class Response(nn.Module):
    """The layer's values; of which `Fit` learns."""

    own: Tensor
    shared: Tensor
    copy: Tensor
    alike: Tensor
    share: Tensor
    state_mean: Tensor
    item_mean: Tensor
    state_scale: Tensor
    item_scale: Tensor

    def __init__(self, d: int, items: int, kinds: int, channels: int) -> None:
        """kinds: of history entries; channels: of the encoder."""
        super().__init__()
        self.register_buffer("own", torch.zeros(items, d + 1))  # w_a, b_a
        self.register_buffer("shared", torch.zeros(d + 1, d))  # M, μ
        self.register_buffer("copy", torch.zeros(kinds))  # of an entry on its item ...
        self.register_buffer("alike", torch.zeros(kinds))  # ... on items of its category, by count ...
        self.register_buffer("share", torch.zeros(channels))  # ... and by share of each channel
        self.register_buffer("state_mean", torch.zeros(d))
        self.register_buffer("item_mean", torch.zeros(d))
        self.register_buffer("state_scale", torch.ones(1))  # root of the mean square of φ - its mean
        self.register_buffer("item_scale", torch.ones(1))

    def of_state(self, phi: Tensor) -> Tensor:
        """φ̄: φ [..., d], centred and of unit size, as are those of the states that slates were shown in."""
        return (phi - self.state_mean) / self.state_scale

    def of_item(self, tower: Tensor) -> Tensor:
        """ψ̄: ψ [..., d], centred and of unit size, as are those of the items shown."""
        return (tower - self.item_mean) / self.item_scale

    def keys(self, tower: Tensor, own: Tensor) -> Tensor:
        """What [φ, 1] has to be multiplied with, [N, d + 1]. tower: [N, d] ψ; own: [N, d + 1] rows of `own`."""
        keys = own + self.of_item(tower) @ self.shared.T
        slope, level = keys[:, :-1] / self.state_scale, keys[:, -1]
        return torch.cat((slope, (level - slope @ self.state_mean).unsqueeze(1)), dim=1)


class Shown(NamedTuple):
    """K slots of each of B steps, as the network saw them; no gradients."""

    phi: Tensor  # [B, d]
    tower: Tensor  # [B, K, d] ψ
    organic: Tensor  # [B, K, d] organic keys
    ids: Tensor  # [B, K] vocabulary ids
    chosen: Tensor  # [B, K] bool
    chance: Tensor  # [B, K] p, as fitted
    weight: Tensor  # [B, K] 0: no such slot
    unaided: Tensor  # [B, K] likewise of what users went to by themselves, no slots of slates
    kinds: Tensor  # [B, H] of the history's entries
    share: Tensor  # [B, H, C] that each has of each channel
    same: Tensor  # [B, K, H] bool: it is the slot's item
    alike: Tensor  # [B, K, H] bool: it is of the slot's category


class Pace(NamedTuple):
    """How far one batch carries the layer."""

    step: float | Tensor  # k
    back: float | Tensor  # k q: what priors take back goes with it
    kept: float | Tensor  # of information
    share: float | Tensor  # of means over a pass


class Fit:
    """Learns a `Response`, and keeps what that takes: information and moments."""

    def __init__(self, response: Response) -> None:
        self.response = response
        d, new = response.shared.shape[1], response.own.new_zeros
        self.information = new(len(response.own), 2)  # F of b_a and, summed over its numbers, of w_a
        # passes, and those paced, when each row was last caught up
        self.at = new((len(response.own), 2), dtype=torch.float64)
        # over replay, in all; by batches that held slates; and by batches that moments were taken from
        self.passes = self.looked = self.measured = 0.0
        self.paced = 0.0  # sum of k q, of all batches
        self.shared_information = new(2)  # F of μ and M, summed over their numbers
        # F of each pull: what its row of the information matrix sums to, so that all may move at once
        self.copy_information, self.alike_information = (new(len(response.copy)) for _ in range(2))
        self.share_information = new(len(response.share))
        self.key_mean = new(d)
        self.state_cov, self.key_cov, self.item_cov = (new(d, d).fill_diagonal_(1.0) for _ in range(3))
        self._prior = 1 / response.own.new_tensor(WIDTHS)
        self.directions = new(d, d)  # C: in which directions φ̄ counts how much; the mean of φ̄' C φ̄ is one
        self.dimensions = new(len(WIDTHS))  # in how many the features of b, w, μ and M spread
        self._derive()

    def enter(self, ids: slice) -> None:
        """These rows, of which nothing is known, are there from now on."""
        self.at[ids] = self._now()

    def _now(self) -> Tensor:
        return self.at.new_tensor((self.passes, self.paced))

    @torch.no_grad()
    def catch_up(self, ids: Tensor | slice = slice(None)) -> None:
        """Let rows fade for as long as no batch has visited them."""
        self.response.own[ids] *= self._kept(ids)
        self.information[ids] *= torch.exp(self.at[ids, :1] - self.passes).float()
        self.at[ids] = self._now()

    def _kept(self, ids: Tensor | slice) -> Tensor:
        """Share of each number of these rows that has not faded by now, [M, d + 1]."""
        paced = (self.paced - self.at[ids, 1:]).float()
        kept = torch.exp(-self._fading(self.information[ids]) * paced)  # [M, 2]
        return torch.cat((kept[:, 1:].expand(-1, self.response.own.shape[1] - 1), kept[:, :1]), dim=1)

    def _fading(self, information: Tensor) -> Tensor:
        """Share of b and of w that their priors take back in a pass at k = 1, [M, 2]."""
        prior = self._prior[:2]
        return prior / (information / self.dimensions[:2] + prior)

    def _derive(self) -> None:
        """What follows from the moments, in place: see learner.graphs."""
        states, d = self.state_cov / self.state_cov.trace(), len(self.state_cov)
        ridge = (_RIDGE * self.key_cov.trace() / d).expand(d).diag()
        directions = self.key_cov + ridge
        self.directions.copy_(directions / (directions * states).sum())
        spread = self.directions @ states
        # (Σ λ)² / Σ λ² of their spectra
        of_state = 1 / (spread * spread.T).sum().clamp(min=1e-6)
        of_items = self.item_cov.trace().square() / self.item_cov.square().sum()
        self.dimensions.copy_(
            torch.stack((torch.ones_like(of_state), of_state, of_items, of_state * of_items))
        )

    def learn(self, shown: Shown, q: float) -> None:
        """One batch, which visits a share q of replay. The rows of `shown.ids` are caught up."""
        told = (bool((weight > 0).any()) for weight in (shown.weight, shown.unaided))
        self.move(shown, *self.advance(q, *told))

    def advance(self, q: float, slates: bool, unaided: bool) -> tuple[str, Pace]:
        """Let the clocks go on by a batch that visits a share q of replay: in it are slots of slates, and what users
        went to unaided. Returns what of it is told of, and how far it carries."""
        self.passes += q
        self.paced += _pace(q) * q
        of = "slates" if slates else "unaided" if unaided and self.looked == 0 else "nothing"
        if of != "nothing":
            self.measured += q
        if of == "slates":
            self.looked += q
        share = q / min(self.measured, 1.0) if self.measured else 0.0
        return of, Pace(_pace(q), _pace(q) * q, math.exp(-q), share)

    @torch.no_grad()
    def move(self, shown: Shown, of: str, pace: Pace) -> None:
        """Learn from what `advance` said is told of. Of slates, where there are any; until then what users went to
        unaided is as good for moments."""
        if of == "unaided":
            self._look(shown, shown.unaided, pace)
        if of != "slates":
            return
        self._look(shown, shown.weight, pace)
        response = self.response
        phi, psi = response.of_state(shown.phi), response.of_item(shown.tower)
        towards = phi @ self.directions  # [B, d]
        size, length = (towards * phi).sum(dim=1, keepdim=True), psi.square().sum(dim=2)  # means of one
        gradient = shown.weight * (shown.chosen.float() - shown.chance)  # [B, K]
        told = shown.weight * shown.chance * (1 - shown.chance)
        self._move_own(shown.ids, gradient, torch.stack((told, told * size), dim=2), towards, pace)
        pulled = (gradient.unsqueeze(2) * psi).sum(dim=1)  # [B, d]
        told = torch.stack(((told * length).sum(), (told * length * size).sum()))
        self._move_shared(torch.vstack((towards.T @ pulled, pulled.sum(dim=0))), told, pace)
        self._move_pulls(shown, gradient, shown.weight * shown.chance * (1 - shown.chance), pace)

    def _look(self, shown: Shown, weight: Tensor, pace: Pace) -> None:
        """Moments of states, items and organic keys, over a pass. weight: [B, K]."""
        response = self.response
        slots = weight / weight.sum().clamp(min=1e-9)
        for vectors, weights, mean, cov in (
            (shown.phi, slots.sum(dim=1), response.state_mean, self.state_cov),
            (shown.tower.flatten(0, 1), slots.flatten(), response.item_mean, self.item_cov),
            (shown.organic.flatten(0, 1), slots.flatten(), self.key_mean, self.key_cov),
        ):
            mean.lerp_(weights @ vectors, pace.share)
            apart = vectors - mean
            cov.lerp_((apart * weights.unsqueeze(1)).T @ apart, pace.share).diagonal().add_(1e-9)
        response.state_scale.fill_(self.state_cov.trace().sqrt()).clamp_(min=SMALLEST)
        response.item_scale.fill_(self.item_cov.trace().sqrt()).clamp_(min=SMALLEST)
        self._derive()

    def _move_own(self, ids: Tensor, gradient: Tensor, told: Tensor, towards: Tensor, pace: Pace) -> None:
        """Rows of items shown: by their gradient; what takes them back is left to `catch_up`."""
        flat = ids.flatten()
        self.information.index_add_(0, flat, told.flatten(0, 1))
        precision = self.information[flat] / self.dimensions[:2] + self._prior[:2]  # [B * K, 2]
        step = pace.step * gradient.flatten().unsqueeze(1) / precision
        slope = towards.repeat_interleave(ids.shape[1], dim=0) * step[:, 1:]
        self.response.own.index_add_(0, flat, torch.cat((slope, step[:, :1]), dim=1))

    def _move_shared(self, gradient: Tensor, told: Tensor, pace: Pace) -> None:
        """M and μ. gradient: [d + 1, d]; told: [2] of μ, of M."""
        self.shared_information.mul_(pace.kept).add_(told)
        prior = self._prior[2:]
        precision = self.shared_information / self.dimensions[2:] + prior
        for which, rows in ((1, slice(None, -1)), (0, slice(-1, None))):
            self.response.shared[rows] *= torch.exp(-pace.back * prior[which] / precision[which])
            self.response.shared[rows] += pace.step * gradient[rows] / precision[which]

    def _move_pulls(self, shown: Shown, gradient: Tensor, told: Tensor, pace: Pace) -> None:
        """What entries of histories add. gradient, told: [B, K]."""
        kinds = shown.kinds.flatten()
        for name, match in (("copy", shown.same), ("alike", shown.alike)):
            match = match.float()
            each = torch.stack((gradient, told * match.sum(dim=2)), dim=1) @ match  # [B, 2, H]
            by_kind = gradient.new_zeros(len(getattr(self.response, name)), 2)
            by_kind.index_add_(0, kinds, each.transpose(1, 2).flatten(0, 1))
            self._move_pull(name, by_kind[:, 0], by_kind[:, 1], pace)
        by_channel = shown.alike.float() @ shown.share  # [B, K, C]
        size = by_channel.sum(dim=2)
        each = torch.stack((gradient, told * size)).flatten(1) @ by_channel.flatten(0, 1)  # [2, C]
        self._move_pull("share", each[0], each[1], pace)

    def _move_pull(self, name: str, gradient: Tensor, told: Tensor, pace: Pace) -> None:
        values, information = getattr(self.response, name), getattr(self, f"{name}_information")
        information.mul_(pace.kept).add_(told)
        precision = information + 1 / PULL_WIDTH
        values.mul_(torch.exp(-pace.back / (PULL_WIDTH * precision))).add_(pace.step * gradient / precision)

    # --- room and state

    def tensors(self) -> list[Tensor]:
        """All that `move` moves, in place."""
        mine = (getattr(self, name) for name in _STATE)
        return [*mine, *self.response.buffers(), self.directions, self.dimensions]

    def variance(self, rows: int) -> Tensor:
        """[rows, 2] how uncertain the first rows are by now: Var b_a, and Var w_a · φ̄ for φ̄'Cφ̄ = 1, as Laplace's
        approximation has them. That of what items share is left out: it is small once anything has been shown."""
        known = self.information[:rows] * torch.exp(self.at[:rows, :1] - self.passes).float()
        return 1 / (known / self.dimensions[:2] + self._prior[:2])

    def reserve(self, items: int) -> None:
        """Grow the tables by id to so many rows."""
        more = items - len(self.at)
        self.response.own = functional.pad(self.response.own, (0, 0, 0, more))
        self.information = functional.pad(self.information, (0, 0, 0, more))
        self.at = torch.cat((self.at, self._now().expand(more, -1)))

    def state(self, rows: int) -> dict[str, Tensor]:
        """Everything, exactly; of tables the first rows. Copies, on the CPU."""
        mine = {name: getattr(self, name) for name in _STATE}
        mine |= {name: table[:rows] for name, table in mine.items() if name in _BY_ITEM}
        mine |= self.response.state_dict() | {"own": self.response.own[:rows]}
        clocks = [self.passes, self.looked, self.measured, self.paced]
        mine["passes"] = torch.tensor(clocks, dtype=torch.float64)
        return {name: value.cpu().clone() for name, value in mine.items()}

    def served(self, rows: int) -> dict[str, Tensor]:
        """The layer's values as they stand now, of items the first rows. Copies, on the CPU."""
        values = self.response.state_dict() | {"own": self.own_now(rows)}
        return {name: value.cpu().clone() for name, value in values.items()}

    def own_now(self, rows: int) -> Tensor:
        """What the first items have of their own, faded to now, [rows, d + 1]; nothing moves."""
        return self.response.own[:rows] * self._kept(slice(rows))

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` gave; there is room for its rows.

        Raises: ValueError when it is of another shape.
        """
        clocks, at = state["passes"].tolist(), state["at"]
        if at.ndim == 1:  # of an earlier version, in which everything faded at the same pace
            clocks, at = [*clocks, PACE * clocks[0]], torch.stack((at, PACE * at), dim=1)
        state = {**state, "at": at}
        self.passes, self.looked, self.measured, self.paced = clocks
        self.at[:] = self._now()
        for name in (*_STATE, *self.response.state_dict()):
            mine = getattr(self if name in _STATE else self.response, name)
            if mine.shape[1:] != state[name].shape[1:]:
                raise ValueError(
                    f"{name} is {tuple(state[name].shape)}, this agent's is {tuple(mine.shape)}: settings differ"
                )
            mine[: len(state[name])] = state[name].to(mine.device)
        self._derive()


_BY_ITEM: Final = ("information", "at")
_STATE: Final = (
    *_BY_ITEM,
    *("shared_information", "copy_information", "alike_information", "share_information"),
    *("key_mean", "state_cov", "key_cov", "item_cov"),
)
