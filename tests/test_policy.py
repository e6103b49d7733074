"""A policy encodes histories as training does, and scores candidates as it scores the catalog."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from learner import policy as policies
from learner import weights
from learner.exploration import Exploration
from learner.known_items import bucket
from learner.policy import Candidate, Entry, Policy, PolicyDamaged, state_tensors
from learner.response import WIDTHS
from learner.weights import Meta, WeightStore
from streaming.interning import Vocabulary, hash_string
from streaming.rewards import CODES
from tests.serving_process import agent, publish
from tests.test_agent import batch, new_agent, priced, trained

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
    np.testing.assert_allclose(q, policy.q(states)[0, 1:], rtol=1e-4, atol=1e-5)


def test_a_candidate_is_pulled_on_as_the_category_that_it_comes_with_is(tmp_path):
    made, names = agent(ITEMS), [f"made up {i}" for i in range(20)]
    buckets = bucket(np.array([hash_string(name) for name in names], np.uint64), 1024)
    made.items.category[3] = buckets[3]  # the history's item is of that one
    store = WeightStore(f"{tmp_path}/weights")
    policy = Policy.from_weights(store.load(publish(store, NAMES, made=made)))
    states = policy.encode([[Entry(NAMES[2], "view_item", 9_000)]], [10_000])
    offered = [Candidate(NAMES[0], name) for name in names]
    with torch.no_grad():
        network, shelf = policy._network, policy._shelf_of(offered)[0]
        queries = network.queries(state_tensors(states), policy._shelf)
        keys = network.keys_of(shelf)
        same = queries.choice.category.unsqueeze(1) == keys.category.unsqueeze(1)
        pull = (queries.choice.alike.unsqueeze(1) * same).sum(dim=2)
        choice = queries.choice.vector @ keys.choice.T + pull
        wanted = network.value(queries) + torch.sigmoid(choice) * network.gain_all(queries, keys)
    assert torch.nonzero(pull[0]).flatten().tolist() == [3]
    assert buckets.max() < policy._compiled._buckets  # whatever comes, a history can have it
    np.testing.assert_allclose(policy.q_candidates(states, offered), wanted[0].numpy(), rtol=1e-4, atol=1e-5)


def test_a_price_that_comes_with_a_candidate_means_what_the_catalogs_does(tmp_path):
    made, words = new_agent(), Vocabulary()
    words.intern_all(NAMES)
    price = [1500.0, 90_000.0, 3000.0, 250.0, 777.0, 12_000.0, 800.0, 5000.0, 64_000.0, 10.0, 2.0]
    made.set_catalog(priced(price))
    store = WeightStore(f"{tmp_path}/weights")
    policy = Policy.from_weights(
        store.load(store.publish(made.tensors(), Meta(settings=made.shape()), words).version)
    )
    states = policy.encode([HISTORY], [10_000])
    by_catalog, told = Candidate(NAMES[2]), Candidate(NAMES[2], price=90_000.0)
    dearer = Candidate(NAMES[2], price=400.0)
    q = policy.q_candidates(states, [by_catalog, told, dearer])
    assert q[0] == q[1] != q[2]


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


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        (["i0", "i1", "i2", "i3", "i4"], True),
        (["i0", "i1", "i2", "i3", "i4", "i5"], True),
        (["i0", "i1", "i2", "i3"], True),
        (["i1", "i0", "i2", "i3", "i4"], False),  # in a chunk that is full
        (["i0", "i1", "i2", "i3", "i5"], False),
        (["i0", "i1", "i3"], False),
    ],
)
def test_versions_number_items_alike_where_what_both_know_has_the_same_ids(
    tmp_path, monkeypatch, other, alike
):
    monkeypatch.setattr(weights, "CHUNK", 2)
    monkeypatch.setattr(policies, "CHUNK", 2)

    def policy(names):
        store = WeightStore(tmp_path / "-".join(names))
        return Policy.from_weights(store.load(publish(store, names)))

    first, second = policy([f"i{i}" for i in range(5)]), policy(other)
    assert (first.numbers_as(second), second.numbers_as(first)) == (alike, alike)


THOMPSON = Exploration("thompson", scale=1.5)


def test_draws_deviate_by_what_is_not_known_of_how_items_answer(tmp_path):
    made, words = trained(range(3)), Vocabulary()
    for seed in range(200):
        told = batch(seed)
        told.slate[told.slate == 5] = 0  # is never shown
        made.update(told, kept=100_000)
    words.intern_all(NAMES)
    store = WeightStore(f"{tmp_path}/weights")
    policy = Policy.from_weights(
        store.load(store.publish(made.tensors(), Meta(settings=made.shape()), words).version)
    )
    states, rng = policy.encode([HISTORY], [10_000]), np.random.default_rng(0)
    some = [next(policy.scores(states, THOMPSON, rng)) for _ in range(200)]
    np.testing.assert_array_equal(some[0].q, policy.q(states)[0])
    drawn = np.concatenate([scores.drawn for scores in some]).astype(np.float64)
    with torch.no_grad():
        keys = made.target.keys(made.items)
        queries = made.target.queries(made._state(states), keys)
        gain, value = made.unit * made.target.gain_all(queries, keys), made.unit * made.target.value(queries)
        more, fit = made.target.response, made._response
        phi = (queries.organic.vector[0, :-1] - more.state_mean) / more.state_scale
        size = phi @ fit.directions @ phi
    log_odds = np.log(1 / ((gain.numpy() / (drawn - value.numpy())) - 1))
    shown = fit.information.numpy() * np.exp(fit.at.numpy()[:, :1] - fit.passes)
    prior = 1 / np.array(WIDTHS[:2])
    variance = 1 / (shown[: ITEMS + 1] / fit.dimensions[:2].numpy() + prior)
    expected = 1.5 * np.sqrt(variance[:, 0] + float(size) * variance[:, 1])
    np.testing.assert_allclose(log_odds.std(axis=0)[1:], expected[1:], rtol=0.06)
    assert np.delete(expected, [0, 5]).max() < 0.8 * expected[5]  # what was shown is known better

    offered = [Candidate(NAMES[2]), Candidate("brand new")]
    mine = [policy.scores_of_candidates(states, offered, THOMPSON, rng) for _ in range(200)]
    deviation = np.concatenate([scores.drawn for scores in mine]).std(axis=0)
    assert deviation[0] == pytest.approx(drawn[:, 3].std(), rel=0.06)
    np.testing.assert_allclose(mine[0].q, policy.q_candidates(states, offered))
    assert next(policy.scores(states, Exploration("boltzmann"), rng)).drawn is None


def test_draws_of_a_user_are_gone_when_those_of_the_next_are_made(served):
    states, drawn, most = served.encode([HISTORY] * 30, [10_000] * 30), [], 0
    for scores in served.scores(states, THOMPSON, np.random.default_rng(0)):
        drawn.append(weakref.ref(scores.drawn))
        most = max(most, sum(ref() is not None for ref in drawn))
    assert (len(drawn), most) == (30, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t["both.stack.near"].fill_(ITEMS + 7), "what items answer to"),
        (
            lambda t: t.pop("both.stack.near"),
            "lacks tensor 'both.stack.near': it is damaged, or of an earlier learner",
        ),
        (
            lambda t: t.update({"target.tower.id.weight": t["target.tower.id.weight"][:-1]}),
            "target.tower.id.weight is",
        ),
        (
            lambda t: t.update({"target.tower.id.weight": t["target.tower.id.weight"].int()}),
            "target.tower.id.weight is .* of torch.int32",
        ),
        (lambda t: t.update({"both.stack.level": t["both.stack.level"][:-1]}), "both.stack.level is"),
        (lambda t: t.update({"both.response.own": t["both.response.own"][:, :-1]}), "both.response.own is"),
        (lambda t: t.pop("both.response.own"), "lacks tensor 'both.response.own'"),
    ],
)
def test_weights_with_tensors_that_are_damaged_or_missing_are_refused(tmp_path, change, says):
    made, words = trained(range(2)), Vocabulary()
    words.intern_all(NAMES)
    tensors = made.tensors()
    change(tensors)
    store = WeightStore(f"{tmp_path}/weights")
    version = store.publish(tensors, Meta(settings=made.shape()), words).version
    with pytest.raises(PolicyDamaged, match=says):
        Policy.from_weights(store.load(version))
