"""Schema resolution: what can be read, what cannot and why, and records that are built to hurt."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from streaming.columns import Reason
from streaming.decoder import DECISION_RULES, EVENT_RULES, Decoder
from streaming.interning import Vocabulary
from streaming.plan import Op, SchemaMismatch, compile_plan, joined
from streaming.schemas import DECISION, EVENT, Codec
from tests.test_decoder import CODEC, GOOD, Schemas, array, batch, line, some, text, varint, written

READERS = CODEC.reader_schemas()
FRAME = b"\0\0\0\0\1"


def version(contract: str = EVENT, /, **changes: Any) -> Any:
    """The contract with some fields' types replaced (None: the field is left out) and new ones at the end."""
    schema = json.loads(json.dumps(READERS[contract]))
    fields = {field["name"]: field for field in schema["fields"]}
    for field, kind in changes.items():
        fields[field] = {"name": field, "type": kind}
    schema["fields"] = [field for field in fields.values() if field["type"] is not None]
    return schema


def mismatch(writer: Any, reader: Any = READERS[EVENT]) -> str:
    with pytest.raises(SchemaMismatch) as refused:
        compile_plan(writer, reader, EVENT_RULES)
    return str(refused.value)


def reasons(schema: Any, *values: bytes) -> list[Reason]:
    """What becomes of records of this version, and of a good one of ours after each."""
    columns = Decoder(Codec(registry=Schemas(schema)), Vocabulary()).decode(
        batch(*[value for each in values for value in (FRAME + each, GOOD)])
    )
    assert set(columns.reason[1::2]) == {Reason.OK}
    return [Reason(code) for code in columns.reason[::2]]


BODY = GOOD[10:]  # an event of our own version, without its frame


@pytest.mark.parametrize(
    ("writer", "why"),
    [
        (version(user_id=None), "user_id: the writer has no such field, and it has no default"),
        (version(timestamp="string"), "timestamp: written as string, read as long"),
        (version(value="string"), "value: written as string, read as one of null, double"),
        (version(items={"type": "array", "items": "string"}), "items: written as string, read as record"),
        (version(items={"type": "map", "values": "string"}), "items: written as map, read as array"),
        (
            version(
                items={
                    "type": "array",
                    "items": {
                        "type": "record",
                        "name": "EventItem",
                        "fields": [
                            {"name": "item_id", "type": "string"},
                            {"name": "quantity", "type": "long"},
                        ],
                    },
                }
            ),
            "items.quantity: written as long, read as int",  # it might not fit
        ),
        (
            version(items={"type": "array", "items": {"type": "record", "name": "Thing", "fields": []}}),
            "items: written as bellwether.Thing, read as bellwether.EventItem",
        ),
        (version(name=["null", "long"]), "name: no branch of null, long can be read"),
        (version(colour="colour"), "'bellwether.colour' is no Avro type"),
        (version(colour={"name": "colour"}), "{'name': 'colour'} is no Avro type"),
    ],
)
def test_what_cannot_be_read_names_the_field_and_why(writer, why):
    assert mismatch(writer) == why


def test_a_reader_without_a_default_for_what_it_must_have_is_refused_too():
    reader = version(DECISION, slate=None)
    reader["fields"].append(
        {**READERS[DECISION]["fields"][5], "name": "slate", "default": [{"item_id": "a"}]}
    )
    with pytest.raises(SchemaMismatch, match="slate: the writer has no such field, and we cannot do without"):
        compile_plan(version(DECISION, slate=None), reader, DECISION_RULES)


def test_a_field_may_have_been_renamed():
    reader = version()
    reader["fields"][2] = {"name": "user_id", "type": "string", "aliases": ["visitor"]}
    writer = version()
    writer["fields"][2]["name"] = "visitor"
    assert np.array_equal(
        compile_plan(writer, reader, EVENT_RULES).code,
        compile_plan(READERS[EVENT], READERS[EVENT], EVENT_RULES).code,
    )


def test_a_branch_that_cannot_be_read_is_refused_only_where_it_is_taken():
    schema = version(name=["string", "long"])
    head, rest = text("e1"), BODY[len(text("e1") + text("purchase")) :]
    readable = head + varint(0) + text("purchase") + rest
    strange = head + varint(1) + varint(5) + rest
    assert reasons(schema, strange, readable) == [Reason.BAD_INDEX, Reason.OK]


def test_a_symbol_that_we_do_not_know_is_refused_only_where_there_is_no_default():
    kinds = {"type": "enum", "name": "Kind", "symbols": ["A", "NEW"]}
    record = {"type": "record", "name": "Event", "fields": [{"name": "kind", "type": kinds}]}
    known = {"type": "enum", "name": "Kind", "symbols": ["A"]}
    strict = {"type": "record", "name": "Event", "fields": [{"name": "kind", "type": known}]}
    lenient = {
        "type": "record",
        "name": "Event",
        "fields": [{"name": "kind", "type": {**known, "default": "A"}}],
    }
    assert Op.FAIL in compile_plan(record, strict, {}).code[:, 0]
    assert Op.FAIL not in compile_plan(record, lenient, {}).code[:, 0]


