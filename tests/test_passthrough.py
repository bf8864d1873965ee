"""All that vfio can pass: Grace's GPUs, vGPUs, virtual functions, and what resource rules take of other vendors.

Tables are asked of the inventory, which is pure; the real process, with a kubelet played by grpcio, serves the rest.
Cases of single conditions and of files that are wrong are in test_devices.py and test_config_file.py.
"""

from __future__ import annotations

import itertools
import json
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from conftest import StartDaemon
from daemon import Places
from facts import gpu, host
from hypothesis import given
from hypothesis import strategies as st
from kubelet import GrpcKubelet
from mediated import Mediated
from names import AUDIO, GEFORCE, PGPU, T4
from outputs import assert_allocates, cdi_of, read_cdi
from trials import QUICK, wait_until

from sandbox_plugin.cli.main import main
from sandbox_plugin.config.file import parse_config
from sandbox_plugin.config.settings import ResourceRule, Settings
from sandbox_plugin.fake import models
from sandbox_plugin.fake.files import create_link
from sandbox_plugin.fake.hardware import At, FunctionSpec, Kernel, Model, NumaNode, Preset, RootBus
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import GROUPS_ONLY, PRESETS, WITH_CDEVS
from sandbox_plugin.inventory.devices import Found, find_devices
from sandbox_plugin.inventory.faults import assess, why_lost
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import NVIDIA, HostFacts, PciFunction, Reason
from sandbox_plugin.registry import Registry

A, B, C = (f"0000:0{bus}:00.0" for bus in (1, 2, 3))
NAMES = ModelNames.load()
GRACE = "nvgrace_gpu_vfio_pci"
KERNELS = pytest.mark.parametrize("kernel", [WITH_CDEVS, GROUPS_ONLY], ids=["cdevs", "groups"])
BOTH = pytest.mark.parametrize("cdev", [True, False], ids=["cdevs", "groups"])


def find(facts: HostFacts, config: str = "") -> Found:
    """What a daemon with this config file makes of a host."""
    rules = parse_config(config, "config file x", frozenset({"gpu-alias"}))
    alias = rules.settings.get("gpu-alias", "pgpu")
    settings = Settings(gpu_alias=alias, resources=rules.resources, model_names=rules.model_names)
    return find_devices(facts, Rules(settings, NAMES))


def offered(found: Found) -> dict[str, list[str]]:
    """Resource -> addresses of the functions that make its devices."""
    resources: dict[str, list[str]] = {}
    for device in found.devices:
        resources.setdefault(device.resource, []).extend(p.address for p in device.placements)
    return resources


def on_disk(places: Places, *, text: str) -> str:
    """The flag for a config file with this text."""
    path = places.top / "plugin.toml"
    path.write_text(text)
    return f"--config={path}"


def made(places: Places, preset: Preset, name: str = "node") -> FakeNode:
    return FakeNode.create(places.top / name, preset)


def nodes_of(node: FakeNode, *addresses: str) -> dict[str, str]:
    """Device ID -> path of the VFIO node, as these functions have them now."""
    found = {}
    for address in addresses:
        function = node.function(address)
        assert function.vfio is not None
        if node.kernel.cdevs:
            found[str(function.vfio.number)] = f"/dev/vfio/devices/vfio{function.vfio.number}"
        else:
            found[str(function.iommu_group)] = f"/dev/vfio/{function.iommu_group}"
    return found


def wait_for_specs(places: Places, wanted: Mapping[str, str]) -> None:
    """Until the CDI specs hold just these nodes; a look that falls into the middle of a change says nothing."""

    def are_there() -> bool:
        with suppress(AssertionError, FileNotFoundError):
            return read_cdi(places.cdi) == wanted
        return False

    wait_until(are_there, f"the specs should hold {wanted}")


def assert_serves(kubelet: GrpcKubelet, places: Places, resources: Mapping[str, Mapping[str, str]]) -> None:
    """The kubelet sees these devices Healthy and no others; each Allocate and all CDI specs hold just their nodes."""
    wanted = {resource: set(nodes) for resource, nodes in resources.items()}
    kubelet.wait_for(lambda: {r: kubelet.healthy(r) for r in kubelet.resources()} == wanted)
    specs: dict[str, str] = {}
    for resource, nodes in resources.items():
        assert kubelet.unhealthy(resource) == set()
        assert_allocates(kubelet.plugin(resource), [[device_id] for device_id in nodes], nodes)
        specs |= cdi_of(resource, nodes)
    wait_for_specs(places, specs)


# Grace: a variant driver, and functions of coherent memory beside the GPU


def memory_of(gpu_address: str, *, vfio: int | None, **changes: Any) -> PciFunction:
    """A function of class `memory` in the slot of a GPU."""
    known = {"device": 0x22B8, "class_code": 0x050200, "driver": GRACE if vfio is not None else None}
    return gpu(gpu_address[:-1] + "1", vfio=vfio, **(known | changes))


