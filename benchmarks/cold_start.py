"""How well are new items shown, before anything is known of them but what the catalog says?

    python -m benchmarks.cold_start [--seeds 3] [--decisions 130000] [--json FILE]

The simulated shop releases new items while an agent serves and learns, as in `benchmarks.learning`: one that is told
what the catalog says of items (category, brand, price, vector), and one that is told their names alone. Of each item
released after the first third of the decisions, the first hundred times that it is shown are followed, wherever the
policy chose to show it; its click-through rate there tells whether it was shown to the right people. Popularity, chance
and an oracle that sees the shoppers' minds meet the same shoppers on the same days.

Rates are of all those impressions together; intervals are 95 %, Student's t over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import record
from benchmarks.learning import SLOTS, Loop, LoopSettings, ShopCatalog
from learner.agent import AgentSettings
from simulator.figures import over_seeds
from simulator.policies import GreedyOracle, Popularity, Random, Recommender, play
from simulator.shop import Shop, ShopSettings

FIRST: Final = 100  # impressions of each new item
SHOP: Final = ShopSettings(new_items=0.5)  # most of them come later than the run ends


class FirstImpressions:
    """Counts how items that are new after a moment are shown, the first so many times each."""

    def __init__(self, release_ms: npt.NDArray[np.int64], after_ms: int) -> None:
        """release_ms: [N] event times."""
        self.new = release_ms > after_ms  # [N]
        self.shown = np.zeros(len(release_ms), np.int64)
        self.clicked = np.zeros(len(release_ms), np.int64)
        self.others = np.zeros(2, np.int64)  # impressions, clicks of what was there before

    def add(self, slates: npt.NDArray[Any], clicked: npt.NDArray[np.bool_]) -> None:
        """One turn. slates: [B, K] rows of the catalog, -1: none; clicked: [B, K]."""
        there = slates >= 0
        old = there & ~self.new[slates]
        self.others += old.sum(), (clicked & old).sum()
        for item, hit in zip(slates[there & ~old], clicked[there & ~old], strict=True):
            if self.shown[item] < FIRST:
                self.shown[item] += 1
                self.clicked[item] += hit

    def figures(self, now_ms: int, release_ms: npt.NDArray[np.int64]) -> dict[str, float]:
        """Of the items that are out by now."""
        out = self.new & (release_ms <= now_ms)
        shown = self.shown[out]
        return {
            "new_items": float(out.sum()),
            "shown_100_times": float((shown == FIRST).mean()),
            "impressions": float(shown.mean()),
            "ctr_new": float(self.clicked[out].sum() / max(1, shown.sum())),
            "ctr_others": float(self.others[1] / max(1, self.others[0])),
        }


class NamesOnly(Loop):
    """Is told nothing of items but their names, and whether they are on offer."""

    def catalog(self) -> ShopCatalog:
        """See Loop."""
        told = super().catalog()
        blank = (np.zeros_like(told.category), np.zeros_like(told.brand), np.full_like(told.price, np.nan))
        return ShopCatalog(
            *blank, told.in_stock, told.gone, told.known, told.recorded, np.zeros_like(told.vector)
        )


def learnt(kind: type[Loop], seed: int, decisions: int) -> tuple[dict[str, float], int, int]:
    """Figures of an agent; and the event times, ms, from which items are new, and at the end."""
    shop = Shop(SHOP, seed)
    loop = kind(shop, AgentSettings(), LoopSettings(), seed)
    release_ms, seen, after_ms, served, now_ms = shop.goods.release_ms, None, 0, 0, 0
    while served < decisions:
        turn, outcome = loop.turn()
        served, now_ms = served + len(turn.shopper), int(turn.timestamp_ms.min())
        if seen is not None:
            seen.add(loop.slates, outcome.clicked)
        elif served >= decisions / 3:
            after_ms, seen = now_ms, FirstImpressions(release_ms, now_ms)
    assert seen is not None
    return seen.figures(now_ms, release_ms), after_ms, now_ms


def spent(policy: Recommender, seed: int, after_ms: int, end_ms: int) -> dict[str, float]:
    """Figures of a policy that serves the same shoppers on the same days."""
    shop = Shop(SHOP, seed)
    release_ms = shop.goods.release_ms
    seen = FirstImpressions(release_ms, after_ms)
    for turn, slates, outcome in play(shop, policy, SLOTS, sys.maxsize):
        now_ms = int(turn.timestamp_ms.min())
        if now_ms > after_ms:
            seen.add(slates, outcome.clicked)
        if now_ms >= end_ms:
            break
    return seen.figures(end_ms, release_ms)


OTHERS: Final[dict[str, Callable[[int], Recommender]]] = {
    "popularity": lambda seed: Popularity(SHOP.items),
    "random": Random,
    "greedy oracle": lambda seed: GreedyOracle(),
}


def run_seed(seed: int, decisions: int) -> dict[str, dict[str, float]]:
    """Figures by policy."""
    rows: dict[str, dict[str, float]] = {}
    rows["features"], after_ms, end_ms = learnt(Loop, seed, decisions)
    print(f"  seed {seed}, features: {rows['features']}", file=sys.stderr, flush=True)
    rows["names only"], _, _ = learnt(NamesOnly, seed, decisions)
    print(f"  seed {seed}, names only: {rows['names only']}", file=sys.stderr, flush=True)
    return rows | {name: spent(make(seed), seed, after_ms, end_ms) for name, make in OTHERS.items()}


def table(seeds: Sequence[dict[str, dict[str, float]]]) -> Iterator[str]:
    """A Markdown table, a row for each policy."""
    yield "| policy | CTR of new items, first 100 impressions | CTR of the others | shown 100 times | impressions |"
    yield "|---|---|---|---|---|"
    for name in seeds[0]:
        cells = [
            f"{scale * mean:.{digits}f}" + (f" ± {scale * (high - low) / 2:.{digits}f}" if high > low else "")
            for key, scale, digits in (
                ("ctr_new", 100.0, 2),
                ("ctr_others", 100.0, 2),
                ("shown_100_times", 100.0, 0),
                ("impressions", 1.0, 0),
            )
            for mean, low, high in [over_seeds([seed[name][key] for seed in seeds])]
        ]
        yield f"| {name} | {cells[0]} % | {cells[1]} % | {cells[2]} % | {cells[3]} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103], help="shops [101 102 103]")
    parser.add_argument("--decisions", type=int, default=130_000, help="[130000]")
    parser.add_argument("--json", type=Path, help="append one line of JSON here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [run_seed(seed, options.decisions) for seed in options.seeds]
    print("\n".join(table(seeds)))
    each = [{"seed": seed, **rows} for seed, rows in zip(options.seeds, seeds, strict=True)]
    record.append(options.json, "cold_start", sys.argv[1:], {"decisions": options.decisions, "seeds": each})
    return 0


if __name__ == "__main__":
    sys.exit(main())
