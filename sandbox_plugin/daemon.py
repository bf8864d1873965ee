"""The daemon: where all parts meet. Settings in, a group of parts that runs until it is cancelled.

    watchers --wake--> scan loop --facts--> registry --inventory--> CDI writer, one endpoint for each resource
                          ^                    |
                          +---- wake_at -------+

No part knows another; they share the registry. An unexpected exception in any of them ends all of them: a daemon that
lives half-dead is worse than one that Kubernetes starts again.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from sandbox_plugin import __version__
from sandbox_plugin.cdi.stale import learn_former
from sandbox_plugin.cdi.writer import CdiWriter
from sandbox_plugin.config.settings import Settings
from sandbox_plugin.fabric import FabricFile
from sandbox_plugin.host.files import FileWork
from sandbox_plugin.host.last_look import LastLook
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.uevents import UeventSource
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.kubelet.endpoints import Endpoints
from sandbox_plugin.kubelet.lock import NodeLock
from sandbox_plugin.kubelet.podresources import HoldingsPoller
from sandbox_plugin.names import cdi_file_name
from sandbox_plugin.outputs.document import SERVING, STANDING_BY, WAITING, Parts, document
from sandbox_plugin.outputs.status_socket import StatusSocket
from sandbox_plugin.registry import Registry
from sandbox_plugin.report import report, report_grants
from sandbox_plugin.rescans import Rescans
from sandbox_plugin.shutdown import Shutdown, running_tasks
from sandbox_plugin.tasks import happens

if TYPE_CHECKING:
    from sandbox_plugin.cdi.foreign import ForeignSpecWatch
    from sandbox_plugin.dra.claims import Prepared
    from sandbox_plugin.dra.run import Dra
    from sandbox_plugin.host.watch import FolderWatcher
    from sandbox_plugin.outputs.metrics.parts import ClaimParts
    from sandbox_plugin.outputs.metrics.parts import Parts as Measured

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_QUICK, _UNHURRIED = 0.01, 0.5
"""Steps of the folder watcher, in seconds: so often its thread wakes. A fake tree has inotify alone. On a node kernel
events tell of binds, and endpoints look for a kubelet themselves."""
_FIRST_REGISTRATION = 1.0
"""Seconds after which folders are watched although no resource is registered: a kubelet may be long in coming."""
_LAST_LOOK_PATIENCE = 0.3
"""Seconds that sysfs gets to confirm a device during Allocate: all pod admission of the node waits for the answer. It
takes a fraction of a millisecond; a machine under load must not make it a refusal."""
_CDI_INTERVAL = 5.0
"""Seconds after which CDI folders are looked at, however seldom the host is scanned: their events may get lost."""
_FIRST_ANSWER = 1.0
"""Seconds that PodResources gets before the first scan: who holds what should be known before anything is offered."""


class Daemon:
    """All parts of one daemon, and what wakes which.

    Usage:

        daemon = Daemon(settings)
        await daemon.run(shutdown)      # until it is cancelled
        daemon.log_state()              # meanwhile
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._paths = HostPaths(settings.host_root)
        self._rules = Rules(settings, ModelNames.load())
        self._needs_cdi = settings.consumer.reads_cdi
        self._registry = Registry(self._rules, requires_cdi=self._needs_cdi, claims_only=not settings.offers_resources)
        self._rescans = Rescans(self._paths, self._registry, settings.health_interval)
        self._last_look = LastLook(self._paths, _LAST_LOOK_PATIENCE, on_refusal=partial(self._rescans.wake, "refusal"))
        self._endpoints = Endpoints(settings, self._registry, self._last_look)
        self._lock = NodeLock(folder=settings.kubelet_dir)
        self._poller = HoldingsPoller(
            socket=settings.pod_resources_socket, registry=self._registry, driver=settings.dra_driver_name
        )
        self._cdi_writer = CdiWriter(
            folder=settings.cdi_dir,
            registry=self._registry,
            is_ours=self._rules.may_be_ours,
            interval=min(settings.health_interval, _CDI_INTERVAL),
        )

        self._uevents = UeventSource(on_change=partial(self._rescans.wake, "uevent"), on_aer=self._rescans.note_aer)
        self._began_at = time.monotonic()
        self._folder_watcher: FolderWatcher | None = None
        self._foreign_specs: list[ForeignSpecWatch] = []
        self._claim_files = FileWork(partial(log.error, "files of claims hang", path=str(settings.kubelet_dir.parent)))
        self._dra: Dra | None = None
        """While this plugin serves claims."""

    async def run(self, shutdown: Shutdown) -> None:
        """Runs until it is cancelled.

        Raises an ExceptionGroup when a part fails unexpectedly; `shutdown` has logged that by then.
        """
        async with asyncio.TaskGroup() as group:

            def start(part: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
                return shutdown.watch(group.create_task(part))

            # First: only what PodResources is asked after this plugin began to serve tells who holds what.
            start(self._lock.run(partial(self._serve, shutdown)))
            start(StatusSocket(path=self._settings.status_socket, document=self.status).run())
            if self._settings.metrics_address is not None:
                start(self._serve_metrics(self._settings.metrics_address))
            asking = start(self._poller.ask(patience=_FIRST_ANSWER))
            if self._needs_cdi:
                await start(learn_former(self._settings.cdi_dir, self._registry, self._rules.may_be_ours))
            await asking
            is_real = self._settings.host_root == Path("/")
            if is_real:
                start(self._uevents.run())
            start(self._rescans.run())
            start(self._rescans.follow_time())
            start(self._poller.run())
            start(report(self._registry))
            if self._settings.log_level == "debug":
                start(report_grants(self._registry))
            if self._settings.fabric_partitions is not None:
                start(FabricFile(self._settings.fabric_partitions, self._registry).run())
            # The rest can wait until pods can have devices: a watch that begins makes everybody look.
            if self._settings.offers_resources:
                await happens(self._endpoints.registered, within=_FIRST_REGISTRATION)
            await self._watch_folders(start, step=_UNHURRIED if is_real else _QUICK)

    async def _watch_folders(self, start: Callable[[Coroutine[Any, Any, None]], object], step: float) -> None:
        """Begins to watch all folders, and what is in those of CDI."""
        # Here, because importing takes longer than what came before.
        from sandbox_plugin.cdi.foreign import watch_foreign_specs
        from sandbox_plugin.host.watch import Folders, FolderWatcher, OnChange, host_folders

        watched: dict[OnChange, Folders] = {
            partial(self._rescans.wake, "folder"): lambda: host_folders(self._paths),
            self._look_at_kubelet: lambda: [self._settings.kubelet_dir],
        }
        if self._needs_cdi:
            watched[self._cdi_writer.look] = lambda: [self._settings.cdi_dir]
            # Each folder for itself: the others must not wait for one on a dead mount.
            self._foreign_specs = await watch_foreign_specs(self._settings, interval=self._cdi_writer.interval)
            for foreign in self._foreign_specs:
                start(foreign.run())
                watched[foreign.look] = partial(list, [foreign.folder])
        self._folder_watcher = FolderWatcher(groups=watched, step=step)
        start(self._folder_watcher.run())
        log.info("running", seconds=round(time.monotonic() - self._began_at, 3))

    async def _serve(self, shutdown: Shutdown, since: float) -> None:
        """What two plugins on one node must not do at the same time. `since`: when this one got the lock."""
        if self._needs_cdi:
            self._registry.learn(in_cdi={})  # whoever served meanwhile may have changed the specs
        if self._registry.current.version:  # else it is asked before anything is offered
            await self._poller.ask(patience=_FIRST_ANSWER)
        prepared: Mapping[str, Prepared] = {}
        if self._settings.dra:
            from sandbox_plugin.dra.driver import load_claims  # few need it

            # Before anything can be given.
            prepared = await load_claims(self._settings, self._registry, self._claim_files)
        self._registry.serve(since)
        if self._registry.holdings is None or self._registry.holdings.asked_at < since:
            self._poller.hurry()
        async with asyncio.TaskGroup() as group:
            if self._settings.offers_resources:
                shutdown.watch(group.create_task(self._endpoints.run(shutdown)))
            if self._needs_cdi:
                shutdown.watch(group.create_task(self._cdi_writer.run()))
            if self._settings.features_folder is not None:
                shutdown.watch(group.create_task(self._label(self._settings.features_folder)))
            if self._settings.dra:
                shutdown.watch(group.create_task(self._serve_claims(shutdown, prepared)))
            if self._settings.node_events:
                shutdown.watch(group.create_task(self._tell_of_changes()))

    async def _label(self, folder: Path) -> None:
        """Keeps the labels of this node current."""
        from sandbox_plugin.outputs.feature_writer import FeatureWriter

        await FeatureWriter(
            folder=folder,
            registry=self._registry,
            paths=self._paths,
            names=self._rules.names,
            gpu_features=self._settings.gpu_feature_labels,
            makes_folder=self._settings.node_features is not None,
        ).run()

    async def _tell_of_changes(self) -> None:
        """Events on the node, for as long as this plugin serves."""
        from sandbox_plugin.dra.api_server import ApiServer, in_cluster_url
        from sandbox_plugin.dra.client import ApiError
        from sandbox_plugin.outputs.events import NodeEvents

        url, node = self._settings.api_server or in_cluster_url(os.environ), self._settings.node_name
        assert url is not None  # `load_settings` has seen to both
        assert node is not None
        async with ApiServer(url=url) as api:

            async def tell(event: dict[str, Any]) -> str | None:
                try:
                    await api.create_event(event)
                except ApiError as error:
                    return str(error)
                return None

            await NodeEvents(node=node, registry=self._registry, tell=tell).run()

    async def _serve_claims(self, shutdown: Shutdown, prepared: Mapping[str, Prepared]) -> None:
        """Dynamic Resource Allocation, for as long as this plugin serves."""
        if self._settings.offers_resources:
            await happens(self._endpoints.registered, within=_FIRST_REGISTRATION)
        # Here and now, because importing it takes longer than all that comes before.
        from sandbox_plugin.dra.run import Dra

        self._dra = Dra(
            self._settings, self._registry, last_look=self._last_look, work=self._claim_files, prepared=prepared
        )
        try:
            await self._dra.run(shutdown)
        finally:
            self._dra = None

    def _look_at_kubelet(self) -> None:
        """Something changed in the kubelet's folder."""
        self._lock.look()
        self._endpoints.look()
        self._poller.look()

    def _serve_metrics(self, address: tuple[str, int]) -> Coroutine[Any, Any, None]:
        """Answers scrapes and probes until it is cancelled."""
        from sandbox_plugin.outputs.metrics.server import MetricsServer

        return MetricsServer(
            address, self._registry, self._measured, pod_labels=self._settings.metrics_pod_labels
        ).run()

    def _measured(self) -> Measured:
        """What the metrics say of the parts now."""
        from sandbox_plugin.outputs.metrics.parts import Calls
        from sandbox_plugin.outputs.metrics.parts import Parts as Measured

        registered = {status.resource: status.registered_at for status in self._endpoints.status()}
        calls = self._endpoints.calls.items()
        foreign = Counter[str]()
        for watch in self._foreign_specs:
            foreign.update(watch.problems)
        return Measured(
            shown=self._shown(),
            registered_at={resource: at for resource, at in registered.items() if at is not None},
            calls={resource: Calls(took=each.took, refusals=each.refusals) for resource, each in calls},
            kubelet_restarts=self._endpoints.kubelet_restarts,
            scans=self._rescans.durations,
            scan_triggers=self._rescans.scans,
            scan_failures=self._rescans.failures,
            last_scan_at=self._rescans.began_at,
            cdi_writes=self._cdi_writer.writes,
            cdi_failures=self._cdi_writer.failures,
            foreign_specs=foreign,
            claims=None if self._dra is None else self._measured_claims(self._dra),
        )

    def _measured_claims(self, dra: Dra) -> ClaimParts:
        from sandbox_plugin.outputs.metrics.parts import ClaimParts

        return ClaimParts(
            took=dra.calls.took,
            refusals=dra.calls.refusals,
            registered_at=dra.registration.registered_at,
            failures=dra.slices.failures,
            released=dra.released,
        )

    def status(self) -> dict[str, Any]:
        """What the status socket answers now."""
        return document(self._registry.current, self._shown())

    def _shown(self) -> Parts:
        """What the parts say of themselves now."""
        now = time.monotonic()
        inventory = self._registry.current
        registrations = {}
        for status in self._endpoints.status():
            since = status.registered_at
            registrations[status.resource] = {
                "state": str(status.state),
                "registered_seconds": None if since is None else now - since,
                "registrations": status.registrations,
                "losses": status.losses,
                "streams": status.streams,
                "socket": status.socket,
                "trouble": status.trouble,
            }
        turn = SERVING if self._lock.is_held else STANDING_BY if self._lock.is_standing_by else WAITING
        files = {resource: str(self._settings.cdi_dir / cdi_file_name(resource)) for resource in inventory.resources}
        began_at = self._rescans.began_at
        return Parts(
            plugin={
                "version": __version__,
                "node": self._settings.node_name or os.uname().nodename,
                "pid": os.getpid(),
                "uptime_seconds": now - self._began_at,
                "consumer": str(self._settings.consumer),
            },
            turn={"state": turn, "reason": self._lock.why_not_held},
            registrations=registrations,
            scan={
                "age_seconds": None if began_at is None else now - began_at,
                "took_seconds": self._rescans.took,
                "count": self._rescans.scans.total(),
                "trouble": self._rescans.trouble,
            },
            offers_resources=self._settings.offers_resources,
            cdi_files=files if self._needs_cdi else None,
            foreign_specs=[
                {"path": str(path), "reason": why} for each in self._foreign_specs for path, why in each.troubles
            ],
            events=self._event_sources(),
            dra=self._shown_of_dra(),
        )

    def _shown_of_dra(self) -> dict[str, Any] | None:
        if not self._settings.dra:
            return None
        if self._dra is not None:
            return self._dra.shown()
        not_begun = {"state": "not begun", "trouble": None}
        return {"driver": self._settings.dra_driver_name, "registration": not_begun, "slices": None, "claims": []}

    def _event_sources(self) -> list[dict[str, str | None]]:
        def source(name: str, trouble: str | None) -> dict[str, str | None]:
            return {"source": name, "state": "up" if trouble is None else "down", "reason": trouble}

        is_real = self._settings.host_root == Path("/")
        off: dict[str, str | None] = {"source": "kernel events", "state": "off", "reason": "the host is a fake one"}
        begins: dict[str, str | None] = {"source": "inotify", "state": "off", "reason": "it has not begun yet"}
        pods = source("PodResources", self._poller.trouble)
        if not self._registry.has_pod_resources:
            pods["state"] = "off"  # absent is fine
        return [
            source("kernel events", self._uevents.trouble) if is_real else off,
            begins if self._folder_watcher is None else source("inotify", self._folder_watcher.trouble),
            pods,
        ]

    def log_state(self) -> None:
        """For whoever wonders what the daemon is doing, or whether it grows."""
        running = running_tasks()
        log.info("tasks", count=sum(running.values()), running=running)
        log.info("scans", triggers=dict(self._rescans.scans))
        log.info("lock", held=self._lock.is_held)
        log.info("held", nodes=self._registry.holders)
        for status in self._endpoints.status():
            log.info("endpoint", **status._asdict())
