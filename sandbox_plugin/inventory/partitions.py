"""The fabric partitions of HGX boards: which GPUs get NVLink to each other when the Fabric Manager splits a board.

A board has eight GPUs, which it knows by module number. Its partitions are fixed: all eight, the two halves, four pairs
and single GPUs, each within the next larger one ("GPU Partitions" in NVIDIA's Fabric Manager User Guide). Module
numbers do not follow PCI addresses, so a file says which GPU is which: `parse_modules`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from sandbox_plugin.config.settings import Policy
from sandbox_plugin.inventory.topology import link, places_by_id
from sandbox_plugin.model import NVIDIA, Device, PciFunction, id_order

_ADDRESS = re.compile(r"([0-9a-f]{4,8})(:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])")
_BOARD = 8
_MOST_MODULES = 2 * _BOARD
"""A second HGX A100 board, and a single one that is strapped as the upper tray, has the numbers 9 to 16."""
_HALVES = ((1, 2, 3, 4), (5, 6, 7, 8))
_PAIRS = ((1, 2), (3, 4), (5, 6), (7, 8))
"""Of A100, B200 and B300."""
_HOPPER_PAIRS = ((1, 3), (2, 4), (5, 7), (6, 8))
"""Of H100, H200, H800 and H20."""
_HOPPER = 0x23
"""The upper half of the device IDs of all GH100."""


class Board(NamedTuple):
    """One board with its partitions. Sets of its GPUs are bit masks: bit 0 is the lowest module."""

    bits: Mapping[str, int]
    """PCI address of a GPU -> its bit."""
    partitions: Sequence[int]
    first: int = 1
    """Module number of its first GPU."""


def parse_modules(text: str) -> dict[str, int]:
    """Module numbers by PCI address, from JSON such as `{"0000:1b:00.0": 1, "00000000:DF:00.0": "8"}`.

    NVIDIA's tools write addresses with a domain of eight digits and in capitals; the result has them as sysfs does.
    Raises ValueError that says what is wrong.
    """
    try:
        pairs: Any = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(pairs, _Pairs):
        raise ValueError('it is not a JSON object such as {"0000:1b:00.0": 1}')
    modules: dict[str, int] = {}
    for key, value in pairs:
        address = _address(key)
        module = _module(key, value)
        if address in modules:
            raise ValueError(f"PCI address {address} is there twice")
        if module in modules.values():
            raise ValueError(f"two PCI addresses have module {module}")
        modules[address] = module
    return modules


class _Pairs(list[tuple[str, Any]]):
    """A JSON object, with what is there twice."""


def _address(text: str) -> str:
    if not (match := _ADDRESS.fullmatch(text.lower())):
        raise ValueError(f"{text[:40]!r} is not a PCI address such as '0000:1b:00.0'")
    return f"{int(match[1], 16):04x}{match[2]}"


def _module(key: str, value: Any) -> int:
    text = str(value) if type(value) in (int, str) else ""
    if not re.fullmatch("[0-9]{1,2}", text) or not 1 <= int(text) <= _MOST_MODULES:
        raise ValueError(f"the module of {key!r} is not a number from 1 to {_MOST_MODULES}")
    return int(text)


def boards(modules: Mapping[str, int], functions: Iterable[PciFunction]) -> tuple[Board, ...]:
    """The boards whose GPUs are among these functions. Of H100 and its kin the pairs are others than of the rest."""
    by_address = {f.address: f for f in functions}
    found = []
    for first in (1, 1 + _BOARD):
        bits = {
            address: 1 << (module - first)
            for address, module in modules.items()
            if first <= module < first + _BOARD and address in by_address
        }
        if bits:
            is_hopper = any(_is_hopper(by_address[address]) for address in bits)
            found.append(Board(bits, _partitions(_HOPPER_PAIRS if is_hopper else _PAIRS), first))
    return tuple(found)


def _is_hopper(function: PciFunction) -> bool:
    vendor, device = function.model_id
    return vendor == NVIDIA and device >> 8 == _HOPPER


def _partitions(pairs: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Largest first."""
    everything = tuple(range(1, _BOARD + 1))
    sets = (everything, *_HALVES, *pairs, *((module,) for module in everything))
    return tuple(sum(1 << (module - 1) for module in each) for each in sets)


def choose_partition(
    found: Sequence[Board],
    devices: Mapping[str, Device],
    usable: Collection[str],
    forced: frozenset[str],
    size: int,
    policy: Policy,
) -> list[str] | None:
    """The `size` usable devices of one board that are first by these, in this order; None: no board has so many.

    1. They hold all that is forced.
    2. They split the fewest IOMMU groups.
    3. They lie within the smallest partition: they are a whole one, where one of that size is free.
    4. They leave the most whole free partitions of eight GPUs, then of four, then of two, of all boards together.
    5. `packed`: the least sum of distances; `spread`: the greatest.
    6. The lowest IDs.
    """
    sets: list[tuple[tuple[Any, ...], tuple[str, ...]]] = []
    place_of = places_by_id(devices.values())
    sign = 1 if policy is Policy.PACKED else -1
    for board in found:
        bits = _bits_of(board, devices, usable)
        if not forced <= bits.keys():
            continue
        free = sum(bits.values())
        others = sorted(bits.keys() - forced, key=id_order)
        far = {pair: link(place_of[pair[0]], place_of[pair[1]]) for pair in combinations(sorted(bits), 2)}
        for more in combinations(others, max(0, size - len(forced))):
            ids = (*forced, *more)
            taken = sum(bits[i] for i in ids)
            key = (
                splits(devices, usable, ids),
                min(part.bit_count() for part in board.partitions if taken & ~part == 0),
                _broken(board, free, taken),
                sign * sum(far[pair] for pair in combinations(sorted(ids), 2)),
                sorted(map(id_order, ids)),
            )
            sets.append((key, ids))
    return list(min(sets)[1]) if sets else None


def splits(devices: Mapping[str, Device], usable: Collection[str], taken: Collection[str]) -> int:
    """How many IOMMU groups have usable devices among those taken, and others that are left."""
    shared = [i for i in usable if i in devices and devices[i].mates]
    everything = Counter(devices[i].iommu_group for i in shared)
    chosen = Counter(devices[i].iommu_group for i in shared if i in taken)
    return sum(chosen[group] < everything[group] for group in chosen)


def _bits_of(board: Board, devices: Mapping[str, Device], usable: Collection[str]) -> dict[str, int]:
    """The bits of the usable devices that are one GPU of this board. A group of several GPUs is no part of it."""
    found = {}
    for device_id in usable:
        if device_id in devices:
            bits = [board.bits[p.address] for p in devices[device_id].placements if p.address in board.bits]
            if len(bits) == 1:
                found[device_id] = bits[0]
    return found


def _broken(board: Board, free: int, taken: int) -> tuple[int, ...]:
    """How many whole free partitions these GPUs are of, the largest first: all others, also of other boards, stay."""
    broken = Counter(part.bit_count() for part in board.partitions if part & ~free == 0 and part & taken)
    return tuple(broken[size] for size in (8, 4, 2))
