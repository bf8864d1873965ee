"""A DRA driver in the test's own loop, which does what the test says, also what none should do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from grpclib.server import Server

from sandbox_plugin.api import dra_v1, pluginregistration, v1alpha1

if TYPE_CHECKING:
    from grpclib._typing import IServable

HEALTHY, UNHEALTHY = v1alpha1.HealthStatus.HEALTHY, v1alpha1.HealthStatus.UNHEALTHY


@dataclass(kw_only=True)
class ScriptedDriver:
    """Usage:

    async with ScriptedDriver(folder=places.top) as driver:
        driver.errors["uid-of-gpus"] = "no"
        driver.tell({"gpu-0": (HEALTHY, "")})
    """

    folder: Path
    name: str = "vfio.sandbox-plugin"
    versions: tuple[str, ...] = ("v1.DRAPlugin", "v1alpha1.DRAResourceHealth")
    errors: dict[str, str] = field(default_factory=dict)
    """By UID of the claim, of both calls."""
    silent_about: set[str] = field(default_factory=set)
    devices: list[dra_v1.Device] = field(default_factory=list)
    """What every claim gets."""
    prepared: list[str] = field(default_factory=list)
    unprepared: list[str] = field(default_factory=list)
    statuses: list[tuple[bool, str]] = field(default_factory=list)
    """What the kubelet said of its registration."""
    _health: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    _told: asyncio.Event = field(default_factory=asyncio.Event)
    _servers: list[Server] = field(default_factory=list)

    @property
    def entrance(self) -> Path:
        """The socket by which a kubelet finds it."""
        return self.folder / "plugins_registry" / f"{self.name}-reg.sock"

    @property
    def endpoint(self) -> Path:
        return self.folder / "dra.sock"

    async def __aenter__(self) -> Self:
        self.entrance.parent.mkdir(exist_ok=True)
        services: dict[Path, list[IServable]] = {
            self.endpoint: [_Plugin(self), _Health(self)],
            self.entrance: [_Registration(self)],
        }
        for path, servicers in services.items():
            server = Server(servicers)
            await server.start(path=str(path))
            self._servers.append(server)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.entrance.unlink(missing_ok=True)
        for server in self._servers:
            server.close()
            await server.wait_closed()

    def prepare(self, claim: dra_v1.Claim) -> dra_v1.NodePrepareResourceResponse:
        """What it answers for one claim."""
        error = self.errors.get(claim.uid, "")
        return dra_v1.NodePrepareResourceResponse(devices=[] if error else self.devices, error=error)

    def unprepare(self, claim: dra_v1.Claim) -> dra_v1.NodeUnprepareResourceResponse:
        """The same of a claim that is given back."""
        return dra_v1.NodeUnprepareResourceResponse(error=self.errors.get(claim.uid, ""))

    def tell(self, health: Mapping[str, tuple[int, str]]) -> None:
        """The health of its devices, from now on."""
        self._health = health
        self._told.set()
        self._told = asyncio.Event()


class _Registration(pluginregistration.RegistrationBase):
    def __init__(self, driver: ScriptedDriver) -> None:
        self._driver = driver

    async def get_info(self, info_request: pluginregistration.InfoRequest) -> pluginregistration.PluginInfo:
        driver = self._driver
        return pluginregistration.PluginInfo(
            type="DRAPlugin",
            name=driver.name,
            endpoint=str(driver.endpoint),
            supported_versions=list(driver.versions),
        )

    async def notify_registration_status(
        self, registration_status: pluginregistration.RegistrationStatus
    ) -> pluginregistration.RegistrationStatusResponse:
        self._driver.statuses.append((registration_status.plugin_registered, registration_status.error))
        return pluginregistration.RegistrationStatusResponse()


class _Plugin(dra_v1.DraPluginBase):
    def __init__(self, driver: ScriptedDriver) -> None:
        self._driver = driver

    async def node_prepare_resources(
        self, node_prepare_resources_request: dra_v1.NodePrepareResourcesRequest
    ) -> dra_v1.NodePrepareResourcesResponse:
        driver = self._driver
        asked = node_prepare_resources_request.claims
        driver.prepared += [claim.name for claim in asked]
        answers = {claim.uid: driver.prepare(claim) for claim in asked if claim.uid not in driver.silent_about}
        return dra_v1.NodePrepareResourcesResponse(claims=answers)

    async def node_unprepare_resources(
        self, node_unprepare_resources_request: dra_v1.NodeUnprepareResourcesRequest
    ) -> dra_v1.NodeUnprepareResourcesResponse:
        driver = self._driver
        asked = node_unprepare_resources_request.claims
        driver.unprepared += [claim.name for claim in asked]
        return dra_v1.NodeUnprepareResourcesResponse(claims={claim.uid: driver.unprepare(claim) for claim in asked})


class _Health(v1alpha1.DraResourceHealthBase):
    def __init__(self, driver: ScriptedDriver) -> None:
        self._driver = driver

    async def node_watch_resources(
        self, node_watch_resources_request: v1alpha1.NodeWatchResourcesRequest
    ) -> AsyncIterator[v1alpha1.NodeWatchResourcesResponse]:
        while True:
            told = self._driver._told
            devices = [
                v1alpha1.DeviceHealth(
                    device=v1alpha1.DeviceIdentifier(pool_name="node-1", device_name=name),
                    health=v1alpha1.HealthStatus(health),
                    message=why,
                )
                for name, (health, why) in self._driver._health.items()
            ]
            yield v1alpha1.NodeWatchResourcesResponse(devices=devices)
            await told.wait()
