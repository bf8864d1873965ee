"""What the files of one PCI function say: pure, from its spec to names, modes and contents.

Names, modes and formats are those of Linux 6.12 with vfio-pci on it. Left out is what a plain file cannot be:
`power/autosuspend_delay_ms`, whose reading fails with EIO. `resourceN` files are empty, since one of the right size
(128 GiB for a GPU's memory) would be a trap for whatever copies or searches a tree.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sandbox_plugin.fake.hardware import FunctionSpec, Link, Model, Sriov
from sandbox_plugin.model import Bar

READ, READ_WRITE, WRITE, PRIVATE = 0o444, 0o644, 0o200, 0o600
OFF_THE_BUS = Link(speed="Unknown", width=63)
"""What the link attributes of a device say that no longer answers: all bits of its registers read as 1."""
GONE_CONFIG = b"\xff" * 4096
NO_OVERRIDE = "(null)"
"""`driver_override` when nobody has written it."""

_NO_REGION = f"0x{0:016x} 0x{0:016x} 0x{0:016x}"
_IO, _MEM_64 = 0x100, 0x100000
_KIND = _IO | _MEM_64
"""The bits of a region's flags that say from which address space it is."""
_ROM = 6
_BARS_OF_VFS = 7
"""Lines of `resource`: 0 to 5 BARs, 6 ROM, 7 to 12 BARs of virtual functions, and four windows of a bridge."""
_LINES, _LINES_OF_BRIDGE = 13, 17

