"""The presets against public listings of the real machines: models, addresses, bridges and NUMA nodes.

What no listing says is not here: the revision of a bridge, the BARs of a GeForce, which port of a switch leads where.
"""

from __future__ import annotations

import pytest

from sandbox_plugin.fake.hardware import FunctionSpec, Model
from sandbox_plugin.fake.presets import PRESETS

MIB, GIB = 1 << 20, 1 << 30
NVIDIA = 0x10DE

Machine = dict[str, FunctionSpec]


def machine(preset: str) -> Machine:
    """Its functions, by address."""
    return {spec.address: spec for spec in PRESETS[preset].functions()}


def chain(machine: Machine, address: str) -> str:
    """The host bridge and the bridges above a function, without their domain 0000."""
    parent = machine[address].parent
    above = f"{chain(machine, parent)} " if parent in machine else ""
    return above + parent.removeprefix("0000:")


def identity(model: Model) -> str:
    return f"{model.vendor:04x}:{model.device:04x}"


def gpus(machine: Machine) -> dict[str, tuple[str, int, str]]:
    """NVIDIA's GPUs: address -> model, NUMA node and chain of bridges."""
    return {
        address: (identity(spec.model), spec.numa_node, chain(machine, address))
        for address, spec in sorted(machine.items())
        if spec.model.class_code >> 16 == 0x03 and spec.model.vendor == NVIDIA
    }


HOPPER = {0: (16 * MIB, "64p"), 2: (128 * GIB, "64p"), 4: (32 * MIB, "64p")}
BLACKWELL = HOPPER | {0: (64 * MIB, "64p")}
T4 = {0: (16 * MIB, "32"), 1: (256 * MIB, "64p"), 3: (32 * MIB, "64p")}
MODELS = [
    ("hgx-h100", "0000:1b:00.0", "10de:2330", 0x030200, (NVIDIA, 0x16C1), HOPPER, "32.0 GT/s PCIe x16"),
    ("hgx-h100", "0000:07:00.0", "10de:22a3", 0x068000, (NVIDIA, 0x1796), {0: (32 * MIB, "32")}, "16.0 GT/s PCIe x2"),
    ("gh200", "0009:01:00.0", "10de:2342", 0x030200, None, HOPPER, "32.0 GT/s PCIe x16"),
    ("rtx-pro-6000", "0000:16:00.0", "10de:2bb5", 0x030200, None, BLACKWELL, None),
    ("workstation", "0000:02:00.0", "10de:1eb8", 0x030200, (NVIDIA, 0x12A2), T4, None),
    ("workstation", "0000:01:00.0", "10de:21c4", 0x030000, None, None, None),
    ("workstation", "0000:01:00.1", "10de:1aeb", 0x040300, None, None, None),
    ("workstation", "0000:01:00.2", "10de:1aec", 0x0C0330, None, None, None),
    ("workstation", "0000:01:00.3", "10de:1aed", 0x0C8000, None, None, None),
    ("uneven", "0000:21:00.0", "10de:26b9", 0x030200, (NVIDIA, 0x1851), None, None),
]


@pytest.mark.parametrize(
    ("preset", "address", "model", "class_code", "subsystem", "bars", "link"), MODELS, ids=[row[2] for row in MODELS]
)
def test_a_model_is_the_real_one(
    preset: str,
    address: str,
    model: str,
    class_code: int,
    subsystem: tuple[int, int] | None,
    bars: dict[int, tuple[int, str]] | None,
    link: str | None,
) -> None:
    found = machine(preset)[address].model
    assert (identity(found), found.class_code, found.revision) == (model, class_code, 0xA1)
    assert subsystem in (None, found.subsystem)
    assert bars in (None, {b.index: (b.size, f"{64 if b.wide else 32}{'p' * b.prefetchable}") for b in found.bars})
    assert found.link is not None
    assert link in (None, f"{found.link.speed} x{found.link.width}")


