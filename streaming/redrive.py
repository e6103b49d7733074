"""Dead letters that can be used by now go back into the topic they came from.

A letter is judged by the decoder that the learner uses, and its record goes back as it was: same bytes, same key.
So its event keeps its id, and one that is put back twice (a crash, `again`) counts once: a copy within the dedup
window is a duplicate, and an older one is late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from streaming.columns import Kind, Reason
from streaming.decoder import Decoder
from streaming.interning import Vocabulary
from streaming.log import Bounds, Log, LogFull, LogUnavailable, Producer, RecordBatch
from streaming.schemas import DEAD_LETTER, DECISION, EVENT, Codec, SchemaError
from streaming.tail import records_between

GROUP: Final = "bellwether-redrive"  # its committed offsets tell how far letters were dealt with


@dataclass
class Redriven:
    """What came of the letters of one topic."""

    earlier: int = 0  # offsets that are kept, and that a run before this one has been through
    letters: int = 0
    put_back: int = 0
    unusable: Counter[str] = field(default_factory=Counter)  # why the others stay

    def __str__(self) -> str:
        kept = ", ".join(f"{count:,} {reason}" for reason, count in self.unusable.most_common())
        return (
            f"{self.letters:,} letters read, {self.put_back:,} put back"
            + (f"; stay: {kept}" if kept else "")
            + (f"; {self.earlier:,} were read before: --again reads those, too" if self.earlier else "")
        )


class _Letter(NamedTuple):
    key: bytes | None
    value: bytes


def redrive(
    log: Log, codec: Codec, topic: str, letters: str, *, dry_run: bool = False, again: bool = False
) -> Redriven:
    """Put back what can be used of the topic `letters`, up to where it ends now, and remember how far that was.

    topic: where the records came from, and go to. dry_run: writes and remembers nothing. again: from the first
    letter that is still there, not from where the last time ended: for letters that stayed then.
    Raises: RegistryUnavailable; LogError when they cannot be written; what was done until then is remembered.
    """
    done = Redriven()
    bounds = log.bounds(letters)
    starts = {p: b.low for p, b in bounds.items()} if again else _starts(log, letters, bounds)
    done.earlier = sum(start - bounds[p].low for p, start in starts.items())
    ends = {p: b.high for p, b in bounds.items()}
    producer = log.producer()
    try:
        for batch in records_between(log, letters, starts, ends):
            usable = _usable(_letters(batch, codec, topic, done), codec, topic, done)
            done.put_back += len(usable)
            if not dry_run:
                _put_back(usable, producer, topic)
                log.commit(GROUP, letters, _reached(batch))
    finally:
        producer.close()
    return done


def waiting(log: Log, letters: str) -> int:
    """How many offsets `redrive` has not been through yet."""
    bounds = log.bounds(letters)
    return sum(bounds[p].high - start for p, start in _starts(log, letters, bounds).items())


def _starts(log: Log, letters: str, bounds: Mapping[int, Bounds]) -> dict[int, int]:
    """Where to go on; from the first letter that is there where that offset is none of the topic's (any more)."""
    before = log.committed(GROUP, letters)
    starts = {p: before.get(p, b.low) for p, b in bounds.items()}
    return {
        p: start if bounds[p].low <= start <= bounds[p].high else bounds[p].low for p, start in starts.items()
    }


def _letters(batch: RecordBatch, codec: Codec, topic: str, done: Redriven) -> Iterator[_Letter]:
    """The records within the letters, those at least that are whole and came from `topic`."""
    for i in range(len(batch)):
        done.letters += 1
        try:
            name, letter = codec.decode(batch.value(i) or b"")
        except SchemaError:
            name, letter = "", {}
        if name != DEAD_LETTER:
            done.unusable["no letter"] += 1
        elif letter["topic"] != topic:
            done.unusable[f"from {letter['topic']}"] += 1
        elif "," in letter["reason"]:
            done.unusable["cut short"] += 1
        else:
            yield _Letter(letter["key"], letter["value"] or b"")


def _usable(
    letters: Iterator[_Letter], codec: Codec, topic: str, done: Redriven
) -> list[tuple[bytes, bytes]]:
    """(key, value) of the records that the learner could read today."""
    candidates = list(letters)
    columns = Decoder(codec, Vocabulary()).decode(_as_batch(candidates))
    usable = []
    for letter, kind, reason in zip(candidates, columns.kind, columns.reason, strict=True):
        if kind == Kind.BAD:
            done.unusable[Reason(reason).name] += 1
        else:
            usable.append((letter.key or _user_of(letter.value, codec), letter.value))
    return usable


def _as_batch(letters: list[_Letter]) -> RecordBatch:
    count = len(letters)
    return RecordBatch(
        partition=np.zeros(count, np.int32),
        offset=np.arange(count, dtype=np.int64),
        timestamp_ms=np.zeros(count, np.int64),
        data=np.frombuffer(b"".join(letter.value for letter in letters), np.uint8),
        bounds=np.cumsum([0, *(len(letter.value) for letter in letters)]).astype(np.int64),
        null=np.zeros(count, np.bool_),
        keys=None,
    )


def _user_of(value: bytes, codec: Codec) -> bytes:
    """The key that a record of `events` has."""
    name, record = codec.decode(value)
    assert name in (EVENT, DECISION)
    return str(record["user_id"]).encode()


def _put_back(usable: list[tuple[bytes, bytes]], producer: Producer, topic: str) -> None:
    for key, value in usable:
        while True:
            try:
                producer.send(topic, key, value)
                break
            except LogFull:
                producer.flush(1.0)
    if left := producer.flush():
        raise LogUnavailable(f"{left} records were not written to {topic} in time; run it again")


def _reached(batch: RecordBatch) -> Mapping[int, int]:
    """Next offset of each partition in the batch."""
    return {int(p): int(batch.offset[batch.partition == p][-1]) + 1 for p in np.unique(batch.partition)}
