"""The PCI part of a fake kernel: functions on their bus, in IOMMU groups, with drivers.

Apart from `node`, which decides what happens and in what order; here is how a tree shows each single step, and how
it is read back. Names and formats are those of Linux 6.12.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from sandbox_plugin.fake.hardware import FunctionSpec, PcieLink
from sandbox_plugin.fake.tree import (
    create_file,
    create_link,
    is_plain_file,
    link_target,
    listed,
    replace_file,
    text_of,
)
from sandbox_plugin.model import ROM, Bar

OFF_THE_BUS = PcieLink(speed="Unknown", width=63)
"""What the link attributes of a device say that no longer answers: all bits of its registers read as 1."""
PCI_BRIDGE = 0x0604
"""Base class and subclass."""

_IO, _MEM_64 = 0x100, 0x100000
"""IORESOURCE_IO and IORESOURCE_MEM_64 of the kernel's include/linux/ioport.h."""
_LINES = 13
"""Lines of `resource`: 0 to 5 BARs, 6 ROM, 7 to 12 BARs of virtual functions."""


@dataclass(frozen=True, slots=True)
class Pci:
    """The bus in the tree below `root`. A function's folder is always the real one below sys/devices."""

    root: str
    first_group: int
    """As in `Kernel`."""
    spare: str
    """A path for files that are not yet in place."""

    @property
    def devices(self) -> str:
        return f"{self.root}/sys/devices"

    @property
    def bus(self) -> str:
        return f"{self.root}/sys/bus/pci"

    @property
    def _groups(self) -> str:
        return f"{self.root}/sys/kernel/iommu_groups"

    # Reading

    def addresses(self) -> list[str]:
        return listed(f"{self.bus}/devices")

    def folder(self, address: str) -> str | None:
        """None if there is no such function."""
        return link_target(f"{self.bus}/devices/{address}") if address and "/" not in address else None

    def members(self, folder: str) -> dict[str, str]:
        """Address and folder of every function in a function's IOMMU group, itself too."""
        devices = f"{self._groups}/{group_of(folder)}/devices"
        return {address: link_target(f"{devices}/{address}") or "" for address in listed(devices)}

    def slot(self, folder: str) -> list[str]:
        """Folders of all functions in the slot of a function, and of all below them."""
        above, address = os.path.split(folder)
        in_slot = [f"{above}/{name}" for name in addresses_in(above) if name[:-1] == address[:-1]]
        return [found for function in in_slot for found in _tree(function)]

    # Functions

    def create(self) -> None:
        """An empty bus."""
        for folder in (f"{self.bus}/devices", f"{self.bus}/drivers", self._groups, self.devices):
            os.makedirs(folder)

    def create_function(self, spec: FunctionSpec, parent: str) -> str:
        """The folder of a function that nothing leads to yet."""
        folder = f"{parent}/{spec.address}"
        os.makedirs(f"{folder}/power")
        for name, text in _attributes(spec).items():
            create_file(f"{folder}/{name}", f"{text}\n")
        return folder

    def appear(self, folder: str, iommu_group: int | None) -> None:
        """The function gets known: to the bus first, then to the IOMMU, in the lowest free group if none is given."""
        address = os.path.basename(folder)
        create_link(f"{self.bus}/devices/{address}", folder)
        if iommu_group is None:
            taken = set(listed(self._groups))
            iommu_group = next(number for number in count(self.first_group) if str(number) not in taken)
        group = f"{self._groups}/{iommu_group}"
        if not os.path.isdir(group):
            os.makedirs(f"{group}/devices")
            create_file(f"{group}/reserved_regions", "0x00000000fee00000 0x00000000feefffff msi\n")
        create_link(f"{folder}/iommu_group", group)
        create_link(f"{group}/devices/{address}", folder)

    def disappear(self, folder: str) -> None:
        """The reverse: the folder is left, and nothing leads to it."""
        address = os.path.basename(folder)
        os.unlink(f"{self.bus}/devices/{address}")
        group = f"{self._groups}/{group_of(folder)}"
        os.unlink(f"{folder}/iommu_group")
        os.unlink(f"{group}/devices/{address}")
        if not listed(f"{group}/devices"):
            shutil.rmtree(group)

    # Drivers and attributes

    def add_driver(self, driver: str) -> None:
        """What loading a driver makes appear, if it is not loaded."""
        os.makedirs(f"{self.bus}/drivers/{driver}", exist_ok=True)

    def link_driver(self, folder: str, driver: str) -> None:
        """The two links of driver_sysfs_add in drivers/base/dd.c, in its order."""
        create_link(f"{self.bus}/drivers/{driver}/{os.path.basename(folder)}", folder)
        create_link(f"{folder}/driver", f"{self.bus}/drivers/{driver}")

    def unlink_driver(self, folder: str, driver: str) -> None:
        os.unlink(f"{self.bus}/drivers/{driver}/{os.path.basename(folder)}")
        os.unlink(f"{folder}/driver")

    def write(self, folder: str, name: str, text: str) -> None:
        """New content for an attribute, at once; what a test has put in place of a file (a FIFO) is left alone."""
        path = f"{folder}/{name}"
        if is_plain_file(path) and text_of(path) != text:
            replace_file(path, f"{text}\n", self.spare)

    def sleep(self, folder: str) -> None:
        """Runtime suspend, as vfio-pci does to a function that nobody uses (without disable_idle_d3)."""
        self.write(folder, "power/runtime_status", "suspended")
        self.write(folder, "power_state", "D3hot")

    def wake(self, folder: str) -> None:
        self.write(folder, "power_state", "D0")
        self.write(folder, "power/runtime_status", "active")


