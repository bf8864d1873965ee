#!/usr/bin/env python3
"""How long GetPreferredAllocation takes to answer, from the bytes of the request to those of the answer.

    scripts/bench-prefer.py            a Markdown table, in milliseconds

Kubelet admission waits for the answer. Only the way through gRPC and the socket is not in these times. They are CPU
time, which other work on the machine disturbs little; nothing here waits. Everything is available, and the sizes asked
for go from one to all but one. The table shows the size that takes longest, and of that the fastest and the median
call. The hosts of 1,024 devices are generated; nothing of that size is known to exist.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from random import Random
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import structlog

from sandbox_plugin.api import v1beta1
from sandbox_plugin.config.settings import Consumer, Policy
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.kubelet.servicer import DevicePluginServicer
from sandbox_plugin.model import HEALTHY, Device, Objection, Placement
from sandbox_plugin.registry import Registry
from sandbox_plugin.rpc.codec import MessageCodec

RESOURCE = "nvidia.com/pgpu"
SIZES = (1, 2, 3, 4, 6, 7, 8, 12, 15, 64, 256, 512, 768, 960, 1023)
"""That are asked for; of each host those that are smaller than it is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--calls", type=int, default=15, help="calls for each size; default: 15")
    # As in the daemon at its usual level: what is logged for each answer is not even put together.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("info"))
    asyncio.run(bench(parser.parse_args().calls))


async def bench(calls: int) -> None:
    shapes = {
        "8 on two sockets, pairs on switches": [gpu(i, i // 4, i // 2, i // 2) for i in range(8)],
        "16 on two sockets, pairs on switches": [gpu(i, i // 8, i // 4, i // 2) for i in range(16)],
        "16 anywhere, some in IOMMU groups": anywhere(16),
        "1,024 on two sockets, pairs on switches": [gpu(i, i // 512, i // 32, i // 2) for i in range(1024)],
        "1,024 on 128 NUMA nodes of 8": [gpu(i, i // 8, i // 4, i // 2) for i in range(1024)],
        "1,024 anywhere, some in groups": anywhere(1024),
        "1,024 in groups of one to nine": grouped(1024),
    }
    print("| devices | policy | slowest size | fastest ms | median ms |")
    print("|---|---|---|---|---|")
    for name, devices in shapes.items():
        for policy in Policy:
            times = await timed(with_mates(devices), policy, calls)
            slowest = max(times, key=lambda size: min(times[size]))
            figures = f"{min(times[slowest]):.2f} | {median(times[slowest]):.2f}"
            print(f"| {name} | {policy} | {slowest} | {figures} |", flush=True)


async def timed(devices: Mapping[str, Device], policy: Policy, calls: int) -> dict[int, list[float]]:
    """Size -> the milliseconds of each answer. Busy moments are shared: sizes take turns."""
    plugin, codec = servicer(devices, policy), MessageCodec()
    times: dict[int, list[float]] = {size: [] for size in SIZES if size < len(devices)}
    for size in [*times] * calls:
        container = v1beta1.ContainerPreferredAllocationRequest(
            available_device_i_ds=list(devices), allocation_size=size
        )
        request = bytes(v1beta1.PreferredAllocationRequest(container_requests=[container]))
        started = time.thread_time()
        asked = codec.decode(request, v1beta1.PreferredAllocationRequest)
        codec.encode(await plugin.get_preferred_allocation(asked), v1beta1.PreferredAllocationResponse)
        times[size].append((time.thread_time() - started) * 1000)
    return times


def servicer(devices: Mapping[str, Device], policy: Policy) -> DevicePluginServicer:
    async def nothing(*_: Any) -> Mapping[str, Objection]:
        return {}

    return DevicePluginServicer(
        resource=RESOURCE,
        registry=cast(Registry, SimpleNamespace(current=Inventory(resources={RESOURCE: tuple(devices.values())}))),
        policy=policy,
        consumer=Consumer.KATA,
        stream=nullcontext,
        last_look=nothing,
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


def anywhere(count: int) -> list[Device]:
    random = Random(1)
    devices = []
    for i in range(count):
        host = random.randrange(max(4, count // 40))
        group = random.randrange(count // 4) if random.random() < 0.3 else None
        devices.append(gpu(i, host // 2, host, random.randrange(4), group))
    return devices


def grouped(count: int) -> list[Device]:
    """IOMMU groups of many sizes, of neighbours: the hardest to fit together."""
    random, devices = Random(1), list[Device]()
    for group in range(count):
        for i in range(len(devices), min(count, len(devices) + random.randint(1, 9))):
            devices.append(gpu(i, i // 256, i // 32, i // 4, group))
    return devices


def with_mates(devices: Sequence[Device]) -> dict[str, Device]:
    """By ID, each knowing the others of its IOMMU group."""
    groups: dict[int, list[str]] = {}
    for d in devices:
        groups.setdefault(d.iommu_group, []).append(d.id)
    return {d.id: d._replace(mates=tuple(m for m in groups[d.iommu_group] if m != d.id)) for d in devices}


if __name__ == "__main__":
    main()
