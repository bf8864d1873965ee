"""vGPUs by the vendor's own driver: virtual functions that stay on it, and are devices while they have a type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import StartDaemon
from daemon import Places
from facts import gpu, host
from kubelet import GrpcKubelet

from sandbox_plugin.config.file import parse_config
from sandbox_plugin.config.settings import Settings
from sandbox_plugin.fake.node import FakeNode, FakeNodeError
from sandbox_plugin.host.last_look import objection
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import scan_now
from sandbox_plugin.inventory.devices import Found, find_devices
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import HostFacts, PciFunction

CARD, OTHER = "0000:16:00.0", "0000:17:00.0"
TYPES = {1155: "NVIDIA L40S-24Q", 1156: "NVIDIA L40S-48Q"}
Q24, Q48 = "nvidia.com/NVIDIA_L40S-24Q", "nvidia.com/NVIDIA_L40S-48Q"
NAMES = ModelNames.load()


def with_card(root: Path, *cards: str) -> tuple[FakeNode, list[str]]:
    """A node whose first cards are on driver nvidia with two virtual functions each."""
    node = FakeNode.create(root, "rtx-pro-6000")
    parts = []
    for card in cards:
        node.bind(card, "nvidia")
        parts += node.add_vgpu_functions(card, TYPES, 2)
    return node, parts


def offered(found: Found) -> dict[str, str]:
    return {device.address: device.resource for device in found.devices if device.resource != "nvidia.com/pgpu"}


def found_in(node: FakeNode, before: Found | None = None, rules: Rules | None = None) -> Found:
    return find_devices(scan_now(HostPaths(node.root)), rules or Rules(names=NAMES), before)


def test_a_function_is_a_device_of_its_types_name_while_it_has_a_type_and_its_card_a_driver(tmp_path: Path) -> None:
    node, (one, two) = with_card(tmp_path / "node", CARD)
    found = found_in(node)
    assert offered(found) == {}
    assert found.unoffered[one] == "has no vGPU type (nvidia/current_vgpu_type is 0)"
    node.set_vgpu_type(one, 1155)
    found = found_in(node)
    assert offered(found) == {one: Q24}
    assert next(d.model for d in found.devices if d.address == one).startswith("NVIDIA L40S-24Q on ")
    (node.folder(two) / "nvidia/current_vgpu_type").unlink()
    assert "shows no vGPU type" in found_in(node).unoffered[two]
    (node.folder(CARD) / "driver").unlink()
    assert found_in(node).unoffered[one] == f"its physical function {CARD} is bound to no driver"


def test_names_are_remembered_when_a_card_is_full_and_else_come_from_the_config_file_or_the_number(
    tmp_path: Path,
) -> None:
    node, (one, two) = with_card(tmp_path / "node", CARD)
    before = found_in(node)
    node.set_vgpu_type(one, 1155)
    node.set_vgpu_type(two, 1155, full=True)
    assert offered(found_in(node, before)) == {one: Q24, two: Q24}
    model = node.function(CARD)
    fallback = NAMES.resource_name(*model.model_id)
    assert set(offered(found_in(node)).values()) == {f"nvidia.com/{fallback}_TYPE_1155"}
    given = Rules(Settings(type_names={(*model.model_id, 1155): "half"}), NAMES)
    assert set(offered(found_in(node, rules=given)).values()) == {"nvidia.com/half"}
    assert given.may_be_ours("nvidia.com/half")
    assert given.may_be_ours(f"nvidia.com/{fallback}_TYPE_1155")


def a_vgpu(address: str, card: str, number: str, **changes: Any) -> PciFunction:
    group = 70 + int(address[5:7], 16)
    vfio = int(address[5:7], 16)
    return gpu(address, vfio=vfio, group=group, driver="nvidia", physical_function=card, vgpu_type=number, **changes)


def test_a_number_means_what_its_own_card_says(tmp_path: Path) -> None:
    cards = [gpu(card, vfio=None, driver="nvidia", group=group) for card, group in ((CARD, 10), (OTHER, 11))]
    one = a_vgpu("0000:16:00.4", CARD, "7", vgpu_types=(("7", "GRID A"),))
    two = a_vgpu("0000:17:00.4", OTHER, "7", vgpu_types=(("7", "GRID B"),))
    found = find_devices(host(*cards, one, two), Rules())
    assert offered(found) == {one.address: "nvidia.com/GRID_A", two.address: "nvidia.com/GRID_B"}
    # another function's list gives the name, too
    full = replace(one, vgpu_types=())
    other = replace(one, address="0000:18:00.4", iommu_group=99, vgpu_type="0")
    assert offered(find_devices(host(*cards, full, other), Rules())) == {one.address: "nvidia.com/GRID_A"}


def ruled(facts: HostFacts, condition: str) -> set[str]:
    config = parse_config(f'[[resources]]\nname = "example.com/mine"\n{condition}\n', "file")
    found = find_devices(facts, Rules(Settings(resources=config.resources), NAMES))
    return {p.address for d in found.devices if d.resource == "example.com/mine" for p in d.placements}


def test_rules_tell_apart_what_has_one_device_id_and_take_mediated_devices_of_any_parent() -> None:
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    flex: dict[str, Any] = {"vendor": 0x8086, "device": 0x56C0}
    whole = gpu(CARD, vfio=1, group=1, **flex)
    part = gpu("0000:17:00.1", vfio=2, group=2, physical_function=OTHER, **flex)
    card = gpu("0000:18:00.0", vfio=None, driver="nvidia", group=4)
    vgpu = a_vgpu("0000:18:00.4", card.address, "7", vgpu_types=(("7", "GRID A"),))
    matrix = PciFunction(
        address=uuid, vendor=0, device=0, class_code=0, driver="vfio_ap_mdev", iommu_group=60,
        vfio=replace(whole.vfio, number=9), mdev_type="VFIO AP Passthrough Device",  # type: ignore[type-var]
    )  # fmt: skip
    facts = host(whole, part, card, vgpu, matrix)
    both = 'device = "56c0"\n'
    assert ruled(facts, both + "virtual = false") == {CARD}
    assert ruled(facts, both + "virtual = true") == {part.address}
    assert ruled(facts, "virtual = true") == {part.address, vgpu.address}
    assert ruled(facts, f'physical-function = ["{OTHER}"]') == {part.address}
    assert ruled(facts, 'type = ["GRID ?", "VFIO AP *"]') == {vgpu.address, uuid}
    assert ruled(facts, f'address = "{uuid.upper()}"') == {uuid}


def test_a_mediated_device_of_the_matrix_is_read_without_a_pci_function(tmp_path: Path) -> None:
    node = FakeNode.create(tmp_path / "node", "workstation")
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    folder = node.root / f"sys/devices/vfio_ap/matrix/{uuid}"
    folder.mkdir(parents=True)
    devices = node.root / "sys/bus/mdev/devices"
    devices.mkdir(parents=True)
    (devices / uuid).symlink_to(f"../../../devices/vfio_ap/matrix/{uuid}")
    function = scan_now(HostPaths(node.root)).functions[uuid]
    assert (function.vendor, function.numa_node, function.bridges) == (0, None, ())
    assert function.mdev_type == "unknown type"


def test_the_last_look_reads_the_type_and_the_cards_driver(tmp_path: Path) -> None:
    node, (one, _) = with_card(tmp_path / "node", CARD)
    node.set_vgpu_type(one, 1155)
    paths = HostPaths(node.root)
    facts = scan_now(paths)
    (device,) = [d for d in find_devices(facts, Rules(names=NAMES)).devices if d.address == one]

    def why() -> str | None:
        found = objection(paths, device, facts.functions)
        return None if found is None else found.why

    assert why() is None
    node.set_vgpu_type(one, 1156)
    assert why() == f"{one} has vGPU type 1156 now, and had 1155"
    node.set_vgpu_type(one, 0)
    assert why() == f"{one} has no vGPU type: every open fails"
    node.set_vgpu_type(one, 1155)
    (node.folder(CARD) / "driver").unlink()
    assert why() == f"its physical function {CARD} has no driver: every open fails"


def test_a_type_set_and_cleared_while_the_daemon_runs_is_followed_and_given_once(
    places: Places, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node, (one, two) = with_card(places.top / "node", CARD)
    running = daemon(node, "--health-interval=0.2")
    node.set_vgpu_type(one, 1155)
    kubelet.wait_for(lambda: len(kubelet.healthy(Q24)) == 1)
    (device_id,) = kubelet.healthy(Q24)
    kubelet.plugin(Q24).allocate([device_id])
    node.set_vgpu_type(one, 1156)
    # Its ID is a pod's by the old name: it stays listed there, and is not given by the new one.
    kubelet.wait_for(lambda: kubelet.unhealthy(Q24) == {device_id} and kubelet.unhealthy(Q48) == {device_id})
    running.wait_for("device changed", resource=Q24, reason=f"no-type: {one} is a vGPU of another type now")
    running.wait_for("device found", resource=Q48, reason="held-as-another: ")
    node.set_vgpu_type(one, 0)
    running.wait_for("device changed", resource=Q48, reason=f"no-type: {one} has no vGPU type")
    node.set_vgpu_type(two, 1156, full=True)
    kubelet.wait_for(lambda: len(kubelet.healthy(Q48)) == 1)
    assert device_id not in kubelet.healthy(Q48)


def test_a_fake_card_refuses_what_a_driver_refuses(tmp_path: Path) -> None:
    node, (one, _) = with_card(tmp_path / "node", CARD)
    for address, number, why in ((one, 5, "is no type of"), (CARD, 1155, "is no virtual function")):
        with pytest.raises(FakeNodeError, match=why):
            node.set_vgpu_type(address, number)
    node.set_attribute(one, "enable", "1")
    with pytest.raises(FakeNodeError, match="held by a VM"):
        node.set_vgpu_type(one, 1155)
    with pytest.raises(FakeNodeError, match="vendor's driver makes vGPUs"):
        node.add_vgpu_functions(OTHER, TYPES, 1)
