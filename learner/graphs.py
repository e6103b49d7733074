"""On a GPU, an update as one CUDA graph: it is over a thousand kernels, most of which take longer to launch than run.

A graph does again what was launched while it was captured, with the addresses and the numbers of Python's of then; no
line of Python runs. So it belongs to all that decides what is launched (`key`, and the shapes of what goes in) and to
the addresses of all that stands from one update to the next; where any of these are others, there is another graph, or
none yet. What goes in is copied to where the graph reads it.

    graphs = Graphs(CudaCapture())
    out = graphs.run(work, inputs, key, standing, moved)      # what work(inputs) would give, and does to `moved`

No graph is used before it has done, from the same start, what the same work does without: one that does not, or that
cannot be captured, is told in the log, and from then on there are none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SETTLED: Final = (
    16  # times in a row that work is done without a graph before there is one: a catalog may still grow
)
MOST: Final = 8  # graphs that are kept
# of what the work moves, and of its results, a graph may miss: sums are taken in any order
_MISSED: Final = 0.02

T = TypeVar("T")


class Capture(Protocol):
    """What a device takes graphs with."""

    def aside(self, work: Callable[[], Tensor]) -> Tensor:
        """What work() gives, done as it must be before it is first captured."""

    def graph(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, out): what does all that work() would do on the device, and where it puts what work() would give.
        Nothing is done yet.

        Raises: RuntimeError where it cannot be captured.
        """


class CudaCapture:
    """As PyTorch's notes on CUDA graphs have it, whole-network capture."""

    def aside(self, work: Callable[[], Tensor]) -> Tensor:
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        here = torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            out = work()
        here.wait_stream(stream)
        return out

    def graph(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device
            out = work()
        return graph.replay, out


@dataclass
class _Kept:
    where: tuple[int, ...]  # addresses of what stands
    times: int = 0  # that the work was done without a graph
    inputs: Sequence[Tensor] = ()
    replay: Callable[[], None] | None = None
    out: Tensor | None = None

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        assert self.replay is not None
        assert self.out is not None
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        self.replay()
        return self.out


class Graphs:
    """The graphs of one kind of work. One thread owns them."""

    def __init__(self, capture: Capture) -> None:
        self._capture: Capture | None = capture  # None: there are to be none
        self._kept: dict[Hashable, _Kept] = {}  # that was used last comes last
        self.replayed = 0  # times that a graph did the work

    def run(
        self,
        work: Callable[[T], Tensor],
        inputs: T,
        key: Hashable,
        standing: Sequence[Tensor],
        moved: Sequence[Tensor],
    ) -> Tensor:
        """What work(inputs) gives, which the next call may overwrite.

        work: no host waits for it, and only what `key` says decides what it does. inputs: named tuples, tuples and
        tensors; standing: the other tensors that it reads; moved: those of them that it changes.
        """
        if self._capture is None:
            return work(inputs)
        tensors = list(tensors_of(inputs))
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        where = tuple(tensor.data_ptr() for tensor in standing)
        kept = self._kept.pop((key, shapes), None)
        if kept is None or kept.where != where:
            kept = _Kept(where)
        self._kept[key, shapes] = kept
        while len(self._kept) > MOST:
            del self._kept[next(iter(self._kept))]
        if kept.replay is not None:
            self.replayed += 1
            return kept.run(tensors)
        kept.times += 1
        if kept.times <= SETTLED:
            return work(inputs)
        return self._captured(self._capture, kept, work, inputs, moved)

    @torch.no_grad()
    def _captured(
        self,
        capture: Capture,
        kept: _Kept,
        work: Callable[[T], Tensor],
        inputs: T,
        moved: Sequence[Tensor],
    ) -> Tensor:
        """Do the work, and take its graph."""

        def done(given: T) -> Tensor:
            with torch.enable_grad():
                return work(given)

        before = _copies(moved)
        expected = capture.aside(lambda: done(inputs)).clone()
        after = _copies(moved)
        _put(moved, before)
        kept.inputs = _copies(tensors_of(inputs))
        try:
            kept.replay, kept.out = capture.graph(lambda: done(replaced(inputs, iter(kept.inputs))))
            found = kept.run(list(tensors_of(inputs)))
        except RuntimeError as error:
            return self._without(moved, after, expected, f"it cannot be captured: {error}")
        nothing = torch.zeros_like(expected)
        pairs = zip((*moved, found), (*after, expected), (*before, nothing), strict=True)
        worst = max(_missed(*each) for each in pairs)
        if not worst <= _MISSED:  # nor where it is NaN
            return self._without(
                moved, after, expected, f"it misses up to {worst:.3g} of what an update does"
            )
        if not self.replayed:
            logger.info("updates are CUDA graphs from now on")
        return expected

    def _without(self, moved: Sequence[Tensor], after: Sequence[Tensor], out: Tensor, why: str) -> Tensor:
        logger.warning("updates are made without CUDA graphs, which would be faster: %s", why)
        self._capture = None
        self._kept.clear()
        _put(moved, after)
        return out


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree:
            yield from tensors_of(part)


def replaced(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nested tuples with these tensors in place of theirs."""
    if isinstance(tree, Tensor):
        return next(tensors)
    if not isinstance(tree, tuple):
        return tree
    parts = [replaced(part, tensors) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def _copies(tensors: Sequence[Tensor] | Iterator[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.detach().copy_(value)


def _missed(found: Tensor, expected: Tensor, before: Tensor) -> float:
    """How far from what was to come, as a share of the way there; 0 within what numbers of float32 can say."""
    found, expected, before = (tensor.detach().double() for tensor in (found, expected, before))
    away = (found - expected).norm() - 1e-5 * expected.norm()
    return float(away.clamp(min=0) / (expected - before).norm().clamp(min=1e-30))
