"""--until-caught-up, where the log changes while the learner begins."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

from learner.__main__ import _prepared, _resume
from learner.learner import Learner, LearnerSettings
from learner.metrics import Metrics
from learner.train import TrainConfig, claim, open_checkpoints
from learner.watch import LogWatch
from streaming.dead_letters import dlq_topic, late_topic
from streaming.join_settings import JoinSettings
from streaming.log import open_log
from streaming.schemas import Codec
from tests.trainer_rig import AGENT


def test_partitions_that_are_added_while_it_begins_are_none_that_it_catches_up_with(tmp_path: Path) -> None:
    config = TrainConfig(
        data_dir=str(tmp_path / "data"), weights=str(tmp_path / "weights"), until_caught_up=True
    )
    with ExitStack() as closing:
        log = open_log(f"sqlite:///{tmp_path / 'log.db'}")
        closing.callback(log.close)
        for topic in ("events", dlq_topic("events"), late_topic("events")):
            log.create_topic(topic, 1)
        watch = LogWatch(log, "events", "catalog", "group", 3600.0)
        closing.callback(watch.close)
        checkpoints, topic_id = open_checkpoints(config), log.identity("events")
        store = claim(config, "test", checkpoints)
        join = JoinSettings(gamma=AGENT.gamma, history_length=AGENT.entries)
        learner = Learner(LearnerSettings(), AGENT, join, Codec(), None)
        resumed = _resume(config, learner, checkpoints.load(), watch, topic_id)

        log.create_topic("events", 3)
        watch.ask()
        trainer = _prepared(
            *(config, resumed, log, Codec(), watch, checkpoints, store, Metrics(), topic_id, closing),
            stop=threading.Event(),
        )
        trainer.run(threading.Event(), lambda now_s: None)
        assert trainer.totals().lag == 0
