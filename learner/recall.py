"""What is remembered of where users went, beside what a network has learnt: known after one step, not after hundreds.

    next(s, a) = σ · organic(s, a) + exp(power) · log(1 + SCALE · (ways(s, a) + back(s, a)))
    ways(s, a) = Σ_i<READ exp(pull_i) · walk(item_i, a)
    back(s, a) = exp(again[kind_i] + place[place_i] + often · log n_i)        where a is item_i, else 0

over the distinct items of a history, the newest first (i = 0, 1, ...): n_i entries are of item_i, and kind_i is the
newest one's event type × recency. organic is the network's next-item head; walk is how likely co-views lead from an
item to another, in one step or two (learner.co_views), as it was when somebody last went from that item or to it. In a
catalog of tens of thousands most items come too seldom for a vector of theirs to say much, yet who went to one of them
went, more likely than not, where others went from there.

Ways and items that users come back to are parts of one mixture: what several entries lead to is as likely as they say
together, and not as their product. The weights begin as in `CoViews.walk_scores`, which is a good rule by itself. σ and
the weights are learnt from each step as it comes, before it is remembered and before the network learns it: what
was learnt from already would vouch for its own memory, and every pull look worth more than it is. Slots of slates are
not remembered: what is chosen there tells as much of what was shown as of what is liked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from learner.co_views import OWN, WALKED, CoViews, again
from streaming.jit import jit

READ: Final = 8  # newest items of a history that walks start from
SCALE: Final = 100.0  # one over the mass of an item at which it begins to tell
RATE: Final = 0.1  # of Adam, at first; falls with the root of blocks learnt from ...
SLOWER: Final = 30  # ... from here on
NEAR: Final = 6  # items that are near one, itself among them
BLOCK: Final = 128  # steps learnt from at once
EVERY: Final = 1024  # steps, of which so many are learnt from ...
YOUNG: Final = 256  # ... once there have been so many blocks; before, of each lot of steps that comes


class Recalled(NamedTuple):
    """What pulls on which rows of the keys, for B states; no gradients."""

    row: Tensor  # [B, E] int64, no other twice; 0, the unknown item, where there is nothing
    ways: Tensor  # [B, E] log(1 + SCALE · ways)
    whole: Tensor  # [B, E] with what is come back to

    def rows(self, which: Tensor | slice) -> Recalled:
        """Of these states."""
        return Recalled(*(column[which] for column in self))

    def ways_at(self, ids: Tensor) -> Tensor:
        """Of these rows, [B, K]; 0 for the unknown item. ids: [B, K]."""
        return pulled_at(self.row, self.ways, ids)


def pulled_at(row: Tensor, pull: Tensor, ids: Tensor) -> Tensor:
    """Of ids [B, K], the sums of pull [B, E] over the entries whose row, [B, E], each is, [B, K]; of id 0 none. No
    gradients."""
    if ids.device.type != "cpu":
        same = (row.unsqueeze(1) == ids.unsqueeze(2)) & (ids > 0).unsqueeze(2)
        return (same * pull.unsqueeze(1)).sum(dim=2)
    out = np.zeros(ids.shape, np.float32)
    _find_at(row.numpy(), pull.numpy(), ids.numpy(), out)
    return torch.from_numpy(out)


@jit
def _find_at(
    row: npt.NDArray[np.int64],
    pull: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int64],
    out: npt.NDArray[np.float32],
) -> None:
    for b in range(len(row)):
        for e in range(row.shape[1]):
            if row[b, e] == 0:
                continue
            for k in range(ids.shape[1]):
                if ids[b, k] == row[b, e]:
                    out[b, k] += pull[b, e]


class Weights(NamedTuple):
    """What is learnt beside the memory itself."""

    scale: Tensor  # [1] σ
    power: Tensor  # [1]
    again: Tensor  # [KINDS]
    place: Tensor  # [PLACES]
    often: Tensor  # [1]
    pull: Tensor  # [READ]


class Recall(nn.Module):
    """The memory's values; of which `RecallFit` learns."""

    led: Tensor
    walk: Tensor
    scale: Tensor
    power: Tensor
    again: Tensor
    place: Tensor
    often: Tensor
    pull: Tensor

    def __init__(self, kinds: int, places: Sequence[int]) -> None:
        """kinds: of history entries; places: a place of each bucket of them, from 0."""
        super().__init__()
        # as many rows as there are vocabulary ids up to the last that anybody went to unaided
        self.register_buffer("led", torch.zeros(1, WALKED, dtype=torch.int32))  # vocabulary ids, 0: none
        self.register_buffer("walk", torch.zeros(1, WALKED))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("power", torch.zeros(1))
        self.register_buffer("again", torch.zeros(kinds))
        self.register_buffer("place", torch.log(float(OWN[0]) / (torch.tensor(places) + 1) + float(OWN[1])))
        self.register_buffer("often", torch.zeros(1))
        self.register_buffer("pull", -torch.arange(1, READ + 1).log())

    @property
    def has_any(self) -> bool:
        """Whether anything is remembered; else nobody need look."""
        return len(self.led) > 1

    def recalled(
        self,
        item: Tensor,
        kinds: Tensor,
        places: Tensor,
        ids: Tensor | None,
        weights: Weights | None = None,
    ) -> Recalled:
        """item, kinds: [B, H] of histories; places: [H] buckets of places; ids: [N] ascending, that the rows of the
        keys are, those of the histories among them; None: row i is vocabulary id i. What is not among the rows pulls on
        nothing. weights: None: what was learnt; else with their gradients."""
        newest, often = newest_entries(item)
        known = weights or self.weights
        rank = (newest.cumsum(dim=1) - 1).clamp(min=0)
        back = torch.exp(known.again[kinds] + known.place[places[rank]] + known.often * often) * newest
        pull = known.pull.exp()
        if weights is None and item.device.type == "cpu":
            row, ways, whole = self.merged(item.numpy(), back.numpy(), pull.numpy())
        else:
            read = self.known(_newest_items(item, newest))
            led = functional.embedding(read, self.led).flatten(1).long()
            walk = (functional.embedding(read, self.walk) * pull[: read.shape[1]].unsqueeze(1)).flatten(1)
            nothing = torch.zeros_like(back)
            masses = torch.stack((torch.cat((nothing, walk), dim=1), torch.cat((back, walk), dim=1)))
            row, sums = _summed(torch.cat((item * newest, led), dim=1), masses)
            ways, whole = torch.log1p(SCALE * sums)
        if ids is not None:
            at = torch.searchsorted(ids, row).clamp(max=len(ids) - 1)
            there = ids[at] == row
            row, ways, whole = at * there, ways * there, whole * there
        return Recalled(row, ways, whole)

    def merged(
        self, item: npt.NDArray[np.integer], back: npt.NDArray[np.float32], pull: npt.NDArray[np.float32]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Recalled`, rows being vocabulary ids. item, back: [B, H]; pull: [READ]."""
        shape = len(item), item.shape[1] + READ * WALKED
        row, ways, whole = np.zeros(shape, np.int64), *np.zeros((2, *shape), np.float32)
        _merge(self.led.numpy(), self.walk.numpy(), item, back, pull, row, ways, whole)
        return torch.from_numpy(row), torch.from_numpy(ways), torch.from_numpy(whole)

    def leads_to(self, item: Tensor) -> Tensor:
        """Where walks from histories [B, H] lead, [B, READ * WALKED] vocabulary ids; 0: nowhere."""
        read = self.known(_newest_items(item, newest_entries(item)[0]))
        return self.led[read].flatten(1).long()

    def known(self, item: Tensor) -> Tensor:
        """These vocabulary ids, 0 for those of which nothing is remembered."""
        return torch.where(item < len(self.led), item, 0)

    @property
    def weights(self) -> Weights:
        """As they are by now; they share their numbers."""
        return Weights(*(getattr(self, name) for name in Weights._fields))


@jit
def _merge(
    led: npt.NDArray[np.int32],
    walk: npt.NDArray[np.float32],
    item: npt.NDArray[np.integer],
    back: npt.NDArray[np.float32],
    pull: npt.NDArray[np.float32],
    row: npt.NDArray[np.int64],
    ways: npt.NDArray[np.float32],
    whole: npt.NDArray[np.float32],
) -> None:
    """Sums by item, found by a table of hashes: there are few of them, of maybe a million."""
    size = 2
    while size < 2 * row.shape[1]:
        size *= 2
    place = np.empty(size, np.int64)  # in row, of the item with this hash; -1: none
    for b in range(len(item)):
        place[:] = -1
        n = read = 0
        for h in range(item.shape[1]):
            start = np.int64(item[b, h])
            if start == 0 or again(item[b], h):
                continue
            at = _place(place, row[b], n, start)
            n = max(n, at + 1)
            whole[b, at] += back[b, h]
            if read < len(pull) and start < len(led):
                for m in range(led.shape[1]):
                    to = np.int64(led[start, m])
                    if to == 0:
                        break
                    at = _place(place, row[b], n, to)
                    n = max(n, at + 1)
                    ways[b, at] += pull[read] * walk[start, m]
            read += 1
        for e in range(n):
            whole[b, e] = np.log1p(np.float32(SCALE) * (ways[b, e] + whole[b, e]))
            ways[b, e] = np.log1p(np.float32(SCALE) * ways[b, e])


@jit
def _place(place: npt.NDArray[np.int64], row: npt.NDArray[np.int64], n: int, item: np.int64) -> int:
    """Where in row the item is; the first time it is put after the n that are there."""
    at = (item * 0x9E3779B1) & (len(place) - 1)
    while place[at] >= 0 and row[place[at]] != item:
        at = (at + 1) & (len(place) - 1)
    if place[at] < 0:
        place[at] = n
        row[n] = item
    return int(place[at])


def _summed(row: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
    """Each row once, [B, E], 0 in place of others like it, and its sums, [2, B, E]. row: [B, E]; masses: [2, B, E] of
    what is not negative."""
    row, order = row.sort(dim=1)
    sums = masses.gather(2, order.expand_as(masses)).cumsum(dim=2)
    last = functional.pad(row[:, 1:] != row[:, :-1], (0, 1), value=True)
    before = functional.pad(torch.where(last, sums, 0.0).cummax(dim=2).values[..., :-1], (1, 0))
    return row * last, (sums - before) * (last & (row > 0))


def _newest_items(item: Tensor, newest: Tensor) -> Tensor:
    """[B, READ or H if less] the newest distinct items; 0 where there are no more."""
    at = newest_places(newest, READ)
    return item.gather(1, at) * newest.gather(1, at)


def newest_places(newest: Tensor, most: int) -> Tensor:
    """[B, most or H if less] the entries that are the newest of their item first, in order. newest: [B, H]."""
    order = newest * torch.arange(newest.shape[1], 0, -1, device=newest.device)
    return order.topk(min(most, newest.shape[1]), dim=1).indices


def newest_entries(item: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries of histories [B, H] are the newest of their item, bool, and the logarithm of how many of it there
    are, float32, [B, H] each; of padding and unknown items none is."""
    if item.device.type != "cpu":
        same = item.unsqueeze(2) == item.unsqueeze(1)
        return ~torch.tril(same, -1).any(dim=2) & (item > 0), same.sum(dim=2).log()
    newest, often = np.zeros(item.shape, np.bool_), np.zeros(item.shape, np.float32)
    _count_entries(item.numpy(), newest, often)
    return torch.from_numpy(newest), torch.from_numpy(often)


@jit
def _count_entries(
    item: npt.NDArray[np.int64], newest: npt.NDArray[np.bool_], often: npt.NDArray[np.float32]
) -> None:
    for b in range(len(item)):
        for h in range(item.shape[1]):
            if item[b, h] > 0 and not again(item[b], h):
                count = 0
                for other in item[b]:
                    count += other == item[b, h]
                newest[b, h], often[b, h] = True, np.log(np.float32(count))


def compile_recall() -> None:
    """Have the loops compiled, by a memory that is thrown away."""
    memory = RecallFit(Recall(1, [0]))
    memory.observe(np.array([[1, 2]], np.int32), np.array([3]))
    item = torch.tensor([[3, 1]])
    nothing = torch.zeros_like(item)
    memory.recall.recalled(item, nothing, nothing[0], None).ways_at(item)
    memory.nearest(np.array([1]))


class RecallFit:
    """Learns a `Recall`, and keeps what that takes."""

    def __init__(self, recall: Recall) -> None:
        self.recall = recall
        self.blocks = 0
        self._waited = 0  # steps since the last
        self._co_views = CoViews()
        self._optimiser = self._new_optimiser()

    def due(self, steps: int) -> bool:
        """Whether a block of these steps, at most `EVERY`, is to be learnt from: it costs what an update does."""
        self._waited += steps
        return self.recall.has_any and (self.blocks < YOUNG or self._waited >= EVERY)

    def learn(
        self,
        organic: Tensor,
        stands_for: Tensor | None,
        went: Tensor,
        recalled: Callable[[Weights], Recalled],
    ) -> None:
        """Learn σ and the weights from a block of T steps. organic: [T, N] log-odds, no gradient; stands_for: [N] the
        logarithm of how many items each of the N does; None: itself; went: [T] where to, a row of the N; recalled: see
        `Recall.recalled`."""
        self.blocks += 1
        self._waited = 0
        self._optimiser.param_groups[0]["lr"] = RATE * min(1.0, (SLOWER / self.blocks) ** 0.5)
        self._optimiser.zero_grad(set_to_none=True)
        weights = Weights(*self._parameters())
        mine = recalled(weights)
        logits = (weights.scale * organic).scatter_add(1, mine.row, weights.power.exp() * mine.whole)
        if stands_for is not None:
            logits = logits + stands_for
        functional.cross_entropy(logits, went).backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()

    @torch.no_grad()
    def observe(self, history: npt.NDArray[np.int32], item: npt.NDArray[np.integer]) -> None:
        """Remember steps to items [T] from histories [T, H], newest first; vocabulary ids."""
        self._reserve(int(max(item.max(), history.max())) + 1)
        changed = self._co_views.observe(history, item)
        to, walk = self._co_views.walks(changed)
        device = self.recall.led.device
        rows = torch.from_numpy(changed).to(device)
        self.recall.led[rows] = torch.from_numpy(to).to(device)
        self.recall.walk[rows] = torch.from_numpy(walk).to(device)

    def nearest(self, items: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        """See `CoViews.nearest`; of items that nothing is remembered of, none but themselves."""
        near = np.zeros((len(items), NEAR), np.int32)
        near[:, 0] = items
        known = items < len(self.recall.led)
        near[known] = self._co_views.nearest(items[known], NEAR)
        return near

    def _reserve(self, items: int) -> None:
        """Grow the tables to so many rows at least, by doubling."""
        before = len(self.recall.led)
        if items > before:
            more = max(items, 2 * before) - before
            self.recall.led = functional.pad(self.recall.led, (0, 0, 0, more))
            self.recall.walk = functional.pad(self.recall.walk, (0, 0, 0, more))
            self._co_views.grow(before + more)

    def served(self, followed: bool = True) -> dict[str, Tensor]:
        """The memory's values as they stand now. Copies, on the CPU. followed: whether choice follows them; else
        servers need not know where anybody went."""
        rows = slice(None if followed else 1)
        return {
            name: (value[rows] if name in _BY_ITEM else value).cpu().clone()
            for name, value in self.recall.state_dict().items()
        }

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, exactly. Copies."""
        mine = {name: value.numpy() for name, value in self.served().items()}
        mine["counters"] = np.array([self.blocks, self._waited])
        mine |= {f"co_views.{name}": value for name, value in self._co_views.state().items()}
        for name, parameter in zip(Weights._fields, self._parameters(), strict=True):
            for key, value in self._optimiser.state.get(parameter, {}).items():
                mine[f"adam.{key}.{name}"] = value.cpu().numpy().copy()
        return mine

    @torch.no_grad()
    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go back to what `state` gave."""
        self.blocks, self._waited = state["counters"].tolist()
        for name, mine in self.recall.state_dict().items():
            setattr(self.recall, name, torch.from_numpy(state[name].copy()).to(mine.device))
        self._co_views.restore({name: state[f"co_views.{name}"] for name in self._co_views.state()})
        self._optimiser = self._new_optimiser()
        for name, parameter in zip(Weights._fields, self._parameters(), strict=True):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"adam.{key}.{name}" in state:
                    value = torch.from_numpy(np.array(state[f"adam.{key}.{name}"]))
                    device = "cpu" if key == "step" else parameter.device
                    self._optimiser.state[parameter][key] = value.to(device)

    def _parameters(self) -> list[Tensor]:
        """The weights, with gradients."""
        return self._optimiser.param_groups[0]["params"]

    def _new_optimiser(self) -> torch.optim.Adam:
        values = (value.detach().requires_grad_() for value in self.recall.weights)
        return torch.optim.Adam(values, lr=RATE)  # shares the numbers


_BY_ITEM: Final = ("led", "walk")
