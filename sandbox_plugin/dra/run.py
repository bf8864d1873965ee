"""Where the parts of Dynamic Resource Allocation meet: what `daemon.py` starts with `--dra`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Mapping
from typing import Any

from sandbox_plugin.config.settings import Settings
from sandbox_plugin.dra.api_server import ApiServer, in_cluster_url
from sandbox_plugin.dra.claims import Prepared
from sandbox_plugin.dra.driver import Driver, LastLook
from sandbox_plugin.dra.plan import Pool
from sandbox_plugin.dra.publisher import Publisher
from sandbox_plugin.dra.registration import Sockets
from sandbox_plugin.dra.slices import Terms
from sandbox_plugin.registry import Registry
from sandbox_plugin.shutdown import Shutdown


async def run(
    settings: Settings,
    registry: Registry,
    shutdown: Shutdown,
    last_look: LastLook,
    prepared: Mapping[str, Prepared],
) -> None:
    """Runs until cancelled, while this plugin has the node's lock: of two plugins one publishes, and prepares claims.

    `prepared`: the claims that are, as `load_claims` has read them. `shutdown` hears of a part that fails unexpectedly.
    An API server that fails is not unexpected.
    """
    url = settings.api_server or in_cluster_url(os.environ)
    assert url is not None  # `load_settings` has seen to both
    assert settings.node_name is not None
    async with ApiServer(url=url) as api, asyncio.TaskGroup() as group:

        def start(part: Coroutine[Any, Any, None]) -> None:
            shutdown.watch(group.create_task(part))

        driver, pool = settings.dra_driver_name, Pool(driver=settings.dra_driver_name, node=settings.node_name)
        offered_twice = settings.offers_resources
        terms = Terms(driver=driver, evict=settings.dra_evict or frozenset(), device_plugin=offered_twice)
        claims = Driver(settings=settings, registry=registry, api=api, last_look=last_look, prepared=prepared)
        start(claims.run())
        start(Sockets(settings, claims).run())
        start(Publisher(api=api, registry=registry, pool=pool, terms=terms).run())
