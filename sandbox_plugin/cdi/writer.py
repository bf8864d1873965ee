"""The CDI writer: it keeps the specs on disk equal to the inventory.

Each file is replaced whole, a device is in the spec before it is listed as Healthy, and a node that is gone leaves the
spec. What a spec says is in `render`, which files are ours to replace is in `owner`, and how long specs stay that no
resource needs any more is in `stale`; nothing else in the folder is ever touched.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog

from sandbox_plugin.cdi.owner import Ownership, ownership
from sandbox_plugin.cdi.render import ids_in_spec, is_marked, render_specs
from sandbox_plugin.cdi.stale import StaleSpecs
from sandbox_plugin.host import files
from sandbox_plugin.host.files import FileWork, Known
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.names import cdi_file_name
from sandbox_plugin.registry import Registry
from sandbox_plugin.tasks import happens
from sandbox_plugin.trouble import Troubles

_PAUSE = 0.25
"""Seconds between two looks at the folder because something changed in it: two writers who fight must not become a
busy loop. A change of the inventory does not wait."""
_RETRY = 1.0
"""Seconds after which it is tried again to write or to remove a spec."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class _NotOurs(Exception):
    """The file that has our name is not ours to replace."""


@dataclass(kw_only=True, eq=False, repr=False)
class CdiWriter:
    """Keeps the specs in `folder` equal to the registry's inventory, and tells the registry what is on disk.

    `is_ours(resource)` says whether a resource name is one that we may serve. What somebody else removed or overwrote
    comes back when `look` is called, and at the latest after `interval` seconds.
    """

    folder: Path
    registry: Registry
    is_ours: Callable[[str], bool]
    interval: float = 5.0
    writes: Counter[str] = field(default_factory=Counter)
    """How often each resource's spec was written."""
    failures: Counter[str] = field(default_factory=Counter)
    """How often that was tried in vain."""
    _stale: StaleSpecs = field(init=False)
    _due: asyncio.Event = field(default_factory=asyncio.Event)
    _folder_changed: asyncio.Event = field(default_factory=asyncio.Event)
    _on_disk: dict[str, Known[bytes]] = field(default_factory=dict)
    """What was last seen in the file of a resource."""
    _troubles: Troubles[str] = field(default_factory=Troubles)
    """By resource."""
    _replaced: dict[str, int] = field(default_factory=dict)
    """How often somebody else's spec was replaced: two writers are named once, not each time."""

    def __post_init__(self) -> None:
        self._work = FileWork(self._tell_of_silence)
        self._stale = StaleSpecs(folder=self.folder, registry=self.registry, is_ours=self.is_ours, work=self._work)

    def look(self) -> None:
        """Something changed in the folder. The writer looks at it now, or after the pause."""
        self._folder_changed.set()

    async def run(self) -> None:
        """Runs until cancelled. The specs stay then: running pods may be restarted against them."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_inventory())
            group.create_task(self._follow_folder())
            while True:
                self._due.clear()
                inventory = self.registry.current
                if inventory.version:
                    await self._sync(inventory)
                has_trouble = self._troubles.now or self._stale.has_trouble
                await happens(self._due, within=min(self.interval, _RETRY) if has_trouble else self.interval)

    async def _follow_inventory(self) -> None:
        inventory = self.registry.current
        while True:
            inventory = await self.registry.newer_than(inventory.version)
            self._due.set()

    async def _follow_folder(self) -> None:
        while True:
            await self._folder_changed.wait()
            self._folder_changed.clear()
            self._due.set()
            await asyncio.sleep(_PAUSE)

    async def _sync(self, inventory: Inventory) -> None:
        """Brings the folder to this inventory."""
        specs = render_specs(inventory)
        trouble: dict[str, str] = {}
        written: list[str] = []
        for resource, text in specs.items():
            try:
                if await self._sync_one(resource, text.encode()):
                    written.append(resource)
            except OSError as error:
                trouble[resource] = f"its CDI spec cannot be written: {error.filename or self.folder}: {error.strerror}"
            except _NotOurs as error:
                trouble[resource] = str(error)
        self.failures.update(trouble.keys())
        # After a start on a full disk this is what an earlier run wrote: pods can have what is in it.
        in_cdi = {
            resource: ids_in_spec(self._on_disk[resource].says, resource, inventory.resources[resource])
            for resource in specs
            if resource in self._on_disk
        }
        self.registry.learn(in_cdi=in_cdi, cdi_trouble=trouble)  # before anything else: pods may be waiting for it
        await asyncio.sleep(0)  # the kubelet first: the endpoints were woken by that
        for resource in written:
            log.info("cdi spec written", resource=resource, path=str(self._file(resource)))
        self._tell_of_trouble(trouble)
        await self._stale.clear(inventory, wanted={cdi_file_name(resource) for resource in specs})

    async def _sync_one(self, resource: str, wanted: bytes) -> bool:
        """Makes the file what is wanted; says whether that is news. When it fails, `_on_disk` has what is there.

        Raises OSError and `_NotOurs`.
        """
        file = self._file(resource)
        found = await self._read(resource, file)
        if found == wanted:
            return False
        replaced: Ownership | None = None
        if found is not None and not is_marked(found):
            replaced = await self._work.finish(partial(ownership, found, resource))
            if not replaced.may_replace:
                why = f"{file} belongs to another program ({replaced.why}): move it away or choose another alias"
                raise _NotOurs(why)
        self._on_disk[resource] = await self._work.finish(partial(files.replace, file, wanted))
        self.writes[resource] += 1
        return replaced is None or self._tell_of_other_writer(resource, file, replaced)

    async def _read(self, resource: str, file: Path) -> bytes | None:
        """What is in the file of a resource; None: there is no file. Raises OSError when that cannot be seen."""
        before = self._on_disk.get(resource)
        try:
            self._on_disk[resource] = await self._work.finish(partial(files.read, file, before, bytes))
        except OSError as error:
            if error.errno not in files.NO_RESOURCES:
                self._on_disk.pop(resource, None)
            if isinstance(error, FileNotFoundError):
                return None
            raise
        return self._on_disk[resource].says

    def _file(self, resource: str) -> Path:
        return self.folder / cdi_file_name(resource)

    def _tell_of_other_writer(self, resource: str, file: Path, replaced: Ownership) -> bool:
        """Names the other writer, then the fight; after that nothing is news any more. Says whether something was."""
        times = self._replaced[resource] = self._replaced.get(resource, 0) + 1
        if times == 1:
            log.warning("cdi spec of another writer replaced", resource=resource, path=str(file), reason=replaced.why)
        elif times == 2:
            log.error(
                "another writer keeps writing our cdi spec",
                resource=resource,
                path=str(file),
                reason="another program wrote it again after this plugin had replaced it; it is replaced each time",
                action="stop the other writer (an older device plugin, or kata-manager), or choose another alias",
            )
        return times <= 2

    def _tell_of_trouble(self, trouble: dict[str, str]) -> None:
        for resource, why in self._troubles.update(trouble).items():
            log.error("cdi trouble", resource=resource, reason=why)

    def _tell_of_silence(self) -> None:
        """While the folder does not answer it is not known of any device whether it is in a spec."""
        why = f"{self.folder} has not answered for {files.PATIENCE:g} s"
        trouble = dict.fromkeys(self.registry.current.resources, why)
        self.registry.learn(in_cdi={}, cdi_trouble=trouble)
        self._tell_of_trouble(trouble)
