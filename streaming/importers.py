"""Public and own event logs → our events: `streaming import FORMAT FILE`.

Three steps, each in bounded memory: the file is read in blocks and every row checked; blocks are sorted by
event time through runs on disk (public logs come by user, or in no order at all, while the joiner's
watermarks expect time to move forward); then each row is encoded and sent, and what is new to the catalog beside it.

An event's id is a hash of what happened, and of which occurrence of it this is; not of the file. So a
second import of the same log, in whatever layout, adds nothing: its events are duplicates, or late. Nor does it change
what the catalog says by then.
Rows that cannot be used are counted by reason, with the first of each as it stood.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from streaming.import_catalog import Decoder, ImportCatalog
from streaming.log import Log, LogError, LogFull, Producer, RecordTooLarge
from streaming.topics import TopicSettings, create_topics

Mask = npt.NDArray[np.bool_]


class ImportFailed(LogError):
    """The file cannot be imported; the message names it, says why and what to do."""


class Refusal(StrEnum):
    """Why a row of a file was not imported."""

    COLUMNS = "wrong number of columns"
    UTF8 = "not UTF-8"
    JSON = "not a JSON object of this format"
    NAME = "unknown event name"
    USER = "no user id within 1..1024 bytes"
    ITEM = "no item id within 1..1024 bytes"
    TIMESTAMP = "no time within 2000..2100"
    NUMBER = "price, quantity or value out of range"
    TOO_MANY = "more than 1000 items"
    TOO_LARGE = "more bytes than the log takes"


@dataclass(frozen=True)
class ImportSettings:
    """How a file is read."""

    run_rows: int = field(
        default=500_000, metadata={"help": "rows sorted in memory at once; rows, 1000..100000000"}
    )
    scratch: str | None = field(
        default=None, metadata={"help": "folder for sorted runs, as large as the file; none: the system's"}
    )
    topic: str = field(default="events", metadata={"help": "topic that the events go to"})
    catalog: str = field(default="catalog", metadata={"help": "topic that the items go to"})
    partitions: int = field(
        default=8, metadata={"help": "partitions of a topic of events that is not there yet; 1..10000"}
    )

    def __post_init__(self) -> None:
        for name, low, high in (("run_rows", 1000, 100_000_000), ("partitions", 1, 10_000)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be within {low}..{high}, not {getattr(self, name)}")


@dataclass
class Imported:
    """What came of an import."""

    events: int = 0  # sent
    items: int = 0  # catalog records sent: new items and changed ones
    first_ms: int = 0  # event time of the oldest
    last_ms: int = 0  # event time of the newest
    refused: Counter[Refusal] = field(default_factory=Counter)
    examples: dict[Refusal, str] = field(default_factory=dict)  # the first refused row of each reason

    def refuse(self, reason: Refusal, where: str, row: str) -> None:
        """Count one row that cannot be used; remember it if it is the first for this reason."""
        self.refused[reason] += 1
        self.examples.setdefault(reason, f"{where}: {row[:200]}")

    def __str__(self) -> str:
        lines = [f"{self.events:,} events and {self.items:,} catalog records written"]
        if self.events:
            lines[0] += f", {_day(self.first_ms)} to {_day(self.last_ms)}"
        lines += [
            f"  refused {count:,}: {reason} (first: {self.examples[reason]})"
            for reason, count in self.refused.most_common()
        ]
        return "\n".join(lines)


class Encoder(Decoder, Protocol):
    """The part of streaming.schemas.Codec that an import needs."""

    def encode_event(self, event: dict[str, Any], /) -> bytes:
        """An Event as bytes, framed."""

    def encode_item(self, item: dict[str, Any], /) -> bytes:
        """An Item as bytes, framed."""


Progress = Callable[[str, int, int], None]  # phase, done, of total


def import_file(
    layout: str,
    path: Path,
    log: Log,
    codec: Encoder,
    settings: ImportSettings | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Imported:
    """Write what the file holds to the topics of events and items, in order of event time.

    layout: one of LAYOUTS. Topics that are not there are created.
    Raises: ImportFailed when the file is not of this layout, or broken off; LogError from the log.
    """
    settings = settings or ImportSettings()
    topics = TopicSettings(settings.topic, settings.catalog, settings.partitions)
    for _ in create_topics(log, topics):
        pass
    imported = Imported()
    with tempfile.TemporaryDirectory(prefix="bellwether-import-", dir=settings.scratch) as scratch:
        tables = read_events(layout, path, imported, progress)
        rows, in_order = _sorted_by_time(tables, Path(scratch), settings.run_rows)
        if rows == 0:
            raise ImportFailed(f"{path}: nothing in it could be read as {layout}\n{imported}")
        catalog = ImportCatalog(codec)
        catalog.read(log, topics.catalog)  # as late as may be: the shop may write to it meanwhile
        producer = log.producer()
        try:
            _publish(in_order, rows, topics, catalog, producer, codec, imported, progress)
        finally:
            producer.close()  # raises if anything queued could not be written
    return imported


# ── the layouts ──────────────────────────────────────────────────────────────────────────────────────────────


class Flat(NamedTuple):
    """A layout with one event in each row.

    columns: our field → the file's column names for it; where several are there, the first non-null counts.
    names: the file's event type → GA4 name. header: column order of text files that have no header line.
    """

    columns: Mapping[str, tuple[str, ...]]
    names: Mapping[str, str]
    header: tuple[str, ...] | None = None


_FLAT: Final = {
    "retailrocket": Flat(
        columns={
            "timestamp": ("timestamp",),
            "user_id": ("visitorid",),
            "name": ("event",),
            "item_id": ("itemid",),
            "transaction_id": ("transactionid",),
        },
        names={"view": "view_item", "addtocart": "add_to_cart", "transaction": "purchase"},
    ),
    "taobao": Flat(
        columns={
            "timestamp": ("timestamp", "ts"),
            "user_id": ("user_id",),
            "name": ("behavior", "behavior_type"),
            "item_id": ("item_id",),
            "category": ("category_id",),
        },
        names={"pv": "view_item", "fav": "add_to_wishlist", "cart": "add_to_cart", "buy": "purchase"},
        header=("user_id", "item_id", "category_id", "behavior", "timestamp"),
    ),
    "rees46": Flat(
        columns={
            "timestamp": ("event_time",),
            "user_id": ("user_id",),
            "session_id": ("user_session",),
            "name": ("event_type",),
            "item_id": ("product_id",),
            "price": ("price",),
            "category": ("category_code", "category_id"),
            "brand": ("brand",),
        },
        names={
            "view": "view_item",
            "cart": "add_to_cart",
            "remove_from_cart": "remove_from_cart",
            "purchase": "purchase",
        },
    ),
    "otto": Flat(
        columns={
            "timestamp": ("ts",),
            "user_id": ("session",),
            "name": ("type",),
            "item_id": ("aid",),
        },
        names={"clicks": "view_item", "carts": "add_to_cart", "orders": "purchase"},
    ),
}
_REQUIRED: Final = ("timestamp", "user_id", "name", "item_id")
_JSON_LAYOUTS: Final = ("otto", "ga4")
LAYOUTS: Final = {
    "retailrocket": "events.csv: timestamp, visitorid, event, itemid, transactionid",
    "taobao": "UserBehavior.csv: user, item, category, behavior, unix seconds; no header",
    "rees46": "2019-Oct.csv: event_time, event_type, product_id, category_*, brand, price, user_*",
    "otto": 'sessions, one a line: {"session", "events": [{"aid", "ts", "type"}]}',
    "ga4": "Google Analytics 4 export, or our Event as JSON, one a line",
}

# Checked events between the steps. `items` is shaped as in event.avsc, plus what goes to the catalog.
_ITEM: Final = pa.struct(
    [
        ("item_id", pa.string()),
        ("quantity", pa.int32()),
        ("price", pa.float64()),
        ("index", pa.int32()),
        ("category", pa.string()),
        ("brand", pa.string()),
    ]
)
_EVENTS: Final = pa.schema(
    [
        ("timestamp", pa.int64()),  # ms
        ("name", pa.string()),
        ("user_id", pa.string()),
        ("session_id", pa.string()),
        ("items", pa.list_(_ITEM)),
        ("value", pa.float64()),
        ("currency", pa.string()),
        ("recommendation_id", pa.string()),
        ("params", pa.string()),  # a JSON object of strings, keys sorted; null: none
        ("event_id", pa.string()),  # null: made of the content
    ]
)
_BLOCK: Final = 16_384  # rows read, and merged, at once
_OLDEST_MS: Final = 946_684_800_000  # 2000-01-01
_NEWEST_MS: Final = 4_102_444_800_000  # 2100-01-01


def read_events(
    layout: str, path: Path, imported: Imported, progress: Progress = lambda phase, done, total: None
) -> Iterator[pa.Table]:
    """The usable events of a file, in the file's order, as tables of up to some thousands of rows.

    What is not usable is counted in `imported`. Plain text, gzip and parquet are told apart by their first bytes.
    Raises: ImportFailed when columns are missing, or the file is broken.
    """
    if layout not in LAYOUTS:
        raise ImportFailed(f"{layout!r} is no layout; one of {', '.join(LAYOUTS)}")
    with path.open("rb") as raw:
        magic = raw.read(4)
    if magic == b"PK\x03\x04":
        raise ImportFailed(f"{path} is a zip archive; unpack it first")
    blocks = _parquet_blocks if magic == b"PAR1" else _text_blocks
    try:
        yield from blocks(layout, path, imported, progress)
    except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException) as error:
        raise ImportFailed(f"{path} is broken: {error}") from error


def _text_blocks(layout: str, path: Path, imported: Imported, progress: Progress) -> Iterator[pa.Table]:
    total = path.stat().st_size
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        lines = _lines(gzip.GzipFile(fileobj=raw) if packed else raw, imported)
        header = _header(layout, path, lines)
        while block := list(islice(lines, _BLOCK)):
            yield _text_block(layout, header, block, imported)
            progress("reading", raw.tell(), total)


def _lines(stream: Iterable[bytes], imported: Imported) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its end) of the lines that are not blank."""
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            imported.refuse(Refusal.UTF8, f"line {number}", repr(line))
            continue
        if text:
            yield number, text


