"""A reader of CDI specs as strict as Kata's, the Go and the Rust one at once: what either refuses, it refuses.

Apart from the package, and sharing no line with it: rules of the CDI specification (SPEC.md, versions 0.1.0 to 0.6.0),
read from YAML node by node, and what the two libraries make of YAML, tried with them. What the daemon writes is held
against it, and what the daemon says of others as well.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

VERSIONS = {"0.1.0": 1, "0.2.0": 2, "0.3.0": 3, "0.4.0": 4, "0.5.0": 5, "0.6.0": 6}
_WORD = r"[A-Za-z][\w.-]*[A-Za-z0-9]"
"""Of two characters at least: Go's library panics at a vendor or class of one."""
_NAME = r"[A-Za-z0-9]([\w.:-]*[A-Za-z0-9])?"
_DEEP_ENOUGH = 6
"""Folders within folders: a link that leads back to where it is would be followed some forty times."""


_PATIENCE = 20.0
"""Seconds that one look at a folder may take."""


class Refused(Exception):
    """Kata would refuse the spec, and with it every pod of the node. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a spec says of its devices."""

    version: str
    kind: str
    devices: Mapping[str, tuple[str, ...]]
    """Device name -> the host's paths of its nodes. A name that Go reads differently is there twice."""
    plain: bool
    """Whether it has nothing but devices, and they nothing but nodes, and those nothing but a path."""


def read_spec(content: bytes | str) -> Spec:
    """Reads one spec. Raises `Refused`."""
    spec = _fields(_parse(content), "the spec", may={"cdiVersion", "kind", "devices", "containerEdits", "annotations"})
    version = _text(spec.get("cdiVersion"), "cdiVersion").removeprefix("v")
    if version not in VERSIONS:
        raise Refused(f"version {version!r}")
    kind = _text(spec.get("kind"), "kind")
    if not re.fullmatch(rf"{_WORD}/{_WORD}", kind, re.ASCII):
        raise Refused(f"kind {kind!r}")
    needed = {6 if "." in kind.split("/")[1] else 1, _annotations(spec)}
    needed.add(_edits(spec.get("containerEdits"), "the spec"))
    devices: dict[str, tuple[str, ...]] = {}
    for entry in _list(spec.get("devices"), "devices"):
        device = _fields(entry, "a device", may={"name", "containerEdits", "annotations"})
        plain = device.get("name")
        names = dict.fromkeys((_text(plain, "a device's name"), _in_go(plain)))
        edits = device.get("containerEdits")
        needed |= {_annotations(device), _edits(edits, str(plain))}
        if not isinstance(edits, dict) or not any(_list(part, "edits") for part in edits.values()):
            raise Refused(f"device {plain!r} changes nothing")
        nodes = tuple(_given(node, "hostPath") or node["path"] for node in _list(edits.get("deviceNodes"), "nodes"))
        for name in names:
            if not re.fullmatch(_NAME, name, re.ASCII):
                raise Refused(f"device name {name!r}")
            if name in devices:
                raise Refused(f"device {name!r} twice")
            needed.add(1 if name[0].isalpha() else 5)
        for name in names:
            devices[name] = nodes
    if not devices:
        raise Refused("no devices")
    if max(needed) > VERSIONS[version]:
        raise Refused(f"it needs version 0.{max(needed)}.0 and says {version}")
    return Spec(version=version, kind=kind, devices=devices, plain=_is_plain(spec))


def read_folder(folder: Path, node_exists: Callable[[str], bool] = lambda path: True) -> dict[str, tuple[str, ...]]:
    """All specs of a folder: `<kind>=<name>` -> its nodes. Raises `Refused`, saying which file, as Kata would."""
    found: dict[str, tuple[str, ...]] = {}
    for file in sorted({*_read_by_go(folder), *_read_by_rust(folder)}):
        try:
            spec = read_spec(file.read_bytes())
        except FileNotFoundError:
            if file.is_symlink():
                raise Refused(f"{file.name}: a link to nothing") from None
            continue  # it went between the listing and the look, as it may while a plugin works
        except (Refused, OSError) as error:
            raise Refused(f"{file.name}: {error}") from None
        for name, nodes in spec.devices.items():
            qualified = f"{spec.kind}={name}"
            if qualified in found:
                raise Refused(f"{file.name}: {qualified} is in another spec too")
            for node in nodes:
                if not node_exists(node):
                    raise Refused(f"{file.name}: {qualified}: {node} does not exist")
            found[qualified] = nodes
    return found


