"""The Q-network: one state encoder and one item tower, for training and for serving alike.

What is put before a shopper acts only if the shopper chooses it, so that Q splits as in SlateQ (Ie et al. 2019,
equations 11-15, there for slates and here for single slots too):

    Q(s, a) = γ V0(s) + p(s, a) · [m(s, a) + γ g(s, a)]

    p(s, a)  choice: probability that a, shown in s, earns anything at all (a click, a purchase, ...)
    m(s, a)  what it then earns, at once
    V0(s)    value of where the visit stands next if nothing is chosen: the mean of `quantiles` of its distribution;
             read from φ(s) and from plain sums over the history, which tell how far the visit has come
    g(s, a)  how much more that value is if a is chosen: what planning adds to greed
    n(s)     with `centred`, beside Q: how much more is to come where a choice was likelier, made or not. Who is shown
             what they like chooses more often, and does better anyway; without n, g takes that for what choosing does
             (choices given their probability say what they do: Robinson 1988, Rosenbaum & Rubin 1983)

This is a dueling network (Wang et al. 2016, equation 7) whose advantage is p · (m + γ g), and Q = R + γ C with
R = p m. At the fixed point of the Bellman equation it is exact wherever reward and next state depend on what was
shown through what was chosen (SlateQ's RTDS assumption). Why not one unstructured Q: only a few slots in a hundred
are chosen, so a regression on returns drowns in the noise of all the others, while each factor here is learnt from
just the rows that speak of it. And a step without a recommender is a choice of known outcome: it teaches m, g and
the organic head, which is p's prior.

The log-odds of p are what the user goes to unaided, and how items answer otherwise than that tells (learner.response, a
Bayesian last layer, with a leaning of the state to choose at all). What they go to unaided is told by an encoder and
by the ways that others went from there (learner.recall):

    z(s, a) = β · organic(s, a) + ρ · log(1 + SCALE · ways(s, a)) + response(s, a) + lean(s)

and logit p = z; or, with `stack`, what they come to once they are set right by what came of slots foretold by them
(learner.stacking):

    logit p(s, a) = c + κ z(s, a) + ω √share(s, a) + level_a + θ · (x_a - x̄) + Σ_j answer_{j a} √share(s, j)

The encoder and the tower learn from choices alone, on slates and unaided; the heads of reward and continuation read
them as they are (no gradient), since returns are far noisier than choices.

Every head is an inner product of a query made from the state and a key made from the item: all items are scored
by one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from learner.answers import Pulls
from learner.entries import (
    AGES,
    COUNTS,
    KINDS,
    NAMES,
    PLACE_BOUNDS,
    PLACES,
    SESSION_AGES,
    Entries,
    StateTensors,
    entries_of,
    kinds_of,
    place_buckets,
)
from learner.feature_levels import MOST_IN_VECTOR
from learner.recall import Recall, Recalled
from learner.response import SMALLEST, Response
from learner.shares import shares
from learner.stacking import Stack
from streaming.rewards import CODES

MAX_SLOTS: Final = 32  # positions beyond share the last position's bias


@dataclass(frozen=True)
class NetworkSettings:
    """The network's shape. It travels in the weights' manifest, so that a server rebuilds what was trained."""

    dim: int = 32  # d: item vectors and queries
    channels: int = 8  # ways to weigh a history by event type, recency and place
    hidden: int = 64
    value_dim: int = 2  # inner products of the reward and continuation heads
    history_length: int = 32  # H
    vector_dim: int = 32  # dense catalog features
    category_buckets: int = 1024  # hashed
    brand_buckets: int = 1024  # hashed
    quantiles: int = 1  # of V0; 1: its mean alone
    gamma: float = 0.97
    centred: bool = True  # heads of value read φ and ψ centred and of unit size
    recall: bool = True  # learner.recall remembers where users went
    stack: bool = True  # choice is set right by learner.stacking
    dueling: bool = True  # V0 is of the state; else one number for all

    def __post_init__(self) -> None:
        for size in fields(self):
            value = getattr(self, size.name)
            if size.type == "int" and not 1 <= value <= 1_000_000:
                raise ValueError(f"network setting {size.name}={value}: must be a whole number in 1..1000000")
        if not 0.0 <= self.gamma < 1.0:
            raise ValueError(f"network setting gamma={self.gamma}: must be in [0, 1)")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Of a manifest; keys that are not ours are somebody else's."""
        return cls(**{name: settings[name] for name in cls.__dataclass_fields__ if name in settings})