def _cells(line: str) -> list[str]:
    """The cells of one CSV line. No layout has line breaks inside a cell, so a bad quote spoils its own line only.

    Raises: _RowError where quotes do not come out even, or a cell is beyond csv.field_size_limit.
    """
    try:
        return next(csv.reader([line])) if '"' in line else line.split(",")
    except csv.Error:
        raise _RowError(Refusal.COLUMNS) from None


def _header(layout: str, path: Path, lines: Iterator[tuple[int, str]]) -> Sequence[str]:
    """The names of a CSV file's columns; empty for JSON lines. Raises: ImportFailed."""
    if layout in _JSON_LAYOUTS:
        return ()
    try:
        header = _FLAT[layout].header or [cell.strip().lower() for cell in _cells(next(lines, (0, ""))[1])]
    except _RowError:
        header = ()
    _require_columns(layout, path, header)
    return header


def _require_columns(
    layout: str, path: Path, found: Sequence[str], needed: Sequence[tuple[str, ...]] | None = None
) -> None:
    """needed: each by any of its names; None: what a row of this layout needs.

    Raises: ImportFailed where a column is missing, or one that is read is there twice.
    """
    columns = _FLAT[layout].columns
    for names in needed or [columns[field_name] for field_name in _REQUIRED]:
        if not set(found).intersection(names):
            raise ImportFailed(
                f"{path} has no column {' or '.join(names)}, which {layout} files have; "
                f"found {', '.join(sorted(set(found)))[:200] or 'nothing'}"
            )
    for name in chain.from_iterable(needed or columns.values()):
        if found.count(name) > 1:
            raise ImportFailed(f"{path} has {found.count(name)} columns {name}; keep the one to be read")


