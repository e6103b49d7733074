"""Which events trained which weights, and whether any was lost or counted twice: asked of the log itself.

The newest checkpoint says how far each partition was read and what replay holds. The audit reads the log again, up to
there and no further, joins it with the plain joiner (`streaming/plain_joiner.py`, which shares no code with the
compiled one) under the settings that the checkpoint's journal names, and compares transition by transition. It only
reads, so the learner may run meanwhile; it holds one partition at a time.

Not compared: histories (the states' content) and propensities. Bytes are read by the decoder that the learner uses.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from learner.audit_report import MOST_NAMED, Difference, Differences, PartitionReport, Report, Version
from learner.checkpoint import CheckpointDamaged, Checkpoints, Disk
from learner.journal import Journal, Told
from learner.learner import STATE_FORMAT
from learner.replay import Contents, Replay
from learner.weights import WeightsError, WeightStore
from streaming.chunks import rows
from streaming.columns import Columns, Kind, Reason
from streaming.dead_letters import dlq_topic, late_topic
from streaming.decoder import Decoder
from streaming.interning import Vocabulary
from streaming.join_settings import COUNTERS, JoinSettings
from streaming.log import Bounds, Log, LogUnavailable, OffsetOutOfRange, RecordBatch
from streaming.plain_joiner import Line, Output, PlainPartition, Row, Transition
from streaming.rewards import EVENT_NAMES
from streaming.schemas import DEAD_LETTER, DECISION, EVENT, Codec, SchemaError

POLL_RECORDS: Final = 5000
POLL_S: Final = 1.0
QUIET_S: Final = (
    10.0  # with nothing more to read, a partition is believed to end: what is missing then is reported
)
TRIES: Final = 5  # to load a checkpoint, or to read a partition, while they move on
REWARD_TOLERANCE: Final = 1e-4  # relative: replay adds up numbers that travelled as float32
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
    weights: str = _setting(".bellwether/weights", "the learner's weight store", metavar="URL")
    topic: str | None = _setting(
        None, "refuse a checkpoint of another topic than this", metavar="TOPIC", shown="the checkpoint's"
    )
    show: int = _setting(10, "differences described one by one; 0..1000")

    def __post_init__(self) -> None:
        if not 0 <= self.show <= MOST_NAMED:
            raise ValueError(f"show must be within 0..{MOST_NAMED}, not {self.show}")


# --- the checkpoint --------------------------------------------------------------------------------------


class _ReadOnly(Disk):
    """A damaged part is the learner's to put aside."""

    def rename(self, source: Path, target: Path) -> None:
        """Leave it."""


class Memory(NamedTuple):
    """What the audit needs of a checkpoint."""

    generation: int
    meta: Mapping[str, Any]
    journal: Journal
    vocabulary: Vocabulary
    joiner: dict[int, Mapping[str, Any]]  # state of each partition
    contents: Contents
    inserted: int


def load_memory(directory: Path) -> Memory:
    """The newest whole checkpoint. Raises: NothingToAudit, CheckpointDamaged."""
    if not directory.is_dir():
        raise NothingToAudit(f"there is no {directory}; give the learner's --data-dir and --name")
    for attempt in range(TRIES):
        try:
            loaded = Checkpoints(directory, disk=_ReadOnly()).load()
            if loaded is None:
                raise NothingToAudit(f"no checkpoint was ever completed in {directory}; wait for the first")
            wanted = ("learner", "journal", "vocabulary", "joiner/", "replay/")
            parts = {name: loaded.parts[name] for name in loaded.parts if name.startswith(wanted)}
        except (FileNotFoundError, CheckpointDamaged):
            if attempt == TRIES - 1:
                raise
            time.sleep(0.2)  # the learner has written newer ones meanwhile, and dropped this one
            continue
        return _memory(loaded.generation, loaded.meta, parts)
    raise AssertionError("unreachable")


