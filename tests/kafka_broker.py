"""A real Kafka of one's own for tests and benchmarks: Maven's jars, KRaft, one node or three, no Docker.

with KafkaBroker() as broker:
    log = open_log(broker.url)
    broker.kill9(); broker.start()  # all that was acknowledged is still there

with KafkaCluster() as cluster:
    leader = cluster.leader(topic, 0)
    leader.kill9()  # the other two go on
"""

from __future__ import annotations

import atexit
import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from confluent_kafka.admin import AdminClient  # type: ignore[attr-defined]

ROOT = Path(__file__).resolve().parents[1]
LIBS = ROOT / ".kafka" / "libs"
POM = Path(__file__).parent / "kafka" / "pom.xml"

_PROPERTIES = """\
process.roles=broker,controller
node.id={node}
controller.quorum.bootstrap.servers={quorum}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
log.initial.task.delay.ms=500
log.retention.check.interval.ms=500
"""
_PROXIED = """\
listeners=PLAINTEXT://127.0.0.1:{port},PROXIED://127.0.0.1:{upstream},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},PROXIED://127.0.0.1:{proxy}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT
"""
_REPLICATED = {
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "share.coordinator.state.topic.replication.factor": "3",
    "share.coordinator.state.topic.min.isr": "2",
}


class BrokerMissing(Exception):
    """No Kafka can be run here; the message says what is missing."""


def java_home() -> Path:
    """Folder of the java command. Raises: BrokerMissing without Java 17 or newer."""
    java = shutil.which("java")
    if java is None:
        raise BrokerMissing("no java command; install a JRE, 17 or newer")
    said = subprocess.run([java, "-version"], capture_output=True, text=True).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < 17:
        raise BrokerMissing(f"Kafka needs Java 17 or newer, found {said.splitlines()[:1]}")
    return Path(java).parent


def jars() -> str:
    """The broker's class path; its jars are fetched by Maven the first time.

    Raises: BrokerMissing when Java or Maven is missing, or Maven cannot fetch them.
    """
    java_home()
    if not list(LIBS.glob("kafka_2.13-*.jar")):
        if shutil.which("mvn") is None:
            raise BrokerMissing("no mvn command to fetch Kafka's jars with; install Maven")
        part = LIBS.with_name(f"libs-{os.getpid()}")
        command = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies"]
        made = subprocess.run(
            [*command, "-DincludeScope=runtime", f"-DoutputDirectory={part}"], capture_output=True, text=True
        )
        if made.returncode:
            shutil.rmtree(part, ignore_errors=True)
            raise BrokerMissing(f"Maven cannot fetch Kafka's jars: {made.stdout.strip()[:500]}")
        if not LIBS.exists():  # complete or not there at all, whoever else is fetching
            part.rename(LIBS)
    return f"{LIBS}/*"


class Seat(NamedTuple):
    """A node's place among those that form a cluster together."""

    node: int  # its id
    port: int  # for clients
    controller: int  # port for the other nodes
    identity: str  # of its directory

    @property
    def voter(self) -> str:
        """As `--initial-controllers` wants it."""
        return f"{self.node}@127.0.0.1:{self.controller}:{self.identity}"


