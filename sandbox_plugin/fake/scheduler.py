"""A scheduler's part in Dynamic Resource Allocation, as far as the demo needs it (pure).

It knows nothing but ResourceSlices and ResourceClaims. Of the real one (dynamic-resource-allocation/structured) it has
the rules about pools, taints, devices that a claim has, and `matchAttribute`. A class it knows by name: it has no CEL.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Object = Mapping[str, Any]

CLASSES = {"passthrough-gpu": "gpu"}
"""DeviceClass of manifests/overlays/dra -> the attribute `type` of its devices."""


class Unschedulable(Exception):
    """No node has what the claim asks for now. Says what is missing."""


def complete_pool(slices: Iterable[Object]) -> list[Object]:
    """The slices of a pool that count: those of its newest generation, if all of them are there; else none."""
    listed = list(slices)
    newest = max((each["spec"]["pool"]["generation"] for each in listed), default=0)
    current = [each for each in listed if each["spec"]["pool"]["generation"] == newest]
    is_complete = all(each["spec"]["pool"]["resourceSliceCount"] == len(current) for each in current)
    return current if is_complete else []


def devices_of(slices: Iterable[Object]) -> list[Object]:
    """The devices of these slices."""
    return [device for each in slices for device in each["spec"].get("devices") or ()]


def attribute(device: Object, name: str) -> Any:
    """The value of an attribute, whatever its type; None: the device does not have it."""
    return next(iter((device.get("attributes") or {}).get(name, {}).values()), None)


def is_kept_back(device: Object) -> bool:
    """Whether a taint keeps it from claims, which tolerate none here."""
    return any(taint["effect"] in ("NoSchedule", "NoExecute") for taint in device.get("taints") or ())


def allocated(claims: Iterable[Object]) -> set[str]:
    """The devices that claims have."""
    return {result["device"] for claim in claims for result in _results(claim)}


def allocate(claim: Object, slices: Sequence[Object], claims: Iterable[Object], pod: str) -> dict[str, Any]:
    """The claim with devices of one node's pool, reserved for a pod, as the scheduler writes it to the API server.

    `claims`: all that there are. Raises Unschedulable.
    """
    spec = claim["spec"]["devices"]
    requests = spec["requests"]
    (device_class,) = {request["exactly"]["deviceClassName"] for request in requests}
    pool = complete_pool(slices)
    taken = allocated(claims)
    candidates = [
        device
        for device in devices_of(pool)
        if attribute(device, "type") == CLASSES[device_class]
        and device["name"] not in taken
        and not is_kept_back(device)
    ]
    matched = [constraint["matchAttribute"] for constraint in spec.get("constraints") or ()]
    chosen = next((some for some in _alike(candidates, matched) if len(some) >= len(requests)), None)
    if chosen is None:
        raise Unschedulable(f"cannot allocate all claims: {len(requests)} wanted, {len(candidates)} are free")
    of_pool = {"driver": pool[0]["spec"]["driver"], "pool": pool[0]["spec"]["pool"]["name"]}
    results = [
        {"request": request["name"], **of_pool, "device": device["name"]}
        for request, device in zip(requests, chosen, strict=False)
    ]
    return with_status(claim, results, pod)


def with_status(claim: Object, results: Sequence[Object], pod: str) -> dict[str, Any]:
    """The claim with these devices, reserved for a pod."""
    reserved = [{"resource": "pods", "name": pod, "uid": f"uid-of-{pod}"}]
    return {**claim, "status": {"allocation": {"devices": {"results": list(results)}}, "reservedFor": reserved}}


def _results(claim: Object) -> Iterator[Object]:
    allocation = (claim.get("status") or {}).get("allocation") or {}
    yield from (allocation.get("devices") or {}).get("results") or ()


def _alike(devices: Sequence[Object], names: Sequence[str]) -> list[list[Object]]:
    """The devices by their values of these attributes; those that lack one are left out."""
    groups: dict[tuple[Any, ...], list[Object]] = {}
    for device in devices:
        values = tuple(attribute(device, name) for name in names)
        if None not in values:
            groups.setdefault(values, []).append(device)
    return list(groups.values())
