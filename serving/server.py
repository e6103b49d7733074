"""The server process: builds the parts, opens the port, drains on SIGTERM. Several processes may share one port."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import grpc
import numpy as np
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from learner.compiled import compile_q
from learner.exploration import EPSILON, Exploration, Kind, compile_exploration
from learner.policy import use_threads
from learner.weights import store_url
from serving import metrics
from serving.decisions import DecisionWriter
from serving.ranking import Ranker
from serving.requests import MAX_MESSAGE_BYTES
from serving.service import SERVICE, Service, Streams
from serving.view import Follower, View, ViewConfig, compile_view
from serving.weights import WeightsFollower
from streaming.interning import compile_vocabulary
from streaming.log import Log, LogError
from streaming.schemas import Codec

logger = logging.getLogger(__name__)

_WAITING: Final = 16  # calls for each thread: who would wait longer than that had better hear of it at once
_LEAVE_S: Final = 5.0  # longest wait for a thread that only reads
_HEALTH_SERVICES: Final = ("", SERVICE)


@dataclass(frozen=True)
class ServingConfig:
    """The policy server."""

    weights: str = field(
        metadata={
            "help": "weight store to follow: a directory, or any fsspec URL (s3://...)",
            "metavar": "URL",
            "parse": store_url,
        }
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 (or ::, IPv6 too): all"}
    )
    port: int = field(default=50051, metadata={"help": "port to listen on; 0..65535 (0: any free one)"})
    label: str = field(
        default="stable", metadata={"help": "which label of the store to follow: stable, canary"}
    )
    network: Literal["online", "target"] = field(
        default="target",
        metadata={"help": "which of the two networks answers: online, the newest; target, its steadier mean"},
    )
    epsilon: float = field(
        default=EPSILON, metadata={"help": "share of slots drawn uniformly, unless a request says; 0..1"}
    )
    exploration: Kind = field(
        default="greedy",
        metadata={
            "help": "what fills the other slots: greedy, the best (epsilon-greedy); boltzmann, by chance, the likelier "
            "the higher Q; thompson, the best by one draw from what is believed of each item"
        },
    )
    temperature: float = field(
        default=Exploration.temperature,
        metadata={
            "help": "of boltzmann, in units of how far the best item's Q is above the mean: so far below the best, an "
            "item is e times less likely; 0.000001..1000000"
        },
    )
    thompson_scale: float = field(
        default=Exploration.scale,
        metadata={"help": "of thompson: share of the standard deviation that is drawn; 0.000001..1000000"},
    )
    slate_size: int = field(default=10, metadata={"help": "items in a slate, unless a request says; 1..1000"})
    processes: int = field(
        default=1, metadata={"help": "server processes that share the port; 1..256, each with its own view"}
    )
    threads: int = field(default=32, metadata={"help": "calls worked on at once, per process; 1..1000"})
    max_calls: int | None = field(
        default=None,
        metadata={
            "help": "calls open at once, per process, with streams and those that wait for a thread; more are turned "
            "away with RESOURCE_EXHAUSTED; threads..1000000",
            "shown": f"{_WAITING} times threads",
        },
    )
    max_streams: int | None = field(
        default=None,
        metadata={
            "help": "streams open at once, per process, those of reflection too; each takes a thread: < threads",
            "shown": "half of threads",
        },
    )
    weights_poll_s: float = field(
        default=0.1, metadata={"help": "how often to look for new weights; seconds, 0.01..60"}
    )
    metrics_port: int = field(
        default=0,
        metadata={"help": "Prometheus port; 0: none, 1..65535; process i of several takes the i-th after it"},
    )
    drain_s: float = field(
        default=10.0,
        metadata={"help": "longest wait for open calls, then for decisions to be durable; seconds, 0..600"},
    )
    spool_mib: float = field(
        default=64.0,
        metadata={
            "help": "decisions that wait while the log takes none, beside the client's own queue; MiB, 0.001..65536"
        },
    )
    seed: int | None = field(
        default=None, metadata={"help": "of the exploration; 0 and up, none: a new one at each start"}
    )

    def __post_init__(self) -> None:
        bounds = {
            "port": (0, 65535),
            "epsilon": (0, 1),
            "temperature": (1e-6, 1e6),
            "thompson_scale": (1e-6, 1e6),
            "slate_size": (1, 1000),
            "processes": (1, 256),
            "threads": (1, 1000),
            "max_calls": (self.threads, 1_000_000),
            "max_streams": (0, self.threads - 1),
            "weights_poll_s": (0.01, 60),
            "metrics_port": (0, 65536 - self.processes),
            "drain_s": (0, 600),
            "spool_mib": (0.001, 65536),
            "seed": (0, 2**63),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be within {low}..{high}, not {value}")

    @property
    def streams(self) -> int:
        """How many may be open at once: each keeps a thread, and some must be left for other calls."""
        return self.threads // 2 if self.max_streams is None else self.max_streams


@dataclass(frozen=True)
class Instance:
    """What sets one server process apart from all others."""

    name: str  # in every recommendation_id
    index: int = 0  # among the processes that share the port


class PolicyServer:
    """One process's server: `start`, then `drain`."""

    def __init__(
        self,
        config: ServingConfig,
        view_config: ViewConfig,
        log: Log | None,
        codec: Codec,
        instance: Instance,
        now_ms: Callable[[], int],
    ) -> None:
        """log: None: no view of the users, no decisions. now_ms: wall clock, for requests that bring no time."""
        self._config = config
        self._view_config = view_config
        self._log = log
        self._codec = codec
        self._instance = instance
        self._view = View(view_config, codec)
        self._follower = None if log is None else Follower(log, self._view, view_config, time.monotonic)
        remembered = None if log is None else view_config.history_length
        self._weights = WeightsFollower(
            config.weights, config.label, config.network, config.weights_poll_s, remembered
        )
        self._decisions = None if log is None else self._writer(log)
        seed = None if config.seed is None else [config.seed, instance.index]
        self._service = Service(
            view=self._view,
            weights=self._weights,
            ranker=Ranker(self._weights, self._view, np.random.default_rng(seed)),
            decisions=self._decisions,
            epsilon=config.epsilon,
            exploration=Exploration(config.exploration, config.temperature, config.thompson_scale),
            slate_size=config.slate_size,
            max_streams=config.streams,
            instance=instance.name,
            now_ms=now_ms,
        )
        self._health = health.HealthServicer(
            experimental_non_blocking=True, experimental_thread_pool=ThreadPoolExecutor(1)
        )
        self._server = self._build()

    def start(self, port: int | None = None, stop: threading.Event | None = None) -> int:
        """Catch up with log and weights, then open the port; returns it. port: None: the configured one; stop: that the
        log is read to its end is not waited for any longer.

        Raises: OSError when the port cannot be opened.
        """
        if self._config.metrics_port:
            metrics.expose(self._config.metrics_port + self._instance.index, self._config.host)
        compile_q()
        compile_exploration()
        compile_vocabulary()
        self._weights.start()
        if self._log is not None:
            compile_view(self._view_config)
            self._register()
        warm_up_s, stop = self._view_config.warm_up_s, stop or threading.Event()
        if self._follower is not None and not self._follower.start(warm_up_s, stop) and not stop.is_set():
            logger.warning(
                "the log was not read to its end within %g s; histories and popularity are behind",
                warm_up_s,
            )
        self._service.warm_up()
        port = listen(self._server, self._config.host, self._config.port if port is None else port)
        self._server.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return port

    def drain(self) -> None:
        """Turn away new calls, finish the open ones, make every decision durable. Raises LogError if one was lost
        or dropped meanwhile."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._decisions is not None:
            self._decisions.begin_drain()
        self._service.draining = True
        self._server.stop(self._config.drain_s).wait()
        try:
            if self._decisions is not None:
                self._decisions.close(max(self._config.drain_s, 1.0))
        finally:  # these may hang in a store or a log that does not answer: they can be left behind
            self._weights.stop(_LEAVE_S)
            if self._follower is not None:
                self._follower.stop(_LEAVE_S)
            if self._log is not None:
                self._log.close()

    def _register(self) -> None:
        """Ask the schema registry, where there is one, now: what is wrong with it is said at the start."""
        try:
            self._codec.register()
        except LogError as error:
            logger.warning("%s; decisions wait until that is mended", error)

    def _writer(self, log: Log) -> DecisionWriter:
        spool_bytes = int(self._config.spool_mib * (1 << 20))
        topic = self._view_config.topic
        return DecisionWriter(log.producer(), self._codec, topic, time.monotonic, spool_bytes)

    def _build(self) -> grpc.Server:
        server = grpc.server(
            _call_threads(self._config.threads),
            maximum_concurrent_rpcs=self._config.max_calls or _WAITING * self._config.threads,
            options=[
                ("grpc.so_reuseport", int(self._config.processes > 1)),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ],
        )
        server.add_generic_rpc_handlers((self._service.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        answering = Reflection(names, self._service.streams)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(answering, server)
        return server

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in _HEALTH_SERVICES:
            self._health.set(name, status)


def _call_threads(count: int) -> ThreadPoolExecutor:
    """Threads for calls, all of them there from the start: what a server takes is not to depend on how busy it once
    was. A product of theirs uses one CPU thread: a second would only get in the way of another call."""
    pool = ThreadPoolExecutor(count, "call", initializer=use_threads, initargs=(1,))
    all_there = threading.Barrier(count)
    for _ in range(count):
        pool.submit(all_there.wait)
    return pool


def listen(server: grpc.Server, host: str, port: int) -> int:
    """Open the port; returns it. Raises: OSError that says why it cannot be."""
    try:
        return int(server.add_insecure_port(address_of(host, port)))
    except RuntimeError as error:
        raise _why_not(host, port) or OSError(str(error)) from None


def _why_not(host: str, port: int) -> OSError | None:
    """What keeps us from listening there, which gRPC does not say; None: nothing any more."""
    try:
        for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
    except OSError as error:
        return cannot_listen(host, port, error)
    return None


def cannot_listen(host: str, port: int, error: OSError) -> OSError:
    """The error with where it was, and which flag to change."""
    flag = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
    return OSError(f"cannot listen on {address_of(host, port)}: {error.strerror}; choose another {flag}")


def address_of(host: str, port: int) -> str:
    """Host and port as one.

    >>> address_of("127.0.0.1", 50051), address_of("::1", 50051)
    ('127.0.0.1:50051', '[::1]:50051')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Reflection(reflection.ReflectionServicer):  # type: ignore[misc]
    """What the server offers, for clients that were not told; its streams count as any."""

    def __init__(self, names: Sequence[str], streams: Streams) -> None:
        super().__init__(names, pool=Symbols())
        self._streams = streams

    def ServerReflectionInfo(  # noqa: N802 (gRPC's own name)
        self, requests: Iterator[Any], context: grpc.ServicerContext
    ) -> Iterator[Any]:
        """One answer for each question, over one stream."""
        with self._streams.one("ServerReflectionInfo", context):
            yield from super().ServerReflectionInfo(requests, context)


class Symbols:
    """The descriptor pool, which also finds a method by its full name, as ghz asks for it."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def FindFileContainingSymbol(self, symbol: str) -> Any:  # noqa: N802 (the pool's own name)
        """Of a message, field, enum, service or method. Raises: KeyError."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service = self._pool.FindServiceByName(symbol.rpartition(".")[0])
            return service.methods_by_name[symbol.rpartition(".")[2]].containing_service.file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)
