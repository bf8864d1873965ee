"""The document of `list`: the same words as that of `status`, and as docs/list.md describes it."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from daemon import ROOT, Places
from facts import gpu, host
from mediated import Mediated
from names import AUDIO, GEFORCE, T4

from sandbox_plugin.cli.main import main
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.inventory.advance import advance
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory, Signals
from sandbox_plugin.model import HostFacts
from sandbox_plugin.outputs.document import Parts, document
from sandbox_plugin.outputs.listing import listing


def inventory_of(facts: HostFacts) -> Inventory:
    inventory, _ = advance(Inventory(), facts, Signals(), 0, Rules())
    return inventory


def listed(facts: HostFacts) -> dict[str, Any]:
    return listing(inventory_of(facts), facts, Rules())


def test_a_device_whose_group_is_in_use_is_unhealthy_and_nothing_to_complain_about() -> None:
    """On a node with running pods that is normal."""
    said = listed(host(gpu("0000:01:00.0", vfio=0), gpu("0000:02:00.0", vfio=1, enable=1)))
    (first, second) = said["resources"][0]["devices"]
    assert (first["reason"], second["reason"]) == ("group-taken", None)
    assert said["summary"]["healthy"] == 1
    assert (said["well"], said["remarks"]) == (True, [])


def test_what_is_broken_or_cannot_be_read_is_a_remark() -> None:
    dead = gpu("0000:01:00.0", vfio=0, link_speed="Unknown", link_width=63)
    said = listed(host(dead, unreadable={"0000:05:00.0": "it does not answer"}))
    assert not said["well"]
    unhealthy, unread = said["remarks"]
    assert unhealthy.startswith("nvidia.com/pgpu=0 (0000:01:00.0) is Unhealthy: off-the-bus: ")
    assert unread == "0000:05:00.0 cannot be read: it does not answer"
    assert listed(HostFacts(unreachable="gone"))["remarks"] == ["the PCI bus cannot be read: gone"]


def test_a_device_is_described_in_the_same_words_as_by_status() -> None:
    facts = host(gpu("0000:01:00.0", vfio=0))
    (ours,) = listed(facts)["resources"][0]["devices"]
    parts = Parts(plugin={}, turn={"state": "serving", "reason": None})
    (its,) = document(inventory_of(facts), parts)["resources"][0]["devices"]
    assert {**ours, "holder": None} == {**its, "riders": []}


# The document of it

_TYPES = {str: "string", bool: "boolean", int: "number", float: "number", dict: "object", type(None): "null"}


def test_the_page_describes_every_key_of_the_json_with_its_type_and_no_other(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, set[str]] = defaultdict(set)
    described = described_by(ROOT / "docs/list.md")
    for root in odd_nodes(places):
        main(["list", f"--fake-sysfs={root}", "--output=json", "--all", "--topology"])
        for path, kind in types_in(json.loads(capsys.readouterr().out), "", described):
            found[path].add(kind)
    assert found == described


def described_by(page: Path) -> dict[str, set[str]]:
    """Path of each key, as `resources[].name` -> the types that it may have."""
    described = {}
    for section in page.read_text().partition("\n## JSON, schema 1\n")[2].split("\n### ")[1:]:
        (prefix,) = re.findall(r"^`(\S+)`$", section.partition("\n")[0]) or [""]
        for keys, kinds in re.findall(r"^\| (`.+?`) \| ([a-z ]+) \|", section, re.MULTILINE):
            for key in re.findall(r"`(\S+)`", keys):
                described[f"{prefix}.{key}".lstrip(".")] = set(kinds.split(" or "))
    return described


def types_in(value: Mapping[str, Any], prefix: str, described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of each key in an object, and in the objects in it that have a section of their own."""
    for key, inner in value.items():
        path = f"{prefix}.{key}".lstrip(".")
        is_list = isinstance(inner, list)
        where = f"{path}[]" if is_list or f"{path}[]" in described else path
        for entry in inner if is_list else [inner]:
            yield where, _TYPES[type(entry)]
            if isinstance(entry, dict) and any(each.startswith(f"{where}.") for each in described):
                yield from types_in(entry, where, described)


def odd_nodes(places: Places) -> Iterator[Path]:
    """Nodes that together show everything that there is to say."""
    for preset in ("hgx-h100", "vgpu"):
        yield places.node(preset).root
    node = places.node("workstation")
    Mediated(node, T4).add(1, "nvidia-1", "GRID T4-1Q", 40)
    yield node.root
    node.bind(AUDIO, "snd_hda_intel")
    (node.folder("0000:00:1f.6") / "vendor").unlink()
    node.sicken(T4, cold=True)
    yield node.root
    yield reticent(places.node("workstation"))
    gone = places.node("empty").root
    (gone / "sys/bus/pci").rename(gone / "sys/bus/gone")
    yield gone


def reticent(node: FakeNode) -> Path:
    """A node of before Linux 6.1 that does not tell much of its GPUs."""
    names = ("subsystem_vendor", "revision", "enable", "current_link_speed", "current_link_width", "reset_method")
    for name in (*names, "aer_dev_fatal", "power_state"):
        (node.folder(GEFORCE) / name).unlink(missing_ok=True)
    shutil.rmtree(node.folder(T4) / "vfio-dev")
    node.set_attribute(T4, "enable", "many")
    return node.root
