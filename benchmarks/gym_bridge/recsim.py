"""RecSim's interest evolution (Ie et al. 2019): a viewer picks from three of ten videos, until the evening is used up.

Good topics give back most of the time that they take, bad ones take more than they last: who shows only what is liked
most (myopic) ends evenings early. Videos are new on every page; what is known of one is its topic, and how much the
viewer likes that topic. Each session has a random stream of its own, so that all agents meet the same viewers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.gym_bridge import worlds
from benchmarks.gym_bridge.storefront import Deed, Page
from learner.policy import Candidate
from streaming.rewards import RewardTable

TOPICS: Final = 20
CANDIDATES: Final = 10
SLATE: Final = 3
# of UtilityModelVideoSampler and UtilityModelUserSampler, for the agent that knows them
QUALITY: Final = np.concatenate((np.linspace(-3.0, 0.0, 14), np.linspace(0.0, 3.0, 6)))
MINUTES: Final = 4.0  # a video's length
GIVEN_BACK: Final = 0.9 / 3.4  # share of it, for each unit of quality
PENALTY: Final = 0.5  # minutes that a page without a choice costs
NO_CHOICE: Final = 2.0  # weight of choosing nothing, beside 1 + interest of each video shown


class RecSim:
    """RecSim 0.2.4's interest evolution with the `reset` and `step` of Gymnasium.

    Observations: (interests [20], ids of the videos on offer, their topics, index of the one watched or None, minutes
    watched). Actions: indices of three videos. Raises: worlds.WorldMissing.
    """

    def __init__(self, seed: int) -> None:
        module = worlds.recsim()
        self._seed = seed
        about = {"num_candidates": CANDIDATES, "slate_size": SLATE, "resample_documents": True, "seed": seed}
        self._env = module.create_environment(about)
        inner = self._env.environment
        self._samplers = (inner._document_sampler, inner.user_model._user_sampler)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """options["user"]: which session."""
        session = int((options or {})["user"])
        np.random.seed([self._seed, session, 0])  # their choice model draws from numpy's global state
        for stream, sampler in enumerate(self._samplers, 1):
            sampler._rng = np.random.RandomState([self._seed, session, stream])
        return self._read(self._env.reset(), None, 0.0), {}

    def step(self, action: Sequence[int]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """action: indices of the videos shown."""
        found, minutes, over, _ = self._env.step(list(action))
        watched = [i for i, answer in zip(action, found["response"], strict=True) if answer["click"]]
        seen = self._read(found, watched[0] if watched else None, float(minutes))
        return seen, float(minutes), bool(over), False, {}

    @property
    def interests(self) -> npt.NDArray[np.float64]:
        """[20] of the viewer, by topic."""
        likes: npt.NDArray[np.float64] = self._env.environment.user_model._user_state.user_interests
        return likes

    def _read(self, found: dict[str, Any], watched: int | None, minutes: float) -> Any:
        topics = [int(features.argmax()) for features in found["doc"].values()]
        return found["user"].copy(), list(found["doc"]), topics, watched, minutes


class RecSimShop:
    """A minute watched earns 1; the next page counts as much as this one's."""

    rewards: Final = RewardTable.parse("select_item=0+1*value")
    slate_size: Final = SLATE
    horizon: Final = "session"
    step_s: Final = 10.0

    def __init__(self, by_topic: bool) -> None:
        """by_topic: the videos of a topic on one page are called its first, second, ..., on every page, and stand in
        the catalog; else each video has an id of its own, and nothing but its features comes again."""
        self._by_topic = by_topic
        self._ids: list[str] = []

    def catalog(self) -> list[dict[str, Any]]:
        """See Storefront."""
        numbered = (
            [(topic, n) for topic in range(TOPICS) for n in range(CANDIDATES)] if self._by_topic else []
        )
        return [
            {"item_id": f"topic-{topic}-{n}", "category": f"topic-{topic}", "vector": _features(topic, 0.0)}
            for topic, n in numbered
        ]

    def page(self, observation: Any) -> Page:
        """See Storefront."""
        interests, videos, topics, watched, minutes = observation
        deeds = []
        if watched is not None:
            deeds.append(Deed("select_item", self._ids[watched], from_slate=True, value=minutes))
        self._ids = self._names(topics) if self._by_topic else [f"video-{video}" for video in videos]
        offered = [
            Candidate(name, f"topic-{topic}", vector=_features(topic, float(interests[topic])))
            for name, topic in zip(self._ids, topics, strict=True)
        ]
        return Page(deeds, offered)

    def action(self, slate: Sequence[str]) -> list[int]:
        """See Storefront."""
        return [self._ids.index(name) for name in slate]

    def _names(self, topics: Sequence[int]) -> list[str]:
        seen = dict.fromkeys(topics, -1)
        names = []
        for topic in topics:
            seen[topic] += 1
            names.append(f"topic-{topic}-{seen[topic]}")
        return names


