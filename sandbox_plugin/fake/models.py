"""Models of PCI functions as data: what `lspci -nnvv` says of real ones."""

from __future__ import annotations

from sandbox_plugin.fake.hardware import GIB, KIB, MIB, Link, Model, Sriov
from sandbox_plugin.model import Bar


def _mem32(index: int, size: int) -> Bar:
    return Bar(index=index, size=size, prefetchable=False, wide=False, io=False)


def _mem64(index: int, size: int, *, prefetchable: bool = True) -> Bar:
    return Bar(index=index, size=size, prefetchable=prefetchable, wide=True, io=False)


def _ports(index: int, size: int) -> Bar:
    return Bar(index=index, size=size, prefetchable=False, wide=False, io=True)


def _link(gigatransfers: str, width: int) -> Link:
    return Link(speed=f"{gigatransfers} GT/s PCIe", width=width)


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
