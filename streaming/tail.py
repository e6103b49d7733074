"""A readable view of a topic: one line for each record, whatever its schema, and whether it can be read or not."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from streaming.log import Bounds, Log, LogUnavailable, RecordBatch
from streaming.schemas import DEAD_LETTER, DECISION, EVENT, ITEM, Codec, RegistryUnavailable, SchemaError

_BATCH: Final = 1000
_POLL_S: Final = 0.5
_QUIET_S: Final = 30.0  # of silence, before the end: then what is there does not come
_LOOK_S: Final = 5.0  # for partitions added since
_SHOWN: Final = 10  # items of one record, and bytes of what cannot be read

Clock = Callable[[], float]  # monotonic seconds


class Line(NamedTuple):
    """One record and where it stands."""

    timestamp_ms: int  # the log's own
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


def newest(log: Log, topic: str, count: int, bounds: Mapping[int, Bounds]) -> list[Line]:
    """The last `count` records within the bounds by the log's time, oldest first; fewer where there are no more."""
    ends = {p: b.high for p, b in bounds.items()}
    span = count
    while True:
        starts = {p: max(b.low, b.high - span) for p, b in bounds.items()}
        lines = sorted(between(log, topic, starts, ends))
        if len(lines) >= count or all(starts[p] == bounds[p].low for p in bounds):
            return lines[max(0, len(lines) - count) :]
        span *= 8  # offsets have holes


def between(log: Log, topic: str, starts: Mapping[int, int], ends: Mapping[int, int]) -> Iterator[Line]:
    """The records from `starts` up to `ends` of each partition."""
    for batch in records_between(log, topic, starts, ends):
        yield from (line for line in lines_of(batch) if line.offset < ends[line.partition])


def records_between(
    log: Log,
    topic: str,
    starts: Mapping[int, int],
    ends: Mapping[int, int],
    clock: Clock = time.monotonic,
) -> Iterator[RecordBatch]:
    """Batches, with keys, of the records from `starts` up to `ends` or a little beyond, for each partition.

    Raises: LogUnavailable, also where what is there does not come: it must not seem to be all.
    """
    todo = {p: start for p, start in starts.items() if start < ends[p]}
    if not todo:
        return
    reader = log.reader(topic, todo, keys=True)
    try:
        heard = clock()
        while any(position < ends[p] for p, position in reader.position().items()):
            batch = reader.poll(_BATCH, _POLL_S)
            if len(batch):
                heard = clock()
                yield batch
            elif clock() - heard > _QUIET_S:
                raise LogUnavailable(
                    f"{topic} could not be read to its end: nothing came in {_QUIET_S:.0f} s; is the log up?"
                )
    finally:
        reader.close()


def follow(log: Log, topic: str, starts: Mapping[int, int], clock: Clock = time.monotonic) -> Iterator[Line]:
    """Records from `starts` on, as they come, for ever; partitions that are added are read from their beginning."""
    reader = log.reader(topic, starts, keys=True)
    looked = clock()
    try:
        while True:
            try:
                yield from lines_of(reader.poll(_BATCH, _POLL_S))
                if clock() - looked > _LOOK_S:
                    looked = clock()
                    added = {p: b.low for p, b in log.bounds(topic).items() if p not in reader.position()}
                    if added:
                        reader.assign({**reader.position(), **added})
            except LogUnavailable:
                time.sleep(_POLL_S)  # it comes back, or Ctrl-C
    finally:
        reader.close()


def lines_of(batch: RecordBatch) -> list[Line]:
    """A batch's records, one by one."""
    return [
        Line(
            int(batch.timestamp_ms[i]),
            int(batch.partition[i]),
            int(batch.offset[i]),
            batch.keys[i] if batch.keys is not None else None,
            batch.value(i),
        )
        for i in range(len(batch))
    ]


def as_text(line: Line, topic: str, codec: Codec) -> str:
    """The record on one line. Control characters in it are escaped: it may go to a terminal."""
    where = f"{_time(line.timestamp_ms)} {topic}/{line.partition}@{line.offset}"
    if line.value is None:
        return f"{where} tombstone of {_key(line.key)}"
    try:
        name, record = codec.decode(line.value)
    except (SchemaError, RegistryUnavailable) as error:
        return f"{where} unreadable: {_escaped(str(error))}; {_bytes(line.value)}"
    return f"{where} {_DESCRIBED[name](record, codec)}"


