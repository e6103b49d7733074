"""The `learner` command as its users run it: real processes, killed, stopped, fenced, and started again."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from learner.agent_settings import AgentSettings
from learner.checkpoint import Checkpoints
from learner.learner import Learner, LearnerSettings
from learner.weights import WeightStore
from streaming.dead_letters import dlq_topic
from streaming.join_settings import JoinSettings
from streaming.log import open_log
from streaming.schemas import Codec
from tests.learner_process import await_line, finish, start
from tests.shop_log import write_shop

AGENT = AgentSettings(batch_size=32, dim=8, hidden=16, history_length=8)


def train(folder: Path, url: str, *flags: str) -> None:
    status, said = finish(start(folder, url, "--until-caught-up", *flags))
    assert status == 0, said


def train_through_kills(folder: Path, url: str, seed: int, *flags: str) -> int:
    """Killed (-9) at random moments, started again each time, until it is through; returns how often it died."""
    luck = random.Random(seed)
    for deaths in range(8):
        process = start(folder, url, "--until-caught-up", "--checkpoint-s", "0.1", *flags)
        await_line(process, "no checkpoint of", "going on from")
        try:
            process.wait(luck.uniform(0.2, 1.2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            finish(process)
            continue
        status, said = finish(process)
        assert status == 0, said
        return deaths
    train(folder, url, *flags)
    return 8


def newest(folder: Path):
    loaded = Checkpoints(folder / "data" / "learner").load()
    assert loaded is not None
    return loaded


def part_hashes(folder: Path) -> dict[str, str]:
    """What each part of the newest checkpoint is, by its hash."""
    manifest = max((folder / "data" / "learner").glob("checkpoint-*.json"))
    return {name: file["sha256"] for name, file in json.loads(manifest.read_text())["parts"].items()}


def transitions(folder: Path) -> list[tuple[object, ...]]:
    """What replay holds: identity, item, reward and discount of each transition, in no order of arrival."""
    loaded = newest(folder)
    learner = Learner(
        LearnerSettings(min_replay=200, replay_capacity=100_000),
        AGENT,
        JoinSettings(gamma=AGENT.gamma, history_length=8),
        Codec(),
        None,
    )
    learner.restore(loaded.parts)
    held = learner.replay.contents()
    items = [learner.vocabulary.item_id(i) for i in held.action.tolist()]
    columns = (held.partition.tolist(), held.offset.tolist(), held.slot.tolist(), items)
    return sorted(zip(*columns, held.reward.tolist(), held.discount.tolist(), strict=True))


@pytest.fixture(scope="module")
def shop_url(tmp_path_factory) -> str:
    """A log with a day of a small shop."""
    url = f"sqlite:///{tmp_path_factory.mktemp('shop') / 'log.db'}"
    log = open_log(url)
    write_shop(log, 1500, partitions=4)
    log.close()
    return url


@pytest.fixture(scope="module")
def unbroken(shop_url, tmp_path_factory) -> Path:
    """What a deterministic learner that nobody disturbed made of it."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(folder, shop_url, "--deterministic", "--chunk", "100")
    return folder


def test_a_killed_and_restarted_deterministic_learner_ends_with_the_same_weights(
    shop_url, unbroken, tmp_path
):
    assert train_through_kills(tmp_path, shop_url, 1, "--deterministic", "--chunk", "100") > 0
    assert part_hashes(tmp_path) == part_hashes(unbroken)
    assert newest(tmp_path).meta["updates"] > 100


def test_a_killed_and_restarted_learner_ends_with_the_same_transitions_and_offsets(
    shop_url, unbroken, tmp_path
):
    assert train_through_kills(tmp_path, shop_url, 2, "--poll-records", "60") > 0
    assert newest(tmp_path).meta["positions"] == newest(unbroken).meta["positions"]
    assert transitions(tmp_path) == transitions(unbroken)
    assert newest(tmp_path).meta["joined"] == newest(unbroken).meta["joined"]


