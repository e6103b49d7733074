"""How our hot loops are compiled."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar, cast

import numpy as np
from numba import extending, njit, types
from numba.core.caching import FunctionCache

F = TypeVar("F", bound=Callable[..., Any])
Intrinsic: Any = getattr(extending, "_Intrinsic")  # noqa: B009


def jit(function: F) -> F:
    """`function` compiled by numba at its first call; typed as the plain function that it reads as.

    It releases the GIL, is cached on disk until something changes that it is made of, and divides as numpy does (no
    ZeroDivisionError, no checks).
    """
    dispatcher: Any = njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = cast(Any, _Cache)(function)
    return cast(F, dispatcher)


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


class _Cache(FunctionCache):
    """numba's looks at the age of a function's own file only, and would go on with constants and pieces from others
    as they once were."""

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*cast(Any, super())._index_key(sig, codegen), made_of(self._py_func))


def made_of(function: Callable[..., Any]) -> str:
    """A digest of all that is compiled into this function from elsewhere: the constants that it reads, the files of
    the pieces that it calls, and likewise what these read and call."""
    found, seen, left = set(), set(), [cast(FunctionType, function)]
    while left:
        each = left.pop()
        if each in seen:
            continue
        seen.add(each)
        for name, value in _read_by(each):
            piece = getattr(value, "py_func", None)
            if piece is not None:
                left.append(piece)
            if piece is not None or isinstance(value, Intrinsic):
                found.add(_content(sys.modules[value.__module__].__file__))
            elif isinstance(value, np.ndarray):
                found.add(f"{name} {value.dtype} {value.shape} {value.tobytes().hex()}")
            elif isinstance(value, int | float | str | bytes | tuple | np.generic):
                found.add(f"{name} {value!r}")
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


def _read_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function reads of its module, and of modules that this has imported, by name."""
    names, known = function.__code__.co_names, function.__globals__
    places = [known, *(vars(known[name]) for name in names if isinstance(known.get(name), ModuleType))]
    for name in names:
        for place in places:
            if name in place:
                yield name, place[name]


@functools.cache
def _content(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
