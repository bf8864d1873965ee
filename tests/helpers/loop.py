"""Coroutines in a loop of their own, for tests that are functions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

LIMIT = 60.0
"""Seconds that a test's work in a loop may take before the test fails: only machines under load need them."""
_P = ParamSpec("_P")
_T = TypeVar("_T")


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """What the coroutine returns. Raises TimeoutError when it takes longer than `LIMIT`."""

    async def bounded() -> _T:
        async with asyncio.timeout(LIMIT):
            return await work

    return asyncio.run(bounded())


def in_loop(test: Callable[_P, Coroutine[Any, Any, None]]) -> Callable[_P, None]:
    """Makes a coroutine a test. It fails when it takes longer than `LIMIT`."""

    @wraps(test)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        run(test(*args, **kwargs))

    return call


async def until(holds: Callable[[], object]) -> None:
    """For what sets no event: logs, threads, files."""
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0.005)
