"""A kubelet to watch: it does to a plugin what the real one does, as far as a person or a demonstration needs it.

At start it deletes every socket in its folder and makes kubelet.sock. Register is answered only after it has dialled
the plugin and asked for its options; then it holds ListAndWatch. The newest registration of a resource counts, and when
any stream of a resource ends, that registration is dropped (pkg/kubelet/cm/devicemanager/plugin/v1beta1).
Allocations outlive a restart, as the real one's checkpoint does.
"""

from __future__ import annotations

import asyncio
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from grpclib import GRPCError, Status
from grpclib.client import Channel
from grpclib.exceptions import StreamTerminatedError
from grpclib.server import Server

from sandbox_plugin.api import v1, v1beta1
from sandbox_plugin.fake.watched import Watched

_DIAL_TIMEOUT = 10.0
"""Seconds for which the kubelet dials a plugin."""


class AdmissionError(Exception):
    """The pod was not admitted (UnexpectedAdmissionError), and has no device. Says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A device as the kubelet knows it."""

    id: str
    healthy: bool
    numa_nodes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Devices of one resource that a pod holds."""

    pod: str
    resource: str
    ids: tuple[str, ...]


@dataclass(eq=False, kw_only=True)
class _Plugin:
    """One registration: its connection, and what came over its stream."""

    resource: str
    channel: Channel
    devices: dict[str, Listed] = field(default_factory=dict)
    listed_at: float = 0.0
    """Monotonic seconds of the newest message; 0: none yet."""

    @property
    def stub(self) -> v1beta1.DevicePluginStub:
        return v1beta1.DevicePluginStub(self.channel)


class FakeKubelet(Watched):
    """A kubelet in `folder`, with its PodResources socket at `pod_resources` if that is given.

    Usage:

        async with FakeKubelet(folder) as kubelet:
            await kubelet.wait_for(lambda: len(kubelet.healthy("nvidia.com/pgpu")) == 8, 10)
            allocation = await kubelet.admit("default/vm", "nvidia.com/pgpu", 4)
    """

    def __init__(self, folder: Path, pod_resources: Path | None = None) -> None:
        self.folder = folder
        self.allocations: list[Allocation] = []
        self.registrations = self.lists = self.allocates = 0
        """How many there were, since it was made."""
        self._pod_resources = pod_resources
        self._plugins: dict[str, _Plugin] = {}
        self._servers: list[Server] = []
        self._streams: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        await self._group.__aexit__(kind, error, trace)

    # Its life

    async def start(self) -> None:
        """Makes the folder, deletes every socket in it, and serves."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        await self._serve(_Registration(self), self.folder / "kubelet.sock")
        if self._pod_resources is not None:
            self._pod_resources.unlink(missing_ok=True)
            await self._serve(_PodResources(self), self._pod_resources)

    async def stop(self) -> None:
        """Ends every connection. Allocations stay for the next start."""
        for task in self._streams:
            task.cancel()
        if self._streams:
            await asyncio.wait(self._streams)
        for plugin in self._plugins.values():
            plugin.channel.close()
        self._plugins.clear()
        while self._servers:
            server = self._servers.pop()
            server.close()
            await server.wait_closed()
        self._ring()

    async def _serve(self, servicer: v1beta1.RegistrationBase | v1.PodResourcesListerBase, path: Path) -> None:
        server = Server([servicer])
        await server.start(path=str(path))
        self._servers.append(server)

    # What it knows

    def resources(self) -> list[str]:
        """Resources that are registered and have been listed, sorted."""
        return sorted(name for name, plugin in self._plugins.items() if plugin.listed_at)

    def devices(self, resource: str) -> Mapping[str, Listed]:
        """The devices of a resource, by ID; none while it is not registered."""
        plugin = self._plugins.get(resource)
        return plugin.devices if plugin is not None else {}

    def healthy(self, resource: str) -> set[str]:
        """IDs that a pod could get, those in use included: what the node's allocatable count says."""
        return {device.id for device in self.devices(resource).values() if device.healthy}

    def listed_at(self, resource: str) -> float:
        """Monotonic seconds at which the newest list of the resource came."""
        return self._plugins[resource].listed_at

    def holder(self, resource: str, device_id: str) -> str | None:
        """The pod that holds a device."""
        for allocation in self.allocations:
            if allocation.resource == resource and device_id in allocation.ids:
                return allocation.pod
        return None

    # Pods

    async def admit(self, pod: str, resource: str, count: int) -> Allocation:
        """Admits a pod that asks for `count` devices: GetPreferredAllocation, then Allocate. Raises AdmissionError.

        So many must be free. What the plugin prefers is taken as it is.
        """
        stub = self._plugins[resource].stub
        free = [device_id for device_id in self.healthy(resource) if self.holder(resource, device_id) is None]
        asked = v1beta1.ContainerPreferredAllocationRequest(available_device_i_ds=free, allocation_size=count)
        try:
            preferred = await stub.get_preferred_allocation(
                v1beta1.PreferredAllocationRequest(container_requests=[asked])
            )
            ids = preferred.container_responses[0].device_i_ds
            request = v1beta1.AllocateRequest(container_requests=[v1beta1.ContainerAllocateRequest(devices_ids=ids)])
            await stub.allocate(request)
        except (GRPCError, OSError, StreamTerminatedError) as error:
            raise AdmissionError(f"UnexpectedAdmissionError: {error}") from None
        self.allocates += 1
        self.allocations.append(Allocation(pod=pod, resource=resource, ids=tuple(ids)))
        return self.allocations[-1]

    def remove(self, pod: str) -> None:
        """The pod is gone. The plugin is not told: there is no Deallocate."""
        self.allocations = [a for a in self.allocations if a.pod != pod]

    # The protocol

    async def register(self, request: v1beta1.RegisterRequest) -> v1beta1.Empty:
        """One Register call."""
        plugin = _Plugin(resource=request.resource_name, channel=Channel(path=str(self.folder / request.endpoint)))
        try:
            async with asyncio.timeout(_DIAL_TIMEOUT):
                await plugin.stub.get_device_plugin_options(v1beta1.Empty())
        except (GRPCError, OSError, StreamTerminatedError, TimeoutError) as error:
            plugin.channel.close()
            raise GRPCError(Status.UNKNOWN, f"cannot dial {request.endpoint}: {error}") from None
        self._plugins[plugin.resource] = plugin
        self.registrations += 1
        task = self._group.create_task(self._watch(plugin), name=f"ListAndWatch {plugin.resource}")
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)
        return v1beta1.Empty()

    async def _watch(self, plugin: _Plugin) -> None:
        try:
            async for message in plugin.stub.list_and_watch(v1beta1.Empty()):
                plugin.devices = {d.id: _listed(d) for d in message.devices}
                plugin.listed_at = time.monotonic()
                self.lists += 1
                self._ring()
        except (GRPCError, OSError, StreamTerminatedError):
            pass
        finally:
            plugin.channel.close()
        current = self._plugins.pop(plugin.resource, None)
        if current is not None:
            current.channel.close()
        self._ring()


