"""A reader of CDI specs as strict as Kata's, the Go and the Rust one at once: what either refuses, it refuses.

Apart from the package, and sharing no line with it: rules of the CDI specification (SPEC.md, versions 0.1.0 to 0.6.0),
read from YAML 1.2 node by node. What the daemon writes is held against it, and what the daemon says of others as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

VERSIONS = {"0.1.0": 1, "0.2.0": 2, "0.3.0": 3, "0.4.0": 4, "0.5.0": 5, "0.6.0": 6}
ENDINGS = (".yaml", ".json")
"""What a file is called that is read as a spec."""
_WORD = r"[A-Za-z](?:[\w.-]*[A-Za-z0-9])?"


class Refused(Exception):
    """Kata would refuse the spec, and with it every pod of the node. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a spec says of its devices."""

    version: str
    kind: str
    devices: Mapping[str, tuple[str, ...]]
    """Device name -> the host's paths of its nodes."""
    plain: bool
    """Whether it has nothing but devices, and they nothing but nodes, and those nothing but a path."""


def read_spec(content: bytes | str) -> Spec:
    """Reads one spec. Raises `Refused`."""
    text = content.decode(errors="replace") if isinstance(content, bytes) else content
    spec = _fields(
        _parse(text), "the spec", need={"cdiVersion", "kind", "devices"}, may={"containerEdits", "annotations"}
    )
    version = spec["cdiVersion"].removeprefix("v") if isinstance(spec["cdiVersion"], str) else ""
    if version not in VERSIONS:
        raise Refused(f"version {spec['cdiVersion']!r}")
    kind = _text(spec["kind"], "kind")
    if not re.fullmatch(rf"{_WORD}/{_WORD}", kind, re.ASCII):
        raise Refused(f"kind {kind!r}")
    needed = {6 if "." in kind.split("/")[1] else 1, _annotations(spec)}
    needed.add(_edits(spec.get("containerEdits"), "the spec"))
    devices: dict[str, tuple[str, ...]] = {}
    for entry in _list(spec["devices"], "devices"):
        device = _fields(entry, "a device", need={"name", "containerEdits"}, may={"annotations"})
        name = _text(device["name"], "a device's name")
        if not re.fullmatch(r"[A-Za-z0-9]([\w.:-]*[A-Za-z0-9])?", name, re.ASCII):
            raise Refused(f"device name {name!r}")
        if name in devices:
            raise Refused(f"device {name!r} twice")
        edits = device["containerEdits"]
        needed |= {5 if name[0].isdigit() else 1, _annotations(device), _edits(edits, name)}
        if not isinstance(edits, dict) or not any(edits.values()):
            raise Refused(f"device {name!r} changes nothing")
        devices[name] = tuple(node.get("hostPath") or node["path"] for node in edits.get("deviceNodes") or ())
    if not devices:
        raise Refused("no devices")
    if max(needed) > VERSIONS[version]:
        raise Refused(f"it needs version 0.{max(needed)}.0 and says {version}")
    return Spec(version=version, kind=kind, devices=devices, plain=_is_plain(spec))


def read_folder(folder: Path, node_exists: Callable[[str], bool] = lambda path: True) -> dict[str, tuple[str, ...]]:
    """All specs of a folder: `<kind>=<name>` -> its nodes. Raises `Refused`, saying which file, as Kata would."""
    found: dict[str, tuple[str, ...]] = {}
    for file in sorted(path for path in folder.rglob("*") if path.suffix in ENDINGS and not path.is_dir()):
        try:
            spec = read_spec(file.read_bytes())
        except FileNotFoundError:
            if file.is_symlink():
                raise Refused(f"{file.name}: a link to nothing") from None
            continue  # it went between the listing and the look, as it may while a plugin works
        except Refused as error:
            raise Refused(f"{file.name}: {error}") from None
        for name, nodes in spec.devices.items():
            qualified = f"{spec.kind}={name}"
            if qualified in found:
                raise Refused(f"{file.name}: {qualified} stands in another spec too")
            for node in nodes:
                if not node_exists(node):
                    raise Refused(f"{file.name}: {qualified}: {node} does not exist")
            found[qualified] = nodes
    return found


def nodes_of(root: Path) -> Callable[[str], bool]:
    """Whether a path is one of the nodes of the host below `root`."""
    return lambda path: (root / path.lstrip("/")).exists()


# containerEdits


