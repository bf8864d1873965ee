"""The fake node: its trees against what a real kernel was seen to show, its verbs against what a kernel does."""

from __future__ import annotations

import argparse
import errno
import os
import re
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from names import T4

from sandbox_plugin.cli import fake_node as command
from sandbox_plugin.config.settings import UsageError
from sandbox_plugin.fake.attributes import cpu_mask
from sandbox_plugin.fake.hardware import At, FunctionSpec, Kernel, Link, Model, NumaNode, Preset, RootBus, Sriov
from sandbox_plugin.fake.models import GTX_1660_SUPER, H100_SXM5
from sandbox_plugin.fake.node import FakeNode, FakeNodeError
from sandbox_plugin.fake.presets import PRESETS, WITH_CDEVS
from sandbox_plugin.model import Bar

NVIDIA = 0x10DE
GPU = "0000:01:00.0"
AUDIO = "0000:01:00.1"
HGX_GPUS = [f"0000:{bus}:00.0" for bus in ("1b", "43", "52", "61", "9d", "c3", "d1", "df")]
HGX_NVSWITCHES = [f"0000:{bus}:00.0" for bus in ("07", "08", "09", "0a")]

MEMORY = "/dev/shm"
"""A file system on which thousands of files come and go quickly, on most machines."""

Entry = tuple[str, str | bytes]
Snapshot = dict[str, Entry]


@pytest.fixture
def workstation(tmp_path: Path) -> FakeNode:
    return FakeNode.create(tmp_path / "node", "workstation")


@pytest.fixture
def gh200(tmp_path: Path) -> FakeNode:
    return FakeNode.create(tmp_path / "node", "gh200")


@pytest.fixture(scope="module")
def hgx(tmp_path_factory: pytest.TempPathFactory) -> FakeNode:
    """For tests that change nothing."""
    return FakeNode.create(tmp_path_factory.mktemp("hgx"), "hgx-h100")


