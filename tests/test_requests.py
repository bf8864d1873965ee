"""Allocate under pressure: at the same time, in the middle of a change, cut off, and with nonsense in it.

What a single wrong request is answered is in test_daemon.py. Here a grant must show: on a kernel with cdevs an Allocate
makes the mates of its device's IOMMU group Unhealthy, so nodes with pairs of mates tell what was given.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from bare import bare_client
from conftest import MakeNode, StartDaemon
from daemon import Daemon, Places
from facts import gpu, host
from grpc import StatusCode
from grpclib import GRPCError, Status
from kubelet import GrpcKubelet, Refusal, refusal
from loop import in_loop
from names import PGPU
from trials import figures, pairs, socket_of, tampered, wait_until

from sandbox_plugin.api import v1, v1beta1
from sandbox_plugin.config.settings import Consumer, Policy
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.inventory.ledger import Holdings
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.kubelet.servicer import DevicePluginServicer
from sandbox_plugin.model import Device, Objection, PciFunction, VfioDev
from sandbox_plugin.registry import Registry
from sandbox_plugin.rpc.codec import MalformedMessage, MessageCodec, RequestCodec

PATIENT = "from sandbox_plugin import daemon\ndaemon._LAST_LOOK_PATIENCE = 60"
"""As long as a test needs it, the check of an Allocate may hang."""
PAIRS = 4
ALL = [str(device) for device in range(2 * PAIRS)]

Outcome = list[list[str]] | Refusal
"""Of an Allocate: the paths that each container gets, or how it failed."""


@dataclass
class Mates:
    """Pairs of GPUs that share an IOMMU group, 0 and 1, 2 and 3, ...; their daemon, and a kubelet that knows them."""

    node: FakeNode
    plugin: Daemon
    kubelet: GrpcKubelet

    def allocate(self, *containers: list[str]) -> Outcome:
        try:
            answer = self.kubelet.plugin(PGPU).allocate(*containers)
        except grpc.RpcError as error:
            return Refusal(error.code(), error.details() or "")
        return [[device.host_path for device in container.devices] for container in answer.container_responses]


@pytest.fixture(params=[""])
def mates(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, request: pytest.FixtureRequest
) -> Mates:
    """They are left alone: the daemon has scanned for the last time. The parameter is code that it runs first."""
    node = pairs(fake_node, PAIRS)
    flags = ("--health-interval=3600", "--log-level=debug")
    plugin = daemon(node, *flags, PYTHONPATH=tampered(places, request.param))
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == set(ALL))
    plugin.wait_for("scanned", trigger="folder")  # as soon as the folders are watched
    return Mates(node, plugin, kubelet)


patiently = pytest.mark.parametrize("mates", [PATIENT], indirect=True, ids=["patiently"])


def given(*devices: str) -> Outcome:
    """The outcome for one container that gets these devices."""
    return [[f"/dev/vfio/devices/vfio{device}" for device in devices]]


def refused(answer: Outcome, why: str = "") -> bool:
    """Whether the outcome is that a device cannot be had now, for this reason."""
    return isinstance(answer, Refusal) and answer.status is StatusCode.FAILED_PRECONDITION and why in answer.message


def test_of_two_allocates_for_mates_at_the_same_time_the_second_is_refused(mates: Mates) -> None:
    start = threading.Barrier(len(ALL))

    def ask(device: str) -> Outcome:
        start.wait()
        return mates.allocate([device])

    with ThreadPoolExecutor(len(ALL)) as pool:
        answers = dict(zip(ALL, pool.map(ask, ALL), strict=True))
    taken = {device for device, answer in answers.items() if answer == given(device)}
    assert sorted(int(device) // 2 for device in taken) == list(range(PAIRS)), "one of each pair"
    assert all(refused(answer, "group-taken") for device, answer in answers.items() if device not in taken)
    mates.kubelet.wait_for(lambda: mates.kubelet.healthy(PGPU) == taken)


@pytest.mark.parametrize(
    "containers",
    [[["0"], ["99"]], [["0"], ["3"]], [["0"], ["0"]], [["0"], []]],
    ids=["unknown", "unhealthy", "twice", "nothing"],
)
def test_a_refused_allocate_gives_none_of_the_devices_that_it_could_have_had(
    mates: Mates, containers: list[list[str]]
) -> None:
    mates.node.unbind("0000:42:03.0")
    mates.kubelet.wait_for(lambda: mates.kubelet.unhealthy(PGPU) == {"3"})
    assert isinstance(mates.allocate(*containers), Refusal)
    assert not mates.plugin.events("allocated")
    assert mates.allocate(["1"]) == given("1"), "its mate is not held"


def test_mates_may_be_had_together_in_one_allocate_also_by_several_containers(mates: Mates) -> None:
    assert mates.allocate(["1", "0"]) == given("1", "0")
    assert mates.allocate(["2"], ["3"]) == [["/dev/vfio/devices/vfio2"], ["/dev/vfio/devices/vfio3"]]


# While the devices are checked once more


@contextmanager
def trap(mates: Mates, device: str) -> Iterator[Path]:
    """While it lasts, whoever reads the device's `vfio-dev/vfioN/dev` hangs. No event tells of it."""
    (folder,) = (mates.node.folder(f"0000:42:0{device}.0") / "vfio-dev").iterdir()
    fifo, whole = folder / "fifo", folder / "whole"
    os.mkfifo(fifo)
    whole.hardlink_to(folder / "dev")
    (folder / "link").hardlink_to(fifo)
    (folder / "link").rename(folder / "dev")
    try:
        yield fifo
    finally:
        whole.rename(folder / "dev")
        let_go(fifo, (folder / "dev").read_bytes())
        fifo.unlink()