def _read_by_go(folder: Path) -> Iterator[Path]:
    """Everything in the folder itself that is called like a spec, folders left out, but not links to folders."""
    for name in os.listdir(folder):
        path = folder / name
        if name.endswith((".json", ".yaml")) and (path.is_symlink() or not path.is_dir()):
            yield path


def _read_by_rust(folder: Path, depth: int = 0) -> Iterator[Path]:
    """The same without case, and in every folder below, through links too."""
    for name in os.listdir(folder) if depth < _DEEP_ENOUGH else ():
        path = folder / name
        if path.is_dir():
            yield from _read_by_rust(path, depth + 1)
        elif "." in name[1:] and name.lower().endswith((".json", ".yaml")):
            yield path


def nodes_of(root: Path) -> Callable[[str], bool]:
    """Whether a path is one of the nodes of the host below `root`."""
    return lambda path: (root / path.lstrip("/")).exists()


@contextmanager
def reading(look: Callable[[], object]) -> Iterator[list[str]]:
    """Reads the folder again and again on a thread; what it stumbled over is in the list afterwards."""
    faults: list[str] = []
    stop = threading.Event()
    looks = 0

    def work() -> None:
        nonlocal looks
        while not stop.is_set():
            looks += 1
            try:
                look()
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield faults
    finally:
        stop.set()
        thread.join(_PATIENCE)
    assert looks > 10


# containerEdits


def _edits(edits: Any, where: str) -> int:
    """Checks containerEdits. Returns the minor version that they need."""
    if _is_null(edits):
        return 1
    _fields(edits, where, may={"env", "deviceNodes", "hooks", "mounts"})
    needed = 1
    _environment(edits.get("env"), where)
    for node in _list(edits.get("deviceNodes"), "deviceNodes"):
        _fields(
            node,
            "a node",
            may={"path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid"},
        )
        _path(node, "path")
        if _given(node, "hostPath"):
            needed = max(needed, 5)
        if _given(node, "type") not in ("", "b", "c", "u", "p"):
            raise Refused(f"type {node['type']!r}")
        if set(_given(node, "permissions")) - set("rwm"):
            raise Refused(f"permissions {node['permissions']!r}")
        for name in ("major", "minor"):
            _number(node.get(name), name, -(2**63), 2**63 - 1)
        for name in ("fileMode", "uid", "gid"):
            _number(node.get(name), name, 0, 2**32 - 1)
    for hook in _list(edits.get("hooks"), "hooks"):
        _fields(hook, "a hook", may={"hookName", "path", "args", "env", "timeout"})
        _path(hook, "path")
        if hook.get("hookName") not in (
            *("prestart", "createRuntime", "createContainer"),
            *("startContainer", "poststart", "poststop"),
        ):
            raise Refused(f"hookName {hook.get('hookName')!r}")
        _texts(hook.get("args"), "args")
        _environment(hook.get("env"), "a hook")
        _number(hook.get("timeout"), "timeout", -(2**63), 2**63 - 1)
    for mount in _list(edits.get("mounts"), "mounts"):
        _fields(mount, "a mount", may={"hostPath", "containerPath", "type", "options"})
        _path(mount, "hostPath")
        _path(mount, "containerPath")
        _texts(mount.get("options"), "options")
        if _given(mount, "type"):
            needed = max(needed, 4)
    return needed


def _environment(entries: Any, where: str) -> None:
    for entry in _texts(entries, "env"):
        if not entry.partition("=")[0] or "=" not in entry:
            raise Refused(f"variable {entry!r} of {where}")


