"""Copies in an arena are copies, and no two that are in use share memory."""

from __future__ import annotations

import numpy as np

import streaming.arena as arena_module
from streaming.arena import Arena, copied


def columns(seed):
    rng = np.random.default_rng(seed)
    records = np.zeros(1000, [("key", np.int64), ("flag", np.bool_)])
    records["key"] = rng.integers(0, 1 << 40, 1000)
    return [rng.random((50, 3)), records, records["key"], np.array(seed), np.zeros((0, 4), np.float32)]


def test_they_are_what_was_copied_also_beyond_the_room_there_is(monkeypatch):
    monkeypatch.setattr(arena_module, "_BLOCK", 4096)
    arena = Arena()
    for seed in range(4):
        arena.reset()
        originals = columns(seed)
        for original, copy in zip(originals, [copied(o, arena.empty) for o in originals], strict=True):
            np.testing.assert_array_equal(copy, original)
            assert copy.dtype == original.dtype
            assert copy.flags.c_contiguous
            assert copy.flags.writeable
            assert not np.shares_memory(copy, original)
    assert arena.nbytes > 0


def test_memory_is_used_again_once_nobody_uses_the_copies():
    arena = Arena()
    copied(np.arange(1000), arena.empty)
    arena.reset()
    first = copied(np.arange(1000), arena.empty).ctypes.data
    arena.reset()
    assert copied(np.arange(1000), arena.empty).ctypes.data == first


def test_copies_still_in_use_are_left_alone():
    arena = Arena()
    copied(np.arange(1000), arena.empty)
    arena.reset()
    held = copied(np.arange(1000), arena.empty)[500:]
    arena.reset()
    copied(np.zeros(1000, np.int64), arena.empty)
    assert held.tolist() == list(range(500, 1000))
    arena.reset()
    assert not np.shares_memory(held, copied(np.zeros(1000, np.int64), arena.empty))


def test_room_that_was_needed_once_is_not_kept_for_ever():
    arena = Arena()
    sizes = []
    for count in (20_000_000, 1000, 1000):
        copied(np.zeros(count), arena.empty)
        copied(np.zeros(count), arena.empty)
        sizes.append(arena.nbytes)
        arena.reset()
    assert sizes[0] >= 320_000_000
    assert arena.nbytes < 200_000_000
