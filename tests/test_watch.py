"""The folder watcher, on real folders with real inotify.

That the daemon hears of changes at once is shown by every test of it that waits for less than its timers take.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from daemon import Places
from hardship import no_descriptors
from loop import LIMIT, in_loop, until
from structlog.testing import capture_logs

from sandbox_plugin.host import watch
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.watch import Folders, FolderWatcher, OnChange, host_folders


class Told:
    """Counts how often the watcher said that something changed."""

    def __init__(self) -> None:
        self.times = 0

    def add(self) -> None:
        self.times += 1


@asynccontextmanager
async def running(watcher: FolderWatcher) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(watcher.run())
        yield
        task.cancel()
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a task of the watcher goes on"


@asynccontextmanager
async def watching(*folders: Path) -> AsyncIterator[list[Told]]:
    """A watcher at work, and who is told of each of the folders."""
    told = [Told() for _ in folders]
    groups: dict[OnChange, Folders] = {
        each.add: partial(list, [folder]) for each, folder in zip(told, folders, strict=True)
    }
    async with running(FolderWatcher(groups=groups, step=0.01)):
        await until(lambda: all(each.times for each in told))
        yield told


async def assert_tells(told: Told, change: Callable[[], object]) -> None:
    before = told.times
    change()
    await until(lambda: told.times > before)


@pytest.fixture
def _no_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What inotify does not tell is not found either."""
    monkeypatch.setattr(watch, "_CONFIRM", 60.0)


@pytest.mark.usefixtures("_no_timers")
@in_loop
async def test_a_folder_that_comes_and_goes_and_comes_again_is_watched_whenever_it_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "cdi"
    async with watching(folder) as [told]:
        for _ in range(5):
            await assert_tells(told, folder.mkdir)
            await assert_tells(told, (folder / "a").touch)
            await assert_tells(told, (folder / "b").touch)
            await assert_tells(told, lambda: shutil.rmtree(folder))


@pytest.mark.usefixtures("_no_timers")
@in_loop
async def test_a_folder_that_was_replaced_at_once_is_watched_under_its_old_name(tmp_path: Path) -> None:
    folder = tmp_path / "cdi"
    folder.mkdir()

    def replace() -> None:
        folder.rename(tmp_path / "old")
        folder.mkdir()

    async with watching(folder) as [told]:
        await assert_tells(told, replace)
        await assert_tells(told, (folder / "a").touch)
        await assert_tells(told, (folder / "b").touch)


@in_loop
async def test_a_change_is_told_to_those_alone_who_wait_for_that_folder_or_the_one_above(tmp_path: Path) -> None:
    folders = [tmp_path / name / "folder" for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir(parents=True)
    async with watching(*folders) as told:
        for changed, folder in zip(told, folders, strict=True):
            for entry in (folder / "entry", folder.parent / "entry"):
                before = [each.times for each in told if each is not changed]
                await assert_tells(changed, entry.touch)
                assert [each.times for each in told if each is not changed] == before


@pytest.mark.usefixtures("_no_timers")
@in_loop
async def test_a_folder_under_two_names_tells_everybody_who_waits_under_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /run and /var/run, and from the working folder. The kernel has one watch for all."""
    monkeypatch.chdir(tmp_path)
    folder, link = tmp_path / "run", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    async with watching(folder, link, Path("run")) as told:
        before = [each.times for each in told]
        (folder / "entry").touch()
        await until(lambda: all(each.times > was for each, was in zip(told, before, strict=True)))


@in_loop
async def test_all_folders_have_one_watcher_between_them(tmp_path: Path) -> None:
    """The thread of each would wake many times a second."""

    def watchers() -> int:
        return sum("notify" in comm.read_text() for comm in Path("/proc/self/task").glob("*/comm"))

    async with watching(*(tmp_path / name for name in "abcde")):
        await until(lambda: watchers() == 1)  # those of other tests may not have ended yet


@in_loop
async def test_folders_that_do_not_answer_are_named_once_and_do_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, other = tmp_path / "silent", tmp_path / "other"
    for folder in (silent, other):
        folder.mkdir()
    answers = threading.Event()
    hanging: list[int] = []
    statvfs = os.statvfs

    def hang(path: Path) -> os.statvfs_result:
        if path == silent:
            hanging.append(threading.get_ident())
            answers.wait()  # as on a dead mount
        return statvfs(path)

    monkeypatch.setattr(os, "statvfs", hang)
    monkeypatch.setattr(watch, "_CONFIRM", 0.01)
    dead, well, searches = Told(), Told(), Told()

    def others() -> list[Path]:
        searches.add()
        return [other]

    groups: dict[OnChange, Folders] = {dead.add: lambda: [silent], well.add: others}
    with capture_logs() as logs:
        try:
            async with running(FolderWatcher(groups=groups, step=0.01, patience=0.1)):
                await until(lambda: logs)
                for name in "abc":
                    await assert_tells(well, (other / name).touch)
                before = searches.times
                await until(lambda: searches.times > before + 3)
                assert len(hanging) == 1, "a thread that hangs is enough"
                await assert_tells(dead, answers.set)  # it is watched from now on
                await assert_tells(dead, (silent / "entry").touch)
        finally:
            answers.set()
    assert [entry["path"] for entry in logs] == [[str(silent)]]


@in_loop
async def test_a_watch_that_cannot_be_had_is_named_once_and_had_later(tmp_path: Path) -> None:
    told, tries = Told(), Told()

    def folders() -> list[Path]:
        tries.add()
        return [tmp_path]

    with capture_logs() as logs:
        async with running(FolderWatcher(groups={told.add: folders}, step=0.01, retry=0.01)):
            with no_descriptors():
                await until(lambda: tries.times > 3)
            await until(lambda: told.times)
    (said,) = logs
    assert said["path"] == [str(tmp_path)]
    assert "Too many open files" in said["reason"]


@in_loop
async def test_a_watch_that_is_cancelled_while_it_cannot_be_had_ends_in_whichever_turn_that_is(tmp_path: Path) -> None:
    watcher = FolderWatcher(groups={lambda: None: lambda: [tmp_path]}, step=0.01, retry=2 * LIMIT)
    for turns in range(30):
        with no_descriptors():
            task = asyncio.create_task(watcher.run())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        assert task.cancelled()


@pytest.mark.parametrize("kind", ["not UTF-8", "Permission denied"])
@in_loop
async def test_a_folder_that_cannot_be_watched_is_named_and_the_others_are_watched(tmp_path: Path, kind: str) -> None:
    bad, good = tmp_path / (os.fsdecode(b"\xff") if kind == "not UTF-8" else "closed"), tmp_path / "good"
    bad.mkdir(mode=0o700 if kind == "not UTF-8" else 0)
    good.mkdir()
    if kind == "Permission denied" and os.access(bad, os.R_OK):
        pytest.skip("this user may read every folder")
    with capture_logs() as logs:
        async with watching(bad, good) as [_, told]:
            await assert_tells(told, (good / "entry").touch)
            await until(lambda: logs)
    (said,) = logs
    assert said["path"] == [str(bad)]
    assert kind in said["reason"]


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
