"""Concurrent requests are computed together, in order, by one thread at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from serving.batching import Batcher, DeadlinePassed


class Squares:
    """Squares numbers; knows how it was called, and can be held up."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        self.calls: list[list[int]] = []
        self.at_once = 0
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, queries: list[int]) -> Sequence[int]:
        self.at_once += 1
        assert self.at_once == 1, "two batches at once"
        self.calls.append(queries)
        assert self.gate.wait(10)
        time.sleep(self.pause_s)
        self.at_once -= 1
        if 13 in queries:
            raise ValueError("13")
        return [query * query for query in queries]


class Caller(threading.Thread):
    """A thread that asks once."""

    def __init__(self, batcher: Batcher[int, int], *queries: int, deadline_s: float = float("inf")) -> None:
        super().__init__(daemon=True)
        self._ask = lambda: batcher.run(queries, deadline_s)
        self.answers: Sequence[int] | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.answers = self._ask()
        except Exception as error:
            self.error = error

    def result(self) -> Sequence[int] | None:
        self.join(10)
        assert not self.is_alive()
        return self.answers


def held(squares: Squares, batcher: Batcher[int, int]) -> Caller:
    """A first call that is being computed, and stays so until the gate opens."""
    squares.gate.clear()
    first = Caller(batcher, 1)
    while not squares.calls:
        time.sleep(0.001)
    return first


def waiting(batcher: Batcher[int, int], n: int) -> None:
    """Return once n jobs wait for their turn."""
    while len(batcher._waiting) < n:
        time.sleep(0.001)


def test_a_lone_call_is_computed_by_its_own_thread() -> None:
    threads: list[int] = []

    def compute(queries: list[int]) -> list[int]:
        threads.append(threading.get_ident())
        return queries

    assert Batcher(compute, 8, time.monotonic).run([5]) == [5]
    assert threads == [threading.get_ident()]


def test_calls_that_come_meanwhile_are_computed_together() -> None:
    squares = Squares()
    batcher = Batcher(squares, 8, time.monotonic)
    first = held(squares, batcher)
    callers = []
    for i in range(2, 6):
        callers.append(Caller(batcher, i))
        waiting(batcher, len(callers))
    squares.gate.set()
    assert [caller.result() for caller in (first, *callers)] == [[1], [4], [9], [16], [25]]
    assert squares.calls == [[1], [2, 3, 4, 5]]


def test_a_batch_is_never_larger_than_allowed_and_nobody_is_overtaken() -> None:
    squares = Squares()
    batcher = Batcher(squares, 3, time.monotonic)
    first = held(squares, batcher)
    callers = []
    for queries in ((2, 3), (4, 5), (6,), (7, 8, 9)):
        callers.append(Caller(batcher, *queries))
        waiting(batcher, len(callers))
    squares.gate.set()
    assert [caller.result() for caller in (first, *callers)][-1] == [49, 64, 81]
    assert squares.calls == [[1], [2, 3], [4, 5, 6], [7, 8, 9]]


def test_a_call_for_many_lets_others_in_between_its_batches() -> None:
    squares = Squares()
    batcher = Batcher(squares, 2, time.monotonic)
    first = held(squares, batcher)
    many = Caller(batcher, 2, 3, 4, 5, 6)
    waiting(batcher, 1)
    one = Caller(batcher, 7)
    waiting(batcher, 2)
    squares.gate.set()
    assert [caller.result() for caller in (first, many, one)] == [[1], [4, 9, 16, 25, 36], [49]]
    assert squares.calls[:3] == [[1], [2, 3], [7]]


def test_who_stopped_waiting_costs_nothing() -> None:
    squares = Squares()
    now = 0.0
    batcher = Batcher(squares, 8, lambda: now)
    first = held(squares, batcher)
    late, early = Caller(batcher, 2, deadline_s=5.0), Caller(batcher, 3, deadline_s=20.0)
    waiting(batcher, 2)
    now = 10.0
    squares.gate.set()
    assert (first.result(), late.result(), early.result()) == ([1], None, [9])
    assert isinstance(late.error, DeadlinePassed)
    assert squares.calls == [[1], [3]]


def test_an_error_reaches_everybody_in_the_batch_and_nobody_else() -> None:
    squares = Squares()
    batcher = Batcher(squares, 2, time.monotonic)
    first = held(squares, batcher)
    callers = []
    for i in (12, 13, 14):
        callers.append(Caller(batcher, i))
        waiting(batcher, len(callers))
    squares.gate.set()
    assert [caller.result() for caller in (first, *callers)] == [[1], None, None, [196]]
    assert [str(caller.error) for caller in callers] == ["13", "13", "None"]


def test_a_storm_of_threads_gets_every_answer_right() -> None:
    squares = Squares(pause_s=0.0002)
    batcher = Batcher(squares, 16, time.monotonic)
    wrong: list[int] = []

    def ask(start: int) -> None:
        for i in range(start, start + 100):
            query = 100 + i
            if batcher.run([query, query + 1]) != [query**2, (query + 1) ** 2]:
                wrong.append(query)

    threads = [threading.Thread(target=ask, args=(1000 * t,)) for t in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert wrong == []
    assert len(squares.calls) < 12 * 100  # some were computed together


def test_a_deadline_that_passed_is_told_at_once() -> None:
    with pytest.raises(DeadlinePassed):
        Batcher(Squares(), 8, lambda: 10.0).run([1], deadline_s=9.0)
