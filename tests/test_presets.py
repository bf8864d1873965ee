"""The presets against public listings of the real machines: models, addresses, bridges and NUMA nodes in sysfs.

What no listing says is not here: the revision of a bridge, the BARs of a GeForce, which port of a switch leads where.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from daemon import places as make_places

from sandbox_plugin.fake.presets import PRESETS

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, kw_only=True)
class Function:
    """A PCI function as sysfs shows it."""

    folder: Path

    def text(self, name: str) -> str:
        return (self.folder / name).read_text().strip()

    @property
    def model(self) -> str:
        return f"{self.text('vendor')[2:]}:{self.text('device')[2:]}"

    @property
    def subsystem(self) -> str:
        return f"{self.text('subsystem_vendor')[2:]}:{self.text('subsystem_device')[2:]}"

    @property
    def link(self) -> str:
        return f"{self.text('current_link_speed').removesuffix(' PCIe')} x{self.text('current_link_width')}"

    @property
    def bars(self) -> dict[int, tuple[int, str]]:
        """Index -> size, and `64p` for 64 bits wide and prefetchable; no virtual functions', no ROM."""
        found = {}
        for index, line in enumerate(self.text("resource").splitlines()[:6]):
            start, end, flags = (int(word, 16) for word in line.split())
            if flags:
                kind = f"{64 if flags & 0x100000 else 32}{'p' if flags & 0x2000 else ''}"
                found[index] = (end - start + 1, kind)
        return found

    @property
    def chain(self) -> str:
        """The host bridge and the bridges below it, without their domain."""
        return " ".join(part.removeprefix("0000:") for part in self.folder.parts[self._first_part : -1])

    @property
    def _first_part(self) -> int:
        return next(i for i, part in enumerate(self.folder.parts) if part.startswith("pci"))


Tree = dict[str, Function]


@pytest.fixture(scope="module")
def trees() -> Iterator[dict[str, Tree]]:
    """Every preset's functions by address."""
    with make_places() as places:
        yield {
            name: {
                link.name: Function(folder=link.resolve())
                for link in (places.node(name).root / "sys/bus/pci/devices").iterdir()
            }
            for name in PRESETS
        }


# Models


HOPPER_BARS = {0: (16 * MIB, "64p"), 2: (128 * GIB, "64p"), 4: (32 * MIB, "64p")}
MODELS = [
    ("hgx-h100", "0000:1b:00.0", "10de:2330", "0x030200", "10de:16c1", HOPPER_BARS, "32.0 GT/s x16"),
    ("hgx-h100", "0000:07:00.0", "10de:22a3", "0x068000", "10de:1796", {0: (32 * MIB, "32")}, "16.0 GT/s x2"),
    ("gh200", "0009:01:00.0", "10de:2342", "0x030200", None, HOPPER_BARS, "32.0 GT/s x16"),
    (
        "rtx-pro-6000",
        "0000:16:00.0",
        "10de:2bb5",
        "0x030200",
        None,
        {0: (64 * MIB, "64p"), 2: (128 * GIB, "64p"), 4: (32 * MIB, "64p")},
        None,
    ),
    (
        "workstation",
        "0000:02:00.0",
        "10de:1eb8",
        "0x030200",
        "10de:12a2",
        {0: (16 * MIB, "32"), 1: (256 * MIB, "64p"), 3: (32 * MIB, "64p")},
        None,
    ),
    ("workstation", "0000:01:00.0", "10de:21c4", "0x030000", None, None, None),
    ("workstation", "0000:01:00.1", "10de:1aeb", "0x040300", None, None, None),
    ("workstation", "0000:01:00.2", "10de:1aec", "0x0c0330", None, None, None),
    ("workstation", "0000:01:00.3", "10de:1aed", "0x0c8000", None, None, None),
    ("uneven", "0000:21:00.0", "10de:26b9", "0x030200", "10de:1851", None, None),
]


@pytest.mark.parametrize(
    ("preset", "address", "model", "class_code", "subsystem", "bars", "link"), MODELS, ids=[row[2] for row in MODELS]
)
def test_a_model_is_the_real_one(
    trees: dict[str, Tree],
    preset: str,
    address: str,
    model: str,
    class_code: str,
    subsystem: str | None,
    bars: dict[int, tuple[int, str]] | None,
    link: str | None,
) -> None:
    function = trees[preset][address]
    assert (function.model, function.text("class"), function.text("revision")) == (model, class_code, "0xa1")
    assert subsystem in (None, function.subsystem)
    assert bars in (None, function.bars)
    assert link in (None, function.link)


# Machines


def gpus(tree: Tree) -> dict[str, tuple[str, str, str]]:
    """NVIDIA's GPUs: address -> model, NUMA node and chain of bridges."""
    return {
        address: (function.model, function.text("numa_node"), function.chain)
        for address, function in sorted(tree.items())
        if function.text("class").startswith("0x03") and function.text("vendor") == "0x10de"
    }


DGX_BRANCHES = {
    "0": "15/16/17/19/1a/1b 3d/3e/3f/41/42/43 4c/4d/4e/50/51/52 5b/5c/5d/5f/60/61",
    "1": "97/98/99/9b/9c/9d bd/be/bf/c1/c2/c3 cb/cc/cd/cf/d0/d1 d9/da/db/dd/de/df",
}
"""By NUMA node, the buses of root port, switch, its ports, inner switch, its ports and GPU of a DGX H100."""


