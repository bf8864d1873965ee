"""How labels come to the disk: the writer in this process, on a real folder; and the daemon as a process."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from cdi_bench import refusing, with_gpus
from conftest import Serve, StartDaemon
from daemon import Places, run_command
from facts import host
from hardship import no_descriptors, no_threads
from loop import LIMIT, in_loop, until
from names import FIRST_GPU, T4
from nfd import Features, read_features
from trials import wait_until

from sandbox_plugin.config.load import load_settings
from sandbox_plugin.config.settings import FEATURES_FOLDER, Settings, UsageError
from sandbox_plugin.fake.node import FakeNode
from sandbox_plugin.host import files
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.inventory.naming import ModelNames
from sandbox_plugin.inventory.rules import Rules
from sandbox_plugin.outputs.feature_writer import FeatureWriter
from sandbox_plugin.registry import Registry

START = datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp()
NAMES = ModelNames.load()


@dataclass
class Bench:
    """The writer at work on a folder, the inventory that it follows, and a clock that the test moves."""

    folder: Path
    makes_folder: bool = True
    registry: Registry = field(default_factory=lambda: Registry(Rules(), requires_cdi=False))
    now: float = START

    def __post_init__(self) -> None:
        self.writer = FeatureWriter(
            folder=self.folder,
            registry=self.registry,
            paths=HostPaths(self.folder.parent / "host"),
            names=NAMES,
            gpu_features=False,
            makes_folder=self.makes_folder,
            interval=0.01,
            pause=0.0,
            clock=lambda: self.now,
        )

    def read(self) -> Features | None:
        return read_features(self.folder)

    def count(self) -> str | None:
        features = self.read()
        return None if features is None else features.own["gpu.count"]


@asynccontextmanager
async def bench(folder: Path, **how: Any) -> AsyncIterator[Bench]:
    made = Bench(folder, **how)
    async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as group:
        task = group.create_task(made.writer.run())
        yield made
        task.cancel()


async def rounds(at: Bench, number: int = 3) -> None:
    """Returns when the writer has looked so many times more."""
    looks = 0
    look = at.writer._look

    def counted() -> Any:
        nonlocal looks
        looks += 1
        return look()

    at.writer._look = counted  # type: ignore[method-assign]
    await until(lambda: looks > number)
    at.writer._look = look  # type: ignore[method-assign]


@in_loop
async def test_nothing_is_written_before_the_first_scan_and_an_earlier_runs_labels_stay(tmp_path: Path) -> None:
    (tmp_path / "sandbox-plugin").write_text("what an earlier run wrote\n")
    async with bench(tmp_path) as at:
        await asyncio.sleep(0.05)
        assert (tmp_path / "sandbox-plugin").read_text() == "what an earlier run wrote\n"
        at.registry.observe(with_gpus(1, 2))
        await until(lambda: "wrote" not in (tmp_path / "sandbox-plugin").read_text())
        assert at.count() == "2"


@in_loop
async def test_labels_follow_the_devices_and_go_with_the_last_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "features.d"
    with structlog.testing.capture_logs() as logs:
        async with bench(folder) as at:
            at.registry.observe(with_gpus(1, 2))
            await until(lambda: at.count() == "2")
            at.registry.observe(with_gpus(1))
            await until(lambda: at.count() == "1")
            at.registry.observe(host(kernel_has_cdevs=True))
            await until(lambda: not list(folder.iterdir()))
            await rounds(at)
    path = str(folder / "sandbox-plugin")
    assert [(log["event"], log["path"]) for log in logs] == [
        ("node labels written", path),
        ("node labels written", path),
        ("node labels removed", path),
    ]


@in_loop
async def test_they_stay_when_the_daemon_ends_and_the_next_one_writes_the_same(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        async with bench(tmp_path) as at:
            at.registry.observe(with_gpus(1))
            await until(lambda: at.count() == "1")
        found.append(at.read())
    assert found[0] == found[1]


@in_loop
async def test_what_stands_there_is_written_again_only_before_it_expires(tmp_path: Path) -> None:
    file = tmp_path / "sandbox-plugin"
    with structlog.testing.capture_logs() as logs:
        async with bench(tmp_path) as at:
            at.registry.observe(with_gpus(1))
            await until(lambda: at.count() == "1")
            first, features = file.stat().st_ino, at.read()
            assert features is not None
            assert features.expires.timestamp() == START + 3600
            at.now += 1199
            await rounds(at)
            assert file.stat().st_ino == first
            at.now += 1
            await until(lambda: file.stat().st_ino != first)
            renewed = at.read()
            assert renewed is not None
            assert renewed.labels == features.labels
            assert renewed.expires.timestamp() == at.now + 3600
    assert [log["event"] for log in logs] == ["node labels written"], "to renew them is no news"


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_text("nvidia.com/gpu.count=99\n")])
@in_loop
async def test_what_somebody_removed_or_changed_comes_back(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    async with bench(tmp_path) as at:
        at.registry.observe(with_gpus(1))
        await until(lambda: at.count() == "1")
        before = (tmp_path / "sandbox-plugin").read_bytes()
        spoil(tmp_path / "sandbox-plugin")
        await until(
            lambda: (tmp_path / "sandbox-plugin").exists() and (tmp_path / "sandbox-plugin").read_bytes() == before
        )


@in_loop
async def test_a_full_disk_keeps_what_was_there_is_said_once_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with bench(tmp_path) as at:
            at.registry.observe(with_gpus(1))
            await until(lambda: at.count() == "1")
            with monkeypatch.context() as full:
                full.setattr(files, "replace", refusing(errno.ENOSPC))
                at.registry.observe(with_gpus(1, 2))
                await until(lambda: len(logs) > 1)
                await rounds(at)
                assert at.count() == "1"
            await until(lambda: len(logs) > 2)
            assert at.count() == "2"
    assert [log["event"] for log in logs] == ["node labels written", "no node labels", "node labels written"]
    assert logs[1]["reason"] == f"{tmp_path}/sandbox-plugin: {os.strerror(errno.ENOSPC)}"
    assert logs[1]["log_level"] == "error"


@in_loop
async def test_what_has_its_name_and_is_no_file_is_said_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sandbox-plugin").mkdir()
    with structlog.testing.capture_logs() as logs:
        async with bench(tmp_path) as at:
            at.registry.observe(with_gpus(1))
            await until(lambda: logs)
            await rounds(at)
    (said,) = logs
    assert said["reason"] == f"{tmp_path}/sandbox-plugin: Not a regular file"
    assert (tmp_path / "sandbox-plugin").is_dir()


@in_loop
async def test_a_folder_that_does_not_answer_is_said_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()

    def hang(file: Path, *_: object) -> None:
        answers.wait(LIMIT)
        raise FileNotFoundError(file)

    monkeypatch.setattr(files, "PATIENCE", 0.02)
    monkeypatch.setattr(files, "read", hang)
    with structlog.testing.capture_logs() as logs:
        async with bench(tmp_path) as at:
            at.registry.observe(with_gpus(1))
            await until(lambda: logs)
            assert at.read() is None
            answers.set()
            await until(lambda: at.count() == "1")
    assert logs[0]["event"] == "no node labels"
    assert logs[0]["reason"] == f"{tmp_path} has not answered for 0.02 s"


@pytest.mark.parametrize("hardship", [no_descriptors, no_threads])
@in_loop
async def test_a_process_that_can_open_or_start_nothing_more_takes_no_label_away(
    tmp_path: Path, hardship: Callable[[], Any]
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with bench(tmp_path) as at:
            earlier = tmp_path / "sandbox-plugin"
            earlier.write_text("what an earlier run wrote\n")
            before = earlier.stat()
            with hardship():
                at.registry.observe(with_gpus(1))
                await until(lambda: logs)
                assert earlier.stat() == before
            await until(lambda: len(logs) > 1)
            assert at.count() == "1"
    assert [log["event"] for log in logs] == ["no node labels", "node labels written"]


@in_loop
async def test_where_nobody_named_the_folder_it_must_be_there(tmp_path: Path) -> None:
    """Without a mount of the host's folder nobody would read the file."""
    folder = tmp_path / "features.d"
    with structlog.testing.capture_logs() as logs:
        async with bench(folder, makes_folder=False) as at:
            at.registry.observe(with_gpus(1))
            await until(lambda: logs)
            await rounds(at)
            assert not folder.exists()
            folder.mkdir()
            await until(lambda: len(logs) > 1)
            assert at.count() == "1"
    assert [log["event"] for log in logs] == ["no node labels", "node labels written"]
    assert logs[0]["reason"] == f"{folder}: {os.strerror(errno.ENOENT)}"


