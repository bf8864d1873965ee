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
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml
from cdi_reader import Refused, Spec, nodes_of, read_folder, read_spec
from conftest import StartDaemon
from daemon import Places
from facts import gpu, host
from hypothesis import given
from hypothesis import strategies as st
from kubelet import GrpcKubelet
from test_daemon import GPU_NODES, SWITCH_NODES
from trials import NVSWITCH, PGPU, wait_until

from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.inventory.naming import ModelNames, cdi_file_name, check_resource_name
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.model import Device, HostFacts, Placement, Reason
from sandbox_plugin.outputs.cdi import CdiWriter, render_specs
from sandbox_plugin.outputs.cdi_owner import MARK, ownership
from sandbox_plugin.registry import Registry
from sandbox_plugin.settings import Settings

A, B, C = (f"0000:0{bus}:00.0" for bus in (1, 2, 3))
LIMIT = 20.0
"""Seconds for one test's work in the loop."""
OURS = "nvidia.com-pgpu.yaml"


# The reader itself


def document(**changes: Any) -> dict[str, Any]:
    """A good spec as values, with changes at its top; None takes a field away."""
    made = {
        "cdiVersion": "0.6.0",
        "kind": "vendor.com/class",
        "devices": [{"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/null"}]}}],
    } | changes
    return {key: value for key, value in made.items() if value is not None}


def device(name: Any = "d0", **edits: Any) -> dict[str, Any]:
    return {"name": name, "containerEdits": edits or {"deviceNodes": [{"path": "/dev/null"}]}}


def with_node(**fields: Any) -> dict[str, Any]:
    return document(devices=[device(deviceNodes=[{"path": "/dev/null"} | fields])])


def with_hook(**fields: Any) -> dict[str, Any]:
    return document(devices=[device(hooks=[{"hookName": "prestart", "path": "/bin/true"} | fields])])


def with_mount(**fields: Any) -> dict[str, Any]:
    return document(devices=[device(mounts=[{"hostPath": "/a", "containerPath": "/b"} | fields])])


def as_text(spec: object) -> bytes:
    return yaml.safe_dump(spec).encode()


