"""Records → columns: a compiled loop runs the plan of each record's writer schema over one buffer of bytes.

No Python object is made for any record. Every row comes out as an event, a decision, or BAD with its reason;
bounds are those that proto/event.avsc and proto/decision.avsc state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streaming.columns import Columns, Kind, Reason
from streaming.interning import (
    MISSING,
    HashMap,
    Tables,
    Vocabulary,
    foresee,
    frozen,
    has_room,
    hash_bytes,
    hash_string,
    intern,
    load64,
    map_get,
    map_of,
)
from streaming.jit import jit, part
from streaming.log import RecordBatch
from streaming.pinned import pin
from streaming.plan import Op, Plan, Rule, SchemaMismatch, compile_plan, joined
from streaming.rewards import CODES, OTHER
from streaming.schemas import DECISION, EVENT, MAX_VECTOR, Codec, frame_of, ours

logger = logging.getLogger(__name__)

# Registers: whole numbers, and texts of three (hash, start, length) ...
_ID: Final = 0
_USER: Final = 3
_NAME: Final = 6
_RECOMMENDATION: Final = 9
_ITEM: Final = 12
_TIME: Final = 15
_QUANTITY: Final = 16
_VERSION: Final = 17
_CANDIDATES: Final = 18
_ENTRY_NAME: Final = 19
_ENTRY_TIME: Final = 22
_REGISTERS: Final = 23
# ... and real ones
_VALUE: Final = 0
_PRICE: Final = 1
_EPSILON: Final = 2
_PROPENSITY: Final = 3
_ENTRY_VALUE: Final = 4
_REALS: Final = 5
# tables
_LINES: Final = 0  # an event's items
_SLATE: Final = 1
_HISTORY: Final = 2

_MAX_ELEMENTS: Final = 1000  # of items, a slate, a history: each as its schema says
_MAX_NOTHINGS: Final = 1_000_000  # elements without bytes: whoever reads such records one by one needs an end
_MAX_DEPTH: Final = 64  # of arrays and records within each other
_SORT_ABOVE: Final = 32  # slots, from which on sorting beats comparing them all
_FLOAT_MAX: Final = float(np.finfo(np.float32).max)

_YEAR_2000: Final = 946_684_800_000
_YEAR_2100: Final = 4_102_444_800_000


def _id(register: int) -> Rule:
    return Rule("text", register, 1, 1024)


def _name(register: int) -> Rule:
    return Rule("text", register, 1, 64)


def _moment(register: int) -> Rule:
    return Rule("whole", register, _YEAR_2000, _YEAR_2100 - 1, Reason.BAD_TIMESTAMP)


def _number(register: int, low: float, high: float) -> Rule:
    return Rule("real", register, low, high, Reason.BAD_NUMBER)


EVENT_RULES: Final = {
    "event_id": _id(_ID),
    "name": _name(_NAME),
    "user_id": _id(_USER),
    "timestamp": _moment(_TIME),
    "items": Rule("table", _LINES, high=_MAX_ELEMENTS),
    "items.item_id": _id(_ITEM),
    "items.quantity": Rule("whole", _QUANTITY, 0, 1_000_000, Reason.BAD_NUMBER),
    "items.price": _number(_PRICE, -1e9, 1e9),
    "value": _number(_VALUE, -1e12, 1e12),
    "recommendation_id": Rule("text", _RECOMMENDATION),
}
DECISION_RULES: Final = {
    "recommendation_id": _id(_ID),
    "user_id": _id(_USER),
    "timestamp": _moment(_TIME),
    "history": Rule("table", _HISTORY, high=_MAX_ELEMENTS),
    "history.item_id": _id(_ITEM),
    "history.name": _name(_ENTRY_NAME),
    "history.timestamp": _moment(_ENTRY_TIME),
    "history.value": _number(_ENTRY_VALUE, -_FLOAT_MAX, _FLOAT_MAX),
    "slate": Rule("table", _SLATE, high=_MAX_ELEMENTS),
    "slate.item_id": _id(_ITEM),
    # 5e-324 is the least number above 0
    "slate.propensity": Rule("real", _PROPENSITY, 5e-324, 1.0, Reason.BAD_PROPENSITY),
    "epsilon": _number(_EPSILON, 0.0, 1.0),
    "policy_version": Rule("whole", _VERSION),
    "candidates": Rule("present", _CANDIDATES),
    "candidates[].item_id": _id(_ITEM),
    "candidates[].price": _number(_PRICE, 0.0, 1e9),
    # those of one batch are kept side by side, each as wide as the longest
    "candidates[].vector": Rule("array", high=MAX_VECTOR),
    "candidates[].vector[]": _number(_PRICE, -_FLOAT_MAX, _FLOAT_MAX),
}
_CONTRACTS: Final = {EVENT: (Kind.EVENT, EVENT_RULES), DECISION: (Kind.DECISION, DECISION_RULES)}


class Decoder:
    """Turns batches of the topic `events` into columns; items get their ids from `vocabulary` on the way.

    partitions: how many the topic has (or a function that says so now), to mark users whose producer hashes
    keys otherwise than we do; None: not checked. One thread owns a decoder.
    """

    def __init__(
        self,
        codec: Codec,
        vocabulary: Vocabulary,
        partitions: Callable[[], int] | int | None = None,
    ) -> None:
        self._codec = codec
        self._vocabulary = vocabulary
        self._partitions = partitions
        self._plans: list[tuple[Kind, Plan]] = []
        self._frames: dict[bytes, int] = {}  # prefix → index into plans; MISSING: none of our contracts
        for prefix, writer in codec.writer_schemas().items():
            self._learn(prefix, writer)
        self._programs = self._compiled()

    def decode(self, batch: RecordBatch) -> Columns:
        """The batch as columns, row for row.

        Ids are given to items in the order of the rows, a slate before its history, whatever the cuts between
        batches; items of BAD rows get none.
        Raises: RegistryUnavailable when a record's schema cannot be asked for now; nothing was interned then,
        and the same batch may be tried again.
        """
        batch = _uniform(batch)
        columns, items, history = self._run(batch)
        unknown = np.flatnonzero(columns.reason == Reason.UNKNOWN_SCHEMA)
        if len(unknown) and self._ask_for(batch, unknown):
            columns, items, history = self._run(batch)
        self._intern(batch, columns, items, history)
        return columns

    def knows(self, frame: bytes) -> bool:
        """Whether records with this frame can be read now."""
        return self._frames.get(frame, MISSING) != MISSING

    # --- schemas ---

    def _ask_for(self, batch: RecordBatch, rows: npt.NDArray[np.int64]) -> bool:
        """Learn the writer schemas of these rows where there are any; True if one was."""
        frames = [frame_of(batch, int(row)) for row in rows]
        learned = False
        try:
            for prefix in dict.fromkeys(frames):
                writer = None if prefix is None or prefix in self._frames else self._codec.resolve(prefix)
                if prefix is not None and writer is not None:
                    learned |= self._learn(prefix, writer)
        finally:  # those that were learnt stay so, where another cannot be asked for now
            if learned:
                self._programs = self._compiled()
        return learned

    def _learn(self, prefix: bytes, writer: Any) -> bool:
        self._frames[prefix] = MISSING
        name = ours(writer)
        if name not in _CONTRACTS:
            return False
        kind, rules = _CONTRACTS[name]
        try:
            plan = compile_plan(writer, self._codec.reader_schemas()[name], rules)
        except SchemaMismatch as error:
            logger.warning("records framed %s are dead-lettered: no %s: %s", prefix.hex(), name, error)
            return False
        self._frames[prefix] = len(self._plans)
        self._plans.append((kind, plan))
        return True

    def _compiled(self) -> _Programs:
        plan, starts = joined([plan for _, plan in self._plans])
        known = {prefix: index for prefix, index in self._frames.items() if index != MISSING}
        single = {int.from_bytes(p[2:], "little"): i for p, i in known.items() if len(p) == 10}
        confluent = {int.from_bytes(p[1:], "big"): i for p, i in known.items() if len(p) == 5}
        kinds = np.array([kind for kind, _ in self._plans], np.uint8)
        return _Programs(plan, np.array(starts, np.int64), kinds, _map(single), _map(confluent))

    # --- rows ---

    def _run(self, batch: RecordBatch) -> tuple[Columns, _Spans, _Spans]:
        columns = _blank(batch)
        items, history = _spans(4 * len(batch)), _spans(4 * len(batch))
        partitions = self._partitions() if callable(self._partitions) else self._partitions
        source = _Source(batch.data, batch.bounds, batch.null)
        scratch = _Scratch.new()
        row = 0
        while True:
            row = _decode_rows(
                source, self._programs, _NAMES, partitions or 0, columns, items, history, scratch, row
            )  # fmt: skip
            if row == len(batch):
                break
            columns, items, history = _enlarged(columns, items, history)
        m, n = scratch.filled
        lines = {f: getattr(columns, f)[:m] for f in _ITEM_COLUMNS}
        entries = {f: getattr(columns, f)[:n] for f in _HISTORY_COLUMNS}
        return columns._replace(**lines, **entries), items, history

    def _intern(self, batch: RecordBatch, columns: Columns, items: _Spans, history: _Spans) -> None:
        source = _Source(batch.data, batch.bounds, batch.null)
        row = 0
        while True:
            tables = self._vocabulary.tables
            row = _intern_rows(source, columns, items, history, tables, row)
            if row == len(batch):
                return
            bounds = columns.item_bounds, columns.history_bounds
            spans = sum(int(b[row + 1] - b[row]) for b in bounds)
            self._vocabulary.reserve(spans, int(batch.bounds[row + 1] - batch.bounds[row]))


class _Source(NamedTuple):
    """The records' bytes, as in RecordBatch."""

    data: npt.NDArray[np.uint8]
    bounds: npt.NDArray[np.int64]
    null: npt.NDArray[np.bool_]


