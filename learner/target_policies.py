"""The policies that may be judged, as scores of items: each is ε-greedy by its scores, as a server is.

logging            what was served
uniform            every item that can be had, with the same probability
popularity         what users did most with so far, as a server ranks that has no weights
weights            the version that a label names
weights:VERSION    one version of the weight store
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from learner.policy import Candidate, Policy
from learner.replay import Histories
from streaming.columns import Columns, Kind
from streaming.commandline import nearest
from streaming.interning import Vocabulary, hash_string
from streaming.rewards import CODES, EVENT_NAMES, HISTORY_NAMES, RewardTable

LOGGING: Final = "logging"
NAMES: Final = (LOGGING, "uniform", "popularity", "weights", "weights:VERSION")
LEAST: Final = np.float32(-1e30)  # of what a policy does not know, or has no finite number for: last of all
_EVENT_WEIGHT: Final = np.isin(np.arange(len(EVENT_NAMES)), [CODES[name] for name in HISTORY_NAMES])

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.floating]


def policy_names(text: str) -> tuple[str, ...]:
    """Read `--policies`: names, comma-separated. Raises: ValueError, naming the nearest that there is."""
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    for name in names:
        if name not in NAMES[:-1] and not re.fullmatch(r"weights:\d{1,18}", name):
            raise ValueError(f"no such policy {name!r}; {nearest(name, NAMES)}")
    if not names:
        raise ValueError(f"no policy named; some of {', '.join(NAMES)}")
    return tuple(dict.fromkeys(names))


class Contexts(NamedTuple):
    """B decisions that are judged together; items by the log's vocabulary ids."""

    states: Histories  # [B, H] newest entry first
    candidates: (
        Sequence[Candidate] | None
    )  # of the one decision that this is then (B = 1); None: the whole catalog
    items: npt.NDArray[np.integer]  # [M] ids of what may be scored; 0: a candidate without one


class Target(Protocol):
    """A policy to be judged."""

    name: str
    epsilon: float  # share of slots drawn uniformly

    def observe(self, columns: Columns) -> None:
        """Take note of these records, once what is in them was judged."""

    def scores(self, contexts: Contexts) -> Scores:
        """[B, M] of the items; the higher, the sooner shown."""

    def allows(self, contexts: Contexts) -> Mask:
        """[M] of the items: those that this policy might show at all, by what it knows of what is on offer."""

    def knows(self, contexts: Contexts) -> Mask:
        """[M] of the items: those that it could show where they are on offer."""


class Uniform:
    """Every item with the same probability."""

    name = "uniform"
    epsilon = 1.0

    def observe(self, columns: Columns) -> None:
        """Nothing to learn."""

    def scores(self, contexts: Contexts) -> Scores:
        return np.zeros((len(contexts.states.item), len(contexts.items)), np.float32)

    def allows(self, contexts: Contexts) -> Mask:
        return np.ones(len(contexts.items), np.bool_)

    def knows(self, contexts: Contexts) -> Mask:
        return self.allows(contexts)


class Popularity:
    """By what users did with the items so far, weighted by the reward table; older deeds count less.

    Items that nobody has gone to yet come last, by lot: their ids follow the log, and would tell what comes next in it.
    """

    name = "popularity"

    def __init__(
        self, vocabulary: Vocabulary, rewards: RewardTable, half_life: float, epsilon: float
    ) -> None:
        """vocabulary: the log's, complete. half_life: of a deed's weight, in events."""
        self.epsilon = epsilon
        self._score = np.zeros(len(vocabulary) + 1)
        hashes = [hash_string(item_id) for item_id in vocabulary.item_ids()]
        self._lot = np.array([0, *hashes], np.uint64) / 2.0**64  # [N] in 0..1, the lower the sooner
        # a refund makes an item no less popular
        self._weight = np.maximum(rewards.columns()[0], 0.0) * _EVENT_WEIGHT
        self._half_life = half_life

    def observe(self, columns: Columns) -> None:
        lines = np.diff(columns.item_bounds)
        counts = (columns.kind == Kind.EVENT) & _EVENT_WEIGHT[columns.name] & (lines > 0)
        # of n events the first has the others behind it
        age = counts.sum() - np.cumsum(counts)
        worth = self._weight[columns.name] * counts * 0.5 ** (age / self._half_life)
        self._score *= 0.5 ** (counts.sum() / self._half_life)
        # an item that was not known when this began is nobody's
        item = np.where(columns.item < len(self._score), columns.item, 0)
        np.add.at(self._score, item, np.repeat(worth, lines))

    def scores(self, contexts: Contexts) -> Scores:
        score = self._score[contexts.items] * (contexts.items > 0)
        if contexts.candidates is None:  # these stand as the request had them
            score = np.where(score > 0, score, -self._lot[contexts.items])
        return np.broadcast_to(score, (len(contexts.states.item), len(score)))

    def allows(self, contexts: Contexts) -> Mask:
        return np.ones(len(contexts.items), np.bool_)

    def knows(self, contexts: Contexts) -> Mask:
        return self.allows(contexts)


class Learned:
    """One version of the weights."""

    def __init__(
        self,
        name: str,
        policy: Policy,
        vocabulary: Vocabulary,
        known: Mask,
        epsilon: float,
        read_to: Mapping[int, int] | None = None,
    ) -> None:
        """vocabulary: the log's, complete. known: [N] what the catalog's topic tells of by itself, so that the weights
        are not asked whether it may be shown. read_to: partition -> offset, before which lies what these weights
        were learnt from; None: that is another log."""
        self.name, self.epsilon, self.policy = name, epsilon, policy
        self._read_to = dict(read_to or {})
        item_ids = vocabulary.item_ids()
        self._theirs = np.append(0, policy.ids(item_ids))  # [N] by the log's id; 0: unknown to the policy
        self._allowed = (self._theirs > 0) & (known | policy.on_offer[self._theirs])

    def has_read(self, columns: Columns, rows: npt.NDArray[np.integer]) -> Mask:
        """[R] which of these records the learner of these weights had read."""
        ends = [self._read_to.get(partition, 0) for partition in columns.partition[rows].tolist()]
        before: Mask = columns.offset[rows] < np.array(ends, np.int64)
        return before

    def observe(self, columns: Columns) -> None:
        """Frozen."""

    def scores(self, contexts: Contexts) -> Scores:
        states = self._translated(contexts.states)
        if contexts.candidates is not None:
            return _finite(self.policy.q_candidates(states, contexts.candidates))[None]
        theirs = self._theirs[contexts.items]
        q = _finite(self.policy.q(states))[:, theirs]
        q[:, theirs == 0] = LEAST
        return q

    def allows(self, contexts: Contexts) -> Mask:
        if contexts.candidates is not None:
            return np.ones(len(contexts.items), np.bool_)
        return self._allowed[contexts.items]

    def knows(self, contexts: Contexts) -> Mask:
        if contexts.candidates is not None:
            return self.allows(contexts)
        return self._theirs[contexts.items] > 0

    def _translated(self, states: Histories) -> Histories:
        """The states in the policy's ids and at its length."""
        length = self.policy.history_length
        columns = []
        for column in states:
            cut = np.zeros((len(column), length), column.dtype)
            have = min(length, column.shape[1])
            cut[:, :have] = column[:, :have]
            columns.append(cut)
        item, name, age_s, value = columns
        return Histories(self._theirs[item].astype(np.int32), name, age_s, value)


def _finite(q: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return q if np.isfinite(q).all() else np.where(np.isfinite(q), q, LEAST)
