"""What one PCI function is at the moment, as far as its own attributes do not say it."""

from __future__ import annotations

from sandbox_plugin.model import D3COLD, HostFacts, PciFunction


def is_vfio_bound(function: PciFunction, facts: HostFacts) -> bool:
    """Bound to vfio-pci or any variant driver, whatever its name. Before Linux 6.1 its group's node is there then."""
    if function.driver is None:
        return False
    return function.vfio is not None or (function.is_held_by_vfio and function.iommu_group in facts.group_nodes)


def may_be_dead(function: PciFunction) -> bool:
    """Whether it does not answer, or is in D3cold although nothing can have cut its power.

    The latter passes for a moment when the bridge above has just been woken: the kernel resumes what is below after it
    (pci_pm_bridge_power_up_actions in drivers/pci/pci-driver.c).
    """
    return function.silence is not None or (function.power_state == D3COLD and function.has_power is True)


def what_they_carry(facts: HostFacts) -> dict[str, str]:
    """PCI address of each function that carries SR-IOV virtual functions or mediated devices -> which, in words.

    To bind such a function to vfio-pci would take away what it carries. A mediated device lies in the folder of the
    function that carries it: that is the last one above it. The words do not say how many: vGPUs come and go with their
    VMs, and that is no news about what carries them.
    """
    functions = facts.functions.values()
    with_parts = {f.physical_function for f in functions if f.physical_function is not None}
    with_vgpus = {above for f in functions if f.mdev_type is not None for above in f.bridges[-1:]}
    carried: dict[str, str] = {}
    for carriers, words in ((with_parts, "SR-IOV virtual functions"), (with_vgpus, "mediated devices (vGPUs)")):
        for address in carriers:
            carried[address] = f"{carried[address]} and {words}" if address in carried else words
    return carried
