"""Offsets out of retention: the learner stops and says what to do, or steps over them, is exact, and says so."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from learner.audit import Audit, AuditConfig
from learner.audit_report import as_json, as_text
from learner.gaps import gaps_at
from learner.journal import Gap
from learner.learner import CannotContinue
from learner.train import TrainConfig, offsets_to_start
from streaming.log import Bounds, Log
from streaming.schemas import Codec
from tests.learner_process import await_line, finish, start
from tests.small_shop import Shop, await_offset, expire, learn
from tests.test_learner_process import newest
from tests.trainer_rig import Rig

# --- what is a gap ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_gap", "end"), [("earliest", 50), ("latest", 90)])
def test_a_gap_ends_where_the_operator_says(on_gap, end):
    bounds = {0: Bounds(50, 90), 1: Bounds(0, 90)}
    assert gaps_at("events", {0: 20, 1: 20}, bounds, on_gap) == {0: Gap(20, end)}


def test_a_gap_stops_the_learner_unless_it_was_told_otherwise():
    bounds = {0: Bounds(50, 90), 1: Bounds(30, 90)}
    with pytest.raises(CannotContinue, match=r"30 offsets .*1 more partitions.*--on-gap earliest"):
        gaps_at("events", {0: 20, 1: 20}, bounds, "stop")


@pytest.mark.parametrize("on_gap", ["stop", "earliest", "latest"])
def test_a_log_that_ends_before_the_position_is_never_stepped_into(on_gap):
    with pytest.raises(CannotContinue, match="ends at 90: another log"):
        gaps_at("events", {0: 91}, {0: Bounds(50, 90)}, on_gap)


def test_where_every_position_is_there_is_no_gap():
    assert gaps_at("events", {0: 50, 1: 90}, {0: Bounds(50, 90), 1: Bounds(0, 90)}, "stop") == {}


def test_a_partition_that_the_checkpoint_does_not_know_is_read_from_0_on():
    saved, bounds = {"topic": "events", "positions": {"0": 20}}, {0: Bounds(0, 90), 1: Bounds(50, 90)}
    assert offsets_to_start(TrainConfig(), saved, bounds) == {0: 20, 1: 0}
    assert offsets_to_start(TrainConfig(start="latest"), saved, bounds) == {0: 20, 1: 0}
    assert offsets_to_start(TrainConfig(), None, bounds) == {0: 0, 1: 50}  # nothing was missed: it begins


def test_a_deterministic_learner_cannot_be_told_to_step_over_gaps():
    with pytest.raises(ValueError, match="deterministic needs on_gap stop"):
        TrainConfig(deterministic=True, on_gap="earliest")


# --- real learners, real logs ----------------------------------------------------------------------------


@pytest.fixture
def shop(log_url, tmp_path):
    shop = Shop(log_url, f"events-{tmp_path.name}")
    yield shop
    shop.log.close()


def audited(folder: Path, log: Log):
    config = AuditConfig(data_dir=str(folder / "data"), weights=str(folder / "weights"))
    report = Audit(log, Codec(), config).run()
    assert report.clean, as_text(report)
    return report


def test_a_gap_found_at_the_start_stops_it_by_default_and_is_stepped_over_on_purpose(shop, tmp_path):
    shop.write(100)
    status, said = learn(tmp_path, shop.url, *shop.flags("--until-caught-up"))
    assert status == 0, said
    shop.write(60)
    shop.expire()
    shop.write(80)

    for flags in ((), ("--deterministic",)):
        status, said = learn(tmp_path, shop.url, *shop.flags("--until-caught-up", *flags))
        assert status == 1
        assert "retention took 60 offsets" in said.splitlines()[-1]
        assert "--on-gap earliest" in said.splitlines()[-1]
        assert "Traceback" not in said
    assert newest(tmp_path).meta["positions"] == {"0": 100}

    flags = shop.flags("--until-caught-up", "--on-gap", "earliest")
    status, said = learn(tmp_path, shop.url, *flags)
    assert status == 0, said
    assert f"{shop.topic}/0: offsets 100 to 159 (60 of them) were gone before they were read" in said
    assert "60 offsets were gone" in said.splitlines()[-1]
    meta = newest(tmp_path).meta
    assert meta["positions"] == {"0": 240}
    assert meta["joined"]["events"] == 180  # of the 240 that were written

    report = audited(tmp_path, shop.log)
    assert "60 offsets were gone before they were read and were stepped over on purpose" in as_text(report)
    assert as_json(report)["partitions"][0]["gaps"] == [(100, 160)]


def test_a_gap_that_opens_under_a_running_learner_is_stepped_over(shop, tmp_path):
    shop.write(100)
    learner = start(tmp_path, shop.url, *shop.flags("--on-gap", "earliest"))
    try:
        await_offset(tmp_path, 100)
        learner.send_signal(signal.SIGSTOP)
        for _ in range(2):  # the first may already be on its way to it
            shop.write(50)
            time.sleep(0.5)
        shop.expire()
        shop.write(80)
        learner.send_signal(signal.SIGCONT)
        line = await_line(learner, "were gone before they were read")
        await_offset(tmp_path, shop.written)
        learner.send_signal(signal.SIGTERM)
        assert finish(learner)[0] == 0
    finally:
        learner.kill()
    found = re.search(r"offsets (\d+) to (\d+) \((\d+) of them\)", line)
    assert found is not None
    first, last, count = map(int, found.groups())
    assert (last, count) == (199, last - first + 1)
    assert first in (100, 150)
    assert newest(tmp_path).meta["joined"]["events"] == shop.written - count
    (partition,) = audited(tmp_path, shop.log).partitions
    assert partition.gaps == [Gap(first, last + 1)]
    assert partition.unverified > 0


def test_a_gap_that_opens_under_a_running_learner_stops_it_by_default(shop, tmp_path):
    shop.write(100)
    learner = start(tmp_path, shop.url, *shop.flags())
    try:
        await_offset(tmp_path, 100)
        learner.send_signal(signal.SIGSTOP)
        for _ in range(2):
            shop.write(50)
            time.sleep(0.5)
        shop.expire()
        learner.send_signal(signal.SIGCONT)
        status, said = finish(learner)
    finally:
        learner.kill()
    assert status == 1
    assert "--on-gap earliest" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_gap_in_a_partition_that_was_added_while_the_learner_was_down_is_one(shop, tmp_path):
    shop.write(100)
    assert learn(tmp_path, shop.url, *shop.flags("--until-caught-up"))[0] == 0
    shop.log.create_topic(shop.topic, 2)
    shop.write(60)
    shop.expire()
    gone = shop.log.bounds(shop.topic)[1].low
    shop.write(80)
    status, said = learn(tmp_path, shop.url, *shop.flags("--until-caught-up"))
    assert status == 1
    assert "(and those of 1 more partitions)" in said.splitlines()[-1]
    status, said = learn(tmp_path, shop.url, *shop.flags("--until-caught-up", "--on-gap", "earliest"))
    assert status == 0, said
    assert f"{shop.topic}/1: offsets 0 to {gone - 1} ({gone} of them) were gone before they were read" in said
    assert newest(tmp_path).meta["joined"]["events"] == 180
    assert audited(tmp_path, shop.log).partitions[1].gaps == [Gap(0, gone)]


def test_a_gap_in_a_partition_that_was_added_under_a_running_learner_is_one(tmp_path):
    rig = Rig(tmp_path, on_gap="earliest")
    rig.write(50)
    rig.turns(3)
    rig.log.create_topic("events", 2)
    rig.write(60)
    expire(rig.log.url, "events")
    ends = {p: bounds.high for p, bounds in rig.log.bounds("events").items()}
    rig.turns(5)
    assert rig.learner.journal.gaps == {0: [Gap(50, ends[0])], 1: [Gap(0, ends[1])]}
    rig.close()


def test_what_on_gap_latest_leaves_out_is_no_difference_though_the_log_has_it(tmp_path):
    shop = Shop(f"sqlite:///{tmp_path / 'log.db'}", "events")
    shop.write(100)
    assert learn(tmp_path, shop.url, *shop.flags("--until-caught-up"))[0] == 0
    shop.write(60)
    shop.expire()
    shop.write(80)
    learner = start(tmp_path, shop.url, *shop.flags("--on-gap", "latest"))
    try:
        await_line(learner, "offsets 100 to 239 (140 of them)")
        shop.write(70)
        await_offset(tmp_path, shop.written)
        learner.send_signal(signal.SIGTERM)
        assert finish(learner)[0] == 0
    finally:
        learner.kill()
    (partition,) = audited(tmp_path, shop.log).partitions
    assert (partition.start, partition.records) == (240, 70)
    assert newest(tmp_path).meta["joined"]["events"] == 170
    shop.log.close()
