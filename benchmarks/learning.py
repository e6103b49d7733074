"""How fast does the agent learn the simulated shop, by decisions and by CPU time, and how far does it come?

    python -m benchmarks.learning [--seeds 3] [--decisions 50000 150000] [--set batch_size=128 ...] [--json FILE]

The whole loop in one process and one thread, without a log or a server: shop -> policy (epsilon-greedy slates from
weights renewed each turn) -> feed -> joiner -> replay -> agent. Random, popularity and the oracles of
simulator/policies.py meet the same shoppers on the same days (common random numbers). Figures at N decisions are of
the visits that began in the last `--window-h` hours of event time before the learner's N-th decision (bar the last
hour, whose visits are not over): exploration, and learning on, included.

    gap closed = (learned - random) / (planning oracle - random), in reward per visit

Intervals are 95 %, Student's t over seeds (over shoppers where there is one seed).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import record
from benchmarks.shop import policies
from learner.agent import Agent
from learner.agent_settings import AgentSettings
from learner.exploration import EPSILON, GREEDY, Exploration
from learner.learner import LearnerSettings
from learner.pacing import Band
from learner.policy import Policy
from learner.replay import Histories, Replay, empty_batch
from learner.weights import Manifest, Weights
from simulator.feed import Feed
from simulator.figures import figures, over_seeds, same_visits
from simulator.policies import play
from simulator.shop import HOUR_MS, PURCHASE, VIEW, Outcome, Shop, ShopSettings, Turn, Visits
from streaming.columns import Columns
from streaming.interning import hash_string
from streaming.joiner import Joined, Joiner, JoinSettings

SLOTS = 6
UNTOLD = ("", "deeds", "ages", "repeats")
NAMES = ("random", "popularity", "greedy oracle", "history oracle", "planning oracle")


class ShopCatalog(NamedTuple):
    """The shop's goods as the agent reads a catalog; item row r has vocabulary id r + 1."""

    category: npt.NDArray[np.uint64]
    brand: npt.NDArray[np.uint64]
    price: npt.NDArray[np.float32]
    in_stock: npt.NDArray[np.bool_]
    gone: npt.NDArray[np.bool_]
    known: npt.NDArray[np.bool_]
    recorded: npt.NDArray[np.bool_]
    vector: npt.NDArray[np.float32]

    @classmethod
    def of(cls, shop: Shop) -> ShopCatalog:
        """As the catalog topic would say it now; what is not released yet counts as out of stock."""
        g, n = shop.goods, len(shop.item_ids) + 1
        categories = np.array([hash_string(name) for name in g.category_name], np.uint64)
        brands = np.array([hash_string(name) for name in g.brand_name], np.uint64)
        return cls(
            np.append(np.uint64(0), categories[g.category]),
            np.append(np.uint64(0), brands[g.brand]),
            np.append(np.nan, g.price).astype(np.float32),
            np.append(False, shop.available),
            np.zeros(n, np.bool_),
            np.arange(n) > 0,
            np.arange(n) > 0,
            np.vstack([np.zeros((1, g.vector.shape[1]), np.float32), g.vector]),
        )


@dataclass(frozen=True)
class LoopSettings:
    """What is around the agent."""

    epsilon: float = field(default=EPSILON, metadata={"help": "share of slots explored"})
    exploration: str = field(
        default=GREEDY.kind, metadata={"help": "of the slots that epsilon does not draw"}
    )
    updates_per_transition: float = field(
        default=0.01, metadata={"help": "gradient steps for each transition"}
    )
    updates_young: float = field(
        default=LearnerSettings.updates_young,
        metadata={"help": "times that, about, while few choices have been learnt from"},
    )
    min_replay: int = field(default=1000, metadata={"help": "transitions before the first update"})
    capacity: int = field(default=1_000_000, metadata={"help": "transitions kept"})
    alpha: float = field(default=0.0, metadata={"help": "of prioritised replay; 0: uniform"})
    beta: float = field(default=1.0, metadata={"help": "how far importance weights undo how rows are drawn"})
    chosen_share: float = field(
        default=0.25, metadata={"help": "least share of a batch in which something was chosen from a slate"}
    )
    untold: str = field(default="", metadata={"help": "what histories leave out: deeds, ages or repeats"})

    def __post_init__(self) -> None:
        if self.untold not in UNTOLD:
            raise ValueError(f"untold={self.untold}: must be one of {', '.join(filter(None, UNTOLD))}")


