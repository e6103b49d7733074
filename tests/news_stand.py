"""A Gymnasium-style environment where nothing comes again: each page has new stories, known by their vectors alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.gym_bridge.storefront import Deed, Page
from learner.policy import Candidate
from streaming.rewards import RewardTable

TOPICS, STORIES, SLATE = 4, 6, 3
PAGES = 50  # slates in a visit: so that there are more deeds than the 32 entries of a usual state


class NewsStand:
    """Observations: ((name, topic, interest) of each story on offer, name of the one read or None, minutes it took).
    Actions: indices of the stories shown."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        self._user = (options or {})["user"]
        self._rng = np.random.default_rng([self._seed, self._user])
        self._interest = self._rng.uniform(-1, 1, TOPICS)
        self._pages = 0
        return (self._edition(), None, 0.0), {}

    def step(self, action: Sequence[int]) -> tuple[Any, float, bool, bool, dict]:
        name, _, interest = self._offered[max(action, key=lambda story: self._offered[story][2])]
        self._pages += 1
        minutes = 2.0 + interest if self._rng.random() < 0.85 + 0.15 * interest else 0.0
        observation = (self._edition(), name if minutes else None, minutes)
        return observation, minutes, self._pages == PAGES, False, {}

    def _edition(self) -> list[tuple[str, int, float]]:
        self._offered = [
            (f"story-{self._user}-{self._pages}-{story}", int(topic), float(self._interest[topic]))
            for story, topic in enumerate(self._rng.integers(TOPICS, size=STORIES))
        ]
        return self._offered


class NewsStandFront:
    rewards = RewardTable.parse("select_item=0+1*value")
    slate_size = SLATE
    horizon = "session"
    step_s = 10.0

    def catalog(self) -> list[dict[str, Any]]:
        return []

    def page(self, observation: Any) -> Page:
        offered, read, minutes = observation
        self._names = [name for name, _, _ in offered]
        vectors = [[*np.eye(TOPICS)[topic], interest] for _, topic, interest in offered]
        candidates = [
            Candidate(name, vector=vector) for name, vector in zip(self._names, vectors, strict=True)
        ]
        return Page([Deed("select_item", read, from_slate=True, value=minutes)] if read else [], candidates)

    def action(self, slate: Sequence[str]) -> list[int]:
        return [self._names.index(name) for name in slate]
