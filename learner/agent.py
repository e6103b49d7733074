"""The agent: a double DQN that learns from batches and hands out its weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from learner import dqn
from learner.entries import StateTensors, place_buckets
from learner.graphs import CudaCapture, Graphs
from learner.lazy_table import BETAS, Rows, Rule, catch_up, caught_up, follow_share, networks_now, stepped
from learner.networks import (
    MAX_SLOTS,
    PRICE_SCALE,
    ItemTensors,
    Keys,
    NetworkSettings,
    QNetwork,
    Queries,
    Reading,
    first_rows,
    matches,
    price_levels,
    score_all,
    unknown_items,
)
from learner.recall import BLOCK, EVERY, RecallFit
from learner.replay import Batch, Histories
from learner.response import Fit, Pace, Shown
from learner.stacking import StackFit
from streaming.transitions import Joined


def _setting(default: float | int | bool, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class AgentSettings:
    """How the agent learns."""

    gamma: float = _setting(0.97, "discount for each further step; 0..1, 1 excluded")
    n_step: int = _setting(
        0,
        "steps of reward counted before bootstrapping; 0: 0.003 / (1 - gamma)^2, at most 10; 0..100",
    )
    unaided_steps: int = _setting(
        100,
        "more steps at most that are counted through what users do unaided, before bootstrapping; 0..1000",
    )
    batch_size: int = _setting(128, "transitions in one update; 1..65536")
    double: bool = _setting(
        True,
        "next items are chosen by the online network and valued by the target network (double DQN); "
        "else both by the target network (DQN)",
    )
    learning_rate: float = _setting(0.002, "of Adam; > 0")
    value_rate: float = _setting(
        4.0, "times --learning-rate, at first, for the heads of reward and of what is to come; 0.001..1000"
    )
    value_settle: int = _setting(
        300,
        "updates after which --value-rate is down to .71 of itself: it falls as 1 / sqrt(1 + updates / this), to a "
        "sixteenth; 0: it stays; 0..1e9",
    )
    target_tau: float = _setting(
        0.005, "share of the way that the target network goes to the online one at each update; 0..1, 0: none"
    )
    target_sync_updates: int = _setting(200, "updates between target syncs, where --target-tau is 0; >= 1")
    slate_size: int = _setting(
        0,
        "slots counted in the value of the next state; 1: the best alone; 0: as many as shown lately; 0..32",
    )
    sqn_weight: float = _setting(1.0, "weight of the next-item loss; >= 0")
    reward_weight: float = _setting(0.1, "weight of the loss on what a choice earns; >= 0")
    quantiles: int = _setting(
        1,
        "of the distribution of what is to come, learnt by quantile regression (QR-DQN); 1: its mean; 1..200",
    )
    td_weight: float = _setting(0.1, "weight of the temporal-difference loss; >= 0")
    length_weight: float = _setting(
        0.001, "weight of the squared length of states' vectors, so that none grows for nothing; >= 0, 0: off"
    )
    cql_weight: float = _setting(0.0, "weight of the conservative loss; >= 0, 0: off")
    huber_delta: float = _setting(
        20.0, "error beyond which losses grow linearly; in units of what a choice earns on average, > 0"
    )
    quantile_delta: float = _setting(1.0, "the same of quantiles, where there are more than one; > 0")
    weight_decay: float = _setting(
        1.0, "decoupled, of what ids add to their features, of items that a vector describes; 0..1"
    )
    forget: float = _setting(
        0.3, "share of the items that features speak for treated as new in each update; 0..1"
    )
    exact_items: int = _setting(
        20_000, "catalogs up to this size are maximised over exactly, larger ones over candidates; >= 1"
    )
    candidates: int = _setting(
        4096, "random candidates beside the batch's own items, in larger catalogs; >= 1"
    )
    dim: int = _setting(32, "size of item vectors; 1..1024")
    hidden: int = _setting(64, "size of hidden layers; 1..4096")
    centred: bool = _setting(
        True,
        "heads of value read vectors centred and of unit size, and what a slate's chance tells of its user is "
        "set apart from what choosing does; for far horizons",
    )
    recall: bool = _setting(
        True, "remember where users went from each item, beside what the network learns of it"
    )
    stack: bool = _setting(
        True, "set choice right by what came of it as it was foretold, before anything was learnt of it"
    )
    dueling: bool = _setting(
        True,
        "what is to come if nothing is chosen is learnt of each state, beside what choosing adds; without, it is one "
        "number for all states",
    )
    history_length: int = _setting(
        0, "newest history entries in a state; 0: about 1 / (1 - gamma), in 32s, at most 160; 0..1000"
    )
    vector_dim: int = _setting(32, "dense catalog features used; 1..256")
    graphs: bool = _setting(
        True, "on a GPU, updates of catalogs up to --exact-items are launched as one CUDA graph"
    )

    def __post_init__(self) -> None:
        bounds = {
            "gamma": (0.0, 0.999999),
            "n_step": (0, MAX_STEPS),
            "unaided_steps": (0, 10 * MAX_STEPS),
            "batch_size": (1, 65536),
            "learning_rate": (1e-9, 1.0),
            "value_rate": (1e-3, 1e3),
            "value_settle": (0, 10**9),
            "target_tau": (0, 1),
            "target_sync_updates": (1, 10**9),
            "slate_size": (0, MAX_SLOTS),
            "sqn_weight": (0, 1e6),
            "reward_weight": (0, 1e6),
            "quantiles": (1, 200),
            "td_weight": (0, 1e6),
            "length_weight": (0, 1e6),
            "cql_weight": (0, 1e6),
            "huber_delta": (1e-6, 1e6),
            "quantile_delta": (1e-6, 1e6),
            "weight_decay": (0, 1),
            "forget": (0, 1),
            "exact_items": (1, 10**7),
            "candidates": (1, 10**6),
            "dim": (1, 1024),
            "hidden": (1, 4096),
            "history_length": (0, 1000),
            "vector_dim": (1, 256),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}={value}: must be in {low}..{high}")

    @property
    def steps(self) -> int:
        """Of reward before bootstrapping. The further ahead counts, the more bootstraps news would have to go through,
        each of which waits for the target network to follow; but each reward that is counted brings its luck along.
        """
        return self.n_step or min(max(1, round(0.003 / (1.0 - self.gamma) ** 2)), USUAL_STEPS)

    @property
    def entries(self) -> int:
        """Of the history in a state. What a visit has used up is told by all of it, and counts where what is to come
        does: over 1 / (1 - γ) steps."""
        times = round(1.0 / (1.0 - self.gamma) / ENTRIES)
        return self.history_length or ENTRIES * min(max(1, times), MOST_TIMES)

    @property
    def network(self) -> NetworkSettings:
        """The shape of the network."""
        return NetworkSettings(
            dim=self.dim,
            hidden=self.hidden,
            history_length=self.entries,
            vector_dim=self.vector_dim,
            quantiles=self.quantiles,
            gamma=self.gamma,
            centred=self.centred,
            recall=self.recall,
            stack=self.stack,
            dueling=self.dueling,
        )


class CatalogArrays(Protocol):
    """What the agent reads of streaming.catalog.Catalog: arrays by vocabulary id."""

    category: npt.NDArray[np.uint64]  # [N] hash, 0 unknown
    brand: npt.NDArray[np.uint64]  # [N] hash, 0 unknown
    price: npt.NDArray[np.float32]  # [N] NaN unknown
    in_stock: npt.NDArray[np.bool_]  # [N]
    gone: npt.NDArray[np.bool_]  # [N]
    known: npt.NDArray[np.bool_]  # [N] is in the catalog; others are recommendable all the same
    recorded: npt.NDArray[np.bool_]  # [N] the catalog has said what it is
    vector: npt.NDArray[np.float32]  # [N, >= vector_dim or less: padded]


class Update(NamedTuple):
    """What one update did."""

    loss: float
    td_error: npt.NDArray[np.float32]  # [B] target - Q(s, a), in units of `Agent.unit`: priorities
    mean_q: float  # of the batch's own actions
    q_spread: float  # standard deviation of these
    losses: dict[str, float]  # by part: choice, reward, td, next_item, length, conservative


class _Aisle(NamedTuple):
    """The items that an update looks at, where that is not all of the catalog."""

    ids: Tensor  # [M] vocabulary ids, ascending
    table: Rows  # [M], as they stand now
    own: Tensor  # [M, d + 1] of the online table, gathers the gradient


class Facts(NamedTuple):
    """What is decided before an update's tensors are worked out, and decides which of them there are."""

    told: str  # what learner.response learns from: see `Fit.advance`
    aided: bool  # see `Agent.aided`
    went: bool  # users may have gone to what is known, unaided
    follows: bool  # a step follows some transition, and something is on offer then
    offered: bool  # something is on offer
    slots: int  # of the slate that is best next
    decays: bool


