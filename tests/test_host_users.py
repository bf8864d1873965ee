"""Who uses a function that a host driver has, by files as a real host has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.users import read_users, sees_processes
from sandbox_plugin.model import PciFunction

A, B = "0000:1b:00.0", "0000:43:00.0"


class Tree:
    """A host's files below a folder, as far as a test writes them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, path: str, text: str = "") -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def of(self, address: str, path: str, text: str = "") -> None:
        self.file(f"sys/bus/pci/devices/{address}/{path}", text)

    def process(self, number: int, name: str, *opened: str) -> None:
        self.file(f"proc/{number}/comm", f"{name}\n")
        (self.root / f"proc/{number}/fd").mkdir()
        for descriptor, path in enumerate(opened):
            (self.root / f"proc/{number}/fd/{descriptor}").symlink_to(path)

    def sees_all(self) -> None:
        (self.root / "proc/self/ns").mkdir(parents=True)
        (self.root / "proc/self/ns/pid").symlink_to("pid:[4026531836]")

    def users(self, driver: str = "nvidia", address: str = A) -> tuple[str, ...]:
        function = PciFunction(address=address, vendor=0x10DE, device=0x2330, class_code=0x030200, driver=driver)
        return read_users(HostPaths(self.root), [function]).get(address, ())


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_nobody_uses_what_nothing_speaks_of(tree: Tree) -> None:
    tree.process(7, "bash", "/dev/pts/0", "socket:[1]")
    assert tree.users() == ()


def test_a_process_that_has_the_nvidia_node_of_the_gpu_open(tree: Tree) -> None:
    tree.process(4711, "nvidia-persiste", "/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia1")
    tree.file(f"proc/driver/nvidia/gpus/{A}/information", "Model: \t H100\nDevice Minor: \t 1\n")
    tree.file(f"proc/driver/nvidia/gpus/{B}/information", "Device Minor: \t 0\n")
    assert tree.users() == ("nvidia-persiste (4711) has /dev/nvidia1 open",)
    assert tree.users(address=B) == ()


def test_where_the_driver_does_not_tell_which_node_is_whose_any_counts(tree: Tree) -> None:
    tree.process(4711, "python3", "/dev/nvidia1")
    tree.process(4712, "nv-fabricmanage", "/dev/nvidia-nvswitch0")
    assert tree.users() == ("python3 (4711) has /dev/nvidia1 open",)
    assert tree.users("nvidia-nvswitch") == ("nv-fabricmanage (4712) has /dev/nvidia-nvswitch0 open",)
    assert tree.users("nouveau") == ()


def test_screens_and_sound_of_the_function_itself(tree: Tree) -> None:
    tree.of(A, "drm/card1/dev")
    tree.of(A, "drm/renderD129/dev")
    tree.of(B, "sound/card2/id")
    tree.process(9, "Xorg", "/dev/dri/card1", "/dev/dri/card0")
    tree.process(10, "pipewire", "/dev/snd/pcmC2D3p", "/dev/snd/controlC2", "/dev/snd/controlC22", "/dev/snd/timer")
    assert tree.users("nouveau") == ("Xorg (9) has /dev/dri/card1 open",)
    assert tree.users("snd_hda_intel", B) == (
        "pipewire (10) has /dev/snd/controlC2 open",
        "pipewire (10) has /dev/snd/pcmC2D3p open",
    )


def test_the_display_that_the_machine_booted_with_and_framebuffers(tree: Tree) -> None:
    tree.of(A, "boot_vga", "1\n")
    tree.of(A, "graphics/fb0/dev", "29:0\n")
    tree.of(B, "boot_vga", "0\n")
    assert tree.users() == ("it is the display that this machine booted with", "it has a framebuffer, fb0")
    assert tree.users(address=B) == ()


def test_a_network_interface_that_is_up(tree: Tree) -> None:
    tree.of(A, "net/eth0/flags", "0x1003\n")
    tree.of(A, "net/eth1/flags", "0x1002\n")
    assert tree.users("ice") == ("the network interface eth0 is up",)


@pytest.mark.parametrize("process", ["1", "self"])
def test_a_disk_that_is_mounted_or_has_a_volume(tree: Tree, process: str) -> None:
    tree.of(A, "nvme/nvme0/nvme0n1/dev", "259:0\n")
    tree.of(A, "nvme/nvme0/nvme0n1/nvme0n1p1/dev", "259:1\n")
    tree.of(A, "nvme/nvme0/nvme0n1/nvme0n1p2/holders/dm-0", "")
    tree.of(A, "nvme/nvme0/nvme0n1/nvme0n1p2/dev", "259:2\n")
    tree.file(f"proc/{process}/mountinfo", "22 1 259:1 / / rw - ext4 /dev/nvme0n1p1 rw\n")
    assert tree.users("nvme") == ("nvme0n1p1 is mounted", "a volume is on nvme0n1p2")


def test_where_processes_cannot_be_seen_the_count_of_the_module_tells(tree: Tree) -> None:
    tree.file("sys/module/nvidia/refcnt", "3\n")
    tree.file("sys/module/nvidia/holders/nvidia_uvm")
    tree.file("sys/module/nvidia/holders/nvidia_modeset")
    (why,) = tree.users()
    assert "refcnt 3, 2 of it other modules" in why
    assert tree.users("snd_hda_intel") == ()
    tree.file("sys/module/nvidia/refcnt", "2\n")
    assert tree.users() == ()


def test_where_processes_can_be_seen_the_count_of_the_module_does_not_matter(tree: Tree) -> None:
    tree.file("sys/module/nvidia/refcnt", "3\n")
    tree.sees_all()
    assert sees_processes(HostPaths(tree.root))
    assert tree.users() == ()


def test_a_descriptor_that_is_closed_at_this_moment_is_nobodys(tree: Tree) -> None:
    tree.process(7, "bash")
    os.mkdir(tree.root / "proc/7/fd/0")  # no link: readlink fails as for one that is gone
    assert tree.users() == ()
