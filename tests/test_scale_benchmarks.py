"""The benchmarks of scale run, and find what they look for. Their numbers are for quiet machines."""

import json
import subprocess
import sys
import textwrap
import time
import tracemalloc

import numpy as np
import pytest

from benchmarks import checkpoint, endurance, freshness, growth, replay, soak, updates


def test_replay_is_measured_beside_the_ring():
    figures = replay.measure(2100, 10, 8)
    wanted = {"insert_per_s", "sample_per_s", "amend_per_s", "bytes_per_transition", "bytes_per_user"}
    assert wanted <= figures.keys()
    assert figures.pop("bytes_grown_once_full") == 0
    assert all(value > 0 for value in figures.values())


def test_the_ring_keeps_the_newest_rows_with_both_of_their_states_and_gives_them_out():
    rng = np.random.default_rng(0)
    ring, kept = replay.Ring(50, 8), []
    for turn in range(4):  # around the ring more than once, and over its end
        batch = replay.joined(2, 10, 8, turn << 32, rng)
        ring.insert(batch)
        s, t = batch.states, batch.transitions
        fields = (s.item, s.name, s.age_s, s.value)
        rows = [f[t.state] for f in fields] + [f[t.next_state] for f in fields]
        kept.append([*rows, t.action, t.reward, t.discount, t.propensity])
    newest = [np.roll(np.concatenate(column)[-50:], 80 % 50, axis=0) for column in zip(*kept, strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(ring.columns, newest, strict=True))
    out = ring.empty(20, 8)
    ring.sample(np.random.default_rng(1), out)
    where = np.random.default_rng(1).integers(0, 50, 20)
    assert all(np.array_equal(a, b[where]) for a, b in zip(out, newest, strict=True))


def test_the_ring_copies_nothing_twice():
    """Copies in between are what made it slow; that of a single column of floats would be seen here."""
    rng = np.random.default_rng(0)
    batch, ring = replay.joined(100, 10, 32, 0, rng), replay.Ring(1500, 32)
    out = ring.empty(1000, 32)
    ring.insert(batch)
    tracemalloc.start()
    try:
        ring.insert(batch)
        ring.sample(rng, out)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1000 * 32 * 2


def test_reverb_is_skipped_with_a_reason_where_there_is_none(tmp_path, capsys):
    assert replay.reverb(None, 1000, 8) == {}
    assert "--reverb-python PATH" in capsys.readouterr().err
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no module named reverb >&2\nexit 1\n")
    broken.chmod(0o755)
    assert replay.reverb(broken, 1000, 8) == {}
    assert "no module named reverb" in capsys.readouterr().err


def test_growth_is_printed_plotted_and_kept(tmp_path, capsys):
    shapes = [growth.Shape(n, 300, 200) for n in (1, 2)]
    plot, kept = tmp_path / "growth.png", tmp_path / "growth.jsonl"
    growth.main(["--records", "6000", "--plot", str(plot), "--json", str(kept)], shapes)
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(line["partitions"], line["users"], line["items"]) for line in lines] == [
        (1, 300, 200),
        (2, 300, 200),
    ]
    assert all(line["events_per_s"] > 0 for line in lines)
    assert plot.read_bytes().startswith(b"\x89PNG")
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[0] == "partitions"
    assert len(rows) == 2


def test_what_checkpoints_cost_is_measured_and_a_restarted_learner_is_watched(tmp_path):
    kept = tmp_path / "checkpoint.jsonl"
    sizes = ["--transitions", "5000", "--users", "300", "--items", "200"]
    times = ["--turns", "2", "--seconds", "1", "--checkpoint-s", "0.3", "--watch-s", "2"]
    assert checkpoint.main([*sizes, *times, "--json", str(kept)]) == 0
    (figures,) = (json.loads(line) for line in kept.read_text().splitlines())
    assert figures["transitions"] == 5000
    assert figures["checkpoints"] >= 1
    assert 0 < figures["held_p50_s"] <= figures["held_max_s"]
    assert 0 < figures["bytes_per_checkpoint"] <= figures["bytes_of_all"]
    assert figures["restart_first_update_s"] > 0


def test_full_speed_is_when_the_rate_is_what_it_will_be():
    slow = [(t / 10, 0.0) for t in range(50)]
    fast = [(5 + t / 10, 2.0 * t) for t in range(1, 100)]
    assert checkpoint.first_update_s(slow + fast) == 5.1
    assert checkpoint.full_speed_s(slow + fast) == pytest.approx(5.0, abs=0.2)


