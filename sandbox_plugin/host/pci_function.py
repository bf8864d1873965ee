"""Reading one PCI function: blocking, small, and careful about what it touches.

Never read: `config` (blocks, unkillably, while the kernel resets the device), `uevent` and `driver_override` (block
likewise on Linux 6.1), `sriov_numvfs` (takes the device's lock, which a reset and an unbind that waits for a VM hold:
sriov_numvfs_show in drivers/pci/iov.c). Link attributes are read only while that wakes nothing. VFIO nodes are never
opened, only listed: while one is open, a VM gets EBUSY. All of this is called on threads that nothing joins, because
any sysfs read can hang in the kernel.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sandbox_plugin.host import sysfs
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.model import (
    D3COLD,
    ROM,
    UNKNOWN_SPEED,
    Bar,
    LinkLimit,
    PciFunction,
    VfioDev,
    is_vfio_driver,
    silence,
)

VFIO_DEV = re.compile(r"vfio(\d{1,9})")
"""Name of a cdev, and of its folder in sysfs."""
PCI_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
_TYPE_NUMBER = re.compile(r"[0-9]{1,9}")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_DEV_NUMBERS = re.compile(r"\d+:\d+")
_ACPI_POWER_RESOURCES = ("power_resources_D3hot", "real_power_state")
"""What an ACPI device has whose power ACPI can cut (drivers/acpi/power.c and drivers/acpi/device_sysfs.c)."""
_IO_REGION, _MEM_REGION, _PREFETCH, _MEM_64, _UNSET = 0x100, 0x200, 0x2000, 0x100000, 0x20000000
"""IORESOURCE_IO, _MEM, _PREFETCH, _MEM_64 and _UNSET of the kernel's include/linux/ioport.h."""
_ROM_ENABLE = 0x1
"""IORESOURCE_ROM_ENABLE: the expansion ROM is switched on."""
_REGIONS_OF_FUNCTION = 7
"""Lines of `resource` that are the function's own: six BARs and the ROM; SR-IOV and bridge windows follow."""


class FunctionUnreadable(Exception):
    """One PCI function cannot be used, and why; it costs that function alone."""


FolderVersion = tuple[int, int]
"""Inode number and time of change of a function's folder: another function in its place has another."""


def folder_id(paths: HostPaths, address: str) -> FolderVersion | None:
    """Tells a function's folder from one that was there before under the same address; None if there is none."""
    try:
        status = os.stat(f"{paths.pci_devices}/{address}")
    except OSError:
        return None
    return (status.st_ino, status.st_ctime_ns)


def driver_of(paths: HostPaths, address: str) -> str | None:
    """The driver that holds a function now; None for none, and where that cannot be told."""
    return sysfs.target_name_or_none(f"{paths.pci_devices}/{address}/driver")


def read_function(paths: HostPaths, address: str, before: PciFunction | None = None) -> PciFunction:
    """Reads one PCI function, or one mediated device by its UUID.

    What it is, its driver and its group are read for every function; the rest only for functions that a vfio driver
    holds, since nothing else is ever offered. `before` is the same function as it was read earlier: what can never
    change while it is there is taken from that. Raises `FunctionUnreadable` when what it is cannot be read or makes no
    sense, and `sysfs.OutOfResources`.
    """
    try:
        if _UUID.fullmatch(address):
            return _read_mdev(paths, address)
        if not PCI_ADDRESS.fullmatch(address):
            raise ValueError(f"{address!r} is not a PCI address")
        return _read_pci_function(paths, address, before)
    except OSError as error:
        raise FunctionUnreadable(_why(error)) from None
    except ValueError as error:
        raise FunctionUnreadable(str(error)) from None


class FunctionNow(NamedTuple):
    """What decides whether a VM can open a function: as in `PciFunction`."""

    driver: str | None
    vfio: VfioDev | None
    vgpu_type: str | None
    enable: int | None
    silence: str | None


