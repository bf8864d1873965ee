#!/usr/bin/env python3
"""Writes the version wherever it is named. Its place is sandbox_plugin/__init__.py; the others are copies.

    scripts/set-version.py              say the version, and fail if a copy differs
    scripts/set-version.py 0.2.0        the version from now on, with a heading in the changelog: "0.2.0 (unreleased)"
    scripts/set-version.py --release    the heading gets today's date (UTC) instead

The copies are the tags of the image in manifests, examples and documents, and a label in the Containerfile. Standard
library only.
"""

from __future__ import annotations

import argparse
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "sandbox_plugin/__init__.py"
COPIES = ("Containerfile", "README.md", "docs/*.md", "examples/**/*.yaml", "manifests/**/*.yaml")
VERSION = r"\d+\.\d+\.\d+(?:rc\d+)?"
AT_SOURCE = re.compile(rf'(?P<before>^__version__ = "){VERSION}', re.MULTILINE)
IN_COPIES = re.compile(rf'(?P<before>sandbox-plugin:|newTag: |image\.version="){VERSION}')
HEADING = re.compile(rf"^## (?P<version>{VERSION}) \((?P<date>[^)]+)\)$", re.MULTILINE)
UNRELEASED = "unreleased"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the version wherever it is named, or say it.")
    parser.add_argument("version", nargs="?", help="the version from now on, such as 0.2.0 or 0.2.0rc1")
    parser.add_argument("--release", action="store_true", help="date the changelog's heading")
    given = parser.parse_args()
    new: str | None = given.version
    if new is not None and not re.fullmatch(VERSION, new):
        parser.error(f"{new} is no version: MAJOR.MINOR.PATCH, or the same with rcN")
    version = new or read_version()
    different = [path for path in files() if path.read_text() != text_with(path, version)]
    if new is None and different:
        names = ", ".join(str(path.relative_to(ROOT)) for path in different)
        print(f"error: another version than {version} is in {names}", file=sys.stderr)
        return 1
    for path in different:
        path.write_text(text_with(path, version))
    if new is not None or given.release:
        log = ROOT / "CHANGELOG.md"
        log.write_text(headed(log.read_text(), version, f"{datetime.now(UTC):%F}" if given.release else UNRELEASED))
    print(version)
    return 0


def read_version() -> str:
    found = AT_SOURCE.search((ROOT / SOURCE).read_text())
    assert found is not None, f"{SOURCE} has no line __version__ = ..."
    return found[0].removeprefix(found["before"])


def files() -> list[Path]:
    return [ROOT / SOURCE, *(path for pattern in COPIES for path in sorted(ROOT.glob(pattern)))]


def text_with(path: Path, version: str) -> str:
    pattern = AT_SOURCE if path == ROOT / SOURCE else IN_COPIES
    return pattern.sub(rf"\g<before>{version}", path.read_text())


def headed(log: str, version: str, date: str) -> str:
    """The changelog with this version on top: what is unreleased is of this version, or a new heading begins."""
    top = HEADING.search(log)
    assert top is not None, "CHANGELOG.md has no heading of a version"
    line = f"## {version} ({date})"
    if top["date"] == UNRELEASED:
        return log[: top.start()] + line + log[top.end() :]
    return f"{log[: top.start()]}{line}\n\n{log[top.start() :]}"


if __name__ == "__main__":
    sys.exit(main())
