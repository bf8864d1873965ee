"""The endpoints of all resources: each is begun and ended with its resource."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import structlog

from sandbox_plugin.config.settings import Settings
from sandbox_plugin.kubelet.calls import Calls
from sandbox_plugin.kubelet.endpoint import Endpoint, EndpointStatus
from sandbox_plugin.model import LastLook
from sandbox_plugin.registry import Registry
from sandbox_plugin.rpc import sockets
from sandbox_plugin.shutdown import Shutdown

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(kw_only=True, eq=False, repr=False)
class _Running:
    endpoint: Endpoint
    task: asyncio.Task[None]


@dataclass(eq=False, repr=False)
class Endpoints:
    """One endpoint for each resource: begun when its devices can be used, ended when its last device is dropped."""

    settings: Settings
    registry: Registry
    last_look: LastLook
    """As in `Endpoint`."""
    registered: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the kubelet has accepted a resource for the first time."""
    kubelet_restarts: int = 0
    """How often another kubelet accepted a resource than the one before."""
    _kubelet: sockets.Identity | None = None
    """The socket of the one that accepted a resource last."""
    _calls: dict[str, Calls] = field(default_factory=dict)
    """By resource, and kept when its endpoint ends: the names that this node's rules can give are few."""
    _running: dict[str, _Running] = field(default_factory=dict)

    def look(self) -> None:
        """Something changed in the kubelet's folder."""
        for running in self._running.values():
            running.endpoint.look()

    def status(self) -> list[EndpointStatus]:
        """Of each resource that is advertised, in the order of their names."""
        return [self._running[resource].endpoint.status for resource in sorted(self._running)]

    @property
    def calls(self) -> Mapping[str, Calls]:
        """What became of the kubelet's calls, by resource, since the daemon started."""
        return self._calls

    async def run(self, shutdown: Shutdown) -> None:
        """Runs until cancelled; `shutdown` hears of an endpoint that fails."""
        try:
            async with asyncio.TaskGroup() as group:
                inventory = self.registry.current
                while True:
                    for resource in self._running.keys() - inventory.resources.keys():
                        await self._end(resource)
                    for resource in inventory.resources:
                        # Not before the spec is written: Kata would fail every pod that gets one of these devices.
                        if resource not in self._running and resource not in inventory.without_spec:
                            self._begin(group, resource, shutdown)
                    inventory = await self.registry.newer_than(inventory.version)
        finally:
            self._running.clear()

    def _begin(self, group: asyncio.TaskGroup, resource: str, shutdown: Shutdown) -> None:
        endpoint = Endpoint(
            resource=resource,
            kubelet_dir=self.settings.kubelet_dir,
            registry=self.registry,
            policy=self.settings.allocation_policy,
            consumer=self.settings.consumer,
            whole_node=self.settings.whole_node,
            last_look=self.last_look,
            on_registered=self._accepted,
            calls=self._calls.setdefault(resource, Calls()),
        )
        self._running[resource] = _Running(endpoint=endpoint, task=shutdown.watch(group.create_task(endpoint.run())))

    def _accepted(self, kubelet: sockets.Identity | None) -> None:
        if self._kubelet not in (None, kubelet):
            self.kubelet_restarts += 1
        self._kubelet = kubelet
        self.registered.set()

    async def _end(self, resource: str) -> None:
        task = self._running.pop(resource).task
        task.cancel()
        await asyncio.wait([task])
        log.info("no longer advertised", resource=resource, reason="its last device is gone and no pod holds one")
