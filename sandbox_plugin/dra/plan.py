"""What has to be written so that a pool of ResourceSlices is as it should be (pure).

Consumers take the slices of the highest generation, and only if there are as many as each of them says. So whatever
takes more than one write gets a new generation: the pool is ignored for as long as the writes take, and never seen half
old and half new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sandbox_plugin.dra.client import JsonObject
from sandbox_plugin.dra.names import pool_name

_LONGEST_NAME = 253


class Verb(StrEnum):
    """What is done to a slice."""

    CREATE = "create"
    REPLACE = "replace"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Write:
    """One write, and the object that it is for."""

    verb: Verb
    object: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Whose slices they are."""

    driver: str
    node: str
    node_uid: str | None = None
    """With it they are deleted with the node."""


def slice_name(pool: Pool, index: int) -> str:
    """The same name each time: a create that is repeated, because nobody saw its answer, makes no second slice."""
    name = f"{pool.node}-{pool.driver}-{index}"
    if len(name) <= _LONGEST_NAME:
        return name
    suffix = f"-{hashlib.sha256(f'{pool.node}/{pool.driver}'.encode()).hexdigest()[:12]}-{index}"
    return name[: _LONGEST_NAME - len(suffix)].rstrip(".-") + suffix


def plan(
    pool: Pool, wanted: Sequence[Sequence[JsonObject]], existing: Mapping[str, JsonObject], newest: int
) -> list[Write]:
    """The writes, in their order, that lead from the existing slices, by name, to one for each part of the devices.

    `newest`: the highest generation that is known to have been there.
    """
    names = [slice_name(pool, index) for index in range(len(wanted))]
    now = max([newest, *(_generation(each) for each in existing.values())])
    fitting = {name: each for name, each in existing.items() if name in names and _fits(each, pool)}
    changed = [
        name
        for name, devices in zip(names, wanted, strict=True)
        if name in fitting and not _is_same(fitting[name]["spec"], _spec(pool, devices, now, len(wanted)))
    ]
    if len(fitting) == len(wanted) and len(changed) <= 1 and not _has_other_shape(fitting.values(), now, len(wanted)):
        generation, written = now, set(changed)
    else:
        generation, written = now + 1, set(names)
    writes = [Write(Verb.DELETE, each) for name, each in existing.items() if name in names and name not in fitting]
    for name, devices in zip(names, wanted, strict=True):
        if name in written:
            spec = _spec(pool, devices, generation, len(wanted))
            old = fitting.get(name)
            writes.append(_create(name, pool, spec) if old is None else _replace(old, spec))
    return writes + [Write(Verb.DELETE, each) for name, each in existing.items() if name not in names]


def probe_of_taints(pool: Pool) -> JsonObject:
    """A slice that is never stored: by the answer to a dry run of its create one sees whether taints are kept."""
    taint = {"key": f"{pool.driver}/unhealthy", "effect": "NoSchedule"}
    write = _create("", pool, _spec(pool, [{"name": "probe", "taints": [taint]}], 0, 1))
    return {**write.object, "metadata": {"generateName": "probe-of-taints-"}}


def without_times(spec: JsonObject) -> JsonObject:
    """The API server notes in each taint when it came: nothing that anybody asked for."""
    devices = [
        {**device, "taints": [{k: v for k, v in taint.items() if k != "timeAdded"} for taint in device["taints"]]}
        if device.get("taints")
        else device
        for device in spec.get("devices") or []
    ]
    return {**spec, "devices": devices}


def _is_same(stored: JsonObject, wanted: JsonObject) -> bool:
    return without_times(stored) == wanted


def _has_other_shape(slices: Any, generation: int, count: int) -> bool:
    """Whether one of them is not of this generation, or says another number of slices."""
    return any(
        _generation(each) != generation or each["spec"]["pool"].get("resourceSliceCount") != count for each in slices
    )


def _generation(existing: JsonObject) -> int:
    return int(existing["spec"]["pool"].get("generation", 0))


def _fits(existing: JsonObject, pool: Pool) -> bool:
    """Whether it can become ours by a replace: the name of its pool cannot be changed."""
    return bool(existing["spec"]["pool"].get("name") == pool_name(pool.node))


def _spec(pool: Pool, devices: Sequence[JsonObject], generation: int, count: int) -> dict[str, Any]:
    return {
        "driver": pool.driver,
        "nodeName": pool.node,
        "pool": {"name": pool_name(pool.node), "generation": generation, "resourceSliceCount": count},
        "devices": list(devices),
    }


def _create(name: str, pool: Pool, spec: JsonObject) -> Write:
    metadata: dict[str, Any] = {"name": name}
    if pool.node_uid is not None:
        owner = {"apiVersion": "v1", "kind": "Node", "name": pool.node, "uid": pool.node_uid, "controller": True}
        metadata["ownerReferences"] = [owner]
    body = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": metadata, "spec": spec}
    return Write(Verb.CREATE, body)


def _replace(old: JsonObject, spec: JsonObject) -> Write:
    """Taints that were there before keep their times: tolerations count from those."""
    times = {
        (device["name"], taint["key"], taint.get("value"), taint["effect"]): taint["timeAdded"]
        for device in old["spec"].get("devices") or []
        for taint in device.get("taints") or []
        if "timeAdded" in taint
    }

    def timed(name: str, taint: JsonObject) -> JsonObject:
        since = times.get((name, taint["key"], taint.get("value"), taint["effect"]))
        return taint if since is None else {**taint, "timeAdded": since}

    devices = [
        {**device, "taints": [timed(device["name"], taint) for taint in device["taints"]]}
        if device.get("taints")
        else device
        for device in spec["devices"]
    ]
    kind = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice"}
    return Write(Verb.REPLACE, {**kind, "metadata": old["metadata"], "spec": {**spec, "devices": devices}})
