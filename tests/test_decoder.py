"""The decoder against fastavro, record by record, and every way in which bytes can be no record."""

from __future__ import annotations

import json
import math
import random
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streaming.columns import Columns, Kind, Reason
from streaming.decoder import Decoder
from streaming.interning import Vocabulary, hash_string
from streaming.log import RecordBatch, partition_of
from streaming.rewards import CODES, EVENT_NAMES, OTHER
from streaming.schemas import (
    DECISION,
    EVENT,
    ITEM,
    Codec,
    Registry,
    RegistryUnavailable,
    SchemaError,
    single_object_prefix,
)
from tests.joins import DEEP, float32
from tests.wire import (
    DECIDED,
    GOOD,
    NOON,
    NULL,
    a_decision,
    an_event,
    array,
    candidate,
    entry,
    line,
    real,
    slot,
    some,
    text,
    varint,
    written,
)

CODEC = Codec()
SLOW = settings(max_examples=150 * DEEP, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Schemas(Registry):
    """A registry in memory."""

    def __init__(self, *schemas: Any) -> None:
        self.schemas = list(schemas)  # id = index + 1
        self.down = False

    def schema(self, number: int) -> Any:
        if self.down:
            raise RegistryUnavailable("down")
        return self.schemas[number - 1] if 1 <= number <= len(self.schemas) else None


def batch(*values: bytes | None, partition: int = 0) -> RecordBatch:
    """These records, at offsets 100, 101, ..."""
    n = len(values)
    return RecordBatch(
        partition=np.full(n, partition, np.int32),
        offset=100 + np.arange(n),
        timestamp_ms=np.zeros(n, np.int64),
        data=np.frombuffer(b"".join(value or b"" for value in values), np.uint8),
        bounds=np.cumsum([0, *(len(value or b"") for value in values)]),
        null=np.array([value is None for value in values], np.bool_),
        keys=None,
    )


def decoded(*values: bytes | None) -> Columns:
    """Their columns."""
    return Decoder(CODEC, Vocabulary()).decode(batch(*values))


def reason(value: bytes | None, codec: Codec = CODEC) -> Reason:
    """Why a record between two good ones is refused (OK: it is not); the good ones must not notice."""
    vocabulary = Vocabulary()
    columns = Decoder(codec, vocabulary).decode(batch(GOOD, value, GOOD))
    assert rows(columns, vocabulary)[0] == rows(columns, vocabulary)[2] == as_row(GOOD)
    assert (columns.kind[1] == Kind.BAD) == (columns.reason[1] != Reason.OK)
    return Reason(columns.reason[1])


# --- rows as Python sees them ------------------------------------------------------------------------------


def rows(columns: Columns, vocabulary: Vocabulary) -> list[Any]:
    """Each row's columns as plain values; the Reason of a row that is BAD."""

    def row(i: int) -> Any:
        if columns.kind[i] == Kind.BAD:
            return Reason(columns.reason[i])
        lines = slice(columns.item_bounds[i], columns.item_bounds[i + 1])
        entries = slice(columns.history_bounds[i], columns.history_bounds[i + 1])
        scalars = [
            columns.kind[i], columns.id[i], columns.user[i], columns.timestamp_ms[i], columns.name[i],
            columns.recommendation[i], columns.value[i], columns.epsilon[i], columns.policy_version[i],
            columns.candidates[i],
        ]  # fmt: skip
        items = (columns.item, columns.quantity, columns.price, columns.propensity)
        history = (
            columns.history_item,
            columns.history_name,
            columns.history_timestamp_ms,
            columns.history_value,
        )

        def table(parts: Any, where: slice) -> list[list[Any]]:
            first, *others = (part[where].tolist() for part in parts)
            return [[vocabulary.item_id(i) for i in first], *others]

        return repr([[scalar.item() for scalar in scalars], table(items, lines), table(history, entries)])

    assert len(columns.item) == columns.item_bounds[-1]
    assert len(columns.history_item) == columns.history_bounds[-1]
    return [row(i) for i in range(len(columns.kind))]


def as_row(value: bytes, codec: Codec = CODEC) -> str:
    """The same by way of fastavro."""
    name, r = codec.decode(value)
    nan = math.nan
    if name == EVENT:
        lines = r["items"]
        scalars = [
            1, hash_string(r["event_id"]), hash_string(r["user_id"]), r["timestamp"], CODES.get(r["name"], OTHER),
            hash_string(r["recommendation_id"] or ""), nan if r["value"] is None else float(r["value"]), 0.0, 0, False,
        ]  # fmt: skip
        prices = [nan if line["price"] is None else float(line["price"]) for line in lines]
        items = [
            [line["item_id"] for line in lines],
            [line["quantity"] for line in lines],
            prices,
            [nan] * len(lines),
        ]
        return repr([scalars, items, [[], [], [], []]])
    slate, history = r["slate"], r["history"]
    scalars = [
        2, hash_string(r["recommendation_id"]), hash_string(r["user_id"]), r["timestamp"], 0, 0, nan,
        float32(r["epsilon"]), r["policy_version"], r["candidates"] is not None,
    ]  # fmt: skip
    propensity = [float32(max(slot["propensity"], 1.2e-38)) for slot in slate]
    items = [[slot["item_id"] for slot in slate], [1] * len(slate), [nan] * len(slate), propensity]
    entries = [
        [entry["item_id"] for entry in history],
        [CODES.get(entry["name"], OTHER) for entry in history],
        [entry["timestamp"] for entry in history],
        [float32(entry["value"]) for entry in history],
    ]
    return repr([scalars, items, entries])


def fits(name: str, r: dict[str, Any]) -> bool:
    """Whether a record keeps the bounds that proto/*.avsc states."""

    def text(value: str, least: int = 1, most: int = 1024) -> bool:
        return least <= len(value.encode()) <= most

    def number(value: float | None, low: float, high: float) -> bool:
        return value is None or low <= value <= high

    def moment(value: int) -> bool:
        return 946_684_800_000 <= value < 4_102_444_800_000

    def clean(value: Any) -> bool:
        if isinstance(value, dict):
            return clean(list(value)) and clean(list(value.values()))
        return (
            all(map(clean, value))
            if isinstance(value, list)
            else not (isinstance(value, str) and "\0" in value)
        )

    big = float(np.finfo(np.float32).max)
    if not (clean(r) and text(r["user_id"]) and moment(r["timestamp"])):
        return False
    if name == EVENT:
        return (
            text(r["event_id"])
            and text(r["name"], 1, 64)
            and number(r["value"], -1e12, 1e12)
            and len(r["items"]) <= 1000
            and all(
                text(line["item_id"])
                and 0 <= line["quantity"] <= 1_000_000
                and number(line["price"], -1e9, 1e9)
                for line in r["items"]
            )
        )
    shown = [slot["item_id"] for slot in r["slate"]]
    return (
        text(r["recommendation_id"])
        and 1 <= len(shown) <= 1000
        and len(set(shown)) == len(shown)
        and all(text(slot["item_id"]) and 0 < slot["propensity"] <= 1 for slot in r["slate"])
        and number(r["epsilon"], 0, 1)
        and len(r["history"]) <= 1000
        and all(
            text(entry["item_id"])
            and text(entry["name"], 1, 64)
            and moment(entry["timestamp"])
            and number(entry["value"], -big, big)
            for entry in r["history"]
        )
        and all(
            text(c["item_id"])
            and number(c["price"], 0, 1e9)
            and len(c["vector"]) <= 256
            and all(number(x, -big, big) for x in c["vector"])
            for c in r["candidates"] or ()
        )
    )


# --- random records ----------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
ids = st.one_of(texts.filter(bool), st.sampled_from(["a", "b", "ä" * 512, "x" * 1024, "\U0001f600"]))
names = st.one_of(st.sampled_from(EVENT_NAMES[1:]), texts.filter(bool))
moments = st.integers(946_684_800_000, 4_102_444_799_999)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def finite(low: float, high: float, width: int = 64) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=width)  # type: ignore[arg-type]


