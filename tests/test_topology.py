"""Where devices sit and how far that puts them apart."""

from __future__ import annotations

import pytest
from devices import device, eight_over_two_sockets, function, with_mates
from hypothesis import given
from hypothesis import strategies as st

from sandbox_plugin.inventory.topology import Link, legend_lines, link, matrix, matrix_lines, places
from sandbox_plugin.model import Device, Placement

HOST, ROOT_PORT = "pci0000:15", "0000:15:01.0"
UP, DOWN_0, DOWN_1, DOWN_2 = "0000:16:00.0", "0000:17:00.0", "0000:17:01.0", "0000:17:02.0"
INNER_UP, INNER_DOWN = "0000:19:00.0", "0000:1a:00.0"


def between(one: Placement | Device, other: Placement | Device) -> str:
    """The link between two devices, or devices of one function each, that are all there is on the host."""
    a, b = (d if isinstance(d, Device) else device(str(i), d) for i, d in enumerate((one, other)))
    return link(*places([a, b])).name


TOP = ("pci0000:00", "0000:00:01.1", "0000:01:00.0", "0000:02:00.0", "0000:03:00.0")


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ((HOST, ROOT_PORT, UP, DOWN_0), (HOST, ROOT_PORT, UP, DOWN_1), "PIX"),
        ((HOST, ROOT_PORT, UP), (HOST, ROOT_PORT, UP), "PIX"),
        ((HOST, ROOT_PORT, UP, DOWN_0), (HOST, ROOT_PORT, UP, DOWN_2, INNER_UP, INNER_DOWN), "PXB"),
        ((*TOP, "0000:04:00.0", "0000:05:00.0", "0000:06:00.0"), (*TOP, "0000:04:10.0", "0000:0d:00.0", "0e"), "PXB"),
        ((HOST, ROOT_PORT), (HOST, "0000:15:02.0"), "PHB"),
        ((HOST,), (HOST,), "PHB"),
        (("pci0008:00", "0008:00:00.0"), ("pci0009:00", "0009:00:00.0"), "NODE"),
    ],
    ids=[
        "two ports of one switch",
        "two slots of one bridge",
        "a switch below a switch, as NIC and GPU of a DGX H100",
        "two switches below one switch, as on a DGX A100",
        "two root ports",
        "inside the root complex",
        "the same bus number in two domains",
    ],
)
def test_the_last_bridge_that_two_functions_share_tells_how_far_apart_they_are(
    one: tuple[str, ...], other: tuple[str, ...], name: str
) -> None:
    assert between(function("0000:18:00.0", *one, numa=0), function("0000:1b:00.0", *other, numa=0)) == name


def test_functions_of_one_board_are_pix_behind_a_switch_port_a_root_port_and_inside_the_root_complex() -> None:
    for bridges in [(HOST, ROOT_PORT, UP, DOWN_0), (HOST, ROOT_PORT), (HOST,)]:
        assert between(function("0000:18:00.0", *bridges), function("0000:18:00.1", *bridges)) == "PIX"


def test_a_mediated_device_is_where_the_function_is_that_carries_it() -> None:
    def mediated(number: int, *bridges: str) -> Placement:
        """Its own address is a UUID, and the last on its way down is the function that carries it."""
        return function(f"00000000-0000-0000-0000-{number:012}", HOST, *bridges, numa=0)

    gpu, other_gpu = (ROOT_PORT, UP, DOWN_0, "0000:18:00.0"), (ROOT_PORT, UP, DOWN_1, "0000:1b:00.0")
    assert between(mediated(1, *gpu), mediated(2, *gpu)) == "PIX"
    assert between(mediated(1, *gpu), mediated(2, *other_gpu)) == "PIX"
    assert between(mediated(1, *gpu), function("0000:1d:00.0", HOST, ROOT_PORT, UP, DOWN_2, numa=0)) == "PIX"
    assert between(mediated(1, *gpu), mediated(2, "0000:15:02.0", "0000:1e:00.0")) == "PHB"
    assert between(mediated(1, "0000:15:04.0"), mediated(2, "0000:15:04.1")) == "PIX"
    assert between(mediated(1, "0000:15:04.0"), mediated(2, "0000:15:05.0")) == "PHB"


