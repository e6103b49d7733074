"""How well does the product learn in worlds that nobody here wrote?

    python -m benchmarks.gym_bridge [--preset challenge] [--agent ours logistic ...] [--seeds 50 51 ...] [--json FILE]

Users of RecoGym (Rohde et al. 2018) become shoppers: their deeds become events, slates come from Recommend, the
learner runs beside it, with the defaults of the product. Users are logged first, under slates drawn uniformly, then
served. Everything runs in this process, on the product's own parts.

    score = (CTR - random) / (oracle - random)

of expected click-through rates by the simulator's own probabilities, at the states in which the slates were made.
Intervals are 95 %, Student's t over seeds (over users where there is one seed). cpu_ms is what one recommendation
costs on line, learning included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks import record
from benchmarks.gym_bridge.product import InProcess, Setup, Shop
from benchmarks.gym_bridge.recogym import PRESETS, Preset, RecoGymShop
from benchmarks.gym_bridge.recogym_scores import play
from benchmarks.gym_bridge.simple_agents import SIMPLE
from benchmarks.gym_bridge.storefront import Paid, Timed
from benchmarks.learning import changed
from learner.agent import AgentSettings
from learner.learner import LearnerSettings
from simulator.figures import over_seeds

OURS: Final = "ours"
FROZEN: Final = "ours, frozen at the change"
HOURLY: Final = "ours, renewed hourly"
USERS_AN_HOUR: Final = 500  # what "hourly" means here
LAST: Final = 500  # users over which a change is judged, the last ones


def agents_of(preset: Preset) -> list[str]:
    """All that can be compared, ours first."""
    changing = [] if preset.changes_at is None else [FROZEN, HOURLY]
    return [OURS, *changing, *SIMPLE]


def run_seed(name: str, agent: str, seed: int, setup: Setup) -> dict[str, Any]:
    """One agent in one shop: its row of the results."""
    preset, loop = PRESETS[name], InProcess()

    def each(user: int) -> None:
        if agent == FROZEN:
            loop.held = user >= (preset.changes_at or 0)
        elif agent == HOURLY:
            loop.held = True
            if user % USERS_AN_HOUR == 0:
                loop.renew()

    shop = RecoGymShop()
    if agent in SIMPLE:
        made: Paid = Timed(SIMPLE[agent]([item["item_id"] for item in shop.catalog()], seed))
    else:
        made = Shop(loop, shop, setup, seed)
    played = play(preset, seed, made, each)
    return {
        "world": "recogym",
        "preset": name,
        "seed": seed,
        "agent": agent,
        **played.live.figures(),
        "cpu_ms": played.cpu_ms,
        "logged_cpu_s": played.logged_cpu_s,
        "quarters": played.live.quarters(),
        "last": played.live.of(slice(-LAST, None)).figures(),
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each agent the means over seeds, with the interval of the score."""
    out = []
    for agent in dict.fromkeys(row["agent"] for row in rows):
        mine = [row for row in rows if row["agent"] == agent]
        mean, _, high = over_seeds([row["score"] for row in mine])
        last = over_seeds([row["last"]["ctr"] for row in mine])
        out.append(
            {
                **{key: mine[0][key] for key in ("world", "preset", "agent")},
                "seed": None,
                "score": mean,
                "ci95": high - mean if len(mine) > 1 else mine[0]["ci95"],
                "cpu_ms": float(np.mean([row["cpu_ms"] for row in mine])),
                "quarters": np.mean([row["quarters"] for row in mine], axis=0).tolist(),
                "ctr": float(np.mean([row["ctr"] for row in mine])),
                "last_ctr": last.mean,
                "last_ci95": last.high - last.mean if len(mine) > 1 else None,
                "last_oracle_ctr": float(np.mean([row["last"]["oracle_ctr"] for row in mine])),
            }
        )
    return out


def table(rows: Sequence[dict[str, Any]], seeds: int) -> Iterator[str]:
    """A Markdown table, a row for each agent."""
    yield f"RecoGym, {rows[0]['preset']}, {seeds} seeds"
    yield "| agent | score | by quarter of the users | CTR of the last users (oracle) | CPU, ms |"
    yield "|---|---|---|---|---|"
    for row in rows:
        by_quarter = " ".join(f"{score:.2f}" for score in row["quarters"])
        interval = "" if row["last_ci95"] is None else f" ± {100 * row['last_ci95']:.2f}"
        last = f"{100 * row['last_ctr']:.2f}{interval} % ({100 * row['last_oracle_ctr']:.2f} %)"
        yield (
            f"| {row['agent']} | {row['score']:.3f} ± {row['ci95']:.3f} | {by_quarter} | {last} | {row['cpu_ms']:.2f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gym_bridge", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="challenge", help="which shop [challenge]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[50], help="shops [50]")
    parser.add_argument("--agent", nargs="+", default=[], help=f"{OURS}, {', '.join(SIMPLE)}, ... [all]")
    parser.add_argument(
        "--chunk", type=int, default=Setup.chunk, help=f"records between two versions [{Setup.chunk}]"
    )
    parser.add_argument(
        "--epsilon", type=float, default=Setup.epsilon, help=f"of the server [{Setup.epsilon}]"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], help="NAME=VALUE of the agent or of the learner; for sweeps"
    )
    parser.add_argument("--json", type=Path, help="append one line of JSON here")
    options = parser.parse_args()
    known = {f.name for f in (*fields(AgentSettings), *fields(LearnerSettings))}
    for change in options.set:
        if change.split("=", 1)[0] not in known or "=" not in change:
            parser.error(f"--set {change}: NAME must be one of {', '.join(sorted(known))}")
    possible = agents_of(PRESETS[options.preset])
    for agent in options.agent:
        if agent not in possible:
            parser.error(f"--agent {agent}: must be one of {', '.join(possible)}")
    torch.set_num_threads(1)
    setup = Setup(
        changed(AgentSettings(), options.set),
        changed(LearnerSettings(), options.set),
        epsilon=options.epsilon,
        chunk=options.chunk,
    )
    rows = []
    for seed in options.seeds:
        for agent in options.agent or possible:
            seeded = replace(setup, learner=replace(setup.learner, seed=seed))
            rows.append(run_seed(options.preset, agent, seed, seeded))
            print(f"  seed {seed} {agent}: {rows[-1]['score']:.3f}", file=sys.stderr, flush=True)
    means = summary(rows)
    print("\n".join(table(means, len(options.seeds))))
    found = {"setup": {**vars(setup), "agent": vars(setup.agent), "learner": vars(setup.learner)}}
    record.append(options.json, "gym_bridge", sys.argv[1:], {**found, "rows": [*means, *rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
