"""Allocate under pressure: at the same time, in the middle of a change, cut off, and with nonsense in it.

What a single wrong request is answered is in test_daemon.py. Here a promise must show: on a kernel with cdevs an
Allocate makes the mates of its device's IOMMU group Unhealthy, so nodes with pairs of mates tell what was promised.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import psutil
from bare import bare_client
from conftest import MakeNode, StartDaemon
from daemon import Places
from grpc import StatusCode
from kubelet import GrpcKubelet, Plugin, Refusal, refusal
from names import PGPU
from trials import figures, pairs, socket_of, tampered, wait_until
from wire import load_wire

from sandbox_plugin.fake.node import FakeNode

NO_TIMER = "--health-interval=3600"


def outcome(plugin: Plugin, *containers: list[str]) -> list[list[str]] | Refusal:
    """The paths that each container gets, or how the call failed."""
    try:
        answer = plugin.allocate(*containers)
    except grpc.RpcError as error:
        return Refusal(error.code(), error.details() or "")
    return [[device.host_path for device in container.devices] for container in answer.container_responses]


def node_path(device: str) -> str:
    return f"/dev/vfio/devices/vfio{device}"


def test_of_two_allocates_for_mates_at_the_same_time_the_second_is_refused(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    count = 8
    daemon(pairs(fake_node, count), NO_TIMER)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2 * count)
    plugin = kubelet.plugin(PGPU)
    start = threading.Barrier(2 * count)

    def ask(device: int) -> list[list[str]] | Refusal:
        start.wait()
        return outcome(plugin, [str(device)])

    with ThreadPoolExecutor(2 * count) as pool:
        answers = list(pool.map(ask, range(2 * count)))
    for first, second in zip(answers[::2], answers[1::2], strict=True):
        refused = [answer for answer in (first, second) if isinstance(answer, Refusal)]
        assert [(one.status, "group-taken" in one.message) for one in refused] == [
            (StatusCode.FAILED_PRECONDITION, True)
        ]
    promised = {str(device) for device, answer in enumerate(answers) if not isinstance(answer, Refusal)}
    assert all(answers[int(device)] == [[node_path(device)]] for device in promised)
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == promised)


def test_many_allocates_at_the_same_time_are_each_answered_with_their_own_device(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    daemon(fake_node("hgx-h100"))
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 8)
    plugin = kubelet.plugin(PGPU)
    took = []

    def ask(number: int) -> None:
        device = str(4 + number % 8)
        started = time.monotonic()
        assert outcome(plugin, [device]) == [[node_path(device)]]
        took.append(time.monotonic() - started)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(400)))
    figures("Allocate, sixteen at the same time", took)


def test_a_refused_allocate_promises_nothing_for_the_devices_that_it_could_have_had(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = pairs(fake_node, 2)
    plugin = daemon(node, NO_TIMER)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 4)
    node.unbind("0000:42:03.0")
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"3"})
    for containers in (
        [["0"], ["99"]],  # unknown
        [["0"], ["3"]],  # unhealthy
        [["0"], ["0"]],  # twice
        [["0"], []],  # nothing
        [["0", ""]],
        [["0", *map(str, range(100, 9000))]],
    ):
        assert isinstance(outcome(kubelet.plugin(PGPU), *containers), Refusal)
    assert not plugin.events("allocated")
    assert outcome(kubelet.plugin(PGPU), ["1"]) == [[node_path("1")]]
    kubelet.wait_for(lambda: kubelet.unhealthy(PGPU) == {"0", "3"})
    assert [message.unhealthy for message in kubelet.history(PGPU)] == [[], ["3"], ["0", "3"]]


def test_mates_may_be_had_together_in_one_allocate_also_by_several_containers(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    daemon(pairs(fake_node, 2), NO_TIMER)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 4)
    plugin = kubelet.plugin(PGPU)
    assert outcome(plugin, ["1", "0"]) == [[node_path("1"), node_path("0")]]
    assert outcome(plugin, ["2"], ["3"]) == [[node_path("2")], [node_path("3")]]


def test_a_request_of_thousands_of_containers_is_answered_for_what_it_is(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    daemon(fake_node("workstation"))
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    started = time.monotonic()
    refused = outcome(kubelet.plugin(PGPU), *[[str(number)] for number in range(20_000, 27_000)])
    took = time.monotonic() - started
    assert isinstance(refused, Refusal)
    assert refused.status is StatusCode.NOT_FOUND
    figures("a refusal of 7000 containers", [took])


# While a device is looked at once more


@contextmanager
def trap(node: FakeNode, address: str) -> Iterator[Path]:
    """While it lasts, whoever reads the device's `vfio-dev/vfioN/dev` hangs. No event tells of it."""
    (folder,) = (node.folder(address) / "vfio-dev").iterdir()
    text, fifo = (folder / "dev").read_bytes(), folder / "fifo"
    os.mkfifo(fifo)
    (folder / "dev").rename(folder / "away")
    fifo.rename(folder / "dev")
    try:
        yield folder / "dev"
    finally:
        (folder / "dev").rename(fifo)
        (folder / "away").rename(folder / "dev")
        answer(fifo, text)
        fifo.unlink()