def _text_block(
    layout: str, header: Sequence[str], block: Sequence[tuple[int, str]], imported: Imported
) -> pa.Table:
    if layout == "ga4":
        return _ga4_block(block, imported)
    rows: list[Sequence[str | None]] = []
    sources: list[tuple[int, str]] = []
    for source in block:
        try:
            new = _otto_rows(source[1]) if layout == "otto" else [_cells(source[1])]
            if any(len(row) != len(header or _OTTO) for row in new):
                raise _RowError(Refusal.COLUMNS)
        except _RowError as error:
            imported.refuse(error.reason, f"line {source[0]}", source[1])
            continue
        rows += new
        sources += [source] * len(new)
    columns = zip(*rows, strict=True) if rows else [()] * len(header or _OTTO)
    cells = {
        name: pa.array(values, pa.string()) for name, values in zip(header or _OTTO, columns, strict=True)
    }
    return _flat_block(layout, cells, lambda i: (f"line {sources[i][0]}", sources[i][1]), imported)


def _parquet_blocks(layout: str, path: Path, imported: Imported, progress: Progress) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        names = [name.lower() for name in file.schema_arrow.names]
        nested = layout == "otto" and "events" in names
        if layout in _FLAT:
            _require_columns(layout, path, names, [("session",), ("events",)] if nested else None)
        if nested:
            _require_events(path, file.schema_arrow.types[names.index("events")])
        done = seen = 0
        for batch in file.iter_batches(_BLOCK):
            if layout == "ga4":
                yield _ga4_records(_objects(batch, done + 1, imported), imported, "row")
            else:
                named = pa.RecordBatch.from_arrays(batch.columns, names)
                flat = _plain_rows(_otto_flat(named) if nested else named)
                cells = dict(zip(flat.schema.names, flat.columns, strict=True))
                describe = partial(_described, flat, seen + 1, "event" if nested else "row")
                yield _flat_block(layout, cells, describe, imported)
                seen += flat.num_rows
            done += batch.num_rows
            progress("reading", done, file.metadata.num_rows)


