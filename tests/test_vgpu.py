"""vGPUs by the vendor's own driver: virtual functions that stay on it, and are devices while they have a type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import MakeNode, Serve, StartDaemon
from daemon import Places
from facts import gpu, host
from kubelet import GrpcKubelet
from mediated import Mediated
from names import PGPU
from pods import PodResources

from sandbox_plugin.config.file import parse_config
from sandbox_plugin.config.settings import Settings
from sandbox_plugin.fake.hardware import VgpuType
from sandbox_plugin.fake.node import FakeNode, FakeNodeError
from sandbox_plugin.host.last_look import objection
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import scan_now
from sandbox_plugin.inventory.advance import advance, allocate
from sandbox_plugin.inventory.devices import Found, find_devices
from sandbox_plugin.inventory.faults import assess
from sandbox_plugin.inventory.ledger import Allocation
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory, Signals
from sandbox_plugin.model import HostFacts, PciFunction, Reason

CARD, OTHER = "0000:16:00.0", "0000:17:00.0"
TYPES = (VgpuType(1155, "NVIDIA L40S-24Q", fits=2), VgpuType(1156, "NVIDIA L40S-48Q", fits=1))
Q24, Q48 = "nvidia.com/NVIDIA_L40S-24Q", "nvidia.com/NVIDIA_L40S-48Q"
VGPU_CARD, FIRST = "0000:21:00.0", "0000:21:00.4"
"""Of the preset `vgpu`: a card with room for more, and the virtual function of it that has a type."""
FULL, OF_FULL = "0000:22:00.0", "0000:22:00.4"
"""The other card: its number 1155 is another type."""
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


def vfio(node: FakeNode, address: str) -> int:
    dev = node.function(address).vfio
    assert dev is not None
    return dev.number


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
    node.set_vgpu_type(two, 1155)
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


def test_a_mediated_device_of_the_matrix_is_a_device_without_a_pci_function(tmp_path: Path) -> None:
    node = FakeNode.create(tmp_path / "node", "workstation")
    (node.root / "sys/devices/vfio_ap/matrix").mkdir(parents=True)
    uuid = Mediated(node, "vfio_ap/matrix").add(7, "vfio_ap-passthrough", "VFIO AP Passthrough Device", group=60)
    rule = parse_config('[[resources]]\nname = "ibm.com/ap"\ntype = "VFIO AP *"\n', "file").resources
    facts = scan_now(HostPaths(node.root))
    function = facts.functions[uuid]
    assert (function.vendor, function.numa_node, function.bridges) == (0, None, ())
    (device,) = [d for d in find_devices(facts, Rules(Settings(resources=rule), NAMES)).devices if d.mdev]
    assert (device.resource, device.id, device.address) == ("ibm.com/ap", "60", uuid)
    assert (device.model, device.numa_nodes) == ("VFIO AP Passthrough Device", ())
    assert assess(device, facts) is None
    assert objection(HostPaths(node.root), device, facts.functions) is None


def test_the_name_is_that_of_a_mediated_device_of_the_type(tmp_path: Path) -> None:
    node = FakeNode.create(tmp_path / "node", "vgpu")
    uuid = Mediated(node, VGPU_CARD).add(7, "nvidia-1155", "NVIDIA L40S-24Q", group=70)
    resources = offered(found_in(node))
    assert resources[uuid] == resources[FIRST] == Q24


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
    assert why() == f"its physical function {CARD} is bound to no driver: every open fails"


def test_a_type_set_and_cleared_while_the_daemon_runs_is_followed_and_given_once(
    places: Places, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node, (one, two) = with_card(places.top / "node", CARD)
    running = daemon(node, "--health-interval=0.2")
    running.wait_for("registered")  # so it has seen the names: a card lists no other type once it has a vGPU
    node.set_vgpu_type(one, 1155)
    kubelet.wait_for(lambda: len(kubelet.healthy(Q24)) == 1)
    (device_id,) = kubelet.healthy(Q24)
    kubelet.plugin(Q24).allocate([device_id])
    node.set_vgpu_type(one, 1156)
    # Its ID is a pod's by the old name: it stays listed there, and is not given by the new one.
    kubelet.wait_for(lambda: kubelet.unhealthy(Q24) == {device_id} and kubelet.unhealthy(Q48) == {device_id})
    running.wait_for("device changed", resource=Q24, reason=f"no-type: {one} is offered as another resource now")
    running.wait_for("device found", resource=Q48, reason="held-as-another: ")
    node.set_vgpu_type(one, 0)
    running.wait_for("device changed", resource=Q48, reason=f"no-type: {one} has no vGPU type")
    node.set_vgpu_type(two, 1156)
    kubelet.wait_for(lambda: len(kubelet.healthy(Q48)) == 1)
    assert device_id not in kubelet.healthy(Q48)


def test_a_card_that_does_not_answer_makes_its_vgpus_unhealthy_and_nothing_else_of_them(tmp_path: Path) -> None:
    node = FakeNode.create(tmp_path / "node", "vgpu")
    facts = scan_now(HostPaths(node.root))
    rest = {address: function for address, function in facts.functions.items() if address != VGPU_CARD}
    silent = replace(facts, functions=rest, unreadable={VGPU_CARD: "sysfs does not answer"})
    before = find_devices(facts, Rules(names=NAMES))
    found = find_devices(silent, Rules(names=NAMES), before)
    assert offered(found) == offered(before)
    (device,) = [d for d in found.devices if d.address == FIRST]
    fault = assess(device, silent)
    assert fault is not None
    assert str(fault.reason) == "unreadable"
    assert fault.detail == f"{VGPU_CARD}, the physical function of {FIRST}: sysfs does not answer"
    assert device is not next(d for d in before.devices if d.address == FIRST), "what has not changed is not judged"


def test_a_card_on_a_vfio_driver_makes_no_vgpus(tmp_path: Path) -> None:
    node = FakeNode.create(tmp_path / "node", "vgpu")
    (device,) = [d for d in found_in(node).devices if d.address == FIRST]
    functions = scan_now(HostPaths(node.root)).functions
    node.bind(VGPU_CARD)
    assert found_in(node).unoffered[FIRST] == f"its physical function {VGPU_CARD} is bound to vfio-pci"
    found = objection(HostPaths(node.root), device, functions)
    assert found is not None
    assert found.why == f"its physical function {VGPU_CARD} is bound to vfio-pci: every open fails"


def test_rules_tell_a_gpu_from_its_virtual_functions_on_a_tree(tmp_path: Path) -> None:
    node = FakeNode.create(tmp_path / "node", "vgpu")
    facts = scan_now(HostPaths(node.root))
    assert node.function(FIRST).model_id == node.function("0000:c1:00.0").model_id
    assert ruled(facts, 'device = "26b9"\nvirtual = false') == {"0000:c1:00.0"}
    assert ruled(facts, f'physical-function = "{FULL}"') == {OF_FULL, "0000:22:00.5"}


def test_a_use_of_a_vgpu_is_seen_by_its_enable(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, pods: PodResources
) -> None:
    pods.start(age=3600)
    node = fake_node("vgpu")
    running = daemon(node, "--health-interval=0.2")
    device_id = str(vfio(node, FIRST))
    kubelet.wait_for(lambda: device_id in kubelet.healthy(Q24))
    node.set_enable(FIRST, 1)
    with pytest.raises(grpc.RpcError, match=f"{FIRST} in its IOMMU group [0-9]+ is in use"):
        kubelet.plugin(Q24).allocate([device_id])
    running.wait_for("device changed", resource=Q24, reason="in-use-elsewhere: ")
    node.set_enable(FIRST, 0)
    kubelet.wait_for(lambda: device_id in kubelet.healthy(Q24))


def test_what_a_pod_holds_by_a_name_that_a_new_run_does_not_know_is_not_given_by_the_number(
    places: Places, kubelet: GrpcKubelet, daemon: StartDaemon, pods: PodResources
) -> None:
    node, (one, two) = with_card(places.top / "node", CARD)
    node.fill_with_vgpus(CARD, 1155)
    held, free = str(vfio(node, one)), str(vfio(node, two))
    pods.hold("vm", Q24, held)
    pods.start(age=3600)
    running = daemon(node, "--health-interval=0.2")
    numbered = f"nvidia.com/{NAMES.resource_name(*node.function(CARD).model_id)}_TYPE_1155"
    kubelet.wait_for(lambda: kubelet.healthy(numbered) == {free} and kubelet.unhealthy(numbered) == {held})
    running.wait_for("device found", resource=numbered, reason="held-as-another: pod default/vm")
    node.set_vgpu_type(two, 0)  # and the card lists the name again
    kubelet.wait_for(lambda: kubelet.healthy(Q24) == {held} and not kubelet.healthy(numbered))
    running.wait_for("device changed", resource=numbered, reason=f"no-type: {one} is offered as another resource now")


def test_a_name_that_is_learnt_late_leaves_a_vgpu_with_the_pod_that_has_it() -> None:
    rules, signals = Rules(names=NAMES), Signals()
    card, one = gpu(CARD, vfio=None, driver="nvidia", group=10), a_vgpu("0000:16:00.4", CARD, "1155")
    inventory, _ = advance(Inventory(), host(card, one), signals, 100.0, rules)
    (device,) = inventory.by_key.values()
    assert device.health.healthy
    inventory = allocate(inventory, Allocation(devices=[device], looked_at=100.0), signals, 100.0)
    other = a_vgpu("0000:16:00.5", CARD, "0", vgpu_types=(("1155", "NVIDIA L40S-24Q"),))
    inventory, _ = advance(inventory, host(card, one, other), signals, 101.0, rules)
    reasons = {key: listed.health.reason for key, listed in inventory.by_key.items()}
    assert reasons == {device.key: Reason.NO_TYPE, (Q24, device.id): Reason.HELD_AS_ANOTHER}


def test_graces_memory_comes_with_its_gpu_from_the_daemon(serve: Serve, kubelet: GrpcKubelet) -> None:
    serve("gh200", "--consumer=kubevirt")
    (container,) = kubelet.plugin(PGPU).allocate(["0"]).container_responses
    assert "/dev/egm0" in [device.host_path for device in container.devices]


# The fake card


def creatable(node: FakeNode, address: str) -> set[str]:
    lines = (node.folder(address) / "nvidia/creatable_vgpu_types").read_text().splitlines()
    assert lines[0] == "ID    : vGPU Name"
    return {line.partition(":")[2].strip() for line in lines[1:]}


def test_a_fake_card_lists_what_still_fits_and_fills_up(tmp_path: Path) -> None:
    node = FakeNode.create(tmp_path / "node", "vgpu")
    assert creatable(node, FIRST) == creatable(node, "0000:21:00.7") == {"NVIDIA L40S-24Q"}
    assert creatable(node, OF_FULL) == set()
    assert node.fill_with_vgpus(VGPU_CARD, 1155) == ["0000:21:00.5"]
    assert creatable(node, FIRST) == set()
    with pytest.raises(FakeNodeError, match="has no room for a vGPU of type 1155"):
        node.fill_with_vgpus(VGPU_CARD, 1155)
    assert node.fill_with_vgpus(VGPU_CARD, 0) == [FIRST, "0000:21:00.5"]
    assert creatable(node, FIRST) == {"NVIDIA L40S-12Q", "NVIDIA L40S-24Q", "NVIDIA L40S-48Q"}
    with pytest.raises(FakeNodeError, match="has no vGPU"):
        node.fill_with_vgpus(VGPU_CARD, 0)


def test_virtual_functions_come_and_go_with_their_fake_card(tmp_path: Path) -> None:
    node = FakeNode.create(tmp_path / "node", "vgpu")
    node.set_enable(FIRST, 1)
    node.unbind("0000:21:00.5")
    with pytest.raises(FakeNodeError, match=f"is a virtual function: it goes with {VGPU_CARD}"):
        node.remove(FIRST)
    node.remove(VGPU_CARD)
    assert [f.address for f in node.functions() if f.physical_function == VGPU_CARD] == []
    assert {f.address for f in node.functions() if f.vfio} == {OF_FULL, "0000:22:00.5", "0000:c1:00.0"}
    node.add(VGPU_CARD)
    assert node.function(VGPU_CARD).driver == "nvidia"
    assert node.add_vgpu_functions(VGPU_CARD, TYPES, 5)[-1] == "0000:21:01.0"
    with pytest.raises(FakeNodeError, match="has virtual functions already"):
        node.add_vgpu_functions(VGPU_CARD, TYPES, 1)


def test_a_virtual_function_of_a_fake_card_goes_to_the_driver_that_is_wanted_and_back(tmp_path: Path) -> None:
    node = FakeNode.create(tmp_path / "node", "vgpu")
    for override, driver in (("vfio-pci", "vfio-pci"), ("", "nvidia")):
        node.unbind(FIRST)
        node.override(FIRST, override)
        node.probe(FIRST)
        assert node.function(FIRST).driver == driver
    assert node.function(FIRST).is_vendors_vgpu


def test_a_fake_vgpu_opens_only_with_a_type_and_a_card_on_its_driver(tmp_path: Path) -> None:
    node = FakeNode.create(tmp_path / "node", "vgpu")
    with pytest.raises(FakeNodeError, match=r"has no vGPU type \(ENODEV\)"):
        node.set_enable("0000:21:00.5", 1)
    node.unbind(VGPU_CARD)
    with pytest.raises(FakeNodeError, match=r"is not bound to nvidia \(ENODEV\)"):
        node.set_enable(FIRST, 1)
    node.unbind(FIRST)
    node.bind(FIRST)  # a whole virtual function in a VM needs no card
    node.set_enable(FIRST, 1)


def test_a_fake_card_refuses_what_a_driver_refuses(tmp_path: Path) -> None:
    node, (one, _) = with_card(tmp_path / "node", CARD)
    for address, number, why in ((one, 5, "has no room for a vGPU of type 5"), (CARD, 1155, "is no virtual function")):
        with pytest.raises(FakeNodeError, match=why):
            node.set_vgpu_type(address, number)
    node.set_vgpu_type(one, 1155)
    node.set_enable(one, 1)
    with pytest.raises(FakeNodeError, match="held by a VM"):
        node.set_vgpu_type(one, 0)
    with pytest.raises(FakeNodeError, match="vendor's driver makes vGPUs"):
        node.add_vgpu_functions(OTHER, TYPES, 1)
