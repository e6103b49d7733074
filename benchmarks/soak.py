"""Does a loop that runs for long stay as large as it is?

    python -m benchmarks.soak [--minutes 30] [--json FILE]

A real broker, a policy server, a learner, and simulated shoppers at a steady rate. Their bounds are set so small
(replay, windows, users) that all of them are reached while it warms up: then nothing has a reason to grow.
Once a second /proc tells of learner and server: resident memory, open files, threads. Memory's slope is fitted to the
medians of twelve stretches of time, with its 95 % interval. At the end the log is audited. Exit status 1 if a slope is
above the limit beyond doubt, if open files or threads became more, or if the audit found a difference.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.endurance import PARTITIONS, shop
from benchmarks.processes import TOPIC, LearnerProcess, catch_up, ends
from benchmarks.record import append, show
from learner.weights import WeightStore
from streaming.log import open_log
from tests.kafka_broker import KafkaBroker
from tests.serving_process import ServerProcess, eventually

EVERY_S: Final = 1.0
FIRST_VERSION_S: Final = 600.0  # to wait for it; then time begins to count
DRAIN_S: Final = 180.0  # at most: the machine may be busy with other things
STRETCHES: Final = 12
T_95: Final = 2.228  # Student's t, two-sided 95 %, STRETCHES - 2 degrees of freedom
SMALL: Final = (
    *("--replay-capacity", "20000", "--attribution-window-s", "3600", "--dedup-window-s", "3600"),
    *("--user-ttl-s", "3600", "--late-after-s", "600", "--checkpoint-s", "2"),
)
SMALL_VIEW: Final = ("--max-users", "500")  # of the server
PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Seen(NamedTuple):
    """A process at one moment."""

    at_s: float
    rss: int  # bytes
    files: int
    threads: int


class Slope(NamedTuple):
    """MB per hour, and its 95 % interval."""

    mb_per_h: float
    low: float
    high: float


def look(pid: int, start_s: float) -> Seen:
    """The process now. Raises: OSError once it is gone."""
    proc = Path(f"/proc/{pid}")
    pages = int((proc / "statm").read_text().split()[1])
    return Seen(
        time.monotonic() - start_s,
        pages * PAGE,
        len(os.listdir(proc / "fd")),
        len(os.listdir(proc / "task")),
    )


class Watcher(threading.Thread):
    """Looks at a process once a second until told to stop, or until it is gone."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._stop_it = pid, threading.Event()
        self.seen: list[Seen] = []

    def run(self) -> None:
        start_s = time.monotonic()
        while not self._stop_it.wait(EVERY_S):
            try:
                self.seen.append(look(self._pid, start_s))
            except OSError:
                return

    def after(self, warm_up_s: float) -> npt.NDArray[np.float64]:
        """[N, 4] what was seen once it was warm."""
        self._stop_it.set()
        self.join()
        seen = np.array(self.seen, np.float64).reshape(-1, 4)
        return seen[seen[:, 0] >= warm_up_s]


def slope(at_s: npt.NDArray[np.float64], rss: npt.NDArray[np.float64]) -> Slope:
    """A line through the medians of twelve stretches: one of them is long enough not to depend on the one before.

    >>> at_s = np.arange(0.0, 1200.0)
    >>> slope(at_s, 1e8 + 1e6 * at_s / 3600)
    Slope(mb_per_h=1.0, low=1.0, high=1.0)
    """
    stretches = np.array_split(np.arange(len(at_s)), STRETCHES)
    hours = np.array([np.median(at_s[part]) for part in stretches]) / 3600
    mb = np.array([np.median(rss[part]) for part in stretches]) / 1e6
    spread = ((hours - hours.mean()) ** 2).sum()
    fitted = ((hours - hours.mean()) * (mb - mb.mean())).sum() / spread
    residuals = mb - mb.mean() - fitted * (hours - hours.mean())
    error = np.sqrt((residuals**2).sum() / (STRETCHES - 2) / spread)
    return Slope(*(round(float(fitted + side * T_95 * error), 6) for side in (0, -1, 1)))


