"""Which nodes a VM needs for its devices, beside their own: pure. For Allocate as for claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sandbox_plugin.model import Device

_CONTAINER_NODE = "/dev/vfio/vfio"
"""What group nodes are used with (Documentation/driver-api/vfio.rst)."""
_IOMMUFD_NODE = "/dev/iommu"
"""What cdevs are used with (Documentation/userspace-api/iommufd.rst)."""


def by_cdev(device: Device) -> list[str]:
    """The nodes of the way by iommufd; none where the device is no cdev."""
    return [device.node, _IOMMUFD_NODE] if device.is_cdev else []


def by_group(device: Device) -> list[str]:
    """The nodes of the way by VFIO groups; none where its group has no node, or must not be passed as a whole."""
    return [] if device.group_node is None else [device.group_node, _CONTAINER_NODE]


def egm_nodes(devices: Sequence[Device], egm_gpus: Mapping[str, frozenset[str]]) -> list[str]:
    """The nodes of the extended GPU memory (Grace) whose GPUs are all among these: it is the memory of one VM.

    `egm_gpus`: as in `HostFacts`.
    """
    asked = {placement.address for device in devices for placement in device.placements}
    return [node for node, gpus in egm_gpus.items() if gpus and gpus <= asked]
