"""Other people's CDI specs, which can fail every Kata pod of the node: found, named in the log, and never touched.

Kata's library reads all specs of the CDI folders before it looks up one device, reads versions 0.1.0 to 0.6.0 only, and
takes any field it does not know, and any device that stands twice in one folder, for an error of the whole. The other
runtimes of the node are more lenient, so nobody else may complain. `judge_specs` is pure.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import yaml

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0")
_KIND = re.compile(r"[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?/[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")
_LIMIT = 1 << 18
"""Bytes: a larger spec is not judged, since that would take minutes."""
_SETTLE = 1.0
"""Seconds after a change: whoever writes takes several steps, and nobody waits for our word about it."""

_EDITS: dict[str, frozenset[str]] = {
    "deviceNodes": frozenset(
        {"path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid"},
    ),
    "hooks": frozenset({"hookName", "path", "args", "env", "timeout"}),
    "mounts": frozenset({"hostPath", "containerPath", "options", "type"}),
}
"""Fields of the lists in `containerEdits`, as CDI 0.6.0 has them; `env` is a list of strings."""


class _Wrong(Exception):
    """What is wrong with one spec, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one spec says: the qualified names of its devices, or what is wrong with it for Kata."""

    devices: tuple[str, ...] = ()
    wrong: str | None = None


def read_spec(content: bytes) -> Reading:
    """Reads one spec as strictly as Kata's library does."""
    try:
        return Reading(devices=tuple(_devices(content)))
    except _Wrong as error:
        return Reading(wrong=str(error))


def judge_specs(readings: Mapping[Path, Reading]) -> dict[Path, str]:
    """File -> what is wrong with it, for those specs that would fail every Kata pod of the node."""
    wrong: dict[Path, str] = {}
    owners: dict[tuple[Path, str], Path] = {}
    for file, reading in sorted(readings.items()):
        if reading.wrong is not None:
            wrong[file] = reading.wrong
        for device in reading.devices:
            other = owners.setdefault((file.parent, device), file)
            if other != file:
                wrong[file] = f"device {device} stands in {other.name} too"
    return wrong


@dataclass(kw_only=True)
class NeighbourWatch:
    """Looks at all specs in `folders`, at start, when told to, and every `recheck` seconds, and logs what is wrong."""

    folders: tuple[Path, ...]
    recheck: float = 5.0
    _bell: asyncio.Event = field(default_factory=asyncio.Event)
    _said: dict[Path, str] = field(default_factory=dict)

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
                    self._report(judge_specs({file: known.reading for file, known in now.items()}))
                seen = now
            try:
                async with asyncio.timeout(self.recheck):
                    await self._bell.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(_SETTLE)

    def _report(self, wrong: dict[Path, str]) -> None:
        for file, why in wrong.items():
            if self._said.get(file) != why:
                what_to_do = "Kata fails every pod of this node until this spec is repaired, or moved out of the folder"
                log.error("bad cdi spec", path=str(file), reason=why, action=what_to_do)
        for file in self._said.keys() - wrong.keys():
            log.info("bad cdi spec is gone", path=str(file))
        self._said = wrong


@dataclass(frozen=True, slots=True)
class _Seen:
    """A spec as it was when it was read."""

    stamp: tuple[int, int, int]
    """Inode number, time of change (ns) and size in bytes: a file that has the same is not read again."""
    reading: Reading


def _look(folders: tuple[Path, ...], seen: Mapping[Path, _Seen]) -> dict[Path, _Seen]:
    """All specs as they are now. For a worker thread: reading YAML takes long. Raises OSError."""
    now = {}
    for folder in folders:
        for pattern in ("*.yaml", "*.json"):
            for file in folder.glob(pattern):
                with suppress(OSError):
                    now[file] = _look_at(file, seen.get(file))
    return now


def _look_at(file: Path, before: _Seen | None) -> _Seen:
    """One spec. Raises OSError."""
    status = file.stat()
    stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
    if before is not None and before.stamp == stamp:
        return before
    if status.st_size > _LIMIT:
        return _Seen(stamp, Reading())
    with file.open("rb") as opened:
        return _Seen(stamp, read_spec(opened.read(_LIMIT)))


def _devices(content: bytes) -> list[str]:
    """The qualified names of a spec's devices. Raises `_Wrong`."""
    try:
        spec = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _Wrong(f"it is no YAML or JSON: {' '.join(str(error).split())[:200]}") from None
    _check_fields(spec, {"cdiVersion", "kind", "devices", "containerEdits", "annotations"}, "the spec")
    version, kind = spec.get("cdiVersion"), spec.get("kind")
    if version not in _VERSIONS:
        raise _Wrong(f"cdiVersion is {version!r}, and Kata reads 0.1.0 to 0.6.0")
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise _Wrong(f"kind is {kind!r}, which is not vendor/class")
    _check_edits(spec.get("containerEdits"), "the spec")
    listed = spec.get("devices")
    if not isinstance(listed, list) or not listed:
        raise _Wrong("it has no devices")
    names = [_device_name(device) for device in listed]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _Wrong(f"device {twice!r} stands in it twice")
    return [f"{kind}={name}" for name in names]


def _device_name(device: Any) -> str:
    _check_fields(device, {"name", "containerEdits", "annotations"}, "a device")
    name = device.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _Wrong(f"{name!r} is no valid device name")
    if "containerEdits" not in device:
        raise _Wrong(f"device {name!r} has no containerEdits")
    _check_edits(device["containerEdits"], f"device {name!r}")
    return name


def _check_edits(edits: Any, where: str) -> None:
    if edits is None:
        return
    _check_fields(edits, {"env", *_EDITS}, f"containerEdits of {where}")
    for name, allowed in _EDITS.items():
        entries = edits.get(name) or []
        if not isinstance(entries, list):
            raise _Wrong(f"{name} of {where} is no list")
        for entry in entries:
            _check_fields(entry, allowed, f"{name} of {where}")


def _check_fields(value: Any, allowed: set[str] | frozenset[str], where: str) -> None:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is not a table of fields")
    unknown = sorted(str(key) for key in value.keys() - allowed)
    if unknown:
        raise _Wrong(f"{where} has the field {unknown[0]!r}, which CDI 0.6.0 does not know")
