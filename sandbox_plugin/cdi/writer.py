"""CDI specs: what tells Kata which node belongs to a device name.

`render_specs` is pure. `CdiWriter` keeps the folder equal to what it renders: each file is replaced whole, a device is
in the spec before it is listed as Healthy, and a node that is gone leaves the spec. Which files are ours to replace is
in `cdi_owner`, and how long specs stay that no resource needs any more, in `stale`; nothing else is ever touched.

Rules of the format: CDI specification 0.5.0. Kata reads versions 0.1.0 to 0.6.0 strictly, and one bad spec in the
folder fails every pod, hence: no empty `devices`, only the device's own node, no field that is not needed.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog

from sandbox_plugin.cdi import files, stale
from sandbox_plugin.cdi.owner import MARK, Ownership, is_marked, ownership
from sandbox_plugin.cdi.text import LARGEST
from sandbox_plugin.host.threads import on_thread
from sandbox_plugin.inventory.ledger import DeviceKey
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device
from sandbox_plugin.names import cdi_file_name
from sandbox_plugin.registry import Registry
from sandbox_plugin.tasks import happens
from sandbox_plugin.trouble import Troubles

_PAUSE = 0.25
"""Seconds between two looks at the folder, and after somebody else's file was replaced: two writers who fight must not
become a busy loop. A change of the inventory does not wait."""
_PATIENCE = 5.0
"""Seconds after which it is said that the folder does not answer."""
_LAST_PATIENCE = 0.3
"""Seconds that file work gets to end when the writer is cancelled: half a spec should not be left behind."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_T = TypeVar("_T")


def render_specs(inventory: Inventory) -> dict[str, str]:
    """Resource name -> the text of its spec, for every resource with at least one device whose node exists."""
    return {
        resource: render_spec(resource, [d for d in devices if d.node_exists])
        for resource, devices in inventory.resources.items()
        if any(d.node_exists for d in devices)
    }


def render_spec(resource: str, devices: list[Device]) -> str:
    """One spec. Kata looks up `<resource name>=<device ID>`, so the kind is the resource and the name is the ID."""
    return MARK + _head(resource) + "".join(map(_entry, devices))


def _head(resource: str) -> str:
    return f'cdiVersion: "0.5.0"\nkind: {json.dumps(resource)}\ndevices:\n'


def _entry(device: Device) -> str:
    lines = (
        f"  - name: {json.dumps(device.id)}",
        "    containerEdits:",
        "      deviceNodes:",
        f"        - path: {json.dumps(device.node)}",
    )
    return "".join(f"{line}\n" for line in lines)


def ids_in_spec(text: bytes, resource: str, devices: Iterable[Device]) -> frozenset[str]:
    """IDs of those devices that a spec has which this plugin wrote, now or when it ran before; none of any other."""
    written = text.decode("utf-8", "replace")
    if not written.startswith(MARK + _head(resource)):
        return frozenset()
    return frozenset(device.id for device in devices if _entry(device) in written)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spec:
    """The text of a spec and the devices in it."""

    text: bytes
    ids: frozenset[str]
    stamp: files.Stamp | None = None
    """The file as it was when this text was last seen in it; None: never."""


