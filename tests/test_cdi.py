"""CDI specs: what is rendered, held against a strict reader of the format, and how it comes to the disk.

The reader (cdi_reader.py) shares nothing with the package, and is tested here itself: it must refuse what Kata refuses.
The writer runs in this process, against real folders; its faults with real disks are in test_faults.py.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from cdi_reader import Refused, Spec, nodes_of, read_folder, read_spec, reading
from conftest import MakeNode, StartDaemon
from daemon import Daemon, Places
from facts import gpu, host
from hypothesis import given
from hypothesis import strategies as st
from kubelet import GrpcKubelet
from loop import LIMIT, in_loop
from names import NVSWITCH, PGPU
from pods import PodResources
from specs import as_text, device, document, reference
from trials import QUICK, tampered, wait_until

from sandbox_plugin.cdi import files, stale
from sandbox_plugin.cdi.owner import ownership
from sandbox_plugin.cdi.render import MARK, ids_in_spec, render_spec, render_specs
from sandbox_plugin.cdi.writer import CdiWriter
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.inventory.ledger import DeviceKey, Holdings
from sandbox_plugin.inventory.nodes import vfio_nodes
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.inventory.tracking import RETIRE
from sandbox_plugin.model import Device, HostFacts, Placement, Reason
from sandbox_plugin.registry import Registry

A, B, C = (f"0000:0{bus}:00.0" for bus in (1, 2, 3))
OURS = "nvidia.com-pgpu.yaml"


# The reader itself


OURS_PLAIN = b'cdiVersion: "0.5.0"\nkind: "vendor.com/class"\ndevices:\n' + b"".join(
    b"""  - name: "%d"
    containerEdits:
      deviceNodes:
        - path: "/dev/vfio/%d"
"""
    % (number, number)
    for number in (4, 12)
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("0.5.0", "0.7.0"),
        ('"12"', '"4"'),
        ('"12"', "12"),
        ("path", "mode"),
        ('- path: "/dev/vfio/12"', ""),
    ],
)
def test_the_strict_reader_refuses_what_kata_could_stumble_over(before: str, after: str) -> None:
    spec = read_spec(OURS_PLAIN)
    assert spec == Spec(
        version="0.5.0", kind="vendor.com/class", devices={"4": ("/dev/vfio/4",), "12": ("/dev/vfio/12",)}
    )
    with pytest.raises(Refused):
        read_spec(OURS_PLAIN.decode().replace(before, after))


def test_the_strict_reader_refuses_a_folder_for_one_device_in_two_specs_or_a_node_that_is_not_there(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.yaml").write_bytes(as_text(document()))
    (tmp_path / "not-a-spec.txt").write_bytes(b"whatever")
    assert read_folder(tmp_path) == {"vendor.com/class=0": ("/dev/null",)}
    with pytest.raises(Refused, match="/dev/null does not exist"):
        read_folder(tmp_path, nodes_of(tmp_path))
    (tmp_path / "b.json").write_text(json.dumps(document()))
    with pytest.raises(Refused, match=r"b\.json: vendor.com/class=0 is in another spec too"):
        read_folder(tmp_path)


# What is rendered


def made(resource: str, number: int, *, node: str | None = None, node_exists: bool = True) -> Device:
    return Device(
        id=str(number),
        resource=resource,
        node=node or f"/dev/vfio/devices/vfio{number}",
        model="GPU",
        placements=(Placement(address=A, numa_node=0, bridges=()),),
        iommu_group=number,
        group_node=f"/dev/vfio/{number}",
        node_exists=node_exists,
    )


def offering(*devices: Device) -> Inventory:
    return Inventory(
        version=1,
        resources={d.resource: tuple(e for e in devices if e.resource == d.resource) for d in devices},
    )


def test_a_spec_is_one_entry_a_device_and_its_node_and_no_field_that_is_not_needed() -> None:
    assert render_specs(offering(made(PGPU, 4), made(PGPU, 12), made(NVSWITCH, 0, node="/dev/vfio/47"))) == {
        PGPU: f"""{MARK}cdiVersion: "0.5.0"
