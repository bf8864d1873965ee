"""What speaks against giving a device to a VM, judged from one set of host facts, in words.

`assess` is for a device that is there, `why_lost` for one that was there before. What only memory tells (errors of the
past, who holds what) is not here; health.py puts all of it together.
"""

from __future__ import annotations

from collections.abc import Sequence

from sandbox_plugin.inventory.devices import has_vfs, why_no_vgpu
from sandbox_plugin.inventory.functions import is_vfio_bound
from sandbox_plugin.inventory.nodes import is_in_dev
from sandbox_plugin.model import ROM, Device, Fault, HostFacts, PciFunction, Reason, node_of_cdev

_DISPLAY = 0x03
"""Base class of GPUs."""
LOST_BARS = "of its BARs only BAR 0 is left: there was no room for the others"
NO_RESET = "the kernel cannot reset it alone: the next VM may find what the last one left"


def assess(device: Device, facts: HostFacts, *, require_iommufd: bool = False) -> Fault | None:
    """The first of these faults, in the order in which an administrator wants to know. None: nothing is against it.

    `require_iommufd`: only cdevs will do.
    """
    functions = [facts.functions[p.address] for p in device.placements]
    return (
        _no_cdev(device, require_iommufd)
        or _silent_card(functions, facts)
        or _off_the_bus(functions)
        or _no_address(functions)
        or _firmware_mapping(device, facts)
        or _not_viable(device, facts)
        or _no_node(device, facts)
    )


def _no_cdev(device: Device, require_iommufd: bool) -> Fault | None:
    if not require_iommufd or device.is_cdev:
        return None
    detail = f"confidential guests need an iommufd cdev, and this kernel has only the group node {device.node}"
    return Fault(reason=Reason.NO_CDEV, detail=detail)


def _silent_card(functions: Sequence[PciFunction], facts: HostFacts) -> Fault | None:
    """The vendor's driver opens a vGPU through its physical function: while that hangs, so may the open."""
    for function in functions:
        card = function.physical_function or ""
        if function.is_vendors_vgpu and card in facts.unreadable:
            detail = f"{card}, the physical function of {function.address}: {facts.unreadable[card]}"
            return Fault(reason=Reason.UNREADABLE, detail=detail)
    return None


def _off_the_bus(functions: Sequence[PciFunction]) -> Fault | None:
    for function in functions:
        if why := function.silence:
            detail = f"{function.address} does not answer on the PCI bus ({why})"
            return Fault(reason=Reason.OFF_THE_BUS, detail=detail)
    return None


def _no_address(functions: Sequence[PciFunction]) -> Fault | None:
    for function in functions:
        if unset := [f"BAR {bar.index}" for bar in function.bars if bar.unset]:
            detail = f"{function.address} has no address for {', '.join(unset)}: the kernel cannot enable it"
            return Fault(reason=Reason.NO_ADDRESS, detail=detail)
    return None


def _firmware_mapping(device: Device, facts: HostFacts) -> Fault | None:
    """A VM's memory cannot be where the firmware wants its own, so the kernel refuses the group to every VM.

    From Linux 6.6 by __iommu_device_set_domain in drivers/iommu/iommu.c. Before, Intel's IOMMU does it
    (intel_iommu_attach_device), and with any other vfio lets no VM map its memory there (vfio_iommu_resv_exclude in
    drivers/vfio/vfio_iommu_type1.c).
    """
    mappings = facts.groups[device.iommu_group].firmware_mappings
    if not mappings:
        return None
    what = f"the firmware wants memory mapped in IOMMU group {device.iommu_group} at all times ({', '.join(mappings)})"
    return Fault(reason=Reason.FIRMWARE_MAPPING, detail=f"{what}, so the kernel gives this group to no VM")


def _not_viable(device: Device, facts: HostFacts) -> Fault | None:
    """A group is viable while no host driver holds any of its functions (vfio_dev_viable in drivers/vfio/group.c).

    A member that is neither among the functions nor unreadable came or went while the scan ran: the event of that has
    already asked for the next scan.
    """
    for address in facts.groups[device.iommu_group].members:
        member, where = facts.functions.get(address), f"{address} in its IOMMU group {device.iommu_group}"
        if address in facts.unreadable:
            detail = f"{where} cannot be read: {facts.unreadable[address]}"
            return Fault(reason=Reason.NOT_VIABLE, detail=detail)
        if member is not None and not _leaves_group_viable(member):
            return Fault(reason=Reason.NOT_VIABLE, detail=f"{where} is bound to {member.driver}")
    return None


def _leaves_group_viable(member: PciFunction) -> bool:
    if member.driver in (None, "pci-stub") or member.is_held_by_vfio:
        return True
    return member.driver == "pcieport" and member.is_bridge


def _no_node(device: Device, facts: HostFacts) -> Fault | None:
    if device.node_exists:
        return None
    in_dev = is_in_dev(device.node, facts)
    detail = f"sysfs shows no node {device.node}" if in_dev else f"{device.node} is not in the host's /dev"
    return Fault(reason=Reason.NO_NODE, detail=detail)


def why_lost(device: Device, facts: HostFacts) -> Fault:
    """Why a device that was there before is not there any more, or does not show whether it is."""
    if facts.unreachable is not None:
        return Fault(reason=Reason.UNREADABLE, detail=f"the PCI bus cannot be read: {facts.unreachable}")
    for placement in device.placements:
        if why := facts.unreadable.get(placement.address):
            return Fault(reason=Reason.UNREADABLE, detail=f"{placement.address}: {why}")
    function = facts.functions.get(device.address)
    if function is None:
        where = "there" if device.mdev else "on the PCI bus"
        return Fault(reason=Reason.GONE, detail=f"{device.address} is not {where} any more")
    if is_vfio_bound(function, facts) and function.is_vendors_vgpu and _has_its_cdev(device, function):
        detail = (
            why_no_vgpu(function, facts) or f"is offered as another resource now: its vGPU type is {function.vgpu_type}"
        )
        return Fault(reason=Reason.NO_TYPE, detail=f"{device.address} {detail}")
    return Fault(reason=Reason.NOT_BOUND, detail=f"{device.address} {_why_not_bound(device, function, facts)}")


def _has_its_cdev(device: Device, function: PciFunction) -> bool:
    vfio = function.vfio
    return not device.is_cdev or (
        vfio is not None and vfio.cdev is not None and device.node == node_of_cdev(vfio.number)
    )


def _why_not_bound(device: Device, function: PciFunction, facts: HostFacts) -> str:
    if not is_vfio_bound(function, facts):
        return f"is bound to {function.driver}, not to a vfio driver" if function.driver else "is bound to no driver"
    if device.is_cdev:
        if function.vfio is not None and device.node != node_of_cdev(function.vfio.number):
            return f"was bound again and is now vfio{function.vfio.number}"
        if function.vfio is None or function.vfio.cdev is None:
            return "is still being bound: it has no VFIO cdev yet"
    return f"is no longer offered: it {has_vfs(function)}" if function.virtual_functions else "is no longer offered"


def remarks(function: PciFunction) -> list[str]:
    """What is odd about a GPU or another function to offer, although a VM can have it: `LOST_BARS`, `NO_RESET`."""
    found = []
    whole_gpu = function.class_code >> 16 == _DISPLAY and function.physical_function is None
    if whole_gpu and [bar.index for bar in function.bars if not bar.io and bar.index != ROM] == [0]:
        found.append(LOST_BARS)
    if function.reset_methods == ():
        found.append(NO_RESET)
    return found
