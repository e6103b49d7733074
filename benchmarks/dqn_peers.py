"""How does the product do in a Gymnasium environment beside the DQNs of Stable-Baselines3 and tianshou?

    python -m benchmarks.dqn_peers --peers PYTHON [--seeds 50 51 52] [--interactions 10000] [--json FILE]

`bellwether/Shop-v0`, the simulated shop: 100 items, one shown on each page, an episode is a visit. Each agent learns on
line from so many interactions, then serves visits of fresh luck without exploring, the same ones for all: the score is
their mean reward. The peers see the flat observation. They are judged twice: after as many interactions as ours, and
at the CPU time that ours took for them with its defaults (the shop's own left out). Each learner comes with its
defaults and with one variant chosen by hand, on seed 4 or before any was run. Ours runs through its own doors: deeds
become events in a log, slates come from Recommend; decoder, joiner, replay and learner run beside it in one thread.

    share of the gap = (score - random) / (greedy oracle - random)

PYTHON has the peers: `pip install stable-baselines3==2.9.2 tianshou==2.0.1 gymnasium numba`. Intervals are 95 %,
Student's t over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks import record
from benchmarks.gym_bridge.product import InProcess, Setup, Shop
from benchmarks.gym_bridge.storefront import Deed, Page
from benchmarks.other_python import PeerMissing, arguments_without, said
from benchmarks.shop_visits import FRESH, Clock, Task, online
from learner.agent_settings import AgentSettings
from learner.learner import LearnerSettings
from simulator.figures import over_seeds
from simulator.gym_shop import ShopEnv
from simulator.policies import GreedyOracle, PlanningOracle, Popularity, Random, Recommender
from simulator.shop import CART, CLICK, Events
from streaming.rewards import EVENT_NAMES, RewardTable

NEEDS: Final = "stable-baselines3==2.9.2 tianshou==2.0.1 gymnasium numba"
# ours learns but once in a hundred transitions, by default: it was made for slates and a stream that never ends
OURS: Final = {
    "defaults": Setup(),
    "tuned": Setup(AgentSettings(), LearnerSettings(updates_high=0.1)),
}
BOUNDS: Final[dict[str, Callable[[ShopEnv], Recommender]]] = {
    "random": lambda env: Random(0),
    "popularity": lambda env: Popularity(len(env.shop.item_ids)),
    "greedy oracle": lambda env: GreedyOracle(),
    "planning oracle": lambda env: PlanningOracle(env.shop, 1, decisions=4000),
}
PEERS: Final = {"stable-baselines3": "benchmarks.peers.sb3_dqn", "tianshou": "benchmarks.peers.tianshou_dqn"}


class OneItem:
    """The shop as a storefront: the default reward table, one slot, the visit as horizon."""

    rewards: Final = RewardTable()
    slate_size: Final = 1
    horizon: Final = "session"
    step_s: Final = 0.0  # times are the shop's

    def __init__(self, env: ShopEnv) -> None:
        self._goods = env.shop.goods

    def catalog(self) -> list[dict[str, Any]]:
        """See Storefront."""
        g = self._goods
        return [
            {
                "item_id": g.item_id[row],
                "category": g.category_name[g.category[row]],
                "brand": g.brand_name[g.brand[row]],
                "price": float(g.price[row]),
                "vector": g.vector[row].tolist(),
            }
            for row in range(len(g.item_id))
        ]

    def page(self, observation: Any) -> Page:
        """See Storefront; deeds are told one by one, see `Visits`."""
        return Page([])

    def action(self, slate: Sequence[str]) -> np.int64:
        """See Storefront."""
        return np.int64(self._goods.item_id.index(slate[0]))


class Visits:
    """Plays visits with ours: what the storefront publishes is told at the shop's own times, in the shop's order."""

    def __init__(self, env: ShopEnv, clock: Clock, storefront: OneItem, product: Shop, people: str) -> None:
        """clock: does not count the shop; people: a prefix of user ids."""
        self._env, self._clock, self._storefront, self._product = env, clock, storefront, product
        self._people = people
        self.interactions = 0

    def play(self, seed: int | None = None) -> float:
        """One visit; returns what it earned."""
        with self._clock.aside():
            _, info = self._env.reset(seed=seed)
        earned, over = 0.0, False
        self._tell(info["events"])
        while not over:
            user_id = f"{self._people}-{info['shopper']}"
            slate = self._product.recommend(user_id, Page([]), info["timestamp_ms"])
            with self._clock.aside():
                _, reward, over, _, info = self._env.step(self._storefront.action(slate))
            self.interactions += 1
            earned += reward
            self._tell(info["events"])
        return earned

    def _tell(self, events: Events) -> None:
        goods = self._env.shop.goods
        for shopper, name, item, at_ms in zip(
            *(column.tolist() for column in (events.shopper, events.name, events.item, events.timestamp_ms)),
            strict=True,
        ):
            at_once = name in (CLICK, CART)  # what is bought hours later is attributed by its item
            deed = Deed(EVENT_NAMES[name], goods.item_id[item], at_once, float(goods.price[item]))
            self._product.did(f"{self._people}-{shopper}", [deed], [at_ms])


def ours(task: Task) -> dict[str, Any]:
    """Learns on line from so many interactions (the last visit is played to its end), then serves fresh visits."""
    env, setup = ShopEnv(**task.shop), OURS[task.variant]
    setup = replace(setup, learner=replace(setup.learner, seed=task.seed))
    storefront = OneItem(env)
    product = Shop(InProcess(), storefront, setup, task.seed, returning=True)
    clock = Clock()
    visits = Visits(env, clock, storefront, product, "user")
    earned = [visits.play(task.seed)]
    while visits.interactions < task.interactions:
        earned.append(visits.play())
    row = {"interactions": visits.interactions, "cpu_s": clock.cpu_s, "online": online([*earned, 0.0])}
    product.watched_only = True
    fresh = Visits(ShopEnv(**task.shop), clock, storefront, product, "fresh")
    judged = [fresh.play(FRESH + task.seed)] + [fresh.play() for _ in range(task.visits - 1)]
    return row | {"score": float(np.mean(judged))}


def bound(task: Task) -> dict[str, Any]:
    """What a policy that learns nothing earns in the visits that the others are judged by."""
    env = ShopEnv(**task.shop)
    policy, earned = BOUNDS[task.variant](env), []
    for visit in range(task.visits):
        env.reset(seed=FRESH + task.seed if not visit else None)
        policy.observe(env.turn.events)
        over, total = False, 0.0
        while not over:
            item = policy.recommend(env.shop, env.turn, 1)[0, 0]
            _, reward, over, _, info = env.step(item)
            policy.observe(info["events"])
            total += reward
        earned.append(total)
    return {"score": float(np.mean(earned))}


def peer(python: str, package: str, task: Task) -> dict[str, dict[str, Any]]:
    """Its rows, "interactions" and "cpu". Raises: PeerMissing."""
    found = said(python, PEERS[package], [task.sent()], NEEDS)
    return {
        at: {**row, "score": float(np.mean(row.pop("earned"))), "version": found["version"]}
        for at, row in found["at"].items()
    }


def rows_of(seed: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every agent's rows of one seed; ours first, for its defaults' CPU time is what the peers get."""
    task = Task("", seed, options.interactions, 0.0, options.visits, {"items": options.items})
    for variant in BOUNDS:
        yield {"agent": variant, "seed": seed} | bound(replace(task, variant=variant))
    cpu_s = 0.0
    for variant in OURS:
        found = ours(replace(task, variant=variant))
        cpu_s = cpu_s or found["cpu_s"]
        yield {"agent": f"ours, {variant}", "seed": seed, "at": "interactions"} | found
    if options.peers is None:
        return
    for package in PEERS:
        for variant in ("defaults", "tuned"):
            both = peer(options.peers, package, replace(task, variant=variant, cpu_s=cpu_s))
            for at in ("interactions", "cpu"):
                yield {"agent": f"{package}, {variant}", "seed": seed, "at": at} | both[at]


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table, a row for each agent and way to stop it."""
    yield "| agent | stopped at | reward a visit | share of the gap | interactions | CPU, s | on line |"
    yield "|---|---|---|---|---|---|---|"
    limits = {
        name: {row["seed"]: row["score"] for row in rows if row["agent"] == name}
        for name in ("random", "greedy oracle")
    }
    for agent, at in dict.fromkeys((row["agent"], row.get("at")) for row in rows):
        mine = [row for row in rows if (row["agent"], row.get("at")) == (agent, at)]
        shares = [
            (row["score"] - low) / (limits["greedy oracle"][row["seed"]] - low)
            for row in mine
            for low in (limits["random"][row["seed"]],)
        ]
        cells = [agent, {"interactions": "interactions", "cpu": "our CPU time"}.get(str(at), "")]
        cells += [interval([row["score"] for row in mine]), interval(shares)]
        for key, form in (("interactions", ",.0f"), ("cpu_s", ".0f"), ("online", ".2f")):
            cells.append(format(float(np.mean([row[key] for row in mine])), form) if key in mine[0] else "")
        yield f"| {' | '.join(cells)} |"


def interval(values: list[float]) -> str:
    """Mean and half the interval, over seeds."""
    mean, _, high = over_seeds(values)
    return f"{mean:.2f}" + (f" ± {high - mean:.2f}" if len(values) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--peers", metavar="PYTHON", help="a Python that has stable-baselines3 and tianshou [ours alone]")
    add("--seeds", type=int, nargs="+", default=[50, 51, 52], help="[50 51 52]; 4 is for trying")
    add("--interactions", type=int, default=10_000, help="pages that each agent learns from [10000]")
    add("--visits", type=int, default=600, help="fresh visits that each is judged by [600]")
    add("--items", type=int, default=100, help="in the shop [100]")
    add("--json", type=Path, help="append one line of JSON here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ours(Task("tuned", 0, 1500, 0.0, 2, {"items": options.items}))  # all loops are compiled then
    rows = []
    for seed in options.seeds:
        for row in rows_of(seed, options):
            rows.append(row)
            print(f"  seed {seed} {row['agent']}: {row['score']:.3f}", file=sys.stderr, flush=True)
    print("\n".join(table(rows)))
    given = arguments_without(options.peers)
    settings = {name: {"agent": vars(s.agent), "learner": vars(s.learner)} for name, s in OURS.items()}
    record.append(options.json, "dqn_peers", given, {"ours": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PeerMissing as error:
        sys.exit(str(error))
