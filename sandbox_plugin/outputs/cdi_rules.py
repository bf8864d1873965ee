"""What makes a CDI spec bad for Kata: pure, from the bytes of the files to words.

Kata's libraries (Go, and Rust in runtime-rs) read versions 0.1.0 to 0.6.0 only, and take any field that they do not
know, and any device that stands twice in one folder, for an error of the whole. A spec is bad when either library
refuses it. Apart from `neighbours`, which looks after the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sandbox_plugin.outputs.cdi import is_marked

_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0")
_KIND = re.compile(r"[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?/[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")
_ANNOTATION = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?", re.IGNORECASE)


class _Wrong(Exception):
    """What is wrong with one spec, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one spec says: the qualified names of its devices, or what is wrong with it for Kata."""

    devices: tuple[str, ...] = ()
    wrong: str | None = None
    unread: str | None = None
    """Why this process cannot tell; Kata, as root on the host, may read it well."""
    ours: bool = False
    """Whether this plugin wrote it: of two specs with one device the other is to go."""


def read_spec(content: bytes) -> Reading:
    """Reads one spec as strictly as Kata's libraries do."""
    try:
        return Reading(devices=tuple(_devices(content)), ours=is_marked(content))
    except _Wrong as error:
        return Reading(wrong=str(error), ours=is_marked(content))


def judge_specs(readings: Mapping[Path, Reading]) -> dict[Path, str]:
    """File -> what is wrong with it, for those specs that would fail every Kata pod of the node.

    The same device in two folders is no fault: the later folder's counts.
    """
    wrong: dict[Path, str] = {}
    owners: dict[tuple[Path, str], Path] = {}
    for file, reading in sorted(readings.items(), key=lambda each: (not each[1].ours, each[0])):
        if reading.wrong is not None:
            wrong[file] = reading.wrong
        for device in reading.devices:
            other = owners.setdefault((file.parent, device), file)
            if other != file:
                wrong.setdefault(file, f"device {device} stands in {other.name} too")
    return wrong


# One spec


def _devices(content: bytes) -> list[str]:
    """The qualified names of a spec's devices. Raises `_Wrong`."""
    spec = _parse(content)
    _check_fields(spec, {"cdiVersion", "kind", "devices", "containerEdits", "annotations"}, "the spec")
    version, kind = spec.get("cdiVersion"), spec.get("kind")
    if not isinstance(version, str) or version.removeprefix("v") not in _VERSIONS:
        raise _Wrong(f"cdiVersion is {version!r}, and Kata reads 0.1.0 to 0.6.0")
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise _Wrong(f"kind is {kind!r}, which is not vendor/class")
    _check_annotations(spec, "the spec")
    if spec.get("containerEdits") is not None:
        _check_edits(spec["containerEdits"], "the spec")
    listed = spec.get("devices")
    if not isinstance(listed, list) or not listed:
        raise _Wrong("it has no devices")
    names = [_device_name(device) for device in listed]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _Wrong(f"device {twice!r} stands in it twice")
    needed, why = _needed_version(spec)
    if version.removeprefix("v") < needed:
        raise _Wrong(f"cdiVersion is {version}, and {why} needs {needed}")
    return [f"{kind}={name}" for name in names]


def _device_name(device: Any) -> str:
    _check_fields(device, {"name", "containerEdits", "annotations"}, "a device")
    name = device.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _Wrong(f"{name!r} is no valid device name")
    _check_annotations(device, f"device {name!r}")
    edits = device.get("containerEdits")
    if edits is not None:
        _check_edits(edits, f"device {name!r}")
    if not edits or not any(edits.values()):
        raise _Wrong(f"device {name!r} has no containerEdits")
    return name


def _needed_version(spec: dict[str, Any]) -> tuple[str, str]:
    """The lowest version that has what this spec uses, and what that is (`MinimumRequiredVersion` of CDI)."""
    parts = [spec, *spec["devices"]]
    edits = [part.get("containerEdits") or {} for part in parts]
    if any(part.get("annotations") for part in parts):
        return "0.6.0", "an annotation"
    if "." in spec["kind"].partition("/")[2]:
        return "0.6.0", "a class with a dot"
    if any(node.get("hostPath") for each in edits for node in each.get("deviceNodes") or []):
        return "0.5.0", "a device node with a hostPath"
    for device in spec["devices"]:
        if not device["name"][0].isalpha():
            return "0.5.0", f"device name {device['name']!r}, which begins with no letter,"
    if any(mount.get("type") for each in edits for mount in each.get("mounts") or []):
        return "0.4.0", "a mount with a type"
    return "0.1.0", ""


