"""The folder watcher, on real folders: what happens while a watch is being set up is not lost.

That it hears of changes at all is shown by every test of the daemon that waits for less than its timers take.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from daemon import Places
from loop import LIMIT, run
from watchfiles import awatch

from sandbox_plugin.host import watch
from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.watch import FolderWatcher, host_folders


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


def test_a_folder_that_appears_while_the_watch_is_set_up_is_watched_and_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cdi"

    def late(*paths: Path, **options: Any) -> AsyncGenerator[Any, None]:
        if not folder.exists():
            folder.mkdir()  # after the folders to watch were chosen, before the watch is made
        return awatch(*paths, **options)

    monkeypatch.setattr(watch, "awatch", late)
    monkeypatch.setattr(watch, "_RECHECK_MS", 60_000)

    async def body() -> None:
        looks = Looks()
        watcher = FolderWatcher(folders=lambda: [folder], on_change=looks.add, step=0.01)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(watcher.run())
            await looks.more_than(1)  # one for each watch: the first was of the folder above alone
            for name in ("a", "b", "c"):
                before = looks.number
                (folder / name).touch()
                await looks.more_than(before)
            task.cancel()

    run(body())


@pytest.mark.parametrize("trouble", [OSError("no watches left"), RuntimeError("can't start new thread")], ids=repr)
def test_a_watch_that_cannot_be_had_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    loop_thread = threading.get_ident()
    tries = 0

    def folders() -> list[Path]:
        assert threading.get_ident() != loop_thread, "which folders there are is found out where it may hang"
        return [tmp_path]

    def scarce(*paths: Path, **options: Any) -> AsyncGenerator[Any, None]:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise trouble
        return awatch(*paths, **options)

    monkeypatch.setattr(watch, "awatch", scarce)

    async def body() -> None:
        looks = Looks()
        watcher = FolderWatcher(folders=folders, on_change=looks.add, step=0.01, retry=0.01)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(watcher.run())
            await looks.more_than(0)
            task.cancel()

    run(body())
    assert tries == 3


def test_a_watch_that_is_cancelled_in_the_moment_in_which_it_cannot_be_had_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        watcher = FolderWatcher(folders=lambda: [tmp_path], on_change=lambda: None, step=0.01, retry=2 * LIMIT)
        task = asyncio.create_task(watcher.run())

        async def scarce(*_: Path, **__: Any) -> AsyncGenerator[Any, None]:
            asyncio.get_running_loop().call_soon(task.cancel)  # so that it comes while the group of tasks is failing
            if tmp_path.is_dir():
                raise OSError("no watches left")
            yield

        monkeypatch.setattr(watch, "awatch", scarce)
        await asyncio.wait([task])
        assert task.cancelled()

    run(body())


def test_a_folder_whose_name_is_not_utf_8_is_named_and_left_to_the_timers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()

    async def body() -> dict[str, Any]:
        said: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        monkeypatch.setattr(watch.log, "warning", lambda _, **about: said.set_result(about), raising=False)
        watcher = FolderWatcher(folders=lambda: [folder], on_change=lambda: None, step=0.01)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(watcher.run())
            about = await said
            task.cancel()
        return about

    about = run(body())
    assert about["path"] == [str(folder)]
    assert "surrogates not allowed" in about["reason"]


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

        watcher = FolderWatcher(folders=lambda: [tmp_path], on_change=on_change, step=0.01)
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watcher.run())
            await churn_until(enough)
            watching.cancel()
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
