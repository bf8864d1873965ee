"""The daemon: where all parts meet. Settings in, a group of parts that runs until it is cancelled.

    watchers --wake--> scan loop --facts--> registry --inventory--> CDI writer, one endpoint for each resource
                          ^                    |
                          +---- wake_at -------+

No part knows another; they share the registry. An unexpected exception in any of them ends all of them: a daemon that
lives half-dead is worse than one that Kubernetes starts again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog

from sandbox_plugin.cdi.foreign import watch_foreign_specs
from sandbox_plugin.cdi.stale import read_former
from sandbox_plugin.cdi.writer import CdiWriter
from sandbox_plugin.config.settings import Consumer, Settings
from sandbox_plugin.ending import Ending, Parts
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import Recheck
from sandbox_plugin.host.uevents import UeventSource
from sandbox_plugin.host.watch import Folders, FolderWatcher, OnChange, host_folders
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.kubelet.endpoints import Endpoints
from sandbox_plugin.kubelet.lock import Turn
from sandbox_plugin.kubelet.podresources import HoldingsPoller
from sandbox_plugin.registry import Registry
from sandbox_plugin.report import report
from sandbox_plugin.rescans import Rescans

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_QUICK, _UNHURRIED = 0.01, 0.05
"""Steps of the folder watcher, in seconds: its thread looks a hundred or twenty times a second."""
_RECHECK_PATIENCE = 0.08
"""Seconds that sysfs gets to confirm a device during Allocate: all pod admission of the node waits for the answer,
which is to come within 0.1 s."""
_CDI_RECHECK = 5.0
"""Seconds after which CDI folders are looked at, however seldom the host is scanned: their events may get lost."""
_FIRST_ANSWER = 1.0
"""Seconds that PodResources gets before the first scan: who holds what should be known before anything is offered."""
_FOLDER_PATIENCE = 1.0
"""Seconds that a CDI folder gets to say what is in it; on a dead mount it never does."""


async def run(settings: Settings, ending: Ending) -> None:
    """Runs the daemon until it is cancelled.

    Raises an ExceptionGroup when a part of it fails unexpectedly; `ending` has been told of that by then.
    """
    ending.watch(asyncio.get_running_loop())
    rules = Rules(settings, ModelNames.load())
    paths = HostPaths(settings.host_root)
    needs_cdi = settings.consumer is Consumer.KATA
    registry = Registry(rules, requires_cdi=needs_cdi)
    rescans = Rescans(paths, registry, settings.health_interval)
    endpoints = Endpoints(
        settings, registry, ending, Recheck(paths, _RECHECK_PATIENCE, on_refusal=partial(rescans.wake, "refusal"))
    )
    turn = Turn(folder=settings.kubelet_dir)
    poller = HoldingsPoller(socket=settings.pod_resources_socket, registry=registry)
    cdi_writer = CdiWriter(
        folder=settings.cdi_dir,
        registry=registry,
        is_ours=rules.may_be_ours,
        recheck=min(settings.health_interval, _CDI_RECHECK),
    )

    def look_at_kubelet() -> None:
        turn.look()
        endpoints.look()
        poller.look()

    async def begin_to_serve() -> None:
        since = time.monotonic()
        if registry.current.version:  # else it is asked before anything is offered
            await poller.ask(patience=_FIRST_ANSWER)
        registry.serve(since)

    async with Parts(ending) as group:
        # First: only what PodResources is asked after this plugin began to serve tells who holds what.
        parts = [endpoints.run, cdi_writer.run] if needs_cdi else [endpoints.run]
        group.create_task(serve(turn, begin_to_serve, parts, ending))
        asking = group.create_task(poller.ask(patience=_FIRST_ANSWER))
        if needs_cdi:
            await group.create_task(learn_former(settings.cdi_dir, registry, rules.may_be_ours))
        await asking
        is_real = settings.host_root == Path("/")
        if is_real:
            group.create_task(UeventSource(on_change=partial(rescans.wake, "uevent"), on_aer=rescans.note_aer).run())
        group.create_task(rescans.run())
        group.create_task(rescans.follow_time())
        group.create_task(poller.run())
        group.create_task(report(registry))
        watched: dict[OnChange, Folders] = {
            partial(rescans.wake, "folder"): lambda: host_folders(paths),
            look_at_kubelet: lambda: [settings.kubelet_dir],
        }
        if needs_cdi:
            watched[cdi_writer.look] = lambda: [settings.cdi_dir]
            # Each folder for itself: the others must not wait for one on a dead mount.
            for foreign in await watch_foreign_specs(settings, recheck=cdi_writer.recheck):
                group.create_task(foreign.run())
                watched[foreign.look] = partial(list, [foreign.folder])
        # On a node kernel events are quicker, and a kubelet takes seconds to start; a fake tree has inotify alone.
        group.create_task(FolderWatcher(groups=watched, step=_UNHURRIED if is_real else _QUICK).run())


async def learn_former(folder: Path, registry: Registry, is_ours: Callable[[str], bool]) -> None:
    """Tells the registry which nodes pods may hold under names that are not offered any more.

    To be known, like their holders, before anything is offered. Later the CDI writer says when the folder is silent.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_FOLDER_PATIENCE):
            registry.learn(former=await read_former(folder, is_ours))


async def serve(
    turn: Turn,
    begin: Callable[[], Awaitable[None]],
    parts: Sequence[Callable[[], Coroutine[None, None, None]]],
    ending: Ending,
) -> None:
    """Runs what others on this node must not do at the same time, whenever it is this plugin's turn."""
    while True:
        async with turn.taken(), Parts(ending) as group:
            await begin()
            tasks = [group.create_task(part()) for part in parts]
            await turn.lost()
            for task in tasks:
                task.cancel()
