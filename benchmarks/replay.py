"""How fast does replay take in, amend and give out transitions, beside a plain numpy ring and dm-reverb?

    python -m benchmarks.replay [--transitions 1000000] [--reverb-python PATH] [--json FILE]

All in one thread. `sample_per_s` is the product's way, in batches of 1,024: by priority, with 3-step returns, both
histories and the whole slate. The ring stores each transition with both of its states and draws uniformly, by numpy's
`take`, into arrays that are there already, as ours does: no identities, no amendments, no priorities, no n-step
returns. It is what a buffer could do if it did nothing else.
Beside it, like for like, ours with 1-step returns and drawing uniformly. Reverb (PyPI's dm-reverb) is measured by
benchmarks/reverb_peer.py in the Python that is given, over fewer transitions, with as many threads as it likes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import record
from benchmarks.memory import bytes_of
from learner.replay import Replay, empty_batch
from streaming.transitions import Amendments, Joined, Rejects, States, Transitions

BATCH = 1024
N_STEP = 3
REPEATS = 300
REVERB_TRANSITIONS = 20_000  # it takes in thousands a second


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
    """The ceiling: rows in arrays, copied in and out by numpy's `take`, from array to array.

    `column[rows]` would do the same four times slower, and `take` without a mode copies once more.
    """

    def __init__(self, capacity: int, history: int) -> None:
        self.columns = self.empty(capacity, history)
        self.at = 0

    @staticmethod
    def empty(rows: int, history: int) -> list[npt.NDArray[Any]]:
        """Columns of so many rows: both states, action, reward, discount and propensity."""
        dtypes = (np.int32, np.uint8, np.float32, np.float32)
        states = [np.zeros((rows, history), dtype) for dtype in 2 * dtypes]
        return [*states, *(np.zeros(rows, np.float32) for _ in range(4))]

    def insert(self, batch: Joined) -> None:
        """Write each transition with both of its states."""
        s, t = batch.states, batch.transitions
        fields = (s.item, s.name, s.age_s, s.value)
        now, after = t.state.astype(np.intp), t.next_state.astype(np.intp)
        start = self.at % len(self.columns[0])
        fits = min(len(now), len(self.columns[0]) - start)
        for column, field, rows in zip(self.columns, 2 * fields, 4 * [now] + 4 * [after], strict=False):
            np.take(field, rows[:fits], axis=0, out=column[start : start + fits], mode="clip")
            np.take(field, rows[fits:], axis=0, out=column[: len(rows) - fits], mode="clip")
        for column, values in zip(
            self.columns[8:], (t.action, t.reward, t.discount, t.propensity), strict=True
        ):
            column[start : start + fits] = values[:fits]
            column[: len(values) - fits] = values[fits:]
        self.at += len(now)

    def sample(self, rng: np.random.Generator, out: list[npt.NDArray[Any]]) -> None:
        """Fill `out`, of `empty`, uniformly and with replacement."""
        where = rng.integers(0, min(self.at, len(self.columns[0])), len(out[0]))
        for column, values in zip(self.columns, out, strict=True):
            np.take(column, where, axis=0, out=values, mode="clip")


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


class Filled:
    """A full buffer beside a full ring, and how fast they took it in."""

    def __init__(self, transitions: int, slots: int, history: int, prioritised: bool = True) -> None:
        self.rng = rng = np.random.default_rng(0)
        self.steps, push = max(transitions // slots, 1), 2000
        self.replay = Replay(transitions, history, prioritised=prioritised)
        self.ring = Ring(transitions, history)
        sizes = [min(push, self.steps - start) for start in range(0, self.steps, push)]
        self.rates = []
        for turn in range(3):
            batches = [joined(n, slots, history, (turn << 32) + i * push, rng) for i, n in enumerate(sizes)]
            self.rates.append([fill(self.replay.insert, batches), fill(self.ring.insert, batches)])
            if turn == 1:
                self.nbytes = self.replay.nbytes
        self.newest = turn << 32  # offset of the first step of the last turn
        self.out, self.ring_out = empty_batch(BATCH, history), Ring.empty(BATCH, history)
        self.priority = rng.random(len(self.replay))
        head = self.replay.inserted
        self.replay.update_priorities(np.arange(head - len(self.replay), head), self.priority)

    def sample(self, n_step: int) -> float:
        """Transitions a second."""
        return per_second(
            lambda: self.replay.sample(BATCH, self.rng, n_step=n_step, out=self.out), BATCH, REPEATS
        )

    def sample_ring(self) -> float:
        """Transitions a second."""
        return per_second(lambda: self.ring.sample(self.rng, self.ring_out), BATCH, REPEATS)

    def update_priorities(self) -> float:
        """Transitions a second, of the batch drawn last."""
        chosen = self.priority[:BATCH]
        return per_second(lambda: self.replay.update_priorities(self.out.index, chosen), BATCH, REPEATS)

    def amend(self, slots: int, history: int) -> float:
        """Rewards a second, all over the buffer."""
        late = amendments(BATCH, self.steps, slots, history, self.rng)
        late.amendments.offset[:] += self.newest
        rate = per_second(lambda: self.replay.insert(late), BATCH, REPEATS)
        assert self.replay.counters()["amended"] > 0
        return rate


def measure(transitions: int, slots: int, history: int) -> dict[str, float]:
    """All figures but the peer's, at so many transitions kept."""
    for prioritised in (True, False):
        warm = Filled(max(2 * BATCH, slots), slots, history, prioritised)  # compiles
        warm.sample(N_STEP), warm.update_priorities(), warm.amend(slots, history)
    full = Filled(transitions, slots, history)
    sample, update = full.sample(N_STEP), full.update_priorities()
    one_step, ring_sample = full.sample(1), full.sample_ring()
    amend = full.amend(slots, history)
    start = time.perf_counter()
    full.replay.snapshot()
    snapshot_s = time.perf_counter() - start
    # what the system provides in new pages is paid for while filling; a full buffer goes on at the last turn's rate
    (insert, ring_insert), (first, ring_first) = full.rates[-1], full.rates[0]
    figures = {
        "insert_per_s": insert,
        "sample_per_s": sample,
        "amend_per_s": amend,
        "update_priorities_per_s": update,
        "first_fill_per_s": first,
        "bytes_per_transition": full.replay.nbytes / len(full.replay),
        "bytes_grown_once_full": full.replay.nbytes - full.nbytes,
        "bytes_per_user": bytes_of(history, slots)["join: a user"],
        "snapshot_everything_s": snapshot_s,
        "ring_insert_per_s": ring_insert,
        "ring_first_fill_per_s": ring_first,
        "ring_sample_per_s": ring_sample,
        "ring_bytes_per_transition": sum(c.nbytes for c in full.ring.columns) / transitions,
        "insert_over_ring": insert / ring_insert,
        "sample_over_ring": sample / ring_sample,
        "sample_1_step_per_s": one_step,
        "sample_1_step_over_ring": one_step / ring_sample,
    }
    del full
    uniform = Filled(transitions, slots, history, prioritised=False)
    figures["sample_1_step_uniform_per_s"] = uniform.sample(1)
    figures["sample_1_step_uniform_over_ring"] = (
        figures["sample_1_step_uniform_per_s"] / uniform.sample_ring()
    )
    return figures


