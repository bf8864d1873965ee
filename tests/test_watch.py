"""The folder watcher, on real folders with real inotify.

That the daemon hears of changes at once is shown by every test of it that waits for less than its timers take.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from daemon import Places
from loop import LIMIT, run

from sandbox_plugin.host import watch
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.watch import Folders, FolderWatcher, OnChange, host_folders


class Looks:
    """Counts how often the watcher said that something changed."""

    def __init__(self) -> None:
        self.number = 0
        self._more = asyncio.Event()

    def add(self) -> None:
        self.number += 1
        self._more.set()

    async def more_than(self, number: int) -> None:
        while self.number <= number:
            self._more.clear()
            await self._more.wait()


@asynccontextmanager
async def watching(*folders: Path) -> AsyncIterator[list[Looks]]:
    """A watcher at work, and who is told of each of the folders."""
    told = [Looks() for _ in folders]
    groups: dict[OnChange, Folders] = {
        looks.add: partial(list, [folder]) for looks, folder in zip(told, folders, strict=True)
    }
    async with running(FolderWatcher(groups=groups, step=0.01)):
        for looks in told:
            await looks.more_than(0)
        yield told


@asynccontextmanager
async def running(watcher: FolderWatcher) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(watcher.run())
        yield
        task.cancel()


class Said:
    """What the watcher logged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.warnings: list[dict[str, Any]] = []
        self._more = asyncio.Event()
        monkeypatch.setattr(watch.log, "warning", self._add, raising=False)

    def _add(self, _: str, **about: Any) -> None:
        self.warnings.append(about)
        self._more.set()

    async def first(self) -> dict[str, Any]:
        await self._more.wait()
        return self.warnings[0]


