"""The fake node: its trees against what a real kernel was seen to show, its verbs against what a kernel does."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemon import places as make_places
from hypothesis import given, settings
from hypothesis import strategies as st
from names import T4

from sandbox_plugin.cli import fake_node as command
from sandbox_plugin.config.settings import UsageError
from sandbox_plugin.fake.hardware import At, FunctionSpec, Preset, RootBus
from sandbox_plugin.fake.models import H100_SXM5, Z390_ROOT_PORT
from sandbox_plugin.fake.node import FakeNode, FakeNodeError
from sandbox_plugin.fake.presets import PRESETS, WITH_CDEVS

GPU, AUDIO = "0000:01:00.0", "0000:01:00.1"
GEFORCE = [f"0000:01:00.{n}" for n in range(4)]
GEFORCE_PORT, T4_PORT = "0000:00:01.0", "0000:00:1b.0"
GH200 = "0009:01:00.0"


@pytest.fixture
def workstation(tmp_path: Path) -> FakeNode:
    return FakeNode.create(tmp_path / "node", "workstation")


@pytest.fixture
def gh200(tmp_path: Path) -> FakeNode:
    return FakeNode.create(tmp_path / "node", "gh200")


def snapshot(node: FakeNode) -> dict[str, bytes | str]:
    """Everything in a tree that the daemon could see: path -> content, or a link's text."""
    entries: dict[str, bytes | str] = {}
    for path in (p for top in ("sys", "dev", "proc") for p in (node.root / top).rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        entries[str(path.relative_to(node.root))] = content
    return entries


def dev_nodes(node: FakeNode) -> set[str]:
    dev = node.root / "dev/vfio"
    return {str(path.relative_to(dev)) for path in dev.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def texts(node: FakeNode, address: str, *attributes: str) -> list[str]:
    return [(node.folder(address) / name).read_text().strip() for name in attributes]


def numbers(node: FakeNode) -> dict[str, int]:
    return {f.address: f.vfio.number for f in node.functions() if f.vfio}


# Trees


def assert_consistent(node: FakeNode) -> None:
    """What holds in every tree that a kernel shows, read without the fake node's help."""
    root = node.root.resolve()
    for path in root.rglob("*"):
        if path.is_symlink():
            if path == root / "proc/locks":
                continue  # this machine's own
            assert not os.readlink(path).startswith("/"), path
            assert path.exists(), path
            assert path.resolve().is_relative_to(root), path
    functions = [path.resolve() for path in (root / "sys/bus/pci/devices").iterdir()]
    assert {path.parent for path in (root / "sys/devices").rglob("vendor")} == set(functions)
    for driver in (root / "sys/bus/pci/drivers").iterdir():
        assert names(driver) == {f.name for f in functions if (f / "driver").resolve() == driver}
    for group in (root / "sys/kernel/iommu_groups").iterdir():
        members = {f.name for f in functions if (f / "iommu_group").resolve() == group}
        assert names(group / "devices") == members != set()
    bound = [
        f
        for f in functions
        if (f / "driver").exists() and ("vfio" in (f / "driver").resolve().name or (f / "nvidia").exists())
    ]
    assert bound == [f for f in functions if (f / "vfio-dev").exists()]
    devices = [name for f in bound for name in names(f / "vfio-dev")]
    assert len(devices) == len(set(devices)) == len(bound)
    assert names(root / "sys/class/vfio-dev") == set(devices)
    cdevs = set(devices) if node.kernel.cdevs else set()
    assert (names(root / "dev/vfio/devices"), (root / "dev/vfio/devices").exists()) == (cdevs, cdevs != set())
    groups = {(f / "iommu_group").resolve().name for f in bound}
    held = {
        (f / "iommu_group").resolve().name
        for f in functions
        if not (f / "driver").exists() and (f / "enable").read_text() == "1\n"
    }
    shown = names(root / "sys/class/vfio")
    assert groups <= shown <= groups | held
    assert names(root / "sys/devices/virtual/vfio") == shown
    assert {name for name in names(root / "dev/vfio") if name.isdecimal()} == shown


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_becomes_a_tree_that_a_kernel_could_show_with_the_functions_of_the_preset(
    tmp_path: Path, preset: str
) -> None:
    FakeNode.create(tmp_path, preset)
    node = FakeNode.open(tmp_path)
    assert_consistent(node)
    whole = [f for f in node.functions() if f.physical_function is None]
    assert len(node.functions()) - len(whole) == sum(len(card.functions) for card in PRESETS[preset].vgpu_cards)
    found = {f.address: (f.vendor, f.device, f.class_code, f.driver, f.iommu_group) for f in whole}
    assert found == {
        s.address: (s.model.vendor, s.model.device, s.model.class_code, s.driver, s.iommu_group)
        for s in PRESETS[preset].functions()
    }
    groups = {f.iommu_group for f in node.functions()}
    assert groups.isdisjoint(numbers(node).values()), "no group has the number of a vfio device"


def test_a_bound_function_says_it_in_the_words_of_a_real_one(gh200: FakeNode) -> None:
    expected = {
        "vendor": "0x10de",
        "device": "0x2342",
        "class": "0x030200",
        "revision": "0xa1",
        "subsystem_vendor": "0x10de",
        "subsystem_device": "0x16eb",
        "numa_node": "0",
        "current_link_speed": "32.0 GT/s PCIe",
        "current_link_width": "16",
        "enable": "0",
        "power_state": "D3hot",
        "power/runtime_status": "suspended",
        "reset_method": "flr bus",
        "vfio-dev/vfio0/dev": "253:0",
    }
    assert dict(zip(expected, texts(gh200, GH200, *expected), strict=True)) == expected
    resource, fatal = texts(gh200, GH200, "resource", "aer_dev_fatal")
    assert re.fullmatch(r"(0x[0-9a-f]{16} 0x[0-9a-f]{16} 0x[0-9a-f]{16}\s*){13}", resource)
    assert fatal.splitlines()[-1] == "TOTAL_ERR_FATAL 0"
    link = os.readlink(gh200.root / "sys/class/vfio-dev/vfio0")
    assert link == "../../devices/pci0009:00/0009:00:00.0/0009:01:00.0/vfio-dev/vfio0"


@pytest.mark.parametrize(("preset", "has_cdevs"), [("hgx-h100", True), ("hgx-h100-group", False)])
def test_a_kernel_has_nodes_for_groups_and_one_with_cdevs_for_functions_too(
    tmp_path: Path, preset: str, has_cdevs: bool
) -> None:
    node = FakeNode.create(tmp_path, preset)
    bound = [f for f in node.functions() if f.vfio]
    assert list(numbers(node).values()) == list(range(12))
    assert [f.vfio.cdev for f in bound if f.vfio] == [f"253:{n}" if has_cdevs else None for n in range(12)]
    cdevs = {f"devices/vfio{n}" for n in range(12)} if has_cdevs else set()
    assert dev_nodes(node) == {str(f.iommu_group) for f in bound} | {"vfio"} | cdevs
    majors = re.findall(r"^ *\d+ (vfio.*)$", (node.root / "proc/devices").read_text(), re.MULTILINE)
    assert majors == (["vfio-dev", "vfio"] if has_cdevs else ["vfio"])


# Drivers


def test_another_driver_takes_a_function_from_the_one_that_has_it_and_wakes_it(workstation: FakeNode) -> None:
    workstation.bind(T4, "nvidia")
    assert workstation.function(T4).driver == "nvidia"
    assert workstation.function(T4).vfio is None
    assert texts(workstation, T4, "enable", "power_state", "power/runtime_status") == ["1", "D0", "active"]
    assert_consistent(workstation)


def test_binding_where_vfio_is_not_loaded_loads_it(tmp_path: Path) -> None:
    node = FakeNode.create(tmp_path / "node", "empty")
    node.add(FunctionSpec(address="0000:42:00.0", model=H100_SXM5, parent="0000:40:03.1", numa_node=0))
    assert not (node.root / "dev/vfio").exists()
    assert "vfio" not in (node.root / "proc/devices").read_text()
    FakeNode.open(node.root).bind("0000:42:00.0")
    assert dev_nodes(node) == {"vfio", str(node.function("0000:42:00.0").iommu_group), "devices/vfio0"}
    assert " vfio-dev\n" in (node.root / "proc/devices").read_text()


# Use by a VM


def test_a_function_is_awake_while_a_vm_has_it_and_asleep_afterwards(workstation: FakeNode) -> None:
    before = snapshot(workstation)
    workstation.set_enable(GPU, 1)
    assert texts(workstation, GPU, "enable", "power_state", "power/runtime_status") == ["1", "D0", "active"]
    workstation.set_enable(GPU, 0)
    assert snapshot(workstation) == before


def test_unbinding_what_a_vm_holds_takes_driver_and_cdev_at_once_and_the_rest_when_it_lets_go(gh200: FakeNode) -> None:
    gh200.set_enable(GH200, 1)
    gh200.unbind(GH200)
    function = gh200.function(GH200)
    assert (function.driver, function.vfio, function.enable) == (None, None, 1)
    assert dev_nodes(gh200) == {"vfio", "13"}
    with pytest.raises(FakeNodeError, match="held by a VM"):
        gh200.bind(GH200)
    gh200.set_enable(GH200, 0)
    assert dev_nodes(gh200) == {"vfio"}


def test_what_a_vm_still_holds_keeps_its_number_and_its_groups_node(workstation: FakeNode) -> None:
    workstation.unbind(T4)
    workstation.set_enable(GPU, 1)
    workstation.unbind(GPU)
    node = FakeNode.open(workstation.root)
    node.bind(T4)
    assert numbers(node)[T4] == 4
    for mate in GEFORCE[1:]:
        node.unbind(mate)
    assert "11" in dev_nodes(node), "the group's node stays as long"
    node.set_enable(GPU, 0)
    assert "11" not in dev_nodes(node)
    node.unbind(T4)
    node.bind(T4)
    assert numbers(node)[T4] == 0


def test_a_group_with_a_host_driver_in_it_cannot_be_opened(workstation: FakeNode) -> None:
    workstation.bind(AUDIO, "snd_hda_intel")
    with pytest.raises(FakeNodeError, match=rf"not viable.*{AUDIO}"):
        workstation.set_enable(GPU, 1)
    assert workstation.function(GPU).enable == 0
    workstation.bind(AUDIO, "pci-stub")
    workstation.set_enable(GPU, 1)
    assert workstation.function(GPU).enable == 1


# Hot-plug


@pytest.mark.parametrize("address", [GPU, AUDIO, T4, "0000:00:1f.6", T4_PORT])
def test_what_is_removed_is_gone_and_put_back_and_bound_again_as_it_was(workstation: FakeNode, address: str) -> None:
    before = snapshot(workstation)
    drivers = {f.address: f.driver for f in workstation.functions()}
    workstation.remove(address)
    assert [path for path in snapshot(workstation) if address in path] == []
    assert_consistent(workstation)
    FakeNode.open(workstation.root).add(address)
    assert workstation.removed() == []
    for function in workstation.functions():
        if function.driver is None and drivers[function.address] == "vfio-pci":
            workstation.bind(function.address)
    assert snapshot(workstation) == before


def test_what_is_below_a_bridge_goes_with_it_and_comes_back_after_it(workstation: FakeNode) -> None:
    workstation.remove(T4_PORT)
    assert workstation.removed() == [T4_PORT, T4]
    with pytest.raises(FakeNodeError, match=f"{T4_PORT}, the bridge above {T4}, is not there"):
        workstation.add(T4)
    workstation.add(T4_PORT)
    assert (workstation.function(T4_PORT).driver, workstation.function(T4).driver) == ("pcieport", None)


@pytest.mark.parametrize("order", [1, -1])
def test_group_mates_find_each_other_in_whatever_order_they_come_back(workstation: FakeNode, order: int) -> None:
    chipset = [f"0000:00:1f.{n}" for n in (0, 3, 4, 6)]
    for address in chipset:
        workstation.remove(address)
    workstation.add(FunctionSpec(address="0000:00:1c.0", model=Z390_ROOT_PORT, parent="pci0000:00"))
    assert workstation.function("0000:00:1c.0").iommu_group == 14, "that number was free now"
    for address in chipset[::order]:
        workstation.add(address)
    assert {workstation.function(address).iommu_group for address in chipset} == {15}


def test_a_function_comes_back_without_its_host_driver_while_a_vm_holds_its_group(workstation: FakeNode) -> None:
    workstation.bind(GPU, "nvidia")
    workstation.remove(GPU)
    workstation.set_enable(AUDIO, 1)
    workstation.add(GPU)
    assert workstation.function(GPU).driver is None


# Sickness


def _off_the_bus(node: FakeNode) -> set[str]:
    return {f.address for f in node.functions() if f.link_speed == "Unknown"}


@pytest.mark.parametrize("cold", [False, True])
def test_a_device_off_the_bus_says_so_in_its_link_and_is_as_it_was_when_it_is_healed(
    workstation: FakeNode, cold: bool
) -> None:
    before = snapshot(workstation)
    workstation.sicken(T4, cold=cold)
    after = snapshot(workstation)
    changed = {path.rpartition("/")[2] for path in before if after[path] != before[path]}
    assert changed == {"current_link_speed", "current_link_width"} | ({"power_state"} if cold else set())
    assert texts(workstation, T4, "current_link_speed", "current_link_width") == ["Unknown", "63"]
    assert texts(workstation, T4, "power_state") == ["D3cold" if cold else "D3hot"]
    workstation.sicken(T4)
    FakeNode.open(workstation.root).heal(T4)
    assert snapshot(workstation) == before


def test_sickness_befalls_all_functions_of_the_slot_and_all_below_a_bridge(workstation: FakeNode) -> None:
    workstation.sicken(AUDIO)
    assert _off_the_bus(workstation) == set(GEFORCE)
    workstation.heal(GPU)
    workstation.sicken(T4_PORT)
    assert _off_the_bus(workstation) == {T4_PORT, T4}
    workstation.remove(T4)
    workstation.add(T4)
    assert _off_the_bus(workstation) == {T4_PORT}, "what is put back is well"


def test_an_attribute_can_be_given_sense_and_nonsense(workstation: FakeNode) -> None:
    for name, content in (("numa_node", "1"), ("power/runtime_status", ""), ("vendor", b"\xff\x00")):
        workstation.set_attribute(T4, name, content)
    assert texts(workstation, T4, "numa_node", "power/runtime_status") == ["1", ""]
    assert (workstation.function(T4).numa_node, workstation.function(T4).vendor) == (1, 0)


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda node: node.bind(T4), "bound to vfio-pci already"),
        (lambda node: node.bind(GPU, "nvidia"), "held by a VM"),
        (lambda node: node.bind(AUDIO, "snd_hda_intel"), "EBUSY"),
        (lambda node: node.bind(GEFORCE_PORT), "is a bridge"),
        (lambda node: node.bind("0000:77:00.0"), "no PCI function"),
        (lambda node: node.bind(T4, "../x"), "is not the name of a driver"),
        (lambda node: node.bind(T4, ""), "is not the name of a driver"),
        (lambda node: node.unbind("0000:00:1f.0"), "not bound"),
        (lambda node: node.unbind("../devices"), "no PCI function"),
        (lambda node: node.remove(""), "no PCI function"),
        (lambda node: node.add(T4), "there already"),
        (lambda node: node.add("0000:77:00.0"), "no function '0000:77:00.0' was removed"),
        (lambda node: node.sicken("0000:00:1f.6"), "no PCIe link"),
    ],
)
def test_what_the_kernel_refuses_changes_nothing(
    workstation: FakeNode, change: Callable[[FakeNode], None], message: str
) -> None:
    workstation.set_enable(GPU, 1)
    before = snapshot(workstation)
    with pytest.raises(FakeNodeError, match=message) as error:
        change(workstation)
    assert "\n" not in str(error.value)
    assert snapshot(workstation) == before


