"""The Grafana dashboard asks for metrics that a run has, by tags that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ray.util.metrics import Counter, Histogram, Metric

from scaleot_ray.federation.roles.metrics import RunMetrics

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "scaleot.json"


def exported() -> dict[str, set[str]]:
    """Every name under which Prometheus finds a metric, with its tags."""
    found = {}
    for metric in vars(RunMetrics("any")).values():
        if not isinstance(metric, Metric):
            continue
        name, tags = f"ray_{metric.info['name']}", set(metric.info["tag_keys"])
        endings = ["_total"] if isinstance(metric, Counter) else [""]
        if isinstance(metric, Histogram):
            endings = ["_sum", "_count", "_bucket"]
        found |= {name + ending: tags for ending in endings}
    return found


def queries(dashboard: dict[str, Any]) -> list[str]:
    """All that a dashboard asks Prometheus for."""
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return panels + [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]


def problems(dashboard: dict[str, Any]) -> list[str]:
    """What a dashboard asks for and nobody exports."""
    there, found = exported(), []
    for query in queries(dashboard):
        for name, chosen in re.findall(r"(ray_\w+)(?:\{([^}]*)\})?", query):
            if name not in there:
                found.append(f"no metric {name}")
                continue
            tags = set(re.findall(r"(\w+)=~?\"", chosen))
            found += [f"{name} has no tag {tag}" for tag in sorted(tags - there[name])]
        grouped = {tag for tags in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for tag in tags.split(", ")}
        known = set().union(*there.values())
        found += [f"no metric has the tag {tag}" for tag in sorted(grouped - known)]
    return found


@pytest.fixture
def dashboard() -> dict[str, Any]:
    """As it is in the repository."""
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def test_it_asks_for_what_there_is(dashboard: dict[str, Any]) -> None:
    assert problems(dashboard) == []


@pytest.mark.parametrize(
    ("expr", "problem"),
    [
        ("ray_scaleot_losses", "no metric ray_scaleot_losses"),
        ('ray_scaleot_round{tenant=~"alice"}', "ray_scaleot_round has no tag tenant"),
        ("sum by (owner) (ray_scaleot_loss_nats)", "no metric has the tag owner"),
        ("ray_scaleot_tuning_starts", "no metric ray_scaleot_tuning_starts"),
    ],
)
def test_a_query_that_finds_nothing_is_noticed(dashboard: dict[str, Any], expr: str, problem: str) -> None:
    dashboard["panels"][0]["targets"][0]["expr"] = expr
    assert problems(dashboard) == [problem]


def test_every_metric_is_shown(dashboard: dict[str, Any]) -> None:
    asked = " ".join(queries(dashboard))
    hidden = [name for name in exported() if not name.endswith("_bucket") and name not in asked]
    assert hidden == []


def test_what_happens_a_few_times_in_a_run_is_not_shown_as_a_rate(dashboard: dict[str, Any]) -> None:
    # Prometheus needs two changes within the window for one, and rounds take hours: what it shows is nothing (NaN).
    rates = re.compile(r"\b(rate|irate|increase)\(ray_scaleot_round_")
    assert [query for query in queries(dashboard) if rates.search(query)] == []


def test_panels_do_not_cover_one_another(dashboard: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (column, row)
        for place in places
        for column in range(place["x"], place["x"] + place["w"])
        for row in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