EVENTS = st.fixed_dictionaries(
    {
        "event_id": ids, "name": names, "user_id": ids, "session_id": maybe(texts), "timestamp": moments,
        "items": st.lists(
            st.fixed_dictionaries(
                {
                    "item_id": ids, "quantity": st.integers(0, 1_000_000), "price": maybe(finite(-1e9, 1e9)),
                    "index": maybe(st.integers(-(2**31), 2**31 - 1)),
                }
            ),
            max_size=5,
        ),
        "value": maybe(finite(-1e12, 1e12)), "currency": maybe(texts), "recommendation_id": maybe(texts),
        "params": st.dictionaries(texts, texts, max_size=3),
    }
)  # fmt: skip
DECISIONS = st.fixed_dictionaries(
    {
        "recommendation_id": ids, "user_id": ids, "session_id": maybe(texts), "timestamp": moments,
        "history": st.lists(
            st.fixed_dictionaries(
                {"item_id": ids, "name": names, "timestamp": moments, "value": finite(-1e6, 1e6, 32)}
            ),
            max_size=4,
        ),
        "slate": st.lists(
            st.fixed_dictionaries({"item_id": ids, "propensity": st.floats(0, 1, exclude_min=True)}),
            min_size=1, max_size=40, unique_by=lambda slot: slot["item_id"],
        ),
        "epsilon": finite(0, 1), "policy_version": st.integers(-(2**63), 2**63 - 1),
        "strategy": st.sampled_from(["UNKNOWN", "LEARNED", "POPULARITY", "RANDOM"]), "bucket": texts,
        "candidates": maybe(
            st.lists(
                st.fixed_dictionaries(
                    {
                        "item_id": ids, "category": maybe(texts), "brand": maybe(texts),
                        "price": maybe(finite(0, 1e9)), "vector": st.lists(finite(-100, 100, 32), max_size=3),
                    }
                ),
                max_size=3,
            )
        ),
    }
)  # fmt: skip
RECORDS = {EVENT: EVENTS, DECISION: DECISIONS}
records = st.sampled_from([EVENT, DECISION]).flatmap(lambda name: st.tuples(st.just(name), RECORDS[name]))


@given(st.lists(st.tuples(records, st.booleans()), max_size=6))
@SLOW
def test_columns_are_what_fastavro_reads(given_records):
    schemas = Codec().reader_schemas()
    codec = Codec(registry=Schemas(schemas[EVENT], schemas[DECISION]))
    confluent = {EVENT: b"\0\0\0\0\1", DECISION: b"\0\0\0\0\2"}
    values = [
        written(schemas[name], record, confluent[name]) if framed else CODEC.encode(name, record)
        for (name, record), framed in given_records
    ]
    vocabulary = Vocabulary()
    columns = Decoder(codec, vocabulary).decode(batch(*values))
    assert rows(columns, vocabulary) == [as_row(value, codec) for value in values]