@pytest.fixture(scope="module", params=list(PRESETS))
def preset_tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each preset's tree, for tests that change nothing."""
    return FakeNode.create(tmp_path_factory.mktemp("preset"), str(request.param)).root


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the machine below on which the kernel was looked at, for tests that change nothing.

    Made with the umask that gives folders the mode they have in sysfs; files have theirs whatever it is.
    """
    before = os.umask(0o022)
    try:
        return FakeNode.create(tmp_path_factory.mktemp("measured"), MEASURED).root
    finally:
        os.umask(before)


def snapshot(root: Path) -> Snapshot:
    """Everything in a tree but what a kernel would not show: path -> its kind and mode, and content or target.

    Of what can only be written, as in sysfs, no content: only root could read it.
    """
    entries: Snapshot = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder, name)
            mode = stat.filemode(path.lstat().st_mode)
            if path.is_symlink():
                entries[str(path.relative_to(root))] = (mode, os.readlink(path))
            else:
                has_text = path.is_file() and mode[1] == "r"
                entries[str(path.relative_to(root))] = (mode, path.read_bytes() if has_text else b"")
        if ".fake-node" in folders:
            folders.remove(".fake-node")
    return {path: entry for path, entry in entries.items() if not path.startswith(".fake-node")}


def links(root: Path) -> Iterator[Path]:
    yield from (root / path for path, (mode, _) in snapshot(root).items() if mode.startswith("l"))


def dev_nodes(node: FakeNode) -> set[str]:
    dev = node.root / "dev/vfio"
    return {str(path.relative_to(dev)) for path in dev.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


# The machine on which the kernel was looked at, as far as the facts below need it.

E1000E = Model(
    vendor=0x8086,
    device=0x10D3,
    class_code=0x020000,
    subsystem=(0x8086, 0x0000),
    bars=(
        Bar(index=0, size=0x20000, prefetchable=False, wide=False, io=False),
        Bar(index=1, size=0x20000, prefetchable=False, wide=False, io=False),
        Bar(index=2, size=0x20, prefetchable=False, wide=False, io=True),
        Bar(index=3, size=0x4000, prefetchable=False, wide=False, io=False),
        Bar(index=6, size=0x40000, prefetchable=False, wide=False, io=False),
    ),
    max_link=Link(speed="2.5 GT/s PCIe", width=1),
    aer=True,
)
NVME = Model(
    vendor=0x1B36,
    device=0x0010,
    class_code=0x010802,
    revision=2,
    subsystem=(0x1AF4, 0x1100),
    bars=(Bar(index=0, size=0x4000, prefetchable=False, wide=True, io=False),),
    max_link=Link(speed="2.5 GT/s PCIe", width=1),
    sriov=Sriov(
        total_vfs=2,
        offset=1,
        vf_device=0x10,
        vf_bars=(Bar(index=0, size=0x4000, prefetchable=False, wide=True, io=False),),
    ),
)
PORT = Model(vendor=0x1B36, device=0x000C, class_code=0x060400, host_driver="pcieport")
MEASURED = Preset(
    summary="",
    kernel=Kernel(cdevs=True, group_major=254, cdev_major=253, iommu="dmar0", first_group=0),
    nodes=(NumaNode(number=0, cpulist="0"), NumaNode(number=1, cpulist="1")),
    buses=(
        RootBus(
            name="pci0000:00",
            functions=(
                At("00:04.2", PORT, (At("03:00.0", E1000E, vfio="vfio-pci", group=12),), group=4),
                At("00:04.3", PORT, (At("04:00.0", NVME, vfio="vfio-pci", group=13),), group=5),
            ),
        ),
    ),
)
E1000E_FILES = """\
-r--r--r-- aer_dev_correctable aer_dev_fatal aer_dev_nonfatal ari_enabled class consistent_dma_mask_bits
-r--r--r-- current_link_speed current_link_width device dma_mask_bits irq local_cpulist local_cpus max_link_speed
-r--r--r-- max_link_width modalias power_state resource revision subsystem_device subsystem_vendor vendor
-rw-r--r-- broken_parity_status config d3cold_allowed driver_override enable msi_bus numa_node reset_method uevent
--w--w---- remove
--w------- rescan reset
-rw------- resource0 resource1 resource2 resource3 rom
lrwxrwxrwx driver iommu iommu_group subsystem
drwxr-xr-x power vfio-dev
"""
SRIOV_FILES = """\
-rw-r--r-- sriov_drivers_autoprobe sriov_numvfs
-r--r--r-- sriov_offset sriov_stride sriov_totalvfs sriov_vf_device sriov_vf_total_msix
"""
E1000E_FOLDER = "sys/devices/pci0000:00/0000:00:04.2/0000:03:00.0"
E1000E_LINKS = {
    "sys/bus/pci/devices/0000:03:00.0": "../../../devices/pci0000:00/0000:00:04.2/0000:03:00.0",
    "sys/bus/pci/drivers/vfio-pci/0000:03:00.0": "../../../../devices/pci0000:00/0000:00:04.2/0000:03:00.0",
    "sys/bus/pci/drivers/vfio-pci/module": "../../../../module/vfio_pci",
    f"{E1000E_FOLDER}/driver": "../../../../bus/pci/drivers/vfio-pci",
    f"{E1000E_FOLDER}/iommu": "../../../virtual/iommu/dmar0",
    f"{E1000E_FOLDER}/iommu_group": "../../../../kernel/iommu_groups/12",
    f"{E1000E_FOLDER}/subsystem": "../../../../bus/pci",
    f"{E1000E_FOLDER}/vfio-dev/vfio0/device": "../../../0000:03:00.0",
    f"{E1000E_FOLDER}/vfio-dev/vfio0/subsystem": "../../../../../../class/vfio-dev",
    "sys/kernel/iommu_groups/12/devices/0000:03:00.0": "../../../../devices/pci0000:00/0000:00:04.2/0000:03:00.0",
    "sys/class/vfio/12": "../../devices/virtual/vfio/12",
    "sys/class/vfio-dev/vfio0": "../../devices/pci0000:00/0000:00:04.2/0000:03:00.0/vfio-dev/vfio0",
    "sys/devices/virtual/vfio/12/subsystem": "../../../../class/vfio",
    "sys/class/iommu/dmar0": "../../devices/virtual/iommu/dmar0",
}
E1000E_TEXTS = {
    "class": "0x020000",
    "consistent_dma_mask_bits": "32",
    "current_link_speed": "2.5 GT/s PCIe",
    "current_link_width": "1",
    "device": "0x10d3",
    "driver_override": "vfio-pci",
    "enable": "0",
    "local_cpulist": "0-1",
    "local_cpus": "3",
    "max_link_speed": "2.5 GT/s PCIe",
    "modalias": "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00",
    "numa_node": "-1",
    "power_state": "D3hot",
    "power/control": "auto",
    "power/runtime_status": "suspended",
    "revision": "0x00",
    "subsystem_device": "0x0000",
    "subsystem_vendor": "0x8086",
    "uevent": "DRIVER=vfio-pci\nPCI_CLASS=20000\nPCI_ID=8086:10D3\nPCI_SUBSYS_ID=8086:0000\n"
    "PCI_SLOT_NAME=0000:03:00.0\nMODALIAS=pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00",
    "vendor": "0x8086",
    "vfio-dev/vfio0/dev": "253:0",
    "vfio-dev/vfio0/uevent": "MAJOR=253\nMINOR=0\nDEVNAME=vfio/devices/vfio0",
    "vfio-dev/vfio0/power/runtime_status": "unsupported",
}


def files_with_modes(listing: str) -> dict[str, str]:
    return {name: line.split()[0] for line in listing.splitlines() for name in line.split()[1:]}


def sizes_and_flags(resource: str) -> list[tuple[int, int]]:
    lines = [[int(word, 16) for word in line.split()] for line in resource.splitlines()]
    return [(end - start + 1 if flags else 0, flags) for start, end, flags in lines]


class TestTreeOfTheMeasuredMachine:
    def test_a_bound_function_has_the_files_of_a_real_one_with_their_modes(self, measured: Path) -> None:
        found = {p.name: stat.filemode(p.lstat().st_mode) for p in (measured / E1000E_FOLDER).iterdir()}
        assert found == files_with_modes(E1000E_FILES)

    def test_a_physical_function_has_the_sriov_files_too_and_its_virtual_functions_in_resource(
        self, measured: Path
    ) -> None:
        folder = measured / "sys/bus/pci/devices/0000:04:00.0"
        sriov = {p.name: stat.filemode(p.lstat().st_mode) for p in folder.iterdir() if p.name.startswith("sriov_")}
        assert sriov == files_with_modes(SRIOV_FILES)
        assert (folder / "sriov_vf_device").read_text() == "10\n"
        resource = sizes_and_flags((folder / "resource").read_text())
        assert resource[0] == (0x4000, 0x140204)
        assert resource[7] == (0x8000, 0x140204)

    def test_links_have_the_texts_of_the_real_ones(self, measured: Path) -> None:
        assert {path: os.readlink(measured / path) for path in E1000E_LINKS} == E1000E_LINKS

    def test_files_say_what_the_real_ones_said(self, measured: Path) -> None:
        folder = measured / E1000E_FOLDER
        assert {name: (folder / name).read_text().removesuffix("\n") for name in E1000E_TEXTS} == E1000E_TEXTS

    def test_resource_has_a_line_for_each_region_with_its_size_and_flags(self, measured: Path) -> None:
        text = (measured / E1000E_FOLDER / "resource").read_text()
        assert re.fullmatch(r"(0x[0-9a-f]{16} 0x[0-9a-f]{16} 0x[0-9a-f]{16}\n){13}", text)
        memory = (0x20000, 0x40200)
        rest = [(0, 0)] * 6
        assert sizes_and_flags(text) == [
            *(memory, memory, (0x20, 0x40101), (0x4000, 0x40200), (0, 0), (0, 0), (0x40000, 0x46200)),
            *rest,
        ]

    def test_error_counters_are_named_as_the_kernel_names_them_and_end_with_their_total(self, measured: Path) -> None:
        fatal = (measured / E1000E_FOLDER / "aer_dev_fatal").read_text().splitlines()
        assert fatal[:3] == ["Undefined 0", "DLP 0", "SDES 0"]
        assert fatal[-2:] == ["TLPXlatBlocked 0", "TOTAL_ERR_FATAL 0"]
        assert len(fatal) == 24
        correctable = (measured / E1000E_FOLDER / "aer_dev_correctable").read_text().splitlines()
        assert len(correctable) == 9
        assert correctable[-1] == "TOTAL_ERR_COR 0"

    def test_the_driver_folder_has_its_control_files(self, measured: Path) -> None:
        folder = measured / "sys/bus/pci/drivers/vfio-pci"
        control = {p.name: stat.filemode(p.lstat().st_mode) for p in folder.iterdir() if not p.is_symlink()}
        assert control == dict.fromkeys(("bind", "new_id", "remove_id", "uevent", "unbind"), "--w-------")

    def test_groups_have_a_type_and_the_nodes_their_cpus(self, measured: Path) -> None:
        assert (measured / "sys/kernel/iommu_groups/12/type").read_text() == "DMA-FQ\n"
        assert (measured / "sys/devices/system/node/node1/cpulist").read_text() == "1\n"
        assert (measured / "sys/devices/system/node/online").read_text() == "0,1\n"

    def test_the_device_nodes_are_those_of_the_bound_functions(self, measured: Path) -> None:
        found = {str(p.relative_to(measured / "dev")) for p in (measured / "dev").rglob("*") if p.is_file()}
        cdevs = {"vfio/devices/vfio0", "vfio/devices/vfio1"}
        assert found == {"iommu", "vfio/vfio", "vfio/12", "vfio/13"} | cdevs
        assert (measured / "sys/devices/virtual/vfio/13/dev").read_text() == "254:1\n"

    def test_config_begins_with_what_the_function_is(self, measured: Path) -> None:
        config = (measured / E1000E_FOLDER / "config").read_bytes()
        assert len(config) == 4096
        assert config[:4].hex() == "8680d310"
        assert config[8:12].hex() == "00000002"
        assert config[0x2C:0x30].hex() == "86800000"


class TestPresets:
    def test_every_link_is_relative_and_leads_to_something_in_the_tree(self, preset_tree: Path) -> None:
        found = list(links(preset_tree))
        assert found
        for link in found:
            assert not os.readlink(link).startswith("/"), link
            assert link.exists(), link
            assert link.resolve().is_relative_to(preset_tree.resolve()), link

    def test_every_function_is_in_the_group_that_it_points_to(self, preset_tree: Path) -> None:
        groups = preset_tree / "sys/kernel/iommu_groups"
        for function in (preset_tree / "sys/bus/pci/devices").iterdir():
            group = (function / "iommu_group").resolve()
            assert (group / "devices" / function.name).resolve() == function.resolve()
        members = [p.name for group in groups.iterdir() for p in (group / "devices").iterdir()]
        assert sorted(members) == sorted(names(preset_tree / "sys/bus/pci/devices"))

    def test_no_two_regions_overlap(self, preset_tree: Path) -> None:
        taken = []
        for function in (preset_tree / "sys/bus/pci/devices").iterdir():
            for line in (function / "resource").read_text().splitlines():
                start, end, flags = (int(word, 16) for word in line.split())
                if flags:
                    assert start % (end - start + 1 if flags & 0x200 == 0 else 1) == 0
                    taken.append((flags & 0x100, start, end))
        taken.sort()
        assert all(a[0] != b[0] or a[2] < b[1] for a, b in pairwise(taken))

    def test_no_group_has_the_number_of_a_vfio_device(self, preset_tree: Path) -> None:
        node = FakeNode.open(preset_tree)
        groups = {f.iommu_group for f in node.functions()}
        assert groups.isdisjoint({f.vfio.number for f in node.functions() if f.vfio})

    def test_opening_a_tree_finds_what_was_created(self, preset_tree: Path) -> None:
        (preset,) = (
            p for p in PRESETS.values() if p.kernel == FakeNode.open(preset_tree).kernel and _same(p, preset_tree)
        )
        found = {
            f.address: (f.vendor, f.device, f.class_code, f.driver) for f in FakeNode.open(preset_tree).functions()
        }
        assert found == {
            s.address: (s.model.vendor, s.model.device, s.model.class_code, s.driver) for s in preset.functions()
        }


def _same(preset: Preset, root: Path) -> bool:
    return {s.address for s in preset.functions()} == names(root / "sys/bus/pci/devices")


class TestHgxH100:
    def test_eight_gpus_and_four_nvswitches_are_bound_to_vfio_pci(self, hgx: FakeNode) -> None:
        bound = [f for f in hgx.functions() if f.driver == "vfio-pci"]
        assert [f.address for f in bound if f.class_code == 0x030200] == HGX_GPUS
        assert [f.address for f in bound if f.class_code == 0x068000] == HGX_NVSWITCHES
        assert len(bound) == 12
        assert {(f.vendor, f.device) for f in bound} == {(NVIDIA, 0x2330), (NVIDIA, 0x22A3)}

    def test_each_gpu_and_nvswitch_has_a_group_of_its_own(self, hgx: FakeNode) -> None:
        for address in HGX_GPUS + HGX_NVSWITCHES:
            assert names(hgx.folder(address) / "iommu_group/devices") == {address}

    def test_a_gpu_hangs_below_its_root_port_and_two_switches_beside_its_nic(self, hgx: FakeNode) -> None:
        devices = hgx.root / "sys/devices"
        above = "pci0000:15/0000:15:01.0/0000:16:00.0"
        gpu = f"{above}/0000:17:02.0/0000:19:00.0/0000:1a:00.0/0000:1b:00.0"
        assert (hgx.root / "sys/bus/pci/devices/0000:1b:00.0").resolve() == (devices / gpu).resolve()
        assert (devices / above / "0000:17:00.0/0000:18:00.0/class").read_text() == "0x020700\n"
        assert {hgx.function(a).driver for a in ("0000:15:01.0", "0000:16:00.0", "0000:1a:00.0")} == {"pcieport"}

    def test_with_cdevs_there_is_a_node_for_each_function_and_each_group(self, hgx: FakeNode) -> None:
        functions = [hgx.function(address) for address in HGX_NVSWITCHES + HGX_GPUS]
        assert [f.vfio and f.vfio.number for f in functions] == list(range(12))
        assert [f.vfio and f.vfio.cdev for f in functions] == [f"253:{n}" for n in range(12)]
        nodes = {f"devices/vfio{n}" for n in range(12)} | {str(f.iommu_group) for f in functions} | {"vfio"}
        assert dev_nodes(hgx) == nodes
        assert (hgx.root / "dev/iommu").is_file()
        assert re.findall(r"^ *(\d+) (vfio.*)$", (hgx.root / "proc/devices").read_text(), re.MULTILINE) == [
            ("253", "vfio-dev"),
            ("254", "vfio"),
        ]

    def test_without_cdevs_the_vfio_dev_folders_have_no_dev_and_only_groups_have_nodes(self, tmp_path: Path) -> None:
        node = FakeNode.create(tmp_path, "hgx-h100-group")
        folder = node.folder(HGX_GPUS[0]) / "vfio-dev/vfio4"
        assert names(folder) == {"device", "power", "subsystem", "uevent"}
        assert (folder / "uevent").read_text() == ""
        groups = {str(node.function(address).iommu_group) for address in HGX_GPUS + HGX_NVSWITCHES}
        assert dev_nodes(node) == groups | {"vfio"}
        assert names(node.root / "sys/class/vfio") == groups
        assert names(node.root / "dev") == {"vfio"}
        assert " vfio-dev" not in (node.root / "proc/devices").read_text()
        assert "245 vfio\n" in (node.root / "proc/devices").read_text()


class TestOtherPresets:
    def test_the_geforce_shares_its_group_with_its_other_functions_and_its_root_port(
        self, workstation: FakeNode
    ) -> None:
        members = {"0000:00:01.0", GPU, AUDIO, "0000:01:00.2", "0000:01:00.3"}
        assert names(workstation.folder(GPU) / "iommu_group/devices") == members
        classes = [workstation.function(f"0000:01:00.{n}").class_code for n in range(4)]
        assert classes == [0x030000, 0x040300, 0x0C0330, 0x0C8000]
        assert names(workstation.folder(T4) / "iommu_group/devices") == {T4}

    def test_the_geforces_other_functions_are_linked_as_its_consumers(self, workstation: FakeNode) -> None:
        link = workstation.folder(GPU) / f"consumer:pci:{AUDIO}"
        assert os.readlink(link) == f"../../../virtual/devlink/pci:{GPU}--pci:{AUDIO}"
        assert (link / "consumer").resolve() == workstation.folder(AUDIO).resolve()
        assert (workstation.folder(AUDIO) / f"supplier:pci:{GPU}/supplier/vendor").read_text() == "0x10de\n"
        consumers = {name for name in names(workstation.folder(GPU)) if name.startswith("consumer:")}
        assert consumers == {f"consumer:pci:0000:01:00.{n}" for n in (1, 2, 3)}

    def test_the_gh200_has_a_variant_driver_and_a_domain_of_its_own(self, gh200: FakeNode) -> None:
        gpu = gh200.function("0009:01:00.0")
        assert (gpu.driver, gpu.device, gpu.class_code) == ("nvgrace_gpu_vfio_pci", 0x2342, 0x030200)
        assert gpu.vfio is not None
        assert gpu.vfio.cdev == "253:0"
        assert gh200.folder("0009:01:00.0").parent.parent.name == "pci0009:00"

    def test_the_empty_machine_has_nothing_of_nvidia_and_no_vfio(self, tmp_path: Path) -> None:
        node = FakeNode.create(tmp_path, "empty")
        assert {f.vendor for f in node.functions()}.isdisjoint({NVIDIA})
        assert {f.class_code >> 8 for f in node.functions()} >= {0x0604, 0x0200}
        assert not (node.root / "sys/class/vfio").exists()
        assert names(node.root / "dev") == set()
        assert "vfio" not in (node.root / "proc/devices").read_text()

    def test_a_preset_may_number_groups_share_them_by_label_and_leave_the_rest_to_the_kernel(self) -> None:
        functions = (
            At("00:01.0", PORT, (At("01:00.0", E1000E, group="shared"),)),
            At("00:02.0", PORT, (At("02:00.0", E1000E, group=1), At("02:00.1", E1000E, group="shared"))),
        )
        bus = RootBus(name="pci0000:00", functions=functions)
        preset = replace(MEASURED, buses=(bus,))
        assert [s.iommu_group for s in preset.functions()] == [0, 2, 3, 1, 2]


class TestBinding:
    def test_the_lowest_free_number_is_handed_out_in_the_order_of_binding(self, workstation: FakeNode) -> None:
        workstation.unbind(AUDIO)
        workstation.unbind(T4)
        workstation.bind(T4)
        workstation.bind(AUDIO)
        numbers = {f.address: f.vfio.number for f in workstation.functions() if f.vfio}
        assert (numbers[T4], numbers[AUDIO]) == (1, 4)

    def test_the_groups_node_comes_with_its_first_function_and_goes_with_its_last(self, workstation: FakeNode) -> None:
        group = workstation.function(GPU).iommu_group
        paths = [workstation.root / p for p in (f"dev/vfio/{group}", f"sys/class/vfio/{group}")]
        functions = [f"0000:01:00.{n}" for n in range(4)]
        for address in functions:
            assert all(path.exists() for path in paths)
            workstation.unbind(address)
        assert not any(os.path.lexists(path) for path in paths)
        workstation.bind(functions[2])
        assert all(path.exists() for path in paths)

    def test_group_minors_are_the_lowest_free_ones(self, workstation: FakeNode) -> None:
        def minor(address: str) -> str:
            return (workstation.root / f"sys/class/vfio/{workstation.function(address).iommu_group}/dev").read_text()

        assert (minor(GPU), minor(T4)) == ("245:0\n", "245:1\n")
        for n in range(4):
            workstation.unbind(f"0000:01:00.{n}")
        workstation.unbind(T4)
        workstation.bind(T4)
        assert minor(T4) == "245:0\n"

    def test_the_folder_of_cdevs_goes_with_the_last_and_comes_with_the_first(self, gh200: FakeNode) -> None:
        gh200.unbind("0009:01:00.0")
        assert dev_nodes(gh200) == {"vfio"}
        assert not (gh200.root / "dev/vfio/devices").exists()
        assert not (gh200.root / "sys/devices/virtual/vfio").exists()
        gh200.bind("0009:01:00.0", "nvgrace_gpu_vfio_pci")
        assert dev_nodes(gh200) == {"vfio", "13", "devices/vfio0"}

    def test_unbinding_and_binding_again_leaves_everything_as_it_was(self, workstation: FakeNode) -> None:
        before = snapshot(workstation.root)
        for address in (GPU, "0000:00:1f.6"):
            driver = workstation.function(address).driver
            workstation.unbind(address)
            assert workstation.function(address).driver is None
            assert snapshot(workstation.root) != before
            workstation.bind(address, driver or "")
        assert snapshot(workstation.root) == before

    def test_another_driver_takes_a_function_from_the_one_that_has_it_and_wakes_it(self, workstation: FakeNode) -> None:
        workstation.bind(T4, "nvidia")
        folder = workstation.folder(T4)
        assert (folder / "driver").resolve() == workstation.root.resolve() / "sys/bus/pci/drivers/nvidia"
        assert (workstation.root / f"sys/bus/pci/drivers/nvidia/{T4}").exists()
        assert T4 not in names(workstation.root / "sys/bus/pci/drivers/vfio-pci")
        assert not (folder / "vfio-dev").exists()
        texts = [(folder / n).read_text() for n in ("enable", "power_state", "power/runtime_status", "driver_override")]
        assert texts == ["1\n", "D0\n", "active\n", "(null)\n"]
        assert (folder / "uevent").read_text().startswith("DRIVER=nvidia\n")

    def test_what_the_kernel_refuses_changes_nothing(self, workstation: FakeNode) -> None:
        workstation.set_enable(GPU, 1)
        before = snapshot(workstation.root)
        refused: list[tuple[Callable[[], None], str]] = [
            (lambda: workstation.bind(T4), "bound to vfio-pci already"),
            (lambda: workstation.bind(GPU, "nvidia"), "held by a VM"),
            (lambda: workstation.bind(AUDIO, "snd_hda_intel"), "EBUSY"),
            (lambda: workstation.bind("0000:00:01.0"), "is a bridge"),
            (lambda: workstation.unbind("0000:00:1f.0"), "not bound"),
            (lambda: workstation.bind("0000:77:00.0"), "no PCI function"),
            (lambda: workstation.unbind("../devices"), "no PCI function"),
            (lambda: workstation.remove(""), "no PCI function"),
        ]
        for change, message in refused:
            with pytest.raises(FakeNodeError, match=message) as error:
                change()
            assert "\n" not in str(error.value)
        assert snapshot(workstation.root) == before

    @pytest.mark.parametrize("driver", ["", "/x", "[/x]", "../../x", "a b", "a.ko", "nvidia\n", "é"])
    def test_what_is_not_the_name_of_a_driver_is_refused_before_anything_is_changed(
        self, workstation: FakeNode, driver: str
    ) -> None:
        before = snapshot(workstation.root)
        with pytest.raises(FakeNodeError, match="is not the name of a driver: allowed are letters, digits") as error:
            workstation.bind(T4, driver)
        assert "\n" not in str(error.value)
        assert snapshot(workstation.root) == before

    def test_pci_stub_may_take_a_group_mate_of_a_function_that_a_vm_holds(self, workstation: FakeNode) -> None:
        workstation.set_enable(GPU, 1)
        workstation.bind(AUDIO, "pci-stub")
        assert workstation.function(AUDIO).driver == "pci-stub"

    def test_binding_where_vfio_is_not_loaded_loads_it(self, tmp_path: Path) -> None:
        node = FakeNode.create(tmp_path / "node", "empty")
        gpu = FunctionSpec(address="0000:42:00.0", model=H100_SXM5, parent="0000:40:03.1", numa_node=0)
        node.add(gpu)
        assert not (node.root / "dev/vfio").exists()
        FakeNode.open(node.root).bind(gpu.address)
        function = node.function(gpu.address)
        assert function.vfio is not None
        assert dev_nodes(node) == {"vfio", str(function.iommu_group), "devices/vfio0"}
        assert " vfio-dev\n" in (node.root / "proc/devices").read_text()

    def test_files_that_a_test_replaced_by_traps_are_not_touched(self, workstation: FakeNode) -> None:
        folder = workstation.folder(GPU)
        for name in ("config", "uevent", "driver_override"):
            (folder / name).unlink()
            os.mkfifo(folder / name)
        workstation.unbind(GPU)
        workstation.bind(GPU)
        workstation.sicken(GPU)
        workstation.heal(GPU)
        assert all((folder / name).is_fifo() for name in ("config", "uevent", "driver_override"))


class TestOrder:
    """What a reader may see half-way: links before nodes on the way in, and gone before them on the way out."""

    @pytest.fixture
    def changes(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Every entry made (+) or taken away (-) from now on, by its path from `sys` or `dev` on."""
        seen: list[str] = []

        def record(name: str, sign: str, place: int) -> None:
            original: Callable[..., object] = getattr(os, name)

            def recorded(*args: object, **kwargs: object) -> object:
                match = re.search(r"/node/((sys|dev)/.*)", str(args[place]))
                creates = name != "open" or (isinstance(args[1], int) and args[1] & os.O_CREAT)
                if match and creates:
                    seen.append(sign + match[1])
                return original(*args, **kwargs)

            monkeypatch.setattr(os, name, recorded)

        for name, sign, place in (("symlink", "+", 1), ("open", "+", 0), ("mkdir", "+", 0)):
            record(name, sign, place)
        for name in ("unlink", "rmdir", "rename"):
            record(name, "-", 0)
        return seen

    def test_of_a_bind(self, gh200: FakeNode, changes: list[str]) -> None:
        address = "0009:01:00.0"
        folder = str(gh200.folder(address).relative_to(gh200.root))
        gh200.unbind(address)
        changes.clear()
        gh200.bind(address)
        expected = [
            f"+sys/bus/pci/drivers/vfio-pci/{address}",
            f"+{folder}/driver",
            "+sys/devices/virtual/vfio/13",
            "+sys/class/vfio/13",
            "+sys/devices/virtual/vfio/13/dev",
            "+dev/vfio/13",
            f"+{folder}/vfio-dev/vfio0",
            "+sys/class/vfio-dev/vfio0",
            f"+{folder}/vfio-dev/vfio0/dev",
            "+dev/vfio/devices/vfio0",
        ]
        assert [change for change in changes if change in expected] == expected

    def test_of_an_unbind(self, gh200: FakeNode, changes: list[str]) -> None:
        address = "0009:01:00.0"
        folder = str(gh200.folder(address).relative_to(gh200.root))
        gh200.unbind(address)
        expected = [
            f"-sys/bus/pci/drivers/nvgrace_gpu_vfio_pci/{address}",
            f"-{folder}/driver",
            "-dev/vfio/devices/vfio0",
            f"-{folder}/vfio-dev/vfio0/dev",
            f"-{folder}/vfio-dev/vfio0",
            f"-{folder}/vfio-dev",
            "-dev/vfio/13",
            "-sys/devices/virtual/vfio/13/dev",
            "-sys/class/vfio/13",
            "-sys/devices/virtual/vfio/13",
        ]
        assert [change for change in changes if change in expected] == expected

    def test_of_a_hot_remove_and_a_hot_add(self, gh200: FakeNode, changes: list[str]) -> None:
        address = "0009:01:00.0"
        folder = str(gh200.folder(address).relative_to(gh200.root))
        group = f"sys/kernel/iommu_groups/13/devices/{address}"
        entries = (f"{folder}/driver", "dev/vfio/13", f"sys/bus/pci/devices/{address}", group, folder)
        gh200.remove(address)
        assert [c for c in changes if c[1:] in entries] == [f"-{entry}" for entry in entries]
        changes.clear()
        gh200.add(address)
        known = (f"sys/bus/pci/devices/{address}", f"{folder}/iommu_group", group)
        assert [c for c in changes if c[1:] in known] == [f"+{entry}" for entry in known]


