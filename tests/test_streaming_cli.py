"""`streaming topics | import | tail | redrive`, as an operator meets them."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from streaming.__main__ import main
from streaming.chunks import batch_of, empty_batch
from streaming.columns import Reason
from streaming.dead_letters import DeadLetters
from streaming.decoder import Decoder
from streaming.interning import Vocabulary
from streaming.joiner import Joiner
from streaming.log import Log, LogUnavailable, RecordBatch, open_log
from streaming.redrive import GROUP, redrive, waiting
from streaming.schemas import DEAD_LETTER, EVENT, Codec
from streaming.tail import Line, as_text, between, follow, records_between
from streaming.topics import wait_for
from tests.kafka_broker import KafkaBroker
from tests.test_redrive import SCHEMAS, click

CODEC = Codec()
TAOBAO = """1,2268318,2520377,pv,1511544070
1,2333346,2520771,fav,1511561733
100,2576651,149192,cart,1511572885
100,2576651,149192,hug,1511572885
1,2268318,2520377,buy,1511544170
,2268318,2520377,buy,1511544170
"""
START_MS = 1_767_225_600_000


def ran(*arguments: str) -> int:
    """The command's exit status."""
    try:
        return main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/log.db"


@pytest.fixture
def sqlite(url: str) -> Iterator[Log]:
    log = open_log(url)
    yield log
    log.close()


def event(id: str, user: str = "ann", item: str = "phone", at: float = 0.0, **more: Any) -> bytes:
    return CODEC.encode_event(
        {"event_id": id, "name": "view_item", "user_id": user, "timestamp": START_MS + round(1000 * at),
         "items": [{"item_id": item, "quantity": 1, "price": None, "index": None}], **more}
    )  # fmt: skip


def put(log: Log, topic: str, records: Sequence[tuple[bytes, bytes | None]], stamped: bool = False) -> None:
    """stamped: a millisecond apart from START_MS on; else now, since retention takes what is old."""
    producer = log.producer()
    for i, (key, value) in enumerate(records):
        producer.send(topic, key, value, timestamp_ms=START_MS + i if stamped else None)
    producer.close()


def everything(log: Log, topic: str) -> list[Line]:
    bounds = log.bounds(topic)
    lines = between(log, topic, {p: b.low for p, b in bounds.items()}, {p: b.high for p, b in bounds.items()})
    return sorted(lines, key=lambda line: (line.partition, line.offset))


# --- the command line


