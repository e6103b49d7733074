"""`python -m benchmarks.faults` is alive, and would see a loss or a double."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.faults import Row, main, tell, verdict
from benchmarks.load import SLOTS, Held, Sent, account
from learner.replay import Contents

PLACES = {"d1": (0, 10), "d2": (0, 20), "d3": (1, 5)}  # d2 and d3 are their users' last


def replay(*steps: tuple[int, int], slots: int = SLOTS) -> Contents:
    """Transitions of these decisions."""
    places = np.array([(*step, slot) for step in steps for slot in range(slots)], np.int64).reshape(-1, 3)
    zeros = np.zeros(len(places))
    columns: dict[str, Any] = dict.fromkeys(Contents._fields, zeros)
    columns |= {"partition": places[:, 0], "offset": places[:, 1], "slot": places[:, 2]}
    return Contents(**{**columns, "organic": zeros.astype(np.bool_)})


def held(*events: str, **more: Any) -> Held:
    """A log with these events, and the decisions at PLACES."""
    found = replace(Held(decisions=dict(PLACES)), **more)
    found.events.update(events)
    found.users[0, "ann"] = [(10, "d1"), (20, "d2")]
    found.users[1, "bob"] = [(5, "d3")]
    return found


SENT = Sent({"e1", "e2"}, set(PLACES), duplicates=1, bad=1)
HELD = held("e1", "e1", "e2", bad=1)
LEARNT = {"events": 2, "decisions": 3, "duplicates": 1, "bad": 1}


def test_where_all_is_well_nothing_is_lost_or_doubled():
    assert account(SENT, HELD, LEARNT, {}, replay((0, 10))) == (0, 0, [])
    assert account(SENT, HELD, LEARNT, {}, replay((0, 10), (1, 5))) == (
        0,
        0,
        [],
    )  # the clock has ended bob's visit


@pytest.mark.parametrize(
    ("found", "learnt", "audit", "there", "lost", "doubled"),
    [
        (held("e1", "e1", bad=1), LEARNT, {}, replay((0, 10)), 1, 0),
        (held("e1", "e1", "e2", "e9", bad=1), LEARNT, {}, replay((0, 10)), 0, 1),
        (held("e1", "e1", "e2", "e2", bad=1), LEARNT, {}, replay((0, 10)), 0, 1),
        (held("e1", "e1", "e2", bad=1, decisions_twice=1), LEARNT, {}, replay((0, 10)), 0, 1),
        (HELD, {**LEARNT, "events": 1}, {}, replay((0, 10)), 1, 0),
        (HELD, {**LEARNT, "events": 3}, {}, replay((0, 10)), 0, 1),
        (HELD, {**LEARNT, "decisions": 2}, {}, replay((0, 10)), 1, 0),
        (HELD, {**LEARNT, "decisions": 4}, {}, replay((0, 10)), 0, 1),
        (HELD, {**LEARNT, "duplicates": 0}, {}, replay((0, 10)), 0, 1),
        (HELD, {**LEARNT, "bad": 0}, {}, replay((0, 10)), 1, 0),
        (HELD, LEARNT, {}, replay(), SLOTS, 0),
        (HELD, LEARNT, {}, replay((0, 10), slots=SLOTS - 1), 1, 0),
        (HELD, LEARNT, {}, replay((0, 10), (0, 10)), 0, SLOTS),
        (HELD, LEARNT, {}, replay((0, 10), (0, 11)), 0, SLOTS),
        (HELD, LEARNT, {"lost": 7}, replay((0, 10)), 7, 0),
        (HELD, LEARNT, {"no letter": 7}, replay((0, 10)), 7, 0),
        (HELD, LEARNT, {"doubled": 7}, replay((0, 10)), 0, 7),
        (HELD, LEARNT, {"reward": 7}, replay((0, 10)), 0, 0),
    ],
)
def test_a_loss_and_a_double_are_counted_wherever_they_are(found, learnt, audit, there, lost, doubled):
    outcome = account(SENT, found, learnt, audit, there)
    assert (outcome.lost, outcome.doubled) == (lost, doubled)
    assert outcome.wrong


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 0),
        ({"lost": 1}, 1),
        ({"doubled": 1}, 1),
        ({"wrong": ["it did not recover"]}, 1),
        ({"skipped": "no toxiproxy here"}, 1),  # nothing was tried at all
    ],
)
def test_what_is_wrong_is_the_exit_status(change, status):
    assert verdict([Row("kill", "kafka", 3, recovered_s=[1.0], **change)]) == status


def test_a_row_tells_what_was_wrong_and_what_was_skipped():
    assert "never" in tell(Row("kill", "kafka", 1, wrong=["it did not recover"])).splitlines()[0]
    assert tell(Row("kill", "kafka", 1, wrong=["it did not recover"])).endswith("!!! it did not recover")
    assert tell(Row("link-cut", "kafka", skipped="get toxiproxy")).endswith("skipped: get toxiproxy")


def test_a_fault_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--only", "kill,flood"])
    assert ended.value.code == 2
    assert "no fault 'flood'; one of kill, " in capsys.readouterr().err


def tried(name: str, log: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, once; all must be well."""
    file = folder / "faults.jsonl"
    status = main(["--only", name, "--log", log, "--times", "1", "--json", str(file)])
    said = capsys.readouterr().out
    assert status == 0, said
    assert said.endswith("1 faults of 1 kinds: nothing lost, nothing doubled, all recovered\n")
    row = json.loads(file.read_text())
    assert (row["fault"], row["times"], row["lost"], row["doubled"]) == (name, 1, 0, 0)


@pytest.mark.timeout(900)
def test_the_command_kills_a_learner_in_its_checkpoint_and_finds_all_there(tmp_path, capsys):
    tried("kill-manifest", "sqlite", tmp_path, capsys)


@pytest.mark.kafka
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("kafka")  # says what is missing where none can be run
def test_the_command_kills_a_broker_and_finds_all_there(tmp_path, capsys):
    tried("broker-kill", "kafka", tmp_path, capsys)
