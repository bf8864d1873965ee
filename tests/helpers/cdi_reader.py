"""A strict reader of CDI specs like ours: devices and their nodes, and nothing else that Kata could stumble over.

Apart from the package, and sharing no line with it. Whatever it takes, both of Kata's libraries take, unless a key is
in it twice; they take more, such as edits other than nodes, which neither the daemon nor the reference plugin writes.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_WORD = r"[A-Za-z][\w.-]*[A-Za-z0-9]"
"""Of two characters at least: Go's library panics at a vendor or class of one."""
_NAME = r"[A-Za-z0-9]([\w.:-]*[A-Za-z0-9])?"
_PATIENCE = 20.0
"""Seconds that one look at a folder may take."""


class Refused(Exception):
    """Not a spec like ours. Kata may refuse it, and with it every pod of the node. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a spec says of its devices."""

    version: str
    kind: str
    devices: Mapping[str, tuple[str, ...]]
    """Device name -> the host's paths of its nodes."""
    plain: bool = True
    """Whether it has nothing but devices: the reference also writes empty edits for all of them."""


def read_spec(content: bytes | str) -> Spec:
    """Reads one spec. Raises `Refused`."""
    try:
        spec = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError) as error:
        raise Refused(f"not YAML: {error}") from None
    plain = not (isinstance(spec, dict) and spec.pop("containerEdits", None) == {})
    version, kind, entries = _fields(spec, "cdiVersion", "kind", "devices")
    if version not in ("0.5.0", "0.6.0"):  # 0.5.0 allows names that begin with a digit; Kata reads up to 0.6.0
        raise Refused(f"version {version!r}")
    devices: dict[str, tuple[str, ...]] = {}
    for entry in _filled(entries):
        name, edits = _fields(entry, "name", "containerEdits")
        (nodes,) = _fields(edits, "deviceNodes")
        if name in devices:
            raise Refused(f"device {name!r} twice")
        devices[_matching(_NAME, name)] = tuple(_matching("/.+", *_fields(node, "path")) for node in _filled(nodes))
    return Spec(version=version, kind=_matching(rf"{_WORD}/{_WORD}", kind), devices=devices, plain=plain)


def _fields(table: Any, *names: str) -> list[Any]:
    """The values of just these fields."""
    if not isinstance(table, dict) or table.keys() != set(names):
        raise Refused(f"{table!r} has other fields than {names}")
    return [table[name] for name in names]


def _filled(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise Refused(f"{value!r} is not a list with something in it")
    return value


def _matching(pattern: str, value: Any) -> str:
    """Text, also without quotes: `010` or `on` would be something else in one of the libraries."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
        raise Refused(f"{value!r} is not like {pattern}")
    return value


def read_folder(folder: Path, node_exists: Callable[[str], bool] = lambda path: True) -> dict[str, tuple[str, ...]]:
    """All specs of a folder: `<kind>=<name>` -> its nodes. Raises `Refused`, saying which file, as Kata would."""
    found: dict[str, tuple[str, ...]] = {}
    for file in sorted(path for path in folder.iterdir() if path.name.endswith((".json", ".yaml"))):
        try:
            spec = read_spec(file.read_bytes())
        except FileNotFoundError:
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