@pytest.mark.parametrize("command", ["topics", "import", "tail", "redrive"])
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--help") == 0
    assert command in capsys.readouterr().out
    assert ran(command, "--help") == 0
    assert "--log URL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tial"], "did you mean 'tail'?"),
        ([], "required: COMMAND"),
        (["import", "taobo", "x.csv"], "did you mean 'taobao'?"),
        (["import", "taobao"], "required: FILE"),
        (["topics", "--partitions", "0"], "partitions must be within 1..10000, not 0"),
        (["topics", "--retention-days", "-1"], "retention_days must be > 0"),
        (["topics", "--wait-s", "-1"], "--wait-s must be >= 0"),
        (["topics", "--catalog", "events"], "the catalog needs a topic of its own: 'events' has another use"),
        (["topics", "--catalog", "events.dlq"], "'events.dlq' has another use"),
        (["tail", "--last", "-1"], "--last must be >= 0"),
        (["tail", "--folow"], "did you mean '--follow'?"),
        (["redrive", "--log", "redis://x"], "'redis://x' is no log"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran(*arguments) == 2
    complaint = capsys.readouterr().err
    assert told in complaint
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("command", [["tail"], ["redrive"]])
def test_a_missing_topic_is_one_line_and_status_1(
    command: list[str], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran(*command, "--log", url) == 1
    assert "there is no topic 'events'; create it with `streaming topics`" in capsys.readouterr().err


# --- topics


def test_topics_creates_what_is_missing_and_says_so(
    url: str, sqlite: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran("topics", "--log", url, "--partitions", "3") == 0
    assert capsys.readouterr().out.splitlines() == [
        "events: created, 3 partitions",
        "catalog: created, 1 partition, compacted",
        "events.dlq: created, 1 partition",
        "events.late: created, 1 partition",
    ]
    assert [sqlite.partitions(topic) for topic in ("events", "catalog", "events.dlq", "events.late")] == [
        3,
        1,
        1,
        1,
    ]


def test_topics_that_are_there_are_left_alone_unless_told_to_grow(
    url: str, sqlite: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    sqlite.create_topic("events", 2)
    assert ran("topics", "--log", url, "--partitions", "3") == 0
    assert capsys.readouterr().out.startswith("events: there, 2 partitions; --grow would make them 3\n")
    assert sqlite.partitions("events") == 2
    assert ran("topics", "--log", url, "--partitions", "3", "--grow") == 0
    assert capsys.readouterr().out.startswith(
        "events: grown from 2 to 3 partitions\ncatalog: there, 1 partition\n"
    )
    assert sqlite.partitions("events") == 3


def test_retention_is_set_where_it_is_asked_for(url: str, sqlite: Log) -> None:
    assert (
        ran(
            "topics",
            "--log",
            url,
            "--topic",
            "deeds",
            "--retention-days",
            "0.5",
            "--dead-letter-days",
            "none",
        )
        == 0
    )
    hour_ms, now_ms = 3_600_000, int(time.time() * 1000)
    producer = sqlite.producer()
    for topic in ("deeds", "deeds.late"):
        producer.send(topic, b"ann", b"old", timestamp_ms=now_ms - 13 * hour_ms)
    producer.flush()
    producer.send("deeds", b"ann", b"new", timestamp_ms=now_ms - 11 * hour_ms)
    producer.close()
    sqlite.expire("deeds")  # type: ignore[attr-defined]
    sqlite.expire("deeds.late")  # type: ignore[attr-defined]
    assert [line.value for line in everything(sqlite, "deeds")] == [b"new"]
    assert [line.value for line in everything(sqlite, "deeds.late")] == [b"old"]


@pytest.mark.kafka
def test_topics_waits_for_a_kafka_that_is_still_starting(
    kafka: KafkaBroker, topic: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kafka.kill9()
    starting = threading.Thread(target=kafka.start)
    starting.start()  # takes some seconds
    try:
        names = ("--topic", topic, "--catalog", f"{topic}-items")
        assert ran("topics", "--log", kafka.url, *names) == 0
    finally:
        starting.join()
    assert capsys.readouterr().out.splitlines()[0] == f"{topic}: created, 8 partitions"


class Starting:
    """A log that answers at the second `at`; each question takes ten."""

    url = "kafka://shop:9092"

    def __init__(self, at: float) -> None:
        self.at, self.now = at, 0.0

    def partitions(self, topic: str) -> int:
        self.now += 10
        if self.now < self.at:
            raise LogUnavailable("timed out")
        return 0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("at", "told"), [(5, []), (40, ["waiting for kafka://shop:9092 (at most 60 s)"])])
def test_a_log_that_answers_in_time_is_waited_for(at: float, told: list[str]) -> None:
    log, lines = Starting(at), list[str]()
    wait_for(cast(Log, log), 60, lines.append, lambda: log.now, log.sleep)
    assert at <= log.now <= at + 11
    assert lines == told


def test_a_log_that_never_answers_is_given_up() -> None:
    log = Starting(at=1e9)
    with pytest.raises(LogUnavailable, match="kafka://shop:9092 did not answer within 60 s: timed out"):
        wait_for(cast(Log, log), 60, lambda line: None, lambda: log.now, log.sleep)
    assert log.now <= 80


# --- import


def test_import_writes_the_events_and_counts_what_it_refuses(
    open_here: Callable[[], Log], log_url: str, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "UserBehavior.csv"
    file.write_text(TAOBAO)
    topics = ("--topic", topic, "--catalog", f"{topic}-items", "--partitions", "2")
    assert ran("import", "taobao", str(file), "--log", log_url, *topics) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        "4 events and 3 catalog records written, 2017-11-24 17:21 to 2017-11-25 01:21",
        "  refused 1: unknown event name (first: line 4: 100,2576651,149192,hug,1511572885)",
        "  refused 1: no user id within 1..1024 bytes (first: line 6: ,2268318,2520377,buy,1511544170)",
    ]
    assert told.err.splitlines() == ["reading 100% 0 s", "writing 100% 0 s"]  # no terminal: no bar
    log = open_here()
    events = [CODEC.decode(line.value or b"") for line in everything(log, topic)]
    assert {name for name, _ in events} == {EVENT}
    deeds = sorted((e["timestamp"], e["user_id"], e["name"], e["items"][0]["item_id"]) for _, e in events)
    assert deeds == [
        (1511544070000, "1", "view_item", "2268318"),
        (1511544170000, "1", "purchase", "2268318"),
        (1511561733000, "1", "add_to_wishlist", "2333346"),
        (1511572885000, "100", "add_to_cart", "2576651"),
    ]
    assert sum(b.high for b in log.bounds(f"{topic}-items").values()) == 3


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("missing.csv", None, "No such file"),
        ("events.csv", "a,b\n1,2\n", "has no column timestamp, which retailrocket files have; found a, b"),
    ],
)
def test_a_file_that_cannot_be_imported_is_status_1(
    name: str, text: str | None, told: str, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert ran("import", "retailrocket", str(tmp_path / name), "--log", url) == 1
    assert told in capsys.readouterr().err


def test_sigterm_ends_an_import_and_leaves_nothing_in_its_scratch_folder(url: str, tmp_path: Path) -> None:
    scratch, file = tmp_path / "scratch", tmp_path / "UserBehavior.csv"
    scratch.mkdir()
    file.write_text("1,2268318,2520377,pv,1511544070\n" * 200_000)
    command = [sys.executable, "-m", "streaming", "import", "taobao", str(file), "--log", url]
    process = subprocess.Popen([*command, "--run-rows", "10000", "--scratch", str(scratch)])
    try:
        deadline = time.monotonic() + 60
        while not list(scratch.glob("*/*.arrow")) and time.monotonic() < deadline:
            time.sleep(0.001)
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
    assert list(scratch.iterdir()) == []


# --- tail


def test_tail_shows_a_line_for_each_kind_of_record(
    url: str, sqlite: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    sqlite.create_topic("mixed", 1)
    slate = [{"item_id": "case", "propensity": 0.95}, {"item_id": "cable", "propensity": 0.05}]
    letter = {"topic": "events", "partition": 3, "offset": 7, "timestamp": START_MS}
    records: list[bytes | None] = [
        event("e1", value=19.0, currency="EUR", recommendation_id="r1"),
        CODEC.encode_decision({"recommendation_id": "r1", "user_id": "ann", "timestamp": START_MS, "slate": slate,
                               "epsilon": 0.05, "policy_version": 7, "strategy": "LEARNED"}),
        CODEC.encode_item({"item_id": "case", "category": "phones", "price": 9.5, "in_stock": False}),
        CODEC.encode(DEAD_LETTER, letter | {"reason": "BAD_FRAME", "key": b"ann", "value": b"{}"}),
        CODEC.encode(DEAD_LETTER, letter | {"reason": "LATE", "key": b"ann", "value": event("e0")}),
        b"{}",
        None,
    ]  # fmt: skip
    put(sqlite, "mixed", [(b"ann", record) for record in records], stamped=True)
    assert ran("tail", "mixed", "--log", url) == 0
    stamp = "2026-01-01T00:00:00.00"
    assert capsys.readouterr().out.splitlines() == [
        f"{stamp}0Z mixed/0@0 view_item user=ann items=[phone] value=19 recommendation=r1 at={stamp}0Z",
        f"{stamp}1Z mixed/0@1 decision user=ann slate=[case:0.95, cable:0.05] by=LEARNED version=7 ε=0.05 history=0 "
        f"id=r1 at={stamp}0Z",
        f"{stamp}2Z mixed/0@2 item case category=phones price=9.5 out of stock",
        f"{stamp}3Z mixed/0@3 BAD_FRAME from events/3@7 key=ann 2 bytes: 7b 7d",
        f"{stamp}4Z mixed/0@4 LATE from events/3@7 key=ann view_item user=ann items=[phone] at={stamp}0Z",
        f"{stamp}5Z mixed/0@5 unreadable: frame 7b 7d names no schema of ours; 2 bytes: 7b 7d",
        f"{stamp}6Z mixed/0@6 tombstone of ann",
    ]


def test_tail_shows_the_newest_of_all_partitions_in_order_of_time(
    url: str, sqlite: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    sqlite.create_topic("events", 4)
    put(sqlite, "events", [(f"user {i}".encode(), event(str(i), item=f"item {i}")) for i in range(40)], True)
    assert ran("tail", "--log", url, "--last", "3") == 0
    shown = capsys.readouterr().out
    assert [f"item {i}" in line for i, line in zip((37, 38, 39), shown.splitlines(), strict=True)] == [
        True
    ] * 3


def test_tail_from_an_offset_starts_there_in_each_partition(
    url: str, sqlite: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    sqlite.create_topic("events", 1)
    put(sqlite, "events", [(b"ann", event(str(i))) for i in range(6)])
    assert ran("tail", "--log", url, "--from", "4") == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["events/0@4", "events/0@5"]


def test_tail_finds_the_newest_though_compaction_left_holes(
    url: str, sqlite: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    sqlite.create_topic("catalog", 1, compacted=True)
    item = CODEC.encode_item({"item_id": "a"})
    put(sqlite, "catalog", [*((f"{i}".encode(), item) for i in range(3)), *[(b"same", item)] * 500])
    sqlite.compact("catalog")  # type: ignore[attr-defined]
    assert ran("tail", "catalog", "--log", url, "--last", "3") == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        "catalog/0@1",
        "catalog/0@2",
        "catalog/0@502",
    ]


def test_tail_as_json_has_every_field(url: str, sqlite: Log, capsys: pytest.CaptureFixture[str]) -> None:
    sqlite.create_topic("events", 1)
    put(
        sqlite, "events", [(b"ann", event("e1", params={"q": "näh"})), (b"\xff", b"{}"), (b"ann", None)], True
    )
    assert ran("tail", "--log", url, "--json") == 0
    good, bad, tombstone = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    place = {"topic": "events", "partition": 0, "offset": 0, "log_timestamp": START_MS, "key": "ann"}
    assert good == place | {"schema": EVENT, "record": CODEC.decode(event("e1", params={"q": "näh"}))[1]}
    assert (bad["key"], bad["record"], base64.b64decode(bad["value"])) == ("\\xff", None, b"{}")
    assert "names no schema of ours" in bad["error"]
    assert (tombstone["record"], tombstone["schema"]) == (None, None)


def test_a_record_cannot_move_the_terminals_cursor() -> None:
    line = Line(START_MS, 0, 0, b"ann", event("e", user="a\x1b[2J\nb"))
    assert r"user=a\x1b[2J\nb " in as_text(line, "events", CODEC)


def test_following_gives_what_comes_and_finds_new_partitions(
    open_here: Callable[[], Log], topic: str
) -> None:
    log = open_here()
    log.create_topic(topic, 1)
    clock = iter(range(0, 10_000, 10))  # each look at it is ten seconds later
    lines = follow(log, topic, {0: 0}, lambda: next(clock))
    put(log, topic, [(b"ann", b"1"), (b"ann", b"2")])
    assert [line.value for line in islice(lines, 2)] == [b"1", b"2"]
    log.create_topic(topic, 16)
    put(log, topic, [(f"user {i}".encode(), b"%d" % i) for i in range(40)])
    assert len({line.partition for line in islice(lines, 40)}) > 8
    lines.close()  # type: ignore[attr-defined]


class SlowLog:
    """Its only record comes after so many seconds; a poll takes one."""

    def __init__(self, after_s: float) -> None:
        self.now_s, self._after_s, self._given = 0.0, after_s, 0

    def reader(self, topic: str, offsets: Mapping[int, int], *, keys: bool) -> SlowLog:
        return self

    def position(self) -> dict[int, int]:
        return {0: self._given}

    def poll(self, most: int, timeout_s: float) -> RecordBatch:
        self.now_s += 1.0
        if self.now_s < self._after_s:
            return empty_batch()
        self._given = 1
        return batch_of([b"at last"], keys=[b"k"])

    def close(self) -> None: ...


def test_what_is_slow_to_come_is_waited_for_and_what_does_not_come_is_no_end() -> None:
    def found(after_s: float) -> list[bytes | None]:
        log = SlowLog(after_s)
        batches = records_between(log, "events.dlq", {0: 0}, {0: 1}, lambda: log.now_s)  # type: ignore[arg-type]
        return [batch.value(0) for batch in batches]

    assert found(after_s=20.0) == [b"at last"]
    with pytest.raises(
        LogUnavailable, match=r"events\.dlq could not be read to its end: nothing came in 30 s"
    ):
        found(after_s=60.0)


# --- redrive


def dead(log: Log, topic: str, records: Sequence[tuple[bytes, bytes | None, Reason]]) -> None:
    """Letters for these records (key, value, reason), as the learner writes them."""
    log.create_topic(topic, 2)
    log.create_topic(f"{topic}.dlq", 1)
    log.create_topic(f"{topic}.late", 1)
    source = f"{topic}-source"
    log.create_topic(source, 1)
    start = log.bounds(source)[0].high
    put(log, source, [(key, value) for key, value, _ in records])
    producer = log.producer()
    letters = DeadLetters(producer, CODEC, topic)
    reasons, at = [reason for _, _, reason in records], 0
    for batch in records_between(log, source, {0: start}, {0: start + len(records)}):
        letters.write(batch, np.arange(len(batch)), np.array(reasons[at : at + len(batch)], np.uint8))
        at += len(batch)
    assert at == len(records)
    letters.flush()
    producer.close()


GOOD = event("e1", user="ann")


def test_redrive_puts_back_what_can_be_read_by_now_and_only_once(
    open_here: Callable[[], Log], log_url: str, topic: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = open_here()
    # GOOD could not be read when its schema was unknown; the others cannot be read today either
    dead(log, topic, [
        (b"a key of its own", GOOD, Reason.UNKNOWN_SCHEMA),
        (b"bob", GOOD[:-1], Reason.TRUNCATED),
        (b"bob", b"{}", Reason.BAD_FRAME),
        (b"bob", None, Reason.EMPTY),
        (b"cat", event("e2", user="cat"), Reason.LATE),
    ])  # fmt: skip
    command = ("redrive", "--log", log_url, "--topic", topic)
    report = f"{topic}.dlq: 4 letters read, 1 put back; stay: 1 TRUNCATED, 1 BAD_FRAME, 1 EMPTY"
    waiting = f"{topic}.late: 1 letters wait; --late puts them back"

    assert ran(*command, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [f"{report} (dry run: nothing was written)", waiting]
    assert everything(log, topic) == []

    assert ran(*command) == 0
    assert capsys.readouterr().out.splitlines() == [report, waiting]
    assert [(line.key, line.value) for line in everything(log, topic)] == [(b"a key of its own", GOOD)]

    assert ran(*command) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{topic}.dlq: 0 letters read, 0 put back; 4 were read before: --again reads those, too",
        waiting,
    ]
    assert ran(*command, "--late") == 0
    assert capsys.readouterr().out.splitlines()[1] == f"{topic}.late: 1 letters read, 1 put back"
    assert sorted(line.key or b"" for line in everything(log, topic)) == [b"a key of its own", b"cat"]


def test_letters_of_a_topic_that_begins_anew_wait_like_those_of_any_other(url: str, sqlite: Log) -> None:
    """How far the letters before them were dealt with says nothing of these."""
    dead(sqlite, "events", [(b"ann", GOOD, Reason.LATE)])
    sqlite.commit(GROUP, "events.late", {0: 40})
    assert waiting(sqlite, "events.late") == 1
    assert redrive(sqlite, CODEC, "events", "events.late").put_back == 1
    assert waiting(sqlite, "events.late") == 0


def test_a_letter_that_stayed_is_looked_at_again_when_asked_and_what_went_back_counts_once(
    url: str, sqlite: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    dead(sqlite, "events", [(b"ann", GOOD, Reason.UNKNOWN_SCHEMA)])
    for _ in range(2):
        assert ran("redrive", "--log", url, "--again") == 0
        assert "1 letters read, 1 put back" in capsys.readouterr().out
    joiner, decoder = Joiner(partitions=[0, 1]), Decoder(CODEC, Vocabulary())
    bounds = sqlite.bounds("events")
    for batch in records_between(
        sqlite, "events", dict.fromkeys(bounds, 0), {p: b.high for p, b in bounds.items()}
    ):
        joiner.push(decoder.decode(batch))
    counted = joiner.counters()
    assert (counted["events"], counted["duplicates"]) == (1, 1)


def test_what_stayed_goes_back_once_its_schema_is_there_by_the_flag_that_is_named(
    url: str, sqlite: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    key, value = click(1)
    dead(sqlite, "events", [(key.encode(), value, Reason.UNKNOWN_SCHEMA)])
    command = ("redrive", "--log", url)
    said = []
    for flags in ((), ("--schemas", str(SCHEMAS)), ("--schemas", str(SCHEMAS), "--again")):
        assert ran(*command, *flags) == 0
        said.append(capsys.readouterr().out.splitlines()[0].removeprefix("events.dlq: "))
    assert said == [
        "1 letters read, 0 put back; stay: 1 UNKNOWN_SCHEMA",
        "0 letters read, 0 put back; 1 were read before: --again reads those, too",
        "1 letters read, 1 put back",
    ]


def test_a_letter_without_a_key_goes_to_its_users_partition(url: str, sqlite: Log) -> None:
    for topic in ("events", "events.dlq", "events.late"):
        sqlite.create_topic(topic, 1)
    letter = {"reason": "UNKNOWN_SCHEMA", "topic": "events", "partition": 0, "offset": 0, "timestamp": START_MS,
              "key": None, "value": GOOD}  # fmt: skip
    put(sqlite, "events.dlq", [(b"0-0", CODEC.encode(DEAD_LETTER, letter))])
    assert ran("redrive", "--log", url) == 0
    assert [(line.key, line.value) for line in everything(sqlite, "events")] == [(b"ann", GOOD)]


def test_letters_that_are_cut_short_or_are_none_stay(
    url: str, sqlite: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    for topic in ("events", "events.dlq", "events.late"):
        sqlite.create_topic(topic, 1)
    letter = {
        "topic": "events",
        "partition": 0,
        "offset": 0,
        "timestamp": START_MS,
        "key": b"ann",
        "value": GOOD,
    }
    cut = CODEC.encode(DEAD_LETTER, letter | {"reason": "TOO_LONG, cut from 999990 bytes"})
    foreign = CODEC.encode(DEAD_LETTER, letter | {"reason": "EMPTY", "topic": "catalog"})
    put(sqlite, "events.dlq", [(b"ann", cut), (b"ann", foreign), (b"ann", GOOD), (b"ann", None)])
    assert ran("redrive", "--log", url) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "events.dlq: 4 letters read, 0 put back; stay: 2 no letter, 1 cut short, 1 from catalog"
    )
    assert everything(sqlite, "events") == []
