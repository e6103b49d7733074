"""The product as a recommender: deeds become events in a log, slates come from Recommend, a learner runs beside it.

`Shop` is what a storefront's engineer would write. Behind it is a `Loop`: `InProcess` here, real processes in
benchmarks.gym_bridge.processes. Both learn from chunks of the log cut at the same offsets, and serve what was learnt
from all whole chunks so far; so they give the same slates.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np

from benchmarks.gym_bridge.storefront import Deed, Page, Storefront
from learner.agent import Agent, Update
from learner.agent_settings import AgentSettings
from learner.exploration import GREEDY, Exploration
from learner.learner import Learner, LearnerSettings
from learner.policy import Candidate, Policy
from learner.replay import Batch
from learner.weights import Manifest, Weights
from serving import policy_pb2 as pb
from serving.decisions import Encoded
from serving.ranking import Ranker
from serving.server import ServingConfig
from serving.service import Service
from serving.view import View, ViewConfig
from serving.weights import Served
from streaming.chunks import batch_of
from streaming.join_settings import LAST_MS, JoinSettings
from streaming.rewards import HISTORY_NAMES
from streaming.schemas import Codec

_LOGGED_MS: Final = (
    LAST_MS  # when records came in: later than all that happens, as in a log that is written today
)

KEPT: Final = 32  # newest entries of a history that a request brings


@dataclass(frozen=True)
class Setup:
    """The product's settings: all defaults, but for what a shop sets and a sweep varies."""

    agent: AgentSettings = field(default_factory=AgentSettings)
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    epsilon: float = ServingConfig.epsilon
    exploration: Exploration = GREEDY
    network: Literal["online", "target"] = ServingConfig.network
    chunk: int = 256  # records between two versions


class Loop(Protocol):
    """A log, a learner that reads it, and a server that serves what it learnt."""

    @property
    def cpu_s(self) -> float:
        """CPU seconds spent so far: answers, decoding, joining, learning."""

    def start(self, storefront: Storefront, setup: Setup, seed: int) -> None:
        """With the storefront's catalog."""

    def publish(self, user_id: str, record: bytes) -> None:
        """One record for `events`."""

    def recommend(self, request: pb.RecommendRequest) -> pb.RecommendResponse:
        """See proto/policy.proto; the decision is in the log when this returns."""


class Shop:
    """Publishes what users do and asks for slates."""

    def __init__(
        self, loop: Loop, storefront: Storefront, setup: Setup, seed: int, *, returning: bool = False
    ) -> None:
        """returning: users come again, so all their histories are kept; else only that of the user of the moment."""
        self._loop, self._storefront = loop, storefront
        self.watched_only = False  # True: publish nothing, explore nothing, have no decision written
        self._codec = Codec()
        self._events = self._logged = 0
        self._recommendation_id = ""
        self._kept, self._returning = max(KEPT, setup.agent.entries), returning
        self._histories: dict[str, deque[pb.HistoryEntry]] = {}
        self._meet("")
        loop.start(storefront, setup, seed)

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the loop: what building requests and records costs is the shop's own."""
        return self._loop.cpu_s

    def did(self, user_id: str, deeds: Sequence[Deed], times_ms: Sequence[int]) -> None:
        """See Recommender."""
        self._meet(user_id)
        for deed, at_ms in zip(deeds, times_ms, strict=True):
            if not self.watched_only:
                self._publish(user_id, deed, at_ms)
            if deed.name in HISTORY_NAMES:
                entry = pb.HistoryEntry(
                    item_id=deed.item_id, name=deed.name, timestamp_ms=at_ms, value=deed.value
                )
                self._history.append(entry)

    def recommend(self, user_id: str, page: Page, now_ms: int) -> list[str]:
        """See Recommender."""
        self._meet(user_id)
        request = pb.RecommendRequest(
            user_id=user_id,
            slate_size=self._storefront.slate_size,
            history=self._history,
            candidates=[_candidate(candidate) for candidate in page.candidates],
            timestamp_ms=now_ms,
            epsilon=0.0 if self.watched_only else None,
            unlogged=self.watched_only,
        )
        response = self._loop.recommend(request)
        self._recommendation_id = response.recommendation_id
        return [slot.item_id for slot in response.slate]

    def shown(self, user_id: str, page: Page, slate: Sequence[str], propensity: float, now_ms: int) -> None:
        """See Recommender: the log of a shop's past, decisions with their propensities."""
        self._meet(user_id)
        self._logged += 1
        self._recommendation_id = f"logged-{self._logged}"
        decision = {
            "recommendation_id": self._recommendation_id,
            "user_id": user_id,
            "timestamp": now_ms,
            "history": [
                {"item_id": e.item_id, "name": e.name, "timestamp": e.timestamp_ms, "value": e.value}
                for e in self._history
            ],
            "slate": [{"item_id": item_id, "propensity": propensity} for item_id in slate],
            "epsilon": 1.0,
            "strategy": "RANDOM",
            "candidates": [candidate._asdict() for candidate in page.candidates] or None,
        }
        self._loop.publish(user_id, self._codec.encode_decision(decision))

    def _publish(self, user_id: str, deed: Deed, at_ms: int) -> None:
        record = {
            "event_id": f"e{self._events}",
            "name": deed.name,
            "user_id": user_id,
            "timestamp": at_ms,
            "items": [{"item_id": deed.item_id}],
            "value": deed.value,
            "recommendation_id": self._recommendation_id if deed.from_slate else None,
        }
        self._events += 1
        self._loop.publish(user_id, self._codec.encode_event(record))

    def _meet(self, user_id: str) -> None:
        if not self._returning and user_id not in self._histories:
            self._histories.clear()
        self._history = self._histories.setdefault(user_id, deque(maxlen=self._kept))


