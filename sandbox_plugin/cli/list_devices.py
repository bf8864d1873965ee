"""`sandbox-plugin list`: what this node would advertise, and why not the rest."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from sandbox_plugin.cli.options import add_options, settings_from
from sandbox_plugin.cli.stdout import say, visible
from sandbox_plugin.cli.tables import Part, Styled, Table, print_unfolded
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import scan_now
from sandbox_plugin.inventory.advance import advance
from sandbox_plugin.inventory.faults import remarks
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import NOTHING_TO_OFFER, Offer, Rules
from sandbox_plugin.inventory.state import Inventory, Signals
from sandbox_plugin.inventory.topology import legend_lines, matrix, matrix_lines
from sandbox_plugin.inventory.vgpu_types import NO_TYPES
from sandbox_plugin.model import Device, HostFacts, PciFunction

_COLUMNS = {
    "PCI FUNCTION": "pci_address",
    "CLASS": "class",
    "ID": "id",
    "DRIVER": "driver",
    "GROUP": "iommu_group",
    "RESOURCE": "resource",
    "RULE": "rule",
    "NOT OFFERED BECAUSE": "reason",
    "REMARKS": "remarks",
}
"""Of the table of all functions, with the JSON key of each."""


def set_up(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What this node would advertise now, device by device, and why the other GPUs and NVSwitches would not be. "
        "Nothing is changed and no kubelet is needed."
    )
    add_options(parser, "gpu_alias", "nvswitch_alias", "require_iommufd")
    parser.add_argument("--output", choices=("table", "json"), default="table", help="default: table")
    parser.add_argument(
        "--topology", action="store_true", help="also how close the devices are to each other, as `nvidia-smi topo -m`"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every PCI function, with the rule that took it or why it is not offered, and what is odd about it; in "
        "json with what was read",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with settings_from(args) as settings:
        rules = Rules(settings, ModelNames.load())
        facts = scan_now(HostPaths(settings.host_root))
        # As of a daemon that has just started and has written its CDI specs.
        inventory, _ = advance(Inventory(), facts, Signals(), time.monotonic(), rules)
    if args.output == "json":
        document = _as_json(inventory, facts, rules.names)
        if args.topology:
            document["topology"] = _topology_as_json(inventory)
        if args.all:
            document["functions"] = _all_functions(inventory, facts, rules)
        say(json.dumps(document, indent=2))
    else:
        parts = _tables(inventory, facts, rules.names)
        if args.topology and inventory.resources:
            parts += ["", *matrix_lines(_devices(inventory)), "", *legend_lines()]
        if args.all:
            parts += ["", _table_of_all(_all_functions(inventory, facts, rules))]
        if parts:
            print_unfolded(*parts)
    if facts.unreachable:
        print(f"sandbox-plugin: the PCI bus cannot be read: {visible(facts.unreachable)}", file=sys.stderr)
    return 1 if facts.unreachable else 0


def _as_json(inventory: Inventory, facts: HostFacts, names: ModelNames) -> dict[str, Any]:
    return {
        "resources": [
            {"name": resource, "devices": [_device_as_json(d) for d in devices]}
            for resource, devices in inventory.resources.items()
        ],
        "not_offered": [
            {"pci_address": address, "model": _model(address, facts, names), "reason": why}
            for address, why in sorted(inventory.unoffered.items())
        ],
        "unreachable": facts.unreachable,
    }


def _device_as_json(device: Device) -> dict[str, Any]:
    return {
        "id": device.id,
        "pci_addresses": [p.address for p in device.placements],
        "model": device.model,
        "numa_nodes": list(device.numa_nodes),
        "node": device.node,
        "iommu_group": device.iommu_group,
        "health": "Healthy" if device.health.healthy else "Unhealthy",
        "reason": device.health.reason,
        "detail": device.health.detail,
    }


def _topology_as_json(inventory: Inventory) -> list[dict[str, Any]]:
    devices = _devices(inventory)
    links = zip(devices, matrix(devices), strict=True)
    return [
        {"id": d.id, "links": {o.id: a.name for o, a in zip(devices, row, strict=True) if a is not None}}
        for d, row in links
    ]


def _devices(inventory: Inventory) -> list[Device]:
    return [device for devices in inventory.resources.values() for device in devices]


def _all_functions(inventory: Inventory, facts: HostFacts, rules: Rules) -> list[dict[str, Any]]:
    """Each PCI function: what it is, the rule that took it, and why it is not offered where it is not."""
    found = inventory.memory.found
    types = found.type_names if found is not None else NO_TYPES
    functions = [
        _function_as_json(function, rules.offer(function, types), inventory.unoffered.get(function.address))
        for function in facts.functions.values()
    ]
    unknown = dict.fromkeys((*_COLUMNS.values(), "facts"))
    functions += [unknown | {"pci_address": a, "reason": f"unreadable: {why}"} for a, why in facts.unreadable.items()]
    return sorted(functions, key=lambda function: str(function["pci_address"]))


def _function_as_json(function: PciFunction, offer: Offer | None, reason: str | None) -> dict[str, Any]:
    """`reason` is null for what is offered."""
    odd = remarks(function) if offer is not None and offer.resource is not None else []
    return {
        "pci_address": function.address,
        "class": f"{function.class_code:06x}",
        "id": f"{function.vendor:04x}:{function.device:04x}",
        "driver": function.driver,
        "iommu_group": function.iommu_group,
        "resource": offer.resource if offer is not None else None,
        "rule": offer.rule if offer is not None else None,
        "reason": "no rule matches" if offer is None else reason,
        "remarks": "; ".join(odd) or None,
        "facts": _facts_as_json(function),
    }


def _facts_as_json(function: PciFunction) -> dict[str, Any]:
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
        "fatal_errors": function.fatal_errors,
        "bars": [asdict(bar) for bar in function.bars],
        "reset_methods": None if function.reset_methods is None else list(function.reset_methods),
        "unread": list(function.unread),
    }


def _table_of_all(functions: list[dict[str, Any]]) -> Table:
    made = Table(tuple(_COLUMNS))
    for function in functions:
        cells = [function[key] for key in _COLUMNS.values()]
        made.add_row(*("-" if cell is None else str(cell) for cell in cells))
    return made


def _tables(inventory: Inventory, facts: HostFacts, names: ModelNames) -> list[str | Table]:
    """What is offered, or why there is nothing, and what is not offered."""
    parts: list[str | Table] = []
    if inventory.resources:
        offered = Table(("RESOURCE", "ID", "PCI ADDRESS", "MODEL", "NUMA", "NODE", "HEALTH"))
        for resource, devices in inventory.resources.items():
            for device in devices:
                offered.add_row(resource, *_row(device))
        parts.append(offered)
    elif not facts.unreachable:
        parts.append(f"Nothing would be advertised: {NOTHING_TO_OFFER}.")
    if inventory.unoffered:
        not_offered = Table(("NOT OFFERED", "MODEL", "REASON"))
        for address, why in sorted(inventory.unoffered.items()):
            not_offered.add_row(address, _model(address, facts, names), why)
        parts += ["", not_offered]
    return parts


def _row(device: Device) -> tuple[Part | list[str], ...]:
    health = Styled("Healthy", "green") if device.health.healthy else Styled(f"Unhealthy: {device.health}", "red")
    addresses = [p.address for p in device.placements]
    numa = ",".join(map(str, device.numa_nodes)) or "-"
    return (device.id, addresses, device.model.split(" + "), numa, device.node, health)


def _model(address: str, facts: HostFacts, names: ModelNames) -> str:
    function = facts.functions.get(address)
    return names.describe(*function.model_id) if function else "-"