class TestUseByAVm:
    def test_a_function_is_awake_while_a_vm_has_it_and_asleep_afterwards(self, workstation: FakeNode) -> None:
        def texts() -> list[str]:
            return [(folder / name).read_text() for name in ("enable", "power_state", "power/runtime_status")]

        folder = workstation.folder(GPU)
        before = snapshot(workstation.root)
        assert texts() == ["0\n", "D3hot\n", "suspended\n"]
        workstation.set_enable(GPU, 1)
        assert texts() == ["1\n", "D0\n", "active\n"]
        workstation.set_enable(GPU, 0)
        assert snapshot(workstation.root) == before

    def test_unbinding_what_a_vm_holds_takes_driver_and_cdev_at_once_and_the_rest_when_it_lets_go(
        self, gh200: FakeNode
    ) -> None:
        address = "0009:01:00.0"
        gh200.set_enable(address, 1)
        gh200.unbind(address)
        function = gh200.function(address)
        assert (function.driver, function.vfio, function.enable) == (None, None, 1)
        assert dev_nodes(gh200) == {"vfio", "13"}
        with pytest.raises(FakeNodeError, match="held by a VM"):
            gh200.bind(address)
        gh200.set_enable(address, 0)
        assert dev_nodes(gh200) == {"vfio"}
        gh200.bind(address)
        assert dev_nodes(gh200) == {"vfio", "13", "devices/vfio0"}

    def test_the_number_of_what_a_vm_still_holds_is_not_handed_out_again(self, workstation: FakeNode) -> None:
        workstation.unbind(T4)
        workstation.set_enable(GPU, 1)
        workstation.unbind(GPU)
        node = FakeNode.open(workstation.root)
        node.bind(T4)
        assert node.function(T4).vfio == workstation.function(T4).vfio
        held, free = 0, 4
        assert node.function(T4).vfio is not None
        assert {f.vfio.number for f in node.functions() if f.vfio} == {1, 2, 3, free}
        node.set_enable(GPU, 0)
        node.unbind(T4)
        node.bind(T4)
        assert held in {f.vfio.number for f in node.functions() if f.vfio}

    def test_a_group_with_a_host_driver_in_it_cannot_be_opened(self, workstation: FakeNode) -> None:
        workstation.bind(AUDIO, "snd_hda_intel")
        with pytest.raises(FakeNodeError, match=rf"not viable.*{AUDIO}"):
            workstation.set_enable(GPU, 1)
        assert workstation.function(GPU).enable == 0
        workstation.unbind(AUDIO)
        workstation.set_enable(GPU, 1)
        assert workstation.function(GPU).enable == 1

    def test_enable_is_0_or_1(self, workstation: FakeNode) -> None:
        with pytest.raises(FakeNodeError, match="0 or 1"):
            workstation.set_enable(GPU, 2)


