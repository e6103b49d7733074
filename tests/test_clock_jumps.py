"""The wall clock is set hours ahead, or back, under a running learner: nothing is lost, doubled, or held up."""

from __future__ import annotations

import random

import numpy as np
import pytest

from learner.audit import Audit, AuditConfig
from learner.audit_report import as_text
from streaming.decoder import Decoder
from streaming.importers import ImportSettings, import_file
from streaming.interning import Vocabulary
from streaming.joiner import Joiner, JoinSettings
from streaming.log import open_log, partition_of
from streaming.schemas import Codec
from tests.small_shop import newest_meta
from tests.trainer_rig import Rig

HOUR_MS = 3_600_000


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path, turn_s=10.0, checkpoint_s=20.0, publish_s=10.0)
    made.write(100)
    made.turns(5)
    assert made.store.latest() is not None
    yield made
    made.close()


@pytest.mark.parametrize("hours", [3, -3, 24 * 365, -24 * 365])
def test_checkpoints_and_versions_go_on_whatever_the_wall_clock_says(rig, tmp_path, hours):
    for _ in range(2):  # there, and back
        version, checkpoint = rig.store.latest(), newest_meta(tmp_path)["positions"]
        rig.wall_ms += hours * HOUR_MS
        rig.write(50, timestamp_ms=rig.now_ms_of_shop)
        rig.turns(6)
        assert rig.store.latest() > version
        assert newest_meta(tmp_path)["positions"] != checkpoint
        hours = -hours


@pytest.mark.parametrize("hours", [3, -3, 24 * 365])
def test_event_time_does_not_run_away_in_idle_partitions_and_nothing_is_late(rig, tmp_path, hours):
    rig.turns(12)  # idle by now
    before_ms = rig.learner.joiner.watermark_ms(0)
    rig.wall_ms += hours * HOUR_MS
    rig.turns(30)
    passed_ms = rig.learner.joiner.watermark_ms(0) - before_ms
    assert 250_000 <= passed_ms <= 350_000  # 30 turns of 10 s
    rig.wall_ms -= hours * HOUR_MS
    rig.write(100)
    rig.turns(5)
    counters = rig.learner.joiner.counters()
    assert (counters["events"], counters["late"], counters["duplicates"]) == (200, 0, 0)
    report = Audit(
        rig.log, Codec(), AuditConfig(data_dir=str(tmp_path / "data"), weights=str(tmp_path / "weights"))
    ).run()
    assert report.clean, as_text(report)
    assert sum(p.events for p in report.partitions) == 200


def test_an_idle_partition_does_not_follow_one_whose_first_record_is_years_ahead(tmp_path):
    rig = Rig(tmp_path, turn_s=10.0, partitions=2)
    users = [f"user-{n}" for n in range(40)]
    here, there = ([u for u in users if partition_of(u.encode(), 2) == partition] for partition in (0, 1))
    rig.write(50, users=here)
    rig.turns(12)  # idle by now
    before_ms = rig.learner.joiner.watermark_ms(0)
    rig.write(1, rig.now_ms_of_shop + 5 * 365 * 24 * HOUR_MS, there)
    rig.turns(3)
    assert rig.learner.joiner.watermark_ms(1) > before_ms + 24 * HOUR_MS
    assert rig.learner.joiner.watermark_ms(0) < before_ms + HOUR_MS
    rig.write(50, users=here)
    rig.turns(3)
    assert rig.learner.joiner.counters()["late"] == 0
    rig.close()


@pytest.mark.parametrize("asleep", [False, True])
def test_nobodys_visit_ends_while_the_log_is_away_or_the_learner_asleep(rig, asleep):
    rig.turns(12)  # idle by now
    before_ms, ended = rig.learner.joiner.watermark_ms(0), rig.learner.joiner.counters()["sessions_ended"]
    if asleep:
        rig.now_s += 30 * 3600
    else:
        rig.reachable, rig.turn_s = False, 1800.0
        rig.turns(60)
        rig.reachable, rig.turn_s = True, 10.0
    rig.turns(4)
    assert rig.learner.joiner.watermark_ms(0) - before_ms <= 10_000
    rig.write(100, timestamp_ms=before_ms + 60_000)  # which storefronts had to keep meanwhile
    rig.turns(5)
    counters = rig.learner.joiner.counters()
    assert (counters["events"], counters["late"], counters["sessions_ended"]) == (200, 0, ended)
    rig.turns(30)  # and silence passes again as before, where what comes is new
    passed = asleep * 100_000
    assert rig.learner.joiner.watermark_ms(0) >= before_ms + 60_000 + 94_000 + passed


@pytest.mark.parametrize("hours", [3, -3])
def test_a_server_whose_clock_was_wrong_for_a_while_loses_no_decision_and_no_reward(rig, hours):
    """Its decisions are stamped hours off; the storefront's clicks on them are not."""
    now_ms = rig.wall_ms
    for n in range(60):
        off_ms = hours * HOUR_MS if 20 <= n < 40 else 0
        rig.decide(f"r{n}", f"user-{n % 20}", now_ms + off_ms, ["item-1", "item-2"])
        rig.click(f"r{n}", f"user-{n % 20}", now_ms + 1000, "item-2")
        now_ms += 2000
    rig.producer.flush()
    rig.watch.ask()
    rig.turns(5)
    counters = rig.learner.joiner.counters()
    assert (counters["decisions"], counters["late"], counters["duplicates"]) == (60, 0, 0)
    assert counters["attributed_by_id"] == 60
    assert counters["unattributed"] == 0


def test_the_history_of_a_small_shop_is_joined_as_it_happened(tmp_path):
    """Two or three visits a day in each partition, hours apart, imported years later."""
    pick, at_ms, rows = random.Random(3), 1_433_221_332_117, []
    for _ in range(400):
        at_ms += pick.randrange(1, 12) * HOUR_MS
        user = pick.randrange(40)
        rows += [f"{at_ms + 60_000 * n},{user},view,{n}," for n in range(5)]
    file = tmp_path / "events.csv"
    file.write_text("timestamp,visitorid,event,itemid,transactionid\n" + "\n".join(rows) + "\n")
    log, codec = open_log(f"sqlite:///{tmp_path}/log.db"), Codec()
    import_file("retailrocket", file, log, codec, ImportSettings(partitions=2))
    reader = log.reader("events", {0: 0, 1: 0})
    joiner, decoder, ends = Joiner(JoinSettings(), [0, 1]), Decoder(codec, Vocabulary()), 0
    while len(batch := reader.poll(10_000, 1.0)):
        ends += np.count_nonzero(joiner.push(decoder.decode(batch)).transitions.discount == 0)
    for partition in (0, 1):
        ends += np.count_nonzero(joiner.advance(partition, at_ms + HOUR_MS).transitions.discount == 0)
    reader.close()
    log.close()
    counters = joiner.counters()
    assert (counters["events"], counters["late"], counters["future_stamped"]) == (2000, 0, 0)
    assert (counters["transitions"], ends) == (2000, 400)
