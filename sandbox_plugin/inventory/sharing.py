"""What the ledger means for each device: free for a pod, held by its own pod, or withheld, and why.

An IOMMU group has one holder. Devices that are held by that one pod are well; the others of the group, and all that
have a node, a group or an address of it under another name or number, are withheld. Where it is not yet known, a device
is not given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from sandbox_plugin.inventory.devices import Group
from sandbox_plugin.inventory.ledger import DeviceKey, Grant, Ledger, Use, is_heir
from sandbox_plugin.inventory.state import Signals
from sandbox_plugin.inventory.uses import is_undecided
from sandbox_plugin.model import Device, Fault, Reason


def withheld(
    groups: Mapping[int, Group],
    ledger: Ledger,
    signals: Signals,
    was_healthy: Callable[[DeviceKey], bool],
    *,
    from_claims: bool = False,
) -> dict[DeviceKey, Fault]:
    """The devices of these groups that must not be given to a pod which does not have them already, and why.

    By the device plugin API, or (`from_claims`) to a claim. `was_healthy` tells whether a device was listed as Healthy
    before this step.
    """
    found: dict[DeviceKey, Fault] = {}
    uses = _uses_by_group(ledger)
    is_awaited = signals.pod_resources and not ledger.is_told
    # Then any node may be held under another name, or its number have been another function's.
    is_unheard = signals.pod_resources and not ledger.is_heard
    for number, group in groups.items():
        holders = ledger.touching(group.places)
        if group.has_unbound:
            holders += [grant for grant in ledger.unplaced if grant not in holders]
        used = uses.get(number, ())
        for device in group.devices:
            own = next((grant for grant in holders if _is_own(grant, device, from_claims=from_claims)), None)
            fault = _taken_by(device, own, holders, ledger, from_claims=from_claims)
            fault = fault or _in_use(device, group, own, holders, used, ledger)
            if fault is not None:
                found[device.key] = fault
            elif own is not None and own.claim is not None:
                continue  # who holds it is known, whatever PodResources will say
            elif (
                is_unheard
                # The kubelet keeps an ID that it has given from other pods, but not from claims.
                or (from_claims and not ledger.is_told)
                or (is_awaited and _may_be_held_by_another_id(device, group, signals))
                # What was Healthy stays so: another scan will tell in a moment.
                or (own is None and not was_healthy(device.key) and any(is_undecided(a, u, ledger) for a, u in used))
            ):
                who = "PodResources has not told yet" if signals.pod_resources else "there is no PodResources to tell"
                detail = f"{who} which pods hold {device.node}, or others of its IOMMU group"
                found[device.key] = Fault(reason=Reason.HOLDERS_UNKNOWN, detail=detail)
    return found


def _is_own(grant: Grant, device: Device, *, from_claims: bool) -> bool:
    """Whether the grant is that of the pod, or of the claim, that has the device by this API."""
    if from_claims:
        return grant.claim is not None and device.address in grant.places.addresses
    return grant.key == device.key


def _taken_by(
    device: Device, own: Grant | None, holders: Iterable[Grant], ledger: Ledger, *, from_claims: bool
) -> Fault | None:
    """Why another pod than its own has the device or its group."""
    others = [
        grant
        for grant in holders
        if own is None or not (grant is own or ledger.are_one_pods(own, grant) or is_heir(own, grant))
    ]
    if not others:
        return None
    grant = next((grant for grant in others if _has(grant, device)), others[0])
    resource, number = grant.key
    holder = ledger.holder_of(grant)
    if grant.claim is not None:
        as_what, at = min(grant.places.addresses), ""
    else:
        as_what = f"device {number}" if resource == device.resource else f"{resource}={number}"
        at = f" ({min(grant.places.addresses)})" if grant.places.addresses else ""
    if not grant.places.are_known:
        detail = f"{holder} holds {as_what}, which may be of its IOMMU group {device.iommu_group}"
        return Fault(reason=Reason.GROUP_TAKEN, detail=detail)
    if not _has(grant, device):
        detail = f"IOMMU group {device.iommu_group} is held by {holder} through {as_what}{at}"
        return Fault(reason=Reason.GROUP_TAKEN, detail=detail)
    is_same_node = grant.places.node == device.node
    detail = (
        f"{holder} holds {device.node if is_same_node else device.address} as {as_what}{at if is_same_node else ''}"
    )
    if (grant.claim is not None) != from_claims:
        return Fault(reason=Reason.HELD_BY_OTHER_API, detail=detail)
    return Fault(reason=Reason.HELD_AS_ANOTHER, detail=detail)


def _has(grant: Grant, device: Device) -> bool:
    """Whether it is of this very device, by its node or its address."""
    return grant.places.node == device.node or device.address in grant.places.addresses


_Used = tuple[str, Use]


def _in_use(
    device: Device, group: Group, own: Grant | None, holders: Sequence[Grant], used: Iterable[_Used], ledger: Ledger
) -> Fault | None:
    """Why a use of its group speaks against the device."""
    for address, use in used:
        if use.elsewhere:
            since = f" since before {ledger.holder_of(own)} got it" if own is not None else " although no pod holds it"
            return Fault(reason=Reason.IN_USE_ELSEWHERE, detail=f"{address} is in use (enable is 1){since}")
    if holders:
        return None
    # While it is not known who uses a mate, a device that is in use itself may be so by the same pod. What rides along
    # with the only device of a group is used with it.
    addresses = {p.address for p in device.placements}
    if any(address in addresses or not group.is_shared for address, _ in used):
        return None
    for address, _ in used:
        detail = f"IOMMU group {device.iommu_group} is in use through {address}"
        return Fault(reason=Reason.GROUP_TAKEN, detail=detail)
    return None


def _may_be_held_by_another_id(device: Device, group: Group, signals: Signals) -> bool:
    """Whether a pod may have it by something else than its ID: through its group, its physical function, or its node
    under a name that is not served any more."""
    if group.is_shared or group.has_virtual or signals.in_cdi is None:  # without specs nothing tells of former names
        return True
    return any(node == device.node and key != device.key for key, node in signals.former.items())


def _uses_by_group(ledger: Ledger) -> dict[int, list[_Used]]:
    by_group: dict[int, list[_Used]] = {}
    for address, use in sorted(ledger.uses.items()):
        if use.group is not None:
            by_group.setdefault(use.group, []).append((address, use))
    return by_group
