"""How many transitions a second does the learner learn from, replay sampling included?

    python -m benchmarks.updates --torchrl PYTHON [--items 1000 10000] [--batches 256 1024] [--device cpu] [--json FILE]

Beside it, taking turns in the same run, a plain double DQN (van Hasselt et al. 2016) with the product's network, on
transitions drawn from the same replay: as an eager loop in plain PyTorch, and by TorchRL with its own replay buffer,
DQNLoss and target updater. That is a part of what an update of ours does: ours trains on every slot of each slate, has
losses of choice, reward and next item besides, the Bayesian layer, and n-step returns that are added up when sampled.
The plain ones store both states of each transition, and get their n-step returns ready made.

PYTHON has `pip install torchrl==0.14.1 tensordict==0.14.3 torch numpy numba`. A turn is so many updates by each; a
rate is of the median update, a ratio the median over turns. `stages`: shares of an update of ours, by CPU time where
the device is the CPU. On a GPU ours is also measured without its CUDA graphs (learner.graphs), and the stages are those
of updates without.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch

from benchmarks import record
from benchmarks.growth import Shape, batches, introduction
from benchmarks.ingest import traffic
from benchmarks.other_python import PeerMissing, arguments_without, said
from benchmarks.peers.stored import WARM_UP, timed
from learner.agent_settings import AgentSettings
from learner.graphs import Graphs
from learner.learner import Learner, LearnerSettings
from learner.replay import Histories
from streaming.join_settings import JoinSettings
from streaming.schemas import Codec

NEEDS: Final = "torchrl==0.14.1 tensordict==0.14.3 torch numpy numba"
PEERS: Final = {"torchrl": "benchmarks.peers.torchrl_dqn", "eager": "benchmarks.peers.eager_dqn"}
RECORDS: Final = 60_000
USERS: Final = 5_000
STORED: Final = 40_000  # transitions that the peers get
MOST_UPDATES: Final = 2_000  # until there is a graph
STAGES: Final = {  # of an update: whose method
    "sample": ("replay", "sample"),
    "to tensors": ("agent", "_rows"),
    "item keys": ("agent._objective", "keys"),
    "next value": ("agent._objective", "next_value"),
    "losses": ("agent._objective", "losses"),
    "backward, Adam, target": ("agent", "_step"),
    "Bayesian layer": ("agent._response", "move"),
    "priorities": ("replay", "update_priorities"),
}


def filled(items: int, batch: int, device: str, exact_items: int = AgentSettings.exact_items) -> Learner:
    """A learner whose replay holds the slates, clicks and purchases of a shop of so many items."""
    agent = (
        AgentSettings(batch_size=batch)
        if exact_items is None
        else AgentSettings(batch_size=batch, exact_items=exact_items)
    )
    join = JoinSettings(gamma=agent.gamma, history_length=agent.entries)
    settings = LearnerSettings(updates_high=1e6)
    learner = Learner(settings, agent, join, Codec(), None, device)
    learner.assign({0: 0})
    shape, ends = Shape(users=USERS, items=items), [0]
    for records in (introduction(shape), traffic(RECORDS, USERS, items, np.random.default_rng(0))):
        for each in batches(records, 1, ends):
            learner.take(each)
    return learner


def store(learner: Learner, file: Path) -> None:
    """Transitions for the peers, drawn as the learner draws them."""
    settings, found = learner.agent.settings, defaultdict(list)
    for _ in range(0, STORED, settings.batch_size):
        batch = learner.replay.sample(
            settings.batch_size,
            learner.rng,
            n_step=settings.steps,
            gamma=settings.gamma,
            unaided=learner.agent.unaided,
        )
        for prefix, histories in (("", batch.state), ("next_", batch.next_state)):
            for name, column in zip(Histories._fields, histories, strict=True):
                found[prefix + name].append(column.copy())
        for name in ("reward", "discount"):
            found[name].append(getattr(batch, name).copy())
        found["action"].append(batch.action.astype(np.int64))
    whole = {name: np.concatenate(columns)[:STORED] for name, columns in found.items()}
    np.savez(file, items=np.int64(learner.agent.rows), **whole)  # type: ignore[arg-type]


def stages(learner: Learner, count: int, device: str) -> dict[str, float]:
    """Shares of an update; what is in none of STAGES is "other"."""
    spent: dict[str, float] = defaultdict(float)

    def clock() -> float:
        if device == "cpu":
            return time.thread_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def watched(stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            result = method(*args, **kwargs)
            spent[stage] += clock() - began
            return result

        return call

    for stage, (owner, method) in STAGES.items():
        whose: Any = learner
        for step in owner.split("."):
            whose = getattr(whose, step)
        setattr(whose, method, watched(stage, getattr(whose, method)))
    began = clock()
    learner.train(count)
    total = clock() - began
    return {stage: spent[stage] / total for stage in STAGES} | {"other": 1 - sum(spent.values()) / total}


def measure(items: int, batch: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of one size."""
    learner, file = filled(items, batch, options.device, options.exact_items), folder / f"{items}-{batch}.npz"
    store(learner, file)
    learner.train(WARM_UP)
    graphs = settled(learner)
    wanted = ["--batch", batch, "--updates", options.updates, "--threads", options.threads]
    arguments = [str(file), *map(str, wanted), "--device", options.device]
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.turns):
        seconds = {"ours": timed(lambda: learner.train(1), options.updates, options.device)}
        if graphs is not None:
            learner.agent.graphs = None
            seconds["launched"] = timed(lambda: learner.train(1), options.updates, options.device)
            learner.agent.graphs = graphs
        for peer, module in PEERS.items():
            python = options.torchrl if peer == "torchrl" else sys.executable
            if python is not None:
                seconds[peer] = said(python, module, arguments, NEEDS)["seconds"]
        for name, each in seconds.items():
            rates[name].append(batch / median(each))
    found: dict[str, Any] = {"items": items, "batch": batch}
    found |= {f"{name}_per_s": median(of_turns) for name, of_turns in rates.items()}
    for peer in (*PEERS, "launched"):
        if peer in rates:
            paired = zip(rates["ours"], rates[peer], strict=True)
            found[f"ratio_to_{peer}"] = median(ours / theirs for ours, theirs in paired)
    learner.agent.graphs = None  # in which there are no stages
    return found | {"stages": stages(learner, options.updates, options.device)}


