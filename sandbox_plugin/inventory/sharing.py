"""What the ledger means for each device: free for a pod, held by its own pod, or withheld, and why.

An IOMMU group has one holder. Devices that are held by that one pod are well; the others of the group, and all that
have a node, a group or an address of it under another name or number, are withheld. Where it is not yet known, a device
is not given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sandbox_plugin.inventory.devices import Found, Group
from sandbox_plugin.inventory.ledger import DeviceKey, Grant, Ledger, Places, Use, is_heir, is_undecided, places_of
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Signals, Track
from sandbox_plugin.model import Device, Health, HostFacts, Reason, group_of_node, node_of_cdev, node_of_group


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Devices that are withheld, and why. Those of `taken` are freed with a delay, like those that were ill."""

    taken: Mapping[DeviceKey, Health]
    unknown: Mapping[DeviceKey, Health]


def withheld(
    groups: Mapping[int, Group], ledger: Ledger, signals: Signals, was_healthy: Callable[[DeviceKey], bool]
) -> Verdicts:
    """The devices of these groups that must not be given to a pod which does not have them already.

    `was_healthy` tells whether a device was listed as Healthy before this step.
    """
    taken: dict[DeviceKey, Health] = {}
    unknown: dict[DeviceKey, Health] = {}
    uses = _uses_by_group(ledger)
    is_awaited = signals.pod_resources and not ledger.is_told
    # Then any node may be held under another name, or its number have been another function's.
    is_unheard = signals.pod_resources and not ledger.is_heard
    without_specs = signals.in_cdi is None  # then nothing but PodResources tells of former names
    if not ledger.grants and not uses and not is_awaited:
        return Verdicts(taken=taken, unknown=unknown)
    former = _former_nodes(signals)
    unplaced = ledger.unplaced if any(group.has_unbound for group in groups.values()) else []
    for number, group in groups.items():
        holders = ledger.touching(group.places)
        if group.has_unbound:
            keys = {grant.key for grant in holders}
            holders += [grant for grant in unplaced if grant.key not in keys]
        used = uses.get(number, ())
        if not holders and not used and not is_awaited:
            continue
        for device in group.devices:
            key = (device.resource, device.id)
            own = _own(holders, device)
            health = _taken_by(device, own, holders, ledger) or _in_use(device, group, own, holders, used, ledger)
            if health is not None:
                taken[key] = health
            elif is_unheard or (is_awaited and (group.is_shared or without_specs or _is_former(device, former))):
                unknown[key] = _awaited(device)
            elif own is None and not was_healthy(key) and any(is_undecided(a, u, ledger) for a, u in used):
                unknown[key] = _awaited(device)  # what was Healthy stays so: another look will tell in a moment
    return Verdicts(taken=taken, unknown=unknown)


def _own(holders: Iterable[Grant], device: Device) -> Grant | None:
    key = (device.resource, device.id)
    return next((grant for grant in holders if grant.key == key), None)


def _taken_by(device: Device, own: Grant | None, holders: Iterable[Grant], ledger: Ledger) -> Health | None:
    """Why another pod than its own has the device or its group."""
    for grant in holders:
        if own is not None and (grant is own or ledger.are_one_pods(own, grant) or is_heir(own, grant)):
            continue
        resource, number = grant.key
        holder = ledger.holder_of(grant)
        as_what = f"device {number}" if resource == device.resource else f"{resource}={number}"
        at = f" ({min(grant.places.addresses)})" if grant.places.addresses else ""
        if not grant.places.are_known:
            detail = f"{holder} holds {as_what}, which may be of its IOMMU group {device.iommu_group}"
            return Health(reason=Reason.GROUP_TAKEN, detail=detail)
        if grant.places.node == device.node:
            detail = f"{holder} holds {device.node} as {as_what}{at}"
            return Health(reason=Reason.HELD_AS_ANOTHER, detail=detail)
        if device.address in grant.places.addresses:
            detail = f"{holder} holds {device.address} as {as_what}"
            return Health(reason=Reason.HELD_AS_ANOTHER, detail=detail)
        detail = f"IOMMU group {device.iommu_group} is held by {holder} through {as_what}{at}"
        return Health(reason=Reason.GROUP_TAKEN, detail=detail)
    return None


