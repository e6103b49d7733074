"""How fast does a real Kafka become transitions in replay, beside a bare drain of the same topic?

    python -m benchmarks.ingest [--records 400000] [--quixstreams PYTHON] [--json FILE]

Mixed traffic: decisions with slates of 10 and the events that came of them, 1 % duplicates, 1 % disorder, 0.1 % bad,
written to a broker of its own. Then, in turns, the same partitions are read to their end by confluent-kafka's
`consume` + `value()` alone (the ceiling of whoever uses that), and by the learner's own intake: poll, decode, join,
insert into replay. Training is not part of it. Medians of the turns; the stages' shares are of the intake's own time.

--quixstreams: a Python with quixstreams (`python -m venv V; V/bin/pip install quixstreams fastavro`). It reads the same
good records, as plain Avro in a topic that is written after the other, through its AvroDeserializer into a function
that does nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from confluent_kafka import Consumer, TopicPartition

from benchmarks.record import append, show
from learner.agent_settings import AgentSettings
from learner.replay import Replay
from streaming.decoder import Decoder
from streaming.interning import Vocabulary
from streaming.join_settings import JoinSettings
from streaming.joiner import Joiner
from streaming.log import Log, open_log
from streaming.schemas import DECISION, EVENT, Codec
from tests.kafka_broker import KafkaBroker

TOPIC = "events"
PLAIN = "plain"  # the same records, for peers that know no frames: Avro of a union of both schemas
PEER = Path(__file__).parent / "peers" / "quixstreams_drain.py"
SLOTS = 10
HISTORY = 12
BATCH = 20_000
PEER_RECORDS = 100_000  # enough for its pace to settle
FRAME_BYTES = 10
START_MS = 1_750_000_000_000


def traffic(
    records: int, users: int, items: int, rng: np.random.Generator
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, record) in order of event time but for 1 % that come up to two seconds late; 1 % come twice."""
    names = np.array(["select_item", "view_item", "add_to_cart", "purchase"])
    made = 0
    while made < records:
        when = START_MS + made * 20
        user = f"user-{rng.integers(users)}"
        seen, slate = rng.integers(items, size=HISTORY), rng.choice(items, SLOTS, replace=False)
        history = [
            {
                "item_id": f"item-{i}",
                "name": "view_item",
                "timestamp": when - 1000 * (HISTORY - h),
                "value": 9.5,
            }
            for h, i in enumerate(seen.tolist())
        ]
        shown = [{"item_id": f"item-{i}", "propensity": 0.1} for i in slate.tolist()]
        decision = {
            "recommendation_id": f"r{made}",
            "user_id": user,
            "timestamp": when,
            "history": history,
            "slate": shown,
            "epsilon": 0.1,
            "policy_version": 1,
            "strategy": "LEARNED",
        }
        yield "decision", decision
        made += 1
        for k in range(int(rng.integers(1, 5))):
            late_ms = int(rng.integers(2000)) if rng.random() < 0.01 else 0
            event = {
                "event_id": f"e{made}",
                "name": str(names[min(k, 3)]),
                "user_id": user,
                "timestamp": when + 5 + k - late_ms,
                "items": [{"item_id": shown[int(rng.integers(SLOTS))]["item_id"], "price": 9.5}],
                "recommendation_id": f"r{made - k - 1}" if rng.random() < 0.8 else None,
            }
            for _ in range(2 if rng.random() < 0.01 else 1):
                yield "event", event
                made += 1


def write(log: Log, records: int, users: int, items: int, plain: bool = False) -> int:
    """Fill the topic; returns how many records are in it; plain: PLAIN as well.

    One after the other: in turns their records would reach the broker in smaller batches, which a drain reads slower.
    """
    for topic in (TOPIC, PLAIN) if plain else (TOPIC,):
        fill(log, topic, records, users, items)
    return sum(bounds.high for bounds in log.bounds(TOPIC).values())


def fill(log: Log, topic: str, records: int, users: int, items: int) -> None:
    """The same traffic in either topic, but that what is cut off in TOPIC is whole in PLAIN."""
    log.create_topic(topic, 4)
    codec, producer, rng = Codec(), log.producer(), np.random.default_rng(0)
    for n, (kind, record) in enumerate(traffic(records, users, items, rng)):
        value = codec.encode_decision(record) if kind == "decision" else codec.encode_event(record)
        cut = rng.random() < 0.001  # drawn for both: the traffic comes from the same generator
        if topic == PLAIN:
            value = (b"\x00" if kind == "decision" else b"\x02") + value[FRAME_BYTES:]
        elif cut:
            value = value[: len(value) // 2]
        producer.send(topic, record["user_id"].encode(), value)
        if n % 50_000 == 0:
            producer.flush()
            print(f"\rwriting {topic}: {n:,} records", end="", file=sys.stderr, flush=True)
    producer.close()
    print("\r\x1b[K", end="", file=sys.stderr)


def drain(bootstrap: str, partitions: int, records: int) -> float:
    """Records a second by `consume` and `value()` alone, in the quickest way that we know.

    It takes what is there rather than wait for a full batch (twice as fast), and a full queue is asked again after 5 ms
    rather than a second (three times as fast).
    """
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "bare-drain",
            "enable.auto.commit": "false",
            "queued.max.messages.kbytes": "32768",
            "fetch.queue.backoff.ms": "5",
        }
    )
    consumer.assign([TopicPartition(TOPIC, p, 0) for p in range(partitions)])
    left, start = records, 0.0
    while left > 0:
        messages = consumer.consume(BATCH, 0) or consumer.consume(1, 1.0)
        if messages and not start:
            start = time.perf_counter()  # connecting is not part of it
        for message in messages:
            message.value()
        left -= len(messages)
    seconds = time.perf_counter() - start
    consumer.close()
    return records / seconds


