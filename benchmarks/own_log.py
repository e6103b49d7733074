"""How much too high does `learner evaluate` judge weights by the very log that they were learnt from?

    python -m benchmarks.own_log [--seeds 20] [--decisions 6000] [--json FILE]

A simulated shop is served at random, and the learner learns from its log, with its default settings. The weights that
come of it are judged by that log, and by a fresh one of as many decisions: the same shoppers on other visits, who come
at other times, for other purposes and with other luck, served at random, too. The truth is the simulator's own: what
the weights' slates are expected to earn on the fresh log's visits, in the states that its shoppers were in. Everything
is of the first slot, with exploration as at a server.

A ratio is of mean estimate and mean truth over seeds, with 95 % intervals (Student's t over seeds, of the difference).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks import record
from benchmarks.evaluate import AGENT, JOIN, REWARDS, SHOP, drawn, in_batches, what_is_yet_to_come
from benchmarks.learning import SLOTS, Loop, LoopSettings, histories
from learner.evaluation import EvaluateConfig, Evaluation
from learner.exploration import EPSILON
from learner.policy import Policy
from learner.target_policies import Learned
from simulator.feed import Feed
from simulator.figures import over_seeds
from simulator.policies import worth
from simulator.shop import PURCHASE, Shop, Turn
from streaming.catalog import Catalog
from streaming.columns import Columns
from streaming.interning import Vocabulary
from streaming.schemas import Codec

METHODS: Final = ("IPS", "SNIPS", "DR", "SNDR", "switch-DR", "DM")
SHOPPERS: Final = 1500


def own_log(seed: int, decisions: int) -> tuple[list[Columns], Policy]:
    """What the learner learns from, and what comes of it."""
    shop = Shop(replace(SHOP, shoppers=SHOPPERS), seed, REWARDS)
    loop = Loop(shop, AGENT, LoopSettings(epsilon=1.0), seed)
    log: list[Columns] = []
    served = 0
    while served < decisions:
        turn, _ = loop.turn()
        served += len(turn.shopper)
        assert loop.columns is not None
        log.append(loop.columns)
    log.append(loop.feed.columns(*what_is_yet_to_come(shop, shop.next_turn(), SLOTS)))
    return in_batches(log), loop.policy()


def fresh_log(seed: int, decisions: int, policy: Policy) -> tuple[list[Columns], float]:
    """The same shoppers' other visits, served at random, and what the policy is expected to earn on them with a first
    slot."""
    shop = Shop(replace(SHOP, shoppers=SHOPPERS), seed, REWARDS, luck=seed + 1000)
    feed, rng = Feed(shop), np.random.default_rng([seed, 41])
    log: list[Columns] = []
    served, earned = 0, 0.0
    while served < decisions:
        turn = shop.next_turn()
        eligible = can_be_shown(turn)
        q = policy.q(histories(turn, policy.history_length))
        first, _ = drawn(q, eligible, 1, EPSILON, rng)
        minds = shop.minds(turn.shopper)
        value = shop.click_probability(minds) * worth(shop, minds.stage)
        earned += float(value[np.arange(len(value)), first[:, 0]].sum() * shop.look(SLOTS)[0])
        slates, propensity = drawn(q, eligible, SLOTS, 1.0, rng)
        log.append(feed.columns(turn, slates, propensity, shop.show(turn, slates), 1, 1.0))
        served += len(turn.shopper)
    log.append(feed.columns(*what_is_yet_to_come(shop, shop.next_turn(), SLOTS)))
    return in_batches(log), earned / served


def can_be_shown(turn: Turn) -> Any:
    """[B, N + 1] by vocabulary id: what is on offer and was not bought, as the loop has it."""
    eligible = np.repeat(np.append(False, turn.available)[None], len(turn.shopper), axis=0)
    b, h = np.nonzero(turn.history.name == PURCHASE)
    eligible[b, turn.history.item[b, h] + 1] = False
    return eligible


def judged(policy: Policy, log: list[Columns]) -> dict[str, Any]:
    """{estimator: Interval} of the policy."""
    vocabulary = Vocabulary()
    vocabulary.intern_all([policy.item_id(i) for i in range(1, policy.items + 1)])
    evaluation = Evaluation(EvaluateConfig(policies=("weights",), slots=1), JOIN, {0: 0})
    for columns in log:
        evaluation.join(columns)
    catalog = Catalog(Codec(), vocabulary)
    catalog.known = catalog.in_stock = np.arange(policy.items + 1) > 0
    catalog.gone = np.zeros_like(catalog.known)
    evaluation.joined([Learned("weights", policy, vocabulary, catalog.known, EPSILON)], vocabulary, catalog)
    for columns in log:
        evaluation.judge(columns, lambda row: [])
    (found,) = evaluation.report().policies
    return dict(found.estimates)


def run_seed(seed: int, decisions: int) -> dict[str, Any]:
    """The truth, and both logs' word on it."""
    own, policy = own_log(seed, decisions)
    fresh, truth = fresh_log(seed, decisions, policy)
    print(f"  seed {seed}", file=sys.stderr, flush=True)
    told = {"own": judged(policy, own), "fresh": judged(policy, fresh)}
    return {"seed": seed, "truth": truth} | {
        name: {method: list(found[method]) for method in METHODS} for name, found in told.items()
    }


def table(seeds: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a row for each log and estimator."""
    truth = np.array([seed["truth"] for seed in seeds])
    yield "| judged by | estimator | estimate / truth | intervals that hold the truth |"
    yield "|---|---|---|---|"
    for log, name in (
        ("own", "the log that it was learnt from"),
        ("fresh", "a fresh log of the same shoppers"),
    ):
        for method in METHODS:
            value, low, high = np.array([seed[log][method] for seed in seeds]).T
            off = over_seeds((value - truth).tolist())
            share, half = 1 + off.mean / truth.mean(), (off.high - off.low) / 2 / truth.mean()
            held = int(((low <= truth) & (truth <= high)).sum())
            yield f"| {name} | {method} | {share:.2f} ± {half:.2f} | {held} of {len(seeds)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.own_log", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="shops [20]")
    parser.add_argument("--decisions", type=int, default=6000, help="in each log [6000]")
    parser.add_argument("--json", type=Path, help="append one line of JSON here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = [run_seed(seed, options.decisions) for seed in range(1, options.seeds + 1)]
    print("\n".join(table(seeds)))
    record.append(options.json, "own_log", sys.argv[1:], {"seeds": seeds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
