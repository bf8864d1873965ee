"""Reading one PCI function and what belongs to all, on made-up trees that are changed and broken on purpose."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeNode
from mediated import Mediated
from names import AUDIO, GEFORCE, T4

from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.host import bus, pci_function, sysfs
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.model import Bar, LinkLimit, PciFunction, VfioDev

GEFORCE_BRIDGE = "0000:00:01.0"
GEFORCE_GROUP, T4_GROUP = 11, 13
GEFORCE_MEMBERS = (GEFORCE_BRIDGE, GEFORCE, AUDIO, "0000:01:00.2", "0000:01:00.3")
GRACE_GPU = "0009:01:00.0"
KIB, MIB = 1 << 10, 1 << 20


class Tree:
    """A made-up node and the paths below it."""

    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.paths = HostPaths(node.root)

    def read(self, address: str = T4, before: PciFunction | None = None) -> PciFunction:
        return pci_function.read_function(self.paths, address, before)

    def file(self, name: str, address: str = T4) -> Path:
        return self.node.folder(address) / name

    def put_fifo(self, name: str, address: str = T4) -> None:
        """Whoever opens it to read waits for ever."""
        self.file(name, address).unlink(missing_ok=True)
        os.mkfifo(self.file(name, address))

    def lead_group_to(self, target: str) -> None:
        self.file("iommu_group").unlink()
        self.file("iommu_group").symlink_to(target)

    def move(self, to: Path) -> None:
        """The T4's folder to another place, where the bus finds it under its new name."""
        to.parent.mkdir(exist_ok=True)
        self.file(".").rename(to)
        (self.paths.pci_devices / T4).unlink()
        (self.paths.pci_devices / to.name).symlink_to(os.path.relpath(to, self.paths.pci_devices))

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
    assert tree.read(GEFORCE) == PciFunction(
        address=GEFORCE,
        vendor=0x10DE,
        device=0x21C4,
        class_code=0x030000,
        subsystem_vendor=0x1458,
        subsystem_device=0x4014,
        revision=0xA1,
        driver="vfio-pci",
        iommu_group=GEFORCE_GROUP,
        vfio=VfioDev(number=0, cdev=None),
        link_speed="8.0 GT/s PCIe",
        link_width=16,
        enable=0,
        power_state="D3hot",
        bars=(
            Bar(index=0, size=16 * MIB, prefetchable=False, wide=False, io=False),
            Bar(index=1, size=256 * MIB, prefetchable=True, wide=True, io=False),
            Bar(index=3, size=32 * MIB, prefetchable=True, wide=True, io=False),
            Bar(index=5, size=128, prefetchable=False, wide=False, io=True),
            Bar(index=6, size=512 * KIB, prefetchable=True, wide=False, io=False),
        ),
        reset_methods=tree.read(GEFORCE).reset_methods,
        bridges=("pci0000:00", GEFORCE_BRIDGE),
        link_limits=(LinkLimit("8.0 GT/s PCIe", 16), LinkLimit("8.0 GT/s PCIe", 16)),
        fatal_errors=0,
    )
    found = tree.read(GEFORCE)
    assert (found.nonfatal_errors, found.correctable_errors) == (0, 0), "these do not count in comparisons"


def test_a_variant_driver_is_as_good_and_a_cdev_is_known_by_its_dev_file(grace: Tree) -> None:
    found = grace.read(GRACE_GPU)
    assert (found.driver, found.vfio) == ("nvgrace_gpu_vfio_pci", VfioDev(number=0, cdev="253:0"))
    for content in ("", "253", "dev", "253:0:1"):
        grace.node.set_attribute(GRACE_GPU, "vfio-dev/vfio0/dev", content)
        assert grace.read(GRACE_GPU).vfio == VfioDev(number=0, cdev=None)
    grace.file("vfio-dev/vfio0/dev", GRACE_GPU).unlink()
    assert grace.read(GRACE_GPU).vfio == VfioDev(number=0, cdev=None)
    grace.file("vfio-dev/vfio0", GRACE_GPU).rename(grace.file("vfio-dev/noiommu-vfio0", GRACE_GPU))
    assert grace.read(GRACE_GPU).vfio is None, "one without an IOMMU is never offered"


