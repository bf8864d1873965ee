"""Coroutines in a loop of their own, for tests that are functions."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

LIMIT = 60.0
"""Seconds that a test's work in a loop may take before the test fails: only machines under load need them."""
_T = TypeVar("_T")


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """What the coroutine returns. Raises TimeoutError when it takes longer than `LIMIT`."""

    async def bounded() -> _T:
        async with asyncio.timeout(LIMIT):
            return await work

    return asyncio.run(bounded())