GOOD: dict[str, bytes] = {
    "the plainest": as_text(document()),
    "as JSON": json.dumps(document()).encode(),
    "as JSON with tabs": json.dumps(document(), indent="\t").encode(),
    "the version with a v": as_text(document(cdiVersion="v0.5.0")),
    "an old version": as_text(document(cdiVersion="0.3.0", devices=[device()])),
    "names that are text in YAML 1.2, and in 1.1 a number, a date and a truth": b"""
cdiVersion: 0.6.0
kind: nvidia.com/gpu
annotations: {made: 2026-08-01}
devices:
- {name: 1:0, containerEdits: {env: [A=b]}}
- {name: on, containerEdits: {env: [A=b]}}
""",
    "a class with a dot": as_text(document(kind="a.b/c.d")),
    "annotations": as_text(document(annotations={"vendor.com/why": "because"})),
    "edits for all devices": as_text(document(containerEdits={"env": ["A=b", "C="]})),
    "empty edits for all devices, as Go writes them": as_text(document(containerEdits={})),
    "every field of a node": as_text(
        with_node(hostPath="/d", type="c", major=1, minor=-1, fileMode=432, permissions="rwm", uid=0, gid=0)
    ),
    "every field of a hook": as_text(with_hook(args=["true"], env=["A=b"], timeout=1)),
    "every field of a mount": as_text(with_mount(type="bind", options=["ro"])),
    "fields that are null": as_text(with_node(hostPath=None, type=None, major=None)),
    "a device whose name is a number": as_text(document(devices=[device(0)])),
    "a device whose name is a number in JSON": json.dumps(document(devices=[device(0)])).encode(),
    "names that are a truth and a fraction": as_text(document(devices=[device(True), device(1.5)])),
    "arguments that are a number, a truth and null": as_text(with_hook(args=[1, True, None])),
    "an option that is a number": as_text(with_mount(options=[755])),
    "an annotation that is a number": as_text(document(annotations={"a": 1})),
    "annotations without a value": b"annotations:\n" + as_text(document()),
    "a path that is a number": as_text(with_mount(hostPath=1)),
    "numbers in other bases": b"""
cdiVersion: 0.6.0
kind: vendor.com/class
devices: [{name: x, containerEdits: {deviceNodes: [{path: /x, major: 0x1F, minor: -0b11, fileMode: 0o666}]}}]
""",
    "the largest numbers": as_text(with_node(major=(1 << 63) - 1, minor=-(1 << 63), uid=(1 << 32) - 1)),
    "a YAML 1.1 header": b"%YAML 1.1\n---\n" + as_text(document()),
    "a byte order mark before JSON": b"\xef\xbb\xbf" + json.dumps(document()).encode(),
    "anchors and aliases": b"""
cdiVersion: 0.6.0
kind: vendor.com/class
devices:
- {name: x, containerEdits: &edits {env: [A=b]}}
- {name: z, containerEdits: *edits}
""",
    "the end of a document": as_text(document()) + b"...\n",
}
BAD: dict[str, bytes] = {
    "nothing": b"",
    "a list": b"[]",
    "a YAML 1.2 header": b"%YAML 1.2\n---\n" + as_text(document()),
    "a byte order mark before YAML": b"\xef\xbb\xbf" + as_text(document()),
    "UTF-16": as_text(document()).decode().encode("utf-16"),
    "Latin-1": as_text(document()) + b"# caf\xe9\n",
    "an empty second document": as_text(document()) + b"---\n",
    "a merge key": b"""
cdiVersion: 0.6.0
kind: vendor.com/class
devices:
- &x {name: x, containerEdits: {env: [A=b]}}
- {<<: *x, name: z}
""",
    "an alias of nothing": as_text(document()).replace(b"name: '0'", b"name: *a"),
    "an anchor that contains itself": b"cdiVersion: 0.6.0\nkind: vendor.com/class\ndevices: &d [*d]\n",
    "a key of another case": as_text(document() | {"Kind": "vendor.com/class"}),
    "no YAML": b"kind: [unclosed\n",
    "no text": b"\xff\xfe\x00",
    "two documents": as_text(document()) + b"---\n" + as_text(document()),
    "half of it": as_text(document())[:-20],
    "no version": as_text(document(cdiVersion=None)),
    "a version that is a number": as_text(document(cdiVersion=0.5)),
    "a version too new": as_text(document(cdiVersion="0.7.0")),
    "a version much too new": as_text(document(cdiVersion="1.0.0")),
    "no kind": as_text(document(kind=None)),
    "a kind without a vendor": as_text(document(kind="class")),
    "a class of one letter": as_text(document(kind="vendor.com/c")),
    "a vendor of one letter": as_text(document(kind="v/class")),
    "a class that begins with a digit": as_text(document(kind="vendor.com/0class")),
    "a class that ends with a dash": as_text(document(kind="vendor.com/class-")),
    "a vendor that begins with a digit": as_text(document(kind="3com.com/nic")),
    "two slashes": as_text(document(kind="vendor.com/a/b")),
    "no devices": as_text(document(devices=None)),
    "empty devices": as_text(document(devices=[])),
    "devices by name": as_text(document(devices={"0": {}})),
    "a device that is text": as_text(document(devices=["0"])),
    "a device twice": as_text(document(devices=[device("0"), device("0")])),
    "a device without a name": as_text(document(devices=[{"containerEdits": {"env": ["A=b"]}}])),
    "a device whose name is null": as_text(document(devices=[device(None)])),
    "a device whose name is a list": as_text(document(devices=[device(["a"])])),
    "a device whose name Go writes with a plus": as_text(document()).replace(b"name: '0'", b"name: 1e9"),
    "two names that are the same number for Go": b"""
cdiVersion: 0.6.0
kind: vendor.com/class
devices:
- {name: 8, containerEdits: {env: [A=b]}}
- {name: 010, containerEdits: {env: [A=b]}}
""",
    "a device whose name has a slash": as_text(document(devices=[device("a/b")])),
    "a device whose name ends with a colon": as_text(document(devices=[device("a:")])),
    "a device without edits": as_text(document(devices=[{"name": "0"}])),
    "a device with empty edits": as_text(document(devices=[{"name": "0", "containerEdits": {}}])),
    "a device whose edits are empty lists": as_text(document(devices=[device(deviceNodes=[])])),
    "a device with null for edits": as_text(document(devices=[{"name": "0", "containerEdits": None}])),
    "an unknown field of the spec": as_text(document(vendor="x")),
    "an unknown field of a device": as_text(document(devices=[device() | {"id": 1}])),
    "an unknown field of edits": as_text(document(devices=[device(additionalGids=[1])])),
    "an unknown field of the spec's edits": as_text(document(containerEdits={"intelRdt": {}})),
    "an unknown field of a node": as_text(with_node(mode=1)),
    "an unknown field of a hook": as_text(with_hook(cwd="/")),
    "an unknown field of a mount": as_text(with_mount(source="/a")),
    "a key twice": as_text(document()) + b"kind: vendor.com/class\n",
    "a key twice in a device": b"""
cdiVersion: 0.5.0
kind: a.b/c
devices: [{name: x, name: x, containerEdits: {env: [A=b]}}]
""",
    "a key twice in JSON": json.dumps(document()).replace('"kind"', '"kind": "a.b/c", "kind"').encode(),
    "a node without a path": as_text(document(devices=[device(deviceNodes=[{"hostPath": "/d"}])])),
    "a node with an empty path": as_text(with_node(path="")),
    "a node of an unknown type": as_text(with_node(type="x")),
    "a node with wrong permissions": as_text(with_node(permissions="rwx")),
    "a node whose major is text": as_text(with_node(major="195")),
    "a node whose mode is text": as_text(with_node(fileMode="0666")),
    "a node whose mode has a leading zero": as_text(with_node(fileMode=438)).replace(b"438", b"0666"),
    "a node whose major is a fraction": as_text(with_node(major=1.0)),
    "a node whose major has more than 64 bits": as_text(with_node(major=1 << 63)),
    "a node whose minor has more than 64 bits": as_text(with_node(minor=-(1 << 63) - 1)),
    "a node whose major has thousands of digits": as_text(with_node(major=195)).replace(b"195", b"9" * 5000),
    "a node whose owner has more than 32 bits": as_text(with_node(uid=1 << 32)),
    "a node that is null": as_text(document(devices=[device(deviceNodes=[None])])),
    "a hook whose timeout has more than 64 bits": as_text(with_hook(timeout=1 << 63)),
    "a node with a negative owner": as_text(with_node(uid=-1)),
    "nodes that are no list": as_text(document(devices=[device(deviceNodes={"path": "/d"})])),
    "a variable without =": as_text(document(containerEdits={"env": ["A"]})),
    "a variable without a name": as_text(document(containerEdits={"env": ["=b"]})),
    "variables by name": as_text(document(containerEdits={"env": {"A": "b"}})),
    "a hook of an unknown name": as_text(with_hook(hookName="before")),
    "a hook without a path": as_text(document(devices=[device(hooks=[{"hookName": "prestart"}])])),
    "a hook with a wrong variable": as_text(with_hook(env=["A"])),
    "a mount from nowhere": as_text(with_mount(hostPath="")),
    "a mount to nowhere": as_text(document(devices=[device(mounts=[{"hostPath": "/a"}])])),
    "options that are text": as_text(with_mount(options="ro")),
    "annotations that are a list": as_text(document(annotations=["a"])),
    "annotations that are null": as_text(document() | {"annotations": None}),
    "an annotation that is a list": as_text(document(annotations={"a": []})),
    "an annotation whose key is null": as_text(document(annotations={None: "a"})),
    "an annotation whose prefix has two dots": as_text(document(annotations={"a..b/c": "d"})),
    "an annotation with a wrong key": as_text(document(annotations={"a b": "c"})),
    "a digit first before 0.5.0": as_text(document(cdiVersion="0.4.0")),
    "a hostPath before 0.5.0": as_text(with_node(hostPath="/d") | {"cdiVersion": "0.4.0"}),
    "a mount's type before 0.4.0": as_text(with_mount(type="bind") | {"cdiVersion": "0.3.0"}),
    "an annotation before 0.6.0": as_text(document(cdiVersion="0.5.0", annotations={"a": "b"})),
    "a device's annotation before 0.6.0": as_text(
        document(cdiVersion="0.5.0", devices=[device() | {"annotations": {"a": "b"}}])
    ),
    "a class with a dot before 0.6.0": as_text(document(cdiVersion="0.5.0", kind="a.b/c.d")),
}
"""Specs that Kata refuses, each for one reason: test_neighbours.py asks the daemon about them, too."""
BOMB = b"\n".join(
    [
        b"a: &a [x,x,x,x,x,x,x,x,x]",
        *(b"%c: &%c [%b]" % (b, b, b",".join([b"*%c" % (b - 1)] * 9)) for b in b"bcdefgh"),
    ]
)
"""Eight lines that stand for 387 million scalars."""


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