class _Scratch(NamedTuple):
    """What the loop works with. (Arrays that it made itself would be counted at each call.)"""

    registers: npt.NDArray[np.int64]
    reals: npt.NDArray[np.float64]
    stack: npt.NDArray[
        np.int64
    ]  # loops (elements left in the block, elements so far) and calls (row to return to)
    filled: npt.NDArray[np.int64]  # [2] items and history entries of the rows that are done
    fill: npt.NDArray[np.int64]  # [2] the same with those of the present row

    @classmethod
    def new(cls) -> _Scratch:
        whole = [np.zeros(shape, np.int64) for shape in (_REGISTERS, (_MAX_DEPTH, 2), 2, 2)]
        return cls(whole[0], np.zeros(_REALS, np.float64), *whole[1:])


class _Programs(NamedTuple):
    """All plans, and which frame calls for which."""

    plan: Plan
    starts: npt.NDArray[np.int64]  # [plans] first row of each
    kinds: npt.NDArray[np.uint8]  # [plans] Kind
    single: HashMap  # fingerprint → plan
    confluent: HashMap  # schema id → plan


class _Spans(NamedTuple):
    """Where in the batch's bytes each item's id lies."""

    key: npt.NDArray[np.uint64]  # [M] hash
    start: npt.NDArray[np.int64]  # [M]
    length: npt.NDArray[np.int64]  # [M]


