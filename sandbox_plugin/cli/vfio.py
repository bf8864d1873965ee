"""`sandbox-plugin vfio`: which functions a vfio driver has, and giving them to it and back."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sandbox_plugin.cli.options import add_options, pci_address, settings_from
from sandbox_plugin.cli.stdout import say, visible
from sandbox_plugin.cli.tables import Styled, Table, is_terminal, print_unfolded
from sandbox_plugin.config.settings import Settings, UsageError
from sandbox_plugin.host.bind import HostKernel
from sandbox_plugin.host.modules import read_aliases, read_drivers
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import scan_now
from sandbox_plugin.host.users import read_users
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import PciFunction, is_vfio_driver
from sandbox_plugin.vfio import persist
from sandbox_plugin.vfio.carry_out import Kernel, carry_out
from sandbox_plugin.vfio.memory import Memory
from sandbox_plugin.vfio.plan import GroupPlan, Selection, Situation, in_use_by, plan_bind, plan_unbind

_STATUSES = """\
exit status: 0 all is as asked for, also when there was nothing to do; 1 something was refused, failed, or takes
longer than --timeout; 2 a wrong flag, address or value
"""


def set_up(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Which functions a vfio driver has, and giving them to it and back, each with its whole IOMMU group: the audio "
        "and USB functions of a card too, bridges never."
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    status = _verb(
        verbs, "status", _status, "each GPU and NVSwitch, with its group: driver, use, and what bind would do"
    )
    status.add_argument("--output", type=str.lower, choices=("table", "json"), default="table", help="default: table")
    bind = _verb(verbs, "bind", _bind, "give functions to the vfio driver that fits best; what has it stays as it is")
    _add_selection(bind)
    bind.add_argument(
        "--persist", action="store_true", help="also write /etc/modules-load.d and /etc/modprobe.d for the next boot"
    )
    unbind = _verb(verbs, "unbind", _unbind, "give functions back to the driver of before, or to the kernel's choice")
    _add_selection(unbind)


def _verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace, Settings], int], text: str
) -> argparse.ArgumentParser:
    def run_with_settings(args: argparse.Namespace) -> int:
        with settings_from(args) as settings:
            return run(args, settings)

    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_STATUSES, allow_abbrev=False
    )
    add_options(parser)
    parser.set_defaults(run=run_with_settings)
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "addresses", metavar="ADDRESS", nargs="*", type=pci_address, help="e.g. 0000:1b:00.0 or 1b:00.0"
    )
    parser.add_argument("--all", action="store_true", help="all GPUs, and what else a resource rule offers")
    parser.add_argument("--model", metavar="VENDOR:DEVICE", type=_model, help="all of these of one model, as 10de:2330")
    parser.add_argument("--switches", action="store_true", help="with --all or --model: NVSwitches too")
    parser.add_argument("--force", action="store_true", help="also what is in use, or what no resource rule offers")
    parser.add_argument("--dry-run", action="store_true", help="print each write as a line for a shell, and do nothing")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=60.0,
        help="how long the kernel may take for one step; default: 60",
    )


def _model(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[0-9a-fA-F]{4}:[0-9a-fA-F]{4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not VENDOR:DEVICE in hexadecimal, such as 10de:2330")
    vendor, device = text.split(":")
    return int(vendor, 16), int(device, 16)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _look(settings: Settings) -> tuple[Situation, Memory]:
    """Raises OSError when the bus cannot be read."""
    paths = HostPaths(settings.host_root)
    facts = scan_now(paths)
    if facts.unreachable:
        raise OSError(None, f"the PCI bus cannot be read: {facts.unreachable}")
    memory = Memory(settings.host_root)
    situation = Situation(
        facts=facts,
        users=read_users(paths, facts.functions.values()),
        aliases=read_aliases(paths) or (),
        drivers=read_drivers(paths),
        remembered=memory.recall(facts),
    )
    return situation, memory


def _selection(args: argparse.Namespace, situation: Situation) -> Selection:
    """Raises UsageError."""
    if sum((bool(args.addresses), args.all, args.model is not None)) != 1:
        raise UsageError("give one of: --all, --model VENDOR:DEVICE, or one ADDRESS or more")
    for address in args.addresses:
        if address in situation.facts.unreadable:
            raise UsageError(f"{address} cannot be read: {situation.facts.unreadable[address]}")
        if address not in situation.facts.functions:
            raise UsageError(f"there is no PCI function {address!r} (`sandbox-plugin vfio status` lists what there is)")
    return Selection(
        addresses=tuple(dict.fromkeys(args.addresses)), model=args.model, switches=args.switches, force=args.force
    )


def _bind(args: argparse.Namespace, settings: Settings) -> int:
    situation, memory = _look(settings)
    rules = Rules(settings, ModelNames.load())
    plans = plan_bind(situation, rules, _selection(args, situation))
    done, status = _run(args, settings, situation, plans, memory, binds=True)
    if args.persist and done:
        status = max(status, _persist(args, settings, situation, done))
    return status


def _unbind(args: argparse.Namespace, settings: Settings) -> int:
    situation, memory = _look(settings)
    plans = plan_unbind(situation, Rules(settings, ModelNames.load()), _selection(args, situation))
    return _run(args, settings, situation, plans, memory, binds=False)[1]


def _run(
    args: argparse.Namespace,
    settings: Settings,
    situation: Situation,
    plans: list[GroupPlan],
    memory: Memory,
    *,
    binds: bool,
) -> tuple[list[GroupPlan], int]:
    """Prints or carries out. Returns the plans whose functions are as they should be then, and the exit status."""
    refused = [plan for plan in plans if plan.refusals]
    for plan in refused:
        for why in plan.refusals:
            _complain(f"refused, IOMMU group {_name(plan)}: {why}")
    if not args.addresses:
        for address, why in situation.facts.unreadable.items():
            _complain(f"left out: {address} cannot be read: {why}")
    done = [plan for plan in plans if not plan.refusals]
    todo = [plan for plan in done if plan.changes]
    if not todo and not refused:
        say("# nothing to do" if args.dry_run else _nothing(plans, binds=binds))
    if args.dry_run:
        for line in (line for plan in todo for line in _shell_lines(plan)):
            say(line)
    elif todo:
        with _kernel(settings, args.timeout) as kernel:
            failed = [plan for plan in todo if not _carry_out(args, settings, situation, plan, memory, kernel, binds)]
        done = [plan for plan in done if plan not in failed]
    return done, 0 if len(done) == len(plans) else 1


def _carry_out(
    args: argparse.Namespace,
    settings: Settings,
    situation: Situation,
    plan: GroupPlan,
    memory: Memory,
    kernel: Kernel,
    binds: bool,
) -> bool:
    """Changes one group and says what has become of it. Returns whether it is as it should be."""
    if binds:
        _keep(memory, situation, plan)
    outcome = carry_out(plan, kernel, HostPaths(settings.host_root), force=args.force)
    for line in outcome.lines:
        (_complain if outcome.failed else say)(line)
    if not outcome.failed and not binds:
        _forget(memory, plan)
    return not outcome.failed


def _nothing(plans: list[GroupPlan], *, binds: bool) -> str:
    if not plans:
        return "nothing to do: no function here is one of these"
    return f"nothing to do: {'a vfio driver has all of them' if binds else 'no vfio driver has any of them'}"


def _shell_lines(plan: GroupPlan) -> Iterator[str]:
    yield f"# IOMMU group {_name(plan)}"
    for module in plan.modules:
        yield f"modprobe {module}"
    for change in plan.changes:
        yield f"# {change.address}: {change.before or 'no driver'} -> {change.after or 'what the kernel chooses'}"
        for write in change.writes:
            yield write.shell_line


def _name(plan: GroupPlan) -> str:
    return "-" if plan.group is None else str(plan.group)


def _keep(memory: Memory, situation: Situation, plan: GroupPlan) -> None:
    """Before anything is changed: a crash must not lose it. A function that goes from one vfio driver to another keeps
    what was remembered."""
    drivers = {c.address: c.before for c in plan.changes if not is_vfio_driver(c.before)}
    try:
        memory.remember(situation.facts, drivers)
    except OSError as error:
        _complain(f"{memory.path}: {error.strerror}: `vfio unbind` will leave the driver to the kernel")


def _forget(memory: Memory, plan: GroupPlan) -> None:
    try:
        memory.forget([change.address for change in plan.changes])
    except OSError as error:
        _complain(f"{memory.path}: {error.strerror}")


@contextmanager
def _kernel(settings: Settings, patience: float) -> Iterator[Kernel]:
    """The kernel that carries writes out. Raises UsageError for a tree of files that has none."""
    if settings.host_root == Path("/"):
        with HostKernel(patience) as kernel:
            yield kernel
        return
    from sandbox_plugin.fake.node import FakeNode, FakeNodeError
    from sandbox_plugin.fake.sysfs import FakeKernel

    try:
        node = FakeNode.open(settings.host_root)
    except FakeNodeError as error:
        raise UsageError(f"{error}, so no kernel obeys what is written there; --dry-run only prints it") from None
    yield FakeKernel(node)


def _persist(args: argparse.Namespace, settings: Settings, situation: Situation, plans: list[GroupPlan]) -> int:
    """Returns the exit status. Raises OSError."""
    drivers = {a: situation.facts.functions[a].driver or "" for plan in plans for a in plan.members}
    drivers |= {change.address: change.after or "" for plan in plans for change in plan.changes}
    drivers = {address: driver for address, driver in drivers.items() if is_vfio_driver(driver)}
    made = persist.persisted(situation.facts, drivers, situation.aliases)
    if made.taken_too and not args.force:
        _complain(f"not persisted: by their IDs vfio-pci would also take {', '.join(made.taken_too)} (--force does it)")
        return 1
    if not args.dry_run:
        persist.write(settings.host_root, made.files)
    for name, text in made.files.items():
        say(f"# /{name}{' would be' if args.dry_run else ''} written:\n{text.rstrip()}")
    for remark in made.remarks:
        _complain(remark)
    say(persist.NEXT_STEPS)
    return 0


def _status(args: argparse.Namespace, settings: Settings) -> int:
    situation, _ = _look(settings)
    rules = Rules(settings, ModelNames.load())
    plans = plan_bind(situation, rules, Selection(switches=True))
    rows = [row for plan in plans for row in _rows(plan, situation, rules.names)]
    if args.output == "json":
        say(json.dumps({"schema": 1, "functions": rows}, indent=2))
        return 0
    if not rows:
        say("no GPU, NVSwitch or other function that a resource rule offers is here")
        return 0
    shown = Table(["ADDRESS", "GROUP", "DRIVER", "IN USE", "BIND WOULD", "MODEL"])
    widest = max(len(row["driver"] or "-") for row in rows)
    others = max(len(row["bind"]) for row in rows)
    room = shutil.get_terminal_size().columns - 14 - 7 - max(6, widest) - 2 - 8 - max(10, others) - 2
    notes = []
    for row in rows:
        style = {"refuse": "red", "keep it": "green"}.get(row["bind"], "")
        group = "-" if row["iommu_group"] is None else str(row["iommu_group"])
        uses = "yes" if row["in_use"] else "no"
        model = row["model"][: max(8, room)] if is_terminal() else row["model"]
        shown.add_row(row["pci_address"], group, row["driver"] or "-", uses, Styled(row["bind"], style), model)
        notes += [f"{row['pci_address']}: {why}" for why in row["in_use"]]
    notes += [why for plan in plans for why in plan.refusals]
    notes += [f"{address}: cannot be read: {why}" for address, why in situation.facts.unreadable.items()]
    notes = list(dict.fromkeys(notes))
    print_unfolded(shown, *(["", *notes] if notes else []))
    return 0


def _rows(plan: GroupPlan, situation: Situation, names: ModelNames) -> list[dict[str, Any]]:
    changes = {change.address: change for change in plan.changes}
    rows = []
    for address in plan.members:
        function: PciFunction = situation.facts.functions[address]
        change = changes.get(address)
        action = "keep it" if change is None else "refuse" if plan.refusals else f"{change.after}"
        rows.append(
            {
                "pci_address": address,
                "model": names.describe(*function.model_id),
                "driver": function.driver,
                "iommu_group": function.iommu_group,
                "in_use": list(in_use_by(function, situation)),
                "bind": action,
                "refusals": list(plan.refusals) if change is not None else [],
                "remembered_driver": situation.remembered.get(address),
            }
        )
    return rows


def _complain(line: str) -> None:
    print(f"sandbox-plugin: {visible(line)}", file=sys.stderr)
