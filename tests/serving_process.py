"""A real policy server in a process of its own, and weights for it; for tests and benchmarks."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import numpy as np
import torch

from learner.agent import Agent
from learner.agent_settings import AgentSettings
from learner.weights import Meta, WeightStore
from serving.client import Client
from streaming.interning import Vocabulary

ROOT = Path(__file__).parent.parent


class ServerProcess:
    """`python -m serving ...` on a free port, ready when entered, killed when left."""

    def __init__(self, *arguments: str, ready_s: float = 120.0) -> None:
        self._arguments = [sys.executable, "-m", "serving", "--port", "0", *arguments]
        self._ready_s = ready_s
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as this object)
        self.port = 0

    def __enter__(self) -> ServerProcess:
        self.process = subprocess.Popen(
            self._arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # its end, too, ends the wait
        found = re.match(r"serving on (?:[\d.]+|\[[\d:]+\]):(\d+)", line)
        if found is None:
            self.process.wait(self._ready_s)
            self.process.stdout.close()
            raise AssertionError(f"not ready: {line!r}, {self.stderr()}")
        self.port = int(found.group(1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._stderr.close()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self, **options: Any) -> Client:
        return Client(self.target, **options)

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.target)

    def stderr(self) -> str:
        """What it said so far."""
        self._stderr.seek(0)
        return self._stderr.read()

    def terminate(self, timeout_s: float = 30.0) -> int:
        """SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


VIEWS = ("state_mean", "state_scale", "item_mean", "item_scale")  # of QNetwork, that vectors are read by


def agent(items: int, seed: int = 0, **settings: Any) -> Agent:
    """An agent that knows vocabulary ids 1..items, with weights of which no two are alike."""
    made = Agent(AgentSettings(**settings), seed=seed)
    made.grow(items)
    made.online.response.own[1 : items + 1].normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return made


def publish(
    store: WeightStore,
    vocabulary: Sequence[str],
    seed: int = 0,
    made: Agent | None = None,
    label: str | None = "stable",
    **meta: Any,
) -> int:
    """Publish the weights of an agent (random ones by the seed) under `stable`; returns the version."""
    made = made or agent(len(vocabulary), seed)
    tensors = {name: tensor.numpy() for name, tensor in made.tensors().items()}
    rng = np.random.default_rng(seed)
    for name, tensor in tensors.items():
        if name.split(".")[1] in ("hint", *VIEWS):  # no part of Q, or not of any size
            continue
        if name.startswith(("online.", "target.")) and tensor.dtype == np.float32:
            tensors[name] = tensor + rng.normal(0, 0.1, tensor.shape).astype(np.float32)
    tensors["catalog.seen"][1:] = True  # else all items share the one vector of what is new
    meta = {"published_ms": int(time.time() * 1000), "settings": made.shape(), **meta}
    words = Vocabulary()
    words.intern_all(vocabulary)
    return store.publish(tensors, Meta(**meta), words, label).version


def eventually(check: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """The first true thing that `check` returns; fails when none comes in time."""
    end = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.02)
    return found
