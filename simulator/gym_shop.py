"""The simulated shop as a Gymnasium environment: an episode is a visit, an action the one item that a page shows.

    import gymnasium
    import simulator.gym_shop  # registers it

    env = gymnasium.make("bellwether/Shop-v0", items=100)
    observation, info = env.reset(seed=1)
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())

Observations are what the storefront remembers of the shopper, newest entry first, visits before this one included; what
leaves no trace there (purpose, stage, mood) stays hidden, so this is a partially observed process. `flat=True` turns
them into one vector, for networks that take a Box: see `flattened`. The reward is the product's reward table over what
the page led to: click and cart, and at once also the purchase and the refund that follow within hours. The
episode is terminated when the shopper leaves; it is never truncated.

docs/simulator.md has the rules. Every item is available all the time here, for a plain DQN cannot be told that an
action is not possible. It needs `pip install -e '.[gym]'`; nothing else in the package does.
"""

from __future__ import annotations

from typing import Any, Final

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from simulator.shop import (
    CLICK,
    NO_EVENTS,
    PURCHASE,
    VIEW,
    Events,
    Outcome,
    Shop,
    ShopSettings,
    Turn,
    joined,
)
from streaming.rewards import EVENT_NAMES

ID: Final = "bellwether/Shop-v0"
VISIT_GAP_S: Final = 1800.0  # a longer pause ends a visit
_LONG_S: Final = 30 * 86_400.0

Observation = dict[str, npt.NDArray[Any]]
Vector = npt.NDArray[np.float32]


