"""What the doctor knows of a node, beside the host's facts that the daemon reads too: frozen values, nothing judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from sandbox_plugin.cdi.lint import Reading
from sandbox_plugin.config.settings import Settings
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import HostFacts, is_vfio_driver

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Unread:
    """Stands for facts that could not be read, and says why."""

    why: str


Maybe: TypeAlias = _T | Unread


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """The firmware and the running kernel."""

    command_line: tuple[str, ...] = ()
    tables: frozenset[str] | None = None
    """ACPI tables that tell of an IOMMU: DMAR (Intel), IVRS (AMD), IORT (Arm). None: ACPI cannot be seen."""
    iommus: tuple[str, ...] = ()
    """Names in /sys/class/iommu: dmar0, ivhd0, smmu3.0x...; the kernel uses each of them."""
    groups: int = 0
    """How many IOMMU groups there are."""
    irq_chips: frozenset[str] = frozenset()
    """Names of interrupt chips; on x86 they begin with `IR-` where interrupts are remapped."""
    has_kvm: bool = False
    snp: bool = False
    """KVM can start SEV-SNP guests (kvm_amd)."""
    tdx: bool = False
    """KVM can start TDX guests (kvm_intel)."""
    drivers: tuple[str, ...] = ()
    """PCI drivers that are loaded."""
    unsafe_interrupts: bool = False
    """allow_unsafe_interrupts of vfio_iommu_type1."""
    unsafe_noiommu: bool = False
    """enable_unsafe_noiommu_mode of vfio."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """A framebuffer of the firmware that a driver of the host draws on."""

    name: str
    """The platform device, such as `simple-framebuffer.0`."""
    driver: str
    address: str | None
    """PCI address of its GPU; None where the kernel does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Displays:
    """What the host draws on."""

    screens: tuple[Screen, ...] = ()
    boot_gpu: str | None = None
    """PCI address of the GPU that the firmware has chosen (`boot_vga`)."""
    resizable: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """PCI address -> indexes of the BARs that can be resized, of functions that a rule takes."""


class Peer(Enum):
    """What is at a unix socket."""

    MISSING = auto()
    DEAD = auto()
    """The file is there, and nobody listens."""
    ALIVE = auto()
    FORBIDDEN = auto()
    """This process may not connect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeletFolder:
    """The folder where device plugins register."""

    path: Path
    exists: bool = False
    writable: bool = False
    registration: Peer = Peer.MISSING
    """kubelet.sock."""
    plugins: tuple[str, ...] = ()
    """Sockets of sandbox device plugins that somebody listens at."""
    lock_holder: int | None = None
    """Process ID of the plugin that has our lock; 0 where it is not known which."""
    locks_are_seen: bool = False
    """Whether the kernel's list of locks shows those of all processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodResources:
    """What the kubelet's PodResources answered."""

    path: Path
    trouble: str | None = None
    """Why List did not answer; None: it did."""
    has_get: bool | None = None
    """Whether it has Get, which Kata calls. None: not known."""
    get_said: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CdiFolder:
    """A folder that Kata reads specs from."""

    path: Path
    exists: bool
    writable: bool
    readings: Mapping[Path, Reading]
    missing: frozenset[str] = frozenset()
    """Nodes outside /dev/vfio that specs name and the host's /dev does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KataFile:
    """One configuration file of Kata, with its drop-ins."""

    path: Path
    says: Mapping[str, Any] = field(default_factory=dict)
    """The TOML. Empty where it cannot be understood."""
    trouble: str | None = None
    sockets: Mapping[str, bool] = field(default_factory=dict)
    """PodResources socket that it names -> whether there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the kernel and the service manager allow."""

    inotify_instances: int | None = None
    """For each user."""
    inotify_used: int = 0
    """By processes of this user that can be seen; one inherited by a child counts twice."""
    descriptors: int | None = None
    """Soft limit of this process. None: not known, or none."""
    files: tuple[int, int] | None = None
    """Open files on the machine, and how many there may be."""
    selinux: bool | None = None
    """True: enforcing, False: permissive, None: off, or not to be seen."""
    domain: str = ""
    """SELinux label of this process."""
    hugepages: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Size, such as `2048kB` -> how many there are, and how many of them are free."""
    memlock: Mapping[str, str] = field(default_factory=dict)
    """Container runtime that runs -> how much memory its processes may lock, as in /proc/PID/limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """All of it."""

    settings: Settings
    rules: Rules
    host: HostFacts
    inventory: Inventory
    """What the daemon would make of these host facts at its start."""
    is_fake: bool
    in_container: bool
    kernel: Maybe[Kernel]
    displays: Maybe[Displays]
    kubelet: Maybe[KubeletFolder]
    pod_resources: PodResources
    cdi: tuple[Maybe[CdiFolder], ...]
    kata: Maybe[tuple[KataFile, ...]]
    limits: Maybe[Limits]

    def shown(self, path: Path) -> Path:
        """A path as it is called on the host itself."""
        root = self.settings.host_root
        return Path("/") / path.relative_to(root) if path.is_relative_to(root) else path

    @property
    def has_vfio(self) -> bool:
        """Whether a driver is loaded that makes VFIO devices; true also where that cannot be told. A vGPU's is its
        vendor's own."""
        if isinstance(self.kernel, Unread) or any(map(is_vfio_driver, self.kernel.drivers)):
            return True
        return any(function.vfio is not None for function in self.host.functions.values())

    @property
    def has_iommu(self) -> bool:
        """Whether the kernel has made groups; true also where that cannot be told."""
        return isinstance(self.kernel, Unread) or self.kernel.groups > len(
            [group for group in self.host.groups.values() if group.noiommu]
        )
