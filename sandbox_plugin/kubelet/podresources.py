"""Asking the kubelet which pod holds which device.

There is no Deallocate in the device plugin API: that a pod is gone shows only here. The kubelet answers at most 100
calls a second, and Kata's own calls share that limit, so it is asked every `INTERVAL` seconds at most, and only while
something waits for the answer. Without the socket everything works, with less knowledge.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from grpclib import GRPCError
from grpclib.client import Channel

from sandbox_plugin.api import v1
from sandbox_plugin.inventory.advance import Holdings
from sandbox_plugin.kubelet.server import CONNECTION_LOST
from sandbox_plugin.kubelet.wellformed import MalformedMessage, MessageCodec, check
from sandbox_plugin.registry import Registry

INTERVAL = 5.0
"""Seconds between questions."""
_TIMEOUT = 4.0
"""Seconds for one answer."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(kw_only=True)
class HoldingsPoller:
    """Keeps the registry's holdings as fresh as somebody needs them."""

    socket: Path
    registry: Registry
    clock: Callable[[], float] = time.monotonic
    _answered: bool = False
    _trouble: str | None = None

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            inventory = self.registry.current
            if self._answered and not inventory.waits_for_holdings:
                await self.registry.newer_than(inventory.version)
                continue
            await self.ask()
            await asyncio.sleep(INTERVAL)

    async def ask(self, patience: float = _TIMEOUT) -> None:
        """One question. The answer goes to the registry; a failure is logged once, until it changes."""
        asked_at = self.clock()
        try:
            async with asyncio.timeout(patience):
                learnt = holdings(await list_pods(self.socket), asked_at)
        except FileNotFoundError:
            self._complain("there is no such socket")
        except TimeoutError:
            self._complain(f"no answer in {patience:g} s")
        except CONNECTION_LOST as error:
            self._complain(str(error))
        except GRPCError as error:
            self._complain(f"{error.status.name}: {error.message}")
        except MalformedMessage as error:
            self._complain(f"the answer is malformed: {error}")
        else:
            self._trouble = None
            self._answered = True
            self.registry.learn(holdings=learnt)

    def _complain(self, why: str) -> None:
        if why != self._trouble:
            log.info("no pod resources", path=str(self.socket), reason=why)
        self._trouble = why


async def list_pods(socket: Path) -> v1.ListPodResourcesResponse:
    """PodResourcesLister.List. Raises GRPCError, or one of CONNECTION_LOST."""
    channel = Channel(path=str(socket), codec=MessageCodec())
    try:
        return await v1.PodResourcesListerStub(channel).list(v1.ListPodResourcesRequest())
    finally:
        channel.close()


def holdings(answer: v1.ListPodResourcesResponse, asked_at: float) -> Holdings:
    """Which pod holds which device, out of an answer. Raises `MalformedMessage`."""
    check(answer)
    return Holdings(
        asked_at=asked_at,
        pods={
            (devices.resource_name, device_id): f"{pod.namespace}/{pod.name}"
            for pod in answer.pod_resources
            for container in pod.containers
            for devices in container.devices
            for device_id in devices.device_ids
        },
    )
