"""How our hot loops are compiled."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from numba import njit, types

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """`function` compiled by numba at its first call; typed as the plain function that it reads as.

    It releases the GIL, is cached on disk, and divides as numpy does (no ZeroDivisionError, no checks).
    """
    return cast(F, njit(nogil=True, cache=True, error_model="numpy")(function))


def part(function: F) -> F:
    """A piece of a compiled loop, called by compiled functions only: part of its callers, not cached by itself."""
    # the wrappers would take longer to compile than the pieces
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    dispatcher: Any = njit(nogil=True, error_model="numpy", **options)(function)
    exact = dispatcher.get_call_template
    dispatcher.get_call_template = lambda args, kws: exact(
        tuple(map(_wide, args)), {name: _wide(kind) for name, kind in kws.items()}
    )
    return cast(F, dispatcher)


def _wide(kind: types.Type) -> types.Type:
    """What a piece takes an argument as: integers that int64 holds, constants too, as int64, so that it is compiled
    once for them all and not once for each mix of widths."""
    return types.int64 if isinstance(kind, types.Integer) and kind != types.uint64 else kind


def digest(*modules: ModuleType) -> int:
    """A number, never 0, that changes with the source of these modules.

    numba's cache looks at the age of a function's own file only. A loop that is made of pieces from other files
    takes this number as a closed-over value, which is part of the cache's key, and so notices when they change.
    """
    return zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)) | 1
