"""Reading one PCI function and what belongs to all, on made-up trees that are changed and broken on purpose."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeNode
from hypothesis import given, settings
from hypothesis import strategies as st
from names import AUDIO, GEFORCE, T4

from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.host import bus, pci_function, sysfs
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.model import Bar, Device, PciFunction, Placement, VfioDev

GEFORCE_BRIDGE = "0000:00:01.0"
GEFORCE_GROUP, T4_GROUP = 11, 13
GEFORCE_MEMBERS = (GEFORCE_BRIDGE, GEFORCE, AUDIO, "0000:01:00.2", "0000:01:00.3")
GRACE_GPU = "0009:01:00.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
KIB, MIB = 1 << 10, 1 << 20


class Tree:
    """A made-up node and the paths below it."""

    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.paths = HostPaths(node.root)

    def read(self, address: str = T4) -> PciFunction:
        return pci_function.read_function(self.paths, address)

    def file(self, name: str, address: str = T4) -> Path:
        return self.node.folder(address) / name

    def put_fifo(self, name: str, address: str = T4) -> None:
        """Whoever opens it to read waits for ever."""
        self.file(name, address).unlink(missing_ok=True)
        os.mkfifo(self.file(name, address))

    def put_folder(self, name: str, address: str = T4) -> None:
        """A file that root cannot read either."""
        self.file(name, address).unlink(missing_ok=True)
        self.file(name, address).mkdir()

    def functions(self) -> dict[str, PciFunction]:
        return {address: self.read(address) for address in bus.list_addresses(self.paths)}


@pytest.fixture
def tree(fake_node: MakeNode) -> Tree:
    return Tree(fake_node("workstation"))


@pytest.fixture
def grace(fake_node: MakeNode) -> Tree:
    return Tree(fake_node("gh200"))


# What a function is


def test_a_bound_function_is_read_whole(tree: Tree) -> None:
    found = tree.read(GEFORCE)
    assert (found.vendor, found.device, found.class_code) == (0x10DE, 0x21C4, 0x030000)
    assert (found.subsystem_vendor, found.subsystem_device, found.revision) == (0x1458, 0x4014, 0xA1)
    assert (found.driver, found.iommu_group, found.vfio) == ("vfio-pci", 11, VfioDev(number=0, cdev=None))
    assert (found.link_speed, found.link_width) == ("8.0 GT/s PCIe", 16)
    assert (found.enable, found.power_state) == (0, "D3hot")
    assert found.bridges == ("pci0000:00", GEFORCE_BRIDGE)
    assert (found.virtual_functions, found.physical_function, found.fatal_errors) == (0, None, 0)
    assert found.unread == ()


def test_regions_have_their_sizes_and_kinds(tree: Tree) -> None:
    assert tree.read(GEFORCE).bars == (
        Bar(index=0, size=16 * MIB, prefetchable=False, wide=False, io=False),
        Bar(index=1, size=256 * MIB, prefetchable=True, wide=True, io=False),
        Bar(index=3, size=32 * MIB, prefetchable=True, wide=True, io=False),
        Bar(index=5, size=128, prefetchable=False, wide=False, io=True),
        Bar(index=6, size=512 * KIB, prefetchable=True, wide=False, io=False),
    )


def test_a_cdev_is_known_by_its_dev_file_and_a_variant_driver_is_as_good(grace: Tree) -> None:
    found = grace.read(GRACE_GPU)
    assert found.driver == "nvgrace_gpu_vfio_pci"
    assert found.vfio == VfioDev(number=0, cdev="253:0")


def test_a_vfio_device_without_a_dev_file_has_no_cdev(grace: Tree) -> None:
    grace.file("vfio-dev/vfio0/dev", GRACE_GPU).unlink()
    assert grace.read(GRACE_GPU).vfio == VfioDev(number=0, cdev=None)


@pytest.mark.parametrize("content", ["", "253", "dev", "253:0:1"])
def test_a_dev_file_that_says_no_numbers_is_no_cdev(grace: Tree, content: str) -> None:
    grace.node.set_attribute(GRACE_GPU, "vfio-dev/vfio0/dev", content)
    assert grace.read(GRACE_GPU).vfio == VfioDev(number=0, cdev=None)


def test_a_vfio_device_of_the_mode_without_an_iommu_is_none(grace: Tree) -> None:
    folder = grace.file("vfio-dev", GRACE_GPU)
    (folder / "vfio0").rename(folder / "noiommu-vfio0")
    assert grace.read(GRACE_GPU).vfio is None


def test_of_a_function_on_a_host_driver_only_what_it_is_and_where_is_read(tree: Tree) -> None:
    tree.node.bind(T4, "nvidia")
    for name in ("numa_node", "enable", "power_state", "current_link_speed", "resource", "aer_dev_fatal"):
        tree.put_fifo(name)
    found = tree.read()
    assert (found.driver, found.iommu_group, found.vfio, found.device) == ("nvidia", 13, None, 0x1EB8)
    assert (found.enable, found.power_state, found.bars) == (None, None, ())


def test_a_function_without_a_driver_and_one_without_a_group_are_read(tree: Tree) -> None:
    tree.node.unbind(T4)
    tree.file("iommu_group").unlink()
    found = tree.read()
    assert (found.driver, found.iommu_group, found.vfio) == (None, None, None)


def test_a_function_that_was_unbound_under_a_vm_is_watched_until_the_vm_lets_go(tree: Tree) -> None:
    tree.node.set_enable(T4, 1)
    held = tree.read()
    tree.node.unbind(T4)
    unbound = pci_function.read_function(tree.paths, T4, held)
    assert (unbound.driver, unbound.enable) == (None, 1)
    tree.node.set_enable(T4, 0)
    free = pci_function.read_function(tree.paths, T4, unbound)
    assert (free.driver, free.enable) == (None, None)
    tree.node.set_attribute(T4, "enable", "1")
    assert pci_function.read_function(tree.paths, T4, free).enable is None, "whoever enables it now is no VM"


def test_a_function_without_a_driver_that_is_seen_for_the_first_time_may_be_a_vms(tree: Tree) -> None:
    tree.node.set_enable(T4, 1)
    tree.node.unbind(T4)
    assert tree.read().enable == 1


def test_binding_a_function_again_gives_it_another_binding(tree: Tree) -> None:
    before = tree.read().vfio
    (tree.file("vfio-dev")).rename(tree.file("vfio-dev").with_name("kept"))  # so that its inode number stays taken
    shutil.copytree(tree.file("kept"), tree.file("vfio-dev"), symlinks=True)
    after = tree.read().vfio
    assert before is not None
    assert after is not None
    assert before == after
    assert before.binding != after.binding


# What must not be touched


@pytest.mark.parametrize("address", [T4, GEFORCE])
def test_what_can_block_is_never_opened(tree: Tree, address: str) -> None:
    for name in ("config", "uevent", "driver_override", "sriov_numvfs"):
        tree.put_fifo(name, address)
    assert tree.read(address).driver == "vfio-pci"


def test_the_node_of_a_device_is_never_opened(tree: Tree) -> None:
    for node in ("11", "13", "vfio"):
        (tree.paths.dev_vfio / node).unlink()
        os.mkfifo(tree.paths.dev_vfio / node)
    assert tree.read().driver == "vfio-pci"
    assert bus.read_dev_nodes(tree.paths) == frozenset({"/dev/vfio/11", "/dev/vfio/13"})


def asleep(tree: Tree) -> None:
    tree.node.set_attribute(GEFORCE, "power_state", "D3cold")


def below_a_sleeping_bridge(tree: Tree) -> None:
    tree.node.set_attribute(GEFORCE_BRIDGE, "power_state", "D3hot")


def below_a_bridge_that_cannot_say(tree: Tree) -> None:
    tree.file("power_state", GEFORCE_BRIDGE).unlink()
    tree.file("power/runtime_status", GEFORCE_BRIDGE).unlink()


def below_a_sleeping_bridge_of_an_old_kernel(tree: Tree) -> None:
    tree.file("power_state", GEFORCE_BRIDGE).unlink()
    tree.node.set_attribute(GEFORCE_BRIDGE, "power/runtime_status", "suspended")


@pytest.mark.parametrize(
    "put", [asleep, below_a_sleeping_bridge, below_a_bridge_that_cannot_say, below_a_sleeping_bridge_of_an_old_kernel]
)
def test_a_link_is_not_read_where_that_would_wake_something(tree: Tree, put: Callable[[Tree], None]) -> None:
    put(tree)
    for name in ("current_link_speed", "current_link_width"):
        tree.put_fifo(name, GEFORCE)
    found = tree.read(GEFORCE)
    assert (found.link_speed, found.link_width) == (None, None)


def test_on_an_old_kernel_a_link_is_read_below_a_bridge_that_is_awake(tree: Tree) -> None:
    tree.file("power_state", GEFORCE_BRIDGE).unlink()
    tree.node.set_attribute(GEFORCE_BRIDGE, "power/runtime_status", "active")
    assert tree.read(GEFORCE).link_width == 16


def test_a_link_of_a_device_that_merely_sleeps_lightly_is_read(tree: Tree) -> None:
    tree.node.sicken(GEFORCE)
    found = tree.read(GEFORCE)
    assert (found.power_state, found.link_speed, found.link_width) == ("D3hot", "Unknown", 63)


# In D3cold


def test_of_a_function_in_d3cold_it_is_told_whether_the_kernel_takes_it_for_awake_and_whether_it_has_power(
    tree: Tree,
) -> None:
    tree.node.sicken(GEFORCE, cold=True)
    tree.node.set_attribute(GEFORCE, "power/runtime_status", "active")
    found = tree.read(GEFORCE)
    assert (found.power_state, found.runtime_status, found.has_power) == ("D3cold", "active", True)
    assert (found.link_speed, found.unread) == (None, ())


@pytest.mark.parametrize("name", ["power_resources_D3hot", "real_power_state"])
def test_a_function_in_d3cold_may_have_no_power_where_acpi_can_cut_it(tree: Tree, name: str) -> None:
    tree.node.sicken(GEFORCE, cold=True)
    acpi = tree.paths.root / "sys/devices/LNXSYSTM:00/device:2a"
    acpi.mkdir(parents=True)
    tree.file("firmware_node", GEFORCE).symlink_to(acpi)
    assert tree.read(GEFORCE).has_power is True
    os.mkfifo(acpi / name)  # to read it would ask the firmware
    assert tree.read(GEFORCE).has_power is False


@pytest.mark.parametrize(
    "put", [below_a_sleeping_bridge, below_a_bridge_that_cannot_say, below_a_sleeping_bridge_of_an_old_kernel]
)
def test_a_function_in_d3cold_may_have_no_power_below_a_bridge_that_sleeps(
    tree: Tree, put: Callable[[Tree], None]
) -> None:
    tree.node.sicken(GEFORCE, cold=True)
    put(tree)
    found = tree.read(GEFORCE)
    assert (found.power_state, found.has_power, found.link_speed) == ("D3cold", False, None)


@pytest.mark.parametrize("state", ["D0", "D3hot", "unknown"])
def test_what_is_asked_in_d3cold_is_not_asked_of_any_other_function(tree: Tree, state: str) -> None:
    tree.node.set_attribute(GEFORCE, "power_state", state)
    tree.put_fifo("power/runtime_status", GEFORCE)
    found = tree.read(GEFORCE)
    assert (found.power_state, found.runtime_status, found.has_power) == (state, None, None)


def test_a_function_that_is_woken_while_it_is_read_is_not_taken_to_be_in_d3cold(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.node.sicken(GEFORCE, cold=True)
    real = sysfs.text

    def wake(file: str, limit: int = 4096) -> str:
        if file.endswith("power/runtime_status"):
            tree.node.set_attribute(GEFORCE, "power_state", "D0")
            tree.node.set_attribute(GEFORCE, "power/runtime_status", "active")
        return real(file, limit)

    monkeypatch.setattr(sysfs, "text", wake)
    found = tree.read(GEFORCE)
    assert (found.power_state, found.runtime_status) == ("D0", "active")


# What is missing, nonsense or unreadable


@pytest.mark.parametrize("name", ["vendor", "device", "class"])
@pytest.mark.parametrize("content", ["", "10de", "0x", "0xg0", "0x1234567", "-1", "0x10de 0x10de", "\udcff"])
def test_a_function_that_makes_no_sense_is_refused_in_words(tree: Tree, name: str, content: str) -> None:
    tree.node.set_attribute(T4, name, content.encode("utf-8", "surrogateescape"))
    with pytest.raises(pci_function.FunctionUnreadable, match=f"^{name} is '.*', not a hexadecimal number$"):
        tree.read()


@pytest.mark.parametrize("name", ["vendor", "device", "class"])
def test_a_function_that_vanishes_is_refused_in_words(tree: Tree, name: str) -> None:
    tree.file(name).unlink()
    with pytest.raises(pci_function.FunctionUnreadable, match=f"^{name} is missing "):
        tree.read()


def test_a_function_that_cannot_be_read_is_refused_with_the_kernels_words(tree: Tree) -> None:
    tree.put_folder("vendor")
    with pytest.raises(pci_function.FunctionUnreadable, match=r"^vendor cannot be read: Is a directory$"):
        tree.read()


def test_a_driver_that_is_no_link_costs_the_function(tree: Tree) -> None:
    tree.file("driver").unlink()
    tree.file("driver").touch()
    with pytest.raises(pci_function.FunctionUnreadable, match=r"^driver cannot be read: "):
        tree.read()


@pytest.mark.parametrize("target", ["../../noiommu", "../../-1", "../../\u0661"])
def test_a_group_without_a_number_costs_the_function(tree: Tree, target: str) -> None:
    tree.file("iommu_group").unlink()
    tree.file("iommu_group").symlink_to(target)
    with pytest.raises(pci_function.FunctionUnreadable, match="not to a numbered group"):
        tree.read()


def test_a_function_that_hangs_below_nothing_is_refused(tree: Tree) -> None:
    link = tree.paths.pci_devices / T4
    elsewhere = tree.paths.root / "elsewhere" / T4
    elsewhere.parent.mkdir()
    tree.file(".").rename(elsewhere)
    link.unlink()
    link.symlink_to(elsewhere)
    with pytest.raises(pci_function.FunctionUnreadable, match="below a PCI host bridge"):
        tree.read()


@pytest.mark.parametrize("address", ["", "junk", "0000:01:00.8", "0000:01:20.0", "0000:1:00.0", "../x", "0000:0A:00.0"])
def test_what_is_no_address_is_refused(tree: Tree, address: str) -> None:
    with pytest.raises(pci_function.FunctionUnreadable, match="is not a PCI address"):
        tree.read(address)


def test_a_domain_may_have_more_than_four_digits(tree: Tree) -> None:
    wide = "10000:02:00.0"
    tree.file(".").rename(tree.file(".").with_name(wide))
    (tree.paths.pci_devices / T4).unlink()
    (tree.paths.pci_devices / wide).symlink_to(f"../../../devices/pci0000:00/0000:00:1b.0/{wide}")
    assert tree.read(wide).bridges == ("pci0000:00", "0000:00:1b.0")


OPTIONAL = {
    "numa_node": "numa_node",
    "current_link_speed": "link_speed",
    "current_link_width": "link_width",
    "enable": "enable",
    "power_state": "power_state",
    "subsystem_vendor": "subsystem_vendor",
    "revision": "revision",
    "aer_dev_fatal": "fatal_errors",
}


@pytest.mark.parametrize(("name", "attribute"), OPTIONAL.items())
def test_a_function_may_lack_any_other_attribute(grace: Tree, name: str, attribute: str) -> None:
    assert getattr(grace.read(GRACE_GPU), attribute) is not None
    grace.file(name, GRACE_GPU).unlink()
    found = grace.read(GRACE_GPU)
    assert getattr(found, attribute) is None
    assert found.unread == ()


@pytest.mark.parametrize(("name", "attribute"), OPTIONAL.items())
def test_an_attribute_that_cannot_be_read_costs_nothing_else_and_is_told(
    grace: Tree, name: str, attribute: str
) -> None:
    grace.put_folder(name, GRACE_GPU)
    found = grace.read(GRACE_GPU)
    assert getattr(found, attribute) is None
    assert found.vfio == VfioDev(number=0, cdev="253:0")
    assert found.unread == (f"{name}: Is a directory",)


@pytest.mark.parametrize("name", ["numa_node", "current_link_width", "enable", "subsystem_vendor", "revision"])
def test_a_number_that_is_none_is_told(tree: Tree, name: str) -> None:
    tree.node.set_attribute(T4, name, "many")
    (line,) = tree.read().unread
    assert line.startswith(f"{name}")
    assert "'many'" in line


@pytest.mark.parametrize("content", ["-1", "-2147483648", "2147483648", "99999999999999999999"])
def test_a_numa_node_that_cannot_be_is_unknown(tree: Tree, content: str) -> None:
    tree.node.set_attribute(T4, "numa_node", content)
    assert tree.read().numa_node is None


@pytest.mark.parametrize(
    "content", ["0x0", "x y z", "0x0 0x1 0x2 0x3", "0x00000000 0x00000fff zzz"], ids=["one", "words", "four", "flags"]
)
def test_regions_that_make_no_sense_are_told(tree: Tree, content: str) -> None:
    tree.node.set_attribute(T4, "resource", content)
    assert (tree.read().bars, tree.read().unread) == ((), ("resource: not lines of three numbers",))


def test_a_region_that_the_firmware_left_unassigned_is_not_listed(tree: Tree) -> None:
    lines = ["0x0000000000000000 0x0000000000000000 0x0000000000040200"] * 6
    lines[2] = "0x0000000010000000 0x0000000010000fff 0x0000000000040200"
    tree.node.set_attribute(T4, "resource", "\n".join(lines))
    assert tree.read().bars == (Bar(index=2, size=4096, prefetchable=False, wide=False, io=False),)


UNSET, ROM_ENABLED = 0x20000000, 0x1


def with_region(tree: Tree, index: int, last: int, flags: int) -> None:
    """Only this region, from 0 to `last`: without an address, all begin at 0."""
    lines = [f"0x{0:016x} 0x{0:016x} 0x{0:016x}"] * 13
    lines[index] = f"0x{0:016x} 0x{last:016x} 0x{flags:016x}"
    tree.node.set_attribute(T4, "resource", "\n".join(lines))


@pytest.mark.parametrize(("last", "size"), [(0xFFFFFFF, 256 * MIB), (0, 0)], ids=["size known", "size not known"])
def test_a_region_that_could_not_be_given_an_address_is_listed_as_such(tree: Tree, last: int, size: int) -> None:
    with_region(tree, 1, last, 0x14220C | UNSET)
    assert tree.read().bars == (Bar(index=1, size=size, prefetchable=True, wide=True, io=False, unset=True),)


@pytest.mark.parametrize("enabled", [True, False])
def test_an_expansion_rom_needs_an_address_only_while_it_is_switched_on(tree: Tree, enabled: bool) -> None:
    with_region(tree, 6, 0x7FFFF, 0x46200 | UNSET | (ROM_ENABLED if enabled else 0))
    (rom,) = tree.read().bars
    assert (rom.index, rom.unset) == (6, enabled)


def test_regions_of_virtual_functions_do_not_count(tree: Tree) -> None:
    with_region(tree, 8, 0xFFFFFFF, 0x14220C | UNSET)
    assert tree.read().bars == ()


def test_a_region_without_an_address_is_read_again_until_it_has_one(tree: Tree) -> None:
    whole = tree.file("resource").read_text()
    with_region(tree, 1, 0xFFFFFFF, 0x14220C | UNSET)
    before = tree.read()
    tree.node.set_attribute(T4, "resource", whole)
    after = pci_function.read_function(tree.paths, T4, before)
    assert [bar.unset for bar in after.bars] == [False] * 3
    tree.put_fifo("resource")
    assert pci_function.read_function(tree.paths, T4, after).bars == after.bars


def test_regions_may_have_another_size_when_a_function_is_bound_again(tree: Tree) -> None:
    before = tree.read()
    tree.node.unbind(T4)
    unbound = pci_function.read_function(tree.paths, T4, before)
    with_region(tree, 1, 0xFFFFFFFF, 0x14220C)
    tree.node.bind(T4)
    for known in (before, unbound):
        known = replace(known, vfio=known.vfio and replace(known.vfio, binding=1))  # inode numbers are used again here
        found = pci_function.read_function(tree.paths, T4, known)
        assert [bar.size for bar in found.bars] == [4096 * MIB]


@pytest.mark.parametrize(
    ("method", "has_reset", "methods"),
    [
        ("flr bus", True, ("flr", "bus")),
        ("", True, ()),
        (None, True, None),
        (None, False, ()),
    ],
    ids=["some", "switched off", "old kernel", "none from the start"],
)
def test_the_ways_to_reset_a_function_are_told(
    tree: Tree, method: str | None, has_reset: bool, methods: tuple[str, ...] | None
) -> None:
    if method is None:
        tree.file("reset_method").unlink()
    else:
        tree.node.set_attribute(T4, "reset_method", method)
    if not has_reset:
        tree.file("reset").unlink()
    assert tree.read().reset_methods == methods


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ("DLP 1\nSDES 2\nTOTAL_ERR_FATAL 3", 3),
        ("TOTAL_ERR_FATAL 0", 0),
        ("TOTAL_ERR_FATAL many", None),
        ("DLP 1", None),
        ("", None),
    ],
)
def test_the_count_of_fatal_errors_is_their_total(tree: Tree, content: str, count: int | None) -> None:
    tree.node.set_attribute(T4, "aer_dev_fatal", content)
    assert tree.read().fatal_errors == count


def test_virtual_functions_and_what_carries_them_are_told(tree: Tree) -> None:
    for number in range(4):
        (tree.file(f"virtfn{number}", GEFORCE)).symlink_to(f"../0000:01:02.{number}")
    (tree.file("physfn")).symlink_to(f"../../0000:00:01.0/{GEFORCE}")
    assert tree.read(GEFORCE).virtual_functions == 4
    assert tree.read().physical_function == GEFORCE


@pytest.fixture(scope="module")
def battered(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(FakeNode.create(tmp_path_factory.mktemp("battered") / "host", "gh200"))


names = sorted({*OPTIONAL, "vendor", "device", "class", "resource", "vfio-dev/vfio0/dev", "subsystem_device"})
nonsense = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"0x10de\n", b"-1\n", b"1" * 5000, b"0x" + b"f" * 30, b"TOTAL_ERR_FATAL \xc2\xb2\n"]),
    st.integers().map(lambda n: str(n).encode()),
)


@settings(max_examples=150)
@given(contents=st.dictionaries(st.sampled_from(names), nonsense, min_size=1, max_size=4))
def test_whatever_sysfs_says_a_function_is_read_or_refused(battered: Tree, contents: dict[str, bytes]) -> None:
    before = {name: battered.file(name, GRACE_GPU).read_bytes() for name in contents}
    for name, content in contents.items():
        battered.node.set_attribute(GRACE_GPU, name, content)
    try:
        found = battered.read(GRACE_GPU)
    except pci_function.FunctionUnreadable:
        assert {"vendor", "device", "class"} & contents.keys()
    else:
        assert 0 <= found.vendor <= 0xFFFF
        assert 0 <= found.device <= 0xFFFF
        assert 0 <= found.class_code <= 0xFFFFFF
        assert found.numa_node is None or 0 <= found.numa_node < 1 << 31
        assert all(bar.size > 0 or bar.unset for bar in found.bars)
        assert all("\n" not in line for line in found.unread)
    finally:
        for name, content in before.items():
            battered.node.set_attribute(GRACE_GPU, name, content)


# What is the same as before


def test_what_can_never_change_is_taken_from_before(tree: Tree) -> None:
    before = tree.read()
    for name in ("vendor", "device", "class", "subsystem_vendor", "subsystem_device", "revision"):
        tree.put_fifo(name)
    assert pci_function.read_function(tree.paths, T4, before) == before


def test_what_changes_is_never_taken_from_before(tree: Tree) -> None:
    before = tree.read()
    tree.node.bind(T4, "nvidia")
    after = pci_function.read_function(tree.paths, T4, before)
    assert (after.driver, after.vfio, after.enable) == ("nvidia", None, None)
    tree.node.bind(T4)
    tree.node.set_enable(T4, 1)
    tree.node.sicken(T4)
    again = pci_function.read_function(tree.paths, T4, after)
    assert again == tree.read()
    assert (again.vfio, again.enable, again.link_width) == (VfioDev(number=4, cdev=None), 1, 63)


def test_another_function_in_its_place_has_another_stamp(tree: Tree) -> None:
    before = pci_function.stamp(tree.paths, T4)
    assert before == pci_function.stamp(tree.paths, T4)
    tree.node.remove(T4)
    assert pci_function.stamp(tree.paths, T4) is None
    tree.node.add(T4)
    assert pci_function.stamp(tree.paths, T4) not in (None, before)


def test_the_driver_of_a_function_can_be_asked_for_alone(tree: Tree) -> None:
    assert pci_function.driver_of(tree.paths, T4) == "vfio-pci"
    tree.node.unbind(T4)
    assert pci_function.driver_of(tree.paths, T4) is None
    tree.file("driver").touch()
    assert pci_function.driver_of(tree.paths, T4) is None


# Mediated devices


def add_mdev(tree: Tree, uuid: str = UUID, *, on: str = T4, driver: str | None = "vfio_mdev", group: int = 70) -> Path:
    folder = tree.file(uuid, on)
    kind = tree.file("mdev_supported_types/nvidia-222", on)
    kind.mkdir(parents=True, exist_ok=True)
    (kind / "name").write_text("GRID T4-1Q\n")
    (folder / "vfio-dev/vfio9").mkdir(parents=True)
    (folder / "mdev_type").symlink_to("../mdev_supported_types/nvidia-222")
    (folder / "iommu_group").symlink_to(f"../../../../../kernel/iommu_groups/{group}")
    if driver:
        (folder / "driver").symlink_to(f"../../../../../bus/mdev/drivers/{driver}")
    tree.paths.mdev_devices.mkdir(parents=True, exist_ok=True)
    way = os.path.relpath(folder, tree.paths.mdev_devices)
    (tree.paths.mdev_devices / uuid).symlink_to(way)
    return folder


def test_a_mediated_device_is_what_carries_it_with_a_driver_and_a_group_of_its_own(tree: Tree) -> None:
    add_mdev(tree)
    tree.node.set_attribute(T4, "numa_node", "1")
    found = tree.read(UUID)
    assert (found.address, found.vendor, found.device) == (UUID, 0x10DE, 0x1EB8)
    assert (found.driver, found.iommu_group, found.vfio) == ("vfio_mdev", 70, VfioDev(number=9, cdev=None))
    assert (found.mdev_type, found.numa_node) == ("GRID T4-1Q", 1)
    assert found.bridges == ("pci0000:00", "0000:00:1b.0", T4)


def test_a_mediated_device_whose_type_has_no_name_is_of_the_types_folder(tree: Tree) -> None:
    add_mdev(tree)
    tree.file("mdev_supported_types/nvidia-222/name").unlink()
    assert tree.read(UUID).mdev_type == "nvidia-222"


def test_mediated_devices_are_listed_after_the_functions(tree: Tree) -> None:
    functions = bus.list_addresses(tree.paths)
    add_mdev(tree)
    assert functions == sorted(functions)
    assert bus.list_addresses(tree.paths) == [*functions, UUID]


def test_a_mediated_device_whose_carrier_is_unreadable_is_refused(tree: Tree) -> None:
    add_mdev(tree)
    tree.node.set_attribute(T4, "vendor", "none")
    with pytest.raises(pci_function.FunctionUnreadable, match="vendor"):
        tree.read(UUID)


def test_a_mediated_device_that_is_not_there_is_refused(tree: Tree) -> None:
    with pytest.raises(pci_function.FunctionUnreadable):
        tree.read(UUID)


def test_a_mediated_device_that_leads_to_itself_is_refused(tree: Tree) -> None:
    tree.paths.mdev_devices.mkdir(parents=True, exist_ok=True)
    (tree.paths.mdev_devices / UUID).symlink_to(f"../{UUID}/{UUID}")
    with pytest.raises(pci_function.FunctionUnreadable, match="below a PCI function"):
        tree.read(UUID)


# Groups and nodes


def test_a_group_has_all_its_members_whether_they_can_be_read_or_not(tree: Tree) -> None:
    functions = tree.functions()
    del functions[AUDIO]
    groups = bus.read_groups(tree.paths, functions)
    assert groups.keys() == {GEFORCE_GROUP, T4_GROUP}
    assert groups[GEFORCE_GROUP].members == GEFORCE_MEMBERS
    assert not groups[GEFORCE_GROUP].noiommu


def test_a_group_whose_folder_is_gone_has_the_members_that_were_seen(tree: Tree) -> None:
    functions = tree.functions()
    folder = tree.paths.iommu_groups / str(GEFORCE_GROUP) / "devices"
    folder.rename(folder.with_name("away"))
    members = bus.read_groups(tree.paths, functions)[GEFORCE_GROUP].members
    assert members == GEFORCE_MEMBERS


def test_a_group_that_no_vfio_driver_has_a_part_of_is_not_read(tree: Tree) -> None:
    tree.node.bind(T4, "nvidia")
    assert bus.read_groups(tree.paths, tree.functions()).keys() == {GEFORCE_GROUP}


def test_a_group_without_an_iommu_is_told_from_others(tree: Tree) -> None:
    groups = bus.read_groups(tree.paths, tree.functions(), frozenset({T4_GROUP}))
    assert (groups[T4_GROUP].noiommu, groups[GEFORCE_GROUP].noiommu) == (True, False)


MSI = "0x00000000fee00000 0x00000000feefffff msi\n"
DIRECT = "0x000000007e000000 0x000000007e0fffff direct\n"
DIRECT_MAPPING = "0x000000007e000000-0x000000007e0fffff"


@pytest.mark.parametrize(
    ("lines", "mappings"),
    [
        (MSI, ()),
        (f"{DIRECT}{MSI}", (DIRECT_MAPPING,)),
        (f"{MSI}{DIRECT}{DIRECT}", (DIRECT_MAPPING, DIRECT_MAPPING)),
        ("0x0000000000000000 0x0000000000ffffff direct-relaxable\n", ()),
        ("0x0000000000000000 0x0000000000ffffff reserved\n", ()),
        ("", ()),
        ("direct\n\n0x1 direct\n0x1 0x2 direct 0x3\n", ()),
        (None, ()),
    ],
)
def test_what_the_firmware_maps_in_a_group_is_what_is_direct_and_not_relaxable(
    tree: Tree, lines: str | None, mappings: tuple[str, ...]
) -> None:
    file = tree.paths.iommu_groups / str(T4_GROUP) / "reserved_regions"
    file.unlink()
    if lines is not None:
        file.write_text(lines)
    assert bus.read_firmware_mappings(tree.paths, T4_GROUP) == mappings


def test_group_nodes_are_those_that_the_class_shows_as_numbers_with_an_iommu_or_without(tree: Tree) -> None:
    for name in ("noiommu-3", "noiommu-x", "vfio", "\u00b2", "\u0661"):
        (tree.paths.vfio_class / name).mkdir()
    assert bus.read_group_nodes(tree.paths) == (frozenset({GEFORCE_GROUP, T4_GROUP}), frozenset({3}))
    tree.node.unbind(T4)
    assert bus.read_group_nodes(tree.paths) == (frozenset({GEFORCE_GROUP}), frozenset({3}))


def test_without_vfio_there_are_no_group_nodes(tmp_path: Path) -> None:
    assert bus.read_group_nodes(HostPaths(tmp_path)) == (frozenset(), frozenset())


def test_functions_with_a_vfio_device_are_listed_by_the_class(tree: Tree) -> None:
    vfio = {f"vfio{f.vfio.number}": f.address for f in tree.node.functions() if f.vfio}
    assert bus.list_vfio_devs(tree.paths) == vfio
    tree.node.unbind(T4)
    (tree.paths.vfio_dev_class / "vfio77").symlink_to("astray")
    assert bus.list_vfio_devs(tree.paths) == {name: address for name, address in vfio.items() if address != T4}
    shutil.rmtree(tree.paths.vfio_dev_class)
    assert bus.list_vfio_devs(tree.paths) is None


@pytest.mark.parametrize(
    ("majors", "has_cdevs"),
    [
        ("  1 mem\n245 vfio\n", False),
        ("  1 mem\n245 vfio\n511 vfio-dev\n", True),
        ("  1 mem\n 10 misc\n", False),
        ("", False),
        (None, False),
    ],
)
def test_proc_devices_tells_whether_there_are_cdevs(tmp_path: Path, majors: str | None, has_cdevs: bool) -> None:
    paths = HostPaths(tmp_path)
    if majors is not None:
        paths.devices_list.parent.mkdir()
        paths.devices_list.write_text(f"Character devices:\n{majors}\nBlock devices:\n  8 sd\n")
    assert bus.read_kernel_has_cdevs(paths) is has_cdevs


def test_dev_nodes_are_groups_and_cdevs_and_nothing_else(grace: Tree) -> None:
    (grace.paths.dev_vfio / "noiommu-3").touch()
    (grace.paths.dev_vfio / "devices/other").touch()
    assert bus.read_dev_nodes(grace.paths) == frozenset({"/dev/vfio/13", "/dev/vfio/devices/vfio0"})


def test_a_made_up_host_without_dev_says_nothing_of_nodes(tmp_path: Path) -> None:
    assert bus.read_dev_nodes(HostPaths(tmp_path)) is None


ROOT_MOUNT = "22 1 254:0 / / rw - ext4 /dev/root rw"
CONTAINER_DEV = "30 22 0:50 / /dev rw,nosuid - tmpfs tmpfs rw"
HOST_DEV = "31 22 0:5 / /dev rw,nosuid - devtmpfs udev rw"
HOST_DEV_VFIO = "32 30 0:5 /vfio /dev/vfio rw shared:4 - devtmpfs udev rw"
STALE_DEV_VFIO = "32 30 0:5 /vfio//deleted /dev/vfio rw - devtmpfs udev rw"


@pytest.mark.parametrize(
    ("mounts", "is_live"),
    [
        ([ROOT_MOUNT], False),
        ([ROOT_MOUNT, CONTAINER_DEV], False),
        ([ROOT_MOUNT, HOST_DEV], True),
        ([ROOT_MOUNT, CONTAINER_DEV, HOST_DEV_VFIO], True),
        ([ROOT_MOUNT, HOST_DEV_VFIO, CONTAINER_DEV], True),
        ([ROOT_MOUNT, CONTAINER_DEV, STALE_DEV_VFIO], False),
        ([ROOT_MOUNT, HOST_DEV, CONTAINER_DEV], False),
        ([ROOT_MOUNT, "31 22 0:5 / /dev/shm rw - devtmpfs udev rw"], False),
        (["nonsense", "31 22 - x", HOST_DEV], True),
        ([], False),
    ],
)
def test_only_the_kernels_own_dev_is_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: list[str], is_live: bool
) -> None:
    (tmp_path / "mountinfo").write_text("".join(f"{line}\n" for line in mounts))
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio/12").touch()
    monkeypatch.setattr(HostPaths, "mountinfo", tmp_path / "mountinfo")
    monkeypatch.setattr(HostPaths, "dev_vfio", tmp_path / "vfio")
    assert bus.read_dev_nodes(HostPaths(Path("/"))) == (frozenset({"/dev/vfio/12"}) if is_live else None)


# The last look before a device is given away


def device(*addresses: str, node: str, mdev: bool = False) -> Device:
    return Device(
        id=node.rpartition("/")[2].removeprefix("vfio"),
        resource="nvidia.com/pgpu",
        node=node,
        model="GPU",
        placements=tuple(Placement(address=a, numa_node=None, bridges=()) for a in addresses),
        iommu_group=1,
        group_functions=addresses,
        mdev=mdev,
    )


GEFORCE_AUDIO = "0000:01:00.1"


def against(paths: HostPaths, device: Device) -> str | None:
    objection = pci_function.objection(paths, device)
    return None if objection is None else objection.why


def test_a_device_that_is_still_bound_may_be_given_away(tree: Tree) -> None:
    assert against(tree.paths, device(T4, node="/dev/vfio/13")) is None


def test_a_cdev_that_is_still_bound_may_be_given_away(grace: Tree) -> None:
    assert against(grace.paths, device(GRACE_GPU, node="/dev/vfio/devices/vfio0")) is None


def test_a_device_on_another_driver_or_none_may_not(tree: Tree) -> None:
    given = device(T4, node="/dev/vfio/13")
    tree.node.bind(T4, "nvidia")
    assert against(tree.paths, given) == f"{T4} is bound to nvidia now"
    tree.node.unbind(T4)
    assert against(tree.paths, given) == f"{T4} is bound to no driver now"


def test_a_device_with_another_number_may_not(grace: Tree) -> None:
    why = against(grace.paths, device(GRACE_GPU, node="/dev/vfio/devices/vfio3"))
    assert why == "/dev/vfio/devices/vfio3 is gone"


def test_a_cdev_whose_dev_file_went_may_not(grace: Tree) -> None:
    grace.file("vfio-dev/vfio0/dev", GRACE_GPU).unlink()
    given = device(GRACE_GPU, node="/dev/vfio/devices/vfio0")
    assert against(grace.paths, given) == "/dev/vfio/devices/vfio0 is gone"


def test_a_group_whose_node_went_may_not(tree: Tree) -> None:
    (tree.paths.vfio_class / "13").unlink()
    assert against(tree.paths, device(T4, node="/dev/vfio/13")) == "/dev/vfio/13 is gone"


def test_every_function_of_the_device_counts(tree: Tree) -> None:
    tree.node.bind(T4, "nvidia")
    why = against(tree.paths, device(GEFORCE, T4, node="/dev/vfio/11"))
    assert why == f"{T4} is bound to nvidia now"


def test_a_device_that_left_may_not(tree: Tree) -> None:
    tree.node.remove(T4)
    why = against(tree.paths, device(T4, node="/dev/vfio/13"))
    assert why == f"{T4} is bound to no driver now"


def test_a_mediated_device_is_looked_for_where_it_is(tree: Tree) -> None:
    add_mdev(tree)
    (tree.paths.vfio_class / "70").mkdir()
    given = device(UUID, node="/dev/vfio/70", mdev=True)
    assert against(tree.paths, given) is None
    (tree.paths.mdev_devices / UUID).unlink()
    assert against(tree.paths, given) is not None


def test_a_device_that_was_bound_again_or_made_again_with_another_type_since_may_not(grace: Tree) -> None:
    function = grace.read(GRACE_GPU)
    assert function.vfio is not None
    given = device(GRACE_GPU, node="/dev/vfio/devices/vfio0")
    (placement,) = given.placements
    as_it_is = replace(given, placements=(replace(placement, binding=function.vfio.binding),))
    assert against(grace.paths, as_it_is) is None
    before = replace(given, placements=(replace(placement, binding=(function.vfio.binding or 0) + 1),))
    assert against(grace.paths, before) == f"{GRACE_GPU} was bound again, or made again with another type"


def test_a_device_that_fell_off_the_bus_a_moment_ago_may_not(tree: Tree) -> None:
    tree.node.sicken(T4)
    assert against(tree.paths, device(T4, node="/dev/vfio/13")) == (
        f"{T4} does not answer on the PCI bus now (link speed Unknown, width 63)"
    )


def test_a_device_that_a_vm_has_may_not_and_is_said_to_be_in_use(tree: Tree) -> None:
    tree.node.set_enable(T4, 1)
    objection = pci_function.objection(tree.paths, device(GEFORCE, T4, node="/dev/vfio/13"))
    assert objection is not None
    assert objection.in_use == {T4}
    assert objection.why == f"{T4} in its IOMMU group 1 is in use (enable is 1) by a VM that has not ended"


def test_a_device_of_whose_group_a_vm_has_another_function_may_not(tree: Tree) -> None:
    given = replace(device(GEFORCE, node="/dev/vfio/11"), group_functions=(GEFORCE, GEFORCE_AUDIO))
    assert pci_function.objection(tree.paths, given) is None
    tree.node.set_enable(GEFORCE_AUDIO, 1)
    objection = pci_function.objection(tree.paths, given)
    assert objection is not None
    assert objection.in_use == {GEFORCE_AUDIO}
    tree.node.unbind(GEFORCE_AUDIO)
    assert pci_function.objection(tree.paths, given) is not None, "it is the VM's until that lets go"
    tree.node.set_enable(GEFORCE_AUDIO, 0)
    tree.node.bind(GEFORCE_AUDIO, "snd_hda_intel")
    tree.node.set_attribute(GEFORCE_AUDIO, "enable", "1")
    assert pci_function.objection(tree.paths, given) is None, "the host's driver has it; not-viable is another matter"


def test_the_link_of_a_device_that_sleeps_is_not_read_when_it_is_given_away(tree: Tree) -> None:
    tree.node.sicken(T4)
    tree.node.set_attribute(T4, "power_state", "D3cold")
    tree.node.set_attribute(T4, "power/runtime_status", "suspended")
    assert against(tree.paths, device(T4, node="/dev/vfio/13")) is None
    tree.node.set_attribute(T4, "power/runtime_status", "active")
    assert against(tree.paths, device(T4, node="/dev/vfio/13")) is not None, "dead in D3cold"


# When this process is at its own end


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_want_of_descriptors_or_memory_is_no_word_about_the_host(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*args: Any, **more: Any) -> Any:
        raise OSError(number, os.strerror(number), "somewhere")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fail)
        with pytest.raises(sysfs.OutOfResources, match=os.strerror(number)):
            tree.read()
        with pytest.raises(sysfs.OutOfResources):
            bus.read_kernel_has_cdevs(tree.paths)
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", fail)
        patched.setattr(os, "scandir", fail)
        with pytest.raises(sysfs.OutOfResources):
            bus.list_addresses(tree.paths)
        with pytest.raises(sysfs.OutOfResources):
            bus.read_group_nodes(tree.paths)
        with pytest.raises(sysfs.OutOfResources):
            pci_function.objection(tree.paths, device(T4, node="/dev/vfio/13"))


def test_a_bus_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bus.list_addresses(HostPaths(tmp_path))


@pytest.mark.parametrize("preset", ["hgx-h100", "workstation", "gh200"])
def test_nothing_stays_open(fake_node: MakeNode, preset: str) -> None:
    tree = Tree(fake_node(preset))
    before = len(os.listdir("/proc/self/fd"))
    bus.read_groups(tree.paths, tree.functions())
    assert len(os.listdir("/proc/self/fd")) == before
