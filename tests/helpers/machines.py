"""Machines with any number of GPUs, for tests and benchmarks of size."""

from __future__ import annotations

from sandbox_plugin.fake import models
from sandbox_plugin.fake.hardware import At, Kernel, Preset, RootBus

_PORTS = 8
"""GPUs below one host bridge."""
_BUSES = 240
"""Buses of one PCI domain that are used: there are 256."""


def machine(gpus: int) -> Preset:
    """`gpus` H100s on vfio-pci, each behind a root port in an IOMMU group of its own, on a kernel with VFIO cdevs.

    Half of them are on each of two NUMA nodes. More than some 200 need several PCI domains.
    """
    buses = []
    for first in range(0, gpus, _PORTS):
        domain, bus = divmod(first // _PORTS * (_PORTS + 1), _BUSES // (_PORTS + 1) * (_PORTS + 1))
        ports = tuple(
            At(f"{bus:02x}:{port:02x}.0", models.GENOA_ROOT_PORT, (
                At(f"{bus + 1 + port:02x}:00.0", models.H100_SXM5, vfio="vfio-pci"),
            ))
            for port in range(min(_PORTS, gpus - first))
        )  # fmt: skip
        name = f"pci{domain:04x}:{bus:02x}"
        buses.append(RootBus(name=name, numa_node=int(first >= gpus / 2), functions=ports))
    return Preset(summary=f"{gpus} H100", kernel=Kernel(cdevs=True), buses=tuple(buses))
