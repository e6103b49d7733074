"""Rank, then learn: how well the next item would have been foretold, step by step along the stream.

Each item that a user went to (organic steps, and slots that earned something) is ranked among all items known, in the
state just before, by what the network was at that moment; only then is it learnt from. Beside it stand rules that
anybody can have for nothing. "The user's most recent distinct items" beats many published tables: a learner that
is below it has learnt less than the user's own history tells.

Popularity and co-views are what this process has seen so far, updated every BLOCK steps, while the network learns when
the whole batch is in: the rules have the fresher view. Ties are broken by chance, the same whenever it is run: a
catalog made of a log names items in the order in which they will be gone to, and must not tell it.

All items known are those of the catalog, too, where there is one: an item may be ranked before anybody went to it, by
what the catalog says of it. `met` is of the steps to items that somebody had gone to before.

Intervals are over visits: steps of one visit are alike, and no witnesses independent of each other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.agent import Agent
from learner.co_views import CoViews
from learner.entries import StateTensors
from learner.intervals import student_t
from learner.recall import newest_entries
from streaming.interning import Vocabulary
from streaming.rewards import RewardTable
from streaming.transitions import Joined

TOP: Final = 20  # hit rate and reciprocal rank count down to this place
BLOCK: Final = 256  # steps ranked at once, at most
MOST_OPEN: Final = 1 << 20  # visits that may go on
_GOLDEN: Final = 0x9E3779B97F4A7C15  # odd: products with it are all different (Knuth 6.4)
_NEWEST: Final = 8  # items of the user's that `alike` puts first
_MOST_SCORES: Final = 1 << 24  # at once: bounds memory where there are very many items
METHODS: Final = {
    "learned_q": "the network's Q(s, a)",
    "learned_next_item": "the network's next-item head, which Q leans on",
    "recent_then_learned": "the user's most recent distinct items, then the next-item head",
    "co_views": "item-kNN: what users went to around the same time as the user's items, and these",
    "walks": "the same, and what users went to around the same time as those",
    "alike": "the user's 8 most recent distinct items, then those of the newest one's category, its brand first, by "
    "popularity",
    "recent": "the user's most recent distinct items, then popularity",
    "popularity": "how often users went to an item so far",
}

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class _Steps(NamedTuple):
    """B states, and the item that each led to."""

    item: npt.NDArray[np.int32]  # [B, H] newest first, 0 padding or unknown
    name: npt.NDArray[np.uint8]  # [B, H]
    age_s: npt.NDArray[np.float32]  # [B, H]
    value: npt.NDArray[np.float32]  # [B, H]
    target: Ints  # [B]
    visit: Ints  # [B] number of the visit
    reward: npt.NDArray[np.float32]  # [B] when the step was complete

    def rows(self, which: Any) -> _Steps:
        return _Steps(*(column[which] for column in self))


class Ranked(NamedTuple):
    """N steps that were ranked."""

    number: Ints  # [N] of the step, from 0 along the stream
    rank: Ints  # [N, len(METHODS)] the target's place among all items, from 1
    known: Mask  # [N] there was an item in the user's history
    repeat: Mask  # [N] the item is in the user's history
    met: Mask  # [N] somebody went to it before
    visit: Ints  # [N] number of the visit that it is a step of
    reward: npt.NDArray[np.float32]  # [N]

    def rows(self, which: Any) -> Ranked:
        """These steps."""
        return Ranked(*(column[which] for column in self))


class Prequential:
    """Watches the transitions that a learner is about to take in. At most `most` ranked steps are kept, evenly spread:
    when there are more, every second one is dropped, and from then on only so many are ranked.

    rewards: the table in use, by which carts and purchases are told apart from views.
    """

    def __init__(
        self, vocabulary: Vocabulary, rewards: RewardTable | None = None, most: int = 32_768
    ) -> None:
        if most < 3:
            raise ValueError(f"most must be at least 3 steps, not {most}")
        self._vocabulary, self._rewards, self._most = vocabulary, rewards or RewardTable(), most
        self._visits = np.zeros(1, np.int64)  # [N] by vocabulary id: popularity
        self._co_views = CoViews()
        self._visits_open: dict[tuple[int, int], int] = {}  # step that comes next -> number of its visit
        self._visits_begun = 0
        self._steps = 0
        self._every = 1
        self._ranked = [Ranked(*_NOTHING)]
        self._kept = 0

    def observe(self, joined: Joined, agent: Agent) -> None:
        """Rank what these transitions led to, before the agent learns from them."""
        steps = _steps_of(joined, self._visits_of(joined))
        if not len(steps.target):
            return
        if agent.rows > len(self._visits):
            self._visits = np.concatenate((self._visits, np.zeros(agent.rows - len(self._visits), np.int64)))
            self._co_views.grow(agent.rows)
        scorer = _Scorer(agent)
        size = max(1, min(BLOCK, _MOST_SCORES // agent.rows))
        for start in range(0, len(steps.target), size):
            block = steps.rows(slice(start, start + size))
            numbers = self._steps + np.arange(len(block.target))
            chosen = numbers % self._every == 0
            if chosen.any():
                met = self._visits[block.target] > 0
                met |= ~np.isin(np.arange(len(met)), np.unique(block.target, return_index=True)[1])
                self._rank(block.rows(chosen), numbers[chosen], met[chosen], scorer)
            self._steps += len(block.target)
            np.add.at(self._visits, block.target, 1)
            self._co_views.observe(block.item, block.target)

    def _visits_of(self, joined: Joined) -> Ints:
        """[T] number of the visit that each transition is of: a step goes on the visit of the one that it follows."""
        t, states, opened = joined.transitions, joined.states, self._visits_open
        visit = np.empty(len(t.action), np.int64)
        place = list(zip(t.partition.tolist(), t.offset.tolist(), strict=True))
        following = list(zip(states.partition.tolist(), states.offset.tolist(), strict=True))
        for i, next_state in enumerate(t.next_state.tolist()):
            if i and place[i] == place[i - 1]:  # another slot of the same step
                visit[i] = visit[i - 1]
                continue
            number = opened.pop(place[i], None)
            if number is None:
                number = self._visits_begun
                self._visits_begun += 1
            visit[i] = number
            if next_state >= 0:
                opened[following[next_state]] = number
        while len(opened) > MOST_OPEN:
            del opened[next(iter(opened))]
        return visit

    def ranked(self) -> Ranked:
        """What was kept, in the order of the stream."""
        self._ranked = [Ranked(*(np.concatenate(columns) for columns in zip(*self._ranked, strict=True)))]
        return self._ranked[0]

    def report(self) -> dict[str, Any]:
        """Hit rate@20 and MRR@20 of each method: overall, by thirds of the stream, and for kinds of steps."""
        ranked = self.ranked()
        thirds = np.array_split(np.arange(len(ranked.number)), 3)
        cart, bought = (self._rewards.reward(name) for name in ("add_to_cart", "purchase"))
        return {
            "steps": self._steps,
            "ranked": len(ranked.number),
            "sampled": 1 / self._every,
            "items": len(self._vocabulary),
            "top": TOP,
            "methods": METHODS,
            "all": _figures(ranked),
            "thirds": [_figures(ranked.rows(third)) for third in thirds],
            "with_history": _figures(ranked.rows(ranked.known)),
            "met": _figures(ranked.rows(ranked.known & ranked.met)),
            "first_time": _figures(ranked.rows(~ranked.repeat)),
            "repeat": _figures(ranked.rows(ranked.repeat)),
            # by what a step had earned when the next one came
            "carts_or_more": _figures(ranked.rows(ranked.reward >= cart)),
            "purchases": _figures(ranked.rows(ranked.reward >= bought)),
        }

    def write(self, path: str | Path) -> None:
        """The report as a JSON file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(self.report(), indent=2) + "\n")
        part.replace(path)

    def _rank(self, steps: _Steps, numbers: Ints, met: Mask, scorer: _Scorer) -> None:
        organic, q = scorer.ranks(steps)
        places = _places(self._visits)  # [N] by vocabulary id
        place = places[steps.target]
        popular = _Ranks(place, places[steps.item] < place[:, None])
        recent = newest_entries(torch.from_numpy(steps.item.astype(np.int64)))[0].numpy()  # [B, H]
        columns = {
            "learned_q": q.place,
            "learned_next_item": organic.place,
            "recent_then_learned": _recent_first(steps, recent, organic),
            "co_views": self._by(self._co_views.scores, steps).place,
            "walks": self._by(self._co_views.walk_scores, steps).place,
            "alike": _recent_first(
                steps, recent & (np.cumsum(recent, axis=1) <= _NEWEST), self._by(scorer.alike, steps)
            ),
            "recent": _recent_first(steps, recent, popular),
            "popularity": popular.place,
        }
        repeat = (steps.item == steps.target[:, None]).any(axis=1)
        rank = np.stack([columns[name] for name in METHODS], axis=1)
        known = np.asarray((steps.item > 0).any(axis=1))
        self._ranked.append(Ranked(numbers, rank, known, repeat, met, steps.visit, steps.reward))
        self._kept += len(numbers)
        while self._kept > self._most:
            self._every *= 2
            ranked = self.ranked()
            self._ranked = [ranked.rows(ranked.number % self._every == 0)]
            self._kept = len(self._ranked[0].number)

    def _by(self, scores_of: Callable[[Any, int], npt.NDArray[np.float32]], steps: _Steps) -> _Ranks:
        """Items that are nobody's neighbours by popularity."""
        scores = scores_of(steps.item, len(self._visits))
        scores += (1e-6 / max(1, self._visits.max()) * self._visits).astype(np.float32)
        history, target = (torch.from_numpy(x.astype(np.int64)) for x in (steps.item, steps.target))
        return _ranks_of(torch.from_numpy(scores), history, target)


