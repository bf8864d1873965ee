"""What is to be written so that functions get a vfio driver, or their host driver back. Pure: facts in, steps out.

A group is planned as a whole, since the kernel gives it to a VM as a whole. What speaks against it are refusals in
words; where there is one, nothing of the group is changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from sandbox_plugin.inventory.functions import is_vfio_bound, what_they_carry
from sandbox_plugin.inventory.rules import NVSWITCH_RULE, Rules
from sandbox_plugin.model import HostFacts, PciFunction, is_vfio_driver

PCI = "/sys/bus/pci"
GENERIC = "vfio-pci"
_HARMLESS_DRIVERS = ("pci-stub", "pcieport")
"""Host drivers that leave the DMA of their function's group alone (driver_managed_dma in struct pci_driver)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a host shows, as far as binding needs it."""

    facts: HostFacts
    users: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Address -> who on the host uses the function, in words."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Pattern and module of each `vfio_pci:` line of modules.alias."""
    drivers: frozenset[str] = frozenset()
    """PCI drivers that are loaded."""
    remembered: Mapping[str, str | None] = field(default_factory=dict)
    """Address -> the driver that it had before it was bound to vfio; None: it had none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which functions a person asked for: by address, by model, or all GPUs."""

    addresses: tuple[str, ...] = ()
    model: tuple[int, int] | None = None
    switches: bool = False
    """NVSwitches too, where all or a model is asked for."""
    force: bool = False
    """Whether to go on although somebody uses a function, or no rule offers it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One write to a file of sysfs."""

    path: str
    """As the host has it, without the root of a fake tree."""
    text: str

    @property
    def shell_line(self) -> str:
        return f"echo {self.text.strip()} > {self.path}" if self.text.strip() else f"echo > {self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What is done to one function."""

    address: str
    before: str | None
    """Driver that it has now."""
    after: str | None
    """Driver that it shall have; None: whatever the kernel chooses, and no vfio driver."""
    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """What is done to one IOMMU group, or why nothing is."""

    group: int | None
    members: tuple[str, ...]
    """Functions of it that are passed to a VM, those that need no change too."""
    modules: tuple[str, ...] = ()
    """To load first."""
    changes: tuple[Change, ...] = ()
    refusals: tuple[str, ...] = ()


def plan_bind(situation: Situation, rules: Rules, selection: Selection) -> list[GroupPlan]:
    """A plan for each group that a selected function is in. Raises KeyError for an address that is not there."""
    facts = situation.facts
    chosen = _select(facts, rules, selection)
    plans = []
    for group, functions in _by_group(chosen).items():
        mates = _members(facts, group, functions)
        members = [f for f in mates if _rides_along(f, functions, rules)]
        wanted = {f.address: _best_driver(f, situation.aliases) for f in members}
        changed = [f for f in members if not _is_right(f, wanted[f.address][0], facts)]
        refusals = _unwelcome(functions, rules, selection)
        if changed:
            refusals += _against(changed, mates, functions, situation, rules, selection)
        missing = [wanted[f.address] for f in changed if wanted[f.address][0] not in situation.drivers]
        plans.append(
            GroupPlan(
                group=group,
                members=tuple(f.address for f in members),
                modules=tuple(dict.fromkeys(module for _, module in missing)),
                changes=tuple(_to_vfio(f, wanted[f.address][0]) for f in changed),
                refusals=tuple(refusals),
            )
        )
    return plans


def plan_unbind(situation: Situation, rules: Rules, selection: Selection) -> list[GroupPlan]:
    """The same for the way back. Raises KeyError."""
    facts = situation.facts
    plans = []
    for group, functions in _by_group(_select(facts, rules, selection)).items():
        mates = _members(facts, group, functions)
        members = [f for f in mates if not f.is_bridge and is_vfio_driver(f.driver)]
        refusals = _unwelcome(functions, rules, selection)
        if not selection.force:
            refusals += [f"{f.address}: {why}" for f in mates if not f.is_bridge for why in _vm_of(f)]
        plans.append(
            GroupPlan(
                group=group,
                members=tuple(f.address for f in members),
                changes=tuple(_to_host(f, situation) for f in members),
                refusals=tuple(refusals),
            )
        )
    return plans


