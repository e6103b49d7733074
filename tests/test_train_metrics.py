"""What the training loop shows of itself."""

import pytest

from learner.progress import describe
from learner.replay import Replay
from tests.trainer_rig import AGENT, Rig


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path)
    yield made
    made.close()


def test_a_reward_that_comes_after_replay_has_let_its_transition_go_is_counted(rig):
    rig.learner.replay = Replay(20, AGENT.entries)
    start_ms = rig.wall_ms
    for n in range(2):
        rig.decide(f"r{n}", "ann", start_ms + n * 1000, ["a", "b"])
    rig.write(60)
    rig.turns(2)
    assert rig.metrics.amendments_missed._value.get() == 0
    rig.click("r0", "ann", start_ms + 70_000, "a")
    rig.write(1)
    rig.turns(2)
    assert rig.metrics.amendments_missed._value.get() == 1


def test_the_progress_line_says_how_many_records_were_of_no_use(rig):
    rig.write(60)
    rig.write(3, timestamp_ms=rig.wall_ms - 10 * 86_400_000)  # say a history imported after live events
    rig.producer.send("events", b"ann", b"no Avro", rig.wall_ms)
    rig.producer.flush()
    before = rig.trainer.totals()
    rig.turns(2)
    assert describe(before, rig.trainer.totals()).endswith(" · 3 came too late · 1 could not be read")
