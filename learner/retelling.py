"""A partition's records, joined once more by the plain joiner, as the checkpoint's journal says they were joined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from learner.journal import Journal, Room, Told, Unknown
from streaming.chunks import rows
from streaming.columns import Columns, Kind, Reason
from streaming.decoder import Decoder
from streaming.join_settings import JoinSettings
from streaming.log import Bounds, Log, LogUnavailable, RecordBatch
from streaming.plain_joiner import Line, Output, PlainPartition, Row, Step
from streaming.rewards import EVENT_NAMES
from streaming.schemas import frame_of

POLL_RECORDS: Final = 5000
POLL_S: Final = 1.0
QUIET_S: Final = (
    60.0  # of silence, before the end: longer than a reader of ours takes to find out that it has stalled
)


def read_partition(log: Log, topic: str, partition: int, start: int, end: int) -> Iterator[RecordBatch]:
    """The records start <= offset < end that there are, in order.

    Raises: OffsetOutOfRange; LogUnavailable, also where what is there does not come: it must not seem to be lost.
    """
    end = min(end, log.bounds(topic).get(partition, Bounds(0, 0)).high)
    if start >= end:
        return
    reader = log.reader(topic, {partition: start})
    quiet_s = 0.0
    try:
        while (at := reader.position()[partition]) < end:
            if quiet_s >= QUIET_S:
                raise LogUnavailable(
                    f"{topic}/{partition} could not be read: nothing came in {QUIET_S:.0f} s at offset {at}, "
                    f"and it ends at {end}; is the log up?"
                )
            batch = reader.poll(POLL_RECORDS, POLL_S)
            quiet_s = 0.0 if len(batch) else quiet_s + POLL_S
            inside = int(np.searchsorted(batch.offset, end))
            if inside:
                yield rows(batch, 0, inside)
    finally:
        reader.close()


def rows_of(batch: RecordBatch, decoder: Decoder, unknown: list[Unknown], rooms: list[Room]) -> list[Row]:
    """The records row by row, as they were read at the time; see `Journal.unknown` and `Journal.rooms`."""
    rows = plain_rows(_items_of_the_time(decoder.decode(batch), rooms))
    spans: dict[bytes | None, list[Unknown]] = {}
    for each in unknown:
        spans.setdefault(each.frame, []).append(each)
    for i, row in enumerate(rows if spans else ()):
        mine = spans.get(frame_of(batch, i), ()) if row.kind != Kind.BAD else ()
        if any(u.start <= row.offset and (u.end < 0 or row.offset < u.end) for u in mine):
            rows[i] = replace(row, kind=Kind.BAD, reason=Reason.UNKNOWN_SCHEMA)
    return rows


def _items_of_the_time(columns: Columns, rooms: list[Room]) -> Columns:
    """The columns, where items that were refused then, and got an id later, are unknown."""
    if not rooms:
        return columns
    since = np.searchsorted([room.offset for room in rooms], columns.offset, side="right") - 1
    most = np.array([room.items for room in rooms])[np.maximum(since, 0)]
    known = columns.item <= np.repeat(most, np.diff(columns.item_bounds))
    return columns._replace(item=np.where(known, columns.item, 0).astype(np.int32))


def plain_rows(columns: Columns) -> list[Row]:
    """The columns row by row, without decisions' histories."""
    lists = {name: getattr(columns, name).tolist() for name in _ROW_COLUMNS}
    bounds, item = columns.item_bounds.tolist(), columns.item.tolist()
    quantity, price = columns.quantity.tolist(), columns.price.tolist()
    propensity = columns.propensity.tolist()
    plain = []
    for i, values in enumerate(zip(*lists.values(), strict=True)):
        kind, reason, partition, offset, id, user, at_ms, name, recommendation, value, version, logged_ms = (
            values
        )
        lines = tuple(
            Line(item[k], quantity[k], price[k], propensity[k]) for k in range(bounds[i], bounds[i + 1])
        )
        plain.append(
            Row(
                Kind(kind), id, user, at_ms, EVENT_NAMES[name], recommendation, value, lines, (), version,
                False, partition, offset, Reason(reason), logged_ms,
            )
        )  # fmt: skip
    return plain


_ROW_COLUMNS: Final = (
    *("kind", "reason", "partition", "offset", "id", "user", "timestamp_ms", "name"),
    *("recommendation", "value", "policy_version", "logged_ms"),
)


def first_offset(journal: Journal, partition: int, low: int) -> tuple[int, bool]:
    """Where to begin, and whether something that was read before is gone, and with it what was known there."""
    began = journal.began.get(partition, 0)
    # whatever was stepped over is gone, but `--on-gap latest` left out records that may still be there
    ends = (gap.end for gap in journal.gaps.get(partition, []))
    start = max(low, began, journal.whole_from.get(partition, 0), *ends)
    return start, start > began


class Retelling:
    """Joins one partition again, with all that its journal says was told in between."""

    def __init__(self, partition: int, start: int, told: Iterable[Told], *, credits: bool = False) -> None:
        """credits: also note in `out` which event earned what."""
        told = list(told)
        held = [t.settings for t in told if t.settings is not None]
        before = [t.settings for t in told if t.settings is not None and t.offset <= start]
        settings = before[-1] if before else held[0]
        self.out = Output(credits=[] if credits else None)
        self.join = PlainPartition(partition, _without_history(settings), self.out)
        self._told = [t for t in told if t.offset > start]
        self._first_ms: int | None = None
        self._blind_ms = blind_ms(settings)

    def take(self, row: Row) -> bool:
        """The next record, after what was told before it; whether it came too late."""
        while self._told and self._told[0].offset <= row.offset:
            self._hear(self._told.pop(0))
        before = len(self.out.late)
        self.join.take(row)
        return len(self.out.late) > before

    def end(self) -> None:
        """What was told after the last record."""
        while self._told:
            self._hear(self._told.pop(0))

    def sees(self) -> bool:
        """Whether nothing from before the first record matters any more; False before the first one."""
        if self._first_ms is None and self.join.high_ms is not None:
            self._first_ms = self.join.watermark_ms
        return self._first_ms is not None and self.join.watermark_ms - self._first_ms > self._blind_ms

    def _hear(self, told: Told) -> None:
        if told.settings is not None:
            self.join.adopt(_without_history(told.settings))
        elif told.watermark_ms is not None:
            self.join.advance(told.watermark_ms)


def _without_history(settings: JoinSettings) -> JoinSettings:
    return replace(settings, history_length=1)  # histories are not compared, and nothing else depends on it


def blind_ms(settings: JoinSettings) -> int:
    """For how long, in event time, a record can matter to what becomes of later ones."""
    longest_s = max(
        settings.attribution_window_s,
        2 * settings.dedup_window_s,
        settings.session_gap_s,
        settings.overtake_wait_s,
        settings.user_ttl_s if settings.horizon == "user" else 0,
    )
    return round((longest_s + settings.watermark_delay_s) * 1000)


def open_steps(join: PlainPartition) -> Iterator[Step]:
    """Those that wait for what follows them."""
    for user in join.users.values():
        yield from (step for step in (user.open_decision, user.open_organic) if step is not None)
