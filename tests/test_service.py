"""Requests → answers, over a real gRPC server in this process."""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from learner.exploration import GREEDY, Exploration
from learner.weights import WeightStore
from serving import policy_pb2 as pb
from serving import policy_pb2_grpc
from serving.batching import DeadlinePassed
from serving.decisions import DecisionWriter
from serving.metrics import REQUESTS, expose
from serving.ranking import Answer, Query, Ranker
from serving.server import listen
from serving.service import Service
from serving.view import View, ViewConfig
from serving.weights import WeightsFollower
from streaming.chunks import batch_of
from streaming.schemas import Codec
from tests.serving_process import publish
from tests.test_decisions import Scripted

NOW_MS = 1_700_000_000_000


def service_of(folder: Path, **changes: Any) -> Service:
    """One with the weights in this folder, if any, and without a log."""
    view = View(ViewConfig(max_users=10), Codec())
    weights = WeightsFollower(str(folder), "stable", "target", 60.0)
    weights.look()
    settings: dict[str, Any] = {
        "view": view,
        "weights": weights,
        "ranker": Ranker(weights, view, np.random.default_rng(0)),
        "decisions": None,
        "epsilon": 0.0,
        "exploration": GREEDY,
        "slate_size": 2,
        "max_streams": 1,
        "instance": "test",
        "now_ms": lambda: NOW_MS,
    }
    return Service(**settings | changes)


