"""From PCI functions to devices: what one device is, and its ID.

On a kernel with VFIO cdevs a device is one offered function that has a cdev, and its ID is N of vfioN. On any other
kernel a device is an IOMMU group with an offered function in it, and its ID is the number of the group. The kind of
kernel is never guessed from /dev/iommu or from the name `vfio-dev`, which are there without cdevs as well.

Whether a device can be given to a VM is not judged here: faults.py does that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from sandbox_plugin.inventory.functions import is_vfio_bound, what_they_carry
from sandbox_plugin.inventory.ledger import Place
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.nodes import is_in_dev, node_exists
from sandbox_plugin.inventory.rules import Offer, Rules
from sandbox_plugin.inventory.vgpu_types import NO_TYPES, TypeNames, learn_types, type_of
from sandbox_plugin.model import (
    Device,
    HostFacts,
    IommuGroup,
    PciFunction,
    Placement,
    is_vfio_driver,
    key_order,
    node_of_cdev,
    node_of_group,
)


class Group(NamedTuple):
    """One IOMMU group: the devices in it, and all that its one holder has."""

    devices: tuple[Device, ...]
    places: tuple[Place, ...]
    """Its number, the addresses of its functions, and the nodes of those and of its devices."""
    has_unbound: bool
    """A function that a rule wants is in it, and no vfio driver has that: a pod may have it from before."""
    has_virtual: bool
    """A virtual function is in it whose physical one a pod may have: the node of that says nothing of this one."""

    @property
    def is_shared(self) -> bool:
        """Whether a pod may have the group through something else in it than the one device."""
        return self.has_unbound or len(self.devices) > 1


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one set of facts amounts to. Of earlier ones it keeps what has not changed, and that there are cdevs."""

    devices: tuple[Device, ...]
    """In order of resource and ID. Their health is not known yet."""
    unoffered: Mapping[str, str]
    """PCI address -> why a function that a rule wants, or that could not be read, is not a device."""
    cdevs: bool
    """Whether devices are cdevs (else groups)."""
    groups: Mapping[int, Group]
    """Those with a device in them."""
    unreadable: Mapping[str, str]
    """PCI address -> why a function could not be read."""
    type_names: TypeNames
    """What types of vGPU are called: all that was seen since the daemon started."""
    parts: Mapping[int | None, _Part] = field(repr=False)
    """What each group amounts to, and from what: one of which nothing has changed keeps its devices."""

    @cached_property
    def groups_by_place(self) -> Mapping[Place, Sequence[int]]:
        """Which groups have a place."""
        by_place: dict[Place, list[int]] = defaultdict(list)
        for number, group in self.groups.items():
            for place in group.places:
                by_place[place].append(number)
        return by_place

    @cached_property
    def nodes(self) -> frozenset[str]:
        """Those of the devices."""
        return frozenset(d.node for d in self.devices)

    @property
    def kernel_is_known(self) -> bool:
        """Whether it is known what the nodes of this kernel are called: not before vfio is loaded."""
        return self.cdevs or bool(self.groups)


class _Seen(NamedTuple):
    """All of the facts that the devices of one group, and what speaks against them, follow from."""

    functions: tuple[PciFunction, ...]
    group: IommuGroup | None
    """None: no vfio driver has any of them."""
    unreadable: tuple[tuple[str, str], ...]
    """Those of its members that could not be read, and why."""
    has_group_node: bool
    nodes_in_dev: frozenset[str] | None
    """Those of its nodes that the host's /dev has; None: that cannot be seen."""
    carried: tuple[str | None, ...]
    """What each of the functions carries, in words."""
    vgpus: tuple[tuple[str | None, str | None, str | None] | None, ...]
    """Of each that may be a vGPU on its vendor's driver: the name of its type, and of its physical function the driver,
    and why it cannot be read."""
    cdevs: bool

    def is_same_as(self, other: _Seen) -> bool:
        """Whether the same follows from both. `VfioDev.binding` does not count in comparisons elsewhere."""
        return self == other and all(
            f is g or f.binding == g.binding for f, g in zip(self.functions, other.functions, strict=True)
        )


