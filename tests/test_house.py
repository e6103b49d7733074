"""The house rules that a reader relies on: imports point left, each package has one home, docs point at what is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["streaming", "learner", "serving", "simulator"]
HOMES = {
    "confluent_kafka": {"streaming/kafka_log.py"},
    "fastavro": {"streaming/schemas.py"},
    "grpc": {"serving/"},
    "grpc_health": {"serving/"},
    "grpc_reflection": {"serving/"},
    "torch": {"learner/"},
    "sqlite3": {"streaming/sqlite_log.py"},
    "pyarrow": {"streaming/importers.py"},
}
SOURCES = sorted(p for package in ORDER for p in (ROOT / package).rglob("*.py") if "_pb2" not in p.name)


def imports(path):
    """Top-level names of the packages that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left(path):
    package = path.relative_to(ROOT).parts[0]
    right = set(ORDER[ORDER.index(package) + 1 :]) | {"tests", "benchmarks"}
    assert not right & set(imports(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_third_party_package_has_one_home(path):
    name = path.relative_to(ROOT).as_posix()
    for package in set(imports(path)) & set(HOMES):
        assert any(name.startswith(home) for home in HOMES[package]), f"{package} in {name}"


def test_every_package_init_is_empty():
    assert [p for p in ORDER if (ROOT / p / "__init__.py").read_text()] == []


DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_in_the_docs_lead_somewhere(doc):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", doc.read_text()):
        if "://" not in target:
            assert (doc.parent / target).exists(), f"{doc.name} links to {target}"


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_named_in_the_docs_exist(doc):
    pattern = r"`((?:streaming|learner|serving|simulator|proto|tests|benchmarks|docs)/[\w./-]+\.\w+)`"
    for name in re.findall(pattern, doc.read_text()):
        assert (ROOT / name).exists(), f"{doc.name} names {name}"


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_benchmark_commands_in_the_docs_exist(doc):
    for name in re.findall(r"python -m benchmarks\.(\w+)", doc.read_text()):
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), f"{doc.name} names benchmarks.{name}"


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_flags_in_the_docs_are_real(doc):
    helps = {}
    for command in re.findall(r"^\s*\$? ?((?:learner|serving|simulator)\b[^\n#|>&]*)", doc.read_text(), re.M):
        program = command.split()[0]
        flags = set(re.findall(r"(?<!\S)--[a-z][\w-]*", command))
        if flags and program not in helps:
            helps[program] = subprocess.run(
                [sys.executable, "-m", program, "--help"], capture_output=True, text=True, cwd=ROOT
            ).stdout
        assert all(flag in helps[program] for flag in flags), f"{doc.name}: {command}"
