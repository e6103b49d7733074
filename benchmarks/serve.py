"""How long does a Recommend take at a given rate while the learner trains on the same cores, and how much is gRPC?

    python -m benchmarks.serve --items 10000 --json FILE
    python -m benchmarks.serve --items 10000 --alone --json FILE
    python -m benchmarks.serve --items 10000 --candidates 10 --json FILE

Real processes: a policy server, a learner that reads the very decisions that the load leaves behind, trains without a
pause and publishes by its defaults, and the log between them. The load is open-loop: calls are due at a steady rate
whatever became of those before, and latency counts from the moment a call was due, so that a stall is charged to every
call it delays (no coordinated omission). It comes from ghz where that is on PATH, from a client of ours elsewhere. In
the same run, in turns with it: the ceiling, a server whose handler returns a ready-made reply of the same size. CPU per
call is the server process's own, which a busy machine changes little.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.json_format import MessageToDict
from grpc_reflection.v1alpha import reflection

from benchmarks import record
from serving import policy_pb2 as pb
from serving import policy_pb2_grpc
from serving.server import Symbols
from streaming.commandline import Parser
from streaming.log import Log, open_log
from streaming.schemas import Codec
from tests.serving_process import ROOT, ServerProcess, eventually

SPAWN = multiprocessing.get_context("spawn")
METHOD = "bellwether.v1.Policy/Recommend"
VIEWS = 20  # of each user, before the load begins
WIDTH = 20  # numbers that describe a candidate


class Load(NamedTuple):
    """What one stretch of load came to."""

    latency_s: npt.NDArray[np.float64]  # [calls] from when each was due
    seconds: float
    errors: int


def main() -> None:
    parser = Parser(prog="python -m benchmarks.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=500.0, help="calls a second [500]")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds measured of each server [60]")
    parser.add_argument("--rounds", type=int, default=3, help="turns in which the two are measured [3]")
    parser.add_argument("--items", type=int, default=10_000, help="items in the catalog [10000]")
    parser.add_argument("--users", type=int, default=1000, help="users with a history in the log [1000]")
    parser.add_argument("--processes", type=int, default=1, help="server processes [1]")
    parser.add_argument("--connections", type=int, default=4, help="connections of the load [4]")
    parser.add_argument(
        "--candidates",
        type=int,
        default=0,
        help="a request ranks so many of its own, which no catalog has, by their features; 0: the catalog [0]",
    )
    parser.add_argument("--alone", action="store_true", help="the learner stands still during the load")
    parser.add_argument("--nice", type=int, default=0, help="added to the learner's niceness [0]")
    parser.add_argument("--client", choices=["ghz", "ours"], help="who makes the load [ghz if it is on PATH]")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the result to this file, one JSON a line"
    )
    options = parser.parse_args()
    options.client = options.client or ("ghz" if shutil.which("ghz") else "ours")
    result = measure(options)
    print_result(result)
    record.append(options.json, "serve", sys.argv[1:], result)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both servers in turns, under the same conditions."""
    with tempfile.TemporaryDirectory() as folder, closing(open_log(f"sqlite:///{folder}/log.db")) as log:
        fill(log, options.items, options.users)
        server = ServerProcess(
            "--weights", f"{folder}/weights", "--log", log.url, "--processes", str(options.processes)
        )  # fmt: skip
        with learner(log.url, folder, options.nice) as trained, server, server.client() as client:
            eventually(lambda: client.policy().items >= options.items and client.policy().step > 0, 300)
            reply = client.recommend(requests(options)[0])
            assert reply.strategy == pb.LEARNED, "the weights are not served"
            if options.alone:
                trained.terminate()
                trained.wait()
            with empty_server(reply.SerializeToString()) as (target, empty_pid):
                before, cpu = client.policy(), cpu_s(trained.pid)
                empty, recommend, started = [], [], time.monotonic()
                for _ in range(options.rounds):
                    empty.append(loaded(target, empty_pid, options))
                    recommend.append(loaded(server.target, server.process.pid, options))
                seconds, after = time.monotonic() - started, client.policy()
                training = {
                    "updates_per_s": round((after.step - before.step) / seconds, 1),
                    "versions_per_s": round((after.policy_version - before.policy_version) / seconds, 2),
                    "cpu_share": round((cpu_s(trained.pid) - cpu) / seconds, 3),
                }
    ours, ceiling = summary(recommend), summary(empty)
    return {
        "rate": options.rate,
        "items": options.items,
        "candidates": options.candidates,
        "processes": options.processes,
        "client": options.client,
        "beside_learner": not options.alone,
        "learner_nice": options.nice,
        "recommend": ours,
        "empty_handler": ceiling,
        "p99_over_ceiling": round(ours["p99_ms"] / ceiling["p99_ms"], 2),
        "cpu_over_ceiling": round(ours["cpu_ms_per_call"] / ceiling["cpu_ms_per_call"], 2),
        "learner": training,
    }