class _Part(NamedTuple):
    """What one group amounts to."""

    seen: _Seen
    devices: Sequence[Device]
    unoffered: Mapping[str, str]
    group: Group | None
    """None: no device is in it."""


def find_devices(facts: HostFacts, rules: Rules, before: Found | None = None) -> Found:
    """Groups functions into devices.

    `before` is what was found earlier by the same rules: a kernel that has shown cdevs has them for good. It is the
    answer again if nothing has changed, and devices of groups of which nothing has changed are the same objects again:
    a scan costs what has changed.
    """
    has_cdevs = before is not None and before.cdevs
    cdevs = has_cdevs or facts.kernel_has_cdevs or any(f.vfio and f.vfio.cdev for f in facts.functions.values())
    by_group: dict[int | None, list[PciFunction]] = defaultdict(list)
    for function in facts.functions.values():
        by_group[function.iommu_group].append(function)
    carried = what_they_carry(facts)
    types = learn_types(facts, before.type_names if before is not None else NO_TYPES)
    known = before.parts if before is not None else {}
    parts: dict[int | None, _Part] = {}
    for number, functions in by_group.items():
        seen = _seen(number, functions, facts, carried, types, cdevs=cdevs)
        part = known.get(number)
        parts[number] = (
            part if part is not None and part.seen.is_same_as(seen) else _part(number, seen, facts, rules, types)
        )
    is_same = parts.keys() == known.keys() and all(part is known[number] for number, part in parts.items())
    is_same = is_same and before is not None and types is before.type_names
    if before is not None and is_same and facts.unreadable == before.unreadable and cdevs == before.cdevs:
        return before
    unoffered = dict(facts.unreadable)
    for part in parts.values():
        unoffered |= part.unoffered
    return Found(
        devices=tuple(sorted((d for part in parts.values() for d in part.devices), key=lambda d: key_order(d.key))),
        unoffered=unoffered,
        cdevs=cdevs,
        groups={number: part.group for number, part in parts.items() if number is not None and part.group is not None},
        unreadable=facts.unreadable,
        type_names=types,
        parts=parts,
    )


def _seen(
    number: int | None,
    functions: Sequence[PciFunction],
    facts: HostFacts,
    carried: Mapping[str, str],
    types: TypeNames,
    *,
    cdevs: bool,
) -> _Seen:
    group = facts.groups.get(number) if number is not None else None
    members = group.members if group is not None and facts.unreadable else ()
    nodes = [node_of_cdev(f.vfio.number) for f in functions if f.vfio is not None]
    if number is not None:
        nodes.append(node_of_group(number))
    return _Seen(
        functions=tuple(functions),
        group=group,
        unreadable=tuple((a, facts.unreadable[a]) for a in members if a in facts.unreadable),
        has_group_node=number in facts.group_nodes,
        nodes_in_dev=facts.dev_nodes.intersection(nodes) if facts.dev_nodes is not None else None,
        carried=tuple([carried.get(f.address) for f in functions]),
        vgpus=tuple([(type_of(f, types), *_carrier(f, facts)) if f.is_vendors_vgpu else None for f in functions]),
        cdevs=cdevs,
    )


def _part(number: int | None, seen: _Seen, facts: HostFacts, rules: Rules, types: TypeNames) -> _Part:
    offered = [(f, offer) for f in seen.functions if (offer := rules.offer(f, types)) is not None]
    wanted, left_out = _wanted(seen, offered, facts, rules)
    if not wanted or number is None:
        return _Part(seen=seen, devices=(), unoffered=left_out, group=None)
    group_node = node_of_group(number) if number in facts.group_nodes else None
    if group_node is not None and _must_not_be_passed(seen.functions, offered):
        group_node = None
    devices = _devices(number, wanted, seen.functions, facts, rules.names, types, group_node, cdevs=seen.cdevs)
    group = _group(number, devices, seen.functions, offered, facts)
    return _Part(seen=seen, devices=devices, unoffered=left_out, group=group)


