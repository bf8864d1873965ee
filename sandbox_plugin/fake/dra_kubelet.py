"""The half of a kubelet that has to do with claims: its plugin watcher and its DRA manager, to watch in a demo.

The order of its calls is the real one's (pkg/kubelet/pluginmanager, pkg/kubelet/cm/dra). A socket that appears in
`plugins_registry` is asked who it is, its endpoint is connected to and the health of its devices watched, and then it
is told that it is registered; one that vanishes is forgotten. Before a pod's sandbox is made its claim is read from the
API server and prepared; when the pod has ended it is given back. A kubelet that starts deletes the slices of its node.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from grpclib import GRPCError
from grpclib.client import Channel
from grpclib.exceptions import StreamTerminatedError
from grpclib.server import Server
from watchfiles import awatch
from watchfiles._rust_notify import WatchfilesRustInternalError

from sandbox_plugin.api import dra_v1, pluginregistration, v1, v1alpha1
from sandbox_plugin.fake.api_server import CLAIMS, FakeApiServer
from sandbox_plugin.fake.watched import Watched

_SERVICES = ("v1.DRAPlugin", "v1alpha1.DRAResourceHealth")
"""What this kubelet asks of a driver (Kubernetes 1.34 to 1.36)."""
_CALL = 45.0
"""Seconds that the kubelet gives a call."""
_GREETING = 5.0
"""Seconds for each of the two calls at the registration socket."""
_LOOK_MS = 200
"""After which the watcher looks by itself: a socket may appear between its look and the begin of the watch."""
_STEP_MS = 20
_OLD = 3600.0
"""Seconds for which the kubelet has run when it is entered: a young one may not know its pods, and the plugin waits."""
_Entry = TypeVar("_Entry", dra_v1.NodePrepareResourceResponse, dra_v1.NodeUnprepareResourceResponse)
_FAILURES = (GRPCError, OSError, StreamTerminatedError, TimeoutError, AttributeError)
"""Of calls. The last is how grpclib tells of a connection that is lost as soon as it is made."""


class NotPreparedError(Exception):
    """The pod does not start: what the kubelet says of it in the pod's events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceHealth:
    """What the driver said of a device last: what a pod's `allocatedResourcesStatus` shows."""

    status: str
    """HEALTHY, UNHEALTHY or UNKNOWN."""
    message: str


@dataclass(eq=False, kw_only=True)
class ClaimInfo:
    """What the kubelet remembers of a claim, from the first attempt to prepare it until it is given back."""

    claim: dra_v1.Claim
    pod: str
    devices: Sequence[dra_v1.Device] = ()
    """Those that it has, once it is prepared."""
    error: str = ""
    """Why the last attempt failed."""


@dataclass(eq=False, kw_only=True)
class _Driver:
    """One plugin that is registered: its connection, and what came over its stream."""

    name: str
    channel: Channel
    watching: asyncio.Task[None] | None = None
    health: dict[str, DeviceHealth] = field(default_factory=dict)


