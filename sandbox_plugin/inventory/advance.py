"""What the node offers now: the step from what was, what the host shows, and what was learnt from others.

`advance` is the whole of it. It is pure: time comes in as a number, and everything that has to be remembered
(what was listed, damping, promises to pods, AER recoveries, who leaves when) is a value in the inventory itself.

The rules it keeps:

- A loss counts at once. A device that recovered is listed as Healthy again after it has been well for `SETTLE`; one
  that is new, or was bound again, is not held back.
- A device that is gone stays listed, Unhealthy, until PodResources has shown for `RETIRE` that no pod holds it: the
  kubelet reports a missing allocated device as healthy, and may crash when one goes during Allocate.
- One ID is one node path for as long as a pod may hold the ID: the kubelet keeps Allocate's answers by ID.
- An IOMMU group belongs to one VM (`sharing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from sandbox_plugin.inventory.devices import find_devices
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.nodes import vfio_nodes
from sandbox_plugin.inventory.sharing import (
    PROMISE_UNUSED,
    keep_promises,
    waits_for_a_look,
    waits_for_holdings,
    why_taken,
)
from sandbox_plugin.inventory.state import DeviceKey, Inventory, Memory, Promise, Signals, Track
from sandbox_plugin.inventory.tracking import FATAL_QUIET, follow, held_but_unknown
from sandbox_plugin.model import HEALTHY, Device, Health, HostFacts, Reason, id_order
from sandbox_plugin.settings import Settings

SETTLE = 2.0
"""Seconds for which a device that recovered must be well before it is Healthy again."""
ARRIVAL = 1.0
"""Seconds in which a device that has just arrived may still be ill without being held back: a bind is several steps,
and a look in between sees the driver without the node."""


def advance(
    previous: Inventory, facts: HostFacts, signals: Signals, now: float, settings: Settings, names: ModelNames
) -> tuple[Inventory, float | None]:
    """One step. `now` is in monotonic seconds.

    Returns the next inventory (with the previous one's version where nothing that a reader sees has changed) and the
    time at which another look would lead further although nothing happens, or None.
    """
    found = find_devices(facts, settings, names, cdevs_known=previous.memory.cdevs)
    tracks = follow(previous.memory.tracks, found, facts, signals, now)
    tracks |= held_but_unknown(tracks, signals.holdings, settings, names, now, cdevs=found.cdevs)
    promises = keep_promises(previous.memory.promises, tracks, signals, now)
    healths = {key: _health(key, tracks, promises, signals) for key in tracks}
    tracks = {key: _damp(track, healths[key], now) for key, track in tracks.items()}
    listed = [replace(t.device, health=_listed_health(t, healths[key], signals)) for key, t in tracks.items()]
    resources = _by_resource(listed)
    has_former = any(resource not in resources for resource, _ in signals.former)
    inventory = Inventory(
        version=previous.version,
        resources=resources,
        unoffered=MappingProxyType(dict(found.unoffered)),
        without_spec=_without_spec(listed, signals),
        waits_for_holdings=has_former or waits_for_holdings(tracks, promises, signals.holdings),
        nodes=vfio_nodes(facts),
        memory=Memory(tracks=tracks, promises=promises, cdevs=found.cdevs),
    )
    if not previous.version or _shown(inventory) != _shown(previous):
        inventory = replace(inventory, version=previous.version + 1)
    if waits_for_a_look(tracks, signals.holdings, facts.began_at):
        return inventory, now
    return inventory, _wake_at(tracks, promises, signals, now)


def _shown(inventory: Inventory) -> tuple[object, ...]:
    """What readers see, and so what makes a new version."""
    return (inventory.resources, inventory.unoffered, inventory.without_spec, inventory.waits_for_holdings)


def _health(
    key: DeviceKey, tracks: Mapping[DeviceKey, Track], promises: Mapping[DeviceKey, Promise], signals: Signals
) -> Health:
    """The verdict before damping and CDI have their say."""
    track = tracks[key]
    if track.gone_since is not None or not track.device.health.healthy:
        return track.device.health
    for address, _ in sorted(track.silent):
        return Health(
            reason=Reason.OFF_THE_BUS, detail=f"{address} did not answer on the PCI bus and has been asleep since"
        )
    for _, error in sorted(track.fatal_errors.items()):
        return Health(reason=Reason.FATAL_ERROR, detail=error.words)
    return why_taken(key, tracks, promises, signals)


def _damp(track: Track, health: Health, now: float) -> Track:
    if track.gone_since is not None:
        return track
    if not health.healthy:
        still_arriving = not track.been_well and now - track.arrived_at < ARRIVAL
        return replace(track, ill=track.ill or not still_arriving, well_since=None)
    if not track.ill:
        return replace(track, been_well=True)
    well_since = now if track.well_since is None else track.well_since
    return replace(track, been_well=True, well_since=well_since, ill=now < well_since + SETTLE)


def _listed_health(track: Track, health: Health, signals: Signals) -> Health:
    if not health.healthy:
        return health
    if track.ill:
        return Health(reason=Reason.SETTLING, detail=f"recovered; Healthy after {SETTLE:g} s without trouble")
    resource, device_id = track.key
    if signals.in_cdi is not None and device_id not in signals.in_cdi.get(resource, frozenset()):
        why = signals.cdi_trouble.get(resource, "its CDI spec is being written")
        return Health(reason=Reason.NOT_IN_CDI, detail=why)
    return HEALTHY


def _by_resource(devices: list[Device]) -> Mapping[str, tuple[Device, ...]]:
    resources: dict[str, list[Device]] = {}
    for device in sorted(devices, key=lambda d: (d.resource, id_order(d.id))):
        resources.setdefault(device.resource, []).append(device)
    return MappingProxyType({name: tuple(listed) for name, listed in resources.items()})


def _without_spec(devices: list[Device], signals: Signals) -> frozenset[str]:
    """Resources that should have a CDI spec on disk, and have none with a device of theirs in it."""
    in_cdi = signals.in_cdi
    if in_cdi is None:
        return frozenset()
    needing = {d.resource for d in devices if d.node_exists}
    return frozenset(needing - {d.resource for d in devices if d.id in in_cdi.get(d.resource, frozenset())})


def _wake_at(
    tracks: Mapping[DeviceKey, Track], promises: Mapping[DeviceKey, Promise], signals: Signals, now: float
) -> float | None:
    """The next time at which time alone changes something. What was due until now has been taken into account."""
    times = [t.well_since + SETTLE for t in tracks.values() if t.ill and t.well_since is not None]
    fatal_errors = [error for t in tracks.values() for error in t.fatal_errors.values()]
    times += [error.since + FATAL_QUIET for error in fatal_errors if error.since is not None]
    if signals.holdings is None:
        times += [p.at + PROMISE_UNUSED for p in promises.values()]
    return min((time for time in times if time > now), default=None)
