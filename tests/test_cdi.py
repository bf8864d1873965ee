"""CDI specs: what is rendered, held against a strict reader of the format, and how it comes to the disk.

The reader (cdi_reader.py) shares nothing with the package, and is tested here itself: it must refuse what Kata refuses.
The writer runs in this process, against real folders; its faults with real disks are in test_faults.py.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from cdi_reader import Refused, Spec, nodes_of, read_folder, read_spec, reading
from conftest import MakeNode, StartDaemon
from daemon import Places
from facts import gpu, host
from hypothesis import given
from hypothesis import strategies as st
from kubelet import GrpcKubelet
from loop import LIMIT
from names import NVSWITCH, PGPU
from outputs import GPU_NODES, SWITCH_NODES
from specs import BAD, GOOD, KEPT, REPLACED, as_text, device, document, reference
from trials import wait_until

from sandbox_plugin.inventory.naming import ModelNames, cdi_file_name, check_resource_name
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device, HostFacts, Placement, Reason
from sandbox_plugin.outputs import files
from sandbox_plugin.outputs.cdi import CdiWriter, render_specs
from sandbox_plugin.outputs.cdi_owner import MARK, ownership
from sandbox_plugin.registry import Registry
from sandbox_plugin.settings import Settings

A, B, C = (f"0000:0{bus}:00.0" for bus in (1, 2, 3))
OURS = "nvidia.com-pgpu.yaml"


# The reader itself


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD.keys())
def test_the_strict_reader_takes_what_the_format_allows(content: bytes) -> None:
    assert read_spec(content).devices


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_the_strict_reader_refuses_what_kata_refuses(content: bytes) -> None:
    with pytest.raises(Refused):
        read_spec(content)


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
    (tmp_path / "b.json").unlink()
    (tmp_path / "b.json").symlink_to("nowhere")
    with pytest.raises(Refused, match=r"b\.json: a link to nothing"):
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


def is_resource(name: str) -> bool:
    try:
        check_resource_name(name)
    except ValueError:
        return False
    return True


labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
resources = st.one_of(
    st.sampled_from([PGPU, NVSWITCH, "true.com/null", "a.b-c/dd", "a.b/c-dd"]),
    st.builds(
        "{}/{}".format,
        st.lists(labels, min_size=1, max_size=3).map(".".join),
        st.from_regex(r"[A-Za-z]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?", fullmatch=True),
    ).filter(is_resource),
)


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    """Any resources, with any devices, some without their node: groups or cdevs, each node once."""
    numbers = iter(draw(st.lists(st.integers(0, 1 << 40), unique=True, max_size=12)))
    cdevs = draw(st.booleans())
    devices = []
    for resource in draw(st.lists(resources, unique=True, max_size=4)):
        for number in [next(numbers, None) for _ in range(draw(st.integers(1, 4)))]:
            if number is not None:
                node = f"/dev/vfio/devices/vfio{number}" if cdevs else f"/dev/vfio/{number}"
                devices.append(made(resource, number, node=node, node_exists=draw(st.booleans())))
    return offering(*devices)


@given(inventories())
def test_every_spec_that_is_rendered_is_taken_by_the_strict_reader_and_says_just_what_there_is(
    inventory: Inventory,
) -> None:
    specs = render_specs(inventory)
    read = {resource: read_spec(text) for resource, text in specs.items()}
    assert read == {
        resource: Spec(version="0.5.0", kind=resource, devices=nodes, plain=True)
        for resource, devices in inventory.resources.items()
        if (nodes := {d.id: (d.node,) for d in devices if d.node_exists})
    }
    files = [cdi_file_name(resource) for resource in specs]
    assert len(set(files)) == len(files)
    assert all(len(file) <= 255 and "/" not in file for file in files)
    assert all(text.startswith(MARK) for text in specs.values())


# How it comes to the disk


class Told(Registry):
    """A registry that counts what the writer tells it."""

    def __init__(self) -> None:
        super().__init__(Settings(), ModelNames())
        self.rounds = 0
        self.told = asyncio.Event()

    def learn(self, **signals: Any) -> Inventory:
        self.rounds += "in_cdi" in signals
        self.told.set()
        return super().learn(**signals)


class Bench:
    """The writer at work on a folder, and the inventory that it follows."""

    def __init__(self, folder: Path, recheck: float) -> None:
        self.folder = folder
        self.registry = Told()
        self.writer = CdiWriter(
            folder=folder, registry=self.registry, is_ours=lambda name: name in (PGPU, NVSWITCH), recheck=recheck
        )

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

    def reason(self, device_id: str) -> tuple[Reason | None, str]:
        listed = self.registry.current.device(PGPU, device_id)
        assert listed is not None
        return listed.health.reason, listed.health.detail


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@asynccontextmanager
async def bench(folder: Path, recheck: float = 0.02) -> AsyncIterator[Bench]:
    made = Bench(folder, recheck)
    async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as group:
        task = group.create_task(made.writer.run())
        yield made
        task.cancel()


def with_gpus(*numbers: int) -> HostFacts:
    """A host with an H100 for each number, which is its vfioN."""
    return host(*(gpu(f"0000:{n:02x}:00.0", vfio=n, group=50 + n) for n in numbers), kernel_has_cdevs=True)


def test_without_a_device_there_is_no_file_and_not_even_a_folder(tmp_path: Path) -> None:
    async def body() -> None:
        async with bench(tmp_path / "cdi") as at:
            await at.show(with_gpus())
            assert not (tmp_path / "cdi").exists()
            await at.show(with_gpus(3))
            assert read_folder(tmp_path / "cdi") == {f"{PGPU}=3": ("/dev/vfio/devices/vfio3",)}

    asyncio.run(body())


def test_a_spec_is_readable_for_all_whatever_the_umask(tmp_path: Path) -> None:
    async def body() -> None:
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))

    before = os.umask(0o077)
    try:
        asyncio.run(body())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / OURS).stat().st_mode) == 0o644


def test_who_reads_while_specs_change_never_sees_half_a_spec_or_a_device_twice(tmp_path: Path) -> None:
    few, many = (2, 3), tuple(range(40))
    whole = [{f"{PGPU}={n}": (f"/dev/vfio/devices/vfio{n}",) for n in numbers} for numbers in (few, many)]

    def look() -> None:
        assert read_folder(tmp_path) in whole
        for path in tmp_path.iterdir():
            assert path.name == OURS or path.suffix == ".tmp", path

    async def body() -> None:
        async with bench(tmp_path) as at:
            await at.show(with_gpus(*few))
            with reading(look) as faults:
                for number in range(30):
                    await at.show(with_gpus(*(many, few)[number % 2]))
            assert not faults

    asyncio.run(body())
    assert names_in(tmp_path) == {OURS}


@pytest.mark.parametrize("name", REPLACED)
def test_what_has_our_name_and_our_kind_or_is_a_broken_rest_is_replaced_and_the_log_says_why(
    tmp_path: Path, name: str
) -> None:
    content, why = REPLACED[name]

    async def body() -> None:
        (tmp_path / OURS).write_bytes(content)
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))
            assert at.reason("3") == (None, "")

    with structlog.testing.capture_logs() as logs:
        asyncio.run(body())
    assert read_folder(tmp_path) == {f"{PGPU}=3": ("/dev/vfio/devices/vfio3",)}
    (said,) = [log for log in logs if log["event"] == "cdi spec of another writer replaced"]
    assert why in said["reason"]


def test_what_this_plugin_wrote_another_day_is_replaced_without_a_word_about_another_writer(tmp_path: Path) -> None:
    async def body() -> None:
        (tmp_path / OURS).write_bytes(MARK.encode() + as_text(reference("other.com/whatever")))
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))

    with structlog.testing.capture_logs() as logs:
        asyncio.run(body())
    assert read_folder(tmp_path).keys() == {f"{PGPU}=3"}
    assert [log["event"] for log in logs] == ["cdi spec written"]


@pytest.mark.parametrize("name", KEPT)
def test_what_has_our_name_and_is_somebody_elses_is_kept_and_its_devices_say_so(tmp_path: Path, name: str) -> None:
    content, why = KEPT[name]

    async def body() -> None:
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

    asyncio.run(body())


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir], ids=["a pipe", "a folder"])
def test_what_has_our_name_and_is_not_a_file_is_kept_and_holds_nobody_up(
    tmp_path: Path, put: Callable[[Path], None]
) -> None:
    async def body() -> None:
        put(tmp_path / OURS)
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))
            reason, detail = at.reason("3")
            assert reason is Reason.NOT_IN_CDI
            assert "Not a regular file" in detail
        assert not (tmp_path / OURS).is_file()

    asyncio.run(body())


@given(st.binary(max_size=200))
def test_no_bytes_at_all_break_the_question_whose_they_are(content: bytes) -> None:
    assert ownership(content, PGPU).why


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


@contextmanager
def nobody_waits_at(pipe: Path) -> Iterator[None]:
    """Lets go, after a while, whoever waits for a writer of this pipe, and fails then instead of hanging."""
    done, late = threading.Event(), threading.Event()

    def let_go() -> None:
        if not done.wait(LIMIT / 4):
            late.set()
        while not done.wait(0.01):
            with suppress(OSError):
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))

    helper = threading.Thread(target=let_go, daemon=True)
    helper.start()
    try:
        yield
    finally:
        done.set()
        helper.join(LIMIT)
    assert not late.is_set(), "somebody waited at the pipe"


def test_only_stale_specs_of_ours_are_removed_and_a_pipe_or_a_folder_holds_nobody_up(tmp_path: Path) -> None:
    for name, content in {**STALE, **FOREIGN}.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to("nowhere")
    odd = {"pipe.yaml", "folder.yaml", "link.yaml"}
    before = {name: (tmp_path / name).stat() for name in FOREIGN}

    async def body() -> None:
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))
            assert names_in(tmp_path) == {OURS, *FOREIGN, *odd}
            await at.show(with_gpus(4))
            assert names_in(tmp_path) == {OURS, *FOREIGN, *odd}

    with nobody_waits_at(tmp_path / "pipe.yaml"):
        asyncio.run(body())
    for name, content in FOREIGN.items():
        assert (tmp_path / name).read_bytes() == content
        assert (tmp_path / name).stat().st_mtime_ns == before[name].st_mtime_ns


def test_a_folder_that_cannot_be_written_is_tried_again_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace
    tries = 0

    def refuse(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / OURS))

    async def body() -> None:
        async with bench(tmp_path) as at:
            monkeypatch.setattr(os, "replace", refuse)
            with structlog.testing.capture_logs() as logs:
                await at.show(with_gpus(3))
                await at.rounds(5)
            assert tries >= 5
            reason, detail = at.reason("3")
            assert reason is Reason.NOT_IN_CDI
            assert "Read-only file system" in detail
            assert names_in(tmp_path) == set()
            assert [log["reason"] for log in logs] == [detail], "said once"
            monkeypatch.setattr(os, "replace", replace)
            await at.rounds(2)
            assert at.reason("3")[0] in (None, Reason.SETTLING)
            assert read_folder(tmp_path).keys() == {f"{PGPU}=3"}

    asyncio.run(body())


def test_a_spec_that_stands_there_is_not_written_again(tmp_path: Path) -> None:
    async def body() -> None:
        for _ in range(2):  # also by the daemon that comes after this one
            async with bench(tmp_path) as at:
                await at.show(with_gpus(3))
                await at.rounds(5)
                written.add((tmp_path / OURS).stat().st_ino)

    written: set[int] = set()
    asyncio.run(body())
    assert len(written) == 1


def test_the_writer_looks_when_it_is_told_to_and_not_more_than_a_few_times_a_second(tmp_path: Path) -> None:
    async def body() -> None:
        async with bench(tmp_path, recheck=3600) as at:
            at.registry.observe(with_gpus(3))
            await at.rounds(1)
            for _ in range(3):
                (tmp_path / OURS).unlink()
                at.writer.look()
                await at.rounds(1)
                assert read_folder(tmp_path).keys() == {f"{PGPU}=3"}
            rounds, started = at.registry.rounds, time.monotonic()
            while at.registry.rounds < rounds + 4:
                at.writer.look()
                await asyncio.sleep(0.001)
            assert time.monotonic() - started > 0.7

    asyncio.run(body())


def test_while_somebody_elses_spec_cannot_be_replaced_no_device_counts_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / OURS))

    async def body() -> None:
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3))
            assert at.reason("3") == (None, "")
            monkeypatch.setattr(os, "replace", refuse)
            rival = device("3", deviceNodes=[{"path": "/dev/vfio/devices/vfio4"}])
            (tmp_path / OURS).write_bytes(as_text(document(kind=PGPU, devices=[rival])))
            await at.rounds(2)
            assert at.reason("3")[0] is Reason.NOT_IN_CDI
            monkeypatch.setattr(os, "replace", replace)
            await at.rounds(3)
            assert at.reason("3") == (None, "")
            assert read_folder(tmp_path) == {f"{PGPU}=3": ("/dev/vfio/devices/vfio3",)}

    asyncio.run(body())


# What is in the way of a write


def put_a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


def put_a_full_folder(path: Path) -> None:
    path.mkdir()
    (path / "something").touch()


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "a rest of an earlier write": lambda path: path.write_bytes(b"# Wri"),
    "a pipe": os.mkfifo,
    "a socket": put_a_socket,
    "a folder": Path.mkdir,
    "a link to a file": lambda path: path.symlink_to("somebody-elses"),
    "another name of a file": lambda path: path.hardlink_to(path.parent / "somebody-elses"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a folder with something in it": put_a_full_folder,
}


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_whatever_has_the_name_under_which_a_spec_is_written_first_neither_stops_the_writer_nor_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody-elses").write_bytes(b"whatever")
    temporary = tmp_path / f".{OURS}.sandbox-plugin.tmp"
    IN_THE_WAY[what](temporary)

    async def body() -> None:
        async with bench(tmp_path) as at:
            for number in (3, 4):
                await at.show(with_gpus(number))
                assert at.reason(str(number)) == (None, "")
                assert read_folder(tmp_path).keys() == {f"{PGPU}={number}"}

    asyncio.run(body())
    left = {temporary.name} if what == "a folder with something in it" else set()
    assert names_in(tmp_path) == {OURS, "somebody-elses", *left}
    assert (tmp_path / "somebody-elses").read_bytes() == b"whatever"


def test_where_no_name_is_free_the_reason_is_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(files, "_create", refuse)
    for _ in range(2):
        with pytest.raises(FileExistsError) as raised:
            files.replace(tmp_path / OURS, b"")
        assert raised.value.filename == str(tmp_path / OURS)


@pytest.mark.parametrize("umask", [0, 0o002, 0o077], ids=oct)
def test_a_folder_that_is_missing_and_those_above_it_are_made_for_all_to_read_and_for_us_to_write_whatever_the_umask(
    tmp_path: Path, umask: int
) -> None:
    private, above = tmp_path / "private", tmp_path / "private/above"
    private.mkdir(mode=0o700)

    async def body() -> None:
        async with bench(above / "cdi") as at:
            await at.show(with_gpus(3))

    before = os.umask(umask)
    try:
        asyncio.run(body())
    finally:
        os.umask(before)
    assert names_in(above / "cdi") == {OURS}
    modes = [stat.S_IMODE(folder.stat().st_mode) for folder in (private, above, above / "cdi")]
    assert modes == [0o700, 0o755, 0o755]


# The real process


@pytest.mark.parametrize(
    ("preset", "nodes"),
    [
        ("hgx-h100", {PGPU: GPU_NODES, NVSWITCH: SWITCH_NODES}),
        ("workstation", {PGPU: {"11": "/dev/vfio/11", "13": "/dev/vfio/13"}}),
    ],
    ids=["cdevs", "groups"],
)
def test_what_the_daemon_writes_is_version_0_5_0_with_each_device_and_only_its_own_node_which_exists(
    fake_node: MakeNode,
    kubelet: GrpcKubelet,
    daemon: StartDaemon,
    places: Places,
    preset: str,
    nodes: dict[str, dict[str, str]],
) -> None:
    node = fake_node(preset)
    daemon(node)
    kubelet.wait_for(
        lambda: {r: kubelet.healthy(r) for r in kubelet.resources()} == {r: {*n} for r, n in nodes.items()}
    )
    assert read_folder(places.cdi, nodes_of(node.root)) == {
        f"{resource}={device_id}": (path,) for resource, known in nodes.items() for device_id, path in known.items()
    }
    for file in places.cdi.iterdir():
        spec = read_spec(file.read_bytes())
        assert (spec.version, spec.plain) == ("0.5.0", True)
        assert file.name == f"{spec.kind.replace('/', '-')}.yaml"


def holds(folder: Path, number: int) -> bool:
    """Whether so many devices stand in its specs."""
    return len(read_folder(folder)) == number


def test_who_reads_the_daemons_folder_while_gpus_come_and_go_never_sees_a_fault(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    node = fake_node("hgx-h100")
    daemon(node)
    kubelet.wait_for(lambda: len(kubelet.healthy(PGPU)) == 8 and len(kubelet.healthy(NVSWITCH)) == 4)
    addresses = ("0000:1b:00.0", "0000:43:00.0", "0000:07:00.0")
    with reading(lambda: read_folder(places.cdi)) as faults:
        for _ in range(3):
            for address in addresses:
                there = len(read_folder(places.cdi))
                node.unbind(address)
                wait_until(partial(holds, places.cdi, there - 1), "a spec without it")
            for address in addresses:
                node.bind(address)
            wait_until(partial(holds, places.cdi, 12), "specs with all")
    assert not faults
