"""Folders that are watched with inotify: something in them changed, so look again.

What changed is not reported: it is a reason to look, never a fact. Folders may be missing, come, go, and come again;
a watch that cannot be had is logged once and tried again. Callers must look now and then without being told.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from watchfiles import Change
from watchfiles._rust_notify import RustNotify, WatchfilesRustInternalError

from sandbox_plugin.host.paths import HostPaths
from sandbox_plugin.host.threads import DaemonThreads
from sandbox_plugin.model import is_vfio_driver
from sandbox_plugin.trouble import Trouble, Troubles

log: structlog.stdlib.BoundLogger = structlog.get_logger()
_threads = DaemonThreads("folders")

OnChange = Callable[[], None]
Folders = Callable[[], Sequence[Path]]
"""Finds out which folders there are; on a thread, so it may read files."""
FolderId = tuple[int, int]
"""Device and inode number: they tell a new folder from the one that was there before, unless that was removed first:
ext4 gives its number away again."""
Targets = dict[Path, FolderId | str]
"""What to watch, or why it cannot be watched."""

_CONFIRM = 30.0
"""Seconds between checks that the watched folders are still the ones at these paths."""
_CHURN_MS = 100
"""How long changes that follow each other without a pause are gathered: watchfiles' own 1600 would make "at once" so
late in a folder where somebody else is busy."""


@dataclass(kw_only=True)
class FolderWatcher:
    """Calls whoever waits for folders when an entry appears, goes or is changed in one of them (not below them).

    The folder above each is watched too, and in place of one that is missing the nearest that exists. All are also
    called each time the watch begins again, for what happened before.

    There is one watch for all folders, because its thread wakes every `step`, whether or not anything happens:
    watchfiles sleeps and looks (`RustNotify.watch`), and a change is told of one to two steps after it came.
    """

    groups: Mapping[OnChange, Folders]
    """Who is called, and for what. Folders of which one may be on a dead mount belong into groups of their own: a group
    of which one folder does not answer is left out."""
    step: float
    """Seconds."""
    retry: float = 5.0
    """Seconds before a watch that could not be had is tried again."""
    patience: float = 2.0
    """Seconds that the folders of a group get to answer."""
    _searches: dict[OnChange, Future[Targets]] = field(default_factory=dict)
    """The latest search for the folders of each group. While one hangs no other is begun: it would hang as well."""
    _named: dict[OnChange, list[str]] = field(default_factory=dict)
    """The folders of each group, as they were found last."""
    _trouble: Trouble = field(default_factory=Trouble)
    """Of the whole watch."""
    _left_out: Troubles[tuple[str, ...]] = field(default_factory=Troubles)
    """By folders."""

    @property
    def trouble(self) -> str | None:
        """Why folders are not watched; None: all are."""
        left_out = (f"{', '.join(folders)}: {why}" for folders, why in self._left_out.now.items())
        return self._trouble.now or "; ".join(left_out) or None

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                await self._watch_once()
            except (OSError, WatchfilesRustInternalError) as error:  # no watches, no descriptors, or no thread
                if self._trouble.update(str(error)):
                    _say_unwatched((name for named in self._named.values() for name in named), str(error))
                await asyncio.sleep(self.retry)

    async def _watch_once(self) -> None:
        """Watches until other folders are to be watched."""
        found = await self._find()
        # The kernel has one watch for each folder, and watchfiles calls it by one name, however many it has.
        names: dict[FolderId, str] = {}
        waiting: dict[str, set[OnChange]] = defaultdict(set)
        for on_change, targets in found.items():
            for path, folder_id in targets.items():
                if isinstance(folder_id, tuple):
                    waiting[names.setdefault(folder_id, str(path))].add(on_change)
        stop, news = threading.Event(), asyncio.Queue[_Changes | None]()
        watching = _watch(list(waiting), self.step, stop, news)
        watching.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while await self._find() == found and not watching.done():
                with suppress(TimeoutError):
                    async with asyncio.timeout(_CONFIRM):
                        changes = await news.get()
                        if changes is not None and self._tell(changes, waiting):
                            return
            if watching.done():
                watching.result()
        finally:
            stop.set()
            watching.cancel()

    def _tell(self, changes: _Changes, waiting: Mapping[str, set[OnChange]]) -> bool:
        """Calls whoever waits for these changes. Returns whether the watch must begin again."""
        if not changes:  # it has begun: something may have happened since the folders were chosen
            self._trouble.update(None)
            concerned = set(self.groups)
        else:
            places = {place for _, path in changes for place in (path, os.path.dirname(path))}
            concerned = set[OnChange]().union(*(waiting.get(place, ()) for place in places))
        for on_change in concerned:
            on_change()
        # The folder that comes in the place of one that was removed may get its inode number, as on ext4.
        return any(change == Change.deleted and path in waiting for change, path in changes)

    async def _find(self) -> dict[OnChange, Targets]:
        """What to watch now. Groups that do not answer are missing. Raises OSError where no thread can be had."""
        begun = {}
        for on_change in self.groups:
            if on_change not in self._searches or self._searches[on_change].done():
                begun[on_change] = self._searches[on_change] = _threads.submit(self._search, on_change)
        if begun:
            await asyncio.wait(map(asyncio.wrap_future, begun.values()), timeout=self.patience)
        found = {on_change: search.result() for on_change, search in begun.items() if search.done()}
        left_out: dict[tuple[str, ...], str] = {
            (str(path),): why for targets in found.values() for path, why in targets.items() if isinstance(why, str)
        }
        for on_change in self.groups.keys() - found.keys():
            left_out[tuple(self._named.get(on_change, ()))] = f"no answer in {self.patience:g} s"
        for folders, why in self._left_out.update(left_out).items():
            _say_unwatched(folders, why)
        return found

    def _search(self, on_change: OnChange) -> Targets:
        """What to watch for one group. For a thread: a folder on a dead mount does not answer."""
        targets: Targets = {}
        named = [folder.absolute() for folder in self.groups[on_change]()]  # as watchfiles names what changed
        self._named[on_change] = [str(folder) for folder in named]
        for folder in named:
            for path in (folder, folder.parent):
                while (found := _identify(path)) is None and path != path.parent:
                    path = path.parent
                targets[path] = found or "it is not there"
        return targets


_Changes = Set[tuple[int, str]]
"""What watchfiles tells: the kind of change, and the path. Nothing: the watch has begun."""


def _watch(
    folders: list[str], step: float, stop: threading.Event, news: asyncio.Queue[_Changes | None]
) -> asyncio.Future[None]:
    """Watches these folders on a thread that puts what it is told into `news`, until `stop` is set or it fails.

    Raises OSError where no thread can be had. The future raises that, or WatchfilesRustInternalError, where no watch
    can be had.

    Not with watchfiles' `awatch`, which takes a second thread, and imports what nothing else here needs.
    """
    loop = asyncio.get_running_loop()

    def work() -> None:
        # Not recursive: these folders hold links into all of sysfs, and a recursive watch follows them.
        with RustNotify(folders, False, False, 0, False, True) as notify, suppress(RuntimeError):  # the loop has ended
            changes: Any = set()
            while changes != "stop":
                loop.call_soon_threadsafe(news.put_nowait, changes)
                changes = notify.watch(_CHURN_MS, round(step * 1000), 0, stop)

    return asyncio.wrap_future(_threads.submit(work))


def _say_unwatched(folders: Iterable[str], why: str) -> None:
    reason = f"{why}; until that works, changes there are found by the timer alone"
    log.warning("folders not watched", path=list(folders), reason=reason)


def _identify(path: Path) -> FolderId | str | None:
    """Which folder is there now, or why it cannot be watched; None: there is none."""
    try:
        os.statvfs(path)  # asks the file system, while stat may be answered from a cache: a watch on a dead mount would
        status = os.stat(path)  # hold up the whole process
    except OSError:
        return None
    if not os.access(path, os.R_OK):
        return os.strerror(errno.EACCES)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return (status.st_dev, status.st_ino)


def host_folders(paths: HostPaths) -> list[Path]:
    """The folders of a host that say something when a device is bound or unbound.

    On a real kernel sysfs makes its links without telling inotify; there /dev/vfio speaks, and kernel uevents do. In a
    fake tree all of them speak.
    """
    drivers = [paths.pci_drivers / "vfio-pci"]
    with suppress(OSError):
        drivers += [d for d in sorted(paths.pci_drivers.iterdir()) if is_vfio_driver(d.name) and d.name != "vfio-pci"]
    return [*drivers, paths.dev_vfio, paths.dev_vfio / "devices"]