def answer(fifo: Path, text: bytes) -> None:
    """Lets go whoever hangs there, with this text."""
    descriptor = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(descriptor, text)
    finally:
        os.close(descriptor)


def somebody_reads(fifo: Path) -> bool:
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:  # ENXIO: nobody does
        return False
    return True


def test_a_device_that_does_not_answer_is_refused_in_time_although_the_list_says_healthy(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = pairs(fake_node, 4)
    plugin = daemon(node, NO_TIMER)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 8)
    took: list[float] = []
    at_once: list[float] = []
    threads = psutil.Process(plugin.pid).num_threads()
    for device in ("0", "2", "4"):
        with trap(node, f"0000:42:0{device}.0"):
            for seconds in (took, *(4 * [at_once])):
                started = time.monotonic()
                refused = refusal(lambda device=device: kubelet.plugin(PGPU).allocate([device]))  # type: ignore[misc]
                seconds.append(time.monotonic() - started)
                assert refused.status is StatusCode.FAILED_PRECONDITION
                assert f"device {device} (0000:42:0{device}.0)" in refused.message
                assert "sysfs does not answer" in refused.message
                assert outcome(kubelet.plugin(PGPU), ["6"]) == [[node_path("6")]], "another one is given"
            wait_until(
                lambda: psutil.Process(plugin.pid).num_threads() <= threads + 4, "every Allocate leaves a thread behind"
            )
        assert not plugin.events("allocated", device=device)
        wait_until(lambda d=device: outcome(kubelet.plugin(PGPU), [d]) == [[node_path(d)]], "it answers")  # type: ignore[misc]
    figures("Allocate of a device that hangs is refused", took)
    figures("Allocate of a device that is known to hang is refused", at_once)
    assert min(took) < 0.5, "a device has 0.08 s to answer"


