"""What becomes of bad, odd and hostile records: one row each, from the log all the way into replay or a dead letter.

Each row of BAD goes into a real log between good records of the same users, in the same batch and partition. It
must come out as a letter with this reason, its bytes, partition and offset; and the learner must hold just what it
would hold without it. `tests/test_decoder.py` has all the variants of bytes, one by one; here the way is tested. Keys
that are not the user, other partitioners and a registry that is down are in `tests/test_intake.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streaming.columns import Reason
from streaming.log import RecordTooLarge
from streaming.schemas import EVENT, Codec, Registry, single_object_prefix
from streaming.sqlite_log import MAX_RECORD_BYTES
from tests.intakes import Letter, Way, learnt_from
from tests.registry import FakeRegistry
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

Records = list[tuple[str, bytes | None]]


def decided(id: str, *items: str, at: float, user: str = "ann") -> tuple[str, bytes]:
    """(user, decision)."""
    slate = array(*[slot(item) for item in items])
    when = varint(NOON + round(at * 1000))
    return user, a_decision(
        recommendation_id=text(id), user_id=text(user), timestamp=when, slate=slate, history=array()
    )


def did(
    name: str, *items: str, at: float, user: str = "ann", id: str = "", seen: str = "", price: float = 10.0
) -> tuple[str, bytes]:
    """(user, event); seen: its recommendation_id."""
    return user, an_event(
        event_id=text(id or f"{user}-{name}-{at}"), name=text(name), user_id=text(user),
        timestamp=varint(NOON + round(at * 1000)), items=array(*[line(i, price=some(real(price))) for i in items]),
        value=NULL, recommendation_id=some(text(seen)) if seen else NULL,
    )  # fmt: skip


BEFORE: Records = [
    decided("r1", "a", "b", at=0),
    did("select_item", "a", at=1, seen="r1"),
    decided("s1", "c", "d", at=2, user="bob"),
]
AFTER: Records = [
    did("add_to_cart", "a", at=3),
    did("purchase", "a", at=4),
    did("select_item", "d", at=5, user="bob", seen="s1"),
    decided("r2", "e", "f", at=6),
]

# --- schemas of strangers ----------------------------------------------------------------------------------

READER = Codec().reader_schemas()[EVENT]
EVIL = json.loads(json.dumps(READER))  # a version of ours, with room for mischief
EVIL["fields"] += [
    {"name": "nothing", "type": {"type": "array", "items": "null"}},
    {"name": "tree", "type": {"type": "record", "name": "Tree", "fields": [
        {"name": "kids", "type": {"type": "array", "items": "Tree"}}]}},
]  # fmt: skip
PAYMENT = {**json.loads(json.dumps(READER)), "name": "Payment"}  # of the same shape, and nothing of ours
REGISTERED = [EVIL, PAYMENT]
EVIL_FRAME, PAYMENT_FRAME, UNKNOWN_FRAME = b"\0\0\0\0\1", b"\0\0\0\0\2", b"\0\0\0\1\0"


def an_evil_event(nothing: bytes = NULL, depth: int = 1) -> bytes:
    tree = varint(1) * depth + varint(0) * (depth + 1)
    return EVIL_FRAME + GOOD[10:] + nothing + tree


# --- the table ---------------------------------------------------------------------------------------------

HUGE_ID = "x" * (MAX_RECORD_BYTES - 200)  # as much as the log takes

BAD: dict[str, tuple[Reason, bytes | None]] = {
    "empty": (Reason.EMPTY, b""),
    "null": (Reason.EMPTY, None),
    "short": (Reason.BAD_FRAME, b"\xc3"),
    "wrong magic": (Reason.BAD_FRAME, b"\xc4\x01" + GOOD[2:]),
    "unknown fingerprint": (Reason.UNKNOWN_SCHEMA, b"\xc3\x01" + b"x" * 8 + GOOD[10:]),
    "unknown schema id": (Reason.UNKNOWN_SCHEMA, UNKNOWN_FRAME + GOOD[10:]),
    "trailing bytes": (Reason.TRAILING_BYTES, GOOD + b"\0"),
    "over-long varint": (Reason.BAD_VARINT, an_event(timestamp=b"\x80" * 10 + b"\0")),
    "negative length": (Reason.BAD_LENGTH, an_event(event_id=varint(-1))),
    "giant length": (Reason.TRUNCATED, an_event(session_id=some(varint(2**62)))),
    "null bomb": (Reason.TOO_LONG, an_evil_event(nothing=varint(2**62) + varint(0))),
    "null bomb in many blocks": (Reason.TOO_LONG, an_evil_event(nothing=varint(500_001) * 2 + varint(0))),
    "block of a negative count beyond all": (Reason.BAD_LENGTH, an_event(items=varint(-(2**63)) + varint(0))),
    "block of a negative count and size": (Reason.BAD_LENGTH, an_event(items=varint(-1) + varint(-9) + line() + NULL)),
    "blocks of negative counts, deeper than any record": (
        Reason.BAD_LENGTH, EVIL_FRAME + GOOD[10:] + NULL + (varint(-1) + varint(0)) * 200),
    "union index out of range": (Reason.BAD_INDEX, an_event(session_id=varint(2))),
    "enum index out of range": (Reason.BAD_INDEX, a_decision(strategy=varint(4))),
    "same-shaped wrong schema by fingerprint": (Reason.UNKNOWN_SCHEMA, single_object_prefix(PAYMENT) + GOOD[10:]),
    "same-shaped wrong schema by id": (Reason.UNKNOWN_SCHEMA, PAYMENT_FRAME + GOOD[10:]),
    "bad UTF-8": (Reason.BAD_UTF8, an_event(user_id=text(b"an\xff"))),
    "U+0000": (Reason.BAD_UTF8, an_event(user_id=text("an\0n"))),
    "id of a megabyte": (Reason.TOO_LONG, an_event(event_id=text(HUGE_ID))),
    "vector of a megabyte": (
        Reason.TOO_LONG,
        a_decision(candidates=some(array(candidate(vector=varint(240_000) + bytes(960_000) + NULL)))),
    ),
    "NaN": (Reason.BAD_NUMBER, an_event(value=some(real(math.nan)))),
    "Inf": (Reason.BAD_NUMBER, an_event(items=array(line(price=some(real(math.inf)))))),
    "absurd price": (Reason.BAD_NUMBER, an_event(items=array(line(price=some(real(1e300)))))),
    "absurd quantity": (Reason.BAD_NUMBER, an_event(items=array(line(quantity=varint(2**31 - 1))))),
    "absurd number in a history": (Reason.BAD_NUMBER, a_decision(history=array(entry(value=-math.inf)))),
    "timestamp of 0": (Reason.BAD_TIMESTAMP, an_event(timestamp=varint(0))),
    "timestamp in seconds": (Reason.BAD_TIMESTAMP, an_event(timestamp=varint(NOON // 1000))),
    "timestamp in year 9999": (Reason.BAD_TIMESTAMP, a_decision(timestamp=varint(253_370_764_800_000))),
    "propensity 0": (Reason.BAD_PROPENSITY, a_decision(slate=array(slot("a", 0.0)))),
    "propensity above 1": (Reason.BAD_PROPENSITY, a_decision(slate=array(slot("a", 1.5)))),
    "propensity NaN": (Reason.BAD_PROPENSITY, a_decision(slate=array(slot("a", math.nan)))),
    "message of a megabyte that is none": (Reason.BAD_FRAME, b"{" * (MAX_RECORD_BYTES - 200)),
}  # fmt: skip


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'log.db'}"


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        for schema in REGISTERED:
            running.add(schema)
        yield running


@pytest.fixture
def codec(registry: FakeRegistry) -> Codec:
    return Codec(registry=Registry(registry.url))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What the good records give."""
    return learnt_from(f"sqlite:///{tmp_path_factory.mktemp('good') / 'log.db'}", BEFORE + AFTER)