kind: "nvidia.com/pgpu"
devices:
  - name: "4"
    containerEdits:
      deviceNodes:
        - path: "/dev/vfio/devices/vfio4"
  - name: "12"
    containerEdits:
      deviceNodes:
        - path: "/dev/vfio/devices/vfio12"
""",
        NVSWITCH: f"""{MARK}cdiVersion: "0.5.0"
kind: "nvidia.com/nvswitch"
devices:
  - name: "0"
    containerEdits:
      deviceNodes:
        - path: "/dev/vfio/47"
""",
    }


def test_a_device_whose_node_is_gone_leaves_the_spec_and_without_any_there_is_no_spec() -> None:
    lost = made(PGPU, 4, node_exists=False)
    assert render_specs(offering(lost)) == {}
    assert render_specs(offering()) == {}
    assert read_spec(render_specs(offering(lost, made(PGPU, 5)))[PGPU]).devices.keys() == {"5"}


def test_only_what_stands_in_a_spec_of_ours_with_a_node_that_exists_counts_as_in_it() -> None:
    content = render_spec(PGPU, [made(PGPU, number) for number in (1, 2, 3)]).encode()
    now = [made(PGPU, 1), made(PGPU, 2, node="/dev/vfio/2"), made(PGPU, 3, node_exists=False), made(PGPU, 4)]
    assert ids_in_spec(content, PGPU, now) == {"1"}
    assert ids_in_spec(content, NVSWITCH, now) == set()
    assert ids_in_spec(content.removeprefix(MARK.encode()), PGPU, now) == set()


@pytest.mark.parametrize("resource", ["true.com/null", "a.b-c/d-d", "null.e5/on"])
def test_names_and_ids_that_look_like_something_else_in_yaml_stay_text(resource: str) -> None:
    spec = read_spec(render_spec(resource, [made(resource, number) for number in (0, 10, 1 << 40)]))
    assert spec.kind == resource
    assert list(spec.devices) == ["0", "10", "1099511627776"]


# How it comes to the disk


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


def may_be_ours(resource: str) -> bool:
    return resource in (PGPU, NVSWITCH)


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

    async def answer(self, asked_at: float, *, complete: bool = True, **pods: DeviceKey) -> set[str]:
        """PodResources names these pods now, and what each of them holds. Returns what is in the folder then."""
        named = {device: f"default/{pod}" for pod, device in pods.items()}
        self.registry.learn(holdings=Holdings(asked_at=asked_at, pods=named, complete=complete))
        await self.rounds(3)
        return names_in(self.folder)

    def reason(self, device_id: str) -> tuple[Reason | None, str]:
        listed = self.registry.current.device(PGPU, device_id)
        assert listed is not None
        return listed.health.reason, listed.health.detail


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@asynccontextmanager
async def bench(folder: Path, interval: float = 0.02) -> AsyncIterator[Bench]:
    made = Bench(folder, interval)
    async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as group:
        task = group.create_task(made.writer.run())
        yield made
        task.cancel()


def with_gpus(*numbers: int) -> HostFacts:
    """A host with an H100 for each number, which is its vfioN."""
    return host(*(gpu(f"0000:{n:02x}:00.0", vfio=n, group=50 + n) for n in numbers), kernel_has_cdevs=True)


@in_loop
async def test_without_a_device_there_is_not_even_a_folder_and_with_one_a_spec_that_all_may_read(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path / "cdi") as at:
        await at.show(with_gpus())
        assert not (tmp_path / "cdi").exists()
        await at.show(with_gpus(3))
        assert stat.S_IMODE((tmp_path / "cdi" / OURS).stat().st_mode) == 0o644
        assert read_folder(tmp_path / "cdi") == {f"{PGPU}=3": ("/dev/vfio/devices/vfio3",)}


@in_loop
async def test_who_reads_while_specs_change_never_sees_half_a_spec_or_a_device_twice(tmp_path: Path) -> None:
    few, many = (2, 3), tuple(range(40))
    whole = [{f"{PGPU}={n}": (f"/dev/vfio/devices/vfio{n}",) for n in numbers} for numbers in (few, many)]

    def look() -> None:
        assert read_folder(tmp_path) in whole
        for path in tmp_path.iterdir():
            assert path.name == OURS or path.suffix == ".tmp", path

    async with bench(tmp_path) as at:
        await at.show(with_gpus(*few))
        with reading(look) as faults:
            for number in range(30):
                await at.show(with_gpus(*(many, few)[number % 2]))
        assert not faults
    assert names_in(tmp_path) == {OURS}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"---\n" + as_text(reference(PGPU)), "it has the name and the kind of a resource that this plugin serves"),
        (b"---\ncdiVersion: 0.5.0\ndevices:\n- containerEd", "it is unfinished: it has no kind"),
    ],
    ids=["the reference's", "half a spec"],
)
@in_loop
async def test_what_another_writer_puts_under_our_name_is_replaced_and_costs_no_device_its_health(
    tmp_path: Path, content: bytes, why: str
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))
            before = at.registry.current.version
            (tmp_path / OURS).write_bytes(content)
            await at.rounds(2)
            assert at.registry.current.version == before, "a device was Unhealthy meanwhile"
            assert read_folder(tmp_path) == {f"{PGPU}=3": ("/dev/vfio/devices/vfio3",)}
    (said,) = [log for log in logs if log["event"] == "cdi spec of another writer replaced"]
    assert said["reason"] == why


@in_loop
async def test_what_this_plugin_wrote_another_day_is_replaced_without_a_word_of_another_writer(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        (tmp_path / OURS).write_bytes(MARK.encode() + as_text(reference("other.com/whatever")))
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))
    assert read_folder(tmp_path).keys() == {f"{PGPU}=3"}
    assert [log["event"] for log in logs] == ["cdi spec written"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (as_text(reference("other.com/pgpu")), "kind other.com/pgpu"),
        (b"#" * (1 << 19), "it has more than 262144 bytes"),
    ],
    ids=["another kind", "something very large"],
)
@in_loop
async def test_what_has_our_name_and_is_somebody_elses_is_kept_and_its_devices_say_so(
    tmp_path: Path, content: bytes, why: str
) -> None:
    (tmp_path / OURS).write_bytes(content)
    before = (tmp_path / OURS).stat()
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        reason, detail = at.reason("3")
        assert reason is Reason.NOT_IN_CDI
        assert f"{OURS} belongs to another program ({why}): move it away or choose another alias" in detail
    after = (tmp_path / OURS).stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)
    assert (tmp_path / OURS).read_bytes() == content


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir], ids=["a pipe", "a folder"])
@in_loop
async def test_what_has_our_name_and_is_not_a_file_is_kept_and_holds_nobody_up(
    tmp_path: Path, put: Callable[[Path], None]
) -> None:
    put(tmp_path / OURS)
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        reason, detail = at.reason("3")
        assert reason is Reason.NOT_IN_CDI
        assert "Not a regular file" in detail
    assert not (tmp_path / OURS).is_file()


STALE: dict[str, bytes] = {
    "nvidia.com-old.yaml": MARK.encode() + as_text(reference("nvidia.com/old")),
    "nvidia.com-nvswitch.yaml": b"---\n" + as_text(reference(NVSWITCH)),
}
"""Ours by the mark, and by name and kind of a resource that has no device now."""
FOREIGN: dict[str, bytes] = {
    "nvidia.yaml": as_text(reference(NVSWITCH)),
    "nvidia.com-nvswitch.json": json.dumps(reference(NVSWITCH)).encode(),
    "nvidia.com-gpu.yaml": as_text(reference("nvidia.com/gpu")),
    "marked.json": MARK.encode() + b"but no name that we give",
    "empty.yaml": b"",
}


@in_loop
async def test_only_stale_specs_of_ours_are_removed_and_a_pipe_or_a_folder_holds_nobody_up(tmp_path: Path) -> None:
    for name, content in {**STALE, **FOREIGN}.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to("nowhere")
    odd = {"pipe.yaml", "folder.yaml", "link.yaml"}
    before = {name: (tmp_path / name).stat() for name in FOREIGN}

    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        assert names_in(tmp_path) == {OURS, *FOREIGN, *odd}
        await at.show(with_gpus(4))
        assert names_in(tmp_path) == {OURS, *FOREIGN, *odd}
    for name, content in FOREIGN.items():
        assert (tmp_path / name).read_bytes() == content
        assert (tmp_path / name).stat().st_mtime_ns == before[name].st_mtime_ns


def refusing(number: int) -> Callable[..., None]:
    """A call to the system that fails with this error."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@in_loop
