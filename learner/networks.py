"""The Q-network: one state encoder and one item tower, for training and for serving alike.

What is put before a shopper acts only if the shopper chooses it, so that Q splits as in SlateQ (Ie et al. 2019,
equations 11-15, there for slates and here for single slots too):

    Q(s, a) = γ V0(s) + p(s, a) · [m(s, a) + γ g(s, a)]

    p(s, a)  choice: probability that a, shown in s, earns anything at all (a click, a purchase, ...)
    m(s, a)  what it then earns, at once
    V0(s)    value of where the visit stands next if nothing is chosen
    g(s, a)  how much more that value is if a is chosen: what planning adds to greed

This is a dueling network (Wang et al. 2016, equation 7) whose advantage is p · (m + γ g), and Q = R + γ C with
R = p m. At the fixed point of the Bellman equation it is exact wherever reward and next state depend on what was
shown through what was chosen (SlateQ's RTDS assumption). Why not one unstructured Q: only a few slots in a hundred
are chosen, so a regression on returns drowns in the noise of all the others, while each factor here is learnt from
just the rows that speak of it. And a step without a recommender is a choice of known outcome: it teaches m, g and
the organic head, which is p's prior.

Every head is an inner product of a query made from the state and a key made from the item: all items are scored
by one matrix product, and a Bayesian last layer may replace any head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from streaming.rewards import CODES, EVENT_NAMES

# Upper ends of the recency buckets, seconds; the last bucket is open. 30 minutes ends a visit.
AGE_BOUNDS_S: Final = (15.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0, 604800.0)
AGES: Final = len(AGE_BOUNDS_S) + 1
SESSION_AGES: Final = 4  # buckets that lie within a visit
PLACE_BOUNDS: Final = (1, 2, 3, 5, 9, 17)  # buckets of an entry's place in the history, newest = 0
PLACES: Final = len(PLACE_BOUNDS) + 1
NAMES: Final = len(EVENT_NAMES)
MAX_SLOTS: Final = 32  # positions beyond share the last position's bias


@dataclass(frozen=True)
class NetworkSettings:
    """The network's shape. It travels in the weights' manifest, so that a server rebuilds what was trained."""

    dim: int = 32  # d: item vectors and queries
    channels: int = 8  # ways to weigh a history by event type, recency and place
    hidden: int = 64
    value_dim: int = 8  # inner products of the reward and continuation heads
    history_length: int = 32  # H
    vector_dim: int = 32  # dense catalog features
    category_buckets: int = 1024  # hashed
    brand_buckets: int = 1024  # hashed
    gamma: float = 0.9

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "gamma" and not 1 <= value <= 1_000_000:
                raise ValueError(f"network setting {name}={value}: must be a whole number in 1..1000000")
        if not 0.0 <= self.gamma < 1.0:
            raise ValueError(f"network setting gamma={self.gamma}: must be in [0, 1)")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Of a manifest; keys that are not ours are somebody else's."""
        return cls(**{name: settings[name] for name in cls.__dataclass_fields__ if name in settings})


class StateTensors(NamedTuple):
    """B histories, newest entry first, padded at the end with name 0 (as in streaming.transitions.States)."""

    item: Tensor  # [B, H] int64 vocabulary ids, 0 unknown
    name: Tensor  # [B, H] int64 event-name codes, 0 padding
    age_s: Tensor  # [B, H] float32
    value: Tensor  # [B, H] float32

    def rows(self, which: Tensor) -> StateTensors:
        """The states at these rows (indices or mask)."""
        return StateTensors(*(column[which] for column in self))


class ItemTensors(NamedTuple):
    """Catalog features of N items; row i describes vocabulary id i, row 0 the unknown item."""

    category: Tensor  # [N] int64 bucket, 0 unknown
    brand: Tensor  # [N] int64 bucket, 0 unknown
    price: Tensor  # [N] float32, -1 unknown (published tensors are finite)
    vector: Tensor  # [N, vector_dim] float32
    seen: Tensor  # [N] bool: was learnt from; others share the "new item" vector


class Keys(NamedTuple):
    """What the heads need to know of N items."""

    tower: Tensor  # [N, d] ψ(a)
    organic: Tensor  # [N, d + 1]
    choice: Tensor  # [N, 2d + 3]
    reward: Tensor  # [N, v + 2]
    continuation: Tensor  # [N, v + 2]
    gain: Tensor  # [N, 2v + 4] both of these, for m + γ g in one product


class Query(NamedTuple):
    """One head's view of B states; score(s, a) = vector(s) · key(a) + Σ_h copy[h] · [history item h is a]."""

    vector: Tensor  # [B, D]
    copy: Tensor | None  # [B, H] weights on the history's own items
    item: Tensor  # [B, H]

    def rows(self, which: Tensor) -> Query:
        """The view of these states."""
        return Query(self.vector[which], None if self.copy is None else self.copy[which], self.item[which])