class ShopEnv(gymnasium.Env[Any, np.int64]):
    """One shop, its visits played one after another. `shop` fixes goods and people, `reset(seed=...)` the luck.

    A reset with a seed opens the shop anew: nobody has a past. Without one it goes on with the next visit; whoever has
    not left by then goes on without being shown anything. All H entries of an observation, newest first:

    item: row of the catalog plus 1; 0: padding
    name: event-name code (streaming.rewards.EVENT_NAMES); 0: padding
    age_s: seconds before the page
    value: price

    `info`: `shopper`, `visit` (of that shopper), `timestamp_ms` of the page, and `events`, what the storefront
    published since the page before: at a reset everybody's purchases of the meantime too, after what a shopper who was
    left in the middle of a visit went on to do.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's own declaration)

    def __init__(
        self,
        items: int = 100,
        categories: int = 10,
        brands: int = 20,
        shoppers: int = 1000,
        history_length: int = 32,
        shop: int = 0,
        flat: bool = False,
    ) -> None:
        """flat: observations as one vector; the rest as in ShopSettings. Raises: ShopError."""
        self._settings = ShopSettings(
            items=items,
            categories=categories,
            brands=brands,
            shoppers=shoppers,
            history_length=history_length,
            new_items=0.0,
            stock_outs=0.0,
        )
        self._seed = shop
        self.shop = Shop(self._settings, shop)
        self._turn: Turn | None = None
        self.action_space = spaces.Discrete(items)
        self._flat = flat
        h, most = (history_length,), 1e9
        self.observation_space = spaces.Dict(
            {
                "item": spaces.Box(0, items, h, np.int32),
                "name": spaces.Box(0, len(EVENT_NAMES) - 1, h, np.uint8),
                "age_s": spaces.Box(0.0, most, h, np.float32),
                "value": spaces.Box(0.0, most, h, np.float32),
            }
        )
        if flat:
            self.observation_space = spaces.Box(0.0, 1.0, (4 * (items + categories) + 3,), np.float32)

    @property
    def in_a_visit(self) -> bool:
        """Whether a page is open."""
        return self._turn is not None

    @property
    def turn(self) -> Turn:
        """The page that is open, for policies that look into the shop. Raises: gymnasium.error.ResetNeeded."""
        if self._turn is None:
            raise gymnasium.error.ResetNeeded(
                "no page is open: call reset first, and again after a visit's end"
            )
        return self._turn

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation | Vector, dict[str, Any]]:
        """The first page of the next visit; options are not used."""
        first, untold = self._np_random is None, NO_EVENTS
        super().reset(seed=seed)
        if first or seed is not None:
            self.shop = Shop(self._settings, self._seed, luck=int(self.np_random.integers(2**63)))
        elif self._turn is not None:
            while not self._show(-1).ended[0]:
                self._turn = self.shop.next_page(int(self.turn.shopper[0]))
                untold = joined(untold, self._turn.events)
        self._turn = self.shop.next_visit()
        return self._observation(self._turn), self._info(self._turn, joined(untold, self._turn.events))

    def step(self, action: np.int64) -> tuple[Observation | Vector, float, bool, bool, dict[str, Any]]:
        """Show this row of the catalog. Raises: ValueError for one that is none."""
        if not self.action_space.contains(action):
            raise ValueError(f"actions are rows of the catalog, 0..{self._settings.items - 1}, not {action}")
        turn = self.turn
        outcome = self._show(int(action))
        reward, ended, events = float(outcome.reward[0, 0]), bool(outcome.ended[0]), outcome.events
        if ended:
            self._turn = None
            turn = turn._replace(history=self.shop.history(turn.shopper))
        else:
            turn = self._turn = self.shop.next_page(int(turn.shopper[0]))
            events = joined(events, turn.events)
        return self._observation(turn), reward, ended, False, self._info(turn, events)

    def _show(self, item: int) -> Outcome:
        return self.shop.show(self.turn, np.array([[item]]))

    def _observation(self, turn: Turn) -> Observation | Vector:
        past, there = turn.history, turn.history.item[0] >= 0
        age_s = np.maximum(turn.timestamp_ms[0] - past.timestamp_ms[0], 0) / 1000.0
        seen = {
            "item": past.item[0] + np.int32(1),
            "name": past.name[0],
            "age_s": (age_s * there).astype(np.float32),
            "value": past.value[0],
        }
        if not self._flat:
            return seen
        return flattened(seen, self.shop.goods.category, self._settings.categories)

    def _info(self, turn: Turn, events: Events) -> dict[str, Any]:
        return {
            "shopper": int(turn.shopper[0]),
            "visit": int(turn.visit[0]),
            "timestamp_ms": int(turn.timestamp_ms[0]),
            "events": events,
        }


def flattened(observation: Observation, category: npt.NDArray[np.integer], categories: int) -> Vector:
    """An observation as one vector, [4 (N + C) + 3] in 0..1.

    For each of N items, then for each of C categories: log(1 + how many) views and picks (clicks, purchases) of this
    visit, views and picks of earlier ones, over log(1 + H). Then the share of the history that is filled, and
    log(1 + s) since this visit's first entry and since the newest entry of an earlier one, over log(1 + 30 days).
    category: [N] of each item.
    """
    there = observation["item"] > 0
    item, name, age_s = (observation[key][there] for key in ("item", "name", "age_s"))
    now = np.logical_and.accumulate(np.diff(age_s, prepend=0.0) < VISIT_GAP_S)
    looks, picks = name == VIEW, (name == CLICK) | (name == PURCHASE)
    kinds = (looks & now, picks & now, looks & ~now, picks & ~now)
    of_items = [np.bincount(item[kind] - 1, minlength=len(category)) for kind in kinds]
    of_categories = [np.bincount(category[item[kind] - 1], minlength=categories) for kind in kinds]
    counts = np.log1p(np.concatenate((*of_items, *of_categories))) / np.log1p(len(there))
    times = np.log1p([age_s[now].max(initial=0.0), age_s[~now].min(initial=_LONG_S)]) / np.log1p(_LONG_S)
    return np.concatenate((counts, [len(item) / len(there)], times)).clip(0.0, 1.0).astype(np.float32)


gymnasium.register(ID, entry_point="simulator.gym_shop:ShopEnv")
