"""Does the learner foretell, on real logs, what users go to next better than rules that cost nothing?

    python -m benchmarks.prequential FORMAT FILE [FORMAT FILE ...] [--json benchmarks/results/prequential.jsonl]

Each file goes the way of a user's: `streaming import` into a real Kafka (one partition, so that event time is the
order), `learner --until-caught-up --prequential` in batches of `--poll-records` with training kept in step, then
`serving` answers for the users of the log. Every step is ranked before it is learnt from (learner/prequential.py);
beside it "popularity so far", "the user's most recent distinct items", items of their category, and a streaming
item-kNN, on the same steps. Where a layout has a catalog it is made of the file's own items and read first, by the
learner and the rule on categories alike: both may foretell items that nobody has gone to yet (not among `met`). A
line is printed for each method, and last where that leaves the learner.

FORMAT `sessions` is for a file of sessions without times (Parquet: split, seq, target; the test split lists each
session's prefixes): each becomes a visitor of RetailRocket's layout, those of the test split after all others.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import record
from serving import policy_pb2 as pb
from streaming.commandline import Parser
from streaming.dead_letters import dlq_topic, late_topic
from streaming.importers import LAYOUTS
from streaming.log import open_log
from streaming.schemas import Codec
from streaming.tail import newest
from tests.kafka_broker import KafkaBroker
from tests.serving_process import ServerProcess

SESSIONS: Final = "sessions"
LEARNED: Final = ("learned_next_item", "learned_q")
_BEGAN_MS: Final = 1_430_000_000_000
RULES: Final = ("walks", "co_views", "alike", "recent", "popularity")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status: 1 where a server did not answer from what was learnt."""
    parser = Parser(prog="benchmarks.prequential", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "files", nargs="+", metavar="FORMAT FILE", help=f"FORMAT: {', '.join((*LAYOUTS, SESSIONS))}"
    )
    parser.add_argument(
        "--updates", type=float, default=0.1, metavar="X", help="gradient updates per transition [0.1]"
    )
    parser.add_argument(
        "--poll-records",
        type=int,
        default=100,
        metavar="N",
        help="events between two looks of the learner [100]",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="of the learner [0]")
    parser.add_argument("--users", type=int, default=200, metavar="N", help="newest users served [200]")
    parser.add_argument(
        "--learner", default="", metavar="FLAGS", help="more flags for the learner, in one word"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the results here, a line for each file"
    )
    options = parser.parse_args(arguments)
    if len(options.files) % 2:
        parser.error("FORMAT and FILE come in pairs")
    good = True
    with KafkaBroker() as broker, tempfile.TemporaryDirectory(prefix="bellwether-prequential-") as scratch:
        for i, (layout, file) in enumerate(zip(options.files[::2], options.files[1::2], strict=True)):
            result = run(layout, Path(file), broker.url, Path(scratch) / str(i), f"events-{i}", options)
            show(result)
            good &= result["served"]["learned"] == result["served"]["users"] > 0
            # files by name alone: where they lie is the user's business
            record.append(options.json, "prequential", [Path(a).name for a in sys.argv[1:]], result)
    return 0 if good else 1


def run(layout: str, file: Path, log_url: str, scratch: Path, topic: str, options: Any) -> dict[str, Any]:
    """One file through the whole loop."""
    scratch.mkdir()
    name = file.name
    if layout == SESSIONS:
        layout, file = "retailrocket", as_visits(file, scratch / "visits.parquet")
    topics = ["--topic", topic, "--catalog", f"{topic}-items"]
    told = command("streaming", "import", layout, str(file), "--log", log_url, "--partitions", "1", *topics)
    places = ["--log", log_url, "--topic", topic, "--catalog-topic", f"{topic}-items"]
    weights, report = scratch / "weights", scratch / "report.json"
    flags = [
        *("--updates-low", str(0.9 * options.updates), "--updates-high", str(options.updates)),
        *("--min-replay", "256"),
        *("--poll-records", str(options.poll_records), "--seed", str(options.seed)),
        *options.learner.split(),
    ]
    began = time.monotonic()
    state = ["--data-dir", str(scratch / "learner"), "--weights", str(weights)]
    command("learner", *places, *state, "--until-caught-up", "--prequential", str(report), *flags)
    seconds = time.monotonic() - began
    return {
        "file": name,
        "layout": layout,
        "imported": imported(told),
        "learner_flags": flags,
        "learner_s": round(seconds, 1),
        "dead_letters": letters(log_url, topic),
        "served": served(weights, places, log_url, topic, options.users),
        "prequential": json.loads(report.read_text()),
    }


def as_visits(file: Path, to: Path) -> Path:
    """Sessions as views of RetailRocket's layout: one visitor each, begun ten seconds apart, with half a minute from
    view to view."""
    columns = pq.read_table(file, columns=["split", "seq", "target"]).to_pydict()
    sessions: list[list[int]] = []
    test: list[list[int]] = []
    for split, items, target in zip(*columns.values(), strict=True):
        if split == "train":
            sessions.append(items)
        elif not test or test[-1][: len(items) + 1] != [*items, target]:  # else a prefix of the one before
            test.append([*items, target])
    views = [
        (_BEGAN_MS + 10_000 * visitor + 30_000 * step, visitor + 1, item)
        for visitor, items in enumerate([*sessions, *test])
        for step, item in enumerate(items)
    ]
    timestamp, visitor, item = zip(*sorted(views), strict=True)
    nothing = pa.nulls(len(views), pa.int64())
    events = pa.array(["view"]).take(pa.array(np.zeros(len(views), np.int32)))
    names = ["timestamp", "visitorid", "event", "itemid", "transactionid"]
    table = pa.table([pa.array(timestamp), pa.array(visitor), events, pa.array(item), nothing], names)
    pq.write_table(table, to)
    return to


