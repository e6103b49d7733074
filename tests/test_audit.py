"""`learner audit`: clean where the learner did what the log says, and exact about what is wrong where it did not."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from learner.__main__ import main
from learner.agent_settings import AgentSettings
from learner.audit import Audit, AuditConfig, NothingToAudit, Places, Wanted, subject
from learner.audit_report import as_json, as_text
from learner.checkpoint import Checkpoints, decode, encode
from learner.learner import Learner, LearnerSettings
from learner.retelling import blind_ms
from streaming.chunks import rows
from streaming.columns import Kind, Reason
from streaming.dead_letters import dlq_topic, late_topic
from streaming.join_settings import JoinSettings
from streaming.log import LogUnavailable, RecordBatch, open_log
from streaming.rewards import Reward, RewardTable
from streaming.schemas import DEAD_LETTER, Codec
from tests.intakes import JOIN as AUDITED
from tests.intakes import Way
from tests.shop_log import write_shop
from tests.small_shop import delete_topic
from tests.test_bad_input import decided, did

AGENT = AgentSettings(batch_size=32, dim=8, hidden=16, history_length=8)
SETTINGS = LearnerSettings(min_replay=200, replay_capacity=50_000)
JOIN = JoinSettings(gamma=AGENT.gamma, history_length=8)
# so short that a day's log outlasts what must be known of the time before it
SHORT = replace(JOIN, attribution_window_s=600, dedup_window_s=300, session_gap_s=300, user_ttl_s=900)
PARTITIONS = (0, 1)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> str:
    """A log with a small shop's day."""
    url = f"sqlite:///{tmp_path_factory.mktemp('shop') / 'log.db'}"
    log = open_log(url)
    write_shop(log, 500, partitions=len(PARTITIONS), items=60, shoppers=60)
    log.close()
    return url


def records(url, topic="events"):
    """Everything in the topic, as one batch with keys; the partitions take turns."""
    log = open_log(url)
    reader = log.reader(topic, dict.fromkeys(PARTITIONS, 0), keys=True)
    batch = reader.poll(100_000, 5.0)
    reader.close()
    log.close()
    order = np.lexsort((batch.partition, batch.offset))
    values = [batch.value(i) for i in order.tolist()]
    return RecordBatch(
        batch.partition[order],
        batch.offset[order],
        batch.timestamp_ms[order],
        np.frombuffer(b"".join(values), np.uint8),
        np.cumsum([0, *map(len, values)]),
        batch.null[order],
        [batch.keys[i] for i in order.tolist()],
    )


def new_learner(join=JOIN, settings=SETTINGS):
    return Learner(settings, AGENT, join, Codec(), None)


def ends(batch):
    """Next offset of each partition after this batch."""
    return {p: int(batch.offset[batch.partition == p].max()) + 1 for p in PARTITIONS}


def taught(batch, **settings):
    """A learner that has taken it all."""
    learner = new_learner(**settings)
    learner.assign(dict.fromkeys(PARTITIONS, 0))
    learner.take(batch)
    return learner


def save(folder, parts, positions):
    """A checkpoint, as the trainer writes it."""
    meta = {"topic": "events", "positions": {str(p): o for p, o in positions.items()}, "updates": 0}
    Checkpoints(folder / "learner").save(parts, meta)


def audited(folder, url, **more):
    log = open_log(url)
    config = AuditConfig(data_dir=str(folder), weights=str(folder / "weights"), **more)
    report = Audit(log, Codec(), config).run()
    log.close()
    return report


def audit_of(learner, folder, url, positions, change=lambda parts: None):
    """Of a learner's memory, changed in one place."""
    parts = {name: decode(encode(part)) for name, part in learner.snapshot()[1].items()}
    change(parts)
    save(folder, parts, positions)
    return audited(folder, url, show=1000)


# --- as it should be -------------------------------------------------------------------------------------


def test_all_that_the_log_gives_is_in_replay_once(shop, tmp_path):
    batch = records(shop)
    learner = taught(batch)
    report = audit_of(learner, tmp_path, shop, ends(batch))
    assert report.clean, as_text(report)
    assert report.records == len(batch)
    assert sum(p.kept for p in report.partitions) == learner.replay.inserted > 1000
    assert sum(p.decisions for p in report.partitions) >= 500
    assert sum(p.amendments for p in report.partitions) > 20
    assert as_text(report).endswith("clean")