_CORRECTABLE = "RxErr,BadTLP,BadDLLP,Rollover,Timeout,NonFatalErr,CorrIntErr,HeaderOF"
_UNCORRECTABLE = (
    "Undefined,DLP,SDES,TLP,FCP,CmpltTO,CmpltAbrt,UnxCmplt,RxOF,MalfTLP,ECRC,UnsupReq,ACSViol,UncorrIntErr,BlockedTLP,"
    "AtomicOpBlocked,TLPBlockedErr,PoisonTLPBlocked,DMWrReqBlocked,IDECheck,MisIDETLP,PCRC_CHECK,TLPXlatBlocked"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    content: str | bytes
    mode: int = READ


@dataclass(slots=True)
class AddressSpace:
    """Hands out bus addresses, upwards, each region aligned to its own size."""

    free: dict[int, int] = field(default_factory=lambda: {_IO: 0x3000, 0: 0x9000_0000, _MEM_64: 0x2000_0000_0000})
    """Lowest free address of I/O ports, of 32-bit memory and of 64-bit memory."""

    def place(self, bar: Bar, copies: int = 1) -> str:
        """A line of `resource` for this region, or for as many of it as there are virtual functions."""
        flags = _flags(bar)
        start = -(-self.free[flags & _KIND] // bar.size) * bar.size
        end = self.free[flags & _KIND] = start + bar.size * copies
        return f"0x{start:016x} 0x{end - 1:016x} 0x{flags:016x}"

    def skip(self, resource: str) -> None:
        """Takes note of what the lines of a `resource` file occupy."""
        for line in resource.splitlines():
            _, end, flags = (int(word, 16) for word in line.split())
            if flags:
                self.free[flags & _KIND] = max(self.free[flags & _KIND], end + 1)


def _flags(bar: Bar) -> int:
    """IORESOURCE_* of the kernel's include/linux/ioport.h, with the low bits of the register itself."""
    if bar.io:
        return 0x40101
    if bar.index == _ROM:
        return 0x46200
    return 0x40200 | (0x2008 if bar.prefetchable else 0) | (_MEM_64 | 0x4 if bar.wide else 0)


def function_attributes(spec: FunctionSpec, space: AddressSpace, cpulist: str, cpus: int) -> dict[str, Attribute]:
    """Every file in the folder of a function that no driver is bound to.

    `cpulist` names the CPUs near to it, of `cpus` in all. Addresses for its BARs are taken from `space`.
    """
    model = spec.model
    return {
        **_identity(model, spec.address),
        **_resources(model, space),
        **(_link(model, spec.link or model.max_link) if model.max_link else {}),
        **(_counters() if model.aer else {}),
        **(_sriov(model.sriov) if model.sriov else {}),
        "ari_enabled": Attribute(content="0\n"),
        "broken_parity_status": Attribute(content="0\n", mode=READ_WRITE),
        "config": Attribute(content=config_header(model), mode=READ_WRITE),
        "consistent_dma_mask_bits": Attribute(content="32\n"),
        "d3cold_allowed": Attribute(content="1\n", mode=READ_WRITE),
        "dma_mask_bits": Attribute(content="32\n"),
        "driver_override": Attribute(content=f"{NO_OVERRIDE}\n", mode=READ_WRITE),
        "enable": Attribute(content="0\n", mode=READ_WRITE),
        "irq": Attribute(content="16\n"),
        "local_cpulist": Attribute(content=f"{cpulist}\n"),
        "local_cpus": Attribute(content=f"{cpu_mask(cpulist, cpus)}\n"),
        "msi_bus": Attribute(content="1\n", mode=READ_WRITE),
        "numa_node": Attribute(content=f"{spec.numa_node}\n", mode=READ_WRITE),
        "power_state": Attribute(content="D0\n"),
        "remove": Attribute(content="", mode=0o220),
        "rescan": Attribute(content="", mode=WRITE),
        **power_attributes("active", "on"),
    }


def power_attributes(status: str = "unsupported", control: str = "auto") -> dict[str, Attribute]:
    """The folder `power/` of any device."""
    return {
        "power/control": Attribute(content=f"{control}\n", mode=READ_WRITE),
        "power/runtime_active_time": Attribute(content="0\n"),
        "power/runtime_status": Attribute(content=f"{status}\n"),
        "power/runtime_suspended_time": Attribute(content="0\n"),
    }


def uevent_of_function(model: Model, address: str) -> str:
    """`uevent` of a function that no driver is bound to (pci_uevent in drivers/pci/pci-driver.c)."""
    lines = [
        f"PCI_CLASS={model.class_code:04X}",
        f"PCI_ID={model.vendor:04X}:{model.device:04X}",
        f"PCI_SUBSYS_ID={model.subsystem[0]:04X}:{model.subsystem[1]:04X}",
        f"PCI_SLOT_NAME={address}",
        f"MODALIAS={_modalias(model)}",
    ]
    return "".join(f"{line}\n" for line in lines)


def cpu_mask(cpulist: str, cpus: int) -> str:
    """A list such as `0-55,112-167` the way `%*pb` prints it: hex, a comma between 32 bits."""
    mask = 0
    for part in filter(None, cpulist.split(",")):
        first, _, last = part.partition("-")
        for cpu in range(int(first), int(last or first) + 1):
            mask |= 1 << cpu
    digits = f"{mask:0{-(-cpus // 4)}x}"
    head = len(digits) % 8
    groups = [digits[:head]] if head else []
    return ",".join(groups + [digits[i : i + 8] for i in range(head, len(digits), 8)])


def cpus_in(cpulists: Iterable[str]) -> int:
    """How many CPUs there are, going by the highest number in these lists."""
    numbers = [int(n) for cpulist in cpulists for part in cpulist.split(",") for n in part.split("-") if n]
    return max(numbers, default=0) + 1


def config_header(model: Model) -> bytes:
    """`config`: what the function is. The base addresses in it are left zero; `resource` has them."""
    command = 0x0007 if model.is_bridge else 0x0000
    header = struct.pack(
        "<HHHHBHBBBBB",
        model.vendor,
        model.device,
        command,
        0x0010,  # status: there is a list of capabilities
        model.revision,
        model.class_code & 0xFFFF,
        model.class_code >> 16,
        0,
        0,
        1 if model.is_bridge else 0,
        0,
    )
    config = bytearray(4096)
    config[: len(header)] = header
    config[0x34] = 0x40  # where that list begins
    if not model.is_bridge:
        config[0x2C:0x30] = struct.pack("<HH", *model.subsystem)
    return bytes(config)


def _identity(model: Model, address: str) -> Mapping[str, Attribute]:
    attributes = {
        "vendor": Attribute(content=f"0x{model.vendor:04x}\n"),
        "device": Attribute(content=f"0x{model.device:04x}\n"),
        "class": Attribute(content=f"0x{model.class_code:06x}\n"),
        "revision": Attribute(content=f"0x{model.revision:02x}\n"),
        "subsystem_vendor": Attribute(content=f"0x{model.subsystem[0]:04x}\n"),
        "subsystem_device": Attribute(content=f"0x{model.subsystem[1]:04x}\n"),
        "modalias": Attribute(content=f"{_modalias(model)}\n"),
        "uevent": Attribute(content=uevent_of_function(model, address), mode=READ_WRITE),
    }
    if model.class_code >> 8 == 0x0300:
        attributes["boot_vga"] = Attribute(content="0\n")
    return attributes


def _modalias(model: Model) -> str:
    base, sub, interface = model.class_code >> 16, model.class_code >> 8 & 0xFF, model.class_code & 0xFF
    return (
        f"pci:v{model.vendor:08X}d{model.device:08X}sv{model.subsystem[0]:08X}sd{model.subsystem[1]:08X}"
        f"bc{base:02X}sc{sub:02X}i{interface:02X}"
    )


def _resources(model: Model, space: AddressSpace) -> Mapping[str, Attribute]:
    lines = [_NO_REGION] * (_LINES_OF_BRIDGE if model.is_bridge else _LINES)
    files = {}
    for bar in model.bars:
        lines[bar.index] = space.place(bar)
        name = "rom" if bar.index == _ROM else f"resource{bar.index}"
        files[name] = Attribute(content="", mode=PRIVATE)
        if bar.prefetchable and not bar.io:
            files[f"{name}_wc"] = Attribute(content="", mode=PRIVATE)
    if model.sriov:
        for bar in model.sriov.vf_bars:
            lines[_BARS_OF_VFS + bar.index] = space.place(bar, model.sriov.total_vfs)
    return {"resource": Attribute(content="".join(f"{line}\n" for line in lines)), **files}


def _link(model: Model, link: Link | None) -> Mapping[str, Attribute]:
    assert model.max_link is not None
    link = link or model.max_link
    attributes = {
        "current_link_speed": Attribute(content=f"{link.speed}\n"),
        "current_link_width": Attribute(content=f"{link.width}\n"),
        "max_link_speed": Attribute(content=f"{model.max_link.speed}\n"),
        "max_link_width": Attribute(content=f"{model.max_link.width}\n"),
    }
    if not model.is_bridge:
        attributes["reset"] = Attribute(content="", mode=WRITE)
        attributes["reset_method"] = Attribute(content="flr bus\n", mode=READ_WRITE)
    return attributes


def _counters() -> Mapping[str, Attribute]:
    """Documentation/ABI/testing/sysfs-bus-pci-devices-aer: counts since boot, the total last."""
    return {
        f"aer_dev_{kind}": Attribute(content="".join(f"{name} 0\n" for name in f"{names},TOTAL_ERR_{total}".split(",")))
        for kind, names, total in (
            ("correctable", _CORRECTABLE, "COR"),
            ("fatal", _UNCORRECTABLE, "FATAL"),
            ("nonfatal", _UNCORRECTABLE, "NONFATAL"),
        )
    }


def _sriov(sriov: Sriov) -> Mapping[str, Attribute]:
    return {
        "sriov_drivers_autoprobe": Attribute(content="1\n", mode=READ_WRITE),
        "sriov_numvfs": Attribute(content="0\n", mode=READ_WRITE),
        "sriov_offset": Attribute(content=f"{sriov.offset}\n"),
        "sriov_stride": Attribute(content="1\n"),
        "sriov_totalvfs": Attribute(content=f"{sriov.total_vfs}\n"),
        "sriov_vf_device": Attribute(content=f"{sriov.vf_device:x}\n"),
        "sriov_vf_total_msix": Attribute(content="0\n"),
    }
