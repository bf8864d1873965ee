"""Who holds what: everything that was given, told and seen, as one value.

The kubelet keeps one *ID* from two pods. That one *node*, one *IOMMU group* and one *address* go to one pod is ours to
keep: a number can go to another function, a resource can get another name, and the kernel gives the DMA of a group to
one owner (iommu_device_claim_dma_owner in drivers/iommu/iommu.c). Four witnesses are heard:

    Allocate        gives devices to one pod, without naming it: all devices of one Allocate are of one pod
    Prepare         gives devices to one ResourceClaim, until Unprepare takes them back
    PodResources    names the pods that hold IDs, and claims that pods hold, as of the moment when it was asked
    `enable`        says that a VM has a function, but not whose VM

A `Grant` is one ID in the hands of one pod, with the places that go with it: it comes from an Allocate, or from an
answer of PodResources about an Allocate of another run of this plugin. The kubelet gives an ID again only when its
pod has ended, so a new grant of an ID ends the old one, and says nothing about the other devices of the old pod.

A claim that is prepared has a `Grant` for each of its devices too. Those end when the claim is given back: by its
Unprepare, or unasked when the kubelet has forgotten it (dra/releaser.py). A checkpoint tells them to the next run.
PodResources adds claims of which no checkpoint tells, until it names them no more; where it goes away itself, until no
scan has shown them in use for long. What cannot show that stays until it is back.

Here are the data, and the first three witnesses; what the kernel shows in use is in `uses`, and what all of it means
for the devices in `sharing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from sandbox_plugin.model import Device, HostFacts

ADMISSION = 10.0
"""Seconds that the kubelet may take to show an allocation in PodResources after Allocate was answered.

It notes the answer within milliseconds; this is for a pod that is admitted and dropped. So a takeover, which comes
later than that after the other plugin's last answer, need not wait for so long."""
GRANT_UNUSED = 600.0
"""Seconds after which a grant that nobody uses ends where there is no PodResources to ask."""