async def test_a_folder_that_cannot_be_written_is_tried_again_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, interval=3600) as at:
        with monkeypatch.context() as patched, structlog.testing.capture_logs() as logs:
            patched.setattr(os, "replace", refusing(errno.EROFS))
            at.registry.observe(with_gpus(3))
            await at.rounds(2)
            reason, detail = at.reason("3")
            assert reason is Reason.NOT_IN_CDI
            assert "Read-only file system" in detail
            assert names_in(tmp_path) == set()
            assert [log["reason"] for log in logs] == [detail], "said once"
        await at.rounds(1)
        assert at.reason("3")[0] in (None, Reason.SETTLING)
        assert read_folder(tmp_path).keys() == {f"{PGPU}=3"}


RIVAL = as_text(document(kind=PGPU, devices=[device("3", deviceNodes=[{"path": "/dev/vfio/devices/vfio4"}])]))


@pytest.mark.parametrize("rival", [RIVAL, None], ids=["overwritten", "removed"])
@in_loop
async def test_while_a_spec_that_is_not_ours_any_more_cannot_be_replaced_no_device_counts_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rival: bytes | None
) -> None:
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        assert at.reason("3") == (None, "")
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", refusing(errno.EROFS))
            if rival is None:
                (tmp_path / OURS).unlink()
            else:
                (tmp_path / OURS).write_bytes(rival)
            await at.rounds(2)
            assert at.reason("3")[0] is Reason.NOT_IN_CDI
        await at.rounds(3)
        assert at.reason("3") == (None, "")
        assert read_folder(tmp_path) == {f"{PGPU}=3": ("/dev/vfio/devices/vfio3",)}


