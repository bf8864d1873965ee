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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from grpclib import GRPCError, Status

from sandbox_plugin.api import v1
from sandbox_plugin.inventory.ledger import ClaimedDevice, ClaimPod, Holdings
from sandbox_plugin.names import address_of_claimed
from sandbox_plugin.registry import Registry
from sandbox_plugin.rpc import sockets
from sandbox_plugin.rpc.client import NoAnswerError, NonsenseError, call
from sandbox_plugin.tasks import happens
from sandbox_plugin.trouble import Trouble

INTERVAL = 5.0
"""Seconds between questions."""
YOUNG = 30.0
"""Seconds after its start in which a kubelet may not know all of its pods."""
_TIMEOUT = 4.0
"""Seconds for one answer."""

_NEVER = (Status.UNIMPLEMENTED, Status.PERMISSION_DENIED, Status.UNAUTHENTICATED)
"""Answers of who does not serve this API, or not to us: nothing is to be waited for."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(kw_only=True, eq=False, repr=False)
class HoldingsPoller:
    """Keeps the registry's holdings as fresh as somebody needs them."""

    socket: Path
    registry: Registry
    driver: str
    """Of ResourceClaims, those that are ours."""
    clock: Callable[[], float] = time.monotonic
    _answered: bool = False
    """Once at least, by a kubelet that knew its pods."""
    _trouble: Trouble = field(default_factory=Trouble)
    _kubelet: sockets.Identity | None = None
    _kubelet_since: float = 0.0
    """When the kubelet that made this socket began, by `clock`."""
    _asked_at: float = -math.inf
    """When PodResources was asked last, by `clock`: also by who did not wait for `run`."""
    _heard_at: float = -math.inf
    """When PodResources answered last, by `clock`."""
    _hurried: asyncio.Event = field(default_factory=asyncio.Event)

    def hurry(self) -> None:
        """Much may have happened: what somebody waits for is asked for now."""
        self._hurried.set()

    def look(self) -> None:
        """Something changed in the kubelet's folder: if there is another kubelet, it is asked now.

        The kubelet writes there at each Allocate; that is no reason.
        """
        if sockets.identity(self.socket) != self._kubelet:
            self.hurry()

    @property
    def trouble(self) -> str | None:
        """Why the last question had no answer; None: it had one."""
        return self._trouble.now

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            inventory = self.registry.current
            if self._answered and not inventory.waits_for_holdings:
                await self.registry.newer_than(inventory.version)
                continue
            pause = self._asked_at + INTERVAL - self.clock()
            if pause <= 0 or await happens(self._hurried, within=pause):
                self._hurried.clear()
                await self.ask()

    async def ask(self, patience: float = _TIMEOUT) -> None:
        """One question. The answer goes to the registry; a failure is logged once, until it changes."""
        asked_at = self._asked_at = self.clock()
        is_young = self._is_young()
        is_there = True
        learnt = None
        log.debug("PodResources asked", path=str(self.socket))
        try:
            async with asyncio.timeout(patience):
                answer = await list_pods(self.socket)
                # Another kubelet may have answered than the one whose age was looked at.
                complete = not is_young and self._kubelet is not None and sockets.identity(self.socket) == self._kubelet
                learnt = holdings(answer, asked_at, complete=complete, driver=self.driver)
        except FileNotFoundError:
            is_there = self._is_only_away()
            self._complain("socket does not exist")
        except TimeoutError:
            self._complain(f"no answer in {patience:g} s")
        except PermissionError as error:
            is_there = False
            self._complain(str(error.strerror))
        except NoAnswerError as error:
            is_there = not isinstance(error, NonsenseError) or self._is_only_away()
            self._complain(str(error))
        except GRPCError as error:
            is_there = error.status not in _NEVER
            self._complain(f"{error.status.name}: {error.message}")
        else:
            self._trouble.update(None)
            self._answered = self._answered or learnt.complete
            self._heard_at = self.clock()
            ours = self.registry.current.resources
            holders = {f"{resource}={id}": pod for (resource, id), pod in learnt.pods.items() if resource in ours}
            ms = round((self.clock() - asked_at) * 1000, 1)
            log.debug("PodResources answered", pods=len(set(holders.values())), holders=holders, young=is_young, ms=ms)
        self.registry.learn(holdings=learnt, pod_resources=is_there)

    def _is_only_away(self) -> bool:
        """Whether the socket was there until just now: a kubelet that restarts takes it away for a while."""
        return self.clock() - self._heard_at < YOUNG

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


def holdings(answer: v1.ListPodResourcesResponse, asked_at: float, *, complete: bool, driver: str) -> Holdings:
    """Which pod holds which device, out of an answer, and which devices claims on this driver hold."""
    held = [
        ((devices.resource_name, device_id), f"{pod.namespace}/{pod.name}", container.name)
        for pod in answer.pod_resources
        for container in pod.containers
        for devices in container.devices
        for device_id in devices.device_ids
    ]
    return Holdings(
        asked_at=asked_at,
        complete=complete,
        pods={key: pod for key, pod, _ in held},
        containers={key: container for key, _, container in held},
        claims=frozenset(_claimed(answer, driver)),
        claim_pods=_claim_pods(answer, driver),
    )


def _claim_pods(answer: v1.ListPodResourcesResponse, driver: str) -> dict[str, ClaimPod]:
    """Which pod has each claim on this driver; of its containers that have it the first."""
    found: dict[str, ClaimPod] = {}
    for pod in answer.pod_resources:
        for container in pod.containers:
            for claim in container.dynamic_resources:
                if any(resource.driver_name == driver for resource in claim.claim_resources):
                    found.setdefault(f"{claim.claim_namespace}/{claim.claim_name}", (pod.name, container.name))
    return found


def _claimed(answer: v1.ListPodResourcesResponse, driver: str) -> Iterator[ClaimedDevice]:
    for claim in (c for pod in answer.pod_resources for each in pod.containers for c in each.dynamic_resources):
        for resource in claim.claim_resources:
            address = address_of_claimed(resource.device_name) if resource.driver_name == driver else None
            if address is not None:
                yield f"{claim.claim_namespace}/{claim.claim_name}", address