def test_root_ports_of_one_host_bridge_are_phb_whatever_the_numa_node_says() -> None:
    for numa, other_numa in [(0, 0), (None, None), (0, None), (0, 1)]:
        left = function("0000:16:00.0", HOST, ROOT_PORT, numa=numa)
        right = function("0000:1a:00.0", HOST, "0000:15:02.0", numa=other_numa)
        assert between(left, right) == "PHB"


@pytest.mark.parametrize(
    ("numa", "other_numa", "name"),
    [(0, 0, "NODE"), (0, 1, "SYS"), (None, None, "SYS"), (0, None, "SYS")],
)
def test_between_host_bridges_the_numa_node_decides_and_an_unknown_one_proves_nothing(
    numa: int | None, other_numa: int | None, name: str
) -> None:
    left = function("0000:16:00.0", HOST, ROOT_PORT, numa=numa)
    right = function("0000:3e:00.0", "pci0000:3d", "0000:3d:01.0", numa=other_numa)
    assert between(left, right) == name


def test_a_function_of_unknown_node_is_in_the_node_that_another_below_its_host_bridge_names() -> None:
    silent = device("0", function("0000:16:00.0", HOST, ROOT_PORT, numa=None))
    naming = device("1", function("0000:1a:00.0", HOST, "0000:15:02.0", numa=1))
    elsewhere = device("2", function("0000:3e:00.0", "pci0000:3d", "0000:3d:01.0", numa=1))
    assert link(places([silent, naming, elsewhere])[0], places([silent, naming, elsewhere])[2]) is Link.NODE
    assert link(*places([silent, elsewhere])) is Link.SYS


def test_of_contradicting_numa_nodes_below_one_host_bridge_the_lowest_counts() -> None:
    below = [device(str(n), function(f"0000:16:0{n}.0", HOST, f"0000:15:0{n}.0", numa=n)) for n in (1, 0)]
    elsewhere = device("2", function("0000:3e:00.0", "pci0000:3d", "0000:3d:01.0", numa=0))
    assert [link(place, places([*below, elsewhere])[2]) for place in places([*below, elsewhere])[:2]] == [Link.NODE] * 2


def test_of_a_device_of_several_functions_the_slowest_pair_counts() -> None:
    group = device(
        "0",
        function("0000:18:00.0", HOST, ROOT_PORT, UP, DOWN_0, numa=0),
        function("0000:9d:00.0", "pci0000:97", "0000:97:01.0", numa=1),
    )
    neighbour = device("1", function("0000:1b:00.0", HOST, ROOT_PORT, UP, DOWN_1, numa=0))
    assert between(group, neighbour) == "SYS"
    board = device("0", *(function(f"0000:18:00.{n}", HOST, ROOT_PORT, UP, DOWN_0, numa=0) for n in range(2)))
    assert between(board, neighbour) == "PIX"


def test_an_iommu_group_counts_as_one_place_to_others_and_not_among_its_own() -> None:
    devices = with_mates(
        device("0", function("0000:18:00.0", HOST, ROOT_PORT, UP, DOWN_0, numa=0), group=7),
        device("1", function("0000:3e:00.0", "pci0000:3d", "0000:3d:01.0", UP, DOWN_0, numa=0), group=7),
        device("2", function("0000:3f:00.0", "pci0000:3d", "0000:3d:01.0", UP, DOWN_1, numa=0), group=7),
        device("3", function("0000:1b:00.0", HOST, ROOT_PORT, UP, DOWN_1, numa=0)),
    )
    names = [[a.name if a else "X" for a in row] for row in matrix(list(devices.values()))]
    assert names == [
        ["X", "NODE", "NODE", "NODE"],
        ["NODE", "X", "PIX", "NODE"],
        ["NODE", "PIX", "X", "NODE"],
        ["NODE", "NODE", "NODE", "X"],
    ]


def test_a_device_that_the_host_no_longer_shows_is_far_from_everything() -> None:
    assert between(device("0"), function("0000:16:00.0", HOST, ROOT_PORT, numa=0)) == "SYS"
    assert between(device("0"), device("1")) == "SYS"


def test_a_device_that_has_left_its_group_is_where_it_was_and_no_mate() -> None:
    gone = device("2", function("0000:3e:00.0", "pci0000:3d", "0000:3d:01.0", numa=1), group=7)
    mates = (device(str(n), function(f"0000:18:0{n}.0", HOST, ROOT_PORT, numa=0), group=7) for n in range(2))
    assert matrix([*with_mates(*mates).values(), gone])[2] == (Link.SYS, Link.SYS, None)


