"""A topic whose records can be written, expired and deleted at will, and a learner's checkpoints waited for."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import time
from pathlib import Path
from typing import Any

from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource

from learner.__main__ import main
from learner.checkpoint import Checkpoints
from streaming.log import Log, open_log
from streaming.schemas import Codec
from streaming.sqlite_log import SqliteLog
from tests.learner_process import SMALL

DAY_S = 86_400
QUICK = ("--min-replay", "40", "--checkpoint-s", "0.3", "--publish-s", "0.3")


class Shop:
    """A topic with one partition, users who view items once a second, and a retention that can be made to strike."""

    def __init__(self, url: str, topic: str) -> None:
        self.url, self.topic, self.log = url, topic, open_log(url)
        self.written = 0
        self.log.create_topic(topic, 1)

    def write(self, count: int) -> None:
        producer, codec = self.log.producer(), Codec()
        for n in range(self.written, self.written + count):
            event = {
                "event_id": f"e{n}",
                "name": "view_item",
                "user_id": f"user-{n % 20}",
                "timestamp": 1_700_000_000_000 + n * 1000,
                "items": [{"item_id": f"item-{n % 7}"}],
            }
            producer.send(self.topic, event["user_id"].encode(), codec.encode_event(event))
        producer.close()
        self.written += count

    def expire(self) -> None:
        """All that is there grows older than the retention, and goes."""
        if isinstance(self.log, SqliteLog):
            expire(self.url, self.topic)
        else:
            self._keep_for("1")
            give_up = time.monotonic() + 30
            while self._holds_any() and time.monotonic() < give_up:
                time.sleep(0.1)
            self._keep_for("604800000")
        assert not self._holds_any()
        assert sum(bounds.high for bounds in self.log.bounds(self.topic).values()) == self.written

    def _holds_any(self) -> bool:
        return any(bounds.low < bounds.high for bounds in self.log.bounds(self.topic).values())

    def begin_anew(self) -> None:
        """The topic is deleted, and made anew by the same name, empty."""
        delete_topic(self.log, self.topic)
        self.written = 0
        self.log.create_topic(self.topic, 1)

    def _keep_for(self, retention_ms: str) -> None:
        admin = admin_of(self.log)
        entry = ConfigEntry("retention.ms", retention_ms, incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ConfigResource.Type.TOPIC, self.topic, incremental_configs=[entry])
        (future,) = admin.incremental_alter_configs([resource]).values()
        future.result(10)

    def flags(self, *more: str) -> tuple[str, ...]:
        return ("--topic", self.topic, *QUICK, *more)


def expire(url: str, topic: str) -> None:
    """All that a SQLite log has of a topic grows older than the retention, and goes."""
    later = SqliteLog(url, url.removeprefix("sqlite:///"), clock=lambda: time.time() + 10 * DAY_S)
    with later._using() as db:
        db.execute("UPDATE topics SET retention_ms = ?", (DAY_S * 1000,))
    later.expire(topic)
    later.close()


def admin_of(log: Log) -> AdminClient:
    return AdminClient({"bootstrap.servers": log.url.removeprefix("kafka://")})


def delete_topic(log: Log, topic: str) -> None:
    """As an operator would: there is no way to do it by Bellwether."""
    if isinstance(log, SqliteLog):
        with log._using() as db:
            db.execute("DELETE FROM records WHERE part IN (SELECT part FROM parts WHERE topic = ?)", (topic,))
            db.execute("DELETE FROM parts WHERE topic = ?", (topic,))
            db.execute("DELETE FROM topics WHERE topic = ?", (topic,))
        return
    admin = admin_of(log)  # it must live until it is answered
    (future,) = admin.delete_topics([topic]).values()
    future.result(10)
    give_up = time.monotonic() + 10
    while log.partitions(topic) and time.monotonic() < give_up:
        time.sleep(0.05)


def learn(folder: Path, url: str, *flags: str) -> tuple[int, str]:
    """The `learner` command in this process, which spares its start: (exit status, all that it said)."""
    said, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(said)
    level, signals = root.level, {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    stores = ("--data-dir", str(folder / "data"), "--weights", str(folder / "weights"))
    try:
        with contextlib.redirect_stderr(said):
            status = main(["--log", url, *SMALL, *stores, *flags])
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        for number, before in signals.items():
            signal.signal(number, before)
    return status, said.getvalue()


def newest_meta(folder: Path, name: str = "learner") -> dict[str, Any] | None:
    """What the newest checkpoint of the learner in `folder` says; None: there is none yet."""
    loaded = Checkpoints(folder / "data" / name).load()
    return None if loaded is None else loaded.meta


def await_offset(folder: Path, offset: int, name: str = "learner", timeout_s: float = 90.0) -> None:
    """Wait for a checkpoint that has read so far."""
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        with contextlib.suppress(OSError):
            meta = newest_meta(folder, name)
            if meta is not None and meta["positions"] == {"0": offset}:
                return
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint at {offset} within {timeout_s:g} s: {newest_meta(folder, name)}")
