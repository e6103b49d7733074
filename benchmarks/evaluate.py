"""Do the 95 % intervals of `learner evaluate` cover what a policy would really have earned?

    python -m benchmarks.evaluate [--runs 1000] [--json FILE]

A simulated shop with very many shoppers is served by a logging policy that explores. The shoppers are dealt out to runs
at random, so that each run is a sample of its own from one population, and each run is evaluated as `learner evaluate`
does: rewards from the joiner, purchases and refunds of the next days included; two readings. The truth is the
simulator's own model: what slates of the target policy are expected to earn from these shoppers, in the states of mind
that they were in when the log's decisions were made. The slates are drawn by the server's own code, so that the truth
shares no formula with what is tested.

A run's estimate is covered if its 95 % interval holds the truth. Of 1,000 runs, perfect intervals cover 936 to 964, in
95 of 100 such tables. DM is no more right than its model: its rows say what that is worth here. The last log is short;
`warned` is the share of runs whose report doubts the policy's figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import record
from benchmarks.learning import Loop, LoopSettings, histories
from learner.agent_settings import AgentSettings
from learner.evaluate import FIRST_RECORDS, POLL_RECORDS
from learner.evaluation import EvaluateConfig, Evaluation
from learner.exploration import epsilon_greedy_slate
from learner.policy import Policy
from learner.target_policies import Learned, Target, Uniform
from simulator.feed import Feed
from simulator.policies import worth
from simulator.shop import PURCHASE, REFUND, Mind, Outcome, Shop, ShopSettings, Turn
from streaming.catalog import Catalog
from streaming.columns import Columns
from streaming.interning import Vocabulary
from streaming.joiner import JoinSettings
from streaming.rewards import RewardTable
from streaming.schemas import Codec

# A small and lively shop, in which a run is a sample that an interval may be asked of: a click in five impressions and
# a purchase in sixty; 12 items on offer.
SHOP: Final = ShopSettings(
    items=40,
    categories=8,
    brands=8,
    history_length=8,
    new_items=0.0,
    stock_outs=0.0,
    mind=Mind(base=-1.5, cart=-1.0),
)
OFFERED: Final = np.arange(41) % 3 == 1  # by vocabulary id
OFFERED[37:] = False
AGENT: Final = AgentSettings(history_length=SHOP.history_length)
# Without unaided views: what shoppers go to by themselves is not the policy's doing.
REWARDS: Final = RewardTable.parse("select_item=1,add_to_cart=2,purchase=10,refund=-10")
JOIN: Final = JoinSettings(rewards=REWARDS, attribution_window_s=3 * 86_400, late_after_s=7 * 86_400)
METHODS: Final = ("IPS", "SNIPS", "DR", "SNDR", "switch-DR", "DM")
LIMIT: Final = 8192  # shoppers served at once

Rows = npt.NDArray[np.int64]


class World(NamedTuple):
    """How the log comes about, and who is judged by it."""

    name: str
    slots: int
    epsilon: float  # of the logging policy, else an early version of the weights
    target_epsilon: float  # of a later version
    shoppers: int  # of a run, each with about eight decisions
    slates: tuple[str, ...] = ("cascade",)


WORLDS: Final = (
    World("single items, drawn at random", 1, 1.0, 0.3, 200),
    World("single items, 70 % explored", 1, 0.7, 0.3, 300),
    World("slates of 3, drawn at random", 3, 1.0, 0.7, 200, ("cascade", "standard")),
    World("slates of 3, 70 % explored", 3, 0.7, 0.7, 200, ("cascade", "slotwise")),
    World("single items, 40 % explored, a short log", 1, 0.4, 0.3, 100),
)


class Logged(NamedTuple):
    """One shop's log, a partition for each run, and the truth."""

    runs: list[list[Columns]]  # batch by batch, the first ones small, as they are read from a log
    truth: dict[tuple[str, str], float]  # (target, slate model) -> reward of a decision
    decisions: int


