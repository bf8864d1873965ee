"""The presets: machines as data, after the PCI topologies of real ones, and one that is invented.

A new machine is a few more lines here: models (what `lspci -nnvv` says), the buses they hang on in the order in which
a kernel finds them, and an entry in `PRESETS`. Nothing else knows any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from sandbox_plugin.fake.hardware import (
    GIB,
    KIB,
    MIB,
    At,
    Kernel,
    Link,
    Model,
    NumaNode,
    Preset,
    RootBus,
    Sriov,
)
from sandbox_plugin.model import Bar


def _mem32(index: int, size: int) -> Bar:
    return Bar(index=index, size=size, prefetchable=False, wide=False, io=False)


def _mem64(index: int, size: int, *, prefetchable: bool = True) -> Bar:
    return Bar(index=index, size=size, prefetchable=prefetchable, wide=True, io=False)


def _ports(index: int, size: int) -> Bar:
    return Bar(index=index, size=size, prefetchable=False, wide=False, io=True)


def _link(gigatransfers: str, width: int) -> Link:
    return Link(speed=f"{gigatransfers} GT/s PCIe", width=width)


# Kernels

WITH_CDEVS = Kernel(cdevs=True, group_major=254, cdev_major=253, iommu="dmar0", first_group=40)
"""Built with IOMMUFD and VFIO cdevs."""
GROUPS_ONLY = Kernel(cdevs=False, group_major=245, cdev_major=0, iommu="dmar0", first_group=40)
"""As Debian and most distributions build it."""

# Models

XEON_MEMORY_MAP = Model(vendor=0x8086, device=0x09A2, class_code=0x088000, revision=0x20)
XEON_ROOT_PORT = Model(
    vendor=0x8086, device=0x352A, class_code=0x060400, revision=0x04, max_link=_link("32.0", 16), host_driver="pcieport"
)
XEON_PCH_ROOT_PORT = Model(
    # which root port the NVSwitches' hub hangs on is not known
    vendor=0x8086,
    device=0x1BB8,
    class_code=0x060400,
    revision=0x11,
    max_link=_link("8.0", 4),
    host_driver="pcieport",
)
CONNECTX7_SWITCH = Model(
    vendor=0x15B3, device=0x1979, class_code=0x060400, max_link=_link("32.0", 16), host_driver="pcieport"
)
CONNECTX7 = Model(
    vendor=0x15B3,
    device=0x1021,
    class_code=0x020700,
    subsystem=(0x15B3, 0x0041),
    bars=(_mem64(0, 32 * MIB),),
    max_link=_link("32.0", 16),
    aer=True,
    host_driver="mlx5_core",
)
H100_SXM5 = Model(
    vendor=0x10DE,
    device=0x2330,
    class_code=0x030200,
    revision=0xA1,
    subsystem=(0x10DE, 0x16C1),
    bars=(_mem64(0, 16 * MIB), _mem64(2, 128 * GIB), _mem64(4, 32 * MIB)),
    max_link=_link("32.0", 16),
    aer=True,
    sriov=Sriov(total_vfs=20, offset=4, vf_device=0),  # it has SR-IOV; how many functions is a guess
    host_driver="nvidia",
)
NVSWITCH3_HUB = Model(
    vendor=0x11F8, device=0x4128, class_code=0x060400, max_link=_link("16.0", 4), host_driver="pcieport"
)
NVSWITCH3_HUB_MANAGEMENT = Model(
    vendor=0x11F8,
    device=0x4128,
    class_code=0x058000,
    bars=(_mem64(0, 4 * MIB),),
    max_link=_link("16.0", 4),
)
NVSWITCH3 = Model(
    vendor=0x10DE,
    device=0x22A3,
    class_code=0x068000,
    revision=0xA1,
    subsystem=(0x10DE, 0x1796),
    bars=(_mem32(0, 32 * MIB),),
    max_link=_link("16.0", 2),
    aer=True,
    host_driver="nvidia-nvswitch",
)
COFFEE_LAKE_HOST_BRIDGE = Model(vendor=0x8086, device=0x3E30, class_code=0x060000, revision=0x0D)
COFFEE_LAKE_ROOT_PORT = Model(
    vendor=0x8086, device=0x1901, class_code=0x060400, revision=0x0D, max_link=_link("8.0", 16), host_driver="pcieport"
)
Z390_ROOT_PORT = Model(
    vendor=0x8086, device=0xA340, class_code=0x060400, revision=0xF0, max_link=_link("8.0", 4), host_driver="pcieport"
)
Z390_LPC = Model(vendor=0x8086, device=0xA305, class_code=0x060100, revision=0x10)
Z390_AUDIO = Model(
    vendor=0x8086,
    device=0xA348,
    class_code=0x040300,
    revision=0x10,
    bars=(_mem64(0, 16 * KIB, prefetchable=False), _mem64(4, 1 * MIB, prefetchable=False)),
    host_driver="snd_hda_intel",
)
Z390_SMBUS = Model(
    vendor=0x8086,
    device=0xA323,
    class_code=0x0C0500,
    revision=0x10,
    bars=(_mem64(0, 256, prefetchable=False), _ports(4, 32)),
    host_driver="i801_smbus",
)
I219_V = Model(
    vendor=0x8086,
    device=0x15BC,
    class_code=0x020000,
    revision=0x10,
    bars=(_mem32(0, 128 * KIB),),
    host_driver="e1000e",
)
GTX_1660_SUPER = Model(
    vendor=0x10DE,
    device=0x21C4,
    class_code=0x030000,
    revision=0xA1,
    subsystem=(0x1458, 0x4014),
    bars=(_mem32(0, 16 * MIB), _mem64(1, 256 * MIB), _mem64(3, 32 * MIB), _ports(5, 128), _mem32(6, 512 * KIB)),
    max_link=_link("8.0", 16),
    aer=True,
    host_driver="nvidia",
)
GTX_1660_AUDIO = Model(
    vendor=0x10DE,
    device=0x1AEB,
    class_code=0x040300,
    revision=0xA1,
    subsystem=(0x1458, 0x4014),
    bars=(_mem32(0, 16 * KIB),),
    max_link=_link("8.0", 16),
    aer=True,
    host_driver="snd_hda_intel",
)
GTX_1660_USB = Model(
    vendor=0x10DE,
    device=0x1AEC,
    class_code=0x0C0330,
    revision=0xA1,
    subsystem=(0x1458, 0x4014),
    bars=(_mem64(0, 256 * KIB), _mem64(3, 64 * KIB)),
    max_link=_link("8.0", 16),
    aer=True,
    host_driver="xhci_hcd",
)
GTX_1660_USB_C = Model(
    vendor=0x10DE,
    device=0x1AED,
    class_code=0x0C8000,
    revision=0xA1,
    subsystem=(0x1458, 0x4014),
    bars=(_mem32(0, 4 * KIB),),
    max_link=_link("8.0", 16),
    aer=True,
    host_driver="nvidia-gpu",
)
T4 = Model(
    vendor=0x10DE,
    device=0x1EB8,
    class_code=0x030200,
    revision=0xA1,
    subsystem=(0x10DE, 0x12A2),
    bars=(_mem32(0, 16 * MIB), _mem64(1, 256 * MIB), _mem64(3, 32 * MIB)),
    max_link=_link("8.0", 16),
    aer=True,
    sriov=Sriov(
        total_vfs=16,
        offset=4,
        vf_device=0,
        vf_bars=(_mem32(0, 256 * KIB), _mem64(1, 256 * MIB), _mem64(3, 32 * MIB)),
    ),
    host_driver="nvidia",
)
GRACE_ROOT_PORT = Model(
    vendor=0x10DE, device=0x22B1, class_code=0x060400, max_link=_link("32.0", 16), host_driver="pcieport"
)
GH200 = Model(
    vendor=0x10DE,
    device=0x2342,
    class_code=0x030200,
    revision=0xA1,
    subsystem=(0x10DE, 0x16EB),
    bars=(_mem64(0, 16 * MIB), _mem64(2, 128 * GIB), _mem64(4, 32 * MIB)),
    max_link=_link("32.0", 16),
    aer=True,
    host_driver="nvidia",
)
EPYC_HOST_BRIDGE = Model(vendor=0x1022, device=0x1482, class_code=0x060000)
EPYC_ROOT_PORT = Model(
    vendor=0x1022, device=0x1483, class_code=0x060400, max_link=_link("16.0", 16), host_driver="pcieport"
)
GENOA_HOST_BRIDGE = Model(vendor=0x1022, device=0x14A4, class_code=0x060000)
GENOA_ROOT_PORT = Model(
    vendor=0x1022, device=0x14AB, class_code=0x060400, max_link=_link("32.0", 16), host_driver="pcieport"
)
PEX89000 = Model(vendor=0x1000, device=0xC030, class_code=0x060400, max_link=_link("32.0", 16), host_driver="pcieport")
RTX_PRO_6000 = Model(
    vendor=0x10DE,
    device=0x2BB5,
    class_code=0x030200,
    revision=0xA1,
    bars=(_mem64(0, 64 * MIB), _mem64(2, 128 * GIB), _mem64(4, 32 * MIB)),
    max_link=_link("32.0", 16),
    aer=True,
    host_driver="nvidia",
)
L40S = Model(
    vendor=0x10DE,
    device=0x26B9,
    class_code=0x030200,
    revision=0xA1,
    subsystem=(0x10DE, 0x1851),
    bars=(_mem32(0, 16 * MIB), _mem64(1, 64 * GIB), _mem64(3, 32 * MIB)),
    max_link=_link("16.0", 16),
    aer=True,
    host_driver="nvidia",
)
X710 = Model(
    vendor=0x8086,
    device=0x1572,
    class_code=0x020000,
    revision=0x02,
    subsystem=(0x8086, 0x0007),
    bars=(_mem64(0, 8 * MIB), _mem64(3, 32 * KIB), _mem32(6, 512 * KIB)),
    max_link=_link("8.0", 8),
    aer=True,
    host_driver="i40e",
)
AST1150 = Model(vendor=0x1A03, device=0x1150, class_code=0x060400, revision=0x04, max_link=_link("5.0", 1))
"""PCIe to conventional PCI: what is behind it shares its IOMMU group."""
AST2500_GRAPHICS = Model(
    vendor=0x1A03,
    device=0x2000,
    class_code=0x030000,
    revision=0x41,
    bars=(_mem32(0, 64 * MIB), _mem32(1, 128 * KIB), _ports(2, 128)),
    host_driver="ast",
)

# Machines


def _dgx_branch(root: str, switch: str, fan: str, nic: str, inner: str, inner_fan: str, gpu: str) -> tuple[At, ...]:
    """One of the eight branches of a DGX H100, by the numbers of its buses: a NIC, and a switch more to the GPU."""
    below = At(f"{inner}:00.0", CONNECTX7_SWITCH, (At(f"{inner_fan}:00.0", CONNECTX7_SWITCH, (
        At(f"{gpu}:00.0", H100_SXM5, vfio="vfio-pci"),
    )),))  # fmt: skip
    return (
        At(f"{root}:00.0", XEON_MEMORY_MAP),
        At(f"{root}:01.0", XEON_ROOT_PORT, (
            At(f"{switch}:00.0", CONNECTX7_SWITCH, (
                At(f"{fan}:00.0", CONNECTX7_SWITCH, (At(f"{nic}:00.0", CONNECTX7),)),
                At(f"{fan}:02.0", CONNECTX7_SWITCH, (below,)),
            )),
        )),
    )  # fmt: skip


def _dgx_bus(numa_node: int, *buses: str) -> RootBus:
    return RootBus(name=f"pci0000:{buses[0]}", numa_node=numa_node, functions=_dgx_branch(*buses))


_NVSWITCH_BUS = RootBus(
    name="pci0000:00",
    numa_node=0,
    functions=(
        At("00:00.0", XEON_MEMORY_MAP),
        At("00:1c.0", XEON_PCH_ROOT_PORT, (
            At("05:00.0", NVSWITCH3_HUB, tuple(
                At(f"06:0{port}.0", NVSWITCH3_HUB, (At(f"{bus}:00.0", NVSWITCH3, vfio="vfio-pci"),))
                for port, bus in enumerate(("07", "08", "09", "0a"))
            ), group="hub"),
            At("05:00.1", NVSWITCH3_HUB_MANAGEMENT, group="hub"),
        )),
    ),
)  # fmt: skip

_HGX_H100 = Preset(
    summary="DGX H100: 8 H100 SXM5 over two sockets behind PCIe switches, 4 NVSwitches; kernel with VFIO cdevs",
    kernel=WITH_CDEVS,
    nodes=(NumaNode(number=0, cpulist="0-55,112-167"), NumaNode(number=1, cpulist="56-111,168-223")),
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
        At(f"{fan}:{port:02x}.0", PEX89000, (At(f"{gpu}:00.0", model, vfio="vfio-pci"),))
        for port, gpu in enumerate(gpus)
    )
    return RootBus(
        name=f"pci0000:{root}",
        numa_node=numa_node,
        functions=(
            At(f"{root}:00.0", GENOA_HOST_BRIDGE),
            At(f"{root}:01.1", GENOA_ROOT_PORT, (At(f"{switch}:00.0", PEX89000, ports),)),
        ),
    )


def _slots(numa_node: int, root: str, *gpus: str, model: Model) -> RootBus:
    """A host bridge with a root port for each GPU, by bus numbers."""
    return RootBus(
        name=f"pci0000:{root}",
        numa_node=numa_node,
        functions=(
            At(f"{root}:00.0", GENOA_HOST_BRIDGE),
            *(
                At(f"{root}:01.{port}", GENOA_ROOT_PORT, (At(f"{gpu}:00.0", model, vfio="vfio-pci"),))
                for port, gpu in enumerate(gpus, start=1)
            ),
        ),
    )


_TWO_EPYCS = (NumaNode(number=0, cpulist="0-63,128-191"), NumaNode(number=1, cpulist="64-127,192-255"))

_RTX_PRO_6000 = Preset(
    summary="8 RTX PRO 6000 over two sockets, two on each PCIe switch; kernel with VFIO cdevs",
    kernel=replace(WITH_CDEVS, iommu="ivhd0"),
    nodes=_TWO_EPYCS,
    buses=(
        _switched(0, "10", "11", "12", "16", "17", model=RTX_PRO_6000),
        _switched(0, "70", "71", "72", "75", "76", model=RTX_PRO_6000),
        _switched(1, "80", "81", "82", "84", "85", model=RTX_PRO_6000),
        _switched(1, "f0", "f1", "f2", "f4", "f5", model=RTX_PRO_6000),
    ),
)

_UNEVEN = Preset(
    summary="invented: 8 L40S, 3 on one socket and 5 on the other, in slots and on switches; kernel with VFIO cdevs",
    kernel=replace(WITH_CDEVS, iommu="ivhd0"),
    nodes=_TWO_EPYCS,
    buses=(
        _slots(0, "20", "21", "22", model=L40S),
        _slots(0, "40", "41", model=L40S),
        _switched(1, "a0", "a1", "a2", "a3", "a4", "a5", model=L40S),
        _slots(1, "c0", "c1", "c2", model=L40S),
    ),
)

_WORKSTATION = Preset(
    summary="desktop: a GeForce GTX 1660 Super with audio, USB and USB-C in its group, and a T4; kernel without cdevs",
    kernel=replace(GROUPS_ONLY, first_group=10),
    nodes=(NumaNode(number=0, cpulist="0-15"),),
    buses=(
        RootBus(
            name="pci0000:00",
            functions=(
                At("00:00.0", COFFEE_LAKE_HOST_BRIDGE),
                At("00:01.0", COFFEE_LAKE_ROOT_PORT, (
                    At("01:00.0", GTX_1660_SUPER, vfio="vfio-pci", group="geforce"),
                    At("01:00.1", GTX_1660_AUDIO, vfio="vfio-pci", group="geforce"),
                    At("01:00.2", GTX_1660_USB, vfio="vfio-pci", group="geforce"),
                    At("01:00.3", GTX_1660_USB_C, vfio="vfio-pci", group="geforce"),
                ), group="geforce"),
                At("00:1b.0", Z390_ROOT_PORT, (
                    At("02:00.0", T4, vfio="vfio-pci", link=_link("8.0", 4)),
                )),
                At("00:1f.0", Z390_LPC, group="chipset"),
                At("00:1f.3", Z390_AUDIO, group="chipset"),
                At("00:1f.4", Z390_SMBUS, group="chipset"),
                At("00:1f.6", I219_V, group="chipset"),
            ),
        ),
    ),
)  # fmt: skip

_GH200 = Preset(
    summary="Grace Hopper: a GH200 on nvgrace_gpu_vfio_pci in PCI domain 0009, and a NIC; kernel with VFIO cdevs",
    kernel=replace(WITH_CDEVS, iommu="smmu3.0x0000000011000000", first_group=10),
    nodes=(NumaNode(number=0, cpulist="0-71"), NumaNode(number=1, cpulist="")),
    buses=(
        RootBus(
            name="pci0000:00",
            numa_node=0,
            functions=(At("00:00.0", GRACE_ROOT_PORT, (At("01:00.0", CONNECTX7),)),),
        ),
        RootBus(
            name="pci0009:00",
            numa_node=0,
            functions=(At("00:00.0", GRACE_ROOT_PORT, (At("01:00.0", GH200, vfio="nvgrace_gpu_vfio_pci"),)),),
        ),
    ),
)

_EMPTY = Preset(
    summary="a server without a GPU: bridges, a NIC and the graphics of its management controller; vfio not loaded",
    kernel=replace(WITH_CDEVS, vfio_loaded=False),
    nodes=(NumaNode(number=0, cpulist="0-63"),),
    buses=(
        RootBus(
            name="pci0000:40",
            numa_node=0,
            functions=(
                At("40:00.0", EPYC_HOST_BRIDGE),
                At("40:01.1", EPYC_ROOT_PORT, (
                    At("41:00.0", X710),
                    At("41:00.1", X710),
                )),
                At("40:03.1", EPYC_ROOT_PORT),
                At("40:05.1", EPYC_ROOT_PORT, (
                    At("43:00.0", AST1150, (At("44:00.0", AST2500_GRAPHICS, group="management"),), group="management"),
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
        "workstation": _WORKSTATION,
        "gh200": _GH200,
        "empty": _EMPTY,
    }
)
"""By the name that `fake-node create` takes."""
