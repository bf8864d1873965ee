"""The last look at devices before an Allocate gives them to a pod: what the latest scan saw may have changed since.

All pod admission of the node waits for it, so it reads no more than what decides whether a VM can open the devices now.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from sandbox_plugin.host import sysfs
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.pci_function import FunctionNow, FunctionUnreadable, driver_of, is_a_vms, read_again
from sandbox_plugin.host.sweep import SILENCE
from sandbox_plugin.host.threads import DaemonThreads
from sandbox_plugin.model import (
    Device,
    Objection,
    PciFunction,
    Placement,
    VfioDev,
    group_of_node,
    is_vfio_driver,
    node_of_cdev,
)

_threads = DaemonThreads("last-look")

Functions = Mapping[str, PciFunction]
"""By address, as the latest scan saw them."""


class LastLook:
    """Looks at devices once more, before they are given away.

    A device at which a look hangs is refused, and until that look has ended it is refused at once: so it costs one
    thread, however often it is asked for. `on_refusal` is called for whatever speaks against a device: a scan should
    see it too.
    """

    def __init__(self, paths: HostPaths, patience: float, *, on_refusal: Callable[[], None] = lambda: None) -> None:
        self._paths = paths
        self._patience = patience
        self._on_refusal = on_refusal
        self._hanging: set[tuple[str, str]] = set()
        """Node and PCI address of the devices at which looks hang. The address too, because a number may be another
        device's by now."""

    async def __call__(self, devices: Sequence[Device], functions: Functions) -> Mapping[str, Objection]:
        """By ID, what speaks against giving these devices away now. Takes `patience` seconds at most."""
        hanging = [device for device in devices if (device.node, device.address) in self._hanging]
        against = {d.id: Objection(why=SILENCE) for d in hanging} or await self._look(devices, functions)
        if against:
            self._on_refusal()
        return against

    async def _look(self, devices: Sequence[Device], functions: Functions) -> Mapping[str, Objection]:
        look = _Look(self._paths, devices, functions)
        try:
            answer = _threads.submit(look.run)
        except OSError as error:
            why = f"it cannot be looked at: {error.strerror}"
            return {device.id: Objection(why=why) for device in devices}
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                return await asyncio.wrap_future(answer)
        if answer.done():  # a loop that was busy hears of it later
            return answer.result()
        look.is_wanted = False
        at = look.at
        self._hanging.add((at.node, at.address))
        loop = asyncio.get_running_loop()

        def ended(_: Future[Mapping[str, Objection]]) -> None:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._hanging.discard, (at.node, at.address))

        answer.add_done_callback(ended)
        return {at.id: Objection(why=SILENCE)}


@dataclass(eq=False, repr=False)
class _Look:
    """A look at some devices, one after the other. For a thread: it blocks, and may hang in the kernel."""

    paths: HostPaths
    devices: Sequence[Device]
    functions: Functions
    at: Device = field(init=False)
    """Which one is being looked at."""
    is_wanted: bool = True
    """Set to False by whoever waits no more."""

    def __post_init__(self) -> None:
        self.at = self.devices[0]

    def run(self) -> Mapping[str, Objection]:
        against = {}
        for device in self.devices:
            self.at = device
            if self.is_wanted and (found := objection(self.paths, device, self.functions)):
                against[device.id] = found
        return against


def objection(paths: HostPaths, device: Device, functions: Functions) -> Objection | None:
    """What speaks against giving this device away now, or None. Blocks, and may hang in the kernel."""
    placements = {placement.address: placement for placement in device.placements}
    used = set()
    address = device.address
    try:
        for address, placement in placements.items():
            was = functions[address]
            now = read_again(paths, was)
            if why := _why_unfit(paths, device, placement, now) or _why_no_vgpu(paths, was, now):
                return Objection(why=why)
            if now.enable == 1:
                used.add(address)
        # Of its mates no more than that is read: they may hang, or be gone.
        used |= {other for other in device.group_functions if other not in placements and is_a_vms(paths, other)}
    except FunctionUnreadable as error:
        return Objection(why=f"{address}: {error}")
    except sysfs.OutOfResources as error:
        return Objection(why=f"it cannot be looked at: {error}")
    if not used:
        return None
    names = " and ".join(sorted(used))  # a group's DMA has one owner
    detail = f"{names} in its IOMMU group {device.iommu_group} is in use (enable is 1) by a VM that has not ended"
    return Objection(why=detail, in_use=frozenset(used))


def _why_unfit(paths: HostPaths, device: Device, was: Placement, now: FunctionNow) -> str | None:
    """Why one function of the device, which `was` so in the latest scan, cannot be given to a VM now; or None."""
    binding = None if now.vfio is None else now.vfio.binding
    if now.driver is None or not (now.vfio is not None or is_vfio_driver(now.driver)):
        return f"{was.address} is bound to {now.driver or 'no driver'} now"
    if not _has_node(paths, device, now.vfio):
        return f"{device.node} is gone"
    if None not in (binding, was.binding) and binding != was.binding:
        return f"{was.address} was bound again, or made again with another type"
    if now.silence is not None:
        return f"{was.address} does not answer on the PCI bus now ({now.silence})"
    return None


def _why_no_vgpu(paths: HostPaths, was: PciFunction, now: FunctionNow) -> str | None:
    """Why a vGPU on its vendor's driver is not the one that the latest scan saw; None for any other function."""
    if not was.is_vendors_vgpu:
        return None
    if now.vgpu_type in (None, "0"):
        return f"{was.address} has no vGPU type: every open fails"
    if now.vgpu_type != was.vgpu_type:
        return f"{was.address} has vGPU type {now.vgpu_type} now, and had {was.vgpu_type or 'none'}"
    driver = driver_of(paths, was.physical_function or "")
    if driver is None or is_vfio_driver(driver):
        return f"its physical function {was.physical_function} is bound to {driver or 'no driver'}: every open fails"
    return None


def _has_node(paths: HostPaths, device: Device, vfio: VfioDev | None) -> bool:
    if device.is_cdev:
        return vfio is not None and vfio.cdev is not None and device.node == node_of_cdev(vfio.number)
    return os.path.lexists(f"{paths.vfio_class}/{group_of_node(device.node)}")
