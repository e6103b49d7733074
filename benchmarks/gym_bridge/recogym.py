"""RecoGym's shop: users look at products by themselves, and now and then click on one that is recommended.

Each user has a random stream of its own, so that whoever recommends meets the same users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.gym_bridge import worlds
from benchmarks.gym_bridge.storefront import Deed, Page
from streaming.rewards import RewardTable

PRODUCTS: Final = 100


@dataclass(frozen=True)
class Preset:
    """One of the shops, and how many users come."""

    flips: int  # pairs of similar products that respond to recommendations in each other's place
    dimensions: int = 20  # of interests
    sigma_omega: float = 0.01  # drift of interests with each look
    sigma_mu: float = 3.0  # spread of products' popularity
    logged: int = 1000  # users whose slates were filled at random
    live: int = 1500  # users that come after them
    flips_then: int = 0  # from `changes_at` on
    changes_at: int | None = None  # user


PRESETS: Final = {
    "challenge": Preset(flips=20),
    "flips50": Preset(flips=50),
    "personal": Preset(flips=50, dimensions=5, sigma_omega=0.05, sigma_mu=0.1, live=1000),
    "drift": Preset(flips=0, live=3000, flips_then=50, changes_at=2000),
}


class Dice(np.random.RandomState):
    """numpy's, with a `choice` of one among few that takes a quarter of the time: the same draws, unchecked."""

    def choice(self, a: Any, size: Any = None, replace: bool = True, p: Any = None) -> Any:
        """See numpy.random.RandomState.choice."""
        if p is None or size is not None:
            return super().choice(a, size, replace, p)
        cdf = np.cumsum(p)
        i = int((cdf / cdf[-1]).searchsorted(self.random_sample(), side="right"))
        return i if isinstance(a, int) else a[i]


class RecoGym:
    """RecoGym 0.1.3.0 with the `reset` and `step` of Gymnasium.

    Observations: (products looked at, product recommended before, whether it was clicked). info: "action", and
    "chances", [P], the true probability of a click on each product before the step. Raises: worlds.WorldMissing.
    """

    def __init__(self, preset: Preset, seed: int) -> None:
        module = worlds.recogym()
        self._preset, self._seed = preset, seed
        self._respond = module.ff
        self._env = module.RecoEnv1()
        about = {
            "random_seed": seed,
            "num_products": PRODUCTS,
            "number_of_flips": preset.flips,
            "K": preset.dimensions,
            "sigma_omega": preset.sigma_omega,
            "sigma_mu_organic": preset.sigma_mu,
        }
        self._env.init_gym(module.env_1_args | about)
        self._changed = False
        self._at: Any = None
        self._chances: npt.NDArray[np.float64] = np.zeros(PRODUCTS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """options["user"]: which."""
        user = int((options or {})["user"])
        change = self._preset.changes_at
        if change is not None and user >= change and not self._changed:
            self._env.generate_beta(self._preset.flips_then)
            self._changed, self._at = True, None
        self._env.rng = Dice([self._seed, user])
        self._env.reset(user)
        observation, _, left, _ = self._env.step(None)
        return (_looked_at(observation), -1, False), {"left": left}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """action: the product shown."""
        chances = self._now()
        observation, click, left, _ = self._env.step(action)
        info = {"chances": chances, "action": action}
        return (_looked_at(observation), action, bool(click)), float(click), left, False, info

    def _now(self) -> npt.NDArray[np.float64]:
        """[P] probability of a click; it changes with the user's interests only."""
        env = self._env
        if env.omega is not self._at:
            self._at = env.omega
            self._chances = self._respond((env.beta @ env.omega + env.mu_bandit).ravel())
        return self._chances


def _looked_at(observation: Any) -> list[int]:
    return [int(look["v"]) for look in observation.sessions()]


class RecoGymShop:
    """A click earns 1, looking around nothing."""

    rewards: Final = RewardTable.parse("select_item=1")
    slate_size: Final = 1
    horizon: Final = "session"
    step_s: Final = 10.0

    def catalog(self) -> list[dict[str, Any]]:
        """Products of which nothing is known but their names."""
        return [{"item_id": item_id(product)} for product in range(PRODUCTS)]

    def page(self, observation: Any) -> Page:
        """See Storefront."""
        looks, shown, clicked = observation
        deeds = [Deed("view_item", item_id(product)) for product in looks]
        return Page([Deed("select_item", item_id(shown), from_slate=True), *deeds] if clicked else deeds)

    def action(self, slate: Sequence[str]) -> int:
        """See Storefront."""
        return product_of(slate[0])


@cache
def item_id(product: int) -> str:
    """The name that a shop knows it by."""
    return f"product-{product}"


@cache
def product_of(item_id: str) -> int:
    """The other way round."""
    return int(item_id.removeprefix("product-"))


class Uniform:
    """RecoGym's own logging policy: any product, as likely as any other."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 31])

    def __call__(self, page: Page) -> tuple[list[str], float]:
        return [item_id(int(self._rng.integers(PRODUCTS)))], 1.0 / PRODUCTS
