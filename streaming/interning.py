"""Strings ↔ small ids, and the hash map below them: numba functions over plain arrays, for every hot loop.

`HashMap` maps uint64 keys to non-negative int64 values by open addressing with linear probing; a NamedTuple of
three arrays, it can be passed into any `@njit` function. `map_reserve` may return a new map, so keep what it
returns. `Vocabulary` is the append-only table of item ids: strings ↔ 1, 2, 3, ...; 0 is "unknown".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic

from streaming.jit import jit

cgutils: Any = _cgutils

MISSING: Final = -1  # what a lookup gives for a key that is not there
_M: Final = np.uint64(0xC6A4A7935BD1E995)  # murmur2's 64-bit multiplier
_SEED: Final = np.uint64(0x42656C6C77657468)
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


# --- hashing ---------------------------------------------------------------------------------------------


@intrinsic
def _load64(typingctx: Any, data: Any, at: Any) -> Any:
    """The 8 bytes of a uint8 array from index `at` as one little-endian uint64; unchecked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.gep(array.data, [args[1]])
        word = ir.IntType(64)
        return builder.load(builder.bitcast(pointer, cgutils.voidptr_t), typ=word, align=1)

    return types.uint64(data, types.intp), codegen


load64: Callable[[npt.NDArray[np.uint8], int], np.uint64] = cast(Any, _load64)


@intrinsic
def _prefetch(typingctx: Any, array: Any, at: Any) -> Any:
    """Start to load array[at] into the cache and go on; harmless whatever `at` is."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), cgutils.voidptr_t)
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        builder.call(function, [pointer, *(ir.Constant(flag, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


prefetch: Callable[[npt.NDArray[Any], int], None] = cast(Any, _prefetch)


@jit
def hash_bytes(data: npt.NDArray[np.uint8], start: int, end: int) -> np.uint64:
    """64-bit hash of data[start:end]: MurmurHash64A with a fixed seed, never 0 (which stands for "none").

    Stored in checkpoints: never change it.
    """
    h = _SEED ^ (np.uint64(end - start) * _M)
    at = start
    while at + 8 <= end:
        k = load64(data, at) * _M
        k = (k ^ (k >> np.uint64(47))) * _M
        h = (h ^ k) * _M
        at += 8
    if at < end:
        tail = np.uint64(0)
        for i in range(end - at):
            tail |= np.uint64(data[at + i]) << np.uint64(8 * i)
        h = (h ^ tail) * _M
    h = (h ^ (h >> np.uint64(47))) * _M
    h ^= h >> np.uint64(47)
    return h if h != 0 else np.uint64(1)


def hash_string(text: str) -> int:
    """The hash that a decoded column holds for this string; 0 for the empty one.

    >>> hash_string("")
    0
    >>> hash_string("a") == hash_string("a") != hash_string("b")
    True
    """
    data = np.frombuffer(text.encode(), np.uint8)
    return int(hash_bytes(data, 0, len(data))) if text else 0


@jit
def combine(a: np.uint64, b: np.uint64) -> np.uint64:
    """One hash of two (order matters), never 0; for composite keys."""
    h = (a ^ (a >> np.uint64(32))) * _GOLDEN + b
    h = (h ^ (h >> np.uint64(29))) * _M
    h ^= h >> np.uint64(32)
    return h if h != 0 else np.uint64(1)


# --- the map ---------------------------------------------------------------------------------------------


class HashMap(NamedTuple):
    """uint64 → int64 ≥ 0, C slots (a power of two), at most half of them taken."""

    keys: npt.NDArray[np.uint64]  # [C]
    values: npt.NDArray[np.int64]  # [C] MISSING where the slot is free
    size: npt.NDArray[np.int64]  # [1] entries


@jit
def map_new(entries: int = 8) -> HashMap:
    """An empty map with room for so many entries."""
    slots = 16
    while slots < 2 * entries:
        slots *= 2
    return HashMap(np.zeros(slots, np.uint64), np.full(slots, MISSING, np.int64), np.zeros(1, np.int64))


@jit
def _home(key: np.uint64, mask: int) -> int:
    """Where the search for a key starts; keys need not be hashes (offsets, counters are fine)."""
    h = key * _GOLDEN
    return int(h ^ (h >> np.uint64(32))) & mask


@jit
def _find(table: HashMap, key: np.uint64) -> int:
    """The slot that holds the key, or the free one where it belongs."""
    mask = len(table.keys) - 1
    slot = _home(key, mask)
    while table.values[slot] != MISSING and table.keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@jit
def map_get(table: HashMap, key: np.uint64) -> int:
    """The key's value, or MISSING (-1)."""
    return table.values[_find(table, key)]


