"""The devices of an inventory as ResourceSlices show them: names, attributes, capacity, taints, limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from facts import gpu, host
from machines import machine
from names import PGPU
from slices import DRIVER, POOL, TERMS, facts_of, registry_of

from sandbox_plugin.config.settings import ResourceRule, Settings
from sandbox_plugin.dra.names import device_name, devices_by_name, pool_name
from sandbox_plugin.dra.plan import plan
from sandbox_plugin.dra.slices import dealt_out, quantity, render_devices
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import PRESETS
from sandbox_plugin.fake.slice_rules import violations
from sandbox_plugin.inventory.ledger import Holdings
from sandbox_plugin.inventory.partitions import boards
from sandbox_plugin.model import Bar, HostFacts, PciFunction, Reason

A, B = "0000:01:00.0", "0000:02:00.0"
UUID = "c9a8b7d6-0000-4000-8000-000000000001"


def mediated(uuid: str) -> PciFunction:
    """A vGPU on an H100."""
    return gpu(uuid, mdev_type="GRID T4-1Q", driver="nvidia-vgpu-vfio", class_code=0, bridges=("pci0000:00", A))


def devices(facts: HostFacts, **terms: Any) -> dict[str, Any]:
    """By name, what is shown of each device."""
    return {each["name"]: each for each in render_devices(registry_of(facts).current, replace(TERMS, **terms))}


def attributes(device: Any) -> dict[str, Any]:
    """Its attributes, each without the word for its type."""
    return {name: value for name, typed in device["attributes"].items() for value in typed.values()}


# Names


def test_a_device_is_called_after_its_address_and_keeps_the_name_when_it_is_bound_again() -> None:
    before, after = (registry_of(host(gpu(A, vfio=number))).current for number in (3, 7))
    assert list(devices_by_name(before)) == list(devices_by_name(after)) == ["pci-0000-01-00-0"]
    assert devices_by_name(after)["pci-0000-01-00-0"].id == "7"
    assert pool_name("node-1") == "node-1"


def test_of_two_that_have_one_address_the_name_means_the_one_that_is_there() -> None:
    registry = registry_of(host(gpu(A, vfio=3)))
    registry.learn(holdings=Holdings(asked_at=registry.now(), pods={(PGPU, "3"): "a/b"}))
    for number in (7, 1):
        inventory = registry.observe(host(gpu(A, vfio=number)))
        assert inventory.device(PGPU, "3") is not None, "a pod holds it"
        assert devices_by_name(inventory)["pci-0000-01-00-0"].id == str(number)


def test_a_mediated_device_is_called_after_its_uuid() -> None:
    inventory = registry_of(host(mediated(UUID))).current
    (device,) = devices_by_name(inventory).values()
    assert device_name(device) == f"mdev-{UUID}"


def test_what_only_a_pod_still_knows_has_no_address_and_is_not_shown() -> None:
    registry = registry_of(host(gpu(A, vfio=3)))
    inventory = registry.learn(holdings=Holdings(asked_at=registry.now(), pods={(PGPU, "9"): "a/b"}))
    assert inventory.device(PGPU, "9") is not None
    assert list(devices_by_name(inventory)) == ["pci-0000-01-00-0"]


# Attributes


def test_a_gpu_shows_where_it_is_what_it_is_and_how_it_is_bound() -> None:
    bars = (
        Bar(index=0, size=1 << 24, prefetchable=False, wide=True, io=False),
        Bar(index=2, size=1 << 37, prefetchable=True, wide=True, io=False),
        Bar(index=4, size=1 << 25, prefetchable=True, wide=True, io=False),
    )
    (shown,) = devices(host(gpu(A, vfio=3, bars=bars, numa_node=1))).values()
    assert shown["attributes"] == {
        "resource.kubernetes.io/pciBusID": {"string": A},
        "resource.kubernetes.io/pcieRoot": {"string": "pci0000:00"},
        "resource.kubernetes.io/numaNode": {"int": 1},
        "type": {"string": "gpu"},
        "resource": {"string": PGPU},
        "model": {"string": "GH100 [H100 SXM5 80GB]"},
        "product": {"string": "H100 SXM5 80GB"},
        "vendorID": {"string": "10de"},
        "deviceID": {"string": "2330"},
        "driver": {"string": "vfio-pci"},
        "iommuGroup": {"int": 50},
        "node": {"string": "cdev"},
        "devicePlugin": {"bool": True},
    }
    assert shown["capacity"] == {"barMemory": {"value": "128Gi"}}
    assert "taints" not in shown


def test_what_is_not_known_is_left_out() -> None:
    (shown,) = devices(host(gpu(A, numa_node=None, bridges=(), device=0x9999))).values()
    assert not {"resource.kubernetes.io/numaNode", "resource.kubernetes.io/pcieRoot", "product"} & set(
        shown["attributes"]
    )
    assert "capacity" not in shown


def test_a_mediated_device_has_its_uuid_and_type_and_no_bus_id_which_would_be_its_cards() -> None:
    (shown,) = devices(host(mediated(UUID))).values()
    known = attributes(shown)
    assert known["type"] == "vgpu"
    assert known["mdevUUID"] == UUID
    assert known["vgpuType"] == "GRID T4-1Q"
    assert "resource.kubernetes.io/pciBusID" not in known
    assert "capacity" not in shown


def test_types_tell_gpus_switches_parts_of_gpus_and_others_apart(tmp_path: Path) -> None:
    found: dict[str, set[str]] = {}
    for name in PRESETS:
        facts = facts_of(FakeNode.create(tmp_path / name, name))
        found[name] = {attributes(each)["type"] for each in devices(facts).values()}
    assert found["hgx-h100"] == {"gpu", "nvswitch"}
    assert set().union(*found.values()) >= {"gpu", "nvswitch", "vgpu"}
    (virtual,) = devices(host(gpu(A, physical_function=B))).values()
    assert attributes(virtual)["type"] == "virtual-function"


def test_a_device_of_another_kind_is_other() -> None:
    nic = ResourceRule(label="x", name="example.com/nic", vendors=frozenset({0x15B3}))
    registry = registry_of(host(gpu(A, vendor=0x15B3, class_code=0x020000)), Settings(resources=(nic,)))
    (shown,) = render_devices(registry.current, TERMS)
    assert attributes(shown)["type"] == "other"
    assert attributes(shown)["resource"] == "example.com/nic"


def test_a_string_that_is_too_long_is_left_out_and_not_cut() -> None:
    long = ResourceRule(label="x", name=f"{'a' * 60}.example/gpu", vendors=frozenset({0x10DE}))
    registry = registry_of(host(gpu(A)), Settings(resources=(long,)))
    (shown,) = render_devices(registry.current, TERMS)
    assert "resource" not in shown["attributes"]
    assert attributes(shown)["type"] == "gpu"


def test_gpus_of_a_board_whose_modules_are_known_show_their_half_and_pair() -> None:
    addresses = [f"0000:{number:02x}:00.0" for number in range(1, 10)]
    functions = [gpu(address, vfio=n, group=50 + n) for n, address in enumerate(addresses)]
    known = boards({address: n for n, address in enumerate(addresses[:8], 1)}, functions)
    shown = [attributes(each) for each in devices(host(*functions), boards=known).values()]
    assert [each["boardModule"] for each in shown[:8]] == list(range(1, 9))
    assert [each["boardHalf"] for each in shown[:8]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [each["boardPair"] for each in shown[:8]] == [0, 1, 0, 1, 2, 3, 2, 3], "as NVIDIA pairs H100s"
    assert not {"boardModule", "boardHalf", "boardPair"} & shown[8].keys()


def test_a_second_board_has_other_halves_and_pairs() -> None:
    functions = [gpu(f"0000:{n:02x}:00.0", vfio=n, group=50 + n, device=0x20B0) for n in (1, 2)]
    known = boards({functions[0].address: 8, functions[1].address: 9}, functions)
    first, second = (attributes(each) for each in devices(host(*functions), boards=known).values())
    assert (first["boardModule"], first["boardHalf"], first["boardPair"]) == (8, 1, 3)
    assert (second["boardModule"], second["boardHalf"], second["boardPair"]) == (9, 2, 4)


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0"), (1000, "1000"), (1024, "1Ki"), (1 << 37, "128Gi"), (3 << 19, "1536Ki")]
)
def test_a_quantity_is_in_the_words_in_which_kubernetes_stores_it(number: int, words: str) -> None:
    assert quantity(number) == words


# Taints


def test_an_unhealthy_device_is_tainted_with_its_reason_and_evicts_nobody_unless_it_is_asked_to() -> None:
    facts = host(gpu(A, vfio=0), gpu(B, vfio=1, group=51, link_speed="Unknown", link_width=63))
    registry = registry_of(facts)
    shown = {each["name"]: each for each in render_devices(registry.current, TERMS)}
    reason = registry.current.by_key[(PGPU, "1")].health.reason
    assert reason is Reason.OFF_THE_BUS
    taint = {"key": f"{DRIVER}/unhealthy", "value": "off-the-bus", "effect": "NoSchedule"}
    assert shown["pci-0000-02-00-0"]["taints"] == [taint]
    assert "taints" not in shown["pci-0000-01-00-0"]
    evicting = devices(facts, evict=frozenset({Reason.OFF_THE_BUS}))
    assert evicting["pci-0000-02-00-0"]["taints"] == [{**taint, "effect": "NoExecute"}]
    assert devices(facts, evict=frozenset({Reason.GONE}))["pci-0000-02-00-0"]["taints"] == [taint]


def test_a_device_that_the_device_plugin_api_has_given_away_is_tainted_at_once_although_it_is_healthy() -> None:
    registry = registry_of(host(gpu(A, vfio=0), gpu(B, vfio=1, group=51)))
    inventory = registry.allocate([(PGPU, "1")])
    assert inventory.is_healthy((PGPU, "1"))
    free, given = render_devices(inventory, TERMS)
    assert "taints" not in free
    assert given["taints"] == [{"key": f"{DRIVER}/device-plugin", "value": "allocated", "effect": "NoSchedule"}]


def test_where_taints_are_dropped_what_should_have_one_is_left_out() -> None:
    facts = host(gpu(A, vfio=0), gpu(B, vfio=1, group=51, link_speed="Unknown", link_width=63))
    assert list(devices(facts, taints=False)) == ["pci-0000-01-00-0"]


# Limits and schemas


def test_at_most_64_devices_are_in_a_slice_so_that_a_taint_more_deals_nothing_out_anew(tmp_path: Path) -> None:
    facts = facts_of(FakeNode.create(tmp_path / "node", machine(130)))
    rendered = render_devices(registry_of(facts).current, TERMS)
    parts = dealt_out(rendered)
    assert [len(part) for part in parts] == [64, 64, 2]
    assert [device for part in parts for device in part] == rendered
    assert dealt_out([]) == []
    for write in plan(POOL, parts, {}, 0):
        assert violations(write.object) == []


@pytest.mark.parametrize("version", ["1.34", "1.37"])
def test_the_slices_of_every_preset_are_valid_healthy_and_not(tmp_path: Path, version: str) -> None:
    for name in PRESETS:
        registry = registry_of(facts_of(FakeNode.create(tmp_path / name, name)))
        well = registry.current
        registry.allocate([key for key in well.by_key if well.is_healthy(key)])
        dead = registry.observe(replace(HostFacts(), functions={}))
        for inventory in (well, registry.current, dead):
            for write in plan(replace(POOL, node_uid="uid"), dealt_out(render_devices(inventory, TERMS)), {}, 0):
                kubernetes_validate.validate(write.object, version, strict=True)
                assert violations(write.object) == []