@given(st.lists(records, min_size=1, max_size=6), st.lists(st.integers(0, 6), max_size=3))
@SLOW
def test_ids_are_given_in_the_order_of_the_log_whatever_the_cuts(given_records, cuts):
    values = [CODEC.encode(name, record) for name, record in given_records]
    vocabulary, expected = Vocabulary(), Vocabulary()
    decoder = Decoder(CODEC, vocabulary)
    edges = [0, *sorted(cut for cut in cuts if cut <= len(values)), len(values)]
    for start, stop in pairwise(edges):
        decoder.decode(batch(*values[start:stop]))
    for name, record in given_records:
        lines = record["items"] if name == EVENT else record["slate"] + record["history"]
        expected.intern_all([line["item_id"] for line in lines])
    assert vocabulary.item_ids() == expected.item_ids()


# --- other writers -----------------------------------------------------------------------------------------

TREE = {
    "type": "record", "name": "Tree",
    "fields": [{"name": "x", "type": ["null", "double"]}, {"name": "kids", "type": {"type": "array", "items": "Tree"}}],
}  # fmt: skip
EXTRAS = [  # types of fields that the reader does not know, each with a value
    ("null", None),
    ("boolean", True),
    ("int", -5),
    ("long", 2**62),
    ("float", 1.5),
    ("double", math.nan),
    ("bytes", b"\xff\0"),
    ("string", "ünknown"),
    ({"type": "fixed", "name": "Seven", "size": 7}, b"1234567"),
    ({"type": "enum", "name": "Colour", "symbols": ["RED", "BLUE"]}, "BLUE"),
    ({"type": "array", "items": "null"}, [None] * 3),
    ({"type": "array", "items": {"type": "record", "name": "Nothing", "fields": []}}, [{}, {}]),
    ({"type": "array", "items": {"type": "map", "values": ["null", "long"]}}, [{"a": 1, "b": None}, {}]),
    (TREE, {"x": 1.0, "kids": [{"x": None, "kids": []}, {"x": 2.0, "kids": [{"x": 0.5, "kids": []}]}]}),
    (["null", "string", "double", {"type": "array", "items": "string"}], ["a", "b"]),
]


class Writer:
    """Another version of a schema: fields left out, added, in other orders, of other types; and records to match."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.extras = draw, 0

    def record(self, schema: Any, values: list[Any]) -> tuple[Any, list[Any]]:
        """The schema varied, and the same records for it."""
        fields, made = [], [dict[str, Any]() for _ in values]
        for field in schema["fields"]:
            if "default" in field and self.draw(st.sampled_from([False, False, False, True])):
                continue
            kind, varied = self.type(field["type"], [value[field["name"]] for value in values], field["name"])
            fields.append({"name": field["name"], "type": kind})
            for target, value in zip(made, varied, strict=True):
                target[field["name"]] = value
        for kind, value in self.draw(st.lists(st.sampled_from(EXTRAS), max_size=2)):
            self.extras += 1
            fields.append({"name": f"extra{self.extras}", "type": self.unnamed(kind)})
            for target in made:
                target[f"extra{self.extras}"] = value
        return {"type": "record", "name": schema["name"], "fields": self.draw(st.permutations(fields))}, made

    def unnamed(self, kind: Any) -> Any:
        """A copy whose names no other has."""
        return json.loads(
            json.dumps(kind)
            .replace('"Tree"', f'"Tree{self.extras}"')
            .replace('"Nothing"', f'"Nothing{self.extras}"')
            .replace('"Seven"', f'"Seven{self.extras}"')
            .replace('"Colour"', f'"Colour{self.extras}"')
        )

    def type(self, kind: Any, values: list[Any], name: str) -> tuple[Any, list[Any]]:
        pick = self.draw(st.integers(0, 5))
        if isinstance(kind, list):
            return self.union(kind[1], values, name, pick)
        if isinstance(kind, dict) and kind["type"] == "array":
            flat, made = self.type(kind["items"], [x for value in values for x in value], name)
            ends = np.cumsum([0, *(len(value) for value in values)])
            return {"type": "array", "items": flat}, [made[a:b] for a, b in pairwise(ends)]
        if isinstance(kind, dict) and kind["type"] == "record":
            return self.record(kind, values)
        if isinstance(kind, dict) and kind["type"] == "enum":
            symbols = self.draw(st.permutations([*kind["symbols"], "BRAND_NEW"]))
            return {"type": "enum", "name": kind["name"], "symbols": symbols}, values
        if isinstance(kind, dict) and kind["type"] == "map":
            return kind, values
        plain = kind["type"] if isinstance(kind, dict) else kind  # a logical type is none to the writer
        match plain, pick:
            case "string", 0:
                return "bytes", [value.encode() for value in values]
            case "string" | "double", 1:
                return ["boolean", plain], values  # a union, all of whose records can be read
            case "double", 2 if name != "propensity":
                return "float", [float32(value) for value in values]
            case "double" | "float", 3:
                return "int", [math.ceil(max(min(value, 1000), -1000)) for value in values]
            case "double" | "float" | "long", 4 if name != "timestamp":
                return "int" if plain == "long" else "long", [
                    int(max(min(value, 9e6), -9e6)) for value in values
                ]
        return plain, values

    def union(self, kind: Any, values: list[Any], name: str, pick: int) -> tuple[Any, list[Any]]:
        if pick == 0:
            return "null", [None] * len(values)
        present = [value for value in values if value is not None]
        varied, made = self.type(kind, present, name)
        if isinstance(varied, list):  # Avro has no union within a union
            varied, made = kind, present
        if pick == 1 and len(present) == len(values):
            return varied, made
        rest = iter(made)
        branches = (
            ["null", varied] if pick == 2 else [varied, "null"] if pick == 3 else ["null", "boolean", varied]
        )
        return branches, [None if value is None else next(rest) for value in values]


@st.composite
def foreign(draw: Any) -> tuple[list[Any], list[bytes]]:
    """Writers' schemas, with the numbers 1, 2, ..., and records that they wrote, mixed."""
    schemas, values = [], []
    for number in range(1, draw(st.integers(1, 3)) + 1):
        name = draw(st.sampled_from([EVENT, DECISION]))
        schema, made = Writer(draw).record(
            CODEC.reader_schemas()[name], draw(st.lists(RECORDS[name], min_size=1, max_size=3))
        )
        schema["namespace"] = draw(st.sampled_from(["bellwether", "com.example.shop"]))
        schemas.append(schema)
        values += [written(schema, record, b"\0" + number.to_bytes(4, "big")) for record in made]
    return schemas, draw(st.permutations(values))


