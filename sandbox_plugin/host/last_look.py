"""The last look at devices before an Allocate gives them to a pod: what the latest scan saw may have changed since."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress

from sandbox_plugin.host import bus, sysfs
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.pci_function import FunctionUnreadable, is_a_vms, read_function
from sandbox_plugin.host.sweep import SILENCE
from sandbox_plugin.host.threads import DaemonThreads
from sandbox_plugin.model import Device, Objection, PciFunction, Placement, group_of_node, node_of_cdev

_threads = DaemonThreads("last-look")


class LastLook:
    """Looks at devices once more, before they are given away.

    There is one look at a device at a time. Who asks while it goes on waits for its answer too; while it hangs, the
    device is refused at once. So a device that hangs costs one thread, however often it is asked for. `on_refusal` is
    called for whatever speaks against a device: a scan should see it too.
    """

    def __init__(self, paths: HostPaths, patience: float, *, on_refusal: Callable[[], None] = lambda: None) -> None:
        self._paths = paths
        self._patience = patience
        self._on_refusal = on_refusal
        self._unanswered: dict[tuple[str, str], tuple[float, Future[Objection | None]]] = {}
        """Node and PCI address -> when the look at that device began, in monotonic seconds, and its answer to come. The
        address too, because a number may be another device's by now."""

    async def __call__(self, devices: Sequence[Device]) -> dict[str, Objection]:
        """By ID, what speaks against giving these devices away now.

        Takes `patience` seconds at most; a device that has not answered by then is one of those.
        """
        now = time.monotonic()
        looks = {device.id: self._look(device, now) for device in devices}
        in_time = {
            device_id: answer for device_id, (began_at, answer) in looks.items() if now - began_at < self._patience
        }
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                await asyncio.gather(*map(asyncio.wrap_future, in_time.values()), return_exceptions=True)
        self._unanswered = {key: look for key, look in self._unanswered.items() if not look[1].done()}
        against = {}
        for device_id in looks:
            answer = in_time.get(device_id)
            # The thread's own word: a loop that is busy hears of it later.
            why = answer.result() if answer is not None and answer.done() else Objection(why=SILENCE)
            if why is not None:
                against[device_id] = why
        if against:
            self._on_refusal()
        return against

    def _look(self, device: Device, now: float) -> tuple[float, Future[Objection | None]]:
        key = (device.node, device.address)
        if key not in self._unanswered or self._unanswered[key][1].done():
            try:
                answer = _threads.submit(objection, self._paths, device)
            except OSError as error:
                answer = Future()
                answer.set_result(Objection(why=f"it cannot be looked at: {error.strerror}"))
            self._unanswered[key] = (now, answer)
        return self._unanswered[key]


def objection(paths: HostPaths, device: Device) -> Objection | None:
    """What speaks against giving this device away now, or None. Blocks, and may hang in the kernel."""
    placements = {placement.address: placement for placement in device.placements}
    used = set()
    try:
        for address, placement in placements.items():
            function = read_function(paths, address)
            if why := _why_unfit(paths, device, placement, function):
                return Objection(why=why)
            if function.enable == 1:
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


def _why_unfit(paths: HostPaths, device: Device, was: Placement, function: PciFunction) -> str | None:
    """Why one function of the device, which `was` so in the latest scan, cannot be given to a VM now; or None."""
    if function.driver is None or not function.is_held_by_vfio:
        return f"{function.address} is bound to {function.driver or 'no driver'} now"
    if not _has_node(paths, device, function):
        return f"{device.node} is gone"
    if None not in (function.binding, was.binding) and function.binding != was.binding:
        return f"{function.address} was bound again, or made again with another type"
    if sysfs.text_or_none(f"{paths.pci_devices}/{function.address}/nvidia/current_vgpu_type") == "0":
        return f"{function.address} has no vGPU type: every open fails"
    if why := function.silence:
        return f"{function.address} does not answer on the PCI bus now ({why})"
    return None


def _has_node(paths: HostPaths, device: Device, function: PciFunction) -> bool:
    if device.is_cdev:
        vfio = function.vfio
        return vfio is not None and vfio.cdev is not None and device.node == node_of_cdev(vfio.number)
    return group_of_node(device.node) in bus.read_group_nodes(paths)[0]
