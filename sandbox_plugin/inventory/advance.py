"""What the node offers now: the step from what was, what the host shows, and what was learnt from others.

`advance` is the whole of it. It is pure: time comes in as a number, and everything that has to be remembered
(what was listed, damping, promises to pods, AER recoveries, who leaves when) is a value in the inventory itself.

The rules it keeps:

- A loss counts at once. A device that healed is listed as Healthy again after it has been well for `SETTLE`; one that
  is new, or was bound anew, is not held back.
- A device that is gone stays listed, Unhealthy, until PodResources has shown for `RETIRE` that no pod holds it: the
  kubelet reports a missing allocated device as healthy, and may crash when one goes during Allocate.
- One ID is one node path for as long as a pod may hold the ID: the kubelet keeps Allocate's answers by ID.
- The kernel gives an IOMMU group's DMA to one owner (iommu_device_claim_dma_owner), so an Allocate of one device
  promises its whole group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from sandbox_plugin.inventory.devices import Found, find_devices, lost
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import may_be_ours
from sandbox_plugin.model import HEALTHY, Device, Health, HostFacts, Reason, id_order
from sandbox_plugin.settings import Settings

SETTLE = 2.0
"""Seconds for which a healed device must be well before it is Healthy again."""
ARRIVAL = 1.0
"""Seconds in which a device that has just come may still be ill without being held back: a bind is several steps, and a
look in between sees the driver without the node."""
RETIRE = 60.0
"""Seconds for which PodResources must show a lost device free before it is dropped."""
ADMISSION = 10.0
"""Seconds that the kubelet may take to show an allocation in PodResources after Allocate was answered."""
PROMISE_UNUSED = 600.0
"""Seconds after which an unused promise ends where there is no PodResources to ask."""
FATAL_QUIET = 60.0
"""Seconds after which a fatal error whose end nobody told of is taken as recovered, if the device answers."""

DeviceKey = tuple[str, str]
"""Resource name and device ID: what the kubelet knows a device by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """One answer of PodResources: which devices pods hold, by resource and ID, and who they are."""

    asked_at: float
    """Monotonic seconds before the question was sent: what happened later may be missing from the answer. -inf: so may
    anything."""
    pods: Mapping[DeviceKey, str] = field(default_factory=dict)
    """Device -> `namespace/name` of the pod that holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What sysfs cannot say. `allocated` and `aer` are news since the last step; the others are standing facts."""

    allocated: tuple[DeviceKey, ...] = ()
    """Devices that one Allocate has just been answered for."""
    aer: tuple[tuple[str, str], ...] = ()
    """(PCI address, ERROR_EVENT) of AER uevents, in order."""
    holdings: Holdings | None = None
    """The latest answer of PodResources, if it ever gave one."""
    in_cdi: Mapping[str, frozenset[str]] | None = None
    """Resource -> IDs that stand in a CDI spec on disk. None: this consumer needs no spec."""
    cdi_trouble: Mapping[str, str] = field(default_factory=dict)
    """Resource -> why its spec could not be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """What is remembered about one device."""

    device: Device
    arrived_at: float = -math.inf
    been_well: bool = False
    """It was well at least once since it came."""
    ill: bool = False
    """Not to be listed as Healthy before it has settled."""
    well_since: float | None = None
    gone_since: float | None = None
    """Since when it has not been there; None: it is there."""
    free_since: float | None = None
    """While it is gone: since when PodResources has shown that no pod holds it."""
    in_use_since: float | None = None
    """Since when `enable` has been 1 on one of its functions."""
    fatal_errors: Mapping[str, int] = field(default_factory=dict)
    """PCI address -> the count of fatal errors that is no news any more."""
    fatal: str | None = None
    """The fatal error that it has not recovered from, in words."""
    fatal_at: float | None = None
    """When it began; None: its recovery failed, and only binding it anew ends that."""

    @property
    def key(self) -> DeviceKey:
        return (self.device.resource, self.device.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A device that an Allocate was answered for, until it is known to be free again."""

    at: float
    seen_held: bool = False
    """PodResources has shown it held."""
    seen_used: bool = False
    """`enable` has been 1 since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the next step needs to know of this one."""

    tracks: Mapping[DeviceKey, Track] = field(default_factory=dict)
    promises: Mapping[DeviceKey, Promise] = field(default_factory=dict)
    cdevs: bool = False
    """This kernel has shown cdevs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What this node offers: one immutable snapshot."""

    version: int = 0
    """Rises by one with every change; 0 is the empty inventory before the first scan."""
    resources: Mapping[str, tuple[Device, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """Resource name -> its devices, those that left but may still be held included, in order of their IDs."""
    unoffered: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """PCI address -> why a function that a rule wants is not a device, or could not be read."""
    without_spec: frozenset[str] = frozenset()
    """Resources with a device that should stand in a CDI spec on disk, and does not yet."""
    waits_for_holdings: bool = False
    """Whether something here can only be settled by asking PodResources."""
    memory: Memory = Memory()

    def device(self, resource: str, device_id: str) -> Device | None:
        """The device that the kubelet means by this ID, or None."""
        return next((d for d in self.resources.get(resource, ()) if d.id == device_id), None)


def advance(
    previous: Inventory, facts: HostFacts, signals: Signals, now: float, settings: Settings, names: ModelNames
) -> tuple[Inventory, float | None]:
    """One step. `now` is in monotonic seconds.

    Returns the next inventory (the previous one's version where nothing that a reader sees has changed) and the
    time at which the same facts would lead further, or None.
    """
    found = find_devices(facts, settings, names, cdevs_known=previous.memory.cdevs)
    tracks = _follow(previous.memory.tracks, found, facts, signals, now)
    tracks |= _held_but_unknown(tracks, found, signals, settings, names, now)
    promises = _promises(previous.memory.promises, tracks, signals, now)
    healths = {key: _health(key, tracks, promises, signals) for key in tracks}
    tracks = {key: _damp(track, healths[key], now) for key, track in tracks.items()}
    listed = [replace(t.device, health=_listed_health(t, healths[key], signals)) for key, t in tracks.items()]
    inventory = Inventory(
        version=previous.version,
        resources=_by_resource(listed),
        unoffered=MappingProxyType(dict(found.unoffered)),
        without_spec=_without_spec(listed, signals),
        waits_for_holdings=_waits_for_holdings(tracks, promises, signals),
        memory=Memory(tracks=tracks, promises=promises, cdevs=found.cdevs),
    )
    if not previous.version or _shown(inventory) != _shown(previous):
        inventory = replace(inventory, version=previous.version + 1)
    return inventory, _wake_at(tracks, promises, signals)


def _shown(inventory: Inventory) -> tuple[object, ...]:
    """What readers see, and so what makes a new version."""
    return (inventory.resources, inventory.unoffered, inventory.without_spec, inventory.waits_for_holdings)


def _follow(
    tracks: Mapping[DeviceKey, Track], found: Found, facts: HostFacts, signals: Signals, now: float
) -> dict[DeviceKey, Track]:
    """Every device that is there, or was: what is there is taken as found, what is not stays with the reason why."""
    present = {(d.resource, d.id): d for d in found.devices}
    kept = {key: track for key, track in tracks.items() if not _is_retired(track, signals)}
    followed = {}
    for key in sorted(kept.keys() | present.keys(), key=lambda k: (k[0], id_order(k[1]))):
        device, track = present.get(key), kept.get(key)
        if track is None:
            assert device is not None
            followed[key] = _arrived(device, facts, signals, now)
        elif device is None:
            followed[key] = _lost(track, facts, signals, now)
        elif track.device.placements and track.device.node != device.node:
            followed[key] = _gone(track, _id_held(track.device, device), signals, now)
        elif track.gone_since is not None or _addresses(track.device) != _addresses(device):
            followed[key] = _arrived(device, facts, signals, now)
        else:
            followed[key] = _stayed(track, device, facts, signals, now)
    return followed


def _arrived(device: Device, facts: HostFacts, signals: Signals, now: float) -> Track:
    """New or bound anew: nothing of the past counts.

    What is in use when it is first seen was so before, for all we know: what PodResources has said holds for it.
    """
    asked_at = signals.holdings.asked_at if signals.holdings is not None else now
    return Track(
        device=device,
        arrived_at=now,
        in_use_since=(asked_at if math.isfinite(asked_at) else now) if _enabled_functions(device, facts) else None,
        fatal_errors=_fatal_counts(device, facts),
    )


def _stayed(track: Track, device: Device, facts: HostFacts, signals: Signals, now: float) -> Track:
    in_use_since = None
    if _enabled_functions(device, facts):
        in_use_since = now if track.in_use_since is None else track.in_use_since
    if device.health.healthy and track.device.health.reason is Reason.OFF_THE_BUS and not _link_was_read(device, facts):
        device = replace(device, health=track.device.health)  # it sleeps now: silence is no proof that it healed
    return _with_fatal_errors(replace(track, device=device, in_use_since=in_use_since), facts, signals, now)


def _link_was_read(device: Device, facts: HostFacts) -> bool:
    return all(facts.functions[a].link_speed is not None for a in _addresses(device))


def _lost(track: Track, facts: HostFacts, signals: Signals, now: float) -> Track:
    health = lost(track.device, facts) if track.device.placements else track.device.health
    if health.reason is Reason.UNREADABLE and track.gone_since is None:
        # Silence is no proof that it left: its node stays in the CDI spec, and its return is damped.
        return _with_fatal_errors(replace(track, device=replace(track.device, health=health)), facts, signals, now)
    return _gone(track, health, signals, now)


def _gone(track: Track, health: Health, signals: Signals, now: float) -> Track:
    gone_since = now if track.gone_since is None else track.gone_since
    free_since = track.free_since
    if signals.holdings is not None and signals.holdings.asked_at >= gone_since:
        if track.key in signals.holdings.pods:
            free_since = None
        elif free_since is None:
            free_since = signals.holdings.asked_at
    return Track(
        device=replace(track.device, node_exists=False, mates=(), health=health),
        gone_since=gone_since,
        free_since=free_since,
    )


def _is_retired(track: Track, signals: Signals) -> bool:
    if track.free_since is None or signals.holdings is None:
        return False
    return signals.holdings.asked_at - track.free_since >= RETIRE


def _id_held(old: Device, new: Device) -> Health:
    return Health(
        reason=Reason.ID_HELD,
        detail=f"a pod may still hold ID {old.id} as {old.node}; {new.node} waits until no pod does",
    )


def _held_but_unknown(
    tracks: Mapping[DeviceKey, Track],
    found: Found,
    signals: Signals,
    settings: Settings,
    names: ModelNames,
    now: float,
) -> dict[DeviceKey, Track]:
    """Devices that pods hold from an earlier life of the plugin, and that this node does not show any more."""
    unknown = {}
    for resource, device_id in signals.holdings.pods if signals.holdings else ():
        if (resource, device_id) in tracks or not device_id.isdecimal() or not may_be_ours(resource, settings, names):
            continue
        pod = signals.holdings.pods[resource, device_id] if signals.holdings else ""
        detail = f"pod {pod} holds it, but this node shows no such device"
        device = Device(
            id=device_id,
            resource=resource,
            node=f"/dev/vfio/devices/vfio{device_id}" if found.cdevs else f"/dev/vfio/{device_id}",
            model="unknown",
            placements=(),
            iommu_group=-1,
            node_exists=False,
            health=Health(reason=Reason.GONE, detail=detail),
        )
        unknown[resource, device_id] = Track(device=device, gone_since=now)
    return unknown


def _addresses(device: Device) -> tuple[str, ...]:
    return tuple(p.address for p in device.placements)


def _enabled_functions(device: Device, facts: HostFacts) -> tuple[str, ...]:
    """Functions of the device, or riding along in its group, that someone has enabled. Those of mates are theirs."""
    own = set(_addresses(device))
    if not device.mates:
        own |= set(facts.groups[device.iommu_group].members)
    functions = (facts.functions.get(address) for address in sorted(own))
    return tuple(f.address for f in functions if f is not None and f.enable == 1)


def _fatal_counts(device: Device, facts: HostFacts) -> dict[str, int]:
    functions = (facts.functions.get(address) for address in _addresses(device))
    return {f.address: f.fatal_errors for f in functions if f is not None and f.fatal_errors is not None}


def _with_fatal_errors(track: Track, facts: HostFacts, signals: Signals, now: float) -> Track:
    """Takes in AER uevents (pci_uevent_ers in drivers/pci/pci-driver.c) and the counters, whose rise alone is news.

    A success accounts for what was counted until then.
    """
    fatal, since = track.fatal, track.fatal_at
    counts = _fatal_counts(track.device, facts)
    if risen := sorted(a for a, count in counts.items() if count > track.fatal_errors.get(a, count)):
        fatal, since = f"{risen[0]} has counted a fatal AER error", now
    for address, event in signals.aer:
        above = event == "FAILED_RECOVERY" and any(address in p.bridges for p in track.device.placements)
        if address not in _addresses(track.device) and not above:
            continue
        if event == "BEGIN_RECOVERY":
            fatal, since = f"{address} is being recovered from an AER error", now
        elif event == "FAILED_RECOVERY":
            fatal, since = f"the recovery of {address} from an AER error failed", None
        elif event == "SUCCESSFUL_RECOVERY":
            fatal, since = None, None
    if since is not None and now - since >= FATAL_QUIET:
        fatal, since = None, None
    return replace(track, fatal=fatal, fatal_at=since, fatal_errors={**track.fatal_errors, **counts})


def _promises(
    old: Mapping[DeviceKey, Promise], tracks: Mapping[DeviceKey, Track], signals: Signals, now: float
) -> dict[DeviceKey, Promise]:
    """Old and new promises without those that are over."""
    promises = {}
    for key, promise in {**old, **dict.fromkeys(signals.allocated, Promise(at=now))}.items():
        track, holdings = tracks.get(key), signals.holdings
        used = track is not None and track.in_use_since is not None
        shown = holdings is not None and holdings.asked_at >= promise.at
        held = shown and holdings is not None and key in holdings.pods
        promise = replace(promise, seen_held=promise.seen_held or held, seen_used=promise.seen_used or used)
        if holdings is None or (not shown and now - promise.at >= PROMISE_UNUSED):  # none, or it fell silent
            over = not used and (promise.seen_used or now - promise.at >= PROMISE_UNUSED)
        else:
            over = shown and not held and (promise.seen_held or holdings.asked_at - promise.at >= ADMISSION)
        if not over:
            promises[key] = promise
    return promises


def _health(
    key: DeviceKey, tracks: Mapping[DeviceKey, Track], promises: Mapping[DeviceKey, Promise], signals: Signals
) -> Health:
    """The verdict before damping and CDI have their say."""
    track = tracks[key]
    if track.gone_since is not None or not track.device.health.healthy:
        return track.device.health
    if track.fatal is not None:
        return Health(reason=Reason.FATAL_ERROR, detail=track.fatal)
    if _holder(key, promises, signals) is not None:
        return HEALTHY
    return _taken(track, tracks, promises, signals)


def _taken(
    track: Track, tracks: Mapping[DeviceKey, Track], promises: Mapping[DeviceKey, Promise], signals: Signals
) -> Health:
    """Whether somebody else has this device's group, of which it is free itself.

    While PodResources has not said who uses a mate, a device that is in use itself may be so by the same pod.
    """
    group = track.device.iommu_group
    mates = [t for t in tracks.values() if t.gone_since is None and t.device.iommu_group == group and t is not track]
    gone = [
        t
        for t in tracks.values()
        if t.gone_since is not None and t.device.iommu_group == group and t.device.address != track.device.address
    ]
    for mate in [*mates, *gone]:
        if (holder := _holder(mate.key, promises, signals)) is not None:
            detail = f"its IOMMU group {group} belongs to {holder}, by {mate.device.id} ({mate.device.address})"
            return Health(reason=Reason.GROUP_TAKEN, detail=detail)
    if track.in_use_since is None:
        for mate in mates:
            if mate.in_use_since is not None and not _was_asked(signals, mate.in_use_since):
                detail = f"its IOMMU group {group} is in use, by {mate.device.id} ({mate.device.address})"
                return Health(reason=Reason.GROUP_TAKEN, detail=detail)
    for user in [track, *mates]:
        since = user.in_use_since
        if since is not None and _was_asked(signals, since):
            detail = f"{user.device.address} is in use (enable is 1) although no pod holds it"
            return Health(reason=Reason.IN_USE_ELSEWHERE, detail=detail)
    return HEALTHY


def _was_asked(signals: Signals, since: float) -> bool:
    """Whether PodResources was asked after that moment, so that what it does not name is held by no pod."""
    return signals.holdings is not None and signals.holdings.asked_at >= since


def _holder(key: DeviceKey, promises: Mapping[DeviceKey, Promise], signals: Signals) -> str | None:
    if signals.holdings is not None and key in signals.holdings.pods:
        return f"pod {signals.holdings.pods[key]}"
    return "a pod that was just admitted" if key in promises else None


def _damp(track: Track, health: Health, now: float) -> Track:
    if track.gone_since is not None:
        return track
    if not health.healthy:
        still_arriving = not track.been_well and now - track.arrived_at < ARRIVAL
        return replace(track, ill=track.ill or not still_arriving, well_since=None)
    if not track.ill:
        return replace(track, been_well=True)
    well_since = now if track.well_since is None else track.well_since
    return replace(track, been_well=True, well_since=well_since, ill=now - well_since < SETTLE)


def _listed_health(track: Track, health: Health, signals: Signals) -> Health:
    if not health.healthy:
        return health
    if track.ill:
        return Health(reason=Reason.SETTLING, detail=f"well again; Healthy when it has been so for {SETTLE:g} s")
    resource, device_id = track.key
    if signals.in_cdi is not None and device_id not in signals.in_cdi.get(resource, frozenset()):
        why = signals.cdi_trouble.get(resource, "its CDI spec is being written")
        return Health(reason=Reason.NOT_IN_CDI, detail=why)
    return HEALTHY


def _by_resource(devices: list[Device]) -> Mapping[str, tuple[Device, ...]]:
    resources: dict[str, list[Device]] = {}
    for device in sorted(devices, key=lambda d: (d.resource, id_order(d.id))):
        resources.setdefault(device.resource, []).append(device)
    return MappingProxyType({name: tuple(listed) for name, listed in resources.items()})


def _without_spec(devices: list[Device], signals: Signals) -> frozenset[str]:
    in_cdi = signals.in_cdi
    if in_cdi is None:
        return frozenset()
    missing = (d for d in devices if d.node_exists and d.id not in in_cdi.get(d.resource, frozenset()))
    return frozenset(d.resource for d in missing)


def _waits_for_holdings(
    tracks: Mapping[DeviceKey, Track], promises: Mapping[DeviceKey, Promise], signals: Signals
) -> bool:
    if promises or any(t.gone_since is not None or t.in_use_since is not None for t in tracks.values()):
        return True
    return signals.holdings is not None and not tracks.keys().isdisjoint(signals.holdings.pods)


def _wake_at(
    tracks: Mapping[DeviceKey, Track], promises: Mapping[DeviceKey, Promise], signals: Signals
) -> float | None:
    times = [t.well_since + SETTLE for t in tracks.values() if t.ill and t.well_since is not None]
    times += [t.fatal_at + FATAL_QUIET for t in tracks.values() if t.fatal_at is not None]
    if signals.holdings is None:
        times += [p.at + PROMISE_UNUSED for p in promises.values() if not p.seen_used]
    return min(times, default=None)
