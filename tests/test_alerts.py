"""The alerts: they parse, name what there is, lead to a runbook, and each fires and resolves when it should.

scripts/try-alerts.py does the same with a real Prometheus and the real daemon.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown import anchors
from promtool import check_queries, labels_of, metrics_in, promtool, unknown_metrics

from sandbox_plugin.model import Reason
from sandbox_plugin.outputs.document import ORDERLY

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "manifests/components/prometheus-operator"
MANIFEST: dict[str, Any] = yaml.safe_load((FOLDER / "prometheusrule.yaml").read_text())
GROUPS: list[dict[str, Any]] = MANIFEST["spec"]["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
UNIT_TESTS: dict[str, Any] = yaml.safe_load((ROOT / "tests/monitoring/alerts.test.yaml").read_text())


def plain(*arguments: str) -> str:
    """What `just alerts` prints."""
    command = [sys.executable, "scripts/plain-alerts.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_rules_are_what_prometheus_takes(tmp_path: Path) -> None:
    (tmp_path / "alerts.yaml").write_text(plain())
    assert f"{len(RULES)} rules found" in promtool("check", "rules", tmp_path / "alerts.yaml")
    check_queries([rule["expr"] for rule in RULES], tmp_path)


def test_each_alert_fires_when_it_should_and_resolves(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests/monitoring/alerts.test.yaml", tmp_path)
    (tmp_path / "alerts.yaml").write_text(plain())
    assert "SUCCESS" in promtool("test", "rules", tmp_path / "alerts.test.yaml")


@pytest.mark.parametrize("name", ALERTS)
def test_the_unit_tests_see_each_alert_silent_then_firing_then_silent_again(name: str) -> None:
    stories = []
    for test in UNIT_TESTS["tests"]:
        looks = [each for each in test["alert_rule_test"] if each["alertname"] == name]
        looks.sort(key=lambda each: int(each["eval_time"].removesuffix("m")))
        stories.append([bool(each["exp_alerts"]) for each in looks])
    assert any(story[:2] == [False, True] and not story[-1] for story in stories)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_metric_and_every_label_in_a_rule_is_one_that_there_is(rule: dict[str, Any]) -> None:
    assert unknown_metrics(rule["expr"], RECORDED) == set()
    assert metrics_in(rule["expr"])
    target = {"job", "instance", "node"}
    for metric, conditions in re.findall(r"(sandbox_plugin_\w+)\{([^}]*)\}", rule["expr"]):
        named = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", conditions))
        assert named <= labels_of(metric) | target, metric
    words = " ".join(rule.get("annotations", {}).values())
    of_metrics = set().union(*(labels_of(metric) for metric in metrics_in(rule["expr"])))
    of_kubernetes = {"resource", "namespace", "daemonset"} if "kube_" in rule["expr"] else set()
    assert set(re.findall(r"\$labels\.(\w+)", words)) <= of_metrics | of_kubernetes | target


def test_a_device_that_is_withheld_in_good_order_is_no_alarm_and_every_other_reason_is_one() -> None:
    """Of those that are orderly for a moment two are not after five minutes: somebody has to come."""
    (left_out,) = re.findall(r'reason!~"([^"]+)"', ALERTS["SandboxPluginDeviceUnhealthy"]["expr"])
    assert set(left_out.split("|")) == ORDERLY - {Reason.HOLDERS_UNKNOWN, Reason.NOT_IN_CDI}


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_has_a_severity_words_and_a_runbook_that_there_is(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert file == "docs/operations.md"
    assert anchor in anchors(ROOT / file)


def test_the_page_lists_the_alerts_and_no_others() -> None:
    page = (ROOT / "docs/alerts.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w ]+) \|", page, re.MULTILINE)
    listed = [(name, severity, time.replace("at once", "").replace(" min", "m")) for name, severity, time in rows]
    assert listed == [(name, rule["labels"]["severity"], rule.get("for", "")) for name, rule in ALERTS.items()]


def test_the_page_shows_the_alert_that_needs_nothing_of_ours_as_it_is() -> None:
    shown = re.search(r"```yaml\n(- alert: .*?)```", (ROOT / "docs/alerts.md").read_text(), re.DOTALL)
    assert shown is not None
    (rule,) = yaml.safe_load(shown[1])
    assert rule["expr"] == ALERTS["SandboxPluginAllocatableBelowCapacity"]["expr"]
    assert rule["for"] == ALERTS["SandboxPluginAllocatableBelowCapacity"]["for"]


def test_runbooks_can_lead_to_a_copy_of_these_documents() -> None:
    rules = yaml.safe_load(plain("--runbooks", "https://docs.example/"))
    addresses = [rule["annotations"]["runbook_url"] for group in rules["groups"] for rule in group["rules"][1:]]
    assert addresses
    assert all(address.startswith("https://docs.example/docs/operations.md#") for address in addresses)


def test_what_is_tried_for_real_is_every_alert() -> None:
    tried = re.findall(r'^    "(SandboxPlugin\w+)": \(', (ROOT / "scripts/try-alerts.py").read_text(), re.MULTILINE)
    assert set(tried) == ALERTS.keys()
