"""Claims that nobody will ever give back, and when that is sure enough to give them back unasked: pure.

A kubelet gives back only what is in its own records (unprepareResources in pkg/kubelet/cm/dra/manager.go skips claims
that are not in its cache). If those are lost, because `dra_manager_state` was removed or the node was installed anew
around our folder, a claim that was prepared stays so, and its devices are nobody's.

The kubelet cannot be asked what it remembers. So a claim counts as abandoned only while everybody agrees who could know
of a pod that has it, or will have it: the API server, PodResources, and the devices themselves. None of them alone says
enough:

- PodResources does not name a claim that no container of the pod refers to, or whose pod was force-deleted although
  its VM runs on, and none before Prepare is answered. A kubelet without records names none at all.
- The API server has no claim any more for a pod that was force-deleted and whose VM runs on, or for one that has ended
  and that the kubelet is about to give back.
- A device is not in use while a sandbox is made, nor between two VMs of one pod.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from sandbox_plugin.dra.claims import Prepared
from sandbox_plugin.dra.client import JsonObject
from sandbox_plugin.inventory.ledger import Holdings
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.names import address_of_claimed

PATIENCE = 1800.0
"""Seconds for which a claim must look abandoned, at every look.

A kubelet that has its records gives back what no pod needs every minute (defaultReconcilePeriod in
pkg/kubelet/cm/dra/manager.go). A VM with much memory may pin all of it before it opens the device that `enable` tells
of. Nobody loses by waiting longer than both: without this the devices would wait for a person."""
FIRST_PAUSE = 60.0
"""Seconds between looks at a claim that looks abandoned, and after the first."""
LONGEST_PAUSE = 600.0
"""Seconds between looks at a claim that does not: it may have a pod that PodResources never names."""
LONGEST_GAP = 300.0
"""Seconds between two looks after which nothing is known of the time between."""


class Pods(Enum):
    """What PodResources says of the pods of a claim."""

    NAMED = auto()
    NOT_NAMED = auto()
    SILENT = auto()
    """It has not answered since the look before, or its kubelet has just started."""
    ABSENT = auto()
    """There is none to ask."""


class InUse(Enum):
    """Whether a VM has a device of a claim, or one of its group."""

    NO = auto()
    YES = auto()
    """Or it cannot be read now."""
    UNSEEN = auto()
    """The kernel never tells of such a device: a mediated one has no `enable`, and of a vGPU its driver decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look saw of a claim."""

    at: float
    """When it began, in monotonic seconds."""
    lost: str | None
    """As `why_lost`, by the API server's object; None also if the API server did not answer."""
    pods: Pods
    in_use: InUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """What the looks at one claim have come to."""

    at: float
    """When the latest look began."""
    pause: float = FIRST_PAUSE
    """Seconds until the next one is due."""
    since: float | None = None
    """Since when every look has found it abandoned; None: the latest did not."""
    why: str | None = None
    """Why it looks so, or would if there were somebody to ask."""
    by_hand: str | None = None
    """Why nobody can be sure but a person."""

    @property
    def is_doubtful(self) -> bool:
        """Whether a person may decide."""
        return self.since is not None or self.by_hand is not None

    @property
    def is_sure(self) -> bool:
        """Whether it is to be given back."""
        return self.since is not None and self.at - self.since >= PATIENCE


def judge(before: Suspicion | None, look: Look, asked_at: float) -> Suspicion:
    """After another look. `asked_at`: when the kubelet last asked for the claim; earlier looks say nothing then."""
    by_hand = None
    if look.lost is not None and look.pods is Pods.ABSENT:
        by_hand = "PodResources is not there to tell whether a pod has it"
    elif look.lost is not None and look.pods is Pods.NOT_NAMED and look.in_use is InUse.UNSEEN:
        by_hand = "whether a VM has a vGPU cannot be seen"
    if look.lost is None or look.pods is not Pods.NOT_NAMED or look.in_use is not InUse.NO or asked_at >= look.at:
        pause = FIRST_PAUSE if before is None else min(2 * before.pause, LONGEST_PAUSE)
        return Suspicion(at=look.at, pause=pause, why=look.lost, by_hand=by_hand)
    since = look.at
    if before is not None and before.since is not None and before.since > asked_at:
        since = before.since if look.at - before.at <= LONGEST_GAP else look.at
    return Suspicion(at=look.at, since=since, why=look.lost)


def why_lost(prepared: Prepared, claim: JsonObject | None, *, driver: str) -> str | None:
    """Why the API server's object does not give these devices to this claim any more; None: it does, or it makes no
    sense. `claim`: the object of that name now; None: there is none."""
    if claim is None:
        return "the API server has no such claim"
    try:
        uid = claim["metadata"]["uid"]
        allocation = (claim.get("status") or {}).get("allocation")
        results = [] if allocation is None else (allocation.get("devices") or {}).get("results") or []
        allocated = {(each["pool"], each["device"]) for each in results if each["driver"] == driver}
    except (AttributeError, KeyError, TypeError):
        return None
    if uid != prepared.claim.uid:
        return "the claim was deleted, and another one has its name"
    if allocation is None:
        return "the claim is not allocated any more"
    return None if allocated == prepared.asked.names else "the claim was allocated other devices"


def what_pods_say(prepared: Prepared, answer: Holdings | None, *, is_there: bool, after: float) -> Pods:
    """By the latest answer of PodResources, if it was asked after that time. `is_there`: whether there is one to ask.

    A claim is named by its devices: another claim may have its name by now.
    """
    if not is_there:
        return Pods.ABSENT
    if answer is None:
        return Pods.SILENT
    if _addresses(prepared) & {address for _, address in answer.claims}:
        return Pods.NAMED
    return Pods.NOT_NAMED if answer.complete and answer.asked_at > after else Pods.SILENT


def in_use(prepared: Prepared, inventory: Inventory) -> InUse:
    """By the latest scan. What is gone no VM has: the kernel lets a function go when its VM has let it go
    (vfio_unregister_group_dev in drivers/vfio/vfio_main.c waits for that)."""
    facts, uses = inventory.memory.facts, inventory.memory.ledger.uses
    if facts is None or facts.unreachable is not None:
        return InUse.YES
    there = [facts.functions[address] for address in _addresses(prepared) if address in facts.functions]
    numbers = [function.iommu_group for function in there if function.iommu_group is not None]
    members = {address for number in numbers if number in facts.groups for address in facts.groups[number].members}
    if any(address in uses or address in facts.unreadable for address in _addresses(prepared) | members):
        return InUse.YES
    return InUse.NO if all(function.shows_use for function in there) else InUse.UNSEEN


def _addresses(prepared: Prepared) -> set[str]:
    """Of its devices, as PodResources names them and as they are known here."""
    named = {address_of_claimed(given.wanted.device) for given in prepared.devices}
    known = {address for given in prepared.devices for address in given.places.addresses}
    return known | {address for address in named if address is not None}
