"""Results: printed for people, appended as a line of JSON with commit, machine and command."""

from __future__ import annotations

import json
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
    """Of what runs; empty outside of a repository."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def append(file: Path | None, benchmark: str, arguments: Sequence[str], figures: Mapping[str, Any]) -> None:
    """Append what was measured, and with what; None: don't."""
    if file is None:
        return
    about = {
        "benchmark": benchmark,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *arguments]),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(about | dict(figures)) + "\n")
