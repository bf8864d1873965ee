"""What makes a CDI spec bad for Kata: pure, from the bytes of the files to words.

Kata's libraries (Go, and Rust in runtime-rs) read versions 0.1.0 to 0.6.0 only, and a field that they do not know, or a
device that is in two specs of one folder, is an error of the whole. A spec is bad when either library refuses it.
`neighbours` looks for the files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from sandbox_plugin.outputs.cdi_owner import is_marked
from sandbox_plugin.outputs.spec_text import NotYaml, Scalar, Undecided, Value, parse, quoted

_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0")
_KIND = re.compile(r"[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?/[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")
_LABEL = "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_ANNOTATION = re.compile(
    rf"((?=.{{1,253}}/){_LABEL}(\.{_LABEL})*/)?[a-z0-9]([a-z0-9_.-]{{0,61}}[a-z0-9])?", re.IGNORECASE
)
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+)")
"""What is a whole number for both libraries."""


_LONGEST_KIND = 512
"""Characters; each device's qualified name has the kind in it. A resource's name has 308 at most."""


class _Wrong(Exception):
    """What is wrong with one spec, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one spec says: the qualified names of its devices, or what is wrong with it for Kata."""

    devices: tuple[str, ...] = ()
    """Where the libraries read a name differently (`on` is `true` for Go), both."""
    wrong: str | None = None
    unread: str | None = None
    """Why this process cannot tell; Kata, as root on the host, may well be able to read it."""
    ours: bool = False
    """Whether this plugin wrote it: of two specs with one device the other is to go."""


def read_spec(content: bytes) -> Reading:
    """Reads one spec as strictly as Kata's libraries do."""
    ours = is_marked(content)
    try:
        return Reading(devices=tuple(_devices(parse(content))), ours=ours)
    except (NotYaml, _Wrong) as error:
        return Reading(wrong=str(error), ours=ours)
    except Undecided as error:
        return Reading(unread=str(error), ours=ours)


def judge_specs(readings: Mapping[Path, Reading]) -> dict[Path, str]:
    """File -> what is wrong with it, for those specs of one CDI folder, sub-folders included, that fail every Kata pod.

    The same device in two CDI folders is not a fault: the later folder's counts.
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


# One spec


def _devices(spec: Value) -> list[str]:
    """The qualified names of a spec's devices. Raises `_Wrong` and `Undecided`."""
    if _is_absent(spec):
        raise _Wrong("it is empty")
    fields = _fields(spec, {"cdiVersion", "kind", "devices", "containerEdits", "annotations"}, "the spec")
    version, kind = _version(fields.get("cdiVersion")), _kind(fields.get("kind"))
    needs = _Needs()
    if "." in kind.partition("/")[2]:
        needs.note("0.6.0", "a class with a dot")
    _check_annotations(fields, "the spec", needs)
    _check_edits(fields.get("containerEdits"), "the spec", needs)
    names = _device_names(fields.get("devices"), needs)
    if version < needs.version:
        raise _Wrong(f"cdiVersion is {version}, and {needs.why} needs {needs.version}")
    if len(kind) > _LONGEST_KIND:
        raise Undecided(f"its kind has {len(kind)} characters, and no more than {_LONGEST_KIND} are looked at")
    return [f"{kind}={name}" for scalar in names for name in dict.fromkeys((scalar.text, scalar.in_go))]


def _version(value: Value | None) -> str:
    if value is None:
        raise _Wrong("it has no cdiVersion")
    version = (_string(value) or "").removeprefix("v")
    if version not in _VERSIONS:
        raise _Wrong(f"cdiVersion is {_shown(value)}, and Kata reads 0.1.0 to 0.6.0")
    return version


def _kind(value: Value | None) -> str:
    if value is None:
        raise _Wrong("it has no kind")
    kind = _string(value) or ""
    if not _KIND.fullmatch(kind):
        raise _Wrong(f"kind is {_shown(value)}, which is not vendor/class")
    if any(len(part) == 1 for part in kind.split("/")):  # Go's library panics
        raise _Wrong(f"kind is {_shown(value)}, and Kata fails at a vendor or a class of one letter")
    return kind


def _device_names(devices: Value | None, needs: _Needs) -> list[Scalar]:
    if not isinstance(devices, list) or not devices:
        raise _Wrong("it has no devices")
    names = [_device_name(device, needs) for device in devices]
    for each in ([name.text for name in names], [name.in_go for name in names]):
        [(name, times)] = Counter(each).most_common(1)
        if times > 1:
            raise _Wrong(f"device {quoted(name)} is listed twice")
    return names


@dataclass
class _Needs:
    """The lowest version that has what a spec uses, and what that is (`MinimumRequiredVersion` of CDI)."""

    version: str = _VERSIONS[0]
    why: str = ""

    def note(self, version: str, why: str) -> None:
        if version > self.version:
            self.version, self.why = version, why


def _device_name(device: Value, needs: _Needs) -> Scalar:
    fields = _fields(device, {"name", "containerEdits", "annotations"}, "a device")
    name = fields.get("name")
    if name is None:
        raise _Wrong("a device has no name")
    if not isinstance(name, Scalar) or not all(_NAME.fullmatch(text) for text in (name.text, name.in_go)):
        raise _Wrong(f"{_shown(name)} is not a valid device name")
    where = f"device {quoted(name.text)}"
    if not (name.text[0].isalpha() and name.in_go[0].isalpha()):
        needs.note("0.5.0", f"device name {quoted(name.text)} (does not start with a letter)")
    _check_annotations(fields, where, needs)
    edits = fields.get("containerEdits")
    _check_edits(edits, where, needs)
    if not isinstance(edits, dict) or not any(isinstance(entries, list) and entries for entries in edits.values()):
        raise _Wrong(f"{where} has no containerEdits")
    return name


