"""The server's own view of the log, asked while it reads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import pytest

from learner.policy import Entry
from serving.metrics import VIEW_FAILURES
from serving.view import Follower, View, ViewConfig
from streaming.chunks import batch_of
from streaming.log import Bounds, Log, LogUnavailable, OffsetOutOfRange, Reader, RecordBatch, open_log
from streaming.schemas import Codec
from tests.serving_process import eventually

CODEC = Codec()
NOW_MS = 1_700_000_000_000


def event(number: int, name: str = "view_item", user: str = "u") -> bytes:
    """One that nobody has seen, about an item that nobody has seen."""
    about = {"event_id": f"e{number}", "name": name, "user_id": user, "timestamp": NOW_MS}
    return CODEC.encode_event({**about, "items": [{"item_id": f"item-{number}"}]})


class SlowToName(View):
    """Leaves others time whenever it is about to name items."""

    def _name_items(self) -> None:
        time.sleep(0.002)
        super()._name_items()


def test_users_who_just_met_a_new_item_may_be_asked_for_at_any_moment() -> None:
    view, errors, done = SlowToName(ViewConfig(max_users=10), CODEC), [], threading.Event()

    def ask() -> None:
        try:
            while not done.is_set():
                assert all(entry.item_id for entry in view.history("u"))
                assert all(view.bought("u", NOW_MS))
        except Exception as error:
            errors.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    for number in range(100):
        view.absorb(batch_of([event(number, "purchase" if number % 2 else "view_item")]))
    done.set()
    asker.join()
    assert errors == []
    assert view.history("u")[-1].item_id == "item-99"


def test_what_a_history_says_was_returned_long_ago_and_bought_again_since_is_bought() -> None:
    view, day = View(ViewConfig(max_users=10), CODEC), 86_400_000

    def bought(*deeds: tuple[str, int]) -> set[str]:
        return view.bought_in([Entry("a", name, NOW_MS - days * day) for name, days in deeds], NOW_MS)

    assert bought(("purchase", 60), ("refund", 59), ("purchase", 1)) == {"a"}
    assert bought(("refund", 5), ("purchase", 1)) == {"a"}  # the history begins after what it returns
    assert bought(("purchase", 9), ("purchase", 8), ("refund", 7)) == {"a"}
    assert bought(("purchase", 9), ("refund", 7)) == bought(("purchase", 60)) == set()


class Asking(Codec):
    """Whoever asks what may be recommended while it decodes must be answered."""

    view: View
    answered = 0

    def decode(self, data: bytes) -> tuple[str, dict[str, Any]]:
        asker = threading.Thread(target=self.view.availability, args=(1,), daemon=True)
        asker.start()
        asker.join(5)
        self.answered += not asker.is_alive()
        return super().decode(data)


def test_nobody_has_to_wait_until_records_of_the_catalog_are_decoded() -> None:
    codec = Asking()
    codec.view = View(ViewConfig(max_users=1), codec)
    assert codec.view.absorb_catalog(batch_of([CODEC.encode_item({"item_id": "a"})], keys=[b"a"])) == 0
    assert codec.answered == 1
    assert codec.view.availability(1)[0].tolist() == [False, True]


class Stumbling(View):
    """Cannot take in the first records that it is given."""

    stumbled = False

    def absorb(self, batch: RecordBatch) -> int:
        if not self.stumbled:
            self.stumbled = True
            raise ZeroDivisionError("a bug")
        return super().absorb(batch)


def test_who_waits_for_a_log_that_is_away_can_be_told_to_stop(tmp_path, monkeypatch) -> None:
    config, stop = ViewConfig(max_users=10), threading.Event()

    def away(topic: str) -> dict[int, Bounds]:
        raise LogUnavailable("away")

    with closing(open_log(f"sqlite:///{tmp_path}/log.db")) as log:
        log.create_topic("events", 1)
        monkeypatch.setattr(log, "bounds", away)
        follower = Follower(log, View(config, CODEC), config, time.monotonic)
        threading.Timer(0.3, stop.set).start()
        began = time.monotonic()
        try:
            assert not follower.start(60, stop)
        finally:
            follower.stop()
        assert 0.25 < time.monotonic() - began < 20


def test_a_fault_is_said_and_counted_and_the_view_goes_on_with_what_comes_next(tmp_path, caplog) -> None:
    config, before = ViewConfig(max_users=10), VIEW_FAILURES.labels("fault")._value.get()
    view = Stumbling(config, CODEC)
    with closing(open_log(f"sqlite:///{tmp_path}/log.db")) as log, closing(log.producer()) as producer:
        log.create_topic("events", 1)
        producer.send("events", b"u", event(1))
        producer.flush()
        follower = Follower(log, view, config, time.monotonic)
        try:
            assert follower.start(30)
            producer.send("events", b"u", event(2))
            assert eventually(lambda: [entry.item_id for entry in view.history("u")]) == ["item-2"]
        finally:
            follower.stop()
    assert VIEW_FAILURES.labels("fault")._value.get() == before + 1
    assert "own view: ZeroDivisionError('a bug'); retrying\nTraceback" in caplog.text


class Slow:
    """A log whose readers give nothing at first, as a consumer that was assigned a moment ago."""

    def __init__(self, log: Log, looks: int) -> None:
        self._log, self._looks = log, looks

    def bounds(self, topic: str) -> dict[int, Bounds]:
        return self._log.bounds(topic)

    def reader(self, topic: str, offsets: Mapping[int, int], *, keys: bool = False) -> SlowReader:
        return SlowReader(self._log.reader(topic, offsets, keys=keys), self._looks)


class SlowReader:
    def __init__(self, reader: Reader, looks: int) -> None:
        self._reader, self._looks = reader, looks

    def poll(self, max_records: int, timeout_s: float) -> RecordBatch:
        self._looks -= 1
        return self._reader.poll(max_records, timeout_s) if self._looks < 0 else batch_of([])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


@pytest.mark.parametrize("away", [0, 3])
def test_a_log_that_is_slow_to_begin_is_not_taken_for_one_that_was_read(tmp_path, away) -> None:
    clock = itertools.count(0, 100)  # seconds from one look at it to the next
    with closing(open_log(f"sqlite:///{tmp_path}/log.db")) as log, closing(log.producer()) as producer:
        log.create_topic("events", 1)
        producer.send("events", b"u", event(1))
        producer.flush()
        slow, view = Slow(log, looks=4), View(ViewConfig(max_users=10), CODEC)
        bounds, asked = slow.bounds, itertools.count()

        def refused(topic: str) -> dict[int, Bounds]:
            if next(asked) < away:
                raise LogUnavailable("away")
            return bounds(topic)

        slow.bounds = refused
        follower = Follower(slow, view, ViewConfig(max_users=10), lambda: float(next(clock)))
        try:
            assert follower.start(30)
            assert [entry.item_id for entry in view.history("u")] == ["item-1"]
        finally:
            follower.stop()


class Passing(SlowReader):
    """Says once that what it is asked for is out of range, until it is asked anew."""

    broken = True

    def poll(self, max_records: int, timeout_s: float) -> RecordBatch:
        if self.broken:
            raise OffsetOutOfRange("events/0: offset 0 is out of range")
        return self._reader.poll(max_records, timeout_s)

    def seek(self, offsets: Mapping[int, int]) -> None:
        self.broken &= 0 not in offsets
        self._reader.seek(offsets)


def test_an_offset_that_is_out_of_range_and_is_there_all_the_same_is_asked_for_again(tmp_path) -> None:
    with closing(open_log(f"sqlite:///{tmp_path}/log.db")) as log, closing(log.producer()) as producer:
        log.create_topic("events", 1)
        producer.send("events", b"u", event(1))
        producer.flush()
        slow, view = Slow(log, 0), View(ViewConfig(max_users=10), CODEC)
        slow.reader = lambda topic, offsets, keys: Passing(log.reader(topic, offsets, keys=keys), 0)
        gaps = VIEW_FAILURES.labels("gap")._value.get()
        follower = Follower(slow, view, ViewConfig(max_users=10), time.monotonic)
        try:
            assert follower.start(30)
            assert [entry.item_id for entry in view.history("u")] == ["item-1"]
        finally:
            follower.stop()
        assert VIEW_FAILURES.labels("gap")._value.get() == gaps  # nothing was passed over


class Refused(SlowReader):
    """Never gives anything but trouble."""

    def poll(self, max_records: int, timeout_s: float) -> RecordBatch:
        raise LogUnavailable("Kafka keeps our user from topic 'catalog'")


def test_a_catalog_that_cannot_be_read_holds_up_no_events(tmp_path, caplog) -> None:
    with closing(open_log(f"sqlite:///{tmp_path}/log.db")) as log, closing(log.producer()) as producer:
        log.create_topic("events", 1)
        log.create_topic("catalog", 1)
        producer.send("events", b"u", event(1))
        producer.flush()
        slow, view = Slow(log, 0), View(ViewConfig(max_users=10), CODEC)

        def reader(topic: str, offsets: Mapping[int, int], *, keys: bool = False) -> SlowReader:
            return (Refused if topic == "catalog" else SlowReader)(log.reader(topic, offsets, keys=keys), 0)

        slow.reader = reader
        follower = Follower(slow, view, ViewConfig(max_users=10), time.monotonic)
        try:
            assert not follower.start(0.1)  # what the log holds was not read
            assert eventually(lambda: [entry.item_id for entry in view.history("u")]) == ["item-1"]
            producer.send("events", b"u", event(2))
            assert eventually(lambda: len(view.history("u")) == 2)
        finally:
            follower.stop()
    assert caplog.text.count("own view: Kafka keeps our user from topic 'catalog'; retrying") == 1