@jit
def map_foresee(table: HashMap, key: np.uint64) -> None:
    """Start to load what the search for this key begins with."""
    slot = _home(key, len(table.keys) - 1)
    prefetch(table.keys, slot)
    prefetch(table.values, slot)


@jit
def map_put(table: HashMap, key: np.uint64, value: int) -> int:
    """Set the key's value; returns the one before, or MISSING. Room must be there: see `map_reserve`."""
    slot = _find(table, key)
    before = table.values[slot]
    if before == MISSING:
        table.keys[slot] = key
        table.size[0] += 1
    table.values[slot] = value
    return before


@jit
def map_add(table: HashMap, key: np.uint64, value: int) -> int:
    """The key's value if it is there, which stays; else put `value` and return MISSING. Room must be there."""
    slot = _find(table, key)
    there = table.values[slot]
    if there == MISSING:
        table.keys[slot] = key
        table.values[slot] = value
        table.size[0] += 1
    return there


@jit
def map_remove(table: HashMap, key: np.uint64) -> int:
    """Take the key out; returns its value, or MISSING. Leaves no tombstone: later entries move up."""
    mask = len(table.keys) - 1
    hole = _find(table, key)
    value = table.values[hole]
    if value == MISSING:
        return MISSING
    slot = hole
    while True:
        slot = (slot + 1) & mask
        if table.values[slot] == MISSING:
            break
        home = _home(table.keys[slot], mask)
        if ((slot - home) & mask) >= ((slot - hole) & mask):  # its search passes the hole: it may move there
            table.keys[hole] = table.keys[slot]
            table.values[hole] = table.values[slot]
            hole = slot
    table.values[hole] = MISSING
    table.size[0] -= 1
    return value


@jit
def map_reserve(table: HashMap, more: int) -> HashMap:
    """A map of the same entries with room for `more` further ones: this very one, or a larger copy."""
    needed = table.size[0] + more
    if 2 * needed <= len(table.keys):
        return table
    larger = map_new(needed)
    for slot in range(len(table.keys)):
        if table.values[slot] != MISSING:
            map_put(larger, table.keys[slot], table.values[slot])
    return larger


@jit
def map_clear(table: HashMap) -> None:
    """Forget every entry; the room stays."""
    table.values[:] = MISSING
    table.size[0] = 0


def map_items(table: HashMap) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """All keys, ascending, and their values: the same for equal maps, whatever their past. For checkpoints."""
    taken = np.flatnonzero(table.values != MISSING)
    order = taken[np.argsort(table.keys[taken])]
    return table.keys[order], table.values[order]


@jit
def map_of(keys: npt.NDArray[np.uint64], values: npt.NDArray[np.int64]) -> HashMap:
    """The map that `map_items` came from."""
    table = map_new(len(keys))
    for i in range(len(keys)):
        map_put(table, keys[i], values[i])
    return table


# --- the vocabulary --------------------------------------------------------------------------------------


@jit
def _same(
    a: npt.NDArray[np.uint8], a_start: int, b: npt.NDArray[np.uint8], b_start: int, length: int
) -> bool:
    for i in range(length):  # noqa: SIM110 (any() is slower under numba)
        if a[a_start + i] != b[b_start + i]:
            return False
    return True


class Tables(NamedTuple):
    """What a vocabulary is made of, for loops that intern as they go."""

    table: HashMap  # hash of an item → its id
    text: npt.NDArray[np.uint8]  # all items end to end
    bounds: npt.NDArray[np.int64]  # item i is text[bounds[i]:bounds[i + 1]]; item 0 is empty
    counts: npt.NDArray[np.int64]  # [3] items known; at most; lookups refused (full, or a clash of hashes)


@jit
def lookup(tables: Tables, key: np.uint64, data: npt.NDArray[np.uint8], start: int, length: int) -> int:
    """The id of data[start:start + length], of hash `key`; MISSING if new; 0 if another string has its hash."""
    found = map_get(tables.table, key)
    if found == MISSING:
        return MISSING
    begin = tables.bounds[found]
    if tables.bounds[found + 1] - begin != length or not _same(tables.text, begin, data, start, length):
        return 0
    return found


