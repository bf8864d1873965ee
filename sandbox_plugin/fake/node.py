"""A fake node: a folder that looks to the daemon like a host's root, and verbs that change it.

Each verb does to the tree what a kernel does to its own when hardware, or somebody who writes to sysfs, makes the
same change, and in the same order, so that a reader who comes in the middle sees what it could see on a real host.
Of sysfs there is what the daemon or a test reads. All of it works as an ordinary user; device nodes are plain files.

The tree is the only state. What a kernel knows and sysfs does not show lies apart in one hidden folder, `.fake-node`,
whose presence also tells a fake tree from a real host's root.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from sandbox_plugin.fake.hardware import FunctionSpec, Kernel, Preset, VgpuType
from sandbox_plugin.fake.pci import OFF_THE_BUS, PCI_BRIDGE, Pci, addresses_in, driver_of, group_of, number_in
from sandbox_plugin.fake.platform import create_platform
from sandbox_plugin.fake.presets import PRESETS
from sandbox_plugin.fake.tree import create_file, is_plain_file, listed, replace_file, text_of
from sandbox_plugin.fake.vfio import Vfio
from sandbox_plugin.fake.vgpus import Vgpus, physical_function_of
from sandbox_plugin.hints import did_you_mean
from sandbox_plugin.model import D3COLD, PciFunction, VfioDev, is_vfio_driver

_STATE = ".fake-node"
_RELEASE = "6.12.0-fake"
_ALIASES = (
    ("vfio_pci:v000010DEd00002342sv*sd*bc*sc*i*", "nvgrace_gpu_vfio_pci"),
    ("vfio_pci:v000010DEd00002345sv*sd*bc*sc*i*", "nvgrace_gpu_vfio_pci"),
    ("vfio_pci:v*d*sv*sd*bc*sc*i*", "vfio_pci"),
    ("pci:v000010DEd*sv*sd*bc03sc00i00*", "nvidia"),
    ("pci:v000010DEd*sv*sd*bc03sc02i00*", "nvidia"),
    ("pci:v000010DEd*sv*sd*bc06sc80i00*", "nvidia"),
    ("pci:v000010DEd*sv*sd*bc03sc*i*", "nouveau"),
    ("pci:v000010DEd*sv*sd*bc04sc03i00*", "snd_hda_intel"),
    ("pci:v*d*sv*sd*bc0Csc03i30*", "xhci_pci"),
    ("pci:v000010DEd*sv*sd*bc0Csc80i00*", "i2c_nvidia_gpu"),
)
"""Of modules.alias, what has to do with vfio and GPUs (nvgrace_gpu_vfio_pci_table in drivers/vfio/pci/nvgrace-gpu)."""
_HARMLESS_DRIVERS = ("pci-stub", "pcieport")
"""Host drivers that leave the DMA of their function's group alone (driver_managed_dma in struct pci_driver)."""


