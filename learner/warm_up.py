"""Have the learner's loops compiled before anything depends on it: before a name is claimed and a partition is read."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import Any, Final

from learner.agent_settings import AgentSettings
from learner.answer_fit import compile_answer_fit
from learner.learner import Learner, LearnerSettings
from learner.recall import compile_recall
from streaming.chunks import batch_of
from streaming.join_settings import JoinSettings
from streaming.schemas import Codec

logger = logging.getLogger(__name__)

_SAY_AFTER_S: Final = 3.0  # what lies in the cache is there sooner
_START_MS: Final = 946_684_800_000


def warm_up(settings: LearnerSettings, agent: AgentSettings, join: JoinSettings) -> None:
    """Read, learn and remember a few made-up records, by a learner that is thrown away.

    Tens of seconds of CPU where the cache is empty, which is said; else what loading takes, now and not later.
    """
    said = threading.Timer(
        _SAY_AFTER_S, logger.info, ["compiling the loops, once on a machine: about a minute"]
    )
    said.daemon = True
    said.start()
    try:
        compile_recall()
        compile_answer_fit()
        _live(Learner(_small(settings), replace(agent, batch_size=2), join, Codec(), None))
    finally:
        said.cancel()


def _small(settings: LearnerSettings) -> LearnerSettings:
    return replace(settings, replay_capacity=64, min_replay=1, updates_low=0.0, updates_high=1.0)


def _live(learner: Learner) -> None:
    """All that a learner does in its life, once."""
    learner.vocabulary.reserve(1, 1)  # tables grow when they are full, which takes more than a few records
    learner.assign({0: 0})
    learner.take(batch_of(_visits()))
    learner.advance({0: _START_MS + 86_400_000}, {0: 0})
    learner.train(1)
    learner.snapshot()
    for piece in learner.joiner.pieces(0).values():
        piece()


def _visits() -> list[bytes]:
    """A slate, a click and a purchase of it, the next slate, and a purchase after that."""
    codec, values = Codec(), []
    for at in range(3):
        shown = {"item_id": f"i{at}", "propensity": 1.0}
        about: dict[str, Any] = {"user_id": "u", "timestamp": _START_MS + 4000 * at}
        values.append(codec.encode_decision({"recommendation_id": f"r{at}", "slate": [shown], **about}))
        for name in ("select_item", "purchase"):
            about["timestamp"] += 1000
            items = [{"item_id": f"i{at // 2}", "price": 1.0}]
            values.append(
                codec.encode_event({"event_id": f"{name}{at}", "name": name, "items": items, **about})
            )
    return values