def _check_annotations(part: dict[str, Any], where: str) -> None:
    if "annotations" not in part:
        return
    annotations = part["annotations"]
    if not isinstance(annotations, dict):
        raise _Wrong(f"annotations of {where} is not a table of texts")
    for key, value in annotations.items():
        if not isinstance(key, str) or not _ANNOTATION.fullmatch(key) or not isinstance(value, str):
            raise _Wrong(f"annotations of {where} has {key!r}: {value!r}, which is no annotation")


# What containerEdits may hold


@dataclass(frozen=True, slots=True)
class _Field:
    """What may stand in a field; one that is not needed may be left out, or be null."""

    what: str
    is_right: Callable[[Any], bool]
    needed: bool = False


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_PATH = _Field("a path", lambda value: isinstance(value, str) and value != "", needed=True)
_TEXT = _Field("text", lambda value: isinstance(value, str))
_TEXTS = _Field("a list of texts", _is_texts)
_NUMBER = _Field("a whole number", _is_number)
_COUNT = _Field("a whole number from 0", lambda value: _is_number(value) and 0 <= value < 1 << 32)
_ENVIRONMENT = _Field(
    "a list of NAME=value", lambda value: _is_texts(value) and all(each.find("=") > 0 for each in value)
)
_EDITS: dict[str, dict[str, _Field]] = {
    "deviceNodes": {
        "path": _PATH,
        "hostPath": _TEXT,
        "type": _Field("b, c, u or p", lambda value: value in ("", "b", "c", "u", "p")),
        "major": _NUMBER,
        "minor": _NUMBER,
        "fileMode": _COUNT,
        "permissions": _Field("letters of rwm", lambda value: isinstance(value, str) and set(value) <= set("rwm")),
        "uid": _COUNT,
        "gid": _COUNT,
    },
    "hooks": {
        "hookName": _Field(f"one of {', '.join(_HOOKS)}", lambda value: value in _HOOKS, needed=True),
        "path": _PATH,
        "args": _TEXTS,
        "env": _ENVIRONMENT,
        "timeout": _NUMBER,
    },
    "mounts": {"hostPath": _PATH, "containerPath": _PATH, "options": _TEXTS, "type": _TEXT},
}
"""Fields of the lists in `containerEdits`, as CDI 0.6.0 has them."""


def _check_edits(edits: Any, where: str) -> None:
    _check_fields(edits, {"env", *_EDITS}, f"containerEdits of {where}")
    if edits.get("env") is not None and not _ENVIRONMENT.is_right(edits["env"]):
        raise _Wrong(f"env of {where} is not {_ENVIRONMENT.what}")
    for name, fields in _EDITS.items():
        entries = edits.get(name)
        if entries is None:
            continue
        if not isinstance(entries, list):
            raise _Wrong(f"{name} of {where} is no list")
        for entry in entries:
            _check_entry(entry, fields, f"{name} of {where}")


def _check_entry(entry: Any, fields: dict[str, _Field], where: str) -> None:
    _check_fields(entry, fields.keys(), where)
    for key, known in fields.items():
        value = entry.get(key)
        if value is None:
            if known.needed:
                raise _Wrong(f"{where} has no {key}")
        elif not known.is_right(value):
            raise _Wrong(f"{where} has {key} {value!r}, which is not {known.what}")


def _check_fields(value: Any, allowed: Set[str], where: str) -> None:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is not a table of fields")
    unknown = sorted(str(key) for key in value.keys() - allowed)
    if unknown:
        raise _Wrong(f"{where} has the field {unknown[0]!r}, which CDI 0.6.0 does not know")


# Text into values


def _parse(content: bytes) -> Any:
    """JSON or YAML 1.2 into values. Raises `_Wrong`."""
    if content.lstrip()[:1] == b"{":
        with suppress(ValueError, RecursionError):  # the YAML reader has the better words, and knows more than JSON
            return json.loads(content, object_pairs_hook=_table)
    try:
        return yaml.load(content, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _Wrong(f"it is no YAML or JSON: {' '.join(str(error).split())[:200]}") from None


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Wrong(f"the field {twice!r} stands twice in one table")
    return table


class _Loader(yaml.SafeLoader):
    """YAML 1.2, as both libraries read it: for PyYAML's own 1.1 `0:1` is a number and `on` is true, where names stand.

    A key that stands twice is an error.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - that is how PyYAML takes it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        table = super().construct_mapping(node, deep)
        if len(table) != len(node.value):
            keys = [str(key.value) for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), keys[0])
            raise _Wrong(f"the field {twice!r} stands twice in one table")
        return table


for _tag, _form, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), _first)
