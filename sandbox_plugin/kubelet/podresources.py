"""Asking the kubelet which pod holds which device.

There is no Deallocate in the device plugin API: that a pod is gone shows only here. The kubelet answers at most 100
calls a second, and Kata's own calls share that limit, so it is asked every `INTERVAL` seconds at most, and only while
something waits for the answer. Without the socket everything works, with less knowledge.

A kubelet that has just started serves this API before it has heard of its pods (startKubelet in
cmd/kubelet/app/server.go begins both at once): what it names is held, and what it does not name may be held as well.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog
from grpclib import GRPCError

from sandbox_plugin.api import v1
from sandbox_plugin.inventory.state import Holdings
from sandbox_plugin.kubelet import sockets
from sandbox_plugin.kubelet.client import NoAnswerError, call
from sandbox_plugin.kubelet.wellformed import MalformedMessage, check
from sandbox_plugin.registry import Registry
from sandbox_plugin.trouble import Trouble

INTERVAL = 5.0
"""Seconds between questions."""
YOUNG = 30.0
"""Seconds after its start in which a kubelet may not know all of its pods."""
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
    """Once at least, by a kubelet that knew its pods."""
    _trouble: Trouble = field(default_factory=Trouble)
    _kubelet: sockets.Identity | None = None
    _kubelet_since: float = 0.0
    """When the kubelet that made this socket began, by `clock`."""
    _last: Holdings | None = None

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
        is_young = self._is_young()
        log.debug("PodResources asked", path=str(self.socket))
        try:
            async with asyncio.timeout(patience):
                learnt = holdings(await list_pods(self.socket), asked_at)
        except FileNotFoundError:
            self._complain("socket does not exist")
        except TimeoutError:
            self._complain(f"no answer in {patience:g} s")
        except NoAnswerError as error:
            self._complain(str(error))
        except GRPCError as error:
            self._complain(f"{error.status.name}: {error.message}")
        except MalformedMessage as error:
            self._complain(f"the answer is malformed: {error}")
        else:
            self._trouble.update(None)
            ours = self.registry.current.resources
            holders = {f"{resource}={id}": pod for (resource, id), pod in learnt.pods.items() if resource in ours}
            ms = round((self.clock() - asked_at) * 1000, 1)
            log.debug("PodResources answered", pods=len(set(holders.values())), holders=holders, young=is_young, ms=ms)
            self._answered = self._answered or not is_young
            self._last = without_absences(learnt, self._last) if is_young else learnt
            self.registry.learn(holdings=self._last)

    def _is_young(self) -> bool:
        """Whether the kubelet has just started. A socket that we see for the first time tells its age by its mtime."""
        now = self.clock()
        if (found := sockets.identity(self.socket)) != self._kubelet:
            age = 0.0 if found is None else time.time() - found[2] / 1e9
            self._kubelet, self._kubelet_since = found, now - min(max(age, 0.0), YOUNG)
        return now - self._kubelet_since < YOUNG

    def _complain(self, why: str) -> None:
        if self._trouble.update(why):
            log.info("PodResources unavailable", path=str(self.socket), reason=why)


async def list_pods(socket: Path) -> v1.ListPodResourcesResponse:
    """PodResourcesLister.List. Raises as `call` does."""
    return await call(socket, lambda channel: v1.PodResourcesListerStub(channel).list(v1.ListPodResourcesRequest()))


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


def without_absences(answer: Holdings, before: Holdings | None) -> Holdings:
    """What an answer tells that may lack some pods: who holds what, and of nobody that he does not any more."""
    if before is None:
        return replace(answer, asked_at=-math.inf)
    return Holdings(asked_at=before.asked_at, pods={**before.pods, **answer.pods})
