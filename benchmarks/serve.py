"""How long does a Recommend take at a given rate, and how much of that is gRPC itself?

    python -m benchmarks.serve --rate 500 --json FILE
    python -m benchmarks.serve --rate 500 --beside-training --json FILE

A real server process over a real log and real weights answers `--rate` calls a second, each for a user with a history,
each leaving a decision. The load is open-loop: calls leave on a schedule whatever became of those before, and latency
counts from the moment a call was due, so that a stall is charged to every call it delays (no coordinated omission). In
the same run, under the same load: the ceiling, a server whose handler returns a ready-made reply of the same size.
`--beside-training` keeps a learner's update loop busy on the same cores meanwhile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from learner.weights import WeightStore
from serving import policy_pb2 as pb
from serving import policy_pb2_grpc
from streaming.commandline import Parser
from streaming.log import Log, open_log
from streaming.schemas import Codec
from tests.serving_process import ServerProcess, agent, publish

NOW_MS = 1_700_000_000_000
SPAWN = multiprocessing.get_context("spawn")


def main() -> None:
    parser = Parser(prog="python -m benchmarks.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=500.0, help="calls a second [500]")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds of each measurement [20]")
    parser.add_argument("--items", type=int, default=2000, help="items in the catalog [2000]")
    parser.add_argument("--users", type=int, default=1000, help="users with a history in the log [1000]")
    parser.add_argument("--processes", type=int, default=1, help="server processes [1]")
    parser.add_argument("--connections", type=int, default=4, help="connections of the load [4]")
    parser.add_argument(
        "--beside-training", action="store_true", help="with a busy learner on the same cores"
    )
    parser.add_argument("--publish-every", type=float, default=1.0, help="seconds between new weights [1]")
    parser.add_argument("--json", metavar="FILE", help="append the result to this file, one JSON a line")
    options = parser.parse_args()
    result = measure(options)
    print_result(result)
    if options.json:
        append(Path(options.json), result)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both latencies, one after the other, under the same conditions."""
    with tempfile.TemporaryDirectory() as folder:
        log = open_log(f"sqlite:///{folder}/log.db")
        item_ids = [f"item-{i:06d}" for i in range(options.items)]
        fill(log, item_ids, options.users)
        store = WeightStore(f"{folder}/weights")
        made = agent(options.items)
        publish(store, item_ids, made=made)
        server = ServerProcess(
            "--weights", f"{folder}/weights", "--log", log.url, "--processes", str(options.processes)
        )  # fmt: skip
        with training(options.beside_training, options.items), server:
            channel = grpc.insecure_channel(server.target)
            reply = policy_pb2_grpc.PolicyStub(channel).Recommend(request(0))
            assert reply.strategy == pb.LEARNED, "the weights are not served"
            channel.close()
            with empty_server(reply.SerializeToString()) as target:
                ceiling = load(target, options)
            with publishing(store, item_ids, made, options.publish_every):
                recommend = load(server.target, options)
        log.close()
    return {
        "benchmark": "serve",
        "rate": options.rate,
        "items": options.items,
        "processes": options.processes,
        "beside_training": options.beside_training,
        "recommend": recommend,
        "empty_handler": ceiling,
        "p99_over_ceiling": recommend["p99_ms"] / ceiling["p99_ms"],
    }


def fill(log: Log, item_ids: list[str], users: int) -> None:
    """A catalog, and 20 views for each user."""
    log.create_topic("events", 8)
    log.create_topic("catalog", 1, compacted=True)
    codec, producer, rng = Codec(), log.producer(), np.random.default_rng(0)
    for item_id in item_ids:
        item = {"item_id": item_id, "category": f"c{rng.integers(20)}", "price": float(rng.integers(1, 100))}
        producer.send("catalog", item_id.encode(), codec.encode_item(item))
    for i in range(20 * users):
        user = f"user-{i % users}"
        event = {
            "event_id": f"e{i}",
            "name": "view_item",
            "user_id": user,
            "timestamp": NOW_MS + i,
            "items": [{"item_id": item_ids[rng.zipf(1.5) % len(item_ids)]}],
        }
        producer.send("events", user.encode(), codec.encode_event(event))
    producer.close()


def request(i: int, users: int = 1000) -> pb.RecommendRequest:
    return pb.RecommendRequest(
        user_id=f"user-{i % users}", slate_size=10, timestamp_ms=NOW_MS + 1_000_000 + i
    )