_Offered = tuple[PciFunction, Offer]


# Which functions become devices


def _wanted(
    seen: _Seen, offered: Sequence[_Offered], facts: HostFacts, rules: Rules
) -> tuple[list[_Offered], dict[str, str]]:
    """Of the functions of one group: those that become devices, and why the others that a rule takes do not."""
    functions, cdevs = seen.functions, seen.cdevs
    carried = {f.address: words for f, words in zip(functions, seen.carried, strict=True)}
    wanted: list[_Offered] = []
    left_out: dict[str, str] = {}
    for function, offer in offered:
        if why_not := _why_not(function, offer, facts, carried[function.address], cdevs=cdevs):
            left_out[function.address] = why_not
        else:
            wanted.append((function, offer))
    # KubeVirt gets the group's node beside the cdev, on every kernel that has both.
    is_passed_whole = rules.settings.consumer.opens_group_nodes and seen.has_group_node
    if (is_passed_whole or not cdevs) and (other := _must_not_be_passed(functions, offered)):
        shares = {f.address: f"shares IOMMU group {f.iommu_group} with {other}" for f, _ in wanted}
        return [], left_out | shares
    if wanted and not cdevs:
        # Where rules of two resources meet in one group, the first rule has it.
        _, first = min(wanted, key=lambda each: (each[1].rank, each[0].address))
        whose = f"a function that {first.rule} offers as {first.resource}"
        for function, _ in [each for each in wanted if each[1].resource != first.resource]:
            left_out[function.address] = f"shares IOMMU group {function.iommu_group} with {whose}"
        wanted = [each for each in wanted if each[1].resource == first.resource]
    return wanted, left_out


def _why_not(function: PciFunction, offer: Offer, facts: HostFacts, carried: str | None, *, cdevs: bool) -> str | None:
    """Why the function cannot be a device, whatever else is in its group. `carried`: what it carries, in words."""
    if offer.resource is None:
        return f"excluded by {offer.rule}"
    if not is_vfio_bound(function, facts):
        if carried is not None:
            return f"bound to {function.driver or 'no driver'} and carries {carried}: do not bind it to vfio-pci"
        return f"bound to {function.driver}, not to vfio-pci" if function.driver else "bound to no driver"
    if why := why_no_vgpu(function, facts):
        return why
    if function.virtual_functions:
        return f"{has_vfs(function)}; only those can be offered"
    if function.iommu_group is None:
        return "in no IOMMU group: is the IOMMU switched on?"
    if facts.groups[function.iommu_group].noiommu:
        return "in a group without an IOMMU (vfio's unsafe no-IOMMU mode)"
    if cdevs and (function.vfio is None or function.vfio.cdev is None):
        return "still being bound: it has no VFIO cdev yet"
    return None


def _must_not_be_passed(functions: Sequence[PciFunction], offered: Sequence[_Offered]) -> str | None:
    """A function that no VM may get, in words: it keeps its whole group from whoever gets the group's node, which
    passes every function but bridges."""
    found = [f"{f.address}, which {has_vfs(f)}" for f in functions if f.virtual_functions]
    for function, offer in offered:
        if offer.resource is None and not function.is_bridge:
            found.append(f"{function.address}, which {offer.rule} excludes")
    return found[-1] if found else None


def why_no_vgpu(function: PciFunction, facts: HostFacts) -> str | None:
    """Why every open of a virtual function on its vendor's driver fails (ENODEV); None for any other function."""
    if not function.is_vendors_vgpu:
        return None
    if function.vgpu_type is None:
        return f"bound to {function.driver}, and shows no vGPU type (nvidia/current_vgpu_type)"
    if function.vgpu_type == "0":
        return "has no vGPU type (nvidia/current_vgpu_type is 0)"
    driver, why_unreadable = _carrier(function, facts)
    if why_unreadable is None and (driver is None or is_vfio_driver(driver)):
        return f"its physical function {function.physical_function} is bound to {driver or 'no driver'}"
    return None  # one that cannot be read proves nothing: that is a fault, not another device


