"""Decision records into the log: one for each answer, queued before the answer leaves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from serving import metrics
from streaming.log import LogError, Producer
from streaming.schemas import Codec

logger = logging.getLogger(__name__)

_COMPLAIN_EVERY_S: Final = 10.0


class DecisionWriter:
    """Writes decisions; threads may share one. A log that takes none never costs a caller the answer: it is counted,
    and said in the server's log."""

    def __init__(self, producer: Producer, codec: Codec, topic: str, clock: Callable[[], float]) -> None:
        """clock: monotonic seconds."""
        self._producer = producer
        self._codec = codec
        self._topic = topic
        self._clock = clock
        self._lock = threading.Lock()
        self._dropped = 0  # since the last complaint
        self._complained_s = float("-inf")

    def write(self, decision: Mapping[str, Any]) -> bool:
        """Queue one record (fields of proto/decision.avsc); False if it had to be dropped."""
        try:
            value = self._codec.encode_decision(decision)
            self._producer.send(self._topic, decision["user_id"].encode(), value)
        except LogError as error:
            self._complain(error)
            metrics.DECISIONS.labels("dropped").inc()
            return False
        metrics.DECISIONS.labels("queued").inc()
        return True

    def close(self, timeout_s: float) -> None:
        """Wait until all that was queued is durable. Raises LogError, naming the count, if it could not be."""
        self._producer.close(timeout_s)

    def _complain(self, error: LogError) -> None:
        with self._lock:
            self._dropped += 1
            if self._clock() - self._complained_s < _COMPLAIN_EVERY_S:
                return
            dropped, self._dropped, self._complained_s = self._dropped, 0, self._clock()
        logger.error("%d decisions dropped, nothing will be learnt from them: %s", dropped, error)
