"""From a ResourceClaim to the devices that it gets here, or to a refusal in words: pure.

The scheduler has chosen the devices, by slices that may be old by now. So each is looked up again by its name, and
refused if it cannot be given any more: the kubelet shows the words in the pod's events, and asks again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from sandbox_plugin.dra.client import JsonObject
from sandbox_plugin.dra.config import InvalidConfig, NodeKind, parse_config
from sandbox_plugin.dra.names import devices_by_name
from sandbox_plugin.inventory.ledger import Places, PreparedClaim, places_of
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device
from sandbox_plugin.names import address_of_claimed

_POD_CLAIM = "resource.kubernetes.io/pod-claim-name"
"""Annotation of a claim that was made from a template: what the pod's spec calls it."""
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
"""A DNS subdomain, or a label: also what may be the name of a folder."""
_UID = re.compile(r"[A-Za-z0-9-]{1,63}")
_REQUEST = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(/[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?")


class Why(StrEnum):
    """Why a claim is refused, in one of few words, where that is no `Reason` of a device."""

    MALFORMED = "malformed-request"
    API_SERVER = "api-server"
    """It did not tell what the claim was allocated."""
    NOT_ALLOCATED = "not-allocated"
    """There is no such claim, or it has no devices here that are this driver's."""
    NOT_ALLOWED = "not-allowed"
    """It asks for what no claim gets: to share a device, or what its configuration says."""
    UNKNOWN_DEVICE = "unknown-device"
    HELD = "held"
    """Another claim or pod has the device, or its group."""
    LAST_LOOK = "last-look"
    """The look at the device found something against it."""
    CHANGED = "changed"
    """The device, or the claim, became another one meanwhile."""
    PART_OF_NODE = "part-of-node"
    """`--whole-node` allows one device or all."""
    FILES = "files"
    """Its files cannot be written, or removed."""


class Refused(Exception):
    """Why a claim cannot be prepared now, for who reads the pod's events."""

    def __init__(self, words: str, why: str) -> None:
        super().__init__(words)
        self.why = why
        """A `Why`, or the device's `Reason`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimId:
    """As the kubelet names a claim."""

    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    def check(self) -> None:
        """Raises Refused for what Kubernetes would not have named so: the names become those of files."""
        is_name = all(_NAME.fullmatch(part) for part in (self.namespace, self.name))
        if not is_name or not _UID.fullmatch(self.uid):
            raise Refused(
                f"{self.namespace[:80]!r}, {self.name[:80]!r}, {self.uid[:80]!r}: not a claim's names and UID",
                Why.MALFORMED,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One device that a claim was allocated."""

    request: str
    """`gpu`, or with the alternative that was chosen `gpu/h100`."""
    pool: str
    device: str
    """Its name in slices."""
    node: NodeKind = NodeKind.DEFAULT

    @property
    def base_request(self) -> str:
        return self.request.partition("/")[0]

    def check(self) -> None:
        """Raises Refused unless the names are such as Kubernetes takes: they become those of files."""
        if not _REQUEST.fullmatch(self.request) or not _NAME.fullmatch(self.device):
            raise Refused(f"request {self.request[:80]!r}, device {self.device[:80]!r}: not such names", Why.MALFORMED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a claim's allocation says to this driver."""

    pod_claim: str | None
    devices: tuple[Wanted, ...]

    @property
    def names(self) -> frozenset[tuple[str, str]]:
        """Pool and name of each device, whatever is asked of them beside that."""
        return frozenset((wanted.pool, wanted.device) for wanted in self.devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One device that a prepared claim has."""

    wanted: Wanted
    places: Places
    """Its node is the one that the claim's CDI spec says, or was made for."""
    former_nodes: tuple[str, ...] = ()
    """Those that the spec said before, when it was bound as another vfioN: a container may still have them."""

    @property
    def held(self) -> list[Places]:
        """All that goes with it in the ledger."""
        return [self.places, *(self.places._replace(node=node) for node in self.former_nodes)]

    def moved(self, device: Device) -> Given:
        """The same, where the device is now."""
        places, before = places_of(device), self.places
        if places == before:
            return self
        is_known = before.node == places.node or before.node in before.addresses
        former = self.former_nodes if is_known else (*self.former_nodes, before.node)
        return replace(self, places=places, former_nodes=tuple(node for node in former if node != places.node))

    def after_boot(self) -> Given:
        """The same, when the host was booted again: numbers mean something else then, and no container has them."""
        addresses = self.places.addresses
        return replace(self, places=Places(node=min(addresses), addresses=addresses), former_nodes=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A claim that is prepared: what the checkpoint keeps of it."""

    claim: ClaimId
    pod_claim: str | None
    """What the pod's spec calls it, if it was made from a template."""
    devices: tuple[Given, ...]

    @property
    def asked(self) -> Asked:
        """What its allocation said. It does not change while a pod has the claim."""
        return Asked(pod_claim=self.pod_claim, devices=tuple(given.wanted for given in self.devices))

    def for_ledger(self, at: float = -math.inf, looked_at: float = -math.inf) -> PreparedClaim:
        """As the ledger takes it, prepared and looked at then; -inf: not by this run of the plugin."""
        places = tuple(places for given in self.devices for places in given.held)
        return PreparedClaim(name=str(self.claim), devices=places, at=at, looked_at=looked_at)


# What a claim says


def read_claim(claim_id: ClaimId, claim: JsonObject | None, *, driver: str, pool: str) -> Asked:
    """What the API server's object says. Raises Refused."""
    if claim is None:
        raise Refused("the API server has no such claim", Why.NOT_ALLOCATED)
    try:
        return _read(claim_id, claim, driver, pool)
    except (AttributeError, KeyError, TypeError) as error:
        words = f"the API server's object is no ResourceClaim of resource.k8s.io/v1: {error!r}"
        raise Refused(words, Why.MALFORMED) from None


def _read(claim_id: ClaimId, claim: JsonObject, driver: str, pool: str) -> Asked:
    uid = claim["metadata"]["uid"]
    if uid != claim_id.uid:
        words = f"it was deleted and made again: its UID is {uid} now, and the pod's is {claim_id.uid}"
        raise Refused(words, Why.NOT_ALLOCATED)
    status = claim.get("status") or {}
    allocation = status.get("allocation")
    if allocation is None:
        raise Refused("it is not allocated", Why.NOT_ALLOCATED)
    _refuse_sharing(status.get("reservedFor") or ())
    devices = allocation.get("devices") or {}
    results = [result for result in devices.get("results") or () if result["driver"] == driver]
    wanted = tuple([_wanted(result, devices.get("config") or (), driver, pool) for result in results])
    if not wanted:
        raise Refused(f"none of its devices is of driver {driver}", Why.NOT_ALLOCATED)
    if len({each.device for each in wanted}) < len(wanted):
        raise Refused("it has one device twice", Why.MALFORMED)
    pod_claim = (claim["metadata"].get("annotations") or {}).get(_POD_CLAIM)
    if pod_claim is not None and not _NAME.fullmatch(pod_claim):
        raise Refused(f"its annotation {_POD_CLAIM} is {pod_claim[:80]!r}, which is no name", Why.MALFORMED)
    return Asked(pod_claim=pod_claim, devices=wanted)


def _refuse_sharing(users: Sequence[Mapping[str, Any]]) -> None:
    if len(users) > 1:
        names = ", ".join(f"{user['resource']}/{user['name']}" for user in users)
        words = f"it is reserved for {names}: a VFIO device has one holder; give each pod a claim of its own"
        raise Refused(words, Why.NOT_ALLOWED)


def _wanted(result: Mapping[str, Any], configs: Iterable[Mapping[str, Any]], driver: str, pool: str) -> Wanted:
    request, device = result["request"], result["device"]
    if result["pool"] != pool:
        words = f"request {request}: device {device} is of pool {result['pool']}, and this node's is {pool}"
        raise Refused(words, Why.NOT_ALLOCATED)
    if result.get("adminAccess"):
        why = "adminAccess is refused: a VFIO device has one holder, and who looks at it would be that one"
        raise Refused(f"request {request}: {why}", Why.NOT_ALLOWED)
    if result.get("shareID"):
        words = f"request {request}: a share of device {device} is refused: a VFIO device has one holder"
        raise Refused(words, Why.NOT_ALLOWED)
    wanted = Wanted(request=request, pool=pool, device=device, node=_node_kind(request, configs, driver))
    wanted.check()
    return wanted


def _node_kind(request: str, configs: Iterable[Mapping[str, Any]], driver: str) -> NodeKind:
    """What the last of these configurations says that is for this request: a class's stand before the claim's."""
    chosen = NodeKind.DEFAULT
    for config in configs:
        opaque, requests = config.get("opaque") or {}, config.get("requests") or ()
        is_for_us = opaque.get("driver") == driver
        if is_for_us and (not requests or request in requests or request.partition("/")[0] in requests):
            try:
                chosen = parse_config(opaque.get("parameters"))
            except InvalidConfig as error:
                whose = "its DeviceClass" if config.get("source") == "FromClass" else "the claim"
                words = f"request {request}: the configuration of {whose}: {error}"
                raise Refused(words, Why.NOT_ALLOWED) from None
    return chosen


# The devices


def choose(
    uid: str, wanted: Iterable[Wanted], inventory: Inventory, *, whole_node: tuple[str, int | None] | None = None
) -> list[Device]:
    """The devices as they are now, if the claim can have all of them. Raises Refused.

    `whole_node`: as `Settings.whole_node`.
    """
    if not inventory.version:
        raise Refused("this node's devices are not known yet", Why.UNKNOWN_DEVICE)
    named = devices_by_name(inventory)
    chosen = [_choose(uid, each, named.get(each.device), inventory) for each in wanted]
    _refuse_part_of_node(chosen, inventory, whole_node)
    return chosen


def _choose(uid: str, wanted: Wanted, device: Device | None, inventory: Inventory) -> Device:
    if device is None:
        why = inventory.unoffered.get(address_of_claimed(wanted.device) or "", "this node has no such device any more")
        raise Refused(f"request {wanted.request}: device {wanted.device}: {why}", Why.UNKNOWN_DEVICE)
    where = f"request {wanted.request}: device {wanted.device} ({device.resource}={device.id})"
    if (reason := device.for_claims.reason) is not None:
        raise Refused(f"{where} cannot be given: {device.for_claims}", reason)
    if holder := _other_holder(uid, device, inventory):
        raise Refused(f"{where} cannot be given: {holder} holds it", Why.HELD)
    return device


def _other_holder(uid: str, device: Device, inventory: Inventory) -> str | None:
    """Who else than this claim has the device, or its group, in words."""
    ledger = inventory.memory.ledger
    others = [grant for grant in ledger.touching(places_of(device).all) if not grant.is_of_claim(uid)]
    return ledger.holder_of(others[0]) if others else None


def usable(prepared: Prepared, given: Given, named: Mapping[str, Device], inventory: Inventory) -> Device | None:
    """The device of a prepared claim as it is now, if its node is there and nobody else's. `named`: by their names."""
    device = named.get(given.wanted.device)
    if device is None or not device.node_exists or _other_holder(prepared.claim.uid, device, inventory):
        return None
    return device


def _refuse_part_of_node(
    chosen: Sequence[Device], inventory: Inventory, whole_node: tuple[str, int | None] | None
) -> None:
    """As of Allocate: a confidential guest with some of these devices does not start."""
    if whole_node is None:
        return
    resource, count = whole_node
    asked = sum(device.resource == resource for device in chosen)
    everything = count or len({d.address for d in inventory.resources.get(resource, ()) if d.placements})
    if asked not in (0, 1, everything):
        words = f"it has {asked} devices of {resource}; with --whole-node it gets 1 or all {everything}"
        raise Refused(words, Why.PART_OF_NODE)


def give(claim_id: ClaimId, asked: Asked, devices: Sequence[Device]) -> Prepared:
    """The claim with these devices, in the order in which it asked."""
    given = [Given(wanted=w, places=places_of(d)) for w, d in zip(asked.devices, devices, strict=True)]
    return Prepared(claim=claim_id, pod_claim=asked.pod_claim, devices=tuple(given))
