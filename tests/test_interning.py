"""The hash map against dict, the hash against a plain MurmurHash64A, the vocabulary against a list."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming import interning
from streaming.interning import (
    MISSING,
    HashMap,
    Vocabulary,
    combine,
    hash_string,
    map_add,
    map_clear,
    map_get,
    map_items,
    map_new,
    map_of,
    map_put,
    map_remove,
    map_reserve,
)

# few keys, of which many share a home slot, so that collisions and wrap-arounds are common
KEYS = st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1), st.integers(0, 30).map(lambda i: i << 59))


def murmur_hash_64a(data: bytes, seed: int) -> int:
    """Austin Appleby's MurmurHash64A, word for word."""
    m, r, mask = 0xC6A4A7935BD1E995, 47, 2**64 - 1
    h = seed ^ (len(data) * m & mask)
    whole = len(data) & ~7
    for i in range(0, whole, 8):
        k = int.from_bytes(data[i : i + 8], "little") * m & mask
        k = (k ^ (k >> r)) * m & mask
        h = (h ^ k) * m & mask
    if whole < len(data):
        h = (h ^ int.from_bytes(data[whole:], "little")) * m & mask
    h = (h ^ (h >> r)) * m & mask
    return h ^ (h >> r)


@settings(deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_the_hash_is_murmur_hash_64a(text: str) -> None:
    assert hash_string(text) == murmur_hash_64a(text.encode(), 0x42656C6C77657468)


def test_the_hash_of_the_empty_string_is_zero_and_stored_hashes_never_change() -> None:
    assert hash_string("") == 0
    assert hash_string("bellwether") == 2081145678636408532  # checkpoints hold such hashes


def test_combining_depends_on_the_order() -> None:
    assert combine(np.uint64(1), np.uint64(2)) != combine(np.uint64(2), np.uint64(1))
    assert combine(np.uint64(0), np.uint64(0)) != 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "add", "remove", "clear"]), KEYS, st.integers(0, 99))))
def test_the_map_is_a_dict(operations: list[tuple[str, int, int]]) -> None:
    table: HashMap = map_new(1)
    model: dict[int, int] = {}
    for operation, key, value in operations:
        k = np.uint64(key)
        table = map_reserve(table, 1)
        if operation == "put":
            assert map_put(table, k, value) == model.get(key, MISSING)
            model[key] = value
        elif operation == "add":
            assert map_add(table, k, value) == model.get(key, MISSING)
            model.setdefault(key, value)
        elif operation == "remove":
            assert map_remove(table, k) == model.pop(key, MISSING)
        elif value < 5:  # seldom, or nothing would ever pile up
            map_clear(table)
            model.clear()
    assert int(table.size[0]) == len(model)
    for key in range(41):
        assert map_get(table, np.uint64(key)) == model.get(key, MISSING)
    keys, values = map_items(table)
    assert list(zip(keys.tolist(), values.tolist(), strict=True)) == sorted(model.items())


def test_removing_amid_a_cluster_loses_nobody() -> None:
    rng = np.random.default_rng(7)
    for _ in range(30):
        keys = rng.permutation(8).astype(np.uint64)  # 8 of 16 slots: as full as it gets
        table = map_of(keys, np.arange(8))
        gone = rng.permutation(8)[:4]
        for i in gone:
            assert map_remove(table, keys[i]) == i
        expected = np.where(np.isin(np.arange(8), gone), MISSING, np.arange(8))
        assert [map_get(table, key) for key in keys] == expected.tolist()


def test_a_map_rebuilt_from_its_items_has_the_same_items() -> None:
    keys = np.arange(1000, dtype=np.uint64) * np.uint64(2**32)
    table = map_of(keys[::-1].copy(), np.arange(1000)[::-1].copy())
    assert [part.tolist() for part in map_items(table)] == [keys.tolist(), list(range(1000))]


