"""Policies to compare with, in process: random, popularity, and oracles that see into the shoppers' heads.

All fill slates for the same `Shop` and meet the same shoppers (the shop's luck does not depend on what is shown).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from simulator.shop import (
    CART,
    CLICK,
    HOUR_MS,
    PURCHASE,
    REFUND,
    VIEW,
    Events,
    Floats,
    Ints,
    Minds,
    Outcome,
    Rows,
    Shop,
    Turn,
)


class Recommender(Protocol):
    """Anything that fills slates."""

    def recommend(self, shop: Shop, turn: Turn, slate_size: int) -> Rows:
        """[B, slate_size] rows of the catalog, best first, none twice, only what is available (-1: nothing left)."""

    def observe(self, events: Events) -> None:
        """Take note of events, in the order in which they are published."""


class Random:
    """Uniform over what is available."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 11])

    def recommend(self, shop: Shop, turn: Turn, slate_size: int) -> Rows:
        score = self._rng.random((len(turn.shopper), len(turn.available)))
        return top(score, turn.available, slate_size)

    def observe(self, events: Events) -> None:
        """Nothing to learn."""


class Popularity:
    """The best sellers, less what the shopper lately clicked or bought: by decayed counts of what is done with items.

    It reads only events and the history. (The same few for everybody would wear off in a day, and lose to random.)
    """

    def __init__(self, items: int, half_life_h: float = 24.0) -> None:
        self._count = np.zeros(items)
        self._half_life_ms = half_life_h * 3_600_000
        self._time_ms = 0

    def recommend(self, shop: Shop, turn: Turn, slate_size: int) -> Rows:
        past = turn.history
        taken = np.where((past.name == CLICK) | (past.name == PURCHASE), past.item, -1)
        fresh = np.ones((len(taken), len(self._count) + 1), dtype=np.bool_)  # the last column takes -1
        fresh[np.arange(len(taken))[:, None], taken] = False
        return top(self._count[None, :], fresh[:, :-1] & turn.available, slate_size)

    def observe(self, events: Events) -> None:
        if len(events):
            now = max(self._time_ms, int(events.timestamp_ms.max()))
            self._count *= 0.5 ** ((now - (self._time_ms or now)) / self._half_life_ms)
            self._time_ms = now
            np.add.at(self._count, events.item, 1.0)


class GreedyOracle:
    """Knows the shop's rules and the state of the shopper's mind, and takes the most expected reward now.

    It sees what nobody could (tastes, purpose, stage, mood), yet neither the luck nor the future: it ranks by
    P(click) x (reward of a click + of what is then expected to be put into the cart, bought and sent back).
    """

    def recommend(self, shop: Shop, turn: Turn, slate_size: int) -> Rows:
        minds = shop.minds(turn.shopper)
        return top(shop.click_probability(minds) * worth(shop, minds.stage), turn.available, slate_size)

    def observe(self, events: Events) -> None:
        """It knows already."""


