"""The services that the kubelet calls: claims are prepared and given back, and the health of devices is told.

The kubelet of a cluster knows one version of each or the other. Their messages are the same, so one servicer answers
under both names.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from typing import TypeVar

from grpclib.const import Handler

from sandbox_plugin.api import dra_v1, v1alpha1
from sandbox_plugin.dra.calls import PREPARE, UNPREPARE
from sandbox_plugin.dra.claims import ClaimId, Refused
from sandbox_plugin.dra.driver import Driver
from sandbox_plugin.dra.names import devices_by_name
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Health, Reason
from sandbox_plugin.rpc.server import PromptStreams

VERSIONS = ("v1.DRAPlugin", "v1beta1.DRAPlugin", "v1.DRAResourceHealth", "v1alpha1.DRAResourceHealth")
"""What registration says is served: the kubelet takes the first that it knows."""
_REPEAT = 10.0
"""Seconds after which health is told again: after `_TIMEOUT` without it the kubelet takes a device for Unknown."""
_TIMEOUT = 30
"""Seconds. The kubelet's own default."""
_LONGEST_MESSAGE = 1024
"""Characters of a message (ResourceHealthMessageMaxLength in pkg/apis/core)."""

_T = TypeVar("_T")


class DraPluginServicer(dra_v1.DraPluginBase):
    """Prepares claims and gives them back. An answer has an entry for each claim, with its own error or none."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    async def node_prepare_resources(
        self, request: dra_v1.NodePrepareResourcesRequest
    ) -> dra_v1.NodePrepareResourcesResponse:
        answers = await asyncio.gather(*map(self._prepare, request.claims))
        return dra_v1.NodePrepareResourcesResponse(claims=_by_uid(request.claims, answers))

    async def _prepare(self, claim: dra_v1.Claim) -> dra_v1.NodePrepareResourceResponse:
        try:
            with self._driver.calls.timed(PREPARE):
                prepared = await self._driver.prepare(_id_of(claim))
        except Refused as error:
            return dra_v1.NodePrepareResourceResponse(error=str(error))
        devices = [
            dra_v1.Device(
                request_names=[given.wanted.base_request],
                pool_name=given.wanted.pool,
                device_name=given.wanted.device,
                cdi_device_ids=ids,
            )
            for given, ids in prepared
        ]
        return dra_v1.NodePrepareResourceResponse(devices=devices)

    async def node_unprepare_resources(
        self, request: dra_v1.NodeUnprepareResourcesRequest
    ) -> dra_v1.NodeUnprepareResourcesResponse:
        answers = await asyncio.gather(*map(self._unprepare, request.claims))
        return dra_v1.NodeUnprepareResourcesResponse(claims=_by_uid(request.claims, answers))

    async def _unprepare(self, claim: dra_v1.Claim) -> dra_v1.NodeUnprepareResourceResponse:
        try:
            with self._driver.calls.timed(UNPREPARE):
                await self._driver.unprepare(_id_of(claim))
        except Refused as error:
            return dra_v1.NodeUnprepareResourceResponse(error=str(error))
        return dra_v1.NodeUnprepareResourceResponse()

    def __mapping__(self) -> dict[str, Handler]:
        return _under_both(super().__mapping__(), ".dra.v1.", ".dra.v1beta1.")


class DraHealthServicer(PromptStreams, v1alpha1.DraResourceHealthBase):
    """Tells the health of all devices: at once, when it changes, and often enough that the kubelet believes it."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    async def node_watch_resources(
        self, request: v1alpha1.NodeWatchResourcesRequest
    ) -> AsyncIterator[v1alpha1.NodeWatchResourcesResponse]:
        registry = self._driver.registry
        while True:
            inventory = registry.current
            if inventory.version:
                devices = health_of(inventory, self._driver.pool, self._driver.device_names, int(time.time()))
                yield v1alpha1.NodeWatchResourcesResponse(devices=devices)
            with suppress(TimeoutError):
                async with asyncio.timeout(_REPEAT):
                    await registry.newer_than(inventory.version)

    def __mapping__(self) -> dict[str, Handler]:
        return _under_both(super().__mapping__(), "/v1alpha1.", "/v1.")


def health_of(inventory: Inventory, pool: str, held: Iterable[str], now: int) -> list[v1alpha1.DeviceHealth]:
    """The health of each device that slices name, and of those that claims hold although they are gone; pure.

    `held`: names of what claims hold. `now` is in Unix seconds.
    """
    named = {name: device.for_claims for name, device in devices_by_name(inventory).items()}
    for name in held:
        named.setdefault(name, _LOST)
    return [
        v1alpha1.DeviceHealth(
            device=v1alpha1.DeviceIdentifier(pool_name=pool, device_name=name),
            health=v1alpha1.HealthStatus(_status(health)),
            last_updated_time=now,
            health_check_timeout_seconds=_TIMEOUT,
            message="" if health.healthy else str(health)[:_LONGEST_MESSAGE],
        )
        for name, health in sorted(named.items())
    ]


_LOST = Health(reason=Reason.GONE, detail="this node has no such device any more")


def _status(health: Health) -> int:
    if health.healthy:
        return v1alpha1.HealthStatus.HEALTHY
    is_unknown = health.reason is Reason.HOLDERS_UNKNOWN
    return v1alpha1.HealthStatus.UNKNOWN if is_unknown else v1alpha1.HealthStatus.UNHEALTHY


def _id_of(claim: dra_v1.Claim) -> ClaimId:
    return ClaimId(namespace=claim.namespace, name=claim.name, uid=claim.uid)


def _by_uid(claims: Sequence[dra_v1.Claim], answers: Sequence[_T]) -> dict[str, _T]:
    return {claim.uid: answer for claim, answer in zip(claims, answers, strict=True)}


def _under_both(handlers: dict[str, Handler], known_as: str, also: str) -> dict[str, Handler]:
    """The same methods under the name of another package as well."""
    return handlers | {path.replace(known_as, also): handler for path, handler in handlers.items()}
