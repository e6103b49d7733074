"""A policy: one version of the weights, frozen, with everything needed to rank items for a user.

    policy = Policy.from_weights(store.load(version))
    policy.check()
    states = policy.encode([history], [now_ms])          # entries oldest first -> padded columns
    slates = policy.recommend(states, k=10, epsilon=0.05, rng=rng)

What it learnt never changes, so an answer comes from one version. `encode` alone writes: items of histories that it is
told of get rows beyond the catalog's (`_newcomers`, and the compiled shelf). So one thread at a time may encode and
rank (the server's batcher sees to it); the next version may be made meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from learner.agent import BOTH, DOUBT
from learner.answers import Table, check_pairs
from learner.compiled import ROOM, CompiledQ
from learner.entries import StateTensors
from learner.exploration import DRAWS, GREEDY, Exploration, Scores, Slate, explore
from learner.known_items import bucket
from learner.networks import (
    ItemTensors,
    NetworkSettings,
    QNetwork,
    Shelf,
    price_levels,
)
from learner.offered import AS_CATALOGUED, CompiledTower, Offered
from learner.replay import Histories
from learner.weights import CHUNK, Manifest, Weights
from streaming.interning import hash_string
from streaming.rewards import CODES, OTHER

PROBES: Final = 8  # made-up histories that `check` ranks for


def use_threads(threads: int) -> None:
    """Let one matrix product of the calling thread use so many CPU threads: others are to say so themselves.

    For them `torch.get_num_threads` says the same, but MKL makes helpers for each thread that did not.
    """
    torch.set_num_threads(threads)


class PolicyDamaged(Exception):
    """These weights must not serve; the message says what is wrong with them."""


class Entry(NamedTuple):
    """One thing that a user did."""

    item_id: str
    name: str  # GA4 event name
    timestamp_ms: int
    value: float = 0.0  # price x quantity, 0 where unknown


class Candidate(NamedTuple):
    """An item with features of its own; None (or no vector): as in the catalog."""

    item_id: str
    category: str | None = None
    brand: str | None = None
    price: float | None = None
    vector: Sequence[float] | npt.NDArray[np.float32] = ()

    @property
    def says_something(self) -> bool:
        """Of the item itself."""
        return bool(self.category or self.brand or len(self.vector)) or self.price is not None


def described_in(decision: Mapping[str, Any]) -> list[Candidate]:
    """Candidates that a decision record (proto/decision.avsc) shows, as far as it says more of them than their ids."""
    shown = {slot["item_id"] for slot in decision["slate"]}
    told = (
        Candidate(*(candidate[name] for name in Candidate._fields)) for candidate in decision["candidates"]
    )
    return [candidate for candidate in told if candidate.item_id in shown and candidate.says_something]


class Recommendation(NamedTuple):
    """One user's slate of K slots, best first; K may be smaller than asked where few items are eligible."""

    ids: npt.NDArray[
        np.int64
    ]  # [K] vocabulary ids of this policy; positions in `candidates` where those were given
    propensity: npt.NDArray[np.float64]  # [K] of this item in this slot, given the slots before it
    q: npt.NDArray[np.float32]  # [K] Q(s, a), reward units
    explored: npt.NDArray[np.bool_]  # [K] drawn uniformly


class Doubt(NamedTuple):
    """How uncertain it is how items answer to being shown; see `learner.response.Fit.variance`."""

    variance: Tensor  # [N, 2]
    directions: Tensor  # [d, d] C

    def deviation(self, states: Tensor, ids: Tensor | None = None) -> Tensor:
        """Standard deviation of the log-odds of choice, [B, M] of these ids, or all. states: [B, d] φ̄."""
        variance = self.variance if ids is None else self.variance[ids]
        size = ((states @ self.directions) * states).sum(dim=1, keepdim=True)
        return (variance[:, 0] + size * variance[:, 1]).sqrt()


