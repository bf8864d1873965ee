#!/usr/bin/env python3
"""How long GetPreferredAllocation takes to answer, from the bytes of the request to those of the answer.

    scripts/bench-prefer.py            a Markdown table, in milliseconds

Kubelet admission waits for the answer. Only the way through gRPC and the socket is not in these times. They are CPU
time, which other work on the machine disturbs little; nothing here waits. Everything is available, and the sizes asked
for go from one to all but one. The table shows the size that takes longest: the fastest of its calls, how much of that
is the choice itself, and the median call. The hosts of 1,024 devices are generated; nothing of that size is known to
exist.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from math import isqrt
from random import Random
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

from sandbox_plugin.api import v1beta1
from sandbox_plugin.config.settings import Consumer, Policy
from sandbox_plugin.inventory.prefer import prefer
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.inventory.topology import places_by_id
from sandbox_plugin.kubelet.servicer import DevicePluginServicer
from sandbox_plugin.model import HEALTHY, Device, Objection, Placement
from sandbox_plugin.registry import Registry
from sandbox_plugin.rpc.codec import MessageCodec

RESOURCE = "nvidia.com/pgpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--calls", type=int, default=15, help="calls for each size; default: 15")
    asyncio.run(bench(parser.parse_args().calls))


async def bench(calls: int) -> None:
    shapes = {
        "8: two sockets, pairs on a switch": {str(i): gpu(i, i // 4, i // 2, i // 2) for i in range(8)},
        "16: two sockets, pairs on a switch": {str(i): gpu(i, i // 8, i // 4, i // 2) for i in range(16)},
        "16: anywhere, some in groups": anywhere(16),
        "1,024: two sockets, pairs on a switch": {str(i): gpu(i, i // 512, i // 32, i // 2) for i in range(1024)},
        "1,024: 128 NUMA nodes of 8": {str(i): gpu(i, i // 8, i // 4, i // 2) for i in range(1024)},
        "1,024: parts of all sizes": {
            str(i): gpu(i, isqrt(4 * i) // 12, isqrt(4 * i) // 3, isqrt(4 * i)) for i in range(1024)
        },
        "1,024: anywhere, some in groups": anywhere(1024),
        "1,024: 512 groups of two": {str(i): gpu(i, i // 512, i // 32, i // 2, group=i // 2) for i in range(1024)},
        "1,024: groups of one to nine": grouped(1024),
    }
    print("| devices | policy | slowest size | fastest ms | choice alone | median ms |")
    print("|---|---|---|---|---|---|")
    for name, devices in shapes.items():
        devices = with_mates(devices)
        for policy in Policy:
            times = await timed(devices, policy, calls)
            slowest = max(times, key=lambda size: min(times[size]))
            answers, choices = zip(*times[slowest], strict=True)
            figures = f"{min(answers):.2f} | {min(choices):.2f} | {median(answers):.2f}"
            print(f"| {name} | {policy} | {slowest} | {figures} |", flush=True)


def sizes(count: int) -> list[int]:
    if count <= 16:
        return list(range(1, count))
    return [1, 2, 8, 16, 33, 64, 128, 256, 384, 512, 640, 768, 896, 960, 991, 1016, 1023]


async def timed(devices: Mapping[str, Device], policy: Policy, calls: int) -> dict[int, list[tuple[float, float]]]:
    """Size -> the milliseconds of each answer and of the choice alone. Busy moments are shared: sizes take turns."""
    plugin, codec, available = servicer(devices, policy), MessageCodec(), list(devices)
    place_of = places_by_id(devices.values())
    times: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes(len(devices))}
    for size in [*times] * calls:
        container = v1beta1.ContainerPreferredAllocationRequest(available_device_i_ds=available, allocation_size=size)
        request = bytes(v1beta1.PreferredAllocationRequest(container_requests=[container]))
        started = time.thread_time()
        asked = codec.decode(request, v1beta1.PreferredAllocationRequest)
        codec.encode(await plugin.get_preferred_allocation(asked), v1beta1.PreferredAllocationResponse)
        answered = time.thread_time()
        prefer(devices, available=available, must_include=(), size=size, policy=policy, place_of=place_of)
        times[size].append(((answered - started) * 1000, (time.thread_time() - answered) * 1000))
    return times


def servicer(devices: Mapping[str, Device], policy: Policy) -> DevicePluginServicer:
    async def nothing(_: Any) -> Mapping[str, Objection]:
        return {}

    return DevicePluginServicer(
        resource=RESOURCE,
        registry=cast(Registry, SimpleNamespace(current=Inventory(resources={RESOURCE: tuple(devices.values())}))),
        policy=policy,
        consumer=Consumer.KATA,
        stream=nullcontext,
        why_not=nothing,
    )


def gpu(number: int, numa: int, host: int, switch: int, group: int | None = None) -> Device:
    """A GPU below a port of its own of a switch."""
    bridges = (
        f"pci{host:04x}:00",
        f"{host:04x}:00:01.0",
        f"{host:04x}:{switch:x}:up",
        f"{host:04x}:{switch:x}:{number}",
    )
    return Device(
        id=str(number),
        resource=RESOURCE,
        node=f"/dev/vfio/devices/vfio{number}",
        model="GPU",
        placements=(Placement(address=f"{host:04x}:{number:x}:00.0", numa_node=numa, bridges=bridges),),
        iommu_group=10_000 + number if group is None else group,
        health=HEALTHY,
    )


def anywhere(count: int) -> dict[str, Device]:
    random = Random(1)
    devices = {}
    for i in range(count):
        host = random.randrange(max(4, count // 40))
        group = random.randrange(count // 4) if random.random() < 0.3 else None
        devices[str(i)] = gpu(i, host // 2, host, random.randrange(4), group)
    return devices


def grouped(count: int) -> dict[str, Device]:
    """IOMMU groups of many sizes, of neighbours: the hardest to fit together."""
    random, devices = Random(1), dict[str, Device]()
    for group in range(count):
        for i in range(len(devices), min(count, len(devices) + random.randint(1, 9))):
            devices[str(i)] = gpu(i, i // 256, i // 32, i // 4, group)
    return devices


def with_mates(devices: Mapping[str, Device]) -> dict[str, Device]:
    groups: dict[int, list[str]] = {}
    for d in devices.values():
        groups.setdefault(d.iommu_group, []).append(d.id)
    return {i: replace(d, mates=tuple(m for m in groups[d.iommu_group] if m != i)) for i, d in devices.items()}


if __name__ == "__main__":
    main()