def reverb(python: Path | None, transitions: int, history: int) -> dict[str, float]:
    """The peer's figures; none, and the reason on stderr, where it cannot be had."""
    if python is None:
        print("reverb: skipped; --reverb-python PATH names a Python that has dm-reverb", file=sys.stderr)
        return {}
    command = [str(python), str(Path(__file__).with_name("reverb_peer.py"))]
    size = min(transitions, REVERB_TRANSITIONS)
    command += ["--transitions", str(size), "--history", str(history), "--batch", str(BATCH)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"reverb: skipped; {python} ended with {done.stderr.strip()[-300:]}", file=sys.stderr)
        return {}
    told = json.loads(done.stdout.splitlines()[-1])
    return {"reverb_transitions": size, **{f"reverb_{name}": value for name, value in told.items()}}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and append to a JSON-lines file."""
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--transitions", type=int, default=1_000_000, help="transitions kept")
    parser.add_argument("--slots", type=int, default=10, help="slots of a step")
    parser.add_argument("--history", type=int, default=32, help="entries of a state")
    parser.add_argument(
        "--reverb-python",
        type=Path,
        metavar="PATH",
        help="a Python with dm-reverb[tensorflow]; none: skip it",
    )
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object a line")
    options = parser.parse_args(arguments)
    figures = measure(options.transitions, options.slots, options.history)
    peer = reverb(options.reverb_python, options.transitions, options.history)
    for what in ("insert_per_s", "sample_per_s") if peer else ():
        peer[f"{what.removesuffix('_per_s')}_over_reverb"] = figures[what] / peer[f"reverb_{what}"]
    figures |= peer
    record.show(figures)
    asked = {
        "transitions": options.transitions,
        "slots": options.slots,
        "history_length": options.history,
    }
    record.append(options.json, "replay", arguments or sys.argv[1:], asked | figures)


if __name__ == "__main__":
    main()
