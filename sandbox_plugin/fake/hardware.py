"""The nouns of fake machines: a model of PCI function, one such function in its place, a kernel, a preset.

Apart from `models` and `presets`, so that those are data alone, and from `node`, which knows nothing of any model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from sandbox_plugin.model import Bar


@dataclass(frozen=True, slots=True, kw_only=True)
class PcieLink:
    """A PCIe link as `current_link_speed` and `current_link_width` word it."""

    speed: str
    """E.g. `32.0 GT/s PCIe` (pci_speed_string in drivers/pci/probe.c)."""
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Everything that is the same for all PCI functions of one model."""

    vendor: int
    device: int
    class_code: int
    """24 bits, e.g. 0x030200."""
    revision: int = 0
    subsystem: tuple[int, int] = (0, 0)
    """Subsystem vendor and device."""
    bars: tuple[Bar, ...] = ()
    """Index 6 is the expansion ROM."""
    link: PcieLink | None = None
    """The best that it can; None: not a PCIe device, or one inside the root complex, without a link."""
    host_driver: str | None = None
    """The driver that claims such a function by itself when it appears."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSpec:
    """One PCI function in its place: what `FakeNode.add` puts into a tree."""

    address: str
    """`DDDD:BB:DD.F`, lower-case."""
    model: Model
    parent: str
    """Address of the bridge above, or the host bridge's name, e.g. `pci0000:15`."""
    driver: str | None = None
    """Driver that is bound at the start."""
    iommu_group: int | None = None
    """None: a group of its own, with the lowest number that is free."""
    numa_node: int = -1
    link: PcieLink | None = None
    """What the link was trained to; None: the model's best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What differs between kernels, as far as passthrough shows it."""

    cdevs: bool
    """Built with IOMMUFD and VFIO cdevs: /dev/iommu and /dev/vfio/devices/vfioN exist."""
    first_group: int = 40
    """Lowest IOMMU group number of this machine.

    On a real one it is 0. Here groups start above any vfioN, so that taking one number for the other shows.
    """
    iommu: str = "dmar"
    """What translates DMA: `dmar` (Intel), `ivhd` (AMD) or `smmu3` (Arm)."""
    vfio_loaded: bool = True
    """Whether vfio is loaded at the start; binding to a vfio driver loads it."""


@dataclass(frozen=True, slots=True)
class At:
    """A function of a preset, with what hangs below it."""

    place: str
    """The address without its domain, `BB:DD.F`."""
    model: Model
    below: tuple[At, ...] = ()
    vfio: str | None = None
    """The vfio driver bound to it; None: the model's own host driver."""
    group: str | None = None
    """A label that the functions of one IOMMU group share; None: a group of its own."""
    link: PcieLink | None = None
    """As in `FunctionSpec`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RootBus:
    """A host bridge and what hangs below it."""

    name: str
    """`pciDDDD:BB`, as in sys/devices."""
    functions: tuple[At, ...]
    numa_node: int = -1

    @property
    def domain(self) -> str:
        return self.name.removeprefix("pci").partition(":")[0]


@dataclass(frozen=True, slots=True)
class VgpuType:
    """A type of vGPU that a card can make. All vGPUs of a card are of one type at a time."""

    number: int
    name: str
    fits: int
    """How many of them a card has room for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VgpuCard:
    """A GPU on its vendor's driver, with SR-IOV virtual functions that can be vGPUs."""

    address: str
    types: tuple[VgpuType, ...]
    functions: tuple[int, ...]
    """For each of the virtual functions the number of its type; 0: none is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A whole machine."""

    summary: str
    """One line for people."""
    kernel: Kernel
    buses: tuple[RootBus, ...]
    vgpu_cards: tuple[VgpuCard, ...] = ()
    egm: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Extended GPU memory of Grace: `egmN` -> addresses of the GPUs that it belongs to."""

    def functions(self) -> tuple[FunctionSpec, ...]:
        """All functions in the order in which a kernel finds them, groups numbered in that order."""
        free = count(self.kernel.first_group)
        labelled: dict[str, int] = defaultdict(lambda: next(free))
        return tuple(
            FunctionSpec(
                address=f"{bus.domain}:{at.place}",
                model=at.model,
                parent=parent,
                driver=at.vfio or at.model.host_driver,
                iommu_group=next(free) if at.group is None else labelled[at.group],
                numa_node=bus.numa_node,
                link=at.link,
            )
            for bus in self.buses
            for parent, at in _walk(bus.domain, bus.name, bus.functions)
        )


def _walk(domain: str, parent: str, functions: Sequence[At]) -> Iterator[tuple[str, At]]:
    """Every function with the name of what it hangs below, depth first."""
    for at in functions:
        yield parent, at
        yield from _walk(domain, f"{domain}:{at.place}", at.below)