class PlanningOracle:
    """As the greedy oracle, but counts what a click does to the rest of the visit.

    An item is ranked by P(click) x (reward + V after the click - V after no click), with V times the probability
    to stay. V, the reward expected of the rest of a visit under this very policy, is a quadratic in `visit_state`,
    fitted by policy iteration, from greed onwards: rounds of visits in a private shop with the same goods and
    people but other luck. Several clicks on one page are treated as adding up (to first order), so it is a
    strong policy and not a proven optimum.
    """

    def __init__(self, shop: Shop, slate_size: int, rounds: int = 4, decisions: int = 16_000) -> None:
        """shop: the one to plan for (only its settings, seed and rewards are read)."""
        self._theta = np.zeros(len(_POWERS))
        pages, earned = [], []
        for r in range(rounds):
            private = Shop(shop.settings, shop.seed, shop.rewards, luck=shop.luck + 7919 * (r + 1))
            state, to_go = _watch(private, self, slate_size, decisions)
            pages.append(state)
            earned.append(to_go)
            # the last two rounds together: else two policies that each beat the other take turns for ever
            self._theta = _regress(np.concatenate(pages[-2:]), np.concatenate(earned[-2:]))

    def recommend(self, shop: Shop, turn: Turn, slate_size: int) -> Rows:
        return top(self.score(shop, shop.minds(turn.shopper)), turn.available, slate_size)

    def observe(self, events: Events) -> None:
        """It knows already."""

    def score(self, shop: Shop, minds: Minds) -> Floats:
        """[B, N] what showing each item adds to the expected reward of the visit, if it is looked at."""
        return shop.click_probability(minds) * (worth(shop, minds.stage) + self._change(shop, minds))

    def _change(self, shop: Shop, minds: Minds) -> Floats:
        """[B, N] V after a page with a click on that item alone, less V after a page without a click.

        It depends on the item's role (of the purpose, its accessory, else) and depth only: a table of these.
        """
        m = shop.mind
        mood, stage, mains, extras, *chances = (x[:, None, None] for x in visit_state(shop, minds).T)
        mains_role, extra_role = (np.array([[[1.0], [0.0], [0.0]]]), np.array([[[0.0], [1.0], [0.0]]]))
        calm = mood * m.mood_fade
        clicked = self._stay_and_earn(
            shop,
            np.clip(calm + m.mood_depth * _DEPTHS, -1.5, 1.5),
            np.minimum(1.0, stage + m.stage_click * mains_role * np.maximum(_DEPTHS, 0.0)),
            mains + mains_role / 4.0,
            extras + extra_role / 4.0,
            *chances,
        )
        table = clicked - self._stay_and_earn(shop, calm, stage, mains, extras, *chances)  # [B, 3, depths]
        category, purpose = shop.goods.category, minds.purpose[:, None]
        accessory = category == purpose + shop.settings.categories // 2
        role = np.where(category == purpose, 0, np.where(accessory, 1, 2))  # [B, N]
        depth = np.rint((shop.goods.depth + 1.0) / 2.0 * (len(_DEPTHS) - 1)).astype(np.int64)  # [N]
        return np.take_along_axis(table.reshape(len(table), -1), role * len(_DEPTHS) + depth, axis=1)

    def _stay_and_earn(self, shop: Shop, mood: Floats, *rest: Floats) -> Floats:
        return np.asarray((1.0 - shop.leave_probability(mood)) * _value(self._theta, mood, *rest))


class HistoryOracle:
    """Knows the shop's rules, but reads the shopper's mind out of the history that the storefront keeps.

    It is the planning oracle on `infer_minds`: what the best learner could hope for, since a learner has that same
    history and must learn the rules besides.
    """

    def __init__(self, planner: PlanningOracle) -> None:
        self._planner = planner

    def recommend(self, shop: Shop, turn: Turn, slate_size: int) -> Rows:
        return top(self._planner.score(shop, infer_minds(shop, turn)), turn.available, slate_size)

    def observe(self, events: Events) -> None:
        """It needs the history only."""