def test_the_good_records_give_something_to_compare(undisturbed: list[tuple[Any, ...]]) -> None:
    assert [(item, organic) for item, _, _, _, organic in undisturbed] == [(i, False) for i in "abcdef"]
    assert {item for item, _, reward, _, _ in undisturbed if reward > 0} == {"a", "d"}


@pytest.mark.parametrize("row", BAD)
def test_it_is_dead_lettered_by_name_and_harms_nobody(
    row: str, url: str, codec: Codec, undisturbed: list[tuple[Any, ...]]
) -> None:
    reason, value = BAD[row]
    with Way(url, codec) as way:
        way.send([*BEFORE, ("ann", value), *AFTER]).take().rest()
        (letter,) = way.dead()
        assert letter[1:3] == (0, len(BEFORE))
        assert letter.reason.split(",")[0] == reason.name
        if letter.reason == reason.name:
            assert letter.value == value
        else:  # what fills a record does not fit into a letter with its reason
            assert value is not None
            assert letter.reason == f"{reason.name}, cut from {len(value)} bytes"
            assert value.startswith(letter.value or b"?")
        assert way.late() == []
        assert len(way.batches) == 1  # good and bad came together
        assert way.count("bad") == 1
        assert way.learnt() == undisturbed


@pytest.mark.parametrize("whole", [GOOD, DECIDED], ids=["event", "decision"])
def test_truncated_at_every_byte(whole: bytes, url: str, undisturbed: list[tuple[Any, ...]]) -> None:
    cuts = [whole[:length] for length in range(len(whole))]
    with Way(url) as way:
        way.send([*BEFORE, *(("ann", cut) for cut in cuts), *AFTER]).take().rest()
        reasons = ["EMPTY"] + ["BAD_FRAME"] * 9 + ["TRUNCATED"] * (len(cuts) - 10)
        assert way.dead() == [
            Letter(reason, 0, len(BEFORE) + i, cut)
            for i, (reason, cut) in enumerate(zip(reasons, cuts, strict=True))
        ]
        assert way.learnt() == undisturbed


