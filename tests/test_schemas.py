"""The contracts: frames, fingerprints, every version ever shipped, and a schema registry over real HTTP."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastavro
import pytest

from streaming.schemas import (
    DEAD_LETTER,
    EVENT,
    Codec,
    Registry,
    RegistryUnavailable,
    SchemaError,
    prefix_of,
    read_headers,
    single_object_prefix,
)
from tests.registry import FakeRegistry

SHIPPED = sorted((Path(__file__).parent / "schemas").glob("v*/*.avsc"))
# one record of each contract, as the first version has it
RECORDS: dict[str, dict[str, Any]] = {
    "bellwether.Event": {
        "event_id": "e1", "name": "purchase", "user_id": "u1", "session_id": None, "timestamp": 1_700_000_000_123,
        "items": [{"item_id": "a", "quantity": 2, "price": 9.5, "index": None}], "value": 19.0, "currency": "EUR",
        "recommendation_id": "r1", "params": {"transaction_id": "t1"},
    },
    "bellwether.Decision": {
        "recommendation_id": "r1", "user_id": "u1", "session_id": "s", "timestamp": 1_700_000_000_000,
        "history": [{"item_id": "a", "name": "view_item", "timestamp": 1_699_999_999_000, "value": 0.5}],
        "slate": [{"item_id": "b", "propensity": 0.25}], "epsilon": 0.05, "policy_version": 7, "strategy": "LEARNED",
        "bucket": "", "candidates": [{"item_id": "b", "category": None, "brand": "x", "price": 1.0, "vector": [0.5]}],
    },
    "bellwether.Item": {
        "item_id": "a", "category": "phones", "brand": None, "price": 9.5, "in_stock": True, "vector": [1.0, 0.5],
        "title": "A",
    },
    "bellwether.DeadLetter": {
        "reason": "TRUNCATED", "topic": "events", "partition": 3, "offset": 77, "timestamp": 1_700_000_000_000,
        "key": b"u1", "value": b"\xc3\x01",
    },
}  # fmt: skip

# their first versions; a change here would orphan every record out there
FIRST_VERSION = {
    "dead_letter": "c301345ad98489eca843",
    "decision": "c30115b36df112c6212b",
    "event": "c30187400ff5a61b7176",
    "item": "c301cdc45d8d26baadbe",
}


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def minimal(**fields: Any) -> dict[str, Any]:
    return {"event_id": "e", "name": "view_item", "user_id": "u", "timestamp": 1_700_000_000_000, **fields}


def crc_64_avro(data: bytes) -> int:
    """As the Avro specification's Java has it."""
    empty = 0xC15D213AA4D7A795
    table = []
    for i in range(256):
        fp = i
        for _ in range(8):
            fp = (fp >> 1) ^ (empty & -(fp & 1))
        table.append(fp)
    fp = empty
    for byte in data:
        fp = (fp >> 8) ^ table[(fp ^ byte) & 0xFF]
    return fp


def test_the_frame_carries_the_fingerprint_of_the_canonical_form_little_endian() -> None:
    canonical = b'{"name":"R","type":"record","fields":[{"name":"x","type":"long"}]}'
    schema = {
        "type": "record",
        "name": "R",
        "doc": "d",
        "fields": [{"name": "x", "type": "long", "default": 1}],
    }
    assert single_object_prefix(schema) == b"\xc3\x01" + crc_64_avro(canonical).to_bytes(8, "little")


def test_the_frames_of_the_first_version_never_change() -> None:
    prefixes = {
        p.stem: single_object_prefix(json.loads(p.read_text())).hex() for p in SHIPPED if p.parts[-2] == "v1"
    }
    assert prefixes == FIRST_VERSION


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_version_ever_shipped_is_still_read(path: Path) -> None:
    schema = json.loads(path.read_text())
    name = f"{schema['namespace']}.{schema['name']}"
    out = io.BytesIO(prefix := single_object_prefix(schema))
    out.seek(0, io.SEEK_END)
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), RECORDS[name])
    assert Codec().decode(out.getvalue()) == (name, RECORDS[name])
    assert Codec().writer_schemas()[prefix]["name"] == schema["name"]