def versions(seed: int, decisions: int) -> tuple[Policy, Policy]:
    """Weights as they are early, and after so many decisions, in a shop with the same goods and other shoppers."""
    loop = Loop(Shop(replace(SHOP, shoppers=2000), seed, REWARDS), AGENT, LoopSettings(), seed)
    served, early = 0, None
    while served < decisions:
        turn, _ = loop.turn()
        served += len(turn.shopper)
        early = early or (loop.policy() if served > decisions // 4 else None)
    assert early is not None
    return early, loop.policy()


def log_of(world: World, early: Policy, late: Policy, seed: int, runs: int, hours: float) -> Logged:
    """Serve a shop for so long."""
    shop = Shop(replace(SHOP, shoppers=runs * world.shoppers), seed, REWARDS, luck=seed + 1)
    feed, rng = Feed(shop, runs), np.random.default_rng([seed, 31])
    out: list[list[Columns]] = [[] for _ in range(runs)]
    earned: dict[tuple[str, str], float] = {}
    decisions, asked, end_ms = 0, 0, SHOP.start_ms + hours * 3_600_000
    turn = shop.next_turn(LIMIT)
    while turn.timestamp_ms.min() < end_ms:
        eligible = can_be_shown(shop, turn)
        q = [policy.q(histories(turn, policy.history_length)) for policy in (early, late)]
        slates, propensity = drawn(q[0], eligible, world.slots, world.epsilon, rng)
        # enough of them: the truth is known far better than any run can tell it
        some = np.flatnonzero(turn.shopper % 4 == 0)
        asked += len(some)
        if len(some):
            told = _truth(world, shop, turn, some, eligible[some], q[1][some], slates[some], rng)
            earned = {key: earned.get(key, 0.0) + value for key, value in told.items()}
        outcome = shop.show(turn, slates)
        _deal_out(feed.columns(turn, slates, propensity, outcome, 1, world.epsilon), out)
        decisions += len(turn.shopper)
        turn = shop.next_turn(LIMIT)
    _deal_out(feed.columns(*what_is_yet_to_come(shop, turn, world.slots)), out)
    truth = {key: value / asked for key, value in earned.items()}
    return Logged([in_batches(run) for run in out], truth, decisions)


def can_be_shown(shop: Shop, turn: Turn) -> npt.NDArray[np.bool_]:
    """[B, N + 1] by vocabulary id: what is on offer and was not bought, or was sent back, as at a server."""
    past, n = turn.history, len(shop.item_ids)
    pieces = np.zeros((len(turn.shopper), n + 1), np.int64)
    for name, sign in ((PURCHASE, 1), (REFUND, -1)):
        b, h = np.nonzero(past.name == name)
        np.add.at(pieces, (b, past.item[b, h] + 1), sign)
    return (pieces <= 0) & OFFERED


def drawn(
    q: npt.NDArray[np.float32],
    eligible: npt.NDArray[np.bool_],
    slots: int,
    epsilon: float,
    rng: np.random.Generator,
) -> tuple[Rows, npt.NDArray[np.float64]]:
    """[B, K] rows of the catalog and their propensities, by the code that serves."""
    slates = [epsilon_greedy_slate(q[b], eligible[b], slots, epsilon, rng) for b in range(len(q))]
    return np.stack([s.ids for s in slates]) - 1, np.stack([s.propensity for s in slates])


def _truth(
    world: World,
    shop: Shop,
    turn: Turn,
    some: Rows,
    eligible: npt.NDArray[np.bool_],
    q: npt.NDArray[np.float32],
    slates: Rows,
    rng: np.random.Generator,
) -> dict[tuple[str, str], float]:
    """Sum over these rows of the turn of what each target is expected to earn: one slate is drawn of it, its luck
    averaged out. eligible, q, slates: of these rows."""
    minds = shop.minds(turn.shopper[some])
    value = shop.click_probability(minds) * worth(shop, minds.stage)  # [B, N] once looked at
    look, rows = shop.look(world.slots), np.arange(len(slates))[:, None]
    found = {}
    for name, epsilon in (("uniform", 1.0), ("weights", world.target_epsilon)):
        own, _ = drawn(q, eligible, world.slots, epsilon, rng)
        found[name, "cascade"] = found[name, "standard"] = float((value[rows, own] * look).sum())
        if "slotwise" in world.slates:
            left, total = eligible.copy(), 0.0
            for k in range(world.slots):
                one, _ = drawn(q, left, 1, epsilon, rng)
                total += float((value[rows, one] * look[k]).sum())
                left[rows[:, 0], slates[:, k] + 1] = False
            found[name, "slotwise"] = total
    return found


def what_is_yet_to_come(shop: Shop, turn: Turn, slots: int) -> tuple[Turn, Any, Any, Outcome]:
    """The events before this turn, and all purchases and refunds that are resolved upon; no decision."""
    nobody, none = slice(0, 0), np.zeros((0, slots))
    rest = shop.rest()
    events = type(rest)(*(np.concatenate(column) for column in zip(turn.events, rest, strict=True)))
    fields = {
        name: getattr(turn, name)[nobody] for name in ("decision", "shopper", "visit", "page", "timestamp_ms")
    }
    history = type(turn.history)(*(column[nobody] for column in turn.history))
    empty = Turn(**fields, history=history, available=turn.available, events=events)
    no_events = type(rest)(*(column[nobody] for column in rest))
    return empty, none.astype(np.int64), none, Outcome(no_events, none > 0, none, none[:, 0] > 0)


def _deal_out(columns: Columns, runs: list[list[Columns]]) -> None:
    """Each run gets the rows of its partition."""
    order = np.argsort(columns.partition, kind="stable")
    edges = np.searchsorted(columns.partition[order], np.arange(len(runs) + 1))
    for run in np.flatnonzero(np.diff(edges)).tolist():
        runs[run].append(_picked(columns, np.sort(order[edges[run] : edges[run + 1]])))


def in_batches(run: list[Columns]) -> list[Columns]:
    """The same rows, cut as `learner.evaluate.read` cuts a log."""
    together = Columns(
        **{
            name: np.concatenate([getattr(part, name) for part in run])
            for name in Columns._fields
            if "bounds" not in name
        },
        item_bounds=np.append(0, np.cumsum(np.concatenate([np.diff(part.item_bounds) for part in run]))),
        history_bounds=np.append(
            0, np.cumsum(np.concatenate([np.diff(part.history_bounds) for part in run]))
        ),
    )
    run.clear()
    edges = [0]
    while edges[-1] < len(together.kind):
        edges.append(
            min(len(together.kind), edges[-1] + min(FIRST_RECORDS << (len(edges) - 1), POLL_RECORDS))
        )
    return [_picked(together, np.arange(a, b)) for a, b in pairwise(edges)]


def _picked(columns: Columns, rows: Rows) -> Columns:
    """These rows, with their items and histories."""
    picked: dict[str, Any] = {}
    for bounds, names in (
        ("item_bounds", ("item", "quantity", "price", "propensity")),
        ("history_bounds", ("history_item", "history_name", "history_timestamp_ms", "history_value")),
    ):
        edges = getattr(columns, bounds)
        lengths = edges[rows + 1] - edges[rows]
        picked[bounds] = np.append(0, np.cumsum(lengths))
        at = np.arange(lengths.sum()) + np.repeat(edges[rows] - picked[bounds][:-1], lengths)
        picked |= {name: getattr(columns, name)[at] for name in names}
    return Columns(
        **picked, **{name: getattr(columns, name)[rows] for name in Columns._fields if name not in picked}
    )


def estimates(world: World, late: Policy, run: int, log: list[Columns], slate: str) -> dict[Any, Any]:
    """{(target, method): Interval} of one run."""
    vocabulary = Vocabulary()
    vocabulary.intern_all([late.item_id(i) for i in range(1, late.items + 1)])
    config = EvaluateConfig(policies=("uniform", "weights"), slate=slate, slots=world.slots)
    evaluation = Evaluation(config, JOIN, {run: 0})
    for columns in log:
        evaluation.join(columns)
    catalog = Catalog(Codec(), vocabulary)
    catalog.known, catalog.in_stock, catalog.gone = np.ones_like(OFFERED), OFFERED, np.zeros_like(OFFERED)
    targets: list[Target] = [
        Uniform(),
        Learned("weights", late, vocabulary, catalog.known, world.target_epsilon),
    ]
    evaluation.joined(targets, vocabulary, catalog)
    for columns in log:
        evaluation.judge(columns, lambda row: [])
    report = evaluation.report()
    notes = report.notes()
    return {(p.name, method): p.estimates[method] for p in report.policies for method in METHODS} | {
        (p.name, "thin"): (
            p.effective[-1],
            p.effective_rewards,
            any(note.startswith(f"{p.name}:") for note in notes),
        )
        for p in report.policies
    }


def coverage(world: World, late: Policy, logged: Logged) -> Iterator[dict[str, Any]]:
    """A row for each slate model, target and method."""
    for slate in world.slates:
        runs = [estimates(world, late, i, log, slate) for i, log in enumerate(logged.runs)]
        for target in ("uniform", "weights"):
            if target == "uniform" and world.epsilon == 1.0:
                continue  # it is the logging policy
            truth = logged.truth[target, slate]
            for method in METHODS:
                found = np.array([run[target, method] for run in runs])  # [R, 3]
                thin = np.array([run[target, "thin"] for run in runs], np.float64)  # [R, 3]
                decisions, rewards, _ = np.median(thin, axis=0).tolist()
                held, warned = (found[:, 1] <= truth) & (truth <= found[:, 2]), thin[:, 2] > 0
                yield {
                    "world": world.name,
                    "slate": slate if world.slots > 1 else "",
                    "target": target,
                    "method": method,
                    "truth": truth,
                    "covered": float(held.mean()),
                    "warned": float(warned.mean()),
                    "covered_unwarned": float(held[~warned].mean()) if not warned.all() else None,
                    "runs": len(runs),
                    "decisions": logged.decisions / len(runs),
                    "effective_decisions": decisions,
                    "effective_rewards": rewards,
                    "bias": float(found[:, 0].mean() - truth),
                    "sd": float(found[:, 0].std(ddof=1)),
                    "half_width": float(np.median(found[:, 2] - found[:, 1]) / 2),
                }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000, help="[1000]")
    parser.add_argument("--hours", type=float, default=9.0, help="of event time [9]")
    parser.add_argument("--seed", type=int, default=7, help="[7]")
    parser.add_argument("--worlds", type=int, nargs="+", default=list(range(len(WORLDS))), help="[all]")
    parser.add_argument("--json", type=Path, help="append one line of JSON here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    early, late = versions(options.seed, 8_000)
    rows: list[dict[str, Any]] = []
    print(
        "| log | slate model | target | estimator | covered | warned | truth | bias | sd | half-width | effective |"
    )
    print(
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )  # the last: decisions of the last slot, and rewards
    for world in (WORLDS[i] for i in options.worlds):
        logged = log_of(world, early, late, options.seed, options.runs, options.hours)
        for row in coverage(world, late, logged):
            rows.append(row)
            print(
                f"| {row['world']} | {row['slate']} | {row['target']} | {row['method']} | {row['covered']:.1%} | "
                f"{row['warned']:.0%} | "
                f"{row['truth']:.3f} | {row['bias']:+.4f} | {row['sd']:.4f} | {row['half_width']:.4f} | "
                f"{row['effective_decisions']:.0f} of {row['decisions']:.0f}, {row['effective_rewards']:.0f} |",
                flush=True,
            )
    record.append(options.json, "evaluate", sys.argv[1:], {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
