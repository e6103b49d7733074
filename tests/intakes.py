"""A learner's way in, in one process: a log, decoder, join and replay, and the letters of what cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from learner.agent_settings import AgentSettings
from learner.audit import Audit, AuditConfig
from learner.audit_report import Report
from learner.checkpoint import Checkpoints, decode, encode
from learner.intake import Arrivals, Intake
from learner.learner import Learner, LearnerSettings, Taken
from streaming.dead_letters import DeadLetters, dlq_topic, late_topic
from streaming.join_settings import JoinSettings
from streaming.log import Log, RecordBatch, open_log
from streaming.schemas import DEAD_LETTER, Codec

AGENT = AgentSettings(batch_size=8, dim=4, hidden=4, history_length=4)
SETTINGS = LearnerSettings(min_replay=100, replay_capacity=20_000)
JOIN = JoinSettings(gamma=AGENT.gamma, history_length=AGENT.entries)


class Letter(NamedTuple):
    """A dead letter, without when it was."""

    reason: str
    partition: int
    offset: int
    value: bytes | None


class Memory(NamedTuple):
    """What a checkpoint holds."""

    parts: dict[str, Any]
    positions: dict[int, int]


class Way:
    """All that `learner` does with records, but training. Closes with its `with` block."""

    def __init__(
        self,
        url: str,
        codec: Codec | None = None,
        partitions: int = 1,
        join: JoinSettings = JOIN,
        topic: str = "events",
        most: int = 10_000,
        settings: LearnerSettings = SETTINGS,
        memory: Memory | None = None,
    ) -> None:
        """memory: of a learner that is to go on here."""
        self.codec, self.topic = codec or Codec(), topic
        self.log: Log = open_log(url)
        for name, count in ((topic, partitions), (dlq_topic(topic), 1), (late_topic(topic), 1)):
            self.log.create_topic(name, count)
        self.producer = self.log.producer()
        self.learner = Learner(
            settings, replace(AGENT, history_length=join.history_length), join, self.codec, partitions
        )
        starts = {p: bounds.low for p, bounds in self.log.bounds(topic).items()}
        if memory is not None:
            starts = memory.positions
            self.learner.restore(memory.parts)
        self.learner.assign(starts)
        self.reader = self.log.reader(topic, starts)
        self.letter_producer = self.log.producer()
        self.letters = DeadLetters(self.letter_producer, self.codec, topic)
        self.batches: list[tuple[RecordBatch, Taken]] = []
        self.intake = Intake(
            self.learner, Arrivals(self.reader, most), self.letters, lambda *each: self.batches.append(each)
        )

    def __enter__(self) -> Way:
        return self

    def __exit__(self, *exception: object) -> None:
        for thing in (self.reader, self.producer, self.letter_producer, self.log):
            thing.close()

    def send(self, records: Iterable[tuple[str | bytes, bytes | None]]) -> Way:
        """(user or key, value) of each; returns when they are in the log."""
        for key, value in records:
            self.producer.send(self.topic, key.encode() if isinstance(key, str) else key, value)
        assert self.producer.flush() == 0
        return self

    def take(self) -> Way:
        """All that is in the log, but for what is parked."""
        ends = {p: bounds.high for p, bounds in self.log.bounds(self.topic).items()}
        while any(o < ends[p] for p, o in self.reader.position().items() if p not in self.intake.parked):
            self.intake.read(1.0)
        self.letters.flush()
        return self

    def dead(self, topic: str | None = None) -> list[Letter]:
        """The letters in events.dlq, or in another topic of letters."""
        topic = topic or dlq_topic(self.topic)
        found = []
        reader = self.log.reader(topic, {0: 0})
        while reader.position()[0] < self.log.bounds(topic)[0].high:
            batch = reader.poll(10_000, 1.0)
            for i in range(len(batch)):
                name, letter = self.codec.decode(batch.value(i) or b"")
                assert name == DEAD_LETTER
                assert letter["topic"] == self.topic
                found.append(Letter(letter["reason"], letter["partition"], letter["offset"], letter["value"]))
        reader.close()
        return found

    def late(self) -> list[Letter]:
        """The letters in events.late."""
        return self.dead(late_topic(self.topic))

    def count(self, name: str) -> int:
        """One of the joiner's counters."""
        return self.learner.joiner.counters()[name]

    def memory(self) -> Memory:
        """All that it knows, as it would be after a restart."""
        _, parts = self.learner.snapshot()
        return Memory(
            {name: decode(encode(part)) for name, part in parts.items()},  # type: ignore[arg-type]
            self.intake.position(),
        )

    def audit(self, folder: Path) -> Report:
        """What `learner audit` says of it; folder: for its checkpoint."""
        memory = self.memory()
        positions = {str(p): offset for p, offset in memory.positions.items()}
        meta = {"topic": self.topic, "positions": positions, "updates": 0}
        Checkpoints(folder / "learner").save(memory.parts, meta)
        config = AuditConfig(data_dir=str(folder), weights=str(folder / "weights"))
        return Audit(self.log, self.codec, config).run()

    def rest(self, hours: float = 2.0) -> Way:
        """Let event time pass, so that visits end."""
        joiner, positions = self.learner.joiner, self.intake.position()
        due = {p: (joiner.watermark_ms(p) or 0) + round(hours * 3_600_000) for p in joiner.partitions}
        self.learner.advance(due, positions)
        return self

    def learnt(self, partition: int | None = None) -> list[tuple[Any, ...]]:
        """(item, slot, reward, discount, organic) of each transition, in the order of their steps in the log."""
        held = self.learner.replay.contents()
        columns = (
            held.partition,
            held.offset,
            held.slot,
            held.action,
            held.reward,
            held.discount,
            held.organic,
        )
        rows = sorted(zip(*(column.tolist() for column in columns), strict=True))
        item = self.learner.vocabulary.item_id
        return [
            (item(action), slot, round(reward, 6), round(discount, 6), organic)
            for p, _, slot, action, reward, discount, organic in rows
            if partition in (None, p)
        ]

    def rewards(self) -> dict[tuple[int, int, int], float]:
        """By identity: partition, offset, slot."""
        held = self.learner.replay.contents()
        places = zip(held.partition.tolist(), held.offset.tolist(), held.slot.tolist(), strict=True)
        return {place: round(reward, 6) for place, reward in zip(places, held.reward.tolist(), strict=True)}


def learnt_from(url: str, records: Sequence[tuple[str | bytes, bytes | None]]) -> list[tuple[Any, ...]]:
    """What a learner holds after these records and the end of the visits."""
    with Way(url) as way:
        return way.send(records).take().rest().learnt()
