"""What may break, one small function each: it breaks something, makes it whole again, yields; then recovery is timed.

What a function does after its `yield` comes once all is well again. It raises Wrong where a promise was not kept.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from confluent_kafka import Consumer, Producer, TopicPartition

from benchmarks.load import SLOTS, Held, decision, event
from benchmarks.stage import (
    CLUSTER,
    NOTICE_S,
    PARTITIONS,
    START_S,
    Act,
    Fault,
    Rig,
    eventually,
    metric,
    require,
)
from learner.audit import load_memory
from learner.weights import WeightStore
from serving import policy_pb2 as pb
from streaming.schemas import Codec
from tests.kafka_broker import free_ports

FAULTS: Final[dict[str, Fault]] = {}
KAFKA: Final = ("kafka",)
EITHER: Final = ("kafka", "sqlite")


def fault(name: str, about: str, logs: tuple[str, ...] = EITHER, **needs: Any) -> Callable[[Act], Act]:
    """Give a fault its name."""

    def register(act: Act) -> Act:
        FAULTS[name] = Fault(name, about, act, logs, **needs)
        return act

    return register


# --- the learner dies, stops, is replaced ----------------------------------------------------------------


@fault("kill", "kill -9 of the learner")
def kill(rig: Rig) -> Iterator[None]:
    rig.learner.kill()
    rig.learner.start()
    yield


def die_at(rig: Rig, step: str) -> None:
    """Within a checkpoint, then start anew."""
    rig.learner.signal(signal.SIGUSR1)
    status = rig.learner.ended(NOTICE_S)
    require(status == -signal.SIGKILL, f"the learner ended with {status} before {step}")
    rig.learner.start(*FAULTS[f"kill-{step}"].program(rig.luck))


@fault("kill-part", "kill -9 between fsync and rename of a checkpoint's part", frail="part")
def kill_part(rig: Rig) -> Iterator[None]:
    die_at(rig, "part")
    yield


@fault("kill-parts", "kill -9 when a checkpoint's parts are written, and its manifest is not", frail="parts")
def kill_parts(rig: Rig) -> Iterator[None]:
    die_at(rig, "parts")
    yield


@fault("kill-manifest", "kill -9 between fsync and rename of a checkpoint's manifest", frail="manifest")
def kill_manifest(rig: Rig) -> Iterator[None]:
    die_at(rig, "manifest")
    yield


@fault("kill-commit", "kill -9 after the manifest, before the broker is told", frail="commit")
def kill_commit(rig: Rig) -> Iterator[None]:
    die_at(rig, "commit")
    yield


@fault("sigterm", "SIGTERM, and started again")
def sigterm(rig: Rig) -> Iterator[None]:
    status = rig.learner.stop()
    require(status == 0, f"exit status {status} after SIGTERM")
    rig.learner.start()
    yield


@fault("sigstop", "SIGSTOP for --away-s, then SIGCONT")
def sigstop(rig: Rig) -> Iterator[None]:
    rig.learner.signal(signal.SIGSTOP)
    time.sleep(rig.settings.away_s)
    rig.learner.signal(signal.SIGCONT)
    yield


@fault("two-learners", "a second learner of the same name; every other time the first one sleeps meanwhile")
def two_learners(rig: Rig) -> Iterator[None]:
    first, store = rig.learner.process, WeightStore(rig.learner.weights)
    asleep = rig.luck.random() < 0.5
    rig.stack.callback(first.kill)
    if asleep:
        first.send_signal(signal.SIGSTOP)
    old = store.epoch()
    rig.learner.start()
    eventually(lambda: store.epoch() > old, "the second one publishes", START_S, rig.learner)
    if asleep:
        first.send_signal(signal.SIGCONT)
    status = first.wait(NOTICE_S)
    require(status == 1, f"the first learner ended with {status}")
    require("was taken over by epoch" in rig.learner.said(), "the first learner did not say who took over")
    after = store.versions()[-1]
    yield
    eventually(lambda: newest(WeightStore(store.url)) > after, "a version after the first one's end")
    published = [store.manifest(version) for version in store.versions() if version > after]
    require(min(manifest.epoch for manifest in published) > old, "the first one published after its end")
    require(WeightStore(store.url).epoch() > old, "the label is the first one's")


def newest(store: WeightStore) -> int:
    """The version that `stable` names; 0: none."""
    return store.latest() or 0


# --- the log goes away -----------------------------------------------------------------------------------


@fault("broker-restart", "the broker is stopped (SIGTERM) and started", KAFKA)
def broker_restart(rig: Rig) -> Iterator[None]:
    assert rig.broker is not None
    rig.broker.stop()
    time.sleep(rig.luck.uniform(0, 3))
    rig.broker.start()
    yield


@fault("broker-kill", "kill -9 of the broker, and started", KAFKA)
def broker_kill(rig: Rig) -> Iterator[None]:
    assert rig.broker is not None
    rig.broker.kill9()
    time.sleep(rig.luck.uniform(0, 3))
    rig.broker.start()
    yield


@fault("brokers-away", "no broker for --away-s", KAFKA)
def brokers_away(rig: Rig) -> Iterator[None]:
    assert rig.broker is not None
    rig.broker.kill9()
    time.sleep(rig.settings.away_s)
    require(rig.learner.process.poll() is None, "the learner ended")
    rig.broker.start()
    yield


@fault("leader-change", "kill -9 of the node that leads a partition, of three; two go on", (CLUSTER,))
def leader_change(rig: Rig) -> Iterator[None]:
    cluster = rig.cluster
    assert cluster is not None
    leader = cluster.leader(rig.topic, rig.luck.randrange(PARTITIONS))
    leader.kill9()
    yield
    leader.start()
    eventually(lambda: cluster.in_sync(rig.topic), "all nodes have all of it", 120)


def poisoned(rig: Rig, seconds: float, kind: str, **attributes: Any) -> None:
    """For so long the link is like this, for the learner and for the shop."""
    assert rig.proxy is not None
    with rig.proxy.toxic(kind, **attributes):
        time.sleep(seconds)


@fault("link-latency", "answers of the broker take 400 ms more, give or take 300", KAFKA, proxied=True)
def link_latency(rig: Rig) -> Iterator[None]:
    poisoned(rig, 6, "latency", latency=400, jitter=300)
    yield


@fault("link-bandwidth", "5 KB/s from the broker", KAFKA, proxied=True)
def link_bandwidth(rig: Rig) -> Iterator[None]:
    poisoned(rig, 6, "bandwidth", rate=5)
    yield


@fault("link-loss", "nothing comes through, and no connection ends, for --away-s", KAFKA, proxied=True)
def link_loss(rig: Rig) -> Iterator[None]:
    poisoned(
        rig, rig.settings.away_s, "timeout", stream=rig.luck.choice(("upstream", "downstream")), timeout=0
    )
    yield


@fault("link-reset", "connections are reset, again and again", KAFKA, proxied=True)
def link_reset(rig: Rig) -> Iterator[None]:
    poisoned(rig, 4, "reset_peer", timeout=rig.luck.randrange(500))
    yield


@fault("link-cut", "connections end in the middle of a message, again and again", KAFKA, proxied=True)
def link_cut(rig: Rig) -> Iterator[None]:
    stream = rig.luck.choice(("upstream", "downstream"))
    poisoned(rig, 4, "limit_data", stream=stream, bytes=rig.luck.randrange(500, 20_000))
    yield


# --- the disk --------------------------------------------------------------------------------------------


def train_on(rig: Rig) -> None:
    """A checkpoint fails; it is said, the last good one is intact, and training goes on. Raises: Wrong."""
    eventually(
        lambda: "could not write a checkpoint" in rig.learner.said(), "it is said", learner=rig.learner
    )
    generation = load_memory(rig.learner.directory).generation  # reads every byte
    before = rig.updates()
    eventually(lambda: rig.updates() > before, "training goes on", learner=rig.learner)
    require(
        load_memory(rig.learner.directory).generation == generation,
        "a checkpoint was written to a failing disk",
    )


@fault("disk-full", "no room for checkpoints and weights", small_disk=True)
def disk_full(rig: Rig) -> Iterator[None]:
    filler, block = rig.learner.data.parent / "filler", bytes(1 << 16)
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(block) == len(block):
                pass
        except OSError:
            pass
    train_on(rig)
    filler.unlink()
    yield


@fault("disk-readonly", "the disk of checkpoints and weights cannot be written", small_disk=True)
def disk_readonly(rig: Rig) -> Iterator[None]:
    remount(rig, "ro")
    train_on(rig)
    remount(rig, "rw")
    yield


def remount(rig: Rig, how: str) -> None:
    """Read-only or not; refused while a file is being written."""
    command = ["mount", "-o", f"remount,{how}", str(rig.learner.data.parent)]
    eventually(lambda: subprocess.run(command, capture_output=True).returncode == 0, "remounting")


@fault("disk-error", "each write of a checkpoint fails half-way", frail="error")
def disk_error(rig: Rig) -> Iterator[None]:
    rig.learner.signal(signal.SIGUSR1)
    train_on(rig)
    rig.learner.signal(signal.SIGUSR1)
    yield


# --- damage ----------------------------------------------------------------------------------------------


def damage(path: Path, luck: random.Random) -> None:
    """Flip a bit, or cut it short."""
    data = bytearray(path.read_bytes())
    at = luck.randrange(len(data))
    if luck.random() < 0.5:
        data[at] ^= 1 << luck.randrange(8)
    else:
        del data[at:]
    path.write_bytes(data)


def parts_of(manifest: Path) -> dict[str, str]:
    """Name and hash of each part."""
    return {name: part["sha256"] for name, part in json.loads(manifest.read_text())["parts"].items()}


def generation(manifest: Path) -> int:
    """Of a checkpoint."""
    return int(manifest.stem.rpartition("-")[2])


def fall_back(rig: Rig, before: Path, named: str) -> Iterator[None]:
    """Start; once all is well, it must have said what was damaged, and have gone on one generation before."""
    rig.learner.start()
    yield
    said = rig.learner.said()
    require(named in said and "falling back" in said, f"{named} is not named")
    wanted = f"going on from checkpoint {generation(before)}:"
    require(wanted in said, f"it did not say {wanted!r}")


@fault("damage-manifest", "a bit of the newest manifest is flipped, or its end is gone")
def damage_manifest(rig: Rig) -> Iterator[None]:
    rig.learner.kill()
    *_, before, newest = rig.learner.manifests()
    damage(newest, rig.luck)
    yield from fall_back(rig, before, newest.name)


@fault("damage-part", "the same of a part (replay, networks, join, ...) that is new in the newest checkpoint")
def damage_part(rig: Rig) -> Iterator[None]:
    rig.learner.kill()
    *_, before, newest = rig.learner.manifests()
    new = sorted(set(parts_of(newest).values()) - set(parts_of(before).values()))
    file = rig.learner.directory / "parts" / f"{rig.luck.choice(new)}.safetensors"
    damage(file, rig.luck)
    yield from fall_back(rig, before, file.name)


@fault(
    "damage-all", "the same of a part that all checkpoints share: it ends, and says so; a backup is restored"
)
def damage_all(rig: Rig) -> Iterator[None]:
    require(rig.learner.stop() == 0, "it did not stop well")
    backup = rig.folder / "backup"
    shutil.rmtree(backup, ignore_errors=True)
    shutil.copytree(rig.learner.data, backup)
    shared = set.intersection(*(set(parts_of(m).values()) for m in rig.learner.manifests()))
    file = rig.learner.directory / "parts" / f"{rig.luck.choice(sorted(shared))}.safetensors"
    damage(file, rig.luck)
    rig.learner.start()
    status = rig.learner.ended()
    require(status == 1, f"it ended with {status}")
    said = rig.learner.said()
    require(file.name in said and "Restore the directory from a backup" in said, f"{file.name} is not named")
    shutil.rmtree(rig.learner.data)
    shutil.copytree(backup, rig.learner.data)
    rig.learner.start()
    yield


@fault("damage-weights", "the same of new weights: the server keeps those it has, and takes the next", KAFKA)
def damage_weights(rig: Rig) -> Iterator[None]:
    server, store = rig.serve(), WeightStore(rig.learner.weights)
    with server.client() as client:
        server.process.send_signal(signal.SIGSTOP)
        known = newest(store)
        eventually(lambda: newest(store) > known, "a new version")
        rig.learner.signal(signal.SIGSTOP)
        version = newest(store)
        tensors = rig.learner.weights / f"{store.manifest(version).tensors_sha256}.safetensors"
        (manifest,) = rig.learner.weights.glob(f"v{version:08d}-*.json")
        damage(rig.luck.choice((tensors, manifest)), rig.luck)
        server.process.send_signal(signal.SIGCONT)
        refused = f"stays in use: version {version}"  # which one stays: it may have been taking one more
        eventually(lambda: refused in server.stderr(), "the damage is said")
        answer = client.recommend(pb.RecommendRequest(user_id="user-1", slate_size=SLOTS, unlogged=True))
        require(answer.policy_version < version and len(answer.slate) == SLOTS, "no answer by the old ones")
        rig.learner.signal(signal.SIGCONT)
        yield
        eventually(lambda: client.policy().policy_version > version, "the next version is served")


# --- the topic -------------------------------------------------------------------------------------------


@fault("partitions-added", "a partition more, while all runs")
def partitions_added(rig: Rig) -> Iterator[None]:
    count = rig.log.partitions(rig.topic)
    rig.log.create_topic(rig.topic, count + 1)
    eventually(lambda: rig.log.bounds(rig.topic)[count].high > 0, "the shop writes to it")
    yield


@fault("aborted", "transactions in the midst of the traffic: aborted, committed, or left to time out", KAFKA)
def aborted(rig: Rig) -> Iterator[None]:
    assert rig.broker is not None
    number, codec, sent = rig.luck.randrange(1 << 30), Codec(), rig.load.sent
    settings = {
        "bootstrap.servers": rig.broker.bootstrap,
        "transactional.id": f"shop-{number}",
        "transaction.timeout.ms": 2000,
        "partitioner": "murmur2_random",
        "log_level": 0,
    }
    producer = Producer(settings)
    producer.init_transactions(30)
    producer.begin_transaction()
    names = [f"t{number}-{n}" for n in range(40)]
    for n, name in enumerate(names):
        user, item = f"user-{n}", f"item-{n}"
        value = (
            codec.encode_event(event(name, "purchase", user, item))
            if n % 2
            else codec.encode_decision(decision(name, user, [f"item-{n + k}" for k in range(SLOTS)]))
        )
        producer.produce(rig.topic, value, user.encode())
    producer.flush(30)
    time.sleep(rig.luck.uniform(0, 1.5))
    fate = rig.luck.choice(("abort", "abort", "commit", "leave"))
    if fate == "abort":
        producer.abort_transaction(30)
    elif fate == "commit":
        producer.commit_transaction(30)
        sent.events.update(names[1::2])
        sent.decisions.update(names[0::2])
    rig.stack.callback(producer.purge)
    yield
    if fate == "leave":  # until the broker ends it, nobody may see what lies behind it
        ends = ends_of(rig, "read_uncommitted")
        eventually(
            lambda: all(end >= ends[p] for p, end in ends_of(rig, "read_committed").items()),
            "the broker ends a transaction that was left open",
            START_S,
            rig.learner,
        )


def ends_of(rig: Rig, isolation: str) -> dict[int, int]:
    """Where each partition ends for readers of this isolation level."""
    assert rig.broker is not None
    about = {"bootstrap.servers": rig.broker.bootstrap, "group.id": "ends", "isolation.level": isolation}
    with closing(Consumer(about)) as consumer:
        places = {p: TopicPartition(rig.topic, p) for p in range(PARTITIONS)}
        return {p: consumer.get_watermark_offsets(place, 10.0)[1] for p, place in places.items()}


@fault("idle-partition", "nobody comes to a partition; event time goes on in it", flags=("--idle-s", "1"))
def idle_partition(rig: Rig) -> Iterator[None]:
    partition = rig.luck.randrange(PARTITIONS)
    rig.load.muted = partition
    time.sleep(6)
    rig.load.muted = None
    yield
    told = load_memory(rig.learner.directory).journal.told(partition)
    require(any(t.watermark_ms is not None for t in told), f"partition {partition} was not seen to be idle")


# --- the server ------------------------------------------------------------------------------------------

SPOOL: Final = 300  # records that its Kafka client's queue holds
ASKED: Final = 1000


@fault(
    "full-spool", f"{ASKED} answers while the log is away, and the server's queues hold half of that", KAFKA
)
def full_spool(rig: Rig) -> Iterator[None]:
    assert rig.broker is not None
    if rig.server is None:
        (port,) = free_ports(1)
        rig.server_port = port
        rig.checks.append(lambda held: account_for_answers(rig, held))
        rig.serve("--slate-size", str(SLOTS), "--metrics-port", str(port), "--epsilon", "1",
                  "--spool-mib", "0.03", "--kafka", f"queue.buffering.max.messages={SPOOL}")  # fmt: skip
    rig.broker.kill9()
    with rig.serve().client(retries=0) as client:
        for _ in range(ASKED):
            answer = client.recommend(pb.RecommendRequest(user_id=f"guest-{len(rig.answered)}"))
            require(len(answer.slate) == SLOTS, "an answer without a slate")
            rig.answered.add(answer.recommendation_id)
    require(dropped(rig) > 0, "the queue took them all")
    rig.broker.start()
    yield


def dropped(rig: Rig) -> float:
    """Decisions that the server says were lost."""
    return metric(rig.server_port, "serving_decisions_total", 'fate="dropped"')


def account_for_answers(rig: Rig, held: Held) -> None:
    """What was answered is in the log, or was counted as dropped. Raises: Wrong."""
    rig.load.sent.decisions |= rig.answered & held.decisions.keys()
    missing = len(rig.answered - held.decisions.keys())
    require(missing == dropped(rig), f"{missing} answers are not in the log, {dropped(rig):.0f} were counted")
    require(rig.serve().terminate() == 0, "the server did not drain well")