@in_loop
async def test_what_an_earlier_run_wrote_counts_although_the_disk_is_full_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3, 4))
    monkeypatch.setattr(os, "replace", refusing(errno.ENOSPC))
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3, 5))
        assert at.reason("3") == (None, "")
        assert at.reason("5")[0] is Reason.NOT_IN_CDI


@in_loop
async def test_while_a_write_hangs_no_device_counts_as_written_and_whoever_cancels_the_writer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    try:
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))
            monkeypatch.setattr(os, "replace", lambda *paths: released.wait(LIMIT))
            at.registry.observe(with_gpus(3, 4))
            await at.rounds(1)
            reason, detail = at.reason("3")
            assert reason is Reason.NOT_IN_CDI
            assert "has not answered for" in detail
        assert not released.is_set()
    finally:
        released.set()


@in_loop
async def test_a_spec_that_stands_there_is_not_written_again(tmp_path: Path) -> None:
    written: set[int] = set()
    for _ in range(2):  # also by the daemon that comes after this one
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))
            await at.rounds(5)
            written.add((tmp_path / OURS).stat().st_ino)
    assert len(written) == 1


@in_loop
async def test_a_spec_that_is_gone_comes_back_when_the_writer_is_told_to_look(tmp_path: Path) -> None:
    async with bench(tmp_path, interval=3600) as at:
        at.registry.observe(with_gpus(3))
        await at.rounds(1)
        for _ in range(2):
            (tmp_path / OURS).unlink()
            at.writer.look()
            await at.rounds(1)
            assert read_folder(tmp_path).keys() == {f"{PGPU}=3"}


# What is in the way of a write


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "a rest of an earlier write": lambda path: path.write_bytes(b"# Wri"),
    "a pipe": os.mkfifo,
    "a link to a file": lambda path: path.symlink_to("somebody-elses"),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
