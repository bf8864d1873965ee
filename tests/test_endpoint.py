"""The back-off between attempts to register, and what ends it early: on a loop of our own, with a kubelet that hangs.

What a whole registration looks like is in test_daemon.py and test_faults.py, with the real process.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from daemon import Places
from devices import nothing_against
from facts import gpu, host
from loop import run, until

from sandbox_plugin.config.settings import Consumer, Policy, Settings
from sandbox_plugin.fake.kubelet import FakeKubelet
from sandbox_plugin.inventory.ledger import Holdings
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.tracking import RETIRE
from sandbox_plugin.kubelet.endpoint import KUBELET_SOCKET, Endpoint, State
from sandbox_plugin.kubelet.endpoints import Endpoints
from sandbox_plugin.model import HostFacts
from sandbox_plugin.registry import Registry
from sandbox_plugin.shutdown import Shutdown
from sandbox_plugin.tasks import Backoff

FOR_EVER = 3600.0


def test_pauses_begin_short_double_end_at_five_seconds_and_are_never_in_step_with_others() -> None:
    backoff = Backoff()
    pauses = [backoff.next() for _ in range(12)]
    for pause, most in zip(pauses, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, *([5.0] * 6)], strict=True):
        assert 0.75 * most <= pause <= most
    assert len(set(pauses[6:])) > 1
    backoff.reset()
    assert backoff.next() <= 0.1


class HangingKubelet:
    """Listens, and answers nothing. `asked` counts who connected."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked = asyncio.Semaphore(0)

    async def __aenter__(self) -> HangingKubelet:
        self._server = await asyncio.start_unix_server(self._take, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.release()
        while await reader.read(1 << 16):
            pass
        writer.close()


def patient_endpoint(places: Places) -> Endpoint:
    """One whose pauses do not end by themselves."""
    return Endpoint(
        resource="nvidia.com/pgpu",
        kubelet_dir=places.top,
        registry=Registry(Rules(), requires_cdi=False),
        policy=Policy.PACKED,
        consumer=Consumer.KATA,
        last_look=nothing_against,
        backoff=Backoff(first=FOR_EVER, cap=FOR_EVER),
    )


def test_a_kubelet_sock_that_is_replaced_while_register_hangs_is_tried_without_a_pause(places: Places) -> None:
    async def work() -> None:
        endpoint = patient_endpoint(places)
        kubelet = places.top / KUBELET_SOCKET
        async with HangingKubelet(kubelet) as old, HangingKubelet(places.top / "new.sock") as new:
            running = asyncio.create_task(endpoint.run())
            await old.asked.acquire()
            new.path.rename(kubelet)  # in one step: the attempt has not failed yet
            endpoint.look()
            await new.asked.acquire()
            running.cancel()
            await asyncio.wait([running])

    run(work())


def test_streams_that_end_with_an_older_socket_of_ours_do_not_count_as_the_loss_of_the_new_registration(
    places: Places,
) -> None:
    async def work() -> None:
        async def until(*states: State) -> None:
            while endpoint.state not in states:  # noqa: ASYNC110  (nothing tells of it)
                await asyncio.sleep(0)

        endpoint = patient_endpoint(places)
        async with FakeKubelet(places.top):
            running = asyncio.create_task(endpoint.run())
            await until(State.REGISTERED)
            endpoint.path.unlink()
            endpoint.look()
            await until(State.SERVING, State.REGISTERING)
            await until(State.REGISTERED)  # and not, at once, lost
            running.cancel()
            await asyncio.wait([running])

    run(work())


def test_a_resource_is_advertised_from_its_first_device_until_the_last_is_dropped(places: Places) -> None:
    now = [100.0]
    registry = Registry(Rules(), requires_cdi=False, clock=lambda: now[0])

    def advertised() -> set[str]:
        return {path.name for path in places.top.glob("*.sock")}

    async def work() -> None:
        endpoints = Endpoints(Settings(kubelet_dir=places.top), registry, nothing_against)
        running = asyncio.create_task(endpoints.run(Shutdown()))
        registry.observe(host(gpu("0000:01:00.0")))
        await until(lambda: advertised() == {"sandbox-pgpu.sock"})
        assert [status.resource for status in endpoints.status()] == ["nvidia.com/pgpu"]
        registry.observe(HostFacts())
        for _ in range(2):
            now[0] += RETIRE
            registry.learn(holdings=Holdings(asked_at=now[0]))
        await until(lambda: advertised() == set())
        assert endpoints.status() == []
        running.cancel()
        await asyncio.wait([running])

    run(work())
