"""A small client of the policy server, with retries; any gRPC client works as well (see proto/policy.proto)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, cast

import grpc

from serving import policy_pb2 as pb
from serving import policy_pb2_grpc

MAX_MESSAGE_BYTES: Final = 64 << 20
_SERVICE: Final = "bellwether.v1.Policy"
CallError = grpc.RpcError  # what a call that failed raises; `error.code().name` says why


class Client:
    """Calls a policy server. Threads may share one; requests are spread over its connections in turn.

    UNAVAILABLE (a server that starts, drains or restarts) is retried with growing pauses until the timeout. A retry
    after an answer that got lost leaves a decision behind that nobody saw: it counts as shown and earns nothing.
    Any other error is raised as grpc.RpcError at once.
    """

    def __init__(
        self, target: str, *, timeout_s: float = 5.0, retries: int = 4, connections: int = 1
    ) -> None:
        """target: host:port. timeout_s: for each call, retries included. retries: 0..4 (gRPC makes at most five
        attempts). connections: TCP connections, 1 or more: a server of several processes has use for several."""
        if not 0 <= retries <= 4:
            raise ValueError(f"retries must be within 0..4, not {retries}")
        if connections < 1:
            raise ValueError(f"connections must be >= 1, not {connections}")
        options = _options(retries)
        self._timeout_s = timeout_s
        self._channels = [
            grpc.insecure_channel(target, [*options, ("grpc.use_local_subchannel_pool", 1)])
            for _ in range(connections)
        ]
        self._stubs = [policy_pb2_grpc.PolicyStub(channel) for channel in self._channels]  # type: ignore[no-untyped-call]
        self._next = 0

    def recommend(self, request: pb.RecommendRequest) -> pb.RecommendResponse:
        """A slate for one user."""
        return cast(pb.RecommendResponse, self._stub().Recommend(request, timeout=self._timeout_s))

    def recommend_future(self, request: pb.RecommendRequest) -> Any:
        """As `recommend`, without waiting: a grpc.Future of the answer."""
        return self._stub().Recommend.future(request, timeout=self._timeout_s)

    def batch(self, requests: Sequence[pb.RecommendRequest]) -> list[pb.RecommendResponse]:
        """Slates for up to 1000 users, in the order of the requests."""
        batch = pb.BatchRecommendRequest(requests=requests)
        return list(self._stub().BatchRecommend(batch, timeout=self._timeout_s).responses)

    def stream(self, requests: Iterable[pb.RecommendRequest]) -> Iterator[pb.RecommendResponse]:
        """Answers as the requests come, in their order, over one stream without a timeout."""
        return cast("Iterator[pb.RecommendResponse]", self._stub().RecommendStream(iter(requests)))

    def policy(self) -> pb.GetPolicyResponse:
        """What is being served."""
        response = self._stub().GetPolicy(pb.GetPolicyRequest(), timeout=self._timeout_s)
        return cast(pb.GetPolicyResponse, response)

    def wait(self, timeout_s: float) -> None:
        """Return once the server answers on every connection. Raises grpc.FutureTimeoutError."""
        for channel in self._channels:
            grpc.channel_ready_future(channel).result(timeout=timeout_s)

    def close(self) -> None:
        """Let go of the connections; harmless twice."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stub(self) -> Any:
        self._next += 1  # a lost update between threads only changes whose turn it is
        return self._stubs[self._next % len(self._stubs)]


def _options(retries: int) -> list[tuple[str, Any]]:
    retry = {
        "maxAttempts": retries + 1,
        "initialBackoff": "0.05s",
        "maxBackoff": "1s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = {
        "methodConfig": [{"name": [{"service": _SERVICE}], **({"retryPolicy": retry} if retries else {})}]
    }
    return [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.enable_retries", int(retries > 0)),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_reconnect_backoff_ms", 1000),  # else a client takes minutes to find a restarted server
    ]