@pytest.mark.parametrize("preset", ["hgx-h100", "hgx-h100-group"])
def test_a_dgx_h100_has_each_gpu_behind_two_switches_beside_its_nic(trees: dict[str, Tree], preset: str) -> None:
    tree = trees[preset]
    expected, switches = {}, set()
    for numa_node, branches in DGX_BRANCHES.items():
        for branch in branches.split():
            root, switch, ports, inner, inner_ports, gpu = branch.split("/")
            above = f"pci0000:{root} {root}:01.0 {switch}:00.0"
            chain = f"{above} {ports}:02.0 {inner}:00.0 {inner_ports}:00.0"
            expected[f"0000:{gpu}:00.0"] = ("10de:2330", numa_node, chain)
            nic = tree[f"0000:{int(ports, 16) + 1:02x}:00.0"]
            assert (nic.model, nic.text("class"), nic.chain) == ("15b3:1021", "0x020700", f"{above} {ports}:00.0")
            switches |= {f"{switch}:00.0", f"{ports}:00.0", f"{ports}:02.0", f"{inner}:00.0", f"{inner_ports}:00.0"}
    assert gpus(tree) == expected
    assert {tree[f"0000:{place}"].model for place in switches} == {"15b3:1979"}
    cpus = {address: tree[address].text("local_cpulist") for address in ("0000:1b:00.0", "0000:9d:00.0")}
    assert cpus == {"0000:1b:00.0": "0-55,112-167", "0000:9d:00.0": "56-111,168-223"}


@pytest.mark.parametrize("preset", ["hgx-h100", "hgx-h100-group"])
def test_a_dgx_h100_has_its_four_nvswitches_on_a_hub(trees: dict[str, Tree], preset: str) -> None:
    tree = trees[preset]
    found = {address: function for address, function in tree.items() if function.text("class") == "0x068000"}
    assert sorted(found) == [f"0000:{bus}:00.0" for bus in ("07", "08", "09", "0a")]
    assert {function.model for function in found.values()} == {"10de:22a3"}
    for port, (_, function) in enumerate(sorted(found.items())):
        assert function.chain.split()[-2:] == ["05:00.0", f"06:0{port}.0"]
    hub = [tree[f"0000:{place}"] for place in ("05:00.0", "06:00.0", "06:01.0", "06:02.0", "06:03.0", "05:00.1")]
    assert {function.model for function in hub} == {"11f8:4128"}
    assert [function.text("class") for function in hub] == ["0x060400"] * 5 + ["0x058000"]


def test_a_server_with_rtx_pro_6000_has_two_on_each_switch(trees: dict[str, Tree]) -> None:
    tree = trees["rtx-pro-6000"]
    expected = {"10": ("0", "16", "17"), "70": ("0", "75", "76"), "80": ("1", "84", "85"), "f0": ("1", "f4", "f5")}
    found = gpus(tree)
    assert list(found) == [f"0000:{gpu}:00.0" for _, *pair in expected.values() for gpu in pair]
    for root, (numa_node, *pair) in expected.items():
        chains = [found[f"0000:{gpu}:00.0"][2].split() for gpu in pair]
        assert {found[f"0000:{gpu}:00.0"][:2] for gpu in pair} == {("10de:2bb5", numa_node)}
        assert chains[0][:3] == chains[1][:3]
        assert chains[0][:2] == [f"pci0000:{root}", f"{root}:01.1"]
        assert {tree[f"0000:{place}"].model for chain in chains for place in chain[2:]} == {"1000:c030"}


def test_a_workstation_has_its_geforce_on_the_first_root_port(trees: dict[str, Tree]) -> None:
    tree = trees["workstation"]
    assert gpus(tree) == {
        "0000:01:00.0": ("10de:21c4", "-1", "pci0000:00 00:01.0"),
        "0000:02:00.0": ("10de:1eb8", "-1", "pci0000:00 00:1b.0"),
    }
    assert tree["0000:00:01.0"].model == "8086:1901"
    group = {path.name for path in (tree["0000:01:00.0"].folder / "iommu_group/devices").iterdir()}
    assert group == {"0000:00:01.0", *(f"0000:01:00.{n}" for n in range(4))}


def test_a_grace_hopper_has_its_gpu_in_domain_0009(trees: dict[str, Tree]) -> None:
    tree = trees["gh200"]
    assert gpus(tree) == {"0009:01:00.0": ("10de:2342", "0", "pci0009:00 0009:00:00.0")}
    assert tree["0009:00:00.0"].model == "10de:22b1"


def test_the_invented_machine_has_three_gpus_on_one_socket_and_five_on_the_other(trees: dict[str, Tree]) -> None:
    nodes = [(model, numa_node) for model, numa_node, _ in gpus(trees["uneven"]).values()]
    assert nodes == [("10de:26b9", "0")] * 3 + [("10de:26b9", "1")] * 5


def test_the_empty_machine_has_no_gpu_that_could_be_given(trees: dict[str, Tree]) -> None:
    assert gpus(trees["empty"]) == {}
