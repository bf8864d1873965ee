"""`sandbox-plugin list`: what this node would advertise, and why not the rest."""

from __future__ import annotations

import argparse
import sys
import time

from sandbox_plugin.cli.options import add_options, settings_from
from sandbox_plugin.cli.stdout import say, visible
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import scan_now
from sandbox_plugin.inventory.advance import advance
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory, Signals
from sandbox_plugin.outputs.listing import devices_of, listing

_STATUSES = """\
exit status: 0 the node was read, and nothing that it offers is broken, also if it offers nothing; 1 a device is
Unhealthy, other than because its IOMMU group is in use, or the PCI bus or a function of it cannot be read; 2 wrong
usage
"""


def set_up(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What this node would advertise now, device by device, and why the other GPUs and NVSwitches would not be. "
        "Nothing is changed and no kubelet is needed."
    )
    parser.epilog = _STATUSES
    add_options(parser, "gpu_alias", "nvswitch_alias", "require_iommufd")
    parser.add_argument(
        "--output",
        type=str.lower,
        choices=("table", "wide", "json"),
        default="table",
        help="table: as wide as the terminal, or 80 columns (default); wide: all columns, each device in one line; "
        "json: for programs",
    )
    parser.add_argument(
        "--topology", action="store_true", help="also how close the devices are to each other, as `nvidia-smi topo -m`"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every PCI function, also bridges and what rides along with a device, with the rule that took it or why "
        "it is not offered, and what is odd about it; in json with what was read",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with settings_from(args) as settings:
        rules = Rules(settings, ModelNames.load())
        facts = scan_now(HostPaths(settings.host_root))
        # As of a daemon that has just started and has written its CDI specs.
        inventory, _ = advance(Inventory(), facts, Signals(), time.monotonic(), rules)
    document = listing(inventory, facts, rules, with_topology=args.topology, with_functions=args.all)
    if args.output == "json":
        import json

        say(json.dumps(document, indent=2))
    elif facts.unreachable is None:
        from sandbox_plugin.cli.list_table import narrow_lines, wide_lines
        from sandbox_plugin.cli.tables import print_lines, terminal_width

        width = None if args.output == "wide" else terminal_width()
        lines = wide_lines(document) if width is None else narrow_lines(document, width)
        if args.topology and inventory.resources:
            from sandbox_plugin.inventory.topology import legend_lines, matrix_lines

            matrix = [*matrix_lines(devices_of(inventory), width), "", *legend_lines()]
            lines += [[""], *([line] for line in matrix)]
        print_lines(lines)
    if document["well"]:
        return 0
    # What exactly is not well has just been shown.
    ill = len(document["remarks"]) - len(facts.unreadable)
    reasons = [f"{ill} device{' is' if ill == 1 else 's are'} Unhealthy"] if ill else []
    if facts.unreadable:
        number = len(facts.unreadable)
        reasons.append(f"{number} PCI function{'' if number == 1 else 's'} cannot be read")
    if facts.unreachable:
        reasons = [f"the PCI bus cannot be read: {visible(facts.unreachable)}"]
    print(f"sandbox-plugin: {', '.join(reasons)}", file=sys.stderr)
    return 1
