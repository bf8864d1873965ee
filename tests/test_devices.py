"""From PCI functions to devices: what is one, what its ID is, and why the rest is not offered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from facts import H100, gpu, host
from hypothesis import given
from hypothesis import strategies as st
from names import NVSWITCH, PGPU

from sandbox_plugin.config.settings import Consumer, ResourceRule, Settings
from sandbox_plugin.inventory.devices import Found, find_devices
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import HostFacts, IommuGroup, PciFunction, Placement, key_order

A, B, C = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"
AUDIO, USB, USB_C = "0000:01:00.1", "0000:01:00.2", "0000:01:00.3"
NAMES = ModelNames({(0x10DE, H100): "GH100 [H100 SXM5 80GB]", (0x10DE, 0x2335): "GH100 [H200 SXM 141GB]"})


def find(facts: HostFacts, *, cdevs_known: bool = False, **settings: Any) -> Found:
    rules = Rules(Settings(**settings), NAMES)
    before = find_devices(HostFacts(kernel_has_cdevs=True), rules) if cdevs_known else None
    return find_devices(facts, rules, before)


def offered(found: Found) -> dict[tuple[str, str], str]:
    """Resource and ID -> node."""
    return {(d.resource, d.id): d.node for d in found.devices}


def switch(address: str, **changes: Any) -> PciFunction:
    return gpu(address, **{"device": 0x22A3, "class_code": 0x068000, **changes})


def by_group(address: str, *, group: int, **changes: Any) -> PciFunction:
    """As a kernel without cdevs shows it."""
    return gpu(address, group=group, cdev=False, **changes)


def siblings(group: int, **changes: Any) -> list[PciFunction]:
    """Audio, USB and USB-C of a GPU, all on vfio-pci."""
    kinds = ((AUDIO, 0x040300), (USB, 0x0C0330), (USB_C, 0x0C8000))
    return [gpu(a, vfio=20 + i, group=group, class_code=c, **changes) for i, (a, c) in enumerate(kinds)]


# What one device is


def test_with_cdevs_a_device_is_a_function_and_its_id_is_the_number_of_its_cdev() -> None:
    found = find(host(gpu(A, vfio=3, group=59)))
    (device,) = found.devices
    assert (device.id, device.node, device.resource) == ("3", "/dev/vfio/devices/vfio3", PGPU)
    assert (device.iommu_group, device.group_node) == (59, "/dev/vfio/59")
    assert device.placements == (Placement(address=A, numa_node=0, bridges=("pci0000:00", "0000:00:01.0")),)
    assert device.model == "GH100 [H100 SXM5 80GB]"
    assert found.cdevs
    assert found.unoffered == {}


def test_that_the_kernel_has_cdevs_is_noticed_also_where_no_function_can_be_read() -> None:
    before = find_devices(HostFacts(), Rules())
    assert not before.cdevs
    assert find_devices(HostFacts(kernel_has_cdevs=True), Rules(), before).cdevs


def test_without_cdevs_a_device_is_a_group_and_its_id_is_the_groups_number() -> None:
    found = find(host(by_group(A, group=59, vfio=3)))
    (device,) = found.devices
    assert (device.id, device.node, device.group_node) == ("59", "/dev/vfio/59", "/dev/vfio/59")
    assert not found.cdevs


def test_without_cdevs_two_gpus_of_a_group_are_one_device() -> None:
    (device,) = find(host(by_group(A, group=9, vfio=1), by_group(B, group=9, numa_node=1))).devices
    assert (device.id, device.mates) == ("9", ())
    assert device.address == A
    assert [p.address for p in device.placements] == [A, B]
    assert device.numa_nodes == (0, 1)


def test_with_cdevs_the_devices_of_a_group_of_whatever_resource_know_of_each_other() -> None:
    found = find(host(gpu(A, vfio=1, group=9), switch(B, vfio=2, group=9), gpu(C, vfio=3, group=10)))
    assert {d.key: d.mates for d in found.devices} == {(PGPU, "1"): ("2",), (NVSWITCH, "2"): ("1",), (PGPU, "3"): ()}


@pytest.mark.parametrize("cdev", [True, False])
def test_audio_and_usb_ride_along_and_are_never_devices(cdev: bool) -> None:
    found = find(host(gpu(A, vfio=1, group=9, cdev=cdev), *siblings(9, cdev=cdev)))
    (device,) = found.devices
    assert [p.address for p in device.placements] == [A]
    assert (device.mates, found.unoffered) == ((), {})


@pytest.mark.parametrize(
    ("changes", "resource"),
    [
        ({"class_code": 0x030000}, PGPU),
        ({"class_code": 0x030200}, PGPU),
        ({"class_code": 0x068000}, NVSWITCH),
        ({"class_code": 0x030001}, None),
        ({"class_code": 0x038000}, None),
        ({"class_code": 0x060400}, None),
        ({"class_code": 0x068001}, None),
        ({"class_code": 0x040300}, None),
        ({"vendor": 0x1002}, None),
        ({"vendor": 0x8086}, None),
    ],
)
def test_class_and_vendor_tell_a_gpu_from_an_nvswitch_and_from_neither(
    changes: dict[str, Any], resource: str | None
) -> None:
    found = find(host(gpu(A, vfio=1, **changes)))
    assert [d.resource for d in found.devices] == ([resource] if resource else [])
    assert found.unoffered == {}, "what nobody wants is not mentioned"


@pytest.mark.parametrize(
    ("settings", "resources"),
    [
        ({"gpu_alias": "gpu"}, {"1": "nvidia.com/gpu", "2": "nvidia.com/gpu", "3": "nvidia.com/gpu"}),
        (
            {"gpu_alias": ""},
            {
                "1": "nvidia.com/GH100_H100_SXM5_80GB",
                "2": "nvidia.com/GH100_H200_SXM_141GB",
                "3": "nvidia.com/UNKNOWN_10DE_2FFF",
            },
        ),
        (
            {"gpu_alias": "", "model_names": {(0x10DE, H100): "H100", (0x10DE, 0x2335): "H200"}},
            {"1": "nvidia.com/H100", "2": "nvidia.com/H200", "3": "nvidia.com/UNKNOWN_10DE_2FFF"},
        ),
        ({"model_names": {(0x10DE, H100): "H100"}}, {"1": PGPU, "2": PGPU, "3": PGPU}),
    ],
    ids=["an alias", "no alias", "no alias, names of a person", "an alias and names of a person"],
)
def test_models_are_one_resource_by_an_alias_and_one_each_without(
    settings: dict[str, Any], resources: dict[str, str]
) -> None:
    models = (gpu(A, vfio=1), gpu(B, vfio=2, group=51, device=0x2335), gpu(C, vfio=3, group=52, device=0x2FFF))
    assert {d.id: d.resource for d in find(host(*models), **settings).devices} == resources


def test_a_virtual_function_is_of_a_resource_of_its_own() -> None:
    whole, part = gpu(A, vfio=1), gpu(B, vfio=2, group=51, physical_function="0000:09:00.0")
    found = find(host(whole, part))
    assert offered(found).keys() == {(PGPU, "1"), ("nvidia.com/GH100_H100_SXM5_80GB_VF", "2")}
    assert "virtual function of 0000:09:00.0" in found.devices[0].model


def test_a_mediated_device_is_of_the_resource_of_its_type() -> None:
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    found = find(host(by_group(uuid, group=70, mdev_type="GRID T4-1Q", driver="vfio_mdev")))
    (device,) = found.devices
    assert (device.resource, device.id, device.mdev) == ("nvidia.com/GRID_T4-1Q", "70", True)
    assert device.model == "GRID T4-1Q on GH100 [H100 SXM5 80GB]"
    other = find(host(by_group(uuid, group=70, mdev_type="i915-GVTg_V5_4", driver="vfio_mdev", vendor=0x8086)))
    assert other.devices == ()


# The kind of kernel


@pytest.mark.parametrize(
    ("kernel_has_cdevs", "others_have", "known", "cdevs"),
    [
        (False, False, False, False),
        (True, False, False, True),
        (False, True, False, True),
        (False, False, True, True),
    ],
)
def test_a_function_without_a_dev_file_is_a_group_only_where_the_kernel_has_no_cdevs(
    kernel_has_cdevs: bool, others_have: bool, known: bool, cdevs: bool
) -> None:
    other = gpu(C, vfio=7, group=70, vendor=0x8086, cdev=others_have)
    facts = host(by_group(A, group=59, vfio=3), other, kernel_has_cdevs=kernel_has_cdevs)
    found = find(facts, cdevs_known=known)
    assert found.cdevs is cdevs
    if cdevs:
        assert found.devices == ()
        assert found.unoffered == {A: "still being bound: it has no VFIO cdev yet"}
    else:
        assert offered(found) == {(PGPU, "59"): "/dev/vfio/59"}


def test_with_cdevs_one_that_is_bound_already_is_offered_beside_one_that_is_being_bound() -> None:
    found = find(host(gpu(A, vfio=1, group=9), gpu(B, vfio=2, group=9, cdev=False)))
    assert offered(found) == {(PGPU, "1"): "/dev/vfio/devices/vfio1"}
    assert found.devices[0].mates == ()
    assert list(found.unoffered) == [B]


# Why not


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (gpu(A, vfio=None), "bound to no driver"),
        (gpu(A, vfio=None, driver="nvidia"), "bound to nvidia, not to vfio-pci"),
        (replace(gpu(A), driver=None), "bound to no driver"),
        (gpu(A, virtual_functions=4), "has 4 SR-IOV virtual functions enabled; only those can be offered"),
        (replace(gpu(A), iommu_group=None), "in no IOMMU group: is the IOMMU switched on?"),
    ],
)
def test_what_could_be_a_device_and_is_not_says_why(function: PciFunction, why: str) -> None:
    found = find(host(function))
    assert (found.devices, found.unoffered) == ((), {A: why})


def test_a_group_without_an_iommu_is_never_offered() -> None:
    noiommu = {50: IommuGroup(number=50, members=(A,), noiommu=True)}
    found = find(host(gpu(A, cdev=False), groups=noiommu))
    assert found.devices == ()
    assert "no-IOMMU" in found.unoffered[A]


def test_what_could_not_be_read_is_told_whatever_it_is() -> None:
    found = find(host(gpu(A), unreadable={"0000:09:00.0": "vendor is missing"}))
    assert found.unoffered == {"0000:09:00.0": "vendor is missing"}
    assert len(found.devices) == 1


def carrier(**changes: Any) -> PciFunction:
    return gpu(A, vfio=None, driver="nvidia", **changes)


def part(address: str, driver: str = "nvidia") -> PciFunction:
    """A virtual function of A."""
    return gpu(address, vfio=None, driver=driver, group=60, physical_function=A)


def mediated(number: int, *bridges: str) -> PciFunction:
    uuid = f"83b8f4f2-509f-382f-3c1e-e6bfe0fa100{number}"
    return gpu(uuid, vfio=10 + number, group=70 + number, driver="vfio_mdev", mdev_type="GRID T4-1Q", bridges=bridges)


@pytest.mark.parametrize(
    ("others", "carried"),
    [
        ([part(B), part(C)], "SR-IOV virtual functions"),
        ([mediated(1, "pci0000:00", A), mediated(2, "pci0000:00", A)], "mediated devices (vGPUs)"),
        ([part(B), mediated(1, "pci0000:00", A)], "SR-IOV virtual functions and mediated devices (vGPUs)"),
    ],
)
def test_a_function_that_carries_others_says_what_and_that_it_is_not_to_be_bound(
    others: list[PciFunction], carried: str
) -> None:
    found = find(host(carrier(), *others))
    assert found.unoffered[A] == f"bound to nvidia and carries {carried}: do not bind it to vfio-pci"


def test_a_virtual_function_that_carries_mediated_devices_is_not_to_be_bound_either() -> None:
    found = find(host(carrier(), part(B), mediated(1, "pci0000:00", B)))
    assert "carries mediated devices (vGPUs):" in found.unoffered[B]
    assert "carries SR-IOV virtual functions:" in found.unoffered[A]


def test_a_function_above_which_others_are_is_no_carrier_of_what_those_carry() -> None:
    below = gpu(B, bridges=("pci0000:00", A))
    found = find(host(carrier(), below, mediated(1, "pci0000:00", A, "0000:09:00.0")))
    assert found.unoffered[A] == "bound to nvidia, not to vfio-pci"


# Rules of the config file


def rule(name: str | None, **conditions: Any) -> ResourceRule:
    return ResourceRule(label="resources[0]", name=name, **conditions)


FIRST = rule("example.com/first", addresses=(A,))


@pytest.mark.parametrize(
    ("rules", "resource"),
    [
        ((FIRST,), "example.com/first"),
        ((FIRST, rule("example.com/second", vendors=frozenset({0x10DE}))), "example.com/first"),
        ((rule(None, addresses=(A,)), FIRST), None),
    ],
    ids=["before the built-in ones", "the first that matches", "one that excludes"],
)
def test_rules_are_asked_in_their_order_and_the_built_in_ones_last(
    rules: tuple[ResourceRule, ...], resource: str | None
) -> None:
    found = find(host(gpu(A, vfio=1), gpu(B, vfio=2, group=51, vendor=0x10DE)), resources=rules)
    assert next((d.resource for d in found.devices if d.id == "1"), None) == resource
    assert found.unoffered == ({} if resource else {A: "excluded by resources[0]"})


@pytest.mark.parametrize(
    ("conditions", "does"),
    [
        ({"vendors": frozenset({0x10DE, 1})}, True),
        ({"vendors": frozenset({1})}, False),
        ({"devices": frozenset({H100})}, True),
        ({"devices": frozenset({1})}, False),
        ({"classes": ("03",)}, True),
        ({"classes": ("0302",)}, True),
        ({"classes": ("030200", "ff")}, True),
        ({"classes": ("0300",)}, False),
        ({"classes": ("02",)}, False),
        ({"subsystems": frozenset({(0x10DE, 0x16C1)})}, True),
        ({"subsystems": frozenset({(0x10DE, 0x16C2)})}, False),
        ({"addresses": ("0000:0?:00.*",)}, True),
        ({"addresses": ("0000:0?:01.*",)}, False),
        ({"drivers": frozenset({"vfio-pci"})}, True),
        ({"drivers": frozenset({"nvidia"})}, False),
        ({"vendors": frozenset({0x10DE}), "classes": ("02",)}, False),
    ],
)
def test_a_rule_matches_when_each_of_its_conditions_does(conditions: dict[str, Any], does: bool) -> None:
    function = gpu(A, vfio=1, subsystem_vendor=0x10DE, subsystem_device=0x16C1)
    found = find(host(function), resources=(rule("example.com/mine", **conditions),))
    assert offered(found).keys() == {("example.com/mine" if does else PGPU, "1")}


def test_a_group_that_two_rules_want_goes_to_the_first_rule() -> None:
    both = host(by_group(A, group=9), by_group(B, group=9, device=0x22A3, class_code=0x068000))
    assert {(d.resource, d.address) for d in find(both).devices} == {(PGPU, A)}
    rules = (rule("example.com/switch", classes=("0680",)),)
    assert {(d.resource, d.address) for d in find(both, resources=rules).devices} == {("example.com/switch", B)}


# For every host


ADDRESSES = [f"0000:0{n}:00.0" for n in range(1, 7)]


@st.composite
def hosts(draw: st.DrawFn) -> HostFacts:
    """A kernel of either kind, or one that shows both for a moment, with functions in any state."""
    kernel = draw(st.sampled_from(["cdevs", "groups", "mixed"]))
    functions = []
    numbers = draw(st.permutations(range(6)))
    for address, number in zip(draw(st.lists(st.sampled_from(ADDRESSES), unique=True)), numbers, strict=False):
        cdev = {"cdevs": True, "groups": False, "mixed": draw(st.booleans())}[kernel]
        vfio = number if draw(st.integers(0, 3)) else None
        changes: dict[str, Any] = {
            "device": draw(st.sampled_from([H100, 0x2335, 0x22A3])),
            "class_code": draw(st.sampled_from([0x030200, 0x030000, 0x068000, 0x040300])),
        }
        if vfio is None:
            changes["driver"] = draw(st.sampled_from([None, "nvidia", "pci-stub"]))
        functions.append(gpu(address, vfio=vfio, group=draw(st.integers(40, 43)), cdev=cdev, **changes))
    facts = host(*functions, kernel_has_cdevs=draw(st.sampled_from([False, kernel == "cdevs"])))
    return replace(facts, dev_nodes=draw(st.sampled_from([None, frozenset(), frozenset({"/dev/vfio/41"})])))


aliases = st.fixed_dictionaries(
    {"gpu_alias": st.sampled_from(["pgpu", ""]), "nvswitch_alias": st.sampled_from(["nvswitch", ""])}
)


@given(hosts(), aliases, st.booleans(), st.randoms(use_true_random=False))
def test_whatever_a_host_shows_its_devices_are_in_order_and_share_nothing(
    facts: HostFacts, alias: dict[str, Any], cdevs_known: bool, chance: Any
) -> None:
    found = find(facts, cdevs_known=cdevs_known, **alias)
    assert [d.key for d in found.devices] == sorted({d.key for d in found.devices}, key=key_order)
    assert len({d.node for d in found.devices}) == len(found.devices)
    for device in found.devices:
        assert device.node == ("/dev/vfio/devices/vfio" if found.cdevs else "/dev/vfio/") + device.id
        assert {device.id, *device.mates} == {d.id for d in found.devices if d.iommu_group == device.iommu_group}
        assert device.id not in device.mates
    used = [p.address for d in found.devices for p in d.placements]
    assert len(set(used)) == len(used)
    assert not set(used) & found.unoffered.keys()
    assert all(facts.functions[address].driver == "vfio-pci" for address in used)
    wanted = {a for a, f in facts.functions.items() if f.class_code != 0x040300}
    assert wanted == {*used, *found.unoffered}, "what a rule wants is a device or says why not, and nothing else is"
    shuffled = list(facts.functions.items())
    chance.shuffle(shuffled)
    again = find(replace(facts, functions=dict(shuffled)), cdevs_known=cdevs_known, **alias)
    assert {(d.key, d.node) for d in again.devices} == {(d.key, d.node) for d in found.devices}
    assert again.unoffered == found.unoffered


# Whose a resource name is that PodResources or a CDI spec tells of


RULE = ResourceRule(label="resources[0]", name="amd.com/gpu", vendors=frozenset({0x1002}))
GIVEN = {(0x10DE, 0x2335): "H200"}
H100_NAME = "nvidia.com/GH100_H100_SXM5_80GB"


@pytest.mark.parametrize(
    ("settings", "ours", "others"),
    [
        (
            Settings(resources=(RULE,)),
            {PGPU, NVSWITCH, "amd.com/gpu", f"{H100_NAME}_VF", "nvidia.com/UNKNOWN_10DE_2FFF_VF"},
            {H100_NAME, "nvidia.com/gpu", "nvidia.com/", "nvidia.com/_VF", "amd.com/pgpu", "pgpu"},
        ),
        (
            Settings(gpu_alias="", model_names=GIVEN),
            {H100_NAME, NVSWITCH, "nvidia.com/UNKNOWN_10DE_2FFF", "nvidia.com/H200", "nvidia.com/H200_VF"},
            {PGPU, "nvidia.com/GRID_T4-1Q", "amd.com/gpu", "nvidia.com/", f"example.com/{H100_NAME}"},
        ),
        (
            Settings(gpu_alias="gpus", nvswitch_alias="", model_names=GIVEN),
            {"nvidia.com/gpus", "nvidia.com/UNKNOWN_10DE_22A3"},
            {PGPU, NVSWITCH, "nvidia.com/"},
        ),
    ],
    ids=["aliases and a rule", "a resource for each model", "another alias"],
)
def test_a_resource_is_ours_if_a_device_can_have_it_by_these_settings(
    settings: Settings, ours: set[str], others: set[str]
) -> None:
    assert {name for name in ours | others if Rules(settings, NAMES).may_be_ours(name)} == ours


def test_a_device_knows_all_functions_of_its_group_that_a_vm_may_have() -> None:
    bridge = gpu(C, vfio=None, group=9, enable=1, class_code=0x060400)
    left_by_a_vm = gpu("0000:04:00.0", vfio=None, group=9, enable=1)
    idle = gpu("0000:05:00.0", vfio=None, group=9)
    (device,) = find(host(gpu(A, vfio=1, group=9), bridge, left_by_a_vm, idle)).devices
    assert device.group_functions == (A, "0000:04:00.0")


EXCLUDED = ResourceRule(label="resources[0]", name=None, addresses=(B,))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (gpu(B, vfio=2, group=9), f"shares IOMMU group 9 with {B}, which resources[0] excludes"),
        (
            gpu(B, vfio=2, group=9, virtual_functions=4),
            f"shares IOMMU group 9 with {B}, which has 4 SR-IOV virtual functions enabled",
        ),
    ],
    ids=["excluded by a rule", "with virtual functions"],
)
def test_what_is_withheld_withholds_its_group_from_who_gets_the_groups_node(other: PciFunction, why: str) -> None:
    """KubeVirt gets it beside the cdev: through it the VM could open every function of the group."""
    rules = () if other.virtual_functions else (EXCLUDED,)
    facts = host(gpu(A, vfio=1, group=9), other)
    kubevirt = find(facts, resources=rules, consumer=Consumer.KUBEVIRT)
    assert (kubevirt.devices, kubevirt.unoffered[A]) == ((), why)
    (kata,) = find(facts, resources=rules).devices
    assert kata.id == "1", "Kata gets the cdev alone"
    without_group_nodes = host(gpu(A, vfio=1, group=9), other, group_nodes=frozenset())
    (alone,) = find(without_group_nodes, resources=rules, consumer=Consumer.KUBEVIRT).devices
    assert alone.id == "1"