@pytest.mark.parametrize("driver", [GRACE, "vfio-pci", "mlx5_vfio_pci", "nvidia"])
def test_whatever_driver_has_a_vfio_device_is_a_vfio_driver(driver: str) -> None:
    assert offered(find(host(gpu(A, driver=driver)))) == {PGPU: [A]}


def test_before_there_was_a_vfio_device_the_name_of_a_variant_driver_tells() -> None:
    assert offered(find(host(gpu(A, vfio=None, driver=GRACE)))) == {PGPU: [A]}
    assert find(host(gpu(A, vfio=None, driver="nvidia"))).devices == ()


@BOTH
@pytest.mark.parametrize("class_code", [0x050000, 0x050200, 0x058000, 0x040300, 0x088000])
def test_a_gpu_with_functions_of_coherent_memory_is_one_device(cdev: bool, class_code: int) -> None:
    one = gpu(A, vfio=1, driver=GRACE, cdev=cdev)
    facts = host(one, memory_of(A, vfio=2, cdev=cdev, class_code=class_code))
    found = find(facts)
    (device,) = found.devices
    assert (device.resource, device.id, device.mates) == (PGPU, "1" if cdev else "50", ())
    assert device.node == ("/dev/vfio/devices/vfio1" if cdev else "/dev/vfio/50")
    assert [p.address for p in device.placements] == [A]
    assert (assess(device, facts), found.unoffered) == (None, {})


@BOTH
def test_coherent_memory_that_a_host_driver_has_keeps_its_gpu_from_vms(cdev: bool) -> None:
    memory = memory_of(A, vfio=None, driver="cxl_mem")
    facts = host(gpu(A, vfio=1, driver=GRACE, cdev=cdev), memory)
    (device,) = find(facts).devices
    fault = assess(device, facts)
    assert fault is not None
    assert fault.reason is Reason.NOT_VIABLE
    assert f"{memory.address} in its IOMMU group 50 is bound to cxl_mem" in fault.detail


def test_a_rule_may_take_what_the_variant_driver_has() -> None:
    config = f'[[resources]]\nname = "nvidia.com/grace"\ndriver = "{GRACE}"\nclass = "0302"\n'
    two = host(gpu(A, vfio=1, driver=GRACE), memory_of(A, vfio=2), gpu(B, vfio=3, group=51))
    assert offered(find(two, config)) == {"nvidia.com/grace": [A], PGPU: [B]}


GRACE_MEMORY = Model(vendor=NVIDIA, device=0x22B8, class_code=0x050200)
GB200 = replace(models.GH200, device=0x2941, subsystem=(NVIDIA, 0x2046))
DOMAINS = ("0008", "0009", "0018", "0019")


def grace_blackwell() -> Preset:
    """GB200 boards: four GPUs in PCI domains of their own, here each with a function of coherent memory."""
    buses = tuple(
        RootBus(
            name=f"pci{domain}:00",
            numa_node=number // 2,
            functions=(
                At("00:00.0", models.GRACE_ROOT_PORT, (
                    At("01:00.0", GB200, vfio=GRACE, group=domain),
                    At("01:00.1", GRACE_MEMORY, vfio=GRACE, group=domain),
                )),
            ),
        )
        for number, domain in enumerate(DOMAINS)
    )  # fmt: skip
    nodes = (NumaNode(number=0, cpulist="0-71"), NumaNode(number=1, cpulist="72-143"))
    return Preset(summary="GB200", kernel=WITH_CDEVS, nodes=nodes, buses=buses)


