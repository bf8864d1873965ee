"""The status document (pure): what the daemon knows, as one JSON value. docs/status.md describes it.

It tells two things apart. *Not ready* is what keeps this plugin from serving: a pod that is not ready stops a rollout.
A *remark* is what a person should look at, such as a broken GPU, and no rollout would mend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sandbox_plugin.inventory.ledger import Grant, Ledger
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device, Reason, key_order

SCHEMA = 1
"""Rises when a key goes or changes its meaning; new keys may come without that."""
SERVING, STANDING_BY, WAITING = "serving", "standing by", "waiting"
ORDERLY = frozenset(
    {
        Reason.GROUP_TAKEN,
        Reason.HELD_AS_ANOTHER,
        Reason.HELD_BY_OTHER_API,
        Reason.ID_HELD,
        Reason.HOLDERS_UNKNOWN,
        Reason.NOT_IN_CDI,
        Reason.SETTLING,
    }
)
"""Why a device that is well is withheld for a while: nothing is broken, and nobody has to come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the other parts say of themselves now, in values that JSON can take."""

    plugin: Mapping[str, Any]
    turn: Mapping[str, str | None]
    """`state`, one of those above, and its `reason`."""
    registrations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By resource; `state` is `registered` if all is well."""
    scan: Mapping[str, Any] = field(default_factory=dict)
    """`trouble`: why the last attempt saw nothing."""
    offers_resources: bool = True
    """False: the device plugin API is off, so there is nothing to register."""
    cdi_files: Mapping[str, str] | None = None
    """Resource -> path of its spec. None: this consumer needs none."""
    foreign_specs: Sequence[Mapping[str, str]] = ()
    events: Sequence[Mapping[str, str | None]] = ()
    """`source`, `state` (up, down or off) and `reason`."""
    dra: Mapping[str, Any] | None = None
    """Dynamic Resource Allocation: `driver`, `registration`, `slices` (None: not begun), `claims`. None: it is off."""


def document(inventory: Inventory, parts: Parts) -> dict[str, Any]:
    """The whole of it."""
    reasons = not_ready(inventory, parts)
    state = "not begun" if parts.offers_resources else "off"
    remarks = [] if parts.turn["state"] == STANDING_BY else _remarks(inventory, parts)
    return {
        "schema": SCHEMA,
        "plugin": dict(parts.plugin),
        "ready": not reasons,
        "well": not reasons and not remarks,
        "not_ready": reasons,
        "remarks": remarks,
        "turn": dict(parts.turn),
        "resources": [
            {
                "name": resource,
                "registration": dict(parts.registrations.get(resource, {"state": state})),
                "devices": [
                    device_document(device) | {"holder": _holder_of(device, inventory.memory.ledger)}
                    for device in devices
                ],
            }
            for resource, devices in inventory.resources.items()
        ],
        "held_without_device": held_without_device(inventory),
        "cdi": _cdi(inventory, parts),
        "events": [dict(source) for source in parts.events],
        "scan": dict(parts.scan),
        "dra": None if parts.dra is None else dict(parts.dra),
    }


def not_ready(inventory: Inventory, parts: Parts) -> list[str]:
    """What keeps this plugin from serving, each in words; nothing: it serves, or stands by."""
    if not inventory.version:
        return [f"the host has not been scanned yet{_because(parts.scan.get('trouble'))}"]
    if parts.turn["state"] == STANDING_BY:
        return []
    if parts.turn["state"] != SERVING:
        return [f"waiting for the kubelet's folder{_because(parts.turn['reason'])}"]
    trouble = _cdi_trouble(inventory)
    reasons = [f"{resource}: {why}" for resource, why in sorted(trouble.items())]
    for resource in inventory.resources.keys() - trouble.keys() if parts.offers_resources else ():
        registration = parts.registrations.get(resource)
        if registration is None:
            reasons.append(f"{resource} is not registered: its CDI spec is not written yet")
        elif registration["state"] != "registered":
            why = registration["trouble"]
            reasons.append(f"{resource}: {why or 'it is not registered yet'}")
    return sorted(reasons) + _claims_not_ready(parts)


