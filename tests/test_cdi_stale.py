"""CDI specs that no resource needs any more: which of them are ours to remove, and how long they stay for pods."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path

import pytest
import structlog
from cdi_bench import OURS, Told, bench, cdevs, may_be_ours, names_in, offered, refusing, spec_of, with_gpus
from cdi_reader import read_folder
from conftest import MakeNode, StartDaemon
from daemon import Places
from facts import gpu, host
from hypothesis import given
from hypothesis import strategies as st
from kubelet import GrpcKubelet
from loop import in_loop
from names import NVSWITCH, PGPU
from pods import PodResources
from specs import as_text, device, reference
from trials import QUICK, tampered, wait_until

from sandbox_plugin.cdi import stale
from sandbox_plugin.cdi.owner import ownership
from sandbox_plugin.cdi.render import MARK
from sandbox_plugin.cdi.stale import StaleSpec, free_since, why_kept
from sandbox_plugin.host import files
from sandbox_plugin.inventory.ledger import Holdings
from sandbox_plugin.inventory.state import Inventory
from sandbox_plugin.inventory.tracking import RETIRE
from sandbox_plugin.model import Device

A, B = "0000:01:00.0", "0000:02:00.0"
OLD, LEFT = "nvidia.com/old", "nvidia.com-old.yaml"
"""What the resource was called before the alias was changed, and its spec."""
SWITCHES = "nvidia.com-nvswitch.yaml"


def left_by_the_reference(kind: str, node: str) -> bytes:
    """Beside a group's node it names that of the VFIO container."""
    both = device("9", deviceNodes=[{"path": "/dev/vfio/vfio"}, {"path": node}])
    return b"---\n" + as_text(reference(kind) | {"devices": [both]})


def put(folder: Path, specs: dict[str, bytes]) -> None:
    for name, content in specs.items():
        (folder / name).write_bytes(content)


# Which are ours


STALE: dict[str, bytes] = {
    LEFT: MARK.encode() + as_text(reference(OLD)),
    SWITCHES: b"---\n" + as_text(reference(NVSWITCH)),
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
    put(tmp_path, STALE | FOREIGN)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in FOREIGN}
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to("nowhere")
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
    assert names_in(tmp_path) == {OURS, *FOREIGN, "pipe.yaml", "folder.yaml", "link.yaml"}
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in FOREIGN} == before


USELESS: dict[str, tuple[str, bytes]] = {
    "a spec that Kata refuses": (LEFT, spec_of(OLD, 3).replace(b"0.5.0", b"0.9.0")),
    "half a spec": (LEFT, spec_of(OLD, 3)[:-30]),
    "a spec under another name": ("nvidia.com-pgpu.backup.yaml", spec_of(PGPU, 3)),
    "a part of the mark": (LEFT, spec_of(OLD, 3)[:10]),
}
"""What no pod can use, and what would fail every pod of the node."""


@pytest.mark.parametrize("name", USELESS)
@in_loop
async def test_what_we_wrote_and_kata_refuses_goes_at_once_whoever_holds_what(tmp_path: Path, name: str) -> None:
    file, content = USELESS[name]
    put(tmp_path, {file: content})
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        assert await at.answer(100, a=(OLD, "3"), b=(PGPU, "3")) == {OURS}
        assert at.registry.former == {}


@given(st.integers(1, len(spec_of(PGPU, 3))))
def test_any_first_part_of_our_own_spec_is_ours(size: int) -> None:
    content = spec_of(PGPU, 3)[:size]
    assert ownership(content, PGPU).why == "this plugin wrote it"
    assert stale.read_stale("nvidia.com-any.yaml", content, lambda kind: False) is not None


@in_loop
async def test_a_stale_spec_that_cannot_be_removed_is_said_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        put(tmp_path, {LEFT: spec_of(OLD, 3)[:-30]})
        with monkeypatch.context() as patched, structlog.testing.capture_logs() as logs:
            patched.setattr(os, "unlink", refusing(errno.EROFS))
            await at.rounds(4)
        (said,) = logs
        assert said["reason"] == "this stale CDI spec cannot be removed: Read-only file system"
        await at.rounds(3)
        assert names_in(tmp_path) == {OURS}