@in_loop
async def test_whatever_has_the_name_under_which_a_spec_is_written_first_neither_stops_the_writer_nor_is_written_to(
    tmp_path: Path, what: str
) -> None:
    (tmp_path / "somebody-elses").write_bytes(b"whatever")
    temporary = tmp_path / f".{OURS}.sandbox-plugin.tmp"
    IN_THE_WAY[what](temporary)

    async with bench(tmp_path) as at:
        for number in (3, 4):
            await at.show(with_gpus(number))
            assert at.reason(str(number)) == (None, "")
            assert read_folder(tmp_path).keys() == {f"{PGPU}={number}"}
    assert names_in(tmp_path) == {OURS, "somebody-elses"}
    assert (tmp_path / "somebody-elses").read_bytes() == b"whatever"


# How long specs stay that no resource needs any more


OLD = "nvidia.com/old"
LEFT = "nvidia.com-old.yaml"


def left_by_us(*numbers: int, kind: str = OLD) -> bytes:
    """What we wrote when the alias was another."""
    return render_spec(kind, [made(kind, number) for number in numbers]).encode()


def left_by_the_reference(kind: str, node: str) -> bytes:
    """Beside a group's node it names that of the VFIO container."""
    both = device("9", deviceNodes=[{"path": "/dev/vfio/vfio"}, {"path": node}])
    return b"---\n" + as_text(reference(kind) | {"devices": [both]})


@in_loop
async def test_after_a_change_of_alias_the_old_spec_stays_while_a_pod_holds_a_device_of_it_and_a_minute_longer(
    tmp_path: Path,
) -> None:
    (tmp_path / LEFT).write_bytes(left_by_us(3, 4))
    before = (tmp_path / LEFT).stat()

    with structlog.testing.capture_logs() as logs:
        async with bench(tmp_path) as at:
            at.registry.learn(holdings=Holdings(asked_at=100, pods={(OLD, "4"): "default/vm"}))
            await at.show(with_gpus(3, 4))
            assert at.reason("3")[0] is not Reason.NOT_IN_CDI
            both = {f"{kind}={n}": (f"/dev/vfio/devices/vfio{n}",) for kind in (PGPU, OLD) for n in (3, 4)}
            assert read_folder(tmp_path) == both
            assert await at.answer(200, other=(PGPU, "3")) == {OURS, LEFT}
            assert await at.answer(200 + RETIRE - 1) == {OURS, LEFT}
            after = (tmp_path / LEFT).stat()
            assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
            assert await at.answer(200 + RETIRE) == {OURS}
    assert [(log["event"], log.get("reason")) for log in logs if log.get("path") == str(tmp_path / LEFT)] == [
        ("stale cdi spec kept", "pod default/vm holds a device of it"),
        ("stale cdi spec kept", "PodResources has not shown for 60 s yet that no pod holds a device of it"),
        ("stale cdi spec removed", None),
    ]


ANSWERS: dict[str, list[tuple[float, bool, bool]]] = {
    "a pod that shows again": [(100, True, False), (130, True, True), (140, True, False)],
    "answers that may lack pods": [(138, False, False), (139, False, False), (140, True, False)],
}
"""When PodResources is asked, whether its answer is complete, and whether a pod holds a device in it."""


@pytest.mark.parametrize("name", ANSWERS)
@in_loop
async def test_the_minute_of_a_stale_spec_begins_with_the_first_complete_answer_without_such_pods(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / LEFT).write_bytes(left_by_us(3))

    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        for asked_at, complete, is_held in ANSWERS[name]:
            pods = {"vm": (OLD, "3")} if is_held else {}
            assert await at.answer(asked_at, complete=complete, **pods) == {OURS, LEFT}
        assert await at.answer(140 + RETIRE - 1) == {OURS, LEFT}
        assert await at.answer(140 + RETIRE) == {OURS}


@in_loop
async def test_while_pod_resources_has_not_answered_a_stale_spec_stays_even_without_a_node(tmp_path: Path) -> None:
    (tmp_path / LEFT).write_bytes(left_by_us(3))

    async with bench(tmp_path) as at:
        at.registry.learn(pod_resources=True)
        await at.show(with_gpus(5))
        assert names_in(tmp_path) == {OURS, LEFT}
        assert await at.answer(100, vm=(OLD, "3")) == {OURS, LEFT}
        at.registry.learn(pod_resources=False)
        await at.rounds(3)
        assert names_in(tmp_path) == {OURS}


