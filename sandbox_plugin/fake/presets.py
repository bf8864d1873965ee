"""The presets: machines as data, after the PCI topologies of real ones, and one that is invented.

A new machine is a few more lines here: models (`models.py`), the buses they hang on in the order in which a kernel
finds them, and an entry in `PRESETS`. Nothing else knows any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from sandbox_plugin.fake import models
from sandbox_plugin.fake.hardware import At, Kernel, Model, PcieLink, Preset, RootBus, VgpuCard, VgpuType

WITH_CDEVS = Kernel(cdevs=True)
"""Built with IOMMUFD and VFIO cdevs."""
GROUPS_ONLY = Kernel(cdevs=False)
"""As Debian and most distributions build it."""


def _dgx_branch(root: str, switch: str, fan: str, nic: str, inner: str, inner_fan: str, gpu: str) -> tuple[At, ...]:
    """One of the eight branches of a DGX H100, by the numbers of its buses: a NIC, and a switch more to the GPU."""
    below = At(f"{inner}:00.0", models.CONNECTX7_SWITCH, (At(f"{inner_fan}:00.0", models.CONNECTX7_SWITCH, (
        At(f"{gpu}:00.0", models.H100_SXM5, vfio="vfio-pci"),
    )),))  # fmt: skip
    return (
        At(f"{root}:00.0", models.XEON_MEMORY_MAP),
        At(f"{root}:01.0", models.XEON_ROOT_PORT, (
            At(f"{switch}:00.0", models.CONNECTX7_SWITCH, (
                At(f"{fan}:00.0", models.CONNECTX7_SWITCH, (At(f"{nic}:00.0", models.CONNECTX7),)),
                At(f"{fan}:02.0", models.CONNECTX7_SWITCH, (below,)),
            )),
        )),
    )  # fmt: skip


def _dgx_bus(numa_node: int, *buses: str) -> RootBus:
    return RootBus(name=f"pci0000:{buses[0]}", numa_node=numa_node, functions=_dgx_branch(*buses))


_NVSWITCH_BUS = RootBus(
    name="pci0000:00",
    numa_node=0,
    functions=(
        At("00:00.0", models.XEON_MEMORY_MAP),
        At("00:1c.0", models.XEON_PCH_ROOT_PORT, (
            At("05:00.0", models.NVSWITCH3_HUB, tuple(
                At(f"06:0{port}.0", models.NVSWITCH3_HUB, (At(f"{bus}:00.0", models.NVSWITCH3, vfio="vfio-pci"),))
                for port, bus in enumerate(("07", "08", "09", "0a"))
            ), group="hub"),
            At("05:00.1", models.NVSWITCH3_HUB_MANAGEMENT, group="hub"),
        )),
    ),
)  # fmt: skip

_HGX_H100 = Preset(
    summary="DGX H100: 8 H100 SXM5 over two sockets behind PCIe switches, 4 NVSwitches; kernel with VFIO cdevs",
    kernel=WITH_CDEVS,
    buses=(
        _NVSWITCH_BUS,
        _dgx_bus(0, "15", "16", "17", "18", "19", "1a", "1b"),
        _dgx_bus(0, "3d", "3e", "3f", "40", "41", "42", "43"),
        _dgx_bus(0, "4c", "4d", "4e", "4f", "50", "51", "52"),
        _dgx_bus(0, "5b", "5c", "5d", "5e", "5f", "60", "61"),
        _dgx_bus(1, "97", "98", "99", "9a", "9b", "9c", "9d"),
        _dgx_bus(1, "bd", "be", "bf", "c0", "c1", "c2", "c3"),
        _dgx_bus(1, "cb", "cc", "cd", "ce", "cf", "d0", "d1"),
        _dgx_bus(1, "d9", "da", "db", "dc", "dd", "de", "df"),
    ),
)


def _switched(numa_node: int, root: str, switch: str, fan: str, *gpus: str, model: Model) -> RootBus:
    """A host bridge with one switch and the GPUs on it, by bus numbers. Which of its ports lead to them is a guess."""
    ports = tuple(
        At(f"{fan}:{port:02x}.0", models.PEX89000, (At(f"{gpu}:00.0", model, vfio="vfio-pci"),))
        for port, gpu in enumerate(gpus)
    )
    return RootBus(
        name=f"pci0000:{root}",
        numa_node=numa_node,
        functions=(
            At(f"{root}:00.0", models.GENOA_HOST_BRIDGE),
            At(f"{root}:01.1", models.GENOA_ROOT_PORT, (At(f"{switch}:00.0", models.PEX89000, ports),)),
        ),
    )


def _slots(numa_node: int, root: str, *gpus: str, model: Model, vfio: str | None = "vfio-pci") -> RootBus:
    """A host bridge with a root port for each GPU, by bus numbers."""
    return RootBus(
        name=f"pci0000:{root}",
        numa_node=numa_node,
        functions=(
            At(f"{root}:00.0", models.GENOA_HOST_BRIDGE),
            *(
                At(f"{root}:01.{port}", models.GENOA_ROOT_PORT, (At(f"{gpu}:00.0", model, vfio=vfio),))
                for port, gpu in enumerate(gpus, start=1)
            ),
        ),
    )


_RTX_PRO_6000 = Preset(
    summary="8 RTX PRO 6000 over two sockets, two on each PCIe switch; kernel with VFIO cdevs",
    kernel=replace(WITH_CDEVS, iommu="ivhd"),
    buses=(
        _switched(0, "10", "11", "12", "16", "17", model=models.RTX_PRO_6000),
        _switched(0, "70", "71", "72", "75", "76", model=models.RTX_PRO_6000),
        _switched(1, "80", "81", "82", "84", "85", model=models.RTX_PRO_6000),
        _switched(1, "f0", "f1", "f2", "f4", "f5", model=models.RTX_PRO_6000),
    ),
)

_UNEVEN = Preset(
    summary="invented: 8 L40S, 3 on one socket and 5 on the other, in slots and on switches; kernel with VFIO cdevs",
    kernel=replace(WITH_CDEVS, iommu="ivhd"),
    buses=(
        _slots(0, "20", "21", "22", model=models.L40S),
        _slots(0, "40", "41", model=models.L40S),
        _switched(1, "a0", "a1", "a2", "a3", "a4", "a5", model=models.L40S),
        _slots(1, "c0", "c1", "c2", model=models.L40S),
    ),
)

_L40S_TYPES = (
    VgpuType(1153, "NVIDIA L40S-12Q", fits=4),
    VgpuType(1155, "NVIDIA L40S-24Q", fits=2),
    VgpuType(1156, "NVIDIA L40S-48Q", fits=1),
)
"""The names are real. Numbers are the driver's choice, and these are invented."""
_OTHER_L40S_TYPES = (VgpuType(1155, "NVIDIA L40S-48Q", fits=1), VgpuType(1156, "NVIDIA L40S-24Q", fits=2))
"""Of a card whose numbers mean other types: they are a card's own."""

