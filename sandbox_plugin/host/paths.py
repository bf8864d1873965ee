"""Where things are on a host, below one root."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class HostPaths:
    """The folders of a host that are read. `root` is `/`, or the top of a fake tree with `sys` and `dev` in it.

    Each is made once: a scan asks for them hundreds of times.
    """

    root: Path

    @cached_property
    def pci_devices(self) -> Path:
        return self.root / "sys/bus/pci/devices"

    @cached_property
    def mdev_devices(self) -> Path:
        return self.root / "sys/bus/mdev/devices"

    @cached_property
    def pci_drivers(self) -> Path:
        return self.root / "sys/bus/pci/drivers"

    @cached_property
    def iommu_groups(self) -> Path:
        return self.root / "sys/kernel/iommu_groups"

    @cached_property
    def vfio_class(self) -> Path:
        return self.root / "sys/class/vfio"

    @cached_property
    def vfio_dev_class(self) -> Path:
        return self.root / "sys/class/vfio-dev"

    @cached_property
    def dev(self) -> Path:
        return self.root / "dev"

    @cached_property
    def dev_vfio(self) -> Path:
        return self.root / "dev/vfio"

    @cached_property
    def devices_list(self) -> Path:
        """`/proc/devices`: the character device majors the kernel has handed out; not namespaced."""
        return self.root / "proc/devices"

    @cached_property
    def mountinfo(self) -> Path:
        return self.root / "proc/self/mountinfo"