@in_loop
async def test_without_pod_resources_the_spec_of_an_old_alias_stays_as_it_is_while_one_of_its_nodes_exists(
    tmp_path: Path,
) -> None:
    (tmp_path / LEFT).write_bytes(left_by_us(3, 4))

    with structlog.testing.capture_logs() as logs:
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3, 4))
            await at.show(with_gpus(4, 5))
            assert (tmp_path / LEFT).read_bytes() == left_by_us(3, 4)
            await at.show(host(gpu(A, vfio=5, group=55), unreadable={B: "no answer"}))
            assert names_in(tmp_path) == {OURS, LEFT}, "it may be the one that does not answer"
            await at.show(with_gpus(5))
            assert names_in(tmp_path) == {OURS}
    assert [log["reason"].partition(",")[0] for log in logs if log["event"] == "stale cdi spec kept"] == [
        "/dev/vfio/devices/vfio3 exists",
        "/dev/vfio/devices/vfio4 exists",
        "it cannot be seen now which VFIO nodes there are",
    ]


@in_loop
async def test_of_what_the_reference_left_the_devices_own_node_counts_and_not_the_one_beside_it(tmp_path: Path) -> None:
    left = tmp_path / "nvidia.com-nvswitch.yaml"
    left.write_bytes(left_by_the_reference(NVSWITCH, "/dev/vfio/53"))

    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        assert at.registry.former == {(NVSWITCH, "9"): "/dev/vfio/53"}
        assert left.exists()
        await at.show(with_gpus(4))
        assert at.registry.former == {}
        assert not left.exists()


USELESS: dict[str, tuple[str, bytes]] = {
    "a spec that Kata refuses": (LEFT, left_by_us(3).replace(b"0.5.0", b"0.9.0")),
    "half a spec": (LEFT, left_by_us(3)[:-30]),
    "a spec under another name": ("nvidia.com-pgpu.backup.yaml", left_by_us(3, kind=PGPU)),
    "a part of the mark": (LEFT, left_by_us(3)[:10]),
}
"""What no pod can use, and what would fail every pod of the node."""


@pytest.mark.parametrize("name", USELESS)
@in_loop
async def test_what_we_wrote_and_kata_refuses_goes_at_once_whoever_holds_what(tmp_path: Path, name: str) -> None:
    file, content = USELESS[name]
    (tmp_path / file).write_bytes(content)

    async with bench(tmp_path) as at:
        at.registry.learn(holdings=Holdings(asked_at=100, pods={(OLD, "3"): "default/a", (PGPU, "3"): "default/b"}))
        await at.show(with_gpus(3))
        assert read_folder(tmp_path).keys() == {f"{PGPU}=3"}
        assert at.registry.former == {}
    assert names_in(tmp_path) == {OURS}


@given(st.integers(1, len(left_by_us(3, kind=PGPU))))
def test_any_first_part_of_our_own_spec_is_ours(size: int) -> None:
    content = left_by_us(3, kind=PGPU)[:size]
    assert ownership(content, PGPU).why == "this plugin wrote it"
    assert stale.read_stale("nvidia.com-any.yaml", content, lambda kind: False) is not None


@pytest.mark.parametrize("audio", [False, True], ids=["with its node", "its node stays with its audio function"])
@in_loop
async def test_a_served_resource_that_loses_its_last_device_has_no_spec_at_once_whoever_holds_that(
    tmp_path: Path, audio: bool
) -> None:
    there = host(gpu(A, vfio=3, group=53, cdev=False))
    lost = host(gpu(A, vfio=None, group=53), group_nodes=frozenset({53} if audio else ()))

    async with bench(tmp_path) as at:
        at.registry.learn(holdings=Holdings(asked_at=100, pods={(PGPU, "53"): "default/vm"}))
        await at.show(there)
        assert names_in(tmp_path) == {OURS}
        await at.show(lost)
        assert names_in(tmp_path) == set()
        await at.show(there)
        assert read_folder(tmp_path).keys() == {f"{PGPU}=53"}