def load(target: str, options: argparse.Namespace) -> dict[str, float]:
    """Latency of calls that are due at a steady rate, after a second of warming up."""
    channels = [
        grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(options.connections)
    ]
    stubs = [policy_pb2_grpc.PolicyStub(channel) for channel in channels]
    for channel in channels:
        grpc.channel_ready_future(channel).result(10)
    warm = int(options.rate)
    calls = warm + int(options.rate * options.duration)
    due = np.arange(calls) / options.rate
    done = np.full(calls, np.nan)
    left = threading.Semaphore(0)
    errors: list[str] = []
    start = time.perf_counter() + 0.05

    def finish(i: int, future: Any) -> None:
        done[i] = time.perf_counter() - start
        if future.code() is not grpc.StatusCode.OK:
            errors.append(future.code().name)
        left.release()

    for i in range(calls):
        wait = start + due[i] - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        future = stubs[i % len(stubs)].Recommend.future(request(i, options.users), timeout=30)
        future.add_done_callback(lambda future, i=i: finish(i, future))
    for _ in range(calls):
        left.acquire()
    for channel in channels:
        channel.close()
    latency_ms = 1000 * (done - due)[warm:]
    p50, p99, p999 = np.percentile(latency_ms, [50, 99, 99.9])
    return {
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "p999_ms": round(float(p999), 3),
        "max_ms": round(float(latency_ms.max()), 3),
        "achieved_rps": round((calls - warm) / float(np.max(done) - due[warm]), 1),
        "errors": len(errors),
    }


@contextmanager
def empty_server(reply: bytes) -> Iterator[str]:
    """A server process that answers every Recommend with these bytes; its address."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=serve_empty, args=(reply, theirs), daemon=True)
    process.start()
    try:
        yield f"127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


def serve_empty(reply: bytes, tell: Any) -> None:
    def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
        return reply

    server = grpc.server(ThreadPoolExecutor(32))
    method = grpc.unary_unary_rpc_method_handler(answer)
    handler = grpc.method_handlers_generic_handler("bellwether.v1.Policy", {"Recommend": method})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    tell.send(port)
    server.wait_for_termination()


@contextmanager
def training(wanted: bool, items: int) -> Iterator[None]:
    """A learner's update loop in a process of its own, for as long as the block lasts."""
    if not wanted:
        yield
        return
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=train, args=(items, theirs), daemon=True)
    process.start()
    ours.recv()  # it is at work
    try:
        yield
    finally:
        process.kill()
        process.join()


def train(items: int, tell: Any) -> None:
    """Gradient steps on one random batch, without a pause."""
    import torch

    from learner.replay import empty_batch

    torch.set_num_threads(1)
    made = agent(items)
    rng = np.random.default_rng(0)
    batch = empty_batch(made.settings.batch_size, made.settings.history_length)
    for histories in (batch.state, batch.next_state):
        histories.item[:] = rng.integers(1, items + 1, histories.item.shape)
        histories.name[:] = 4
        histories.age_s[:] = rng.exponential(600, histories.age_s.shape)
    batch.action[:] = rng.integers(1, items + 1, len(batch.action))
    batch.reward[:] = batch.slot_reward[:] = rng.random(len(batch.reward)) < 0.05
    batch.discount[:] = 0.9
    batch.weight[:] = 1.0
    batch.propensity[:] = 0.1
    made.update(batch)
    tell.send("at work")
    while True:
        made.update(batch)


@contextmanager
def publishing(store: WeightStore, item_ids: list[str], made: Any, every_s: float) -> Iterator[None]:
    """New weights now and then, as a learner publishes them."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(every_s):
            publish(store, item_ids, made=made)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def print_result(result: dict[str, Any]) -> None:
    beside = "beside a busy learner" if result["beside_training"] else "alone"
    print(f"{result['rate']:g} Recommend/s, {result['items']} items, {beside}:")
    for name in ("recommend", "empty_handler"):
        r = result[name]
        print(
            f"  {name:14} p50 {r['p50_ms']:7.2f} ms   p99 {r['p99_ms']:7.2f} ms   p99.9 {r['p999_ms']:7.2f} ms   "
            f"max {r['max_ms']:7.2f} ms   {r['achieved_rps']:g} rps   {r['errors']} errors"
        )
    print(f"  p99 is {result['p99_over_ceiling']:.1f} times the empty handler's")


def append(path: Path, result: dict[str, Any]) -> None:
    """Add the result with commit, machine and command, as one line."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    about = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "command": "python -m benchmarks.serve " + " ".join(sys.argv[1:]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(about | result) + "\n")


if __name__ == "__main__":
    main()
