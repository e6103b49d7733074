"""What ships for operators agrees with what the programs do: dashboard and alarms ask for metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from learner.metrics import Metrics
from learner.train import TrainConfig
from serving import metrics as serving
from serving.server import ServingConfig
from serving.variety import LAST
from streaming.join_settings import COUNTERS

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "bellwether.json"
PROMETHEUS = ROOT / "deploy" / "prometheus.yml"
ALERTS = ROOT / "deploy" / "alerts.yml"
TRIED = ROOT / "tests" / "alerts_test.yml"
METRIC = r"(?<![:\w])(?:learner|serving)_\w+"  # a recorded one has bellwether: before it


def declared(registry: CollectorRegistry) -> set[str]:
    """Names of all series that the registry's metrics may have."""
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {family.name + suffix for family in registry.collect() for suffix in suffixes[family.type]}


def ours() -> set[str]:
    """Names of all series of both programs."""
    return declared(Metrics().registry) | declared(serving.REGISTRY)


def rules() -> dict[str, str]:
    """The text of each rule, by the name of its alarm or of what it records. The file's layout is ours."""
    text = re.sub(r"^ *#.*\n", "", ALERTS.read_text(), flags=re.M)
    parts = re.split(r"^ {6}- (?=alert: |record: )", text, flags=re.M)[1:]
    return {part.split()[1]: part for part in parts}


def expression(rule: str) -> str:
    """What a rule asks for, in one line."""
    found = re.search(r"^ {8}expr: (.+\n(?: {10}.+\n)*)", rule, re.M)
    assert found is not None, rule
    return " ".join(found[1].split())


def said(rule: str) -> dict[str, str]:
    """A rule's annotations."""
    lines = rule.partition("annotations:\n")[2]
    found = re.findall(r"^ {10}(\w+): (?:>-\n)?(.+\n(?: {12}.+\n)*)", lines, re.M)
    return {name: " ".join(text.split()) for name, text in found}


ALARMS = {name: rule for name, rule in rules().items() if rule.startswith("alert")}


def watched() -> list[str]:
    """What the rows of "What to watch" alarm on."""
    section = (ROOT / "docs" / "operations.md").read_text().partition("\n## What to watch\n")[2]
    return re.findall(r"^\| (?!alarm on|---)(.+?) \| ", section.partition("\n## ")[0], re.M)


# --- the dashboard


def test_every_metric_that_the_dashboard_shows_is_declared() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    shown = {name for query in queries for name in re.findall(METRIC, query)}
    assert len(shown) > 10
    assert shown <= ours()


def test_the_dashboards_panels_fill_rows_of_three_in_the_order_of_their_ids() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = [{"h": 7, "w": 8, "x": 8 * (i % 3), "y": 7 * (i // 3)} for i in range(len(panels))]
    assert [panel["gridPos"] for panel in panels] == places
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))


# --- the alarms


def test_every_metric_that_a_rule_asks_for_is_declared_or_recorded() -> None:
    asked = {name for rule in rules().values() for name in re.findall(METRIC, expression(rule))}
    recorded = {name for rule in rules().values() for name in re.findall(r"bellwether:\w+", expression(rule))}
    assert len(asked) > 20
    assert asked <= ours()
    assert recorded == rules().keys() - ALARMS.keys()


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_says_what_it_means_and_where_there_is_more(name: str) -> None:
    text, rule = said(ALARMS[name]), ALARMS[name]
    assert re.search(r"^ {8}labels: \{severity: (critical|warning)\}$", rule, re.M)
    assert text.keys() == {"summary", "description", "runbook"}
    assert text["description"].endswith((".", "?", ")"))
    page, _, section = text["runbook"].partition("#")
    heads = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.M)
    assert section in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_whatever_is_to_be_watched_is_an_alarm() -> None:
    hangs_on_the_shop = {"serving_latency_seconds"}
    asked = {name for rule in rules().values() for name in re.findall(METRIC, expression(rule))}
    named = {name for row in watched() for name in re.findall(METRIC, row)}
    assert len(named) > 20
    assert named - asked == hangs_on_the_shop


def test_whatever_the_join_counts_and_is_to_be_watched_is_an_alarm() -> None:
    asked = re.findall(r'what=~?"([^"]+)"', "".join(map(expression, ALARMS.values())))
    named = {word for row in watched() for word in re.findall(r"\w+", row)} & set(COUNTERS)
    assert len(named) > 5
    assert {count for count in COUNTERS if re.fullmatch("|".join(asked), count)} == named


@pytest.mark.parametrize("name", [name for name, rule in ALARMS.items() if "increase(" in rule])
def test_a_counter_that_must_not_rise_is_there_before_it_does(name: str) -> None:
    registries = Metrics().registry, serving.REGISTRY
    samples = [sample for r in registries for family in r.collect() for sample in family.samples]
    for metric, labels in re.findall(r"increase\((\w+)(?:\{(.*?)\})?\[", expression(ALARMS[name])):
        there = [sample.labels for sample in samples if sample.name == metric]
        assert there, metric
        for label, values in re.findall(r'(\w+)=~?"([^"]+)"', labels):
            assert {series[label] for series in there} >= set(values.split("|")), metric


def test_thresholds_that_hang_on_a_default_follow_it() -> None:
    late_s = 10 * TrainConfig().checkpoint_s
    assert expression(rules()["LearnerCheckpointOld"]).endswith(f" > {late_s:g}")
    slate_size = ServingConfig(weights="somewhere").slate_size
    for name in ("bellwether:shown_coverage", "bellwether:shown_gini"):
        assert f" >= {LAST // slate_size})" in expression(rules()[name])


def test_prometheus_loads_the_rules_and_compose_gives_them_to_it() -> None:
    assert "rule_files: [alerts.yml]\n" in PROMETHEUS.read_text()
    service = (ROOT / "docker-compose.yml").read_text().partition("\n  prometheus:\n")[2].partition("\n\n")[0]
    for path in (PROMETHEUS, ALERTS):
        assert f"- ./deploy/{path.name}:/etc/prometheus/{path.name}:ro\n" in service


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_is_seen_to_fire(name: str) -> None:
    assert f"""{{labels: '{{alertname="{name}"}}', value: 1}}""" in TRIED.read_text() or (
        f"""ALERTS{{alertname="{name}", alertstate="firing"}}""" in TRIED.read_text()
    )


@pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="!!! ALARMS WERE NOT TRIED: no promtool on PATH; it comes with Prometheus, not from PyPI",
)
@pytest.mark.parametrize(
    "arguments",
    [("check", "config", PROMETHEUS), ("check", "rules", ALERTS), ("test", "rules", TRIED)],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)
def test_promtool_finds_nothing_wrong(arguments: tuple[str | Path, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
