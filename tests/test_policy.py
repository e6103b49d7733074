"""A policy encodes histories as training does, and scores candidates as it scores the catalog."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.policy import Candidate, Entry, Policy
from learner.weights import Meta, WeightStore
from streaming.interning import Vocabulary
from streaming.rewards import CODES
from tests.serving_process import agent, publish
from tests.test_agent import trained

ITEMS = 12
NAMES = [f"item-{i}" for i in range(ITEMS)]
HISTORY = [
    Entry("item-3", "view_item", 1_000),
    Entry("nobody", "purchase", 5_000, 20.0),
    Entry("item-5", "select_item", 9_000),
]


@pytest.fixture
def served(tmp_path):
    store = WeightStore(f"{tmp_path}/weights")
    return Policy.from_weights(store.load(publish(store, NAMES, made=agent(ITEMS))))


def test_a_history_is_encoded_newest_first_and_unknown_items_are_zero(served):
    states = served.encode([HISTORY], [10_000])
    assert states.item[0, :4].tolist() == [6, 0, 4, 0]
    assert states.age_s[0, :3].tolist() == [1.0, 5.0, 9.0]
    assert states.name[0, :4].tolist() == [*(CODES[n] for n in ("select_item", "purchase", "view_item")), 0]
    assert states.value[0, :4].tolist() == [0.0, 20.0, 0.0, 0.0]


def test_candidates_of_the_catalog_score_as_in_the_catalog(served):
    policy = served
    states = policy.encode([HISTORY], [10_000])
    q = policy.q_candidates(states, [Candidate(name) for name in NAMES])
    np.testing.assert_allclose(q, policy.q(states)[0, 1:], rtol=1e-3, atol=1e-4)


def test_a_policy_says_of_a_state_what_the_agent_that_trained_it_says(tmp_path):
    made, words = trained(range(5)), Vocabulary()
    words.intern_all(NAMES)
    store = WeightStore(f"{tmp_path}/weights")
    version = store.publish(made.tensors(), Meta(settings=made.shape()), words).version
    for network, of_agent in (("online", made.online), ("target", made.target)):
        policy = Policy.from_weights(store.load(version), network)
        states = policy.encode([HISTORY, []], [10_000, 10_000])
        with torch.no_grad():
            keys = of_agent.keys(made.items)
            q = of_agent.q_all(of_agent.queries(made._state(states), keys), keys)
        np.testing.assert_allclose(policy.q(states), q.numpy(), rtol=1e-4, atol=1e-5)
        assert q.std() > 1e-3