def summary(name: str, seen: npt.NDArray[np.float64]) -> dict[str, float]:
    """What became of a process: memory's slope, and open files and threads early and late, but for moments."""
    third = max(len(seen) // 3, 1)
    early, late = seen[:third], seen[-third:]
    fitted = slope(seen[:, 0], seen[:, 1])
    return {
        f"{name}_rss_mb": float(np.median(late[:, 1])) / 1e6,
        f"{name}_mb_per_h": fitted.mb_per_h,
        f"{name}_mb_per_h_low": fitted.low,
        f"{name}_mb_per_h_high": fitted.high,
        f"{name}_files_early": float(np.median(early[:, 2])),
        f"{name}_files_late": float(np.median(late[:, 2])),
        f"{name}_threads_early": float(np.median(early[:, 3])),
        f"{name}_threads_late": float(np.median(late[:, 3])),
    }


def size_of(folder: Path) -> float:
    """MB of all files beneath."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures; whoever calls judges them."""
    warm_up_s, whole_s = 60 * options.warm_up, 60 * options.minutes
    with KafkaBroker() as broker:
        log = open_log(broker.url)
        log.create_topic(TOPIC, PARTITIONS)
        log.create_topic("catalog", 1, compacted=True)
        learner = LearnerProcess(folder, broker.url, *SMALL)
        learner.start()
        flags = ("--log", broker.url, "--weights", str(folder / "weights"))
        try:
            with ServerProcess(*flags, *SMALL_VIEW) as server:
                watchers = {
                    "learner": Watcher(learner.process.pid),
                    "server": Watcher(server.process.pid),
                }
                with shop(options.minutes, folder, broker.url, [server], options.rate) as shoppers:
                    eventually(lambda: any(learner.weights.glob("v*.json")), FIRST_VERSION_S)
                    for watcher in watchers.values():
                        watcher.start()
                    time.sleep(warm_up_s)
                    disk_mb = size_of(folder / "data") + size_of(folder / "weights")
                    time.sleep(whole_s - warm_up_s)
                    seen = {name: watcher.after(warm_up_s) for name, watcher in watchers.items()}
                    later_mb = size_of(folder / "data") + size_of(folder / "weights")
                    versions = WeightStore(learner.weights).latest()
                    for name, rows in seen.items():
                        np.savetxt(folder / f"{name}.csv", rows, "%.0f", ",", header="s,bytes,files,threads")
                    shoppers.send_signal(signal.SIGTERM)
                    shoppers.wait(120)
                drained = server.terminate(DRAIN_S)
            caught_up_s = catch_up(learner, ends(log))
            stopped = learner.stop()
        finally:
            learner.kill()
        audit_status, _ = learner.audit()
        records = sum(ends(log).values())
        log.close()
    return {
        "minutes": options.minutes,
        "records": records,
        "versions": versions,
        **summary("learner", seen["learner"]),
        **summary("server", seen["server"]),
        "disk_mb_warm": disk_mb,
        "disk_mb_end": later_mb,
        "caught_up_s": caught_up_s,
        "audit_status": audit_status,
        "exit_statuses": [stopped, drained],
    }


def judge(figures: dict[str, Any], limit_mb_per_h: float) -> list[str]:
    """What is wrong, in words."""
    wrong = []
    for name in ("learner", "server"):
        low, high = (figures[f"{name}_mb_per_h_{end}"] for end in ("low", "high"))
        if low > limit_mb_per_h:
            wrong.append(f"the {name}'s memory grows by {low:.1f} to {high:.1f} MB/h")
        for what in ("files", "threads"):
            early, late = (figures[f"{name}_{what}_{when}"] for when in ("early", "late"))
            if late > early:
                wrong.append(f"the {name}'s {what} went from {early:.0f} to {late:.0f}")
    if figures["audit_status"] != 0:
        wrong.append("the audit found differences")
    if any(figures["exit_statuses"]):
        wrong.append("a process did not end cleanly")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge, and append to a JSON-lines file."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="how long shoppers shop, from the first weights on"
    )
    parser.add_argument(
        "--warm-up",
        type=float,
        default=10.0,
        help="minutes of them, from the first weights on, that are not judged",
    )
    parser.add_argument("--rate", type=float, default=50.0, help="recommendations a second")
    parser.add_argument("--limit", type=float, default=5.0, help="slope of memory that is allowed, MB/h")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object a line")
    options = parser.parse_args(arguments)
    if options.minutes * 60 - options.warm_up * 60 < 2 * STRETCHES * EVERY_S:
        parser.error(f"--minutes must exceed --warm-up by {2 * STRETCHES * EVERY_S / 60} or more")
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"logs of all processes: {folder}", file=sys.stderr)
    figures = measure(options, folder)
    show({name: value for name, value in figures.items() if not isinstance(value, list)})
    append(options.json, "soak", arguments or sys.argv[1:], figures)
    wrong = judge(figures, options.limit)
    print("\n".join(wrong) or "nothing grew, and the audit is clean")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
