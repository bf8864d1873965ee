"""What answers at `--metrics-address`: metrics, and the two probes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

from sandbox_plugin.host.threads import on_thread
from sandbox_plugin.outputs.document import STANDING_BY, not_ready
from sandbox_plugin.outputs.http import Answer, HttpServer
from sandbox_plugin.outputs.metrics.health_history import HealthHistory
from sandbox_plugin.outputs.metrics.parts import Parts
from sandbox_plugin.registry import Registry

if TYPE_CHECKING:
    from sandbox_plugin.outputs.metrics.exposition import Exposition


class MetricsServer:
    """`/metrics`, `/healthz` and `/readyz`.

    `parts` tells what the parts know of themselves now.
    """

    def __init__(
        self,
        address: tuple[str, int],
        registry: Registry,
        parts: Callable[[], Parts],
        *,
        pod_labels: bool,
    ) -> None:
        self._registry = registry
        self._history = HealthHistory(registry=registry)
        self._parts = parts
        self._pod_labels = pod_labels
        self._exposition: Exposition | None = None
        pages = {"/metrics": self._metrics, "/healthz": self._healthz, "/readyz": self._readyz}
        self._http = HttpServer(address=address, pages=pages)

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._history.run())
            group.create_task(self._http.run())

    async def _metrics(self, accept: str) -> Answer:
        if self._exposition is None:
            self._exposition = await on_thread(self._load)()
        return self._exposition.page(accept)

    def _load(self) -> Exposition:
        """Imports the Prometheus client: for a thread, since pods must not wait for it, and not before it is needed."""
        from sandbox_plugin.outputs.metrics.exposition import Exposition

        return Exposition(self._registry, self._history, self._parts, pod_labels=self._pod_labels)

    async def _healthz(self, _: str) -> Answer:
        """The loop turns, or there would be no answer. Whatever the daemon waits for, a restart would not bring it."""
        return Answer(b"ok\n")

    async def _readyz(self, _: str) -> Answer:
        """As `status --probe`."""
        shown = self._parts().shown
        if reasons := not_ready(self._registry.current, shown):
            return Answer(f"not ready: {'; '.join(reasons)}\n".encode(), HTTPStatus.SERVICE_UNAVAILABLE)
        return Answer(b"standing by\n" if shown.turn["state"] == STANDING_BY else b"ready\n")