def _edits(edits: Any, where: str) -> int:
    """Checks containerEdits. Returns the minor version that they need."""
    if edits is None:
        return 1
    _fields(edits, where, may={"env", "deviceNodes", "hooks", "mounts"})
    needed = 1
    _environment(edits.get("env"), where)
    for node in _list(edits.get("deviceNodes"), "deviceNodes"):
        _fields(
            node,
            "a node",
            need={"path"},
            may={"hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid"},
        )
        _path(node["path"])
        if _optional_text(node, "hostPath"):
            needed = max(needed, 5)
        if _optional_text(node, "type") not in ("", "b", "c", "u", "p"):
            raise Refused(f"type {node['type']!r}")
        if set(_optional_text(node, "permissions")) - set("rwm"):
            raise Refused(f"permissions {node['permissions']!r}")
        for name, lowest in {"major": None, "minor": None, "fileMode": 0, "uid": 0, "gid": 0}.items():
            _optional_number(node, name, lowest)
    for hook in _list(edits.get("hooks"), "hooks"):
        _fields(hook, "a hook", need={"hookName", "path"}, may={"args", "env", "timeout"})
        _path(hook["path"])
        if hook["hookName"] not in (
            *("prestart", "createRuntime", "createContainer"),
            *("startContainer", "poststart", "poststop"),
        ):
            raise Refused(f"hookName {hook['hookName']!r}")
        for argument in _list(hook.get("args"), "args"):
            _text(argument, "an argument")
        _environment(hook.get("env"), "a hook")
        _optional_number(hook, "timeout", None)
    for mount in _list(edits.get("mounts"), "mounts"):
        _fields(mount, "a mount", need={"hostPath", "containerPath"}, may={"type", "options"})
        _path(mount["hostPath"])
        _path(mount["containerPath"])
        for option in _list(mount.get("options"), "options"):
            _text(option, "an option")
        if _optional_text(mount, "type"):
            needed = max(needed, 4)
    return needed


def _environment(entries: Any, where: str) -> None:
    for entry in _list(entries, "env"):
        if not _text(entry, "a variable").partition("=")[0] or "=" not in entry:
            raise Refused(f"variable {entry!r} of {where}")


def _annotations(part: Mapping[str, Any]) -> int:
    """Checks annotations. Returns the minor version that they need."""
    if "annotations" not in part:
        return 1
    if not isinstance(part["annotations"], dict):
        raise Refused("annotations is no table")
    for key, value in part["annotations"].items():
        prefix, slash, name = key.rpartition("/")
        if not re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", name, re.ASCII):
            raise Refused(f"annotation {key!r}")
        if slash and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", prefix):
            raise Refused(f"annotation {key!r}")
        _text(value, f"annotation {key!r}")
    return 6 if part["annotations"] else 1


def _is_plain(spec: Mapping[str, Any]) -> bool:
    return spec.keys() == {"cdiVersion", "kind", "devices"} and all(
        device.keys() == {"name", "containerEdits"}
        and device["containerEdits"].keys() == {"deviceNodes"}
        and all(node.keys() == {"path"} for node in device["containerEdits"]["deviceNodes"])
        for device in spec["devices"]
    )


# Values and their types


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once_each)
    except ValueError:
        pass  # YAML, then: it would take JSON as well, but PyYAML stumbles over a tab in it
    try:
        documents = list(yaml.compose_all(text, yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise Refused(f"not YAML: {error}") from None
    if len(documents) != 1 or documents[0] is None:
        raise Refused(f"{len(documents)} documents")
    return _value(documents[0])


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise Refused("a key twice")
    return dict(pairs)


def _value(node: yaml.Node) -> Any:
    """YAML 1.2's core schema, and no key twice."""
    if isinstance(node, yaml.MappingNode):
        table: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _value(key_node)
            if not isinstance(key, str):
                raise Refused(f"key {key!r} is no text")
            if key in table:
                raise Refused(f"key {key!r} twice")
            table[key] = _value(value_node)
        return table
    if isinstance(node, yaml.SequenceNode):
        return [_value(each) for each in node.value]
    text = str(node.value)
    if not isinstance(node, yaml.ScalarNode) or node.style is not None:
        return text
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?(0|[1-9]\d*)|0o[0-7]+|0x[0-9a-fA-F]+", text, re.ASCII):
        return int(text, 0)
    if re.fullmatch(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?", text, re.ASCII):
        return float(text)
    return text


def _fields(value: Any, where: str, need: set[str] | None = None, may: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{where} is no table")
    for name in need or ():
        if value.get(name) is None:
            raise Refused(f"{where} has no {name}")
    if unknown := value.keys() - (need or set()) - (may or set()):
        raise Refused(f"{where} has the unknown field {min(unknown)}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise Refused(f"{where} is no list")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise Refused(f"{where} is no text")
    return value


def _path(value: Any) -> None:
    if not _text(value, "a path"):
        raise Refused("a path is empty")


def _optional_text(table: Mapping[str, Any], name: str) -> str:
    return "" if table.get(name) is None else _text(table[name], name)


def _optional_number(table: Mapping[str, Any], name: str, lowest: int | None) -> None:
    value = table.get(name)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or (lowest is not None and value < lowest):
        raise Refused(f"{name} {value!r}")