def test_of_a_function_on_a_host_driver_only_what_it_is_and_where_is_read(tree: Tree) -> None:
    tree.node.bind(T4, "nvidia")
    for name in ("numa_node", "enable", "power_state", "current_link_speed", "resource", "aer_dev_fatal"):
        tree.put_fifo(name)
    found = tree.read()
    assert (found.driver, found.iommu_group, found.vfio, found.device) == ("nvidia", T4_GROUP, None, 0x1EB8)
    assert (found.enable, found.power_state, found.bars) == (None, None, ())


def test_a_function_without_a_driver_and_a_group_is_read(tree: Tree) -> None:
    tree.node.unbind(T4)
    tree.file("iommu_group").unlink()
    found = tree.read()
    assert (found.driver, found.iommu_group, found.vfio) == (None, None, None)


def test_a_function_that_was_unbound_under_a_vm_is_watched_until_the_vm_lets_go(tree: Tree) -> None:
    tree.node.set_enable(T4, 1)
    held = tree.read()
    tree.node.unbind(T4)
    assert tree.read().enable == 1, "one that is seen for the first time may be a VM's"
    unbound = tree.read(before=held)
    assert (unbound.driver, unbound.enable) == (None, 1)
    tree.node.set_enable(T4, 0)
    free = tree.read(before=unbound)
    assert (free.driver, free.enable) == (None, None)
    tree.node.set_attribute(T4, "enable", "1")
    assert tree.read(before=free).enable is None, "whoever enables it now is no VM"


def test_a_function_whose_unbind_waits_for_a_vm_is_read_whole_although_its_drivers_link_is_gone(grace: Tree) -> None:
    whole = grace.read(GRACE_GPU)
    grace.file("driver", GRACE_GPU).unlink()
    assert grace.read(GRACE_GPU) == replace(whole, driver=None)


def test_binding_a_function_again_gives_it_another_binding(tree: Tree) -> None:
    before = tree.read()
    tree.file("vfio-dev").rename(tree.file("kept"))  # so that its inode number stays taken
    shutil.copytree(tree.file("kept"), tree.file("vfio-dev"), symlinks=True)
    after = tree.read(before=before)
    assert after == before
    assert None not in (before.binding, after.binding)
    assert after.binding != before.binding


# What must not be touched


def test_what_can_block_and_what_a_vm_opens_is_never_opened(tree: Tree) -> None:
    for address in (T4, GEFORCE):
        for name in ("config", "uevent", "driver_override", "sriov_numvfs"):
            tree.put_fifo(name, address)
    for node in ("11", "13", "vfio"):
        (tree.paths.dev_vfio / node).unlink()
        os.mkfifo(tree.paths.dev_vfio / node)
    assert (tree.read().driver, tree.read(GEFORCE).driver) == ("vfio-pci", "vfio-pci")
    assert bus.read_dev_nodes(tree.paths) == frozenset({"/dev/vfio/11", "/dev/vfio/13"})


@pytest.mark.parametrize(
    ("states", "is_itself"),
    [
        ({(GEFORCE, "power_state"): "D3cold"}, True),
        ({(GEFORCE_BRIDGE, "power_state"): "D3hot"}, False),
        ({(GEFORCE_BRIDGE, "power_state"): None, (GEFORCE_BRIDGE, "power/runtime_status"): None}, False),
        ({(GEFORCE_BRIDGE, "power_state"): None, (GEFORCE_BRIDGE, "power/runtime_status"): "suspended"}, False),
    ],
    ids=["it sleeps", "its bridge sleeps", "its bridge cannot say", "its bridge sleeps on an old kernel"],
)
def test_a_link_is_not_read_where_that_would_wake_something(
    tree: Tree, states: dict[tuple[str, str], str | None], is_itself: bool
) -> None:
    for (address, name), state in states.items():
        if state is None:
            tree.file(name, address).unlink()
        else:
            tree.node.set_attribute(address, name, state)
    for name in ("current_link_speed", "current_link_width"):
        tree.put_fifo(name, GEFORCE)
    found = tree.read(GEFORCE)
    assert (found.link_speed, found.link_width) == (None, None)
    tree.node.set_attribute(GEFORCE, "power_state", "D3cold")
    assert tree.read(GEFORCE).has_power is is_itself, "below a bridge that sleeps it may have no power"


