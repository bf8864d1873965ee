"""Fabric partitions of HGX boards: the file, and which GPUs a pod gets for which are free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from conftest import MakeNode, StartDaemon
from devices import device, eight_over_two_sockets, function, with_mates
from facts import gpu
from grpc import StatusCode
from kubelet import GrpcKubelet, refusal
from names import PGPU
from trials import wait_until

from sandbox_plugin.config.settings import Policy
from sandbox_plugin.fake import models
from sandbox_plugin.fake.hardware import FunctionSpec
from sandbox_plugin.inventory.partitions import Board, boards, parse_modules
from sandbox_plugin.inventory.prefer import prefer
from sandbox_plugin.model import Device

H100, A100, B200 = 0x2330, 0x20B2, 0x2901
TWOS = {H100: ["13", "24", "57", "68"], A100: ["12", "34", "56", "78"], B200: ["12", "34", "56", "78"]}
MODULES = [5, 7, 6, 8, 1, 3, 2, 4]
"""Of the devices 0 to 7: as on a real HGX H100, module numbers do not follow PCI addresses."""


def board(model: int = H100, first: int = 1) -> tuple[Board, ...]:
    modules = {f"0000:{i}:00.0": module + first - 1 for i, module in enumerate(MODULES)}
    return boards(modules, [replace(gpu(address), device=model) for address in modules])


def ids(modules: Iterable[int | str]) -> set[str]:
    return {str(MODULES.index(int(module))) for module in modules}


def partitions(model: int, size: int) -> list[set[str]]:
    """The sets of that size, as the Fabric Manager's guide lists them, in device IDs."""
    listed = {8: ["12345678"], 4: ["1234", "5678"], 2: TWOS[model], 1: list("12345678")}
    return [ids(each) for each in listed.get(size, [])]


def whole(model: int, free: set[str]) -> list[int]:
    return [sum(part <= free for part in partitions(model, size)) for size in (8, 4, 2)]


def take(
    size: int,
    free: Iterable[str],
    must: Sequence[str] = (),
    *,
    on: Sequence[Board],
    policy: Policy = Policy.PACKED,
    node: Mapping[str, Device] | None = None,
) -> set[str]:
    devices = eight_over_two_sockets() if node is None else node
    return set(prefer(devices, available=sorted(free), must_include=must, size=size, policy=policy, boards=on))


@pytest.mark.parametrize(
    ("model", "policy"), [(H100, Policy.PACKED), (H100, Policy.SPREAD), (A100, Policy.PACKED), (B200, Policy.PACKED)]
)
def test_whatever_is_free_the_answer_is_a_whole_partition_that_leaves_the_most_of_the_larger_ones(
    model: int, policy: Policy
) -> None:
    found = board(model)
    for count in range(1, 9):
        for free in map(set, combinations("01234567", count)):
            for size in range(1, count + 1):
                answer = take(size, free, on=found, policy=policy)
                assert len(answer) == size
                assert answer <= free
                whole_ones = [part for part in partitions(model, size) if part <= free]
                if whole_ones:
                    assert answer in whole_ones
                    assert whole(model, free - answer) == max(whole(model, free - part) for part in whole_ones)
                elif size <= 3 and any(len(half & free) >= size for half in partitions(model, 4)):
                    assert any(answer <= half for half in partitions(model, 4))


@pytest.mark.parametrize("first", [1, 9])
def test_what_must_be_included_is_in_a_partition_of_its_own_board(first: int) -> None:
    found = board(first=first)
    assert take(2, "01234567", ["0"], on=found) == ids("57")
    assert take(4, "01234567", ["5"], on=found) == ids("1234")
    assert take(2, "01234567", ["0", "4"], on=found) == ids("51")  # no partition, but what must be, must be


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("policy", list(Policy))
def test_of_two_boards_the_whole_one_stays_whole(size: int, policy: Policy) -> None:
    modules = {f"0000:{i}:00.0": i - 9 for i in range(10, 26)}
    found = boards(modules, [replace(gpu(address), device=A100) for address in modules])
    node = with_mates(*(device(str(i), function(f"0000:{i}:00.0")) for i in range(10, 26)))
    lower, upper = [[str(i) for i in range(first, first + 8)] for first in (10, 18)]
    assert take(size, lower + upper[:size], on=found, node=node, policy=policy) == set(upper[:size])
    assert take(size, lower[:size] + upper, on=found, node=node, policy=policy) == set(lower[:size])


def test_mates_of_one_iommu_group_stay_together_although_that_is_no_partition() -> None:
    nodes = eight_over_two_sockets()
    grouped = with_mates(*(d._replace(iommu_group=7 if d.id in "02" else d.iommu_group) for d in nodes.values()))
    free = ids("56")
    assert take(2, free | ids("7"), on=board(), node=grouped) == free
    assert take(2, "01234567", on=board(), node=grouped) in partitions(H100, 2)


def test_what_no_board_has_is_answered_as_without_the_file() -> None:
    node = with_mates(*eight_over_two_sockets().values(), device("8", function("0000:8:00.0")))
    everything = [str(i) for i in range(9)]
    assert take(2, everything, ["8"], on=board(), node=node) == take(2, everything, ["8"], on=(), node=node)
    assert take(2, ["0", "8", "99"], on=board(), node=node) == take(2, ["0", "8", "99"], on=(), node=node)
    both = with_mates(device("0", function("0000:0:00.0"), function("0000:1:00.0")), *list(node.values())[2:])
    assert take(1, ["0", "2"], on=board(), node=both) == {"2"}  # a group of two GPUs is no single one


