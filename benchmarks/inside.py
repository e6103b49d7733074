"""What does the agent know of the simulated shop: of clicks, of what they are worth, of what they lead to?

    python -m benchmarks.inside [--seeds 1 2] [--decisions 130000] [--items 1000] [--set gamma=0.9 ...] [--json FILE]

An agent learns as in benchmarks.learning; then its two factors, the probability p of a click and the gain m + γ g of
one, are held against the shop's own: probability from the shopper's mind, gain from the planning oracle. The score
of a ranking is the expected reward of its best six, change of the rest of the visit included; mixing learnt and true
factors shows which of them holds the agent back. Means over seeds.

Beside them: what it shows users of whom nothing is known, whose history is empty (`unknown`), best sellers, and the one
slate that is best for all who ask at the same moment (`best_for_all`).
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import record
from benchmarks.learning import SLOTS, Loop, LoopSettings, changed, check_changes
from learner.agent_settings import AgentSettings
from learner.networks import score_all
from learner.policy import state_tensors
from learner.replay import Histories
from simulator.policies import HistoryOracle, PlanningOracle, Popularity, infer_minds, top, worth
from simulator.shop import Floats, Rows, Shop, ShopSettings, Turn

TURNS = 24  # of shoppers that are looked into
PLANNED = 16_000  # pages of each round of the oracle's planning, in a shop of the usual size
LIKELY = 50  # items of each state whose gains are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="shops [1 2]")
    parser.add_argument("--decisions", type=int, default=130_000, help="learnt from [130000]")
    parser.add_argument("--items", type=int, default=ShopSettings.items, help="in the shop [1000]")
    parser.add_argument(
        "--set", nargs="*", default=[], help="NAME=VALUE of the agent or of the loop around it"
    )
    parser.add_argument("--json", type=Path, help="append one line of JSON here")
    options = parser.parse_args()
    check_changes(parser, options.set, AgentSettings(), LoopSettings())
    torch.set_num_threads(1)
    seeds = [look(seed, options.decisions, options.set, options.items) for seed in options.seeds]
    mean = {name: float(np.mean([seed[name] for seed in seeds])) for name in seeds[0]}
    record.show(mean)
    record.append(options.json, "inside", sys.argv[1:], {**mean, "seeds": seeds})


def look(seed: int, decisions: int, settings: list[str], items: int = ShopSettings.items) -> dict[str, float]:
    """One seed's figures."""
    world = ShopSettings(items=items)
    shop = Shop(world, seed)
    # it looks at every item for each page that it plans from, and learns of visits, not of items
    pages = min(PLANNED, max(PLANNED // 8, PLANNED * ShopSettings.items // items))
    planner = PlanningOracle(Shop(world, seed), SLOTS, decisions=pages)
    loop = Loop(shop, changed(AgentSettings(), settings), changed(LoopSettings(), settings), seed)
    best_sellers = Popularity(len(shop.item_ids))
    served = 0
    while served < decisions:
        turn, outcome = loop.turn()
        best_sellers.observe(turn.events)
        best_sellers.observe(outcome.events)
        served += len(turn.shopper)
    figures = defaultdict(list)
    for _ in range(TURNS):
        turn = shop.next_turn()
        slates = best_sellers.recommend(shop, turn, SLOTS)
        for name, value in of_turn(shop, planner, loop, turn, slates).items():
            figures[name].append(value)
        shop.show(turn, HistoryOracle(planner).recommend(shop, turn, SLOTS))
    return {name: float(np.mean(values)) for name, values in figures.items()}


def of_turn(
    shop: Shop, planner: PlanningOracle, loop: Loop, turn: Turn, best_sellers: Rows
) -> dict[str, float]:
    """The agent beside the truth, for the shoppers of one turn. best_sellers: [B, SLOTS] rows of the catalog."""
    minds = shop.minds(turn.shopper)
    true_p = shop.click_probability(minds)
    true_gain = planner.score(shop, minds) / true_p
    states = loop.states(turn)
    p, gain = learnt(loop, states)
    nothing = Histories(*(np.zeros_like(column[:1]) for column in states))
    p_unknown, gain_unknown = learnt(loop, nothing)

    def score(ranking: Floats) -> float:
        return worth_of(top(np.broadcast_to(ranking, p.shape), turn.available, SLOTS))

    def worth_of(slate: Rows) -> float:
        earned = np.take_along_axis(true_p * true_gain, slate, axis=1)
        return float((earned * shop.look(SLOTS)).sum(axis=1).mean())

    likely = np.argsort(-true_p, axis=1)[:, :LIKELY]
    return {
        "learnt_p_learnt_gain": score(p * gain),
        "learnt_p_true_gain": score(p * true_gain),
        "true_p_learnt_gain": score(true_p * gain),
        "true_p_true_gain": score(true_p * true_gain),
        "learnt_p_alone": score(p),
        "unknown": score(p_unknown * gain_unknown),
        "best_sellers": worth_of(best_sellers),
        "best_for_all": score((true_p * true_gain).mean(axis=0, keepdims=True)),
        "at_random": score(np.random.default_rng(len(p)).random(p.shape)),
        "reward_alone": score(true_p * worth(shop, minds.stage)),
        "history_rule": score(planner.score(shop, infer_minds(shop, turn))),
        "correlation_of_log_odds": _within(np.log(p / (1 - p)), np.log(true_p / (1 - true_p))),
        "correlation_of_gains": _within(*(np.take_along_axis(x, likely, axis=1) for x in (gain, true_gain))),
        "mean_gain": float(np.take_along_axis(gain, likely, axis=1).mean()),
        "mean_true_gain": float(np.take_along_axis(true_gain, likely, axis=1).mean()),
    }


@torch.no_grad()
def learnt(loop: Loop, histories: Histories) -> tuple[Floats, Floats]:
    """p and m + γ g by the network that is served, each [B, N]."""
    agent = loop.agent
    state = state_tensors(histories)
    keys = agent.all_keys(agent.target)
    queries = agent.target.queries(state, keys)
    log_odds = score_all(*agent.target.choice(queries, keys), keys.category)
    gain = agent.target.gain_all(queries, keys)
    return _array(torch.sigmoid(log_odds.double())), _array(agent.unit * gain.double())


def _array(scores: torch.Tensor) -> Floats:
    """Without the unknown item, whose column is the first."""
    out: npt.NDArray[np.float64] = scores[:, 1:].numpy()
    return out


def _within(a: Floats, b: Floats) -> float:
    """Correlation of two [B, N] within their rows."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


if __name__ == "__main__":
    main()
