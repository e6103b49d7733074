"""How long after an event do weights that have seen it answer?

    python -m benchmarks.freshness --log kafka --json FILE
    python -m benchmarks.freshness --log sqlite --json FILE

Real processes: the log (a broker of its own for kafka), a learner that trains without a pause and writes checkpoints,
a policy server, and a load of views beside them. First the log is given views at once, and how quickly weights that
saw them all are served is what is sustainable; the load is half of that. A probe is an event like any other; its
clock starts before it is handed to the producer, its partition and offset are noted as a reader sees it, and the
clock stops at the first GetPolicy answer whose positions lie beyond it: the weights that answer from then on were
trained after it was read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.serve import fill, learner
from serving.client import Client
from streaming.commandline import Parser
from streaming.log import Log, LogFull, Producer, open_log
from streaming.schemas import Codec
from tests.kafka_broker import KafkaBroker
from tests.serving_process import ServerProcess, eventually

WARM_UP_S = 15.0  # of the load, before probes: what the burst has left behind is over
SETTLE_S = 30.0  # after the last probe: one that was not seen by then counts as never seen


def main() -> None:
    parser = Parser(prog="python -m benchmarks.freshness", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log", choices=["sqlite", "kafka"], default="sqlite", help="kind of log [sqlite]")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of probing [60]")
    parser.add_argument("--every", type=float, default=0.23, help="seconds between two probes [0.23]")
    parser.add_argument(
        "--rate", type=float, default=0.0, help="events a second beside them [0: half of what is sustainable]"
    )
    parser.add_argument("--burst", type=int, default=400_000, help="events to find out what that is [400000]")
    parser.add_argument("--items", type=int, default=2000, help="items in the catalog [2000]")
    parser.add_argument("--users", type=int, default=1000, help="users known before [1000]")
    parser.add_argument("--shoppers", type=int, default=100_000, help="users of the load [100000]")
    parser.add_argument("--publish-s", type=float, default=0.25, help="the learner's, seconds [0.25]")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the result to this file, one JSON a line"
    )
    options = parser.parse_args()
    figures = measure(options)
    print(
        f"{options.log}, {figures['load_events_per_s']:g} events/s beside: event → serving p50 {figures['p50_s']:.2f} s"
        f"   p99 {figures['p99_s']:.2f} s   max {figures['max_s']:.2f} s   {figures['probes']} probes, "
        f"{figures['lost']} never seen, {figures['versions']} versions"
    )
    record.append(
        options.json,
        "freshness",
        sys.argv[1:],
        {"log": options.log, "items": options.items, "publish_s": options.publish_s} | figures,
    )


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds from probe to serving weights, and what went on meanwhile."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        url = (
            f"sqlite:///{folder}/log.db"
            if options.log == "sqlite"
            else stack.enter_context(KafkaBroker()).url
        )
        log = stack.enter_context(closing(open_log(url)))
        fill(log, options.items, options.users)
        stack.enter_context(learner(url, folder, 0, "--publish-s", str(options.publish_s)))
        server = stack.enter_context(ServerProcess("--weights", f"{folder}/weights", "--log", url))
        client = stack.enter_context(server.client())
        eventually(lambda: client.policy().items >= options.items and client.policy().step > 0, 300)
        views = Views(options)
        sustainable = 0.0 if options.rate else sustained(log, client, views, options.burst)
        load = stack.enter_context(shopping(log, views, options.rate or sustainable / 2))
        time.sleep(WARM_UP_S)
        tracker = Tracker(log, client)
        stack.enter_context(tracker.following())
        first, started, before = client.policy().policy_version, time.monotonic(), load[0]
        producer = log.producer()
        while time.monotonic() - started < options.duration:
            tracker.probe(producer)
            time.sleep(options.every)
        seconds = time.monotonic() - started
        sent, versions = load[0] - before, client.policy().policy_version - first
        producer.close()
        lost = tracker.settle(SETTLE_S)
    took = np.array(list(tracker.took.values()))
    p50, p99 = np.percentile(took, [50, 99])
    return {
        "p50_s": round(float(p50), 3),
        "p99_s": round(float(p99), 3),
        "max_s": round(float(took.max()), 3),
        "probes": len(took),
        "lost": lost,
        "versions": versions,
        "load_events_per_s": round(sent / seconds, 1),
        "sustainable_events_per_s": round(sustainable, 1),
    }


def view(event_id: str, user_id: str, item: int) -> dict[str, Any]:
    return {
        "event_id": event_id,
        "name": "view_item",
        "user_id": user_id,
        "timestamp": int(time.time() * 1000),
        "items": [{"item_id": f"item-{item:06d}"}],
    }


class Views:
    """Views as bytes, quickly: only ids and times are new, the rest was encoded before."""

    def __init__(self, options: argparse.Namespace) -> None:
        codec, rng, number = Codec(), np.random.default_rng(1), b"%012d" % 0
        self._made = 0
        self._shapes = []
        now = encoded_ms(int(time.time() * 1000))
        for n in range(options.shoppers):
            user = f"shopper-{n}"
            event = view(number.decode(), user, int(rng.integers(options.items)))
            before, _, rest = codec.encode_event(event | {"timestamp": decoded_ms(now)}).partition(number)
            between, _, after = rest.partition(now)
            self._shapes.append((user.encode(), before, between, after))

    def send(self, producer: Producer, count: int) -> None:
        """So many more, as of now; waits where the producer is full."""
        now = encoded_ms(int(time.time() * 1000))
        for number in range(self._made, self._made + count):
            user, before, between, after = self._shapes[number % len(self._shapes)]
            value = b"%b%012d%b%b%b" % (before, number, between, now, after)
            while True:
                try:
                    producer.send("events", user, value)
                    break
                except LogFull:
                    producer.flush(1.0)
        self._made += count


def encoded_ms(timestamp_ms: int) -> bytes:
    """As Avro writes it: zigzag, seven bits a byte."""
    rest, out = timestamp_ms << 1, bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*out, rest])


def decoded_ms(encoded: bytes) -> int:
    """What `encoded_ms` was given."""
    return sum((byte & 0x7F) << (7 * i) for i, byte in enumerate(encoded)) >> 1


def sustained(log: Log, client: Client, views: Views, count: int) -> float:
    """Events a second, from when many begin to come at once to when weights that saw them all are served."""
    producer = log.producer()
    began = time.monotonic()
    views.send(producer, count)
    producer.close()
    ends = {p: bounds.high for p, bounds in log.bounds("events").items()}

    def seen() -> bool:
        positions = {p.partition: p.next_offset for p in client.policy().positions}
        return all(positions.get(p, 0) >= end for p, end in ends.items())

    eventually(seen, 300)
    return count / (time.monotonic() - began)


@contextmanager
def shopping(log: Log, views: Views, rate: float) -> Iterator[list[int]]:
    """Views at a steady rate for as long as the block lasts; gives their number so far."""
    stop, sent = threading.Event(), [0]

    def run() -> None:
        producer, began = log.producer(), time.monotonic()
        while not stop.wait(0.01):
            due = int((time.monotonic() - began) * rate) - sent[0]
            views.send(producer, due)
            sent[0] += due
        producer.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield sent
    finally:
        stop.set()
        thread.join()


class Tracker:
    """Sends probes, and notes when the weights in use had seen each."""

    def __init__(self, log: Log, client: Client) -> None:
        self.sent: dict[bytes, float] = {}  # key → monotonic seconds
        self.took: dict[bytes, float] = {}  # key → seconds until served
        self._places: dict[bytes, tuple[int, int]] = {}  # key → partition and offset, until served
        self._client = client
        self._codec = Codec()
        self._reader = log.reader("events", {p: b.high for p, b in log.bounds("events").items()}, keys=True)

    def probe(self, producer: Producer) -> None:
        """Send one."""
        user = f"probe-{len(self.sent)}"
        value = self._codec.encode_event(view(user, user, 0))
        self.sent[user.encode()] = time.monotonic()
        producer.send("events", user.encode(), value)

    def settle(self, timeout_s: float) -> int:
        """Wait until all were seen, for so long at most; returns how many were not."""
        deadline = time.monotonic() + timeout_s
        while len(self.took) < len(self.sent) and time.monotonic() < deadline:
            time.sleep(0.02)
        return len(self.sent) - len(self.took)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Look at log and server in turn, in a thread, for as long as the block lasts."""
        stop = threading.Event()

        def run() -> None:
            while not stop.is_set():
                self._note()
                self._look()
            self._reader.close()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _note(self) -> None:
        batch = self._reader.poll(10_000, 0.01)
        for i, key in enumerate(batch.keys or ()):
            if key in self.sent:
                self._places[key] = int(batch.partition[i]), int(batch.offset[i])

    def _look(self) -> None:
        positions = {p.partition: p.next_offset for p in self._client.policy().positions}
        now = time.monotonic()
        for key, (partition, offset) in list(self._places.items()):
            if positions.get(partition, 0) > offset:
                self.took[key] = now - self.sent[key]
                del self._places[key]


if __name__ == "__main__":
    main()
