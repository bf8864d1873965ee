"""Waiting in the loop, as several parts do it."""

from __future__ import annotations

import asyncio


async def happens(event: asyncio.Event, *, within: float | None) -> bool:
    """Waits until the event is set, or so many seconds (None: without end). Returns whether it was set in time."""
    try:
        async with asyncio.timeout(within):
            return await event.wait()
    except TimeoutError:
        return False
