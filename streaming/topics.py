"""The topics of one shop: created where they are missing, and left as they are where they are not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from streaming.dead_letters import dlq_topic, late_topic
from streaming.log import Log, LogRefused, LogUnavailable, NotAllowed

_RETRY_S: Final = 1.0
_DAY_MS: Final = 86_400_000


@dataclass(frozen=True)
class TopicSettings:
    """New topics"""

    topic: str = field(default="events", metadata={"help": "events and decisions"})
    catalog: str = field(default="catalog", metadata={"help": "items; compacted"})
    partitions: int = field(
        default=8, metadata={"help": "of the topic of events: the most readers that can share it; 1..10000"}
    )
    retention_days: float | None = field(
        default=None, metadata={"help": "how long events are kept; days, > 0; none: the log's own default"}
    )
    dead_letter_days: float | None = field(
        default=30.0,
        metadata={"help": "how long dead letters are kept; days, > 0; none: the log's own default"},
    )

    def __post_init__(self) -> None:
        if not 1 <= self.partitions <= 10_000:
            raise ValueError(f"partitions must be within 1..10000, not {self.partitions}")
        for name in ("retention_days", "dead_letter_days"):
            days = getattr(self, name)
            if days is not None and not 0 < days <= 36_500:
                raise ValueError(f"{name} must be > 0 and at most 36500, or none, not {days}")
        for name in ("topic", "catalog"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if self.catalog in (self.topic, dlq_topic(self.topic), late_topic(self.topic)):
            raise ValueError(f"the catalog needs a topic of its own: {self.catalog!r} has another use")


class _Topic(NamedTuple):
    name: str
    partitions: int
    compacted: bool
    days: float | None


def create_topics(log: Log, settings: TopicSettings, grow: bool = False) -> Iterator[str]:
    """Make sure that all topics are there; a line on each, as it is done.

    grow: add partitions to a topic of events that has fewer than asked for. Its users then change partitions, and
    what was known of them stays behind: a topic that is there is otherwise left alone.
    Raises: LogUnavailable; LogError when the log refuses.
    """
    for topic in _topics(settings):
        have = log.partitions(topic.name)
        if have >= topic.partitions:
            yield f"{topic.name}: there, {_counted(have)}"
        elif have and not grow:
            yield f"{topic.name}: there, {_counted(have)}; --grow would make them {topic.partitions}"
        else:
            retention_ms = None if topic.days is None else round(topic.days * _DAY_MS)
            log.create_topic(
                topic.name, topic.partitions, compacted=topic.compacted, retention_ms=retention_ms
            )
            what = f"grown from {have} to" if have else "created,"
            yield f"{topic.name}: {what} {_counted(topic.partitions)}" + (
                ", compacted" if topic.compacted and not have else ""
            )


def wait_for(
    log: Log,
    timeout_s: float,
    tell: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return once the log answers. tell: gets one line if it does not at once.

    Raises: LogUnavailable when it does not within about timeout_s.
    """
    deadline = clock() + timeout_s
    told = False
    while True:
        try:
            log.partitions("events")
            return
        except NotAllowed:  # which is an answer, and "events" may be none of ours
            return
        except LogRefused:
            raise
        except LogUnavailable as error:
            if clock() >= deadline:
                raise LogUnavailable(f"{log.url} did not answer within {timeout_s:g} s: {error}") from error
        if not told:
            tell(f"waiting for {log.url} (at most {timeout_s:g} s)")
            told = True
        sleep(_RETRY_S)


def _topics(settings: TopicSettings) -> list[_Topic]:
    return [
        _Topic(settings.topic, settings.partitions, False, settings.retention_days),
        _Topic(settings.catalog, 1, True, None),
        _Topic(dlq_topic(settings.topic), 1, False, settings.dead_letter_days),
        _Topic(late_topic(settings.topic), 1, False, settings.dead_letter_days),
    ]


def _counted(partitions: int) -> str:
    return f"{partitions} partition{'s' if partitions > 1 else ''}"