def test_the_gpus_of_a_gb200_are_served_each_with_its_own_node_alone(
    places: Places, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = made(places, grace_blackwell())
    daemon(node, "--gpu-alias=")
    nodes = nodes_of(node, *(f"{domain}:01:00.0" for domain in DOMAINS))
    assert len(nodes) == 4
    assert_serves(kubelet, places, {"nvidia.com/GB100_HGX_GB200": nodes})


# vGPUs: mediated devices


def workstation(places: Places, kernel: Kernel) -> FakeNode:
    return made(places, replace(PRESETS["workstation"], kernel=replace(kernel, first_group=10)))


@KERNELS
def test_vgpus_come_and_go_while_the_daemon_runs_each_type_as_a_resource(
    places: Places, kubelet: GrpcKubelet, daemon: StartDaemon, kernel: Kernel
) -> None:
    node = workstation(places, kernel)
    node.bind(T4, "nvidia")
    whole = {PGPU: nodes_of(node, GEFORCE)}
    running = daemon(node, QUICK)
    assert_serves(kubelet, places, whole)

    vgpus = Mediated(node, T4)
    first, second = (vgpus.add(n, "nvidia-222", "GRID T4-1Q", 70 + n) for n in (1, 2))
    other = vgpus.add(3, "nvidia-230", "GRID T4-2Q", 73)
    running.wait_for("not offered", pci_address=T4, reason="carries mediated devices (vGPUs): do not bind it")
    small, large = "nvidia.com/GRID_T4-1Q", "nvidia.com/GRID_T4-2Q"
    kept = {large: vgpus.node_of(other)} | whole
    assert_serves(kubelet, places, {small: vgpus.node_of(first) | vgpus.node_of(second)} | kept)

    gone = vgpus.node_of(first)
    vgpus.remove(first)
    kubelet.wait_for(lambda: kubelet.unhealthy(small) == set(gone))
    assert kubelet.healthy(small) == set(vgpus.node_of(second))
    running.wait_for("device changed", resource=small, reason=f"gone: {first} is not there any more")
    without = cdi_of(small, vgpus.node_of(second)) | cdi_of(large, kept[large]) | cdi_of(PGPU, whole[PGPU])
    wait_for_specs(places, without)

    again = vgpus.add(4, "nvidia-222", "GRID T4-1Q", 71)
    assert_serves(kubelet, places, {small: vgpus.node_of(again) | vgpus.node_of(second)} | kept)


@BOTH
def test_a_rule_may_give_vgpus_another_name_or_keep_them(cdev: bool) -> None:
    one = gpu(str(uuid.UUID(int=1)), driver="nvidia-vgpu-vfio", mdev_type="GRID T4-1Q", cdev=cdev)
    rule = '[[resources]]\ndriver = "nvidia-vgpu-vfio"\n'
    assert offered(find(host(one))) == {"nvidia.com/GRID_T4-1Q": [one.address]}
    facts = host(one, group_nodes=frozenset({50}))
    assert offered(find(facts, f'{rule}name = "nvidia.com/desk"')) == {"nvidia.com/desk": [one.address]}
    assert find(facts, f"{rule}exclude = true").unoffered == {one.address: "excluded by resources[0]"}


# SR-IOV


def carry(node: FakeNode, carrier: str, *addresses: str) -> None:
    """The kernel makes virtual functions: they are there, linked, before any driver takes them."""
    for number, address in enumerate(addresses):
        parent = node.folder(carrier).parent.name
        node.add(FunctionSpec(address=address, model=replace(models.T4, sriov=None), parent=parent))
        create_link(f"{node.folder(address)}/physfn", str(node.folder(carrier)))
        create_link(f"{node.folder(carrier)}/virtfn{number}", str(node.folder(address)))


def carry_nothing(node: FakeNode, carrier: str) -> None:
    for link in node.folder(carrier).glob("virtfn*"):
        address = link.resolve().name
        link.unlink()
        node.remove(address)


@KERNELS
def test_virtual_functions_are_devices_and_what_carries_them_is_not_until_they_are_gone(
    places: Places, kubelet: GrpcKubelet, daemon: StartDaemon, kernel: Kernel
) -> None:
    node = workstation(places, kernel)
    running = daemon(node, QUICK)
    whole = {PGPU: nodes_of(node, GEFORCE, T4)}
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == set(whole[PGPU]))

    parts = ("0000:02:00.4", "0000:02:00.5", "0000:02:00.6")
    carry(node, T4, *parts)
    for address in parts[:2]:  # the third stays without a driver
        node.bind(address)
    resource = "nvidia.com/TU104GL_TESLA_T4_VF"
    kubelet.wait_for(lambda: kubelet.healthy(resource) == set(nodes_of(node, *parts[:2])))
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == set(nodes_of(node, T4)))
    assert kubelet.healthy(PGPU) == set(nodes_of(node, GEFORCE))
    why = f"not-bound: {T4} is no longer offered: it has 3 SR-IOV virtual functions enabled"
    running.wait_for("device changed", resource=PGPU, pci_address=T4, reason=why)
    parts_now = nodes_of(node, *parts[:2])
    assert_allocates(kubelet.plugin(resource), [[device_id] for device_id in parts_now], parts_now)
    specs = cdi_of(PGPU, nodes_of(node, GEFORCE)) | cdi_of(resource, parts_now)
    wait_for_specs(places, specs)

    carry_nothing(node, T4)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == set(whole[PGPU]))
    kubelet.wait_for(lambda: kubelet.unhealthy(resource) == set(parts_now))
    assert_allocates(kubelet.plugin(PGPU), [list(whole[PGPU])], whole[PGPU])


def test_who_has_a_physical_function_has_its_virtual_functions_too() -> None:
    """As a VM that enables them itself: vfio-pci lets nobody else open them."""
    clock = itertools.count(100.0)
    registry = Registry(Rules(names=NAMES), requires_cdi=False, clock=lambda: next(clock))
    registry.observe(host(gpu(A, vfio=1)))
    registry.allocate([(PGPU, "1")])
    part = gpu(B, vfio=2, group=51, physical_function=A)
    registry.observe(host(gpu(A, vfio=1, virtual_functions=1), part))
    (virtual,) = (d for devices in registry.current.resources.values() for d in devices if d.address == B)
    assert virtual.health.reason is Reason.GROUP_TAKEN