def peer(python: Path, bootstrap: str, records: int) -> float:
    """Records a second of quixstreams, in a process of its own. Raises: CalledProcessError, with what it said."""
    with NamedTemporaryFile("w", suffix=".json") as schema:
        contracts = Codec().reader_schemas()
        json.dump([contracts[DECISION], contracts[EVENT]], schema)
        schema.flush()
        command = [str(python), str(PEER), bootstrap, PLAIN, schema.name, str(records)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(said.split()[-1])


class Intake:
    """The learner's way from log to replay, with a clock at each stage."""

    def __init__(self, log: Log, partitions: int) -> None:
        agent = AgentSettings()
        self.joiner = Joiner(JoinSettings(gamma=agent.gamma, history_length=agent.entries))
        self.joiner.assign(range(partitions))
        self.decoder = Decoder(Codec(), Vocabulary(), partitions)
        self.replay = Replay(1_000_000, agent.entries)
        self._reader = log.reader(TOPIC, dict.fromkeys(range(partitions), 0))
        self.seconds: dict[str, float] = defaultdict(float)

    def run(self, records: int) -> float:
        """Records a second, all the way."""
        left, start = records, 0.0
        while left > 0:
            with self._timed("poll"):
                batch = self._reader.poll(BATCH, 1.0)
            if not start:
                self.seconds.clear()  # connecting is not part of it
                start = time.perf_counter()
            with self._timed("decode"):
                columns = self.decoder.decode(batch)
            with self._timed("join"):
                joined = self.joiner.push(columns)
            with self._timed("insert"):
                self.replay.insert(joined)
            left -= len(batch)
        seconds = time.perf_counter() - start
        self._reader.close()
        return records / seconds

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


def measure(
    records: int, users: int, items: int, turns: int, quixstreams: Path | None = None
) -> dict[str, float]:
    """All figures."""
    with KafkaBroker() as broker:
        log = open_log(broker.url)
        there = write(log, records, users, items, plain=quixstreams is not None)
        partitions = log.partitions(TOPIC)
        Intake(log, partitions).run(min(there, 20_000))  # compiles
        drains, intakes, shares, peers = [], [], [], []
        for _ in range(turns):
            drains.append(drain(broker.bootstrap, partitions, there))
            intake = Intake(log, partitions)
            intakes.append(intake.run(there))
            shares.append({k: v / sum(intake.seconds.values()) for k, v in intake.seconds.items()})
            if quixstreams is not None:
                peers.append(peer(quixstreams, broker.bootstrap, min(there, PEER_RECORDS)))
        log.close()
    counters = intake.joiner.counters()
    assert counters["duplicates"] > 0
    assert counters["bad"] > 0
    return {
        "records": there,
        "events_per_s": median(intakes),
        "transitions_per_s": median(intakes) * intake.replay.inserted / there,
        "drain_per_s": median(drains),
        "ratio_to_drain": median(a / b for a, b in zip(intakes, drains, strict=True)),
        **beside(intakes, peers),
        **{f"share_{stage}": median(s[stage] for s in shares) for stage in shares[0]},
        "duplicates": counters["duplicates"],
        "bad": counters["bad"],
        "bytes_per_transition": intake.replay.nbytes / len(intake.replay),
    }


def beside(intakes: list[float], peers: list[float]) -> dict[str, float]:
    """The peer's figures, if it was run."""
    if not peers:
        return {}
    ratio = median(a / b for a, b in zip(intakes, peers, strict=True))
    return {"quixstreams_per_s": median(peers), "ratio_to_quixstreams": ratio}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and append to a JSON-lines file."""
    parser = argparse.ArgumentParser(prog="benchmarks.ingest", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=400_000, help="records in the topic")
    parser.add_argument("--users", type=int, default=100_000, help="users")
    parser.add_argument("--items", type=int, default=50_000, help="items")
    parser.add_argument("--turns", type=int, default=5, help="turns of drain and intake")
    parser.add_argument("--quixstreams", type=Path, help="a Python that has quixstreams and fastavro")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object a line")
    options = parser.parse_args(arguments)
    figures = measure(options.records, options.users, options.items, options.turns, options.quixstreams)
    show(figures)
    append(options.json, "ingest", arguments or sys.argv[1:], figures)


if __name__ == "__main__":
    main()
