"""A real Kafka broker of one's own for tests and benchmarks: Maven's jars, KRaft, one node, no Docker.

with KafkaBroker() as broker:
    log = open_log(broker.url)
    broker.kill9(); broker.start()  # all that was acknowledged is still there
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
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBS = ROOT / ".kafka" / "libs"
POM = Path(__file__).parent / "kafka" / "pom.xml"

_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
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


class KafkaBroker:
    """One broker on free ports of 127.0.0.1 while its `with` block lasts; its data go when it ends.

    options: more lines for server.properties.
    """

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        self._classpath = jars()
        self._options = dict(options or {})
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> KafkaBroker:
        self.directory = Path(tempfile.mkdtemp(prefix="kafka-"))
        self.port, controller = _free_ports(2)
        self.bootstrap = f"127.0.0.1:{self.port}"
        self.url = f"kafka://{self.bootstrap}"
        self._log = self.directory / "server.log"
        text = _PROPERTIES.format(port=self.port, controller=controller, data=self.directory / "data")
        text += "".join(f"{key}={value}\n" for key, value in self._options.items())
        (self.directory / "server.properties").write_text(text)
        atexit.register(self._end)
        try:
            self._format()
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        atexit.unregister(self._end)
        self._end()

    def start(self, timeout_s: float = 60.0) -> None:
        """Start, on the data and ports of before, and wait until clients are served."""
        assert self._process is None, "it is running"
        self._log.write_bytes(b"")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._java("-Xmx512m", "kafka.Kafka"), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
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
        cluster = base64.urlsafe_b64encode(b"\x01" + os.urandom(15)).decode().rstrip("=")
        tool = self._java("-XX:TieredStopAtLevel=1", "kafka.tools.StorageTool", "format", "--standalone")
        done = subprocess.run([*tool[:-1], "-t", cluster, "-c", tool[-1]], capture_output=True, text=True)
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


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