def test_sigterm_ends_it_after_a_last_checkpoint_and_version(shop_url, tmp_path):
    process = start(tmp_path, shop_url, "--checkpoint-s", "3600", "--publish-s", "3600")
    await_line(process, "no checkpoint of")
    time.sleep(3.0)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    assert status == 0, said
    store = WeightStore(str(tmp_path / "weights"))
    version = store.latest()
    assert version is not None
    manifest, meta = store.manifest(version), newest(tmp_path).meta
    assert manifest.updates == meta["updates"] > 0
    assert {str(p): o for p, o in manifest.positions.items()} == meta["positions"]


def test_a_last_checkpoint_that_fails_does_not_lose_the_report(shop_url, tmp_path):
    report, checkpoints = tmp_path / "new" / "report.json", tmp_path / "data" / "learner"
    process = start(tmp_path, shop_url, "--checkpoint-s", "3600", "--prequential", str(report))
    await_line(process, "no checkpoint of")
    time.sleep(3.0)
    checkpoints.rename(tmp_path / "away")
    checkpoints.write_text("in the way")
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    assert (status, "ended without a last checkpoint" in said) == (1, True), said
    assert json.loads(report.read_text())["steps"] > 100


def test_a_report_says_that_it_goes_on_from_a_checkpoint_and_where_it_is_empty(tmp_path):
    url, report = f"sqlite:///{tmp_path / 'log.db'}", tmp_path / "report.json"
    with closing(open_log(url)) as log:
        write_shop(log, 50, partitions=1)
    said = []
    for _ in range(2):
        process = start(tmp_path, url, "--until-caught-up", "--prequential", str(report))
        said.append(finish(process)[1])
    from_now_on, empty = (f"{report} will cover what comes from now on", f"{report} covers 0 steps")
    assert [(from_now_on in lines, empty in lines) for lines in said] == [(False, False), (True, True)]


def test_a_second_learner_with_the_same_name_fences_the_first(shop_url, tmp_path):
    first = start(tmp_path, shop_url, "--checkpoint-s", "0.2")
    await_line(first, "no checkpoint of")
    time.sleep(1.0)
    second = start(tmp_path, shop_url, "--checkpoint-s", "0.2")
    try:
        status, said = finish(first)
        assert status == 1
        assert "was taken over by epoch 2" in said.splitlines()[-1]
    finally:
        second.send_signal(signal.SIGTERM)
    assert finish(second)[0] == 0


def test_a_second_start_that_finds_its_metrics_port_taken_does_not_stop_the_first(shop_url, tmp_path):
    with socket.create_server(("0.0.0.0", 0)) as first:
        port = first.getsockname()[1]
        status, said = finish(start(tmp_path, shop_url, "--metrics-port", str(port)))
    assert status == 1
    assert f"metrics port {port}: Address already in use" in said.splitlines()[-1]
    assert not (tmp_path / "data" / "fence").exists()


def test_a_second_start_that_cannot_go_on_from_the_checkpoint_does_not_stop_the_first(shop_url, tmp_path):
    first = start(tmp_path, shop_url, "--checkpoint-s", "0.2")
    try:
        await_line(first, "no checkpoint of")
        give_up = time.monotonic() + 60
        while Checkpoints(tmp_path / "data" / "learner").load() is None and time.monotonic() < give_up:
            time.sleep(0.1)
        status, said = finish(start(tmp_path, shop_url, "--history-length", "16"))
        assert status == 1
        assert "start with --history-length 8" in said.splitlines()[-1]
        time.sleep(1.0)
    finally:
        first.send_signal(signal.SIGTERM)
    status, said = finish(first)
    assert status == 0, said


def test_it_catches_up_with_either_log_and_dead_letters_what_it_cannot_read(log_url, tmp_path):
    log = open_log(log_url)
    topic = f"events-{tmp_path.name}"
    log.create_topic(topic, 2)
    producer = log.producer()
    for n in range(300):
        user = f"user-{n % 20}"
        event = {
            "event_id": f"e{n}",
            "name": "view_item",
            "user_id": user,
            "timestamp": 1_700_000_000_000 + n * 1000,
            "items": [{"item_id": f"item-{n % 7}"}],
        }
        producer.send(topic, user.encode(), Codec().encode_event(event))
    producer.send(topic, b"nobody", b"hello")
    producer.flush()
    train(tmp_path, log_url, "--topic", topic, "--min-replay", "40")
    meta = newest(tmp_path).meta
    assert meta["positions"] == {str(p): bounds.high for p, bounds in log.bounds(topic).items()}
    assert meta["joined"]["events"] == 300
    assert meta["updates"] > 0
    assert log.committed("bellwether-learner", topic) == {int(p): o for p, o in meta["positions"].items()}
    reader = log.reader(dlq_topic(topic), {0: 0})
    letters = reader.poll(10, 5.0)
    assert len(letters) == 1
    assert Codec().decode(letters.value(0))[1]["reason"] == "BAD_FRAME"
    for thing in (reader, producer, log):
        thing.close()