_ITEM_COLUMNS: Final = ("item", "quantity", "price", "propensity")
_HISTORY_COLUMNS: Final = ("history_item", "history_name", "history_timestamp_ms", "history_value")


def _map(entries: dict[int, int]) -> HashMap:
    return map_of(np.array(list(entries), np.uint64), np.array(list(entries.values()), np.int64))


_NAMES: Final = _map({hash_string(name): code for name, code in CODES.items()})


def _uniform(batch: RecordBatch) -> RecordBatch:
    """The same batch, its arrays of one layout whatever log they come from: each other one would be compiled for."""
    return RecordBatch(
        partition=np.array(batch.partition, np.int32),
        offset=np.array(batch.offset, np.int64),
        timestamp_ms=batch.timestamp_ms,
        data=frozen(batch.data),
        bounds=np.array(batch.bounds, np.int64),
        null=np.array(batch.null, np.bool_),
        keys=batch.keys,
    )


def _blank(batch: RecordBatch) -> Columns:
    """Columns with a row for each record, all BAD, and some room for items."""
    n, room = len(batch), 4 * len(batch) + _MAX_ELEMENTS
    return Columns(
        kind=np.zeros(n, np.uint8),
        reason=np.zeros(n, np.uint8),
        partition=batch.partition,
        offset=batch.offset,
        id=np.zeros(n, np.uint64),
        user=np.zeros(n, np.uint64),
        timestamp_ms=np.zeros(n, np.int64),
        logged_ms=np.array(batch.timestamp_ms, np.int64),
        name=np.zeros(n, np.uint8),
        recommendation=np.zeros(n, np.uint64),
        value=np.zeros(n, np.float64),
        epsilon=np.zeros(n, np.float32),
        policy_version=np.zeros(n, np.int64),
        misplaced=np.zeros(n, np.bool_),
        candidates=np.zeros(n, np.bool_),
        item_bounds=np.zeros(n + 1, np.int64),
        item=np.empty(room, np.int32),
        quantity=np.empty(room, np.int32),
        price=np.empty(room, np.float64),
        propensity=np.empty(room, np.float32),
        history_bounds=np.zeros(n + 1, np.int64),
        history_item=np.empty(room, np.int32),
        history_name=np.empty(room, np.uint8),
        history_timestamp_ms=np.empty(room, np.int64),
        history_value=np.empty(room, np.float32),
    )