def test_a_link_of_a_device_that_sleeps_lightly_below_a_bridge_that_is_awake_is_read(tree: Tree) -> None:
    tree.node.sicken(GEFORCE)
    for _ in ("new kernel", "old kernel"):
        found = tree.read(GEFORCE)
        assert (found.power_state, found.link_speed, found.link_width) == ("D3hot", "Unknown", 63)
        tree.file("power_state", GEFORCE_BRIDGE).unlink(missing_ok=True)
        tree.node.set_attribute(GEFORCE_BRIDGE, "power/runtime_status", "active")


# In D3cold


@pytest.mark.parametrize("name", ["power_resources_D3hot", "real_power_state"])
def test_of_a_function_in_d3cold_it_is_told_whether_it_counts_as_awake_and_whether_it_has_power(
    tree: Tree, name: str
) -> None:
    tree.node.sicken(GEFORCE, cold=True)
    tree.node.set_attribute(GEFORCE, "power/runtime_status", "active")
    acpi = tree.paths.root / "sys/devices/LNXSYSTM:00/device:2a"
    acpi.mkdir(parents=True)
    tree.file("firmware_node", GEFORCE).symlink_to(acpi)
    found = tree.read(GEFORCE)
    assert (found.power_state, found.runtime_status, found.has_power) == ("D3cold", "active", True)
    assert (found.link_speed, found.unread) == (None, ())
    os.mkfifo(acpi / name)  # to read it would ask the firmware
    assert tree.read(GEFORCE).has_power is False, "ACPI can cut its power"


@pytest.mark.parametrize("state", ["D0", "D3hot", "unknown"])
def test_what_is_asked_in_d3cold_is_not_asked_of_any_other_function(tree: Tree, state: str) -> None:
    tree.node.set_attribute(GEFORCE, "power_state", state)
    tree.put_fifo("power/runtime_status", GEFORCE)
    found = tree.read(GEFORCE)
    assert (found.power_state, found.runtime_status, found.has_power) == (state, None, None)


def test_a_function_that_is_woken_while_it_is_read_is_not_taken_to_be_in_d3cold(tree: Tree) -> None:
    tree.node.sicken(GEFORCE, cold=True)
    tree.put_fifo("power/runtime_status", GEFORCE)

    def wake() -> None:
        with tree.file("power/runtime_status", GEFORCE).open("w") as status:  # waits for whoever reads it
            tree.node.set_attribute(GEFORCE, "power_state", "D0")
            status.write("active")

    waker = threading.Thread(target=wake)
    waker.start()
    found = tree.read(GEFORCE)
    waker.join()
    assert (found.power_state, found.runtime_status) == ("D0", "active")


# What is missing, nonsense or unreadable


@pytest.mark.parametrize("name", ["vendor", "device", "class"])
def test_a_function_that_does_not_say_what_it_is_is_refused_in_words(tree: Tree, name: str) -> None:
    for content in ("", "10de", "0x", "0xg0", "0x1234567", "-1", "0x10de 0x10de", "\udcff"):
        tree.node.set_attribute(T4, name, content.encode("utf-8", "surrogateescape"))
        with pytest.raises(pci_function.FunctionUnreadable, match=f"^{name} is '.*', not a hexadecimal number$"):
            tree.read()
    tree.file(name).unlink()
    tree.file(name).mkdir()  # root cannot read it either
    with pytest.raises(pci_function.FunctionUnreadable, match=f"^{name} cannot be read: Is a directory$"):
        tree.read()
    tree.file(name).rmdir()
    with pytest.raises(pci_function.FunctionUnreadable, match=f"^{name} is missing "):
        tree.read()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tree: (tree.file("driver").unlink(), tree.file("driver").touch()), r"^driver cannot be read: "),
        (lambda tree: tree.lead_group_to("../../noiommu"), "not to a numbered group"),
        (lambda tree: tree.lead_group_to("../../-1"), "not to a numbered group"),
        (lambda tree: tree.lead_group_to("../../\u0661"), "not to a numbered group"),
        (lambda tree: tree.move(tree.paths.root / "elsewhere" / T4), "below a PCI host bridge"),
    ],
    ids=["driver is no link", "group has a name", "group is negative", "group is no ASCII", "below no host bridge"],
)
def test_a_function_whose_links_make_no_sense_is_refused_in_words(
    tree: Tree, spoil: Callable[[Tree], object], words: str
) -> None:
    spoil(tree)
    with pytest.raises(pci_function.FunctionUnreadable, match=words):
        tree.read()


