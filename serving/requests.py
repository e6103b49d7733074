"""What a request may hold. `parse` and the checks turn wrong input into `Invalid`, which names field and bound.

The bounds are those of proto/policy.proto. They are at least as strict as the decoder's (streaming/columns.py), so that
a request that was answered never leaves a decision behind that the learner has to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from serving import policy_pb2 as pb
from streaming.schemas import MAX_VECTOR

MAX_ID_BYTES: Final = 1024
MAX_NAME_BYTES: Final = 64
MAX_SLATE: Final = 1000
MAX_HISTORY: Final = 1000
MAX_CANDIDATES: Final = 10_000
MAX_EXCLUDED: Final = 10_000
MAX_PRICE: Final = 1e9
MAX_MESSAGE_BYTES: Final = 64 << 20  # 1000 requests, or 10000 candidates with vectors; and what answers them
MAX_BATCH: Final = 1000
MIN_TIMESTAMP_MS: Final = 946_684_800_000  # 2000-01-01
MAX_TIMESTAMP_MS: Final = 4_102_444_800_000  # 2100-01-01

Message = TypeVar("Message")


class Invalid(ValueError):
    """A request out of bounds; the message names the field, its value and the bound."""


def parse(message: type[Message], data: bytes) -> Message:
    """The message that `data` holds.

    gRPC's own deserializer would answer INTERNAL, which blames the server; hence here.
    Raises: Invalid when the bytes are no such message.
    """
    try:
        parsed: Message = message.FromString(data)  # type: ignore[attr-defined]
    except DecodeError as error:
        raise Invalid(f"request: {len(data)} bytes that are no {message.__name__} ({error})") from None
    return parsed


def check_recommend(request: pb.RecommendRequest, where: str = "") -> None:
    """Raises Invalid unless every field is within its bounds. where: prefix of field names in messages."""
    _text(f"{where}user_id", request.user_id, 1, MAX_ID_BYTES)
    _text(f"{where}session_id", request.session_id, 0, MAX_ID_BYTES)
    _count(f"{where}slate_size", request.slate_size, MAX_SLATE)
    _count(f"{where}history entries", len(request.history), MAX_HISTORY)
    _count(f"{where}candidates", len(request.candidates), MAX_CANDIDATES)
    _count(f"{where}exclude_item_ids", len(request.exclude_item_ids), MAX_EXCLUDED)
    _timestamp(f"{where}timestamp_ms", request.timestamp_ms)
    if request.HasField("epsilon"):
        _number(f"{where}epsilon", request.epsilon, 0.0, 1.0)
    for i, entry in enumerate(request.history):
        _check_entry(f"{where}history[{i}]", entry)
    for i, candidate in enumerate(request.candidates):
        _check_candidate(f"{where}candidates[{i}]", candidate)
    _check_distinct(where, [candidate.item_id for candidate in request.candidates])


def check_batch(request: pb.BatchRecommendRequest) -> None:
    """Raises Invalid, naming the position of the first bad request."""
    if not 1 <= len(request.requests) <= MAX_BATCH:
        raise Invalid(f"requests: {len(request.requests)} of them; allowed are 1..{MAX_BATCH}")
    for i, one in enumerate(request.requests):
        check_recommend(one, f"requests[{i}].")


def _check_entry(where: str, entry: pb.HistoryEntry) -> None:
    _text(f"{where}.item_id", entry.item_id, 1, MAX_ID_BYTES)
    _text(f"{where}.name", entry.name, 0, MAX_NAME_BYTES)
    _timestamp(f"{where}.timestamp_ms", entry.timestamp_ms)
    if not math.isfinite(entry.value):
        raise Invalid(f"{where}.value: {entry.value}; must be finite")


def _check_candidate(where: str, candidate: pb.Candidate) -> None:
    _text(f"{where}.item_id", candidate.item_id, 1, MAX_ID_BYTES)
    _text(f"{where}.category", candidate.category, 0, MAX_ID_BYTES)
    _text(f"{where}.brand", candidate.brand, 0, MAX_ID_BYTES)
    if candidate.HasField("price"):
        _number(f"{where}.price", candidate.price, 0.0, MAX_PRICE)
    _count(f"{where}.vector numbers", len(candidate.vector), MAX_VECTOR)
    if not math.isfinite(sum(candidate.vector)):  # 256 floats cannot overflow a double
        i, x = next((i, x) for i, x in enumerate(candidate.vector) if not math.isfinite(x))
        raise Invalid(f"{where}.vector[{i}]: {x}; must be finite")


def _check_distinct(where: str, item_ids: Iterable[str]) -> None:
    seen: dict[str, int] = {}
    for i, item_id in enumerate(item_ids):
        first = seen.setdefault(item_id, i)
        if first != i:
            raise Invalid(
                f"{where}candidates[{i}].item_id: {item_id[:80]!r} again (also at {first}); no duplicates"
            )


def _text(field: str, value: str, low: int, high: int) -> None:
    # a character is at most 4 bytes: the short ones, nearly all, need no encoding to be counted
    if len(value) * 4 > high or len(value) < low:
        size = len(value.encode())
        if not low <= size <= high:
            raise Invalid(f"{field}: {size} bytes; allowed are {low}..{high}")
    if "\0" in value:
        raise Invalid(f"{field}: holds U+0000, which no id or name may")


def _count(field: str, value: int, high: int) -> None:
    if value > high:
        raise Invalid(f"{field}: {value}; at most {high}")


def _number(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also false for NaN
        raise Invalid(f"{field}: {value}; must be within {low:g}..{high:g}")


def _timestamp(field: str, value: int) -> None:
    if value and not MIN_TIMESTAMP_MS <= value < MAX_TIMESTAMP_MS:
        raise Invalid(f"{field}: {value}; must be ms since 1970 within 2000..2100, or 0{_hint(value)}")


def _hint(value: int) -> str:
    seconds = MIN_TIMESTAMP_MS // 1000 <= value < MAX_TIMESTAMP_MS // 1000
    return " (these look like seconds: multiply by 1000)" if seconds else ""
