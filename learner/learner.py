"""The learner's mind: records in, weights out, and all of its memory in one snapshot. It knows no clock, log or disk.

    learner = Learner(LearnerSettings(), AgentSettings(), JoinSettings(), codec, partitions=8)
    learner.assign({0: 0, 1: 0, 2: 0, 3: 0})
    taken = learner.take(batch)        # records → columns → transitions → replay
    learner.train(most=10)             # replay → gradient, as far as the band allows

One thread owns it. What it becomes depends on the records, in order, and on how many updates were made between them,
on nothing else: so a learner restored from a snapshot goes on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from learner.agent import Agent, Update
from learner.agent_settings import AgentSettings
from learner.checkpoint import Keep, Later, Part
from learner.journal import Journal
from learner.pacing import Band
from learner.policy import described_in
from learner.replay import Batch, Replay, empty_batch
from learner.weights import Meta
from streaming.arena import Empty
from streaming.catalog import Catalog
from streaming.columns import Columns, Kind, Reason
from streaming.decoder import Decoder
from streaming.interning import Vocabulary
from streaming.join_settings import JoinSettings
from streaming.join_tables import whole
from streaming.joiner import Joiner, JoinerError
from streaming.log import RecordBatch
from streaming.schemas import Codec, SchemaError, frame_of
from streaming.transitions import Joined, Rejects

STATE_FORMAT: Final = 14
READABLE_FORMATS: Final = (13, STATE_FORMAT)


class CannotContinue(Exception):
    """A checkpoint does not fit the flags that this learner was started with; the message says which and what to do."""


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LearnerSettings:
    """Replay, pace, and how many items there may be."""

    replay_capacity: int = _setting(
        1_000_000, "transitions kept, the oldest go first; transitions, 2..1073741824"
    )
    prioritised: bool = _setting(
        True, "draw transitions by their TD error and --chosen-share, else uniformly"
    )
    priority_alpha: float = _setting(0.0, "how far priorities count; 0..1, 0: uniform")
    priority_beta: float = _setting(1.0, "how far importance weights undo how rows are drawn; 0..1")
    chosen_share: float = _setting(
        0.25, "least share of a batch in which something was chosen from a slate; 0..1, 1 excluded"
    )
    max_items: int = _setting(
        10_000_000,
        "items known, for good: each takes 2 kB of memory and of a checkpoint, 1 kB of a version of the weights; what "
        "comes later is the unknown item; items, 1..1073741824",
    )
    min_replay: int = _setting(1000, "transitions before the first update; >= 1")
    updates_low: float = _setting(0.0, "fewer updates per transition than this hold up reading; >= 0")
    updates_high: float = _setting(0.01, "no more updates per transition than this; > 0")
    updates_young: float = _setting(
        3.0, "times --updates-high, about, while few choices have been learnt from; 1..1000, 1: never more"
    )
    seed: int = _setting(0, "of weights and sampling; >= 0")

    def __post_init__(self) -> None:
        checks = {
            "replay_capacity": (2, 1 << 30),
            "priority_alpha": (0, 1),
            "priority_beta": (0, 1),
            "chosen_share": (0, 0.999999),
            "max_items": (1, 1 << 30),
            "min_replay": (1, 1 << 30),
            "updates_low": (0, 1e6),
            "updates_high": (1e-9, 1e6),
            "updates_young": (1, 1e3),
            "seed": (0, 2**63 - 1),
        }
        for name, (low, high) in checks.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be within {low}..{high}, not {getattr(self, name)}")
        if self.updates_low > self.updates_high:
            raise ValueError(
                f"updates_low={self.updates_low} must not exceed updates_high={self.updates_high}"
            )


class Taken(NamedTuple):
    """What came of a batch of records."""

    columns: Columns
    joined: Joined
    bad: Rejects  # rows that cannot be read
    inserted: int  # transitions that are new in replay


class Learner:
    """Everything that learns, and everything that must survive a restart but the offsets."""

    def __init__(
        self,
        settings: LearnerSettings,
        agent: AgentSettings,
        join: JoinSettings,
        codec: Codec,
        partitions: Callable[[], int] | int | None,
        device: str = "cpu",
    ) -> None:
        """partitions: of the topic, now; to find users whose producer hashes keys otherwise than we do."""
        self.settings = settings
        self._codec = codec
        if agent.batch_size > settings.replay_capacity:
            raise ValueError(
                f"batch_size {agent.batch_size} is above replay_capacity {settings.replay_capacity}: "
                "nothing would ever be learnt"
            )
        self.vocabulary = Vocabulary(settings.max_items)
        self.catalog = Catalog(codec, self.vocabulary)
        self.decoder = Decoder(codec, self.vocabulary, partitions)
        self.joiner = Joiner(join)
        self.journal = Journal()
        self.replay = Replay(
            settings.replay_capacity,
            agent.entries,
            prioritised=settings.prioritised,
            alpha=settings.priority_alpha,
            chosen_share=settings.chosen_share,
        )
        self.agent = Agent(agent, device, settings.seed)
        self.band = Band(
            settings.updates_low, settings.updates_high, settings.min_replay, settings.updates_young
        )
        self.rng = np.random.default_rng([settings.seed, 1])
        self.events_through_ms = 0  # newest event time taken in that the join's clocks believe; 0: none
        self.last: Update | None = None  # the update made last
        self.observe: Callable[[Joined, Agent], None] | None = None  # sees transitions before they are learnt
        self._batch: Batch = empty_batch(agent.batch_size, agent.entries)
        self._catalog_version = 0

    # --- records → replay

    def assign(self, positions: Mapping[int, int]) -> None:
        """Take these partitions too, from these offsets on; those already held keep what they know."""
        self.joiner.assign(positions)
        most = max(self.vocabulary.max_items, len(self.vocabulary))
        self.journal.begin(positions, self.joiner.settings, most)

    def take(self, batch: RecordBatch) -> Taken:
        """Records of `events`, each partition's in offset order, none left out or repeated.

        Raises: RegistryUnavailable when a schema cannot be asked for now; nothing was taken, try the same again.
        """
        columns = self.decoder.decode(batch)
        self._note_unknown(batch, columns)
        self._look_at_candidates(batch, columns)
        joined = self.joiner.push(columns)
        bad = np.flatnonzero(columns.kind == Kind.BAD)
        if len(bad) < len(columns.kind):
            newest = int(columns.timestamp_ms[columns.kind != Kind.BAD].max())
            # a clock that was wrongly ahead may have been put back, too
            self.events_through_ms = min(max(self.events_through_ms, newest), self.joiner.newest_ms())
        return Taken(columns, joined, Rejects(bad, columns.reason[bad]), self._remember(joined))

    def _note_unknown(self, batch: RecordBatch, columns: Columns) -> None:
        """For the audit: what cannot be read today may be readable tomorrow, and was not learnt from all the same."""
        if self.journal.lacks_schemas:
            partitions, first = np.unique(batch.partition, return_index=True)
            for partition, row in zip(partitions.tolist(), first.tolist(), strict=True):
                self.journal.read(partition, int(batch.offset[row]), self.decoder.knows)
        for row in np.flatnonzero(columns.reason == Reason.UNKNOWN_SCHEMA).tolist():
            frame = frame_of(batch, row)
            assert frame is not None  # else it would be a BAD_FRAME
            self.journal.unread(frame, int(batch.partition[row]), int(batch.offset[row]))

    def _look_at_candidates(self, batch: RecordBatch, columns: Columns) -> None:
        """Features that came with a request are those of the items shown, where the catalog says nothing of them."""
        told: dict[str, Mapping[str, Any]] = {}
        offered = []
        for row in np.flatnonzero(columns.candidates & (columns.kind == Kind.DECISION)).tolist():
            try:
                _, decision = self._codec.decode(batch.value(row) or b"")
            except SchemaError:  # a field that is not learnt from is damaged
                continue
            offered.append(len(decision["candidates"]))
            told |= {candidate.item_id: candidate._asdict() for candidate in described_in(decision)}
        if told:
            ids, items = self.catalog.described(list(told), list(told.values()))
            self.agent.grow(len(self.vocabulary))
            self.agent.describe(ids, items)
        self.agent.look_at_offers(int(np.count_nonzero(columns.kind == Kind.DECISION)), offered)

    def advance(self, due_ms: Mapping[int, int], positions: Mapping[int, int]) -> int:
        """Let event time pass in partitions that are idle; returns how many transitions that gave.

        positions: all records before these offsets were taken.
        """
        inserted = 0
        for partition, at_ms in sorted(due_ms.items()):
            before = self.joiner.clock(partition)
            inserted += self._remember(self.joiner.advance(partition, at_ms))
            only_went_on = self.joiner.clock(partition)._replace(through_ms=before.through_ms) == before
            since_ms = before.through_ms if only_went_on else None
            self.journal.let_pass(partition, positions[partition], at_ms, since_ms)
        return inserted

    def take_catalog(self, batch: RecordBatch) -> Rejects:
        """Records of `catalog`; returns those that cannot be used."""
        return self.catalog.apply(batch)

    def _remember(self, joined: Joined) -> int:
        self.agent.grow(len(self.vocabulary))
        self.agent.meet(joined.transitions.action)
        if self.observe is not None and len(joined.transitions.action):
            self.observe(joined, self.agent)
        self.agent.foretell(joined)
        return self.replay.insert(joined)

    # --- replay → weights

    @property
    def worth(self) -> int:
        """What the transitions so far are worth to the band."""
        return self.band.worth(self.replay.inserted, self.replay.chosen)

    @property
    def updates_left(self) -> int:
        """Updates that the band allows before the next transition comes; 0 also while replay holds too little."""
        if len(self.replay) < max(self.agent.settings.batch_size, 1):
            return 0
        return self.band.updates_left(self.worth, self.agent.updates)

    @property
    def may_read(self) -> bool:
        """Whether the band lets more transitions in; never False while training may not catch up."""
        return self.updates_left == 0 or self.band.may_ingest(self.worth, self.agent.updates)

    def train(self, most: int, enough: Callable[[], bool] = lambda: False) -> int:
        """At most so many updates, as many as the band allows, and no more once `enough` says so; returns the count."""
        self._look_at_catalog()
        due = min(most, self.updates_left)
        for done in range(due):
            if done and enough():
                return done
            self._update()
        return due

    def _update(self) -> None:
        agent = self.agent
        batch = self.replay.sample(
            agent.settings.batch_size,
            self.rng,
            self.settings.priority_beta,
            agent.settings.steps,
            agent.settings.gamma,
            out=self._batch,
            unaided=agent.unaided,
        )
        self.last = agent.update(batch, len(self.replay))
        self.replay.update_priorities(batch.index, self.last.td_error)

    def _look_at_catalog(self) -> None:
        if self.catalog.version != self._catalog_version:
            self._catalog_version = self.catalog.version
            self.agent.set_catalog(self.catalog)

    # --- the outside

    def meta(self, positions: Mapping[int, int], now_ms: int) -> Meta:
        """What the weight store should say of the weights as they are."""
        return Meta(
            step=self.agent.updates,
            last_target_sync_step=self.agent.last_target_sync_update,
            published_ms=now_ms,
            positions=dict(positions),
            events_through_ms=self.events_through_ms,
            transitions=self.replay.inserted,
            updates=self.agent.updates,
            settings=self.agent.shape(),
        )

    @property
    def _limits(self) -> list[float]:
        """What the band's counts hang on: choices that another capacity does not keep are worth nothing any more."""
        return [*self.band.settings, self.replay.capacity]

    def snapshot(self, since: int = 0, empty: Empty = np.empty) -> tuple[int, dict[str, Part | Keep]]:
        """(token, parts): all of its memory, as copies; the next call's `since` is the token, once this one is safe.

        empty: gives the room for most of it.
        """
        token, replay = self.replay.snapshot(since, empty)
        parts: dict[str, Part | Keep] = {
            "learner": {
                "format": STATE_FORMAT,
                "rng": self.rng.bit_generator.state,
                "band": self.band.state(),
                "limits": self._limits,
                "events_through_ms": self.events_through_ms,
                "catalog": self.catalog.met(),
            },
            "journal": self.journal.state(),
            "vocabulary": self.vocabulary.state(),
            "agent": self.agent.state(),
            **replay,
        }
        for partition in self.joiner.partitions:
            for name, piece in self.joiner.pieces(partition, empty).items():
                parts[f"joiner/{partition}{name}"] = Later(piece)
        return token, parts

    def restore(self, parts: Mapping[str, Part]) -> int:
        """Become what was snapshot; returns the token for the next snapshot's `since`.

        Raises: CannotContinue, naming the flag that does not fit.
        """
        state = parts["learner"]
        if state["format"] not in READABLE_FORMATS:
            raise CannotContinue(
                f"the checkpoint is of format {state['format']}, this version reads {READABLE_FORMATS}; "
                "use the version that wrote it, or an empty --data-dir"
            )
        entries, saved = self.agent.settings.entries, int(parts["replay/state"]["history_length"])
        if saved != entries:
            raise CannotContinue(
                f"the checkpoint's states have {saved} entries, and --history-length, or what follows from --gamma, "
                f"asks for {entries}; start with --history-length {saved}, or with an empty --data-dir"
            )
        try:
            self.journal.restore(parts["journal"])
            self.vocabulary.restore(parts["vocabulary"])
            self.agent.restore(parts["agent"])
            for partition, known in join_states(parts):
                self.joiner.restore(partition, known)
            token = self.replay.restore(parts)
        except (ValueError, JoinerError) as error:
            raise CannotContinue(
                f"the checkpoint does not fit these flags: {error}; start with those it was made with, "
                "or with an empty --data-dir"
            ) from error
        self.rng.bit_generator.state = state["rng"]
        self.events_through_ms = state["events_through_ms"]
        self.catalog.expect(state["catalog"])
        updates = self.agent.updates
        if state["limits"] == self._limits:
            self.band.restore(state["band"], self.worth, updates)
        elif updates:  # before the first there is no pace to change: it counts as a new learner does
            self.band.adjust(self.band.low, self.band.high, self.worth, updates)
        return token


def join_states(parts: Mapping[str, Part]) -> Iterator[tuple[int, dict[str, npt.NDArray[Any]]]]:
    """(partition, state of its join), one at a time, of a snapshot."""
    names = [name.removeprefix("joiner/") for name in parts if name.startswith("joiner/")]
    for partition in sorted({name.partition("/")[0] for name in names}, key=int):
        pieces = [name for name in names if name == partition or name.startswith(f"{partition}/")]
        yield (
            int(partition),
            whole({name.removeprefix(partition): parts[f"joiner/{name}"] for name in pieces}),
        )