def let_go(fifo: Path, text: bytes) -> None:
    """Who hangs there reads this text, and then the end of the file."""
    descriptor = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    os.write(descriptor, text)
    os.close(descriptor)


def answered(asked: Future[Outcome], fifo: Path, text: bytes) -> Outcome:
    """Lets go who hangs there until this Allocate is answered: a scan that came late may hang there too."""

    def is_answered() -> bool:
        let_go(fifo, text)
        return asked.done()

    wait_until(is_answered, "the Allocate is answered")
    return asked.result()


def wait_until_it_hangs(mates: Mates) -> None:
    """Until a thread of the daemon waits in the opening of a FIFO (wait_for_partner in the kernel's fs/pipe.c)."""

    def hangs() -> bool:
        for thread in Path(f"/proc/{mates.plugin.pid}/task").iterdir():
            with suppress(OSError):  # it has ended
                if "wait_for_partner" in (thread / "wchan").read_text():
                    return True
        return False

    wait_until(hangs, "the daemon looks at the device")


def test_a_device_that_does_not_answer_is_refused_in_time_although_the_list_says_healthy(mates: Mates) -> None:
    took: list[float] = []
    with trap(mates, "0"):
        for _ in range(5):
            started = time.monotonic()
            answer = mates.allocate(["0"])
            took.append(time.monotonic() - started)
            assert refused(answer, "device 0 (0000:42:00.0) is unhealthy: sysfs does not answer")
            assert mates.allocate(["2"]) == given("2"), "another one is given"
    assert not mates.plugin.events("allocated", device="0")
    wait_until(lambda: mates.allocate(["0"]) == given("0"), "it answers")
    figures("Allocate of a device that hangs is refused", took[:1])
    figures("Allocate of a device that is known to hang is refused", took[1:])


@patiently
def test_a_device_that_dies_while_allocate_looks_at_it_is_refused(mates: Mates) -> None:
    with trap(mates, "0") as fifo, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(mates.allocate, ["0"])
        wait_until_it_hangs(mates)
        assert refused(answered(asked, fifo, b""))
    assert mates.allocate(["1"]) == given("1"), "its mate was not taken with it"


@patiently
def test_of_two_allocates_for_mates_the_one_whose_look_takes_longer_sees_the_others_grant(mates: Mates) -> None:
    with trap(mates, "0") as fifo, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(mates.allocate, ["0"])
        wait_until_it_hangs(mates)
        assert mates.allocate(["1"]) == given("1")
        assert refused(answered(asked, fifo, b"511:0\n"))
    assert len(mates.plugin.events("allocated")) == 1