@dataclass(kw_only=True)
class CdiWriter:
    """Keeps the specs in `folder` equal to the registry's inventory, and tells the registry what is on disk.

    `is_ours(resource)` says whether a resource name is one that we may serve. What somebody else removed or overwrote
    comes back when `look` is called, and at the latest after `recheck` seconds.
    """

    folder: Path
    registry: Registry
    is_ours: Callable[[str], bool]
    recheck: float = 5.0
    _bell: asyncio.Event = field(default_factory=asyncio.Event)
    _not_before: float = 0.0
    """When the next look may come, in the loop's time."""
    _is_look_due: bool = False
    _on_disk: dict[str, _Spec] = field(default_factory=dict)
    """What was last seen in the file of a resource."""
    _unwanted: dict[str, stale.Seen] = field(default_factory=dict)
    """The other specs of the folder, by name, as they were when they were read."""
    _free_since: dict[str, float] = field(default_factory=dict)
    """As in `stale.free_since`."""
    _former: dict[DeviceKey, str] | None = None
    """What the registry was told."""
    _troubles: Troubles[str] = field(default_factory=Troubles)
    """By resource."""
    _stale_troubles: Troubles[Path] = field(default_factory=Troubles)
    """By stale spec, or for the folder as a whole."""
    _kept: Troubles[Path] = field(default_factory=Troubles)
    """Why stale specs are kept."""
    _replaced: dict[str, int] = field(default_factory=dict)
    """How often somebody else's spec was replaced: two writers are named once, not each time."""

    def look(self) -> None:
        """Something changed in the folder. The writer looks at it now, or after the pause."""
        if not self._is_look_due:
            self._is_look_due = True
            self._ring()

    def _ring(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._not_before:
            loop.call_at(self._not_before, self._ring)
            return
        self._not_before = loop.time() + _PAUSE
        self._is_look_due = False
        self._bell.set()

    async def run(self) -> None:
        """Runs until cancelled. The specs stay then: running pods may be restarted against them."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_inventory())
            while True:
                self._bell.clear()
                inventory = self.registry.current
                if inventory.version:
                    await self._sync(inventory)
                await happens(self._bell, within=self._patience())

    def _patience(self) -> float:
        pause = self._not_before - asyncio.get_running_loop().time()
        return max(pause, min(self.recheck, 1.0) if self._has_trouble() else self.recheck)

    def _has_trouble(self) -> bool:
        return bool(self._troubles.now or self._stale_troubles.now)

    async def _follow_inventory(self) -> None:
        inventory = self.registry.current
        while True:
            inventory = await self.registry.newer_than(inventory.version)
            self._bell.set()

    async def _sync(self, inventory: Inventory) -> None:
        specs = render_specs(inventory)
        trouble: dict[str, str] = {}
        written: list[str] = []
        for resource, text in specs.items():
            devices = [d for d in inventory.resources[resource] if d.node_exists]
            try:
                if await self._sync_one(resource, text.encode(), devices):
                    written.append(resource)
            except OSError as error:
                trouble[resource] = f"its CDI spec cannot be written: {error.filename or self.folder}: {error.strerror}"
            except _NotOurs as error:
                trouble[resource] = str(error)
        in_cdi = {resource: self._on_disk[resource].ids for resource in specs if resource in self._on_disk}
        self.registry.learn(in_cdi=in_cdi, cdi_trouble=trouble)  # before anything else: pods may be waiting for it
        await asyncio.sleep(0)  # the kubelet first: the endpoints were woken by that
        for resource in written:
            log.info("cdi spec written", resource=resource, path=str(self.folder / cdi_file_name(resource)))
        stale_trouble = await self._clear_stale(inventory, wanted={cdi_file_name(resource) for resource in specs})
        self._tell_of_trouble(trouble)
        for path, why in self._stale_troubles.update(stale_trouble).items():
            log.error("cdi trouble", path=str(path), reason=why)

    def _tell_of_trouble(self, trouble: dict[str, str]) -> None:
        for resource, why in self._troubles.update(trouble).items():
            log.error("cdi trouble", resource=resource, reason=why)

    async def _sync_one(self, resource: str, wanted: bytes, devices: Sequence[Device]) -> bool:
        """Makes the file what is wanted; says whether that is news. When it fails, `_on_disk` has what is there."""
        file = self.folder / cdi_file_name(resource)
        before = self._on_disk.get(resource)
        try:
            outcome = await self._uninterrupted(_write_if_different(file, resource, wanted, before))
        except OSError as error:
            if error.errno not in files.NO_RESOURCES:
                self._on_disk.pop(resource, None)
            raise
        there = wanted if outcome.failure is None else outcome.found
        if there is None:
            self._on_disk.pop(resource, None)
        else:
            # After a start on a full disk this is what an earlier run wrote: pods can have what is in it.
            ids = ids_in_spec(there, resource, devices)
            self._on_disk[resource] = _Spec(text=there, ids=ids, stamp=outcome.stamp)
        if outcome.failure is not None:
            raise outcome.failure
        if outcome.replaced is not None:
            return self._tell_of_other_writer(resource, file, outcome.replaced)
        return outcome.found != wanted

    def _tell_of_other_writer(self, resource: str, file: Path, replaced: Ownership) -> bool:
        """Names the other writer, then the fight; after that nothing is news any more. Says whether something was."""
        self._not_before = asyncio.get_running_loop().time() + _PAUSE
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

    async def _clear_stale(self, inventory: Inventory, wanted: Set[str]) -> dict[Path, str]:
        """Removes the stale specs that no pod can need, and tells the registry of the others.

        Returns what could not be removed, and why.
        """
        look = stale.look_for_stale(self.folder, wanted, self.is_ours, self._unwanted)
        try:
            self._unwanted = await self._uninterrupted(look)
        except OSError as error:
            return {self.folder: f"stale CDI specs cannot be looked for: {error.strerror}"}
        kept, going = self._sort_stale(inventory)
        for path, why in self._kept.update(kept).items():
            log.info("stale cdi spec kept", path=str(path), reason=why)
        if not going:
            return {}
        try:
            outcome = await self._uninterrupted(stale.remove(self.folder, going))
        except OSError as error:
            return {self.folder: f"stale CDI specs cannot be removed: {error.strerror}"}
        for file in outcome.removed:
            log.info("stale cdi spec removed", path=str(file))
        return {file: f"this stale CDI spec cannot be removed: {why}" for file, why in outcome.stuck.items()}

    def _sort_stale(self, inventory: Inventory) -> tuple[dict[Path, str], dict[str, files.Stamp]]:
        """Why some stale specs are kept, and which are to go. Tells the registry what those say that are kept."""
        specs = {name: seen.spec for name, seen in self._unwanted.items() if seen.spec is not None}
        kinds = {spec.kind for spec in specs.values() if spec.kind is not None}
        holdings, has_pod_resources = self.registry.holdings, self.registry.has_pod_resources
        self._free_since = stale.free_since(self._free_since, kinds, holdings)
        whys = {
            name: stale.why_kept(spec, inventory, holdings, self._free_since, has_pod_resources=has_pod_resources)
            for name, spec in specs.items()
        }
        kept = {name: why for name, why in whys.items() if why is not None}
        former = stale.former(specs[name] for name in kept)
        if former != self._former:
            self._former = former
            self.registry.learn(former=former)
        going = {name: self._unwanted[name].stamp for name in specs if name not in kept}
        return {self.folder / name: why for name, why in kept.items()}, going

    async def _uninterrupted(self, work: Awaitable[_T]) -> _T:
        """Waits for file work to end, however long that takes, and tells when the folder does not answer.

        A thread cannot be stopped. When the writer is cancelled it waits a moment, so that nothing half-done is left
        behind, and then leaves the thread to itself.
        """
        task = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait([task], timeout=_PATIENCE)
            if not done:
                why = f"{self.folder} has not answered for {_PATIENCE:g} s"
                trouble = dict.fromkeys(self.registry.current.resources, why)
                self.registry.learn(in_cdi={}, cdi_trouble=trouble)
                self._tell_of_trouble(trouble)
                await asyncio.wait([task])
            return task.result()
        except asyncio.CancelledError:
            task.add_done_callback(_ignore)
            await asyncio.wait([task], timeout=_LAST_PATIENCE)
            raise


def _ignore(task: asyncio.Future[_T]) -> None:
    """How it ended is of no interest any more; asyncio would complain if nobody asked."""
    if not task.cancelled():
        task.exception()


# What happens on threads, one hop for each: a pod may be waiting


class _NotOurs(Exception):
    """The file that has our name is not ours to replace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """How it went to write a spec."""

    found: bytes | None
    """What was there before; None if there was no file."""
    stamp: files.Stamp | None = None
    """The file as it is now."""
    replaced: Ownership | None = None
    """Why what somebody else had written could be replaced; None: it was not somebody else's, or was not replaced."""
    failure: OSError | _NotOurs | None = None
    """Why what was found is still there."""


@on_thread
def _write_if_different(file: Path, resource: str, wanted: bytes, before: _Spec | None) -> _Written:
    """Replaces the file if something else than `wanted` is in it. Raises OSError when that cannot be seen."""
    stamp: files.Stamp | None
    found: bytes | None
    try:
        stamp = files.stamp_of(os.stat(file))
        if before is not None and before.stamp == stamp:
            found = before.text
        else:
            found = files.read(file, max(LARGEST, len(wanted)) + 1)
    except FileNotFoundError:
        stamp = found = None
    if found == wanted:
        return _Written(found=found, stamp=stamp)
    owner = None
    if found is not None and not is_marked(found):
        owner = ownership(found, resource)
        if not owner.may_replace:
            reason = f"{file} belongs to another program ({owner.why}): move it away or choose another alias"
            return _Written(found=found, stamp=stamp, failure=_NotOurs(reason))
    try:
        try:
            written = files.replace(file, wanted)
        except FileNotFoundError:
            files.make_folder(file.parent)
            written = files.replace(file, wanted)
    except OSError as error:
        return _Written(found=found, stamp=stamp, failure=error)
    return _Written(found=found, stamp=written, replaced=owner)