def test_each_partition_says_what_became_transitions_and_what_was_amended(shop, tmp_path):
    batch = records(shop)
    learner = taught(batch)
    report = audit_of(learner, tmp_path, shop, ends(batch))
    held = learner.replay.contents()
    for p in report.partitions:
        mine = held.partition == p.partition
        decided = {
            offset
            for offset, organic in zip(held.offset[mine], held.organic[mine], strict=True)
            if not organic
        }
        assert p.decided == len(decided) > 100
        assert p.transitions - p.organic_transitions == 4 * len(decided)
        assert p.organic_transitions == int(held.organic[mine].sum())
        assert 0 < p.amended <= p.amendments
        line = f"partition {p.partition}: {p.decided:,} of {p.decisions:,} decisions became"
        assert line in as_text(report)


def test_letters_that_are_looked_for_a_few_at_a_time_are_all_found(trained, monkeypatch):
    monkeypatch.setattr("learner.audit.MOST_WANTED", 0)
    url, folder = trained
    report = audited(folder, url)
    assert report.clean, as_text(report)
    assert report.letters == {"dlq": 1, "late": 1, "unverified": 0}
    assert sum(p.letters["dlq"] for p in report.partitions) == 1
    (bad,) = (p for p in report.partitions if p.reasons)
    assert bad.reasons == {"BAD_FRAME": 1}
    assert "dlq: 1 BAD_FRAME (1 letters found)" in as_text(report)


def view(n):
    """A deed in a shop of ten users and seven items, twelve seconds after the one before."""
    event = {
        "event_id": f"e{n}",
        "name": "view_item",
        "user_id": f"user-{n % 10}",
        "items": [{"item_id": f"{n % 7}"}],
    }
    return event["user_id"], Codec().encode_event({**event, "timestamp": 1_700_000_000_000 + n * 12_000})


def test_memory_does_not_grow_with_the_log(tmp_path, monkeypatch):
    """Nor with the number of bad rows; what is remembered is bounded by windows of event time."""
    monkeypatch.setattr("learner.retelling.POLL_RECORDS", 50)

    def peak(count):
        folder = tmp_path / str(count)
        with Way(
            f"sqlite:///{tmp_path / f'{count}.db'}",
            join=SHORT,
            settings=replace(SETTINGS, replay_capacity=200),
        ) as way:
            way.send(view(n) if n % 3 else ("user", b"junk") for n in range(count)).take()
            parts = {name: decode(encode(part)) for name, part in way.learner.snapshot()[1].items()}
            save(folder, parts, way.intake.position())
            config = AuditConfig(data_dir=str(folder), weights=str(folder / "weights"))
            audit = Audit(way.log, Codec(), config)
            tracemalloc.start()
            report = audit.run()
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert report.clean, as_text(report)
        assert report.records == count
        assert report.letters["dlq"] == count // 3
        return most

    peak(300)  # what is made once
    bound = 1.5 * peak(600)
    # or once more: threads that earlier tests left behind allocate too, now and then
    assert peak(2400) < bound or peak(2403) < bound


def test_what_made_room_in_a_small_replay_is_counted(shop, tmp_path):
    batch = records(shop)
    learner = taught(batch, settings=replace(SETTINGS, replay_capacity=300))
    report = audit_of(learner, tmp_path, shop, ends(batch))
    assert report.clean, as_text(report)
    assert sum(p.kept for p in report.partitions) == 300
    assert sum(p.evicted for p in report.partitions) == learner.replay.inserted - 300
    assert report.missed == learner.replay.missed > 20
    assert f"{report.missed} later rewards came after their transitions had made room" in as_text(report)


def test_records_after_the_checkpoint_are_not_counted(shop, tmp_path):
    batch = rows(records(shop), 0, 400)
    report = audit_of(taught(batch), tmp_path, shop, ends(batch))
    assert report.clean, as_text(report)
    assert report.records == 400


def idle_learner(batch):
    """Partition 0 goes quiet in mid-log, and visits end there because time is let pass."""
    learner = taught(rows(batch, 0, 500))
    before = learner.replay.inserted
    for minutes in (20, 40):
        at_ms = (learner.joiner.watermark_ms(0) or 0) + minutes * 60_000
        learner.advance({0: at_ms}, ends(rows(batch, 0, 500)))
    assert learner.replay.inserted > before
    learner.take(rows(batch, 500, len(batch)))
    return learner


