"""Stale specs: those of ours that no resource needs any more. Which they are, and how long each of them stays.

After a change of an alias pods still run under the old name, and Kata looks their devices up by it whenever it starts
such a pod's sandbox again. So a stale spec stays until no pod can need it, and stays as it is: that the node of one
device is gone fails only a pod that uses this very device, and the node may come back.

One bad spec fails every pod of the node. So what Kata's libraries refuse goes at once, and so does what has another
name than specs of its kind have: its devices could be in a second spec of the folder.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import structlog

from sandbox_plugin.cdi.lint import read_spec
from sandbox_plugin.host import files
from sandbox_plugin.host.files import FileWork, Known
from sandbox_plugin.host.threads import on_thread
from sandbox_plugin.inventory.ledger import DeviceKey, Holdings
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.inventory.tracking import RETIRE
from sandbox_plugin.names import cdi_file_name
from sandbox_plugin.registry import Registry
from sandbox_plugin.trouble import Troubles

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_PATIENCE = 1.0
"""Seconds that the folder gets at the start to say what is in it; on a dead mount it never does."""
_VFIO_NODE = re.compile(r"/dev/vfio/(devices/vfio)?[0-9]+")
"""A device's own node: the reference plugin puts /dev/vfio/vfio beside it."""


class StaleSpec(NamedTuple):
    """What a stale spec says."""

    kind: str | None = None
    """None: it is of no use to any pod."""
    nodes: Mapping[str, str] = MappingProxyType({})
    """Device name -> its VFIO node."""


Unwanted = Mapping[str, Known[StaleSpec | None]]
"""Name -> what is in it, of the specs in the folder that no resource wants. None: it is somebody else's."""


@dataclass(kw_only=True, eq=False, repr=False)
class StaleSpecs:
    """Those in one folder: tells the registry what they say, and removes each when no pod can need it any more."""

    folder: Path
    registry: Registry
    is_ours: Callable[[str], bool]
    """Whether we may serve a resource of this name."""
    work: FileWork
    """That of the specs of resources too."""
    _unwanted: Unwanted = field(default_factory=dict)
    _free_since: Mapping[str, float] = field(default_factory=dict)
    """As in `free_since`."""
    _former: Mapping[DeviceKey, str] | None = None
    """What the registry was told."""
    _kept: Troubles[Path] = field(default_factory=Troubles)
    """Why each is kept."""
    _troubles: Troubles[Path] = field(default_factory=Troubles)
    """By spec, or for the folder as a whole."""

    @property
    def has_trouble(self) -> bool:
        return bool(self._troubles.now)

    async def clear(self, inventory: Inventory, wanted: Set[str]) -> None:
        """Looks at all specs but the `wanted` ones, by name, and removes those that no pod can need."""
        trouble: dict[Path, str] = {}
        look = partial(find_unwanted, self.folder, wanted, self.is_ours, self._unwanted)
        try:
            self._unwanted = await self.work.finish(look)
        except OSError as error:
            trouble[self.folder] = f"stale CDI specs cannot be looked for: {error.strerror}"
        else:
            for name in self._choose(inventory):
                file = self.folder / name
                try:
                    if await self.work.finish(partial(files.remove, file, self._unwanted[name].stamp)):
                        log.info("stale cdi spec removed", path=str(file))
                except OSError as error:
                    trouble[file] = f"this stale CDI spec cannot be removed: {error.strerror}"
        for path, why in self._troubles.update(trouble).items():
            log.error("cdi trouble", path=str(path), reason=why)

    def _choose(self, inventory: Inventory) -> list[str]:
        """Those that are to go. Tells the registry what the others say, and the log why these are kept."""
        stale = {name: known.says for name, known in self._unwanted.items() if known.says is not None}
        holdings, has_pod_resources = self.registry.holdings, self.registry.has_pod_resources
        kinds = {spec.kind for spec in stale.values() if spec.kind is not None}
        self._free_since = free_since(self._free_since, kinds, holdings)
        kept: dict[str, str] = {}
        for name, spec in stale.items():
            why = why_kept(spec, inventory, holdings, self._free_since, has_pod_resources=has_pod_resources)
            if why is not None:
                kept[name] = why
        for path, why in self._kept.update({self.folder / name: why for name, why in kept.items()}).items():
            log.info("stale cdi spec kept", path=str(path), reason=why)
        former = _former(stale[name] for name in kept)
        if former != self._former:
            self._former = former
            self.registry.learn(former=former)
        return [name for name in stale if name not in kept]