class Loop:
    """The learned recommender: serves a shop's turns and learns from what comes of them."""

    def __init__(self, shop: Shop, agent: AgentSettings, loop: LoopSettings, seed: int) -> None:
        self.settings = loop
        self.agent = Agent(agent, seed=seed)
        self.updates_s = self.cpu_s = 0.0
        self._shop, self.feed = shop, Feed(shop)
        self._joiner = Joiner(JoinSettings(gamma=agent.gamma, history_length=agent.entries), [0])
        self._replay = Replay(loop.capacity, agent.entries, alpha=loop.alpha, chosen_share=loop.chosen_share)
        self._band = Band(0.0, loop.updates_per_transition, loop.min_replay, loop.updates_young)
        self._batch = empty_batch(agent.batch_size, agent.entries)
        self._explore, self._draw = np.random.default_rng([seed, 21]), np.random.default_rng([seed, 22])
        self._exploration = Exploration(loop.exploration)  # type: ignore[arg-type]
        self._version = 0
        self._hour = -1
        self.slates = np.zeros((0, SLOTS), np.int32)  # shown last, rows of the catalog
        self.columns: Columns | None = None  # and the records of that turn

    def catalog(self) -> ShopCatalog:
        """What the agent is told of the items."""
        return ShopCatalog.of(self._shop)

    def turn(self) -> tuple[Turn, Outcome]:
        """One turn: stock, slates, outcome, learning."""
        turn = self._shop.next_turn()
        began = time.process_time()
        hour = int(turn.timestamp_ms.min()) // HOUR_MS
        if hour != self._hour:  # stock changes by the hour
            self.agent.set_catalog(self.catalog())
            self._hour = hour
        slates, propensity = self._slates(turn)
        self.slates = slates
        self.cpu_s += time.process_time() - began
        outcome = self._shop.show(turn, slates)
        began = time.process_time()
        columns = self.feed.columns(turn, slates, propensity, outcome, self._version, self.settings.epsilon)
        self.columns = columns
        self._take(self._joiner.push(columns))
        self._learn()
        self.cpu_s += time.process_time() - began
        return turn, outcome

    def states(self, turn: Turn) -> Histories:
        """The turn's histories, as the agent is told of them."""
        return told(histories(turn, self.agent.settings.entries), self.settings.untold)

    def policy(self) -> Policy:
        """The newest weights, by the way that they take to a server."""
        tensors = {name: tensor.numpy() for name, tensor in self.agent.tensors().items()}
        manifest = Manifest(
            version=self._version,
            epoch=1,
            parent=None,
            tensors_sha256="",
            shapes={},
            dtypes={},
            vocabulary_sha256=(),
            items=len(self._shop.item_ids),
            settings=self.agent.shape(),
        )
        return Policy.from_weights(Weights(manifest, tensors, list(self._shop.item_ids)))

    def _slates(self, turn: Turn) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
        """[B, 6] rows of the catalog and their propensities; what was bought lately is left out, as at a server."""
        self._version += 1
        policy, past = self.policy(), turn.history
        states = self.states(turn)
        eligible = np.repeat(np.append(False, turn.available)[None], len(turn.shopper), axis=0)
        b, h = np.nonzero(past.name == PURCHASE)
        eligible[b, past.item[b, h] + 1] = False
        slates = policy.recommend(
            states, SLOTS, self.settings.epsilon, self._explore, eligible, self._exploration
        )
        return (
            np.stack([slate.ids for slate in slates]).astype(np.int32) - 1,
            np.stack([slate.propensity for slate in slates]),
        )

    def _take(self, joined: Joined) -> None:
        """What the joiner made of a turn."""
        states = joined.states
        seen = told(Histories(*(getattr(states, name) for name in Histories._fields)), self.settings.untold)
        joined = joined._replace(states=states._replace(**seen._asdict()))
        self.agent.meet(joined.transitions.action)
        self.agent.foretell(joined)
        self._replay.insert(joined)

    def _learn(self) -> None:
        """As many updates as the band allows."""
        agent, replay = self.agent, self._replay
        began = time.process_time()
        worth = self._band.worth(replay.inserted, replay.chosen)
        for _ in range(self._band.updates_left(worth, agent.updates)):
            s = agent.settings
            batch = replay.sample(
                s.batch_size,
                self._draw,
                self.settings.beta,
                s.steps,
                s.gamma or None,
                out=self._batch,
                unaided=agent.unaided,
            )
            replay.update_priorities(batch.index, agent.update(batch, len(replay)).td_error)
        self.updates_s += time.process_time() - began