class Policy:
    """Ranks items by Q(s, a). Items are named by vocabulary ids of its own weights: 1..items; 0 is "unknown"."""

    def __init__(
        self,
        manifest: Manifest,
        network: QNetwork,
        items: ItemTensors,
        on_offer: Tensor,
        item_ids: Sequence[str],
        doubt: Doubt,
        price_scale: Tensor,
        before: Policy | None = None,
    ) -> None:
        """before: one whose vocabulary may be the same; what is made of it is then shared."""
        self.manifest = manifest
        self.version = manifest.version
        self.items = len(on_offer) - 1
        self.history_length = network.settings.history_length
        # [N] what the catalog allows to be recommended; row 0, the unknown item, is not
        self.on_offer: npt.NDArray[np.bool_] = on_offer.numpy()
        self._network = network.eval().requires_grad_(False)
        self._items = items
        self._doubt = doubt
        self._price_scale = price_scale
        self._item_ids: list[str]
        self._id_of: dict[str, int]
        same = before and before.manifest.vocabulary_sha256 == manifest.vocabulary_sha256
        if before and same and before.items == self.items:
            # the same strings: to look at each of them again would hold up whoever is answering
            self._item_ids, self._id_of = before._item_ids, before._id_of
        else:
            self._item_ids = ["", *item_ids]
            self._id_of = {item_id: i for i, item_id in enumerate(self._item_ids) if i}
        with torch.inference_mode():
            self._shelf = network.shelf(items)
            self._compiled = CompiledQ(network, self._shelf)
            self._tower = CompiledTower(network, items)
        self._newcomers: dict[str, int] = {}  # item id → row beyond `items`: see `_meet`
        self._told: dict[str, Candidate] = {}  # by which these are known

    @classmethod
    def from_weights(
        cls,
        weights: Weights,
        network: Literal["online", "target"] = "target",
        before: Policy | None = None,
    ) -> Policy:
        """The policy that these weights are. network: the newest one, or its steadier mean. before: the one in
        use so far; making the next one is cheaper beside it.

        Raises: PolicyDamaged where tensors are missing or do not fit together.
        """
        try:
            settings = NetworkSettings.from_dict(weights.manifest.settings)
            tensors = {name: torch.as_tensor(array) for name, array in weights.tensors.items()}
            items = ItemTensors(*(tensors[f"catalog.{name}"] for name in ItemTensors._fields))
            rows = len(items.seen)
            lengths = {
                len(column) for column in (*items, tensors["catalog.on_offer"], tensors[f"{DOUBT}variance"])
            }
            if lengths != {rows} or len(weights.vocabulary) < rows - 1:
                raise ValueError(
                    f"{rows - 1} items, but {len(weights.vocabulary)} item ids, columns of {lengths}"
                )
            check_pairs(Table(*(tensors[f"{BOTH}stack.{name}"].numpy() for name in Table._fields)), rows)
            return cls(
                weights.manifest,
                _network(settings, tensors, network, rows),
                items,
                tensors["catalog.on_offer"],
                weights.vocabulary[: rows - 1],  # it may have grown since the tensors were taken
                Doubt(*(tensors[f"{DOUBT}{name}"] for name in Doubt._fields)),
                tensors["catalog.price_scale"],
                before,
            )
        except KeyError as error:
            raise PolicyDamaged(
                f"version {weights.manifest.version}: lacks tensor {error}: it is damaged, or of an earlier learner"
            ) from error
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            raise PolicyDamaged(f"version {weights.manifest.version}: {error}") from error

    def numbers_as(self, other: Policy) -> bool:
        """Whether each vocabulary id that both know is the same item's."""
        common = min(self.items, other.items)
        chunks = common // CHUNK  # that are full in both: of the others each string is looked at
        rest = slice(chunks * CHUNK, common + 1)
        return (
            self.manifest.vocabulary_sha256[:chunks] == other.manifest.vocabulary_sha256[:chunks]
            and self._item_ids[rest] == other._item_ids[rest]
        )

    def item_id(self, i: int) -> str:
        """Of vocabulary id i; 0 gives the empty string."""
        return self._item_ids[i]

    def ids(self, item_ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """Vocabulary ids, 0 where this policy does not know the item."""
        return np.array([self._id_of.get(item_id, 0) for item_id in item_ids], np.int32)

    def encode(
        self,
        histories: Sequence[Sequence[Entry]],
        now_ms: Sequence[int],
        described: Callable[[str], Candidate | None] = lambda item_id: None,
    ) -> Histories:
        """States of B users, for `q` and `recommend`, as training sees them; valid until the next call.

        histories: oldest entry first; the newest `history_length` count. now_ms: [B] event time of each request.
        described: features of an item that these weights do not know yet, None: nothing is known of it.
        """
        shape = (len(histories), self.history_length)
        out = Histories(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.uint8),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
        )
        newest = [entries[: -self.history_length - 1 : -1] for entries in histories]
        self._meet(
            {e.item_id for entries in newest for e in entries if e.item_id not in self._id_of}, described
        )
        for b, (entries, now) in enumerate(zip(newest, now_ms, strict=True)):
            if entries:
                item_ids, names, timestamps, values = zip(*entries, strict=True)
                n = len(entries)
                out.item[b, :n] = self._rows_of(item_ids)
                out.name[b, :n] = [CODES.get(name, OTHER) for name in names]
                out.age_s[b, :n] = np.maximum(now - np.array(timestamps, np.int64), 0) / 1000.0
                out.value[b, :n] = values
        return out

    def _rows_of(self, item_ids: Iterable[str]) -> list[int]:
        """By which histories know these items, 0: they do not."""
        known, new = self._id_of.get, self._newcomers.get
        return [known(item_id) or new(item_id, 0) for item_id in item_ids]

    def _meet(self, item_ids: Set[str], described: Callable[[str], Candidate | None]) -> None:
        """Have histories know items that these weights do not, by what is told of them now."""
        told = [
            candidate
            for item_id in sorted(item_ids)
            if (candidate := described(item_id)) is not None and candidate is not self._told.get(item_id)
        ]
        if not told:
            return
        new = sum(candidate.item_id not in self._newcomers for candidate in told)
        if len(self._newcomers) + new > ROOM:  # those of these histories are looked at again
            self._newcomers.clear()
            self._told.clear()
            told = [
                candidate for item_id in sorted(item_ids) if (candidate := described(item_id)) is not None
            ][:ROOM]
        for candidate in told:
            self._newcomers.setdefault(candidate.item_id, self.items + 1 + len(self._newcomers))
            self._told[candidate.item_id] = candidate
        with torch.inference_mode():
            shelf, rows = self._shelf_of(told)
            self._compiled.put(shelf, rows.numpy() - self.items - 1)

    def q(self, states: Histories) -> npt.NDArray[np.float32]:
        """Q(s, a) of all items, [B, items + 1], by vocabulary id; row 0 of the catalog (column 0) means nothing."""
        with torch.inference_mode():
            q: npt.NDArray[np.float32] = self._compiled.q(states).numpy()
            return q

    def q_candidates(self, state: Histories, candidates: Sequence[Candidate]) -> npt.NDArray[np.float32]:
        """Q(s, a) of one user's candidates, [M]; items never seen score by the features that come with them."""
        with torch.inference_mode():
            log_odds, gain, value, _, _ = self._parts_of(state, candidates)
            q: npt.NDArray[np.float32] = (value + torch.sigmoid(log_odds) * gain)[0].numpy()
            return q

    def _parts_of(
        self, state: Histories, candidates: Sequence[Candidate]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `CompiledQ.parts`, of one user's M candidates; and their vocabulary ids, [M]."""
        shelf, ids = self._shelf_of(candidates)
        return *self._compiled.parts_among(state, shelf, ids), ids

    def scores(
        self, states: Histories, exploration: Exploration, rng: np.random.Generator
    ) -> Iterator[Scores]:
        """What `explore` needs of B users, over all items as `q`: one by one, for what thompson draws of each is DRAWS
        times as large as its Q."""
        if exploration.kind != "thompson":
            return map(Scores, self.q(states))
        with torch.inference_mode():
            parts = self._compiled.parts(states)
        return (self._drawn(*one, exploration.scale, rng) for one in zip(*parts, strict=True))

    def _drawn(
        self,
        log_odds: Tensor,
        gain: Tensor,
        value: Tensor,
        phi: Tensor,
        scale: float,
        rng: np.random.Generator,
    ) -> Scores:
        with torch.inference_mode():
            deviation = scale * self._doubt.deviation(phi.unsqueeze(0))
            return _drawn(log_odds, gain, value, deviation[0], rng)

    def scores_of_candidates(
        self,
        state: Histories,
        candidates: Sequence[Candidate],
        exploration: Exploration,
        rng: np.random.Generator,
    ) -> Scores:
        """The same of one user's candidates, as `q_candidates`."""
        if exploration.kind != "thompson":
            return Scores(self.q_candidates(state, candidates))
        with torch.inference_mode():
            log_odds, gain, value, phi, ids = self._parts_of(state, candidates)
            ids = torch.where(ids <= self.items, ids, 0)
            deviation = exploration.scale * self._doubt.deviation(phi, ids)
            return _drawn(log_odds[0], gain[0], value[0], deviation[0], rng)

    def recommend(
        self,
        states: Histories,
        k: int,
        epsilon: float,
        rng: np.random.Generator,
        eligible: npt.NDArray[np.bool_] | None = None,
        exploration: Exploration = GREEDY,
    ) -> list[Recommendation]:
        """A slate of up to k items for each user: a share ε of the slots drawn uniformly, the others as `exploration`
        says.

        eligible: [B, items + 1] or [items + 1], what may be shown; None: all that the catalog has on offer.
        """
        allowed = np.broadcast_to(
            self.on_offer if eligible is None else eligible, (len(states.item), len(self.on_offer))
        )
        return [
            _recommendation(mine, explore(exploration, mine, may, k, epsilon, rng))
            for mine, may in zip(self.scores(states, exploration, rng), allowed, strict=True)
        ]

    def recommend_candidates(
        self,
        state: Histories,
        candidates: Sequence[Candidate],
        k: int,
        epsilon: float,
        rng: np.random.Generator,
        eligible: npt.NDArray[np.bool_] | None = None,
        exploration: Exploration = GREEDY,
    ) -> Recommendation:
        """As `recommend`, for one user and from these candidates alone; ids are positions in `candidates`.

        eligible: [M]; None: all of them.
        """
        scores = self.scores_of_candidates(state, candidates, exploration, rng)
        allowed = np.ones(len(scores.q), np.bool_) if eligible is None else eligible
        return _recommendation(scores, explore(exploration, scores, allowed, k, epsilon, rng))

    def check(self) -> None:
        """Rank for made-up users. Raises: PolicyDamaged where a value comes out NaN or infinite, or otherwise than
        the network itself says."""
        rng = np.random.default_rng(0)
        shape = (PROBES, self.history_length)
        states = Histories(
            rng.integers(0, self.items + 1, shape, np.int32),
            rng.integers(0, len(CODES) + 1, shape).astype(np.uint8),
            rng.exponential(3600.0, shape).astype(np.float32),
            rng.exponential(10.0, shape).astype(np.float32),
        )
        states.name[0] = 0  # a user of whom nothing is known
        states.item[states.name == 0] = 0
        q = self.q(states)
        bad = int(np.count_nonzero(~np.isfinite(q)))
        if bad:
            raise PolicyDamaged(
                f"version {self.version}: {bad} of {PROBES * (self.items + 1)} probe values not finite"
            )
        some = rng.integers(0, self.items + 1, (PROBES, PROBES))
        ids = torch.from_numpy(np.unique(np.append(some, states.item)))
        rows, here = (
            torch.searchsorted(ids, torch.from_numpy(x.astype(np.int64))) for x in (some, states.item)
        )
        with torch.inference_mode():
            keys = self._network.keys(self._items, ids)
            queries = self._network.queries(state_tensors(states), keys, here, ids)
            said = self._network.q_at(queries, keys, rows).numpy()
        self._agree(np.take_along_axis(q, some, axis=1), said)
        category, brand = (
            rng.integers(0, table.num_embeddings, PROBES) for table in self._network.tower.hashed
        )
        row, price = rng.integers(0, self.items + 1, PROBES), rng.normal(size=PROBES).astype(np.float32)
        vector = rng.normal(size=(PROBES, self._network.settings.vector_dim)).astype(np.float32)
        with torch.inference_mode():
            mine = self._tower.shelf(Offered(row, category, brand, price, vector, np.ones(PROBES, np.bool_)))
            ids = torch.from_numpy(row)
            told = map(torch.from_numpy, (category, brand, price, vector, self._items.seen.numpy()[row]))
            theirs = self._network.shelf_with(ItemTensors(*told), ids)
        for compiled, network in zip(mine, theirs, strict=True):
            self._agree(compiled.numpy(), network.numpy())

    def _agree(self, compiled: npt.NDArray[Any], network: npt.NDArray[Any]) -> None:
        apart = np.abs(compiled - network).max()
        fits = apart <= 1e-3 * max(
            1.0, np.abs(network).max()
        )  # rounding is a hundredth of that; NaN does not
        if not fits:
            raise PolicyDamaged(
                f"version {self.version}: compiled probe values differ from the network's by {apart:g}"
            )

    def _shelf_of(self, candidates: Sequence[Candidate]) -> tuple[Shelf, Tensor]:
        """Items with features of their own, and the ids by which histories know them, [M]."""
        settings, count = self._network.settings, len(candidates)
        rows = np.array(self._rows_of(c.item_id for c in candidates), np.int64)
        offered = Offered(
            np.where(rows <= self.items, rows, 0),
            _buckets([c.category for c in candidates], settings.category_buckets),
            _buckets([c.brand for c in candidates], settings.brand_buckets),
            np.full(count, np.nan, np.float32),
            np.zeros((count, settings.vector_dim), np.float32),
            np.array([len(c.vector) > 0 for c in candidates], np.bool_),
        )
        priced = [m for m, c in enumerate(candidates) if c.price is not None]
        if priced:
            prices = torch.tensor([candidates[m].price for m in priced])
            offered.price[priced] = price_levels(prices, self._price_scale).numpy()
        for m in np.flatnonzero(offered.has_vector).tolist():
            vector = candidates[m].vector[: settings.vector_dim]
            offered.vector[m, : len(vector)] = vector
        return self._tower.shelf(offered), torch.from_numpy(rows)


def _buckets(names: Sequence[str | None], buckets: int) -> npt.NDArray[np.int64]:
    """[M] of these categories or brands."""
    out = np.full(len(names), AS_CATALOGUED, np.int64)
    told = [m for m, name in enumerate(names) if name is not None]
    if told:
        hashes = np.array([hash_string(names[m] or "") for m in told], np.uint64)
        out[told] = bucket(hashes, buckets).numpy()
    return out


def _drawn(
    log_odds: Tensor, gain: Tensor, value: Tensor, deviation: Tensor, rng: np.random.Generator
) -> Scores:
    """Q, [N], and Q as it may be, [DRAWS, N], where log-odds deviate so much. All [N], value [1]."""
    drawn = torch.from_numpy(rng.standard_normal((DRAWS, len(log_odds)), np.float32))
    drawn.mul_(deviation).add_(log_odds).sigmoid_().mul_(gain).add_(value)  # in place: [DRAWS, N] is large
    return Scores((value + torch.sigmoid(log_odds) * gain).numpy(), drawn.numpy())


def _recommendation(scores: Scores, slate: Slate) -> Recommendation:
    return Recommendation(slate.ids, slate.propensity, scores.q[slate.ids], slate.explored)


def _network(
    settings: NetworkSettings, tensors: dict[str, Tensor], network: Literal["online", "target"], rows: int
) -> QNetwork:
    """The one or the other network of these very tensors. Nothing is initialised that would be overwritten at once."""
    mould = _mould(settings)
    made = copy.deepcopy(mould, {id(parameter): parameter for parameter in mould.parameters()})
    for name in _OF_ANY_LENGTH:
        setattr(*_owner(made, name), tensors[f"{BOTH}{name}"])
    for name, prefix in _BY_ITEM.items():
        stored = f"{prefix or network + '.'}{name}"
        given, like = tensors[stored], getattr(*_owner(mould, name))
        if (given.shape, given.dtype) != ((rows, *like.shape[1:]), like.dtype):
            raise ValueError(f"{stored} is {tuple(given.shape)} of {given.dtype}: not of {rows - 1} items")
        part, last = _owner(made, name)
        setattr(part, last, nn.Parameter(given, False) if isinstance(like, nn.Parameter) else given)
    made.load_state_dict(_under(tensors, f"{network}.") | _under(tensors, BOTH), assign=True)
    return made


_BY_ITEM: Final = {  # of one row for each vocabulary id; and the prefix of what both networks share
    "tower.id.weight": "",
    "response.own": BOTH,
    "stack.level": BOTH,
}
_OF_ANY_LENGTH: Final = ("recall.led", "recall.walk", *(f"stack.{name}" for name in Table._fields))


def _owner(network: QNetwork, name: str) -> tuple[nn.Module, str]:
    """The module that a tensor is of, and its name there."""
    module, _, last = name.rpartition(".")
    return network.get_submodule(module), last


@lru_cache(maxsize=2)
def _mould(settings: NetworkSettings) -> QNetwork:
    return QNetwork(settings, 1)


def state_tensors(states: Histories) -> StateTensors:
    """As the network reads them, on the CPU."""
    return StateTensors(
        torch.from_numpy(states.item.astype(np.int64)),
        torch.from_numpy(states.name.astype(np.int64)),
        torch.from_numpy(states.age_s),
        torch.from_numpy(states.value),
    )


def _under(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