class TestHotPlug:
    def test_a_removed_function_is_gone_with_its_group_and_node(self, workstation: FakeNode) -> None:
        group = workstation.function(T4).iommu_group
        folder = workstation.folder(T4)
        workstation.remove(T4)
        assert not folder.exists()
        assert [path for path in snapshot(workstation.root) if T4 in path] == []
        assert not (workstation.root / f"sys/kernel/iommu_groups/{group}").exists()
        assert str(group) not in dev_nodes(workstation)
        assert workstation.removed() == [T4]
        assert list(links(workstation.root)) == [link for link in links(workstation.root) if link.exists()]

    @pytest.mark.parametrize("address", [GPU, AUDIO, "0000:01:00.3", T4, "0000:00:1f.6", "0000:00:1b.0"])
    def test_what_is_removed_put_back_and_bound_again_is_as_it_was(self, workstation: FakeNode, address: str) -> None:
        before = snapshot(workstation.root)
        drivers = {f.address: f.driver for f in workstation.functions()}
        workstation.remove(address)
        FakeNode.open(workstation.root).add(address)
        assert workstation.removed() == []
        for function in workstation.functions():
            driver = drivers[function.address]
            if function.driver != driver:
                assert function.driver is None
                assert driver == "vfio-pci"
                workstation.bind(function.address, driver)
        assert snapshot(workstation.root) == before

    def test_removing_a_bridge_removes_what_is_below_and_putting_it_back_brings_all_of_it(self, tmp_path: Path) -> None:
        node = FakeNode.create(tmp_path, "hgx-h100")
        before = {f.address: f.iommu_group for f in node.functions()}
        node.remove("0000:16:00.0")
        below = [
            f"0000:{place}" for place in ("16:00.0", "17:00.0", "17:02.0", "18:00.0", "19:00.0", "1a:00.0", "1b:00.0")
        ]
        assert node.removed() == below
        assert [a for a in before if a not in {f.address for f in node.functions()}] == below
        with pytest.raises(FakeNodeError, match=r"0000:1a:00\.0, the bridge above 0000:1b:00\.0, is not there"):
            node.add("0000:1b:00.0")
        node.add("0000:16:00.0")
        assert {f.address: f.iommu_group for f in node.functions()} == before
        assert node.function("0000:1b:00.0").driver is None
        assert node.function("0000:18:00.0").driver == "mlx5_core"

    def test_all_functions_of_a_group_find_each_other_again(self, workstation: FakeNode) -> None:
        functions = ["0000:00:01.0", *(f"0000:01:00.{n}" for n in range(4))]
        workstation.remove("0000:00:01.0")
        workstation.add(FunctionSpec(address="0000:00:1c.0", model=PORT, parent="pci0000:00"))
        assert workstation.function("0000:00:1c.0").iommu_group == 11  # that number was free now
        workstation.add("0000:00:01.0")
        assert {workstation.function(address).iommu_group for address in functions} == {15}

    @pytest.mark.parametrize("order", [1, -1])
    def test_group_mates_find_each_other_in_whatever_order_they_come_back(
        self, workstation: FakeNode, order: int
    ) -> None:
        functions = [f"0000:00:1f.{n}" for n in (0, 3, 4, 6)]
        for address in functions:
            workstation.remove(address)
        for address in functions[::order]:
            workstation.add(address)
        assert {workstation.function(address).iommu_group for address in functions} == {14}

    def test_a_function_may_come_back_in_another_group(self, workstation: FakeNode) -> None:
        workstation.remove(T4)
        workstation.add(T4, iommu_group=77)
        workstation.bind(T4)
        assert workstation.function(T4).iommu_group == 77
        assert "77" in dev_nodes(workstation)

    def test_a_new_function_is_added_below_a_bridge_with_regions_of_its_own(self, workstation: FakeNode) -> None:
        new = FunctionSpec(address="0000:02:00.1", model=E1000E, parent="0000:00:1b.0", driver="vfio-pci")
        workstation.add(new)
        function = workstation.function(new.address)
        assert (function.driver, function.iommu_group) == ("vfio-pci", 15)
        regions = [
            tuple(line.split()[:2])
            for folder in (workstation.root / "sys/bus/pci/devices").iterdir()
            for line in (folder / "resource").read_text().splitlines()
            if line.split()[2] != f"0x{0:016x}"
        ]
        assert len(regions) == len(set(regions))

    def test_another_card_may_be_put_where_one_was_removed(self, workstation: FakeNode) -> None:
        workstation.sicken(T4)
        workstation.remove(T4)
        workstation.add(FunctionSpec(address=T4, model=GTX_1660_SUPER, parent="0000:00:1b.0"))
        assert workstation.removed() == []
        assert workstation.function(T4).device == 0x21C4
        workstation.heal(T4)
        assert workstation.function(T4).link_speed == "8.0 GT/s PCIe"

    def test_removing_what_a_vm_holds_makes_it_let_go(self, workstation: FakeNode) -> None:
        workstation.set_enable(T4, 1)
        workstation.remove(T4)
        workstation.add(T4)
        assert workstation.function(T4).enable == 0
        workstation.set_enable(T4, 1)
        workstation.set_enable(T4, 0)

    def test_only_what_was_removed_can_be_put_back(self, workstation: FakeNode) -> None:
        with pytest.raises(FakeNodeError, match="there already"):
            workstation.add(T4)
        with pytest.raises(FakeNodeError, match="there already"):
            workstation.add(FunctionSpec(address=T4, model=E1000E, parent="0000:00:1b.0"))
        with pytest.raises(FakeNodeError, match=r"no function '0000:77:00\.0' was removed"):
            workstation.add("0000:77:00.0")
        with pytest.raises(FakeNodeError, match=r"no PCI function '0000:77:00\.0'"):
            workstation.add(FunctionSpec(address="0000:78:00.0", model=E1000E, parent="0000:77:00.0"))


