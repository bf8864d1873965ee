"""Who on the host uses PCI functions that a host driver has: what can be known without opening a device.

Processes are those that this one may see: in a container without the host's PID namespace none of the host's. What is
left then is the reference count of NVIDIA's module, which every open device raises. Every call blocks, and may hang in
the kernel.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable

from sandbox_plugin.host import sysfs
from sandbox_plugin.host.namespaces import is_the_hosts
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.model import PciFunction

_IFF_UP = 1
"""Of include/uapi/linux/if.h."""
_NVIDIA_DRIVERS = {"nvidia": re.compile(r"nvidia\d+"), "nvidia-nvswitch": re.compile(r"nvidia-nvswitch\d+")}
"""Driver -> the names of its nodes in /dev. Which node is which function's is told only by /proc/driver/nvidia."""


def read_users(paths: HostPaths, functions: Iterable[PciFunction]) -> dict[str, tuple[str, ...]]:
    """Address -> who uses the function, in words. Functions that nobody is seen to use are not in it.

    Raises `sysfs.OutOfResources`.
    """
    openers = _openers(paths)
    mounted = _mounted(paths)
    users = {}
    for function in functions:
        folder = f"{paths.pci_devices}/{function.address}"
        found = [*_screens(folder), *_networks(folder), *_disks(folder, mounted)]
        for name in _nodes(paths, folder, function, openers):
            found += [f"{process} has {name} open" for process in openers[name]]
        if not sees_processes(paths) and function.driver in _NVIDIA_DRIVERS:
            found += _references(paths)
        if found:
            users[function.address] = tuple(found)
    return users


def sees_processes(paths: HostPaths) -> bool:
    """Whether the host's processes can be seen from here."""
    return is_the_hosts(paths, "pid") is True


def _openers(paths: HostPaths) -> dict[str, list[str]]:
    """Path below /dev of what is open -> the processes that have it open: `nvidia-smi (4711)`."""
    openers: dict[str, list[str]] = defaultdict(list)
    for process in sorted(sysfs.listed(paths.root / "proc")):
        if not process.isdecimal():
            continue
        folder = f"{paths.root}/proc/{process}"
        opened = {_target(f"{folder}/fd/{number}") for number in sysfs.listed(f"{folder}/fd")}
        for path in opened:
            if path.startswith("/dev/"):
                name = sysfs.text_or_none(f"{folder}/comm") or "a process"
                openers[path].append(f"{name} ({process})")
    return openers


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError as error:
        sysfs.refuse_if_out_of_resources(error)
        return ""  # it was closed at this moment


def _nodes(paths: HostPaths, folder: str, function: PciFunction, openers: Iterable[str]) -> list[str]:
    """Which of the nodes that are open belong to a function."""
    names = {f"/dev/dri/{name}" for name in sysfs.listed(f"{folder}/drm")}
    cards = [name.removeprefix("card") for name in sysfs.listed(f"{folder}/sound") if name.startswith("card")]
    sounds = re.compile(rf"/dev/snd/(?:control|pcm|hw|midi)C(?:{'|'.join(cards)})(?:D.*)?") if cards else None
    minor = _nvidia_minor(paths, function.address)
    pattern = _NVIDIA_DRIVERS.get(function.driver or "")
    return sorted(
        path
        for path in openers
        if path in names
        or (sounds is not None and sounds.fullmatch(path))
        or (minor is not None and path == f"/dev/nvidia{minor}")
        or (minor is None and pattern is not None and pattern.fullmatch(path.removeprefix("/dev/")))
    )


def _nvidia_minor(paths: HostPaths, address: str) -> str | None:
    """N of /dev/nvidiaN, as NVIDIA's driver tells; None where it does not."""
    text = sysfs.text_or_none(f"{paths.root}/proc/driver/nvidia/gpus/{address}/information") or ""
    match = re.search(r"^Device Minor:\s*(\d+)", text, re.MULTILINE)
    return match[1] if match else None


def _references(paths: HostPaths) -> list[str]:
    """What the count of NVIDIA's module says of all its devices together: other modules count too, and are known."""
    module = f"{paths.root}/sys/module/nvidia"
    count = sysfs.text_or_none(f"{module}/refcnt") or ""
    holders = len(sysfs.listed(f"{module}/holders"))
    if count.isdecimal() and int(count) > holders:
        return [f"something has a device of the module nvidia open (refcnt {count}, {holders} of it other modules)"]
    return []


def _screens(folder: str) -> list[str]:
    """`boot_vga` is 1 for the display that the firmware left on (drivers/pci/pci-sysfs.c)."""
    found = ["it is the display that this machine booted with"] if _reads(f"{folder}/boot_vga", "1") else []
    return found + [f"it has a framebuffer, {name}" for name in sorted(sysfs.listed(f"{folder}/graphics"))]


def _networks(folder: str) -> list[str]:
    found = []
    for name in sorted(sysfs.listed(f"{folder}/net")):
        flags = sysfs.text_or_none(f"{folder}/net/{name}/flags") or "0"
        if int(flags, 16) & _IFF_UP:
            found.append(f"the network interface {name} is up")
    return found


def _disks(folder: str, mounted: frozenset[str]) -> list[str]:
    """NVMe disks with a file system that is mounted, or with a volume on them."""
    found = []
    for controller in sorted(sysfs.listed(f"{folder}/nvme")):
        top = f"{folder}/nvme/{controller}"
        for disk in (name for name in sorted(sysfs.listed(top)) if name.startswith("nvme")):
            for part in ("", *(name for name in sorted(sysfs.listed(f"{top}/{disk}")) if name.startswith(disk))):
                place = f"{top}/{disk}/{part}".rstrip("/")
                if sysfs.text_or_none(f"{place}/dev") in mounted:
                    found.append(f"{part or disk} is mounted")
                if sysfs.listed(f"{place}/holders"):
                    found.append(f"a volume is on {part or disk}")
    return found


def _mounted(paths: HostPaths) -> frozenset[str]:
    """`major:minor` of the file systems that the host has mounted, or this container, where only that can be seen."""
    for process in ("1", "self"):
        text = sysfs.text_or_none(f"{paths.root}/proc/{process}/mountinfo", limit=1 << 20)
        if text:
            return frozenset(line.split()[2] for line in text.splitlines())
    return frozenset()


def _reads(path: str, text: str) -> bool:
    return sysfs.text_or_none(path) == text
