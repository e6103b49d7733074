"""Every bound of proto/policy.proto: what is just inside passes, what is just outside is refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import policy_pb2 as pb
from serving.requests import Invalid, check_batch, check_recommend, parse

NOW_MS = 1_700_000_000_000
Change = Callable[[pb.RecommendRequest], object]


def request(change: Change = lambda _: None) -> pb.RecommendRequest:
    """A request with something in every field, changed."""
    made = pb.RecommendRequest(
        user_id="u",
        session_id="s",
        slate_size=5,
        history=[pb.HistoryEntry(item_id="a", name="view_item", timestamp_ms=NOW_MS, value=1.5)],
        candidates=[pb.Candidate(item_id="a", category="c", brand="b", price=2.0, vector=[0.5])],
        exclude_item_ids=["z"],
        timestamp_ms=NOW_MS,
        epsilon=0.1,
    )
    change(made)
    return made


def field(name: str, value: object) -> Change:
    return lambda r: setattr(r, name, value)


def entry(name: str, value: object) -> Change:
    return lambda r: setattr(r.history[0], name, value)


def candidate(name: str, value: object) -> Change:
    return lambda r: setattr(r.candidates[0], name, value)


def candidates(n: int) -> Change:
    return lambda r: r.candidates.extend(pb.Candidate(item_id=str(i)) for i in range(n - 1))


def histories(n: int) -> Change:
    return lambda r: r.history.extend([pb.HistoryEntry(item_id="a")] * (n - 1))


NAN, INF = float("nan"), float("inf")

INSIDE: list[Change] = [
    lambda _: None,
    field("user_id", "x" * 1024),
    field("user_id", "ü" * 512),
    field("session_id", ""),
    field("session_id", "x" * 1024),
    field("slate_size", 0),
    field("slate_size", 1000),
    field("timestamp_ms", 0),
    field("timestamp_ms", 946_684_800_000),
    field("timestamp_ms", 4_102_444_799_999),
    field("epsilon", 0.0),
    field("epsilon", 1.0),
    lambda r: r.ClearField("epsilon"),
    lambda r: r.ClearField("history"),
    lambda r: r.ClearField("candidates"),
    lambda r: r.exclude_item_ids.extend(["a"] * 9999),
    histories(1000),
    entry("name", ""),
    entry("name", "x" * 64),
    entry("timestamp_ms", 0),
    entry("value", -3.4e38),
    candidates(10_000),
    candidate("category", ""),
    candidate("category", "x" * 1024),
    candidate("price", 0.0),
    candidate("price", 1e9),
    lambda r: r.candidates[0].vector.extend([1.0] * 255),
]

OUTSIDE: list[tuple[str, str, Change]] = [
    ("user_id", "1..1024", field("user_id", "")),
    ("user_id", "1..1024", field("user_id", "x" * 1025)),
    ("user_id", "1..1024", field("user_id", "ü" * 513)),
    ("user_id", "U+0000", field("user_id", "a\0b")),
    ("session_id", "0..1024", field("session_id", "x" * 1025)),
    ("session_id", "U+0000", field("session_id", "\0")),
    ("slate_size", "at most 1000", field("slate_size", 1001)),
    ("timestamp_ms", "2000..2100", field("timestamp_ms", 946_684_799_999)),
    ("timestamp_ms", "2000..2100", field("timestamp_ms", 4_102_444_800_000)),
    ("timestamp_ms", "seconds", field("timestamp_ms", 1_700_000_000)),
    ("timestamp_ms", "2000..2100", field("timestamp_ms", -1)),
    ("epsilon", "0..1", field("epsilon", -0.01)),
    ("epsilon", "0..1", field("epsilon", 1.01)),
    ("epsilon", "0..1", field("epsilon", NAN)),
    ("history", "at most 1000", histories(1001)),
    ("history[0].item_id", "1..1024", entry("item_id", "")),
    ("history[0].item_id", "1..1024", entry("item_id", "x" * 1025)),
    ("history[0].item_id", "U+0000", entry("item_id", "\0")),
    ("history[0].name", "0..64", entry("name", "x" * 65)),
    ("history[0].name", "U+0000", entry("name", "a\0")),
    ("history[0].timestamp_ms", "2000..2100", entry("timestamp_ms", 1)),
    ("history[0].value", "finite", entry("value", NAN)),
    ("history[0].value", "finite", entry("value", INF)),
    ("candidates", "at most 10000", candidates(10_001)),
    ("candidates[0].item_id", "1..1024", candidate("item_id", "")),
    ("candidates[0].item_id", "1..1024", candidate("item_id", "x" * 1025)),
    ("candidates[0].category", "0..1024", candidate("category", "x" * 1025)),
    ("candidates[0].category", "U+0000", candidate("category", "\0")),
    ("candidates[0].brand", "0..1024", candidate("brand", "x" * 1025)),
    ("candidates[0].price", "0..1e+09", candidate("price", -0.01)),
    ("candidates[0].price", "0..1e+09", candidate("price", 1.1e9)),
    ("candidates[0].price", "0..1e+09", candidate("price", NAN)),
    ("candidates[0].vector", "at most 256", lambda r: r.candidates[0].vector.extend([1.0] * 256)),
    ("candidates[0].vector[1]", "finite", lambda r: r.candidates[0].vector.append(INF)),
    ("candidates[1].item_id", "no duplicates", lambda r: r.candidates.add(item_id="a")),
    ("exclude_item_ids", "at most 10000", lambda r: r.exclude_item_ids.extend(["a"] * 10_000)),
]


@pytest.mark.parametrize("change", INSIDE)
def test_a_request_within_its_bounds_passes(change: Change) -> None:
    check_recommend(request(change))


@pytest.mark.parametrize(("where", "bound", "change"), OUTSIDE)
def test_a_request_out_of_bounds_is_refused_by_field_and_bound(
    where: str, bound: str, change: Change
) -> None:
    with pytest.raises(Invalid) as refused:
        check_recommend(request(change))
    assert str(refused.value).startswith(where)
    assert bound in str(refused.value)


def test_a_batch_names_the_position_of_its_first_bad_request() -> None:
    batch = pb.BatchRecommendRequest(requests=[request(), request(entry("value", NAN))])
    with pytest.raises(Invalid, match=r"^requests\[1\]\.history\[0\]\.value: nan"):
        check_batch(batch)


@pytest.mark.parametrize("n", [0, 1001])
def test_a_batch_has_1_to_1000_requests(n: int) -> None:
    with pytest.raises(Invalid, match=rf"^requests: {n} of them; allowed are 1\.\.1000"):
        check_batch(pb.BatchRecommendRequest(requests=[request()] * n))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    with contextlib.suppress(Invalid):  # any other error fails the test
        check_recommend(parse(pb.RecommendRequest, data))
