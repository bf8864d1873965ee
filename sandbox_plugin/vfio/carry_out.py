"""Carries plans out: writes, looks whether it helped, and puts a group back as it was if it did not."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from sandbox_plugin.host import bus
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.pci_function import FunctionUnreadable, driver_of, is_a_vms, read_function
from sandbox_plugin.model import PciFunction, is_vfio_driver, node_of_cdev, node_of_group
from sandbox_plugin.vfio.plan import PCI, Change, GroupPlan, Write

_NO_OVERRIDE = "(null)"
"""What `driver_override` reads as where none is set."""


class Kernel(Protocol):
    """Takes writes to sysfs, and loads modules: a real kernel, or a fake node's."""

    def write(self, path: str, text: str) -> None:
        """Raises OSError with the kernel's answer, TimeoutError where it does not answer."""

    def read(self, path: str) -> str:
        """Raises as `write` does."""

    def load(self, module: str) -> None:
        """Raises OSError that says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What has become of one group."""

    lines: tuple[str, ...]
    """One for each function that was changed, or that is to blame."""
    failed: bool = False


class Failure(Exception):
    """Why a change did not come to its end."""

    def __init__(self, address: str, why: str, *, waits: bool = False) -> None:
        super().__init__(f"{address}: {why}")
        self.address = address
        self.waits = waits
        """Whether the kernel still waits with it: nothing can be put back then."""


def carry_out(plan: GroupPlan, kernel: Kernel, paths: HostPaths, *, force: bool) -> Outcome:
    """Changes one group, as a whole or not at all, as far as the kernel lets it."""
    try:
        for module in plan.modules:
            kernel.load(module)
    except OSError as error:
        return Outcome(lines=(f"nothing is changed: {error.strerror}",), failed=True)
    begun: list[tuple[Change, str]] = []
    try:
        for change in plan.changes:
            override = _override(change.address, kernel)
            for write in change.writes:
                _write(write, change, kernel, paths, force=force)
                if write is change.writes[0]:
                    begun.append((change, override))
        # Only when all are done: the last of them may bring the node of a group.
        lines = [_verified(change, paths) for change in plan.changes]
    except Failure as failure:
        return Outcome(lines=(str(failure), *_put_back(begun, kernel, paths, failure)), failed=True)
    except BaseException:  # Ctrl-C
        _put_back(begun, kernel, paths)
        raise
    return Outcome(lines=tuple(lines))


def _override(address: str, kernel: Kernel) -> str:
    """What `driver_override` says before; empty for nothing. Raises Failure."""
    try:
        text = kernel.read(f"{PCI}/devices/{address}/driver_override")
    except OSError as error:
        raise _failure(address, "driver_override", error) from None
    return "" if text == _NO_OVERRIDE else text


def _write(write: Write, change: Change, kernel: Kernel, paths: HostPaths, *, force: bool) -> None:
    """Raises Failure."""
    if write.path.endswith("/unbind") and not force and _is_taken(change, paths):
        raise Failure(change.address, "a VM has just taken it")
    try:
        kernel.write(write.path, write.text)
    except OSError as error:
        raise _failure(change.address, write.path.rpartition("/")[2], error) from None


def _is_taken(change: Change, paths: HostPaths) -> bool:
    return is_vfio_driver(change.before) and is_a_vms(paths, change.address)


def _failure(address: str, where: str, error: OSError) -> Failure:
    if isinstance(error, TimeoutError):
        why = f"the kernel waits in {where} until whoever uses it lets go ({error.strerror}); then do this again"
        return Failure(address, why, waits=True)
    return Failure(address, f"{where}: {error.strerror}")


def _verified(change: Change, paths: HostPaths) -> str:
    """What a function has become, in words. Raises Failure unless it is what was wanted."""
    try:
        function = read_function(paths, change.address)
    except FunctionUnreadable as error:
        raise Failure(change.address, str(error)) from None
    driver = function.driver
    if change.after is None:
        if is_vfio_driver(driver):
            raise Failure(change.address, f"{driver} takes it again, by the IDs that it was given (new_id, modprobe.d)")
        return f"{change.address}: {driver or 'no driver takes it'}"
    if driver != change.after:
        raise Failure(change.address, f"{change.after} did not take it ({driver or 'no driver'} has it): see dmesg")
    if not is_vfio_driver(driver):
        return f"{change.address}: {driver}"
    node = _node(function, paths)
    if node is None:
        raise Failure(change.address, f"{driver} has it, and there is no VFIO node")
    return f"{change.address}: {driver}, {node}"


def _node(function: PciFunction, paths: HostPaths) -> str | None:
    """The node that sysfs shows, and that /dev shows where it is the host's own."""
    groups = bus.read_group_nodes(paths)[0]
    nodes = [node_of_group(function.iommu_group)] if function.iommu_group in groups else []
    if function.vfio is not None and function.vfio.cdev is not None:
        nodes.insert(0, node_of_cdev(function.vfio.number))
    there = bus.read_dev_nodes(paths)
    return next((node for node in nodes if there is None or node in there), None)


def _put_back(
    begun: Iterable[tuple[Change, str]], kernel: Kernel, paths: HostPaths, failure: Failure | None = None
) -> list[str]:
    """Undoes what was begun, the last first. Returns a line for each function."""
    lines = []
    for change, override in reversed(list(begun)):
        address = change.address
        if failure is not None and failure.waits and address == failure.address:
            continue
        try:
            _restore(change, override, kernel, paths)
        except OSError as error:
            lines.append(f"{address}: cannot be put back: {error.strerror}")
            continue
        driver = driver_of(paths, address)
        is_back = driver == change.before
        lines.append(f"{address}: {'back to' if is_back else 'not as it was, but with'} {driver or 'no driver'}")
    return lines


def _restore(change: Change, override: str, kernel: Kernel, paths: HostPaths) -> None:
    """The override first: without it the driver of before would not match. Raises OSError."""
    address, now = change.address, driver_of(paths, change.address)
    kernel.write(f"{PCI}/devices/{address}/driver_override", override or "\n")
    if now == change.before:
        return
    if now is not None:
        kernel.write(f"{PCI}/drivers/{now}/unbind", address)
    if change.before is not None:
        with suppress(FileNotFoundError):  # its module was removed meanwhile
            kernel.write(f"{PCI}/drivers/{change.before}/bind", address)
