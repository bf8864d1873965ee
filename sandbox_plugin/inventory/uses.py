"""What the kernel shows in use: the third witness of the ledger.

`enable` is 1 while somebody has a function enabled. Where no host driver has it, that is a VM. Whose VM it is, is not
told; sometimes it follows from when the use began.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from sandbox_plugin.inventory.functions import is_vfio_bound
from sandbox_plugin.inventory.ledger import Grant, Ledger, Place, Use, changed
from sandbox_plugin.model import HostFacts, PciFunction


def observe(ledger: Ledger, before: HostFacts | None, facts: HostFacts, now: float) -> Ledger:
    """Takes in what a scan saw in use that has ended by now; `before` is what the scan before that saw."""
    seen_before = before.functions if before is not None else {}
    uses: dict[str, Use] = {}
    for address, function in facts.functions.items():
        if function.enable == 1:
            earlier, use = seen_before.get(address), ledger.uses.get(address)
            if is_vfio_bound(function, facts) or _is_unbound_under_a_vm(function, earlier, use):
                uses[address] = _used(function, earlier, use, facts, now)
    for address, use in ledger.uses.items():
        is_newer = use.seen_at > facts.began_at  # a look before Allocate saw it after this scan began
        if facts.unreachable is not None or address in facts.unreadable or is_newer:
            uses.setdefault(address, use)
    grants = {
        key: grant._replace(was_used=True) if _has_begun(grant, uses) else grant for key, grant in ledger.grants.items()
    }
    return changed(ledger, grants=grants, uses=uses)


def _is_unbound_under_a_vm(function: PciFunction, before: PciFunction | None, use: Use | None) -> bool:
    """Whether a VM may still have it: the kernel waits until the VM lets go. What a host driver left is no VM's."""
    if not function.is_left_enabled:
        return False
    return before is None or use is not None or before.is_held_by_vfio


def _used(function: PciFunction, before: PciFunction | None, use: Use | None, facts: HostFacts, now: float) -> Use:
    if use is not None and (before is None or _is_bound_again(before, function)):
        use = None
    return Use(
        group=function.iommu_group,
        first_seen_at=facts.began_at if use is None else use.first_seen_at,
        proven_at=now if use is None else use.proven_at,
        since=use.since if use is not None else (-math.inf if before is None else facts.began_at),
        seen_at=facts.began_at,
        given_back_at=-math.inf if use is None else use.given_back_at,
        elsewhere=use is not None and use.elsewhere,
    )


def _is_bound_again(before: PciFunction, function: PciFunction) -> bool:
    return None not in (before.vfio, function.vfio) and before.binding != function.binding


def _has_begun(grant: Grant, uses: Mapping[str, Use]) -> bool:
    return any(address in uses and uses[address].first_seen_at >= grant.at for address in grant.places.addresses)


def attribute(ledger: Ledger, among: Container[str] | None = None) -> Ledger:
    """Finds out which uses are none of the pods' that are known to hold the group; `among`: of these functions only.

    One that began before all of them were given; or one that no pod holds, and that was so both before PodResources was
    asked and after. Only so: a pod that has just ended is not named any more, and its VM is gone although that was not
    seen yet. So it is of a claim that was given back: only what PodResources was asked after that counts.
    """
    uses = {
        address: use._replace(elsewhere=_is_elsewhere(address, use, ledger))
        if among is None or address in among
        else use
        for address, use in ledger.uses.items()
    }
    return changed(ledger, uses=uses)


def _is_elsewhere(address: str, use: Use, ledger: Ledger) -> bool:
    holders = ledger.touching(_places_of_use(address, use))
    if holders:
        return all(use.proven_at < grant.at for grant in holders)  # -inf: PodResources names it, so it is a pod's
    return use.elsewhere or (ledger.is_told and max(use.since, use.given_back_at) <= ledger.told_at <= use.seen_at)


def has_undecided(ledger: Ledger, facts: HostFacts) -> bool:
    """Whether any use `is_undecided` that another scan would show: of a function that answers."""
    return any(
        a in facts.functions and is_undecided(a, use, ledger) and use.seen_at < max(ledger.told_at, use.given_back_at)
        for a, use in ledger.uses.items()
    )


def is_undecided(address: str, use: Use, ledger: Ledger) -> bool:
    """Whether nobody is known to hold what is in use, and that will be settled in a moment: it was in use when it was
    last looked at, and PodResources was asked after that; or it was a claim's, and PodResources was not asked since."""
    if use.elsewhere or ledger.touching(_places_of_use(address, use)):
        return False
    return ledger.is_told and (use.seen_at < ledger.told_at or ledger.told_at < use.given_back_at)


def _places_of_use(address: str, use: Use) -> list[Place]:
    return [address] if use.group is None else [address, use.group]
