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
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog

from sandbox_plugin.ending import Ending, Parts
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import HostScanner, Recheck
from sandbox_plugin.host.sysfs import OutOfResources
from sandbox_plugin.host.threads import on_thread
from sandbox_plugin.host.uevents import UeventSource
from sandbox_plugin.host.watch import Folders, FolderWatcher, OnChange, host_folders
from sandbox_plugin.inventory.ledger import DeviceKey
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import NOTHING_TO_OFFER, may_be_ours
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.kubelet.endpoint import Endpoint
from sandbox_plugin.kubelet.podresources import HoldingsPoller
from sandbox_plugin.kubelet.servicer import LastLook
from sandbox_plugin.kubelet.turn import Turn
from sandbox_plugin.model import Device, Reason, id_order
from sandbox_plugin.outputs.cdi import CdiWriter
from sandbox_plugin.outputs.foreign_specs import ForeignSpecWatch
from sandbox_plugin.outputs.stale import read_former
from sandbox_plugin.registry import Registry
from sandbox_plugin.settings import Consumer, Settings
from sandbox_plugin.tasks import happens
from sandbox_plugin.trouble import Trouble, Troubles

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_DEBOUNCE = 0.002
"""Seconds between the first sign of a change and the scan: a bind is several events within a millisecond or two."""
_RETRY = 1.0
"""Seconds between attempts while there are no descriptors or no threads to scan with."""
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
"""Seconds that a CDI folder gets to say where it is, or what is in it; on a dead mount it never does."""


