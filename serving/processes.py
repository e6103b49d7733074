"""One server process, or several on one port with a parent that watches over them."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Final, NamedTuple

from learner.policy import use_threads
from serving.server import Instance, PolicyServer, ServingConfig, address_of, cannot_listen
from serving.view import ViewConfig
from streaming.commandline import codec_of, run
from streaming.heap import keep_giving_back
from streaming.log import open_log

logger = logging.getLogger(__name__)

_RESTART_PAUSE_S: Final = 1.0
_LOOK_S: Final = 0.2
_SWITCH_S: Final = 0.0005  # Python's own 5 ms would be a quarter of what an answer may take
_SPAWN: Final = multiprocessing.get_context("spawn")  # gRPC does not survive fork


class Launch(NamedTuple):
    """All that a server process is started from; travels to children."""

    config: ServingConfig
    view: ViewConfig
    log_url: str | None
    kafka: Mapping[str, str]
    registry: str | None  # URL
    registry_headers: str | None  # file
    schemas: str | None  # folder
    now_ms: Callable[[], int]  # wall clock
    name: Callable[[], str]  # gives names that no other server ever had


def run_one(launch: Launch, stop: threading.Event) -> int:
    """Serve in this process until `stop`, then drain; returns 0."""
    server = _server(launch, 0)
    port = server.start(stop=stop)
    if not stop.is_set():
        _announce(launch, port)
    stop.wait()
    _drain(server)
    return 0


def run_many(launch: Launch, stop: threading.Event) -> int:
    """Serve in `processes` children on one port until `stop`; one that dies is replaced. Returns 0 if all drained.

    The kernel spreads connections, not calls, over them: a client needs several connections to use them all.
    """
    with closing(_reserve(launch.config.host, launch.config.port)) as reserved:
        port = reserved.getsockname()[1]
        children = [_Child(launch, index, port) for index in range(launch.config.processes)]
        try:
            if all(child.wait_ready(stop) for child in children):
                _announce(launch, port)
                while not stop.wait(_LOOK_S):
                    for child in children:
                        child.look_after()
            elif not stop.is_set():
                return 1  # it has said why
        finally:
            for child in children:
                child.terminate()
            failed = [child.index for child in children if child.join() != 0]
    if failed:
        logger.error("processes %s did not drain cleanly", failed)
    return 1 if failed else 0


class _Child:
    """One of the processes; replaced when it dies."""

    def __init__(self, launch: Launch, index: int, port: int) -> None:
        self.index = index
        self._launch = launch
        self._port = port
        self._process, self._ready = self._start()

    def _start(self) -> tuple[SpawnProcess, Connection]:
        ready, tell = _SPAWN.Pipe(duplex=False)
        process = _SPAWN.Process(
            target=_serve_child,
            args=(self._launch, self.index, self._port, tell),
            name=f"serving-{self.index}",
        )
        process.start()
        tell.close()  # ours: so that the pipe ends when the child does
        self._told = False
        return process, ready

    def wait_ready(self, stop: threading.Event) -> bool:
        """True once it serves; False if it died before, or `stop` came."""
        while not stop.is_set():
            if wait([self._ready], timeout=_LOOK_S):
                return self._served()
        return False

    def look_after(self) -> None:
        """Start a new process in place of one that has died."""
        if self._process.is_alive():
            return
        logger.error("process %d died (exit code %s); starting another", self.index, self._process.exitcode)
        time.sleep(_RESTART_PAUSE_S)  # one that dies at once must not eat the machine
        self._ready.close()
        self._process, self._ready = self._start()

    def terminate(self) -> None:
        """Tell it to drain."""
        self._process.terminate()

    def join(self) -> int:
        """Its exit status, when it has ended by itself: how long a drain may take is its own affair."""
        self._process.join()
        code = self._process.exitcode
        if code == -signal.SIGTERM and not self._served():
            return 0  # told to end while it was still starting: nothing was lost
        return 1 if code is None else code

    def _served(self) -> bool:
        """Whether it ever said that it was ready."""
        if not self._told and self._ready.poll():
            with suppress(EOFError):
                self._ready.recv_bytes()
                self._told = True
        return self._told


def _serve_child(launch: Launch, index: int, port: int, tell: Connection) -> None:
    """A child's whole life."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s [{index}] %(name)s: %(message)s",
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=_stop_with_parent, args=(stop,), daemon=True).start()

    def serve() -> None:
        server = _server(launch, index)
        server.start(port, stop)
        tell.send_bytes(b"ready")
        stop.wait()
        _drain(server)

    sys.exit(run(serve))


def _stop_with_parent(stop: threading.Event) -> None:
    """A parent that was killed cannot tell its children to stop."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        stop.set()


def _server(launch: Launch, index: int) -> PolicyServer:
    use_threads(1)  # for the answer that warms it up; threads of calls and weights say so themselves
    sys.setswitchinterval(_SWITCH_S)
    keep_giving_back()
    log = None if launch.log_url is None else open_log(launch.log_url, launch.kafka)
    codec = codec_of(launch.registry, launch.registry_headers, launch.schemas)
    return PolicyServer(launch.config, launch.view, log, codec, Instance(launch.name(), index), launch.now_ms)


def _drain(server: PolicyServer) -> None:
    logger.info("draining: no new calls, open ones are finished, decisions are flushed")
    server.drain()
    logger.info("drained")


def _reserve(host: str, port: int) -> socket.socket:
    """A bound socket, not listening, that keeps the port ours while children come and go."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if port:  # SO_REUSEPORT would silently share it with somebody else's server: ask without it first
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        reserved = socket.socket(family, socket.SOCK_STREAM)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((host, port))
    except OSError as error:
        raise cannot_listen(host, port, error) from None
    return reserved


def _announce(launch: Launch, port: int) -> None:
    """The one line that says it is ready; scripts wait for it."""
    config = launch.config
    log = launch.log_url or "none: no decisions are written, histories must come with the requests"
    many = "es" if config.processes > 1 else ""
    print(
        f"serving on {address_of(config.host, port)} ({config.processes} process{many}), "
        f"weights {config.weights} [{config.label}, {config.network}], log {log}",
        flush=True,
    )