def test_what_is_no_address_is_refused(tree: Tree) -> None:
    for address in ("", "junk", "0000:01:00.8", "0000:01:20.0", "0000:1:00.0", "../x", "0000:0A:00.0"):
        with pytest.raises(pci_function.FunctionUnreadable, match="is not a PCI address"):
            tree.read(address)


def test_a_domain_may_have_more_than_four_digits(tree: Tree) -> None:
    tree.move(tree.file(".").with_name("10000:02:00.0"))
    assert tree.read("10000:02:00.0").bridges == ("pci0000:00", "0000:00:1b.0")


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("numa_node", "numa_node"),
        ("current_link_width", "link_width"),
        ("enable", "enable"),
        ("power_state", "power_state"),
        ("subsystem_vendor", "subsystem_vendor"),
        ("revision", "revision"),
        ("aer_dev_fatal", "fatal_errors"),
    ],
)
def test_a_function_may_lack_any_other_attribute_and_one_that_cannot_be_read_is_told(
    grace: Tree, name: str, attribute: str
) -> None:
    whole = grace.read(GRACE_GPU)
    without: dict[str, Any] = {attribute: None}
    assert getattr(whole, attribute) is not None
    grace.file(name, GRACE_GPU).rename(grace.file("kept", GRACE_GPU))
    assert grace.read(GRACE_GPU) == replace(whole, **without)
    grace.file(name, GRACE_GPU).mkdir()
    unreadable = grace.read(GRACE_GPU)
    assert unreadable == replace(whole, **without, unread=(f"{name}: Is a directory",))
    grace.file(name, GRACE_GPU).rmdir()
    grace.file("kept", GRACE_GPU).rename(grace.file(name, GRACE_GPU))
    assert grace.read(GRACE_GPU, unreadable) == whole, "it is tried again"


@pytest.mark.parametrize("name", ["numa_node", "current_link_width", "enable", "subsystem_vendor", "revision"])
def test_a_number_that_is_none_is_told(tree: Tree, name: str) -> None:
    tree.node.set_attribute(T4, name, "many")
    (line,) = tree.read().unread
    assert line.startswith(name)
    assert "'many'" in line


@pytest.mark.parametrize("content", ["-1", "-2147483648", "2147483648", "99999999999999999999"])
def test_a_numa_node_that_cannot_be_is_unknown(tree: Tree, content: str) -> None:
    tree.node.set_attribute(T4, "numa_node", content)
    assert tree.read().numa_node is None


def region(index: int, last: int, flags: int) -> str:
    """A `resource` with only this region, from 0 to `last`: without an address, all begin at 0."""
    lines = [f"0x{0:016x} 0x{0:016x} 0x{0:016x}"] * 13
    lines[index] = f"0x{0:016x} 0x{last:016x} 0x{flags:016x}"
    return "\n".join(lines)


UNSET, ROM_ENABLED = 0x20000000, 0x1
WIDE, ROM = 0x14220C, 0x46200
WIDE_BAR = Bar(index=1, size=256 * MIB, prefetchable=True, wide=True, io=False)
ROM_BAR = Bar(index=6, size=512 * KIB, prefetchable=True, wide=False, io=False)