class TestSickness:
    def test_a_device_off_the_bus_says_so_in_its_link_and_config_alone(self, workstation: FakeNode) -> None:
        before = snapshot(workstation.root)
        workstation.sicken(T4)
        folder = workstation.folder(T4)
        changed = {path for path, entry in snapshot(workstation.root).items() if entry != before[path]}
        relative = folder.relative_to(workstation.root)
        assert changed == {f"{relative}/{n}" for n in ("config", "current_link_speed", "current_link_width")}
        assert (folder / "current_link_speed").read_text() == "Unknown\n"
        assert (folder / "current_link_width").read_text() == "63\n"
        assert set((folder / "config").read_bytes()) == {0xFF}

    def test_a_device_that_is_taken_to_be_in_d3cold_says_that_too(self, workstation: FakeNode) -> None:
        workstation.sicken(T4, cold=True)
        folder = workstation.folder(T4)
        assert (folder / "power_state").read_text() == "D3cold\n"
        assert (folder / "power/runtime_status").read_text() == "suspended\n"
        assert _off_the_bus(workstation) == {T4}

    @pytest.mark.parametrize("cold", [False, True])
    def test_a_healed_device_is_as_it_was(self, workstation: FakeNode, cold: bool) -> None:
        before = snapshot(workstation.root)
        workstation.sicken(T4, cold=cold)
        workstation.sicken(T4)
        FakeNode.open(workstation.root).heal(T4)
        assert snapshot(workstation.root) == before
        assert (workstation.folder(T4) / "current_link_width").read_text() == "4\n"
        workstation.heal(T4)
        assert snapshot(workstation.root) == before

    def test_it_befalls_all_functions_of_the_slot_and_all_below_a_bridge(self, workstation: FakeNode) -> None:
        workstation.sicken(AUDIO)
        assert _off_the_bus(workstation) == {f"0000:01:00.{n}" for n in range(4)}
        workstation.heal(GPU)
        assert _off_the_bus(workstation) == set()
        workstation.sicken("0000:00:1b.0")
        assert _off_the_bus(workstation) == {"0000:00:1b.0", T4}

    def test_a_device_that_is_removed_and_put_back_is_well_again(self, workstation: FakeNode) -> None:
        workstation.sicken(T4)
        workstation.remove(T4)
        workstation.add(T4)
        assert _off_the_bus(workstation) == set()

    def test_what_has_no_link_cannot_lose_it(self, workstation: FakeNode) -> None:
        with pytest.raises(FakeNodeError, match="no PCIe link"):
            workstation.sicken("0000:00:1f.6")