def histories(turn: Turn, length: int) -> Histories:
    """The turn's histories as states of `length` entries, as `Policy.encode` makes them of what the shop remembers."""
    past = turn.history
    age_s = np.maximum(turn.timestamp_ms[:, None] - past.timestamp_ms, 0) / 1000.0
    real = past.item >= 0
    whole = Histories(past.item + np.int32(1), past.name, (age_s * real).astype(np.float32), past.value)
    more = max(0, length - past.item.shape[1])
    return Histories(*(np.pad(column[:, :length], ((0, 0), (0, more))) for column in whole))


def told(histories: Histories, untold: str) -> Histories:
    """Without what was done (all are views, of no price), how long ago, or how often: each item's newest entry alone.

    >>> told(Histories(*np.array([[[7, 8, 7, 0]], [[2, 3, 1, 0]], [[5, 60, 70, 0]], [[0, 9, 0, 0]]])), "repeats").item
    array([[7, 8, 0, 0]])
    """
    if untold == "deeds":
        name = np.where(histories.name > 0, VIEW, 0).astype(histories.name.dtype)
        return histories._replace(name=name, value=np.zeros_like(histories.value))
    if untold == "ages":
        return histories._replace(age_s=np.zeros_like(histories.age_s))
    if untold == "repeats":
        item = histories.item
        same = np.tril(item[:, :, None] == item[:, None, :], -1).any(axis=2)  # as a newer entry
        kept = np.argsort(same | (item == 0), axis=1, kind="stable")
        real = np.take_along_axis(~same & (item > 0), kept, axis=1)
        return Histories(*(np.take_along_axis(column, kept, axis=1) * real for column in histories))
    return histories


class Learnt(NamedTuple):
    """One run of the learned recommender."""

    visits: Visits
    edges: list[int]  # event time at which each of the asked numbers of decisions was reached, ms
    cost: dict[str, float]


def learn(
    settings: ShopSettings, seed: int, decisions: Sequence[int], agent: AgentSettings, loop: LoopSettings
) -> Learnt:
    """Let an agent serve the shop and learn."""
    shop = Shop(settings, seed)
    runner = Loop(shop, agent, loop, seed)
    served, edges = 0, []
    for goal in sorted(decisions):
        while served < goal:
            turn, _ = runner.turn()
            served += len(turn.shopper)
        edges.append(int(turn.timestamp_ms.min()))
        print(f"  seed {seed} learned: {served} decisions", file=sys.stderr, flush=True)
    updates = runner.agent.updates
    cost = {
        "decisions": served,
        "updates": updates,
        "update_ms": 1e3 * runner.updates_s / max(1, updates),
        "cpu_ms_per_decision": 1e3 * runner.cpu_s / served,
    }
    return Learnt(shop.visits(), edges, cost)


def spend_until(settings: ShopSettings, seed: int, name: str, end_ms: int) -> Visits:
    """The visits that a policy of benchmarks.shop gets until then."""
    shop, policy = Shop(settings, seed), _maker(settings, seed, name)
    for _ in play(shop, policy, SLOTS, end_ms=end_ms):
        pass
    return shop.visits()


_plans: dict[tuple[ShopSettings, int], dict[str, Any]] = {}


def _maker(settings: ShopSettings, seed: int, name: str) -> Any:
    if (settings, seed) not in _plans:
        _plans.clear()
        _plans[settings, seed] = policies(settings, seed, SLOTS)
    return _plans[settings, seed][name]()


def compare(
    learnt: Learnt, others: dict[str, Visits], decisions: Sequence[int], hours: float
) -> list[dict[str, Any]]:
    """For each number of decisions, every policy's figures on the same visits, and shares of the gap."""
    rows = []
    for goal, edge in zip(sorted(decisions), learnt.edges, strict=True):
        end = edge - HOUR_MS
        paired = same_visits({**others, "learned": learnt.visits}, end - hours * HOUR_MS, end)
        row: dict[str, Any] = {name: figures(visits)._asdict() for name, visits in paired.items()}
        reward = {name: row[name]["reward_per_visit"] for name in row}
        gap = reward["planning oracle"] - reward["random"]
        row["gap_closed"] = {name: (reward[name] - reward["random"]) / gap for name in reward}
        rows.append({"decisions": goal, "visits": len(paired["learned"].visit), **row})
    return rows


