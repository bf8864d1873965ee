"""The story that `sandbox-plugin demo --dra` plays: a claim on GPUs of a node, and what happens to it.

As in `story.py` each step does something, and says what must be seen then, and how long that took. What is seen: the
slices that the API server has, what the kubelet hears from the driver, and the CDI specs on disk. Which devices there
are, and at which addresses, the story knows from the slices alone, as a scheduler does.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox_plugin.api import dra_v1
from sandbox_plugin.fake.api_server import CLAIMS, FakeApiServer
from sandbox_plugin.fake.dra_kubelet import DraKubelet, NotPreparedError
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.scheduler import (
    Object,
    Unschedulable,
    allocate,
    attribute,
    complete_pool,
    devices_of,
    is_kept_back,
    with_status,
)
from sandbox_plugin.fake.story import POD, StoryError, Told, counted, numbered

_PATIENCE = 30.0
"""Seconds for one step; every one of them takes a fraction of that."""
NAMESPACE, VM = POD.split("/")
CLAIM = "training-gpus"
OTHER_VM, OTHER_CLAIM = "other-vm", "same-gpu-again"
_NUMA, _ADDRESS = "resource.kubernetes.io/numaNode", "resource.kubernetes.io/pciBusID"


@dataclass(kw_only=True)
class ClaimsStory:
    """One play on one node. `started_at` is when the daemon was started, by the same clock."""

    node: FakeNode
    api: FakeApiServer
    kubelet: DraKubelet
    cdi_dir: Path
    started_at: float
    health_interval: float
    clock: Callable[[], float] = time.monotonic
    _begun: bool = field(default=False, init=False)
    _lost: str = field(default="", init=False)
    """The device that fell off the bus."""

    async def chapters(self) -> AsyncIterator[Told]:
        """Plays from the slices' appearing, which happens once, to the last GPU's return. Raises StoryError."""
        if not self._begun:
            self._begun = True
            yield await self.slices_appear()
        yield await self.pod_gets_gpus()
        yield await self.gpu_is_not_given_twice()
        yield await self.kubelet_restarts()
        yield await self.gpu_falls_off()
        yield await self.pod_ends()
        yield await self.gpu_returns()
        async for told in self.gpu_is_rebound():
            yield told

    async def slices_appear(self) -> Told:
        return await self._all_is_well(
            title="The daemon starts on a node whose GPUs are bound to vfio.",
            why="It publishes them as ResourceSlices, and the kubelet finds it by its socket in plugins_registry.",
            began=self.started_at,
        )

    async def pod_gets_gpus(self) -> Told:
        count = max(1, min(4, len(self._gpus()) - 1))
        try:
            claim = allocate(_claim(CLAIM, count), self.api.slices(), self.api.claims(), VM)
        except Unschedulable as error:
            raise StoryError(f"the pod was not scheduled: {error}") from None
        self.api.put(CLAIMS, claim)
        began = self.clock()
        try:
            devices = await self.kubelet.prepare(POD, CLAIM)
        except NotPreparedError as error:
            raise StoryError(f"the pod did not start: {error}") from None
        seconds = self.clock() - began
        self._nodes(devices)
        for device in self._claimed():
            self.node.set_enable(attribute(device, _ADDRESS), 1)
        first, numa = self._claimed()[0], {attribute(device, _NUMA) for device in self._claimed()} - {None}
        addresses = ", ".join(map(_short, self._claimed()))
        where = f" on NUMA node {', '.join(map(str, sorted(numa)))}" if numa else ""
        return Told(
            title=f"A pod asks by a claim for {counted(count, 'GPU')}{' of one NUMA node' if count > 1 else ''}.",
            why="The scheduler chooses in the slices, and the kubelet has the plugin prepare the claim.",
            result=f"it gets {addresses}{where}; nodes of {_short(first)}: {', '.join(self._nodes(devices[:1]))}",
            seconds=seconds,
        )

    async def gpu_is_not_given_twice(self) -> Told:
        (first, *_) = self._claimed()
        results = [{**result, "request": "gpu1"} for result in self._results() if result["device"] == first["name"]]
        self.api.put(CLAIMS, with_status(_claim(OTHER_CLAIM, 1), results, OTHER_VM))
        began = self.clock()
        try:
            await self.kubelet.prepare(f"{NAMESPACE}/{OTHER_VM}", OTHER_CLAIM)
        except NotPreparedError as error:
            refusal = str(error).partition(f"{OTHER_CLAIM}: ")[2]
        else:
            raise StoryError(f"two claims have {first['name']}")
        if f"{NAMESPACE}/{CLAIM}" not in refusal:
            raise StoryError(f"the second claim was not refused because of the first: {refusal}")
        return Told(
            title=f"A second claim names {_short(first)} too, as if the scheduler had gone wrong.",
            why="A GPU has one holder: the plugin refuses, and the pod's events say why.",
            result=refusal,
            seconds=self.clock() - began,
        )

    async def kubelet_restarts(self) -> Told:
        await self._give_back(OTHER_VM, OTHER_CLAIM)
        await self.kubelet.stop()
        began = self.clock()
        await self.kubelet.start()
        told = await self._all_is_well(
            title="The kubelet restarts, and deletes the slices of its node.",
            why="The plugin publishes them again, and the kubelet finds the driver again; the VM keeps its GPUs.",
            began=began,
        )
        self._nodes(self._prepared())
        return told

    async def gpu_falls_off(self) -> Told:
        device = self._claimed()[0]
        self._lost = device["name"]
        began = self.clock()
        self.node.sicken(attribute(device, _ADDRESS))
        return await self._device_changes(
            title=f"GPU {_short(device)} falls off the PCI bus, while the VM has it.",
            why=f"No event tells, so the daemon polls, every {self.health_interval:g} s here. What the kubelet hears "
            "stands in the pod's status.",
            began=began,
            name=self._lost,
            is_well=False,
        )

    async def pod_ends(self) -> Told:
        for device in self._claimed():
            self.node.set_enable(attribute(device, _ADDRESS), 0)
        count = len(self._specs())
        began = self.clock()
        await self._give_back(VM, CLAIM)
        seconds = self.clock() - began
        if left := self._specs():
            raise StoryError(f"CDI specs of the claim are left: {', '.join(left)}")
        return Told(
            title="The pod ends.",
            why="The kubelet has the claim unprepared. Its GPUs are free when no VM is seen on them any more.",
            result=f"{counted(count, 'CDI spec')} of the claim removed, none is left",
            seconds=seconds,
        )

    async def gpu_returns(self) -> Told:
        device = self._device(self._lost)
        began = self.clock()
        self.node.heal(attribute(device, _ADDRESS))
        return await self._device_changes(
            title=f"GPU {_short(device)} answers again.",
            why="Healthy again after 2 s without trouble, so that an unstable GPU does not flap.",
            began=began,
            name=self._lost,
            is_well=True,
        )

    async def gpu_is_rebound(self) -> AsyncIterator[Told]:
        device = self._gpus()[-1]
        address = attribute(device, _ADDRESS)
        driver = self.node.function(address).driver or "vfio-pci"
        began = self.clock()
        self.node.bind(address, "nvidia")
        yield await self._device_changes(
            title=f"Somebody binds GPU {_short(device)} to the nvidia driver.",
            why="It stays in the slice for a minute, with a taint that keeps the scheduler from it.",
            began=began,
            name=device["name"],
            is_well=False,
            because="nvidia",
        )
        began = self.clock()
        self.node.bind(address, driver)
        yield await self._device_changes(
            title=f"And back to {driver}.",
            why="Its name comes from its PCI address, so a claim that names it stays good.",
            began=began,
            name=device["name"],
            is_well=True,
        )

    # What is there

    def _devices(self) -> list[Object]:
        return devices_of(complete_pool(self.api.slices()))

    def _gpus(self) -> list[Object]:
        return [device for device in self._devices() if attribute(device, "type") == "gpu"]

    def _device(self, name: str) -> Object:
        return next(device for device in self._devices() if device["name"] == name)

    def _results(self) -> list[dict[str, Any]]:
        """What the claim of the VM was allocated."""
        claim = self.api.find(CLAIMS, CLAIM, NAMESPACE)
        assert claim is not None
        results: list[dict[str, Any]] = claim["status"]["allocation"]["devices"]["results"]
        return results

    def _claimed(self) -> list[Object]:
        """The devices of that claim."""
        return [self._device(result["device"]) for result in self._results()]

    def _prepared(self) -> Sequence[dra_v1.Device]:
        """The same, as the kubelet had them from the driver."""
        return next(info.devices for info in self.kubelet.claims.values() if info.claim.name == CLAIM)

    def _nodes(self, devices: Sequence[dra_v1.Device]) -> list[str]:
        """The nodes that a container gets by the CDI names of these devices. Raises StoryError if one is not there."""
        specs = [json.loads(path.read_text()) for path in self.cdi_dir.glob("*.json")]
        known = {f"{spec['kind']}={each['name']}": each["containerEdits"] for spec in specs for each in spec["devices"]}
        nodes = []
        for cdi in [cdi for device in devices for cdi in device.cdi_device_ids]:
            if cdi not in known:
                raise StoryError(f"no CDI spec has {cdi}")
            nodes += [node["path"] for node in known[cdi].get("deviceNodes", ())]
        if missing := [node for node in nodes if not (self.node.root / node.lstrip("/")).exists()]:
            raise StoryError(f"the claim was given nodes that there are not: {', '.join(missing)}")
        return list(dict.fromkeys(nodes))

    def _specs(self) -> list[str]:
        """The files of CDI specs for claims."""
        return sorted(path.name for path in self.cdi_dir.glob("*.json"))

    # How

    async def _give_back(self, pod: str, claim: str) -> None:
        """The pod is gone, and its claim with it."""
        try:
            await self.kubelet.unprepare(f"{NAMESPACE}/{pod}")
        except NotPreparedError as error:
            raise StoryError(f"the claim was not given back: {error}") from None
        self.api.remove(CLAIMS, claim, NAMESPACE)

    async def _all_is_well(self, *, title: str, why: str, began: float) -> Told:
        """Waits until all devices of the node are in slices and healthy, and the driver is registered."""
        count = len({number for number, _ in numbered(self.node)})

        def is_published() -> bool:
            return sum(not is_kept_back(device) for device in self._devices()) == count

        def is_healthy() -> bool:
            return [health.status for health in self.kubelet.health.values()] == ["HEALTHY"] * count

        seconds = await self._seen(title, began, is_published, is_healthy)
        slices = complete_pool(self.api.slices())
        generation = slices[0]["spec"]["pool"]["generation"]
        result = f"{counted(count, 'device')} in {counted(len(slices), 'slice')} of generation {generation}"
        return Told(title=title, why=why, result=f"{result}; the driver is registered", seconds=seconds)

    async def _device_changes(
        self, *, title: str, why: str, began: float, name: str, is_well: bool, because: str = ""
    ) -> Told:
        """Waits until a device is well, or not, in the slice and for the kubelet, for a reason that has this word."""
        wanted = "HEALTHY" if is_well else "UNHEALTHY"

        def is_in_slice() -> bool:
            return [is_kept_back(device) for device in self._devices() if device["name"] == name] == [not is_well]

        def is_heard() -> bool:
            health = self.kubelet.health.get(name)
            return health is not None and health.status == wanted and because in health.message

        seconds = await self._seen(title, began, is_in_slice, is_heard)
        if is_well:
            result = f"{name} has no taint any more, and is Healthy"
        else:
            (taint,) = self._device(name)["taints"]
            key, message = taint["key"].rpartition("/")[2], self.kubelet.health[name].message
            reason = message.removeprefix(f"{taint['value']}: ")
            result = f"taint {key}={taint['value']}:{taint['effect']}; the kubelet hears: {reason}"
        return Told(title=title, why=why, result=result, seconds=seconds)

    async def _seen(
        self, title: str, began: float, by_api: Callable[[], bool], by_kubelet: Callable[[], bool]
    ) -> float:
        """Waits until the API server and the kubelet have seen it; returns the seconds since. Raises StoryError."""
        for who, wait_for, seen in (
            ("API server", self.api.wait_for, by_api),
            ("kubelet", self.kubelet.wait_for, by_kubelet),
        ):
            try:
                await wait_for(seen, _PATIENCE)
            except TimeoutError:
                raise StoryError(f"the {who} did not see within {_PATIENCE:g} s: {title}") from None
        return self.clock() - began


def _claim(name: str, count: int) -> dict[str, Any]:
    """A ResourceClaim of so many GPUs, each by a request of its own, as KubeVirt wants it; several near each other."""
    requests = [
        {"name": f"gpu{number}", "exactly": {"deviceClassName": "passthrough-gpu"}} for number in range(1, count + 1)
    ]
    near = [{"matchAttribute": _NUMA}] if count > 1 else []
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"devices": {"requests": requests, "constraints": near}},
    }


def _short(device: Object) -> str:
    """Its PCI address, without the domain that nearly every machine has alone."""
    return str(attribute(device, _ADDRESS)).removeprefix("0000:")