# What a reader may see half-way: links before nodes on the way in, and gone before them on the way out


def test_a_bind_and_an_unbind_show_their_steps_in_the_kernels_order(gh200: FakeNode) -> None:
    paths = {"os.symlink": 1, "os.mkdir": 0, "open": 0, "os.remove": 0, "os.rmdir": 0}
    seen: list[str] = []

    def hear(event: str, args: tuple[Any, ...]) -> None:
        """Everything that is made or taken away. What listens so stays for ever, so at the end it is made deaf."""
        if event in paths and (event != "open" or args[2] & os.O_CREAT):
            seen.append(os.fsdecode(args[paths[event]]).removeprefix(f"{gh200.root}/"))

    folder, driver = f"sys/devices/pci0009:00/0009:00:00.0/{GH200}", "sys/bus/pci/drivers/nvgrace_gpu_vfio_pci"
    links = [f"{driver}/{GH200}", f"{folder}/driver"]
    device, node, group = f"{folder}/vfio-dev/vfio0", "dev/vfio/devices/vfio0", "dev/vfio/13"
    sys.addaudithook(hear)
    gh200.unbind(GH200)
    steps = [*links, node, f"{device}/dev", "sys/class/vfio-dev/vfio0", group]
    assert [path for path in seen if path in steps] == steps
    seen.clear()
    gh200.bind(GH200, "nvgrace_gpu_vfio_pci")
    steps = [*links, "sys/class/vfio/13", group, device, "sys/class/vfio-dev/vfio0", f"{device}/dev", node]
    paths.clear()
    assert [path for path in seen if path in steps] == steps


