"""The `learner` command as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SMALL = (
    *("--batch-size", "32", "--dim", "8", "--hidden", "16", "--history-length", "8", "--min-replay", "200"),
    *("--updates-high", "0.1", "--replay-capacity", "100000"),
)
_started: list[subprocess.Popen[str]] = []


def start(folder: Path, url: str, *flags: str) -> subprocess.Popen[str]:
    """A learner with its stores in this folder; `stop_all` ends it where its test does not."""
    command = [sys.executable, "-m", "learner", "--topic", "events", "--log", url, *SMALL]
    stores = ["--data-dir", str(folder / "data"), "--weights", str(folder / "weights")]
    process = subprocess.Popen([*command, *stores, *flags], stderr=subprocess.PIPE, text=True)
    _started.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit status, all that it said); a learner that does not end is a failure."""
    try:
        _, said = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, said


def await_line(process: subprocess.Popen[str], *wanted: str) -> str:
    """The first line that has one of these in it."""
    assert process.stderr is not None
    for line in process.stderr:
        if any(word in line for word in wanted):
            return line
    raise AssertionError(f"ended without saying {wanted}")


def stop_all() -> None:
    """Kills what a test that failed has left."""
    while _started:
        with _started.pop() as process:  # closes its pipe, and waits
            process.kill()
