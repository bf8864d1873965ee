"""Devices in their place, without a host: one line a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sandbox_plugin.model import HEALTHY, Device, Health, Objection, PciFunction, Placement, Reason

DEAD = Health(reason=Reason.GONE, detail="taken out for a test")


async def nothing_against(devices: Sequence[Device], functions: Mapping[str, PciFunction]) -> Mapping[str, Objection]:
    """The `last_look` of an endpoint whose devices are all well."""
    return {}


def function(address: str, *bridges: str, numa: int | None = None) -> Placement:
    """A PCI function below `bridges`: the host bridge, then the addresses of root port, upstream port and so on."""
    return Placement(address=address, numa_node=numa, bridges=bridges)


def device(device_id: str, *functions: Placement, group: int | None = None) -> Device:
    """A healthy device. Without a group it is alone in its own; see `with_mates` for those that are not."""
    return Device(
        id=device_id,
        resource="nvidia.com/pgpu",
        node=f"/dev/vfio/devices/vfio{device_id}",
        model="GPU",
        placements=functions,
        iommu_group=1000 + int(device_id) if group is None else group,
        health=HEALTHY,
    )


def with_mates(*devices: Device) -> dict[str, Device]:
    """The devices by ID, each knowing the others of its IOMMU group."""
    return {
        d.id: d._replace(mates=tuple(m.id for m in devices if m.iommu_group == d.iommu_group and m.id != d.id))
        for d in devices
    }


def on_switch(device_id: str, *, numa: int | None, host: str, switch: str, group: int | None = None) -> Device:
    """A GPU alone below a port of its own of a switch, which hangs on a root port of its own."""
    bridges = (f"pci0000:{host}", f"0000:{host}:{switch}.0", f"0000:{switch}:00.0", f"0000:{switch}:{device_id}.0")
    return device(device_id, function(f"0000:{device_id}:00.0", *bridges, numa=numa), group=group)


def eight_over_two_sockets() -> dict[str, Device]:
    """Four pairs, each on a switch and host bridge of its own, two pairs on each socket: IDs 0 to 7 in this order."""
    return with_mates(
        *(on_switch(str(i), numa=i // 4, host=f"{i // 2}0", switch=f"{i // 2}1") for i in range(8)),
    )
