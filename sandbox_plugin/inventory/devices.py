"""From PCI functions to devices: what one device is, and its ID.

On a kernel with VFIO cdevs a device is one offered function that has a cdev, and its ID is N of vfioN. On any other
kernel a device is an IOMMU group with a offered function in it, and its ID is the number of the group. The kind of
kernel is never guessed from /dev/iommu or from the name `vfio-dev`, which are there without cdevs as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from sandbox_plugin.config.settings import Consumer
from sandbox_plugin.inventory.carriers import what_they_carry
from sandbox_plugin.inventory.health import assess, is_bridge, is_left_enabled, is_vfio_bound
from sandbox_plugin.inventory.ledger import Place
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Offer, Rules
from sandbox_plugin.model import (
    Device,
    Health,
    HostFacts,
    IommuGroup,
    PciFunction,
    Placement,
    Reason,
    id_order,
    node_of_cdev,
    node_of_group,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One IOMMU group: the devices in it, and all that its one holder has."""

    devices: tuple[Device, ...]
    places: tuple[Place, ...]
    """Its number, the addresses of its functions, and the nodes of those and of its devices."""
    has_unbound: bool
    """A function that a rule wants is in it, and no vfio driver has that: a pod may have it from before."""

    @property
    def is_shared(self) -> bool:
        """Whether a pod may have the group through something else than the one device."""
        return self.has_unbound or len(self.devices) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one set of facts amounts to, without any memory of earlier ones."""

    devices: tuple[Device, ...]
    """In order of resource and ID."""
    unoffered: Mapping[str, str]
    """PCI address -> why a function that a rule wants, or that could not be read, is not a device."""
    unreadable: Mapping[str, str]
    """PCI address -> why a function could not be read."""
    cdevs: bool
    """Whether devices are cdevs (else groups)."""
    groups: Mapping[int, Group]
    """Those with a device in them."""
    parts: Mapping[int | None, _Part] = field(default_factory=dict, repr=False)
    """Each group as it was judged, and from what: one of which nothing has changed is not judged again."""

    @property
    def kernel_is_known(self) -> bool:
        """Whether it is known what the nodes of this kernel are called: not before vfio is loaded."""
        return self.cdevs or bool(self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """All that the devices of one group follow from; the functions without a group are seen together."""

    functions: tuple[PciFunction, ...]
    """Those that could be read."""
    group: IommuGroup | None
    """None: no vfio driver has any of them."""
    unreadable: tuple[tuple[str, str], ...]
    has_group_node: bool
    nodes_there: frozenset[str] | None
    """Those of its nodes that the host's /dev shows; None: it cannot be seen."""
    cdevs: bool
    carried: tuple[tuple[str, str], ...]
    """Which of them carry others for VMs, and what, in words."""

    def is_same_as(self, other: _Seen) -> bool:
        """Whether the same follows from both. `VfioDev.binding` does not count in comparisons elsewhere."""
        return self == other and all(
            f is g or f.binding == g.binding for f, g in zip(self.functions, other.functions, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one group amounts to."""

    seen: _Seen
    devices: tuple[Device, ...]
    unoffered: Mapping[str, str]
    group: Group | None


def find_devices(facts: HostFacts, rules: Rules, *, cdevs_known: bool = False, before: Found | None = None) -> Found:
    """Groups functions into devices and judges them.

    `cdevs_known`: this kernel has shown cdevs before. `before` is what was found with the same rules earlier: a
    group of which nothing has changed keeps its devices.
    """
    cdevs = cdevs_known or facts.kernel_has_cdevs or any(f.vfio and f.vfio.cdev for f in facts.functions.values())
    known = before.parts if before is not None else {}
    parts: dict[int | None, _Part] = {}
    for number, seen in _by_group(facts, cdevs=cdevs):
        part = known.get(number)
        if part is None or not part.seen.is_same_as(seen):
            part = _judge(seen, facts, rules)
        parts[number] = part
    if before is not None and _is_same(parts, before.parts) and facts.unreadable == before.unreadable:
        return before
    unoffered = dict(facts.unreadable)
    for part in parts.values():
        unoffered |= part.unoffered
    devices = [device for part in parts.values() for device in part.devices]
    devices.sort(key=lambda d: (d.resource, id_order(d.id)))
    groups = {number: part.group for number, part in parts.items() if number is not None and part.group is not None}
    return Found(
        devices=tuple(devices),
        unoffered=unoffered,
        unreadable=facts.unreadable,
        cdevs=cdevs,
        groups=groups,
        parts=parts,
    )


def _is_same(parts: Mapping[int | None, _Part], before: Mapping[int | None, _Part]) -> bool:
    return len(parts) == len(before) and all(part is before.get(number) for number, part in parts.items())


def _by_group(facts: HostFacts, *, cdevs: bool) -> Iterable[tuple[int | None, _Seen]]:
    functions: dict[int | None, list[PciFunction]] = defaultdict(list)
    for function in facts.functions.values():
        functions[function.iommu_group].append(function)
    carried = what_they_carry(facts)
    for number, members in functions.items():
        group = facts.groups.get(number) if number is not None else None
        addresses = group.members if group is not None and facts.unreadable else ()
        yield (
            number,
            _Seen(
                functions=tuple(members),
                group=group,
                unreadable=tuple((a, facts.unreadable[a]) for a in addresses if a in facts.unreadable),
                has_group_node=number in facts.group_nodes,
                nodes_there=_nodes_there(number, members, facts.dev_nodes) if group is not None else None,
                cdevs=cdevs,
                carried=tuple((f.address, carried[f.address]) for f in members if f.address in carried),
            ),
        )


def _nodes_there(
    number: int | None, functions: Iterable[PciFunction], dev_nodes: frozenset[str] | None
) -> frozenset[str] | None:
    if dev_nodes is None:
        return None
    nodes = [node_of_cdev(f.vfio.number) for f in functions if f.vfio is not None]
    return dev_nodes.intersection([*nodes, *([] if number is None else [node_of_group(number)])])


def _judge(seen: _Seen, facts: HostFacts, rules: Rules) -> _Part:
    """The devices of one group, and why its other functions are none."""
    cdevs = seen.cdevs
    offered = [(f, o) for f in seen.functions if (o := rules.offer(f)) is not None]
    unoffered: dict[str, str] = {}
    wanted: list[_Offered] = []
    has_unbound = False
    carried = dict(seen.carried)
    for function, offer in offered:
        if why_not := _why_not(function, offer, facts, carried.get(function.address), cdevs=cdevs):
            unoffered[function.address] = why_not
            has_unbound |= offer.resource is not None and not is_vfio_bound(function, facts)
        else:
            wanted.append((function, offer))
    # KubeVirt gets the group's node beside the cdev, on every kernel that has both.
    if not cdevs or (rules.settings.consumer is Consumer.KUBEVIRT and seen.has_group_node):
        wanted, left_out = _without_withheld(wanted, seen=seen, offered=offered)
        unoffered |= left_out
    if not cdevs:
        wanted, left_out = _one_resource_a_group(wanted)
        unoffered |= left_out
    build = _by_cdev if cdevs else _of_group
    judge = partial(assess, facts=facts, require_iommufd=rules.settings.require_iommufd)
    vms = tuple(f.address for f in seen.functions if is_vfio_bound(f, facts) or is_left_enabled(f))
    devices = _with_mates([replace(d, health=judge(d), group_functions=vms) for d in build(wanted, facts, rules.names)])
    return _Part(seen=seen, devices=devices, unoffered=unoffered, group=_group(seen, devices, has_unbound))


def _group(seen: _Seen, devices: Sequence[Device], has_unbound: bool) -> Group | None:
    if not devices or seen.group is None:
        return None
    places: list[Place] = [seen.group.number, *seen.group.members, *(d.node for d in devices)]
    # Also of what is no device of ours: a number that a pod has may have gone to it.
    places += [node_of_cdev(f.vfio.number) for f in seen.functions if f.vfio is not None and f.vfio.cdev]
    # Who has a physical function has its virtual ones: vfio-pci lets nobody else open them (vfio_pci_validate_vf_token
    # in drivers/vfio/pci/vfio_pci_core.c).
    places += [f.physical_function for f in seen.functions if f.physical_function is not None]
    return Group(devices=tuple(devices), places=tuple(places), has_unbound=has_unbound)


_Offered = tuple[PciFunction, Offer]


def _why_not(function: PciFunction, offer: Offer, facts: HostFacts, carried: str | None, *, cdevs: bool) -> str | None:
    """`carried`: what the function carries, in words."""
    if offer.resource is None:
        return f"excluded by {offer.rule}"
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


def _by_cdev(wanted: list[_Offered], facts: HostFacts, names: ModelNames) -> list[Device]:
    devices = []
    for function, offer in wanted:
        assert function.vfio is not None
        assert function.iommu_group is not None
        assert offer.resource is not None
        node = node_of_cdev(function.vfio.number)
        devices.append(
            Device(
                id=str(function.vfio.number),
                resource=offer.resource,
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
    wanted: list[_Offered], *, seen: _Seen, offered: list[_Offered]
) -> tuple[list[_Offered], dict[str, str]]:
    """Leaves out what shares a group with a function that must not be passed: a group node passes every function.

    Bridges are not passed (`is_bridge`). Returns what is left, and why the others are left out.
    """
    withheld = [f"{f.address}, which {_has_vfs(f)}" for f in seen.functions if f.virtual_functions]
    for function, offer in offered:
        if offer.resource is None and not is_bridge(function):
            withheld.append(f"{function.address}, which {offer.rule} excludes")
    if not withheld:
        return wanted, {}
    return [], {f.address: f"shares IOMMU group {f.iommu_group} with {withheld[-1]}" for f, _ in wanted}


def _one_resource_a_group(wanted: list[_Offered]) -> tuple[list[_Offered], dict[str, str]]:
    """Where rules of two resources meet in one group, the first rule has it. Also says why the others went empty."""
    if not wanted:
        return wanted, {}
    _, winner = min(wanted, key=lambda each: (each[1].rank, each[0].address))
    kept, left_out = [], {}
    for function, offer in wanted:
        if offer.resource == winner.resource:
            kept.append((function, offer))
        else:
            whose = f"{winner.rule} offers as {winner.resource}"
            left_out[function.address] = f"shares IOMMU group {function.iommu_group} with a function that {whose}"
    return kept, left_out


def _of_group(wanted: list[_Offered], facts: HostFacts, names: ModelNames) -> list[Device]:
    """The one device that a group is."""
    if not wanted:
        return []
    functions = [function for function, _ in wanted]
    number, resource = functions[0].iommu_group, wanted[0][1].resource
    assert number is not None
    assert resource is not None
    node = node_of_group(number)
    return [
        Device(
            id=str(number),
            resource=resource,
            node=node,
            model=" + ".join(dict.fromkeys(_model(f, names) for f in functions)),
            placements=tuple(_placement(f) for f in functions),
            iommu_group=number,
            mdev=functions[0].mdev_type is not None,
            group_node=_group_node(number, facts),
            node_exists=number in facts.group_nodes and (facts.dev_nodes is None or node in facts.dev_nodes),
        )
    ]


def _with_mates(devices: list[Device]) -> tuple[Device, ...]:
    if len(devices) > 1:
        devices = [replace(d, mates=tuple(m.id for m in devices if m is not d)) for d in devices]
    return tuple(devices)


def _model(function: PciFunction, names: ModelNames) -> str:
    name = names.describe(function.vendor, function.device)
    if function.mdev_type is not None:
        return f"{function.mdev_type} on {name}"
    return f"{name}, virtual function of {function.physical_function}" if function.physical_function else name


def _group_node(group: int, facts: HostFacts) -> str | None:
    return node_of_group(group) if group in facts.group_nodes else None


def _placement(function: PciFunction) -> Placement:
    return Placement(
        address=function.address, numa_node=function.numa_node, bridges=function.bridges, binding=function.binding
    )


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
