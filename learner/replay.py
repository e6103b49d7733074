"""The replay buffer: what was seen, amended in place, sampled with n-step returns worked out at sampling."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Histories(NamedTuple):
    """B states: the history before a step, newest entry first, padded at the end with item 0 and name 0.

    Numbers are those of `streaming.transitions.States`. A next state behind a discount of 0 is all padding.
    """

    item: npt.NDArray[np.int32]  # [B, H] vocabulary ids; 0: padding, or an unknown item where name is set
    name: npt.NDArray[np.uint8]  # [B, H] event-name codes; 0: padding
    age_s: npt.NDArray[np.float32]  # [B, H] seconds before the step
    value: npt.NDArray[np.float32]  # [B, H] price x quantity, 0 where unknown


class Batch(NamedTuple):
    """B sampled transitions, ready for one update: target = reward + discount * max_a Q(next_state, a)."""

    state: Histories
    next_state: Histories  # where `reward` stops counting; padding where discount is 0
    action: npt.NDArray[np.int32]  # [B] vocabulary id of the item in the slot
    reward: npt.NDArray[
        np.float32
    ]  # [B] n-step: the slot's own + gamma * all that the next step earned + ...
    slot_reward: npt.NDArray[np.float32]  # [B] the slot's own reward alone (what n = 1 gives)
    discount: npt.NDArray[np.float32]  # [B] gamma**m after m <= n steps; 0 where the session ended among them
    weight: npt.NDArray[np.float32]  # [B] importance-sampling weight, at most 1; all 1 when uniform
    organic: npt.NDArray[np.bool_]  # [B] the user went to `action` unaided
    propensity: npt.NDArray[np.float32]  # [B] of the behaviour policy; NaN for organic steps
    policy_version: npt.NDArray[np.int64]  # [B] that made the decision; -1 for organic steps
    timestamp_ms: npt.NDArray[np.int64]  # [B] event time of `state`
    next_timestamp_ms: npt.NDArray[np.int64]  # [B] event time of `next_state`; 0 where discount is 0
    index: npt.NDArray[np.int64]  # type: ignore[assignment]  # [B] sequence numbers, for `Replay.update_priorities`; never used twice
