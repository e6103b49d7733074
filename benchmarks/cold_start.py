"""How well are new items shown, before anything is known of them but what the catalog says?

    python -m benchmarks.cold_start [--seeds 3] [--decisions 130000] [--json FILE]

The simulated shop releases new items while an agent serves and learns, as in `benchmarks.learning`: one that is told
what the catalog says of items (category, brand, price, vector), and one that is told their names alone. Of each item
released after the first third of the decisions, the first hundred times that it is shown are followed, wherever the
policy chose to show it; its click-through rate there tells whether it was shown to the right people. Popularity, chance
and an oracle that sees the shoppers' minds meet the same shoppers on the same days.

Rates are of all those impressions together, those of all shops; intervals are 95 %, Student's t over shops.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import record
from benchmarks.learning import SLOTS, Loop, LoopSettings, ShopCatalog
from learner.agent_settings import AgentSettings
from simulator.figures import Interval, over_seeds
from simulator.policies import GreedyOracle, Popularity, Random, Recommender, play
from simulator.shop import Shop, ShopSettings

FIRST: Final = 100  # impressions of each new item
SHOP: Final = ShopSettings(new_items=0.5)  # most of them come later than the run ends
RATES: Final = {  # of which counts
    "ctr_new": ("new_clicked", "new_shown"),
    "ctr_others": ("others_clicked", "others_shown"),
    "shown_100_times": ("new_full", "new_items"),
    "impressions": ("new_shown", "new_items"),
}


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
        """Counts, and their RATES, of the items that are out by now; nan: of nothing."""
        out = self.new & (release_ms <= now_ms)
        shown = self.shown[out]
        counts = {
            "new_items": float(out.sum()),
            "new_full": float((shown == FIRST).sum()),
            "new_shown": float(shown.sum()),
            "new_clicked": float(self.clicked[out].sum()),
            "others_shown": float(self.others[0]),
            "others_clicked": float(self.others[1]),
        }
        return counts | {rate: pooled([counts], rate).mean for rate in RATES}


def pooled(shops: Sequence[Mapping[str, float]], rate: str) -> Interval:
    """One of RATES, of all shops together; nan where there is nothing that it is of. Its interval is over the shops
    that have some, of the ratio linearised: with as much in each shop, that of the mean of their rates.

    >>> of_shop = [{"new_clicked": 5.0, "new_shown": 100.0}, {"new_clicked": 0.0, "new_shown": 0.0}]
    >>> pooled(of_shop, "ctr_new")
    Interval(mean=0.05, low=nan, high=nan)
    """
    part, whole = RATES[rate]
    some = [(shop[part], shop[whole]) for shop in shops if shop[whole]]
    if not some:
        return Interval(math.nan, math.nan, math.nan)
    total = sum(of for _, of in some)
    ratio = sum(count for count, _ in some) / total
    return over_seeds([ratio + len(some) * (count - ratio * of) / total for count, of in some])


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
        shops = [seed[name] for seed in seeds]
        cells = [
            cell(pooled(shops, "ctr_new"), 100.0, 2, " %"),
            cell(pooled(shops, "ctr_others"), 100.0, 2, " %"),
            cell(pooled(shops, "shown_100_times"), 100.0, 0, " %"),
            cell(pooled(shops, "impressions"), 1.0, 0, ""),
        ]
        yield f"| {' | '.join([name, *cells])} |"


def cell(found: Interval, scale: float, digits: int, unit: str) -> str:
    """
    >>> cell(Interval(0.05, 0.04, 0.06), 100.0, 1, " %"), cell(Interval(math.nan, math.nan, math.nan), 1.0, 0, "")
    ('5.0 ± 1.0 %', '-')
    """
    mean, low, high = found
    if math.isnan(mean):
        return "-"
    interval = f" ± {scale * (high - low) / 2:.{digits}f}" if high > low else ""
    return f"{scale * mean:.{digits}f}{interval}{unit}"


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