def _memory(generation: int, meta: Mapping[str, Any], parts: Mapping[str, Any]) -> Memory:
    if parts["learner"]["format"] != STATE_FORMAT:
        raise NothingToAudit(
            f"the checkpoint is of format {parts['learner']['format']}, this version audits {STATE_FORMAT}"
        )
    journal, vocabulary = Journal(), Vocabulary()
    journal.restore(parts["journal"])
    vocabulary.restore(parts["vocabulary"])
    state = parts["replay/state"]
    replay = Replay(int(state["capacity"]), int(state["history_length"]), prioritised=False)
    replay.restore(parts)
    joiner = {
        int(name.removeprefix("joiner/")): part for name, part in parts.items() if name.startswith("joiner/")
    }
    return Memory(generation, meta, journal, vocabulary, joiner, replay.contents(), replay.inserted)


# --- the log, once more ----------------------------------------------------------------------------------


def read_partition(log: Log, topic: str, partition: int, start: int, end: int) -> Iterator[RecordBatch]:
    """The records start <= offset < end, in order. Raises: OffsetOutOfRange; LogUnavailable when it stays away."""
    if start >= end:
        return
    reader = log.reader(topic, {partition: start})
    quiet_s = 0.0
    try:
        while reader.position()[partition] < end and quiet_s < QUIET_S:
            batch = reader.poll(POLL_RECORDS, POLL_S)
            quiet_s = 0.0 if len(batch) else quiet_s + POLL_S
            inside = int(np.searchsorted(batch.offset, end))
            if inside:
                yield rows(batch, 0, inside)
    finally:
        reader.close()


def plain_rows(columns: Columns) -> list[Row]:
    """The columns row by row, without decisions' histories."""
    lists = {name: getattr(columns, name).tolist() for name in _ROW_COLUMNS}
    bounds, item = columns.item_bounds.tolist(), columns.item.tolist()
    quantity, price = columns.quantity.tolist(), columns.price.tolist()
    propensity = columns.propensity.tolist()
    plain = []
    for i, values in enumerate(zip(*lists.values(), strict=True)):
        kind, reason, partition, offset, id, user, at_ms, name, recommendation, value, version = values
        lines = tuple(
            Line(item[k], quantity[k], price[k], propensity[k]) for k in range(bounds[i], bounds[i + 1])
        )
        plain.append(
            Row(
                Kind(kind), id, user, at_ms, EVENT_NAMES[name], recommendation, value, lines, (), version,
                False, partition, offset, Reason(reason),
            )
        )  # fmt: skip
    return plain


_ROW_COLUMNS: Final = (
    *("kind", "reason", "partition", "offset", "id", "user", "timestamp_ms", "name"),
    *("recommendation", "value", "policy_version"),
)


class _Partition:
    """Joins one partition again, with all that its journal says was told in between."""

    def __init__(self, partition: int, start: int, told: Iterable[Told]) -> None:
        told = list(told)
        held = [t.settings for t in told if t.settings is not None]
        before = [t.settings for t in told if t.settings is not None and t.offset <= start]
        settings = before[-1] if before else held[0]
        self.out = Output()
        self.join = PlainPartition(partition, _without_history(settings), self.out)
        self._told = [t for t in told if t.offset > start]
        self._first_ms: int | None = None
        self._blind_ms = blind_ms(settings)

    def take(self, row: Row) -> None:
        """The next record, after what was told before it."""
        while self._told and self._told[0].offset <= row.offset:
            self._hear(self._told.pop(0))
        self.join.take(row)

    def end(self) -> None:
        """What was told after the last record."""
        while self._told:
            self._hear(self._told.pop(0))

    def sees(self) -> bool:
        """Whether nothing from before the first record matters any more; False before the first one."""
        if self._first_ms is None and self.join.high_ms is not None:
            self._first_ms = self.join.watermark_ms
        return self._first_ms is not None and self.join.watermark_ms - self._first_ms > self._blind_ms

    def _hear(self, told: Told) -> None:
        if told.settings is not None:
            self.join.adopt(_without_history(told.settings))
        elif told.watermark_ms is not None:
            self.join.advance(told.watermark_ms)


def _without_history(settings: JoinSettings) -> JoinSettings:
    return replace(settings, history_length=1)  # histories are not compared, and nothing else depends on it


def blind_ms(settings: JoinSettings) -> int:
    """For how long, in event time, a record can matter to what becomes of later ones."""
    longest_s = max(
        settings.attribution_window_s,
        2 * settings.dedup_window_s,
        settings.session_gap_s,
        settings.overtake_wait_s,
        settings.user_ttl_s if settings.horizon == "user" else 0,
    )
    return round((longest_s + settings.watermark_delay_s) * 1000)