class ItemTensors(NamedTuple):
    """Catalog features of N items; row i describes vocabulary id i, row 0 the unknown item."""

    category: Tensor  # [N] int64 bucket, 0 unknown
    brand: Tensor  # [N] int64 bucket, 0 unknown
    price: Tensor  # [N] float32, as `price_levels` has it
    vector: Tensor  # [N, vector_dim] float32
    seen: Tensor  # [N] bool: has a row of its own by now; others share the "new item" vector


def unknown_items(count: int, vector_dim: int, device: torch.device | str = "cpu") -> ItemTensors:
    """Items of which nothing is known."""
    nothing = torch.zeros(count, dtype=torch.int64, device=device)
    return ItemTensors(
        nothing,
        nothing.clone(),
        torch.full((count,), NO_PRICE, device=device),
        torch.zeros(count, vector_dim, device=device),
        torch.zeros(count, dtype=torch.bool, device=device),
    )


class Shelf(NamedTuple):
    """N items before any head looks at them."""

    tower: Tensor  # [N, d] ψ(a)
    bias: Tensor  # [N] by id, of organic interest
    own: Tensor  # [N, d + 1] by id, of learner.response
    level: Tensor  # [N] of learner.stacking: by id, and by what the vector says
    category: Tensor  # [N] int64 bucket, 0 unknown


class Keys(NamedTuple):
    """What the heads need to know of N items; v' = v + 2."""

    tower: Tensor  # [N, d] ψ(a)
    organic: Tensor  # [N, d + 1]
    choice: Tensor  # [N, d + 2] of z
    level: Tensor  # [N] beside it
    gain: Tensor  # [N, 2v'] reward, then continuation
    category: Tensor  # [N] int64 bucket, 0 unknown


class Query(NamedTuple):
    """One head's view of B states.

    score(s, a) = vector(s) · key(a) + Σ_h copy[h] [history item h is a] + Σ_h alike[h] [it is of a's category]
                  + trust · log(1 + SCALE · ways(s, a))        (learner.recall)
                  + what else histories add                    (learner.answers)
    """

    vector: Tensor  # [B, D]
    copy: Tensor  # [B, H] weights on the history's own items
    item: Tensor  # [B, H]
    alike: Tensor  # [B, H] weights on items of the history's categories
    category: Tensor  # [B, H]
    recalled: Recalled | None
    trust: Tensor  # a number
    answers: Pulls | None = None
    buckets: int = (
        0  # of categories; 0: those that are met, which is quicker where to ask for them costs nothing
    )

    def rows(self, which: Tensor | slice) -> Query:
        """The view of these states."""
        vector, copy, item, alike, category = (column[which] for column in self[:5])
        recalled = None if self.recalled is None else self.recalled.rows(which)
        answers = None if self.answers is None else self.answers.rows(which)
        return Query(vector, copy, item, alike, category, recalled, self.trust, answers, self.buckets)


class Reading(NamedTuple):
    """What B states say, whichever network reads them."""

    entries: Entries | None  # None: not counted yet
    recalled: Recalled | None
    answers: Pulls | None


class Queries(NamedTuple):
    """All heads' views of B states."""

    organic: Query
    choice: Query  # of z
    answers: Pulls | None  # of learner.stacking
    back: Tensor  # [B, H] of learner.entries
    gain: Tensor  # [B, 2v'] reward, then continuation
    unchosen: Tensor  # [B, quantiles] V0(s)
    hint: Tensor  # [B, 1] n(s)
    kinds: Tensor  # [B, H] of the history's entries
    share: Tensor  # [B, H, C] that each has of each of the encoder's channels

    def rows(self, which: Tensor | slice) -> Queries:
        """The views of these states."""
        return Queries(
            self.organic.rows(which),
            self.choice.rows(which),
            None if self.answers is None else self.answers.rows(which),
            *(column[which] for column in cast(tuple[Tensor, ...], self[3:])),
        )


