"""What labels say of a node: pure, held against a strict reader of NFD's format."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from conftest import MakeNode
from facts import gpu, host
from names import FIRST_GPU, GEFORCE
from nfd import Features, parse

from sandbox_plugin.config.settings import ResourceRule, Settings
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import PRESETS
from sandbox_plugin.host.confidential import Confidential, read_confidential
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import scan_now
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.products import family, product
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import Bar, HostFacts, PciFunction, VfioDev
from sandbox_plugin.outputs.labels import Seen, feature_file, labels, seen
from sandbox_plugin.registry import Registry

NAMES = ModelNames.load()
EXPIRES = datetime(2026, 11, 30, 12, 0, 0, tzinfo=UTC)
NONE = Confidential()


def registry_of(facts: HostFacts, settings: Settings | None = None) -> Registry:
    registry = Registry(Rules(settings or Settings(), NAMES), requires_cdi=False)
    registry.observe(facts)
    return registry


def read(here: Seen, confidential: Confidential = NONE, *, gpu_features: bool = False) -> Features:
    """What NFD makes of these labels."""
    made = labels(here, confidential, NAMES, gpu_features=gpu_features)
    features = parse(feature_file(made, EXPIRES).encode())
    assert features.labels == made
    return features


def of_facts(facts: HostFacts, settings: Settings | None = None, **how: Any) -> Features:
    return read(seen(registry_of(facts, settings).current, Seen()), **how)


def of_node(node: FakeNode, **how: Any) -> Features:
    return of_facts(scan_now(HostPaths(node.root)), **how)


def gfd(features: Features) -> dict[str, str]:
    prefix = "nvidia.com/gpu."
    return {n.removeprefix(prefix): value for n, value in features.labels.items() if n.startswith(prefix)}


# What they say


def test_a_node_with_eight_gpus_of_one_model_says_what_they_are_and_where(fake_node: MakeNode) -> None:
    features = of_node(fake_node("hgx-h100"))
    about = {"count": "8", "product": "NVIDIA-H100-80GB-HBM3", "family": "hopper", "bar-memory": "131072"}
    assert features.own == {
        **{f"gpu.{name}": value for name, value in about.items()},
        **{f"gpu.10de-2330.{name}": value for name, value in about.items()},
        "gpu.driver.vfio-pci.count": "8",
        "gpu.numa-0.count": "4",
        "gpu.numa-1.count": "4",
        "nvswitch.count": "4",
        "vfio.cdevs": "true",
        "iommu-groups.viable": "true",
        "confidential.snp": "false",
        "confidential.tdx": "false",
    }
    assert features.labels.keys() == {f"sandbox-plugin.feature.node.kubernetes.io/{name}" for name in features.own}
    assert features.expires == EXPIRES


def test_two_models_are_told_apart_and_none_of_them_speaks_for_the_node(fake_node: MakeNode) -> None:
    own = of_node(fake_node("workstation")).own
    assert own["gpu.count"] == "2"
    assert {name for name in own if re.match(r"gpu\.[a-z-]+$", name)} == {"gpu.count"}
    assert own["gpu.10de-1eb8.product"] == "Tesla-T4"
    assert own["gpu.10de-1eb8.family"] == own["gpu.10de-21c4.family"] == "turing"
    assert own["gpu.10de-21c4.product"] == "TU116-GeForce-GTX-1660-SUPER"
    assert own["vfio.cdevs"] == "false"
    assert not [name for name in own if "numa" in name], "a desktop has none"
    assert not [name for name in own if "memory" in name], "their BARs are windows of 256 MiB"


def test_grace_is_named_by_its_own_driver_and_domain(fake_node: MakeNode) -> None:
    own = of_node(fake_node("gh200")).own
    assert own["gpu.driver.nvgrace_gpu_vfio_pci.count"] == "1"
    assert own["gpu.product"] == "NVIDIA-GH200-120GB"


def test_parts_of_gpus_are_no_gpus(fake_node: MakeNode) -> None:
    own = of_node(fake_node("vgpu"), gpu_features=True).own
    assert own["gpu.count"] == "1", "of the three L40S two carry vGPUs"


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"empty"}))
def test_nfd_takes_the_labels_of_every_preset(fake_node: MakeNode, preset: str) -> None:
    for confidential in (NONE, Confidential(snp=True), Confidential(tdx=True)):
        features = of_node(fake_node(preset), confidential=confidential, gpu_features=True)
        assert (features.own["confidential.snp"] == "true") is confidential.snp
        assert (features.own["confidential.tdx"] == "true") is confidential.tdx


def test_gpus_of_others_are_counted_and_get_no_labels_of_nvidias() -> None:
    amd = gpu("0000:01:00.0", vfio=1, vendor=0x1002, device=0x74A1, class_code=0x038000)
    rule = ResourceRule(label="resources[0]", name="amd.com/gpu", vendors=frozenset({0x1002}))
    features = of_facts(host(amd, kernel_has_cdevs=True), Settings(resources=(rule,)), gpu_features=True)
    assert features.own["gpu.1002-74a1.count"] == "1"
    assert features.own["gpu.product"] == "Aqua-Vanjaram-Instinct-MI300X"
    assert "gpu.family" not in features.own
    assert gfd(features) == {}


def test_a_model_that_nobody_knows_is_called_by_its_ids() -> None:
    features = of_facts(host(gpu("0000:01:00.0", device=0x2FFF), kernel_has_cdevs=True), gpu_features=True)
    assert features.own["gpu.product"] == gfd(features)["product"] == "unknown-model-10de-2fff"
    assert "gpu.family" not in features.own


def test_switches_alone_are_no_gpus() -> None:
    switch = gpu("0000:07:00.0", device=0x22A3, class_code=0x068000)
    features = of_facts(host(switch, kernel_has_cdevs=True), gpu_features=True)
    assert (features.own["gpu.count"], features.own["nvswitch.count"]) == ("0", "1")
    assert gfd(features) == {}


def test_a_group_that_the_kernel_gives_to_nobody_is_said(fake_node: MakeNode) -> None:
    node = fake_node("workstation")
    node.bind("0000:01:00.1", "snd_hda_intel")
    assert of_node(node).own["iommu-groups.viable"] == "false"


@pytest.mark.parametrize(
    ("module", "kind"), [("kvm_amd/parameters/sev_snp", "snp"), ("kvm_intel/parameters/tdx", "tdx")]
)
def test_confidential_guests_are_what_kvm_says_of_itself(fake_node: MakeNode, module: str, kind: str) -> None:
    node = fake_node("empty")
    assert read_confidential(HostPaths(node.root)) == NONE
    for text, is_on in (("N", False), ("Y", True)):
        parameter = node.root / "sys/module" / module
        parameter.parent.mkdir(parents=True, exist_ok=True)
        parameter.write_text(f"{text}\n")
        assert read_confidential(HostPaths(node.root)) == NONE._replace(**{kind: is_on})


# Who is counted


def test_a_gpu_that_is_ill_is_counted_and_one_that_has_left_is_not(fake_node: MakeNode) -> None:
    node = fake_node("hgx-h100")
    registry = registry_of(scan_now(HostPaths(node.root)))
    here = seen(registry.current, Seen())
    node.sicken(FIRST_GPU)
    registry.observe(scan_now(HostPaths(node.root)))
    assert not all(device.health.healthy for device in registry.current.resources["nvidia.com/pgpu"])
    here = seen(registry.current, here)
    assert read(here).own["gpu.count"] == "8"
    node.unbind(FIRST_GPU)
    registry.observe(scan_now(HostPaths(node.root)))
    assert len(registry.current.resources["nvidia.com/pgpu"]) == 8, "a pod may still have it"
    here = seen(registry.current, here)
    assert read(here).own["gpu.count"] == "7"
    assert FIRST_GPU not in here.functions


def test_a_gpu_that_does_not_answer_keeps_what_was_read_of_it() -> None:
    functions = [gpu(f"0000:0{n}:00.0", vfio=n, group=50 + n) for n in (1, 2)]
    registry = registry_of(host(*functions, kernel_has_cdevs=True))
    here = seen(registry.current, Seen())
    before = read(here)
    hangs = host(*functions, kernel_has_cdevs=True, unreadable={"0000:01:00.0": "it does not answer"})
    registry.observe(replace(hangs, functions={"0000:02:00.0": functions[1]}))
    here = seen(registry.current, here)
    assert registry.current.resources["nvidia.com/pgpu"][0].health.reason == "unreadable"
    assert read(here) == before
    assert read(seen(registry.current, Seen())).own["gpu.count"] == "1", "of one that was never read nothing is known"


def test_without_a_device_there_is_no_label(fake_node: MakeNode) -> None:
    facts = scan_now(HostPaths(fake_node("empty").root))
    assert labels(seen(registry_of(facts).current, Seen()), NONE, NAMES, gpu_features=True) == {}


def test_a_group_with_two_gpus_is_two_gpus(fake_node: MakeNode) -> None:
    """GPU Feature Discovery counts GPUs, however many devices they are."""
    functions = [gpu(f"0000:0{n}:00.0", vfio=n, group=50, cdev=False) for n in (1, 2)]
    registry = registry_of(host(*functions))
    assert len(registry.current.by_key) == 1
    assert read(seen(registry.current, Seen())).own["gpu.count"] == "2"


# As GPU Feature Discovery would


def test_on_request_there_are_the_labels_of_gpu_feature_discovery(fake_node: MakeNode) -> None:
    node = fake_node("hgx-h100")
    assert gfd(of_node(node)) == {}
    features = of_node(node, gpu_features=True)
    assert gfd(features) == {
        "product": "NVIDIA-H100-80GB-HBM3",
        "family": "hopper",
        "count": "8",
        "memory": "81920",  # by its name; the BAR has 128 GiB
    }
    assert features.own == of_node(node).own


def test_where_there_are_two_models_these_labels_are_about_the_one_of_which_there_are_most() -> None:
    h200 = [gpu(f"0000:0{n}:00.0", vfio=n, group=n, device=0x2335) for n in (1, 2)]
    functions = [gpu("0000:09:00.0", vfio=9, group=9), *h200]
    assert gfd(of_facts(host(*functions, kernel_has_cdevs=True), gpu_features=True)) == {
        "product": "NVIDIA-H200",
        "family": "hopper",
        "count": "2",
    }


def _bar(size: int, **changes: Any) -> Bar:
    return replace(Bar(index=2, size=size, prefetchable=True, wide=True, io=False), **changes)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("device", "bars", "own", "gpu_features"),
    [
        (0x2330, [_bar(128 * GIB)], "131072", "81920"),
        (0x2335, [_bar(256 * GIB)], "262144", "262144"),
        (0x2330, [_bar(256 << 20)], None, "81920"),
        (0x2335, [_bar(256 << 20)], None, None),
        (0x2335, [_bar(64 * GIB, io=True), _bar(64 * GIB, index=6)], None, None),
        (0x2335, [], None, None),
    ],
)
def test_memory_is_that_of_the_bar_and_no_more_than_the_name_says(
    device: int, bars: list[Bar], own: str | None, gpu_features: str | None
) -> None:
    features = of_facts(
        host(gpu("0000:01:00.0", device=device, bars=tuple(bars)), kernel_has_cdevs=True), gpu_features=True
    )
    assert features.own.get("gpu.bar-memory") == own
    assert gfd(features).get("memory") == gpu_features


@pytest.mark.parametrize(
    ("device", "subsystem", "name"),
    [
        (0x2342, 0x16EB, "NVIDIA-GH200-120GB"),
        (0x2342, 0x1809, "NVIDIA-GH200-480GB"),
        (0x25B6, 0x157E, "NVIDIA-A2"),
        (0x25B6, None, "GA107GL-A2-A16"),
        (0x2BB5, 0x204E, "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition"),
    ],
)
def test_products_have_the_drivers_names_where_they_are_known_else_those_of_pci_ids(
    device: int, subsystem: int | None, name: str
) -> None:
    assert product(gpu("0000:01:00.0", device=device, subsystem_device=subsystem), NAMES) == name


def test_every_name_in_the_table_of_models_makes_a_label_and_servers_gpus_a_family() -> None:
    known: dict[str, set[str | None]] = {}
    for vendor, device in NAMES.table:
        function = PciFunction(address="0000:01:00.0", vendor=vendor, device=device, class_code=0x030200)
        assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", product(function, NAMES))
        known.setdefault(NAMES.table[vendor, device][:5], set()).add(family(function, NAMES))
    for chip, expected in (
        ("GP104", "pascal"),
        ("GV100", "volta"),
        ("TU104", "turing"),
        ("GA100", "ampere"),
        ("AD102", "ada-lovelace"),
        ("GH100", "hopper"),
        ("GB202", "blackwell"),
    ):
        assert known[chip] == {expected}, chip


def test_a_driver_whose_name_no_label_can_have_is_left_out() -> None:
    odd = gpu("0000:01:00.0", driver="vfio pci/odd", vfio=None)
    odd = replace(odd, vfio=VfioDev(number=1, cdev="511:1"))
    own = of_facts(host(odd, kernel_has_cdevs=True)).own
    assert own["gpu.count"] == "1"
    assert not [name for name in own if "driver" in name]


def test_of_the_desktops_card_with_four_functions_one_is_a_gpu(fake_node: MakeNode) -> None:
    node = fake_node("workstation")
    own = of_node(node).own
    assert own["gpu.10de-21c4.count"] == "1"
    node.unbind(GEFORCE)
    assert of_node(node).own["gpu.count"] == "1"
