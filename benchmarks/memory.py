"""How many bytes does a user, a step, an id take in the learner's join, and a user in a server's view?

    python -m benchmarks.memory [--history-length 32] [--slots 10] [--json FILE]

Sums over the tables' own types, nothing measured. The join's tables double when they are full, so a figure may hold
up to twice over; the server's are allotted whole, and cost memory where a user has touched them. Replay's figure is
measured by benchmarks.replay.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.record import append, show
from serving.user_state import UserState
from serving.view import View
from streaming.commandline import Parser
from streaming.interning import map_new
from streaming.join_settings import JoinSettings
from streaming.join_tables import ROW_COLUMNS, SEEN, Tables, new_out, new_tables
from streaming.rewards import RewardTable


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    parser = Parser(prog="benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--history-length", type=int, default=32, metavar="H", help="entries of a state [32]")
    parser.add_argument("--slots", type=int, default=10, metavar="K", help="items in a slate [10]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file")
    given = parser.parse_args(arguments)
    figures = bytes_of(given.history_length, given.slots)
    show(figures)
    append(given.json, "memory", sys.argv[1:] if arguments is None else arguments, figures)
    return 0


def bytes_of(history_length: int, slots: int) -> dict[str, float]:
    """Bytes by what they are for."""
    join = JoinSettings(history_length=history_length)
    tables = new_tables(join, new_out(history_length))
    entry = _hash_entry()
    state = _row(tables, "rows", *ROW_COLUMNS)
    view = UserState(100_000, history_length, View.BOUGHT_LENGTH, 1e5, RewardTable())
    return {
        "join: a user": _row(tables, "users", "timers", *SEEN) + entry,
        "join: a step, for the attribution window": _row(tables, "steps") + slots * _row(tables, "slots"),
        "join: a step that is open, more": state,
        "join: an id, for the dedup window and the one before": entry,
        "server: a user": view.bytes_per_user,
    }


def _row(tables: Tables, *names: str) -> int:
    """Bytes of one row of these tables."""
    return sum(getattr(tables, name).nbytes // len(getattr(tables, name)) for name in names)


def _hash_entry() -> int:
    """Bytes of an entry in a hash table as full as it gets."""
    table = map_new(1 << 16)
    return int(np.dtype(np.uint64).itemsize + table.values.itemsize) * len(table.keys) // (1 << 16)


if __name__ == "__main__":
    sys.exit(main())
