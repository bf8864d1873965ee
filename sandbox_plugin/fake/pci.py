"""The PCI part of a fake kernel: functions on their bus, in IOMMU groups, with drivers and device links.

Apart from `node`, which decides what happens and in what order; here is how a tree shows each single step, and how
it is read back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from sandbox_plugin.fake.attributes import AddressSpace, cpus_in, function_attributes, power_attributes
from sandbox_plugin.fake.files import (
    create_file,
    create_link,
    is_plain_file,
    link_target,
    listed,
    remove_if_there,
    replace_file,
    text_of,
)
from sandbox_plugin.fake.hardware import FunctionSpec, Kernel, NumaNode

_CONSUMER_CLASSES = (0x0403, 0x0C03, 0x0C80)
"""Audio, USB and USB-C functions in a GPU's slot, whose power hangs on the GPU's (quirk_gpu_hda and its like in
drivers/pci/quirks.c)."""


@dataclass(frozen=True, slots=True)
class Pci:
    """The bus in the tree below `root`. A function's folder is always the real one below sys/devices."""

    root: str
    kernel: Kernel
    spare: str
    """A path for files that are not yet in place."""

    # Reading

    @property
    def devices(self) -> str:
        return f"{self.root}/sys/devices"

    @property
    def bus(self) -> str:
        return f"{self.root}/sys/bus/pci"

    def addresses(self) -> list[str]:
        return listed(f"{self.bus}/devices")

    def folder(self, address: str) -> str | None:
        """None if there is no such function."""
        return link_target(f"{self.bus}/devices/{address}") if address and "/" not in address else None

    def members(self, folder: str) -> Iterator[tuple[str, str]]:
        """Address and folder of every function in a function's IOMMU group, itself too."""
        devices = f"{self._groups}/{group_of(folder)}/devices"
        for address in listed(devices):
            yield address, link_target(f"{devices}/{address}") or ""

    def slot(self, folder: str) -> list[str]:
        """Folders of all functions in the slot of a function, and of all below them."""
        above, address = os.path.split(folder)
        in_slot = [f"{above}/{name}" for name in addresses_in(above) if name[:-1] == address[:-1]]
        return [found for function in in_slot for found in _tree(function)]

    def address_space(self) -> AddressSpace:
        """What the functions that are there leave free."""
        space = AddressSpace()
        for address in self.addresses():
            space.skip(text_of(f"{self.folder(address)}/resource") or "")
        return space

    # Machine

    def create(self, nodes: tuple[NumaNode, ...]) -> None:
        """An empty bus, the NUMA nodes and the IOMMU."""
        iommu = f"{self.devices}/virtual/iommu/{self.kernel.iommu}"
        for folder in (f"{self.bus}/devices", f"{self.bus}/drivers", self._groups, self._class("iommu"), iommu):
            os.makedirs(folder)
        create_file(f"{self.bus}/drivers_autoprobe", "1\n", 0o644)
        create_file(f"{self.bus}/drivers_probe", "", 0o200)
        create_file(f"{self.bus}/rescan", "", 0o200)
        create_link(f"{self._class('iommu')}/{self.kernel.iommu}", iommu)
        folder = f"{self.devices}/system/node"
        os.makedirs(folder)
        every = ",".join(str(node.number) for node in nodes)
        with_cpus = ",".join(str(node.number) for node in nodes if node.cpulist)
        for name, text in (("online", every), ("possible", every), ("has_memory", every), ("has_cpu", with_cpus)):
            create_file(f"{folder}/{name}", f"{text}\n")
        for node in nodes:
            os.mkdir(f"{folder}/node{node.number}")
            create_file(f"{folder}/node{node.number}/cpulist", f"{node.cpulist}\n")
            distances = " ".join("10" if other is node else "21" for other in nodes)
            create_file(f"{folder}/node{node.number}/distance", f"{distances}\n")

    # Functions

    def create_function(self, spec: FunctionSpec, parent: str, space: AddressSpace) -> str:
        """The folder of a new function, which nothing leads to yet."""
        folder = f"{parent}/{spec.address}"
        os.makedirs(f"{folder}/power")
        nodes = f"{self.devices}/system/node"
        cpulists = {name: text_of(f"{nodes}/{name}/cpulist") or "" for name in listed(nodes) if name.startswith("node")}
        cpus = cpus_in(cpulists.values())
        near = cpulists.get(f"node{spec.numa_node}", f"0-{cpus - 1}")
        for name, attribute in function_attributes(spec, space, near, cpus).items():
            create_file(f"{folder}/{name}", attribute.content, attribute.mode)
        create_link(f"{folder}/subsystem", self.bus)
        create_link(f"{folder}/iommu", f"{self.devices}/virtual/iommu/{self.kernel.iommu}")
        return folder

    def appear(self, folder: str, iommu_group: int | None) -> None:
        """The function gets known: to the bus first, then to the IOMMU, to a group of its own if none is given."""
        address = os.path.basename(folder)
        create_link(f"{self.bus}/devices/{address}", folder)
        if iommu_group is None:
            taken = {int(name) for name in listed(self._groups)}
            first = self.kernel.first_group
            iommu_group = next(n for n in range(first, first + len(taken) + 1) if n not in taken)
        group = f"{self._groups}/{iommu_group}"
        if not os.path.isdir(group):
            os.makedirs(f"{group}/devices")
            create_file(f"{group}/reserved_regions", "0x00000000fee00000 0x00000000feefffff msi\n")
            create_file(f"{group}/type", "DMA-FQ\n", 0o644)
        create_link(f"{folder}/iommu_group", group)
        create_link(f"{group}/devices/{address}", folder)
        self._link_consumers(folder)

    def disappear(self, folder: str) -> None:
        """The reverse: the folder is left, and nothing leads to it."""
        address = os.path.basename(folder)
        self._unlink_consumers(folder)
        os.unlink(f"{self.bus}/devices/{address}")
        group = f"{self._groups}/{group_of(folder)}"
        os.unlink(f"{folder}/iommu_group")
        os.unlink(f"{group}/devices/{address}")
        if not listed(f"{group}/devices"):
            os.rmdir(f"{group}/devices")
            shutil.rmtree(group)

    # Drivers

    def add_driver(self, driver: str) -> None:
        """What loading a driver's module makes appear; nothing if it is loaded."""
        folder = f"{self.bus}/drivers/{driver}"
        if os.path.isdir(folder):
            return
        os.mkdir(folder)
        for name in ("bind", "new_id", "remove_id", "uevent", "unbind"):
            create_file(f"{folder}/{name}", "", 0o200)
        if driver == "pcieport":  # part of the kernel itself
            return
        module = f"{self.root}/sys/module/{driver.replace('-', '_')}"
        os.makedirs(f"{module}/drivers")
        create_link(f"{folder}/module", module)
        create_link(f"{module}/drivers/pci:{driver}", folder)
        if driver == "vfio-pci":
            os.mkdir(f"{module}/parameters")
            for name in ("disable_denylist", "disable_idle_d3", "enable_sriov", "nointxmask"):
                create_file(f"{module}/parameters/{name}", "N\n")

    def link_driver(self, folder: str, driver: str) -> None:
        """The two links of driver_sysfs_add in drivers/base/dd.c, in its order."""
        create_link(f"{self.bus}/drivers/{driver}/{os.path.basename(folder)}", folder)
        create_link(f"{folder}/driver", f"{self.bus}/drivers/{driver}")
        self._write_uevent(folder, driver)

    def unlink_driver(self, folder: str, driver: str) -> None:
        remove_if_there(f"{self.bus}/drivers/{driver}/{os.path.basename(folder)}")
        os.unlink(f"{folder}/driver")
        self._write_uevent(folder, None)

    # Attributes

    def write(self, folder: str, name: str, text: str) -> None:
        """New content for an attribute, at once; what a test has put in place of a file (a FIFO) is left alone."""
        path = f"{folder}/{name}"
        if is_plain_file(path) and text_of(path) != text:
            replace_file(path, f"{text}\n", self.spare)

    def sleep(self, folder: str) -> None:
        """Runtime suspend, as vfio-pci does to a function that nobody uses (without disable_idle_d3)."""
        self._set_power(folder, "suspended", "auto")
        self.write(folder, "power_state", "D3hot")

    def wake(self, folder: str, control: str) -> None:
        self.write(folder, "power_state", "D0")
        self._set_power(folder, "active", control)

    def _set_power(self, folder: str, status: str, control: str) -> None:
        for name, attribute in power_attributes(status, control).items():
            self.write(folder, name, str(attribute.content).strip())

    def _write_uevent(self, folder: str, driver: str | None) -> None:
        path = f"{folder}/uevent"
        if is_plain_file(path):
            lines = [line for line in (text_of(path) or "").splitlines() if not line.startswith("DRIVER=")]
            self.write(folder, "uevent", "\n".join(([f"DRIVER={driver}"] if driver else []) + lines))

    # Device links between a GPU and the other functions of its slot

    def _link_consumers(self, folder: str) -> None:
        """Makes those of which both ends are there now."""
        above, address = os.path.split(folder)
        supplier = f"{above}/{address[:-1]}0"
        if not os.path.isdir(supplier) or number_in(f"{supplier}/class") >> 16 != 0x03:
            return
        for name in addresses_in(above):
            consumer = f"{above}/{name}"
            if name[:-1] == address[:-1] and number_in(f"{consumer}/class") >> 8 in _CONSUMER_CLASSES:
                both_known = self.folder(name) and self.folder(os.path.basename(supplier))
                if both_known and not os.path.lexists(f"{supplier}/consumer:pci:{name}"):
                    self._add_device_link(supplier, consumer)

    def _add_device_link(self, supplier: str, consumer: str) -> None:
        """As device_link_add in drivers/base/core.c."""
        name = f"pci:{os.path.basename(supplier)}--pci:{os.path.basename(consumer)}"
        folder = f"{self.devices}/virtual/devlink/{name}"
        os.makedirs(folder)
        os.makedirs(self._class("devlink"), exist_ok=True)
        for attribute, text in (("auto_remove_on", "never"), ("runtime_pm", "1"), ("sync_state_only", "0")):
            create_file(f"{folder}/{attribute}", f"{text}\n")
        create_link(f"{folder}/subsystem", self._class("devlink"))
        create_link(f"{self._class('devlink')}/{name}", folder)
        create_link(f"{folder}/supplier", supplier)
        create_link(f"{folder}/consumer", consumer)
        create_link(f"{supplier}/consumer:pci:{os.path.basename(consumer)}", folder)
        create_link(f"{consumer}/supplier:pci:{os.path.basename(supplier)}", folder)

    def _unlink_consumers(self, folder: str) -> None:
        for name in listed(folder):
            kind, _, other = name.partition(":pci:")
            if kind in ("consumer", "supplier"):
                link = link_target(f"{folder}/{name}") or ""
                back = "supplier" if kind == "consumer" else "consumer"
                os.unlink(f"{folder}/{name}")
                with suppress(FileNotFoundError):
                    os.unlink(f"{os.path.dirname(folder)}/{other}/{back}:pci:{os.path.basename(folder)}")
                os.unlink(f"{self._class('devlink')}/{os.path.basename(link)}")
                shutil.rmtree(link)

    @property
    def _groups(self) -> str:
        return f"{self.root}/sys/kernel/iommu_groups"

    def _class(self, name: str) -> str:
        return f"{self.root}/sys/class/{name}"


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
