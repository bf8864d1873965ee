"""The data types that every part uses: what a host shows, and what we make of it.

All of them are frozen values that do no I/O, so a snapshot may be handed to any reader and kept for as long as the
reader likes. Host facts (`PciFunction`, `IommuGroup`, `HostFacts`) say what sysfs says and nothing more; `Device` and
`Health` are what follows from them. A `Fault` is one thing that speaks against a device; its `Health` is what is listed
in the end (inventory/health.py).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

NVIDIA = 0x10DE
"""PCI vendor ID of NVIDIA."""
D3COLD = "D3cold"
"""`power_state` of a function without power, and of one whose registers read all ones (pci_power_up and
pci_update_current_state in drivers/pci/pci.c)."""
UNKNOWN_SPEED = "Unknown"
"""What a link speed reads as that is none: of a function off the bus, and of a virtual one."""
ROM = 6
"""Index of the expansion ROM among the BARs."""
_CDEV_FOLDER = "/dev/vfio/devices/"
_BRIDGE_CLASSES = (0x0600, 0x0604)
"""Host bridge and PCI-to-PCI bridge: base class and subclass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One base address register (or the expansion ROM) of a PCI function.

    `size` is in bytes; 0 for one without an address whose size the kernel does not know either. One that the kernel has
    given up (a line of zeros) is not listed.
    """

    index: int
    size: int
    prefetchable: bool
    wide: bool
    """64-bit memory region."""
    io: bool
    unset: bool = False
    """It has no address, and without one the kernel does not enable the function."""
    start: int = field(default=0, compare=False)
    """Its address on the host; 0 for one without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VfioDev:
    """The `vfio-dev/vfioN` folder of a function that a vfio driver holds (Linux 6.1 and later)."""

    number: int
    """N of vfioN."""
    cdev: str | None
    """`major:minor` of /dev/vfio/devices/vfioN; None where the folder has no `dev` file: there is no such node."""
    binding: int | None = field(default=None, compare=False)
    """Inode number of the folder. sysfs makes a new folder, with a new number, each time the function is bound
    (kernfs_new_node in fs/kernfs/dir.c never uses one twice), so another number means: bound again since."""


