"""Q(s, a) as a server computes it: a compiled loop over each history, then one matrix product over all items.

The equations are those of learner.networks, which trains; its many small operations, each cheap beside a batch of
256, would cost a lone request a millisecond. `Policy.check` compares the two on every version before it serves.

What heads say of an item is linear in ψ(a), so that a state needs two vectors against the same keys [ψ(a), bias of a],
and one against what each item has of its own (learner.response):

    log-odds of choice = u(s) · key(a) + o(s) · own(a) + c(s)
                         + Σ_h copy[h] [history item h is a] + Σ_h alike[h] [it is of a's category]
                         + ρ · log(1 + SCALE · ways(s, a))        (learner.recall)
                         + Σ answers to what is near the history's items        (learner.answers)
                         (set right as learner.stacking has it: all but o times κ, and κ in own)
    m + γ g            = w(s) · key(a) + e(s)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from learner.answers import compile_answers, pulls_of
from learner.entries import (
    AGES,
    BOUNDS,
    COUNTS,
    MOST_VALUE,
    NAMES,
    SESSION_AGES,
    compile_entries,
    place_buckets,
)
from learner.networks import (
    SUM_SCALE,
    NetworkSettings,
    QNetwork,
    Shelf,
    unknown_items,
)
from learner.offered import compile_offered
from learner.recall import compile_recall
from learner.replay import Histories
from learner.shares import LEAST, compile_shares
from streaming.jit import jit

Floats = npt.NDArray[np.float32]

ROOM: Final = 1 << 14  # items that histories name and weights do not know yet


class _Layer(NamedTuple):
    """x → x · weight + bias, or a key's share of ψ, row by row."""

    weight: Floats  # [in, out]; of keys [numbers, d]
    bias: Floats  # [out]; of keys [numbers]


class _Parameters(NamedTuple):
    """A network's, as arrays; C channels, H entries, d numbers an item."""

    kind: Floats  # [KINDS, C] weight of an entry of this event type and recency
    place: Floats  # [H, C] likewise by place
    copy: Floats  # [KINDS] pull of a history item on its own log-odds
    alike: Floats  # [KINDS] likewise on those of its category
    share: Floats  # [C] likewise by the entry's share of each channel
    tower: Floats  # [N, d] ψ(a)
    category: npt.NDArray[np.int64]  # [N] bucket, 0 unknown
    more_tower: Floats  # [ROOM, d] of items that histories alone name: rows N and on
    more_category: npt.NDArray[np.int64]  # [ROOM]
    mix: _Layer
    hidden: _Layer
    out: _Layer
    lean: _Layer  # φ → choice
    gain: _Layer  # φ → reward and continuation [2v']
    organic_key: _Layer  # d + 1 numbers
    gain_key: _Layer  # 2v'
    value_mean: Floats  # [d] which φ is read from by the heads of value
    value_scale: np.float32
    shared: Floats  # [d + 1, d] of learner.response, for ψ - its mean
    state_mean: Floats  # [d]
    state_scale: np.float32
    item_mean: Floats  # [d]
    unchosen: _Layer
    unchosen_out: _Layer
    prior: np.float32
    going_back: np.float32  # ω of learner.stacking
    gamma: np.float32


