"""What an audit found: for each partition, in all, and each difference by name; as text and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from learner.journal import Gap
from streaming.dead_letters import dlq_topic, late_topic

MOST_NAMED: Final = 1000  # differences described one by one; all are counted


@dataclass(frozen=True, order=True)
class Difference:
    """One thing that is not as the log says it must be."""

    partition: int  # -1: of no one partition
    offset: int  # of the record that opened the step; -1: of no one record
    slot: int  # -1: of no one slot
    kind: str
    message: str
    record: str = ""  # which record that is, as its ids tell it

    def __str__(self) -> str:
        where = "" if self.partition < 0 else f"partition {self.partition}"
        where += "" if self.offset < 0 else f" offset {self.offset}"
        where += "" if self.slot < 0 else f" slot {self.slot}"
        return (
            f"{self.kind}: {where}{' ' * bool(where)}{f'({self.record}) ' * bool(self.record)}{self.message}"
        )


class Differences:
    """All are counted, the first MOST_NAMED kept."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.first: list[Difference] = []

    def merge(self, others: Differences) -> None:
        """Note these too."""
        self.count.update(others.count)
        self.first += others.first[: MOST_NAMED - len(self.first)]

    def add(self, kind: str, partition: int, offset: int, slot: int, message: str) -> None:
        """Note one."""
        self.count[kind] += 1
        if len(self.first) < MOST_NAMED:
            self.first.append(Difference(partition, offset, slot, kind, message))


@dataclass
class PartitionReport:
    """What the log says of one partition, and how replay compares."""

    partition: int
    start: int  # first offset that was read again
    end: int  # the checkpoint has read all before
    verified_from: int  # steps of records before this offset cannot be judged: the log's beginning is gone
    records: int = 0
    events: int = 0
    decisions: int = 0
    duplicates: int = 0
    bad: int = 0
    late: int = 0
    transitions: int = 0  # that the log gives
    amendments: int = 0
    kept: int = 0  # in replay
    evicted: int = 0  # went in, and made room since
    open: int = 0  # slots of steps that wait for what follows them
    unverified: int = 0  # in replay, of steps that cannot be judged
    differences: int = 0
    gaps: list[Gap] = field(default_factory=list)  # stepped over on purpose, the newest last
    stepped_over: int = 0  # offsets in all such gaps
    decided: int = 0  # decisions that became transitions
    organic: int = 0  # organic steps that did
    organic_transitions: int = 0  # and how many those became
    amended: int = 0  # transitions in replay that later rewards changed
    reasons: dict[str, int] = field(default_factory=dict)  # bad rows, by Reason
    letters: dict[str, int] = field(default_factory=dict)  # dlq, late: rows of it that have a letter there

    @property
    def complete(self) -> bool:
        """The log still has all that was ever read of it."""
        return self.verified_from <= self.start


class Version(NamedTuple):
    """A version of the weights."""

    version: int
    labels: list[str]
    positions: dict[int, int]
    updates: int
    covered: bool  # by the checkpoint: what these weights have seen was audited


@dataclass
class Report:
    """The audit's result."""

    directory: str
    topic: str
    generation: int
    inserted: int  # transitions that ever went into replay
    missed: int  # later rewards whose transitions had made room by then
    updates: int
    partitions: list[PartitionReport] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)  # rows, by Reason
    letters: dict[str, int] = field(default_factory=dict)  # dlq, late: rows found there; unverified: not
    weights: list[Version] = field(default_factory=list)
    weights_error: str = ""
    differences: Counter[str] = field(default_factory=Counter)
    named: list[Difference] = field(default_factory=list)  # the first of them
    took_s: float = 0.0

    @property
    def clean(self) -> bool:
        """Nothing was lost, nothing counted twice, as far as the log still tells."""
        return not self.differences

    @property
    def records(self) -> int:
        """Read again."""
        return sum(p.records for p in self.partitions)


# --- shown -----------------------------------------------------------------------------------------------

_TABLE: Final = (
    *("partition", "from", "to", "events", "decisions", "duplicates", "bad", "late", "transitions"),
    *("amendments", "kept", "evicted", "open", "unverified", "differences"),
)


def as_json(report: Report) -> dict[str, Any]:
    """All of it, as JSON values."""
    return {
        "clean": report.clean,
        "checkpoint": {
            "directory": report.directory,
            "generation": report.generation,
            "topic": report.topic,
            "transitions": report.inserted,
            "missed": report.missed,
            "updates": report.updates,
        },
        "partitions": [{**vars(p), "complete": p.complete} for p in report.partitions],
        "bad": dict(report.bad),
        "letters": report.letters,
        "weights": [v._asdict() for v in report.weights],
        "weights_error": report.weights_error,
        "differences": dict(report.differences),
        "first": [vars(d) for d in report.named],
        "records": report.records,
        "took_s": round(report.took_s, 3),
        "records_per_s": round(report.records / max(report.took_s, 1e-9)),
    }


