"""What one scan shows against a device: of each fault when it is one, when it is none, and its words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from facts import gpu, host

from sandbox_plugin.inventory.devices import find_devices
from sandbox_plugin.inventory.faults import assess, remarks, why_lost
from sandbox_plugin.inventory.functions import is_vfio_bound
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import Bar, Device, Fault, HostFacts, IommuGroup, PciFunction, Reason, VfioDev

A, B = "0000:01:00.0", "0000:02:00.0"
SOUND, BRIDGE = "0000:01:00.1", "0000:00:01.0"
OFF: dict[str, Any] = {"link_speed": "Unknown", "link_width": 63}


def only_device(facts: HostFacts) -> Device:
    (device,) = find_devices(facts, Rules()).devices
    return device


def fault(facts: HostFacts, *, require_iommufd: bool = False) -> Fault | None:
    """Of the only device of this host."""
    return assess(only_device(facts), facts, require_iommufd=require_iommufd)


def reason(facts: HostFacts) -> Reason | None:
    found = fault(facts)
    return found.reason if found is not None else None


def sound(driver: str | None, *, group: int = 50, **changes: Any) -> PciFunction:
    return gpu(SOUND, vfio=None, group=group, driver=driver, device=0x10F8, class_code=0x040300, **changes)


def bridge(driver: str | None, class_code: int) -> PciFunction:
    return gpu(BRIDGE, vfio=None, driver=driver, vendor=0x8086, class_code=class_code)


def bar(index: int, *, io: bool = False, unset: bool = False) -> Bar:
    return Bar(index=index, size=4096, prefetchable=False, wide=False, io=io, unset=unset)


# Bound or not


@pytest.mark.parametrize("driver", ["vfio-pci", "nvgrace_gpu_vfio_pci", "some_driver"])
def test_whoever_has_a_vfio_device_is_bound_whatever_the_drivers_name(driver: str) -> None:
    assert is_vfio_bound(gpu(A, driver=driver), HostFacts())


def test_on_an_old_kernel_the_group_node_and_the_drivers_name_tell() -> None:
    function = replace(gpu(A, group=5), vfio=None)
    assert is_vfio_bound(function, HostFacts(group_nodes=frozenset({5})))
    assert not is_vfio_bound(function, HostFacts(group_nodes=frozenset({6})))
    assert not is_vfio_bound(replace(function, driver="nvidia"), HostFacts(group_nodes=frozenset({5})))


def test_without_a_driver_nothing_is_bound_though_a_vm_still_has_it() -> None:
    assert not is_vfio_bound(replace(gpu(A, group=5), driver=None), HostFacts(group_nodes=frozenset({5})))


# The device itself


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"link_speed": None, "link_width": None}, None),
        ({"link_speed": "Unknown", "link_width": 16}, None),
        ({"link_speed": "2.5 GT/s PCIe", "link_width": 63}, None),
        ({"power_state": "D3hot", "runtime_status": "active"}, None),
        ({"power_state": "D3cold", "link_speed": None, "link_width": None}, None),
        ({"power_state": "D3cold", "runtime_status": "suspended", "has_power": False, "link_speed": None}, None),
        ({"power_state": "D3cold", "runtime_status": "resuming", "has_power": True, "link_speed": None}, None),
        ({"power_state": "unknown"}, None),
        ({"enable": 1, "fatal_errors": 7}, None),
        ({"enable": None, "numa_node": None}, None),
        (OFF, "link speed Unknown, width 63"),
        ({"power_state": "D3cold", "runtime_status": "active", "has_power": True, "link_speed": None}, "D3cold alth"),
        ({"power_state": "D3cold", "runtime_status": "active", "has_power": False, "link_speed": None}, "D3cold alth"),
    ],
)
def test_a_device_is_off_the_bus_when_it_does_not_answer_and_not_when_it_sleeps(
    changes: dict[str, Any], words: str | None
) -> None:
    found = fault(host(gpu(A, **changes)))
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert found.reason is Reason.OFF_THE_BUS
        assert found.detail.startswith(f"{A} does not answer on the PCI bus (")
        assert words in found.detail


def test_of_a_group_every_function_must_answer() -> None:
    found = fault(host(gpu(A, group=5, cdev=False), gpu(B, vfio=1, group=5, cdev=False, **OFF)))
    assert found is not None
    assert found.reason is Reason.OFF_THE_BUS
    assert B in found.detail


def test_a_device_with_a_bar_that_has_no_address_cannot_be_enabled_and_the_bar_is_named() -> None:
    assert fault(host(gpu(A, bars=(bar(0), bar(2), bar(4))))) is None
    detail = f"{A} has no address for BAR 2, BAR 4: the kernel cannot enable it"
    found = fault(host(gpu(A, bars=(bar(0), bar(2, unset=True), bar(4, unset=True)))))
    assert found == Fault(reason=Reason.NO_ADDRESS, detail=detail)


def test_confidential_guests_need_cdevs() -> None:
    by_group = host(gpu(A, group=5, cdev=False))
    found = fault(by_group, require_iommufd=True)
    assert found is not None
    assert found.reason is Reason.NO_CDEV
    assert fault(by_group) is None
    assert fault(host(gpu(A)), require_iommufd=True) is None


# Its group


@pytest.mark.parametrize(
    ("sibling", "is_viable"),
    [
        (sound(None), True),
        (sound("vfio-pci"), True),
        (sound("vfio_something"), True),
        (sound("pci-stub"), True),
        (replace(sound("nvgrace"), vfio=VfioDev(number=9, cdev=None)), True),
        (sound("snd_hda_intel"), False),
        (sound("snd_hda_intel", group=51), True),
        (sound("nvidia"), False),
        (sound("pcieport"), False),
        (bridge("pcieport", 0x060400), True),
        (bridge("pcieport", 0x060000), True),
        (bridge(None, 0x060400), True),
        (bridge("shpchp", 0x060400), False),
        (bridge("pcieport", 0x068000), False),
    ],
    ids=lambda it: f"{it.address} on {it.driver}, {it.class_code:06x}" if isinstance(it, PciFunction) else None,
)
def test_a_group_is_viable_while_no_host_driver_has_a_function_of_it_but_the_bridges(
    sibling: PciFunction, is_viable: bool
) -> None:
    detail = f"{sibling.address} in its IOMMU group 50 is bound to {sibling.driver}"
    found = fault(host(gpu(A), sibling))
    assert found == (None if is_viable else Fault(reason=Reason.NOT_VIABLE, detail=detail))


def test_a_sibling_that_cannot_be_read_may_be_anything_and_one_that_left_meanwhile_is_none() -> None:
    facts = replace(host(gpu(A)), groups={50: IommuGroup(number=50, members=(A, SOUND))})
    assert fault(facts) is None
    found = fault(replace(facts, unreadable={SOUND: "sysfs has not answered"}))
    detail = f"{SOUND} in its IOMMU group 50 cannot be read: sysfs has not answered"
    assert found == Fault(reason=Reason.NOT_VIABLE, detail=detail)


@pytest.mark.parametrize("cdev", [True, False])
def test_a_group_in_which_the_firmware_maps_memory_cannot_be_given_to_a_vm(cdev: bool) -> None:
    facts = host(gpu(A, cdev=cdev), sound("snd_hda_intel"))
    group = facts.groups[50]._replace(firmware_mappings=("0x7e000000-0x7e0fffff",))
    found = fault(replace(facts, groups={50: group}))
    assert found is not None
    assert found.reason is Reason.FIRMWARE_MAPPING, "whatever else is wrong can be put right, and does not help"
    assert "IOMMU group 50 at all times (0x7e000000-0x7e0fffff)" in found.detail


# Its node


@pytest.mark.parametrize(
    ("cdev", "changes", "detail"),
    [
        (True, {}, None),
        (True, {"group_nodes": frozenset()}, None),
        (True, {"dev_nodes": frozenset({"/dev/vfio/devices/vfio3"})}, None),
        (True, {"dev_nodes": frozenset({"/dev/vfio/50"})}, "/dev/vfio/devices/vfio3 is not in the host's /dev"),
        (False, {}, None),
        (False, {"dev_nodes": frozenset({"/dev/vfio/50"})}, None),
        (False, {"dev_nodes": frozenset()}, "/dev/vfio/50 is not in the host's /dev"),
        (False, {"group_nodes": frozenset()}, "sysfs shows no node /dev/vfio/50"),
    ],
)
def test_a_node_must_be_in_sysfs_and_in_the_hosts_dev_where_that_can_be_seen(
    cdev: bool, changes: dict[str, Any], detail: str | None
) -> None:
    facts = replace(host(gpu(A, vfio=3, cdev=cdev)), **changes)
    assert fault(facts) == (None if detail is None else Fault(reason=Reason.NO_NODE, detail=detail))
    assert only_device(facts).node_exists is (detail is None), "and no CDI spec names it"


def test_of_several_faults_the_one_that_matters_most_is_told() -> None:
    off, well = gpu(A, cdev=False, **OFF), gpu(A, cdev=False)
    first = fault(host(off, sound("nvidia"), dev_nodes=frozenset()), require_iommufd=True)
    assert first is not None
    assert first.reason is Reason.NO_CDEV
    assert reason(host(off, sound("nvidia"), dev_nodes=frozenset())) is Reason.OFF_THE_BUS
    assert reason(host(well, sound("nvidia"), dev_nodes=frozenset())) is Reason.NOT_VIABLE
    assert reason(host(well, dev_nodes=frozenset())) is Reason.NO_NODE


# Why it is no longer there


@pytest.mark.parametrize(
    ("facts", "reason", "detail"),
    [
        (host(), Reason.GONE, f"{A} is not on the PCI bus any more"),
        (host(gpu(A, vfio=None)), Reason.NOT_BOUND, f"{A} is bound to no driver"),
        (host(gpu(A, vfio=None, driver="nvidia")), Reason.NOT_BOUND, f"{A} is bound to nvidia, not to a vfio driver"),
        (
            host(gpu(A, vfio=None, driver="vfio-pci")),
            Reason.NOT_BOUND,
            f"{A} is still being bound: it has no VFIO cdev yet",
        ),
        (host(gpu(A, vfio=3, cdev=False)), Reason.NOT_BOUND, f"{A} is still being bound: it has no VFIO cdev yet"),
        (host(gpu(A, vfio=4)), Reason.NOT_BOUND, f"{A} was bound again and is now vfio4"),
        (
            host(gpu(A, vfio=3, virtual_functions=2)),
            Reason.NOT_BOUND,
            f"{A} is no longer offered: it has 2 SR-IOV virtual functions enabled",
        ),
        (host(gpu(A, vfio=3)), Reason.NOT_BOUND, f"{A} is no longer offered"),
        (host(unreadable={A: "sysfs has not answered"}), Reason.UNREADABLE, f"{A}: sysfs has not answered"),
        (HostFacts(unreachable="no such folder"), Reason.UNREADABLE, "the PCI bus cannot be read: no such folder"),
    ],
)
def test_a_device_that_is_not_there_any_more_says_why(facts: HostFacts, reason: Reason, detail: str) -> None:
    assert why_lost(only_device(host(gpu(A, vfio=3))), facts) == Fault(reason=reason, detail=detail)


def test_a_mediated_device_was_never_on_the_bus() -> None:
    made = host(gpu(A, mdev_type="GRID T4-1Q", driver="vfio_mdev"))
    assert why_lost(only_device(made), host()).detail == f"{A} is not there any more"


def test_any_function_of_a_device_may_be_the_unreadable_one() -> None:
    device = only_device(host(gpu(A, group=9, cdev=False), gpu(B, group=9, cdev=False)))
    facts = host(gpu(A, group=9, cdev=False), unreadable={B: "sysfs has not answered"})
    assert why_lost(device, facts) == Fault(reason=Reason.UNREADABLE, detail=f"{B}: sysfs has not answered")


# Remarks


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (gpu(A, bars=(bar(0),)), ["only BAR 0 is left"]),
        (gpu(A, bars=(bar(0), bar(5, io=True), bar(6))), ["only BAR 0 is left"]),
        (gpu(A, bars=(bar(0), bar(2), bar(4))), []),
        (gpu(A, bars=(bar(1),)), []),
        (gpu(A, bars=()), []),
        (gpu(A, bars=(bar(0),), class_code=0x068000), []),
        (gpu(A, bars=(bar(0),), physical_function=B), []),
        (gpu(A, reset_methods=()), ["cannot reset it alone"]),
        (gpu(A, reset_methods=("flr", "bus")), []),
        (gpu(A, reset_methods=None), []),
    ],
)
def test_a_lost_bar_and_a_missing_reset_are_remarked_on_and_are_no_fault(
    function: PciFunction, words: list[str]
) -> None:
    found = remarks(function)
    assert len(found) == len(words)
    assert all(word in remark for word, remark in zip(words, found, strict=True))
    if function.class_code == 0x030200:
        assert fault(host(function)) is None
