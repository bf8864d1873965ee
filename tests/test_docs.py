"""The documents say what there is, and lead where they say."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

import pytest
from markdown import anchors

from sandbox_plugin.cli.main import main
from sandbox_plugin.config.load import load_settings
from sandbox_plugin.config.settings import OPTIONS, Option, Settings
from sandbox_plugin.model import Reason

ROOT = Path(__file__).resolve().parent.parent
DOCS = [*sorted(ROOT.glob("*.md")), *(ROOT / each / "README.md" for each in ("manifests", "examples"))]
DOCS += sorted((ROOT / "docs").glob("*.md"))


def test_operations_tells_what_every_reason_means_and_what_to_do_and_knows_no_other_reason() -> None:
    section = (ROOT / "docs/operations.md").read_text().partition("\n## Unhealthy\n")[2].partition("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| `")]
    assert [row[0] for row in rows] == [f"`{reason}`" for reason in Reason]
    assert all(len(row) == 3 and all(row) for row in rows)


def test_every_reason_can_be_given_by_the_code() -> None:
    sources = [path.read_text() for path in (ROOT / "sandbox_plugin/inventory").glob("*.py")]
    given = set(re.findall(r"reason=Reason\.(\w+)", "".join(sources)))
    assert given == {reason.name for reason in Reason}


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


def test_the_architecture_page_has_the_rooms_of_the_import_contract_on_the_same_floors() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["id"] == "house")
    assert layers[0] == "__main__", "the door, and not a room"
    held = {(floor, room) for floor, layer in enumerate(layers[1:], 1) for room in layer.split(" | ")}
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|", page, re.MULTILINE)
    assert len(rows) == len(held)
    assert {(int(floor), room) for floor, room in rows} == held


def test_the_architecture_page_names_files_that_there_are() -> None:
    named = re.findall(r"`(\w[\w/]*(?:\.py|/))`", (ROOT / "docs/architecture.md").read_text())
    assert len(named) > 20
    for name in named:
        assert (ROOT / "sandbox_plugin" / name).exists() or (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_there_are(document: Path) -> None:
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text()):
        target = document.parent / name if name else document
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"
