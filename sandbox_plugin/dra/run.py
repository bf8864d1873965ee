"""Where the parts of Dynamic Resource Allocation meet: what `daemon.py` starts with `--dra`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from sandbox_plugin.config.settings import Settings
from sandbox_plugin.registry import Registry
from sandbox_plugin.shutdown import Shutdown


async def run(settings: Settings, registry: Registry, shutdown: Shutdown) -> None:
    """Runs until cancelled, while this plugin has the node's lock: of two plugins one publishes, and prepares claims.

    `shutdown` hears of a part that fails unexpectedly. An API server that fails is not unexpected.
    """
    async with asyncio.TaskGroup() as group:

        def start(part: Coroutine[Any, Any, None]) -> None:
            shutdown.watch(group.create_task(part))

        del start
