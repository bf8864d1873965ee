#!/usr/bin/env python3
"""What allocation policies do to a busy node over time: VMs come and go, and each policy replays the same ones.

    scripts/simulate-allocation.py                                   the figures, as Markdown tables
    scripts/simulate-allocation.py --svg docs/topology.svg           the plot too

VMs of 1, 2, 4 and 8 GPUs arrive at random and stay for a random time (both exponential). One that finds too few free
GPUs goes to another node, which no policy can change: whether it fits depends on how many are free, not on which. So
all policies serve the same VMs at the same times, and differ only in the GPUs that they give them:

    packed, spread   GetPreferredAllocation's answer, from the daemon's own function
    lowest           the kubelet without preferred allocation, as if it took the lowest free number
    random           the kubelet without preferred allocation as it is: any free GPUs

The figures are the same each time. The nodes are presets of the fake node, read as the daemon reads a host.
"""

from __future__ import annotations

import argparse
import heapq
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import fmean

from charts import Axis, chart, document, legend, text

from sandbox_plugin.config.settings import Policy
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import scan_now
from sandbox_plugin.inventory.advance import advance
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.prefer import prefer
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory, Signals
from sandbox_plugin.inventory.topology import matrix
from sandbox_plugin.model import Device

NODES = ("hgx-h100", "rtx-pro-6000", "uneven")
LOADS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
"""GPUs that the VMs ask for on average, if all of them fitted, as a share of the node's."""
TABLE_LOAD = 0.8
MIX = {1: 0.4, 2: 0.3, 4: 0.25, 8: 0.05}
"""VM size -> its share of the arrivals."""
POLICIES = ("packed", "spread", "lowest", "random")

ARRIVALS, SEED = 20_000, 1
"""VMs that come in each replay; where the random numbers begin."""

Choose = Callable[[tuple[str, ...], int, Random], tuple[str, ...]]
"""From the free IDs, in order, a VM's own."""


@dataclass(frozen=True, slots=True)
class Vm:
    """One VM that found enough free GPUs. Times are in mean stays."""

    arrives: float
    leaves: float
    size: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the VMs of one replay fared."""

    distance: float
    """Mean over the VMs of 2 and 4 GPUs of the mean distance between their GPUs (8 GPUs are the whole node)."""
    got_one_numa: float
    """Share of 4-GPU VMs that got all four GPUs on one NUMA node."""
    one_numa_free: float
    """Share of 4-GPU VMs that came while four GPUs of one NUMA node were free, so that no more could get them."""


Results = Mapping[tuple[str, float, str], Outcome]
"""By preset, load and policy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--svg", type=Path, help="also draw the plot into this file")
    args = parser.parse_args()
    results = simulate(LOADS)
    print(tables(results))
    if args.svg:
        args.svg.write_text(plot(results))


def simulate(loads: Sequence[float]) -> Results:
    """Each load of each node has random numbers of its own, so its figures do not depend on the other loads."""
    results = {}
    for preset in NODES:
        devices = gpus_of(preset)
        for load in loads:
            vms = arrivals(len(devices), load, Random(f"{SEED} {preset} {load}"))
            for policy in POLICIES:
                results[preset, load, policy] = replay(devices, vms, policy, Random(SEED))
    return results


def gpus_of(preset: str) -> dict[str, Device]:
    """The GPUs of a preset as the daemon would list them, in the order of their IDs."""
    with tempfile.TemporaryDirectory() as folder:
        FakeNode.create(Path(folder) / "node", preset)
        facts = scan_now(HostPaths(Path(folder) / "node"))
    inventory, _ = advance(Inventory(), facts, Signals(), time.monotonic(), Rules(names=ModelNames.load()))
    return {d.id: d for d in inventory.resources["nvidia.com/pgpu"]}


def arrivals(gpus: int, load: float, random: Random) -> list[Vm]:
    """The VMs that fit, of all that come."""
    per_stay = load * gpus / sum(size * share for size, share in MIX.items())
    now, free, leaving, served = 0.0, gpus, list[tuple[float, int]](), []
    for _ in range(ARRIVALS):
        now += random.expovariate(per_stay)
        while leaving and leaving[0][0] <= now:
            free += heapq.heappop(leaving)[1]
        size = random.choices(list(MIX), list(MIX.values()))[0]
        leaves = now + random.expovariate(1)
        if size <= free:
            free -= size
            heapq.heappush(leaving, (leaves, size))
            served.append(Vm(now, leaves, size))
    return served