class CompiledQ:
    """What a network makes of states, over a catalog of N items that stays as it is."""

    def __init__(self, network: QNetwork, shelf: Shelf) -> None:
        self._parameters = _parameters(network, shelf)
        self._keys = _keys(shelf).contiguous()  # [d + 1, N]
        self._scale = network.stack.weights[1]
        self._own = self._own_of(shelf).contiguous()  # [d + 1, N]
        self._category = shelf.category
        self._recall = network.recall
        self._trust = float(network.stack.weights[1] * network.trust)
        self._follows_ways = self._trust != 0.0 and network.recall.has_any
        stack = network.stack
        answered = network.settings.stack and len(stack.source) > 1
        self._pairs = (stack.source, stack.near, stack.answer) if answered else None
        self._pull = network.recall.pull.exp().numpy()
        self._items = len(shelf.category)
        self._buckets = network.settings.category_buckets

    def put(self, shelf: Shelf, rows: npt.NDArray[np.int64]) -> None:
        """Have these M items be N + rows in histories from now on. rows: [M], each below ROOM."""
        self._parameters.more_tower[rows] = shelf.tower.numpy()
        self._parameters.more_category[rows] = shelf.category.numpy()

    def q(self, states: Histories) -> Tensor:
        """Q(s, a), [B, N]."""
        log_odds, gain, value, _ = self.parts(states)
        return log_odds.sigmoid_().mul_(gain).add_(value)

    def parts(self, states: Histories) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-odds of choice and m + γ g, [B, N] each; γ V0, [B, 1]; φ̄ of learner.response, [B, d]."""
        views = self._views(states)
        log_odds, gain = views.scores(self._keys, self._own)
        log_odds += views.alike.index_select(1, self._category)
        log_odds.scatter_add_(1, torch.from_numpy(self._known(states)), views.copy)
        for to, pull in self._pulls(states):
            log_odds.scatter_add_(1, to, pull)
        return log_odds, gain, views.value, views.own[:, :-1]

    def parts_among(
        self, states: Histories, shelf: Shelf, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of the M items of a shelf of its own. ids: [M] by which the states know them, 0: do not."""
        views = self._views(states)
        log_odds, gain = views.scores(_keys(shelf), self._own_of(shelf))
        log_odds += views.alike.index_select(1, shelf.category)
        order = np.argsort(ids.numpy(), kind="stable")
        ascending, into = ids.numpy()[order], log_odds.numpy()
        own = torch.from_numpy(states.item.astype(np.int64)), views.copy
        for to, pull in (own, *self._pulls(states)):
            first = np.searchsorted(ascending, to.numpy())
            _pull(into, ascending, order, to.numpy(), first, pull.numpy())
        return log_odds, gain, views.value, views.own[:, :-1]

    def _known(self, states: Histories) -> npt.NDArray[np.int64]:
        """[B, H] the histories' items, 0 where they are none of the N."""
        return np.where(states.item < self._items, states.item, 0).astype(np.int64)

    def _pulls(self, states: Histories) -> Iterator[tuple[Tensor, Tensor]]:
        """What histories add to the log-odds of few items: these, and how much, [B, E] each."""
        if self._follows_ways:  # where the histories' items lead
            item = self._known(states)
            row, ways, _ = self._recall.merged(item, np.zeros(item.shape, np.float32), self._pull)
            yield row, ways.mul_(self._trust)
        if self._pairs:  # what is near them
            yield pulls_of(*self._pairs, torch.from_numpy(states.item))

    def _own_of(self, shelf: Shelf) -> Tensor:
        """What each item has of its own, [d + 1, M]."""
        own = self._scale * shelf.own
        own[:, -1] += shelf.level
        return own.T

    def _views(self, states: Histories) -> _Views:
        columns = (states.item, states.name, states.age_s, states.value)
        return _Views(*map(torch.from_numpy, _vectors(self._parameters, self._buckets, *columns)))