def fill(log: Log, items: int, users: int) -> None:
    """A catalog, and an hour in which each user views some of it."""
    log.create_topic("events", 8)
    log.create_topic("catalog", 1, compacted=True)
    codec, producer, rng = Codec(), log.producer(), np.random.default_rng(0)
    for i in range(items):
        item = {
            "item_id": f"item-{i:06d}",
            "category": f"c{rng.integers(20)}",
            "price": float(rng.integers(1, 100)),
        }
        producer.send("catalog", item["item_id"].encode(), codec.encode_item(item))
    start_ms, views = int(time.time() * 1000) - 3_600_000, VIEWS * users
    for i, item in enumerate(rng.zipf(1.3, views) % items):
        event = {
            "event_id": f"e{i}",
            "name": "view_item",
            "user_id": f"user-{i % users}",
            "timestamp": start_ms + 3_600_000 * i // views,
            "items": [{"item_id": f"item-{item:06d}"}],
        }
        producer.send("events", event["user_id"].encode(), codec.encode_event(event))
    producer.close()


def requests(options: argparse.Namespace) -> list[pb.RecommendRequest]:
    """One for each user; the load takes them in turn."""
    rng = np.random.default_rng(1)
    return [
        pb.RecommendRequest(
            user_id=f"user-{i}",
            slate_size=10,
            candidates=[
                pb.Candidate(
                    item_id=f"fresh-{i}-{m}",
                    category=f"c{rng.integers(20)}",
                    price=float(rng.integers(1, 100)),
                    vector=rng.normal(size=WIDTH).tolist(),
                )
                for m in range(options.candidates)
            ],
        )
        for i in range(options.users)
    ]


@contextmanager
def learner(log_url: str, folder: str, nice: int, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """The real one, in a process of its own, for as long as the block lasts."""
    command = ["nice", "-n", str(nice), sys.executable, "-m", "learner", "--log", log_url]
    command += ["--data-dir", f"{folder}/learner", "--weights", f"{folder}/weights"]
    command += ["--updates-high", "1000", *more]  # never content: it trains without a pause
    with tempfile.TemporaryFile("w+b") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        try:
            yield process
        except BaseException:
            said.seek(0)
            sys.stderr.write(said.read().decode(errors="replace")[-2000:])
            raise
        finally:
            process.kill()
            process.wait()


def loaded(target: str, pid: int, options: argparse.Namespace) -> tuple[Load, float]:
    """One stretch of load on a server, and what CPU a call took of it, seconds."""
    seconds = options.duration / options.rounds
    before = cpu_s(pid)
    load = (ghz if options.client == "ghz" else open_loop)(target, seconds, options)
    return load, (cpu_s(pid) - before) / len(load.latency_s)


def ghz(target: str, seconds: float, options: argparse.Namespace) -> Load:
    """Load from ghz, which is none of ours and asks the server itself for its contract."""
    calls = int(options.rate * seconds)
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder, "requests.json"), Path(folder, "report.json")
        asked = [MessageToDict(request, preserving_proto_field_name=True) for request in requests(options)]
        data.write_text(json.dumps(asked))
        command = ["ghz", "--insecure", "--async", "--call", METHOD, "--data-file", str(data)]
        command += ["--rps", f"{options.rate:g}", "--total", str(calls), "--format", "json"]
        command += ["--connections", str(options.connections), "--concurrency", str(4 * options.connections)]
        subprocess.run([*command, "--output", str(report), target], check=True, timeout=seconds + 120)
        told = json.loads(report.read_text())["details"]
    ended = np.array([np.datetime64(call["timestamp"].rstrip("Z"), "ns") for call in told])
    end = (ended - ended.min()) / np.timedelta64(1, "s")
    begin = end - np.array([call["latency"] for call in told]) / 1e9
    order = np.argsort(begin)
    end, begin = end[order], begin[order]
    due = np.arange(calls) / options.rate
    due += (begin - due).min()  # the call that left most promptly left when it was due
    return Load(end - due, float(end.max() - due[0]), sum(call["status"] != "OK" for call in told))


