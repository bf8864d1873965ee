"""What makes a CDI spec bad for Kata: pure, from the bytes of the files of a folder to words.

Kata's libraries, Go's and Rust's (runtime-rs), read every spec before they look up one device, and one that either
refuses fails every pod of the node. Found is what happens: no YAML, a version or a field that they do not know, bad
names, no devices, a device twice. Rules of the format: CDI specification 0.6.0. That a node does not exist is no fault
here: it fails only the pods that use its device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sandbox_plugin.cdi.render import is_marked, read_rendered
from sandbox_plugin.cdi.text import NotRead, NotYaml, load

_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0")
_WORD = r"[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]"
"""A vendor or a class: at one of a single letter Kata's Go library panics."""
_KIND = re.compile(f"{_WORD}/{_WORD}")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")

_EDITS = {
    "env": None,
    "deviceNodes": [
        dict.fromkeys(("path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid"))
    ],
    "hooks": [dict.fromkeys(("hookName", "path", "args", "env", "timeout"))],
    "mounts": [dict.fromkeys(("hostPath", "containerPath", "options", "type"))],
}
_PART = {"annotations": None, "containerEdits": _EDITS}
_SPEC = _PART | {"cdiVersion": None, "kind": None, "devices": [_PART | {"name": None}]}
"""The fields that Kata knows, and what each holds: such a mapping, a list of such mappings, or (None) any value."""


class _Wrong(Exception):
    """What is wrong with one spec, in words."""


class Reading(NamedTuple):
    """What one spec says, or what is wrong with it for Kata."""

    kind: str | None = None
    """Whatever else is wrong. None: it has none, or cannot be read."""
    devices: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Qualified name -> the paths of its nodes."""
    wrong: str | None = None
    unread: str | None = None
    """Why this process cannot tell; Kata, as root on the host, may well be able to read it."""
    ours: bool = False
    """Whether this plugin wrote it: of two specs with one device the other is to go."""


def read_spec(content: bytes) -> Reading:
    """Reads one spec as Kata's libraries do."""
    ours = is_marked(content)
    kind: str | None = None
    try:
        spec = read_rendered(content) or load(content)
        if isinstance(spec, dict) and isinstance(spec.get("kind"), str):
            kind = spec["kind"]
        return Reading(kind=kind, devices=_devices(spec), ours=ours)
    except (NotYaml, _Wrong) as error:
        return Reading(kind=kind, wrong=str(error), ours=ours)
    except NotRead as error:
        return Reading(unread=str(error), ours=ours)


def lint(readings: Mapping[Path, Reading]) -> dict[Path, str]:
    """File -> what is wrong with it, for those specs of one CDI folder, sub-folders included, that fail every Kata pod.

    The same device in two CDI folders is not a fault of this kind: one of the two counts.
    """
    wrong: dict[Path, str] = {}
    owners: dict[str, Path] = {}
    for file, reading in sorted(readings.items(), key=lambda each: (not each[1].ours, each[0])):
        if reading.wrong is not None:
            wrong[file] = reading.wrong
        for device in reading.devices:
            other = owners.setdefault(device, file)
            if other != file:
                where = other.name if other.parent == file.parent else other
                wrong.setdefault(file, f"device {device} is in {where} too")
    return wrong


def in_two_folders(here: Mapping[str, Path], there: Mapping[str, Path]) -> dict[Path, str]:
    """Spec of this folder -> which of its devices is in a spec of the other folder too. Both are device -> its spec."""
    return {
        here[device]: f"device {device} is in {there[device]} too: Kata's Go runtime takes it from /var/run/cdi, "
        "runtime-rs from /etc/cdi"
        for device in sorted(here.keys() & there.keys(), reverse=True)
    }


def _devices(spec: Any) -> dict[str, tuple[str, ...]]:
    """What `Reading.devices` says. Raises `_Wrong`."""
    if spec is None:
        raise _Wrong("it is empty")
    if not isinstance(spec, dict):
        raise _Wrong("it is not a mapping")
    stated = spec.get("cdiVersion")
    version = str(stated).removeprefix("v")
    if version not in _VERSIONS:  # first: newer ones have more fields
        raise _Wrong(f"cdiVersion is {stated!r:.80}: Kata reads 0.1.0 to 0.6.0, its runtime-rs alone up to 1.1.0")
    _check_fields(spec, _SPEC, "")
    kind = spec.get("kind")
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise _Wrong(f"kind is {kind!r:.80}, which is not vendor/class, two characters each and a letter first")
    nodes: dict[str, tuple[str, ...]] = {}
    for device in spec.get("devices") or ():
        name, paths = _device(device or {})
        if f"{kind}={name}" in nodes:
            raise _Wrong(f"device {name!r:.80} is listed twice")
        if name[0].isdigit() and version < "0.5.0":
            raise _Wrong(f"cdiVersion is {version}, and device name {name!r:.80} (starts with a digit) needs 0.5.0")
        nodes[f"{kind}={name}"] = paths
    if not nodes:
        raise _Wrong("it has no devices")
    return nodes


def _device(device: Any) -> tuple[str, tuple[str, ...]]:
    """The name of a device and the paths of its nodes. Raises `_Wrong`."""
    name, edits = device.get("name"), device.get("containerEdits") or {}
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _Wrong(f"{name!r:.80} is not a valid device name")
    if not any(edits.values()):
        raise _Wrong(f"device {name!r:.80} has no containerEdits")
    paths: tuple[Any, ...] = tuple((node or {}).get("path") for node in edits.get("deviceNodes") or ())
    if not all(path and isinstance(path, str) for path in paths):
        raise _Wrong(f"device {name!r:.80} has a node without a path")
    return name, paths


def _check_fields(value: Any, known: Any, where: str) -> None:
    """Raises `_Wrong` unless the value has no other fields than are known (see `_SPEC`)."""
    if value is None or known is None:
        return
    if isinstance(known, list):
        if not isinstance(value, list):
            raise _Wrong(f"{where} is not a list")
        for number, entry in enumerate(value):
            _check_fields(entry, known[0], f"{where}[{number}]")
        return
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is not a mapping")
    for name, below in value.items():
        if name not in known:
            raise _Wrong(f"{where or 'the spec'} has the field {name!r:.80}, which CDI 0.6.0 does not know")
        _check_fields(below, known[name], f"{where}.{name}".lstrip("."))