class KafkaBroker:
    """One broker on free ports of 127.0.0.1 while its `with` block lasts; its data go when it ends.

    options: more lines for server.properties. proxy: a port behind which clients think that the broker is; whoever
    listens there is to pass on to `upstream`. seats: of all nodes, this one's first; None: it is alone.
    """

    def __init__(
        self,
        options: Mapping[str, str] | None = None,
        *,
        proxy: int | None = None,
        seats: Sequence[Seat] = (),
        cluster: str | None = None,
    ) -> None:
        self._classpath = jars()
        self._options = dict(options or {})
        self._proxy = proxy
        self._seats = list(seats) or [Seat(1, *free_ports(2), _identity())]
        self._cluster = cluster or _identity()
        self._process: subprocess.Popen[bytes] | None = None
        self.port = self._seats[0].port
        self.bootstrap = f"127.0.0.1:{self.port}"
        self.url = f"kafka://{self.bootstrap}"
        self.upstream = ""

    def __enter__(self) -> KafkaBroker:
        self.prepare()
        try:
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        atexit.unregister(self._end)
        self._end()

    @property
    def node(self) -> int:
        """Its id."""
        return self._seats[0].node

    @property
    def running(self) -> bool:
        """It was started, and nobody has ended it."""
        return self._process is not None

    def prepare(self) -> None:
        """Make its directory, not start it yet."""
        self.directory = Path(tempfile.mkdtemp(prefix="kafka-"))
        self._log = self.directory / "server.log"
        mine = self._seats[0]
        quorum = ",".join(f"127.0.0.1:{seat.controller}" for seat in self._seats)
        ports = {"port": mine.port, "controller": mine.controller}
        text = _PROPERTIES.format(node=mine.node, quorum=quorum, data=self.directory / "data", **ports)
        if self._proxy is not None:
            (inner,) = free_ports(1)
            self.upstream = f"127.0.0.1:{inner}"
            text += _PROXIED.format(upstream=inner, proxy=self._proxy, **ports)
        text += "".join(f"{key}={value}\n" for key, value in self._options.items())
        (self.directory / "server.properties").write_text(text)
        atexit.register(self._end)
        self._format()

    def start(self, timeout_s: float = 60.0) -> None:
        """Start, on the data and ports of before, and wait until clients are served."""
        self.launch()
        self.await_started(timeout_s)

    def launch(self) -> None:
        """Start, on the data and ports of before."""
        assert self._process is None, "it is running"
        self._log.write_bytes(b"")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._java("-Xmx512m", "kafka.Kafka"), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def await_started(self, timeout_s: float = 60.0) -> None:
        """Wait until clients are served."""
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        while b"Kafka Server started" not in self._log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the broker did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Shut down as an operator would (SIGTERM), and wait for it."""
        self._signal(signal.SIGTERM)

    def kill9(self) -> None:
        """Die at once."""
        self._signal(signal.SIGKILL)

    def restart(self) -> None:
        """`stop`, then `start`."""
        self.stop()
        self.start()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "it is not running"
        self._process.send_signal(number)
        self._process.wait(60)
        self._process = None

    def _format(self) -> None:
        voters = ",".join(seat.voter for seat in self._seats)
        tool = self._java("-XX:TieredStopAtLevel=1", "kafka.tools.StorageTool", "format")
        whose = ["--initial-controllers", voters] if len(self._seats) > 1 else ["--standalone"]
        done = subprocess.run(
            [*tool[:-1], *whose, "-t", self._cluster, "-c", tool[-1]], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"cannot format the broker's storage: {done.stderr}")

    def _java(self, option: str, *command: str) -> list[str]:
        level = "-Dorg.slf4j.simpleLogger.defaultLogLevel=info"
        return [
            "java",
            option,
            level,
            "-cp",
            self._classpath,
            *command,
            str(self.directory / "server.properties"),
        ]

    def _end(self) -> None:
        if self._process is not None:
            self.kill9()
        shutil.rmtree(self.directory, ignore_errors=True)


class KafkaCluster:
    """Three brokers, every topic on all of them; what is acknowledged is on two at least."""

    NODES = 3

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        ports = free_ports(2 * self.NODES)
        seats = [Seat(n + 1, ports[2 * n], ports[2 * n + 1], _identity()) for n in range(self.NODES)]
        together, settings = _identity(), {**_REPLICATED, **(options or {})}
        self.nodes = [
            KafkaBroker(settings, seats=[seat, *(s for s in seats if s != seat)], cluster=together)
            for seat in seats
        ]
        self.bootstrap = ",".join(node.bootstrap for node in self.nodes)
        self.url = f"kafka://{self.bootstrap}"

    def __enter__(self) -> KafkaCluster:
        with ExitStack() as stack:
            for node in self.nodes:
                node.prepare()
                stack.push(node)
                node.launch()
            for node in self.nodes:
                node.await_started()
            self._admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": "0"})
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def leader(self, topic: str, partition: int) -> KafkaBroker:
        """The node that leads a partition now."""
        leader = self._admin.list_topics(topic, timeout=30).topics[topic].partitions[partition].leader
        return next(node for node in self.nodes if node.node == leader)

    def in_sync(self, topic: str) -> bool:
        """Whether every node has all of the topic."""
        partitions = self._admin.list_topics(topic, timeout=30).topics[topic].partitions.values()
        return all(len(partition.isrs) == self.NODES for partition in partitions)


def _identity() -> str:
    # a leading 0x01: one that begins with '-' would be taken for an option
    return base64.urlsafe_b64encode(b"\x01" + os.urandom(15)).decode().rstrip("=")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