@BOTH
def test_virtual_functions_of_any_vendor_are_devices_by_a_rule_and_what_carries_them_is_not(cdev: bool) -> None:
    nic: dict[str, Any] = {"vendor": 0x8086, "class_code": 0x020000, "cdev": cdev}
    whole = gpu(A, vfio=1, device=0x1572, virtual_functions=2, **nic)
    parts = [
        gpu(f"0000:01:02.{n}", vfio=2 + n, group=60 + n, device=0x154C, physical_function=A, **nic) for n in range(2)
    ]
    config = '[[resources]]\nname = "intel.com/nic"\nvendor = "8086"\nclass = "02"\n'
    found = find(host(whole, *parts), config)
    assert offered(found) == {"intel.com/nic": [part.address for part in parts]}
    assert found.unoffered == {A: "has 2 SR-IOV virtual functions enabled; only those can be offered"}
    assert offered(find(host(replace(whole, virtual_functions=0)), config)) == {"intel.com/nic": [A]}


@BOTH
def test_a_device_that_carries_virtual_functions_now_says_so(cdev: bool) -> None:
    one = gpu(A, vfio=3, cdev=cdev)
    (device,) = find(host(one)).devices
    now = why_lost(device, host(replace(one, virtual_functions=4)))
    assert now.reason is Reason.NOT_BOUND
    assert now.detail == f"{A} is no longer offered: it has 4 SR-IOV virtual functions enabled"


# Resource rules

RADEON, INSTINCT, NIC, NVME, H100 = "0000:03:00.0", "0000:c1:00.0", "0000:41:00.0", "0001:01:00.0", "0000:1b:00.0"


def mixed(*, cdev: bool) -> HostFacts:
    """One of each kind, each in a group of its own."""
    kinds = {
        RADEON: (0x1002, 0x744C, 0x030000, (0x1002, 0x0E3B)),
        INSTINCT: (0x1002, 0x74A1, 0x120000, (0x1002, 0x74A1)),
        NIC: (0x8086, 0x1572, 0x020000, (0x8086, 0x0007)),
        NVME: (0x144D, 0xA80A, 0x010802, (0x144D, 0xA801)),
        H100: (NVIDIA, 0x2330, 0x030200, (NVIDIA, 0x16C1)),
    }
    return host(
        *(
            gpu(
                address,
                vfio=number,
                group=10 + number,
                cdev=cdev,
                driver="mlx5_vfio_pci" if address == NIC else "vfio-pci",
                vendor=vendor,
                device=device,
                class_code=class_code,
                subsystem_vendor=subsystem[0],
                subsystem_device=subsystem[1],
            )
            for number, (address, (vendor, device, class_code, subsystem)) in enumerate(kinds.items())
        )
    )


@BOTH
@pytest.mark.parametrize(
    ("conditions", "takes"),
    [
        ('vendor = "1002"', {RADEON, INSTINCT}),
        ('vendor = ["8086", "0x144d"]', {NIC, NVME}),
        ('device = "a80a"', {NVME}),
        ('device = "A80A"', {NVME}),
        ('class = "03"', {RADEON, H100}),
        ('class = "0300"', {RADEON}),
        ('class = "010802"', {NVME}),
        ('class = ["12", "0200"]', {INSTINCT, NIC}),
        ('class = "30"', set()),
        ('subsystem = "8086:0007"', {NIC}),
        ('subsystem = ["1002:74A1", "10de:16c1"]', {INSTINCT, H100}),
        ('subsystem = "1002:16c1"', set()),
        ('address = "0000:C1:00.0"', {INSTINCT}),
        ('address = "0000:*"', {RADEON, INSTINCT, NIC, H100}),
        ('address = "*:01:00.?"', {NVME}),
        ('address = "0000:?1:00.0"', {INSTINCT, NIC}),
        ('driver = "mlx5_vfio_pci"', {NIC}),
        ('driver = ["nvidia", "amdgpu"]', set()),
        ('vendor = "1002"\nclass = "03"', {RADEON}),
        ('vendor = "1002"\nclass = "03"\ndevice = "74a1"', set()),
        ('vendor = ["1002", "10de"]\nclass = "03"\naddress = "0000:1?:*"\ndriver = "vfio-pci"', {H100}),
    ],
)
def test_a_rule_takes_what_meets_all_of_its_conditions(cdev: bool, conditions: str, takes: set[str]) -> None:
    found = offered(find(mixed(cdev=cdev), f'[[resources]]\nname = "any.example/thing"\n{conditions}\n'))
    assert set(found.pop("any.example/thing", [])) == takes
    assert found == ({} if H100 in takes else {PGPU: [H100]})


SPECIAL = '[[resources]]\nname = "b.example/special"\naddress = "0000:c1:00.0"\n'
AMD = '[[resources]]\nname = "amd.com/gpu"\nvendor = "1002"\n'
NOT_RADEON = '[[resources]]\nexclude = true\nclass = "03"\n'