def _candidate(candidate: Candidate) -> pb.Candidate:
    return pb.Candidate(
        item_id=candidate.item_id,
        category=candidate.category or "",
        brand=candidate.brand or "",
        price=candidate.price,
        vector=candidate.vector,
    )


class Stale(Agent):
    """With the error of RecSim 0.2.4's own SlateQ: what is to come after a step is read from the state before it
    (slate_decomp_q_agent.py, `_build_networks`: the target network's input is `_replay.states`)."""

    def update(self, batch: Batch, kept: int | None = None) -> Update:
        """See Agent."""
        return super().update(batch._replace(next_state=batch.state), kept)


class InProcess:
    """The product's parts in one thread: its learner, its view and its service, with a list for a log."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self.held = False  # True: the version in use stays, whatever is learnt
        self.stale = False  # before it starts: with an agent that is `Stale`

    def start(self, storefront: Storefront, setup: Setup, seed: int) -> None:
        """See Loop."""
        self._chunk = setup.chunk
        codec, agent = Codec(), setup.agent
        join = JoinSettings(
            rewards=storefront.rewards,
            horizon=storefront.horizon,
            gamma=agent.gamma,
            history_length=agent.entries,
        )
        self.learner = Learner(setup.learner, agent, join, codec, partitions=1)
        if self.stale:
            self.learner.agent = Stale(agent, seed=setup.learner.seed)
        self.learner.assign({0: 0})
        self._codec, self._view = codec, View(ViewConfig(history_length=agent.entries), codec)
        self.weights = _Weights(setup.network)
        self._waiting: list[bytes] = []  # records of the chunk that is not full yet
        self._viewed = 0  # of these, in the view
        self._taken = 0
        self._service = Service(
            view=self._view,
            weights=self.weights,  # type: ignore[arg-type]
            ranker=Ranker(self.weights, self._view, np.random.default_rng([seed, 0])),  # type: ignore[arg-type]
            decisions=self,  # type: ignore[arg-type]
            epsilon=setup.epsilon,
            exploration=setup.exploration,
            slate_size=ServingConfig.slate_size,
            max_streams=1,
            instance="bridge",
            now_ms=lambda: 0,
        )
        items = [codec.encode_item(item) for item in storefront.catalog()]
        keys = [item["item_id"].encode() for item in storefront.catalog()]
        if items:
            self.learner.take_catalog(batch_of(items, 0, keys))
            self._view.absorb_catalog(batch_of(items, 0, keys))
        self._service.warm_up()

    def publish(self, user_id: str, record: bytes) -> None:
        """See Loop."""
        self._waiting.append(record)
        if len(self._waiting) == self._chunk:
            began = time.process_time()
            self._learn()
            self.cpu_s += time.process_time() - began

    def recommend(self, request: pb.RecommendRequest) -> pb.RecommendResponse:
        """See Loop."""
        began = time.process_time()
        if self.weights.served is None:  # it answers by popularity: by what it has seen itself
            self._view_waiting()
        (response,) = self._service.recommend([request])
        if len(self._waiting) >= self._chunk:
            self._learn()
        self.cpu_s += time.process_time() - began
        return response

    def encoded(self, decision: Mapping[str, Any]) -> Encoded:
        """The same before that, frame and all: nobody puts one before it later."""
        return Encoded(decision["user_id"].encode(), self._codec.encode_decision(decision))

    def write(self, decision: Encoded) -> bool:
        """The service's decision, for the log."""
        self._waiting.append(decision.body)
        return True

    def _learn(self) -> None:
        """One chunk: into view and replay, as many updates as the band allows, a new version."""
        self._view_waiting()
        self.learner.take(batch_of(self._waiting, self._taken, logged_ms=_LOGGED_MS))
        self._taken += len(self._waiting)
        self._viewed = 0
        self._waiting.clear()
        self.learner.train(1 << 62)
        if not self.held:
            self.renew()

    def _view_waiting(self) -> None:
        """What waits, into the view. A server's own is as fresh."""
        if self._viewed < len(self._waiting):
            more = self._waiting[self._viewed :]
            self._view.absorb(batch_of(more, self._taken + self._viewed, logged_ms=_LOGGED_MS))
            self._viewed = len(self._waiting)

    def renew(self) -> None:
        """Serve what has been learnt by now, if anything."""
        if self.learner.agent.updates:
            self.weights.serve(self.learner, {0: self._taken})


class _Weights:
    """What a server follows, without a store between."""

    label: Final = "stable"

    def __init__(self, network: Literal["online", "target"]) -> None:
        self.network = network
        self.served: Served | None = None
        self._vocabulary: list[str] = []

    def serve(self, learner: Learner, positions: Mapping[int, int]) -> None:
        """The learner's weights as they are, from now on."""
        before = self.served
        tensors = {name: tensor.numpy() for name, tensor in learner.agent.tensors().items()}
        self._vocabulary += learner.vocabulary.item_ids(len(self._vocabulary) + 1)
        items = len(self._vocabulary)
        manifest = Manifest(
            **vars(learner.meta(positions, 0)),
            version=1 if before is None else before.manifest.version + 1,
            epoch=1,
            parent=None,
            tensors_sha256="",
            shapes={},
            dtypes={},
            vocabulary_sha256=(str(items),),  # it only grows
            items=items,
        )
        weights = Weights(manifest, tensors, self._vocabulary)
        policy = Policy.from_weights(weights, self.network, before.policy if before else None)
        self.served = Served(manifest, policy)
