"""Records for tests, as people write them, and the columns that the decoder would have made of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from streaming.columns import Columns, Kind, Reason
from streaming.plain_joiner import Id, Line, Row, Seen
from streaming.rewards import CODES, OTHER

START_MS = 1_767_225_600_000  # 2026-01-01: where `at=0` lies

DTYPES: dict[str, Any] = {
    "kind": np.uint8, "reason": np.uint8, "partition": np.int32, "offset": np.int64, "id": np.uint64,
    "user": np.uint64, "timestamp_ms": np.int64, "logged_ms": np.int64, "name": np.uint8, "recommendation": np.uint64,
    "value": np.float64, "epsilon": np.float32, "policy_version": np.int64, "misplaced": np.bool_,
    "candidates": np.bool_, "item_bounds": np.int64, "item": np.int32, "quantity": np.int32,
    "price": np.float64, "propensity": np.float32, "history_bounds": np.int64, "history_item": np.int32,
    "history_name": np.uint8, "history_timestamp_ms": np.int64, "history_value": np.float32,
}  # fmt: skip


def ms(at: float) -> int:
    """Event time `at` seconds after START_MS, in ms."""
    return START_MS + round(at * 1000)


_unique = 0


def _fresh_id(prefix: str) -> str:
    global _unique
    _unique += 1
    return f"{prefix}{_unique}"


def event(
    name: str,
    *items: int | tuple[int, int, float],
    at: float,
    user: str = "ann",
    id: str | None = None,
    recommendation: str = "",
    value: float = math.nan,
    partition: int = 0,
) -> Row:
    """An event; an item is a vocabulary id, or (id, quantity, price)."""
    lines = tuple(Line(i) if isinstance(i, int) else Line(*i) for i in items)
    return Row(Kind.EVENT, _fresh_id("event") if id is None else id, user, ms(at), name, recommendation, value,
               lines, partition=partition)  # fmt: skip


def decision(
    id: str,
    *slate: int,
    at: float,
    user: str = "ann",
    history: Sequence[tuple[int, str, float]] = (),
    partition: int = 0,
    policy_version: int = 1,
) -> Row:
    """A decision; history entries are (item, name, at), oldest first."""
    lines = tuple(Line(item, propensity=0.5) for item in slate)
    seen = tuple(Seen(item, name, ms(when)) for item, name, when in history)
    return Row(Kind.DECISION, id, user, ms(at), lines=lines, history=seen, partition=partition,
               policy_version=policy_version)  # fmt: skip


def bad(partition: int = 0) -> Row:
    """A record that could not be decoded."""
    return Row(Kind.BAD, "", "", 0, partition=partition, reason=Reason.TRUNCATED)


def logged(rows: Iterable[Row]) -> list[Row]:
    """The rows with the offsets that a log would give them: 0, 1, 2, ... in each partition."""
    ends: dict[int, int] = {}
    placed = []
    for row in rows:
        placed.append(replace(row, offset=ends.get(row.partition, 0)))
        ends[row.partition] = placed[-1].offset + 1
    return placed


def hashed(text: Id) -> int:
    """A 64-bit hash, 0 for the empty string."""
    return (
        int.from_bytes(hashlib.blake2b(str(text).encode(), digest_size=8).digest(), "little") if text else 0
    )


def columns(rows: Sequence[Row]) -> Columns:
    """The rows, which must have offsets (see `logged`), as the decoder's columns."""
    lines = [line for row in rows for line in row.lines]
    history = [seen for row in rows for seen in row.history]
    values: dict[str, list[Any]] = {
        "kind": [row.kind for row in rows],
        "reason": [row.reason for row in rows],
        "partition": [row.partition for row in rows],
        "offset": [row.offset for row in rows],
        "id": [hashed(row.id) for row in rows],
        "user": [hashed(row.user) for row in rows],
        "timestamp_ms": [row.timestamp_ms for row in rows],
        "logged_ms": [row.logged_ms for row in rows],
        "name": [CODES.get(row.name, OTHER if row.name else 0) for row in rows],
        "recommendation": [hashed(row.recommendation) for row in rows],
        "value": [row.value for row in rows],
        "epsilon": [0.0] * len(rows),
        "policy_version": [row.policy_version for row in rows],
        "misplaced": [row.misplaced for row in rows],
        "candidates": [False] * len(rows),
        "item_bounds": np.cumsum([0, *(len(row.lines) for row in rows)]).tolist(),
        "item": [line.item for line in lines],
        "quantity": [line.quantity for line in lines],
        "price": [line.price for line in lines],
        "propensity": [line.propensity for line in lines],
        "history_bounds": np.cumsum([0, *(len(row.history) for row in rows)]).tolist(),
        "history_item": [seen.item for seen in history],
        "history_name": [CODES.get(seen.name, OTHER) for seen in history],
        "history_timestamp_ms": [seen.timestamp_ms for seen in history],
        "history_value": [seen.value for seen in history],
    }
    return Columns(**{field: np.array(values[field], DTYPES[field]) for field in Columns._fields})
