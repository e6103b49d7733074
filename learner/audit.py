"""Which events trained which weights, and whether any was lost or counted twice: asked of the log itself.

The newest checkpoint says how far each partition was read and what replay holds. The audit reads the log again, up to
there and no further, joins it with the plain joiner (`streaming/plain_joiner.py`, which shares no code with the
compiled one) under the settings that the checkpoint's journal names, and compares transition by transition. It only
reads, so the learner may run meanwhile; it holds one partition at a time.

Not compared: histories (the states' content) and propensities. Bytes are read by the decoder that the learner uses.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from learner.audit_report import MOST_NAMED, Difference, Differences, PartitionReport, Report, Version
from learner.checkpoint import Checkpoints, Loaded
from learner.journal import Journal
from learner.learner import READABLE_FORMATS, join_states
from learner.replay import Contents, Replay
from learner.retelling import Retelling, first_offset, open_steps, read_partition, rows_of
from learner.weights import WeightsError, WeightStore, store_url
from streaming.columns import Kind, Reason
from streaming.dead_letters import dlq_topic, late_topic
from streaming.decoder import Decoder
from streaming.interning import Vocabulary
from streaming.join_settings import COUNTERS
from streaming.log import Bounds, Log, LogUnavailable, OffsetOutOfRange, replaced
from streaming.plain_joiner import PlainPartition, Transition
from streaming.schemas import DEAD_LETTER, DECISION, EVENT, Codec, SchemaError

TRIES: Final = 5  # to read a partition while its beginning moves on
ROUNDED: Final = 2.0**-23  # twice what float32, as which rewards travel, takes from each, relative
LEAST_REWARD: Final = 2e-6  # nothing that is worth less is looked for
MOST_WANTED: Final = 1_000_000  # rows whose letters are looked for at once
SLOT_BITS: Final = 15  # of a key: offset << SLOT_BITS | slot


class NothingToAudit(Exception):
    """There is no checkpoint, or it is not one of this topic and version; the message says what to do."""


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class AuditConfig:
    """What to audit."""

    name: str = _setting("learner", "the learner's --name")
    data_dir: str = _setting(".bellwether/learner", "the learner's --data-dir", metavar="DIR")
    weights: str = _setting(
        ".bellwether/weights", "the learner's weight store", metavar="URL", parse=store_url
    )
    topic: str | None = _setting(
        None, "refuse a checkpoint of another topic than this", metavar="TOPIC", shown="the checkpoint's"
    )
    show: int = _setting(10, "differences described one by one; 0..1000")
    explain: str | None = _setting(
        None,
        "instead: what became of one record, given as PARTITION/OFFSET, or of all with this event_id or "
        "recommendation_id, and which events earned what",
        metavar="RECORD",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.show <= MOST_NAMED:
            raise ValueError(f"show must be within 0..{MOST_NAMED}, not {self.show}")


# --- the checkpoint --------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """What the audit needs of a checkpoint."""

    generation: int
    meta: Mapping[str, Any]
    journal: Journal
    vocabulary: Vocabulary
    joiner: dict[int, Mapping[str, Any]]  # state of each partition
    contents: Contents
    inserted: int
    missed: int


def load_memory(directory: Path) -> Memory:
    """The newest whole checkpoint. Raises: NothingToAudit, CheckpointDamaged."""
    if not directory.is_dir():
        raise NothingToAudit(f"there is no {directory}; give the learner's --data-dir and --name")

    def take(loaded: Loaded | None) -> Memory:
        if loaded is None:
            raise NothingToAudit(f"no checkpoint was ever completed in {directory}; wait for the first")
        wanted = ("learner", "journal", "vocabulary", "joiner/", "replay/")
        parts = {name: loaded.parts[name] for name in loaded.parts if name.startswith(wanted)}
        return _memory(loaded.generation, loaded.meta, parts)

    return Checkpoints(directory).read(take)


def checkpoint_of(config: AuditConfig) -> tuple[Memory, str, dict[int, int]]:
    """The newest checkpoint, its topic, and its offsets. Raises: NothingToAudit, CheckpointDamaged."""
    directory = Path(config.data_dir) / config.name
    memory = load_memory(directory)
    topic: str = memory.meta["topic"]
    if config.topic not in (None, topic):
        raise NothingToAudit(f"the checkpoint in {directory} is of topic {topic!r}, not {config.topic!r}")
    return memory, topic, {int(p): int(o) for p, o in memory.meta["positions"].items()}


def _memory(generation: int, meta: Mapping[str, Any], parts: Mapping[str, Any]) -> Memory:
    if parts["learner"]["format"] not in READABLE_FORMATS:
        raise NothingToAudit(
            f"the checkpoint is of format {parts['learner']['format']}, this version audits {READABLE_FORMATS}"
        )
    journal, vocabulary = Journal(), Vocabulary(max_items=1)  # what the learner gave no id has none here
    journal.restore(parts["journal"])
    vocabulary.restore(parts["vocabulary"])
    state = parts["replay/state"]
    replay = Replay(int(state["capacity"]), int(state["history_length"]), prioritised=False)
    replay.restore(parts)
    joins: dict[int, Mapping[str, Any]] = dict(join_states(parts))
    return Memory(
        generation, meta, journal, vocabulary, joins, replay.contents(), replay.inserted, replay.missed
    )


# --- replay against the log ------------------------------------------------------------------------------


def tolerance(sizes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """By how much a reward in replay may differ from what the log says. sizes: of all that it adds up, together.

    A refund leaves behind what rounding did to its purchase, and a click must be missed beside an order however large.

    >>> tolerance(np.array([0.0, 150_000.0])).round(6)
    array([2.0000e-06, 1.7881e-02])
    """
    return np.maximum(LEAST_REWARD, ROUNDED * sizes)


class _Held:
    """One partition's share of replay, and beside it what the log says that it should be."""

    def __init__(self, contents: Contents, partition: int, may_evict: bool) -> None:
        mine = np.flatnonzero(contents.partition == partition)
        keys = (contents.offset[mine] << SLOT_BITS) | contents.slot[mine]
        order = np.argsort(keys, kind="stable")
        self.keys: npt.NDArray[np.int64] = keys[order]
        columns: list[npt.NDArray[Any]] = [*contents]
        self.held = Contents(*(column[mine[order]] for column in columns))
        self.twice = np.zeros(len(keys), np.bool_)
        self.twice[1:] = self.keys[1:] == self.keys[:-1]
        self.seen = np.zeros(len(keys), np.bool_)
        columns = [*self.held]
        self.expected = Contents(*(np.zeros_like(column) for column in columns))
        self.sizes = np.zeros(len(keys))  # of the rewards that each adds up
        self.evicted = 0
        self.amended = np.zeros(len(keys), np.bool_)
        self._may_evict = may_evict  # of what comes first; once one is kept, all that follow must be

    def find(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where each key is; -1: nowhere."""
        if len(self.keys) == 0:
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at, -1)

    def expect(self, transitions: list[Transition]) -> list[Transition]:
        """The log gives these next; returns those that should be in replay and are not."""
        keys = np.array([t.offset << SLOT_BITS | t.slot for t in transitions], np.int64)
        at = self.find(keys)
        missing = np.flatnonzero(at < 0)
        there = np.flatnonzero(at >= 0)
        if self._may_evict:
            first = there[0] if len(there) else len(keys)
            self.evicted += int((missing < first).sum())
            missing = missing[missing > first]
            self._may_evict = len(there) == 0
        self.seen[at[there]] = True
        for name, column in zip(_COMPARED, zip(*map(_compared, transitions), strict=True), strict=True):
            target = getattr(self.expected, name)
            target[at[there]] = np.array(column, target.dtype)[there]
        self.sizes[at[there]] = np.abs(self.expected.reward[at[there]])
        return [transitions[i] for i in missing]

    def amend(self, amendments: list[tuple[int, int, int, float]]) -> None:
        """The log gives these rewards later."""
        at = self.find(np.array([o << SLOT_BITS | s for _, o, s, _ in amendments], np.int64))
        kept = np.flatnonzero(at >= 0)
        rewards = np.array([a[3] for a in amendments])[kept]
        np.add.at(self.expected.reward, at[kept], rewards)
        np.add.at(self.sizes, at[kept], np.abs(rewards))
        self.amended[at[kept]] = True


_COMPARED: Final = ("action", "reward", "discount", "next_offset", "organic", "policy_version")
_WORDS: Final = {"next_offset": "next step", "policy_version": "policy version"}


def _compared(t: Transition) -> tuple[Any, ...]:
    following = -1 if t.next_state is None else t.next_state.offset
    return t.action, t.reward, t.discount, following, t.organic, t.policy_version


def ids_of(value: bytes, codec: Codec) -> str:
    """Which record that is, as its ids tell it."""
    try:
        name, record = codec.decode(value)
    except SchemaError:
        return "unreadable"
    if name == DECISION:
        return f"decision {record['recommendation_id']!r} for user {record['user_id']!r}"
    if name == EVENT:
        return f"{record['name']} {record['event_id']!r} of user {record['user_id']!r}"
    return name


class Subject(NamedTuple):
    """Which record a letter is about. A topic that was deleted and made anew has offsets of before once more."""

    partition: int
    offset: int
    logged_ms: int  # the log's own time stamp


def subject(value: bytes | None, codec: Codec, topic: str) -> Subject | None:
    """Which record of the topic a letter is about; None: none."""
    try:
        name, letter = codec.decode(value or b"")
    except SchemaError:
        return None
    if name != DEAD_LETTER or letter["topic"] != topic:
        return None
    return Subject(letter["partition"], letter["offset"], letter["timestamp"])


class Places:
    """Offsets of one partition, in order, each with the log's time and a Reason: 18 bytes each, since there may be
    many."""

    def __init__(self) -> None:
        self._offset, self._logged_ms = array("q"), array("q")
        self._reason, self._seen = bytearray(), bytearray()

    def __len__(self) -> int:
        return len(self._offset)

    def add(self, offset: int, logged_ms: int, reason: Reason) -> None:
        """The next one."""
        self._offset.append(offset)
        self._logged_ms.append(logged_ms)
        self._reason.append(reason)
        self._seen.append(0)

    def find(self, offset: int, logged_ms: int) -> None:
        """This one, if it is among them, was found."""
        at = bisect_left(self._offset, offset)
        if at < len(self._offset) and (self._offset[at], self._logged_ms[at]) == (offset, logged_ms):
            self._seen[at] = 1

    def found(self) -> int:
        """How many were."""
        return sum(self._seen)

    def missing(self) -> Iterator[tuple[int, Reason]]:
        """Those that were not."""
        for offset, reason, seen in zip(self._offset, self._reason, self._seen, strict=True):
            if not seen:
                yield offset, Reason(reason)

    def count(self) -> dict[str, int]:
        """How many there are of each reason."""
        return {Reason(reason).name: count for reason, count in Counter(self._reason).most_common()}


class Wanted:
    """Rows that must have a letter."""

    def __init__(self) -> None:
        self.of: dict[int, Places] = {}

    def __len__(self) -> int:
        return sum(map(len, self.of.values()))

    def find(self, record: Subject) -> None:
        """There is a letter of this one."""
        if record.partition in self.of:
            self.of[record.partition].find(record.offset, record.logged_ms)


class Audit:
    """One audit; `run` does it."""

    def __init__(
        self, log: Log, codec: Codec, config: AuditConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """clock: monotonic seconds. Raises: NothingToAudit, CheckpointDamaged."""
        self._log, self._codec, self._config, self._clock = log, codec, config, clock
        self._directory = Path(config.data_dir) / config.name
        self._memory, self._topic, self._positions = checkpoint_of(config)
        self._found = Differences()
        self._wanted = {which: Wanted() for which in ("dlq", "late")}
        self._letters = {"dlq": 0, "late": 0, "unverified": 0}

    def run(self) -> Report:
        """Read the log and compare. Raises: LogError; NothingToAudit where the topic is not the checkpoint's."""
        began = self._clock()
        known, found = self._memory.meta.get("topic_id", ""), self._log.identity(self._topic)
        if known and found and known != found:
            raise NothingToAudit(f"{replaced(self._topic, known, found)}; the checkpoint is of the old one")
        memory = self._memory
        report = Report(
            str(self._directory),
            self._topic,
            memory.generation,
            memory.inserted,
            memory.missed,
            memory.meta["updates"],
        )
        for partition, end in sorted(self._positions.items()):
            report.partitions.append(self._judge(partition, end))
            if sum(map(len, self._wanted.values())) > MOST_WANTED:
                self._look_for_letters(report.partitions)
        strangers = ~np.isin(memory.contents.partition, list(self._positions))
        for i in np.flatnonzero(strangers).tolist():
            c = memory.contents
            self._add("invented", int(c.partition[i]), int(c.offset[i]), int(c.slot[i]), _NOT_READ)
        self._count_all(report)
        self._look_for_letters(report.partitions)
        for partition_report in report.partitions:
            report.bad.update(partition_report.reasons)
        report.letters = self._letters
        self._look_at_weights(report)
        report.differences = self._found.count
        report.named = [self._identified(d) for d in sorted(self._found.first)[: self._config.show]]
        report.took_s = self._clock() - began
        return report

    def _add(self, kind: str, partition: int, offset: int, slot: int, message: str) -> None:
        self._found.add(kind, partition, offset, slot, message)

    # --- one partition

    def _judge(self, partition: int, end: int) -> PartitionReport:
        """Read and compare; once more from the start where retention takes the log's beginning meanwhile."""
        for attempt in range(TRIES):
            bounds = self._log.bounds(self._topic).get(partition, Bounds(0, 0))
            before = sum(self._found.count.values())
            try:
                report = self._read(partition, bounds, end)
            except OffsetOutOfRange:
                if attempt == TRIES - 1:
                    raise
                continue
            report.differences = sum(self._found.count.values()) - before
            return report
        raise AssertionError("unreachable")

    def _read(self, partition: int, bounds: Bounds, end: int) -> PartitionReport:
        memory, journal = self._memory, self._memory.journal
        start, blind = first_offset(journal, partition, bounds.low)
        report = PartitionReport(partition, start, end, end if blind else start)
        report.gaps = journal.gaps.get(partition, [])
        report.stepped_over = journal.stepped_over.get(partition, 0)
        joined = Retelling(partition, start, journal.told(partition))
        may_evict = memory.inserted > len(memory.contents.offset)
        held = _Held(memory.contents, partition, may_evict)
        decoder = Decoder(self._codec, memory.vocabulary)
        unknown, rooms = journal.unknown(partition), journal.rooms.get(partition, [])
        bad, late = Places(), Places()
        told = Differences()  # not yet known to be of this reading: retention may cut it short

        def drain() -> None:
            out = joined.out
            for t in out.transitions:
                report.organic_transitions += t.organic
                if t.slot == 0:
                    report.organic += t.organic
                    report.decided += not t.organic
            report.transitions += len(out.transitions)
            report.amendments += len(out.amendments)
            for t in held.expect(out.transitions) if out.transitions else ():
                if t.offset >= report.verified_from:
                    told.add("lost", partition, t.offset, t.slot, _LOST)
            if out.amendments:
                held.amend(out.amendments)
            out.transitions, out.amendments, out.late = [], [], []

        for batch in read_partition(self._log, self._topic, partition, start, end):
            report.records += len(batch)
            for row in rows_of(batch, decoder, unknown, rooms):
                if row.kind == Kind.BAD:
                    bad.add(row.offset, row.logged_ms, row.reason)
                if blind and joined.sees():
                    blind, report.verified_from = False, row.offset
                if joined.take(row) and row.offset >= report.verified_from:
                    late.add(row.offset, row.logged_ms, Reason.LATE)
            drain()
        joined.end()
        drain()
        self._found.merge(told)
        self._wanted["dlq"].of[partition], self._wanted["late"].of[partition] = bad, late
        report.reasons = bad.count()
        self._fill(report, joined.join, held)
        if bounds.high < end:
            text = f"the log ends at offset {bounds.high}, the checkpoint has read to {end}: another log, or recreated"
            self._add("unexplained", partition, -1, -1, text)
        self._compare(report, joined.join, held)
        return report

    def _fill(self, report: PartitionReport, join: PlainPartition, held: _Held) -> None:
        for name in ("events", "decisions", "duplicates", "bad", "late"):
            setattr(report, name, join.counters[name])
        report.kept, report.evicted = len(held.keys), held.evicted
        report.amended = int(held.amended.sum())
        report.open = sum(len(step.slots) for step in open_steps(join))

    def _compare(self, report: PartitionReport, join: PlainPartition, held: _Held) -> None:
        partition = report.partition
        judged = held.held.offset >= report.verified_from
        report.unverified = int((~judged).sum())
        for i in np.flatnonzero(held.twice & judged).tolist():
            self._add("doubled", *self._place(held, i), "this transition is in replay twice")
        still_open = {step.offset for step in open_steps(join)}
        for i in np.flatnonzero(~held.seen & ~held.twice & judged).tolist():
            where = self._place(held, i)
            text = _NOT_READ if where[1] >= report.end else _UNEXPLAINED
            self._add("invented", *where, _STILL_OPEN if where[1] in still_open else text)
        known = np.flatnonzero(held.seen & judged)
        for name in _COMPARED:
            self._compare_column(name, held, known)
        if report.complete:
            self._compare_counters(partition, join)

    def _compare_column(self, name: str, held: _Held, known: npt.NDArray[np.int64]) -> None:
        mine, theirs = getattr(held.held, name)[known], getattr(held.expected, name)[known]
        differ = mine != theirs
        if name == "reward":
            differ = ~(np.abs(mine - theirs) <= tolerance(held.sizes[known]))
        word = _WORDS.get(name, name)
        for i in np.flatnonzero(differ).tolist():
            found, wanted = self._named(name, mine[i]), self._named(name, theirs[i])
            text = f"replay has {word} {found}, the log says {wanted}"
            self._add(word, *self._place(held, int(known[i])), text)

    def _compare_counters(self, partition: int, join: PlainPartition) -> None:
        """What the compiled joiner counted must be what happened, to the last one."""
        state = self._memory.joiner.get(partition)
        if state is None:
            return self._add("counter", partition, -1, -1, "the checkpoint has no join state of it")
        for name, mine in zip(COUNTERS, state["counters"].tolist(), strict=False):
            # the decoder's opinion, which depends on how many partitions there were at the time
            if name != "misplaced" and mine != join.counters[name]:
                text = f"the checkpoint counts {mine} {name}, the log gives {join.counters[name]}"
                self._add("counter", partition, -1, -1, text)
        mine_ms = int(state["clock.watermark_ms"][0])
        if join.high_ms is not None and mine_ms != join.watermark_ms:
            text = f"the checkpoint's watermark is {mine_ms}, the log gives {join.watermark_ms}"
            self._add("counter", partition, -1, -1, text)

    def _place(self, held: _Held, i: int) -> tuple[int, int, int]:
        return int(held.held.partition[i]), int(held.held.offset[i]), int(held.held.slot[i])

    def _named(self, name: str, value: Any) -> str:
        if name == "action" and 1 <= value <= len(self._memory.vocabulary):
            return repr(self._memory.vocabulary.item_id(int(value)))
        if name == "next_offset":
            return "none" if value < 0 else f"at offset {value}"
        return f"{value:g}" if isinstance(value, float | np.floating) else str(value)

    # --- all of them

    def _count_all(self, report: Report) -> None:
        """Of those that made room only the count is left to compare."""
        if not all(p.complete for p in report.partitions):
            return
        gone = report.inserted - len(self._memory.contents.offset)
        evicted = sum(p.evicted for p in report.partitions)
        if gone != evicted:
            text = f"replay says that {gone} older transitions made room, the log gives {evicted}"
            self._add("count", -1, -1, -1, text)

    def _look_for_letters(self, partitions: list[PartitionReport]) -> None:
        """Every bad row must be in the topic for dead letters, every late one in that for late ones, at least once.

        Those that were looked for are forgotten, so that their number does not matter.
        """
        by_number = {report.partition: report for report in partitions}
        for which, topic in (("dlq", dlq_topic(self._topic)), ("late", late_topic(self._topic))):
            wanted = self._wanted[which]
            whole = self._find(topic, wanted) if len(wanted) else True
            for partition, places in sorted(wanted.of.items()):
                found = places.found()
                by_number[partition].letters[which] = found
                self._letters[which] += found
                if not whole:
                    self._letters["unverified"] += len(places) - found
                    continue
                before = sum(self._found.count.values())
                for offset, reason in places.missing():
                    text = f"{reason.name}, and {topic} has no letter of it"
                    self._add("no letter", partition, offset, -1, text)
                by_number[partition].differences += sum(self._found.count.values()) - before
            wanted.of.clear()

    def _find(self, topic: str, wanted: Wanted) -> bool:
        """Mark those that a letter is about; returns whether the topic has all letters ever written."""
        if not self._log.partitions(topic):
            return True
        bounds = self._log.bounds(topic)
        for partition, bound in bounds.items():
            for batch in read_partition(self._log, topic, partition, bound.low, bound.high):
                for i in range(len(batch)):
                    if (record := subject(batch.value(i), self._codec, self._topic)) is not None:
                        wanted.find(record)
        return all(bound.low == 0 for bound in bounds.values())

    def _look_at_weights(self, report: Report) -> None:
        """The newest version whose events were all audited, and those that labels name."""
        try:
            store = WeightStore(self._config.weights)
            labels = {label: store.latest(label) for label in ("stable", "canary")}
            named = {version for version in labels.values() if version is not None}
            for version in sorted({*store.versions(), *named}, reverse=True):
                if version not in named and any(v.covered for v in report.weights):
                    continue
                manifest = store.manifest(version)
                covered = all(self._positions.get(p, 0) >= o for p, o in manifest.positions.items())
                mine = [label for label, at in labels.items() if at == version]
                if mine or covered:
                    where = dict(sorted(manifest.positions.items()))
                    report.weights.append(Version(version, mine, where, manifest.updates, covered))
        except (WeightsError, OSError, ValueError) as error:
            report.weights_error = str(error)

    def _identified(self, difference: Difference) -> Difference:
        """With the ids of its record, where the log still has it."""
        if difference.offset < 0:
            return difference
        partition, offset = difference.partition, difference.offset
        try:
            for batch in read_partition(self._log, self._topic, partition, offset, offset + 1):
                return replace(difference, record=ids_of(batch.value(0) or b"", self._codec))
        except (OffsetOutOfRange, LogUnavailable):
            pass
        return replace(difference, record="no longer in the log")


_LOST: Final = "the log gives this transition, replay lacks it"
_NOT_READ: Final = "replay holds a transition of a record that the checkpoint has not read"
_UNEXPLAINED: Final = "replay holds a transition that the log does not give"
_STILL_OPEN: Final = "replay holds a transition whose step is still open"
