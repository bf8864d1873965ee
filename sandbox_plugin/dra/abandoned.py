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


class Pods(Enum):
    """What PodResources says of the pods of a claim."""

    NAMED = auto()
    NOT_NAMED = auto()
    SILENT = auto()
    """It has not answered since the look before, or its kubelet has just started."""
    ABSENT = auto()
    """There is none to ask."""


class Use(Enum):
    """Whether a VM has a device of a claim, or one of its group."""

    NONE = auto()
    SOME = auto()
    """Or it cannot be looked at now."""
    UNSEEN = auto()
    """The kernel never tells of such a device: a mediated one has no `enable`, and of a vGPU its driver decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one look saw of a claim."""

    at: float
    """When it began, in monotonic seconds."""
    lost: str | None
    """As `why_lost`, by the API server's object; None also if the API server did not answer."""
    pods: Pods
    use: Use


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
    def is_sure(self) -> bool:
        """Whether it is to be given back."""
        return self.since is not None and self.at - self.since >= PATIENCE


def judge(before: Suspicion | None, seen: Seen, prepared_at: float) -> Suspicion:
    """After another look. `prepared_at`: when the kubelet last asked for the claim; earlier looks say nothing then."""
    by_hand = None
    if seen.lost is not None and seen.pods is Pods.ABSENT:
        by_hand = "PodResources is not there to tell whether a pod has it"
    elif seen.lost is not None and seen.pods is Pods.NOT_NAMED and seen.use is Use.UNSEEN:
        by_hand = "whether a VM has a vGPU cannot be seen"
    if seen.lost is None or seen.pods is not Pods.NOT_NAMED or seen.use is not Use.NONE or prepared_at >= seen.at:
        pause = FIRST_PAUSE if before is None else min(2 * before.pause, LONGEST_PAUSE)
        return Suspicion(at=seen.at, pause=pause, why=seen.lost, by_hand=by_hand)
    since = seen.at
    if before is not None and before.since is not None and before.since > prepared_at:
        since = before.since
    return Suspicion(at=seen.at, since=since, why=seen.lost)


def why_lost(prepared: Prepared, claim: JsonObject | None, *, driver: str, pool: str) -> str | None:
    """Why the API server's object does not give these devices to this claim any more; None: it does, or it makes no
    sense. `claim`: the object of that name now; None: there is none."""
    if claim is None:
        return "the API server has no such claim"
    try:
        uid = claim["metadata"]["uid"]
        allocation = (claim.get("status") or {}).get("allocation")
        results = [] if allocation is None else (allocation.get("devices") or {}).get("results") or []
        allocated = {each["device"] for each in results if each["driver"] == driver and each["pool"] == pool}
    except (AttributeError, KeyError, TypeError):
        return None
    if uid != prepared.claim.uid:
        return "the claim was deleted, and another one has its name"
    if allocation is None:
        return "the claim is not allocated any more"
    if not allocated.intersection(given.wanted.device for given in prepared.devices):
        return "the claim was allocated other devices"
    return None


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


def _addresses(prepared: Prepared) -> set[str]:
    """Of its devices, as PodResources names them and as they are known here."""
    named = {address_of_claimed(given.wanted.device) for given in prepared.devices}
    known = {address for given in prepared.devices for address in given.places.addresses}
    return known | {address for address in named if address is not None}