def _described(rows: pa.RecordBatch, first: int, unit: str, i: int) -> tuple[str, str]:
    row = {name: _as_python(column[i]) for name, column in zip(rows.schema.names, rows.columns, strict=True)}
    return f"{unit} {first + i}", str(row)


def _as_python(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):  # a time in no year that Python has
        return getattr(value, "value", None)


def _objects(batch: pa.RecordBatch, first: int, imported: Imported) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the row, what it holds) of the rows of a batch, the first of which is number `first`."""
    try:
        yield from enumerate(batch.to_pylist(), first)
    except (ValueError, OverflowError):  # one of them is no UTF-8, or a time in no year that Python has
        for i in range(batch.num_rows):
            try:
                (row,) = batch.slice(i, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                reason = Refusal.UTF8 if isinstance(error, UnicodeDecodeError) else Refusal.TIMESTAMP
                imported.refuse(reason, f"row {first + i}", str(error))
            else:
                yield first + i, row


# ── flat rows, a column at a time ────────────────────────────────────────────────────────────────────────────


def _flat_block(
    layout: str,
    cells: Mapping[str, pa.Array],
    describe: Callable[[int], tuple[str, str]],
    imported: Imported,
) -> pa.Table:
    """The usable rows of a block as events; cells: the file's column → its values, [N] each.

    describe: row number within the block → where it stood and what it said.
    """
    flat = _FLAT[layout]
    rows = len(next(iter(cells.values())))
    found = {
        name: [cells[theirs] for theirs in names if theirs in cells] for name, names in flat.columns.items()
    }
    text = {
        name: pc.coalesce(*map(_sound, columns)) if columns else pa.nulls(rows, pa.string())
        for name, columns in found.items()
        if name not in ("timestamp", "price")
    }
    timestamp, timely = _times(found["timestamp"][0])
    price, priced = _numbers(next(iter(found.get("price", ())), pa.nulls(rows, pa.float64())))
    name = pc.take(pa.array(flat.names.values()), pc.index_in(text["name"], pa.array(flat.names)))

    refused = np.full(rows, -1)
    for reason, bad in (
        (Refusal.TIMESTAMP, ~timely),
        (Refusal.NAME, _mask(pc.is_null(name))),
        (Refusal.USER, ~_is_id(text["user_id"])),
        (Refusal.ITEM, ~_is_id(text["item_id"])),
        (Refusal.NUMBER, ~priced),
    ):
        refused[bad & (refused < 0)] = list(Refusal).index(reason)
    for i in np.flatnonzero(refused >= 0):
        imported.refuse(list(Refusal)[refused[i]], *describe(int(i)))

    none = pa.nulls(rows, pa.string())
    item = pa.StructArray.from_arrays(
        [
            text["item_id"],
            pa.array(np.ones(rows, np.int32)),
            price,
            pa.nulls(rows, pa.int32()),
            text.get("category", none),
            text.get("brand", none),
        ],
        fields=list(_ITEM),
    )
    columns = {
        "timestamp": pa.array(timestamp),
        "name": name,
        "user_id": text["user_id"],
        "session_id": text.get("session_id", none),
        "items": pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32)), item),
        "params": _transaction_params(text["transaction_id"]) if "transaction_id" in text else none,
    }
    table = pa.table(
        [columns.get(entry.name, pa.nulls(rows, entry.type)) for entry in _EVENTS], schema=_EVENTS
    )
    return table.filter(pa.array(refused < 0))


def _plain_rows(rows: pa.RecordBatch) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([_plain(column) for column in rows.columns], rows.schema.names)


def _plain(column: pa.Array) -> pa.Array:
    """Without dictionary, and texts of one type: null where they are no UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not any(of_type(column.type) for of_type in _TEXTS):
        return column
    try:
        column.validate(full=True)  # parquet's reader believes what a file says of its bytes
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array(map(_decoded, column.cast(pa.binary()).to_pylist()), pa.string())


_TEXTS: Final = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
)


def _decoded(raw: bytes | None) -> str | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return None


def _text(column: pa.Array) -> pa.Array:
    """As strings; null where empty, NaN or a broken number. An id that pandas made a float is whole again."""
    if pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**63))
        column = pc.if_else(whole, column, None).cast(pa.int64())
    column = column.cast(pa.string())
    return pc.if_else(pc.equal(column, ""), None, column)


