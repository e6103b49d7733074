"""What the log holds and how far we are behind, asked in a thread of its own: brokers may take long to answer."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping

from streaming.log import Bounds, Log, LogError, UnknownTopic

logger = logging.getLogger(__name__)


class LogWatch:
    """Keeps `bounds` up to date, and publishes the offsets that are safe for lag graphs (never read back by us).

    beside: another topic whose bounds are wanted, empty while it is not there.
    """

    def __init__(
        self,
        log: Log,
        topic: str,
        beside: str,
        group: str,
        every_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._topic, self._beside, self._group, self._every_s = log, topic, beside, group, every_s
        self._clock = clock
        self.ask()
        self.bounds_beside: dict[int, Bounds] = {}
        self._safe: Mapping[int, int] = {}
        self._committed: Mapping[int, int] = {}
        self._failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def lag(self, position: Mapping[int, int]) -> dict[int, int]:
        """Records that are there and not read, by partition, as of the last look."""
        return {p: max(0, b.high - position.get(p, b.low)) for p, b in self.bounds.items()}

    def ask(self) -> Mapping[int, Bounds]:
        """What the topic holds at this moment. Raises: LogError."""
        asked_s = self._clock()
        self.bounds: Mapping[int, Bounds] = self._log.bounds(self._topic)
        self.asked_s = asked_s  # since then it may hold more
        return self.bounds

    def safe(self, position: Mapping[int, int]) -> None:
        """A checkpoint holds everything before these offsets."""
        self._safe = dict(position)

    def close(self) -> None:
        """Publish the last safe offsets if the log answers, and end; harmless twice."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._look()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        try:
            self.ask()
            with contextlib.suppress(UnknownTopic):
                self.bounds_beside = self._log.bounds(self._beside)
            safe = self._safe
            if safe != self._committed:
                self._log.commit(self._group, self._topic, safe)
                self._committed = safe
            self._failing = False
        except LogError as error:
            if not self._failing:
                logger.warning("cannot ask the log how much it holds: %s; asking again", error)
            self._failing = True