DeviceKey = tuple[str, str]
"""Resource name and device ID: what the kubelet knows a device by. Of a claim's grant: `_CLAIM` and the claim's UID (or
its name, if only PodResources tells of it), and a node, with an address if the claim is prepared."""
_CLAIM = "claim:"
"""No resource name has a colon."""
ClaimedDevice = tuple[str, str]
"""`namespace/name` of a claim, and the address of a device."""
ClaimPod = tuple[str, str]
"""Names of a pod, which is in the namespace of its claims, and of a container of it."""
Place = str | int
"""What one pod has at most: the path of a VFIO node, the number of an IOMMU group, or the address of a function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """One answer of PodResources: which devices pods hold, by resource and ID, and who they are."""

    asked_at: float
    """Monotonic seconds before the question was sent: what happened later may be missing from the answer."""
    pods: Mapping[DeviceKey, str] = field(default_factory=dict)
    """Device -> `namespace/name` of the pod that holds it."""
    containers: Mapping[DeviceKey, str] = field(default_factory=dict, compare=False)
    """Device -> name of the container that has it, for people."""
    claims: frozenset[ClaimedDevice] = frozenset()
    """What pods hold by claims on this driver."""
    claim_pods: Mapping[str, ClaimPod] = field(default_factory=dict, compare=False)
    """`namespace/name` of each of these claims -> the pod that has it, for people."""
    complete: bool = True
    """False: pods may be missing, as from the answer of a kubelet that has just started. It frees nothing then."""


class Places(NamedTuple):
    """What goes with an ID, as far as it is known."""

    node: str
    group: int | None = None
    """None: not known, since the node is not there to tell."""
    addresses: frozenset[str] = frozenset()
    """Of the functions that make it a device."""

    @property
    def are_known(self) -> bool:
        """Whether they tell which group it is, or was, in."""
        return self.group is not None or bool(self.addresses)

    @property
    def all(self) -> list[Place]:
        return [self.node, *self.addresses] + ([] if self.group is None else [self.group])


class Grant(NamedTuple):
    """One ID that a pod has."""

    key: DeviceKey
    places: Places
    """As they were when it was given."""
    at: float = -math.inf
    """When its Allocate was answered, in monotonic seconds; -inf: not by this run of the plugin."""
    allocation: int = 0
    """Number of its Allocate; 0: not of this run."""
    was_used: bool = False
    """A use has begun since it was given."""
    heir: int = 0
    """Number of the later Allocate that was given a device which the pod of this grant had: that pod has ended, or the
    Allocate is its own (an init container's device goes to a container)."""
    claim: str | None = None
    """`namespace/name` of the claim that has it; None: a pod has it by the device plugin API."""

    def is_of_claim(self, uid: str) -> bool:
        """Whether the claim with this UID has it."""
        return self.key[0] == _CLAIM + uid


class PreparedClaim(NamedTuple):
    """The devices of one ResourceClaim that is prepared, or about to be."""

    name: str
    """`namespace/name`."""
    devices: tuple[Places, ...]
    """Each with its addresses, the first of which names it, and with the node that the claim's CDI spec says."""
    at: float = -math.inf
    """When it was prepared, in monotonic seconds; -inf: not by this run of the plugin."""
    looked_at: float = -math.inf
    """When the look at its devices began that found nothing against them; -inf as above."""


class Use(NamedTuple):
    """A function that is enabled and that no host driver has: a VM has it, also while it is being unbound."""

    group: int | None
    first_seen_at: float
    """When the first scan began that saw it so, as did all since. The use may have begun until that scan ended."""
    proven_at: float
    """When that scan had ended: it has been in use for at least that long."""
    since: float
    """As `first_seen_at`; -inf where no earlier scan showed the function: it may have been in use for any time."""
    seen_at: float
    """When the latest scan that saw it so began."""
    given_back_at: float = -math.inf
    """When the claim that had its group was given back."""
    elsewhere: bool = False
    """It is proven that none of the pods that are known to hold its group uses it."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """All that is known about who holds what."""

    grants: Mapping[DeviceKey, Grant] = field(default_factory=dict)
    named_by: Mapping[DeviceKey, Holdings] = field(default_factory=dict)
    """The latest answer that named each ID."""
    refused: Mapping[DeviceKey, float] = field(default_factory=dict)
    """When the kubelet asked for a device that was in use: whoever an earlier answer names for it has ended by then."""
    uses: Mapping[str, Use] = field(default_factory=dict)
    """By address."""
    allocations: int = 0
    """How many Allocates there were."""
    told_at: float = -math.inf
    """`asked_at` of the latest complete answer; -inf: there was none since this plugin got the lock."""
    heard: Holdings | None = None
    """The latest answer that was taken in."""
    serving_since: float = -math.inf
    """As `Signals.serving_since`."""
    claimed: Mapping[DeviceKey, Grant] = field(default_factory=dict)
    """The grants of claims."""
    named_claims: Mapping[ClaimedDevice, float] = field(default_factory=dict)
    """What PodResources says that claims hold of which nothing else tells -> when it last said so, or a VM last may
    have had it, in monotonic seconds."""

    @cached_property
    def _by_place(self) -> Mapping[Place, Sequence[DeviceKey]]:
        by_place: dict[Place, list[DeviceKey]] = {}
        for key, grant in [*self.grants.items(), *self.claimed.items()]:
            for place in grant.places.all:
                by_place.setdefault(place, []).append(key)
        return by_place

    def touching(self, places: Iterable[Place]) -> list[Grant]:
        """The grants that have one of these places, each once."""
        keys = dict.fromkeys(key for place in places for key in self._by_place.get(place, ()))
        return [self.grants[key] if key in self.grants else self.claimed[key] for key in keys]

    @property
    def holders(self) -> dict[str, str | None]:
        """Node -> `namespace/name` of the pod that holds it, or `claim namespace/name`; None: a pod that PodResources
        has not named yet."""
        by_claims = {grant.places.node: f"claim {grant.claim}" for grant in self.claimed.values()}
        return {grant.places.node: self.pod_of(grant) for grant in self.grants.values()} | by_claims

    def pod_of(self, grant: Grant) -> str | None:
        """`namespace/name` of the pod that has it; None: PodResources has not named it yet."""
        answer = self.named_by.get(grant.key)
        return None if answer is None or answer.asked_at < grant.at else answer.pods[grant.key]

    def pod_of_claim(self, claim: str, at: float) -> ClaimPod | None:
        """The pod that has a claim, which was prepared then; None: PodResources has not named one since."""
        if self.heard is None or self.heard.asked_at < at:
            return None
        return self.heard.claim_pods.get(claim)

    def holder_of(self, grant: Grant) -> str:
        """For people."""
        if grant.claim is not None:
            return f"claim {grant.claim}"
        pod = self.pod_of(grant)
        return "a pod that was just admitted" if pod is None else f"pod {pod}"

    def are_one_pods(self, one: Grant, other: Grant) -> bool:
        """Whether both are known to be of one pod: by their Allocate, by one answer of PodResources, or by their claim.

        By one answer: a pod that was deleted and made again has the name of the old one.
        """
        if one.claim is not None:
            return one.key[0] == other.key[0]
        if one.allocation and one.allocation == other.allocation:
            return True
        pod = self.pod_of(one)
        return pod is not None and pod == self.pod_of(other) and self.named_by[one.key] is self.named_by[other.key]

    @property
    def is_told(self) -> bool:
        """Whether PodResources has given a complete answer since this plugin serves."""
        return math.isfinite(self.told_at)

    @property
    def is_heard(self) -> bool:
        """Whether PodResources has answered since this plugin serves, be it incompletely."""
        return self.heard is not None and self.heard.asked_at >= self.serving_since

    def ends_at(self, grant: Grant) -> float:
        """When the grant ends, where there is no PodResources and nobody uses it."""
        named_by = self.named_by.get(grant.key)
        return GRANT_UNUSED + max(grant.at, named_by.asked_at if named_by is not None else -math.inf)

    @property
    def named_claims_end_at(self) -> float:
        """When the first of what only PodResources told of claims ends, where that is not there and nobody uses it."""
        return GRANT_UNUSED + min(self.named_claims.values(), default=math.inf)

    @property
    def unplaced(self) -> list[Grant]:
        """Grants of which it is not known what group they are in; all of them are of other runs."""
        return [grant for grant in self.grants.values() if not grant.places.are_known]


# Allocate


class Allocation(NamedTuple):
    """One Allocate that is being answered."""

    devices: Sequence[Device]
    looked_at: float
    """When the look at them began that found nothing against them, in monotonic seconds."""


def changed(ledger: Ledger, **fields: Any) -> Ledger:
    """The ledger with these fields; the same one where they say what it says already: then nothing follows from it."""
    is_same = all(getattr(ledger, name) == value for name, value in fields.items())
    return ledger if is_same else replace(ledger, **fields)


def give(ledger: Ledger, allocation: Allocation, now: float) -> Ledger:
    """The devices are a pod's. What earlier scans saw in use in their groups has ended: the look before did not."""
    number = ledger.allocations + 1
    idle = {address for device in allocation.devices for address in device.group_functions}
    uses = {a: use for a, use in ledger.uses.items() if a not in idle or use.seen_at > allocation.looked_at}
    grants = dict(ledger.grants)
    for device in allocation.devices:
        if (old := grants.pop(device.key, None)) is not None:
            for other in ledger.touching(old.places.all):
                is_old_pods = ledger.are_one_pods(other, old) or is_heir(old, other)
                if is_old_pods and grants.get(other.key) is other:
                    grants[other.key] = other._replace(heir=number)
        grants[device.key] = Grant(key=device.key, places=places_of(device), at=now, allocation=number)
    given = replace(ledger, grants=grants, uses=uses, allocations=number)
    # Brought along, and not made anew from all grants of the node: all pod admission waits for an Allocate.
    vars(given)["_by_place"] = _placed_anew(ledger, grants, [device.key for device in allocation.devices])
    return given


def _placed_anew(
    ledger: Ledger, grants: Mapping[DeviceKey, Grant], keys: Iterable[DeviceKey]
) -> dict[Place, Sequence[DeviceKey]]:
    """`Ledger._by_place` after the grants of these keys have become others."""
    by_place = dict(ledger._by_place)
    for key in keys:
        if key in ledger.grants:
            for place in ledger.grants[key].places.all:
                by_place[place] = [other for other in by_place[place] if other != key]
        for place in grants[key].places.all:
            by_place[place] = [*by_place.get(place, ()), key]
    return by_place


def is_heir(grant: Grant, other: Grant) -> bool:
    """Whether the pod of `grant` got a device that the pod of `other` had."""
    return 0 != grant.allocation == other.heir


def places_of(device: Device) -> Places:
    """What goes with a device that is there."""
    addresses = frozenset(p.address for p in device.placements)
    return Places(node=device.node, group=device.iommu_group, addresses=addresses)


def serve_since(ledger: Ledger, since: float) -> Ledger:
    """This plugin serves since then. Another one may have served until then.

    So an answer that was asked for earlier is not complete, and the Allocates of the time before are like those of
    another run: what was given together then may be in several hands by now.
    """
    if since == ledger.serving_since:
        return ledger
    told_at = ledger.told_at if ledger.told_at >= since else -math.inf
    grants = {key: grant._replace(allocation=0, heir=0) for key, grant in ledger.grants.items()}
    return replace(ledger, grants=grants, told_at=told_at, serving_since=since)


def found_busy(
    ledger: Ledger, busy: Mapping[DeviceKey, frozenset[str]], group_of: Callable[[DeviceKey], int], now: float
) -> Ledger:
    """The kubelet asked for these devices, so no pod has them any more; but a look just now saw functions in use.

    A VM of the pod that asks cannot be it: its sandbox is made after all its Allocates.
    """
    if not busy:
        return ledger
    grants, uses = {key: grant for key, grant in ledger.grants.items() if key not in busy}, dict(ledger.uses)
    for key, addresses in busy.items():
        for address in addresses:
            seen = uses.get(address)
            uses[address] = Use(
                group=group_of(key),
                first_seen_at=now if seen is None else seen.first_seen_at,
                proven_at=now if seen is None else seen.proven_at,
                since=now if seen is None else seen.since,
                seen_at=now,
                elsewhere=True,
            )
    refused = {**ledger.refused, **dict.fromkeys(busy, now)}
    return replace(ledger, grants=grants, uses=uses, refused=refused)


# Prepare


def claim(
    ledger: Ledger, prepared: Mapping[str, PreparedClaim], places_by_address: Callable[[str], Places], now: float
) -> Ledger:
    """What claims hold: those that are prepared, by UID, and those that PodResources names beside them.

    `places_by_address` tells what goes with the device of an address now. What earlier scans saw in use in the groups
    of devices that have just been prepared has ended: the look before did not see it.
    """
    claimed, idle = {}, {}
    for uid, each in prepared.items():
        for places in each.devices:
            group = places_by_address(min(places.addresses)).group
            held = places if group is None else places._replace(group=group)
            # One device may have the number now that another of the claim had: then both have that node.
            key = (_CLAIM + uid, f"{held.node} {min(held.addresses)}")
            claimed[key] = Grant(key=key, places=held, at=each.at, claim=each.name)
            if key not in ledger.claimed:
                idle[held.group] = each.looked_at
    known = {(each.claim, min(each.places.addresses)) for each in claimed.values()}
    # Not any more once it is prepared: an answer from before its Unprepare would hold it after that.
    named_claims = {named: at for named, at in ledger.named_claims.items() if named not in known}
    for name, address in sorted(named_claims):
        places = places_by_address(address)
        key = (_CLAIM + name, places.node)
        claimed[key] = Grant(key=key, places=places, claim=name)
    given_back = {grant.places.group for key, grant in ledger.claimed.items() if key not in claimed}
    uses = {
        address: use._replace(given_back_at=now) if use.group in given_back else use
        for address, use in ledger.uses.items()
        if use.seen_at > idle.get(use.group, -math.inf)
    }
    return changed(ledger, claimed=claimed, named_claims=named_claims, uses=uses)


def expire_named_claims(ledger: Ledger, facts: HostFacts, now: float, *, has_pod_resources: bool) -> Ledger:
    """Ends what only PodResources told of claims, where that is not there any more: what every scan of `GRANT_UNUSED`
    has shown unused."""
    if not ledger.named_claims:
        return ledger
    groups_in_use = {use.group for use in ledger.uses.values()} - {None}

    def may_be_in_use(address: str) -> bool:
        if address in ledger.uses or address in facts.unreadable or facts.unreachable is not None:
            return True
        function = facts.functions.get(address)
        return function is not None and (not function.shows_use or function.iommu_group in groups_in_use)

    named = {each: now if may_be_in_use(each[1]) else at for each, at in ledger.named_claims.items()}
    if not has_pod_resources:
        named = {each: at for each, at in named.items() if now < at + GRANT_UNUSED}
    return changed(ledger, named_claims=named)


# PodResources


def take_in(ledger: Ledger, answer: Holdings | None, places_by_id: Callable[[DeviceKey], Places | None]) -> Ledger:
    """An answer of PodResources, once. `places_by_id` tells what an ID means of which no grant is known; None: not
    ours.

    An answer that was asked for before an Allocate says nothing about it.
    """
    if answer is None or answer is ledger.heard:
        return ledger
    refused = {key: at for key, at in ledger.refused.items() if answer.asked_at < at}
    pods = {key: pod for key, pod in answer.pods.items() if key not in refused} if refused else answer.pods
    found: dict[DeviceKey, Grant] = {}
    for key, pod in pods.items():
        grant = ledger.grants.get(key)
        if grant is None or (grant.at <= answer.asked_at and ledger.pod_of(grant) not in (None, pod)):
            places = places_by_id(key)
            if places is not None:
                found[key] = Grant(key=key, places=places)
    over: set[DeviceKey] = set()
    told_at, named = ledger.told_at, {*ledger.named_claims, *answer.claims}
    if answer.complete and answer.asked_at >= ledger.serving_since:
        told_at, named = max(told_at, answer.asked_at), {*answer.claims}
        over = {k for k, g in ledger.grants.items() if k not in answer.pods and _is_over(g, ledger, answer.asked_at)}
    grants = {key: grant for key, grant in {**ledger.grants, **found}.items() if key not in over}
    named_by = {key: a for key, a in {**ledger.named_by, **dict.fromkeys(pods, answer)}.items() if key in grants}
    return replace(
        ledger,
        grants=grants,
        told_at=told_at,
        heard=answer,
        named_by=named_by,
        refused=refused,
        named_claims=dict.fromkeys(named, answer.asked_at),
    )


def place_again(ledger: Ledger, places_by_id: Callable[[DeviceKey], Places | None]) -> Ledger:
    """The grants of other runs, now that it is known what kind of nodes this kernel has."""
    grants = {
        key: grant if grant.allocation else grant._replace(places=places_by_id(key) or grant.places)
        for key, grant in ledger.grants.items()
    }
    return replace(ledger, grants=grants)


def _is_over(grant: Grant, ledger: Ledger, asked_at: float) -> bool:
    """Whether a complete answer that does not name it ends it: the kubelet may show a new pod late.

    An answer that was asked for before the grant never does: no pod counts as named for it by then.
    """
    return ledger.pod_of(grant) is not None or asked_at - grant.at >= ADMISSION


def expire(ledger: Ledger, facts: HostFacts, now: float, *, has_pod_resources: bool) -> Ledger:
    """Ends grants of which PodResources tells nothing, where nobody uses them: when they were used since they were
    given, or after `GRANT_UNUSED`. One that it has named ends so only where it is not there any more. What cannot show
    whether it is used stays, if PodResources was there and so may tell again."""
    grants = {
        key: grant
        for key, grant in ledger.grants.items()
        if (has_pod_resources and ledger.pod_of(grant) is not None) or not _is_expired(grant, ledger, facts, now)
    }
    return changed(ledger, grants=grants)


def _is_expired(grant: Grant, ledger: Ledger, facts: HostFacts, now: float) -> bool:
    is_late = now >= ledger.ends_at(grant)
    if ledger.heard is not None and not (is_late and _shows_use(grant, facts)):
        return False  # the answer will come
    return (grant.was_used or is_late) and not any(a in ledger.uses for a in grant.places.addresses)


def _shows_use(grant: Grant, facts: HostFacts) -> bool:
    return all(facts.functions[a].shows_use for a in grant.places.addresses if a in facts.functions)