@BOTH
@pytest.mark.parametrize(
    ("config", "takes", "excluded"),
    [
        (AMD, {"amd.com/gpu": [RADEON, INSTINCT], PGPU: [H100]}, {}),
        (SPECIAL + AMD, {"b.example/special": [INSTINCT], "amd.com/gpu": [RADEON], PGPU: [H100]}, {}),
        (AMD + SPECIAL, {"amd.com/gpu": [RADEON, INSTINCT], PGPU: [H100]}, {}),
        (NOT_RADEON + AMD, {"amd.com/gpu": [INSTINCT]}, {RADEON: 0, H100: 0}),
        (AMD + NOT_RADEON, {"amd.com/gpu": [RADEON, INSTINCT]}, {H100: 1}),
        (AMD + AMD.replace("1002", "8086"), {"amd.com/gpu": [RADEON, INSTINCT, NIC], PGPU: [H100]}, {}),
    ],
)
def test_the_first_rule_that_matches_decides(
    cdev: bool, config: str, takes: dict[str, list[str]], excluded: dict[str, int]
) -> None:
    found = find(mixed(cdev=cdev), config)
    assert {resource: set(addresses) for resource, addresses in offered(found).items()} == {
        resource: set(addresses) for resource, addresses in takes.items()
    }
    assert found.unoffered == {address: f"excluded by resources[{rule}]" for address, rule in excluded.items()}


@pytest.mark.parametrize("has_driver", [True, False])
def test_without_cdevs_nothing_is_offered_that_takes_an_excluded_function_along(has_driver: bool) -> None:
    config = f'[[resources]]\nexclude = true\naddress = "{B}"\n'
    excluded = gpu(B, group=9, cdev=False) if has_driver else gpu(B, group=9, vfio=None)
    found = find(host(gpu(A, group=9, cdev=False), excluded, gpu(C, group=10, cdev=False)), config)
    assert offered(found) == {PGPU: [C]}
    shares = f"shares IOMMU group 9 with {B}, which resources[0] excludes"
    assert found.unoffered == {A: shares, B: "excluded by resources[0]"}
    assert offered(find(host(gpu(A, vfio=1, group=9), gpu(B, vfio=2, group=9)), config)) == {PGPU: [A]}


def test_an_excluded_bridge_keeps_nobody_from_its_group() -> None:
    port = gpu("0000:00:01.0", group=9, vfio=None, driver="pcieport", class_code=0x060400)
    config = '[[resources]]\nexclude = true\naddress = "0000:00:*"\n'
    assert offered(find(host(gpu(A, group=9, cdev=False), port), config)) == {PGPU: [A]}


def test_without_cdevs_a_virtual_function_is_not_offered_with_what_carries_it_in_its_group() -> None:
    whole = gpu(A, vfio=1, group=9, cdev=False, virtual_functions=1)
    part = gpu("0000:01:00.4", vfio=2, group=9, cdev=False, physical_function=A)
    found = find(host(whole, part))
    assert found.devices == ()
    assert (
        found.unoffered[part.address] == f"shares IOMMU group 9 with {A}, which has 1 SR-IOV virtual functions enabled"
    )


def test_a_rule_for_whole_functions_takes_no_mediated_device() -> None:
    vgpu = gpu(str(uuid.UUID(int=1)), vfio=1, group=60, driver="nvidia-vgpu-vfio", mdev_type="GRID T4-1Q")
    config = '[[resources]]\nname = "nvidia.com/big"\nvendor = "10de"\nclass = "03"\n'
    found = offered(find(host(gpu(A), vgpu), config))
    assert found == {"nvidia.com/big": [A], "nvidia.com/GRID_T4-1Q": [vgpu.address]}


def test_rules_of_two_resources_never_share_a_group_and_the_loser_says_to_whom_it_went() -> None:
    config = SPECIAL.replace("0000:c1:00.0", B) + AMD
    both = [gpu(a, vendor=0x1002, group=9, vfio=n, cdev=False) for n, a in enumerate((A, B, C), 1)]
    found = find(host(*both), config)
    (device,) = found.devices
    assert (device.resource, device.id, device.address) == ("b.example/special", "9", B)
    whose = "shares IOMMU group 9 with a function that resources[0] offers as b.example/special"
    assert found.unoffered == {A: whose, C: whose}


def test_with_cdevs_functions_of_one_group_are_devices_of_two_resources_that_only_one_vm_can_have() -> None:
    config = SPECIAL.replace("0000:c1:00.0", B) + AMD
    found = find(host(*(gpu(a, vendor=0x1002, group=9, vfio=n) for n, a in enumerate((A, B), 1))), config)
    assert {(d.resource, d.address, d.mates) for d in found.devices} == {
        ("amd.com/gpu", A, ("2",)),
        ("b.example/special", B, ("1",)),
    }
    assert found.unoffered == {}


ADDRESSES = [f"0000:{bus:02x}:00.{function}" for bus in (1, 2) for function in range(4)]
rules = st.builds(
    ResourceRule,
    label=st.sampled_from(["resources[0]", "resources[1]"]),
    name=st.sampled_from(["a.example/x", "b.example/y", PGPU, None]),
    vendors=st.sets(st.sampled_from([NVIDIA, 0x1002]), max_size=1).map(frozenset),
    classes=st.sampled_from([(), ("03",), ("0302",), ("02", "0680")]),
    addresses=st.lists(st.sampled_from([*ADDRESSES, "0000:01:*", "*.1"]), max_size=2).map(tuple),
)


