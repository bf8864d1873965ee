"""Which devices a pod gets: by example, and against a brute force that shares no line with the search.

The brute force looks at every set of the asked size, measures pairs from the bridges of their functions and compares
what the module's docstring says, in that order.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import pytest
from devices import DEAD, device, eight_over_two_sockets, function, on_switch, with_mates
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_plugin.config.settings import Policy
from sandbox_plugin.inventory.prefer import InvalidRequest, prefer
from sandbox_plugin.model import Device, Placement

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


def test_packed_takes_a_device_alone_on_its_switch_before_it_breaks_up_a_pair() -> None:
    node = eight_over_two_sockets()
    assert take(node, 1, of=[0, 1, 2, 4, 5]) == ["2"]  # although its socket has more left than the other
    assert take(node, 1, of=[1, 4, 5, 6, 7]) == ["1"]
    assert take(node, 2, of=[0, 2, 4, 5, 6]) == ["4", "5"]  # a pair that is asked for is closer than two alone


def uneven() -> dict[str, Device]:
    """0 and 1 on one host bridge and 2 on another; 3, 4 and 5 on one switch of the other socket, 6 and 7 in slots."""
    slots = {"0": ("20", 1, 0), "1": ("20", 2, 0), "2": ("40", 1, 0), "6": ("c0", 1, 1), "7": ("c0", 2, 1)}
    return with_mates(
        *(
            device(i, function(f"0000:{i}:00.0", f"pci0000:{host}", f"0000:{host}:0{port}.0", numa=numa))
            for i, (host, port, numa) in slots.items()
        ),
        *(on_switch(i, numa=1, host="a0", switch="a1") for i in ("3", "4", "5")),
    )


def test_packed_leaves_the_most_pairs_of_the_nearest_link_then_of_the_next() -> None:
    node = uneven()
    assert take(node, 1) == ["2"]  # nothing but NODE is lost
    assert take(node, 1, of=[0, 1, 3, 4]) == ["0"]  # PIX is worth more than PHB
    assert take(node, 1, of=[0, 1, 3, 6]) == ["3"]  # PHB is worth more than NODE
    assert take(node, 1, of=[0, 1, 2, 3, 6]) == ["3"]


def test_spread_takes_what_is_far_from_the_devices_in_use_and_then_from_what_is_used_least() -> None:
    node = eight_over_two_sockets()
    assert take(node, 2, policy=SPREAD) == ["0", "4"]
    assert take(node, 4, policy=SPREAD) == ["0", "2", "4", "6"]
    assert take(node, 1, of=[1, 2, 3, 4, 5, 6, 7], policy=SPREAD) == ["4"]  # the other socket
    assert take(node, 1, of=[1, 2, 3, 5, 6, 7], policy=SPREAD) == ["2"]  # sockets alike: the other switch
    assert take(node, 2, of=[1, 2, 3, 4, 5, 6, 7], must=[1], policy=SPREAD) == ["1", "4"]


def test_spread_leaves_the_fewest_pairs_of_the_nearest_link() -> None:
    assert take(uneven(), 1, policy=SPREAD) == ["3"]  # of the three PIX pairs one is left
    assert take(uneven(), 1, of=[0, 1, 2, 3, 4], policy=SPREAD) == ["0"]  # far from those in use comes first


def test_single_devices_that_spread_gives_one_after_another_are_each_as_far_as_can_be_from_those_before() -> None:
    node = uneven()
    free, given = list(node), list[str]()
    while free:
        given += take(node, 1, of=free, policy=SPREAD)
        free.remove(given[-1])
    assert given == ["3", "0", "6", "2", "7", "1", "4", "5"]  # the switch again only when there is nothing else


def test_for_spread_the_distance_to_those_in_use_comes_before_the_remainder() -> None:
    groups = [7, 7, 7, 8, 8, 9]
    node = with_mates(
        *(on_switch(str(i), numa=i // 3, host=f"{i // 3}0", switch=f"{i // 3}1", group=groups[i]) for i in range(6))
    )
    assert take(node, 1, of=range(5), policy=SPREAD) == ["0"]  # strands two, where 3 would strand one beside 5
    assert take(node, 1, of=range(5)) == ["3"]


def test_each_link_counts_by_its_weight_also_where_the_numa_node_is_unknown() -> None:
    slots = {"0": ("00", 1, None), "1": ("00", 2, None), "2": ("40", 1, 0), "3": ("80", 1, 0)}
    node = with_mates(
        *(
            device(i, function(f"0000:{i}:00.0", f"pci0000:{host}", f"0000:{host}:0{port}.0", numa=numa))
            for i, (host, port, numa) in slots.items()
        )
    )
    assert take(node, 1, of=[1, 3], policy=SPREAD) == ["3"]  # NODE from 2; 1 is PHB from 0


def test_an_unhealthy_device_does_not_count_as_in_use() -> None:
    node = uneven()
    assert take(node, 1, of=[5, 6], policy=SPREAD) == ["6"]  # 5 is on a switch with 3 and 4
    for dead in ("3", "4"):
        node[dead] = node[dead]._replace(health=DEAD)
    assert take(node, 1, of=[5, 6], policy=SPREAD) == ["5"]  # 6 is on a host bridge with 7


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


def test_no_distance_is_worth_a_split_group() -> None:
    near = [on_switch(str(i), numa=0, host="00", switch="1") for i in range(40)]
    far = [on_switch(str(i), numa=i % 2, host=str(i), switch=str(i), group=7) for i in (40, 41)]
    assert take(with_mates(*near, *far), 41) == [str(i) for i in (*range(39), 40, 41)]


def test_a_mate_of_another_resource_or_one_that_is_not_available_holds_nobody_up() -> None:
    node = eight_over_two_sockets()
    node["0"] = node["0"]._replace(mates=("40",))
    node["2"] = node["2"]._replace(mates=("3",), iommu_group=9)
    node["3"] = node["3"]._replace(mates=("2",), iommu_group=9)
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
        node[dead] = node[dead]._replace(health=DEAD)
    assert take(node, 2, of=["ghost", "00", 0, 1, 2, 7], policy=policy) == ["2", "7"]
    assert take(node, 3, of=["ghost", "00", 0, 1, 2, 7], policy=policy) == ["2", "7", "0"]
    assert take(node, 6, of=["ghost", "00", 0, 1, 2, 7], policy=policy) == ["2", "7", "0", "1", "00", "ghost"]
    assert take({}, 2, of=["b", "a", "7"], policy=policy) == ["7", "a"]


@policies
def test_what_must_be_included_is_included_sick_unknown_or_not_available(policy: Policy) -> None:
    node = eight_over_two_sockets()
    node["1"] = node["1"]._replace(health=DEAD)
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
        (-1, (), "-1 devices are asked for: the size is negative"),
        (-(2**31), ("7",), "-2147483648 devices are asked for: the size is negative"),
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


@dataclass(frozen=True, kw_only=True)
class Request:
    """A question, and what there is to choose from by the rules: known, and healthy or bound to be included."""

    devices: dict[str, Device]
    available: list[str]
    must: list[str]
    size: int

    @property
    def usable(self) -> list[str]:
        return [i for i in self.available if i in self.must or (i in self.devices and self.devices[i].health.healthy)]

    @property
    def known(self) -> list[str]:
        return [i for i in self.usable if i in self.devices]


def split_groups(request: Request, chosen: Iterable[str]) -> list[set[str]]:
    """Of each IOMMU group that the chosen ones split, those that are left behind."""
    groups: dict[int, set[str]] = defaultdict(set)
    for i in request.known:
        groups[request.devices[i].iommu_group].add(i)
    taken = set(chosen)
    return [group - taken for group in groups.values() if group & taken and group - taken]


def sum_of_distances(chosen: Iterable[str], distance: Distance) -> int:
    return sum(distance(a, b) for a, b in combinations(chosen, 2))


def judge(request: Request, distance: Distance, policy: Policy) -> Callable[[Sequence[str]], list[int]]:
    """What to compare sets by: the lesser is the better."""
    sign = 1 if policy is PACKED else -1
    candidates = request.known
    in_use = [i for i, d in request.devices.items() if d.health.healthy and i not in request.available]
    to_those_in_use = {i: sum(distance(i, other) for other in in_use) for i in candidates}

    def verdict(chosen: Sequence[str]) -> list[int]:
        split = split_groups(request, chosen)
        left = Counter(distance(a, b) for a, b in combinations([i for i in candidates if i not in chosen], 2))
        return [
            len(split),
            sign * sum_of_distances(chosen, distance),
            -sum(to_those_in_use[i] for i in chosen) if policy is SPREAD else 0,
            sum(map(len, split)),
            *(-sign * left[link] for link in (1, 2, 3, 4)),
            *sorted(map(int, chosen)),
        ]

    return verdict


def assert_best(request: Request, policy: Policy) -> None:
    """No other set that holds what must be included is better than the answer."""
    chosen = prefer(
        request.devices,
        available=request.available,
        must_include=request.must,
        size=request.size,
        policy=policy,
    )
    assert len(set(chosen)) == len(chosen) == request.size
    assert list(chosen[: len(request.must)]) == sorted(request.must, key=int)
    assert set(chosen) <= set(request.available)
    usable, known = request.usable, request.known
    if request.size >= len(usable):
        assert set(usable) <= set(chosen)
        sick = [i for i in request.available if i in request.devices and i not in usable]
        unknown = [i for i in chosen if i not in request.devices and i not in request.must]
        assert not unknown or set(sick) <= set(chosen)
        return
    judged = judge(request, distances(request.devices), policy)
    forced = [i for i in known if i in request.must]
    free = [i for i in known if i not in request.must]
    sets = combinations(free, request.size - (len(usable) - len(known)) - len(forced))
    # one that is not known is equally far from all
    assert judged([i for i in chosen if i in request.devices]) == min(judged((*forced, *rest)) for rest in sets)


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
def requests(draw: st.DrawFn) -> Request:
    """A host with some sick devices; what is available, what must be included, how many are wanted."""
    devices = draw(hosts(largest=draw(st.sampled_from([8, 8, 12]))))
    for sick in draw(st.sets(st.sampled_from(sorted(devices)), max_size=2)):
        devices[sick] = devices[sick]._replace(health=DEAD)
    available = draw(st.permutations(sorted(draw(st.sets(st.sampled_from([*devices, "70", "71"]), min_size=1)))))
    must = draw(st.lists(st.sampled_from(available), unique=True, max_size=2))
    size = draw(st.integers(len(must), len(available)))
    return Request(devices=devices, available=available, must=must, size=size)


@policies
@settings(max_examples=500)
@given(request=requests())
def test_no_set_is_better_than_the_one_preferred(policy: Policy, request: Request) -> None:
    assert_best(request, policy)


@policies
@given(hosts().flatmap(lambda h: st.tuples(st.just(h), st.permutations(list(h)), st.permutations(list(h)))))
def test_the_answer_does_not_depend_on_the_order_of_anything(
    policy: Policy, orders: tuple[dict[str, Device], list[str], list[str]]
) -> None:
    devices, one, other = orders
    shuffled = {i: devices[i] for i in other}
    for size in range(len(devices) + 1):
        must = one[: size // 2]
        first = prefer(devices, available=one, must_include=must, size=size, policy=policy)
        assert first == prefer(shuffled, available=other, must_include=must[::-1], size=size, policy=policy)


# Many devices: too many for brute force


def thousand(*, group: int) -> dict[str, Device]:
    """1,024 devices in pairs on switches, eight switches on a host bridge, eight of those on a socket."""
    return with_mates(
        *(
            on_switch(str(i), numa=i // 128, host=str(i // 16), switch=str(i // 2), group=i // group)
            for i in range(1024)
        )
    )


@pytest.mark.parametrize(
    ("group", "of", "size", "policy", "chosen"),
    [
        (1, range(1024), 16, PACKED, range(16)),
        (1, range(5, 1024), 16, PACKED, range(16, 32)),
        (1, range(5, 1024), 128, PACKED, range(128, 256)),
        (1, range(1024), 8, SPREAD, range(0, 1024, 128)),
        (1, range(5, 1024), 1, SPREAD, [128]),
        (2, range(1024), 512, PACKED, range(512)),
        (2, range(1, 1024), 129, PACKED, [1, *range(128, 256)]),
        (512, range(1, 1024), 511, PACKED, range(1, 512)),
        (512, range(1024), 512, SPREAD, range(512)),
    ],
)
def test_of_a_thousand_devices_no_weight_outweighs_a_rule_before_it(
    group: int, of: range, size: int, policy: Policy, chosen: Sequence[int]
) -> None:
    assert take(thousand(group=group), size, of=of, policy=policy) == [str(i) for i in chosen]
