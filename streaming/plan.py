"""Avro schema resolution, done once: (writer schema, reader schema) → a flat program for the decoder's loop.

The program is rows of small integers. Running it reads one record as its writer wrote it and leaves what the
reader's `Rule`s name in numbered registers: fields in any order, defaults for those the writer lacks, symbols and
types it has changed (int → long → float → double, bytes ↔ string), and fields that the reader does not know are
stepped over, whatever their type. See https://avro.apache.org/docs/1.12.0/specification/#schema-resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streaming.columns import Reason
from streaming.interning import hash_string

Schema = Any  # Avro's JSON: a name, a list (union) or an object


class SchemaMismatch(ValueError):
    """Records of this writer schema cannot be read as the reader's; the message names the field."""


class Op(IntEnum):
    """What one row of the program does. Operands a..e are its further columns; low and high its `limits`."""

    END = 0
    JUMP = 1  # to a
    CALL = 2  # the subroutine at a
    RETURN = 3
    FAIL = 4  # with reason a
    SKIP = 5  # a bytes
    BYTES = 6  # length and bytes, stepped over
    STRING = 7  # b..c bytes of UTF-8; registers a: hash, a + 1: start, a + 2: length; a < 0: only checked
    VARINT = 8  # of b bits, within c..d or reason e (0: any); register a; a < 0: only checked
    VARINT_REAL = 9  # of b bits, within low..high or reason e (0: any); real register a; a < 0: only checked
    FLOAT = 10  # as VARINT_REAL
    DOUBLE = 11  # as VARINT_REAL
    SET = 12  # register a to b
    SET_REAL = 13  # real register a to low
    BRANCH = 14  # read an index below b, go to targets[a + index]
    LOOP = 15  # start an array or map
    NEXT = 16  # read the next element, of b in all at most (0: no bound), or go to a after the last
    EMPTY_LOOP = 17  # an array whose elements take no bytes
    EMIT = 18  # append the registers to table a


WIDTH: Final = 6  # columns of a program


class Plan(NamedTuple):
    """A program of P rows; it starts at row 0."""

    code: npt.NDArray[np.int64]  # [P, WIDTH] op, a, b, c, d, e
    limits: npt.NDArray[np.float64]  # [P, 2] low, high
    targets: npt.NDArray[np.int64]  # [J] where BRANCH goes


@dataclass(frozen=True)
class Rule:
    """What becomes of one field of the reader's schema. Fields without a rule are checked and forgotten."""

    # "text", "whole", "real", "table" (an array, one EMIT for each element), "array" (only its length is bounded) or
    # "present" (1 unless null)
    kind: str
    register: int = -1  # first register; for a table, its number
    low: float = -math.inf  # least value, or bytes of a text
    high: float = math.inf  # largest value, bytes of a text, or elements of a table or an array
    reason: Reason = Reason.OK  # for values outside; OK: anything goes


def compile_plan(writer: Schema, reader: Schema, rules: Mapping[str, Rule]) -> Plan:
    """The program that reads the writer's records by these rules, keyed by path: `items.price`.

    Raises: SchemaMismatch when no record of the writer's could be read.
    """
    return _Compiler(writer, reader, rules).plan()


_PROMOTIONS: Final = {
    "long": {"int"},
    "float": {"int", "long"},
    "double": {"int", "long", "float"},
    "string": {"bytes"},
    "bytes": {"string"},
}
_BITS: Final = {"int": 32, "long": 64}
_FIXED_WIDTH: Final = {"null": 0, "boolean": 1, "float": 4, "double": 8}
_PRIMITIVES: Final = frozenset(("null", "boolean", "int", "long", "float", "double", "bytes", "string"))
_NAMED: Final = ("record", "error", "enum", "fixed")
_NO_RULE: Final = Rule("none")
_NO_BOUND: Final = 2**62