class Rates(NamedTuple):
    """How far an update goes."""

    pace: Pace
    unaided: tuple[float | Tensor, float | Tensor]  # see `_look_unaided`; 0 where nothing of it is there
    follow: float | Tensor  # share of the way that the target network goes


class _Rows(NamedTuple):
    """A batch as tensors; `here`, `there` and `slate` are its items as rows of the keys in use."""

    facts: Facts
    rates: Rates
    aisle: _Aisle | None  # what the N rows are; None: row i is id i
    # [N] logarithm of how many items each row does, where they are a sample (see `_sample`), or some are of no item
    stands_for: Tensor | None
    on_offer: Tensor  # [N] bool
    state: StateTensors
    next_state: StateTensors
    here: Tensor  # [B, H]
    there: Tensor  # [B, H]
    slate: Tensor  # [B, K] the step's items; the batch's own action first
    present: Tensor  # [B, K] bool: there is such a slot
    slot: Tensor  # [B, K]
    slate_reward: Tensor  # [B, K] in units of `Agent.unit`
    reward: Tensor  # [B] likewise
    discount: Tensor  # [B]
    weight: Tensor  # [B] mean 1
    each: Tensor  # [B, K] of the slots: shares of the step's
    organic: Tensor  # [B] bool
    went: Tensor | None  # [W] of the batch: `Facts.went`; None: where `organic` and `present` say so
    goes_on: Tensor | None  # [G] of the batch, what is followed; None: what `discount` says is
    reading: Reading  # of state
    next_reading: Reading  # of next_state, of those that `goes_on` names
    offer: Tensor | None  # [G, O] rows that could be shown next; None: all that are on offer
    forgotten: Tensor | None  # [N] bool; see `_forgotten`

    @property
    def ids(self) -> Tensor | None:
        """[N] vocabulary ids of the rows; None: row i is id i."""
        return None if self.aisle is None else self.aisle.ids


def _went(batch: Batch) -> npt.NDArray[np.intp]:
    """Which rows of a batch tell of users who went to what is known, unaided."""
    return np.flatnonzero((batch.slate[:, 0] > 0) & batch.organic)


