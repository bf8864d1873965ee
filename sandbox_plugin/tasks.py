"""Waiting in the loop, as several parts do it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass


async def happens(event: asyncio.Event, *, within: float | None) -> bool:
    """Waits until the event is set, or so many seconds (None: without end). Returns whether it was set in time."""
    try:
        async with asyncio.timeout(within):
            return await event.wait()
    except TimeoutError:
        return False


@dataclass(kw_only=True, eq=False, repr=False)
class Backoff:
    """Seconds to wait before the next attempt: short at first, doubling up to a cap, never in step with others."""

    first: float = 0.1
    cap: float = 5.0
    _next: float = 0.0

    def reset(self) -> None:
        self._next = 0.0

    def next(self) -> float:
        self._next = min(self.cap, self._next * 2) if self._next else self.first
        return self._next * random.uniform(0.75, 1.0)
