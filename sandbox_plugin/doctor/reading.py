"""Reading what the daemon never needs: sysfs, /proc and the files of others. Blocking: `examine` runs it on threads.

Nothing is written, no device is opened, and nothing is read that wakes a sleeping one: of a BAR that can be resized the
sizes are left unread, since reading them resumes the device (__resource_resize_show in drivers/pci/pci-sysfs.c).
"""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from sandbox_plugin.doctor.node import Displays, Kernel, KubeletFolder, Limits, Peer, Screen
from sandbox_plugin.host import sysfs
from sandbox_plugin.host.confidential import read_confidential
from sandbox_plugin.host.modules import read_drivers
from sandbox_plugin.host.namespaces import is_the_hosts
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.pci_function import PCI_ADDRESS
from sandbox_plugin.kubelet.lock import LOCK_NAME

_PLENTY = 1 << 20
"""Bytes that are read of files in /proc which are longer than a page."""
_IRQS = 256
"""How many interrupts are asked for their chip: those of the I/O APIC are among the first."""
_IOMMU_TABLES = ("DMAR", "IVRS", "IORT")
_FRAMEBUFFERS = ("simple-framebuffer.", "efi-framebuffer.", "vesa-framebuffer.")
"""Platform devices that drivers/firmware/sysfb.c makes of the firmware's framebuffer."""
_RESIZE = re.compile(r"resource([0-5])_resize")
_PLUGIN_SOCKET = re.compile(r"(sandbox|kubevirt)-.+\.sock")
"""How this plugin, the one that it replaces, and KubeVirt's GPU plugin call their sockets."""
_PATIENCE = 1.0
"""Seconds for a connection to a unix socket."""
_RUNTIMES = ("containerd", "crio", "cri-o")


def is_in_container(paths: HostPaths) -> bool:
    """Whether this process sees other processes or cgroups than the host does."""
    return any(is_the_hosts(paths, kind) is False for kind in ("pid", "cgroup"))


def read_kernel(paths: HostPaths) -> Kernel:
    """Raises `sysfs.OutOfResources`."""
    root = paths.root
    tables = sysfs.listed(root / "sys/firmware/acpi/tables")
    modules, confidential = f"{root}/sys/module", read_confidential(paths)
    return Kernel(
        command_line=tuple((sysfs.text_or_none(f"{root}/proc/cmdline") or "").split()),
        # A container has an empty folder in place of /sys/firmware.
        tables=frozenset(tables).intersection(_IOMMU_TABLES) if tables else None,
        iommus=tuple(sorted(sysfs.listed(root / "sys/class/iommu"))),
        groups=len(sysfs.listed(paths.iommu_groups)),
        irq_chips=_irq_chips(root),
        has_kvm=os.path.exists(root / "sys/class/misc/kvm"),
        snp=confidential.snp,
        tdx=confidential.tdx,
        drivers=tuple(sorted(read_drivers(paths))),
        unsafe_interrupts=sysfs.is_on(f"{modules}/vfio_iommu_type1/parameters/allow_unsafe_interrupts"),
        unsafe_noiommu=sysfs.is_on(f"{modules}/vfio/parameters/enable_unsafe_noiommu_mode"),
    )


def _irq_chips(root: Path) -> frozenset[str]:
    """Names of the interrupt chips (Documentation/ABI/testing/sysfs-kernel-irq)."""
    numbers = sorted(int(name) for name in sysfs.listed(root / "sys/kernel/irq") if name.isdecimal())
    names = (sysfs.text_or_none(f"{root}/sys/kernel/irq/{number}/chip_name") for number in numbers[:_IRQS])
    return frozenset(name for name in names if name)


def read_displays(paths: HostPaths, gpus: Iterable[str]) -> Displays:
    """`gpus` are the functions that may be given to VMs. Raises `sysfs.OutOfResources`."""
    platform = paths.root / "sys/bus/platform/devices"
    screens = []
    for name in sorted(sysfs.listed(platform)):
        driver = sysfs.target_name_or_none(f"{platform}/{name}/driver") if name.startswith(_FRAMEBUFFERS) else None
        if driver is not None:
            # On newer kernels it lies below its GPU (sysfb_parent_dev in drivers/firmware/sysfb.c).
            above = PCI_ADDRESS.findall(os.path.realpath(platform / name))
            screens.append(Screen(name=name, driver=driver, address=above[-1] if above else None))
    boot_gpu = None
    resizable: dict[str, tuple[int, ...]] = {}
    for address in sorted(gpus):
        if sysfs.text_or_none(f"{paths.pci_devices}/{address}/boot_vga") == "1":
            boot_gpu = address
        found = [_RESIZE.fullmatch(name) for name in sysfs.listed(paths.pci_devices / address)]
        if bars := tuple(sorted(int(match[1]) for match in found if match)):
            resizable[address] = bars
    return Displays(screens=tuple(screens), boot_gpu=boot_gpu, resizable=resizable)