def _carrier(function: PciFunction, facts: HostFacts) -> tuple[str | None, str | None]:
    """Of a virtual function's physical function the driver, and why it cannot be read."""
    address = function.physical_function or ""
    carrier = facts.functions.get(address)
    return (carrier.driver if carrier is not None else None, facts.unreadable.get(address))


def has_vfs(function: PciFunction) -> str:
    """That it carries virtual functions, in words."""
    return f"has {function.virtual_functions} SR-IOV virtual functions enabled"


# What the devices are


def _devices(
    number: int,
    wanted: Sequence[_Offered],
    functions: Sequence[PciFunction],
    facts: HostFacts,
    names: ModelNames,
    types: TypeNames,
    group_node: str | None,
    *,
    cdevs: bool,
) -> list[Device]:
    """The devices that the wanted functions of one group are: each for itself, or all of them together."""
    made = []
    ids = [str(f.vfio.number) for f, _ in wanted if f.vfio is not None] if cdevs else [str(number)]
    parts = [[each] for each in wanted] if cdevs else [wanted]
    for device_id, part in zip(ids, parts, strict=True):
        resource = part[0][1].resource
        assert resource is not None
        node = node_of_cdev(device_id) if cdevs else node_of_group(number)
        made.append(
            Device(
                id=device_id,
                resource=resource,
                node=node,
                model=" + ".join(dict.fromkeys(_model(f, names, types) for f, _ in part)),
                placements=tuple(_placement(f) for f, _ in part),
                iommu_group=number,
                mates=tuple(other for other in ids if other != device_id),
                group_functions=tuple(f.address for f in functions if is_vfio_bound(f, facts) or f.is_left_enabled),
                mdev=part[0][0].mdev_type is not None,
                group_node=group_node,
                node_exists=is_in_dev(node, facts) if cdevs else node_exists(node, facts),
            )
        )
    return made


def _model(function: PciFunction, names: ModelNames, types: TypeNames) -> str:
    name = names.describe(function.vendor, function.device)
    if function.mdev_type is not None:
        return f"{function.mdev_type} on {name}" if function.vendor else function.mdev_type
    if function.is_vendors_vgpu:
        return f"{type_of(function, types) or f'vGPU type {function.vgpu_type}'} on {name}"
    return f"{name}, virtual function of {function.physical_function}" if function.physical_function else name


def _placement(function: PciFunction) -> Placement:
    return Placement(
        address=function.address, numa_node=function.numa_node, bridges=function.bridges, binding=function.binding
    )


def _group(
    number: int,
    devices: Sequence[Device],
    functions: Sequence[PciFunction],
    offered: Sequence[_Offered],
    facts: HostFacts,
) -> Group:
    places: list[Place] = [number, *facts.groups[number].members, *(d.node for d in devices)]
    # Also of what is no device of ours: a number that a pod has may have gone to it.
    places += [node_of_cdev(f.vfio.number) for f in functions if f.vfio is not None and f.vfio.cdev]
    # Who has a physical function has its virtual ones: vfio-pci lets nobody else open them (vfio_pci_validate_vf_token
    # in drivers/vfio/pci/vfio_pci_core.c).
    places += [f.physical_function for f in functions if f.physical_function is not None]
    has_unbound = any(offer.resource is not None and not is_vfio_bound(f, facts) for f, offer in offered)
    has_virtual = any(f.physical_function is not None and not f.is_vendors_vgpu for f in functions)
    return Group(devices=tuple(devices), places=tuple(places), has_unbound=has_unbound, has_virtual=has_virtual)
