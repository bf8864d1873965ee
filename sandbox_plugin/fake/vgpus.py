"""What the driver of a fake GPU adds to the kernel: virtual functions of the GPU, and types of vGPU for them.

Apart from `node`, because this is a driver's and no part of PCI or vfio. Files and formats are those of NVIDIA's driver
for Ada, Hopper and later (vGPU 17 and later), where no mediated devices are made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from sandbox_plugin.fake.hardware import VgpuType
from sandbox_plugin.fake.pci import Pci, number_in
from sandbox_plugin.fake.tree import create_file, create_link, link_target, listed, remove_if_there, text_of

_FIRST_FUNCTION = 4
"""Where the virtual functions of NVIDIA's GPUs begin: the first of `0000:21:00.0` is `0000:21:00.4`."""
_COPIED = ("vendor", "device", "class", "revision", "subsystem_vendor", "subsystem_device", "numa_node", "resource")
"""What a virtual function says as its GPU does: their device IDs are one too."""
_OWN = {"enable": "0", "power_state": "D0", "power/runtime_status": "active", "driver_override": "(null)"}


@dataclass(frozen=True, slots=True)
class Vgpus:
    """The vGPUs in a tree. A function is given by its folder; a card is the folder of a physical function."""

    pci: Pci
    state: str
    """A folder for what a driver knows and sysfs does not show."""

    def functions(self, card: str) -> list[str]:
        """The virtual functions of a card, in their order."""
        links = [name for name in listed(card) if name.startswith("virtfn")]
        links.sort(key=lambda name: int(name.removeprefix("virtfn")))
        return [folder for name in links if (folder := link_target(f"{card}/{name}")) is not None]

    def create(self, card: str, types: Sequence[VgpuType], count: int) -> list[str]:
        """Virtual functions without a driver, each in an IOMMU group of its own."""
        above, address = os.path.split(card)
        create_file(self._types_file(card), json.dumps([astuple(kind) for kind in types]))
        made = []
        for index in range(count):
            slot, function = divmod(index + _FIRST_FUNCTION, 8)
            folder = f"{above}/{address[:-4]}{slot:02x}.{function}"
            os.makedirs(f"{folder}/power")
            os.mkdir(f"{folder}/nvidia")
            files = {name: text_of(f"{card}/{name}") for name in _COPIED} | _OWN
            files |= {"nvidia/current_vgpu_type": "0", "nvidia/creatable_vgpu_types": _listing(types)}
            for name, text in files.items():
                create_file(f"{folder}/{name}", f"{text}\n")
            create_link(f"{folder}/physfn", card)
            self.pci.appear(folder, None)
            create_link(f"{card}/virtfn{index}", folder)
            made.append(folder)
        return made

    def remove(self, card: str) -> None:
        """All virtual functions of a card, which no driver has any more."""
        for index, folder in enumerate(self.functions(card)):
            os.unlink(f"{card}/virtfn{index}")
            self.pci.disappear(folder)
            shutil.rmtree(folder)
        remove_if_there(self._types_file(card))

    def type_of(self, folder: str) -> int:
        """The number of a virtual function's type; 0: it has none."""
        return number_in(f"{folder}/nvidia/current_vgpu_type", 10)

    def creatable(self, card: str, but: str | None = None) -> list[int]:
        """Numbers of the types that the card has room for now, as if the function `but` had none."""
        return [kind.number for kind in self._creatable(card, but)]

    def set_type(self, folder: str, number: int) -> None:
        """The driver writes the type, and all lists of what still fits on the card."""
        self.pci.write(folder, "nvidia/current_vgpu_type", str(number))
        card = physical_function_of(folder) or ""
        for part in self.functions(card):
            self.pci.write(part, "nvidia/creatable_vgpu_types", _listing(self._creatable(card)))

    def card_of(self, folder: str) -> str | None:
        """The card whose driver can make a vGPU of this virtual function; None of any other function."""
        card = physical_function_of(folder)
        return card if card is not None and os.path.exists(self._types_file(card)) else None

    def _creatable(self, card: str, but: str | None = None) -> list[VgpuType]:
        taken = [number for part in self.functions(card) if part != but and (number := self.type_of(part))]
        types = [VgpuType(*kind) for kind in json.loads(text_of(self._types_file(card)) or "[]")]
        return [kind for kind in types if {*taken} <= {kind.number} and len(taken) < kind.fits]

    def _types_file(self, card: str) -> str:
        return f"{self.state}/{os.path.basename(card)}"


def physical_function_of(folder: str) -> str | None:
    """The folder of the function whose part a virtual function is; None of any other function."""
    return link_target(f"{folder}/physfn")


def _listing(types: Sequence[VgpuType]) -> str:
    """Only the heading on a full card."""
    return "\n".join(["ID    : vGPU Name", *(f"{kind.number:<6}: {kind.name}" for kind in types)])