def test_a_device_that_dies_while_allocate_looks_at_it_is_refused(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    node = pairs(fake_node, 1)
    daemon(node, NO_TIMER)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    with trap(node, "0000:42:00.0") as fifo, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(outcome, kubelet.plugin(PGPU), ["0"])
        wait_until(lambda: somebody_reads(fifo), "the daemon looks at the device")  # and gets an end of file: no cdev
        refused = asked.result()
    assert isinstance(refused, Refusal)
    assert refused.status is StatusCode.FAILED_PRECONDITION
    assert outcome(kubelet.plugin(PGPU), ["1"]) == [[node_path("1")]], "its mate was not taken with it"


PATIENT = "from sandbox_plugin import daemon\ndaemon._RECHECK_PATIENCE = 60"
"""As long as a test needs it, the look of an Allocate may hang."""


def test_an_allocate_that_is_cancelled_in_the_middle_promises_nothing(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    count = 10
    node = pairs(fake_node, count)
    plugin = daemon(node, NO_TIMER, PYTHONPATH=tampered(places, PATIENT))
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2 * count)
    wire = load_wire()
    for device in range(0, 2 * count, 2):
        request = wire.deviceplugin.AllocateRequest(container_requests=[{"devices_ids": [str(device)]}])
        message = request.SerializeToString()
        with trap(node, f"0000:42:{device:02x}.0"), bare_client(socket_of(places)) as client:
            stream = client.ask("Allocate", b"\0" + len(message).to_bytes(4, "big") + message)
            client.send()
            wait_until(lambda: somebody_hangs(plugin.pid), "the daemon looks at it")
            client.http.reset_stream(stream)
            client.ping()  # the daemon has read that the call is cancelled
    mates = [str(device) for device in range(1, 2 * count, 2)]
    assert outcome(kubelet.plugin(PGPU), mates) == [[node_path(device) for device in mates]]
    for mate in mates:  # the log may come after the answer
        plugin.wait_for("allocated", device=mate)
    assert len(plugin.events("allocated")) == count
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == set(mates))


def somebody_hangs(pid: int) -> bool:
    """Whether a thread of the process waits in the opening of a FIFO (wait_for_partner in the kernel's fs/pipe.c)."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            if "wait_for_partner" in (thread / "wchan").read_text():
                return True
        except OSError:
            continue
    return False


def test_of_two_allocates_for_mates_the_one_whose_look_takes_longer_sees_the_others_promise(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = pairs(fake_node, 1)
    plugin = daemon(node, NO_TIMER, PYTHONPATH=tampered(places, PATIENT))
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    with trap(node, "0000:42:00.0") as fifo, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(outcome, kubelet.plugin(PGPU), ["0"])
        wait_until(lambda: somebody_hangs(plugin.pid), "the daemon looks at it")
        assert outcome(kubelet.plugin(PGPU), ["1"]) == [[node_path("1")]]
        answer(fifo, b"511:0\n")
        refused = asked.result()
    assert isinstance(refused, Refusal)
    assert refused.status is StatusCode.FAILED_PRECONDITION
    assert len(plugin.events("allocated")) == 1


# Nonsense on the wire


OTHER_TYPES = {
    "a number for a container": ("Allocate", b"\x08\x01"),
    "a number for a device ID": ("Allocate", b"\x0a\x02\x08\x01"),
    "a fixed32 for a container": ("Allocate", b"\x0d\x01\x02\x03\x04"),
    "preferred: a number for a container": ("GetPreferredAllocation", b"\x08\x01"),
    "preferred: a number for a device ID": ("GetPreferredAllocation", b"\x0a\x02\x08\x01"),
    "preferred: text for a size": ("GetPreferredAllocation", b"\x0a\x03\x1a\x01x"),
}


def test_fields_of_another_type_than_the_protocol_says_are_an_invalid_argument(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    daemon(fake_node("workstation"))
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    for what, (method, message) in OTHER_TYPES.items():
        refused = refusal(partial(kubelet.plugin(PGPU).raw, method, message))
        assert refused.status is StatusCode.INVALID_ARGUMENT, what
        assert "Request" in refused.message, "it names what is wrong"


def test_bytes_that_are_no_message_cost_their_own_call_alone(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon
) -> None:
    plugin = daemon(fake_node("workstation"))
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 2)
    for nonsense in (b"\xff" * 20, b"\x0a\x7f", b"\x0a\x04\x0a\x02\xff\xfe", b"\x0b", os.urandom(1000)):
        refused = refusal(partial(kubelet.plugin(PGPU).raw, "Allocate", nonsense))
        assert refused.status is StatusCode.INVALID_ARGUMENT
        assert len(refused.message) < 400
    assert len(kubelet.registrations) == 1
    assert "Traceback" not in plugin.log()
    device = min(kubelet.healthy(PGPU))
    assert outcome(kubelet.plugin(PGPU), [device]) == [[f"/dev/vfio/{device}"]]