@jit
def has_room(tables: Tables, items: int, text: int) -> bool:
    """Whether so many new items of so many bytes in all can be interned."""
    known = tables.counts[0]
    return (
        known + items + 2 <= len(tables.bounds)
        and tables.bounds[known + 1] + text <= len(tables.text)
        and 2 * (known + items) <= len(tables.table.keys)
    )


@jit
def intern(tables: Tables, key: np.uint64, data: npt.NDArray[np.uint8], start: int, length: int) -> int:
    """The id of data[start:start + length], of hash `key`, given now if it is new; 0 if refused.

    The string must not be empty, and there must be room: see `has_room`, `Vocabulary.reserve`.
    """
    found = lookup(tables, key, data, start, length)
    if found == MISSING and tables.counts[0] < tables.counts[1]:
        found = tables.counts[0] + 1
        end = tables.bounds[found] + length
        tables.text[tables.bounds[found] : end] = data[start : start + length]
        tables.bounds[found + 1] = end
        tables.counts[0] = found
        map_put(tables.table, key, found)  # last: whoever finds it here, in another thread, finds its text
    if found <= 0:
        tables.counts[2] += 1
        return 0
    return found


@jit
def foresee(tables: Tables, keys: npt.NDArray[np.uint64], at: int) -> None:
    """Start to load what interning the strings after keys[at] will look at; each further on, the less of it."""
    if at + 12 < len(keys):
        map_foresee(tables.table, keys[at + 12])
        prefetch(tables.bounds, map_get(tables.table, keys[at + 8]))
        prefetch(tables.text, tables.bounds[max(0, map_get(tables.table, keys[at + 4]))])


@jit
def _lookup_all(
    tables: Tables,
    data: npt.NDArray[np.uint8],
    cuts: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int32],
) -> None:
    """ids[i] = id of data[cuts[i]:cuts[i + 1]], 0 where unknown."""
    for i in range(len(ids)):
        key = hash_bytes(data, cuts[i], cuts[i + 1])
        ids[i] = max(0, lookup(tables, key, data, cuts[i], cuts[i + 1] - cuts[i]))


@jit
def _intern_all(
    tables: Tables,
    data: npt.NDArray[np.uint8],
    cuts: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int32],
    begin: int,
) -> int:
    """As _lookup_all, from string `begin` on, with new ids; returns where it stopped for want of room."""
    for i in range(begin, len(ids)):
        start, length = cuts[i], cuts[i + 1] - cuts[i]
        if length > 0:
            if not has_room(tables, 1, length):
                return i
            ids[i] = intern(tables, hash_bytes(data, start, start + length), data, start, length)
    return len(ids)


def compile_vocabulary() -> None:
    """Have the loops compiled that take strings in, look them up, and make room."""
    vocabulary = Vocabulary(1)
    vocabulary.reserve(1, 1)  # tables grow when they are full
    vocabulary.ids(["i"])
    vocabulary.intern("i")