def _off_the_bus(node: FakeNode) -> set[str]:
    return {f.address for f in node.functions() if f.link_speed == "Unknown"}


class TestAttributes:
    def test_sense_and_nonsense_can_be_set(self, workstation: FakeNode) -> None:
        folder = workstation.folder(T4)
        workstation.set_attribute(T4, "numa_node", "1")
        workstation.set_attribute(T4, "power/runtime_status", "")
        workstation.set_attribute(T4, "vendor", b"\xff\x00")
        workstation.set_attribute(T4, "new", "text")
        found = [(folder / name).read_bytes() for name in ("numa_node", "power/runtime_status", "vendor", "new")]
        assert found == [b"1\n", b"", b"\xff\x00", b"text\n"]
        assert stat.S_IMODE((folder / "numa_node").stat().st_mode) == 0o644
        assert workstation.function(T4).numa_node == 1
        assert workstation.function(T4).vendor == 0

    @pytest.mark.parametrize("name", ["../0000:02:00.0", "../../x", "driver", "power", "no/such", "", "."])
    def test_what_is_no_file_of_the_function_is_refused(self, workstation: FakeNode, name: str) -> None:
        with pytest.raises(FakeNodeError, match="has no attribute"):
            workstation.set_attribute(T4, name, "x")

    def test_a_reader_never_sees_half_a_content(self, workstation: FakeNode) -> None:
        path = workstation.folder(T4) / "modalias"
        contents = ["a" * 4000 + "\n", "b" * 4000 + "\n"]
        workstation.set_attribute(T4, "modalias", contents[0])
        seen: set[str] = set()
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                seen.add(path.read_text())

        reader = threading.Thread(target=read)
        reader.start()
        for turn in range(400):
            workstation.set_attribute(T4, "modalias", contents[turn % 2])
        stop.set()
        reader.join()
        assert seen <= set(contents)


