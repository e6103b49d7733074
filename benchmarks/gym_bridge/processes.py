"""The product as it runs in a shop: a real log, a learner and a policy server as processes of their own, gRPC between.

In lockstep, so that nothing depends on who is faster: each record is durable before the next is made, and once a chunk
is full, whoever asks waits until the server answers by what was learnt from it. So it gives the same slates as
`InProcess`, bit for bit.
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from benchmarks.checkpoint import cpu_s
from benchmarks.gym_bridge.product import Setup
from benchmarks.gym_bridge.storefront import Storefront
from benchmarks.processes import LearnerProcess
from serving import policy_pb2 as pb
from streaming.log import Log, Producer, open_log
from streaming.rewards import RewardTable
from streaming.schemas import Codec
from tests.kafka_broker import free_ports
from tests.serving_process import ServerProcess

EVENTS: Final = "events"
CATALOG: Final = "catalog"
_PATIENCE_S: Final = 240.0  # on a machine that others keep busy, imports alone take a minute
_LOOK_S: Final = 0.002


class Lockstep:
    """Log, learner and server in a folder; a context: its processes end with it."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        """url: of an empty log; None: SQLite in the folder."""
        self._folder = folder
        self._url = url or f"sqlite:///{folder / 'log.db'}"
        self._closing = ExitStack()
        self._written = 0  # records of `events`, the server's decisions included
        self._learnt = 0  # of these, in the weights that answer

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @property
    def cpu_s(self) -> float:
        """Of learner and server, from their start on."""
        return sum(cpu_s(pid) for pid in (self._learner.process.pid, self._server.process.pid))

    def start(self, storefront: Storefront, setup: Setup, seed: int) -> None:
        """See Loop."""
        self._chunk = setup.chunk
        self._log: Log = open_log(self._url)
        self._closing.callback(self._log.close)
        self._log.create_topic(EVENTS, 1)
        self._log.create_topic(CATALOG, 1, compacted=True)
        self._producer: Producer = self._log.producer()
        self._closing.callback(self._producer.close)
        codec = Codec()
        for item in storefront.catalog():
            self._producer.send(CATALOG, item["item_id"].encode(), codec.encode_item(item))
        self._producer.flush()
        self._learner = LearnerProcess(self._folder, self._url, *_learner_flags(storefront, setup))
        self._learner.start()
        self._closing.callback(self._learner.kill)
        (self._metrics_port,) = free_ports(1)
        flags = _server_flags(setup, seed, self._learner.weights, self._metrics_port)
        self._server = self._closing.enter_context(ServerProcess("--log", self._url, *flags))
        self._client = self._closing.enter_context(self._server.client(timeout_s=_PATIENCE_S))

    def publish(self, user_id: str, record: bytes) -> None:
        """See Loop."""
        self._producer.send(EVENTS, user_id.encode(), record)
        self._written += 1

    def recommend(self, request: pb.RecommendRequest) -> pb.RecommendResponse:
        """See Loop."""
        self._producer.flush()
        self._await_weights()
        response = self._client.recommend(request)
        if response.slate and not request.unlogged:
            self._written += 1
            self._until(lambda: self._log.bounds(EVENTS)[0].high >= self._written, "decision in the log")
        return response

    def _await_weights(self) -> None:
        """Wait until what was learnt from all whole chunks answers."""
        whole = self._written // self._chunk * self._chunk
        if whole > self._learnt:
            self._until(lambda: self._answers_by(whole), f"weights that saw {whole} records")
            self._learnt = whole
        if not self._client.policy().policy_version:  # popularity: what the server has seen itself
            self._until(lambda: self._viewed() >= self._written, "record in the server's view")

    def _answers_by(self, whole: int) -> bool:
        policy = self._client.policy()
        if policy.policy_version:
            return all(position.next_offset >= whole for position in policy.positions)
        checkpoint = self._learner.meta()  # before the first update there is nothing to serve
        at = checkpoint.get("positions", {}).get("0", 0)
        return int(at) >= whole and int(checkpoint["updates"]) == 0

    def _viewed(self) -> int:
        """Records of `events` that the server's own view holds."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics") as answer:
            found = re.search(
                rf'serving_view_records_total{{topic="{EVENTS}"}} (\S+)', answer.read().decode()
            )
        return 0 if found is None else int(float(found[1]))

    def _until(self, done: Callable[[], bool], what: str) -> None:
        """Raises: TimeoutError; ChildProcessError where a process has ended."""
        end = time.monotonic() + _PATIENCE_S
        while not done():
            if self._learner.process.poll() is not None:
                raise ChildProcessError(f"the learner has ended: {self._learner.said()}")
            if time.monotonic() > end:
                raise TimeoutError(f"no {what} after {_PATIENCE_S:g} s; the learner: {self._learner.said()}")
            time.sleep(_LOOK_S)


def _learner_flags(storefront: Storefront, setup: Setup) -> Iterator[str]:
    """What sets this learner apart from one by default."""
    yield from ("--deterministic", "--chunk", str(setup.chunk), "--horizon", storefront.horizon)
    yield from ("--publish-s", "0.05", "--checkpoint-s", "0.5", "--rewards", _told(storefront.rewards))
    for settings in (setup.agent, setup.learner):
        for field in fields(settings):
            value = getattr(settings, field.name)
            if value != field.default:
                yield from _flag(field.name, value)


def _server_flags(setup: Setup, seed: int, weights: Path, metrics_port: int) -> Iterator[str]:
    values = {
        "weights": weights,
        "epsilon": setup.epsilon,
        "exploration": setup.exploration.kind,
        "temperature": setup.exploration.temperature,
        "thompson_scale": setup.exploration.scale,
        "network": setup.network,
        "seed": seed,
        "weights_poll_s": 0.01,
        "history_length": setup.agent.entries,
        "metrics_port": metrics_port,
    }
    for name, value in values.items():
        yield from _flag(name, value)


def _flag(name: str, value: Any) -> tuple[str, ...]:
    """
    >>> _flag("min_replay", 200), _flag("prioritised", False)
    (('--min-replay', '200'), ('--no-prioritised',))
    """
    word = name.replace("_", "-")
    if isinstance(value, bool):
        return (f"--{word}" if value else f"--no-{word}",)
    return (f"--{word}", str(value))


def _told(rewards: RewardTable) -> str:
    """As `--rewards` reads it.

    >>> _told(RewardTable.parse("purchase=10+0.1*value"))
    'purchase=10.0+0.1*value'
    """
    return ",".join(f"{name}={r.weight}+{r.value_weight}*value" for name, r in rewards.rewards.items())