@patiently
def test_an_allocate_that_is_cancelled_in_the_middle_gives_nothing(mates: Mates, places: Places) -> None:
    message = b"\x0a\x03\x0a\x010"  # one container, device 0
    with trap(mates, "0"), bare_client(socket_of(places)) as client:
        stream = client.ask("Allocate", b"\0" + len(message).to_bytes(4, "big") + message)
        client.send()
        wait_until_it_hangs(mates)
        client.http.reset_stream(stream)
        client.ping()  # the daemon has read that the call is cancelled
    assert mates.allocate(["1"]) == given("1")
    mates.plugin.wait_for("allocated", device="1")
    assert len(mates.plugin.events("allocated")) == 1


A = "0000:01:00.0"


def bound(address: str, binding: int) -> PciFunction:
    return replace(gpu(address), vfio=VfioDev(number=0, cdev="511:0", binding=binding))


@pytest.mark.parametrize(
    "after",
    [
        bound(A, 2),
        bound("0000:02:00.0", 3),
    ],
    ids=["bound again", "another function"],
)
@in_loop
async def test_a_device_that_changes_while_it_is_looked_at_is_refused_although_it_is_healthy(
    after: PciFunction,
) -> None:
    registry = Registry(Rules(), requires_cdi=False)
    registry.observe(host(bound(A, 1)))

    async def look(_: Sequence[Device], __: Mapping[str, PciFunction]) -> Mapping[str, Objection]:
        registry.observe(host(after))
        registry.learn(holdings=Holdings(asked_at=registry.now()))
        return {}

    servicer = DevicePluginServicer(
        resource=PGPU,
        registry=registry,
        policy=Policy.PACKED,
        consumer=Consumer.KATA,
        stream=nullcontext,
        last_look=look,
    )
    request = v1beta1.AllocateRequest(container_requests=[v1beta1.ContainerAllocateRequest(devices_ids=["0"])])
    with pytest.raises(GRPCError, match="it changed while it was looked at") as caught:
        await servicer.allocate(request)
    assert caught.value.status is Status.FAILED_PRECONDITION
    assert registry.holders == {}


# Nonsense on the wire


@pytest.mark.parametrize(
    ("kind", "message", "why"),
    [
        (v1beta1.AllocateRequest, b"\x08\x01", "container_requests"),  # a number for a message
        (v1beta1.AllocateRequest, b"\x0a\x02\x08\x01", "devices_ids"),  # a number for a string
        (v1beta1.PreferredAllocationRequest, b"\x0a\x03\x1a\x01x", "allocation_size"),  # a string for a number
        (v1beta1.ContainerAllocateResponse, b"\x0a\x02\x08\x01", "envs"),  # in a map
        (v1.ClaimResource, b"\x28\x01", "share_id"),  # what may be left out
        (v1beta1.AllocateRequest, b"\xff" * 20, "not a valid AllocateRequest"),  # no message at all
        (v1beta1.AllocateRequest, b"\x0a", "not a valid AllocateRequest"),  # it ends too early
        (v1beta1.AllocateRequest, b"\x0a\x04\x0a\x02\xff\xfe", "not a valid AllocateRequest"),  # not UTF-8
    ],
)
def test_a_message_that_is_not_what_its_type_says_is_refused_in_words(kind: Any, message: bytes, why: str) -> None:
    with pytest.raises(MalformedMessage, match=why):
        MessageCodec().decode(message, kind)
    with pytest.raises(GRPCError, match=why) as caught:
        RequestCodec().decode(message, kind)
    assert caught.value.status is Status.INVALID_ARGUMENT


def test_nonsense_in_a_request_costs_its_own_call_alone(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    plugin = daemon(fake_node("workstation"))
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == {"11", "13"})
    client = kubelet.plugin(PGPU)
    for method in ("Allocate", "GetPreferredAllocation"):
        for nonsense in (b"\x08\x01", b"\xff" * 1000):
            failed = refusal(lambda method=method, nonsense=nonsense: client.raw(method, nonsense))  # type: ignore[misc]
            assert failed.status is StatusCode.INVALID_ARGUMENT
            assert len(failed.message) < 400
    assert client.prefer(["11", "13"], 1) == ["11"]
    assert len(kubelet.registrations) == 1
    assert "Traceback" not in plugin.log()