# The kubelet's folder


def read_kubelet_folder(folder: Path, paths: HostPaths) -> KubeletFolder:
    """Who listens there, and who has our lock. Sockets are connected to, and closed again."""
    if not folder.is_dir():
        return KubeletFolder(path=folder)
    names = sorted(name for name in sysfs.listed(folder) if _PLUGIN_SOCKET.fullmatch(name))
    locks = sysfs.text_or_none(f"{paths.root}/proc/locks", limit=_PLENTY)
    return KubeletFolder(
        path=folder,
        exists=True,
        writable=os.access(folder, os.W_OK),
        registration=peer_at(folder / "kubelet.sock"),
        plugins=tuple(name for name in names if peer_at(folder / name) is Peer.ALIVE),
        lock_holder=_lock_holder(folder / LOCK_NAME, locks or ""),
        locks_are_seen=locks is not None and not is_in_container(paths),
    )


def peer_at(path: Path) -> Peer:
    """What is at this unix socket."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return Peer.MISSING
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_PATIENCE)
            connection.connect(str(path))
    except PermissionError:
        return Peer.FORBIDDEN
    except (FileNotFoundError, NotADirectoryError):
        return Peer.MISSING
    except OSError:
        return Peer.DEAD
    return Peer.ALIVE


def _lock_holder(file: Path, locks: str) -> int | None:
    """Who has a lock on this file, by /proc/locks: `1: FLOCK  ADVISORY  WRITE 812 00:1c:4711 0 EOF` (proc_locks(5)).

    By its inode number alone: on btrfs and overlayfs the device there is another than stat(2) says.
    """
    try:
        inode = os.stat(file).st_ino
    except OSError:
        return None
    for line in locks.splitlines():
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
            return int(words[4]) if words[4].isdecimal() else 0
    return None


# Limits


def read_limits(paths: HostPaths) -> Limits:
    """Raises `sysfs.OutOfResources`."""
    root = paths.root
    own = _limits_of(f"{root}/proc/self/limits")
    files = (sysfs.text_or_none(f"{root}/proc/sys/fs/file-nr") or "").split()
    enforce = sysfs.text_or_none(f"{root}/sys/fs/selinux/enforce")
    used, runtimes = _look_at_processes(root)
    return Limits(
        inotify_instances=_number(sysfs.text_or_none(f"{root}/proc/sys/fs/inotify/max_user_instances")),
        inotify_used=used,
        descriptors=_number(own.get("Max open files")),
        files=(int(files[0]), int(files[2])) if len(files) == 3 and all(map(str.isdecimal, files)) else None,
        selinux=None if enforce is None else enforce == "1",
        domain=(sysfs.text_or_none(f"{root}/proc/self/attr/current") or "").rstrip("\0"),
        hugepages=_hugepages(root),
        memlock={name: _limits_of(f"{root}/proc/{pid}/limits").get("Max locked memory", "?") for name, pid in runtimes},
    )


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _limits_of(file: str) -> dict[str, str]:
    """Name -> soft limit, of /proc/PID/limits: columns that are two blanks or more apart."""
    lines = (sysfs.text_or_none(file) or "").splitlines()
    columns = [re.split(r"\s{2,}", line) for line in lines]
    return {parts[0]: parts[1] for parts in columns if len(parts) > 2}


def _hugepages(root: Path) -> Mapping[str, tuple[int, int]]:
    """Those of the whole machine (Documentation/admin-guide/mm/hugetlbpage.rst)."""
    found = {}
    folder = root / "sys/kernel/mm/hugepages"
    for name in sorted(sysfs.listed(folder)):
        counts = [_number(sysfs.text_or_none(f"{folder}/{name}/{each}")) for each in ("nr_hugepages", "free_hugepages")]
        found[name.removeprefix("hugepages-")] = (counts[0] or 0, counts[1] or 0)
    return found


def _look_at_processes(root: Path) -> tuple[int, list[tuple[str, str]]]:
    """How many inotify instances the user of this process has, and name and process ID of container runtimes."""
    used = 0
    runtimes = []
    for pid in sysfs.listed(root / "proc"):
        folder = f"{root}/proc/{pid}"
        if not pid.isdecimal():
            continue
        if (name := sysfs.text_or_none(f"{folder}/comm")) in _RUNTIMES:
            runtimes.append((str(name), pid))
        if _uid_of(folder) == os.geteuid():
            used += sum(_is_inotify(f"{folder}/fd/{number}") for number in sysfs.listed(f"{folder}/fd"))
    return used, runtimes


def _uid_of(folder: str) -> int | None:
    try:
        return os.stat(folder).st_uid
    except OSError:
        return None


def _is_inotify(descriptor: str) -> bool:
    try:
        return os.readlink(descriptor) in ("anon_inode:inotify", "anon_inode:[inotify]")
    except OSError:
        return False
