"""Which code a result is of."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import record


def test_code_is_told_by_its_changes_and_not_by_the_results_that_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, result = (tmp_path / "benchmarks" / name for name in ("record.py", "results/found.jsonl"))
    result.parent.mkdir(parents=True)
    for file in (source, result):
        file.write_text("one\n")
    who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(record, "__file__", str(source))
    clean = record.code()
    assert clean == record.commit() != ""
    result.write_text("one\ntwo\n")
    assert record.code() == clean
    source.write_text("two\n")
    changed = record.code()
    assert changed.startswith(clean + " with ")
    source.write_text("three\n")
    assert record.code() not in (clean, changed)
    kept = result.with_name("kept.jsonl")
    record.append(kept, "shop", [], {"ctr": 0.1})
    assert json.loads(kept.read_text())["commit"] == record.code() != clean