def _annotations(part: Mapping[str, Any]) -> int:
    """Checks annotations. Returns the minor version that they need."""
    annotations = part.get("annotations", {})
    if isinstance(annotations, Plain) and annotations == "":
        return 1
    if not isinstance(annotations, dict):
        raise Refused("annotations is not a table")  # `null` is refused too: Rust takes only the key without a value
    for key, value in annotations.items():
        prefix, slash, name = key.rpartition("/")
        if not re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", name, re.ASCII):
            raise Refused(f"annotation {key!r}")
        if slash and not all(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?", p) for p in prefix.split(".")):
            raise Refused(f"annotation {key!r}")
        _text(value, f"annotation {key!r}")
    return 6 if annotations else 1


def _is_plain(spec: Mapping[str, Any]) -> bool:
    return spec.keys() == {"cdiVersion", "kind", "devices"} and all(
        device.keys() == {"name", "containerEdits"}
        and device["containerEdits"].keys() == {"deviceNodes"}
        and all(node.keys() == {"path"} for node in device["containerEdits"]["deviceNodes"])
        for device in spec["devices"]
    )


# Values and their types


class Plain(str):
    """A scalar without quotes, as it is written: text for a field that holds text, else null, a number, a truth."""


def _parse(content: bytes | str) -> Any:
    try:
        text = content.decode() if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise Refused(f"not UTF-8: {error}") from None
    if text.startswith("\ufeff") and not text[1:].lstrip().startswith("{"):
        raise Refused("a byte order mark moves the first line of a table")
    text = text.removeprefix("\ufeff")
    try:
        return _plain_json(json.loads(text, object_pairs_hook=_once_each, parse_int=Plain, parse_float=Plain))
    except ValueError:
        pass  # YAML, then: it would take JSON as well, but PyYAML stumbles over a tab in it
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.DocumentStartEvent) and event.version not in (None, (1, 1)):
                raise Refused(f"YAML version {event.version}")
        documents = list(yaml.compose_all(text, yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise Refused(f"not YAML: {error}") from None
    if len(documents) != 1 or documents[0] is None:
        raise Refused(f"{len(documents)} documents")
    try:
        return _value(documents[0])
    except RecursionError:
        raise Refused("an anchor that contains itself") from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise Refused("a key twice")
    return dict(pairs)


def _plain_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain_json(each) for each in value]
    return Plain(json.dumps(value)) if value is None or isinstance(value, bool) else value


def _value(node: yaml.Node) -> Any:
    """No key twice, and every scalar as it is written."""
    if isinstance(node, yaml.MappingNode):
        table: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _value(key_node)
            if not isinstance(key, str) or _is_null(key):
                raise Refused(f"key {key!r} is not a text")
            if key in table:
                raise Refused(f"key {key!r} twice")
            table[key] = _value(value_node)
        return table
    if isinstance(node, yaml.SequenceNode):
        return [_value(each) for each in node.value]
    return Plain(node.value) if getattr(node, "style", None) is None else str(node.value)


def _in_go(value: Any) -> str:
    """What Go's library makes of a text: what is plain it reads as YAML 1.1, and writes that down as text again."""
    if not isinstance(value, Plain):
        return str(value)
    if value in _cases("y yes on true"):
        return "true"
    if value in _cases("n no off false"):
        return "false"
    if not re.match(r"[-+.0-9]", value):
        return str(value)
    number = re.sub(r"^([-+]?)0([0-7]+)$", r"\g<1>0o\2", value.replace("_", ""))
    try:
        return str(int(number, 0))
    except ValueError:
        pass
    try:
        return f"{float(number):g}"
    except ValueError:
        return str(value)


def _cases(words: str) -> set[str]:
    return {case for word in words.split() for case in (word, word.capitalize(), word.upper())}


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, Plain) and value in ("", "~", "null", "Null", "NULL"))


def _fields(value: Any, where: str, may: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{where} is not a table")
    if unknown := value.keys() - may:
        raise Refused(f"{where} has the unknown field {min(unknown)}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if _is_null(value):
        return []
    if not isinstance(value, list):
        raise Refused(f"{where} is not a list")
    return value


def _texts(value: Any, where: str) -> list[str]:
    return [_text(each, where) for each in _list(value, where)]


def _text(value: Any, where: str) -> str:
    """A scalar as text. Null is an empty text to Go, and its own letters to Rust."""
    if value is not None and not isinstance(value, str):
        raise Refused(f"{where} is not a text")
    return "" if _is_null(value) else str(value)


def _given(table: Mapping[str, Any], name: str) -> str:
    """A text that may be left out."""
    return _text(table.get(name), name)


def _path(table: Mapping[str, Any], name: str) -> None:
    if not _text(table.get(name), name):
        raise Refused(f"no {name}")


def _number(value: Any, where: str, lowest: int, highest: int) -> None:
    """A whole number that may be left out. Rust takes no leading zero, nor a minus where nothing is below zero."""
    if _is_null(value):
        return
    sign = r"[-+]?" if lowest < 0 else r"\+?"
    digits = r"(0|[1-9]\d*|0o[0-7]+|0x[0-9a-fA-F]+|0b[01]+)"
    if not isinstance(value, Plain) or len(value) > 99 or not re.fullmatch(sign + digits, value, re.ASCII):
        raise Refused(f"{where} {value!r}")
    if not lowest <= int(value, 0) <= highest:
        raise Refused(f"{where} {value!r}")