def test_the_matrix_prints_as_nvidia_smi_does() -> None:
    devices = list(eight_over_two_sockets().values())
    no_node = device("16", function("0009:01:00.0", "pci0009:00", "0009:00:00.0"))
    assert matrix_lines([*devices[:3], devices[4], no_node]) == [
        "    0     1     2     4    16   NUMA  PCI ADDRESS",
        "0   X     PIX   NODE  SYS  SYS  0     0000:0:00.0",
        "1   PIX   X     NODE  SYS  SYS  0     0000:1:00.0",
        "2   NODE  NODE  X     SYS  SYS  0     0000:2:00.0",
        "4   SYS   SYS   SYS   X    SYS  1     0000:4:00.0",
        "16  SYS   SYS   SYS   SYS  X    -     0009:01:00.0",
    ]
    assert matrix_lines([]) == ["  NUMA  PCI ADDRESS"]
    assert [line.split()[0] for line in legend_lines()] == ["X", "PIX", "PXB", "PHB", "NODE", "SYS"]


def test_a_matrix_that_is_too_wide_goes_without_addresses_and_then_in_parts() -> None:
    devices = list(eight_over_two_sockets().values())[2:6]
    whole = matrix_lines(devices)
    assert whole == matrix_lines(devices, len(whole[1]))
    bare = [
        "   2    3    4    5",
        "2  X    PIX  SYS  SYS",
        "3  PIX  X    SYS  SYS",
        "4  SYS  SYS  X    PIX",
        "5  SYS  SYS  PIX  X",
    ]
    assert matrix_lines(devices, len(whole[1]) - 1) == matrix_lines(devices, 21) == bare
    assert matrix_lines(devices, 20) == [
        "   2    3    4",
        "2  X    PIX  SYS",
        "3  PIX  X    SYS",
        "4  SYS  SYS  X",
        "5  SYS  SYS  PIX",
        "",
        "   5",
        "2  SYS",
        "3  SYS",
        "4  PIX",
        "5  X",
    ]
    assert len(matrix_lines(devices, 1)) == 4 * 6 - 1, "one device in each part is the least"


CHAINS = st.tuples(
    st.integers(0, 2), st.integers(0, 1), st.sampled_from([0, 1, 2]), st.integers(0, 1), st.integers(0, 1)
)


@st.composite
def hosts(draw: st.DrawFn) -> list[Device]:
    """Up to six devices of one or two functions, anywhere, some in groups."""
    devices = []
    for number in range(draw(st.integers(3, 6))):
        functions = []
        for part in range(draw(st.integers(1, 2))):
            host, port, switches, first, second = draw(CHAINS)
            bridges = [f"pci0000:{host}0", f"0000:{host}0:{port}.0"]
            for depth, choice in zip(range(switches), (first, second), strict=False):
                bridges += [f"{bridges[-1]}/{depth}up", f"{bridges[-1]}/{depth}down{choice}"]
            numa = draw(st.sampled_from([None, 0, 1]))
            functions.append(function(f"0000:{number}{part}:00.0", *bridges, numa=numa))
        devices.append(device(str(number), *functions, group=draw(st.integers(0, 6))))
    return list(with_mates(*devices).values())


@given(hosts())
def test_distances_are_symmetric_and_never_longer_than_the_worse_of_two_steps(devices: list[Device]) -> None:
    links = matrix(devices)
    for a in range(len(devices)):
        for b in range(len(devices)):
            assert links[a][b] is links[b][a]
            for c in range(len(devices)):
                if len({a, b, c}) == 3:
                    ab, bc, ac = links[a][b], links[b][c], links[a][c]
                    assert ab is not None
                    assert bc is not None
                    assert ac is not None
                    assert ac <= max(ab, bc)


@given(hosts().flatmap(lambda devices: st.tuples(st.just(devices), st.permutations(devices))))
def test_the_order_of_the_devices_changes_no_distance(orders: tuple[list[Device], list[Device]]) -> None:
    links = [
        {
            (a.id, b.id): name
            for a, row in zip(order, matrix(order), strict=True)
            for b, name in zip(order, row, strict=True)
        }
        for order in orders
    ]
    assert links[0] == links[1]