def test_what_is_shipped_now_is_among_the_versions_that_tests_keep() -> None:
    kept = {single_object_prefix(json.loads(path.read_text())) for path in SHIPPED}
    assert {single_object_prefix(schema) for schema in Codec().reader_schemas().values()} <= kept


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_encoded_is_decoded(name: str) -> None:
    assert Codec().decode(Codec().encode(name, RECORDS[name])) == (name, RECORDS[name])


def test_fields_with_defaults_may_be_left_out() -> None:
    _, event = Codec().decode(Codec().encode_event(minimal()))
    assert event["items"] == []
    assert event["recommendation_id"] is None


@pytest.mark.parametrize(
    "event",
    [
        {"name": "view_item", "user_id": "u", "timestamp": 1},  # no event_id
        minimal(itmes=[]),  # a typo would lose data
        minimal(items=[{"item_id": "a", "prise": 1.0}]),
        minimal(timestamp="now"),
        minimal(items=[{"item_id": 5}]),
    ],
)
def test_a_record_that_does_not_fit_is_refused_by_name(event: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match=EVENT):
        Codec().encode_event(event)


def test_what_is_said_of_a_record_that_does_not_fit_does_not_hold_all_of_it() -> None:
    event = minimal(items=[{"item_id": f"item-{n}"} for n in range(5000)], timestamp="now")
    with pytest.raises(SchemaError, match=EVENT) as refused:
        Codec().encode_event(event)
    assert len(str(refused.value)) < 500
    assert refused.value.__suppress_context__


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: b"\xc3\x01",
        lambda data: b"\xc3\x01" + b"x" * 20,
        lambda data: b"\x00\x00\x00\x00\x07" + data[10:],  # Confluent's frame, and no registry
        lambda data: data[10:],
        lambda data: data[:10] + b"\xff" * 20,
    ],
)
def test_bytes_that_are_no_record_are_refused(spoil: Any) -> None:
    with pytest.raises(SchemaError):
        Codec().decode(spoil(Codec().encode_event(minimal())))


def test_with_a_registry_records_carry_its_id(registry: FakeRegistry) -> None:
    data = Codec(registry.url).encode_event(RECORDS[EVENT])
    assert data[:5] == b"\x00\x00\x00\x00\x01"
    assert registry.subjects == {"bellwether.Event": [1]}
    assert registry.compatibility == {"bellwether.Event": "BACKWARD_TRANSITIVE"}
    assert Codec(registry.url).decode(data) == (EVENT, RECORDS[EVENT])


def test_an_id_is_asked_for_once(registry: FakeRegistry) -> None:
    codec = Codec(registry.url)
    for _ in range(3):
        codec.decode(codec.encode_event(minimal()))
    assert len(registry.requests) == 3  # look up, compatibility, register
    reader = Codec(registry.url)
    for _ in range(3):
        reader.decode(codec.encode_event(minimal()))
    assert registry.requests[3:] == [("GET", "/schemas/ids/1")]


def test_what_is_registered_needs_no_right_to_write(registry: FakeRegistry) -> None:
    registry.add(Codec().reader_schemas()[EVENT], EVENT)
    registry.refuse = "read only"
    assert prefix_of(Codec(registry.url).encode_event(minimal())) == b"\x00\x00\x00\x00\x01"


def test_a_shops_own_newer_schema_is_read_by_ours(registry: FakeRegistry) -> None:
    theirs = json.loads(json.dumps(Codec().reader_schemas()[EVENT]))
    theirs["namespace"] = "com.example.shop"
    theirs["fields"].insert(0, {"name": "warehouse", "type": {"type": "map", "values": "long"}})
    number = registry.add(theirs)
    out = io.BytesIO(b"\x00" + number.to_bytes(4, "big"))
    out.seek(5)
    fastavro.schemaless_writer(out, fastavro.parse_schema(theirs), {**RECORDS[EVENT], "warehouse": {"x": 1}})
    assert Codec(registry.url).decode(out.getvalue()) == (EVENT, RECORDS[EVENT])


