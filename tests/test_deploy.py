"""What ships for operators agrees with what the programs do: the dashboard asks for metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from learner.metrics import Metrics
from serving import metrics as serving

DASHBOARD = Path(__file__).parent.parent / "deploy" / "grafana" / "dashboards" / "bellwether.json"


def declared(registry: CollectorRegistry) -> set[str]:
    """Names of all series that the registry's metrics may have."""
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {family.name + suffix for family in registry.collect() for suffix in suffixes[family.type]}


def test_every_metric_that_the_dashboard_shows_is_declared() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    shown = {name for query in queries for name in re.findall(r"\b(?:learner|serving)_\w+", query)}
    assert len(shown) > 10
    assert shown <= declared(Metrics().registry) | declared(serving.REGISTRY)
