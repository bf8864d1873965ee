"""Where devices sit in the PCIe tree, and how far that puts them apart.

Apart from `prefer` because people ask the same question without choosing anything: `list --topology` prints it.

A device's place is its way down from the system: NUMA node, host bridge, root port, switch. Two devices are as far
apart as the last of these parts that they share, so distances form a tree: if A is near B and B near C, A is no farther
from C than the worse of the two. `prefer` rests on that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from functools import cache
from typing import NamedTuple

from sandbox_plugin.model import Device, Placement


class Link(IntEnum):
    """What a transfer between two devices crosses, in the words of `nvidia-smi topo -m`; the value is its weight.

    sysfs gives a function's bridges as `pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:02.0`: host bridge, root port,
    then two for each switch, its upstream port and the downstream port that leads on. So:

    - PIX: both are below the same switch, at any of its ports (a switch counts as one bridge, although sysfs shows two
      or three port functions of it on the way), or below the same root port or in the same slot with no switch in
      between. Functions of one board are PIX, and so are mediated devices of one GPU.
    - PXB: the same root port, but more than one switch on the way.
    - PHB: the same host bridge, different root ports.
    - NODE: the same NUMA node, different host bridges.
    - SYS: different NUMA nodes, or the NUMA node is unknown.
    """

    PIX = 1
    PXB = 2
    PHB = 3
    NODE = 4
    SYS = 5


LEGEND: Mapping[Link, str] = {
    Link.PIX: "at most one PCIe switch",
    Link.PXB: "several PCIe switches, the same root port",
    Link.PHB: "the same PCIe host bridge",
    Link.NODE: "crosses host bridges within a NUMA node",
    Link.SYS: "crosses NUMA nodes, or the NUMA node is unknown",
}


class Step(NamedTuple):
    """A part of the host that a device sits in."""

    level: Link
    """How far apart two devices are whose places have this step in common, but none further down."""
    name: str
    group: bool = False
    """An IOMMU group of several devices. It is not a place by itself: its level is that of the step above."""


TreePlace = tuple[Step, ...]
"""From the widest part to the narrowest. Two devices with the same place are as close as its last step says."""


def link(one: TreePlace, other: TreePlace) -> Link:
    """How far apart two different devices are."""
    shared = _common([one, other])
    return shared[-1].level if shared else Link.SYS


def places(devices: Sequence[Device]) -> tuple[TreePlace, ...]:
    """The place of each device among all of them, in their order.

    A device of several functions sits in the narrowest part that holds all of them, and so does an IOMMU group of
    several devices: the slowest pair of functions counts, since a VM gets them all. Thus a node makes the same choices
    on a kernel with cdevs, where a group is many devices, and on one without, where it is one.

    A host bridge belongs to one NUMA node (the kernel hands the bridge's down to every function below: pcibus_to_node
    in drivers/pci/probe.c). So a function whose NUMA node is unknown is in the one that another function below the same
    host bridge names. Where they contradict each other, which takes a write to `numa_node`, the lowest counts. If none
    names one, only the way up to the host bridge counts.
    """
    numa_of = _numa_of_host_bridges(devices)
    upper_steps = cache(_upper_steps)

    @cache
    def function_place(numa: int | None, upper: tuple[str, ...], nearest: str) -> TreePlace:
        return (*upper_steps(numa, upper), Step(Link.PIX, nearest))

    own = [_common([function_place(*_whereabouts(p, numa_of)) for p in device.placements]) for device in devices]
    mates: dict[int, list[TreePlace]] = defaultdict(list)
    for device, place in zip(devices, own, strict=True):
        if device.mates:
            mates[device.iommu_group].append(place)
    groups = {number: _group_place(number, inside) for number, inside in mates.items() if len(inside) > 1}
    return tuple(
        # The group is one step more, in between what its devices share and what they do not.
        (*groups[device.iommu_group], *place[len(groups[device.iommu_group]) - 1 :])
        if device.mates and device.iommu_group in groups
        else place
        for device, place in zip(devices, own, strict=True)
    )


def places_by_id(devices: Iterable[Device]) -> dict[str, TreePlace]:
    """The place of each device, by its ID."""
    listed = list(devices)
    return {device.id: place for device, place in zip(listed, places(listed), strict=True)}


def matrix(devices: Sequence[Device]) -> tuple[tuple[Link | None, ...], ...]:
    """The links between all devices, in their order; None from a device to itself."""
    placed = places(devices)
    return tuple(
        tuple(None if row == column else link(placed[row], placed[column]) for column in range(len(placed)))
        for row in range(len(placed))
    )


def matrix_lines(devices: Sequence[Device], width: int | None = None) -> list[str]:
    """The matrix as `nvidia-smi topo -m` prints one: a header of device IDs, a line for each device, NUMA node last.

    Where lines must not be wider than `width`, the NUMA nodes and addresses are left out, and what is still too wide
    is printed as several matrices, one below the other, each with some of the columns.
    """
    rows = [["", *(d.id for d in devices), "NUMA", "PCI ADDRESS"]]
    for device, links in zip(devices, matrix(devices), strict=True):
        numa = ",".join(map(str, device.numa_nodes)) or "-"
        rows.append([device.id, *("X" if a is None else a.name for a in links), numa, device.address])
    whole = _aligned(rows)
    if width is None or max(map(len, whole)) <= width:
        return whole
    columns = list(zip(*(row[:-2] for row in rows), strict=True))
    widths = [2 + max(map(len, column)) for column in columns]
    lines: list[str] = []
    first = 1
    while first < len(columns):
        end = first + 1
        while end < len(columns) and widths[0] + sum(widths[first : end + 1]) - 2 <= width:
            end += 1
        part = _aligned([list(row) for row in zip(columns[0], *columns[first:end], strict=True)])
        lines += ["", *part] if lines else part
        first = end
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def legend_lines() -> list[str]:
    """What the matrix's words mean, nearest first."""
    return ["X     the device itself", *(f"{a.name:<4}  {words}" for a, words in LEGEND.items())]


