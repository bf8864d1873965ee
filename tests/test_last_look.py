"""The last look at devices before they are given to a pod."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import MakeNode
from hardship import Trap, no_descriptors, no_threads
from loop import LIMIT, in_loop, run
from mediated import Mediated
from names import AUDIO, GEFORCE, T4
from trials import wait_until

from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.host import last_look
from sandbox_plugin.host.last_look import LastLook, objection
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.scan import scan_now
from sandbox_plugin.inventory.devices import find_devices
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import Device, Objection

PATIENCE = 0.5
"""Seconds; long against the time that a look takes, also on a busy machine."""
SILENCE = "sysfs does not answer"
GRACE_GPU = "0009:01:00.0"


class Seen:
    """A node as a scan has seen it, and looks at it since then."""

    def __init__(self, node: FakeNode) -> None:
        self._paths = HostPaths(node.root)
        self._facts = scan_now(self._paths)
        self.functions = self._facts.functions

    def device(self, address: str) -> Device:
        found = find_devices(self._facts, Rules())
        return next(d for d in found.devices if address in [p.address for p in d.placements])

    def objection(self, device: Device) -> Objection | None:
        return objection(self._paths, device, self.functions)

    def against(self, device: Device) -> str | None:
        found = self.objection(device)
        return None if found is None else found.why


@pytest.fixture
def workstation(fake_node: MakeNode) -> FakeNode:
    """A node with group nodes."""
    return fake_node("workstation")


@pytest.fixture
def seen(workstation: FakeNode) -> Seen:
    return Seen(workstation)


@pytest.fixture
def geforce(seen: Seen) -> Device:
    return seen.device(GEFORCE)


@pytest.fixture
def t4(seen: Seen) -> Device:
    return seen.device(T4)


def remove_node(node: FakeNode) -> None:
    (node.root / "sys/class/vfio/13").unlink()


def put_to_sleep_dead(node: FakeNode) -> None:
    node.sicken(T4, cold=True)
    node.set_attribute(T4, "power/runtime_status", "active")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda node: node.bind(T4, "nvidia"), f"{T4} is bound to nvidia now"),
        (lambda node: node.unbind(T4), f"{T4} is bound to no driver now"),
        (lambda node: node.remove(T4), f"{T4}: it is gone"),
        (remove_node, "/dev/vfio/13 is gone"),
        (lambda node: node.sicken(T4), f"{T4} does not answer on the PCI bus now (link speed Unknown, width 63)"),
        (put_to_sleep_dead, f"{T4} does not answer on the PCI bus now (the kernel has set it to D3cold although"),
        (lambda node: node.set_enable(T4, 1), f"{T4} in its IOMMU group 13 is in use (enable is 1) by a VM that has"),
    ],
)
def test_a_device_that_a_vm_could_not_open_now_may_not_be_given_away(
    workstation: FakeNode, seen: Seen, t4: Device, change: Callable[[FakeNode], None], why: str
) -> None:
    assert seen.against(t4) is None
    change(workstation)
    assert (seen.against(t4) or "").startswith(why)


def test_every_function_of_the_device_counts(workstation: FakeNode, seen: Seen, geforce: Device, t4: Device) -> None:
    both = geforce._replace(placements=(*geforce.placements, *t4.placements))
    workstation.bind(T4, "nvidia")
    assert seen.against(both) == f"{T4} is bound to nvidia now"


def test_a_cdev_counts_only_as_it_was_seen(fake_node: MakeNode) -> None:
    grace = fake_node("gh200")
    seen = Seen(grace)
    device = seen.device(GRACE_GPU)
    assert (device.node, seen.against(device)) == ("/dev/vfio/devices/vfio0", None)
    other = device._replace(node="/dev/vfio/devices/vfio3")
    assert seen.against(other) == "/dev/vfio/devices/vfio3 is gone"
    (was,) = device.placements
    before = device._replace(placements=(replace(was, binding=(was.binding or 0) + 1),))
    assert seen.against(before) == f"{GRACE_GPU} was bound again, or made again with another type"
    (grace.folder(GRACE_GPU) / "vfio-dev/vfio0/dev").unlink()
    assert seen.against(device) == "/dev/vfio/devices/vfio0 is gone"


def test_a_mediated_device_is_looked_for_where_it_is(workstation: FakeNode) -> None:
    workstation.bind(T4, "nvidia")
    vgpus = Mediated(workstation, T4)
    uuid = vgpus.add(1, "nvidia-222", "GRID T4-1Q", 70)
    seen = Seen(workstation)
    device = seen.device(uuid)
    assert seen.against(device) is None
    vgpus.remove(uuid)
    assert seen.against(device) is not None


def test_a_device_of_whose_group_a_vm_has_another_function_may_not_be_given_away(
    workstation: FakeNode, seen: Seen, geforce: Device
) -> None:
    workstation.set_enable(AUDIO, 1)
    found = seen.objection(geforce)
    assert found is not None
    assert found.in_use == {AUDIO}
    workstation.unbind(AUDIO)
    assert seen.objection(geforce) is not None, "it is the VM's until that lets go"
    workstation.set_enable(AUDIO, 0)
    workstation.bind(AUDIO, "snd_hda_intel")
    workstation.set_attribute(AUDIO, "enable", "1")
    assert seen.objection(geforce) is None, "the host's driver has it"


def test_a_device_that_sleeps_is_not_woken_by_the_look(workstation: FakeNode, seen: Seen, t4: Device) -> None:
    workstation.sicken(T4, cold=True)
    workstation.set_attribute(T4, "power/runtime_status", "suspended")
    for name in ("current_link_speed", "current_link_width"):
        Trap(workstation.folder(T4) / name)
    assert seen.against(t4) is None


# Several looks


class Looks:
    """Several looks at devices of a node, and how often one of them refused."""

    def __init__(self, node: FakeNode, seen: Seen, patience: float = LIMIT) -> None:
        self.refusals = 0
        self._functions = seen.functions
        self._look = LastLook(HostPaths(node.root), patience, on_refusal=self._refused)

    async def __call__(self, *devices: Device) -> dict[str, str]:
        return {device_id: found.why for device_id, found in (await self._look(devices, self._functions)).items()}

    def _refused(self) -> None:
        self.refusals += 1


def threads() -> int:
    return sum(thread.name == "last-look" for thread in threading.enumerate())


@in_loop
async def test_what_is_against_a_device_stands_at_its_id_and_asks_for_a_scan(
    workstation: FakeNode, seen: Seen, geforce: Device, t4: Device
) -> None:
    look = Looks(workstation, seen)
    assert await look(geforce, t4) == {}
    assert look.refusals == 0
    workstation.bind(T4, "nvidia")
    assert await look(geforce, t4) == {"13": f"{T4} is bound to nvidia now"}
    assert look.refusals == 1


@in_loop
async def test_a_device_that_hangs_is_refused_and_costs_one_thread_however_often_it_is_asked_for(
    workstation: FakeNode, seen: Seen, geforce: Device, t4: Device
) -> None:
    look, trap = Looks(workstation, seen, PATIENCE), Trap(workstation.folder(T4) / "enable")
    assert await look(geforce, t4) == {"13": SILENCE}
    again = asyncio.create_task(look(t4))
    for _ in range(20):
        await asyncio.sleep(0)
    assert again.done(), "one that is known to hang is not waited for"
    assert again.result() == {"13": SILENCE}
    await asyncio.to_thread(wait_until, lambda: threads() == 1, "one thread for the device that hangs")
    # The number may be another device's by now: that one is looked at.
    assert await look(geforce._replace(id=t4.id, node=t4.node)) == {}
    trap.release()
    await asyncio.to_thread(wait_until, lambda: threads() == 0, "the look that hung has ended")
    workstation.bind(T4, "nvidia")
    assert await look(t4) == {"13": f"{T4} is bound to nvidia now"}, "a late answer is not given"


@in_loop
async def test_a_want_of_descriptors_or_threads_is_against_giving_away_for_as_long_as_it_lasts(
    workstation: FakeNode, seen: Seen, t4: Device
) -> None:
    look = Looks(workstation, seen)
    for want, words in ((no_threads, "can't start new thread"), (no_descriptors, "Too many open files")):
        with want():
            assert await look(t4) == {"13": f"it cannot be looked at: {words}"}
    assert await look(t4) == {}


def test_a_fault_of_our_own_in_a_look_is_raised(
    workstation: FakeNode, seen: Seen, t4: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("a fault of our own")

    monkeypatch.setattr(last_look, "read_again", fail)
    with pytest.raises(LookupError, match="a fault of our own"):
        run(Looks(workstation, seen)(t4))
