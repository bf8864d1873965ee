"""The cheapest way to take things from several heaps, against all ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate, pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_plugin.inventory import least_sums as module
from sandbox_plugin.inventory.least_sums import is_convex, least_sums, of_all_or_none, of_convex

Heap = list[int]
seeds = st.integers(0, 2**32).map(Random)


def tried(one: Sequence[int], other: Sequence[int]) -> Heap:
    """All sums, for every number of things."""
    return [
        min(one[n] + other[m - n] for n in range(len(one)) if 0 <= m - n < len(other))
        for m in range(len(one) + len(other) - 1)
    ]


def at_random(random: Random, length: int) -> Heap:
    return [random.randint(-50, 50) for _ in range(length)]


def convex(random: Random, length: int) -> Heap:
    """Each thing costs no less than the one before."""
    return list(accumulate(sorted(at_random(random, length - 1)), initial=random.randint(-50, 50)))


def convex_in_thirds(random: Random, length: int) -> Heap:
    """Dear unless by threes, as where groups of three are to be kept together."""
    return [cost + (1000 if n % 3 else 0) for n, cost in enumerate(convex(random, length))]


def with_bends(random: Random, length: int) -> Heap:
    """Boxes that are filled one after the other: in a box each thing costs less than the one before."""
    costs = [random.randint(-50, 50)]
    while len(costs) < length:
        costs += accumulate((-3 * n - len(costs) - n for n in range(random.randint(5, 30))), initial=costs.pop())
    return costs[:length]


def by_twos(random: Random, length: int) -> Heap:
    """As `with_bends`, but dear unless by twos."""
    return [cost + (10_000 if n % 2 else 0) for n, cost in enumerate(with_bends(random, length))]


SHAPES: list[Callable[[Random, int], Heap]] = [at_random, convex, convex_in_thirds, with_bends, by_twos]


@settings(max_examples=400)
@given(
    random=seeds,
    shapes=st.tuples(st.sampled_from(SHAPES), st.sampled_from(SHAPES)),
    lengths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    window=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_no_way_to_take_things_from_two_heaps_is_cheaper(
    random: Random,
    shapes: tuple[Callable[[Random, int], Heap], Callable[[Random, int], Heap]],
    lengths: tuple[int, int],
    window: tuple[float, float],
) -> None:
    one, other = (shape(random, length) for shape, length in zip(shapes, lengths, strict=True))
    first, last = sorted(int(part * (len(one) + len(other) - 2)) for part in window)
    assert least_sums(one, other, range(first, last + 1)) == tried(one, other)[first : last + 1]


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_where_a_shape_allows_it_not_all_sums_are_tried(
    shape: Callable[[Random, int], Heap], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_by_trying", None)
    one, other = shape(Random(1), 90), shape(Random(2), 120)
    assert least_sums(one, other, range(209)) == tried(one, other)


@given(random=seeds, lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_no_way_to_take_things_from_convex_heaps_is_cheaper(random: Random, lengths: list[int]) -> None:
    heaps = [convex(random, length) for length in lengths]
    assert all(map(is_convex, heaps))
    assert of_convex(heaps) == reduce(tried, heaps)


@given(heap=st.lists(st.integers(-5, 5), min_size=1, max_size=9), stride=st.integers(1, 4))
def test_a_heap_is_convex_when_no_slope_is_less_than_the_one_before(heap: Heap, stride: int) -> None:
    slopes = [[b - a for a, b in pairwise(heap[n::stride])] for n in range(stride)]
    assert is_convex(heap, stride) == all(each == sorted(each) for each in slopes)


@settings(max_examples=600)
@given(random=seeds, count=st.integers(1, 6), length=st.integers(3, 9), step=st.integers(-3, 3))
def test_heaps_to_take_whole_or_not_at_all_are_either_taken_in_the_cheapest_way_or_left_to_others(
    random: Random, count: int, length: int, step: int
) -> None:
    ends, dear = [0, step * (length - 1)], random.choice([0, 2, 20])
    inner = [step * n + dear + random.randint(0, 2) * random.randint(0, 1) for n in range(1, length - 1)]
    heaps = [[cost + random.choice([0, 0, 0, 1]) for cost in (ends[0], *inner, ends[1])] for _ in range(count)]
    assert of_all_or_none(heaps) in (None, reduce(tried, heaps))


def test_groups_of_one_size_are_heaps_to_take_whole_or_not_at_all() -> None:
    groups = [[0, 103 + n, 102, 101 + n, -n] for n in range(5)]  # dear to split, dearest where most are left behind
    assert of_all_or_none(groups) == reduce(tried, groups)
    assert of_all_or_none([[0, 1, 2, 4], [0, 1, 2, 4]]) is None
