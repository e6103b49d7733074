"""A table's rows, worked out when they are read, are those that a dense optimiser and target would have."""

from __future__ import annotations

import pytest
import torch

from learner.lazy_table import BETAS, Rows, Rule, catch_up, caught_up, follow_share, networks_now, stepped

ITEMS, DIM = 60, 3


def dense(gradients, described, rule):
    """Every row at every update, by torch's own optimiser: (online, target)."""
    online = torch.nn.Parameter(torch.ones(ITEMS, DIM))
    target = torch.full((ITEMS, DIM), -1.0)
    optimiser = torch.optim.AdamW(
        [online], lr=rule.learning_rate, betas=BETAS, eps=rule.eps, weight_decay=0.0, fused=True
    )
    for update, (ids, gradient) in enumerate(gradients, 1):
        online.grad = torch.zeros(ITEMS, DIM)
        online.grad[ids] = gradient
        optimiser.step()
        with torch.no_grad():
            online *= 1 - rule.decay * described.float().unsqueeze(1)
            if rule.tau > 0:
                target.lerp_(online, follow_share(update, rule.tau))
    return online.detach(), target


def lazy(gradients, described, rule):
    zeros = torch.zeros(ITEMS, DIM)
    table = Rows(zeros + 1, zeros - 1, zeros.clone(), zeros.clone(), torch.zeros(ITEMS, dtype=torch.int64))
    for update, (ids, gradient) in enumerate(gradients, 1):
        rows = caught_up(table.take(ids), described[ids], update - 1, rule)
        table.put(ids, stepped(rows, gradient, described[ids], follow_share(update, rule.tau), rule))
    online, target = networks_now(table, described, len(gradients), rule)
    catch_up(table, described, len(gradients), rule)
    assert torch.equal(table.online, online)
    assert torch.equal(table.target, target)
    return table


def gradients(updates, share, seed=0):
    """(ids, gradient [M, D]) of so many updates, each of about a share of the rows."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        ids = torch.nonzero(torch.rand(ITEMS, generator=generator) < share).squeeze(1)
        yield ids, torch.randn(len(ids), DIM, generator=generator) * 0.3


@pytest.mark.parametrize(
    ("updates", "share"), [(1, 0.03), (5, 0.03), (40, 0.03), (300, 0.03), (900, 0.03), (2500, 0.002)]
)
@pytest.mark.parametrize("tau", [0.005, 0.0])
def test_it_is_what_a_dense_optimiser_and_target_give(updates, share, tau):
    rule = Rule(learning_rate=0.002, eps=1e-6, decay=0.001, tau=tau)
    described = torch.arange(ITEMS) % 2 == 0
    steps = list(gradients(updates, share))
    online, target = dense(steps, described, rule)
    rows = lazy(steps, described, rule)
    for part in (described, ~described):  # decay moves the ones by more than gradients do
        moved = (online[part] - 1).abs().mean()
        assert (rows.online - online)[part].abs().mean() <= 0.02 * moved + 1e-6
        moved = (target[part] + 1).abs().mean()
        assert (rows.target - target)[part].abs().mean() <= 0.02 * moved + 1e-6


def test_rows_read_at_every_update_are_exactly_so():
    rule = Rule(learning_rate=0.01, eps=1e-6, decay=0.001, tau=0.01)
    described = torch.arange(ITEMS) % 2 == 0
    steps = list(gradients(200, 1.0))
    online, target = dense(steps, described, rule)
    rows = lazy(steps, described, rule)
    torch.testing.assert_close(rows.online, online, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.target, target, rtol=1e-4, atol=1e-5)


def test_reading_in_between_changes_little_and_catching_up_twice_changes_nothing():
    rule = Rule(learning_rate=0.002, eps=1e-6, decay=0.001, tau=0.005)
    described = torch.ones(ITEMS, dtype=torch.bool)
    table = lazy(list(gradients(300, 0.1)), described, rule)
    once = caught_up(table, described, 400, rule)
    halfway = caught_up(caught_up(table, described, 350, rule), described, 400, rule)
    for one, two in zip(once, halfway, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)
    for one, two in zip(once, caught_up(once, described, 400, rule), strict=True):
        assert torch.equal(one, two)


def test_the_target_is_the_mean_of_all_updates_at_first_and_follows_a_little_later():
    assert [follow_share(u, 0.25) for u in (1, 2, 4, 5, 100)] == [1.0, 0.5, 0.25, 0.25, 0.25]
    assert follow_share(7, 0.0) == 0.0
