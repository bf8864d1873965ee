"""The verdict on one device from one set of facts, and who counts as bound to vfio."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from facts import gpu, host

from sandbox_plugin.config.settings import Settings
from sandbox_plugin.inventory.devices import find_devices
from sandbox_plugin.inventory.health import assess, is_vfio_bound, remarks
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import HEALTHY, Bar, Device, Health, HostFacts, IommuGroup, PciFunction, Reason, VfioDev

A, B = "0000:01:00.0", "0000:02:00.0"
SOUND, BRIDGE = "0000:01:00.1", "0000:00:01.0"
GONE: dict[str, Any] = {"link_speed": "Unknown", "link_width": 63}


def verdict(facts: HostFacts, *, require_iommufd: bool = False) -> Health:
    """On the only device of this host."""
    (device,) = find_devices(facts, Rules(Settings(require_iommufd=require_iommufd))).devices
    assert device.health == assess(device, facts, require_iommufd=require_iommufd)
    return device.health


def sound(driver: str | None, *, group: int = 50, **changes: Any) -> PciFunction:
    return gpu(SOUND, vfio=None, group=group, driver=driver, device=0x10F8, class_code=0x040300, **changes)


def bridge(driver: str | None, class_code: int, *, group: int = 50) -> PciFunction:
    return gpu(BRIDGE, vfio=None, group=group, driver=driver, vendor=0x8086, class_code=class_code)


# Bound or not


@pytest.mark.parametrize("driver", ["vfio-pci", "nvgrace_gpu_vfio_pci", "mlx5_vfio_pci", "some_driver"])
def test_whoever_has_a_vfio_device_is_bound_whatever_the_drivers_name(driver: str) -> None:
    function = gpu(A, driver=driver)
    assert is_vfio_bound(function, HostFacts())


def test_on_an_old_kernel_the_group_node_and_the_drivers_name_tell() -> None:
    function = replace(gpu(A, group=5), vfio=None)
    assert is_vfio_bound(function, HostFacts(group_nodes=frozenset({5})))
    assert not is_vfio_bound(function, HostFacts(group_nodes=frozenset({6})))
    assert not is_vfio_bound(replace(function, driver="nvidia"), HostFacts(group_nodes=frozenset({5})))


def test_without_a_driver_nothing_is_bound_though_a_vm_still_has_it() -> None:
    leaving = replace(gpu(A, group=5), driver=None)
    assert leaving.vfio is not None
    assert not is_vfio_bound(leaving, HostFacts(group_nodes=frozenset({5})))


# The verdict


def test_a_device_that_answers_in_a_viable_group_with_a_node_is_healthy() -> None:
    assert verdict(host(gpu(A))) == HEALTHY
    assert str(verdict(host(gpu(A)))) == "healthy"


@pytest.mark.parametrize(
    "changes",
    [
        {"link_speed": None, "link_width": None},
        {"link_speed": "Unknown", "link_width": 16},
        {"link_speed": "2.5 GT/s PCIe", "link_width": 63},
        {"link_speed": "2.5 GT/s PCIe", "link_width": 1},
        {"power_state": "D3hot"},
        {"power_state": "D3hot", "runtime_status": "active"},
        {"power_state": "D3cold", "link_speed": None, "link_width": None},
        {"power_state": "D3cold", "runtime_status": "suspended", "has_power": False, "link_speed": None},
        {"power_state": "D3cold", "runtime_status": "resuming", "has_power": True, "link_speed": None},
        {"power_state": "unknown"},
        {"enable": None, "numa_node": None, "fatal_errors": 7},
    ],
)
def test_sleep_a_slow_link_and_old_errors_are_no_fault(changes: dict[str, Any]) -> None:
    assert verdict(host(gpu(A, **changes))) == HEALTHY


def test_a_device_that_does_not_answer_is_off_the_bus() -> None:
    found = verdict(host(gpu(A, **GONE)))
    assert found.reason is Reason.OFF_THE_BUS
    assert A in found.detail


@pytest.mark.parametrize("has_power", [True, False])
def test_a_device_in_d3cold_that_the_kernel_takes_for_awake_is_off_the_bus(has_power: bool) -> None:
    found = verdict(host(gpu(A, power_state="D3cold", runtime_status="active", has_power=has_power, link_speed=None)))
    assert found.reason is Reason.OFF_THE_BUS
    assert f"{A} does not answer" in found.detail
    assert "D3cold although its runtime_status is active" in found.detail


def test_of_a_group_every_function_must_answer() -> None:
    facts = host(gpu(A, group=5, cdev=False), gpu(B, vfio=1, group=5, cdev=False, **GONE))
    assert verdict(facts).reason is Reason.OFF_THE_BUS
    assert B in verdict(facts).detail


def bar(index: int, *, io: bool = False, unset: bool = False) -> Bar:
    return Bar(index=index, size=4096, prefetchable=False, wide=False, io=io, unset=unset)


def test_a_device_with_a_bar_that_has_no_address_cannot_be_enabled_and_the_bar_is_named() -> None:
    assert verdict(host(gpu(A, bars=(bar(0), bar(2), bar(4))))) == HEALTHY
    found = verdict(host(gpu(A, bars=(bar(0), bar(2, unset=True), bar(4, unset=True)))))
    detail = f"{A} has no address for BAR 2, BAR 4: the kernel cannot enable it"
    assert found == Health(reason=Reason.NO_ADDRESS, detail=detail)


@pytest.mark.parametrize("driver", [None, "vfio-pci", "vfio_something", "pci-stub"])
def test_a_sibling_on_no_driver_on_vfio_or_on_pci_stub_leaves_a_group_viable(driver: str | None) -> None:
    assert verdict(host(gpu(A), sound(driver))) == HEALTHY


def test_a_sibling_with_a_vfio_device_leaves_a_group_viable_whatever_its_driver_is_called() -> None:
    assert verdict(host(gpu(A), replace(sound("nvgrace"), vfio=VfioDev(number=9, cdev=None)))) == HEALTHY


@pytest.mark.parametrize("driver", ["snd_hda_intel", "nvidia", "xhci_hcd", "pcieport", "shpchp"])
def test_a_sibling_on_a_host_driver_does_not(driver: str) -> None:
    found = verdict(host(gpu(A), sound(driver)))
    assert found == Health(reason=Reason.NOT_VIABLE, detail=f"{SOUND} in its IOMMU group 50 is bound to {driver}")


@pytest.mark.parametrize(
    ("driver", "class_code", "is_viable"),
    [
        ("pcieport", 0x060400, True),
        ("pcieport", 0x060000, True),
        (None, 0x060400, True),
        ("shpchp", 0x060400, False),
        ("pcieport", 0x068000, False),
    ],
)
def test_a_bridge_in_the_group_is_harmless_on_its_own_driver_alone(
    driver: str | None, class_code: int, is_viable: bool
) -> None:
    assert verdict(host(gpu(A), bridge(driver, class_code))).healthy is is_viable


def test_a_sibling_in_another_group_is_none() -> None:
    assert verdict(host(gpu(A), sound("snd_hda_intel", group=51))) == HEALTHY


def with_member(facts: HostFacts, address: str, **changes: Any) -> HostFacts:
    """The same host, with one more member in group 50 that was not read."""
    members = (*facts.groups[50].members, address)
    return replace(facts, groups={50: IommuGroup(number=50, members=members)}, **changes)


def test_a_sibling_that_cannot_be_read_may_be_anything() -> None:
    facts = with_member(host(gpu(A)), SOUND, unreadable={SOUND: "sysfs has not answered"})
    assert verdict(facts).reason is Reason.NOT_VIABLE
    assert verdict(facts).detail.endswith("cannot be read: sysfs has not answered")


def test_a_sibling_that_left_meanwhile_is_no_longer_one() -> None:
    assert verdict(with_member(host(gpu(A)), SOUND)) == HEALTHY


@pytest.mark.parametrize("cdev", [True, False])
def test_a_group_in_which_the_firmware_maps_memory_cannot_be_given_to_a_vm(cdev: bool) -> None:
    facts = host(gpu(A, cdev=cdev), sound("snd_hda_intel"))
    found = verdict(
        replace(facts, groups={50: replace(facts.groups[50], firmware_mappings=("0x7e000000-0x7e0fffff",))})
    )
    assert found.reason is Reason.FIRMWARE_MAPPING, "whatever else is wrong can be put right, and does not help"
    assert "IOMMU group 50 at all times (0x7e000000-0x7e0fffff)" in found.detail


def test_a_group_needs_its_node_in_sysfs() -> None:
    facts = host(gpu(A, group=5, cdev=False))
    assert verdict(facts) == HEALTHY
    assert verdict(replace(facts, group_nodes=frozenset())).reason is Reason.NO_NODE


def test_a_cdev_needs_no_group_node() -> None:
    assert verdict(replace(host(gpu(A)), group_nodes=frozenset())) == HEALTHY


@pytest.mark.parametrize(
    ("dev_nodes", "reason"),
    [
        (None, None),
        (frozenset({"/dev/vfio/devices/vfio3", "/dev/vfio/50"}), None),
        (frozenset({"/dev/vfio/50", "/dev/vfio/devices/vfio4"}), Reason.NO_NODE),
        (frozenset(), Reason.NO_NODE),
    ],
)
def test_where_dev_is_the_hosts_own_the_node_must_be_in_it(
    dev_nodes: frozenset[str] | None, reason: Reason | None
) -> None:
    assert verdict(host(gpu(A, vfio=3), dev_nodes=dev_nodes)).reason is reason


def test_confidential_guests_need_cdevs() -> None:
    by_group = host(gpu(A, group=5, cdev=False))
    assert verdict(by_group, require_iommufd=True).reason is Reason.NO_CDEV
    assert verdict(by_group, require_iommufd=False) == HEALTHY
    assert verdict(host(gpu(A)), require_iommufd=True) == HEALTHY


def test_of_several_faults_the_one_that_matters_most_is_told() -> None:
    worst = host(gpu(A, group=50, cdev=False, **GONE), sound("snd_hda_intel"), dev_nodes=frozenset())
    order = []
    order.append(verdict(worst, require_iommufd=True).reason)
    order.append(verdict(worst).reason)
    order.append(verdict(host(gpu(A, cdev=False), sound("snd_hda_intel"), dev_nodes=frozenset())).reason)
    order.append(verdict(host(gpu(A, cdev=False), dev_nodes=frozenset())).reason)
    assert order == [Reason.NO_CDEV, Reason.OFF_THE_BUS, Reason.NOT_VIABLE, Reason.NO_NODE]


def test_what_others_do_with_the_device_is_not_judged_here() -> None:
    device: Device = find_devices(host(gpu(A, enable=1)), Rules()).devices[0]
    assert device.health == HEALTHY


# Remarks


@pytest.mark.parametrize(
    ("function", "is_odd"),
    [
        (gpu(A, bars=(bar(0),)), True),
        (gpu(A, bars=(bar(0), bar(5, io=True), bar(6))), True),
        (gpu(A, bars=(bar(0), bar(2), bar(4))), False),
        (gpu(A, bars=(bar(1),)), False),
        (gpu(A, bars=()), False),
        (gpu(A, bars=(bar(0),), class_code=0x068000), False),
        (gpu(A, bars=(bar(0),), physical_function=B), False),
    ],
)
def test_a_gpu_that_has_only_its_first_bar_left_is_remarked_on(function: PciFunction, is_odd: bool) -> None:
    assert bool(remarks(function)) is is_odd
    assert all("only BAR 0 is left" in remark for remark in remarks(function))


@pytest.mark.parametrize(("methods", "is_odd"), [((), True), (("flr", "bus"), False), (None, False)])
def test_a_function_that_cannot_be_reset_is_remarked_on(methods: tuple[str, ...] | None, is_odd: bool) -> None:
    found = remarks(gpu(A, reset_methods=methods))
    assert bool(found) is is_odd
    assert all("cannot reset it" in remark for remark in found)
    assert verdict(host(gpu(A, reset_methods=methods))) == HEALTHY
