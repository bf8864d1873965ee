"""The plot in docs/performance.md shows the figures beside it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_plot_is_drawn_from_the_figures_that_the_benchmark_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec = importlib.util.spec_from_file_location("plot_performance", ROOT / "scripts/plot-performance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    picture: str = module.plot((ROOT / "docs/performance.json").read_text())
    assert picture == (ROOT / "docs/performance.svg").read_text()
    lines = ElementTree.fromstring(picture).findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [4, 5, 3, 3], "reference and ours: start, Allocate"
