"""Concurrent requests → one matrix product, without a waiting time.

The thread that finds nobody at work leads: it takes everything that is waiting, computes it in one go, and
hands the lead to the first of those who came meanwhile. A lone request is thus computed by its own thread with no
hand-over, and under load batches grow by themselves: nobody waits for a batch to fill.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Query = TypeVar("Query")
Answer = TypeVar("Answer")


class DeadlinePassed(Exception):
    """The caller stopped waiting before its turn came; nothing was computed for it."""


class _Job(Generic[Query, Answer]):
    __slots__ = ("answers", "deadline_s", "error", "queries", "settled", "wake")

    def __init__(self, queries: Sequence[Query], deadline_s: float) -> None:
        self.queries = queries
        self.deadline_s = deadline_s
        self.answers: Sequence[Answer] = ()
        self.error: Exception | None = None
        self.settled = False
        self.wake = threading.Lock()  # held until there is an answer, or the lead to take over
        self.wake.acquire()


class Batcher(Generic[Query, Answer]):
    """Runs `compute` on batches of what many threads ask, never two batches at once."""

    def __init__(
        self,
        compute: Callable[[list[Query]], Sequence[Answer]],
        max_batch: int,
        clock: Callable[[], float],
    ) -> None:
        """compute: answers in the order of the queries; it is only ever called by one thread at a time.
        max_batch: most queries in one call. clock: seconds, the one that deadlines are given in."""
        self._compute = compute
        self._max_batch = max_batch
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: deque[_Job[Query, Answer]] = deque()  # guarded by _lock; the leader's own job included
        self._led = False  # guarded by _lock

    def run(self, queries: Sequence[Query], deadline_s: float = float("inf")) -> Sequence[Answer]:
        """The answers, in the order of the queries. More than one batch of them takes its turn again for each.

        deadline_s: on the batcher's clock; work whose deadline has passed when its turn comes is skipped, so
        that an overloaded server spends its time on those who still listen.
        Raises: DeadlinePassed; whatever `compute` raised for the batch.
        """
        if len(queries) > self._max_batch:
            cuts = range(0, len(queries), self._max_batch)
            parts = (self.run(queries[cut : cut + self._max_batch], deadline_s) for cut in cuts)
            return [answer for part in parts for answer in part]
        job: _Job[Query, Answer] = _Job(queries, deadline_s)
        with self._lock:
            self._waiting.append(job)
            lead, self._led = not self._led, True
        if not lead:
            job.wake.acquire()
        if not job.settled:
            self._lead()
        if job.error is not None:
            raise job.error
        return job.answers

    def _lead(self) -> None:
        """Compute one batch, which holds the caller's own job, then hand over."""
        with self._lock:
            jobs = self._take()
        self._settle(jobs)
        with self._lock:
            self._led = bool(self._waiting)
            if self._waiting:
                self._waiting[0].wake.release()  # not settled: it wakes up as the next leader
        for job in jobs:
            job.wake.release()

    def _take(self) -> list[_Job[Query, Answer]]:
        """The longest run of waiting jobs that fits one batch."""
        jobs = [self._waiting.popleft()]
        size = len(jobs[0].queries)
        while self._waiting and size + len(self._waiting[0].queries) <= self._max_batch:
            jobs.append(self._waiting.popleft())
            size += len(jobs[-1].queries)
        return jobs

    def _settle(self, jobs: list[_Job[Query, Answer]]) -> None:
        """Give each job its answers or its error; never raises."""
        now = self._clock()
        alive = []
        for job in jobs:
            if job.deadline_s <= now:
                job.error = DeadlinePassed()
            else:
                alive.append(job)
        try:
            self._answer(alive)
        except Exception as error:  # whatever it was, each caller must hear of it, and the next one must lead
            for job in alive:
                job.error = error
        for job in jobs:
            job.settled = True

    def _answer(self, jobs: list[_Job[Query, Answer]]) -> None:
        queries = [query for job in jobs for query in job.queries]
        answers = self._compute(queries) if queries else ()
        start = 0
        for job in jobs:
            job.answers = answers[start : start + len(job.queries)]
            start += len(job.queries)