@st.composite
def crowded(draw: st.DrawFn) -> HostFacts:
    """Few groups, many functions in each, of both vendors and several kinds, some carrying virtual functions."""
    cdev = draw(st.booleans())
    addresses = draw(st.lists(st.sampled_from(ADDRESSES), unique=True))
    return host(
        *(
            gpu(
                address,
                vfio=number,
                group=draw(st.integers(50, 52)),
                cdev=cdev,
                vendor=draw(st.sampled_from([NVIDIA, 0x1002])),
                class_code=draw(st.sampled_from([0x030200, 0x030000, 0x020000, 0x068000])),
                virtual_functions=draw(st.sampled_from([0, 0, 0, 2])),
            )
            for number, address in enumerate(addresses)
        )
    )


@given(crowded(), st.lists(rules, max_size=4).map(tuple))
def test_whatever_the_rules_no_device_is_of_two_resources_and_every_claim_is_kept_or_explained(
    facts: HostFacts, rules: tuple[ResourceRule, ...]
) -> None:
    settings = Settings(resources=rules)
    found = find_devices(facts, Rules(settings, NAMES))
    nodes = [device.node for device in found.devices]
    assert len(nodes) == len(set(nodes))
    taken = [p.address for device in found.devices for p in device.placements]
    assert len(taken) == len(set(taken))
    for device in found.devices:
        offers = [Rules(settings, NAMES).offer(facts.functions[p.address]) for p in device.placements]
        assert {answer.resource for answer in offers if answer} == {device.resource}
    wanted = {address for address, function in facts.functions.items() if Rules(settings, NAMES).offer(function)}
    assert wanted == set(taken) | found.unoffered.keys()
    assert not set(taken) & found.unoffered.keys()


RX7900 = Model(vendor=0x1002, device=0x744C, class_code=0x030000, subsystem=(0x1002, 0x0E3B), host_driver="amdgpu")
PM9A3 = Model(vendor=0x144D, device=0xA80A, class_code=0x010802, subsystem=(0x144D, 0xA801), host_driver="nvme")
CARD = {
    "h100": "0000:41:00.0",
    "radeon": "0000:42:00.0",
    "boot": "0000:43:00.0",
    "data": "0000:44:00.0",
    "spare": "0000:45:00.0",
    "port0": "0000:46:00.0",
    "port1": "0000:46:00.1",
}
RULES = f"""
gpu-alias = ""

[names]
"10de:2330" = "H100-80G"

[[resources]]
exclude = true
address = "{CARD["spare"]}"

[[resources]]
name = "storage.example.com/nvme"
class = "0108"

[[resources]]
name = "amd.com/gpu"
vendor = "1002"
subsystem = "1002:0e3b"
driver = ["vfio-pci"]

[[resources]]
name = "intel.com/nic"
address = "{CARD["port1"]}"

[[resources]]
name = "intel.com/spare-nic"
vendor = "8086"
device = "1572"
"""


def server(kernel: Kernel) -> Preset:
    """A server with a card of each kind; both ports of the NIC are in one IOMMU group."""
    cards = (
        (At("41:00.0", models.H100_SXM5, vfio="vfio-pci"),),
        (At("42:00.0", RX7900, vfio="vfio-pci"),),
        (At("43:00.0", PM9A3),),
        (At("44:00.0", PM9A3, vfio="vfio-pci"),),
        (At("45:00.0", PM9A3, vfio="vfio-pci"),),
        tuple(At(f"46:00.{port}", models.X710, vfio="vfio-pci", group="nic") for port in range(2)),
    )
    ports = tuple(At(f"40:01.{n}", models.EPYC_ROOT_PORT, below) for n, below in enumerate(cards, 1))
    return Preset(
        summary="a card of each kind",
        kernel=kernel,
        nodes=(NumaNode(number=0, cpulist="0-63"),),
        buses=(RootBus(name="pci0000:40", numa_node=0, functions=(At("40:00.0", models.EPYC_HOST_BRIDGE), *ports)),),
    )


@KERNELS
def test_gpus_nics_and_nvmes_of_any_vendor_are_served_by_rules(
    places: Places, kubelet: GrpcKubelet, daemon: StartDaemon, kernel: Kernel
) -> None:
    node = made(places, server(kernel))
    daemon(node, on_disk(places, text=RULES))
    served = {
        "nvidia.com/H100-80G": nodes_of(node, CARD["h100"]),
        "amd.com/gpu": nodes_of(node, CARD["radeon"]),
        "storage.example.com/nvme": nodes_of(node, CARD["data"]),
        "intel.com/nic": nodes_of(node, CARD["port1"]),
    }
    if kernel.cdevs:
        served["intel.com/spare-nic"] = nodes_of(node, CARD["port0"])
        wanted = {resource: set(nodes) for resource, nodes in served.items()}
        kubelet.wait_for(lambda: {r: kubelet.healthy(r) for r in kubelet.resources()} == wanted)
        for resource, nodes in served.items():
            if resource != "intel.com/spare-nic":  # its mate has been given away by then
                assert_allocates(kubelet.plugin(resource), [list(nodes)], nodes)
        kubelet.wait_for(lambda: kubelet.unhealthy("intel.com/spare-nic") == set(served["intel.com/spare-nic"]))
    else:
        assert_serves(kubelet, places, served)
    specs = [cdi_of(resource, nodes) for resource, nodes in served.items()]
    wait_for_specs(places, {name: path for spec in specs for name, path in spec.items()})