@given(foreign())
@SLOW
def test_records_of_other_writers_are_read_as_fastavro_reads_them(given_writers):
    schemas, values = given_writers
    codec, vocabulary = Codec(registry=Schemas(*schemas)), Vocabulary()
    got = rows(Decoder(codec, vocabulary).decode(batch(*values)), vocabulary)
    for row, value in zip(got, values, strict=True):
        if fits(*codec.decode(value)):
            assert row == as_row(value, codec)
        else:
            assert isinstance(row, Reason)


def test_every_version_ever_shipped_is_read():
    for path in sorted((Path(__file__).parent / "schemas").glob("v*/*.avsc")):
        schema = json.loads(path.read_text())
        if schema["name"] in ("Event", "Decision"):
            name, record = CODEC.decode(GOOD if schema["name"] == "Event" else DECIDED)
            codec = Codec(registry=Schemas(schema))
            assert reason(written(schema, record, b"\0\0\0\0\1"), codec) == Reason.OK, name


# --- records by hand ---------------------------------------------------------------------------------------

HALF = struct.pack("<f", 0.5)

REFUSED: dict[str, tuple[Reason, bytes | None]] = {
    "null": (Reason.EMPTY, None),
    "no bytes": (Reason.EMPTY, b""),
    "one byte": (Reason.BAD_FRAME, b"\xc3"),
    "half a fingerprint": (Reason.BAD_FRAME, GOOD[:9]),
    "half a schema id": (Reason.BAD_FRAME, b"\0\0\0\1"),
    "another version of the encoding": (Reason.BAD_FRAME, b"\xc3\x02" + GOOD[2:]),
    "JSON": (Reason.BAD_FRAME, b'{"event_id": "e1"}'),
    "no frame": (Reason.BAD_FRAME, GOOD[10:]),
    "an unknown fingerprint": (Reason.UNKNOWN_SCHEMA, b"\xc3\x01" + b"x" * 8 + GOOD[10:]),
    "a schema id, and no registry": (Reason.UNKNOWN_SCHEMA, b"\0\0\0\0\1" + GOOD[10:]),
    "an Item": (Reason.UNKNOWN_SCHEMA, CODEC.encode_item({"item_id": "a"})),
    "a frame and nothing more": (Reason.TRUNCATED, GOOD[:10]),
    "a byte less": (Reason.TRUNCATED, GOOD[:-1]),
    "a length beyond the end": (Reason.TRUNCATED, an_event(params=array(text("k") + varint(9) + b"v"))),
    "a huge length": (Reason.TRUNCATED, an_event(session_id=some(varint(2**62)))),
    "a huge array": (Reason.TRUNCATED, an_event(items=varint(2**62))),
    "a huge map": (Reason.TRUNCATED, an_event(params=varint(2**62))),
    "a block larger than what is left": (Reason.TRUNCATED, an_event(items=varint(-1) + varint(999) + line() + NULL)),
    "half a double": (Reason.TRUNCATED, an_event(value=b"", currency=b"", recommendation_id=b"", params=some(b"1234"))),
    "half a float": (Reason.TRUNCATED, a_decision(history=varint(1) + entry()[:-1])[:-60]),
    "a byte more": (Reason.TRAILING_BYTES, GOOD + b"\0"),
    "two records": (Reason.TRAILING_BYTES, GOOD + GOOD[10:]),
    "a number of 11 bytes": (Reason.BAD_VARINT, an_event(timestamp=b"\x80" * 10 + b"\0")),
    "a number of 65 bits": (Reason.BAD_VARINT, an_event(timestamp=b"\x80" * 9 + b"\2")),
    "an int of 33 bits": (Reason.BAD_VARINT, an_event(items=array(line(quantity=varint(2**31))))),
    "a huge index that nobody reads": (Reason.BAD_VARINT, an_event(items=array(line(index=some(varint(2**31)))))),
    "a negative length": (Reason.BAD_LENGTH, an_event(event_id=varint(-1))),
    "a negative length of what nobody reads": (Reason.BAD_LENGTH, an_event(params=array(text("k") + varint(-1)))),
    "a block of a negative size": (Reason.BAD_LENGTH, an_event(items=varint(-1) + varint(-5) + line() + NULL)),
    "a block of -2**63 elements": (Reason.BAD_LENGTH, an_event(items=varint(-(2**63)) + varint(0))),
    "a third branch of two": (Reason.BAD_INDEX, an_event(session_id=varint(2))),
    "a third branch of two, and then just what would make it the next field's first": (
        Reason.BAD_INDEX,
        an_event(items=array(text("a") + varint(1) + varint(2))),
    ),
    "a negative branch": (Reason.BAD_INDEX, an_event(value=varint(-1) + real(1))),
    "a fifth symbol of four": (Reason.BAD_INDEX, a_decision(strategy=varint(4))),
    "a stray byte in an id": (Reason.BAD_UTF8, an_event(event_id=text(b"e\xff"))),
    "an over-long form": (Reason.BAD_UTF8, an_event(user_id=text(b"\xc0\xaf"))),
    "a surrogate": (Reason.BAD_UTF8, an_event(items=array(line(b"\xed\xa0\x80")))),
    "half a character": (Reason.BAD_UTF8, an_event(user_id=text("ä".encode()[:1]))),
    "a character that ends in the next field": (
        Reason.BAD_UTF8,
        an_event(user_id=text(b"\xc3"), session_id=varint(0, pad=1)),
    ),
    "a character that ends beyond a long id": (
        Reason.BAD_UTF8,
        an_event(user_id=text(b"x" * 20 + b"\xc3"), session_id=varint(0, pad=1)),
    ),
    "beyond U+10FFFF": (Reason.BAD_UTF8, an_event(user_id=text(b"\xf4\x90\x80\x80"))),
    "U+0000": (Reason.BAD_UTF8, an_event(event_id=text("0123456\0"))),
    "U+0000 in what nobody reads": (Reason.BAD_UTF8, an_event(params=array(text("k") + text("\0")))),
    "bad text in a bucket": (Reason.BAD_UTF8, a_decision(bucket=text(b"\x80"))),
    "an empty event_id": (Reason.EMPTY_STRING, an_event(event_id=text(""))),
    "an empty user": (Reason.EMPTY_STRING, a_decision(user_id=text(""))),
    "an empty name": (Reason.EMPTY_STRING, an_event(name=text(""))),
    "an empty item": (Reason.EMPTY_STRING, an_event(items=array(line("a"), line("")))),
    "an id of 1025 bytes": (Reason.TOO_LONG, an_event(event_id=text("x" * 1025))),
    "an item of 1025 bytes": (Reason.TOO_LONG, a_decision(slate=array(slot("ä" * 512 + "x")))),
    "a name of 65 bytes": (Reason.TOO_LONG, an_event(name=text("x" * 65))),
    "1001 items": (Reason.TOO_LONG, an_event(items=array(*[line()] * 1001))),
    "1001 items in blocks": (Reason.TOO_LONG, an_event(items=(varint(91) + line() * 91) * 11 + NULL)),
    "1001 slots": (Reason.TOO_LONG, a_decision(slate=array(*[slot(str(i)) for i in range(1001)]))),
    "1001 entries": (Reason.TOO_LONG, a_decision(history=array(*[entry()] * 1001))),
    "a candidate's vector of 257 numbers": (
        Reason.TOO_LONG,
        a_decision(candidates=some(array(candidate(vector=array(*[HALF] * 257))))),
    ),
    "a candidate's vector of 257 numbers in blocks": (
        Reason.TOO_LONG,
        a_decision(candidates=some(array(candidate(vector=varint(256) + HALF * 256 + array(HALF))))),
    ),
    "a value that is no number": (Reason.BAD_NUMBER, an_event(value=some(real(math.nan)))),
    "an infinite price": (Reason.BAD_NUMBER, an_event(items=array(line(price=some(real(-math.inf)))))),
    "a price of two billions": (Reason.BAD_NUMBER, an_event(items=array(line(price=some(real(2e9)))))),
    "a value of two billions of billions": (Reason.BAD_NUMBER, an_event(value=some(real(2e18)))),
    "minus one piece": (Reason.BAD_NUMBER, an_event(items=array(line(quantity=varint(-1))))),
    "a million and one pieces": (Reason.BAD_NUMBER, an_event(items=array(line(quantity=varint(1_000_001))))),
    "an epsilon above 1": (Reason.BAD_NUMBER, a_decision(epsilon=real(1.01))),
    "an infinite value in a history": (Reason.BAD_NUMBER, a_decision(history=array(entry(value=math.inf)))),
    "a candidate's price below 0": (
        Reason.BAD_NUMBER,
        a_decision(candidates=some(array(candidate(price=some(real(-1)))))),
    ),
    "a candidate's vector with NaN": (
        Reason.BAD_NUMBER,
        a_decision(candidates=some(array(candidate(vector=array(struct.pack("<f", math.nan)))))),
    ),
    "seconds instead of ms": (Reason.BAD_TIMESTAMP, an_event(timestamp=varint(NOON // 1000))),
    "microseconds": (Reason.BAD_TIMESTAMP, a_decision(timestamp=varint(NOON * 1000))),
    "the year 2100": (Reason.BAD_TIMESTAMP, an_event(timestamp=varint(4_102_444_800_000))),
    "the last of 1999": (Reason.BAD_TIMESTAMP, an_event(timestamp=varint(946_684_799_999))),
    "seconds in a history": (Reason.BAD_TIMESTAMP, a_decision(history=array(entry(at=NOON // 1000)))),
    "a propensity of 0": (Reason.BAD_PROPENSITY, a_decision(slate=array(slot("a", 0.0)))),
    "a propensity above 1": (Reason.BAD_PROPENSITY, a_decision(slate=array(slot("a", 1.0000001)))),
    "a propensity that is no number": (Reason.BAD_PROPENSITY, a_decision(slate=array(slot("a", math.nan)))),
    "no slots": (Reason.EMPTY_SLATE, a_decision(slate=array())),
    "one item twice": (Reason.DUPLICATE_SLOT, a_decision(slate=array(slot("a"), slot("b"), slot("a")))),
    "one item twice among many": (
        Reason.DUPLICATE_SLOT,
        a_decision(slate=array(*[slot(str(i)) for i in range(500)], slot("3"))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why_and_harms_no_neighbour(case):
    why, value = REFUSED[case]
    assert reason(value) == why


def test_every_reason_has_its_case():
    assert {why for why, _ in REFUSED.values()} == {why for why in Reason if Reason.OK < why < Reason.LATE}


ACCEPTED = {
    "as it is": GOOD,
    "no items": an_event(items=array()),
    "an id of 1024 bytes": an_event(event_id=text("x" * 1024)),
    "a name of 64 bytes": an_event(name=text("x" * 64)),
    "1000 items": an_event(items=array(*[line()] * 1000)),
    "items in blocks, some with their size": an_event(
        items=varint(-2) + varint(2 * len(line())) + line("x") + line("y") + varint(1) + line("z") + NULL
    ),
    "a number longer than need be": an_event(timestamp=varint(NOON, pad=2)),
    "the first of 2000": an_event(timestamp=varint(946_684_800_000)),
    "the last of 2099": an_event(timestamp=varint(4_102_444_799_999)),
    "an empty recommendation": an_event(recommendation_id=some(text(""))),
    "bounds of numbers": an_event(
        items=array(line(quantity=varint(0), price=some(real(1e9))), line(quantity=varint(1_000_000))),
        value=some(real(-1e12)),
    ),
    "a decision": DECIDED,
    "one slot that was certain": a_decision(slate=array(slot("a", 1.0)), history=array()),
    "the least propensity": a_decision(slate=array(slot("a", 5e-324))),
    "1000 slots and entries": a_decision(
        slate=array(*[slot(str(i)) for i in range(1000)]), history=array(*[entry()] * 1000)
    ),
    "no candidates at all": a_decision(candidates=some(array())),
    "candidates": a_decision(candidates=some(array(candidate(vector=array(HALF))))),
    "candidates' vectors of 256 numbers": a_decision(
        candidates=some(array(*[candidate(item, vector=array(*[HALF] * 256)) for item in "abc"]))
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_keeps_the_bounds_is_read_as_fastavro_reads_it(case):
    vocabulary = Vocabulary()
    columns = Decoder(CODEC, vocabulary).decode(batch(GOOD, ACCEPTED[case], GOOD))
    assert rows(columns, vocabulary)[1] == as_row(ACCEPTED[case])


def test_text_is_what_python_takes_for_utf_8():
    ends = (0x7F, 0x80, 0xBF, 0xC0)
    texts = [bytes([a, b]) for a in range(256) for b in range(256)]
    texts += [bytes([a, b, c]) for a in range(0xE0, 0xF0) for b in range(256) for c in ends]
    texts += [bytes([a, b, c, d]) for a in range(0xF0, 0xF6) for b in range(256) for c in ends for d in ends]
    head, tail = (
        GOOD[:10] + text("e1") + text("n"),
        an_event(items=array())[10 + len(text("e1") + text("purchase")) :],
    )
    tail = tail[len(text("ann")) :]
    columns = decoded(*[head + text(user) + tail for user in texts])

    def why(user: bytes) -> Reason:
        try:
            return Reason.BAD_UTF8 if "\0" in user.decode() else Reason.OK
        except UnicodeDecodeError:
            return Reason.BAD_UTF8

    assert columns.reason.tolist() == [why(user) for user in texts]


def test_a_tiny_propensity_stays_above_0():
    assert 0 < decoded(a_decision(slate=array(slot("a", 5e-324)))).propensity[0] < 1e-37


@pytest.mark.parametrize(
    "whole", [GOOD, DECIDED, ACCEPTED["candidates"]], ids=["event", "decision", "candidates"]
)
def test_a_record_cut_anywhere_is_refused(whole):
    cuts = [whole[:n] for n in range(len(whole))]
    vocabulary = Vocabulary()
    got = rows(
        Decoder(CODEC, vocabulary).decode(batch(*[v for cut in cuts for v in (cut, GOOD)])), vocabulary
    )
    assert got[0] == Reason.EMPTY
    assert set(got[2:20:2]) == {Reason.BAD_FRAME}
    assert set(got[20::2]) == {Reason.TRUNCATED}
    assert set(got[1::2]) == {as_row(GOOD)}


@given(records, st.data())
@SLOW
def test_damaged_records_are_refused_or_read_as_fastavro_reads_them(record, data):
    value = bytearray(CODEC.encode(*record))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(10, len(value) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                value[at] = data.draw(st.integers(0, 255))
            case 1:
                value[at] ^= 1 << data.draw(st.integers(0, 7))
            case 2 if len(value) > 11:
                del value[at]
            case _:
                value[at:at] = data.draw(st.binary(min_size=1, max_size=11))
    check(bytes(value))


@given(st.sampled_from([GOOD[:10], DECIDED[:10]]), st.binary(max_size=60))
@SLOW
def test_garbage_is_refused_or_read_as_fastavro_reads_it(frame, garbage):
    check(frame + garbage)


def check(value: bytes) -> None:
    vocabulary = Vocabulary()
    got = rows(Decoder(CODEC, vocabulary).decode(batch(GOOD, value, GOOD)), vocabulary)
    assert got[0] == got[2] == as_row(GOOD)
    agree(value, got[1])


def agree(value: bytes, got: Any) -> None:
    """What was made of a record is what fastavro makes of it, or it is refused for a reason that is allowed."""
    if not isinstance(got, Reason):
        assert got == as_row(value)
        assert fits(*CODEC.decode(value))
        return
    try:
        name, record = CODEC.decode(value)
    except SchemaError:
        return
    # what fastavro reads and we do not: out of the bounds of proto/*.avsc, or one of the places below
    assert not fits(name, record) or got in {why for why, _ in STRICTER.values()}


TREE_FIELD = {"name": "tree", "type": TREE}
NULLS_FIELD = {"name": "nulls", "type": {"type": "array", "items": "null"}}


def with_field(field: Any) -> tuple[Codec, bytes]:
    """(codec, frame) of an Event that ends in one more field."""
    schema = json.loads(json.dumps(CODEC.reader_schemas()[EVENT]))
    schema["fields"].append(field)
    return Codec(schemas=[schema]), single_object_prefix(schema)


# All the places where we are stricter than fastavro, beside the bounds in proto/*.avsc, which it does not know, and
# bytes after the record's end, which Codec.decode refuses in its stead.
STRICTER: dict[str, tuple[Reason, bytes]] = {
    "an int of 33 bits": (Reason.BAD_VARINT, an_event(items=array(line(index=some(varint(2**31)))))),
    "a negative branch of a union, which Python counts from the end": (
        Reason.BAD_INDEX, an_event(value=varint(-1) + real(1.0))),
    "a negative symbol of an enum, likewise": (Reason.BAD_INDEX, a_decision(strategy=varint(-1))),
    "a block of a negative size, which fastavro steps over": (
        Reason.BAD_LENGTH, an_event(items=varint(-1) + varint(-5) + line() + NULL)),
    "a block that is larger than what is left, likewise": (
        Reason.TRUNCATED, an_event(items=varint(-1) + varint(9999) + line() + NULL)),
    "records within each other, deeper than 64": (
        Reason.BAD_LENGTH, with_field(TREE_FIELD)[1] + GOOD[10:] + (NULL + varint(1)) * 70 + NULL * 2 + NULL * 70),
    "more than a million elements that take no bytes": (
        Reason.TOO_LONG, with_field(NULLS_FIELD)[1] + GOOD[10:] + varint(1_000_001) + NULL),
}  # fmt: skip


@pytest.mark.parametrize("case", STRICTER)
def test_where_we_are_stricter_than_fastavro(case):
    why, value = STRICTER[case]
    known = {frame: codec for codec, frame in map(with_field, (TREE_FIELD, NULLS_FIELD))}
    codec = known.get(value[:10], CODEC)
    name, record = codec.decode(value)
    assert fits(name, record)
    assert reason(value, codec) == why


def test_thousands_of_damaged_records_are_refused_or_read_as_fastavro_reads_them():
    luck = random.Random(DEEP)
    whole = [value for value in ACCEPTED.values() if len(value) < 600]

    def damaged() -> bytes:
        value = bytearray(luck.choice(whole))
        for _ in range(luck.randint(1, 3)):
            at = luck.randrange(10, len(value))
            match luck.randrange(4):
                case 0:
                    value[at] = luck.randrange(256)
                case 1:
                    value[at] ^= 1 << luck.randrange(8)
                case 2 if len(value) > 20:
                    del value[at : at + luck.randint(1, 9)]
                case _:
                    odd = (0, 1, 2, 0x7F, 0x80, 0xFF, luck.randrange(256))
                    value[at:at] = bytes(luck.choice(odd) for _ in range(luck.randint(1, 11)))
        return bytes(value)

    for _ in range(DEEP):
        values = [damaged() for _ in range(2000)]
        vocabulary = Vocabulary()
        for value, got in zip(
            values, rows(Decoder(CODEC, vocabulary).decode(batch(*values)), vocabulary), strict=True
        ):
            agree(value, got)


# --- the rest of a row -------------------------------------------------------------------------------------


def test_bad_rows_keep_their_place():
    columns = decoded(None, GOOD, b"x")
    assert columns.kind.tolist() == [Kind.BAD, Kind.EVENT, Kind.BAD]
    assert columns.offset.tolist() == [100, 101, 102]
    assert columns.item_bounds.tolist() == [0, 0, 2, 2]


def test_items_of_refused_records_get_no_id():
    vocabulary = Vocabulary()
    Decoder(CODEC, vocabulary).decode(batch(an_event(items=array(line("lost"))) + b"\0", GOOD))
    assert vocabulary.item_ids() == ["a", "b"]


def test_items_beyond_the_vocabulary_are_0():
    vocabulary = Vocabulary(max_items=1)
    columns = Decoder(CODEC, vocabulary).decode(batch(GOOD, GOOD))
    assert columns.item.tolist() == [1, 0, 1, 0]
    assert vocabulary.refused == 2


def test_nothing_of_a_row_leaks_into_the_next():
    bare = an_event(items=array(), value=NULL, recommendation_id=NULL)
    columns = decoded(GOOD, a_decision(candidates=some(array())), bare, DECIDED)
    assert np.isnan(columns.value[1:]).all()
    assert columns.recommendation[1:].tolist() == [0, 0, 0]
    assert columns.candidates.tolist() == [False, True, False, False]
    assert columns.epsilon[2] == columns.policy_version[2] == columns.name[3] == 0


def test_large_batches_with_many_items_are_read():
    many = an_event(items=array(*[line(f"item{i}") for i in range(1000)]))
    entries = a_decision(history=array(*[entry(f"seen{i}") for i in range(1000)]))
    vocabulary = Vocabulary()
    columns = Decoder(CODEC, vocabulary).decode(batch(*[many, entries] * 30))
    assert columns.item_bounds[-1] == 30 * 1002
    assert columns.history_bounds[-1] == 30 * 1000
    assert len(vocabulary) == 2000 + 2
    assert set(rows(columns, vocabulary)) == {as_row(many), as_row(entries)}


def test_an_empty_batch_gives_no_rows():
    columns = decoded()
    assert len(columns.kind) == len(columns.item) == 0
    assert columns.item_bounds.tolist() == columns.history_bounds.tolist() == [0]


@given(st.lists(ids, min_size=1, max_size=20), st.integers(1, 50))
@settings(max_examples=30 * DEEP, deadline=None)
def test_users_in_a_partition_that_java_would_not_choose_are_marked(users, partitions):
    values = [an_event(user_id=text(user)) for user in users]
    columns = Decoder(CODEC, Vocabulary(), lambda: partitions).decode(batch(*values, partition=3))
    assert columns.misplaced.tolist() == [partition_of(user.encode(), partitions) != 3 for user in users]


def test_nobody_is_marked_where_the_number_of_partitions_is_not_known():
    assert not decoded(*[an_event(user_id=text(str(i))) for i in range(20)]).misplaced.any()


def test_the_batch_may_come_read_only_and_in_other_types():
    given_batch = batch(GOOD, DECIDED)
    odd = {"partition": given_batch.partition.astype(np.int64), "null": np.zeros(2, np.uint8)}
    other = RecordBatch(**{**given_batch._asdict(), **odd})  # type: ignore[arg-type]
    vocabulary = Vocabulary()
    columns = Decoder(CODEC, vocabulary).decode(other)
    assert rows(columns, vocabulary) == [as_row(GOOD), as_row(DECIDED)]
    assert columns.partition.dtype == np.int32


# --- registries --------------------------------------------------------------------------------------------


def test_a_schema_that_the_registry_learns_later_is_asked_for_then():
    registry = Schemas()
    decoder = Decoder(Codec(registry=registry), Vocabulary())
    value = b"\0\0\0\0\1" + GOOD[10:]
    assert decoder.decode(batch(value)).reason.tolist() == [Reason.UNKNOWN_SCHEMA]
    registry.schemas.append(CODEC.reader_schemas()[EVENT])
    assert decoder.decode(batch(value, GOOD)).reason.tolist() == [Reason.OK, Reason.OK]


def test_while_the_registry_cannot_be_asked_nothing_happens_and_the_batch_may_be_tried_again():
    registry = Schemas(CODEC.reader_schemas()[EVENT])
    registry.down = True
    vocabulary = Vocabulary()
    decoder = Decoder(Codec(registry=registry), vocabulary)
    both = batch(GOOD, b"\0\0\0\0\1" + an_event(items=array(line("new")))[10:])
    with pytest.raises(RegistryUnavailable):
        decoder.decode(both)
    assert len(vocabulary) == 0
    registry.down = False
    assert decoder.decode(both).item.tolist() == [1, 2, 3]


def test_a_version_that_lacks_what_we_need_is_dead_lettered_and_said_so(caplog):
    schema = json.loads(json.dumps(CODEC.reader_schemas()[EVENT]))
    schema["fields"] = [field for field in schema["fields"] if field["name"] != "user_id"]
    record = {field["name"]: None for field in schema["fields"]} | {
        "event_id": "e", "name": "n", "timestamp": NOON, "items": [], "params": {}
    }  # fmt: skip
    codec = Codec(registry=Schemas(schema))
    assert reason(written(schema, record, b"\0\0\0\0\1"), codec) == Reason.UNKNOWN_SCHEMA
    assert "user_id: the writer has no such field" in caplog.text


def test_records_of_the_catalog_are_no_events():
    codec = Codec(registry=Schemas(CODEC.reader_schemas()[ITEM]))
    assert reason(b"\0\0\0\0\1" + CODEC.encode_item({"item_id": "a"})[10:], codec) == Reason.UNKNOWN_SCHEMA
