"""Where faults are tried: a log, a learner and a shop at work, and whatever else a fault needs."""

from __future__ import annotations

import random
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.load import Held, Load
from benchmarks.processes import TOPIC, LearnerProcess
from streaming.log import Log, open_log
from tests.kafka_broker import BrokerMissing, KafkaBroker, KafkaCluster, free_ports
from tests.serving_process import ServerProcess
from tests.toxiproxy import Toxiproxy, ToxiproxyMissing, program

PARTITIONS: Final = 3
START_S: Final = 600.0  # a first start may compile, on a busy machine
NOTICE_S: Final = 60.0  # in which a fault must be noticed
LEARNER: Final = (
    *("--batch-size", "32", "--dim", "8", "--hidden", "16", "--history-length", "8", "--min-replay", "200"),
    *("--updates-high", "0.02", "--replay-capacity", "300000", "--checkpoint-s", "0.5", "--publish-s", "0.5"),
)
CLUSTER: Final = "3 nodes"  # beside kafka and sqlite
FRAIL: Final = "benchmarks.frail_learner"
DISK_MIB: Final = 64


class Wrong(Exception):
    """Something was not as promised; the message says what."""


class RootMissing(Exception):
    """Only root may mount a disk; the message says so."""


MISSING: Final = (BrokerMissing, ToxiproxyMissing, RootMissing)  # what this machine may lack


class Settings(NamedTuple):
    """From the command line."""

    seed: int
    rate: float
    away_s: float
    toxiproxy: str | None


@dataclass
class Rig:
    """Everything that runs."""

    folder: Path
    settings: Settings
    luck: random.Random
    stack: ExitStack
    url: str  # as the learner and the shop know it
    log: Log  # the shortest way to it
    learner: LearnerProcess
    load: Load
    broker: KafkaBroker | None = None
    cluster: KafkaCluster | None = None
    proxy: Toxiproxy | None = None
    server: ServerProcess | None = None
    topic: str = TOPIC
    answered: set[str] = field(default_factory=set)  # by the server: recommendation_ids
    server_port: int = 0  # of its metrics
    checks: list[Callable[[Held], None]] = field(default_factory=list)  # at the end, of what the log holds

    def serve(self, *flags: str) -> ServerProcess:
        """The policy server, started at the first call."""
        if self.server is None:
            where = ("--weights", str(self.learner.weights), "--log", self.url)
            self.server = self.stack.enter_context(ServerProcess(*where, *flags, ready_s=START_S))
        return self.server

    def updates(self) -> float:
        """Gradient steps of this learner process."""
        return metric(self.learner.metrics_port, "learner_updates_total")


Act = Callable[[Rig], Iterator[None]]


@dataclass(frozen=True)
class Fault:
    """One kind of fault, and what it needs."""

    name: str
    about: str
    act: Act
    logs: tuple[str, ...]
    flags: tuple[str, ...] = ()  # of the learner
    frail: str = ""  # the learner's disk fails at this step, see benchmarks/frail_learner.py
    small_disk: bool = False  # for the learner's checkpoints and weights
    proxied: bool = False  # clients reach the broker through toxiproxy

    def program(self, luck: random.Random) -> tuple[str, ...]:
        """What runs the learner."""
        skip = f":{luck.randrange(6)}" if self.frail == "part" else ""
        return (FRAIL, self.frail + skip) if self.frail else ()


@contextmanager
def staged(fault: Fault, where: str, settings: Settings, folder: Path) -> Iterator[Rig]:
    """All processes, at work, for as long as the block lasts. Raises: one of MISSING."""
    luck = random.Random(f"{settings.seed} {fault.name} {where}")
    with ExitStack() as stack:
        parts = _log(fault, where, settings, folder, stack)
        log = stack.enter_context(closing(open_log(parts.pop("direct"))))
        log.create_topic(TOPIC, PARTITIONS)
        stores = stack.enter_context(small_disk(folder / "disk")) if fault.small_disk else None
        learner = LearnerProcess(folder, parts["url"], *LEARNER, *fault.flags, stores=stores)
        kafka = {"topic.metadata.refresh.interval.ms": "2000"} if where != "sqlite" else {}
        shop = stack.enter_context(closing(open_log(parts["url"], kafka)))
        load = Load(shop, TOPIC, settings.rate, luck.randrange(1 << 30))
        load.start()
        stack.callback(load.abandon)
        learner.start(*fault.program(luck))
        stack.callback(learner.kill)
        eventually(lambda: learner.meta().get("updates", 0) > 0, "the first update", START_S, learner)
        yield Rig(folder, settings, luck, stack, log=log, learner=learner, load=load, **parts)


def _log(fault: Fault, where: str, settings: Settings, folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Start it; parts of a Rig, and `direct`, the URL that no proxy is in the way of."""
    if where == "sqlite":
        url = f"sqlite:///{folder / 'log.db'}"
        return {"direct": url, "url": url}
    if where == CLUSTER:
        cluster = stack.enter_context(KafkaCluster())
        return {"direct": cluster.url, "url": cluster.url, "cluster": cluster}
    if not fault.proxied:
        broker = stack.enter_context(KafkaBroker())
        return {"direct": broker.url, "url": broker.url, "broker": broker}
    program(settings.toxiproxy)
    (port,) = free_ports(1)
    broker = stack.enter_context(KafkaBroker(proxy=port))
    proxy = stack.enter_context(Toxiproxy(port, broker.upstream, settings.toxiproxy))
    return {"direct": broker.url, "url": f"kafka://127.0.0.1:{port}", "broker": broker, "proxy": proxy}


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own. Raises: RootMissing."""
    folder.mkdir()
    size = f"size={DISK_MIB}m"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        raise RootMissing(f"a disk of its own needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def eventually(
    check: Callable[[], Any], what: str, timeout_s: float = NOTICE_S, learner: LearnerProcess | None = None
) -> Any:
    """The first true thing that `check` returns. Raises: Wrong when none comes in time."""
    end = time.monotonic() + timeout_s
    while not (found := check()):
        if time.monotonic() > end:
            raise Wrong(f"not within {timeout_s:g} s: {what}")
        if learner is not None and learner.process.poll() is not None:
            raise Wrong(f"the learner ended with {learner.process.returncode} before {what}")
        time.sleep(0.05)
    return found


def require(condition: object, what: str) -> None:
    """Raises: Wrong."""
    if not condition:
        raise Wrong(what)


def metric(port: int, name: str, label: str = "") -> float:
    """A metric's value now."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith(f"{name} ") or (line.startswith(f"{name}{{") and label in line)
    )