def infer_minds(shop: Shop, turn: Turn) -> Minds:
    """Minds as read out of the history alone: entries of the last 30 minutes without a gap are this visit.

    The purpose is the main category that most of this visit's entries belong to (an accessory counts for its main
    category, by half); stage, mood and satiation follow the shop's rules from this visit's entries, as if each
    click had a page of its own; tastes are averages over the whole history, drawn towards the middle.
    """
    m, g, past = shop.mind, shop.goods, turn.history
    half = shop.settings.categories // 2
    b, rows = len(turn.shopper), np.arange(len(turn.shopper))[:, None]
    there = past.item >= 0
    item = np.maximum(past.item, 0)
    newer = np.concatenate([turn.timestamp_ms[:, None], past.timestamp_ms[:, :-1]], axis=1)
    now = there & np.logical_and.accumulate(newer - past.timestamp_ms < 30 * 60_000, axis=1)
    now &= (past.name == VIEW) | (past.name == CLICK)  # yesterday's purchase may arrive today
    clicked, viewed = now & (past.name == CLICK), now & (past.name == VIEW)
    main, extra = g.category[item] % half, g.category[item] >= half
    # purpose, by votes
    votes = np.zeros((b, half))
    np.add.at(votes, (rows, main), viewed * np.where(extra, 0.5, 1.0) + 0.3 * clicked)
    lasting = np.zeros((b, half))
    np.add.at(lasting, (rows, main), (past.name == VIEW) * there * 1.0)
    purpose = (votes + 0.1 * lasting / np.maximum(lasting.sum(axis=1, keepdims=True), 1)).argmax(axis=1)
    on_purpose = (g.category[item] == purpose[:, None]) & now
    bought = there & (past.name == PURCHASE)
    owned = (bought & (g.category[item] == purpose[:, None])).any(axis=1)
    deep = np.maximum(g.depth[item], 0.0)
    steps = on_purpose * deep * (m.stage_click * clicked + m.stage_view * viewed)
    newer_clicks = np.cumsum(clicked, axis=1) - clicked
    clicks = np.zeros((b, 2 * half), dtype=np.int16)
    np.add.at(clicks, (rows, g.category[item]), clicked)
    # tastes
    looks = there & ((past.name == VIEW) | clicked)
    style = np.einsum("bh,bhd->bd", looks.astype(np.float64), g.style[item])
    style /= looks.sum(axis=1, keepdims=True) + 3.0
    affinity = np.zeros((b, 2 * half))
    affinity[:, :half] = lasting / np.maximum(lasting.max(axis=1, keepdims=True), 1.0)
    return Minds(
        affinity=affinity,
        style=style,
        level=(looks * g.level[item]).sum(axis=1) / (looks.sum(axis=1) + 3.0),
        purpose=purpose.astype(np.int32),
        owned=owned,
        stage=np.minimum(1.0, m.stage_owned * owned + steps.sum(axis=1)),
        mood=np.clip(
            (clicked * m.mood_depth * g.depth[item] * m.mood_fade**newer_clicks).sum(axis=1), -1.5, 1.5
        ),
        clicks=clicks,
        taken=np.where((past.name == CLICK) | bought, past.item, np.int32(-1)),
    )


_DEPTHS: Final = np.linspace(-1.0, 1.0, 41)
# exponents of the six columns of visit_state: all terms of degree <= 2
_POWERS: Final = tuple(p for p in itertools.product(range(3), repeat=6) if sum(p) <= 2)


