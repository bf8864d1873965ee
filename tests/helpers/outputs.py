"""What leaves the daemon for a pod: the CDI specs in its folder, and the answers of Allocate."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path

from cdi_reader import read_spec
from kubelet import Plugin
from wire import load_wire

GPU_NODES = {str(n): f"/dev/vfio/devices/vfio{n}" for n in range(4, 12)}
SWITCH_NODES = {str(n): f"/dev/vfio/devices/vfio{n}" for n in range(4)}
"""Device ID -> VFIO node, on the preset `hgx-h100`."""


def nodes_in(content: bytes) -> dict[str, str]:
    """Qualified device name -> its one node, of one spec. AssertionError if it has more in it than ours have."""
    spec = read_spec(content)
    assert (spec.version, spec.plain) == ("0.5.0", True)
    assert spec.devices
    nodes = {f"{spec.kind}={name}": node for name, (node,) in spec.devices.items()}
    assert all(re.fullmatch(r"/dev/vfio/(devices/vfio)?[0-9]+", node) for node in nodes.values())
    return nodes


def read_cdi(folder: Path) -> dict[str, str]:
    """All specs of a folder together: a device that is in two of them is an error."""
    nodes: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        assert path.suffix == ".yaml", f"what is {path}?"
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        found = nodes_in(path.read_bytes())
        assert path.name == f"{next(iter(found)).partition('=')[0].replace('/', '-')}.yaml"
        assert not found.keys() & nodes.keys()
        nodes |= found
    return nodes


def cdi_of(resource: str, nodes: Mapping[str, str]) -> dict[str, str]:
    """What `read_cdi` gives for these devices, by ID."""
    return {f"{resource}={device_id}": node for device_id, node in nodes.items()}


def allocate_answer(*containers: list[str]) -> bytes:
    """AllocateResponse in which each container has these nodes with "mrw", and nothing else."""
    answer = load_wire().deviceplugin.AllocateResponse()
    for nodes in containers:
        container = answer.container_responses.add()
        for node in nodes:
            container.devices.add(container_path=node, host_path=node, permissions="mrw")
    return bytes(answer.SerializeToString(deterministic=True))


def assert_allocates(plugin: Plugin, containers: list[list[str]], nodes: Mapping[str, str]) -> None:
    """The answer is the nodes of these devices, to the byte: unknown fields would be in it, too."""
    answer = plugin.allocate(*containers).SerializeToString(deterministic=True)
    assert answer == allocate_answer(*([nodes[device_id] for device_id in ids] for ids in containers))
