"""Host facts in one line each, for tests of the pure middle."""

from __future__ import annotations

from typing import Any

from sandbox_plugin.model import HostFacts, IommuGroup, PciFunction, VfioDev

H100 = 0x2330


def gpu(address: str, *, vfio: int | None = 0, group: int = 50, cdev: bool = True, **changes: Any) -> PciFunction:
    """An H100 bound to vfio-pci as vfioN; `vfio=None`: bound to no driver."""
    known: dict[str, Any] = {
        "address": address,
        "vendor": 0x10DE,
        "device": H100,
        "class_code": 0x030200,
        "driver": None if vfio is None else "vfio-pci",
        "iommu_group": group,
        "vfio": None if vfio is None else VfioDev(number=vfio, cdev=f"511:{vfio}" if cdev else None),
        "numa_node": 0,
        "link_speed": "32.0 GT/s PCIe",
        "link_width": 16,
        "enable": 0,
        "bridges": ("pci0000:00", "0000:00:01.0"),
    }
    return PciFunction(**(known | changes))


def host(*functions: PciFunction, **changes: Any) -> HostFacts:
    """What a host with just these functions shows: every group, and the nodes of those that vfio holds."""
    groups: dict[int, list[str]] = {}
    for function in functions:
        if function.iommu_group is not None:
            groups.setdefault(function.iommu_group, []).append(function.address)
    held = {f.iommu_group for f in functions if f.driver and "vfio" in f.driver and f.iommu_group is not None}
    known: dict[str, Any] = {
        "functions": {f.address: f for f in functions},
        "groups": {n: IommuGroup(number=n, members=tuple(members)) for n, members in groups.items()},
        "group_nodes": frozenset(held),
    }
    return HostFacts(**(known | changes))
