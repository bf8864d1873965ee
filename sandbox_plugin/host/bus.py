"""Reading what belongs to no single PCI function: which there are, the IOMMU groups, and the VFIO nodes.

All of this is called on a thread that nothing joins (`host.scan`), because any sysfs read can hang in the kernel.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sandbox_plugin.host import sysfs
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.pci_function import VFIO_DEV
from sandbox_plugin.model import IommuGroup, PciFunction


def list_addresses(paths: HostPaths) -> list[str]:
    """Addresses of all PCI functions, then UUIDs of all mediated devices, sorted.

    Raises OSError when the folder of the PCI bus cannot be listed; most machines have no mediated devices. Raises
    `sysfs.OutOfResources`.
    """
    try:
        names = sorted(os.listdir(paths.pci_devices))
    except OSError as error:
        sysfs.refuse_if_out_of_resources(error)
        raise
    return names + sorted(sysfs.listed(paths.mdev_devices))


def read_vfio_devs(paths: HostPaths) -> dict[str, str]:
    """`vfioN` -> address, or UUID, of every function that has a `vfio-dev` folder; before Linux 6.1 none has.

    `/sys/class/vfio-dev/vfioN` leads to `.../<address>/vfio-dev/vfioN`. Raises `sysfs.OutOfResources`.
    """
    devs = {}
    for name in sysfs.listed(paths.vfio_dev_class):
        with suppress(OSError, IndexError):  # it went at this moment
            devs[name] = os.readlink(f"{paths.vfio_dev_class}/{name}").split("/")[-3]
    return devs


def read_groups(
    paths: HostPaths, functions: Mapping[str, PciFunction], without_iommu: frozenset[int] = frozenset()
) -> dict[int, IommuGroup]:
    """The IOMMU groups of all functions that a vfio driver holds, with every member that sysfs lists.

    A group whose folder cannot be read has the members that `functions` shows.
    """
    seen: dict[int, set[str]] = defaultdict(set)
    for function in functions.values():
        if function.iommu_group is not None:
            seen[function.iommu_group].add(function.address)
    return {
        number: IommuGroup(
            number=number,
            members=tuple(sorted(members.union(sysfs.listed(f"{paths.iommu_groups}/{number}/devices")))),
            noiommu=number in without_iommu,
        )
        for number, members in sorted(seen.items())
        if any(functions[address].is_held_by_vfio for address in members)
    }


def group_inode(paths: HostPaths, number: int) -> int | None:
    """Tells a group's folder from one that was there before under the same number; None if there is none."""
    try:
        return os.stat(f"{paths.iommu_groups}/{number}").st_ino
    except OSError:
        return None


def read_firmware_mappings(paths: HostPaths, number: int) -> tuple[str, ...]:
    """As in `IommuGroup.firmware_mappings`. The file has a line `start end type` for each region.

    The kernel takes the group's lock for this (iommu_get_group_resv_regions in drivers/iommu/iommu.c), which whoever
    attaches the group to an IOMMU domain holds: with a dead device that may take long. Raises `sysfs.OutOfResources`.
    """
    lines = (sysfs.text_or_none(f"{paths.iommu_groups}/{number}/reserved_regions") or "").splitlines()
    regions = [line.split() for line in lines]
    return tuple(f"{region[0]}-{region[1]}" for region in regions if len(region) == 3 and region[2] == "direct")


def read_group_nodes(paths: HostPaths) -> tuple[frozenset[int], frozenset[int]]:
    """Numbers of the groups that have a node /dev/vfio/N now, and of those that have a node /dev/vfio/noiommu-N.

    vfio_group_alloc in drivers/vfio/group.c names the nodes so.
    """
    names = [name for name in sysfs.listed(paths.vfio_class) if name.isascii()]
    with_iommu = frozenset(int(name) for name in names if name.isdecimal())
    rest = [name.removeprefix("noiommu-") for name in names if name.startswith("noiommu-")]
    return with_iommu, frozenset(int(number) for number in rest if number.isdecimal())


def read_egm_gpus(paths: HostPaths) -> dict[str, frozenset[str]]:
    """As in `HostFacts.egm_gpus`. `/sys/class/egm/egmN/gpu_devices` has the PCI addresses of the GPUs of one socket;
    one that names none belongs to nobody. Raises `sysfs.OutOfResources`."""
    texts = {
        name: sysfs.text_or_none(f"{paths.egm_class}/{name}/gpu_devices") for name in sysfs.listed(paths.egm_class)
    }
    return {f"/dev/{name}": frozenset(text.lower().split()) for name, text in sorted(texts.items()) if text}


def read_kernel_has_cdevs(paths: HostPaths) -> bool:
    """Whether /proc/devices shows that this kernel makes VFIO cdevs.

    vfio_cdev_init in drivers/vfio/device_cdev.c registers the character devices named `vfio-dev`. /proc/devices is not
    namespaced, so a container sees the host's.
    """
    text = sysfs.text_or_none(str(paths.devices_list), limit=65536) or ""
    return any(line.split()[1:] == ["vfio-dev"] for line in text.splitlines())


def read_dev_nodes(paths: HostPaths) -> frozenset[str] | None:
    """VFIO nodes that the host's live /dev shows, or None where only a copy of it, or nothing, is visible."""
    if not _dev_vfio_is_live(paths):
        return None
    names = [name for name in sysfs.listed(paths.dev_vfio) if name.isdecimal()]
    names += [f"devices/{name}" for name in sysfs.listed(paths.dev_vfio / "devices") if VFIO_DEV.fullmatch(name)]
    return frozenset(f"/dev/vfio/{name}" for name in names)


def _dev_vfio_is_live(paths: HostPaths) -> bool:
    """A container's own /dev is a copy made at its start and proves nothing; a devtmpfs is the kernel's own.

    A bind mount of a /dev/vfio that was removed and made again (rmmod vfio) stays empty; mountinfo marks its
    root as deleted (Documentation/filesystems/proc.rst, section 3.5).
    """
    if paths.root != Path("/"):
        return paths.dev.is_dir()
    best = ""
    live = False
    for line in (sysfs.text_or_none(str(paths.mountinfo), limit=1 << 20) or "").splitlines():
        fields, _, tail = line.partition(" - ")
        parts = fields.split()
        if len(parts) < 5 or not tail:
            continue
        mount_root, mount_point = parts[3], parts[4]
        if mount_point in ("/", "/dev", "/dev/vfio") and len(mount_point) >= len(best):
            best, live = mount_point, tail.split()[0] == "devtmpfs" and not mount_root.endswith("//deleted")
    return live
