"""When the host is scanned: at each sign of a change, and at the latest after an interval. Signs are never facts."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from functools import partial

import structlog

from sandbox_plugin.durations import Durations
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import HostScanner
from sandbox_plugin.host.sysfs import OutOfResources
from sandbox_plugin.registry import Registry
from sandbox_plugin.tasks import happens
from sandbox_plugin.trouble import Trouble

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_DEBOUNCE = 0.002
"""Seconds between the first sign of a change and the scan: a bind is several events within a millisecond or two."""
_RETRY = 1.0
"""Seconds between attempts while there are no descriptors or no threads to scan with."""


class Rescans:
    """Scans the host again whenever something says so, and at the latest after `interval` seconds."""

    def __init__(self, paths: HostPaths, registry: Registry, interval: float) -> None:
        self._registry = registry
        self._interval = interval
        self._wanted = asyncio.Event()
        self._aer: list[tuple[str, str]] = []
        self._trouble = Trouble()
        self._scanner = HostScanner(paths, on_late=partial(self.wake, "late-answer"))
        self.scans: Counter[str] = Counter()
        """How many scans each trigger has led to; a scan may have several."""
        self.took: float | None = None
        """Seconds that the last scan took; None: there was none yet."""
        self.durations = Durations()
        """What all of them took."""
        self.failures = 0
        """How many attempts saw nothing."""
        self.began_at: float | None = None
        """When it began, in monotonic seconds."""
        self._triggers = {"start"}
        """What has asked for the next scan, for the log; nothing: the timer."""

    def wake(self, trigger: str) -> None:
        """Something may have changed."""
        self._triggers.add(trigger)
        self._wanted.set()

    def note_aer(self, address: str, event: str) -> None:
        """A step of an error recovery, to be taken in with a scan that begins after it."""
        self._aer.append((address, event))

    @property
    def trouble(self) -> str | None:
        """Why the last attempt saw nothing; None: it did."""
        return self._trouble.now

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            self._wanted.clear()
            has_looked = await self._scan()
            if await happens(self._wanted, within=self._interval if has_looked else min(self._interval, _RETRY)):
                await asyncio.sleep(_DEBOUNCE if has_looked else _RETRY)

    async def follow_time(self) -> None:
        """Wakes a scan when time alone may have changed something. Runs until cancelled."""
        while True:
            await self._registry.look_is_due()
            self.wake("due")
            await self._registry.stepped()

    async def _scan(self) -> bool:
        """One scan into the registry. False: this process had no means to look, and what was known stays as it was."""
        aer, self._aer = self._aer, []
        triggers, self._triggers = self._triggers or {"timer"}, set()
        try:
            facts = await self._scanner.scan()
        except OutOfResources as error:
            self._aer = aer + self._aer
            self.failures += 1
            self._complain("scan failed", f"{error}; the last known state stays, and it is tried again")
            return False
        self.scans.update(triggers)
        self.began_at, self.took = facts.began_at, time.monotonic() - facts.began_at
        self.durations.add(self.took)
        self.failures += facts.unreachable is not None
        ms = round(self.took * 1000, 1)
        log.debug("scanned", trigger=", ".join(sorted(triggers)), functions=len(facts.functions), ms=ms)
        self._complain("the PCI bus cannot be read", facts.unreachable)
        self._registry.observe(facts, aer=aer)
        return True

    def _complain(self, event: str, reason: str | None) -> None:
        if self._trouble.update(reason):
            log.error(event, reason=reason)
