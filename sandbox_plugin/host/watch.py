"""Folders that are watched with inotify: something in them changed, so look again.

What changed is not reported: it is a reason to look, never a fact. Folders may be missing, come, go, and come again;
a watch that cannot be had is logged once and tried again. Callers must look now and then without being told.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
from watchfiles import awatch
from watchfiles._rust_notify import WatchfilesRustInternalError

from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.threads import is_lack_of_threads, on_thread
from sandbox_plugin.model import is_vfio_driver
from sandbox_plugin.trouble import first_failure

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_RECHECK_MS = 5000
"""How often it is checked that the watched folders are still the ones at these paths."""
_CHURN_MS = 100
"""How long changes that follow each other without a pause are gathered: watchfiles' own 1600 would make "at once" so
late in a folder where somebody else is busy."""


@dataclass(kw_only=True)
class FolderWatcher:
    """Calls `on_change` whenever an entry appears, goes or is changed in one of `folders()` (not below them).

    The folder above each is watched too, and in place of one that is missing the nearest that exists. `on_change` is
    also called each time the watch begins again, for what happened before.
    """

    folders: Callable[[], Sequence[Path]]
    on_change: Callable[[], None]
    step: float
    """Seconds that watchfiles waits for more before it reports, and how often its thread looks meanwhile; its own
    default, 0.05, costs a bind some 90 ms."""
    retry: float = 5.0
    """Seconds before a watch that could not be had is tried again."""
    _failing: bool = False
    _folders: Sequence[Path] = ()
    """What is to be watched, as it was found last."""

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            trouble = None
            try:
                await self._watch_once()
            except* (OSError, RuntimeError, UnicodeEncodeError) as errors:
                trouble, faults = errors.split(_is_trouble)
                if trouble is None or faults is not None:
                    raise
                if not self._failing:
                    reason = f"{first_failure(trouble)}; until that works, changes there are found by the timer alone"
                    log.warning("folders not watched", path=[str(folder) for folder in self._folders], reason=reason)
                self._failing = True
            if trouble is not None:  # not above: Python 3.11.2 makes a group of a cancellation within `except*`
                _go_on_unless_cancelled()
                await asyncio.sleep(self.retry)

    async def _watch_once(self) -> None:
        """Watches until one of the folders has been replaced."""
        targets = await on_thread(self._targets)()
        stop = asyncio.Event()
        watch = awatch(
            *targets,
            watch_filter=None,
            recursive=False,  # these folders hold links into all of sysfs, and a recursive watch follows them
            debounce=_CHURN_MS,
            step=round(self.step * 1000),
            rust_timeout=_RECHECK_MS,
            yield_on_timeout=True,
            stop_event=stop,
        )
        async with aclosing(watch) as batches, asyncio.TaskGroup() as group:
            group.create_task(self._confirm(targets, stop))  # begins when awatch waits, and so has made the watch
            async for changes in batches:
                self._failing = False
                if changes:
                    self.on_change()
                if await on_thread(self._targets)() != targets:
                    return

    async def _confirm(self, targets: dict[Path, int], stop: asyncio.Event) -> None:
        """Sees to what happened between the choice of the folders and the watch, which tells only what comes later."""
        self.on_change()
        if await on_thread(self._targets)() != targets:
            stop.set()

    def _targets(self) -> dict[Path, int]:
        """What to watch now, with inode numbers, which tell a new folder from the one that was there before.

        For a thread: a folder on a dead mount does not answer.
        """
        targets = {}
        self._folders = self.folders()
        for folder in self._folders:
            for path in (folder, folder.parent):
                while (inode := _inode(path)) is None and path != path.parent:
                    path = path.parent
                targets[path] = inode or 0
        return targets


def _go_on_unless_cancelled() -> None:
    """A TaskGroup that is cancelled while it fails forgets it, before Python 3.13."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _is_trouble(error: BaseException) -> bool:
    """Whether there can be no watch: for want of watches, descriptors or a thread, or for a name that is not UTF-8."""
    return isinstance(error, OSError | WatchfilesRustInternalError | UnicodeEncodeError) or is_lack_of_threads(error)


def _inode(path: Path) -> int | None:
    try:
        os.statvfs(path)  # asks the file system, while stat may be answered from a cache: a watch on a dead mount would
        return os.stat(path).st_ino  # hold up the whole process
    except OSError:
        return None


def host_folders(paths: HostPaths) -> list[Path]:
    """The folders of a host that say something when a device is bound or unbound.

    On a real kernel sysfs makes its links without telling inotify; there /dev/vfio speaks, and kernel uevents do. In a
    fake tree all of them speak.
    """
    drivers = [paths.pci_drivers / "vfio-pci"]
    with suppress(OSError):
        drivers += [d for d in sorted(paths.pci_drivers.iterdir()) if is_vfio_driver(d.name) and d.name != "vfio-pci"]
    return [*drivers, paths.dev_vfio, paths.dev_vfio / "devices"]