def test_all_rows_at_once(url: str, codec: Codec, undisturbed: list[tuple[Any, ...]]) -> None:
    rows = list(BAD.values())
    with Way(url, codec) as way:
        way.send([*BEFORE, *(("ann", value) for _, value in rows), *AFTER]).take().rest()
        dead = way.dead()
        assert [letter.offset for letter in dead] == [len(BEFORE) + i for i in range(len(rows))]
        assert [letter.reason.split(",")[0] for letter in dead] == [reason.name for reason, _ in rows]
        assert way.learnt() == undisturbed


def test_too_late(url: str, undisturbed: list[tuple[Any, ...]]) -> None:
    old = did("purchase", "a", at=-90 * 86_400)
    with Way(url) as way:
        way.send([*BEFORE, old, *AFTER]).take().rest()
        assert way.late() == [Letter("LATE", 0, len(BEFORE), old[1])]
        assert way.dead() == []
        assert way.learnt() == undisturbed


def test_a_message_over_the_limit_is_refused_at_the_producer_and_never_reaches_the_log(url: str) -> None:
    over = an_event(params=array(text("k") + text("v" * MAX_RECORD_BYTES)))
    with Way(url) as way:
        with pytest.raises(
            RecordTooLarge, match=r"record of 1,000,\d+ bytes for 'events'; the log takes 1,000,000 at most"
        ):
            way.send([("ann", over)])
        assert way.take().dead() == []


# --- odd, and valid ----------------------------------------------------------------------------------------
# Rewards by default: select_item 1, add_to_cart 2, purchase 5 + nothing for its value; see RewardTable.


def rewards_of(url: str, records: Records, join: Any = None) -> tuple[dict[tuple[int, int], float], Way]:
    """Reward by (offset, slot) once the visits are over, and what was counted."""
    with Way(url, **({} if join is None else {"join": join})) as way:
        way.send(records).take().rest()
        assert way.dead() == way.late() == []
        return {(offset, k): reward for (_, offset, k), reward in way.rewards().items()}, way


