"""Which devices a pod should get: the answer to GetPreferredAllocation.

The answer is the set, of the devices asked for, that is first by these, in this order:

1. It holds every device that must be included.
2. It splits the fewest IOMMU groups. A group is split when some of its available devices are taken, but not all: the
   kernel gives a group to one VM, so the others would be of no use to anybody.
3. `packed`: the least sum of distances (`topology.Link`) over all its pairs. `spread`: the greatest.
4. `spread`: the greatest sum of distances to the devices in use, which are the healthy ones that are not available.
   (An unhealthy one does not count: the kubelet does not say whether a pod has it, and it may be gone.)
5. It leaves the best remainder: the fewest devices stranded in split groups; then, for `packed`, among the devices left
   the most pairs that are PIX, then PXB, then PHB, then NODE. That is best fit: a device whose neighbours are taken is
   used up before a pair on a switch is broken up. For `spread` it is the fewest such pairs, so that what is left is far
   apart too.
6. The lowest numbers: of the sorted IDs, the first that differ.

Devices that cannot be given to a VM now are no part of this. Where there are not enough others, the answer is filled up
with them: the kubelet may know less than we do for a moment, and fills an answer that is too short at random.

How it is found: all of this is one number, a sum over the devices taken and over the parts of the PCIe tree
(`topology.places`), to which each part contributes by how many of its devices are taken, and by nothing else. So the
best set follows from the leaves up: for each part, the least cost of taking one, two, three devices there. Of two parts
side by side every way to share them is tried. So the answer is the best of all sets, of any number of devices.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add
from typing import NamedTuple

from sandbox_plugin.config.settings import Policy
from sandbox_plugin.inventory.partitions import Board, choose_partition, splits
from sandbox_plugin.inventory.topology import Link, TreePlace, places_by_id
from sandbox_plugin.model import Device, id_order


class InvalidRequest(ValueError):
    """No set of devices can be the answer. The message says why."""


def prefer(
    devices: Mapping[str, Device],
    *,
    available: Sequence[str],
    must_include: Sequence[str],
    size: int,
    policy: Policy,
    boards: Sequence[Board] = (),
) -> tuple[str, ...]:
    """The IDs of the `size` devices to take: those of `must_include` first, both parts in the order of their IDs.

    `devices` are all devices of the resource by their ID. An ID that stands twice counts once; one in `must_include`
    counts as available; one that is not in `devices` is taken like an unhealthy one, after those.

    Where `boards` are known, the answer is a whole fabric partition or within the smallest one that holds it
    (`choose_partition`), unless that would split more IOMMU groups.

    Raises `InvalidRequest` when there is no set of that size that holds `must_include`. The kubelet rejects the pod on
    an error, so whatever else may be wrong with the request is answered as well as can be.
    """
    forced = frozenset(must_include)
    candidates = sorted(forced.union(available), key=id_order)
    must = [i for i in candidates if i in forced]
    if size < 0:
        raise InvalidRequest(f"{size} devices are asked for: the size is negative")
    if size < len(must):
        raise InvalidRequest(f"{size} devices are asked for, but {len(must)} must be included")
    if size > len(candidates):
        raise InvalidRequest(f"{size} devices are asked for, but only {len(candidates)} are available")
    usable = [i for i in candidates if i in forced or (i in devices and devices[i].health.healthy)]
    missing = size - len(usable)
    if missing < 0:
        best = _choose(devices, places_by_id(devices.values()), usable, forced, size, policy)
        within = choose_partition(boards, devices, usable, forced, size, policy) if boards else None
        if within is not None and splits(devices, usable, within) <= splits(devices, usable, best):
            best = within
        return (*must, *(i for i in best if i not in forced))
    last_resort = sorted(set(candidates).difference(usable), key=lambda i: (i not in devices, id_order(i)))
    return (*must, *(i for i in usable if i not in forced), *last_resort[:missing])


def _choose(
    devices: Mapping[str, Device],
    place_of: Mapping[str, TreePlace],
    usable: Sequence[str],
    forced: frozenset[str],
    size: int,
    policy: Policy,
) -> list[str]:
    """The best `size` of the usable devices, which are in the order of their IDs; less those that we do not know.

    A device that must be included and that we do not know is as far from one as from the other: it has no say.
    """
    ids = [i for i in usable if i in devices]
    weights = _weights(len(ids), len(devices), policy)
    own = [0] * len(ids)
    offered = set(ids)
    in_use = [place_of[i] for i, device in devices.items() if device.health.healthy and i not in offered]
    if weights.near_in_use and in_use:
        own = [weights.near_in_use * near for near in _nearness([place_of[i] for i in ids], in_use)]
    members = [
        _Member(place_of[i], i in forced, cost - (1 << bit))
        for i, cost, bit in zip(ids, own, reversed(range(len(ids))), strict=True)
    ]
    search = _Search(
        count=len(ids),
        forced=sum(member.forced for member in members),
        size=size - (len(usable) - len(ids)),
        weights=weights,
        pairs=list(accumulate(range(len(ids)), initial=0)),
    )
    taken = search.best(members)
    return [i for i, bit in zip(ids, reversed(range(len(ids))), strict=True) if taken >> bit & 1]


def _nearness(asked: Sequence[TreePlace], others: Sequence[TreePlace]) -> list[int]:
    """For each place asked for: how much nearer than SYS the others are to it, all together."""
    inside = Counter(place[:depth] for place in others for depth in range(1, len(place) + 1))

    def nearness(place: TreePlace) -> int:
        total, outer = 0, Link.SYS
        for depth, step in enumerate(place, 1):
            if not (count := inside[place[:depth]]):
                break
            total += (outer - step.level) * count
            outer = step.level
        return total

    return [nearness(place) for place in asked]


class _Member(NamedTuple):
    """A device that may be taken."""

    place: TreePlace
    forced: bool
    cost: int
    """What it costs wherever it is: its nearness to the devices in use, less its place in the number of a set."""


class _Weights(NamedTuple):
    """What makes a set worse, as numbers so far apart that no amount of one outweighs a single one of the one before.

    What a set costs is the sum of these, less the set's own number, which thereby can be read from the cost. In that
    number the lowest ID is the highest bit: of two sets of one size, the one with the greater number goes first.
    """

    split: int
    near: Sequence[int]
    """For each pair taken, by its link."""
    near_in_use: int
    """For each link that a device taken is nearer to one in use than SYS."""
    stranded: int
    left: Sequence[int]
    """For each pair left, by its link."""


def _weights(count: int, everything: int, policy: Policy) -> _Weights:
    # No sum that the search compares, of any of these, differs by more than 10 * everything**2.
    digit = (32 * everything * everything).bit_length()
    split, distance, in_use, stranded, *left = (1 << (count + digit * n) for n in reversed(range(8)))
    sign = 1 if policy is Policy.PACKED else -1
    return _Weights(
        split=split,
        near=[sign * distance * level for level in range(max(Link) + 1)],
        near_in_use=0 if policy is Policy.PACKED else in_use,
        stranded=stranded,
        left=[0, *(-sign * weight for weight in left), 0],
    )


class _Table(NamedTuple):
    """The least cost of taking so many devices of one part, for each number that the answer may take there."""

    total: int
    """The devices of that part,"""
    forced: int
    """of which so many must be taken."""
    first: int
    """How many devices the first cost is for; each of the next is for one more."""
    costs: Sequence[int]


@dataclass(kw_only=True, eq=False, repr=False)
class _Search:
    """One search: how many there are, how many of them must be taken, how many are wanted, and what counts."""

    count: int
    forced: int
    size: int
    weights: _Weights
    pairs: Sequence[int]
    """How many pairs there are of so many devices, up to all of them."""

    def best(self, members: Sequence[_Member]) -> int:
        """The number of the best set."""
        (cost,) = self._inside(members, 0, Link.SYS).costs  # exactly `size` of them all is all that may be taken
        return -cost & ((1 << self.count) - 1)

    def _inside(self, members: Sequence[_Member], depth: int, level: Link) -> _Table:
        """The table of a part whose members share the first `depth` steps, without the cost of that part itself."""
        loose = []
        parts: dict[str, list[_Member]] = defaultdict(list)
        for member in members:
            place = member.place
            if len(place) > depth:
                parts[place[depth].name].append(member)
            else:
                loose.append(member)
        tables = []
        for inside in parts.values():
            if len(inside) > 1:
                tables.append(self._part(inside, depth, level))
            else:
                loose += inside
        if loose:
            tables.append(self._single(loose))
        return self._side_by_side(tables)

    def _part(self, members: Sequence[_Member], depth: int, outer: Link) -> _Table:
        """The table of one part with its own cost: how much nearer than in the part around it the pairs within are.

        Summed over all parts that a pair shares that is its distance, less that of the widest part, which is the same
        for every set of one size.
        """
        step = members[0].place[depth]
        total, forced, first, costs = self._inside(members, depth + 1, step.level)
        if step.group:
            split, stranded = self.weights.split, self.weights.stranded
            whole = [c + split + (total - n) * stranded if 0 < n < total else c for n, c in enumerate(costs, first)]
        else:
            near = self.weights.near[step.level] - self.weights.near[outer]
            left = self.weights.left[step.level] - self.weights.left[outer]
            pairs = self.pairs
            whole = [c + near * pairs[n] + left * pairs[total - n] for n, c in enumerate(costs, first)]
        return _Table(total, forced, first, whole)

    def _single(self, members: Sequence[_Member]) -> _Table:
        """Devices that share no part with each other: those that must be taken, then always the cheapest."""
        forced = [m.cost for m in members if m.forced]
        free = sorted(m.cost for m in members if not m.forced)
        return self._table(len(members), len(forced), len(forced), list(accumulate(free, initial=sum(forced))))

    def _side_by_side(self, tables: Sequence[_Table]) -> _Table:
        """Several parts: for each number, the cheapest way to share it between them. The smallest two come first."""
        rest = sorted(tables, key=_length)
        while len(rest) > 1:
            one, other, *rest = rest
            insort(rest, self._merge_two(one, other), key=_length)
        return rest[0]

    def _merge_two(self, one: _Table, other: _Table) -> _Table:
        total, forced, first = one.total + other.total, one.forced + other.forced, one.first + other.first
        wanted = self._wanted(total, forced)
        costs = _least_sums(one.costs, other.costs, range(wanted.start - first, wanted.stop - first))
        return _Table(total, forced, wanted.start, costs)

    def _table(self, total: int, forced: int, first: int, costs: Sequence[int]) -> _Table:
        """Only what the answer may take of these costs, of which the first is for so many devices."""
        wanted = self._wanted(total, forced)
        return _Table(total, forced, wanted.start, costs[wanted.start - first : wanted.stop - first])

    def _wanted(self, total: int, forced: int) -> range:
        """How many devices of a part the answer may take, so that elsewhere there are enough, and not too many."""
        least, most = self.size - (self.count - total), self.size - (self.forced - forced)
        return range(max(forced, least), min(total, most) + 1)


def _least_sums(one: Sequence[int], other: Sequence[int], wanted: range) -> list[int]:
    """For each m of `wanted` the least `one[n] + other[m - n]`."""
    rests, span = other[::-1], len(other)  # one[0] goes with rests[span - 1 - m]; where either ends, so does the map
    return [min(map(add, one[max(0, m - span + 1) :], rests[max(0, span - 1 - m) :])) for m in wanted]


def _length(table: _Table) -> int:
    return len(table.costs)