def test_time_that_passed_in_an_idle_partition_is_told_again(shop, tmp_path):
    batch = records(shop)
    report = audit_of(idle_learner(batch), tmp_path, shop, ends(batch))
    assert report.clean, as_text(report)


@pytest.mark.parametrize("seconds", [10, 6 * 3600])
def test_a_long_silence_is_told_again_in_steps_as_large_as_they_were(shop, tmp_path, seconds):
    # what a storefront had kept comes then: the clock is put back where it jumped, and not where it just went on
    batch, join = records(shop), replace(JOIN, max_jump_s=4 * 3600)  # in the log itself is no jump then
    learner = taught(rows(batch, 0, 500), join=join)
    since_ms = learner.joiner.watermark_ms(0)
    for passed in range(seconds, 6 * 3600 + 1, seconds):
        learner.advance({0: since_ms + passed * 1000}, ends(rows(batch, 0, 500)))
    learner.take(rows(batch, 500, len(batch)))
    assert learner.joiner.counters()["clock_resets"] == (1 if seconds > join.max_jump_s else 0)
    report = audit_of(learner, tmp_path, shop, ends(batch))
    assert report.clean, as_text(report)


def test_time_that_passed_and_was_not_noted_is_found_out(shop, tmp_path):
    def forget(parts):
        parts["journal"]["times"]["0"] = np.zeros((0, 3), np.int64)

    batch = records(shop)
    report = audit_of(idle_learner(batch), tmp_path, shop, ends(batch), forget)
    assert report.differences["counter"] > 0
    assert {d.partition for d in report.named} == {0}


@pytest.mark.parametrize(
    "changed",
    [
        replace(JOIN, rewards=RewardTable.parse("select_item=2,purchase=1+0.5*value")),
        replace(JOIN, gamma=0.5),
        replace(JOIN, session_gap_s=600, attribution_window_s=3600),
        replace(JOIN, session_gap_s=60, dedup_window_s=600, user_ttl_s=3600),
    ],
)
def test_settings_that_were_changed_on_the_way_hold_from_there_on(shop, tmp_path, changed):
    batch = records(shop)
    first = taught(rows(batch, 0, 500))
    second = new_learner(join=changed)
    second.restore({name: decode(encode(part)) for name, part in first.snapshot()[1].items()})
    second.assign(ends(rows(batch, 0, 500)))
    second.take(rows(batch, 500, len(batch)))
    report = audit_of(second, tmp_path, shop, ends(batch))
    assert report.clean, as_text(report)


@pytest.mark.parametrize("bounds", [(20, 20), (20, 40), (30, 10)])
def test_items_that_there_was_no_room_for_at_the_time_are_unknown_to_the_audit_too(shop, tmp_path, bounds):
    batch = records(shop)
    first, second = (new_learner(settings=replace(SETTINGS, max_items=most)) for most in bounds)
    first.assign(dict.fromkeys(PARTITIONS, 0))
    first.take(rows(batch, 0, 500))
    second.restore({name: decode(encode(part)) for name, part in first.snapshot()[1].items()})
    second.assign(ends(rows(batch, 0, 500)))
    second.take(rows(batch, 500, len(batch)))
    assert len(second.vocabulary) == max(bounds)
    report = audit_of(second, tmp_path, shop, ends(batch))
    assert report.clean, as_text(report)


# --- as it should not be ---------------------------------------------------------------------------------


def transitions_of(parts):
    """(cursor, arrays of the transitions' columns); they are fewer than a segment."""
    state = parts["replay/state"]
    arrays = [parts["replay/rows-000000"], parts["replay/rewards-000000"]]
    return state["cursor"], [(group, name) for group in arrays for name in group]


def drop(row):
    def change(parts):
        cursor, columns = transitions_of(parts)
        for group, name in columns:
            group[name][row : cursor[0] - 1] = group[name][row + 1 : cursor[0]].copy()
        cursor[0] -= 1

    return change


def double(row):
    def change(parts):
        cursor, columns = transitions_of(parts)
        for group, name in columns:
            group[name][cursor[0]] = group[name][row]
        cursor[0] += 1

    return change


def put(part, name, row, value):
    def change(parts):
        array = parts[f"replay/{part}-000000"][name]
        array[row] = value(array[row])

    return change


