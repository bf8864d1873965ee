"""What devices are called in ResourceSlices and claims. Pure.

A claim keeps the name of its device for as long as a pod runs, over reboots and re-binds: so it comes from the PCI
address, or the UUID of a mediated device, and never from the number of a VFIO node.
"""

from __future__ import annotations

from collections.abc import Mapping

from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device


def device_name(device: Device) -> str:
    """`pci-0000-1b-00-0`, or `mdev-<UUID>`: a DNS label. A group of several functions has its lowest address.

    The device must have an address: of one that only PodResources still knows there is no name.
    """
    assert device.placements
    kind = "mdev" if device.mdev else "pci"
    return f"{kind}-{device.address.replace(':', '-').replace('.', '-')}"


def devices_by_name(inventory: Inventory) -> Mapping[str, Device]:
    """The devices of this inventory by those names, in order of their addresses.

    A function that was bound again has a new ID, and its former one stays listed while a pod may hold it: the name then
    means the device that is there.
    """
    named: dict[str, Device] = {}
    tracks = inventory.memory.tracks
    there_last = sorted(inventory.by_key.values(), key=lambda device: tracks[device.key].gone_since is None)
    for device in there_last:
        if device.placements:
            named[device_name(device)] = device
    return dict(sorted(named.items()))


def pool_name(node_name: str) -> str:
    """All devices of a node are one pool, which is called as the node is."""
    return node_name
