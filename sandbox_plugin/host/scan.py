"""One look at the whole host, off the loop's thread.

A sysfs read can hang in the kernel where no signal reaches it, so a scan runs on daemon threads that nothing joins.
A function that has not answered for `patience` seconds is reported as unreadable and left to its thread; the others
are read on by a new one. There is never more than one thread for each function that hangs.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

from sandbox_plugin.host import bus, pci_function, sysfs
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.threads import start_thread
from sandbox_plugin.model import Device, HostFacts, IommuGroup, Objection, PciFunction, is_vfio_driver

_Known = tuple[pci_function.Stamp, PciFunction]
"""A function as it was read, and what tells it from another in its place."""
_KnownMappings = tuple[tuple[int | None, tuple[str, ...]], tuple[str, ...]]
"""The inode and the members of a group, and the firmware's mappings in it: those depend on who its members are."""
_TRIES = 3
"""How often a sweep mends what changed under it; the event of the change asks for the next one anyway."""
_GRACE = 0.05
"""Seconds that a thread gets once more when its time is over: this whole process may have been stopped, or starved."""
_IMPATIENCE = 0.1
"""Seconds for a read where others have used up the patience: what answers must not wait for what hangs."""
_SILENCE = "sysfs does not answer"
_BUS = "the PCI bus"
"""What the sweep is reading while it is not at one function."""


def scan_now(paths: HostPaths) -> HostFacts:
    """One look at the whole host: for commands that have no loop. Raises `sysfs.OutOfResources`."""
    return asyncio.run(HostScanner(paths, on_late=lambda: None).scan())


class HostScanner:
    """Scans a host again and again without ever blocking the loop.

    Usage:

        scanner = HostScanner(paths, on_late=wake)
        facts = await scanner.scan()

    `on_late` is called on the loop when a function that hung has answered after all: a reason to scan again.
    """

    def __init__(self, paths: HostPaths, *, on_late: Callable[[], None], patience: float = 1.0) -> None:
        self._paths = paths
        self._on_late = on_late
        self._patience = patience
        self._hanging: set[str] = set()
        self._known: dict[str, _Known] = {}
        self._known_mappings: dict[int, _KnownMappings] = {}

    async def scan(self) -> HostFacts:
        """One look at everything.

        Takes at most about twice `patience`, and `_IMPATIENCE` for each function beyond the second that newly hangs.
        Raises `sysfs.OutOfResources` when this process could not look at all.
        """
        began_at = time.monotonic()
        if _BUS in self._hanging:
            return HostFacts(unreachable=_SILENCE, began_at=began_at)
        sweep = _Sweep(
            paths=self._paths,
            skipped=dict.fromkeys(self._hanging, _SILENCE),
            known=self._known,
            known_mappings=self._known_mappings,
        )
        patience = self._patience
        try:
            while (hung_at := await self._hung_at(sweep, patience)) is not None:
                self._hanging.add(hung_at)
                sweep.leave(partial(_call_soon, asyncio.get_running_loop(), self._answered, hung_at))
                if hung_at == _BUS:
                    return HostFacts(unreachable=_SILENCE, began_at=began_at)
                sweep = sweep.without(hung_at, because=_SILENCE)
                patience = max(_IMPATIENCE, began_at + 2 * self._patience - time.monotonic())
        finally:
            sweep.leave(lambda: None)
        facts = replace(sweep.facts(), began_at=began_at)
        if facts.unreachable is None:
            skipped = {address: self._known[address] for address in sweep.skipped if address in self._known}
            self._known = skipped | sweep.learnt
            self._known_mappings = sweep.learnt_mappings
        return facts

    async def _hung_at(self, sweep: _Sweep, patience: float) -> str | None:
        """Runs the sweep. Returns what it has been reading for longer than `patience`, or None: it has ended."""
        finished = asyncio.Event()
        sweep.start(partial(_call_soon, asyncio.get_running_loop(), finished.set))
        while not finished.is_set():
            reading = sweep.reading
            what, since = reading
            with suppress(TimeoutError):
                async with asyncio.timeout(since + patience - time.monotonic()):
                    await finished.wait()
            if sweep.reading is reading and not finished.is_set():
                # A process that was stopped, or got no CPU, comes here before its thread: that gets its turn first.
                await asyncio.sleep(_GRACE)
                if sweep.reading is reading and not finished.is_set():
                    return what
        return None

    def _answered(self, address: str) -> None:
        self._hanging.discard(address)
        self._on_late()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """One device is looked at once more, on a thread of its own."""

    began_at: float
    answer: Future[Objection | Exception | None]
    """What is wrong with it, None for nothing; or a fault of ours."""


