"""What the server remembers of the log: histories, purchases and popularity, within a fixed memory."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.user_state import KEEPS, UserState
from streaming.columns import Columns, Kind
from streaming.rewards import CODES, EVENT_NAMES, RewardTable


class Deed(NamedTuple):
    """One event, readably."""

    user: int
    name: str
    items: tuple[int, ...]
    id: int
    timestamp_ms: int = 1000
    price: float = float("nan")
    value: float = float("nan")
    kind: int = int(Kind.EVENT)
    logged_ms: int = 1 << 60


def columns(deeds: list[Deed]) -> Columns:
    """The deeds as the decoder gives them."""
    lengths = [len(deed.items) for deed in deeds]
    total = sum(lengths)
    by_row: dict[str, Any] = {
        "kind": np.array([d.kind for d in deeds], np.uint8),
        "id": np.array([d.id for d in deeds], np.uint64),
        "user": np.array([d.user for d in deeds], np.uint64),
        "timestamp_ms": np.array([d.timestamp_ms for d in deeds], np.int64),
        "logged_ms": np.array([d.logged_ms for d in deeds], np.int64),
        "name": np.array([CODES[d.name] for d in deeds], np.uint8),
        "value": np.array([d.value for d in deeds], np.float64),
        "item_bounds": np.cumsum([0, *lengths]).astype(np.int64),
        "item": np.array([item for d in deeds for item in d.items], np.int32),
        "quantity": np.full(total, 2, np.int32),
        "price": np.array([d.price for d in deeds for _ in d.items], np.float64),
    }
    unused = {name: np.zeros(0) for name in Columns._fields if name not in by_row}
    return Columns(**by_row, **unused)


def state(max_users: int = 100, history_length: int = 4, half_life: float = 1e9) -> UserState:
    return UserState(max_users, history_length, 3, half_life, RewardTable())


def absorb(users: UserState, *deeds: Deed) -> None:
    users.absorb(columns(list(deeds)), 50)


def test_a_history_stands_oldest_first_and_keeps_the_newest() -> None:
    users = state(history_length=3)
    absorb(users, *(Deed(7, "view_item", (item,), id=item, timestamp_ms=item * 10) for item in range(1, 6)))
    history = users.history(7)
    assert history.item.tolist() == [3, 4, 5]
    assert history.timestamp_ms.tolist() == [30, 40, 50]
    assert users.history(8).item.tolist() == []


def test_an_entrys_value_is_price_times_quantity_or_its_share_of_the_events() -> None:
    users = state()
    absorb(users, Deed(7, "view_item", (1,), id=1, price=5.0), Deed(7, "purchase", (2, 3), id=2, value=8.0))
    assert users.history(7).value.tolist() == [10.0, 4.0, 4.0]


def test_a_resent_event_counts_once() -> None:
    users = state()
    deed = Deed(7, "view_item", (1,), id=9)
    absorb(users, deed, deed)
    absorb(users, deed)
    assert users.history(7).item.tolist() == [1]
    assert users.popularity(1)[1] == pytest.approx(RewardTable().reward("view_item"))


def remembered(users: UserState, user: int) -> tuple[list[int], list[int], list[float]]:
    return (
        users.history(user).item.tolist(),
        users.bought(user, since_ms=0).tolist(),
        users.popularity(50).tolist(),
    )


@pytest.mark.parametrize("live", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("imported", [1, 4, 5, 6, 11, 20])
def test_a_log_that_comes_again_changes_nothing(imported: int, live: int) -> None:
    users = state(history_length=4, half_life=2.0)
    old = [Deed(7, "purchase", (i % 9 + 1,), id=i + 1, timestamp_ms=10 + i // 2) for i in range(imported)]
    absorb(users, *old)
    absorb(users, *(Deed(7, "view_item", (20 + i,), id=100 + i, timestamp_ms=90 + i) for i in range(live)))
    before = remembered(users, 7)
    absorb(users, *old)
    assert remembered(users, 7) == before


def test_what_is_older_than_all_of_a_full_history_leaves_no_trace() -> None:
    users = state(history_length=3)
    absorb(users, *(Deed(7, "view_item", (item,), id=item, timestamp_ms=item * 10) for item in (2, 3, 4)))
    absorb(users, Deed(7, "purchase", (1,), id=1, timestamp_ms=10))
    assert users.history(7).item.tolist() == [2, 3, 4]
    assert users.bought(7, since_ms=0).tolist() == []
    assert users.popularity(1)[1] == 0.0


def test_a_basket_larger_than_a_history_is_bought_whole() -> None:
    users = UserState(10, 4, 20, 1e9, RewardTable())
    absorb(users, *(Deed(7, "purchase", (item,), id=item) for item in range(1, 13)))
    assert sorted(users.bought(7, since_ms=0).tolist()) == list(range(1, 13))


def test_a_clock_that_was_ahead_does_not_shut_its_user_out() -> None:
    users = state(history_length=3)
    far = 1 << 50
    absorb(
        users,
        *(Deed(7, "view_item", (i,), id=i, timestamp_ms=far + i, logged_ms=100 + i) for i in range(1, 9)),
    )
    absorb(
        users, *(Deed(7, "view_item", (i,), id=i, timestamp_ms=100 + i, logged_ms=101 + i) for i in (20, 21))
    )
    assert users.history(7).item.tolist() == [8, 20, 21]


def test_decisions_bad_rows_and_events_about_nothing_leave_no_trace() -> None:
    users = state()
    absorb(
        users,
        Deed(7, "view_item", (1,), id=1, kind=int(Kind.DECISION)),
        Deed(7, "view_item", (1,), id=2, kind=int(Kind.BAD)),
        Deed(7, "search", (1,), id=3),
        Deed(7, "view_item", (), id=4),
    )
    assert users.known == 0
    assert users.popularity(1).tolist() == [0.0, 0.0]


def test_what_was_bought_is_remembered_until_it_is_returned_or_long_ago() -> None:
    users = state()
    absorb(users, *(Deed(7, "purchase", (item,), id=item, timestamp_ms=item * 10) for item in (1, 2, 3)))
    absorb(users, Deed(7, "refund", (2,), id=12, timestamp_ms=99))
    assert sorted(users.bought(7, since_ms=0).tolist()) == [1, 3]
    assert users.bought(7, since_ms=30).tolist() == [3]


def test_the_least_recently_active_user_makes_room() -> None:
    users = state(max_users=2)
    absorb(users, *(Deed(user, "purchase", (user,), id=i) for i, user in enumerate((1, 2, 1, 3), 1)))
    assert [len(users.history(user).item) for user in (1, 2, 3)] == [2, 0, 1]
    assert users.bought(3, since_ms=0).tolist() == [3]  # and nothing of the one whose place it took
    assert (users.known, users.forgotten) == (2, 1)


def test_popularity_halves_with_every_half_life_of_events() -> None:
    users = state(half_life=2.0)
    absorb(users, Deed(1, "select_item", (1,), id=1), *(Deed(1, "select_item", (2,), id=i) for i in (2, 3)))
    scores = users.popularity(2)
    assert scores[2] / scores[1] == pytest.approx(2 + 2**0.5)


def test_popularity_stays_finite_however_many_events_come() -> None:
    users = state(half_life=0.01)  # a factor 2 ** 100 with each event
    absorb(users, *(Deed(1, "select_item", (1 + i % 2,), id=i) for i in range(1, 100)))
    scores = users.popularity(2)
    assert np.isfinite(scores).all()
    assert scores[2] > scores[1]


def test_memory_per_user_is_flat_and_known() -> None:
    users = state(max_users=1 << 10, history_length=32)
    before = users.bytes_per_user
    absorb(users, *(Deed(user, "view_item", (1,), id=user) for user in range(1, 5000)))
    assert users.bytes_per_user == before < 1500
    assert users.known == 1 << 10


DEEDS = st.builds(
    Deed,
    user=st.integers(1, 6),
    name=st.sampled_from(["view_item", "purchase", "refund", "search", "add_to_cart"]),
    items=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    id=st.integers(1, 12),
    timestamp_ms=st.integers(1, 100),
    price=st.sampled_from([float("nan"), 1.0]),
    value=st.just(float("nan")),
    kind=st.just(int(Kind.EVENT)),
    logged_ms=st.integers(1, 100),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(DEEDS, max_size=60), st.integers(1, 60))
def test_it_remembers_what_a_plain_python_version_remembers(deeds: list[Deed], cut: int) -> None:
    users = state(max_users=3, history_length=4)
    absorb(users, *deeds[:cut])
    absorb(users, *deeds[cut:])
    plain: OrderedDict[int, deque[tuple[int, int, str, int]]] = OrderedDict()
    passed_ms: dict[int, int] = {}
    for deed in deeds:
        if not KEEPS[CODES[deed.name]] or not deed.items:
            continue
        entries = plain.setdefault(deed.user, deque(maxlen=4))
        plain.move_to_end(deed.user)
        if len(plain) > 3:
            passed_ms.pop(plain.popitem(last=False)[0], None)
        at = deed.timestamp_ms
        left = bool(entries) and at <= passed_ms.get(deed.user, 0) and at < entries[-1][3]
        if left or deed.id in {entry[0] for entry in entries}:
            continue
        for item in deed.items:
            gone = entries[0][3] if len(entries) == 4 else 0
            entries.append((deed.id, item, deed.name, at))
            if len(entries) == 4:
                known = min(max(gone, entries[0][3] - 1), deed.logged_ms)
                passed_ms[deed.user] = max(passed_ms.get(deed.user, 0), known)
    for user in range(1, 7):
        history = users.history(user)
        got = [(int(i), EVENT_NAMES[n]) for i, n in zip(history.item, history.name, strict=True)]
        assert got == [entry[1:3] for entry in plain.get(user, ())]