def test_what_takes_the_place_of_a_stale_spec_before_that_is_removed_is_not_removed(tmp_path: Path) -> None:
    file = tmp_path / LEFT
    file.write_bytes(spec_of(OLD, 3))
    stamp = files.read(file, None, bytes).stamp
    file.write_bytes(b"somebody else's")
    assert not files.remove(file, stamp)
    assert file.exists()
    assert not files.remove(tmp_path / "gone.yaml", stamp)


# How long they stay


@in_loop
async def test_after_a_change_of_alias_the_old_spec_stays_while_a_pod_holds_a_device_of_it_and_a_minute_longer(
    tmp_path: Path,
) -> None:
    put(tmp_path, {LEFT: spec_of(OLD, 3, 4)})
    before = (tmp_path / LEFT).stat()
    with structlog.testing.capture_logs() as logs:
        async with bench(tmp_path) as at:
            at.registry.learn(holdings=Holdings(asked_at=100, pods={(OLD, "4"): "default/vm"}))
            await at.show(with_gpus(3, 4))
            assert read_folder(tmp_path) == cdevs(3, 4) | cdevs(3, 4, kind=OLD)
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


@pytest.mark.parametrize(
    "answers",
    [
        [(100, True, False), (130, True, True), (140, True, False)],
        [(138, False, False), (139, False, False), (140, True, False)],
    ],
    ids=["a pod that shows again", "answers that may lack pods"],
)
def test_the_minute_of_a_stale_spec_begins_with_the_first_complete_answer_without_such_pods(
    answers: list[tuple[float, bool, bool]],
) -> None:
    """Of each answer: when it was asked for, whether it is complete, and whether a pod holds a device in it."""
    since: dict[str, float] = {}
    for asked_at, complete, is_held in [*answers, (150.0, True, False)]:
        pods = {(OLD, "3"): "default/vm"} if is_held else {}
        since = free_since(since, {OLD}, Holdings(asked_at=asked_at, pods=pods, complete=complete))
    assert since == {OLD: 140}


@in_loop
async def test_without_pod_resources_the_spec_of_an_old_alias_stays_as_it_is_while_one_of_its_nodes_exists(
    tmp_path: Path,
) -> None:
    put(tmp_path, {LEFT: spec_of(OLD, 3, 4)})
    with structlog.testing.capture_logs() as logs:
        async with bench(tmp_path) as at:
            await at.show(with_gpus(3, 4))
            await at.show(with_gpus(4, 5))
            assert (tmp_path / LEFT).read_bytes() == spec_of(OLD, 3, 4)
            await at.show(host(gpu(A, vfio=5, group=55), unreadable={B: "no answer"}))
            assert names_in(tmp_path) == {OURS, LEFT}, "it may be the one that does not answer"
            await at.show(with_gpus(5))
            assert names_in(tmp_path) == {OURS}
    assert [log["reason"].partition(",")[0] for log in logs if log["event"] == "stale cdi spec kept"] == [
        "/dev/vfio/devices/vfio3 exists",
        "/dev/vfio/devices/vfio4 exists",
        "it cannot be seen now which VFIO nodes there are",
    ]


NODE = "/dev/vfio/devices/vfio3"
HELD = Holdings(asked_at=100, pods={(OLD, "3"): "default/vm"})
YOUNG = Holdings(asked_at=100, complete=False)
LOST, KNOWN_BY_ITS_POD = offered(OLD, 3, node_exists=False), offered(OLD, 3, placements=())
BY_A_POD = "pod default/vm holds a device of it"
UNTOLD = "PodResources has not said yet which pods hold devices of it"
KEPT: dict[str, tuple[Device | None, set[str], Holdings | None, str | None]] = {
    "nobody has said who holds what": (None, {NODE}, None, UNTOLD),
    "nor is there a node": (None, set(), None, UNTOLD),
    "a pod holds a device whose node is gone": (None, set(), HELD, BY_A_POD),
    "a young kubelet": (None, set(), YOUNG, "the kubelet has just started, and may not know of all its pods yet"),
    "a lost device whose node stays with its audio function": (LOST, {NODE}, HELD, None),
    "a device that only its pod makes known": (KNOWN_BY_ITS_POD, {NODE}, HELD, BY_A_POD),
    "such a device whose node is gone": (KNOWN_BY_ITS_POD, set(), HELD, None),
}
"""What the resource serves, which nodes there are, what PodResources has said, and why the spec is kept."""


