"""What an API server takes as a ResourceSlice, read anew from pkg/apis/resource/validation of Kubernetes 1.37 (pure).

A second reading beside that of `dra/`, so that the two can be held against each other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?")
_QUANTITY = re.compile(r"([0-9]+)(Ki|Mi|Gi|Ti|Pi|Ei)?")
_VALUES = {"int": int, "bool": bool, "string": str, "version": str}

Object = Mapping[str, Any]


def violations(new: Object, old: Object | None = None) -> list[str]:
    """All that is against it; `old`: what it would replace."""
    return [*_of_spec(new.get("spec") or {}), *(_of_change(new["spec"], old["spec"]) if old is not None else ())]


def stored(new: Object, now: str, *, drops: Collection[str]) -> dict[str, Any]:
    """The spec as it is kept: with the times of new taints, quantities in their shortest form; without the
    fields of devices that are dropped, as taints are where the feature DRADeviceTaints is off."""
    devices = []
    for device in new["spec"].get("devices") or []:
        kept = {key: value for key, value in device.items() if key not in drops}
        if kept.get("taints"):
            kept["taints"] = [{**taint, "timeAdded": taint.get("timeAdded", now)} for taint in kept["taints"]]
        if kept.get("capacity"):
            kept["capacity"] = {k: {**v, "value": _shortest(v["value"])} for k, v in kept["capacity"].items()}
        devices.append(kept)
    return {**new["spec"], "devices": devices}


def _of_spec(spec: Object) -> Iterator[str]:
    pool, devices = spec.get("pool") or {}, spec.get("devices") or []
    yield from _domain("spec.driver", spec.get("driver"), 63)
    if len(pool.get("name", "")) > 253 or not all(
        _SUBDOMAIN.fullmatch(part) for part in pool.get("name", "").split("/")
    ):
        yield f"spec.pool.name: Invalid value: {pool.get('name')!r}"
    if pool.get("resourceSliceCount", 0) <= 0:
        yield "spec.pool.resourceSliceCount: must be greater than zero"
    if pool.get("generation", 0) < 0:
        yield "spec.pool.generation: must be greater than or equal to zero"
    if sum(key in spec for key in ("nodeName", "nodeSelector", "allNodes", "perDeviceNodeSelection")) != 1:
        yield "spec: exactly one of nodeName, nodeSelector, allNodes, perDeviceNodeSelection is required"
    yield from _domain("spec.nodeName", spec.get("nodeName"), 253)
    most = 64 if any(device.get("taints") or device.get("consumesCounters") for device in devices) else 128
    if len(devices) > most:
        yield f"spec.devices: Too many: {len(devices)}: must have at most {most} items"
    names = [device.get("name") for device in devices]
    yield from (f"spec.devices[{at}]: Duplicate value: {n!r}" for at, n in enumerate(names) if n in names[:at])
    for at, device in enumerate(devices):
        yield from _of_device(f"spec.devices[{at}]", device)


def _of_device(at: str, device: Object) -> Iterator[str]:
    name, taints = device.get("name", ""), device.get("taints") or []
    attributes, capacity = device.get("attributes") or {}, device.get("capacity") or {}
    if len(name) > 63 or not _LABEL.fullmatch(name):
        yield f"{at}.name: Invalid value: {name!r}: must be a DNS label"
    if len(attributes) + len(capacity) > 32:
        yield f"{at}: the total number of attributes and capacities must not exceed 32"
    for key, value in attributes.items():
        yield from _qualified(f"{at}.attributes", key)
        yield from _of_attribute(f"{at}.attributes[{key}]", value)
    for key, value in capacity.items():
        yield from _qualified(f"{at}.capacity", key)
        if not isinstance(value.get("value"), str) or not _QUANTITY.fullmatch(value["value"]):
            yield f"{at}.capacity[{key}].value: Invalid value: {value.get('value')!r}"
    if len(taints) > 16:
        yield f"{at}.taints: Too many: {len(taints)}: must have at most 16 items"
    for number, taint in enumerate(taints):
        yield from _of_taint(f"{at}.taints[{number}]", taint)


def _of_attribute(at: str, value: Object) -> Iterator[str]:
    if len(value) != 1 or not value.keys() <= _VALUES.keys():
        yield f"{at}: exactly one value must be specified"
        return
    ((kind, held),) = value.items()
    if type(held) is not _VALUES[kind]:
        yield f"{at}.{kind}: Invalid value: {held!r}"
    elif isinstance(held, str) and len(held.encode()) > 64:
        yield f"{at}.{kind}: Too long: may not be more than 64 bytes"
    elif isinstance(held, int) and not -(2**63) <= held < 2**63:
        yield f"{at}.int: Invalid value: {held}"


def _of_taint(at: str, taint: Object) -> Iterator[str]:
    prefix, slash, name = str(taint.get("key", "")).rpartition("/")
    if len(name) > 63 or not name or not _LABEL_VALUE.fullmatch(name):
        yield f"{at}.key: Invalid value: {taint.get('key')!r}"
    if slash:
        yield from _domain(f"{at}.key", prefix, 253)
    if len(taint.get("value", "")) > 63 or not _LABEL_VALUE.fullmatch(taint.get("value", "")):
        yield f"{at}.value: Invalid value: {taint['value']!r}"
    if taint.get("effect") not in ("None", "NoSchedule", "NoExecute"):
        yield f"{at}.effect: Unsupported value: {taint.get('effect')!r}"


def _of_change(new: Object, old: Object) -> Iterator[str]:
    for key in ("driver", "nodeName"):
        if new.get(key) != old.get(key):
            yield f"spec.{key}: Invalid value: {new.get(key)!r}: field is immutable"
    if new["pool"].get("name") != old["pool"].get("name"):
        yield f"spec.pool.name: Invalid value: {new['pool'].get('name')!r}: field is immutable"


def _domain(at: str, name: Any, longest: int) -> Iterator[str]:
    if not isinstance(name, str) or len(name) > longest or not _SUBDOMAIN.fullmatch(name):
        yield f"{at}: Invalid value: {name!r}: must be a DNS subdomain of at most {longest} characters"


def _qualified(at: str, key: str) -> Iterator[str]:
    domain, slash, name = key.rpartition("/")
    if slash:
        yield from _domain(at, domain, 63)
    if len(name) > 32 or not _IDENTIFIER.fullmatch(name):
        yield f"{at}: Invalid value: {name!r}: must be a C identifier of at most 32 characters"


def _shortest(quantity: str) -> str:
    """As Kubernetes writes a quantity again: `1024Mi` is `1Gi`; a plain number stays one."""
    number, suffix = re.fullmatch(_QUANTITY, quantity).groups()  # type: ignore[union-attr]
    suffixes = ("Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
    value = int(number)
    while suffix and value and value % 1024 == 0 and suffix != suffixes[-1]:
        value, suffix = value // 1024, suffixes[suffixes.index(suffix) + 1]
    return f"{value}{suffix or ''}"