def _sound(column: pa.Array) -> pa.Array:
    """As `_text`; null also where U+0000 is in it, which no text of an event may hold."""
    text = _text(column)
    return pc.if_else(pc.match_substring(text, "\0"), None, text)


def _times(column: pa.Array) -> tuple[npt.NDArray[np.int64], Mask]:
    """ms since 1970 [N], and which of them are usable. Numbers may be s, ms or us: one of them alone lies in
    2000..2100. Texts are ISO 8601 in UTC, with or without saying so."""
    if pa.types.is_timestamp(column.type):
        known = column.cast(pa.timestamp("ms", column.type.tz), safe=False).cast(pa.int64())
    else:
        text = _text(column)
        numeric = pc.match_substring_regex(text, r"^[0-9]{1,17}$")
        known = _in_ms(pc.if_else(numeric, text, None).cast(pa.int64()))
        if pc.any(pc.invert(numeric)).as_py():
            known = pc.coalesce(known, _iso_ms(text))
    times = np.asarray(known.fill_null(0))  # [N]
    return times, (times >= _OLDEST_MS) & (times < _NEWEST_MS)


def _iso_ms(text: pa.Array) -> pa.Array:
    """ISO 8601 in UTC → ms since 1970; null for what is none. Further digits of a second are cut off.

    >>> _iso_ms(pa.array(["1970-01-01 00:00:02", "1970-01-01T00:00:02.5Z", "1970-02-30 00:00:00"])).to_pylist()
    [2000, 2500, None]
    """
    parts = pc.extract_regex(text, _ISO)
    date, day, clock, fraction = (pc.struct_field(parts, i) for i in range(4))
    plain = pc.binary_join_element_wise(date, clock, " ")
    parsed = pc.strptime(plain, "%Y-%m-%d %H:%M:%S", "ms", error_is_null=True)
    # strptime takes 30 February for 2 March
    ms = pc.if_else(pc.equal(pc.day(parsed), day.cast(pa.int64())), parsed, None).cast(pa.int64())
    return pc.add(ms, pc.utf8_rpad(fraction, 3, "0").cast(pa.int64()))


_ISO: Final = (
    r"^(?P<date>\d{4}-\d{1,2}-(?P<day>\d{1,2}))[T ](?P<clock>\d{1,2}:\d{1,2}:\d{1,2})"
    r"(?:\.(?P<fraction>\d{1,3})\d*)?(?: UTC|Z|\+00:00)?$"
)


