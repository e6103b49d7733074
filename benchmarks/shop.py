"""How much is there to gain in the simulated shop, by knowing what, and how fast is it?

    python -m benchmarks.shop [--days 1] [--seeds 3] [--json FILE]

Every policy meets the same shoppers on the same simulated days (common random numbers). The last column is its share of
the gap from random to the planning oracle. Intervals are 95 %, over seeds where there are several and over shoppers
where there is one. `--why` switches one mechanism of the shop off at a time: what planning is worth without it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from simulator.figures import mean_interval, over_seeds
from simulator.goods import DAY_MS
from simulator.policies import (
    GreedyOracle,
    HistoryOracle,
    PlanningOracle,
    Popularity,
    Random,
    Recommender,
    play,
)
from simulator.shop import HOUR_MS, Mind, Shop, ShopSettings, Visits

# mechanism -> the shop without it
WITHOUT = {
    "moods (a bait costs nothing later)": {"mood_depth": 0.0},
    "stages (accessories as attractive at once)": {"stage_click": 0.0, "stage_view": 0.0},
    "both": {"mood_depth": 0.0, "stage_click": 0.0, "stage_view": 0.0},
}


def spend(
    settings: ShopSettings, seed: int, policy: Recommender, days: float, slate_size: int
) -> tuple[Visits, float]:
    """The visits that began in these days, bar the last hour, and CPU microseconds for a decision, policy included."""
    shop = Shop(settings, seed)
    end_ms = settings.start_ms + days * DAY_MS
    began = time.process_time()
    decisions = sum(len(turn.shopper) for turn, _, _ in play(shop, policy, slate_size, end_ms=end_ms))
    cost_us = 1e6 * (time.process_time() - began) / decisions
    visits = shop.visits()
    begun = visits.start_ms < end_ms - HOUR_MS
    return Visits(*(column[begun] for column in visits)), cost_us


def policies(settings: ShopSettings, seed: int, slate_size: int) -> dict[str, Callable[[], Recommender]]:
    """Name -> maker. The two that plan share one plan."""
    planner: list[PlanningOracle] = []

    def plan() -> PlanningOracle:
        if not planner:
            planner.append(PlanningOracle(Shop(settings, seed), slate_size))
        return planner[0]

    return {
        "random": lambda: Random(seed),
        "popularity": lambda: Popularity(settings.items),
        "greedy oracle": GreedyOracle,
        "history oracle": lambda: HistoryOracle(plan()),
        "planning oracle": plan,
    }


def figures(visits: Visits) -> dict[str, float]:
    """What a practitioner asks first."""
    reward, low, high = mean_interval(visits)
    return {
        "visits": len(visits.visit),
        "pages_per_visit": float(visits.decisions.mean()),
        "ctr": float(visits.clicks.sum() / visits.impressions.sum()),
        "carts_per_click": float(visits.carts.sum() / max(1, visits.clicks.sum())),
        "purchases_per_visit": float(visits.purchases.mean()),
        "refunds_per_purchase": float(visits.refunds.sum() / max(1, visits.purchases.sum())),
        "reward_per_visit": reward,
        "low": low,
        "high": high,
    }


def run_seed(
    settings: ShopSettings, seed: int, names: tuple[str, ...], days: float, slate_size: int
) -> dict[str, Any]:
    made = policies(settings, seed, slate_size)
    out: dict[str, Any] = {}
    for name in names:
        visits, cost_us = spend(settings, seed, made[name](), days, slate_size)
        out[name] = figures(visits) | {"cpu_us_per_decision": cost_us}
        print(f"  seed {seed} {name}: {out[name]['reward_per_visit']:.3f}", file=sys.stderr, flush=True)
    return out


def table(seeds: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of the means over seeds."""
    lines = [
        "| policy | pages a visit | CTR | carts a click | purchases a visit | reward a visit | share of the gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in seeds[0]:
        m = {key: float(np.mean([s[name][key] for s in seeds])) for key in seeds[0][name]}
        share = [
            (s[name]["reward_per_visit"] - s["random"]["reward_per_visit"])
            / (s["planning oracle"]["reward_per_visit"] - s["random"]["reward_per_visit"])
            for s in seeds
        ]
        reward = over_seeds([s[name]["reward_per_visit"] for s in seeds])
        high = reward.high if len(seeds) > 1 else m["high"]
        lines.append(
            f"| {name} | {m['pages_per_visit']:.1f} | {100 * m['ctr']:.1f} % | {100 * m['carts_per_click']:.1f} % "
            f"| {m['purchases_per_visit']:.3f} | {reward.mean:.2f} ± {high - reward.mean:.2f} | {np.mean(share):.2f} |"
        )
    return lines


def bare_speed(settings: ShopSettings, slate_size: int, decisions: int = 30_000) -> float:
    """Decisions a second of the shop alone, under slates that cost nothing to make."""
    shop = Shop(settings, 0)
    served, began = 0, time.perf_counter()
    slates = np.random.default_rng(0).permuted(np.tile(np.arange(settings.items), (256, 1)), axis=1)[
        :, :slate_size
    ]
    while served < decisions:
        turn = shop.next_turn()
        shop.show(turn, slates[: len(turn.shopper)])
        served += len(turn.shopper)
    return served / (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--days", type=float, default=1.0, help="simulated days for each policy [1]")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0..N-1 [3]")
    parser.add_argument("--slate-size", type=int, default=6, help="slots in a slate [6]")
    parser.add_argument("--why", action="store_true", help="also with mechanisms switched off")
    parser.add_argument("--json", type=Path, help="append one line of JSON here")
    options = parser.parse_args()
    settings = ShopSettings()
    everyone = ("random", "popularity", "greedy oracle", "history oracle", "planning oracle")
    seeds = [run_seed(settings, s, everyone, options.days, options.slate_size) for s in range(options.seeds)]
    print("\n".join(table(seeds)))
    why = {}
    if options.why:
        print("\n| without | greedy oracle | planning oracle | planning is worth |\n|---|---|---|---|")
        for name, change in {"(nothing switched off)": {}, **WITHOUT}.items():
            shop = replace(settings, mind=replace(Mind(), **change))
            pairs = [
                run_seed(shop, s, ("greedy oracle", "planning oracle"), options.days, options.slate_size)
                for s in range(options.seeds)
            ]
            greedy, planning = (
                [p[who]["reward_per_visit"] for p in pairs] for who in ("greedy oracle", "planning oracle")
            )
            gain = over_seeds([b / a - 1 for a, b in zip(greedy, planning, strict=True)])
            why[name] = {"greedy": greedy, "planning": planning}
            half = 100 * (gain.high - gain.mean)
            print(
                f"| {name} | {np.mean(greedy):.2f} | {np.mean(planning):.2f} | {100 * gain.mean:+.0f} % ± {half:.0f} |"
            )
    speed = bare_speed(settings, options.slate_size)
    print(f"\nthe shop alone: {speed:,.0f} decisions a second ({1e6 / speed:.0f} µs each)")
    found = {"seeds": seeds, "why": why, "decisions_per_s": speed}
    record.append(options.json, "shop", sys.argv[1:], found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