@pytest.mark.parametrize("name", KEPT)
def test_with_pod_resources_a_stale_spec_stays_for_pods_unless_its_served_resource_can_have_no_spec(name: str) -> None:
    served, nodes, holdings, why = KEPT[name]
    spec = StaleSpec(kind=OLD, nodes={"3": NODE})
    inventory = Inventory(version=1, resources={OLD: (served,)} if served else {}, nodes=frozenset(nodes))
    assert why_kept(spec, inventory, holdings, {}, has_pod_resources=True) == why


@in_loop
async def test_a_served_resource_that_loses_its_last_device_has_no_spec_at_once_whoever_holds_that(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        assert await at.answer(100, vm=(PGPU, "3")) == {OURS}
        await at.show(with_gpus())
        assert names_in(tmp_path) == set()
        await at.show(with_gpus(3))
        assert read_folder(tmp_path) == cdevs(3)


# What they tell of former devices


@in_loop
async def test_the_registry_learns_what_stale_specs_say_and_pod_resources_is_asked_while_there_are_any(
    tmp_path: Path,
) -> None:
    put(tmp_path, {LEFT: spec_of(OLD, 3, 4), "nvidia.com-gpu.yaml": as_text(reference("nvidia.com/gpu"))})
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
    put(tmp_path, {LEFT: spec_of(OLD, 3)})
    async with bench(tmp_path) as at:
        await at.show(with_gpus(3))
        with structlog.testing.capture_logs() as logs, monkeypatch.context() as patched:
            patched.setattr(os, name, refusing(errno.EMFILE))
            await at.rounds(3)
        reasons = [log["reason"] for log in logs]
        assert reasons.count("stale CDI specs cannot be looked for: Too many open files") == 1
        assert at.reason("3") == (None, ""), "what was written is not forgotten either"
        assert at.registry.former == {(OLD, "3"): NODE}


def test_before_anything_is_offered_the_nodes_of_former_names_can_be_read_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the reference left, a device's own node counts, and not the one beside it."""
    specs = {
        LEFT: spec_of(OLD, 3),
        OURS: left_by_the_reference(PGPU, "/dev/vfio/47"),
        "nvidia.com-gpu.yaml": left_by_the_reference("nvidia.com/gpu", "/dev/vfio/48"),
        "nvidia.com-half.yaml": spec_of("nvidia.com/half", 6)[:-9],
    }
    put(tmp_path, specs)
    asyncio.run(stale.learn_former(tmp_path, registry := Told(), may_be_ours))
    assert registry.former == {(OLD, "3"): NODE, (PGPU, "9"): "/dev/vfio/47"}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == specs
    assert asyncio.run(stale.read_former(tmp_path / "missing", may_be_ours)) == {}
    monkeypatch.setattr(os, "listdir", refusing(errno.EMFILE))
    assert asyncio.run(stale.read_former(tmp_path, may_be_ours)) == {}


# The real process


WORKSTATION = {"11": "/dev/vfio/11", "13": "/dev/vfio/13"}


def on_workstation(*resources: str) -> dict[str, tuple[str, ...]]:
    """What the specs of these resources say there."""
    return {f"{resource}={number}": (node,) for resource in resources for number, node in WORKSTATION.items()}


def test_pods_of_an_old_alias_find_their_devices_although_all_nodes_are_gone_for_a_while(
    fake_node: MakeNode, kubelet: GrpcKubelet, daemon: StartDaemon, places: Places
) -> None:
    """As when the mode of confidential computing is changed: that binds every GPU again."""
    node = fake_node("workstation")
    before = daemon(node, "--gpu-alias=old")
    kubelet.wait_for(lambda: kubelet.healthy(OLD) == WORKSTATION.keys())
    before.terminate()
    assert read_folder(places.cdi) == on_workstation(OLD)
    with PodResources(places.top / "pod-resources/kubelet.sock") as pods:
        pods.start(age=3600)
        pods.hold("vm", OLD, "11")
        plugin = daemon(node, QUICK)
        plugin.wait_for("stale cdi spec kept", path=str(places.cdi / LEFT), reason="pod default/vm holds a device")
        wait_until(lambda: read_folder(places.cdi) == on_workstation(OLD, PGPU), "the devices have both names")
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