def as_text(report: Report) -> str:
    """For people."""
    lines = [
        f"checkpoint {report.generation} in {report.directory}: topic {report.topic!r}, "
        f"{report.inserted:,} transitions, {report.updates:,} updates",
        *_table(report.partitions),
        *map(_became, report.partitions),
        *(_stepped_over(p) for p in report.partitions if p.stepped_over),
        *(_unverified(p) for p in report.partitions if not p.complete),
        *([_missed(report.missed)] if report.missed else []),
        *_letters_text(report),
        *_weights_text(report),
        f"{report.records:,} records in {report.took_s:.1f} s, "
        f"{report.records / max(report.took_s, 1e-9):,.0f} records/s",
        *(str(difference) for difference in report.named),
    ]
    total = sum(report.differences.values())
    counted = ", ".join(f"{count:,} {kind}" for kind, count in report.differences.most_common())
    return "\n".join([*lines, "clean" if report.clean else f"{total:,} DIFFERENCES: {counted}"])


def _table(partitions: list[PartitionReport]) -> list[str]:
    cells = [
        [p.partition, p.start, p.end, p.events, p.decisions, p.duplicates, p.bad, p.late, p.transitions,
         p.amendments, p.kept, p.evicted, p.open, p.unverified, p.differences]
        for p in partitions
    ]  # fmt: skip
    totals = [f"{sum(row[k] for row in cells):,}" for k in range(3, len(_TABLE))]
    numbers = [[f"{cell:,}" for cell in row] for row in cells]
    shown = [list(_TABLE), *numbers, ["all", "", "", *totals]]
    widths = [max(len(row[k]) for row in shown) for k in range(len(_TABLE))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in shown]


def _stepped_over(p: PartitionReport) -> str:
    last = p.gaps[-1]
    return (
        f"partition {p.partition}: {p.stepped_over:,} offsets were gone before they were read and were stepped over "
        f"on purpose (--on-gap), last {last.start} to {last.end - 1}; nothing was learnt from them"
    )


def _became(p: PartitionReport) -> str:
    decided = p.transitions - p.organic_transitions
    parts = [
        f"partition {p.partition}: {p.decided:,} of {p.decisions:,} decisions became {decided:,} transitions",
        f"{p.organic:,} organic steps {p.organic_transitions:,}",
        f"{p.amendments:,} later rewards, in {p.amended:,} transitions of replay",
    ]
    for rows, where in ((p.reasons, "dlq"), ({"LATE": p.late} if p.late else {}, "late")):
        if rows:
            why = ", ".join(f"{count:,} {reason}" for reason, count in rows.items())
            parts.append(f"{where}: {why} ({p.letters.get(where, 0):,} letters found)")
    return "; ".join(parts)


def _missed(count: int) -> str:
    return (
        f"{count:,} later rewards came after their transitions had made room in replay, and were not learnt from; "
        "a larger --replay-capacity keeps these for longer"
    )


def _unverified(p: PartitionReport) -> str:
    judged = "nothing" if p.verified_from >= p.end else f"steps from offset {p.verified_from} on"
    return (
        f"partition {p.partition}: what was before offset {p.start} is no longer there to be verified; "
        f"judged: {judged}; {p.unverified:,} transitions in replay are older than that"
    )


def _letters_text(report: Report) -> Iterator[str]:
    bad, late = sum(report.bad.values()), sum(p.late for p in report.partitions)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.bad.most_common())
    if bad:
        yield f"bad rows: {bad:,} ({reasons}), {report.letters['dlq']:,} found in {dlq_topic(report.topic)}"
    if late:
        yield f"late rows: {late:,}, {report.letters['late']:,} found in {late_topic(report.topic)}"
    if report.letters["unverified"]:
        yield f"letters that may have gone by retention: {report.letters['unverified']:,}"


def _weights_text(report: Report) -> Iterator[str]:
    if report.weights_error:
        yield f"weights: {report.weights_error}"
    elif not report.weights:
        yield "weights: none published"
    for v in report.weights:
        labels = f" ({', '.join(v.labels)})" if v.labels else ""
        offsets = " ".join(f"{partition}:{offset}" for partition, offset in v.positions.items())
        if v.covered:
            yield f"weights: version {v.version}{labels} was trained on everything before offsets {offsets}"
        else:
            yield (
                f"weights: version {v.version}{labels} has seen more than this checkpoint, all before "
                f"offsets {offsets}: audit again after the next one"
            )