def place(learner, row):
    held = learner.replay.contents()
    return int(held.partition[row]), int(held.offset[row]), int(held.slot[row])


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (drop(77), "lost"),
        (double(77), "doubled"),
        (put("rewards", "reward", 77, lambda reward: reward + 0.01), "reward"),
        (put("rows", "action", 77, lambda action: action % 60 + 1), "action"),
    ],
)
def test_one_wrong_transition_is_named(shop, tmp_path, change, kind):
    batch = records(shop)
    learner = taught(batch)
    report = audit_of(learner, tmp_path, shop, ends(batch), change)
    assert report.differences == {kind: 1}
    (named,) = report.named
    assert (named.partition, named.offset, named.slot) == place(learner, 77)
    assert named.record.startswith(("decision 'r0-", "select_item '", "view_item '"))
    assert "user" in named.record


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [
        ("next", lambda following: -1, "next step"),
        ("discount", lambda discount: discount / 2, "discount"),
        ("organic", lambda organic: not organic, "organic"),
        ("policy_version", lambda version: version + 1, "policy version"),
    ],
)
def test_one_wrong_step_is_named_in_each_of_its_slots(shop, tmp_path, column, value, kind):
    batch = records(shop)
    learner = taught(batch)
    held = learner.replay.contents()
    first = int(np.flatnonzero((held.discount > 0) & ~held.organic)[0])
    step = int(learner.snapshot()[1]["replay/rows-000000"]["step"][first])
    report = audit_of(learner, tmp_path, shop, ends(batch), put("chain", column, step, value))
    assert report.differences == {kind: 4}
    assert [(d.partition, d.offset, d.slot) for d in report.named] == [
        (*place(learner, first)[:2], slot) for slot in range(4)
    ]


BY_VALUE = RewardTable({"select_item": Reward(0.3), "purchase": Reward(0, 1), "refund": Reward(0, -1)})


@pytest.mark.parametrize(
    ("price", "sent_back", "lost", "differences"),
    [
        (150_000.0, False, 0.0, {}),
        (150_000.0, False, 0.3, {"reward": 1}),  # the click that led to it
        (
            100_000.013,
            True,
            0.0,
            {},
        ),  # what is left of it, 0.296875, is the click, and what float32 made of both
        (1_234_567.89, True, 0.0, {}),
        (10.0, True, 0.01, {"reward": 1}),
    ],
)
def test_a_reward_may_differ_by_what_rounding_does_to_its_parts(
    tmp_path, price, sent_back, lost, differences
):
    back = [did("refund", "a", at=90, price=price)] if sent_back else []
    url = f"sqlite:///{tmp_path / 'log.db'}"
    with Way(url, join=replace(AUDITED, rewards=BY_VALUE)) as way:
        way.send([
            decided("r1", "a", "b", at=0), did("select_item", "a", at=1, seen="r1"),
            did("purchase", "a", at=2, seen="r1", price=price), decided("r2", "c", "d", at=60), *back,
        ]).take()  # fmt: skip
        change = put("rewards", "reward", 0, lambda reward: reward - lost)
        report = audit_of(way.learner, tmp_path, url, way.intake.position(), change)
    assert report.differences == differences
    flags = ["--log", url, "--data-dir", str(tmp_path), "--weights", str(tmp_path / "weights")]
    assert main(["audit", *flags, "--explain", "0/0"]) == len(differences)


def test_rounding_is_no_difference(shop, tmp_path):
    batch = records(shop)
    change = put("rewards", "reward", 77, lambda reward: reward + 1e-6)
    assert audit_of(taught(batch), tmp_path, shop, ends(batch), change).clean


def test_a_decision_that_was_never_taken_is_named_with_its_ids(shop, tmp_path):
    batch = records(shop)
    kinds = new_learner().decoder.decode(batch).kind
    missed = int(np.flatnonzero(kinds == Kind.DECISION)[100])
    learner = taught(rows(batch, 0, missed))
    learner.take(rows(batch, missed + 1, len(batch)))
    report = audit_of(learner, tmp_path, shop, ends(batch))
    where = int(batch.partition[missed]), int(batch.offset[missed])
    named = [d for d in report.named if d.kind == "lost" and (d.partition, d.offset) == where]
    ids = Codec().decode(batch.value(missed))[1]
    wanted = f"decision {ids['recommendation_id']!r} for user {ids['user_id']!r}"
    assert [(d.slot, d.record) for d in named] == [(slot, wanted) for slot in range(4)]


