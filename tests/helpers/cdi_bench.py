"""CDI's parts at work on a folder, within the test's own process: the writer, and what it follows."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from devices import device, function
from facts import gpu, host
from loop import LIMIT
from names import NVSWITCH, PGPU

from sandbox_plugin.cdi.render import render_spec
from sandbox_plugin.cdi.writer import CdiWriter
from sandbox_plugin.inventory.ledger import DeviceKey, Holdings
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device, HostFacts, Reason
from sandbox_plugin.registry import Registry

OURS = "nvidia.com-pgpu.yaml"


class Told(Registry):
    """A registry that counts what the writer tells it, and keeps what it says of former devices."""

    def __init__(self) -> None:
        super().__init__(Rules())
        self.rounds = 0
        self.former: Mapping[DeviceKey, str] = {}
        self.told = asyncio.Event()

    def learn(self, **signals: Any) -> Inventory:
        self.rounds += "in_cdi" in signals
        self.former = signals.get("former", self.former)
        self.told.set()
        return super().learn(**signals)


class Bench:
    """The writer at work on a folder, and the inventory that it follows."""

    def __init__(self, folder: Path, interval: float) -> None:
        self.folder = folder
        self.registry = Told()
        self.writer = CdiWriter(folder=folder, registry=self.registry, is_ours=may_be_ours, interval=interval)

    async def show(self, facts: HostFacts) -> None:
        """The host shows this now; returns when the folder has been brought to it, stale specs included."""
        self.registry.observe(facts)
        await self.rounds(3)

    async def rounds(self, number: int) -> None:
        """Returns when the writer has told something so many times more.

        The first may be of a round that had begun before, and of the last the stale specs may be there still.
        """
        wanted = self.registry.rounds + number
        while self.registry.rounds < wanted:
            self.registry.told.clear()
            await self.registry.told.wait()

    async def answer(self, asked_at: float, **pods: DeviceKey) -> set[str]:
        """PodResources names these pods now, and what each of them holds. Returns what is in the folder then."""
        named = {device: f"default/{pod}" for pod, device in pods.items()}
        self.registry.learn(holdings=Holdings(asked_at=asked_at, pods=named))
        await self.rounds(3)
        return names_in(self.folder)

    def reason(self, device_id: str) -> tuple[Reason | None, str]:
        listed = self.registry.current.device(PGPU, device_id)
        assert listed is not None
        return listed.health.reason, listed.health.detail


@asynccontextmanager
async def bench(folder: Path, interval: float = 0.02) -> AsyncIterator[Bench]:
    made = Bench(folder, interval)
    async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as group:
        task = group.create_task(made.writer.run())
        yield made
        task.cancel()


def may_be_ours(resource: str) -> bool:
    return resource in (PGPU, NVSWITCH)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def with_gpus(*numbers: int) -> HostFacts:
    """A host with an H100 for each number, which is its vfioN."""
    return host(*(gpu(f"0000:{n:02x}:00.0", vfio=n, group=50 + n) for n in numbers), kernel_has_cdevs=True)


def cdevs(*numbers: int, kind: str = PGPU) -> dict[str, tuple[str, ...]]:
    """What `read_folder` gives for them, as devices of this kind."""
    return {f"{kind}={n}": (f"/dev/vfio/devices/vfio{n}",) for n in numbers}


def offered(resource: str, number: int, **changes: Any) -> Device:
    return device(str(number), function("0000:01:00.0"))._replace(resource=resource, **changes)


def spec_of(kind: str, *numbers: int) -> bytes:
    """A spec as we write it."""
    return render_spec(kind, [offered(kind, number) for number in numbers]).encode()


def refusing(number: int) -> Callable[..., None]:
    """A call to the system that fails with this error."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse
