"""The house rules that a reader relies on: imports point left, each package has one home, docs point at what is."""

import ast
import functools
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["streaming", "learner", "serving", "simulator"]
HOMES = {
    "confluent_kafka": {
        f"streaming/{name}.py" for name in ("kafka_log", "kafka_reader", "kafka_errors", "rdkafka")
    },
    "fastavro": {"streaming/schemas.py"},
    "grpc": {"serving/"},
    "grpc_health": {"serving/"},
    "grpc_reflection": {"serving/"},
    "torch": {"learner/"},
    "sqlite3": {"streaming/sqlite_log.py"},
    "pyarrow": {"streaming/importers.py"},
    "gymnasium": {"simulator/gym_shop.py"},
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


PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def unpickles(source):
    """Lines that read or write pickles, by whatever name: importing it, torch.load and save, numpy told to."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            taken = {alias.name for alias in node.names} & {"load", "save"}
            if {(name or "").split(".")[0] for name in names} & PICKLES or (names == ["torch"] and taken):
                yield node.lineno
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            yield node.lineno
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and ast.unparse(node.value) != "False"
        ):
            yield node.value.lineno


@pytest.mark.parametrize(
    "path",
    [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_nothing_is_pickled(path):
    assert list(unpickles(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "import torch; torch.load('x')",
        "from torch import save",
        "write = torch.save",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=trusted)",
    ],
)
def test_a_pickle_is_found_under_any_name(line):
    assert list(unpickles(line)) == [1]
    assert list(unpickles("from torch import Tensor; np.load('x', allow_pickle=False)")) == []


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
    for name in benchmarks_in(doc):
        places = (f"{name}.py", f"{name}/__main__.py")
        assert any((ROOT / "benchmarks" / place).exists() for place in places), (
            f"{doc.name} names benchmarks.{name}"
        )


def benchmarks_in(doc):
    """Those that a document says how to run."""
    return set(re.findall(r"python -m benchmarks\.([a-z]\w*)", doc.read_text()))


# all programs in one process: what takes long is to import what they share
HELPER = """
import contextlib, io, json, runpy, sys, traceback

for line in sys.stdin:
    program, *more = json.loads(line)
    sys.argv, said = [program, *more, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
            status = "ended without a word"
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            status = traceback.format_exc()
    print(json.dumps([status, said.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def help_of():
    """A function that gives what a program of ours says to --help; it must end well."""
    command = [sys.executable, "-W", "ignore", "-c", HELPER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as helper:

        @functools.cache
        def asked(*program):
            print(json.dumps(program), file=helper.stdin, flush=True)
            status, said = json.loads(helper.stdout.readline())
            assert status in (0, None), f"{' '.join(program)}: {status} {said}"
            return said

        yield asked


def program_of(words):
    """Which of our programs a command line runs, with its sub-command: what `python -m` wants; None: none of ours."""
    if words[0].endswith("python") and words[1:2] == ["-m"] and len(words) > 2:
        words = words[2:]
    if words[0] == "streaming" or words[:2] in (["learner", "audit"], ["learner", "evaluate"]):
        return tuple(words[:2])
    ours = words[0] in ORDER or words[0].split(".")[0] in ("simulator", "benchmarks", "tests")
    return (words[0],) if ours else None


def commands_in(doc):
    """The command lines that a document shows: after `$ ` in console blocks, and indented ones of our programs."""
    text = doc.read_text()
    shown = [
        line[2:]
        for block in re.findall(r"^```console\n(.*?)^```", text, re.M | re.S)
        for line in block.splitlines()
        if line.startswith("$ ")
    ]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    ours = r"^\s*((?:learner|serving|simulator|streaming (?:topics|import|tail|redrive)|python -m [\w.]+)\b[^\n#|>&]*)"
    return shown + re.findall(ours, prose, re.M)


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_the_docs_exist_and_so_do_their_flags(doc, help_of):
    for command in commands_in(doc):
        words = command.split()
        program = program_of(words)
        flags = [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), command
        elif program is not None and flags:
            said = help_of(*program)
            assert [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", said)] == [], command


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_flags_named_in_the_docs_exist(doc, help_of):
    programs = [*ORDER[1:], "simulator.demo"]
    said = "".join(map(help_of, programs)) + help_of("learner", "audit") + help_of("learner", "evaluate")
    said += "".join(help_of("streaming", command) for command in ("topics", "import", "tail", "redrive"))
    if doc.parent != ROOT:  # what is about a benchmark names its flags
        said += "".join(help_of(f"benchmarks.{name}") for name in benchmarks_in(doc))
    named = set(re.findall(r"`(--[a-z][\w-]*)", doc.read_text())) - FOREIGN
    assert {flag for flag in named if not re.search(rf"{flag}(?![\w-])", said)} == set()


FOREIGN = {"--help", "--max"}  # `the --max flags`


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_that_the_docs_link_to_are_in_their_files(doc):
    for name, target in re.findall(r"\[`([\w.]+)`\]\(([^)#\s]+\.py)\)", doc.read_text()):
        if not name.endswith(".py"):
            assert name in defined_in((doc.parent / target).resolve()), f"{doc.name}: {name} in {target}"


def defined_in(path):
    """Functions, classes and names of a module, and Class.member."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            members = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AnnAssign)]
            names |= {f"{node.name}.{getattr(m, 'name', None) or ast.unparse(m.target)}" for m in members}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.AnnAssign | ast.Assign):
            names |= {ast.unparse(t) for t in getattr(node, "targets", None) or [node.target]}
    return names


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_sections_that_the_docs_link_to_are_there(doc):
    for target, section in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", doc.read_text()):
        if "://" not in target:
            page = (doc.parent / target).resolve() if target else doc
            heads = re.findall(
                r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M
            )
            anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert section in anchors, f"{doc.name} links to {target}#{section}"


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_in_the_docs_is_python_and_imports_what_is_there(doc):
    for block in re.findall(r"^```python\n(.*?)^```", doc.read_text(), re.M | re.S):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                missing = [a.name for a in node.names if not hasattr(module, a.name)]
                assert all(importlib.util.find_spec(f"{node.module}.{name}") for name in missing), missing


def test_results_in_the_readme_come_from_the_results_that_are_committed():
    results = [
        json.loads(line)["command"]
        for file in (ROOT / "benchmarks" / "results").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    section = (ROOT / "README.md").read_text().partition("\n## Results\n")[2].partition("\n## ")[0]
    commands = re.findall(r"`(python -m benchmarks\.[^`]+)`", section)
    assert commands
    assert [c for c in commands if not any(result.startswith(c) for result in results)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "adr").glob("*.md")), ids=lambda p: p.name)
def test_a_decision_record_has_its_four_parts(path):
    parts = re.findall(r"^\*\*([\w ]+)\.\*\*", path.read_text(), re.M)
    assert parts == ["Context", "Decision", "Not chosen", "Consequences"]
    assert path.read_text().startswith(f"# {int(path.name[:4])}. ")
