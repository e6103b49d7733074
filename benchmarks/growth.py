"""How does cost grow with partitions, users and items: events a second, bytes, pauses, and what each update costs?

    python -m benchmarks.growth [--json FILE] [--plot FILE]

Mixed traffic (as in benchmarks.ingest) from memory: decode, join, insert into replay, no broker and no training. One of
the three is varied, the others stay at their first value. Before what is timed, each user has put something on a wish
list, and each item has been put on one, so all of them are known. Times are CPU times of the one thread that does it
all, for each event. Then the rest of the learner's loop: an update, and for how long a publication and a checkpoint
hold up the loop.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from benchmarks.ingest import START_MS, traffic
from benchmarks.record import append
from learner.agent_settings import AgentSettings
from learner.learner import Learner, LearnerSettings
from streaming.chunks import batch_of
from streaming.interning import hash_string
from streaming.join_settings import JoinSettings
from streaming.log import RecordBatch
from streaming.schemas import Codec

BATCH: Final = 5000
UPDATES: Final = 5
CAPACITY: Final = 400_000  # of replay, full before the end of what is timed
PARTITIONS: Final = (1, 2, 4, 8)
USERS: Final = (10_000, 100_000, 1_000_000)
ITEMS: Final = (10_000, 100_000, 1_000_000)


class Shape(NamedTuple):
    """What is varied."""

    partitions: int = PARTITIONS[0]
    users: int = USERS[0]
    items: int = ITEMS[0]


def introduction(shape: Shape) -> Iterator[tuple[str, dict[str, Any]]]:
    """A wish of each user and for each item, in the ten minutes before the traffic; no steps come of it."""
    count = max(shape.users, shape.items)
    for i in range(count):
        event = {
            "event_id": f"intro{i}",
            "name": "add_to_wishlist",
            "user_id": f"user-{i % shape.users}",
            "timestamp": START_MS - 600_000 + 600_000 * i // count,
            "items": [{"item_id": f"item-{i % shape.items}", "price": 9.5}],
        }
        yield "event", event


def batches(
    records: Iterator[tuple[str, dict[str, Any]]], partitions: int, ends: list[int]
) -> list[RecordBatch]:
    """The records as a reader would give them, in batches; ends: of each partition, moved on."""
    codec, values, where = Codec(), [], []
    for kind, record in records:
        values.append(codec.encode_decision(record) if kind == "decision" else codec.encode_event(record))
        where.append(hash_string(record["user_id"]) % partitions)
    found = []
    for start, stop in pairwise([*range(0, len(values), BATCH), len(values)]):
        partition = np.array(where[start:stop], np.int32)
        offset = np.zeros(stop - start, np.int64)
        for p in range(partitions):
            mine = np.flatnonzero(partition == p)
            offset[mine] = np.arange(ends[p], ends[p] + len(mine))
            ends[p] += len(mine)
        found.append(RecordBatch(partition, offset, *tuple(batch_of(values[start:stop]))[2:]))
    return found


def timed(do: Callable[[], object]) -> float:
    """CPU seconds of this thread."""
    start = time.thread_time()
    do()
    return time.thread_time() - start


class Stages:
    """Takes batches as `Learner.take` does, with a clock at each stage."""

    def __init__(self, shape: Shape) -> None:
        agent = AgentSettings()
        join = JoinSettings(gamma=agent.gamma, history_length=agent.entries)
        self.learner = Learner(LearnerSettings(replay_capacity=CAPACITY), agent, join, Codec(), None)
        self.learner.assign(dict.fromkeys(range(shape.partitions), 0))

    def take(self, batch: RecordBatch) -> list[float]:
        """CPU seconds of decoding, joining and inserting."""
        learner, clock = self.learner, [time.thread_time()]
        columns = learner.decoder.decode(batch)
        clock.append(time.thread_time())
        joined = learner.joiner.push(columns)
        clock.append(time.thread_time())
        learner._remember(joined)
        clock.append(time.thread_time())
        return [after - before for before, after in pairwise(clock)]


def measure(shape: Shape, records: int) -> dict[str, float]:
    """All figures of one point."""
    stages, ends = Stages(shape), [0] * shape.partitions
    learner = stages.learner
    meeting = [sum(stages.take(b)) for b in batches(introduction(shape), shape.partitions, ends)]
    rng = np.random.default_rng(0)
    stream = batches(traffic(records, shape.users, shape.items, rng), shape.partitions, ends)
    seconds = np.array([stages.take(b) for b in stream])
    assert len(learner.vocabulary) == shape.items
    assert learner.joiner.users() == shape.users
    learner.train(1)  # the optimiser's moments are made by the first
    updates = [timed(lambda: learner.train(1)) for _ in range(UPDATES)]
    # what was read from a cache of compiled loops is behind, and all of these batches are full
    warm = seconds[len(seconds) // 10 : -1]
    decode, join, insert = 1e6 * np.median(warm, axis=0) / BATCH
    tables = learner.vocabulary.tables
    return {
        "partitions": shape.partitions,
        "users": shape.users,
        "items": shape.items,
        "events_per_s": 1e6 / (decode + join + insert),
        "decode_us": decode,
        "join_us": join,
        "insert_us": insert,
        "slowest_batch_ms": 1000 * max([*meeting[1:], *warm.sum(axis=1)]),
        "update_ms": 1000 * median(updates),
        "publish_held_ms": 1000 * timed(learner.agent.tensors),
        "checkpoint_held_ms": 1000 * timed(learner.snapshot),
        "join_mb": learner.joiner.nbytes() / 1e6,
        "vocabulary_mb": sum(a.nbytes for a in (*tables.table, tables.text, tables.bounds)) / 1e6,
        "replay_mb": learner.replay.nbytes / 1e6,
        "network_mb": sum(array.nbytes for array in learner.agent.state().values()) / 1e6,
    }


def points() -> list[Shape]:
    """One of the three is varied at a time."""
    return [
        Shape(),
        *(Shape(partitions=n) for n in PARTITIONS[1:]),
        *(Shape(users=n) for n in USERS[1:]),
        *(Shape(items=n) for n in ITEMS[1:]),
    ]


COLUMNS: Final = {  # heading, of which figure, with how many decimals
    "partitions": ("partitions", 0),
    "users": ("users", 0),
    "items": ("items", 0),
    "events/s": ("events_per_s", 0),
    "decode, us": ("decode_us", 2),
    "join, us": ("join_us", 2),
    "insert, us": ("insert_us", 2),
    "slowest batch, ms": ("slowest_batch_ms", 0),
    "update, ms": ("update_ms", 1),
    "publish holds, ms": ("publish_held_ms", 1),
    "checkpoint holds, ms": ("checkpoint_held_ms", 1),
    "join, MB": ("join_mb", 0),
    "vocabulary, MB": ("vocabulary_mb", 1),
    "replay, MB": ("replay_mb", 0),
    "network, MB": ("network_mb", 0),
}


def line(cells: list[str]) -> str:
    """Cells under their headings."""
    return "  ".join(f"{cell:>{len(heading)}}" for cell, heading in zip(cells, COLUMNS, strict=True))


def row(found: dict[str, float]) -> str:
    """One point of the table."""
    return line([f"{found[name]:,.{decimals}f}" for name, decimals in COLUMNS.values()])


def plot(rows: list[dict[str, float]], file: Path) -> None:
    """Rates above, bytes below; one column for each of the three. The first row is what the others vary."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 3, sharey="row")
    base = Shape(*(int(rows[0][field]) for field in Shape._fields))
    parts = {"join": "join_mb", "vocabulary": "vocabulary_mb", "replay": "replay_mb", "network": "network_mb"}
    for column, axis in enumerate(Shape._fields):
        others = [field for field in Shape._fields if field != axis]
        mine = [found for found in rows if all(found[other] == getattr(base, other) for other in others)]
        x = [found[axis] for found in mine]
        above, below = axes[0, column], axes[1, column]
        above.plot(x, [found["events_per_s"] / 1000 for found in mine], marker="o")
        for label, name in parts.items():
            below.plot(x, [found[name] for found in mine], marker="o", label=label)
        for ax in (above, below):
            ax.set_xscale("log", base=2 if axis == "partitions" else 10)
            ax.set_xticks(x, [compact(value) for value in x], minor=False)
            ax.minorticks_off()
            ax.set_xlabel(axis)
            ax.grid(alpha=0.3)
        above.set_ylim(bottom=0)
        below.set_yscale("log")
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0, 0].set_ylabel("thousand events/s, one thread\n(decode, join, insert)")
    axes[1, 0].set_ylabel("MB")
    axes[1, 0].legend(fontsize="small")
    figure.suptitle(
        f"How cost grows: each beside {base.partitions} partition, "
        f"{compact(base.users)} users, {compact(base.items)} items"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)


def compact(value: float) -> str:
    """As axes show it.

    >>> [compact(n) for n in (8, 10_000, 1_000_000)]
    ['8', '10 k', '1 M']
    """
    for size, unit in ((1_000_000, " M"), (1000, " k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def main(arguments: list[str] | None = None, shapes: list[Shape] | None = None) -> int:
    """Measure, print, plot, and append to a JSON-lines file, one line for each point."""
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=200_000, help="of mixed traffic, at each point")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object a line")
    parser.add_argument("--plot", type=Path, help="draw them into this file (PNG, SVG, PDF)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as the learner does
    shapes = points() if shapes is None else shapes
    measure(shapes[0], 2 * BATCH)  # compiles
    print(line(list(COLUMNS)), flush=True)
    rows = []
    for shape in shapes:
        rows.append(measure(shape, options.records))
        print(row(rows[-1]), flush=True)
        append(options.json, "growth", arguments or sys.argv[1:], rows[-1])
    if options.plot is not None:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
