"""How a server follows the weight store."""

from __future__ import annotations

import time
from itertools import pairwise

from learner.agent import Agent, AgentSettings
from learner.weights import Meta, WeightStore
from serving.metrics import REGISTRY
from serving.weights import WeightsFollower
from streaming.interning import Vocabulary


def test_taking_versions_costs_a_tenth_of_a_core_at_most(tmp_path):
    agent = Agent(AgentSettings(dim=4, hidden=4, history_length=4))
    agent.grow(3)
    vocabulary = Vocabulary()
    for name in ("a", "b", "c"):
        vocabulary.intern(name)
    store = WeightStore(tmp_path)

    def publish() -> int:
        return store.publish(
            agent.tensors(), Meta(settings=agent.shape(), events_through_ms=1_700_000_000_500), vocabulary
        ).version

    publish()
    follower = WeightsFollower(str(tmp_path), "stable", "target", poll_s=0.01)
    load, taken = follower._store.load, []

    def slowly(version):
        busy = time.thread_time() + 0.1
        while time.thread_time() < busy:
            pass
        taken.append(time.monotonic())
        return load(version)

    follower._store.load = slowly
    follower.start()
    try:
        end = time.monotonic() + 60
        while len(taken) < 3 and time.monotonic() < end:
            last = publish()
            time.sleep(0.05)
        assert all(later - earlier > 0.9 for earlier, later in pairwise(taken))
        assert len(taken) == 3
        while follower.served.manifest.version != last and time.monotonic() < end:
            time.sleep(0.05)
        assert follower.served.manifest.version == last
        metric = "serving_policy_events_through_timestamp_seconds"
        assert REGISTRY.get_sample_value(metric) == 1_700_000_000.5
    finally:
        follower.stop()