class FakeNodeError(ValueError):
    """What was asked for cannot be done; a kernel would refuse it too. The message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Removed:
    """What is remembered of a function that was hot-removed, beside its folder."""

    parent: str
    """Folder it hung in, relative to sys/devices."""
    mates: list[str]
    """Functions that share its IOMMU group when they are there."""
    driver: str | None
    """The host driver that will claim it again; not a vfio driver, whose driver_override goes with the function."""


class FakeNode:
    """The fake node in one folder.

        node = FakeNode.create(tmp_path / "node", "hgx-h100")
        node.unbind("0000:1b:00.0")

    Addresses are full and lower-case, `DDDD:BB:DD.F`. Every verb raises `FakeNodeError` when there is no such function
    or when the kernel would refuse. Processes may open the same node one after another, not at the same time.
    """

    def __init__(self, root: Path, kernel: Kernel) -> None:
        """Not for callers: see `create` and `open`."""
        self.root = root
        """What the daemon takes as its host root."""
        self.kernel = kernel
        top = os.path.abspath(root)
        self._hidden = f"{top}/{_STATE}"
        self._spare = f"{self._hidden}/spare"
        self._pci = Pci(top, kernel.first_group, self._spare)
        self._vfio = Vfio(top, kernel, self._spare)
        self._vgpus = Vgpus(self._pci, self._state("vgpu-types"))

    @classmethod
    def create(cls, directory: str | os.PathLike[str], preset: str | Preset) -> FakeNode:
        """Makes a tree in a folder that is empty or does not exist yet; the whole tree, or nothing.

        Raises `FakeNodeError` for an unknown preset and for a folder with something in it, OSError with the folder's
        name when it cannot be made or written.
        """
        root = Path(directory)
        if isinstance(preset, str):
            if preset not in PRESETS:
                hint = did_you_mean(preset, PRESETS)
                raise FakeNodeError(f"there is no preset {preset!r}{hint}; there are {', '.join(PRESETS)}")
            preset = PRESETS[preset]
        if root.exists() and not root.is_dir():
            raise FakeNodeError(f"{root} is not a folder")
        if root.exists() and os.listdir(root):
            raise FakeNodeError(f"{root} is not empty: a fake node is made in a folder of its own")
        node = cls(root, preset.kernel)
        try:
            node._build(preset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(root)) from None
        finally:
            if not (root / _STATE / "kernel.json").exists():  # the last file of a whole tree
                shutil.rmtree(root, ignore_errors=True)
        return node

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> FakeNode:
        """The node in a folder that `create` made. Raises `FakeNodeError` for any other folder."""
        root = Path(directory)
        try:
            kernel = (root / _STATE / "kernel.json").read_text()
        except (FileNotFoundError, NotADirectoryError):
            raise FakeNodeError(f"{root} is not a fake node (`fake-node create` makes one)") from None
        return cls(root, Kernel(**json.loads(kernel)))

    # What is there

    def functions(self) -> list[PciFunction]:
        """The PCI functions that are there now, by address: what they are, their driver, group, node and link."""
        return [self.function(address) for address in self._pci.addresses()]

    def function(self, address: str) -> PciFunction:
        """One of them. What a test has broken reads as 0 or None."""
        folder = self._folder(address)
        numa_node = number_in(f"{folder}/numa_node", 10)
        return PciFunction(
            address=address,
            vendor=number_in(f"{folder}/vendor"),
            device=number_in(f"{folder}/device"),
            class_code=number_in(f"{folder}/class"),
            driver=driver_of(folder),
            iommu_group=group_of(folder),
            vfio=_vfio_dev(folder),
            numa_node=None if numa_node < 0 else numa_node,
            link_speed=text_of(f"{folder}/current_link_speed"),
            enable=number_in(f"{folder}/enable", 10),
            physical_function=None if (whole := physical_function_of(folder)) is None else os.path.basename(whole),
            vgpu_type=text_of(f"{folder}/nvidia/current_vgpu_type"),
        )

    def removed(self) -> list[str]:
        """Addresses of the functions that were hot-removed and can be put back."""
        return [name for name in listed(self._state("removed")) if not name.endswith(".json")]

    def folder(self, address: str) -> Path:
        """The real folder of a function, below sys/devices."""
        return Path(self._folder(address))

    # Drivers

    def bind(self, address: str, driver: str = "vfio-pci") -> None:
        """Gives a function to a driver, taking it from another that has it.

        As with driver_override and drivers_probe: links first, then, for a vfio driver, the group's node if it is the
        group's first, then vfioN, the lowest that is free, and its node. A vfio driver lets the idle function sleep;
        any other enables it. The driver, and vfio, are loaded if they were not.

        Raises `FakeNodeError` for what is not a driver's name, when it has this driver already, when a VM still holds
        it, when a vfio driver should take a bridge (vfio_pci_core_register_device in
        drivers/vfio/pci/vfio_pci_core.c), and when a VM holds a group mate and the driver is a host's
        (iommu_device_use_default_domain in drivers/iommu/iommu.c).
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]+", driver):
            raise FakeNodeError(f"{driver!r} is not the name of a driver: allowed are letters, digits, `-` and `_`")
        folder = self._folder(address)
        bound = driver_of(folder)
        if bound == driver:
            raise FakeNodeError(f"{address} is bound to {driver} already")
        if self._is_held(address, folder):
            raise FakeNodeError(f"{address} is held by a VM: its enable must be 0 first")
        card = self._vgpus.card_of(folder)
        makes_vfio_device = is_vfio_driver(driver) or (card is not None and driver == driver_of(card))
        if is_vfio_driver(driver) and number_in(f"{folder}/class") >> 8 == PCI_BRIDGE:
            raise FakeNodeError(f"{address} is a bridge: vfio drivers take endpoints only (EINVAL)")
        if makes_vfio_device:
            if not self._vfio.is_loaded:
                self._vfio.load()
        elif driver not in _HARMLESS_DRIVERS:
            for mate, member in self._pci.members(folder).items():
                if self._is_held(mate, member):
                    raise FakeNodeError(
                        f"a VM holds the IOMMU group of {address} through {mate}: binding fails (EBUSY)"
                    )
        if bound:
            self.unbind(address)
        self._pci.add_driver(driver)
        self._pci.link_driver(folder, driver)
        if is_vfio_driver(driver):
            self._pci.sleep(folder)
        if makes_vfio_device:
            self._vfio.register(folder, group_of(folder) or 0, set(self._held_numbers().values()))
        else:
            self._pci.write(folder, "enable", "1")

    def unbind(self, address: str) -> None:
        """Takes a function from its driver.

        The driver's links go first, then the cdev, then, with the group's last function, the group's node. While a VM
        holds the function (`enable` is 1) a kernel stops after the cdev, and the rest waits for `set_enable(.., 0)`.
        """
        folder = self._folder(address)
        driver = driver_of(folder)
        if driver is None:
            raise FakeNodeError(f"{address} is not bound to a driver")
        in_use = self._is_held(address, folder)
        self._pci.unlink_driver(folder, driver)
        number = self._vfio.remove_device(folder)
        if number is None:
            self._pci.write(folder, "enable", "0")
        elif in_use:
            create_file(self._state("held", address), str(number))
        else:
            self._release(folder)

    def set_enable(self, address: str, value: int) -> None:
        """A VM opens (1) or closes (0) the function.

        It is awake while a VM has it and asleep afterwards. Closing one that was unbound meanwhile lets the unbind come
        to its end. Raises `FakeNodeError` when a VM could not open it: the group is not viable (EPERM), or it is a
        virtual function without a vGPU type, or whose GPU has no driver (ENODEV).
        """
        folder = self._folder(address)
        has_vfio = is_vfio_driver(driver_of(folder))
        if value:
            if _is_for_vms(folder):
                self._refuse_if_not_viable(folder)
                self._refuse_if_no_vgpu(folder)
            if has_vfio:
                self._pci.wake(folder)
            self._pci.write(folder, "enable", "1")
            return
        self._pci.write(folder, "enable", "0")
        if address in self._held_numbers():
            os.unlink(self._state("held", address))
            self._release(folder)
        elif has_vfio:
            self._pci.sleep(folder)

    # vGPUs by the vendor's driver

    def add_vgpu_functions(self, card: str, types: Sequence[VgpuType], count: int) -> list[str]:
        """SR-IOV virtual functions of a GPU, as with NVIDIA's `sriov-manage -e`: its driver makes VFIO devices of them
        at once, and none has a type yet. Their addresses follow the GPU's.

        `types` are those that the card can make. Raises `FakeNodeError` when it has virtual functions already, and when
        its vendor's driver does not have it.
        """
        folder = self._folder(card)
        driver = driver_of(folder)
        if driver is None or is_vfio_driver(driver):
            raise FakeNodeError(f"{card} is bound to {driver or 'no driver'}: its vendor's driver makes vGPUs")
        if self._vgpus.functions(folder):
            raise FakeNodeError(f"{card} has virtual functions already")
        made = [os.path.basename(part) for part in self._vgpus.create(folder, types, count)]
        for address in made:
            replace_file(self._state("claims", address), driver, self._spare)
            self.bind(address, driver)
        return made

    def set_vgpu_type(self, address: str, number: int) -> None:
        """What a write of the number into `nvidia/current_vgpu_type` does; 0 clears it. No event tells.

        Raises `FakeNodeError` while a VM has the function (EBUSY), and when its card has no room for such a vGPU.
        """
        folder = self._folder(address)
        card = self._vgpus.card_of(folder)
        if card is None:
            raise FakeNodeError(f"{address} is no virtual function that its vendor's driver makes a vGPU of")
        if self._is_held(address, folder):
            raise FakeNodeError(f"{address} is held by a VM: its enable must be 0 first")
        if number and number not in self._vgpus.creatable(card, but=folder):
            raise FakeNodeError(f"{os.path.basename(card)} has no room for a vGPU of type {number}")
        self._vgpus.set_type(folder, number)

    def fill_with_vgpus(self, card: str, number: int) -> list[str]:
        """Gives the type to as many virtual functions of a GPU as have none and as it has room for; 0: clears all.

        Returns the addresses of those. Raises `FakeNodeError` as `set_vgpu_type` does, and when there is nothing to do.
        """
        folder, changed = self._folder(card), []
        for part in self._vgpus.functions(folder):
            has_type = self._vgpus.type_of(part) != 0
            if has_type is (number == 0) and (number == 0 or number in self._vgpus.creatable(folder)):
                self.set_vgpu_type(os.path.basename(part), number)
                changed.append(os.path.basename(part))
        if not changed:
            raise FakeNodeError(f"{card} has no {f'room for a vGPU of type {number}' if number else 'vGPU'}")
        return changed

    def override(self, address: str, driver: str) -> None:
        """Sets `driver_override`: the only driver that a probe may bind; empty for any (driver_set_override)."""
        self._pci.write(self._folder(address), "driver_override", driver or "(null)")

    def wanted_driver(self, address: str) -> str | None:
        """The driver that a probe would bind: the override, else the one that claims such a function by itself.

        vfio drivers claim none by themselves. One that is not loaded takes nothing.
        """
        override = text_of(f"{self._folder(address)}/driver_override")
        driver = text_of(self._state("claims", address)) if override in (None, "(null)") else override
        return driver if driver in listed(f"{self._pci.bus}/drivers") else None

    def probe(self, address: str) -> None:
        """As a write to `drivers_probe`: a function without a driver gets the one that it wants, if there is one."""
        driver = self.wanted_driver(address)
        if driver is not None and driver_of(self._folder(address)) is None:
            self.bind(address, driver)

    def load(self, module: str) -> None:
        """As modprobe: the module's driver appears, and vfio with a vfio driver."""
        driver = "vfio-pci" if module == "vfio_pci" else module
        self._pci.add_driver(driver)
        if is_vfio_driver(driver) and not self._vfio.is_loaded:
            self._vfio.load()

    # Hot-plug

    def remove(self, address: str) -> None:
        """Takes a function out of the machine, and first what hangs below it.

        A VM that has it is taken to let go at once. Group numbers and vfioN that become free are handed out again. Its
        vGPU functions go with it, and do not come back. Raises `FakeNodeError` for one of those.
        """
        folder = self._folder(address)
        if (whole := self._vgpus.card_of(folder)) is not None:
            raise FakeNodeError(f"{address} is a virtual function: it goes with {os.path.basename(whole)}")
        for part in [os.path.basename(part) for part in self._vgpus.functions(folder)]:
            self.set_enable(part, 0)
            if driver_of(self._folder(part)):
                self.unbind(part)
        self._vgpus.remove(folder)
        for below in reversed(addresses_in(folder)):
            self.remove(below)
        driver = driver_of(folder)
        if self._is_held(address, folder):
            self.set_enable(address, 0)
        if driver:
            self.unbind(address)
        there = {mate for mate in self._pci.members(folder) if mate != address}
        away = {gone for gone in self.removed() if address in self._remembered(gone).mates}
        remembered = _Removed(
            parent=os.path.relpath(os.path.dirname(folder), self._pci.devices),
            mates=sorted(there | away),
            driver=None if is_vfio_driver(driver) else driver,
        )
        self._pci.write(folder, "driver_override", "(null)")
        self._pci.disappear(folder)
        os.rename(folder, self._state("removed", address))
        create_file(self._state("removed", f"{address}.json"), json.dumps(asdict(remembered)))

    def add(self, function: str | FunctionSpec, *, iommu_group: int | None = None) -> None:
        """Puts a function into the machine: one that was removed, by address, or a new one.

        A removed one comes back well, with what was below it; unbound from vfio, but claimed by a host driver if it
        had one. Its IOMMU group is the one its group mates are in, else `iommu_group`, else the lowest number that is
        free (as iommu_group_alloc does: what is removed and put back alone has the number it had).
        """
        address = function if isinstance(function, str) else function.address
        if address in self._pci.addresses():
            raise FakeNodeError(f"{address} is there already")
        if isinstance(function, FunctionSpec):
            self._appear(function)
            if function.driver:
                self.bind(address, function.driver)
        elif address in self.removed():
            self._put_back(address, iommu_group)
        else:
            raise FakeNodeError(f"no function {address!r} was removed from {self.root}")

    # Sickness

    def sicken(self, address: str, *, cold: bool = False) -> None:
        """The device no longer answers, as after a power cut behind the driver's back; no event tells.

        The link reads Unknown and 63; the rest looks as ever. `cold`: the kernel has tried to change its power state,
        read all ones, and takes it to be in D3cold since. It befalls all functions of the slot and what hangs below
        them.
        """
        answers = {"current_link_speed": OFF_THE_BUS.speed, "current_link_width": str(OFF_THE_BUS.width)}
        if cold:
            answers["power_state"] = D3COLD
        for folder in self._slot_with_link(address):
            stash = self._state("sick", os.path.basename(folder))
            if os.path.isdir(stash):
                continue
            os.mkdir(stash)
            for name, answer in answers.items():
                if is_plain_file(f"{folder}/{name}"):
                    shutil.copy(f"{folder}/{name}", f"{stash}/{name}")
                    self._pci.write(folder, name, answer)

    def heal(self, address: str) -> None:
        """The device, with all functions of its slot and what hangs below, answers again."""
        for folder in self._slot_with_link(address):
            self._heal(folder)

    def set_attribute(self, address: str, name: str, text: str | bytes) -> None:
        """Gives a file of the function, e.g. `numa_node` or `power/runtime_status`, a new content, sense or nonsense.

        A `str` that is not empty gets a newline at its end if it has none. A reader sees the old content or the new
        one.
        """
        if isinstance(text, str) and text and not text.endswith("\n"):
            text += "\n"
        replace_file(f"{self._folder(address)}/{name}", text, self._spare)

    # How

    def _build(self, preset: Preset) -> None:
        for name in ("removed", "held", "sick", "vgpu-types", "claims"):
            os.makedirs(self._state(name))
        _create_system(self._pci.root)
        os.makedirs(f"{self._pci.root}/dev")
        self._pci.create()
        create_platform(self.root, preset.kernel)
        self._vfio.write_majors(loaded=False)
        if preset.kernel.vfio_loaded:
            self._vfio.load()
            self._pci.add_driver("vfio-pci")
        specs = preset.functions()
        for spec in specs:  # the kernel has found them all before drivers come
            self._appear(spec)
        for spec in specs:
            if spec.driver:
                self.bind(spec.address, spec.driver)
        for card in preset.vgpu_cards:
            parts = self.add_vgpu_functions(card.address, card.types, len(card.functions))
            for part, number in zip(parts, card.functions, strict=True):
                self.set_vgpu_type(part, number)
        for name, gpus in preset.egm.items():
            os.makedirs(f"{self._pci.root}/sys/class/egm/{name}")
            create_file(f"{self._pci.root}/sys/class/egm/{name}/gpu_devices", "".join(f"{gpu}\n" for gpu in gpus))
            create_file(f"{self._pci.root}/dev/{name}", "")
        create_file(f"{self._hidden}/kernel.json", json.dumps(asdict(self.kernel)))

    def _appear(self, spec: FunctionSpec) -> None:
        parent = f"{self._pci.devices}/{spec.parent}" if spec.parent.startswith("pci") else self._folder(spec.parent)
        folder = self._pci.create_function(spec, parent)
        self._pci.appear(folder, spec.iommu_group)
        if spec.model.host_driver:
            self._pci.add_driver(spec.model.host_driver)
            os.makedirs(self._state("claims"), exist_ok=True)
            replace_file(self._state("claims", spec.address), spec.model.host_driver, self._spare)

    def _put_back(self, address: str, iommu_group: int | None) -> None:
        remembered = self._remembered(address)
        parent = f"{self._pci.devices}/{remembered.parent}"
        if not os.path.isdir(parent):
            raise FakeNodeError(f"{os.path.basename(parent)}, the bridge above {address}, is not there")
        mates = (folder for mate in remembered.mates if (folder := self._pci.folder(mate)))
        group = next((group_of(folder) for folder in mates), iommu_group)
        folder = f"{parent}/{address}"
        os.rename(self._state("removed", address), folder)
        os.unlink(self._state("removed", f"{address}.json"))
        self._heal(folder)
        self._pci.appear(folder, group)
        if remembered.driver:
            with suppress(FakeNodeError):  # its probe fails while a VM holds the group: it stays without a driver
                self.bind(address, remembered.driver)
        for below in [a for a in self.removed() if self._remembered(a).parent == f"{remembered.parent}/{address}"]:
            self._put_back(below, None)

    def _release(self, folder: str) -> None:
        """The end of an unbind from vfio, when nobody holds the function any more."""
        group = group_of(folder)
        in_vfio = any(
            os.path.isdir(f"{member}/vfio-dev") or address in self._held_numbers()
            for address, member in self._pci.members(folder).items()
        )
        if group is not None and not in_vfio:
            self._vfio.remove_group(group)
        self._pci.wake(folder)

    def _heal(self, folder: str) -> None:
        stash = self._state("sick", os.path.basename(folder))
        for name in listed(stash):
            os.replace(f"{stash}/{name}", f"{folder}/{name}")
        shutil.rmtree(stash, ignore_errors=True)

    # What is asked on the way

    def _state(self, *parts: str) -> str:
        return "/".join((self._hidden, *parts))

    def _folder(self, address: str) -> str:
        folder = self._pci.folder(address)
        if folder is None:
            raise FakeNodeError(f"there is no PCI function {address!r} in {self.root}")
        return folder

    def _slot_with_link(self, address: str) -> list[str]:
        """Folders of what a power cut at this function befalls."""
        folder = self._folder(address)
        if not os.path.lexists(f"{folder}/current_link_speed"):
            raise FakeNodeError(f"{address} has no PCIe link")
        return self._pci.slot(folder)

    def _remembered(self, address: str) -> _Removed:
        return _Removed(**json.loads(Path(self._state("removed", f"{address}.json")).read_text()))

    def _is_held(self, address: str, folder: str) -> bool:
        """Whether a VM has the function open, bound to vfio or unbound meanwhile."""
        is_open = _is_for_vms(folder) and number_in(f"{folder}/enable", 10) > 0
        return is_open or address in self._held_numbers()

    def _held_numbers(self) -> dict[str, int]:
        """Address -> N of the vfioN of what was unbound while a VM holds it: not free until the VM lets go."""
        return {address: number_in(self._state("held", address), 10) for address in listed(self._state("held"))}

    def _refuse_if_not_viable(self, folder: str) -> None:
        for mate, member in self._pci.members(folder).items():
            driver = driver_of(member)
            if driver and not (_is_for_vms(member) or driver in _HARMLESS_DRIVERS):
                raise FakeNodeError(f"IOMMU group {group_of(folder)} is not viable (EPERM): {mate} has driver {driver}")

    def _refuse_if_no_vgpu(self, folder: str) -> None:
        card = self._vgpus.card_of(folder)
        if card is None or is_vfio_driver(driver_of(folder)):
            return
        if not self._vgpus.type_of(folder):
            raise FakeNodeError(f"{os.path.basename(folder)} has no vGPU type (ENODEV)")
        if driver_of(card) != driver_of(folder):
            raise FakeNodeError(f"{os.path.basename(card)} is not bound to {driver_of(folder)} (ENODEV)")


def _is_for_vms(folder: str) -> bool:
    """Whether a function is bound to a vfio driver, or to one that makes a VFIO device of it itself."""
    driver = driver_of(folder)
    return driver is not None and (is_vfio_driver(driver) or os.path.isdir(f"{folder}/vfio-dev"))


def _create_system(root: str) -> None:
    """What else there is of a Linux system: a release, a boot, folders of module settings, and the vfio aliases."""
    modules = f"{root}/lib/modules/{_RELEASE}"
    for folder in (modules, f"{root}/proc/sys/kernel/random", f"{root}/etc/modprobe.d", f"{root}/etc/modules-load.d"):
        os.makedirs(folder)
    create_file(f"{root}/proc/sys/kernel/osrelease", f"{_RELEASE}\n")
    create_file(f"{root}/proc/sys/kernel/random/boot_id", f"{uuid4()}\n")
    create_file(f"{modules}/modules.alias", "".join(f"alias {alias} {module}\n" for alias, module in _ALIASES))


def _vfio_dev(folder: str) -> VfioDev | None:
    for name in listed(f"{folder}/vfio-dev"):
        return VfioDev(number=int(name.removeprefix("vfio")), cdev=text_of(f"{folder}/vfio-dev/{name}/dev"))
    return None