class Agent:
    """Learns Q from batches. One thread owns it; on CPU the same batches give the same weights, bit for bit.

    Vocabulary ids are rows; row 0 is the unknown item, which is never on offer.
    """

    def __init__(self, settings: AgentSettings, device: str | torch.device = "cpu", seed: int = 0) -> None:
        self.settings = settings
        self.device = torch.device(device)
        self.updates = 0
        self.last_target_sync_update = 0
        self._parts: tuple[str, ...] = ()  # of the loss
        self.graphs = Graphs(CudaCapture()) if self.device.type == "cuda" and settings.graphs else None
        self.slots = 1.0  # shown in a slate, lately
        self._slates = np.zeros(2)  # lately: weight of transitions from slates, and of the slates themselves
        # lately: decisions, those that brought their candidates, and how many these were in all
        self._offers = np.zeros(3)
        self._generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.online = QNetwork(settings.network, _FIRST_ROOM)
        self.online.tower.id.weight.detach().copy_(first_rows(0, _FIRST_ROOM, settings.dim))
        self.online.to(self.device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.target.response = self.online.response  # it is a mean already
        self.target.stack = self.online.stack
        self.target.recall = self.online.recall
        self._unaided = torch.zeros(2, device=self.device)  # reward, continuation: see `_look_unaided`
        self._unaided_looks = [0, 0]
        self.unit = 1.0  # of value, in reward units: see `_look_unit`
        self._unit_looks = 0
        self._choices = 0  # from slates, so far
        self._response = Fit(self.online.response)
        self._recall = RecallFit(self.online.recall)
        nearest = self._recall.nearest if settings.recall else None
        self._stack = StackFit(self.online.stack, nearest, self._vectors_of)
        self._optimiser = self._new_optimiser()
        self._roomy_items = unknown_items(1, settings.vector_dim, self.device)
        self._roomy_offer = torch.zeros(1, dtype=torch.bool, device=self.device)
        self._met = torch.zeros(1, dtype=torch.int32, device=self.device)  # times: see `meet`
        self._at: Tensor | None = (
            None  # the update after which each row stands as it lies there; None: all do now
        )
        self._roomy_described = torch.zeros(1, dtype=torch.bool, device=self.device)
        self._any_described = False
        self._catalog_copy: dict[str, Tensor] | None = None
        self._price_scale = torch.tensor(PRICE_SCALE, device=self.device)
        self._show(1)

    @property
    def rows(self) -> int:
        """Vocabulary ids that can be learnt, the unknown item included."""
        return len(self._on_offer)

    @property
    def _spare(self) -> int:
        """Rows beside those of items that an update looks at, where it looks at all. Not on the CPU; elsewhere all
        that there is room for, so that new items change neither shapes nor addresses: see learner.graphs."""
        return 0 if self.device.type == "cpu" else len(self._roomy_offer) - self.rows

    @property
    def _roomy(self) -> ItemTensors:
        """The items, and as many rows more."""
        return self._items if self.device.type == "cpu" else self._roomy_items

    @property
    def items(self) -> ItemTensors:
        """What is known of the items, by vocabulary id."""
        return self._items

    def grow(self, items: int) -> None:
        """Make room for vocabulary ids 1..items; ids are never taken back."""
        rows = items + 1
        if rows <= self.rows:
            return
        capacity = self.online.tower.id.num_embeddings
        if rows > capacity:
            while capacity < rows:
                capacity *= 2
            self._reserve(capacity)
        if rows > len(self._roomy_offer):
            self._make_room()
        self._response.enter(slice(self.rows, rows))
        self._show(rows)

    def _make_room(self) -> None:
        """As much as the tables by id have, which double: new items come in every batch, and each must not cost a copy
        of all that are known."""
        more = self.online.tower.id.num_embeddings - len(self._roomy_offer)
        fresh = unknown_items(more, self.settings.vector_dim, self.device)
        self._roomy_items = ItemTensors(
            *(torch.cat(pair) for pair in zip(self._roomy_items, fresh, strict=True))
        )
        self._roomy_offer = torch.cat((self._roomy_offer, self._roomy_offer.new_ones(more)))
        self._roomy_described = functional.pad(self._roomy_described, (0, more))
        self._met = functional.pad(self._met, (0, more))

    def _show(self, rows: int) -> None:
        """Let the items be the first so many rows of the room that there is."""
        self._items = ItemTensors(*(column[:rows] for column in self._roomy_items))
        self._on_offer = self._roomy_offer[:rows]
        self._count_offered: int | None = None  # see `_offered`
        self._described = self._roomy_described[:rows]
        self._catalog_copy = None

    def _describe(self, rows: Tensor | None = None) -> None:
        """Note which items have a vector, which tells them from others of their category; of these rows, or all."""
        at = slice(None) if rows is None else rows  # all of them in place: there may be a million
        described = (self._items.vector[at] != 0).any(dim=1)
        others = torch.nonzero(described != self._described[at]).squeeze(1)
        if len(others):
            self._turn(others if rows is None else torch.unique(rows[others]))

    def _turn(self, rows: Tensor) -> None:
        """These have a vector from now on, or none any more, [M]. Where they have one their ids have nothing to tell
        apart before they have rows of their own (see `meet`), and start from zero: now, whatever was learnt of them
        while nothing described them, and not when the catalog is next taken over, or after a restart.
        """
        if self._at is not None:  # what lies behind stood by what was so until now
            behind = self._table()
            behind.put(rows, caught_up(behind.take(rows), self._described[rows], self.updates, self._rule))
        self._described[rows] = ~self._described[rows]
        self._any_described = bool(self._described.any())
        young = ~self._items.seen[rows] | (self._met[rows] < MEETINGS)
        told_apart = rows[self._described[rows] & young]
        self._items.seen[told_apart] = False
        own = self.online.tower.id.weight
        moments = (value for value in self._optimiser.state.get(own, {}).values() if value.ndim)
        for table in (own.detach(), self.target.tower.id.weight.detach(), *moments):
            table[told_apart] = 0.0

    def set_catalog(self, catalog: CatalogArrays) -> None:
        """Take over the catalog as it stands: features, and what may be recommended. Grows as needed. Items of which
        it says nothing stay as they are known: from `describe`, or from before a restart."""
        known, gone = np.asarray(catalog.known), np.asarray(catalog.gone)
        self.grow(len(known) - 1)
        # of those that are gone a catalog read anew has no price
        self._look_prices(self._to(np.asarray(catalog.price, np.float32)[known]))
        told = np.flatnonzero(catalog.recorded)
        features = (getattr(catalog, name)[told] for name in ("category", "brand", "price", "vector"))
        self._put_features(told, *features)
        self._on_offer[: len(known)] = torch.from_numpy(~gone & (np.asarray(catalog.in_stock) | ~known))
        self._on_offer[0] = False
        self._count_offered = None
        self._describe()
        self._catalog_copy = None

    def describe(self, ids: npt.NDArray[np.integer], items: CatalogArrays) -> None:
        """Take over the features of items that came with a request, of vocabulary ids [M] that there is room for. Those
        that the catalog has or had stay as it says. items: arrays [M]; known: [M], that the catalog has or had them.
        """
        new = ~np.asarray(items.known)
        if new.any():
            features = (getattr(items, name)[new] for name in ("category", "brand", "price", "vector"))
            self._put_features(ids[new], *features)
            self._describe(self._to(ids[new], torch.int64))
            self._catalog_copy = None

    def meet(self, ids: npt.NDArray[np.integer]) -> None:
        """Note that these items, vocabulary ids [T] that there is room for, were shown or gone to, once more each.

        An item that features speak for has a row of its own from the `MEETINGS`th time on. Before, all that a row could
        tell is what became of a few slots, and drawn from replay again and again it would tell just that: items that
        come once and never again would each be known by whether they were clicked. And what new items have in common
        would be learnt from those alone that nobody went to yet, since those that somebody did were new no more.
        """
        told = self._to(ids, torch.int64)
        self._met.index_add_(0, told, torch.ones_like(told, dtype=torch.int32))
        self._met[told] = self._met[told].clamp(max=MEETINGS)  # more tell nothing

    def foretell(self, joined: Joined) -> None:
        """Note what is foretold of these transitions, and what came: before anything is learnt from them, and of
        vocabulary ids that there is room for."""
        t = joined.transitions
        self._choices += int(np.count_nonzero(~t.organic & (t.reward != 0)))
        if self.settings.recall:
            self._recall_steps(joined)
        if self.settings.stack and self.updates > 0:  # else nothing is known: that says nothing of what is
            self._foretell_slots(joined)

    def _recall_steps(self, joined: Joined) -> None:
        """Learn from where users went unaided, and remember it: see learner.recall."""
        t = joined.transitions
        went = np.flatnonzero(t.organic & (t.action > 0))
        if not len(went):
            return
        for start in range(0, len(went), EVERY):
            steps = went[start : start + EVERY]
            if self.updates > 0 and self._recall.due(len(steps)):
                self._learn_recall(joined, steps[:: -(-len(steps) // BLOCK)])
        self._recall.observe(joined.states.item[t.state[went]], t.action[went])

    def _learn_recall(self, joined: Joined, which: npt.NDArray[np.intp]) -> None:
        """One step of what recall weighs by. which: [T] of the transitions."""
        t, recall = joined.transitions, self.online.recall
        histories = Histories(*(getattr(joined.states, name)[t.state[which]] for name in Histories._fields))
        state, item = self._state(histories), self._to(t.action[which], torch.int64)
        here, at, ids, stands_for = state.item, item, None, None
        with torch.no_grad():
            if self.rows > self.settings.exact_items:
                ids, stands_for = self._sample(here, at, recall.leads_to(here))
                here, at = torch.searchsorted(ids, here), torch.searchsorted(ids, at)
            keys = self._keys_now(self.online, ids)
            reading = self.online.read(state, ids, ways=False, right=False)  # they are looked up below
            queries = self.online.queries(state, keys, here, ids, reading)
            organic = score_all(queries.organic, keys.organic, keys.category)
            places = place_buckets(here.shape[1], here.device)
        self._recall.learn(
            organic,
            stands_for,
            at,
            lambda weights: recall.recalled(state.item, queries.kinds, places, ids, weights),
        )

    @torch.no_grad()
    def all_keys(self, network: QNetwork) -> Keys:
        """A network's keys of all items, as they stand now; what lies behind stays there."""
        own = None
        if self._at is not None:
            online, target = networks_now(self._table(), self._described, self.updates, self._rule)
            own = online if network is self.online else target
        response = self._response.own_now(self.rows)
        return network.keys_of(network.shelf(self._items, own=own, response=response))

    def _keys_now(self, network: QNetwork, ids: Tensor | None) -> Keys:
        """A network's keys of these items, as they stand now; all, where there are few enough to be looked at."""
        if ids is None or self.rows <= self.settings.exact_items:
            self._catch_up()
            return network.keys(self._items, ids)
        table = self._take(ids).table
        self._response.catch_up(ids)
        own = table.online if network is self.online else table.target
        return network.keys(self._items, ids, own=own)

    @torch.no_grad()
    def _foretell_slots(self, joined: Joined) -> None:
        """For learner.stacking. A reward that comes later than its transition was made is not counted."""
        t = joined.transitions
        shown = np.flatnonzero(~t.organic & (t.action > 0))
        for start in range(0, len(shown), _FORETOLD):
            rows = shown[start : start + _FORETOLD]
            action = t.action[rows]
            of, which = np.unique(t.state[rows], return_inverse=True)
            states = Histories(*(getattr(joined.states, name)[of] for name in Histories._fields))
            self._stack.note(
                action,
                *self._foretold(states, which, action, t.slot[rows]),
                t.reward[rows] != 0,
                joined.states.item[t.state[rows]],
            )

    def _vectors_of(self, item: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """What describes these items, [T, vector_dim]."""
        if not self._any_described:
            return np.broadcast_to(np.float32(0.0), (len(item), self.settings.vector_dim))
        vectors: npt.NDArray[np.float32] = self._items.vector[self._to(item, torch.int64)].cpu().numpy()
        return vectors

    def _foretold(
        self,
        histories: Histories,
        which: npt.NDArray[np.intp],
        action: npt.NDArray[np.int32],
        slot: npt.NDArray[np.int16],
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """z of the network that is served, and √share, [T] each. which: [T] rows of the histories."""
        state, item = self._state(histories), self._to(action, torch.int64)
        ids = torch.unique(torch.cat((state.item.flatten(), item, item.new_zeros(1))))
        here, at = torch.searchsorted(ids, state.item), torch.searchsorted(ids, item).unsqueeze(1)
        keys = self._keys_now(self.target, ids)
        reading = self.target.read(state, ids, ways=bool(self.target.trust), right=False)  # z as it is served
        queries = self.target.queries(state, keys, here, ids, reading).rows(self._to(which, torch.int64))
        place = self.target.position_of(self._to(slot, torch.int64))
        log_odds = self.target.parts_at(queries, keys, at)[0][:, 0] + place
        share = (queries.back * (queries.choice.item == at)).sum(dim=1)
        return log_odds.cpu().numpy(), share.cpu().numpy()

    def look_at_offers(self, decisions: int, candidates: Sequence[int]) -> None:
        """Note how many decisions came in, and how many candidates those that brought theirs had."""
        kept = max(0.0, 1.0 - decisions / OFFER_MEMORY)
        self._offers = kept * self._offers + (decisions, len(candidates), sum(candidates))

    @property
    def offers(self) -> int:
        """Candidates that a request brings, where most of them do; 0: they rank the catalog."""
        decisions, bring, candidates = self._offers.tolist()
        return round(candidates / bring) if bring > decisions / 2 else 0

    def _put_features(
        self,
        ids: npt.NDArray[np.integer],
        category: npt.NDArray[np.uint64],
        brand: npt.NDArray[np.uint64],
        price: npt.NDArray[np.float32],
        vector: npt.NDArray[np.float32],
    ) -> None:
        """Features of these rows, [M], anew."""
        rows, width = self._to(ids, torch.int64), min(self.settings.vector_dim, vector.shape[1])
        network = self.settings.network
        self._items.category[rows] = bucket(category, network.category_buckets).to(self.device)
        self._items.brand[rows] = bucket(brand, network.brand_buckets).to(self.device)
        self._items.price[rows] = price_levels(self._to(np.asarray(price, np.float32)), self._price_scale)
        self._items.vector[rows] = 0.0
        self._items.vector[rows, :width] = self._to(np.asarray(vector[:, :width], np.float32))

    def _look_prices(self, price: Tensor) -> None:
        """Take in what prices are usual in this catalog; NaN unknown."""
        logs = torch.log1p(price[~price.isnan()].clamp(min=0))
        if len(logs) > 1:
            self._price_scale = torch.stack((logs.mean(), logs.std().clamp(min=0.1)))

    def update(self, batch: Batch, kept: int | None = None) -> Update:
        """One gradient step; see the losses in learner.dqn and the equation in learner.networks.

        kept: transitions in the replay that the batch was drawn from; None: the batch is all there is.

        Raises: ValueError for a batch that names items beyond `grow`.
        """
        self._check(batch)
        self.online.look()
        self._trust_recall()
        rows = self._rows(batch, len(batch.action) / max(kept or 0, len(batch.action)))
        self._set_value_rate()
        told = self._launch(rows).cpu()
        self._follow_up(rows)
        values, error = told[: -len(batch.action)].tolist(), told[-len(batch.action) :].numpy()
        losses = dict(zip(self._parts, values[3:], strict=True))
        return Update(values[0], error, values[1] * self.unit, values[2] * self.unit, losses)

    def _launch(self, rows: _Rows) -> Tensor:
        """What `_learn` gives, by a graph where there is one: not of rows that are others each time."""
        if self.graphs is None or rows.aisle is not None:
            return self._learn(rows)
        moved, read = self._standing()
        return self.graphs.run(self._learn, rows, rows.facts, (*moved, *read), moved)

    def _standing(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that stand from one update to the next, where it looks at all items: those that it moves, and
        the others that it reads."""
        networks = (self.online, self.target)
        moments = (value for state in self._optimiser.state.values() for value in state.values())
        moved = [
            *(parameter for network in networks for parameter in network.parameters()),
            *(value for value in moments if isinstance(value, Tensor)),
            *self._response.tensors(),
            self._unaided,
        ]
        rate = (group["lr"] for group in self._optimiser.param_groups)
        read = [
            *self._roomy_items,
            self._roomy_described,
            *self.online.stack.buffers(),
            *(each for each in rate if isinstance(each, Tensor)),
        ]
        return moved, read

    def _learn(self, rows: _Rows) -> Tensor:
        """All that is worked out on the device: nothing waits for it, and no number of Python's but `facts` has a say.

        Returns, in a row, the loss; mean and standard deviation of Q of the batch's own actions, in units of
        `Agent.unit`; each part's loss, in the order of `_parts`; and the errors of Q, [B].
        """
        keys = self._keys(rows)
        queries = self.online.queries(rows.state, keys, rows.here, rows.ids, rows.reading)
        target = dqn.n_step_target(
            rows.reward.unsqueeze(1), rows.discount.unsqueeze(1), self._next_value(rows, keys)
        )
        found = matches(queries.choice, keys.category, rows.slate)
        parts = self.online.parts_at(queries, keys, rows.slate, found)
        losses = self._losses(rows, keys, queries, target, *parts)
        shown = self._shown(rows, keys, queries, parts[0], found)
        q = self._q(
            queries,
            parts[0][:, 0] + self.online.position_of(rows.slot[:, 0]),
            *(part[:, 0] for part in parts[1:]),
        )
        loss = self._step(rows, losses)
        self._response.move(shown, rows.facts.told, rows.rates.pace)
        self._parts = tuple(losses)
        told = torch.stack([loss, q.mean(), q.std(correction=0), *losses.values()])
        return torch.cat((told, target.mean(dim=1) - q)).detach()

    def _read(self, state: StateTensors, ids: Tensor | None) -> Reading:
        """What the states say to online and target network. ids: see `QNetwork.queries`."""
        # on the CPU both networks read what was counted once; elsewhere a graph may count it twice
        return self.online.read(state, ids, ways=self._ways > 0, count=self.device.type == "cpu")

    @property
    def _ways(self) -> float:
        """ρ, as a share of β; 0 where it would be too small to look them up for."""
        share = IN_PLACE / (IN_PLACE + self._choices)
        return share if share >= LEAST_SHARE else 0.0

    @torch.no_grad()
    def _trust_recall(self) -> None:
        """ρ: where others went stands in for choices that have not been made. Learnt along with them it takes from
        encoder and tower what they would have to tell, and values are read from these."""
        self.online.trust.copy_(self.online.prior * self._ways)
        if not self._ways:
            self.target.trust.zero_()  # else it would only ever come nearer

    def _keys(self, rows: _Rows) -> Keys:
        """The online network's keys of the rows, with a gradient."""
        own = None if rows.aisle is None else rows.aisle.own
        return self.online.keys(self._roomy, rows.ids, rows.forgotten, own)

    def _losses(
        self,
        rows: _Rows,
        keys: Keys,
        queries: Queries,
        target: Tensor,
        choice: Tensor,
        reward: Tensor,
        continuation: Tensor,
    ) -> dict[str, Tensor]:
        """Each part's weighted loss; every one is learnt from just the slots that speak of it.

        All slots of a sampled transition's step count for one: the mean over them is what drawing one of them at
        random would give, with less noise and for one state's encoding. target: [B, quantiles]; choice, reward,
        continuation: [B, K].
        """
        settings, online = self.settings, self.online
        organic = rows.organic.unsqueeze(1)
        chosen = rows.present & (organic | (rows.slate_reward != 0))
        each = rows.each
        unaided = self._look_unaided(rows, 0, rows.slate_reward - reward, each * organic) * organic
        earned = dqn.huber(reward + unaided, rows.slate_reward, settings.huber_delta)
        losses = {
            "choice": dqn.weighted_mean(
                dqn.choice_loss(choice + self.online.position_of(rows.slot), chosen), each * ~organic
            ),
            "reward": settings.reward_weight * dqn.weighted_mean(earned, each * chosen),
        }
        if settings.gamma > 0:  # else nothing is to come
            later = dqn.continuation_target(target, rows.slate_reward[:, :1], settings.gamma)
            led = (continuation * chosen).sum(dim=1, keepdim=True)
            if not rows.facts.aided:  # all are chosen: how far that is better than none cannot be told
                led = led - (led[:, 0] * rows.weight).sum() / rows.weight.sum()
            ahead = queries.unchosen + led
            if settings.centred:
                ahead = ahead + queries.hint * self._likelier(rows, keys, queries, choice)
            delta = settings.huber_delta if settings.quantiles == 1 else settings.quantile_delta
            left_over = (later - ahead).mean(dim=1)
            unaided = self._look_unaided(rows, 1, left_over, rows.weight * rows.organic) * organic
            error = dqn.quantile_huber(ahead + unaided, later, delta)
            losses["td"] = settings.td_weight * dqn.weighted_mean(error, rows.weight)
        if settings.sqn_weight > 0:
            losses["next_item"] = settings.sqn_weight * self._next_item_loss(rows, keys, queries)
        if settings.length_weight > 0:
            squares = queries.organic.vector[:, :-1].square().sum(dim=1)
            losses["length"] = settings.length_weight * dqn.weighted_mean(squares, rows.weight)
        if settings.cql_weight > 0 and rows.facts.offered:
            q_all = online.q_all(queries, keys)
            q_action = q_all.gather(1, rows.slate[:, :1]).squeeze(1)
            conservative = dqn.conservative_loss(q_all, q_action, rows.on_offer)
            losses["conservative"] = settings.cql_weight * dqn.weighted_mean(conservative, rows.weight)
        return losses

    @torch.no_grad()
    def _likelier(self, rows: _Rows, keys: Keys, queries: Queries, z: Tensor) -> Tensor:
        """How much likelier something was chosen of what was shown than of the batch's other slates, [B, 1]; 0 where
        the user went there unaided."""
        chance = self.online.chance_at(queries, keys, rows.slate, rows.slot, z) * rows.present
        chance = chance.sum(dim=1)
        weight = rows.weight * ~rows.organic
        usual = (chance * weight).sum() / weight.sum().clamp(min=1e-9)
        return ((chance - usual) * ~rows.organic).unsqueeze(1)

    def _look_slots(self, batch: Batch) -> None:
        """Take in how many slots slates have: a slate of K slots is there K times, and counts for one. Of few slates
        the ratio would be off, so that the sums are means over batches."""
        from_slates = ~batch.organic
        if not from_slates.any():
            return
        weight = batch.weight[from_slates] / batch.weight.mean()
        sums = (weight.sum(), (weight / np.maximum(1, batch.slots[from_slates])).sum())
        self._slates += SLATES_SHARE * (sums - self._slates)
        self.slots += SLATES_SHARE * (float(self._slates[0] / self._slates[1]) - self.slots)

    @torch.no_grad()
    def _look_unit(self, batch: Batch) -> None:
        """Take in what a choice earns on average, in reward units: one unit of all that the network says and learns of
        value, so that no setting knows a shop's currency. Where it moves, what was learnt is restated in it (as in
        PopArt: van Hasselt et al. 2016, proposition 1). What is absurd, as a price of a billion, moves it little.
        """
        earned = np.abs(batch.slate_reward) * (batch.slate > 0)
        if self._unit_looks:
            earned = np.minimum(earned, ABSURD * self.unit)
        each = (earned > 0) * (batch.weight / np.maximum(1, np.count_nonzero(batch.slate, axis=1)))[:, None]
        if not each.any():
            return
        self._unit_looks += 1
        before, share = self.unit, 1 / min(self._unit_looks, UNIT_MEMORY)
        self.unit += share * (float((earned * each).sum() / each.sum()) - before)
        if self._unit_looks > 1:  # until then nothing was learnt
            self._restate(before / self.unit)

    def _restate(self, ratio: float) -> None:
        """Multiply all that says value by this."""
        for network in (self.online, self.target):
            for parameter in network.valued():
                parameter.detach().mul_(ratio)
        self._unaided.mul_(ratio)

    @property
    def aided(self) -> bool:
        """Whether any slate has been seen."""
        return self._response.looked > 0

    @property
    def unaided(self) -> int:
        """Steps that returns go on through what users do unaided: a bootstrap there would count a slate that nobody is
        shown. In a log without slates each step is a choice like another, and returns end where they end."""
        return self.settings.unaided_steps if self.aided else 0

    @torch.no_grad()
    def _look_unaided(self, rows: _Rows, which: int, left_over: Tensor, weight: Tensor) -> Tensor:
        """Take in by how much what users choose unaided earns (0), or leads to (1), otherwise than chosen slots do: the
        mean of what the heads leave over; returns it, [1], 0 before any slate was seen. Were it a parameter, the heads
        would chase it for as long as Adam moves it; and they would chase the first batch's, were they to learn from it
        before it was looked at.
        """
        if rows.facts.aided:
            left_over = left_over.clamp(-ABSURD, ABSURD)
            mean = (left_over * weight).sum() / weight.sum().clamp(min=SMALLEST_WEIGHT)
            self._unaided[which].lerp_(mean, rows.rates.unaided[which])
        return self._unaided[which : which + 1]

    @torch.no_grad()
    def _shown(
        self, rows: _Rows, keys: Keys, queries: Queries, choice: Tensor, found: tuple[Tensor, Tensor]
    ) -> Shown:
        """The slots of slates, for learner.response."""
        ids, d = rows.slate, self.settings.dim
        same, alike = found
        return Shown(
            queries.organic.vector[:, :d].detach(),
            keys.tower.detach()[ids],
            keys.organic.detach()[ids, :d],
            ids if rows.ids is None else rows.ids[ids],
            rows.slate_reward != 0,
            torch.sigmoid(choice + self.online.position_of(rows.slot)),
            rows.each * ~rows.organic.unsqueeze(1),
            rows.each * rows.organic.unsqueeze(1),
            queries.kinds,
            queries.share,
            same & (rows.state.item > 0).unsqueeze(1),
            alike & (queries.choice.category > 0).unsqueeze(1),
        )

    def _next_item_loss(self, rows: _Rows, keys: Keys, queries: Queries) -> Tensor:
        """SQN's loss over the rows in which the user went to the action unaided. A part of the batch.

        What was chosen from a slate is left out: it tells as much of what was shown as of what is liked.
        """
        if not rows.facts.went:
            return torch.zeros((), device=self.device)
        organic, action, weight = queries.organic, rows.slate[:, 0], rows.weight
        if rows.went is None:
            weight = weight * (rows.present[:, 0] & rows.organic)
        else:
            organic, action, weight = organic.rows(rows.went), action[rows.went], weight[rows.went]
        logits = score_all(organic, keys.organic, keys.category)
        if rows.stands_for is not None:
            logits = logits + rows.stands_for
        loss = dqn.next_item_loss(logits, action)
        return dqn.weighted_mean(loss, weight) * (len(weight) / len(rows.weight))

    @torch.no_grad()
    def _next_value(self, rows: _Rows, keys: Keys) -> Tensor:
        """Quantiles of V(s'), [B, M], by double DQN: the online network chooses, the target network judges; 0 where
        nothing follows. Without `double` the target network does both."""
        value = torch.zeros(len(rows.discount), self.settings.quantiles, device=self.device)
        if not rows.facts.follows:
            return value
        state, there, reading = rows.next_state, rows.there, rows.next_reading
        if rows.goes_on is not None:
            state, there = state.rows(rows.goes_on), there[rows.goes_on]
        judge = self._judge(rows.aisle)
        judged = self.target.queries(state, judge, there, rows.ids, reading)
        if self.settings.double:
            chooser = self.online.queries(state, keys, there, rows.ids, reading)
            best = self._best(rows, self.online, chooser, keys)
        else:
            best = self._best(rows, self.target, judged, judge)
        place = torch.arange(best.shape[1], device=self.device)  # the best comes first, and is looked at most
        best_value = dqn.slate_value(
            self.settings.gamma * judged.unchosen, self.target.advantage_at(judged, judge, best, place)
        )
        if rows.goes_on is None:
            return torch.where(rows.discount.unsqueeze(1) > 0, best_value, value)
        value[rows.goes_on] = best_value
        return value

    def _best(self, rows: _Rows, network: QNetwork, queries: Queries, keys: Keys) -> Tensor:
        """The best slate in each of S states by this network, [S, K] rows of the keys."""
        states = len(queries.gain)
        slots, offer = rows.facts.slots, rows.offer
        if offer is not None:
            q = network.advantage_at(queries, keys, offer)
            return offer.gather(1, dqn.best_items(q, torch.ones_like(offer[0], dtype=torch.bool), slots))
        # so many states at once as leave what is worked out in the processor's cache
        size = states if self.device.type != "cpu" else max(1, _CACHED // len(rows.on_offer))
        blocks = [slice(start, start + size) for start in range(0, states, size)]
        return torch.cat(
            [
                dqn.best_items(network.advantage_all(queries.rows(block), keys), rows.on_offer, slots)
                for block in blocks
            ]
        )

    def _offer(self, on_offer: Tensor, states: int) -> Tensor | None:
        """What could be shown next in each of these states, [states, O] rows of on_offer [N]; None: all of it, the
        catalog. Where requests bring their candidates it is so many as they do, drawn from what there is: the best of
        all that ever was on offer is never to be had again.
        """
        if self.offers == 0:
            return None
        there_are = torch.nonzero(on_offer).squeeze(1)
        if self.offers >= len(there_are):
            return None
        # each state's are so many in a row, from anywhere in one order of all: different ones, all as likely
        order = torch.randperm(len(there_are), generator=self._generator)
        first = torch.randint(len(order), (states, 1), generator=self._generator)
        drawn = order[(first + torch.arange(self.offers)) % len(order)]
        return there_are[drawn.to(self.device)]

    def _judge(self, aisle: _Aisle | None) -> Keys:
        """The target network's keys."""
        if aisle is not None:
            return self.target.keys(self._roomy, aisle.ids, own=aisle.table.target)
        return self.target.keys(self._roomy)

    def _step(self, rows: _Rows, losses: Mapping[str, Tensor]) -> Tensor:
        """Adam on the sum, and the target network a little after it."""
        loss = torch.stack(list(losses.values())).sum()
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        if rows.facts.decays:
            self._decay()
        if self.settings.target_tau > 0:
            self._lerp(rows.rates.follow, all_items=rows.aisle is None)
        return loss.detach()

    def _follow_up(self, rows: _Rows) -> None:
        """What comes of an update for what is no part of it."""
        self.updates += 1
        if rows.aisle is not None:
            self._put(rows.aisle)
        if self.settings.target_tau > 0:
            self.last_target_sync_update = self.updates
        elif self.updates - self.last_target_sync_update >= self.settings.target_sync_updates:
            self.sync_target()
        if rows.aisle is None:
            self._response.catch_up(slice(self.rows))

    @property
    def _value_rate(self) -> float:
        """How far the heads of value move, in rates of the rest: what they read is mostly noise, and goes down only as
        steps do (Robbins & Monro 1951). They never stop, since shops change."""
        settle = self.settings.value_settle
        share = (1 + self.updates / settle) ** -0.5 if settle else 1.0
        return self.settings.value_rate * max(share, LEAST_RATE)

    def _set_value_rate(self) -> None:
        group, rate = self._optimiser.param_groups[1], self.settings.learning_rate * self._value_rate
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

    def sync_target(self) -> None:
        """Make the target network equal to the online one."""
        self._catch_up()
        self._lerp(1.0, all_items=True)
        self.last_target_sync_update = self.updates

    @torch.no_grad()
    def _lerp(self, share: float | Tensor, all_items: bool) -> None:
        """Take the target network so far towards the online one; without `all_items`, but for the table by id."""
        table = self.target.tower.id.weight
        for mine, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
            if all_items or mine is not table:
                mine.lerp_(theirs, share)

    # --- the table by id, of which an update reads all rows, or few: see learner.lazy_table

    @property
    def _rule(self) -> Rule:
        settings = self.settings
        decay = settings.learning_rate * settings.weight_decay
        return Rule(settings.learning_rate, _EPS, decay, settings.target_tau)

    def _table(self) -> Rows:
        """The table as it lies there: rows that no update has read for long are behind."""
        online, target = self.online.tower.id.weight, self.target.tower.id.weight
        moments = self._optimiser.state[online]
        if not moments:
            moments["step"] = torch.zeros((), device=self.device)
            moments["exp_avg"], moments["exp_avg_sq"] = (torch.zeros_like(online) for _ in range(2))
        if self._at is None:
            self._at = torch.full((len(online),), self.updates, device=self.device)
        columns = (online.detach(), target, moments["exp_avg"], moments["exp_avg_sq"], self._at)
        return Rows(*(column[: self.rows] for column in columns))

    def _take(self, ids: Tensor) -> _Aisle:
        """These rows of the table, as they stand now."""
        rows = caught_up(self._table().take(ids), self._described[ids], self.updates, self._rule)
        return _Aisle(ids, rows, rows.online.clone().requires_grad_())

    def _put(self, aisle: _Aisle) -> None:
        """Move the rows by their gradient, and put them back."""
        gradient, described = aisle.own.grad, self._described[aisle.ids]
        assert gradient is not None  # every loss reads the table
        share = follow_share(self.updates, self.settings.target_tau)
        table = self._table()
        table.put(aisle.ids, stepped(aisle.table, gradient, described, share, self._rule))
        self._optimiser.state[self.online.tower.id.weight]["step"].fill_(self.updates)

    def _catch_up(self) -> None:
        """Leave no row behind."""
        if self._at is not None:
            catch_up(self._table(), self._described, self.updates, self._rule)
            self._response.catch_up()
            self._at = None

    def tensors(self) -> dict[str, Tensor]:
        """What a server needs, for the weight store: "online.*", "target.*", "both.*", "doubt.*" and "catalog.*"; on
        the CPU, not ours to change any more: what describes the items is the same copy until the catalog changes."""
        out = self._tensors()
        for prefix, network in (("online", self.online), ("target", self.target)):
            valued = {id(parameter) for parameter in network.valued()}
            for name, parameter in network.named_parameters():
                if id(parameter) in valued:
                    out[f"{prefix}.{name}"] *= self.unit  # servers speak in reward units
        out |= {f"{BOTH}response.{name}": value for name, value in self._response.served(self.rows).items()}
        followed = bool(self.online.trust) or bool(self.target.trust)
        out |= {f"{BOTH}recall.{name}": value for name, value in self._recall.served(followed).items()}
        stack = self.online.stack
        for name, value in stack.state_dict().items():
            out[f"{BOTH}stack.{name}"] = (value[: self.rows] if name == "level" else value).cpu().clone()
        variance = (stack.weights[1] ** 2 * self._response.variance(self.rows)).cpu()
        if self.settings.stack:
            variance[:, 0] += self._stack.variance(self.rows)
        out[f"{DOUBT}variance"] = variance
        out[f"{DOUBT}directions"] = self._response.directions.cpu().clone()
        if self._at is not None:
            now = networks_now(self._table(), self._described, self.updates, self._rule)
            for prefix, table in zip(("online", "target"), now, strict=True):
                out[f"{prefix}.{BY_ITEM[0]}"] = table.cpu()
        return out

    def _tensors(self) -> dict[str, Tensor]:
        """The same, but rows of the table by id that lie behind as they are."""
        out = {}
        for prefix, network in (("online", self.online), ("target", self.target)):
            for name, parameter in network.named_parameters():
                kept = parameter.detach()[: self.rows] if name in BY_ITEM else parameter.detach()
                out[f"{prefix}.{name}"] = kept.cpu().clone()
        if self._catalog_copy is None:
            self._catalog_copy = {
                f"catalog.{name}": tensor.cpu().clone() for name, tensor in self._items._asdict().items()
            }
            self._catalog_copy["catalog.on_offer"] = self._on_offer.cpu().clone()
            self._catalog_copy["catalog.price_scale"] = self._price_scale.cpu().clone()
        return out | self._catalog_copy | {"catalog.seen": self._items.seen.cpu().clone()}

    def shape(self) -> dict[str, Any]:
        """The network's settings for the manifest, from which `Policy` rebuilds it."""
        return asdict(self.settings.network)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, exactly: networks, optimiser, catalog, generator, counters."""
        out = {name: tensor.numpy() for name, tensor in self._tensors().items()}
        out |= {f"response.{name}": value.numpy() for name, value in self._response.state(self.rows).items()}
        out |= {f"stack.{name}": value for name, value in self._stack.state(self.rows).items()}
        out |= {f"recall.{name}": value for name, value in self._recall.state().items()}
        if self._at is not None:
            out["at"] = self._at[: self.rows].cpu().numpy().copy()
        for name, parameter in self.online.named_parameters():
            for key, value in self._optimiser.state.get(parameter, {}).items():
                kept = value[: self.rows] if name in BY_ITEM and value.ndim else value
                out[f"adam.{key}.{name}"] = kept.cpu().numpy().copy()
        out["generator"] = self._generator.get_state().numpy().copy()
        out["unaided"] = self._unaided.cpu().numpy().copy()
        out["counters"] = np.array(
            [
                *(self.updates, self.last_target_sync_update, self._choices, self._unit_looks),
                *self._unaided_looks,
            ],
            np.int64,
        )
        out["met"] = self._met[: self.rows].cpu().numpy().copy()
        out["slots"] = np.array([self.slots, *self._slates])
        out["offers"] = self._offers.copy()
        out["unit"] = np.array([self.unit])
        return out

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go back to what `state` gave; an agent restored goes on as if it had never stopped.

        Raises: ValueError when it is of a network of another shape.
        """
        on_offer = torch.from_numpy(state["catalog.on_offer"].copy())
        capacity = self.online.tower.id.num_embeddings
        while capacity < len(on_offer):
            capacity *= 2
        self._reserve(capacity)
        self._roomy_items = ItemTensors(
            *(
                torch.from_numpy(state[f"catalog.{name}"].copy()).to(self.device)
                for name in ItemTensors._fields
            )
        )
        self._roomy_offer = on_offer.to(self.device)
        self._roomy_described = (self._roomy_items.vector != 0).any(dim=1)
        self._any_described = bool(self._roomy_described.any())
        self._met = torch.from_numpy(state["met"].copy()).to(self.device)
        self._price_scale = torch.from_numpy(state["catalog.price_scale"].copy()).to(self.device)
        self._make_room()
        self._show(len(on_offer))
        fresh = first_rows(len(on_offer), self.online.tower.id.num_embeddings, self.settings.dim)
        for prefix, network in (("online", self.online), ("target", self.target)):
            for name, parameter in network.named_parameters():
                _fill(parameter, state[f"{prefix}.{name}"], name)
            network.tower.id.weight.detach()[len(on_offer) :] = fresh.to(self.device)
        if not self.settings.centred and float(self.online.item_scale) != 1.0:
            raise ValueError("centred is off, and what its heads of value know they have read centred")
        if self.settings.dueling != bool(self.online.unchosen.get_parameter("0.weight").any()):
            now, then = ("on", "off") if self.settings.dueling else ("off", "on")
            raise ValueError(f"dueling is {now}, and was {then} when the value of states was learnt")
        self._optimiser = self._new_optimiser()
        for name, parameter in self.online.named_parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in state]
            for key in keys:
                like = torch.zeros((), device=self.device) if key == "step" else torch.zeros_like(parameter)
                _fill(like, state[f"adam.{key}.{name}"], name)
                self._optimiser.state[parameter][key] = like
        known = {
            prefix: {
                name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
            }
            for prefix in ("response.", "stack.", "recall.")
        }
        self._response.restore({n: torch.from_numpy(value.copy()) for n, value in known["response."].items()})
        if self.settings.stack:  # else choice is as foretold
            self._stack.restore(known["stack."])
        if self.settings.recall:
            self._recall.restore(known["recall."])
        self._at = None
        if "at" in state:
            self._at = torch.zeros(capacity, dtype=torch.int64, device=self.device)
            self._at[: len(on_offer)] = torch.from_numpy(state["at"].copy()).to(self.device)
        self._generator.set_state(torch.from_numpy(state["generator"].copy()))
        _fill(self._unaided, state["unaided"], "unaided")
        counters = (int(n) for n in state["counters"])
        self.updates, self.last_target_sync_update, self._choices, self._unit_looks, *looks = counters
        self._unaided_looks = looks
        self._offers = state["offers"].copy()
        self.unit = float(state["unit"][0])
        self.slots, *slates = state["slots"].tolist()
        self._slates[:] = slates or 0.0  # checkpoints of earlier versions have no sums

    @torch.no_grad()
    def _q(self, queries: Queries, choice: Tensor, reward: Tensor, continuation: Tensor) -> Tensor:
        """Q(s, a) of the batch's own actions, [B], detached; choice as it is before it is set right."""
        gamma = self.settings.gamma
        return gamma * queries.unchosen.mean(dim=1) + torch.sigmoid(choice) * (reward + gamma * continuation)

    def _check(self, batch: Batch) -> None:
        top = max(int(part.max()) for part in (batch.slate, batch.state.item, batch.next_state.item))
        if top >= self.rows:
            raise ValueError(
                f"batch names vocabulary id {top}, agent has room for {self.rows - 1}; call grow"
            )

    def _rows(self, batch: Batch, share: float) -> _Rows:
        """The batch on the device, its items as rows of the keys that this update will make; all that it takes from
        chance is drawn, and all that must be known of it on the CPU is."""
        state, next_state = self._state(batch.state), self._state(batch.next_state)
        # to the last that is known: among them there may be unknown ones
        width = 1 + int(np.flatnonzero(batch.slate.any(axis=0)).max(initial=0))
        slate = self._to(batch.slate[:, :width], torch.int64)
        present = slate > 0
        for ids in (slate, state.item):
            self._items.seen[ids] = ~self._spoken_for(ids) | (self._met[ids] >= MEETINGS)
        self._items.seen[0] = False
        self._look_slots(batch)
        aisle, stands_for, on_offer = None, None, self._on_offer
        here, there = state.item, next_state.item
        if self.rows <= self.settings.exact_items:
            self._catch_up()
            if self.device.type != "cpu":
                there_is = torch.arange(len(self._roomy_offer), device=self.device) < self.rows
                on_offer = self._roomy_offer & there_is
                stands_for = torch.where(there_is, 0.0, -torch.inf)
        else:
            ids, stands_for = self._sample(slate, here, there)
            on_offer = self._on_offer[ids]
            slate, here, there = (torch.searchsorted(ids, part) for part in (slate, here, there))
            aisle = self._take(ids)
            self._response.catch_up(ids)
        self._look_unit(batch)
        weight = self._to(batch.weight / batch.weight.mean())
        among = None if aisle is None else aisle.ids
        facts, rates = self._facts(batch, width, share, on_offer, whole=aisle is None)
        went = goes_on = None
        followed = next_state
        if self.device.type == "cpu":  # elsewhere it takes longer to leave out what does not count
            went = torch.from_numpy(_went(batch))
            goes_on = torch.from_numpy(np.flatnonzero(batch.discount > 0))
            followed = next_state.rows(goes_on)
        forgotten = self._forgotten(among)
        reading = self._read(state, among)
        offer = self._offer(on_offer, len(followed.item)) if facts.follows else None
        return _Rows(
            facts,
            rates,
            aisle,
            stands_for,
            on_offer,
            state,
            next_state,
            here,
            there,
            slate,
            present,
            self._to(batch.slate_slot[:, :width], torch.int64),
            self._to(batch.slate_reward[:, :width]) / self.unit,
            self._to(batch.reward) / self.unit,
            self._to(batch.discount),
            weight,
            (weight / present.sum(dim=1).clamp(min=1)).unsqueeze(1) * present,
            self._to(batch.organic, torch.bool),
            went,
            goes_on,
            reading,
            self._read(followed, among) if facts.follows else reading,
            offer,
            forgotten,
        )

    def _facts(
        self, batch: Batch, width: int, share: float, on_offer: Tensor, *, whole: bool
    ) -> tuple[Facts, Rates]:
        """Of an update by this batch, a share of replay; the clocks that rates go by go on. on_offer: [N] of the rows;
        whole: these are all."""
        settings, weighed = self.settings, batch.weight > 0
        some = (batch.slate[:, :width] > 0).any(axis=1) & weighed
        unaided = bool((some & batch.organic).any()), bool((batch.organic & weighed).any())
        aided = self.aided
        told, pace = self._response.advance(share, bool((some & ~batch.organic).any()), unaided[0])
        shares = [
            self._share_unaided(which) if aided and there else 0.0 for which, there in enumerate(unaided)
        ]
        offered = self._offered if whole else int(on_offer.sum())
        facts = Facts(
            told,
            aided,
            self.device.type != "cpu" or bool(len(_went(batch))),
            offered > 0 and bool((batch.discount > 0).any()),
            offered > 0,
            min(settings.slate_size or round(self.slots), max(offered, 1)),
            whole and settings.weight_decay > 0 and self._any_described,
        )
        rates = [*pace, *shares, follow_share(self.updates + 1, settings.target_tau)]
        if self.device.type != "cpu":
            rates = list(self._to(np.array(rates)).unbind())
        return facts, Rates(Pace(*rates[:4]), (rates[4], rates[5]), rates[6])

    def _share_unaided(self, which: int) -> float:
        """How far one more look at what is unaided goes."""
        if which == 1 and self.settings.gamma == 0:
            return 0.0  # nothing is to come
        self._unaided_looks[which] += 1
        return 1 / min(self._unaided_looks[which], UNAIDED_MEMORY)

    @property
    def _offered(self) -> int:
        """Items on offer, the catalog over."""
        if self._count_offered is None or self.device.type == "cpu":  # where to ask costs nothing
            self._count_offered = int(self._on_offer.sum())
        return self._count_offered

    def _sample(self, *named: Tensor) -> tuple[Tensor, Tensor]:
        """These vocabulary ids, 0, and some drawn from all, ascending, [N]; and of each the logarithm of how many items
        it stands for, [N], so that sums over the sample are, on average, those over all: 1 where it is named, and for
        one that was drawn alone 1 / P(drawn) (importance sampling: Bengio & Senécal 2003)."""
        drawn = torch.randint(self.rows, (self.settings.candidates,), generator=self._generator)
        known = torch.unique(torch.cat([ids.flatten() for ids in named] + [named[0].new_zeros(1)]))
        ids = torch.unique(torch.cat((known, drawn.to(self.device))))
        stands_for = torch.full(ids.shape, -math.log(-math.expm1(len(drawn) * math.log1p(-1 / self.rows))))
        stands_for = stands_for.to(self.device)
        stands_for[torch.searchsorted(ids, known)] = 0.0
        return ids, stands_for

    def _state(self, histories: Histories) -> StateTensors:
        return StateTensors(
            self._to(histories.item, torch.int64),
            self._to(histories.name, torch.int64),
            self._to(histories.age_s),
            self._to(histories.value),
        )

    def _to(self, array: npt.NDArray[Any], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(array).to(self.device, dtype)

    def _forgotten(self, ids: Tensor | None = None) -> Tensor | None:
        """[M] bool: which of these, or all, this update treats as new; only such as are more than their ids."""
        if self.settings.forget == 0:
            return None
        features = self._spoken_for(slice(None) if ids is None else ids)
        drawn = torch.rand(len(features), generator=self._generator) < self.settings.forget
        forgotten = drawn.to(self.device) & features
        return forgotten if ids is not None else functional.pad(forgotten, (0, self._spare))

    def _spoken_for(self, rows: Tensor | slice) -> Tensor:
        """Of these rows, bool: whether features say what kind of item it is, which a price alone does not."""
        return self._described[rows] | (self._items.category[rows] > 0) | (self._items.brand[rows] > 0)

    def _new_optimiser(self) -> torch.optim.AdamW:
        rate, heads = self.settings.learning_rate, list(self.online.heads_of_value())
        theirs = {id(parameter) for parameter in heads}
        rest = [parameter for parameter in self.online.parameters() if id(parameter) not in theirs]
        groups: list[dict[str, Any]] = [
            {"params": rest},
            {"params": heads},  # at a rate of their own: see `_set_value_rate`
        ]
        if self.device.type != "cpu":
            groups[1]["lr"] = torch.tensor(rate, device=self.device)
        return torch.optim.AdamW(
            groups,
            lr=rate,
            betas=BETAS,
            weight_decay=0.0,
            eps=_EPS,
            fused=True,
            capturable=self.device.type != "cpu",
        )

    @torch.no_grad()
    def _decay(self) -> None:
        """Draw ids' own vectors to zero, decoupled (Loshchilov & Hutter 2019), where features can speak for them.

        The rest of the network is shared by all items, learns from every click, and suffers from decay.
        """
        described = self._roomy_described[: self.rows + self._spare]
        keep = 1.0 - self._rule.decay * described.float()
        self.online.tower.id.weight[: len(described)].mul_(keep.unsqueeze(1))

    def _reserve(self, capacity: int) -> None:
        """Grow the tables by id to this many rows; what was learnt stays."""
        before = dict(self._optimiser.state)
        renamed: dict[Tensor, Tensor] = {}
        fresh = first_rows(len(self.online.tower.id.weight), capacity, self.settings.dim).to(self.device)
        for network in (self.online, self.target):
            table = network.tower.id
            old = table.weight
            weight = torch.cat((old.detach(), fresh))
            table.num_embeddings = capacity
            table.weight = torch.nn.Parameter(weight, requires_grad=old.requires_grad)
            renamed[old] = table.weight
        self._optimiser = self._new_optimiser()
        for old, state in before.items():
            new = renamed.get(old, old)
            self._optimiser.state[new] = {key: _padded(value, new) for key, value in state.items()}
        self._response.reserve(capacity)
        self._stack.reserve(capacity)
        if self._at is not None:
            more = self._at.new_full((capacity - len(self._at),), self.updates)
            self._at = torch.cat((self._at, more))


BOTH: Final = "both."  # prefix of what online and target network share
DOUBT: Final = "doubt."  # prefix of what is not known of how items answer: see `Fit.variance`
MAX_STEPS: Final = 100  # of n-step returns
USUAL_STEPS: Final = 10  # of those at most, where nobody says
ENTRIES: Final = 32  # of a state, and so many times as many where far ahead counts, likewise
MOST_TIMES: Final = 5
IN_PLACE: Final = (
    100  # choices of which where others went is worth as much as they are: see `Agent._trust_recall`
)
LEAST_SHARE: Final = 0.01  # of β, that ρ counts from
LEAST_RATE: Final = 1 / 16  # of what heads of value moved by at first
MEETINGS: Final = 3  # with an item that features speak for, before its id has a row of its own
# units: more than this counts as this where means are taken; elsewhere losses are linear there
ABSURD: Final = 1000.0
UNIT_MEMORY: Final = 1000  # updates over which what a choice earns is a mean
_CACHED: Final = 1 << 18  # numbers in one matrix over all items
OFFER_MEMORY: Final = 1000  # decisions over which what is on offer is a mean
SLATES_SHARE: Final = 0.01  # of an update in what is known of slates lately
SMALLEST_WEIGHT: Final = 1e-30  # that anything is divided by
UNAIDED_MEMORY: Final = 200  # updates over which what sets unaided choices apart is a mean
BY_ITEM: Final = ("tower.id.weight",)  # tables with one row for each vocabulary id
_EPS: Final = 1e-6  # of Adam
_FORETOLD: Final = 1024  # slots at once
_FIRST_ROOM: Final = 1024  # rows of the tables by id


def _padded(value: Tensor, like: Tensor) -> Tensor:
    """An optimiser's moment, with zeros for the rows that `like` has more; its step count as it is."""
    if value.ndim == 0 or value.shape == like.shape:
        return value
    wide = torch.zeros_like(like)
    wide[: len(value)] = value
    return wide.detach()


@torch.no_grad()
def _fill(tensor: Tensor, array: npt.NDArray[Any], name: str) -> None:
    """Copy an array into a tensor, whose rows beyond it (room to grow) become zero."""
    table = name in BY_ITEM and tensor.ndim > 0
    if array.shape[1 if table else 0 :] != tuple(tensor.shape)[1 if table else 0 :]:
        raise ValueError(f"{name} is {array.shape}, this agent's is {tuple(tensor.shape)}: settings differ")
    if table:
        tensor.zero_()
        tensor[: len(array)] = torch.from_numpy(array.copy())
    else:
        tensor.copy_(torch.from_numpy(np.array(array)))


def bucket(hashes: npt.NDArray[np.uint64], buckets: int) -> Tensor:
    """[N] int64 in 1..buckets-1; 0 where the hash is 0 (unknown)."""
    spread = np.asarray(hashes, np.uint64) % np.uint64(buckets - 1) + np.uint64(1)
    return torch.from_numpy(np.where(np.asarray(hashes) == 0, np.uint64(0), spread).astype(np.int64))
