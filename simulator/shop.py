"""The simulated shop: shoppers who look around, click what suits them, come to buy, leave bored or come back.

    shop = Shop(ShopSettings(), seed=0)
    turn = shop.next_turn()              # shoppers who now open a page, and what they did until then
    outcome = shop.show(turn, slates)    # slates: [B, K] rows of the catalog -> clicks, carts, and who left

Time is the shop's own: each turn takes the shoppers whose next page is due within `spread_s` of the earliest
one, so events come nearly in order of event time, and many shoppers are served by one call. Purchases and
refunds happen hours later; they come with the turn that first reaches their time.

docs/simulator.md is the ground truth in words; `Mind` holds its numbers. What a shopper will do depends only on
the shopper's lasting tastes, on the visit (purpose, stage, mood, what was clicked) and on luck that is a
pure function of (seed, shopper, visit, page, item): every policy meets the same shoppers on the same days.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from simulator.draws import Keys, keys, uniform
from simulator.goods import DAY_MS, STYLE_DIM, Goods, available, make_goods, season
from streaming.rewards import CODES, RewardTable

VIEW: Final = CODES["view_item"]
CLICK: Final = CODES["select_item"]
CART: Final = CODES["add_to_cart"]
PURCHASE: Final = CODES["purchase"]
REFUND: Final = CODES["refund"]
HOUR_MS: Final = 3_600_000
_IN_FLIGHT: Final = np.iinfo(np.int64).max  # due time of a shopper who waits for a slate

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


class ShopError(ValueError):
    """The shop was asked for something impossible; the message names the value and the allowed range."""


@dataclass(frozen=True)
class Mind:
    """The choice model, in log-odds unless said otherwise. docs/simulator.md explains each term."""

    base: float = -3.65
    purpose: float = 1.65  # the item is of the category that the shopper came for
    accessory: float = 2.6  # x stage: the item is an accessory of it, and the shopper has made progress
    affinity: float = 1.0  # x the shopper's lasting liking of the category, 0..1
    popularity: float = 0.17  # x log Zipf weight
    bait: float = 0.4  # x how much of a bait the item is, 0..1
    style: float = 0.5  # x cosine of the shopper's and the item's style
    price: float = 0.6  # x -|distance of price levels|
    season: float = 0.4  # x season of the category, -1..1
    satiation: float = 0.12  # x -clicks in that category during this visit
    repeat: float = 1.5  # the item was already clicked or bought, as far back as the history goes
    owned: float = 1.0  # the shopper came for a category in which a purchase was made lately
    position: float = 0.12  # slot k is looked at with probability 1 / (1 + position * k)
    cart: float = -3.2  # log-odds of a cart, once clicked ...
    cart_stage: float = 0.4  # ... x stage
    cart_depth: float = 0.6  # ... x depth
    buy: float = -0.9  # log-odds that what is in the cart is bought
    buy_depth: float = 0.5  # ... x depth
    refund: float = 0.04  # probability that a purchase is sent back ...
    refund_bait: float = 0.2  # ... x how much of a bait it is
    leave: float = -2.0  # log-odds to leave after a page, at mood 0
    mood: float = 0.6  # x -mood
    mood_depth: float = 0.2  # what a click adds to the mood, x depth of the item
    mood_fade: float = 0.85  # x mood, at each new page
    stage_click: float = 0.4  # what a click on the purpose adds to the stage (0..1), x depth where positive
    stage_view: float = 0.08  # the same for an unaided view
    stage_owned: float = 0.6  # stage at the start where the purpose's category is owned
    wander: float = 0.45  # probability to go on unaided after a page without a click


@dataclass(frozen=True)
class ShopSettings:
    """How large the shop is and how its days go."""

    items: int = field(default=1000, metadata={"help": "items in the catalog, 40..1000000"})
    categories: int = field(
        default=20, metadata={"help": "categories, even, 2..items/2: half of them accessories"}
    )
    brands: int = field(default=40, metadata={"help": "brands, 1..items"})
    shoppers: int = field(default=3000, metadata={"help": "returning shoppers, 1..1000000"})
    history_length: int = field(
        default=32, metadata={"help": "history entries the storefront keeps, 1..1000"}
    )
    start_ms: int = field(
        default=1_767_571_200_000, metadata={"help": "event time of the first day, ms since 1970"}
    )
    return_after_h: float = field(default=9.0, metadata={"help": "mean hours between two visits, > 4"})
    max_pages: int = field(default=25, metadata={"help": "longest visit in pages, 1..25"})
    spread_s: float = field(
        default=300.0, metadata={"help": "event-time span of one turn in seconds, 0..600"}
    )
    new_items: float = field(
        default=0.06, metadata={"help": "share of items released in the first 10 days, 0..1"}
    )
    stock_outs: float = field(
        default=0.02, metadata={"help": "share of items out of stock at any time, 0..1"}
    )
    season_days: float = field(default=28.0, metadata={"help": "days from high season to high season, > 0"})
    mind: Mind = Mind()

    def __post_init__(self) -> None:
        checks = {
            "items": (self.items, 40, 1_000_000),
            "categories": (self.categories, 2, self.items // 2),
            "brands": (self.brands, 1, self.items),
            "shoppers": (self.shoppers, 1, 1_000_000),
            "history_length": (self.history_length, 1, 1000),
            "start_ms": (self.start_ms, 946_684_800_000, 4_000_000_000_000),
            "return_after_h": (self.return_after_h, 4.0, 10_000.0),
            "max_pages": (self.max_pages, 1, 25),
            "spread_s": (self.spread_s, 0.0, 600.0),
            "new_items": (self.new_items, 0.0, 1.0),
            "stock_outs": (self.stock_outs, 0.0, 1.0),
            "season_days": (self.season_days, 0.01, 10_000.0),
        }
        for name, (value, low, high) in checks.items():
            if not low <= value <= high:
                raise ShopError(f"{name} must be within {low}..{high}, not {value}")
        if self.categories % 2:
            raise ShopError(
                f"categories must be even (each main one has its accessories), not {self.categories}"
            )


class Events(NamedTuple):
    """E things that shoppers did, in order of event time."""

    timestamp_ms: Ints  # [E]
    shopper: Rows  # [E]
    visit: Rows  # [E] number of the shopper's visit in which it began
    name: npt.NDArray[np.uint8]  # [E] event-name code
    item: Rows  # [E] row of the catalog
    decision: Ints  # [E] the Turn.decision that it came of, -1: none
    slot: Rows  # [E] position in that slate, -1: none

    def __len__(self) -> int:  # rows, not fields
        return len(self.timestamp_ms)


_NONE: Final = np.zeros(0, np.int32)
NO_EVENTS: Final = Events(
    _NONE.astype(np.int64), _NONE, _NONE, _NONE.astype(np.uint8), _NONE, _NONE.astype(np.int64), _NONE
)


class History(NamedTuple):
    """What B shoppers did lately, newest entry FIRST, padded at the end."""

    item: Rows  # [B, H] row of the catalog; -1: padding
    name: npt.NDArray[np.uint8]  # [B, H] event-name code; 0: padding
    timestamp_ms: Ints  # [B, H] 0: padding
    value: npt.NDArray[np.float32]  # [B, H] price, 0: padding


class Minds(NamedTuple):
    """All that bears on what B shoppers do next, luck apart."""

    affinity: Floats  # [B, C] lasting liking of each category, 0..1
    style: Floats  # [B, 6] lasting taste, unit length
    level: Floats  # [B] lasting price level
    purpose: Rows  # [B] main category that this visit is for
    owned: Bools  # [B] something of that category was bought lately
    stage: Floats  # [B] progress towards a choice in that category, 0..1
    mood: Floats  # [B] -1.5..1.5
    clicks: npt.NDArray[np.int16]  # [B, C] clicks during this visit
    taken: Rows  # [B, H] rows of the catalog clicked or bought lately; -1: something else


class Turn(NamedTuple):
    """B shoppers who each open a page that wants a slate."""

    decision: Ints  # [B] running number of the slate asked for
    shopper: Rows  # [B]
    visit: Rows  # [B] the shopper's visits count from 0
    page: Rows  # [B] pages of a visit count from 0
    timestamp_ms: Ints  # [B] event time of the request
    history: History
    available: Bools  # [N] what is released and in stock
    events: Events  # what happened before these requests (by anybody) and is not reported yet


class Outcome(NamedTuple):
    """What B slates of K items led to."""

    events: Events  # clicks and carts
    clicked: Bools  # [B, K]
    reward: Floats  # [B, K] of each slot, with what will yet be bought and sent back because of it
    ended: Bools  # [B] the visit is over


class Visits(NamedTuple):
    """V visits that are over, by shopper and number: the white-box ledger. Purchases and refunds are entered
    when they are resolved upon, so that a visit's account does not wait for days."""

    shopper: Rows  # [V]
    visit: Rows  # [V]
    start_ms: Ints  # [V] event time of the first request
    decisions: Ints  # [V]
    impressions: Ints  # [V]
    clicks: Ints  # [V]
    carts: Ints  # [V]
    purchases: Ints  # [V]
    refunds: Ints  # [V]
    reward: Floats  # [V] of all that recommendations led to