def driver_of(folder: str) -> str | None:
    target = link_target(f"{folder}/driver")
    return None if target is None else os.path.basename(target)


def group_of(folder: str) -> int | None:
    target = link_target(f"{folder}/iommu_group")
    return None if target is None else int(os.path.basename(target))


def number_in(path: str, base: int = 16) -> int:
    """The number that a file says; 0 if it says none, as a tree that a test has broken may."""
    try:
        return int(text_of(path) or "0", base)
    except ValueError:
        return 0


def addresses_in(folder: str) -> list[str]:
    """PCI functions right below a bridge or host bridge."""
    return [name for name in listed(folder) if name.count(":") == 2 and name[-2:-1] == "."]


def _tree(folder: str) -> Iterator[str]:
    yield folder
    for name in addresses_in(folder):
        yield from _tree(f"{folder}/{name}")


def _attributes(spec: FunctionSpec) -> dict[str, str]:
    """What somebody reads in the folder of a function that no driver is bound to, without the newlines at the ends."""
    model = spec.model
    attributes = {
        "vendor": f"0x{model.vendor:04x}",
        "device": f"0x{model.device:04x}",
        "class": f"0x{model.class_code:06x}",
        "revision": f"0x{model.revision:02x}",
        "subsystem_vendor": f"0x{model.subsystem[0]:04x}",
        "subsystem_device": f"0x{model.subsystem[1]:04x}",
        "numa_node": str(spec.numa_node),
        "resource": _resource(model.bars),
        "enable": "0",
        "driver_override": "(null)",
        "power_state": "D0",
        "power/runtime_status": "active",
    }
    if link := spec.link or model.link:
        best = model.link or link
        attributes |= {"current_link_speed": link.speed, "current_link_width": str(link.width)}
        attributes |= {"max_link_speed": best.speed, "max_link_width": str(best.width)}
        if model.class_code >> 8 != PCI_BRIDGE:
            attributes |= {
                "reset": "",
                "reset_method": "flr bus",
                "aer_dev_fatal": "Undefined 0\nDLP 0\nTOTAL_ERR_FATAL 0",
                "aer_dev_nonfatal": "Undefined 0\nDLP 0\nTOTAL_ERR_NONFATAL 0",
                "aer_dev_correctable": "RxErr 0\nBadTLP 0\nTOTAL_ERR_COR 0",
            }
    return attributes


def _resource(bars: Sequence[Bar]) -> str:
    """A line for each region, aligned to its own size, in a machine where this function is the only one."""
    free = {_IO: 0x3000, 0: 0x9000_0000, _MEM_64: 0x2000_0000_0000}
    lines = [f"0x{0:016x} 0x{0:016x} 0x{0:016x}"] * _LINES
    for bar in bars:
        flags = _flags(bar)
        space = flags & (_IO | _MEM_64)
        start = -(-free[space] // bar.size) * bar.size
        free[space] = start + bar.size
        lines[bar.index] = f"0x{start:016x} 0x{start + bar.size - 1:016x} 0x{flags:016x}"
    return "\n".join(lines)


def _flags(bar: Bar) -> int:
    """IORESOURCE_* of the kernel's include/linux/ioport.h, with the low bits of the register itself."""
    if bar.io:
        return 0x40101
    if bar.index == ROM:
        return 0x46200
    return 0x40200 | (0x2008 if bar.prefetchable else 0) | (_MEM_64 | 0x4 if bar.wide else 0)