class Recheck:
    """Looks at devices once more, before they are given away.

    Usage:

        recheck = Recheck(paths, patience=0.08)
        ill = await recheck(devices)

    There is one look at a device at a time. Who asks while it goes on waits for its answer too; while it hangs, the
    device is refused at once. So a device that hangs costs one thread, however often it is asked for. `on_refusal` is
    called for whatever speaks against a device: a scan should see it too.
    """

    def __init__(self, paths: HostPaths, patience: float, *, on_refusal: Callable[[], None] = lambda: None) -> None:
        self._paths = paths
        self._patience = patience
        self._on_refusal = on_refusal
        self._hanging: dict[tuple[str, str], _Look] = {}
        """Node and PCI address -> a look at that device that has not been answered yet. A number may be another
        device's by now."""

    async def __call__(self, devices: Sequence[Device]) -> dict[str, Objection]:
        """By ID, what speaks against giving these devices away now.

        Takes `patience` seconds at most; a device that has not answered by then is one of those.
        """
        now = time.monotonic()
        looks = {device.id: self._look(device, now) for device in devices}
        fresh = [asyncio.wrap_future(look.answer) for look in looks.values() if now - look.began_at < self._patience]
        if fresh:
            await asyncio.wait(fresh, timeout=self._patience)
        self._hanging = {key: look for key, look in self._hanging.items() if not look.answer.done()}
        answers = {device_id: self._answer(look, now) for device_id, look in looks.items()}
        against = {device_id: why for device_id, why in answers.items() if why is not None}
        if against:
            self._on_refusal()
        return against

    def _answer(self, look: _Look, now: float) -> Objection | None:
        """The thread's own word: a loop that is busy hears of it later."""
        if now - look.began_at >= self._patience or not look.answer.done():
            return Objection(why=_SILENCE)
        answer = look.answer.result()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _look(self, device: Device, now: float) -> _Look:
        key = (device.node, device.address)
        last = self._hanging.get(key)
        if last is not None and not last.answer.done():
            return last
        look = self._hanging[key] = _Look(began_at=now, answer=Future())

        def work() -> None:
            look.answer.set_result(self._ask(device))

        try:
            start_thread("recheck", work)
        except OSError as error:
            look.answer.set_result(Objection(why=f"it cannot be looked at: {error.strerror}"))
        return look

    def _ask(self, device: Device) -> Objection | Exception | None:
        try:
            return pci_function.objection(self._paths, device)
        except sysfs.OutOfResources as error:
            return Objection(why=f"it cannot be looked at: {error}")
        except Exception as error:  # it is for the caller to raise
            return error


