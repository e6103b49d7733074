"""docs/metrics.md says what the code declares: `python -m tests.test_metrics_docs > docs/metrics.md` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase

import serving.metrics
from learner.metrics import Metrics
from streaming.columns import Reason
from streaming.join_settings import COUNTERS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "metrics.md"
SUFFIX = {"counter": "_total"}  # what the client library adds to the name that is scraped

HEAD = """\
# Metrics

Made by `python -m tests.test_metrics_docs > docs/metrics.md` from [learner/metrics.py](../learner/metrics.py) and
[serving/metrics.py](../serving/metrics.py); a test holds the two equal. Names are those that Prometheus scrapes, units
are in them. A histogram has `_bucket`, `_sum` and `_count` of its name. Counters begin at 0 with the process, unless
their line says otherwise. What to alarm on: [operations.md](operations.md#what-to-watch).
"""
LETTERS = """
Reasons of `learner_dead_letters_total`. `LATE` goes to `EVENTS.late`, the others to `EVENTS.dlq`; the last two are of
catalog records, which stay where they are and are counted by `learner_catalog_refused`:
"""
PLAIN = {  # those whose names say it, in the source
    "transitions": "slots of steps completed",
    "amendments": "rewards that came after that",
    "TRAILING_BYTES": "bytes left after the last field",
    "EMPTY_SLATE": "a decision without a slot",
}


def declared(where: object) -> list[MetricWrapperBase]:
    """The metrics of a module or object, in the order in which it declares them."""
    return [value for value in vars(where).values() if isinstance(value, MetricWrapperBase)]


def line(metric: MetricWrapperBase) -> str:
    """A row of the table."""
    name = metric._name + SUFFIX.get(metric._type, "")
    labels = "{" + ", ".join(metric._labelnames) + "}" if metric._labelnames else ""
    return f"| `{name}{labels}` | {metric._type} | {metric._documentation} |"


def comments(file: str) -> dict[str, str]:
    """The comment behind each name of a list in a source file: `"late",  # rows ...` or `LATE = 17  # older ...`."""
    found = re.findall(r'^ {4}"?(\w+)"?(?:,| = \d+)  # (.+)$', (ROOT / file).read_text(), re.M)
    return PLAIN | dict(found)


def listed(names: list[str], meaning: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| `{name}` | {meaning.get(name, '')} |" for name in names)])


def page() -> str:
    """The whole of docs/metrics.md."""
    table = "| name | type | how to read it |\n|---|---|---|"
    reasons = [reason.name for reason in Reason if reason != Reason.OK]
    return "\n".join(
        [
            HEAD,
            "## The learner\n\n`learner --metrics-port N`.\n",
            table,
            *map(line, declared(Metrics())),
            "\nWhat `learner_joiner_events` counts; each survives restarts:\n",
            listed(list(COUNTERS), comments("streaming/join_settings.py")),
            LETTERS,
            listed(reasons, comments("streaming/columns.py")),
            "\n## The policy server\n\n`serving --metrics-port N`; process i of several answers on the i-th port "
            "after it.\n",
            table,
            *map(line, declared(serving.metrics)),
            "",
        ]
    )


def test_the_page_is_what_the_code_declares():
    assert PAGE.read_text() == page(), "write it anew: python -m tests.test_metrics_docs > docs/metrics.md"


@pytest.mark.parametrize("where", [Metrics(), serving.metrics], ids=["learner", "serving"])
def test_every_metric_of_a_registry_is_on_the_page(where):
    registry = where.registry if isinstance(where, Metrics) else where.REGISTRY
    text = PAGE.read_text()
    for family in registry.collect():
        assert f"| `{family.name + SUFFIX.get(family.type, '')}" in text


@pytest.mark.parametrize("package", ["learner", "serving"])
def test_every_metric_that_is_declared_is_told_something(package):
    names = vars(Metrics() if package == "learner" else serving.metrics)
    metrics = {name for name, value in names.items() if isinstance(value, MetricWrapperBase)}
    code = "".join(path.read_text() for path in (ROOT / package).glob("*.py") if path.name != "metrics.py")
    assert metrics - set(re.findall(r"metrics\.(\w+)", code)) == set()


def test_every_count_and_every_reason_is_explained():
    assert [row for row in page().splitlines() if row.endswith("|  |")] == []


if __name__ == "__main__":
    print(page(), end="")
