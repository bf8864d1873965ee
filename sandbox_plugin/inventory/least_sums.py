"""The cheapest way to take things from several heaps, for every number of things.

A heap is a list: `costs[n]` is what it costs to take n things from it. Several heaps side by side are one heap again:
for each number, the cheapest way to take so many from all of them. For two heaps that is the least of all sums
`one[n] + other[m - n]`, which is known as min-plus convolution.

This is a module of its own because it is arithmetic and knows nothing of devices. Every answer is exact. The time to
try all sums grows with the square of the length, so most of them are left out where the shape of the heaps allows it:

- In a convex heap, each thing costs no less than the one before. From several convex heaps one always takes the
  cheapest next thing.
- Some heaps are best taken whole or not at all. Then at most one of them is taken in part.
- A heap has a bend where the next thing costs more than the last one did, and at both ends. If neither of two heaps is
  at a bend, things can be moved from one to the other, in one direction or the other, without a loss, until one of them
  is. So it is enough to try the bends of each heap with all of the other.

The first and the last are also true for every second thing, every third and so on: `stride`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, compress
from operator import add, ge, itemgetter, le, lt, sub


def least_sums(one: Sequence[int], other: Sequence[int], wanted: range) -> list[int]:
    """Two heaps side by side: for each m of `wanted` the least `one[n] + other[m - n]`."""
    if len(one) > len(other):
        one, other = other, one
    sums = len(one) * min(len(other), len(wanted))
    # What a way costs is counted in sums that could be made in the same time, as measured.
    for stride in range(1, 17):
        if 4 * stride * (len(one) + len(other)) + 45 * stride**2 > sums:
            break
        if is_convex(one, stride) and is_convex(other, stride):
            return _of_convex_classes(one, other, stride)[wanted.start : wanted.stop]
    for stride in (1, 2) if sums > 1000 else ():
        bends = _bends(one, stride), _bends(other, stride)
        if 1.4 * (len(bends[0]) * min(len(other), len(wanted)) + len(bends[1]) * len(one)) < sums:
            return _by_bends(one, other, bends, wanted)
    return _by_trying(one, other, wanted)


def is_convex(costs: Sequence[int], stride: int = 1) -> bool:
    """Whether each thing costs no less than the one before; with a stride of 3, each three no less than the last."""
    return all(map(le, *_curvature(costs, stride)))


def of_convex(heaps: Sequence[Sequence[int]]) -> list[int]:
    """Convex heaps side by side."""
    slopes = sorted(chain.from_iterable(map(sub, costs[1:], costs) for costs in heaps))
    return list(accumulate(slopes, initial=sum(costs[0] for costs in heaps)))


def of_all_or_none(heaps: Sequence[Sequence[int]]) -> list[int] | None:
    """Heaps of one length side by side that are best taken whole or not at all, all but one.

    None if that is not so, or if the least and the greatest costs among these heaps do not show it.
    """
    whole = len(heaps[0]) - 1
    gains = [[cost - costs[0] for cost in costs] for costs in heaps]
    if not _is_all_or_none([*map(min, zip(*gains, strict=True))], [*map(max, zip(*gains, strict=True))]):
        return None
    gains.sort(key=itemgetter(whole))
    taken = list(accumulate((g[whole] for g in gains), initial=sum(costs[0] for costs in heaps)))
    least = [0] * (len(heaps) * whole + 1)
    least[::whole] = taken
    for n in range(1, whole):
        # With the first j whole, the one in part comes after them; or it is one of them, and the next is whole instead.
        after = [*accumulate((g[n] for g in reversed(gains)), min)][::-1]
        instead = accumulate((g[n] - g[whole] for g in gains), min)
        least[n::whole] = map(min, map(add, taken, after), map(add, taken[1:], instead))
    return least


def _is_all_or_none(least: Sequence[int], greatest: Sequence[int]) -> bool:
    """Whether two heaps in part never cost less than one of them whole or empty, and the rest from the other."""
    whole = len(least) - 1
    for n in range(1, whole):
        instead = [*greatest[n + 1 :], *(greatest[whole] + more for more in greatest[1:n])]
        if not all(map(ge, map(least[n].__add__, least[1:whole]), instead)):
            return False
    return True


def _of_convex_classes(one: Sequence[int], other: Sequence[int], stride: int) -> list[int]:
    least = [max(one) + max(other)] * (len(one) + len(other) - 1)
    for first in range(stride):
        for second in range(stride):
            costs = of_convex([one[first::stride], other[second::stride]])
            where = slice(first + second, first + second + stride * len(costs), stride)
            least[where] = map(min, least[where], costs)
    return least


def _by_bends(
    one: Sequence[int], other: Sequence[int], bends: tuple[Sequence[int], Sequence[int]], wanted: range
) -> list[int]:
    least = [max(one) + max(other)] * len(wanted)
    for at_bend, costs, rests in ((bends[0], one, other), (bends[1], other, one)):
        for n in at_bend:
            low, high = max(0, wanted.start - n), min(len(rests), wanted.stop - n)
            if low < high:
                cost, where = costs[n], slice(low + n - wanted.start, high + n - wanted.start)
                least[where] = [
                    known if known < (this := cost + rest) else this
                    for known, rest in zip(least[where], rests[low:high], strict=True)
                ]
    return least


def _by_trying(one: Sequence[int], other: Sequence[int], wanted: range) -> list[int]:
    rests, span = other[::-1], len(other)  # one[0] goes with rests[span - 1 - m]; where either ends, so does the map
    least = [min(map(add, one, rests[span - 1 - m :])) for m in wanted if m < span]
    return least + [min(map(add, one[m - span + 1 :], rests)) for m in wanted if m >= span]


def _bends(costs: Sequence[int], stride: int) -> Sequence[int]:
    if len(costs) <= 2 * stride:
        return range(len(costs))
    inner = compress(range(stride, len(costs) - stride), map(lt, *_curvature(costs, stride)))
    return [*range(stride), *inner, *range(len(costs) - stride, len(costs))]


def _curvature(costs: Sequence[int], stride: int) -> tuple[Iterator[int], Iterator[int]]:
    """For each cost but the outermost: twice that cost, and the two together that are a stride away from it."""
    middle = costs[stride:-stride]
    return map(add, middle, middle), map(add, costs, costs[2 * stride :])
