"""`streaming topics | import | tail | redrive`: what an operator does with the log by hand."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from streaming.commandline import Parser, add_config, add_log, build, codec_from, log_from, run
from streaming.dead_letters import dlq_topic, late_topic
from streaming.importers import LAYOUTS, Bar, ImportSettings, import_file
from streaming.log import Log, no_topic
from streaming.redrive import redrive, waiting
from streaming.tail import Line, as_json, as_text, between, follow, newest
from streaming.topics import TopicSettings, create_topics, wait_for


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    parser = Parser(
        prog="streaming",
        description="The log by hand: create its topics, load event logs into it, look at it, "
        "and put repaired dead letters back.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_topics, _add_import, _add_tail, _add_redrive):
        add(commands)
    namespace = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    signal.signal(signal.SIGTERM, _end)
    return run(lambda: namespace.command(namespace))


def _end(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C does: what is open is closed, and an import's sorted runs go."""
    raise SystemExit(128 + number)


# ── topics ───────────────────────────────────────────────────────────────────────────────────────────────────


def _add_topics(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "topics",
        help="create the topics that are missing",
        description="Creates the topics of events, of items, and of dead letters (EVENTS.dlq and EVENTS.late), "
        "where they are missing. Harmless when repeated: topics that are there stay as they are. A log that is "
        "still starting is waited for.",
    )
    add_config(parser, TopicSettings)
    parser.add_argument(
        "--grow",
        action="store_true",
        help="also add partitions to a topic of events that has fewer; its users then change partitions, and what "
        "was known of them stays behind",
    )
    parser.add_argument(
        "--wait-s",
        metavar="S",
        type=float,
        default=120.0,
        help="how long a log that does not answer is waited for; seconds [120]",
    )
    add_log(parser)
    parser.set_defaults(command=_topics)


def _topics(namespace: argparse.Namespace) -> int:
    settings = build(TopicSettings, namespace)
    if not namespace.wait_s >= 0:
        namespace._parser.error(f"--wait-s must be >= 0, not {namespace.wait_s}")
    with _opened(namespace) as log:
        with _quiet():  # librdkafka complains of each attempt
            wait_for(log, namespace.wait_s, lambda line: print(line, file=sys.stderr, flush=True))
        for line in create_topics(log, settings, namespace.grow):
            print(line, flush=True)
    return 0


# ── import ───────────────────────────────────────────────────────────────────────────────────────────────────


def _add_import(commands: argparse._SubParsersAction[Parser]) -> None:
    layouts = "; ".join(f"{name} ({what})" for name, what in LAYOUTS.items())
    parser = commands.add_parser(
        "import",
        help="load an event log, public or your own",
        description="Reads FILE, plain, .gz or .parquet, and writes its events in order of time to the topic of "
        "events, and what it tells of items to the catalog. Rows that cannot be used are counted by reason. "
        "Rows that are imported twice are written twice and learnt from once: an event's id is made of what happened; "
        "the catalog keeps what it says. Several files: the oldest first, and before anything live, since what is "
        f"a day older than the newest events is late. Topics that are missing are created. FORMAT: {layouts}.",
    )
    parser.add_argument("layout", metavar="FORMAT", choices=list(LAYOUTS), help=", ".join(LAYOUTS))
    parser.add_argument("file", metavar="FILE", type=Path, help="the log to read")
    add_config(parser, ImportSettings, title="Reading")
    add_log(parser)
    parser.set_defaults(command=_import)


def _import(namespace: argparse.Namespace) -> int:
    settings = build(ImportSettings, namespace)
    with namespace.file.open("rb"):  # before anything is created for a file that is not there
        pass
    with _opened(namespace) as log:
        bar = Bar(sys.stderr, time.monotonic)
        print(import_file(namespace.layout, namespace.file, log, codec_from(namespace), settings, bar))
    return 0


# ── tail ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _add_tail(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "tail",
        help="show the records of a topic",
        description="Shows records of a topic, one on each line: events, decisions, items, and dead letters with "
        "their reason. A line begins with the log's time, and with topic/partition@offset.",
    )
    parser.add_argument("topic", metavar="TOPIC", nargs="?", default="events", help="[events]")
    parser.add_argument(
        "--last", metavar="N", type=int, default=10, help="the newest records of the topic; 0: none [10]"
    )
    parser.add_argument(
        "--from",
        dest="start",
        metavar="OFFSET",
        type=int,
        help="instead of the newest: all from this offset on, in each partition; 0: from the beginning [none]",
    )
    parser.add_argument("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    parser.add_argument(
        "--json",
        action="store_true",
        help="each record as a JSON object with all its fields; bytes in base64",
    )
    add_log(parser)
    parser.set_defaults(command=_tail)


def _tail(namespace: argparse.Namespace) -> int:
    for name, value in (("--last", namespace.last), ("--from", namespace.start)):
        if value is not None and value < 0:
            namespace._parser.error(f"{name} must be >= 0, not {value}")
    codec = codec_from(namespace)
    show = as_json if namespace.json else as_text
    with _opened(namespace) as log:
        for line in _lines(log, namespace):
            print(show(line, namespace.topic, codec), flush=namespace.follow)
    return 0


def _lines(log: Log, namespace: argparse.Namespace) -> Iterator[Line]:
    bounds = log.bounds(namespace.topic)
    starts = {p: b.high for p, b in bounds.items()}
    if namespace.start is not None:
        starts = {p: min(max(b.low, namespace.start), b.high) for p, b in bounds.items()}
        if not namespace.follow:
            yield from between(log, namespace.topic, starts, {p: b.high for p, b in bounds.items()})
    elif namespace.last:
        yield from newest(log, namespace.topic, namespace.last, bounds)
    if namespace.follow:
        yield from follow(log, namespace.topic, starts)


# ── redrive ──────────────────────────────────────────────────────────────────────────────────────────────────


def _add_redrive(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "redrive",
        help="put dead letters back that can be used by now",
        description="Reads EVENTS.dlq, decodes each record again with today's code and schemas, and writes those "
        "that can be read now back to EVENTS, with the bytes and the key that they came with. Remembers how far it "
        "came, so that a second run puts back only what is new. An event that is put back twice counts once, by "
        "its id.",
    )
    parser.add_argument("--topic", metavar="EVENTS", default="events", help="[events]")
    parser.add_argument(
        "--late",
        action="store_true",
        help="also EVENTS.late; those are late again unless the learner now allows for more (--late-after-s)",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="go through all letters that are kept, also those that a run before this one left where they were",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be put back")
    add_log(parser)
    parser.set_defaults(command=_redrive)


def _redrive(namespace: argparse.Namespace) -> int:
    topic, dry_run, again = namespace.topic, namespace.dry_run, namespace.again
    codec = codec_from(namespace)
    with _opened(namespace) as log:
        if not log.partitions(topic):
            raise no_topic(topic)
        for letters, wanted in ((dlq_topic(topic), True), (late_topic(topic), namespace.late)):
            if not log.partitions(letters):
                print(f"{letters}: no such topic")
            elif wanted:
                done = redrive(log, codec, topic, letters, dry_run=dry_run, again=again)
                print(f"{letters}: {done}{' (dry run: nothing was written)' if dry_run else ''}", flush=True)
            elif left := waiting(log, letters):
                print(f"{letters}: {left:,} letters wait; --late puts them back")
    return 0


# ── common ───────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _opened(namespace: argparse.Namespace) -> Iterator[Log]:
    log = log_from(namespace)
    try:
        yield log
    finally:
        log.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("streaming.kafka_errors")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
