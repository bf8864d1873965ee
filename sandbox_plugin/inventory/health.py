"""Whether a device could be given to a VM now, judged from one set of host facts, with the reason in words.

Each check is a pure function of the facts; `assess` asks them in the order in which an administrator wants to know.
What needs memory (damping, who holds what, AER recoveries) is in `tracking` and `advance`.
"""

from __future__ import annotations

from collections.abc import Sequence

from sandbox_plugin.model import D3COLD, HEALTHY, ROM, Device, Health, HostFacts, PciFunction, Reason, is_vfio_driver

_BRIDGE_CLASSES = (0x0600, 0x0604)
"""Host bridge and PCI-to-PCI bridge."""
_DISPLAY = 0x03
"""Base class of GPUs."""


def is_bridge(function: PciFunction) -> bool:
    """Whether it only leads to other functions: no consumer passes it to a VM with its group."""
    return function.class_code >> 8 in _BRIDGE_CLASSES


def is_vfio_bound(function: PciFunction, facts: HostFacts) -> bool:
    """Bound to vfio-pci or any variant driver, whatever its name.

    `vfio-dev` is there from Linux 6.1; before, the group has a node and the driver's name says vfio. Of an unbind the
    driver's link is the first to go (__device_release_driver in drivers/base/dd.c), and of one that waits for a VM it
    is all that goes.
    """
    if function.driver is None:
        return False
    return function.vfio is not None or (is_vfio_driver(function.driver) and function.iommu_group in facts.group_nodes)


def is_left_enabled(function: PciFunction) -> bool:
    """Whether it is enabled without a driver: by a VM that had it when it was unbound, or by a careless host driver.

    Bridges are enabled for what is below them.
    """
    return function.driver is None and function.enable == 1 and not is_bridge(function)


def assess(device: Device, facts: HostFacts, *, require_iommufd: bool = False) -> Health:
    """The verdict on a device that the facts show as bound. `require_iommufd`: only cdevs will do."""
    functions = [facts.functions[p.address] for p in device.placements]
    for verdict in (
        _has_needed_node(device, require_iommufd),
        _on_the_bus(functions),
        _has_addresses(functions),
        _without_firmware_mappings(device, facts),
        _viable(device, facts),
        _node_is_there(device, facts),
    ):
        if not verdict.healthy:
            return verdict
    return HEALTHY


def _has_needed_node(device: Device, require_iommufd: bool) -> Health:
    if not require_iommufd or device.is_cdev:
        return HEALTHY
    detail = f"confidential guests need an iommufd cdev, and this kernel has only the group node {device.node}"
    return Health(reason=Reason.NO_CDEV, detail=detail)


def may_be_dead(function: PciFunction) -> bool:
    """Whether it does not answer, or is in D3cold although nothing can have cut its power.

    The latter passes for a moment when the bridge above has just been woken: the kernel resumes what is below after it
    (pci_pm_bridge_power_up_actions in drivers/pci/pci-driver.c).
    """
    return function.silence is not None or (function.power_state == D3COLD and function.has_power is True)


def _on_the_bus(functions: Sequence[PciFunction]) -> Health:
    for function in functions:
        if why := function.silence:
            return Health(
                reason=Reason.OFF_THE_BUS, detail=f"{function.address} does not answer on the PCI bus ({why})"
            )
    return HEALTHY


def _has_addresses(functions: Sequence[PciFunction]) -> Health:
    for function in functions:
        if unset := [f"BAR {bar.index}" for bar in function.bars if bar.unset]:
            return Health(
                reason=Reason.NO_ADDRESS,
                detail=f"{function.address} has no address for {', '.join(unset)}: the kernel cannot enable it",
            )
    return HEALTHY


def remarks(function: PciFunction) -> list[str]:
    """What is odd about a GPU or another function to offer, although it can be given to a VM."""
    found = []
    whole_gpu = function.class_code >> 16 == _DISPLAY and function.physical_function is None
    if whole_gpu and [bar.index for bar in function.bars if not bar.io and bar.index != ROM] == [0]:
        found.append("of its BARs only BAR 0 is left: there was no room for the others")
    if function.reset_methods == ():
        found.append("the kernel cannot reset it alone: the next VM may find what the last one left")
    return found


def _without_firmware_mappings(device: Device, facts: HostFacts) -> Health:
    """A VM's memory cannot be where the firmware wants its own, so the kernel refuses the group to every VM.

    From Linux 6.6 by __iommu_device_set_domain in drivers/iommu/iommu.c. Before, Intel's IOMMU does it
    (intel_iommu_attach_device), and with any other vfio lets no VM map its memory there (vfio_iommu_resv_exclude in
    drivers/vfio/vfio_iommu_type1.c).
    """
    mappings = facts.groups[device.iommu_group].firmware_mappings
    if not mappings:
        return HEALTHY
    what = f"the firmware wants memory mapped in IOMMU group {device.iommu_group} at all times ({', '.join(mappings)})"
    return Health(reason=Reason.FIRMWARE_MAPPING, detail=f"{what}, so the kernel gives this group to no VM")


def _viable(device: Device, facts: HostFacts) -> Health:
    """A group is viable while no host driver holds any of its functions (vfio_dev_viable in drivers/vfio/group.c)."""
    for address in facts.groups[device.iommu_group].members:
        member = facts.functions.get(address)
        if member is None:
            if address in facts.unreadable:
                where = f"{address} in its IOMMU group {device.iommu_group}"
                return Health(reason=Reason.NOT_VIABLE, detail=f"{where} cannot be read: {facts.unreadable[address]}")
            continue  # it came or went while the scan ran: the event of that has already asked for the next scan
        if not _leaves_group_viable(member):
            return Health(
                reason=Reason.NOT_VIABLE,
                detail=f"{address} in its IOMMU group {device.iommu_group} is bound to {member.driver}",
            )
    return HEALTHY


def _leaves_group_viable(member: PciFunction) -> bool:
    if member.driver in (None, "pci-stub") or member.vfio is not None or is_vfio_driver(member.driver):
        return True
    return member.driver == "pcieport" and is_bridge(member)


def _node_is_there(device: Device, facts: HostFacts) -> Health:
    if facts.dev_nodes is not None and device.node not in facts.dev_nodes:
        return Health(reason=Reason.NO_NODE, detail=f"{device.node} is not in the host's /dev")
    if not device.node_exists:
        return Health(reason=Reason.NO_NODE, detail=f"sysfs shows no node {device.node}")
    return HEALTHY
