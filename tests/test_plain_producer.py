"""The README's plain producer (confluent-kafka, fastavro and the .avsc file) writes events that are learnt from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.checkpoint import Checkpoints
from learner.weights import WeightStore
from streaming.log import open_log
from tests.kafka_broker import ROOT, KafkaBroker

PARTITIONER = '"partitioner": "murmur2_random"'
USERS = 100

pytestmark = [pytest.mark.kafka, pytest.mark.slow]


def snippet() -> str:
    """The README's Python example of a producer."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (found,) = [block for block in blocks if "from confluent_kafka import Producer" in block]
    return str(found)


@pytest.fixture
def run_with(
    kafka: KafkaBroker, topic: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, Any]]:
    """Runs the snippet against the test's own broker and topic; then 100 more visits of its kind."""
    monkeypatch.chdir(ROOT)
    open_log(kafka.url).create_topic(topic, 4)

    def run(text: str) -> dict[str, Any]:
        place = 'SERVERS, TOPIC = "127.0.0.1:9092", "events"'
        assert place in text
        names: dict[str, Any] = {}
        exec(text.replace(place, f"SERVERS, TOPIC = {kafka.bootstrap!r}, {topic!r}"), names)
        for user in range(USERS):
            for item_id in ("phone-1", "case-7", "cable-3"):
                names["publish"]("view_item", f"user-{user}", item_id, price=9.5)
            names["publish"]("purchase", f"user-{user}", "cable-3", price=9.5)
        assert names["producer"].flush(30) == 0
        return names

    return run


def learn(kafka: KafkaBroker, topic: str, folder: Path) -> dict[str, Any]:
    """What the learner's checkpoint says once it has learnt all that the topic holds."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "learner", "--topic", topic, "--log", kafka.url, "--until-caught-up"),
            *("--data-dir", str(folder / "data"), "--weights", str(folder / "weights")),
            *("--min-replay", "1", "--batch-size", "16", "--updates-high", "0.5"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    loaded = Checkpoints(folder / "data" / "learner").load()
    assert loaded is not None
    return loaded.meta


def test_the_readmes_producer_writes_events_that_are_learnt_from(run_with, kafka, topic, tmp_path):
    run_with(snippet())
    meta = learn(kafka, topic, tmp_path)
    assert meta["joined"]["events"] == 3 + 4 * USERS
    assert (meta["joined"]["bad"], meta["joined"]["misplaced"]) == (0, 0)
    # anna's phone, and two views of each user, were followed by another view: steps that are complete
    assert meta["transitions"] >= 1 + 2 * USERS
    assert meta["updates"] > 0
    store = WeightStore(tmp_path / "weights")
    assert set(store.load(store.latest()).vocabulary) == {"phone-1", "case-7", "cable-3"}


def test_librdkafkas_own_partitioner_is_found_out(run_with, kafka, topic, tmp_path):
    assert PARTITIONER in snippet()
    run_with(snippet().replace(PARTITIONER, '"partitioner": "consistent_random"'))
    assert learn(kafka, topic, tmp_path)["joined"]["misplaced"] > USERS
