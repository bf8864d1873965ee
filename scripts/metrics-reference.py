#!/usr/bin/env python3
"""Makes the reference in docs/monitoring.md from the catalogue of metrics in the code.

scripts/metrics-reference.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sandbox_plugin.outputs.metrics.catalogue import SECTIONS, Entry  # noqa: E402

DOCUMENT = ROOT / "docs/monitoring.md"
BEGIN, END = "<!-- the reference: made by scripts/metrics-reference.py -->\n", "<!-- end -->"


def reference() -> str:
    """All sections, each with a table."""
    return "".join(
        f"\n### {section.title}\n\n| metric | type, unit | labels | what it says | series |\n|---|---|---|---|---|\n"
        + "".join(map(row, section.entries))
        for section in SECTIONS
    )


def row(entry: Entry) -> str:
    kind = f"{entry.kind}, {entry.unit}" if entry.unit else str(entry.kind)
    labels = ", ".join(f"`{label}`" for label in entry.labels) or "none"
    return f"| `{entry.name}` | {kind} | {labels} | {entry.help} | {entry.series} |\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the document is out of date")
    check: bool = parser.parse_args().check
    document = DOCUMENT.read_text()
    before, found, rest = document.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        sys.exit(f"{DOCUMENT}: no marks {BEGIN.strip()!r} and {END!r}")
    now = before + BEGIN + reference() + "\n" + END + after
    if check:
        if now != document:
            print(f"{DOCUMENT} is out of date: run scripts/metrics-reference.py", file=sys.stderr)
        return int(now != document)
    DOCUMENT.write_text(now)
    return 0


if __name__ == "__main__":
    sys.exit(main())
