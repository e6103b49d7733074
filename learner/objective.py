"""What an update minimises: keys, double DQN's target and the losses of a batch, as tensors in, tensors out.

Nothing here waits for the device, and no number of Python's but `Facts` has a say in what is worked out, so that all of
it can be one CUDA graph (see learner.graphs). The losses are in learner.dqn, the equation in learner.networks.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from learner import dqn
from learner.agent_settings import AgentSettings
from learner.entries import StateTensors
from learner.lazy_table import Rows
from learner.networks import ItemTensors, Keys, QNetwork, Queries, Reading, matches, score_all
from learner.response import Pace, Shown

# units: more than this counts as this where means are taken; elsewhere losses are linear there
ABSURD: Final = 1000.0
SMALLEST_WEIGHT: Final = 1e-30  # that anything is divided by
_CACHED: Final = 1 << 18  # numbers in one matrix over all items


class Aisle(NamedTuple):
    """The items that an update looks at, where that is not all of the catalog."""

    ids: Tensor  # [M] vocabulary ids, ascending
    table: Rows  # [M], as they stand now
    own: Tensor  # [M, d + 1] of the online table, gathers the gradient


class Facts(NamedTuple):
    """What is decided before an update's tensors are worked out, and decides which of them there are."""

    told: str  # what learner.response learns from: see `Fit.advance`
    aided: bool  # any slate has been seen
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


class Prepared(NamedTuple):
    """A batch as tensors; `here`, `there` and `slate` are its items as rows of the keys in use, which are N."""

    facts: Facts
    rates: Rates
    aisle: Aisle | None  # what the N rows are; None: row i is id i
    # [N] logarithm of how many items each row does, where they are a sample (`Agent._sample`) or some are of no item
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
    forgotten: Tensor | None  # [N] bool; see `Agent._forgotten`

    @property
    def ids(self) -> Tensor | None:
        """[N] vocabulary ids of the rows; None: row i is id i."""
        return None if self.aisle is None else self.aisle.ids


class Learnt(NamedTuple):
    """What one batch comes to."""

    losses: dict[str, Tensor]  # of each part, weighted
    shown: Shown  # for learner.response
    q: Tensor  # [B] of the batch's own actions, detached
    error: Tensor  # [B] target - q


class Objective:
    """What one agent learns. It changes nothing but `unaided`."""

    def __init__(self, settings: AgentSettings, online: QNetwork, target: QNetwork) -> None:
        self.settings = settings
        self.online, self.target = online, target
        self.device = next(online.parameters()).device
        # by how much what users choose unaided earns, or leads to, otherwise than chosen slots do: see `_look_unaided`
        self.unaided = torch.zeros(2, device=self.device)

    def of(self, rows: Prepared, items: ItemTensors) -> Learnt:
        """What this batch comes to. items: what is known of them by vocabulary id, of all that `rows` speaks of."""
        keys = self.keys(rows, items)
        queries = self.online.queries(rows.state, keys, rows.here, rows.ids, rows.reading)
        target = dqn.n_step_target(
            rows.reward.unsqueeze(1), rows.discount.unsqueeze(1), self.next_value(rows, keys, items)
        )
        found = matches(queries.choice, keys.category, rows.slate)
        parts = self.online.parts_at(queries, keys, rows.slate, found)
        losses = self.losses(rows, keys, queries, target, *parts)
        shown = self._shown(rows, keys, queries, parts[0], found)
        q = self._q(
            queries,
            parts[0][:, 0] + self.online.position_of(rows.slot[:, 0]),
            *(part[:, 0] for part in parts[1:]),
        )
        return Learnt(losses, shown, q, target.mean(dim=1) - q)

    def keys(self, rows: Prepared, items: ItemTensors) -> Keys:
        """The online network's keys of the rows, with a gradient."""
        own = None if rows.aisle is None else rows.aisle.own
        return self.online.keys(items, rows.ids, rows.forgotten, own)

    def losses(
        self,
        rows: Prepared,
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
    def _likelier(self, rows: Prepared, keys: Keys, queries: Queries, z: Tensor) -> Tensor:
        """How much likelier something was chosen of what was shown than of the batch's other slates, [B, 1]; 0 where
        the user went there unaided."""
        chance = self.online.chance_at(queries, keys, rows.slate, rows.slot, z) * rows.present
        chance = chance.sum(dim=1)
        weight = rows.weight * ~rows.organic
        usual = (chance * weight).sum() / weight.sum().clamp(min=1e-9)
        return ((chance - usual) * ~rows.organic).unsqueeze(1)

    @torch.no_grad()
    def _look_unaided(self, rows: Prepared, which: int, left_over: Tensor, weight: Tensor) -> Tensor:
        """Take in by how much what users choose unaided earns (0), or leads to (1), otherwise than chosen slots do: the
        mean of what the heads leave over; returns it, [1], 0 before any slate was seen. Were it a parameter, the heads
        would chase it for as long as Adam moves it; and they would chase the first batch's, were they to learn from it
        before it was looked at.
        """
        if rows.facts.aided:
            left_over = left_over.clamp(-ABSURD, ABSURD)
            mean = (left_over * weight).sum() / weight.sum().clamp(min=SMALLEST_WEIGHT)
            self.unaided[which].lerp_(mean, rows.rates.unaided[which])
        return self.unaided[which : which + 1]

    @torch.no_grad()
    def _shown(
        self, rows: Prepared, keys: Keys, queries: Queries, choice: Tensor, found: tuple[Tensor, Tensor]
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

    def _next_item_loss(self, rows: Prepared, keys: Keys, queries: Queries) -> Tensor:
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
    def next_value(self, rows: Prepared, keys: Keys, items: ItemTensors) -> Tensor:
        """Quantiles of V(s'), [B, M], by double DQN: the online network chooses, the target network judges; 0 where
        nothing follows. Without `double` the target network does both."""
        value = torch.zeros(len(rows.discount), self.settings.quantiles, device=self.device)
        if not rows.facts.follows:
            return value
        state, there, reading = rows.next_state, rows.there, rows.next_reading
        if rows.goes_on is not None:
            state, there = state.rows(rows.goes_on), there[rows.goes_on]
        judge = self._judge(rows.aisle, items)
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

    def _best(self, rows: Prepared, network: QNetwork, queries: Queries, keys: Keys) -> Tensor:
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

    def _judge(self, aisle: Aisle | None, items: ItemTensors) -> Keys:
        """The target network's keys."""
        if aisle is not None:
            return self.target.keys(items, aisle.ids, own=aisle.table.target)
        return self.target.keys(items)

    @torch.no_grad()
    def _q(self, queries: Queries, choice: Tensor, reward: Tensor, continuation: Tensor) -> Tensor:
        """Q(s, a) of the batch's own actions, [B], detached; choice as it is before it is set right."""
        gamma = self.settings.gamma
        return gamma * queries.unchosen.mean(dim=1) + torch.sigmoid(choice) * (reward + gamma * continuation)