def read_again(paths: HostPaths, was: PciFunction) -> FunctionNow:
    """A function that was read earlier, as it is now. Raises `FunctionUnreadable` and `sysfs.OutOfResources`."""
    if was.mdev_type is not None:
        function = read_function(paths, was.address)
        return FunctionNow(driver=function.driver, vfio=function.vfio, vgpu_type=None, enable=None, silence=None)
    folder = f"{paths.pci_devices}/{was.address}"
    try:
        driver = sysfs.target_name(f"{folder}/driver")
    except OSError as error:
        raise FunctionUnreadable(_why(error)) from None
    if driver is None and not os.path.exists(folder):
        raise FunctionUnreadable("it is gone")
    optional = _Optional(folder)
    power = _read_power(paths, folder, optional, was.bridges)
    return FunctionNow(
        driver=driver,
        vfio=_vfio_dev(folder),
        enable=optional.number("enable"),
        silence=silence(
            power.get("link_speed"), power.get("link_width"), power["power_state"], power.get("runtime_status")
        ),
        vgpu_type=_vgpu_type(folder) if was.is_vendors_vgpu else None,
    )


def is_a_vms(paths: HostPaths, address: str) -> bool:
    """Whether a function is enabled, and no host driver has it. Raises `sysfs.OutOfResources`."""
    folder = f"{paths.pci_devices}/{address}"
    if sysfs.text_or_none(f"{folder}/enable") != "1":
        return False
    try:
        driver = sysfs.target_name(f"{folder}/driver")
    except OSError:
        return True
    return driver is None or is_vfio_driver(driver) or _vfio_dev(folder) is not None


def _read_pci_function(paths: HostPaths, address: str, before: PciFunction | None) -> PciFunction:
    """As `read_function`. Raises OSError and ValueError."""
    folder = f"{paths.pci_devices}/{address}"
    # What could not be read of it is tried again.
    identity = _identify(folder, address) if before is None or before.unread else _identity(before)
    driver, group, vfio = sysfs.target_name(f"{folder}/driver"), _group_number(folder), _vfio_dev(folder)
    if vfio is not None or is_vfio_driver(driver):
        known_limits = None if before is None or before.unread else before.link_limits
        details = _read_details(paths, folder, identity, known_limits)
        function = PciFunction(**(identity | details), driver=driver, iommu_group=group, vfio=vfio)
        if function.is_vendors_vgpu:
            function = replace(function, vgpu_type=_vgpu_type(folder), vgpu_types=_creatable_types(folder))
    else:
        # A function that was unbound under a VM stays the VM's, and `enable` 1, until the VM lets go of it. One that
        # is seen for the first time may have been.
        may_be_a_vms = before is None or before.enable == 1 or before.is_held_by_vfio
        is_enabled = driver is None and may_be_a_vms and sysfs.text_or_none(f"{folder}/enable") == "1"
        function = PciFunction(**identity, driver=driver, iommu_group=group, enable=1 if is_enabled else None)
    is_same = before is not None and before == function and _uncompared(before) == _uncompared(function)
    return before if before is not None and is_same else function  # the same object is quickly compared


def _uncompared(function: PciFunction) -> tuple[int | None, ...]:
    """What may differ between functions that are equal."""
    return function.binding, function.nonfatal_errors, function.correctable_errors


def _identify(folder: str, address: str) -> dict[str, Any]:
    """What a function is: it never changes. Raises OSError and ValueError."""
    names = (("vendor", 4), ("device", 4), ("class", 6))
    vendor, device, class_code = (_hex(sysfs.text(f"{folder}/{name}"), name, digits) for name, digits in names)
    optional = _Optional(folder)
    return {
        "address": address,
        "vendor": vendor,
        "device": device,
        "class_code": class_code,
        "subsystem_vendor": optional.hex("subsystem_vendor", 4),
        "subsystem_device": optional.hex("subsystem_device", 4),
        "revision": optional.hex("revision", 2),
        "physical_function": optional.target_name("physfn"),
        "bridges": _bridges(folder, address),
        "unread": tuple(optional.unread),
    }