_Used = tuple[str, Use]


def _in_use(
    device: Device, group: Group, own: Grant | None, holders: Sequence[Grant], used: Iterable[_Used], ledger: Ledger
) -> Health | None:
    """Why a use of its group speaks against the device."""
    for address, use in used:
        if use.elsewhere:
            since = f" since before {ledger.holder_of(own)} got it" if own is not None else " although no pod holds it"
            return Health(reason=Reason.IN_USE_ELSEWHERE, detail=f"{address} is in use (enable is 1){since}")
    if holders:
        return None
    # While it is not known who uses a mate, a device that is in use itself may be so by the same pod. What rides along
    # with the only device of a group is used with it.
    addresses = {p.address for p in device.placements}
    if any(address in addresses or not group.is_shared for address, _ in used):
        return None
    for address, _ in used:
        detail = f"IOMMU group {device.iommu_group} is in use through {address}"
        return Health(reason=Reason.GROUP_TAKEN, detail=detail)
    return None


def _awaited(device: Device) -> Health:
    detail = f"PodResources has not told yet which pods hold {device.node}, or others of its IOMMU group"
    return Health(reason=Reason.HOLDERS_UNKNOWN, detail=detail)


def _former_nodes(signals: Signals) -> Mapping[str, frozenset[DeviceKey]]:
    """Nodes that CDI specs of former names give, with those names."""
    nodes: dict[str, frozenset[DeviceKey]] = {}
    for key, node in signals.former.items():
        nodes[node] = nodes.get(node, frozenset()) | {key}
    return nodes


def _is_former(device: Device, former: Mapping[str, frozenset[DeviceKey]]) -> bool:
    """Whether a pod may hold its node under a name that is not served any more."""
    return bool(former.get(device.node, frozenset()) - {(device.resource, device.id)})


def _uses_by_group(ledger: Ledger) -> dict[int, list[_Used]]:
    by_group: dict[int, list[_Used]] = {}
    for address, use in sorted(ledger.uses.items()):
        if use.group is not None:
            by_group.setdefault(use.group, []).append((address, use))
    return by_group


# What an ID means


def places_of_id(
    key: DeviceKey,
    tracks: Mapping[DeviceKey, Track],
    found: Found,
    facts: HostFacts,
    signals: Signals,
    rules: Rules,
) -> Places | None:
    """What a pod has that holds this ID from an earlier run of this plugin; None: the ID is another plugin's.

    That is the device that has, or had, the ID. Else a CDI spec tells the node, or the number itself does; where a
    device with this node is gone that had another name, it may have been that one.
    """
    known = tracks.get(key)
    if known is not None and known.device.placements:
        return places_of(known.device)
    resource, device_id = key
    node = signals.former.get(key)
    if node is None:
        if not (rules.may_be_ours(resource) or rules.was_perhaps_ours(resource)):
            return None
        if not device_id.isdecimal() or len(device_id) > 9:
            return None
        node = node_of_cdev(device_id) if found.cdevs else node_of_group(device_id)
    places = _places_of_node(node, found, facts)
    gone = (t.device for t in tracks.values() if t.gone_since is not None and t.device.node == node)
    if (was := next((device for device in gone if device.placements), None)) is not None:
        group = was.iommu_group if places.group is None else places.group
        return replace(places, group=group, addresses=places.addresses | places_of(was).addresses)
    return places


def _places_of_node(node: str, found: Found, facts: HostFacts) -> Places:
    """What goes with a node now."""
    device = next((d for d in found.devices if d.node == node), None)
    if device is not None:
        return places_of(device)
    group = group_of_node(node)
    if group is not None:
        members = frozenset(facts.groups[group].members) if group in facts.groups else frozenset()
        return Places(node=node, group=group, addresses=members)
    address = facts.vfio_devs.get(node.rpartition("/")[2])
    if address is None:
        return Places(node=node)
    function = facts.functions.get(address)
    number = function.iommu_group if function is not None else None
    return Places(node=node, group=number, addresses=frozenset({address}))