class Queries(NamedTuple):
    """All heads' views of B states."""

    organic: Query
    choice: Query
    reward: Query
    continuation: Query
    unchosen: Tensor  # [B] V0(s)


def score_all(query: Query, keys: Tensor) -> Tensor:
    """Scores of all items. keys: [N, D]; returns [B, N]."""
    scores = query.vector @ keys.T
    return scores if query.copy is None else scores.scatter_add(1, query.item, query.copy)


def score_at(query: Query, keys: Tensor, ids: Tensor) -> Tensor:
    """Scores of chosen items. keys: [N, D] of the whole shelf; ids: [B, K] rows of it; returns [B, K]."""
    scores = torch.einsum("bd,bkd->bk", query.vector, functional.embedding(ids, keys))
    if query.copy is None:
        return scores
    same = query.item.unsqueeze(1) == ids.unsqueeze(2)  # [B, K, H]
    return scores + torch.where(same, query.copy.unsqueeze(1), 0.0).sum(dim=2)


class ItemTower(nn.Module):
    """ψ: id embedding + hashed category + hashed brand + price + dense vector → d.

    An id starts at zero and learns what its features do not say; ids never trained share one learnt vector, so that
    a new item scores from its features from its first second.
    """

    def __init__(self, settings: NetworkSettings, items: int) -> None:
        super().__init__()
        d = settings.dim
        self.id = nn.Embedding(items, d)
        self.category = nn.Embedding(settings.category_buckets, d)
        self.brand = nn.Embedding(settings.brand_buckets, d)
        self.price = nn.Linear(4, d)
        self.vector = nn.Linear(settings.vector_dim, d, bias=False)
        self.new = nn.Parameter(torch.zeros(d))
        nn.init.zeros_(self.id.weight)
        nn.init.normal_(self.category.weight, std=d**-0.5)
        nn.init.normal_(self.brand.weight, std=0.5 * d**-0.5)
        nn.init.normal_(self.price.weight, std=0.2 * d**-0.5)
        nn.init.zeros_(self.price.bias)

    def forward(self, items: ItemTensors, known: Tensor, own: Tensor) -> Tensor:
        """[M, d]. known: [M] bool, was learnt from; own: [M, d] id embeddings, which count for those alone."""
        return torch.where(known.unsqueeze(1), own, self.new) + self.features(items)

    def features(self, items: ItemTensors) -> Tensor:
        """[M, d], from catalog features alone (inline candidates; items never seen)."""
        return (
            self.category(items.category)
            + self.brand(items.brand)
            + self.price(_price_features(items.price))
            + self.vector(items.vector)
        )


def _price_features(price: Tensor) -> Tensor:
    """[M, 4]: is known, and log price about typical ones, with its square and cube, all of order one."""
    known = price >= 0
    level = torch.where(known, (torch.log1p(price.clamp(min=0)) - 3.5) / 1.5, 0.0).clamp(-3, 3)
    return torch.stack((known.float(), level, level.square() / 3, level**3 / 9), dim=1)


class HistoryEncoder(nn.Module):
    """φ(s): the history's item vectors, weighed by event type × recency × place in several channels, and counts → d."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        c, d = settings.channels, settings.dim
        self.name_weight = nn.Embedding(NAMES, c)
        self.age_weight = nn.Embedding(AGES, c)
        self.place_weight = nn.Embedding(PLACES, c)
        self.mix = nn.Linear(c * d, d, bias=False)
        self.hidden = nn.Linear(c * d + COUNTS, settings.hidden)
        self.out = nn.Linear(settings.hidden, d)
        self._start(c, d)

    @torch.no_grad()
    def _start(self, c: int, d: int) -> None:
        """Channels start as a practitioner would draw them, and `mix` as the sum of all: "more of the same"."""
        for table in (self.name_weight, self.age_weight, self.place_weight):
            nn.init.zeros_(table.weight)
        self.place_weight.weight[1:, 1 % c] = -3.0  # the newest alone
        self.age_weight.weight[SESSION_AGES:, 2 % c] = -4.0  # this visit
        self.name_weight.weight[:, 3 % c] = -3.0  # deeds of weight
        self.name_weight.weight[[CODES[name] for name in ("add_to_cart", "purchase")], 3 % c] = 0.0
        self.place_weight.weight[:, 4 % c] = -0.7 * torch.arange(PLACES)  # fading out
        self.age_weight.weight[:2, 5 % c] = 2.0  # the last minute
        self.age_weight.weight[:SESSION_AGES, 6 % c] = -4.0  # earlier visits
        self.name_weight.weight[CODES["view_item"], 7 % c] = 2.0  # views
        self.mix.weight.copy_(torch.cat([torch.eye(d) / c] * c, dim=1))
        nn.init.normal_(self.out.weight, std=0.05)

    def forward(self, state: StateTensors, tower: Tensor, local: Tensor) -> Tensor:
        """[B, d]. tower: [N, d] item vectors; local: [B, H], the rows of it that the history's items are."""
        ages, places = age_buckets(state), place_buckets(state)
        logits = self.name_weight(state.name) + self.age_weight(ages) + self.place_weight(places)  # [B, H, C]
        weight = torch.exp(logits) * (state.name > 0).unsqueeze(2)
        vectors = functional.embedding(local, tower)  # [B, H, d]
        pooled = torch.bmm(weight.transpose(1, 2), vectors)  # [B, C, d]
        pooled = (pooled / (weight.sum(dim=1) + 0.5).unsqueeze(2)).flatten(1)
        hidden = functional.relu(self.hidden(torch.cat((pooled, _counts(state, ages)), dim=1)))
        return self.mix(pooled) + self.out(hidden)