class _Ranks(NamedTuple):
    """Where one method puts the targets among all items."""

    place: Ints  # [B] of the target, from 1
    ahead: Mask  # [B, H] this entry of the history stands before the target; of padding it means nothing


class _Scorer:
    """The network as it is now."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._keys = agent.all_keys(agent.online)

    def alike(self, history: npt.NDArray[np.int32], items: int) -> npt.NDArray[np.float32]:
        """[B, items] how like each is to the newest one of a history [B, H] that is known: 2 of the same category and
        brand, 1 of the same category, by what the catalog says."""
        category, brand = (
            getattr(self._agent.items, name).cpu().numpy()[:items] for name in ("category", "brand")
        )
        newest = history[np.arange(len(history)), (history > 0).argmax(axis=1)]
        same = (category[newest][:, None] == category) & (category[newest] > 0)[:, None]
        both = same & (brand[newest][:, None] == brand) & (brand[newest] > 0)[:, None]
        return same.astype(np.float32) + both

    @torch.no_grad()
    def ranks(self, steps: _Steps) -> tuple[_Ranks, _Ranks]:
        """By the next-item head, and by Q."""
        device, network = self._agent.device, self._agent.online
        state = StateTensors(
            torch.as_tensor(steps.item.astype(np.int64), device=device),
            torch.as_tensor(steps.name.astype(np.int64), device=device),
            torch.as_tensor(steps.age_s, device=device),
            torch.as_tensor(steps.value, device=device),
        )
        queries = network.queries(state, self._keys)
        target = torch.as_tensor(steps.target, device=device)
        return (
            _ranks_of(network.next_all(queries, self._keys), state.item, target),
            _ranks_of(network.q_all(queries, self._keys), state.item, target),
        )


def _ranks_of(scores: Tensor, history: Tensor, target: Tensor) -> _Ranks:
    """By scores [B, N], which are spoilt; id 0 is no item."""
    scores[:, 0] = -torch.inf
    lot = torch.from_numpy(lots(scores.shape[1])).to(scores.device)
    wanted = target.unsqueeze(1)
    own, theirs, drawn = scores.gather(1, wanted), scores.gather(1, history), lot[wanted]
    before = (scores > own) | ((scores == own) & (lot < drawn))
    ahead = (theirs > own) | ((theirs == own) & (lot[history] < drawn))
    return _Ranks((before.sum(dim=1) + 1).cpu().numpy(), ahead.cpu().numpy())


def lots(items: int) -> Ints:
    """[items] a number of its own for each id, whose order tells nothing of theirs: the lower wins ties. An id's number
    is the same however many there are."""
    return (np.arange(items, dtype=np.uint64) * np.uint64(_GOLDEN)).view(np.int64)


def _places(score: Ints) -> Ints:
    """[N] each item's place by falling score, from 1; id 0 comes last."""
    order = np.lexsort((lots(len(score))[1:], -score[1:])) + 1
    places = np.full(len(score), len(score), np.int64)
    places[order] = np.arange(1, len(score))
    return places


