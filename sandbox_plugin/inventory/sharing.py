"""Who has which device, and what that means for the other devices of its IOMMU group.

The kernel gives the DMA of a group to one owner (iommu_device_claim_dma_owner in drivers/iommu/iommu.c), so devices of
one group work in one VM only: an Allocate of one promises its whole group, and a VM that uses one takes them all.

Three witnesses say who has a device: PodResources names the pods that hold it; a promise stands for a pod that was just
admitted and that PodResources need not name yet; `enable` says that a VM uses it, but not whose VM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sandbox_plugin.inventory.state import DeviceKey, Holdings, Promise, Signals, Track
from sandbox_plugin.model import HEALTHY, Health, Reason

ADMISSION = 10.0
"""Seconds that the kubelet may take to show an allocation in PodResources after Allocate was answered."""
PROMISE_UNUSED = 600.0
"""Seconds after which an unused promise ends where there is no PodResources to ask."""


def keep_promises(
    old: Mapping[DeviceKey, Promise], tracks: Mapping[DeviceKey, Track], signals: Signals, now: float
) -> dict[DeviceKey, Promise]:
    """Old and new promises without those that are over."""
    promises = {}
    for key, promise in {**old, **dict.fromkeys(signals.allocated, Promise(at=now))}.items():
        track = tracks.get(key)
        in_use_since = track.in_use_since if track is not None else None
        kept = _kept(promise, in_use_since, signals.holdings, now, is_named=_names(signals.holdings, key))
        if kept is not None:
            promises[key] = kept
    return promises


def _kept(
    promise: Promise, in_use_since: float | None, holdings: Holdings | None, now: float, *, is_named: bool
) -> Promise | None:
    """The promise as it is known now; None: it is over."""
    is_answered = holdings is not None and holdings.asked_at >= promise.at
    promise = Promise(
        at=promise.at,
        seen_held=promise.seen_held or (is_answered and is_named),
        # A use that began before is the previous VM's, which has not let go yet.
        seen_used=promise.seen_used or (in_use_since is not None and in_use_since >= promise.at),
    )
    if is_answered and holdings is not None:
        is_over = not is_named and (promise.seen_held or holdings.asked_at - promise.at >= ADMISSION)
    elif holdings is not None and now < promise.at + PROMISE_UNUSED:
        is_over = False  # the answer will come
    else:
        is_over = in_use_since is None and (promise.seen_used or now >= promise.at + PROMISE_UNUSED)
    return None if is_over else promise


def why_taken(
    key: DeviceKey, tracks: Mapping[DeviceKey, Track], promises: Mapping[DeviceKey, Promise], signals: Signals
) -> Health:
    """Whether a device is free for a pod, or held by one already: Healthy; else who has it or its group."""
    if _holder(key, promises, signals.holdings) is not None:
        return HEALTHY
    track = tracks[key]
    mates = _group_mates(track, tracks)
    group = track.device.iommu_group
    for mate in mates:
        if (holder := _holder(mate.key, promises, signals.holdings)) is not None:
            by = f"{holder} through device {mate.device.id} ({mate.device.address})"
            return Health(reason=Reason.GROUP_TAKEN, detail=f"IOMMU group {group} is held by {by}")
    for user in [track, *mates]:
        if _is_used_without_a_pod(user, signals.holdings):
            detail = f"{user.device.address} is in use (enable is 1) although no pod holds it"
            return Health(reason=Reason.IN_USE_ELSEWHERE, detail=detail)
    for mate in mates:
        # While it is not known who uses the mate, a device that is in use itself may be so by the same pod.
        if mate.in_use_since is not None and track.in_use_since is None:
            by = f"device {mate.device.id} ({mate.device.address})"
            return Health(reason=Reason.GROUP_TAKEN, detail=f"IOMMU group {group} is in use through {by}")
    return HEALTHY


def waits_for_holdings(
    tracks: Mapping[DeviceKey, Track], promises: Mapping[DeviceKey, Promise], holdings: Holdings | None
) -> bool:
    """Whether something can only be settled by asking PodResources."""
    if promises or any(t.gone_since is not None or t.in_use_since is not None for t in tracks.values()):
        return True
    return holdings is not None and not tracks.keys().isdisjoint(holdings.pods)


def waits_for_a_look(tracks: Mapping[DeviceKey, Track], holdings: Holdings | None, looked_at: float) -> bool:
    """Whether a device that no pod holds was in use, but was not looked at since PodResources was asked."""
    if holdings is None or not math.isfinite(holdings.asked_at) or looked_at >= holdings.asked_at:
        return False
    return any(t.in_use_since is not None and t.key not in holdings.pods for t in tracks.values())


def _group_mates(track: Track, tracks: Mapping[DeviceKey, Track]) -> list[Track]:
    """The other devices of its group, and those that left it but may still be held or used.

    A device that the function itself was under another ID is not a mate.
    """
    mates = (t for t in tracks.values() if t is not track and t.device.iommu_group == track.device.iommu_group)
    return [t for t in mates if t.gone_since is None or t.device.address != track.device.address]


def _is_used_without_a_pod(track: Track, holdings: Holdings | None) -> bool:
    """Whether it was in use both before PodResources was asked and after, and no pod holds it.

    Only so: a pod that has just ended is not named any more, and its VM is gone although that was not seen yet.
    """
    if holdings is None or not math.isfinite(holdings.asked_at) or track.key in holdings.pods:
        return False
    if track.in_use_since is None or track.in_use_seen_at is None:
        return False
    return track.in_use_since <= holdings.asked_at <= track.in_use_seen_at


def _holder(key: DeviceKey, promises: Mapping[DeviceKey, Promise], holdings: Holdings | None) -> str | None:
    if holdings is not None and key in holdings.pods:
        return f"pod {holdings.pods[key]}"
    return "a pod that was just admitted" if key in promises else None


def _names(holdings: Holdings | None, key: DeviceKey) -> bool:
    return holdings is not None and key in holdings.pods
