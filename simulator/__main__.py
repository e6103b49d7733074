"""`simulator --log URL --server HOST:PORT --shoppers N --seed K ...`: shoppers at a real server."""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from serving.client import Client
from simulator.goods import DAY_MS
from simulator.shop import Shop, ShopSettings
from simulator.traffic import Publisher, Report, Status, Traffic, TrafficConfig, TrafficError, start_after
from streaming.commandline import Parser, add_config, add_log, build, codec_from, log_from, run

_LINE_S: Final = 1.0  # between two live lines on a terminal; a tenth as often elsewhere


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    parser = Parser(
        prog="simulator",
        description="A shop full of simulated shoppers: they call Recommend and publish what they do. Event time is "
        "their own and starts now, or an hour after the newest event in the log. Ctrl-C ends with a summary.",
    )
    parser.add_argument(
        "--server", metavar="HOST:PORT", default="127.0.0.1:50051", help="policy server [%(default)s]"
    )
    parser.add_argument(
        "--seed", metavar="K", type=int, default=0, help="catalog, shoppers and their luck [0]"
    )
    parser.add_argument("--events", metavar="TOPIC", default="events", help="topic for events [%(default)s]")
    parser.add_argument("--catalog", metavar="TOPIC", default="catalog", help="topic for items [%(default)s]")
    parser.add_argument(
        "--partitions", metavar="N", type=int, default=8, help="of topics that must be created [8]"
    )
    parser.add_argument("--report", metavar="FILE", type=Path, help="write the summary here as JSON")
    add_log(parser)
    add_config(parser, TrafficConfig, title="Traffic")
    add_config(parser, ShopSettings, omit=("start_ms",), title="Shop")
    namespace = parser.parse_args(arguments)
    for name, least in (("seed", 0), ("partitions", 1)):
        if getattr(namespace, name) < least:
            parser.error(f"--{name} must be >= {least}, not {getattr(namespace, name)}")
    config = build(TrafficConfig, namespace)
    build(ShopSettings, namespace)  # what is wrong is said before anything is opened
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def body() -> int:
        log, codec = log_from(namespace), codec_from(namespace)
        producer = log.producer()
        try:
            log.create_topic(namespace.events, namespace.partitions)
            log.create_topic(namespace.catalog, 1, compacted=True)
            start = start_after(log, namespace.events, codec, int(time.time() * 1000))
            shop = Shop(build(ShopSettings, namespace, start_ms=start), namespace.seed)
            publisher = Publisher(shop, producer, codec, namespace.events, namespace.catalog)
            with Client(namespace.server, connections=2) as client:
                name = secrets.token_hex(6)
                traffic = Traffic(
                    config, shop, client, publisher, run=name, clock=time.monotonic, cpu=time.process_time
                )
                report = traffic.run(stop, live_line(start, sys.stderr.isatty()))
        except TrafficError as error:
            print(f"simulator: {error}", file=sys.stderr)
            return 1
        finally:
            producer.close()
            log.close()
        _tell(report, namespace.report)
        return 0

    return run(body)


def live_line(start_ms: int, terminal: bool) -> Callable[[Status], None]:
    """A function that now and then writes where the traffic stands: one line that changes, or one line each 10 s."""
    last = Status(0.0, start_ms, 0, 0, 0, 0, 0, 0, "", 0.0)
    every_s = _LINE_S if terminal else 10 * _LINE_S

    def show(status: Status) -> None:
        nonlocal last
        if status.wall_s - last.wall_s < every_s:
            return
        text = describe(last, status, start_ms)
        print(
            f"\r\x1b[K{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True
        )
        last = status

    return show


def describe(before: Status, now: Status, start_ms: int) -> str:
    """One line on what happened between two looks at the traffic.

    >>> a = Status(0.0, 0, 0, 0, 0, 0, 0, 0, "", 0.0)
    >>> describe(a, Status(2.0, 43_200_000, 600, 3600, 180, 700, 0, 12, "LEARNED", 0.5), 0)
    'day 0.5 · 600 recommendations (300/s) · click-through 5.0 % · LEARNED version 12 · 700 published'
    """
    seconds = max(now.wall_s - before.wall_s, 1e-9)
    shown = max(now.impressions - before.impressions, 1)
    parts = [
        f"day {(now.event_ms - start_ms) / DAY_MS:.1f}",
        f"{now.decisions:,} recommendations ({(now.decisions - before.decisions) / seconds:.0f}/s)",
        f"click-through {100 * (now.clicks - before.clicks) / shown:.1f} %",
        f"{now.strategy} version {now.policy_version}" if now.strategy else "no answer yet",
        f"{now.published:,} published",
    ]
    return " · ".join(parts + ([f"{now.errors:,} unanswered{_why(now)}"] if now.errors else []))


def _why(status: Status) -> str:
    return f" (the last one: {status.trouble})" if status.trouble else ""


def _tell(report: Report, file: Path | None) -> None:
    s = report.status
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(
        f"{s.decisions:,} recommendations in {s.wall_s:.1f} s, {s.clicks:,} clicks: "
        f"click-through {100 * report.ctr:.2f} %\n"
        f"{_visits(report)}\n"
        f"{s.published:,} records published, {s.errors:,} requests unanswered{_why(s)}; "
        f"own cost {report.cpu_us_per_event:.0f} µs of CPU for an event"
    )
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        part.write_text(json.dumps(report.summary(), indent=2) + "\n")
        part.replace(file)


def _visits(report: Report) -> str:
    """What whole visits came to."""
    count, (low, high) = len(report.visits.visit), report.ci95
    if not count:
        return "no visit is over"
    known = f"{low:.3f} to {high:.3f}, 95 %" if math.isfinite(low) else "of one shopper: no interval"
    return f"{count:,} whole visits, reward per visit {report.reward_per_visit:.3f} ({known})"


if __name__ == "__main__":
    sys.exit(main())
