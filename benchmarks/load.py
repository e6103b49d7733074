"""A small shop at a steady rate whose every id is known, and the account of what became of each.

What was sent is known here; what the log holds is read record by record with fastavro; what was learnt is told by the
learner's counters, by the identities in replay themselves, and by `learner audit`, which joins the log anew.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from learner.replay import Contents
from streaming.log import Log, LogError, LogFull, LogUnavailable, partition_of
from streaming.schemas import DECISION, Codec, SchemaError

USERS: Final = 60
ITEMS: Final = 50
SLOTS: Final = 4
DECISION_SHARE: Final = 0.4
DUPLICATE_SHARE: Final = 0.02
BAD_SHARE: Final = 0.005
LEAST_SHARE: Final = 0.5  # of what the rate promises: it catches up after a stall, and less is no load


@dataclass
class Sent:
    """What was handed to the log."""

    events: set[str] = field(default_factory=set)
    decisions: set[str] = field(default_factory=set)
    duplicates: int = 0
    bad: int = 0


class Load(threading.Thread):
    """Decisions, and what users do with them, until `finish`. Users of a muted partition stay away."""

    def __init__(self, log: Log, topic: str, rate: float, seed: int) -> None:
        """rate: records a second."""
        super().__init__(name="load", daemon=True)
        self.sent = Sent()
        self.muted: int | None = None
        self._topic, self._rate, self._luck = topic, rate, random.Random(seed)
        self._partitions = log.partitions(topic)
        self._producer = log.producer()
        self._codec = Codec()
        self._shown: dict[str, tuple[str, list[str]]] = {}  # user → newest recommendation_id, slate
        self._ended = threading.Event()
        self._number = 0
        self._steps, self._took_s = 0, 0.0
        self._error: Exception | None = None

    def run(self) -> None:
        began = due = time.monotonic()
        try:
            while not self._ended.is_set():
                self._step()
                self._steps += 1
                due += 1 / self._rate
                self._ended.wait(max(0.0, due - time.monotonic()))
        except Exception as error:  # raised by `finish`, in the thread that judges
            self._error = error
        self._took_s = time.monotonic() - began

    def finish(self) -> None:
        """End, with all that was sent in the log.

        Raises: LogError where it could not be written, where the load broke off, or was much less than its rate.
        """
        self._ended.set()
        self.join()
        if self._error is not None:
            raise LogError(f"the load broke off after {self._steps} steps: {self._error}") from self._error
        if self._steps < LEAST_SHARE * self._rate * self._took_s - 1:
            raise LogError(f"{self._steps} steps in {self._took_s:.0f} s are no load of {self._rate:g}/s")
        if left := self._producer.flush(120.0):
            raise LogError(f"{left} records of the load could not be written")
        self._producer.close()

    def abandon(self) -> None:
        """End, whatever becomes of what was sent; harmless after `finish`."""
        self._ended.set()
        self.join()

    def _step(self) -> None:
        luck, user = self._luck, f"user-{self._luck.randrange(USERS)}"
        if self.muted is not None and partition_of(user.encode(), self._partitions) == self.muted:
            return
        self._number += 1
        if luck.random() < BAD_SHARE:
            self._send(user, b"no record of ours")
            self.sent.bad += 1
        elif user not in self._shown or luck.random() < DECISION_SHARE:
            name, slate = (
                f"d{self._number}",
                [f"item-{i}" for i in luck.sample(range(ITEMS), SLOTS)],
            )
            self._shown[user] = name, slate
            self._send(user, self._codec.encode_decision(decision(name, user, slate)))
            self.sent.decisions.add(name)
        else:
            name, slate = self._shown[user]
            deed = luck.choice(("view_item", "select_item", "select_item", "add_to_cart", "purchase"))
            value = self._codec.encode_event(event(f"e{self._number}", deed, user, luck.choice(slate), name))
            self._send(user, value)
            self.sent.events.add(f"e{self._number}")
            if luck.random() < DUPLICATE_SHARE:
                self._send(user, value)
                self.sent.duplicates += 1

    def _send(self, user: str, value: bytes) -> None:
        while True:
            try:
                return self._producer.send(self._topic, user.encode(), value)
            except (LogFull, LogUnavailable):  # nothing was queued
                if self._ended.wait(0.1):
                    raise


def event(
    event_id: str, name: str, user: str, item: str, recommendation_id: str | None = None
) -> dict[str, Any]:
    """As proto/event.avsc wants it; now."""
    return {
        "event_id": event_id,
        "name": name,
        "user_id": user,
        "timestamp": int(time.time() * 1000),
        "items": [{"item_id": item, "price": 10.0}],
        "recommendation_id": recommendation_id,
    }


def decision(recommendation_id: str, user: str, slate: list[str]) -> dict[str, Any]:
    """As proto/decision.avsc wants it; now."""
    return {
        "recommendation_id": recommendation_id,
        "user_id": user,
        "timestamp": int(time.time() * 1000),
        "slate": [{"item_id": item, "propensity": 0.1} for item in slate],
    }


# --- the account -----------------------------------------------------------------------------------------


class Account(NamedTuple):
    """What became of what was sent. One loss may be seen, and counted, in several places."""

    lost: int
    doubled: int
    wrong: list[str]  # what was found, in words; empty where all is well


@dataclass
class Held:
    """What a topic holds."""

    events: Counter[str] = field(default_factory=Counter)  # id → records
    decisions: dict[str, tuple[int, int]] = field(default_factory=dict)  # id → partition, offset
    users: dict[tuple[int, str], list[tuple[int, str]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # partition, user → offset, id of each decision
    decisions_twice: int = 0
    bad: int = 0


def in_the_log(log: Log, topic: str) -> Held:
    """All of it."""
    held, codec = Held(), Codec()
    bounds = log.bounds(topic)
    with closing(log.reader(topic, {p: b.low for p, b in bounds.items()})) as reader:
        while any(at < bounds[p].high for p, at in reader.position().items()):
            batch = reader.poll(20_000, 1.0)
            for i in range(len(batch)):
                try:
                    kind, record = codec.decode(batch.value(i) or b"")
                except SchemaError:
                    held.bad += 1
                    continue
                if kind != DECISION:
                    held.events[record["event_id"]] += 1
                    continue
                name, place = record["recommendation_id"], (int(batch.partition[i]), int(batch.offset[i]))
                held.decisions_twice += name in held.decisions
                held.decisions[name] = place
                held.users[place[0], record["user_id"]].append((place[1], name))
    return held


def account(
    sent: Sent, held: Held, learnt: Mapping[str, int], found: Mapping[str, int], replay: Contents
) -> Account:
    """What was sent against what the log holds, what was learnt, and what replay holds.

    learnt: the learner's own counters; found: differences, by `learner audit`.
    """
    copies = held.events.total() - len(held.events)
    short, over = _slots(held, replay)
    lost = {
        "sent events are not in the log": len(sent.events - held.events.keys()),
        "sent decisions are not in the log": len(sent.decisions - held.decisions.keys()),
        "bad records are not in the log": max(0, sent.bad - held.bad),
        "events were not learnt from": max(0, len(sent.events) - learnt["events"]),
        "decisions were not learnt from": max(0, len(sent.decisions) - learnt["decisions"]),
        "bad records were passed over": max(0, sent.bad - learnt["bad"]),
        "slots are not in replay": short,
        "transitions lost, says the audit": found.get("lost", 0),
        "dead letters missing, says the audit": found.get("no letter", 0),
    }
    doubled = {
        "events are in the log that nobody sent": len(held.events.keys() - sent.events),
        "decisions are in the log that nobody sent": len(held.decisions.keys() - sent.decisions),
        "records are twice in the log": max(0, copies - sent.duplicates) + held.decisions_twice,
        "events were learnt from too often": max(0, learnt["events"] - len(sent.events)),
        "decisions were learnt from too often": max(0, learnt["decisions"] - len(sent.decisions)),
        "duplicates were not recognised": max(0, sent.duplicates - learnt["duplicates"]),
        "slots are too often in replay": over,
        "transitions doubled or invented, says the audit": found.get("doubled", 0) + found.get("invented", 0),
    }
    named = {"lost", "no letter", "doubled", "invented"}
    other = {f"differences in {kind}, says the audit": n for kind, n in found.items() if kind not in named}
    wrong = [f"{n} {what}" for what, n in (lost | doubled | other).items() if n]
    return Account(sum(lost.values()), sum(doubled.values()), wrong)


def _slots(held: Held, replay: Contents) -> tuple[int, int]:
    """(missing, too many): slots of decisions in replay. A user's last decision is open, or closed by the clock."""
    shown = np.flatnonzero(~replay.organic)
    columns = (replay.partition, replay.offset, replay.slot)
    there = Counter(zip(*(column[shown].tolist() for column in columns), strict=True))
    slots = Counter[tuple[int, int]]()
    for partition, offset, _ in there:
        slots[partition, offset] += 1
    short, over = 0, sum(there.values()) - len(there)
    for (partition, _), decisions in held.users.items():
        *closed, last = sorted(decisions)
        for offset, _ in closed:
            short += max(0, SLOTS - slots.pop((partition, offset), 0))
        slots.pop((partition, last[0]), None)
    return short, over + sum(slots.values())  # what is left is of no decision
