"""A Trainer with all its real parts on a small SQLite log, but with clocks and a disk that a test has in hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from learner.agent_settings import AgentSettings
from learner.catalog_feed import CatalogFeed
from learner.checkpoint import Checkpoints, CheckpointWriter, Disk
from learner.intake import Arrivals
from learner.learner import Learner, LearnerSettings
from learner.metrics import Metrics
from learner.misplaced import Misplaced
from learner.publishing import WeightPublisher
from learner.train import TrainConfig, Trainer
from learner.watch import LogWatch
from learner.weights import WeightStore
from streaming.dead_letters import DeadLetters, dlq_topic, late_topic
from streaming.join_settings import JoinSettings
from streaming.log import open_log
from streaming.schemas import Codec

USERS = tuple(f"user-{n}" for n in range(20))
AGENT = AgentSettings(batch_size=16, dim=8, hidden=16, history_length=8)


class Rig:
    """`turns(n)` lets the trainer do n turns; `now_s` (monotonic) and `wall_ms` are what its clocks show.

    A turn takes turn_s of `now_s`, and as much of `wall_ms`.
    """

    def __init__(
        self,
        folder: Path,
        disk: Disk | None = None,
        turn_s: float = 1.0,
        partitions: int = 1,
        agent: AgentSettings = AGENT,
        **config: Any,
    ) -> None:
        self.folder, self.turn_s = folder, turn_s
        self.now_s, self.wall_ms = 1000.0, 1_767_225_600_000
        self.reachable = True  # else the log does not say what it holds
        self.log = open_log(f"sqlite:///{folder / 'log.db'}")
        self.log.create_topic("events", partitions)
        for topic in (dlq_topic("events"), late_topic("events")):
            self.log.create_topic(topic, 1)
        self.producer = self.log.producer()
        self.written = 0
        self.learner = Learner(
            LearnerSettings(min_replay=20, replay_capacity=10_000, updates_high=0.5),
            agent,
            JoinSettings(gamma=agent.gamma, history_length=agent.entries),
            Codec(),
            None,
        )
        begin = dict.fromkeys(range(partitions), 0)
        self.learner.assign(begin)
        self.watch = LogWatch(self.log, "events", "catalog", "rig", 3600.0, self.clock)
        self.letters = DeadLetters(self.producer, Codec(), "events")
        self.catalog = CatalogFeed(self.log, "catalog", self.learner.catalog)
        self.reader = self.log.reader("events", begin)
        self.store = WeightStore(str(folder / "weights"))
        self.checkpoints = CheckpointWriter(Checkpoints(folder / "data" / "learner", disk=disk))
        self.publisher = WeightPublisher(self.store, self.learner.vocabulary, self.clock)
        self.misplaced = Misplaced(self.log, "events", Codec(), lambda: 1, self.clock)
        self.metrics = Metrics()
        self.trainer = Trainer(
            TrainConfig(**config),
            self.learner,
            Arrivals(self.reader, 1000),
            until=None,
            watch=self.watch,
            catalog=self.catalog,
            letters=self.letters,
            misplaced=self.misplaced,
            checkpoints=self.checkpoints,
            publisher=self.publisher,
            metrics=self.metrics,
            clock=self.clock,
            now_ms=lambda: self.wall_ms,
        )

    def clock(self) -> float:
        """Monotonic seconds."""
        return self.now_s

    def write(self, count: int, timestamp_ms: int | None = None, users: Sequence[str] = USERS) -> None:
        """Events of these users in turn, stamped a second apart from timestamp_ms on (None: from the wall clock on)."""
        first_ms = self.wall_ms if timestamp_ms is None else timestamp_ms
        for n in range(self.written, self.written + count):
            event = {
                "event_id": f"e{n}",
                "name": "view_item",
                "user_id": users[n % len(users)],
                "timestamp": first_ms + (n - self.written) * 1000,
                "items": [{"item_id": f"item-{n % 7}"}],
            }
            key = event["user_id"].encode()
            self.producer.send("events", key, Codec().encode_event(event), self.wall_ms)
        self.producer.flush()
        self.written += count
        self.watch.ask()

    @property
    def now_ms_of_shop(self) -> int:
        """Event time by a clock that nobody sets."""
        return 1_767_225_600_000 + round((self.now_s - 1000.0) * 1000)

    def decide(self, id: str, user: str, timestamp_ms: int, items: list[str]) -> None:
        """A server's decision."""
        slate = [{"item_id": item, "propensity": 0.5} for item in items]
        record = {"recommendation_id": id, "user_id": user, "timestamp": timestamp_ms, "slate": slate}
        self.producer.send("events", user.encode(), Codec().encode_decision(record), self.wall_ms)

    def click(self, id: str, user: str, timestamp_ms: int, item: str, name: str = "select_item") -> None:
        """A storefront's event that came of it."""
        event = {
            "event_id": f"click-{id}",
            "name": name,
            "user_id": user,
            "timestamp": timestamp_ms,
            "items": [{"item_id": item}],
            "recommendation_id": id,
        }
        self.producer.send("events", user.encode(), Codec().encode_event(event), self.wall_ms)

    def turns(self, count: int, each: Callable[[int], None] = lambda turn: None) -> None:
        """Let it do so many turns. each: called after each of them; what is being written is waited for."""
        stop, done = threading.Event(), 0

        def tell(now_s: float) -> None:
            nonlocal done
            self._settle()
            self.now_s += self.turn_s
            self.wall_ms += round(self.turn_s * 1000)
            if self.reachable:
                self.watch.ask()
            each(done)
            done += 1
            if done >= count:
                stop.set()

        self.trainer._end = lambda: None  # type: ignore[method-assign]  # it goes on in the next call
        self.trainer.run(stop, tell)

    def end(self) -> None:
        """End it as SIGTERM does."""
        type(self.trainer)._end(self.trainer)

    def _settle(self) -> None:
        """What runs beside the turns gets done within one."""
        for running in (self.checkpoints._running, self.publisher._running):
            if running is not None:
                running.exception(timeout=30)

    def close(self) -> None:
        """Let go of everything."""
        parts = (self.checkpoints, self.publisher, self.watch, self.catalog, self.misplaced, self.reader)
        for part in (*parts, self.producer):
            part.close()
        self.log.close()
