"""The agent: the same batches give the same weights, also after a restart, and growing keeps what was learnt."""

from __future__ import annotations

import numpy as np
import torch

from learner.agent import Agent, AgentSettings
from learner.networks import score_all
from learner.replay import empty_batch

SETTINGS = AgentSettings(
    dim=8, hidden=8, history_length=4, vector_dim=2, batch_size=16, target_sync_updates=3
)
ITEMS = 12


def batch(seed, items=ITEMS):
    rng = np.random.default_rng(seed)
    out = empty_batch(16, 4)
    for state in (out.state, out.next_state):
        state.item[:] = rng.integers(0, items + 1, (16, 4))
        state.name[:] = rng.integers(0, 5, (16, 4))
        state.age_s[:] = rng.exponential(100.0, (16, 4))
    out.slate[:, :3] = rng.integers(1, items + 1, (16, 3))
    out.slate_slot[:, :3] = np.arange(3)
    out.slate_reward[:, :3] = rng.random((16, 3)) < 0.3
    out.action[:], out.slot_reward[:] = out.slate[:, 0], out.slate_reward[:, 0]
    out.reward[:] = out.slot_reward
    out.discount[:], out.weight[:], out.slots[:] = 0.9, 1.0, 3
    out.organic[:4] = True
    return out


def trained(seeds, agent=None):
    if agent is None:
        agent = Agent(SETTINGS, seed=1)
        agent.grow(ITEMS)
    for seed in seeds:
        agent.update(batch(seed))
    return agent


def assert_same(one, other):
    one, other = one.state(), other.state()
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_the_same_seed_and_batches_give_the_same_weights_bit_for_bit():
    assert_same(trained(range(5)), trained(range(5)))


def test_an_agent_restored_goes_on_as_if_it_had_never_stopped():
    again = Agent(SETTINGS, seed=99)
    again.restore(trained(range(4)).state())
    assert_same(trained(range(4, 8), again), trained(range(8)))


def test_growing_keeps_what_was_learnt():
    agent = trained(range(4))
    before = agent.tensors()
    agent.grow(3000)
    for name, tensor in agent.tensors().items():
        kept = tensor[: len(before[name])] if tensor.ndim and len(tensor) != len(before[name]) else tensor
        assert torch.equal(kept, before[name]), name


def test_the_target_follows_only_at_a_sync():
    agent = trained(range(2))
    assert not torch.equal(agent.online.query.weight, agent.target.query.weight)
    agent.update(batch(2))
    assert torch.equal(agent.online.query.weight, agent.target.query.weight)
    assert agent.last_target_sync_update == 3


def test_scores_at_items_are_those_of_the_whole_shelf():
    agent = trained(range(3))
    with torch.no_grad():
        keys = agent.online.keys(agent.items)
        queries = agent.online.queries(agent._state(batch(9).state), keys)
        ids = torch.tensor([[1, 5, 7]]).expand(16, 3)
        q = agent.online.q_all(queries, keys)
        torch.testing.assert_close(agent.online.q_at(queries, keys, ids), q.gather(1, ids))
        assert score_all(queries.choice, keys.choice, keys.category).shape == (16, ITEMS + 1)
