"""A device that is not the CPU, on machines that have no other: it computes on the CPU, and is as strict as a GPU.

Tensors made on, or moved to, `DEVICE` are wrapped; an operation that mixes them with tensors of the CPU is refused, as
CUDA refuses it, and what waits for the device (reading a value, a shape that depends on values, a copy to the CPU) is
counted. What it did can be taken as a graph, and done again with the addresses and numbers of then, as CUDA does; what
CUDA could not capture is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("lazy")
aten = torch.ops.aten
# these read indices from the CPU, too
MIXES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default}
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.masked_select.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.is_nonzero.default,
    aten.equal.default,
}


class There(torch.Tensor):
    """A tensor of the other device; `elem` holds its values."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.elem = elem
        return made

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value if isinstance(value, torch.Tensor) else torch.tensor(value))

    def new_tensor(self, data: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=kwargs.get("dtype", self.dtype)).to(kwargs.get("device", self.device))

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.elem!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, None, None)


class _Recording:
    """What a graph does: each operation with the tensors and numbers of then, and where its results go."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, dict[str, Any], list[torch.Tensor]]] = []
        self.own: set[int] = set()  # storages that came to be in it
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of others, as they were
        self.held: list[Any] = []  # no address is given twice

    def expect(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Note what the operation is about to change that was there before: capturing changes nothing."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_flatten(value)[0]:
                    self._keep(tensor)
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in kwargs:
                for tensor in tree_flatten(kwargs[argument.name])[0]:
                    self._keep(tensor)

    def _keep(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own and storage.data_ptr() not in self.before:
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)  # type: ignore[call-overload]
            self.before[storage.data_ptr()] = whole, whole.clone()

    def add(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        results = [part for part in tree_flatten(out)[0] if isinstance(part, torch.Tensor)]
        given = {
            part.untyped_storage().data_ptr()
            for part in tree_flatten((args, kwargs))[0]
            if isinstance(part, torch.Tensor)
        }
        for result in results:
            if result.untyped_storage().data_ptr() not in given:
                self.own.add(result.untyped_storage().data_ptr())
        self.held.append(out)
        # as they are now: an operation may squeeze what another gave, in place
        now = tree_map_only(torch.Tensor, lambda tensor: tensor.detach(), (args, kwargs, results))
        self.operations.append((func, *now))

    def undo(self) -> None:
        for whole, values in self.before.values():
            whole.copy_(values)

    def replay(self) -> None:
        for func, args, kwargs, results in self.operations:
            found = [p for p in tree_flatten(func(*args, **kwargs))[0] if isinstance(p, torch.Tensor)]
            for mine, now in zip(results, found, strict=True):
                if mine.untyped_storage().data_ptr() != now.untyped_storage().data_ptr():
                    mine.copy_(now)


def run(
    func: Any, args: Any, kwargs: dict[str, Any], waits: Counter[str] | None, graph: _Recording | None
) -> Any:
    """One operation, as it is on the other device or on the CPU. waits: counts what waits; graph: is being captured."""
    tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, torch.Tensor)]
    there = [part for part in tensors if isinstance(part, There)]
    device = kwargs.get("device")
    asked = None if device is None else torch.device(device)
    if func not in COPIES and there:
        here = [part for part in tensors if not isinstance(part, There) and part.ndim]
        if here and func not in MIXES:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        if func in MIXES and not isinstance(args[0], There):
            raise RuntimeError(f"{func}: indices of the other device into a tensor of the CPU")
    to_cpu = asked is not None and asked.type == "cpu"
    crosses = func in COPIES and (
        (bool(there) and (to_cpu or not all(isinstance(part, There) for part in tensors)))
        or (asked == DEVICE and not there)
    )
    by_mask = func in MIXES and any(
        isinstance(i, There) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None
    )
    if there and (func in WAITS or by_mask or (crosses and (to_cpu or not isinstance(args[0], There)))):
        if graph is not None:
            raise RuntimeError(f"{func}: the host may not wait for what is being captured")
        if waits is not None:
            waits[str(func)] += 1
    on_device = asked == DEVICE or (bool(there) and not to_cpu)
    if func is aten.copy_.default:
        on_device = isinstance(args[0], There)
    if graph is not None and crosses:
        raise RuntimeError(f"{func}: a graph reads nothing of the CPU's again")
    plain_args, plain_kwargs = tree_map_only(There, lambda t: t.elem, (args, dict(kwargs)))
    if asked == DEVICE:
        plain_kwargs["device"] = torch.device("cpu")
    if func is aten._to_copy.default and there and to_cpu:
        return func(*plain_args, **plain_kwargs).clone()
    if graph is not None and on_device:
        graph.expect(func, plain_args, plain_kwargs)
    out = func(*plain_args, **plain_kwargs)
    if not on_device:
        return out
    if graph is not None:
        graph.add(func, plain_args, plain_kwargs, out)
    wrapped = tree_map_only(torch.Tensor, lambda t: t if isinstance(t, There) else There(t), out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


class _Made(TorchFunctionMode):
    """What is made of Python's numbers goes by the CPU: PyTorch does not ask a dispatch mode about it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class OtherDevice(TorchDispatchMode):
    """While it is entered the device "lazy" holds values; `waits` counts what a program would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._made = _Made()
        self._graph: _Recording | None = None

    def __enter__(self) -> OtherDevice:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.waits, self._graph)

    # --- learner.graphs.Capture

    def aside(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        return work()

    def graph(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        self._graph = graph = _Recording()
        try:
            out = work()
        finally:
            self._graph = None
            graph.undo()

        def replay() -> None:
            with _disable_current_modes():
                graph.replay()

        return replay, out
