"""Runs of RecoGym, and what became of them: expected clicks of what was shown, beside the worst and best that could be.

    score = (CTR - random) / (oracle - random)

All three from the simulator's own probabilities, at the very states in which the slates were made: no luck in clicks,
and no difference between one agent's users and another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.gym_bridge.product import InProcess, Loop, Setup, Shop
from benchmarks.gym_bridge.recogym import PRESETS, Preset, RecoGym, RecoGymShop, Uniform
from benchmarks.gym_bridge.simple_agents import SIMPLE
from benchmarks.gym_bridge.storefront import Paid, Timed, Visits
from simulator.figures import over_seeds, ratio_interval

OURS: Final = "ours"
ABLATIONS: Final = ()
FROZEN: Final = "ours, frozen at the change"
HOURLY: Final = "ours, renewed hourly"
USERS_AN_HOUR: Final = 500  # what "hourly" means here
LAST: Final = 500  # users over which a change is judged, the last ones


class Run(NamedTuple):
    """One agent's live users, by user: sums over what each was shown."""

    shown: npt.NDArray[np.int64]  # [U] slates
    taken: npt.NDArray[np.float64]  # [U] expected clicks of what was shown
    random: npt.NDArray[np.float64]  # [U] had it been drawn uniformly
    oracle: npt.NDArray[np.float64]  # [U] had it been the likeliest
    clicks: npt.NDArray[np.float64]  # [U] as they fell

    def of(self, users: slice) -> Run:
        """Those of some users."""
        return Run(*(column[users] for column in self))  # type: ignore[arg-type]

    def quarters(self) -> list[float]:
        """The score in each quarter of the users."""
        edges = np.linspace(0, len(self.shown), 5).astype(int).tolist()
        return [self.of(slice(*ends)).figures()["score"] for ends in pairwise(edges)]

    def figures(self) -> dict[str, Any]:
        """Score with its 95 % interval over users; click-through rates."""
        gap, users = self.oracle - self.random, np.arange(len(self.shown))
        score = ratio_interval(self.taken - self.random, gap, users)
        shown = self.shown.sum()
        return {
            "score": score.mean,
            "ci95": (score.high - score.low) / 2,
            "clicked_score": float((self.clicks - self.random).sum() / gap.sum()),
            "ctr": float(self.taken.sum() / shown),
            "random_ctr": float(self.random.sum() / shown),
            "oracle_ctr": float(self.oracle.sum() / shown),
            "shown": int(shown),
        }


class Played(NamedTuple):
    """What a run gave."""

    live: Run
    cpu_ms: float  # of the recommender for each live slate, learning included
    logged_cpu_s: float  # of the recommender for all logged users


def play(preset: Preset, seed: int, made: Paid, each: Callable[[int], None] = lambda user: None) -> Played:
    """Logged users, then live ones. each: called before each live user's visit."""
    visits = Visits(RecoGym(preset, seed), RecoGymShop(), made)
    logging = Uniform(seed)
    for user in range(preset.logged):
        visits.play(user, logging)
    logged_cpu_s = made.cpu_s
    sums = []
    for user in range(preset.logged, preset.logged + preset.live):
        each(user)
        sums.append(_sums(visits.play(user)))
    live = Run(*(np.array(column) for column in zip(*sums, strict=True)))
    return Played(live, 1e3 * (made.cpu_s - logged_cpu_s) / live.shown.sum(), logged_cpu_s)


def _sums(infos: list[dict[str, Any]]) -> tuple[int, float, float, float, float]:
    """One user's row of `Run`."""
    if not infos:
        return 0, 0.0, 0.0, 0.0, 0.0
    chances = np.array([info["chances"] for info in infos])
    actions = [info["action"] for info in infos]
    return (
        len(infos),
        float(chances[np.arange(len(infos)), actions].sum()),
        float(chances.mean(axis=1).sum()),
        float(chances.max(axis=1).sum()),
        float(sum(info["reward"] for info in infos)),
    )


def agents(preset: str) -> list[str]:
    """All that can be compared, ours first."""
    changing = [] if PRESETS[preset].changes_at is None else [FROZEN, HOURLY]
    return [OURS, *changing, *SIMPLE]


def run(preset: str, agent: str, seed: int, setup: Setup, loop: Loop) -> dict[str, Any]:
    """One agent in one shop: its row of the results. loop: where ours runs."""
    about, shop = PRESETS[preset], RecoGymShop()

    def each(user: int) -> None:
        if agent in (FROZEN, HOURLY):
            assert isinstance(loop, InProcess)  # the others follow their store by themselves
            loop.held = agent == HOURLY or user >= (about.changes_at or 0)
            if agent == HOURLY and user % USERS_AN_HOUR == 0:
                loop.renew()

    if agent in SIMPLE:
        made: Paid = Timed(SIMPLE[agent]([item["item_id"] for item in shop.catalog()], seed))
    else:
        made = Shop(loop, shop, setup, seed)
    played = play(about, seed, made, each)
    return {
        **{"world": "recogym", "preset": preset, "seed": seed, "agent": agent},
        **played.live.figures(),
        "cpu_ms": played.cpu_ms,
        "logged_cpu_s": played.logged_cpu_s,
        "quarters": played.live.quarters(),
        "last": played.live.of(slice(-LAST, None)).figures(),
    }


HEADINGS: Final = ("by quarter of the users", f"CTR of the last {LAST} users (oracle)")


def cells(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What a table says beside the score, of one agent's rows."""
    yield " ".join(f"{score:.2f}" for score in np.mean([row["quarters"] for row in rows], axis=0))
    ctr = over_seeds([100 * row["last"]["ctr"] for row in rows])
    interval = f" ± {ctr.high - ctr.mean:.2f}" if len(rows) > 1 else ""
    oracle = np.mean([100 * row["last"]["oracle_ctr"] for row in rows])
    yield f"{ctr.mean:.2f}{interval} % ({oracle:.2f} %)"
