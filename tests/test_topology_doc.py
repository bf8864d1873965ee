"""docs/topology.md keeps its word: its sets, matrices, figures and plot are what the code gives."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from script_modules import load_script

from examples import DOC, Example, examples
from sandbox_plugin.config.settings import Policy
from sandbox_plugin.inventory.prefer import prefer
from sandbox_plugin.inventory.topology import matrix_lines
from sandbox_plugin.model import Device


def simulation() -> ModuleType:
    return load_script("simulate-allocation")


@cache
def gpus(preset: str) -> dict[str, Device]:
    devices: dict[str, Device] = simulation().gpus_of(preset)
    return devices


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("example", examples(), ids=str)
def test_the_sets_of_the_doc_are_those_that_are_chosen(example: Example, policy: Policy) -> None:
    devices = gpus(example.preset)
    available = example.available or list(devices)
    chosen = prefer(devices, available=available, must_include=example.must_include, size=example.size, policy=policy)
    assert chosen == example.answers[policy]


def test_the_doc_has_examples_and_a_matrix_of_each_of_its_nodes() -> None:
    presets = {example.preset for example in examples()}
    assert presets == {"hgx-h100", "rtx-pro-6000", "uneven"}
    for preset in presets:
        assert "\n".join(f"    {line}" for line in matrix_lines(list(gpus(preset).values()))) in DOC.read_text()


@cache
def results() -> Any:
    """The whole simulation, as `just simulate` runs it."""
    return simulation().simulate(simulation().LOADS)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_simulation_gives_the_figures_of_the_doc_and_packed_wins() -> None:
    module = simulation()
    assert module.tables(results()) in DOC.read_text()
    for preset in module.NODES:
        packed, *others = (results()[preset, module.TABLE_LOAD, policy] for policy in module.POLICIES)
        assert packed.distance < min(other.distance for other in others)
        assert packed.got_one_numa > 2 * max(other.got_one_numa for other in others)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_plot_in_the_doc_is_the_one_that_the_simulation_draws() -> None:
    module = simulation()
    picture: str = module.plot(results())
    assert picture == (DOC.parent / "topology.svg").read_text()
    lines = ElementTree.fromstring(picture).findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * len(module.NODES) * len(module.POLICIES)