class _Registration(v1beta1.RegistrationBase):
    def __init__(self, kubelet: FakeKubelet) -> None:
        self._kubelet = kubelet

    async def register(self, register_request: v1beta1.RegisterRequest) -> v1beta1.Empty:
        return await self._kubelet.register(register_request)


class _PodResources(v1.PodResourcesListerBase):
    def __init__(self, kubelet: FakeKubelet) -> None:
        self._kubelet = kubelet

    async def list(self, list_pod_resources_request: v1.ListPodResourcesRequest) -> v1.ListPodResourcesResponse:
        return v1.ListPodResourcesResponse(pod_resources=[_pod(a) for a in self._kubelet.allocations])


def _listed(device: v1beta1.Device) -> Listed:
    numa_nodes = tuple(node.id for node in device.topology.nodes) if device.topology else ()
    return Listed(id=device.id, healthy=device.health == "Healthy", numa_nodes=numa_nodes)


def _pod(allocation: Allocation) -> v1.PodResources:
    namespace, _, name = allocation.pod.partition("/")
    devices = v1.ContainerDevices(resource_name=allocation.resource, device_ids=list(allocation.ids))
    return v1.PodResources(
        name=name, namespace=namespace, containers=[v1.ContainerResources(name="vm", devices=[devices])]
    )