def test_a_record_that_was_taken_twice_is_counted(shop, tmp_path):
    batch = records(shop)
    learner = taught(rows(batch, 0, 300))
    learner.take(rows(batch, 299, len(batch)))
    report = audit_of(learner, tmp_path, shop, ends(batch))
    (named,) = report.named
    assert named.message == "the checkpoint counts 1 duplicates, the log gives 0"


def test_transitions_beyond_the_offsets_are_named(shop, tmp_path):
    batch = records(shop)
    report = audit_of(taught(batch), tmp_path, shop, {**ends(batch), 1: 100})
    assert report.differences["invented"] > 0
    assert {d.partition for d in report.named} == {1}


class Stalling:
    """A log whose readers fall silent after so many records."""

    def __init__(self, log, after):
        self._log, self._after = log, after

    def __getattr__(self, name):
        return getattr(self._log, name)

    def reader(self, topic, offsets, **more):
        reader = self._log.reader(topic, offsets, **more)
        poll = reader.poll
        reader.poll = lambda most, timeout_s: poll(
            max(0, min(most, self._after - sum(reader.position().values()))), 0.0
        )
        return reader


def test_records_that_do_not_come_are_not_lost(shop, tmp_path):
    batch = records(shop)
    learner = taught(batch)
    assert audit_of(learner, tmp_path, shop, ends(batch)).clean
    log = open_log(shop)
    config = AuditConfig(data_dir=str(tmp_path), weights=str(tmp_path / "weights"))
    with pytest.raises(
        LogUnavailable, match=r"events/0 could not be read: nothing came in 60 s at offset 100"
    ):
        Audit(Stalling(log, 100), Codec(), config).run()
    log.close()


def test_offsets_beyond_the_log_are_another_log(shop, tmp_path):
    batch = records(shop)
    report = audit_of(taught(batch), tmp_path, shop, {**ends(batch), 1: 10_000})
    assert report.differences == {"unexplained": 1}
    assert "another log" in as_text(report)


# --- where the log's beginning is gone -------------------------------------------------------------------


@pytest.fixture
def shortened(shop, tmp_path):
    """(url, batch): the shop's log, whose first half retention has taken; what was read was all of it."""
    batch = records(shop)
    url = f"sqlite:///{tmp_path / 'shortened.db'}"
    log = open_log(url)
    log.create_topic("events", len(PARTITIONS), retention_ms=3_600_000)
    producer = log.producer()
    now_ms = int(time.time() * 1000)
    half = np.median(batch.offset[batch.partition == 0])
    for i in range(len(batch)):
        old = batch.partition[i] == 0 and batch.offset[i] < half
        producer.send("events", batch.keys[i], batch.value(i), now_ms - (86_400_000 if old else 0))
    producer.close()
    log.expire("events")
    assert log.bounds("events")[0].low > 0
    log.close()
    return url, batch


def test_what_is_gone_is_said_and_is_no_difference(shortened, tmp_path):
    url, batch = shortened
    report = audit_of(taught(batch), tmp_path, url, ends(batch))
    assert report.clean, as_text(report)
    assert [p.complete for p in report.partitions] == [False, True]
    assert "no longer there to be verified; judged: nothing" in as_text(report)
    assert report.partitions[0].unverified == report.partitions[0].kept > 0


def test_once_the_past_matters_no_more_what_follows_is_judged(shortened, tmp_path):
    url, batch = shortened
    learner = taught(batch, join=SHORT)
    report = audit_of(learner, tmp_path / "well", url, ends(batch))
    assert report.clean, as_text(report)
    first, held = report.partitions[0], learner.replay.contents()
    assert first.start < first.verified_from < first.end
    mine = np.flatnonzero((held.partition == 0) & (held.offset >= first.verified_from))
    assert 0 < len(mine) == first.kept - first.unverified
    report = audit_of(learner, tmp_path / "ill", url, ends(batch), drop(int(mine[0])))
    assert report.differences == {"lost": 1}
    earlier = np.flatnonzero((held.partition == 0) & (held.offset < first.verified_from))
    assert audit_of(learner, tmp_path / "unknown", url, ends(batch), drop(int(earlier[0]))).clean


