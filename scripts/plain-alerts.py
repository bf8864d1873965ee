#!/usr/bin/env python3
"""Prints the alerts as Prometheus' `rule_files` take them: the same rules as in the PrometheusRule of the manifests.

    scripts/plain-alerts.py [--runbooks ADDRESS]

ADDRESS comes before each runbook's path, such as that of your copy of these documents.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

RULE = Path(__file__).resolve().parent.parent / "manifests/components/prometheus-operator/prometheusrule.yaml"


def plain_alerts(runbooks: str = "") -> dict[str, Any]:
    rules: dict[str, Any] = yaml.safe_load(RULE.read_text())["spec"]
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "annotations" in rule:
                rule["annotations"]["runbook_url"] = runbooks + rule["annotations"]["runbook_url"]
    return rules


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints the alerts as Prometheus' rule_files take them.")
    parser.add_argument("--runbooks", metavar="ADDRESS", default="", help="what comes before each runbook's path")
    print(yaml.safe_dump(plain_alerts(parser.parse_args().runbooks), sort_keys=False, width=110), end="")