class TestCreateAndOpen:
    def test_a_folder_with_something_in_it_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(FakeNodeError, match="not empty"):
            FakeNode.create(tmp_path, "gh200")
        with pytest.raises(FakeNodeError, match="not a folder"):
            FakeNode.create(tmp_path / "file", "gh200")
        assert names(tmp_path) == {"file"}

    @pytest.mark.parametrize("in_part", [False, True], ids=["no byte fits", "some bytes fit"])
    def test_where_a_tree_cannot_be_made_whole_nothing_is_left_of_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_part: bool
    ) -> None:
        def write(descriptor: int, content: bytes) -> int:
            if len(content) < 4096:
                return len(content)
            if in_part:
                return 100
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", write)
        (tmp_path / "empty").mkdir()
        for folder in (tmp_path / "new/and/newer", tmp_path / "empty"):
            with pytest.raises(OSError, match=f"No space left on device: '{folder}'"):
                FakeNode.create(folder, "gh200")
        assert names(tmp_path) == {"empty"}
        assert names(tmp_path / "empty") == set()

    def test_an_unknown_preset_is_refused_with_the_names_of_those_that_exist(self, tmp_path: Path) -> None:
        with pytest.raises(FakeNodeError, match=r"'dgx'.*hgx-h100, .*empty"):
            FakeNode.create(tmp_path / "node", "dgx")
        assert not (tmp_path / "node").exists()

    def test_a_folder_that_create_did_not_make_is_not_opened(self, tmp_path: Path) -> None:
        (tmp_path / "sys").mkdir()
        for folder in (tmp_path, tmp_path / "none", Path("/")):
            with pytest.raises(FakeNodeError, match="is not a fake node"):
                FakeNode.open(folder)

    def test_a_relative_path_and_a_path_through_a_link_will_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        monkeypatch.chdir(tmp_path)
        FakeNode.create("link/node", "gh200").unbind("0009:01:00.0")
        assert all(link.exists() for link in links(tmp_path / "real/node"))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["bind", "host", "unbind", "open", "close", "remove", "add", "sicken", "heal"]),
        st.sampled_from(["0000:00:01.0", "0000:00:1b.0", GPU, AUDIO, "0000:01:00.2", T4]),
    ),
    max_size=30,
)


def take(node: FakeNode, verb: str, address: str) -> None:
    verbs: dict[str, Callable[[], None]] = {
        "bind": lambda: node.bind(address),
        "host": lambda: node.bind(address, "nvidia"),
        "unbind": lambda: node.unbind(address),
        "open": lambda: node.set_enable(address, 1),
        "close": lambda: node.set_enable(address, 0),
        "remove": lambda: node.remove(address),
        "add": lambda: node.add(address),
        "sicken": lambda: node.sicken(address),
        "heal": lambda: node.heal(address),
    }
    verbs[verb]()