@contextmanager
def reading(look: Callable[[], object]) -> Iterator[list[str]]:
    """Reads the folder again and again on a thread; what it stumbled over is in the list afterwards."""
    faults: list[str] = []
    stop = threading.Event()
    looks = 0

    def work() -> None:
        nonlocal looks
        while not stop.is_set():
            looks += 1
            try:
                look()
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield faults
    finally:
        stop.set()
        thread.join(LIMIT)
    assert looks > 10


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


def reference(kind: str) -> dict[str, Any]:
    return document(cdiVersion="0.5.0", kind=kind, containerEdits={})


REPLACED: dict[str, tuple[bytes, str]] = {
    "the reference's": (b"---\n" + as_text(reference(PGPU)), "it has the name and the kind of a resource"),
    "one with quotes": (f"\"kind\" : '{PGPU}'\n".encode(), "it has the name and the kind of a resource"),
    "one with indented keys": (
        f"  kind: {PGPU}\n  devices: []\n".encode(),
        "it has the name and the kind of a resource",
    ),
    "flow style": (f"{{kind: {PGPU}, devices: []}}".encode(), "it has the name and the kind of a resource"),
    "JSON": (json.dumps(reference(PGPU), indent=2).encode(), "it has the name and the kind of a resource"),
    "JSON in one line": (json.dumps(reference(PGPU), separators=(",", ":")).encode(), "it has the name and the kind"),
    "our kind, broken further down": (f"kind: {PGPU}\ndevices: [".encode(), "it has the name and the kind"),
    "an empty file": (b"", "it is empty"),
    "comments alone": (b"# nothing yet\n", "it is empty"),
    "an empty mapping": (b"{}", "it is empty"),
    "half of one": (b"---\ncdiVersion: 0.5.0\ncontainerEd", "it is not valid YAML or JSON"),
    "half of one that is valid": (
        b"---\ncdiVersion: 0.5.0\ndevices:\n- containerEd",
        "it is unfinished: it has no kind",
    ),
    "half of one in flow style": (b"{cdiVersion: 0.5.0, devi", "it is not valid YAML or JSON"),
    "half of one in JSON": (b'{"cdiVersion": "0.5.0", "devi', "it is not valid YAML or JSON"),
    "half of our kind": (b"cdiVersion: 0.5.0\nkind: nvidia.com/pg", "it is unfinished: it has no kind"),
    "no text": (b"\0\xff", "it is not valid YAML or JSON"),
}
"""What is in our file, and why the log says that it was replaced."""
KEPT: dict[str, tuple[bytes, str]] = {
    "another kind": (as_text(reference("other.com/pgpu")), "kind other.com/pgpu"),
    "another class": (as_text(reference("nvidia.com/gpu")), "kind nvidia.com/gpu"),
    "another kind with indented keys": (b"  cdiVersion: 0.5.0\n  kind: other.com/pgpu\n", "kind other.com/pgpu"),
    "another kind in flow style": (
        b'{cdiVersion: "0.5.0", kind: other.com/pgpu, devices: [{name: x, containerEdits: {env: [A=b]}}]}',
        "kind other.com/pgpu",
    ),
    "another kind in JSON": (json.dumps(reference("other.com/pgpu")).encode(), "kind other.com/pgpu"),
    "another kind in JSON in one line": (
        json.dumps(reference("other.com/pgpu"), separators=(",", ":")).encode(),
        "kind other.com/pgpu",
    ),
    "another kind in JSON with tabs": (
        json.dumps(reference("other.com/pgpu"), indent="\t").encode(),
        "kind other.com/pgpu",
    ),
    "another kind in UTF-16": (as_text(reference("other.com/pgpu")).decode().encode("utf-16"), "kind other.com/pgpu"),
    "another kind in a second document": (
        as_text(reference(PGPU)) + b"---\nkind: other.com/pgpu\n",
        "kind other.com/pgpu",
    ),
    "another kind, broken further down": (b"kind: other.com/pgpu\ndevices: [", "kind other.com/pgpu"),
    "half of another kind in flow style": (b'{cdiVersion: "0.5.0", kind: other.com/pgpu, dev', "kind other.com/pgpu"),
    "our kind further down": (
        as_text(reference("other.com/pgpu") | {"annotations": {"kind": PGPU}}),
        "kind other.com/pgpu",
    ),
    "our kind in JSON further down": (
        json.dumps({"annotations": {"kind": PGPU}, "kind": "other.com/pgpu"}).encode(),
        "kind other.com/pgpu",
    ),
    "a kind behind an alias": (b"annotations: {a: &k other.com/pgpu}\nkind: *k\n", "its kind is not a string"),
    "no kind, and something else": (b"hosts: [a, b]\n", "no kind, and the field 'hosts', which CDI does not have"),
    "something else, broken": (b"hosts: [a,\n", "no kind, and the field 'hosts', which CDI does not have"),
    "a text": (b"do not touch this\n", "it is not a CDI spec"),
    "a list": (b"- a\n- b\n", "it is not a CDI spec"),
    "something very large": (b"#" * (1 << 19), "more than 262144 bytes, and not written by this plugin"),
    "aliases that want to be huge": (b"kind: other.com/pgpu\n" + BOMB, "kind other.com/pgpu"),
}
"""What is in our file, and what the words say about it."""


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
    fake_node: Callable[[str], FakeNode],
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
    fake_node: Callable[[str], FakeNode], kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
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
