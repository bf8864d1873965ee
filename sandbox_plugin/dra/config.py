"""What a claim or a DeviceClass may ask of this driver beyond the device itself: its opaque configuration. Pure.

    apiVersion: vfio.sandbox-plugin/v1alpha1
    kind: VfioDeviceConfig
    node: cdev

It is strict: what is not understood refuses the claim, since a VM with something else than was asked for is worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

API_VERSION = "vfio.sandbox-plugin/v1alpha1"
"""Whatever the driver is called on this node."""
KIND = "VfioDeviceConfig"


class NodeKind(StrEnum):
    """Which nodes of a device a container gets."""

    DEFAULT = "default"
    """What the consumer of this node gets by the device plugin API, too."""
    CDEV = "cdev"
    """The device's own, and what iommufd needs."""
    GROUP = "group"
    """Its IOMMU group's, and what VFIO groups need."""


class InvalidConfig(ValueError):
    """Says what is wrong, and what is allowed."""


def parse_config(parameters: Any) -> NodeKind:
    """The kind of node that these parameters ask for. Raises InvalidConfig."""
    if not isinstance(parameters, Mapping):
        raise InvalidConfig("parameters: not an object")
    for name, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        if parameters.get(name) != expected:
            raise InvalidConfig(f"{name} is {_shown(parameters.get(name))}; this driver knows {expected!r}")
    if unknown := sorted(map(str, parameters.keys() - {"apiVersion", "kind", "node"})):
        raise InvalidConfig(f"unknown field {_shown(unknown[0])}; {KIND} has the field 'node'")
    node = parameters.get("node", "default")
    if node not in tuple(NodeKind):
        raise InvalidConfig(f"node is {_shown(node)}; allowed are {', '.join(NodeKind)}")
    return NodeKind(node)


def _shown(value: Any) -> str:
    return repr(value)[:80]
