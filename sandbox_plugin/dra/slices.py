"""The inventory as the devices of ResourceSlices (pure). docs/dra.md lists the attributes and taints.

The limits are those of pkg/apis/resource/validation of Kubernetes: 128 devices a slice, 64 where one of them has a
taint; 32 attributes and capacities a device; 64 bytes a string.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sandbox_plugin.dra.client import JsonObject
from sandbox_plugin.dra.names import devices_by_name
from sandbox_plugin.inventory.partitions import Board
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.inventory.vgpu_types import type_of
from sandbox_plugin.model import NVIDIA, Device, PciFunction, Reason

DEVICES_A_SLICE = 64
"""Any device may get a taint in the next moment, and that must not deal all devices out anew."""
_LONGEST_STRING = 64
_STANDARD = "resource.kubernetes.io"
_DISPLAY, _NVSWITCH = 0x03, 0x0680
"""Base class of GPUs; class and subclass of an NVSwitch."""
_SUFFIXES = ("", "Ki", "Mi", "Gi", "Ti", "Pi")

Attributes = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What decides how devices are shown, beside the inventory."""

    driver: str
    """Its name."""
    evict: frozenset[Reason] = frozenset()
    """Reasons that end the pods which have such a device."""
    device_plugin: bool = True
    """Whether this node offers them by the device plugin API, too."""
    boards: Sequence[Board] = ()
    taints: bool = True
    """False: the API server drops taints. A device that should have one is left out then."""


def render_devices(inventory: Inventory, terms: Terms) -> list[JsonObject]:
    """The devices as they stand in slices, in order of their addresses: near ones are near each other."""
    devices: list[JsonObject] = []
    for name, device in devices_by_name(inventory).items():
        taints = _taints(device, terms)
        if taints and not terms.taints:
            continue
        rendered: dict[str, Any] = {"name": name, "attributes": _attributes(device, inventory, terms)}
        if capacity := _capacity(device, inventory):
            rendered["capacity"] = capacity
        if taints:
            rendered["taints"] = taints
        devices.append(rendered)
    return devices


def dealt_out(devices: Sequence[JsonObject]) -> list[Sequence[JsonObject]]:
    """The same devices, as many in each part as a slice may have."""
    return [devices[at : at + DEVICES_A_SLICE] for at in range(0, len(devices), DEVICES_A_SLICE)]


# Taints


def _taints(device: Device, terms: Terms) -> list[dict[str, str]]:
    """What keeps a device from claims: that it is Unhealthy, or that the device plugin API has given it to a pod."""
    reason = device.for_claims.reason
    if reason is Reason.HELD_BY_OTHER_API:
        return [{"key": f"{terms.driver}/device-plugin", "value": "allocated", "effect": "NoSchedule"}]
    if reason is not None:
        effect = "NoExecute" if reason in terms.evict else "NoSchedule"
        return [{"key": f"{terms.driver}/unhealthy", "value": str(reason), "effect": effect}]
    return []


# Attributes and capacity


def _attributes(device: Device, inventory: Inventory, terms: Terms) -> Attributes:
    """A value that is not known is left out, and so is a string that is too long: cut, it would be another's."""
    function = _function(device, inventory)
    first = device.placements[0]
    found = inventory.memory.found
    values: dict[str, str | int | bool | None] = {
        f"{_STANDARD}/pciBusID": None if device.mdev else first.address,
        f"{_STANDARD}/pcieRoot": first.bridges[0] if first.bridges else None,
        f"{_STANDARD}/numaNode": device.numa_nodes[0] if len(device.numa_nodes) == 1 else None,
        "type": _type(device, function),
        "resource": device.resource,
        "model": device.model,
        "product": _product(device.model),
        "iommuGroup": device.iommu_group,
        "node": "cdev" if device.is_cdev else "group",
        "devicePlugin": terms.device_plugin,
        "mdevUUID": first.address if device.mdev else None,
        **_partitions(device, terms.boards),
    }
    if function is not None:
        values |= {
            "vendorID": f"{function.vendor:04x}",
            "deviceID": f"{function.device:04x}",
            "driver": function.driver,
            "vgpuType": type_of(function, found.type_names) if found is not None else None,
        }
    return {name: shown for name, value in sorted(values.items()) if (shown := _value(value)) is not None}


def _value(value: str | int | bool | None) -> dict[str, Any] | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return {"bool": value}
    if isinstance(value, int):
        return {"int": value}
    return {"string": value} if len(value.encode()) <= _LONGEST_STRING else None


def _function(device: Device, inventory: Inventory) -> PciFunction | None:
    """Its first function, as the latest scan saw it."""
    facts = inventory.memory.facts
    return facts.functions.get(device.placements[0].address) if facts is not None else None


def _type(device: Device, function: PciFunction | None) -> str:
    """What device classes select by: gpu, nvswitch, vgpu, virtual-function, other, or unknown where it has left.

    Always something: a selector that asks for what a device does not have stops the scheduler.
    """
    if device.mdev or (function is not None and function.is_vendors_vgpu):
        return "vgpu"
    if function is None:
        return "unknown"
    if function.physical_function is not None:
        return "virtual-function"
    if function.class_code >> 16 == _DISPLAY:
        return "gpu"
    return "nvswitch" if (function.vendor, function.class_code >> 8) == (NVIDIA, _NVSWITCH) else "other"


def _product(model: str) -> str | None:
    """`H100 SXM5 80GB` of `GH100 [H100 SXM5 80GB]`: pci.ids has the name that is sold behind that of the chip."""
    named = re.fullmatch(r"[^\[]*\[([^\]]+)\]", model)
    return named[1] if named else None


def _partitions(device: Device, boards: Sequence[Board]) -> dict[str, int]:
    """Which GPU of its HGX board it is, and which half and pair of that board it is in."""
    for board in boards:
        bits = [board.bits[p.address] for p in device.placements if p.address in board.bits]
        if len(bits) == 1:
            found = {"boardModule": board.first + bits[0].bit_length() - 1}
            for size, name in ((4, "boardHalf"), (2, "boardPair")):
                parts = [part for part in board.partitions if part.bit_count() == size]
                number = next((at for at, part in enumerate(parts) if part & bits[0]), None)
                if number is not None:
                    found[name] = (board.first - 1) // 8 * len(parts) + number
            return found
    return {}


def _capacity(device: Device, inventory: Inventory) -> dict[str, dict[str, str]]:
    """The largest memory BAR: what of the device's memory the host can address at a time."""
    function = _function(device, inventory)
    if function is None or device.mdev:
        return {}
    size = max((bar.size for bar in function.bars if bar.prefetchable and bar.wide and not bar.io), default=0)
    return {"barMemory": {"value": quantity(size)}} if size else {}


def quantity(number: int) -> str:
    """In the words in which Kubernetes stores it: the largest binary suffix that leaves it whole."""
    power = 0
    while number and number % 1024 == 0 and power < len(_SUFFIXES) - 1:
        number, power = number // 1024, power + 1
    return f"{number}{_SUFFIXES[power]}"