def top(score: Floats, available: npt.NDArray[np.bool_], k: int) -> Rows:
    """[B, k] the columns of the k best scores among the available ones, best first; -1 where there are fewer."""
    masked = np.where(available, score, -np.inf)
    k_there = min(k, masked.shape[1])
    part = np.argpartition(-masked, k_there - 1, axis=1)[:, :k_there]
    best = np.take_along_axis(masked, part, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    slate = np.full((len(masked), k), -1, dtype=np.int32)
    slate[:, :k_there] = np.take_along_axis(part, order, axis=1)
    slate[:, :k_there][np.take_along_axis(best, order, axis=1) == -np.inf] = -1
    return slate


def worth(shop: Shop, stage: Floats) -> Floats:
    """[B, N] reward expected of a click on each item: the click, the cart, the purchase, the refund."""
    weight, value_weight = shop.rewards.columns()
    click, cart, buy, refund = (
        weight[c] + value_weight[c] * shop.goods.price for c in (CLICK, CART, PURCHASE, REFUND)
    )
    bought = shop.buy_probability() * (buy + shop.refund_probability() * refund)
    return np.asarray(click + shop.cart_probability(stage[:, None]) * (cart + bought))


def visit_state(shop: Shop, minds: Minds) -> Floats:
    """[B, 6] what V looks at: mood, stage, clicks / 4 on the purpose's category and on its accessories in this
    visit; and, as they were before any click, the mean chances (x 5) of the best six of the one (at stage 0) and
    of the other (at stage 1), without which V would take a shopper who likes the goods for one far advanced."""
    half = shop.settings.categories // 2
    rows = np.arange(len(minds.purpose))
    untouched = minds._replace(clicks=np.zeros_like(minds.clicks), taken=np.full_like(minds.taken, -1))
    chances = []
    for category, stage in ((minds.purpose, 0.0), (minds.purpose + half, 1.0)):
        items = shop.goods.members[category]  # [B, M]
        p = shop.click_probability(untouched._replace(stage=np.full(len(rows), stage)), items)
        best = np.sort(np.where((items >= 0) & shop.available[items], p, 0.0), axis=1)[:, -6:]
        chances.append(5.0 * best.mean(axis=1))
    clicks = [minds.clicks[rows, minds.purpose + side] / 4.0 for side in (0, half)]
    return np.stack([minds.mood, minds.stage, *clicks, *chances], axis=1)


def play(
    shop: Shop, policy: Recommender, slate_size: int, decisions: float = math.inf, end_ms: float = math.inf
) -> Iterator[tuple[Turn, Rows, Outcome]]:
    """Let a policy serve the shop until it has made so many decisions, or event time has come so far; yields turn,
    slates and outcome."""
    served, now = 0, 0
    while served < decisions and now < end_ms:
        turn = shop.next_turn()
        policy.observe(turn.events)
        slates = policy.recommend(shop, turn, slate_size)
        outcome = shop.show(turn, slates)
        policy.observe(outcome.events)
        served += len(turn.shopper)
        now = int(turn.timestamp_ms.min())
        yield turn, slates, outcome


def _value(theta: Floats, *state: Floats) -> Floats:
    """V at these states: a polynomial in the columns of visit_state."""
    total = np.zeros(np.broadcast_shapes(*(x.shape for x in state)))
    for weight, powers in zip(theta, _POWERS, strict=True):
        term: Floats | float = weight
        for x, power in zip(state, powers, strict=True):
            for _ in range(power):
                term = term * x
        total += term
    return total


def _watch(shop: Shop, policy: Recommender, slate_size: int, decisions: int) -> tuple[Floats, Floats]:
    """Pages of whole visits under a policy: [P, 6] the state at each, [P] what the visit was expected to earn from
    there on, this page included."""
    watched = []  # a row for each page: shopper, visit, page, state, reward expected of the page
    served = 0
    while served < decisions:
        turn = shop.next_turn()
        minds = shop.minds(turn.shopper)
        state = visit_state(shop, minds)
        slates = policy.recommend(shop, turn, slate_size)
        reward = expected_reward(shop, minds, slates)
        who = np.stack([turn.shopper, turn.visit, turn.page], axis=1)
        watched.append(np.concatenate([who, state, reward[:, None]], axis=1))
        shop.show(turn, slates)
        served += len(turn.shopper)
    table = np.concatenate(watched)
    table = table[np.lexsort((table[:, 2], table[:, 1], table[:, 0]))]
    over = shop.visits()
    # visits that began late are over only where they were short: leave them all out
    whole = over.start_ms < over.start_ms.max(initial=0) - HOUR_MS
    visit = table[:, 0].astype(np.int64) << 32 | table[:, 1].astype(np.int64)
    counted = np.isin(visit, (over.shopper.astype(np.int64) << 32 | over.visit)[whole])
    return table[counted, 3:-1], _rest_of_visit(table[counted, -1], visit[counted])


def _regress(state: Floats, to_go: Floats) -> Floats:
    """theta: ridge regression of what visits still earned on the terms of V."""
    terms = np.stack([np.prod(state ** np.array(powers), axis=1) for powers in _POWERS], axis=1)
    ridge = 10.0 * np.eye(len(_POWERS))  # stage and clicks rise together: keep their weights small
    return np.asarray(np.linalg.solve(terms.T @ terms + ridge, terms.T @ to_go))


def expected_reward(shop: Shop, minds: Minds, slates: Rows) -> Floats:
    """[B] reward expected of each slate, by the shop's own rules."""
    p = shop.click_probability(minds, slates) * shop.look(slates.shape[1])
    p *= (slates >= 0) & shop.available[slates]
    each = np.take_along_axis(worth(shop, minds.stage), np.maximum(slates, 0), axis=1)
    return np.asarray((p * each).sum(axis=1))


def _rest_of_visit(reward: Floats, visit: Ints) -> Floats:
    """Each page's own reward and that of the pages after it in the same visit; pages stand in order."""
    total = np.cumsum(reward[::-1])[::-1]
    after = np.append(total[1:], 0.0)
    last = np.append(visit[1:] != visit[:-1], True)
    beyond = after[last][np.cumsum(last) - last]  # what belongs to later visits
    return np.asarray(total - beyond)
