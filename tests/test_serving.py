"""The policy server as its callers meet it: a real process over a real log and real weights."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from learner.policy import Entry, Policy
from learner.weights import WeightStore
from serving import policy_pb2 as pb
from serving import policy_pb2_grpc
from serving.client import Client
from serving.server import ServingConfig
from streaming.log import Log, open_log, partition_of
from streaming.schemas import Codec
from tests.serving_process import ServerProcess, eventually, publish
from tests.test_requests import NAN, NOW_MS, OUTSIDE, entry, request

ITEMS = [f"item-{i}" for i in range(1, 31)]
RECOMMEND = "/bellwether.v1.Policy/Recommend"


class World(NamedTuple):
    """A log, a weight store and what stands between."""

    log: Log
    store: WeightStore
    weights_url: str
    codec: Codec
    ids: Iterator[int]

    def say(self, user: str, name: str, *item_ids: str, timestamp_ms: int = NOW_MS, **more: Any) -> None:
        """Publish one event."""
        event = {
            "event_id": f"e{next(self.ids)}",
            "name": name,
            "user_id": user,
            "timestamp": timestamp_ms,
            "items": [{"item_id": item_id, **more} for item_id in item_ids],
        }
        self._write("events", user, self.codec.encode_event(event))

    def stock(self, item_id: str, **fields: Any) -> None:
        """Publish one catalog item; `gone=True`: its tombstone."""
        value = None if fields.pop("gone", False) else self.codec.encode_item({"item_id": item_id, **fields})
        self._write("catalog", item_id, value)

    def _write(self, topic: str, key: str, value: bytes | None) -> None:
        producer = self.log.producer()
        producer.send(topic, key.encode(), value)
        producer.close()

    def decisions(self) -> dict[str, dict[str, Any]]:
        """Every decision in the log by its recommendation_id; each has it once, and in its user's partition."""
        bounds = self.log.bounds("events")
        reader = self.log.reader("events", {p: b.low for p, b in bounds.items()}, keys=True)
        found: dict[str, dict[str, Any]] = {}
        while len(batch := reader.poll(10_000, 0.2)):
            for i in range(len(batch)):
                value = batch.value(i)
                assert value is not None
                schema, record = self.codec.decode(value)
                if schema.endswith("Decision"):
                    assert record["recommendation_id"] not in found
                    assert batch.keys is not None
                    assert batch.keys[i] == record["user_id"].encode()
                    assert batch.partition[i] == partition_of(record["user_id"].encode(), len(bounds))
                    found[record["recommendation_id"]] = record
        reader.close()
        return found

    def decision(self, response: pb.RecommendResponse) -> dict[str, Any]:
        """The decision that this answer left behind."""
        found: dict[str, Any] = eventually(lambda: self.decisions().get(response.recommendation_id))
        return found

    def server(self, *arguments: str, log: bool = True) -> ServerProcess:
        logs = ["--log", self.log.url] if log else []
        return ServerProcess("--weights", self.weights_url, *logs, "--warm-up-s", "20", *arguments)


def make_world(folder: Path) -> World:
    log = open_log(f"sqlite:///{folder}/log.db")
    log.create_topic("events", 4)
    log.create_topic("catalog", 1, compacted=True)
    url = f"{folder}/weights"
    return World(log, WeightStore(url), url, Codec(), itertools.count(1))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path)
    yield made
    made.log.close()


@pytest.fixture(scope="module")
def channel(learned: tuple[World, ServerProcess, Client]) -> Iterator[grpc.Channel]:
    """To the shared server, without any code of ours or of the contract between."""
    with grpc.insecure_channel(learned[1].target, [("grpc.max_send_message_length", -1)]) as made:
        yield made


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, ServerProcess, Client]]:
    """A server with weights and a catalog of ITEMS, shared by tests that leave it as it is."""
    world = make_world(tmp_path_factory.mktemp("learned"))
    for item_id in ITEMS:
        world.stock(item_id, category="c", price=10.0)
    publish(
        world.store,
        ITEMS,
        seed=1,
        step=70,
        last_target_sync_step=50,
        positions={0: 7, 2: 9},
        events_through_ms=5,
    )
    with world.server("--epsilon", "0.2", "--seed", "7") as server, server.client() as client:
        yield world, server, client
    world.log.close()


def ask(user: str = "u", **fields: Any) -> pb.RecommendRequest:
    return pb.RecommendRequest(user_id=user, **{"timestamp_ms": NOW_MS, **fields})


def shown(response: pb.RecommendResponse) -> list[str]:
    return [slot.item_id for slot in response.slate]