def _identity(function: PciFunction) -> dict[str, Any]:
    """The same of a function that was read before."""
    names = ("address", "vendor", "device", "class_code", "subsystem_vendor", "subsystem_device", "revision")
    return {name: getattr(function, name) for name in (*names, "physical_function", "bridges")}


def _read_details(
    paths: HostPaths, folder: str, identity: Mapping[str, Any], known_limits: tuple[LinkLimit, ...] | None
) -> dict[str, Any]:
    """What else the folder of a function says that a vfio driver holds. `known_limits`: its `link_limits` so far."""
    optional = _Optional(folder)
    details: dict[str, Any] = {
        "bars": optional.bars(),
        "reset_methods": optional.reset_methods(),
        "numa_node": _known_node(optional.number("numa_node")),
        "enable": optional.number("enable"),
        "virtual_functions": _virtual_functions(folder),
        **optional.errors(),
        **_read_power(paths, folder, optional, identity["bridges"]),
    }
    if known_limits is None and details.get("link_speed") not in (None, UNKNOWN_SPEED):
        known_limits = _read_link_limits(paths, optional, identity["bridges"])
    details["link_limits"] = known_limits
    return details | {"unread": (*identity.get("unread", ()), *optional.unread)}


def _read_power(paths: HostPaths, folder: str, optional: _Optional, bridges: Sequence[str]) -> dict[str, Any]:
    """The power state; then the PCIe link, or of a function in D3cold what tells one that sleeps from a dead one.

    The link is read only where that wakes nothing: not in D3cold, and not below a bridge that sleeps. In D3cold nothing
    asks the firmware: of what ACPI knows, that it is there is enough.
    """
    power_state = optional.text("power_state")
    bridges_awake = all(_is_awake(f"{paths.pci_devices}/{bridge}") for bridge in bridges[1:])
    if power_state == D3COLD:
        can_cut_power = any(os.path.exists(f"{folder}/firmware_node/{name}") for name in _ACPI_POWER_RESOURCES)
        return {
            "runtime_status": optional.text("power/runtime_status"),
            "has_power": bridges_awake and not can_cut_power,
            # Once more: if it was woken between the two reads, they do not contradict each other.
            "power_state": optional.text("power_state"),
        }
    if not bridges_awake:
        return {"power_state": power_state}
    return {
        "power_state": power_state,
        "link_speed": optional.text("current_link_speed"),
        "link_width": optional.number("current_link_width"),
    }


def _read_link_limits(paths: HostPaths, optional: _Optional, bridges: Sequence[str]) -> tuple[LinkLimit, ...]:
    """As `PciFunction.link_limits`. It reads the registers of both ends, so only where the link may be read as well.

    A slot may have fewer lanes than the card in it: the port above it says so.
    """
    port = _Optional(f"{paths.pci_devices}/{bridges[-1]}")
    ends = [optional, port] if len(bridges) > 1 else [optional]
    return tuple(LinkLimit(end.text("max_link_speed"), end.number("max_link_width")) for end in ends)


