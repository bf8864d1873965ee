"""The documents say what there is, and lead where they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sandbox_plugin.configuration import OPTIONS
from sandbox_plugin.model import Reason

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("reason", list(Reason))
def test_operations_tells_what_to_do_about_every_reason(reason: Reason) -> None:
    assert f"| `{reason}` |" in (ROOT / "docs/operations.md").read_text()


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_configuration_lists_every_setting(option: object) -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    flag, environment = (getattr(option, name) for name in ("flag", "environment"))
    assert f"`{flag}` | `{environment}`" in text


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target
