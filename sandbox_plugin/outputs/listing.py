"""What `list` says of a node (pure), as one JSON value: its devices, and what is not offered and why. docs/list.md
describes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sandbox_plugin.inventory.companions import Companion, Tie, companions
from sandbox_plugin.inventory.faults import remarks
from sandbox_plugin.inventory.rules import Offer, Rules
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.inventory.topology import matrix
from sandbox_plugin.inventory.vgpu_types import NO_TYPES
from sandbox_plugin.model import Device, HostFacts, PciFunction
from sandbox_plugin.outputs.document import device_document, device_remarks

SCHEMA = 1
"""Rises when a key goes or changes its meaning; new keys may come without that."""
NO_RULE = "no rule matches"
BRIDGE = "a bridge"


def listing(
    inventory: Inventory, facts: HostFacts, rules: Rules, *, with_topology: bool = False, with_functions: bool = False
) -> dict[str, Any]:
    """The whole of it; how close the devices are, and every function, only where they are asked for."""
    devices = devices_of(inventory)
    found = inventory.memory.found
    types = found.type_names if found is not None else NO_TYPES
    offers = {address: rules.offer(function, types) for address, function in facts.functions.items()}
    rest = [f for f in facts.functions.values() if offers[f.address] is None]
    ties = companions(devices, rest)
    riders = {address: companion.device for address, companion in ties.items() if companion.tie is Tie.RIDES_ALONG}
    bridges = sum(function.is_bridge for function in rest)
    remarked = _remarks(inventory, facts)
    document = {
        "schema": SCHEMA,
        "well": not remarked,
        "remarks": remarked,
        "summary": {
            "devices": len(devices),
            "healthy": sum(device.health.healthy for device in devices),
            "not_offered": len(inventory.unoffered),
            "riders": len(riders),
            "bridges": bridges,
            "others": len(rest) - len(riders) - bridges,
        },
        "resources": [
            {
                "name": resource,
                "devices": [
                    device_document(device) | {"riders": sorted(a for a, other in riders.items() if other is device)}
                    for device in of_resource
                ],
            }
            for resource, of_resource in inventory.resources.items()
        ],
        "not_offered": [
            {"pci_address": address, "model": _model(facts.functions.get(address), rules), "reason": why}
            for address, why in sorted(inventory.unoffered.items())
        ],
        "unreachable": facts.unreachable,
    }
    if with_topology:
        document["topology"] = _topology(devices)
    if with_functions:
        functions = [
            _function(f, _model(f, rules), offers[f.address], ties.get(f.address), inventory.unoffered.get(f.address))
            for f in facts.functions.values()
        ]
        functions += [_unreadable(address, why) for address, why in facts.unreadable.items()]
        document["functions"] = sorted(functions, key=lambda function: str(function["pci_address"]))
    return document


def devices_of(inventory: Inventory) -> list[Device]:
    """Its devices, by resource and ID."""
    return [device for devices in inventory.resources.values() for device in devices]


def _topology(devices: Sequence[Device]) -> list[dict[str, Any]]:
    links = zip(devices, matrix(devices), strict=True)
    return [
        {"id": d.id, "links": {o.id: a.name for o, a in zip(devices, row, strict=True) if a is not None}}
        for d, row in links
    ]


def _remarks(inventory: Inventory, facts: HostFacts) -> list[str]:
    found = [f"the PCI bus cannot be read: {facts.unreachable}"] if facts.unreachable else []
    found += device_remarks(inventory)
    return found + [f"{address} cannot be read: {why}" for address, why in sorted(facts.unreadable.items())]


def _model(function: PciFunction | None, rules: Rules) -> str | None:
    return None if function is None else rules.names.describe(*function.model_id)


def _function(
    function: PciFunction, model: str | None, offer: Offer | None, companion: Companion | None, not_offered: str | None
) -> dict[str, Any]:
    """`reason` is null for what is offered."""
    if offer is None:
        not_offered = BRIDGE if function.is_bridge else str(companion or NO_RULE)
    rides = companion is not None and companion.tie is Tie.RIDES_ALONG
    return {
        "pci_address": function.address,
        "model": model,
        "class": f"{function.class_code:06x}",
        "id": f"{function.vendor:04x}:{function.device:04x}",
        "driver": function.driver,
        "iommu_group": function.iommu_group,
        "resource": offer.resource if offer is not None else None,
        "rule": offer.rule if offer is not None else None,
        "rides_along_with": companion.device.address if companion is not None and rides else None,
        "reason": not_offered,
        "remarks": remarks(function) if offer is not None and offer.resource is not None else [],
        "facts": _facts(function),
    }


def _unreadable(address: str, why: str) -> dict[str, Any]:
    keys = ("model", "class", "id", "driver", "iommu_group", "resource", "rule", "rides_along_with", "facts")
    said = {"pci_address": address, "reason": f"unreadable: {why}", "remarks": []}
    return said | dict.fromkeys(keys)


def _facts(function: PciFunction) -> Mapping[str, Any]:
    """What else was read of it: more of a function that a vfio driver has."""
    subsystem = (function.subsystem_vendor, function.subsystem_device)
    facts = {
        "subsystem": None if None in subsystem else "{:04x}:{:04x}".format(*subsystem),
        "mdev_type": function.mdev_type,
        "vgpu_type": function.vgpu_type,
        "physical_function": function.physical_function,
        "bridges": list(function.bridges),
        "enable": function.enable,
    }
    if not function.is_held_by_vfio:
        return facts
    return facts | {
        "revision": None if function.revision is None else f"{function.revision:02x}",
        "virtual_functions": function.virtual_functions,
        "numa_node": function.numa_node,
        "vfio_device": None if function.vfio is None else function.vfio.number,
        "cdev": None if function.vfio is None else function.vfio.cdev,
        "power_state": function.power_state,
        "runtime_status": function.runtime_status,
        "has_power": function.has_power,
        "link_speed": function.link_speed,
        "link_width": function.link_width,
        "link_limits": None if function.link_limits is None else [end._asdict() for end in function.link_limits],
        "fatal_errors": function.fatal_errors,
        "nonfatal_errors": function.nonfatal_errors,
        "correctable_errors": function.correctable_errors,
        "bars": [asdict(bar) for bar in function.bars],
        "reset_methods": None if function.reset_methods is None else list(function.reset_methods),
        "unread": list(function.unread),
    }