@dataclass(kw_only=True)
class _Sweep:
    """One pass over all functions on a thread of its own; the loop only looks at it."""

    paths: HostPaths
    skipped: dict[str, str] = field(default_factory=dict)
    functions: dict[str, PciFunction] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    known: Mapping[str, _Known] = field(default_factory=dict)
    """What earlier sweeps read."""
    learnt: dict[str, _Known] = field(default_factory=dict)
    """What this one read."""
    known_mappings: Mapping[int, _KnownMappings] = field(default_factory=dict)
    learnt_mappings: dict[int, _KnownMappings] = field(default_factory=dict)
    """The same of IOMMU groups, by their numbers."""
    vfio_devs: Mapping[str, str] | None = None
    vfio_devices: frozenset[str] | None = None
    unreachable: str | None = None
    reading: tuple[str, float] = (_BUS, 0.0)
    """What is being read, and since when (monotonic seconds): one value, since the loop looks at it from outside."""
    result: HostFacts | None = None
    error: BaseException | None = None
    _ended: bool = False
    _left: Callable[[], None] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, when_done: Callable[[], None]) -> None:
        """Raises `sysfs.OutOfResources` where no thread can be had."""
        self._at(_BUS)
        _start_thread("host-scan", partial(self._work, when_done))

    def leave(self, when_it_answers: Callable[[], None]) -> None:
        """Nobody waits for this sweep any more: it stops after the read it is at, and says so then."""
        with self._lock:
            if self._left is not None:
                return
            self._left = when_it_answers
            ended = self._ended
        if ended:
            when_it_answers()

    def without(self, address: str, *, because: str) -> _Sweep:
        """A new sweep that goes on where this one hangs. What this one found is kept."""
        return _Sweep(
            paths=self.paths,
            skipped={**self.skipped, address: because},
            functions={a: function for a, function in self.functions.items() if a != address},
            known=self.known,
            learnt=dict(self.learnt),
            known_mappings=self.known_mappings,
            learnt_mappings=dict(self.learnt_mappings),
            unreadable=dict(self.unreadable),
        )

    def facts(self) -> HostFacts:
        if self.error is not None:
            raise self.error
        if self.result is None:
            return HostFacts(unreachable=self.unreachable or "the scan did not finish")
        return self.result

    def _work(self, when_done: Callable[[], None]) -> None:
        try:
            self.run()
        except BaseException as error:  # a fault of ours: it must end the daemon, not this thread alone
            self.error = error
        with self._lock:
            self._ended = True
            left = self._left
        (left or when_done)()

    def run(self) -> None:
        try:
            self.vfio_devs = bus.list_vfio_devs(self.paths)
            self.vfio_devices = None if self.vfio_devs is None else frozenset(self.vfio_devs.values())
            addresses = bus.list_addresses(self.paths)
        except OSError as error:
            self.unreachable = f"{error.filename}: {error.strerror}"
            return
        for address in addresses:
            if self._left is not None:
                return
            if address in self.functions or address in self.unreadable or address in self.skipped:
                continue
            self._take(address)
        self._at(_BUS)
        for _ in range(_TRIES):
            self.result = self._read_bus(addresses)
            changed = self._changed_meanwhile()
            if not changed:
                return
            for address in changed:
                self._take(address)

    def _take(self, address: str) -> None:
        """Reads one function into what was found."""
        self._at(address)
        self.functions.pop(address, None)
        try:
            self.functions[address] = self._read(address)
        except pci_function.FunctionUnreadable as error:
            self.unreadable[address] = str(error)

    def _read_bus(self, addresses: Sequence[str]) -> HostFacts:
        """What is not read function by function."""
        skipped = {a: self.skipped[a] for a in addresses if a in self.skipped}
        group_nodes, without_iommu = bus.read_group_nodes(self.paths)
        has_cdevs = any(f.vfio is not None and f.vfio.cdev for f in self.functions.values())
        groups = bus.read_groups(self.paths, self.functions, without_iommu)
        return HostFacts(
            functions=MappingProxyType({a: self.functions[a] for a in addresses if a in self.functions}),
            unreadable=MappingProxyType(self.unreadable | skipped),
            groups=MappingProxyType({n: self._with_mappings(group) for n, group in groups.items()}),
            group_nodes=group_nodes,
            kernel_has_cdevs=has_cdevs or bus.read_kernel_has_cdevs(self.paths),
            dev_nodes=bus.read_dev_nodes(self.paths),
            vfio_devs=MappingProxyType(self.vfio_devs or {}),
        )

    def _with_mappings(self, group: IommuGroup) -> IommuGroup:
        """The group with the firmware's mappings in it: read once, and again when it is another or has other members.

        While that hangs, it is a function of the group that does not answer, and not the whole bus.
        """
        if self._left is not None:
            return group
        which = (bus.group_inode(self.paths, group.number), group.members)
        known = self.learnt_mappings.get(group.number) or self.known_mappings.get(group.number)
        if known is None or known[0] != which:
            held = (f.address for f in self.functions.values() if f.iommu_group == group.number)
            self._at(next(address for address in held if bus.is_held_by_vfio(self.functions[address])))
            known = (which, bus.read_firmware_mappings(self.paths, group.number))
            self._at(_BUS)
        self.learnt_mappings[group.number] = known
        return replace(group, firmware_mappings=known[1])

    def _changed_meanwhile(self) -> list[str]:
        """Functions that have been unbound since they were read: their nodes, read later, do not fit to that."""
        if self._left is not None:
            return []
        functions = [f for f in self.functions.values() if is_vfio_driver(f.driver) and f.mdev_type is None]
        return [f.address for f in functions if pci_function.driver_of(self.paths, f.address) != f.driver]

    def _read(self, address: str) -> PciFunction:
        """Reads one function, and of one that is still the same only what may have changed."""
        stamp = pci_function.stamp(self.paths, address)
        before = self.known.get(address)
        is_same = before is not None and stamp is not None and before[0] == stamp
        known = before[1] if before is not None and is_same else None
        function = pci_function.read_function(self.paths, address, known, self.vfio_devices)
        if stamp is not None:
            self.learnt[address] = (stamp, function)
        return function

    def _at(self, what: str) -> None:
        self.reading = (what, time.monotonic())


def _start_thread(name: str, work: Callable[[], None]) -> None:
    """A thread that nothing joins. Raises `sysfs.OutOfResources`."""
    try:
        start_thread(name, work)
    except OSError as error:
        raise sysfs.OutOfResources(error.strerror) from None


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    """From a scan thread. The loop may have ended while the thread hung; then there is nobody left to tell."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        return
