"""Dead letters that were repaired go back and count once: through crashes, two hands at once, and lateness.

Each time a learner takes all of it in before and after, what its decisions earned is what was earned, and its audit
is clean.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from learner.audit_report import as_text
from streaming.dead_letters import dlq_topic, late_topic
from streaming.log import Log, open_log
from streaming.redrive import redrive, waiting
from streaming.schemas import Codec, read_schemas, single_object_prefix
from tests.intakes import JOIN, Way
from tests.test_bad_input import decided
from tests.wire import NOON, written

SCHEMAS = Path(__file__).parent / "schemas" / "evolved"
REPAIRED = Codec(schemas=read_schemas(SCHEMAS))
EVENT = next(schema for schema in read_schemas(SCHEMAS) if schema["name"] == "Event")


def click(number: int, seconds: float = 1.0) -> tuple[str, bytes]:
    """A click on the first item of that user's decision, in a version of Event that not everybody knows."""
    record = {"event_id": f"click{number}", "name": "select_item", "user_id": f"user{number}",
              "timestamp": NOON + round(seconds * 1000), "recommendation_id": f"r{number}",
              "items": [{"item_id": "a"}]}  # fmt: skip
    return f"user{number}", written(EVENT, record, single_object_prefix(EVENT))


def visits(count: int, at: float = 0.0) -> list[tuple[str, bytes]]:
    """A decision for each of so many users."""
    return [decided(f"r{i}", "a", "b", at=at, user=f"user{i}") for i in range(count)]


def unread(url: str, count: int, topic: str) -> Any:
    """So many decisions are learnt from; the clicks on them could not be read. Returns what the learner knows."""
    with Way(url, partitions=2, topic=topic) as way:
        way.send(visits(count)).send(click(i) for i in range(count)).take()
        assert len(way.dead()) == count
        assert way.count("decisions") == count
        return way.memory()


def learnt_once(url: str, count: int, topic: str, memory: Any, folder: Path, join: Any = JOIN) -> int:
    """Asserts that each click counts once, and a clean audit; returns how many copies there were too many."""
    with Way(url, REPAIRED, partitions=2, topic=topic, join=join, memory=memory) as way:
        way.take().rest()
        assert sorted(row[:3] for row in way.learnt()) == sorted([("a", 0, 1.0), ("b", 1, 0.0)] * count)
        assert way.count("events") == count
        report = way.audit(folder)
        assert report.clean, as_text(report)
        return way.count("duplicates")


def test_what_was_repaired_counts_once(log_url: str, topic: str, tmp_path: Path) -> None:
    memory = unread(log_url, 20, topic)
    log = open_log(log_url)
    assert redrive(log, Codec(), topic, dlq_topic(topic)).put_back == 0  # not repaired yet
    assert redrive(log, REPAIRED, topic, dlq_topic(topic), again=True).put_back == 20
    assert redrive(log, REPAIRED, topic, dlq_topic(topic)).letters == 0
    log.close()
    assert learnt_once(log_url, 20, topic, memory, tmp_path) == 0


class Dying(Exception):
    """As `kill -9` would have it, but at a moment of our choice."""


@pytest.mark.parametrize(
    "moment", ["before it writes", "after some are written", "before it remembers", "after that"]
)
def test_it_dies_at_any_moment_and_is_run_again(
    moment: str, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, count = f"sqlite:///{tmp_path / 'log.db'}", 12
    monkeypatch.setattr("streaming.tail._BATCH", 4)
    memory = unread(url, count, topic)
    log = open_log(url)
    commits = log.commit
    commit_at = {"before it remembers": 2, "after that": 3}.get(moment)
    calls = 0

    def commit(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == commit_at and moment == "before it remembers":
            raise Dying
        commits(*arguments)
        if calls == commit_at:
            raise Dying

    monkeypatch.setattr(log, "commit", commit)
    sending = log.producer

    def producer() -> Any:
        made = sending()
        send, sent = made.send, 0

        def dying(*record: Any) -> None:
            nonlocal sent
            sent += 1
            if sent == {"before it writes": 1, "after some are written": 7}.get(moment):
                made.flush()
                raise Dying
            send(*record)

        made.send = dying
        return made

    monkeypatch.setattr(log, "producer", producer)
    with pytest.raises(Dying):
        redrive(log, REPAIRED, topic, dlq_topic(topic))
    log.close()
    log = open_log(url)
    redrive(log, REPAIRED, topic, dlq_topic(topic))
    assert waiting(log, dlq_topic(topic)) == 0
    log.close()
    doubled = {"before it writes": 0, "after some are written": 2, "before it remembers": 4, "after that": 0}
    assert learnt_once(url, count, topic, memory, tmp_path) == doubled[moment]


def records_in(log: Log, topic: str) -> int:
    return sum(bounds.high for bounds in log.bounds(topic).values())


def test_it_is_killed_9_in_the_middle_and_run_again(log_url: str, topic: str, tmp_path: Path) -> None:
    count = 1500
    memory = unread(log_url, count, topic)
    command = [sys.executable, "-m", "streaming", "redrive", "--log", log_url, "--topic", topic]
    command += ["--schemas", str(SCHEMAS)]
    log = open_log(log_url)
    before = records_in(log, topic)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while records_in(log, topic) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    written_by_then = records_in(log, topic) - before
    assert written_by_then > 0
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "put back" in again.stdout
    copies = records_in(log, topic) - before - count
    log.close()
    doubled = learnt_once(log_url, count, topic, memory, tmp_path)
    if log_url.startswith("sqlite:"):  # Kafka's offsets have holes
        assert doubled == copies


def test_two_hands_at_once(log_url: str, topic: str, tmp_path: Path) -> None:
    count = 50
    memory = unread(log_url, count, topic)
    start, put_back = threading.Barrier(2), []

    def hand() -> None:
        log = open_log(log_url)
        start.wait()
        put_back.append(redrive(log, REPAIRED, topic, dlq_topic(topic)).put_back)
        log.close()

    hands = [threading.Thread(target=hand) for _ in range(2)]
    for each in hands:
        each.start()
    for each in hands:
        each.join()
    assert max(put_back) == count
    assert learnt_once(log_url, count, topic, memory, tmp_path) == sum(put_back) - count


def test_what_was_too_late_counts_once_where_more_is_allowed_now(topic: str, tmp_path: Path) -> None:
    url, count = f"sqlite:///{tmp_path / 'log.db'}", 10
    strict = replace(JOIN, late_after_s=60)
    with Way(url, REPAIRED, partitions=2, topic=topic, join=strict) as way:
        way.send(visits(count)).take()
        later = [decided(f"s{i}", "c", "d", at=600, user=f"other{i}") for i in range(20)]
        way.send(later).send(click(i, 30.0) for i in range(count)).take()
        assert len(way.late()) == count
        memory = way.memory()
    log = open_log(url)
    for again in (False, True):  # a hand that does it twice
        assert redrive(log, REPAIRED, topic, late_topic(topic), again=again).put_back == count
    log.close()
    with Way(url, REPAIRED, partitions=2, topic=topic, join=JOIN, memory=memory) as way:
        way.take().rest()
        earned = [row[:3] for row in way.learnt() if row[0] in "ab"]
        assert sorted(earned) == sorted([("a", 0, 1.0), ("b", 1, 0.0)] * count)
        assert (way.count("late"), way.count("duplicates"), way.count("events")) == (count, count, count)
        assert len(way.late()) == count
        report = way.audit(tmp_path)
        assert report.clean, as_text(report)
