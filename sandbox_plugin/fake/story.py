"""The story that `sandbox-plugin demo` plays: what happens to a node, and how the kubelet comes to know.

Each step does something to the fake node or the fake kubelet, and says what the kubelet must see then. How long that
takes is measured, from the cause to the message that shows it. Apart from the command, which only shows it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from sandbox_plugin.fake.kubelet import AdmissionError, FakeKubelet
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.model import PciFunction

PATIENCE = 10.0
"""Seconds for one step; every one of them takes a fraction of that."""
POD = "default/training-vm"
_GPUS, _NVSWITCH = (0x030000, 0x030200), 0x068000
"""Class codes."""


class StoryError(Exception):
    """A step did not happen in time. Says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One step that happened."""

    title: str
    why: str
    """What it matters for, in one line."""
    result: str
    seconds: float | None
    """From the cause to the kubelet's seeing it; None for what the kubelet itself did."""


def counted(number: int, thing: str) -> str:
    """`1 GPU`, `2 GPUs`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def numbered(node: FakeNode) -> list[tuple[int, PciFunction]]:
    """GPUs and NVSwitches that a vfio driver has, each with the number that makes its device ID."""
    return [
        (function.vfio.number if node.kernel.cdevs else function.iommu_group or 0, function)
        for function in node.functions()
        if function.vfio is not None and function.class_code in (*_GPUS, _NVSWITCH)
    ]


def where_ids_begin(node: FakeNode) -> tuple[str, str]:
    """Why the IDs of the GPUs begin where they do: in a few words, and in full."""
    gpus = [number for number, function in numbered(node) if function.class_code in _GPUS]
    switches = [number for number, function in numbered(node) if function.class_code == _NVSWITCH]
    if not node.kernel.cdevs:
        groups = f"This kernel has no VFIO cdevs: an ID is the number of an IOMMU group. The GPUs begin at {min(gpus)}"
        return "IDs are IOMMU groups", f"{groups} because functions before them on the bus have groups too."
    nodes = "An ID is the N of a VFIO node, /dev/vfio/devices/vfioN."
    if not switches:
        return "", nodes
    few = f"{min(switches)} to {max(switches)}"
    full = f"The NVSwitches come first on the bus and have {few}, so the GPUs begin at {min(gpus)}."
    return f"GPUs from {min(gpus)}: NVSwitches have {few}", f"{nodes} {full}"


@dataclass(kw_only=True)
class Story:
    """One play on one node. `started_at` is when the daemon was started, by the same clock."""

    node: FakeNode
    kubelet: FakeKubelet
    started_at: float
    health_interval: float
    clock: Callable[[], float] = time.monotonic
    """The clock of `kubelet.listed_at`, in seconds."""
    _begun: bool = field(default=False, init=False)

    async def chapters(self) -> AsyncIterator[Told]:
        """Plays from the devices' appearing, which happens once, to the pod's end. Raises StoryError.

        What happens to a GPU happens to one that no pod holds. Where there is only one the pod ends before.
        """
        if not self._begun:
            self._begun = True
            yield await self.devices_appear()
        yield await self.pod_takes_gpus()
        pod_ends_early = not self._free()
        if not pod_ends_early:
            async for told in self.gpu_falls_off_and_returns():
                yield told
        yield await self.kubelet_restarts()
        if pod_ends_early:
            yield self.pod_ends("This node has no other GPU: what follows happens to one that no pod holds.")
            async for told in self.gpu_falls_off_and_returns():
                yield told
        async for told in self.gpu_is_rebound():
            yield told
        if not pod_ends_early:
            yield self.pod_ends("There is no Deallocate: the plugin learns it from PodResources.")

    async def devices_appear(self) -> Told:
        count = len(self._bound())
        return await self._seen(
            title="The daemon starts on a node whose GPUs are bound to vfio.",
            why="It finds them in sysfs, writes their CDI specs, and only then registers them.",
            began=self.started_at,
            seen=lambda: len(self._healthy()) == count,
        )

    async def pod_takes_gpus(self) -> Told:
        count = max(1, min(4, len(self.kubelet.healthy(self._gpus)) - 1))
        cause = self.clock()
        try:
            allocation = await self.kubelet.admit(POD, self._gpus, count)
        except AdmissionError as error:
            raise StoryError(f"the pod was not admitted: {error}") from None
        seconds = self.clock() - cause
        for device_id in allocation.ids:
            self.node.set_enable(self._bound()[device_id], 1)
        devices = self.kubelet.devices(self._gpus)
        nodes = sorted({node for device_id in allocation.ids for node in devices[device_id].numa_nodes})
        where = f" on NUMA node {', '.join(map(str, nodes))}" if nodes else ""
        choice = "The plugin prefers GPUs that are close together, and answers with their VFIO nodes."
        return Told(
            title=f"A pod asks for {count} of {self._gpus}.",
            why=choice if count > 1 else "The plugin answers with the VFIO node of the GPU.",
            result=f"it gets {', '.join(sorted(allocation.ids, key=int))}{where}",
            seconds=seconds,
        )

    async def gpu_falls_off_and_returns(self) -> AsyncIterator[Told]:
        device_id, address = self._spare()
        began = self.clock()
        self.node.sicken(address)
        yield await self._seen(
            title=f"GPU {device_id} ({address}) falls off the PCI bus.",
            why=f"No event announces this; the daemon polls every {self.health_interval:g} s here.",
            began=began,
            seen=lambda: device_id not in self._healthy(),
            resource=self._gpus,
        )
        began = self.clock()
        self.node.heal(address)
        yield await self._seen(
            title=f"GPU {device_id} answers again.",
            why="Healthy again after 2 s without trouble, so that an unstable GPU does not flap.",
            began=began,
            seen=lambda: device_id in self._healthy(),
            resource=self._gpus,
        )

    async def kubelet_restarts(self) -> Told:
        before = self._healthy()
        await self.kubelet.stop()
        began = self.clock()
        await self.kubelet.start()
        return await self._seen(
            title="The kubelet restarts, and deletes every socket in its folder.",
            why="The plugin notices by itself, serves again and registers again; the pod keeps its GPUs.",
            began=began,
            seen=lambda: self._healthy() == before,
        )

    async def gpu_is_rebound(self) -> AsyncIterator[Told]:
        device_id, address = self._spare()
        driver = self.node.function(address).driver or "vfio-pci"
        began = self.clock()
        self.node.bind(address, "nvidia")
        yield await self._seen(
            title=f"Somebody binds GPU {device_id} ({address}) to the nvidia driver.",
            why="It stays listed, Unhealthy, until no pod has held it for a minute.",
            began=began,
            seen=lambda: device_id not in self._healthy(),
            resource=self._gpus,
        )
        count = len(self._healthy())
        began = self.clock()
        self.node.bind(address, driver)
        yield await self._seen(
            title=f"And back to {driver}.",
            why="A GPU that was bound a moment ago can be given out now; no restart is needed.",
            began=began,
            seen=lambda: len(self._healthy()) > count,
            resource=self._gpus,
        )

    def pod_ends(self, why: str) -> Told:
        ids = [device_id for allocation in self.kubelet.allocations for device_id in allocation.ids]
        for device_id in ids:
            self.node.set_enable(self._bound()[device_id], 0)
        self.kubelet.remove(POD)
        return Told(
            title="The pod ends.",
            why=why,
            result=f"{', '.join(sorted(ids, key=int))} can be given out again",
            seconds=None,
        )

    # How

    @property
    def _gpus(self) -> str:
        return max(self.kubelet.resources(), key=lambda resource: len(self.kubelet.devices(resource)))

    def _healthy(self) -> set[str]:
        return {device for resource in self.kubelet.resources() for device in self.kubelet.healthy(resource)}

    def _bound(self) -> dict[str, str]:
        """Device ID -> PCI address of what is bound to a vfio driver and is a device of its own."""
        return {str(number): function.address for number, function in numbered(self.node)}

    def _free(self) -> list[str]:
        """GPUs that no pod holds."""
        healthy = sorted(self.kubelet.healthy(self._gpus), key=int)
        return [device_id for device_id in healthy if self.kubelet.holder(self._gpus, device_id) is None]

    def _spare(self) -> tuple[str, str]:
        """The last GPU that no pod holds: its ID and its PCI address."""
        device_id = self._free()[-1]
        return device_id, self._bound()[device_id]

    async def _seen(
        self, *, title: str, why: str, began: float, seen: Callable[[], bool], resource: str | None = None
    ) -> Told:
        """Waits until the kubelet has seen what happened to this resource, or to all of them.

        `began` is when it happened, by `clock`. Raises StoryError.
        """
        try:
            await self.kubelet.wait_for(seen, PATIENCE)
        except TimeoutError:
            raise StoryError(f"the kubelet did not see within {PATIENCE:g} s: {title}") from None
        resources = self.kubelet.resources() if resource is None else [resource]
        counts = [f"{r}: {len(self.kubelet.healthy(r))} of {len(self.kubelet.devices(r))}" for r in resources]
        return Told(
            title=title,
            why=why,
            result=f"{', '.join(counts)} healthy",
            seconds=max(map(self.kubelet.listed_at, resources)) - began,
        )