def run_seed(
    seed: int, decisions: Sequence[int], hours: float, agent: AgentSettings, loop: LoopSettings
) -> dict[str, Any]:
    settings = ShopSettings()
    learnt = learn(settings, seed, decisions, agent, loop)
    others = {name: spend_until(settings, seed, name, learnt.edges[-1]) for name in NAMES}
    return {"seed": seed, **learnt.cost, "at": compare(learnt, others, decisions, hours)}


def table(seeds: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table, a row for each policy and number of decisions."""
    yield "| decisions | policy | reward a visit | CTR | gap closed |"
    yield "|---|---|---|---|---|"
    for i, at in enumerate(seeds[0]["at"]):
        for name in at["gap_closed"]:
            rows = [seed["at"][i] for seed in seeds]
            cells = [
                _interval([row[name]["reward_per_visit"] for row in rows], rows[0][name], 1.0, ".2f"),
                _interval([row[name]["ctr"] for row in rows], None, 100.0, ".1f") + " %",
                _interval([row["gap_closed"][name] for row in rows], None, 1.0, ".2f"),
            ]
            yield f"| {at['decisions']:,} | {name} | {' | '.join(cells)} |"


def _interval(values: list[float], one: dict[str, Any] | None, scale: float, form: str) -> str:
    mean, low, high = over_seeds(values)
    if len(values) == 1:
        low, high = one["ci95"] if one else (mean, mean)
    return f"{scale * mean:{form}}" + (f" ± {scale * (high - low) / 2:{form}}" if high > low else "")


def changed(settings: Any, changes: Sequence[str]) -> Any:
    """The settings with `name=value` applied where they have that name. Raises: ValueError for a value that is none."""
    types = {f.name: type(f.default) for f in fields(settings)}
    pairs = dict(change.split("=", 1) for change in changes)
    read = {name: _value(types[name], text) for name, text in pairs.items() if name in types}
    return replace(settings, **read)


def check_changes(parser: argparse.ArgumentParser, changes: Sequence[str], *settings: Any) -> None:
    """End with the parser's error where `changed` could not apply these, or none of the settings has such a name."""
    known = sorted({f.name for some in settings for f in fields(some)})
    for change in changes:
        if "=" not in change or change.split("=", 1)[0] not in known:
            parser.error(f"--set {change}: must be NAME=VALUE, NAME one of {', '.join(known)}")
        for some in settings:
            try:
                changed(some, [change])
            except ValueError as error:
                parser.error(f"--set {change}: {error}")


def _value(kind: type, text: str) -> Any:
    if kind is not bool:
        return kind(text)
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r}: must be true or false")
    return text.lower() == "true"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103], help="shops [101 102 103]")
    parser.add_argument(
        "--decisions", type=int, nargs="+", default=[10_000, 25_000, 50_000, 100_000, 150_000]
    )
    parser.add_argument("--window-h", type=float, default=4.0, help="event hours in each figure [4]")
    parser.add_argument(
        "--set", nargs="*", default=[], help="NAME=VALUE of the agent or of the loop around it"
    )
    parser.add_argument("--json", type=Path, help="append one line of JSON here")
    options = parser.parse_args()
    check_changes(parser, options.set, AgentSettings(), LoopSettings())
    torch.set_num_threads(1)
    agent, loop = changed(AgentSettings(), options.set), changed(LoopSettings(), options.set)
    seeds = [run_seed(seed, options.decisions, options.window_h, agent, loop) for seed in options.seeds]
    print("\n".join(table(seeds)))
    cost = {
        key: float(np.mean([s[key] for s in seeds]))
        for key in ("updates", "update_ms", "cpu_ms_per_decision")
    }
    print(
        f"\nlearned, for each of {len(seeds)} seeds: {cost['updates']:,.0f} updates of {cost['update_ms']:.1f} ms; "
        f"{cost['cpu_ms_per_decision']:.2f} ms of CPU a decision, serving and learning together"
    )
    found = {"agent": agent.__dict__, "loop": loop.__dict__, "seeds": seeds}
    record.append(options.json, "learning", sys.argv[1:], found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