async def learn_former(folder: Path, registry: Registry, is_ours: Callable[[str], bool]) -> None:
    """Tells the registry which nodes pods may hold under names that are not offered any more.

    To be known, like their holders, before anything is offered. A folder that does not answer tells nothing; the CDI
    writer says later that it is silent.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            registry.learn(former=await read_former(folder, is_ours))


async def read_former(folder: Path, is_ours: Callable[[str], bool]) -> dict[DeviceKey, str]:
    """Device -> its node, of all specs of ours, for the time before it is known which of them are wanted.

    Writes nothing. What cannot be read counts as not there. May take for ever, on a dead mount; it can be cancelled.
    """
    try:
        unwanted = await on_thread(find_unwanted)(folder, frozenset(), is_ours, {})
    except OSError:
        return {}
    return _former(known.says for known in unwanted.values() if known.says is not None)


def _former(specs: Iterable[StaleSpec]) -> dict[DeviceKey, str]:
    return {(spec.kind, name): node for spec in specs if spec.kind is not None for name, node in spec.nodes.items()}


# What is stale


def find_unwanted(folder: Path, wanted: Set[str], is_ours: Callable[[str], bool], before: Unwanted) -> Unwanted:
    """What is in the folder now that is not `wanted`. For a thread.

    Raises OSError when the folder cannot be read, or this process lacks something.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    for name in sorted(set(names) - wanted):
        if not name.endswith(".yaml"):
            continue
        try:
            found[name] = files.read(folder / name, before.get(name), partial(read_stale, name, is_ours=is_ours))
        except OSError as error:
            if error.errno in files.NO_RESOURCES:
                raise
            continue  # a folder, say: what cannot be read is not known to be ours
    return found


def read_stale(name: str, content: bytes, is_ours: Callable[[str], bool]) -> StaleSpec | None:
    """What the file of this name is if no resource wants it; None: somebody else's.

    Ours is what this plugin wrote, and what has the name and the kind of a resource that we may serve.
    """
    reading = read_spec(content)
    kind = reading.kind if reading.kind is not None and name == cdi_file_name(reading.kind) else None
    if not reading.ours and not (kind is not None and is_ours(kind)):
        return None
    if kind is None or not reading.devices:
        return StaleSpec()
    nodes = {
        device.partition("=")[2]: next(filter(_VFIO_NODE.fullmatch, paths), None)
        for device, paths in reading.devices.items()
    }
    return StaleSpec(kind=kind, nodes={name: node for name, node in nodes.items() if node is not None})


# How long they stay


def free_since(before: Mapping[str, float], kinds: Set[str], holdings: Holdings | None) -> dict[str, float]:
    """Kind -> when the answer was asked for that was the first to show that no pod has a device of it.

    Also an answer from before the spec became stale may be that: while we run that happens only when the last node of
    the kind goes, and after a start pods that were admitted just before show in a later answer.
    """
    if holdings is None:
        return {}
    held = {resource for resource, _ in holdings.pods}
    shown = dict.fromkeys(kinds, holdings.asked_at) if holdings.complete else {}
    return {kind: since for kind, since in {**shown, **before}.items() if kind in kinds - held}


def why_kept(
    spec: StaleSpec,
    inventory: Inventory,
    holdings: Holdings | None,
    free_since: Mapping[str, float],
    *,
    has_pod_resources: bool,
) -> str | None:
    """Why pods may still need this spec; None: none does."""
    if spec.kind is None:
        return None
    nodes = inventory.nodes
    served = inventory.resources.get(spec.kind, ())
    lost = {device.id for device in served if device.placements}  # these are written anew when they are back
    existing = [node for name, node in spec.nodes.items() if name not in lost and (nodes is None or node in nodes)]
    if served and not existing:
        return None
    if not has_pod_resources:
        if not existing:
            return None
        if nodes is None:
            return "it cannot be seen now which VFIO nodes there are, and PodResources does not say who holds which"
        return f"{existing[0]} exists, and without PodResources it is not known whether a pod holds it"
    if holdings is None:
        return "PodResources has not said yet which pods hold devices of it"
    if holders := [pod for (resource, _), pod in holdings.pods.items() if resource == spec.kind]:
        return f"pod {min(holders)} holds a device of it"
    since = free_since.get(spec.kind)
    if since is None:
        return "the kubelet has just started, and may not know of all its pods yet"
    if holdings.asked_at - since < RETIRE:
        return f"PodResources has not shown for {RETIRE:g} s yet that no pod holds a device of it"
    return None
