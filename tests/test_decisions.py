"""The log never holds up an answer, and no decision vanishes uncounted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from serving import metrics
from serving.decisions import DecisionWriter
from streaming.log import LogError, LogFull, LogUnavailable
from streaming.schemas import Codec
from tests.serving_process import eventually


class Scripted:
    """A producer at which `send` waits for the gate, finds it full so many times, or meets an error."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []  # raised by the next sends, last first
        self.sent: list[bytes] = []
        self.failed = 0

    def send(self, topic: str, key: bytes, value: bytes | None, timestamp_ms: int | None = None) -> None:
        self.gate.wait(30)
        if self.errors:
            raise self.errors.pop()
        self.sent.append(key)

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
    writer.close(10.0)


def decision(user: int) -> dict[str, object]:
    slot = {"item_id": "i", "propensity": 1.0}
    return {
        "recommendation_id": f"r{user}",
        "user_id": f"u{user}",
        "timestamp": 1_700_000_000_000,
        "slate": [slot],
    }


SIZE = len(Codec().encode_decision(decision(10)))


def count(fate: str) -> float:
    return metrics.DECISIONS.labels(fate)._value.get()


def test_an_answer_does_not_wait_for_a_log_that_cannot_be_reached(producer, writer):
    producer.gate.clear()
    began = time.monotonic()
    assert all(writer.write(decision(user)) for user in range(3))
    assert time.monotonic() - began < 1
    producer.gate.set()
    eventually(lambda: producer.sent == [b"u0", b"u1", b"u2"])


def test_what_the_log_cannot_take_now_is_tried_again_in_order(producer, writer):
    producer.errors = [LogFull("full"), LogUnavailable("away")]
    for user in range(3):
        writer.write(decision(user))
    eventually(lambda: producer.sent == [b"u0", b"u1", b"u2"])


def test_what_finds_no_room_is_dropped_and_counted(producer, writer, caplog):
    producer.gate.clear()
    before = count("dropped")
    taken = [writer.write(decision(user)) for user in range(10, 30)]
    assert count("dropped") - before == taken.count(False) == 15
    assert "1 decisions dropped, nothing will be learnt" in caplog.text  # and no line for each of the rest
    producer.gate.set()
    eventually(lambda: len(producer.sent) == taken.count(True))


def test_what_the_log_refuses_later_is_counted_as_lost(producer, writer):
    before = count("lost")
    producer.errors = [LogError("too large")]
    writer.write(decision(0))
    producer.failed = 2
    eventually(lambda: count("lost") - before == 3)


def test_a_fault_of_the_client_costs_one_decision_and_is_told_with_where_it_came_from(
    producer, writer, caplog
):
    before = count("lost")
    producer.errors = [RuntimeError("a bug")]
    for user in range(2):
        writer.write(decision(user))
    eventually(lambda: producer.sent == [b"u1"])
    assert count("lost") - before == 1
    assert "RuntimeError: a bug" in caplog.text


def test_what_is_not_away_when_the_server_must_end_is_an_error(producer):
    writer = DecisionWriter(producer, Codec(), "events", time.monotonic, 5 * SIZE)
    producer.gate.clear()
    writer.write(decision(0))
    with pytest.raises(LogError, match="1 decisions were not written"):
        writer.close(0.2)
    producer.gate.set()