class LinkLimit(NamedTuple):
    """The best that one end of a PCIe link can do, as `max_link_speed` and `max_link_width` word it."""

    speed: str | None
    width: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PciFunction:
    """One PCI function, as its folder in `/sys/bus/pci/devices` shows it. Nothing here was read in a way that
    wakes a sleeping device.

    Optional attributes are None where the kernel has none, says "unknown" (a NUMA node of -1) or where reading
    failed; in the last case `unread` says why.
    """

    address: str
    """`DDDD:BB:DD.F`, lower-case hex; domains of more than four digits exist."""
    vendor: int
    device: int
    class_code: int
    """24 bits: base class, subclass, programming interface, e.g. 0x030200."""
    subsystem_vendor: int | None = None
    subsystem_device: int | None = None
    revision: int | None = None
    driver: str | None = None
    """Name of the bound driver, e.g. `vfio-pci`."""
    iommu_group: int | None = None
    vfio: VfioDev | None = None
    numa_node: int | None = None
    link_speed: str | None = None
    """`current_link_speed` as the kernel words it; read only where that wakes nothing."""
    link_width: int | None = None
    enable: int | None = None
    """1 while someone, a VM for a vfio-bound function, has the function enabled.

    Of a function without a driver it is 1 or None: 1 for as long as a VM has it that had it when it was unbound.
    """
    power_state: str | None = None
    """`power_state` as cached by the kernel: D0, D3hot, D3cold, unknown."""
    runtime_status: str | None = None
    """`power/runtime_status`: active, suspended and so on. Read of a function in D3cold alone."""
    has_power: bool | None = None
    """Of a function in D3cold, whether nothing can have cut its power: every bridge above is awake, and it has no ACPI
    power resource of its own. None for any other function."""
    bars: tuple[Bar, ...] = ()
    reset_methods: tuple[str, ...] | None = None
    """How the kernel can reset this function alone: `reset_method`. None where that is not told (before Linux 5.15)."""
    bridges: tuple[str, ...] = ()
    """The way down to this function: the host bridge (`pciDDDD:BB`), then the address of every bridge."""
    virtual_functions: int = 0
    """Number of SR-IOV virtual functions that this physical function has enabled (its `virtfn` links)."""
    physical_function: str | None = None
    """Address of the physical function, for an SR-IOV virtual function (`physfn`)."""
    mdev_type: str | None = None
    """For a mediated device the name of its type, e.g. `GRID T4-1Q`.

    Its `address` is its UUID then, and vendor, device, NUMA node and bridges are those of the function that carries it:
    0 and nothing where that is no PCI function.
    """
    vgpu_type: str | None = None
    """Of a virtual function that its vendor's driver gives to VMs: the number of its vGPU type (`nvidia/
    current_vgpu_type`), `0` while it has none. None: no such function, or one without that file."""
    vgpu_types: tuple[tuple[str, str], ...] = ()
    """Number and name of each type that still fits there (`nvidia/creatable_vgpu_types`): fewer as the card fills."""
    link_limits: tuple[LinkLimit, ...] | None = None
    """What its link can be at best: of the function itself, and of the port above. None: not read yet, since there was
    no link to be seen, or reading would have woken something."""
    fatal_errors: int | None = None
    """TOTAL_ERR_FATAL of `aer_dev_fatal`: a count since boot."""
    nonfatal_errors: int | None = field(default=None, compare=False)
    """TOTAL_ERR_NONFATAL of `aer_dev_nonfatal`. Nothing about a device follows from it, nor from the next."""
    correctable_errors: int | None = field(default=None, compare=False)
    """TOTAL_ERR_COR of `aer_dev_correctable`."""
    unread: tuple[str, ...] = ()
    """One line for each optional attribute that could not be read or made no sense."""

    @property
    def model_id(self) -> tuple[int, int]:
        """Vendor and device ID: what pci.ids names."""
        return (self.vendor, self.device)

    @property
    def binding(self) -> int | None:
        """`VfioDev.binding`; None where there is none."""
        return None if self.vfio is None else self.vfio.binding

    @property
    def is_held_by_vfio(self) -> bool:
        """A vfio driver has it, is about to have it, or is leaving it.

        `vfio-dev` is there from Linux 6.1; before, the driver's name alone tells. Of an unbind the driver's link is the
        first to go (__device_release_driver in drivers/base/dd.c), and of one that waits for a VM it is all that goes.
        """
        return self.vfio is not None or is_vfio_driver(self.driver)

    @property
    def is_vendors_vgpu(self) -> bool:
        """A virtual function that stays on its vendor's driver, which makes a VFIO device of it: a vGPU if it has a
        type."""
        return (
            self.physical_function is not None
            and self.vfio is not None
            and self.driver is not None
            and not is_vfio_driver(self.driver)
        )

    @property
    def shows_use(self) -> bool:
        """Whether `enable` tells that a VM has it: a mediated device has none, and that of a vGPU its driver sets."""
        return self.mdev_type is None and not self.is_vendors_vgpu

    @property
    def is_bridge(self) -> bool:
        """It only leads to other functions: no consumer passes it to a VM with its group."""
        return self.class_code >> 8 in _BRIDGE_CLASSES

    @property
    def is_left_enabled(self) -> bool:
        """It is enabled without a driver: by a VM that had it when it was unbound, or by a careless host driver.

        Bridges are enabled for what is below them.
        """
        return self.driver is None and self.enable == 1 and not self.is_bridge

    @property
    def silence(self) -> str | None:
        """What proves that it does not answer on the bus, in words; None: nothing does."""
        return silence(self.link_speed, self.link_width, self.power_state, self.runtime_status)


