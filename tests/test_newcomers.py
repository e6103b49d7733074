"""Items that histories name before the weights do: known by the features that they were shown with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner import compiled
from learner import policy as policies
from learner.policy import Candidate, Entry, Policy
from learner.weights import Meta, WeightStore
from serving import policy_pb2 as pb
from serving.described import Described
from serving.ranking import Ranker
from serving.service import Service
from serving.view import View, ViewConfig
from streaming.catalog import Catalog
from streaming.chunks import batch_of
from streaming.interning import Vocabulary
from streaming.schemas import Codec
from tests.test_agent import ITEMS, trained

NAMES = [f"item-{i}" for i in range(1, ITEMS + 1)]
NEWS = {
    name: Candidate(name, category=f"section {i % 3}", price=3.0 + i, vector=[0.3 * i - 1.0, 0.5])
    for i, name in enumerate(f"news-{k}" for k in range(5))
}
CODEC = Codec()
NOW = 1_700_000_000_000


def history(*names):
    return [Entry(name, "view_item", NOW - 1000 * (len(names) - i)) for i, name in enumerate(names)]


def policy_of(made, names, path):
    words, store = Vocabulary(), WeightStore(f"{path}/weights")
    words.intern_all(names)
    return Policy.from_weights(
        store.load(store.publish(made.tensors(), Meta(settings=made.shape()), words).version)
    )


@pytest.fixture
def both(tmp_path):
    """Policies of the same weights: before anything was told of the news, and after."""
    made = trained(range(30))
    with torch.no_grad():
        for network in (made.online, made.target):
            network.encoder.out.weight.mul_(20.0)
            network.encoder.mix.weight.mul_(3.0)
            network.tower.new.fill_(0.2)
    before = policy_of(made, NAMES, tmp_path / "before")
    catalog = Catalog(CODEC, words := Vocabulary())
    words.intern_all([*NAMES, *NEWS])
    ids, items = catalog.described(list(NEWS), [candidate._asdict() for candidate in NEWS.values()])
    made.grow(len(words))
    made.describe(ids, items)
    return before, policy_of(made, [*NAMES, *NEWS], tmp_path / "after")


PAST = history("news-1", "nobody", "news-4", "item-3")


def test_a_history_says_the_same_whether_the_weights_know_its_items_or_are_told_of_them(both):
    before, after = both
    untold = before.q(before.encode([PAST, history("item-2")], [NOW, NOW]))[:, 1:]
    told = before.encode([PAST, history("item-2")], [NOW, NOW], NEWS.get)
    known = after.encode([PAST, history("item-2")], [NOW, NOW])
    for states in (told, known):
        assert (states.item[0] == 0).tolist() == [False, False, True, False]
    expected = after.q(known)[:, 1 : ITEMS + 1]
    np.testing.assert_allclose(before.q(told)[:, 1:], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(untold[0] - expected[0]).max() > 1e-2
    np.testing.assert_allclose(untold[1], expected[1], rtol=1e-4, atol=1e-5)


def test_a_candidate_that_the_history_names_is_known_to_be_the_same(both):
    before, after = both
    offered = [NEWS["news-1"], NEWS["news-2"], Candidate("item-3")]
    with torch.no_grad():
        for policy in both:
            policy._compiled._parameters.copy[:] = 0.7
    told, known = before.encode([PAST], [NOW], NEWS.get), after.encode([PAST], [NOW])
    q = before.q_candidates(told, offered)
    np.testing.assert_allclose(q, after.q_candidates(known, offered), rtol=1e-4, atol=1e-5)


def test_where_there_is_no_more_room_those_asked_for_now_are_known(both, monkeypatch):
    before, _ = both
    monkeypatch.setattr(policies, "ROOM", 2)
    expected = {name: before.q(before.encode([history(name)], [NOW], NEWS.get)) for name in NEWS}
    for names in (["news-0", "news-1"], ["news-2"], ["news-1", "news-3"], ["news-2"]):
        states = before.encode([history(name) for name in names], [NOW] * len(names), NEWS.get)
        for row, name in zip(before.q(states), names, strict=True):
            np.testing.assert_allclose(row, expected[name][0], rtol=1e-5)
    states = before.encode([history(name) for name in NEWS], [NOW] * len(NEWS), NEWS.get)  # too many at once
    assert np.count_nonzero(states.item[:, 0]) == 2


def test_an_item_that_is_described_otherwise_is_known_by_that_from_then_on(both):
    before, _ = both
    described = Described(10)
    first, other = (
        before.q(before.encode([history(name)], [NOW], NEWS.get)) for name in ("news-0", "news-3")
    )
    assert np.abs(first - other).max() > 1e-2
    for told, expected in (("news-0", first), ("news-3", other), ("news-3", other), ("news-0", first)):
        described.note([NEWS[told]._replace(item_id="news-0")])
        q = before.q(before.encode([history("news-0")], [NOW], described.get))
        np.testing.assert_allclose(q, expected, rtol=1e-5)
    assert len(before._newcomers) == 2


def test_there_is_room_for_a_batch_of_the_longest_histories():
    assert compiled.ROOM >= 64 * 32


def test_what_was_described_last_counts_and_what_was_longest_ago_goes_first():
    described = Described(2)
    described.note([Candidate("a", price=0.0), Candidate("b", category="x"), Candidate("bare")])
    described.note([Candidate("a", vector=[1.0, 2.0])])
    described.note([Candidate("a")])  # says nothing, and takes nothing away
    described.note([Candidate("c", brand="y")])
    known = described.get("a")
    described.note([Candidate("a", vector=[1.0, 2.0])])  # nothing new: nobody need look at it again
    assert described.get("a") is known
    assert described.get("b") is None
    assert described.get("bare") is None
    assert described.get("a").vector.tolist() == [1.0, 2.0]
    assert len(described) == 2


def test_who_asks_while_an_item_is_described_again_gets_it_as_it_was_or_as_it_is():
    described, asked = Described(2), []

    class Watched(list):
        def __array__(self, dtype=None, copy=None):
            asked.append(described.get("a"))
            return np.array([2.0], dtype)

    described.note([Candidate("a", vector=[1.0])])
    described.note([Candidate("a", vector=Watched([2.0]))])
    assert [known.vector.tolist() for known in (*asked, described.get("a"))] == [[1.0], [2.0]]


def decision(slate, candidates):
    return CODEC.encode_decision(
        {
            "recommendation_id": "r1",
            "user_id": "ann",
            "timestamp": NOW,
            "slate": [{"item_id": item_id, "propensity": 0.5} for item_id in slate],
            "candidates": [candidate._asdict() for candidate in candidates],
        }
    )


def test_the_view_takes_from_decisions_how_what_was_shown_was_described():
    view = View(ViewConfig(max_users=10), CODEC)
    records = [
        decision(["news-1", "news-3"], list(NEWS.values())),
        decision(["news-2"], [NEWS["news-2"]])[:-1],
    ]
    view.absorb(batch_of(records))
    assert view.described.get("news-1").category == "section 1"
    np.testing.assert_allclose(view.described.get("news-3").vector, NEWS["news-3"].vector)
    assert view.described.get("news-0") is None  # not shown
    assert len(view.described) == 2


def test_items_beyond_the_bound_are_left_out_of_histories():
    view = View(ViewConfig(max_users=10, max_items=2), CODEC)
    for n in range(4):
        event = {"event_id": f"e{n}", "name": "purchase", "user_id": "ann", "timestamp": NOW + n}
        view.absorb(batch_of([CODEC.encode_event(event | {"items": [{"item_id": f"news-{n}"}]})]))
    assert [entry.item_id for entry in view.history("ann")] == ["news-0", "news-1"]
    assert (len(view.vocabulary), view.vocabulary.refused) == (2, 2)
    assert set(view.bought("ann", NOW + 10)) <= {"news-0", "news-1", ""}


class Weights:
    """A follower that stands still."""

    network, label = "target", "stable"

    def __init__(self, policy):
        self.served = type("Served", (), {"policy": policy})()


@pytest.mark.parametrize("unlogged", [False, True])
def test_the_next_answer_knows_what_the_last_one_described(both, unlogged):
    before, after = both
    view, codec = View(ViewConfig(max_users=10), CODEC), CODEC
    weights = Weights(before)
    service = Service(
        view=view,
        weights=weights,
        ranker=Ranker(weights, view, np.random.default_rng(0)),
        decisions=None,
        epsilon=0.0,
        exploration=policies.GREEDY,
        slate_size=2,
        max_streams=1,
        instance="test",
        now_ms=lambda: NOW,
    )
    offered = [
        pb.Candidate(item_id=c.item_id, category=c.category, price=c.price, vector=c.vector)
        for c in NEWS.values()
    ]
    (first,) = service.recommend([pb.RecommendRequest(user_id="ann", candidates=offered, unlogged=unlogged)])
    went = first.slate[0].item_id
    click = {
        "event_id": "e",
        "name": "select_item",
        "user_id": "ann",
        "timestamp": NOW,
        "items": [{"item_id": went}],
    }
    view.absorb(batch_of([codec.encode_event(click)]))
    request = pb.RecommendRequest(user_id="ann", slate_size=3, timestamp_ms=NOW + 500, unlogged=True)
    (answer,) = service.recommend([request])
    q = after.q(after.encode([[Entry(went, "select_item", NOW)]], [NOW + 500]))[0]
    for slot in answer.slate:
        assert slot.q == pytest.approx(q[int(after.ids([slot.item_id])[0])], rel=1e-4)
