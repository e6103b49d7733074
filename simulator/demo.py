"""The whole loop as real processes on this machine: `python -m simulator.demo`, which is what `make demo` runs.

A learner and a policy server are started on a fresh log; simulated shoppers call the server over gRPC and publish what
they do. Random, popularity and the planning oracle serve copies of the same shop meanwhile, in this process. In the
last third of the time exploration is switched off, and all four are compared on the visits of that stretch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, NoReturn

from serving import policy_pb2 as pb
from serving.client import CallError, Client
from simulator import report
from simulator.contest import Rivals
from simulator.figures import Figures, figures, same_visits
from simulator.freshness import Freshness, FreshnessProbe
from simulator.goods import DAY_MS, available
from simulator.parts import Broken, Parts, own_cpu_s
from simulator.shop import HOUR_MS, Shop, ShopSettings, Visits
from simulator.traffic import Publisher, Status, Traffic, TrafficConfig, TrafficError
from streaming.commandline import (
    Parser,
    add_config,
    add_log,
    build,
    codec_from,
    kafka_options,
    registry_from,
    run,
)
from streaming.kafka_settings import REGISTRY_URL, write_settings
from streaming.log import Log, LogError, open_log

FOLDER: Final = Path(".bellwether/demo")
PARTITIONS: Final = 8
_MARKER: Final = "demo.json"  # a folder that holds it is a demo's, and may be replaced
_LOOK_S: Final = 0.25
_START_S: Final = 900.0  # longest wait for the two processes: two busy cores may compile for minutes
_READS: Final = "beginning with the"  # what the learner says once it reads
_PROBE_S, _MARK_S = 0.05, 1.0  # between looks at what is served, and at where the log ends
_CATCH_UP_S: Final = 10.0  # longest wait, after the traffic, for weights that have seen all of it


@dataclass(frozen=True)
class DemoConfig:
    """The demo."""

    seeds: tuple[int, ...] = field(
        default=(1,),
        metadata={"help": "played one after the other, each another shop and another learner; >= 0"},
    )
    minutes: float = field(
        default=4.75, metadata={"help": "from the first visit to the report; minutes, 0.4..1440"}
    )
    rate: float = field(default=500.0, metadata={"help": "recommendations a second, 1..100000"})
    epsilon: float = field(
        default=0.05, metadata={"help": "share of slots explored until the last third, 0..1"}
    )
    slate_size: int = field(default=6, metadata={"help": "slots in a slate, 1..100"})
    learner: str = field(
        default="",
        metadata={"help": "flags for the learner, in one word: --learner='--gamma 0.9'"},
    )
    folder: Path = field(
        default=FOLDER,
        metadata={
            "help": "for everything it writes; an older demo's is replaced",
            "parse": Path,
            "shown": FOLDER,
        },
    )

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be >= 0, each once, not {','.join(map(str, self.seeds))}")
        bounds = {
            "minutes": (0.4, 1440.0),
            "rate": (1.0, 100_000.0),
            "epsilon": (0.0, 1.0),
            "slate_size": (1, 100),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be within {low}..{high}, not {getattr(self, name)}")


class Topics(NamedTuple):
    """Where a run's records go."""

    events: str
    catalog: str


class Clock:
    """Times of one run, in seconds since it began."""

    def __init__(self, minutes: float) -> None:
        self._began, self._minutes = time.monotonic(), minutes
        self.opened_s = self.traffic_ends_s = self.exam_s = math.inf

    def now_s(self) -> float:
        return time.monotonic() - self._began

    def opening(self) -> None:
        """The shop opens now."""
        self.opened_s, minutes = self.now_s(), self._minutes
        # the rest is for the report
        self.traffic_ends_s = self.opened_s + 60 * minutes - min(15.0, 6 * minutes)

    def learning(self) -> None:
        """The first weights are served now: the last third from here on, at most three minutes, is the exam."""
        left = self.traffic_ends_s - self.now_s()
        self.exam_s = self.traffic_ends_s - min(left / 3, 180.0)


