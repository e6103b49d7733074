"""How well does the product learn in worlds that nobody here wrote?

    python -m benchmarks.gym_bridge [--preset challenge] [--agent ours logistic ...] [--seeds 4 5 ...] [--json FILE]

An environment's users become shoppers: their deeds become events, slates come from Recommend, the learner runs beside
it, with the defaults of the product: its own parts in this process or, with --processes, a real log, learner and server
in lockstep, which give the same slates (tests/test_gym_bridge.py) and take longer.

Users of RecoGym (Rohde et al. 2018) are logged first, under slates drawn uniformly, then served. Their score is
(CTR - random) / (oracle - random), of expected click-through rates by the simulator's own probabilities, at the states
in which the slates were made. Viewers of RecSim (Ie et al. 2019) are served so many pages; the score is how long fresh
ones watch then. Intervals are 95 %, Student's t over seeds (over users where there is one seed). cpu_ms is what one
recommendation costs on line, learning included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.gym_bridge.product import Setup
from benchmarks.gym_bridge.runs import WORLDS, Kept, run, seeded, world_of
from benchmarks.learning import changed, check_changes
from learner.agent_settings import AgentSettings
from learner.exploration import GREEDY, KINDS, Exploration
from learner.learner import LearnerSettings
from simulator.figures import over_seeds


def by_agent(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Each agent's rows, one a seed."""
    return {
        name: [row for row in rows if row["agent"] == name]
        for name in dict.fromkeys(r["agent"] for r in rows)
    }


def mean_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of one agent over its seeds."""
    mean, _, high = over_seeds([row["score"] for row in rows])
    return {
        **{key: rows[0][key] for key in ("world", "preset", "agent")},
        "seed": None,
        "score": mean,
        "ci95": high - mean if len(rows) > 1 else rows[0]["ci95"],
        "cpu_ms": float(np.mean([row["cpu_ms"] for row in rows])),
    }


def table(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> Iterator[str]:
    """A Markdown table, a row for each agent."""
    world = world_of(rows[0]["preset"])
    which = f"seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}"
    yield f"{rows[0]['world']}, {rows[0]['preset']}, {which}\n"
    headings = ("agent", "score", *world.HEADINGS, "CPU, ms")
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    for name, mine in by_agent(rows).items():
        mean = mean_of(mine)
        digits = 3 if mean["score"] < 10 else 1
        score = f"{mean['score']:.{digits}f} ± {mean['ci95']:.{digits}f}"
        yield f"| {' | '.join([name, score, *world.cells(mine), format(mean['cpu_ms'], '.2f')])} |"


def options_from(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises: SystemExit for one that is wrong."""
    presets = [preset for world in WORLDS for preset in world.PRESETS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gym_bridge", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--preset", choices=presets, default="challenge", help="which world [challenge]")
    add("--seeds", type=int, nargs="+", default=[4, 5], help="[4 5]; tune on 4 to 49, report on 50 to 57")
    add("--agent", nargs="+", default=[], help="ours, and what to hold beside it [all]")
    add("--chunk", type=int, default=Setup.chunk, help=f"records between two versions [{Setup.chunk}]")
    add("--epsilon", type=float, default=Setup.epsilon, help=f"of the server [{Setup.epsilon}]")
    add("--exploration", choices=KINDS, default=GREEDY.kind, help=f"of the server [{GREEDY.kind}]")
    add("--scale", type=float, default=GREEDY.scale, help=f"of thompson [{GREEDY.scale}]")
    add("--temperature", type=float, default=GREEDY.temperature, help=f"of boltzmann [{GREEDY.temperature}]")
    add("--jobs", type=int, default=1, help="runs at once, each on a core [1]")
    add(
        "--keep",
        type=Path,
        help="rows are kept here as they are found; those of a run that was stopped stand",
    )
    add("--set", nargs="*", default=[], help="NAME=VALUE of the agent or of the learner; for sweeps")
    add(
        "--processes",
        action="store_true",
        help="a real log, learner and server, gRPC between; for ours alone",
    )
    add("--json", type=Path, help="append one line of JSON here")
    options = parser.parse_args(arguments)
    check_changes(parser, options.set, AgentSettings(), LearnerSettings())
    world = world_of(options.preset)
    compared = world.agents(options.preset)
    possible = [*compared, *world.ABLATIONS]
    for agent in options.agent:
        if agent not in possible:
            parser.error(f"--agent {agent}: must be one of {', '.join(possible)}")
    options.agent = options.agent or (["ours"] if options.processes else compared)
    if options.processes and options.agent != ["ours"]:
        parser.error("--processes: for --agent ours")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    options = options_from(arguments)
    setup = Setup(
        changed(AgentSettings(), options.set),
        changed(LearnerSettings(), options.set),
        epsilon=options.epsilon,
        exploration=Exploration(options.exploration, options.temperature, options.scale),
        chunk=options.chunk,
    )
    preset = asdict(world_of(options.preset).PRESETS[options.preset])
    found = {"setup": asdict(setup), "preset": preset}
    kept = Kept(options.keep, [record.code(), options.preset, found, options.processes])
    wanted = [(agent, seed) for seed in options.seeds for agent in options.agent]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        runs = {
            pool.submit(run, options.preset, *which, seeded(setup, which[1]), options.processes): which
            for which in wanted
            if which not in kept.rows
        }
        for each in as_completed(runs):
            if each.exception() is None:  # others that were found stand
                kept.add(runs[each], each.result())
        for each in runs:
            each.result()
    rows = [kept.rows[which] for which in wanted]
    print("\n".join(table(rows, options.seeds)))
    means = [mean_of(mine) for mine in by_agent(rows).values()]
    record.append(options.json, "gym_bridge", sys.argv[1:], {**found, "rows": [*means, *rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
