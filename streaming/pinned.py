"""Records of arrays as one pointer, for compiled loops that are made of many functions.

numba passes a NamedTuple by value, array by array: a record of 40 arrays is 300 arguments of every call, and
compiling a loop of 80 functions takes minutes. `pin(record)` lays it down once; what it returns reads as the record
does, field by field, records within it too. It counts no references: use it only while the record itself is
alive, so never return it from the function that pinned it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils as _cgutils
from numba.core import imputils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, models, register_model

R = TypeVar("R")
cgutils: Any = _cgutils
PointerModel: Any = models.PrimitiveModel
lower_getattr: Any = imputils.lower_getattr_generic


class Pinned(types.Type):
    """The type of a pinned record."""

    def __init__(self, record: Any) -> None:
        self.record = record
        # in full it takes thousands of bytes, and becomes part of the name of each function that it is passed to
        digest = hashlib.sha256(str(record).encode()).hexdigest()[:16]
        super().__init__(name=f"Pinned({record.instance_class.__name__}, {digest})")


@register_model(Pinned)
class _Model(PointerModel):  # type: ignore[misc]
    def __init__(self, manager: Any, pinned: Pinned) -> None:
        super().__init__(manager, pinned, manager.lookup(pinned.record).get_value_type().as_pointer())


@intrinsic
def _pin(typingctx: Any, record: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return cgutils.alloca_once_value(builder, args[0])

    return Pinned(record)(record), codegen


pin: Callable[[R], R] = cast(Any, _pin)


@infer_getattr
class _Attributes(AttributeTemplate):
    key = Pinned

    def generic_resolve(self, pinned: Pinned, name: str) -> Any:  # type: ignore[override]
        if name not in pinned.record.fields:
            return None
        field = pinned.record.types[pinned.record.fields.index(name)]
        return Pinned(field) if isinstance(field, types.BaseNamedTuple) else field


@lower_getattr(Pinned)
def _attribute(context: Any, builder: Any, pinned: Pinned, pointer: Any, name: str) -> Any:
    index = pinned.record.fields.index(name)
    field = pinned.record.types[index]
    place = cgutils.gep_inbounds(builder, pointer, 0, index)
    if isinstance(field, types.BaseNamedTuple):
        return place
    value = builder.load(place)
    if not isinstance(field, types.Array):
        return value
    array = context.make_array(field)(context, builder, value=value)
    array.meminfo = ir.Constant(array.meminfo.type, None)  # nobody owns it: nothing to count
    array.parent = ir.Constant(array.parent.type, None)
    return array._getvalue()
