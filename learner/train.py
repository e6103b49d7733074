"""The training loop: poll, decode, join, learn, publish, checkpoint; for ever, or until the log is read.

One thread does it all, in turns of a tenth of a second: what is slow (disk, weight store, asking the log how
much there is) runs beside it. `Trainer.run` names every step once.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from learner.catalog_feed import CatalogFeed
from learner.checkpoint import CheckpointFailed, Checkpoints, CheckpointWriter, PartsGone
from learner.fence import Fence
from learner.gaps import gaps_at
from learner.intake import Arrivals, Intake, Source
from learner.learner import CannotContinue, Learner, Taken
from learner.metrics import Metrics
from learner.misplaced import Misplaced
from learner.progress import Totals
from learner.publishing import PublishFailed, WeightPublisher
from learner.watch import LogWatch
from learner.weights import WeightStore, store_url
from streaming.arena import Arena
from streaming.columns import Reason
from streaming.dead_letters import DeadLetters
from streaming.idle import IdleClock
from streaming.log import (
    LogError,
    LogUnavailable,
    OffsetOutOfRange,
    RecordBatch,
    TopicReplaced,
    replaced,
)

logger = logging.getLogger(__name__)

TURN_S: Final = 0.1  # updates in a row before the log is looked at again
PATIENCE_S: Final = 0.05  # longest wait for records while there is nothing to train on
# What took long comes again only after so many times as long: a large shop's versions and checkpoints do.
BUSY: Final = 20  # of the time that copying it held up the loop
WORK: Final = 10  # of the CPU time that publishing it took beside the loop
SELDOM: Final = 5  # but a checkpoint at most so many times as seldom as asked for,
SELDOM_S: Final = 5.0  # and a version after so long, or as asked for if that is longer
RETRY_S: Final = 0.5  # between two tries to reach what cannot be reached
LETTERS_S: Final = 1.0  # that a checkpoint waits for dead letters, and training with it
LETTERS_RETRY_S: Final = 5.0  # until it tries again
ANY_NUMBER: Final = 1 << 62
_NO_LAST: Final = (
    "ended without a last checkpoint; the one before is intact, and a new start goes on from there"
)
_BEGIN_ANEW: Final = "Point --log at the old one, or start with an empty --data-dir"


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class TrainConfig:
    """The learner."""

    topic: str = _setting("events", "topic with events and decisions")
    catalog_topic: str = _setting("catalog", "topic with the items; it need not be there")
    name: str = _setting(
        "learner", "a second learner with this name and --data-dir takes over from the first"
    )
    data_dir: str = _setting(".bellwether/learner", "directory of the checkpoints", metavar="DIR")
    weights: str = _setting(
        ".bellwether/weights",
        "weight store to publish to: a directory, or any fsspec URL (s3://...)",
        metavar="URL",
        parse=store_url,
    )
    start: Literal["earliest", "latest"] = _setting("earliest", "where a learner without a checkpoint begins")
    on_gap: Literal["stop", "earliest", "latest"] = _setting(
        "stop",
        "where retention took offsets before they were read: stop, or go on from the earliest record that is kept, "
        "or from the latest",
    )
    until_caught_up: bool = _setting(False, "end once everything that is in the log now was learnt from")
    deterministic: bool = _setting(
        False,
        "same log, same weights, bit for bit, restarts included: batches cut by offset, updates tied to transitions, "
        "the catalog as it stands at the start; needs --device cpu. Time stands still in a quiet partition: its "
        "visits do not end, and the others wait for its next chunk. For --until-caught-up, or logs that go on",
    )
    chunk: int = _setting(1000, "offsets in one batch where --deterministic; 1..1000000")
    poll_records: int = _setting(20_000, "most records in one batch elsewhere; 1..1000000")
    device: str = _setting("cpu", "cpu, cuda or cuda:N")
    threads: int = _setting(1, "CPU threads of a gradient step; 1..256")
    publish_s: float = _setting(
        0.25,
        "seconds between two versions of the weights; more where publishing takes over a tenth of a core; 0.05..3600",
    )
    keep_versions: int = _setting(20, "newest versions kept in the weight store; 1..1000")
    checkpoint_s: float = _setting(10.0, "seconds between two checkpoints; 0.1..86400")
    keep_checkpoints: int = _setting(3, "newest checkpoints kept; 1..1000")
    give_up_after_s: float = _setting(
        3600.0, "end once every checkpoint has failed for so long; s, 1..604800, 0: never"
    )
    idle_s: float = _setting(
        60.0, "silence after which a partition no longer holds up event time; s, 1..86400"
    )
    metrics_port: int = _setting(0, "Prometheus port; 0: none, 1..65535")
    prequential: str | None = _setting(
        None,
        "rank each next item before learning it, and write how well that went here (JSON)",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        for name, low, high in (
            ("chunk", 1, 1_000_000),
            ("poll_records", 1, 1_000_000),
            ("threads", 1, 256),
            ("publish_s", 0.05, 3600),
            ("keep_versions", 1, 1000),
            ("checkpoint_s", 0.1, 86_400),
            ("keep_checkpoints", 1, 1000),
            ("idle_s", 1, 86_400),
            ("metrics_port", 0, 65_535),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be within {low}..{high}, not {getattr(self, name)}")
        if self.give_up_after_s != 0 and not 1 <= self.give_up_after_s <= 604_800:
            raise ValueError(f"give_up_after_s must be 0 or within 1..604800, not {self.give_up_after_s}")
        if self.deterministic and self.device != "cpu":
            raise ValueError(f"deterministic needs device cpu, not {self.device!r}")
        if self.deterministic and self.on_gap != "stop":
            raise ValueError(
                f"deterministic needs on_gap stop, not {self.on_gap!r}: what retention took is another log"
            )


class Trainer:
    """Drives one learner over one topic."""

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        source: Source,
        *,
        until: Mapping[int, int] | None,
        watch: LogWatch,
        catalog: CatalogFeed,
        letters: DeadLetters,
        misplaced: Misplaced,
        checkpoints: CheckpointWriter,
        publisher: WeightPublisher,
        metrics: Metrics,
        clock: Callable[[], float],
        now_ms: Callable[[], int],
        since: int = 0,
        topic_id: str = "",
        live: Iterable[int] = (),
    ) -> None:
        """until: ends before these offsets; None: never. clock: monotonic seconds. now_ms: wall clock. since: the
        token of the snapshot that the learner was restored from. topic_id: identity of the topic that source reads.
        live: see `IdleClock`."""
        self._config, self._learner, self._source, self._until = config, learner, source, until
        self._watch, self._catalog, self._letters, self._misplaced = watch, catalog, letters, misplaced
        self._checkpoints, self._publisher, self._metrics = checkpoints, publisher, metrics
        self._clock, self._now_ms, self._topic_id = clock, now_ms, topic_id
        self._idle = IdleClock(config.idle_s, live)
        self._arena = Arena()
        self._intake = Intake(learner, source, letters, self._note)
        self._records = self._late = self._bad = 0
        self._learnt = dict(source.position())  # the weights have seen all before these offsets
        self._published: tuple[object, ...] = ()
        self._safe = since  # token of the newest snapshot on disk
        # of the one being written: token, offsets, when it was begun
        self._saving: tuple[int, dict[int, int], float] | None = None
        self._failing_s: float | None = None  # when the first of the checkpoints failed that all failed since
        now = clock()
        self._due = dict.fromkeys(("publish", "checkpoint", "look", "retry", "unpark"), now)
        self._due["checkpoint"] += config.checkpoint_s
        self._last_error = ""
        metrics.updates.inc(0)

    # --- the loop

    def run(self, stop: threading.Event, tell: Callable[[float], None]) -> None:
        """Until `stop`, or the end of what is to be read; then a last version and a last checkpoint.

        tell: called each turn with the time. Raises: LogError where the log is at fault for good (missing topics,
        refused letters); CannotContinue at a gap; CheckpointFailed where that lasted too long, or the last one failed;
        Fenced; WeightsError when training has diverged.
        """
        while not stop.is_set() and not self._finished():
            self._read()
            self._train()
            self._publish()
            self._checkpoint()
            self._look_around()
            tell(self._clock())
        self._end()

    def totals(self) -> Totals:
        """Where things stand."""
        learner, last = self._learner, self._learner.last
        return Totals(
            self._clock(),
            self._records,
            learner.replay.inserted,
            learner.agent.updates,
            sum(self._watch.lag(self._intake.position()).values()),
            math.nan if last is None else last.loss,
            math.nan if last is None else last.mean_q,
            self._publisher.version,
            sum(learner.journal.stepped_over.values()),
            self._waiting(),
            late=self._late,
            unreadable=self._bad,
        )

    def _finished(self) -> bool:
        until = self._until
        if until is None or not self._intake.whole or self._learner.updates_left > 0:
            return False
        position = self._intake.position()
        return all(position[p] >= offset for p, offset in until.items())

    def _waiting(self) -> str:
        if self._last_error:
            return self._last_error
        if self._intake.parked:
            return f"the registry cannot be asked: partitions {self._intake.parked} wait"
        learner = self._learner
        reason = learner.band.reason(learner.worth, learner.agent.updates)
        return "" if "training waits for new" in reason else reason

    # --- records → replay

    def _read(self) -> None:
        """One batch, all the way into replay. What cannot be reached is tried again: training goes on meanwhile."""
        now = self._clock()
        if not self._learner.may_read:
            return
        patience_s = 0.0 if self._learner.updates_left else PATIENCE_S
        if now < self._due["retry"]:
            time.sleep(patience_s)
            return
        try:
            if self._intake.parked and now >= self._due["unpark"]:
                self._due["unpark"] = now + RETRY_S
                self._intake.retry()
            self._next(patience_s)
            self._last_error = ""
        except LogUnavailable as error:
            if not self._last_error:
                logger.warning("%s; trying again", error)
            self._last_error = "the log cannot be reached"
            self._metrics.log_errors.inc()
            self._due["retry"] = now + RETRY_S

    def _next(self, patience_s: float) -> None:
        try:
            self._intake.read(patience_s)
        except OffsetOutOfRange as error:
            self._step_over(error)
        except TopicReplaced as error:
            raise CannotContinue(f"{error}. {_BEGIN_ANEW}") from error

    def _step_over(self, error: OffsetOutOfRange) -> None:
        """Go on behind what is gone, if that is allowed. Raises: CannotContinue, LogUnavailable."""
        source, position = self._source, self._source.position()
        found = gaps_at(self._config.topic, position, self._watch.ask(), self._config.on_gap)
        if not isinstance(source, Arrivals):
            raise error
        if not found:
            logger.warning("%s; it does hold it, so it is asked again", error)
        for p, gap in found.items():
            logger.warning(
                "%s/%d: offsets %d to %d (%d of them) were gone before they were read; going on without them",
                *(self._config.topic, p, gap.start, gap.end - 1, gap.end - gap.start),
            )
            self._learner.journal.step_over(p, gap.start, gap.end)
            self._metrics.gaps.labels(str(p)).inc(gap.end - gap.start)
        source.seek(position | {p: gap.end for p, gap in found.items()})

    def _note(self, batch: RecordBatch, taken: Taken) -> None:
        """What came of a batch, for clocks and counters."""
        self._idle.heard(batch, taken.columns, self._clock())
        self._misplaced.look(batch, taken.columns)
        self._records += len(batch)
        self._late += len(taken.joined.late.reason)
        self._bad += len(taken.bad.reason)
        self._metrics.records.inc(len(batch))
        self._metrics.transitions.inc(taken.inserted)
        self._metrics.amendments.inc(len(taken.joined.amendments.reward))
        for rejects in (taken.bad, taken.joined.late):
            for reason in rejects.reason.tolist():
                self._metrics.dead_letters.labels(Reason(reason).name).inc()

    # --- replay → weights

    def _train(self) -> None:
        """As many updates as the band allows; where time matters, no longer than a turn."""
        learner = self._learner
        if self._config.deterministic:
            done = learner.train(ANY_NUMBER)
        else:
            end = self._clock() + TURN_S
            done = learner.train(ANY_NUMBER, lambda: self._clock() >= end)
        self._metrics.updates.inc(done)
        if done or learner.updates_left == 0:
            self._learnt = self._intake.position()

    def _publish(self) -> None:
        """A new version now and then, if anything is new. Nothing before the first update."""
        try:
            if self._publisher.finished() is not None:
                self._metrics.version.set(self._publisher.version)
                self._metrics.publish_seconds.set(self._publisher.took_s)
        except PublishFailed as error:
            logger.warning("%s; trying again", error)
            self._published = ()
        now = self._clock()
        if now >= self._due["publish"] and not self._publisher.busy:
            self._start_publishing()
            held_s, every_s = self._clock() - now, self._config.publish_s
            pause_s = max(every_s, BUSY * held_s, WORK * self._publisher.worked_s)
            self._due["publish"] = now + min(pause_s, max(every_s, SELDOM_S))

    def _start_publishing(self) -> None:
        learner = self._learner
        what = (learner.agent.updates, tuple(self._learnt.items()), learner.catalog.version)
        if learner.agent.updates and what != self._published:
            self._published = what
            meta = learner.meta(self._learnt, self._now_ms())
            self._publisher.start(learner.agent.tensors(), meta)

    # --- memory → disk

    def _checkpoint(self) -> None:
        """Now and then; a failure leaves the last good one, is said, and tried again."""
        self._collect()
        now = self._clock()
        if now >= self._due["checkpoint"] and not self._checkpoints.busy and self._intake.whole:
            begun = self._start_checkpoint()
            held_s, every_s = self._clock() - now, self._config.checkpoint_s
            pause_s = (
                min(max(every_s, BUSY * held_s), SELDOM * every_s) if begun else held_s + LETTERS_RETRY_S
            )
            self._due["checkpoint"] = now + pause_s

    def _start_checkpoint(self, patience_s: float = LETTERS_S) -> bool:
        """Whether it has begun. patience_s: how long to wait for dead letters to be durable."""
        try:
            self._letters.flush(patience_s)  # what a checkpoint counts as read must be somewhere
        except LogUnavailable as error:
            logger.warning("no checkpoint now: %s", error)
            return False
        position = self._intake.position()
        self._arena.reset()  # the writer is done with what was there
        token, parts = self._learner.snapshot(self._safe, self._arena.empty)
        learner = self._learner
        meta = {
            "topic": self._config.topic,
            "topic_id": self._topic_id,
            "positions": {str(p): offset for p, offset in sorted(position.items())},
            "turn": self._source.turn,
            "live": self._idle.live,
            "transitions": learner.replay.inserted,
            "updates": learner.agent.updates,
            "items": len(learner.vocabulary),
            "joined": learner.joiner.counters(),
            "written_ms": self._now_ms(),
        }
        self._saving = (token, position, self._clock())
        self._checkpoints.start(parts, meta)
        return True

    def _collect(self, timeout_s: float = 0.0) -> bool:
        """Take note of a checkpoint that has become safe; True if one has."""
        try:
            if self._checkpoints.finished(timeout_s) is None:
                return False
        except CheckpointFailed as error:
            if isinstance(error, PartsGone):
                self._safe = 0  # the next one is of everything
            self._metrics.checkpoint_failures.inc()
            self._bear(error)
            return False
        self._failing_s = None
        assert self._saving is not None  # a checkpoint that has finished was started
        self._safe, position, began_s = self._saving
        self._watch.safe(position)
        self._metrics.checkpoint_age.set(self._now_ms() / 1000)
        self._metrics.checkpoint_seconds.set(self._clock() - began_s)
        return True

    def _bear(self, error: CheckpointFailed) -> None:
        """Train on without a checkpoint, but not for ever: a crash would cost all of that work."""
        now, patience_s = self._clock(), self._config.give_up_after_s
        self._failing_s = now if self._failing_s is None else self._failing_s
        failing_s = now - self._failing_s
        if patience_s and failing_s >= patience_s:
            raise CheckpointFailed(
                f"every checkpoint of the last {failing_s:.0f} s has failed (--give-up-after-s {patience_s:g}): "
                f"{error}. Make room, or mend the disk, and start again: it goes on from there"
            ) from error
        logger.error("%s; training goes on", error)

    # --- housekeeping

    def _look_around(self) -> None:
        """Once a second: new partitions, idle ones, the catalog, gauges."""
        now = self._clock()
        if now < self._due["look"]:
            return
        self._due["look"] = now + 1.0
        if not self._config.deterministic:
            try:
                self._catalog.follow(self._watch.bounds_beside, now)
            except LogError as error:
                logger.warning("catalog: %s; trying again", error)
            self._take_up_partitions()
            self._let_time_pass()
        self._show()

    def _take_up_partitions(self) -> None:
        """Those that were added to the topic meanwhile, from 0 on: what retention has taken of them is a gap."""
        position, source = self._source.position(), self._source
        added = {p: 0 for p in self._watch.bounds if p not in position}
        if added and self._until is None and isinstance(source, Arrivals):
            logger.info("partitions %s were added to %s: reading them too", sorted(added), self._config.topic)
            self._learner.assign(added)
            source.add(added)

    def _let_time_pass(self) -> None:
        asked_s = self._watch.asked_s  # before what it says is read: it asks meanwhile
        joiner, position = self._learner.joiner, self._intake.position()
        watermarks = {p: joiner.watermark_ms(p) for p in joiner.partitions}
        # what is parked is there and not read, whatever the last look at the log said
        lag = self._watch.lag(position) | dict.fromkeys(self._intake.parked, 1)
        doubted = [partition for partition in joiner.partitions if joiner.may_be_put_back(partition)]
        due = self._idle.due(watermarks, lag, asked_s, doubted)
        if due:
            self._metrics.transitions.inc(self._learner.advance(due, position))

    def _show(self) -> None:
        learner, metrics, last = self._learner, self._metrics, self._learner.last
        for what, count in learner.joiner.counters().items():
            metrics.joined.labels(what).set(count)
        for partition, lag in self._watch.lag(self._intake.position()).items():
            metrics.lag.labels(str(partition)).set(lag)
        metrics.parked.set(len(self._intake.parked))
        metrics.replay_transitions.set(len(learner.replay))
        metrics.amendments_missed.set(learner.replay.missed)
        metrics.event_time.set(learner.events_through_ms / 1000)
        metrics.catalog_refused.set(self._catalog.refused)
        metrics.items.set(len(learner.vocabulary))
        metrics.items_refused.set(learner.vocabulary.refused)
        metrics.updates_per_transition.set(learner.agent.updates / max(1, learner.replay.inserted))
        metrics.updates_left.set(learner.updates_left)
        metrics.stalled.labels("reading").set(not learner.may_read)
        metrics.stalled.labels("training").set(learner.updates_left == 0)
        if last is not None:
            metrics.loss.set(last.loss)
            metrics.mean_q.set(last.mean_q)
            metrics.q_spread.set(last.q_spread)
            metrics.foretold_scale.set(float(learner.agent.online.stack.weights[1]))

    def _end(self) -> None:
        """A last version and a last checkpoint, waited for. Raises: CheckpointFailed where there is no last one."""
        while self._publisher.busy:
            self._settle_publishing()
        self._start_publishing()
        while self._publisher.busy:
            self._settle_publishing()
        while self._checkpoints.busy:
            self._collect(60.0)
        if not self._intake.whole:
            raise CheckpointFailed(f"records or dead letters of theirs wait: {_NO_LAST}")
        if not self._start_checkpoint(30.0):
            raise CheckpointFailed(f"dead letters could not be written: {_NO_LAST}")
        if not self._collect(600.0):
            raise CheckpointFailed(f"it could not be written: {_NO_LAST}")
        self._show()
        if self._finished() and not self._learner.agent.updates:
            self._own_up()

    def _own_up(self) -> None:
        """Say that all was read and nothing learnt, and from how many transitions on something is."""
        band = self._learner.band
        logger.warning(
            "nothing was learnt, and there are no weights: the log gave %d transitions, and the first update comes "
            "after about %d (--min-replay %d, and one for each %g by --updates-high)",
            *(self._learner.replay.inserted, band.min_replay + math.ceil(1 / band.high)),
            *(band.min_replay, 1 / band.high),
        )

    def _settle_publishing(self) -> None:
        try:
            self._publisher.finished(60.0)
        except PublishFailed as error:
            logger.error("%s", error)


def open_checkpoints(config: TrainConfig) -> Checkpoints:
    """Those of the name, to be read until it is claimed. Raises: OSError."""
    return Checkpoints(Path(config.data_dir) / config.name, keep=config.keep_checkpoints)


def claim(config: TrainConfig, owner: str, checkpoints: Checkpoints) -> WeightStore:
    """Claim the name: checkpoints and weights are written under that claim from now on. Raises: ValueError, OSError."""
    # claims may be lost, or not be in a backup, where what was written under them is not
    above = max(checkpoints.epoch(), WeightStore(config.weights).epoch())
    checkpoints.fence = Fence(config.data_dir, config.name, owner, above)
    return WeightStore(config.weights, config.keep_versions, checkpoints.fence)


def offsets_to_start(
    config: TrainConfig, saved: Mapping[str, Any] | None, bounds: Mapping[int, Any], topic_id: str = ""
) -> dict[int, int]:
    """Where to read each partition from: the checkpoint's offsets, else the beginning (or, as told, the end).

    A partition that the checkpoint does not know was added since, and is read from 0 on: where retention has taken
    its first records, that is a gap.
    topic_id: the topic's identity; empty: not known, as in checkpoints of before it was kept.
    Raises: CannotContinue when the checkpoint is of another topic, or ahead of what the log ever held.
    """
    known = {} if saved is None else {int(p): int(o) for p, o in saved["positions"].items()}
    if saved is not None and saved["topic"] != config.topic:
        raise CannotContinue(
            f"the checkpoint in {config.data_dir} is of topic {saved['topic']!r}, not {config.topic!r}; "
            "give each topic a --name or --data-dir of its own"
        )
    known_id = "" if saved is None else saved.get("topic_id", "")
    if known_id and topic_id and known_id != topic_id:
        raise CannotContinue(f"{replaced(config.topic, known_id, topic_id)}. {_BEGIN_ANEW}")
    for p, offset in known.items():
        if p not in bounds or offset > bounds[p].high:
            holds = f"ends at {bounds[p].high}" if p in bounds else "is not there"
            raise CannotContinue(
                f"the checkpoint was read to offset {offset} of {config.topic}/{p}, which {holds}: another log, "
                f"or the topic was recreated. {_BEGIN_ANEW}"
            )
    if saved is not None:
        return {p: known.get(p, 0) for p in sorted(bounds)}
    return {p: b.high if config.start == "latest" else b.low for p, b in sorted(bounds.items())}
