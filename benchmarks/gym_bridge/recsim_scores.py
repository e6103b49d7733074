"""Runs of RecSim's interest evolution: so many pages on line, then fresh sessions under what was learnt.

    score = minutes watched in a session

mean over the fresh sessions, in which nothing is explored, recorded or learnt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from benchmarks.gym_bridge.product import InProcess, Loop, Setup, Shop
from benchmarks.gym_bridge.recsim import Myopic, RandomVideos, RecSim, RecSimShop, WhiteBox
from benchmarks.gym_bridge.storefront import Timed, Visits
from learner.agent_settings import AgentSettings

OURS: Final = "ours"
STALE: Final = "stale"  # ours, with the error of RecSim's own SlateQ: see product.Stale
ABLATIONS: Final = (STALE,)  # for who asks for them
FRESH: Final = 10_000_000  # number of the first fresh session


@dataclass(frozen=True)
class Preset:
    """How long to learn, and how to judge."""

    by_topic: bool = False  # see RecSimShop
    gamma: float = 0.999  # how far ahead counts, which a shop sets: all of an evening, of 70 to 150 pages
    pages: int = 300_000  # shown on line
    sessions: int = 5000  # judged


PRESETS: Final = {
    "evolution": Preset(),
    "evolution by topic": Preset(by_topic=True),
    "evolution, short": Preset(pages=40_000, sessions=500),
}


def agents(preset: str) -> list[str]:
    """All that can be compared, ours first."""
    return [OURS, "random", "myopic", "white box"]


def run(preset: str, agent: str, seed: int, setup: Setup, loop: Loop) -> dict[str, Any]:
    """One agent: its row of the results. The rules learn nothing, and are judged only. loop: where ours runs."""
    return play(PRESETS[preset], agent, seed, setup, loop) | {"preset": preset}


def play(about: Preset, agent: str, seed: int, setup: Setup, loop: Loop) -> dict[str, Any]:
    """See `run`."""
    environment, storefront = RecSim(seed), RecSimShop(about.by_topic)
    if setup.agent.gamma == AgentSettings.gamma:  # else somebody asks for another one
        setup = replace(setup, agent=replace(setup.agent, gamma=about.gamma))
    live: list[float] = []
    pages, live_s = 0, 0.0
    if agent in (OURS, STALE):
        if agent == STALE:
            assert isinstance(loop, InProcess)
            loop.stale = True
        made = Shop(loop, storefront, setup, seed)
        visits = Visits(environment, storefront, made)
        while pages < about.pages:
            steps = visits.play(len(live))
            live.append(_minutes(steps))
            pages += len(steps)
        live_s, made.watched_only = made.cpu_s, True
    else:
        rules = {"random": RandomVideos(seed), "myopic": Myopic(), "white box": WhiteBox(environment)}
        visits = Visits(environment, storefront, rule := Timed(rules[agent]))
    fresh = [visits.play(FRESH + i) for i in range(about.sessions)]
    judged = np.array([_minutes(steps) for steps in fresh])
    shown = sum(map(len, fresh))
    return {
        **{"world": "recsim", "seed": seed, "agent": agent},
        "score": float(judged.mean()),
        "ci95": float(1.96 * judged.std(ddof=1) / np.sqrt(len(judged))),
        "cpu_ms": 1e3 * (live_s / pages if pages else rule.cpu_s / shown),
        "pages": pages,
        "pages_a_session": shown / len(fresh),
        "quarters": [float(np.mean(part)) for part in np.array_split(live, 4)] if live else [],
    }


def _minutes(steps: Sequence[dict[str, Any]]) -> float:
    return float(sum(step["reward"] for step in steps))


HEADINGS: Final = ("pages a session", "on line, by quarter of the sessions")


def cells(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What a table says beside the score, of one agent's rows."""
    yield f"{np.mean([row['pages_a_session'] for row in rows]):.1f}"
    yield " ".join(f"{minutes:.0f}" for minutes in np.mean([row["quarters"] for row in rows], axis=0))