def settled(learner: Learner) -> Graphs | None:
    """Train until updates are CUDA graphs, if they are to be; None: they are not."""
    graphs = learner.agent.graphs
    if graphs is None:
        return None
    for _ in range(MOST_UPDATES):
        before = graphs.replayed
        learner.train(1)
        if graphs.replayed > before:
            return graphs
    print("updates: no CUDA graph was made of them", file=sys.stderr)
    return None


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    numbers = [f"{found['items']:>9,}", f"{found['batch']:>6,}", f"{found['ours_per_s']:>10,.0f}"]
    for peer in (*PEERS, "launched"):
        rate, ratio = found.get(f"{peer}_per_s"), found.get(f"ratio_to_{peer}")
        numbers.append(" " * 18 if rate is None else f"{rate:>10,.0f} ({ratio:4.2f} x)")
    return "  ".join(numbers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, and where an update's time goes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.updates", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--torchrl", metavar="PYTHON", help="the Python that has TorchRL; without: left out")
    parser.add_argument("--items", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    exact = AgentSettings.exact_items
    parser.add_argument("--exact-items", type=int, default=exact, help="as the learner's; a GPU can do more")
    parser.add_argument("--updates", type=int, default=30, help="in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each, as the learner's --threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    print("transitions a second, ours in so many times as many")
    print(f"{'items':>9}  {'batch':>6}  {'ours':>10}  {'TorchRL':>18}  {'eager':>18}  {'no graphs':>18}")
    with tempfile.TemporaryDirectory() as folder:
        for items in options.items:
            for batch in options.batches:
                try:
                    rows.append(measure(items, batch, options, Path(folder)))
                except PeerMissing as error:
                    print(f"updates: {error}", file=sys.stderr)
                    return 1
                print(line(rows[-1]), flush=True)
    for row in rows:
        print(f"\nof an update of ours, {row['items']:,} items, batches of {row['batch']:,}")
        for stage, share in row["stages"].items():
            print(f"{stage:>24} {100 * share:5.1f} %")
    record.append(
        options.json, "updates", arguments_without(options.torchrl), {"device": options.device, "rows": rows}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