class DraKubelet(Watched):
    """A kubelet whose plugins register in `folder`/plugins_registry, with its PodResources socket at `pod_resources`.

    Usage:

        async with DraKubelet(folder, pod_resources, api) as kubelet:
            await kubelet.wait_for(lambda: kubelet.driver is not None, 10)
            devices = await kubelet.prepare("default/vm", "gpus")
            await kubelet.unprepare("default/vm")
    """

    def __init__(self, folder: Path, pod_resources: Path, api: FakeApiServer) -> None:
        self.registry = folder / "plugins_registry"
        self.claims: dict[str, ClaimInfo] = {}
        """By UID. It outlives a restart, as the real one's checkpoint does."""
        self.registrations = self.prepares = self.lists = 0
        """How many there were, since it was made."""
        self._pod_resources = pod_resources
        self._api = api
        self._drivers: dict[Path, _Driver] = {}
        self._server: Server | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._group = asyncio.TaskGroup()
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        await self.start()
        os.utime(self._pod_resources, times=(time.time() - _OLD,) * 2)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        await self._group.__aexit__(kind, error, trace)

    # Its life

    async def start(self) -> None:
        """Deletes the slices of this node, as nobody knows which drivers will come, and looks for drivers."""
        self._api.wipe()
        self.registry.mkdir(parents=True, exist_ok=True)
        self._pod_resources.unlink(missing_ok=True)
        self._server = Server([_PodResources(self)])
        await self._server.start(path=str(self._pod_resources))
        self._watcher = self._group.create_task(self._watch(), name="plugin watcher")

    async def stop(self) -> None:
        """Ends every connection. What is prepared stays so."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        for path in list(self._drivers):
            await self._forget(path)
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    # Plugins

    @property
    def driver(self) -> str | None:
        """The name of the driver that is registered."""
        return next((driver.name for driver in self._drivers.values()), None)

    @property
    def health(self) -> Mapping[str, DeviceHealth]:
        """By device, what the driver said last; nothing while there is none."""
        return next((driver.health for driver in self._drivers.values()), {})

    async def _watch(self) -> None:
        await self._look()
        how: dict[str, Any] = {"recursive": False, "step": _STEP_MS, "rust_timeout": _LOOK_MS, "yield_on_timeout": True}
        with suppress(OSError, WatchfilesRustInternalError):  # the host has no watches left
            async for _ in awatch(self.registry, **how):
                await self._look()
        while True:
            await asyncio.sleep(_LOOK_MS / 1000)
            await self._look()

    async def _look(self) -> None:
        there = {path for path in self.registry.iterdir() if path.is_socket()}
        for path in self._drivers.keys() - there:
            await self._forget(path)
        for path in sorted(there - self._drivers.keys()):
            await self._register(path)

    async def _register(self, path: Path) -> None:
        """Asks a socket who it is, and takes it for a driver. What does not answer is asked again at the next look."""
        channel = Channel(path=str(path))
        try:
            stub = pluginregistration.RegistrationStub(channel)
            info = await stub.get_info(pluginregistration.InfoRequest(), timeout=_GREETING)
            missing = [service for service in _SERVICES if service not in info.supported_versions]
            why = f"it does not serve {', '.join(missing)}" if missing else ""
            if not why:
                driver = _Driver(name=info.name, channel=Channel(path=info.endpoint))
                driver.watching = self._group.create_task(self._watch_health(driver), name=f"health {info.name}")
                self._drivers[path] = driver
                self.registrations += 1
                self._ring()
            status = pluginregistration.RegistrationStatus(plugin_registered=not why, error=why)
            await stub.notify_registration_status(status, timeout=_GREETING)
        except _FAILURES:
            await self._forget(path)
        finally:
            channel.close()

    async def _forget(self, path: Path) -> None:
        driver = self._drivers.pop(path, None)
        if driver is None:
            return
        if driver.watching is not None:
            driver.watching.cancel()
            await asyncio.wait([driver.watching])
        driver.channel.close()
        self._ring()

    async def _watch_health(self, driver: _Driver) -> None:
        """Until the driver ends: its socket goes then, too."""
        stub = v1alpha1.DraResourceHealthStub(driver.channel)
        try:
            async for message in stub.node_watch_resources(v1alpha1.NodeWatchResourcesRequest()):
                driver.health = {
                    each.device.device_name: DeviceHealth(
                        status=v1alpha1.HealthStatus(each.health).name or "", message=each.message
                    )
                    for each in message.devices
                }
                self.lists += 1
                self._ring()
        except _FAILURES:
            driver.health = {}

    # Pods

    async def prepare(self, pod: str, name: str) -> Sequence[dra_v1.Device]:
        """The devices of a pod's claim, before its sandbox is made. Raises NotPreparedError.

        `pod` is its namespace and name, and the claim is of the same namespace.
        """
        namespace, _, pod_name = pod.partition("/")
        found = self._api.find(CLAIMS, name, namespace)
        if found is None:
            raise NotPreparedError(f"failed to fetch ResourceClaim {name}")
        if pod_name not in [user["name"] for user in found["status"]["reservedFor"]]:
            raise NotPreparedError(f"pod {pod_name} is not allowed to use ResourceClaim {name}")
        uid = found["metadata"]["uid"]
        claim = dra_v1.Claim(namespace=namespace, uid=uid, name=name)
        info = self.claims.setdefault(uid, ClaimInfo(claim=claim, pod=pod))
        if not info.devices:
            request = dra_v1.NodePrepareResourcesRequest(claims=[claim])
            try:
                answer = await self._stub().node_prepare_resources(request, timeout=_CALL)
                info.devices = _entry(answer.claims, claim).devices
            except (*_FAILURES, NotPreparedError) as error:
                info.error = str(error)
                raise NotPreparedError(f"NodePrepareResources failed for ResourceClaim {name}: {error}") from None
            info.error = ""
            self.prepares += 1
        return info.devices

    async def unprepare(self, pod: str) -> None:
        """The pod has ended, or was deleted: its claims are given back, prepared or not. Raises NotPreparedError."""
        for info in [info for info in self.claims.values() if info.pod == pod]:
            request = dra_v1.NodeUnprepareResourcesRequest(claims=[info.claim])
            try:
                answer = await self._stub().node_unprepare_resources(request, timeout=_CALL)
                _entry(answer.claims, info.claim)
            except (*_FAILURES, NotPreparedError) as error:
                name = info.claim.name
                raise NotPreparedError(f"NodeUnprepareResources failed for ResourceClaim {name}: {error}") from None
            del self.claims[info.claim.uid]

    def _stub(self) -> dra_v1.DraPluginStub:
        for driver in self._drivers.values():
            return dra_v1.DraPluginStub(driver.channel)
        raise NotPreparedError("the DRA driver is not registered")


def _entry(answer: Mapping[str, _Entry], claim: dra_v1.Claim) -> _Entry:
    """What an answer says of this claim. Raises NotPreparedError."""
    if claim.uid not in answer:
        raise NotPreparedError("the driver says nothing of it")
    if error := answer[claim.uid].error:
        raise NotPreparedError(error)
    return answer[claim.uid]


class _PodResources(v1.PodResourcesListerBase):
    def __init__(self, kubelet: DraKubelet) -> None:
        self._kubelet = kubelet

    async def list(self, list_pod_resources_request: v1.ListPodResourcesRequest) -> v1.ListPodResourcesResponse:
        driver = self._kubelet.driver or ""
        prepared = [info for info in self._kubelet.claims.values() if info.devices]
        return v1.ListPodResourcesResponse(pod_resources=[_pod(info, driver) for info in prepared])


def _pod(info: ClaimInfo, driver: str) -> v1.PodResources:
    namespace, _, name = info.pod.partition("/")
    resources = [
        v1.ClaimResource(
            cdi_devices=[v1.CdiDevice(name=cdi) for cdi in device.cdi_device_ids],
            driver_name=driver,
            pool_name=device.pool_name,
            device_name=device.device_name,
        )
        for device in info.devices
    ]
    claim = v1.DynamicResource(
        claim_name=info.claim.name, claim_namespace=info.claim.namespace, claim_resources=resources
    )
    return v1.PodResources(
        name=name, namespace=namespace, containers=[v1.ContainerResources(name="vm", dynamic_resources=[claim])]
    )
