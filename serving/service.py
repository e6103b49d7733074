"""Requests → answers: checks, state, ranking in batches, the decision record. Knows nothing of ports and threads."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Final, NoReturn, TypeVar

import grpc
import numpy as np

from learner.exploration import GREEDY, Exploration
from learner.policy import Candidate, Entry
from serving import metrics
from serving import policy_pb2 as pb
from serving.batching import Batcher, DeadlinePassed
from serving.decisions import DecisionWriter, Encoded
from serving.ranking import Answer, Query, Ranker
from serving.requests import MAX_MESSAGE_BYTES, Invalid, check_batch, check_recommend, parse
from serving.variety import Variety
from serving.view import View
from serving.weights import Served, WeightsFollower

logger = logging.getLogger(__name__)

SERVICE: Final = "bellwether.v1.Policy"
_MAX_BATCH: Final = 64  # beyond it a matrix product gains nothing and the first one in waits for the last
_FIELD_BYTES: Final = 8  # of one answer among several, beside itself

Response = TypeVar("Response")


class Streams:
    """Those that are open. Each holds a thread for as long as it lives: too many would leave none for calls."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free = threading.Semaphore(most)

    @contextmanager
    def one(self, rpc: str, context: grpc.ServicerContext) -> Iterator[None]:
        """It is open within the block; where there are too many, the caller is turned away."""
        if not self._free.acquire(blocking=False):
            why = f"{self._most} streams are open; close one, call Recommend, or raise --max-streams"
            _refuse(rpc, context, grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        try:
            yield
        finally:
            self._free.release()


class Service:
    """The four RPCs of proto/policy.proto."""

    def __init__(
        self,
        *,
        view: View,
        weights: WeightsFollower,
        ranker: Ranker,
        decisions: DecisionWriter | None,
        epsilon: float,
        exploration: Exploration,
        slate_size: int,
        max_streams: int,
        instance: str,
        now_ms: Callable[[], int],
    ) -> None:
        """epsilon, slate_size: where a request says nothing. exploration: of slots that epsilon does not draw, unless a
        request says that nothing is to be explored. instance: unique among all servers there ever were: it
        makes recommendation_ids unique. decisions: None: none are written. now_ms: wall clock."""
        self._view = view
        self._weights = weights
        self._decisions = decisions
        self._epsilon = epsilon
        self._exploration = exploration
        self._slate_size = slate_size
        self._instance = instance
        self._now_ms = now_ms
        self._batcher: Batcher[Query, Answer] = Batcher(ranker.rank, _MAX_BATCH, time.monotonic)
        variety = self._variety = Variety()
        metrics.COVERAGE.set_function(lambda: variety.coverage(ranker.on_offer))
        metrics.GINI.set_function(lambda: variety.gini(ranker.on_offer))
        self._numbers = count(1)  # next() on it is atomic
        self.streams: Final = Streams(max_streams)
        self.draining = False  # set by the server: streams end after the answer in hand

    def handler(self) -> grpc.GenericRpcHandler:
        """The RPCs as gRPC wants them. Requests come as bytes: see `requests.parse`."""
        unary, serialize = grpc.unary_unary_rpc_method_handler, _serialize
        methods = {
            "Recommend": unary(self._guarded("Recommend", self._recommend), None, serialize),
            "BatchRecommend": unary(self._guarded("BatchRecommend", self._batch), None, serialize),
            "GetPolicy": unary(self._guarded("GetPolicy", self._get_policy), None, serialize),
            "RecommendStream": grpc.stream_stream_rpc_method_handler(self._stream, None, serialize),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def recommend(
        self, requests: Sequence[pb.RecommendRequest], deadline_s: float = math.inf
    ) -> list[pb.RecommendResponse]:
        """Answers to checked requests, in their order; each has left its decision record in the log's queue.

        Taken by cuts of one batch: what ranking needs of a request is larger than the request.
        deadline_s: on time.monotonic's clock. Raises: DeadlinePassed; Invalid where the answers together are too large
        to be sent. Then no decision is left.
        """
        settled: list[tuple[pb.RecommendResponse, Encoded | None]] = []
        size = 0
        for start in range(0, len(requests), _MAX_BATCH):
            cut = self._settled(requests[start : start + _MAX_BATCH], deadline_s)
            if len(requests) > 1:  # one answer is far from that, and to measure it is to encode it once more
                size += sum(response.ByteSize() + _FIELD_BYTES for response, _ in cut)
            if size > MAX_MESSAGE_BYTES:
                raise Invalid(
                    f"requests: their answers are over {MAX_MESSAGE_BYTES:,} bytes; send fewer at a time, or ask for "
                    "smaller slates"
                )
            settled += cut
        for _, decision in settled:
            if decision is not None and self._decisions is not None:
                self._decisions.write(decision)
        return [response for response, _ in settled]

    def warm_up(self) -> None:
        """Answer one made-up request, so that no caller waits for what is compiled or built at first use."""
        request = pb.RecommendRequest(user_id="warm-up", unlogged=True)
        self.recommend([request])

    # --- RPCs ------------------------------------------------------------------------------------------------

    def _recommend(self, data: bytes, context: grpc.ServicerContext) -> pb.RecommendResponse:
        request = parse(pb.RecommendRequest, data)
        check_recommend(request)
        return self.recommend([request], _deadline(context))[0]

    def _batch(self, data: bytes, context: grpc.ServicerContext) -> pb.BatchRecommendResponse:
        batch = parse(pb.BatchRecommendRequest, data)
        check_batch(batch)
        return pb.BatchRecommendResponse(responses=self.recommend(batch.requests, _deadline(context)))

    def _stream(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[pb.RecommendResponse]:
        with self.streams.one("RecommendStream", context):
            answer = self._guarded("RecommendStream", self._recommend)
            for data in requests:
                yield answer(data, context)
                if self.draining:
                    return

    def _get_policy(self, data: bytes, context: grpc.ServicerContext) -> pb.GetPolicyResponse:
        parse(pb.GetPolicyRequest, data)
        served = self._weights.served  # read once: the answer comes from one version
        response = pb.GetPolicyResponse(
            epsilon=self._epsilon,
            exploration=str(self._exploration),
            network=self._weights.network,
            label=self._weights.label,
        )
        if served is None:
            response.strategy = pb.POPULARITY
            response.items = len(self._view.items()) - 1
        else:
            _describe(response, served, self._now_ms())
        return response

    def _guarded(
        self, rpc: str, answer: Callable[[bytes, grpc.ServicerContext], Response]
    ) -> Callable[[bytes, grpc.ServicerContext], Response]:
        """`answer` with errors as status codes, counted and timed."""
        latency, fine = metrics.LATENCY.labels(rpc), metrics.REQUESTS.labels(rpc, "OK")

        def guarded(data: bytes, context: grpc.ServicerContext) -> Response:
            start = time.perf_counter()
            try:
                response = answer(data, context)
            except Invalid as error:
                _refuse(rpc, context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except DeadlinePassed:
                _refuse(
                    rpc, context, grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before its turn"
                )
            except Exception:  # gRPC itself would answer UNKNOWN, and tell the caller what it says
                logger.exception("%s failed", rpc)
                _refuse(rpc, context, grpc.StatusCode.INTERNAL, "a fault of the server; its log has more")
            latency.observe(time.perf_counter() - start)
            fine.inc()
            return response

        return guarded

    # --- requests --------------------------------------------------------------------------------------------

    def _settled(
        self, requests: Sequence[pb.RecommendRequest], deadline_s: float
    ) -> list[tuple[pb.RecommendResponse, Encoded | None]]:
        """One batch of them: answers, and the decisions to be written, if any."""
        queries = [self._query(request) for request in requests]
        answers = self._batcher.run(queries, deadline_s)
        return [self._settle(*three) for three in zip(requests, queries, answers, strict=True)]

    def _query(self, request: pb.RecommendRequest) -> Query:
        now_ms = request.timestamp_ms or self._now_ms()
        history = _entries(request, now_ms) or self._view.history(request.user_id)
        excluded = set(request.exclude_item_ids)
        excluded.update(self._view.bought(request.user_id, now_ms))
        excluded.update(self._view.bought_in(history, now_ms))
        if request.exclude_seen:
            excluded.update(entry.item_id for entry in history)
        told = request.HasField("epsilon")
        return Query(
            history=history,
            now_ms=now_ms,
            slate_size=request.slate_size or self._slate_size,
            epsilon=request.epsilon if told else self._epsilon,
            exploration=GREEDY if told and request.epsilon == 0 else self._exploration,
            excluded=excluded,
            candidates=[_candidate(candidate) for candidate in request.candidates],
        )

    def _settle(
        self, request: pb.RecommendRequest, query: Query, answer: Answer
    ) -> tuple[pb.RecommendResponse, Encoded | None]:
        decision = None
        recommendation_id = f"{self._instance}-{next(self._numbers):x}"
        if query.candidates:  # the log may say so only after the user's next request, or not at all
            shown = set(answer.item_ids)
            self._view.described.note(c for c in query.candidates if c.item_id in shown)
        metrics.ANSWERS.labels(pb.Strategy.Name(answer.strategy)).inc()
        if not answer.item_ids:
            metrics.EMPTY_SLATES.inc()  # and no decision: there was nothing to decide
        elif request.unlogged:
            metrics.DECISIONS.labels("unlogged").inc()
        else:
            if answer.policy_version:
                self._variety.saw(answer.item_ids)
            if self._decisions is not None:
                decision = self._decisions.encoded(_decision(recommendation_id, request, query, answer))
        response = pb.RecommendResponse(
            recommendation_id=recommendation_id,
            slate=[
                pb.Slot(item_id=item_id, propensity=propensity, q=q, explored=explored)
                for item_id, propensity, q, explored in zip(
                    answer.item_ids, answer.propensity, answer.q, answer.explored, strict=True
                )
            ],
            policy_version=answer.policy_version,
            strategy=answer.strategy,
            epsilon=query.epsilon,
            exploration=str(answer.exploration),
        )
        return response, decision


def _serialize(response: Any) -> bytes:
    data: bytes = response.SerializeToString()
    return data


def _deadline(context: grpc.ServicerContext) -> float:
    left = context.time_remaining()
    return math.inf if left is None else time.monotonic() + left


def _refuse(rpc: str, context: grpc.ServicerContext, code: grpc.StatusCode, why: str) -> NoReturn:
    metrics.REQUESTS.labels(rpc, code.name).inc()
    context.abort(code, why)
    raise AssertionError("abort raises")


def _entries(request: pb.RecommendRequest, now_ms: int) -> list[Entry]:
    return [
        Entry(entry.item_id, entry.name or "view_item", entry.timestamp_ms or now_ms, entry.value)
        for entry in request.history
    ]


def _decision(
    recommendation_id: str, request: pb.RecommendRequest, query: Query, answer: Answer
) -> dict[str, Any]:
    """Fields of proto/decision.avsc."""
    return {
        "recommendation_id": recommendation_id,
        "user_id": request.user_id,
        "session_id": request.session_id or None,
        "timestamp": query.now_ms,
        "history": [
            {"item_id": item_id, "name": name, "timestamp": timestamp_ms, "value": value}
            for item_id, name, timestamp_ms, value in query.history
        ],
        "slate": [
            {"item_id": item_id, "propensity": propensity}
            for item_id, propensity in zip(answer.item_ids, answer.propensity, strict=True)
        ],
        "epsilon": query.epsilon if answer.exploration.kind == "greedy" else 0.0,
        "policy_version": answer.policy_version,
        "strategy": pb.Strategy.Name(answer.strategy),
        "candidates": [_told(candidate) for candidate in query.candidates] or None,
    }


def _candidate(candidate: pb.Candidate) -> Candidate:
    return Candidate(
        candidate.item_id,
        candidate.category or None,
        candidate.brand or None,
        candidate.price if candidate.HasField("price") else None,
        # a tenth of a list's memory
        np.array(candidate.vector, np.float32) if candidate.vector else (),
    )


def _told(candidate: Candidate) -> dict[str, Any]:
    """As a decision record has it: fastavro takes lists only."""
    vector = candidate.vector
    return candidate._asdict() | {
        "vector": vector.tolist() if isinstance(vector, np.ndarray) else list(vector)
    }


def _describe(response: pb.GetPolicyResponse, served: Served, now_ms: int) -> None:
    """Fill in what the manifest of the weights says."""
    manifest = served.manifest
    response.policy_version = manifest.version
    response.step = manifest.step
    response.last_target_sync_step = manifest.last_target_sync_step
    response.published_ms = manifest.published_ms
    response.age_s = max(0.0, (now_ms - manifest.published_ms) / 1000)
    response.events_through_ms = manifest.events_through_ms
    response.items = served.policy.items
    response.strategy = pb.LEARNED if served.policy.items else pb.POPULARITY
    for partition, offset in sorted(manifest.positions.items()):
        response.positions.add(partition=partition, next_offset=offset)
