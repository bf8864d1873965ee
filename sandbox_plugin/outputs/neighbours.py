"""Other people's CDI specs, which can fail every Kata pod of the node: found, named in the log, and never touched.

Kata's libraries read all specs of the CDI folders before they look up one device. The other runtimes of the node are
more lenient, so nobody else may complain. What makes a spec bad is in `cdi_rules`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from sandbox_plugin.host.threads import on_thread
from sandbox_plugin.outputs import files
from sandbox_plugin.outputs.cdi_rules import Reading, judge_specs, read_spec
from sandbox_plugin.outputs.spec_text import LARGEST
from sandbox_plugin.trouble import Troubles

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_SETTLE = 1.0
"""Seconds after a change: whoever writes takes several steps, and nobody waits for our word about it."""
_ENDINGS = (".yaml", ".json")
_MOST = 10_000
"""Entries of one CDI folder and its sub-folders that are looked at: a link may lead to the root of the host."""


class _TooMany(Exception):
    """There is more below a folder than is looked at."""


@dataclass(kw_only=True)
class NeighbourWatch:
    """Looks at all specs in one CDI folder and logs what is wrong: at start, when told to, and every `recheck` seconds.

    Each folder has a watch of its own: the same device in two CDI folders is not a fault, and one folder that does not
    answer must not hide what is in the other.
    """

    folder: Path
    recheck: float = 5.0
    _bell: asyncio.Event = field(default_factory=asyncio.Event)
    _wrong: Troubles[Path] = field(default_factory=Troubles)
    """What is bad about specs."""
    _unread: Troubles[Path] = field(default_factory=Troubles)
    """Why specs could not be judged."""

    def look(self) -> None:
        """Something changed in the folder."""
        self._bell.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        seen: Mapping[Path, Seen] = {}
        while True:
            self._bell.clear()
            with suppress(OSError):  # for want of descriptors: next time
                now = await on_thread(look_at_specs)(self.folder, seen)
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
        gone = self._wrong.now.keys() - wrong.keys()
        for file, why in self._wrong.update(wrong).items():
            what_to_do = "Kata fails every pod of this node until this spec is repaired, or moved out of the folder"
            log.error("bad cdi spec", path=str(file), reason=why, action=what_to_do)
        for file in gone:
            log.info("bad cdi spec is gone", path=str(file))
        unread = {file: reading.unread for file, reading in readings.items() if reading.unread is not None}
        for file, why in self._unread.update(unread).items():
            what_to_do = "if Kata's pods fail on this node, look at this spec"
            log.warning("cdi spec not judged", path=str(file), reason=why, action=what_to_do)


@dataclass(frozen=True, slots=True)
class Seen:
    """A spec as it was when it was read."""

    stamp: files.Stamp | None
    reading: Reading


def look_at_specs(folder: Path, before: Mapping[Path, Seen]) -> dict[Path, Seen]:
    """All specs of a CDI folder as they are now; what has not changed is not read again.

    For a thread: it may take long. Raises OSError when this process lacks something.
    """
    now = {}
    try:
        for file in _specs_below(folder):
            if (seen := _look_at(file, before.get(file))) is not None:
                now[file] = seen
    except _TooMany:
        why = f"there is more in it and its sub-folders than the {_MOST} entries that are looked at"
        now[folder] = Seen(None, Reading(unread=why))
    return now


def _specs_below(folder: Path) -> Iterator[Path]:
    """What Kata's libraries take for a spec.

    Go's looks at the folder alone, and fails at a link to a folder that is named like a spec. Rust's takes `x.YAML`
    too, goes into every sub-folder, through links as well, and gives all of it the priority of the folder. A folder
    that contains a link to itself it would enter again and again; here it is entered twice, which shows its devices
    twice. Raises `_TooMany`.
    """
    number = 0
    entered: Counter[tuple[int, int]] = Counter()
    below = [folder]
    while below:
        where = below.pop()
        try:
            status = where.stat()
            entered[status.st_dev, status.st_ino] += 1
            entries = sorted(where.iterdir()) if entered[status.st_dev, status.st_ino] <= 2 else []
        except OSError as error:
            if error.errno in files.NO_RESOURCES:
                raise
            continue  # it is not there, or cannot be read: Kata passes over it
        for entry in entries:
            number += 1
            if number > _MOST:
                raise _TooMany
            is_folder = _is_folder(entry)
            if is_folder:
                below.append(entry)
            by_go = where == folder and entry.name.endswith(_ENDINGS) and (not is_folder or entry.is_symlink())
            by_rust = not is_folder and entry.suffix.lower() in _ENDINGS
            if by_go or by_rust:
                yield entry


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in files.NO_RESOURCES:
            raise
        return False


def _look_at(file: Path, before: Seen | None) -> Seen | None:
    """One spec; None if it is not there any more. Raises OSError when this process lacks something."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return Seen(None, Reading(wrong="it is a dangling symlink")) if file.is_symlink() else None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return Seen(None, Reading(wrong="it is a symlink that leads back to itself"))
        return _unread(None, error)
    stamp = files.stamp_of(status)
    if before is not None and before.stamp == stamp:
        return before
    if stat.S_ISDIR(status.st_mode):
        return Seen(stamp, Reading(wrong="it is a link to a folder"))
    if status.st_size > LARGEST:
        return Seen(stamp, Reading(unread=f"it has {status.st_size} bytes, and no more than {LARGEST} are read"))
    try:
        return Seen(stamp, read_spec(files.read(file, LARGEST)))
    except FileNotFoundError:
        return None
    except OSError as error:
        return _unread(stamp, error)


def _unread(stamp: files.Stamp | None, error: OSError) -> Seen:
    if error.errno in files.NO_RESOURCES:
        raise error
    return Seen(stamp, Reading(unread=f"it cannot be read: {error.strerror}"))
