"""Queries → slates, a batch at a time: by the learnt Q-values, or by popularity where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from learner.exploration import GREEDY, Exploration, Scores, epsilon_greedy_slate, explore
from learner.policy import Candidate, Entry, Policy
from learner.replay import Histories
from serving import metrics
from serving import policy_pb2 as pb
from serving.view import View
from serving.weights import WeightsFollower

Mask = npt.NDArray[np.bool_]

_NEVER: Final = np.float32(-1e30)  # in place of a Q that is not finite: last of all, yet a number


class Query(NamedTuple):
    """One user's question."""

    history: list[Entry]  # oldest first
    now_ms: int
    slate_size: int
    epsilon: float
    excluded: AbstractSet[str]  # item ids
    candidates: Sequence[Candidate]  # rank only these; empty: the whole catalog
    exploration: Exploration = GREEDY  # of slots that epsilon does not draw


class Answer(NamedTuple):
    """K slots, best first."""

    item_ids: list[str]
    propensity: list[float]
    q: list[float]  # reward units; 0 by popularity
    explored: list[bool]
    policy_version: int  # 0: popularity
    exploration: Exploration  # by which it was filled
    strategy: Any  # pb.Strategy


class Ranker:
    """Answers batches of queries; called by one thread at a time."""

    def __init__(self, weights: WeightsFollower, view: View, rng: np.random.Generator) -> None:
        self._weights = weights
        self._view = view
        self._rng = rng
        self._shelf = _Shelf(view)
        self.on_offer = 0  # items that may be shown, by the weights used last

    def rank(self, queries: Sequence[Query]) -> list[Answer]:
        """One answer for each query, all from one version of the weights."""
        metrics.BATCH_SIZE.observe(len(queries))
        served = self._weights.served  # read once: the answers come from one version
        if served is None or not served.policy.items:
            return [self._by_popularity(query) for query in queries]
        return self._by_q(served.policy, queries)

    def _by_q(self, policy: Policy, queries: Sequence[Query]) -> list[Answer]:
        histories, now_ms = [query.history for query in queries], [query.now_ms for query in queries]
        states = policy.encode(histories, now_ms, self._view.described.get)
        eligible = self._shelf.eligible(policy)
        self.on_offer = self._shelf.on_offer
        answers: dict[int, Answer] = {}
        whole = [i for i, query in enumerate(queries) if not query.candidates]
        for exploration in dict.fromkeys(queries[i].exploration for i in whole):
            rows = [i for i in whole if queries[i].exploration == exploration]
            # each is done with before the next is drawn: see Policy.scores
            for i, scores in zip(
                rows, policy.scores(_rows(states, rows), exploration, self._rng), strict=True
            ):
                allowed = eligible.copy()
                allowed[policy.ids(list(queries[i].excluded))] = False
                answers[i] = self._answer(policy, queries[i], scores, allowed)
        for i, query in enumerate(queries):
            if query.candidates:
                state, allowed = _rows(states, [i]), self._eligible_candidates(query)
                scores = policy.scores_of_candidates(state, query.candidates, query.exploration, self._rng)
                answers[i] = self._answer(policy, query, scores, allowed)
        return [answers[i] for i in range(len(queries))]

    def _answer(self, policy: Policy, query: Query, scores: Scores, allowed: Mask) -> Answer:
        """scores, allowed: of the query's candidates, or of all items."""
        scores = _finite(scores)
        slate = explore(query.exploration, scores, allowed, query.slate_size, query.epsilon, self._rng)
        rows = slate.ids.tolist()
        return Answer(
            [query.candidates[row].item_id if query.candidates else policy.item_id(row) for row in rows],
            slate.propensity.tolist(),
            scores.q[slate.ids].tolist(),
            slate.explored.tolist(),
            policy.version,
            query.exploration,
            pb.LEARNED,
        )

    def _by_popularity(self, query: Query) -> Answer:
        names = self._view.items()
        items = len(names) - 1
        scores = self._view.users.popularity(items)
        if query.candidates:
            item_ids = [candidate.item_id for candidate in query.candidates]
            ids = self._view.vocabulary.ids(item_ids)
            scores = scores[np.where(ids <= items, ids, 0)] * (ids > 0)
            allowed = self._eligible_candidates(query)
        else:
            item_ids = names
            allowed = ~self._shelf.off(items)
            allowed[0] = False
            excluded = self._view.vocabulary.ids(list(query.excluded))
            allowed[excluded[excluded <= items]] = False
        slate = epsilon_greedy_slate(scores, allowed, query.slate_size, query.epsilon, self._rng)
        return Answer(
            [item_ids[row] for row in slate.ids.tolist()],
            slate.propensity.tolist(),
            [0.0] * len(slate.ids),
            slate.explored.tolist(),
            0,
            GREEDY,
            pb.POPULARITY,
        )

    def _eligible_candidates(self, query: Query) -> Mask:
        """[M] of the candidates: those not excluded, unless the catalog says that they cannot be had."""
        off = self._shelf.off(len(self._view.items()) - 1)
        ids = self._view.vocabulary.ids([candidate.item_id for candidate in query.candidates])
        allowed: Mask = ~off[np.where(ids < len(off), ids, 0)]
        for row, candidate in enumerate(query.candidates):
            allowed[row] &= candidate.item_id not in query.excluded
        return allowed


