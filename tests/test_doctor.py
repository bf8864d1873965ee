"""`sandbox-plugin doctor`: a node that is ready passes, and one that is broken in one place has one finding for it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import StartDaemon
from daemon import ROOT, Places, clean_environment
from grpclib import GRPCError
from grpclib import Status as GrpcStatus
from kubelet import TIMEOUT, GrpcKubelet
from names import AUDIO, FIRST_GPU, GEFORCE, PGPU
from pods import PodResources
from test_fake_node import snapshot

from sandbox_plugin.cli.main import main
from sandbox_plugin.config.settings import Settings
from sandbox_plugin.doctor.checks import findings_of
from sandbox_plugin.doctor.examine import below_its_root, read_node
from sandbox_plugin.doctor.findings import Group, Status
from sandbox_plugin.doctor.node import CdiFolder, KubeletFolder, Peer, Unread
from sandbox_plugin.doctor.node import PodResources as Answers
from sandbox_plugin.fake.hardware import At, Preset, RootBus, VgpuType
from sandbox_plugin.fake.models import H100_SXM5, XEON_ROOT_PORT
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.presets import WITH_CDEVS
from sandbox_plugin.host import sysfs
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.kubelet.lock import LOCK_NAME
from sandbox_plugin.rpc.client import NoAnswerError

KATA = "opt/kata/share/defaults/kata-containers/runtimes/qemu-nvidia-gpu/configuration-qemu-nvidia-gpu.toml"
SOCKET = "/var/lib/kubelet/pod-resources/kubelet.sock"
GOOD_KATA = f"""
[hypervisor.qemu]
cold_plug_vfio = "root-port"
enable_hugepages = false
rootless = false
[runtime]
pod_resource_api_sock = "{SOCKET}"
"""
NOT_FOUND = "pod sandbox-plugin-doctor-asks in namespace default not found"
SECOND_GPU = "0000:43:00.0"


@dataclass
class Machine:
    """A node that is ready in every respect: for tests to break."""

    places: Places
    node: FakeNode
    kubelet: GrpcKubelet
    pods: PodResources

    @property
    def root(self) -> Path:
        return self.node.root

    def write(self, name: str, text: str) -> None:
        """Gives a file below the root a content."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.root / name)

    def restart_pods(self, get_error: str | None) -> None:
        """The kubelet's PodResources, with another answer to Get."""
        self.pods.stop()
        self.pods.get_error = get_error
        self.pods.start(age=3600)

    def edit_kata(self, old: str, new: str) -> None:
        assert old in GOOD_KATA
        self.write(KATA, GOOD_KATA.replace(old, new))

    @property
    def flags(self) -> list[str]:
        return [
            f"--fake-sysfs={self.root}",
            f"--kubelet-dir={self.places.kubelet}",
            f"--pod-resources-socket={self.pods.socket}",
        ]


@pytest.fixture
def machine_of(places: Places, kubelet: GrpcKubelet, pods: PodResources) -> Iterator[Callable[[str | Preset], Machine]]:
    """Makes a machine of a preset. Who hangs in one of its files has an answer at the end."""
    pods.get_error = NOT_FOUND
    pods.start(age=3600)

    def make(preset: str | Preset) -> Machine:
        machine = Machine(places, FakeNode.create(places.top / "node", preset), kubelet, pods)
        machine.write(KATA, GOOD_KATA)
        machine.write(SOCKET.lstrip("/"), "")
        return machine

    yield make
    for fifo in [path for path in places.top.rglob("*") if path.is_fifo()]:
        with fifo.open("r+b", buffering=0) as answer:  # to read and write: so it waits for nobody
            fifo.unlink()
            answer.write(b"\n")


@pytest.fixture
def machine(machine_of: Callable[[str | Preset], Machine]) -> Machine:
    """A DGX H100."""
    return machine_of("hgx-h100")


Examine = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Examine:
    """The findings of a machine."""

    def run(machine: Machine, *flags: str) -> list[dict[str, Any]]:
        status = main(["doctor", *machine.flags, "--output=json", *flags])
        findings: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["findings"]
        assert status == (1 if any(finding["status"] == "fail" for finding in findings) else 0)
        return findings

    return run


def troubles(findings: list[dict[str, Any]]) -> list[str]:
    """What is not well: `group/check status`."""
    return [f"{f['group']}/{f['check']} {f['status']}" for f in findings if f["status"] in ("warn", "fail")]


def words(findings: list[dict[str, Any]]) -> str:
    """All that is said of what is not well."""
    return " ".join(f"{f['seen']} {f['action']}" for f in findings if f["status"] in ("warn", "fail"))


def unseen(findings: list[dict[str, Any]]) -> list[str]:
    return [finding["check"] for finding in findings if finding["status"] == "unseen"]


@pytest.mark.parametrize("preset", ["hgx-h100", "hgx-h100-group", "rtx-pro-6000", "uneven", "workstation", "gh200"])
def test_a_node_that_is_ready_passes_in_every_respect(
    machine_of: Callable[[str], Machine], examine: Examine, preset: str
) -> None:
    findings = examine(machine_of(preset))
    assert [finding for finding in findings if finding["status"] != "pass"] == []
    assert {finding["group"] for finding in findings} == set(Group)


