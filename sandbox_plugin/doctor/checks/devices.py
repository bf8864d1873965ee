"""The GPUs, NVSwitches and whatever else a resource rule takes: bound, alone in their group, and in order.

What speaks against a device is judged by the inventory, as for the daemon; here is what to do about it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from sandbox_plugin.doctor.findings import Finding, Group, Teller
from sandbox_plugin.doctor.node import Displays, Node, Unread
from sandbox_plugin.inventory.faults import LOST_BARS, NO_RESET, remarks
from sandbox_plugin.inventory.functions import is_vfio_bound, what_they_carry
from sandbox_plugin.inventory.vgpu_types import NO_TYPES
from sandbox_plugin.model import Device, PciFunction, Reason

_tell = Teller(Group.DEVICES)
_BIND = "Run `sandbox-plugin vfio bind {}`, or exclude it by a resource rule."
_ROOM = "Switch on `Above 4G Decoding` in the firmware's setup; if it is on, boot with pci=realloc."
_SLOT = "Look at dmesg; power-cycle the slot or the node."
_FOUR_GIB = 1 << 32
_DISPLAY = 0x03
"""Base class of GPUs."""
_TO_DO = {
    Reason.NOT_VIABLE: ("group", "Run `sandbox-plugin vfio bind {}`: it takes the whole group."),
    Reason.FIRMWARE_MAPPING: (
        "firmware-mapping",
        "Update the firmware, or switch off there what wants it: remote management that shares memory (RMRR), or DMA "
        "protection before the boot (IVMD).",
    ),
    Reason.OFF_THE_BUS: ("answers", _SLOT),
    Reason.NO_ADDRESS: ("bars", _ROOM),
    Reason.NO_NODE: ("node", "Bind the device again, or restart udev."),
}
"""Reason -> the check, and what to do; `{}` is the address. Others are no defects, or said elsewhere."""


def findings(node: Node) -> Iterator[Finding]:
    if node.host.unreachable is not None:
        yield _tell.fail(
            "pci-bus", f"it cannot be read: {node.host.unreachable}", "Look at dmesg, and reboot the node."
        )
        return
    functions = [function for function in node.host.functions.values() if _is_wanted(node, function)]
    if not functions and not node.inventory.unoffered:
        action = "Look at `lspci -nn -d 10de:`; other vendors' devices need a resource rule."
        yield _tell.fail("found", "no GPU, NVSwitch or other device that a resource rule takes", action)
        return
    devices = [device for listed in node.inventory.resources.values() for device in listed]
    if functions:
        yield _tell.passed("found", _count(node, functions))
    yield from _unreadable(node)
    if not node.has_iommu:
        yield _tell.unseen("driver", "not judged without an IOMMU")
        return
    not_offered = list(_not_offered(node))
    yield from not_offered
    if not not_offered and node.has_vfio:
        yield _tell.passed("driver", f"{_counted(len(devices), 'device')} on a vfio driver")
    elif not not_offered:
        yield _tell.unseen("driver", "not judged without a vfio driver")
    yield from _faults(devices)
    yield from _groups(node, devices)
    bound = [f for f in functions if f.is_held_by_vfio and not f.is_vendors_vgpu]  # those their own driver resets
    yield from _state(bound)
    if not isinstance(node.displays, Unread):
        yield from _display(node.displays, {function.address for function in functions})


def _is_wanted(node: Node, function: PciFunction) -> bool:
    found = node.inventory.memory.found
    offer = node.rules.offer(function, found.type_names if found is not None else NO_TYPES)
    return offer is not None and offer.resource is not None


def _count(node: Node, functions: Sequence[PciFunction]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for function in functions:
        counts[node.rules.names.describe(*function.model_id)] += 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _unreadable(node: Node) -> Iterator[Finding]:
    for address, why in node.host.unreadable.items():
        action = "Wait a minute: it may be in a reset. If it stays, restart the node cold."
        yield _tell.fail("readable", f"{address} cannot be read: {why}", action)


# Which are no devices


def _not_offered(node: Node) -> Iterator[Finding]:
    """One finding for all that have the same reason."""
    carried = what_they_carry(node.host)
    has_driver = node.has_vfio
    by_reason: dict[str, list[PciFunction]] = defaultdict(list)
    for address, why in node.inventory.unoffered.items():
        function = node.host.functions.get(address)
        if function is None or not _is_wanted(node, function):
            continue  # said by `_unreadable`, or left out on purpose
        if function.address in carried or function.virtual_functions:
            continue  # what it carries is offered instead
        if function.is_vendors_vgpu and function.vgpu_type in (None, "0"):
            continue  # no vGPU yet
        if function.driver is None and not has_driver:
            continue  # follows from that
        by_reason[why].append(function)
    for why, functions in by_reason.items():
        addresses = [function.address for function in functions]
        yield _tell.fail("driver", f"{_some(addresses)}: {why}", _how_to_offer(node, functions))


def _how_to_offer(node: Node, functions: Sequence[PciFunction]) -> str:
    first = functions[0]
    if first.is_vendors_vgpu:
        return f"Bind {first.physical_function} to its vendor's driver."
    if not is_vfio_bound(first, node.host):
        if len(functions) < 3:
            return _BIND.format(" ".join(f.address for f in functions))
        return _BIND.format("--all --switches" if any(f.class_code >> 16 != _DISPLAY for f in functions) else "--all")
    if first.iommu_group is None or node.host.groups[first.iommu_group].noiommu:
        return "Switch on the IOMMU for it; look in dmesg for its address."
    if node.host.kernel_has_cdevs and (first.vfio is None or first.vfio.cdev is None):
        return "Look again in a moment."
    return "Exclude none of its IOMMU group by rules, or use a kernel with VFIO cdevs."


# What speaks against those that are


def _faults(devices: Sequence[Device]) -> Iterator[Finding]:
    """One finding for each fault; a sibling that spoils a group is named once."""
    said: set[str] = set()
    for device in devices:
        reason, detail = device.health.reason, device.health.detail
        if reason not in _TO_DO or detail in said:
            continue
        said.add(detail)
        check, action = _TO_DO[reason]
        seen = detail if device.address in detail else f"{device.address}: {detail}"
        yield _tell.fail(check, seen, action.format(device.address))


def _groups(node: Node, devices: Sequence[Device]) -> Iterator[Finding]:
    """GPUs of several slots in one group: nothing between them keeps them apart (ACS)."""
    by_group: dict[int, set[str]] = defaultdict(set)
    for device in devices:
        for placement in device.placements:
            if node.host.functions[placement.address].class_code >> 16 == _DISPLAY and not device.mdev:
                by_group[device.iommu_group].add(placement.address)
    shared = {number: slots for number, slots in by_group.items() if len({a.rpartition(".")[0] for a in slots}) > 1}
    for number, addresses in shared.items():
        seen = f"{_some(sorted(addresses))} share IOMMU group {number}: only one VM can have any of them"
        yield _tell.warn("acs", seen, "Switch on ACS in the firmware's setup, or use slots below other root ports.")
    if by_group and not shared:
        yield _tell.passed("acs", "no two GPUs share an IOMMU group")


def _state(functions: Sequence[PciFunction]) -> Iterator[Finding]:
    """BARs and resets, as the inventory remarks on them."""
    lost = [f.address for f in functions if LOST_BARS in remarks(f)]
    stuck = [f.address for f in functions if NO_RESET in remarks(f)]
    if lost:
        yield _tell.warn("bars", f"{_some(lost)}: {LOST_BARS}", _ROOM)
    largest = max((bar for f in functions for bar in f.bars if not bar.unset), key=lambda bar: bar.size, default=None)
    if largest is not None and not lost and not any(bar.unset for f in functions for bar in f.bars):
        where = "above" if largest.start >= _FOUR_GIB else "below"
        yield _tell.passed("bars", f"all have addresses, the largest ({_size(largest.size)}) {where} 4G")
    if stuck:
        action = "Give it only to VMs that trust each other, or restart the node between them."
        yield _tell.warn("reset", f"{_some(stuck)}: {NO_RESET}", action)
    elif functions:
        methods = {method for f in functions for method in f.reset_methods or ()}
        yield _tell.passed("reset", ", ".join(sorted(methods)) or "this kernel does not tell how")


def _display(displays: Displays, ours: set[str]) -> Iterator[Finding]:
    for screen in displays.screens:
        address = screen.address or displays.boot_gpu
        if address in ours:
            seen = f"{screen.name} (driver {screen.driver}) draws the host's console on {address}"
            action = "Boot with initcall_blacklist=sysfb_init, or choose another display in the firmware's setup."
            yield _tell.warn("console", seen, action)
    if resizable := len(displays.resizable):
        yield _tell.passed(
            "resizable-bars", f"{_counted(resizable, 'function')}; sizes are not read, as that wakes them"
        )


def _some(addresses: Sequence[str]) -> str:
    shown = ", ".join(addresses[:3])
    return shown if len(addresses) <= 3 else f"{shown} and {len(addresses) - 3} more"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _size(size: int) -> str:
    """In the unit that people would use."""
    for shift, name in ((30, "GiB"), (20, "MiB")):
        if size >> shift:
            return f"{size >> shift} {name}"
    return f"{size >> 10} KiB"
