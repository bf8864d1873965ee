"""What a fake has in common with the others: it changes now and then, and somebody waits until it has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Watched:
    """For a class to inherit from, which makes `_changed` and rings after each change."""

    _changed: asyncio.Event
    """Set at the next change; then there is another one."""

    async def wait_for(self, predicate: Callable[[], bool], seconds: float) -> None:
        """Waits until `predicate` holds, looking at every change. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not predicate():
                await self._changed.wait()

    def _ring(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
