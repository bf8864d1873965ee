"""A look at the whole host while parts of it hang, break, vanish or change under it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import MakeNode
from loop import LIMIT, run
from names import AUDIO, GEFORCE, T4
from trials import wait_until

from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.host import bus, pci_function, sysfs
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import HostScanner, Recheck, scan_now
from sandbox_plugin.model import Device, HostFacts, Objection, PciFunction, Placement

PATIENCE = 0.5
"""Seconds; long against the time that a whole scan takes, also on a busy machine."""


def spy_on_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Address and thread of every function whose reading has begun, in order."""
    reads: list[tuple[str, int]] = []
    real = pci_function.read_function

    def spy(paths: HostPaths, address: str, *more: Any) -> PciFunction:
        reads.append((address, threading.get_ident()))
        return real(paths, address, *more)

    monkeypatch.setattr(pci_function, "read_function", spy)
    return reads


def scan_threads() -> int:
    return sum(thread.name == "host-scan" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    """Whatever hung has been let go; each test starts and ends without threads of a scan."""
    assert scan_threads() == 0
    yield
    deadline = time.monotonic() + LIMIT
    for thread in threading.enumerate():
        if thread.name in ("host-scan", "recheck"):
            thread.join(max(0.0, deadline - time.monotonic()))
    assert scan_threads() == 0


@pytest.fixture
def node(fake_node: MakeNode) -> FakeNode:
    return fake_node("workstation")


@pytest.fixture
def paths(node: FakeNode) -> HostPaths:
    return HostPaths(node.root)


@dataclass
class Trap:
    """An attribute whose reading hangs, until `release`."""

    file: Path
    fifo: Path
    content: bytes

    def release(self) -> None:
        """Lets whoever hangs in it have the answer; the next reader finds a plain file again."""
        plain = self.fifo.with_name("plain")
        plain.write_bytes(self.content)
        plain.replace(self.file)
        if self.fifo.exists():
            try:
                descriptor = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                return  # nobody hangs in it
            os.write(descriptor, self.content)
            os.close(descriptor)
            self.fifo.unlink()


@pytest.fixture
def trap(node: FakeNode) -> Iterator[Callable[..., Trap]]:
    """Puts a FIFO in an attribute's place: `trap(address, "vendor")`. At the end of the test all are let go."""
    made: list[Trap] = []

    def put(address: str, name: str = "vendor") -> Trap:
        file = node.folder(address) / name
        fifo = node.root / f"fifo-{len(made)}"
        content = file.read_bytes()
        os.mkfifo(fifo)
        file.unlink()
        os.link(fifo, file)
        made.append(Trap(file, fifo, content))
        return made[-1]

    yield put
    for each in made:
        each.release()


@dataclass
class Late:
    """Counts the calls of `on_late`."""

    called: asyncio.Event = field(default_factory=asyncio.Event)
    calls: int = 0

    def __call__(self) -> None:
        self.calls += 1
        self.called.set()


def ignore() -> None:
    """For tests in which nothing answers late."""


SILENCE = "sysfs does not answer"


def test_a_scan_sees_functions_groups_and_what_the_kernel_can_do(paths: HostPaths) -> None:
    facts = scan_now(paths)
    assert facts.functions[T4].driver == "vfio-pci"
    assert facts.group_nodes == {11, 13}
    assert facts.groups.keys() == {11, 13}
    assert facts.kernel_has_cdevs is False
    assert facts.dev_nodes == frozenset({"/dev/vfio/11", "/dev/vfio/13"})
    assert (facts.unreadable, facts.unreachable) == ({}, None)


def test_the_loop_goes_on_while_a_scan_runs(paths: HostPaths, trap: Callable[..., Trap]) -> None:
    trap(T4)

    async def work() -> int:
        scan = asyncio.create_task(HostScanner(paths, on_late=ignore, patience=PATIENCE).scan())
        turns = 0
        while not scan.done():
            await asyncio.sleep(0.001)
            turns += 1
        return turns

    assert run(work()) > 10


def test_a_function_that_cannot_be_read_costs_itself_alone(node: FakeNode, paths: HostPaths) -> None:
    node.set_attribute(T4, "class", "graphics")
    facts = run(HostScanner(paths, on_late=ignore).scan())
    assert dict(facts.unreadable) == {T4: "class is 'graphics', not a hexadecimal number"}
    assert GEFORCE in facts.functions
    assert T4 not in facts.functions


def test_an_entry_that_is_no_function_costs_itself_alone(paths: HostPaths) -> None:
    (paths.pci_devices / "slots").mkdir()
    facts = run(HostScanner(paths, on_late=ignore).scan())
    assert list(facts.unreadable) == ["slots"]
    assert len(facts.functions) == 12


def test_a_function_that_vanishes_while_it_is_read_costs_itself_alone(
    node: FakeNode, paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = bus.list_addresses(paths)
    monkeypatch.setattr(bus, "list_addresses", lambda _: listed)
    node.remove(T4)
    facts = run(HostScanner(paths, on_late=ignore).scan())
    assert list(facts.unreadable) == [T4]
    assert "missing" in facts.unreadable[T4]


def test_a_bus_that_cannot_be_listed_is_unreachable_and_says_why(tmp_path: Path) -> None:
    facts = scan_now(HostPaths(tmp_path))
    assert facts.functions == {}
    assert facts.unreachable == f"{tmp_path}/sys/bus/pci/devices: No such file or directory"


# What hangs


def test_a_function_that_hangs_is_reported_after_the_patience_and_the_others_are_read(
    paths: HostPaths, trap: Callable[..., Trap]
) -> None:
    trap(GEFORCE)
    begun = time.monotonic()
    facts = run(HostScanner(paths, on_late=ignore, patience=PATIENCE).scan())
    assert time.monotonic() - begun >= PATIENCE
    assert dict(facts.unreadable) == {GEFORCE: SILENCE}
    assert GEFORCE not in facts.functions
    assert facts.functions[T4].driver == "vfio-pci"
    assert GEFORCE in facts.groups[11].members


@pytest.mark.parametrize("name", ["class", "power_state", "enable", "resource"])
def test_it_does_not_matter_where_a_function_hangs(paths: HostPaths, trap: Callable[..., Trap], name: str) -> None:
    trap(GEFORCE, name)
    facts = run(HostScanner(paths, on_late=ignore, patience=PATIENCE).scan())
    assert dict(facts.unreadable) == {GEFORCE: SILENCE}
    assert len(facts.functions) == 11


def test_each_function_that_hangs_has_one_thread_and_no_more(
    paths: HostPaths, trap: Callable[..., Trap], monkeypatch: pytest.MonkeyPatch
) -> None:
    trap(GEFORCE)
    trap(T4, "enable")
    reads = spy_on_reads(monkeypatch)

    async def work() -> list[HostFacts]:
        scanner = HostScanner(paths, on_late=ignore, patience=PATIENCE)
        return [await scanner.scan() for _ in range(4)]

    for facts in run(work()):
        assert dict(facts.unreadable) == {GEFORCE: SILENCE, T4: SILENCE}
        assert len(facts.functions) == 10
    addresses = [address for address, _ in reads]
    assert (addresses.count(GEFORCE), addresses.count(T4)) == (1, 1)
    assert len({thread for address, thread in reads if address in (GEFORCE, T4)}) == 2
    wait_until(lambda: scan_threads() == 2, "no more threads than functions that hang")  # the last scan's is ending


def test_many_functions_that_hang_at_once_do_not_add_up(paths: HostPaths, trap: Callable[..., Trap]) -> None:
    hanging = sorted(os.listdir(paths.pci_devices))[:6]
    for address in hanging:
        trap(address, "vendor")
    began = time.monotonic()
    facts = run(HostScanner(paths, on_late=ignore, patience=1.0).scan())
    took = time.monotonic() - began
    assert sorted(facts.unreadable) == hanging
    assert took < 6  # one after the other it would be more


STOPS_ITSELF = """
import asyncio, os, signal, sys
from pathlib import Path
from sandbox_plugin.host import pci_function
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import HostScanner

real = pci_function.read_function

def stop_at(paths, address, *more):
    if address == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(paths, address, *more)

pci_function.read_function = stop_at
scanner = HostScanner(HostPaths(Path(sys.argv[1])), on_late=lambda: None, patience=float(sys.argv[3]))
facts = asyncio.run(scanner.scan())
print(dict(facts.unreadable), facts.unreachable)
"""


def test_a_process_that_was_stopped_blames_nobody(node: FakeNode) -> None:
    """When it goes on, its loop and its scan thread both find that the time is over."""
    command = [sys.executable, "-c", STOPS_ITSELF, str(node.root), T4, str(PATIENCE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        time.sleep(3 * PATIENCE)  # how long it is stopped
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=LIMIT)
    assert said.strip() == "{} None"


def refuse(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_where_no_thread_can_be_had_nothing_is_said_about_the_host(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanner = HostScanner(paths, on_late=ignore, patience=PATIENCE)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(sysfs.OutOfResources, match="thread"):
            run(scanner.scan())
    assert T4 in run(scanner.scan()).functions


def test_a_scan_says_when_it_began(paths: HostPaths) -> None:
    before = time.monotonic()
    assert before <= run(HostScanner(paths, on_late=ignore).scan()).began_at <= time.monotonic()


def test_what_hangs_is_waited_for_once_and_not_in_every_scan(paths: HostPaths, trap: Callable[..., Trap]) -> None:
    trap(GEFORCE)

    async def work() -> float:
        scanner = HostScanner(paths, on_late=ignore, patience=2 * PATIENCE)
        await scanner.scan()
        begun = time.monotonic()
        for _ in range(5):
            await scanner.scan()
        return time.monotonic() - begun

    assert run(work()) < 5 * 2 * PATIENCE


def test_a_late_answer_is_told_and_the_function_is_back(paths: HostPaths, trap: Callable[..., Trap]) -> None:
    hanging = trap(GEFORCE)

    async def work() -> tuple[HostFacts, HostFacts, int]:
        late = Late()
        scanner = HostScanner(paths, on_late=late, patience=PATIENCE)
        before = await scanner.scan()
        assert late.calls == 0
        hanging.release()
        await late.called.wait()
        return before, await scanner.scan(), late.calls

    before, after, calls = run(work())
    assert GEFORCE not in before.functions
    assert after == scan_now(paths)
    assert GEFORCE in after.functions
    assert calls == 1


def test_one_late_answer_says_nothing_of_another_function_that_hangs(
    paths: HostPaths, trap: Callable[..., Trap]
) -> None:
    first = trap(GEFORCE)
    trap(T4)

    async def work() -> HostFacts:
        late = Late()
        scanner = HostScanner(paths, on_late=late, patience=PATIENCE)
        await scanner.scan()
        first.release()
        await late.called.wait()
        return await scanner.scan()

    facts = run(work())
    assert dict(facts.unreadable) == {T4: SILENCE}
    assert GEFORCE in facts.functions


def test_a_function_that_hangs_and_leaves_the_bus_is_not_reported(paths: HostPaths, trap: Callable[..., Trap]) -> None:
    trap(T4)

    async def work() -> HostFacts:
        scanner = HostScanner(paths, on_late=ignore, patience=PATIENCE)
        await scanner.scan()
        (paths.pci_devices / T4).unlink()
        return await scanner.scan()

    assert run(work()).unreadable == {}


class Gate:
    """In the place of a function that hangs until it is opened."""

    def __init__(self, instead_of: Callable[..., Any]) -> None:
        self._real = instead_of
        self._open = threading.Event()
        self.entered = threading.Event()
        self.calls = 0

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.calls += 1
        self.entered.set()
        assert self._open.wait(LIMIT)
        return self._real(*args, **more)

    def open(self) -> None:
        self._open.set()


@contextmanager
def gate(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> Iterator[Gate]:
    """Makes this function hang; open at the latest when the test ends."""
    made = Gate(getattr(module, name))
    monkeypatch.setattr(module, name, made)
    try:
        yield made
    finally:
        made.open()


@pytest.mark.parametrize("name", ["list_addresses", "read_groups", "read_group_nodes", "read_dev_nodes"])
def test_a_bus_that_hangs_is_unreachable_and_asked_again_when_it_answers(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with gate(monkeypatch, bus, name) as hanging:

        async def work() -> tuple[list[HostFacts], HostFacts]:
            late = Late()
            scanner = HostScanner(paths, on_late=late, patience=PATIENCE)
            silent = [await scanner.scan() for _ in range(3)]
            assert scan_threads() == 1
            assert hanging.calls == 1
            hanging.open()
            await late.called.wait()
            return silent, await scanner.scan()

        silent, answered = run(work())
    assert [facts.unreachable for facts in silent] == [SILENCE] * 3
    assert all(facts.functions == {} for facts in silent)
    assert answered.unreachable is None
    assert len(answered.functions) == 12


def test_a_scan_that_is_slow_but_goes_on_is_not_given_up(paths: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pci_function.read_function

    def slow(*args: Any, **more: Any) -> PciFunction:
        threading.Event().wait(PATIENCE / 5)
        return real(*args, **more)

    monkeypatch.setattr(pci_function, "read_function", slow)
    facts = run(HostScanner(paths, on_late=ignore, patience=PATIENCE).scan())
    assert (len(facts.functions), facts.unreadable) == (12, {})


# What ends it


def test_a_scan_that_is_cancelled_ends_at_once_and_its_thread_after_the_read_it_is_at(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gate(monkeypatch, pci_function, "read_function") as hanging:

        async def work() -> float:
            late = Late()
            scan = asyncio.create_task(HostScanner(paths, on_late=late, patience=LIMIT).scan())
            await asyncio.to_thread(hanging.entered.wait, LIMIT)
            begun = time.monotonic()
            scan.cancel()
            with pytest.raises(asyncio.CancelledError):
                await scan
            took = time.monotonic() - begun
            hanging.open()
            await asyncio.to_thread(_join_scans)
            assert late.calls == 0
            return took

        assert run(work()) < LIMIT / 2
    assert hanging.calls == 1


def _join_scans() -> None:
    for thread in threading.enumerate():
        if thread.name == "host-scan":
            thread.join(LIMIT)


def test_an_answer_after_the_loop_has_ended_harms_nobody(paths: HostPaths, trap: Callable[..., Trap]) -> None:
    hanging = trap(GEFORCE)
    run(HostScanner(paths, on_late=ignore, patience=PATIENCE).scan())
    hanging.release()
    _join_scans()  # an exception in the thread would fail the test


def test_a_fault_of_ours_in_the_scan_thread_reaches_the_caller(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> PciFunction:
        raise LookupError("a fault of ours")

    monkeypatch.setattr(pci_function, "read_function", fail)
    with pytest.raises(LookupError, match="a fault of ours"):
        scan_now(paths)


def test_a_fault_of_ours_after_something_hung_reaches_the_caller_too(
    paths: HostPaths, trap: Callable[..., Trap], monkeypatch: pytest.MonkeyPatch
) -> None:
    trap(GEFORCE)

    def fail(*_: object) -> frozenset[int]:
        raise LookupError("a fault of ours")

    monkeypatch.setattr(bus, "read_group_nodes", fail)
    with pytest.raises(LookupError, match="a fault of ours"):
        run(HostScanner(paths, on_late=ignore, patience=PATIENCE).scan())


@pytest.mark.parametrize(
    ("module", "name"),
    [(bus, "list_addresses"), (pci_function, "read_function"), (bus, "read_groups"), (bus, "read_group_nodes")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_want_of_descriptors_is_no_word_about_the_host(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    def fail(*_: object) -> None:
        raise sysfs.OutOfResources("Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(module, name, fail)
        scanner = HostScanner(paths, on_late=ignore)
        with pytest.raises(sysfs.OutOfResources, match="Too many open files"):
            run(scanner.scan())
    assert len(run(scanner.scan()).functions) == 12


# What changes while it is looked at


def test_a_function_that_is_unbound_while_the_rest_is_read_is_read_again(
    node: FakeNode, paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bus.read_groups
    calls = 0

    def meanwhile(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            node.unbind(T4)
        return real(*given)

    monkeypatch.setattr(bus, "read_groups", meanwhile)
    facts = run(HostScanner(paths, on_late=ignore).scan())
    assert (facts.functions[T4].driver, facts.functions[T4].vfio) == (None, None)
    assert facts.group_nodes == {11}
    assert facts.groups.keys() == {11}


def test_a_function_that_leaves_while_the_rest_is_read_is_told_of(
    node: FakeNode, paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bus.read_groups

    def meanwhile(*given: Any) -> Any:
        if T4 in [f.address for f in node.functions()]:
            node.remove(T4)
        return real(*given)

    monkeypatch.setattr(bus, "read_groups", meanwhile)
    facts = run(HostScanner(paths, on_late=ignore).scan())
    assert T4 not in facts.functions
    assert list(facts.unreadable) == [T4]


def test_a_function_that_never_rests_does_not_keep_the_scan(
    node: FakeNode, paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bus.read_groups

    def meanwhile(*given: Any) -> Any:
        if node.function(T4).driver == "vfio-pci":
            node.unbind(T4)
        else:
            node.bind(T4)
        return real(*given)

    monkeypatch.setattr(bus, "read_groups", meanwhile)
    assert len(run(HostScanner(paths, on_late=ignore).scan()).functions) == 12


def test_what_a_function_is_is_read_once_and_again_when_another_is_in_its_place(
    node: FakeNode, paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, bool] = {}
    real = pci_function.read_function

    def spy(paths: HostPaths, address: str, before: PciFunction | None, *more: Any) -> PciFunction:
        known[address] = before is not None
        return real(paths, address, before)

    monkeypatch.setattr(pci_function, "read_function", spy)

    async def work() -> None:
        scanner = HostScanner(paths, on_late=ignore)
        await scanner.scan()
        assert set(known.values()) == {False}
        await scanner.scan()
        assert set(known.values()) == {True}
        node.remove(T4)
        node.add(T4)
        node.set_attribute(T4, "device", "0x2330")
        facts = await scanner.scan()
        assert not known[T4]
        assert known[GEFORCE]
        assert facts.functions[T4].device == 0x2330

    run(work())


def reserve(paths: HostPaths, group: int, kind: str) -> None:
    """A region that somebody wants to have for himself in an IOMMU group, and no other."""
    file = paths.iommu_groups / str(group) / "reserved_regions"
    file.unlink(missing_ok=True)
    file.write_text(f"0x7e000000 0x7e0fffff {kind}\n")


def test_what_the_firmware_maps_in_a_group_is_read_once_and_again_when_the_group_is_another(
    node: FakeNode, paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    real = bus.read_firmware_mappings

    def spy(paths: HostPaths, number: int) -> tuple[str, ...]:
        reads.append(number)
        return real(paths, number)

    monkeypatch.setattr(bus, "read_firmware_mappings", spy)
    scanner = HostScanner(paths, on_late=ignore)

    def mappings() -> tuple[str, ...]:
        reads.clear()
        return run(scanner.scan()).groups[13].firmware_mappings

    reserve(paths, 13, "direct")
    assert (mappings(), reads) == (("0x7e000000-0x7e0fffff",), [11, 13])
    assert (mappings(), reads) == (("0x7e000000-0x7e0fffff",), [])
    node.remove(T4)  # with its group, which comes back with it
    node.add(T4)
    node.bind(T4)
    group = paths.iommu_groups / "13"
    group.rename(group.with_name("kept"))  # so that its inode number stays taken
    shutil.copytree(group.with_name("kept"), group, symlinks=True)
    assert (mappings(), reads) == ((), [13])
    assert (mappings(), reads) == ((), [])


def test_what_the_firmware_maps_in_a_group_is_read_again_when_another_function_comes_into_it(
    node: FakeNode, paths: HostPaths
) -> None:
    node.remove(AUDIO)
    scanner = HostScanner(paths, on_late=ignore)
    assert run(scanner.scan()).groups[11].firmware_mappings == ()
    node.add(AUDIO)
    reserve(paths, 11, "direct")
    assert run(scanner.scan()).groups[11].firmware_mappings == ("0x7e000000-0x7e0fffff",)


def test_where_the_regions_of_a_group_hang_only_what_is_held_for_vms_in_it_is_unreadable(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {GEFORCE, AUDIO, "0000:01:00.2", "0000:01:00.3", T4}
    with gate(monkeypatch, bus, "read_firmware_mappings") as hanging:

        async def work() -> tuple[HostFacts, HostFacts]:
            late = Late()
            scanner = HostScanner(paths, on_late=late, patience=3 * PATIENCE)
            silent = await scanner.scan()
            hanging.open()
            while late.calls < len(held):
                late.called.clear()
                await late.called.wait()
            assert hanging.calls == len(held), "who is not waited for any more reads on"
            return silent, await scanner.scan()

        silent, answered = run(work())
    assert silent.unreachable is None
    assert dict(silent.unreadable) == dict.fromkeys(held, SILENCE)
    assert silent.functions.keys() == answered.functions.keys() - held
    assert answered.unreadable == {}
    assert answered.groups.keys() == {11, 13}


def test_a_second_scan_sees_everything_that_changed(node: FakeNode, paths: HostPaths) -> None:
    async def work() -> tuple[HostFacts, HostFacts]:
        scanner = HostScanner(paths, on_late=ignore)
        first = await scanner.scan()
        node.sicken(T4)
        node.set_enable(GEFORCE, 1)
        node.unbind("0000:01:00.1")
        return first, await scanner.scan()

    first, second = run(work())
    assert second == scan_now(paths)
    assert second.functions[T4].link_width == 63
    assert second.functions[GEFORCE].enable == 1
    assert second.functions["0000:01:00.1"].driver is None
    assert second != first


# The last look before devices are given away


def given(*addresses: str) -> list[Device]:
    groups = {GEFORCE: 11, T4: 13}
    return [
        Device(
            id=str(groups[address]),
            resource="nvidia.com/pgpu",
            node=f"/dev/vfio/{groups[address]}",
            model="GPU",
            placements=(Placement(address=address, numa_node=None, bridges=()),),
            iommu_group=groups[address],
        )
        for address in addresses
    ]


async def recheck(paths: HostPaths, devices: list[Device], patience: float = LIMIT) -> dict[str, str]:
    return words(await Recheck(paths, patience)(devices))


def words(against: Mapping[str, Objection]) -> dict[str, str]:
    return {device_id: objection.why for device_id, objection in against.items()}


def test_devices_that_are_as_they_should_be_have_nothing_against_them(paths: HostPaths) -> None:
    assert run(recheck(paths, given(GEFORCE, T4))) == {}


def test_what_is_against_a_device_stands_at_its_id(node: FakeNode, paths: HostPaths) -> None:
    node.bind(T4, "nvidia")
    assert run(recheck(paths, given(GEFORCE, T4))) == {"13": f"{T4} is bound to nvidia now"}


def test_devices_that_do_not_answer_in_time_are_not_given_away(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pci_function.objection
    opened = threading.Event()

    def look(paths: HostPaths, device: Device) -> Objection | None:
        if device.id == "13":
            assert opened.wait(LIMIT)
        return real(paths, device)

    monkeypatch.setattr(pci_function, "objection", look)
    try:
        begun = time.monotonic()
        found = run(recheck(paths, given(GEFORCE, T4), PATIENCE))
        assert PATIENCE <= time.monotonic() - begun < LIMIT / 2
    finally:
        opened.set()
    assert found == {"13": SILENCE}


def test_a_device_that_hangs_costs_one_thread_however_often_it_is_asked_for(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gate(monkeypatch, pci_function, "objection") as hanging:

        async def work() -> None:
            once_more = Recheck(paths, PATIENCE)
            for _ in range(3):
                both = await asyncio.gather(once_more(given(T4)), once_more(given(T4)))
                assert list(map(words, both)) == 2 * [{"13": SILENCE}]
            assert hanging.calls == 1
            hanging.open()
            while await once_more(given(T4)):
                pass
            assert await once_more(given(T4)) == {}
            assert hanging.calls > 1, "an answer is given twice"

        run(work())


def test_a_look_that_hangs_says_nothing_of_another_device_that_has_the_node_now(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    (t4,), (geforce,) = given(T4), given(GEFORCE)
    real = pci_function.objection
    opened = threading.Event()

    def look(paths: HostPaths, device: Device) -> Objection | None:
        if device.address == T4:
            assert opened.wait(LIMIT)
        return real(paths, device)

    monkeypatch.setattr(pci_function, "objection", look)

    async def work() -> None:
        once_more = Recheck(paths, PATIENCE)
        in_its_place = replace(t4, node=geforce.node)
        assert words(await once_more([in_its_place])) == {"13": SILENCE}
        assert await once_more([geforce]) == {}

    try:
        run(work())
    finally:
        opened.set()


def test_a_want_of_descriptors_is_against_giving_away(paths: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise sysfs.OutOfResources("Too many open files")

    monkeypatch.setattr(pci_function, "objection", fail)
    assert run(recheck(paths, given(T4))) == {"13": "it cannot be looked at: Too many open files"}


def test_a_want_of_threads_is_against_giving_away_for_as_long_as_it_lasts(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    once_more = Recheck(paths, LIMIT)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert words(run(once_more(given(T4)))) == {"13": "it cannot be looked at: can't start new thread"}
    assert run(once_more(given(T4))) == {}


def test_a_look_that_was_answered_is_not_remembered(paths: HostPaths) -> None:
    async def work() -> None:
        once_more = Recheck(paths, LIMIT)
        for group in range(100):
            await once_more([replace(given(T4)[0], node=f"/dev/vfio/{group}")])
        assert once_more._hanging == {}

    run(work())


def test_whatever_speaks_against_a_device_asks_for_a_scan(node: FakeNode, paths: HostPaths) -> None:
    refusals: list[None] = []
    once_more = Recheck(paths, LIMIT, on_refusal=lambda: refusals.append(None))
    run(once_more(given(GEFORCE, T4)))
    assert not refusals
    node.sicken(T4)
    run(once_more(given(GEFORCE, T4)))
    assert len(refusals) == 1


def test_a_fault_of_our_own_in_a_look_is_raised(paths: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault of our own")

    monkeypatch.setattr(pci_function, "objection", fail)
    with pytest.raises(RuntimeError, match="a fault of our own"):
        run(recheck(paths, given(T4)))