def test_somebody_elses_schema_is_none_of_ours(registry: FakeRegistry) -> None:
    number = registry.add({"type": "record", "name": "Payment", "fields": []})
    assert Codec(registry.url).resolve(b"\x00" + number.to_bytes(4, "big")) is None


def test_an_id_that_the_registry_does_not_know_is_asked_for_again_after_a_while(
    registry: FakeRegistry,
) -> None:
    now = 0.0
    codec = Codec(registry=Registry(registry.url, forget_s=60, clock=lambda: now))
    prefix = b"\x00\x00\x00\x00\x01"
    assert codec.resolve(prefix) is None
    assert codec.resolve(prefix) is None
    assert len(registry.requests) == 1
    registry.add(Codec().reader_schemas()[EVENT])
    now = 61.0
    assert codec.resolve(prefix) is not None


def test_a_hiccup_of_the_registry_is_retried(registry: FakeRegistry) -> None:
    registry.failures = [503, 500]
    assert Codec(registry.url).encode_event(minimal())[:1] == b"\x00"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_answer_that_says_nothing_about_the_id_is_no_verdict_on_the_record(
    status: int, registry: FakeRegistry
) -> None:
    registry.failures = [status]
    registry.add(Codec().reader_schemas()[EVENT])
    codec = Codec(registry.url)
    with pytest.raises(RegistryUnavailable, match=f"HTTP {status}"):
        codec.resolve(b"\x00\x00\x00\x00\x01")
    assert codec.resolve(b"\x00\x00\x00\x00\x01") is not None


def test_a_registry_that_is_down_is_asked_seldom_and_forgiven_when_it_is_back(registry: FakeRegistry) -> None:
    now = 0.0
    registry.failures = [503, 503]
    registry.add(Codec().reader_schemas()[EVENT])
    codec = Codec(registry=Registry(registry.url, attempts=2, backoff_s=1, clock=lambda: now))
    for _ in range(3):
        with pytest.raises(RegistryUnavailable):
            codec.resolve(b"\x00\x00\x00\x00\x01")
    assert len(registry.requests) == 2
    now = 1.5
    assert codec.resolve(b"\x00\x00\x00\x00\x01") is not None


def test_nobody_listening_is_unavailable_and_the_password_stays_secret() -> None:
    with pytest.raises(RegistryUnavailable) as refused:
        Codec(registry=Registry("http://me:hunter2@127.0.0.1:9", attempts=1)).encode_event(minimal())
    assert "hunter2" not in str(refused.value)


def test_several_registries_are_tried_in_turn(registry: FakeRegistry) -> None:
    assert Codec(f"http://127.0.0.1:9,{registry.url}").encode_event(minimal())[:1] == b"\x00"


def test_a_schema_that_the_registry_refuses_is_said_so(registry: FakeRegistry) -> None:
    registry.refuse = "Schema being registered is incompatible"
    with pytest.raises(
        SchemaError, match=r"bellwether\.Event: HTTP 409 Schema being registered is incompatible"
    ):
        Codec(registry.url).register()


def test_passwords_and_headers_reach_the_registry(registry: FakeRegistry, tmp_path: Path) -> None:
    (tmp_path / "headers").write_text("X-Tenant: shop:1\n\n")
    url = registry.url.replace("http://", "http://me:p%40ss@")
    Codec(registry=Registry(url, headers=read_headers(tmp_path / "headers"))).encode_event(minimal())
    assert registry.headers[0]["Authorization"] == "Basic bWU6cEBzcw=="
    assert registry.headers[0]["X-Tenant"] == "shop:1"


def test_a_headers_file_with_a_broken_line_names_the_line_only(tmp_path: Path) -> None:
    (tmp_path / "headers").write_text("A: b\nsecret-without-colon\n")
    with pytest.raises(SchemaError, match=r"headers:2") as refused:
        read_headers(tmp_path / "headers")
    assert "secret" not in str(refused.value)


def test_dead_letters_need_no_registry(registry: FakeRegistry) -> None:
    codec = Codec(registry.url)
    data = codec.encode(DEAD_LETTER, RECORDS[DEAD_LETTER])
    assert prefix_of(data) == single_object_prefix(codec.reader_schemas()[DEAD_LETTER])
    assert registry.requests == []