COUNTS: Final = 2 * NAMES + 5


def age_buckets(state: StateTensors) -> Tensor:
    """[B, H] in 0..AGES-1."""
    return torch.bucketize(state.age_s, torch.tensor(AGE_BOUNDS_S, device=state.age_s.device), right=True)


def place_buckets(state: StateTensors) -> Tensor:
    """[1, H] in 0..PLACES-1: entry h's place, newest first."""
    place = torch.arange(state.item.shape[1], device=state.item.device)
    return torch.bucketize(place, torch.tensor(PLACE_BOUNDS, device=place.device), right=True).unsqueeze(0)


def _counts(state: StateTensors, ages: Tensor) -> Tensor:
    """[B, COUNTS]: how often each event type occurred, ever and in this visit, and when."""
    real = (state.name > 0).float()
    visit = real * (ages < SESSION_AGES)
    zeros = torch.zeros(len(real), NAMES, device=real.device)
    ever = zeros.scatter_add(1, state.name, real)
    now = zeros.scatter_add(1, state.name, visit)
    recency = torch.log1p(state.age_s[:, 0]) * real[:, 0] / 10
    since = torch.log1p((state.age_s * visit).amax(dim=1)) / 10
    value = torch.log1p((state.value.clamp(min=0) * real).sum(dim=1)) / 10
    empty, full = 1 - real[:, 0], real[:, -1]
    return torch.cat(
        (torch.log1p(ever), torch.log1p(now), torch.stack((recency, since, value, empty, full), 1)), 1
    )


