"""`docker compose up`, for real: images are built, the loop runs, each service is killed, all goes down and up again.

Run by `make compose-test`; `make test` only says that it was not. Where no image registry is reached, stand-ins for the
images that others publish are made first (tests/compose/standins.sh). It takes the ports that a user's own stack takes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from serving import policy_pb2 as pb
from serving.client import CallError, Client
from streaming.log import LogError, open_log

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "bellwether.json"
PROJECT = "bellwether-test"  # its own volumes: a user's stack keeps its data
SERVICES = ["kafka", "learner", "serving", "simulator"]
OURS = SERVICES[1:]
METRICS = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9400/metrics').read().decode())"
BUILD_S, UP_S, RECOVERY_S = 3000.0, 600.0, 600.0

ENVIRONMENT = {
    **os.environ,
    "COMPOSE_PROFILES": "",
    "BELLWETHER_SIMULATOR_OPTIONS": "--rate 40",  # a test's machine has other things to do
}

if not os.environ.get("BELLWETHER_COMPOSE_TEST"):  # here, and not in a fixture: one line for all
    pytest.skip(
        "!!! DOCKER COMPOSE WAS NOT TESTED: `make compose-test` does, it builds images",
        allow_module_level=True,
    )

pytestmark = [pytest.mark.docker, pytest.mark.timeout(4000)]


class Stack:
    """The compose file as a project of its own."""

    def __init__(self) -> None:
        self.environment = dict(ENVIRONMENT)

    def __call__(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """What `docker compose ARGUMENTS` said; fails as it does, with its words."""
        files = ["docker-compose.yml", "tests/compose/override.yml"]
        command = ["docker", "compose", "-p", PROJECT, *(part for file in files for part in ("-f", file))]
        done = subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"docker compose {' '.join(arguments)}: {done.stdout[-3000:]}"
        return done.stdout

    def up(self, *arguments: str) -> None:
        """Start what does not run, and wait until it is healthy."""
        self("up", "--wait", "--wait-timeout", str(int(UP_S)), *arguments, timeout_s=UP_S + 60)

    def down(self) -> None:
        """Remove all of it, volumes too, whatever profile it is of."""
        self("--profile", "*", "down", "--volumes", "--remove-orphans", timeout_s=300)

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine knows of the service's container, running or not."""
        container = self("ps", "--all", "--quiet", service).strip()
        said = subprocess.run(["docker", "inspect", container], check=True, capture_output=True, text=True)
        found: list[dict[str, Any]] = json.loads(said.stdout)
        return found[0]

    def signal_all(self, service: str, name: str) -> None:
        """Send a signal to every process in the container except its first, the reaper."""
        container = self.inspect(service)["Id"]
        subprocess.run(
            ["docker", "exec", container, "bash", "-c", f"kill -{name} -1"], check=False, capture_output=True
        )

    def check(self, service: str) -> bool:
        """Whether the container's own health check passes now."""
        container = self.inspect(service)
        kind, *command = container["Config"]["Healthcheck"]["Test"]
        assert kind == "CMD"
        return not subprocess.run(
            ["docker", "exec", container["Id"], *command], capture_output=True
        ).returncode

    def look(self) -> Seen:
        """Where log and weights stand, as a client on this host sees it. Raises CallError, LogError."""
        with Client("localhost:50051") as client:
            policy = client.policy()
        with closing(open_log("kafka://localhost:9094")) as log:
            bounds = log.bounds("events")
        return Seen(
            low={p: bound.low for p, bound in bounds.items()},
            high={p: bound.high for p, bound in bounds.items()},
            positions={position.partition: position.next_offset for position in policy.positions},
            version=policy.policy_version,
            step=policy.step,
        )


class Seen(NamedTuple):
    """One look at the log and at the weights that are served."""

    low: dict[int, int]  # partition -> first offset of `events`
    high: dict[int, int]  # partition -> end of `events`
    positions: dict[int, int]  # partition -> offset up to which the weights in use have read
    version: int
    step: int  # gradient steps in them


