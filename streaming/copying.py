"""Copies a row from one array to another in compiled loops, as C would.

A loop over the elements gives the same and takes three times as long where rows are not in a cache: too few of them
are on their way at once. A slice costs more than the copying.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils as _cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

T = TypeVar("T", bound=np.generic)
cgutils: Any = _cgutils


@intrinsic
def _copy_row(typingctx: Any, source: Any, i: Any, target: Any, j: Any) -> Any:
    if source.dtype != target.dtype or not (source.is_c_contig and target.is_c_contig):
        raise TypingError(f"rows of {source} and {target}: they must be contiguous and of one type")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def row(n: int) -> tuple[Any, Any]:
            """(where row args[n + 1] of array args[n] begins, its length in bytes)."""
            array = context.make_array(signature.args[n])(context, builder, value=args[n])
            length = cgutils.unpack_tuple(builder, array.strides)[0]
            at = context.cast(builder, args[n + 1], signature.args[n + 1], types.intp)
            start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
            return builder.gep(start, [builder.mul(at, length)]), length

        (begin, length), (end, _) = row(0), row(2)
        cgutils.raw_memcpy(builder, end, begin, length, 1)
        return context.get_dummy_value()

    return types.void(source, i, target, j), codegen


# target[j] = source[i]: contiguous arrays with rows of one length, which nobody checks
copy_row: Callable[[npt.NDArray[T], int, npt.NDArray[T], int], None] = cast(Any, _copy_row)
