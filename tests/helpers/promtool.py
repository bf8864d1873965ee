"""Prometheus' own checker, where it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox_plugin.outputs.metrics.catalogue import ENTRIES, Kind

_OTHERS = {
    "kube_daemonset_status_desired_number_scheduled",
    "kube_daemonset_status_number_ready",
    "kube_node_labels",
    "kube_node_status_allocatable",
    "kube_node_status_capacity",
    "process_resident_memory_bytes",
    "up",
}
"""Metrics of Prometheus, of kube-state-metrics, and of the client library, which are no business of the catalogue."""


def promtool(*arguments: str | Path) -> str:
    """What promtool says. Raises AssertionError when it finds a fault; skips the test where it is not installed, unless
    PROMTOOL=required says that it must be."""
    program = shutil.which("promtool")
    if program is None:
        assert os.environ.get("PROMTOOL") != "required", "promtool is not installed"
        pytest.skip("promtool is not installed: scripts/install-prometheus.sh, or `just test-monitoring`, does that")
    ran = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def check_queries(queries: Iterable[str], folder: Path) -> None:
    """Whether Prometheus can parse each of them."""
    rules: list[dict[str, Any]] = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(queries)]
    assert rules
    file = folder / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


def metrics_in(query: str) -> set[str]:
    """Names of series in a query: a word before `{`, `[`, an operator or the end, which is no function or keyword."""
    bare = re.sub(r'"[^"]*"', '""', query)
    bare = re.sub(r"\b(by|on|group_left|group_right|without|ignoring)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    words = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*\b(?!\s*\()", bare)
    return set(words) - {"and", "or", "unless", "by", "on", "sum", "bool"}


def unknown_metrics(query: str, recorded: Iterable[str] = ()) -> set[str]:
    """Those in a query that there are not."""
    return metrics_in(query) - _series() - _OTHERS - set(recorded)


def _series() -> set[str]:
    plain = {entry.name for entry in ENTRIES if entry.kind is not Kind.HISTOGRAM}
    histograms = [entry.name for entry in ENTRIES if entry.kind is Kind.HISTOGRAM]
    return plain | {f"{name}_{part}" for name in histograms for part in ("bucket", "count", "sum")}


def labels_of(metric: str) -> set[str]:
    """The labels that a series of ours has of itself."""
    name = re.sub(r"_(bucket|count|sum)$", "", metric)
    return {label for entry in ENTRIES if entry.name in (metric, name) for label in entry.labels}