DGX_BRANCHES = [
    (0, "15/16/17/19/1a/1b 3d/3e/3f/41/42/43 4c/4d/4e/50/51/52 5b/5c/5d/5f/60/61"),
    (1, "97/98/99/9b/9c/9d bd/be/bf/c1/c2/c3 cb/cc/cd/cf/d0/d1 d9/da/db/dd/de/df"),
]
"""By NUMA node, the buses of root port, switch, its ports, inner switch, its ports and GPU of a DGX H100."""


@pytest.mark.parametrize("preset", ["hgx-h100", "hgx-h100-group"])
def test_a_dgx_h100_has_each_gpu_behind_two_switches_beside_its_nic_and_four_nvswitches_on_a_hub(preset: str) -> None:
    dgx = machine(preset)
    expected = {}
    for numa_node, branches in DGX_BRANCHES:
        for branch in branches.split():
            root, switch, ports, inner, inner_ports, gpu = branch.split("/")
            above = f"pci0000:{root} {root}:01.0 {switch}:00.0"
            below = f"{above} {ports}:02.0 {inner}:00.0 {inner_ports}:00.0"
            expected[f"0000:{gpu}:00.0"] = ("10de:2330", numa_node, below)
            nic = f"0000:{int(ports, 16) + 1:02x}:00.0"
            assert (identity(dgx[nic].model), chain(dgx, nic)) == ("15b3:1021", f"{above} {ports}:00.0")
            assert {identity(dgx[f"0000:{place}"].model) for place in below.split()[2:]} == {"15b3:1979"}
    assert gpus(dgx) == expected
    switches = {address: chain(dgx, address) for address, spec in dgx.items() if spec.model.class_code == 0x068000}
    assert switches == {
        f"0000:{bus}:00.0": f"pci0000:00 00:1c.0 05:00.0 06:0{port}.0"
        for port, bus in enumerate(("07", "08", "09", "0a"))
    }


def test_a_server_with_rtx_pro_6000_has_two_on_each_switch() -> None:
    server = machine("rtx-pro-6000")
    expected = {}
    for numa_node, root, switch, ports, *pair in (
        (0, "10", "11", "12", "16", "17"),
        (0, "70", "71", "72", "75", "76"),
        (1, "80", "81", "82", "84", "85"),
        (1, "f0", "f1", "f2", "f4", "f5"),
    ):
        for port, gpu in enumerate(pair):
            above = f"pci0000:{root} {root}:01.1 {switch}:00.0 {ports}:0{port}.0"
            expected[f"0000:{gpu}:00.0"] = ("10de:2bb5", numa_node, above)
        assert identity(server[f"0000:{switch}:00.0"].model) == "1000:c030"
    assert gpus(server) == expected


def test_a_workstation_has_its_geforce_in_one_group_with_its_root_port() -> None:
    desktop = machine("workstation")
    assert gpus(desktop) == {
        "0000:01:00.0": ("10de:21c4", -1, "pci0000:00 00:01.0"),
        "0000:02:00.0": ("10de:1eb8", -1, "pci0000:00 00:1b.0"),
    }
    group = desktop["0000:01:00.0"].iommu_group
    members = {address for address, spec in desktop.items() if spec.iommu_group == group}
    assert members == {"0000:00:01.0", *(f"0000:01:00.{n}" for n in range(4))}


def test_a_grace_hopper_has_its_gpu_in_domain_0009() -> None:
    assert gpus(machine("gh200")) == {"0009:01:00.0": ("10de:2342", 0, "pci0009:00 0009:00:00.0")}


def test_the_invented_machine_has_three_gpus_on_one_socket_and_five_on_the_other_and_the_empty_one_none() -> None:
    nodes = [(model, numa_node) for model, numa_node, _ in gpus(machine("uneven")).values()]
    assert nodes == [("10de:26b9", 0)] * 3 + [("10de:26b9", 1)] * 5
    assert gpus(machine("empty")) == {}
