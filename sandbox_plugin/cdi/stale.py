"""Stale specs: those of ours that no resource needs any more. Which they are, and how long each of them stays.

After a change of an alias pods still run under the old name, and Kata looks their devices up by it whenever it starts
such a pod's sandbox again. So a stale spec stays until no pod can need it, and stays as it is: that the node of one
device is gone fails only a pod that uses this very device, and the node may come back.

One bad spec fails every pod of the node. So what Kata's libraries refuse goes at once, and so does what has another
name than specs of its kind have: its devices could be in a second spec of the folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from sandbox_plugin.cdi import files
from sandbox_plugin.cdi.lint import read_spec
from sandbox_plugin.cdi.owner import is_marked, stated_kind
from sandbox_plugin.cdi.text import LARGEST
from sandbox_plugin.host.threads import on_thread
from sandbox_plugin.inventory.ledger import DeviceKey, Holdings
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.inventory.tracking import RETIRE
from sandbox_plugin.names import cdi_file_name

_VFIO_NODE = re.compile(r"/dev/vfio/(devices/vfio)?[0-9]+")
"""A device's own node: the reference plugin puts /dev/vfio/vfio beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaleSpec:
    """What a stale spec says."""

    kind: str | None = None
    """None: it is of no use to any pod."""
    nodes: Mapping[str, str] = field(default_factory=dict)
    """Device name -> its VFIO node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A file that is not wanted, as it was when it was read."""

    stamp: files.Stamp
    spec: StaleSpec | None
    """None: it is somebody else's."""


async def read_former(folder: Path, is_ours: Callable[[str], bool]) -> dict[DeviceKey, str]:
    """Device -> its node, of all specs of ours, for the time before it is known which of them are wanted.

    Writes nothing. What cannot be read counts as not there. May take for ever, on a dead mount; it can be cancelled.
    """
    try:
        seen = await look_for_stale(folder, frozenset(), is_ours, {})
    except OSError:
        return {}
    return former(each.spec for each in seen.values() if each.spec is not None)


def former(specs: Iterable[StaleSpec]) -> dict[DeviceKey, str]:
    """Device -> its node, of these specs."""
    return {(spec.kind, name): node for spec in specs if spec.kind is not None for name, node in spec.nodes.items()}


def read_stale(name: str, content: bytes, is_ours: Callable[[str], bool]) -> StaleSpec | None:
    """What the file of this name is if no resource wants it; None: somebody else's.

    Ours is what this plugin wrote, and what has the name and the kind of a resource that we may serve.
    """
    kind = stated_kind(content)
    if kind is not None and name != cdi_file_name(kind):
        kind = None
    if not is_marked(content) and not (kind is not None and is_ours(kind)):
        return None
    if kind is None or not (devices := read_spec(content).devices):
        return StaleSpec()
    nodes = {
        device.partition("=")[2]: next(filter(_VFIO_NODE.fullmatch, paths), None) for device, paths in devices.items()
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


# What happens on threads


@on_thread
def look_for_stale(
    folder: Path, wanted: Set[str], is_ours: Callable[[str], bool], before: Mapping[str, Seen]
) -> dict[str, Seen]:
    """Name -> what is in it, of each spec in the folder that is not `wanted`; what has not changed is not read again.

    Raises OSError when the folder cannot be read, or this process lacks something.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    seen = {}
    for name in sorted(set(names) - wanted):
        if not name.endswith(".yaml"):
            continue
        try:
            seen[name] = _look_at(folder / name, before.get(name), is_ours)
        except OSError as error:
            if error.errno in files.NO_RESOURCES:
                raise
            continue  # a folder, say: what cannot be read is not known to be ours
    return seen


def _look_at(file: Path, before: Seen | None, is_ours: Callable[[str], bool]) -> Seen:
    stamp = files.stamp_of(os.stat(file))
    if before is not None and before.stamp == stamp:
        return before
    return Seen(stamp=stamp, spec=read_stale(file.name, files.read(file, LARGEST + 1), is_ours))


@dataclass(kw_only=True)
class Removal:
    """How it went to remove stale specs."""

    removed: list[Path] = field(default_factory=list)
    stuck: dict[Path, str | None] = field(default_factory=dict)
    """Those that could not be removed, and why."""


@on_thread
def remove(folder: Path, stale: Mapping[str, files.Stamp]) -> Removal:
    """Removes the files of these names, except those that are not what was seen any more."""
    outcome = Removal()
    for name, stamp in stale.items():
        file = folder / name
        try:
            if files.stamp_of(os.stat(file)) == stamp:
                file.unlink()
                outcome.removed.append(file)
        except FileNotFoundError:
            continue
        except OSError as error:
            outcome.stuck[file] = error.strerror
    return outcome