# `list --all`


@pytest.fixture
def listed(capsys: pytest.CaptureFixture[str]) -> Any:
    """Prints a node's functions; returns those of the JSON by address."""

    def run(node: FakeNode, *flags: str) -> dict[str, dict[str, Any]]:
        assert main(["list", f"--fake-sysfs={node.root}", "--all", "--output=json", *flags]) == 0
        functions = json.loads(capsys.readouterr().out)["functions"]
        assert [f["pci_address"] for f in functions] == sorted(f["pci_address"] for f in functions)
        assert len(functions) == len({f["pci_address"] for f in functions})
        return {function["pci_address"]: function for function in functions}

    return run


def verdicts(functions: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str | None, ...]]:
    return {address: (f["resource"], f["rule"], f["reason"]) for address, f in functions.items()}


def test_list_all_tells_of_every_function_which_rule_took_it_or_why_none_did(places: Places, listed: Any) -> None:
    node = made(places, server(GROUPS_ONLY))
    node.unbind(CARD["radeon"])
    functions = listed(node, on_disk(places, text=RULES))
    assert functions.keys() == {function.address for function in node.functions()}
    group = node.function(CARD["port0"]).iommu_group
    assert verdicts({address: functions[address] for address in CARD.values()}) == {
        CARD["h100"]: ("nvidia.com/H100-80G", "NVIDIA GPU", None),
        # without its driver the rule that asks for it does not match, and no other does
        CARD["radeon"]: (None, None, "no rule matches"),
        CARD["boot"]: ("storage.example.com/nvme", "resources[1]", "bound to nvme, not to vfio-pci"),
        CARD["data"]: ("storage.example.com/nvme", "resources[1]", None),
        CARD["spare"]: (None, "resources[0]", "excluded by resources[0]"),
        CARD["port0"]: (
            "intel.com/spare-nic",
            "resources[4]",
            f"shares IOMMU group {group} with a function that resources[3] offers as intel.com/nic",
        ),
        CARD["port1"]: ("intel.com/nic", "resources[3]", None),
    }
    rest = {verdict for address, verdict in verdicts(functions).items() if address not in CARD.values()}
    assert rest == {(None, None, "no rule matches")}
    assert functions[CARD["boot"]] == {
        "pci_address": CARD["boot"],
        "class": "010802",
        "id": "144d:a80a",
        "driver": "nvme",
        "iommu_group": node.function(CARD["boot"]).iommu_group,
        "resource": "storage.example.com/nvme",
        "rule": "resources[1]",
        "reason": "bound to nvme, not to vfio-pci",
        "remarks": None,
        "facts": {  # of a function on a host driver no more is read
            "subsystem": "144d:a801",
            "mdev_type": None,
            "physical_function": None,
            "bridges": ["pci0000:40", "0000:40:01.3"],
            "enable": None,
        },
    }


def test_list_all_as_json_tells_what_was_read_of_a_function(places: Places, listed: Any) -> None:
    node = workstation(places, GROUPS_ONLY)
    node.set_attribute(T4, "enable", "many")
    assert listed(node)[T4] == {
        "pci_address": T4,
        "class": "030200",
        "id": "10de:1eb8",
        "driver": "vfio-pci",
        "iommu_group": 13,
        "resource": "nvidia.com/pgpu",
        "rule": "NVIDIA GPU",
        "reason": None,
        "remarks": None,
        "facts": {
            "subsystem": "10de:12a2",
            "mdev_type": None,
            "physical_function": None,
            "bridges": ["pci0000:00", "0000:00:1b.0"],
            "enable": None,
            "revision": "a1",
            "virtual_functions": 0,
            "numa_node": None,
            "vfio_device": 4,
            "cdev": None,
            "power_state": "D3hot",
            "runtime_status": None,
            "has_power": None,
            "link_speed": "8.0 GT/s PCIe",
            "link_width": 4,
            "fatal_errors": 0,
            "bars": [
                {"index": 0, "size": 16 << 20, "prefetchable": False, "wide": False, "io": False, "unset": False},
                {"index": 1, "size": 256 << 20, "prefetchable": True, "wide": True, "io": False, "unset": False},
                {"index": 3, "size": 32 << 20, "prefetchable": True, "wide": True, "io": False, "unset": False},
            ],
            "reset_methods": ["flr", "bus"],
            "unread": ["enable: 'many' is not a number"],
        },
    }