def test_partitions_added_while_it_runs_are_read_from_their_first_record_on(log_url, tmp_path):
    log = open_log(log_url)
    topic = f"events-{tmp_path.name}"
    log.create_topic(topic, 1)
    process = start(tmp_path, log_url, "--topic", topic, "--checkpoint-s", "0.5")
    await_line(process, "no checkpoint of")
    log.create_topic(topic, 3)
    with closing(log.producer()) as producer:
        for n in range(60):
            event = {
                "event_id": f"e{n}",
                "name": "view_item",
                "user_id": f"user-{n}",
                "timestamp": 1_700_000_000_000 + n * 1000,
                "items": [{"item_id": f"item-{n % 7}"}],
            }
            producer.send(topic, event["user_id"].encode(), Codec().encode_event(event))
    await_line(process, "partitions [1, 2] were added")
    give_up = time.monotonic() + 60
    while newest(tmp_path).meta["joined"]["events"] < 60 and time.monotonic() < give_up:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0
    meta = newest(tmp_path).meta
    assert meta["joined"]["events"] == 60
    assert meta["positions"] == {str(p): bounds.high for p, bounds in log.bounds(topic).items()}
    assert min(bounds.high for bounds in log.bounds(topic).values()) > 0
    log.close()


def test_a_topic_that_is_not_there_is_one_line_and_status_1(tmp_path):
    status, said = finish(start(tmp_path, f"sqlite:///{tmp_path / 'log.db'}", "--until-caught-up"))
    assert status == 1
    assert said.splitlines()[-1].endswith("create it with `streaming topics`")
    assert "Traceback" not in said


def test_a_log_that_is_too_small_to_learn_from_is_no_silent_success(shop_url, tmp_path):
    status, said = finish(start(tmp_path, shop_url, "--until-caught-up", "--min-replay", "50000"))
    assert status == 0
    assert "nothing was learnt, and there are no weights: the log gave" in said
    assert "comes after about 50010 (--min-replay 50000, and one for each 10 by --updates-high)" in said


def test_a_checkpoint_of_another_log_is_refused(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    other = f"sqlite:///{tmp_path / 'other.db'}"
    log = open_log(other)
    log.create_topic("events", 4)
    log.close()
    status, said = finish(start(tmp_path, other, "--until-caught-up"))
    assert status == 1
    assert "was deleted and made anew, or this is another log" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--tpic", "x"), "did you mean '--topic'?"),
        (("--epsilon", "0.1"), "no such flag --epsilon"),  # servers explore
        (("--gamma", "1.5"), "gamma"),
        (("--deterministic", "--device", "cuda"), "deterministic needs device cpu"),
        (("--device", "tpu9"), "--device tpu9: "),
        (("--device", "meta"), "--device meta: is neither cpu nor cuda nor cuda:N"),
        (("--device", "cuda:99"), "--device cuda:99: "),
        (("--rewards", "click=1"), "no such event name"),
        (
            ("--prequential", "."),
            "--prequential: no report can be written there: [Errno 21] Is a directory: '.'",
        ),
        (("--prequential", "/dev/null/r.json"), "--prequential: no report can be written there: "),
        (("--log", "redis://x"), "is no log"),
        (
            ("--weights", "nosuch://x"),
            "argument --weights: cannot open 'nosuch://x': Protocol not known: nosuch",
        ),
        (("audit", "--weights", "abfs://x"), "argument --weights: cannot open 'abfs://x': Install adlfs"),
        (("evaluate", "--weights", "nosuch://x"), "argument --weights: cannot open 'nosuch://x'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(flags, wanted):
    done = subprocess.run([sys.executable, "-m", "learner", *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert wanted in done.stderr
    assert len(done.stderr.splitlines()) == 1
