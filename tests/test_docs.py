"""The documents say what there is, and lead where they say."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from sandbox_plugin.cli.main import main
from sandbox_plugin.configuration import OPTIONS, Option, load_settings
from sandbox_plugin.model import Reason
from sandbox_plugin.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("reason", list(Reason))
def test_operations_tells_what_to_do_about_every_reason(reason: Reason) -> None:
    assert f"| `{reason}` |" in (ROOT / "docs/operations.md").read_text()


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_configuration_lists_every_setting_with_its_default_as_the_help_does(
    option: Option, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row.split(" | ") for row in (ROOT / "docs/configuration.md").read_text().splitlines()]
    (row,) = (row for row in rows if row[0] == f"| `{option.flag}`")
    assert row[1] == f"`{option.environment}`"
    default = row[2].strip("`")
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert f"[{option.environment}; default: {default}]" in capsys.readouterr().out
    if option.name != "log_format":  # its default depends on where the log goes
        given = load_settings({option.name: default}, {})
        assert given == Settings()


def test_reliability_names_tests_that_there_are() -> None:
    tests = {
        path.name: re.findall(r"^(?:async )?def test_(\w+)", path.read_text(), re.MULTILINE)
        for path in (ROOT / "tests").glob("test_*.py")
    }
    text = (ROOT / "docs/reliability.md").read_text()
    cited = re.findall(r"`(?:(test_\w+\.py)::)?([a-z0-9_]+?)(_\.\.\.)?(?:\[\w+\])?`", text)
    names = [each for each in cited if each[0] or each[2] or each[1].count("_") > 3]
    assert len(names) > 40
    for file, name, is_cut in names:
        there = tests[file] if file else list(itertools.chain(*tests.values()))
        assert any(each.startswith(f"{name}_") if is_cut else each == name for each in there), f"{file}::{name}"


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target