def _numa_of_host_bridges(devices: Sequence[Device]) -> dict[str, int]:
    numa_of: dict[str, int] = {}
    for device in devices:
        for placement in device.placements:
            bridges, numa = placement.bridges, placement.numa_node
            if bridges and numa is not None and numa <= numa_of.get(bridges[0], numa):
                numa_of[bridges[0]] = numa
    return numa_of


def _whereabouts(placement: Placement, numa_of: Mapping[str, int]) -> tuple[int | None, tuple[str, ...], str]:
    """NUMA node, host bridge and root port of a function, and what its neighbours at PIX share with it.

    That is the upstream port of its switch, or its root port, or its slot.
    """
    address, bridges = _pci_function(placement)
    numa = numa_of.get(bridges[0]) if bridges else placement.numa_node
    if len(bridges) > 2:
        return numa, bridges[:2], bridges[-2]
    if len(bridges) == 2:
        return numa, bridges, bridges[1]
    return numa, bridges, address.rpartition(".")[0]


def _pci_function(placement: Placement) -> tuple[str, tuple[str, ...]]:
    """The address of the function and the bridges above it.

    A mediated device is where the function is that carries it, the last on its way down. Its own address is a UUID.
    """
    address, bridges = placement.address, placement.bridges
    if ":" in address or not bridges:
        return address, bridges
    return bridges[-1], bridges[:-1]


def _upper_steps(numa: int | None, upper: tuple[str, ...]) -> TreePlace:
    """The steps of NUMA node, host bridge and root port, as far as there are any."""
    steps = () if numa is None else (Step(Link.NODE, f"NUMA node {numa}"),)
    return (*steps, *(Step(level, name) for level, name in zip((Link.PHB, Link.PXB), upper, strict=False)))


def _group_place(number: int, mates: Sequence[TreePlace]) -> TreePlace:
    shared = _common(mates)
    return (*shared, Step(shared[-1].level if shared else Link.SYS, f"group {number}", group=True))


def _common(places: Sequence[TreePlace]) -> TreePlace:
    """The steps that all of them begin with."""
    if len(places) < 2:
        return places[0] if places else ()
    # What the least and the greatest begin with, all that are sorted between them begin with.
    first, last = min(places), max(places)
    if first == last:
        return first
    depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:depth]
