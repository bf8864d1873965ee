"""Where things are on a host, below one root."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HostPaths:
    """The folders of a host that are read. `root` is `/`, or the top of a fake tree with `sys` and `dev` in it."""

    root: Path

    @property
    def pci_devices(self) -> Path:
        return self.root / "sys/bus/pci/devices"

    @property
    def mdev_devices(self) -> Path:
        return self.root / "sys/bus/mdev/devices"

    @property
    def pci_drivers(self) -> Path:
        return self.root / "sys/bus/pci/drivers"

    @property
    def iommu_groups(self) -> Path:
        return self.root / "sys/kernel/iommu_groups"

    @property
    def vfio_class(self) -> Path:
        return self.root / "sys/class/vfio"

    @property
    def dev(self) -> Path:
        return self.root / "dev"

    @property
    def dev_vfio(self) -> Path:
        return self.root / "dev/vfio"

    @property
    def devices_list(self) -> Path:
        """`/proc/devices`: the character device majors the kernel has handed out; not namespaced."""
        return self.root / "proc/devices"

    @property
    def mountinfo(self) -> Path:
        return self.root / "proc/self/mountinfo"