def check_consistent(root: Path, tree: Snapshot) -> None:
    """What holds in every tree a kernel shows, read without the fake node's help."""
    assert [path for path, (mode, _) in tree.items() if mode.startswith("l") and not (root / path).exists()] == []
    functions = [path.resolve() for path in (root / "sys/bus/pci/devices").iterdir()]
    assert {(root / path).parent.resolve() for path in tree if path.endswith("/vendor")} == set(functions)
    bound = [f for f in functions if (f / "vfio-dev").exists()]
    assert bound == [f for f in functions if (f / "driver").exists() and "vfio" in (f / "driver").resolve().name]
    for driver in (root / "sys/bus/pci/drivers").iterdir():
        of_driver = {f.name for f in functions if (f / "driver").exists() and (f / "driver").resolve().samefile(driver)}
        assert {name for name in names(driver) if name.startswith("0000:")} == of_driver
    numbers = [name for f in bound for name in names(f / "vfio-dev")]
    assert len(numbers) == len(set(numbers)) == len(bound)
    assert names(root / "sys/class/vfio-dev") == set(numbers)
    groups = {(f / "iommu_group").resolve().name for f in bound}
    waiting = {
        (f / "iommu_group").resolve().name
        for f in functions
        if not (f / "driver").exists() and (f / "enable").read_text() == "1\n"
    }
    shown = names(root / "sys/class/vfio")
    assert groups <= shown <= groups | waiting
    assert names(root / "sys/devices/virtual/vfio") == shown
    assert names(root / "dev/vfio") == shown | {"vfio"}
    assert names(root / "sys/kernel/iommu_groups") == {(f / "iommu_group").resolve().name for f in functions}


@settings(max_examples=25)
@given(steps=STEPS)
def test_whatever_happens_the_tree_stays_one_that_a_kernel_shows(steps: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        node = FakeNode.create(Path(folder) / "node", "workstation")
        begin = now = snapshot(node.root)
        for verb, address in steps:
            before = now
            try:
                take(node, verb, address)
            except FakeNodeError:
                now = snapshot(node.root)
                assert now == before
            else:
                now = snapshot(node.root)
                check_consistent(node.root, now)
        _undo_everything(node)
        end = snapshot(node.root).keys()
        assert begin.keys() <= end
        assert [path for path in end - begin.keys() if "nvidia" not in path] == []  # its module stays loaded


def _undo_everything(node: FakeNode) -> None:
    """Puts everything back, well and unused, to the preset's drivers; numbers may differ from the beginning."""
    for bridge in ("0000:00:01.0", "0000:00:1b.0"):
        if bridge in node.removed():
            node.add(bridge)
    for address in node.removed():
        node.add(address)
    for function in node.functions():
        if function.driver in (None, "vfio-pci"):
            node.set_enable(function.address, 0)
    for spec in PRESETS["workstation"].functions():
        if node.function(spec.address).driver:
            node.unbind(spec.address)
    for spec in PRESETS["workstation"].functions():
        if spec.driver:
            node.bind(spec.address, spec.driver)


@given(cpus=st.sets(st.integers(min_value=0, max_value=255)), size=st.just(256))
def test_a_cpu_mask_says_what_the_list_says(cpus: set[int], size: int) -> None:
    mask = cpu_mask(",".join(map(str, sorted(cpus))), size)
    assert re.fullmatch(r"[0-9a-f]{8}(,[0-9a-f]{8}){7}", mask)
    assert {n for n in range(size) if int(mask.replace(",", ""), 16) >> n & 1} == cpus


class TestCommand:
    @pytest.fixture
    def run(self, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
        def run(*arguments: object) -> str:
            parser = argparse.ArgumentParser()
            command.add_parser(parser.add_subparsers())
            args = parser.parse_args(["fake-node", *map(str, arguments)])
            assert args.run(args) == 0
            return capsys.readouterr().out

        return run

    def test_presets_are_listed_with_a_line_each(self, run: Callable[..., str]) -> None:
        assert [line.split()[0] for line in run("presets").splitlines()] == list(PRESETS)

    def test_a_node_is_made_shown_and_changed(self, run: Callable[..., str], tmp_path: Path) -> None:
        folder = tmp_path / "node"
        assert "5 functions bound to vfio" in run("create", "workstation", folder)
        node = FakeNode.open(folder)
        run("unbind", folder, T4)
        assert node.function(T4).driver is None
        assert "driver nvidia" in run("bind", folder, "02:00.0", "--driver", "nvidia")
        assert node.function(T4).driver == "nvidia"
        assert "vfio4" in run("bind", folder, "0000:02:00.0")
        assert "in use by a VM" in run("enable", folder, T4, 1)
        run("enable", folder, T4, 0)
        assert "off the bus" in run("sicken", folder, T4)
        assert "off the bus" not in run("heal", folder, T4)
        assert "off the bus" in run("sicken", folder, T4, "--cold")
        assert (FakeNode.open(folder).folder(T4) / "power_state").read_text() == "D3cold\n"
        assert "off the bus" not in run("heal", folder, T4)
        assert T4 in run("remove", folder, T4)
        assert run("show", folder).splitlines()[-1] == f"removed: {T4}"
        assert "no driver" in run("add", folder, T4)
        assert node.function(T4).driver is None

    def test_show_has_a_line_for_each_function_and_for_bridges_if_asked(
        self, run: Callable[..., str], tmp_path: Path
    ) -> None:
        FakeNode.create(tmp_path, "workstation").bind(T4, "nvidia")
        lines = run("show", tmp_path).splitlines()
        assert [line.split()[0] for line in lines[1:6]] == ["0000:00:1f.3", "0000:00:1f.4", "0000:00:1f.6", GPU, AUDIO]
        assert "nvidia" in lines[8]
        assert lines[-1] == "and 4 bridges and system peripherals (--all)"
        assert len(run("show", tmp_path, "--all").splitlines()) == 1 + 12

    def test_what_is_wrong_is_said_in_one_line(self, run: Callable[..., str], tmp_path: Path) -> None:
        FakeNode.create(tmp_path / "node", "gh200")
        (tmp_path / "locked").write_text("")
        for arguments, message in (
            (("create", "dgx", tmp_path / "new"), "there is no preset 'dgx'"),
            (("create", "gh200", tmp_path / "node"), "not empty"),
            (("create", "gh200", tmp_path / "locked/node"), "locked"),
            (("show", tmp_path), "not a fake node"),
            (("bind", tmp_path / "node", "77:00.0"), "no PCI function '0000:77:00.0'"),
            (("unbind", tmp_path / "node", "0000:01:00.0x"), "no PCI function"),
            (("add", tmp_path / "node", "0009:01:00.0"), "there already"),
            (("bind", tmp_path / "node", "0009:01:00.0", "--driver", "[/x]"), "'[/x]' is not the name of a driver"),
        ):
            with pytest.raises(UsageError, match=re.escape(message)) as error:
                run(*arguments)
            assert "\n" not in str(error.value)

    def test_a_full_disk_is_no_fault_of_what_was_given_and_names_the_folder(
        self, run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = FakeNode.create(tmp_path / "node", "workstation")
        monkeypatch.setattr(os, "write", lambda *_: 0)
        for arguments, folder in (
            (("create", "gh200", tmp_path / "new"), tmp_path / "new"),
            (("sicken", node.root, T4), node.root),
        ):
            with pytest.raises(OSError, match=f"No space left on device: '{folder}"):
                run(*arguments)


def test_kernels_of_presets_differ_in_what_they_are_there_to_show() -> None:
    assert PRESETS["hgx-h100"].kernel == WITH_CDEVS
    assert [name for name, preset in PRESETS.items() if not preset.kernel.cdevs] == ["hgx-h100-group", "workstation"]