def _read_mdev(paths: HostPaths, uuid: str) -> PciFunction:
    """A mediated device (Documentation/driver-api/vfio-mediated-device.rst): its folder lies in its parent's.

    Raises OSError and ValueError.
    """
    folder = f"{paths.mdev_devices}/{uuid}"
    carrier = os.path.basename(os.path.dirname(os.readlink(folder)))
    # A parent need not be a PCI function: s390x's vfio-ap has its `matrix` (drivers/s390/crypto/vfio_ap_drv.c).
    of_parent: dict[str, Any] = {"vendor": 0, "device": 0, "class_code": 0}
    if PCI_ADDRESS.fullmatch(carrier):
        carrier_folder = f"{paths.pci_devices}/{carrier}"
        parent = _identify(carrier_folder, carrier)
        of_parent = {name: parent[name] for name in of_parent} | {
            "numa_node": _known_node(_Optional(carrier_folder).number("numa_node")),
            "bridges": (*parent["bridges"], carrier),
        }
    name = sysfs.text_or_none(f"{folder}/mdev_type/name") or sysfs.target_name(f"{folder}/mdev_type")
    return PciFunction(
        address=uuid,
        **of_parent,
        driver=sysfs.target_name(f"{folder}/driver"),
        iommu_group=_group_number(folder),
        vfio=_vfio_dev(folder),
        mdev_type=name or "unknown type",
    )


def _vgpu_type(folder: str) -> str | None:
    """As in `PciFunction.vgpu_type`; None also for what is no number."""
    text = sysfs.text_or_none(f"{folder}/nvidia/current_vgpu_type")
    return str(int(text)) if text is not None and _TYPE_NUMBER.fullmatch(text) else None


def _creatable_types(folder: str) -> tuple[tuple[str, str], ...]:
    """As in `PciFunction.vgpu_types`. Below a line of headings the file has a line `id : name` for each type."""
    lines = (sysfs.text_or_none(f"{folder}/nvidia/creatable_vgpu_types") or "").splitlines()
    found = [(number.strip(), name.strip()) for number, _, name in (line.partition(":") for line in lines)]
    return tuple((str(int(number)), name) for number, name in found if _TYPE_NUMBER.fullmatch(number) and name)