class _Views(NamedTuple):
    """What `_vectors` makes of B states."""

    vectors: Tensor
    own: Tensor
    constants: Tensor
    value: Tensor
    copy: Tensor
    alike: Tensor

    def scores(self, keys: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of choice, but for pulls of histories, and m + γ g, [B, M] each. keys, own: [d + 1, M]."""
        scores = torch.mm(self.vectors, keys)
        scores += self.constants
        log_odds, gain = scores[: len(self.own)], scores[len(self.own) :]
        return log_odds.addmm_(self.own, own), gain


def _keys(shelf: Shelf) -> Tensor:
    """[ψ(a), bias of a], [d + 1, M]."""
    return torch.cat((shelf.tower, shelf.bias.unsqueeze(1)), dim=1).T


def compile_q() -> None:
    """Have the loops compiled, for a network that is thrown away: else the first weights would wait for it, and whoever
    is answering meanwhile."""
    compile_recall()
    compile_answers()
    compile_entries()
    compile_shares()
    compile_offered()
    settings = NetworkSettings()
    network, shape = QNetwork(settings, 1), (1, settings.history_length)
    names, others = np.zeros(shape, np.uint8), np.zeros((2, *shape), np.float32)
    states = Histories(np.zeros(shape, np.int32), names, *others)
    with torch.inference_mode():
        shelf = network.shelf(unknown_items(1, settings.vector_dim))
        q = CompiledQ(network, shelf)
        q.q(states)
        q.parts_among(states, shelf, torch.zeros(1, dtype=torch.int64))


def _parameters(network: QNetwork, shelf: Shelf) -> _Parameters:
    settings, encoder = network.settings, network.encoder
    place = place_buckets(settings.history_length)
    more = network.response
    c, scale, going_back = network.stack.weights
    prior = scale * network.prior
    first, last = cast(nn.Linear, network.unchosen[0]), cast(nn.Linear, network.unchosen[2])
    return _Parameters(
        kind=_array(torch.exp(encoder.name_weight.unsqueeze(1) + encoder.age_weight).flatten(0, 1)),
        place=_array(torch.exp(encoder.place_weight[place])),
        copy=_array(prior * network.copy + scale * more.copy),
        alike=_array(prior * network.alike + scale * more.alike),
        share=_array(prior * network.share + scale * more.share),
        tower=_array(shelf.tower),
        category=shelf.category.numpy(),
        more_tower=np.zeros((ROOM, settings.dim), np.float32),
        more_category=np.zeros(ROOM, np.int64),
        mix=_Layer(_array(encoder.mix.weight.T), np.zeros(settings.dim, np.float32)),
        hidden=_layer(encoder.hidden),
        out=_layer(encoder.out),
        lean=_Layer(_array(scale * network.lean.weight.T), _array(scale * network.lean.bias + c)),
        gain=_layer(network.query),
        organic_key=_Layer(_array(network.organic_key.weight), _array(network.organic_key.bias)),
        gain_key=_Layer(
            _array(network.key.weight / network.item_scale),
            _array(network.key.bias - network.key.weight @ (network.item_mean / network.item_scale)),
        ),
        value_mean=_array(network.state_mean),
        value_scale=np.float32(network.state_scale.item()),
        shared=_array(scale * more.shared / more.item_scale),
        state_scale=np.float32(more.state_scale.item()),
        state_mean=_array(more.state_mean),
        item_mean=_array(more.item_mean),
        unchosen=_layer(first),
        unchosen_out=_Layer(  # of their mean
            _array(last.weight.mean(dim=0, keepdim=True).T), _array(last.bias.mean(dim=0, keepdim=True))
        ),
        prior=np.float32(prior.item()),
        going_back=np.float32(going_back.item()),
        gamma=np.float32(settings.gamma),
    )


def _layer(linear: nn.Linear) -> _Layer:
    return _Layer(_array(linear.weight.T), _array(linear.bias))


def _array(tensor: Tensor) -> Floats:
    return np.ascontiguousarray(tensor.detach().numpy(), np.float32)


# Plain loops throughout: array expressions compile to the same, ten times slower.


@jit
def _vectors(
    p: _Parameters,
    buckets: int,
    item: npt.NDArray[np.int32],
    name: npt.NDArray[np.uint8],
    age_s: Floats,
    value: Floats,
) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats]:
    """[2B, d + 1] u of all states, then w; [B, d + 1] o; [2B, 1] c, then e; [B, 1] γ V0; [B, H] copy; [B, buckets]
    sums of alike."""
    batch, length = item.shape
    channels, d = p.place.shape[1], p.tower.shape[1]
    vectors = np.zeros((2 * batch, d + 1), np.float32)
    own = np.ones((batch, d + 1), np.float32)
    constants = np.zeros((2 * batch, 1), np.float32)
    ahead = np.zeros((batch, 1), np.float32)
    copy = np.zeros((batch, length), np.float32)
    alike = np.zeros((batch, buckets), np.float32)
    pooled = np.empty(channels * d, np.float32)
    features = np.empty(channels * d + COUNTS, np.float32)
    hidden = np.empty(len(p.hidden.bias), np.float32)
    phi = np.empty(d, np.float32)
    visit = np.empty(len(p.unchosen.weight), np.float32)
    gain = np.empty(len(p.gain.bias), np.float32)
    lean = np.empty(1, np.float32)
    value_hidden = np.empty(len(p.unchosen.bias), np.float32)
    half = len(p.gain_key.bias) // 2
    for b in range(batch):
        _features(p, item[b], name[b], age_s[b], value[b], features, visit[d:], copy[b], alike[b])
        for i in range(len(pooled)):
            pooled[i] = features[i]
        _apply(p.hidden, features, hidden, True)
        _apply(p.out, hidden, phi, False)
        _add(p.mix.weight, pooled, phi)
        _apply(p.lean, phi, lean, False)
        u, w = vectors[b], vectors[batch + b]
        for i in range(d):
            own[b, i] = (phi[i] - p.state_mean[i]) / p.state_scale
            visit[i] = (phi[i] - p.value_mean[i]) / p.value_scale
        _apply(p.gain, visit[:d], gain, False)
        _respond(p, own[b], u)
        constants[b, 0] = lean[0]
        for i in range(d):
            constants[b, 0] -= u[i] * p.item_mean[i]
        for i in range(len(p.organic_key.bias)):  # its last number meets a one
            x = p.prior * (phi[i] if i < d else np.float32(1))
            constants[b, 0] += _add_row(p.organic_key, i, x, u)
        u[d] = p.prior
        for i in range(2 * half):
            x = gain[i] if i < half else p.gamma * gain[i]
            constants[batch + b, 0] += _add_row(p.gain_key, i, x, w)
        _apply(p.unchosen, visit, value_hidden, True)
        _apply(p.unchosen_out, value_hidden, ahead[b], False)
        ahead[b, 0] *= p.gamma
    return vectors, own, constants, ahead, copy, alike


@jit
def _pull(
    log_odds: Floats,
    ascending: npt.NDArray[np.int64],
    order: npt.NDArray[np.int64],
    to: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    pull: Floats,
) -> None:
    """Add to what B states say of M items, [B, M], where one is pulled on: the items with vocabulary ids `to`, [B, E],
    0 for none. ascending: [M] ids of the M; order: [M] which item each is;
    first: [B, E] where `to` would stand among these."""
    for b in range(len(to)):
        for e in range(to.shape[1]):
            at = first[b, e]
            while to[b, e] > 0 and at < len(ascending) and ascending[at] == to[b, e]:
                log_odds[b, order[at]] += pull[b, e]
                at += 1


@jit
def _respond(p: _Parameters, own: Floats, u: Floats) -> None:
    """u = (M, μ)' [φ̄, 1], of the first d numbers."""
    for i in range(len(own)):
        for j in range(p.shared.shape[1]):
            u[j] += own[i] * p.shared[i, j]


@jit
def _features(
    p: _Parameters,
    item: npt.NDArray[np.int32],
    name: npt.NDArray[np.uint8],
    age_s: Floats,
    value: Floats,
    features: Floats,
    sums: Floats,
    copy: Floats,
    alike: Floats,
) -> None:
    """Fill in what `HistoryEncoder` pools, counts and sums of one history, its `copy`, and its `alike` by category."""
    channels, n, d = p.place.shape[1], len(p.tower), p.tower.shape[1]
    for i in range(len(features)):
        features[i] = 0
    for i in range(d + 1):
        sums[i] = 0
    total = np.empty(channels, np.float32)
    for c in range(channels):
        total[c] = LEAST
    kinds = np.zeros(len(item), np.int64)
    items = 0
    counts = channels * d
    ends = counts + 2 * NAMES
    for h in range(len(item)):
        if name[h] == 0:
            continue
        age = 0
        for bound in BOUNDS:
            if age_s[h] >= bound:
                age += 1
        kind = kinds[h] = name[h] * AGES + age
        vector = p.tower[item[h]] if item[h] < n else p.more_tower[item[h] - n]
        for c in range(channels):
            weight = p.kind[kind, c] * p.place[h, c]
            total[c] += weight
            for j in range(d):
                features[c * d + j] += weight * vector[j]
        one = np.float32(1 / SUM_SCALE)
        for j in range(d):
            sums[j] += one * vector[j]
        sums[d] += one
        if item[h] > 0:
            copy[h] = p.copy[kind]
            items += 1
        if age < SESSION_AGES:
            features[counts + name[h]] += 1
            features[ends + 1] = max(features[ends + 1], age_s[h])
        else:
            features[counts + NAMES + name[h]] += 1
        features[ends + 2] += min(max(value[h], np.float32(0)), np.float32(MOST_VALUE))
    for h in range(len(item)):
        if item[h] > 0 and p.going_back != 0:
            same = 0
            for other in item:
                same += other == item[h]
            copy[h] += p.going_back / np.sqrt(np.float32(same * items))
    for c in range(channels):
        for j in range(d):
            features[c * d + j] /= total[c]
    for h in range(len(item)):
        category = p.category[item[h]] if item[h] < n else p.more_category[item[h] - n]
        if name[h] > 0 and category > 0:
            alike[category] += p.alike[kinds[h]]
            for c in range(channels):
                alike[category] += p.kind[kinds[h], c] * p.place[h, c] / total[c] * p.share[c]
    if name[0] > 0:
        features[ends] = age_s[0]
    else:
        features[ends + 3] = 1  # empty
    if name[-1] > 0:
        features[ends + 4] = 1  # full
    for i in range(counts, ends):
        features[i] = np.log1p(features[i])
    for i in range(ends, ends + 3):
        features[i] = np.log1p(features[i]) / np.float32(10)
    for i in range(COUNTS):
        sums[d + 1 + i] = features[counts + i]


@jit
def _apply(layer: _Layer, x: Floats, y: Floats, positive: bool) -> None:
    """y = x · weight + bias; what is negative becomes 0 where `positive`."""
    for j in range(len(y)):
        y[j] = layer.bias[j]
    _add(layer.weight, x, y)
    if positive:
        for j in range(len(y)):
            y[j] = max(y[j], np.float32(0))


@jit
def _add(weight: Floats, x: Floats, y: Floats) -> None:
    """y += x · weight."""
    for i in range(len(x)):
        if x[i] != 0:
            for j in range(weight.shape[1]):
                y[j] += x[i] * weight[i, j]


@jit
def _add_row(key: _Layer, i: int, x: np.float32, y: Floats) -> np.float32:
    """y += x · weight[i]; returns x · bias[i]."""
    for j in range(key.weight.shape[1]):
        y[j] += x * key.weight[i, j]
    return x * key.bias[i]
