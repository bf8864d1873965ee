"""Small files: read again only when they have changed, replaced whole.

What CDI specs, the files of claims and feature files need. A call may hang on a dead mount: these run on threads.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from sandbox_plugin.host.sysfs import OUT_OF_RESOURCES
from sandbox_plugin.host.threads import on_thread

LARGEST = 1 << 18
"""Bytes: of a larger file no more is read. Specs of real tools have a tenth of that."""
NO_RESOURCES = (*OUT_OF_RESOURCES, errno.EAGAIN)
"""Errors that say what this process lacks (EAGAIN: a thread), and nothing about the file."""
_TEMPORARY = ".sandbox-plugin.tmp"
"""Not .yaml and not .json: readers of a CDI folder do not look at it. NFD reads no name that begins with a dot."""
PATIENCE = 5.0
"""Seconds after which it is said that a folder does not answer."""
_LAST_PATIENCE = 0.3
"""Seconds that file work gets to end when whoever waits for it is cancelled: half a spec should not be left behind."""

Stamp = tuple[int, int, int, int]
"""Inode number, times of content and inode change (ns), size in bytes: the same stamp is the same file, unchanged."""

_T = TypeVar("_T")


class Known(NamedTuple, Generic[_T]):
    """A file as it was when it was read."""

    stamp: Stamp | None
    """None: it could not be read."""
    says: _T


def read(file: Path, before: Known[_T] | None, understand: Callable[[bytes], _T]) -> Known[_T]:
    """What a file says; if it is still what it was `before`, it is not read again.

    `understand` gets one byte more than `LARGEST` at most. Raises OSError, also for what is not a regular file.
    """
    status = os.stat(file)
    stamp = _stamp_of(status)
    if before is not None and before.stamp == stamp:
        return before
    if not stat.S_ISREG(status.st_mode):  # a pipe would hold us up
        raise OSError(errno.EINVAL, "Not a regular file", str(file))
    with open(file, "rb") as opened:
        return Known(stamp, understand(opened.read(LARGEST + 1)))


def replace(file: Path, content: bytes) -> Known[bytes]:
    """Replaces a file: a reader sees all of the old one or all of the new one. Leaves nothing behind when it fails.

    Makes the folder if it is missing. Raises OSError.
    """
    if not file.parent.is_dir():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.parent.chmod(0o755)  # whatever the umask: container runtimes run as other users
    temporary = file.with_name(f".{file.name}{_TEMPORARY}")
    temporary.unlink(missing_ok=True)  # a rest of a write that was cut off; or a pipe, which would hold us up
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    try:
        with open(descriptor, "wb") as opened:
            os.fchmod(descriptor, 0o644)
            opened.write(content)
            opened.flush()
            os.replace(temporary, file)
            return Known(_stamp_of(os.fstat(descriptor)), content)
    except BaseException:
        with suppress(OSError):  # why it failed is to be said, not what came of that
            temporary.unlink()
        raise


def remove(file: Path, stamp: Stamp | None) -> bool:
    """Removes a file if it is still the one with this stamp; says whether it did. Raises OSError."""
    try:
        if _stamp_of(os.stat(file)) != stamp:
            return False
        file.unlink()
    except FileNotFoundError:
        return False
    return True


class FileWork:
    """What one part of the daemon does with its files: one call after the other, each on a thread.

    A thread cannot be stopped. Whoever is cancelled while it works waits a moment, so that nothing half-done is left
    behind, and then leaves it to itself. The next call begins when it has ended: two would write through one temporary
    file, and what the older one writes would come after the newer. So who makes this keeps it as long as there are
    these files to be written, whatever else begins anew meanwhile.

    Usage:

        work = FileWork(on_silence)        # called when the folder does not answer, once until it does
        content = await work.finish(partial(files.read, file, None, bytes))
    """

    def __init__(self, on_silence: Callable[[], None]) -> None:
        self._on_silence = on_silence
        self._is_silent = False
        self._at_work: asyncio.Future[Any] | None = None

    async def finish(self, call: Callable[[], _T]) -> _T:
        """Waits for the end of the call, however long that takes. To be called by one task at a time.

        Raises what the call raises, and OSError where no thread can be had.
        """
        if self._at_work is not None:
            await self._end_of(self._at_work)
        task = asyncio.ensure_future(on_thread(call)())
        self._at_work = task
        try:
            await self._end_of(task)
        except asyncio.CancelledError:
            await asyncio.wait([task], timeout=_LAST_PATIENCE)
            task.add_done_callback(_ignore)
            raise
        self._at_work = None
        return task.result()

    async def _end_of(self, task: asyncio.Future[Any]) -> None:
        done, _ = await asyncio.wait([task], timeout=PATIENCE)
        if not done:
            if not self._is_silent:
                self._is_silent = True
                self._on_silence()
            await asyncio.wait([task])
        self._is_silent = False


def _stamp_of(status: os.stat_result) -> Stamp:
    return (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)


def _ignore(task: asyncio.Future[_T]) -> None:
    """How it ended is of no interest any more; asyncio would complain if nobody asked."""
    if not task.cancelled():
        task.exception()
