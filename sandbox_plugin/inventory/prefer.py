"""Which devices a pod should get: the answer to GetPreferredAllocation.

The answer is the set, of the devices asked for, that is first by these, in this order:

1. It holds every device that must be included.
2. It splits the fewest IOMMU groups. A group is split when some of its available devices are taken, but not all: the
   kernel gives a group to one VM, so the others would be of no use to anybody.
3. `packed`: the least sum of distances (`topology.Link`) over all its pairs. `spread`: the greatest.
4. It leaves the best remainder: the fewest devices stranded in split groups; then, for `packed`, among the devices left
   the fewest pairs that are SYS, then NODE, then PHB, then PXB. That is best fit on each level: a node or switch that
   is nearly used up is finished before a whole one is broken into. For `spread` it is the most such pairs: what is left
   is evenly spread too.
5. The lowest numbers: of the sorted IDs, the first that differ.

Devices that cannot be given to a VM now are no part of this. Where there are not enough others, the answer is filled up
with them: the kubelet may know less than we do for a moment, and fills an answer that is too short at random.

How it is found: all of this is one number, a sum over the parts of the PCIe tree (`topology.places`), to which each
part contributes by how many of its devices are taken, and by nothing else. So the best set follows from the leaves up:
for each part, the best way to take one, two, three devices there. Nothing is left out and nothing is tried twice.
That is optimal for any request on up to 362 devices, and on 1,024 for those that take, or leave, at most 33 of them.
Beyond, two large parts share devices in one of three ways only (see `_merge_roughly`), which never comes out worse than
a greedy search that starts from the lowest number and takes the nearest device next (`spread`: the farthest).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add
from typing import NamedTuple

from sandbox_plugin.inventory.topology import Link, Place, places
from sandbox_plugin.model import Device, id_order
from sandbox_plugin.settings import Policy

EXACT = 1 << 15
"""Up to this product of devices taken and devices left the search is exact; it bounds the number of sums."""
_SMALL = 16
"""Beyond that, parts still share their devices exactly where one of them has at most so many costs to try."""


class InvalidRequest(ValueError):
    """No set of devices can be the answer. The message says why."""


def prefer(
    devices: Mapping[str, Device], *, available: Sequence[str], must_include: Sequence[str], size: int, policy: Policy
) -> tuple[str, ...]:
    """The IDs of the `size` devices to take: those of `must_include` first, both parts in the order of their IDs.

    `devices` are all devices of the resource by their ID. An ID that stands twice counts once; one in `must_include`
    counts as available; one that is not in `devices` is taken like an unhealthy one, after those.

    Raises `InvalidRequest` when there is no set of that size that holds `must_include`. The kubelet rejects the pod on
    an error, so whatever else may be wrong with the request is answered as well as can be.
    """
    forced = frozenset(must_include)
    candidates = sorted(forced.union(available), key=id_order)
    must = [i for i in candidates if i in forced]
    if size < len(must):
        raise InvalidRequest(f"{size} devices are asked for, but {len(must)} must be included")
    if size > len(candidates):
        raise InvalidRequest(f"{size} devices are asked for, but only {len(candidates)} are available")
    usable = [i for i in candidates if i in forced or (i in devices and devices[i].health.healthy)]
    missing = size - len(usable)
    if missing < 0:
        best = _choose(devices, usable, forced, size, policy)
        return (*must, *(i for i in best if i not in forced))
    last_resort = sorted(set(candidates).difference(usable), key=lambda i: (i not in devices, id_order(i)))
    return (*must, *(i for i in usable if i not in forced), *last_resort[:missing])


def _choose(
    devices: Mapping[str, Device], usable: Sequence[str], forced: frozenset[str], size: int, policy: Policy
) -> list[str]:
    """The best `size` of the usable devices, which are in the order of their IDs; less those that we do not know.

    A device that must be included and that we do not know is as far from one as from the other: it has no say.
    """
    ids = [i for i in usable if i in devices]
    place_of = dict(zip(devices, places(list(devices.values())), strict=True))
    members = [
        _Member(1 << bit, place_of[i], i in forced) for bit, i in zip(reversed(range(len(ids))), ids, strict=True)
    ]
    search = _Search(
        count=len(ids),
        size=size - (len(usable) - len(ids)),
        weights=_weights(len(ids), policy),
        pairs=list(accumulate(range(len(ids)), initial=0)),
    )
    taken = search.best(members)
    return [i for i, member in zip(ids, members, strict=True) if member.bit & taken]


class _Member(NamedTuple):
    """A device that may be taken. Of two, the greater is the one with the lower ID."""

    bit: int
    """Its place in the number of a set, the lowest ID highest: of two sets of a size, the greater number goes first."""
    place: Place
    forced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """What makes a set worse, as numbers so far apart that no amount of one outweighs a single one of the one before.

    What a set costs is the sum of these, less the set's own number, which thereby can be read from the cost.
    """

    split: int
    near: Sequence[int]
    """For each pair taken, by its link."""
    stranded: int
    left: Sequence[int]
    """For each pair left, by its link."""


def _weights(count: int, policy: Policy) -> _Weights:
    # No sum that the search compares, of any of these, differs by more than 10 * count**2.
    digit = (32 * count * count).bit_length()
    split, distance, stranded, sys, node, phb, pxb = (1 << (count + digit * n) for n in reversed(range(7)))
    sign = 1 if policy is Policy.PACKED else -1
    return _Weights(
        split=split,
        near=[sign * distance * level for level in range(max(Link) + 1)],
        stranded=stranded,
        # The number of all pairs left is given, so that of the nearest follows from the others. There is no link 0.
        left=[0, 0, sign * pxb, sign * phb, sign * node, sign * sys],
    )


class _Table(NamedTuple):
    """The least cost of taking so many devices of one part, for each number that the answer may take there."""

    total: int
    """The devices of that part,"""
    forced: int
    """of which so many must be taken."""
    first: int
    """How many devices the first cost is for; each of the next is for one more."""
    costs: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """One search: how many there are, how many are wanted, and what counts."""

    count: int
    size: int
    weights: _Weights
    pairs: Sequence[int]
    """How many pairs there are of so many devices, up to all of them."""

    def best(self, members: Sequence[_Member]) -> int:
        """The number of the best set. The members are in the order of their IDs."""
        (cost,) = self._inside(members, 0, Link.SYS).costs  # exactly `size` of them all is all that may be taken
        return -cost & ((1 << self.count) - 1)

    def _inside(self, members: Sequence[_Member], depth: int, level: Link) -> _Table:
        """The table of a part whose members share the first `depth` steps, without the cost of that part itself."""
        loose = []
        parts: dict[str, list[_Member]] = defaultdict(list)
        for member in members:
            if len(member.place) > depth:
                parts[member.place[depth].name].append(member)
            else:
                loose.append(member)
        tables = []
        for inside in parts.values():
            if len(inside) > 1:
                tables.append(self._part(inside, depth, level))
            else:
                loose += inside
        if loose:
            tables.append(self._alike(sorted(loose, reverse=True)))
        tables.sort(key=lambda t: not t.forced)
        while len(tables) > 1:
            merged = [self._merge(one, other) for one, other in zip(tables[::2], tables[1::2], strict=False)]
            tables = [*merged, *tables[len(merged) * 2 :]]
        return tables[0]

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

    def _alike(self, members: Sequence[_Member]) -> _Table:
        """Devices that differ in nothing but their number: those that must be taken first, then the lowest."""
        forced = [-m.bit for m in members if m.forced]
        costs = list(accumulate([*forced, *(-m.bit for m in members if not m.forced)], initial=0))
        wanted = self._wanted(len(members), len(forced))
        return _Table(len(members), len(forced), wanted.start, costs[wanted.start : wanted.stop])

    def _merge(self, one: _Table, other: _Table) -> _Table:
        """Two parts side by side: for each number, the cheapest way to share it between them."""
        total, forced = one.total + other.total, one.forced + other.forced
        wanted = self._wanted(total, forced)
        rough = self.size * (self.count - self.size) > EXACT and min(len(one.costs), len(other.costs)) > _SMALL
        share = _merge_roughly if rough else _merge_exactly
        return _Table(total, forced, wanted.start, share(one, other, wanted))

    def _wanted(self, total: int, forced: int) -> range:
        """How many devices of a part the answer may take, as far as what is elsewhere has to make up for the rest."""
        return range(max(forced, self.size - (self.count - total)), min(total, self.size) + 1)


def _merge_exactly(one: _Table, other: _Table, wanted: range) -> list[int]:
    """For each number the least of all sums: of the first part so many, of the other the rest."""
    costs, rests = one.costs, other.costs[::-1]
    end, span = len(costs), len(rests)
    merged = []
    # `more` devices beyond the first costs of both: costs[n] goes with that of the other part for `more - n`.
    for more in range(wanted.start - one.first - other.first, wanted.stop - one.first - other.first):
        low, high = more + 1 - span, more + 1
        skip = -low
        low, high = low if low > 0 else 0, high if high < end else end
        merged.append(min(map(add, costs[low:high], rests[low + skip : high + skip])))
    return merged


def _merge_roughly(one: _Table, other: _Table, wanted: range) -> list[int]:
    """For each number the least of three sums: as few of the first part as can be, as many, or what greedy takes.

    Greedy goes from each number to the next by the cheaper device. Where tables are convex, as in `spread` without
    groups, that is the least of all sums. In `packed` greedy fills one part before it begins the next, and then it is
    among the first two.
    """
    costs, rests = one.costs, other.costs
    end, span = len(costs) - 1, len(rests) - 1
    start = wanted.start - one.first - other.first
    greedy = min(range(max(0, start - span), min(end, start) + 1), key=lambda n: costs[n] + rests[start - n])
    merged = []
    for more in range(start, start + len(wanted)):
        low, high = more - span if more > span else 0, more if more < end else end
        greedy = greedy if greedy > low else low
        taken = costs[greedy] + rests[more - greedy]
        if greedy < high and (further := costs[greedy + 1] + rests[more - greedy - 1]) < taken:
            greedy, taken = greedy + 1, further
        merged.append(min(costs[low] + rests[more - low], costs[high] + rests[more - high], taken))
    return merged