@pytest.mark.parametrize(
    ("content", "bar"),
    [
        (region(2, 4095, 0x40200), Bar(index=2, size=4096, prefetchable=False, wide=False, io=False)),
        (region(1, 0xFFFFFFF, WIDE), WIDE_BAR),
        # what the firmware left unassigned is not listed; what could not be given an address is
        (region(1, 0, WIDE), None),
        (region(1, 0xFFFFFFF, WIDE | UNSET), replace(WIDE_BAR, unset=True)),
        (region(1, 0, WIDE | UNSET), replace(WIDE_BAR, size=0, unset=True)),
        # a ROM needs an address only while it is switched on
        (region(6, 0x7FFFF, ROM | UNSET | ROM_ENABLED), replace(ROM_BAR, unset=True)),
        (region(6, 0x7FFFF, ROM | UNSET), ROM_BAR),
        # the region of its virtual functions
        (region(8, 0xFFFFFFF, WIDE | UNSET), None),
    ],
)
def test_a_region_has_its_size_and_kind_and_says_whether_it_lacks_an_address(
    tree: Tree, content: str, bar: Bar | None
) -> None:
    tree.node.set_attribute(T4, "resource", content)
    found = tree.read()
    assert (found.bars, found.unread) == ((bar,) if bar else (), ())


@pytest.mark.parametrize("content", ["0x0", "x y z", "0x0 0x1 0x2 0x3"])
def test_regions_that_are_not_three_numbers_each_are_told(tree: Tree, content: str) -> None:
    tree.node.set_attribute(T4, "resource", content)
    found = tree.read()
    assert (found.bars, found.unread) == ((), ("resource: not lines of three numbers",))


@pytest.mark.parametrize(
    ("method", "has_reset", "methods"),
    [("flr bus", True, ("flr", "bus")), ("", True, ()), (None, True, None), (None, False, ())],
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
        ("DLP 1\nTOTAL_ERR_{} 3", 3),
        ("TOTAL_ERR_{} 0", 0),
        ("TOTAL_ERR_{} many", None),
        ("TOTAL_ERR_{} \u00b2", None),
        ("DLP 1", None),
    ],
)
@pytest.mark.parametrize(("severity", "total"), [("fatal", "FATAL"), ("nonfatal", "NONFATAL"), ("correctable", "COR")])
def test_the_count_of_errors_is_their_total(
    tree: Tree, severity: str, total: str, content: str, count: int | None
) -> None:
    tree.node.set_attribute(T4, f"aer_dev_{severity}", content.format(total))
    assert getattr(tree.read(), f"{severity}_errors") == count


@pytest.mark.parametrize("severity", ["nonfatal", "correctable"])
def test_a_count_that_has_risen_is_news_although_the_function_is_equal(tree: Tree, severity: str) -> None:
    before = tree.read()
    total = {"nonfatal": "NONFATAL", "correctable": "COR"}[severity]
    tree.node.set_attribute(T4, f"aer_dev_{severity}", f"TOTAL_ERR_{total} 7")
    again = tree.read(T4, before)
    assert (again == before, getattr(again, f"{severity}_errors")) == (True, 7)
    assert tree.read(T4, again) is again


def test_of_a_function_without_error_counters_the_others_are_not_looked_for(tree: Tree) -> None:
    tree.file("aer_dev_fatal").unlink()
    found = tree.read()
    assert (found.nonfatal_errors, found.correctable_errors) == (None, None)


def test_the_best_that_both_ends_of_the_link_can_do_is_read_once(tree: Tree) -> None:
    limits = (LinkLimit("8.0 GT/s PCIe", 16), LinkLimit("8.0 GT/s PCIe", 4))
    before = tree.read()
    assert before.link_limits == limits, "a card of 16 lanes in a slot of 4"
    for name in ("max_link_speed", "max_link_width"):
        tree.put_fifo(name)
    assert tree.read(T4, before).link_limits == limits


def test_without_a_link_to_be_seen_its_limits_are_not_read(tree: Tree) -> None:
    for name in ("max_link_speed", "max_link_width"):
        tree.put_fifo(name)
    tree.node.set_attribute(T4, "current_link_speed", "Unknown")
    assert tree.read().link_limits is None, "off the bus, or a virtual function"
    tree.node.set_attribute(T4, "current_link_speed", "8.0 GT/s PCIe")
    tree.node.set_attribute(T4, "power_state", "D3cold")
    assert tree.read().link_limits is None, "it would be woken"


