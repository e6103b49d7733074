"""The catalog's topic, read into the learner: all of it before the first update, then whatever is new.

A record that cannot be used is named in the log and counted. It goes to no dead-letter topic: its own one is compacted,
so it stays there until the shop writes the item anew. One whose schema the registry cannot be asked for now waits, and
what follows it with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final

from streaming.catalog import Catalog, Renewal
from streaming.columns import Reason
from streaming.log import Bounds, Log, OffsetOutOfRange, Reader, RecordBatch, TopicReplaced, UnknownTopic
from streaming.schemas import RegistryUnavailable

logger = logging.getLogger(__name__)

MOST: Final = 20_000  # records in one batch
SHOWN: Final = 5  # of a batch's bad records named one by one


class CatalogFeed:
    """Reads one topic from its beginning; a topic that is not there yet is an empty catalog."""

    def __init__(self, log: Log, topic: str, catalog: Catalog) -> None:
        self._log, self._topic, self._catalog = log, topic, catalog
        self._reader: Reader | None = None
        self._renewal = Renewal(catalog.begin_anew, catalog.end_anew)
        self._parked: RecordBatch | None = None  # read, not applied yet
        self.refused = 0

    def catch_up(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Take in all that is there now, or as much as comes until `stopped`. Raises: LogError."""
        try:
            bounds = self._log.bounds(self._topic)
        except UnknownTopic:
            return
        self._follow(bounds)
        while (
            not stopped()
            and self._reader
            and any(at < bounds[p].high for p, at in self._reader.position().items())
        ):
            self._take(self._reader, 1.0)

    def follow(self, bounds: Mapping[int, Bounds], now_s: float) -> None:
        """Take in what came since, without waiting. bounds: of the topic; empty where it is not there. now_s: by a
        clock that only goes on.

        A catalog that was deleted and made anew, or of which retention took what was not read yet, is read from its
        beginning. What a new one holds nothing of is gone once it has been written: see `Renewal`.
        """
        waited = self._parked is not None
        try:
            self._follow(bounds)
            if self._reader is not None:
                self._renewal.look(bounds, self._reader.position(), now_s)
        except RegistryUnavailable as error:
            if not waited:
                logger.warning("the catalog waits: %s", error)
        except (OffsetOutOfRange, TopicReplaced, UnknownTopic) as error:
            self.close()  # the next look begins with the oldest record that there is
            if not isinstance(error, OffsetOutOfRange):
                self._renewal.begin()
            raise
        else:
            if waited:
                logger.info("the catalog goes on: the registry answers")

    def _follow(self, bounds: Mapping[int, Bounds]) -> None:
        if self._reader is None:
            if not bounds:
                return
            self._reader = self._log.reader(self._topic, {p: b.low for p, b in bounds.items()}, keys=True)
        position = self._reader.position()
        if bounds.keys() - position.keys():
            self._reader.assign({p: position.get(p, b.low) for p, b in bounds.items()})
        self._take(self._reader, 0.0)

    def close(self) -> None:
        """Let go; harmless twice."""
        self._parked = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _take(self, reader: Reader, timeout_s: float) -> None:
        batch = self._parked or reader.poll(MOST, timeout_s)
        if len(batch):
            self._parked = batch  # a registry that cannot be asked now loses nothing
            rejects = self._catalog.apply(batch)
            self._parked = None
            self.refused += len(rejects.row)
            for row, reason in zip(
                rejects.row[:SHOWN].tolist(), rejects.reason[:SHOWN].tolist(), strict=True
            ):
                place = f"{self._topic}/{batch.partition[row]} offset {batch.offset[row]}"
                logger.warning("catalog record %s cannot be used: %s", place, Reason(reason).name)
            if len(rejects.row) > SHOWN:
                logger.warning("... and %d more of the catalog's records", len(rejects.row) - SHOWN)