def test_the_past_matters_for_as_long_as_anything_is_remembered():
    assert blind_ms(SHORT) == 605_000
    assert blind_ms(replace(SHORT, horizon="user")) == 905_000


# --- real learners, real logs ----------------------------------------------------------------------------

SMALL = (
    *("--batch-size", "32", "--dim", "8", "--hidden", "16", "--history-length", "8", "--min-replay", "200"),
    *("--updates-high", "0.02", "--checkpoint-s", "0.3", "--publish-s", "0.3"),
)


def copied(shop, log, topic):
    """The shop's log once more, with a duplicate, a bad row and one that comes too late."""
    batch, codec = records(shop), Codec()
    log.create_topic(topic, len(PARTITIONS))
    producer = log.producer()
    for i in range(len(batch)):
        producer.send(topic, batch.keys[i], batch.value(i))
    producer.send(topic, batch.keys[-1], batch.value(len(batch) - 1))
    producer.send(topic, b"nobody", b"hello")
    _, event = codec.decode(batch.value(len(batch) - 1))
    event |= {"timestamp": event["timestamp"] - 90 * 86_400_000}
    event.pop("event_id", None)
    late = {"event_id": "too-late", "name": "view_item", "user_id": event["user_id"], "items": []}
    producer.send(topic, batch.keys[-1], codec.encode_event({**late, "timestamp": event["timestamp"]}))
    producer.close()


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "learner", "audit", *arguments], capture_output=True, text=True, timeout=120
    )


def test_a_running_learner_is_audited_on_either_log(shop, log_url, tmp_path):
    topic = f"events-{tmp_path.name}"
    log = open_log(log_url)
    copied(shop, log, topic)
    stores = ("--data-dir", str(tmp_path), "--weights", str(tmp_path / "weights"), "--log", log_url)
    learner = subprocess.Popen(
        [sys.executable, "-m", "learner", "--topic", topic, *stores, *SMALL], stderr=subprocess.PIPE
    )
    audits = []
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not any(is_through(report, log, topic) for report in audits):
            time.sleep(0.3)
            try:
                audits.append(audited(tmp_path, log_url))
            except NothingToAudit:
                continue
            assert audits[-1].clean, as_text(audits[-1])
    finally:
        learner.send_signal(signal.SIGTERM)
        learner.communicate(timeout=60)
    assert learner.returncode == 0
    done = command(*stores, "--json", "--topic", topic)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["clean"]
    assert told["bad"] == {"BAD_FRAME": 1}
    assert told["letters"] == {"dlq": 1, "late": 1, "unverified": 0}
    assert sum(p["duplicates"] for p in told["partitions"]) == 1
    (version,) = told["weights"]
    assert version["labels"] == ["stable"]
    assert version["covered"]
    assert version["positions"] == {str(p): bound.high for p, bound in log.bounds(topic).items()}
    log.close()


