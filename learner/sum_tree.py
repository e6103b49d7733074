"""A sum tree over plain arrays: draw i with probability value[i] / total in O(log N), change a value in O(log N).

`tree` is float64 [2 P], P a power of two: the root is tree[1], value i is tree[P + i], tree[0] is unused. A parent is
always recomputed from its two children and never adjusted by a difference, so that nothing drifts and a tree
rebuilt from its values equals one that was kept up to date, bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from streaming.jit import jit

Tree = npt.NDArray[np.float64]


def tree_new(size: int) -> Tree:
    """A tree of so many values (at least), all 0."""
    return np.zeros(2 * (1 << max(size - 1, 0).bit_length()))


@jit
def tree_set(tree: Tree, i: int, value: float) -> None:
    """value[i] = value, which must be finite and >= 0."""
    node = len(tree) // 2 + i
    tree[node] = value
    while node > 1:
        node >>= 1
        tree[node] = tree[2 * node] + tree[2 * node + 1]


@jit
def tree_fill(tree: Tree, start: int, end: int, value: float) -> None:
    """value[start:end] = value; O(end - start + log N)."""
    if start >= end:
        return
    half = len(tree) // 2
    tree[half + start : half + end] = value
    tree_repair(tree, start, end)


@jit
def tree_repair(tree: Tree, start: int, end: int) -> None:
    """Recompute what lies above value[start:end], after those were written directly."""
    low = len(tree) // 2 + start
    high = len(tree) // 2 + end - 1
    while low > 1:
        low >>= 1
        high >>= 1
        for node in range(low, high + 1):
            tree[node] = tree[2 * node] + tree[2 * node + 1]


@jit
def tree_find(tree: Tree, mass: float) -> int:
    """The i with value[:i].sum() <= mass < value[:i + 1].sum(); never one whose value is 0.

    mass: in [0, total); a little outside it, as rounding gives, names the first or last value above 0.
    """
    node = 1
    half = len(tree) // 2
    while node < half:
        node *= 2
        left = tree[node]
        # where rounding carries the mass past a subtree, an empty one beside it must not be entered
        if mass >= left and tree[node + 1] > 0.0:
            mass -= left
            node += 1
        elif left == 0.0:
            node += 1
    return node - half


@jit
def tree_find_all(tree: Tree, mass: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """`tree_find` of each mass, [B] -> [B]; a level at a time, so that no search waits for another, and branch-free."""
    left_over = mass.copy()
    node = np.ones(len(mass), np.int32)
    half = len(tree) // 2
    level = 1
    while level < half:
        level *= 2
        for b in range(len(mass)):
            at = 2 * node[b]
            left = tree[at]
            right = np.int32((left == 0.0) | ((left_over[b] >= left) & (tree[at + 1] > 0.0)))
            left_over[b] -= left * right
            node[b] = at + right
    return node.astype(np.int64) - half