def letters(log_url: str, topic: str) -> dict[str, int]:
    """Dead letters that the learner wrote, by their topic."""
    log = open_log(log_url)
    names = {"unreadable": dlq_topic(topic), "late": late_topic(topic)}
    counts = {what: sum(b.high for b in log.bounds(name).values()) for what, name in names.items()}
    log.close()
    return counts


def imported(told: str) -> dict[str, Any]:
    """Counts from what `streaming import` said.

    >>> imported("4 events and 3 catalog records written, ...\\n  refused 1,200: unknown event name (first: x)")
    {'events': 4, 'items': 3, 'refused': {'unknown event name': 1200}}
    """
    counts = re.match(r"([\d,]+) events and ([\d,]+) catalog records", told)
    assert counts is not None, told
    refused = re.findall(r"^  refused ([\d,]+): (.*?) \(first: ", told, re.M)
    return {
        "events": _number(counts[1]),
        "items": _number(counts[2]),
        "refused": {reason: _number(count) for count, reason in refused},
    }


def served(weights: Path, places: list[str], log_url: str, topic: str, most: int) -> dict[str, Any]:
    """What a server, started on the weights and the log, answers for the log's newest users."""
    log, codec = open_log(log_url), Codec()
    last = {}
    for line in newest(log, topic, 20 * most, log.bounds(topic)):
        _, event = codec.decode(line.value or b"")
        last[event["user_id"]] = event["timestamp"]
    log.close()
    users = list(last)[-most:]
    slates, strategies = set(), []
    with ServerProcess("--weights", str(weights), *places) as server, server.client() as client:
        for user in users:
            answer = client.recommend(
                pb.RecommendRequest(user_id=user, timestamp_ms=last[user] + 1000, epsilon=0.0, unlogged=True)
            )
            strategies.append(pb.Strategy.Name(answer.strategy))
            slates.add(tuple(slot.item_id for slot in answer.slate))
        policy = client.policy()
    return {
        "users": len(users),
        "learned": strategies.count("LEARNED"),
        "distinct_slates": len(slates),
        "policy_version": policy.policy_version,
        "items": policy.items,
    }


def show(result: dict[str, Any]) -> None:
    """The result for people."""
    report, counts, answers = result["prequential"], result["imported"], result["served"]
    refused = ", ".join(f"{n:,} {reason}" for reason, n in counts["refused"].items()) or "none"
    dead = ", ".join(f"{n:,} {what}" for what, n in result["dead_letters"].items() if n) or "none"
    print(f"\n{result['file']}: {counts['events']:,} events; rows refused: {refused}; dead letters: {dead}")
    print(
        f"learnt in {result['learner_s']} s; {answers['learned']} of {answers['users']} users are served what was "
        f"learnt, {answers['distinct_slates']} different slates\n"
    )
    kinds = ("all", "last third", "with_history", "met", "first_time", "repeat", "carts_or_more", "purchases")
    parts = report | {"last third": report["thirds"][2]}
    print("| HR@20 / MRR@20 | " + " | ".join(f"{kind} ({parts[kind]['steps']:,})" for kind in kinds) + " |")
    print("|---" * (len(kinds) + 1) + "|")
    for method in report["methods"]:
        cells = [figures(parts[kind].get(method)) for kind in kinds]
        print(f"| {method} | " + " | ".join(cells) + " |")
    print(f"\n{standing(report)}", flush=True)


def figures(part: dict[str, Any] | None) -> str:
    """Both numbers of one cell."""
    return "–" if part is None else f"{part['hit_rate_at_20']:.3f} / {part['mrr_at_20']:.3f}"


def standing(report: dict[str, Any]) -> str:
    """One sentence on where the learner stands against the rules, by the overall hit rate."""
    rates = {method: report["all"][method]["hit_rate_at_20"] for method in report["methods"]}
    best, rule = max(LEARNED, key=lambda m: rates[m]), max(RULES, key=lambda m: rates[m])
    margin = sum(report["all"][method]["ci95"] or 1.0 for method in (rule, best))
    difference = rates[best] - rates[rule]
    word = "above" if difference > margin else "below" if difference < -margin else "level with"
    return (
        f"Where we stand: the learner alone ({best}, HR@20 {rates[best]:.3f}) is {word} the best rule "
        f"({rule}, {rates[rule]:.3f}); both together reach {rates['recent_then_learned']:.3f}."
    )


def command(program: str, *arguments: str) -> str:
    """Run one of our commands as a user does; what it printed. Its progress goes to our stderr."""
    done = subprocess.run(
        [sys.executable, "-m", program, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def _number(text: str) -> int:
    return int(text.replace(",", ""))


if __name__ == "__main__":
    sys.exit(main())
