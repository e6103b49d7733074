"""Does a shop on a real Kafka lose or double anything while its learner and its broker are killed under load?

    python -m benchmarks.endurance [--minutes 10] [--seed 0] [--json FILE]

Real processes: a broker, two policy servers, a learner, and simulated shoppers who call both servers. At random moments
the learner and the broker are killed (-9) and started again. Meanwhile a prober calls each server ten times a second
and counts what is not answered. At the end the shoppers stop, the learner reads the log to its end, and it is counted:
what the shoppers say they published and were answered against what the log holds; and `learner audit`, which joins
the log anew, against what replay holds. Exit status 1 if anything was lost, doubled or left unanswered.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.load import in_the_log
from benchmarks.processes import TOPIC, LearnerProcess, catch_up, ends
from benchmarks.record import append, show
from serving import policy_pb2 as pb
from serving.client import CallError
from streaming.log import open_log
from tests.kafka_broker import KafkaBroker
from tests.serving_process import ServerProcess

PARTITIONS = 4
BROKER_AWAY_S = (1.0, 6.0)
PROBE_S = 0.1


class Prober(threading.Thread):
    """Asks a server ten times a second, as a shopper would who never gives up a second time."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(daemon=True)
        self._client = server.client(timeout_s=2.0, retries=0)
        self._stop_it = threading.Event()
        self.calls = 0
        self.failures: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.versions: set[int] = set()

    def run(self) -> None:
        request = pb.RecommendRequest(user_id="prober", unlogged=True)
        while not self._stop_it.wait(PROBE_S):
            start = time.monotonic()
            self.calls += 1
            try:
                self.versions.add(self._client.recommend(request).policy_version)
            except CallError as error:
                self.failures[error.code().name] += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - start)

    def stop(self) -> None:
        """End it."""
        self._stop_it.set()
        self.join()
        self._client.close()


def trouble(
    minutes: float, luck: random.Random, learner: LearnerProcess, broker: KafkaBroker, shoppers: Any
) -> Counter[str]:
    """Let the time pass, killing now the one and now the other; returns how often."""
    end, kills = time.monotonic() + 60 * minutes, Counter[str]()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, luck.uniform(20, 60)))
        if time.monotonic() >= end - 30:
            continue
        if shoppers.poll() is not None or learner.process.poll() is not None:
            raise SystemExit(f"a process ended by itself; see {learner.data.parent}")
        if luck.random() < 0.6:
            learner.kill()
            learner.start()
            kills["learner"] += 1
        else:
            broker.kill9()
            time.sleep(luck.uniform(*BROKER_AWAY_S))
            broker.start()
            kills["broker"] += 1
        print(
            f"{end - time.monotonic():5.0f} s left, killed so far: {dict(kills)}", file=sys.stderr, flush=True
        )
    return kills


@contextmanager
def shop(minutes: float, folder: Path, url: str, servers: list[ServerProcess], rate: float) -> Iterator[Any]:
    """Shoppers, spread over the servers in turn of their connections."""
    target = "ipv4:" + ",".join(server.target for server in servers)
    command = [sys.executable, "-m", "simulator", "--log", url, "--server", target, "--rate", str(rate)]
    report = ["--report", str(folder / "shoppers.json"), "--partitions", str(PARTITIONS)]
    with (folder / "shoppers.log").open("w") as said:
        process = subprocess.Popen([*command, *report], stdout=said, stderr=said)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def measure(minutes: float, seed: int, rate: float, folder: Path) -> dict[str, Any]:
    """All figures; whoever calls judges them."""
    with ExitStack() as closing_all, KafkaBroker() as broker:
        log = open_log(broker.url)
        log.create_topic(TOPIC, PARTITIONS)
        log.create_topic("catalog", 1, compacted=True)
        learner = LearnerProcess(folder, broker.url, "--checkpoint-s", "2")
        learner.start()
        closing_all.callback(learner.kill)
        flags = ("--log", broker.url, "--weights", str(folder / "weights"))
        servers = [closing_all.enter_context(ServerProcess(*flags)) for _ in range(2)]
        with shop(minutes, folder, broker.url, servers, rate) as shoppers:
            time.sleep(15)  # a shop that has opened
            probers = [Prober(server) for server in servers]
            for prober in probers:
                prober.start()
            kills = trouble(minutes, random.Random(seed), learner, broker, shoppers)
            shoppers.send_signal(signal.SIGTERM)
            shoppers.wait(120)
        for prober in probers:
            prober.stop()
        drained = [server.terminate() for server in servers]
        caught_up_s = catch_up(learner, ends(log))
        stopped = learner.stop()
        audit_status, _ = learner.audit()
        held = in_the_log(log, TOPIC)
        items = sum(bounds.high for bounds in log.bounds("catalog").values())
        log.close()
    said = json.loads((folder / "shoppers.json").read_text())
    meta = learner.meta()
    return {
        "minutes": minutes,
        "kills_learner": kills["learner"],
        "kills_broker": kills["broker"],
        "published_events": said["published"] - items,
        "answered": said["decisions"] - said["errors"] - said["empty"],  # with a slate
        "unanswered_shoppers": said["errors"],
        "log_events": len(held.events),
        "log_decisions": len(held.decisions),
        "log_records_beyond": held.events.total() - len(held.events) + held.decisions_twice,
        "transitions": meta["transitions"],
        "updates": meta["updates"],
        "probes": sum(prober.calls for prober in probers),
        "probes_failed": sum(sum(prober.failures.values()) for prober in probers),
        "slowest_probe_s": max(prober.slowest_s for prober in probers),
        "versions_served": len(set.union(*(prober.versions for prober in probers))),
        "caught_up_s": caught_up_s,
        "audit_status": audit_status,
        "exit_statuses": [stopped, *drained],
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge, and append to a JSON-lines file."""
    parser = argparse.ArgumentParser(prog="benchmarks.endurance", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long shoppers shop")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of trouble")
    parser.add_argument("--rate", type=float, default=100.0, help="recommendations a second")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object a line")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="endurance-"))
    print(f"logs of all processes: {folder}", file=sys.stderr)
    figures = measure(options.minutes, options.seed, options.rate, folder)
    show({name: value for name, value in figures.items() if not isinstance(value, list)})
    append(options.json, "endurance", arguments or sys.argv[1:], figures)
    wrong = judge(figures)
    print("\n".join(wrong) or "nothing lost, nothing doubled, all answered")
    return 1 if wrong else 0


def judge(figures: dict[str, Any]) -> list[str]:
    """What is wrong, in words."""
    checks = {
        "the audit found differences": figures["audit_status"] != 0,
        "answers whose decision is not in the log": figures["log_decisions"] < figures["answered"],
        "a probe was not answered": figures["probes_failed"] > 0,
        "a shopper was not answered": figures["unanswered_shoppers"] > 0,
        "a process did not end cleanly": any(figures["exit_statuses"]),
        "published records are not in the log": figures["log_events"] < figures["published_events"],
        "records are in the log that nobody published": figures["log_events"] > figures["published_events"],
        "records are twice in the log": figures["log_records_beyond"] > 0,
    }
    return [what for what, is_wrong in checks.items() if is_wrong]


if __name__ == "__main__":
    sys.exit(main())
