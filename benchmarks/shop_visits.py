"""An agent in the Gymnasium shop: what it costs without the shop, and what visits earn under what it has learnt.

Shared by benchmarks.dqn_peers and the scripts that it runs in another Python: it needs numpy, numba and gymnasium only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import gymnasium
import numpy as np
import numpy.typing as npt

from simulator.gym_shop import ID

FRESH: Final = 1_000_000  # added to a seed: luck that nobody has learnt from

Choose = Callable[[npt.NDArray[np.float32]], int]


@dataclass(frozen=True)
class Task:
    """One agent's run."""

    variant: str
    seed: int
    interactions: int
    cpu_s: float  # that ours took for as many
    visits: int  # judged
    shop: dict[str, Any]  # of ShopEnv

    def sent(self) -> str:
        """For another process's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def received(cls) -> Task:
        """From this process's command line."""
        return cls(**json.loads(sys.argv[1]))


def opened(shop: dict[str, Any], flat: bool) -> gymnasium.Env[Any, np.int64]:
    """The shop of a task."""
    return gymnasium.make(ID, disable_env_checker=True, flat=flat, **shop)


class Clock:
    """The CPU time of an agent: that of this process, without what is done aside."""

    def __init__(self) -> None:
        self._began, self._aside_s = time.process_time(), 0.0

    @property
    def cpu_s(self) -> float:
        """Seconds so far."""
        return time.process_time() - self._began - self._aside_s

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside does not count."""
        began = time.process_time()
        try:
            yield
        finally:
            self._aside_s += time.process_time() - began


class Metered(gymnasium.Wrapper[Any, np.int64, Any, np.int64]):
    """The shop, whose own time does not count, and what is earned in it.

    `info` is left out, for some buffers keep it, and what is in it does not stack.
    """

    def __init__(self, env: gymnasium.Env[Any, np.int64]) -> None:
        super().__init__(env)
        self.clock = Clock()
        self.interactions = 0
        self.earned: list[float] = [0.0]  # by visit; the last one is not over

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """See ShopEnv."""
        with self.clock.aside():
            return self.env.reset(seed=seed, options=options)[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """See ShopEnv."""
        with self.clock.aside():
            observation, reward, over, cut, _ = self.env.step(action)
            self.interactions += 1
            self.earned[-1] += float(reward)
            if over:
                self.earned.append(0.0)
            return observation, float(reward), over, cut, {}


def judged(task: Task, choose: Choose) -> list[float]:
    """What each of the fresh visits earns where this chooses: the same visits for all agents of a seed."""
    env = opened(task.shop, flat=True)
    observation, _ = env.reset(seed=FRESH + task.seed)
    earned = [0.0]
    while True:
        observation, reward, over, _, _ = env.step(np.int64(choose(observation)))
        earned[-1] += float(reward)
        if over:
            if len(earned) == task.visits:
                return earned
            earned.append(0.0)
            observation, _ = env.reset()


class Exam:
    """Judges an agent after so many interactions, and at so much CPU time; which comes first is the agent's affair."""

    def __init__(self, task: Task, metered: Metered, choose: Choose) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self._task, metered.clock = task, Clock()
        self._metered, self._choose = metered, choose

    def look(self) -> bool:
        """To be called after each step; whether both are done."""
        spent, task, clock = self._metered, self._task, self._metered.clock
        for name, due in (
            ("interactions", spent.interactions >= task.interactions),
            ("cpu", clock.cpu_s >= task.cpu_s),
        ):
            if due and name not in self.rows:
                row = {
                    "interactions": spent.interactions,
                    "cpu_s": clock.cpu_s,
                    "online": online(spent.earned),
                }
                with clock.aside():
                    row["earned"] = judged(task, self._choose)
                self.rows[name] = row
        return len(self.rows) == 2

    def send(self, package: str, version: str) -> None:
        """The result, for whoever started this process."""
        print(json.dumps({"package": package, "version": version, "at": self.rows}))


def online(earned: list[float]) -> float:
    """Mean of the last half of the visits that are over: what learning earned while it went on."""
    over = earned[:-1]
    return float(np.mean(over[len(over) // 2 :])) if over else 0.0
