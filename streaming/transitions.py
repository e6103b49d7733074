"""The one transition type: what the joiner makes, the replay buffer keeps and the learner samples.

A *step* is a moment at which something was put before a user (a decision) or, with no recommender in
place, at which the user went somewhere unaided (organic). Its state is the history just before it. A step
with K slots gives K transitions, which share their state, next state and discount. A transition's identity is
(partition, offset, slot) of the record that opened the step; no other ever has it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class States(NamedTuple):
    """M states. Row i is the history before a step, newest entry FIRST, padded at the end with item 0.

    An entry with item 0 and name 0 is padding; one with item 0 and a name is an item not in the vocabulary.
    """

    partition: npt.NDArray[np.int32]  # [M] identity of the step that this is the state of
    offset: npt.NDArray[np.int64]  # [M]
    timestamp_ms: npt.NDArray[np.int64]  # [M] event time of the step
    item: npt.NDArray[np.int32]  # [M, H] vocabulary ids
    name: npt.NDArray[np.uint8]  # [M, H] event-name codes
    age_s: npt.NDArray[np.float32]  # [M, H] seconds before the step, >= 0
    value: npt.NDArray[np.float32]  # [M, H] price x quantity, 0 where unknown


class Transitions(NamedTuple):
    """T transitions; `state` and `next_state` are rows of the States that come with them."""

    partition: npt.NDArray[np.int32]  # [T] \
    offset: npt.NDArray[np.int64]  # [T]  > identity
    slot: npt.NDArray[np.int16]  # [T]   /
    state: npt.NDArray[np.int32]  # [T]
    next_state: npt.NDArray[np.int32]  # [T] -1 where the session ended
    action: npt.NDArray[np.int32]  # [T] vocabulary id of the item in the slot
    reward: npt.NDArray[np.float32]  # [T] earned so far; later rewards come as amendments
    discount: npt.NDArray[np.float32]  # [T] gamma, or 0 where the session ended
    propensity: npt.NDArray[np.float32]  # [T] of the behaviour policy; NaN for organic steps
    organic: npt.NDArray[np.bool_]  # [T] action = the item that the user went to unaided
    policy_version: npt.NDArray[np.int64]  # [T] -1 for organic steps


class Amendments(NamedTuple):
    """A rewards that came after their transition was made: add `reward` to it, in place, in this order."""

    partition: npt.NDArray[np.int32]  # [A]
    offset: npt.NDArray[np.int64]  # [A]
    slot: npt.NDArray[np.int16]  # [A]
    reward: npt.NDArray[np.float32]  # [A] signed


class Rejects(NamedTuple):
    """Records that could not be used, for events.dlq or events.late; each names a row of the batch pushed."""

    row: npt.NDArray[np.int64]  # [R] row of the Columns
    reason: npt.NDArray[np.uint8]  # [R] a streaming.columns.Reason


class Joined(NamedTuple):
    """All that one push gave. Apply transitions first, then amendments."""

    states: States
    transitions: Transitions
    amendments: Amendments
    late: Rejects
