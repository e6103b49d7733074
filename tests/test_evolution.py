"""Old and new producers together: records of a later Event and Decision, kept as bytes, read by the version of today.

`tests/schemas/evolved/` holds the later schemas (new fields with defaults, a new symbol of an enum, fields in another
order, an event name of tomorrow) and `records.json`, records that were written with them. Made anew by
`python -m tests.test_evolution`, which nobody should need: bytes that are out there do not change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streaming.schemas import Codec, Registry, SchemaError, read_schemas, single_object_prefix
from tests.intakes import Way
from tests.registry import FakeRegistry
from tests.wire import NOON, written

FOLDER = Path(__file__).parent / "schemas" / "evolved"
SCHEMAS = {schema["name"]: schema for schema in read_schemas(FOLDER)}
CODEC = Codec()


def the_records() -> list[tuple[str, dict[str, Any]]]:
    """(name of the schema, record by it), in the order of their times."""

    def event(id: str, name: str, seconds: int, item: str, **more: Any) -> tuple[str, dict[str, Any]]:
        line = {"item_id": item, "price": 5.0, "colour": "red", "quantity": 2, "index": 3}
        record = {"event_id": id, "name": name, "user_id": "ann", "timestamp": NOON + 1000 * seconds,
                  "items": [line], "device": "KIOSK", "warehouse": {"north": 3}, "recommendation_id": None,
                  "loyalty_points": 7}  # fmt: skip
        return "Event", {**record, **more}

    entry = {"item_id": "x", "name": "view_item", "timestamp": NOON - 5000, "value": 1.0}
    decision = {
        "recommendation_id": "r1", "user_id": "ann", "timestamp": NOON, "strategy": "BANDIT", "surface": "cart",
        "slate": [{"item_id": item, "propensity": 0.5, "pinned": True} for item in "ab"], "history": [entry],
        "epsilon": 0.1, "policy_version": 3,
    }  # fmt: skip
    return [
        ("Decision", decision),
        event("e1", "select_item", 1, "a", recommendation_id="r1"),
        event("e2", "share_with_friends", 2, "b"),  # a name that nobody here has heard of
        event("e3", "purchase", 3, "a", value=10.0),
        event("e4", "view_item", 4, "z", device="APP"),
    ]


def as_of_today(name: str, record: dict[str, Any]) -> bytes:
    """The same thing as a producer of today writes it."""
    known = {field["name"] for field in CODEC.reader_schemas()[f"bellwether.{name}"]["fields"]}
    kept = {key: value for key, value in record.items() if key in known}
    if name == "Decision":
        kept |= {
            "strategy": "UNKNOWN",
            "slate": [_only(slot, "item_id", "propensity") for slot in kept["slate"]],
        }
    else:
        kept |= {"items": [_only(line, "item_id", "quantity", "price", "index") for line in kept["items"]]}
    return CODEC.encode(f"bellwether.{name}", kept)


def _only(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: record[name] for name in names}


FIXTURES = json.loads((FOLDER / "records.json").read_text()) if (FOLDER / "records.json").exists() else []
OLD = [("ann", as_of_today(name, record)) for name, record in the_records()]


@pytest.fixture(params=["fingerprints", "registry"])
def producers(request: pytest.FixtureRequest) -> Iterator[tuple[Codec, list[tuple[str, bytes]]]]:
    """(codec, records of the new producers), framed in either way, and made known in the way that goes with it."""
    bodies = [(fixture["schema"], bytes.fromhex(fixture["body"])) for fixture in FIXTURES]
    if request.param == "fingerprints":
        frames = {name: single_object_prefix(schema) for name, schema in SCHEMAS.items()}
        yield Codec(schemas=SCHEMAS.values()), [("ann", frames[name] + body) for name, body in bodies]
        return
    with FakeRegistry() as registry:
        frames = {name: b"\0" + registry.add(schema).to_bytes(4, "big") for name, schema in SCHEMAS.items()}
        codec = Codec(registry=Registry(registry.url))
        yield codec, [("ann", frames[name] + body) for name, body in bodies]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'log.db'}"


def learnt(url: str, codec: Codec, records: list[tuple[str, bytes]]) -> tuple[list[Any], dict[str, int]]:
    with Way(url, codec) as way:
        way.send(records).take().rest()
        assert way.dead() == way.late() == []
        assert len(way.batches) == 1
        return way.learnt(), way.learner.joiner.counters()


@pytest.fixture(scope="module")
def of_old(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, int]]:
    """What the producers of today would have taught."""
    return learnt(f"sqlite:///{tmp_path_factory.mktemp('old') / 'log.db'}", Codec(), OLD)


def test_the_kept_bytes_are_what_a_writer_of_those_schemas_writes() -> None:
    assert made() == FIXTURES


def test_new_producers_teach_what_the_old_ones_would_have(
    producers: tuple[Codec, list[tuple[str, bytes]]], url: str, of_old: tuple[list[Any], dict[str, int]]
) -> None:
    codec, new = producers
    assert learnt(url, codec, new) == of_old
    assert [(item, reward > 0) for item, _, reward, _, _ in of_old[0]] == [
        ("a", True),
        ("b", False),
        ("z", True),
    ]


@pytest.mark.parametrize("odd", [0, 1])
def test_old_and_new_producers_may_take_turns_within_one_batch(
    odd: int,
    producers: tuple[Codec, list[tuple[str, bytes]]],
    url: str,
    of_old: tuple[list[Any], dict[str, int]],
) -> None:
    codec, new = producers
    mixed = [pair[(i + odd) % 2] for i, pair in enumerate(zip(OLD, new, strict=True))]
    assert learnt(url, codec, mixed) == of_old


def test_an_event_that_an_old_and_a_new_producer_both_sent_counts_once(
    producers: tuple[Codec, list[tuple[str, bytes]]], url: str, of_old: tuple[list[Any], dict[str, int]]
) -> None:
    codec, new = producers
    taught, counted = learnt(url, codec, [record for pair in zip(OLD, new, strict=True) for record in pair])
    assert taught != []
    assert [row[:3] for row in taught] == [row[:3] for row in of_old[0]]
    assert counted["duplicates"] == len(OLD)


def test_a_name_and_a_symbol_of_tomorrow_are_read_as_other_and_unknown(
    producers: tuple[Codec, list[tuple[str, bytes]]],
) -> None:
    codec, new = producers
    assert codec.decode(new[0][1])[1]["strategy"] == "UNKNOWN"
    assert codec.decode(new[2][1])[1]["name"] == "share_with_friends"


def test_by_its_fingerprint_a_version_that_nobody_made_known_is_dead_lettered(url: str) -> None:
    frame = single_object_prefix(SCHEMAS["Event"])
    with Way(url) as way:
        way.send([("ann", frame + bytes.fromhex(FIXTURES[1]["body"]))]).take()
        assert [letter.reason for letter in way.dead()] == ["UNKNOWN_SCHEMA"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no Avro schema"),
        ('{"type": "record", "name": "Payment", "fields": []}', "is no version of Event, Decision or Item"),
        (
            '{"type": "record", "name": "Event", "fields": [{"name": "x", "type": "nothing"}]}',
            "is no Avro schema",
        ),
        (None, "holds no .avsc file"),
    ],
)
def test_a_folder_of_schemas_that_holds_something_else_is_refused_by_name(
    text: str | None, said: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "mine.avsc").write_text(text)
    with pytest.raises(SchemaError, match=said):
        read_schemas(tmp_path)


def made() -> list[dict[str, str]]:
    """The kept records."""
    return [
        {"schema": name, "body": written(SCHEMAS[name], record, b"").hex()} for name, record in the_records()
    ]


if __name__ == "__main__":
    (FOLDER / "records.json").write_text(json.dumps(made(), indent=1) + "\n")