class QNetwork(nn.Module):
    """Q(s, a) of this module's head, over `items` vocabulary ids (row 0 is the unknown item)."""

    def __init__(self, settings: NetworkSettings, items: int) -> None:
        super().__init__()
        self.settings = settings
        d, v = settings.dim, settings.value_dim
        self.tower = ItemTower(settings, items)
        self.encoder = HistoryEncoder(settings)
        self.item_bias = nn.Embedding(items, 2)  # organic and choice: what an id's features do not say
        self.copy = nn.Embedding(
            NAMES * AGES, 2
        )  # organic and choice: weight on an item that is in the history
        self.prior = nn.Parameter(torch.tensor(0.3))  # β: how far choice follows organic interest
        self.organic_key = nn.Linear(d, d + 1)
        self.choice_query = nn.Linear(d, d + 1)
        self.choice_key = nn.Linear(d, d + 1)
        self.reward_query = nn.Linear(d, v + 1)
        self.reward_key = nn.Linear(d, v + 1)
        self.continuation_query = nn.Linear(d, v + 1)
        self.continuation_key = nn.Linear(d, v + 1)
        self.unchosen = nn.Sequential(nn.Linear(d, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, 1))
        self.position = nn.Parameter(torch.zeros(MAX_SLOTS))  # choice log-odds by slot, against slot 0
        self.aside = nn.Parameter(torch.zeros(2))  # reward, continuation: how organic choices differ
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        d = self.settings.dim
        nn.init.zeros_(self.item_bias.weight)
        nn.init.zeros_(self.copy.weight)
        self.organic_key.weight.zero_()
        self.organic_key.weight[:d] = torch.eye(d) * 2.0
        for layer in (self.choice_query, self.choice_key, self.reward_query, self.reward_key):
            nn.init.normal_(layer.weight, std=0.3 * d**-0.5)
        for layer in (self.continuation_query, self.continuation_key):
            nn.init.normal_(layer.weight, std=0.1 * d**-0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.choice_query.bias[-1] = -3.0  # one slot in twenty
        self.reward_query.bias[-1] = 1.0

    def keys(self, items: ItemTensors, ids: Tensor | None = None, forget: Tensor | None = None) -> Keys:
        """The heads' keys of the items given by ids [M], or of all. forget: [N] bool, as for the tower."""
        if ids is None:
            rows, known = items, items.seen if forget is None else items.seen & ~forget
            own, bias = self.tower.id.weight[: len(known)], self.item_bias.weight[: len(known)]
        else:
            rows = ItemTensors(*(column[ids] for column in items))
            known = rows.seen if forget is None else rows.seen & ~forget[ids]
            own, bias = self.tower.id(ids), self.item_bias(ids)
        return self._keys(rows, known, own, bias)

    def keys_with(self, items: ItemTensors, ids: Tensor) -> Keys:
        """The heads' keys of M items whose features come with the request. items: of M rows; ids: [M], 0 unknown."""
        return self._keys(items, items.seen, self.tower.id(ids), self.item_bias(ids))

    def _keys(self, items: ItemTensors, known: Tensor, own: Tensor, bias: Tensor) -> Keys:
        tower = self.tower(items, known, own)
        bias = torch.where(known.unsqueeze(1), bias, 0.0)
        one = torch.ones(len(tower), 1, device=tower.device)
        organic = self.organic_key(tower)
        organic = torch.cat((organic[:, :-1], organic[:, -1:] + bias[:, :1]), dim=1)
        choice = self.choice_key(tower)
        choice = torch.cat((organic, choice[:, :-1], choice[:, -1:] + bias[:, 1:], one), dim=1)
        reward = torch.cat((self.reward_key(tower), one), dim=1)
        continuation = torch.cat((self.continuation_key(tower), one), dim=1)
        return Keys(tower, organic, choice, reward, continuation, torch.cat((reward, continuation), dim=1))

    def features(self, state: StateTensors, tower: Tensor, local: Tensor | None = None) -> Tensor:
        """φ(s), [B, d]. tower: item vectors [N, d]; local: rows of it; None: row i is vocabulary id i."""
        return self.encoder(state, tower, state.item if local is None else local)

    def queries(self, state: StateTensors, tower: Tensor, local: Tensor | None = None) -> Queries:
        """Every head's view of the states. tower and local as for `features`; local also names the items scored."""
        phi = self.features(state, tower, local)
        item = state.item if local is None else local
        # the unknown item (0) and padding must not pull on anything
        copy = self.copy(state.name * AGES + age_buckets(state)) * (state.item > 0).unsqueeze(2)  # [B, H, 2]
        one = torch.ones(len(phi), 1, device=phi.device)
        organic = torch.cat((phi, one), dim=1)
        chosen = self.choice_query(phi)
        choice = torch.cat((organic * self.prior, chosen[:, :-1], one, chosen[:, -1:]), dim=1)
        return Queries(
            Query(organic, copy[..., 0], item),
            Query(choice, self.prior * copy[..., 0] + copy[..., 1], item),
            Query(_with_bias(self.reward_query(phi)), None, item),
            Query(_with_bias(self.continuation_query(phi)), None, item),
            self.unchosen(phi).squeeze(1),
        )

    def q_all(self, queries: Queries, keys: Keys) -> Tensor:
        """Q(s, a) of all N items, [B, N]; the equation of this module's head."""
        return self.value(queries) + self.advantage_all(queries, keys)

    def q_at(self, queries: Queries, keys: Keys, ids: Tensor) -> Tensor:
        """Q(s, a) at ids [B, K] (rows of the keys), [B, K]."""
        return self.value(queries) + self.advantage_at(queries, keys, ids)

    def value(self, queries: Queries) -> Tensor:
        """γ V0(s), [B, 1]: what is to come if nothing is chosen."""
        return self.settings.gamma * queries.unchosen.unsqueeze(1)

    def advantage_all(self, queries: Queries, keys: Keys) -> Tensor:
        """p · (m + γ g) of all N items, [B, N]: what showing an item adds to showing nothing of interest."""
        gain = torch.cat((queries.reward.vector, self.settings.gamma * queries.continuation.vector), dim=1)
        return torch.sigmoid(score_all(queries.choice, keys.choice)) * (gain @ keys.gain.T)

    def advantage_at(self, queries: Queries, keys: Keys, ids: Tensor) -> Tensor:
        """p · (m + γ g) at ids [B, K], [B, K]."""
        reward = score_at(queries.reward, keys.reward, ids)
        continuation = score_at(queries.continuation, keys.continuation, ids)
        choice = score_at(queries.choice, keys.choice, ids)
        return torch.sigmoid(choice) * (reward + self.settings.gamma * continuation)


def _with_bias(query: Tensor) -> Tensor:
    """[q, c] → [q, 1, c], against a key [k, b, 1]: q · k + b + c."""
    return torch.cat((query[:, :-1], torch.ones_like(query[:, :1]), query[:, -1:]), dim=1)
