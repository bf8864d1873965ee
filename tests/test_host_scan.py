"""Scans of a whole host while parts of it hang, break, vanish or change under them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import MakeNode
from hardship import Trap, no_descriptors, no_threads
from loop import LIMIT, in_loop, run
from names import AUDIO, GEFORCE, T4
from trials import wait_until

from sandbox_plugin.fake.hardware import VgpuType
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.host import bus, pci_function, sysfs
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import HostScanner, scan_now
from sandbox_plugin.model import HostFacts, PciFunction

PATIENCE = 0.5
"""Seconds; long against the time that a whole scan takes, also on a busy machine."""
SILENCE = "sysfs does not answer"


def scan_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "host-scan"]


def assert_hanging(number: int) -> None:
    """So many threads hang; that of a scan that has just ended is not at work any more."""
    wait_until(lambda: len(scan_threads()) <= number, f"no more than {number} threads of scans")
    assert len(scan_threads()) == number


def join_scans() -> None:
    wait_until(lambda: not scan_threads(), "no thread is at work on a scan")


@pytest.fixture
def node(fake_node: MakeNode) -> FakeNode:
    return fake_node("workstation")


@pytest.fixture
def paths(node: FakeNode) -> HostPaths:
    return HostPaths(node.root)


SetTrap = Callable[[Path], Trap]


@pytest.fixture(autouse=True)
def trap(node: FakeNode) -> Iterator[SetTrap]:
    """Makes a file of the node hang. At the end of each test all answer, and no thread of a scan is left."""
    made: list[Trap] = []

    def put(file: Path) -> Trap:
        made.append(Trap(file))
        return made[-1]

    yield put
    for each in made:
        each.release()
    join_scans()


class Late:
    """Counts the calls of `on_late`."""

    def __init__(self) -> None:
        self.calls = 0
        self._called = asyncio.Event()

    def __call__(self) -> None:
        self.calls += 1
        self._called.set()

    async def until(self, calls: int) -> None:
        while self.calls < calls:
            self._called.clear()
            await self._called.wait()


def scanner_of(paths: HostPaths, on_late: Callable[[], None] = lambda: None, patience: float = PATIENCE) -> HostScanner:
    return HostScanner(paths, on_late=on_late, patience=patience)


def scan(paths: HostPaths) -> HostFacts:
    return run(scanner_of(paths).scan())


async def scan_anew(paths: HostPaths) -> HostFacts:
    """What a scanner says that knows nothing from before."""
    return await scanner_of(paths, patience=LIMIT).scan()


def test_a_scan_sees_functions_groups_and_what_the_kernel_can_do_and_says_when_it_began(paths: HostPaths) -> None:
    before = time.monotonic()
    facts = scan_now(paths)
    assert before <= facts.began_at <= time.monotonic()
    assert facts.functions[T4].driver == "vfio-pci"
    assert facts.group_nodes == {11, 13}
    assert facts.groups.keys() == {11, 13}
    assert facts.kernel_has_cdevs is False
    assert facts.dev_nodes == frozenset({"/dev/vfio/11", "/dev/vfio/13"})
    assert T4 in facts.vfio_devs.values()
    assert (facts.unreadable, facts.unreachable) == ({}, None)


def test_a_function_that_cannot_be_read_and_an_entry_that_is_none_cost_themselves_alone(
    node: FakeNode, paths: HostPaths
) -> None:
    node.set_attribute(T4, "class", "graphics")
    (paths.pci_devices / "slots").mkdir()
    facts = scan(paths)
    assert dict(facts.unreadable) == {
        T4: "class is 'graphics', not a hexadecimal number",
        "slots": "'slots' is not a PCI address",
    }
    assert len(facts.functions) == 11


def test_a_bus_that_cannot_be_listed_is_unreachable_and_says_why(tmp_path: Path) -> None:
    facts = scan_now(HostPaths(tmp_path))
    assert facts.functions == {}
    assert facts.unreachable == f"{tmp_path}/sys/bus/pci/devices: No such file or directory"


# What hangs


@pytest.mark.parametrize("name", ["vendor", "class", "power_state", "enable", "resource"])
def test_a_function_that_hangs_is_unreadable_and_the_others_are_read(
    node: FakeNode, paths: HostPaths, trap: SetTrap, name: str
) -> None:
    trap(node.folder(GEFORCE) / name)
    facts = scan(paths)
    assert dict(facts.unreadable) == {GEFORCE: SILENCE}
    assert len(facts.functions) == 11
    assert GEFORCE in facts.groups[11].members


def test_a_vgpu_whose_type_hangs_costs_itself_alone(node: FakeNode, paths: HostPaths, trap: SetTrap) -> None:
    node.bind(T4, "nvidia")
    one, two = node.add_vgpu_functions(T4, [VgpuType(222, "GRID T4-1B", fits=2)], 2)
    trap(node.folder(one) / "nvidia/current_vgpu_type")
    facts = scan(paths)
    assert dict(facts.unreadable) == {one: SILENCE}
    assert facts.functions[two].vgpu_type == "0"


@in_loop
async def test_each_function_that_hangs_has_one_thread_and_is_waited_for_once(
    node: FakeNode, paths: HostPaths, trap: SetTrap
) -> None:
    trap(node.folder(GEFORCE) / "vendor")
    trap(node.folder(T4) / "enable")
    scanner = scanner_of(paths)
    found = [await scanner.scan() for _ in range(4)]
    assert_hanging(2)
    for facts in found:
        assert dict(facts.unreadable) == {GEFORCE: SILENCE, T4: SILENCE}
        assert len(facts.functions) == 10


def test_many_functions_that_hang_at_once_do_not_add_up(node: FakeNode, paths: HostPaths, trap: SetTrap) -> None:
    hanging = sorted(os.listdir(paths.pci_devices))[:6]
    for address in hanging:
        trap(node.folder(address) / "vendor")
    began = time.monotonic()
    facts = run(scanner_of(paths, patience=1.0).scan())
    assert sorted(facts.unreadable) == hanging
    assert time.monotonic() - began < 6, "one after the other it would be more"


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


@in_loop
async def test_a_late_answer_is_told_and_brings_its_function_back_and_no_other(
    node: FakeNode, paths: HostPaths, trap: SetTrap
) -> None:
    first, second = trap(node.folder(GEFORCE) / "vendor"), trap(node.folder(T4) / "vendor")
    late = Late()
    scanner = scanner_of(paths, late)
    assert (await scanner.scan()).unreadable.keys() == {GEFORCE, T4}
    assert late.calls == 0
    first.release()
    await late.until(1)
    facts = await scanner.scan()
    assert dict(facts.unreadable) == {T4: SILENCE}
    assert GEFORCE in facts.functions
    second.release()
    await late.until(2)
    assert await scanner.scan() == await scan_anew(paths)


@in_loop
async def test_a_function_that_hangs_and_leaves_the_bus_is_not_reported(
    node: FakeNode, paths: HostPaths, trap: SetTrap
) -> None:
    trap(node.folder(T4) / "vendor")
    scanner = scanner_of(paths)
    await scanner.scan()
    (paths.pci_devices / T4).unlink()
    assert (await scanner.scan()).unreadable == {}


@in_loop
async def test_a_bus_that_hangs_is_unreachable_and_asked_again_when_it_answers(paths: HostPaths, trap: SetTrap) -> None:
    hanging = trap(paths.devices_list)
    late = Late()
    scanner = scanner_of(paths, late)
    for _ in range(3):
        silent = await scanner.scan()
        assert (silent.unreachable, silent.functions) == (SILENCE, {})
        assert_hanging(1)
    hanging.release()
    await late.until(1)
    assert await scanner.scan() == await scan_anew(paths)


@in_loop
async def test_where_the_regions_of_a_group_hang_only_what_is_held_for_vms_in_it_is_unreadable(
    paths: HostPaths, trap: SetTrap
) -> None:
    held = {GEFORCE, AUDIO, "0000:01:00.2", "0000:01:00.3"}
    hanging = trap(paths.iommu_groups / "11/reserved_regions")
    late = Late()
    scanner = scanner_of(paths, late)
    silent = [await scanner.scan() for _ in range(2)]
    assert_hanging(1)
    hanging.release()
    await late.until(1)
    answered = await scanner.scan()
    for facts in silent:
        assert facts.unreachable is None
        assert dict(facts.unreadable) == dict.fromkeys(held, SILENCE)
        assert facts.functions.keys() == answered.functions.keys() - held
        assert facts.groups.keys() == {13}
    assert answered == await scan_anew(paths)


def test_a_scan_that_is_slow_but_goes_on_is_not_given_up(paths: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pci_function.read_function

    def slow(*args: Any, **more: Any) -> PciFunction:
        threading.Event().wait(PATIENCE / 5)
        return real(*args, **more)

    monkeypatch.setattr(pci_function, "read_function", slow)
    facts = scan(paths)
    assert (len(facts.functions), facts.unreadable) == (12, {})


# What ends it


@in_loop
async def test_a_scan_that_is_cancelled_ends_at_once_and_its_thread_after_the_read_it_is_at(
    node: FakeNode, paths: HostPaths, trap: SetTrap
) -> None:
    first, *_ = sorted(os.listdir(paths.pci_devices))
    hanging = trap(node.folder(first) / "vendor")
    trap(node.folder(T4) / "vendor")  # where it would hang if it read on
    late = Late()
    scanning = asyncio.create_task(scanner_of(paths, late, patience=10 * LIMIT).scan())
    await asyncio.sleep(0)
    await asyncio.to_thread(wait_until, lambda: len(scan_threads()) == 1, "it has begun")
    scanning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scanning
    hanging.release()
    await asyncio.to_thread(join_scans)
    assert late.calls == 0


def test_an_answer_after_the_loop_has_ended_harms_nobody(
    node: FakeNode, paths: HostPaths, trap: SetTrap, caplog: pytest.LogCaptureFixture
) -> None:
    hanging = trap(node.folder(GEFORCE) / "vendor")
    scan(paths)
    hanging.release()
    join_scans()
    assert caplog.records == []


@pytest.mark.parametrize(("module", "name"), [(pci_function, "read_function"), (bus, "read_group_nodes")])
def test_a_fault_of_ours_in_the_scan_thread_reaches_the_caller_also_after_something_hung(
    node: FakeNode, paths: HostPaths, trap: SetTrap, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    trap(node.folder(GEFORCE) / "vendor")

    def fail(*_: object) -> None:
        raise LookupError("a fault of ours")

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(LookupError, match="a fault of ours"):
        scan(paths)


@in_loop
async def test_a_want_of_descriptors_or_threads_is_no_word_about_the_host(paths: HostPaths) -> None:
    scanner = scanner_of(paths)
    for want, words in ((no_descriptors, "Too many open files"), (no_threads, "thread")):
        with want(), pytest.raises(sysfs.OutOfResources, match=words):
            await scanner.scan()
    assert await scanner.scan() == await scan_anew(paths)


# What changes while it is looked at


def while_read(file: Path, *acts: Callable[[], object]) -> None:
    """Does the first of these when the file is read the first time, before the reader gets an answer, and so on."""
    content = file.read_bytes()
    places = [file.with_name(f"{file.name}-{number}") for number in range(len(acts) + 1)]
    for fifo in places[:-1]:
        os.mkfifo(fifo)
    places[-1].write_bytes(content)

    def work() -> None:
        for act in acts:
            with file.open("wb") as answer:  # waits for a reader
                act()
                places.pop(0).replace(file)
                answer.write(content)

    places.pop(0).replace(file)
    threading.Thread(target=work, daemon=True).start()


def test_functions_that_are_unbound_or_leave_while_the_rest_is_read_are_read_again(
    node: FakeNode, paths: HostPaths
) -> None:
    def change() -> None:
        node.unbind(T4)
        node.remove(AUDIO)

    while_read(paths.devices_list, change)
    facts = scan(paths)
    assert (facts.functions[T4].driver, facts.functions[T4].vfio) == (None, None)
    assert facts.group_nodes == {11}
    assert facts.groups.keys() == {11}
    assert T4 not in facts.vfio_devs.values()
    assert AUDIO not in facts.functions
    assert list(facts.unreadable) == [AUDIO]


def test_a_function_that_never_rests_does_not_keep_the_scan(node: FakeNode, paths: HostPaths) -> None:
    drivers = ["mlx5_vfio_pci", "vfio-pci"] * 4
    while_read(paths.devices_list, *(partial(node.bind, T4, driver) for driver in drivers))
    assert len(scan(paths).functions) == 12
    assert paths.devices_list.is_fifo(), "it was not followed to the end"
    while not paths.devices_list.is_file():
        paths.devices_list.read_bytes()  # so that nobody waits for a reader


# What is known from the scan before


@in_loop
async def test_what_a_function_is_is_read_once_and_again_when_another_is_in_its_place(
    node: FakeNode, paths: HostPaths
) -> None:
    scanner = scanner_of(paths)
    assert (await scanner.scan()).functions[T4].device == 0x1EB8
    (node.folder(T4) / "device").write_text("0x2330\n")  # which no function does
    assert (await scanner.scan()).functions[T4].device == 0x1EB8
    node.remove(T4)
    node.add(T4)
    node.set_attribute(T4, "device", "0x2330")
    assert (await scanner.scan()).functions[T4].device == 0x2330


def test_what_the_firmware_maps_in_a_group_is_read_once_and_again_when_it_is_another_or_has_other_members(
    node: FakeNode, paths: HostPaths
) -> None:
    scanner = scanner_of(paths)
    group = paths.iommu_groups / "11"

    def mapped(kind: str) -> bool:
        (group / "reserved_regions").write_text(f"0x7e000000 0x7e0fffff {kind}\n")
        return run(scanner.scan()).groups[11].firmware_mappings == ("0x7e000000-0x7e0fffff",)

    assert mapped("direct")
    assert mapped("msi"), "it is known"
    group.rename(group.with_name("kept"))  # so that its inode number stays taken
    shutil.copytree(group.with_name("kept"), group, symlinks=True)
    assert not mapped("msi")
    node.remove(AUDIO)
    assert mapped("direct")
    node.add(AUDIO)
    assert not mapped("msi")
    shutil.rmtree(group)
    facts = run(scanner.scan())
    assert facts.groups[11].firmware_mappings == (), "nor of one whose folder is gone"


@in_loop
async def test_a_second_scan_sees_everything_that_changed(node: FakeNode, paths: HostPaths) -> None:
    scanner = scanner_of(paths)
    first = await scanner.scan()
    node.sicken(T4)
    node.set_enable(GEFORCE, 1)
    node.unbind(AUDIO)
    second = await scanner.scan()
    assert second == await scan_anew(paths) != first
    assert second.functions[T4].link_width == 63
    assert second.functions[GEFORCE].enable == 1
    assert second.functions[AUDIO].driver is None
