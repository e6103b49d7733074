"""The server's own view of the log, asked while it reads."""

from __future__ import annotations

import threading
import time
from contextlib import closing

from serving.metrics import VIEW_FAILURES
from serving.view import Follower, View, ViewConfig
from streaming.chunks import batch_of
from streaming.log import RecordBatch, open_log
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


class Stumbling(View):
    """Cannot take in the first records that it is given."""

    stumbled = False

    def absorb(self, batch: RecordBatch) -> int:
        if not self.stumbled:
            self.stumbled = True
            raise ZeroDivisionError("a bug")
        return super().absorb(batch)


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