@in_loop
async def test_a_device_that_is_known_only_by_its_pod_keeps_its_spec_while_its_node_exists(tmp_path: Path) -> None:
    """A rule has given it another resource name, say, and the old name is still one of ours."""
    left = tmp_path / "nvidia.com-nvswitch.yaml"
    left.write_bytes(left_by_us(3, kind=NVSWITCH))

    async with bench(tmp_path) as at:
        at.registry.learn(holdings=Holdings(asked_at=100, pods={(NVSWITCH, "3"): "default/vm"}))
        await at.show(with_gpus(3))
        assert NVSWITCH in at.registry.current.resources
        assert left.exists()
        await at.show(with_gpus(4))
        assert not left.exists()


@in_loop
async def test_the_registry_learns_what_stale_specs_say_and_pod_resources_is_asked_while_there_are_any(
    tmp_path: Path,
) -> None:
    (tmp_path / LEFT).write_bytes(left_by_us(3, 4))
    (tmp_path / "nvidia.com-gpu.yaml").write_bytes(as_text(reference("nvidia.com/gpu")))

    async with bench(tmp_path) as at:
        at.registry.learn(holdings=Holdings(asked_at=100, pods={(OLD, "4"): "default/vm"}))
        await at.show(with_gpus(5))
        assert at.registry.former == {(OLD, str(n)): f"/dev/vfio/devices/vfio{n}" for n in (3, 4)}
        assert at.registry.current.waits_for_holdings
        await at.answer(200)
        await at.answer(200 + RETIRE)
        assert at.registry.former == {}
        assert not at.registry.current.waits_for_holdings


@pytest.mark.parametrize("name", ["listdir", "stat"])
@in_loop
async def test_while_nothing_can_be_read_for_want_of_descriptors_what_stale_specs_say_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / LEFT).write_bytes(left_by_us(3))

    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        with structlog.testing.capture_logs() as logs, monkeypatch.context() as patched:
            patched.setattr(os, name, refusing(errno.EMFILE))
            await at.rounds(3)
        reasons = [log["reason"] for log in logs]
        assert reasons.count("stale CDI specs cannot be looked for: Too many open files") == 1
        assert at.reason("3") == (None, ""), "what was written is not forgotten either"
        assert at.registry.former == {(OLD, "3"): "/dev/vfio/devices/vfio3"}


@in_loop
async def test_a_stale_spec_that_cannot_be_removed_is_said_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        (tmp_path / LEFT).write_bytes(left_by_us(3)[:-30])
        with monkeypatch.context() as patched, structlog.testing.capture_logs() as logs:
            patched.setattr(os, "unlink", refuse)
            await at.rounds(4)
        (said,) = logs
        assert said["reason"] == "this stale CDI spec cannot be removed: Read-only file system"
        await at.rounds(3)
        assert names_in(tmp_path) == {OURS}


def test_what_takes_the_place_of_a_stale_spec_before_that_is_removed_is_not_removed(tmp_path: Path) -> None:
    file = tmp_path / LEFT
    file.write_bytes(left_by_us(3))
    stamp = files.read(file, None, bytes).stamp
    file.write_bytes(b"somebody else's")
    assert not files.remove(file, stamp)
    assert file.exists()
    assert not files.remove(tmp_path / "gone.yaml", stamp)


def test_before_anything_is_offered_the_nodes_of_former_names_can_be_read_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = {
        LEFT: left_by_us(3, 4),
        OURS: left_by_the_reference(PGPU, "/dev/vfio/47"),
        "nvidia.com-gpu.yaml": left_by_the_reference("nvidia.com/gpu", "/dev/vfio/48"),
        "nvidia.com-half.yaml": left_by_us(6, kind="nvidia.com/half")[:-9],
    }
    for name, content in specs.items():
        (tmp_path / name).write_bytes(content)
    asyncio.run(stale.learn_former(tmp_path, registry := Told(), may_be_ours))
    assert registry.former == {
        (OLD, "3"): "/dev/vfio/devices/vfio3",
        (OLD, "4"): "/dev/vfio/devices/vfio4",
        (PGPU, "9"): "/dev/vfio/47",
    }
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == specs
    assert asyncio.run(stale.read_former(tmp_path / "missing", may_be_ours)) == {}
    monkeypatch.setattr(os, "listdir", refusing(errno.EMFILE))
    assert asyncio.run(stale.read_former(tmp_path, may_be_ours)) == {}


