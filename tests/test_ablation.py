"""The ablation table: every row sets what there is to set, and is judged beside the defaults on the same seeds."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from benchmarks import ablation
from benchmarks.learning import LoopSettings, changed
from learner.agent_settings import AgentSettings

FIELDS = {f.name for f in (*fields(AgentSettings), *fields(LoopSettings))}


@pytest.mark.parametrize("name", ablation.ROWS)
def test_a_row_sets_what_the_defaults_do_not(name):
    changes = list(ablation.ROWS[name].changes)
    assert {change.split("=")[0] for change in changes} <= FIELDS
    defaults = AgentSettings(), LoopSettings()
    apart = [changed(settings, changes) != settings for settings in defaults]
    assert any(apart) is (name != ablation.DEFAULTS)


def test_one_who_knows_the_shop_has_all_and_one_who_knows_nothing_has_none(monkeypatch, capsys, tmp_path):
    def look(seed, decisions, changes):
        assert decisions == 7
        return {
            "at_random": 1.0,
            "true_p_true_gain": 3.0,
            "learnt_p_learnt_gain": 3.0 if not changes else 1.0 + 0.5 * seed,
        }

    monkeypatch.setattr(ablation, "look", look)

    class Now:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, call, *arguments):
            value = call(*arguments)
            return type("Done", (), {"result": lambda _: value})()

    monkeypatch.setattr(ablation, "ProcessPoolExecutor", Now)
    file = tmp_path / "found.jsonl"
    flags = ["--rows", "double", "--seeds", "0", "2", "--decisions", "7", "--json", str(file)]
    assert ablation.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "| (defaults) | 1.00 ± .00 |  |"
    assert lines[-1].startswith("| the target network chooses, too (DQN) | .25 ± 3.18 | -.75 ± 3.18")
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    assert [(row["row"], row["share"]) for row in rows] == [("defaults", [1.0, 1.0]), ("double", [0.0, 0.5])]


def test_a_run_is_of_its_seed_and_its_switch(monkeypatch):
    monkeypatch.setattr("benchmarks.inside.PLANNED", 2000)
    monkeypatch.setattr("benchmarks.inside.TURNS", 4)
    found = [ablation.share(seed, 400, changes) for seed, changes in ((1, ()), (1, ()), (1, ("gamma=0",)))]
    assert found[0] == found[1] != found[2]
    assert 0.0 < found[0] < 1.0
