"""A learner as a process that is killed, stopped and started again; for benchmarks that do so."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from streaming.log import Log, LogUnavailable
from tests.kafka_broker import free_ports

TOPIC = "events"
CATCH_UP_S = 180.0


class LearnerProcess:
    """`learner` on the same checkpoints each time that it is started.

    folder: for what it says; stores: for its checkpoints and weights, None: there too.
    """

    def __init__(self, folder: Path, url: str, *flags: str, topic: str = TOPIC, stores: Path | None = None):
        stores = stores or folder
        self.data, self.weights = stores / "data", stores / "weights"
        self._log = ("--log", url)
        self._where = ("--topic", topic, "--data-dir", str(self.data), "--weights", str(self.weights))
        self._flags = flags
        self._said = folder / "learner.log"
        self._since = 0

    def start(self, *program: str) -> None:
        """On what the checkpoint holds. program: module and arguments instead of `learner`."""
        self._since = self._said.stat().st_size if self._said.exists() else 0
        self.process = self.another(*program)

    def another(self, *program: str) -> subprocess.Popen[bytes]:
        """One more process with the same flags, whatever runs already."""
        (self.metrics_port,) = free_ports(1)
        flags = (*self._log, *self._where, "--metrics-port", str(self.metrics_port), *self._flags)
        command = [sys.executable, "-m", *(program or ("learner",)), *flags]
        with self._said.open("a") as said:
            return subprocess.Popen(command, stdout=said, stderr=said)

    def signal(self, number: signal.Signals) -> None:
        """Send it."""
        self.process.send_signal(number)

    def ended(self, timeout_s: float = 120.0) -> int:
        """Its exit status, once it has ended. Raises: subprocess.TimeoutExpired."""
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """At once."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """After a last checkpoint; its exit status."""
        self.signal(signal.SIGTERM)
        return self.ended()

    def said(self) -> str:
        """By whatever ran since it was started last."""
        with self._said.open() as said:
            said.seek(self._since)
            return said.read()

    @property
    def directory(self) -> Path:
        """Of its checkpoints."""
        return self.data / "learner"

    def manifests(self) -> list[Path]:
        """Of the checkpoints there are, oldest first."""
        return sorted(self.directory.glob("checkpoint-*.json"))

    def meta(self) -> dict[str, Any]:
        """Of the newest checkpoint; empty before the first."""
        for manifest in reversed(self.manifests()):
            try:
                return dict(json.loads(manifest.read_text())["meta"])
            except (FileNotFoundError, ValueError):  # dropped meanwhile, or damaged
                continue
        return {}

    def positions(self) -> dict[int, int]:
        """Of the newest checkpoint."""
        return {int(p): offset for p, offset in self.meta().get("positions", {}).items()}

    def audit(self) -> tuple[int, dict[str, Any]]:
        """What `learner audit` says: its exit status, and all of it."""
        command = [sys.executable, "-m", "learner", "audit", *self._log, *self._where, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        (self._said.parent / "audit.json").write_text(done.stdout)
        return done.returncode, json.loads(done.stdout or '{"differences": {}, "partitions": []}') | {
            "stderr": done.stderr
        }


def ends(log: Log, topic: str = TOPIC, timeout_s: float = CATCH_UP_S) -> dict[int, int]:
    """Where each partition ends now. Raises: LogUnavailable when the log does not answer for so long."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return {p: bounds.high for p, bounds in log.bounds(topic).items()}
        except LogUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def catch_up(learner: LearnerProcess, goal: dict[int, int], timeout_s: float = CATCH_UP_S) -> float:
    """Wait until a checkpoint holds all before these offsets; returns how long that took.

    Raises: TimeoutError; ChildProcessError when the learner has ended.
    """
    start = time.monotonic()
    while not reached(learner.positions(), goal):
        if learner.process.poll() is not None:
            raise ChildProcessError(f"the learner ended with status {learner.process.returncode}")
        if time.monotonic() - start > timeout_s:
            raise TimeoutError(f"the learner stands at {learner.positions()}, the log ends at {goal}")
        time.sleep(0.05)
    return time.monotonic() - start


def reached(positions: dict[int, int], goal: dict[int, int]) -> bool:
    """Whether all before the goal was read."""
    return all(positions.get(p, -1) >= offset for p, offset in goal.items())
