#!/usr/bin/env python3
"""How long GetPreferredAllocation's answer takes to find. Kubelet admission waits for it.

    scripts/bench-prefer.py            a Markdown table: median and slowest of the calls, in milliseconds

Each request is asked for with everything available, for sizes from one to all but one; the slowest size is shown.
The shapes of 1,024 devices are made up; nothing of that size is known to exist.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from random import Random
from statistics import median

from sandbox_plugin.inventory.prefer import prefer
from sandbox_plugin.model import Device, Placement
from sandbox_plugin.settings import Policy


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--calls", type=int, default=15, help="calls for each size; default: 15")
    calls: int = parser.parse_args().calls
    shapes = {
        "8: two sockets, pairs on a switch": {str(i): gpu(i, i // 4, i // 2, i // 2) for i in range(8)},
        "16: two sockets, pairs on a switch": {str(i): gpu(i, i // 8, i // 4, i // 2) for i in range(16)},
        "16: anywhere, some in groups": anywhere(16),
        "1,024: two sockets, pairs on a switch": {str(i): gpu(i, i // 512, i // 32, i // 2) for i in range(1024)},
        "1,024: 128 nodes of 8": {str(i): gpu(i, i // 8, i // 4, i // 2) for i in range(1024)},
        "1,024: parts of all sizes": {
            str(i): gpu(i, isqrt(4 * i) // 12, isqrt(4 * i) // 3, isqrt(4 * i)) for i in range(1024)
        },
        "1,024: anywhere, some in groups": anywhere(1024),
        "1,024: 512 groups of two": {str(i): gpu(i, i // 512, i // 32, i // 2, group=i // 2) for i in range(1024)},
    }
    print("| devices | policy | slowest size | median ms | slowest ms |")
    print("|---|---|---|---|---|")
    for name, devices in shapes.items():
        devices = with_mates(devices)
        for policy in Policy:
            size, times = max(
                ((size, timed(devices, size, policy, calls)) for size in sizes(len(devices))),
                key=lambda found: median(found[1]),
            )
            print(f"| {name} | {policy} | {size} | {median(times):.2f} | {max(times):.2f} |", flush=True)


def sizes(count: int) -> list[int]:
    if count <= 16:
        return list(range(1, count))
    return [1, 2, 8, 16, 32, 33, 34, 64, 128, 256, 512, 768, 960, 992, 1016, 1023]


def timed(devices: Mapping[str, Device], size: int, policy: Policy, calls: int) -> list[float]:
    available, times = list(devices), []
    for _ in range(calls):
        started = time.perf_counter()
        prefer(devices, available=available, must_include=(), size=size, policy=policy)
        times.append((time.perf_counter() - started) * 1000)
    return times


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
        resource="nvidia.com/pgpu",
        node=f"/dev/vfio/devices/vfio{number}",
        model="GPU",
        placements=(Placement(address=f"{host:04x}:{number:x}:00.0", numa_node=numa, bridges=bridges),),
        iommu_group=10_000 + number if group is None else group,
    )


def anywhere(count: int) -> dict[str, Device]:
    random = Random(1)
    devices = {}
    for i in range(count):
        host = random.randrange(max(4, count // 40))
        group = random.randrange(count // 4) if random.random() < 0.3 else None
        devices[str(i)] = gpu(i, host // 2, host, random.randrange(4), group)
    return devices


def with_mates(devices: Mapping[str, Device]) -> dict[str, Device]:
    groups: dict[int, list[str]] = {}
    for d in devices.values():
        groups.setdefault(d.iommu_group, []).append(d.id)
    return {i: replace(d, mates=tuple(m for m in groups[d.iommu_group] if m != i)) for i, d in devices.items()}


if __name__ == "__main__":
    main()
