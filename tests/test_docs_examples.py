"""What the README and docs/operations.md show in Python, and what they promise about going back, tried."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from learner.checkpoint import Checkpoints
from learner.weights import Meta, WeightStore
from streaming.importers import ImportSettings, import_file
from streaming.interning import Vocabulary
from streaming.log import open_log, partition_of
from streaming.schemas import Codec
from streaming.sqlite_log import SqliteLog
from streaming.topics import TopicSettings, create_topics
from tests.serving_process import ServerProcess, publish

ROOT = Path(__file__).parent.parent
HOUR_MS = 3_600_000


def example(page: str, word: str) -> str:
    """The one Python block of a page that has this word in it."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    (found,) = [block for block in blocks if word in block]
    return str(found)


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} is not in the example once"
    return text.replace(old, new)


def test_the_readmes_client_gets_a_slate(tmp_path, capsys):
    publish(WeightStore(tmp_path), ["tea", "milk", "salt", "soap"])
    with ServerProcess("--weights", str(tmp_path)) as server:
        exec(replaced(example("README.md", "client.recommend("), "127.0.0.1:50051", server.target), {})
    shown = re.findall(r"'(\w+)'", capsys.readouterr().out)
    assert len(shown) == 3
    assert set(shown) < {"tea", "milk", "salt", "soap"}


def test_the_readmes_shop_writes_its_catalog_and_an_event_by_our_code(tmp_path):
    url = f"sqlite:///{tmp_path / 'log.db'}"
    log = open_log(url)
    list(create_topics(log, TopicSettings(partitions=4)))
    exec(replaced(example("README.md", "encode_item"), "sqlite:///.bellwether/log.db", url), {})
    catalog = log.reader("catalog", {0: 0}, keys=True).poll(10, 1.0)
    at = partition_of(b"anna", 4)
    events = log.reader("events", {at: 0}).poll(10, 1.0)
    assert Codec().decode(catalog.value(0))[1]["brand"] == "Acme"
    assert (catalog.keys, catalog.value(1)) == ([b"case-7", b"phone-0"], None)
    assert Codec().decode(events.value(0))[1]["items"][0]["item_id"] == "case-7"
    log.close()


def test_the_log_of_your_own_that_is_shown_can_be_imported(tmp_path):
    (lines,) = re.findall(r"^```json\n(.*?)^```", (ROOT / "docs/import.md").read_text(), re.M | re.S)
    (tmp_path / "events.jsonl").write_text(lines)
    log = open_log(f"sqlite:///{tmp_path / 'log.db'}")
    said = str(import_file("ga4", tmp_path / "events.jsonl", log, Codec(), ImportSettings()))
    assert said == "3 events and 1 catalog records written, 2026-01-31 18:30 to 2026-01-31 18:32"
    log.close()


def test_the_example_of_labels_points_canary_at_the_newest_version(tmp_path, capsys):
    store, vocabulary = WeightStore(tmp_path), Vocabulary()
    for number in (1.0, 2.0):
        store.publish({"online.w": np.array([number])}, Meta(), vocabulary)
    exec(replaced(example("docs/operations.md", "set_label"), ".bellwether/weights", str(tmp_path)), {})
    assert capsys.readouterr().out == "[1, 2] 2\n"
    assert WeightStore(tmp_path).latest("canary") == 2


def test_a_version_that_an_operators_label_names_is_kept(tmp_path):
    store, vocabulary = WeightStore(tmp_path, keep=1), Vocabulary()
    store.publish({"online.w": np.array([1.0])}, Meta(), vocabulary)
    WeightStore(tmp_path).set_label("held", 1)
    for number in (2.0, 3.0):
        store.publish({"online.w": np.array([number])}, Meta(), vocabulary)
    assert WeightStore(tmp_path).versions() == [1, 3]


def test_with_the_newest_manifest_moved_away_a_learner_goes_on_from_the_one_before(tmp_path):
    checkpoints = Checkpoints(tmp_path / "data")
    for step in (1, 2):
        checkpoints.save({"agent": np.array([step]), "same": np.arange(3)}, {"step": step})
    newest = max((tmp_path / "data").glob("checkpoint-*.json"))
    shutil.move(newest, tmp_path / newest.name)
    again = Checkpoints(tmp_path / "data")
    loaded = again.load()
    assert loaded is not None
    assert (loaded.meta, loaded.parts["agent"].tolist()) == ({"step": 1}, [1])
    again.save({"agent": np.array([7]), "same": np.arange(3)}, {"step": 7})
    after = Checkpoints(tmp_path / "data").load()
    assert after is not None
    assert after.meta == {"step": 7}


@pytest.mark.slow
def test_a_learner_whose_offsets_retention_took_ends_and_says_where(tmp_path):
    url, now_ms, codec = f"sqlite:///{tmp_path / 'log.db'}", int(time.time() * 1000), Codec()
    log = open_log(url)
    log.create_topic("events", 1, retention_ms=HOUR_MS)

    def write(first: int) -> None:
        producer = log.producer()
        for n in range(first, first + 5):
            event = {"event_id": f"e{n}", "name": "view_item", "user_id": "anna", "timestamp": now_ms}
            producer.send("events", b"anna", codec.encode_event(event))
        producer.close()

    def learn() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "learner", "--log", url, "--until-caught-up"]
        stores = ["--data-dir", str(tmp_path / "data"), "--weights", str(tmp_path / "weights")]
        return subprocess.run([*command, *stores], capture_output=True, text=True, timeout=200, cwd=ROOT)

    write(0)
    assert learn().returncode == 0
    write(5)
    SqliteLog(url, str(tmp_path / "log.db"), clock=lambda: time.time() + 7200).expire("events")
    write(10)
    log.close()
    done = learn()
    assert done.returncode == 1
    assert "events/0 begins at offset 10, but 5 is next to be read" in done.stderr.splitlines()[-1]