@pytest.fixture(scope="module")
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The stack, up and healthy; gone at the end, with its volumes."""
    missing = engine_missing()
    if missing:
        pytest.skip(f"!!! DOCKER COMPOSE WAS NOT TESTED: {missing}")
    began = time.monotonic()
    subprocess.run([ROOT / "tests" / "compose" / "standins.sh"], check=True, timeout=BUILD_S)
    stack = Stack()
    stack.down()
    try:
        made = time.monotonic()
        stack("build", timeout_s=BUILD_S)
        built = time.monotonic()
        stack.up()
        up = time.monotonic()
        print(
            f"\nstand-ins {made - began:.0f} s, images {built - made:.0f} s, all healthy {up - built:.0f} s"
        )
        yield stack
    finally:
        if request.session.testsfailed or sys.exc_info()[0] is not None:
            print(stack("logs", "--no-color", "--tail", "40"))
        stack.down()


def engine_missing() -> str | None:
    """Why no stack can be brought up here; None if one can."""
    if shutil.which("docker") is None:
        return "no docker command"
    for command, what in (
        (["docker", "info"], "no Docker engine answers"),
        (["docker", "compose", "version"], "Docker has no Compose"),
    ):
        if subprocess.run(command, capture_output=True, timeout=60).returncode:
            return what
    return None


def eventually(check: Callable[[], Any], timeout_s: float = RECOVERY_S) -> Any:
    """The first true thing that `check` returns; while services start, it may raise as clients do."""
    end, trouble = time.monotonic() + timeout_s, ""
    while time.monotonic() < end:
        try:
            if found := check():
                return found
        except (CallError, LogError, OSError) as error:
            trouble = str(error)
        time.sleep(1.0)
    raise AssertionError(f"not within {timeout_s:.0f} s; {trouble or 'it stayed false'}")


def learnt_on(stack: Stack, before: Seen) -> Seen:
    """A look that finds newer weights, which have read all that was in the log before, and a log that has grown."""

    def has() -> Seen | None:
        now = stack.look()
        read = all(now.positions.get(p, -1) >= end for p, end in before.high.items())
        grown = sum(now.high.values()) > sum(before.high.values())
        return now if read and grown and now.version > before.version and now.step > before.step else None

    found: Seen = eventually(has)
    return found


def recovers(stack: Stack, before: Seen) -> None:
    """All goes on after a death: the log holds what it held, and the learner has gone on from its checkpoint."""
    now = learnt_on(stack, before)
    later = learnt_on(stack, now)  # `before` may have been a second older than the death
    assert later.low == before.low
    assert all(later.high[p] >= end for p, end in before.high.items())
    assert stack("logs", "learner").count("no checkpoint") == 1  # at the very first start


def trained(stack: Stack) -> Seen:
    """A look at a stack whose weights have seen gradient steps."""
    found: Seen = eventually(lambda: (now := stack.look()).step > 0 and now)
    return found


def test_the_host_gets_recommendations_that_were_learnt(stack: Stack) -> None:
    trained(stack)
    with Client("localhost:50051") as client:
        client.wait(10)
        answer = client.recommend(pb.RecommendRequest(user_id="from-the-host", slate_size=5))
    assert answer.strategy == pb.LEARNED
    assert len({slot.item_id for slot in answer.slate}) == 5
    assert all(0 < slot.propensity <= 1 for slot in answer.slate)


def test_weights_follow_the_events(stack: Stack) -> None:
    before = trained(stack)
    assert learnt_on(stack, before).low == before.low


@pytest.mark.parametrize("service", OURS)
def test_our_containers_run_as_an_ordinary_user(stack: Stack, service: str) -> None:
    assert stack("exec", "-T", service, "id", "-u").strip() == "10001"
    denied = stack("exec", "-T", service, "sh", "-c", "touch /opt/bellwether/x 2>&1 || true")
    assert "denied" in denied
    assert "CapEff:\t0000000000000000" in stack("exec", "-T", service, "cat", "/proc/self/status")


def test_what_numba_compiles_is_kept_for_the_next_start(stack: Stack) -> None:
    stack("exec", "-T", "learner", "sh", "-c", "ls /var/lib/bellwether/numba/*/*.nbc")


@pytest.mark.parametrize("service", ["kafka", "learner", "serving"])
def test_a_health_check_fails_while_the_service_hangs(stack: Stack, service: str) -> None:
    assert stack.check(service)
    stack.signal_all(service, "STOP")
    try:
        assert not stack.check(service)
    finally:
        stack.signal_all(service, "CONT")
    eventually(lambda: stack.check(service))


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_that_dies_comes_back_by_itself(stack: Stack, service: str) -> None:
    before = trained(stack)
    restarts = stack.inspect(service)["RestartCount"]
    stack.signal_all(service, "KILL")
    eventually(lambda: stack.inspect(service)["RestartCount"] > restarts)
    recovers(stack, before)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_killed_by_an_operator_stays_away_until_up_brings_it_back(
    stack: Stack, service: str
) -> None:
    before = trained(stack)
    stack("kill", service)
    time.sleep(5)  # longer than the engine's pause before a restart
    assert not stack.inspect(service)["State"]["Running"]
    if service != "serving":  # which needs none of the others to answer
        with Client("localhost:50051") as client:
            assert client.recommend(pb.RecommendRequest(user_id="patient", unlogged=True)).slate
    stack.up()
    recovers(stack, before)


def test_down_and_up_again_lose_nothing(stack: Stack) -> None:
    before = trained(stack)
    stack("stop", timeout_s=300)
    codes = {service: stack.inspect(service)["State"]["ExitCode"] for service in OURS}
    assert codes == dict.fromkeys(OURS, 0)  # checkpointed, drained, flushed
    stack("down", timeout_s=300)
    stack.up()
    after = eventually(stack.look)
    assert after.low == before.low
    assert all(after.high[p] >= end for p, end in before.high.items())
    assert after.version >= before.version
    assert after.step >= before.step
    assert all(after.positions[p] >= offset for p, offset in before.positions.items())
    learnt_on(stack, after)
    assert "no checkpoint" not in stack("logs", "learner")


def test_after_all_that_no_decision_was_lost_or_counted_twice(stack: Stack) -> None:
    trained(stack)
    data = "/var/lib/bellwether"
    where = ["--data-dir", f"{data}/learner", "--weights", f"{data}/weights", "--log", "kafka://kafka:9092"]
    stack("exec", "-T", "learner", "learner", "audit", *where, timeout_s=600)  # it exits 1 if it finds one


def test_prometheus_finds_all_that_the_dashboard_shows(stack: Stack) -> None:
    stack("--profile", "observability", "up", "--detach", "--wait", "prometheus", timeout_s=300)
    eventually(lambda: {s["metric"]["job"] for s in asked("up == 1")} == {"learner", "serving"})
    panels = json.loads(DASHBOARD.read_text())["panels"]
    for expression in (target["expr"] for panel in panels for target in panel["targets"]):
        asked(expression)  # refused if it is wrong
    eventually(lambda: asked("serving_policy_version > 0 and on () learner_policy_version > 0"))
    eventually(lambda: asked("bellwether:learner_loss"))  # the rules are loaded


def asked(expression: str) -> Sequence[dict[str, Any]]:
    """Prometheus' answer to a query. Raises OSError when it refuses."""
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"http://localhost:9090/api/v1/query?{query}", timeout=10) as answer:
        result: Sequence[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result


def test_a_registry_may_join_later(stack: Stack) -> None:
    before = trained(stack)
    registry = "/apis/ccompat/v7"
    stack.environment |= {
        "COMPOSE_PROFILES": "registry",
        "BELLWETHER_LOG_OPTIONS": f"--registry http://registry:8080{registry}",
    }
    stack.up()
    learnt_on(stack, learnt_on(stack, before))  # the first may have been published before the change
    with urllib.request.urlopen(f"http://localhost:8081{registry}/subjects", timeout=10) as answer:
        subjects = json.load(answer)
    assert {name.rpartition(".")[2] for name in subjects} >= {"Event", "Decision", "Item"}
    assert "no checkpoint" not in stack("logs", "learner")
    bad = stack("exec", "-T", "serving", "python", "-c", METRICS)
    assert not re.search(
        r"serving_view_bad_records_total.* [1-9]", bad
    )  # it reads both framings from the start
