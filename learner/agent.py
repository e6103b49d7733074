"""The agent: a double DQN that learns from batches and hands out its weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from learner.agent_settings import AgentSettings
from learner.entries import StateTensors, place_buckets
from learner.graphs import CudaCapture, Graphs
from learner.known_items import CatalogArrays, KnownItems
from learner.lazy_table import BETAS, Rows, Rule, catch_up, caught_up, follow_share, networks_now, stepped
from learner.networks import ItemTensors, Keys, QNetwork, Reading, first_rows, score_all
from learner.objective import ABSURD, Aisle, Facts, Objective, Prepared, Rates
from learner.recall import BLOCK, EVERY, RecallFit
from learner.replay import Batch, Histories
from learner.response import Fit, Pace
from learner.stacking import StackFit
from streaming.transitions import Joined


class Update(NamedTuple):
    """What one update did."""

    loss: float
    td_error: npt.NDArray[np.float32]  # [B] target - Q(s, a), in units of `Agent.unit`: priorities
    mean_q: float  # of the batch's own actions
    q_spread: float  # standard deviation of these
    losses: dict[str, float]  # by part: choice, reward, td, next_item, length, conservative


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
        self._objective = Objective(settings, self.online, self.target)
        self._unaided_looks = [0, 0]
        self.unit = 1.0  # of value, in reward units: see `_look_unit`
        self._unit_looks = 0
        self._choices = 0  # from slates, so far
        self._response = Fit(self.online.response)
        self._recall = RecallFit(self.online.recall)
        nearest = self._recall.nearest if settings.recall else None
        self._stack = StackFit(self.online.stack, nearest, self._vectors_of)
        self._optimiser = self._new_optimiser()
        self._known = KnownItems(settings.network, self.device)
        self._at: Tensor | None = (
            None  # the update after which each row stands as it lies there; None: all do now
        )

    @property
    def rows(self) -> int:
        """Vocabulary ids that can be learnt, the unknown item included."""
        return self._known.rows

    @property
    def items(self) -> ItemTensors:
        """What is known of the items, by vocabulary id."""
        return self._known.items

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
        if rows > self._known.room:
            self._known.make_room(self.online.tower.id.num_embeddings)  # which doubles
        self._response.enter(slice(self.rows, rows))
        self._known.show(rows)

    def set_catalog(self, catalog: CatalogArrays) -> None:
        """Take over the catalog as it stands: features, and what may be recommended. Grows as needed. Items of which
        it says nothing stay as they are known: from `describe`, or from before a restart."""
        self.grow(len(catalog.known) - 1)
        self._known.take_over(catalog)
        self._describe()

    def describe(self, ids: npt.NDArray[np.integer], items: CatalogArrays) -> None:
        """Take over the features of items that came with a request, of vocabulary ids [M] that there is room for. Those
        that the catalog has or had stay as it says. items: arrays [M]; known: [M], that the catalog has or had them.
        """
        new = np.flatnonzero(~np.asarray(items.known))
        if len(new):
            self._known.put(ids[new], items, new)
            self._describe(self._to(ids[new], torch.int64))

    def meet(self, ids: npt.NDArray[np.integer]) -> None:
        """Note that these items were shown or gone to: see `KnownItems.meet`."""
        self._known.meet(ids)

    def _describe(self, rows: Tensor | None = None) -> None:
        """Note which items have a vector, which tells them from others of their category; of these rows, or all.

        Where they have one their ids have nothing to tell apart before they have rows of their own (see `meet`), and
        start from zero: now, whatever was learnt of them while nothing described them, and not when the catalog is next
        taken over, or after a restart.
        """
        others = self._known.other_than_noted(rows)
        if not len(others):
            return
        if self._at is not None:  # what lies behind stood by what was so until now
            behind = self._table()
            described = self._known.described[others]
            behind.put(others, caught_up(behind.take(others), described, self.updates, self._rule))
        told_apart = self._known.turn(others)
        own = self.online.tower.id.weight
        moments = (value for value in self._optimiser.state.get(own, {}).values() if value.ndim)
        for table in (own.detach(), self.target.tower.id.weight.detach(), *moments):
            table[told_apart] = 0.0

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
            online, target = networks_now(self._table(), self._known.described, self.updates, self._rule)
            own = online if network is self.online else target
        response = self._response.own_now(self.rows)
        return network.keys_of(network.shelf(self.items, own=own, response=response))

    def _keys_now(self, network: QNetwork, ids: Tensor | None) -> Keys:
        """A network's keys of these items, as they stand now; all, where there are few enough to be looked at."""
        if ids is None or self.rows <= self.settings.exact_items:
            self._catch_up()
            return network.keys(self.items, ids)
        table = self._take(ids).table
        self._response.catch_up(ids)
        own = table.online if network is self.online else table.target
        return network.keys(self.items, ids, own=own)

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
        if not self._known.any_described:
            return np.broadcast_to(np.float32(0.0), (len(item), self.settings.vector_dim))
        vectors: npt.NDArray[np.float32] = self.items.vector[self._to(item, torch.int64)].cpu().numpy()
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

    def _launch(self, rows: Prepared) -> Tensor:
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
            self._objective.unaided,
        ]
        rate = (group["lr"] for group in self._optimiser.param_groups)
        read = [
            *self._known.looked_at,
            self._known.described_room,
            *self.online.stack.buffers(),
            *(each for each in rate if isinstance(each, Tensor)),
        ]
        return moved, read

    def _learn(self, rows: Prepared) -> Tensor:
        """All that is worked out on the device: nothing waits for it, and no number of Python's but `facts` has a say.

        Returns, in a row, the loss; mean and standard deviation of Q of the batch's own actions, in units of
        `Agent.unit`; each part's loss, in the order of `_parts`; and the errors of Q, [B].
        """
        learnt = self._objective.of(rows, self._known.looked_at)
        loss = self._step(rows, learnt.losses)
        self._response.move(learnt.shown, rows.facts.told, rows.rates.pace)
        self._parts = tuple(learnt.losses)
        told = torch.stack([loss, learnt.q.mean(), learnt.q.std(correction=0), *learnt.losses.values()])
        return torch.cat((told, learnt.error)).detach()

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
        self._objective.unaided.mul_(ratio)

    @property
    def aided(self) -> bool:
        """Whether any slate has been seen."""
        return self._response.looked > 0

    @property
    def unaided(self) -> int:
        """Steps that returns go on through what users do unaided: a bootstrap there would count a slate that nobody is
        shown. In a log without slates each step is a choice like another, and returns end where they end."""
        return self.settings.unaided_steps if self.aided else 0

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

    def _step(self, rows: Prepared, losses: Mapping[str, Tensor]) -> Tensor:
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

    def _follow_up(self, rows: Prepared) -> None:
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

    def _take(self, ids: Tensor) -> Aisle:
        """These rows of the table, as they stand now."""
        rows = caught_up(self._table().take(ids), self._known.described[ids], self.updates, self._rule)
        return Aisle(ids, rows, rows.online.clone().requires_grad_())

    def _put(self, aisle: Aisle) -> None:
        """Move the rows by their gradient, and put them back."""
        gradient, described = aisle.own.grad, self._known.described[aisle.ids]
        assert gradient is not None  # every loss reads the table
        share = follow_share(self.updates, self.settings.target_tau)
        table = self._table()
        table.put(aisle.ids, stepped(aisle.table, gradient, described, share, self._rule))
        self._optimiser.state[self.online.tower.id.weight]["step"].fill_(self.updates)

    def _catch_up(self) -> None:
        """Leave no row behind."""
        if self._at is not None:
            catch_up(self._table(), self._known.described, self.updates, self._rule)
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
            now = networks_now(self._table(), self._known.described, self.updates, self._rule)
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
        return out | {f"catalog.{name}": tensor for name, tensor in self._known.tensors().items()}

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
        out["unaided"] = self._objective.unaided.cpu().numpy().copy()
        out["counters"] = np.array(
            [
                *(self.updates, self.last_target_sync_update, self._choices, self._unit_looks),
                *self._unaided_looks,
            ],
            np.int64,
        )
        out["met"] = self._known.met[: self.rows].cpu().numpy().copy()
        out["slots"] = np.array([self.slots, *self._slates])
        out["offers"] = self._offers.copy()
        out["unit"] = np.array([self.unit])
        return out

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go back to what `state` gave; an agent restored goes on as if it had never stopped.

        Raises: ValueError when it is of a network of another shape.
        """
        rows, capacity = len(state["catalog.on_offer"]), self.online.tower.id.num_embeddings
        while capacity < rows:
            capacity *= 2
        self._reserve(capacity)
        items, response = (
            {name: torch.from_numpy(value.copy()) for name, value in _under(prefix, state).items()}
            for prefix in ("catalog.", "response.")
        )
        self._known.restore(items, torch.from_numpy(state["met"].copy()), capacity)
        fresh = first_rows(rows, capacity, self.settings.dim)
        for prefix, network in (("online", self.online), ("target", self.target)):
            for name, parameter in network.named_parameters():
                _fill(parameter, state[f"{prefix}.{name}"], name)
            network.tower.id.weight.detach()[rows:] = fresh.to(self.device)
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
        self._response.restore(response)
        if self.settings.stack:  # else choice is as foretold
            self._stack.restore(_under("stack.", state))
        if self.settings.recall:
            self._recall.restore(_under("recall.", state))
        self._at = None
        if "at" in state:
            self._at = torch.zeros(capacity, dtype=torch.int64, device=self.device)
            self._at[:rows] = torch.from_numpy(state["at"].copy()).to(self.device)
        self._generator.set_state(torch.from_numpy(state["generator"].copy()))
        _fill(self._objective.unaided, state["unaided"], "unaided")
        counters = (int(n) for n in state["counters"])
        self.updates, self.last_target_sync_update, self._choices, self._unit_looks, *looks = counters
        self._unaided_looks = looks
        self._offers = state["offers"].copy()
        self.unit = float(state["unit"][0])
        self.slots, *slates = state["slots"].tolist()
        self._slates[:] = slates or 0.0  # checkpoints of earlier versions have no sums

    def _check(self, batch: Batch) -> None:
        top = max(int(part.max()) for part in (batch.slate, batch.state.item, batch.next_state.item))
        if top >= self.rows:
            raise ValueError(
                f"batch names vocabulary id {top}, agent has room for {self.rows - 1}; call grow"
            )

    def _rows(self, batch: Batch, share: float) -> Prepared:
        """The batch on the device, its items as rows of the keys that this update will make; all that it takes from
        chance is drawn, and all that must be known of it on the CPU is."""
        state, next_state = self._state(batch.state), self._state(batch.next_state)
        # to the last that is known: among them there may be unknown ones
        width = 1 + int(np.flatnonzero(batch.slate.any(axis=0)).max(initial=0))
        slate = self._to(batch.slate[:, :width], torch.int64)
        present = slate > 0
        for ids in (slate, state.item):
            self._known.see(ids)
        self.items.seen[0] = False
        self._look_slots(batch)
        aisle = None
        here, there = state.item, next_state.item
        if self.rows <= self.settings.exact_items:
            self._catch_up()
            on_offer, stands_for = self._known.offer_looked_at()
        else:
            ids, stands_for = self._sample(slate, here, there)
            on_offer = self._known.on_offer[ids]
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
        return Prepared(
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
        offered = self._known.offered if whole else int(on_offer.sum())
        facts = Facts(
            told,
            aided,
            self.device.type != "cpu" or bool(len(_went(batch))),
            offered > 0 and bool((batch.discount > 0).any()),
            offered > 0,
            min(settings.slate_size or round(self.slots), max(offered, 1)),
            whole and settings.weight_decay > 0 and self._known.any_described,
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
        features = self._known.spoken_for(slice(None) if ids is None else ids)
        drawn = torch.rand(len(features), generator=self._generator) < self.settings.forget
        forgotten = drawn.to(self.device) & features
        return forgotten if ids is not None else functional.pad(forgotten, (0, self._known.spare))

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
        described = self._known.described_room[: self.rows + self._known.spare]
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
IN_PLACE: Final = (
    100  # choices of which where others went is worth as much as they are: see `Agent._trust_recall`
)
LEAST_SHARE: Final = 0.01  # of β, that ρ counts from
LEAST_RATE: Final = 1 / 16  # of what heads of value moved by at first
UNIT_MEMORY: Final = 1000  # updates over which what a choice earns is a mean
OFFER_MEMORY: Final = 1000  # decisions over which what is on offer is a mean
SLATES_SHARE: Final = 0.01  # of an update in what is known of slates lately
UNAIDED_MEMORY: Final = 200  # updates over which what sets unaided choices apart is a mean
BY_ITEM: Final = ("tower.id.weight",)  # tables with one row for each vocabulary id
_EPS: Final = 1e-6  # of Adam
_FORETOLD: Final = 1024  # slots at once
_FIRST_ROOM: Final = 1024  # rows of the tables by id


def _under(prefix: str, state: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """What is named so, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


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
