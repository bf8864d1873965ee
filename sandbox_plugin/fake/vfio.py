"""The vfio part of a fake kernel: what appears for a function that a vfio driver takes, and what goes with it.

Apart from `node`, because this is a subsystem of its own in the kernel too: groups and cdevs with numbers that it
hands out, lowest free first (ida_alloc), and their nodes in /dev.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sandbox_plugin.fake.attributes import power_attributes
from sandbox_plugin.fake.files import (
    create_file,
    create_link,
    listed,
    remove_if_empty,
    remove_if_there,
    replace_file,
    text_of,
)
from sandbox_plugin.fake.hardware import Kernel

_OTHER_MAJORS = ((1, "mem"), (4, "tty"), (5, "/dev/tty"), (10, "misc"), (29, "fb"), (226, "drm"))
_BLOCK_MAJORS = ((8, "sd"), (259, "blkext"))


def is_vfio_driver(driver: str | None) -> bool:
    """vfio-pci and its variants: nvgrace_gpu_vfio_pci, mlx5_vfio_pci, ..."""
    return driver is not None and "vfio" in driver


@dataclass(frozen=True, slots=True)
class Vfio:
    """The subsystem in the tree below `root`."""

    root: str
    kernel: Kernel
    spare: str
    """A path for files that are not yet in place."""

    @property
    def loaded(self) -> bool:
        return os.path.isdir(f"{self.root}/sys/class/vfio")

    def load(self) -> None:
        """What modprobe vfio makes appear."""
        os.makedirs(f"{self.root}/sys/class/vfio")
        os.makedirs(f"{self.root}/sys/class/vfio-dev")
        self.write_majors(loaded=True)
        os.makedirs(f"{self.root}/dev/vfio", exist_ok=True)
        create_file(f"{self.root}/dev/vfio/vfio", "", 0o666)
        if self.kernel.cdevs:
            create_file(f"{self.root}/dev/iommu", "", 0o600)

    def write_majors(self, *, loaded: bool) -> None:
        """/proc/devices: `vfio` for groups (drivers/vfio/group.c), `vfio-dev` for cdevs where there are any."""
        majors = list(_OTHER_MAJORS)
        if loaded:
            majors.append((self.kernel.group_major, "vfio"))
            if self.kernel.cdevs:
                majors.append((self.kernel.cdev_major, "vfio-dev"))
        lines = ["Character devices:", *(f"{major:3} {name}" for major, name in sorted(majors))]
        lines += ["", "Block devices:", *(f"{major:3} {name}" for major, name in _BLOCK_MAJORS)]
        os.makedirs(f"{self.root}/proc", exist_ok=True)
        replace_file(f"{self.root}/proc/devices", "".join(f"{line}\n" for line in lines), self.spare)

    def register(self, folder: str, group: int, held: set[int]) -> None:
        """A vfio driver has a function: first its group, if it is the group's first, then the function itself.

        `held` are the vfioN numbers that are still in use although the tree no longer shows them.
        """
        if not os.path.isdir(self._group_folder(group)):
            self._add_group(group)
        number = _lowest_free({int(name.removeprefix("vfio")) for name in listed(self._cdev_class)} | held)
        self._add_device(folder, number)

    def remove_device(self, folder: str) -> int | None:
        """The function's own part goes: the cdev's node first, its folder last. Returns its number."""
        names = listed(f"{folder}/vfio-dev")
        if not names:
            return None
        device = f"{folder}/vfio-dev/{names[0]}"
        remove_if_there(f"{self.root}/dev/vfio/devices/{names[0]}")
        remove_if_empty(f"{self.root}/dev/vfio/devices")
        remove_if_there(f"{device}/dev")
        os.unlink(f"{self._cdev_class}/{names[0]}")
        _remove_device_folder(device)
        os.rmdir(f"{folder}/vfio-dev")
        return int(names[0].removeprefix("vfio"))

    def remove_group(self, group: int) -> None:
        """The last function of a group is gone from vfio: so is the group's node."""
        folder = self._group_folder(group)
        remove_if_there(f"{self.root}/dev/vfio/{group}")
        remove_if_there(f"{folder}/dev")
        os.unlink(f"{self.root}/sys/class/vfio/{group}")
        _remove_device_folder(folder)
        remove_if_empty(f"{self.root}/sys/devices/virtual/vfio")

    @property
    def _cdev_class(self) -> str:
        return f"{self.root}/sys/class/vfio-dev"

    def _group_folder(self, group: int) -> str:
        return f"{self.root}/sys/devices/virtual/vfio/{group}"

    def _add_group(self, group: int) -> None:
        folders = f"{self.root}/sys/devices/virtual/vfio"
        minors = {int((text_of(f"{folders}/{name}/dev") or "0:0").partition(":")[2]) for name in listed(folders)}
        numbers = (self.kernel.group_major, _lowest_free(minors))
        folder = self._group_folder(group)
        _add_device_folder(folder, f"{self.root}/sys/class/vfio", numbers, f"vfio/{group}")
        create_link(f"{self.root}/sys/class/vfio/{group}", folder)
        create_file(f"{folder}/dev", f"{numbers[0]}:{numbers[1]}\n")
        create_file(f"{self.root}/dev/vfio/{group}", "", 0o600)

    def _add_device(self, function: str, number: int) -> None:
        name = f"vfio{number}"
        folder = f"{function}/vfio-dev/{name}"
        numbers = (self.kernel.cdev_major, number) if self.kernel.cdevs else None
        _add_device_folder(folder, self._cdev_class, numbers, f"vfio/devices/{name}")
        create_link(f"{folder}/device", function)
        create_link(f"{self._cdev_class}/{name}", folder)
        if numbers:
            create_file(f"{folder}/dev", f"{numbers[0]}:{numbers[1]}\n")
            os.makedirs(f"{self.root}/dev/vfio/devices", exist_ok=True)
            create_file(f"{self.root}/dev/vfio/devices/{name}", "", 0o600)


def _lowest_free(taken: set[int]) -> int:
    return next(number for number in range(len(taken) + 1) if number not in taken)


def _add_device_folder(folder: str, device_class: str, numbers: tuple[int, int] | None, node: str) -> None:
    """The folder of a device of some class, still without `dev`, as device_add in drivers/base/core.c begins it."""
    os.makedirs(f"{folder}/power")
    uevent = f"MAJOR={numbers[0]}\nMINOR={numbers[1]}\nDEVNAME={node}\n" if numbers else ""
    create_file(f"{folder}/uevent", uevent, 0o644)
    create_link(f"{folder}/subsystem", device_class)
    for name, attribute in power_attributes().items():
        create_file(f"{folder}/{name}", attribute.content, attribute.mode)


def _remove_device_folder(folder: str) -> None:
    for name in listed(f"{folder}/power"):
        os.unlink(f"{folder}/power/{name}")
    os.rmdir(f"{folder}/power")
    for name in listed(folder):
        os.unlink(f"{folder}/{name}")
    os.rmdir(folder)
