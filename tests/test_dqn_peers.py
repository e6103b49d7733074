"""The product and its peers in the Gymnasium shop: the same visits for all, and ours through its own doors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.dqn_peers import OneItem, Visits, bound, ours, peer, table
from benchmarks.gym_bridge.product import Setup, Shop
from benchmarks.other_python import PeerMissing
from benchmarks.shop_visits import Clock, Exam, Metered, Task, judged, opened
from serving import policy_pb2 as pb
from simulator.gym_shop import ShopEnv
from streaming.schemas import Codec

SHOP: dict[str, Any] = {"items": 60, "categories": 6, "brands": 8, "shoppers": 100}
TASK = Task("defaults", 1, 60, 0.0, 20, SHOP)


class Notebook:
    """A loop that writes down what reaches it, and shows one item after another."""

    cpu_s = 0.0

    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, Any]]] = []
        self.requests: list[pb.RecommendRequest] = []

    def start(self, storefront: Any, setup: Setup, seed: int) -> None:
        self.items = [item["item_id"] for item in storefront.catalog()]

    def publish(self, user_id: str, record: bytes) -> None:
        self.records.append((user_id, Codec().decode(record)[1]))

    def recommend(self, request: pb.RecommendRequest) -> pb.RecommendResponse:
        self.requests.append(pb.RecommendRequest.FromString(request.SerializeToString()))
        shown = pb.Slot(item_id=self.items[len(self.requests) % 60], propensity=1.0)
        return pb.RecommendResponse(recommendation_id=f"r{len(self.requests)}", slate=[shown])


def test_what_the_shop_publishes_is_told_in_its_order_and_a_returning_shopper_is_known() -> None:
    env, book = ShopEnv(**SHOP), Notebook()
    storefront = OneItem(env)
    visits = Visits(env, Clock(), storefront, Shop(book, storefront, Setup(), 1, returning=True), "user")
    earned = [visits.play(1), *(visits.play() for _ in range(200))]
    assert len(book.requests) == visits.interactions
    told: dict[str, list[dict[str, Any]]] = {}
    for user_id, event in book.records:
        told.setdefault(user_id, []).append(event)
    for events in told.values():
        times = [event["timestamp"] for event in events]
        assert times == sorted(times)
    clicks = [event for _, event in book.records if event["name"] == "select_item"]
    shown = {f"r{n + 1}": book.items[(n + 1) % 60] for n in range(len(book.requests))}
    assert clicks
    assert [event["items"][0]["item_id"] for event in clicks] == [
        shown[e["recommendation_id"]] for e in clicks
    ]
    assert sum(earned) > 0.9 * len(clicks), "a click earns 1"
    last = {request.user_id: request for request in book.requests}
    for user_id, request in last.items():
        before = [e for e in told[user_id] if e["timestamp"] <= request.timestamp_ms][-32:]
        assert [h.item_id for h in request.history] == [e["items"][0]["item_id"] for e in before]
    assert any(env.shop.visits().visit > 0), "somebody came again"


def test_ours_learns_through_its_own_doors_and_is_judged_on_visits_that_leave_no_trace() -> None:
    row = ours(TASK)
    assert 60 <= row["interactions"] < 60 + 25
    assert row["cpu_s"] > 0
    assert 0 <= row["score"] < 20


def test_all_are_judged_by_the_same_visits() -> None:
    one, again = (judged(TASK, lambda seen: 3) for _ in range(2))
    assert one == again
    assert len(one) == TASK.visits
    env = ShopEnv(**SHOP)
    env.reset(seed=1_000_001)
    flat = opened(SHOP, flat=True)
    flat.reset(seed=1_000_001)
    assert flat.unwrapped.turn.shopper == env.turn.shopper  # type: ignore[attr-defined]


def test_an_exam_is_taken_at_so_many_interactions_and_at_so_much_cpu_time_and_costs_nothing() -> None:
    metered = Metered(opened(SHOP, flat=True))
    exam = Exam(TASK, metered, lambda seen: 0)
    metered.reset(seed=1)
    for step in range(TASK.interactions):
        _, _, over, _, info = metered.step(np.int64(step % 60))
        assert info == {}
        done = exam.look()
        assert done == (step == TASK.interactions - 1)
        if over:
            metered.reset()
    assert {at: row["interactions"] for at, row in exam.rows.items()} == {"cpu": 1, "interactions": 60}
    assert exam.rows["interactions"]["cpu_s"] < 0.5, "neither the shop nor the exam counts"
    assert exam.rows["cpu"]["earned"] == exam.rows["interactions"]["earned"]


def test_a_peer_that_is_not_installed_says_how_to_install_it() -> None:
    with pytest.raises(PeerMissing, match=r"pip install stable-baselines3==2\.9\.2 tianshou"):
        peer("false", "tianshou", TASK)


def test_a_share_of_the_gap_is_taken_seed_by_seed() -> None:
    score = {"random": (0.0, 1.0), "greedy oracle": (2.0, 5.0), "ours, defaults": (1.0, 4.0)}
    rows = [{"agent": a, "seed": n, "score": s[n]} for a, s in score.items() for n in range(2)]
    for row in rows[-2:]:
        row.update(at="interactions", interactions=10, cpu_s=1.0, online=0.5)
    cells = [cell.strip() for cell in list(table(rows))[-1].split("|")]
    assert cells[1:4] == ["ours, defaults", "interactions", "2.50 ± 19.06"]
    assert cells[4].startswith("0.62 ±")
    assert cells[5:] == ["10", "1", "0.50", ""]


def test_who_knows_the_rules_is_a_bound() -> None:
    task = Task("random", 1, 0, 0.0, 150, {"items": 100})
    random, oracle = (
        bound(Task(name, 1, 0, 0.0, 150, task.shop))["score"] for name in ("random", "greedy oracle")
    )
    assert oracle > 2.5 * random > 0