def _spans(entries: int) -> _Spans:
    room = entries + _MAX_ELEMENTS
    return _Spans(np.empty(room, np.uint64), np.empty(room, np.int64), np.empty(room, np.int64))


def _enlarged(columns: Columns, items: _Spans, history: _Spans) -> tuple[Columns, _Spans, _Spans]:
    """The same with twice the room for items."""
    grown = {f: _doubled(getattr(columns, f)) for f in _ITEM_COLUMNS + _HISTORY_COLUMNS}
    return columns._replace(**grown), _Spans(*map(_doubled, items)), _Spans(*map(_doubled, history))


def _doubled(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    larger = np.empty(2 * len(array), array.dtype)
    larger[: len(array)] = array
    return larger


# --- compiled from here on -------------------------------------------------------------------------------
# A position below 0 says that reading failed there: it is minus the Reason. Constants are plain ints, since
# numba treats enum members as objects of their own.

_EMPTY: Final = int(Reason.EMPTY)
_BAD_FRAME: Final = int(Reason.BAD_FRAME)
_UNKNOWN_SCHEMA: Final = int(Reason.UNKNOWN_SCHEMA)
_TRUNCATED: Final = int(Reason.TRUNCATED)
_TRAILING_BYTES: Final = int(Reason.TRAILING_BYTES)
_BAD_VARINT: Final = int(Reason.BAD_VARINT)
_BAD_LENGTH: Final = int(Reason.BAD_LENGTH)
_BAD_INDEX: Final = int(Reason.BAD_INDEX)
_BAD_UTF8: Final = int(Reason.BAD_UTF8)
_EMPTY_STRING: Final = int(Reason.EMPTY_STRING)
_TOO_LONG: Final = int(Reason.TOO_LONG)
_EMPTY_SLATE: Final = int(Reason.EMPTY_SLATE)
_DUPLICATE_SLOT: Final = int(Reason.DUPLICATE_SLOT)
_EVENT_KIND: Final = int(Kind.EVENT)
_DECISION_KIND: Final = int(Kind.DECISION)

_JUMP: Final = int(Op.JUMP)
_CALL: Final = int(Op.CALL)
_RETURN: Final = int(Op.RETURN)
_FAIL: Final = int(Op.FAIL)
_SKIP: Final = int(Op.SKIP)
_BYTES: Final = int(Op.BYTES)
_STRING: Final = int(Op.STRING)
_VARINT: Final = int(Op.VARINT)
_VARINT_REAL: Final = int(Op.VARINT_REAL)
_DOUBLE: Final = int(Op.DOUBLE)
_SET: Final = int(Op.SET)
_SET_REAL: Final = int(Op.SET_REAL)
_BRANCH: Final = int(Op.BRANCH)
_LOOP: Final = int(Op.LOOP)
_NEXT: Final = int(Op.NEXT)
_EMPTY_LOOP: Final = int(Op.EMPTY_LOOP)
_EMIT: Final = int(Op.EMIT)

_HIGH_BITS: Final = np.uint64(0x8080808080808080)
_ONES: Final = np.uint64(0x0101010101010101)
_ALL: Final = np.uint64(0xFFFFFFFFFFFFFFFF)


@jit
def _decode_rows(
    batch: _Source,
    plans: _Programs,
    codes: HashMap,
    partitions: int,
    columns: Columns,
    item_spans: _Spans,
    history_spans: _Spans,
    work: _Scratch,
    first: int,
) -> int:
    """Decode rows first.. into `columns`; returns the row before which it stopped for want of room for items."""
    source, programs, names, out = pin(batch), pin(plans), pin(codes), pin(columns)
    items, history, scratch = pin(item_spans), pin(history_spans), pin(work)
    filled, fill = scratch.filled, scratch.fill
    for row in range(first, len(source.null)):
        m, n = filled[0], filled[1]
        if m + _MAX_ELEMENTS > len(out.item) or n + _MAX_ELEMENTS > len(out.history_item):
            return row
        fill[0], fill[1] = m, n
        kind = 0
        end = source.bounds[row + 1]
        program, at = _frame(source, row, programs)
        if at >= 0:
            pc = programs.starts[program]
            at = _run_plan(source, at, end, programs.plan, pc, names, out, items, history, scratch)
        if at >= 0:
            kind = programs.kinds[program]
            if at != end:
                at = -_TRAILING_BYTES
            elif kind == _DECISION_KIND:
                at = _check_slate(items, m, fill[0])
        if at < 0:
            out.reason[row] = -at
        else:
            filled[0], filled[1] = fill[0], fill[1]
            out.kind[row] = kind
            _commit(source, row, kind, scratch, names, partitions, out)
        out.item_bounds[row + 1] = filled[0]
        out.history_bounds[row + 1] = filled[1]
    return len(source.null)


@part
def _frame(source: _Source, row: int, programs: _Programs) -> tuple[int, int]:
    """(plan, position after the frame), or (-1, -Reason)."""
    data, start, end = source.data, source.bounds[row], source.bounds[row + 1]
    if source.null[row] or start == end:
        return -1, -_EMPTY
    if data[start] == 0xC3 and end - start >= 10 and data[start + 1] == 1:
        program = map_get(programs.single, load64(data, start + 2))
        width = 10
    elif data[start] == 0 and end - start >= 5:
        number = np.uint64(0)
        for i in range(1, 5):
            number = (number << np.uint64(8)) | np.uint64(data[start + i])
        program = map_get(programs.confluent, number)
        width = 5
    else:
        return -1, -_BAD_FRAME
    return (program, start + width) if program != MISSING else (-1, -_UNKNOWN_SCHEMA)


@part
def _commit(
    source: _Source, row: int, kind: int, scratch: _Scratch, names: HashMap, partitions: int, out: Columns
) -> None:
    """Registers → this row's columns."""
    registers, reals = scratch.registers, scratch.reals
    out.id[row] = np.uint64(registers[_ID])
    out.user[row] = np.uint64(registers[_USER])
    out.timestamp_ms[row] = registers[_TIME]
    if partitions > 0:
        start = registers[_USER + 1]
        hashed = _murmur2(source.data, start, start + registers[_USER + 2])
        out.misplaced[row] = hashed % partitions != out.partition[row]
    if kind == _EVENT_KIND:
        out.name[row] = _code(names, registers[_NAME])
        out.recommendation[row] = np.uint64(registers[_RECOMMENDATION])
        out.value[row] = reals[_VALUE]
    else:
        out.value[row] = np.nan
        out.epsilon[row] = reals[_EPSILON]
        out.policy_version[row] = registers[_VERSION]
        out.candidates[row] = registers[_CANDIDATES] != 0


@part
def _code(names: HashMap, hashed: int) -> int:
    code = map_get(names, np.uint64(hashed))
    return OTHER if code == MISSING else code


@part
def _check_slate(items: _Spans, begin: int, end: int) -> int:
    """0, or why the slate cannot be."""
    keys = items.key
    if begin == end:
        return -_EMPTY_SLATE
    if end - begin > _SORT_ABOVE:
        ordered = np.sort(keys[begin:end])
        for i in range(1, len(ordered)):
            if ordered[i] == ordered[i - 1]:
                return -_DUPLICATE_SLOT
        return 0
    for i in range(begin, end):
        for j in range(begin, i):
            if keys[i] == keys[j]:
                return -_DUPLICATE_SLOT
    return 0


@part
def _run_plan(
    source: _Source,
    at: int,
    end: int,
    plan: Plan,
    pc: int,
    names: HashMap,
    out: Columns,
    items: _Spans,
    history: _Spans,
    scratch: _Scratch,
) -> int:
    """Read one record from data[at:end]; returns the position after it, or -Reason."""
    data, code, limits = source.data, plan.code, plan.limits
    registers, reals, stack = scratch.registers, scratch.reals, scratch.stack
    depth = 0
    while True:
        op, a = code[pc, 0], code[pc, 1]
        low, high = limits[pc, 0], limits[pc, 1]
        b, c, d, e = code[pc, 2], code[pc, 3], code[pc, 4], code[pc, 5]
        pc += 1
        if op == _STRING:
            length, at = _varint(data, at, end, 64)
            if at < 0:
                return at
            if length < b or length > c or length > end - at:
                return _bad_length(length, b, end - at)
            if not _is_text(data, at, at + length):
                return -_BAD_UTF8
            if a >= 0:
                hashed = hash_bytes(data, at, at + length) if length > 0 else np.uint64(0)
                registers[a] = np.int64(hashed)
                registers[a + 1] = at
                registers[a + 2] = length
            at += length
        elif op == _VARINT:
            number, at = _varint(data, at, end, b)
            if at < 0:
                return at
            if e != 0 and (number < c or number > d):
                return -e
            if a >= 0:
                registers[a] = number
        elif op == _BRANCH:
            index, at = _varint(data, at, end, 64)
            if at < 0:
                return at
            if index < 0 or index >= b:
                return -_BAD_INDEX
            pc = plan.targets[a + index]
        elif op == _JUMP:
            pc = a
        elif op == _NEXT:
            if stack[depth - 1, 0] == 0:
                count, at = _block(data, at, end)
                if at < 0:
                    return at
                if count > end - at:  # each element takes a byte at least
                    return -_TRUNCATED
                stack[depth - 1, 0] = count
                stack[depth - 1, 1] += count
                if b > 0 and stack[depth - 1, 1] > b:
                    return -_TOO_LONG
            if stack[depth - 1, 0] == 0:
                depth -= 1
                pc = a
            else:
                stack[depth - 1, 0] -= 1
        elif op == _LOOP:
            if depth == _MAX_DEPTH:
                return -_BAD_LENGTH
            stack[depth, 0] = 0
            stack[depth, 1] = 0
            depth += 1
        elif op == _SET_REAL:
            reals[a] = low
        elif op == _SET:
            registers[a] = b
        elif _VARINT_REAL <= op <= _DOUBLE:
            real, at = _real(data, at, end, op, b)
            if at < 0:
                return at
            if e != 0 and not (low <= real <= high):  # NaN is within nothing
                return -e
            if a >= 0:
                reals[a] = real
        elif op == _EMIT:
            _append(a, names, out, items, history, scratch)
        elif op == _BYTES:
            length, at = _varint(data, at, end, 64)
            if at < 0:
                return at
            if length < 0 or length > end - at:
                return _bad_length(length, 0, end - at)
            at += length
        elif op == _SKIP:
            if a > end - at:
                return -_TRUNCATED
            at += a
        elif op == _EMPTY_LOOP:
            count = 1
            left = _MAX_NOTHINGS
            while count != 0:
                count, at = _block(data, at, end)
                if at < 0:
                    return at
                if count > left:
                    return -_TOO_LONG
                left -= count
        elif op == _CALL:
            if depth == _MAX_DEPTH:
                return -_BAD_LENGTH
            stack[depth, 0] = pc
            depth += 1
            pc = a
        elif op == _RETURN:
            depth -= 1
            pc = stack[depth, 0]
        elif op == _FAIL:
            return -a
        else:  # END
            return at


@part
def _bad_length(length: int, least: int, left: int) -> int:
    """-Reason of a length that is wrong."""
    if length < 0:
        return -_BAD_LENGTH
    if length < least:
        return -_EMPTY_STRING
    return -_TRUNCATED if length > left else -_TOO_LONG


@part
def _varint(data: npt.NDArray[np.uint8], at: int, end: int, bits: int) -> tuple[int, int]:
    """(number, position after it) of a zigzag varint of at most so many bits, or (0, -Reason)."""
    if at < end and data[at] < 0x80:
        byte = np.int64(data[at])
        return int((byte >> 1) ^ -(byte & 1)), at + 1
    raw = np.uint64(0)
    shift = 0
    while True:
        if at >= end:
            return 0, -_TRUNCATED
        byte = np.int64(data[at])
        at += 1
        if (shift == 63 and byte > 1) or (shift >= 28 and bits == 32 and byte > 0x0F):
            return 0, -_BAD_VARINT
        raw |= np.uint64(byte & 0x7F) << np.uint64(shift)
        if byte < 0x80:
            return int(np.int64(raw >> np.uint64(1)) ^ -np.int64(raw & np.uint64(1))), at
        shift += 7


@part
def _block(data: npt.NDArray[np.uint8], at: int, end: int) -> tuple[int, int]:
    """(elements in the next block, 0 after the last; position), or (0, -Reason)."""
    count, at = _varint(data, at, end, 64)
    if at >= 0 and count < 0:  # then the block's size in bytes follows
        size, at = _varint(data, at, end, 64)
        count = -count
        if at >= 0 and (size < 0 or count < 0):  # -(-2**63) is still below 0
            return 0, -_BAD_LENGTH
        if at >= 0 and size > end - at:
            return 0, -_TRUNCATED
    return count, at


@part
def _real(data: npt.NDArray[np.uint8], at: int, end: int, op: int, bits: int) -> tuple[float, int]:
    """(number, position after it), or (0.0, -Reason)."""
    if op == _VARINT_REAL:
        whole, at = _varint(data, at, end, bits)
        return float(whole), at
    width = 8 if op == _DOUBLE else 4
    if end - at < width:
        return 0.0, -_TRUNCATED
    # either the 8 bytes, or the 4 as the upper half of the 8 that end with them (a frame lies before, so they exist)
    word = load64(data, at + width - 8)
    if op == _DOUBLE:
        return float(np.uint64(word).view(np.float64)), at + width
    return float(np.uint32(word >> np.uint64(32)).view(np.float32)), at + width


@part
def _append(
    table: int, names: HashMap, out: Columns, items: _Spans, history: _Spans, scratch: _Scratch
) -> None:
    """One more element of a table, from the registers."""
    registers, reals, fill = scratch.registers, scratch.reals, scratch.fill
    if table == _HISTORY:
        i = fill[1]
        fill[1] += 1
        out.history_name[i] = _code(names, registers[_ENTRY_NAME])
        out.history_timestamp_ms[i] = registers[_ENTRY_TIME]
        out.history_value[i] = reals[_ENTRY_VALUE]
        spans = history
    else:
        i = fill[0]
        fill[0] += 1
        slot = table == _SLATE
        out.quantity[i] = 1 if slot else registers[_QUANTITY]
        out.price[i] = np.nan if slot else reals[_PRICE]
        # smaller ones would be 0 as a float32, and somebody will divide by them
        out.propensity[i] = max(reals[_PROPENSITY], 1.2e-38) if slot else np.nan
        spans = items
    spans.key[i] = np.uint64(registers[_ITEM])
    spans.start[i] = registers[_ITEM + 1]
    spans.length[i] = registers[_ITEM + 2]


@jit
def _intern_rows(
    batch: _Source,
    columns: Columns,
    item_spans: _Spans,
    history_spans: _Spans,
    vocabulary: Tables,
    first: int,
) -> int:
    """Spans → ids, row by row from `first` on; returns the row before which the vocabulary must grow."""
    source, out, tables = pin(batch), pin(columns), pin(vocabulary)
    items, history = pin(item_spans), pin(history_spans)
    data, bounds = source.data, source.bounds
    for row in range(first, len(out.kind)):
        m, m_end = out.item_bounds[row], out.item_bounds[row + 1]
        n, n_end = out.history_bounds[row], out.history_bounds[row + 1]
        spans = m_end - m + n_end - n
        if spans > 0 and not has_room(tables, spans, bounds[row + 1] - bounds[row]):
            return row
        for i in range(m, m_end):
            foresee(tables, items.key, i)
            out.item[i] = intern(tables, items.key[i], data, items.start[i], items.length[i])
        for i in range(n, n_end):
            foresee(tables, history.key, i)
            out.history_item[i] = intern(tables, history.key[i], data, history.start[i], history.length[i])
    return len(out.kind)


@part
def _is_text(data: npt.NDArray[np.uint8], start: int, end: int) -> bool:
    """Whether data[start:end] is UTF-8 without U+0000."""
    at = start
    while at + 8 <= end:
        word = load64(data, at)
        # no high bit: ASCII; then no byte borrows in the subtraction unless it, or a lower one, is 0
        if (word | (word - _ONES)) & _HIGH_BITS:
            return _is_utf8(data, at, end)
        at += 8
    if at < end:
        if end < 8:
            return _is_utf8(data, at, end)
        unused = np.uint64(8 * (8 - (end - at)))  # bits of the last 8 bytes that lie before `at`
        word = (load64(data, end - 8) & (_ALL << unused)) | (_ONES & ~(_ALL << unused))
        if (word | (word - _ONES)) & _HIGH_BITS:
            return _is_utf8(data, at, end)
    return True


@part
def _is_utf8(data: npt.NDArray[np.uint8], at: int, end: int) -> bool:
    """The same byte by byte: RFC 3629, so no over-long forms, no surrogates, nothing beyond U+10FFFF."""
    while at < end:
        byte = np.int64(data[at])
        if byte == 0 or 0x80 <= byte < 0xC2 or byte > 0xF4:
            return False
        more = 0 if byte < 0x80 else 1 if byte < 0xE0 else 2 if byte < 0xF0 else 3
        if at + more >= end:
            return False
        if more:
            second = np.int64(data[at + 1])
            least = 0xA0 if byte == 0xE0 else 0x90 if byte == 0xF0 else 0x80
            most = 0x9F if byte == 0xED else 0x8F if byte == 0xF4 else 0xBF
            if not least <= second <= most:
                return False
            for i in range(2, more + 1):
                if data[at + i] & 0xC0 != 0x80:
                    return False
        at += more + 1
    return True


@part
def _murmur2(data: npt.NDArray[np.uint8], start: int, end: int) -> int:
    """`streaming.log.murmur2`, compiled."""
    mask, m = np.uint64(0xFFFFFFFF), np.uint64(0x5BD1E995)
    h = np.uint64(0x9747B28C) ^ np.uint64(end - start)
    at = start
    while at + 4 <= end:
        k = np.uint64(0)
        for i in range(4):
            k |= np.uint64(data[at + i]) << np.uint64(8 * i)
        k = (k * m) & mask
        k = ((k ^ (k >> np.uint64(24))) * m) & mask
        h = ((h * m) & mask) ^ k
        at += 4
    if at < end:
        tail = np.uint64(0)
        for i in range(end - at):
            tail |= np.uint64(data[at + i]) << np.uint64(8 * i)
        h = ((h ^ tail) * m) & mask
    h = ((h ^ (h >> np.uint64(13))) * m) & mask
    return int((h ^ (h >> np.uint64(15))) & np.uint64(0x7FFFFFFF))
