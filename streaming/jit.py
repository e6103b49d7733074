"""The one way in which our hot loops are compiled."""

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