# The settings


def test_labels_are_off_until_a_folder_is_named_and_can_be_switched_off_again() -> None:
    assert Settings().features_folder is None
    given = load_settings({}, {"SANDBOX_PLUGIN_NODE_FEATURES": "/features.d"})
    assert given.features_folder == Path("/features.d")
    assert not given.gpu_feature_labels
    off = load_settings({"node_features": "off"}, {"SANDBOX_PLUGIN_NODE_FEATURES": "/features.d"})
    assert off.features_folder is None


@pytest.mark.parametrize(("text", "is_on"), [("1", True), ("t", True), ("True", True), ("0", False), ("", False)])
def test_the_references_variable_is_read_as_the_reference_reads_it(text: str, is_on: bool) -> None:
    settings = load_settings({}, {"ENABLE_GFD": text})
    assert settings.gpu_feature_labels is is_on
    assert settings.features_folder == (FEATURES_FOLDER if is_on else None)
    assert settings.on_fake_host(Path("/fake")).features_folder == (
        Path("/fake/etc/kubernetes/node-feature-discovery/features.d") if is_on else None
    )
    with pytest.raises(UsageError, match=r"^ENABLE_GFD: 'perhaps' is not one of true, false, "):
        load_settings({}, {"ENABLE_GFD": "perhaps"})


