"""Kernel events, from a netlink socket that is played: what makes the daemon look, and what becomes of a bad socket.

The real socket speaks in the VM (tests/vm). Here a datagram socket stands in its place, because nobody but the kernel
can send as the kernel does.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from daemon import Places
from loop import run
from names import PGPU, T4

from sandbox_plugin.host import uevents
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.sysfs import OutOfResources
from sandbox_plugin.host.uevents import UeventSource
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import Reason
from sandbox_plugin.registry import Registry
from sandbox_plugin.rescans import Rescans

KERNEL, PROCESS = 0, 4711
GPU = "0000:1b:00.0"
LOOK = ("look", "")


def message(**fields: str) -> bytes:
    lines = [f"change@/devices/pci0000:15/{GPU}", *(f"{key}={value}" for key, value in fields.items())]
    return "".join(f"{line}\0" for line in lines).encode()


BIND = message(ACTION="bind", SUBSYSTEM="pci", PCI_SLOT_NAME=GPU)


class Netlink:
    """What the source gets in place of its netlink socket: a queue of messages and errors, and a descriptor."""

    def __init__(self, *kind: int) -> None:
        self.kind = kind
        self.address: tuple[int, int] | None = None
        self._queue: list[tuple[int, bytes] | int] = []
        self._ours, self._its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._its.setblocking(False)

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        self._its.close()

    def fileno(self) -> int:
        return self._its.fileno()

    def bind(self, address: tuple[int, int]) -> None:
        self.address = address

    def recvmsg(self, size: int) -> tuple[bytes, list[Any], int, tuple[int, int]]:
        self._its.recv(1)
        came = self._queue.pop(0)
        if isinstance(came, int):
            raise OSError(came, os.strerror(came))
        sender, content = came
        return content[:size], [], 0, (sender, 1)

    def send(self, *came: tuple[int, bytes] | int) -> None:
        """From whom and what; or the error that reading gives."""
        self._queue += came
        for _ in came:
            self._ours.send(b"x")


class Bench:
    """A source, the sockets that it made, what it told, and its warnings."""

    def __init__(self) -> None:
        self.sockets: list[Netlink] = []
        self.refusals: list[OSError] = []
        """What the next attempts to have a socket come to."""
        self.told: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self._more = asyncio.Event()

    def make(self, *kind: int) -> Netlink:
        if self.refusals:
            raise self.refusals.pop(0)
        self.sockets.append(Netlink(*kind))
        return self.sockets[-1]

    def tell(self, *what: str) -> None:
        self.told.append((what[0], what[-1] if len(what) > 1 else ""))
        self._more.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._more.clear()
            await self._more.wait()

    async def looks(self, number: int) -> None:
        """Waits for so many looks; there are no more."""
        await self.until(lambda: self.told.count(LOOK) >= number)
        assert self.told.count(LOOK) == number


@asynccontextmanager
async def listening(monkeypatch: pytest.MonkeyPatch, *refusals: OSError) -> AsyncIterator[Bench]:
    bench = Bench()
    bench.refusals = list(refusals)
    # The module's own name for it: asyncio needs the real one.
    names = ("AF_NETLINK", "SOCK_RAW", "SOCK_NONBLOCK", "SOCK_CLOEXEC")
    played = type("played", (), {name: getattr(socket, name) for name in names} | {"socket": bench.make})
    monkeypatch.setattr(uevents, "socket", played)
    monkeypatch.setattr(uevents.log, "warning", lambda _, *, reason: bench.warnings.append(reason), raising=False)
    source = UeventSource(on_change=lambda: bench.tell("look"), on_aer=lambda *step: bench.tell(*step), retry=0.01)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(source.run())
        await bench.looks(1)  # it listens now, and asks for a look at what happened before
        yield bench
        task.cancel()


def test_a_message_about_a_device_is_a_reason_to_look_if_the_kernel_sent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with listening(monkeypatch) as bench:
            (netlink,) = bench.sockets
            assert netlink.address == (0, 1), "the kernel's own messages, and not udev's"
            netlink.send((PROCESS, BIND), (PROCESS, message(SUBSYSTEM="pci", PCI_SLOT_NAME=GPU, ERROR_EVENT="X")))
            netlink.send((KERNEL, message(SUBSYSTEM="net")), (KERNEL, b"\xff\0=\0nonsense"), (KERNEL, b""))
            netlink.send((KERNEL, BIND))
            await bench.looks(2)
            assert bench.told == [LOOK, LOOK]
            for number, subsystem in enumerate(("vfio", "vfio-dev", "drivers", "mdev"), 3):
                netlink.send((KERNEL, message(SUBSYSTEM=subsystem)))
                await bench.looks(number)

    run(body())


def test_the_steps_of_an_error_recovery_are_told_before_the_look_that_takes_them_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = ("BEGIN_RECOVERY", "FAILED_RECOVERY")

    async def body() -> None:
        async with listening(monkeypatch) as bench:
            for step in steps:
                recovery = message(ACTION="change", SUBSYSTEM="pci", PCI_SLOT_NAME=GPU, ERROR_EVENT=step)
                bench.sockets[0].send((KERNEL, recovery))
            await bench.looks(3)
            assert bench.told == [LOOK, (GPU, steps[0]), LOOK, (GPU, steps[1]), LOOK]

    run(body())


def test_messages_that_were_lost_are_a_reason_to_look_and_the_socket_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with listening(monkeypatch) as bench:
            bench.sockets[0].send(errno.ENOBUFS)
            await bench.looks(2)
            bench.sockets[0].send((KERNEL, BIND))
            await bench.looks(3)
            assert len(bench.sockets) == 1
            assert not bench.warnings

    run(body())


def test_where_there_are_no_kernel_events_that_is_said_once_and_they_are_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = [OSError(errno.EPROTONOSUPPORT, "Protocol not supported") for _ in range(3)]

    async def body() -> None:
        async with listening(monkeypatch, *refused) as bench:
            (said,) = bench.warnings
            assert said.startswith("Protocol not supported; ")
            bench.sockets[0].send((KERNEL, BIND))
            await bench.looks(2)

    run(body())


def test_a_socket_that_fails_is_replaced_and_what_happened_meanwhile_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        async with listening(monkeypatch) as bench:
            bench.sockets[0].send(errno.ENOTCONN)
            await bench.looks(2)
            assert len(bench.sockets) == 2
            assert bench.sockets[0].fileno() == -1, "closed"
            assert len(bench.warnings) == 1
            bench.sockets[1].send((KERNEL, BIND))
            await bench.looks(3)

    run(body())


@pytest.mark.parametrize("failures", [0, 1], ids=["at once", "after a scan that had no means"])
def test_the_outcome_of_a_recovery_is_taken_in_by_the_next_scan(
    places: Places, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    node = places.node("workstation")
    group = str(node.function(T4).iommu_group)
    monkeypatch.setattr("sandbox_plugin.rescans._RETRY", 0.01)

    async def body() -> Reason | None:
        registry = Registry(Rules(), requires_cdi=False)
        rescans = Rescans(HostPaths(node.root), registry, interval=3600)
        async with asyncio.TaskGroup() as group_of_tasks:
            task = group_of_tasks.create_task(rescans.run())
            before = await registry.newer_than(0)
            scanner: Any = rescans._scanner
            scan, left = scanner.scan, [OutOfResources("no descriptors")] * failures

            async def scarce() -> Any:
                if left:
                    raise left.pop()
                return await scan()

            scanner.scan = scarce
            rescans.note_aer(T4, "FAILED_RECOVERY")
            rescans.wake()
            inventory = await registry.newer_than(before.version)
            task.cancel()
        return {device.id: device.health.reason for device in inventory.resources[PGPU]}[group]

    assert run(body()) is Reason.FATAL_ERROR