def score_all(query: Query, keys: Tensor, category: Tensor) -> Tensor:
    """Scores of all items, [B, N]. keys: [N, D]; category: [N]."""
    scores = query.vector @ keys.T
    scores += of_category(query, category)
    scores.scatter_add_(1, query.item, query.copy)
    for row, pull in _pulls(query):
        if scores.requires_grad:
            scores = scores.scatter_add(1, row, pull)
        else:
            scores.scatter_add_(1, row, pull)
    return scores


def _pulls(query: Query) -> Iterator[tuple[Tensor, Tensor]]:
    """What adds to few items of each state: their rows and by how much, [B, E] each."""
    if query.recalled is not None:
        yield query.recalled.row, query.trust * query.recalled.ways
    if query.answers is not None:
        yield query.answers


def score_at(
    query: Query, keys: Tensor, category: Tensor, ids: Tensor, found: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Scores of chosen items, [B, K]. keys: [N, D] and category: [N] of the whole shelf; ids: [B, K] rows; found:
    their `matches`, where they are known already."""
    scores = torch.bmm(functional.embedding(ids, keys), query.vector.unsqueeze(2)).squeeze(2)
    same, alike = found or matches(query, category, ids)
    scores = scores + (same * query.copy.unsqueeze(1) + alike * query.alike.unsqueeze(1)).sum(dim=2)
    if query.recalled is not None:
        scores = scores + query.trust * query.recalled.ways_at(ids)
    return scores if query.answers is None else scores + query.answers.at(ids)


def matches(query: Query, category: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries of the histories are the items ids [B, K] themselves, and which are of their categories; [B, K, H]
    bool twice. category: [N] of the whole shelf."""
    same = query.item.unsqueeze(1) == ids.unsqueeze(2)
    return same, query.category.unsqueeze(1) == category[ids].unsqueeze(2)


def of_category(query: Query, category: Tensor) -> Tensor:
    """Σ_h alike[h] [history item h is of the category], [B, N]. category: [N]."""
    buckets = query.buckets
    if not buckets:
        buckets = int(category.max()) + 1 if category.numel() else 1
        buckets = max(buckets, int(query.category.max()) + 1)
    sums = query.alike.new_zeros(len(query.alike), buckets)
    return sums.scatter_add(1, query.category, query.alike).index_select(1, category)


class ItemTower(nn.Module):
    """ψ: id embedding + hashed category + hashed brand + price + dense vector → d; and a bias by id.

    An id's own row learns what its features do not say; ids that little is known of yet share one learnt row, so that a
    new item scores from its features from its first second. Whoever learns lets rows start from `first_rows`.
    """

    def __init__(self, settings: NetworkSettings, items: int) -> None:
        super().__init__()
        d = settings.dim
        self.id = nn.Embedding(items, d + 1)
        self.category = nn.Embedding(settings.category_buckets, d)
        self.brand = nn.Embedding(settings.brand_buckets, d)
        self.dense = nn.Linear(PRICE_FEATURES + settings.vector_dim, d)
        self.new = nn.Parameter(torch.zeros(d + 1))
        nn.init.zeros_(self.id.weight)
        nn.init.normal_(self.category.weight, std=d**-0.5)
        nn.init.normal_(self.brand.weight, std=0.5 * d**-0.5)
        nn.init.normal_(self.dense.weight, std=0.2 * d**-0.5)
        nn.init.zeros_(self.dense.bias)

    def forward(self, items: ItemTensors, known: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [M, d] and biases [M]. known: [M] bool, was learnt from; own: [M, d + 1] rows of the id table,
        which count for those alone."""
        own = torch.where(known.unsqueeze(1), own, self.new)
        d = self.dense.out_features
        return own[:, :d] + self.features(items), own[:, d]

    @property
    def hashed(self) -> tuple[nn.Embedding, nn.Embedding]:
        """By bucket of category, and of brand."""
        return self.category, self.brand

    def features(self, items: ItemTensors) -> Tensor:
        """[M, d], from catalog features alone."""
        vector = items.vector.clamp(-MOST_IN_VECTOR, MOST_IN_VECTOR)
        dense = torch.cat((_price_features(items.price), vector), dim=1)
        return self.category(items.category) + self.brand(items.brand) + self.dense(dense)


def first_rows(start: int, stop: int, d: int) -> Tensor:
    """What the rows of ids start..stop - 1 of the table by id start from, [stop - start, d + 1]: small and random, and
    the same in every process. Were all zero, histories would look alike to the encoder, and there would be nothing to
    learn rows from either. The last number, the bias, is zero.
    """
    first = start // _BLOCK
    seeds = range(first, -(-stop // _BLOCK))
    blocks = [torch.randn(_BLOCK, d, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    rows = torch.cat((torch.zeros(0, d), *blocks))[start - first * _BLOCK : stop - first * _BLOCK]
    return functional.pad(rows * (ID_SIZE * d**-0.5), (0, 1))


_BLOCK: Final = 1024
ID_SIZE: Final = 0.5  # of a row, where items' features are of size one
PRICE_FEATURES: Final = 4
NO_PRICE: Final = -10.0
PRICE_SCALE: Final = (3.5, 1.5)  # where a catalog does not say


def price_levels(price: Tensor, scale: Tensor) -> Tensor:
    """How far log prices are from the catalog's mean, in its standard deviations: no currency matters. [M] -3..3;
    NO_PRICE where the price is NaN (published tensors are finite). scale: [2] mean and deviation.
    """
    level = ((torch.log1p(price.clamp(min=0)) - scale[0]) / scale[1]).clamp(-3, 3)
    return torch.where(price.isnan(), NO_PRICE, level)


def _price_features(price: Tensor) -> Tensor:
    """[M, 4]: is known, and the level of the price with its square and cube, all of order one."""
    known = price > NO_PRICE
    level = torch.where(known, price, 0.0)
    return torch.stack((known.float(), level, level.square() / 3, level**3 / 9), dim=1)


class HistoryEncoder(nn.Module):
    """φ(s): the history's item vectors, weighed by event type × recency × place in several channels, and counts → d."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        c, d = settings.channels, settings.dim
        self.name_weight = nn.Parameter(torch.zeros(NAMES, c))
        self.age_weight = nn.Parameter(torch.zeros(AGES, c))
        self.place_weight = nn.Parameter(torch.zeros(PLACES, c))
        self.mix = nn.Linear(c * d, d, bias=False)
        self.hidden = nn.Linear(c * d + COUNTS, settings.hidden)
        self.out = nn.Linear(settings.hidden, d)
        self._start(c, d)

    @torch.no_grad()
    def _start(self, c: int, d: int) -> None:
        """Channels start as a practitioner would draw them, and `mix` as the sum of all: "more of the same"."""
        self.place_weight[1:, 1 % c] = -3.0  # the newest alone
        self.age_weight[SESSION_AGES:, 2 % c] = -4.0  # this visit
        self.name_weight[:, 3 % c] = -3.0  # deeds of weight
        self.name_weight[[CODES[name] for name in ("add_to_cart", "purchase")], 3 % c] = 0.0
        self.place_weight[:, 4 % c] = -0.7 * torch.arange(PLACES)  # fading out
        self.age_weight[:2, 5 % c] = 2.0  # the last minute
        self.age_weight[:SESSION_AGES, 6 % c] = -4.0  # earlier visits
        self.name_weight[CODES["view_item"], 7 % c] = 2.0  # views
        self.mix.weight.copy_(torch.cat([torch.eye(d) / c] * c, dim=1))
        nn.init.normal_(self.out.weight, std=0.05)

    def forward(
        self, state: StateTensors, entries: Entries, tower: Tensor, local: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """φ, [B, d]; what share of each channel every entry of the history has, [B, H, C]; and what all of it comes to:
        plain sums of its items' vectors, and counts, [B, visit_features(d)], no gradient. Shares tell what is liked,
        sums how much there has been of it, and so how far the visit has come.

        entries: of these states; tower: [N, d]; local: [B, H], its rows that the history's items are.
        """
        table = torch.exp(self.name_weight.unsqueeze(1) + self.age_weight).flatten(0, 1)  # [KINDS, C]
        place = torch.exp(self.place_weight[place_buckets(state.item.shape[1], table.device)])  # [H, C]
        share = shares(entries.kinds, table, place)
        items, counts = functional.embedding(local, tower), entries.counts
        each = (state.name > 0).unsqueeze(2).float() / SUM_SCALE  # [B, H, 1]
        sums = torch.bmm(torch.cat((share, each), dim=2).transpose(1, 2), items)  # [B, C + 1, d]
        pooled = sums[:, :-1].flatten(1)  # [B, C * d]
        hidden = functional.relu(self.hidden(torch.cat((pooled, counts), dim=1)))
        total = torch.cat((sums[:, -1].detach(), each.sum(dim=1), counts), dim=1)
        return self.mix(pooled) + self.out(hidden), share, total


SUM_SCALE: Final = 16.0  # entries that sums are told in


def visit_features(d: int) -> int:
    """How many numbers say what all of a history comes to."""
    return d + 1 + COUNTS


class QNetwork(nn.Module):
    """Q(s, a) of this module's head, over `items` vocabulary ids (row 0 is the unknown item)."""

    def __init__(self, settings: NetworkSettings, items: int) -> None:
        super().__init__()
        self.settings = settings
        d, v = settings.dim, settings.value_dim + 2
        self.tower = ItemTower(settings, items)
        self.encoder = HistoryEncoder(settings)
        # what an entry of the history adds to organic interest in its item
        self.copy = nn.Parameter(torch.zeros(KINDS))
        # and in items of its category: by count, and by share of each channel
        self.alike = nn.Parameter(torch.zeros(KINDS))
        self.share = nn.Parameter(torch.zeros(settings.channels))
        self.prior = nn.Parameter(torch.tensor(0.3))  # β: how far choice follows organic interest
        # ρ: how far it follows where others went; learner.agent says so
        self.trust = nn.Parameter(torch.tensor(0.0), requires_grad=False)
        self.organic_key = nn.Linear(d, d + 1)
        self.response = Response(d, items, KINDS, settings.channels)
        self.stack = Stack(items, settings.vector_dim)
        self.recall = Recall(KINDS, (0, *PLACE_BOUNDS))
        self.lean = nn.Linear(d, 1)  # choice log-odds of whatever is shown
        self.query = nn.Linear(d, 2 * v)  # reward, continuation
        self.key = nn.Linear(d, 2 * v)
        self.unchosen = nn.Sequential(
            nn.Linear(d + visit_features(d), settings.hidden),
            nn.ReLU(),
            nn.Linear(settings.hidden, settings.quantiles),
        )
        # it starts from zero, and draws nothing
        self.hint: nn.Linear = nn.utils.skip_init(nn.Linear, d, 1)  # type: ignore[no-untyped-call]
        self.position = nn.Parameter(torch.zeros(MAX_SLOTS))  # choice log-odds by slot, against slot 0
        # what heads of value read φ and ψ less of, and in what, both as `look` takes them over: no gradient moves them,
        # but the target network follows them as it does φ and ψ
        self.state_mean, self.item_mean = (nn.Parameter(torch.zeros(d), requires_grad=False) for _ in "si")
        self.state_scale, self.item_scale = (nn.Parameter(torch.ones(1), requires_grad=False) for _ in "si")
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        d, v = self.settings.dim, self.settings.value_dim + 2
        self.share[2 % len(self.share)] = 2.0  # unaided, a visit goes on where it began
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.organic_key.weight.zero_()
        self.organic_key.weight[:d] = torch.eye(d) * 2.0
        self.lean.weight.zero_()
        self.hint.weight.zero_()
        self.lean.bias.fill_(-3.0)  # one slot in twenty
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight[:v], std=0.3 * d**-0.5)
            nn.init.normal_(layer.weight[v:], std=0.1 * d**-0.5)
        # each head's last two numbers start as (1, bias of the state) · (bias of the item, 1)
        for end, bias in ((v, 1.0), (2 * v, 0.0)):  # one unit
            for layer, one in ((self.query, end - 2), (self.key, end - 1)):
                layer.weight[one] = 0.0
                layer.bias[one] = 1.0
            self.query.bias[end - 1] = bias
        if not self.settings.dueling:
            self.unchosen.get_parameter("0.weight").zero_().requires_grad_(False)
            self.unchosen.get_parameter("0.bias").fill_(1.0)  # of units that are at zero nothing would move

    def heads_of_value(self) -> Iterator[nn.Parameter]:
        """The parameters that m, g, V0 and n have for themselves."""
        for head in (self.query, self.key, self.unchosen, self.hint):
            yield from head.parameters()

    def valued(self) -> tuple[Tensor, ...]:
        """The parameters in which m, g, V0 and n are linear: times x, they make Q x times what it was."""
        last = cast(nn.Linear, self.unchosen[2])
        return tuple(x for head in (self.query, last, self.hint) for x in (head.weight, head.bias))

    def shelf(
        self,
        items: ItemTensors,
        ids: Tensor | None = None,
        forget: Tensor | None = None,
        own: Tensor | None = None,
        response: Tensor | None = None,
    ) -> Shelf:
        """The items given by ids [M], or all. forget: [M] bool, as never learnt from. own, response: [M, d + 1] each,
        in place of these rows of the id table and of learner.response."""
        which = slice(len(items.seen)) if ids is None else ids
        response, level = self.response.own[which] if response is None else response, self.stack.level[which]
        if ids is not None:
            items = ItemTensors(*(column[ids] for column in items))
        known = items.seen if forget is None else items.seen & ~forget
        if own is None:
            own = self.tower.id.weight[: len(known)] if ids is None else self.tower.id(ids)
        return self._shelf(items, known, own, response, level)

    def _shelf(
        self, items: ItemTensors, known: Tensor, own: Tensor, response: Tensor, level: Tensor
    ) -> Shelf:
        vectors, bias = self.tower(items, known, own)
        return Shelf(vectors, bias, response, self.stack.levels(level, items.vector), items.category)

    def keys(
        self,
        items: ItemTensors,
        ids: Tensor | None = None,
        forget: Tensor | None = None,
        own: Tensor | None = None,
    ) -> Keys:
        """The heads' keys of the items that `shelf` would give."""
        return self.keys_of(self.shelf(items, ids, forget, own))

    def shelf_with(self, items: ItemTensors, ids: Tensor) -> Shelf:
        """M items whose features come with the request. items: of M rows; ids: [M], 0 unknown."""
        own, level = self.response.own[ids], self.stack.level[ids]
        return self._shelf(items, items.seen, self.tower.id(ids), own, level)

    def keys_of(self, shelf: Shelf) -> Keys:
        """The heads' keys of what is on the shelf."""
        d = self.settings.dim
        organic = self.organic_key(shelf.tower)
        organic = torch.cat((organic[:, :d], organic[:, d:] + shelf.bias.unsqueeze(1)), dim=1)
        choice = self.prior * organic + self.response.keys(shelf.tower, shelf.own)
        choice = torch.cat((choice, choice.new_ones(len(choice), 1)), dim=1)
        gain = self.key((shelf.tower.detach() - self.item_mean) / self.item_scale)
        return Keys(shelf.tower, organic, choice, shelf.level, gain, shelf.category)

    @torch.no_grad()
    def look(self) -> None:
        """Have heads of value read φ and ψ by the moments that learner.response knows by now, where they do."""
        if self.settings.centred:
            known = self.response
            for name in ("state", "item"):
                getattr(self, f"{name}_mean").copy_(getattr(known, f"{name}_mean"))
                getattr(self, f"{name}_scale").copy_(getattr(known, f"{name}_scale").clamp(min=SMALLEST))

    def read(
        self,
        state: StateTensors,
        ids: Tensor | None = None,
        *,
        ways: bool = True,
        right: bool = True,
        count: bool = True,
    ) -> Reading:
        """What the states say to this network and to any other that shares its recall. ids: see `queries`; ways: look
        up where others went; without, choice does not follow them, and `next_all` does not know them either; right:
        look up what sets choice right by items near the history's; without, only z counts; count: count the entries
        now; without, `queries` does."""
        answers = self.stack.answers(state.item, ids) if self.settings.stack and right else None
        entries = self._entries(state) if count else None
        if not (ways and self.recall.has_any):
            return Reading(entries, None, answers)
        places = place_buckets(state.item.shape[1], state.item.device)
        kinds = kinds_of(state) if entries is None else entries.kinds
        return Reading(entries, self.recall.recalled(state.item, kinds, places, ids), answers)

    def _entries(self, state: StateTensors) -> Entries:
        return entries_of(state, back=self.settings.stack)

    def queries(
        self,
        state: StateTensors,
        shelf: Shelf | Keys,
        local: Tensor | None = None,
        ids: Tensor | None = None,
        reading: Reading | None = None,
    ) -> Queries:
        """Every head's view of the states. shelf: of the history's items at least; ids: [N] ascending, what its rows
        are, and local: [B, H] rows of it that the history's items are, by which they are known to `score_all` and
        `score_at`; None: row i is vocabulary id i. reading: of these states, where there is one already."""
        item = state.item if local is None else local
        entries, recalled, answers = reading or self.read(state, ids)
        entries = entries or self._entries(state)
        kinds, category = entries.kinds, shelf.category[item]
        phi, share, total = self.encoder(state, entries, shelf.tower, item)
        # the unknown item (0) and padding must not pull on anything
        has_item, has_category = state.item > 0, category > 0
        copy = self.copy[kinds] * has_item  # [B, H]
        alike = (self.alike[kinds] + share @ self.share) * has_category
        more = self.response
        more_copy = more.copy[kinds] * has_item
        more_alike = (more.alike[kinds] + share.detach() @ more.share) * has_category
        organic = torch.cat((phi, phi.new_ones(len(phi), 1)), dim=1)
        # returns are noise beside choices: they must not bend what choice is read from
        still = (phi.detach() - self.state_mean) / self.state_scale
        choice = torch.cat((organic, self.lean(phi)), dim=1)
        copies, alikes = self.prior * copy + more_copy, self.prior * alike + more_alike
        buckets = 0 if item.device.type == "cpu" else self.settings.category_buckets
        return Queries(
            Query(organic, copy, item, alike, category, None, self.trust, None, buckets),
            Query(choice, copies, item, alikes, category, recalled, self.trust, None, buckets),
            answers,
            entries.back,
            self.query(still),
            self.unchosen(torch.cat((still, total), dim=1)),
            self.hint(still),
            kinds,
            share.detach(),
        )

    def next_all(self, queries: Queries, keys: Keys) -> Tensor:
        """How likely users go to each item next, unaided, log-odds but for a constant, [B, N]: see learner.recall."""
        organic = score_all(queries.organic, keys.organic, keys.category)
        recalled = queries.choice.recalled
        if recalled is None:
            return organic
        pull = self.recall.power.exp() * recalled.whole
        return (self.recall.scale * organic).scatter_add_(1, recalled.row, pull)

    def q_all(self, queries: Queries, keys: Keys) -> Tensor:
        """Q(s, a) of all N items, [B, N]; the equation of this module's head."""
        return self.value(queries) + self.advantage_all(queries, keys)

    def q_at(self, queries: Queries, keys: Keys, ids: Tensor, slot: Tensor | None = None) -> Tensor:
        """Q(s, a) at ids [B, K] (rows of the keys), [B, K]. slot: see `advantage_at`."""
        return self.value(queries) + self.advantage_at(queries, keys, ids, slot)

    def value(self, queries: Queries) -> Tensor:
        """γ V0(s), [B, 1]: what is to come if nothing is chosen."""
        return self.settings.gamma * queries.unchosen.mean(dim=1, keepdim=True)

    def gain_all(self, queries: Queries, keys: Keys) -> Tensor:
        """m + γ g of all N items, [B, N]: what the choice of each is worth."""
        half = self.settings.value_dim + 2
        gain = torch.cat((queries.gain[:, :half], self.settings.gamma * queries.gain[:, half:]), dim=1)
        return gain @ keys.gain.T

    def choice(self, queries: Queries, keys: Keys) -> tuple[Query, Tensor]:
        """What log-odds of choice, set right, are scored by: the states' view, and the items' keys [N, d + 2]."""
        if not self.settings.stack:
            return queries.choice, keys.choice
        c, scale, own = self.stack.weights
        z, pull = queries.choice, keys.choice
        vector = torch.cat((z.vector[:, :-1], scale * z.vector[:, -1:] + c), dim=1)
        level = scale * pull[:, -2:-1] + keys.level.unsqueeze(1)
        return (
            z._replace(
                vector=vector,
                copy=scale * z.copy + own * queries.back,
                alike=scale * z.alike,
                trust=scale * z.trust,
                answers=queries.answers,
            ),
            torch.cat((scale * pull[:, :-2], level, pull[:, -1:]), dim=1),
        )

    def parts_at(
        self, queries: Queries, keys: Keys, ids: Tensor, found: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z, m and g at ids [B, K], each [B, K]. found: see `score_at`."""
        z = score_at(queries.choice, keys.choice, keys.category, ids, found)
        return z, *self._gains_at(queries, keys, ids)

    def _gains_at(self, queries: Queries, keys: Keys, ids: Tensor) -> tuple[Tensor, Tensor]:
        product = functional.embedding(ids, keys.gain) * queries.gain.unsqueeze(1)
        reward, continuation = product.reshape(*ids.shape, 2, -1).sum(dim=3).unbind(dim=2)
        return reward, continuation

    def advantage_all(self, queries: Queries, keys: Keys) -> Tensor:
        """p · (m + γ g) of all N items, [B, N]: what showing an item adds to showing nothing of interest."""
        query, pull = self.choice(queries, keys)
        choice = score_all(query, pull, keys.category).sigmoid_()
        gain = self.gain_all(queries, keys)
        return choice * gain if choice.requires_grad else choice.mul_(gain)

    def advantage_at(self, queries: Queries, keys: Keys, ids: Tensor, slot: Tensor | None = None) -> Tensor:
        """p · (m + γ g) at ids [B, K], [B, K]. slot: [K] or [B, K], where in the slate each is shown; None: first."""
        reward, continuation = self._gains_at(queries, keys, ids)
        gain = reward + self.settings.gamma * continuation
        return self.chance_at(queries, keys, ids, slot) * gain

    def chance_at(
        self,
        queries: Queries,
        keys: Keys,
        ids: Tensor,
        slot: Tensor | None = None,
        z: Tensor | None = None,
    ) -> Tensor:
        """p at ids [B, K], [B, K]. slot: see `advantage_at`; z: there, where it is known already."""
        if z is None:
            z = score_at(queries.choice, keys.choice, keys.category, ids)
        if slot is not None:
            z = z + self.position_of(slot)
        return torch.sigmoid(self._set_right(z, queries, keys, ids))

    def _set_right(self, z: Tensor, queries: Queries, keys: Keys, ids: Tensor) -> Tensor:
        """Log-odds of choice at ids [B, K], as learner.stacking has them, [B, K]. z: there."""
        if not self.settings.stack:
            return z
        c, scale, own = self.stack.weights
        same = queries.choice.item.unsqueeze(1) == ids.unsqueeze(2)
        z = c + scale * z + own * (same * queries.back.unsqueeze(1)).sum(dim=2) + keys.level[ids]
        return z if queries.answers is None else z + queries.answers.at(ids)

    def position_of(self, slot: Tensor) -> Tensor:
        """Choice log-odds of places in a slate, 0, 1, ..., against the first; of the shape of `slot`."""
        return self.position[slot.clamp(max=MAX_SLOTS - 1)] * (slot > 0)
