"""How fast does replay take in, amend and give out transitions, beside a plain numpy ring of the same rows?

    python -m benchmarks.replay [--transitions 1000000] [--json FILE]

The ring stores each transition with both of its states and draws uniformly: no identities, no amendments, no
priorities, no n-step returns. It is what a buffer could do if it did nothing else. (Ours keeps a state once for all
slots and for both neighbours, so it moves fewer bytes in.)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import record
from learner.replay import Replay, empty_batch
from streaming.transitions import Amendments, Joined, Rejects, States, Transitions

BATCH = 1024
N_STEP = 3


def joined(steps: int, slots: int, history: int, offset: int, rng: np.random.Generator) -> Joined:
    """One push of the joiner: the steps of so many users, each of whom comes back in the next push."""
    rows, states = steps * slots, 2 * steps
    row = np.repeat(np.arange(steps, dtype=np.int32), slots)
    return Joined(
        States(
            np.zeros(states, np.int32),
            np.arange(offset, offset + states),
            np.arange(offset, offset + states) * 1000,
            rng.integers(1, 10_000, (states, history)).astype(np.int32),
            rng.integers(1, 9, (states, history)).astype(np.uint8),
            rng.random((states, history), np.float32),
            rng.random((states, history), np.float32),
        ),
        Transitions(
            np.zeros(rows, np.int32),
            row + np.int64(offset),
            np.tile(np.arange(slots, dtype=np.int16), steps),
            row,
            row + np.int32(steps),
            rng.integers(1, 10_000, rows).astype(np.int32),
            rng.random(rows, np.float32),
            np.full(rows, 0.9, np.float32),
            np.full(rows, 0.1, np.float32),
            np.zeros(rows, np.bool_),
            np.ones(rows, np.int64),
        ),
        nothing(),
        Rejects(np.zeros(0, np.int64), np.zeros(0, np.uint8)),
    )


def nothing() -> Amendments:
    """No amendments."""
    return Amendments(
        np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int16), np.zeros(0, np.float32)
    )


def amendments(count: int, steps: int, slots: int, history: int, rng: np.random.Generator) -> Joined:
    """Rewards for slots all over the buffer."""
    empty = joined(0, slots, history, 0, rng)
    return empty._replace(
        amendments=Amendments(
            np.zeros(count, np.int32),
            rng.integers(0, steps, count),
            rng.integers(0, slots, count).astype(np.int16),
            np.ones(count, np.float32),
        )
    )


class Ring:
    """The ceiling: rows in arrays, copied in and out."""

    def __init__(self, capacity: int, history: int) -> None:
        def states() -> list[npt.NDArray[Any]]:
            dtypes = (np.int32, np.uint8, np.float32, np.float32)
            return [np.zeros((capacity, history), dtype) for dtype in dtypes]

        self.columns = [*states(), *states(), *(np.zeros(capacity, np.float32) for _ in range(4))]
        self.at = 0

    def insert(self, batch: Joined) -> None:
        """Write each transition with both of its states."""
        s, t = batch.states, batch.transitions
        fields = (s.item, s.name, s.age_s, s.value)
        rows = [f[t.state] for f in fields] + [f[t.next_state] for f in fields]
        rows += [t.action, t.reward, t.discount, t.propensity]
        start = self.at % len(self.columns[0])
        for column, values in zip(self.columns, rows, strict=True):
            fits = min(len(values), len(column) - start)
            column[start : start + fits] = values[:fits]
            column[: len(values) - fits] = values[fits:]
        self.at += len(t.action)

    def sample(self, size: int, rng: np.random.Generator) -> list[npt.NDArray[Any]]:
        """Uniformly, with replacement."""
        where = rng.integers(0, min(self.at, len(self.columns[0])), size)
        return [column[where] for column in self.columns]


def per_second(action: Callable[[], object], count: int, repeats: int) -> float:
    """Items a second over the median repeat, so that a neighbour's burst does not decide."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return count / float(np.median(seconds))


def fill(insert: Callable[[Joined], object], batches: list[Joined]) -> float:
    """Transitions a second of inserting all batches, each once."""
    start = time.perf_counter()
    for batch in batches:
        insert(batch)
    return sum(len(batch.transitions.action) for batch in batches) / (time.perf_counter() - start)


def measure(transitions: int, slots: int, history: int) -> dict[str, float]:
    """All figures, at so many transitions kept."""
    rng = np.random.default_rng(0)
    steps = max(transitions // slots, 1)
    push = 2000
    warm = Replay(1000, history)
    warm.insert(
        joined(200, slots, history, 0, rng)._replace(
            amendments=amendments(1, 1, slots, history, rng).amendments
        )
    )
    drawn = warm.sample(8, rng, n_step=N_STEP)
    warm.update_priorities(drawn.index, drawn.reward * 0)

    sizes = [min(push, steps - start) for start in range(0, steps, push)]
    batches = [joined(n, slots, history, i * push, rng) for i, n in enumerate(sizes)]
    replay, ring = Replay(transitions, history), Ring(transitions, history)
    before = fill(replay.insert, batches)
    ring_before = fill(ring.insert, batches)
    # what the system provides in new pages is paid for while filling; a full buffer goes on at this rate:
    again = [joined(n, slots, history, (1 << 32) + i * push, rng) for i, n in enumerate(sizes)]
    insert, ring_insert = fill(replay.insert, again), fill(ring.insert, again)
    out = empty_batch(BATCH, history)
    priority = rng.random(transitions)
    replay.update_priorities(
        np.arange(replay.inserted - len(replay), replay.inserted), priority[: len(replay)]
    )
    sample = per_second(lambda: replay.sample(BATCH, rng, n_step=N_STEP, out=out), BATCH, 300)
    update = per_second(lambda: replay.update_priorities(out.index, priority[:BATCH]), BATCH, 300)
    ring_sample = per_second(lambda: ring.sample(BATCH, rng), BATCH, 300)
    late = amendments(BATCH, steps, slots, history, rng)
    late.amendments.offset[:] += 1 << 32
    amend = per_second(lambda: replay.insert(late), BATCH, 300)
    assert replay.counters()["amended"] > 0
    start = time.perf_counter()
    replay.snapshot()
    snapshot_s = time.perf_counter() - start
    return {
        "insert_per_s": insert,
        "sample_per_s": sample,
        "amend_per_s": amend,
        "update_priorities_per_s": update,
        "first_fill_per_s": before,
        "bytes_per_transition": replay.nbytes / len(replay),
        "snapshot_everything_s": snapshot_s,
        "ring_insert_per_s": ring_insert,
        "ring_first_fill_per_s": ring_before,
        "ring_sample_per_s": ring_sample,
        "ring_bytes_per_transition": sum(c.nbytes for c in ring.columns) / transitions,
        "insert_over_ring": insert / ring_insert,
        "sample_over_ring": sample / ring_sample,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and append to a JSON-lines file."""
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--transitions", type=int, default=1_000_000, help="transitions kept")
    parser.add_argument("--slots", type=int, default=10, help="slots of a step")
    parser.add_argument("--history", type=int, default=32, help="entries of a state")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object a line")
    options = parser.parse_args(arguments)
    figures = measure(options.transitions, options.slots, options.history)
    record.show(figures)
    asked = {
        "transitions": options.transitions,
        "slots": options.slots,
        "history_length": options.history,
    }
    record.append(options.json, "replay", arguments or sys.argv[1:], asked | figures)


if __name__ == "__main__":
    main()