# Making and opening a node


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder, message in ((tmp_path, "not empty"), (tmp_path / "file", "not a folder")):
        with pytest.raises(FakeNodeError, match=message):
            FakeNode.create(folder, "gh200")
        with pytest.raises(FakeNodeError, match="is not a fake node"):
            FakeNode.open(folder)
    assert names(tmp_path) == {"file"}


def test_where_a_tree_cannot_be_made_whole_nothing_is_left_of_it(tmp_path: Path) -> None:
    twice = RootBus(name="pci0000:00", functions=(At("00:04.2", Z390_ROOT_PORT), At("00:04.2", Z390_ROOT_PORT)))
    with pytest.raises(OSError, match=f"File exists: '{tmp_path}/new'"):
        FakeNode.create(tmp_path / "new", Preset(summary="", kernel=WITH_CDEVS, buses=(twice,)))
    assert names(tmp_path) == set()


def test_a_relative_path_through_a_link_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    FakeNode.create("link/node", "gh200").unbind(GH200)
    assert_consistent(FakeNode.open(tmp_path / "real/node"))


# Whatever happens

VERBS: dict[str, Callable[[FakeNode, str], None]] = {
    "bind": lambda node, address: node.bind(address),
    "host": lambda node, address: node.bind(address, "nvidia"),
    "unbind": lambda node, address: node.unbind(address),
    "open": lambda node, address: node.set_enable(address, 1),
    "close": lambda node, address: node.set_enable(address, 0),
    "remove": lambda node, address: node.remove(address),
    "add": lambda node, address: node.add(address),
    "sicken": lambda node, address: node.sicken(address),
    "heal": lambda node, address: node.heal(address),
}
STEP = st.tuples(st.sampled_from(sorted(VERBS)), st.sampled_from([GEFORCE_PORT, T4_PORT, *GEFORCE[:3], T4]))


