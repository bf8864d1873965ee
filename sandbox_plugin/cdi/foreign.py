"""Foreign specs, which can fail every Kata pod of the node: found, named in the log, and never touched.

Kata's libraries read all specs of the CDI folders before they look up one device. The other runtimes of the node are
more lenient, so nobody else may complain. What makes a spec bad is in `lint`.
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

from sandbox_plugin.cdi.lint import Reading, in_two_folders, lint, read_spec
from sandbox_plugin.cdi.text import prepare
from sandbox_plugin.config.settings import Settings
from sandbox_plugin.host import files
from sandbox_plugin.host.files import Known
from sandbox_plugin.host.threads import on_thread
from sandbox_plugin.tasks import happens
from sandbox_plugin.trouble import Troubles

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_SETTLE = 1.0
"""Seconds after a change: whoever writes takes several steps, and nobody waits for our word about it."""
_PATIENCE = 1.0
"""Seconds that a CDI folder gets to say where it is; on a dead mount it never does."""
_BAD = "bad cdi spec"
_TO_DO = {
    _BAD: "Kata fails every pod of this node until this spec is repaired, or moved out of the folder",
    "cdi spec not judged": "if Kata's pods fail on this node, look at this spec",
    "cdi device in two folders": "remove the device from one of the two specs",
}
"""What may be said of a spec -> what to do about it."""
_PROBLEMS = dict(zip(_TO_DO, ("bad", "not-judged", "in-two-folders"), strict=True))
"""The same, as it is counted."""


@dataclass(kw_only=True)
class ForeignSpecWatch:
    """Looks at all specs in one CDI folder: at start, when told to, and every `interval` seconds. Logs what is wrong.

    Each folder has a watch of its own: one that does not answer must not hide what is in the other.
    """

    folder: Path
    interval: float = 5.0
    others: Sequence[ForeignSpecWatch] = ()
    """Those of other folders: of a device that is there too, this folder's spec is named."""
    _bell: asyncio.Event = field(default_factory=asyncio.Event)
    _spec_with: Mapping[str, Path] = field(default_factory=dict)
    """Device -> the spec that has it."""
    _troubles: Mapping[str, Troubles[Path]] = field(default_factory=lambda: {event: Troubles() for event in _TO_DO})

    def look(self) -> None:
        """Something changed in the folder."""
        self._bell.set()

    @property
    def troubles(self) -> list[tuple[Path, str]]:
        """The specs that something is wrong with, and what."""
        return [(file, why) for troubles in self._troubles.values() for file, why in troubles.now.items()]

    @property
    def problems(self) -> dict[str, int]:
        """How many specs there are of each that something is wrong with."""
        return {_PROBLEMS[event]: len(troubles.now) for event, troubles in self._troubles.items()}

    async def run(self) -> None:
        """Runs until cancelled."""
        known: Mapping[Path, Known[Reading]] = {}
        while True:
            self._bell.clear()
            with suppress(OSError):  # for want of descriptors: next time
                known = await on_thread(read_specs)(self.folder, known)
                self._report({file: each.says for file, each in known.items()})
            if await happens(self._bell, within=self.interval):
                await asyncio.sleep(_SETTLE)

    def _report(self, readings: Mapping[Path, Reading]) -> None:
        wrong = lint(readings)
        unread = {file: reading.unread for file, reading in readings.items() if reading.unread is not None}
        self._spec_with = {device: file for file, reading in readings.items() for device in reading.devices}
        twice: dict[Path, str] = {}
        for other in self.others:
            twice |= in_two_folders(self._spec_with, other._spec_with)
        gone = self._troubles[_BAD].now.keys() - wrong.keys()
        for (event, what_to_do), found in zip(_TO_DO.items(), (wrong, unread, twice), strict=True):
            for file, why in self._troubles[event].update(found).items():
                say = log.error if event == _BAD else log.warning
                say(event, path=str(file), reason=why, action=what_to_do)
        for file in gone:
            log.info("bad cdi spec is gone", path=str(file))


async def watch_foreign_specs(settings: Settings, interval: float) -> list[ForeignSpecWatch]:
    """A watch for each of the folders that Kata reads specs from."""
    prepare()
    watches: list[ForeignSpecWatch] = []
    for folder in await cdi_folders(settings):
        watches.append(ForeignSpecWatch(folder=folder, interval=interval, others=tuple(watches)))
    return watches


async def cdi_folders(settings: Settings) -> list[Path]:
    """All folders that Kata reads specs from: ours, and the host's two; each once, whatever it is called."""
    folders = (settings.cdi_dir, settings.host_root / "var/run/cdi", settings.host_root / "etc/cdi")
    by_place: dict[str, Path] = {}
    for folder, place in zip(folders, await asyncio.gather(*map(_place_of, folders)), strict=True):
        by_place.setdefault(place, folder)
    return list(by_place.values())


async def _place_of(folder: Path) -> str:
    """Where a folder is when all links are followed, or what it is called where that does not answer."""
    try:
        async with asyncio.timeout(_PATIENCE):
            return await on_thread(os.path.realpath)(folder)
    except (OSError, TimeoutError):
        return str(folder)


def read_specs(folder: Path, before: Mapping[Path, Known[Reading]]) -> dict[Path, Known[Reading]]:
    """All specs of a CDI folder as they are now; what has not changed is not read again.

    For a thread: it may take long. Raises OSError when this process lacks something.
    """
    now = {file: _read(file, before.get(file)) for file in _specs_below(folder)}
    return {file: known for file, known in now.items() if known is not None}


def _specs_below(folder: Path) -> Iterator[Path]:
    """What Kata's libraries take for a spec: Go's in the folder alone, Rust's in sub-folders too, and also `x.YAML`."""
    for where, _, names in os.walk(folder, onerror=_pass_over):
        yield from (Path(where, name) for name in sorted(names) if name.lower().endswith((".yaml", ".json")))


def _pass_over(error: OSError) -> None:
    """A folder that is not there, or cannot be read: Kata passes over it, too."""
    if error.errno in files.NO_RESOURCES:
        raise error


def _read(file: Path, before: Known[Reading] | None) -> Known[Reading] | None:
    """One spec; None if it is not there any more. Raises OSError when this process lacks something."""
    try:
        return files.read(file, before, read_spec)
    except OSError as error:
        if error.errno in files.NO_RESOURCES:
            raise
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return Known(None, Reading(wrong="it is a dangling symlink")) if file.is_symlink() else None
        return Known(None, Reading(unread=f"it cannot be read: {error.strerror}"))
