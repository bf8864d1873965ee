"""`sandbox-plugin fake-node`: makes a fake node in a folder, and changes it as hardware would.

For development and for people who want to watch the daemon follow a node: run it with `--fake-sysfs DIR` in one
terminal and use these verbs in another.
"""

from __future__ import annotations

import argparse
import errno
import shlex
from collections.abc import Callable
from typing import Any

from sandbox_plugin.cli.options import pci_address
from sandbox_plugin.cli.tables import Table, print_unfolded
from sandbox_plugin.config.settings import UsageError
from sandbox_plugin.fake.node import FakeNode, FakeNodeError
from sandbox_plugin.fake.pci import OFF_THE_BUS
from sandbox_plugin.fake.presets import PRESETS
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.model import PciFunction

_KINDS = {
    0x0300: "graphics",
    0x0302: "3D controller",
    0x0600: "host bridge",
    0x0601: "ISA bridge",
    0x0604: "PCI bridge",
    0x0680: "bridge",
    0x0200: "Ethernet",
    0x0207: "InfiniBand",
    0x0403: "audio",
    0x0500: "memory",
    0x0580: "memory controller",
    0x0880: "system peripheral",
    0x0C03: "USB",
    0x0C05: "SMBus",
    0x0C80: "serial bus",
}
"""Base class and subclass in words, for what has no name of its own here."""
_MACHINERY = (0x06, 0x08)
"""Base classes of what only holds a machine together: bridges and system peripherals."""

_Run = Callable[[argparse.Namespace], list[str | Table]]
"""What a verb does. Returns what is to be printed."""


