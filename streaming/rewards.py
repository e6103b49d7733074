"""What each deed is worth: the reward table, and the small codes under which event names travel in columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

# Codes are written into checkpoints and weights: append, never reorder. 0 pads histories.
EVENT_NAMES: Final = (
    "",
    "other",  # any name that is not in this list
    "view_item_list",
    "select_item",
    "view_item",
    "add_to_wishlist",
    "add_to_cart",
    "remove_from_cart",
    "view_cart",
    "begin_checkout",
    "add_shipping_info",
    "add_payment_info",
    "purchase",
    "refund",
    "view_promotion",
    "select_promotion",
    "search",
)
CODES: Final = {name: code for code, name in enumerate(EVENT_NAMES) if name}
OTHER: Final = CODES["other"]
# Names that say something about the items they carry: these enter a user's history.
HISTORY_NAMES: Final = (
    "select_item",
    "view_item",
    "add_to_wishlist",
    "add_to_cart",
    "remove_from_cart",
    "purchase",
    "refund",
)
# Names that move the user to an item: without a decision behind them they are organic actions.
ACTION_NAMES: Final = ("select_item", "view_item")


class RewardError(ValueError):
    """A reward table that makes no sense; the message names the entry and the allowed range."""


@dataclass(frozen=True)
class Reward:
    """What one event adds: `weight`, plus `value_weight` for each unit of currency."""

    weight: float
    value_weight: float = 0.0


@dataclass(frozen=True)
class RewardTable:
    """Event name → Reward, signed: a refund takes back what its purchase gave.

    Names that are not in the table earn nothing.

    >>> RewardTable.parse("select_item=1,purchase=10+0.1*value").reward("purchase", value=20.0)
    12.0
    """

    rewards: Mapping[str, Reward] = field(
        default_factory=lambda: {
            "view_item": Reward(0.1),
            "select_item": Reward(1.0),
            "add_to_wishlist": Reward(1.0),
            "add_to_cart": Reward(2.0),
            "remove_from_cart": Reward(-2.0),
            "purchase": Reward(10.0),
            "refund": Reward(-10.0),
        }
    )

    def __post_init__(self) -> None:
        for name, reward in self.rewards.items():
            if name not in CODES:
                raise RewardError(f"reward for {name!r}: no such event name; one of {', '.join(CODES)}")
            if not all(math.isfinite(x) and abs(x) <= 1e6 for x in (reward.weight, reward.value_weight)):
                raise RewardError(
                    f"reward for {name!r}: weights must be finite and within ±1e6, not {reward}"
                )

    def reward(self, name: str, value: float = 0.0) -> float:
        """What one event of this name and value (currency units; NaN counts as 0) earns."""
        entry = self.rewards.get(name, Reward(0.0))
        return entry.weight + entry.value_weight * (0.0 if math.isnan(value) else value)

    def columns(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """weight and value_weight, each [len(EVENT_NAMES)], by event-name code."""
        weight = np.zeros(len(EVENT_NAMES))
        value_weight = np.zeros(len(EVENT_NAMES))
        for name, entry in self.rewards.items():
            weight[CODES[name]] = entry.weight
            value_weight[CODES[name]] = entry.value_weight
        return weight, value_weight

    @classmethod
    def parse(cls, text: str) -> RewardTable:
        """Read `name=weight[+value_weight*value]`, comma-separated; the table then holds just these.

        Raises: RewardError, quoting the entry that cannot be read.
        """
        rewards = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, eq, terms = part.partition("=")
            weight, _, scaled = terms.partition("+") if terms.endswith("*value") else (terms, "", "")
            try:
                if not eq:
                    raise ValueError
                rewards[name.strip()] = Reward(
                    float(weight), float(scaled.removesuffix("*value")) if scaled else 0.0
                )
            except ValueError:
                raise RewardError(
                    f"cannot read reward {part!r}; write name=weight or name=weight+value_weight*value"
                ) from None
        return cls(rewards)
