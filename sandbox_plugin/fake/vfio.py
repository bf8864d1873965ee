"""The vfio part of a fake kernel: what appears for a function that a vfio driver takes, and what goes with it.

Apart from `node`, because this is a subsystem of its own in the kernel too: groups and cdevs, with numbers for these
that it hands out, lowest free first (ida_alloc), and their nodes in /dev.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass

from sandbox_plugin.fake.hardware import Kernel
from sandbox_plugin.fake.tree import create_file, create_link, listed, remove_if_there, replace_file

_GROUP_MAJOR, _CDEV_MAJOR = 254, 253
"""Device majors of /dev/vfio/GROUP and of /dev/vfio/devices/vfioN."""


@dataclass(frozen=True, slots=True)
class Vfio:
    """The subsystem in the tree below `root`."""

    root: str
    kernel: Kernel
    spare: str
    """A path for files that are not yet in place."""

    @property
    def is_loaded(self) -> bool:
        return os.path.isdir(self._class("vfio"))

    def load(self) -> None:
        """What modprobe vfio makes appear."""
        os.makedirs(self._class("vfio"))
        os.makedirs(self._class("vfio-dev"))
        self.write_majors(loaded=True)
        os.makedirs(f"{self.root}/dev/vfio")
        create_file(f"{self.root}/dev/vfio/vfio", "")
        if self.kernel.cdevs:
            create_file(f"{self.root}/dev/iommu", "")

    def write_majors(self, *, loaded: bool) -> None:
        """/proc/devices: `vfio` for groups (drivers/vfio/group.c), `vfio-dev` for cdevs where there are any."""
        lines = ["Character devices:", "  1 mem", " 10 misc"]
        if loaded and self.kernel.cdevs:
            lines.append(f"{_CDEV_MAJOR:3} vfio-dev")
        if loaded:
            lines.append(f"{_GROUP_MAJOR:3} vfio")
        os.makedirs(f"{self.root}/proc", exist_ok=True)
        replace_file(f"{self.root}/proc/devices", "\n".join([*lines, "", "Block devices:", "  8 sd", ""]), self.spare)

    def register(self, folder: str, group: int, held: set[int]) -> None:
        """A vfio driver has a function: first its group, if it is the group's first, then the function itself.

        `held` are the vfioN numbers that are still in use although the tree no longer shows them.
        """
        if not os.path.lexists(f"{self._class('vfio')}/{group}"):
            os.makedirs(self._group_folder(group))
            create_link(f"{self._class('vfio')}/{group}", self._group_folder(group))
            create_file(f"{self.root}/dev/vfio/{group}", "")
        taken = {int(name.removeprefix("vfio")) for name in listed(self._class("vfio-dev"))} | held
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        device = f"{folder}/vfio-dev/vfio{number}"
        os.makedirs(device)
        create_link(f"{self._class('vfio-dev')}/vfio{number}", device)
        if self.kernel.cdevs:
            create_file(f"{device}/dev", f"{_CDEV_MAJOR}:{number}\n")
            os.makedirs(f"{self.root}/dev/vfio/devices", exist_ok=True)
            create_file(f"{self.root}/dev/vfio/devices/vfio{number}", "")

    def remove_device(self, folder: str) -> int | None:
        """The function's own part goes: the cdev's node first, its folder last. Returns its number."""
        for name in listed(f"{folder}/vfio-dev"):
            remove_if_there(f"{self.root}/dev/vfio/devices/{name}")
            with suppress(OSError):  # the folder goes with the last of them
                os.rmdir(f"{self.root}/dev/vfio/devices")
            remove_if_there(f"{folder}/vfio-dev/{name}/dev")
            os.unlink(f"{self._class('vfio-dev')}/{name}")
            shutil.rmtree(f"{folder}/vfio-dev")
            return int(name.removeprefix("vfio"))
        return None

    def remove_group(self, group: int) -> None:
        """The last function of a group is gone from vfio: so is the group's node."""
        remove_if_there(f"{self.root}/dev/vfio/{group}")
        os.unlink(f"{self._class('vfio')}/{group}")
        os.rmdir(self._group_folder(group))

    def _class(self, name: str) -> str:
        return f"{self.root}/sys/class/{name}"

    def _group_folder(self, group: int) -> str:
        return f"{self.root}/sys/devices/virtual/vfio/{group}"
