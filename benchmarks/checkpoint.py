"""What do checkpoints cost a learner that holds a million transitions, and how soon is it back at full speed?

    python -m benchmarks.checkpoint [--transitions 1000000] [--turns 6] [--json FILE]

A log on SQLite of mixed traffic (as in benchmarks.ingest). One learner, all parts of it real, is filled from it and
then reads and trains on without pause, in turns: with a checkpoint each `--checkpoint-s`, without any, with, ... One
update is made for each hundred transitions read, so updates/s speak of both. Then the `learner` command is started on
that checkpoint in a process of its own, its loops compiled before, and watched through its metrics until it trains as
fast as it ever will.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.ingest import traffic
from benchmarks.processes import TOPIC, LearnerProcess
from benchmarks.record import append, show
from learner.__main__ import _prepared, _resume
from learner.agent_settings import AgentSettings
from learner.checkpoint import Checkpoints, Disk
from learner.learner import Learner, LearnerSettings
from learner.metrics import Metrics
from learner.train import TrainConfig, Trainer, claim, open_checkpoints
from learner.watch import LogWatch
from streaming.arena import Empty
from streaming.join_settings import JoinSettings
from streaming.log import Log, open_log
from streaming.schemas import Codec

PARTITIONS = 4
PER_TRANSITION = 0.01  # updates: reading and training wait for one another
PATIENCE_S = 600.0  # for a first update
BAND = ["--updates-low", str(PER_TRANSITION), "--updates-high", str(PER_TRANSITION)]


def write(url: str, users: int, items: int) -> tuple[Log, Any]:
    """A log, and what writes the next so many records to it."""
    log = open_log(url)
    log.create_topic(TOPIC, PARTITIONS)
    codec, producer = Codec(), log.producer()
    endless = traffic(1 << 62, users, items, np.random.default_rng(0))

    def more(records: int) -> None:
        for n in range(records):
            kind, record = next(endless)
            if n % 20_000 == 0:
                producer.flush()
            value = codec.encode_decision(record) if kind == "decision" else codec.encode_event(record)
            producer.send(TOPIC, record["user_id"].encode(), value)
        producer.flush()

    return log, more


class CountingDisk(Disk):
    """Counts what is written."""

    written = 0

    def write(self, path: Path, data: bytes) -> None:
        """See Disk."""
        self.written += len(data)
        super().write(path, data)


class TimedCheckpoints:
    """Checkpoints that tell what each cost the thread that writes them."""

    def __init__(self, checkpoints: Checkpoints, disk: CountingDisk) -> None:
        self._checkpoints, self._disk = checkpoints, disk
        self.cpu_s: list[float] = []
        self.wall_s: list[float] = []
        self.bytes: list[int] = []

    def size(self) -> int:
        """Bytes of all parts of the newest one."""
        return sum(file.size for file in self._checkpoints._base.values())

    def save(self, parts: Mapping[str, Any], meta: Mapping[str, Any]) -> int:
        """See Checkpoints."""
        before, cpu_s, wall_s = self._disk.written, time.thread_time(), time.perf_counter()
        generation = self._checkpoints.save(parts, meta)
        self.cpu_s.append(time.thread_time() - cpu_s)
        self.wall_s.append(time.perf_counter() - wall_s)
        self.bytes.append(self._disk.written - before)
        return generation


class Bench:
    """A learner on a log, and the clocks on it."""

    def __init__(self, folder: Path, log: Log, options: argparse.Namespace, closing: ExitStack) -> None:
        self.config = TrainConfig(
            data_dir=str(folder / "data"),
            weights=str(folder / "weights"),
            checkpoint_s=options.checkpoint_s,
            poll_records=1000,  # a turn of reading and training is short beside what is measured
        )
        agent = AgentSettings()
        settings = LearnerSettings(
            replay_capacity=options.transitions, updates_low=PER_TRANSITION, updates_high=PER_TRANSITION
        )
        join = JoinSettings(gamma=agent.gamma, history_length=agent.entries)
        checkpoints = open_checkpoints(self.config)
        store = claim(self.config, "benchmark", checkpoints)
        checkpoints._disk = disk = CountingDisk()
        self.checkpoints = TimedCheckpoints(checkpoints, disk)
        watch = LogWatch(log, TOPIC, "catalog", "benchmark", 2.0)
        closing.callback(watch.close)
        self.learner = Learner(settings, agent, join, Codec(), PARTITIONS)
        topic_id = log.identity(TOPIC)
        resumed = _resume(self.config, self.learner, checkpoints.load(), watch, topic_id)
        written: Any = self.checkpoints
        never = threading.Event()
        self.trainer: Trainer = _prepared(
            self.config, resumed, log, Codec(), watch, written, store, Metrics(), topic_id, closing, never
        )
        self.held_s: list[float] = []
        self.held_cpu_s: list[float] = []
        self._time_snapshots()

    def _time_snapshots(self) -> None:
        snapshot = self.learner.snapshot

        def timed(since: int = 0, empty: Empty = np.empty) -> Any:
            start, cpu_s = time.perf_counter(), time.thread_time()
            taken = snapshot(since, empty)
            self.held_s.append(time.perf_counter() - start)
            self.held_cpu_s.append(time.thread_time() - cpu_s)
            return taken

        self.learner.snapshot = timed  # type: ignore[method-assign]

    def fill(self, transitions: int, more: Callable[[int], None]) -> None:
        """Read without training until replay holds so many."""
        learner = self.learner
        while len(learner.replay) < transitions:
            before = self.trainer._records
            self.trainer._intake.read(0.1)
            if self.trainer._records == before:
                more(50_000)
        learner.band.adjust(PER_TRANSITION, PER_TRANSITION, learner.worth, 0)  # nothing is owed

    def turn(self, seconds: float, checkpoints: bool) -> float:
        """Updates a second over so long."""
        trainer = self.trainer
        trainer._due["checkpoint"] = trainer._clock() + (self.config.checkpoint_s / 2 if checkpoints else 1e9)
        before, start = self.learner.agent.updates, time.perf_counter()
        while time.perf_counter() - start < seconds:
            trainer._read()
            trainer._train()
            trainer._publish()
            trainer._checkpoint()
            trainer._look_around()
        rate = (self.learner.agent.updates - before) / (time.perf_counter() - start)
        while trainer._checkpoints.busy:  # one that began in this turn is no cost of the next
            trainer._collect(60.0)
        return rate

    def forget(self) -> None:
        """What was measured until now."""
        for seen in (
            self.held_s,
            self.held_cpu_s,
            self.checkpoints.cpu_s,
            self.checkpoints.wall_s,
            self.checkpoints.bytes,
        ):
            seen.clear()

    def figures(self) -> dict[str, float]:
        """What the checkpoints cost, one by one."""
        told = self.checkpoints
        return {
            "checkpoints": len(told.bytes),
            "held_p50_s": median(self.held_s),
            "held_max_s": max(self.held_s),
            "held_cpu_s": median(self.held_cpu_s),
            "writer_cpu_s": median(told.cpu_s),
            "writer_wall_s": median(told.wall_s),
            "bytes_per_checkpoint": median(told.bytes),
            "bytes_of_all": told.size(),
        }


class Watched:
    """The `learner` command in a process of its own, seen through its metrics."""

    def __init__(self, folder: Path, url: str, flags: list[str]) -> None:
        self._learner = LearnerProcess(folder, url, *flags)
        self._start = time.perf_counter()
        self._learner.start()
        self._address = f"http://127.0.0.1:{self._learner.metrics_port}/metrics"
        self.first_cpu_s = 0.0  # CPU time that it took to its first update

    def updates(self) -> tuple[float, float]:
        """(seconds since it was started, updates made in it)."""
        try:
            with urllib.request.urlopen(self._address, timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:  # not yet
            return time.perf_counter() - self._start, 0.0
        values = [float(line.split()[1]) for line in lines if line.startswith("learner_updates_total")]
        return time.perf_counter() - self._start, sum(values)

    def watch(self, seconds: float) -> list[tuple[float, float]]:
        """`updates` twenty times a second, for so long from the first update on."""
        seen: list[tuple[float, float]] = []
        while not seen or not seen[-1][1] or seen[-1][0] < first_update_s(seen) + seconds:
            process = self._learner.process
            if process.poll() is not None or time.perf_counter() - self._start > PATIENCE_S:
                raise SystemExit(f"the learner made no update: {self._learner.said()}")
            seen.append(self.updates())
            if seen[-1][1] and not self.first_cpu_s:
                self.first_cpu_s = cpu_s(process.pid)
            time.sleep(0.05)
        return seen

    def stop(self) -> None:
        """End it, after a last checkpoint."""
        self._learner.stop()


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def records_for(updates: float) -> int:
    """Records of the traffic that are enough for so many updates, and some: a decision and 2.5 events give ten rows."""
    return max(int(1.5 * 0.35 * updates / PER_TRANSITION), 5_000)


def first_update_s(seen: list[tuple[float, float]]) -> float:
    """When the first update was there."""
    return next(at for at, updates in seen if updates)


def full_speed_s(seen: list[tuple[float, float]], window_s: float = 1.0) -> float:
    """Where the first window of a second begins in which it trained at 0.9 of the median of the second half."""
    rates, began = [], first_update_s(seen)
    for at, updates in seen:
        later = next(((t, u) for t, u in seen if t >= at + window_s), None)
        if at >= began and later is not None:
            rates.append((at, (later[1] - updates) / (later[0] - at)))
    usual = median(rate for _, rate in rates[len(rates) // 2 :])
    return next(at for at, rate in rates if rate >= 0.9 * usual)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """All figures."""
    url = f"sqlite:///{folder / 'log.db'}"
    log, more = write(url, options.users, options.items)
    rates: dict[bool, list[float]] = {True: [], False: []}
    with ExitStack() as closing:
        closing.callback(log.close)
        more(options.transitions * 2 // 5)  # a decision with ten slots comes with 2.5 events
        bench = Bench(folder, log, options, closing)
        bench.fill(options.transitions, more)
        rate = 100.0  # a guess: enough to read for the first turn
        for turn in range(-2, options.turns):  # two to warm up: the first checkpoint writes everything
            more(records_for(rate * options.seconds))
            saved = turn % 2 == 0
            rate = bench.turn(options.seconds, saved)
            print(f"{'with' if saved else 'without'} checkpoints: {rate:,.1f} updates/s", file=sys.stderr)
            if turn < 0:
                bench.forget()
            else:
                rates[saved].append(rate)
        more(records_for(2 * rate * options.watch_s))
        bench.trainer._end()
        figures = bench.figures()
    watched = Watched(folder, url, [*BAND, "--replay-capacity", str(options.transitions)])
    try:
        seen = watched.watch(options.watch_s)
    finally:
        watched.stop()
    costs = [1 - a / b for a, b in zip(rates[True], rates[False], strict=True)]
    return {
        "transitions": len(bench.learner.replay),
        "users": bench.learner.joiner.users(),
        "items": len(bench.learner.vocabulary),
        "with_checkpoints_updates_per_s": median(rates[True]),
        "without_updates_per_s": median(rates[False]),
        "cost": median(costs),
        "cost_least": min(costs),
        "cost_most": max(costs),
        **figures,
        "restart_first_update_s": first_update_s(seen),
        "restart_first_update_cpu_s": watched.first_cpu_s,
        "restart_full_speed_s": full_speed_s(seen),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and append to a JSON-lines file."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.checkpoint", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--transitions", type=int, default=1_000_000, help="kept in replay")
    parser.add_argument("--users", type=int, default=100_000, help="users in the traffic")
    parser.add_argument("--items", type=int, default=50_000, help="items in the traffic")
    parser.add_argument("--turns", type=int, default=6, help="half of them with checkpoints; an even number")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a turn")
    parser.add_argument("--watch-s", type=float, default=15.0, help="of training watched after the restart")
    parser.add_argument("--checkpoint-s", type=float, default=10.0, help="between two checkpoints")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object a line")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as the command does
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        figures = measure(options, Path(folder))
    show(figures)
    append(options.json, "checkpoint", arguments or sys.argv[1:], figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
