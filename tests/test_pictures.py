"""The pictures in docs/ are what the scripts draw of the code and the figures as they are."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from script_modules import load_script

from sandbox_plugin.kubelet.endpoint import State

DOCS = Path(__file__).resolve().parent.parent / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def test_the_plot_of_performance_is_drawn_from_the_figures_that_the_benchmark_wrote() -> None:
    picture: str = load_script("plot-performance").plot((DOCS / "performance.json").read_text())
    assert picture == (DOCS / "performance.svg").read_text()
    lines = ElementTree.fromstring(picture).findall(f"{SVG}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [4, 5, 3, 3], "reference and ours: start, Allocate"


@pytest.mark.parametrize("name", ["architecture.svg", "endpoint.svg"])
def test_the_diagram_is_the_one_that_the_script_draws(name: str) -> None:
    assert load_script("draw-diagrams").PICTURES[name]() == (DOCS / name).read_text()


def test_the_diagram_of_an_endpoint_has_its_states_and_that_of_the_house_has_rooms_that_exist() -> None:
    states = _bold("endpoint.svg")
    assert states == {"An endpoint's life: one resource at the kubelet", *State}
    rooms = {name for name in _bold("architecture.svg") if name.endswith("/")}
    assert len(rooms) >= 5
    assert all((DOCS.parent / "sandbox_plugin" / room).is_dir() for room in rooms), rooms


def test_the_recorded_demo_shows_a_gpu_that_fails_and_moves_from_frame_to_frame() -> None:
    picture = (DOCS / "demo.svg").read_text()
    frames = ElementTree.fromstring(picture).findall(f"{SVG}g[@class='film']/{SVG}g")
    assert len(frames) > 10
    assert picture.count("translateX") == len(frames)
    assert "falls off the PCI bus" in picture
    assert "docs/demo.svg" in (DOCS.parent / "README.md").read_text()


def test_a_frame_shows_the_lines_of_the_terminal_in_their_colours() -> None:
    recorder = load_script("record-demo")
    green, plain = ((0, "healthy", "green", False),), ((3, "a <b>", "default", True),)
    frames = [recorder.Frame(1.0, (green, ())), recorder.Frame(3.0, (green, plain))]
    picture = recorder.draw(frames, 5.0)
    root = ElementTree.fromstring(picture)
    texts = {text.text: text.attrib for text in root.iter(f"{SVG}text")}
    assert texts.keys() == {"healthy", "a <b>"}, "a line that is in two frames is drawn once"
    assert recorder.COLOURS["green"] in texts["healthy"]["style"]
    assert "0.00%{transform:translateX(-0px)}50.00%{transform" in picture
    assert [len(frame) for frame in root.findall(f"{SVG}g[@class='film']/{SVG}g")] == [1, 2]


def _bold(name: str) -> set[str]:
    texts = ElementTree.parse(DOCS / name).getroot().findall(f"{SVG}text")
    return {text.text or "" for text in texts if text.get("font-weight") == "bold"}
