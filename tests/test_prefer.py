"""Which devices a pod gets: by example, and against a brute force that shares no line with the search.

The brute force looks at every set of the asked size, measures pairs from the bridges of their functions and compares
what the module's docstring says, in that order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import isqrt
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import DEAD, device, eight_over_two_sockets, function, on_switch, with_mates

from sandbox_plugin.inventory import prefer as search
from sandbox_plugin.inventory.prefer import InvalidRequest, prefer
from sandbox_plugin.model import Device, Placement
from sandbox_plugin.settings import Policy

PACKED, SPREAD = Policy.PACKED, Policy.SPREAD
policies = pytest.mark.parametrize("policy", list(Policy))

Distance = Callable[[str, str], int]
Devices = Mapping[str, Device]


def take(
    devices: Devices,
    size: int,
    *,
    of: Iterable[object] | None = None,
    must: Iterable[object] = (),
    policy: Policy = PACKED,
) -> list[str]:
    available = list(devices) if of is None else [str(i) for i in of]
    must_include = [str(i) for i in must]
    return list(prefer(devices, available=available, must_include=must_include, size=size, policy=policy))


# What is preferred, by example


def test_packed_takes_the_pair_on_one_switch_and_then_the_pairs_of_one_socket() -> None:
    node = eight_over_two_sockets()
    assert take(node, 2) == ["0", "1"]
    assert take(node, 4) == ["0", "1", "2", "3"]
    assert take(node, 4, of=[1, 2, 3, 4, 5, 6, 7]) == ["4", "5", "6", "7"]
    assert take(node, 2, of=[1, 2, 4, 6, 7]) == ["6", "7"]


def test_packed_finishes_what_is_nearly_used_up_before_it_breaks_into_what_is_whole() -> None:
    node = eight_over_two_sockets()
    assert take(node, 1, of=[0, 1, 2, 3, 6, 7]) == ["6"]  # the socket with fewer left
    assert take(node, 1, of=[0, 1, 2, 4, 5, 6, 7]) == ["2"]  # there, the one without a partner
    assert take(node, 2, of=[0, 1, 4, 5, 6, 7]) == ["0", "1"]  # a pair of the broken socket, not of the whole one
    assert take(node, 3, of=[0, 1, 2, 4, 5, 6, 7]) == ["0", "1", "2"]


def test_packed_leaves_what_is_close_together_widest_parts_first() -> None:
    node = with_mates(
        device("0", function("0000:01:00.0", "pci0000:00", "0000:00:01.0", numa=0)),
        device("1", function("0000:02:00.0", "pci0000:00", "0000:00:02.0", numa=0)),
        device("2", function("0000:41:00.0", "pci0000:40", "0000:40:01.0", numa=0)),
    )
    assert take(node, 1) == ["2"]  # leaves a PHB pair: no NODE pair
    assert take(node, 1, policy=SPREAD) == ["0"]


def test_spread_takes_from_the_sockets_and_switches_that_are_used_least() -> None:
    node = eight_over_two_sockets()
    assert take(node, 2, policy=SPREAD) == ["0", "4"]
    assert take(node, 4, policy=SPREAD) == ["0", "2", "4", "6"]
    assert take(node, 1, of=[1, 2, 3, 4, 5, 6, 7], policy=SPREAD) == ["4"]  # the socket with more left
    assert take(node, 1, of=[1, 2, 3, 5, 6, 7], policy=SPREAD) == ["2"]  # there, the switch with more left


@policies
def test_what_must_be_included_comes_first_and_pulls_its_neighbours(policy: Policy) -> None:
    chosen = take(eight_over_two_sockets(), 4, must=[6, 3], policy=policy)
    assert chosen == {PACKED: ["3", "6", "2", "7"], SPREAD: ["3", "6", "0", "4"]}[policy]


def grouped() -> dict[str, Device]:
    """Six on one socket: 0 and 1 alone, then 2 with 3, and 4 with 5, each two in one IOMMU group."""
    groups = [90, 91, 92, 92, 93, 93]
    return with_mates(
        *(on_switch(str(i), numa=0, host=f"{i // 2}0", switch=f"{i // 2}1", group=groups[i]) for i in range(6))
    )


@policies
def test_group_mates_stay_together(policy: Policy) -> None:
    node = grouped()
    assert take(node, 1, of=[1, 2, 3], policy=policy) == ["1"]
    assert take(node, 2, of=[1, 2, 3, 4], policy=policy) == {PACKED: ["2", "3"], SPREAD: ["1", "4"]}[policy]
    assert take(node, 3, of=[1, 2, 3, 4, 5], must=[5], policy=policy) == ["5", "1", "4"]
    assert take(node, 2, must=[2], policy=policy) == ["2", "3"]


@policies
def test_a_group_is_split_only_where_no_set_keeps_all_together_and_then_the_one_that_strands_fewest(
    policy: Policy,
) -> None:
    switches = with_mates(*(on_switch(str(i), numa=0, host="00", switch="1", group=7) for i in range(4)))
    assert take(switches, 3, policy=policy) == ["0", "1", "2"]
    both = with_mates(*switches.values(), *(on_switch(str(i), numa=0, host="00", switch="1", group=8) for i in (4, 5)))
    assert take(both, 1, policy=policy) == ["4"]
    assert take(both, 2, policy=policy) == ["4", "5"]
    assert take(both, 4, policy=policy) == ["0", "1", "2", "3"]


def test_a_mate_of_another_resource_or_one_that_is_not_available_holds_nobody_up() -> None:
    node = eight_over_two_sockets()
    node["0"] = replace(node["0"], mates=("40",))
    node["2"] = replace(node["2"], mates=("3",), iommu_group=9)
    node["3"] = replace(node["3"], mates=("2",), iommu_group=9)
    assert take(node, 1, of=[0, 4, 5]) == ["0"]
    assert take(node, 1, of=[3, 4, 5]) == ["3"]


def test_numbers_are_compared_as_numbers() -> None:
    node = with_mates(*(on_switch(str(i), numa=0, host=f"{i}", switch=f"{i}") for i in (9, 10, 100)))
    assert take(node, 2) == ["9", "10"]


# Requests that are not as they should be


@policies
def test_sick_and_unknown_devices_are_the_last_resort_sick_ones_first(policy: Policy) -> None:
    node = eight_over_two_sockets()
    for dead in ("0", "1"):
        node[dead] = replace(node[dead], health=DEAD)
    assert take(node, 2, of=["ghost", 0, 1, 2, 7], policy=policy) == ["2", "7"]
    assert take(node, 3, of=["ghost", 0, 1, 2, 7], policy=policy) == ["2", "7", "0"]
    assert take(node, 5, of=["ghost", 0, 1, 2, 7], policy=policy) == ["2", "7", "0", "1", "ghost"]
    assert take({}, 2, of=["b", "a", "7"], policy=policy) == ["7", "a"]


@policies
def test_what_must_be_included_is_included_sick_unknown_or_not_available(policy: Policy) -> None:
    node = eight_over_two_sockets()
    node["1"] = replace(node["1"], health=DEAD)
    assert take(node, 4, of=[2, 3], must=["ghost", 1, 3], policy=policy) == ["1", "3", "ghost", "2"]
    assert take(node, 3, of=[0, 2, 3, 4], must=[1, "ghost"], policy=PACKED) == ["1", "ghost", "0"]


@policies
def test_ids_that_stand_twice_count_once(policy: Policy) -> None:
    node = eight_over_two_sockets()
    assert take(node, 2, of=[4, 4, 5, 5, 5], must=[5, 5], policy=policy) == ["5", "4"]
    with pytest.raises(InvalidRequest, match="3 devices are asked for, but only 2 are available"):
        take(node, 3, of=[4, 4, 5], policy=policy)


@policies
def test_nothing_is_a_good_answer_to_a_request_for_nothing(policy: Policy) -> None:
    assert take(eight_over_two_sockets(), 0, policy=policy) == []
    assert take({}, 0, policy=policy) == []


@pytest.mark.parametrize(
    ("size", "must", "words"),
    [
        (-1, (), "-1 devices are asked for, but 0 must be included"),
        (9, (), "9 devices are asked for, but only 8 are available"),
        (1, ("0", "7"), "1 devices are asked for, but 2 must be included"),
        (0, ("7",), "0 devices are asked for, but 1 must be included"),
        (2**31 - 1, ("ghost",), "only 9 are available"),
    ],
)
def test_only_a_request_that_no_set_can_meet_is_refused(size: int, must: Sequence[str], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        take(eight_over_two_sockets(), size, must=must)


# Against brute force


def distances(devices: Devices) -> Distance:
    """Distances from the bridges of functions, pair by pair, by the words of `Link` and `places`."""
    node_of: dict[str, int] = {}
    for d in devices.values():
        for p in d.placements:
            if p.numa_node is not None:
                node_of[p.bridges[0]] = min(p.numa_node, node_of.get(p.bridges[0], p.numa_node))
    group_of = {d.id: d.iommu_group if d.mates else -1 - int(d.id) for d in devices.values()}
    functions: dict[int, list[Placement]] = defaultdict(list)
    for d in devices.values():
        functions[group_of[d.id]] += d.placements

    def apart(one: Placement, other: Placement) -> int:
        if one.bridges[0] != other.bridges[0]:
            nodes = node_of.get(one.bridges[0]), node_of.get(other.bridges[0])
            return 4 if nodes[0] is not None and nodes[0] == nodes[1] else 5
        shared = [a == b for a, b in zip(one.bridges, other.bridges, strict=False)]
        depth = shared.index(False) if False in shared else len(shared)
        below = max(len(one.bridges), len(other.bridges)) - depth
        if depth == 1:
            return 1 if below == 0 and one.address[:-2] == other.address[:-2] else 3
        return 1 if below <= 1 else 2

    def distance(a: str, b: str) -> int:
        if group_of[a] == group_of[b]:
            sides = devices[a].placements, devices[b].placements
        else:
            sides = tuple(functions[group_of[a]]), tuple(functions[group_of[b]])
        return max(apart(p, q) for p in sides[0] for q in sides[1])

    table = {(a, b): distance(a, b) for a in devices for b in devices if a != b}
    return lambda a, b: table[a, b]


def judge(devices: Devices, candidates: Sequence[str], distance: Distance, policy: Policy) -> Callable[..., list[int]]:
    """What to compare sets of candidates by: the lesser is the better."""
    sign = 1 if policy is PACKED else -1
    groups: dict[int, set[str]] = defaultdict(set)
    for i in candidates:
        groups[devices[i].iommu_group].add(i)

    def verdict(chosen: Iterable[str]) -> list[int]:
        taken = set(chosen)
        split = [group - taken for group in groups.values() if group & taken and group - taken]
        left = [distance(a, b) for a, b in combinations([i for i in candidates if i not in taken], 2)]
        return [
            len(split),
            sign * sum(distance(a, b) for a, b in combinations(sorted(taken), 2)),
            sum(map(len, split)),
            *(sign * left.count(length) for length in (5, 4, 3, 2)),
            *sorted(map(int, taken)),
        ]

    return verdict


@st.composite
def hosts(draw: st.DrawFn, largest: int = 8) -> dict[str, Device]:
    """Devices of one or two functions anywhere, on chains as deep as those of real servers, some in groups."""
    numbers = draw(st.permutations(range(largest)))[: draw(st.integers(1, largest))]
    numa = draw(st.lists(st.sampled_from([None, 0, 1]), min_size=4, max_size=4))
    grouping = draw(st.sampled_from([1, 3, 100]))
    devices = []
    for number in numbers:
        functions = []
        for part in range(draw(st.sampled_from([1, 1, 1, 2]))):
            host = draw(st.integers(0, 3))
            bridges = [f"pci0000:{host}0"]
            for level in range(draw(st.sampled_from([0, 1, 3, 3, 3, 5]))):  # root port, then two for each switch
                bridges.append(f"{bridges[-1]}/{level}.{draw(st.integers(0, 1)) if level != 1 else 0}")
            silent = draw(st.integers(0, 4)) == 0
            address = f"0000:{number}{part}:0{draw(st.integers(0, 1))}.{part}"
            functions.append(function(address, *bridges, numa=None if silent else numa[host]))
        devices.append(device(str(number), *functions, group=draw(st.integers(0, grouping))))
    return with_mates(*devices)


@st.composite
def requests(draw: st.DrawFn) -> tuple[dict[str, Device], list[str], list[str], int]:
    """A host with some sick devices; what is available, what must be included, how many are wanted."""
    devices = draw(hosts())
    for sick in draw(st.sets(st.sampled_from(sorted(devices)), max_size=2)):
        devices[sick] = replace(devices[sick], health=DEAD)
    available = draw(st.permutations(sorted(draw(st.sets(st.sampled_from([*devices, "70", "71"]), min_size=1)))))
    must = draw(st.lists(st.sampled_from(available), unique=True, max_size=2))
    return devices, available, must, draw(st.integers(len(must), len(available)))


@policies
@settings(max_examples=300, deadline=None)
@given(request=requests())
def test_no_set_is_better_than_the_one_preferred(
    policy: Policy, request: tuple[dict[str, Device], list[str], list[str], int]
) -> None:
    devices, available, must, size = request
    chosen = prefer(devices, available=available, must_include=must, size=size, policy=policy)
    assert len(set(chosen)) == len(chosen) == size
    assert list(chosen[: len(must)]) == sorted(must, key=int)
    assert set(chosen) <= set(available)
    usable = [i for i in available if i in must or (i in devices and devices[i].health.healthy)]
    if size >= len(usable):
        assert set(usable) <= set(chosen)
        sick = [i for i in available if i in devices and i not in usable]
        assert {i for i in chosen if i not in devices and i not in must} == set() or set(sick) <= set(chosen)
        return
    known = [i for i in usable if i in devices]  # one that is not known is equally far from all
    judged = judge(devices, known, distances(devices), policy)
    sets = (c for c in combinations(known, size - len(usable) + len(known)) if {*must} & {*known} <= {*c})
    assert judged(i for i in chosen if i in devices) == min(map(judged, sets))


def scattered(seed: int, count: int) -> dict[str, Device]:
    """A host of that many devices of one function, unevenly over nodes, host bridges, root ports and switches."""
    random = Random(seed)
    shapes = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 2, 0), (1, 2, 1), (None, 3, 0), (1, 4, 0)]
    devices = []
    for number in range(count):
        numa, host, port = random.choice(shapes)
        root = (f"pci0000:{host}0", f"0000:{host}0:{port}.0")
        switch = random.choice([(), ("a", f"a{number}"), ("a", "b", "c", f"c{number}"), ("a", "d", "e", f"e{number}")])
        bridges = (*root, *(f"{root[1]}/{name}" for name in switch))
        group = random.randrange(4) if random.random() < 0.3 else 100 + number
        devices.append(device(str(number), function(f"0000:{number}:00.0", *bridges, numa=numa), group=group))
    return with_mates(*devices)


@policies
@pytest.mark.parametrize(("seed", "size"), [(1, 8), (2, 8), (3, 7), (4, 12)])
def test_no_set_of_sixteen_is_better_than_the_one_preferred(seed: int, size: int, policy: Policy) -> None:
    devices = scattered(seed, 16)
    judged = judge(devices, list(devices), distances(devices), policy)
    assert judged(take(devices, size, policy=policy)) == min(map(judged, combinations(devices, size)))


@policies
@given(hosts().flatmap(lambda h: st.tuples(st.just(h), st.permutations(list(h)), st.permutations(list(h)))))
@settings(deadline=None)
def test_the_answer_does_not_depend_on_the_order_of_anything(
    policy: Policy, orders: tuple[dict[str, Device], list[str], list[str]]
) -> None:
    devices, one, other = orders
    shuffled = {i: devices[i] for i in other}
    for size in range(len(devices) + 1):
        must = one[: size // 2]
        first = prefer(devices, available=one, must_include=must, size=size, policy=policy)
        assert first == prefer(shuffled, available=other, must_include=must[::-1], size=size, policy=policy)


# Many devices


def greedy(candidates: Sequence[str], distance: Distance, size: int, policy: Policy) -> list[str]:
    """From the lowest number on, always the nearest next, or the farthest for spread; the lowest among equals."""
    sign = 1 if policy is PACKED else -1
    total = dict.fromkeys(candidates, 0)
    chosen: list[str] = []
    while len(chosen) < size:
        best = min(total, key=lambda i: (sign * total[i], int(i)))
        chosen.append(best)
        del total[best]
        for i in total:
            total[i] += distance(best, i)
    return chosen


@policies
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(2, 30), data=st.data())
def test_the_rough_search_is_never_worse_than_greedy(
    policy: Policy, seed: int, count: int, data: st.DataObject
) -> None:
    """The search for many devices, made to work on few by lowering its limits."""
    devices = scattered(seed, count)
    size = data.draw(st.integers(1, count))
    distance = distances(devices)
    judged = judge(devices, list(devices), distance, policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "EXACT", 0)
        patch.setattr(search, "_SMALL", 0)
        rough = take(devices, size, policy=policy)
        must = data.draw(st.lists(st.sampled_from(list(devices)), unique=True, max_size=size))
        with_must = take(devices, size, must=must, policy=policy)
    assert judged(rough)[:2] <= judged(greedy(list(devices), distance, size, policy))[:2]
    assert len(set(with_must)) == len(with_must) == size
    assert set(must) <= set(with_must)


PARTS: dict[str, Callable[[int], tuple[int, int, int]]] = {
    "pairs": lambda i: (i // 128, i // 16, i // 2),
    "uneven": lambda i: (isqrt(4 * i) // 12, isqrt(4 * i) // 3, isqrt(4 * i)),
}
"""Where device i of 1,024 is: node, host bridge, switch. Uneven parts hold from one device to hundreds."""


@policies
@pytest.mark.parametrize("shape", list(PARTS))
def test_of_a_thousand_devices_the_choice_is_never_worse_than_greedy(shape: str, policy: Policy) -> None:
    parts = {str(i): PARTS[shape](i) for i in range(1024)}
    devices = with_mates(
        *(on_switch(i, numa=node, host=str(host), switch=str(switch)) for i, (node, host, switch) in parts.items())
    )

    def distance(a: str, b: str) -> int:
        same = [x == y for x, y in zip(parts[a], parts[b], strict=True)]
        return 1 if same[2] else 3 if same[1] else 4 if same[0] else 5

    judged = judge(devices, list(devices), distance, policy)
    for size in (4, 200):
        chosen = take(devices, size, policy=policy)
        assert judged(chosen)[:2] <= judged(greedy(list(devices), distance, size, policy))[:2]
