"""How a server follows the weight store."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from learner.agent import Agent
from learner.agent_settings import AgentSettings
from learner.weights import Meta, WeightStore
from serving.metrics import REGISTRY
from serving.weights import WeightsFollower
from streaming.interning import Vocabulary
from tests.serving_process import eventually


def publisher(store: WeightStore) -> Callable[[], int]:
    """Publishes the same small network again and again; gives the versions."""
    agent = Agent(AgentSettings(dim=4, hidden=4, history_length=4))
    agent.grow(3)
    vocabulary = Vocabulary()
    for name in ("a", "b", "c"):
        vocabulary.intern(name)

    def publish() -> int:
        return store.publish(
            agent.tensors(), Meta(settings=agent.shape(), events_through_ms=1_700_000_000_500), vocabulary
        ).version

    return publish


def test_taking_versions_costs_a_tenth_of_a_core_at_most(tmp_path):
    publish = publisher(WeightStore(tmp_path))
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


def test_a_store_that_was_emptied_is_followed_from_its_first_version_on(tmp_path):
    publisher(WeightStore(tmp_path / "weights"))()
    follower = WeightsFollower(str(tmp_path / "weights"), "stable", "target", poll_s=1.0)
    follower.look()
    before = follower.served
    shutil.rmtree(tmp_path / "weights")
    follower.look()
    assert follower.served is before
    publisher(WeightStore(tmp_path / "weights"))()
    follower.look()
    assert (follower.served.manifest.version, follower.served is before) == (1, False)
    now = follower.served
    follower.look()
    assert follower.served is now


@pytest.mark.parametrize(("remembered", "warned"), [(3, True), (4, False), (None, False)])
def test_a_server_that_remembers_less_than_weights_read_says_so_once(tmp_path, caplog, remembered, warned):
    publish = publisher(WeightStore(tmp_path))  # they read four entries
    follower = WeightsFollower(str(tmp_path), "stable", "target", 0.01, remembered)
    for _ in range(2):
        publish()
        follower.look()
    said = [record for record in caplog.records if "--history-length 4" in record.getMessage()]
    assert len(said) == warned


def refusals(reason: str) -> float:
    return REGISTRY.get_sample_value("serving_weights_refused_total", {"reason": reason}) or 0.0


def test_a_damaged_label_is_said_once_asked_for_seldomer_and_followed_again_once_mended(tmp_path, caplog):
    publisher(WeightStore(tmp_path))()
    label = tmp_path / "labels" / "stable"
    good, before = label.read_bytes(), refusals("store")
    label.write_bytes(b"garbage")
    follower = WeightsFollower(str(tmp_path), "stable", "target", poll_s=0.01)
    follower.start()
    try:
        time.sleep(1.0)
        assert 2 <= refusals("store") - before <= 8  # after 10, 20, 40, ... ms
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "'stable' cannot be read: b'garbage'" in caplog.text
        label.write_bytes(good)
        assert eventually(lambda: follower.served).manifest.version == 1
    finally:
        follower.stop()


def test_a_version_that_was_refused_is_tried_again_once_the_label_comes_back_to_it(tmp_path):
    store = WeightStore(tmp_path)
    publish = publisher(store)
    before = refusals("damaged")
    publish()
    follower = WeightsFollower(str(tmp_path), "stable", "target", poll_s=1.0)
    follower.look()
    publish()
    manifest = tmp_path / store._manifests()[-1][2]
    good = manifest.read_bytes()
    manifest.write_bytes(good[:-1])
    for _ in range(2):  # and not refused again while the label stays
        follower.look()
        assert (follower.served.manifest.version, refusals("damaged") - before) == (1, 1)
    store.set_label("stable", 1)
    follower.look()
    manifest.write_bytes(good)
    store.set_label("stable", 2)
    follower.look()
    assert (follower.served.manifest.version, refusals("damaged") - before) == (2, 1)


class Flaky(MemoryFileSystem):
    """Its driver's own error, which is no OSError, for so many reads of names that end like this."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012 (fsspec's own way)
    failures = 0
    ending = ""

    def cat_file(self, path, *arguments, **options):
        if path.endswith(Flaky.ending) and Flaky.failures:
            Flaky.failures -= 1
            raise RuntimeError("SlowDown: reduce your request rate")
        return super().cat_file(path, *arguments, **options)


@pytest.fixture
def flaky() -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store.clear()
    yield Flaky
    Flaky.failures = 0


@pytest.mark.parametrize("ending", ["labels/stable", ".json", ".safetensors"])
def test_whatever_a_stores_driver_raises_a_good_version_is_tried_again(flaky, ending, caplog):
    version = publisher(WeightStore("flaky://weights"))()
    flaky.ending, flaky.failures = ending, 3
    follower = WeightsFollower("flaky://weights", "stable", "target", poll_s=0.01)
    damaged, store = refusals("damaged"), refusals("store")
    follower.start()
    try:
        assert eventually(lambda: follower.served).manifest.version == version
    finally:
        follower.stop()
    assert (refusals("damaged") - damaged, refusals("store") - store) == (0, 3)
    assert caplog.text.count("RuntimeError: SlowDown") == 1
    assert "Traceback" not in caplog.text


def test_a_store_that_does_not_answer_is_left_behind_at_the_end(tmp_path):
    follower, asked, answer = (
        WeightsFollower(str(tmp_path), "stable", "target", 0.01),
        threading.Event(),
        threading.Event(),
    )
    follower.start()

    def silent(label):
        asked.set()
        answer.wait(60)

    follower._store.latest = silent
    assert asked.wait(10)
    began = time.monotonic()
    follower.stop(0.2)
    assert time.monotonic() - began < 5
    answer.set()
    follower.stop()
