"""Files and links as sysfs has them: modes, link texts, contents that change at once.

Apart because a plain file system needs care to look like sysfs to a reader who comes in the middle of a change.
Paths are strings here: a tree has thousands of files, and `pathlib` would double the time it takes to make one.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress


def create_file(path: str, content: str | bytes, mode: int = 0o444) -> None:
    """Makes a file, with this mode whatever the umask is. Raises FileExistsError when there is one."""
    content = content.encode() if isinstance(content, str) else content
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(descriptor, mode)
        if os.write(descriptor, content) < len(content):  # what a disk does that has room for a part of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    finally:
        os.close(descriptor)


def replace_file(path: str, content: str | bytes, spare: str) -> None:
    """Gives `path` a new content, made in the file `spare` first: a reader sees the old one or the new one."""
    try:
        mode = stat.S_IMODE(os.lstat(path).st_mode)
    except FileNotFoundError:
        mode = 0o444
    remove_if_there(spare)
    create_file(spare, content, mode)
    os.replace(spare, path)


def create_link(path: str, target: str) -> None:
    """Makes a link with the text that the kernel gives it: up to what both paths have in common, then down.

    fs/kernfs/symlink.c compares with the target's parent, so a link to a folder above leads one step beyond it:
    `vfio-dev/vfio0/device` of 0000:01:00.0 is `../../../0000:01:00.0`. Neither path may hold a link.
    """
    parent, name = os.path.split(target)
    way = os.path.relpath(parent, os.path.dirname(path))
    os.symlink(name if way == "." else f"{way}/{name}", path)


def link_target(path: str) -> str | None:
    """Where a link leads, as a path without `..`; None if there is no link."""
    try:
        return os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
    except FileNotFoundError:
        return None


def remove_if_there(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def remove_if_empty(folder: str) -> None:
    """Removes a folder that holds nothing (any more), as the kernel does with those that only gather others."""
    with suppress(OSError):
        os.rmdir(folder)


def listed(folder: str) -> list[str]:
    """Names in a folder, sorted; none if there is no such folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def text_of(path: str) -> str | None:
    """What a small file says, without the newline at its end; None if there is no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except FileNotFoundError:
        return None


def is_plain_file(path: str) -> bool:
    """False for a FIFO that a test has put there as a trap: opening it would hang."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
