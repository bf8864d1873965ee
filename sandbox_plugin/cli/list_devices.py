"""`sandbox-plugin list`: what this node would advertise, and why not the rest."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sandbox_plugin.cli.options import add_options, settings_from
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import scan_now
from sandbox_plugin.inventory.advance import Inventory, Signals, advance
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.model import Device, HostFacts
from sandbox_plugin.settings import Settings


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "list",
        help="what would be advertised, and why not the rest",
        description="What this node would advertise now, device by device, and why the other GPUs and NVSwitches "
        "would not be. Nothing is changed and no kubelet is needed.",
        allow_abbrev=False,
    )
    add_options(parser, "gpu_alias", "nvswitch_alias")
    parser.add_argument("--output", choices=("table", "json"), default="table", help="default: table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with settings_from(args) as settings:
        names = ModelNames.load()
        facts = scan_now(HostPaths(settings.host_root))
        inventory = _look(facts, settings, names)
    if args.output == "json":
        json.dump(_as_json(inventory, facts, names), sys.stdout, indent=2)
        print()
    else:
        _print_tables(inventory, facts, names)
    return 1 if facts.unreachable else 0


def _look(facts: HostFacts, settings: Settings, names: ModelNames) -> Inventory:
    """The inventory of a daemon that has just started and has written its CDI specs."""
    inventory, _ = advance(Inventory(), facts, Signals(), time.monotonic(), settings, names)
    return inventory


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


def _print_tables(inventory: Inventory, facts: HostFacts, names: ModelNames) -> None:
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=1000)
    if facts.unreachable:
        console.print(f"The PCI bus cannot be read: {facts.unreachable}")
    elif not inventory.resources:
        console.print("Nothing would be advertised: no GPU or NVSwitch is bound to a vfio driver.")
    else:
        table = _table("RESOURCE", "ID", "PCI ADDRESS", "MODEL", "NUMA", "NODE", "HEALTH")
        for resource, devices in inventory.resources.items():
            for device in devices:
                table.add_row(resource, *_row(device))
        console.print(table)
    if inventory.unoffered:
        table = _table("NOT OFFERED", "MODEL", "REASON")
        for address, why in sorted(inventory.unoffered.items()):
            table.add_row(address, _model(address, facts, names), why)
        console.print()
        console.print(table)


def _row(device: Device) -> tuple[str | Text, ...]:
    health = Text("Healthy", "green") if device.health.healthy else Text(f"Unhealthy: {device.health}", "red")
    addresses = "\n".join(p.address for p in device.placements)
    numa = ",".join(map(str, device.numa_nodes)) or "-"
    return (device.id, addresses, device.model, numa, device.node, health)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("ID", "PCI ADDRESS", "NODE", "RESOURCE"))
    return table


def _model(address: str, facts: HostFacts, names: ModelNames) -> str:
    function = facts.functions.get(address)
    return names.describe(*function.model_id) if function else "-"