# The daemon


def test_the_daemon_labels_its_node_and_leaves_the_labels_behind(
    serve: Serve, places: Places, daemon: StartDaemon
) -> None:
    folder = places.top / "features.d"
    node, plugin, _ = serve("hgx-h100", f"--node-features={folder}", "--gpu-feature-labels")
    plugin.wait_for("labels of GPU Feature Discovery", path=str(folder))
    plugin.wait_for("node labels written")

    def count() -> str | None:
        features = read_features(folder)
        return None if features is None else features.labels["nvidia.com/gpu.count"]

    assert count() == "8"
    node.unbind(FIRST_GPU)
    wait_until(lambda: count() == "7", "seven GPUs in the labels")
    plugin.terminate()
    assert count() == "7"
    again = daemon(node, f"--node-features={folder}")
    again.wait_for("node labels written")
    features = read_features(folder)
    assert features is not None
    assert features.own["gpu.count"] == "7"
    assert not [name for name in features.labels if name.startswith("nvidia.com/")]


def test_who_stands_by_writes_no_label(serve: Serve, places: Places, daemon: StartDaemon) -> None:
    folders = places.top / "first", places.top / "second"
    node, first, _ = serve("workstation", f"--node-features={folders[0]}")
    first.wait_for("node labels written")
    second = daemon(node, f"--node-features={folders[1]}", "--health-interval=0.1")
    second.wait_for("standing by")
    node.unbind(T4)
    second.wait_for("not offered", pci_address=T4)  # it follows the node meanwhile
    assert not folders[1].exists()
    first.terminate()
    second.wait_for("node labels written")
    told = [event["event"] for event in second.events()]
    assert told.index("taking over") < told.index("node labels written")
    assert read_features(folders[1]) is not None


def test_the_references_variable_labels_where_nfd_looks_if_that_is_there(
    serve: Serve, fake_node: Callable[[str], FakeNode]
) -> None:
    node = fake_node("workstation")
    folder = node.root / FEATURES_FOLDER.relative_to("/")
    node, plugin, _ = serve(node, ENABLE_GFD="true")
    said = plugin.wait_for("no node labels")
    assert said["reason"] == f"{folder}: No such file or directory"
    assert "must be the host's" in said["action"]
    folder.mkdir(parents=True)
    plugin.wait_for("node labels written")
    features = read_features(folder)
    assert features is not None
    assert features.labels["nvidia.com/gpu.count"] == "1"


def test_help_names_the_flag_and_its_variable() -> None:
    told = run_command("run", "--help", COLUMNS="1000").stdout
    assert "[SANDBOX_PLUGIN_NODE_FEATURES; default: off]" in told
    assert "[ENABLE_GFD; default: false]" in told
