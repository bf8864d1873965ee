"""Other people's CDI specs, which can fail every Kata pod of the node: found, named in the log, and never touched.

Kata's libraries read all specs of the CDI folders before they look up one device. The other runtimes of the node are
more lenient, so nobody else may complain. What makes a spec bad is in `cdi_lint`.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from sandbox_plugin.cdi import files
from sandbox_plugin.cdi.lint import Reading, lint, read_spec
from sandbox_plugin.cdi.text import LARGEST
from sandbox_plugin.host.threads import on_thread
from sandbox_plugin.trouble import Troubles

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_SETTLE = 1.0
"""Seconds after a change: whoever writes takes several steps, and nobody waits for our word about it."""
_MOST = 10_000
"""Entries of one CDI folder and its sub-folders that are looked at: a link may lead to the root of the host."""
_BAD = "bad cdi spec"
_TO_DO = {
    _BAD: "Kata fails every pod of this node until this spec is repaired, or moved out of the folder",
    "cdi spec not judged": "if Kata's pods fail on this node, look at this spec",
    "cdi device in two folders": "remove the device from one of the two specs",
}
"""What may be said of a spec -> what to do about it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A spec as it was when it was read."""

    stamp: files.Stamp | None
    reading: Reading


@dataclass(kw_only=True)
class ForeignSpecWatch:
    """Looks at all specs in one CDI folder and logs what is wrong: at start, when told to, and every `recheck` seconds.

    Each folder has a watch of its own: one that does not answer must not hide what is in the other.
    """

    folder: Path
    recheck: float = 5.0
    others: Sequence[ForeignSpecWatch] = ()
    """Those of other folders: of a device that is there too, this folder's spec is named."""
    _bell: asyncio.Event = field(default_factory=asyncio.Event)
    _files: Mapping[str, Path] = field(default_factory=dict)
    """Device -> the spec that has it."""
    _troubles: Mapping[str, Troubles[Path]] = field(default_factory=lambda: {event: Troubles() for event in _TO_DO})

    def look(self) -> None:
        """Something changed in the folder."""
        self._bell.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        seen: Mapping[Path, Seen] = {}
        while True:
            self._bell.clear()
            with suppress(OSError):  # for want of descriptors: next time
                seen = await on_thread(look_at_specs)(self.folder, seen)
                self._report({file: known.reading for file, known in seen.items()})
            try:
                async with asyncio.timeout(self.recheck):
                    await self._bell.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(_SETTLE)

    def _report(self, readings: Mapping[Path, Reading]) -> None:
        wrong = lint(readings)
        unread = {file: reading.unread for file, reading in readings.items() if reading.unread is not None}
        self._files = {device: file for file, reading in readings.items() for device in reading.devices}
        twice = {
            self._files[device]: f"device {device} is in {other._files[device]} too: Kata's Go runtime takes it from "
            "/var/run/cdi, runtime-rs from /etc/cdi"
            for other in self.others
            for device in sorted(self._files.keys() & other._files.keys(), reverse=True)
        }
        gone = self._troubles[_BAD].now.keys() - wrong.keys()
        for (event, what_to_do), found in zip(_TO_DO.items(), (wrong, unread, twice), strict=True):
            for file, why in self._troubles[event].update(found).items():
                say = log.error if event == _BAD else log.warning
                say(event, path=str(file), reason=why, action=what_to_do)
        for file in gone:
            log.info("bad cdi spec is gone", path=str(file))


def look_at_specs(folder: Path, before: Mapping[Path, Seen]) -> dict[Path, Seen]:
    """All specs of a CDI folder as they are now; what has not changed is not read again.

    For a thread: it may take long. Raises OSError when this process lacks something.
    """
    now = {}
    for file in _specs_below(folder):
        if file == folder:
            why = f"there is more in it and its sub-folders than the {_MOST} entries that are looked at"
            now[file] = Seen(None, Reading(unread=why))
        elif (seen := _look_at(file, before.get(file))) is not None:
            now[file] = seen
    return now


def _specs_below(folder: Path) -> Iterator[Path]:
    """What Kata's libraries take for a spec; and the folder itself, at the end, if that is not all.

    Go's looks at the folder alone. Rust's takes `x.YAML` too, goes into every sub-folder, through links as well, and
    gives all of it the priority of the folder. Here each folder is entered once.
    """
    entered = set()
    number = 0
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_pass_over):
        if (real := os.path.realpath(where)) in entered:
            folders.clear()
            continue
        entered.add(real)
        number += len(folders) + len(names)
        yield from (Path(where, name) for name in sorted(names) if name.lower().endswith((".yaml", ".json")))
        if number > _MOST:
            yield folder
            return


def _pass_over(error: OSError) -> None:
    """A folder that is not there, or cannot be read: Kata passes over it, too."""
    if error.errno in files.NO_RESOURCES:
        raise error


def _look_at(file: Path, before: Seen | None) -> Seen | None:
    """One spec; None if it is not there any more. Raises OSError when this process lacks something."""
    try:
        stamp = files.stamp_of(file.stat())
        if before is not None and before.stamp == stamp:
            return before
        return Seen(stamp, read_spec(files.read(file, LARGEST + 1)))
    except OSError as error:
        if error.errno in files.NO_RESOURCES:
            raise
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return Seen(None, Reading(wrong="it is a dangling symlink")) if file.is_symlink() else None
        return Seen(None, Reading(unread=f"it cannot be read: {error.strerror}"))