# what will happen later: event time, tie-break, shopper, visit, name, item, decision, slot
_Deed = tuple[int, int, int, int, int, int, int, int]
_LEDGER: Final = ("decisions", "impressions", "clicks", "carts", "purchases", "refunds", "reward")
# What a draw is for; with the page's key it names the draw.
(
    _PURPOSE,
    _OPENING,
    _GAP,
    _LEAVE,
    _DWELL,
    _WANDER,
    _CLICK_DRAW,
    _CART_DRAW,
    _BUY,
    _BUY_DELAY,
    _REFUND,
    _REFUND_DELAY,
) = range(12)


class Shop:
    """One simulated shop with its shoppers; `next_turn` and `show` alternate (several turns may be out at once)."""

    def __init__(
        self, settings: ShopSettings, seed: int, rewards: RewardTable | None = None, luck: int | None = None
    ) -> None:
        """seed: catalog and tastes, and all luck unless `luck` gives it another seed of its own.

        rewards: what the ledger counts; the default table where None.
        """
        self.settings = settings
        self.seed = seed
        self.luck = seed if luck is None else luck
        self.mind = settings.mind
        self.rewards = rewards or RewardTable()
        rng = np.random.default_rng([seed, 1])
        s = settings
        self.goods: Goods = make_goods(s.items, s.categories, s.brands, s.new_items, s.start_ms, rng)
        self.item_ids = self.goods.item_id
        n, mains = s.shoppers, s.categories // 2
        # lasting tastes
        liking = rng.gumbel(size=(n, mains)) * 1.2 - 0.5 * np.log1p(np.arange(mains))
        self.favourite = _softmax(liking)  # [S, mains] how often each is what a visit is for
        self.affinity = np.zeros((n, s.categories))  # [S, C] in 0..1; accessories follow the stage instead
        self.affinity[:, :mains] = self.favourite / self.favourite.max(axis=1, keepdims=True)
        style = rng.standard_normal((n, STYLE_DIM))
        self.style = style / np.linalg.norm(style, axis=1, keepdims=True)  # [S, 6]
        self.level = 0.45 * rng.standard_normal(n)  # [S] price level
        # the visit
        self.purpose = np.zeros(n, dtype=np.int32)  # [S] main category
        self.stage = np.zeros(n)  # [S] in 0..1
        self.mood = np.zeros(n)  # [S]
        self.clicks = np.zeros((n, s.categories), dtype=np.int16)  # [S, C]
        self.owned = np.zeros(n, dtype=np.bool_)  # [S] something of the purpose's category was bought lately
        self._visit = np.zeros(n, dtype=np.int32)
        self._page = np.zeros(n, dtype=np.int32)
        self._clicked_last = np.zeros(n, dtype=np.bool_)
        self._start = (
            self._first_visits()
        )  # of the visit, in even time: before `_warp` makes days and nights of it
        self._due = _warp(self._start, s.start_ms)
        self._opened = self._due.copy()  # event time of the visit's first page
        self._ledger = np.zeros((n, len(_LEDGER)))
        self._closed: list[tuple[npt.NDArray[np.generic], ...]] = []
        # the storefront's memory of each shopper: a ring
        h = s.history_length
        self._item = np.full((n, h), -1, dtype=np.int32)
        self._name = np.zeros((n, h), dtype=np.uint8)
        self._when = np.zeros((n, h), dtype=np.int64)
        self._seen = np.zeros(n, dtype=np.int64)  # entries ever written
        self._pending: list[_Deed] = []
        self._pushed = 0
        self._decisions = 0
        self._hour = -1
        self._available = np.zeros(s.items, dtype=np.bool_)
        self._season = np.zeros(s.categories)

    # -- the two calls -------------------------------------------------------------------------------------

    def next_turn(self, limit: int = 256, spread_s: float | None = None) -> Turn:
        """The next shoppers, at most `limit`, who open a page; each of them then waits for `show`.

        spread_s: event-time span of this turn in seconds; None: the settings'.
        Raises: ShopError when every shopper waits for a slate already.
        """
        now = self._next_due_ms()
        self._look_at_the_clock(now)
        spread = self.settings.spread_s if spread_s is None else spread_s
        due = np.flatnonzero(self._due <= now + int(spread * 1000))
        if len(due) > limit:
            due = np.sort(due[np.argpartition(self._due[due], limit)[:limit]])
        return self._open(due, self._release(now))

    def next_visit(self) -> Turn:
        """The first page of the visit that is due first; its shopper then waits for `show`, and for `next_page`.

        So visits are played one after another, each to its end, though in event time they overlap: who comes when,
        and for what, is the same. The events are everybody's until then. Raises: ShopError as next_turn does.
        """
        now = self._next_due_ms()
        self._look_at_the_clock(now)
        return self._open(np.array([self._due.argmin()]), self._release(now))

    def next_page(self, shopper: int) -> Turn:
        """The next page of the visit that this shopper is on; events are this shopper's own.

        Raises: ShopError when there is no such visit, or it waits for a slate already.
        """
        now = int(self._due[shopper])
        if now == _IN_FLIGHT or not self._page[shopper]:
            raise ShopError(f"shopper {shopper} is not between two pages of a visit")
        self._look_at_the_clock(now)
        return self._open(np.array([shopper]), self._release(now, shopper))

    def _next_due_ms(self) -> int:
        now = int(self._due.min())
        if now == _IN_FLIGHT:
            raise ShopError("every shopper waits for a slate; show the turns that are out first")
        return now

    def _open(self, due: Ints, late: Events) -> Turn:
        """A page for each of these shoppers; late: what happened meanwhile and is not remembered yet."""
        when = self._due[due]
        self._remember(late)
        fresh = self._page[due] == 0
        self._begin_visits(due[fresh])
        unaided = self._unaided_views(due, when, fresh)
        self._remember(unaided)
        self._due[due] = _IN_FLIGHT
        decision = self._decisions + np.arange(len(due))
        self._decisions += len(due)
        return Turn(
            decision=decision,
            shopper=due.astype(np.int32),
            visit=self._visit[due],
            page=self._page[due],
            timestamp_ms=when,
            history=self.history(due),
            available=self._available,
            events=in_order(late, unaided),
        )

    def show(self, turn: Turn, slates: npt.NDArray[np.integer]) -> Outcome:
        """What the turn's shoppers do with their slates: [B, K] rows of the catalog, -1 leaves a slot empty.

        Slots are independent: each is looked at with a probability that falls with its position, then
        clicked with the item's own. An item that is out of stock is never clicked. Raises: ShopError.
        """
        slate = np.asarray(slates, dtype=np.int32)
        if slate.ndim != 2 or len(slate) != len(turn.shopper):
            raise ShopError(f"slates must be [{len(turn.shopper)}, K], not {list(slate.shape)}")
        if slate.size and not -1 <= slate.min() <= slate.max() < len(self.item_ids):
            raise ShopError(
                f"slates hold rows of the catalog, -1..{len(self.item_ids) - 1}, not {slate.max()}"
            )
        s = turn.shopper
        page = self._page_keys(s)
        clicked = self._clicked(turn, slate, page)
        events, reward = self._consequences(turn, slate, clicked, page)
        self._remember(events)
        self._feel(s, slate, clicked)
        self._enter(s, slate, clicked)
        ended = self._turn_the_page(turn, page)
        return Outcome(events, clicked, reward, ended)

    def rest(self) -> Events:
        """The purchases and refunds that are still to come, for a log that ends here."""
        return self._release(_IN_FLIGHT)

    # -- the white box (the oracle and the tests look in here; a learner must not) -----------------------------

    def minds(self, shopper: npt.NDArray[np.integer]) -> Minds:
        """The state of these shoppers' minds: the truth."""
        name = self._name[shopper]
        return Minds(
            affinity=self.affinity[shopper],
            style=self.style[shopper],
            level=self.level[shopper],
            purpose=self.purpose[shopper],
            owned=self.owned[shopper],
            stage=self.stage[shopper],
            mood=self.mood[shopper],
            clicks=self.clicks[shopper],
            taken=np.where((name == CLICK) | (name == PURCHASE), self._item[shopper], np.int32(-1)),
        )

    def click_probability(self, minds: Minds, items: Rows | None = None) -> Floats:
        """[B, K] probability that each item, once looked at, is clicked now; items: [B, K], or None: the catalog.

        sigmoid(base + what the item pulls + what its category means to the shopper now + style + price - repeat)
        """
        m, g = self.mind, self.goods
        rows = np.arange(len(minds.purpose))[:, None]
        purpose = minds.purpose[:, None]
        accessories = purpose + self.settings.categories // 2
        of_category = m.affinity * minds.affinity + m.season * self._season - m.satiation * minds.clicks
        of_category[rows, purpose] += m.purpose - m.owned * minds.owned[:, None]
        of_category[rows, accessories] += m.accessory * minds.stage[:, None]
        pull = m.base + m.popularity * g.popularity + m.bait * np.maximum(-g.depth, 0.0)  # [N]
        if items is None:
            logits = pull + of_category[:, g.category] + m.style * (minds.style @ g.style.T)
            logits -= m.price * np.abs(g.level - minds.level[:, None])
        else:
            logits = pull[items] + of_category[rows, g.category[items]]
            logits += m.style * np.einsum("bd,bkd->bk", minds.style, g.style[items])
            logits -= m.price * np.abs(g.level[items] - minds.level[:, None])
        return _sigmoid(logits - m.repeat * self._taken(minds, items))

    def look(self, slots: int) -> Floats:
        """[K] probability that each slot is looked at."""
        return np.asarray(1.0 / (1.0 + self.mind.position * np.arange(slots)), dtype=np.float64)

    def cart_probability(self, stage: Floats, items: Rows | None = None) -> Floats:
        """[B, K] probability that an item goes into the cart once it was clicked; items as in click_probability.

        stage: anything that broadcasts against the items."""
        depth = self.goods.depth if items is None else self.goods.depth[items]
        return _sigmoid(self.mind.cart + self.mind.cart_stage * stage + self.mind.cart_depth * depth)

    def buy_probability(self) -> Floats:
        """[N] probability that an item is bought once it is in the cart."""
        return _sigmoid(self.mind.buy + self.mind.buy_depth * self.goods.depth)

    def refund_probability(self) -> Floats:
        """[N] probability that an item is sent back once it was bought."""
        return self.mind.refund + self.mind.refund_bait * np.maximum(-self.goods.depth, 0.0)

    def leave_probability(self, mood: Floats) -> Floats:
        """Probability that a shopper of this mood leaves after the page."""
        return _sigmoid(self.mind.leave - self.mind.mood * mood)

    @property
    def available(self) -> Bools:
        """[N] what is released and in stock as of the last turn."""
        return self._available

    def history(self, shopper: npt.NDArray[np.integer]) -> History:
        """What the storefront remembers of each shopper."""
        h = self.settings.history_length
        at = (self._seen[shopper][:, None] - 1 - np.arange(h)) % h  # [B, H]
        rows = np.asarray(shopper)[:, None]
        item = self._item[rows, at]
        value = np.where(item >= 0, self.goods.price[item], 0.0).astype(np.float32)
        return History(item, self._name[rows, at], self._when[rows, at], value)

    def visits(self) -> Visits:
        """The account of every visit that is over."""
        nothing = np.zeros(0, dtype=np.int64)
        empty = (nothing.astype(np.int32), nothing.astype(np.int32), nothing, np.zeros((0, len(_LEDGER))))
        shopper, visit, start, ledger = (
            np.concatenate(column) for column in zip(empty, *self._closed, strict=True)
        )
        order = np.lexsort((visit, shopper))
        count = ledger[order].astype(np.int64)
        return Visits(
            shopper=shopper[order],
            visit=visit[order],
            start_ms=start[order],
            decisions=count[:, 0],
            impressions=count[:, 1],
            clicks=count[:, 2],
            carts=count[:, 3],
            purchases=count[:, 4],
            refunds=count[:, 5],
            reward=ledger[order, 6],
        )

    # -- a page ------------------------------------------------------------------------------------------------

    def _page_keys(self, shopper: npt.NDArray[np.integer]) -> Keys:
        """[B] keys that name all luck on the page that each shopper is on."""
        return keys(self.luck, 3, shopper, self._visit[shopper], self._page[shopper])

    def _clicked(self, turn: Turn, slate: Rows, page: Keys) -> Bools:
        """[B, K] which slots are clicked. The luck belongs to the item, whatever slot it stands in."""
        possible = (slate >= 0) & turn.available[slate]
        p = self.click_probability(self.minds(turn.shopper), slate) * self.look(slate.shape[1])
        clicked = possible & (uniform(page[:, None], _CLICK_DRAW, slate) < p)
        for k in range(1, slate.shape[1]):  # an item shown twice can be clicked once
            clicked[:, k] &= (slate[:, :k] != slate[:, k : k + 1]).all(axis=1)
        return clicked

    def _consequences(self, turn: Turn, slate: Rows, clicked: Bools, page: Keys) -> tuple[Events, Floats]:
        """Clicks and carts as events; purchases and refunds are put off. Also [B, K] what each slot earned."""
        if not clicked.any():
            return NO_EVENTS, np.zeros(slate.shape)
        row, slot = np.nonzero(clicked)
        item, shopper, luck = slate[row, slot], turn.shopper[row], page[row]
        order = np.cumsum(clicked, axis=1)[row, slot]  # the first click comes first
        # all within 18 s, for the next page opens after 20 s at the earliest
        click_ms = turn.timestamp_ms[row] + 2000 + 15_000 * order // slate.shape[1]
        cart = uniform(luck, _CART_DRAW, item) < self.cart_probability(self.stage[shopper], item)
        buy = cart & (uniform(luck, _BUY, item) < self.buy_probability()[item])
        refund = buy & (uniform(luck, _REFUND, item) < self.refund_probability()[item])
        buy_ms = click_ms + 60_000 + _delay_ms(uniform(luck, _BUY_DELAY, item), 3.0)
        refund_ms = buy_ms + HOUR_MS + _delay_ms(uniform(luck, _REFUND_DELAY, item), 6.0)
        weight, value_weight = self.rewards.columns()
        price = self.goods.price[item]
        worth = weight[CLICK] + value_weight[CLICK] * price
        for happens, name in ((cart, CART), (buy, PURCHASE), (refund, REFUND)):
            worth += happens * (weight[name] + value_weight[name] * price)
        reward = np.zeros(slate.shape)
        reward[row, slot] = worth
        for column, happens in ((3, cart), (4, buy), (5, refund)):
            np.add.at(self._ledger[:, column], shopper, happens)
        np.add.at(self._ledger[:, 6], shopper, worth)

        deeds = Events(
            click_ms,
            shopper,
            turn.visit[row],
            np.full(len(row), CLICK, dtype=np.uint8),
            item,
            turn.decision[row],
            slot.astype(np.int32),
        )
        self._put_off(picked(_renamed(deeds, PURCHASE, buy_ms), buy))
        self._put_off(picked(_renamed(deeds, REFUND, refund_ms), refund))
        return in_order(deeds, picked(_renamed(deeds, CART, click_ms + 1000), cart)), reward

    def _put_off(self, events: Events) -> None:
        """Keep what will happen later."""
        for when, *deed in zip(*(column.tolist() for column in events), strict=True):
            heapq.heappush(self._pending, (when, self._pushed, *deed))
            self._pushed += 1

    def _feel(self, shopper: Rows, slate: Rows, clicked: Bools) -> None:
        """Move mood, stage and satiation by what was clicked."""
        m, g = self.mind, self.goods
        row, slot = np.nonzero(clicked)
        item, who = slate[row, slot], shopper[row]
        self.mood[shopper] *= m.mood_fade
        np.add.at(self.mood, who, m.mood_depth * g.depth[item])
        np.clip(self.mood, -1.5, 1.5, out=self.mood)
        on_purpose = g.category[item] == self.purpose[who]
        np.add.at(self.stage, who, m.stage_click * on_purpose * np.maximum(g.depth[item], 0.0))
        np.minimum(self.stage, 1.0, out=self.stage)
        np.add.at(self.clicks, (who, g.category[item]), 1)
        self._clicked_last[shopper] = clicked.any(axis=1)

    def _enter(self, shopper: Rows, slate: Rows, clicked: Bools) -> None:
        """Enter the page into the ledger."""
        self._ledger[shopper, 0] += 1
        self._ledger[shopper, 1] += (slate >= 0).sum(axis=1)
        self._ledger[shopper, 2] += clicked.sum(axis=1)

    def _turn_the_page(self, turn: Turn, page: Keys) -> Bools:
        """Who leaves ([B]); the others' next page, and the leavers' next visit, become due."""
        s = turn.shopper
        leaves = uniform(page, _LEAVE) < self.leave_probability(self.mood[s])
        leaves |= turn.page + 1 >= self.settings.max_pages
        self._due[s] = turn.timestamp_ms + 20_000 + (40_000 * uniform(page, _DWELL)).astype(np.int64)
        self._page[s] += 1
        gone = s[leaves]
        if len(gone):
            self._closed.append((gone, self._visit[gone], self._opened[gone], self._ledger[gone]))
            self._ledger[gone] = 0.0
            self._visit[gone] += 1
            self._page[gone] = 0
            pause = uniform(self.luck, 4, gone, self._visit[gone], _GAP)
            mean_h = self.settings.return_after_h - 3.0
            self._start[gone] += 3 * HOUR_MS + (-np.log(pause) * mean_h * HOUR_MS).astype(np.int64)
            self._due[gone] = self._opened[gone] = _warp(self._start[gone], self.settings.start_ms)
        return leaves

    # -- a visit -------------------------------------------------------------------------------------------------

    def _first_visits(self) -> Ints:
        luck = uniform(self.luck, 4, np.arange(self.settings.shoppers), _GAP)
        return self.settings.start_ms + (luck * self.settings.return_after_h * HOUR_MS).astype(np.int64)

    def _begin_visits(self, shopper: Ints) -> None:
        """Choose what each comes for, and forget the last visit."""
        if not len(shopper):
            return
        mains = self.settings.categories // 2
        luck = uniform(self._page_keys(shopper), _PURPOSE)
        weight = self.favourite[shopper] * np.exp(self.mind.season * self._season[:mains])
        share = np.cumsum(weight, axis=1)
        self.purpose[shopper] = (luck[:, None] * share[:, -1:] > share).sum(axis=1)
        past = self.history(shopper)
        bought = (past.name == PURCHASE) & (self.goods.category[past.item] == self.purpose[shopper][:, None])
        self.owned[shopper] = bought.any(axis=1)
        self.stage[shopper] = self.mind.stage_owned * self.owned[shopper]
        self.mood[shopper] = 0.0
        self.clicks[shopper] = 0

    def _unaided_views(self, due: Ints, when: Ints, fresh: Bools) -> Events:
        """Where shoppers went on their own before this page: two or three views open a visit; later a view
        may follow a page that got no click."""
        page = self._page_keys(due)
        luck = uniform(page, _WANDER)
        views = np.where(
            fresh, 2 + (2 * luck).astype(np.int64), ~self._clicked_last[due] & (luck < self.mind.wander)
        )
        if not views.any():
            return NO_EVENTS
        row = np.repeat(np.arange(len(due)), views)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(views) - views, views)  # 0, 1, .. within a row
        item = self._choose_unaided(due[row], keys(page[row], _OPENING, nth))
        shopper = due[row]
        on_purpose = (self.goods.category[item] == self.purpose[shopper]) & (item >= 0)
        depth = np.maximum(self.goods.depth[item], 0.0)
        np.add.at(self.stage, shopper, self.mind.stage_view * on_purpose * depth)
        np.minimum(self.stage, 1.0, out=self.stage)
        times = when[row] - 8000 * (views[row] - nth) + 4000
        none = np.full(len(row), -1)
        found = item >= 0
        views_seen = Events(
            times,
            shopper.astype(np.int32),
            self._visit[shopper],
            np.full(len(row), VIEW, dtype=np.uint8),
            item,
            none.astype(np.int64),
            none.astype(np.int32),
        )
        return in_order(picked(views_seen, found))

    def _choose_unaided(self, shopper: Ints, luck: Keys) -> Rows:
        """[B] the item each goes to unaided: mostly of the purpose, later its accessories, else a favourite
        category; within it by popularity, style and price (-1 where nothing of it is in stock)."""
        g, mains = self.goods, self.settings.categories // 2
        category = self.purpose[shopper].copy()
        kind = uniform(luck, 1)
        category += mains * (kind < 0.5 * self.stage[shopper]).astype(np.int32)
        stray = kind > 0.92
        share = np.cumsum(self.favourite[shopper], axis=1)
        category[stray] = (uniform(luck, 2)[:, None] > share).sum(axis=1).clip(max=mains - 1)[stray]
        choice = g.members[category]  # [B, M]
        score = g.popularity[choice] + 3.0 * np.einsum("bd,bmd->bm", self.style[shopper], g.style[choice])
        score -= 2.0 * np.abs(g.level[choice] - self.level[shopper][:, None])
        score -= np.log(
            -np.log(uniform(luck[:, None], 3, choice))
        )  # Gumbel: the maximum is a draw by exp(score)
        score[(choice < 0) | ~self._available[choice]] = -np.inf
        best = score.argmax(axis=1)
        rows = np.arange(len(shopper))
        return np.where(np.isfinite(score[rows, best]), choice[rows, best], -1).astype(np.int32)

    # -- the clock and the memory -----------------------------------------------------------------------------------

    def _look_at_the_clock(self, now_ms: int) -> None:
        """Bring stock and season up to date, once in an hour of event time."""
        if now_ms // HOUR_MS != self._hour:
            self._hour = now_ms // HOUR_MS
            s = self.settings
            self._available = available(self.goods, self.seed, now_ms, s.stock_outs)
            self._season = season(s.categories, now_ms, s.start_ms, s.season_days)

    def _release(self, now_ms: int, shopper: int | None = None) -> Events:
        """Purchases and refunds whose time has come; of this shopper alone, where one is given."""
        out: list[_Deed] = []
        others: list[_Deed] = []
        if not self._pending or self._pending[0][0] > now_ms:
            return NO_EVENTS
        while self._pending and self._pending[0][0] <= now_ms:
            deed = heapq.heappop(self._pending)
            (out if shopper in (None, deed[2]) else others).append(deed)
        for deed in others:
            heapq.heappush(self._pending, deed)
        table = np.array(out, dtype=np.int64).reshape(len(out), 8)
        return Events(
            table[:, 0],
            table[:, 2].astype(np.int32),
            table[:, 3].astype(np.int32),
            table[:, 4].astype(np.uint8),
            table[:, 5].astype(np.int32),
            table[:, 6],
            table[:, 7].astype(np.int32),
        )

    def _remember(self, events: Events) -> None:
        """Write events into the rings, each shopper's in their order."""
        if not len(events):
            return
        by = np.argsort(events.shopper, kind="stable")
        who = events.shopper[by]
        first = np.searchsorted(who, who)  # where each shopper's run begins
        at = (self._seen[who] + np.arange(len(who)) - first) % self.settings.history_length
        self._item[who, at] = events.item[by]
        self._name[who, at] = events.name[by]
        self._when[who, at] = events.timestamp_ms[by]
        np.add.at(self._seen, who, 1)

    def _taken(self, minds: Minds, items: Rows | None) -> Bools:
        """[B, K] whether each item was clicked or bought lately."""
        if items is not None:
            among: Bools = (items[:, :, None] == minds.taken[:, None, :]).any(axis=2)
            return among & (items >= 0)
        marks = np.zeros(
            (len(minds.taken), len(self.item_ids) + 1), dtype=np.bool_
        )  # the last column takes -1
        marks[np.arange(len(marks))[:, None], minds.taken] = True
        return marks[:, :-1]