def _check_annotations(part: Mapping[str, Value], where: str, needs: _Needs) -> None:
    annotations = part.get("annotations")
    if annotations is None or annotations == Scalar("", plain=True):  # `null` and `~` are refused by Rust, this is not
        return
    if not isinstance(annotations, dict) or not all(isinstance(value, Scalar) for value in annotations.values()):
        raise _Wrong(f"annotations of {where} is not a mapping of strings")
    for key in annotations:
        if not _ANNOTATION.fullmatch(key):
            raise _Wrong(f"annotations of {where} has the invalid key {quoted(key)}")
        needs.note("0.6.0", "an annotation")


# What containerEdits may hold


@dataclass(frozen=True, slots=True)
class _Field:
    """What a field may hold; one that is not needed may be left out, or be null."""

    what: str
    is_right: Callable[[Value], bool]
    needed: bool = False


def _string(value: Value | None) -> str | None:
    """A scalar in a string field; None for null and for anything else."""
    return value.text if isinstance(value, Scalar) and not value.is_null else None


def _one_of(*texts: str) -> Callable[[Value], bool]:
    return lambda value: _string(value) in texts


def _number(low: int, high: int) -> Callable[[Value], bool]:
    def is_right(value: Value) -> bool:
        return (
            isinstance(value, Scalar)
            and value.plain
            and len(value.text) <= 80  # longer ones are out of range, and Python refuses to read very long ones
            and _NUMBER.fullmatch(value.text) is not None
            and low <= int(value.text, 0) < high
            and not (low == 0 and value.text.startswith("-"))  # Rust refuses -0 there
        )

    return is_right


def _is_strings(value: Value) -> bool:
    return isinstance(value, list) and all(isinstance(each, Scalar) for each in value)


def _is_environment(value: Value) -> bool:
    return isinstance(value, list) and all((_string(each) or "").find("=") > 0 for each in value)


def _is_permissions(value: Value) -> bool:
    return isinstance(value, Scalar) and set(value.text) <= set("rwm")


_HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_PATH = _Field("a path", lambda value: bool(_string(value)), needed=True)
_STRING = _Field("a string", lambda value: isinstance(value, Scalar))
_STRINGS = _Field("a list of strings", _is_strings)
_INT64 = _Field("a whole number of 64 bits", _number(-(1 << 63), 1 << 63))
_UINT32 = _Field("a whole number from 0 to 4294967295", _number(0, 1 << 32))
_ENVIRONMENT = _Field("a list of NAME=value", _is_environment)
_EDITS: dict[str, dict[str, _Field]] = {
    "deviceNodes": {
        "path": _PATH,
        "hostPath": _STRING,
        "type": _Field("b, c, u or p", _one_of("", "b", "c", "u", "p")),
        "major": _INT64,
        "minor": _INT64,
        "fileMode": _UINT32,
        "permissions": _Field("letters of rwm", _is_permissions),
        "uid": _UINT32,
        "gid": _UINT32,
    },
    "hooks": {
        "hookName": _Field(f"one of {', '.join(_HOOKS)}", _one_of(*_HOOKS), needed=True),
        "path": _PATH,
        "args": _STRINGS,
        "env": _ENVIRONMENT,
        "timeout": _INT64,
    },
    "mounts": {"hostPath": _PATH, "containerPath": _PATH, "options": _STRINGS, "type": _STRING},
}
"""Fields of the lists in `containerEdits`, as CDI 0.6.0 has them."""


def _check_edits(edits: Value | None, where: str, needs: _Needs) -> None:
    if _is_absent(edits):
        return
    fields = _fields(edits, {"env", *_EDITS}, f"containerEdits of {where}")
    environment = fields.get("env")
    if environment is not None and not _is_absent(environment) and not _ENVIRONMENT.is_right(environment):
        raise _Wrong(f"env of {where} is not {_ENVIRONMENT.what}")
    for name, known in _EDITS.items():
        entries = fields.get(name)
        if _is_absent(entries):
            continue
        if not isinstance(entries, list):
            raise _Wrong(f"{name} of {where} is not a list")
        for entry in entries:
            read = _check_entry(entry, known, f"{name} of {where}")
            if name == "deviceNodes" and _string(read.get("hostPath")):
                needs.note("0.5.0", "a device node with a hostPath")
            if name == "mounts" and _string(read.get("type")):
                needs.note("0.4.0", "a mount with a type")


def _check_entry(entry: Value, known: Mapping[str, _Field], where: str) -> dict[str, Value]:
    fields = _fields(entry, known.keys(), where)
    for key, its in known.items():
        value = fields.get(key)
        if value is None or _is_absent(value):
            if its.needed:
                raise _Wrong(f"{where} has no {key}")
        elif not its.is_right(value):
            found = f"{key} {_shown(value)}, which is" if isinstance(value, Scalar) else f"{key} that is"
            raise _Wrong(f"{where} has {found} not {its.what}")
    return fields


def _fields(value: Value | None, allowed: Set[str], where: str) -> dict[str, Value]:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is not a mapping")
    if unknown := sorted(value.keys() - allowed):
        raise _Wrong(f"{where} has the field {quoted(unknown[0])}, which CDI 0.6.0 does not know")
    return value


def _is_absent(value: Value | None) -> bool:
    return value is None or (isinstance(value, Scalar) and value.is_null)


def _shown(value: Value) -> str:
    if not isinstance(value, Scalar):
        return "a list" if isinstance(value, list) else "a mapping"
    return quoted(value.text)