def test_what_could_not_be_read_of_the_limits_is_tried_again(tree: Tree) -> None:
    tree.file("max_link_width").rename(tree.file("kept"))
    tree.file("max_link_width").mkdir()
    before = tree.read()
    assert before.unread == ("max_link_width: Is a directory",)
    tree.file("max_link_width").rmdir()
    tree.file("kept").rename(tree.file("max_link_width"))
    found = tree.read(T4, before).link_limits
    assert found is not None
    assert found[0].width == 16


def test_virtual_functions_and_what_carries_them_are_told(tree: Tree) -> None:
    for number in range(4):
        tree.file(f"virtfn{number}", GEFORCE).symlink_to(f"../0000:01:02.{number}")
    tree.file("physfn").symlink_to(f"../../0000:00:01.0/{GEFORCE}")
    assert tree.read(GEFORCE).virtual_functions == 4
    assert tree.read().physical_function == GEFORCE
    tree.file("physfn").unlink()
    tree.file("physfn").touch()
    assert tree.read().unread == ("physfn: Invalid argument",)


# What is the same as before


def test_what_can_never_change_is_taken_from_before(tree: Tree) -> None:
    before = tree.read()
    for name in ("vendor", "device", "class", "subsystem_vendor", "subsystem_device", "revision"):
        tree.put_fifo(name)
    assert tree.read(before=before) is before


def test_what_changes_is_never_taken_from_before(tree: Tree) -> None:
    before = tree.read()
    tree.node.bind(T4, "nvidia")
    after = tree.read(before=before)
    assert (after.driver, after.vfio, after.enable) == ("nvidia", None, None)
    tree.node.bind(T4)
    tree.node.set_enable(T4, 1)
    tree.node.sicken(T4)
    tree.node.set_attribute(T4, "resource", region(1, 0xFFFFFFFF, WIDE))
    again = tree.read(before=after)
    assert again == tree.read()
    assert (again.vfio, again.enable, again.link_width) == (VfioDev(number=4, cdev=None), 1, 63)
    assert [bar.size for bar in again.bars] == [4096 * MIB]


def test_the_driver_of_a_function_can_be_asked_for_alone(tree: Tree) -> None:
    assert pci_function.driver_of(tree.paths, T4) == "vfio-pci"
    tree.node.unbind(T4)
    assert pci_function.driver_of(tree.paths, T4) is None
    tree.file("driver").touch()
    assert pci_function.driver_of(tree.paths, T4) is None, "it cannot be told"


# Mediated devices


def test_a_mediated_device_is_what_carries_it_with_a_driver_and_a_group_of_its_own(tree: Tree) -> None:
    functions = bus.list_addresses(tree.paths)
    uuid = Mediated(tree.node, T4).add(1, "nvidia-222", "GRID T4-1Q", 70)
    tree.node.set_attribute(T4, "numa_node", "1")
    assert bus.list_addresses(tree.paths) == [*sorted(functions), uuid]
    found = tree.read(uuid)
    assert (found.address, found.vendor, found.device) == (uuid, 0x10DE, 0x1EB8)
    assert (found.driver, found.iommu_group, found.numa_node) == ("nvidia-vgpu-vfio", 70, 1)
    assert (found.mdev_type, found.is_held_by_vfio) == ("GRID T4-1Q", True)
    assert found.bridges == ("pci0000:00", "0000:00:1b.0", T4)
    tree.file("mdev_supported_types/nvidia-222/name").unlink()
    assert tree.read(uuid).mdev_type == "nvidia-222"
    tree.node.set_attribute(T4, "vendor", "none")
    with pytest.raises(pci_function.FunctionUnreadable, match="vendor"):
        tree.read(uuid)
    (tree.paths.mdev_devices / uuid).unlink()
    with pytest.raises(pci_function.FunctionUnreadable, match="missing"):
        tree.read(uuid)


# Groups and nodes