def set_up(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A fake node is a folder that looks to the daemon like a host's root: run `sandbox-plugin run --fake-sysfs "
        "DIR` on it, and change it with these verbs. It needs no privileges and touches nothing else."
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    create = _verb(verbs, "create", _create, "make a node in a new or empty folder")
    create.add_argument("preset", metavar="PRESET", help=", ".join(PRESETS))
    create.add_argument("dir", metavar="DIR")
    _verb(verbs, "presets", _presets, "list the presets")
    show = _verb(verbs, "show", _show, "list the functions of a node")
    show.add_argument("dir", metavar="DIR")
    show.add_argument("--all", action="store_true", help="bridges and system peripherals too")
    parser = _on_function(verbs, "bind", _bind, "bind a function to a driver, taking it from another")
    parser.add_argument("misplaced", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--driver", metavar="NAME", default="vfio-pci", help="default: vfio-pci")
    unbind = _changed(lambda node, args: node.unbind(args.address))
    _on_function(verbs, "unbind", unbind, "take a function from its driver")
    _on_function(verbs, "remove", _remove, "hot-remove a function, and what hangs below it")
    add = _changed(lambda node, args: node.add(args.address))
    _on_function(verbs, "add", add, "put a removed function back")
    sicken = _changed(lambda node, args: node.sicken(args.address, cold=args.cold))
    parser = _on_function(verbs, "sicken", sicken, "make a device fall off the bus")
    parser.add_argument("--cold", action="store_true", help="and let the kernel take it to be in D3cold")
    heal = _changed(lambda node, args: node.heal(args.address))
    _on_function(verbs, "heal", heal, "make it answer again")
    enable = _changed(lambda node, args: node.set_enable(args.address, int(args.value)))
    parser = _on_function(verbs, "enable", enable, "simulate a VM opening (1) or closing (0) a function")
    parser.add_argument("value", metavar="0|1", choices=("0", "1"))
    parser = _on_function(
        verbs, "vgpu", _vgpu, "set the vGPU type of a virtual function, or of as many as fit on a GPU"
    )
    parser.add_argument("type", metavar="TYPE", type=int, help="its number in creatable_vgpu_types; 0: clear it")


def _verb(verbs: Any, name: str, run: _Run, text: str) -> argparse.ArgumentParser:
    """A verb. What goes wrong in a node is a wrong input here, unless its disk is full."""

    def run_and_print(args: argparse.Namespace) -> int:
        try:
            said = run(args)
        except FakeNodeError as error:
            raise UsageError(str(error)) from None
        except OSError as error:
            where = error.filename or args.dir
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(error.errno, error.strerror, where) from None
            raise UsageError(f"{where}: {error.strerror}") from None
        print_unfolded(*said)
        return 0

    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=run_and_print)
    return parser


def _on_function(verbs: Any, name: str, run: _Run, text: str) -> argparse.ArgumentParser:
    parser = _verb(verbs, name, run, text)
    parser.add_argument("dir", metavar="DIR")
    parser.add_argument(
        "address", metavar="ADDRESS", type=pci_address, help="PCI address, e.g. 0000:1b:00.0 or 1b:00.0"
    )
    return parser


def _changed(change: Callable[[FakeNode, argparse.Namespace], None]) -> _Run:
    """Changes one function, and says what has become of it."""

    def run(args: argparse.Namespace) -> list[str | Table]:
        node = FakeNode.open(args.dir)
        change(node, args)
        return [_told(node, args.address)]

    return run


def _bind(args: argparse.Namespace) -> list[str | Table]:
    if args.misplaced is not None:
        instead = shlex.join(["fake-node", "bind", args.dir, args.address, "--driver", args.misplaced])
        raise UsageError(f"a driver needs its flag; write `sandbox-plugin {instead}`")
    return _changed(lambda node, args: node.bind(args.address, args.driver))(args)


def _create(args: argparse.Namespace) -> list[str | Table]:
    node = FakeNode.create(args.dir, args.preset)
    bound = sum(1 for function in node.functions() if function.vfio)
    return [f"{args.dir}: {PRESETS[args.preset].summary}; {bound} functions bound to vfio"]


def _presets(_: argparse.Namespace) -> list[str | Table]:
    width = max(map(len, PRESETS))
    return [f"{name:{width}}  {preset.summary}" for name, preset in PRESETS.items()]


def _remove(args: argparse.Namespace) -> list[str | Table]:
    node = FakeNode.open(args.dir)
    before = set(node.removed())
    node.remove(args.address)
    return [f"removed: {', '.join(name for name in node.removed() if name not in before)}"]


def _vgpu(args: argparse.Namespace) -> list[str | Table]:
    """Of one virtual function, or of those of a whole card."""
    node = FakeNode.open(args.dir)
    if node.function(args.address).physical_function is None:
        return [_told(node, address) for address in node.fill_with_vgpus(args.address, args.type)]
    node.set_vgpu_type(args.address, args.type)
    return [_told(node, args.address)]


def _show(args: argparse.Namespace) -> list[str | Table]:
    node = FakeNode.open(args.dir)
    names = ModelNames.load()
    shown = Table(("ADDRESS", "MODEL", "DRIVER", "GROUP", "VFIO", "NUMA", "STATE"))
    functions = node.functions()
    for f in functions:
        if args.all or f.vfio or f.class_code >> 16 not in _MACHINERY:
            numa = "-" if f.numa_node is None else str(f.numa_node)
            state = (str(f.iommu_group), _vfio(f), numa, _state(f))
            shown.add_row(f.address, _model(f, names), f.driver or "-", *state)
    said: list[str | Table] = [shown]
    if hidden := len(functions) - shown.row_count:
        said.append(f"and {hidden} bridges and system peripherals (--all)")
    if removed := node.removed():
        said.append(f"removed: {', '.join(removed)}")
    return said


def _told(node: FakeNode, address: str) -> str:
    """One function in one line, after a change."""
    function = node.function(address)
    parts = [f"driver {function.driver}" if function.driver else "no driver", f"group {function.iommu_group}"]
    if function.vfio:
        parts.append(_vfio(function))
    if state := _state(function):
        parts.append(state)
    return f"{address}: {', '.join(parts)}"


def _model(function: PciFunction, names: ModelNames) -> str:
    vendor, device = function.model_id
    kind = _KINDS.get(function.class_code >> 8, f"class {function.class_code:06x}")
    return names.table.get(function.model_id) or f"{kind} [{vendor:04x}:{device:04x}]"


def _vfio(function: PciFunction) -> str:
    """vfioN, with the reason why there is no such node where there is none."""
    if function.vfio is None:
        return "-"
    return f"vfio{function.vfio.number}" + ("" if function.vfio.cdev else " (no cdev)")


def _state(function: PciFunction) -> str:
    if function.link_speed == OFF_THE_BUS.speed:
        return "off the bus"
    states = []
    if function.is_vendors_vgpu:
        states.append("no vGPU type" if function.vgpu_type == "0" else f"vGPU type {function.vgpu_type}")
    if function.enable and (function.driver is None or function.vfio):
        states.append("in use by a VM")
    return ", ".join(states)
