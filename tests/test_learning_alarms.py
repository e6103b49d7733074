"""What the learner's metrics say when learning goes wrong, and when it goes well: what deploy/alerts.yml is about."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.replay import ReplayError
from tests.trainer_rig import AGENT, Rig

ALERTS = (Path(__file__).parent.parent / "deploy" / "alerts.yml").read_text()
DEAD = float(re.findall(r"learner_q_spread <= ([\d.]+) \* abs\(learner_mean_q\)", ALERTS)[0])


def metric(rig, name):
    return rig.metrics.registry.get_sample_value(f"learner_{name}")


@pytest.fixture
def shop(tmp_path):
    """Makes a trainer that has had turns of 20 slates of a shop of seven items; clicks: on one slate of three."""
    made = []

    def after(turns, clicks=True, deed="select_item", **agent):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(rig := Rig(folder, agent=replace(AGENT, **agent)))
        for n in range(20 * turns):
            at_ms, items = rig.now_ms_of_shop + 10 * n, [f"item-{(n + place) % 7}" for place in range(3)]
            rig.decide(f"d{n}", f"user-{n % 20}", at_ms, items)
            if clicks and n % 3 == 0:
                rig.click(f"d{n}", f"user-{n % 20}", at_ms + 5, items[n % 2], deed)
            if n % 20 == 19:
                rig.producer.flush()
                rig.watch.ask()
                rig.turns(1)
        return rig

    yield after
    for rig in made:
        rig.close()


def one_more_update(rig):
    """Beyond the band, and what it is reported as."""
    rig.learner._update()
    rig.trainer._show()


def test_a_learner_that_learns_reports_mean_and_spread_of_its_q_values(shop):
    # gamma 0: all that is to come is the reward, and Q = reward - error
    rig = shop(turns=4, gamma=0.0, deed="add_to_cart")
    batch, last, unit = rig.learner._batch, rig.learner.last, rig.learner.agent.unit
    q = batch.reward - last.td_error * unit
    assert unit == pytest.approx(2)  # values are learnt in other units than they are reported in
    assert metric(rig, "q_spread") == pytest.approx(np.std(q), rel=1e-3)
    assert metric(rig, "mean_q") == pytest.approx(np.mean(q), rel=1e-3)
    assert metric(rig, "loss") == last.loss


def test_values_that_are_all_alike_have_no_spread(shop):
    rig = shop(turns=3)
    with torch.no_grad():
        for value in rig.learner.agent.online.parameters():
            value.zero_()
    one_more_update(rig)
    assert metric(rig, "q_spread") <= DEAD * abs(metric(rig, "mean_q"))


def test_values_live_where_clicks_tell_items_apart_and_die_where_no_rewards_come(shop):
    for clicks in (True, False):
        rig = shop(turns=3, clicks=clicks, learning_rate=0.01)  # with which it takes seconds
        spread = metric(rig, "q_spread") / abs(metric(rig, "mean_q"))
        assert (spread > 10 * DEAD) == clicks
        assert (spread < DEAD) != clicks


def test_steps_that_are_far_too_long_show_in_the_loss(shop):
    usual, wild = shop(turns=2), shop(turns=2, learning_rate=1.0)
    assert metric(wild, "loss") > 100 * metric(usual, "loss")


def test_values_that_ran_away_show_in_mean_q(shop):
    rig = shop(turns=3)
    before = metric(rig, "mean_q")
    with torch.no_grad():
        rig.learner.agent.online.unchosen[2].bias.fill_(1e6)
    one_more_update(rig)
    assert metric(rig, "mean_q") > 10 * before


def test_updates_that_nobody_had_time_for_are_counted(shop):
    rig = shop(turns=3)
    assert metric(rig, "updates_left") == rig.learner.updates_left < 5  # it makes all that it may
    behind = rig.learner.band
    behind.adjust(behind.low, 1e6, rig.learner.worth - 1, rig.learner.agent.updates)
    rig.trainer._show()
    assert metric(rig, "updates_left") == pytest.approx(1e6, abs=1)
    assert "updates behind" in rig.trainer.totals().waiting


def test_a_loss_that_is_nan_shows_until_the_next_update_which_ends_the_learner(shop):
    rig = shop(turns=3)
    with torch.no_grad():
        rig.learner.agent.online.hint.weight.fill_(math.nan)  # which is in the loss, and not in Q
    one_more_update(rig)
    assert math.isnan(metric(rig, "loss"))
    with pytest.raises(ReplayError, match="the training has diverged"):
        one_more_update(rig)