class IommuGroup(NamedTuple):
    """An IOMMU group that holds at least one function bound to a vfio driver."""

    number: int
    members: tuple[str, ...]
    """Addresses of every function in the group, readable or not, sorted."""
    noiommu: bool = False
    """A group without an IOMMU (vfio's unsafe no-IOMMU mode): never offered."""
    firmware_mappings: tuple[str, ...] = ()
    """Regions of memory, each as `first-last` in hex, that the firmware wants mapped for a function of this group at
    all times: `direct` in `reserved_regions`, without those that the kernel lets go of (`direct-relaxable`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """Everything one scan of a host found. Nothing in it is judged, and nothing in it is ours."""

    functions: Mapping[str, PciFunction] = field(default_factory=lambda: MappingProxyType({}))
    """By PCI address."""
    unreadable: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """PCI address -> why that function could not be read in this scan."""
    groups: Mapping[int, IommuGroup] = field(default_factory=lambda: MappingProxyType({}))
    group_nodes: frozenset[int] = frozenset()
    """Groups that have an entry in `/sys/class/vfio`, so a node /dev/vfio/N."""
    kernel_has_cdevs: bool = False
    """Whether /proc/devices shows that the kernel makes VFIO cdevs. It shows nothing before vfio is loaded."""
    dev_nodes: frozenset[str] | None = None
    """Nodes under the host's live /dev/vfio (`/dev/vfio/12`); None where only a copy, or nothing, is visible."""
    vfio_devs: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """`vfioN` -> address of its function, as `/sys/class/vfio-dev` has it, also of one that cannot be read."""
    egm_gpus: Mapping[str, frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))
    """Extended GPU memory of Grace: node (`/dev/egm4`) -> addresses of all GPUs that it belongs to."""
    unreachable: str | None = None
    """Why there is nothing at all: the PCI bus folder itself could not be read."""
    began_at: float = field(default=-math.inf, compare=False)
    """When the scan began, in monotonic seconds: all of this was read after that."""


class Reason(StrEnum):
    """Why a device is Unhealthy. docs/operations.md says for each what to do about it."""

    UNREADABLE = "unreadable"
    GONE = "gone"
    NOT_BOUND = "not-bound"
    NO_TYPE = "no-type"
    NO_CDEV = "no-cdev"
    NO_NODE = "no-node"
    NOT_VIABLE = "not-viable"
    FIRMWARE_MAPPING = "firmware-mapping"
    OFF_THE_BUS = "off-the-bus"
    NO_ADDRESS = "no-address"
    FATAL_ERROR = "fatal-error"
    IN_USE_ELSEWHERE = "in-use-elsewhere"
    GROUP_TAKEN = "group-taken"
    HELD_AS_ANOTHER = "held-as-another"
    HELD_BY_OTHER_API = "held-by-other-api"
    ID_HELD = "id-held"
    HOLDERS_UNKNOWN = "holders-unknown"
    NOT_IN_CDI = "not-in-cdi"
    SETTLING = "settling"


class Fault(NamedTuple):
    """One thing that speaks against giving a device to a pod."""

    reason: Reason
    detail: str
    """For people."""