class _Shelf:
    """What may be recommended, computed anew only when catalog, items or policy have changed."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._known_at: tuple[int, int] | None = None
        self._known: Mask = np.zeros(1, np.bool_)
        self._off: Mask = np.zeros(1, np.bool_)
        self._policy: Policy | None = None
        self._rows = np.zeros(1, np.int32)  # view's vocabulary id → policy's, 0: unknown to it
        self._eligible_at: tuple[Policy, int, int] | None = None
        self._eligible: Mask = np.zeros(1, np.bool_)
        self.on_offer = 0  # how many are eligible

    def off(self, items: int) -> Mask:
        """[items + 1] by the view's vocabulary id: out of stock, or gone. Not to be changed."""
        at = (self._view.catalog_version, items)
        if self._known_at != at:
            self._known, self._off = self._view.availability(items)
            self._known_at = at
        return self._off

    def eligible(self, policy: Policy) -> Mask:
        """[policy.items + 1] by the policy's vocabulary id. The view's catalog is the newer one where it knows
        an item; for others the weights say. Not to be changed."""
        items = len(self._view.items()) - 1
        at = (policy, self._view.catalog_version, items)
        if self._eligible_at != at:
            off = self.off(items)
            rows = self._map(policy, items)
            known = self._known & (rows > 0)
            self._eligible = policy.on_offer.copy()
            self._eligible[rows[known]] = ~off[known]
            self._eligible[0] = False
            self.on_offer = int(self._eligible.sum())
            self._eligible_at = at
        return self._eligible

    def _map(self, policy: Policy, items: int) -> npt.NDArray[np.int32]:
        """[items + 1] view's vocabulary id → policy's. Where the version before numbers items alike, as those of
        one learner do, only items that it did not know are looked up again."""
        rows = np.zeros(items + 1, np.int32)
        if self._policy is not None and policy.numbers_as(self._policy):
            rows[: len(self._rows)] = self._rows[: items + 1]
        rows[rows > policy.items] = 0  # the label moved back to a version with fewer items
        unknown = np.flatnonzero(rows == 0)[1:]
        names = self._view.items()
        rows[unknown] = policy.ids([names[i] for i in unknown.tolist()])
        self._policy, self._rows = policy, rows
        return rows


def _rows(states: Histories, rows: list[int]) -> Histories:
    """The states of these rows, which ascend."""
    if len(rows) == len(states.item):
        return states
    return Histories(states.item[rows], states.name[rows], states.age_s[rows], states.value[rows])


def _finite(scores: Scores) -> Scores:
    """With the last place of all for what is not a number."""
    return Scores(_number(scores.q), None if scores.drawn is None else _number(scores.drawn))


def _number(q: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return q if np.isfinite(q).all() else np.where(np.isfinite(q), q, _NEVER)
