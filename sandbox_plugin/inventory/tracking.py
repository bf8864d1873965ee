"""Following each device from one step to the next: it arrives, stays, goes missing, and is dropped in the end.

What is remembered about a device (damping, what its functions did) holds while one of its functions stays bound.

A device that is gone stays listed, Unhealthy, until PodResources has shown for `RETIRE` that no pod holds it: the
kubelet reports a missing allocated device as healthy, and may crash when one goes during Allocate. One ID is one node
path for as long as a pod may hold the ID: the kubelet keeps Allocate's answers by ID.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from sandbox_plugin.inventory.devices import Found
from sandbox_plugin.inventory.faults import assess, why_lost
from sandbox_plugin.inventory.ledger import DeviceKey, Holdings, Ledger
from sandbox_plugin.inventory.nodes import is_in_dev, node_exists
from sandbox_plugin.inventory.state import Signals, Track
from sandbox_plugin.inventory.symptoms import bound_functions, examine, listen
from sandbox_plugin.model import Device, Fault, HostFacts, Reason, key_order

RETIRE = 60.0
"""Seconds for which PodResources must show a lost device free before it is dropped."""


class Moment(NamedTuple):
    """All that one step goes by."""

    found: Found
    facts: HostFacts
    signals: Signals
    now: float
    require_iommufd: bool

    def is_taken(self, node: str) -> bool:
        """Whether a device that is there has this node."""
        return node in self.found.nodes

    def assess(self, device: Device) -> Fault | None:
        return assess(device, self.facts, require_iommufd=self.require_iommufd)


def follow(tracks: Mapping[DeviceKey, Track], moment: Moment) -> dict[DeviceKey, Track]:
    """Every device that is there, or was and is not dropped yet, in order."""
    present = {d.key: d for d in moment.found.devices}
    keys = sorted(tracks.keys() | present.keys(), key=key_order)
    followed = {key: _next(tracks.get(key), present.get(key), moment) for key in keys}
    return {key: track for key, track in followed.items() if track is not None}


def _next(track: Track | None, device: Device | None, moment: Moment) -> Track | None:
    """The track of one ID after this step; None: it is dropped. `device` is what has the ID now."""
    if device is None:
        assert track is not None
        left = _missing(track, moment)
    elif track is None or not track.device.placements:
        return _arrived(device, moment)
    elif track.device.node == device.node:
        is_same = track.gone_since is None and not bound_functions(track.device).isdisjoint(bound_functions(device))
        return _stayed(track, device, moment) if is_same else _arrived(device, moment)
    else:
        left = _gone(track, _id_held(track.device, device), moment)
    if not _is_retired(left, moment.signals.holdings):
        return left
    return _arrived(device, moment) if device is not None else None


def _arrived(device: Device, moment: Moment) -> Track:
    """New, or bound again: nothing of the past counts."""
    track = Track(device=device, fault=moment.assess(device), arrived_at=moment.now)
    return examine(track, moment.facts, (), moment.now)


def _stayed(track: Track, device: Device, moment: Moment) -> Track:
    if device is track.device and not (moment.signals.aer or track.fatal_errors or track.unanswered):
        return track  # no scan has shown anything else of its group, and time alone changes nothing
    track = track._replace(device=device, fault=moment.assess(device))
    return examine(track, moment.facts, moment.signals.aer, moment.now)


def _missing(track: Track, moment: Moment) -> Track:
    if not track.device.placements:
        gone = _gone(track, track.fault, moment)
        return gone._replace(device=gone.device._replace(node_exists=_has_unknown_node(track.device.node, moment)))
    fault = why_lost(track.device, moment.facts)
    if fault.reason is not Reason.UNREADABLE or track.gone_since is not None:
        return _gone(track, fault, moment)
    # Silence does not prove that it left: it is still the same device when it answers again.
    device = track.device._replace(node_exists=_may_have_node(track.device, moment))
    return listen(track._replace(device=device, fault=fault), moment.facts, moment.signals.aer, moment.now)


def _gone(track: Track, fault: Fault | None, moment: Moment) -> Track:
    gone_since = moment.now if track.gone_since is None else track.gone_since
    return Track(
        device=track.device._replace(node_exists=False, mates=()),
        fault=fault,
        gone_since=gone_since,
        free_since=_free_since(track, gone_since, moment.signals.holdings),
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


def _id_held(old: Device, new: Device) -> Fault:
    detail = f"a pod may still use ID {old.id} for {old.node}; {new.node} is offered once no pod does"
    return Fault(reason=Reason.ID_HELD, detail=detail)


def _may_have_node(device: Device, moment: Moment) -> bool:
    """Whether nothing says that the node of a device that cannot be read is gone, or another function's."""
    if moment.facts.unreachable is not None:
        return device.node_exists
    is_shown = device.is_cdev or device.iommu_group in moment.facts.group_nodes
    return device.node_exists and is_shown and is_in_dev(device.node, moment.facts) and not moment.is_taken(device.node)


# Devices that only PodResources knows


def held_but_unknown(
    ledger: Ledger, is_ours: Callable[[str], bool], tracks: Mapping[DeviceKey, Track], moment: Moment
) -> dict[DeviceKey, Track]:
    """Devices of ours that pods hold from an earlier run of the plugin, and that this node does not show."""
    unknown: dict[DeviceKey, Track] = {}
    for key, grant in ledger.grants.items():
        if key in tracks or grant.allocation or not is_ours(key[0]):
            continue
        detail = f"{ledger.holder_of(grant)} holds it, but this node shows no such device"
        fault = Fault(reason=Reason.GONE, detail=detail)
        for address in sorted(grant.places.addresses & moment.facts.unreadable.keys()):
            fault = Fault(reason=Reason.UNREADABLE, detail=f"{address}: {moment.facts.unreadable[address]}")
        device = Device(
            id=key[1],
            resource=key[0],
            node=grant.places.node,
            model="unknown",
            placements=(),
            iommu_group=-1 if grant.places.group is None else grant.places.group,
            node_exists=_has_unknown_node(grant.places.node, moment),
        )
        unknown[key] = Track(device=device, fault=fault, gone_since=moment.now)
    return unknown


def _has_unknown_node(node: str, moment: Moment) -> bool:
    """Whether a node exists that is no found device's."""
    return node_exists(node, moment.facts) and not moment.is_taken(node)
