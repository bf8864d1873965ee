"""A kernel with PCI functions, VFIO numbers and VMs, as plain objects: what is true, whoever has noticed it or not.

It knows nothing of the daemon but the form of its facts. Rules of the kernel that it keeps:

- A bind gives the lowest free number of vfioN.
- An unbind of a function that a VM has enabled takes the driver's link and the cdev away at once, and ends when the VM
  lets go. Until then `enable` is 1, and neither the number nor the group's node is free.
- The DMA of a group has one owner, and a group that a VM owns takes no host driver.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from sandbox_plugin.model import HostFacts, IommuGroup, PciFunction, VfioDev, node_of_cdev, node_of_group

VFIO_DRIVERS = ("vfio-pci", "nvgrace_gpu_vfio_pci", "nvidia-vgpu-vfio")
_KINDS = {
    # kind: (device, class)
    "gpu": (0x2330, 0x030200),
    "switch": (0x22A3, 0x068000),
    "audio": (0x22BA, 0x040300),
    "vf": (0x2330, 0x030200),
    "mdev": (0x1EB8, 0x030200),
}


@dataclass(eq=False)
class Vm:
    """A process that has functions open. It is a pod's, or was, or nobody's that the kubelet knows."""

    name: str
    began_at: float
    functions: set[Function] = field(default_factory=set)
    """Those that it has enabled."""
    groups: set[int] = field(default_factory=set)
    """Those whose DMA it owns."""


@dataclass(eq=False)
class Function:
    """A PCI function or a mediated device."""

    address: str
    kind: str
    group: int
    mates: tuple[str, ...] = ()
    """Addresses of those that are in its group wherever that is: the slots say so."""
    carrier: str | None = None
    """Of a virtual function."""
    is_present: bool = True
    driver: str | None = None
    number: int | None = None
    """N of vfioN, also while an unbind waits for a VM."""
    binding: int = 0
    is_off: bool = False
    """It does not answer on the bus."""
    hangs: bool = False
    """Reading it does not end."""
    leaves: bool = False
    """It is taken out as soon as the unbind ends."""
    carries: int = 0
    """Virtual functions that are switched on."""
    user: Vm | None = None
    let_go_at: float = -math.inf
    """When the last VM let go of it."""
    came_at: float = -math.inf
    """When it was put in, or made."""
    _shown: tuple[tuple[object, ...], PciFunction] | None = None

    @property
    def is_bound(self) -> bool:
        """To a vfio driver, and not about to leave it."""
        return self.is_present and self.driver in VFIO_DRIVERS

    @property
    def is_enabled(self) -> bool:
        """What `enable` says: a mediated device has no such file."""
        return self.user is not None and self.kind != "mdev"


class Kernel:
    """The functions of one machine."""

    def __init__(self, functions: Iterable[Function], *, cdevs: bool) -> None:
        self.cdevs = cdevs
        self.functions = {f.address: f for f in functions}
        self.vms: list[Vm] = []
        self.last_at_node: dict[str, tuple[Function, float]] = {}
        """Cdev node -> the function that has it, or had it last, and when it got it."""
        self._bindings = 1000

    # What is there

    @property
    def present(self) -> list[Function]:
        return [f for f in self.functions.values() if f.is_present]

    def members(self, group: int) -> list[Function]:
        return [f for f in self.functions.values() if f.is_present and f.group == group]

    def owner(self, group: int) -> Vm | None:
        return next((vm for vm in self.vms if group in vm.groups), None)

    def node_of(self, function: Function) -> str | None:
        """The node that stands for the function, for who passes single functions; or its group's."""
        if not function.is_bound:
            return None
        return node_of_cdev(function.number or 0) if self.cdevs else node_of_group(function.group)

    def at_node(self, node: str) -> Function | None:
        """The function behind a cdev now."""
        function, _ = self.last_at_node[node]
        return function if self.node_of(function) == node else None

    def is_viable(self, group: int) -> bool:
        return all(f.driver is None or f.is_bound for f in self.members(group))

    # What happens

    def bind(self, function: Function, driver: str, now: float) -> bool:
        if not function.is_present or function.driver is not None or function.number is not None:
            return False
        if driver not in VFIO_DRIVERS:
            if self.owner(function.group) is not None:
                return False
            function.driver = driver
            return True
        taken = {f.number for f in self.functions.values()}
        number = 0
        while number in taken:
            number += 1
        self._bindings += 1
        function.driver, function.number, function.binding = driver, number, self._bindings
        self.last_at_node[node_of_cdev(number)] = (function, now)
        return True

    def unbind(self, function: Function) -> bool:
        if function.driver is None or function.carries:
            return False
        function.driver = None
        if function.user is None:
            self._release(function)
        return True

    def remove(self, function: Function) -> bool:
        """Out of its slot; a VM that has it is waited for."""
        if not function.is_present or function.carries:
            return False
        self.unbind(function)
        function.leaves = True
        if function.user is None:
            self._release(function)
        return True

    def add(self, function: Function, now: float, *, renumber: bool) -> bool:
        """Into its slot: to its mates' group, to the one it had, or to the lowest number that is free."""
        if function.is_present:
            return False
        taken = {f.group for f in self.functions.values() if f.is_present}
        mates = [self.functions[a] for a in function.mates if self.functions[a].is_present]
        if mates:
            function.group = mates[0].group
        elif renumber or function.group in taken:
            function.group = next(n for n in range(1, 1000) if n not in taken)
        function.is_present, function.leaves, function.is_off, function.hangs = True, False, False, False
        function.came_at = now
        return True

    def carry(self, function: Function, now: float) -> bool:
        """Switches the virtual functions of a physical one on, or off."""
        carried = [f for f in self.functions.values() if f.carrier == function.address]
        if not carried or not function.is_bound or function.user or any(f.user for f in carried):
            return False
        for virtual in carried:
            if function.carries:
                self.remove(virtual)
            else:
                self.add(virtual, now, renumber=True)
                self.bind(virtual, "vfio-pci", now)
        function.carries = 0 if function.carries else len(carried)
        return True

    def open(self, vm: Vm, functions: Set[Function]) -> bool:
        """Whether the kernel gives these to the VM, in addition to what it has."""
        groups = {f.group for f in functions}
        for function in functions:
            if not function.is_bound or function.user is not None or function.carries or function.is_off:
                return False
        if any(self.owner(g) not in (None, vm) or not self.is_viable(g) for g in groups):
            return False
        if vm not in self.vms:
            self.vms.append(vm)
        vm.functions |= functions
        vm.groups |= groups
        for function in functions:
            function.user = vm
        return True

    def close(self, vm: Vm, now: float) -> None:
        """The VM ends, and lets go of everything."""
        if vm in self.vms:
            self.vms.remove(vm)
        for function in vm.functions:
            function.user, function.let_go_at = None, now
            if function.driver is None:
                self._release(function)
        vm.functions.clear()
        vm.groups.clear()

    def _release(self, function: Function) -> None:
        function.number = None
        function.is_present = function.is_present and not function.leaves
        function.leaves = False

    # How it looks

    def facts(self, began_at: float) -> HostFacts:
        """What a scan reads."""
        functions: dict[str, PciFunction] = {}
        unreadable: dict[str, str] = {}
        members: dict[int, list[str]] = {}
        held: set[int] = set()
        nodes: set[int] = set()
        for function in sorted(self.present, key=lambda f: f.address):
            members.setdefault(function.group, []).append(function.address)
            if function.number is not None:
                nodes.add(function.group)
            if function.hangs:
                unreadable[function.address] = "sysfs does not answer"
                continue
            if function.is_bound:
                held.add(function.group)
            functions[function.address] = self._show(function)
        return HostFacts(
            functions=functions,
            unreadable=unreadable,
            groups={n: IommuGroup(number=n, members=tuple(members[n])) for n in sorted(held)},
            group_nodes=frozenset(nodes),
            kernel_has_cdevs=self.cdevs,
            vfio_devs={f"vfio{f.number}": f.address for f in self.present if f.is_bound},
            began_at=began_at,
        )

    def _show(self, function: Function) -> PciFunction:
        bound = function.is_bound
        enable = int(function.is_enabled) if bound or function.driver is None else None
        changing = (function.driver, function.number, function.binding, function.group, enable)
        state = (*changing, function.is_off, function.carries)
        if function._shown is not None and function._shown[0] == state:
            return function._shown[1]
        device, class_code = _KINDS[function.kind]
        is_mdev = function.kind == "mdev"
        vfio = None
        if bound:
            number = function.number or 0
            vfio = VfioDev(number=number, cdev=f"511:{number}" if self.cdevs else None, binding=function.binding)
        has_link = bound and not is_mdev
        speed, width = ("Unknown", 63) if function.is_off else ("32.0 GT/s PCIe", 16)
        shown = PciFunction(
            address=function.address,
            vendor=0x10DE,
            device=device,
            class_code=class_code,
            driver=function.driver,
            iommu_group=function.group,
            vfio=vfio,
            numa_node=0 if bound else None,
            link_speed=speed if has_link else None,
            link_width=width if has_link else None,
            enable=None if is_mdev else enable,
            virtual_functions=function.carries,
            physical_function=function.carrier,
            mdev_type="GRID T4-1Q" if is_mdev else None,
            bridges=("pci0000:00", "0000:00:01.0"),
        )
        function._shown = (state, shown)
        return shown