def _in_ms(number: pa.Array) -> pa.Array:
    """Numbers in s, ms or us since 1970 → ms.

    >>> _in_ms(pa.array([1511544070, 1511544070000, 1511544070000000, None])).to_pylist()
    [1511544070000, 1511544070000, 1511544070000, None]
    """
    return pc.if_else(
        pc.less(number, _NEWEST_MS // 1000),
        pc.multiply(number, 1000),
        pc.if_else(pc.less(number, _NEWEST_MS), number, pc.divide(number, 1000)),
    )


def _numbers(column: pa.Array) -> tuple[pa.Array, Mask]:
    """As floats, null where there is none [N], and which are null or within +-1e9."""
    if pa.types.is_string(column.type):
        text = _text(column)
        number = pc.if_else(pc.match_substring_regex(text, _NUMBER), text, None).cast(pa.float64())
        unread = _mask(pc.and_(pc.is_valid(text), pc.is_null(number)))
    else:
        number = column.cast(pa.float64())
        number = pc.if_else(pc.is_nan(number), None, number)  # as pandas writes what is missing
        unread = np.zeros(len(column), bool)
    return number, ~unread & (np.abs(np.asarray(number.fill_null(0.0))) <= 1e9)


_NUMBER: Final = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"


def _is_id(text: pa.Array) -> Mask:
    length = pc.binary_length(text).fill_null(0)
    return _mask(pc.and_(pc.greater(length, 0), pc.less_equal(length, 1024)))


def _mask(column: pa.Array) -> Mask:
    return np.asarray(column.to_numpy(zero_copy_only=False), bool)


def _transaction_params(transaction: pa.Array) -> pa.Array:
    texts = (
        None if one is None else json.dumps({"transaction_id": one}, sort_keys=True)
        for one in transaction.to_pylist()
    )
    return pa.array(texts, pa.string())


# ── OTTO: one session in each line ───────────────────────────────────────────────────────────────────────────

_OTTO: Final = ("session", "aid", "ts", "type")


def _otto_rows(line: str) -> list[tuple[str | None, ...]]:
    """(session, aid, ts, type) of each event of a session. Raises: _RowError."""
    session = _json_object(line)
    events = session.get("events")
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise _RowError(Refusal.JSON)
    user = _scalar(session.get("session"))
    return [(user, *(_scalar(event.get(name)) for name in _OTTO[1:])) for event in events]


def _require_events(path: Path, kind: pa.DataType) -> None:
    """Raises: ImportFailed where a column of this type holds no events."""
    entry = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
    names = [each.name for each in entry] if entry is not None and pa.types.is_struct(entry) else []
    if any(names.count(name) != 1 for name in _OTTO[1:]):
        raise ImportFailed(
            f"{path} has no lists of {', '.join(_OTTO[1:])} in its column events, which otto files have; "
            f"found {str(kind)[:200]}"
        )


def _otto_flat(batch: pa.RecordBatch) -> pa.RecordBatch:
    """As `_otto_rows`, for parquet with a list of events in each row."""
    events = batch.column("events")
    each = pc.list_flatten(events)
    sessions = pc.take(batch.column("session"), pc.list_parent_indices(events))
    return pa.RecordBatch.from_arrays(
        [sessions, *(pc.struct_field(each, name) for name in _OTTO[1:])], names=list(_OTTO)
    )


# ── GA4: one event in each line, a row at a time ─────────────────────────────────────────────────────────────


class _RowError(Exception):
    def __init__(self, reason: Refusal) -> None:
        super().__init__(reason)
        self.reason = reason


def _json_object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise _RowError(Refusal.JSON) from None
    if not isinstance(value, dict):
        raise _RowError(Refusal.JSON)
    return value


def _ga4_block(block: Sequence[tuple[int, str]], imported: Imported) -> pa.Table:
    records: list[tuple[int, dict[str, Any]]] = []
    for number, line in block:
        try:
            records.append((number, _json_object(line)))
        except _RowError as error:
            imported.refuse(error.reason, f"line {number}", line)
    return _ga4_records(records, imported, "line")


def _ga4_records(records: Iterable[tuple[int, dict[str, Any]]], imported: Imported, unit: str) -> pa.Table:
    events = []
    for number, record in records:
        try:
            events.append(_ga4_event(record))
        except _RowError as error:
            imported.refuse(error.reason, f"{unit} {number}", json.dumps(record, default=str))
    return pa.Table.from_pylist(events, _EVENTS)


def _ga4_event(record: Mapping[str, Any]) -> dict[str, Any]:
    """One event of a GA4 export, of the Measurement Protocol, or in our own flat form. Raises: _RowError."""
    params = _ga4_params(record.get("event_params") or record.get("params"))
    commerce = record.get("ecommerce") if isinstance(record.get("ecommerce"), dict) else {}
    assert isinstance(commerce, dict)

    def first(*names: str) -> Any:
        """The first of these that the event carries, in itself, in its parameters or in `ecommerce`."""
        for source in (record, params, commerce):
            for name in names:
                if source.get(name) not in (None, ""):
                    return source[name]
        return None

    items = first("items") or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _RowError(Refusal.JSON)
    if len(items) > 1000:
        raise _RowError(Refusal.TOO_MANY)
    extra = {
        name: text
        for name, value in {**commerce, **params}.items()
        if name not in _GA4_OWN and _scalar(name) is not None and (text := _scalar(value)) is not None
    }
    event_id = _scalar(first("event_id"))
    return {
        "timestamp": _ga4_time(first("event_timestamp", "timestamp_micros", "timestamp", "timestamp_ms")),
        "name": _identifier(first("event_name", "name"), Refusal.NAME, 64),
        "user_id": _identifier(first("user_id", "user_pseudo_id", "client_id"), Refusal.USER),
        "session_id": _scalar(first("session_id", "ga_session_id")),
        "items": [_ga4_item(item) for item in items if item.get("item_id") != _NOT_SET],
        "value": _number(first("value", "purchase_revenue"), 1e12),
        "currency": _scalar(first("currency")),
        "recommendation_id": _scalar(first("recommendation_id")),
        "params": json.dumps(extra, sort_keys=True) if extra else None,
        "event_id": None if event_id is None or len(event_id.encode()) > 1024 else event_id,
    }


_GA4_OWN: Final = {
    *("items", "value", "purchase_revenue", "currency", "recommendation_id", "event_id"),
    *("session_id", "ga_session_id"),
}


_NOT_SET: Final = "(not set)"  # what an export has in place of what GA4 was not told


def _ga4_params(params: Any) -> dict[str, Any]:
    """{name: value}, also from the export's [{"key": ..., "value": {"string_value": ...}}]. Raises: _RowError."""
    if isinstance(params, dict):
        return params
    if not isinstance(params, list):
        return {}
    values = {}
    for entry in params:
        if not isinstance(entry, dict | list | tuple):
            raise _RowError(Refusal.JSON)
        pair = entry if isinstance(entry, dict) else dict(zip(("key", "value"), entry, strict=False))
        value = pair.get("value")
        if isinstance(value, dict):
            value = next((one for one in value.values() if one is not None), None)
        if (name := _scalar(pair.get("key"))) is not None:
            values[name] = value
    return values


def _ga4_item(item: Mapping[str, Any]) -> dict[str, Any]:
    quantity = _number(item.get("quantity"), 1e6)
    index = _number(item.get("index"), 1e6)
    if quantity is not None and quantity < 0:
        raise _RowError(Refusal.NUMBER)
    return {
        "item_id": _identifier(item.get("item_id", item.get("id")), Refusal.ITEM),
        "quantity": 1 if quantity is None else int(quantity),
        "price": _number(item.get("price"), 1e9),
        "index": None if index is None else int(index),
        "category": _description(item, "item_category", "category"),
        "brand": _description(item, "item_brand", "brand"),
    }


def _description(item: Mapping[str, Any], *names: str) -> str | None:
    """The first of these that says something. All items of which GA4 was told nothing are not of one kind."""
    texts = (_scalar(item.get(name)) for name in names)
    return next((text for text in texts if text not in (None, _NOT_SET)), None)


def _ga4_time(value: Any) -> int:
    """ms since 1970, of a number in s, ms or us, or of an ISO 8601 text (UTC unless it says otherwise)."""
    text = _scalar(value) or ""
    try:
        if text.isascii() and text.isdigit() and len(text) <= 17:
            number = int(text)  # as in `_in_ms`
            ms = number * 1000 if number < _NEWEST_MS // 1000 else number
            ms = ms // 1000 if ms >= _NEWEST_MS else ms
        else:
            moment = datetime.fromisoformat(text.replace(" UTC", "+00:00"))
            ms = round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise _RowError(Refusal.TIMESTAMP) from None
    if not _OLDEST_MS <= ms < _NEWEST_MS:
        raise _RowError(Refusal.TIMESTAMP)
    return ms


def _scalar(value: Any) -> str | None:
    """A JSON scalar as text; None for null, empty, nested and what cannot be UTF-8."""
    if value is None or value == "" or isinstance(value, dict | list):
        return None
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if "\0" not in text and _encodes(text) else None


def _encodes(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _identifier(value: Any, reason: Refusal, longest: int = 1024) -> str:
    text = _scalar(value)
    if text is None or len(text.encode()) > longest:
        raise _RowError(reason)
    return text


def _number(value: Any, bound: float) -> float | None:
    """None stays None. Raises: _RowError for what is no number within +-bound."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _RowError(Refusal.NUMBER) from None
    if not abs(number) <= bound:  # NaN neither
        raise _RowError(Refusal.NUMBER)
    return number


# ── order ────────────────────────────────────────────────────────────────────────────────────────────────────


def _sorted_by_time(
    tables: Iterable[pa.Table], scratch: Path, run_rows: int
) -> tuple[int, Iterator[pa.Table]]:
    """How many rows there are, and all of them by event time; rows of one time keep their order.

    run_rows at a time are sorted in memory; more than that goes through sorted files in `scratch`.
    """
    runs: list[Path] = []
    pending: list[pa.Table] = []
    total = waiting = 0
    for table in tables:
        pending.append(table)
        total += table.num_rows
        waiting += table.num_rows
        if waiting >= run_rows:
            runs.append(_spill(_by_time(pending), scratch / f"{len(runs)}.arrow"))
            pending, waiting = [], 0
    last = iter((_by_time(pending) if pending else _EVENTS.empty_table()).to_batches(_BLOCK))
    return total, _merged([*map(_blocks, runs), last]) if runs else last


def _by_time(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables).sort_by("timestamp").combine_chunks()


def _spill(table: pa.Table, path: Path) -> Path:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, _BLOCK)
    return path


def _blocks(run: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(run)) as source:
        reader = pa.ipc.open_file(source)
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)


def _merged(runs: Sequence[Iterator[pa.RecordBatch]]) -> Iterator[pa.Table]:
    """One sorted stream of sorted runs: in each round, all rows up to the earliest end of the blocks at hand,
    so that one block at least is used up and at most one for each run is in memory."""
    heads = [(head, run) for run in runs if (head := next(run, None)) is not None]
    while heads:
        cutoff = min(head["timestamp"][-1].as_py() for head, _ in heads)
        ready, rest = [], []
        side: Literal["left", "right"] = "right"  # of rows of that very time
        for head, run in heads:
            taken = int(np.searchsorted(np.asarray(head["timestamp"]), cutoff, side=side))
            ready.append(head.slice(0, taken))
            left = head.slice(taken) if taken < head.num_rows else next(run, None)
            if left is not None:
                rest.append((left, run))
                if left["timestamp"][0].as_py() == cutoff:
                    side = "left"  # those of later runs come after these
        yield _by_time([pa.Table.from_batches(ready)])
        heads = rest


# ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _publish(
    blocks: Iterable[pa.Table | pa.RecordBatch],
    rows: int,
    topics: TopicSettings,
    catalog: ImportCatalog,
    producer: Producer,
    codec: Encoder,
    imported: Imported,
    progress: Progress,
) -> None:
    now_ms, seen = 0, Counter[str]()  # contents of the events of this very millisecond
    for block in blocks:
        for event in _as_dicts(block):
            if event["timestamp"] != now_ms:
                now_ms, seen = event["timestamp"], Counter()
            for item in event["items"]:
                told = _take_description(item)
                if told is not None and (record := catalog.tell(item["item_id"], told)) is not None:
                    _send(producer, topics.catalog, item["item_id"], codec.encode_item(record))
                    imported.items += 1
            event["event_id"] = event["event_id"] or _event_id(event, seen)
            try:
                _send(producer, topics.topic, event["user_id"], codec.encode_event(event))
            except RecordTooLarge as error:
                imported.refuse(Refusal.TOO_LARGE, f"event {event['event_id']}", str(error))
                continue
            imported.first_ms = imported.first_ms or now_ms
            imported.last_ms = now_ms
            imported.events += 1
        progress("writing", imported.events, rows)


def _send(producer: Producer, topic: str, key: str, value: bytes) -> None:
    # the log's own time stays the time of writing: with the event's, retention would take old logs at once
    while True:
        try:
            return producer.send(topic, key.encode(), value)
        except LogFull:
            producer.flush(1.0)


def _as_dicts(block: pa.Table | pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Each row in the shape of event.avsc; its items also carry category and brand."""
    columns = [block.column(entry.name).to_pylist() for entry in _EVENTS]
    names = [entry.name for entry in _EVENTS]
    for values in zip(*columns, strict=True):
        event = dict(zip(names, values, strict=True))
        event["items"] = event["items"] or []
        event["params"] = json.loads(event["params"]) if event["params"] else {}
        yield event


def _event_id(event: Mapping[str, Any], seen: Counter[str]) -> str:
    """A hash of the event's content, and which occurrence of it within its millisecond this is."""
    content = json.dumps([event[name] for name in _CONTENT], sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=12).hexdigest()
    seen[digest] += 1
    return digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"


_CONTENT: Final = (
    *("timestamp", "name", "user_id", "session_id", "items"),
    *("value", "currency", "recommendation_id", "params"),
)


def _take_description(item: dict[str, Any]) -> dict[str, Any] | None:
    """Takes category and brand, which an Event has no place for, out of the item; returns them, and the price beside
    them; None where there is neither."""
    category, brand = item.pop("category"), item.pop("brand")
    if category is None and brand is None:
        return None
    price = item["price"] if item["price"] is not None and 0 <= item["price"] <= 1e9 else None
    return {"category": category, "brand": brand, "price": price}


# ── what the user sees ───────────────────────────────────────────────────────────────────────────────────────


class Bar:
    """A progress bar on a terminal; elsewhere a line each ten seconds, and one at the end of each phase."""

    def __init__(self, out: TextIO, clock: Callable[[], float]) -> None:
        self._out = out
        self._clock = clock  # s
        self._phase = ""
        self._started = self._shown = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` of this phase are behind us."""
        now = self._clock()
        if phase != self._phase:
            self._phase, self._started, self._shown = phase, now, now
        terminal = self._out.isatty()
        if now - self._shown < (0.1 if terminal else 10.0) and done < total:
            return
        self._shown = now
        share = done / total if total else 1.0
        bar = f"[{'#' * math.floor(share * 30):30}] " if terminal else ""
        end = "\n" if done >= total or not terminal else ""
        start = "\r" if terminal else ""
        self._out.write(f"{start}{phase} {bar}{share:4.0%} {now - self._started:.0f} s{end}")
        self._out.flush()


def _day(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
