"""Other people's CDI specs, which can fail every Kata pod of the node: found, named in the log, and never touched.

Kata's libraries read all specs of the CDI folders before they look up one device. The other runtimes of the node are
more lenient, so nobody else may complain. What makes a spec bad is in `cdi_rules`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from sandbox_plugin.outputs.cdi_rules import Reading, judge_specs, read_spec

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_LIMIT = 1 << 18
"""Bytes: a larger spec is not judged, since that would take minutes."""
_SETTLE = 1.0
"""Seconds after a change: whoever writes takes several steps, and nobody waits for our word about it."""
_NO_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What this process lacks says nothing about a file."""


@dataclass(kw_only=True)
class NeighbourWatch:
    """Looks at all specs in `folders`, at start, when told to, and every `recheck` seconds, and logs what is wrong."""

    folders: tuple[Path, ...]
    recheck: float = 5.0
    _bell: asyncio.Event = field(default_factory=asyncio.Event)
    _said: dict[Path, str] = field(default_factory=dict)
    _unread: dict[Path, str] = field(default_factory=dict)

    def look(self) -> None:
        """Something changed in one of the folders."""
        self._bell.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        seen: Mapping[Path, _Seen] = {}
        while True:
            self._bell.clear()
            with suppress(OSError):  # a folder that cannot be listed now, for want of descriptors too: next time
                now = await asyncio.to_thread(_look, self.folders, seen)
                if now != seen:
                    self._report({file: known.reading for file, known in now.items()})
                seen = now
            try:
                async with asyncio.timeout(self.recheck):
                    await self._bell.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(_SETTLE)

    def _report(self, readings: Mapping[Path, Reading]) -> None:
        wrong = judge_specs(readings)
        for file, why in wrong.items():
            if self._said.get(file) != why:
                what_to_do = "Kata fails every pod of this node until this spec is repaired, or moved out of the folder"
                log.error("bad cdi spec", path=str(file), reason=why, action=what_to_do)
        for file in self._said.keys() - wrong.keys():
            log.info("bad cdi spec is gone", path=str(file))
        self._said = wrong
        unread = {file: reading.unread for file, reading in readings.items() if reading.unread is not None}
        for file, why in unread.items():
            if self._unread.get(file) != why:
                what_to_do = "if Kata's pods fail on this node, look at this spec"
                log.warning("cdi spec not judged", path=str(file), reason=why, action=what_to_do)
        self._unread = unread


@dataclass(frozen=True, slots=True)
class _Seen:
    """A spec as it was when it was read."""

    stamp: tuple[int, ...]
    """Inode number, times of content and inode change (ns), size in bytes: what has the same is not read again."""
    reading: Reading


def _look(folders: tuple[Path, ...], seen: Mapping[Path, _Seen]) -> dict[Path, _Seen]:
    """All specs as they are now. For a worker thread: reading YAML takes long. Raises OSError."""
    now = {}
    for folder in folders:
        for pattern in ("*.yaml", "*.json"):
            for file in folder.rglob(pattern):  # runtime-rs goes into folders within folders
                if found := _look_at(file, seen.get(file)):
                    now[file] = found
    return now


def _look_at(file: Path, before: _Seen | None) -> _Seen | None:
    """One entry of a folder; None for a folder, and for what is not there any more. Raises OSError."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return _Seen((), Reading(wrong="it is a link to nothing")) if file.is_symlink() else None
    except OSError as error:
        return _unread((), error)
    stamp = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
    if stat.S_ISDIR(status.st_mode):
        return None
    if before is not None and before.stamp == stamp:
        return before
    if not stat.S_ISREG(status.st_mode):
        return _Seen(stamp, Reading(unread="it is no regular file"))
    if status.st_size > _LIMIT:
        return _Seen(stamp, Reading(unread=f"it has {status.st_size} bytes, and no more than {_LIMIT} are read"))
    try:
        return _Seen(stamp, read_spec(_content(file)))
    except FileNotFoundError:
        return None
    except OSError as error:
        return _unread(stamp, error)


def _content(file: Path) -> bytes:
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        return opened.read(_LIMIT)


def _unread(stamp: tuple[int, ...], error: OSError) -> _Seen:
    if error.errno in _NO_MEANS:
        raise error
    return _Seen(stamp, Reading(unread=f"it cannot be read: {error.strerror}"))
