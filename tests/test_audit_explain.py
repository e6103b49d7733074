"""`learner audit --explain`: what became of one record, and which events earned what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from learner.__main__ import main
from learner.checkpoint import Checkpoints, decode, encode
from tests.intakes import Way
from tests.test_bad_input import decided, did

DECISION, CLICK, NEXT, PURCHASE, REFUND, AGAIN, BAD, LATE, ALONE = range(9)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(url, folder): a small log, and the checkpoint of a learner that has read all of it but the last record."""
    folder = tmp_path_factory.mktemp("explained")
    url = f"sqlite:///{folder / 'log.db'}"
    click = did("select_item", "a", at=1, id="click", seen="r1")
    with Way(url) as way:
        way.send([
            decided("r1", "a", "b", at=0), click, decided("r2", "c", "d", at=60),
            did("purchase", "a", at=90, id="order"), did("refund", "a", at=95, id="back"),
            click, ("ann", b"junk"), did("view_item", "x", at=-90 * 86_400, id="old"),
            did("view_item", "z", at=99, id="alone"),
        ])  # fmt: skip
        way.take()
        parts = {name: decode(encode(part)) for name, part in way.learner.snapshot()[1].items()}
        meta = {"topic": "events", "positions": {"0": way.intake.position()[0]}, "updates": 0}
        Checkpoints(folder / "learner").save(parts, meta)
        way.send([did("view_item", "y", at=100, id="unread")])
    return url, folder


def explained(learnt: tuple[str, Path], what: str, *flags: str) -> int:
    url, folder = learnt
    stores = ("--data-dir", str(folder), "--weights", str(folder / "weights"))
    return main(["audit", "--log", url, *stores, "--explain", what, *flags])


def told(learnt: tuple[str, Path], what: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines about it; the first shows the record as `streaming tail` does."""
    assert explained(learnt, what) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert f"events/0@{what.partition('/')[2]} " in first or "/" not in what
    return [line.strip() for line in rest]


def test_a_decision_tells_its_transitions_and_which_event_earned_each(
    learnt: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(learnt, f"0/{DECISION}", capsys) == [
        "a decision, taken in",
        "step of 2 slots: discount 0.97, followed by offset 2",
        "slot 0 'a': reward 1, replay has 1",
        "+1 by offset 1 (select_item 'click' of user 'ann')",
        "+10 by offset 3 (purchase 'order' of user 'ann'), an amendment",
        "-10 by offset 4 (refund 'back' of user 'ann'), an amendment",
        "slot 1 'b': reward 0, replay has 0",
    ]


def test_the_same_by_its_id(learnt: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert told(learnt, "r1", capsys)[0] == "a decision, taken in"


@pytest.mark.parametrize(
    ("offset", "lines"),
    [
        (CLICK, ["an event, taken in",
                 "earned +1 for offset 0 slot 0 (decision 'r1' for user 'ann'): before that became a transition"]),
        (PURCHASE, ["an event, taken in",
                    "earned +10 for offset 0 slot 0 (decision 'r1' for user 'ann'): an amendment"]),
        (REFUND, ["an event, taken in",
                  "earned -10 for offset 0 slot 0 (decision 'r1' for user 'ann'): an amendment"]),
        (AGAIN, ["a duplicate: its id was seen before, so it counts for nothing"]),
        (BAD, ["BAD_FRAME: its letter is there"]),
        (LATE, ["LATE: its letter is there"]),
        (ALONE + 1, ["the checkpoint has not read it yet"]),
        (ALONE + 2, ["the checkpoint has not read it yet"]),
        (NEXT, ["a decision, taken in", "step of 2 slots: is still open", "slot 0 'c': reward 0, not in replay",
                "slot 1 'd': reward 0, not in replay"]),
    ],
)  # fmt: skip
def test_of_other_records_it_tells_their_fate(
    offset: int, lines: list[str], learnt: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if offset == ALONE + 2:  # there is no such record
        assert explained(learnt, f"0/{offset}") == 0
        assert capsys.readouterr().out.splitlines() == [f"events/0@{offset}", f"  {lines[0]}"]
    else:
        assert told(learnt, f"0/{offset}", capsys) == lines


def test_an_organic_step_tells_of_itself(
    learnt: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = told(learnt, f"0/{ALONE}", capsys)
    assert lines[0] == "an event, taken in"
    assert "organic step of 1 slots: is still open" in lines


def test_all_records_with_an_id_are_told_of_in_json(
    learnt: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert explained(learnt, "click", "--json") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["offset"], first["fate"]) == (CLICK, "event")
    assert first["earned"] == [{"event": CLICK, "offset": 0, "slot": 0, "reward": 1.0, "amended": False}]
    assert (second["offset"], second["fate"], second["earned"]) == (AGAIN, "duplicate", [])


@pytest.mark.parametrize(
    ("what", "said"), [("nobody", "has the id 'nobody'"), ("7/0", "no partition 7 that the checkpoint knows")]
)
def test_what_is_not_there_is_one_line_and_status_1(
    what: str, said: str, learnt: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert explained(learnt, what) == 1
    assert said in capsys.readouterr().err


def test_a_reward_that_replay_has_wrong_is_pointed_at(
    learnt: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, folder = learnt
    loaded = Checkpoints(folder / "learner").load()
    assert loaded is not None
    parts = {name: loaded.parts[name] for name in loaded.parts}
    parts["replay/rewards-000000"]["reward"][0] += 0.5
    Checkpoints(tmp_path / "learner").save(parts, loaded.meta)
    assert explained((url, tmp_path), f"0/{DECISION}") == 1
    assert "slot 0 'a': reward 1, replay has 1.5  <- DIFFERENT" in capsys.readouterr().out
