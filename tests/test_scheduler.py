"""The toy of a scheduler that the demo has: what it takes of slices, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest

from sandbox_plugin.fake.scheduler import Unschedulable, allocate, allocated, attribute

NUMA = "resource.kubernetes.io/numaNode"


def gpu(name: str, numa: int | None = None, *, kind: str = "gpu", effect: str = "") -> dict[str, Any]:
    near = {} if numa is None else {NUMA: {"int": numa}}
    taints = [{"key": "a/unhealthy", "effect": effect}] if effect else []
    return {"name": name, "attributes": {"type": {"string": kind}, **near}, "taints": taints}


def a_slice(*devices: dict[str, Any], generation: int = 1, count: int = 1) -> dict[str, Any]:
    pool = {"name": "node-1", "generation": generation, "resourceSliceCount": count}
    return {"spec": {"driver": "a.driver", "pool": pool, "devices": list(devices)}}


def claim(count: int, match: str | None = None) -> dict[str, Any]:
    requests = [{"name": f"gpu{n}", "exactly": {"deviceClassName": "passthrough-gpu"}} for n in range(count)]
    constraints = [{"matchAttribute": match}] if match else []
    return {"metadata": {"name": "gpus"}, "spec": {"devices": {"requests": requests, "constraints": constraints}}}


def given(count: int, *slices: dict[str, Any], match: str | None = None, claims: Any = ()) -> list[str]:
    """The devices that such a claim gets."""
    return sorted(allocated([allocate(claim(count, match), slices, claims, "vm")]))


def test_a_claim_is_allocated_and_reserved_in_the_words_of_the_api() -> None:
    done = allocate(claim(1), [a_slice(gpu("a"))], [], "vm")
    assert done["metadata"] == {"name": "gpus"}
    assert done["status"]["reservedFor"] == [{"resource": "pods", "name": "vm", "uid": "uid-of-vm"}]
    result = {"request": "gpu0", "driver": "a.driver", "pool": "node-1", "device": "a"}
    assert done["status"]["allocation"]["devices"]["results"] == [result]


@pytest.mark.parametrize("effect", ["NoSchedule", "NoExecute"])
def test_a_device_with_a_taint_is_left_alone_except_one_that_has_no_effect(effect: str) -> None:
    assert given(1, a_slice(gpu("a", effect=effect), gpu("b"))) == ["b"]
    assert given(1, a_slice(gpu("a", effect="None"))) == ["a"]


def test_what_another_claim_has_and_what_is_of_another_class_is_left_alone() -> None:
    first = allocate(claim(1), [a_slice(gpu("a"), gpu("b"))], [], "vm")
    assert given(1, a_slice(gpu("s", kind="nvswitch"), gpu("a"), gpu("b")), claims=[first, claim(1)]) == ["b"]


def test_devices_that_must_match_are_of_one_value_and_none_lacks_the_attribute() -> None:
    devices = a_slice(gpu("a", 0), gpu("b"), gpu("g"), gpu("h"), gpu("c", 1), gpu("d", 1), gpu("e", 0), gpu("f", 1))
    assert given(2, devices, match=NUMA) == ["a", "e"]
    assert given(3, devices, match=NUMA) == ["c", "d", "f"]
    with pytest.raises(Unschedulable, match="cannot allocate all claims: 4 wanted, 8 are free"):
        given(4, devices, match=NUMA)


def test_only_the_newest_generation_counts_and_only_when_it_is_complete() -> None:
    old, new = a_slice(gpu("a"), gpu("b")), a_slice(gpu("b"), generation=2, count=2)
    with pytest.raises(Unschedulable, match="0 are free"):
        given(1, old, new)
    assert given(2, old, new, a_slice(gpu("c"), generation=2, count=2)) == ["b", "c"]


def test_a_node_without_slices_has_nothing() -> None:
    with pytest.raises(Unschedulable, match="1 wanted, 0 are free"):
        given(1)


def test_an_attribute_has_a_value_of_any_type_or_is_not_there() -> None:
    assert (attribute(gpu("a", 1), NUMA), attribute(gpu("a"), NUMA), attribute({"name": "a"}, NUMA)) == (1, None, None)
