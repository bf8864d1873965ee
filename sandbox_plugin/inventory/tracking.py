"""Following each device from one look to the next: it arrives, stays, goes missing, and is dropped in the end.

What is remembered about a function (that it fell silent, that it had a fatal error) holds for one binding: a function
that was bound again starts afresh. What is remembered about a device (damping, who uses it) holds while at least one
of its functions stays bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from sandbox_plugin.inventory.devices import Found, why_lost
from sandbox_plugin.inventory.health import may_be_dead
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import may_be_ours
from sandbox_plugin.inventory.state import Bound, DeviceKey, FatalError, Holdings, Signals, Track
from sandbox_plugin.model import Device, Health, HostFacts, PciFunction, Reason, id_order, node_of_cdev, node_of_group
from sandbox_plugin.settings import Settings

RETIRE = 60.0
"""Seconds for which PodResources must show a lost device free before it is dropped."""
FATAL_QUIET = 60.0
"""Seconds after which a fatal error whose end was not reported counts as recovered, if the device answers."""
DEAD = 3.0
"""Seconds between two scans in which a function did not answer, after which it is dead until it answers. Less may be a
reset, as at the end of a VM: then it falls asleep, and would count as dead for as long as nobody uses it."""


def follow(
    tracks: Mapping[DeviceKey, Track], found: Found, facts: HostFacts, signals: Signals, now: float
) -> dict[DeviceKey, Track]:
    """Every device that is there, or was and is not dropped yet, in order of resource and ID."""
    present = {(d.resource, d.id): d for d in found.devices}
    followed = {}
    for key in sorted(tracks.keys() | present.keys(), key=lambda k: (k[0], id_order(k[1]))):
        track = _next(tracks.get(key), present.get(key), facts, signals, now)
        if track is not None:
            followed[key] = track
    return followed


def held_but_unknown(
    tracks: Mapping[DeviceKey, Track],
    holdings: Holdings | None,
    settings: Settings,
    names: ModelNames,
    now: float,
    *,
    cdevs: bool,
) -> dict[DeviceKey, Track]:
    """Devices that pods hold from an earlier life of the plugin, and that this node does not show any more."""
    unknown = {}
    for (resource, device_id), pod in holdings.pods.items() if holdings is not None else ():
        if (resource, device_id) in tracks or not device_id.isdecimal() or not may_be_ours(resource, settings, names):
            continue
        detail = f"pod {pod} holds it, but this node shows no such device"
        device = Device(
            id=device_id,
            resource=resource,
            node=node_of_cdev(device_id) if cdevs else node_of_group(device_id),
            model="unknown",
            placements=(),
            iommu_group=-1,
            node_exists=False,
            health=Health(reason=Reason.GONE, detail=detail),
        )
        unknown[resource, device_id] = Track(device=device, gone_since=now)
    return unknown


def _next(track: Track | None, device: Device | None, facts: HostFacts, signals: Signals, now: float) -> Track | None:
    """The track of one ID after this look; None: it is dropped. `device` is what has the ID now."""
    if track is None:
        return _arrived(device, facts, now) if device is not None else None
    is_same_path = not track.device.placements or device is None or track.device.node == device.node
    if device is not None and is_same_path:
        is_same = track.gone_since is None and not _bound(track.device).isdisjoint(_bound(device))
        return _stayed(track, device, facts, signals, now) if is_same else _arrived(device, facts, now)
    if device is None:
        left = _missing(track, facts, signals, now)
    else:
        left = _gone(track, _id_held(track.device, device), facts, signals, now)
    if not _is_retired(left, signals.holdings):
        return left
    return _arrived(device, facts, now) if device is not None else None


def _arrived(device: Device, facts: HostFacts, now: float) -> Track:
    """New, or bound again: nothing of the past counts. What is in use already may have been so for any time."""
    in_use = _is_in_use(device, facts)
    return Track(
        device=device,
        arrived_at=now,
        in_use_since=-math.inf if in_use else None,
        in_use_seen_at=facts.began_at if in_use else None,
        unanswered=_unanswered({}, device, facts),
        fatal_counts=_fatal_counts(device, facts),
    )


def _stayed(track: Track, device: Device, facts: HostFacts, signals: Signals, now: float) -> Track:
    in_use = _is_in_use(device, facts)
    since = facts.began_at if track.in_use_since is None else track.in_use_since
    unanswered = _unanswered(track.unanswered, device, facts)
    track = replace(
        track,
        device=device,
        in_use_since=since if in_use else None,
        in_use_seen_at=facts.began_at if in_use else None,
        unanswered=unanswered,
        silent=_silent(track.silent, unanswered, device, facts),
    )
    return _with_fatal_errors(track, facts, signals, now)


def _missing(track: Track, facts: HostFacts, signals: Signals, now: float) -> Track:
    if not track.device.placements:
        return _gone(track, track.device.health, facts, signals, now)
    health = why_lost(track.device, facts)
    if health.reason is Reason.UNREADABLE and track.gone_since is None:
        # Silence does not prove that it left: it is still the same device when it answers again.
        device = replace(track.device, health=health, node_exists=_may_have_node(track.device, facts))
        return _with_fatal_errors(replace(track, device=device), facts, signals, now)
    return _gone(track, health, facts, signals, now)


def _gone(track: Track, health: Health, facts: HostFacts, signals: Signals, now: float) -> Track:
    gone_since = now if track.gone_since is None else track.gone_since
    still_used = track.in_use_since is not None and _is_used_unbound(track.device, facts)
    return Track(
        device=replace(track.device, node_exists=False, mates=(), health=health),
        gone_since=gone_since,
        free_since=_free_since(track, gone_since, signals.holdings),
        in_use_since=track.in_use_since if still_used else None,
        in_use_seen_at=facts.began_at if still_used else None,
    )


def _free_since(track: Track, gone_since: float, holdings: Holdings | None) -> float | None:
    if holdings is None or holdings.asked_at < gone_since:
        return track.free_since
    if track.key in holdings.pods:
        return None
    return holdings.asked_at if track.free_since is None else track.free_since


def _is_retired(track: Track, holdings: Holdings | None) -> bool:
    if track.free_since is None or holdings is None:
        return False
    return holdings.asked_at - track.free_since >= RETIRE


def _id_held(old: Device, new: Device) -> Health:
    detail = f"a pod may still use ID {old.id} for {old.node}; {new.node} is offered once no pod does"
    return Health(reason=Reason.ID_HELD, detail=detail)


def _may_have_node(device: Device, facts: HostFacts) -> bool:
    """Whether nothing says that its node is gone."""
    if facts.unreachable is not None:
        return device.node_exists
    if facts.dev_nodes is not None and device.node not in facts.dev_nodes:
        return False
    return device.node_exists and (device.is_cdev or device.iommu_group in facts.group_nodes)


# Who uses it


def _is_in_use(device: Device, facts: HostFacts) -> bool:
    """Whether someone has enabled a function of the device, or one that is bound to vfio and rides along in its group.

    Where the group has several devices, a function that rides along may be in use through any of them.
    """
    addresses = _addresses(device)
    if not device.mates:
        addresses |= set(facts.groups[device.iommu_group].members)
    return any(f.driver is not None and f.enable == 1 for f in _functions(addresses, facts))


def _is_used_unbound(device: Device, facts: HostFacts) -> bool:
    """Whether a VM may still have the device although it was unbound: the kernel waits until the VM lets go of it.

    A function that another driver holds is that driver's. One that cannot be read says nothing new.
    """
    addresses = _addresses(device)
    if facts.unreachable is not None or not addresses.isdisjoint(facts.unreadable):
        return True
    return any(f.driver is None and f.enable == 1 for f in _functions(addresses, facts))


# What is remembered about single functions


def _addresses(device: Device) -> set[str]:
    return {p.address for p in device.placements}


def _functions(addresses: Iterable[str], facts: HostFacts) -> list[PciFunction]:
    """Those that this look has read."""
    return [facts.functions[address] for address in addresses if address in facts.functions]


def _bound(device: Device) -> frozenset[Bound]:
    return frozenset((p.address, p.binding) for p in device.placements)


def _counts_on(marks: Iterable[Bound], device: Device, facts: HostFacts) -> set[Bound]:
    """Those that are still of this device: bound as they were, or not to be read at the moment."""
    own = _bound(device)
    return {mark for mark in marks if mark in own or mark[0] in facts.unreadable}


def _unanswered(before: Mapping[Bound, float], device: Device, facts: HostFacts) -> dict[Bound, float]:
    """Functions that do not answer or may be dead, and since when."""
    unanswered = {bound: before[bound] for bound in _counts_on(before, device, facts) if bound[0] in facts.unreadable}
    for bound in _bound(device):
        if may_be_dead(facts.functions[bound[0]]):
            unanswered[bound] = before.get(bound, facts.began_at)
    return unanswered


def _silent(
    before: frozenset[Bound], unanswered: Mapping[Bound, float], device: Device, facts: HostFacts
) -> frozenset[Bound]:
    """Functions that are dead. Of one that sleeps the link is not read: that does not prove that it healed."""
    silent = _counts_on(before, device, facts)
    silent.update(bound for bound, since in unanswered.items() if facts.began_at - since >= DEAD)
    for bound in _bound(device):
        if bound not in unanswered and facts.functions[bound[0]].link_speed is not None:
            silent.discard(bound)
    return frozenset(silent)


def why_silent(track: Track) -> Health | None:
    """What is remembered of a device that has nothing against it now, but may be dead. None: nothing.

    In D3cold it may be dead for `DEAD` seconds before it counts, unless it has not been well since it was seen to be
    ill, or at all: the next VM must not get it in between.
    """
    waits = track.ill or not track.been_well
    for address, binding in sorted(track.silent | (track.unanswered.keys() if waits else set())):
        why = "did not answer on the PCI bus and has been asleep since"
        if (address, binding) in track.unanswered:
            why = (
                "does not answer on the PCI bus: it is in D3cold although all bridges above it are awake and ACPI has "
                "no power resource for it"
            )
        return Health(reason=Reason.OFF_THE_BUS, detail=f"{address} {why}")
    return None


def _fatal_counts(device: Device, facts: HostFacts) -> dict[Bound, int]:
    counts = {}
    for address, binding in _bound(device):
        function = facts.functions.get(address)
        if function is not None and function.fatal_errors is not None:
            counts[address, binding] = function.fatal_errors
    return counts


def _with_fatal_errors(track: Track, facts: HostFacts, signals: Signals, now: float) -> Track:
    """Takes in AER uevents (pci_uevent_ers in drivers/pci/pci-driver.c), and the counters: only a rise is news.

    A success accounts for what was counted until then. After a recovery that failed only a success, or binding the
    function again, makes it well.
    """
    kept = _counts_on(track.fatal_errors, track.device, facts)
    errors = {bound: error for bound, error in track.fatal_errors.items() if bound in kept}
    counts = _fatal_counts(track.device, facts)
    for bound, count in sorted(counts.items()):
        if count > track.fatal_counts.get(bound, count):
            _begin(errors, bound, FatalError(words=f"{bound[0]} has counted a fatal PCIe error (AER)", since=now))
    for address, event in signals.aer:
        for bound in sorted(_concerned(track.device, address, event)):
            if event == "BEGIN_RECOVERY":
                words = f"the kernel is recovering {address} from a PCIe error (AER)"
                _begin(errors, bound, FatalError(words=words, since=now))
            elif event == "FAILED_RECOVERY":
                words = f"the kernel could not recover {address} from a PCIe error (AER)"
                errors[bound] = FatalError(words=words, since=None)
            elif event == "SUCCESSFUL_RECOVERY":
                errors.pop(bound, None)
    errors = {bound: e for bound, e in errors.items() if e.since is None or now < e.since + FATAL_QUIET}
    old_news = _counts_on(track.fatal_counts, track.device, facts)
    known = {bound: count for bound, count in track.fatal_counts.items() if bound in old_news}
    return replace(track, fatal_errors=errors, fatal_counts={**known, **counts})


def _begin(errors: dict[Bound, FatalError], bound: Bound, error: FatalError) -> None:
    before = errors.get(bound)
    if before is None or before.since is not None:
        errors[bound] = error


def _concerned(device: Device, address: str, event: str) -> set[Bound]:
    """Functions of the device that an AER event is about. A recovery that fails fails at the bridge above them too."""
    return {
        (p.address, p.binding)
        for p in device.placements
        if p.address == address or (event == "FAILED_RECOVERY" and address in p.bridges)
    }
