"""Where things are on a host, below one root."""

from __future__ import annotations

from pathlib import Path


class HostPaths:
    """The folders and files of a host that are read. `root` is `/`, or the top of a fake tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pci_devices = root / "sys/bus/pci/devices"
        self.mdev_devices = root / "sys/bus/mdev/devices"
        self.pci_drivers = root / "sys/bus/pci/drivers"
        self.iommu_groups = root / "sys/kernel/iommu_groups"
        self.vfio_class = root / "sys/class/vfio"
        self.vfio_dev_class = root / "sys/class/vfio-dev"
        self.egm_class = root / "sys/class/egm"
        self.dev = root / "dev"
        self.dev_vfio = root / "dev/vfio"
        self.devices_list = root / "proc/devices"
        """The majors of character devices that the kernel has handed out; not namespaced."""
        self.mountinfo = root / "proc/self/mountinfo"


def boot_id(root: Path) -> str:
    """Which boot of the host below `root` this is, the same in every container; empty where the kernel does not say."""
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
