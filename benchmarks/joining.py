"""How fast do bytes become transitions, beside fastavro and the plain joiner, which say what is right?

    python -m benchmarks.joining [--records 200000] [--json FILE]

Mixed traffic as in benchmarks.ingest (decisions with slates of 10, the events that came of them), in one partition
and in memory: decode, then join, in batches of 20,000. The peers do the first batch of the same records. One
thread; rates are records a second of CPU time, so that other work on the machine counts less; the best of three runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks.ingest import BATCH, traffic
from benchmarks.record import append, show
from learner.retelling import plain_rows
from streaming.chunks import batch_of
from streaming.columns import Columns
from streaming.commandline import Parser
from streaming.decoder import Decoder
from streaming.interning import Vocabulary
from streaming.joiner import Joiner, JoinSettings
from streaming.log import RecordBatch
from streaming.plain_joiner import PlainJoiner
from streaming.schemas import Codec

T = TypeVar("T")
USERS, ITEMS, RUNS = 20_000, 20_000, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    parser = Parser(prog="benchmarks.joining", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=200_000, metavar="N", help="in the stream [200000]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file")
    given = parser.parse_args(arguments)
    figures = measure(given.records)
    show(figures)
    append(given.json, "joining", sys.argv[1:] if arguments is None else arguments, figures)
    return 0


def measure(records: int) -> dict[str, float]:
    """Rates by stage."""
    codec = Codec()
    encode = {"decision": codec.encode_decision, "event": codec.encode_event}
    values = [
        encode[kind](record) for kind, record in traffic(records, USERS, ITEMS, np.random.default_rng(0))
    ]
    edges = [*range(0, len(values), BATCH), len(values)]
    batches = [batch_of(values[start:stop], start) for start, stop in pairwise(edges)]
    ours(codec, batches[:1])  # compiled, or read from numba's cache
    runs = [ours(codec, batches) for _ in range(RUNS)]
    decode_s, join_s, transitions, first = min(runs, key=lambda run: run[0] + run[1])
    few = values[:BATCH]
    fastavro_s, _ = timed(lambda: [codec.decode(value) for value in few])
    plain = PlainJoiner(JoinSettings(), [0])
    plain_s, _ = timed(lambda: plain.push(plain_rows(first)))
    return {
        "decode, records/s": len(values) / decode_s,
        "join, records/s": len(values) / join_s,
        "both, records/s": len(values) / (decode_s + join_s),
        "both, transitions/s": transitions / (decode_s + join_s),
        "bytes a record": sum(map(len, values)) / len(values),
        "decode / fastavro": (len(values) / decode_s) / (len(few) / fastavro_s),
        "join / plain joiner": (len(values) / join_s) / (len(few) / plain_s),
    }


def ours(codec: Codec, batches: list[RecordBatch]) -> tuple[float, float, int, Columns]:
    """Seconds of CPU time to decode and to join, transitions, and the first batch's columns."""
    decoder, joiner = Decoder(codec, Vocabulary(), 1), Joiner(JoinSettings(), [0])
    decode_s, join_s, transitions, first = 0.0, 0.0, 0, None
    for each in batches:
        seconds, columns = timed(lambda each=each: decoder.decode(each))  # type: ignore[misc]
        decode_s += seconds
        seconds, joined = timed(lambda columns=columns: joiner.push(columns))  # type: ignore[misc]
        join_s += seconds
        transitions += len(joined.transitions.offset)
        first = columns if first is None else first
    assert first is not None
    return decode_s, join_s, transitions, first


def timed(do: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds, and what was done."""
    start = time.process_time()
    done = do()
    return time.process_time() - start, done


if __name__ == "__main__":
    sys.exit(main())
