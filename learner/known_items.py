"""What the agent knows of items by vocabulary id: features, what may be shown, and which have a row of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from learner.networks import PRICE_SCALE, ItemTensors, NetworkSettings, price_levels, unknown_items

MEETINGS: Final = 3  # with an item that features speak for, before its id has a row of its own


class CatalogArrays(Protocol):
    """What is read of streaming.catalog.Catalog: arrays by vocabulary id."""

    category: npt.NDArray[np.uint64]  # [N] hash, 0 unknown
    brand: npt.NDArray[np.uint64]  # [N] hash, 0 unknown
    price: npt.NDArray[np.float32]  # [N] NaN unknown
    in_stock: npt.NDArray[np.bool_]  # [N]
    gone: npt.NDArray[np.bool_]  # [N]
    known: npt.NDArray[np.bool_]  # [N] is in the catalog; others are recommendable all the same
    recorded: npt.NDArray[np.bool_]  # [N] the catalog has said what it is
    vector: npt.NDArray[np.float32]  # [N, >= vector_dim or less: padded]


class KnownItems:
    """N items, row 0 of which is the unknown one, in room for more: new items come in every batch, and each must not
    cost a copy of all that are known."""

    def __init__(self, network: NetworkSettings, device: torch.device) -> None:
        self._network, self._device = network, device
        self._room = unknown_items(1, network.vector_dim, device)
        self._room_offer = torch.zeros(1, dtype=torch.bool, device=device)
        self.described_room = torch.zeros(1, dtype=torch.bool, device=device)
        self.met = torch.zeros(1, dtype=torch.int32, device=device)  # times, with room: see `meet`
        self.any_described = False
        self._price_scale = torch.tensor(PRICE_SCALE, device=device)
        self._count_offered: int | None = None  # see `offered`; None: to be counted
        self._copy: dict[str, Tensor] | None = None  # see `tensors`; None: to be made
        self.show(1)

    @property
    def rows(self) -> int:
        """N."""
        return len(self.on_offer)

    @property
    def room(self) -> int:
        """Rows that there is room for."""
        return len(self._room_offer)

    @property
    def looked_at(self) -> ItemTensors:
        """The rows that an update looks at, where it looks at all: on the CPU the items, elsewhere all that there is
        room for, so that new items change neither shapes nor addresses (see learner.graphs)."""
        return self.items if self._device.type == "cpu" else self._room

    @property
    def spare(self) -> int:
        """How many of these are of no item."""
        return 0 if self._device.type == "cpu" else self.room - self.rows

    @property
    def offered(self) -> int:
        """How many may be shown."""
        if self._count_offered is None or self._device.type == "cpu":  # where to ask costs nothing
            self._count_offered = int(self.on_offer.sum())
        return self._count_offered

    def offer_looked_at(self) -> tuple[Tensor, Tensor | None]:
        """Of the rows that an update looks at: which may be shown, bool, and how many items each does, as a logarithm;
        None: one each."""
        if self._device.type == "cpu":
            return self.on_offer, None
        there_is = torch.arange(self.room, device=self._device) < self.rows
        return self._room_offer & there_is, torch.where(there_is, 0.0, -torch.inf)

    def make_room(self, rows: int) -> None:
        """Have room for so many rows."""
        more = rows - self.room
        fresh = unknown_items(more, self._network.vector_dim, self._device)
        self._room = ItemTensors(*(torch.cat(pair) for pair in zip(self._room, fresh, strict=True)))
        self._room_offer = torch.cat((self._room_offer, self._room_offer.new_ones(more)))
        self.described_room = functional.pad(self.described_room, (0, more))
        self.met = functional.pad(self.met, (0, more))

    def show(self, rows: int) -> None:
        """Let the items be the first so many rows of the room that there is."""
        self.items = ItemTensors(*(column[:rows] for column in self._room))
        self.on_offer = self._room_offer[:rows]  # [N] bool
        self.described = self.described_room[:rows]  # [N] bool: has a vector, by the last `turn`
        self._count_offered = self._copy = None

    def take_over(self, catalog: CatalogArrays) -> None:
        """Features, and what may be shown, as the catalog has it, which may know fewer items. Those of which it says
        nothing stay as they are known."""
        known, gone = np.asarray(catalog.known), np.asarray(catalog.gone)
        # of those that are gone a catalog read anew has no price
        self._look_prices(self._to(np.asarray(catalog.price, np.float32)[known]))
        told = np.flatnonzero(catalog.recorded)
        self.put(told, catalog, told)
        self.on_offer[: len(known)] = torch.from_numpy(~gone & (np.asarray(catalog.in_stock) | ~known))
        self.on_offer[0] = False
        self._count_offered = None

    def put(self, ids: npt.NDArray[np.integer], items: CatalogArrays, at: npt.NDArray[np.intp]) -> None:
        """Let the features of vocabulary ids [M] be what these arrays say of their rows `at`, [M]."""
        rows = self._to(ids, torch.int64)
        for mine, said, buckets in (
            (self.items.category, items.category, self._network.category_buckets),
            (self.items.brand, items.brand, self._network.brand_buckets),
        ):
            mine[rows] = bucket(said[at], buckets).to(self._device)
        price = self._to(np.asarray(items.price[at], np.float32))
        self.items.price[rows] = price_levels(price, self._price_scale)
        vector = items.vector[at, : self._network.vector_dim]
        self.items.vector[rows] = 0.0
        self.items.vector[rows, : vector.shape[1]] = self._to(np.asarray(vector, np.float32))
        self._copy = None

    def _look_prices(self, price: Tensor) -> None:
        """Take in what prices are usual in this catalog; NaN unknown."""
        logs = torch.log1p(price[~price.isnan()].clamp(min=0))
        if len(logs) > 1:
            self._price_scale = torch.stack((logs.mean(), logs.std().clamp(min=0.1)))

    def other_than_noted(self, rows: Tensor | None = None) -> Tensor:
        """Which of these rows, or of all, have a vector and had none, or the other way round, [M]."""
        at = slice(None) if rows is None else rows  # all of them in place: there may be a million
        has_vector = (self.items.vector[at] != 0).any(dim=1)
        others = torch.nonzero(has_vector != self.described[at]).squeeze(1)
        return others if rows is None else torch.unique(rows[others])

    def turn(self, rows: Tensor) -> Tensor:
        """Note that these have a vector from now on, or none any more, [M], no two the same; those of them that have
        one and no row of their own yet."""
        self.described[rows] = ~self.described[rows]
        self.any_described = bool(self.described.any())
        young = ~self.items.seen[rows] | (self.met[rows] < MEETINGS)
        told_apart = rows[self.described[rows] & young]
        self.items.seen[told_apart] = False
        return told_apart

    def meet(self, ids: npt.NDArray[np.integer]) -> None:
        """Note that these items, vocabulary ids [T] that there is room for, were shown or gone to, once more each.

        An item that features speak for has a row of its own from the `MEETINGS`th time on. Before, all that a row could
        tell is what became of a few slots, and drawn from replay again and again it would tell just that: items that
        come once and never again would each be known by whether they were clicked. And what new items have in common
        would be learnt from those alone that nobody went to yet, since those that somebody did were new no more.
        """
        told = self._to(ids, torch.int64)
        self.met.index_add_(0, told, torch.ones_like(told, dtype=torch.int32))
        self.met[told] = self.met[told].clamp(max=MEETINGS)  # more tell nothing

    def see(self, ids: Tensor) -> None:
        """Note that these are learnt from: each has a row of its own from now on, unless it is to be met first."""
        self.items.seen[ids] = ~self.spoken_for(ids) | (self.met[ids] >= MEETINGS)

    def spoken_for(self, rows: Tensor | slice) -> Tensor:
        """Of these rows, bool: whether features say what kind of item it is, which a price alone does not."""
        return self.described[rows] | (self.items.category[rows] > 0) | (self.items.brand[rows] > 0)

    def tensors(self) -> dict[str, Tensor]:
        """All but `met` by name, on the CPU; the same copy of what is seldom others until it is."""
        if self._copy is None:
            self._copy = {name: tensor.cpu().clone() for name, tensor in self.items._asdict().items()}
            self._copy["on_offer"] = self.on_offer.cpu().clone()
            self._copy["price_scale"] = self._price_scale.cpu().clone()
        return self._copy | {"seen": self.items.seen.cpu().clone()}

    def restore(self, tensors: Mapping[str, Tensor], met: Tensor, room: int) -> None:
        """Go back to what `tensors` gave and `met` was, in room for so many rows."""
        self._room = ItemTensors(*(tensors[name].to(self._device) for name in ItemTensors._fields))
        self._room_offer = tensors["on_offer"].to(self._device)
        self.described_room = (self._room.vector != 0).any(dim=1)
        self.any_described = bool(self.described_room.any())
        self.met, self._price_scale = met.to(self._device), tensors["price_scale"].to(self._device)
        rows = len(self._room_offer)
        self.make_room(room)
        self.show(rows)

    def _to(self, array: npt.NDArray[Any], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(array).to(self._device, dtype)


def bucket(hashes: npt.NDArray[np.uint64], buckets: int) -> Tensor:
    """[N] int64 in 1..buckets-1; 0 where the hash is 0 (unknown)."""
    spread = np.asarray(hashes, np.uint64) % np.uint64(buckets - 1) + np.uint64(1)
    return torch.from_numpy(np.where(np.asarray(hashes) == 0, np.uint64(0), spread).astype(np.int64))
