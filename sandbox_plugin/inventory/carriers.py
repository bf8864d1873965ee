"""Which functions carry others under their own driver: to bind those to vfio-pci would take away what they carry."""

from __future__ import annotations

from sandbox_plugin.model import HostFacts


def what_they_carry(facts: HostFacts) -> dict[str, str]:
    """PCI address of each function that carries SR-IOV virtual functions or mediated devices -> which, in words.

    A mediated device lies in the folder of the function that carries it: that is the last one above it. The words do
    not say how many: vGPUs come and go with their VMs, and that is no news about what carries them.
    """
    functions = facts.functions.values()
    with_parts = {f.physical_function for f in functions if f.physical_function is not None}
    with_vgpus = {above for f in functions if f.mdev_type is not None for above in f.bridges[-1:]}
    kinds = {"SR-IOV virtual functions": with_parts, "mediated devices (vGPUs)": with_vgpus}
    carried = {}
    for address in (with_parts | with_vgpus) & facts.functions.keys():
        if found := [words for words, carriers in kinds.items() if address in carriers]:
            carried[address] = " and ".join(found)
    return carried
