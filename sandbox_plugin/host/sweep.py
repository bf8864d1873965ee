"""One pass over a whole host. It blocks, and may hang in the kernel: `host.scan` runs it on a thread."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import MappingProxyType

from sandbox_plugin.host import bus, pci_function
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.model import HostFacts, IommuGroup, PciFunction

SILENCE = "sysfs does not answer"
"""Why something is unreadable that hangs."""
BUS = "the PCI bus"
"""What is being read while it is neither one function nor the regions of one group."""
_TRIES = 3
"""How often a sweep mends what changed under it; the event of the change asks for the next one anyway."""


@dataclass(kw_only=True, eq=False, repr=False)
class Remembered:
    """What earlier sweeps read, so that it need not be read again.

    Also a sweep that nobody waits for any more enters what it hung at: each entry tells what it is true of.
    """

    functions: dict[str, tuple[pci_function.FolderVersion, PciFunction]] = field(default_factory=dict)
    """By address, with what tells the function from another in its place."""
    firmware_mappings: dict[int, tuple[tuple[int | None, tuple[str, ...]], tuple[str, ...]]] = field(
        default_factory=dict
    )
    """By the number of the group: its inode and its members, on which they depend, and the mappings."""


class _Unwanted(Exception):
    """Nobody waits for this sweep any more."""


@dataclass(kw_only=True, eq=False, repr=False)
class Sweep:
    """Reads everything once. Whoever waits for it looks at `reading` from another thread."""

    paths: HostPaths
    began_at: float
    """Monotonic seconds."""
    memory: Remembered
    hanging: frozenset[str]
    """What is known to hang, and is not read: addresses, and groups as `_group_name` calls them."""
    functions: dict[str, PciFunction] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    reading: tuple[str, float] = field(default_factory=lambda: (BUS, time.monotonic()))
    """What is being read, and since when (monotonic seconds): one value, so that the two always fit."""
    is_wanted: bool = True
    """Set to False by whoever waits no more: then it ends after the read it is at."""

    def without(self, what: str) -> Sweep:
        """A new sweep that goes on where this one hangs. What this one found is kept."""
        return Sweep(
            paths=self.paths,
            began_at=self.began_at,
            memory=self.memory,
            hanging=self.hanging | {what},
            functions=dict(self.functions),
            unreadable=dict(self.unreadable),
        )

    def run(self) -> HostFacts:
        """Raises `sysfs.OutOfResources`."""
        try:
            addresses = bus.list_addresses(self.paths)
        except OSError as error:
            return HostFacts(unreachable=f"{error.filename}: {error.strerror}", began_at=self.began_at)
        for address in addresses:
            if address not in self.functions and address not in self.unreadable and address not in self.hanging:
                self._read_function(address)
        for _ in range(_TRIES):
            facts = self._read_bus(addresses)
            changed = self._changed_meanwhile()
            if not changed:
                break
            for address in changed:
                self._read_function(address)
        known = self.memory.functions
        self.memory.functions = {address: known[address] for address in addresses if address in known}
        mappings = self.memory.firmware_mappings
        self.memory.firmware_mappings = {number: mappings[number] for number in facts.groups if number in mappings}
        return facts

    def _at(self, what: str) -> None:
        if not self.is_wanted:
            raise _Unwanted
        self.reading = (what, time.monotonic())

    def _read_function(self, address: str) -> None:
        """Reads one function into what was found, and of one that is still the same only what may have changed."""
        self._at(address)
        self.functions.pop(address, None)
        folder_id = pci_function.folder_id(self.paths, address)
        known_id, before = self.memory.functions.get(address, (None, None))
        try:
            function = pci_function.read_function(self.paths, address, before if known_id == folder_id else None)
        except pci_function.FunctionUnreadable as error:
            self.unreadable[address] = str(error)
            return
        self.functions[address] = function
        if folder_id is not None:
            self.memory.functions[address] = (folder_id, function)

    def _read_bus(self, addresses: list[str]) -> HostFacts:
        """All that is not read function by function, after the functions: so a node is not older than its function."""
        self._at(BUS)
        group_nodes, without_iommu = bus.read_group_nodes(self.paths)
        groups = bus.read_groups(self.paths, self.functions, without_iommu)
        groups = {n: self._with_mappings(group) for n, group in groups.items() if not self._is_hanging(group)}
        hanging = dict.fromkeys([address for address in addresses if address in self.hanging], SILENCE)
        return HostFacts(
            functions=MappingProxyType({a: self.functions[a] for a in addresses if a in self.functions}),
            unreadable=MappingProxyType(self.unreadable | hanging),
            groups=MappingProxyType(groups),
            group_nodes=group_nodes,
            kernel_has_cdevs=bus.read_kernel_has_cdevs(self.paths),
            dev_nodes=bus.read_dev_nodes(self.paths),
            vfio_devs=MappingProxyType(bus.read_vfio_devs(self.paths)),
            egm_gpus=MappingProxyType(bus.read_egm_gpus(self.paths)),
            began_at=self.began_at,
        )

    def _is_hanging(self, group: IommuGroup) -> bool:
        """Whether the regions of a group hang. Then the functions in it that a vfio driver holds are unreadable."""
        if _group_name(group) not in self.hanging:
            return False
        for function in [self.functions[address] for address in group.members if address in self.functions]:
            if function.is_held_by_vfio:
                del self.functions[function.address]
                self.unreadable[function.address] = SILENCE
        return True

    def _with_mappings(self, group: IommuGroup) -> IommuGroup:
        """The group with the firmware's mappings: read once, and again when it is another or has other members."""
        depend_on = (bus.group_inode(self.paths, group.number), group.members)
        known_of, mappings = self.memory.firmware_mappings.get(group.number, (None, ()))
        if known_of != depend_on:
            self._at(_group_name(group))
            mappings = bus.read_firmware_mappings(self.paths, group.number)
            self.memory.firmware_mappings[group.number] = (depend_on, mappings)
            self._at(BUS)
        return group._replace(firmware_mappings=mappings)

    def _changed_meanwhile(self) -> list[str]:
        """Functions that have been unbound since they were read: their nodes, read later, do not fit to that."""
        functions = [f for f in self.functions.values() if f.is_held_by_vfio and f.mdev_type is None]
        return [f.address for f in functions if pci_function.driver_of(self.paths, f.address) != f.driver]


def _group_name(group: IommuGroup) -> str:
    return f"IOMMU group {group.number}"
