"""Bytes → columns: one pass of a numba decoder over a batch of records, with an error code for each row."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Kind(IntEnum):
    """Which schema a record had."""

    BAD = 0  # see Columns.reason
    EVENT = 1
    DECISION = 2


class Reason(IntEnum):
    """Why a record went to events.dlq or events.late. Values are stored: append, never reorder."""

    OK = 0
    EMPTY = 1  # null or zero bytes
    BAD_FRAME = 2  # neither Confluent's nor single-object framing, or too short for it
    UNKNOWN_SCHEMA = 3  # fingerprint or schema id that is none of ours
    TRUNCATED = 4  # ends inside a field
    TRAILING_BYTES = 5
    BAD_VARINT = 6  # over-long, or out of range for its type
    BAD_LENGTH = 7  # negative, or over its bound
    BAD_INDEX = 8  # union or enum index out of range
    BAD_UTF8 = 9  # or U+0000 in a string
    EMPTY_STRING = 10  # an id or name that must not be empty
    TOO_LONG = 11  # an id, a name or an array over its bound
    BAD_NUMBER = 12  # NaN, Inf or out of range
    BAD_TIMESTAMP = 13  # not within 2000..2100 in ms
    BAD_PROPENSITY = 14  # not in (0, 1]
    EMPTY_SLATE = 15
    DUPLICATE_SLOT = 16  # one item twice in a slate
    LATE = 17  # older than the limit, by the partition's watermark
    UNREADABLE = 18  # a catalog record that its own schema cannot read
    OTHER_KEY = 19  # a catalog record whose key is not its item_id


class Columns(NamedTuple):
    """N records as columns, in the order of the batch. Strings are hashed to 64 bits (0: null or empty);
    items are vocabulary ids. Where kind is BAD, only partition, offset and reason mean anything.

    Record i's items (an event's items; a decision's slate) are `item[item_bounds[i]:item_bounds[i + 1]]`, its
    history (decisions only, oldest first as it was sent) `history_item[history_bounds[i]:history_bounds[i + 1]]`.
    """

    kind: npt.NDArray[np.uint8]  # [N] Kind
    reason: npt.NDArray[np.uint8]  # [N] Reason; OK unless BAD
    partition: npt.NDArray[np.int32]  # [N]
    offset: npt.NDArray[np.int64]  # [N]
    id: npt.NDArray[np.uint64]  # [N] event_id, or recommendation_id of a decision
    user: npt.NDArray[np.uint64]  # [N]
    timestamp_ms: npt.NDArray[np.int64]  # [N]
    logged_ms: npt.NDArray[
        np.int64
    ]  # [N] when the log took it in, by its own time stamp; 0 or less: it does not say
    name: npt.NDArray[np.uint8]  # [N] event-name code; 0 for decisions
    recommendation: npt.NDArray[np.uint64]  # [N] an event's recommendation_id, 0 where null
    value: npt.NDArray[np.float64]  # [N] an event's value, NaN where null
    epsilon: npt.NDArray[np.float32]  # [N]
    policy_version: npt.NDArray[np.int64]  # [N]
    misplaced: npt.NDArray[np.bool_]  # [N] murmur2(user_id) names another partition (False where unchecked)
    candidates: npt.NDArray[
        np.bool_
    ]  # [N] a decision that carries its candidates; read that row with the codec
    item_bounds: npt.NDArray[np.int64]  # [N + 1]
    item: npt.NDArray[np.int32]  # [M]
    quantity: npt.NDArray[np.int32]  # [M] 1 for slots
    price: npt.NDArray[np.float64]  # [M] NaN where null
    propensity: npt.NDArray[np.float32]  # [M] NaN for events
    history_bounds: npt.NDArray[np.int64]  # [N + 1]
    history_item: npt.NDArray[np.int32]  # [L]
    history_name: npt.NDArray[np.uint8]  # [L]
    history_timestamp_ms: npt.NDArray[np.int64]  # [L]
    history_value: npt.NDArray[np.float32]  # [L]
