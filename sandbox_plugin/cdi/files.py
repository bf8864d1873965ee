"""Small files: told apart without being read, read without waiting, replaced whole.

What CdiWriter and ForeignSpecWatch both need. Every call may hang on a dead mount: call these on a thread.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
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
    temporary, descriptor = _new_beside(file)
    try:
        with open(descriptor, "wb") as opened:
            os.fchmod(descriptor, 0o644)  # whatever the umask: container runtimes run as other users
            opened.write(content)
            opened.flush()
            os.replace(temporary, file)
            return stamp_of(os.fstat(descriptor))
    except BaseException:
        with suppress(OSError):  # why it failed is to be said, not what came of that
            temporary.unlink()
        raise


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, all with mode 0755 whatever the umask.

    One that is there already stays as it is. Raises OSError.
    """
    try:
        try:
            os.mkdir(folder, 0o755)
        except FileNotFoundError:
            make_folder(folder.parent)
            os.mkdir(folder, 0o755)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        os.chmod(folder, 0o755)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe that takes the file's place has no writer


def _new_beside(file: Path) -> tuple[Path, int]:
    """An empty file for what is to replace `file`, and its descriptor. Raises OSError.

    Whatever has its name is in the way: a rest of a write that was cut off, or a pipe, which would hold up whoever
    opens it. That goes; what cannot go, such as a folder with something in it, stays, and another name is taken.
    """
    temporary = file.with_name(f".{file.name}{_TEMPORARY}")
    try:
        return temporary, _create(temporary)
    except FileExistsError:
        with suppress(OSError):
            _remove(temporary)
            return temporary, _create(temporary)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        return temporary, _create(temporary)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None  # another name each time would be news


def _create(file: Path) -> int:
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def _remove(path: Path) -> None:
    """Raises OSError for a folder that is not empty."""
    try:
        path.unlink()
    except IsADirectoryError:
        path.rmdir()
