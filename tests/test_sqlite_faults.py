"""The embedded log on a disk that fails for a while: what failed can be tried again, and says so."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from streaming.log import LogUnavailable, open_log
from streaming.sqlite_log import _transaction


def test_a_read_error_of_the_disk_can_be_tried_again_and_nothing_was_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    log = open_log(f"sqlite:///{path}")
    log.create_topic("events", 1)
    with closing(log), closing(log.producer()) as producer:
        for number in range(800):
            producer.send("events", b"k", b"%d" % number + bytes(3000))
        assert producer.flush() == 0
        with closing(log.reader("events", {0: 0})) as reader:
            assert len(reader.poll(10, 1.0)) == 10
            # records are in the write-ahead log yet: what is no longer there cannot be read
            wal = Path(f"{path}-wal")
            whole = wal.read_bytes()
            os.truncate(wal, len(whole) // 4)
            for _ in range(2):
                with pytest.raises(LogUnavailable, match="disk I/O error"):
                    reader.poll(2000, 0.1)
            with wal.open("r+b") as mended:
                mended.write(whole)
            found: list[int] = []
            while len(found) < 790:
                batch = reader.poll(2000, 1.0)
                assert len(batch)
                found += batch.offset.tolist()
    assert found == list(range(10, 800))


def test_an_error_that_ended_the_transaction_is_the_one_that_is_told(tmp_path: Path) -> None:
    def fail(db: sqlite3.Connection) -> None:
        with _transaction(db):
            db.execute("ROLLBACK")  # SQLite does so itself where a page cannot be written
            raise sqlite3.OperationalError("disk I/O error")

    db = sqlite3.connect(tmp_path / "log.db", isolation_level=None)
    with closing(db), pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
        fail(db)
