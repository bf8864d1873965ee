"""An initramfs out of folders: the cpio format `newc`, written without root and without cpio(1).

The format is the kernel's (Documentation/driver-api/early-userspace/buffer-format.rst).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_MOUNT_POINTS = ("dev", "proc", "sys", "tmp", "run", "root", "var")


def write_initrd(output: Path, trees: list[tuple[Path, str]]) -> None:
    """Writes an initramfs. Each tree is a folder, and the path at which it appears (`` is the root)."""
    with output.open("wb") as archive:
        seen: set[str] = set()
        for name in _MOUNT_POINTS:
            _put(archive, name, stat.S_IFDIR | 0o755)
            seen.add(name)
        _put(archive, "dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
        for folder, prefix in trees:
            for name, path in _entries(folder, prefix):
                mode = path.lstat().st_mode
                if stat.S_ISDIR(mode) and name in seen:
                    continue
                seen.add(name)
                _put(archive, name, mode, _content(path, mode))
        _put(archive, "TRAILER!!!", 0)


def _entries(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """Name in the archive and path of everything below `folder`, parents first."""
    parts = [part for part in prefix.split("/") if part]
    for depth in range(len(parts)):
        yield "/".join(parts[: depth + 1]), folder
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted([*folders, *files]):
            path = Path(parent, name)
            yield "/".join([*parts, *path.relative_to(folder).parts]), path


def _content(path: Path, mode: int) -> bytes:
    if stat.S_ISLNK(mode):
        return os.readlink(path).encode()
    return path.read_bytes() if stat.S_ISREG(mode) else b""


def _put(archive: BinaryIO, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
    header = b"070701" + "".join(f"{field:08X}" for field in fields).encode()
    archive.write(header + encoded + b"\0" * (-(len(header) + len(encoded)) % 4))
    archive.write(content + b"\0" * (-len(content) % 4))
