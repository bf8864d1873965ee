"""Kubernetes Events on the node: what is told, how often, and to whom."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import structlog
from aiohttp import web
from conftest import Serve
from devices import device, function
from facts import gpu, host
from kubelet import TIMEOUT
from loop import LIMIT, in_loop, until
from names import FIRST_GPU

from sandbox_plugin.config.load import load_settings
from sandbox_plugin.config.settings import UsageError
from sandbox_plugin.dra.api_server import ApiServer
from sandbox_plugin.dra.client import ApiError
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.model import HEALTHY, Health, HostFacts, Reason
from sandbox_plugin.outputs.document import ORDERLY
from sandbox_plugin.outputs.events import BURST, EVERY, NodeEvents, event
from sandbox_plugin.registry import Registry
from sandbox_plugin.tasks import Backoff

NODE = "gpu-1"
AT = 1796040000.0
_DEAD: dict[str, Any] = {"link_speed": "Unknown", "link_width": 63}


def check(made: dict[str, Any]) -> None:
    """The rules of an Event of core/v1 about a node (pkg/apis/core/validation/events.go), and what kubectl goes by."""
    assert (made["apiVersion"], made["kind"]) == ("v1", "Event")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", made["metadata"]["name"])
    assert len(made["metadata"]["name"]) <= 253
    about = made["involvedObject"]
    assert "namespace" not in about
    assert made["metadata"]["namespace"] == "default", "of something that is in no namespace"
    assert about == {"apiVersion": "v1", "kind": "Node", "name": about["name"], "uid": about["name"]}
    assert (made["type"], made["reason"]) in {("Normal", "DeviceHealthy"), ("Warning", "DeviceUnhealthy")}
    assert 0 < len(made["message"]) <= 1024
    assert made["count"] == 1
    for moment in ("firstTimestamp", "lastTimestamp"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", made[moment])


# What is told of one device


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason not in ORDERLY])
def test_an_event_says_which_device_why_and_what_to_do(reason: Reason) -> None:
    ill = device("4", function(FIRST_GPU))._replace(health=Health(reason=reason, detail="words about it"))
    made = event(ill, NODE, AT)
    check(made)
    said = f"{ill.resource}=4 ({FIRST_GPU}) is Unhealthy: {reason}: words about it. "
    assert made["message"].startswith(said)
    assert re.search(r"[A-Z].{20,}\.$", made["message"].removeprefix(said)), "what to do"


def test_the_event_of_a_recovery_is_normal() -> None:
    made = event(device("4", function(FIRST_GPU))._replace(health=HEALTHY), NODE, AT)
    check(made)
    assert made["message"].endswith(f"=4 ({FIRST_GPU}) is Healthy again")
    assert made["type"] == "Normal"


def test_long_words_and_long_names_keep_within_what_kubernetes_takes() -> None:
    ill = device("4", function(FIRST_GPU))._replace(health=Health(reason=Reason.NO_NODE, detail="x" * 2000))
    made = event(ill, "n" * 229 + "." + "n" * 20, AT)
    check(made)
    assert made["message"].endswith("x Bind it again, or restart udev.")


# What is told of a node


@dataclass
class Bench:
    """The part at work, what it told, and a clock that the test moves."""

    told: list[dict[str, Any]] = field(default_factory=list)
    why_not: str | None = None
    now: float = 0.0
    asked: int = 0
    registry: Registry = field(default_factory=lambda: Registry(Rules(), requires_cdi=False))

    async def tell(self, made: dict[str, Any]) -> str | None:
        self.asked += 1
        check(made)
        if self.why_not is None:
            self.told.append(made)
        return self.why_not

    @property
    def said(self) -> list[str]:
        """Of each the ID, and the reason if there is one."""
        words = re.compile(r"nvidia\.com/pgpu=(\d+) .* is (?:Unhealthy: |Healthy )([a-z-]+)")
        return [" ".join(found.groups()) for each in self.told if (found := words.match(each["message"]))]


@asynccontextmanager
async def bench(**how: Any) -> AsyncIterator[Bench]:
    made = Bench(**how)
    part = NodeEvents(
        node=NODE,
        registry=made.registry,
        tell=made.tell,
        clock=lambda: made.now,
        backoff=Backoff(first=0.001, cap=0.001),
    )
    async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as group:
        task = group.create_task(part.run())
        yield made
        task.cancel()


def gpus(count: int, *dead: int) -> HostFacts:
    return host(
        *(gpu(f"0000:{n:02x}:00.0", vfio=n, group=50 + n, **(_DEAD if n in dead else {})) for n in range(1, count + 1)),
        kernel_has_cdevs=True,
    )


@in_loop
async def test_a_device_that_falls_ill_and_one_that_recovers_are_told_once_each() -> None:
    async with bench() as at:
        at.registry.observe(gpus(2))
        at.registry.observe(gpus(2, 1))
        await until(lambda: at.said == ["1 off-the-bus"])
        at.registry.observe(gpus(3, 1))  # news of another device
        at.registry.observe(gpus(3))
        await until(lambda: at.registry.current.by_key["nvidia.com/pgpu", "1"].health.reason is Reason.SETTLING)
        assert at.said == ["1 off-the-bus"], "it has not held yet"
        at.registry._clock = lambda: 1e9
        at.registry.observe(gpus(3))
        await until(lambda: at.said == ["1 off-the-bus", "1 again"])


@in_loop
async def test_what_is_ill_when_the_plugin_starts_is_told_and_what_is_well_is_not() -> None:
    async with bench() as at:
        at.registry.observe(gpus(4, 3))
        await until(lambda: at.said == ["3 off-the-bus"])


@in_loop
async def test_a_device_that_is_only_withheld_is_no_news() -> None:
    mates = host(
        *(gpu(f"0000:0{n}:00.0", vfio=n, group=50) for n in (1, 2)),
        gpu("0000:03:00.0", vfio=3, group=53),
        kernel_has_cdevs=True,
    )
    async with bench() as at:
        at.registry.observe(mates)
        at.registry.allocate([("nvidia.com/pgpu", "1")])
        assert at.registry.current.by_key["nvidia.com/pgpu", "2"].health.reason is Reason.GROUP_TAKEN
        dead = replace(
            mates, functions={**mates.functions, "0000:03:00.0": gpu("0000:03:00.0", vfio=3, group=53, **_DEAD)}
        )
        at.registry.observe(dead)
        await until(lambda: at.said == ["3 off-the-bus"])


@in_loop
async def test_no_more_than_so_many_are_told_at_once() -> None:
    count = BURST + 3
    async with bench() as at:
        at.registry.observe(gpus(count, *range(1, count + 1)))
        await until(lambda: at.told)
        assert len(set(at.said)) == len(at.told) == at.asked == BURST


def test_after_a_pause_there_may_be_as_many_again_and_no_more() -> None:
    part = NodeEvents(node=NODE, registry=Registry(Rules()), tell=lambda _: asyncio.sleep(0), clock=lambda: now)
    ill = device("4", function(FIRST_GPU))._replace(health=Health(reason=Reason.GONE, detail="it is gone"))

    async def burst() -> int:
        """How many go out until it is told to wait."""
        number = 0
        while not await part._tell_of(ill):
            number += 1
        return number

    now = 0.0
    assert asyncio.run(burst()) == BURST
    now = EVERY
    assert asyncio.run(burst()) == 1
    now = 1000 * EVERY
    assert asyncio.run(burst()) == BURST


@in_loop
async def test_what_the_api_server_does_not_take_is_said_once_and_told_later_as_it_is_then() -> None:
    with structlog.testing.capture_logs() as logs:
        async with bench(why_not="403 Forbidden") as at:
            at.registry.observe(gpus(2, 1, 2))
            await until(lambda: at.asked > 3)
            at.registry.observe(gpus(2, 2))
            at.why_not = None
            await until(lambda: "2 off-the-bus" in at.said)
    assert len({each["metadata"]["name"] for each in at.told}) == len(at.told)
    assert [(log["event"], log["reason"]) for log in logs] == [("no node events", "403 Forbidden")]


# To whom


@dataclass
class EventServer:
    """An API server that takes events. Not the fake one of DRA, which knows resource.k8s.io."""

    received: list[dict[str, Any]] = field(default_factory=list)
    status: int = 201
    url: str = ""

    async def take(self, request: web.Request) -> web.Response:
        assert request.method == "POST"
        assert request.path == "/api/v1/namespaces/default/events"
        assert request.content_type == "application/json"
        if self.status == 201:
            self.received.append(await request.json())
            return web.json_response(self.received[-1], status=201)
        refusal = {
            "kind": "Status",
            "message": 'events is forbidden: cannot create resource "events"',
            "reason": "Forbidden",
        }
        return web.json_response(refusal, status=self.status)

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.take)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner


@in_loop
async def test_the_api_server_is_asked_to_create_it_and_says_why_not() -> None:
    server = EventServer()
    runner = await server.start()
    made = event(device("4", function(FIRST_GPU))._replace(health=HEALTHY), NODE, AT)
    async with ApiServer(url=server.url) as api:
        await api.create_event(made)
        assert server.received == [made]
        server.status = 403
        with pytest.raises(ApiError, match="forbidden"):
            await api.create_event(made)
    await runner.cleanup()


def test_the_daemon_tells_of_a_gpu_that_fell_off_the_bus_and_lives_on_when_nobody_listens(serve: Serve) -> None:
    server = EventServer()

    async def story() -> None:
        runner = await server.start()
        flags = ("--node-events", f"--node-name={NODE}", f"--api-server={server.url}")
        node, plugin, agree = await asyncio.to_thread(serve, "hgx-h100", *flags)
        node.sicken(FIRST_GPU)
        await until(lambda: len(server.received) == 1)
        node.heal(FIRST_GPU)
        await until(lambda: len(server.received) == 2)
        await runner.cleanup()
        node.sicken(FIRST_GPU)
        said = await asyncio.to_thread(plugin.wait_for, "no node events", level="warning")
        assert server.url in said["reason"]
        await asyncio.to_thread(agree)

    asyncio.run(asyncio.wait_for(story(), TIMEOUT * 2))
    for made in server.received:
        check(made)
    assert [(each["reason"], FIRST_GPU in each["message"]) for each in server.received] == [
        ("DeviceUnhealthy", True),
        ("DeviceHealthy", True),
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"node_events": "true"}, "--node-events: needs the name of this node, as NODE_NAME or --node-name"),
        ({"node_events": "true", "node_name": NODE}, "--node-events: this is no pod, so --api-server must say where"),
    ],
)
def test_what_it_needs_to_know_is_asked_for(flags: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(words)}"):
        load_settings(flags, {})
    in_a_pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "NODE_NAME": NODE}
    assert load_settings(flags, in_a_pod).node_events
    assert not load_settings({}, in_a_pod).node_events