@pytest.mark.parametrize("preset", ["hgx-h100", "hgx-h100-group", "workstation"])
def test_a_node_whose_gpus_are_in_use_passes_too(
    machine_of: Callable[[str], Machine], examine: Examine, preset: str
) -> None:
    machine = machine_of(preset)
    for function in machine.node.functions():
        if function.driver == "vfio-pci":
            machine.node.set_enable(function.address, 1)
    assert troubles(examine(machine)) == []


# Broken in one place


def no_groups(m: Machine) -> None:
    m.remove("sys/kernel/iommu_groups")


def iommu_switched_off(m: Machine) -> None:
    no_groups(m)
    m.write("proc/cmdline", "root=/dev/sda1 intel_iommu=off")


def no_table_of_the_firmware(m: Machine) -> None:
    no_groups(m)
    (m.root / "sys/firmware/acpi/tables/DMAR").rename(m.root / "sys/firmware/acpi/tables/APIC")


def acpi_not_shown(m: Machine) -> None:
    no_groups(m)
    m.remove("sys/firmware")


def intel_iommu_not_on(m: Machine) -> None:
    no_groups(m)
    m.write("proc/cmdline", "root=/dev/sda1")


def no_remapping(m: Machine) -> None:
    m.write("sys/kernel/irq/0/chip_name", "IO-APIC")


def remapping_switched_off(m: Machine) -> None:
    no_remapping(m)
    m.write("proc/cmdline", "intel_iommu=on intremap=off")


def unsafe_interrupts(m: Machine) -> None:
    no_remapping(m)
    m.write("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n")


def acs_override(m: Machine) -> None:
    m.write("proc/cmdline", "intel_iommu=on pcie_acs_override=downstream,multifunction")


def no_kvm(m: Machine) -> None:
    m.remove("sys/class/misc/kvm")


def vfio_not_loaded(m: Machine) -> None:
    for function in m.node.functions():
        if function.driver == "vfio-pci":
            m.node.unbind(function.address)
    m.remove("sys/bus/pci/drivers/vfio-pci")


def noiommu_mode(m: Machine) -> None:
    m.write("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n")


def nouveau_has_a_gpu(m: Machine) -> None:
    m.node.bind(FIRST_GPU, "nouveau")


def nvidiafb_has_two(m: Machine) -> None:
    m.node.bind(FIRST_GPU, "nvidiafb")
    m.node.bind(SECOND_GPU, "nvidiafb")


def nvidia_has_all(m: Machine) -> None:
    for function in m.node.functions():
        if function.driver == "vfio-pci":
            m.node.bind(function.address, "nvidia")


def a_gpu_without_driver(m: Machine) -> None:
    m.node.unbind(FIRST_GPU)


def firmware_mapping(m: Machine) -> None:
    group = m.node.function(FIRST_GPU).iommu_group
    m.write(f"sys/kernel/iommu_groups/{group}/reserved_regions", "0x1000 0x1fff direct\n")


def off_the_bus(m: Machine) -> None:
    m.node.sicken(FIRST_GPU)


def dead_in_d3cold(m: Machine) -> None:
    m.node.set_attribute(FIRST_GPU, "power_state", "D3cold")


def resource_lines(m: Machine) -> list[str]:
    return (m.node.folder(FIRST_GPU) / "resource").read_text().splitlines()


def a_bar_without_address(m: Machine) -> None:
    lines = resource_lines(m)
    start, end, flags = lines[2].split()
    lines[2] = f"0x{0:016x} 0x{int(end, 16) - int(start, 16):016x} 0x{int(flags, 16) | 0x20000000:016x}"
    m.node.set_attribute(FIRST_GPU, "resource", "\n".join(lines))


def lost_bars(m: Machine) -> None:
    lines = resource_lines(m)
    m.node.set_attribute(FIRST_GPU, "resource", "\n".join([lines[0], *[f"0x{0:016x} " * 3] * 12]))


def no_reset(m: Machine) -> None:
    for name in ("reset", "reset_method"):
        (m.node.folder(FIRST_GPU) / name).unlink()


def no_node(m: Machine) -> None:
    vfio = m.node.function(FIRST_GPU).vfio
    assert vfio is not None
    (m.root / f"dev/vfio/devices/vfio{vfio.number}").unlink()


def senseless_function(m: Machine) -> None:
    m.node.set_attribute(FIRST_GPU, "vendor", "nonsense")


def hanging_function(m: Machine) -> None:
    (m.node.folder(FIRST_GPU) / "vendor").unlink()
    os.mkfifo(m.node.folder(FIRST_GPU) / "vendor")


def console_below_a_gpu(m: Machine) -> None:
    screen = m.node.folder(FIRST_GPU) / "simple-framebuffer.0"
    add_screen(m, screen, "simple-framebuffer")


def console_on_the_boot_gpu(m: Machine) -> None:
    m.node.set_attribute(FIRST_GPU, "boot_vga", "1")
    add_screen(m, m.root / "sys/devices/platform/efi-framebuffer.0", "efi-framebuffer")


def add_screen(m: Machine, folder: Path, driver: str) -> None:
    folder.mkdir(parents=True)
    (folder / "driver").symlink_to(f"/sys/bus/platform/drivers/{driver}")
    (m.root / "sys/bus/platform/devices" / folder.name).symlink_to(folder)


