"""The dashboard: each query names metrics and labels that there are, and Prometheus can parse it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from promtool import check_queries, labels_of, metrics_in, unknown_metrics

FILE = Path(__file__).resolve().parent.parent / "manifests/components/prometheus-operator/dashboard.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
TARGET = {"job", "instance", "node", "le"}


def queries(panel: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """As Grafana sends them, all nodes chosen; each with its legend."""
    for target in panel["targets"]:
        yield target["expr"].replace("$node", ".*").replace("$__rate_interval", "2m"), target["legendFormat"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_metric_and_label_in_a_query_is_one_that_there_is(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for query, legend in queries(panel):
        assert "$" not in query
        assert metrics_in(query)
        assert unknown_metrics(query) == set()
        known = set().union(*(labels_of(metric) for metric in metrics_in(query))) | TARGET
        for conditions in re.findall(r"\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", conditions)) <= known
        for names in re.findall(r"\b(?:by|on|group_left)\s*\(([^)]*)\)", query):
            assert {name.strip() for name in names.split(",")} <= known
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= known


def test_prometheus_can_parse_every_query(tmp_path: Path) -> None:
    check_queries([query for panel in PANELS for query, _ in queries(panel)], tmp_path)


def test_panels_have_numbers_of_their_own_and_do_not_lie_upon_each_other() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_every_panel_asks_the_prometheus_that_was_chosen() -> None:
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}
    assert [each["name"] for each in DASHBOARD["templating"]["list"]] == ["datasource", "node"]


def test_it_stands_in_the_file_as_json_writes_it() -> None:
    assert FILE.read_text() == json.dumps(DASHBOARD, indent=1) + "\n"
