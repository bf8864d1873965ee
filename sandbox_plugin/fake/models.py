"""Models of PCI functions as data: what `lspci -nnvv` says of real ones."""

from __future__ import annotations

from sandbox_plugin.fake.hardware import Model, PcieLink
from sandbox_plugin.model import Bar

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30


def _mem32(index: int, size: int) -> Bar:
    return Bar(index=index, size=size, prefetchable=False, wide=False, io=False)


def _mem64(index: int, size: int) -> Bar:
    return Bar(index=index, size=size, prefetchable=True, wide=True, io=False)


def _ports(index: int, size: int) -> Bar:
    return Bar(index=index, size=size, prefetchable=False, wide=False, io=True)


def _link(gigatransfers: str, width: int) -> PcieLink:
    return PcieLink(speed=f"{gigatransfers} GT/s PCIe", width=width)


def _bridge(vendor: int, device: int, link: PcieLink, revision: int = 0) -> Model:
    """A root port, or a port of a switch."""
    return Model(
        vendor=vendor, device=device, class_code=0x060400, revision=revision, link=link, host_driver="pcieport"
    )


def _nvidia(
    device: int,
    class_code: int,
    subsystem: tuple[int, int],
    bars: tuple[Bar, ...],
    link: PcieLink,
    driver: str = "nvidia",
) -> Model:
    return Model(
        vendor=0x10DE,
        device=device,
        class_code=class_code,
        revision=0xA1,
        subsystem=subsystem,
        bars=bars,
        link=link,
        host_driver=driver,
    )


_GRAPHICS, _3D_CONTROLLER = 0x030000, 0x030200
_GEN_3, _GEN_4, _GEN_5 = _link("8.0", 16), _link("16.0", 16), _link("32.0", 16)
_CARD = (0x1458, 0x4014)
"""Gigabyte's GeForce GTX 1660 Super: the subsystem of all its functions."""
_HOPPER_BARS = (_mem64(0, 16 * _MIB), _mem64(2, 128 * _GIB), _mem64(4, 32 * _MIB))
_BLACKWELL_BARS = (_mem64(0, 64 * _MIB), _mem64(2, 128 * _GIB), _mem64(4, 32 * _MIB))
_ADA_BARS = (_mem32(0, 16 * _MIB), _mem64(1, 64 * _GIB), _mem64(3, 32 * _MIB))
_TURING_BARS = (_mem32(0, 16 * _MIB), _mem64(1, 256 * _MIB), _mem64(3, 32 * _MIB))
_GEFORCE_BARS = (*_TURING_BARS, _ports(5, 128), _mem32(6, 512 * _KIB))
_USB_BARS = (_mem64(0, 256 * _KIB), _mem64(3, 64 * _KIB))

# NVIDIA's GPUs, with the other functions of their cards, and switches

H100_SXM5 = _nvidia(0x2330, _3D_CONTROLLER, (0x10DE, 0x16C1), _HOPPER_BARS, _GEN_5)
GH200 = _nvidia(0x2342, _3D_CONTROLLER, (0x10DE, 0x16EB), _HOPPER_BARS, _GEN_5)
RTX_PRO_6000 = _nvidia(0x2BB5, _3D_CONTROLLER, (0, 0), _BLACKWELL_BARS, _GEN_5)
L40S = _nvidia(0x26B9, _3D_CONTROLLER, (0x10DE, 0x1851), _ADA_BARS, _GEN_4)
T4 = _nvidia(0x1EB8, _3D_CONTROLLER, (0x10DE, 0x12A2), _TURING_BARS, _GEN_3)
GTX_1660_SUPER = _nvidia(0x21C4, _GRAPHICS, _CARD, _GEFORCE_BARS, _GEN_3)
GTX_1660_AUDIO = _nvidia(0x1AEB, 0x040300, _CARD, (_mem32(0, 16 * _KIB),), _GEN_3, "snd_hda_intel")
GTX_1660_USB = _nvidia(0x1AEC, 0x0C0330, _CARD, _USB_BARS, _GEN_3, "xhci_hcd")
GTX_1660_USB_C = _nvidia(0x1AED, 0x0C8000, _CARD, (_mem32(0, 4 * _KIB),), _GEN_3, "nvidia-gpu")
NVSWITCH3 = _nvidia(0x22A3, 0x068000, (0x10DE, 0x1796), (_mem32(0, 32 * _MIB),), _link("16.0", 2), "nvidia-nvswitch")