def test_a_message_of_a_megabyte_is_learnt_from(url: str, undisturbed: list[tuple[Any, ...]]) -> None:
    padded = an_event(
        event_id=text("big"), name=text("page_view"), timestamp=varint(NOON + 2500), items=array(), value=NULL,
        recommendation_id=NULL, params=array(text("k") + text("v" * (MAX_RECORD_BYTES - 200))),
    )  # fmt: skip
    with Way(url) as way:
        way.send([*BEFORE, ("ann", padded), *AFTER]).take().rest()
        assert way.dead() == []
        assert way.count("events") == 5
        assert way.learnt() == undisturbed  # a page_view is of no item, and earns nothing


def test_a_purchase_without_a_view_is_a_step_of_its_own(url: str) -> None:
    rewards, way = rewards_of(url, [did("purchase", "z", at=0)])
    assert list(rewards) == [(0, 0)]
    assert rewards[0, 0] > 0
    assert way.learnt()[0][-1]  # organic


def test_a_refund_before_its_purchase_waits_and_takes_it_back(url: str) -> None:
    shown = decided("r1", "a", "b", at=0)
    bought, refund = did("purchase", "a", at=20), did("refund", "a", at=10)
    rewards, _ = rewards_of(url, [shown, refund, bought])
    assert rewards == {(0, 0): 0.0, (0, 1): 0.0}


def test_a_refund_of_what_was_never_bought_takes_nothing(url: str) -> None:
    rewards, way = rewards_of(url, [decided("r1", "a", "b", at=0), did("refund", "a", at=10)])
    assert rewards == {(0, 0): 0.0, (0, 1): 0.0}
    assert way.count("unattributed") == 1


def test_an_order_of_200_items_credits_each_where_it_was_shown(url: str) -> None:
    items = [f"item{i}" for i in range(200)]
    bought, shown = did("purchase", *items, at=10), decided("r1", *items[:10], at=0)
    rewards, way = rewards_of(url, [shown, bought])
    assert way.count("attributed_by_item") == 10
    assert len(rewards) == 10 + 190  # what was not shown is a step of its own
    assert len(set(rewards.values())) == 1
    assert min(rewards.values()) > 0


def test_a_click_on_an_item_that_is_not_in_the_slate_credits_none_of_it(url: str) -> None:
    rewards, way = rewards_of(url, [decided("r1", "a", "b", at=0), did("select_item", "z", at=1, seen="r1")])
    assert rewards[0, 0] == rewards[0, 1] == 0
    assert rewards[1, 0] > 0  # the user went there unaided
    assert way.count("organic_steps") == 1


def test_an_unknown_recommendation_id_waits_and_then_goes_by_item(url: str) -> None:
    rewards, way = rewards_of(url, [decided("r1", "a", "b", at=0), did("select_item", "a", at=1, seen="r9")])
    assert rewards == {(0, 0): 1.0, (0, 1): 0.0}
    assert (way.count("waits_expired"), way.count("attributed_by_item")) == (1, 1)


def test_a_stolen_recommendation_id_earns_its_owner_nothing(url: str) -> None:
    theft = did("select_item", "a", at=1, user="eve", seen="r1")
    rewards, _ = rewards_of(url, [decided("r1", "a", "b", at=0, user="ann"), theft])
    assert rewards == {(0, 0): 0.0, (0, 1): 0.0, (1, 0): 1.0}  # the last: a step of the thief's own


def test_schema_versions_may_be_mixed_in_one_batch(
    url: str, registry: FakeRegistry, codec: Codec, undisturbed: list[tuple[Any, ...]]
) -> None:
    newer = json.loads(json.dumps(READER))
    newer["fields"] = [{"name": "shop", "type": "string"}, *reversed(newer["fields"])]
    frame = b"\0" + registry.add(newer).to_bytes(4, "big")

    def again(value: bytes) -> bytes:
        name, record = Codec().decode(value)
        return written(newer, {**record, "shop": "x"}, frame) if name == EVENT else value

    records = BEFORE + AFTER
    with Way(url, codec) as way:
        way.send([(user, again(value or b"") if i % 2 else value) for i, (user, value) in enumerate(records)])
        way.take().rest()
        assert len(way.batches) == 1
        assert way.dead() == []
        assert way.learnt() == undisturbed