@contextlib.contextmanager
def stub_of(service: Service) -> Iterator[Any]:
    """A client of a server with nothing but this service."""
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((service.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield policy_pb2_grpc.PolicyStub(channel)
    finally:
        server.stop(None).wait()


def test_a_fault_of_the_server_is_internal_and_tells_the_caller_nothing_of_it(tmp_path, caplog):
    def broken() -> int:
        raise KeyError("user-17's secret")

    request, before = pb.RecommendRequest(user_id="u"), REQUESTS.labels("Recommend", "INTERNAL")._value.get()
    with stub_of(service_of(tmp_path, now_ms=broken)) as stub:
        for call in (
            lambda: stub.Recommend(request),
            lambda: stub.BatchRecommend(pb.BatchRecommendRequest(requests=[request])),
            lambda: next(stub.RecommendStream(iter([request]))),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() is grpc.StatusCode.INTERNAL
            assert refused.value.details() == "a fault of the server; its log has more"
    assert caplog.text.count('KeyError: "user-17\'s secret"') == 3
    assert REQUESTS.labels("Recommend", "INTERNAL")._value.get() == before + 1


def test_it_listens_on_an_ipv6_address():
    assert listen(grpc.server(ThreadPoolExecutor(1)), "::1", 0) > 0


def test_why_it_cannot_listen_is_said_with_the_flag_to_change():
    with contextlib.ExitStack() as closing:
        taken = closing.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        for host, port, why in (
            ("127.0.0.1", taken, f"127.0.0.1:{taken}: Address already in use; choose another --port"),
            ("nosuch.invalid", 5, "nosuch.invalid:5: Name or service not known; choose another --host"),
            ("192.0.2.1", 5, "192.0.2.1:5: Cannot assign requested address; choose another --host"),
        ):
            server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
            with pytest.raises(OSError, match=f"^cannot listen on {why}$"):
                listen(server, host, port)


def test_why_metrics_cannot_be_served_is_said_with_the_flag_to_change():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        why = f"metrics port {port} of 127.0.0.1: Address already in use; choose another --metrics-port"
        with pytest.raises(OSError, match=f"^{why}$"):
            expose(port, "127.0.0.1")
    with pytest.raises(OSError, match="Name or service not known; choose another --host"):
        expose(5, "nosuch.invalid")


def test_a_large_batch_is_taken_by_cuts_and_its_vectors_take_no_more_memory_than_its_message(tmp_path):
    publish(WeightStore(tmp_path), ["a", "b"])
    service = service_of(tmp_path)
    vector = np.linspace(0, 1, 256).tolist()
    offered = [pb.Candidate(item_id=f"c{i}", vector=vector) for i in range(100)]
    requests = [
        pb.RecommendRequest(user_id=f"u{i}", candidates=offered, timestamp_ms=NOW_MS) for i in range(130)
    ]
    service.warm_up()
    tracemalloc.start()
    try:
        answers = service.recommend(requests)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [len(answer.slate) for answer in answers] == [2] * 130
    assert peak < 130 * 100 * 256 * 4


def test_answers_too_large_to_be_sent_together_are_refused_and_leave_no_decision(tmp_path, monkeypatch):
    publish(WeightStore(tmp_path), ["a" * 900, "b" * 900])
    decisions = Decisions()
    service = service_of(tmp_path, decisions=decisions)
    monkeypatch.setattr("serving.service.MAX_MESSAGE_BYTES", 200_000)
    requests = [pb.RecommendRequest(user_id=f"u{i}", timestamp_ms=NOW_MS) for i in range(130)]
    answer = pb.BatchRecommendResponse(responses=service.recommend(requests[:100]))
    assert answer.ByteSize() <= 200_000
    assert len(decisions.written) == 100
    with stub_of(service) as stub, pytest.raises(grpc.RpcError) as refused:
        stub.BatchRecommend(pb.BatchRecommendRequest(requests=requests))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "answers are over 200,000 bytes" in refused.value.details()
    assert len(decisions.written) == 100


class Decisions:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[Any] = []

    def encoded(self, decision: Any) -> Any:
        return decision

    def write(self, decision: Any) -> bool:
        self.written.append(decision)
        return True


def test_what_is_out_of_stock_is_left_out_also_by_weights_that_number_items_otherwise(tmp_path):
    store, codec = tmp_path / "weights", Codec()
    publish(WeightStore(store), ["a", "b", "c"])
    view = View(ViewConfig(max_users=10), codec)
    view.absorb_catalog(batch_of([codec.encode_item({"item_id": "a", "in_stock": False})], keys=[b"a"]))
    weights = WeightsFollower(str(store), "stable", "target", 60.0)
    ranker = Ranker(weights, view, np.random.default_rng(0))

    def shown() -> set[str]:
        weights.look()
        (answer,) = ranker.rank([Query([], NOW_MS, 10, 0.0, set(), ())])
        return set(answer.item_ids)

    assert shown() == {"b", "c"}
    publish(WeightStore(store), ["a", "b", "c", "d"])
    assert shown() == {"b", "c", "d"}
    shutil.rmtree(store)
    assert shown() == {"b", "c", "d"}
    publish(WeightStore(store), ["z", "y", "a", "b"])  # a learner began anew; of the same epoch
    assert shown() == {"z", "y", "b"}


def test_thompsons_draws_take_no_more_memory_for_many_users_than_for_few(tmp_path):
    items = [f"item-{i}" for i in range(5000)]
    publish(WeightStore(tmp_path), items)
    weights = WeightsFollower(str(tmp_path), "stable", "target", 60.0)
    weights.look()
    ranker = Ranker(weights, View(ViewConfig(max_users=10), Codec()), np.random.default_rng(0))
    query = Query([], NOW_MS, 10, 0.1, set(), (), Exploration("thompson"))

    def peak(users: int) -> int:
        tracemalloc.start()
        try:
            assert all(len(answer.item_ids) == 10 for answer in ranker.rank([query] * users))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)  # what is made at first use
    assert peak(64) < 1.5 * peak(4)


def test_a_call_whose_deadline_passes_between_its_cuts_leaves_no_decision(tmp_path):
    class Slow(Ranker):
        def rank(self, queries: Sequence[Query]) -> list[Answer]:
            time.sleep(0.2)
            return super().rank(queries)

    view, producer = View(ViewConfig(max_users=10), Codec()), Scripted()
    writer = DecisionWriter(producer, Codec(), "events", time.monotonic, 1 << 20)
    weights = WeightsFollower(str(tmp_path), "stable", "target", 60.0)
    service = service_of(
        tmp_path, ranker=Slow(weights, view, np.random.default_rng(0)), view=view, decisions=writer
    )
    requests = [pb.RecommendRequest(user_id="u", candidates=[pb.Candidate(item_id="a")])] * 130
    with pytest.raises(DeadlinePassed):
        service.recommend(requests, time.monotonic() + 0.3)
    assert len(service.recommend(requests[:70])) == 70
    writer.close(10.0)
    assert len(producer.sent) == 70