@settings(max_examples=25)
@given(steps=st.lists(STEP, max_size=30))
def test_whatever_happens_the_tree_stays_one_that_a_kernel_shows(steps: list[tuple[str, str]]) -> None:
    with make_places() as places:
        node = FakeNode.create(places.top / "node", "workstation")
        for verb, address in steps:
            before = snapshot(node)
            try:
                VERBS[verb](node, address)
            except FakeNodeError:
                assert snapshot(node) == before
            assert_consistent(node)


# The command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`sandbox-plugin fake-node ARGUMENTS`: what it prints."""

    def run(*arguments: object) -> str:
        parser = argparse.ArgumentParser()
        command.set_up(parser)
        args = parser.parse_args([*map(str, arguments)])
        assert args.run(args) == 0
        return capsys.readouterr().out

    return run


def test_the_command_makes_a_node_and_changes_it_by_its_verbs(run: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "node"
    assert [line.split()[0] for line in run("presets").splitlines()] == list(PRESETS)
    assert "5 functions bound to vfio" in run("create", "workstation", folder)
    for arguments, said in (
        (("unbind", folder, T4), "no driver, group 13"),
        (("bind", folder, "02:00.0", "--driver", "nvidia"), "driver nvidia"),
        (("bind", folder, T4), "driver vfio-pci, group 13, vfio4 (no cdev)"),
        (("enable", folder, T4, 1), "in use by a VM"),
        (("enable", folder, T4, 0), "vfio4 (no cdev)\n"),
        (("sicken", folder, T4), "off the bus"),
        (("heal", folder, T4), "vfio4 (no cdev)\n"),
        (("sicken", folder, T4, "--cold"), "off the bus"),
        (("remove", folder, T4), f"removed: {T4}\n"),
        (("show", folder), f"\nremoved: {T4}\n"),
        (("add", folder, T4), "no driver"),
    ):
        assert said in run(*arguments), arguments


def test_the_command_sets_types_of_vgpus_and_shows_them(run: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "node"
    assert "7 functions bound to vfio" in run("create", "vgpu", folder)
    assert run("vgpu", folder, "21:00.4", 0).endswith(", no vGPU type\n")
    filled = run("vgpu", folder, "21:00.0", 1155).splitlines()
    assert [line.partition(": ")[0] for line in filled] == ["0000:21:00.4", "0000:21:00.5"]
    assert filled[0].endswith(", vfio1, vGPU type 1155")
    assert "vGPU type 1155, in use by a VM" in run("enable", folder, "21:00.4", 1)


def test_show_has_a_line_for_each_function_and_for_bridges_if_asked(run: Callable[..., str], tmp_path: Path) -> None:
    FakeNode.create(tmp_path, "workstation").bind(T4, "nvidia")
    lines = run("show", tmp_path).splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["0000:00:1f.3", "0000:00:1f.4", "0000:00:1f.6", GPU, AUDIO]
    assert "nvidia" in lines[8]
    assert lines[-1] == "and 4 bridges and system peripherals (--all)"
    assert len(run("show", tmp_path, "--all").splitlines()) == 1 + 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("create dgx {}/new", "there is no preset 'dgx'; there are hgx-h100, "),
        ("create gh200 {}/file/node", "file"),
        ("bind {}/node 77:00.0", "no PCI function '0000:77:00.0'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    run: Callable[..., str], gh200: FakeNode, arguments: str, message: str
) -> None:
    folder = gh200.root.parent
    (folder / "file").write_text("")
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        run(*arguments.format(folder).split())
    assert "\n" not in str(error.value)


def test_a_full_disk_is_no_fault_of_what_was_given_and_names_the_folder(
    run: Callable[..., str], workstation: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FakeNode, "sicken", fail)
    with pytest.raises(OSError, match=f"No space left on device: '{workstation.root}'"):
        run("sicken", workstation.root, T4)