class _Optional:
    """Reads attributes that a function may do without, and keeps a line about each that failed."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.unread: list[str] = []

    def text(self, name: str) -> str | None:
        try:
            return sysfs.text(f"{self._folder}/{name}")
        except FileNotFoundError:
            return None
        except OSError as error:
            self.unread.append(f"{name}: {error.strerror}")
            return None

    def number(self, name: str) -> int | None:
        text = self.text(name)
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            self.unread.append(f"{name}: {text[:40]!r} is not a number")
            return None

    def hex(self, name: str, digits: int) -> int | None:
        text = self.text(name)
        if text is None:
            return None
        try:
            return _hex(text, name, digits)
        except ValueError as error:
            self.unread.append(str(error))
            return None

    def target_name(self, name: str) -> str | None:
        try:
            return sysfs.target_name(f"{self._folder}/{name}")
        except OSError as error:
            self.unread.append(f"{name}: {error.strerror}")
            return None

    def bars(self) -> tuple[Bar, ...]:
        text = self.text("resource")
        try:
            return tuple(_parse_bars((text or "").splitlines()[:_REGIONS_OF_FUNCTION]))
        except ValueError:
            self.unread.append("resource: not lines of three numbers")
            return ()

    def reset_methods(self) -> tuple[str, ...] | None:
        """Where the kernel knows no way from the start, both `reset_method` and `reset` are missing."""
        text = self.text("reset_method")
        if text is None:
            return None if os.path.lexists(f"{self._folder}/reset") else ()
        return tuple(text.split())

    def errors(self) -> dict[str, int | None]:
        """What the kernel has counted (AER), by field of `PciFunction`. It reads no register of the device for that."""
        errors = {"fatal_errors": self._total("aer_dev_fatal", "TOTAL_ERR_FATAL")}
        if errors["fatal_errors"] is not None:  # else the function has no such capability
            errors["nonfatal_errors"] = self._total("aer_dev_nonfatal", "TOTAL_ERR_NONFATAL")
            errors["correctable_errors"] = self._total("aer_dev_correctable", "TOTAL_ERR_COR")
        return errors

    def _total(self, file: str, name: str) -> int | None:
        """The total is in the last line (Documentation/ABI/testing/sysfs-bus-pci-devices-aer)."""
        for line in (self.text(file) or "").splitlines():
            first, _, count = line.partition(" ")
            if first == name and count.isdecimal():
                return int(count)
        return None


def _parse_bars(lines: Iterable[str]) -> Iterable[Bar]:
    """What is unset is what pci_enable_resources in drivers/pci/setup-res.c refuses: not a ROM that is switched off."""
    for index, line in enumerate(lines):
        start, end, flags = (int(word, 16) for word in line.split())
        unset = bool(flags & _UNSET) and (index != ROM or bool(flags & _ROM_ENABLE))
        if flags & (_IO_REGION | _MEM_REGION) and (end > start or unset):
            yield Bar(
                index=index,
                size=end - start + 1 if end > start else 0,
                prefetchable=bool(flags & _PREFETCH),
                wide=bool(flags & _MEM_64),
                io=bool(flags & _IO_REGION),
                unset=unset,
                start=0 if unset else start,
            )


def _is_awake(bridge: str) -> bool:
    """Whether reading through this bridge wakes nothing. A bridge that cannot say so counts as asleep."""
    state = sysfs.text_or_none(f"{bridge}/power_state")
    if state is None:  # before Linux 5.11 there is no power_state
        return sysfs.text_or_none(f"{bridge}/power/runtime_status") == "active"
    return state == "D0"


def _group_number(folder: str) -> int | None:
    name = sysfs.target_name(f"{folder}/iommu_group")
    if name is None:
        return None
    if not (name.isascii() and name.isdecimal()):
        raise ValueError(f"iommu_group leads to {name!r}, not to a numbered group")
    return int(name)


def _vfio_dev(folder: str) -> VfioDev | None:
    """The first `vfio-dev/vfioN`. Other names there (noiommu ones) stand for no node that could be offered."""
    try:
        with os.scandir(f"{folder}/vfio-dev") as entries:
            found = sorted((e.name, e.inode()) for e in entries if VFIO_DEV.fullmatch(e.name))
    except OSError as error:
        sysfs.refuse_if_out_of_resources(error)
        return None
    if not found:
        return None
    name, inode = found[0]
    numbers = sysfs.text_or_none(f"{folder}/vfio-dev/{name}/dev")
    cdev = numbers if numbers is not None and _DEV_NUMBERS.fullmatch(numbers) else None
    return VfioDev(number=int(name.removeprefix("vfio")), cdev=cdev, binding=inode)


def _virtual_functions(folder: str) -> int:
    """How many SR-IOV virtual functions are enabled; they count from 0 (pci_iov_sysfs_link in drivers/pci/iov.c)."""
    if not os.path.lexists(f"{folder}/virtfn0"):
        return 0
    return sum(name.startswith("virtfn") for name in sysfs.listed(folder))


def _bridges(folder: str, address: str) -> tuple[str, ...]:
    """From where the function's link leads: `../../../devices/pci0000:15/0000:15:01.0/.../<address>`."""
    parts = os.readlink(folder).split("/")
    for index, part in enumerate(parts):
        if _HOST_BRIDGE.fullmatch(part):
            return tuple(p for p in parts[index:-1] if p == part or PCI_ADDRESS.fullmatch(p))
    raise ValueError(f"{address} does not lie below a PCI host bridge")


def _known_node(number: int | None) -> int | None:
    """-1 is "unknown"; the kernel's numbers are ints, and a greater one would spoil the list for all (int64)."""
    return number if number is not None and 0 <= number < 1 << 31 else None


def _hex(text: str, name: str, digits: int) -> int:
    if not _HEX.fullmatch(text) or len(text) > len("0x") + digits:
        raise ValueError(f"{name} is {text[:40]!r}, not a hexadecimal number")
    return int(text, 16)


def _why(error: OSError) -> str:
    name = os.path.basename(str(error.filename or ""))
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing (the function is vanishing, or this is not a PCI function)"
    return f"{name} cannot be read: {error.strerror}"