class _Compiler:
    def __init__(self, writer: Schema, reader: Schema, rules: Mapping[str, Rule]) -> None:
        self._written: dict[str, Schema] = {}  # named types by full name
        self._read: dict[str, Schema] = {}
        self._writer = _qualified(writer, "", self._written)
        self._reader = _qualified(reader, "", self._read)
        self._rules = rules
        self._code: list[list[int]] = []
        self._limits: list[tuple[float, float]] = []
        self._targets: list[int] = []
        self._calls: dict[str, list[int]] = {}  # record stepped over → rows that call its subroutine

    def plan(self) -> Plan:
        self._value(self._writer, self._reader, "")
        self._emit(Op.END)
        self._subroutines()
        return Plan(
            np.array(self._code, np.int64),
            np.array(self._limits, np.float64),
            np.array(self._targets or [0], np.int64),
        )

    # --- writing rows ---

    def _emit(self, op: Op, *operands: int, low: float = -math.inf, high: float = math.inf) -> int:
        self._code.append([op, *operands, *[0] * (WIDTH - 1 - len(operands))])
        self._limits.append((low, high))
        return len(self._code) - 1

    def _here(self) -> int:
        return len(self._code)

    def _branch(self, choices: list[Callable[[], object]]) -> None:
        """An index, then whatever the choice of that index writes."""
        first = len(self._targets)
        self._targets += [0] * len(choices)
        self._emit(Op.BRANCH, first, len(choices))
        exits = []
        for index, write in enumerate(choices):
            self._targets[first + index] = self._here()
            write()
            exits.append(self._emit(Op.JUMP))
        for row in exits:
            self._code[row][1] = self._here()

    def _loop(self, body: Callable[[], object], most: int = 0) -> None:
        self._emit(Op.LOOP)
        head = self._emit(Op.NEXT, 0, most)
        body()
        self._emit(Op.JUMP, head)
        self._code[head][1] = self._here()

    # --- reading as the reader would ---

    def _value(self, writer: Schema, reader: Schema, path: str) -> None:
        writer, reader = _named(writer, self._written), _named(reader, self._read)
        if isinstance(writer, list):
            self._written_union(writer, reader, path)
        elif isinstance(reader, list):
            self._read_union(writer, reader, path)
        else:
            self._single(writer, reader, path)

    def _written_union(self, writer: list[Schema], reader: Schema, path: str) -> None:
        """Branches that the reader has no place for fail when a record takes them, not before."""
        readable = [self._tried(branch, reader, path) for branch in writer]
        if not any(readable):
            raise SchemaMismatch(f"{path or 'record'}: no branch of {_kinds(writer)} can be read")
        self._branch(
            [
                (lambda branch=branch: self._value(branch, reader, path))  # type: ignore[misc]
                if ok
                else (lambda: self._emit(Op.FAIL, Reason.BAD_INDEX))
                for branch, ok in zip(writer, readable, strict=True)
            ]
        )

    def _read_union(self, writer: Schema, reader: list[Schema], path: str) -> None:
        """The reader's branch of the same type, else the first that the writer's can be promoted to."""
        kind = _kind(writer)
        same = [b for b in reader if _kind(_named(b, self._read)) == kind]
        for branch in same + reader:
            if self._tried(writer, branch, path):
                return self._value(writer, branch, path)
        raise SchemaMismatch(f"{path or 'record'}: written as {kind}, read as one of {_kinds(reader)}")

    def _tried(self, writer: Schema, reader: Schema, path: str) -> bool:
        """Whether this can be read at all; leaves nothing behind."""
        rows, targets = self._here(), len(self._targets)
        calls = {name: list(callers) for name, callers in self._calls.items()}
        try:
            self._value(writer, reader, path)
        except SchemaMismatch:
            return False
        finally:
            del self._code[rows:], self._limits[rows:], self._targets[targets:]
            self._calls = calls
        return True

    def _single(self, writer: Schema, reader: Schema, path: str) -> None:
        written, read = _kind(writer), _kind(reader)
        if written != read and written not in _PROMOTIONS.get(read, ()):
            raise SchemaMismatch(f"{path or 'record'}: written as {written}, read as {read}")
        if written in ("record", "enum", "fixed") and not _same_name(writer, reader):
            raise SchemaMismatch(f"{path or 'record'}: written as {writer['name']}, read as {reader['name']}")
        rule = self._rules.get(path, _NO_RULE)
        match read:
            case "null":
                self._absent(rule)
            case "record":
                self._record(writer, reader, path)
            case "array" if rule.kind == "table":
                body = self._element(writer, reader, path, rule)
                self._loop(body, int(rule.high))
            case "array" if self._width(writer["items"]) == 0:
                self._emit(Op.EMPTY_LOOP)
            case "array":
                most = int(rule.high) if rule.kind == "array" else 0
                self._loop(lambda: self._value(writer["items"], reader["items"], f"{path}[]"), most)
            case "map":
                self._loop(lambda: self._entry(writer, reader, path))
            case "enum":
                self._enum(writer, reader, path)
            case "string":
                self._text(rule)
            case "bytes":
                self._emit(Op.BYTES)
            case "fixed":
                self._fixed(writer, reader, path)
            case "boolean":
                self._emit(Op.SKIP, 1)
            case _:
                self._number(written, read, rule)
        if rule.kind == "present" and read != "null":
            self._emit(Op.SET, rule.register, 1)

    def _record(self, writer: Schema, reader: Schema, path: str) -> None:
        prefix = f"{path}." if path else ""
        missing = {field["name"]: field for field in reader["fields"]}
        for field in writer["fields"]:
            known = next(
                (f for f in missing.values() if field["name"] in (f["name"], *f.get("aliases", ()))), None
            )
            if known is None:
                self._skip(field["type"])
                continue
            del missing[known["name"]]
            self._value(field["type"], known["type"], prefix + known["name"])
        for name, field in missing.items():
            if "default" not in field:
                raise SchemaMismatch(f"{prefix + name}: the writer has no such field, and it has no default")
            self._default(field["type"], field["default"], prefix + name)

    def _element(self, writer: Schema, reader: Schema, path: str, rule: Rule) -> Callable[[], None]:
        def body() -> None:
            self._value(writer["items"], reader["items"], path)  # fields of elements are `items.price`
            self._emit(Op.EMIT, rule.register)

        return body

    def _entry(self, writer: Schema, reader: Schema, path: str) -> None:
        self._text(_NO_RULE)
        self._value(writer["values"], reader["values"], f"{path}[]")

    def _enum(self, writer: Schema, reader: Schema, path: str) -> None:
        known = set(reader["symbols"])
        usable = [symbol in known or "default" in reader for symbol in writer["symbols"]]
        if all(usable):
            self._emit(Op.VARINT, -1, 32, 0, len(usable) - 1, Reason.BAD_INDEX)
        else:
            fail = lambda: self._emit(Op.FAIL, Reason.BAD_INDEX)  # noqa: E731
            self._branch([(lambda: None) if ok else fail for ok in usable])

    def _fixed(self, writer: Schema, reader: Schema, path: str) -> None:
        if writer["size"] != reader["size"]:
            raise SchemaMismatch(f"{path}: written as {writer['size']} bytes, read as {reader['size']}")
        self._emit(Op.SKIP, writer["size"])

    def _text(self, rule: Rule) -> None:
        low, high = max(0, rule.low), min(_NO_BOUND, rule.high)
        self._emit(Op.STRING, rule.register if rule.kind == "text" else -1, int(low), int(high))

    def _number(self, written: str, read: str, rule: Rule) -> None:
        register = rule.register if rule.kind in ("whole", "real") else -1
        if read in _BITS:
            low, high = max(-_NO_BOUND, rule.low), min(_NO_BOUND, rule.high)
            bits = _BITS[written]
            self._emit(Op.VARINT, register, bits, int(low), int(high), rule.reason)
        else:
            op = {"float": Op.FLOAT, "double": Op.DOUBLE}.get(written, Op.VARINT_REAL)
            bits = _BITS.get(written, 0)
            self._emit(op, register, bits, 0, 0, rule.reason, low=rule.low, high=rule.high)

    def _absent(self, rule: Rule) -> None:
        """Null: hash 0, NaN, not present."""
        if rule.kind == "real":
            self._emit(Op.SET_REAL, rule.register, low=math.nan)
        elif rule.kind in ("text", "present"):
            self._emit(Op.SET, rule.register, 0)

    def _default(self, reader: Schema, default: Any, path: str) -> None:
        """Leave the registers as if the field had been written with its default."""
        rule = self._rules.get(path, _NO_RULE)
        match rule.kind, default:
            case _, None:
                self._absent(rule)
            case "whole", int():
                self._emit(Op.SET, rule.register, default)
            case "real", int() | float():
                self._emit(Op.SET_REAL, rule.register, low=float(default))
            case "present", _:
                self._emit(Op.SET, rule.register, 1)
            case "text", str() if rule.low <= 0:  # only its hash is asked for
                self._emit(Op.SET, rule.register, int(np.uint64(hash_string(default)).astype(np.int64)))
            case "none", _:
                pass
            case "table" | "array", []:
                pass
            case _:
                raise SchemaMismatch(f"{path}: the writer has no such field, and we cannot do without")

    # --- stepping over what the reader does not know ---

    def _skip(self, writer: Schema) -> None:
        writer = _named(writer, self._written)
        match _kind(writer):
            case "union":
                self._branch([(lambda b=b: self._skip(b)) for b in writer])  # type: ignore[misc]
            case "record":
                self._calls.setdefault(writer["name"], []).append(self._emit(Op.CALL))
            case "array" if self._width(writer["items"]) == 0:
                self._emit(Op.EMPTY_LOOP)
            case "array":
                self._loop(lambda: self._skip(writer["items"]))
            case "map":
                self._loop(lambda: self._skip_entry(writer))
            case "enum":
                self._emit(Op.VARINT, -1, 32, 0, len(writer["symbols"]) - 1, Reason.BAD_INDEX)
            case "string" | "bytes":
                self._emit(Op.BYTES)
            case "int" | "long" as kind:
                self._emit(Op.VARINT, -1, _BITS[kind])
            case "fixed":
                self._emit(Op.SKIP, writer["size"])
            case kind:
                self._emit(Op.SKIP, _FIXED_WIDTH[kind])

    def _skip_entry(self, writer: Schema) -> None:
        self._emit(Op.BYTES)
        self._skip(writer["values"])

    def _subroutines(self) -> None:
        """One for each record stepped over, since such a record may hold itself."""
        done: dict[str, int] = {}
        while todo := [name for name in self._calls if name not in done]:
            for name in todo:
                done[name] = self._here()
                for field in self._written[name]["fields"]:
                    self._skip(field["type"])
                self._emit(Op.RETURN)
        for name, rows in self._calls.items():
            for row in rows:
                self._code[row][1] = done[name]

    def _width(self, writer: Schema, within: frozenset[str] = frozenset()) -> int:
        """0 for a type whose values take no bytes at all, else 1."""
        writer = _named(writer, self._written)
        kind = _kind(writer)
        if kind == "record" and writer["name"] not in within:
            inside = within | {writer["name"]}
            return max((self._width(f["type"], inside) for f in writer["fields"]), default=0)
        return 0 if kind == "null" or (kind == "fixed" and writer["size"] == 0) else 1


