"""From PCI functions to devices: what one device is, and its ID.

On a kernel with VFIO cdevs a device is one claimed function that has a cdev, and its ID is N of vfioN. On any other
kernel a device is an IOMMU group with a claimed function in it, and its ID is the number of the group. The kind of
kernel is never guessed from /dev/iommu or from the name `vfio-dev`, which are there without cdevs as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from sandbox_plugin.inventory.carriers import what_they_carry
from sandbox_plugin.inventory.health import assess, is_bridge, is_vfio_bound
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Claim, claim
from sandbox_plugin.model import (
    Device,
    Health,
    HostFacts,
    PciFunction,
    Placement,
    Reason,
    id_order,
    node_of_cdev,
    node_of_group,
)
from sandbox_plugin.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one set of facts amounts to, without any memory of earlier ones."""

    devices: tuple[Device, ...]
    unoffered: Mapping[str, str]
    """PCI address -> why a function that a rule wants, or that could not be read, is not a device."""
    cdevs: bool
    """Whether devices are cdevs (else groups)."""


def find_devices(facts: HostFacts, settings: Settings, names: ModelNames, *, cdevs_known: bool = False) -> Found:
    """Groups functions into devices and judges them. `cdevs_known`: this kernel has shown cdevs before."""
    cdevs = cdevs_known or facts.kernel_has_cdevs or any(f.vfio and f.vfio.cdev for f in facts.functions.values())
    unoffered = dict(facts.unreadable)
    claimed = [(f, c) for f in facts.functions.values() if (c := claim(f, settings, names)) is not None]
    carried = what_they_carry(facts)
    wanted: list[_Claimed] = []
    for function, its_claim in claimed:
        if why_not := _why_not(function, its_claim, facts, carried.get(function.address), cdevs=cdevs):
            unoffered[function.address] = why_not
        else:
            wanted.append((function, its_claim))
    if not cdevs:
        for restrict in (partial(_without_withheld, facts=facts, claimed=claimed), _one_resource_a_group):
            wanted, left_out = restrict(wanted)
            unoffered |= left_out
    build = _by_cdev if cdevs else _by_group
    judge = partial(assess, facts=facts, require_iommufd=settings.require_iommufd)
    devices = [replace(d, health=judge(d)) for d in build(wanted, facts, names)]
    return Found(devices=tuple(_with_mates(devices)), unoffered=unoffered, cdevs=cdevs)


_Claimed = tuple[PciFunction, Claim]


def _why_not(function: PciFunction, claim: Claim, facts: HostFacts, carried: str | None, *, cdevs: bool) -> str | None:
    """`carried`: what the function carries, in words."""
    if claim.resource is None:
        return f"excluded by {claim.rule}"
    if not is_vfio_bound(function, facts):
        if carried is not None:
            return f"bound to {function.driver or 'no driver'} and carries {carried}: do not bind it to vfio-pci"
        return f"bound to {function.driver}, not to vfio-pci" if function.driver else "bound to no driver"
    if function.virtual_functions:
        return f"{_has_vfs(function)}; only those can be offered"
    if function.iommu_group is None:
        return "in no IOMMU group: is the IOMMU switched on?"
    if facts.groups[function.iommu_group].noiommu:
        return "in a group without an IOMMU (vfio's unsafe no-IOMMU mode)"
    if cdevs and (function.vfio is None or function.vfio.cdev is None):
        return "still being bound: it has no VFIO cdev yet"
    return None


def _has_vfs(function: PciFunction) -> str:
    return f"has {function.virtual_functions} SR-IOV virtual functions enabled"


def _by_cdev(wanted: list[_Claimed], facts: HostFacts, names: ModelNames) -> list[Device]:
    devices = []
    for function, its_claim in wanted:
        assert function.vfio is not None
        assert function.iommu_group is not None
        assert its_claim.resource is not None
        node = node_of_cdev(function.vfio.number)
        devices.append(
            Device(
                id=str(function.vfio.number),
                resource=its_claim.resource,
                node=node,
                model=_model(function, names),
                placements=(_placement(function),),
                iommu_group=function.iommu_group,
                mdev=function.mdev_type is not None,
                group_node=_group_node(function.iommu_group, facts),
                node_exists=facts.dev_nodes is None or node in facts.dev_nodes,
            )
        )
    return devices


def _without_withheld(
    wanted: list[_Claimed], *, facts: HostFacts, claimed: list[_Claimed]
) -> tuple[list[_Claimed], dict[str, str]]:
    """Leaves out what shares a group with a function that must not be passed: a group node passes every function.

    Bridges are not passed (`is_bridge`). Returns what is left, and why the others are left out.
    """
    carriers = [f for f in facts.functions.values() if f.virtual_functions]
    withheld = {f.iommu_group: f"{f.address}, which {_has_vfs(f)}" for f in carriers}
    for function, its_claim in claimed:
        if its_claim.resource is None and not is_bridge(function):
            withheld[function.iommu_group] = f"{function.address}, which {its_claim.rule} excludes"
    kept, left_out = [], {}
    for function, its_claim in wanted:
        if why := withheld.get(function.iommu_group):
            left_out[function.address] = f"shares IOMMU group {function.iommu_group} with {why}"
        else:
            kept.append((function, its_claim))
    return kept, left_out


