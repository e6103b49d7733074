"""What is each part of the learner worth?

    python -m benchmarks.ablation [--rows double 6-step ...] [--seeds 1 2 3] [--decisions 20000] [--json FILE]

Each row sets one switch otherwise than the defaults, and the whole loop of benchmarks.learning then serves the
simulated shop and learns. What it has come to know is judged without the luck of clicks: the expected reward, change of
the rest of the visit included, of the six best items by it, as a share of the way from a slate at random to that of one
who knows the shop's own probabilities and gains (benchmarks.inside). Differences are to the defaults on the same seeds;
intervals are 95 %, Student's t over seeds.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
import torch

from benchmarks import record
from benchmarks.inside import look
from simulator.figures import over_seeds


@dataclass(frozen=True)
class Row:
    """One switch."""

    text: str
    changes: tuple[str, ...]  # NAME=VALUE of AgentSettings or of benchmarks.learning's LoopSettings


DEFAULTS: Final = "defaults"
ROWS: Final = {
    DEFAULTS: Row("(defaults)", ()),
    "double": Row("the target network chooses, too (DQN)", ("double=false",)),
    "dueling": Row("the value of a state where nothing is chosen is one number for all", ("dueling=false",)),
    "planning": Row("nothing is to come: γ = 0", ("gamma=0",)),
    "1-step": Row("n = 1", ("n_step=1",)),
    "6-step": Row("n = 6", ("n_step=6",)),
    "prioritised": Row(
        "prioritised replay, α .6, β 1, choices not drawn oftener", ("alpha=0.6", "chosen_share=0")
    ),
    "uniform": Row("replay drawn uniformly: choices not oftener", ("chosen_share=0",)),
    "settle": Row("heads of value as fast for ever", ("value_settle=0",)),
    "hard": Row("target network copied every 200 updates, not a running mean", ("target_tau=0",)),
    "polyak": Row("target network followed four times faster, τ .02", ("target_tau=0.02",)),
    "quantiles": Row("quantile regression, 32 quantiles", ("quantiles=32",)),
    "sqn": Row("no next-item head", ("sqn_weight=0",)),
    "cql": Row("conservative loss, .1", ("cql_weight=0.1",)),
    "slateq": Row("a slate to come is worth its best item alone", ("slate_size=1",)),
    "td": Row("temporal-difference loss ten times heavier", ("td_weight=1",)),
    "forget": Row("ids never left out", ("forget=0",)),
    "decay": Row("ids not decayed, never left out", ("forget=0", "weight_decay=0")),
    "history": Row("state: the newest entry alone", ("history_length=1",)),
    "deeds": Row("histories do not tell what was done with an item", ("untold=deeds",)),
    "ages": Row("histories do not tell how long ago", ("untold=ages",)),
    "repeats": Row("histories do not tell how often: the newest entry of each item", ("untold=repeats",)),
    "raw": Row("values read from raw vectors, and none of n(s)", ("centred=false",)),
    "recall": Row("where users went is not remembered", ("recall=false",)),
    "length": Row("no weight on the length of states' vectors", ("length_weight=0",)),
    "stack": Row("choice as foretold, not set right by what came of it", ("stack=false",)),
    "boltzmann": Row("Boltzmann exploration, with ε .05", ("exploration=boltzmann",)),
    "thompson": Row("Thompson sampling, with ε .05", ("exploration=thompson",)),
    "greedy": Row("no exploration: ε = 0", ("epsilon=0",)),
    "updates": Row("twice the updates", ("updates_per_transition=0.02",)),
}


def share(seed: int, decisions: int, changes: tuple[str, ...]) -> float:
    """Of the way from random to who knows the shop."""
    torch.set_num_threads(1)
    found = look(seed, decisions, list(changes))
    least, most = found["at_random"], found["true_p_true_gain"]
    return (found["learnt_p_learnt_gain"] - least) / (most - least)


def line(name: str, mine: Sequence[float], defaults: Sequence[float]) -> str:
    """A Markdown table's row.

    >>> line("double", [0.5, 0.6, 0.7], [0.5, 0.7, 0.9])
    '| the target network chooses, too (DQN) | .60 ± .25 | -.10 ± .25 |'
    """
    cells = [figure(mine)]
    cells.append(figure([a - b for a, b in zip(mine, defaults, strict=True)]) if name != DEFAULTS else "")
    return f"| {ROWS[name].text} | {' | '.join(cells)} |"


def figure(values: Sequence[float]) -> str:
    """Mean and interval."""
    mean, _, high = over_seeds(values)
    text = f"{mean:.2f}" + (f" ± {high - mean:.2f}" if len(values) > 1 else "")
    return re.sub(r"\b0\.", ".", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which [all]", metavar="ROW")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="shops [1 2 3]")
    add("--decisions", type=int, default=20_000, help="learnt from [20000]")
    add("--jobs", type=int, default=1, help="processes at once [1]")
    add("--json", type=Path, help="append a line of JSON for each row here")
    options = parser.parse_args(arguments)
    names = list(dict.fromkeys((DEFAULTS, *options.rows)))
    print(f"share of what the shop's own probabilities give, after {options.decisions:,} decisions; ", end="")
    print(f"{len(options.seeds)} seeds\n\n| | share | beside the defaults |\n|---|---|---|", flush=True)
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        asked = {
            name: [pool.submit(share, seed, options.decisions, ROWS[name].changes) for seed in options.seeds]
            for name in names
        }
        defaults = [future.result() for future in asked[DEFAULTS]]
        for name, futures in asked.items():
            mine = [future.result() for future in futures]
            print(line(name, mine, defaults), flush=True)
            found = {"row": name, "changes": ROWS[name].changes, "mean": float(np.mean(mine))}
            by_seed = {"seeds": options.seeds, "share": mine, "share_of_defaults": defaults}
            record.append(options.json, "ablation", sys.argv[1:], found | by_seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