# Bridges

XEON_ROOT_PORT = _bridge(0x8086, 0x352A, _GEN_5, revision=0x04)
XEON_PCH_ROOT_PORT = _bridge(0x8086, 0x1BB8, _link("8.0", 4), revision=0x11)
"""Which root port the NVSwitches' hub hangs on is not known."""
CONNECTX7_SWITCH = _bridge(0x15B3, 0x1979, _GEN_5)
NVSWITCH3_HUB = _bridge(0x11F8, 0x4128, _link("16.0", 4))
PEX89000 = _bridge(0x1000, 0xC030, _GEN_5)
COFFEE_LAKE_ROOT_PORT = _bridge(0x8086, 0x1901, _GEN_3, revision=0x0D)
Z390_ROOT_PORT = _bridge(0x8086, 0xA340, _link("8.0", 4), revision=0xF0)
GRACE_ROOT_PORT = _bridge(0x10DE, 0x22B1, _GEN_5)
EPYC_ROOT_PORT = _bridge(0x1022, 0x1483, _GEN_4)
GENOA_ROOT_PORT = _bridge(0x1022, 0x14AB, _GEN_5)
AST1150 = Model(vendor=0x1A03, device=0x1150, class_code=0x060400, revision=0x04, link=_link("5.0", 1))
"""PCIe to conventional PCI: what is behind it shares its IOMMU group."""

# The rest of the machines: what nobody would give to a VM, so without its BARs, and NICs

XEON_MEMORY_MAP = Model(vendor=0x8086, device=0x09A2, class_code=0x088000, revision=0x20)
COFFEE_LAKE_HOST_BRIDGE = Model(vendor=0x8086, device=0x3E30, class_code=0x060000, revision=0x0D)
EPYC_HOST_BRIDGE = Model(vendor=0x1022, device=0x1482, class_code=0x060000)
GENOA_HOST_BRIDGE = Model(vendor=0x1022, device=0x14A4, class_code=0x060000)
Z390_LPC = Model(vendor=0x8086, device=0xA305, class_code=0x060100, revision=0x10)
Z390_AUDIO = Model(vendor=0x8086, device=0xA348, class_code=0x040300, revision=0x10, host_driver="snd_hda_intel")
Z390_SMBUS = Model(vendor=0x8086, device=0xA323, class_code=0x0C0500, revision=0x10, host_driver="i801_smbus")
I219_V = Model(vendor=0x8086, device=0x15BC, class_code=0x020000, revision=0x10, host_driver="e1000e")
NVSWITCH3_HUB_MANAGEMENT = Model(vendor=0x11F8, device=0x4128, class_code=0x058000, link=_link("16.0", 4))
AST2500_GRAPHICS = Model(vendor=0x1A03, device=0x2000, class_code=0x030000, revision=0x41, host_driver="ast")
CONNECTX7 = Model(
    vendor=0x15B3,
    device=0x1021,
    class_code=0x020700,
    subsystem=(0x15B3, 0x0041),
    bars=(_mem64(0, 32 * _MIB),),
    link=_GEN_5,
    host_driver="mlx5_core",
)
X710 = Model(
    vendor=0x8086,
    device=0x1572,
    class_code=0x020000,
    revision=0x02,
    subsystem=(0x8086, 0x0007),
    bars=(_mem64(0, 8 * _MIB), _mem64(3, 32 * _KIB), _mem32(6, 512 * _KIB)),
    link=_link("8.0", 8),
    host_driver="i40e",
)