def _one_resource_a_group(wanted: list[_Claimed]) -> tuple[list[_Claimed], dict[str, str]]:
    """Where rules of two resources meet in one group, the first rule has it. Also says why the others went empty."""
    winners: dict[int | None, Claim] = {}
    for function, its_claim in sorted(wanted, key=lambda each: (each[1].rank, each[0].address)):
        winners.setdefault(function.iommu_group, its_claim)
    kept, left_out = [], {}
    for function, its_claim in wanted:
        winner = winners[function.iommu_group]
        if its_claim.resource == winner.resource:
            kept.append((function, its_claim))
        else:
            whose = f"{winner.rule} offers as {winner.resource}"
            left_out[function.address] = f"shares IOMMU group {function.iommu_group} with a function that {whose}"
    return kept, left_out


def _by_group(wanted: list[_Claimed], facts: HostFacts, names: ModelNames) -> list[Device]:
    """One device for each group."""
    by_group: dict[int, list[_Claimed]] = defaultdict(list)
    for function, its_claim in wanted:
        assert function.iommu_group is not None
        by_group[function.iommu_group].append((function, its_claim))
    devices = []
    for number, members in by_group.items():
        functions = [function for function, _ in members]
        resource = members[0][1].resource
        assert resource is not None
        node = node_of_group(number)
        models = dict.fromkeys(_model(f, names) for f in functions)
        devices.append(
            Device(
                id=str(number),
                resource=resource,
                node=node,
                model=" + ".join(models),
                placements=tuple(_placement(f) for f in functions),
                iommu_group=number,
                mdev=functions[0].mdev_type is not None,
                group_node=_group_node(number, facts),
                node_exists=number in facts.group_nodes and (facts.dev_nodes is None or node in facts.dev_nodes),
            )
        )
    return devices


def _with_mates(devices: list[Device]) -> list[Device]:
    by_group: dict[int, list[str]] = defaultdict(list)
    for device in devices:
        by_group[device.iommu_group].append(device.id)
    return sorted(
        (replace(d, mates=tuple(i for i in by_group[d.iommu_group] if i != d.id)) for d in devices),
        key=lambda d: (d.resource, id_order(d.id)),
    )


def _model(function: PciFunction, names: ModelNames) -> str:
    name = names.describe(function.vendor, function.device)
    if function.mdev_type is not None:
        return f"{function.mdev_type} on {name}"
    return f"{name}, virtual function of {function.physical_function}" if function.physical_function else name


def _group_node(group: int, facts: HostFacts) -> str | None:
    return node_of_group(group) if group in facts.group_nodes else None


def _placement(function: PciFunction) -> Placement:
    binding = function.vfio.binding if function.vfio is not None else None
    return Placement(address=function.address, numa_node=function.numa_node, bridges=function.bridges, binding=binding)


def why_lost(device: Device, facts: HostFacts) -> Health:
    """Why a device that was there before is not there any more."""
    for placement in device.placements:
        if facts.unreachable is not None:
            return Health(reason=Reason.UNREADABLE, detail=f"the PCI bus cannot be read: {facts.unreachable}")
        if placement.address in facts.unreadable:
            return Health(
                reason=Reason.UNREADABLE, detail=f"{placement.address}: {facts.unreadable[placement.address]}"
            )
    function = facts.functions.get(device.address)
    if function is None:
        where = "there" if device.mdev else "on the PCI bus"
        return Health(reason=Reason.GONE, detail=f"{device.address} is not {where} any more")
    if not is_vfio_bound(function, facts):
        holder = f"bound to {function.driver}, not to a vfio driver" if function.driver else "bound to no driver"
        return Health(reason=Reason.NOT_BOUND, detail=f"{device.address} is {holder}")
    if device.is_cdev and function.vfio is not None and device.node != node_of_cdev(function.vfio.number):
        detail = f"{device.address} was bound again and is now vfio{function.vfio.number}"
        return Health(reason=Reason.NOT_BOUND, detail=detail)
    if device.is_cdev and (function.vfio is None or function.vfio.cdev is None):
        return Health(reason=Reason.NOT_BOUND, detail=f"{device.address} is still being bound: it has no VFIO cdev yet")
    why = f": it {_has_vfs(function)}" if function.virtual_functions else ""
    return Health(reason=Reason.NOT_BOUND, detail=f"{device.address} is no longer offered{why}")
