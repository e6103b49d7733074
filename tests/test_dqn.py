"""The losses: identities, and numbers that can be worked out in the head."""

from __future__ import annotations

import math

import pytest
import torch

from learner import dqn

ALL = torch.tensor([True, True, True])


def q_learning(q_next):
    return q_next.max(dim=1).values


def test_double_dqn_with_equal_networks_is_q_learning():
    q = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
    best = dqn.best_items(q, ALL, slots=1)
    value = dqn.slate_value(torch.zeros(2, 1), q.gather(1, best))
    assert value[:, 0].tolist() == q_learning(q).tolist() == [3.0, 0.0]


def test_the_target_network_judges_what_the_online_network_chooses():
    online, target = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[9.0, 4.0, 8.0]])
    best = dqn.best_items(online, ALL, slots=1)
    assert dqn.slate_value(torch.zeros(1, 1), target.gather(1, best)).tolist() == [[4.0]]


def test_the_mask_touches_the_selection_only():
    q = torch.tensor([[1.0, 3.0, 2.0]])
    best = dqn.best_items(q, torch.tensor([True, False, True]), slots=1)
    assert best.tolist() == [[2]]
    ended = dqn.n_step_target(torch.tensor([5.0]), torch.tensor([0.0]), q.gather(1, best).squeeze(1))
    assert ended.tolist() == [5.0]  # -inf * 0 would be NaN
    assert q.tolist() == [[1.0, 3.0, 2.0]]


def test_a_slate_is_worth_its_slots_together():
    q = torch.tensor([[1.0, 3.0, 2.0]])
    best = dqn.best_items(q, ALL, slots=2)
    assert best.tolist() == [[1, 2]]
    assert dqn.slate_value(torch.tensor([[10.0]]), q.gather(1, best)).tolist() == [[15.0]]
    quantiles = torch.tensor([[9.0, 11.0]])
    assert dqn.slate_value(quantiles, q.gather(1, best)).tolist() == [[14.0, 16.0]]


def test_more_slots_than_items_take_them_all():
    assert sorted(dqn.best_items(torch.zeros(1, 3), ALL, slots=8)[0].tolist()) == [0, 1, 2]


def test_the_target_is_reward_and_the_discounted_value():
    target = dqn.n_step_target(torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.0]), torch.tensor([8.0, 8.0]))
    assert target.tolist() == [5.0, 1.0]


def test_what_comes_later_is_the_target_less_what_the_slot_earned():
    later = dqn.continuation_target(torch.tensor([5.0]), torch.tensor([1.0]), gamma=0.5)
    assert later.tolist() == [8.0]  # 1 + 0.5 * 8 = 5


def test_huber_is_half_the_square_within_delta_and_a_line_beyond():
    loss = dqn.huber(torch.tensor([1.0, 4.0]), torch.zeros(2), delta=2.0)
    assert loss.tolist() == [0.5, 6.0]  # 2 * (4 - 2 / 2)


def test_quantile_huber_is_that_of_each_pair_tilted():
    draw = torch.Generator().manual_seed(3)
    prediction, target = 3 * torch.randn(4, 5, generator=draw), 3 * torch.randn(4, 7, generator=draw)
    loss = dqn.quantile_huber(prediction, target, delta=1.5)
    for b in range(4):
        total = 0.0
        for i in range(5):
            for j in range(7):
                error = float(target[b, j] - prediction[b, i])
                size = error**2 / 2 if abs(error) <= 1.5 else 1.5 * (abs(error) - 0.75)
                total += 2 * abs((i + 0.5) / 5 - (error < 0)) * size
        assert float(loss[b]) == pytest.approx(total / 35, rel=1e-5)


def test_one_quantile_of_one_target_is_huber():
    draw = torch.Generator().manual_seed(4)
    prediction, target = 3 * torch.randn(64, 1, generator=draw), 3 * torch.randn(64, 1, generator=draw)
    same = dqn.huber(prediction, target, delta=2.0)[:, 0]
    assert torch.equal(dqn.quantile_huber(prediction, target, delta=2.0), same)


def test_quantile_regression_finds_the_quantiles():
    """Of an exponential distribution, whose mean (1) and median (.69) differ."""
    draw = torch.Generator().manual_seed(5)
    found = torch.zeros(1, 20, requires_grad=True)
    optimiser = torch.optim.Adam([found], lr=0.02)
    for _ in range(3000):
        target = torch.empty(1, 256).exponential_(generator=draw)
        optimiser.zero_grad()
        dqn.quantile_huber(found, target, delta=0.05).sum().backward()
        optimiser.step()
    tau = (torch.arange(20) + 0.5) / 20
    assert found.detach()[0].tolist() == pytest.approx((-torch.log(1 - tau)).tolist(), abs=0.15)
    assert found.detach().mean().item() == pytest.approx(1.0, abs=0.05)


def test_choice_loss_is_the_negative_log_likelihood():
    loss = dqn.choice_loss(torch.tensor([0.0, math.log(3.0)]), torch.tensor([True, False]))
    assert loss.tolist() == pytest.approx([math.log(2.0), math.log(4.0)])


def test_next_item_loss_is_the_surprise_of_the_softmax():
    loss = dqn.next_item_loss(torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([1]))
    assert loss.tolist() == pytest.approx([math.log(4 / 3)])


def test_the_conservative_loss_vanishes_where_only_the_logged_action_is_on_offer():
    q = torch.tensor([[1.0, 3.0, 2.0]])
    one = torch.tensor([False, True, False])
    assert dqn.conservative_loss(q, q[:, 1], one).tolist() == pytest.approx([0.0])
    assert dqn.conservative_loss(q, q[:, 1], ALL).item() > 0


def test_rows_without_weight_do_not_pull():
    values = torch.tensor([1.0, 100.0])
    assert dqn.weighted_mean(values, torch.tensor([1.0, 0.0])).item() == 0.5


def test_targets_and_choices_carry_no_gradient_into_the_chooser():
    q = torch.tensor([[1.0, 3.0]], requires_grad=True)
    assert not dqn.best_items(q, torch.tensor([True, True]), slots=1).requires_grad
