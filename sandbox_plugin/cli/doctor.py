"""`sandbox-plugin doctor`: is this node ready for passthrough, and what is to be done if it is not."""

from __future__ import annotations

import argparse
import asyncio
import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from sandbox_plugin.cli.options import add_options, settings_from
from sandbox_plugin.cli.stdout import say, visible
from sandbox_plugin.cli.tables import Line, Styled, has_colors, painted
from sandbox_plugin.doctor.examine import examine
from sandbox_plugin.doctor.findings import Finding, Status
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules

SCHEMA = 1
"""Rises when a program that reads the JSON has to change."""
_WIDTH = 80
_MARKS = {
    Status.PASS: Styled("ok", "green"),
    Status.WARN: Styled("WARN", "yellow"),
    Status.FAIL: Styled("FAIL", "bold red"),
    Status.UNSEEN: Styled("?", "dim"),
}


def set_up(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Looks at everything between the firmware and a pod with a GPU, and says of each condition what was seen and "
        "the one thing to do about it. Changes nothing, opens no device, and needs no running daemon. Exit status: 1 "
        "if something fails, else 0."
    )
    add_options(
        parser,
        "gpu_alias",
        "nvswitch_alias",
        "consumer",
        "require_iommufd",
        "kubelet_dir",
        "pod_resources_socket",
        "cdi_dir",
    )
    parser.add_argument("--output", type=str.lower, choices=("text", "json"), default="text", help="default: text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with settings_from(args) as settings:
        findings = asyncio.run(examine(settings, Rules(settings, ModelNames.load())))
    if args.output == "json":
        say(json.dumps(_as_json(findings), indent=2))
    else:
        colors = has_colors()
        say("\n".join(painted(line, colors=colors) for line in _lines(findings)))
    return 1 if any(finding.status is Status.FAIL for finding in findings) else 0


def _as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """docs/doctor.md describes it."""
    return {
        "schema": SCHEMA,
        "summary": _counts(findings),
        "findings": [
            {
                "group": finding.group,
                "check": finding.check,
                "status": finding.status,
                "seen": finding.seen,
                "action": finding.action or None,
            }
            for finding in findings
        ],
    }


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    counts = Counter(finding.status for finding in findings)
    return {status: counts[status] for status in Status}


def _lines(findings: Sequence[Finding]) -> Iterator[Line]:
    width = max(len(finding.check) for finding in findings)
    for group, members in groupby(findings, key=lambda finding: finding.group):
        yield [Styled(group.upper(), "bold")]
        for finding in members:
            yield from _finding(finding, width)
        yield []
    yield from ([line] for line in _wrapped(_summary(_counts(findings)), 0))


def _finding(finding: Finding, width: int) -> Iterator[Line]:
    indent = len("  WARN  ") + width + 2
    mark = _MARKS[finding.status]
    first, *rest = _wrapped(finding.seen, indent)
    yield ["  ", mark, " " * (6 - len(mark.text)), finding.check.ljust(width + 2), first]
    for line in rest:
        yield [" " * indent, line]
    for number, line in enumerate(_wrapped(finding.action, indent + 3) if finding.action else []):
        yield [" " * indent, Styled("-> " if not number else "   ", "bold cyan"), line]


def _wrapped(text: str, indent: int) -> list[str]:
    """Words longer than a line, such as paths, are left whole."""
    return textwrap.wrap(visible(text), _WIDTH - indent, break_long_words=False, break_on_hyphens=False) or [""]


def _summary(counts: dict[str, int]) -> str:
    words = [f"{counts[Status.PASS]} passed"]
    words += [f"{counts[Status.WARN]} to look at"] if counts[Status.WARN] else []
    words += [f"{counts[Status.FAIL]} failed"] if counts[Status.FAIL] else []
    words += [f"{counts[Status.UNSEEN]} cannot be seen here"] if counts[Status.UNSEEN] else []
    verdict = "This node is not ready" if counts[Status.FAIL] else "Nothing speaks against passthrough"
    return f"{verdict}: {', '.join(words)}."
