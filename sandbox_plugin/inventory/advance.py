"""What the node offers now: the step from what was, what the host shows, and what was learnt from others.

`advance` is the whole of it: the rules in their order, each in the module that is named for it. `allocate` is the same
for what one Allocate concerns. Both are pure: time comes in as a number, and everything that has to be remembered (what
was found, damping, who holds what, AER recoveries, who leaves when) is a value in the inventory itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from sandbox_plugin.inventory import ledger as ledgers
from sandbox_plugin.inventory import symptoms, uses
from sandbox_plugin.inventory.devices import Found, Group, find_devices
from sandbox_plugin.inventory.health import SETTLE, damp, fault_of, health_for_claims, health_of, is_changing
from sandbox_plugin.inventory.ids import places_of_address, places_of_id
from sandbox_plugin.inventory.ledger import Allocation, DeviceKey, Ledger, Places
from sandbox_plugin.inventory.nodes import vfio_nodes
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.sharing import withheld
from sandbox_plugin.inventory.state import Inventory, Memory, Signals, Track
from sandbox_plugin.inventory.tracking import Moment, follow, held_but_unknown
from sandbox_plugin.model import Device, Fault, HostFacts, key_order


def advance(
    previous: Inventory, facts: HostFacts, signals: Signals, now: float, rules: Rules
) -> tuple[Inventory, float | None]:
    """One step. `now` is in monotonic seconds.

    Returns the next inventory (with the previous one's version where nothing that a reader sees has changed) and the
    time at which another scan would lead further although nothing happens, or None.
    """
    memory = previous.memory
    found = _found(memory, facts, rules)
    moment = Moment(found=found, facts=facts, signals=signals, now=now, require_iommufd=rules.settings.require_iommufd)
    tracks = follow(memory.tracks, moment)
    ledger = _who_holds_what(memory, tracks, moment, rules)
    if _is_steady(previous, found, tracks, ledger, signals):
        nodes = previous.nodes if facts is memory.facts else vfio_nodes(facts)
        unchanged = previous._replace(nodes=nodes, memory=memory._replace(facts=facts))
        return unchanged, _wake_at(tracks.values(), ledger, facts, now)
    tracks |= held_but_unknown(ledger, rules.may_be_ours, tracks, moment)
    against = _against(found.groups, ledger, signals, previous)
    devices: dict[DeviceKey, Device] = {}
    for key, track in sorted(tracks.items(), key=lambda item: key_order(item[0])):
        tracks[key], devices[key] = _listed(track, against, signals, now)
    inventory = Inventory(
        version=previous.version,
        resources=_by_resource(devices.values()),
        by_key=MappingProxyType(devices),
        unoffered=MappingProxyType(dict(found.unoffered)),
        without_spec=_without_spec(devices.values(), signals),
        waits_for_holdings=_waits_for_holdings(tracks.values(), ledger, signals),
        nodes=vfio_nodes(facts),
        memory=Memory(tracks=tracks, ledger=ledger, facts=facts, found=found, signals=signals),
    )
    if not previous.version or _shown(inventory) != _shown(previous):
        inventory = inventory._replace(version=previous.version + 1)
    return inventory, _wake_at(tracks.values(), ledger, facts, now)


def allocate(previous: Inventory, allocation: Allocation, signals: Signals, now: float) -> Inventory:
    """The step after one Allocate was answered with these devices: what shares a place with them is withheld.

    The same rules as in `advance`, for the groups that it concerns alone: it costs what its devices cost and not what
    the node has, since all pod admission of the node waits for it.
    """
    memory = previous.memory
    assert memory.found is not None
    ledger = ledgers.give(memory.ledger, allocation, now)
    # Also of what pods had by these IDs before: that is free now.
    grants = [each.grants.get(device.key) for each in (memory.ledger, ledger) for device in allocation.devices]
    places = {place for grant in grants if grant is not None for place in grant.places.all}
    numbers = {number for place in places for number in memory.found.groups_by_place.get(place, ())}
    if any(grant is not None and not grant.places.are_known for grant in grants):
        numbers |= {number for number, group in memory.found.groups.items() if group.has_unbound}
    groups = {number: memory.found.groups[number] for number in numbers}
    in_use = {address for address, use in ledger.uses.items() if use.group in numbers or address in places}
    ledger = uses.attribute(ledger, among=in_use)
    against = _against(groups, ledger, signals, previous)
    tracks, changed = dict(memory.tracks), {}
    for key in [device.key for group in groups.values() for device in group.devices]:
        tracks[key], device = _listed(tracks[key], against, signals, now)
        if device != previous.by_key[key]:
            changed[key] = device
    inventory = previous._replace(waits_for_holdings=True, memory=memory._replace(tracks=tracks, ledger=ledger))
    if changed:
        devices = {**previous.by_key, **changed}
        resources = dict(previous.resources)
        for resource in {resource for resource, _ in changed}:
            resources[resource] = tuple([devices[device.key] for device in resources[resource]])
        inventory = inventory._replace(resources=MappingProxyType(resources), by_key=MappingProxyType(devices))
    is_news = bool(changed) or not previous.waits_for_holdings
    return inventory._replace(version=previous.version + 1) if is_news else inventory


class _Against(NamedTuple):
    """What is withheld from whom: from pods by the device plugin API, and from claims."""

    pods: Mapping[DeviceKey, Fault]
    claims: Mapping[DeviceKey, Fault]


def _against(groups: Mapping[int, Group], ledger: Ledger, signals: Signals, previous: Inventory) -> _Against:
    pods = withheld(groups, ledger, signals, previous.is_healthy)
    if signals.claims is None:
        return _Against(pods, {})
    return _Against(pods, withheld(groups, ledger, signals, previous.is_claimable, from_claims=True))


def _listed(track: Track, against: _Against, signals: Signals, now: float) -> tuple[Track, Device]:
    """The track after damping, and the device as it is listed."""
    withheld = against.pods.get(track.key)
    fault = fault_of(track, withheld)
    damped = damp(track, fault, withheld, now)
    device = damped.device._replace(health=health_of(damped, fault, signals))
    if signals.claims is not None:
        for_claims = health_for_claims(damped, fault_of(track, against.claims.get(track.key)))
        device = device._replace(for_claims=for_claims, health=for_claims if signals.claims_only else device.health)
    return damped, device


def _is_steady(
    previous: Inventory, found: Found, tracks: Mapping[DeviceKey, Track], ledger: Ledger, signals: Signals
) -> bool:
    """Whether nothing has changed since the step before, as it is nearly always: then nothing new can follow."""
    memory = previous.memory
    if found is not memory.found or ledger is not memory.ledger or signals != memory.signals:
        return False
    if len(tracks) != len(memory.tracks):
        return False
    return all(track is memory.tracks.get(key) and not is_changing(track) for key, track in tracks.items())


def _found(memory: Memory, facts: HostFacts, rules: Rules) -> Found:
    before = memory.found
    if before is not None and facts is memory.facts:
        return before
    return find_devices(facts, rules, before)


def _who_holds_what(memory: Memory, tracks: Mapping[DeviceKey, Track], moment: Moment, rules: Rules) -> Ledger:
    """What is known of it after this step."""
    found, facts, signals, now = moment.found, moment.facts, moment.signals, moment.now

    def places(key: DeviceKey) -> Places | None:
        return places_of_id(key, tracks, found, facts, signals.former, rules)

    ledger = ledgers.serve_since(memory.ledger, signals.serving_since)
    if facts is not memory.facts:
        ledger = uses.observe(ledger, memory.facts, facts, now)
    ledger = ledgers.take_in(ledger, signals.holdings, places)
    if found.kernel_is_known and not (memory.found is not None and memory.found.kernel_is_known):
        ledger = ledgers.place_again(ledger, places)
    ledger = ledgers.expire_named_claims(ledger, facts, now, has_pod_resources=signals.pod_resources)
    if signals.claims or ledger.claimed or ledger.named_claims:
        ledger = ledgers.claim(ledger, signals.claims or {}, lambda a: places_of_address(a, found, facts), now)
    busy = {key: addresses for key, addresses in signals.busy.items() if key in tracks}
    ledger = ledgers.found_busy(ledger, busy, lambda key: tracks[key].device.iommu_group, now)
    ledger = ledgers.expire(ledger, facts, now, has_pod_resources=signals.pod_resources)
    return uses.attribute(ledger)


# The inventory


def _by_resource(devices: Iterable[Device]) -> Mapping[str, tuple[Device, ...]]:
    resources: dict[str, list[Device]] = {}
    for device in devices:
        resources.setdefault(device.resource, []).append(device)
    return MappingProxyType({name: tuple(listed) for name, listed in resources.items()})


def _without_spec(devices: Iterable[Device], signals: Signals) -> frozenset[str]:
    """Resources that should have a CDI spec on disk, and have none with a device of theirs in it."""
    if signals.in_cdi is None:
        return frozenset()
    needing = {device.resource for device in devices if device.node_exists}
    having = {device.resource for device in devices if device.id in signals.in_cdi.get(device.resource, frozenset())}
    return frozenset(needing - having)


def _waits_for_holdings(tracks: Iterable[Track], ledger: Ledger, signals: Signals) -> bool:
    """Whether something can only be settled by asking PodResources."""
    if (
        ledger.grants
        or ledger.claimed
        or ledger.named_claims
        or ledger.uses
        or signals.former
        or any(t.gone_since is not None for t in tracks)
    ):
        return True
    return signals.pod_resources and not ledger.is_told


def _shown(inventory: Inventory) -> tuple[object, ...]:
    """What readers see, and so what makes a new version."""
    return (inventory.resources, inventory.unoffered, inventory.without_spec, inventory.waits_for_holdings)


def _wake_at(tracks: Iterable[Track], ledger: Ledger, facts: HostFacts, now: float) -> float | None:
    if uses.has_undecided(ledger, facts):
        return now
    # What was due until now has been taken into account.
    return min((time for time in _wake_times(tracks, ledger) if time > now), default=None)


def _wake_times(tracks: Iterable[Track], ledger: Ledger) -> Iterator[float]:
    """When time alone changes something."""
    for track in tracks:
        if track.ill and track.well_since is not None:
            yield track.well_since + SETTLE
        yield from symptoms.wake_times(track)
    for grant in ledger.grants.values():
        yield ledger.ends_at(grant)
    if ledger.named_claims:
        yield ledger.named_claims_end_at