def _recent_first(steps: _Steps, recent: Mask, rest: _Ranks) -> Ints:
    """[B] the target's place if the user's items come first, newest first, then all others as they stand in rest."""
    here = recent & (steps.item == steps.target[:, None])
    place = np.cumsum(recent, axis=1)  # from 1
    # what was ahead of the target anyway does not push it back once more
    behind = rest.place + (recent & ~rest.ahead).sum(axis=1)
    return np.where(here.any(axis=1), (place * here).max(axis=1, initial=0), behind)


def _steps_of(joined: Joined, visit: Ints) -> _Steps:
    t = joined.transitions
    went = np.flatnonzero((t.organic | (t.reward > 0)) & (t.action > 0))
    states, rows = joined.states, t.state[went]
    return _Steps(
        states.item[rows],
        states.name[rows],
        states.age_s[rows],
        states.value[rows],
        t.action[went].astype(np.int64),
        visit[went],
        t.reward[went],
    )


def _figures(ranked: Ranked) -> Mapping[str, Any]:
    """Hit rate and mean reciprocal rank of each method, with the half-widths of their 95 % intervals."""
    n = len(ranked.number)
    visit = np.unique(ranked.visit, return_inverse=True)[1].reshape(-1)
    out: dict[str, Any] = {"steps": n, "visits": int(visit.max(initial=-1)) + 1}
    for column, method in enumerate(METHODS if n else ()):
        rank = ranked.rank[:, column]
        hit = rank <= TOP
        gain = np.where(hit, 1.0 / rank, 0.0)
        out[method] = {
            f"hit_rate_at_{TOP}": round(float(hit.mean()), 5),
            "ci95": half_width(hit.astype(np.float64), visit),
            f"mrr_at_{TOP}": round(float(gain.mean()), 5),
            "mrr_ci95": half_width(gain, visit),
        }
    return out


def half_width(values: npt.NDArray[np.float64], group: Ints) -> float | None:
    """Of the 95 % interval of the values' mean, where those of one group (from 0) hang together: the mean's linearised
    variance over groups (Cochran 1977, 6.4, a ratio of sums), with Student's t. None: there are fewer than two groups.

    >>> half_width(np.array([0.0, 1.0, 0.0, 1.0]), np.arange(4)), half_width(np.array([0.0, 1.0]), np.zeros(2, int))
    (0.91856, None)
    """
    off = np.bincount(group, values - values.mean())
    groups = len(off)
    if groups < 2:
        return None
    spread = (np.square(off).sum() * groups / (groups - 1)) ** 0.5
    return round(float(student_t(groups - 1) * spread / len(values)), 5)


_NOTHING: Final = (
    np.empty(0, np.int64),
    np.empty((0, len(METHODS)), np.int64),
    np.empty(0, np.bool_),
    np.empty(0, np.bool_),
    np.empty(0, np.bool_),
    np.empty(0, np.int64),
    np.empty(0, np.float32),
)