LEAKY = """
    import time
    kept = []
    for n in range(10_000):
        kept.append(bytearray({bytes}))
        if n % 10 == 0:
            kept.append(open("/dev/null"))
        time.sleep(0.01)
"""


@pytest.mark.parametrize(("leak", "grows"), [(200_000, True), (0, False)])
def test_a_process_that_leaks_is_found_out_and_one_that_does_not_is_not(leak, grows, monkeypatch):
    monkeypatch.setattr(soak, "EVERY_S", 0.05)
    source = LEAKY.format(bytes=leak) if leak else "import time; time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(source)])
    try:
        watcher = soak.Watcher(process.pid)
        watcher.start()
        time.sleep(3.0)
        seen = watcher.after(1.0)
    finally:
        process.kill()
        process.wait()
    quiet = {"audit_status": 0, "exit_statuses": [0, 0]}
    figures = soak.summary("learner", seen) | soak.summary("server", seen) | quiet
    wrong = soak.judge(figures, limit_mb_per_h=5.0)
    assert any("the learner's memory grows by" in line for line in wrong) == grows
    assert any("the server's files went from" in line for line in wrong) == grows
    if not grows:
        assert wrong == []


ENDURED = {
    "audit_status": 0,
    "exit_statuses": [0, 0, 0],
    "published_events": 900,
    "log_events": 900,
    "answered": 600,
    "log_decisions": 601,  # one was answered twice, for the first answer came too late
    "log_records_beyond": 0,
    "unanswered_shoppers": 0,
    "probes_failed": 0,
}


@pytest.mark.parametrize(
    ("figure", "wrong"),
    [
        ({}, []),
        ({"log_records_beyond": 1}, ["records are twice in the log"]),
        ({"log_events": 901}, ["records are in the log that nobody published"]),
        ({"log_events": 899}, ["published records are not in the log"]),
        ({"unanswered_shoppers": 1}, ["a shopper was not answered"]),
        ({"probes_failed": 1}, ["a probe was not answered"]),
        ({"audit_status": 1}, ["the audit found differences"]),
    ],
)
def test_what_endurance_promises_is_what_it_judges(figure, wrong):
    assert endurance.judge(ENDURED | figure) == wrong


def test_a_probe_that_is_never_seen_is_counted_and_the_others_are_told():
    tracker = freshness.Tracker.__new__(freshness.Tracker)
    tracker.sent, tracker.took = {b"a": 0.0, b"b": 0.0}, {b"a": 0.5}
    assert tracker.settle(timeout_s=0.05) == 1
    tracker.took[b"b"] = 0.7
    assert tracker.settle(timeout_s=60.0) == 0


def test_a_slope_has_an_interval_that_holds_it():
    rng = np.random.default_rng(0)
    at_s = np.arange(0.0, 3600.0)
    held = 0
    for _ in range(200):
        found = soak.slope(at_s, 1e8 + 3e6 * at_s / 3600 + rng.normal(0, 2e6, len(at_s)))
        held += found.low <= 3.0 <= found.high
    assert 180 <= held <= 200  # 95 % of 200, give or take


def test_updates_are_measured_beside_the_eager_loop_and_stages_add_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(updates, "RECORDS", 3000)
    monkeypatch.setattr(updates, "USERS", 100)
    monkeypatch.setattr(updates, "STORED", 400)
    kept = tmp_path / "updates.jsonl"
    sizes = ["--items", "50", "60", "--batches", "32", "--updates", "3", "--turns", "1"]
    assert updates.main([*sizes, "--json", str(kept)]) == 0
    rows, printed = json.loads(kept.read_text())["rows"], capsys.readouterr().out
    assert [row["items"] for row in rows] == [50, 60]
    for row in rows:
        assert row["ours_per_s"] > 0
        assert row["ratio_to_eager"] == pytest.approx(row["ours_per_s"] / row["eager_per_s"])
        assert sum(row["stages"].values()) == pytest.approx(1)
        assert min(row["stages"].values()) > 0
        _, stages = printed.split(f"of an update of ours, {row['items']} items, batches of 32\n")
        assert stages.startswith(f"{'sample':>24} {100 * row['stages']['sample']:5.1f} %\n")
    assert "TorchRL" in printed


def test_a_python_without_torchrl_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(updates, "RECORDS", 2000)
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no module named torchrl >&2\nexit 1\n")
    broken.chmod(0o755)
    size = ["--items", "50", "--batches", "32", "--updates", "1", "--turns", "1"]
    assert updates.main([*size, "--torchrl", str(broken)]) == 1
    assert "no module named torchrl" in capsys.readouterr().err