def test_a_board_without_gpus_of_this_host_is_none() -> None:
    assert boards({"0000:1b:00.0": 1}, []) == ()


# The file


def test_addresses_and_modules_are_read_as_other_tools_write_them() -> None:
    text = '{"0000:1b:00.0": 1, "00000000:DF:00.0": "8", "00010000:01:00.0": 16}'
    assert parse_modules(text) == {"0000:1b:00.0": 1, "0000:df:00.0": 8, "10000:01:00.0": 16}
    assert parse_modules("{}") == {}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "it is not a JSON object"),
        ('{"1b:00.0": 1}', "'1b:00.0' is not a PCI address"),
        ('{"0000:1b:00.0": 0}', "not a number from 1 to 16"),
        ('{"0000:1b:00.0": 17}', "not a number from 1 to 16"),
        ('{"0000:1b:00.0": true}', "not a number from 1 to 16"),
        ('{"0000:1b:00.0": {"module": 1}}', "not a number from 1 to 16"),
        ('{"0000:1b:00.0": 1, "00000000:1B:00.0": 2}', "0000:1b:00.0 is there twice"),
        ('{"0000:1b:00.0": 1, "0000:1c:00.0": "1"}', "two PCI addresses have module 1"),
    ],
)
def test_a_wrong_file_is_refused_in_words(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_modules(text)


# The daemon


def test_the_daemon_follows_the_file_as_it_comes_breaks_and_goes(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, tmp_path: Path
) -> None:
    file = tmp_path / "modules.json"
    plugin = daemon(fake_node("hgx-h100"), f"--fabric-partitions={file}", "--health-interval=0.2")
    every = sorted(kubelet.wait_for(lambda: kubelet.healthy(PGPU)), key=int)
    devices = kubelet.plugin(PGPU)
    assert devices.prefer(every, 2) == ["4", "5"]
    addresses = ["1b", "43", "52", "61", "9d", "c3", "d1", "df"]
    mapping = {f"00000000:{bus.upper()}:00.0": str(m) for bus, m in zip(addresses, MODULES, strict=True)}
    file.write_text(json.dumps(mapping | {"0000:01:00.0": 9}))
    plugin.wait_for("no PCI function here has these addresses: ignored")
    scraps = ["4", "6", "8", "10", "11"]  # modules 5 6 1 2 4: the only pair is 2 and 4
    assert devices.prefer(scraps, 2) == ["10", "11"]
    assert devices.prefer(every[2:], 2) == ["6", "7"]
    file.write_text(json.dumps(dict(zip(mapping, range(1, 9), strict=True))))
    wait_until(lambda: devices.prefer(every, 2) == ["4", "6"], "modules in the order of addresses")
    for broken, why in ((b"\xff", "UTF-8"), (b" " * 70_000, "65536 bytes"), (b"{", "not JSON")):
        file.write_bytes(broken)
        plugin.wait_for("allocation without fabric partitions", reason=why)
        wait_until(lambda: devices.prefer(every, 2) == ["4", "5"], "an answer without partitions")
    seen = len(plugin.events())
    file.unlink()
    plugin.wait_for("allocation without fabric partitions", reason="No such file", since=seen)
    assert devices.prefer(every, 2) == ["4", "5"]


@pytest.mark.parametrize("flag", ["", "=8"])
def test_with_whole_node_a_container_gets_one_gpu_or_all_and_nothing_else(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, flag: str
) -> None:
    daemon(fake_node("hgx-h100"), f"--whole-node={PGPU}{flag}")
    every = sorted(kubelet.wait_for(lambda: kubelet.healthy(PGPU)), key=int)
    plugin = kubelet.plugin(PGPU)
    refused = (
        StatusCode.INVALID_ARGUMENT,
        f"{PGPU}: 4 devices for one container; with --whole-node it gets 1 or all 8: "
        "a confidential guest with any other number does not start",
    )
    assert refusal(lambda: plugin.prefer(every, 4)) == refused
    assert refusal(lambda: plugin.allocate(every[:4])) == refused
    assert refusal(lambda: plugin.allocate(every[:4], every[4:])) == refused
    assert plugin.prefer(every, 8) == every
    assert plugin.prefer(every, 1) == ["4"]
    plugin.allocate(every)


def test_a_gpu_that_has_left_its_number_behind_counts_once_for_whole_node(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    """Without PodResources the old number stays listed: a pod may hold it."""
    node = fake_node("hgx-h100")
    daemon(node, f"--whole-node={PGPU}")
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 8)
    gpu_address, other = "0000:1b:00.0", "0000:ee:00.0"
    node.unbind(gpu_address)
    node.add(FunctionSpec(address=other, model=models.NVSWITCH3, parent="pci0000:15"))
    node.bind(other)  # it takes the number
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 7)
    plugin = kubelet.plugin(PGPU)
    seven = sorted(kubelet.healthy(PGPU))
    assert "it gets 1 or all 8" in refusal(lambda: plugin.allocate(seven)).message
    node.bind(gpu_address)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 8)
    assert len(kubelet.devices(PGPU)) == 9
    every = sorted(kubelet.healthy(PGPU), key=int)
    assert plugin.prefer(every, 8) == every
    plugin.allocate(every)