class Health(NamedTuple):
    """What is listed of one device: healthy when `reason` is None, else the fault that matters most."""

    reason: Reason | None = None
    detail: str = ""

    @property
    def healthy(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        return "healthy" if self.reason is None else f"{self.reason}: {self.detail}"


HEALTHY = Health()
_UNLISTED = Health(reason=Reason.HOLDERS_UNKNOWN, detail="it is not listed yet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one of a device's functions sits: what topology is computed from."""

    address: str
    numa_node: int | None
    bridges: tuple[str, ...]
    """As in `PciFunction.bridges`."""
    binding: int | None = field(default=None, compare=False)
    """As in `VfioDev.binding`."""


class Device(NamedTuple):
    """The unit that a pod requests: a GPU or NVSwitch function, or a whole IOMMU group on kernels without cdevs."""

    id: str
    """The number of its VFIO node, in decimal: N of vfioN, or of the group. One ID is one node path."""
    resource: str
    """Full name, e.g. `nvidia.com/pgpu`."""
    node: str
    """The node's own path on the host, e.g. `/dev/vfio/devices/vfio3`, never prefixed with a fake root."""
    model: str
    """For people, from pci.ids."""
    placements: tuple[Placement, ...]
    """The functions that make it a device, lowest address first (not those that only ride along).

    Empty for a device that only PodResources still knows.
    """
    iommu_group: int
    mates: tuple[str, ...] = ()
    """IDs of the other devices in its IOMMU group, which the kernel gives to one VM only, of any resource."""
    group_functions: tuple[str, ...] = ()
    """Functions of its group that a VM may have: those that a vfio driver has, or had when a VM had them."""
    mdev: bool = False
    """A mediated device: the address is a UUID."""
    group_node: str | None = None
    """/dev/vfio/N of its group, where sysfs shows one: beside `node` on kernels that have both. None where the group
    must not be passed as a whole."""
    node_exists: bool = True
    """Whether sysfs shows the node: what does not exist must not be in a CDI spec."""
    health: Health = _UNLISTED
    """Whether the device plugin API may give it. Set when it is listed (inventory/advance.py), and by nobody else."""
    for_claims: Health = _UNLISTED
    """The same for claims, where they are served: what another claim holds counts as well here, for that is known to
    the scheduler."""

    @property
    def key(self) -> tuple[str, str]:
        """What the kubelet knows it by."""
        return (self.resource, self.id)

    @property
    def as_bound(self) -> tuple[object, ...]:
        """What a look at it is true of: its functions as they are bound, and those that have one holder with it."""
        return (*((p.address, p.binding) for p in self.placements), *self.group_functions)

    @property
    def is_cdev(self) -> bool:
        """Whether its node is a cdev's, and not a group's."""
        return self.node.startswith(_CDEV_FOLDER)

    @property
    def address(self) -> str:
        """PCI address of its first function, for logs and tables; `-` where the node no longer shows it."""
        return self.placements[0].address if self.placements else "-"

    @property
    def numa_nodes(self) -> tuple[int, ...]:
        """NUMA nodes of its functions, ascending; empty where unknown."""
        return tuple(sorted({p.numa_node for p in self.placements if p.numa_node is not None}))


class Objection(NamedTuple):
    """What a last look found against giving a device away."""

    why: str
    in_use: frozenset[str] = frozenset()
    """Functions of its IOMMU group that a VM has: none that the pod which asks could have started already."""


LastLook = Callable[[Sequence[Device], Mapping[str, PciFunction]], Awaitable[Mapping[str, Objection]]]
"""Checks devices on the host once more, before they are given, with all functions as the latest scan saw them: device
ID -> what speaks against giving it now. Takes well under a second. `host/last_look.py` has the real one."""


def silence(
    link_speed: str | None, link_width: int | None, power_state: str | None, runtime_status: str | None
) -> str | None:
    """What proves that a function does not answer on the bus, in words; None: nothing does."""
    if link_speed == UNKNOWN_SPEED and link_width == 63:
        # What a link register of all ones reads as (measured; drivers/pci/pci-sysfs.c decodes it).
        return "link speed Unknown, width 63"
    if power_state == D3COLD and runtime_status == "active":
        return "the kernel has set it to D3cold although its runtime_status is active"
    return None


def node_of_cdev(number: int | str) -> str:
    """The VFIO node of vfioN (vfio_device_devnode in drivers/vfio/device_cdev.c)."""
    return f"{_CDEV_FOLDER}vfio{number}"


def node_of_group(number: int | str) -> str:
    """The VFIO node of an IOMMU group."""
    return f"/dev/vfio/{number}"


def is_vfio_driver(driver: str | None) -> bool:
    """Whether a driver of this name gives functions to VMs: vfio-pci, and those of vendors have `vfio` in it too."""
    return driver is not None and "vfio" in driver


def group_of_node(node: str) -> int | None:
    """The IOMMU group that a node is for; None for a cdev's."""
    name = node.removeprefix("/dev/vfio/")
    return int(name) if name != node and name.isascii() and name.isdecimal() and len(name) < 10 else None


def id_order(device_id: str) -> tuple[int, int, str]:
    """Sort key for device IDs: by number where it is one, then by text. Those of others may be of any length."""
    is_number = device_id.isdecimal() and len(device_id) < 20
    return (0, int(device_id), device_id) if is_number else (1, 0, device_id)


def key_order(key: tuple[str, str]) -> tuple[str, tuple[int, int, str]]:
    """Sort key for `Device.key`: by resource, then by ID."""
    return (key[0], id_order(key[1]))
