"""Results: printed for people, appended as a line of JSON with commit, machine and command."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def show(figures: Mapping[str, float]) -> None:
    """Print each figure on a line of its own."""
    width = max(map(len, figures))
    for name, value in figures.items():
        print(
            f"{name:<{width}}  {value:>14,.3g}" if abs(value) < 1000 else f"{name:<{width}}  {value:>14,.0f}"
        )


def commit() -> str:
    """The newest; empty outside of a repository."""
    return _git("rev-parse", "HEAD").strip()


def code() -> str:
    """What tells this code from any other: its commit, and what was changed since, but for results. Files that git does
    not know are not looked at."""
    changes = _git("diff", "HEAD", "--", ":/", ":(exclude,top)benchmarks/results")
    return commit() + (f" with {hashlib.sha256(changes.encode()).hexdigest()[:16]}" if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def append(file: Path | None, benchmark: str, arguments: Sequence[str], figures: Mapping[str, Any]) -> None:
    """Append what was measured, and with what; None: don't. A commit that was changed since is told as `code`
    does. What is not a finite number is null, as JSON has none."""
    if file is None:
        return
    about = {
        "benchmark": benchmark,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *arguments]),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(_finite(about | dict(figures)), allow_nan=False) + "\n")


def _finite(found: Any) -> Any:
    """
    >>> _finite({"rows": [{"ctr": math.nan, "shown": 0.0}]})
    {'rows': [{'ctr': None, 'shown': 0.0}]}
    """
    if isinstance(found, Mapping):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found