async def run(settings: Settings, ending: Ending) -> None:
    """Runs the daemon until it is cancelled.

    Raises an ExceptionGroup when a part of it fails unexpectedly; `ending` has been told of that by then.
    """
    ending.watch(asyncio.get_running_loop())
    names = ModelNames.load()
    paths = HostPaths(settings.host_root)
    needs_cdi = settings.consumer is Consumer.KATA
    registry = Registry(settings, names, requires_cdi=needs_cdi)
    rescans = Rescans(paths, registry, settings.health_interval)
    endpoints = Endpoints(
        settings, registry, ending, Recheck(paths, _RECHECK_PATIENCE, on_refusal=partial(rescans.wake, "refusal"))
    )
    turn = Turn(folder=settings.kubelet_dir)
    poller = HoldingsPoller(socket=settings.pod_resources_socket, registry=registry)
    is_ours = partial(may_be_ours, settings=settings, names=names)
    cdi_writer = CdiWriter(
        folder=settings.cdi_dir,
        registry=registry,
        is_ours=is_ours,
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
            await group.create_task(learn_former(settings.cdi_dir, registry, is_ours))
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
            foreign: list[ForeignSpecWatch] = []
            for folder in await cdi_folders(settings):
                recheck = min(settings.health_interval, _CDI_RECHECK)
                foreign.append(ForeignSpecWatch(folder=folder, recheck=recheck, others=tuple(foreign)))
                group.create_task(foreign[-1].run())
                watched[foreign[-1].look] = partial(list, [folder])
        # On a node kernel events are quicker, and a kubelet takes seconds to start; a fake tree has inotify alone.
        group.create_task(FolderWatcher(groups=watched, step=_UNHURRIED if is_real else _QUICK).run())


async def learn_former(folder: Path, registry: Registry, is_ours: Callable[[str], bool]) -> None:
    """Tells the registry which nodes pods may hold under names that are not offered any more.

    To be known, like their holders, before anything is offered. Later the CDI writer says when the folder is silent.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_FOLDER_PATIENCE):
            registry.learn(former=await read_former(folder, is_ours))


async def cdi_folders(settings: Settings) -> tuple[Path, ...]:
    """All folders that Kata reads specs from: ours, and the host's two; each once, whatever it is called."""
    folders = (settings.cdi_dir, settings.host_root / "var/run/cdi", settings.host_root / "etc/cdi")
    real = await asyncio.gather(*map(_real_path, folders))
    return tuple(dict(zip(reversed(real), reversed(folders), strict=True)).values())[::-1]


async def _real_path(folder: Path) -> str:
    """Where a folder is when all links are followed, or what it is called where that does not answer."""
    try:
        async with asyncio.timeout(_FOLDER_PATIENCE):
            return await on_thread(os.path.realpath)(folder)
    except (OSError, TimeoutError):
        return str(folder)


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


class Rescans:
    """Scans the host again whenever something says so, and at the latest after `interval` seconds."""

    def __init__(self, paths: HostPaths, registry: Registry, interval: float) -> None:
        self._registry = registry
        self._interval = interval
        self._wanted = asyncio.Event()
        self._aer: list[tuple[str, str]] = []
        self._trouble = Trouble()
        self._scanner = HostScanner(paths, on_late=partial(self.wake, "late answer"))
        self._triggers = {"start"}
        """What has asked for the next scan, for the log; nothing: the timer."""

    def wake(self, trigger: str = "change") -> None:
        """Something may have changed."""
        self._triggers.add(trigger)
        self._wanted.set()

    def note_aer(self, address: str, event: str) -> None:
        """A step of an error recovery, to be taken in with a scan that begins after it."""
        self._aer.append((address, event))

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            self._wanted.clear()
            has_looked = await self._scan()
            if await happens(self._wanted, within=self._interval if has_looked else min(self._interval, _RETRY)):
                await asyncio.sleep(_DEBOUNCE if has_looked else _RETRY)

    async def follow_time(self) -> None:
        """Wakes a scan when time alone may have changed something. Runs until cancelled."""
        while True:
            await self._registry.look_is_due()
            self.wake("due")
            await self._registry.stepped()

    async def _scan(self) -> bool:
        """One scan into the registry. False: this process had no means to look, and what was known stays as it was."""
        aer, self._aer = self._aer, []
        triggers, self._triggers = self._triggers or {"timer"}, set()
        try:
            facts = await self._scanner.scan()
        except OutOfResources as error:
            self._aer = aer + self._aer
            self._complain("scan failed", f"{error}; the last known state stays, and it is tried again")
            return False
        ms = round((time.monotonic() - facts.began_at) * 1000, 1)
        log.debug("scanned", trigger=", ".join(sorted(triggers)), functions=len(facts.functions), ms=ms)
        self._complain("the PCI bus cannot be read", facts.unreachable)
        self._registry.observe(facts, aer=aer)
        return True

    def _complain(self, event: str, reason: str | None) -> None:
        if self._trouble.update(reason):
            log.error(event, reason=reason)


@dataclass(kw_only=True)
class _Running:
    endpoint: Endpoint
    task: asyncio.Task[None]


@dataclass
class Endpoints:
    """One endpoint for each resource: begun when its devices can be used, ended when its last device is dropped."""

    settings: Settings
    registry: Registry
    ending: Ending
    why_not: LastLook
    """As in `Endpoint`."""
    _running: dict[str, _Running] = field(default_factory=dict)

    def look(self) -> None:
        """Something changed in the kubelet's folder."""
        for running in self._running.values():
            running.endpoint.look()

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            async with Parts(self.ending) as group:
                inventory = self.registry.current
                while True:
                    for resource in self._running.keys() - inventory.resources.keys():
                        await self._end(resource)
                    for resource in inventory.resources:
                        # Not before the spec is written: Kata would fail every pod that gets one of these devices.
                        if resource not in self._running and resource not in inventory.without_spec:
                            self._begin(group, resource)
                    inventory = await self.registry.newer_than(inventory.version)
        finally:
            self._running.clear()

    def _begin(self, group: asyncio.TaskGroup, resource: str) -> None:
        endpoint = Endpoint(
            resource=resource,
            kubelet_dir=self.settings.kubelet_dir,
            registry=self.registry,
            policy=self.settings.allocation_policy,
            consumer=self.settings.consumer,
            why_not=self.why_not,
        )
        self._running[resource] = _Running(endpoint=endpoint, task=group.create_task(endpoint.run(), name=resource))

    async def _end(self, resource: str) -> None:
        task = self._running.pop(resource).task
        task.cancel()
        await asyncio.wait([task])
        log.info("no longer advertised", resource=resource, reason="its last device is gone and no pod holds one")


async def report(registry: Registry) -> None:
    """Logs what changes between inventories: one line for each device that comes, goes, or changes its health.

    A device that has just come waits for its CDI spec first: it is found when that is written.
    """
    known: dict[DeviceKey, Device] = {}
    unoffered = Troubles[str]()
    inventory = await registry.newer_than(0)
    if not inventory.resources:
        log.info("no device to offer yet", reason=NOTHING_TO_OFFER)
    while True:
        known = _report_devices(known, inventory)
        for address, why in sorted(unoffered.update(inventory.unoffered).items()):
            log.info("not offered", pci_address=address, reason=why)
        inventory = await registry.newer_than(inventory.version)
        await asyncio.sleep(0)  # the kubelet first: the endpoints were woken by the same change


def _report_devices(known: dict[DeviceKey, Device], inventory: Inventory) -> dict[DeviceKey, Device]:
    now = {(d.resource, d.id): d for devices in inventory.resources.values() for d in devices}
    now = {k: d for k, d in now.items() if k in known or d.health.reason is not Reason.NOT_IN_CDI}
    for key in sorted(known.keys() | now.keys(), key=lambda k: (k[0], id_order(k[1]))):
        before, after = known.get(key), now.get(key)
        about = {"resource": key[0], "device": key[1]}
        if after is None:
            assert before is not None
            log.info("device dropped", **about, pci_address=before.address)
        elif before is None or before.health != after.health or before.address != after.address:
            event = "device found" if before is None else "device changed"
            about["pci_address"] = after.address
            if after.health.healthy:
                log.info(event, **about, health="Healthy")
            else:
                log.warning(event, **about, health="Unhealthy", reason=str(after.health))
    return now
