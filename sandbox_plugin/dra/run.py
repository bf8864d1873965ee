"""Where the parts of Dynamic Resource Allocation meet: what `daemon.py` starts with `--dra`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from sandbox_plugin.config.settings import Settings
from sandbox_plugin.dra.api_server import ApiServer, in_cluster_url
from sandbox_plugin.dra.calls import ClaimCalls
from sandbox_plugin.dra.claims import Prepared
from sandbox_plugin.dra.driver import Driver
from sandbox_plugin.dra.plan import Pool
from sandbox_plugin.dra.publisher import Publisher, PublisherStatus
from sandbox_plugin.dra.registration import RegistrationStatus, Sockets
from sandbox_plugin.dra.releaser import Releaser
from sandbox_plugin.dra.shown import KnownClaim, shown
from sandbox_plugin.dra.slices import Terms
from sandbox_plugin.host.files import FileWork
from sandbox_plugin.model import LastLook
from sandbox_plugin.registry import Registry
from sandbox_plugin.shutdown import Shutdown


class Dra:
    """All parts, for as long as this plugin has the node's lock: of two plugins one publishes, and prepares claims.

    Usage:

        dra = Dra(settings, registry, last_look=..., work=..., prepared=await load_claims(...))
        await dra.run(shutdown)     # until it is cancelled
        dra.shown()                 # meanwhile
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        *,
        last_look: LastLook,
        work: FileWork,
        prepared: Mapping[str, Prepared],
    ) -> None:
        url = settings.api_server or in_cluster_url(os.environ)
        assert url is not None  # `load_settings` has seen to both
        assert settings.node_name is not None
        driver = settings.dra_driver_name
        self._registry = registry
        self._api = ApiServer(url=url)
        self._pool = Pool(driver=driver, node=settings.node_name)
        terms = Terms(driver=driver, evict=settings.dra_evict or frozenset(), device_plugin=settings.offers_resources)
        self._driver = Driver(
            settings=settings, registry=registry, api=self._api, last_look=last_look, work=work, prepared=prepared
        )
        self._releaser = Releaser(driver=self._driver, api=self._api)
        self._sockets = Sockets(settings, self._driver)
        self._publisher = Publisher(api=self._api, registry=registry, pool=self._pool, terms=terms)

    async def run(self, shutdown: Shutdown) -> None:
        """Runs until cancelled. `shutdown` hears of a part that fails unexpectedly; an API server that fails is not
        unexpected."""
        async with self._api, asyncio.TaskGroup() as group:
            for part in (self._driver.run(), self._sockets.run(), self._publisher.run(), self._releaser.run()):
                shutdown.watch(group.create_task(part))

    @property
    def calls(self) -> ClaimCalls:
        """What became of the kubelet's calls."""
        return self._driver.calls

    @property
    def registration(self) -> RegistrationStatus:
        return self._sockets.status

    @property
    def slices(self) -> PublisherStatus:
        return self._publisher.status

    @property
    def released(self) -> int:
        """Claims that were given back unasked."""
        return self._releaser.released

    def shown(self) -> dict[str, Any]:
        """What `status` says of it."""
        return shown(
            pool=self._pool,
            registration=self.registration,
            folder=self._sockets.registry,
            slices=self.slices,
            claims=map(self._known, self._driver.prepared),
            now=self._registry.now(),
        )

    def _known(self, prepared: Prepared) -> KnownClaim:
        claim, ledger = prepared.claim, self._registry.current.memory.ledger
        return KnownClaim(
            prepared=prepared,
            pod=ledger.pod_of_claim(str(claim), self._driver.prepared_at(claim.uid)),
            abandoned_since=self._releaser.abandoned_since(claim.uid),
            remark=self._releaser.remark(claim.uid),
        )