def is_through(report, log, topic):
    return {p.partition: p.end for p in report.partitions} == {
        p: bound.high for p, bound in log.bounds(topic).items()
    }


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory) -> tuple[str, Path]:
    """(url, folder): what a learner left behind."""
    folder = tmp_path_factory.mktemp("trained")
    url = f"sqlite:///{folder / 'log.db'}"
    log = open_log(url)
    copied(shop, log, "events")
    log.close()
    stores = ("--data-dir", str(folder), "--weights", str(folder / "weights"), "--log", url)
    subprocess.run(
        [sys.executable, "-m", "learner", "--until-caught-up", *stores, *SMALL],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return url, folder


def test_a_letter_of_an_older_topic_by_this_name_is_none():
    """Its record had the same offset, at another time."""
    codec, wanted, places = Codec(), Wanted(), Places()
    places.add(7, 2_000, Reason.BAD_FRAME)
    wanted.of[0] = places

    def letter(**told):
        record = {"topic": "events", "partition": 0, "offset": 7, "timestamp": 2_000, "reason": "BAD_FRAME"}
        return subject(codec.encode(DEAD_LETTER, record | told), codec, "events")

    assert letter(topic="others") is None
    for other in (letter(timestamp=1_000), letter(partition=1), letter(offset=8)):
        wanted.find(other)
    assert [offset for offset, _ in places.missing()] == [7]
    wanted.find(letter())
    assert places.found() == 1


def test_a_letter_that_was_never_written_is_a_difference(trained, tmp_path):
    url, folder = trained
    shutil.copy(url.removeprefix("sqlite:///"), tmp_path / "log.db")
    other = f"sqlite:///{tmp_path / 'log.db'}"
    log = open_log(other)
    for letters in (dlq_topic("events"), late_topic("events")):
        delete_topic(log, letters)
    log.close()
    report = audited(folder, other)
    assert report.differences == {"no letter": 2}
    assert {d.message for d in report.named} == {
        "BAD_FRAME, and events.dlq has no letter of it",
        "LATE, and events.late has no letter of it",
    }


def test_the_command_names_what_it_found_and_ends_with_1(trained, tmp_path):
    url, folder = trained
    loaded = Checkpoints(folder / "learner").load()
    parts = {name: loaded.parts[name] for name in loaded.parts}
    drop(5)(parts)
    Checkpoints(tmp_path / "learner").save(parts, loaded.meta)
    done = command("--log", url, "--data-dir", str(tmp_path), "--weights", str(folder / "weights"))
    assert done.returncode == 1
    assert "lost: partition" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 DIFFERENCES: 1 lost"
    assert " (stable) was trained on everything before offsets 0:" in done.stdout


def test_weights_that_have_seen_more_than_the_checkpoint_are_said_to(trained, shop, tmp_path):
    url, folder = trained
    shutil.copytree(folder / "weights", tmp_path / "weights")
    batch = rows(records(url), 0, 400)
    report = audit_of(taught(batch), tmp_path, url, ends(batch))
    assert report.clean
    assert "has seen more than this checkpoint" in as_text(report)
    assert not any(v["covered"] for v in as_json(report)["weights"])


@pytest.mark.parametrize(
    ("flags", "status", "wanted"),
    [
        (("--tpic", "x"), 2, "did you mean '--topic'?"),
        (("--show", "-1"), 2, "show must be within 0..1000"),
        (("--log", "redis://x"), 2, "is no log"),
        (("--data-dir", "nowhere"), 1, "give the learner's --data-dir and --name"),
    ],
)
def test_a_wrong_command_line_is_one_line(flags, status, wanted, tmp_path, capsys):
    try:
        ended = main(["audit", "--log", f"sqlite:///{tmp_path / 'log.db'}", *flags])
    except SystemExit as wrong:
        ended = wrong.code
    said = capsys.readouterr()
    assert ended == status
    assert wanted in said.err
    assert len(said.err.splitlines()) == 1
    assert not said.out


def test_a_checkpoint_of_another_topic_is_refused(trained):
    url, folder = trained
    with pytest.raises(NothingToAudit, match="of topic 'events', not 'clicks'"):
        audited(folder, url, topic="clicks")


def test_visits_that_ended_because_the_shop_was_quiet_are_no_difference(tmp_path):
    url = f"sqlite:///{tmp_path / 'log.db'}"
    log, now_ms = open_log(url), int(time.time() * 1000)
    log.create_topic("events", len(PARTITIONS))
    producer = log.producer()
    for n in range(40):
        event = {
            "event_id": f"e{n}",
            "name": "view_item",
            "user_id": f"user-{n % 10}",
            "timestamp": now_ms - 1000 + n,
            "items": [{"item_id": f"item-{n % 7}"}],
        }
        producer.send("events", event["user_id"].encode(), Codec().encode_event(event))
    producer.close()
    log.close()
    stores = ("--data-dir", str(tmp_path), "--weights", str(tmp_path / "weights"), "--log", url)
    quick = ("--idle-s", "1", "--session-gap-s", "1", "--watermark-delay-s", "0")
    learner = subprocess.Popen(
        [sys.executable, "-m", "learner", *stores, *SMALL, *quick], stderr=subprocess.PIPE
    )
    try:
        deadline, opened = time.monotonic() + 60, 1
        while opened and time.monotonic() < deadline:
            time.sleep(0.3)
            with contextlib.suppress(NothingToAudit):
                report = audited(tmp_path, url)
                assert report.clean, as_text(report)
                opened = sum(p.open for p in report.partitions) or 40 - report.inserted
    finally:
        learner.send_signal(signal.SIGTERM)
        learner.communicate(timeout=60)
    assert opened == 0
    assert sum(p.kept for p in report.partitions) == report.inserted == 40
