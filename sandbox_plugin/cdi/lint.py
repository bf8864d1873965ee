"""What makes a CDI spec bad for Kata: pure, from the bytes of the files of a folder to words.

Kata's libraries, Go's and Rust's (runtime-rs), read every spec before they look up one device, and one that either
refuses fails every pod of the node. Found is what happens: broken YAML, a version or a field that they do not know,
values of the wrong type, names. Where the two differ about YAML itself, nothing is said. Rules of the format: CDI
specification 0.6.0. That a node does not exist is no fault here: it fails only the pods that use its device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox_plugin.cdi.owner import is_marked
from sandbox_plugin.cdi.text import NotRead, NotYaml, Value, load, quoted

_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0")
_RUST_ALONE = ("0.7.0", "0.8.0", "1.0.0", "1.1.0")
"""What runtime-rs reads too, since Kata 4.0."""
_KIND = re.compile(r"[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?/[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_LONGEST_KIND = 512
"""Characters; each device's qualified name has the kind in it. A resource's name has 308 at most."""
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")


class _Wrong(Exception):
    """What is wrong with one spec, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one spec says, or what is wrong with it for Kata."""

    devices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Qualified name -> the paths of its nodes."""
    wrong: str | None = None
    unread: str | None = None
    """Why this process cannot tell; Kata, as root on the host, may well be able to read it."""
    ours: bool = False
    """Whether this plugin wrote it: of two specs with one device the other is to go."""


def read_spec(content: bytes) -> Reading:
    """Reads one spec as Kata's libraries do."""
    ours = is_marked(content)
    try:
        return Reading(devices=_devices(load(content)), ours=ours)
    except (NotYaml, _Wrong) as error:
        return Reading(wrong=str(error), ours=ours)
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


# What fields there are, and what they hold: a mapping, a list of what stands in the list, a type, or text of a form.
# One that is needed has a `!`; any other may be left out, or be null.

_EDITS = {
    "env": ["[^=]+=.*"],
    "deviceNodes": [
        {"path!": ".+", "hostPath": ".*", "type": "[bcup]?", "permissions": "[rwm]*"}
        | dict.fromkeys(("major", "minor", "fileMode", "uid", "gid"), int)
    ],
    "hooks": [
        {"hookName!": "prestart|createRuntime|createContainer|startContainer|poststart|poststop", "path!": ".+"}
        | {"args": [".*"], "env": ["[^=]+=.*"], "timeout": int}
    ],
    "mounts": [{"hostPath!": ".+", "containerPath!": ".+", "options": [".*"], "type": ".*"}],
}
_PART = {"annotations": dict, "containerEdits": _EDITS}
_SPEC = _PART | {"cdiVersion!": ".+", "kind!": ".+", "devices": [_PART | {"name!": ".+"}]}


def _check(value: Value, wanted: Any, where: str) -> None:
    """Raises `_Wrong` unless the value is as the table wants it."""
    if value is None:
        return
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            raise _Wrong(f"{where or 'the spec'} is not a mapping")
        fields = {key.rstrip("!"): (below, f"{where}.{key}".strip(".!")) for key, below in wanted.items()}
        if unknown := sorted(value.keys() - fields.keys()):
            raise _Wrong(f"{where or 'the spec'} has the field {quoted(unknown[0])}, which CDI 0.6.0 does not know")
        for key, (below, its) in fields.items():
            if value.get(key) is None and f"{key}!" in wanted:
                raise _Wrong(f"{its} is missing")
            _check(value.get(key), below, its)
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            raise _Wrong(f"{where} is not a list")
        for number, entry in enumerate(value):
            _check({} if entry is None and wanted[0] != ".*" else entry, wanted[0], f"{where}[{number}]")
    elif isinstance(wanted, type):
        if not isinstance(value, wanted):
            raise _Wrong(f"{where} is {quoted(value)}, and not a {'whole number' if wanted is int else 'mapping'}")
    elif not isinstance(value, str | int) or not re.fullmatch(wanted, str(value), re.DOTALL):
        raise _Wrong(f"{where} is {quoted(value)}, which is not of the form {wanted}")


# One spec


def _devices(spec: Any) -> dict[str, tuple[str, ...]]:
    """What `Reading.devices` says. Raises `_Wrong` and `NotRead`."""
    if spec is None:
        raise _Wrong("it is empty")
    version = _version(spec.get("cdiVersion")) if isinstance(spec, dict) else ""  # first: newer ones have more fields
    _check(spec, _SPEC, "")
    kind = _kind(spec["kind"])
    if not spec.get("devices"):
        raise _Wrong("it has no devices")
    nodes: dict[str, tuple[str, ...]] = {}
    for device in spec["devices"]:
        name, edits = str(device["name"]), device.get("containerEdits") or {}
        if not _NAME.fullmatch(name):
            raise _Wrong(f"{quoted(name)} is not a valid device name")
        if f"{kind}={name}" in nodes:
            raise _Wrong(f"device {quoted(name)} is listed twice")
        if not any(edits.values()):
            raise _Wrong(f"device {quoted(name)} has no containerEdits")
        nodes[f"{kind}={name}"] = tuple(str(node["path"]) for node in edits.get("deviceNodes") or ())
    needed, why = max(_needs(spec))
    if version < needed:
        raise _Wrong(f"cdiVersion is {version}, and {why} needs {needed}")
    return nodes


def _version(value: Value) -> str:
    version = str(value or "").removeprefix("v")
    if version in _RUST_ALONE:
        what = "which runtime-rs reads since Kata 4.0, and Kata's Go runtime, which reads 0.1.0 to 0.6.0, does not"
        raise _Wrong(f"cdiVersion is {quoted(value)}, {what}")
    if value is not None and version not in _VERSIONS:
        raise _Wrong(f"cdiVersion is {quoted(value)}, and Kata reads 0.1.0 to 0.6.0")
    return version


def _kind(value: Value) -> str:
    kind = str(value)
    if not _KIND.fullmatch(kind):
        raise _Wrong(f"kind is {quoted(value)}, which is not vendor/class, each beginning with a letter")
    if any(len(part) == 1 for part in kind.split("/")):  # Go's library panics
        raise _Wrong(f"kind is {quoted(value)}, and Kata fails at a vendor or a class of one letter")
    if len(kind) > _LONGEST_KIND:
        raise NotRead(f"its kind has {len(kind)} characters, and no more than {_LONGEST_KIND} are looked at")
    return kind


def _needs(spec: Any) -> list[tuple[str, str]]:
    """Version and why, for what needs one (`MinimumRequiredVersion` of CDI)."""
    devices = spec["devices"]
    every_edits = [part["containerEdits"] for part in (spec, *devices) if part.get("containerEdits")]
    nodes = [node for edits in every_edits for node in edits.get("deviceNodes") or ()]
    mounts = [mount for edits in every_edits for mount in edits.get("mounts") or ()]
    digits = [name for device in devices if not (name := str(device["name"]))[0].isalpha()]
    uses = {
        ("0.6.0", "a class with a dot"): "." in spec["kind"].partition("/")[2],
        ("0.6.0", "an annotation"): any(part.get("annotations") for part in (spec, *devices)),
        ("0.5.0", "a device node with a hostPath"): any(node.get("hostPath") for node in nodes),
        ("0.5.0", f"device name {quoted(min(digits, default=''))} (does not start with a letter)"): bool(digits),
        ("0.4.0", "a mount with a type"): any(mount.get("type") for mount in mounts),
    }
    return [("", ""), *(need for need, is_used in uses.items() if is_used)]
