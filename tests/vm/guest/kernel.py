"""What a person does to a real kernel: modules, drivers, slots. Each call returns when the kernel has done it."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PCI = Path("/sys/bus/pci")
CDEVS = "SANDBOX_CDEVS" in os.environ
"""Whether this kernel must have VFIO cdevs: the kernel line says so, and a kernel that lost them fails the cases."""
_KOBJECT_UEVENT = 15
"""NETLINK_KOBJECT_UEVENT of include/uapi/linux/netlink.h."""
_SLOT_CONTROL, _POWER_OFF = 0x18, 0x400
"""Slot Control Register in the PCI Express capability, and its Power Controller Control bit (PCIe 6.0, 7.5.3.10)."""


def write(path: Path | str, text: str) -> None:
    """Writes to a sysfs file in one call. Raises OSError with the kernel's answer."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def insert_modules() -> None:
    """Inserts vfio and what belongs to it, in the order in which they need each other."""
    for name in Path("/modules/order").read_text().split():
        if not Path("/sys/module", name).exists():
            subprocess.run(["insmod", f"/modules/{name}.ko"], check=True)


def remove_vfio() -> None:
    """Removes vfio whole, as `modprobe -r` does: in the opposite order."""
    for name in reversed(Path("/modules/order").read_text().split()):
        if Path("/sys/module", name).exists() and ("vfio" in name or name == "irqbypass"):
            subprocess.run(["rmmod", name], check=True)


def driver(address: str) -> str | None:
    try:
        return os.path.basename(os.readlink(PCI / "devices" / address / "driver"))
    except FileNotFoundError:
        return None


def group(address: str) -> str:
    return os.path.basename(os.readlink(PCI / "devices" / address / "iommu_group"))


def device_id(address: str) -> str | None:
    """The ID that means a function: N of its cdev vfioN, and None while it has none; without cdevs its group's number.

    A group keeps its number while nothing is bound. A cdev gets the lowest that is free, anew with every bind.
    """
    if not CDEVS:
        return group(address)
    cdevs = (PCI / "devices" / address / "vfio-dev").glob("vfio*/dev")
    return next((cdev.parent.name.removeprefix("vfio") for cdev in cdevs), None)


def bound_id(address: str) -> str:
    """The same of a function that is bound, to compare with when it is not any more. Raises AssertionError."""
    number = device_id(address)
    if number is None:
        raise AssertionError(f"{address} has no cdev")
    return number


def node(number: str) -> str:
    """The VFIO node that an ID stands for."""
    return f"/dev/vfio/devices/vfio{number}" if CDEVS else f"/dev/vfio/{number}"


def functions_of(number: str) -> list[str]:
    """The functions that vfio-pci holds of the device with this ID: of a cdev one, of a group perhaps several."""
    if CDEVS:
        return [folder.parents[1].name for folder in (PCI / "devices").glob(f"*/vfio-dev/vfio{number}")]
    return members(number)


def members(group_number: str) -> list[str]:
    """The functions of an IOMMU group that vfio-pci holds."""
    found = Path("/sys/kernel/iommu_groups", group_number, "devices").glob("*")
    return sorted(path.name for path in found if driver(path.name) == "vfio-pci")


def bound_functions() -> list[str]:
    """All functions that vfio-pci holds."""
    return sorted(path.name for path in (PCI / "drivers/vfio-pci").glob("*:*"))


def unbind(address: str) -> None:
    if name := driver(address):
        write(PCI / "drivers" / name / "unbind", address)


def bind(address: str, name: str = "vfio-pci") -> None:
    """By driver_override and drivers_probe, as most tools do."""
    unbind(address)
    write(PCI / "devices" / address / "driver_override", name)
    write(PCI / "drivers_probe", address)
    wait_until(lambda: driver(address) == name, f"the bind of {address} to {name}")


def bind_directly(address: str) -> None:
    """By driver_override and the driver's own `bind`."""
    write(PCI / "devices" / address / "driver_override", "vfio-pci")
    write(PCI / "drivers/vfio-pci/bind", address)


def bind_by_new_id(address: str) -> None:
    """By new_id, which binds every function with this ID that has no driver."""
    folder = PCI / "devices" / address
    write(folder / "driver_override", "\n")
    vendor, device = ((folder / name).read_text().strip().removeprefix("0x") for name in ("vendor", "device"))
    with new_id(f"{vendor} {device}"):
        pass


@contextmanager
def new_id(vendor_and_device: str) -> Iterator[None]:
    """For as long as it lasts vfio-pci takes every function with this ID that has no driver, also one that comes."""
    write(PCI / "drivers/vfio-pci/new_id", vendor_and_device)
    try:
        yield
    finally:
        write(PCI / "drivers/vfio-pci/remove_id", vendor_and_device)


def announce(address: str) -> None:
    """Makes the kernel send a uevent about a function, without anything having changed."""
    write(PCI / "devices" / address / "uevent", "change")


@contextmanager
def events() -> Iterator[list[float]]:
    """When, by the monotonic clock, the kernel's uevents came, for as long as it lasts."""
    moments: list[float] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _KOBJECT_UEVENT) as netlink:
        netlink.bind((0, 1))
        stop, stopped = socket.socketpair()

        def listen() -> None:
            while stop not in (ready := select.select([netlink, stop], [], [])[0]):
                moments.append(time.monotonic())
                ready[0].recv(65536)

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            yield moments
        finally:
            stopped.close()
            listener.join()
            stop.close()


def hot_add(name: str) -> None:
    """A new device in the empty slot."""
    _ask_machine("device_add", driver="edu", id=name, bus="rp3")


def hot_remove(name: str) -> None:
    _ask_machine("device_del", id=name)


def _ask_machine(command: str, **arguments: str) -> None:
    print("@@QMP " + json.dumps({"execute": command, "arguments": arguments}), flush=True)


def cut_power(port: str) -> Callable[[], None]:
    """Cuts the power of the slot below a root port, with no event for anybody. Returns what gives it back."""
    descriptor = os.open(PCI / "devices" / port / "config", os.O_RDWR)
    config = os.pread(descriptor, 256, 0)
    place = config[0x34]
    while config[place] != 0x10:
        place = config[place + 1]
    (before,) = struct.unpack_from("<H", config, place + _SLOT_CONTROL)
    os.pwrite(descriptor, struct.pack("<H", before | _POWER_OFF), place + _SLOT_CONTROL)

    def give_back() -> None:
        os.pwrite(descriptor, struct.pack("<H", before), place + _SLOT_CONTROL)
        os.close(descriptor)

    return give_back


def inject_aer(address: str, status: int) -> None:
    """Injects an uncorrectable error by the aer_inject module (drivers/pci/pcie/aer_inject.c). Raises OSError."""
    domain, bus, place = address.split(":")
    slot, function = place.split(".")
    record = struct.pack("<3Bx7I", int(bus, 16), int(slot, 16), int(function), status, 0, 0, 0, 0, 0, int(domain, 16))
    write_bytes("/dev/aer_inject", record)


def write_bytes(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def wait_until(predicate: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """For what the kernel does in its own time. Raises AssertionError."""
    deadline = time.monotonic() + seconds
    while not predicate():
        expect(time.monotonic() < deadline, f"{what} did not happen in {seconds:g} s")
        time.sleep(0.005)


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)
