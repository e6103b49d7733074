"""Decision records into the log: one for each answer, queued before the answer leaves."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple

from serving import metrics
from streaming.log import LogError, LogFull, LogUnavailable, Producer
from streaming.schemas import DECISION, MOST_BACKOFF_S, Codec, RegistryUnavailable, SchemaError

logger = logging.getLogger(__name__)

_COMPLAIN_EVERY_S: Final = 10.0
_RETRY_S: Final = 0.2  # between two tries to hand a decision to a producer that takes none
_LOOK_S: Final = 1.0  # between two looks at what the producer has given up


class Encoded(NamedTuple):
    """A decision record, but for its frame."""

    key: bytes
    body: bytes


class DecisionWriter:
    """Writes decisions; threads may share one. The log never holds up an answer.

    A thread of its own hands decisions to the producer, which may have to wait for a broker, and asks the schema
    registry, where there is one, for their frame. What cannot be written is counted, and said in the server's log.
    """

    def __init__(
        self, producer: Producer, codec: Codec, topic: str, clock: Callable[[], float], spool_bytes: int
    ) -> None:
        """clock: monotonic seconds. spool_bytes: of decisions that wait here while the producer takes none."""
        self._producer = producer
        self._codec = codec
        self._topic = topic
        self._clock = clock
        self._spool_bytes = spool_bytes
        self._waiting: deque[Encoded] = deque()
        self._waiting_bytes = 0
        self._work = threading.Condition()
        self._closing = False
        self._end_s = float("inf")  # of the time for what waits, once closing
        self._complaint = threading.Lock()
        self._unsaid = 0  # decisions lost since the last complaint
        self._given_up = 0  # dropped or lost, since the drain began
        self._complained_s = float("-inf")
        self._told_s = float("-inf")  # when it was said that the registry keeps decisions waiting
        self._failed = 0  # of the producer, at the last look
        self._thread = threading.Thread(target=self._run, name="decisions", daemon=True)
        self._thread.start()

    def encoded(self, decision: Mapping[str, Any]) -> Encoded | None:
        """A record (fields of proto/decision.avsc) for `write`; None if it had to be dropped."""
        try:
            return Encoded(decision["user_id"].encode(), self._codec.body(DECISION, decision))
        except LogError as error:
            self._give_up(1, "dropped", error)
            return None

    def write(self, decision: Encoded) -> bool:
        """Queue one record; False if it had to be dropped."""
        size = len(decision.body)
        try:
            with self._work:
                if self._waiting_bytes + size > self._spool_bytes:
                    raise LogFull(f"{len(self._waiting):,} decisions wait, and the log takes none")
                self._waiting.append(decision)
                self._waiting_bytes += size
                self._work.notify()
        except LogError as error:
            self._give_up(1, "dropped", error)
            return False
        metrics.DECISIONS.labels("queued").inc()
        return True

    def begin_drain(self) -> None:
        """What is given up from now on makes `close` raise; what was before has been counted."""
        with suppress(LogError):
            self._producer.flush(0.0)  # it tells of what failed once
        with self._complaint:
            self._given_up = 0

    def close(self, timeout_s: float) -> None:
        """Wait until all that was queued is durable. Raises LogError, naming counts, for what is not or was lost."""
        end_s = self._clock() + timeout_s
        with self._work:
            self._closing, self._end_s = True, end_s
            self._work.notify()
        self._thread.join(timeout_s)
        trouble = []
        if left := len(self._waiting):
            trouble.append(f"{left} decisions were not written within {timeout_s:g} s")
        if self._given_up:
            trouble.append(f"{self._given_up} decisions were dropped or lost while all was to end")
        try:
            self._producer.close(max(0.1, end_s - self._clock()))
        except LogError as error:
            trouble.append(str(error))
        if trouble:
            raise LogError("; ".join(trouble))

    def _run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._waiting or self._closing, _LOOK_S)
                if self._closing and not (self._waiting and self._clock() < self._end_s):
                    return
                entry = self._waiting[0] if self._waiting else None
            if entry is None or self._hand_over(*entry):
                self._look()

    def _hand_over(self, key: bytes, body: bytes) -> bool:
        """The first that waits, to the producer; False where it must be tried again."""
        try:
            self._producer.send(self._topic, key, self._codec.frame(DECISION) + body)
        except (LogFull, LogUnavailable) as error:
            self._put_off(error, _RETRY_S)
            return False
        except (
            SchemaError
        ) as error:  # a registry that refuses our schema is asked no oftener than one that is down
            self._put_off(error, MOST_BACKOFF_S)
            return False
        except Exception as error:  # whatever a client may raise: the next one must not wait for ever
            self._give_up(1, "lost", error)
        with self._work:
            self._waiting.popleft()
            self._waiting_bytes -= len(body)
        return True

    def _put_off(self, error: LogError, pause_s: float) -> None:
        if isinstance(error, SchemaError | RegistryUnavailable):
            now = self._clock()
            if now - self._told_s >= _COMPLAIN_EVERY_S:
                self._told_s = now
                logger.warning("decisions wait: %s", error)
        time.sleep(_RETRY_S)  # closing or not: else it would be asked without a pause
        with self._work:
            self._work.wait_for(lambda: self._closing, pause_s - _RETRY_S)

    def _look(self) -> None:
        """Whether the producer has given up any."""
        failed = self._producer.failed
        if failed > self._failed:
            self._give_up(failed - self._failed, "lost", "the log did not take them in time")
            self._failed = failed

    def _give_up(self, count: int, fate: str, why: str | Exception) -> None:
        metrics.DECISIONS.labels(fate).inc(count)
        with self._complaint:
            self._unsaid += count
            self._given_up += count
            if self._clock() - self._complained_s < _COMPLAIN_EVERY_S:
                return
            count, self._unsaid, self._complained_s = self._unsaid, 0, self._clock()
        fault = why if isinstance(why, Exception) and not isinstance(why, LogError) else None
        trouble = "%d decisions %s, nothing will be learnt from them: %s"
        logger.error(trouble, count, fate, why, exc_info=fault)
