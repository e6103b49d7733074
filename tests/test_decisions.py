"""The log never holds up an answer, and no decision vanishes uncounted."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from serving import metrics
from serving.decisions import DecisionWriter, Encoded
from streaming.log import LogError, LogFull, LogUnavailable
from streaming.schemas import DECISION, Codec, Registry
from tests.registry import FakeRegistry
from tests.serving_process import eventually


class Scripted:
    """A producer at which `send` waits for the gate, finds it full so many times, or meets an error."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []  # raised by the next sends, last first
        self.sent: list[bytes] = []
        self.values: list[bytes | None] = []
        self.failed = 0
        self.tries = 0

    def send(self, topic: str, key: bytes, value: bytes | None, timestamp_ms: int | None = None) -> None:
        self.tries += 1
        self.gate.wait(30)
        if self.errors:
            raise self.errors.pop()
        self.sent.append(key)
        self.values.append(value)

    def flush(self, timeout_s: float = 30.0) -> int:
        return 0

    def close(self, timeout_s: float = 30.0) -> None:
        pass


@pytest.fixture
def producer() -> Scripted:
    return Scripted()


@pytest.fixture
def writer(producer: Scripted) -> Iterator[DecisionWriter]:
    writer = DecisionWriter(producer, Codec(), "events", time.monotonic, 5 * SIZE)
    yield writer
    producer.gate.set()
    writer.begin_drain()
    writer.close(10.0)


def decision(user: int) -> dict[str, object]:
    slot = {"item_id": "i", "propensity": 1.0}
    return {
        "recommendation_id": f"r{user}",
        "user_id": f"u{user}",
        "timestamp": 1_700_000_000_000,
        "slate": [slot],
    }


def record(user: int) -> Encoded:
    return Encoded(b"u%d" % user, Codec().body(DECISION, decision(user)))


SIZE = len(Codec().body(DECISION, decision(10)))


def count(fate: str) -> float:
    return metrics.DECISIONS.labels(fate)._value.get()


def test_an_answer_does_not_wait_for_a_log_that_cannot_be_reached(producer, writer):
    producer.gate.clear()
    began = time.monotonic()
    assert all(writer.write(record(user)) for user in range(3))
    assert time.monotonic() - began < 1
    producer.gate.set()
    eventually(lambda: producer.sent == [b"u0", b"u1", b"u2"])


def test_what_the_log_cannot_take_now_is_tried_again_in_order(producer, writer):
    producer.errors = [LogFull("full"), LogUnavailable("away")]
    for user in range(3):
        writer.write(record(user))
    eventually(lambda: producer.sent == [b"u0", b"u1", b"u2"])


def test_what_finds_no_room_is_dropped_and_counted(producer, writer, caplog):
    producer.gate.clear()
    before = count("dropped")
    taken = [writer.write(record(user)) for user in range(10, 30)]
    assert count("dropped") - before == taken.count(False) == 15
    assert "1 decisions dropped, nothing will be learnt" in caplog.text  # and no line for each of the rest
    producer.gate.set()
    eventually(lambda: len(producer.sent) == taken.count(True))


def test_what_the_log_refuses_later_is_counted_as_lost(producer, writer):
    before = count("lost")
    producer.errors = [LogError("too large")]
    writer.write(record(0))
    producer.failed = 2
    eventually(lambda: count("lost") - before == 3)


def test_a_fault_of_the_client_costs_one_decision_and_is_told_with_where_it_came_from(
    producer, writer, caplog
):
    before = count("lost")
    producer.errors = [RuntimeError("a bug")]
    for user in range(2):
        writer.write(record(user))
    eventually(lambda: producer.sent == [b"u1"])
    assert count("lost") - before == 1
    assert "RuntimeError: a bug" in caplog.text


@pytest.fixture
def writer_by(producer: Scripted) -> Iterator[Callable[[Codec], DecisionWriter]]:
    """Makes a writer with this codec."""
    made: list[DecisionWriter] = []

    def make(codec: Codec) -> DecisionWriter:
        made.append(DecisionWriter(producer, codec, "events", time.monotonic, 5 * SIZE))
        return made[0]

    yield make
    with contextlib.suppress(LogError):
        made[0].close(0.1)


def test_an_answer_does_not_wait_for_a_registry_that_is_silent(writer_by):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call, and says nothing
        writer = writer_by(Codec(f"http://127.0.0.1:{silent.getsockname()[1]}"))
        writer.write(record(0))
        time.sleep(0.2)  # the registry is being asked now
        began = time.monotonic()
        assert writer.write(record(1))
        assert time.monotonic() - began < 0.1


def test_decisions_wait_for_a_registry_that_fails_and_carry_its_id(producer, writer_by, caplog):
    with FakeRegistry() as registry:
        registry.failures = [503] * 3
        codec = Codec(registry=Registry(registry.url, attempts=1, backoff_s=0.01))
        writer = writer_by(codec)
        for user in range(2):
            assert writer.write(record(user))
        eventually(lambda: producer.sent == [b"u0", b"u1"])
        assert [codec.decode(value)[1]["user_id"] for value in producer.values] == ["u0", "u1"]
        assert producer.values[0].startswith(b"\x00")
    assert (
        caplog.text.count(f"decisions wait: schema registry cannot be asked: {registry.url}: HTTP 503") == 1
    )


def test_a_registry_that_refuses_is_asked_no_oftener_than_one_that_is_down(producer, writer_by):
    with FakeRegistry() as registry:
        registry.refuse = "incompatible"
        writer = writer_by(Codec(registry.url))
        for user in range(3):
            assert writer.write(record(user))
        time.sleep(0.5)
        assert len(registry.requests) == 3  # look up, compatibility, register
        with pytest.raises(LogError, match="3 decisions were not written"):
            writer.close(0.5)
    assert producer.sent == []


def test_what_is_not_away_when_the_server_must_end_is_an_error(producer):
    writer = DecisionWriter(producer, Codec(), "events", time.monotonic, 5 * SIZE)
    producer.gate.clear()
    writer.write(record(0))
    with pytest.raises(LogError, match="1 decisions were not written"):
        writer.close(0.2)
    producer.gate.set()


def test_a_producer_that_stays_full_while_the_server_ends_is_not_asked_without_a_pause(producer):
    writer = DecisionWriter(producer, Codec(), "events", time.monotonic, 5 * SIZE)
    producer.errors = [LogFull("full")] * 1_000_000
    writer.write(record(0))
    with pytest.raises(LogError, match="1 decisions were not written within 1 s"):
        writer.close(1.0)
    assert 2 <= producer.tries <= 8
    tries = producer.tries
    time.sleep(0.5)
    assert producer.tries == tries  # and no more once it has ended


def test_what_is_refused_while_the_server_ends_is_an_error_and_what_was_before_is_not(producer):
    writer = DecisionWriter(producer, Codec(), "events", time.monotonic, 5 * SIZE)
    producer.errors, before = [LogError("too large")], count("lost")
    writer.write(record(0))
    eventually(lambda: count("lost") == before + 1)
    writer.begin_drain()
    producer.errors = [LogError("too large")]
    writer.write(record(1))
    with pytest.raises(LogError, match=r"^1 decisions were dropped or lost while all was to end$"):
        writer.close(10.0)
