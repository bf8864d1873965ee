"""Kernel events: what makes the daemon look, and what becomes of a socket that fails.

The real socket speaks in the VM (tests/vm). Here a socket pair stands in its place, because nobody but the kernel can
send as the kernel does.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from conftest import MakeNode
from hardship import no_descriptors
from loop import in_loop, until
from names import PGPU, T4
from structlog.testing import capture_logs

from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.uevents import UeventSource, open_netlink
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import Reason
from sandbox_plugin.registry import Registry
from sandbox_plugin.rescans import Rescans

KERNEL, PROCESS = 0, 4711
GPU = "0000:1b:00.0"
LOOK = ("look",)


def message(**fields: str) -> bytes:
    lines = [f"change@/devices/pci0000:15/{GPU}", *(f"{key}={value}" for key, value in fields.items())]
    return "".join(f"{line}\0" for line in lines).encode()


BIND = message(ACTION="bind", SUBSYSTEM="pci", PCI_SLOT_NAME=GPU)


class Netlink(socket.socket):
    """The source's end of a socket pair, over which `sent` says from whom each message came, or what reading gives."""

    def __init__(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(fileno=its.detach())
        self.setblocking(False)
        self._kernel = ours

    def sent(self, message: bytes, sender: int = KERNEL, *, error: int = 0) -> None:
        self._kernel.send(struct.pack("ii", sender, error) + message)

    def recvmsg(self, size: int, *_: int) -> tuple[bytes, list[Any], int, Any]:
        came = self.recv(8 + size)
        sender, error = struct.unpack_from("ii", came)
        if error:
            raise OSError(error, os.strerror(error))
        return came[8:], [], 0, (sender, 1)

    def close(self) -> None:
        self._kernel.close()
        super().close()


class Bench:
    """A source, the sockets that it has had, and what it told."""

    def __init__(self, refusals: Sequence[OSError]) -> None:
        self.sockets: list[Netlink] = []
        self.told: list[tuple[str, ...]] = []
        self._refusals = list(refusals)
        """What the next attempts to have a socket come to."""

    def open_socket(self) -> Netlink:
        if self._refusals:
            raise self._refusals.pop(0)
        self.sockets.append(Netlink())
        return self.sockets[-1]

    def tell(self, *what: str) -> None:
        self.told.append(what)

    async def looks(self, number: int) -> None:
        """Waits for so many looks; there are no more."""
        await until(lambda: self.told.count(LOOK) >= number)
        assert self.told.count(LOOK) == number


@asynccontextmanager
async def listening(*refusals: OSError) -> AsyncIterator[Bench]:
    bench = Bench(refusals)
    source = UeventSource(
        on_change=lambda: bench.tell(*LOOK), on_aer=bench.tell, open_socket=bench.open_socket, retry=0.01
    )
    async with asyncio.TaskGroup() as group:
        task = group.create_task(source.run())
        await bench.looks(1)  # it listens now, and asks for a look at what happened before
        yield bench
        task.cancel()


@in_loop
async def test_a_message_about_a_device_is_a_reason_to_look_if_the_kernel_sent_it() -> None:
    async with listening() as bench:
        (netlink,) = bench.sockets
        netlink.sent(BIND, PROCESS)
        netlink.sent(message(SUBSYSTEM="pci", PCI_SLOT_NAME=GPU, ERROR_EVENT="X"), PROCESS)
        for other in (message(SUBSYSTEM="net"), b"\xff\0=\0nonsense", b""):
            netlink.sent(other)
        for number, subsystem in enumerate(("pci", "vfio", "vfio-dev", "drivers", "mdev"), 2):
            netlink.sent(message(SUBSYSTEM=subsystem))
            await bench.looks(number)
        assert set(bench.told) == {LOOK}


@in_loop
async def test_the_steps_of_an_error_recovery_are_told_before_the_look_that_takes_them_in() -> None:
    steps = ("BEGIN_RECOVERY", "FAILED_RECOVERY")
    async with listening() as bench:
        for step in steps:
            bench.sockets[0].sent(message(ACTION="change", SUBSYSTEM="pci", PCI_SLOT_NAME=GPU, ERROR_EVENT=step))
        await bench.looks(3)
        assert bench.told == [LOOK, (GPU, steps[0]), LOOK, (GPU, steps[1]), LOOK]


@in_loop
async def test_messages_that_were_lost_are_a_reason_to_look_and_the_socket_is_kept() -> None:
    async with listening() as bench:
        bench.sockets[0].sent(b"", error=errno.ENOBUFS)
        await bench.looks(2)
        bench.sockets[0].sent(BIND)
        await bench.looks(3)
        assert len(bench.sockets) == 1


@in_loop
async def test_where_there_are_no_kernel_events_that_is_said_once_and_they_are_tried_again() -> None:
    refused = [OSError(errno.EPROTONOSUPPORT, "Protocol not supported") for _ in range(3)]
    with capture_logs() as logs:
        async with listening(*refused) as bench:
            bench.sockets[0].sent(BIND)
            await bench.looks(2)
    (said,) = logs
    assert said["reason"].startswith("Protocol not supported; ")


@in_loop
async def test_a_socket_that_fails_is_replaced_and_what_happened_meanwhile_is_looked_at() -> None:
    with capture_logs() as logs:
        async with listening() as bench:
            bench.sockets[0].sent(b"", error=errno.ENOTCONN)
            await bench.looks(2)
            first, second = bench.sockets
            assert first.fileno() == -1, "closed"
            second.sent(BIND)
            await bench.looks(3)
    assert len(logs) == 1


def test_the_kernels_own_messages_are_heard_and_not_those_of_udev() -> None:
    try:
        netlink = open_netlink()
    except OSError as error:
        pytest.skip(f"no kernel events here: {error}")
    with netlink:
        assert netlink.getsockname()[1] == 1


@in_loop
async def test_the_outcome_of_a_recovery_is_taken_in_by_the_next_scan_that_has_the_means(
    fake_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_plugin.rescans._RETRY", 0.01)
    registry = Registry(Rules(), requires_cdi=False)
    rescans = Rescans(HostPaths(fake_node("workstation").root), registry, interval=3600)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(rescans.run())
        before = await registry.newer_than(0)
        rescans.note_aer(T4, "FAILED_RECOVERY")
        with capture_logs() as logs, no_descriptors():
            rescans.wake("test")
            await until(lambda: logs)
        inventory = await registry.newer_than(before.version)
        task.cancel()
    (t4,) = (device for device in inventory.resources[PGPU] if device.address == T4)
    assert t4.health.reason is Reason.FATAL_ERROR
