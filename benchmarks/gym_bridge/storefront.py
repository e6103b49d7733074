"""An environment as a storefront: visits are played page by page, by whoever recommends.

An environment has Gymnasium's `reset` and `step`; a `Storefront` says what its observations and actions are in a shop's
words. A recommender learns of them only what a shop would tell it: deeds, candidates, and when they were. `info`, where
an environment tells what nobody can see (true probabilities, say), goes to the score and nowhere else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, SupportsFloat

from learner.policy import Candidate
from streaming.rewards import RewardTable

START_MS = 1_767_225_600_000  # 2026-01-01
SAY_S = 30.0  # between two lines on how far a run has come


class Deed(NamedTuple):
    """One thing that the user did."""

    name: str  # GA4 event name
    item_id: str
    from_slate: bool = False  # it came of the slate shown last
    value: float = 0.0  # what it is worth, where the reward table weighs that


class Page(NamedTuple):
    """Where the user stands."""

    deeds: Sequence[Deed]  # since the page before, oldest first
    candidates: Sequence[Candidate] = ()  # of which the next slate may be made; none: of the whole catalog


class Environment(Protocol):
    """The part of gymnasium.Env that is used; `info["left"]` of a reset: the user has gone before any slate."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """A new user's first observation."""

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """What came of it: observation, reward, terminated, truncated, info."""


class Storefront(Protocol):
    """What a shop says and is told of an environment. Rewards, slate size and horizon are all that it sets."""

    @property
    def rewards(self) -> RewardTable:
        """What deeds earn."""

    @property
    def slate_size(self) -> int:
        """Slots shown."""

    @property
    def horizon(self) -> str:
        """See streaming.join_settings."""

    @property
    def step_s(self) -> float:
        """Event time from one deed or page to the next."""

    def catalog(self) -> list[dict[str, Any]]:
        """Records of proto/item.avsc; empty where candidates come with each page."""

    def page(self, observation: Any) -> Page:
        """An observation in a shop's words."""

    def action(self, slate: Sequence[str]) -> Any:
        """The environment's action that shows these items."""


class Recommender(Protocol):
    """Who fills the slates. Times are event time, ms."""

    def did(self, user_id: str, deeds: Sequence[Deed], times_ms: Sequence[int]) -> None:
        """The user did this."""

    def recommend(self, user_id: str, page: Page, now_ms: int) -> list[str]:
        """What to show now."""

    def shown(self, user_id: str, page: Page, slate: Sequence[str], propensity: float, now_ms: int) -> None:
        """Somebody else showed this, slot by slot with that probability."""


class Paid(Recommender, Protocol):
    """One that knows what it has cost."""

    @property
    def cpu_s(self) -> float:
        """CPU seconds spent so far, learning included."""


class Timed:
    """Any recommender, with a look at the clock before and after."""

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender
        self.cpu_s = 0.0

    def did(self, user_id: str, deeds: Sequence[Deed], times_ms: Sequence[int]) -> None:
        """See Recommender."""
        began = time.process_time()
        self._recommender.did(user_id, deeds, times_ms)
        self.cpu_s += time.process_time() - began

    def recommend(self, user_id: str, page: Page, now_ms: int) -> list[str]:
        """See Recommender."""
        began = time.process_time()
        slate = self._recommender.recommend(user_id, page, now_ms)
        self.cpu_s += time.process_time() - began
        return slate

    def shown(self, user_id: str, page: Page, slate: Sequence[str], propensity: float, now_ms: int) -> None:
        """See Recommender."""
        began = time.process_time()
        self._recommender.shown(user_id, page, slate, propensity, now_ms)
        self.cpu_s += time.process_time() - began


class LoggingPolicy(Protocol):
    """Who fills the slates before anybody learns; returns the slate and the probability of each of its slots."""

    def __call__(self, page: Page) -> tuple[list[str], float]: ...


class Visits:
    """Plays visits one after another, on one clock; says each 30 s on standard error how many these were."""

    def __init__(self, environment: Environment, storefront: Storefront, recommender: Recommender) -> None:
        self._environment, self._storefront, self._recommender = environment, storefront, recommender
        self._step_ms = round(1000 * storefront.step_s)
        self._now_ms = START_MS
        self._visits = self._pages = 0
        self._said_s = time.monotonic()

    def play(self, user: int, logging: LoggingPolicy | None = None) -> list[dict[str, Any]]:
        """One user's visit, from the first page to the last; returns the `info` of each step, with its `reward`.

        logging: fills the slates in the recommender's place.
        """
        user_id, infos = f"user-{user}", []
        observation, info = self._environment.reset(options={"user": user})
        over = bool(info.get("left", False))
        page = self._turn(user_id, observation)
        while not over:
            slate = self._slate(user_id, page, logging)
            action = self._storefront.action(slate)
            observation, reward, terminated, truncated, info = self._environment.step(action)
            infos.append({**info, "reward": float(reward)})
            over = terminated or truncated
            page = self._turn(user_id, observation)
        self._say(len(infos))
        return infos

    def _say(self, pages: int) -> None:
        self._visits, self._pages = self._visits + 1, self._pages + pages
        if (now_s := time.monotonic()) - self._said_s >= SAY_S:
            self._said_s = now_s
            print(f"    {self._visits:,} visits, {self._pages:,} pages", file=sys.stderr, flush=True)

    def _turn(self, user_id: str, observation: Any) -> Page:
        """Take in what the user did."""
        page = self._storefront.page(observation)
        times_ms = [self._now_ms + self._step_ms * (i + 1) for i in range(len(page.deeds))]
        self._now_ms += self._step_ms * (len(page.deeds) + 1)
        if page.deeds:
            self._recommender.did(user_id, page.deeds, times_ms)
        return page

    def _slate(self, user_id: str, page: Page, logging: LoggingPolicy | None) -> list[str]:
        if logging is None:
            return self._recommender.recommend(user_id, page, self._now_ms)
        slate, propensity = logging(page)
        self._recommender.shown(user_id, page, slate, propensity, self._now_ms)
        return slate
