"""What became of one record: the transitions it gave and what each earned, what it earned others, or its letter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from learner.audit import AuditConfig, NothingToAudit, Subject, checkpoint_of, ids_of, subject, tolerance
from learner.retelling import Retelling, first_offset, open_steps, read_partition, rows_of
from streaming.columns import Kind
from streaming.dead_letters import dlq_topic, late_topic
from streaming.decoder import Decoder
from streaming.interning import Vocabulary, hash_string
from streaming.log import Bounds, Log, OffsetOutOfRange
from streaming.plain_joiner import Credit
from streaming.schemas import Codec
from streaming.tail import as_text as record_as_text
from streaming.tail import between

MOST_RECORDS: Final = 100  # with one id

FATES: Final = {
    "unread": "the checkpoint has not read it yet",
    "gone": "it is no longer in the log",
    "hole": "there is no such record: a hole that an aborted transaction or a marker left",
    "before": "it lies before what can be told again: not read, stepped over, or joined with what is gone by now",
    "duplicate": "a duplicate: its id was seen before, so it counts for nothing",
    "decision": "a decision, taken in",
    "event": "an event, taken in",
}


@dataclass
class Slot:
    """One transition that the record gave, or will give."""

    slot: int
    item: str
    reward: float  # by the log
    held: float | None  # in replay; None: not there
    credits: list[Credit] = field(default_factory=list)


@dataclass
class Explanation:
    """Of one record."""

    partition: int
    offset: int
    record: str = ""
    fate: str = ""  # one of FATES, or the Reason of a dead letter
    letter: bool | None = None  # whether it has one; None: it needs none
    counted: dict[str, int] = field(default_factory=dict)  # what the join counted when it took it
    organic: bool = False
    open: bool = False  # the step waits for what follows it
    following: int | None = None  # offset of the step that followed; None: none
    discount: float = 0.0
    slots: list[Slot] = field(default_factory=list)
    earned: list[Credit] = field(default_factory=list)  # what it earned, anywhere
    others: dict[int, str] = field(default_factory=dict)  # offset → ids, of the records that credits name
    blind: bool = False  # what was before is gone: this may not be the whole story

    @property
    def as_it_should_be(self) -> bool:
        """Replay does not contradict the log, and there is a letter where one is needed."""
        return self.letter is not False and all(map(_agrees, self.slots))

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        slots = [vars(s) | {"credits": [c._asdict() for c in s.credits]} for s in self.slots]
        earned = [credit._asdict() for credit in self.earned]
        return {**vars(self), "slots": slots, "earned": earned, "as_it_should_be": self.as_it_should_be}

    def as_text(self) -> str:
        """For people."""
        return "\n".join([self.record, *(f"  {line}" for line in self._lines())])

    def _lines(self) -> Iterator[str]:
        if self.blind:
            yield "what was before is no longer in the log: this may not be the whole story"
        if self.letter is None:
            yield FATES[self.fate]
        else:
            yield f"{self.fate}: {'its letter is there' if self.letter else 'AND THERE IS NO LETTER OF IT'}"
        for credit in self.earned:
            whose = self.others.get(credit.offset, "")
            when = "an amendment" if credit.amended else "before that became a transition"
            yield f"earned {credit.reward:+g} for offset {credit.offset} slot {credit.slot} ({whose}): {when}"
        if self.slots:
            kind = "organic step" if self.organic else "step"
            following = "the end of the visit" if self.following is None else f"offset {self.following}"
            rest = "is still open" if self.open else f"discount {self.discount:g}, followed by {following}"
            yield f"{kind} of {len(self.slots)} slots: {rest}"
        for slot in self.slots:
            held = "not in replay" if slot.held is None else f"replay has {slot.held:g}"
            wrong = "" if _agrees(slot) else "  <- DIFFERENT"
            yield f"slot {slot.slot} {slot.item!r}: reward {slot.reward:g}, {held}{wrong}"
            for credit in slot.credits:
                whose = self.others.get(credit.event, "")
                when = ", an amendment" if credit.amended else ""
                yield f"  {credit.reward:+g} by offset {credit.event} ({whose}){when}"


def _agrees(slot: Slot) -> bool:
    if slot.held is None:
        return True  # open, or it made room since: the audit of all counts those
    sizes = np.array(sum(abs(credit.reward) for credit in slot.credits))
    return bool(abs(slot.held - slot.reward) <= tolerance(sizes))


class Explainer:
    """Explains records by the newest checkpoint and the log."""

    def __init__(self, log: Log, codec: Codec, config: AuditConfig) -> None:
        """Raises: NothingToAudit, CheckpointDamaged."""
        self._log, self._codec = log, codec
        self._memory, self._topic, self._positions = checkpoint_of(config)

    def explain(self, what: str) -> list[Explanation]:
        """what: PARTITION/OFFSET, or an id. Raises: NothingToAudit where there is none such; LogError."""
        found = [self._explained(partition, offset) for partition, offset in self._places(what)]
        if not found:
            raise NothingToAudit(f"no record of {self._topic} that is still there has the id {what!r}")
        return found

    def _places(self, what: str) -> list[tuple[int, int]]:
        place = re.fullmatch(r"(\d+)/(\d+)", what)
        if place is None:
            return self._with_id(hash_string(what))
        partition, offset = int(place[1]), int(place[2])
        if partition not in self._positions:
            raise NothingToAudit(f"{self._topic} has no partition {partition} that the checkpoint knows")
        return [(partition, offset)]

    def _with_id(self, id: int) -> list[tuple[int, int]]:
        decoder = Decoder(self._codec, Vocabulary())
        places: list[tuple[int, int]] = []
        for partition, end in sorted(self._positions.items()):
            low = self._log.bounds(self._topic).get(partition, Bounds(0, 0)).low
            for batch in read_partition(self._log, self._topic, partition, low, end):
                for row in np.flatnonzero(decoder.decode(batch).id == np.uint64(id)).tolist():
                    places.append((partition, int(batch.offset[row])))
        return places[:MOST_RECORDS]

    def _explained(self, partition: int, offset: int) -> Explanation:
        told = Explanation(partition, offset)
        bounds = self._log.bounds(self._topic).get(partition, Bounds(0, 0))
        end = self._positions[partition]
        line = next(between(self._log, self._topic, {partition: offset}, {partition: offset + 1}), None) if (
            bounds.low <= offset < bounds.high
        ) else None  # fmt: skip
        told.record = f"{self._topic}/{partition}@{offset}"
        if line is not None:
            told.record = record_as_text(line, self._topic, self._codec)
        if offset >= end:
            told.fate = "unread"
        elif offset < bounds.low:
            told.fate = "gone"
        elif line is None:
            told.fate = "hole"
        else:
            self._retell(told, bounds.low, end)
            self._name_others(told)
        return told

    def _retell(self, told: Explanation, low: int, end: int) -> None:
        """Join the partition again, with an eye on this record."""
        memory = self._memory
        start, told.blind = first_offset(memory.journal, told.partition, low)
        story = Retelling(told.partition, start, memory.journal.told(told.partition), credits=True)
        decoder, unknown = Decoder(self._codec, memory.vocabulary), memory.journal.unknown(told.partition)
        rooms = memory.journal.rooms.get(told.partition, [])
        told.fate = "before" if told.offset < start else told.fate
        logged_ms = 0  # of the record
        for batch in read_partition(self._log, self._topic, told.partition, start, end):
            for row in rows_of(batch, decoder, unknown, rooms):
                if row.offset != told.offset:
                    story.take(row)
                    continue
                before, logged_ms = dict(story.join.counters), row.logged_ms
                story.take(row)
                after = story.join.counters
                told.counted = {
                    name: after[name] - before[name] for name in after if after[name] != before[name]
                }
                told.fate = "event" if row.kind == Kind.EVENT else "decision"
                if row.kind == Kind.BAD:
                    told.fate = row.reason.name
                elif "late" in told.counted:
                    told.fate = "LATE"
                elif "duplicates" in told.counted:
                    told.fate = "duplicate"
            self._listen(told, story)
        story.end()
        self._listen(told, story)
        for step in open_steps(story.join):
            if step.offset == told.offset:
                told.open, told.organic = True, step.organic
                told.slots += [self._slot(told, k, slot.item) for k, slot in enumerate(step.slots)]
        self._add_up(told)
        if told.fate not in FATES:
            told.letter = self._has_letter(told, logged_ms)

    def _listen(self, told: Explanation, story: Retelling) -> None:
        out = story.out
        for t in out.transitions:
            if t.offset == told.offset:
                told.organic, told.discount = t.organic, t.discount
                told.following = None if t.next_state is None else t.next_state.offset
                told.slots.append(self._slot(told, t.slot, t.action))
        assert out.credits is not None
        told.earned += [c for c in out.credits if c.event == told.offset or c.offset == told.offset]
        out.transitions, out.amendments, out.late, out.credits = [], [], [], []

    def _slot(self, told: Explanation, k: int, item: int) -> Slot:
        vocabulary, held = self._memory.vocabulary, self._memory.contents
        name = vocabulary.item_id(item) if 1 <= item <= len(vocabulary) else str(item)
        mine = (held.partition == told.partition) & (held.offset == told.offset) & (held.slot == k)
        rewards = held.reward[mine]
        return Slot(k, name, 0.0, float(rewards[0]) if len(rewards) else None)

    def _add_up(self, told: Explanation) -> None:
        by_slot = {slot.slot: slot for slot in told.slots}
        for credit in told.earned:
            if credit.offset == told.offset and credit.slot in by_slot:
                by_slot[credit.slot].credits.append(credit)
                by_slot[credit.slot].reward += credit.reward
        told.earned = [credit for credit in told.earned if credit.event == told.offset]

    def _name_others(self, told: Explanation) -> None:
        offsets = {c.event for slot in told.slots for c in slot.credits} | {c.offset for c in told.earned}
        for offset in sorted(offsets)[:MOST_RECORDS]:
            told.others[offset] = "no longer in the log"
            try:
                for batch in read_partition(self._log, self._topic, told.partition, offset, offset + 1):
                    told.others[offset] = ids_of(batch.value(0) or b"", self._codec)
            except OffsetOutOfRange:
                continue

    def _has_letter(self, told: Explanation, logged_ms: int) -> bool:
        wanted = Subject(told.partition, told.offset, logged_ms)
        topic = late_topic(self._topic) if told.fate == "LATE" else dlq_topic(self._topic)
        if not self._log.partitions(topic):
            return False
        for partition, bound in self._log.bounds(topic).items():
            for batch in read_partition(self._log, topic, partition, bound.low, bound.high):
                for i in range(len(batch)):
                    if subject(batch.value(i), self._codec, self._topic) == wanted:
                        return True
        return False
