"""The lock between two plugins on one node: a rolling update starts the new pod while the old one runs.

Both want the same sockets and the same CDI specs. The lock is on a file in the kubelet's folder, which both mount: who
has it serves, the other stands by, alive and ready, and takes over when the lock is free. The kernel frees it when
its holder ends, however it ends (flock(2)). The kubelet deletes sockets from that folder, and leaves plain files.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from sandbox_plugin.tasks import happens
from sandbox_plugin.trouble import Trouble

LOCK_NAME = ".sandbox-plugin.lock"
_STANDING_BY = "standing by"
_RETRY = 0.5
"""Seconds between attempts that no event asked for: a killed holder leaves no event."""
_CHECK = 5.0
"""Seconds between looks at the lock that is held."""

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(kw_only=True, eq=False, repr=False)
class NodeLock:
    """Waits for the lock in `folder`, and notices when it does not count any more.

    Usage:

        async with lock.taken():
            ...                      # serve
            await lock.lost()        # somebody removed the file or the folder; stop serving, and take the new one
    """

    folder: Path
    _bell: asyncio.Event = field(default_factory=asyncio.Event)
    _trouble: Trouble = field(default_factory=Trouble)
    """The event that was logged last, while there is something to wait for."""
    _why: str | None = None
    """As `why_not_held`."""
    _held: int | None = None
    """Descriptor of the locked file."""

    @property
    def is_held(self) -> bool:
        """Whether this plugin serves the node; else another one does, or the folder is not there."""
        return self._held is not None

    @property
    def is_standing_by(self) -> bool:
        """Whether another plugin serves the node."""
        return not self.is_held and self._trouble.now == _STANDING_BY

    @property
    def why_not_held(self) -> str | None:
        """What it waits for, in words; None where it holds the lock, or has not tried yet."""
        return self._why

    def look(self) -> None:
        """Something changed in the folder: perhaps the other one is gone."""
        self._bell.set()

    async def run(self, work: Callable[[float], Coroutine[Any, Any, None]]) -> None:
        """Runs `work` for as long as this plugin has the lock, each time it gets it. Runs until cancelled.

        `work` is told since when this plugin has the lock, in monotonic seconds.
        """
        while True:
            async with self.taken(), asyncio.TaskGroup() as group:
                task = group.create_task(work(time.monotonic()))
                await self.lost()
                task.cancel()

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Waits as long as it takes, then holds the lock for as long as the context."""
        while (descriptor := self._try()) is None:
            self._bell.clear()
            await happens(self._bell, within=_RETRY)
        if self._trouble.now == _STANDING_BY:  # and not after a wait for the folder, which nobody had
            log.info("taking over", path=str(self.folder / LOCK_NAME))
        self._trouble.update(None)
        self._why = None
        self._held = descriptor
        try:
            yield
        finally:
            os.close(self._held)
            self._held = None

    async def lost(self) -> None:
        """Returns when the locked file is not the one in the folder any more: others may have served since then."""
        while self._held is not None and _is_at(self.folder / LOCK_NAME, self._held):
            self._bell.clear()
            await happens(self._bell, within=_CHECK)

    def _try(self) -> int | None:
        """The locked file, or None: said once, why not."""
        path = self.folder / LOCK_NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            self._say("waiting for the kubelet directory", path, error.strerror)
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                self._say(_STANDING_BY, path, "another plugin serves this node; this one takes over when it ends")
            else:
                self._say("waiting for the kubelet directory", path, error.strerror)
        os.close(descriptor)
        return None

    def _say(self, event: str, path: Path, reason: str | None) -> None:
        self._why = f"{path}: {reason}"
        if self._trouble.update(event):
            log.warning(event, path=str(path), reason=reason)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at `path`: a lock on a file that was removed keeps nobody out."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False
