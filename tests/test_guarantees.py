"""Nothing is promised that no test shows: what docs/guarantees.md names is there."""

import ast
import re
from pathlib import Path

from benchmarks.fault_kinds import FAULTS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/\w+\.py)::(\w+)`", TEXT)))
TRIED = [n for names in re.findall(r"`make faults`: ([\w, -]+)", TEXT) for n in names.strip().split(", ")]


def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_exists():
    assert len(NAMED) > 20
    assert [f"{path}::{name}" for path, name in NAMED if name not in functions_of(path)] == []


def test_every_promise_names_its_test():
    rows = [line for line in TEXT.splitlines() if line.startswith("|")]
    promises = [row for row in rows if not row.startswith(("|---", "| promise", "| it says"))]
    assert [row for row in promises if "::test_" not in row and "`make faults`: " not in row] == []


def test_every_fault_that_is_named_is_tried_and_every_one_tried_is_named():
    assert sorted(set(TRIED)) == sorted(FAULTS)
