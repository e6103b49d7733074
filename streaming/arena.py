"""Room for copies that are made anew every few seconds, so that they need not be made in memory never touched before.

The first touch of a page costs the kernel more than the copying, on a busy machine ten times as much, and freed
arrays of some megabytes go back to it. `numpy.empty` gives the same arrays without that.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Empty: TypeAlias = Callable[[tuple[int, ...], "npt.DTypeLike"], Array]  # numpy.empty, or that of an Arena

_ALIGNED: Final = 64
_BLOCK: Final = 32 << 20  # bytes, at least
_MINE: Final = (
    2  # references to a block of which there are no arrays: ours, and that of the call that counts them
)


class Arena:
    """Arrays in a few large blocks of memory, which `reset` takes back, all at once. One thread."""

    def __init__(self) -> None:
        self._blocks: list[npt.NDArray[np.uint8]] = []
        self._block = 0  # the one that has room; those before it are full
        self._used = 0  # bytes of it

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return sum(len(block) for block in self._blocks)

    def reset(self) -> None:
        """Begin anew, with what was needed since it was last done. Blocks that are still in use are left to whoever
        uses them."""
        needed = self._blocks[: self._block + 1]
        self._blocks = []
        while needed:
            block = needed.pop(0)
            if sys.getrefcount(block) <= _MINE:
                self._blocks.append(block)
        self._block = self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """As numpy.empty."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        while self._block < len(self._blocks) and self._used + size > len(self._blocks[self._block]):
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(_memory(max(size, _BLOCK)))
        start, self._used = self._used, self._used - (-size // _ALIGNED) * _ALIGNED
        return self._blocks[self._block][start : start + size].view(dtype).reshape(shape)


def copied(array: Array, empty: Empty = np.empty) -> Array:
    """A contiguous copy, in room from `empty`."""
    copy = empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def _memory(size: int) -> npt.NDArray[np.uint8]:
    """In large pages, where the system has them."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