def as_json(line: Line, topic: str, codec: Codec) -> str:
    """The record as one JSON object. Bytes are base64; `record` is null, and `error` says why, if it is unreadable."""
    schema: str | None = None
    record: dict[str, Any] | None = None
    error: str | None = None
    if line.value is not None:
        try:
            schema, record = codec.decode(line.value)
        except (SchemaError, RegistryUnavailable) as refused:
            error = str(refused)
    out = {
        "topic": topic,
        "partition": line.partition,
        "offset": line.offset,
        "log_timestamp": line.timestamp_ms,
        "key": None if line.key is None else line.key.decode(errors="backslashreplace"),
        "schema": schema,
        "record": record,
    }
    if error is not None:
        out |= {"error": error, "value": line.value}
    return json.dumps(out, ensure_ascii=False, default=lambda raw: base64.b64encode(raw).decode())


def _event(record: Mapping[str, Any], codec: Codec) -> str:
    items = [
        item["item_id"]
        + (f"×{item['quantity']}" if item["quantity"] != 1 else "")
        + (f" at {item['price']:g}" if item["price"] is not None else "")
        for item in record["items"]
    ]
    parts = [
        record["name"],
        f"user={record['user_id']}",
        *([f"items=[{_few(items)}]"] if items else []),
        *([f"value={record['value']:g}"] if record["value"] is not None else []),
        *([f"recommendation={record['recommendation_id']}"] if record["recommendation_id"] else []),
        f"at={_time(record['timestamp'])}",
    ]
    return " ".join(map(_escaped, parts))


def _decision(record: Mapping[str, Any], codec: Codec) -> str:
    slate = [f"{slot['item_id']}:{slot['propensity']:.2g}" for slot in record["slate"]]
    parts = [
        "decision",
        f"user={record['user_id']}",
        f"slate=[{_few(slate)}]",
        f"by={record['strategy']} version={record['policy_version']} ε={record['epsilon']:g}",
        f"history={len(record['history'])}",
        *([f"candidates={len(record['candidates'])}"] if record["candidates"] is not None else []),
        f"id={record['recommendation_id']}",
        f"at={_time(record['timestamp'])}",
    ]
    return " ".join(map(_escaped, parts))


def _item(record: Mapping[str, Any], codec: Codec) -> str:
    parts = [
        f"item {record['item_id']}",
        *(f"{name}={record[name]}" for name in ("title", "category", "brand") if record[name] is not None),
        *([f"price={record['price']:g}"] if record["price"] is not None else []),
        *([f"vector[{len(record['vector'])}]"] if record["vector"] else []),
        *([] if record["in_stock"] else ["out of stock"]),
    ]
    return " ".join(map(_escaped, parts))


def _dead_letter(record: Mapping[str, Any], codec: Codec) -> str:
    head = f"{record['reason']} from {record['topic']}/{record['partition']}@{record['offset']}"
    head += "" if record["key"] is None else f" key={_key(record['key'])}"
    value = record["value"]
    if value is None:
        return f"{_escaped(head)} (no value)"
    try:
        name, inner = codec.decode(value)
    except (SchemaError, RegistryUnavailable):
        return f"{_escaped(head)} {_bytes(value)}"
    return f"{_escaped(head)} {_DESCRIBED[name](inner, codec)}" if name != DEAD_LETTER else _escaped(head)


_DESCRIBED: Final[Mapping[str, Callable[[Mapping[str, Any], Codec], str]]] = {
    EVENT: _event,
    DECISION: _decision,
    ITEM: _item,
    DEAD_LETTER: _dead_letter,
}


def _few(texts: list[str]) -> str:
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f", and {more} more" if more > 0 else "")


def _key(key: bytes | None) -> str:
    return "no key" if key is None else _escaped(key.decode(errors="backslashreplace"))


def _bytes(value: bytes) -> str:
    return f"{len(value):,} bytes{': ' if value else ''}{value[:_SHOWN].hex(' ')}{' …' if len(value) > _SHOWN else ''}"


def _escaped(text: str) -> str:
    r"""Without characters that could move a cursor or start a line.

    >>> print(_escaped("a\x1b[2Jb\n"))
    a\x1b[2Jb\n
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _time(ms: int) -> str:
    """
    >>> _time(1_700_000_000_123)
    '2023-11-14T22:13:20.123Z'
    """
    try:
        return (
            datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        )
    except (OverflowError, ValueError, OSError):
        return f"{ms} ms"