class Screen:
    """The terminal: rows that stay, and under them one line that says what is going on now."""

    def __init__(self, out: IO[str], clock: Clock) -> None:
        self._out, self._clock = out, clock
        self._terminal = out.isatty()
        self._last_s = 0.0

    def row(self, text: str) -> None:
        """A row that stays."""
        print(f"\r\x1b[K{text}" if self._terminal else text, file=self._out, flush=True)
        self._last_s = self._clock.now_s()

    def told(self, text: str) -> None:
        """A row with the time in front."""
        self.row(f"{self._time()}  {text}")

    def now(self, text: str) -> None:
        """What is going on; elsewhere than on a terminal: a row, when there was none for ten seconds."""
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{f'{self._time()}  {text}'[:width]}", end="", file=self._out, flush=True)
        elif self._clock.now_s() - self._last_s >= 10:
            self.told(text)

    def clear(self) -> None:
        """Take the passing line away."""
        if self._terminal:
            print("\r\x1b[K", end="", file=self._out, flush=True)

    def _time(self) -> str:
        seconds = int(self._clock.now_s())
        return f"{seconds // 60:2d}:{seconds % 60:02d}"


class Observer:
    """Looks at the loop from outside: where the log ends, what is served, how fresh it is. One thread."""

    def __init__(self, log: Log, topic: str, target: str) -> None:
        self._log, self._topic = log, topic
        self._client = Client(target)
        self._probe = FreshnessProbe()
        self._next_mark_s = -math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self.policy = pb.GetPolicyResponse()  # the newest answer
        self.records = 0  # in the log, a second ago at most

    @property
    def learnt_from(self) -> int:
        """Records behind the weights that are served."""
        return sum(position.next_offset for position in self.policy.positions)

    @property
    def caught_up(self) -> bool:
        """The weights that are served have learnt from every record marked."""
        return self._next_mark_s > -math.inf and not self._probe.waiting

    def start(self) -> None:
        self._thread.start()

    def mark(self) -> None:
        """Look at once where the log ends."""
        self._next_mark_s = -math.inf

    def close(self) -> None:
        """Harmless twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._client.close()

    def found(self) -> Freshness:
        """Call it after `close`."""
        return self._probe.found(time.monotonic())

    def _run(self) -> None:
        while not self._stop.wait(_PROBE_S):
            with contextlib.suppress(CallError, LogError):  # what is gone is found out elsewhere
                self._look()

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_mark_s:
            ends = {p: bounds.high for p, bounds in self._log.bounds(self._topic).items()}
            self.records = sum(ends.values())
            # how long it took until the first weights is no freshness
            if self.policy.policy_version:
                self._probe.mark(ends, now_s)
            self._next_mark_s = now_s + _MARK_S
        self.policy = self._client.policy()
        read_to = {position.partition: position.next_offset for position in self.policy.positions}
        self._probe.look(read_to, time.monotonic())


class Shoppers:
    """The traffic, in a thread: it leads the rivals, and stops exploring when the exam begins."""

    def __init__(self, traffic: Traffic, rivals: Rivals, clock: Clock) -> None:
        self._traffic, self._rivals, self._clock = traffic, rivals, clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shoppers", daemon=True)
        self._error: Exception | None = None
        self._looked_s = -math.inf
        self.status: Status = traffic.status()
        self.visits: Visits = traffic.shop.visits()  # replaced whole, so any thread may read it
        self.exam_ms = 0  # event time at which exploration ended; 0: not yet

    def start(self) -> None:
        self._thread.start()

    def check(self) -> None:
        """Raise Broken if the traffic cannot go on."""
        if self._error is not None:
            raise Broken(f"the shoppers cannot go on: {self._error}")

    def close(self) -> None:
        """Stop after the turn in hand; harmless twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._traffic.run(self._stop, self._after_turn)
            self._take(self._traffic.status())
        except (TrafficError, LogError, CallError) as error:
            self._error = error

    def _after_turn(self, status: Status) -> None:
        now_s = self._clock.now_s()
        if not self.exam_ms and now_s >= self._clock.exam_s:
            self._traffic.config = replace(self._traffic.config, epsilon=0.0)
            self.exam_ms = status.event_ms
        if now_s - self._looked_s >= 1.0:
            self._looked_s = now_s
            self._take(status)

    def _take(self, status: Status) -> None:
        self.status, self.visits = status, self._traffic.shop.visits()
        self._rivals.follow(status.event_ms)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status: 0 when learned beat popularity, 1 when it did not or the loop broke."""
    parser = Parser(
        prog="python -m simulator.demo",
        description="The whole loop on this machine: simulated shoppers, a learner, a policy server. It ends by itself "
        "with a report; the exit status is 1 if the loop broke or did not learn. Ctrl-C ends it at once.",
    )
    parser.add_argument("--seed", metavar="K", type=int, help="the same as --seeds K")
    add_config(parser, DemoConfig)
    add_log(parser, default=None)
    namespace = parser.parse_args(arguments)
    given = {} if namespace.seed is None else {"seeds": (namespace.seed,)}
    config = build(DemoConfig, namespace, **given)
    # SIGINT too: a shell's background job starts with it ignored
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    return run(lambda: _demo(config, namespace))


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _demo(config: DemoConfig, namespace: Namespace) -> int:
    with _fresh(config.folder) as lock:
        made = []
        for seed in config.seeds:
            folder = config.folder if len(config.seeds) == 1 else config.folder / f"seed-{seed}"
            folder.mkdir(exist_ok=True)
            one = _one_seed(config, namespace, seed, folder, lock)
            if one is None:
                return 1
            made.append(one)
        if len(made) > 1:
            made.append(report.summary(made))
            report.write(config.folder, made[-1])
            print(f"\n{report.words(made[-1], config.folder)}")
        if why := made[-1]["why"]:
            print(f"demo: {why}", file=sys.stderr)
        return 0 if made[-1]["ok"] else 1


@contextlib.contextmanager
def _fresh(folder: Path) -> Iterator[int]:
    """An empty folder, and a lock that all processes of this demo hold, by its file descriptor.

    Raises: OSError when another demo's processes still run there, or the folder is not a demo's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise OSError(
                f"a demo still runs in {folder} (process ids {lock.read().strip()}); end it, or choose a --folder"
            ) from None
        if folder.exists():
            if any(folder.iterdir()) and not (folder / _MARKER).exists():
                raise OSError(f"{folder} holds other things than a demo; choose another --folder")
            shutil.rmtree(folder)
        folder.mkdir()
        (folder / _MARKER).write_text(json.dumps({"command": shlex.join(sys.argv)}) + "\n")
        lock.truncate(0)
        yield lock.fileno()


