"""What the joiner may be told, and the names of what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from streaming.rewards import RewardTable

JUMP: Final = 16  # records in a row, of two users or more, before a clock is believed to have jumped
BORNE_OUT: Final = (
    256  # records on time after a jump that the log's time stamps told, before it is beyond doubt
)
FIRST_DOUBT: Final = (
    64  # records for which the log's time stamps are not believed after they were wrong once ...
)
MOST_DOUBLINGS: Final = 14  # ... and twice as many each time, so often at most
STEPS_PER_USER: Final = 256  # newest steps of a user in which a deed may find its cause
WAITS_PER_USER: Final = 64  # items of overtaking events that may wait for one user
FIRST_MS: Final = 946_684_800_000  # 2000-01-01 and 2100-01-01: no clock is outside
LAST_MS: Final = 4_102_444_800_000
SAMPLE: Final = 8  # users compared when the stalest must make room

# Kept in checkpoints by position: append, never reorder.
COUNTERS: Final = (
    "events",  # taken in: neither bad, late nor a duplicate
    "decisions",  # likewise
    "bad",  # rows that the decoder refused
    "late",  # rows older than the limit, given back as Rejects
    "duplicates",  # rows whose (kind, id, user) was seen within the window
    "misplaced",  # rows whose key belongs to another partition: the producer's partitioner is wrong
    "future_stamped",  # rows too far ahead to move the clock
    "clock_jumps",  # runs of future-stamped rows that were believed
    "clock_resets",  # wild clocks undone: a first row's, one believed to have jumped, or that one user took along
    "dedup_cut_short",  # a dedup generation filled up before its window was over: raise max_ids
    "attributed_by_id",  # items of events: found by their recommendation_id
    "attributed_by_item",  # items of events: found by the newest step that showed them
    "overtaken",  # items of events that waited for the decision (or the purchase) they belong to, and met it
    "waits_expired",  # items of events that waited in vain, and were then attributed by item if at all
    "waits_refused",  # items of events that should have waited, but too many did
    "unattributed",  # items of events that belong to no step kept
    "organic_steps",  # steps that users took unaided
    "rewards_moved",  # slots of late decisions that took over an organic step's reward
    "sessions_ended",  # users whose open steps were ended by inactivity
    "users_expired",  # users forgotten after user_ttl_s
    "users_evicted",  # users forgotten early, because max_users was reached: raise it
    "steps_evicted",  # steps forgotten early, because max_steps or max_slots was reached: raise it
    "steps_closed_early",  # steps evicted (or whose user was) while open: their transitions end there
    "transitions",
    "amendments",
    "searches_cut_short",  # searches for a deed's cause that ended in vain at its user's newest 256 steps, of more
    "clock_gaps",  # times that nothing came for longer than max_jump_s, by the log's own time stamps too
)


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class JoinSettings:
    """How events are joined to what caused them. Times are event time. Bounds hold for each partition.

    Raises: ValueError naming the setting and its range.
    """

    rewards: RewardTable = field(default_factory=RewardTable)
    gamma: float = _setting(0.9, "discount from one step to the next; 0..1")
    horizon: str = _setting("session", "session: nothing after a visit counts; user: visits are chained")
    session_gap_s: float = _setting(1800, "inactivity that ends a visit; seconds, 1..604800")
    attribution_window_s: float = _setting(
        86_400, "how long a deed may follow its cause; seconds, 1..31536000"
    )
    overtake_wait_s: float = _setting(60, "how long an event waits for its decision; seconds, 0..86400")
    dedup_window_s: float = _setting(86_400, "how long a repeated id is recognised; seconds, 1..31536000")
    late_after_s: float = _setting(86_400, "rows older than the watermark by more are late; seconds, >= 0")
    watermark_delay_s: float = _setting(5, "how far the watermark stays behind; seconds, 0..86400")
    max_jump_s: float = _setting(
        3600,
        "an event this far ahead of the others, and of the log's own time, is not believed; seconds, >= 1",
    )
    history_length: int = _setting(32, "newest entries of a user's history in a state; 1..1000")
    user_ttl_s: float = _setting(
        30 * 86_400, "inactivity after which a user is forgotten; seconds, >= session gap"
    )
    max_users: int = _setting(1_000_000, "users remembered in one partition; 8..2^30")
    max_steps: int = _setting(2_000_000, "steps remembered in one partition; 128..2^30")
    max_slots: int = _setting(40_000_000, "slots of steps remembered in one partition; 4096..2^40")
    max_waits: int = _setting(65_536, "items of overtaking events waiting in one partition; 0..2^30")
    max_ids: int = _setting(4_000_000, "ids in one of the two dedup generations of a partition; 1..2^30")

    def __post_init__(self) -> None:
        if self.horizon not in ("session", "user"):
            raise ValueError(f"horizon must be 'session' or 'user', not {self.horizon!r}")
        for name, low, high in (
            ("gamma", 0, 1),
            ("session_gap_s", 1, 604_800),
            ("attribution_window_s", 1, 31_536_000),
            ("overtake_wait_s", 0, 86_400),
            ("dedup_window_s", 1, 31_536_000),
            ("late_after_s", 0, 3_153_600_000),
            ("watermark_delay_s", 0, 86_400),
            ("max_jump_s", 1, 3_153_600_000),
            ("history_length", 1, 1000),
            ("user_ttl_s", self.session_gap_s, 3_153_600_000),
            ("max_users", SAMPLE, 2**30),
            ("max_steps", 128, 2**30),
            ("max_slots", 4096, 2**40),
            ("max_waits", 0, 2**30),
            ("max_ids", 1, 2**30),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be within {low}..{high}, not {getattr(self, name)}")


def to_ms(seconds: float) -> int:
    """Whole milliseconds."""
    return round(seconds * 1000)