def _claims_not_ready(parts: Parts) -> list[str]:
    """What keeps this plugin from serving claims.

    An API server that is away keeps nobody from serving what is served without it. One that says no has something
    against this plugin, which the next one will not have: a rollout must not go on.
    """
    if parts.dra is None:
        return []
    registration, slices = parts.dra["registration"], parts.dra["slices"]
    reasons = []
    if registration["state"] != "registered":
        why = registration["trouble"] or "the kubelet has not registered it yet"
        reasons.append(f"DRA driver {parts.dra['driver']}: {why}")
    if slices is None or not slices["published"]:
        trouble = None if slices is None else slices["trouble"]
        if trouble is None or slices["refused"] or not parts.offers_resources:
            reasons.append(f"ResourceSlices: {trouble or 'they are not published yet'}")
    return reasons


def _remarks(inventory: Inventory, parts: Parts) -> list[str]:
    remarks = device_remarks(inventory)
    remarks += [f"{spec['path']}: {spec['reason']}" for spec in parts.foreign_specs]
    remarks += [f"{each['source']}: {each['reason']}" for each in parts.events if each["state"] == "down"]
    if inventory.version and parts.scan.get("trouble"):
        remarks.append(f"the last scan failed: {parts.scan['trouble']}")
    return remarks + _remarks_on_claims(parts)


def _remarks_on_claims(parts: Parts) -> list[str]:
    if parts.dra is None:
        return []
    claims, slices = parts.dra["claims"], parts.dra["slices"]
    remarks = [f"claim {each['namespace']}/{each['name']}: {each['remark']}" for each in claims if each["remark"]]
    if slices is not None and slices["trouble"] is not None:
        trouble = f"ResourceSlices: {slices['trouble']}"
        remarks += [] if trouble in _claims_not_ready(parts) else [trouble]
    return remarks


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def device_document(device: Device) -> dict[str, Any]:
    """One device, without who holds it."""
    return {
        "id": device.id,
        "pci_addresses": [placement.address for placement in device.placements],
        "model": device.model,
        "node": device.node,
        "iommu_group": device.iommu_group,
        "numa_nodes": list(device.numa_nodes),
        "health": "Healthy" if device.health.healthy else "Unhealthy",
        "reason": device.health.reason,
        "detail": device.health.detail,
    }


def device_remarks(inventory: Inventory) -> list[str]:
    """Each device that somebody should look at, with the reason."""
    return [
        f"{resource}={device.id} ({device.address}) is Unhealthy: {device.health}"
        for resource, devices in inventory.resources.items()
        for device in devices
        if device.health.reason is not None and device.health.reason not in ORDERLY
    ]


def _holder_of(device: Device, ledger: Ledger) -> dict[str, str | None] | None:
    grants = ledger.touching([device.node])
    return holder_of(grants[0], ledger) if grants else None


def holder_of(grant: Grant, ledger: Ledger) -> dict[str, str | None]:
    """Of whom it is; all None: an Allocate gave it, and PodResources has not named the pod yet."""
    if grant.claim is not None:
        namespace, _, claim = grant.claim.partition("/")
        of_claim, container = ledger.pod_of_claim(grant.claim, grant.at) or (None, None)
        return {"namespace": namespace, "pod": of_claim, "container": container, "claim": claim}
    pod = ledger.pod_of(grant)
    if pod is None:
        return {"namespace": None, "pod": None, "container": None, "claim": None}
    namespace, _, name = pod.partition("/")
    container = ledger.named_by[grant.key].containers.get(grant.key)
    return {"namespace": namespace, "pod": name, "container": container, "claim": None}


def held_without_device(inventory: Inventory) -> list[dict[str, Any]]:
    """What pods hold that no device of this inventory has the node of."""
    ledger = inventory.memory.ledger
    nodes = {device.node for device in inventory.by_key.values()}
    return [
        {"resource": key[0], "id": key[1], "node": grant.places.node, "holder": holder_of(grant, ledger)}
        for key, grant in sorted(ledger.grants.items(), key=lambda each: key_order(each[0]))
        if grant.places.node not in nodes
    ]


def _cdi_trouble(inventory: Inventory) -> Mapping[str, str]:
    signals = inventory.memory.signals
    return {} if signals is None else signals.cdi_trouble


def _cdi(inventory: Inventory, parts: Parts) -> dict[str, Any] | None:
    if parts.cdi_files is None:
        return None
    signals = inventory.memory.signals
    in_cdi = (signals.in_cdi if signals else None) or {}
    return {
        "files": [
            {"resource": resource, "path": path, "devices": len(in_cdi.get(resource, ()))}
            for resource, path in parts.cdi_files.items()
            if resource in in_cdi
        ],
        "trouble": dict(_cdi_trouble(inventory)),
        "foreign": [dict(spec) for spec in parts.foreign_specs],
    }
