"""Functions that no rule takes and that still have to do with a device: its card's audio and USB, and what else is in
its IOMMU group or its slot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from sandbox_plugin.model import Device, PciFunction


class Tie(StrEnum):
    """What a function has to do with a device."""

    RIDES_ALONG = "rides along with"
    """It is in the IOMMU group, and whoever has the device may have it: nobody else can."""
    IN_GROUP = "in the IOMMU group of"
    """It is in the IOMMU group, but no vfio driver has it."""
    IN_SLOT = "in the slot of"
    """It is on the same card, but in another IOMMU group."""


class Companion(NamedTuple):
    """One function's tie to the device that it goes with."""

    tie: Tie
    device: Device

    def __str__(self) -> str:
        return f"{self.tie} {self.device.address}"


def companions(devices: Iterable[Device], functions: Iterable[PciFunction]) -> dict[str, Companion]:
    """By address, those of these functions that have to do with one of these devices. Bridges have not.

    Of several devices in a group it is the one in the same slot, else the first.
    """
    by_group: dict[int | None, list[Device]] = defaultdict(list)
    by_slot: dict[str, Device] = {}
    for device in devices:
        by_group[device.iommu_group].append(device)
        for placement in device.placements:
            by_slot.setdefault(_slot(placement.address), device)
    found: dict[str, Companion] = {}
    for function in functions:
        in_slot, in_group = by_slot.get(_slot(function.address)), by_group.get(function.iommu_group, [])
        if function.is_bridge or not (in_slot or in_group):
            continue
        device = in_slot if in_slot is not None and (in_slot in in_group or not in_group) else in_group[0]
        tie = Tie.IN_GROUP if in_group else Tie.IN_SLOT
        found[function.address] = Companion(
            Tie.RIDES_ALONG if function.address in device.group_functions else tie, device
        )
    return found


def _slot(address: str) -> str:
    """`0000:01:00` for `0000:01:00.1`. A mediated device, whose address is a UUID, is in none but its own."""
    return address.rpartition(".")[0] or address
