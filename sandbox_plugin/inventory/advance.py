"""What the node offers now: the step from what was, what the host shows, and what was learnt from others.

`advance` is the whole of it. It is pure: time comes in as a number, and everything that has to be remembered
(what was listed, damping, who holds what, AER recoveries, who leaves when) is a value in the inventory itself.

The rules it keeps:

- A loss counts at once. A device that recovered is listed as Healthy again after it has been well for `SETTLE`; one
  that is new, or was bound again, is not held back.
- A device that is gone stays listed, Unhealthy, until PodResources has shown for `RETIRE` that no pod holds it: the
  kubelet reports a missing allocated device as healthy, and may crash when one goes during Allocate.
- One ID is one node path for as long as a pod may hold the ID: the kubelet keeps Allocate's answers by ID.
- One node, one IOMMU group, one address: one pod (`ledger` remembers who holds what, `sharing` tells what follows).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from sandbox_plugin.inventory import ledger as ledgers
from sandbox_plugin.inventory.devices import Found, find_devices
from sandbox_plugin.inventory.ledger import DeviceKey, Ledger, Places
from sandbox_plugin.inventory.nodes import vfio_nodes
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.sharing import Verdicts, places_of_id, withheld
from sandbox_plugin.inventory.state import Inventory, Memory, Signals, Track
from sandbox_plugin.inventory.tracking import DEAD, FATAL_QUIET, follow, held_but_unknown, why_silent
from sandbox_plugin.model import HEALTHY, Device, Health, HostFacts, Reason

SETTLE = 2.0
"""Seconds for which a device that recovered must be well before it is Healthy again."""
ARRIVAL = 1.0
"""Seconds in which a device that has just arrived may still be ill without being held back: a bind is several steps,
and a look in between sees the driver without the node."""


def advance(
    previous: Inventory, facts: HostFacts, signals: Signals, now: float, rules: Rules
) -> tuple[Inventory, float | None]:
    """One step. `now` is in monotonic seconds.

    Returns the next inventory (with the previous one's version where nothing that a reader sees has changed) and the
    time at which another look would lead further although nothing happens, or None.
    """
    memory = previous.memory
    if memory.found is not None and facts is memory.facts:
        found = memory.found
    else:
        cdevs = memory.found is not None and memory.found.cdevs
        found = find_devices(facts, rules, cdevs_known=cdevs, before=memory.found)
    tracks = follow(memory.tracks, found, facts, signals, now)
    ledger = _learn(memory, tracks, found, facts, signals, now, rules)
    if _is_steady(previous, found, tracks, ledger, signals):
        nodes = previous.nodes if facts is memory.facts else vfio_nodes(facts)
        return replace(previous, nodes=nodes, memory=replace(memory, facts=facts)), _wake_at(tracks, ledger, facts, now)
    tracks |= held_but_unknown(ledger, rules.may_be_ours, tracks, found, facts, now)
    verdicts = withheld(found.groups, ledger, signals, previous.is_healthy)
    tracks, devices = _listed(tracks, verdicts, signals, now)
    inventory = Inventory(
        version=previous.version,
        resources=_by_resource(devices),
        by_key=MappingProxyType(devices),
        unoffered=MappingProxyType(dict(found.unoffered)),
        without_spec=_without_spec(devices.values(), signals),
        waits_for_holdings=_waits_for_holdings(tracks, ledger, signals),
        nodes=vfio_nodes(facts),
        memory=Memory(tracks=tracks, ledger=ledger, facts=facts, found=found, signals=signals),
    )
    if not previous.version or _shown(inventory) != _shown(previous):
        inventory = replace(inventory, version=previous.version + 1)
    return inventory, _wake_at(tracks, ledger, facts, now)


def _is_steady(
    previous: Inventory, found: Found, tracks: Mapping[DeviceKey, Track], ledger: Ledger, signals: Signals
) -> bool:
    """Whether nothing has changed since the step before, as it is nearly always: nothing new can follow then."""
    memory = previous.memory
    if found is not memory.found or ledger is not memory.ledger or signals != memory.signals:
        return False
    if len(tracks) != len(memory.tracks):
        return False
    return all(track is memory.tracks.get(key) and not _is_changing(track) for key, track in tracks.items())


def _is_changing(track: Track) -> bool:
    """Whether time alone changes it: it is about to have settled, or to count as ill since it arrived."""
    return track.well_since is not None if track.ill else not track.been_well


def allocate(
    previous: Inventory, devices: Sequence[Device], signals: Signals, looked_at: float, now: float
) -> Inventory:
    """The step after one Allocate was answered with these devices: they are a pod's, and their mates are withheld.

    `looked_at`: when the look at them began that found nothing against them, in monotonic seconds.
    Costs what these devices cost, and not what the node has: all pod admission of the node waits for it.
    """
    memory = previous.memory
    ledger = ledgers.give(memory.ledger, devices, looked_at, now)
    assert memory.found is not None
    numbers = {device.iommu_group for device in devices} | _groups_of_old(memory, devices)
    groups = {number: memory.found.groups[number] for number in numbers if number in memory.found.groups}
    verdicts = withheld(groups, ledger, signals, previous.is_healthy)
    concerned = {(d.resource, d.id) for group in groups.values() for d in group.devices}
    tracks, listed = _listed({k: memory.tracks[k] for k in concerned if k in memory.tracks}, verdicts, signals, now)
    changed = {key: device for key, device in listed.items() if device != previous.by_key.get(key)}
    resources = dict(previous.resources)
    for resource in {resource for resource, _ in changed}:
        resources[resource] = tuple(changed.get((resource, d.id), d) for d in resources[resource])
    is_news = bool(changed) or not previous.waits_for_holdings
    return replace(
        previous,
        version=previous.version + is_news,
        resources=MappingProxyType(resources) if changed else previous.resources,
        by_key=MappingProxyType({**previous.by_key, **changed}) if changed else previous.by_key,
        waits_for_holdings=True,
        memory=replace(memory, tracks={**memory.tracks, **tracks}, ledger=ledger),
    )


def _groups_of_old(memory: Memory, devices: Iterable[Device]) -> set[int]:
    """The groups that pods had by these IDs before, where the numbers were other functions'."""
    functions = memory.facts.functions if memory.facts is not None else {}
    old = (memory.ledger.grants.get((device.resource, device.id)) for device in devices)
    addresses = [address for grant in old if grant is not None for address in grant.places.addresses]
    groups = {functions[address].iommu_group for address in addresses if address in functions}
    return {group for group in groups if group is not None}


def _learn(
    memory: Memory,
    tracks: Mapping[DeviceKey, Track],
    found: Found,
    facts: HostFacts,
    signals: Signals,
    now: float,
    rules: Rules,
) -> Ledger:
    """What is known of who holds what after this step."""

    def places(key: DeviceKey) -> Places | None:
        return places_of_id(key, tracks, found, facts, signals, rules)

    ledger = ledgers.serve_since(memory.ledger, signals.serving_since)
    if facts is not memory.facts:
        ledger = ledgers.observe(ledger, memory.facts, facts, now)
    ledger = ledgers.take_in(ledger, signals.holdings, places)
    if found.kernel_is_known and not (memory.found is not None and memory.found.kernel_is_known):
        ledger = ledgers.place_again(ledger, places)
    if signals.busy:
        busy = {key: addresses for key, addresses in signals.busy.items() if key in tracks}
        ledger = ledgers.found_busy(ledger, busy, lambda key: tracks[key].device.iommu_group, now)
    return ledgers.attribute_uses(ledgers.expire(ledger, now, has_pod_resources=signals.pod_resources))


def _shown(inventory: Inventory) -> tuple[object, ...]:
    """What readers see, and so what makes a new version."""
    return (inventory.resources, inventory.unoffered, inventory.without_spec, inventory.waits_for_holdings)


def _listed(
    tracks: Mapping[DeviceKey, Track], verdicts: Verdicts, signals: Signals, now: float
) -> tuple[dict[DeviceKey, Track], dict[DeviceKey, Device]]:
    """The tracks after damping, and the devices as they are listed."""
    damped: dict[DeviceKey, Track] = {}
    devices: dict[DeviceKey, Device] = {}
    for key, track in tracks.items():
        health = _verdict(track, verdicts.taken.get(key))
        damped[key] = track = _damp(track, health, now)
        listed = _listed_health(track, health, verdicts.unknown.get(key), signals)
        devices[key] = track.device if track.device.health == listed else replace(track.device, health=listed)
    return damped, devices


def _verdict(track: Track, taken: Health | None) -> Health:
    """The verdict before damping and CDI have their say."""
    if track.gone_since is not None or not track.device.health.healthy:
        return track.device.health
    if (silent := why_silent(track)) is not None:
        return silent
    for _, error in sorted(track.fatal_errors.items()):
        return Health(reason=Reason.FATAL_ERROR, detail=error.words)
    return HEALTHY if taken is None else taken


def _damp(track: Track, health: Health, now: float) -> Track:
    if track.gone_since is not None:
        return track
    if not health.healthy:
        still_arriving = not track.been_well and now - track.arrived_at < ARRIVAL
        return replace(track, ill=track.ill or not still_arriving, well_since=None)
    if not track.ill:
        return track if track.been_well else replace(track, been_well=True)
    well_since = now if track.well_since is None else track.well_since
    return replace(track, been_well=True, well_since=well_since, ill=now < well_since + SETTLE)


def _listed_health(track: Track, health: Health, unknown: Health | None, signals: Signals) -> Health:
    if not health.healthy:
        return health
    if unknown is not None:
        return unknown
    if track.ill:
        return Health(reason=Reason.SETTLING, detail=f"recovered; Healthy after {SETTLE:g} s without trouble")
    if signals.in_cdi is not None:
        resource, device_id = track.key
        if device_id not in signals.in_cdi.get(resource, frozenset()):
            why = signals.cdi_trouble.get(resource, "its CDI spec is being written")
            return Health(reason=Reason.NOT_IN_CDI, detail=why)
    return HEALTHY


def _by_resource(devices: Mapping[DeviceKey, Device]) -> Mapping[str, tuple[Device, ...]]:
    resources: dict[str, list[Device]] = {}
    for (resource, _), device in devices.items():
        resources.setdefault(resource, []).append(device)
    return MappingProxyType({name: tuple(listed) for name, listed in resources.items()})


def _without_spec(devices: Iterable[Device], signals: Signals) -> frozenset[str]:
    """Resources that should have a CDI spec on disk, and have none with a device of theirs in it."""
    in_cdi = signals.in_cdi
    if in_cdi is None:
        return frozenset()
    needing: set[str] = set()
    having: set[str] = set()
    for device in devices:
        if device.node_exists:
            needing.add(device.resource)
        if device.resource not in having and device.id in in_cdi.get(device.resource, frozenset()):
            having.add(device.resource)
    return frozenset(needing - having)


def _waits_for_holdings(tracks: Mapping[DeviceKey, Track], ledger: Ledger, signals: Signals) -> bool:
    """Whether something can only be settled by asking PodResources."""
    if ledger.grants or ledger.uses or signals.former or any(t.gone_since is not None for t in tracks.values()):
        return True
    return signals.pod_resources and not ledger.is_told


def _wake_at(tracks: Mapping[DeviceKey, Track], ledger: Ledger, facts: HostFacts, now: float) -> float | None:
    """The next time at which time alone changes something, or another look does: that is now. What was due until now
    has been taken into account."""
    if ledgers.has_undecided(ledger, facts):
        return now
    times = [t.well_since + SETTLE for t in tracks.values() if t.ill and t.well_since is not None]
    fatal_errors = [error for t in tracks.values() if t.fatal_errors for error in t.fatal_errors.values()]
    times += [error.since + FATAL_QUIET for error in fatal_errors if error.since is not None]
    times += [since + DEAD for t in tracks.values() if t.unanswered for since in t.unanswered.values()]
    times += [ledger.ends_at(grant) for grant in ledger.grants.values()]
    return min((time for time in times if time > now), default=None)