# --- replay against the log ------------------------------------------------------------------------------


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
        self.evicted = 0
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
        return [transitions[i] for i in missing]

    def amend(self, amendments: list[tuple[int, int, int, float]]) -> None:
        """The log gives these rewards later."""
        at = self.find(np.array([o << SLOT_BITS | s for _, o, s, _ in amendments], np.int64))
        kept = np.flatnonzero(at >= 0)
        np.add.at(self.expected.reward, at[kept], np.array([a[3] for a in amendments])[kept])


_COMPARED: Final = ("action", "reward", "discount", "next_offset", "organic", "policy_version")
_WORDS: Final = {"next_offset": "next step", "policy_version": "policy version"}


def _compared(t: Transition) -> tuple[Any, ...]:
    following = -1 if t.next_state is None else t.next_state.offset
    return t.action, t.reward, t.discount, following, t.organic, t.policy_version


class Audit:
    """One audit; `run` does it."""

    def __init__(
        self, log: Log, codec: Codec, config: AuditConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """clock: monotonic seconds. Raises: NothingToAudit, CheckpointDamaged."""
        self._log, self._codec, self._config, self._clock = log, codec, config, clock
        self._directory = Path(config.data_dir) / config.name
        self._memory = load_memory(self._directory)
        self._topic: str = self._memory.meta["topic"]
        if config.topic not in (None, self._topic):
            raise NothingToAudit(
                f"the checkpoint in {self._directory} is of topic {self._topic!r}, not {config.topic!r}"
            )
        self._positions = {int(p): int(o) for p, o in self._memory.meta["positions"].items()}
        self._found = Differences()
        self._bad: dict[tuple[int, int], Reason] = {}
        self._late: set[tuple[int, int]] = set()

    def run(self) -> Report:
        """Read the log and compare. Raises: LogError."""
        began = self._clock()
        memory = self._memory
        report = Report(
            str(self._directory), self._topic, memory.generation, memory.inserted, memory.meta["updates"]
        )
        for partition, end in sorted(self._positions.items()):
            report.partitions.append(self._judge(partition, end))
        strangers = ~np.isin(memory.contents.partition, list(self._positions))
        for i in np.flatnonzero(strangers).tolist():
            c = memory.contents
            self._add("invented", int(c.partition[i]), int(c.offset[i]), int(c.slot[i]), _NOT_READ)
        self._count_all(report)
        report.bad = Counter(reason.name for reason in self._bad.values())
        report.letters = self._look_for_letters()
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
        began = journal.began.get(partition, 0)
        gaps = journal.gaps.get(partition, [])
        # whatever was stepped over is gone, but `--on-gap latest` left out records that may still be there
        start = max(bounds.low, began, journal.whole_from.get(partition, 0), *(gap.end for gap in gaps))
        blind = start > began  # some of what was read is gone, and with it what was known at `start`
        report = PartitionReport(partition, start, end, end if blind else start)
        report.gaps, report.stepped_over = gaps, journal.stepped_over.get(partition, 0)
        joined = _Partition(partition, start, journal.told(partition))
        may_evict = memory.inserted > len(memory.contents.offset)
        held = _Held(memory.contents, partition, may_evict)
        decoder = Decoder(self._codec, memory.vocabulary)
        bad: dict[tuple[int, int], Reason] = {}
        late: set[tuple[int, int]] = set()
        lost: list[Transition] = []

        def drain() -> None:
            out = joined.out
            report.transitions += len(out.transitions)
            report.amendments += len(out.amendments)
            late.update(out.late)
            if out.transitions:
                lost.extend(held.expect(out.transitions))
            if out.amendments:
                held.amend(out.amendments)
            out.transitions, out.amendments, out.late = [], [], []

        for batch in read_partition(self._log, self._topic, partition, start, end):
            report.records += len(batch)
            for row in plain_rows(decoder.decode(batch)):
                if row.kind == Kind.BAD:
                    bad[partition, row.offset] = row.reason
                if blind and joined.sees():
                    blind, report.verified_from = False, row.offset
                joined.take(row)
            drain()
        joined.end()
        drain()
        self._bad |= bad
        self._late |= {place for place in late if place[1] >= report.verified_from}
        self._fill(report, joined.join, held)
        if bounds.high < end:
            text = f"the log ends at offset {bounds.high}, the checkpoint has read to {end}: another log, or recreated"
            self._add("unexplained", partition, -1, -1, text)
        self._compare(report, joined.join, held, lost)
        return report

    def _fill(self, report: PartitionReport, join: PlainPartition, held: _Held) -> None:
        for name in ("events", "decisions", "duplicates", "bad", "late"):
            setattr(report, name, join.counters[name])
        report.kept, report.evicted = len(held.keys), held.evicted
        report.open = sum(len(step.slots) for step in _open_steps(join))

    def _compare(
        self, report: PartitionReport, join: PlainPartition, held: _Held, lost: list[Transition]
    ) -> None:
        partition = report.partition
        judged = held.held.offset >= report.verified_from
        report.unverified = int((~judged).sum())
        for t in lost:
            if t.offset >= report.verified_from:
                self._add(
                    "lost", partition, t.offset, t.slot, "the log gives this transition, replay lacks it"
                )
        for i in np.flatnonzero(held.twice & judged).tolist():
            self._add("doubled", *self._place(held, i), "this transition is in replay twice")
        still_open = {step.offset for step in _open_steps(join)}
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
        if name == "reward":
            differ = ~(np.abs(mine - theirs) <= REWARD_TOLERANCE * np.maximum(1.0, np.abs(theirs)))
        else:
            differ = mine != theirs
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

    def _look_for_letters(self) -> dict[str, int]:
        """Every bad row must be in the topic for dead letters, every late one in that for late ones, at least once."""
        found = {"dlq": 0, "late": 0, "unverified": 0}
        for which, topic, wanted in (
            ("dlq", dlq_topic(self._topic), {place: r.name for place, r in self._bad.items()}),
            ("late", late_topic(self._topic), dict.fromkeys(self._late, Reason.LATE.name)),
        ):
            if not wanted:
                continue
            missing, whole = self._without_letter(topic, wanted)
            found[which] = len(wanted) - len(missing)
            if not whole:
                found["unverified"] += len(missing)
                continue
            for partition, offset in sorted(missing):
                text = f"{wanted[partition, offset]}, and {topic} has no letter of it"
                self._add("no letter", partition, offset, -1, text)
        return found

    def _without_letter(
        self, topic: str, wanted: Mapping[tuple[int, int], str]
    ) -> tuple[set[tuple[int, int]], bool]:
        """Those of the places that no letter is about, and whether the topic has all letters ever written."""
        missing = set(wanted)
        if not self._log.partitions(topic):
            return missing, True
        bounds = self._log.bounds(topic)
        for partition, bound in bounds.items():
            for batch in read_partition(self._log, topic, partition, bound.low, bound.high):
                for i in range(len(batch)):
                    missing.discard(self._subject(batch.value(i)))
        return missing, all(bound.low == 0 for bound in bounds.values())

    def _subject(self, value: bytes | None) -> tuple[int, int]:
        """Which record of our topic a letter is about; (-1, -1): none."""
        try:
            name, letter = self._codec.decode(value or b"")
        except SchemaError:
            return -1, -1
        if name != DEAD_LETTER or letter["topic"] != self._topic:
            return -1, -1
        return letter["partition"], letter["offset"]

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
                return replace(difference, record=self._ids(batch.value(0) or b""))
        except (OffsetOutOfRange, LogUnavailable):
            pass
        return replace(difference, record="no longer in the log")

    def _ids(self, value: bytes) -> str:
        try:
            name, record = self._codec.decode(value)
        except SchemaError:
            return "unreadable"
        if name == DECISION:
            return f"decision {record['recommendation_id']!r} for user {record['user_id']!r}"
        if name == EVENT:
            return f"{record['name']} {record['event_id']!r} of user {record['user_id']!r}"
        return name


_NOT_READ: Final = "replay holds a transition of a record that the checkpoint has not read"
_UNEXPLAINED: Final = "replay holds a transition that the log does not give"
_STILL_OPEN: Final = "replay holds a transition whose step is still open"


def _open_steps(join: PlainPartition) -> Iterator[Any]:
    for user in join.users.values():
        yield from (step for step in (user.open_decision, user.open_organic) if step is not None)
