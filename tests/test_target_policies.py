"""Policies that are judged: they score items as servers do."""

from __future__ import annotations

import numpy as np
import pytest

from learner.policy import Candidate, Entry, Policy
from learner.replay import Histories
from learner.target_policies import LEAST, Contexts, Learned, Popularity, Uniform, policy_names
from learner.weights import WeightStore
from serving.user_state import UserState
from streaming.interning import Vocabulary
from streaming.rewards import RewardTable
from tests.rows import bad, columns, decision, event, logged
from tests.serving_process import publish

NAMES = [f"item-{i}" for i in range(12)]
NOTHING = Histories(*(np.zeros((1, 4), t) for t in (np.int32, np.uint8, np.float32, np.float32)))


def test_names_are_read_once_each_and_in_order():
    assert policy_names("weights:12, uniform,weights:12,logging") == ("weights:12", "uniform", "logging")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("unifrom", "no such policy 'unifrom'; did you mean 'uniform'?"),
        ("weights:newest", "did you mean 'weights'?"),
        ("", "no policy named; some of logging, uniform"),
    ],
)
def test_a_name_that_is_none_is_answered_with_the_nearest(text, hint):
    with pytest.raises(ValueError, match=hint.replace("?", r"\?")):
        policy_names(text)


def test_popularity_is_what_a_server_without_weights_ranks_by():
    rng, rewards = np.random.default_rng(0), RewardTable()
    server = UserState(100, 8, 4, 30.0, rewards)
    words = Vocabulary()
    words.intern_all(NAMES[:6])
    target = Popularity(words, rewards, 30.0, 0.0)
    names = ["view_item", "purchase", "refund", "search", "begin_checkout", "add_to_cart"]
    rows = [
        event(str(rng.choice(names)), *rng.choice(np.arange(1, 7), rng.integers(0, 3), False).tolist(), at=n,
              user=f"user-{n % 7}")
        for n in range(200)
    ]  # fmt: skip
    placed = logged([*rows, decision("r", 1, 2, at=300), bad()])
    for start in range(0, len(placed), 23):
        batch = columns(placed[start : start + 23])
        server.absorb(batch, 6)
        target.observe(batch)
    found = target.scores(Contexts(NOTHING, None, np.arange(7)))[0]
    wanted = server.popularity(6)
    assert found / found.sum() == pytest.approx(wanted / wanted.sum())


def test_uniform_prefers_nothing():
    assert Uniform().epsilon == 1.0
    assert not Uniform().scores(Contexts(NOTHING, None, np.arange(5))).any()


@pytest.fixture
def policy(tmp_path):
    store = WeightStore(f"{tmp_path}/weights")
    return Policy.from_weights(store.load(publish(store, NAMES)))


@pytest.fixture
def words(policy):
    """A log's vocabulary: other ids for the same items, and one that the policy does not know."""
    words = Vocabulary()
    words.intern_all(["stranger", *reversed(NAMES)])
    return words


def contexts(words, entries, now_ms, candidates=None):
    """One user's, by the log's ids."""
    newest = entries[::-1]
    states = Histories(
        words.ids([e.item_id for e in newest])[None],
        np.array([[4 for _ in newest]], np.uint8),  # view_item
        np.array([[(now_ms - e.timestamp_ms) / 1000 for e in newest]], np.float32),
        np.array([[e.value for e in newest]], np.float32),
    )
    items = np.arange(14) if candidates is None else words.ids([c.item_id for c in candidates])
    return Contexts(states, candidates, items)


HISTORY = [Entry("item-3", "view_item", 1_000, 5.0), Entry("stranger", "view_item", 2_000, 1.0)]


def test_weights_score_items_in_the_logs_ids_as_they_do_in_their_own(policy, words):
    target = Learned("weights:1", policy, words, np.zeros(14, bool), 0.1)
    q = policy.q(policy.encode([HISTORY], [10_000]))[0]
    found = target.scores(contexts(words, HISTORY, 10_000))[0]
    assert found[:2].tolist() == [LEAST, LEAST]  # no item; stranger
    assert found[2:] == pytest.approx(q[:0:-1], rel=1e-5)
    assert q.std() > 1e-3


def test_weights_score_candidates_with_their_features(policy, words):
    offered = [Candidate("item-7", price=3.0), Candidate("new", category="shoes")]
    target = Learned("weights:1", policy, words, np.zeros(14, bool), 0.1)
    found = target.scores(contexts(words, HISTORY, 10_000, offered))[0]
    wanted = policy.q_candidates(policy.encode([HISTORY], [10_000]), offered)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert target.allows(contexts(words, HISTORY, 10_000, offered)).tolist() == [True, True]


def test_weights_show_what_they_have_on_offer_unless_the_catalog_knows_better(policy, words):
    policy.on_offer[policy.ids(["item-4", "item-5"])] = False
    known = np.zeros(14, bool)
    known[words.ids(["item-5"])] = True
    allowed = Learned("weights:1", policy, words, known, 0.1).allows(contexts(words, [], 0))
    assert [i for i in range(14) if not allowed[i]] == [0, 1, words.id_of("item-4")]