@pytest.mark.parametrize(
    ("facts", "nodes"),
    [
        (host(gpu(A, vfio=3, group=53)), {"/dev/vfio/devices/vfio3", "/dev/vfio/53"}),
        (host(gpu(A, vfio=3, group=53, cdev=False)), {"/dev/vfio/53"}),
        (host(gpu(A, vfio=None)), set()),
        (host(gpu(A, vfio=3), dev_nodes=frozenset({"/dev/vfio/1"}), unreadable={B: "no answer"}), {"/dev/vfio/1"}),
        (host(gpu(A, vfio=3), unreadable={B: "no answer"}), None),
        (HostFacts(unreachable="no such folder"), None),
    ],
    ids=["cdev and group", "group", "not bound", "a live /dev", "a function does not answer", "no bus"],
)
def test_which_nodes_a_host_has_is_known_unless_something_does_not_answer(
    facts: HostFacts, nodes: set[str] | None
) -> None:
    assert vfio_nodes(facts) == nodes


# The real process


WORKSTATION = {"11": "/dev/vfio/11", "13": "/dev/vfio/13"}


@pytest.fixture
def pods(places: Places) -> Iterator[PodResources]:
    """A PodResources that knows all its pods."""
    with PodResources(places.top / "pod-resources/kubelet.sock") as made:
        made.start(age=3600)
        yield made


def on_workstation(*resources: str) -> dict[str, tuple[str, ...]]:
    """What the specs of these resources say there."""
    return {f"{resource}={number}": (node,) for resource in resources for number, node in WORKSTATION.items()}


def change_the_alias(node: FakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places) -> Daemon:
    """From `old` to the usual one, with a restart, as it must be."""
    before = daemon(node, "--gpu-alias=old")
    kubelet.wait_for(lambda: kubelet.healthy(OLD) == WORKSTATION.keys())
    before.terminate()
    assert read_folder(places.cdi) == on_workstation(OLD)
    after = daemon(node, QUICK)
    wait_until(lambda: read_folder(places.cdi) == on_workstation(OLD, PGPU), "the devices have both names")
    return after


def test_pods_of_an_old_alias_find_their_devices_although_all_nodes_are_gone_for_a_while(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places, pods: PodResources
) -> None:
    """As when the mode of confidential computing is changed: that binds every GPU again."""
    node = fake_node("workstation")
    pods.hold("vm", OLD, "11")
    plugin = change_the_alias(node, kubelet, daemon, places)
    plugin.wait_for("stale cdi spec kept", path=str(places.cdi / LEFT), reason="pod default/vm holds a device of it")
    bound = [function.address for function in node.functions() if function.driver == "vfio-pci"]
    for address in bound:
        node.unbind(address)
    wait_until(lambda: read_folder(places.cdi) == on_workstation(OLD), "the spec of the new name is gone")
    for address in bound:
        node.bind(address)
    wait_until(lambda: read_folder(places.cdi) == on_workstation(OLD, PGPU), "both are there again")


def test_a_cdi_folder_is_read_before_anything_is_found_and_one_that_is_silent_holds_that_up_for_a_second_alone(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    hangs = """
import asyncio, structlog
from sandbox_plugin.cdi import stale
async def hang(folder, is_ours):
    structlog.get_logger().info("reading")
    await asyncio.Event().wait()
stale.read_former = hang
"""
    plugin = daemon(fake_node("workstation"), PYTHONPATH=tampered(places, hangs))
    kubelet.wait_for(lambda: kubelet.healthy(PGPU) == WORKSTATION.keys())
    (read,) = plugin.events("reading")
    assert all(read["timestamp"] < found["timestamp"] for found in plugin.events("device found"))