def test_reserving_room_that_is_there_gives_the_same_map() -> None:
    table = map_new(100)
    assert map_reserve(table, 100).keys is table.keys
    assert len(map_reserve(table, 1000).keys) >= 2000


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.text(max_size=5), max_size=30), max_size=5))
def test_the_vocabulary_numbers_items_in_order_of_first_sight_however_they_are_cut(
    batches: list[list[str]],
) -> None:
    vocabulary = Vocabulary()
    order = [""]
    for batch in batches:
        order += [item for item in dict.fromkeys(batch) if item not in order]
        expected = [order.index(item) for item in batch]
        assert vocabulary.intern_all(batch).tolist() == expected
        assert vocabulary.ids(batch).tolist() == expected
    assert vocabulary.item_ids() == order[1:]
    assert [vocabulary.item_id(i) for i in range(1, len(order))] == order[1:]


def test_the_vocabulary_grows_past_every_first_size() -> None:
    vocabulary = Vocabulary()
    items = [f"item-{'x' * (i % 50)}-{i}" for i in range(5000)]
    assert vocabulary.intern_all(items).tolist() == list(range(1, 5001))
    assert vocabulary.ids(items[::-1]).tolist() == list(range(5000, 0, -1))
    assert vocabulary.item_ids(first=4999) == items[4998:]


def test_asking_for_the_newest_items_copies_no_others() -> None:
    vocabulary = Vocabulary()
    vocabulary.intern_all([f"{i:050d}" for i in range(20_000)])
    tracemalloc.start()
    newest = vocabulary.item_ids(first=19_999)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert newest == [f"{i:050d}" for i in (19_998, 19_999)]
    assert peak < 10_000  # bytes, of a million


def test_items_never_seen_and_items_beyond_the_bound_are_zero() -> None:
    vocabulary = Vocabulary(max_items=2)
    assert vocabulary.intern_all(["a", "b", "c", "a"]).tolist() == [1, 2, 0, 1]
    assert vocabulary.id_of("c") == 0
    assert (len(vocabulary), vocabulary.refused) == (2, 1)
    with pytest.raises(IndexError, match="item 3 of 2"):
        vocabulary.item_id(3)


def test_two_strings_of_one_hash_are_not_mixed_up() -> None:
    vocabulary = Vocabulary()
    vocabulary.intern("a")
    # as if "b" had the hash of "a": the map says 1, the text says otherwise
    map_put(vocabulary.tables.table, np.uint64(hash_string("b")), 1)
    assert vocabulary.intern("b") == 0
    assert vocabulary.refused == 1


def test_a_restored_vocabulary_goes_on_where_the_first_one_stood() -> None:
    first = Vocabulary(max_items=3)
    first.intern_all(["a", "bb", "ccc", "dddd"])
    second = Vocabulary(max_items=4)
    second.restore(first.state())
    assert second.refused == 1
    assert second.intern_all(["dddd", "bb"]).tolist() == [4, 2]


def test_a_vocabulary_restored_under_a_lower_bound_keeps_what_it_has_and_gives_no_more() -> None:
    first, second = Vocabulary(), Vocabulary(max_items=2)
    first.intern_all(["a", "bb", "ccc"])
    second.restore(first.state())
    assert second.intern_all(["ccc", "a", "dddd"]).tolist() == [3, 1, 0]
    assert (len(second), second.max_items, second.refused) == (3, 2, 1)


def test_a_damaged_vocabulary_is_refused() -> None:
    vocabulary = Vocabulary()
    vocabulary.intern_all(["a", "b"])
    state = vocabulary.state() | {"text": np.frombuffer(b"aa", np.uint8)}
    with pytest.raises(ValueError, match="damaged vocabulary"):
        vocabulary.restore(state)


def test_bounds_of_the_vocabulary_are_named() -> None:
    with pytest.raises(ValueError, match=r"max_items must be within 1\.\.2147483646, not 0"):
        Vocabulary(max_items=0)


def test_the_module_says_what_its_doctests_say() -> None:
    import doctest

    assert doctest.testmod(interning).failed == 0