def test_list_all_tells_as_much_in_a_table(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    node = made(places, server(GROUPS_ONLY))
    assert main(["list", f"--fake-sysfs={node.root}", "--all", on_disk(places, text=RULES)]) == 0
    _, found, table = capsys.readouterr().out.partition("PCI FUNCTION")
    header, *lines = [re.split(r"\s{2,}", line.strip()) for line in f"{found}{table}".splitlines()]
    known = ["PCI FUNCTION", "CLASS", "ID", "DRIVER", "GROUP", "RESOURCE", "RULE"]
    assert header == [*known, "NOT OFFERED BECAUSE", "REMARKS"]
    rows = {line[0]: line[1:] for line in lines}
    assert rows.keys() == {function.address for function in node.functions()}
    group = {address: str(node.function(address).iommu_group) for address in rows}
    radeon, spare, bridge = CARD["radeon"], CARD["spare"], "0000:40:00.0"
    odd = "the kernel cannot reset it alone: the next VM may find what the last one left"
    assert rows[radeon] == ["030000", "1002:744c", "vfio-pci", group[radeon], "amd.com/gpu", "resources[2]", "-", odd]
    reason = "excluded by resources[0]"
    assert rows[spare] == ["010802", "144d:a80a", "vfio-pci", group[spare], "-", "resources[0]", reason, "-"]
    assert rows[bridge] == ["060000", "1022:1482", "-", group[bridge], "-", "-", "no rule matches", "-"]


def test_list_all_knows_rules_of_functions_that_no_vfio_driver_has_yet(places: Places, listed: Any) -> None:
    node = workstation(places, WITH_CDEVS)
    carry(node, T4, "0000:02:00.4")
    node.bind("0000:02:00.4", "nvidia")
    node.bind(GEFORCE, "nvidia")
    config = on_disk(places, text='[[resources]]\nname = "a.example/desk"\nsubsystem = "1458:4014"\nclass="03"\n')
    found = verdicts(listed(node, config))
    assert found[GEFORCE] == ("a.example/desk", "resources[0]", "bound to nvidia, not to vfio-pci")
    part = ("nvidia.com/TU104GL_TESLA_T4_VF", "NVIDIA GPU, virtual function", "bound to nvidia, not to vfio-pci")
    assert found["0000:02:00.4"] == part
    whole = "has 1 SR-IOV virtual functions enabled; only those can be offered"
    assert found[T4] == (PGPU, "NVIDIA GPU", whole)


def test_list_all_tells_of_vgpus_and_of_what_cannot_be_read(places: Places, listed: Any) -> None:
    node = workstation(places, WITH_CDEVS)
    vgpu = Mediated(node, T4).add(1, "nvidia-222", "GRID T4-1Q", 71)
    node.set_attribute(AUDIO, "class", "nonsense")
    found = listed(node)
    assert verdicts(found)[vgpu] == ("nvidia.com/GRID_T4-1Q", "NVIDIA vGPU", None)
    assert found[AUDIO] == {
        "pci_address": AUDIO,
        **dict.fromkeys(("class", "id", "driver", "iommu_group", "resource", "rule", "remarks", "facts")),
        "reason": "unreadable: class is 'nonsense', not a hexadecimal number",
    }


# Names


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (0x233B, "GH100_H200_NVL"),
        (0x2348, "GH100_GH200_144G_HBM3E"),
        (0x2909, "GB100_HGX_B200_168GB"),
        (0x290A, "GB100_B200"),
        (0x2941, "GB100_HGX_GB200"),
        (0x3182, "GB110_B300_SXM6_AC"),
        (0x31C2, "GB110_GB300"),
        (0x2BB1, "GB202GL_RTX_PRO_6000_BLACKWELL_WORKSTATION_EDITION"),
        (0x2BB4, "GB202GL_RTX_PRO_6000_BLACKWELL_MAX-Q_WORKSTATION_EDITION"),
        (0x2BB5, "GB202GL_RTX_PRO_6000_BLACKWELL_SERVER_EDITION"),
    ],
)
def test_models_of_the_last_years_have_their_names(device: int, name: str) -> None:
    assert NAMES.resource_name(NVIDIA, device) == name
    assert offered(find(host(gpu(A, device=device)), 'gpu-alias = ""')) == {f"nvidia.com/{name}": [A]}


def test_names_of_the_config_file_are_for_models_by_their_ids_known_or_not() -> None:
    devices = {A: 0x2330, B: 0x2FFF, C: 0x2335}
    facts = host(*(gpu(a, vfio=n, group=50 + n, device=d) for n, (a, d) in enumerate(devices.items())))
    config = 'gpu-alias = ""\n[names]\n"10de:2330" = "big"\n"10de:2fff" = "NEXT-2"\n'
    assert offered(find(facts, config)) == {
        "nvidia.com/big": [A],
        "nvidia.com/NEXT-2": [B],
        "nvidia.com/GH100_H200_SXM_141GB": [C],
    }
