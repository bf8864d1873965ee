"""Files and links as sysfs has them: link texts, contents that change at once.

Apart because a plain file system needs care to look like sysfs to a reader who comes in the middle of a change.
Paths are strings here: a tree has thousands of files, and `pathlib` would double the time it takes to make one.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress


def create_file(path: str, content: str | bytes) -> None:
    """Makes a file. Raises FileExistsError when there is one."""
    with open(path, "xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def replace_file(path: str, content: str | bytes, spare: str) -> None:
    """Gives `path` a new content, made in the file `spare` first: a reader sees the old one or the new one."""
    remove_if_there(spare)
    create_file(spare, content)
    os.replace(spare, path)


def create_link(path: str, target: str) -> None:
    """Makes a relative link, as all of sysfs' are. Neither path may hold a link."""
    os.symlink(os.path.relpath(target, os.path.dirname(path)), path)


def link_target(path: str) -> str | None:
    """Where a link leads, as a path without `..`; None if there is no link."""
    try:
        return os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
    except FileNotFoundError:
        return None


def remove_if_there(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def listed(folder: str) -> list[str]:
    """Names in a folder, sorted; none if there is no such folder."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
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
