"""Items that come with a request: what is said of them there is learnt from, and is gone on with after a restart."""

from __future__ import annotations

import numpy as np

from learner.agent_settings import AgentSettings
from learner.checkpoint import decode, encode
from learner.learner import Learner, LearnerSettings
from learner.networks import NO_PRICE
from learner.policy import Candidate, Policy
from learner.weights import Meta, WeightStore
from streaming.join_settings import JoinSettings
from streaming.log import RecordBatch
from streaming.schemas import Codec
from tests.test_learner import catalog_record

CODEC = Codec()
AGENT = AgentSettings(batch_size=32, dim=8, hidden=8, history_length=4, vector_dim=3, learning_rate=0.01)
SETTINGS = LearnerSettings(min_replay=100, updates_high=0.5, replay_capacity=5000)
NOON = 1_700_000_000_000


def new_learner():
    learner = Learner(SETTINGS, AGENT, JoinSettings(history_length=4), CODEC, 1)
    learner.assign({0: 0})
    return learner


class Feed:
    """Records of one partition."""

    def __init__(self):
        self.values, self.offset = [], 0

    def decide(self, name, slate, candidates, at_s, user="ann"):
        self.values.append(
            CODEC.encode_decision(
                {
                    "recommendation_id": name,
                    "user_id": user,
                    "timestamp": NOON + 1000 * at_s,
                    "slate": [{"item_id": item_id, "propensity": 0.5} for item_id in slate],
                    "candidates": candidates,
                }
            )
        )

    def click(self, name, item_id, at_s, user="ann"):
        self.values.append(
            CODEC.encode_event(
                {
                    "event_id": f"click {name}",
                    "name": "select_item",
                    "user_id": user,
                    "timestamp": NOON + 1000 * at_s,
                    "items": [{"item_id": item_id}],
                    "recommendation_id": name,
                }
            )
        )

    def batch(self):
        n, data = len(self.values), b"".join(self.values)
        bounds = np.cumsum([0, *map(len, self.values)])
        made = RecordBatch(
            np.zeros(n, np.int32),
            np.arange(self.offset, self.offset + n),
            np.zeros(n, np.int64),
            np.frombuffer(data, np.uint8),
            bounds,
            np.zeros(n, np.bool_),
            None,
        )
        self.values, self.offset = [], self.offset + n
        return made


def inline(item_id, **features):
    return {"item_id": item_id, "category": None, "brand": None, "price": None, "vector": []} | features


def of(learner, item_id):
    """Category, is priced, vector."""
    row = int(learner.vocabulary.ids([item_id])[0])
    assert row > 0
    items = learner.agent.items
    return int(items.category[row]), bool(items.price[row] > NO_PRICE), items.vector[row].tolist()


def test_what_a_request_says_of_an_item_shown_is_known_unless_the_catalog_says_otherwise():
    learner, feed = new_learner(), Feed()
    stocked = CODEC.encode_item({"item_id": "stocked", "category": "shoes", "vector": [9.0]})
    learner.take_catalog(catalog_record("stocked", stocked))
    learner.train(1)
    shoes = of(learner, "stocked")
    offered = [
        inline("fresh", category="news", price=3.0, vector=[1.0, 2.0, 3.0, 4.0]),
        inline("stocked", category="news", vector=[1.0]),
        inline("bare"),
        inline("not shown", category="news"),
    ]
    feed.decide("r1", ["fresh", "stocked", "bare"], offered, 0)
    learner.take(feed.batch())
    news = of(learner, "fresh")
    assert news[1:] == (True, [1.0, 2.0, 3.0])
    assert news[0] > 0
    assert of(learner, "stocked") == shoes
    assert of(learner, "bare") == (0, False, [0.0] * 3)
    assert int(learner.vocabulary.ids(["not shown"])[0]) == 0

    _, parts = learner.snapshot()
    again = new_learner()
    again.restore({name: decode(encode(part)) for name, part in parts.items()})
    again.take_catalog(catalog_record("stocked", stocked))  # as at every start
    again.train(1)
    assert of(again, "fresh") == news
    listed = CODEC.encode_item({"item_id": "fresh", "category": "shoes"})
    again.take_catalog(catalog_record("fresh", listed))
    again.train(1)
    assert of(again, "fresh") == (shoes[0], False, [0.0] * 3)
    feed.decide("r2", ["fresh"], [inline("fresh", category="news")], 60)
    again.take(feed.batch())
    assert of(again, "fresh")[0] == shoes[0]


def test_a_damaged_record_takes_nothing_along():
    learner, feed = new_learner(), Feed()
    feed.decide("r1", ["fresh"], [inline("fresh", vector=[1.0])], 0)
    feed.values[0] = feed.values[0][:-1]
    feed.decide("r2", ["other"], [inline("other", vector=[2.0])], 10)
    taken = learner.take(feed.batch())
    assert len(taken.bad.row) == 1
    assert of(learner, "other")[2] == [2.0, 0.0, 0.0]


def test_items_that_never_come_again_are_learnt_by_what_is_said_of_them(tmp_path):
    """Each page has four new items; whoever sees one with a first number of 1 clicks on it."""
    learner, feed, rng = new_learner(), Feed(), np.random.default_rng(0)
    for page in range(400):
        user, at = f"user {page % 40}", 20 * page
        good = rng.random(4) < 0.3
        offered = [inline(f"item {page} {k}", vector=[float(good[k]), float(rng.random())]) for k in range(4)]
        feed.decide(f"r{page}", [c["item_id"] for c in offered], offered, at, user)
        for k in np.flatnonzero(good)[:1]:
            feed.click(f"r{page}", offered[k]["item_id"], at + 5, user)
        if page % 50 == 49:
            learner.take(feed.batch())
            learner.train(10**9)
    assert learner.agent.updates > 500
    store = WeightStore(f"{tmp_path}/weights")
    told = Meta(settings=learner.agent.shape())
    version = store.publish(learner.agent.tensors(), told, learner.vocabulary).version
    policy = Policy.from_weights(store.load(version))
    brand_new = [Candidate(f"new {k}", vector=[float(k % 2), float(rng.random())]) for k in range(20)]
    q = policy.q_candidates(policy.encode([[]], [NOON]), brand_new)
    good, bad = q[1::2], q[::2]
    assert good.min() > bad.max() + 0.5  # a click earns one
    # four new items a page, and a click on three pages in four, for ever: no more than .76 / (1 - .97) = 25 can come,
    # and visits end; the best of all 1,600 that ever were would be four clicks a page
    assert learner.agent.offers == 4
    assert 0 < bad.max() < 25