class Vocabulary:
    """Item ids ↔ 1, 2, 3, ... in order of first sight; append-only, so an id once given stays.

    0 stands for unknown items: those never interned, and those beyond `max_items` (counted in `refused`). One
    thread may intern while others look up.

    >>> vocabulary = Vocabulary(max_items=2)
    >>> [vocabulary.intern(item) for item in ("phone", "case", "phone", "cable")], vocabulary.refused
    ([1, 2, 1, 0], 1)
    >>> vocabulary.item_id(2), vocabulary.id_of("cable")
    ('case', 0)
    """

    def __init__(self, max_items: int = 10_000_000) -> None:
        if not 1 <= max_items < 2**31 - 1:
            raise ValueError(f"max_items must be within 1..{2**31 - 2}, not {max_items}")
        self._tables = Tables(
            map_new(1024),
            np.zeros(1 << 14, np.uint8),
            np.zeros(1026, np.int64),
            np.array([0, max_items, 0], np.int64),
        )

    def __len__(self) -> int:
        """How many items have an id; the largest id, too."""
        return int(self._tables.counts[0])

    @property
    def max_items(self) -> int:
        """No more ids are given once there are so many; there may be more, see `restore`."""
        return int(self._tables.counts[1])

    @property
    def refused(self) -> int:
        """How often an item got 0 because the vocabulary was full (or by a clash of 64-bit hashes)."""
        return int(self._tables.counts[2])

    def intern(self, item_id: str) -> int:
        """The item's id, given now if it is new; 0 for the empty string or when the vocabulary is full."""
        return int(self.intern_all([item_id])[0])

    def intern_all(self, item_ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """The ids of these items, [N]; new ones are given in order."""
        data, cuts = _join(item_ids)
        ids = np.zeros(len(item_ids), np.int32)
        done = 0
        while (done := _intern_all(self._tables, data, cuts, ids, done)) < len(ids):
            self.reserve(1, int(cuts[done + 1] - cuts[done]))
        return ids

    @property
    def tables(self) -> Tables:
        """For compiled loops; good until the next `reserve`."""
        return self._tables

    def reserve(self, items: int, text: int) -> None:
        """Make room for so many new items of so many bytes in all."""
        table, old_text, bounds, count = self._tables
        known = len(self)
        self._tables = Tables(
            map_reserve(table, items),
            _extended(old_text, int(bounds[known + 1]) + text),
            _extended(bounds, known + items + 2),
            count,
        )

    def id_of(self, item_id: str) -> int:
        """The item's id, 0 if it has none."""
        return int(self.ids([item_id])[0])

    def ids(self, item_ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """The ids of these items, [N]; 0 where unknown. Gives no new ones."""
        data, cuts = _join(item_ids)
        ids = np.zeros(len(item_ids), np.int32)
        _lookup_all(self._tables, data, cuts, ids)
        return ids

    def item_id(self, i: int) -> str:
        """The item's string. Raises IndexError for an id that was not given."""
        if not 1 <= i <= len(self):
            raise IndexError(f"item {i} of {len(self)}: ids run from 1")
        _, text, bounds, _ = self._tables
        return text[bounds[i] : bounds[i + 1]].tobytes().decode()

    def item_ids(self, first: int = 1) -> list[str]:
        """The strings of items first, first + 1, ... to the last."""
        _, text, bounds, count = self._tables
        cuts = bounds[first : count[0] + 2]
        data = text[
            cuts[0] : cuts[-1]
        ].tobytes()  # no more than that: whoever follows asks for a few at a time
        return [data[a:b].decode() for a, b in pairwise((cuts - cuts[0]).tolist())]

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, as arrays, for a checkpoint."""
        _, text, bounds, count = self._tables
        bounds = bounds[: count[0] + 2].copy()
        return {"text": text[: bounds[-1]].copy(), "bounds": bounds, "count": count.copy()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Become what `state` was taken from; max_items stays as it is now. All items are kept, also beyond it.

        Raises: ValueError if the state contradicts itself.
        """
        text, bounds = frozen(state["text"]), np.array(state["bounds"], np.int64)
        items = len(bounds) - 2
        fresh = Vocabulary(max(1, items))
        fresh.reserve(items, len(text))
        if len(text) != bounds[-1] or np.any(np.diff(bounds) < 0):
            raise ValueError(
                f"damaged vocabulary: {len(text)} bytes of text, bounds {bounds[:3]}...{bounds[-3:]}"
            )
        _intern_all(fresh.tables, text, bounds[1:], np.zeros(items, np.int32), 0)
        if len(fresh) != items or fresh.refused:
            raise ValueError(f"damaged vocabulary: {items} items, but only {len(fresh)} distinct ones")
        fresh.tables.counts[1:] = self.max_items, state["count"][2]
        self._tables = fresh.tables


def _join(strings: Iterable[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The strings end to end in UTF-8, and the N + 1 cuts between them."""
    encoded = [s.encode() for s in strings]
    cuts = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(e) for e in encoded], out=cuts[1:])
    return np.frombuffer(b"".join(encoded) or b"\0", np.uint8), cuts


def _extended(array: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """The array itself if it is so long; else a copy of at least twice its length, with zeros at the end."""
    if length <= len(array):
        return array
    longer = np.zeros(max(length, 2 * len(array)), array.dtype)
    longer[: len(array)] = array
    return longer


def frozen(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A read-only view, the one form in which bytes go into compiled loops (numba compiles for each form anew)."""
    view = np.ascontiguousarray(data, np.uint8).view()
    view.flags.writeable = False
    return view