_VGPU = Preset(
    summary="invented: vGPUs of 2 L40S on driver nvidia, one card full, and 1 L40S on vfio-pci; kernel with VFIO cdevs",
    kernel=WITH_CDEVS,
    buses=(
        _slots(0, "20", "21", "22", model=models.L40S, vfio=None),
        _slots(1, "c0", "c1", model=models.L40S),
    ),
    vgpu_cards=(
        VgpuCard(address="0000:21:00.0", types=_L40S_TYPES, functions=(1155, 0, 0, 0)),
        VgpuCard(address="0000:22:00.0", types=_OTHER_L40S_TYPES, functions=(1156, 1156)),
    ),
)

_WORKSTATION = Preset(
    summary="desktop: a GeForce GTX 1660 Super with audio, USB and USB-C in its group, and a T4; kernel without cdevs",
    kernel=replace(GROUPS_ONLY, first_group=10),
    buses=(
        RootBus(
            name="pci0000:00",
            functions=(
                At("00:00.0", models.COFFEE_LAKE_HOST_BRIDGE),
                At("00:01.0", models.COFFEE_LAKE_ROOT_PORT, (
                    At("01:00.0", models.GTX_1660_SUPER, vfio="vfio-pci", group="geforce"),
                    At("01:00.1", models.GTX_1660_AUDIO, vfio="vfio-pci", group="geforce"),
                    At("01:00.2", models.GTX_1660_USB, vfio="vfio-pci", group="geforce"),
                    At("01:00.3", models.GTX_1660_USB_C, vfio="vfio-pci", group="geforce"),
                ), group="geforce"),
                At("00:1b.0", models.Z390_ROOT_PORT, (
                    At("02:00.0", models.T4, vfio="vfio-pci", link=PcieLink(speed="8.0 GT/s PCIe", width=4)),
                )),
                At("00:1f.0", models.Z390_LPC, group="chipset"),
                At("00:1f.3", models.Z390_AUDIO, group="chipset"),
                At("00:1f.4", models.Z390_SMBUS, group="chipset"),
                At("00:1f.6", models.I219_V, group="chipset"),
            ),
        ),
    ),
)  # fmt: skip

_GH200 = Preset(
    summary="Grace Hopper: a GH200 on nvgrace_gpu_vfio_pci in PCI domain 0009, and a NIC; kernel with VFIO cdevs",
    kernel=replace(WITH_CDEVS, first_group=10, iommu="smmu3"),
    egm={"egm0": ("0009:01:00.0",)},
    buses=(
        RootBus(
            name="pci0000:00",
            numa_node=0,
            functions=(At("00:00.0", models.GRACE_ROOT_PORT, (At("01:00.0", models.CONNECTX7),)),),
        ),
        RootBus(
            name="pci0009:00",
            numa_node=0,
            functions=(
                At("00:00.0", models.GRACE_ROOT_PORT, (At("01:00.0", models.GH200, vfio="nvgrace_gpu_vfio_pci"),)),
            ),
        ),
    ),
)

_EMPTY = Preset(
    summary="a server without a GPU: bridges, a NIC and the graphics of its management controller; vfio not loaded",
    kernel=replace(WITH_CDEVS, vfio_loaded=False, iommu="ivhd"),
    buses=(
        RootBus(
            name="pci0000:40",
            numa_node=0,
            functions=(
                At("40:00.0", models.EPYC_HOST_BRIDGE),
                At("40:01.1", models.EPYC_ROOT_PORT, (
                    At("41:00.0", models.X710),
                    At("41:00.1", models.X710),
                )),
                At("40:03.1", models.EPYC_ROOT_PORT),
                At("40:05.1", models.EPYC_ROOT_PORT, (
                    At("43:00.0", models.AST1150, (
                        At("44:00.0", models.AST2500_GRAPHICS, group="management"),
                    ), group="management"),
                )),
            ),
        ),
    ),
)  # fmt: skip

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "hgx-h100": _HGX_H100,
        "hgx-h100-group": replace(
            _HGX_H100,
            summary="the same DGX H100 on a kernel without VFIO cdevs: devices are IOMMU groups",
            kernel=GROUPS_ONLY,
        ),
        "rtx-pro-6000": _RTX_PRO_6000,
        "uneven": _UNEVEN,
        "vgpu": _VGPU,
        "workstation": _WORKSTATION,
        "gh200": _GH200,
        "empty": _EMPTY,
    }
)
"""By the name that `fake-node create` takes."""
