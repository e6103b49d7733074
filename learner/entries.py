"""What the entries of histories say, before any network reads them: of what kind each is, and how often which came.

    state = StateTensors(item, name, age_s, value)      # B histories, newest entry first
    entries = entries_of(state)                         # kinds and counts: once, whoever reads them then

On the CPU one compiled loop counts all of it; elsewhere tensors do, and both say the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from streaming.jit import jit
from streaming.rewards import EVENT_NAMES

# Upper ends of the recency buckets, seconds; the last bucket is open. 30 minutes ends a visit.
AGE_BOUNDS_S: Final = (15.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0, 604800.0)
AGES: Final = len(AGE_BOUNDS_S) + 1
SESSION_AGES: Final = 4  # buckets that lie within a visit
PLACE_BOUNDS: Final = (1, 2, 3, 5, 9, 17)  # buckets of an entry's place in the history, newest = 0
PLACES: Final = len(PLACE_BOUNDS) + 1
NAMES: Final = len(EVENT_NAMES)
KINDS: Final = NAMES * AGES  # of entries
COUNTS: Final = 2 * NAMES + 5
MOST_VALUE: Final = (
    1e12  # of an entry: what is further from zero counts as this, or one odd record would overflow all
)


class StateTensors(NamedTuple):
    """B histories, newest entry first, padded at the end with name 0 (as in streaming.transitions.States)."""

    item: Tensor  # [B, H] int64 vocabulary ids, 0 unknown
    name: Tensor  # [B, H] int64 event-name codes, 0 padding
    age_s: Tensor  # [B, H] float32
    value: Tensor  # [B, H] float32

    def rows(self, which: Tensor) -> StateTensors:
        """The states at these rows (indices or mask)."""
        return StateTensors(*(column[which] for column in self))


class Entries(NamedTuple):
    """Of B states."""

    kinds: Tensor  # [B, H] int64 in 0..KINDS - 1: event type x recency bucket; of padding, event type 0
    counts: Tensor  # [B, COUNTS]: how often each event type occurred, in this visit and earlier, and when
    # [B, H]: for entries of one item these come to √share, the share of all that are of that item; zeros if nobody asks
    back: Tensor


def entries_of(state: StateTensors, *, back: bool = True) -> Entries:
    """Of these states, names 0..NAMES - 1 and no age below 0; no gradient. back: whether somebody asks for it."""
    shape = state.item.shape
    if state.item.device.type != "cpu":
        kinds = kinds_of(state)
        none = torch.zeros(shape, device=kinds.device)
        return Entries(kinds, _counts(state, kinds), going_back(state.item) if back else none)
    kinds, counts = torch.empty(shape, dtype=torch.int64), torch.zeros(shape[0], COUNTS)
    shares = torch.zeros(shape)
    item, name, age_s, value = (column.numpy() for column in state)
    _look(BOUNDS, NAMES, name, age_s, value, kinds.numpy(), counts.numpy())
    if back:
        _look_back(item, shares.numpy())
    return Entries(kinds, counts, shares)


def compile_entries() -> None:
    """Have the loops compiled."""
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    entries_of(StateTensors(nothing, nothing, nothing.float(), nothing.float()))


@lru_cache(maxsize=64)
def place_buckets(length: int, device: torch.device | str = "cpu") -> Tensor:
    """[H] in 0..PLACES - 1: of entry h's place, newest first. The same tensor each time: not to be changed."""
    with torch.inference_mode(False):  # whoever asks first, another may learn with it
        place = torch.arange(length, device=device)
        return torch.bucketize(place, torch.tensor(PLACE_BOUNDS, device=device), right=True)


def kinds_of(state: StateTensors) -> Tensor:
    """`Entries.kinds` of these states, by tensors."""
    ages = torch.zeros_like(state.name)
    for bound in AGE_BOUNDS_S:  # a few comparisons are quicker than a search
        ages += state.age_s >= bound
    return ages.add_(state.name, alpha=AGES)


@torch.no_grad()
def _counts(state: StateTensors, kinds: Tensor) -> Tensor:
    real = (state.name > 0).float()
    now = (kinds % AGES < SESSION_AGES).float() * real
    counts = torch.zeros(len(real), 2 * NAMES, device=real.device)
    counts.scatter_add_(1, state.name, now).scatter_add_(1, state.name + NAMES, real - now)
    since = (state.age_s * now).amax(dim=1)
    value = (state.value.clamp(0, MOST_VALUE) * real).sum(dim=1)
    times = torch.stack((state.age_s[:, 0] * real[:, 0], since, value), dim=1)
    ends = torch.stack((1 - real[:, 0], real[:, -1]), dim=1)  # empty, full
    return torch.cat((torch.log1p(counts), torch.log1p(times) / 10, ends), dim=1)


def going_back(item: Tensor) -> Tensor:
    """`Entries.back` of histories of these items, [B, H]; 0, unknown or padding, counts for nothing."""
    real = item > 0
    same = ((item.unsqueeze(1) == item.unsqueeze(2)) & real.unsqueeze(1)).sum(dim=2)  # [B, H]
    return real / (same * real.sum(dim=1, keepdim=True)).clamp(min=1).sqrt()


BOUNDS: Final = np.array(AGE_BOUNDS_S, np.float32)  # for compiled loops


@jit
def _look(
    bounds: npt.NDArray[np.float32],
    names: int,
    name: npt.NDArray[np.int64],
    age_s: npt.NDArray[np.float32],
    value: npt.NDArray[np.float32],
    kinds: npt.NDArray[np.int64],
    counts: npt.NDArray[np.float32],
) -> None:
    """Fill in kinds, and counts, which are zeros, of all states."""
    length, times = name.shape[1], 2 * names
    for b in range(len(name)):
        mine = counts[b]
        for h in range(length):
            age = 0
            for bound in bounds:
                age += age_s[b, h] >= bound
            kinds[b, h] = name[b, h] * AGES + age
            if name[b, h] == 0:
                continue
            if age < SESSION_AGES:
                mine[name[b, h]] += 1
                mine[times + 1] = max(mine[times + 1], age_s[b, h])
            else:
                mine[names + name[b, h]] += 1
            mine[times + 2] += min(max(value[b, h], np.float32(0)), np.float32(MOST_VALUE))
        if name[b, 0] > 0:
            mine[times] = age_s[b, 0]
        for i in range(times):
            mine[i] = np.log1p(mine[i])
        for i in range(times, times + 3):
            mine[i] = np.log1p(mine[i]) / np.float32(10)
        mine[times + 3] = name[b, 0] == 0
        mine[times + 4] = name[b, length - 1] > 0


@jit
def _look_back(item: npt.NDArray[np.int64], back: npt.NDArray[np.float32]) -> None:
    """Fill in back, which is zeros, of all states."""
    for b in range(len(item)):
        real = 0
        for one in item[b]:
            real += one > 0
        for h in range(item.shape[1]):
            if item[b, h] > 0:
                same = 0
                for other in item[b]:
                    same += other == item[b, h]
                back[b, h] = 1 / np.sqrt(np.float32(same * real))