def _one_seed(
    config: DemoConfig, namespace: Namespace, seed: int, folder: Path, lock: int
) -> report.Json | None:
    """The report of one run, written and shown; None if the loop broke, which was said."""
    clock = Clock(config.minutes)
    screen = Screen(sys.stdout, clock)
    shop = ShopSettings()
    screen.row(
        f"Bellwether demo: {shop.shoppers:,} simulated shoppers, {shop.items:,} items, seed {seed}. "
        f"About {config.minutes:g} minutes; Ctrl-C ends it."
    )
    try:
        with ExitStack() as closing:
            made = report.report(Loop(config, namespace, seed, folder, lock, clock, screen, closing).play())
        screen.now("drawing the picture")
        report.write(folder, made)
    except (Broken, TrafficError, LogError, OSError, ValueError) as error:
        screen.clear()
        (folder / "report.json").write_text(
            json.dumps({"ok": False, "why": str(error), "seeds": [seed]}, indent=2) + "\n"
        )
        print(f"demo: the loop broke: {error}", file=sys.stderr)
        return None
    finally:
        screen.clear()
    screen.row(f"\n{report.words(made, folder)}")
    return made


class Loop:
    """One run of the loop."""

    def __init__(
        self,
        config: DemoConfig,
        namespace: Namespace,
        seed: int,
        folder: Path,
        lock: int,
        clock: Clock,
        screen: Screen,
        closing: ExitStack,
    ) -> None:
        """closing: ends all that is begun here."""
        self._config, self._namespace, self._seed, self._folder = config, namespace, seed, folder
        self._lock, self._clock, self._screen, self._closing = lock, clock, screen, closing
        self._url = namespace.log or f"sqlite:///{folder / 'log.db'}"
        # a Kafka may hold an older demo's topics, or a shop's
        prefix = f"demo-{secrets.token_hex(3)}-" if namespace.log else ""
        self._topics = Topics(f"{prefix}events", f"{prefix}catalog")
        self._metrics_port = _free_port()
        self._parts = closing.enter_context(Parts(folder, keep_open=[lock]))
        self._settings = ShopSettings()
        self._cpu_began_s = own_cpu_s()

    def play(self) -> report.Findings:
        """Start everything, let the traffic run, end everything. Raises: Broken, LogError."""
        log = self._open()
        log.create_topic(self._topics.events, PARTITIONS)
        log.create_topic(self._topics.catalog, 1, compacted=True)
        if self._namespace.log:
            self._screen.told(f"topics {self._topics.events} and {self._topics.catalog} in {self._url}")
        shop = Shop(self._settings, self._seed)
        publisher = self._stock(log, shop)
        self._start_parts()
        target = self._await_parts()
        rivals = Rivals(self._settings, self._seed, self._config.slate_size)
        self._closing.callback(rivals.close)
        rivals.start()
        shoppers = self._open_the_shop(shop, publisher, target, rivals)
        observer = Observer(self._open(), self._topics.events, target)
        self._closing.callback(observer.close)
        observer.start()
        self._watch(shoppers, rivals, observer)
        return self._finish(shoppers, rivals, observer)

    def _open(self) -> Log:
        log = open_log(self._url, kafka_options(self._namespace))
        self._closing.callback(log.close)
        return log

    def _start_parts(self) -> None:
        weights = ["--weights", str(self._folder / "weights")]
        topics = ["--topic", self._topics.events, "--catalog-topic", self._topics.catalog]
        log = ["--log", self._url, *self._log_settings()]
        data = ["--data-dir", str(self._folder / "learner"), "--metrics-port", str(self._metrics_port)]
        pids = [
            self._parts.start("serving", "--port", "0", *weights, *topics, *log),
            self._parts.start("learner", *data, *weights, *topics, *log, *shlex.split(self._config.learner)),
        ]
        with open(self._lock, "w", closefd=False) as lock:
            lock.truncate(0)
            lock.write(" ".join(map(str, pids)))

    def _log_settings(self) -> list[str]:
        """Flags for the parts' access to the log; what may be secret is in a file, and in no list of processes."""
        settings, registry = kafka_options(self._namespace), registry_from(self._namespace)
        if registry is not None:
            settings[REGISTRY_URL] = registry
        flags = []
        if settings:
            file = self._folder / "log.properties"
            file.unlink(missing_ok=True)
            write_settings(file, settings)
            self._closing.callback(file.unlink, missing_ok=True)
            flags += ["--kafka-config", str(file)]
        for flag in ("registry_headers", "schemas"):
            if getattr(self._namespace, flag):
                flags += ["--" + flag.replace("_", "-"), getattr(self._namespace, flag)]
        return flags

    def _await_parts(self) -> str:
        """host:port of the policy server, once that answers and the learner reads."""
        self._screen.told(
            "starting the policy server and the learner; the first time, they compile for a minute or two"
        )
        while True:
            self._parts.check()
            address = re.search(r"serving on ([\d.]+:\d+)", self._parts.said("serving"))
            if address and _READS in self._parts.said("learner"):
                self._clock.opening()
                self._screen.told("the shop opens; without weights the server recommends best sellers")
                return address.group(1)
            waiting = "learner is" if address else "policy server and the learner are"
            if self._clock.now_s() > _START_S:
                raise Broken(f"the {waiting} not up in {_START_S:.0f} s; see the logs in {self._folder}")
            self._screen.now(f"the {waiting} starting ...")
            time.sleep(_LOOK_S)

    def _stock(self, log: Log, shop: Shop) -> Publisher:
        """Put the catalog into the log, before anybody is asked to recommend from it."""
        producer = log.producer()
        self._closing.callback(producer.close)
        publisher = Publisher(shop, producer, codec_from(self._namespace), *self._topics)
        opens_ms = self._settings.start_ms
        publisher.catalog(opens_ms, available(shop.goods, self._seed, opens_ms, self._settings.stock_outs))
        publisher.flush()
        return publisher

    def _open_the_shop(self, shop: Shop, publisher: Publisher, target: str, rivals: Rivals) -> Shoppers:
        client = self._closing.enter_context(Client(target))
        traffic = Traffic(
            TrafficConfig(
                slate_size=self._config.slate_size,
                rate=self._config.rate,
                epsilon=self._config.epsilon,
                call="batch",
            ),
            shop,
            client,
            publisher,
            run=secrets.token_hex(6),
            clock=time.monotonic,
            cpu=own_cpu_s,
        )
        shoppers = Shoppers(traffic, rivals, self._clock)
        self._closing.callback(shoppers.close)
        shoppers.start()
        return shoppers

    def _watch(self, shoppers: Shoppers, rivals: Rivals, observer: Observer) -> None:
        """Show what is going on until the traffic's time is over."""
        table = Table(self._screen, self._settings.start_ms)
        learning = exam = False
        while self._clock.now_s() < self._clock.traffic_ends_s:
            self._check(shoppers, rivals)
            if not learning and observer.policy.policy_version:
                learning = True
                self._clock.learning()
                self._screen.told("the first weights are served; newer ones follow, a few a second")
            if not exam and shoppers.exam_ms:
                exam = True
                self._screen.told("no more exploration: from here on the policies are compared")
            # of an hour ago every visit is over; who is not nearly as far knows the short ones only
            accounts = {
                **rivals.visits(shoppers.status.event_ms - HOUR_MS // 2),
                "learned": shoppers.visits,
            }
            table.tell(self._clock.now_s() - self._clock.opened_s, accounts, shoppers.status, observer)
            self._screen.now(_now(shoppers.status, observer))
            time.sleep(_LOOK_S)

    def _finish(self, shoppers: Shoppers, rivals: Rivals, observer: Observer) -> report.Findings:
        """End the traffic, let the others catch up, end the processes in peace."""
        shoppers.close()
        self._check(shoppers, rivals)
        if not observer.policy.policy_version:
            published = int(_metrics(self._metrics_port).get("learner_policy_version", 0))
            raise Broken(
                f"the policy server took none of {published} versions of the weights; see {self._folder}/serving.log"
                if published
                else f"the learner published no weights in time; see {self._folder}/learner.log"
            )
        status = shoppers.status
        accounts = rivals.finish(
            status.event_ms, lambda: self._screen.now("the other policies serve their last visits")
        )
        until_s = self._clock.now_s() + _CATCH_UP_S
        observer.mark()
        while not observer.caught_up and self._clock.now_s() < until_s:
            self._parts.check()
            self._screen.now("the last events are being learnt from")
            time.sleep(_LOOK_S)
        counters = _metrics(self._metrics_port)
        observer.close()
        self._screen.now("ending: decisions are flushed, the learner writes its last checkpoint")
        cpu_s = {
            "simulator": own_cpu_s() - self._cpu_began_s,
            "serving": self._parts.end("serving"),
            "learner": self._parts.end("learner"),
        }
        return report.Findings(
            seed=self._seed,
            accounts={**accounts, "learned": shoppers.visits},
            opened_ms=self._settings.start_ms,
            exam_ms=shoppers.exam_ms or status.event_ms,
            reached_ms=status.event_ms,
            explored=self._config.epsilon,
            freshness=observer.found(),
            recommendations=status.decisions,
            unanswered=status.errors,
            records=observer.records,
            learnt_from=observer.learnt_from,
            transitions=int(counters.get("learner_transitions_total", 0)),
            updates=int(counters.get("learner_updates_total", 0)),
            updates_left=int(counters.get("learner_updates_left", 0)),
            policy_version=observer.policy.policy_version,
            cpu_s=cpu_s,
            wall_s=self._clock.now_s(),
            log=self._url,
        )

    def _check(self, shoppers: Shoppers, rivals: Rivals) -> None:
        self._parts.check()
        shoppers.check()
        rivals.check()


class Table:
    """A row now and then, oftener at first, when most is learnt: what the visits that began since the last row came
    to, under three policies."""

    def __init__(self, screen: Screen, start_ms: int) -> None:
        self._screen, self._start_ms = screen, start_ms
        self._since_ms = start_ms
        self._next_s = -math.inf

    def tell(self, open_s: float, accounts: dict[str, Visits], status: Status, observer: Observer) -> None:
        """Show a row if it is time to, and there is something to show. open_s: seconds since the shop opened."""
        until_ms = status.event_ms - HOUR_MS
        if open_s < self._next_s or "popularity" not in accounts or until_ms <= self._since_ms:
            return
        paired = same_visits(accounts, self._since_ms, until_ms)
        if not len(paired["learned"].visit):
            return
        if self._next_s == -math.inf:
            self._screen.row(HEADER)
        self._screen.told(
            table_row(
                (status.event_ms - self._start_ms) / DAY_MS,
                status.decisions,
                {name: figures(visits) for name, visits in paired.items()},
                observer.policy.policy_version,
                observer.learnt_from,
            )
        )
        self._since_ms, self._next_s = until_ms, open_s + min(10.0, 3.0 + open_s / 10)


HEADER: Final = """
                          click-through     reward per visit               weights      events
 time   day  recommended  popular learned   popular learned  oracle        version   learnt from"""


def table_row(
    day: float, recommended: int, by_policy: dict[str, Figures], version: int, learnt_from: int
) -> str:
    """One row under HEADER, less the time; the oracle is still making its plan at first."""
    popular, learned, oracle = by_policy["popularity"], by_policy["learned"], by_policy.get("oracle")
    best = f"{oracle.reward_per_visit:.2f}" if oracle else "-"
    return (
        f"{day:4.2f} {recommended:12,} {100 * popular.ctr:7.1f}% {100 * learned.ctr:6.1f}%  "
        f"{popular.reward_per_visit:8.2f} {learned.reward_per_visit:7.2f} {best:>7} "
        f"{version or '-':>14} {learnt_from:13,}"
    )


def _now(status: Status, observer: Observer) -> str:
    """The passing line."""
    behind = max(0, observer.records - observer.learnt_from)
    learner = (
        f"learning, {behind:,} records behind"
        if observer.policy.policy_version
        else "the learner waits for its first events"
    )
    served = (
        f"{status.decisions:,} recommendations by {status.strategy.lower()}"
        if status.strategy
        else "the shop opens"
    )
    return f"{served} · {learner}" + (f" · {status.errors:,} unanswered" if status.errors else "")


def _metrics(port: int) -> dict[str, float]:
    """The learner's own counters without labels, by name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