def refused(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value


# --- before the first weights ----------------------------------------------------------------------------


def test_before_the_first_weights_the_popular_items_are_served_and_it_says_so(world: World) -> None:
    with world.server("--epsilon", "0") as server, server.client() as client:
        empty = client.recommend(ask())
        assert (shown(empty), empty.strategy, empty.policy_version) == ([], pb.POPULARITY, 0)
        for user in range(5):
            for item_id in ITEMS[: user + 1]:
                world.say(f"shopper-{user}", "select_item", item_id)
        popular = eventually(
            lambda: (r := client.recommend(ask(slate_size=5))) and shown(r) == ITEMS[:5] and r
        )
        assert all(slot.q == 0 and not slot.explored and slot.propensity == 1 for slot in popular.slate)
        decision = world.decision(popular)
        assert (decision["strategy"], decision["policy_version"]) == ("POPULARITY", 0)
        assert empty.recommendation_id not in world.decisions()  # nothing was shown, nothing decided
        policy = client.policy()
        assert (policy.policy_version, policy.strategy, policy.age_s, policy.items) == (
            0,
            pb.POPULARITY,
            0,
            5,
        )

        world.stock(ITEMS[0], in_stock=False)
        world.stock(ITEMS[1], gone=True)
        eventually(lambda: shown(client.recommend(ask(slate_size=5))) == ITEMS[2:5])
        world.stock(ITEMS[0], in_stock=True)
        eventually(lambda: shown(client.recommend(ask(slate_size=5))) == [ITEMS[0], *ITEMS[2:5]])
        only = [pb.Candidate(item_id=item_id) for item_id in ("never-seen", ITEMS[4], ITEMS[3], ITEMS[1])]
        ranked = client.recommend(ask(candidates=only, exclude_item_ids=[ITEMS[4]]))
        assert shown(ranked) == [ITEMS[3], "never-seen"]

        publish(world.store, ITEMS)
        started = time.monotonic()
        eventually(lambda: client.recommend(ask()).strategy == pb.LEARNED)
        assert time.monotonic() - started < 1.0  # "weights swapped whole within a second of publishing"


def test_without_a_log_it_answers_and_writes_nothing(world: World) -> None:
    publish(world.store, ITEMS)
    with world.server(log=False) as server, server.client() as client:
        response = client.recommend(ask(history=[pb.HistoryEntry(item_id=ITEMS[0])]))
        assert (len(response.slate), response.strategy) == (10, pb.LEARNED)
        assert server.terminate() == 0
    assert world.decisions() == {}


# --- answers and the decisions they leave ----------------------------------------------------------------


def test_a_decision_says_what_was_served_to_whom_and_how(
    learned: tuple[World, ServerProcess, Client],
) -> None:
    world, _, client = learned
    history = [
        pb.HistoryEntry(item_id=ITEMS[0], timestamp_ms=NOW_MS - 5000),
        pb.HistoryEntry(item_id="not in the catalog", name="add_to_cart", value=2.5),
    ]
    response = client.recommend(ask("ünïcode", session_id="s", history=history, slate_size=4, epsilon=0.5))
    decision = world.decision(response)
    assert decision == {
        "recommendation_id": response.recommendation_id,
        "user_id": "ünïcode",
        "session_id": "s",
        "timestamp": NOW_MS,
        "history": [
            {"item_id": ITEMS[0], "name": "view_item", "timestamp": NOW_MS - 5000, "value": 0.0},
            {"item_id": "not in the catalog", "name": "add_to_cart", "timestamp": NOW_MS, "value": 2.5},
        ],
        "slate": [{"item_id": slot.item_id, "propensity": slot.propensity} for slot in response.slate],
        "epsilon": 0.5,
        "policy_version": 1,
        "strategy": "LEARNED",
        "bucket": "",
        "candidates": None,
    }
    assert len(response.slate) == 4
    assert response.epsilon == 0.5


@pytest.mark.parametrize("kind", ["boltzmann", "thompson"])
def test_another_exploration_is_what_a_decision_says_and_its_propensities_are_how_often_items_come(
    world: World, kind: str
) -> None:
    publish(world.store, ITEMS)
    flags = ("--exploration", kind, "--epsilon", "0.1", "--temperature", "0.4", "--thompson-scale", "2")
    with world.server(*flags, "--slate-size", "1") as server, server.client() as client:
        told = {"boltzmann": "boltzmann temperature=0.4", "thompson": "thompson scale=2"}[kind]
        assert client.policy().exploration == told
        answers = [client.recommend(ask("p")) for _ in range(300)]
        few = [pb.Candidate(item_id=item_id) for item_id in ITEMS[:5]]
        answers += [client.recommend(ask("p", candidates=few)) for _ in range(300)]
        greedy = [client.recommend(ask("p", epsilon=0.0)) for _ in range(20)]
        decision = world.decision(answers[0])
    assert decision["epsilon"] == 0.0  # it is not ε-greedy, and `learner evaluate` must not take it for that
    assert decision["slate"][0]["propensity"] == answers[0].slate[0].propensity
    assert {(answer.epsilon, answer.exploration) for answer in answers} == {(0.1, told)}
    # what is asked for without exploration is the best, whatever the server explores by
    assert len({answer.slate[0].item_id for answer in greedy}) == 1
    assert {(answer.slate[0].propensity, answer.exploration) for answer in greedy} == {(1.0, "")}
    for items, some in ((30, answers[:300]), (5, answers[300:])):
        slots = [answer.slate[0] for answer in some]
        assert len({slot.item_id for slot in slots}) > 2
        chance = np.array([slot.propensity for slot in slots])
        assert ((chance > 0) & (chance <= 1)).all()
        first = [slot.propensity for slot in slots if slot.item_id == slots[0].item_id]
        if kind == "boltzmann":  # the same user, the same chances
            assert first == pytest.approx([first[0]] * len(first), rel=1e-4)
            by_item = {slot.item_id: slot.propensity for slot in slots}
            for item_id, p in by_item.items():
                seen = sum(slot.item_id == item_id for slot in slots)
                assert abs(seen - 300 * p) <= 5 * max(1.0, (300 * p * (1 - p)) ** 0.5)
        else:  # sixteen draws, or a uniform one
            at = (chance - 0.1 / items) / 0.9 * 16
            np.testing.assert_allclose(at, at.round(), atol=1e-4)


def test_slates_are_ranked_by_the_q_values_of_the_weights(
    learned: tuple[World, ServerProcess, Client],
) -> None:
    world, _, client = learned
    policy = Policy.from_weights(world.store.load(1))
    history = [Entry(ITEMS[3], "view_item", NOW_MS - 60_000, 10.0), Entry(ITEMS[5], "purchase", NOW_MS, 0.0)]
    q = policy.q(policy.encode([history], [NOW_MS]))[0]
    sent = [
        pb.HistoryEntry(item_id=e.item_id, name=e.name, timestamp_ms=e.timestamp_ms, value=e.value)
        for e in history
    ]
    response = client.recommend(ask(history=sent, slate_size=30, epsilon=0.0))
    best = [i for i in np.argsort(-q[1:], kind="stable") + 1 if policy.item_id(int(i)) != ITEMS[5]]
    assert shown(response) == [policy.item_id(int(i)) for i in best]  # all but the one just bought
    assert [slot.q for slot in response.slate] == pytest.approx([float(q[i]) for i in best], abs=1e-5)


def test_propensities_are_exact(learned: tuple[World, ServerProcess, Client]) -> None:
    _, _, client = learned
    every = client.recommend(ask("p", slate_size=3, epsilon=1.0))
    assert [slot.propensity for slot in every.slate] == pytest.approx([1 / 30, 1 / 29, 1 / 28])
    assert all(slot.explored for slot in every.slate)
    greedy = shown(client.recommend(ask("p", slate_size=1, epsilon=0.0)))
    answers = [client.recommend(ask("p", slate_size=1)) for _ in range(400)]
    for answer in answers:
        expected = 0.2 / 30 + (0.8 if shown(answer) == greedy else 0.0)
        assert answer.slate[0].propensity == pytest.approx(expected)
        assert answer.epsilon == 0.2
    # binomial(400, .807): below 280 or above 365 less than once in ten million runs
    assert 280 < sum(shown(answer) == greedy for answer in answers) < 365


def test_excluded_and_seen_items_are_left_out(learned: tuple[World, ServerProcess, Client]) -> None:
    _, _, client = learned
    history = [pb.HistoryEntry(item_id=ITEMS[0]), pb.HistoryEntry(item_id=ITEMS[1])]
    out = {*ITEMS[10:], "not in the catalog"}
    answer = client.recommend(ask(history=history, exclude_item_ids=out, slate_size=100))
    assert set(shown(answer)) == set(ITEMS[:10])
    answer = client.recommend(ask(history=history, exclude_item_ids=out, slate_size=100, exclude_seen=True))
    assert set(shown(answer)) == set(ITEMS[2:10])
    nothing = client.recommend(ask(exclude_item_ids=ITEMS))
    assert (shown(nothing), nothing.strategy) == ([], pb.LEARNED)


def test_state_comes_from_the_log_where_the_request_brings_none(
    learned: tuple[World, ServerProcess, Client],
) -> None:
    world, _, client = learned
    world.say("logged", "view_item", ITEMS[2], timestamp_ms=NOW_MS - 2000, price=10.0, quantity=2)
    world.say("logged", "purchase", ITEMS[4], timestamp_ms=NOW_MS - 1000, price=10.0)
    world.say("logged", "search", timestamp_ms=NOW_MS)

    def history() -> list[dict[str, Any]]:
        response = client.recommend(ask("logged", slate_size=30))
        found: list[dict[str, Any]] = (
            world.decision(response)["history"] if ITEMS[4] not in shown(response) else []
        )
        return found

    assert eventually(history) == [
        {"item_id": ITEMS[2], "name": "view_item", "timestamp": NOW_MS - 2000, "value": 20.0},
        {"item_id": ITEMS[4], "name": "purchase", "timestamp": NOW_MS - 1000, "value": 10.0},
    ]
    later = client.recommend(ask("logged", slate_size=30, timestamp_ms=NOW_MS + 40 * 86_400_000))
    assert ITEMS[4] in shown(later)  # bought long ago
    world.say("logged", "refund", ITEMS[4], timestamp_ms=NOW_MS)
    eventually(lambda: ITEMS[4] in shown(client.recommend(ask("logged", slate_size=30))))


def test_candidates_come_with_features_of_their_own(learned: tuple[World, ServerProcess, Client]) -> None:
    world, _, client = learned
    candidates = [
        pb.Candidate(item_id="fresh news", category="c", brand="b", price=0.0, vector=[0.5, -0.5]),
        pb.Candidate(item_id="other news", category="d", vector=[3.0] * 256),
        pb.Candidate(item_id=ITEMS[7]),
        pb.Candidate(item_id=ITEMS[8]),
    ]
    response = client.recommend(ask(candidates=candidates, exclude_item_ids=[ITEMS[8]], epsilon=0.0))
    assert sorted(shown(response)) == sorted(["fresh news", "other news", ITEMS[7]])
    qs = [slot.q for slot in response.slate]
    assert qs == sorted(qs, reverse=True)
    assert len(set(qs)) == 3
    kept = world.decision(response)["candidates"]
    assert kept[0] == {
        "item_id": "fresh news",
        "category": "c",
        "brand": "b",
        "price": 0.0,
        "vector": [0.5, -0.5],
    }
    assert kept[2] == {"item_id": ITEMS[7], "category": None, "brand": None, "price": None, "vector": []}
    assert len(kept) == 4


def test_an_unlogged_answer_leaves_no_decision(learned: tuple[World, ServerProcess, Client]) -> None:
    world, _, client = learned
    quiet = client.recommend(ask("quiet", unlogged=True))
    loud = client.recommend(ask("quiet"))
    world.decision(loud)
    assert len(quiet.slate) == 10
    assert quiet.recommendation_id not in world.decisions()


def test_answers_stand_in_the_order_of_their_requests(learned: tuple[World, ServerProcess, Client]) -> None:
    world, _, client = learned
    requests = [ask(f"user-{i}", slate_size=1 + i % 7) for i in range(200)]
    for answers in (client.batch(requests), list(client.stream(requests))):
        assert [len(answer.slate) for answer in answers] == [1 + i % 7 for i in range(200)]
        ids = [answer.recommendation_id for answer in answers]
        decisions = eventually(lambda ids=ids: (d := world.decisions()).keys() >= set(ids) and d)
        assert [decisions[i]["user_id"] for i in ids] == [request.user_id for request in requests]


def test_get_policy_says_what_is_served(learned: tuple[World, ServerProcess, Client]) -> None:
    _, _, client = learned
    policy = client.policy()
    assert (policy.policy_version, policy.step, policy.last_target_sync_step) == (1, 70, 50)
    assert [(p.partition, p.next_offset) for p in policy.positions] == [(0, 7), (2, 9)]
    assert (policy.network, policy.label, policy.strategy) == ("target", "stable", pb.LEARNED)
    assert (policy.epsilon, policy.items, policy.events_through_ms) == (0.2, 30, 5)
    assert 0 < policy.age_s < 600
    assert policy.published_ms > NOW_MS


# --- wrong input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "bound", "change"), OUTSIDE)
def test_wrong_input_is_the_callers_fault_by_field_and_bound(
    learned: tuple[World, ServerProcess, Client], where: str, bound: str, change: Any
) -> None:
    error = refused(lambda: learned[2].recommend(request(change)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(where)
    assert bound in error.details()


def test_a_bad_request_fails_its_batch_by_position(learned: tuple[World, ServerProcess, Client]) -> None:
    world, _, client = learned
    error = refused(lambda: client.batch([ask("in a bad batch"), request(entry("value", NAN))]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("requests[1].history[0].value: nan")
    assert refused(lambda: client.batch([])).code() is grpc.StatusCode.INVALID_ARGUMENT
    world.decision(client.recommend(ask("after the bad batch")))
    assert not [d for d in world.decisions().values() if d["user_id"] == "in a bad batch"]


def test_a_bad_request_ends_its_stream_after_the_answers_before_it(
    learned: tuple[World, ServerProcess, Client],
) -> None:
    answers = learned[2].stream([ask(), ask(), ask(""), ask()])
    assert [len(next(answers).slate) for _ in range(2)] == [10, 10]
    error = refused(lambda: next(answers))
    assert (error.code(), error.details()[:7]) == (grpc.StatusCode.INVALID_ARGUMENT, "user_id")


RPCS = {
    "Recommend": pb.RecommendRequest,
    "BatchRecommend": pb.BatchRecommendRequest,
    "GetPolicy": pb.GetPolicyRequest,
}
TEXT = st.one_of(st.sampled_from(["", "u", "\0", "x" * 1025, *ITEMS]), st.text(max_size=5))
NUMBER = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, NAN, float("inf"), -float("inf"), 1e9, 3e38]), st.floats(width=32)
)
TIME = st.sampled_from([0, 1, -1, NOW_MS, NOW_MS // 1000, 2**63 - 1, -(2**63)])
HISTORY = st.builds(pb.HistoryEntry, item_id=TEXT, name=TEXT, timestamp_ms=TIME, value=NUMBER)
CANDIDATE = st.builds(
    pb.Candidate,
    item_id=TEXT,
    category=TEXT,
    brand=TEXT,
    price=st.one_of(st.none(), NUMBER),
    vector=st.one_of(st.lists(NUMBER, max_size=3), st.just([0.5] * 257)),
)
REQUEST = st.builds(
    pb.RecommendRequest,
    user_id=TEXT,
    session_id=TEXT,
    slate_size=st.sampled_from([0, 1, 1000, 1001, 2**32 - 1]),
    history=st.one_of(st.lists(HISTORY, max_size=3), st.just([pb.HistoryEntry(item_id="a")] * 1001)),
    candidates=st.lists(CANDIDATE, max_size=3),
    exclude_item_ids=st.one_of(st.lists(TEXT, max_size=3), st.just(["a"] * 10_001)),
    timestamp_ms=TIME,
    epsilon=st.one_of(st.none(), NUMBER, st.floats(0, 1)),
    exclude_seen=st.booleans(),
    unlogged=st.just(True),
)
MESSAGES = {
    "Recommend": REQUEST,
    "BatchRecommend": st.builds(pb.BatchRecommendRequest, requests=st.lists(REQUEST, max_size=3)),
    "GetPolicy": st.just(pb.GetPolicyRequest()),
}


@st.composite
def mangled(draw: st.DrawFn) -> tuple[str, bytes]:
    """A call: bytes of any kind, or of a message with some fields out of bounds, or of one that was damaged."""
    rpc = draw(st.sampled_from(list(RPCS)))
    if draw(st.booleans()):
        return rpc, draw(st.binary(max_size=80))
    data = bytearray(draw(MESSAGES[rpc]).SerializeToString())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3])) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return rpc, bytes(data[: draw(st.sampled_from([len(data), len(data), len(data) // 2]))])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=mangled())
def test_no_bytes_make_it_fail_by_its_own_fault(
    learned: tuple[World, ServerProcess, Client], channel: grpc.Channel, call: tuple[str, bytes]
) -> None:
    rpc, data = call
    answer = channel.unary_unary(f"/bellwether.v1.Policy/{rpc}").future(data, timeout=20)
    assert answer.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), answer.details()
    if answer.code() is grpc.StatusCode.INVALID_ARGUMENT:
        assert re.match(r"(request|requests|[a-z_]+[\w.\[\] ]*): ", answer.details())


def test_bytes_that_are_no_utf8_are_the_callers_fault(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/bellwether.v1.Policy/Recommend").future(b"\x0a\x02\xff\xfe", timeout=10)
    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert call.details().startswith("request: 4 bytes that are no RecommendRequest")


def test_the_largest_request_allowed_is_answered(learned: tuple[World, ServerProcess, Client]) -> None:
    largest = ask(
        "u" * 1024,
        history=[pb.HistoryEntry(item_id=f"{i:01024}", value=1.0) for i in range(1000)],
        candidates=[
            pb.Candidate(item_id=f"c{i}", category="c", price=1.0, vector=[0.5] * 256) for i in range(10_000)
        ],
        exclude_item_ids=[f"x{i}" for i in range(10_000)],
        slate_size=1000,
    )
    with learned[1].client(timeout_s=60.0) as client:
        assert len({slot.item_id for slot in client.recommend(largest).slate}) == 1000


def test_a_stream_too_many_is_turned_away_and_calls_go_on(world: World) -> None:
    publish(world.store, ITEMS)
    with world.server("--max-streams", "1", "--threads", "2") as server, server.client() as client:
        gate = threading.Event()

        def requests() -> Iterator[pb.RecommendRequest]:
            yield ask()
            gate.wait(20)

        first = client.stream(requests())
        next(first)
        error = refused(lambda: next(client.stream([ask()])))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "--max-streams" in error.details()
        with server.channel() as channel:
            reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
            question = reflection_pb2.ServerReflectionRequest(list_services="")
            error = refused(lambda: next(reflect(iter([question]))))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # it takes a thread as well
        assert len(client.recommend(ask()).slate) == 10
        gate.set()
        assert list(first) == []
        assert eventually(lambda: _streams(client))


def test_calls_too_many_are_turned_away_at_once(world: World) -> None:
    publish(world.store, ITEMS)
    flags = ("--threads", "1", "--max-streams", "0", "--max-calls", "2")
    with world.server(*flags) as server, server.client(retries=0) as client:
        stub, large = client._stub(), pb.BatchRecommendRequest(requests=[ask()] * 500)
        calls = [stub.BatchRecommend.future(large, timeout=60) for _ in range(10)]
        codes = [call.code() for call in calls]
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert codes.count(grpc.StatusCode.OK) < 10
        assert len(client.recommend(ask()).slate) == 10


def _streams(client: Client) -> bool:
    with contextlib.suppress(grpc.RpcError):
        return len(next(client.stream([ask()])).slate) == 10
    return False


# --- operations ------------------------------------------------------------------------------------------


def test_health_and_reflection_answer_clients_that_are_not_ours(
    learned: tuple[World, ServerProcess, Client],
) -> None:
    with learned[1].channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "bellwether.v1.Policy"):
            response = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([question]))
        names = {service.name for service in answer.list_services_response.service}
        assert {"bellwether.v1.Policy", "grpc.health.v1.Health"} <= names
        question = reflection_pb2.ServerReflectionRequest(file_containing_symbol="bellwether.v1.Policy")
        (answer,) = stub.ServerReflectionInfo(iter([question]))
        assert b"RecommendStream" in answer.file_descriptor_response.file_descriptor_proto[0]
        question = reflection_pb2.ServerReflectionRequest(
            file_containing_symbol="bellwether.v1.Policy.Recommend"
        )
        (answer,) = stub.ServerReflectionInfo(iter([question]))  # a method: ghz asks for nothing else
        assert b"RecommendStream" in answer.file_descriptor_response.file_descriptor_proto[0]
        question = reflection_pb2.ServerReflectionRequest(
            file_containing_symbol="bellwether.v1.Policy.Nothing"
        )
        (answer,) = stub.ServerReflectionInfo(iter([question]))
        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_grpcurl_finds_its_way_by_reflection_alone(learned: tuple[World, ServerProcess, Client]) -> None:
    program = shutil.which("grpcurl")
    if program is None:
        pytest.skip("!!! NO CLIENT BUT OURS WAS TESTED: grpcurl is not on PATH")
    target = learned[1].target

    def grpcurl(*arguments: str) -> Any:
        done = subprocess.run([program, "-plaintext", *arguments], capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else done.stderr

    assert "bellwether.v1.Policy" in grpcurl(target, "list").split()
    assert "rpc Recommend (" in grpcurl(target, "describe", "bellwether.v1.Policy.Recommend")
    data = '{"user_id": "grpcurl", "slate_size": 3, "epsilon": 0}'
    answer = json.loads(grpcurl("-d", data, target, "bellwether.v1.Policy/Recommend"))
    assert (len(answer["slate"]), answer["strategy"], answer["policy_version"]) == (3, "LEARNED", "1")
    assert json.loads(grpcurl(target, "bellwether.v1.Policy/GetPolicy"))["items"] == 30
    assert json.loads(grpcurl(target, "grpc.health.v1.Health/Check"))["status"] == "SERVING"
    refusal = grpcurl("-d", '{"user_id": "u", "epsilon": 2}', target, "bellwether.v1.Policy/Recommend")
    assert "InvalidArgument" in refusal
    assert "epsilon: 2.0; must be within 0..1" in refusal


class Load:
    """Threads that ask without a pause until told to stop; every answer is kept."""

    def __init__(self, target: str, threads: int = 6) -> None:
        self.target = target
        self.answers: list[pb.RecommendResponse] = []
        self.errors: list[grpc.StatusCode] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(t,)) for t in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, t: int) -> None:
        with grpc.insecure_channel(self.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = policy_pb2_grpc.PolicyStub(channel)
            i = 0
            while not self._stop.is_set():
                i += 1
                history = [pb.HistoryEntry(item_id=ITEMS[i % 30])]
                try:
                    answer = stub.Recommend(
                        ask(f"load-{t}", history=history, slate_size=8, epsilon=0.0), timeout=10
                    )
                    self.answers.append(answer)
                except grpc.RpcError as error:
                    self.errors.append(error.code())
                    return

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()


def test_a_drain_finishes_what_was_begun_and_loses_no_decision(world: World) -> None:
    publish(world.store, ITEMS)
    with world.server() as server, server.channel() as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        load = Load(server.target)
        eventually(lambda: len(load.answers) > 300)
        statuses: list[int] = []

        def listen() -> None:
            with contextlib.suppress(grpc.RpcError):
                statuses.extend(response.status for response in watch)

        listener = threading.Thread(target=listen)
        listener.start()
        assert server.terminate() == 0
        load.stop()
        listener.join(10)
        assert "drained" in server.stderr()
    assert set(load.errors) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert statuses[:1] == [health_pb2.HealthCheckResponse.NOT_SERVING]
    assert len(load.answers) > 300
    assert {answer.recommendation_id for answer in load.answers} <= world.decisions().keys()


def test_a_drain_that_loses_a_decision_ends_with_1_and_says_how_many(tmp_path: Path) -> None:
    log = open_log(f"sqlite:///{tmp_path}/log.db")
    log.create_topic("catalog", 1, compacted=True)  # and no topic for decisions
    log.close()
    publish(WeightStore(f"{tmp_path}/weights"), ITEMS)
    asked: queue.Queue[pb.RecommendRequest | None] = queue.Queue()
    with (
        ServerProcess("--weights", f"{tmp_path}/weights", "--log", log.url) as server,
        server.client() as client,
    ):
        answers = client.stream(iter(asked.get, None))
        asked.put(ask())
        assert next(answers).slate
        eventually(lambda: "1 decisions lost" in server.stderr())
        time.sleep(1.0)  # until the stream waits for its next request
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: "draining" in server.stderr())
        asked.put(ask())
        assert next(answers).slate
        asked.put(None)
        assert server.process.wait(30) == 1
        assert "1 decisions were dropped or lost while all was to end" in server.stderr().splitlines()[-1]


def test_new_weights_under_load_are_swapped_whole(world: World) -> None:
    publish(world.store, ITEMS, seed=0)
    policies: dict[int, Policy] = {1: Policy.from_weights(world.store.load(1))}
    with world.server() as server:
        load = Load(server.target)
        for seed in range(1, 16):
            version = publish(world.store, ITEMS, seed=seed)
            policies[version] = Policy.from_weights(world.store.load(version))
            time.sleep(0.15)
        with server.client() as client:
            eventually(lambda: client.policy().policy_version == 16)
        load.stop()
        assert server.terminate() == 0
    assert load.errors == []
    versions = {answer.policy_version for answer in load.answers}
    assert len(versions) >= 5
    q = {
        (version, item_id): policy.q(policy.encode([[Entry(item_id, "view_item", NOW_MS)]], [NOW_MS]))[0]
        for version, policy in policies.items()
        for item_id in ITEMS
    }
    decisions = world.decisions()
    for answer in load.answers:  # each q of each answer is that of the one version it names
        history = decisions[answer.recommendation_id]["history"]
        expected = q[answer.policy_version, history[0]["item_id"]]
        best = np.argsort(-expected[1:], kind="stable")[:8]
        assert shown(answer) == [ITEMS[i] for i in best]
        assert [slot.q for slot in answer.slate] == pytest.approx(expected[best + 1].tolist(), abs=1e-4)


@pytest.mark.parametrize(("threads", "streams"), [(1, 0), (2, 1), (8, 4), (32, 16)])
def test_streams_leave_threads_for_other_calls_however_few_there_are(threads: int, streams: int) -> None:
    assert ServingConfig("weights", threads=threads).streams == streams
    assert ServingConfig("weights", threads=threads, max_streams=0).streams == 0
    with pytest.raises(ValueError, match="max_streams must be within"):
        ServingConfig("weights", threads=threads, max_streams=threads)


def test_load_adds_no_threads(world: World) -> None:
    publish(world.store, [f"item-{i}" for i in range(1000)])
    with world.server("--threads", "17") as server, server.client(connections=4) as client:
        publish(world.store, [f"item-{i}" for i in range(1000)], seed=1)
        eventually(lambda: client.policy().policy_version == 2)
        threads = Path(f"/proc/{server.process.pid}/task")
        before = len(list(threads.iterdir()))
        for _ in range(10):
            answers = [client.recommend_future(pb.RecommendRequest(user_id=f"u{n}")) for n in range(100)]
            assert all(answer.result().slate for answer in answers)
        # gRPC's own few come as it needs them
        assert len(list(threads.iterdir())) <= before + 4


def test_damaged_weights_are_refused_and_the_ones_in_use_stay(world: World) -> None:
    in_use = publish(world.store, ITEMS, seed=0)
    with world.server() as server, server.client() as client:
        damaged = publish(world.store, ITEMS, seed=1, label=None)
        path = Path(world.weights_url) / f"{world.store.manifest(damaged).tensors_sha256}.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        world.store.set_label("stable", damaged)
        eventually(lambda: f"weights refused, version {in_use} stays in use" in server.stderr())
        assert client.policy().policy_version == in_use
        assert client.recommend(ask()).policy_version == in_use
        good = publish(world.store, ITEMS, seed=2)
        eventually(lambda: client.policy().policy_version == good)
        world.store.set_label("stable", in_use)  # an operator goes back
        eventually(lambda: client.policy().policy_version == in_use)


def test_several_processes_share_a_port_and_one_that_dies_is_replaced(world: World) -> None:
    publish(world.store, ITEMS)
    with world.server("--processes", "2") as server, server.client(connections=12) as client:
        client.wait(30)

        def instances() -> set[str]:
            return {client.recommend(ask()).recommendation_id.split("-")[0] for _ in range(48)}

        assert len(eventually(lambda: len(instances()) == 2 and instances())) == 2
        (first, *_) = children(server.process.pid)
        first.kill()
        eventually(lambda: "starting another" in server.stderr())
        eventually(lambda: len(children(server.process.pid)) >= 2, timeout_s=30)
        answer = client.recommend(ask("after the loss"))
        assert server.terminate(60) == 0
    assert answer.recommendation_id in world.decisions()


class Child(NamedTuple):
    pid: int

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def children(parent: int) -> list[Child]:
    """Server processes below this one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
            if int(fields[1]) == parent and b"spawn_main" in command and fields[0] != "Z":
                found.append(Child(int(stat.parent.name)))
    return found


def test_a_server_killed_outright_knows_its_users_again_after_a_restart(world: World) -> None:
    publish(world.store, ITEMS)
    world.say("u", "purchase", ITEMS[0])
    with world.server() as server, server.client() as client:
        eventually(lambda: ITEMS[0] not in shown(client.recommend(ask(slate_size=30))))
        server.process.kill()
    with world.server() as server, server.client() as client:
        assert ITEMS[0] not in shown(client.recommend(ask(slate_size=30)))  # caught up before the port opened


def test_it_listens_on_ipv6(world: World) -> None:
    with world.server("--host", "::", "--processes", "2") as server:
        with Client(f"[::1]:{server.port}") as client:
            client.wait(30)
            assert client.policy().label == "stable"
        assert server.terminate() == 0


def test_metrics_are_there_for_prometheus(world: World) -> None:
    publish(world.store, ITEMS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with world.server("--metrics-port", str(port)) as server, server.client() as client:
        client.recommend(ask(slate_size=len(ITEMS) // 2))
        client.recommend(ask(unlogged=True, slate_size=len(ITEMS)))  # shown to nobody
        refused(lambda: client.recommend(ask("")))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            text = response.read().decode()
    for line in (
        'serving_requests_total{code="OK",rpc="Recommend"} 2.0',
        'serving_requests_total{code="INVALID_ARGUMENT",rpc="Recommend"} 1.0',
        'serving_decisions_total{fate="queued"} 1.0',
        "serving_policy_version 1.0",
        "serving_shown_coverage 1.0",  # as many items as there were slots
        "serving_shown_gini 0.5",  # half of the items have all
    ):
        assert line in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--epsilon", "2"], "serving: epsilon must be within 0..1, not 2.0"),
        (
            ["--processes", "4", "--metrics-port", "65533"],
            "serving: metrics_port must be within 0..65532, not 65533",
        ),
        (
            ["--popularity-half-life", "0.0005"],
            "serving: popularity_half_life must be >= 0.01, not 0.0005",
        ),
        (["--epsilom", "0.1"], "serving: no such flag --epsilom; did you mean '--epsilon'?"),
        (["--network", "offline"], "serving: --network: no such choice 'offline'; did you mean 'online'?"),
        (
            ["--log", "redis://x"],
            "serving: 'redis://x' is no log; use kafka://host:9092 or sqlite:///path.db",
        ),
        (
            ["--weights", "nosuch://x"],
            "serving: argument --weights: cannot open 'nosuch://x': Protocol not known: nosuch",
        ),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from serving.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["--weights", "w", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("wrong", [{"retries": 5}, {"retries": -1}, {"connections": 0}])
def test_a_client_that_cannot_be_is_refused_when_it_is_made(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
        Client("127.0.0.1:1", **wrong)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--log", "kafka://localhost:9092", "--kafka", "no.such=1"], "no.such"),
        (["--log", "kafka://"], "'kafka://' names no server"),
        (["--log", "sqlite:///l.db?foo=1"], "'foo=1' is no option"),
        (["--log", "sqlite:///no/such/l.db"], "no/such/l.db"),
    ],
)
def test_a_log_that_cannot_be_opened_ends_it_in_one_line(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from serving.__main__ import main

    (tmp_path / "no").write_text("a file")
    monkeypatch.chdir(tmp_path)
    assert main(["--weights", "w", *arguments]) == 1
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


def test_a_taken_port_ends_it_in_one_line(learned: tuple[World, ServerProcess, Client]) -> None:
    world, server, _ = learned
    for processes in ("1", "2"):
        second = ServerProcess(
            "--weights", world.weights_url, "--processes", processes, "--port", str(server.port)
        )
        with pytest.raises(AssertionError, match=f"cannot listen on 127.0.0.1:{server.port}"):
            second.__enter__()
        assert second.process.returncode == 1
        second.__exit__(None, None, None)
