"""Records of `events` byte by byte, so that each part of one can be replaced by something else."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import fastavro

from streaming.schemas import Codec

CODEC = Codec()
NOON = 1_767_268_800_000  # 2026-01-01T12:00


def written(schema: Any, record: Any, prefix: bytes) -> bytes:
    """A record as any Avro producer writes it."""
    out = io.BytesIO()
    out.write(prefix)
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(json.dumps(schema))), record)
    return out.getvalue()


def varint(number: int, *, pad: int = 0) -> bytes:
    """Zigzag; pad: so many bytes longer than need be."""
    number = (number << 1) ^ (number >> 63)
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    for _ in range(pad):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return varint(len(data)) + data


def real(value: float) -> bytes:
    return struct.pack("<d", value)


def some(data: bytes) -> bytes:
    """The second branch of a union."""
    return varint(1) + data


def array(*elements: bytes) -> bytes:
    return (varint(len(elements)) + b"".join(elements) if elements else b"") + varint(0)


NULL = varint(0)


def line(
    item: str | bytes = "a", quantity: bytes = varint(1), price: bytes = NULL, index: bytes = NULL
) -> bytes:
    return text(item) + quantity + price + index


def slot(item: str = "a", propensity: float = 0.5) -> bytes:
    return text(item) + real(propensity)


def entry(item: str = "a", name: str = "view_item", at: int = NOON, value: float = 1.0) -> bytes:
    return text(item) + text(name) + varint(at) + struct.pack("<f", value)


def an_event(frame: bytes = CODEC.encode_event(
    {"event_id": "e", "name": "n", "user_id": "u", "timestamp": NOON})[:10], **fields: bytes) -> bytes:  # fmt: skip
    """An Event with some fields' bytes replaced."""
    return frame + b"".join(
        {
            "event_id": text("e1"), "name": text("purchase"), "user_id": text("ann"), "session_id": NULL,
            "timestamp": varint(NOON), "items": array(line("a", price=some(real(9.5))), line("b")),
            "value": some(real(19.0)), "currency": some(text("EUR")), "recommendation_id": some(text("r1")),
            "params": array(text("k") + text("v")), **fields,
        }.values()
    )  # fmt: skip


def a_decision(**fields: bytes) -> bytes:
    """A Decision with some fields' bytes replaced."""
    frame = CODEC.encode_decision(
        {
            "recommendation_id": "r",
            "user_id": "u",
            "timestamp": NOON,
            "slate": [{"item_id": "a", "propensity": 1.0}],
        }
    )[:10]
    return frame + b"".join(
        {
            "recommendation_id": text("r1"), "user_id": text("ann"), "session_id": NULL, "timestamp": varint(NOON),
            "history": array(entry("c")), "slate": array(slot("a"), slot("b")), "epsilon": real(0.1),
            "policy_version": varint(7), "strategy": varint(1), "bucket": text(""), "candidates": NULL, **fields,
        }.values()
    )  # fmt: skip


def candidate(item: str = "a", price: bytes = NULL, vector: bytes = NULL) -> bytes:
    return text(item) + NULL + NULL + price + vector


GOOD, DECIDED = an_event(), a_decision()