def test_a_group_has_all_its_members_whether_they_can_be_read_or_not(tree: Tree) -> None:
    functions = tree.functions()
    unread = {address: function for address, function in functions.items() if address != AUDIO}
    groups = bus.read_groups(tree.paths, unread, frozenset({T4_GROUP}))
    assert {number: group.noiommu for number, group in groups.items()} == {GEFORCE_GROUP: False, T4_GROUP: True}
    assert groups[GEFORCE_GROUP].members == GEFORCE_MEMBERS
    folder = tree.paths.iommu_groups / str(GEFORCE_GROUP) / "devices"
    folder.rename(folder.with_name("away"))
    assert bus.read_groups(tree.paths, functions)[GEFORCE_GROUP].members == GEFORCE_MEMBERS
    tree.node.bind(T4, "nvidia")
    assert bus.read_groups(tree.paths, tree.functions()).keys() == {GEFORCE_GROUP}, "of no use without vfio"


MSI = "0x00000000fee00000 0x00000000feefffff msi\n"
DIRECT = "0x000000007e000000 0x000000007e0fffff direct\n"
DIRECT_MAPPING = "0x000000007e000000-0x000000007e0fffff"


@pytest.mark.parametrize(
    ("lines", "mappings"),
    [
        (MSI, ()),
        (f"{MSI}{DIRECT}{DIRECT}", (DIRECT_MAPPING, DIRECT_MAPPING)),
        ("0x0000000000000000 0x0000000000ffffff direct-relaxable\n", ()),
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


def test_functions_with_a_vfio_device_are_listed_by_the_class(tree: Tree) -> None:
    vfio = {f"vfio{f.vfio.number}": f.address for f in tree.node.functions() if f.vfio}
    assert bus.read_vfio_devs(tree.paths) == vfio
    tree.node.unbind(T4)
    (tree.paths.vfio_dev_class / "vfio77").symlink_to("astray")
    assert bus.read_vfio_devs(tree.paths) == {name: address for name, address in vfio.items() if address != T4}


@pytest.mark.parametrize(
    ("majors", "has_cdevs"),
    [("  1 mem\n245 vfio\n", False), ("  1 mem\n245 vfio\n511 vfio-dev\n", True), ("", False), (None, False)],
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


def test_a_host_without_vfio_and_dev_is_read_as_having_nothing(tmp_path: Path) -> None:
    paths = HostPaths(tmp_path)
    assert bus.read_group_nodes(paths) == (frozenset(), frozenset())
    assert bus.read_vfio_devs(paths) == {}
    assert bus.read_dev_nodes(paths) is None, "it is not known which nodes there are"


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
def test_only_the_kernels_own_dev_is_evidence(tmp_path: Path, mounts: list[str], is_live: bool) -> None:
    paths = HostPaths(Path("/"))
    paths.mountinfo, paths.dev_vfio = tmp_path / "mountinfo", tmp_path / "vfio"
    paths.mountinfo.write_text("".join(f"{line}\n" for line in mounts))
    paths.dev_vfio.mkdir()
    (paths.dev_vfio / "12").touch()
    assert bus.read_dev_nodes(paths) == (frozenset({"/dev/vfio/12"}) if is_live else None)


# When this process is at its own end


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_want_of_descriptors_or_memory_is_no_word_about_the_host(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*args: Any, **more: Any) -> Any:
        raise OSError(number, os.strerror(number), "somewhere")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fail)
        for read in (tree.read, lambda: bus.read_kernel_has_cdevs(tree.paths)):
            with pytest.raises(sysfs.OutOfResources, match=os.strerror(number)):
                read()
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", fail)
        patched.setattr(os, "scandir", fail)
        for look in (bus.list_addresses, bus.read_group_nodes, bus.read_vfio_devs):
            with pytest.raises(sysfs.OutOfResources):
                look(tree.paths)
        with pytest.raises(sysfs.OutOfResources):
            tree.read()


def test_nothing_stays_open(tree: Tree) -> None:
    before = len(os.listdir("/proc/self/fd"))
    bus.read_groups(tree.paths, tree.functions())
    assert len(os.listdir("/proc/self/fd")) == before