def test_fixed_fields_must_be_of_one_size():
    def record(size: int) -> Any:
        kind = {"type": "fixed", "name": "F", "size": size}
        return {"type": "record", "name": "R", "fields": [{"name": "x", "type": kind}]}

    compile_plan(record(3), record(3), {})
    with pytest.raises(SchemaMismatch, match="x: written as 3 bytes, read as 4"):
        compile_plan(record(3), record(4), {})


def test_joined_programs_keep_their_own_jumps():
    tree = {
        "type": "record",
        "name": "Tree",
        "fields": [{"name": "kids", "type": {"type": "array", "items": "Tree"}}],
    }
    plans = [
        compile_plan(version(extra=kind), READERS[EVENT], EVENT_RULES) for kind in (["null", "int"], tree)
    ]
    whole, starts = joined(plans)
    assert starts == [0, len(plans[0].code)]
    for plan, start in zip(plans, starts, strict=True):
        code = whole.code[start : start + len(plan.code)]
        assert (code[:, 0] == plan.code[:, 0]).all()
        jumps = np.isin(code[:, 0], (Op.JUMP, Op.CALL, Op.NEXT))
        assert (code[jumps, 1] == plan.code[jumps, 1] + start).all()
        branches = code[code[:, 0] == Op.BRANCH]
        assert all(
            start <= t < start + len(code) for a, b in branches[:, 1:3] for t in whole.targets[a : a + b]
        )


# --- records that are built to hurt ------------------------------------------------------------------------


def test_a_record_that_holds_itself_too_deep_is_refused():
    tree = {
        "type": "record",
        "name": "Tree",
        "fields": [{"name": "kids", "type": {"type": "array", "items": "Tree"}}],
    }
    schema = version(extra=tree)

    def nested(depth: int) -> bytes:
        return varint(1) * depth + varint(0) * (depth + 1)

    assert reasons(schema, BODY + nested(30), BODY + nested(100_000)) == [Reason.OK, Reason.BAD_LENGTH]


def test_too_many_nothings_are_refused_at_once():
    schema = version(extra={"type": "array", "items": "null"})
    assert reasons(
        schema,
        BODY + varint(10**6) + varint(0),
        BODY + varint(10**18) + varint(0),
        BODY + varint(-(10**18)) + varint(0) + varint(0),
        BODY + (varint(1) * 1000) + varint(0),
        BODY + varint(5),
    ) == [Reason.OK, Reason.TOO_LONG, Reason.TOO_LONG, Reason.OK, Reason.TRUNCATED]


def test_so_are_too_many_empty_records():
    empty = {"type": "record", "name": "Empty", "fields": [{"name": "x", "type": "null"}]}
    schema = version(extra={"type": "array", "items": empty})
    assert reasons(schema, BODY + varint(10**18) + varint(0)) == [Reason.TOO_LONG]


def test_what_nobody_reads_is_stepped_over_by_its_own_length():
    schema = version(extra={"type": "map", "values": {"type": "array", "items": ["null", "bytes", "double"]}})
    record = {**CODEC.decode(GOOD)[1], "extra": {"a": [None, b"\xff" * 300, 1.5], "b": [], "ü": [b""]}}
    whole = written(schema, record, b"")
    assert reasons(schema, whole, *[whole[:n] for n in range(len(BODY), len(whole))]) == [
        Reason.OK,
        *[Reason.TRUNCATED] * (len(whole) - len(BODY)),
    ]


def test_a_map_of_records_is_checked_as_the_reader_knows_it():
    many = {"type": "map", "values": "string"}
    assert reasons(version(params=many), BODY) == [Reason.OK]
    assert Decoder(CODEC, Vocabulary()).decode(
        batch(
            GOOD[: -len(array(text("k") + text("v")))] + array(text("k") + text("v"), text("k") + text("w"))
        )
    ).reason.tolist() == [Reason.OK]


def test_items_may_come_from_a_writer_that_knows_only_their_ids():
    kind = {
        "type": "array",
        "items": {"type": "record", "name": "EventItem", "fields": [{"name": "item_id", "type": "bytes"}]},
    }
    value = FRAME + BODY.replace(
        array(line("a", price=some(np.float64(9.5).tobytes())), line("b")), array(text("a"), text("c"))
    )
    vocabulary = Vocabulary()
    columns = Decoder(Codec(registry=Schemas(version(items=kind))), vocabulary).decode(batch(value))
    assert columns.reason.tolist() == [Reason.OK]
    assert vocabulary.item_ids() == ["a", "c"]
    assert columns.quantity.tolist() == [1, 1]
    assert np.isnan(columns.price).all()