@pytest.fixture
def _no_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What inotify does not tell is not found either."""
    monkeypatch.setattr(watch, "_CONFIRM", 60.0)


@pytest.mark.usefixtures("_no_timers")
def test_a_folder_that_comes_and_goes_and_comes_again_is_watched_whenever_it_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "cdi"

    async def body() -> None:
        async with watching(folder) as [looks]:
            for _ in range(5):
                before = looks.number
                folder.mkdir()
                await looks.more_than(before)
                for name in ("a", "b"):
                    before = looks.number
                    (folder / name).touch()
                    await looks.more_than(before)
                before = looks.number
                shutil.rmtree(folder)
                await looks.more_than(before)

    run(body())


@pytest.mark.usefixtures("_no_timers")
def test_a_folder_that_was_replaced_at_once_is_watched_under_its_old_name(tmp_path: Path) -> None:
    folder = tmp_path / "cdi"
    folder.mkdir()

    async def body() -> None:
        async with watching(folder) as [looks]:
            before = looks.number
            folder.rename(tmp_path / "old")
            folder.mkdir()
            await looks.more_than(before)
            for name in ("a", "b"):
                before = looks.number
                (folder / name).touch()
                await looks.more_than(before)

    run(body())


def test_a_change_is_told_to_those_alone_who_wait_for_that_folder(tmp_path: Path) -> None:
    folders = [tmp_path / name / "folder" for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir(parents=True)

    async def body() -> None:
        async with watching(*folders) as told:
            for changed, folder in zip(told, folders, strict=True):
                for entry in (folder / "entry", folder.parent / "entry"):
                    before = [looks.number for looks in told]
                    entry.touch()
                    await changed.more_than(before[told.index(changed)])
                    others = [(now, was) for now, was in zip(told, before, strict=True) if now is not changed]
                    assert [now.number for now, _ in others] == [was for _, was in others]

    run(body())


def test_a_watch_that_is_cancelled_while_it_cannot_be_had_ends(tmp_path: Path) -> None:
    """Whenever that is: in each of its turns."""

    async def body(turns: int) -> None:
        watcher = FolderWatcher(groups={lambda: None: lambda: [tmp_path]}, step=0.01, retry=2 * LIMIT)
        task = asyncio.create_task(watcher.run())
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert task.cancelled()

    for turns in range(30):
        run(body(turns))


@pytest.mark.usefixtures("_no_timers")
def test_a_folder_under_two_names_tells_everybody_who_waits_under_one_of_them(tmp_path: Path) -> None:
    """As /run and /var/run. The kernel has one watch for both."""
    folder, link = tmp_path / "run", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)

    async def body() -> None:
        async with watching(folder, link) as told:
            before = [looks.number for looks in told]
            (folder / "entry").touch()
            for looks, number in zip(told, before, strict=True):
                await looks.more_than(number)

    run(body())


def test_a_folder_that_is_named_from_the_working_folder_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cdi").mkdir()

    async def body() -> None:
        async with watching(Path("cdi")) as [looks]:
            before = looks.number
            (tmp_path / "cdi" / "entry").touch()
            await looks.more_than(before)

    run(body())


def test_all_folders_have_one_watcher_between_them(tmp_path: Path) -> None:
    """The thread of each would wake many times a second."""

    def watchers() -> int:
        return sum("notify" in comm.read_text() for comm in Path("/proc/self/task").glob("*/comm"))

    async def body() -> None:
        async with watching(*(tmp_path / name for name in "abcde")):
            while watchers() != 1:  # noqa: ASYNC110 - those of other tests may not have ended yet
                await asyncio.sleep(0.01)

    run(body())


def test_folders_that_do_not_answer_are_named_once_and_do_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, other = tmp_path / "silent", tmp_path / "other"
    for folder in (silent, other):
        folder.mkdir()
    answers = threading.Event()
    hanging: list[int] = []
    looks_at = os.statvfs

    def statvfs(path: Path) -> os.statvfs_result:
        if path == silent:
            hanging.append(threading.get_ident())
            answers.wait()  # as on a dead mount
        return looks_at(path)

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(watch, "_CONFIRM", 0.01)

    async def body() -> None:
        said = Said(monkeypatch)
        dead, well, checks = Looks(), Looks(), Looks()
        loop = asyncio.get_running_loop()

        def others() -> list[Path]:
            loop.call_soon_threadsafe(checks.add)
            return [other]

        groups: dict[OnChange, Folders] = {dead.add: lambda: [silent], well.add: others}
        try:
            async with running(FolderWatcher(groups=groups, step=0.01, patience=0.1)):
                assert (await said.first())["path"] == [str(silent)]
                for name in "abc":
                    before = well.number
                    (other / name).touch()
                    await well.more_than(before)
                await checks.more_than(checks.number + 3)
                assert len(said.warnings) == 1
                assert len(hanging) == 1, "a thread that hangs is enough"
                before = dead.number
                answers.set()
                await dead.more_than(before)  # it is watched from now on
                before = dead.number
                (silent / "entry").touch()
                await dead.more_than(before)
        finally:
            answers.set()

    run(body())


def test_a_watch_that_cannot_be_had_is_named_once_and_had_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one file can be opened more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def body() -> None:
        said = Said(monkeypatch)
        looks = Looks()
        tries = Looks()

        def folders() -> list[Path]:
            loop.call_soon_threadsafe(tries.add)
            return [tmp_path]

        loop = asyncio.get_running_loop()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            async with running(FolderWatcher(groups={looks.add: folders}, step=0.01, retry=0.01)):
                about = await said.first()
                await tries.more_than(3)
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
                await looks.more_than(0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert about["path"] == [str(tmp_path)]
        assert "Too many open files" in about["reason"]
        assert len(said.warnings) == 1

    run(body())


def unwatchable(folder: Path, kind: str) -> Path:
    bad = folder / (os.fsdecode(b"\xff") if kind == "not UTF-8" else "closed")
    bad.mkdir(mode=0o700 if kind == "not UTF-8" else 0)
    return bad


@pytest.mark.parametrize("kind", ["not UTF-8", "Permission denied"])
def test_a_folder_that_cannot_be_watched_is_named_and_the_others_are_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bad, good = unwatchable(tmp_path, kind), tmp_path / "good"
    if kind == "Permission denied" and os.access(bad, os.R_OK):
        pytest.skip("this user may read every folder")
    good.mkdir()

    async def body() -> None:
        said = Said(monkeypatch)
        async with watching(bad, good) as [_, looks]:
            before = looks.number
            (good / "entry").touch()
            await looks.more_than(before)
            about = await said.first()
        assert about["path"] == [str(bad)]
        assert kind in about["reason"]

    run(body())


def test_changes_without_a_pause_are_told_of_while_they_go_on(tmp_path: Path) -> None:
    """In the kubelet's folder others are busy too. watchfiles would gather such changes for 1.6 s."""

    async def churn_until(enough: asyncio.Event) -> None:
        for number in itertools.count():
            if enough.is_set():
                return
            (tmp_path / f"file-{number}").touch()
            (tmp_path / f"file-{number}").unlink()
            await asyncio.sleep(0.002)

    async def count() -> float:
        loop = asyncio.get_running_loop()
        told: list[float] = []
        enough = asyncio.Event()

        def on_change() -> None:
            told.append(loop.time())
            if len(told) > 5:
                enough.set()

        async with running(FolderWatcher(groups={on_change: lambda: [tmp_path]}, step=0.01)):
            await churn_until(enough)
        return told[5] - told[0]

    assert run(count()) < 7  # five times 0.1 s, not five times 1.6


@pytest.mark.parametrize(
    ("preset", "drivers"),
    [("gh200", {"vfio-pci", "nvgrace_gpu_vfio_pci"}), ("empty", {"vfio-pci"})],
    ids=["with a variant driver", "before vfio is loaded"],
)
def test_of_a_host_the_folders_of_every_vfio_driver_and_of_the_nodes_are_watched(
    places: Places, preset: str, drivers: set[str]
) -> None:
    """Each for itself: in a fake tree the others would speak too, on a node perhaps none of them."""
    root = places.node(preset).root
    watched = {str(folder.relative_to(root)) for folder in host_folders(HostPaths(root))}
    assert watched == {f"sys/bus/pci/drivers/{name}" for name in drivers} | {"dev/vfio", "dev/vfio/devices"}
