"""Compiled loops are compiled anew when something changes that they are made of, and only then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONSTANTS = "import numpy as np\nSCALE = 2\nTABLE = np.array([1, 2])\nUNREAD = 0\n"
PIECES = """
import constants
from streaming.jit import part

@part
def more(x):
    return x + constants.SCALE
"""
LOOP = """
from constants import TABLE
from pieces import more
from streaming.jit import jit

@jit
def loop(x):
    return later(x)

@jit
def later(x):
    return more(x) * TABLE[1]

print(loop(1), *loop.stats.cache_hits.values(), sep=" cached " if loop.stats.cache_hits else "")
"""


@pytest.fixture
def ran(tmp_path: Path):
    """Runs the loop in a process of its own, after a file was changed."""

    def run(name: str = "constants.py", before: str = "", after: str = "") -> str:
        file = tmp_path / name
        stamp = (tmp_path / "loop.py").stat()
        file.write_text(file.read_text().replace(before, after))
        assert (tmp_path / "loop.py").stat().st_mtime == stamp.st_mtime
        command = [sys.executable, "loop.py"]
        path = f"{tmp_path}:{Path(__file__).parents[1]}"
        done = subprocess.run(
            command, cwd=tmp_path, env={"PYTHONPATH": path}, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    for name, text in (("constants.py", CONSTANTS), ("pieces.py", PIECES), ("loop.py", LOOP)):
        (tmp_path / name).write_text(text)
    return run


def test_a_loop_follows_the_constants_and_pieces_that_it_is_made_of(ran):
    assert ran() == "6"
    assert ran() == "6 cached 1"
    assert ran(before="SCALE = 2", after="SCALE = 30") == "62"
    assert ran(before="np.array([1, 2])", after="np.array([1, 3])") == "93"
    assert ran(before="UNREAD = 0", after="UNREAD = 1") == "93 cached 1"
    assert ran("pieces.py", "x + constants.SCALE", "x - constants.SCALE") == "-87"
    assert ran() == "-87 cached 1"