def _features(topic: int, interest: float) -> list[float]:
    """[21] which topic; how much this viewer likes it, -1..1."""
    vector = [0.0] * (TOPICS + 1)
    vector[topic], vector[TOPICS] = 1.0, interest
    return vector


def known(page: Page) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Topics and interests of the candidates, each [10]."""
    vectors = np.array([candidate.vector for candidate in page.candidates])
    return vectors[:, :TOPICS].argmax(axis=1), vectors[:, TOPICS]


class _Rule:
    """Chooses by what is on the page alone."""

    def recommend(self, user_id: str, page: Page, now_ms: int) -> list[str]:
        """See Recommender."""
        raise NotImplementedError

    def did(self, user_id: str, deeds: Sequence[Deed], times_ms: Sequence[int]) -> None:
        """See Recommender."""

    def shown(self, user_id: str, page: Page, slate: Sequence[str], propensity: float, now_ms: int) -> None:
        """See Recommender."""


class RandomVideos(_Rule):
    """Any three."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 51])

    def recommend(self, user_id: str, page: Page, now_ms: int) -> list[str]:
        """See Recommender."""
        drawn = self._rng.choice(len(page.candidates), SLATE, replace=False)
        return [page.candidates[i].item_id for i in drawn]


class Myopic(_Rule):
    """The three liked most: the most minutes from this page."""

    def recommend(self, user_id: str, page: Page, now_ms: int) -> list[str]:
        """See Recommender."""
        _, interests = known(page)
        return [page.candidates[i].item_id for i in np.argsort(-interests, kind="stable")[:SLATE]]


class WhiteBox(_Rule):
    """Knows the rules and what the viewer likes, not what will be on offer: a bound, or close to one.

    An evening is a budget of minutes, worth λ each: the slate is the one of highest E[watched - λ used], and λ the most
    that this viewer's evening can give for a minute, found by Dinkelbach's iteration over pages drawn at random.
    """

    _SLATES: Final = np.array(list(combinations(range(CANDIDATES), SLATE)))  # [120, 3]
    _COST: Final = MINUTES * (1.0 - GIVEN_BACK * QUALITY)  # [20] minutes used by watching one of a topic
    _PAGES: Final = np.random.default_rng(0).integers(0, TOPICS, (64, CANDIDATES))
    _RENEW: Final = 10  # pages after which λ is found anew: what is watched changes what is liked

    def __init__(self, environment: RecSim) -> None:
        self._environment = environment
        self._user_id = ""
        self._pages = 0
        self._worth = 1.4

    def recommend(self, user_id: str, page: Page, now_ms: int) -> list[str]:
        """See Recommender."""
        if user_id != self._user_id:
            self._user_id, self._pages = user_id, 0
        if self._pages % self._RENEW == 0:
            self._worth = self._worth_of_a_minute(self._environment.interests)
        self._pages += 1
        topics, interests = known(page)
        watched, used = self._expected(1.0 + interests, topics)
        return [page.candidates[i].item_id for i in self._SLATES[(watched - self._worth * used).argmax()]]

    def _worth_of_a_minute(self, interests: npt.NDArray[np.float64]) -> float:
        watched, used = self._expected((1.0 + interests)[self._PAGES], self._PAGES)  # [64, 120]
        worth, each = 1.4, np.arange(len(self._PAGES))
        for _ in range(4):
            best = (watched - worth * used).argmax(axis=1)
            worth = float(watched[each, best].sum() / used[each, best].sum())
        return worth

    def _expected(
        self, weight: npt.NDArray[np.float64], topics: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Minutes watched and used by each slate; weight, topics: [..., 10]; each [..., 120]."""
        slates = self._SLATES
        shown = weight[..., slates]
        total = shown.sum(axis=-1) + NO_CHOICE
        used = (weight * self._COST[topics])[..., slates].sum(axis=-1) + PENALTY * NO_CHOICE
        return MINUTES * shown.sum(axis=-1) / total, used / total
