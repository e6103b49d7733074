"""The server's own view of the log, asked while it reads."""

from __future__ import annotations

import threading
import time

from serving.view import View, ViewConfig
from streaming.chunks import batch_of
from streaming.schemas import Codec

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