def matching(function: PciFunction, bus: str, aliases: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The aliases of this bus, `pci` or `vfio_pci`, that a function matches.

    Format: `pci:v..d..sv..sd..bc..sc..i..` (do_pci_entry in scripts/mod/file2alias.c). There are thousands of them, so
    those of other vendors are not even tried.
    """
    subsystem = (function.subsystem_vendor or 0, function.subsystem_device or 0)
    code = f"{function.class_code:06X}"
    vendor = f"{bus}:v{function.vendor:08X}"
    alias = f"{vendor}d{function.device:08X}sv{subsystem[0]:08X}sd{subsystem[1]:08X}"
    alias += f"bc{code[:2]}sc{code[2:4]}i{code[4:]}"
    tried = (f"{bus}:v*", vendor)
    return [(p, module) for p, module in aliases if p.startswith(tried) and fnmatchcase(alias, p)]


def is_switch(function: PciFunction, rules: Rules) -> bool:
    offer = rules.offer(function)
    return offer is not None and offer.rule == NVSWITCH_RULE


def is_ours(function: PciFunction, rules: Rules) -> bool:
    """Whether a rule would offer the function if a vfio driver had it. Mediated devices are bound by nobody."""
    offer = rules.offer(function) or rules.offer(replace(function, driver=GENERIC))
    return function.mdev_type is None and offer is not None and offer.resource is not None


def in_use_by(function: PciFunction, situation: Situation) -> tuple[str, ...]:
    """Who uses a function now, in words."""
    if vm := _vm_of(function):
        return vm
    return () if function.is_held_by_vfio else situation.users.get(function.address, ())


def _vm_of(function: PciFunction) -> tuple[str, ...]:
    if is_vfio_driver(function.driver) and function.enable == 1:
        return ("a VM has it (enable is 1)",)
    if function.is_left_enabled:
        return ("it is enabled without a driver: a VM that had it when it was unbound, or a host driver, left it so",)
    return ()


def _select(facts: HostFacts, rules: Rules, selection: Selection) -> list[PciFunction]:
    if selection.addresses:
        return [facts.functions[address] for address in selection.addresses]
    return [
        function
        for function in facts.functions.values()
        if is_ours(function, rules)
        and function.physical_function is None
        and (selection.switches or not is_switch(function, rules))
        and selection.model in (None, function.model_id)
    ]


def _by_group(functions: Iterable[PciFunction]) -> dict[int | None, list[PciFunction]]:
    """Those without a group together: nothing can be done for them but to say so."""
    groups: dict[int | None, list[PciFunction]] = defaultdict(list)
    for function in functions:
        groups[function.iommu_group].append(function)
    return groups


def _members(facts: HostFacts, group: int | None, functions: list[PciFunction]) -> list[PciFunction]:
    if group is None:
        return functions
    return [f for f in facts.functions.values() if f.iommu_group == group and f.mdev_type is None]


def _rides_along(function: PciFunction, chosen: list[PciFunction], rules: Rules) -> bool:
    """Whether it goes to the VM with these: another function of the same card, another device that is offered, or
    what is in the way with a host driver. A function of the machine without a driver is in nobody's way."""
    if function.is_bridge:
        return False
    if function in chosen or _is_on_card_of(function, chosen) or is_ours(function, rules):
        return True
    return function.driver is not None and function.driver not in _HARMLESS_DRIVERS


def _is_on_card_of(function: PciFunction, chosen: list[PciFunction]) -> bool:
    return any(function.address[:-1] == other.address[:-1] for other in chosen)


def _best_driver(function: PciFunction, aliases: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """Driver and module: of the aliases that match the one with the fewest wildcards, as libvirt chooses it.

    A driver is named as its module is, but for vfio-pci.
    """
    fitting = matching(function, "vfio_pci", aliases)
    module = min((pattern.count("*"), module) for pattern, module in fitting)[1] if fitting else "vfio_pci"
    return (GENERIC if module == "vfio_pci" else module), module


def _is_right(function: PciFunction, best: str, facts: HostFacts) -> bool:
    """Bound to the best driver, or to another one that somebody has chosen; not to the generic where there is a better.

    A function on a vendor's own driver that has a `vfio-dev` folder (a vGPU) is right as it is.
    """
    return is_vfio_bound(function, facts) and (function.driver != GENERIC or best == GENERIC)


def _unwelcome(functions: list[PciFunction], rules: Rules, selection: Selection) -> list[str]:
    if selection.force:
        return []
    return [f"{f.address}: no resource rule offers it" for f in functions if not is_ours(f, rules)]


def _against(
    changed: list[PciFunction],
    mates: list[PciFunction],
    chosen: list[PciFunction],
    situation: Situation,
    rules: Rules,
    selection: Selection,
) -> list[str]:
    """Everything that speaks against taking these functions from where they are."""
    refusals = [
        f"{f.address}: it has no IOMMU group: the IOMMU is off, in the firmware or on the kernel's command line"
        for f in changed
        if f.iommu_group is None
    ]
    if selection.force:
        return refusals
    carried = what_they_carry(situation.facts)
    changing = {f.address for f in changed}
    for function in mates:
        if function.address in changing:
            refusals += [f"{function.address}: {why}" for why in in_use_by(function, situation)]
            if function.address in carried:
                refusals.append(f"{function.address}: it carries {carried[function.address]}")
            if not (_is_on_card_of(function, chosen) or is_ours(function, rules)):
                refusals.append(
                    f"{function.address}: another device of this machine, on {function.driver}, is in this IOMMU group"
                )
        elif function.is_held_by_vfio and function.enable == 1:
            refusals.append(f"{function.address}: a VM has it, and with it the IOMMU group")
    return refusals


def _to_vfio(function: PciFunction, driver: str) -> Change:
    """The override comes first: once it is unbound, no other driver can take the function."""
    address = function.address
    writes = [Write(path=f"{PCI}/devices/{address}/driver_override", text=driver)]
    if function.driver is not None:
        writes.append(_unbind(address, function.driver))
    writes.append(Write(path=f"{PCI}/drivers_probe", text=address))
    return Change(address=address, before=function.driver, after=driver, writes=tuple(writes))


def _to_host(function: PciFunction, situation: Situation) -> Change:
    """Back to the driver that is remembered, if it is there; where none is, the kernel chooses.

    With an override for as long as the probe takes: the driver of before may match nothing by its own IDs (pci-stub).
    """
    address = function.address
    assert function.driver is not None
    before = situation.remembered.get(address)
    after = before if before in situation.drivers else None
    has_choice = after is not None or before is not None or address not in situation.remembered
    override = f"{PCI}/devices/{address}/driver_override"
    writes = [Write(path=override, text=after or "\n"), _unbind(address, function.driver)]
    writes += [Write(path=f"{PCI}/drivers_probe", text=address)] if has_choice else []
    writes += [Write(path=override, text="\n")] if after is not None else []
    return Change(address=address, before=function.driver, after=after, writes=tuple(writes))


def _unbind(address: str, driver: str) -> Write:
    return Write(path=f"{PCI}/drivers/{driver}/unbind", text=address)
