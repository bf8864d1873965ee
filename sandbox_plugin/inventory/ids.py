"""What an ID means that a pod holds from an earlier run of this plugin."""

from __future__ import annotations

from collections.abc import Mapping

from sandbox_plugin.inventory.devices import Found
from sandbox_plugin.inventory.ledger import DeviceKey, Places, places_of
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Track
from sandbox_plugin.model import HostFacts, group_of_node, node_of_cdev, node_of_group


def places_of_id(
    key: DeviceKey,
    tracks: Mapping[DeviceKey, Track],
    found: Found,
    facts: HostFacts,
    former: Mapping[DeviceKey, str],
    rules: Rules,
) -> Places | None:
    """What a pod has that holds this ID from an earlier run of this plugin; None: the ID is another plugin's.

    That is the device that has, or had, the ID. Else a CDI spec tells the node (`Signals.former`), or the number itself
    does; where a device with this node is gone that had another name, it may have been that one.
    """
    known = tracks.get(key)
    if known is not None and known.device.placements:
        return places_of(known.device)
    resource, device_id = key
    node = former.get(key)
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
        return places._replace(group=group, addresses=places.addresses | places_of(was).addresses)
    return places


def places_of_address(address: str, found: Found, facts: HostFacts) -> Places:
    """What goes with the device that has this address, for claims know devices by it; or with a function that is none,
    or is not there."""
    device = next((d for d in found.devices if address in (p.address for p in d.placements)), None)
    if device is not None:
        return places_of(device)
    function = facts.functions.get(address)
    group = function.iommu_group if function is not None else None
    if function is not None and function.vfio is not None:
        node = node_of_cdev(function.vfio.number)
    else:
        node = address if group is None else node_of_group(group)
    return Places(node=node, group=group, addresses=frozenset({address}))


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
