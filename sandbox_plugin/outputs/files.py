"""Small files: told apart without being read, read without waiting, replaced whole.

What CdiWriter and NeighbourWatch both need. Every call may hang on a dead mount: call these on a thread.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from sandbox_plugin.host.sysfs import OUT_OF_RESOURCES

Stamp = tuple[int, int, int, int]
"""Inode number, times of content and inode change (ns), size in bytes: a file with the same stamp is not read again."""

NO_RESOURCES = (*OUT_OF_RESOURCES, errno.EAGAIN)
"""Errors that say what this process lacks (EAGAIN: a thread), and nothing about the file."""
_TEMPORARY = ".sandbox-plugin.tmp"
"""Not .yaml and not .json: readers of a CDI folder do not look at it."""


def stamp_of(status: os.stat_result) -> Stamp:
    return (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)


def read(file: Path, limit: int) -> bytes:
    """The first `limit` bytes of a regular file. Raises OSError, also for what is not a regular file."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(file))
    with open(file, "rb", opener=_without_waiting) as opened:
        return opened.read(limit)


def replace(file: Path, content: bytes) -> Stamp:
    """Replaces a file: a reader sees all of the old one or all of the new one. Leaves nothing behind when it fails."""
    temporary = file.with_name(f".{file.name}{_TEMPORARY}")
    try:
        with open(temporary, "wb", opener=_for_all_to_read) as opened:
            opened.write(content)
            opened.flush()
            os.replace(temporary, file)
            return stamp_of(os.fstat(opened.fileno()))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe that takes the file's place has no writer


def _for_all_to_read(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    os.fchmod(descriptor, 0o644)  # whatever the umask: container runtimes run as other users
    return descriptor
