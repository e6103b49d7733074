"""How often the training loop does what takes long: versions of the weights, and checkpoints."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from learner.train import BUSY, SELDOM, SELDOM_S, WORK
from tests.trainer_rig import Rig


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path, publish_s=0.25, checkpoint_s=10.0)
    yield made
    made.close()


def pauses(rig, seconds, name, cost_s=0.0, worked_s=0.0):
    """Between two calls of `trainer.name`; it holds up the loop for cost_s, what it starts needs worked_s of a core."""
    real, at = getattr(rig.trainer, name), []

    def slow(*arguments):
        done = real(*arguments)
        at.append(rig.now_s)
        rig.now_s += cost_s
        return done

    def settle(turn):
        rig.write(1)  # so that there is something new
        while (running := rig.publisher._running) is not None and not running.done():
            time.sleep(0.001)
        rig.publisher.worked_s = worked_s

    setattr(rig.trainer, name, slow)
    end = rig.now_s + seconds
    while rig.now_s < end:
        rig.turns(1, settle)
    return [later - earlier for earlier, later in pairwise(at)][1:]


@pytest.mark.parametrize(
    ("cost_s", "worked_s", "wanted"),
    [
        (0.0, 0.0, 0.25),  # as asked for
        (0.05, 0.0, BUSY * 0.05),
        (0.0, 0.2, WORK * 0.2),
        (0.0, 3.0, SELDOM_S),  # however large
    ],
)
def test_versions_come_as_often_as_asked_for_where_they_take_a_tenth_of_a_core_at_most(
    rig, cost_s, worked_s, wanted
):
    rig.write(200)
    rig.turn_s = wanted / 20
    gaps = pauses(rig, 5 * wanted + 1, "_start_publishing", cost_s, worked_s)
    assert len(gaps) >= 2
    assert gaps == pytest.approx([wanted] * len(gaps), abs=0.1 * wanted)


@pytest.mark.parametrize(("cost_s", "wanted"), [(0.0, 10.0), (1.0, BUSY * 1.0), (9.0, SELDOM * 10.0)])
def test_checkpoints_come_more_rarely_where_they_hold_up_the_loop(rig, cost_s, wanted):
    rig.turn_s = wanted / 20
    rig.write(200)
    gaps = pauses(rig, 5 * wanted, "_start_checkpoint", cost_s)
    assert len(gaps) >= 2
    assert gaps == pytest.approx([wanted] * len(gaps), abs=0.1 * wanted)
