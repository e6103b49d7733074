"""Offsets that were gone from the log before they were read: stop, or step over them, as the operator has decided.

A learner that steps over a gap keeps what its join knows: ids seen (a copy of an event from before the gap still counts
once), users, steps. A visit that was under way ends by inactivity, or goes on with the first step seen after the gap.
What the records in it were worth is lost; how many they were is counted, and noted in the journal for the audit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from learner.journal import Gap
from learner.learner import CannotContinue
from streaming.log import Bounds

OnGap: TypeAlias = Literal["stop", "earliest", "latest"]


def gaps_at(
    topic: str, position: Mapping[int, int], bounds: Mapping[int, Bounds], on_gap: OnGap
) -> dict[int, Gap]:
    """What to step over, by partition, so that reading can go on; empty where every position is in the log.

    Raises: CannotContinue where the operator has not allowed it, or where the log ends before a position.
    """
    found = {}
    for partition, offset in sorted(position.items()):
        low, high = bounds.get(partition, Bounds(0, 0))
        if offset > high:
            raise CannotContinue(
                f"reading has come to offset {offset} of {topic}/{partition}, which ends at {high}: another log, "
                "or the topic was recreated, or brokers lost its end. Start with an empty --data-dir"
            )
        if offset < low:
            found[partition] = Gap(offset, low if on_gap == "earliest" else high)
    if found and on_gap == "stop":
        partition, gap = next(iter(found.items()))
        raise CannotContinue(
            f"{topic}/{partition} begins at offset {bounds[partition].low}, but {gap.start} is next to be read: "
            f"retention took {bounds[partition].low - gap.start:,} offsets before they were"
            f"{'' if len(found) == 1 else f' (and those of {len(found) - 1} more partitions)'}. "
            "To go on without them, from the oldest that are kept, start with --on-gap earliest; or start with an "
            "empty --data-dir. Then make the topic's retention longer than the longest outage"
        )
    return found
