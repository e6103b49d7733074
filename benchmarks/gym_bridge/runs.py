"""One agent in one world on one seed, in whichever process."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

from benchmarks.gym_bridge import recogym_scores, recsim_scores
from benchmarks.gym_bridge.processes import Lockstep
from benchmarks.gym_bridge.product import InProcess, Loop, Setup

WORLDS: Final = (recogym_scores, recsim_scores)


def world_of(preset: str) -> ModuleType:
    """Which runs it."""
    return next(world for world in WORLDS if preset in world.PRESETS)


@contextmanager
def opened(processes: bool) -> Iterator[Loop]:
    """A loop of its own for each run."""
    if not processes:
        yield InProcess()
        return
    with tempfile.TemporaryDirectory() as folder, Lockstep(Path(folder)) as loop:
        yield loop


def seeded(setup: Setup, seed: int) -> Setup:
    """With the learner's dice thrown likewise."""
    return replace(setup, learner=replace(setup.learner, seed=seed))


class Kept:
    """Rows of one command, by agent and seed; with a file, those that the same command found there before, too."""

    def __init__(self, file: Path | None, about: Sequence[Any]) -> None:
        """about: what makes a command the same."""
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        self._file, self._about = file, json.loads(json.dumps(about))
        text = file.read_text() if file is not None and file.exists() else ""
        if file is not None and text and not text.endswith("\n"):  # it was cut short as it was written
            text = text[: text.rfind("\n") + 1]
            file.write_text(text)
        for line in text.splitlines():
            kept = json.loads(line)
            if kept["about"] == self._about:
                self.rows[kept["row"]["agent"], kept["row"]["seed"]] = kept["row"]
        if self.rows:
            print(f"  {len(self.rows)} rows were found before: {file}", file=sys.stderr, flush=True)

    def add(self, which: tuple[str, int], row: dict[str, Any]) -> None:
        """The row of this agent and seed."""
        self.rows[which] = row
        if self._file is not None:
            with self._file.open("a") as lines:
                lines.write(json.dumps({"about": self._about, "row": row}) + "\n")


def run(preset: str, agent: str, seed: int, setup: Setup, processes: bool) -> dict[str, Any]:
    """One agent on one seed: its row of the results."""
    torch.set_num_threads(1)
    with opened(processes) as loop:
        row: dict[str, Any] = world_of(preset).run(preset, agent, seed, setup, loop)
    print(f"  seed {seed} {agent}: {row['score']:.4g}", file=sys.stderr, flush=True)
    return row