def _qualified(schema: Schema, namespace: str, names: dict[str, Schema]) -> Schema:
    """The same schema with full names throughout; named types are entered into `names`."""
    if isinstance(schema, list):
        return [_qualified(branch, namespace, names) for branch in schema]
    if isinstance(schema, str):
        return schema if schema in _PRIMITIVES else _full_name(schema, namespace)
    if not isinstance(schema, dict) or "type" not in schema:
        raise SchemaMismatch(f"{schema!r} is no Avro type")
    kind = schema["type"]
    if kind not in _NAMED:
        parts = {k: _qualified(schema[k], namespace, names) for k in ("items", "values") if k in schema}
        return {**schema, **parts} if parts else _qualified(kind, namespace, names)
    name = _full_name(schema["name"], schema.get("namespace", namespace))
    fields = [
        {**field, "type": _qualified(field["type"], name.rpartition(".")[0], names)}
        for field in schema.get("fields", ())
    ]
    names[name] = {**schema, "name": name, "fields": fields}
    return names[name]


def _full_name(name: str, namespace: str) -> str:
    return name if "." in name or not namespace else f"{namespace}.{name}"


def _named(schema: Schema, names: Mapping[str, Schema]) -> Schema:
    """The type itself where the schema is the name of one. Raises: SchemaMismatch for an unknown name."""
    if not isinstance(schema, str) or schema in _PRIMITIVES:
        return schema
    if schema not in names:
        raise SchemaMismatch(f"{schema!r} is no Avro type")
    return names[schema]


