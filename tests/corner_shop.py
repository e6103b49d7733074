"""A Gymnasium-style environment with a clear answer: each user looks at one item, and likes to be shown that one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.gym_bridge.storefront import Deed, Page
from streaming.rewards import RewardTable

ITEMS = [f"item-{i}" for i in range(6)]
LIKED, OTHERWISE = 0.5, 0.05  # chance of a click
PAGES = 4  # slates in a visit


class CornerShop:
    """Observations: (item looked at by oneself or None, item clicked or None). Actions: index of the item shown."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        user = (options or {})["user"]
        self._rng = np.random.default_rng([self._seed, user])
        self._liked = int(self._rng.integers(len(ITEMS)))
        self._pages = 0
        return (ITEMS[self._liked], None), {"left": user % 10 == 9}  # one in ten only looks

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        self._pages += 1
        clicked = self._rng.random() < (LIKED if action == self._liked else OTHERWISE)
        observation = (None, ITEMS[action] if clicked else None)
        info = {"shown": ITEMS[action], "liked": ITEMS[self._liked]}
        return observation, float(clicked), self._pages == PAGES, False, info


class CornerStorefront:
    rewards = RewardTable.parse("select_item=1")
    slate_size = 1
    horizon = "session"
    step_s = 5.0

    def catalog(self) -> list[dict[str, Any]]:
        return [{"item_id": item_id} for item_id in ITEMS]

    def page(self, observation: Any) -> Page:
        looked_at, clicked = observation
        looks = [Deed("view_item", looked_at)] if looked_at else []
        return Page([Deed("select_item", clicked, from_slate=True), *looks] if clicked else looks)

    def action(self, slate: Sequence[str]) -> int:
        return ITEMS.index(slate[0])


class Anything:
    """Shows any item, as likely as any other."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, page: Page) -> tuple[list[str], float]:
        return [ITEMS[int(self._rng.integers(len(ITEMS)))]], 1.0 / len(ITEMS)
