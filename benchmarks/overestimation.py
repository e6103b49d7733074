"""Does Q promise more than then comes? Q(s, a) as served, beside the Monte-Carlo returns of the same slots.

    python -m benchmarks.overestimation [--seeds 1 2] [--decisions 20000 60000 130000] [--set ...] [--json FILE]

An agent learns the simulated shop as in benchmarks.learning. At each of the asked numbers of decisions a copy of it
serves on and learns no more: `--window` decisions, and then for as long, in event time, as their visits take to end and
a purchase or refund may follow its cause, a day and half an hour. Each slot that was shown in the window then has its
return: what it earned itself, and gamma for every further step of the visit, as the learner counts them. Beside it
stands Q(s, a) of the network that served, at the state that it was shown in: means over slots, their ratio, and the
slope of returns over Q (1: slots differ by as much as Q says; less: it exaggerates). Intervals are 95 %, Student's t
over seeds.

Max over noisy values is what makes Q-learning promise too much (van Hasselt et al. 2016, figure 2, measure it in this
way).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import record
from benchmarks.learning import Loop, LoopSettings, changed, check_changes
from learner.agent_settings import AgentSettings
from learner.networks import MAX_SLOTS
from learner.policy import state_tensors
from learner.replay import Batch, Replay
from simulator.figures import over_seeds
from simulator.shop import Shop, ShopSettings
from streaming.join_settings import JoinSettings, to_ms
from streaming.joiner import Joined

LONGEST: Final = 1024  # steps of a visit
DRAWN: Final = 40_000  # slots, with replacement
VISIT_MS: Final = to_ms(JoinSettings.session_gap_s)  # of at most 25 pages, a minute each, and what ends it
CAUSE_MS: Final = to_ms(JoinSettings.attribution_window_s)  # what comes later is nobody's
FIGURES: Final = ("mean_q", "mean_return", "ratio", "slope")


class Watched(Loop):
    """A loop whose copies can stop learning, and keep what comes since."""

    watch: Replay | None = None  # None: it learns
    over = False  # of what comes nothing is kept but what earlier steps still earn

    def _take(self, joined: Joined) -> None:
        if self.watch is None:
            super()._take(joined)
        else:
            self.watch.insert(amendments_of(joined) if self.over else joined)

    def _learn(self) -> None:
        if self.watch is None:
            super()._learn()

    def serve(self, decisions: int) -> int:
        """Serve so many more; returns the event time that the newest has, ms."""
        served = newest_ms = 0
        while served < decisions:
            turn, _ = self.turn()
            served, newest_ms = served + len(turn.shopper), max(newest_ms, int(turn.timestamp_ms.max()))
        return newest_ms

    def serve_until(self, event_ms: int) -> None:
        """Serve until all that happened before this event time is told."""
        while self.turn()[0].timestamp_ms.min() < event_ms:
            pass


def amendments_of(joined: Joined) -> Joined:
    """Without its steps."""
    states, transitions = joined.states, joined.transitions
    return joined._replace(
        states=type(states)(*(column[:0] for column in states)),
        transitions=type(transitions)(*(column[:0] for column in transitions)),
    )


def look(seed: int, decisions: Sequence[int], window: int, changes: Sequence[str]) -> list[dict[str, float]]:
    """One seed's figures at each number of decisions."""
    agent = changed(AgentSettings(), changes)
    loop = Watched(Shop(ShopSettings(), seed), agent, changed(LoopSettings(), changes), seed)
    served, found = 0, []
    for goal in sorted(decisions):
        loop.serve(goal - served)
        served = goal
        found.append({"decisions": goal, **watched(copy.deepcopy(loop), window, seed)})
        print(f"  seed {seed}: {goal} decisions", file=sys.stderr, flush=True)
    return found


def watched(loop: Watched, window: int, seed: int) -> dict[str, float]:
    """The figures of so many decisions more, of a loop that learns no more from here on."""
    loop.watch = Replay(1 << 22, loop.agent.settings.entries, prioritised=False)
    newest_ms = loop.serve(window)
    shown = loop.watch.inserted
    loop.serve_until(
        newest_ms + 2 * VISIT_MS
    )  # a visit's last page, and as long again until it counts as over
    loop.over = True
    loop.serve_until(newest_ms + VISIT_MS + CAUSE_MS)
    return compare(loop, loop.watch, shown, np.random.default_rng(seed))


def compare(loop: Loop, watch: Replay, shown: int, rng: np.random.Generator) -> dict[str, float]:
    """Q and returns of the first so many rows: of those that were shown, and whose visits are over."""
    gamma = loop.agent.settings.gamma
    batch = watch.sample(min(DRAWN, len(watch)), rng, n_step=LONGEST, gamma=gamma)
    kept = (batch.index < shown) & (batch.discount == 0.0) & ~batch.organic
    q, returned = q_of(loop, batch)[kept], batch.reward[kept].astype(np.float64)
    return {
        "slots": int(kept.sum()),
        "mean_q": float(q.mean()),
        "mean_return": float(returned.mean()),
        "ratio": float(q.mean() / returned.mean()),
        "slope": float(np.cov(q, returned)[0, 1] / q.var(ddof=1)),
    }


@torch.no_grad()
def q_of(loop: Loop, batch: Batch) -> npt.NDArray[np.float64]:
    """Q(s, a) of each row's own action, where it was shown, by the network that is served, [B]."""
    network, states = loop.agent.target, state_tensors(batch.state)
    keys = network.keys(loop.agent.items)
    parts = []
    for rows in np.array_split(np.arange(len(batch.action)), max(1, len(batch.action) // 1000)):
        state = states.rows(torch.from_numpy(rows))
        ids = torch.from_numpy(batch.action[rows].astype(np.int64)).unsqueeze(1)
        slot = torch.from_numpy(batch.slot[rows].astype(np.int64)).clamp(0, MAX_SLOTS - 1).unsqueeze(1)
        q = network.q_at(network.queries(state, keys), keys, ids, slot)
        parts.append(loop.agent.unit * q.squeeze(1).double().numpy())
    return np.concatenate(parts)


def table(seeds: Sequence[Sequence[dict[str, float]]]) -> Iterator[str]:
    """A Markdown table, a row for each number of decisions."""
    yield "| decisions | mean Q | mean return | Q / return | slope of returns over Q |"
    yield "|---|---|---|---|---|"
    for at in zip(*seeds, strict=True):
        cells = []
        for name in FIGURES:
            mean, _, high = over_seeds([each[name] for each in at])
            cells.append(f"{mean:.3f}" + (f" ± {high - mean:.3f}" if len(at) > 1 else ""))
        yield f"| {at[0]['decisions']:,} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.overestimation", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="shops [1 2]")
    parser.add_argument(
        "--decisions", type=int, nargs="+", default=[20_000, 60_000, 130_000], help="learnt from"
    )
    parser.add_argument(
        "--window", type=int, default=8000, help="decisions whose returns are looked at [8000]"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], help="NAME=VALUE of the agent or of the loop around it"
    )
    parser.add_argument("--json", type=Path, help="append one line of JSON here")
    options = parser.parse_args(arguments)
    check_changes(parser, options.set, AgentSettings(), LoopSettings())
    torch.set_num_threads(1)
    seeds = [look(seed, options.decisions, options.window, options.set) for seed in options.seeds]
    print("\n".join(table(seeds)))
    record.append(options.json, "overestimation", sys.argv[1:], {"seeds": seeds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
