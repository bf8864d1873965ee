"""The one truth of the process, and those who wait for a newer one."""

from __future__ import annotations

import asyncio

from facts import gpu, host
from loop import run
from names import PGPU

from sandbox_plugin.inventory.health import SETTLE
from sandbox_plugin.inventory.ledger import GRANT_UNUSED, Holdings
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import HostFacts, Reason
from sandbox_plugin.registry import Registry

A, B = "0000:01:00.0", "0000:02:00.0"


class Clock:
    """Stands still until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def registry(*, requires_cdi: bool = False, clock: Clock | None = None) -> Registry:
    return Registry(Rules(), requires_cdi=requires_cdi, clock=clock or Clock())


def reason(inventory: Inventory, device_id: str) -> Reason | None:
    device = inventory.device(PGPU, device_id)
    assert device is not None
    return device.health.reason


def test_what_is_learnt_before_the_first_scan_counts_with_it_and_is_no_news_before() -> None:
    early = registry()
    early.learn(holdings=Holdings(asked_at=99, pods={(PGPU, "9"): "a/b"}))
    assert (early.current.version, early.current.resources) == (0, {})
    early.observe(host(gpu(A, vfio=3)))
    assert reason(early.current, "9") is Reason.GONE


def test_the_first_scan_is_news_even_of_an_empty_host() -> None:
    assert registry().observe(HostFacts()).version == 1


def test_a_bus_that_cannot_be_read_at_first_is_no_host_without_devices() -> None:
    blind = registry()
    assert blind.observe(HostFacts(unreachable="no such folder")).version == 0
    assert blind.observe(host(gpu(A))).version == 1
    after = blind.observe(HostFacts(unreachable="no such folder"))
    assert reason(after, "0") is Reason.UNREADABLE


def test_a_scan_without_news_is_the_same_version() -> None:
    seen = registry()
    first = seen.observe(host(gpu(A)))
    assert seen.observe(host(gpu(A))).version == first.version == 1
    assert seen.observe(host(gpu(A), gpu(B, vfio=1, group=51))).version == 2


def test_a_reader_waits_until_there_is_something_newer_than_what_it_has() -> None:
    async def work() -> None:
        seen = registry()
        waiting = [asyncio.create_task(seen.newer_than(0)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        waiting.pop().cancel()
        first = seen.observe(host(gpu(A)))
        assert [await task for task in waiting] == [first, first]
        assert await seen.newer_than(0) is first, "who is behind does not wait"
        reader = asyncio.create_task(seen.newer_than(first.version))
        await asyncio.sleep(0)
        seen.observe(host(gpu(A)))
        await asyncio.sleep(0)
        assert not reader.done()
        second = seen.observe(host())
        assert await reader is second

    run(work())


def test_a_slow_reader_gets_the_latest_and_no_backlog() -> None:
    async def work() -> list[int]:
        seen = registry()
        versions = []

        async def read() -> None:
            version = 0
            while version < 20:
                version = (await seen.newer_than(version)).version
                versions.append(version)
                for _ in range(5):  # it is slow
                    await asyncio.sleep(0)

        reading = asyncio.create_task(read())
        for number in range(20):
            seen.observe(host(gpu(A, vfio=number)))
            await asyncio.sleep(0)
        await reading
        return versions

    versions = run(work())
    assert versions == sorted(set(versions))
    assert versions[-1] == 20
    assert len(versions) < 10


def test_an_allocation_counts_from_the_moment_it_is_taken_in_and_once() -> None:
    clock = Clock()
    seen = registry(clock=clock)
    mates = host(gpu(A, vfio=1, group=9), gpu(B, vfio=2, group=9))
    seen.observe(mates)
    after = seen.allocate([(PGPU, "1")])
    assert after is seen.current
    assert reason(after, "2") is Reason.GROUP_TAKEN
    clock.now += GRANT_UNUSED / 2
    seen.observe(mates)
    clock.now += GRANT_UNUSED / 2
    assert reason(seen.observe(mates), "2") is Reason.SETTLING


def test_error_events_are_news_once() -> None:
    clock = Clock()
    seen = registry(clock=clock)
    seen.observe(host(gpu(A)))
    assert reason(seen.observe(host(gpu(A)), aer=[(A, "BEGIN_RECOVERY")]), "0") is Reason.FATAL_ERROR
    seen.observe(host(gpu(A)), aer=[(A, "SUCCESSFUL_RECOVERY")])
    clock.now += SETTLE
    assert reason(seen.observe(host(gpu(A))), "0") is None


def test_what_is_not_told_anew_stays_as_it_was() -> None:
    seen = registry(requires_cdi=True)
    seen.observe(host(gpu(A)))
    seen.learn(holdings=Holdings(asked_at=101, pods={(PGPU, "0"): "default/pod"}))
    seen.learn(cdi_trouble={PGPU: "the disk is full"})
    device = seen.current.device(PGPU, "0")
    assert device is not None
    assert str(device.health) == "not-in-cdi: the disk is full"
    seen.learn(in_cdi={PGPU: frozenset({"0"})}, cdi_trouble={})
    assert (reason(seen.current, "0"), seen.current.without_spec) == (None, frozenset())
    assert str(seen.learn().by_key[PGPU, "0"].health) == "healthy"
    assert reason(seen.observe(host(gpu(A, enable=1))), "0") is None  # the pod of before still holds it


def test_only_a_consumer_that_needs_specs_waits_for_them() -> None:
    assert reason(registry(requires_cdi=False).observe(host(gpu(A))), "0") is None
    waiting = registry(requires_cdi=True).observe(host(gpu(A)))
    assert reason(waiting, "0") is Reason.NOT_IN_CDI
    assert waiting.without_spec == {PGPU}
    without_node = registry(requires_cdi=True).observe(host(gpu(A), dev_nodes=frozenset()))
    assert without_node.without_spec == frozenset()


def test_a_look_is_due_when_a_device_has_settled_by_the_registrys_own_clock() -> None:
    clock = Clock()
    seen = registry(clock=clock)

    async def settle() -> None:
        seen.observe(host(gpu(A)))
        seen.observe(host(gpu(A, link_speed="Unknown", link_width=63)))
        due = asyncio.create_task(seen.look_is_due())
        await asyncio.sleep(0)
        seen.observe(host(gpu(A)))
        clock.now += SETTLE - 0.01
        await asyncio.sleep(0)
        assert not due.done()
        clock.now += 0.01
        await due
        await seen.look_is_due()  # it still is
        seen.observe(host(gpu(A)))
        assert reason(seen.current, "0") is None

    run(settle())


def test_whoever_waits_for_a_step_is_told_of_one_without_news_too() -> None:
    seen = registry()

    async def step() -> None:
        seen.observe(host(gpu(A)))
        waiting = asyncio.create_task(seen.stepped())
        await asyncio.sleep(0)
        assert not waiting.done()
        seen.observe(host(gpu(A)))
        await waiting

    run(step())
