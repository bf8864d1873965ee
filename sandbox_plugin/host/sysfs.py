"""Files, links and folders of sysfs, each read in one go. Every call blocks, and may hang in the kernel.

Apart because a lack of descriptors or memory must never be taken for what a file or folder says.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

_ATTRIBUTE_LIMIT = 4096
"""Bytes: a sysfs attribute is one page at most (Documentation/filesystems/sysfs.rst)."""

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say what this process, or the machine, lacks, and nothing about what was to be read."""


class OutOfResources(Exception):
    """This process, or the machine, has no file descriptors or no memory left: it says nothing about the host."""


def text(file: str, limit: int = _ATTRIBUTE_LIMIT) -> str:
    """At most `limit` bytes of a file, without white space around. Raises OSError and `OutOfResources`."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        refuse_if_out_of_resources(error)
        raise
    try:
        content = chunk = os.read(descriptor, limit)
        # An attribute comes whole, in one page; a longer file, such as mountinfo, comes in pieces.
        while limit > _ATTRIBUTE_LIMIT and chunk and len(content) < limit:
            chunk = os.read(descriptor, limit - len(content))
            content += chunk
        return content.decode("utf-8", "replace").strip()
    except OSError as error:
        raise OSError(error.errno, error.strerror, file) from None  # read(2) fails without a name
    finally:
        os.close(descriptor)


def text_or_none(file: str, limit: int = _ATTRIBUTE_LIMIT) -> str | None:
    """The same; None for what cannot be read. Raises `OutOfResources`."""
    try:
        return text(file, limit)
    except OSError:
        return None


def is_on(parameter: str) -> bool:
    """Of a module's boolean parameter. Raises `OutOfResources`."""
    return text_or_none(parameter) in ("Y", "1")


def target_name(link: str) -> str | None:
    """The last part of what a symbolic link leads to; None if there is no link. Raises OSError."""
    try:
        return os.path.basename(os.readlink(link))
    except FileNotFoundError:
        return None


def target_name_or_none(link: str) -> str | None:
    """The same; None also for what cannot be read."""
    try:
        return target_name(link)
    except OSError:
        return None


def listed(folder: str | Path) -> list[str]:
    """Names in a folder; none for what cannot be listed. Raises `OutOfResources`."""
    try:
        return os.listdir(folder)
    except OSError as error:
        refuse_if_out_of_resources(error)
        return []


def refuse_if_out_of_resources(error: OSError) -> None:
    """Raises `OutOfResources` if this error is of that kind."""
    if error.errno in OUT_OF_RESOURCES:
        raise OutOfResources(error.strerror) from None