def console_of_a_later_driver(m: Machine) -> None:
    """One whose driver cannot be told, and one on a NIC: both are no trouble."""
    add_screen(m, m.node.folder("0000:18:00.0") / "simple-framebuffer.1", "simple-framebuffer")
    (m.root / "sys/bus/platform/devices/simple-framebuffer.2").mkdir()
    (m.root / "sys/bus/platform/devices/simple-framebuffer.2/driver").mkdir()


def no_bus(m: Machine) -> None:
    m.remove("sys/bus/pci/devices")


def no_kubelet_folder(m: Machine) -> None:
    m.kubelet.stop()
    shutil.rmtree(m.places.kubelet)


def no_registration(m: Machine) -> None:
    m.kubelet.stop()
    (m.places.kubelet / "kubelet.sock").unlink(missing_ok=True)


def dead_registration(m: Machine) -> None:
    no_registration(m)
    leave_socket(m.places.kubelet / "kubelet.sock")


def no_socket_at_all(m: Machine) -> None:
    no_registration(m)
    (m.places.kubelet / "kubelet.sock").touch()


def leave_socket(path: Path) -> None:
    """A socket file that nobody listens at."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))


def no_pod_resources(m: Machine) -> None:
    m.pods.stop()
    m.pods.socket.unlink(missing_ok=True)


def get_disabled(m: Machine) -> None:
    m.restart_pods("PodResources API Get method disabled")


def get_unknown(m: Machine) -> None:
    m.restart_pods(None)


GOOD_SPEC = "cdiVersion: 0.5.0\nkind: vendor.com/nic\ndevices:\n- name: '1'\n  containerEdits:\n    env: [A=B]\n"


def bad_spec(m: Machine) -> None:
    m.write("etc/cdi/theirs.yaml", GOOD_SPEC.replace("0.5.0", "0.9.0"))


def dangling_spec(m: Machine) -> None:
    (m.root / "etc/cdi").mkdir(parents=True)
    (m.root / "etc/cdi/gone.json").symlink_to("nowhere.json")


def unjudged_spec(m: Machine) -> None:
    m.write("etc/cdi/huge.yaml", "#" * 300_000)


def device_in_two_folders(m: Machine) -> None:
    m.write("etc/cdi/a.yaml", GOOD_SPEC)
    m.write("var/run/cdi/b.yaml", GOOD_SPEC)


def device_in_two_specs(m: Machine) -> None:
    m.write("etc/cdi/a.yaml", GOOD_SPEC)
    m.write("etc/cdi/b.yaml", GOOD_SPEC)


def spec_of_a_node_that_went(m: Machine) -> None:
    m.write("var/run/cdi/old.yaml", GOOD_SPEC.replace("env: [A=B]", "deviceNodes: [{path: /dev/vfio/devices/vfio99}]"))


def spec_of_another_node_that_went(m: Machine) -> None:
    m.write("var/run/cdi/old.yaml", GOOD_SPEC.replace("env: [A=B]", "deviceNodes: [{path: /dev/nic7}]"))


def no_cold_plug(m: Machine) -> None:
    m.edit_kata('"root-port"', '"no-port"')


def no_socket_in_kata(m: Machine) -> None:
    m.edit_kata(SOCKET, "")


def no_socket_in_another_file_of_kata(m: Machine) -> None:
    m.write("etc/kata-containers/configuration-qemu.toml", '[hypervisor.qemu]\ncold_plug_vfio = "root-port"\n')


def wrong_socket_in_kata(m: Machine) -> None:
    m.edit_kata(SOCKET, "/run/kubelet.sock")


def broken_toml(m: Machine) -> None:
    m.edit_kata("[runtime]", "[runtime")


def kata_without_gpus(m: Machine) -> None:
    (m.root / KATA).unlink()
    m.write("etc/kata-containers/configuration.toml", '[hypervisor.qemu]\ncold_plug_vfio = "no-port"\n')


def kata_off_in_a_drop_in(m: Machine) -> None:
    drop_in = Path(KATA).parent / "config.d/90-site.toml"
    m.write(str(drop_in), '[hypervisor.qemu]\ncold_plug_vfio = "no-port"\n')


def iommufd_off_for_confidential_guests(m: Machine) -> None:
    m.edit_kata("rootless = false", "confidential_guest = true\nenable_iommufd = false")


def no_huge_page(m: Machine) -> None:
    m.edit_kata("enable_hugepages = false", "enable_hugepages = true")


def little_memory_to_lock(m: Machine) -> None:
    m.edit_kata("rootless = false", "rootless = true")
    m.write("proc/7/comm", "containerd\n")
    m.write("proc/7/limits", (m.root / "proc/self/limits").read_text())


def no_inotify_left(m: Machine) -> None:
    m.write("proc/sys/fs/inotify/max_user_instances", "2\n")
    (m.root / "proc/8/fd").mkdir(parents=True)
    for number in range(2):
        (m.root / f"proc/8/fd/{number}").symlink_to("anon_inode:inotify")


def few_descriptors(m: Machine) -> None:
    m.write("proc/self/limits", (m.root / "proc/self/limits").read_text().replace("1048576", "256    "))


def files_run_out(m: Machine) -> None:
    m.write("proc/sys/fs/file-nr", "9900\t0\t10000\n")


def selinux_confines(m: Machine) -> None:
    m.write("sys/fs/selinux/enforce", "1")
    m.write("proc/self/attr/current", "system_u:system_r:container_t:s0:c1,c2\0")


@pytest.mark.parametrize(
    ("spoil", "trouble", "said"),
    [
        (no_groups, "firmware and kernel/iommu fail", ["although the firmware has the table DMAR", "dmesg"]),
        (iommu_switched_off, "firmware and kernel/iommu fail", ["Remove intel_iommu=off"]),
        (no_table_of_the_firmware, "firmware and kernel/iommu fail", ["no table", "firmware's setup"]),
        (acpi_not_shown, "firmware and kernel/iommu fail", ["cannot be seen", "boot with intel_iommu=on"]),
        (intel_iommu_not_on, "firmware and kernel/iommu fail", ["Add intel_iommu=on"]),
        (no_remapping, "firmware and kernel/interrupt-remapping fail", ["firmware's setup"]),
        (remapping_switched_off, "firmware and kernel/interrupt-remapping fail", ["Remove intremap=off"]),
        (unsafe_interrupts, "firmware and kernel/interrupt-remapping warn", ["allow_unsafe_interrupts"]),
        (acs_override, "firmware and kernel/command-line warn", ["pcie_acs_override=downstream,multifunction"]),
        (no_kvm, "firmware and kernel/kvm fail", ["kvm_intel or kvm_amd"]),
        (vfio_not_loaded, "vfio/driver fail", ["modprobe vfio-pci"]),
        (noiommu_mode, "vfio/noiommu warn", ["enable_unsafe_noiommu_mode"]),
        (nouveau_has_a_gpu, "devices/driver fail", [f"{FIRST_GPU}: bound to nouveau", f"vfio bind {FIRST_GPU}`"]),
        (nvidiafb_has_two, "devices/driver fail", [f"{FIRST_GPU}, {SECOND_GPU}: bound to nvidiafb"]),
        (nvidia_has_all, "devices/driver fail", ["and 9 more: bound to nvidia", "vfio bind --all --switches"]),
        (a_gpu_without_driver, "devices/driver fail", [f"{FIRST_GPU}: bound to no driver"]),
        (firmware_mapping, "devices/firmware-mapping fail", ["0x1000-0x1fff", FIRST_GPU, "RMRR"]),
        (off_the_bus, "devices/answers fail", [FIRST_GPU, "power-cycle"]),
        (dead_in_d3cold, "devices/answers fail", [FIRST_GPU, "D3cold"]),
        (a_bar_without_address, "devices/bars fail", [f"{FIRST_GPU} has no address for BAR 2", "Above 4G"]),
        (lost_bars, "devices/bars warn", [FIRST_GPU, "only BAR 0", "Above 4G"]),
        (no_reset, "devices/reset warn", [FIRST_GPU, "cannot reset"]),
        (no_node, "devices/node fail", [FIRST_GPU, "not in the host's /dev"]),
        (senseless_function, "devices/readable fail", [FIRST_GPU, "nonsense"]),
        (hanging_function, "devices/readable fail", [FIRST_GPU, "does not answer"]),
        (console_below_a_gpu, "devices/console warn", ["simple-framebuffer.0", FIRST_GPU, "sysfb_init"]),
        (console_on_the_boot_gpu, "devices/console warn", ["efi-framebuffer.0", FIRST_GPU]),
        (no_bus, "devices/pci-bus fail", ["No such file"]),
        (no_kubelet_folder, "kubelet/folder fail", ["device-plugins", "systemctl status kubelet"]),
        (no_registration, "kubelet/registration fail", ["there is no socket"]),
        (no_socket_at_all, "kubelet/registration fail", ["there is no socket"]),
        (dead_registration, "kubelet/registration fail", ["nobody listens"]),
        (no_pod_resources, "kubelet/pod-resources fail", ["no such socket"]),
        (get_disabled, "kubelet/pod-resources-get fail", ["Get method disabled", "1.34"]),
        (get_unknown, "kubelet/pod-resources-get fail", ["UNIMPLEMENTED", "KubeletPodResourcesGet=true"]),
        (bad_spec, "cdi/specs fail", ["/etc/cdi/theirs.yaml", "0.9.0"]),
        (dangling_spec, "cdi/specs fail", ["/etc/cdi/gone.json", "dangling"]),
        (unjudged_spec, "cdi/specs warn", ["/etc/cdi/huge.yaml", "262144 bytes"]),
        (device_in_two_folders, "cdi/specs warn", ["vendor.com/nic=1", "runtime-rs"]),
        (device_in_two_specs, "cdi/specs fail", ["vendor.com/nic=1"]),
        (spec_of_a_node_that_went, "cdi/nodes warn", ["/var/run/cdi/old.yaml", "/dev/vfio/devices/vfio99"]),
        (spec_of_another_node_that_went, "cdi/nodes warn", ["/dev/nic7"]),
        (no_cold_plug, "kata/cold-plug fail", [f"/{KATA}", "'no-port'", '"root-port"']),
        (kata_off_in_a_drop_in, "kata/cold-plug fail", [f"/{KATA}", "'no-port'"]),
        (no_socket_in_kata, "kata/pod-resources-socket fail", ["is empty", SOCKET]),
        (no_socket_in_another_file_of_kata, "kata/pod-resources-socket warn", ["configuration-qemu.toml", "is empty"]),
        (wrong_socket_in_kata, "kata/pod-resources-socket fail", ["/run/kubelet.sock, which is not there"]),
        (broken_toml, "kata/configuration fail", [f"/{KATA}: not valid TOML"]),
        (kata_without_gpus, "kata/configuration warn", ["none of 1 files", "kata-qemu-nvidia-gpu"]),
        (iommufd_off_for_confidential_guests, "kata/iommufd fail", ["enable_iommufd is false"]),
        (no_huge_page, "kata/hugepages fail", ["no huge page is free"]),
        (little_memory_to_lock, "kata/memlock fail", ["containerd may lock only 8388608", "LimitMEMLOCK"]),
        (no_inotify_left, "limits/inotify warn", ["2 inotify instances", "max_user_instances=1024"]),
        (few_descriptors, "limits/descriptors warn", ["256 files"]),
        (files_run_out, "limits/descriptors warn", ["9900 files"]),
        (selinux_confines, "limits/selinux fail", ["container_t", "spc_t"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_broken_is_named_and_nothing_else(
    machine: Machine, examine: Examine, spoil: Callable[[Machine], None], trouble: str, said: list[str]
) -> None:
    spoil(machine)
    findings = examine(machine)
    assert troubles(findings) == [trouble]
    assert all(each in words(findings) for each in said), words(findings)


def test_a_sibling_with_a_host_driver_spoils_its_group_and_is_named(
    machine_of: Callable[[str], Machine], examine: Examine
) -> None:
    machine = machine_of("workstation")
    machine.node.bind(AUDIO, "snd_hda_intel")
    findings = examine(machine)
    assert troubles(findings) == ["devices/group fail"]
    assert f"{AUDIO} in its IOMMU group" in words(findings)
    assert "bound to snd_hda_intel" in words(findings)
    assert f"vfio bind {GEFORCE}" in words(findings)


def test_a_sibling_that_spoils_the_group_of_several_devices_is_named_once(
    machine_of: Callable[[str | Preset], Machine], examine: Examine
) -> None:
    machine = machine_of(one_group())
    machine.node.bind("0000:17:00.0", "nvidia")
    findings = examine(machine)
    assert troubles(findings) == ["devices/driver fail", "devices/group fail", "devices/acs warn"]


def one_group(gpus: int = 3) -> Preset:
    """GPUs behind ports that do not keep them apart."""
    ports = tuple(
        At(
            f"15:0{n}.0",
            XEON_ROOT_PORT,
            (At(f"{16 + n:02}:00.0", H100_SXM5, vfio="vfio-pci", group="all"),),
            group="all",
        )
        for n in range(gpus)
    )
    return Preset(summary="", kernel=WITH_CDEVS, buses=(RootBus(name="pci0000:15", functions=ports),))


def a_gpu_in_no_group(m: Machine) -> None:
    (m.node.folder(FIRST_GPU) / "iommu_group").unlink()


def a_gpu_that_is_being_bound(m: Machine) -> None:
    vfio = m.node.function(FIRST_GPU).vfio
    assert vfio is not None
    (m.node.folder(FIRST_GPU) / f"vfio-dev/vfio{vfio.number}/dev").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(a_gpu_in_no_group, "Switch on the IOMMU for it"), (a_gpu_that_is_being_bound, "Look again in a moment")],
)
def test_what_a_vfio_driver_has_and_cannot_be_offered_is_told_of(
    machine: Machine, examine: Examine, spoil: Callable[[Machine], None], said: str
) -> None:
    spoil(machine)
    findings = examine(machine)
    assert troubles(findings) == ["devices/driver fail"]
    assert said in words(findings)


def test_a_group_that_cannot_be_passed_whole_is_told_of(
    machine_of: Callable[[str | Preset], Machine], examine: Examine, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[[resources]]\naddress = "{AUDIO}"\nexclude = true\n')
    findings = examine(machine_of("workstation"), f"--config={config}")
    assert troubles(findings) == ["devices/driver fail"]
    assert "Exclude none of its IOMMU group" in words(findings)


def test_vgpus_without_a_type_are_no_fault_and_those_whose_card_has_lost_its_driver_are(
    machine_of: Callable[[str | Preset], Machine], examine: Examine
) -> None:
    machine, card = machine_of("rtx-pro-6000"), "0000:16:00.0"
    machine.node.bind(card, "nvidia")
    one, _ = machine.node.add_vgpu_functions(card, [VgpuType(1155, "NVIDIA L40S-24Q", fits=2)], 2)
    assert troubles(examine(machine)) == []
    machine.node.set_vgpu_type(one, 1155)
    assert troubles(examine(machine)) == []
    (machine.node.folder(card) / "driver").unlink()
    findings = examine(machine)
    assert troubles(findings) == ["devices/driver fail"]
    assert f"Bind {card} to its vendor's driver" in words(findings)


def test_gpus_of_several_slots_in_one_group_are_told_of(
    machine_of: Callable[[str | Preset], Machine], examine: Examine
) -> None:
    findings = examine(machine_of(one_group(5)))
    assert troubles(findings) == ["devices/acs warn"]
    assert "0000:16:00.0, 0000:17:00.0, 0000:18:00.0 and 2 more share IOMMU group" in words(findings)


def test_a_node_without_gpus_is_not_ready(machine_of: Callable[[str], Machine], examine: Examine) -> None:
    machine = machine_of("empty")
    machine.node.bind("0000:41:00.0", "vfio-pci")
    assert troubles(examine(machine)) == ["devices/found fail"]


def test_what_is_harmless_passes(machine: Machine, examine: Examine) -> None:
    console_of_a_later_driver(machine)
    machine.node.set_attribute(FIRST_GPU, "resource2_resize", "7ff")
    for enforcing, said in (("0", "permissive"), ("1", "enforcing; the plugin's pod needs the type spc_t")):
        machine.write("sys/fs/selinux/enforce", enforcing)
        findings = examine(machine)
        assert troubles(findings) == []
        assert {said, "1 function; sizes are not read, as that wakes them"} <= {f["seen"] for f in findings}


# What the settings ask for


def test_confidential_guests_need_cdevs_and_a_cpu_that_can(
    machine_of: Callable[[str], Machine], examine: Examine
) -> None:
    machine = machine_of("hgx-h100-group")
    machine.write("sys/module/kvm_intel/parameters/tdx", "Y\n")
    findings = examine(machine, "--require-iommufd")
    assert troubles(findings) == ["vfio/cdevs fail"], "the devices' no-cdev follows from it"
    assert "CONFIG_VFIO_DEVICE_CDEV" in words(findings)
    assert troubles(examine(machine)) == ["vfio/cdevs warn"], "the kernel can start confidential guests"


def test_confidential_guests_need_sev_snp_or_tdx(machine: Machine, examine: Examine) -> None:
    findings = examine(machine, "--require-iommufd")
    assert troubles(findings) == ["firmware and kernel/confidential-guests fail"]
    machine.write("proc/cmdline", "iommu=pt")
    assert "Remove iommu=pt" in words(examine(machine, "--require-iommufd"))
    machine.write("sys/module/kvm_amd/parameters/sev_snp", "Y\n")
    assert troubles(examine(machine, "--require-iommufd")) == []


def test_kubevirt_needs_neither_cdi_nor_kata_nor_get(machine: Machine, examine: Examine) -> None:
    for spoil in (bad_spec, broken_toml, get_unknown):
        spoil(machine)
    assert troubles(examine(machine, "--consumer=kubevirt")) == []
    no_pod_resources(machine)
    assert troubles(examine(machine, "--consumer=kubevirt")) == ["kubelet/pod-resources warn"]


def test_claims_need_pod_resources_whoever_consumes_them(
    machine: Machine, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_PLUGIN_DRA", "true")  # as in the pod
    monkeypatch.setenv("SANDBOX_PLUGIN_API_SERVER", "http://127.0.0.1:1")
    monkeypatch.setenv("NODE_NAME", "node-1")
    no_pod_resources(machine)
    findings = examine(machine, "--consumer=kubevirt")
    assert troubles(findings) == ["kubelet/pod-resources fail"]
    assert "without it no claim is prepared" in words(findings)


def test_the_drop_in_of_the_examples_mends_a_kata_that_plugs_nothing(machine: Machine, examine: Examine) -> None:
    machine.write(KATA, '[hypervisor.qemu]\ncold_plug_vfio = "no-port"\n\n[runtime]\npod_resource_api_sock = ""\n')
    assert troubles(examine(machine)) == ["kata/cold-plug fail", "kata/pod-resources-socket fail"]
    machine.write(f"{Path(KATA).parent}/config.d/50-gpu.toml", (ROOT / "examples/node/kata.toml").read_text())
    assert troubles(examine(machine)) == []


def test_iommufd_in_kata_needs_cdevs(machine_of: Callable[[str], Machine], examine: Examine) -> None:
    machine = machine_of("hgx-h100-group")
    machine.edit_kata("rootless = false", "enable_iommufd = true")
    assert troubles(examine(machine)) == ["kata/iommufd fail"]


def test_what_a_rule_excludes_is_no_fault(machine: Machine, examine: Examine, tmp_path: Path) -> None:
    machine.node.bind(FIRST_GPU, "nvidia")
    config = tmp_path / "config.toml"
    config.write_text(f'[[resources]]\naddress = "{FIRST_GPU}"\nexclude = true\n')
    assert troubles(examine(machine, f"--config={config}")) == []


def test_free_huge_pages_and_unlimited_memory_are_enough(machine: Machine, examine: Examine) -> None:
    machine.edit_kata("enable_hugepages = false\nrootless = false", "enable_hugepages = true\nrootless = true")
    machine.write("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "512\n")
    limits = (machine.root / "proc/self/limits").read_text()
    machine.write("proc/7/comm", "containerd\n")
    machine.write("proc/7/limits", limits.replace("8388608   ", "unlimited ", 1))
    findings = examine(machine)
    assert [f for f in findings if f["status"] != "pass"] == []
    assert "free: 512 of 2048kB" in [finding["seen"] for finding in findings]
    shutil.rmtree(machine.root / "proc/7")
    assert unseen(examine(machine)) == ["memlock"]


# Other plugins


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_another_plugin_on_the_node_is_named(machine: Machine, examine: Examine) -> None:
    with listen(machine.places.kubelet / "sandbox-pgpu.sock"):
        findings = examine(machine)
        assert troubles(findings) == ["kubelet/plugins warn"]
        assert "another plugin than this one serves sandbox-pgpu.sock" in words(findings)
        with listen(machine.places.kubelet / "kubevirt-GPU.sock"):
            findings = examine(machine)
            assert troubles(findings) == ["kubelet/plugins fail"]
            assert "kubevirt-GPU.sock" in words(findings)


def test_a_socket_that_was_left_is_no_plugin(machine: Machine, examine: Examine) -> None:
    leave_socket(machine.places.kubelet / "sandbox-pgpu.sock")
    assert troubles(examine(machine)) == []


def test_the_plugin_that_has_our_lock_is_found_by_the_kernels_list_of_locks(
    machine: Machine, examine: Examine, daemon: StartDaemon
) -> None:
    plugin = daemon(machine.node)
    plugin.wait_for("registered", resource=PGPU)
    findings = examine(machine, f"--cdi-dir={machine.places.cdi}")
    assert troubles(findings) == []
    assert f"one plugin has the lock (process {plugin.pid})" in [finding["seen"] for finding in findings]


@pytest.mark.parametrize("owner", ["-1", "0"])
def test_a_lock_of_a_process_that_cannot_be_seen_is_a_lock(machine: Machine, examine: Examine, owner: str) -> None:
    lock = machine.places.kubelet / LOCK_NAME
    lock.touch()
    line = f"2: FLOCK  ADVISORY  WRITE {owner} 00:01:{lock.stat().st_ino} 0 EOF"
    (machine.root / "proc/locks").unlink()
    machine.write("proc/locks", f"1: POSIX  ADVISORY  READ 5 00:01:2 0 EOF\n{line}\n")
    with listen(machine.places.kubelet / "sandbox-pgpu.sock"):
        findings = examine(machine)
    assert troubles(findings) == []
    assert "one plugin has the lock" in [finding["seen"] for finding in findings]


# What cannot be seen


def test_in_a_container_it_says_what_a_container_cannot_see(machine: Machine, examine: Examine) -> None:
    (machine.root / "proc/self/ns").mkdir()
    (machine.root / "proc/self/ns/pid").symlink_to("pid:[4026532000]")
    (machine.root / KATA).unlink()
    with listen(machine.places.kubelet / "sandbox-pgpu.sock"):
        findings = examine(machine)
    assert troubles(findings) == []
    assert unseen(findings) == ["plugins", "folder", "folder", "configuration"]


def test_facts_that_a_container_hides_are_not_taken_for_bad(machine: Machine, examine: Examine) -> None:
    for folder in ("sys/kernel/irq", "sys/firmware", "proc/sys"):
        machine.remove(folder)
    for file in ("proc/cmdline", "proc/self/limits"):
        (machine.root / file).unlink()
    findings = examine(machine)
    assert troubles(findings) == []
    assert unseen(findings) == ["interrupt-remapping", "command-line", "inotify", "descriptors"]


def test_a_fake_node_without_a_kubelet_is_judged_without_one(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"--fake-sysfs={places.node('hgx-h100').root}", "--output=json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert unseen(findings) == ["folder", "configuration"]
    assert [finding["seen"] for finding in findings if finding["group"] == "cdi"][-1] == "/etc/cdi is not there"


@pytest.mark.parametrize(
    ("fifo", "check"),
    [
        ("proc/cmdline", "firmware and kernel/iommu"),
        ("proc/locks", "kubelet/folder"),
        ("proc/sys/fs/file-nr", "limits/inotify"),
        (KATA, "kata/configuration"),
    ],
)
def test_what_does_not_answer_holds_nothing_up(machine: Machine, examine: Examine, fifo: str, check: str) -> None:
    (machine.root / fifo).unlink()
    os.mkfifo(machine.root / fifo)
    (finding,) = [finding for finding in examine(machine) if f"{finding['group']}/{finding['check']}" == check]
    assert finding["status"] in ("unseen", "fail")
    assert "no answer within 2 s" in finding["seen"]


def test_a_kubelet_that_does_not_answer_holds_nothing_up(machine: Machine, examine: Examine) -> None:
    no_pod_resources(machine)
    with listen(machine.pods.socket):
        findings = examine(machine)
    assert troubles(findings) == ["kubelet/pod-resources fail"]
    assert "no answer within 2 s" in words(findings)


Change = dict[str, Any]


def test_whatever_could_not_be_read_is_said_and_nothing_else(machine: Machine) -> None:
    settings = below_its_root(Settings(host_root=machine.root, pod_resources_socket=machine.pods.socket))
    settings = replace(settings, kubelet_dir=machine.places.kubelet)
    node = asyncio.run(read_node(settings, Rules(settings)))
    assert isinstance(node.kubelet, KubeletFolder)
    (run, etc) = node.cdi
    assert isinstance(run, CdiFolder)
    hangs = Unread("it hangs")
    may_not_write = {
        "kubelet": replace(node.kubelet, writable=False, registration=Peer.FORBIDDEN),
        "cdi": (replace(run, exists=True, writable=False), etc),
    }
    expected: list[tuple[Change, list[str]]] = [
        ({}, []),
        ({"kernel": hangs}, ["iommu unseen", "driver unseen"]),
        ({"displays": hangs}, []),
        ({"kubelet": hangs}, ["folder fail"]),
        ({"cdi": (hangs, etc)}, ["folder fail"]),
        ({"kata": hangs}, ["configuration fail"]),
        ({"limits": hangs}, ["inotify unseen"]),
        ({"kata": ()} | {"settings": replace(settings, host_root=Path("/")), "is_fake": False}, ["configuration warn"]),
        (
            {"pod_resources": Answers(path=machine.pods.socket, get_said="gone")},
            ["pod-resources-get unseen"],
        ),
        (may_not_write, ["folder warn", "registration unseen", "folder warn"]),
    ]
    for change, said in expected:
        findings = findings_of(replace(node, **change))
        assert [f"{f.check} {f.status}" for f in findings if f.status is not Status.PASS] == said, change


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GRPCError(GrpcStatus.PERMISSION_DENIED, "not you"), "PERMISSION_DENIED: not you"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (NoAnswerError("Connection refused"), "Connection refused"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_why_pod_resources_does_not_answer_is_said(
    machine: Machine, examine: Examine, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    async def fail(socket: Path) -> None:
        raise error

    monkeypatch.setattr("sandbox_plugin.doctor.examine.list_pods", fail)
    findings = examine(machine)
    assert troubles(findings) == ["kubelet/pod-resources fail"]
    assert said in words(findings)


def test_a_kubelet_that_goes_away_before_get_leaves_that_open(
    machine: Machine, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(socket: Path, method: object) -> None:
        raise NoAnswerError("connection lost")

    monkeypatch.setattr("sandbox_plugin.doctor.examine.call", fail)
    assert unseen(examine(machine)) == ["pod-resources-get"]


def test_a_process_without_descriptors_says_so(
    machine: Machine, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(paths: object, *others: object) -> None:
        raise sysfs.OutOfResources("Too many open files")

    monkeypatch.setattr("sandbox_plugin.doctor.reading.read_limits", fail)
    monkeypatch.setattr("sandbox_plugin.host.scan.HostScanner.scan", fail)
    findings = examine(machine)
    assert troubles(findings) == ["devices/pci-bus fail"]
    assert unseen(findings) == ["inotify"]
    assert "Too many open files" in words(findings)


# The command


def test_it_changes_nothing(machine: Machine, examine: Examine) -> None:
    def all_names() -> list[str]:
        return sorted(str(path) for path in machine.places.top.rglob("*"))

    before, names = snapshot(machine.node), all_names()
    examine(machine)
    assert (snapshot(machine.node), all_names()) == (before, names)


def test_the_text_fits_80_columns_and_says_what_to_do(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    for spoil in (iommu_switched_off, bad_spec, no_cold_plug, no_inotify_left):
        spoil(machine)
    assert main(["doctor", *machine.flags]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert [line for line in out.splitlines() if len(line) > 80 and "/" not in line] == []
    assert "  FAIL  iommu" in out
    assert "-> Remove intel_iommu=off" in out
    summary = " ".join(out.rpartition("\n\n")[2].split())
    said = r"This node is not ready: \d+ passed, 1 to look at, 3 failed, 1 cannot be seen here."
    assert re.fullmatch(said, summary)


def test_a_ready_node_says_so_in_one_line(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *machine.flags]) == 0
    summary = capsys.readouterr().out.rpartition("\n\n")[2].strip()
    assert re.fullmatch(r"Nothing speaks against passthrough: \d+ passed.", summary)


def test_the_json_has_a_version_counts_and_findings(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    no_kvm(machine)
    assert main(["doctor", *machine.flags, "--output=json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    assert set(document["summary"]) == set(Status)
    assert sum(document["summary"].values()) == len(document["findings"])
    (kvm,) = [finding for finding in document["findings"] if finding["check"] == "kvm"]
    assert kvm == {
        "group": "firmware and kernel",
        "check": "kvm",
        "status": "fail",
        "seen": "not there, so no VM can start",
        "action": "Switch on virtualization in the firmware's setup (VT-x, SVM), and load kvm_intel or kvm_amd.",
    }


def test_the_document_names_every_check() -> None:
    checks = (ROOT / "sandbox_plugin/doctor/checks").glob("*.py")
    named = {
        name
        for path in checks
        for name in re.findall(r"""(?:passed|warn|fail|unseen|make)\(\s*"([a-z-]+)",""", path.read_text())
    }
    document = (ROOT / "docs/doctor.md").read_text()
    assert len(named) > 20
    assert {name for name in named if f"`{name}`" not in document} == set()


def test_on_this_machine_it_ends_with_an_answer() -> None:
    """Whatever machine it is, and whoever runs it."""
    ended = subprocess.run(
        [sys.executable, "-m", "sandbox_plugin", "doctor", "--output=json"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=ROOT,
        env=clean_environment({}),
        check=False,
    )
    assert ended.stderr == ""
    document = json.loads(ended.stdout)
    assert ended.returncode == (1 if document["summary"]["fail"] else 0)
