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
    InUse,
    Look,
    Pods,
    Suspicion,
    in_use,
    judge,
    what_pods_say,
    why_lost,
)
from sandbox_plugin.dra.claims import Prepared, Refused
from sandbox_plugin.dra.client import ApiError, Claims
from sandbox_plugin.dra.driver import Driver
from sandbox_plugin.trouble import Troubles

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(kw_only=True)
class Releaser:
    """Usage:

    await Releaser(driver=..., api=...).run()     # until it is cancelled
    """

    driver: Driver
    api: Claims
    released: int = 0
    """Claims that were given back unasked."""
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
        """One look at each claim that is due, and what follows from it. Others may be given back meanwhile."""
        failures: dict[str, str] = {}
        for prepared in self.driver.prepared:
            uid = prepared.claim.uid
            known = self._suspicions.get(uid)
            is_due = known is None or self.driver.registry.now() >= known.at + known.pause
            if not is_due or not self.driver.is_prepared(uid):
                continue
            look = await self._look_at(prepared, known)
            if self.driver.is_prepared(uid):
                now = self._suspicions[uid] = judge(known, look, self.driver.asked_at(uid))
                if now.is_sure and (why := await self._release(prepared, now)) is not None:
                    failures[uid] = why
        self._suspicions = {uid: known for uid, known in self._suspicions.items() if self.driver.is_prepared(uid)}
        remarks = {uid: remark for uid in self._suspicions if (remark := self.remark(uid)) is not None}
        self.driver.left_to_a_person = {uid for uid, known in self._suspicions.items() if known.is_doubtful}
        names = {each.claim.uid: str(each.claim) for each in self.driver.prepared}
        for uid, why in self._troubles.update(remarks | failures).items():
            log.warning("claim not released", claim=names[uid], uid=uid, reason=why)

    def abandoned_since(self, uid: str) -> float | None:
        """Since when a claim has looked as if nobody would give it back, in monotonic seconds; None: it does not."""
        known = self._suspicions.get(uid)
        return None if known is None else known.since

    def remark(self, uid: str) -> str | None:
        """What a person has to know of a claim, and to do; None: nothing."""
        known = self._suspicions.get(uid)
        if known is None or known.by_hand is None:
            return None
        file = self.driver.checkpoint_of(uid)
        return f"{known.why}, but {known.by_hand}; if no VM has its devices, remove {file} and restart the plugin"

    async def _look_at(self, prepared: Prepared, known: Suspicion | None) -> Look:
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
                lost = why_lost(prepared, found, driver=self.driver.name)
        is_lost = lost is not None
        return Look(at=at, lost=lost, pods=pods, in_use=in_use(prepared, registry.current) if is_lost else InUse.YES)

    async def _release(self, prepared: Prepared, known: Suspicion) -> str | None:
        """Returns why it could not be given back."""
        assert known.since is not None
        why = f"{known.why}, and for {PATIENCE / 60:.0f} min no pod was named that has it, and no VM used its devices"
        try:
            self.released += await self.driver.release(prepared.claim, why, unasked_since=known.since)
        except Refused as error:
            return str(error)
        return None
