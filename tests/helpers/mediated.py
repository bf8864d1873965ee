"""Mediated devices (vGPUs) on a fake node."""

from __future__ import annotations

import os
import shutil
import uuid

from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.fake.tree import create_link
from sandbox_plugin.fake.vfio import Vfio


class Mediated:
    """Mediated devices on one function of a fake node, made and removed as the mdev core and vfio do.

    The carrier is a function's address, or the path of another device below `sys/devices`.
    """

    def __init__(self, node: FakeNode, carrier: str) -> None:
        self._node = node
        self._sys = node.root.absolute() / "sys"
        self._carrier = self._sys / "devices" / carrier if "/" in carrier else node.folder(carrier)
        self._vfio = Vfio(str(node.root.absolute()), node.kernel, "")

    def add(self, number: int, kind: str, name: str, group: int) -> str:
        """`number` of vfio_mdev's; `kind` is the type's folder and `name` what its file `name` says."""
        address = str(uuid.UUID(int=number))
        folder = self._carrier / address
        types = self._carrier / "mdev_supported_types" / kind
        if not types.exists():  # never written again: of those that have the type a scan would read an empty name
            types.mkdir(parents=True)
            (types / "name").write_text(f"{name}\n")
        folder.mkdir()
        create_link(f"{folder}/mdev_type", str(types))
        devices = self._sys / f"kernel/iommu_groups/{group}/devices"
        devices.mkdir(parents=True)
        create_link(f"{devices}/{address}", str(folder))
        create_link(f"{folder}/iommu_group", str(devices.parent))
        (self._sys / "bus/mdev/devices").mkdir(parents=True, exist_ok=True)
        create_link(f"{self._sys}/bus/mdev/devices/{address}", str(folder))
        driver = self._sys / "bus/mdev/drivers/nvidia-vgpu-vfio"
        driver.mkdir(parents=True, exist_ok=True)
        create_link(f"{folder}/driver", str(driver))
        self._vfio.register(str(folder), group, set())
        return address

    def remove(self, address: str) -> None:
        folder = self._carrier / address
        group = int(os.readlink(folder / "iommu_group").rpartition("/")[2])
        (folder / "driver").unlink()
        self._vfio.remove_device(str(folder))
        self._vfio.remove_group(group)
        (self._sys / f"bus/mdev/devices/{address}").unlink()
        shutil.rmtree(self._sys / f"kernel/iommu_groups/{group}")
        shutil.rmtree(folder)

    def node_of(self, address: str) -> dict[str, str]:
        """ID -> path."""
        if self._node.kernel.cdevs:
            (name,) = os.listdir(self._carrier / address / "vfio-dev")
            return {name.removeprefix("vfio"): f"/dev/vfio/devices/{name}"}
        group = os.readlink(self._carrier / address / "iommu_group").rpartition("/")[2]
        return {group: f"/dev/vfio/{group}"}