def replay(devices: Mapping[str, Device], vms: Sequence[Vm], policy: str, random: Random) -> Outcome:
    """The same VMs, served by one policy."""
    choose = chooser(devices, policy)
    apart = pair_distances(devices)
    order = {device_id: n for n, device_id in enumerate(devices)}
    free = set(devices)
    leaving: list[tuple[float, tuple[str, ...]]] = []
    distances, got, free_then = [], [], []
    for vm in vms:
        while leaving and leaving[0][0] <= vm.arrives:
            free.update(heapq.heappop(leaving)[1])
        chosen = choose(tuple(sorted(free, key=order.__getitem__)), vm.size, random)
        if vm.size in (2, 4):
            distances.append(fmean(apart[a, b] for a, b in combinations(sorted(chosen, key=order.__getitem__), 2)))
        if vm.size == 4:
            got.append(most_on_one_numa(devices, chosen) == 4)
            free_then.append(most_on_one_numa(devices, free) >= 4)
        free.difference_update(chosen)
        heapq.heappush(leaving, (vm.leaves, chosen))
    return Outcome(fmean(distances), fmean(got), fmean(free_then))


def chooser(devices: Mapping[str, Device], policy: str) -> Choose:
    if policy == "lowest":
        return lambda free, size, random: free[:size]
    if policy == "random":
        return lambda free, size, random: tuple(random.sample(free, size))

    @cache
    def preferred(free: tuple[str, ...], size: int) -> tuple[str, ...]:
        return prefer(devices, available=free, must_include=(), size=size, policy=Policy(policy))

    return lambda free, size, random: preferred(free, size)


def pair_distances(devices: Mapping[str, Device]) -> dict[tuple[str, str], int]:
    rows = zip(devices, matrix(list(devices.values())), strict=True)
    return {(a, b): int(link) for a, row in rows for b, link in zip(devices, row, strict=True) if link is not None}


def most_on_one_numa(devices: Mapping[str, Device], ids: Sequence[str] | set[str]) -> int:
    numa = [devices[i].numa_nodes for i in ids]
    return max((numa.count(each) for each in numa), default=0)


def tables(results: Results) -> str:
    """The figures at one load, as Markdown."""
    lines = []
    for preset in NODES:
        lines += [
            f"| `{preset}` at load {TABLE_LOAD:g} | mean distance | 4-GPU VMs on one NUMA node | possible |",
            "|---|---|---|---|",
        ]
        for policy in POLICIES:
            outcome = results[preset, TABLE_LOAD, policy]
            shares = f"{outcome.got_one_numa:.1%} | {outcome.one_numa_free:.1%}"
            lines.append(f"| {policy} | {outcome.distance:.2f} | {shares} |")
        lines.append("")
    return "\n".join(lines)


# The plot: for each node two charts over the load

COLOURS = {"packed": "#0b7a4b", "spread": "#b5520a", "lowest": "#3a62b8", "random": "#8a8f98"}
WIDTH, HEIGHT = 880, 772
PLOT = (340, 150)
LEFT, TOP, COLUMN, ROW = 64, 136, 428, 212


def plot(results: Results) -> str:
    parts = [
        text(24, 34, "The same VMs, placed by four policies", size=18, bold=True),
        text(
            24,
            55,
            "VMs of 1, 2, 4 and 8 GPUs come and go, at loads from 0.2 to 1.2 (GPUs asked for, as a share of all)",
            grey=True,
        ),
        *legend(WIDTH - 24 - 4 * 92, 29, COLOURS, 92),
        text(LEFT - 40, TOP - 42, "Mean distance inside VMs (lower is better)", bold=True),
        text(LEFT - 40 + COLUMN, TOP - 42, "4-GPU VMs on one NUMA node (higher is better)", bold=True),
    ]
    loads = Axis(low=LOADS[0], high=LOADS[-1], ticks={load: f"{load:.1f}" for load in LOADS})
    levels = Axis(low=1, high=5, ticks={1: "1 PIX", 2: "2 PXB", 3: "3 PHB", 4: "4 NODE", 5: "5 SYS"})
    share = Axis(low=0, high=1, ticks={n / 4: f"{n * 25} %" for n in range(5)})
    for row, preset in enumerate(NODES):
        y = TOP + row * ROW
        distances = {p: [(load, results[preset, load, p].distance) for load in LOADS] for p in POLICIES}
        shares = {p: [(load, results[preset, load, p].got_one_numa) for load in LOADS] for p in POLICIES}
        parts += chart((LEFT, y), PLOT, preset, (loads, levels), distances, COLOURS)
        parts += chart((LEFT + COLUMN, y), PLOT, preset, (loads, share), shares, COLOURS)
    return document(WIDTH, HEIGHT, parts)


if __name__ == "__main__":
    main()