def _kind(schema: Schema) -> str:
    if isinstance(schema, list):
        return "union"
    kind: str = schema if isinstance(schema, str) else schema["type"]
    return "record" if kind == "error" else kind


def _kinds(union: list[Schema]) -> str:
    return ", ".join(b if isinstance(b, str) else str(b.get("name", b["type"])) for b in union)


def _same_name(writer: Schema, reader: Schema) -> bool:
    """Namespaces may differ; the reader's aliases count."""
    names = (reader["name"], *reader.get("aliases", ()))
    return writer["name"].rpartition(".")[2] in [name.rpartition(".")[2] for name in names]


def joined(plans: list[Plan]) -> tuple[Plan, list[int]]:
    """All programs in one, and the row at which each starts."""
    starts, codes, targets, row, target = [], [], [], 0, 0
    for plan in plans:
        code = plan.code.copy()
        code[np.isin(code[:, 0], (Op.JUMP, Op.CALL, Op.NEXT)), 1] += row
        code[code[:, 0] == Op.BRANCH, 1] += target
        starts.append(row)
        codes.append(code)
        targets.append(plan.targets + row)
        row += len(code)
        target += len(plan.targets)
    limits = np.concatenate([plan.limits for plan in plans])
    return Plan(np.concatenate(codes), limits, np.concatenate(targets)), starts
