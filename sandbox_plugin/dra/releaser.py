"""Gives back claims that the kubelet has forgotten: it looks, and `abandoned.py` judges.

It looks seldom, and asks the API server only about claims that PodResources does not name.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import structlog

from sandbox_plugin.dra.abandoned import (
    FIRST_PAUSE,
    PATIENCE,
    Pods,
    Seen,
    Suspicion,
    Use,
    judge,
    what_pods_say,
    why_lost,
)
from sandbox_plugin.dra.claims import Prepared, Refused
from sandbox_plugin.dra.client import ApiError, Claims
from sandbox_plugin.dra.driver import Driver, LastLook
from sandbox_plugin.dra.names import devices_by_name
from sandbox_plugin.model import Device
from sandbox_plugin.trouble import Troubles

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(kw_only=True)
class Releaser:
    """Usage:

    await Releaser(driver=..., api=..., last_look=...).run()     # until it is cancelled
    """

    driver: Driver
    api: Claims
    last_look: LastLook
    _suspicions: dict[str, Suspicion] = field(default_factory=dict)
    """By the UID of the claim."""
    _troubles: Troubles[str] = field(default_factory=Troubles)
    """Why claims cannot be given back, by UID."""

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            await asyncio.sleep(FIRST_PAUSE * random.uniform(0.5, 1.0))  # never in step with other nodes
            await self.look()

    async def look(self) -> None:
        """One look at each claim that is due, and what follows from it."""
        prepared = {each.claim.uid: each for each in self.driver.prepared}
        self._suspicions = {uid: known for uid, known in self._suspicions.items() if uid in prepared}
        for uid, each in prepared.items():
            known = self._suspicions.get(uid)
            if known is None or self.driver.registry.now() >= known.at + known.pause:
                seen = await self._see(each, known)
                if each in self.driver.prepared:  # else it was given back meanwhile
                    self._suspicions[uid] = judge(known, seen, self.driver.asked_at(uid))
        troubles = {uid: remark for uid in prepared if (remark := self.remark(uid)) is not None}
        for uid, each in prepared.items():
            if uid in self._suspicions and self._suspicions[uid].is_sure:
                troubles |= await self._release(each, self._suspicions[uid])
        for uid, why in self._troubles.update(troubles).items():
            log.warning("claim not released", claim=str(prepared[uid].claim), uid=uid, reason=why)

    def abandoned_since(self, uid: str) -> float | None:
        """Since when a claim has looked as if nobody would give it back, in monotonic seconds; None: it does not."""
        known = self._suspicions.get(uid)
        return None if known is None else known.since

    def remark(self, uid: str) -> str | None:
        """What a person has to know of a claim, and to do; None: nothing."""
        known = self._suspicions.get(uid)
        if known is None or known.by_hand is None:
            return None
        file = next(self.driver.checkpoint_of(e.claim) for e in self.driver.prepared if e.claim.uid == uid)
        return f"{known.why}, but {known.by_hand}; if no VM has its devices, remove {file} and restart the plugin"

    async def _see(self, prepared: Prepared, known: Suspicion | None) -> Seen:
        registry, claim = self.driver.registry, prepared.claim
        at = registry.now()
        after = self.driver.asked_at(claim.uid) if known is None else known.at
        pods = what_pods_say(prepared, registry.holdings, is_there=registry.has_pod_resources, after=after)
        lost = None
        if pods is not Pods.NAMED:
            try:
                found = await self.api.claim(claim.namespace, claim.name)
            except ApiError:
                pass  # it says nothing
            else:
                lost = why_lost(prepared, found, driver=self.driver.name, pool=self.driver.pool)
        use = Use.SOME if lost is None else await self._use(prepared)
        return Seen(at=at, lost=lost, pods=pods, use=use)

    async def _use(self, prepared: Prepared) -> Use:
        registry = self.driver.registry
        functions, named = registry.functions, devices_by_name(registry.current)
        devices: list[Device] = []
        for given in prepared.devices:
            device = named.get(given.wanted.device)
            if device is None or any(placement.address not in functions for placement in device.placements):
                return Use.SOME
            if device.mdev or any(functions[placement.address].is_vendors_vgpu for placement in device.placements):
                return Use.UNSEEN
            devices.append(device)
        return Use.SOME if await self.last_look(devices, functions) else Use.NONE

    async def _release(self, prepared: Prepared, known: Suspicion) -> dict[str, str]:
        """Returns why it could not be given back, by UID."""
        assert known.since is not None
        why = f"{known.why}, and for {PATIENCE / 60:.0f} min no pod was named that has it, and no VM used its devices"
        try:
            await self.driver.release(prepared.claim, why, unasked_since=known.since)
        except Refused as error:
            return {prepared.claim.uid: str(error)}
        return {}
