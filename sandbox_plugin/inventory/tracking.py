"""Following each device from one look to the next: it arrives, stays, goes missing, and is dropped in the end.

What is remembered about a function (that it fell silent, that it had a fatal error) holds for one binding: a function
that was bound again starts afresh. What is remembered about a device (damping, who uses it) holds while at least one
of its functions stays bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from sandbox_plugin.inventory.devices import Found, why_lost
from sandbox_plugin.inventory.health import may_be_dead
from sandbox_plugin.inventory.ledger import DeviceKey, Holdings, Ledger
from sandbox_plugin.inventory.state import Bound, FatalError, Signals, Track
from sandbox_plugin.model import Device, Health, HostFacts, Reason, group_of_node, id_order

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
    keys: Iterable[DeviceKey] = tracks
    if tracks.keys() != present.keys():
        keys = sorted(tracks.keys() | present.keys(), key=lambda k: (k[0], id_order(k[1])))
    nodes = {d.node for d in found.devices}
    followed = {}
    for key in keys:
        track, device = tracks.get(key), present.get(key)
        if track is None or track.device is not device or not track.is_steady or signals.aer:
            track = _next(track, device, facts, signals, now)
            if track is not None and device is None and track.device.node in nodes:
                # Its number was given to another function, whatever can be read of its own.
                track = replace(track, device=replace(track.device, node_exists=False))
        if track is not None:
            followed[key] = track
    return followed


def held_but_unknown(
    ledger: Ledger,
    is_ours: Callable[[str], bool],
    tracks: Mapping[DeviceKey, Track],
    found: Found,
    facts: HostFacts,
    now: float,
) -> dict[DeviceKey, Track]:
    """Devices of ours that pods hold from an earlier run of the plugin, and that this node does not show."""
    unknown: dict[DeviceKey, Track] = {}
    grants = [g for key, g in ledger.grants.items() if key not in tracks and g.allocation == 0 and is_ours(key[0])]
    if not grants:
        return unknown
    nodes = {d.node for d in found.devices}
    for grant in grants:
        resource, device_id = grant.key
        detail = f"{ledger.holder_of(grant)} holds it, but this node shows no such device"
        health = Health(reason=Reason.GONE, detail=detail)
        for address in sorted(grant.places.addresses & facts.unreadable.keys()):
            health = Health(reason=Reason.UNREADABLE, detail=f"{address}: {facts.unreadable[address]}")
        device = Device(
            id=device_id,
            resource=resource,
            node=grant.places.node,
            model="unknown",
            placements=(),
            iommu_group=-1 if grant.places.group is None else grant.places.group,
            node_exists=grant.places.node not in nodes and _is_node_there(grant.places.node, facts),
            health=health,
        )
        unknown[grant.key] = Track(device=device, gone_since=now)
    return unknown


def _is_node_there(node: str, facts: HostFacts) -> bool:
    """Whether the host shows a node, of whatever device."""
    if facts.dev_nodes is not None and node not in facts.dev_nodes:
        return False
    group = group_of_node(node)
    return node.rpartition("/")[2] in facts.vfio_devs if group is None else group in facts.group_nodes


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
    """New, or bound again: nothing of the past counts."""
    return Track(
        device=device,
        arrived_at=now,
        unanswered=_unanswered({}, device, facts),
        fatal_counts=_fatal_counts(device, facts),
    )


def _stayed(track: Track, device: Device, facts: HostFacts, signals: Signals, now: float) -> Track:
    unanswered = _unanswered(track.unanswered, device, facts)
    track = replace(
        track,
        device=device,
        unanswered=unanswered,
        silent=_silent(track.silent, unanswered, device, facts),
    )
    return _with_fatal_errors(track, facts, signals, now)


def _missing(track: Track, facts: HostFacts, signals: Signals, now: float) -> Track:
    if not track.device.placements:
        there = _is_node_there(track.device.node, facts)
        gone = _gone(track, track.device.health, facts, signals, now)
        return replace(gone, device=replace(gone.device, node_exists=there))
    health = why_lost(track.device, facts)
    if health.reason is Reason.UNREADABLE and track.gone_since is None:
        # Silence does not prove that it left: it is still the same device when it answers again.
        device = replace(track.device, health=health, node_exists=_may_have_node(track.device, facts))
        return _with_fatal_errors(replace(track, device=device), facts, signals, now)
    return _gone(track, health, facts, signals, now)


def _gone(track: Track, health: Health, facts: HostFacts, signals: Signals, now: float) -> Track:
    gone_since = now if track.gone_since is None else track.gone_since
    return Track(
        device=replace(track.device, node_exists=False, mates=(), health=health),
        gone_since=gone_since,
        free_since=_free_since(track, gone_since, signals.holdings),
    )


def _free_since(track: Track, gone_since: float, holdings: Holdings | None) -> float | None:
    if holdings is None or holdings.asked_at < gone_since:
        return track.free_since
    if track.key in holdings.pods:
        return None
    if not holdings.complete:
        return track.free_since
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


# What is remembered about single functions


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