def _sigmoid(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-x))


def _softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def _delay_ms(luck: Floats, mean_h: float) -> Ints:
    """An exponential delay, cut at 20 hours."""
    return (np.minimum(-np.log(luck) * mean_h, 20.0) * HOUR_MS).astype(np.int64)


def _warp(time_ms: Ints, start_ms: int) -> Ints:
    """Bend even time so that evenings are three times as busy as early mornings; order and the start are kept.

    t' = t + a (sin 2 pi (t - .3) + sin .6 pi) / 2 pi in days, a = 0.5: density 1 / (1 + a cos 2 pi (t - .3)).
    """
    day = (time_ms - start_ms) / DAY_MS
    bent = day + 0.5 * (np.sin(2 * np.pi * (day - 0.3)) + np.sin(0.6 * np.pi)) / (2 * np.pi)
    return np.asarray(start_ms + (bent * DAY_MS).astype(np.int64))


def picked(events: Events, rows: npt.NDArray[np.generic]) -> Events:
    """The events at these rows (a mask or an index)."""
    return Events(*(column[rows] for column in events))


def _renamed(events: Events, name: int, timestamp_ms: Ints) -> Events:
    """The same shoppers and items, another deed at other times."""
    names = np.full(len(events), name, dtype=np.uint8)
    # not `_replace`: it asks len() for the number of fields
    return Events(
        timestamp_ms, events.shopper, events.visit, names, events.item, events.decision, events.slot
    )


def joined(*parts: Events) -> Events:
    """All events, one part after another."""
    parts = tuple(part for part in parts if len(part)) or (NO_EVENTS,)
    return Events(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def in_order(*parts: Events) -> Events:
    """All events, by event time."""
    together = joined(*parts)
    return picked(together, np.argsort(together.timestamp_ms, kind="stable"))
