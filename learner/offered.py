"""Items that come with features of their own, as a server computes them: a compiled loop.

The equations are those of `learner.networks.ItemTower`, which trains; its many small operations would cost a request
that brings ten candidates more than all else that there is to do for it. `Policy.check` compares the two on every
version before it serves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.feature_levels import MOST_IN_VECTOR, MOST_SAID
from learner.networks import (
    NO_PRICE,
    PRICE_FEATURES,
    ItemTensors,
    NetworkSettings,
    QNetwork,
    Shelf,
    unknown_items,
)
from streaming.jit import jit

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

AS_CATALOGUED = -1  # in place of a bucket


class Offered(NamedTuple):
    """M items, as a request tells of them; of what it does not tell, the catalog counts."""

    row: Ints  # [M] vocabulary ids, 0 unknown
    category: Ints  # [M] bucket, 0 none; AS_CATALOGUED
    brand: Ints  # [M] likewise
    price: Floats  # [M] as `price_levels` has it; NaN: as in the catalog
    vector: Floats  # [M, vector_dim]
    has_vector: npt.NDArray[np.bool_]  # [M] False: as in the catalog


class _Known(NamedTuple):
    """N items as the catalog and the network know them, V numbers a vector."""

    category: Ints  # [N]
    brand: Ints  # [N]
    price: Floats  # [N]
    vector: Floats  # [N, V]
    seen: npt.NDArray[np.bool_]  # [N]
    id: Floats  # [N, d + 1]
    own: Floats  # [N, d + 1] of learner.response
    level: Floats  # [N] of learner.stacking


class _Tower(NamedTuple):
    new: Floats  # [d + 1]
    category: Floats  # [buckets, d]
    brand: Floats  # [buckets, d]
    dense: Floats  # [PRICE_FEATURES + V, d]
    bias: Floats  # [d]
    slope: Floats  # [V + 1] of learner.stacking


class CompiledTower:
    """What a network makes of items, beside a catalog of N that stays as it is."""

    def __init__(self, network: QNetwork, items: ItemTensors) -> None:
        tower, stack = network.tower, network.stack
        of_items = (*items, tower.id.weight[: len(items.seen)], network.response.own, stack.level)
        self._known = _Known(*map(_array, of_items))
        dense = tower.dense
        hashed = (table.weight for table in tower.hashed)
        self._tower = _Tower(*map(_array, (tower.new, *hashed, dense.weight.T, dense.bias, stack.slope)))

    def shelf(self, offered: Offered) -> Shelf:
        """These items, before any head looks at them."""
        m, d = len(offered.row), len(self._tower.bias)
        tower, bias = np.empty((m, d), np.float32), np.empty(m, np.float32)
        own, level = np.empty((m, d + 1), np.float32), np.empty(m, np.float32)
        category = np.empty(m, np.int64)
        _fill(self._known, self._tower, offered, tower, bias, own, level, category)
        return Shelf(*map(torch.from_numpy, (tower, bias, own, level, category)))


def compile_offered() -> None:
    """Have the loop compiled."""
    network, nothing = QNetwork(NetworkSettings(), 1), np.zeros(1, np.int64)
    width = network.settings.vector_dim
    told = np.zeros(1, np.float32), np.zeros((1, width), np.float32), np.zeros(1, np.bool_)
    CompiledTower(network, unknown_items(1, width)).shelf(Offered(nothing, nothing, nothing, *told))


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    return np.ascontiguousarray(tensor.detach().numpy())


@jit
def _fill(
    known: _Known,
    p: _Tower,
    offered: Offered,
    tower: Floats,
    bias: Floats,
    own: Floats,
    level: Floats,
    category: Ints,
) -> None:
    """Fill in the shelf."""
    d, width = len(p.bias), len(p.slope) - 1
    slopes = False
    for x in p.slope:
        slopes |= x != 0
    for m in range(len(offered.row)):
        row = offered.row[m]
        category[m] = offered.category[m] if offered.category[m] >= 0 else known.category[row]
        brand = offered.brand[m] if offered.brand[m] >= 0 else known.brand[row]
        price = known.price[row] if np.isnan(offered.price[m]) else offered.price[m]
        vector = offered.vector[m] if offered.has_vector[m] else known.vector[row]
        by_id = known.id[row] if known.seen[row] else p.new
        for j in range(d):
            tower[m, j] = by_id[j] + p.category[category[m], j] + p.brand[brand, j] + p.bias[j]
        bias[m] = by_id[d]
        if price > NO_PRICE:
            for j in range(d):
                tower[m, j] += p.dense[0, j] + price * p.dense[1, j]
                tower[m, j] += price * price / np.float32(3) * p.dense[2, j]
                tower[m, j] += price * price * price / np.float32(9) * p.dense[3, j]
        said, says = p.slope[width], False
        for i in range(width):
            if vector[i] != 0:
                x = min(max(vector[i], np.float32(-MOST_IN_VECTOR)), np.float32(MOST_IN_VECTOR))
                says = True
                said += x * p.slope[i]
                for j in range(d):
                    tower[m, j] += x * p.dense[PRICE_FEATURES + i, j]
        level[m] = known.level[row]
        if says and slopes:
            level[m] += min(max(said, np.float32(-MOST_SAID)), np.float32(MOST_SAID))
        for j in range(d + 1):
            own[m, j] = known.own[row, j]
