"""How our hot loops are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """`function` compiled by numba at its first call; typed as the plain function that it reads as.

    It releases the GIL, is cached on disk, and divides as numpy does (no ZeroDivisionError, no checks).
    """
    return cast(F, njit(nogil=True, cache=True, error_model="numpy")(function))


def part(function: F) -> F:
    """A piece of a compiled loop, called by compiled functions only: part of its callers, not cached by itself.

    numba's cache notices changes in a function's own file only: pieces from other files need more, see
    `joiner._compiled`.
    """
    # the wrappers would take longer to compile than the pieces
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast(F, njit(nogil=True, error_model="numpy", **options)(function))