def open_loop(target: str, seconds: float, options: argparse.Namespace) -> Load:
    """Load from a client of ours."""
    local = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(target, local) for _ in range(options.connections)]
    for channel in channels:
        grpc.channel_ready_future(channel).result(10)
    stubs = [policy_pb2_grpc.PolicyStub(channel) for channel in channels]
    asked, calls = requests(options), int(options.rate * seconds)
    due, done = np.arange(calls) / options.rate, np.full(calls, np.nan)
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
        future = stubs[i % len(stubs)].Recommend.future(asked[i % len(asked)], timeout=30)
        future.add_done_callback(lambda future, i=i: finish(i, future))
    for _ in range(calls):
        left.acquire()
    for channel in channels:
        channel.close()
    return Load(done - due, float(done.max()), len(errors))


def summary(stretches: list[tuple[Load, float]]) -> dict[str, float]:
    """All stretches as one, each less its first second."""
    latency_ms = 1000 * np.concatenate([_warm(load) for load, _ in stretches])
    p50, p99, p999 = np.percentile(latency_ms, [50, 99, 99.9])
    return {
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "p999_ms": round(float(p999), 3),
        "max_ms": round(float(latency_ms.max()), 3),
        "p99_ms_of_each": [round(1000 * float(np.percentile(_warm(load), 99)), 3) for load, _ in stretches],
        "achieved_rps": round(
            sum(len(load.latency_s) for load, _ in stretches) / sum(load.seconds for load, _ in stretches), 1
        ),
        "cpu_ms_per_call": round(1000 * float(np.mean([cpu for _, cpu in stretches])), 3),
        "errors": sum(load.errors for load, _ in stretches),
    }


def _warm(load: Load) -> npt.NDArray[np.float64]:
    return load.latency_s[int(len(load.latency_s) / load.seconds) :]


def cpu_s(pid: int) -> float:
    """CPU that a process and its children have used; 0 once it has ended."""
    used = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if pid in (int(stat.parent.name), int(fields[1])):
            used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


@contextmanager
def empty_server(reply: bytes) -> Iterator[tuple[str, int]]:
    """A server process that answers every Recommend with these bytes; its address and process id."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=serve_empty, args=(reply, theirs), daemon=True)
    process.start()
    assert process.pid is not None
    try:
        yield f"127.0.0.1:{ours.recv()}", process.pid
    finally:
        process.kill()
        process.join()


def serve_empty(reply: bytes, tell: Any) -> None:
    def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
        return reply

    server = grpc.server(ThreadPoolExecutor(32))
    method = grpc.unary_unary_rpc_method_handler(answer)
    handler = grpc.method_handlers_generic_handler(METHOD.partition("/")[0], {"Recommend": method})
    server.add_generic_rpc_handlers((handler,))
    reflection.enable_server_reflection((METHOD.partition("/")[0],), server, pool=Symbols())
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    tell.send(port)
    server.wait_for_termination()


def print_result(result: dict[str, Any]) -> None:
    told = result["learner"]
    beside = (
        f"beside a learner at {told['updates_per_s']:g} updates/s" if result["beside_learner"] else "alone"
    )
    ranked = f"{result['candidates']} candidates each, " if result["candidates"] else ""
    print(
        f"{result['rate']:g} Recommend/s from {result['client']}, {ranked}{result['items']} items, {beside}:"
    )
    for name in ("recommend", "empty_handler"):
        r = result[name]
        print(
            f"  {name:14} p50 {r['p50_ms']:7.2f} ms   p99 {r['p99_ms']:7.2f} ms   p99.9 {r['p999_ms']:7.2f} ms   "
            f"{r['cpu_ms_per_call']:.2f} ms CPU a call   {r['achieved_rps']:g} rps   {r['errors']} errors"
        )
    print(
        f"  {result['p99_over_ceiling']:.1f} times the empty handler's p99, "
        f"{result['cpu_over_ceiling']:.1f} times its CPU"
    )


if __name__ == "__main__":
    main()
